"""Quantised weights written out in a floating-point dtype: ``out = weight * scale[:, None]``, rounded once.

One pass over memory: a 16-bit result is two bytes written for each one read. It feeds cuBLAS, which reads no weights of
one byte beside activations of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tp_kernels.ops._gpu import gpu_of
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch, meta
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2
from tp_kernels.ops.kernels.skinny_common import DTYPES, WEIGHT_DTYPES, to_fp32

__all__ = ["aot_cases", "dequantize"]

# Elements of a tile: 32 a thread.
_TILE, _WARPS = 4096, 4


@triton.jit
def _dequantize_kernel(
    out_ptr,  # [N, K], dense
    weight_ptr,  # [N, K]
    scale_ptr,  # fp32 [N]
    N,
    K,
    stride_weight,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = row[:, None]
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < N) & (columns < K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    weight = tl.load(
        weight_ptr + rows.to(tl.int64) * stride_weight + columns, mask=inside, other=0.0, eviction_policy="evict_first"
    )
    scale = tl.load(scale_ptr + row, mask=row < N, other=0.0)
    out = (to_fp32(weight) * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows.to(tl.int64) * K + columns, out, mask=inside)


def dequantize(out: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Write ``weight * scale[:, None]`` to ``out``.

    Args:
        out: [N, K] float16, bfloat16 or float32, contiguous.
        weight: [N, K] int8 or float8_e4m3fn, dense rows.
        scale: [N] float32, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    if weight.dim() != 2 or out.shape != weight.shape or scale.shape != weight.shape[:1]:
        shapes = [list(t.shape) for t in (out, weight, scale)]
        raise ValueError(f"expected out [N, K], weight [N, K] and scale [N], got {shapes}")
    if out.dtype not in DTYPES or weight.dtype not in WEIGHT_DTYPES or scale.dtype is not torch.float32:
        raise ValueError(
            f"expected a weight of {WEIGHT_DTYPES}, an fp32 scale and a result of {DTYPES}, "
            f"got {weight.dtype}, {scale.dtype} and {out.dtype}"
        )
    n, k = weight.shape
    if not out.is_contiguous() or not scale.is_contiguous() or (k > 1 and weight.stride(1) != 1):
        raise ValueError(f"expected dense operands, got strides {out.stride()}, {weight.stride()}, {scale.stride()}")
    block_k = min(next_power_of_2(k), 2048)
    block_n = max(_TILE // block_k, 1)
    pdl = gpu_of(out).has_pdl and not INTERPRETED
    launch(
        _dequantize_kernel,
        (cdiv(n, block_n), cdiv(k, block_k)),
        out,
        weight,
        scale,
        n,
        k,
        weight.stride(0),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PDL=pdl,
        num_warps=_WARPS,
        pdl=pdl,
    )


def aot_cases() -> list[AotCase]:
    """Both kinds of weights, and a width that is no multiple of a tile."""

    def case(kind: torch.dtype, to: torch.dtype, n: int, k: int) -> None:
        dequantize(meta(n, k, dtype=to), meta(n, k, dtype=kind), meta(n, dtype=torch.float32))

    int8, fp8 = WEIGHT_DTYPES
    return [
        AotCase("dequantize int8", lambda: case(int8, torch.bfloat16, 28672, 4096), pdl=True, max_registers=64),
        AotCase("dequantize fp8", lambda: case(fp8, torch.float16, 4096, 14336), (90,), pdl=True, max_registers=64),
        AotCase("dequantize ragged", lambda: case(int8, torch.float32, 100, 1001), (90,), wide_loads=None),
    ]
