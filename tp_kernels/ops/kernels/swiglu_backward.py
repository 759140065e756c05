"""Backward of ``silu(gate) * up`` inside the matmul that makes its gradient: the hidden gradient never reaches memory.

    grad   = grad_y @ w_down                                   [M, I], fp32, in registers only
    result = gradients of silu(gate) * up, and silu(gate) * up itself (for the gradient of w_down)

``grad_y`` [M, H]; ``w_down`` [H, I], read untransposed; ``gate_up`` [M, 2 * I], gate and up side by side. Beside the
matmul five tiles of M x I move, which cuBLAS followed by an elementwise kernel does with seven, the sixth and seventh
being the hidden gradient.

Hopper: TMA for every operand and result, wgmma; tiles of 128 x 128 with two programs to a multiprocessor (at most 128
registers and 113 KB each), so that one multiplies while the other is in its epilogue; tiles of 128 x 256 with one
persistent program halve the reads of ``grad_y``. The accumulator is cut in four along I, because gate, up and three
results beside a whole tile spill (2.9 KB at 128 x 256). Elsewhere, and for rows that TMA cannot address: pointers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_kernels.ops._gpu import A100, H100, GpuInfo, gpu_of
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch, meta
from tp_kernels.ops.kernels.matmul import tile_of, tma_addressable
from tp_kernels.ops.kernels.silu_mul import rows_of, swiglu_gradients

__all__ = ["Config", "aot_cases", "candidates", "default_config", "dswiglu_matmul"]


@triton.jit
def _halves(x):
    """Left and right half of a tile; register-local in the layout of an accumulator."""
    x = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def _in_layout_of(x, like):
    """``x``, but for the compiler its layout follows from that of ``like``; no instruction is left of it.

    Without it ``hidden``, which does not depend on the accumulator, was computed from its own reads of gate and up, in
    their layout: a second sigmoid, and spills.
    """
    zero = (like.to(tl.int32, bitcast=True) & 1) >> 1
    return (x.to(tl.int32, bitcast=True) | zero).to(tl.float32, bitcast=True)


@triton.jit
def _tma_epilogue(grad, row, col, gate_up_desc, grad_gate_up_desc, hidden_desc):
    gate, up = tl.split(tl.permute(gate_up_desc.load([row, 0, col]), (0, 2, 1)))
    gate = _in_layout_of(gate.to(tl.float32), grad)
    grad_gate, grad_up, hidden = swiglu_gradients(grad, gate, up.to(tl.float32))
    dtype = grad_gate_up_desc.dtype
    both = tl.join(grad_gate.to(dtype), grad_up.to(dtype))
    grad_gate_up_desc.store([row, 0, col], tl.permute(both, (0, 2, 1)))
    if hidden_desc is not None:
        hidden_desc.store([row, col], hidden.to(dtype))


@triton.jit
def _tma_parts(grad, row, col, gate_up_desc, grad_gate_up_desc, hidden_desc, PARTS: tl.constexpr):
    """The epilogue of a tile cut along I into 1, 2 or 4 parts."""
    if PARTS == 1:
        _tma_epilogue(grad, row, col, gate_up_desc, grad_gate_up_desc, hidden_desc)
    else:
        HALF: tl.constexpr = grad.shape[1] // 2
        left, right = _halves(grad)
        if PARTS == 2:
            _tma_epilogue(left, row, col, gate_up_desc, grad_gate_up_desc, hidden_desc)
            _tma_epilogue(right, row, col + HALF, gate_up_desc, grad_gate_up_desc, hidden_desc)
        else:
            p0, p1 = _halves(left)
            _tma_epilogue(p0, row, col, gate_up_desc, grad_gate_up_desc, hidden_desc)
            _tma_epilogue(p1, row, col + HALF // 2, gate_up_desc, grad_gate_up_desc, hidden_desc)
            p2, p3 = _halves(right)
            _tma_epilogue(p2, row, col + HALF, gate_up_desc, grad_gate_up_desc, hidden_desc)
            _tma_epilogue(p3, row, col + HALF + HALF // 2, gate_up_desc, grad_gate_up_desc, hidden_desc)


@triton.jit
def _tma_tile(
    tile,
    tiles_m,
    tiles_n,
    k,
    grad_y_desc,
    w_desc,
    gate_up_desc,
    grad_gate_up_desc,
    hidden_desc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(k, BLOCK_K)):
        a = grad_y_desc.load([row, step * BLOCK_K])
        b = w_desc.load([step * BLOCK_K, col])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SUBTILES == 8:
        left, right = _halves(acc)
        _tma_parts(left, row, col, gate_up_desc, grad_gate_up_desc, hidden_desc, 4)
        _tma_parts(right, row, col + BLOCK_N // 2, gate_up_desc, grad_gate_up_desc, hidden_desc, 4)
    else:
        _tma_parts(acc, row, col, gate_up_desc, grad_gate_up_desc, hidden_desc, SUBTILES)


@triton.jit
def _tma_kernel(
    grad_y_desc,  # [M, H], blocks of BLOCK_M x BLOCK_K
    w_desc,  # [H, I], blocks of BLOCK_K x BLOCK_N
    gate_up_desc,  # [M, 2, I], blocks of BLOCK_M x 2 x BLOCK_N / SUBTILES
    grad_gate_up_desc,  # the same
    hidden_desc,  # [M, I] in blocks of BLOCK_M x BLOCK_N / SUBTILES, or None
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    descs = (grad_y_desc, w_desc, gate_up_desc, grad_gate_up_desc, hidden_desc)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
            _tma_tile(tile, tiles_m, tiles_n, k, *descs, BLOCK_M, BLOCK_N, BLOCK_K, SUBTILES, GROUP_M, PRECISION)
    else:
        pid = tl.program_id(0)
        _tma_tile(pid, tiles_m, tiles_n, k, *descs, BLOCK_M, BLOCK_N, BLOCK_K, SUBTILES, GROUP_M, PRECISION)


@triton.jit
def _pointer_epilogue(
    grad,
    rows,
    cols,
    m,
    n,
    grad_gate_up_ptr,
    gate_up_ptr,
    hidden_ptr,
    grad_gate_up_stride,
    gate_up_stride,
    hidden_stride,
):
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    gate_at = gate_up_ptr + rows[:, None] * gate_up_stride + cols[None, :]
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + n, mask=mask, other=0.0).to(tl.float32)
    grad_gate, grad_up, hidden = swiglu_gradients(grad, gate, up)
    dtype = grad_gate_up_ptr.dtype.element_ty
    grad_at = grad_gate_up_ptr + rows[:, None] * grad_gate_up_stride + cols[None, :]
    tl.store(grad_at, grad_gate.to(dtype), mask=mask)
    tl.store(grad_at + n, grad_up.to(dtype), mask=mask)
    if hidden_ptr is not None:
        hidden_at = hidden_ptr + rows[:, None] * hidden_stride + cols[None, :]
        tl.store(hidden_at, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pointer_kernel(
    grad_gate_up_ptr,  # [M, 2 * I]
    hidden_ptr,  # [M, I] or None
    grad_y_ptr,  # [M, H]
    w_ptr,  # [H, I]
    gate_up_ptr,  # [M, 2 * I]
    m,
    n,
    k,
    grad_gate_up_stride,
    hidden_stride,
    grad_y_stride,
    w_stride,
    gate_up_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = tile_n * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    a_at = grad_y_ptr + rows[:, None] * grad_y_stride + ks[None, :]
    b_at = w_ptr + ks.to(tl.int64)[:, None] * w_stride + cols[None, :]
    b_step = tl.cast(w_stride, tl.int64) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, k, BLOCK_K):
        left = k - start
        a = tl.load(a_at, mask=(rows < m)[:, None] & (ks < left)[None, :], other=0.0)
        b = tl.load(b_at, mask=(ks < left)[:, None] & (cols < n)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_at += BLOCK_K
        b_at += b_step
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    part = col + tl.arange(0, WIDTH)
    outs, strides = (grad_gate_up_ptr, gate_up_ptr, hidden_ptr), (grad_gate_up_stride, gate_up_stride, hidden_stride)
    if SUBTILES == 1:
        _pointer_epilogue(acc, rows, part, m, n, *outs, *strides)
    else:
        p0, p1 = _halves(acc)
        if SUBTILES == 2:
            _pointer_epilogue(p0, rows, part, m, n, *outs, *strides)
            _pointer_epilogue(p1, rows, part + WIDTH, m, n, *outs, *strides)
        else:
            p2, p3 = _halves(p1)
            p0, p1 = _halves(p0)
            _pointer_epilogue(p0, rows, part, m, n, *outs, *strides)
            _pointer_epilogue(p1, rows, part + WIDTH, m, n, *outs, *strides)
            _pointer_epilogue(p2, rows, part + 2 * WIDTH, m, n, *outs, *strides)
            _pointer_epilogue(p3, rows, part + 3 * WIDTH, m, n, *outs, *strides)


class Config(NamedTuple):
    """One way to run the matmul.

    ``subtiles``: parts of a tile in the epilogue, along I. ``persistent``: one program a multiprocessor that walks over
    tiles; else a program a tile. ``tma`` False takes pointers, for which ``persistent`` and ``flatten`` mean nothing.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    subtiles: int
    group_m: int = 8
    persistent: bool = False
    flatten: bool = False
    tma: bool = True


def _pointer_config(info: GpuInfo, dtype: torch.dtype, m: int) -> Config:
    if dtype.itemsize > 2:
        return Config(64, 64, 32, 4, 2, 1, tma=False)
    block_m, num_warps = (128, 8) if m > 64 else (64, 4)
    if info.hopper:  # wgmma on slices of 32 was reported to read outside its shared memory (triton#11366)
        return Config(block_m, 128, 64, num_warps, 3, 4, tma=False)
    return Config(block_m, 128, 32, num_warps, 4, 2 if m > 64 else 4, tma=False)


def default_config(info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int, tma: bool | None = None) -> Config:
    """What runs where nothing was measured.

    Args:
        info: the GPU.
        dtype: of the operands.
        m, n, k: tokens, I, H.
        tma: whether the operands' rows can be addressed by TMA; None: as far as the sizes tell.
    """
    if tma is None:
        tma = info.has_tma and dtype.itemsize == 2 and n % 8 == 0 and k % 8 == 0
    if not tma:
        return _pointer_config(info, dtype, m)
    return Config(128, 128, 64, 8, 3, 4) if m > 64 else Config(64, 128, 64, 4, 3, 4)


def _fits(config: Config, info: GpuInfo, dtype: torch.dtype) -> bool:
    """By an upper bound of the shared memory that the compiler takes."""
    c = config
    ring = c.num_stages * (c.block_m + c.block_n) * c.block_k * dtype.itemsize
    part = c.block_m * c.block_n // c.subtiles * dtype.itemsize
    if not c.tma:
        return ring <= info.max_shared
    # Buffers of the stores live beside the ring in a persistent loop, that of the loads only in a flattened one.
    epilogue = (5 if c.flatten else 3 if c.persistent else 0) * part
    return max(ring + epilogue, 5 * part) + 1024 <= info.max_shared


def candidates(info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int) -> list[Config]:
    """Configurations worth measuring, the default first."""
    default = default_config(info, dtype, m, n, k)
    wide = Config(128, 256, 64, 8, 3, 8)
    if default.tma:
        found = [
            default,
            Config(128, 128, 64, 8, 3, 4, group_m=16),
            Config(128, 128, 64, 4, 3, 4),
            Config(128, 128, 64, 8, 4, 4, persistent=True, flatten=True),
            wide,
            wide._replace(num_stages=4),
            wide._replace(persistent=True),
            wide._replace(persistent=True, flatten=True),
            wide._replace(persistent=True, flatten=True, group_m=16),
            Config(64, 256, 64, 4, 3, 8),
        ]
    else:
        found = [
            default,
            Config(128, 128, 32, 8, 3, 4, tma=False),
            Config(128, 128, 64, 8, 3, 4, tma=False),
            Config(128, 256, 32, 8, 3, 4, tma=False),
            Config(64, 128, 32, 4, 4, 2, tma=False),
        ]
    deep = 64 if info.hopper else 32
    fitting = [
        c
        for c in found
        if c == default or (_fits(c, info, dtype) and c.block_m < 2 * max(m, 64) and (c.tma or c.block_k >= deep))
    ]
    return list(dict.fromkeys(fitting))


def dswiglu_matmul(
    grad_gate_up: Tensor,
    hidden: Tensor | None,
    grad_y: Tensor,
    w_down: Tensor,
    gate_up: Tensor,
    config: Config | None = None,
) -> None:
    """``grad_y @ w_down``, taken through the backward of ``silu(gate) * up`` before it is stored.

    Args:
        grad_gate_up: [M, 2 * I], written; may be ``gate_up`` itself, which is then overwritten.
        hidden: [M, I], written with ``silu(gate) * up``; or None.
        grad_y: [M, H].
        w_down: [H, I].
        gate_up: [M, 2 * I].
        config: None takes :func:`default_config`. TMA falls back to pointers for operands that it cannot address.
    """
    grad_y, w_down, gate_up = rows_of(grad_y), rows_of(w_down), rows_of(gate_up)
    (m, k), n = grad_y.shape, w_down.shape[1]
    for name, out in (("grad_gate_up", grad_gate_up), ("hidden", hidden)):
        if out is not None and out.stride(1) != 1 and out.shape[1] > 1:
            raise ValueError(f"{name} {list(out.shape)} must have adjacent elements in its rows")
    if m == 0 or n == 0:
        return
    info, dtype = gpu_of(grad_y), grad_y.dtype
    tma = info.has_tma and n % 8 == 0 and k > 0 and tma_addressable(grad_y, w_down, gate_up, grad_gate_up, hidden)
    if config is None:
        config = default_config(info, dtype, m, n, k, tma)
    elif config.tma and not tma:
        config = _pointer_config(info, dtype, m)
    pdl = info.has_pdl and not INTERPRETED
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    common = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SUBTILES": config.subtiles,
        "GROUP_M": config.group_m,
        "PRECISION": "ieee" if dtype is torch.float32 else None,
        "PDL": pdl,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "pdl": pdl,
    }
    if not config.tma:
        launch(
            _pointer_kernel,
            (tiles,),
            grad_gate_up,
            hidden,
            grad_y,
            w_down,
            gate_up,
            m,
            n,
            k,
            grad_gate_up.stride(0),
            0 if hidden is None else hidden.stride(0),
            grad_y.stride(0),
            w_down.stride(0),
            gate_up.stride(0),
            **common,
        )
        return
    part = config.block_n // config.subtiles

    def tiled(x: Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], list(block))

    def pair(x: Tensor) -> TensorDescriptor:
        return TensorDescriptor(x, [m, 2, n], [x.stride(0), n, 1], [config.block_m, 2, part])

    launch(
        _tma_kernel,
        (min(tiles, info.num_sms) if config.persistent else tiles,),
        tiled(grad_y, config.block_m, config.block_k),
        tiled(w_down, config.block_k, config.block_n),
        pair(gate_up),
        pair(grad_gate_up),
        None if hidden is None else tiled(hidden, config.block_m, part),
        m,
        n,
        k,
        PERSISTENT=config.persistent,
        FLATTEN=config.flatten,
        **common,
    )


def aot_cases() -> list[AotCase]:
    """The kinds of candidates at Llama-3-8B's sizes, and the pointers on both generations."""

    def run(config: Config | None, m: int = 4096, n: int = 14336, k: int = 4096) -> None:
        dswiglu_matmul(meta(m, 2 * n), meta(m, n), meta(m, k), meta(k, n), meta(m, 2 * n), config)

    kinds = {c._replace(group_m=8, num_stages=0): c for c in candidates(H100, torch.bfloat16, 4096, 14336, 4096)}
    cases = [
        AotCase(f"swiglu_backward {i}", lambda config=config: run(config), (90,), wgmma=True, tma=True, pdl=True)
        for i, config in enumerate(kinds.values())
    ]
    for info in (A100, H100):
        pointers = _pointer_config(info, torch.bfloat16, 4096)
        name = f"swiglu_backward pointers {info.slug}"
        cases.append(AotCase(name, lambda config=pointers: run(config), (10 * info.capability[0],), tma=False))
    return cases
