"""Projections beside the collectives of sequence parallelism, on shapes drawn at random. Tier: CPU ranks (3 processes).

Leading dimensions, tokens and features of every rank (none, too), strides, bias, norm and gradients are drawn; numbers
are integers, so sums are exact in any order. Oracle: PyTorch's linear around the collectives.
"""

import random

import torch

from tp_kernels import ops
from tp_kernels.comm import TPGroup
from tp_kernels.testing.delayed import DelayedCommunicator

CASES = 80


def integers(*shape, seed):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def strided(x, how):
    """The same numbers, lying otherwise."""
    if how == "plain" or x.dim() < 2:
        return x
    return x.mT.contiguous().mT if how == "columns first" else torch.cat([x, x], -1)[..., : x.shape[-1]]


def results(function, inputs, layout, rank, gradients):
    """What the function returns, and gradients of the last of it."""
    inputs = [strided(x.detach().clone(), layout).requires_grad_(gradients) for x in inputs]
    out = function(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    if not gradients:
        return out
    return [t.detach() for t in out] + list(
        torch.autograd.grad(out[-1], inputs, integers(*out[-1].shape, seed=100 + rank))
    )


def compare(op, reference, group, late, inputs, chunks, layout, gradients):
    call = {"layout": layout, "rank": group.rank, "gradients": gradients}

    def overlapping(how):
        return results(lambda *t: op(*t, group=late, overlap=how, chunks=chunks), inputs, **call)

    found = overlapping("chunked"), overlapping("none")
    expected = results(lambda *t: reference(*t, group=group), inputs, **call)
    for chunked, none, exact in zip(*found, expected, strict=True):
        assert torch.equal(chunked, none), "running at the same time changed bits"
        torch.testing.assert_close(chunked, exact)
    assert late.communicator.in_flight == 0


def draw(group, seed):
    rng, world, rank = random.Random(seed), group.world_size, group.rank
    late = TPGroup(DelayedCommunicator(group.communicator), ranks=group.ranks)
    for case in range(CASES):
        lead = rng.choice([(), (1,), (2,), (1, 1), (2, 3), (0,)])
        sizes = [rng.randint(0, 5)] * world if rng.random() < 0.5 else [rng.randint(0, 6) for _ in range(world)]
        features, n, k = [rng.choice([0, 1, 3, 4]) for _ in range(world)], rng.randint(1, 5), rng.randint(1, 6)
        chunks, layout = rng.choice([1, 2, 3, 5]), rng.choice(["plain", "columns first", "gaps"])
        gradients, norm, total = rng.random() < 0.5, rng.random() < 0.4, rng.choice([None, sum(features) + world])
        own, mine = features[rank], {"seed": 10 * case + rank}
        bias, follows = integers(n, seed=case) if rng.random() < 0.5 else None, {}
        if norm:
            residual = integers(*lead, sizes[rank], n, seed=case)
            follows = {"residual": residual, "norm_weight": integers(n, seed=case + 1)}

        def scatter(f, bias=bias, sizes=sizes, follows=follows):
            return lambda x, w, **options: f(x, w, bias, sizes=sizes, **follows, **options)

        inputs = [integers(*lead, sum(sizes), own, **mine), integers(n, own, **mine)]
        pair = map(scatter, (ops.linear_reduce_scatter, ops.linear_reduce_scatter_reference))
        compare(*pair, group, late, inputs, chunks, layout, gradients)

        def gather(x, w, b, sizes=sizes, total=total, **options):
            return ops.column_parallel_linear(x, w, b, sequence_sizes=sizes, out_features=total, **options)

        def plain(x, w, b, sizes=sizes, **options):
            return ops.column_parallel_linear_reference(x, w, b, sequence_sizes=sizes, **options)

        inputs = [integers(*lead, sizes[rank], k, **mine), integers(own + 1, k, **mine), integers(own + 1, **mine)]
        compare(gather, plain, group, late, inputs, chunks, layout, gradients)


def test_any_shape(rank_pool):
    rank_pool(3).run(draw, 1)
