"""SharedMemoryCommunicator when things go wrong: every failure ends all ranks with a story, nothing stays behind.

Tier: CPU ranks. Ranks are own processes here, not a pool: they are killed, and always reaped.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from tp_kernels.comm.errors import (
    CommAbortedError,
    CommError,
    CommMismatchError,
    CommTimeoutError,
    PeerDiedError,
)
from tp_kernels.comm.shm import SharedMemoryCommunicator, SharedMemoryUnavailable

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "tp_kernels.comm.shm"])
LARGE = 1 << 20  # elements: many chunks


def report_error(comm, call):
    """Run ``call``; what it raised, as plain data, and how the next call ends."""
    try:
        value = call()
        return {"type": None, "value": value}
    except (CommError, KeyboardInterrupt) as error:
        raised = error
    result = {"type": type(raised).__name__, "text": str(raised), "at": time.time()}
    for name in ("group", "operation", "sequence", "ranks"):
        result[name] = getattr(raised, name, None)
    try:
        comm.barrier(timeout=5)
    except CommAbortedError as error:
        result["next"] = str(error)
    return result


def rank_main(body, rank, world_size, path, connection, options):
    import torch.distributed as dist

    torch.set_num_threads(1)
    options = dict(options)
    ready = options.pop("announce", True)
    try:
        comm = SharedMemoryCommunicator.create(rank, world_size, "tp", dist.FileStore(path, world_size), **options)
        if ready:
            connection.send("ready")
        connection.send(body(comm, connection))
    except SharedMemoryUnavailable as error:
        connection.send({"type": "SharedMemoryUnavailable", "text": error.reason})
    except CommTimeoutError as error:
        connection.send({"type": "CommTimeoutError", "text": str(error), "ranks": error.ranks})


class Ranks:
    """Processes that each run ``body(comm, connection)``; killed and reaped at the end."""

    def __init__(self, body, world_size, ranks=None, **options):
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.connections = {}, {}
        options.setdefault("timeout", 30.0)
        for rank in range(world_size) if ranks is None else ranks:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=rank_main,
                args=(body, rank, world_size, os.path.join(self.folder.name, "store"), theirs, options),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes[rank], self.connections[rank] = process, ours

    def get(self, rank, timeout=30):
        assert self.connections[rank].poll(timeout), f"rank {rank} said nothing for {timeout} s"
        return self.connections[rank].recv()

    def ready(self):
        for rank in self.processes:
            message = self.get(rank)
            assert message == "ready", message

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join()
        self.folder.cleanup()


@pytest.fixture(autouse=True)
def shared_memory_stays_clean():
    before = set(os.listdir("/dev/shm"))
    yield
    assert set(os.listdir("/dev/shm")) <= before


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


# Leaving --------------------------------------------------------------------------------------------------------------


def leave(comm, connection):
    comm.barrier()
    if comm.rank == 2:
        time.sleep(0.3)
        comm.close()
        comm.close()
        return report_error(comm, comm.barrier)
    return report_error(comm, comm.barrier)


def test_closing_while_others_wait_is_told():
    with Ranks(leave, 3) as ranks:
        ranks.ready()
        for rank in (0, 1):
            result = ranks.get(rank)
            assert result["type"] == "CommAbortedError" and result["ranks"] == (2,), result
            assert "rank 2 left the group" in result["text"]
        own = ranks.get(2)
        assert own["type"] == "CommAbortedError" and "closed" in own["text"]


def finish_and_leave(comm, connection):
    """A rank that has given all it owes may leave at once."""
    total = 0.0
    for length in (5, LARGE):
        total += comm.all_reduce(torch.ones(length))[-1].item()
    comm.close()
    return total


def test_leaving_after_the_last_call_disturbs_nobody():
    for _ in range(5):
        with Ranks(finish_and_leave, 3) as ranks:
            ranks.ready()
            assert [ranks.get(rank) for rank in range(3)] == [6.0] * 3


def close_from_another_thread(comm, connection):
    import threading

    if comm.rank == 1:
        time.sleep(1.0)
        return report_error(comm, comm.barrier)
    threading.Timer(0.3, comm.close).start()
    return report_error(comm, comm.barrier)


def test_closing_from_another_thread_ends_a_waiting_call():
    with Ranks(close_from_another_thread, 2) as ranks:
        ranks.ready()
        assert ranks.get(0)["type"] == "CommAbortedError"
        assert ranks.get(1)["type"] == "CommAbortedError"


def close_from_several_threads(comm, connection):
    import threading

    if comm.rank == 1:
        return report_error(comm, comm.barrier) if connection.poll(10) else None
    outcome = []
    waiting = threading.Thread(target=lambda: outcome.append(report_error(comm, comm.barrier)))
    waiting.start()
    time.sleep(0.05)
    closing = [threading.Thread(target=comm.close) for _ in range(8)]
    for thread in closing:
        thread.start()
    for thread in [*closing, waiting]:
        thread.join()
    return outcome[0]


def test_several_threads_may_close_while_a_call_waits():
    """The segment may be unmapped once only, and not before the call has left it."""
    with Ranks(close_from_several_threads, 2) as ranks:
        ranks.ready()
        assert ranks.get(0)["type"] == "CommAbortedError"
        ranks.connections[1].send("go")
        assert "closed during a call" in ranks.get(1)["text"]


def call_from_two_threads(comm, connection):
    import threading

    if comm.rank == 0:
        waiting = threading.Thread(target=comm.barrier)
        waiting.start()
        time.sleep(0.2)
        try:
            comm.barrier()
        except ValueError as error:
            connection.send(str(error))
        connection.recv()
        waiting.join()
    else:
        connection.recv()
        comm.barrier()
    return comm.all_reduce(torch.ones(1)).item()


def test_two_threads_at_once_are_refused_and_harm_nothing():
    with Ranks(call_from_two_threads, 2) as ranks:
        ranks.ready()
        assert "two threads" in ranks.get(0)
        for connection in ranks.connections.values():
            connection.send("go")
        assert ranks.get(0) == ranks.get(1) == 2.0


# Signals and forks ----------------------------------------------------------------------------------------------------


def be_interrupted(comm, connection):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handled = []
    signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))
    if comm.rank == 1:
        connection.recv()
    connection.send("waiting")
    result = report_error(comm, comm.barrier)
    return result | {"handled": len(handled)}


def test_ctrl_c_ends_the_wait_and_other_signals_do_not():
    with Ranks(be_interrupted, 3) as ranks:
        ranks.ready()
        assert ranks.get(0) == ranks.get(2) == "waiting"
        time.sleep(0.2)
        os.kill(ranks.processes[0].pid, signal.SIGUSR1)
        assert not ranks.connections[0].poll(0.3)
        os.kill(ranks.processes[0].pid, signal.SIGINT)
        interrupted = ranks.get(0)
        assert interrupted["type"] == "KeyboardInterrupt" and interrupted["handled"] == 1
        assert "broken" in interrupted["next"]
        other = ranks.get(2)
        assert other["type"] == "CommAbortedError" and "rank 0 was interrupted" in other["text"]
        assert other["ranks"] == (0,)
        ranks.connections[1].send("go")
        assert ranks.get(1) == "waiting"
        assert "rank 0 was interrupted" in ranks.get(1)["text"]


def close_in_a_handler(comm, connection):
    signal.signal(signal.SIGTERM, lambda *_: comm.close())
    if comm.rank == 1:
        connection.recv()
    connection.send("waiting")
    return report_error(comm, comm.barrier)


def test_a_signal_handler_may_close_the_communicator_it_interrupts():
    with Ranks(close_in_a_handler, 2) as ranks:
        ranks.ready()
        assert ranks.get(0) == "waiting"
        time.sleep(0.2)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        assert "closed during a call" in ranks.get(0, timeout=5)["text"]
        ranks.connections[1].send("go")
        assert ranks.get(1) == "waiting"
        assert ranks.get(1)["ranks"] == (0,)


def fork_and_go_on(comm, connection):
    comm.barrier()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            comm.barrier()
        except CommError as error:
            status = 0 if "forked child" in str(error) else 2
        comm.close()  # must not tell the others that the parent left
        os._exit(status)
    _, status = os.waitpid(child, 0)
    return status, comm.all_reduce(torch.ones(3)).tolist()


def test_a_forked_child_is_refused_and_the_parent_goes_on():
    with Ranks(fork_and_go_on, 2) as ranks:
        ranks.ready()
        assert ranks.get(0) == ranks.get(1) == (0, [2.0] * 3)


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


class StoreWithRoom:
    """A FileStore, which opens its file at each use, exempt from the limit on open files."""

    def __init__(self, path, world_size, limit):
        import torch.distributed as dist

        self.store, self.limit = dist.FileStore(path, world_size), limit
        self.restrict(self.limit)

    @staticmethod
    def restrict(soft):
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def unrestricted(self, method, *arguments):
        self.restrict(self.limit + 64)
        try:
            return getattr(self.store, method)(*arguments)
        finally:
            self.restrict(self.limit)

    def set(self, *arguments):
        return self.unrestricted("set", *arguments)

    def get(self, *arguments):
        return self.unrestricted("get", *arguments)

    def check(self, *arguments):
        return self.unrestricted("check", *arguments)


def run_out_of_files(comm, connection):
    path = connection.recv()
    # Two free descriptors: enough for the segment, too few to watch three peers.
    free = [os.dup(0), os.dup(0)]
    for descriptor in free:
        os.close(descriptor)
    store = StoreWithRoom(path, comm.world_size, max(free) + 1)
    second = SharedMemoryCommunicator.create(comm.rank, comm.world_size, "second", store, timeout=20)
    if comm.rank == comm.world_size - 1:
        time.sleep(0.3)
    value = second.all_reduce(torch.ones(1)).item()
    store.restrict(store.limit + 64)  # the store's destructor opens its file as well
    return value


def test_a_rank_out_of_file_descriptors_does_not_take_the_others_for_dead():
    with Ranks(run_out_of_files, 4) as ranks:
        ranks.ready()
        for connection in ranks.connections.values():
            connection.send(os.path.join(ranks.folder.name, "second"))
        assert [ranks.get(rank) for rank in range(4)] == [4.0] * 4


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
