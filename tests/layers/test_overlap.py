"""Layers that overlap with communication give what they give without. Tier: CPU ranks (1, 2 and 3 processes).

A ``DelayedCommunicator`` stands in for one that works beside the caller: results are NaN until waited for. Values are
integers held in floats, so nothing depends on an order.
"""

import pytest
import torch

from tp_kernels import ops
from tp_kernels.checkpoint.sharding import shard_range_sizes
from tp_kernels.comm import TPGroup
from tp_kernels.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelMLP,
    QKVParallelLinear,
    RowParallelLinear,
)
from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.testing.delayed import DelayedCommunicator

BATCH, TOKENS, HIDDEN, WIDTH = 2, 7, 12, 19


def delayed(group):
    return TPGroup(DelayedCommunicator(group.communicator), ranks=group.ranks)


def integers(*shape, seed):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def fill(layer, seed):
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed + 100 * index))
    return layer


def results(make, group, x, second=False):
    """Output, and gradients of the input and of all parameters; with ``second`` those of a function of them, too."""
    layer = fill(make(group), seed=group.rank)
    x = x.clone().requires_grad_()
    out = layer(x)
    inputs = (x, *layer.parameters())
    loss = (out * integers(*out.shape, seed=9)).sum() + (out * out).sum()
    grads = torch.autograd.grad(loss, inputs, create_graph=second)
    found = [out, *grads]
    if second:
        found += torch.autograd.grad(sum((grad * grad).sum() for grad in grads), inputs)
    return [tensor.detach() for tensor in found]


def compare(make, group, x, second=False):
    """The log of the calls, after both ways gave the same."""
    late = delayed(group)
    overlapped, plain = (results(make, g, x, second) for g in (late, group))
    for mine, theirs in zip(overlapped, plain, strict=True):
        assert torch.equal(mine, theirs)
    assert late.communicator.in_flight == 0
    return late.communicator.log


def column(group, **options):
    return ColumnParallelLinear(HIDDEN, WIDTH, group=group, **options)


def check_column(group):
    x = integers(BATCH, TOKENS, HIDDEN, seed=1)
    log = compare(column, group, x)
    expected = ["all_reduce_async", "all_reduce wait"] if group.world_size > 1 else []
    assert log == expected
    compare(lambda g: column(g, bias=False, gather_output=True), group, x)
    compare(lambda g: MergedColumnParallelLinear(HIDDEN, [WIDTH, 8], group=g), group, x)
    compare(lambda g: column(g), group, x, second=True)
    compare(column, group, x[0, 0])


def check_replicated_heads(group):
    """Fewer KV heads than ranks: the layer projects with a weight that is not its parameter."""
    compare(lambda g: QKVParallelLinear(HIDDEN, 4, 3, 1, bias=True, group=g), group, integers(5, HIDDEN, seed=1))


def check_frozen(group):
    def frozen(g):
        layer = column(g, bias=False)
        layer.weight.requires_grad_(False)
        return layer

    x = integers(TOKENS, HIDDEN, seed=1).requires_grad_()
    late = delayed(group)
    grads = []
    for g in (late, group):
        layer = fill(frozen(g), seed=g.rank)
        grads.append(torch.autograd.grad(layer(x).sum(), x)[0])
    assert torch.equal(*grads) and late.communicator.in_flight == 0
    late.communicator.log.clear()
    layer = fill(column(late), seed=0)
    layer(integers(TOKENS, HIDDEN, seed=1)).sum().backward()
    assert late.communicator.log == [], "no gradient of the input, no communication"


def check_sequence_parallel(group):
    sizes = shard_range_sizes(TOKENS, group.world_size)
    start = sum(sizes[: group.rank])
    x = integers(BATCH, TOKENS, HIDDEN, seed=1)[:, start : start + sizes[group.rank]]
    log = compare(lambda g: column(g, sequence_parallel=True), group, x)
    if group.world_size > 1:
        backward = ["all_gather_async", "reduce_scatter_async", "all_gather wait", "reduce_scatter wait"]
        assert log == ["all_gather", "all_gather", *backward], "lengths, tokens, then the backward's"
    compare(lambda g: column(g, sequence_parallel=True), group, x, second=True)
    compare(lambda g: RowParallelLinear(WIDTH, HIDDEN, sequence_parallel=True, group=g), group, _own(group))
    for options in ({}, {"bias": False}, {"skip_bias_add": True}):
        log = compare(lambda g, o=options: Reduced(g, sequence_parallel=True, **o), group, _own(group))
        if group.world_size > 1:
            forward = [name for name in log if name.startswith("reduce_scatter")]
            pieces = forward.index("reduce_scatter wait")
            assert pieces > 1 and forward[: 2 * pieces] == [
                *["reduce_scatter_async"] * pieces,
                *["reduce_scatter wait"] * pieces,
            ]
    compare(lambda g: Reduced(g, sequence_parallel=True), group, _own(group), second=True)
    with torch.no_grad():
        w, own = integers(HIDDEN, _own(group).shape[-1], seed=6), _own(group)
        for rows, chunks in ((TOKENS, 3), (TOKENS, 99), (1, 2), (0, 2)):
            sizes = shard_range_sizes(rows, group.world_size)
            call = {"sizes": sizes, "group": delayed(group), "chunks": chunks}
            found = [ops.linear_reduce_scatter(own[:, :rows], w, overlap=o, **call) for o in ("chunked", "none")]
            whole = ops.linear_reduce_scatter(own[:, :rows], w, sizes=sizes, group=group)
            assert all(torch.equal(each, whole) for each in found)


def _own(group):
    width = RowParallelLinear(WIDTH, HIDDEN, group=group).in_features_local
    return integers(BATCH, TOKENS, width, seed=group.rank)


class Reduced(torch.nn.Module):
    """A row-parallel layer that is asked to overlap where its group can."""

    def __init__(self, group, **options):
        super().__init__()
        overlap = "chunked" if group.communicator.overlap_modes else "none"
        self.layer = RowParallelLinear(WIDTH, HIDDEN, group=group, overlap=overlap, **options)

    def forward(self, x):
        out = self.layer(x)
        return out if isinstance(out, torch.Tensor) else out[0] * 2 + out[1]


def check_row(group):
    x = _own(group)
    log = compare(Reduced, group, x)
    if group.world_size > 1:
        first = ["all_gather"]  # the ranks compare their multiprocessors
        assert log == first + ["all_reduce_async"] * 4 + ["all_reduce wait"] * 4
    compare(lambda g: Reduced(g, bias=False), group, x)
    compare(lambda g: Reduced(g, skip_bias_add=True), group, x)
    compare(Reduced, group, x, second=True)
    late = delayed(group)
    with torch.no_grad():
        outs = [fill(Reduced(g), seed=g.rank)(x) for g in (late, group)]
    assert torch.equal(*outs)
    whole = integers(TOKENS, WIDTH, seed=4)
    compare(lambda g: Reduced(g, input_is_parallel=False), group, whole)
    with torch.no_grad():  # "auto" overlaps nothing on a CPU
        late.communicator.log.clear()
        fill(RowParallelLinear(WIDTH, HIDDEN, group=late), seed=0)(x)
    assert late.communicator.log == (["all_reduce"] if group.world_size > 1 else [])


def check_mlp(group):
    x = integers(3, HIDDEN, seed=1)
    gelu = lambda g: ParallelMLP(HIDDEN, WIDTH, bias=True, group=g, activation="gelu")  # noqa: E731
    log = compare(gelu, group, x * 0)
    assert log == (["all_reduce", "all_reduce_async", "all_reduce wait"] if group.world_size > 1 else [])
    compare(lambda g: ParallelMLP(HIDDEN, WIDTH, group=g), group, x * 0)


def check_fused_mlp(group):
    """The GPU's fused ops, interpreted: the same kernels with and without overlap, so the same bits."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(5, 16, generator=generator) / 64).half()
    half = lambda g: ParallelMLP(16, 32 * g.world_size, bias=True, group=g, dtype=torch.float16)  # noqa: E731
    with pretend(H100):
        log = compare(half, group, x)
        assert log == (["all_reduce", "all_reduce_async", "all_reduce wait"] if group.world_size > 1 else [])
        late = delayed(group)
        w = torch.randn(64, 16, generator=generator).half().requires_grad_()
        grads = []
        for g in (late, group):
            own = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(ops.swiglu_linear(own, w, group=g).sum(), (own, w)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and late.communicator.in_flight == 0


def check_errors(group):
    fused = RowParallelLinear(WIDTH, HIDDEN, group=delayed(group), overlap="fused")
    with pytest.raises(ValueError, match='overlap="fused" needs CUDA tensors'):
        fused(_own(group))


CHECKS = [
    check_column,
    check_replicated_heads,
    check_frozen,
    check_sequence_parallel,
    check_row,
    check_mlp,
    check_fused_mlp,
    check_errors,
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_layers(rank_pool, world_size, check):
    rank_pool(world_size).run(check)
