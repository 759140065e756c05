"""Column-parallel projection whose communication is hidden behind its matmuls, forward and backward.

    y = linear(copy_to_tensor_parallel(x), weight, bias)                  ``x`` [..., K] equal on all ranks
    y = linear(gather_from_sequence_parallel(x), weight, bias)            ``x`` [..., S_rank, K], a part of the tokens

Shapes: ``weight`` [N, K], this rank's rows; ``bias`` [N]; the result [..., N] or [..., S, N].

Forward of the second form with ``overlap="chunked"``: the tokens are gathered in pieces, each of which holds the same
part of every rank's tokens (``_token_pieces``); one is multiplied while the next is gathered. All gathers are begun at
once: nothing but the tokens at hand feeds them. Everything is joined to the caller's stream on return, so a CUDA graph
can capture it. Numerics: running at the same time changes no bits, "chunked" gives exactly what "none" gives with the
same ``chunks``; against one piece, other numbers of rows let cuBLAS take other kernels. "auto" overlaps only what was
measured to be faster on the same kind of GPU.

Backward, on a communicator that works beside the caller's stream: the gradient of ``x`` is computed first, and while it
is summed over the ranks the gradient of the weight is. Of the tokens only this rank's part is kept for the backward,
which gathers them again while the gradient of ``x`` is computed (Korthikanti et al. 2022): the memory that sequence
parallelism is there to save, for communication that is hidden. Same matmuls and same collectives, so the same bits as
without overlap. On other communicators, under autocast, in traced code and with tensor subclasses it is the composition
above, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels.comm.communicator import Handle, gathered_sizes, started_collectives
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
from tp_kernels.ops._overlap_choice import choose_overlap
from tp_kernels.ops._token_pieces import (
    SEQUENCE_DIM,
    Pieces,
    check_chunks,
    check_overlap,
    gather_matmul,
    plan_pieces,
    sequences,
)
from tp_kernels.ops.linear import check_linear, linear
from tp_kernels.ops.swiglu import as_rows
from tp_kernels.ops.tuning import Choice

__all__ = ["choose_column_parallel_linear", "column_parallel_linear", "column_parallel_linear_reference"]

_OP = "column_parallel_linear"


def column_parallel_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    sequence_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Plain PyTorch ``column_parallel_linear`` behind the differentiable collectives, nothing overlapped."""
    return F.linear(_whole(x, group, sequence_sizes), weight, bias)


def _whole(x: Tensor, group: Any, sizes: Sequence[int] | None) -> Tensor:
    if sizes is None:
        return copy_to_tensor_parallel(x, group)
    return gather_from_sequence_parallel(x, group, SEQUENCE_DIM, sizes)


# The choice ----------------------------------------------------------------------------------------------------------


def choose_column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    *,
    group: Any = None,
    sequence_sizes: Sequence[int] | None = None,
    overlap: str = "auto",
    out_features: int | None = None,
) -> Choice:
    """What the forward of ``column_parallel_linear`` does: "chunked" or "none", and why. A collective at first."""
    group = resolve_group(group)
    if sequence_sizes is None:
        return Choice("none", "every rank has all tokens: there is nothing to gather")
    reason = _composed(x, weight)
    if reason is not None and group.world_size > 1:
        return Choice("none", reason)
    if overlap == "auto" and out_features is None and group.world_size > 1:
        return Choice("none", "out_features is not given, and a rank's own share does not tell the others'")
    rows, (n, k) = sequences(x) * sum(sequence_sizes), weight.shape
    return choose_overlap(_OP, x, weight, group, overlap, rows, out_features or n, k)


def _composed(x: Tensor, weight: Tensor) -> str | None:
    """Why the call must be the composition of differentiable functions; None if it need not."""
    if watched():
        return "traced code"
    if autocast_dtype(x) is not None:
        return "autocast is on"
    for name, tensor in (("input", x), ("weight", weight)):
        if type(tensor) not in PLAIN_TYPES:
            return f"the {name} is a {type(tensor).__name__}"
    return None


# Gradients -----------------------------------------------------------------------------------------------------------


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: TPGroup,
        sizes: list[int] | None,
        pieces: Pieces,
        overlapped: tuple[bool, bool],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sizes, ctx.overlapped = group, sizes, overlapped[1]
        if sizes is not None and pieces:
            return gather_matmul(x, weight.t(), bias, sizes, pieces, group.communicator, overlapped[0])[0]
        whole = x if sizes is None else group.all_gather(x, dim=SEQUENCE_DIM, sizes=sizes)
        return linear(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        # A graph of the backward itself is asked for: the composition, which can be differentiated again.
        overlapped = ctx.overlapped and not torch.is_grad_enabled()
        compute = _overlapped_gradients if overlapped else _differentiable_gradients
        grad_x, grad_weight = compute(grad, x, weight, ctx.group, ctx.sizes, wants_x, wants_weight)
        grad_bias = as_rows(grad).sum(0) if wants_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _differentiable_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, group: TPGroup, sizes: list[int] | None, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = grad_weight = None
    if wants_x:
        partial = grad @ weight
        if sizes is None:
            grad_x = reduce_from_tensor_parallel(partial, group)
        else:
            grad_x = reduce_scatter_to_sequence_parallel(partial, group, SEQUENCE_DIM, sizes)
    if wants_weight:
        grad_weight = as_rows(grad).t() @ as_rows(_whole(x, group, sizes))
    return grad_x, grad_weight


def _overlapped_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, group: TPGroup, sizes: list[int] | None, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not wants_x:  # then there is nothing to do meanwhile
        return _differentiable_gradients(grad, x, weight, group, sizes, wants_x, wants_weight)
    rows, communicator = as_rows(grad), group.communicator
    gathered: Handle | None = None
    with started_collectives() as started:
        if sizes is not None and wants_weight:
            gathered = communicator.all_gather_async(x, dim=SEQUENCE_DIM, sizes=sizes)
            started.append(gathered)
        partial = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
        if sizes is None:
            summed = communicator.all_reduce_async(partial, out=partial)
        else:
            summed = communicator.reduce_scatter_async(partial, dim=SEQUENCE_DIM, sizes=sizes)
        started.append(summed)
        grad_weight = None
        if wants_weight:
            whole = x if gathered is None else gathered.wait()
            grad_weight = rows.t() @ as_rows(whole)
        return summed.wait(), grad_weight


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    sequence_sizes: Sequence[int] | None = None,
    overlap: str = "auto",
    chunks: int | Sequence[int] | None = None,
    out_features: int | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` with this rank's rows of the weight; the gradient of ``x`` is summed over the ranks.

    Args:
        x: [..., K], equal on all ranks; with ``sequence_sizes`` [..., S_rank, K], this rank's tokens.
        weight: [N, K].
        bias: [N].
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        sequence_sizes: every rank's number of tokens; the tokens are gathered first, their gradients scattered last.
        overlap: "auto" gathers tokens beside the matmul where that was measured to be faster, and overlaps the backward
            wherever the communicator can; "chunked", with ``sequence_sizes``, gathers beside the matmul unmeasured,
            also on communicators that work at once; "none" overlaps nothing. Under autocast, in traced code and with
            tensor subclasses the tokens stay in one piece.
        chunks: most pieces of the tokens, or the number of rows of each, all ranks' together (nearly so where ranks
            hold unequal numbers); the same on all ranks. With "none" they are worked off one after the other, and the
            bits are those of "chunked". None: as measured, else 4 for "chunked" and 1 for "none".
        out_features: N of all ranks together; "auto" needs it to find a measurement that all ranks find, and ``chunks``
            to cut whole waves of the GPU rather than equal pieces.

    Returns:
        [..., N]; with ``sequence_sizes`` [..., S, N] for the tokens of all ranks.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown overlap, pieces of tokens that are
            not split over the ranks; a first chunked call inside a graph capture.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    check_overlap(overlap)
    sizes = None
    if sequence_sizes is not None:
        if x.dim() < 2:
            raise ValueError(f"with sequence_sizes expected x [..., tokens, K], got {list(x.shape)}")
        sizes = gathered_sizes(x.shape[SEQUENCE_DIM], sequence_sizes, group.rank, group.world_size, _OP)
        check_chunks(chunks, x, sizes)
    elif overlap == "chunked" or chunks is not None:
        raise ValueError('overlap="chunked" and chunks= are for tokens split over the ranks: expected sequence_sizes')
    if (sizes is not None or needs_grad(x)) and group.world_size > 1 and _composed(x, weight) is None:
        check_linear(x, weight, bias, None, None)
        pieces, overlapped = _schedule(x, weight, group, sizes, overlap, chunks, out_features)
        if pieces and not needs_grad(x, weight, bias):
            return gather_matmul(x, weight.t(), bias, sizes, pieces, group.communicator, overlapped)[0]
        backward = overlap != "none" and needs_grad(x) and offers_overlap(group)
        if pieces or backward:
            return _ColumnParallelLinear.apply(x, weight, bias, group, sizes, pieces, (overlapped, backward))
    return linear(_whole(x, group, sizes), weight, bias)


def _schedule(
    x: Tensor,
    weight: Tensor,
    group: TPGroup,
    sizes: list[int] | None,
    overlap: str,
    chunks: int | Sequence[int] | None,
    out_features: int | None,
) -> tuple[Pieces, bool]:
    """The pieces of the forward, none for all tokens in one, and whether to overlap them."""
    if sizes is None or (overlap == "none" and chunks is None):
        return [], False
    choice = choose_column_parallel_linear(
        x, weight, group=group, sequence_sizes=sizes, overlap=overlap, out_features=out_features
    )
    # A rank's own number of columns may differ from the others'.
    width = None if out_features is None else -(-out_features // group.world_size)
    return plan_pieces(choice, x, group, sizes, chunks, width)
