"""Symmetric memory without a GPU: layout, choice of algorithm, arguments, errors. Tier: no device, CPU threads."""

import threading

import pytest
import torch
import torch.distributed as dist

from tp_kernels._native import native
from tp_kernels.comm import symmetric_sizes as sizes
from tp_kernels.comm.errors import CommAbortedError, CommTimeoutError
from tp_kernels.comm.symmetric import SymmetricMemoryCommunicator, SymmetricMemoryUnavailable
from tp_kernels.comm.symmetric_calls import KernelCalls
from tp_kernels.comm.symmetric_workspace import ErrorRecord, Workspace

WORLDS = range(2, sizes.MAX_WORLD + 1)


def test_constants_are_those_of_the_kernels():
    theirs = native.cuda_peer_constants()
    for name in ("max_world", "alignment", "pack_bytes", "flag_bytes", "lamport_bytes", "lamport_buffers"):
        assert getattr(sizes, name.upper()) == theirs[name], name
    for name in ("error_bytes", "max_row_packs", "max_lamport_row_packs"):
        assert getattr(sizes, name.upper()) == theirs[name], name


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
