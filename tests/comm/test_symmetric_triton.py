"""Symmetric memory with nothing but the Triton kernels: a native core without CUDA. Tier: no device (interpreter)."""

import pytest
import torch

from tp_kernels.comm import symmetric_sizes as sizes
from tp_kernels.comm import symmetric_workspace
from tp_kernels.comm.paths import SYMM, TRITON, default_table
from tp_kernels.comm.routed import LINEAR, RoutedCommunicator
from tp_kernels.comm.symmetric import SymmetricMemoryCommunicator, SymmetricMemoryUnavailable
from tp_kernels.comm.symmetric_calls import KernelCalls
from tp_kernels.comm.symmetric_workspace import ErrorRecord, Workspace, common_algorithms, unavailable_reason
from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.ops.all_reduce_norm import all_reduce_add_rms_norm_reference
from tp_kernels.testing.numeric import integers


def test_what_all_ranks_have_is_used():
    both, cuda = {"cuda": True, "triton": True}, {"cuda": True, "triton": False}
    triton, none = {"cuda": False, "triton": True}, {"cuda": False, "triton": False}
    assert common_algorithms([both, both]) == (*sizes.CUDA_ALGORITHMS, "triton")
    assert common_algorithms([both, cuda]) == sizes.CUDA_ALGORITHMS
    assert common_algorithms([triton, both, both]) == ("triton",)
    for facts in ([cuda, triton], [both, none]):
        with pytest.raises(SymmetricMemoryUnavailable, match=r"no kernels in common \(rank 0: cuda.*rank 1: "):
            common_algorithms(facts)


@pytest.mark.parametrize("triton", [True, False])
def test_a_core_without_cuda_is_no_obstacle_where_triton_is(monkeypatch, triton):
    monkeypatch.setattr(symmetric_workspace, "has_cuda", lambda: False)
    monkeypatch.setattr(symmetric_workspace, "has_triton", lambda: triton)
    reason = unavailable_reason(torch.device("cpu"))
    assert ("tensors are on cpu" in reason) == triton and ("without CUDA, and Triton" in reason) != triton


class CpuWorkspace:
    """Two ranks' memory in this process; rank 1 has staged ``ones`` in both halves, and every flag is of no account."""

    def __init__(self):
        self.layout = sizes.layout_of(2, 4096)
        storage = [torch.zeros(self.layout.total_bytes + 1024, dtype=torch.uint8) for _ in range(2)]
        self.memory = [s[-s.data_ptr() % 1024 :][: self.layout.total_bytes] for s in storage]
        self._base, self._views = self.memory[0], {}
        Workspace.prepare(self)
        self.data = [m.data_ptr() for m in self.memory]
        self.flags = [address + self.layout.flags for address in self.data]
        self.record, self.multicast = ErrorRecord(), 16
        self.table = torch.tensor([*self.data, *self.flags, 0])
        self.mailboxes = [m[self.layout.mailbox :][: self.layout.mailbox_bytes] for m in self.memory]

    def play(self, x):
        """Rank 1 has ``x`` in both halves, again and again, and among its inputs."""
        for start in (0, self.layout.half_bytes, self.layout.inputs):
            there = self.memory[1][start : start + self.layout.half_bytes].view(x.dtype)
            there[: x.numel()] = x.flatten()

    def play_partial(self, x):
        """Rank 1 has stored ``x``, its partial sums of at most one row block, in both halves."""
        for start in (0, self.layout.half_bytes):
            there = self.memory[0][start + 64 * x.shape[1] * x.element_size() :][: x.nbytes]
            there.view(x.dtype).view(x.shape).copy_(x)

    tensor = Workspace.tensor


def test_preparing_empties_the_kernels_part():
    workspace = CpuWorkspace()
    layout = workspace.layout
    assert not workspace.memory[0][: layout.flags + sizes.FLAG_BYTES].any()
    words = workspace.memory[0][layout.flags + sizes.FLAG_BYTES :].view(torch.int32)
    assert words.numel() * 4 == sizes.LAMPORT_BUFFERS * 2 * sizes.LAMPORT_BYTES
    assert (words == sizes.EMPTY_WORD - (1 << 32)).all()


@pytest.fixture
def by_triton(monkeypatch):
    """(communicator of rank 0 with nothing but the Triton kernels, in the interpreter; its workspace)."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu_ranks runs these kernels on it")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(KernelCalls, "launch", lambda self, function, *arguments: function(*arguments, 0))
    workspace = CpuWorkspace()
    return SymmetricMemoryCommunicator(workspace, 0, 2, "tp", 5.0, 2, ("triton",)), workspace


def test_sums_and_data_by_the_triton_kernels_alone(by_triton):
    made, workspace = by_triton
    assert made.algorithms == ("triton",) and not made.has_multicast and made.fused_norm
    mine, theirs = (integers((1000,), torch.float32, seed=seed) for seed in range(2))
    workspace.play(theirs)
    assert torch.equal(made.all_reduce(mine), mine + theirs)
    assert torch.equal(made.reduce_scatter(mine, sizes=[300, 700]), (mine + theirs)[:300])
    x = made.get_buffer((1000,), torch.float32).copy_(mine)
    assert torch.equal(made.all_reduce(x), mine + theirs)  # where it is
    assert torch.equal(made.all_reduce(x, out=x), mine + theirs)
    long = integers((2500,), torch.float32, seed=2)  # three pieces of 1024 elements
    assert torch.equal(made.all_reduce(long)[:1000], long[:1000] + theirs)
    made._calls.meet(None)
    assert made.counters == {"triton": 5}  # as sums; the barrier's call is none
    state = workspace.memory[0][workspace.layout.flags + sizes.STATE_OFFSET :][:8].view(torch.int64)
    assert state.item() == 8
    for algorithm in ("lamport", "multimem"):
        with pytest.raises(ValueError, match="must be one of triton, got"):
            made.all_reduce(mine, algorithm=algorithm)
    inside = workspace.memory[0][workspace.layout.flags :][:16].view(torch.float32)
    with pytest.raises(ValueError, match="belongs to the kernels"):
        made.all_reduce(inside)


@pytest.mark.parametrize("in_place", [False, True])
def test_fused_norms_by_the_triton_kernel_alone(by_triton, in_place):
    made, workspace = by_triton
    rows, width = 9, 128  # eight rows of fp16 a call, because in two-shot both results might be staged
    mine, theirs, residual = (torch.randn(rows, width).half() for _ in range(3))
    weight, bias = torch.randn(2, width).half()
    theirs[8] = theirs[0]
    workspace.play(theirs[:8])
    if in_place:
        mine = made.get_buffer((rows, width), torch.float16).copy_(mine)
        workspace.play(theirs)  # among the inputs all rows are there
    normed, summed = made.all_reduce_add_rms_norm(mine, residual, weight, 1e-6, bias=bias)
    expected = all_reduce_add_rms_norm_reference([mine, theirs], residual, weight, 1e-6, bias)
    assert torch.equal(summed, expected[1])
    torch.testing.assert_close(normed, expected[0], rtol=2**-9, atol=0)
    assert made.counters == {"norm_triton": 1}
    with pytest.raises(ValueError, match="must be one of triton, got 'lamport'"):
        made.all_reduce_add_rms_norm(mine, residual, weight, 1e-6, algorithm="lamport")


def test_a_group_whose_only_kernels_are_tritons(by_triton):
    made, workspace = by_triton
    group = RoutedCommunicator({"symm": made}, numerics="ordered", table=default_table(2), device_type="cpu")
    assert group.paths == (TRITON, SYMM) and group.fused_norm
    mine, theirs = (integers((4, 64), torch.float16, seed=seed) for seed in range(2))
    workspace.play(theirs)
    assert torch.equal(group.all_reduce(mine), mine + theirs)
    _, summed = group.all_reduce_add_rms_norm(mine, mine, mine[0], 1e-6)
    assert torch.equal(summed, mine + theirs + mine)
    assert group.counters == {TRITON: 2}
    assert group.path_for("all_reduce", 64, torch.int64) == group.path_for("all_gather", 64) == SYMM
    lines = group.describe()
    assert "all_reduce: symm:triton at every size" in lines and "all_reduce_norm: symm:triton at every size" in lines


# A matmul with its all-reduce ----------------------------------------------------------------------------------------


@pytest.fixture
def on_h100():
    with pretend(H100):
        yield


def test_a_matmul_that_all_reduces_and_what_follows(by_triton, on_h100):
    """One row block, this rank's own: what comes from the other rank has been put where its kernel would."""
    made, workspace = by_triton
    assert made.overlap_modes == ("fused",)
    x, weight = integers((2, 3, 20), torch.float16, seed=1), integers((8, 20), torch.float16, seed=2)
    theirs, residual = integers((2, 3, 8), torch.float16, seed=3), integers((2, 3, 8), torch.float16, seed=4)
    bias, norm = integers((2, 8), torch.float16, low=1, seed=5)
    workspace.play_partial(theirs.view(6, 8))
    total = torch.nn.functional.linear(x.float(), weight.float()).half() + theirs
    assert torch.equal(made.linear_all_reduce(x, weight), total)
    workspace.play_partial(theirs.view(6, 8))  # sums are left in place of the partial ones
    strided = torch.cat([weight, weight], 1)[:, :20]
    assert torch.equal(made.linear_all_reduce(x, strided.t().contiguous().t(), bias=bias), total + bias)
    workspace.play_partial(theirs.view(6, 8))
    normed, summed = made.linear_all_reduce(x, weight, bias=bias, residual=residual, norm_weight=norm, eps=1e-5)
    assert torch.equal(summed, total + bias + residual)
    want = torch.nn.functional.rms_norm(summed, (8,), norm, 1e-5)
    torch.testing.assert_close(normed, want, rtol=2**-9, atol=0)
    assert made.counters == {"linear": 3} and made.sequence == 3
    state = workspace.memory[0][workspace.layout.flags + sizes.STATE_OFFSET :][:8].view(torch.int64)
    assert state.item() == 3
    assert made.all_reduce(summed.flatten()).shape == (48,) and state.item() == 4
    assert made.linear_all_reduce(x[:, :0], weight).shape == (2, 0, 8) and state.item() == 4


def test_rows_that_do_not_fit_go_by_several_launches(by_triton, monkeypatch):
    made, _ = by_triton
    launches = []
    monkeypatch.setattr(KernelCalls, "triton_linear", lambda self, tensors, *rest: launches.append((tensors, rest)))
    x, weight, residual = torch.zeros(300, 5), torch.zeros(7, 5), torch.arange(2100.0).view(300, 7)
    out = made.linear_all_reduce(x, weight, residual=residual, timeout=3.0)
    assert [tensors[0].shape[0] for tensors, _ in launches] == [128, 128, 44], "two ranks, 64 rows, 7 columns"
    assert torch.equal(torch.cat([tensors[5] for tensors, _ in launches]), residual)
    assert launches[1][0][0].data_ptr() == out[128:].data_ptr() and launches[1][0][1] is None
    assert {rest for _, rest in launches} == {(1e-6, 64, 3.0)}


def test_matmuls_that_cannot_be_fused(by_triton):
    made, workspace = by_triton
    x, weight = torch.zeros(4, 5), torch.zeros(8, 5)
    assert made.linear_reason(4, 8, torch.float32) is None
    for call, message in (
        (lambda: made.linear_all_reduce(x.double(), weight.double()), "torch.float64 is none of"),
        (lambda: made.linear_all_reduce(x, torch.zeros(9, 5)), "128 rows of 9 columns.*do not fit into the 4096 bytes"),
        (lambda: made.linear_all_reduce(x, weight, norm_weight=torch.zeros(8)), "a norm needs a residual"),
        (lambda: made.linear_all_reduce(x, weight, residual=x), r"expected residual \[4, 8\] .*, got \[4, 5\]"),
        (
            lambda: made.linear_all_reduce(x, weight.half()),
            r"weight \[8, 5\] torch.float32 on cpu, got .* torch.float16",
        ),
        (lambda: made.linear_all_reduce(x, weight[:, :4]), r"expected weight \[8, 5\]"),
        (lambda: made.linear_all_reduce(x, weight, bias=x[0]), r"expected bias \[8\]"),
    ):
        with pretend(H100), pytest.raises(ValueError, match=message):
            call()
    without = SymmetricMemoryCommunicator(workspace, 0, 2, "tp", 5.0, 2, sizes.CUDA_ALGORITHMS)
    assert without.overlap_modes == ()
    with pytest.raises(ValueError, match="not all ranks have Triton"):
        without.linear_all_reduce(x, weight)


def test_a_routed_group_fuses_by_peer_memory(by_triton, on_h100):
    made, workspace = by_triton
    group = RoutedCommunicator({"symm": made}, numerics="ordered", table=default_table(2), device_type="cpu")
    assert group.overlap_modes == ("fused",) and group.max_ctas is None
    x, weight = integers((6, 20), torch.float32, seed=1), integers((8, 20), torch.float32, seed=2)
    theirs = integers((6, 8), torch.float32, seed=3)
    workspace.play_partial(theirs)
    assert torch.equal(group.linear_all_reduce(x, weight), x @ weight.t() + theirs)
    assert group.counters == {LINEAR: 1} and "symm:linear 1" in group.describe()[-1]
    assert "torch.int8" in group.linear_reason(6, 8, torch.int8)
