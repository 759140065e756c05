"""RMSNorm forward, alone and with the residual addition: one pass.

A row stays in registers between its sum of squares and its scaling, so the forward reads and writes every element once;
16-bit rows of 4096 are 32 elements a thread at four warps. Rows of at most 1024 elements (QK-norm) are taken several
at a time. Rows beyond ``ONE_PASS`` elements are read twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch, meta
from tp_kernels.ops.kernels.rows import row_starts, rows_of
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = ["ONE_PASS", "Config", "add_rms_norm", "aot_cases", "candidates", "default_config", "rms_norm"]

# Most elements of a row that is held in registers: 32 a thread at 16 warps.
ONE_PASS = 16_384


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # rows by (x_outer, x_step)
    residual_ptr,  # rows by (r_outer, r_step), or None
    weight_ptr,  # [H]
    out_ptr,  # [num_rows, H]
    sum_ptr,  # [num_rows, H]: x + residual; None without one
    rstd_ptr,  # [num_rows] fp32, or None
    num_rows,
    inner,
    x_outer,
    x_step,
    r_outer,
    r_step,
    eps,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_H)[None, :]
    col_mask = cols < H
    # With one row a program the grid is exact, and no row is out of range.
    mask = col_mask if BLOCK_M == 1 else (rows < num_rows)[:, None] & col_mask
    if WEIGHT_FIRST:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row_starts(rows, inner, x_outer, x_step)[:, None] + cols, mask=mask, other=0.0)
    out_at = rows.to(tl.int64)[:, None] * H + cols
    if residual_ptr is not None:
        residual_at = row_starts(rows, inner, r_outer, r_step)[:, None] + cols
        residual = tl.load(residual_ptr + residual_at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + out_at, x, mask=mask)
    if not WEIGHT_FIRST:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / H + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    normed = (wide * rstd[:, None]).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + out_at, (normed * weight.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _wide_rms_norm_kernel(
    x_ptr,  # as in _rms_norm_kernel; one row a program, read twice
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    rstd_ptr,
    inner,
    x_outer,
    x_step,
    r_outer,
    r_step,
    eps,
    H,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += row_starts(row, inner, x_outer, x_step)
    out_start = row.to(tl.int64) * H
    if residual_ptr is not None:
        residual_ptr += row_starts(row, inner, r_outer, r_step)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    squares = tl.zeros([BLOCK_H], dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        mask = cols < H
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + cols, mask=mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(sum_ptr + out_start + cols, x, mask=mask)
        wide = x.to(tl.float32)
        squares += wide * wide
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    # The sum is formed again from its operands: reading back what was stored above would need a barrier.
    for start in range(0, H, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        mask = cols < H
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + cols, mask=mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32)
        tl.store(out_ptr + out_start + cols, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)


class Config(NamedTuple):
    """Forward: rows a program (1 beyond 1024 elements a row) and warps."""

    block_m: int
    num_warps: int


def default_config(info: GpuInfo, dtype: torch.dtype, m: int, h: int) -> Config:
    """32 elements a thread; narrow rows in tiles of 4096 elements, fewer where that leaves multiprocessors idle."""
    block_h = next_power_of_2(h)
    if block_h > 1024:
        return Config(1, min(max(block_h // 1024, 4), 16))
    block_m = max(min(4096 // block_h, 64), 1)
    while block_m > 1 and cdiv(m, block_m) < info.num_sms:
        block_m //= 2
    return Config(block_m, min(max(block_m * block_h // 1024, 1), 4))


def candidates(info: GpuInfo, dtype: torch.dtype, m: int, h: int) -> list[Config]:
    """What is worth measuring."""
    block_h, default = next_power_of_2(h), default_config(info, dtype, m, h)
    if block_h > 1024:
        found = [Config(1, warps) for warps in (2, 4, 8, 16, 32) if 4 <= min(block_h, ONE_PASS) // (32 * warps) <= 64]
    else:
        tiles = {(rows, max(rows * block_h // 1024, 1)) for rows in (1, 4, 8, 16, 32, 64) if rows * block_h <= 8192}
        found = [Config(rows, warps) for rows, warps in sorted(tiles)]
        found += [Config(rows, 2 * warps) for rows, warps in sorted(tiles) if rows * block_h >= 64 * warps]
    return [default, *(config for config in found if config != default)]


def rms_norm(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    rstd: Tensor | None = None,
    config: Config | None = None,
    weight_ready: bool = False,
) -> None:
    """``out = weight * (x * rsqrt(mean(x^2) + eps)).to(x.dtype)``.

    Args:
        out: [..., H] contiguous, in any dtype.
        x: [..., H], any strides.
        weight: [H].
        rstd: [rows] fp32 to be filled for the backward, or None.
        weight_ready: the weight is no product of the kernel before this one and may be read ahead of it.
    """
    _forward(out, None, x, None, weight, eps, rstd, config, weight_ready)


def add_rms_norm(
    out: Tensor,
    summed: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    rstd: Tensor | None = None,
    config: Config | None = None,
    weight_ready: bool = False,
) -> None:
    """``rms_norm`` of ``x + residual``, which is also stored: ``summed`` [..., H] contiguous."""
    _forward(out, summed, x, residual, weight, eps, rstd, config, weight_ready)


def _forward(out, summed, x, residual, weight, eps, rstd, config, weight_ready) -> None:
    info, h = gpu_of(x), x.shape[-1]
    rows = rows_of(x) if residual is None else rows_of(x, residual)
    x, residual = (*rows.tensors, None)[:2]
    strides = [stride for pair in zip(rows.outer, rows.step, strict=True) for stride in pair]
    strides += [0] * (4 - len(strides))
    weight_ready = weight_ready and weight.is_contiguous()  # a copy of it is made by the kernel before this one
    weight = weight.contiguous()
    pdl = info.has_pdl and not INTERPRETED
    config = config or default_config(info, x.dtype, rows.count, h)
    tensors = x, residual, weight, out, summed, rstd
    if h > ONE_PASS:
        options = {"BLOCK_H": 1024 * config.num_warps, "PDL": pdl, "num_warps": config.num_warps}
        launch(_wide_rms_norm_kernel, (rows.count,), *tensors, rows.inner, *strides, float(eps), h, **options, pdl=pdl)
        return
    launch(
        _rms_norm_kernel,
        (cdiv(rows.count, config.block_m),),
        *tensors,
        rows.count,
        rows.inner,
        *strides,
        float(eps),
        H=h,
        BLOCK_M=config.block_m,
        BLOCK_H=next_power_of_2(h),
        WEIGHT_FIRST=weight_ready,
        PDL=pdl,
        num_warps=config.num_warps,
        pdl=pdl,
    )


def aot_cases() -> list[AotCase]:
    """Llama sizes, QK-norm on a slice of a qkv row, an odd size, a row beyond one pass."""

    def forward(m: int, h: int, weight_dtype: torch.dtype = torch.bfloat16, residual: bool = True) -> None:
        x, weight, rstd = meta(m, h), meta(h, dtype=weight_dtype), meta(m, dtype=torch.float32)
        out = meta(m, h, dtype=weight_dtype)
        if residual:
            add_rms_norm(out, x, x, x, weight, 1e-6, rstd)
        else:
            rms_norm(out, x, weight, 1e-6, weight_ready=True)

    def heads() -> None:
        x = meta(2, 512, 48 * 128)[..., : 40 * 128].view(2, 512, 40, 128)
        rms_norm(meta(2, 512, 40, 128), x, meta(128), 1e-6, meta(2 * 512 * 40, dtype=torch.float32))

    return [
        AotCase("rms_norm 1x4096", lambda: forward(1, 4096, residual=False), (90,), pdl=True, max_registers=96),
        AotCase("add_rms_norm 8192x4096", lambda: forward(8192, 4096), pdl=True, max_registers=96),
        AotCase("add_rms_norm 4096x16384 fp32 weight", lambda: forward(4096, 16384, torch.float32), (90,)),
        AotCase("rms_norm odd", lambda: forward(7, 577), (90,), wide_loads=False),
        AotCase("add_rms_norm 4x32768", lambda: forward(4, 32768), (90,), pdl=True),
        AotCase("rms_norm heads", heads, (90,), max_registers=96),
    ]
