"""Collectives that gradients flow through: what the layers call.

Each is a pair of collectives that are each other's adjoint, given how the tensor is held on the ranks:

    function                            forward          backward         use
    copy_to_tensor_parallel             identity         all-reduce       input of a column-parallel layer
    reduce_from_tensor_parallel         all-reduce       identity         output of a row-parallel layer
    gather_from_tensor_parallel         all-gather       own slice        column-parallel output made whole
    scatter_to_tensor_parallel          own slice        all-gather       whole input of a row-parallel layer
    gather_from_sequence_parallel       all-gather       reduce-scatter   tokens made whole before a TP block
    reduce_scatter_to_sequence_parallel reduce-scatter   all-gather       output of a TP block, split by tokens

``dim`` and ``sizes`` (the extent at each rank; None for equal ones) say what is split. With one rank each returns its
argument. Where no gradient is asked for the communicator is called directly: a decode step makes dozens of these calls.
Second derivatives work: each backward is made of the functions above.

Names and pairs follow Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022 for the sequence-parallel ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tp_kernels.comm.communicator import gathered_sizes, resolve_sizes
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup

__all__ = [
    "copy_to_tensor_parallel",
    "gather_from_sequence_parallel",
    "gather_from_tensor_parallel",
    "reduce_from_tensor_parallel",
    "reduce_scatter_to_sequence_parallel",
    "scatter_to_tensor_parallel",
]


def copy_to_tensor_parallel(x: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Identity whose gradient is summed over the ranks.

    Args:
        x: any shape, equal on all ranks.
        group: as for ``resolve_group``.
    Returns:
        ``x`` itself, or a view of it when gradients are recorded.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    if group.world_size == 1 or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _Copy.apply(x, group)


def reduce_from_tensor_parallel(x: torch.Tensor, group: Any = None, *, inplace: bool = False) -> torch.Tensor:
    """Sum over the ranks; the gradient passes unchanged.

    Args:
        x: any shape, each rank's partial result.
        group: as for ``resolve_group``.
        inplace: allow the sum to overwrite ``x``, for a partial result that nobody else looks at. Ignored when
            gradients are recorded.
    Returns:
        The sum, of the shape of ``x``; ``x`` itself with one rank.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    if group.world_size == 1:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _Reduce.apply(x, group)
    return group.all_reduce(x, "sum", out=x if inplace else None)


def gather_from_tensor_parallel(
    x: torch.Tensor, group: Any = None, dim: int = -1, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Concatenate the ranks' slices; the gradient is this rank's slice of the whole (equal on all ranks).

    Args:
        x: this rank's slice; its extent along ``dim`` is ``sizes[rank]``.
        dim: the split dimension.
        sizes: extents by rank; None when all are equal.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    if group.world_size == 1:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gather.apply(x, group, dim, _extents(x, group, dim, sizes))
    return group.all_gather(x, dim=dim, sizes=sizes)


def scatter_to_tensor_parallel(
    x: torch.Tensor, group: Any = None, dim: int = -1, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """This rank's slice of a tensor that is equal on all ranks; the gradient is gathered.

    Args:
        x: the whole tensor.
        dim: the dimension to split.
        sizes: extents by rank, summing to that of ``x``; None for equal ones.
    Returns:
        A slice; a view of ``x`` when no gradients are recorded.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    if group.world_size == 1:
        return x
    sizes = resolve_sizes(x.shape[dim], sizes, group.world_size, "scatter")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Scatter.apply(x, group, dim, sizes)
    return _own_slice(x, group, dim, sizes)


def gather_from_sequence_parallel(
    x: torch.Tensor, group: Any = None, dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Concatenate the ranks' tokens; the gradient, which differs between ranks, is summed and split again.

    Args:
        x: this rank's tokens; its extent along ``dim`` is ``sizes[rank]``.
        dim: the token dimension.
        sizes: extents by rank; None when all are equal.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    if group.world_size == 1:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _SequenceGather.apply(x, group, dim, _extents(x, group, dim, sizes))
    return group.all_gather(x, dim=dim, sizes=sizes)


def reduce_scatter_to_sequence_parallel(
    x: torch.Tensor, group: Any = None, dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Sum over the ranks and keep this rank's tokens; the gradient is gathered.

    Args:
        x: this rank's partial result for all tokens.
        dim: the token dimension.
        sizes: extents by rank, summing to that of ``x``; None for equal ones.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    if group.world_size == 1:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        sizes = resolve_sizes(x.shape[dim], sizes, group.world_size, "reduce_scatter")
        return _SequenceReduceScatter.apply(x, group, dim, sizes)
    return group.reduce_scatter(x, "sum", dim=dim, sizes=sizes)


def _extents(x: torch.Tensor, group: TPGroup, dim: int, sizes: Sequence[int] | None) -> list[int]:
    return gathered_sizes(x.shape[dim], sizes, group.rank, group.world_size, "gather")


def _own_slice(x: torch.Tensor, group: TPGroup, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    return x.narrow(dim, sum(sizes[: group.rank]), sizes[group.rank])


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return reduce_from_tensor_parallel(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return group.all_reduce(x, "sum")

    @staticmethod
    def backward(ctx, grad):
        return copy_to_tensor_parallel(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim, sizes):
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return group.all_gather(x, dim=dim, sizes=sizes)

    @staticmethod
    def backward(ctx, grad):
        return scatter_to_tensor_parallel(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim, sizes):
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        # A copy: a view returned from here could not be changed in place by the caller.
        return _own_slice(x, group, dim, sizes).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return gather_from_tensor_parallel(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _SequenceGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim, sizes):
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return group.all_gather(x, dim=dim, sizes=sizes)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter_to_sequence_parallel(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _SequenceReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dim, sizes):
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return group.reduce_scatter(x, "sum", dim=dim, sizes=sizes)

    @staticmethod
    def backward(ctx, grad):
        return gather_from_sequence_parallel(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None
