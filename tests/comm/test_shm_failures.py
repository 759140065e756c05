"""SharedMemoryCommunicator when things go wrong: every failure ends all ranks with a story, nothing stays behind.

Tier: CPU ranks. Ranks are own processes here, not a pool: they are killed, and always reaped.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from tp_kernels.comm.errors import CommError, CommMismatchError, CommTimeoutError, PeerDiedError
from tp_kernels.comm.shm import SharedMemoryCommunicator, SharedMemoryUnavailable
from tp_kernels.testing.shm_ranks import Ranks, report_error

LARGE = 1 << 20  # elements: many chunks


# Different calls ------------------------------------------------------------------------------------------------------

CALLS = {
    "operation": (lambda c: c.barrier(), lambda c: c.all_reduce(torch.ones(7)), ["barrier", "all_reduce(sum) of 7"]),
    "size": (lambda c: c.all_reduce(torch.ones(5)), lambda c: c.all_reduce(torch.ones(7)), ["of 5 float32", "of 7"]),
    "path": (
        lambda c: c.all_reduce(torch.ones(LARGE)),
        lambda c: c.all_reduce(torch.ones(7)),
        [f"of {LARGE} float32", "of 7 float32"],
    ),
    "dtype": (
        lambda c: c.all_reduce(torch.ones(7).int()),
        lambda c: c.all_reduce(torch.ones(7)),
        ["of 7 int32", "of 7 float32"],
    ),
    "reduction": (
        lambda c: c.all_reduce(torch.ones(7), "max"),
        lambda c: c.all_reduce(torch.ones(7)),
        ["all_reduce(max)", "all_reduce(sum)"],
    ),
    "root": (lambda c: c.broadcast(torch.ones(7), 1), lambda c: c.broadcast(torch.ones(7), 0), ["src=1", "src=0"]),
    "sizes": (
        lambda c: c.reduce_scatter(torch.ones(6), sizes=[1, 2, 3]),
        lambda c: c.reduce_scatter(torch.ones(6)),
        ["reduce_scatter(sum) of 6 float32 (per-rank sizes"],
    ),
    "dim": (
        lambda c: c.all_gather(torch.ones(4, 4), dim=1),
        lambda c: c.all_gather(torch.ones(4, 4), dim=0),
        ["all_gather of 48 float32 (per-rank sizes or layout"],
    ),
}


def call_differently(comm, connection):
    kind = connection.recv()
    comm.all_reduce(torch.ones(3))
    odd, usual, _ = CALLS[kind]
    return report_error(comm, lambda: (odd if comm.rank == 1 else usual)(comm))


@pytest.mark.parametrize("kind", CALLS)
def test_different_calls_are_named_on_every_rank(kind):
    with Ranks(call_differently, 3) as ranks:
        ranks.ready()
        for connection in ranks.connections.values():
            connection.send(kind)
        results = [ranks.get(rank) for rank in range(3)]
    for result in results:
        assert result["type"] == "CommMismatchError", result
        assert result["sequence"] == 2 and result["group"] == "tp" and result["ranks"] == (1,)
        for part in [*CALLS[kind][2], "rank 0: ", "rank 1: ", "rank 2: ", "call #2"]:
            assert part in result["text"], result["text"]
        assert "broken" in result["next"]


# Late and missing ranks -----------------------------------------------------------------------------------------------


def come_late(comm, connection):
    if comm.rank == 1:
        connection.recv()
    return report_error(comm, lambda: comm.all_reduce(torch.ones(8), timeout=0.3).tolist())


def test_a_late_rank_is_named_and_learns_that_it_was_late():
    with Ranks(come_late, 3) as ranks:
        ranks.ready()
        for rank in (0, 2):
            result = ranks.get(rank)
            assert result["type"] == "CommTimeoutError", result
            assert (result["operation"], result["sequence"], result["ranks"]) == ("all_reduce", 1, (1,))
            for part in ("group 'tp'", "call #1, all_reduce(sum) of 8 float32", "rank 1", "did not call it"):
                assert part in result["text"]
            assert "broken" in result["next"]
        ranks.connections[1].send("go")
        late = ranks.get(1)
        assert late["type"] == "CommAbortedError" and "rank 1, which did not call it" in late["text"]


def wait_long_enough(comm, connection):
    if comm.rank == 1:
        time.sleep(1.2)  # past every way of waiting, the futex included
    return report_error(comm, lambda: comm.all_reduce(torch.ones(8)).tolist())


def test_a_rank_within_the_deadline_is_waited_for():
    with Ranks(wait_long_enough, 3) as ranks:
        ranks.ready()
        assert [ranks.get(rank)["value"] for rank in range(3)] == [[3.0] * 8] * 3


def test_a_rank_that_never_starts_is_named_at_creation():
    with Ranks(come_late, 3, ranks=(0, 1), timeout=1.0) as ranks:
        assert ranks.get(0)["ranks"] == (2,)
        assert ranks.get(1)["type"] == "CommTimeoutError"
    with Ranks(come_late, 3, ranks=(1, 2), timeout=0.5) as ranks:
        assert ranks.get(1)["ranks"] == ranks.get(2)["ranks"] == (0,)


# Dead ranks -----------------------------------------------------------------------------------------------------------


def work_until_it_ends(comm, connection):
    kind = connection.recv()
    x = torch.ones(LARGE if kind == "long" else 64)
    if kind == "waiting" and comm.rank == 0:
        time.sleep(1.0)  # the others sleep on the futex by then
        connection.recv()
    connection.send("working")

    def work():
        while True:
            comm.all_reduce(x)

    return report_error(comm, work)


@pytest.mark.parametrize("kind", ["long", "short", "waiting"])
def test_a_killed_rank_is_noticed_within_a_second(kind):
    with Ranks(work_until_it_ends, 3) as ranks:
        ranks.ready()
        for connection in ranks.connections.values():
            connection.send(kind)
        for rank in (1, 2) if kind == "waiting" else (0, 1, 2):
            assert ranks.get(rank) == "working"
        time.sleep(0.2)
        os.kill(ranks.processes[1].pid, signal.SIGKILL)
        killed = time.time()
        if kind == "waiting":
            assert not ranks.connections[2].poll(0.1)  # it waits for rank 0, too
            ranks.connections[0].send("go")
            assert ranks.get(0) == "working"
        results = [ranks.get(rank) for rank in (0, 2)]
    for result in results:
        assert result["type"] == "PeerDiedError", result
        assert result["ranks"] == (1,) and "rank 1 (pid" in result["text"]
        assert result["at"] - killed < 2.0
    assert issubclass(PeerDiedError, CommTimeoutError)


def test_killing_every_rank_leaves_nothing():
    for wait in (0.0, 0.02, 0.1):
        with Ranks(work_until_it_ends, 3) as ranks:
            time.sleep(wait)
            for process in ranks.processes.values():
                os.kill(process.pid, signal.SIGKILL)
        assert not [name for name in os.listdir("/dev/shm") if "tp_kernels" in name]


# Unavailable ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_tmpfs(size):
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", ["64k", "300k"])
def test_a_directory_that_is_too_small_fails_on_every_rank_alike(size):
    with tiny_tmpfs(size) as folder, Ranks(come_late, 3, directory=folder) as ranks:
        results = [ranks.get(rank) for rank in range(3)]
        assert {result["type"] for result in results} == {"SharedMemoryUnavailable"}
        assert len({result["text"] for result in results}) == 1
        assert folder in results[0]["text"] and "bytes" in results[0]["text"]
        assert os.listdir(folder) == []


def test_a_rank_that_cannot_reach_the_segment_fails_all(monkeypatch):
    import threading

    import torch.distributed as dist

    import tp_kernels.comm.shm as shm

    store, errors = dist.HashStore(), {}
    place = shm._place
    monkeypatch.setattr(shm, "_place", lambda: place() + threading.current_thread().name[:1])

    def rank(r):
        try:
            SharedMemoryCommunicator.create(r, 2, "apart", store, timeout=10)
        except SharedMemoryUnavailable as error:
            errors[r] = error.reason

    threads = [threading.Thread(target=rank, args=(r,), name=f"{r}") for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors[0] == errors[1] and "another host" in errors[0]


def test_exit_without_close_is_clean():
    """Interpreter exit with an open communicator: status 0, no message."""
    script = (
        "import torch, torch.distributed as dist\n"
        "from tp_kernels.comm.shm import SharedMemoryCommunicator as S\n"
        "comm = S.create(0, 1, 'x', dist.HashStore())\n"
        "assert comm.all_reduce(torch.ones(3)).tolist() == [1, 1, 1]\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_error_types():
    assert issubclass(CommMismatchError, CommError) and not issubclass(CommMismatchError, CommTimeoutError)
