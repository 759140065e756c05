"""Rows of a tensor as kernels address them: [..., H] seen as ``count`` rows whose starts follow at most two strides.

That covers every contiguous tensor, a slice of a wider row (one head group inside a fused qkv row, ``[..., heads, D]``)
and ``logits[:, :-1]`` without a copy; anything else is copied.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Rows", "row_starts", "rows_of"]


@triton.jit
def row_starts(rows, inner, outer, step):
    """Offsets of rows in elements, from ``Rows``: int64."""
    return (rows // inner).to(tl.int64) * outer + (rows % inner).to(tl.int64) * step


class Rows(NamedTuple):
    """Row ``r`` of ``tensors[i]`` starts ``(r // inner) * outer[i] + (r % inner) * step[i]`` elements in.

    ``tensors`` are the ones given, or copies of those that cannot be addressed so.
    """

    tensors: tuple[Tensor, ...]
    count: int
    inner: int
    outer: tuple[int, ...]
    step: tuple[int, ...]


def rows_of(*tensors: Tensor) -> Rows:
    """One row addressing for tensors [..., H] of one shape; tensors without a unit last stride are copied."""
    shape = tensors[0].shape
    width = shape[-1]
    count = tensors[0].numel() // width if width else 0
    if all(t.is_contiguous() for t in tensors):
        return Rows(tensors, count, 1, (width,) * len(tensors), (0,) * len(tensors))
    tensors = tuple(t if t.stride(-1) == 1 or width == 1 else t.contiguous() for t in tensors)
    levels = _levels(tensors)
    if len(levels) > 2:
        tensors = tuple(t.contiguous() for t in tensors)
        levels = _levels(tensors)
    if len(levels) < 2:
        outer = levels[0][1] if levels else (width,) * len(tensors)
        return Rows(tensors, count, 1, outer, (0,) * len(tensors))
    (_, outer), (inner, step) = levels
    return Rows(tensors, count, inner, outer, step)


def _levels(tensors: tuple[Tensor, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Extents and strides of the leading dimensions, outermost first, those merged that are one in every tensor."""
    levels: list[tuple[int, tuple[int, ...]]] = []
    for dim, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        strides = tuple(t.stride(dim) for t in tensors)
        if levels and all(above == size * here for above, here in zip(levels[-1][1], strides, strict=True)):
            levels[-1] = (levels[-1][0] * size, strides)
        else:
            levels.append((size, strides))
    return levels
