"""RMSNorm backward: one pass over the rows, with the weight's gradient and the gradient that arrives at the sum.

A fixed number of programs walk the rows. What makes such a kernel slow is a row's loads that wait for the row before;
here the loop's loads run ahead through asynchronous copies (``stages``), or, with ``stages=1``, through registers. Each
program keeps its share of the weight's gradient in fp32 and stores it once; a second kernel adds the shares in a fixed
order, so the same input gives the same bits on the same GPU.
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

__all__ = ["Config", "aot_cases", "candidates", "default_config", "rms_norm_backward", "takes"]

# Two or three rows and the weight's gradient are held at once: rows of 32 KB are what fits without spilling.
_ROW_BYTES = 32_768


@triton.jit
def _row_gradients(x, grad, weight, rstd, H: tl.constexpr):
    """fp32 gradients of the rows, and what each element adds to the weight's gradient."""
    x, grad = x.to(tl.float32), grad.to(tl.float32)
    scaled = grad * weight.to(tl.float32)
    mean = tl.sum(scaled * x, axis=1) * rstd / H
    return rstd[:, None] * (scaled - x * (rstd * mean)[:, None]), grad * (x * rstd[:, None])


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr,  # rows by (g_outer, g_step)
    x_ptr,  # rows by (x_outer, x_step): what was normalised
    weight_ptr,  # [H]
    rstd_ptr,  # [num_rows] fp32
    sum_grad_ptr,  # rows by (s_outer, s_step): the gradient that arrives at x + residual; or None
    dx_ptr,  # [num_rows, H]
    partial_ptr,  # [programs, H] fp32, or None
    num_rows,
    inner,
    g_outer,
    g_step,
    x_outer,
    x_step,
    s_outer,
    s_step,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_H)[None, :]
    col_mask = cols < H
    blocks = tl.cdiv(num_rows, BLOCK_M)
    if PDL:
        gdc_wait()
    weight_grad = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    if STAGES > 1:
        # The weight is loaded in the loop on purpose: it then comes through the same pipeline. Held in registers, the
        # kernel took 118 of them instead of 64 (H = 4096, 8 warps, Triton 3.6).
        for block in tl.range(program, blocks, programs, num_stages=STAGES):
            rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
            row_mask = rows < num_rows
            mask = col_mask if BLOCK_M == 1 else row_mask[:, None] & col_mask
            x = tl.load(x_ptr + row_starts(rows, inner, x_outer, x_step)[:, None] + cols, mask=mask, other=0.0)
            grad = tl.load(grad_ptr + row_starts(rows, inner, g_outer, g_step)[:, None] + cols, mask=mask, other=0.0)
            weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
            dx, dw = _row_gradients(x, grad, weight, rstd, H)
            weight_grad += dw
            if sum_grad_ptr is not None:
                at = row_starts(rows, inner, s_outer, s_step)[:, None] + cols
                dx += tl.load(sum_grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + rows.to(tl.int64)[:, None] * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0)
        rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < num_rows)[:, None] & col_mask
        x = tl.load(x_ptr + row_starts(rows, inner, x_outer, x_step)[:, None] + cols, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + row_starts(rows, inner, g_outer, g_step)[:, None] + cols, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        for block in range(program, blocks, programs):
            # The next rows are on their way while these are reduced.
            ahead = (block + programs) * BLOCK_M + tl.arange(0, BLOCK_M)
            next_mask = (ahead < num_rows)[:, None] & col_mask
            next_x = tl.load(
                x_ptr + row_starts(ahead, inner, x_outer, x_step)[:, None] + cols, mask=next_mask, other=0.0
            )
            next_grad = tl.load(
                grad_ptr + row_starts(ahead, inner, g_outer, g_step)[:, None] + cols, mask=next_mask, other=0.0
            )
            next_rstd = tl.load(rstd_ptr + ahead, mask=ahead < num_rows, other=0.0)
            rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = col_mask if BLOCK_M == 1 else (rows < num_rows)[:, None] & col_mask
            dx, dw = _row_gradients(x, grad, weight, rstd, H)
            weight_grad += dw
            if sum_grad_ptr is not None:
                at = row_starts(rows, inner, s_outer, s_step)[:, None] + cols
                dx += tl.load(sum_grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + rows.to(tl.int64)[:, None] * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            x, grad, rstd = next_x, next_grad, next_rstd
    if PDL:
        gdc_launch_dependents()
    if partial_ptr is not None:
        columns = tl.arange(0, BLOCK_H)
        at = partial_ptr + program.to(tl.int64) * H + columns
        tl.store(at, tl.sum(weight_grad, axis=0), mask=columns < H)


@triton.jit
def _column_sum_kernel(
    partial_ptr,  # [num_rows, H] fp32
    out_ptr,  # [H]
    num_rows,
    H,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    col_mask = cols < H
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    for start in range(0, num_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        at = partial_ptr + rows.to(tl.int64)[:, None] * H + cols[None, :]
        total += tl.load(at, mask=(rows < num_rows)[:, None] & col_mask[None, :], other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=col_mask)


class Config(NamedTuple):
    """Rows a program takes at a time, warps, programs a multiprocessor, rows in flight (1: through registers)."""

    block_m: int
    num_warps: int
    programs_per_sm: int
    stages: int


def takes(h: int, dtype: torch.dtype) -> bool:
    """Whether rows of ``h`` elements fit the backward kernel; ``dtype`` is the widest of the operands'."""
    return next_power_of_2(h) * dtype.itemsize <= _ROW_BYTES


def _shared_bytes(config: Config, h: int, itemsize: int, tensors: int) -> int:
    """At most: ``stages - 1`` buffers of every tensor's tile and the weight, or the final sum over a tile's rows."""
    block_h = next_power_of_2(h)
    buffers = (config.stages - 1) * (config.block_m * tensors + 1) * block_h * itemsize
    return max(buffers, 4 * config.block_m * block_h) + 2048


def _fits(info: GpuInfo, config: Config, h: int, itemsize: int, tensors: int, programs: int = 1) -> bool:
    return programs * _shared_bytes(config, h, itemsize, tensors) <= info.max_shared


def default_config(info: GpuInfo, dtype: torch.dtype, m: int, h: int, residual: int = 0) -> Config:
    """16 elements a thread in tiles of 4096 (two programs a multiprocessor) or 8192, 32 in one of 16384.

    Args:
        dtype: the widest of the operands'.
        m, h: rows and their length.
        residual: 1 if a gradient of the sum is added in.
    """
    block_h = next_power_of_2(h)
    block_m = max(min(4096 // block_h, 64), 1)
    tile = block_m * block_h
    config = Config(block_m, 16, 1, 3) if tile > 4096 else Config(block_m, max(tile // 512, 1), 2, 3)
    fits = _fits(info, config, h, dtype.itemsize, 2 + residual, config.programs_per_sm)
    return config if fits else config._replace(stages=2)


def candidates(info: GpuInfo, dtype: torch.dtype, m: int, h: int, residual: int = 0) -> list[Config]:
    """What is worth measuring: both ways to run ahead, fewer and more programs, other warps."""
    default = default_config(info, dtype, m, h, residual)
    found = [
        default._replace(stages=stages, programs_per_sm=programs)
        for stages in (3, 2, 1)
        for programs in ((1, 2, 4) if default.num_warps < 16 else (1,))
    ]
    if default.block_m > 1:
        found.append(default._replace(block_m=default.block_m // 2, num_warps=max(default.num_warps // 2, 1)))
    elif default.num_warps == 16:
        found += [Config(1, 8, 2, 3), Config(1, 8, 2, 2), Config(1, 32, 1, 2)]
    return [default, *(c for c in found if c != default and _fits(info, c, h, dtype.itemsize, 2 + residual))]


def rms_norm_backward(
    dx: Tensor,
    dweight: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    sum_grad: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Gradients of ``rms_norm``, or of ``add_rms_norm`` with respect to either summand.

    Args:
        dx: [..., H] contiguous.
        dweight: [H] contiguous, or None if it is not wanted.
        grad: [..., H], the gradient of the normalised rows.
        x: [..., H], what was normalised.
        weight: [H].
        rstd: [rows] fp32 from the forward.
        sum_grad: [..., H], the gradient of the sum, added to ``dx``; or None.
    """
    info, h = gpu_of(x), x.shape[-1]
    rows = rows_of(grad, x) if sum_grad is None else rows_of(grad, x, sum_grad)
    if rows.count == 0:
        if dweight is not None:
            dweight.zero_()
        return
    grad, x, sum_grad = (*rows.tensors, None)[:3]
    strides = [stride for pair in zip(rows.outer, rows.step, strict=True) for stride in pair]
    strides += [0] * (6 - len(strides))
    pdl = info.has_pdl and not INTERPRETED
    widest = max(grad.dtype, x.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    tensors = 2 + int(sum_grad is not None)
    # A table's configuration may be that of rows half as long.
    if config is None or not _fits(info, config, h, widest.itemsize, tensors):
        config = default_config(info, widest, rows.count, h, tensors - 2)
    # Registers for as many programs as a multiprocessor is meant to hold; the compiler alone would take a few too many.
    registers = min(65_536 // (32 * config.num_warps * config.programs_per_sm) // 8 * 8, 255)
    programs = min(config.programs_per_sm * info.num_sms, cdiv(rows.count, config.block_m))
    partial = None if dweight is None else torch.empty((programs, h), dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_backward_kernel,
        (programs,),
        grad,
        x,
        weight.contiguous(),
        rstd,
        sum_grad,
        dx,
        partial,
        rows.count,
        rows.inner,
        *strides,
        H=h,
        BLOCK_M=config.block_m,
        BLOCK_H=next_power_of_2(h),
        STAGES=config.stages,
        PDL=pdl,
        num_warps=config.num_warps,
        maxnreg=registers,
        pdl=pdl,
    )
    if partial is not None:
        options = {"BLOCK_M": 128, "BLOCK_H": 32, "PDL": pdl, "num_warps": 8}
        launch(_column_sum_kernel, (cdiv(h, 32),), partial, dweight, programs, h, **options, pdl=pdl)


def aot_cases() -> list[AotCase]:
    """Llama sizes, rows in registers, fp32, QK-norm on a slice of a qkv row."""

    def backward(m: int, h: int, sum_grad: bool, dtype: torch.dtype = torch.bfloat16, stages: int = 0) -> None:
        x, weight, rstd = meta(m, h, dtype=dtype), meta(h, dtype=dtype), meta(m, dtype=torch.float32)
        config = default_config(gpu_of(x), dtype, m, h, int(sum_grad))
        config = config._replace(stages=stages or config.stages)
        rms_norm_backward(x, weight, x, x, weight, rstd, x if sum_grad else None, config)

    def heads() -> None:
        x = meta(2, 512, 48 * 128)[..., : 40 * 128].view(2, 512, 40, 128)
        dx, rstd = meta(2, 512, 40, 128), meta(2 * 512 * 40, dtype=torch.float32)
        rms_norm_backward(dx, meta(128), dx, x, meta(128), rstd)

    return [
        AotCase("rms_norm_backward 8192x4096", lambda: backward(8192, 4096, True), pdl=True, max_registers=128),
        AotCase("rms_norm_backward registers", lambda: backward(8192, 4096, False, stages=1), (90,), max_registers=128),
        # Triton 3.8 spills 80 bytes here, Triton 3.6 none.
        AotCase("rms_norm_backward 4096x16384", lambda: backward(4096, 16384, True), (90,), max_spill_bytes=128),
        AotCase("rms_norm_backward fp32", lambda: backward(512, 8192, True, torch.float32), (90,), max_registers=128),
        AotCase("rms_norm_backward heads", heads, (90,), max_registers=128),
    ]
