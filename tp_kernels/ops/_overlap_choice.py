"""Whether a projection runs beside its collective, and in which pieces: what the overlapped ops share.

A decision is a pure function of numbers that all ranks share and of tables that they compared (``agreement``), so the
ranks cannot disagree. Every op has a section of the tuning table for each kind of communicator (``overlap_table``),
written by ``tp-kernels bench overlap --tune``; what was not measured is not overlapped unless asked for.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from tp_kernels import one_gpu
from tp_kernels.comm.communicator import Communicator
from tp_kernels.comm.overlap import (
    SMALLEST_CHUNK,
    Agreement,
    agree,
    agreed,
    check_offered,
    chunk_bounds,
    offers_overlap,
    worth_overlapping,
)
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._gpu import GpuInfo, autocast_dtype, gpu_of, kernels_reason, on_gpu
from tp_kernels.ops._library import PLAIN_TYPES, watched
from tp_kernels.ops.tuning import Choice, cached_decision, fingerprint, lookup

__all__ = [
    "DEFAULT_CHUNKS",
    "OVERLAPPED_OPS",
    "agreement",
    "choose_overlap",
    "overlap_sizes",
    "overlap_table",
    "planned_chunks",
    "tables_fingerprint",
]

OVERLAPPED_OPS = ("linear_all_reduce", "linear_reduce_scatter", "column_parallel_linear")
# The one with a kernel that both multiplies and communicates.
_FUSED_OP = "linear_all_reduce"
# More chunks than this were never of use to anyone who published figures: every one costs a launch and a shorter
# message, and from the fourth on there is little left to hide.
DEFAULT_CHUNKS = 4


def overlap_table(backend: str, op: str = "linear_all_reduce") -> str:
    """Name of the tuning table's section for an op and a kind of communicator."""
    return f"{op}.{backend}"


def overlap_sizes(m: int, n: int, in_features: int, communicator: Communicator) -> dict[str, int]:
    """Sizes of an entry of that section. Those below 0 must be equal: they change what communication costs.

    Args:
        m: rows (tokens) of all ranks together.
        n, in_features: of the whole projection, not of a rank's part of it.
    """
    return {
        "m": m,
        "n": n,
        "in_features": in_features,
        "ranks": -communicator.world_size,
        "ranks_per_gpu": -one_gpu.ranks_on_this_gpu(),
        "max_ctas": -int(getattr(communicator, "max_ctas", None) or 0),
    }


@cached_decision
def _measured(op: str, info: GpuInfo, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]) -> Choice:
    entry = lookup(op, info, dtype, **dict(sizes))
    if entry is None:
        return Choice("none", f"not measured on {info.name} with these ranks; overlap may be slower than none")
    pays, reason = worth_overlapping(entry.path, entry.us)
    reason = f"{reason} ({entry.source})"
    return Choice(entry.path, reason, dict(entry.config)) if pays else Choice("none", reason)


def _tile(info: GpuInfo, dtype: torch.dtype) -> tuple[int, int]:
    """The tile that cuBLAS most likely takes for a large GEMM; an assumption about speed, not about results."""
    if dtype.itemsize > 2:
        return 128, 128
    return (128, 256) if info.has_tma else (128, 128)


def planned_chunks(
    m: int,
    n: int,
    dtype: torch.dtype,
    info: GpuInfo | None,
    num_sms: int,
    chunks: int,
    growth: float = 1.0,
    alike: bool = True,
) -> list[tuple[int, int]]:
    """Rows of every chunk: ``chunk_bounds`` with a tile of the GPU; on a CPU (``info`` None) a row is a wave.

    Without ``alike`` the ranks' GPUs may differ, and must not decide.
    """
    tile_m, tile_n = (1, max(n, 1)) if info is None else _tile(info, dtype) if alike else (128, 128)
    return chunk_bounds(m, n, num_sms, tile_m, tile_n, chunks, growth)


def tables_fingerprint(backend: str, info: GpuInfo) -> int:
    """A number below 2**32, equal on ranks whose tables say the same of every overlapped op."""
    prints = [fingerprint(overlap_table(backend, op), info) for op in OVERLAPPED_OPS]
    return zlib.crc32(repr(prints).encode())


def agreement(communicator: Communicator, x: Tensor) -> Agreement | None:
    """What the ranks agreed on; None where they have not yet, and cannot now because a graph is being captured."""
    found = agreed(communicator)
    if found is not None:
        return found
    if not on_gpu(x):
        return agree(communicator, 1, 0, x.device)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    info = gpu_of(x)
    return agree(communicator, info.num_sms, tables_fingerprint(communicator.backend, info), x.device)


def _fused_reason(op: str, x: Tensor, weight: Tensor, group: TPGroup, m: int, n: int) -> str | None:
    """Why ``op`` cannot be one kernel for these arguments, on a communicator that offers it; None if it can."""
    if op != _FUSED_OP:
        return f"{op} has no kernel that also communicates; {_FUSED_OP} has one"
    reason = kernels_reason(x)
    if reason is not None:
        return reason
    if watched() or type(weight) not in PLAIN_TYPES:
        return "traced code" if watched() else f"the weight is a {type(weight).__name__}"
    return group.communicator.linear_reason(m, n, autocast_dtype(x) or x.dtype)


def choose_overlap(
    op: str,
    x: Tensor,
    weight: Tensor,
    group: TPGroup,
    overlap: str,
    m: int,
    n: int,
    in_features: int | None,
) -> Choice:
    """What ``op`` does: "none" or a way to overlap, with its configuration, and why. A collective at first.

    Args:
        op: one of ``OVERLAPPED_OPS``.
        x, weight: its operands on this rank.
        overlap: "auto", "none", "chunked" (on every communicator), or "fused" where the group's offers it.
        m, n, in_features: as for ``overlap_sizes``; without ``in_features`` there is no automatic choice.

    Raises:
        ValueError: "fused" where it is not offered, or for what its kernel does not take; "chunked" for the first time
            inside a graph capture.
    """
    communicator = group.communicator
    if overlap == "none" or communicator.world_size == 1:
        return Choice("none", "requested" if overlap == "none" else "one rank has nobody to talk to")
    if overlap == "fused":
        check_offered("fused", group, x.device)
        reason = _fused_reason(op, x, weight, group, m, n)
        if reason is not None:
            raise ValueError(f'overlap="fused" cannot be had: {reason}')
        return Choice("fused", "requested")
    if overlap == "chunked":
        if agreement(communicator, x) is None:
            raise ValueError(
                'the first call with overlap="chunked" compares the ranks\' multiprocessors, which cannot be captured '
                "in a CUDA graph: call once before the capture"
            )
        return Choice("chunked", "requested", {"chunks": DEFAULT_CHUNKS})
    ways = [way for way in ("chunked", "fused") if offers_overlap(group, way) and (way == "chunked" or op == _FUSED_OP)]
    if not ways:
        return Choice("none", f"the {communicator.backend} communicator does not work beside the caller's stream")
    if not on_gpu(x):
        return Choice("none", f"the tensors are on {x.device.type}, where every core computes")
    if watched() or type(weight) not in PLAIN_TYPES:
        return Choice("none", "traced code" if watched() else f"the weight is a {type(weight).__name__}")
    if m <= SMALLEST_CHUNK:
        return Choice("none", f"{m} rows are a single row of tiles")
    if in_features is None:
        return Choice("none", "in_features is not given, and a rank's own share does not tell the others'")
    found = agreement(communicator, x)
    if found is None:
        return Choice("none", "the ranks have not compared their tables, and a CUDA graph is being captured")
    if not found.same_tables:
        return Choice("none", "the ranks' GPUs or tuning tables differ")
    sizes = tuple(overlap_sizes(m, n, in_features, communicator).items())
    choice = _measured(overlap_table(communicator.backend, op), gpu_of(x), autocast_dtype(x) or x.dtype, sizes)
    reason = None
    if choice.path != "none" and choice.path not in ways:
        reason = f"the {communicator.backend} communicator does not offer it"
    elif choice.path == "fused":
        reason = _fused_reason(op, x, weight, group, m, n)
    return choice if reason is None else Choice("none", f'"{choice.path}" was the fastest, but {reason}')
