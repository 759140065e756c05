"""Overlap of a GEMM with the all-reduce of its result. Tier: no device, and CPU ranks (2 and 3 processes).

On CPU ranks a ``DelayedCommunicator`` stands in for one that works beside the caller: results are NaN until waited for.
"""

import random
from itertools import pairwise

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm import LocalCommunicator, TPGroup
from tp_kernels.comm.overlap import (
    Agreement,
    agree,
    agreed,
    chunk_bounds,
    count_waves,
    estimate_time,
    hidden_fraction,
    worth_overlapping,
)
from tp_kernels.ops._overlap_choice import (
    overlap_sizes,
)
from tp_kernels.testing import bench_overlap
from tp_kernels.testing.delayed import DelayedCommunicator, PrematureUseError

# The schedule ---------------------------------------------------------------------------------------------------------


def test_chunks_are_whole_waves():
    # 512 tiles of 128 x 256: 3.9 waves of 132 SMs, 16 waves of 32.
    assert chunk_bounds(4096, 4096, 132, 128, 256, 4) == [(0, 1024), (1024, 2048), (2048, 3072), (3072, 4096)]
    assert chunk_bounds(4096, 4096, 132, 128, 256, 2) == [(0, 2048), (2048, 4096)]
    assert chunk_bounds(4096, 4096, 32, 128, 256, 2, growth=15) == [(0, 256), (256, 4096)]
    # 20 tiles a row: 6 rows of tiles are 120 of 132; four chunks would need a sixth wave.
    assert chunk_bounds(4096, 5120, 132, 128, 256, 4) == [(0, 1664), (1664, 3328), (3328, 4096)]


def test_one_wave_is_not_cut():
    assert chunk_bounds(1024, 4096, 132, 128, 256, 4) == [(0, 1024)]
    assert chunk_bounds(100, 28672, 32, 128, 256, 4) == [(0, 100)], "a wave is less than a row of tiles"
    assert chunk_bounds(4096, 4096, 132, 128, 256, 1) == [(0, 4096)]


def test_no_rows_and_no_columns():
    assert chunk_bounds(0, 4096, 132, 128, 256, 4) == []
    assert chunk_bounds(5, 0, 132, 128, 256, 4) == [(0, 5)]


def test_growth_moves_rows_to_the_end_or_to_the_beginning():
    rows = lambda growth: [b - a for a, b in chunk_bounds(4096, 4096, 32, 128, 256, 4, growth)]  # noqa: E731
    assert rows(1.0) == [1024] * 4 and rows(2.0) == [256, 512, 1024, 2304] and rows(0.5) == [2304, 1024, 512, 256]


@pytest.mark.parametrize("seed", range(200))
def test_chunks_cover_the_rows_and_cost_no_wave(seed):
    draw = random.Random(seed)
    m, n, sms = draw.randint(1, 20000), draw.randint(1, 30000), draw.choice([1, 14, 32, 66, 108, 132])
    tile_m, tile_n, most = draw.choice([1, 64, 128]), draw.choice([1, 128, 256]), draw.randint(1, 9)
    bounds = chunk_bounds(m, n, sms, tile_m, tile_n, most, draw.choice([0.3, 1.0, 2.5]))
    assert bounds[0][0] == 0 and bounds[-1][1] == m and 1 <= len(bounds) <= most
    assert all(a < b for a, b in bounds)
    assert all(b == a and b % tile_m == 0 for (_, b), (a, _) in pairwise(bounds))
    whole = count_waves(m, n, sms, tile_m, tile_n)
    assert sum(count_waves(b - a, n, sms, tile_m, tile_n) for a, b in bounds) <= whole


@pytest.mark.parametrize("bad", [(-1, 8, 1, 1, 1, 1), (8, 8, 0, 1, 1, 1), (8, 8, 1, 0, 1, 1), (8, 8, 1, 1, 1, 0)])
def test_sizes_that_are_none(bad):
    with pytest.raises(ValueError, match="chunk_bounds: expected"):
        chunk_bounds(*bad)
    with pytest.raises(ValueError, match="growth > 0"):
        chunk_bounds(8, 8, 1, 1, 1, 1, growth=0.0)


def test_estimate():
    assert estimate_time([10], 3.0, 5.0, 1.0) == pytest.approx(9.0)
    assert estimate_time([5, 5], 4.0, 2.0) == pytest.approx(5.0), "the last half of the all-reduce stands out"
    assert estimate_time([5, 5], 2.0, 4.0) == pytest.approx(5.0), "the first half of the GEMM stands out"
    assert estimate_time([1, 9], 2.0, 18.0) == pytest.approx(18.2)
    assert estimate_time([5, 5], 2.0, 4.0, call=0.5) == pytest.approx(5.5)
    assert estimate_time([5, 5], 2.0, 4.0, epilogue=1.0) == pytest.approx(5.5), "half of what follows is hidden"
    assert hidden_fraction(6.0, 5.0, 2.0, 4.0) == 0.5 and hidden_fraction(6.0, 7.0, 2.0, 4.0) == -0.5


def test_gate_wants_a_measured_gain():
    assert worth_overlapping("chunked", {"none": 120.0, "chunked": 100.0}) == (True, "chunked 100.0 us, none 120.0 us")
    pays, reason = worth_overlapping("chunked", {"none": 102.0, "chunked": 100.0})
    assert not pays and "less than 3%" in reason
    assert not worth_overlapping("none", {"none": 100.0, "chunked": 90.0})[0]
    assert not worth_overlapping("chunked", {"chunked": 90.0})[0]


# The test's own tool --------------------------------------------------------------------------------------------------


def test_a_delayed_result_cannot_be_used_early():
    comm = DelayedCommunicator(LocalCommunicator())
    x = torch.ones(4)
    handle = comm.all_reduce_async(x, out=x)
    assert x.isnan().all() and comm.in_flight == 1
    assert handle.wait() is x and torch.equal(x, torch.ones(4)) and comm.in_flight == 0
    handle = comm.all_reduce_async(x, out=x)
    x[0] = 5.0
    with pytest.raises(PrematureUseError, match="was written to before"):
        handle.wait()
    gathered = comm.all_gather_async(x)
    x[1] = 3.0
    with pytest.raises(PrematureUseError, match="input of all_gather was changed"):
        gathered.wait()


# On ranks -------------------------------------------------------------------------------------------------------------

M, N, K = 23, 12, 17


def delayed(group):
    return TPGroup(DelayedCommunicator(group.communicator), ranks=group.ranks)


def integers(*shape, seed):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def own_features(group):
    """Shares that differ between the ranks."""
    cuts = [K * r // group.world_size for r in range(group.world_size + 1)]
    return slice(cuts[group.rank], cuts[group.rank + 1])


def check_forward(group, dtype):
    own = own_features(group)
    full, weight = integers(2, M, K, seed=1).to(dtype), integers(N, K, seed=2).to(dtype)
    bias, residual = integers(N, seed=3).to(dtype), integers(2, M, N, seed=4).to(dtype)
    norm_weight = integers(N, seed=5).to(dtype)
    x, w = full[..., own], weight[:, own]
    expected = torch.nn.functional.linear(full.float(), weight.float()).to(dtype)
    late = delayed(group)
    for overlap, chunks in (("chunked", None), ("chunked", 3), ("chunked", [1, 40, 5]), ("chunked", 99), ("none", 3)):
        call = {"group": late, "overlap": overlap, "chunks": chunks}
        assert torch.equal(ops.linear_all_reduce(x, w, **call), expected)
        assert torch.equal(ops.linear_all_reduce(x, w, bias, **call), expected + bias)
        summed = ops.linear_all_reduce(x, w, bias, residual=residual, **call)
        assert torch.equal(summed, expected + bias + residual)
        normed, summed = ops.linear_all_reduce(x, w, bias, residual=residual, norm_weight=norm_weight, **call)
        want = ops.add_rms_norm(expected + bias, residual, norm_weight)
        assert torch.equal(normed, want[0]) and torch.equal(summed, want[1])
        assert late.communicator.in_flight == 0
    log = late.communicator.log
    log.clear()
    ops.linear_all_reduce(x, w, bias, group=late, overlap="chunked", chunks=3)
    assert log == ["all_reduce_async"] * 3 + ["all_reduce wait"] * 3, "every matmul before the first wait"
    log.clear()
    for options in ({"overlap": "auto", "in_features": K}, {"overlap": "none"}, {"overlap": "chunked", "chunks": 1}):
        assert torch.equal(ops.linear_all_reduce(x, w, group=late, **options), expected)
    assert log == ["all_reduce"] * 3
    assert ops.linear_all_reduce(x[:, :0], w, group=late, overlap="chunked").shape == (2, 0, N)
    with torch.autocast("cpu", torch.bfloat16):  # the sum is in autocast's dtype, the bias keeps its own
        cast = [ops.linear_all_reduce(x, w, bias, group=late, chunks=c, residual=residual) for c in (1, 3)]
    assert cast[0].dtype == cast[1].dtype == dtype and torch.equal(cast[0], cast[1])


def check_bits(group):
    """Not integers: at the same time or one after the other, the bits are the same."""
    generator = torch.Generator().manual_seed(group.rank)
    x, w = (torch.randn(shape, generator=generator).bfloat16() for shape in ((257, 64), (96, 64)))
    late = delayed(group)
    for chunks in (4, [100, 100, 57]):
        overlapped, one_by_one = (
            ops.linear_all_reduce(x, w, group=late, overlap=overlap, chunks=chunks) for overlap in ("chunked", "none")
        )
        assert torch.equal(overlapped, one_by_one)


def check_buffer(group):
    """A buffer of the communicator's takes the sums that nobody keeps, and no others."""
    own = own_features(group)
    x, w, residual = integers(M, K, seed=1)[:, own], integers(N, K, seed=2)[:, own], integers(M, N, seed=3)
    late, asked = delayed(group), []

    def get_buffer(shape, dtype):
        asked.append(torch.full(shape, float("nan"), dtype=dtype))
        return asked[-1]

    call = {"group": late, "overlap": "chunked", "chunks": 3}
    kept = ops.linear_all_reduce(x, w, residual=residual, **call)
    want = ops.linear_all_reduce(x, w, residual=residual, norm_weight=torch.ones(N), **call)
    late.communicator.get_buffer = get_buffer
    assert torch.equal(ops.linear_all_reduce(x, w, residual=residual, **call), kept) and not asked
    found = ops.linear_all_reduce(x, w, residual=residual, norm_weight=torch.ones(N), **call)
    assert [(buffer + residual).equal(kept) for buffer in asked] == [True]
    asked[0].fill_(float("nan"))  # the next call's
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    late.communicator.get_buffer = lambda shape, dtype: None  # it would not fit
    found = ops.linear_all_reduce(x, w, residual=residual, norm_weight=torch.ones(N), **call)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def check_gradients(group):
    own = own_features(group)
    grads = []
    for options in ({"overlap": "chunked", "chunks": 4}, {"overlap": "none"}):
        x = integers(M, K, seed=1)[:, own].requires_grad_()
        w = integers(N, K, seed=2)[:, own].requires_grad_()
        bias, residual, norm = (integers(*shape, seed=3).requires_grad_() for shape in ((N,), (M, N), (N,)))
        late = delayed(group)
        out = ops.linear_all_reduce(x, w, bias, group=late, residual=residual, **options)
        normed, _ = ops.linear_all_reduce(x, w, group=late, residual=residual, norm_weight=norm, **options)
        inputs = (x, w, bias, residual, norm)
        first = torch.autograd.grad((out * integers(M, N, seed=6)).sum() + normed.sum(), inputs, create_graph=True)
        y = ops.linear_all_reduce(x * x, w, group=late, **options)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        second = torch.autograd.grad((dx * integers(M, K, seed=7)[:, own]).sum(), (x, w))
        grads.append((*first, *second))
        assert late.communicator.in_flight == 0
        assert ("all_reduce_async" in late.communicator.log) == (options["overlap"] == "chunked")
    for chunked, plain in zip(*grads, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)


def check_failure_leaves_nothing_in_flight(group):
    late = delayed(group)
    comm = late.communicator
    start, calls = comm.all_reduce_async, []

    def failing(x, op="sum", *, out=None):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("made up")
        return start(x, op, out=out)

    comm.all_reduce_async = failing
    with pytest.raises(RuntimeError, match="made up"):
        ops.linear_all_reduce(torch.ones(8, 4), torch.ones(3, 4), group=late, overlap="chunked", chunks=4)
    assert comm.in_flight == 0 and len(calls) == 3


def check_agreement(group):
    late = delayed(group)
    found = agree(late.communicator, 132 - group.rank, 5, torch.device("cpu"))
    assert found == Agreement(133 - group.world_size, same_tables=True) == agreed(late.communicator)
    other = delayed(group)
    assert not agree(other.communicator, 132, group.rank, torch.device("cpu")).same_tables


OPTIONS = bench_overlap.Options(
    rows=(24, 5), shapes=((8, 13),), chunks=(1, 2, 3), growth=(1.0, 2.0), max_ctas=(0,), dtype="float32", rounds=2
)


def measured(group):
    return bench_overlap.measure(group, {0: delayed(group)}, OPTIONS, "cpu")


def test_benchmark(rank_pool, capfd):
    first, second = rank_pool(2).run(measured)
    assert first == second and {row["m"] for row in first} == {24, 5}
    assert [row["path"] for row in first if row["rows"] == str(row["m"])] == ["none", "none"]
    assert all(row["wrong"] == 0 and row["time_us"] > 0 and row["comm_us"] > 0 for row in first)
    found = bench_overlap.entries(first)
    assert [entry["sizes"]["m"] for entry in found] == [24, 5]
    assert all(entry["us"][entry["path"]] == min(entry["us"].values()) for entry in found)


def test_benchmark_takes_each_schedule_once():
    plans = bench_overlap.candidates(24, 8, torch.float32, None, 1, OPTIONS)
    assert [plan.rows for plan in plans] == [(12, 12), (8, 16), (8, 8, 8), (3, 7, 14)]
    assert str(plans[1]) == "8+16" and (plans[1].chunks, plans[1].growth) == (2, 2.0)


def test_entries_of_the_table():
    common = {"n": 64, "in_features": 256, "ranks": 2, "ranks_per_gpu": 1, "max_ctas": 8}
    rows = [
        {**common, "m": m, "path": path, "chunks": chunks, "growth": 2.0, "time_us": us}
        for m, path, chunks, us in (
            (8, "none", 1, 9.0),
            (8, "chunked", 2, 7.0),
            (8, "chunked", 3, 6.0),
            (4, "none", 1, 3.0),
        )
    ]
    two, one = bench_overlap.entries(rows)
    assert two["path"] == "chunked" and two["config"] == {"chunks": 3, "growth": 2.0}
    assert two["us"] == {"none": 9.0, "chunked": 6.0} and one["path"] == "none" and one["config"] == {}
    pair = LocalCommunicator()
    pair.world_size, pair.max_ctas = 2, 8
    assert two["sizes"] == overlap_sizes(8, 64, 256, pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_forward(rank_pool, world_size, dtype):
    rank_pool(world_size).run(check_forward, dtype)


@pytest.mark.parametrize(
    "check", [check_bits, check_buffer, check_gradients, check_failure_leaves_nothing_in_flight, check_agreement]
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks(rank_pool, world_size, check):
    rank_pool(world_size).run(check)


def test_one_rank():
    group = TPGroup(DelayedCommunicator(LocalCommunicator()))
    x, w = integers(M, K, seed=1), integers(N, K, seed=2)
    assert torch.equal(ops.linear_all_reduce(x, w, group=group, overlap="chunked", chunks=3), x @ w.T)
    assert torch.equal(ops.linear_all_reduce(x, w, group=group), ops.linear_all_reduce_reference(x, w, group=group))
