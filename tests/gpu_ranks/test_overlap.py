"""GEMMs beside NCCL on ranks that share a GPU: every wait is there, and the bits are those of one after the other.

Tier: ranks on one GPU. The communicator's stream sleeps before every asynchronous collective, and the memory that
results go to is full of NaN: whatever is read too early is seen. Sums are of integers held in floats: they are exact.
"""

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm import Handle, TPGroup
from tp_kernels.layers import ColumnParallelLinear, ParallelMLP, RowParallelLinear
from tp_kernels.ops._gpu import gpu_of
from tp_kernels.ops._overlap_choice import planned_chunks
from tp_kernels.testing.late_nccl import integers, late_nccl, spoil
from tp_kernels.testing.nccl_group import nccl_group

pytestmark = pytest.mark.gpu
WORLDS = [2, 4]

M, N, K = 1037, 1024, 64
CHUNKS = [256, 640, 141]
TIMEOUT = 90.0

_groups: dict[str, TPGroup] = {}


def operands(group):
    """This rank's x and weight, and the sum over all ranks."""
    pairs = [(integers(M, K, seed=2 * rank), integers(N, K, seed=2 * rank + 1)) for rank in range(group.world_size)]
    expected = sum(x.float() @ weight.float().t() for x, weight in pairs)
    assert expected.abs().max() <= 256, "bf16 holds these integers"
    return *pairs[group.rank], expected.bfloat16()


def run_forward(group):
    late = late_nccl(group)
    x, weight, expected = operands(group)
    bias, residual, norm = integers(N, seed=90), integers(M, N, seed=91), integers(N, seed=92)
    for chunks in (CHUNKS, 4, [1] * 5 + [M - 5]):
        for _ in range(2):
            spoil((M, N))
            assert torch.equal(ops.linear_all_reduce(x, weight, group=late, overlap="chunked", chunks=chunks), expected)
        spoil((M, N))
        biased = ops.linear_all_reduce(x, weight, bias, group=late, overlap="chunked", chunks=chunks)
        assert torch.equal(biased, expected + bias)
        spoil((M, N))
        normed, summed = ops.linear_all_reduce(
            x, weight, bias, group=late, overlap="chunked", chunks=chunks, residual=residual, norm_weight=norm
        )
        want = ops.add_rms_norm(expected + bias, residual, norm)
        assert torch.equal(summed, want[1]) and torch.equal(normed, want[0])
    with torch.no_grad():
        layer = RowParallelLinear(K * group.world_size, N, group=late, overlap="chunked", device="cuda", dtype=x.dtype)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        spoil((M, N))
        assert torch.equal(layer(x), expected + bias)


def run_reduce_scatter(group):
    late = late_nccl(group)
    x, weight, expected = operands(group)
    sizes = [len(part) for part in torch.arange(M).tensor_split(group.world_size)]
    start = sum(sizes[: group.rank])
    for chunks in (2, 3):
        spoil((M // chunks, N), (sizes[group.rank] // chunks, N))
        out = ops.linear_reduce_scatter(x, weight, sizes=sizes, group=late, overlap="chunked", chunks=chunks)
        assert torch.equal(out, expected[start : start + sizes[group.rank]])


def run_capture(group):
    late = late_nccl(group)
    x, weight, expected = operands(group)
    residual, norm = integers(M, N, seed=91), integers(N, seed=92)
    static = torch.zeros_like(x)

    def call():
        return ops.linear_all_reduce(
            static, weight, group=late, overlap="chunked", chunks=CHUNKS, residual=residual, norm_weight=norm
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
        normed, summed = call()
    want = ops.add_rms_norm(expected, residual, norm)
    empty = ops.add_rms_norm(torch.zeros_like(expected), residual, norm)
    for filled in (True, False, True):
        static.copy_(x) if filled else static.zero_()
        summed.fill_(torch.nan)
        normed.fill_(torch.nan)
        graph.replay()
        assert torch.equal(summed, (want if filled else empty)[1])
        assert torch.equal(normed, (want if filled else empty)[0])
    torch.cuda.synchronize()
    late.communicator.check()
    del graph


def run_backward(group):
    late = late_nccl(group)
    x = integers(M, K, seed=50, dtype=torch.float32)
    grad = [integers(M, N, seed=60 + rank, dtype=torch.float32) for rank in range(group.world_size)]
    weights = [integers(N, K, seed=70 + rank, dtype=torch.float32) for rank in range(group.world_size)]
    expected_x = sum(g.double() @ w.double() for g, w in zip(grad, weights, strict=True)).float()
    expected_w = (grad[group.rank].double().t() @ x.double()).float()
    for sequence_parallel in (False, True):
        layer = ColumnParallelLinear(
            K,
            N * group.world_size,
            group=late,
            sequence_parallel=sequence_parallel,
            device="cuda",
        )
        sizes = [len(part) for part in torch.arange(M).tensor_split(group.world_size)]
        start = sum(sizes[: group.rank])
        own = slice(start, start + sizes[group.rank]) if sequence_parallel else slice(None)
        with torch.no_grad():
            layer.weight.copy_(weights[group.rank])
        for _ in range(2):
            layer.zero_grad()
            mine = x[own].clone().requires_grad_()
            out = layer(mine, sizes) if sequence_parallel else layer(mine)
            spoil((M, K), (N, K), tuple(mine.shape), dtype=torch.float32)
            out.backward(grad[group.rank])
            assert torch.equal(mine.grad, expected_x[own])
            assert torch.equal(layer.weight.grad, expected_w)
            assert torch.equal(layer.bias.grad, grad[group.rank].sum(0))


def run_row_backward(group):
    late = late_nccl(group)
    x, weight, expected = operands(group)
    x.requires_grad_()
    weight.requires_grad_()
    grad = integers(M, N, seed=93)
    spoil((M, N))
    out = ops.linear_all_reduce(x, weight, group=late, overlap="chunked", chunks=CHUNKS)
    out.backward(grad)
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, (grad.float() @ weight.float()).bfloat16())
    torch.testing.assert_close(weight.grad.float(), grad.float().t() @ x.float(), rtol=1e-2, atol=1.0)


def run_mlp_backward(group):
    """The fused MLP's backward against the same group with nothing to overlap: the same matmuls, the same sums."""
    late = late_nccl(group)
    torch.manual_seed(7)
    mlp = ParallelMLP(256, 512 * group.world_size, group=late, device="cuda", dtype=torch.bfloat16)
    x, grad = (torch.randn(M, 256, device="cuda").bfloat16() for _ in range(2))
    results = []
    for modes in (("chunked",), (), ("chunked",)):
        late.communicator.overlap_modes = modes
        mlp.zero_grad()
        mine = x.clone().requires_grad_()
        spoil((M, 256))
        mlp(mine).backward(grad)
        results.append([mine.grad, *(parameter.grad.clone() for parameter in mlp.parameters())])
    for overlapped in (results[0], results[2]):
        assert all(torch.equal(a, b) for a, b in zip(overlapped, results[1], strict=True))


def run_without_waits(group):
    """What the tests above would see if a wait were missing; the ranks stay in step."""
    late = late_nccl(group)
    x, weight, expected = operands(group)
    start, handles = late.communicator.all_reduce_async, []

    def never_waited_for(*args, **options):
        handles.append(start(*args, **options))
        return Handle(options["out"])

    late.communicator.all_reduce_async = never_waited_for
    try:
        spoil((M, N))
        out = ops.linear_all_reduce(x, weight, group=late, overlap="chunked", chunks=CHUNKS).clone()
    finally:
        late.communicator.all_reduce_async = start
        for handle in handles:
            handle.wait()
    return bool(torch.equal(out, expected))


def run_bits(group):
    """Not integers; ``differs``: how many elements one piece computes otherwise, where nothing is promised."""
    if "plain" not in _groups:
        _groups["plain"] = nccl_group(group, timeout=60.0)
    plain = _groups["plain"]
    found = {}
    for n, k in ((4096, 4096), (4096, 14336)):
        generator = torch.Generator("cuda").manual_seed(group.rank)
        make = lambda *shape: torch.randn(shape, generator=generator, device="cuda").bfloat16()  # noqa: B023, E731
        x, weight = make(4096, k // group.world_size), make(n, k // group.world_size)
        info = gpu_of(x)
        rows = [stop - start for start, stop in planned_chunks(4096, n, x.dtype, info, info.num_sms, 4, 2.0)]
        for chunks in (4, rows):
            call = {"group": plain, "chunks": chunks}
            overlapped = ops.linear_all_reduce(x, weight, overlap="chunked", **call)
            for _ in range(3):
                assert torch.equal(overlapped, ops.linear_all_reduce(x, weight, overlap="none", **call))
                assert torch.equal(overlapped, ops.linear_all_reduce(x, weight, overlap="chunked", **call))
            whole = ops.linear_all_reduce(x, weight, group=plain, overlap="none")
            found[n, k, str(chunks)] = int((whole != overlapped).sum())
            assert ((whole - overlapped).abs() <= 0.02 * whole.abs().amax()).all()
    return found


FORWARD, BACKWARD = (run_forward, run_reduce_scatter), (run_capture, run_backward, run_row_backward, run_mlp_backward)


@pytest.mark.parametrize(
    ("world_size", "run"), [*((2, each) for each in FORWARD + BACKWARD), *((4, each) for each in FORWARD)]
)
def test_every_wait_is_there(gpu_ranks, world_size, run):
    gpu_ranks(world_size, backend="gloo").run(run, timeout=TIMEOUT)


def test_a_missing_wait_would_be_seen(gpu_ranks):
    assert not any(gpu_ranks(2, backend="gloo").run(run_without_waits, timeout=TIMEOUT))


@pytest.mark.parametrize("world_size", WORLDS)
def test_overlap_does_not_change_the_bits(gpu_ranks, world_size):
    found = gpu_ranks(world_size, backend="gloo").run(run_bits, timeout=TIMEOUT)
    print(f"{world_size} ranks, elements that differ from one piece, of 16 Mi:", found[0])
