"""Autograd-aware collectives against single-process torch, in fp64 with exact integers. Tier: CPU ranks."""

import pytest
import torch

from tp_kernels.comm.functional import (
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    scatter_to_tensor_parallel,
)
from tp_kernels.testing.numeric import integers

SPLITS = {2: [3, 4], 3: [1, 0, 6]}  # of seven


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def column_then_row(group):
    """x -> column-parallel -> square -> row-parallel, against the whole computation, first and second derivative."""
    sizes = SPLITS[group.world_size]
    whole_a, whole_b = integers((5, 7), torch.float64, seed=1), integers((7, 4), torch.float64, seed=2)
    x = integers((6, 5), torch.float64, seed=3)
    weight = integers((6, 4), torch.float64, seed=4)

    def run(x, a, b, enter, leave):
        hidden = enter(x) @ a
        loss = (leave((hidden * hidden) @ b) * weight).sum()
        grads = torch.autograd.grad(loss, (x, a, b), create_graph=True)
        second = torch.autograd.grad((grads[0] * weight[:, :1]).sum(), (x, a), retain_graph=True)
        return [loss, *grads, *second]

    def leaf(t):
        return t.clone().requires_grad_()

    expected = run(leaf(x), leaf(whole_a), leaf(whole_b), lambda t: t, lambda t: t)
    a, b = whole_a.split(sizes, 1)[group.rank], whole_b.split(sizes, 0)[group.rank]
    actual = run(
        leaf(x),
        leaf(a),
        leaf(b),
        lambda t: copy_to_tensor_parallel(t, group),
        lambda t: reduce_from_tensor_parallel(t, group),
    )
    exact(actual[0], expected[0])
    exact(actual[1], expected[1])
    exact(actual[2], expected[2].split(sizes, 1)[group.rank])
    exact(actual[3], expected[3].split(sizes, 0)[group.rank])
    exact(actual[4], expected[4])
    exact(actual[5], expected[5].split(sizes, 1)[group.rank])


def gather_and_scatter(group):
    sizes = SPLITS[group.world_size]
    for dim in (0, 1, -1):
        shape = [2, 3]
        shape[dim] = 7
        whole = integers(shape, torch.float64, seed=5)
        weight = integers(shape, torch.float64, seed=6)
        mine = whole.split(sizes, dim)[group.rank].clone().requires_grad_()
        gathered = gather_from_tensor_parallel(mine, group, dim, sizes)
        exact(gathered, whole)
        (gathered * weight).sum().backward()
        exact(mine.grad, weight.split(sizes, dim)[group.rank])

        x = whole.clone().requires_grad_()
        part = scatter_to_tensor_parallel(x, group, dim, sizes)
        exact(part, mine.detach())
        (part * weight.split(sizes, dim)[group.rank]).sum().backward()
        exact(x.grad, weight)
        with torch.no_grad():
            exact(gather_from_tensor_parallel(scatter_to_tensor_parallel(x, group, dim, sizes), group, dim, sizes), x)


def sequence_parallel(group):
    """Tokens are split outside, summed inside: gradients differ between ranks before the reduce-scatter."""
    n, rank = group.world_size, group.rank
    sizes = SPLITS[n]
    for dim in (0, 1):
        shape = [2, 2, 3]
        shape[dim] = 7
        tokens = integers(shape, torch.float64, seed=7)
        weights = [integers(shape, torch.float64, seed=10 + r) for r in range(n)]
        mine = tokens.split(sizes, dim)[rank].clone().requires_grad_()
        whole = gather_from_sequence_parallel(mine, group, dim, sizes)
        exact(whole, tokens)
        (whole * weights[rank]).sum().backward()
        exact(mine.grad, sum(weights).split(sizes, dim)[rank])

        partials = [integers(shape, torch.float64, seed=20 + r) for r in range(n)]
        partial = partials[rank].clone().requires_grad_()
        reduced = reduce_scatter_to_sequence_parallel(partial, group, dim, sizes)
        exact(reduced, sum(partials).split(sizes, dim)[rank])
        (reduced * tokens.split(sizes, dim)[rank]).sum().backward()
        exact(partial.grad, tokens)


def equal_sizes_by_default(group):
    n = group.world_size
    whole = integers((2 * n, 3), torch.float64)
    part = scatter_to_tensor_parallel(whole, group, dim=0)
    assert part.shape == (2, 3)
    exact(gather_from_tensor_parallel(part, group, dim=0), whole)
    exact(gather_from_sequence_parallel(part, group), whole)
    exact(reduce_scatter_to_sequence_parallel(whole, group), part * n)


def paths_without_gradients(group):
    x = torch.full((4,), float(group.rank + 1))
    total = float(sum(range(group.world_size + 1)))
    assert copy_to_tensor_parallel(x, group) is x
    exact(reduce_from_tensor_parallel(x, group), torch.full((4,), total))
    assert x[0] == group.rank + 1
    assert reduce_from_tensor_parallel(x, group, inplace=True) is x
    assert x[0] == total
    leaf = torch.ones(4, requires_grad=True)
    result = reduce_from_tensor_parallel(leaf, group, inplace=True)
    assert result.requires_grad and leaf[0] == 1
    with torch.no_grad():
        assert not reduce_from_tensor_parallel(leaf, group).requires_grad
    # Expanded gradients and transposed inputs are not contiguous.
    transposed = torch.ones(3, 2, requires_grad=True)
    reduce_from_tensor_parallel(transposed.t(), group).sum().backward()
    exact(transposed.grad, torch.ones(3, 2))
    bad = [group.rank] * group.world_size
    with pytest.raises(ValueError, match="sizes"):
        gather_from_tensor_parallel(leaf, group, 0, bad)
    with pytest.raises(ValueError, match="sizes"):
        scatter_to_tensor_parallel(leaf, group, 0, bad)


CHECKS = [column_then_row, gather_and_scatter, sequence_parallel, equal_sizes_by_default, paths_without_gradients]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda fn: fn.__name__)
def test_against_one_process(rank_pool, world_size, check):
    rank_pool(world_size).run(check)


@pytest.mark.parametrize("check", [column_then_row, sequence_parallel], ids=lambda fn: fn.__name__)
def test_over_gloo(rank_pool, check):
    rank_pool(3, backend="gloo").run(check)


def test_one_rank_returns_its_argument():
    x = torch.ones(3, requires_grad=True)
    for function in (
        copy_to_tensor_parallel,
        reduce_from_tensor_parallel,
        gather_from_tensor_parallel,
        scatter_to_tensor_parallel,
        gather_from_sequence_parallel,
        reduce_scatter_to_sequence_parallel,
    ):
        assert function(x) is x
