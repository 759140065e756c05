"""GlooCommunicator: exact sums in every dtype, uneven sizes, deadlines, mismatches, a dead rank. Tier: CPU ranks."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tp_kernels.comm import CommMismatchError, CommTimeoutError, GlooCommunicator, PeerDiedError
from tp_kernels.testing.numeric import integers
from tp_kernels.testing.rank_pool import RankPool

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]
# Empty, one element; what travels with the comparison; gathered by all; exchanged in slices, which are ragged.
LENGTHS = [0, 1, 1000, 5000, 40_001]


def inputs(group, shape, dtype):
    return [integers(shape, dtype, seed=rank) for rank in range(group.world_size)]


def check_all_reduce(group):
    for dtype in DTYPES:
        for length in LENGTHS:
            parts = inputs(group, length, dtype)
            x = parts[group.rank].clone()
            torch.testing.assert_close(group.all_reduce(x), sum(parts), rtol=0, atol=0)
            torch.testing.assert_close(x, parts[group.rank], rtol=0, atol=0)
            largest = torch.stack(parts).amax(0) if length else parts[0]
            torch.testing.assert_close(group.all_reduce(x, "max"), largest, rtol=0, atol=0)
            assert group.all_reduce(x, out=x) is x
            torch.testing.assert_close(x, sum(parts), rtol=0, atol=0)


def check_non_contiguous(group):
    parts = [p.t() for p in inputs(group, (130, 257), torch.float32)]
    x = parts[group.rank]
    torch.testing.assert_close(group.all_reduce(x), sum(parts), rtol=0, atol=0)
    buffer = torch.zeros(257, 260)
    out = buffer[:, ::2]
    group.all_reduce(x, out=out)
    torch.testing.assert_close(out, sum(parts), rtol=0, atol=0)
    assert not buffer[:, 1::2].any()
    torch.testing.assert_close(group.all_gather(x, dim=1), torch.cat(parts, 1), rtol=0, atol=0)


def check_scatter_and_gather(group):
    n = group.world_size
    cases = [(dtype, 1, dim) for dtype in DTYPES for dim in (0, 1, -1)]
    cases += [(dtype, 400, dim) for dtype in (torch.float32, torch.bfloat16) for dim in (0, 1, -1)]
    for dtype, scale, dim in cases:
        for sizes in (None, [3 * scale * r for r in range(n)], [0] * (n - 1) + [5 * scale]):
            total = sum(sizes) if sizes else 4 * scale * n
            extents = sizes or [4 * scale] * n
            shape = [7, 5, 3]
            shape[dim] = total
            parts = inputs(group, shape, dtype)
            whole = sum(parts)
            mine = whole.split(extents, dim)[group.rank]
            result = group.reduce_scatter(parts[group.rank], dim=dim, sizes=sizes)
            torch.testing.assert_close(result, mine, rtol=0, atol=0)
            torch.testing.assert_close(group.all_gather(mine, dim=dim, sizes=sizes), whole, rtol=0, atol=0)


def check_broadcast(group):
    for dtype in DTYPES:
        for src in range(group.world_size):
            x = integers((5, 9), dtype, seed=group.rank).t()
            assert group.broadcast(x, src) is x
            torch.testing.assert_close(x, integers((5, 9), dtype, seed=src).t(), rtol=0, atol=0)
    for length in (0, 100_000):
        x = integers(length, seed=group.rank)
        torch.testing.assert_close(group.broadcast(x, 1), integers(length, seed=1), rtol=0, atol=0)
    parameter = torch.nn.Parameter(torch.full((3,), float(group.rank)))
    group.broadcast(parameter, 1)
    assert parameter.tolist() == [1.0] * 3
    group.barrier()


def check_without_comparison(group):
    store = dist.PrefixStore("unchecked", dist.distributed_c10d._get_default_store())
    unchecked = GlooCommunicator(group.process_group, name="unchecked", store=store, timeout=20, check=False)
    for check in (check_all_reduce, check_non_contiguous, check_scatter_and_gather, check_broadcast):
        check(unchecked)


def random_sum(group, dtype, length):
    """Values whose sum depends on the order."""
    x = torch.randn(length, generator=torch.Generator().manual_seed(group.rank)).to(dtype)
    return group.all_reduce(x)


def raised_by(call):
    """(type name, message, ranks, seconds) of the error that ``call`` raises."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "ranks", ()), time.monotonic() - start
    return None


def mismatched(group, kind):
    x = torch.zeros(4)
    odd = group.rank == 1
    calls = {
        "operation": lambda: group.barrier() if odd else group.all_reduce(x),
        "size": lambda: group.all_reduce(torch.zeros(5) if odd else x),
        "dtype": lambda: group.all_reduce(x.long() if odd else x),
        "op": lambda: group.all_reduce(x, "max" if odd else "sum"),
        "sizes": lambda: group.reduce_scatter(x, sizes=[1, 1, 2] if odd else [2, 1, 1]),
        "root": lambda: group.broadcast(x, 1 if odd else 0),
    }
    return raised_by(calls[kind]), raised_by(group.barrier)


def late_ranks(group, absent, timeout):
    if group.rank in absent:
        time.sleep(4)
        return None
    # The first to give up must not take one that came later for absent.
    if group.rank == 1:
        time.sleep(timeout / 2)
    return raised_by(lambda: group.all_reduce(torch.zeros(3), timeout=timeout))


def dying(group, victim):
    group.barrier()
    if group.rank == victim:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return raised_by(lambda: group.all_reduce(torch.zeros(100_000), timeout=20))


def bad_calls(group):
    x = torch.zeros(4)
    return [
        raised_by(call)[:2]
        for call in (
            lambda: group.all_reduce(x, "prod"),
            lambda: group.all_reduce(x.to(torch.int8)),
            lambda: group.all_reduce(x, out=torch.zeros(5)),
            lambda: group.all_reduce(x, timeout=0),
            lambda: group.reduce_scatter(torch.zeros(5)),
            lambda: group.all_gather(x, dim=1),
            lambda: group.all_gather(x, sizes=[1, 2, 3]),
            lambda: group.broadcast(x, 3),
            lambda: group.all_reduce(x.to("meta")),
        )
    ]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "check",
    [check_all_reduce, check_non_contiguous, check_scatter_and_gather, check_broadcast, check_without_comparison],
    ids=lambda fn: fn.__name__,
)
def test_exact(rank_pool, world_size, check):
    rank_pool(world_size, backend="gloo").run(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [500, 50_003])
def test_sum_is_in_rank_order_in_fp32_and_equal_everywhere(rank_pool, dtype, length):
    results = rank_pool(3, backend="gloo").run(random_sum, dtype, length)
    parts = [torch.randn(length, generator=torch.Generator().manual_seed(r)).to(dtype).float() for r in range(3)]
    expected = ((parts[0] + parts[1]) + parts[2]).to(dtype)
    for result in results:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_shared_memory(rank_pool, dtype):
    over_gloo = rank_pool(3, backend="gloo").run(random_sum, dtype, 50_003)
    over_memory = rank_pool(3).run(random_sum, dtype, 50_003)
    assert torch.equal(over_gloo[0], over_memory[0])


@pytest.mark.parametrize("kind", ["operation", "size", "dtype", "op", "sizes", "root"])
def test_mismatch_lists_who_called_what(kind):
    with RankPool(3, backend="gloo") as pool:
        for (name, message, ranks, _), after in pool.run(mismatched, kind):
            assert name == CommMismatchError.__name__
            assert ranks == (1,)
            assert "rank 0: call" in message and "rank 1: call" in message
            assert after[0] == "CommAbortedError"


def test_deadline_names_the_absent_rank_only():
    with RankPool(3, backend="gloo") as pool:
        results = pool.run(late_ranks, [2], 1.5)
    for name, message, ranks, _ in results[:2]:
        assert name == CommTimeoutError.__name__, message
        assert ranks == (2,)
        assert "all_reduce (call 1)" in message


def test_killed_rank_is_noticed_and_named():
    with RankPool(3, backend="gloo") as pool:
        outcomes = pool.run_outcomes(dying, 1)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        name, message, ranks, seconds = outcomes[rank].value
        assert name == PeerDiedError.__name__, message
        assert ranks == (1,)
        assert seconds < 10


def on_cuda(group):
    parts = [p.cuda() for p in inputs(group, (6, 50), torch.bfloat16)]
    x, n = parts[group.rank], group.world_size
    results = [
        (group.all_reduce(x), sum(parts)),
        (group.reduce_scatter(x), sum(parts).chunk(n)[group.rank]),
        (group.all_gather(x, dim=1), torch.cat(parts, 1)),
        (group.broadcast(x.clone(), 1), parts[1]),
    ]
    for actual, expected in results:
        assert actual.is_cuda
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    return group.device_type


@pytest.mark.gpu
def test_cuda_tensors_go_through_the_host():
    with RankPool(2, device="cuda") as pool:
        assert pool.run(on_cuda) == ["cuda"] * 2


def test_bad_arguments_are_value_errors(rank_pool):
    for results in rank_pool(3, backend="gloo").run(bad_calls):
        assert [name for name, _ in results] == ["ValueError"] * len(results)
    rank_pool(3, backend="gloo").run(check_broadcast)  # nothing was broken by them
