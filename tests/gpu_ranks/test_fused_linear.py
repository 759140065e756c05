"""A matmul that all-reduces tile by tile, on ranks that share a GPU. Tier: ranks on one GPU.

Sums are of integers held in floats, hence exact, or are compared bit by bit with our matmul followed by ``all_reduce``.
"""

import random
import time
import uuid

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm.errors import CommAbortedError, CommMismatchError, CommTimeoutError
from tp_kernels.comm.symmetric_sizes import linear_rows, row_block
from tp_kernels.layers import RowParallelLinear
from tp_kernels.ops._gpu import gpu_of
from tp_kernels.ops.kernels import matmul, peer_linear
from tp_kernels.ops.norm import rms_norm_reference
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.symmetric_ranks import make_symmetric, symmetric_group

pytestmark = pytest.mark.gpu

# Enough for the smaller shapes at once; the larger ones go by several launches.
HALF = 4 << 20
# One row, one row block, ranks without any, ragged in every direction, several bands, more than a half holds.
SHAPES = ((1, 512, 64), (60, 1000, 200), (300, 1000, 328), (1037, 512, 1024), (7000, 512, 256))


def run(gpu_ranks, world_size, function, *args, **options):
    pool = gpu_ranks(world_size, backend="gloo")
    return pool.run(within, function.__name__, uuid.uuid4().hex, args, options, timeout=170.0)


def within(group, name, tag, args, options):
    """The test's function with a communicator, which is closed whatever happens."""
    symm = make_symmetric(group, tag, **{"max_bytes": HALF, "timeout": 60.0, **options})
    try:
        result = globals()[name](symm, group, *args)
        torch.cuda.synchronize()
        symm.check()
        return result
    finally:
        symm.close()


def integers(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to("cuda", dtype)


def real(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def features(k, world_size):
    """Of every rank: not equal, of which some are no multiple of 16 bytes."""
    return [k // world_size + (3 * rank if world_size == 3 else 0) for rank in range(world_size)]


def operands(make, symm, m, n, k, dtype, seed=0):
    """(x, weight) of every rank."""
    ks = features(k, symm.world_size)
    return [
        (make(m, ks[r], seed=100 * seed + 2 * r, dtype=dtype), make(n, ks[r], seed=100 * seed + 2 * r + 1, dtype=dtype))
        for r in range(symm.world_size)
    ]


def exact_sums(symm, group, dtype):
    rank = symm.rank
    assert symm.overlap_modes == ("fused",)
    for seed, (m, n, k) in enumerate(SHAPES):
        pairs = operands(integers, symm, m, n, k, dtype, seed)
        expected = sum(x.float() @ w.float().t() for x, w in pairs)
        x, weight = pairs[rank]
        assert expected.abs().max() <= 256, "bf16 holds these integers"
        bias, residual = integers(n, seed=7, dtype=dtype), integers(m, n, seed=8, dtype=dtype)
        norm = integers(n, seed=9, dtype=dtype) + 2
        what = f"{m} x {n} x {k}"
        for _ in range(2):  # both halves
            assert torch.equal(symm.linear_all_reduce(x, weight), expected.to(dtype)), what
        total = (expected.to(dtype) + bias) + residual
        normed, summed = symm.linear_all_reduce(x, weight, bias=bias, residual=residual, norm_weight=norm)
        assert torch.equal(summed, total), what
        right = rms_norm_reference(total.double(), norm.double(), 1e-6)
        assert_close_to_reference(normed, rms_norm_reference(total, norm, 1e-6), right, name=what)


@pytest.mark.parametrize(
    ("world_size", "dtype"), [(2, torch.bfloat16), (2, torch.float32), (3, torch.float16), (4, torch.bfloat16)], ids=str
)
def test_sums_are_exact(gpu_ranks, world_size, dtype):
    run(gpu_ranks, world_size, exact_sums, dtype)


def bits(symm, group):
    """Against our matmul with the same tile, ``all_reduce``, and the kernel of the norm."""
    rank, found = symm.rank, []
    for dtype in (torch.bfloat16, torch.float32):
        for m, n, k in SHAPES[1:]:
            x, weight = operands(real, symm, m, n, k, dtype)[rank]
            residual, norm = real(m, n, seed=7, dtype=dtype), real(n, seed=8, dtype=dtype)
            block, aligned = row_block(m, dtype.itemsize, symm.world_size), matmul.tma_addressable(x, weight)
            step = linear_rows(m, n, dtype.itemsize, symm.world_size, HALF)
            partial = x.new_empty(m, n)
            for start in range(0, m, step):
                rows = slice(start, min(start + step, m))
                some = peer_linear.configs(gpu_of(x), dtype, block, n, x.shape[1], aligned)
                config = matmul.fewest_waves(gpu_of(x), some, rows.stop - rows.start, n)
                matmul.matmul(partial[rows], x[rows], weight, config=config)
            assert torch.equal(symm.linear_all_reduce(x, weight), symm.all_reduce(partial)), f"{m} x {n} x {k} {dtype}"
            ours = symm.linear_all_reduce(x, weight, residual=residual, norm_weight=norm)
            theirs = symm.all_reduce_add_rms_norm(partial, residual, norm, 1e-6, algorithm="triton")
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"norm, {m} x {n} x {k} {dtype}"
            found += [t.cpu() for t in ours]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_bits_are_those_of_separate_kernels_on_all_ranks(gpu_ranks, world_size):
    first, *others = run(gpu_ranks, world_size, bits)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def among_others(symm, group, calls):
    """Calls of all kinds, ranks drifting apart; results are looked at only at the end."""
    choose, pending = random.Random(0), []
    for seed in range(calls):
        if choose.random() < 0.5:
            m, n, k = choose.choice(SHAPES[:4])
            pairs = operands(integers, symm, m, n, k, torch.bfloat16, seed)
            expected = sum(x.float() @ w.float().t() for x, w in pairs)
            pending.append((symm.linear_all_reduce(*pairs[symm.rank]), expected.bfloat16(), f"call {seed}"))
        else:
            algorithm = choose.choice(("lamport", "one_shot", "two_shot", "triton"))
            xs = [integers(choose.choice((7, 5000, 40000)), seed=seed, dtype=torch.float32)] * symm.world_size
            x = xs[0]
            if choose.random() < 0.3:
                x = symm.get_buffer(x.shape, x.dtype).copy_(x)
            pending.append((symm.all_reduce(x, algorithm=algorithm), sum(xs), f"call {seed}: {algorithm}"))
        if choose.random() < 0.1:  # at the same place, but not for equally long
            time.sleep(0.002 * choose.random() * (symm.rank + 1))
    for result, expected, what in pending:
        assert torch.equal(result, expected), what


@pytest.mark.parametrize("world_size", [2, 4])
def test_among_calls_of_other_kinds(gpu_ranks, world_size):
    run(gpu_ranks, world_size, among_others, 80)


def graphs(symm, group):
    m, n, k = 700, 512, 512
    shapes = ((m, n, k), SHAPES[1])
    pairs = [operands(integers, symm, *shape, torch.bfloat16)[symm.rank] for shape in shapes]
    for pair in pairs:  # loads the kernels
        symm.all_reduce(symm.linear_all_reduce(*pair), algorithm="one_shot")
    captured = []
    for odd in (True, False):  # the parity of calls changes between replays, or does not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [symm.linear_all_reduce(*pair) for pair in pairs]
            results.append(symm.all_reduce(results[0], algorithm="one_shot"))
            if odd:
                results.append(symm.linear_all_reduce(*pairs[1]))
        captured.append((graph, results))
    for seed in range(30):
        expected = []
        for (x, weight), shape in zip(pairs, shapes, strict=True):
            fresh = operands(integers, symm, *shape, torch.bfloat16, seed)
            x.copy_(fresh[symm.rank][0])
            weight.copy_(fresh[symm.rank][1])
            expected.append(sum(a.float() @ b.float().t() for a, b in fresh).bfloat16())
        graph, results = captured[seed % 3 == 0]
        graph.replay()
        if seed % 5 == 0:  # eager calls between replays
            assert torch.equal(symm.linear_all_reduce(*pairs[0]), expected[0]), f"eager call {seed}"
        wanted = [*expected, expected[0] * symm.world_size, expected[1]]
        for index, result in enumerate(results):
            assert torch.equal(result, wanted[index]), f"replay {seed}, result {index}"
    torch.cuda.synchronize()
    del graph, captured


@pytest.mark.parametrize("world_size", [2, 4])
def test_graphs_replay_with_new_inputs(gpu_ranks, world_size):
    run(gpu_ranks, world_size, graphs)


def by_op_and_layer(symm, group):
    shared = symmetric_group(symm, group)
    m, n, k = 500, 512, 256 * symm.world_size
    pairs = operands(integers, symm, m, n, k, torch.bfloat16)
    expected = sum(x.float() @ w.float().t() for x, w in pairs).bfloat16()
    x, weight = (t.requires_grad_() for t in pairs[symm.rank])
    bias, grad = integers(n, seed=5, dtype=torch.bfloat16), integers(m, n, seed=6, dtype=torch.bfloat16)
    out = ops.linear_all_reduce(x, weight, bias, group=shared, overlap="fused")
    out.backward(grad)
    assert torch.equal(out, expected + bias)
    assert torch.equal(x.grad, (grad.float() @ weight.float()).bfloat16())
    layer = RowParallelLinear(k, n, group=shared, overlap="fused", device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        before = symm.counters["linear"]
        assert torch.equal(layer(x.view(5, 100, -1)), (expected + bias).view(5, 100, -1))
        assert symm.counters["linear"] == before + 1
        layer(x[:1])
        assert symm.counters["linear"] == before + 1, "a row goes by the skinny matmul"


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_op_and_the_layer(gpu_ranks, world_size):
    run(gpu_ranks, world_size, by_op_and_layer)


def absent_peer(symm, group, replayed):
    x, weight = operands(integers, symm, 600, 512, 512, torch.bfloat16)[symm.rank]
    symm.linear_all_reduce(x, weight, timeout=60.0)  # the ranks may take unequally long to compile it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        symm.linear_all_reduce(x, weight)
    graph.replay()
    torch.cuda.synchronize()
    if symm.rank == 1:
        return None
    started = time.monotonic()
    if replayed:
        graph.replay()
    else:
        symm.linear_all_reduce(x, weight)
    torch.cuda.synchronize()
    waited = time.monotonic() - started
    with pytest.raises(CommTimeoutError, match="waiting for rank 1") as caught:
        symm.linear_all_reduce(x, weight)
    with pytest.raises(CommAbortedError):
        symm.linear_all_reduce(x, weight)
    return caught.value.ranks, waited


@pytest.mark.parametrize("replayed", [False, True])
def test_a_rank_that_does_not_come_is_named(gpu_ranks, replayed):
    ranks, waited = run(gpu_ranks, 2, absent_peer, replayed, timeout=4.0)[0]
    assert ranks == (1,) and 3.9 < waited < 11


def mismatch(symm, group):
    x, weight = operands(integers, symm, 100 + symm.rank, 64, 128, torch.bfloat16)[symm.rank]
    with pytest.raises(CommMismatchError, match="linear_all_reduce"):
        symm.linear_all_reduce(x, weight)


def test_different_shapes_are_found_in_check_mode(gpu_ranks):
    run(gpu_ranks, 2, mismatch, check=True)
