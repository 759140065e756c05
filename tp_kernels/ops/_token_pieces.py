"""Projections beside the collectives of sequence parallelism: tokens in pieces, gathered before or scattered after.

A piece holds the same part of every rank's tokens, so that every rank sends and receives in each. Its rows lie rank by
rank, as the collectives want them. What the pieces are follows from numbers that all ranks share.

``gather_matmul`` starts all gathers at once and multiplies each piece as it arrives; ``matmul_scatter`` launches all
matmuls, and hands on each piece's sum as it arrives. Where a matmul reads or writes a part of every rank's tokens and
these lie at equal distances (one sequence, as many tokens on every rank), it is one batched call on the tokens where
they are; otherwise the rows are copied together, or apart. Overlapped or not it is the same calls on the same rows.

A rank's own tokens are at hand before anything was gathered, but are not multiplied ahead: that would leave two GEMMs
(the ranks before and those behind) where there is one, and its own rows seldom fill a wave. A table's ``growth`` above
1 makes the first piece small instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from tp_kernels.comm.communicator import Communicator, started_collectives
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._gpu import GpuInfo, autocast_dtype, gpu_of, on_gpu
from tp_kernels.ops._overlap_choice import agreement, planned_chunks
from tp_kernels.ops.tuning import Choice

__all__ = [
    "SEQUENCE_DIM",
    "Pieces",
    "check_chunks",
    "check_overlap",
    "gather_matmul",
    "matmul_scatter",
    "plan_pieces",
    "sequences",
    "token_pieces",
]

_OVERLAPS = ("auto", "none", "chunked")
# Tokens of sequence-parallel activations [..., sequence, hidden].
SEQUENCE_DIM = -2

# Per piece every rank's tokens ``[start, stop)``, counted from the rank's first.
Pieces = list[list[tuple[int, int]]]


# The pieces ----------------------------------------------------------------------------------------------------------


def token_pieces(sizes: Sequence[int], stops: Sequence[int]) -> Pieces:
    """Every rank's part of each piece, none of which is empty on all ranks.

    Args:
        sizes: tokens of every rank.
        stops: where each piece ends on the rank that has most tokens, the last one at its last. Other ranks' tokens are
            cut at the same places, so all but the last parts are equal where the sizes nearly are.
    """
    starts = [0, *stops]
    return [
        [(min(start, size), min(stop, size)) for size in sizes]
        for start, stop in zip(starts, stops, strict=False)
        if stop > start
    ]


@lru_cache(maxsize=1024)
def _planned_stops(
    longest: int,
    batch: int,
    n: int,
    dtype: torch.dtype,
    info: GpuInfo | None,
    num_sms: int,
    chunks: int,
    growth: float,
    alike: bool,
) -> list[int]:
    bounds = planned_chunks(batch * longest, n, dtype, info, num_sms, chunks, growth, alike)
    return [stop // batch for _, stop in bounds]


def check_overlap(overlap: str) -> None:
    """ValueError unless ``overlap`` is a way that the ops offer."""
    if overlap not in _OVERLAPS:
        raise ValueError(f"overlap must be one of {', '.join(_OVERLAPS)}, got {overlap!r}")


def check_chunks(chunks: int | Sequence[int] | None, x: Tensor, sizes: Sequence[int]) -> None:
    """ValueError unless ``chunks`` are what ``plan_pieces`` takes for ``x`` [..., tokens, K]."""
    if isinstance(chunks, Sequence):
        rows = sequences(x) * sum(sizes)
        if sum(chunks) != rows or (rows and min(chunks) < 1):
            raise ValueError(f"chunks must be positive numbers of rows that sum to {rows}, got {list(chunks)}")
    elif chunks is not None and (not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1):
        raise ValueError(f"chunks must be a positive int, numbers of rows or None, got {chunks!r}")


def plan_pieces(
    choice: Choice,
    x: Tensor,
    group: TPGroup,
    sizes: Sequence[int],
    chunks: int | Sequence[int] | None,
    n: int | None,
) -> tuple[Pieces, bool]:
    """The pieces of a call, and whether to overlap them; no pieces stand for all tokens in one. A collective at first.

    Args:
        choice: "chunked" or "none", with what the table says of chunks and growth.
        x: [..., tokens, K] of this rank.
        sizes: tokens of every rank.
        chunks: most pieces, or the rows of each, all ranks' tokens (times the leading dimensions) together; None: the
            choice's.
        n: columns of the result, the same number on all ranks; without it pieces are equal instead of whole waves.

    Raises:
        ValueError: a first chunked call inside a graph capture.
    """
    batch, longest, info = sequences(x), max(sizes), None
    rows = batch * sum(sizes)
    overlapped = choice.path == "chunked"
    if isinstance(chunks, Sequence):
        stops = [longest * stop // max(rows, 1) for stop in accumulate(chunks)]
    else:
        wanted = chunks or int(choice.config.get("chunks", 1))
        if wanted == 1 or rows == 0:
            return [], False
        found = agreement(group.communicator, x)
        if found is None:
            raise ValueError(
                "the first call with chunks= cannot be captured in a CUDA graph: call once before the capture"
            )
        if n is None:
            stops = [longest * (j + 1) // wanted for j in range(wanted)]
        else:
            info = gpu_of(x) if on_gpu(x) else None
            growth = float(choice.config.get("growth", 1.0)) if chunks is None else 1.0
            # All ranks' parts are rows beside one another: a row of tiles in each is one of world_size * n columns.
            width, dtype = group.world_size * n, autocast_dtype(x) or x.dtype
            stops = _planned_stops(longest, batch, width, dtype, info, found.num_sms, wanted, growth, found.same_tables)
    pieces = token_pieces(sizes, stops)
    return (pieces, overlapped) if len(pieces) > 1 else ([], False)


def sequences(x: Tensor) -> int:
    """How many sequences ``x`` [..., tokens, K] holds."""
    return x.shape[:-2].numel()


# Tokens in place -----------------------------------------------------------------------------------------------------


class _Tokens:
    """All ranks' tokens [..., S, width], of which pieces are taken or put, rank by rank."""

    def __init__(self, x: Tensor, sizes: Sequence[int]):
        self.x, self.starts = x, [0, *accumulate(sizes)]
        self.batch, self.width = sequences(x), x.shape[-1]
        even = self.batch == 1 and len(set(sizes)) == 1
        # [ranks, tokens of a rank, width]: a view, however the rows are strided.
        self.ranks = x.reshape(sum(sizes), self.width).unflatten(0, (len(sizes), sizes[0])) if even else None

    def parts(self, piece: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the piece, and where they belong: [..., part, width]."""
        at = 0
        for start, (a, b) in zip(self.starts, piece, strict=False):
            if b > a:
                yield slice(at, at + self.batch * (b - a)), self.x.narrow(SEQUENCE_DIM, start + a, b - a)
            at += self.batch * (b - a)

    def together(self, piece: Sequence[tuple[int, int]]) -> Tensor:
        """A copy of the piece's rows [rows, width]."""
        rows = self.x.new_empty(self.batch * sum(b - a for a, b in piece), self.width)
        for where, part in self.parts(piece):
            rows[where].view(part.shape).copy_(part)
        return rows

    def put(self, piece: Sequence[tuple[int, int]], rows: Tensor) -> None:
        """Overwrite the piece's tokens by ``rows`` [rows, width]."""
        if self.ranks is not None:
            a, b = piece[0]
            self.ranks[:, a:b] = rows.view(-1, b - a, self.width)
            return
        for where, part in self.parts(piece):
            part.copy_(rows[where].view(part.shape))


def _own(x: Tensor, part: tuple[int, int]) -> Tensor:
    """Rows of this rank's part of a piece."""
    a, b = part
    return x.narrow(SEQUENCE_DIM, a, b - a).reshape(sequences(x) * (b - a), x.shape[-1])


# With their collectives ----------------------------------------------------------------------------------------------


def gather_matmul(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    pieces: Pieces,
    communicator: Communicator,
    overlapped: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``all_gather(x) @ matrix + bias`` by pieces; no gradient is recorded.

    Args:
        x: [..., sizes[rank], K], this rank's tokens.
        matrix: [K, N], on whose dtype ``x`` agrees.
        bias: [N].
        sizes, pieces: tokens of every rank, and how they are cut.
        overlapped: multiply a piece while the next is gathered; otherwise one after the other.
        keep: return all ranks' tokens too, in their order.

    Returns:
        [..., S, N], and [..., S, K] or None.
    """
    lead, total, (k, n) = x.shape[:-2], sum(sizes), matrix.shape
    out = _Tokens(x.new_empty(*lead, total, n), sizes)
    whole = _Tokens(x.new_empty(*lead, total, k), sizes) if keep else None
    batch, rank = out.batch, communicator.rank
    counts = [[batch * (b - a) for a, b in piece] for piece in pieces]
    with started_collectives() as handles:
        if overlapped:
            for piece, rows in zip(pieces, counts, strict=True):
                handles.append(communicator.all_gather_async(_own(x, piece[rank]), dim=0, sizes=rows))
        for index, (piece, rows) in enumerate(zip(pieces, counts, strict=True)):
            if overlapped:
                gathered = handles[index].wait()
            else:
                gathered = communicator.all_gather(_own(x, piece[rank]), dim=0, sizes=rows)
            _multiply_into(out, piece, gathered, matrix, bias)
            if whole is not None:
                whole.put(piece, gathered)
    return out.x, None if whole is None else whole.x


def _multiply_into(
    out: _Tokens, piece: Sequence[tuple[int, int]], rows: Tensor, matrix: Tensor, bias: Tensor | None
) -> None:
    if out.ranks is None:
        out.put(piece, torch.mm(rows, matrix) if bias is None else torch.addmm(bias, rows, matrix))
        return
    a, b = piece[0]
    ranks, target = len(out.ranks), out.ranks[:, a:b]
    stacked, matrices = rows.view(ranks, b - a, -1), matrix.expand(ranks, *matrix.shape)
    if bias is None:
        torch.bmm(stacked, matrices, out=target)
    else:
        torch.baddbmm(bias.expand(target.shape), stacked, matrices, out=target)


def matmul_scatter(
    x: Tensor,
    matrix: Tensor,
    sizes: Sequence[int],
    pieces: Pieces,
    communicator: Communicator,
    overlapped: bool,
    arrived: Callable[[int, int, Tensor], object],
) -> None:
    """``reduce_scatter(x @ matrix)`` by pieces; no gradient is recorded.

    Args:
        x: [..., S, K], this rank's share of the features of all tokens.
        matrix: [K, N] in the dtype of ``x``.
        sizes, pieces: tokens of every rank, and how they are cut.
        overlapped: sum a piece while the next is multiplied; otherwise one after the other.
        arrived: called with ``(start, stop, sums)`` for this rank's tokens of each piece in turn, ``sums``
            [..., stop - start, N] being usable on the caller's stream.
    """
    tokens, n, rank = _Tokens(x, sizes), matrix.shape[1], communicator.rank
    lead, results = x.shape[:-2], []
    with started_collectives() as handles:
        for piece in pieces:
            partial = _multiply(tokens, piece, matrix)
            rows = [tokens.batch * (b - a) for a, b in piece]
            if overlapped:
                handles.append(communicator.reduce_scatter_async(partial, dim=0, sizes=rows))
            else:
                results.append(communicator.reduce_scatter(partial, dim=0, sizes=rows))
        for index, piece in enumerate(pieces):
            start, stop = piece[rank]
            sums = handles[index].wait() if overlapped else results[index]
            if stop > start:
                arrived(start, stop, sums.view(*lead, stop - start, n))


def _multiply(tokens: _Tokens, piece: Sequence[tuple[int, int]], matrix: Tensor) -> Tensor:
    if tokens.ranks is None:
        return torch.mm(tokens.together(piece), matrix)
    a, b = piece[0]
    ranks = len(tokens.ranks)
    return torch.bmm(tokens.ranks[:, a:b], matrix.expand(ranks, *matrix.shape)).view(ranks * (b - a), -1)
