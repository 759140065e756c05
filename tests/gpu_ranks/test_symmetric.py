"""Collectives over symmetric memory, exact in every bit. Tier: ranks on one GPU."""

import itertools
import random
import time
import uuid

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm import symmetric
from tp_kernels.comm.errors import CommAbortedError, CommTimeoutError
from tp_kernels.comm.symmetric import SymmetricMemoryUnavailable
from tp_kernels.testing.numeric import integers
from tp_kernels.testing.symmetric_ranks import make_symmetric

pytestmark = pytest.mark.gpu

ALGORITHMS = ("lamport", "one_shot", "two_shot")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One element, less than a pack, ragged, one more than a block's share, more than a staging half of 1 MiB.
SIZES = (1, 7, 8, 1000, 4099, 65536, (1 << 19) + 5)
HALF = 1 << 20


def run(gpu_ranks, world_size, function, args=(), **options):
    pool = gpu_ranks(world_size, backend="gloo")
    return pool.run(within, function.__name__, uuid.uuid4().hex, args, options, timeout=75.0)


def within(group, name, tag, args, options):
    """The test's function with a communicator, which is closed whatever happens."""
    symm = make_symmetric(group, tag, **{"max_bytes": HALF, "timeout": 20.0, **options})
    try:
        result = globals()[name](symm, *args)
        torch.cuda.synchronize()
        symm.check()
        return result
    finally:
        symm.close()


def operand(n, dtype, seed, rank):
    return integers((n,), dtype, seed=97 * seed + rank).cuda()


def total(n, dtype, seed, world_size):
    """Sum over the ranks: exact in every dtype."""
    return sum(operand(n, torch.float32, seed, rank) for rank in range(world_size)).to(dtype)


def exact(actual, expected, what):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    wrong = int((actual != expected).sum())
    assert wrong == 0, f"{what}: {wrong} of {actual.numel()} elements are wrong"


# Sums ----------------------------------------------------------------------------------------------------------------


def all_sums(symm):
    rank, world = symm.rank, symm.world_size
    for seed, (dtype, n) in enumerate(itertools.product(DTYPES, SIZES)):
        expected = total(n, dtype, seed, world)
        for algorithm in ALGORITHMS:
            what = f"{algorithm}, {n} {dtype}"
            x = operand(n, dtype, seed, rank)
            exact(symm.all_reduce(x, algorithm=algorithm), expected, f"{what}, out of place")
            exact(x, operand(n, dtype, seed, rank), f"{what}: operand afterwards")
            exact(symm.all_reduce(x, out=x, algorithm=algorithm), expected, f"{what}, in place")
            odd = torch.empty(n + 1, dtype=dtype, device="cuda")[1:]
            odd.copy_(operand(n, dtype, seed, rank))
            exact(symm.all_reduce(odd, algorithm=algorithm), expected, f"{what}, not aligned")
            shared = symm.get_buffer((n,), dtype)
            if shared is None:
                assert n * dtype.itemsize > HALF
                continue
            shared.copy_(operand(n, dtype, seed, rank))
            exact(symm.all_reduce(shared, algorithm=algorithm), expected, f"{what}, shared operand")
            result = symm.get_buffer((n,), dtype, use="output")
            symm.all_reduce(shared, out=result, algorithm=algorithm)
            exact(result, expected, f"{what}, shared operand and result")
            exact(symm.all_reduce(shared, out=shared, algorithm=algorithm), expected, f"{what}, shared, in place")
    chosen = symm.all_reduce(operand(4099, torch.bfloat16, 1, rank))
    exact(chosen, total(4099, torch.bfloat16, 1, world), "the algorithm chosen by size")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sums_are_exact(gpu_ranks, world_size):
    run(gpu_ranks, world_size, all_sums)


def same_bits(symm):
    """Values whose sum depends on the order of summation: what each algorithm gives, as integers."""
    generator = torch.Generator().manual_seed(symm.rank)
    x = (torch.randn(5003, generator=generator) * 100).to(torch.bfloat16).cuda()
    sums = [symm.all_reduce(x, algorithm=algorithm) for algorithm in ALGORITHMS]
    parts = symm.all_gather(x.view(1, -1)).float()
    expected = torch.zeros_like(parts[0])
    for part in parts:
        expected = expected + part
    return [s.view(torch.int16).cpu() for s in (*sums, expected.to(torch.bfloat16))]


@pytest.mark.parametrize("world_size", [3, 4])
def test_all_ranks_and_algorithms_give_the_bits_of_rank_order(gpu_ranks, world_size):
    results = run(gpu_ranks, world_size, same_bits)
    reference = results[0][-1]
    for rank, sums in enumerate(results):
        for name, bits in zip((*ALGORITHMS, "reference"), sums, strict=True):
            assert torch.equal(bits, reference), f"rank {rank}, {name}"


def alternating(symm, calls):
    choose = random.Random(0)
    pending = []
    for seed in range(calls):
        dtype, algorithm = choose.choice(DTYPES), choose.choice(ALGORITHMS)
        n = choose.choice((1, 3, 100, 5000, 40000, 130000))
        x = operand(n, dtype, seed, symm.rank)
        if choose.random() < 0.3 and (shared := symm.get_buffer((n,), dtype)) is not None:
            x = shared.copy_(x)
        pending.append((symm.all_reduce(x, algorithm=algorithm), n, dtype, seed, algorithm))
        if choose.random() < 0.1:  # ranks drift apart, never at the same place
            time.sleep(0.002 * choose.random() * (symm.rank + 1))
    for result, n, dtype, seed, algorithm in pending:
        exact(result, total(n, dtype, seed, symm.world_size), f"call {seed}: {algorithm}, {n} {dtype}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_calls_of_alternating_sizes_and_algorithms(gpu_ranks, world_size):
    run(gpu_ranks, world_size, alternating, (200,))


# The Triton kernels --------------------------------------------------------------------------------------------------


def triton_sums(symm):
    rank, world = symm.rank, symm.world_size
    assert "triton" in symm.algorithms and "one_shot" in symm.algorithms
    for seed, (dtype, n) in enumerate(itertools.product(DTYPES, (4099, (1 << 19) + 5))):
        expected, what = total(n, dtype, seed, world), f"triton, {n} {dtype}"
        x = operand(n, dtype, seed, rank)
        exact(symm.all_reduce(x, algorithm="triton"), expected, f"{what}, out of place")
        exact(symm.all_reduce(x, algorithm="one_shot"), expected, f"{what}, then CUDA's")  # one count of calls
        exact(symm.all_reduce(x, out=x, algorithm="triton"), expected, f"{what}, in place")
        shared = symm.get_buffer((n,), dtype)
        if shared is not None:
            shared.copy_(operand(n, dtype, seed, rank))
            exact(symm.all_reduce(shared, algorithm="triton"), expected, f"{what}, shared operand")


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_by_the_triton_kernel(gpu_ranks, world_size):
    run(gpu_ranks, world_size, triton_sums)


def without_cuda(group, tag):
    """A communicator as a native core without CUDA has it: every collective, eager and in a graph."""
    built = symmetric.has_cuda
    symmetric.has_cuda = lambda: False
    try:
        symm = make_symmetric(group, tag, max_bytes=HALF, timeout=20.0)
    finally:
        symmetric.has_cuda = built
    try:
        rank, world = symm.rank, symm.world_size
        assert symm.algorithms == ("triton",)
        x = operand(5000, torch.bfloat16, 0, rank)
        exact(symm.all_reduce(x), total(5000, torch.bfloat16, 0, world), "all_reduce")
        exact(symm.reduce_scatter(x), total(5000, torch.bfloat16, 0, world).chunk(world)[rank], "reduce_scatter")
        exact(symm.all_gather(x[:7]), torch.cat([operand(5000, x.dtype, 0, r)[:7] for r in range(world)]), "gather")
        exact(symm.broadcast(x.clone(), 1), operand(5000, torch.bfloat16, 0, 1), "broadcast")
        symm.barrier()
        parts = [operand(5000, x.dtype, 9, r).view(5, 1000) for r in range(world)]
        residual, weight = operand(5000, x.dtype, 10, 0).view(5, 1000), torch.ones(1000, dtype=x.dtype, device="cuda")
        normed, summed = symm.all_reduce_add_rms_norm(parts[rank], residual, weight, 1e-6)
        expected = ops.all_reduce_add_rms_norm_reference(parts, residual, weight, 1e-6)
        exact(summed, expected[1], "all_reduce_add_rms_norm")
        torch.testing.assert_close(normed, expected[0], rtol=2**-7, atol=0)  # two roundings of 2^-8
        assert symm.counters["norm_triton"] == 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = symm.all_reduce(x)
            z = symm.all_gather(x[:7])
        for seed in range(5):
            x.copy_(operand(5000, x.dtype, seed, rank))
            graph.replay()
            exact(y, total(5000, x.dtype, seed, world), f"replay {seed}")
            exact(z, torch.cat([operand(5000, x.dtype, seed, r)[:7] for r in range(world)]), f"gather {seed}")
        torch.cuda.synchronize()
        symm.check()
    finally:
        symm.close()


def test_everything_without_the_cuda_kernels(gpu_ranks):
    gpu_ranks(2, backend="gloo").run(without_cuda, uuid.uuid4().hex, timeout=75.0)


# CUDA graphs ---------------------------------------------------------------------------------------------------------


def graphs(symm, replays):
    sizes = {"lamport": 700, "two_shot": 30001, "one_shot": 9000}
    inputs = {name: torch.zeros(n, dtype=torch.bfloat16, device="cuda") for name, n in sizes.items()}
    results = {}
    captured = []
    for name, x in inputs.items():  # loads the kernels
        symm.all_reduce(x, algorithm=name)
    for odd in (True, False):  # the parity of calls changes between replays, or does not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for name, x in inputs.items():
                shared = symm.get_buffer(x.shape, x.dtype).copy_(x)
                results[name, odd] = symm.all_reduce(shared if name == "two_shot" else x, algorithm=name)
            if odd:
                results["one_shot", odd] = symm.all_reduce(inputs["one_shot"], algorithm="one_shot")
        captured.append((graph, odd))
    for seed in range(replays):
        for x in inputs.values():
            x.copy_(operand(x.numel(), x.dtype, seed, symm.rank))
        graph, odd = captured[seed % 3 == 0]
        graph.replay()
        if seed % 5 == 0:  # eager calls between replays
            eager = symm.all_reduce(inputs["two_shot"], algorithm="one_shot")
            exact(eager, total(eager.numel(), eager.dtype, seed, symm.world_size), f"eager call {seed}")
        for name, x in inputs.items():
            expected = total(x.numel(), x.dtype, seed, symm.world_size)
            exact(results[name, odd], expected, f"replay {seed}: {name}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_graphs_replay_with_new_inputs(gpu_ranks, world_size):
    run(gpu_ranks, world_size, graphs, (50,))


# Other collectives ---------------------------------------------------------------------------------------------------


def others(symm):
    rank, world = symm.rank, symm.world_size
    sizes = [3 + r if r != 1 else 0 for r in range(world)]
    for dtype in (torch.bfloat16, torch.int64, torch.float64, torch.bool):
        for dim, count in ((0, 1), (1, 40000)):
            shape = [count, count]
            shape[dim], shape[1 - dim] = sum(sizes), count
            whole = integers(shape, torch.float32, low=0, seed=5).to(dtype).cuda()
            gathered = symm.all_gather(whole.split(sizes, dim)[rank], dim=dim, sizes=sizes)
            exact(gathered, whole, f"all_gather {dtype} along {dim}")
            everyone = symm.all_gather(whole, dim=dim)
            exact(everyone, torch.cat([whole] * world, dim), f"all_gather of equal parts, {dtype}")
            mine = whole.clone() if rank == world - 1 else torch.zeros_like(whole)
            exact(symm.broadcast(mine, world - 1), whole, f"broadcast {dtype}")
    for dtype in (torch.float16, torch.float32, torch.int32, torch.float64):
        for op in ("sum", "max"):
            parts = [integers((sum(sizes), 5003), dtype, seed=r).cuda() for r in range(world)]
            expected = parts[0]
            for part in parts[1:]:
                expected = torch.maximum(expected, part) if op == "max" else expected + part
            exact(symm.all_reduce(parts[rank], op), expected, f"all_reduce {op} {dtype}")
            for dim, split in ((0, sizes), (1, [1] * (world - 1) + [5003 - world + 1])):
                scattered = symm.reduce_scatter(parts[rank], op, dim=dim, sizes=split)
                exact(scattered, expected.split(split, dim)[rank], f"reduce_scatter {op} {dtype} along {dim}")
    transposed = operand(12, torch.float32, 1, rank).view(3, 4).t()
    exact(symm.all_reduce(transposed, out=transposed), total(12, torch.float32, 1, world).view(3, 4).t(), "strided")
    empty = torch.zeros(0, 4, device="cuda")
    assert symm.all_reduce(empty).shape == empty.shape and symm.all_gather(empty).shape == empty.shape
    symm.barrier()


@pytest.mark.parametrize("world_size", [2, 3])
def test_other_collectives(gpu_ranks, world_size):
    run(gpu_ranks, world_size, others)


# Faults --------------------------------------------------------------------------------------------------------------


def absent_peer(symm, algorithm, replayed):
    x = torch.ones(1000, device="cuda")
    symm.all_reduce(x, algorithm=algorithm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = symm.all_reduce(x, algorithm=algorithm)
    graph.replay()
    torch.cuda.synchronize()
    exact(y, torch.full_like(y, symm.world_size), "while all were there")
    if symm.rank == 1:
        return None
    started = time.monotonic()
    if replayed:
        graph.replay()
    else:
        symm.all_reduce(x, algorithm=algorithm)
    torch.cuda.synchronize()
    waited = time.monotonic() - started
    with pytest.raises(CommTimeoutError, match="waiting for rank 1") as caught:
        symm.all_reduce(x)
    with pytest.raises(CommAbortedError):
        symm.all_reduce(x)
    return caught.value.ranks, caught.value.group == symm.name, waited


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rank_that_does_not_come_is_named(gpu_ranks, algorithm, replayed):
    results = run(gpu_ranks, 2, absent_peer, (algorithm, replayed), timeout=2.0)
    ranks, named, waited = results[0]
    # The kernel's clock starts after the host's, so at most its resolution can be missing. Above the deadline there is
    # the host's own time, and without MPS the turns that ranks take on the GPU.
    assert ranks == (1,) and named and 1.9 < waited < 9


def recreated(group, tag, times):
    """Device memory that is gone between the tenth communicator and the last."""
    free = {}
    for turn in range(times):
        symm = make_symmetric(group, f"{tag}-{turn}", max_bytes=HALF, timeout=20.0)
        exact(
            symm.all_reduce(operand(1000, torch.float32, turn, group.rank)), total(1000, torch.float32, turn, 2), "sum"
        )
        symm.close()
        with pytest.raises(CommAbortedError, match="closed"):
            symm.barrier()
        if turn in (9, times - 1):
            torch.cuda.synchronize()
            group.barrier()
            free[turn] = torch.cuda.mem_get_info()[0]
            group.barrier()
    return free[9] - free[times - 1]


def test_made_and_closed_a_hundred_times(gpu_ranks):
    lost = gpu_ranks(2, backend="gloo").run(recreated, uuid.uuid4().hex, 100, timeout=170.0)
    # Each has 5.8 MB: four parts of 1 MiB, a quarter of one, Lamport buffers. Ninety of them would be 520 MB.
    assert max(lost) < 32 << 20, f"{lost} bytes of device memory are gone"


def two_groups(group, tag):
    first, second = (make_symmetric(group, f"{tag}-{i}", max_bytes=HALF, timeout=20.0, max_blocks=4) for i in range(2))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for seed in range(40):
        for which, symm in enumerate((first, second)):
            x = operand(3000 + 500 * which, torch.float32, seed + which, group.rank)
            streams[which].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(streams[which]):
                results.append((symm.all_reduce(x, algorithm=ALGORITHMS[seed % 3]), x, seed + which))
    torch.cuda.synchronize()
    for result, x, seed in results:
        exact(result, total(x.numel(), x.dtype, seed, group.world_size), f"call {seed}")
    for symm in (first, second):
        symm.check()
        symm.close()


def test_two_groups_at_once(gpu_ranks):
    gpu_ranks(2, backend="gloo").run(two_groups, uuid.uuid4().hex, timeout=75.0)


def too_much(group, tag):
    """Four ranks that want a third of the memory and more: some of them find none left."""
    max_bytes = torch.cuda.get_device_properties(0).total_memory // 12
    with pytest.raises(SymmetricMemoryUnavailable) as caught:
        make_symmetric(group, tag, max_bytes=max_bytes, timeout=60.0)
    return caught.value.reason


def test_out_of_memory_is_heard_by_all_ranks(gpu_ranks):
    reasons = gpu_ranks(4, backend="gloo").run(too_much, uuid.uuid4().hex, timeout=75.0)
    assert len(set(reasons)) == 1 and reasons[0].startswith("rank ")
