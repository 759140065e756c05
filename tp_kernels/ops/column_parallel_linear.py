"""Column-parallel projection whose backward hides its communication behind the gradient of the weight.

    y = linear(copy_to_tensor_parallel(x), weight, bias)                  ``x`` [..., K] equal on all ranks
    y = linear(gather_from_sequence_parallel(x), weight, bias)            ``x`` [..., S_rank, K], a part of the tokens

Shapes: ``weight`` [N, K], this rank's rows; ``bias`` [N]; the result [..., N] or [..., S, N].

Backward, on a communicator that works beside the caller's stream: the gradient of ``x`` is computed first, and while it
is summed over the ranks the gradient of the weight is. Of the tokens only this rank's part is kept for the backward,
which gathers them again while the gradient of ``x`` is computed (Korthikanti et al. 2022): the memory that sequence
parallelism is there to save, for communication that is hidden. Same matmuls and same collectives, so the same bits as
without overlap. On other communicators, under autocast and in traced code it is the composition above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tp_kernels.comm.communicator import Handle, started_collectives
from tp_kernels.comm.functional import (
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
)
from tp_kernels.comm.overlap import offers_overlap
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._gpu import autocast_dtype
from tp_kernels.ops._library import PLAIN_TYPES, needs_grad, watched
from tp_kernels.ops.linear import check_linear, linear

__all__ = ["column_parallel_linear", "column_parallel_linear_reference"]

# Tokens of sequence-parallel activations [..., sequence, hidden].
_SEQUENCE_DIM = -2


def column_parallel_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    sequence_sizes: Sequence[int] | None = None,
) -> Tensor:
    """``column_parallel_linear`` composed of the differentiable collectives, nothing overlapped."""
    if sequence_sizes is None:
        return linear(copy_to_tensor_parallel(x, group), weight, bias)
    return linear(gather_from_sequence_parallel(x, group, _SEQUENCE_DIM, sequence_sizes), weight, bias)


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: TPGroup, sizes: list[int] | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sizes = group, sizes
        whole = x if sizes is None else group.all_gather(x, dim=_SEQUENCE_DIM, sizes=sizes)
        return linear(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        # A graph of the backward itself is asked for: the composition, which can be differentiated again.
        compute = _differentiable_gradients if torch.is_grad_enabled() else _overlapped_gradients
        grad_x, grad_weight = compute(grad, x, weight, ctx.group, ctx.sizes, wants_weight)
        grad_bias = grad.reshape(-1, weight.shape[0]).sum(0) if wants_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _differentiable_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, group: TPGroup, sizes: list[int] | None, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    n, k = weight.shape
    partial = grad @ weight
    if sizes is None:
        grad_x, whole = reduce_from_tensor_parallel(partial, group), copy_to_tensor_parallel(x, group)
    else:
        grad_x = reduce_scatter_to_sequence_parallel(partial, group, _SEQUENCE_DIM, sizes)
        whole = gather_from_sequence_parallel(x, group, _SEQUENCE_DIM, sizes) if wants_weight else x
    return grad_x, grad.reshape(-1, n).t() @ whole.reshape(-1, k) if wants_weight else None


def _overlapped_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, group: TPGroup, sizes: list[int] | None, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    n, k = weight.shape
    rows, communicator = grad.reshape(-1, n), group.communicator
    gathered: Handle | None = None
    with started_collectives() as started:
        if sizes is not None and wants_weight:
            gathered = communicator.all_gather_async(x, dim=_SEQUENCE_DIM, sizes=sizes)
            started.append(gathered)
        partial = (rows @ weight).view(*grad.shape[:-1], k)
        if sizes is None:
            summed = communicator.all_reduce_async(partial, out=partial)
        else:
            summed = communicator.reduce_scatter_async(partial, dim=_SEQUENCE_DIM, sizes=sizes)
        started.append(summed)
        grad_weight = None
        if wants_weight:
            whole = x if gathered is None else gathered.wait()
            grad_weight = rows.t() @ whole.reshape(-1, k)
        return summed.wait(), grad_weight


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    sequence_sizes: Sequence[int] | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` with this rank's rows of the weight; the gradient of ``x`` is summed over the ranks.

    Args:
        x: [..., K], equal on all ranks; with ``sequence_sizes`` [..., S_rank, K], this rank's tokens.
        weight: [N, K].
        bias: [N].
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        sequence_sizes: every rank's number of tokens; the tokens are gathered first, their gradients scattered last.

    Returns:
        [..., N]; with ``sequence_sizes`` [..., S, N] for the tokens of all ranks.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    if (
        group.world_size > 1
        and offers_overlap(group)
        and needs_grad(x)
        and not watched()
        and autocast_dtype(x) is None
        and type(x) in PLAIN_TYPES
        and type(weight) in PLAIN_TYPES
    ):
        check_linear(x, weight, bias, None, None)
        sizes = None if sequence_sizes is None else list(sequence_sizes)
        return _ColumnParallelLinear.apply(x, weight, bias, group, sizes)
    return column_parallel_linear_reference(x, weight, bias, group=group, sequence_sizes=sequence_sizes)
