"""SwiGLU up-projection in one GEMM: ``out = silu(x @ gate.T + b_gate) * (x @ up.T + b_up)``, rounded once.

The weight stays as it is stored, [2 * I, K] with gate rows above up rows. One descriptor sees it as [2, I, K], and a
block [2, BLOCK_N / 2, BLOCK_K] of it is, without moving anything, the [BLOCK_N, BLOCK_K] operand of one dot whose
accumulator holds gate and up of the same columns: they meet in the registers of one thread. Since the descriptor has
three dimensions, a ragged I is cut off for gate and up apart.

A throw-away kernel of this design on an H100, against the cuBLAS GEMM alone (no activation) in the same run: 763 to 684
TFLOP/s at 4096 x 14336 x 4096, 711 to 597 at 8192 x 7168 x 8192, 638 to 612 at 1024 x 3584 x 4096, 711 to 732 at 4096 x
3584 x 4096, each with another setting. Slower: two accumulators of 128 columns instead of one of 256 (711 and 667
TFLOP/s on the first and the last); gate and up rows interleaved one by one (64 scalar stores a thread, compiled).

The twin with pointers and two accumulators serves other GPUs and operands that no descriptor can address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.epilogue import silu
from tp_kernels.ops.kernels.launch import AotCase, launch, meta
from tp_kernels.ops.kernels.matmul import (
    Config,
    check_operands,
    fewest_waves,
    persistent_grid,
    shared_bytes,
    tile_of,
    tma_addressable,
)
from tp_kernels.ops.kernels.sizes import cdiv

__all__ = ["Config", "aot_cases", "candidates", "default_config", "swiglu_matmul"]

# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_tma(
    out_desc,  # [M, I]
    x_desc,  # [M, K]
    weight_desc,  # [2, I, K]
    bias_ptr,  # [2 * I] or None
    gate_desc,  # [M, I] or None: where to keep the gate,
    up_desc,  # and up
    M,
    I,  # noqa: E741
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_N // 2
    tiles_m, tiles_i, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(I, WIDTH), tl.cdiv(K, BLOCK_K)
    programs = tl.num_programs(0)
    # The epilogue counts tiles by itself, so that nothing of the prologue has to live through the flattened loop.
    done = tl.program_id(0) - programs
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_i, programs, flatten=FLATTEN):
        tile_m, tile_i = tile_of(tile, tiles_m, tiles_i, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            x = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            w = weight_desc.load([0, tile_i * WIDTH, step * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(x, w.T, acc)
        done += programs
        tile_m, tile_i = tile_of(done, tiles_m, tiles_i, GROUP_M)
        off_m, off_i = tile_m * BLOCK_M, tile_i * WIDTH
        gate, up = tl.split(acc.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1))
        if bias_ptr is not None:
            cols = off_i + tl.arange(0, WIDTH)
            gate += tl.load(bias_ptr + cols, mask=cols < I, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + I + cols, mask=cols < I, other=0.0).to(tl.float32)[None, :]
        if gate_desc is not None:
            gate_desc.store([off_m, off_i], gate.to(out_desc.dtype))
            up_desc.store([off_m, off_i], up.to(out_desc.dtype))
        out_desc.store([off_m, off_i], (silu(gate) * up).to(out_desc.dtype))


@triton.jit
def _swiglu_pointers(
    out_ptr,  # [M, I]
    x_ptr,  # [M, K]
    weight_ptr,  # [2 * I, K]
    bias_ptr,  # [2 * I] or None
    gate_up_ptr,  # [M, 2 * I] or None
    M,
    I,  # noqa: E741
    K,
    stride_out,  # between rows; columns are dense
    stride_x,
    stride_weight,
    stride_gate_up,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_N // 2
    tile_m, tile_i = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(I, WIDTH), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_i * WIDTH + tl.arange(0, WIDTH)
    ks = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one, and their results are not stored: no mask in the loop but that of K.
    x_at = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_x + ks[None, :]
    gate_rows = tl.minimum(cols, I - 1).to(tl.int64)
    gate_at = weight_ptr + gate_rows[None, :] * stride_weight + ks[:, None]
    up_at = weight_ptr + (gate_rows + I)[None, :] * stride_weight + ks[:, None]
    gate = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    up = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x, w_gate, w_up = tl.load(x_at), tl.load(gate_at), tl.load(up_at)
        else:
            inside = ks < K - start
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w_gate = tl.load(gate_at, mask=inside[:, None], other=0.0)
            w_up = tl.load(up_at, mask=inside[:, None], other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + cols, mask=cols < I, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + I + cols, mask=cols < I, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (cols < I)[None, :]
    rows = rows.to(tl.int64)[:, None]
    dtype = out_ptr.dtype.element_ty
    if gate_up_ptr is not None:
        saved = gate_up_ptr + rows * stride_gate_up + cols[None, :]
        tl.store(saved, gate.to(dtype), mask=mask)
        tl.store(saved + I, up.to(dtype), mask=mask)
    tl.store(out_ptr + rows * stride_out + cols[None, :], (silu(gate) * up).to(dtype), mask=mask)


# Configurations ------------------------------------------------------------------------------------------------------
# Config.block_n counts the rows of the weight, gate and up together: half as many columns of the result. A tile leaves
# in two halves by itself, so ``subtiles`` is 2 throughout.

_LARGE = (
    Config(128, 256, num_stages=4, subtiles=2),
    Config(128, 256, num_stages=3, subtiles=2, flatten=True),
    Config(128, 256, num_stages=3, subtiles=2, group_m=16),
    Config(128, 256, num_stages=4, subtiles=2, flatten=True),
    Config(128, 256, num_stages=3, subtiles=2, group_m=4, flatten=True),
    Config(128, 256, num_stages=3, subtiles=2, group_m=1, flatten=True),
    Config(128, 128, num_stages=4, subtiles=2),
    Config(128, 128, num_stages=5, subtiles=2, flatten=True),
)
_SMALL = (
    Config(64, 256, num_stages=4, num_warps=4, group_m=1, subtiles=2),
    Config(64, 128, num_stages=4, num_warps=4, group_m=1, subtiles=2),
    Config(64, 128, num_stages=6, num_warps=4, group_m=1, subtiles=2),
)
_POINTERS = (
    Config(128, 256, 32, num_stages=4, subtiles=2, tma=False),
    Config(128, 128, 64, num_stages=3, subtiles=2, tma=False),
    Config(64, 128, 64, num_warps=4, num_stages=3, subtiles=2, tma=False),
)
# Operands that cannot be loaded 16 bytes at a time.
_SCALAR = Config(64, 128, 64, num_warps=8, num_stages=2, subtiles=2, tma=False)
# Without tensor cores ("ieee"): small tiles, for tests.
_FP32 = Config(64, 64, 32, num_warps=4, num_stages=2, subtiles=2, tma=False)


def _fits(info: GpuInfo, config: Config) -> bool:
    # wgmma wants at least 64 of every dimension of a tile.
    return shared_bytes(config) <= info.max_shared and (config.block_k >= 64 or not info.hopper)


def candidates(info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int) -> list[Config]:
    """Configurations worth measuring for x [m, k] and weight [2 * n, k]; all fit the GPU's shared memory."""
    if dtype == torch.float32:
        return [_FP32]
    if info.has_tma:
        configs = _SMALL if m <= 64 else (*_LARGE[5:], *_SMALL) if m <= 512 else _LARGE
    else:
        configs = tuple(config for config in _POINTERS if config.block_m == 64 or m > 64)
    return [config for config in configs if _fits(info, config)]


def default_config(info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int, aligned: bool = True) -> Config:
    """A configuration that is right for every shape: tiles by the waves they make, the loop by the length of K.

    Args:
        info: the GPU.
        dtype: of the operands.
        m, n, k: x [m, k], weight [2 * n, k].
        aligned: whether all operands can be loaded 16 bytes at a time.
    """
    if dtype == torch.float32:
        return _FP32
    configs: list[Config] = []
    if aligned and info.has_tma:
        large = _LARGE[1] if k <= 2048 else _LARGE[0]
        configs = [large, _LARGE[6], *_SMALL[:2]] if m > 64 else list(_SMALL[:2])
    elif not aligned or n % 16 or k % 16:
        return _SCALAR  # Triton knows of a stride only whether it is a multiple of 16
    configs = [config for config in configs if _fits(info, config)]
    return fewest_waves(info, configs or [config for config in _POINTERS if _fits(info, config)], m, 2 * n)


# Launcher ------------------------------------------------------------------------------------------------------------


def swiglu_matmul(
    out: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    bias: Tensor | None = None,
    gate_up_out: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """``out = silu(x @ gate.T + b_gate) * (x @ up.T + b_up)``: fp32 inside, rounded once.

    Args:
        out: [M, I], must not overlap the operands.
        x: [M, K].
        w_gate_up: [2 * I, K], gate rows above up rows.
        bias: [2 * I].
        gate_up_out: [M, 2 * I], where gate and up are kept for the backward pass, rounded; None keeps nothing.
        config: None takes the default. One for TMA is replaced by the default for pointers where no descriptor can
            address the operands. All matrices have dense rows at any distance; fp16, bf16 or fp32.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    if w_gate_up.dim() != 2 or w_gate_up.shape[0] % 2:
        raise ValueError(f"expected w_gate_up [2 * I, K], got {list(w_gate_up.shape)}")
    n = w_gate_up.shape[0] // 2
    check_operands(out, x, w_gate_up, bias, n, {"gate_up_out": (gate_up_out, 2 * n)})
    m, k = x.shape
    if m == 0 or n == 0:
        return
    info = gpu_of(x)
    gate = up = None
    if gate_up_out is not None:
        gate, up = gate_up_out[:, :n], gate_up_out[:, n:]
    # Nothing to sum over is for the pointers, too: a descriptor has no empty dimensions.
    aligned = k > 0 and tma_addressable(out, x, w_gate_up, gate, up)
    if config is None or (config.tma and not (aligned and info.has_tma)):
        config = default_config(info, x.dtype, m, n, k, aligned)
    if not config.tma:
        if bias is not None and config.block_n * config.block_m >= 128 * 32 * config.num_warps:
            config = config._replace(block_n=config.block_n // 2)  # with 128 accumulators a thread it spilled (sm_80)
        launch(
            _swiglu_pointers,
            (cdiv(m, config.block_m) * cdiv(2 * n, config.block_n),),
            out,
            x,
            w_gate_up,
            bias,
            gate_up_out,
            m,
            n,
            k,
            out.stride(0),
            x.stride(0),
            w_gate_up.stride(0),
            0 if gate_up_out is None else gate_up_out.stride(0),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            EVEN_K=k % config.block_k == 0,
        )
        return
    stride, width = w_gate_up.stride(0), config.block_n // 2
    tile = [config.block_m, width]
    launch(
        _swiglu_tma,
        (persistent_grid(info, config, m, 2 * n),),
        TensorDescriptor(out, [m, n], [out.stride(0), 1], tile),
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [config.block_m, config.block_k]),
        TensorDescriptor(w_gate_up, [2, n, k], [n * stride, stride, 1], [2, width, config.block_k]),
        bias,
        None if gate is None else TensorDescriptor(gate, [m, n], [gate.stride(0), 1], tile),
        None if up is None else TensorDescriptor(up, [m, n], [up.stride(0), 1], tile),
        m,
        n,
        k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        # Both at once spilled 8 bytes in a flattened loop.
        FLATTEN=config.flatten and (bias is None or gate is None),
    )


# Compile checks ------------------------------------------------------------------------------------------------------


def _case(
    name: str, m: int, n: int, k: int, config: Config | None = None, bias: bool = False, save: bool = False, **expected
) -> AotCase:
    def call() -> None:
        extra = meta(2 * n) if bias else None, meta(m, 2 * n) if save else None
        swiglu_matmul(meta(m, n), meta(m, k), meta(2 * n, k), *extra, config)

    return AotCase(f"swiglu_matmul {name}", call, **expected)


def aot_cases() -> list[AotCase]:
    """Every kind of loop and epilogue, with the tiles that leave the fewest registers and the least shared memory."""
    hopper = {"capabilities": (90,), "wgmma": True, "tma": True}
    return [
        _case("128x256 deep, bias, saved", 4096, 14336, 4096, _LARGE[0], bias=True, save=True, **hopper),
        _case("128x256 flat, saved", 4096, 3584, 4096, _LARGE[1], save=True, **hopper),
        _case("128x256 deep flat", 1024, 3584, 4096, _LARGE[3], **hopper),
        _case("64x256 small", 64, 3584, 4096, _SMALL[0], **hopper),
        _case("default without TMA", 4096, 3584, 4096, save=True, capabilities=(80,)),
        _case("pointers, ragged", 300, 1376, 4112, _POINTERS[1], bias=True, save=True, wgmma=True, tma=False),
    ]
