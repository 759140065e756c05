"""Symmetric memory without a GPU: layout, choice of algorithm, arguments, errors. Tier: no device, CPU threads."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tp_kernels._native import native
from tp_kernels.comm import symmetric_sizes as sizes
from tp_kernels.comm.errors import CommAbortedError, CommMismatchError, CommTimeoutError, PeerDiedError
from tp_kernels.comm.nccl_peers import Peers
from tp_kernels.comm.symmetric import SymmetricMemoryCommunicator, SymmetricMemoryUnavailable
from tp_kernels.comm.symmetric_calls import KernelCalls
from tp_kernels.comm.symmetric_workspace import ErrorRecord, Workspace

WORLDS = range(2, sizes.MAX_WORLD + 1)


def test_constants_are_those_of_the_kernels():
    theirs = native.cuda_peer_constants()
    for name in ("max_world", "alignment", "pack_bytes", "flag_bytes", "lamport_bytes", "lamport_buffers"):
        assert getattr(sizes, name.upper()) == theirs[name], name
    for name in ("error_bytes", "max_row_packs", "max_lamport_row_packs", "max_blocks", "empty_word", "error_magic"):
        assert getattr(sizes, name.upper()) == theirs[name], name


def test_offsets_of_the_flags_are_those_of_the_kernels(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    facts = {
        "offsetof(Flags, signal)": 0,
        "sizeof(Flags::signal[0])": 8 * sizes.MAX_WORLD,
        "offsetof(Flags, state)": sizes.STATE_OFFSET,
        "sizeof(BlockState)": sizes.STATE_BYTES,
        "offsetof(BlockState, calls)": 0,
        "offsetof(Flags, failed)": sizes.FAILED_OFFSET,
        "kMaxRowBlocks": sizes.MAX_ROW_BLOCKS,
        "offsetof(Flags, linear.arrived)": sizes.ARRIVED_OFFSET,
        "offsetof(Flags, linear.finished)": sizes.FINISHED_OFFSET,
        "offsetof(Flags, linear.multiplied)": sizes.MULTIPLIED_OFFSET,
        "offsetof(Flags, linear.reduced)": sizes.REDUCED_OFFSET,
        "offsetof(Flags, linear.taken)": sizes.TAKEN_OFFSET,
        **{f"offsetof(ErrorRecord, {name})": getattr(ErrorRecord, name).offset for name, _ in ErrorRecord._fields_},
        "signal_value(5, 1)": 5 * 4 + 1 + 1,  # as the Triton kernels have it
        "half_of(3)": 1,
    }
    lines = [f"static_assert({expression} == {value});" for expression, value in facts.items()]
    source = tmp_path / "offsets.cpp"
    source.write_text("\n".join(['#include "kernels/peer_layout.h"', "using namespace tpk::peer;", *lines]))
    folder = Path(__file__).resolve().parents[2] / "csrc"
    run = subprocess.run(
        [compiler, "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", "-I", str(folder), str(source)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("max_bytes", [1, 4096, (1 << 20) + 5, 64 << 20])
@pytest.mark.parametrize("world_size", [2, 3, 8, 16])
def test_layout_is_the_kernels_own(world_size, max_bytes):
    layout = sizes.layout_of(world_size, max_bytes)
    registered = layout.flags - layout.inputs
    native_layout = native.cuda_peer_layout(world_size, layout.half_bytes, registered)
    assert native_layout[:3] == (layout.half_bytes, layout.inputs, layout.flags)
    assert native_layout[4] == layout.total_bytes
    assert layout.half_bytes >= max_bytes
    parts = [layout.inputs, layout.outputs, layout.mailbox, layout.flags]
    assert parts == sorted(parts) and all(at % sizes.ALIGNMENT == 0 for at in parts)
    assert layout.outputs - layout.inputs >= layout.half_bytes and layout.mailbox - layout.outputs >= layout.half_bytes
    assert layout.flags - layout.mailbox == layout.mailbox_bytes
    assert layout.mailbox_bytes // world_size >= sizes.PACK_BYTES


@pytest.mark.parametrize("world_size, max_bytes", [(1, 1024), (17, 1024), (2, 0), (2, 1 << 35)])
def test_layouts_that_cannot_be(world_size, max_bytes):
    with pytest.raises(ValueError, match="symmetric memory"):
        sizes.layout_of(world_size, max_bytes)


def test_algorithms_take_over_from_each_other_in_order():
    order = ["lamport", "one_shot", "two_shot"]
    for world in WORLDS:
        chosen = [order.index(sizes.algorithm_for(1 << power, world)) for power in range(28)]
        assert chosen == sorted(chosen) and chosen[0] == 0 and chosen[-1] == 2
        assert sizes.algorithm_for(sizes.LAMPORT_BYTES + 1, world) != "lamport"
        for width, size in ((4096, 2), (8192, 2), (8192, 4), (16384, 2), (5, 2)):
            names = [sizes.norm_algorithm_for(rows, width, size, world) for rows in (1, 2, 4, 4096, 1 << 20)]
            assert names[-1] == "two_shot"
            for rows, name in zip((1, 2, 4), names, strict=False):
                if name == "lamport":
                    assert sizes.row_packs(width, size) <= sizes.MAX_LAMPORT_ROW_PACKS
                    assert rows <= sizes.lamport_rows(width, size)


def test_divided_calls_fit_the_staging_halves():
    half = 1 << 20
    for width, itemsize in ((1, 2), (5, 4), (4096, 2), (16384, 2), (8192, 4)):
        rows = sizes.rows_per_call(width, itemsize, half)
        staged = 2 * sizes.row_packs(width, itemsize) * sizes.PACK_BYTES
        assert rows >= 1 and rows * staged <= half < (rows + 1) * staged
    assert sizes.rows_per_call(16385, 2, half) == 0 and sizes.rows_per_call(0, 2, half) == 0


# Errors --------------------------------------------------------------------------------------------------------------


class FakeWorkspace:
    """What ``KernelCalls`` needs of a workspace before anything is launched."""

    def __init__(self):
        self.layout = sizes.layout_of(2, 4096)
        self.record = ErrorRecord()
        self.mailboxes = [torch.zeros(16, dtype=torch.uint8)] * 2
        self.multicast = 0


@pytest.fixture
def communicator(monkeypatch):
    workspace = FakeWorkspace()
    made = SymmetricMemoryCommunicator(workspace, 0, 2, "tp", 5.0, 8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launched = []
    monkeypatch.setattr(KernelCalls, "launch", lambda self, function, *arguments: launched.append(arguments))
    for name in ("cuda_peer_all_reduce", "cuda_peer_all_reduce_norm"):
        monkeypatch.setattr(native, name, lambda *_: None, raising=False)
    workspace.data = workspace.flags = [0, 0]
    workspace.record_address = 0
    return made, workspace, launched


def give_up(record, kind, call):
    record.kind, record.rank, record.call, record.waiter, record.block = kind, 1, call, 0, 3
    record.magic = 7


@pytest.mark.parametrize("kind, call, operation", [(1, 2, "barrier"), (1, 0, "all_reduce"), (2, 0, "all_reduce")])
def test_an_error_names_rank_operation_and_sequence(communicator, kind, call, operation):
    made, workspace, launched = communicator
    x = torch.zeros(8)
    made.all_reduce(x, algorithm="one_shot")
    made.all_reduce(x, algorithm="two_shot")
    made.all_reduce(x)  # Lamport
    made._calls.begin("barrier")
    made._calls.meet(None)
    assert len(launched) == 4 and made.sequence == 4
    made.check()
    give_up(workspace.record, kind, call)
    with pytest.raises(CommTimeoutError, match=r"group tp: rank 0 gave up waiting for rank 1 in .*block 3") as caught:
        made.check()
    expected = {("barrier", 2): 4, ("all_reduce", 0): 1 if kind == 1 else 3}[operation, call]
    assert caught.value.ranks == (1,) and caught.value.operation == operation and caught.value.sequence == expected
    with pytest.raises(CommAbortedError, match="cannot use this communicator"):
        made.all_reduce(x)


def test_after_a_capture_calls_have_no_numbers(communicator, monkeypatch):
    made, workspace, _ = communicator
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    made.all_reduce(torch.zeros(8), algorithm="one_shot")
    give_up(workspace.record, ErrorRecord.SIGNAL, 0)
    with pytest.raises(CommTimeoutError, match="in a collective") as caught:
        made.all_reduce(torch.zeros(8))
    assert caught.value.operation is None and caught.value.ranks == (1,)


def test_long_messages_are_divided(communicator):
    made, _, launched = communicator
    x = torch.zeros(5000, dtype=torch.bfloat16)
    made.all_reduce(x, out=x, algorithm="two_shot")
    assert [arguments[9] for arguments in launched] == [2048, 2048, 904]
    assert [arguments[7] - x.data_ptr() for arguments in launched] == [0, 4096, 8192]
    assert all(arguments[7] == arguments[8] for arguments in launched)
    launched.clear()
    rows, width = 7, 600
    x, w = torch.zeros(rows, width, dtype=torch.bfloat16), torch.ones(width, dtype=torch.bfloat16)
    made.all_reduce_add_rms_norm(x, x.clone(), w, 1e-6, algorithm="two_shot")
    assert [arguments[13] for arguments in launched] == [1] * rows
    assert [arguments[6] - x.data_ptr() for arguments in launched] == [1200 * row for row in range(rows)]
    launched.clear()
    for empty in (torch.zeros(0), torch.zeros(0, 3)):
        assert made.all_reduce(empty).shape == empty.shape
    assert not launched


def test_arguments_are_checked(communicator):
    made, _, launched = communicator
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="sum"):
        made.all_reduce(x, "product")
    with pytest.raises(ValueError, match="out must be"):
        made.all_reduce(x, out=torch.zeros(8))
    with pytest.raises(ValueError, match="algorithm"):
        made.all_reduce(x, algorithm="three_shot")
    with pytest.raises(ValueError, match="timeout"):
        made.all_reduce(x, timeout=0)
    with pytest.raises(ValueError, match="carries tensors on cpu"):
        made.all_reduce(x.to("meta"))
    with pytest.raises(ValueError, match="src"):
        made.broadcast(x, 2)
    with pytest.raises(ValueError, match="dim"):
        made.all_gather(x, dim=2)
    with pytest.raises(ValueError, match="sizes"):
        made.all_gather(x, sizes=[3, 4])
    with pytest.raises(ValueError, match="use"):
        made.get_buffer((2,), torch.float32, "both")
    assert made.get_buffer((4097,), torch.uint8) is None
    w = torch.ones(8)
    for operands, match in (
        ((x, x[:2], w), "residual"),
        ((x, x, w[:4]), "weight"),
        ((x, x, w.double()), "weight"),
        ((x.double(), x, w), "no kernel"),
        ((x.t().contiguous().t(), x, w), "contiguous"),
    ):
        with pytest.raises(ValueError, match=match):
            made.all_reduce_add_rms_norm(*operands, 1e-6)
    assert not launched


def test_views_are_kept_and_stay_writable():
    memory = torch.zeros(1 << 16, dtype=torch.uint8)

    workspace = Workspace.__new__(Workspace)
    workspace._base, workspace._views = memory, {}
    with torch.inference_mode():
        view = workspace.tensor(1024, (3, 4), torch.bfloat16)
    assert view is workspace.tensor(1024, (3, 4), torch.bfloat16) and not view.is_inference()
    view.fill_(1)
    assert memory[1024:1048].view(torch.bfloat16).eq(1).all() and memory.count_nonzero() == 24


def test_all_ranks_hear_why_one_cannot():
    store, errors = dist.HashStore(), {}

    def rank_main(rank):
        try:
            SymmetricMemoryCommunicator.create(rank, 2, "tp", store, None, torch.device("cpu"), timeout=10)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {type(error) for error in errors.values()} == {SymmetricMemoryUnavailable} and len(errors) == 2
    assert len({str(error) for error in errors.values()}) == 1 and errors[0].reason.startswith("rank 0: ")


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(CommTimeoutError, match=r"never arrived: ranks \[1\]"):
        SymmetricMemoryCommunicator.create(0, 2, "tp", dist.HashStore(), None, torch.device("cpu"), timeout=0.2)


# Other ranks: what differs, who died ---------------------------------------------------------------------------------


def on_threads(function, world=2):
    """``function(rank)`` on a thread for each rank; results or errors in rank order."""
    found = [None] * world

    def main(rank):
        try:
            found[rank] = function(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def checked(store, rank, timeout=10.0):
    """A communicator in check mode over CPU tensors whose kernels do nothing."""
    workspace = FakeWorkspace()
    workspace.data = workspace.flags = [0, 0]
    workspace.record_address = 0
    peers = Peers(store, rank, 2, "tp", {}, timeout)
    return SymmetricMemoryCommunicator(workspace, rank, 2, "tp", timeout, 8, peers=peers, check=True)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(KernelCalls, "launch", lambda self, function, *arguments: None)
    for name in ("cuda_peer_all_reduce", "cuda_peer_all_reduce_norm", "cuda_reduce_buffers"):
        monkeypatch.setattr(native, name, lambda *_: None, raising=False)


W = torch.ones(8)
DIFFERENT = {
    "shape": (lambda c: c.all_reduce(torch.ones(3)), lambda c: c.all_reduce(torch.ones(4)), "shape=[3]", "shape=[4]"),
    "dtype": (
        lambda c: c.all_reduce(torch.ones(4)),
        lambda c: c.all_reduce(torch.ones(8, dtype=torch.bfloat16)[:4]),
        "dtype=float32",
        "dtype=bfloat16",
    ),
    "order": (lambda c: c.all_reduce(torch.ones(3)), lambda c: c.broadcast(torch.ones(3)), "all_reduce", "broadcast"),
    "root": (lambda c: c.broadcast(W), lambda c: c.broadcast(W, 1), "src=0", "src=1"),
    "sizes": (
        lambda c: c.all_gather(torch.ones(3), sizes=[3, 4]),
        lambda c: c.all_gather(torch.ones(5), sizes=[3, 5]),
        "sizes=[3, 4]",
        "sizes=[3, 5]",
    ),
    "algorithm": (
        lambda c: c.all_reduce(W, algorithm="one_shot"),
        lambda c: c.all_reduce(W, algorithm="two_shot"),
        "algorithm=one_shot",
        "algorithm=two_shot",
    ),
    "bias": (
        lambda c: c.all_reduce_add_rms_norm(W, W, W, 1e-6),
        lambda c: c.all_reduce_add_rms_norm(W, W, W, 1e-6, bias=W),
        "bias=False",
        "bias=True",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_check_mode_says_who_called_what(no_kernels, what):
    *calls, first, second = DIFFERENT[what]
    store = dist.HashStore()

    def rank_main(rank):
        communicator = checked(store, rank)
        communicator.all_reduce(torch.ones(5))  # equal on both
        # Parts along the gathered dimension may differ.
        communicator._calls.begin("all_gather", torch.ones(3 + rank), shape=[])
        with pytest.raises(CommMismatchError) as caught:
            calls[rank](communicator)
        with pytest.raises(CommAbortedError, match="ranks called different collectives"):
            communicator.barrier()
        return caught.value

    for error in on_threads(rank_main):
        assert isinstance(error, CommMismatchError), error
        assert error.ranks == (0, 1) and error.sequence == 3 and error.group == "tp"
        zeroth, last = str(error).split("rank 0: ")[1].split("rank 1: ")
        assert first in zeroth and second in last, error


def test_parts_of_a_gather_may_differ_along_its_dimension(no_kernels, monkeypatch):
    store, seen = dist.HashStore(), []
    compare = KernelCalls._compare
    monkeypatch.setattr(
        KernelCalls,
        "_compare",
        lambda self, operation, x, timeout, facts: [seen.append(facts), compare(self, operation, x, timeout, facts)],
    )
    monkeypatch.setattr(SymmetricMemoryCommunicator, "_gather", lambda self, x, shapes, timeout: [x])

    def rank_main(rank):
        checked(store, rank).all_gather(torch.ones(2, 3 + rank), dim=-1, sizes=[3, 4])

    assert on_threads(rank_main) == [None, None] and [facts["shape"] for facts in seen] == [[2], [2]]


def test_check_mode_names_a_rank_that_does_not_call(no_kernels):
    store = dist.HashStore()

    def rank_main(rank):
        communicator = checked(store, rank, timeout=0.3)
        if rank == 0:
            communicator.all_reduce(torch.ones(5))

    error, nothing = on_threads(rank_main)
    assert isinstance(error, CommTimeoutError) and error.ranks == (1,) and nothing is None


def test_a_rank_that_was_killed_is_told_from_one_that_is_late():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        workspace = FakeWorkspace()
        peers = Peers.__new__(Peers)
        peers._pids = {1: process.pid}
        made = SymmetricMemoryCommunicator(workspace, 0, 2, "tp", 5.0, 8, peers=peers)
        late = SymmetricMemoryCommunicator(workspace, 0, 2, "tp", 5.0, 8, peers=peers)
        give_up(workspace.record, ErrorRecord.SIGNAL, 0)
        with pytest.raises(CommTimeoutError) as caught:
            late.check()
        assert type(caught.value) is CommTimeoutError
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        with pytest.raises(PeerDiedError, match=r"waiting for rank 1 .*the process of rank 1 has ended") as caught:
            made.check()
        assert caught.value.ranks == (1,)
        with pytest.raises(CommAbortedError, match="has ended"):
            made.barrier()
    finally:
        process.kill()
        process.wait(10)


class PendingEvent:
    """An event of a kernel that ends when the host says stop."""

    record_of: ErrorRecord

    def record(self, stream):
        pass

    def query(self):
        return self.record_of.magic == ErrorRecord.STOP


@pytest.mark.parametrize("dead", [True, False])
def test_closing_does_not_wait_for_a_dead_rank(monkeypatch, dead):
    workspace = FakeWorkspace()
    workspace.close = lambda: None
    peers = Peers.__new__(Peers)
    peers.dead = lambda: [1] if dead else []
    made = SymmetricMemoryCommunicator(workspace, 0, 2, "tp", 5.0, 8, peers=peers)
    monkeypatch.setattr(PendingEvent, "record_of", workspace.record, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", PendingEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    sleeps = itertools.count()
    monkeypatch.setattr("time.sleep", lambda seconds: next(sleeps))
    monkeypatch.setattr("tp_kernels.comm.symmetric_calls._CLOSE_PATIENCE", 0.05)
    made.close()
    assert workspace.record.magic == ErrorRecord.STOP
    assert (next(sleeps) == 0) == dead  # else the kernels get their time first
