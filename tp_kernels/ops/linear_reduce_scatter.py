"""Row-parallel projection, summed over the ranks and split by tokens: the output side of sequence parallelism.

    y = reduce_scatter(x @ weight.T, dim=-2) + bias
    with ``residual`` and ``norm_weight``: add_rms_norm(y, residual, norm_weight)

Shapes: ``x`` [..., S, K] for all tokens, ``weight`` [N, K], K this rank's share; ``bias`` [N]; ``residual`` and the
results [..., sizes[rank], N].

``overlap="chunked"`` works the tokens off in pieces, each of which holds the same part of every rank's tokens
(``_token_pieces``): while one is summed and scattered on the communicator's stream, the next is multiplied on the
caller's. All matmuls are launched before the first wait, because only they feed the communication; what follows then
runs piece by piece as the sums arrive (for one sequence, where a piece's tokens are rows next to one another).

Backward of a call in pieces: the gradient is gathered in the same pieces, and one is multiplied for the gradient of
``x`` while the next is gathered. The weight's gradient is one matmul after the last, when all rows are there, in the
tokens' order: partial results of the pieces would have to be summed in fp32, which takes more memory traffic than
putting the pieces next to one another.

Everything is joined to the caller's stream on return, so a CUDA graph can capture it. Numerics as for
``linear_all_reduce``: running at the same time changes no bits, fewer rows may. "auto" overlaps only what was measured
to be faster on the same kind of GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels.comm.functional import gather_from_sequence_parallel, reduce_scatter_to_sequence_parallel
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._gpu import under_autocast
from tp_kernels.ops._library import PLAIN_TYPES, needs_grad, watched
from tp_kernels.ops._overlap_choice import choose_overlap
from tp_kernels.ops._token_pieces import (
    SEQUENCE_DIM,
    Pieces,
    check_chunks,
    check_overlap,
    gather_matmul,
    matmul_scatter,
    plan_pieces,
    sequences,
)
from tp_kernels.ops.linear import check_linear, linear
from tp_kernels.ops.norm import add_rms_norm, add_rms_norm_by_rows, add_rms_norm_reference
from tp_kernels.ops.swiglu import as_rows
from tp_kernels.ops.tuning import Choice

__all__ = ["choose_linear_reduce_scatter", "linear_reduce_scatter", "linear_reduce_scatter_reference"]

_OP = "linear_reduce_scatter"


def linear_reduce_scatter_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int],
    group: Any = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch ``linear_reduce_scatter`` before the group's ``reduce_scatter``."""
    y = reduce_scatter_to_sequence_parallel(F.linear(x, weight), group, SEQUENCE_DIM, sizes)
    y = y if bias is None else y + bias
    if residual is None:
        return y
    return y + residual if norm_weight is None else add_rms_norm_reference(y, residual, norm_weight, eps)


# The choice ----------------------------------------------------------------------------------------------------------


def choose_linear_reduce_scatter(
    x: Tensor, weight: Tensor, *, group: Any = None, overlap: str = "auto", in_features: int | None = None
) -> Choice:
    """What ``linear_reduce_scatter`` does for these arguments: "chunked" or "none", and why. A collective at first."""
    group = resolve_group(group)
    if group.world_size > 1 and (watched() or type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES):
        kinds = sorted({type(tensor).__name__ for tensor in (x, weight) if type(tensor) not in PLAIN_TYPES})
        return Choice("none", "traced code" if watched() else f"an operand is a {', '.join(kinds)}")
    rows = x.shape[:-1].numel()  # the same on all ranks, also where this one has no features
    return choose_overlap(_OP, x, weight, group, overlap, rows, weight.shape[0], in_features)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    group: TPGroup,
    overlap: str,
    chunks: int | Sequence[int] | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
) -> None:
    check_overlap(overlap)
    if x.dim() < 2 or len(sizes) != group.world_size or sum(sizes) != x.shape[SEQUENCE_DIM] or min(sizes) < 0:
        raise ValueError(
            f"expected x [..., S, K] and {group.world_size} sizes that sum to S, got {list(x.shape)}, {list(sizes)}"
        )
    check_linear(x.narrow(SEQUENCE_DIM, 0, sizes[group.rank]), weight, bias, residual, None)
    if norm_weight is not None and residual is None:
        raise ValueError("norm_weight normalises the sum with a residual: expected one")
    if norm_weight is not None and norm_weight.shape != weight.shape[:1]:
        raise ValueError(f"expected a norm_weight [{weight.shape[0]}], got {list(norm_weight.shape)}")
    check_chunks(chunks, x, sizes)


def _schedule(
    x: Tensor,
    weight: Tensor,
    group: TPGroup,
    sizes: list[int],
    overlap: str,
    chunks: int | Sequence[int] | None,
    in_features: int | None,
) -> tuple[Pieces, bool]:
    """The pieces, none for all tokens in one, and whether to overlap them."""
    if group.world_size == 1 or (overlap == "none" and chunks is None):
        return [], False
    if watched() or type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES:
        return [], False
    choice = choose_linear_reduce_scatter(x, weight, group=group, overlap=overlap, in_features=in_features)
    return plan_pieces(choice, x, group, sizes, chunks, weight.shape[0])


# Carrying it out -----------------------------------------------------------------------------------------------------


def _scattered(x: Tensor, weight: Tensor, group: TPGroup, sizes: list[int], pieces: Pieces, overlapped: bool) -> Tensor:
    out = x.new_empty(*x.shape[:-2], sizes[group.rank], weight.shape[0])

    def put(start: int, stop: int, sums: Tensor) -> None:
        out.narrow(SEQUENCE_DIM, start, stop - start).copy_(sums)

    matmul_scatter(x, weight.t(), sizes, pieces, group.communicator, overlapped, put)
    return out


class _LinearReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: TPGroup, sizes: list[int], pieces: Pieces, overlapped: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = group, sizes, pieces, overlapped
        return _scattered(x, weight, group, sizes, pieces, overlapped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        group, sizes, pieces, overlapped = ctx.call
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x: Tensor | None = None
        if torch.is_grad_enabled() or not wants_x:
            # A graph of the backward itself is asked for, or there is nothing to do meanwhile: the composition.
            whole = gather_from_sequence_parallel(grad, group, SEQUENCE_DIM, sizes)
            if wants_x:
                grad_x = (as_rows(whole) @ weight).view(x.shape)
        else:
            grad_x, whole = gather_matmul(
                grad, weight, None, sizes, pieces, group.communicator, overlapped, keep=wants_weight
            )
        grad_weight = as_rows(whole).t() @ as_rows(x) if wants_weight else None
        return grad_x, grad_weight, None, None, None, None


def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int],
    group: Any = None,
    overlap: str = "auto",
    chunks: int | Sequence[int] | None = None,
    in_features: int | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """``reduce_scatter(x @ weight.T) + bias`` by tokens, then the residual and RMSNorm if given; differentiable.

    A collective. With gradients forward and backward are overlapped too; what follows the sum is done in one piece.

    Args:
        x: [..., S, K]: this rank's features of all tokens.
        weight: [N, K]: this rank's columns.
        bias: [N], added once, after the sum.
        sizes: tokens of every rank, summing to S.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        overlap: "auto" overlaps where that was measured to be faster; "none"; "chunked" always, also on communicators
            that work at once. In traced code and with tensor subclasses the tokens stay in one piece.
        chunks: most pieces of the tokens, or the number of rows of each, all ranks' together (nearly so where ranks
            hold unequal numbers); the same on all ranks. With "none" they are worked off one after the other, and the
            bits are those of "chunked". None: as measured, else 4 for "chunked" and 1 for "none".
        in_features: K of all ranks together; "auto" needs it to find a measurement that all ranks find.
        residual: [..., sizes[rank], N].
        norm_weight: [N], with ``residual``.
        eps: of the norm.

    Returns:
        [..., sizes[rank], N] in ``x.dtype``: the sum, with bias and residual if given; with ``norm_weight``
        ``(normed, sum)``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown overlap; a first chunked call inside
            a graph capture.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    sizes = list(sizes)
    _check(x, weight, bias, sizes, group, overlap, chunks, residual, norm_weight)
    x, weight = under_autocast(x, weight)
    pieces, overlapped = _schedule(x, weight, group, sizes, overlap, chunks, in_features)
    records = needs_grad(x, weight, bias, residual, norm_weight)
    alike = all(t is None or t.dtype == x.dtype for t in (bias, residual))
    if pieces and not records and alike and sequences(x) == 1 and sizes[group.rank] > 0:
        return _followed(x, weight, bias, group, sizes, pieces, overlapped, residual, norm_weight, eps)
    if pieces and records:
        y = _LinearReduceScatter.apply(x, weight, group, sizes, pieces, overlapped)
    elif pieces:
        y = _scattered(x, weight, group, sizes, pieces, overlapped)
    else:
        y = reduce_scatter_to_sequence_parallel(linear(x, weight), group, SEQUENCE_DIM, sizes)
    y = y if bias is None else y + bias
    if residual is None:
        return y
    return y + residual if norm_weight is None else add_rms_norm(y, residual, norm_weight, eps)


def _followed(x, weight, bias, group, sizes, pieces, overlapped, residual, norm_weight, eps):
    """The call in pieces with what follows the sum, piece by piece: one sequence, of which this rank has tokens."""
    n = weight.shape[0]
    shape = (*x.shape[:-2], sizes[group.rank], n)
    out, rows = x.new_empty(sizes[group.rank], n), None if residual is None else residual.reshape(-1, n)
    normalise: Callable[[slice], object] | None = None
    if norm_weight is not None:
        normalise, normed, summed = add_rms_norm_by_rows(out, rows, norm_weight, eps)

    def finish(start: int, stop: int, sums: Tensor) -> None:
        piece = slice(start, stop)
        sums, target, added = sums.view(-1, n), out[piece], None if rows is None or normalise else rows[piece]
        if bias is not None:
            torch.add(sums, bias, out=target)
            if added is not None:
                target.add_(added)
        elif added is not None:
            torch.add(sums, added, out=target)
        else:
            target.copy_(sums)
        if normalise is not None:
            normalise(piece)

    matmul_scatter(x, weight.t(), sizes, pieces, group.communicator, overlapped, finish)
    return out.view(shape) if norm_weight is None else (normed.view(shape), summed.view(shape))
