"""``silu(gate) * up`` and its backward, one pass over memory each.

    forward    out = silu(gate) * up
    backward   grad_gate = grad * up * s * (1 + gate * (1 - s)),  grad_up = grad * gate * s,  s = sigmoid(gate)

``gate_up`` [..., 2 * I] holds gate and up side by side. All arithmetic is fp32, rounded once when stored. A program
takes a tile of rows x columns that gives each thread two 16-byte loads from every operand: with the 8 to 16 programs
that its registers let into a multiprocessor, several times the bytes in flight that memory needs. Nothing is reused, so
there is no loop and no shared memory. Every element is read, then written, by one thread only, so the gradient may
overwrite ``gate_up``.
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

__all__ = [
    "Config",
    "aot_cases",
    "candidates",
    "default_config",
    "rows_of",
    "silu_mul_backward",
    "silu_mul_forward",
    "swiglu_gradients",
]


@triton.jit
def swiglu_gradients(grad, gate, up):
    """``(grad_gate, grad_up, hidden)`` of ``hidden = silu(gate) * up``, all fp32."""
    s = tl.sigmoid(gate)
    act = gate * s
    return grad * up * (s + act * (1.0 - s)), grad * act, act * up


@triton.jit
def _forward_kernel(
    out_ptr,  # [M, N]
    gate_up_ptr,  # [M, 2 * N]
    m,
    n,
    out_stride,
    gate_up_stride,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    gate_at = gate_up_ptr + rows[:, None] * gate_up_stride + cols[None, :]
    if PDL:
        gdc_wait()
    gate = tl.load(gate_at, mask=mask, other=0.0)
    up = tl.load(gate_at + n, mask=mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
    gate = gate.to(tl.float32)
    out = gate * tl.sigmoid(gate) * up.to(tl.float32)
    tl.store(out_ptr + rows[:, None] * out_stride + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_gate_up_ptr,  # [M, 2 * N]
    grad_out_ptr,  # [M, N]
    gate_up_ptr,  # [M, 2 * N]
    hidden_ptr,  # [M, N] or None
    m,
    n,
    grad_gate_up_stride,
    grad_out_stride,
    gate_up_stride,
    hidden_stride,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    gate_at = gate_up_ptr + rows[:, None] * gate_up_stride + cols[None, :]
    if PDL:
        gdc_wait()
    grad = tl.load(grad_out_ptr + rows[:, None] * grad_out_stride + cols[None, :], mask=mask, other=0.0)
    gate = tl.load(gate_at, mask=mask, other=0.0)
    up = tl.load(gate_at + n, mask=mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
    grad_gate, grad_up, hidden = swiglu_gradients(grad.to(tl.float32), gate.to(tl.float32), up.to(tl.float32))
    dtype = grad_gate_up_ptr.dtype.element_ty
    grad_at = grad_gate_up_ptr + rows[:, None] * grad_gate_up_stride + cols[None, :]
    tl.store(grad_at, grad_gate.to(dtype), mask=mask)
    tl.store(grad_at + n, grad_up.to(dtype), mask=mask)
    if hidden_ptr is not None:
        hidden_at = hidden_ptr + rows[:, None] * hidden_stride + cols[None, :]
        tl.store(hidden_at, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


class Config(NamedTuple):
    """Tile of one program; ``rows * block_n`` is at least what its threads take at 16 bytes each."""

    rows: int
    block_n: int
    num_warps: int


# Elements of a tile and warps: 16 elements a thread where there is enough work for all multiprocessors, 8 below that.
_TILES = ((2048, 4), (1024, 4), (512, 2))


def _tile(elements: int, num_warps: int, n: int) -> Config:
    """The widest power of two up to ``elements`` that wastes at most an eighth of the last block of a row."""
    block = elements
    while block > 256 and -(-n // block) * block * 7 > n * 8:
        block //= 2
    return Config(elements // block, block, num_warps)


def default_config(info: GpuInfo, dtype: torch.dtype, m: int, n: int) -> Config:
    """The tile for ``m`` rows of width ``n``; smaller ones where there are too few programs to fill the GPU twice."""
    for elements, num_warps in _TILES:
        config = _tile(elements, num_warps, n)
        if _programs(config, m, n) >= 2 * info.num_sms:
            break
    return config


def candidates(info: GpuInfo, dtype: torch.dtype, m: int, n: int) -> list[Config]:
    """Tiles worth measuring, the default first."""
    found = [default_config(info, dtype, m, n)]
    for elements, num_warps in (*_TILES, (4096, 8), (4096, 4), (2048, 8)):
        config = _tile(elements, num_warps, n)
        if config not in found:
            found.append(config)
    return found


def _programs(config: Config, m: int, n: int) -> int:
    return -(-m // config.rows) * -(-n // config.block_n)


def rows_of(x: Tensor) -> Tensor:
    """``x`` [..., W] as rows [M, W] whose elements are adjacent: a view where the strides allow one, else a copy."""
    if x.dim() == 2:
        return x if x.stride(1) == 1 or x.size(1) == 1 else x.contiguous()
    width = x.size(-1)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(x.numel() // width if width else 0, width)


def _out_rows(x: Tensor, name: str) -> Tensor:
    rows = rows_of(x)
    if rows.data_ptr() != x.data_ptr():
        raise ValueError(f"{name} [{', '.join(map(str, x.shape))}] must have adjacent elements and evenly spaced rows")
    return rows


def silu_mul_forward(out: Tensor, gate_up: Tensor, config: Config | None = None) -> None:
    """``out = silu(gate) * up``.

    Args:
        out: [..., I], rows evenly spaced.
        gate_up: [..., 2 * I], the same dtype; rows may be strided.
        config: None takes :func:`default_config`.
    """
    out, gate_up = _out_rows(out, "out"), rows_of(gate_up)
    m, n = out.shape
    if m == 0 or n == 0:
        return
    info = gpu_of(out)
    if config is None:
        config = default_config(info, out.dtype, m, n)
    pdl = info.has_pdl and not INTERPRETED
    launch(
        _forward_kernel,
        (_programs(config, m, n),),
        out,
        gate_up,
        m,
        n,
        out.stride(0),
        gate_up.stride(0),
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        PDL=pdl,
        num_warps=config.num_warps,
        pdl=pdl,
    )


def silu_mul_backward(
    grad_gate_up: Tensor,
    grad_out: Tensor,
    gate_up: Tensor,
    hidden: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Gradient of ``silu(gate) * up`` with respect to ``gate_up``.

    Args:
        grad_gate_up: [..., 2 * I], written; may be ``gate_up`` itself, which is then overwritten.
        grad_out: [..., I].
        gate_up: [..., 2 * I].
        hidden: [..., I]; if given, ``silu(gate) * up`` is recomputed into it.
        config: None takes :func:`default_config`.
    """
    grad_gate_up, grad_out, gate_up = _out_rows(grad_gate_up, "grad_gate_up"), rows_of(grad_out), rows_of(gate_up)
    if hidden is not None:
        hidden = _out_rows(hidden, "hidden")
    m, n = grad_out.shape
    if m == 0 or n == 0:
        return
    info = gpu_of(grad_out)
    if config is None:
        config = default_config(info, grad_out.dtype, m, n)
    pdl = info.has_pdl and not INTERPRETED
    launch(
        _backward_kernel,
        (_programs(config, m, n),),
        grad_gate_up,
        grad_out,
        gate_up,
        hidden,
        m,
        n,
        grad_gate_up.stride(0),
        grad_out.stride(0),
        gate_up.stride(0),
        0 if hidden is None else hidden.stride(0),
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        PDL=pdl,
        num_warps=config.num_warps,
        pdl=pdl,
    )


def aot_cases() -> list[AotCase]:
    """A training shape, both directions, and one decode row."""

    def forward(m: int, n: int) -> None:
        silu_mul_forward(meta(m, n), meta(m, 2 * n))

    def backward(m: int, n: int) -> None:
        silu_mul_backward(meta(m, 2 * n), meta(m, n), meta(m, 2 * n), meta(m, n))

    return [
        AotCase("silu_mul forward 8192x3584", lambda: forward(8192, 3584), pdl=True, max_registers=128),
        AotCase("silu_mul forward 1x14336", lambda: forward(1, 14336), (90,), pdl=True, max_registers=128),
        AotCase("silu_mul backward 8192x3584", lambda: backward(8192, 3584), pdl=True, max_registers=128),
    ]
