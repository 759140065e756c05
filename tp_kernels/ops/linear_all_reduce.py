"""Row-parallel projection, summed over the ranks, with what follows: a bias, or the residual addition and RMSNorm.

    y = sum over ranks of (x @ weight.T) + bias
    with ``residual`` and ``norm_weight``: add_rms_norm(y, residual, norm_weight)

Shapes: ``x`` [..., K], ``weight`` [N, K], K this rank's share; ``bias`` [N]; ``residual`` and the results [..., N].

``overlap="chunked"`` cuts the rows into chunks of whole waves (``comm.overlap``): while one is summed on the
communicator's stream, the next is multiplied on the caller's. All matmuls are launched before the first wait, because
only they feed the communication; what follows then runs chunk by chunk as the sums arrive. Everything is joined to the
caller's stream on return, so a CUDA graph can capture it.

``overlap="fused"`` is one kernel over peer memory that multiplies, sums and does what follows, tile by tile: what is
done crosses the links while the rest is multiplied (``SymmetricMemoryCommunicator.linear_all_reduce``). For many rows;
few are better served by a skinny matmul and a one-step all-reduce.

Numerics: partial sums are rounded to x's dtype, then summed as the communicator promises; "fused" in fp32 and rank
order, as all sums over peer memory. Running at the same time changes no bits: "chunked" gives exactly what "none" gives
with the same ``chunks``. Against "none" in one piece, a different number of rows lets cuBLAS take another kernel, and a
communicator with ``numerics.size_dependent`` (NCCL) another order of summation; the bits are equal where neither
happens, else they differ as between two batch sizes. "fused" always multiplies by our own kernel, of which "none" takes
one (or cuBLAS) as measured: their bits differ where these do.

Nothing is gained on a CPU, where every core computes, nor for few rows. "auto" overlaps only what was measured to be
faster on the same kind of GPU (``tp-kernels bench overlap --tune``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels.comm.communicator import Communicator, started_collectives
from tp_kernels.comm.functional import copy_to_tensor_parallel, reduce_from_tensor_parallel
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._gpu import autocast_dtype, gpu_of, on_gpu, under_autocast
from tp_kernels.ops._gpu_linear import matmul_by_rows
from tp_kernels.ops._library import PLAIN_TYPES, needs_grad, watched
from tp_kernels.ops._overlap_choice import agreement, choose_overlap, planned_chunks
from tp_kernels.ops.linear import check_linear, linear
from tp_kernels.ops.norm import add_rms_norm, add_rms_norm_by_rows, add_rms_norm_reference
from tp_kernels.ops.tuning import Choice

__all__ = [
    "OVERLAPS",
    "choose_linear_all_reduce",
    "linear_all_reduce",
    "linear_all_reduce_reference",
]

OVERLAPS = ("auto", "none", "chunked", "fused")
OP = "linear_all_reduce"
_PIECES = list[tuple[int, int]]


def linear_all_reduce_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch ``linear_all_reduce`` around the group's ``all_reduce``."""
    y = reduce_from_tensor_parallel(F.linear(x, weight), group)
    y = y if bias is None else y + bias
    if residual is None:
        return y
    return y + residual if norm_weight is None else add_rms_norm_reference(y, residual, norm_weight, eps)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, norm_weight: Tensor | None, overlap: str
) -> None:
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap must be one of {', '.join(OVERLAPS)}, got {overlap!r}")
    check_linear(x, weight, bias, residual, None)
    if norm_weight is not None and residual is None:
        raise ValueError("norm_weight normalises the sum with a residual: expected one")
    if norm_weight is not None and norm_weight.shape != weight.shape[:1]:
        raise ValueError(f"expected a norm_weight [{weight.shape[0]}], got {list(norm_weight.shape)}")


def _rows(x: Tensor) -> int:
    """The same on all ranks, also where this one has no features."""
    return x.shape[:-1].numel()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(_rows(x), x.shape[-1])


# The schedule --------------------------------------------------------------------------------------------------------


def choose_linear_all_reduce(
    x: Tensor, weight: Tensor, *, group: Any = None, overlap: str = "auto", in_features: int | None = None
) -> Choice:
    """What ``linear_all_reduce`` does for these arguments: "chunked", "fused" or "none", and why.

    A collective at first. ValueError for what was asked for and cannot be had.
    """
    group = resolve_group(group)
    return choose_overlap(OP, x, weight, group, overlap, _rows(x), weight.shape[0], in_features)


def _schedule(
    x: Tensor, weight: Tensor, group: TPGroup, overlap: str, chunks: int | Sequence[int] | None, in_features: int | None
) -> tuple[_PIECES, str]:
    """Rows of every chunk, and which way to overlap them."""
    m, n = _rows(x), weight.shape[0]
    if overlap == "fused" and chunks is not None:
        raise ValueError(f'chunks are for overlap="chunked" and "none"; "fused" goes tile by tile, got {chunks!r}')
    if isinstance(chunks, Sequence):
        if sum(chunks) != m or (m and min(chunks) < 1):
            raise ValueError(f"chunks must be positive numbers of rows that sum to {m}, got {list(chunks)}")
        stops = list(accumulate(chunks))
        if overlap == "auto":
            overlap = choose_linear_all_reduce(x, weight, group=group, in_features=in_features).path
        way = "chunked" if overlap == "chunked" and len(stops) > 1 else "none"
        return list(zip([0, *stops], stops, strict=False)), way
    if chunks is not None and (not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1):
        raise ValueError(f"chunks must be a positive int, numbers of rows or None, got {chunks!r}")
    choice = choose_linear_all_reduce(x, weight, group=group, overlap=overlap, in_features=in_features)
    wanted = chunks or int(choice.config.get("chunks", 1))
    if wanted == 1 or m == 0:
        whole = choice.path == "fused" and chunks is None and m > 0
        return [(0, m)] if m else [], "fused" if whole else "none"
    found = agreement(group.communicator, x)
    if found is None:
        raise ValueError("the first call with chunks= cannot be captured in a CUDA graph: call once before the capture")
    info, dtype = gpu_of(x) if on_gpu(x) else None, autocast_dtype(x) or x.dtype
    growth = float(choice.config.get("growth", 1.0)) if chunks is None else 1.0
    bounds = planned_chunks(m, n, dtype, info, found.num_sms, wanted, growth, alike=found.same_tables)
    return bounds, "chunked" if choice.path == "chunked" and len(bounds) > 1 else "none"


# Carrying it out -----------------------------------------------------------------------------------------------------


def _matmul_into(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], object]:
    """``launch(out, rows)``: ``rows @ weight.T`` into ``out``, planned for all rows of ``x`` [M, K]."""
    if type(weight) not in PLAIN_TYPES or type(x) not in PLAIN_TYPES:
        return lambda out, rows: out.copy_(F.linear(rows, weight))
    launch = matmul_by_rows(x, weight)
    if launch is not None:
        return launch
    transposed = weight.t()
    return lambda out, rows: torch.mm(rows, transposed, out=out)


def run_chunks(
    x: Tensor,
    weight: Tensor,
    bounds: _PIECES,
    communicator: Communicator,
    overlapped: bool,
    follow: Callable[[Tensor], Callable[[slice], object]] | None = None,
    kept: bool = True,
) -> Tensor:
    """The sum over ranks of ``x @ weight.T`` by chunks; no gradient is recorded.

    Args:
        x: [M, K] in the weight's dtype.
        weight: [N, K].
        bounds: rows of every chunk, the same on all ranks.
        overlapped: sum a chunk while the next is multiplied; otherwise one after the other.
        follow: given the result to come, a function of the rows whose sum is there.
        kept: the caller keeps the result; otherwise it may lie in a buffer of the communicator's (``get_buffer``), and
            is good until the next call.

    Returns:
        [M, N], usable on the caller's stream.
    """
    shape, out = (x.shape[0], weight.shape[0]), None
    get_buffer = None if kept or watched() else getattr(communicator, "get_buffer", None)
    if get_buffer is not None:
        out = get_buffer(shape, x.dtype)
    if out is None or out.device != x.device:
        out = x.new_empty(shape)
    matmul = _matmul_into(x, weight)
    after = None if follow is None else follow(out)
    with started_collectives() as handles:
        for start, stop in bounds:
            rows = out[start:stop]
            matmul(rows, x[start:stop])
            if overlapped:
                handles.append(communicator.all_reduce_async(rows, out=rows))
            else:
                communicator.all_reduce(rows, out=rows)
        for index, (start, stop) in enumerate(bounds):
            if overlapped:
                handles[index].wait()
            if after is not None:
                after(slice(start, stop))
    return out


class _LinearAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: TPGroup, bounds: _PIECES, way: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        if way == "fused":
            return group.communicator.linear_all_reduce(x, weight)
        out = run_chunks(_flat(x), weight.detach(), bounds, group.communicator, way == "chunked")
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = copy_to_tensor_parallel(grad, ctx.group).reshape(-1, weight.shape[0])
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = (rows @ weight).view(x.shape) if wants_x else None
        grad_weight = rows.t() @ _flat(x) if wants_weight else None
        return grad_x, grad_weight, None, None, None


def linear_all_reduce(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    overlap: str = "auto",
    chunks: int | Sequence[int] | None = None,
    in_features: int | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """``all_reduce(x @ weight.T) + bias``, then the residual and RMSNorm if given; a collective, differentiable.

    With gradients the forward is overlapped too; what follows the sum is then done in one piece.

    Args:
        x: [..., K]: this rank's features; as many rows on every rank.
        weight: [N, K]: this rank's columns.
        bias: [N], added once, after the sum.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        overlap: "auto" overlaps where that was measured to be faster; "none"; "chunked" always, also on communicators
            that work at once; "fused" where the communicator has a kernel for it (``overlap_modes``).
        chunks: most pieces of the rows, or the number of rows of each; the same on all ranks. With "none" they are
            worked off one after the other, and the bits are those of "chunked". None: as measured, else 4 for "chunked"
            and 1 for "none".
        in_features: K of all ranks together; "auto" needs it to find a measurement that all ranks find.
        residual: [..., N].
        norm_weight: [N], with ``residual``.
        eps: of the norm.

    Returns:
        [..., N] in ``x.dtype``: the sum, with bias and residual if given; with ``norm_weight`` ``(normed, sum)``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown overlap; "fused" where it is not
            offered, or for what its kernel does not take; a first chunked call inside a graph capture.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    _check(x, weight, bias, residual, norm_weight, overlap)
    x, weight = under_autocast(x, weight)
    bounds, way = _schedule(x, weight, group, overlap, chunks, in_features)
    pieces = group.world_size > 1 and (len(bounds) > 1 or way == "fused")
    records = needs_grad(x, weight, bias, residual, norm_weight)
    joined = pieces and not records and all(t is None or t.dtype == x.dtype for t in (bias, residual))
    if joined and way == "fused":
        return _fused(x, weight, bias, group, residual, norm_weight, eps)
    if joined:
        return _followed(x, weight, bias, group, bounds, way == "chunked", residual, norm_weight, eps)
    if pieces and records:
        y = _LinearAllReduce.apply(x, weight, group, bounds, way)
    elif way == "fused":
        y = group.communicator.linear_all_reduce(x, weight)
    elif pieces:
        y = run_chunks(_flat(x), weight, bounds, group.communicator, way == "chunked")
        y = y.view(*x.shape[:-1], weight.shape[0])
    else:
        y = reduce_from_tensor_parallel(linear(x, weight), group, inplace=True)
    y = y if bias is None else y + bias
    if residual is None:
        return y
    return y + residual if norm_weight is None else add_rms_norm(y, residual, norm_weight, eps)


def _fused(x, weight, bias, group, residual, norm_weight, eps):
    """Everything in one kernel, but for a norm that it does not take."""
    communicator = group.communicator
    if norm_weight is None:
        return communicator.linear_all_reduce(x, weight, bias=bias, residual=residual)
    if norm_weight.dtype == x.dtype and communicator.fuses_norm(weight.shape[0], x.dtype):
        follows = {"bias": bias, "residual": residual, "norm_weight": norm_weight, "eps": eps}
        return communicator.linear_all_reduce(x, weight, **follows)
    return add_rms_norm(communicator.linear_all_reduce(x, weight, bias=bias), residual, norm_weight, eps)


def _followed(x, weight, bias, group, bounds, overlapped, residual, norm_weight, eps):
    """The chunked call with what follows the sum, chunk by chunk."""
    n = weight.shape[0]
    shape = (*x.shape[:-1], n)
    rows = None if residual is None else residual.reshape(-1, n)
    results: list[Tensor] = []

    def follow(out: Tensor) -> Callable[[slice], object]:
        if norm_weight is not None:
            normalise, *both = add_rms_norm_by_rows(out, rows, norm_weight, eps)
            results.extend(both)

        def finish(chunk: slice) -> None:
            if bias is not None:
                out[chunk].add_(bias)
            if norm_weight is not None:
                normalise(chunk)
            elif rows is not None:
                out[chunk].add_(rows[chunk])

        return finish

    kept = norm_weight is None
    out = run_chunks(_flat(x), weight, bounds, group.communicator, overlapped, follow, kept)
    if norm_weight is None:
        return out.view(shape)
    normed, summed = results
    return normed.view(shape), summed.view(shape)
