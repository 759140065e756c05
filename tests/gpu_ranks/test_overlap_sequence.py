"""Matmuls beside NCCL's all-gathers and reduce-scatters on ranks that share a GPU: every wait is there.

Tier: ranks on one GPU. The communicator's stream sleeps before every asynchronous collective, and the memory that
results go to is full of NaN: whatever is read too early is seen. Sums are of integers held in floats: they are exact.
"""

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm import Handle, TPGroup
from tp_kernels.testing.late_nccl import ASYNC, integers, late_nccl, spoil
from tp_kernels.testing.nccl_group import nccl_group

pytestmark = pytest.mark.gpu
WORLDS = [2, 4]

N, K = 1024, 64
TIMEOUT = 90.0

_groups: dict[str, TPGroup] = {}


def splits(world_size):
    """Tokens of every rank: as many on all (the matmuls work in place), one more on one, none on one."""
    return ([256] * world_size, [257] + [256] * (world_size - 1), [0] + [300] * (world_size - 1))


def own_tokens(sizes, rank):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def chunk_options(sizes):
    rows = sum(sizes)
    return 2, 3, [rows // 4, rows // 2, rows - rows // 4 - rows // 2]


def gather_operands(group, sizes, dtype=torch.bfloat16):
    """This rank's tokens, its weight and bias, and the result."""
    full = integers(sum(sizes), K, seed=1, dtype=dtype)
    weight = integers(N, K, seed=10 + group.rank, dtype=dtype)
    bias = integers(N, seed=20 + group.rank, dtype=dtype)
    want = (full.float() @ weight.float().t() + bias.float()).to(dtype)
    return full, full[own_tokens(sizes, group.rank)].clone(), weight, bias, want


def run_gather(group):
    late = late_nccl(group)
    for sizes in splits(group.world_size):
        _, x, weight, bias, want = gather_operands(group, sizes)
        for chunks in chunk_options(sizes):
            for options in ({}, {"out_features": N * group.world_size}):
                call = {"group": late, "sequence_sizes": sizes, "overlap": "chunked", "chunks": chunks, **options}
                spoil((sum(sizes), N), (sum(sizes) // 2, K))
                assert torch.equal(ops.column_parallel_linear(x, weight, bias, **call), want)
                spoil((sum(sizes), N), (sum(sizes) // 2, K))
                assert torch.equal(ops.column_parallel_linear(x, weight, **call) + bias, want)


def scatter_operands(group, sizes):
    """This rank's x and weight, and its tokens of the sum over all ranks."""
    m = sum(sizes)
    pairs = [(integers(m, K, seed=2 * rank), integers(N, K, seed=2 * rank + 1)) for rank in range(group.world_size)]
    expected = sum(x.float() @ weight.float().t() for x, weight in pairs)
    assert expected.abs().max() <= 256, "bf16 holds these integers"
    return *pairs[group.rank], expected.bfloat16()[own_tokens(sizes, group.rank)]


def run_scatter(group):
    late = late_nccl(group)
    for sizes in splits(group.world_size):
        x, weight, expected = scatter_operands(group, sizes)
        bias, residual = integers(N, seed=90), integers(*expected.shape, seed=91)
        norm = integers(N, seed=92)
        want = ops.add_rms_norm(expected + bias, residual, norm)
        for chunks in chunk_options(sizes):
            call = {"sizes": sizes, "group": late, "overlap": "chunked", "chunks": chunks}
            shapes = tuple(expected.shape), (max(1, len(expected) // 2), N)
            spoil(*shapes)
            assert torch.equal(ops.linear_reduce_scatter(x, weight, **call), expected)
            spoil(*shapes)
            added = ops.linear_reduce_scatter(x, weight, bias, residual=residual, **call)
            assert torch.equal(added, expected + bias + residual)
            spoil(*shapes)
            found = ops.linear_reduce_scatter(x, weight, bias, residual=residual, norm_weight=norm, **call)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def run_gather_backward(group):
    late = late_nccl(group)
    for sizes in splits(group.world_size):
        full, x, weight, bias, want = gather_operands(group, sizes, torch.float32)
        shape = (sum(sizes), N)
        grads = [integers(*shape, seed=60 + rank, dtype=torch.float32) for rank in range(group.world_size)]
        weights = [integers(N, K, seed=10 + rank, dtype=torch.float32) for rank in range(group.world_size)]
        expected = sum(g.double() @ w.double() for g, w in zip(grads, weights, strict=True)).float()
        for tensor in (x, weight, bias):
            tensor.requires_grad_()
        spoil(shape, (sum(sizes), K), dtype=torch.float32)
        out = ops.column_parallel_linear(x, weight, bias, group=late, sequence_sizes=sizes, overlap="chunked", chunks=3)
        assert torch.equal(out, want)
        spoil((sum(sizes), K), (N, K), tuple(x.shape), dtype=torch.float32)
        out.backward(grads[group.rank])
        assert torch.equal(x.grad, expected[own_tokens(sizes, group.rank)])
        assert torch.equal(weight.grad, (grads[group.rank].double().t() @ full.double()).float())
        assert torch.equal(bias.grad, grads[group.rank].sum(0))


def run_scatter_backward(group):
    late = late_nccl(group)
    for sizes in splits(group.world_size):
        x, weight, expected = scatter_operands(group, sizes)
        whole = integers(sum(sizes), N, seed=93)
        for wanted in ((x, weight), (x,), (weight,)):
            for tensor in (x, weight):
                tensor.grad = None
                tensor.requires_grad_(any(tensor is one for one in wanted))
            spoil((sum(sizes), N))
            out = ops.linear_reduce_scatter(x, weight, sizes=sizes, group=late, overlap="chunked", chunks=3)
            assert torch.equal(out, expected)
            spoil((sum(sizes), N), (sum(sizes), K), (sum(sizes) // 3, N))
            out.backward(whole[own_tokens(sizes, group.rank)])
            if x.grad is not None:
                assert torch.equal(x.grad, (whole.float() @ weight.float()).bfloat16())
            if weight.grad is not None:
                assert torch.equal(weight.grad, (whole.float().t() @ x.float()).bfloat16())


def run_capture(group):
    late, sizes = late_nccl(group), [256] * group.world_size
    _, tokens, rows, bias, gathered = gather_operands(group, sizes)
    x, weight, scattered = scatter_operands(group, sizes)
    residual, norm = integers(*scattered.shape, seed=91), integers(N, seed=92)
    static_tokens, static_x = torch.zeros_like(tokens), torch.zeros_like(x)
    common = {"group": late, "overlap": "chunked", "chunks": 3}

    def call():
        out = ops.column_parallel_linear(static_tokens, rows, bias, sequence_sizes=sizes, **common)
        return out, *ops.linear_reduce_scatter(
            static_x, weight, sizes=sizes, residual=residual, norm_weight=norm, **common
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
        results = call()
    empty = (bias.expand(gathered.shape), *ops.add_rms_norm(torch.zeros_like(scattered), residual, norm))
    full = (gathered, *ops.add_rms_norm(scattered, residual, norm))
    for filled in (True, False, True):
        for static, source in ((static_tokens, tokens), (static_x, x)):
            static.copy_(source) if filled else static.zero_()
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, full if filled else empty, strict=True))
    torch.cuda.synchronize()
    late.communicator.check()
    del graph


def run_without_waits(group):
    """What the tests above would see if a wait were missing; the ranks stay in step."""
    late, sizes = late_nccl(group), [256] * group.world_size
    communicator, handles, seen = late.communicator, [], []
    _, tokens, rows, _, gathered = gather_operands(group, sizes)
    x, weight, scattered = scatter_operands(group, sizes)
    starts = {name: getattr(communicator, name) for name in ASYNC}

    def forgetful(start):
        def never_waited_for(*args, **options):
            handles.append(start(*args, **options))
            return Handle(handles[-1]._target.view(-1, args[0].shape[-1]))

        return never_waited_for

    for name, start in starts.items():
        setattr(communicator, name, forgetful(start))
    try:
        common = {"group": late, "overlap": "chunked", "chunks": 2}
        spoil((sum(sizes) // 2, K))
        seen.append(ops.column_parallel_linear(tokens, rows, sequence_sizes=sizes, **common).clone())
        spoil((128, N))
        seen.append(ops.linear_reduce_scatter(x, weight, sizes=sizes, **common).clone())
    finally:
        for name, start in starts.items():
            setattr(communicator, name, start)
        for handle in handles:
            handle.wait()
    return [bool(torch.equal(a, b)) for a, b in zip(seen, (gathered, scattered), strict=True)]


def run_bits(group):
    """Not integers: at the same time or one after the other, the bits are the same, those of the gradients too."""
    if "plain" not in _groups:
        _groups["plain"] = nccl_group(group, timeout=60.0)
    generator = torch.Generator("cuda").manual_seed(group.rank)
    world = group.world_size

    def make(*shape):
        return torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_()

    for sizes in ([4096 // world] * world, [4096 // world + 1] + [4096 // world] * (world - 1)):
        tokens, rows = make(sizes[group.rank], 4096), make(4096 // world, 4096)
        x, weight = make(sum(sizes), 4096 // world), make(4096, 4096 // world)
        found = []
        for overlap in ("chunked", "none", "chunked"):
            call = {"group": _groups["plain"], "overlap": overlap, "chunks": 4}
            gathered = ops.column_parallel_linear(tokens, rows, sequence_sizes=sizes, out_features=4096, **call)
            scattered = ops.linear_reduce_scatter(x, weight, sizes=sizes, in_features=4096, **call)
            grads = torch.autograd.grad((gathered.sum() + scattered.square().sum()), (tokens, rows, x, weight))
            found.append((gathered, scattered, *grads))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


FORWARD, OTHERS = (run_gather, run_scatter), (run_gather_backward, run_scatter_backward, run_capture)


@pytest.mark.parametrize(
    ("world_size", "run"), [*((2, each) for each in FORWARD + OTHERS), *((4, each) for each in FORWARD)]
)
def test_every_wait_is_there(gpu_ranks, world_size, run):
    gpu_ranks(world_size, backend="gloo").run(run, timeout=TIMEOUT)


def test_a_missing_wait_would_be_seen(gpu_ranks):
    for seen in gpu_ranks(2, backend="gloo").run(run_without_waits, timeout=TIMEOUT):
        assert seen == [False, False]


@pytest.mark.parametrize("world_size", WORLDS)
def test_overlap_does_not_change_the_bits(gpu_ranks, world_size):
    gpu_ranks(world_size, backend="gloo").run(run_bits, timeout=TIMEOUT)
