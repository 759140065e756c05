"""Row-parallel projection, summed over the ranks and split by tokens: the output side of sequence parallelism.

    y = reduce_scatter(x @ weight.T, dim=-2)

Shapes: ``x`` [..., S, K] for all tokens, ``weight`` [N, K], K this rank's share; the result [..., sizes[rank], N].

``chunks`` above 1 works the tokens off in pieces, each of which holds the same part of every rank's tokens: while one
is summed and scattered on the communicator's stream, the next is multiplied on the caller's. To collect a piece its
rows are copied, and its result is copied into place. Numerics as for ``linear_all_reduce``: running at the same time
changes no bits, fewer rows may. Nobody has measured where this pays, so it is done on request only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tp_kernels.comm.communicator import Communicator, Handle, started_collectives
from tp_kernels.comm.functional import gather_from_sequence_parallel, reduce_scatter_to_sequence_parallel
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._gpu import under_autocast
from tp_kernels.ops._library import needs_grad
from tp_kernels.ops.linear import check_linear, linear

__all__ = ["linear_reduce_scatter", "token_pieces"]

_SEQUENCE_DIM = -2


def token_pieces(sizes: Sequence[int], chunks: int) -> list[list[tuple[int, int]]]:
    """Per chunk every rank's tokens ``[start, stop)``, counted from the rank's first: parts as equal as can be.

    Args:
        sizes: tokens of every rank.
        chunks: at least 1; no more than the tokens of the rank that has most.
    """
    chunks = max(1, min(chunks, max(sizes)))
    return [[(size * j // chunks, size * (j + 1) // chunks) for size in sizes] for j in range(chunks)]


def _run(
    x: Tensor, weight: Tensor, sizes: Sequence[int], chunks: int, communicator: Communicator, overlapped: bool
) -> Tensor:
    starts = [0, *accumulate(sizes)]
    out = x.new_empty(*x.shape[:-2], sizes[communicator.rank], weight.shape[0])
    pieces = token_pieces(sizes, chunks)
    with started_collectives() as started:
        for piece in pieces:
            rows = [
                x.narrow(_SEQUENCE_DIM, start + a, b - a) for start, (a, b) in zip(starts, piece, strict=False) if b > a
            ]
            partial = linear(torch.cat(rows, dim=_SEQUENCE_DIM), weight)
            counts = [b - a for a, b in piece]
            if overlapped:
                started.append(communicator.reduce_scatter_async(partial, dim=_SEQUENCE_DIM, sizes=counts))
            else:
                started.append(Handle(communicator.reduce_scatter(partial, dim=_SEQUENCE_DIM, sizes=counts)))
        for piece, handle in zip(pieces, started, strict=True):
            a, b = piece[communicator.rank]
            out.narrow(_SEQUENCE_DIM, a, b - a).copy_(handle.wait())
    return out


class _LinearReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: TPGroup, sizes: list[int], chunks: int, overlapped: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sizes = group, sizes
        return _run(x, weight, sizes, chunks, group.communicator, overlapped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n, k = weight.shape
        rows = gather_from_sequence_parallel(grad, ctx.group, _SEQUENCE_DIM, ctx.sizes).reshape(-1, n)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = (rows @ weight).view(x.shape) if wants_x else None
        return grad_x, rows.t() @ x.reshape(-1, k) if wants_weight else None, None, None, None, None


def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    *,
    sizes: Sequence[int],
    group: Any = None,
    overlap: str = "none",
    chunks: int | None = None,
) -> Tensor:
    """``reduce_scatter(x @ weight.T)`` by tokens; a collective, differentiable.

    Args:
        x: [..., S, K]: this rank's features of all tokens.
        weight: [N, K]: this rank's columns.
        sizes: tokens of every rank, summing to S.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        overlap: "none", or "chunked" to multiply one piece while another is summed.
        chunks: pieces, the same on all ranks; None is 2 for "chunked" and 1 for "none". The bits depend on it, not on
            ``overlap``.

    Returns:
        [..., sizes[rank], N].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown overlap.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    if overlap not in ("none", "chunked"):
        raise ValueError(f"overlap must be none or chunked, got {overlap!r}")
    check_linear(x, weight, None, None, None)
    sizes = list(sizes)
    if x.dim() < 2 or len(sizes) != group.world_size or sum(sizes) != x.shape[_SEQUENCE_DIM] or min(sizes) < 0:
        raise ValueError(
            f"expected x [..., S, K] and {group.world_size} sizes that sum to S, got {list(x.shape)}, {sizes}"
        )
    if chunks is not None and (not isinstance(chunks, int) or chunks < 1):
        raise ValueError(f"chunks must be a positive int or None, got {chunks!r}")
    chunks = chunks or (2 if overlap == "chunked" else 1)
    if chunks == 1 or group.world_size == 1 or x.numel() == 0:
        return reduce_scatter_to_sequence_parallel(linear(x, weight), group, _SEQUENCE_DIM, sizes)
    x, weight = under_autocast(x, weight)
    if needs_grad(x, weight):
        return _LinearReduceScatter.apply(x, weight, group, sizes, chunks, overlap == "chunked")
    return _run(x, weight, sizes, chunks, group.communicator, overlap == "chunked")
