"""Linear projections of few rows (up to 64) on tensor cores: ``out = activation(x @ weight.T + bias) + residual``, or
``silu(gate) * up + residual`` with gate and up rows one above the other in the weight.

The weights are the long side of the tensor core's tile, rows of x the short one, so up to 16 rows cost what one does.
Tiles come through shared memory by asynchronous copies, ``num_stages`` deep. Gated: gate and up rows of the same
columns of the result are one tile of the block.

How K is divided decides whether a small shard keeps enough blocks and bytes under way:

- ``k_groups`` above 1: every warp multiplies its own part of each K block, ``block_n`` is 16 or 32, and the warps' sums
  are added once, through shared memory. A narrow block has four or eight times as many weights in flight a row as one
  whose warps share K, and the chain of dependent multiplications is as much shorter. These tiles use ``mma.sync``.
- ``k_groups`` = 1: warps side by side along the weights' rows, ``wgmma`` on Hopper from ``block_n`` = 64 on. A
  throw-away kernel of this kind (64 x 128, 6 stages) read 2.86 TB/s at 16 x 28672 x 4096 on an H100 (cuBLAS 2.82) but
  1.5 TB/s at 1536 x 4096, where 24 blocks are too few.
- ``split_k`` above 1: K over blocks. Each writes its fp32 sums; the last to arrive adds all of them in the order of K
  (one launch, unlike a second kernel, and no memset: see ``counters``). That throw-away kernel had it too and
  was mostly faster without, so the default splits only what would leave half of the GPU without a block.

Weights of one byte are converted between shared memory and the tensor cores, in registers, which is cheap for the tiles
of ``mma.sync`` (3.3 instructions a weight in all). ``wgmma`` takes them from registers, too, and there Triton reads
them from shared memory two bytes at a time (6.9 instructions): the default beyond 16 rows only.

Programmatic dependent launch: with ``weights_ready`` the first ``prefetch`` columns of a block's weights are asked into
L2 before the wait for the previous kernel. Loading a first tile there instead would hold up the block until that tile
has arrived, because a tile for tensor cores goes on into shared memory at once.

Bits: the same for the same operands and configuration, always: sums are made in an order that does not depend on which
block arrives last. They do not depend on the other rows of x, but M chooses the configuration.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.counters import take_counters
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch
from tp_kernels.ops.kernels.sizes import next_power_of_2
from tp_kernels.ops.kernels.skinny_common import (
    WEIGHT_DTYPES,
    check_operands,
    fetch_into_l2,
    fetched_columns,
    finish,
    launch_case,
    to_dtype_of,
)

__all__ = ["Config", "aot_cases", "candidates", "default_config", "skinny_matmul"]


@triton.jit
def _store(
    sums,  # [GATES * BLOCK_N, BLOCK_M]
    out_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows,  # [GATES * BLOCK_N], of the weight
    n0,
    m0,
    M,
    N,
    stride_out,
    stride_residual,
    GATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Epilogue of one tile."""
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + rows)[:, None]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    if GATES == 2:
        gate, up = tl.split(tl.permute(tl.reshape(sums, [2, BLOCK_N, BLOCK_M]), (1, 2, 0)))
    else:
        gate, up = sums, sums
    n = (n0 + tl.arange(0, BLOCK_N))[:, None]
    m = (m0 + tl.arange(0, BLOCK_M))[None, :]
    stored = (n < N) & (m < M)
    residual = 0.0
    if residual_ptr is not None:
        at = residual_ptr + m.to(tl.int64) * stride_residual + n
        residual = tl.load(at, mask=stored, other=0.0).to(tl.float32)
    y = finish(gate, up, residual, GATES, ACTIVATION)
    tl.store(out_ptr + m.to(tl.int64) * stride_out + n, y.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _skinny_kernel(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    weight_ptr,  # [GATES * N, K]
    scale_ptr,  # fp32 [GATES * N], or None
    bias_ptr,  # [GATES * N] or None
    residual_ptr,  # [M, N] or None
    partial_ptr,  # fp32 [tiles, SPLIT_K, GATES * BLOCK_N, BLOCK_M], or None without a split
    counter_ptr,  # zeros, one a tile; zeros again afterwards
    M,
    N,
    K,
    stride_out,
    stride_x,
    stride_weight,
    stride_residual,
    GATES: tl.constexpr,  # 2: gate rows above up rows
    BLOCK_N: tl.constexpr,  # rows of each gate
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of one group
    K_GROUPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    WEIGHTS_READY: tl.constexpr,
):
    TILE: tl.constexpr = GATES * BLOCK_N
    STEP: tl.constexpr = K_GROUPS * BLOCK_K
    n0 = tl.program_id(0) * BLOCK_N
    m0 = tl.program_id(1) * BLOCK_M
    share = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(K, STEP), SPLIT_K)  # of each share
    k_begin = share * steps * STEP
    k_end = tl.minimum(K, k_begin + steps * STEP)
    if PDL:
        if WEIGHTS_READY and PREFETCH > 0:
            fetch_into_l2(weight_ptr, stride_weight, n0, N, k_begin, K, GATES, BLOCK_N, PREFETCH, THREADS)
        gdc_wait()
        gdc_launch_dependents()

    i = tl.arange(0, TILE)
    # Rows beyond the end read the last one again and are not stored.
    rows = (i // BLOCK_N) * N + tl.minimum(n0 + i % BLOCK_N, N - 1)
    m = m0 + tl.arange(0, BLOCK_M)
    if K_GROUPS == 1:
        columns = tl.arange(0, BLOCK_K)[None, :]
        weights = weight_ptr + rows.to(tl.int64)[:, None] * stride_weight + columns
        xs = x_ptr + m.to(tl.int64)[:, None] * stride_x + columns
        is_row = (m < M)[:, None]
        sums = tl.zeros([TILE, BLOCK_M], tl.float32)
    else:
        columns = (tl.arange(0, K_GROUPS) * BLOCK_K)[:, None, None] + tl.arange(0, BLOCK_K)[None, None, :]
        weights = weight_ptr + rows.to(tl.int64)[None, :, None] * stride_weight + columns
        xs = x_ptr + m.to(tl.int64)[None, :, None] * stride_x + columns
        is_row = (m < M)[None, :, None]
        sums = tl.zeros([K_GROUPS, TILE, BLOCK_M], tl.float32)

    for k in tl.range(k_begin, k_end, STEP, num_stages=STAGES):
        inside = columns + k < K
        weight = tl.load(weights + k, mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(xs + k, mask=is_row & inside, other=0.0, eviction_policy="evict_last")
        weight = to_dtype_of(weight, x)
        if K_GROUPS == 1:
            sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
        else:
            sums = tl.dot(weight, tl.permute(x, (0, 2, 1)), sums, input_precision="ieee")
    if K_GROUPS > 1:
        sums = tl.sum(sums, axis=0)

    if SPLIT_K == 1:
        _store(
            sums, out_ptr, scale_ptr, bias_ptr, residual_ptr, rows, n0, m0, M, N, stride_out, stride_residual,
            GATES, BLOCK_N, BLOCK_M, ACTIVATION,
        )  # fmt: skip
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        SIZE: tl.constexpr = TILE * BLOCK_M
        inner = i[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        partials = partial_ptr + tile.to(tl.int64) * (SPLIT_K * SIZE)
        tl.store(partials + share * SIZE + inner, sums)
        # All threads' stores, then the barrier, then one thread's release: what the barrier ordered before it is
        # published with it. The acquire of the last arrival reaches its other threads through the barrier that hands
        # them the number; L1, which might hold an older launch's sums, is passed by.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT_K - 1:
            # Every share has arrived, so the counter is free for the next launch.
            tl.store(counter_ptr + tile, 0)
            total = tl.load(partials + inner, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT_K):
                total += tl.load(partials + other * SIZE + inner, cache_modifier=".cg")
            _store(
                total, out_ptr, scale_ptr, bias_ptr, residual_ptr, rows, n0, m0, M, N, stride_out, stride_residual,
                GATES, BLOCK_N, BLOCK_M, ACTIVATION,
            )  # fmt: skip


# Launching -----------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """How the kernel is launched; all but ``split_k`` are powers of two.

    Args:
        block_n: rows of weights a block (of gates and of ups when gated), 16 or more.
        block_k: columns that one group of warps multiplies at a time.
        k_groups: groups of warps that divide each K block among them; 1 or ``num_warps``.
        split_k: blocks that divide K among them.
        num_warps, num_stages: as in Triton.
        prefetch: columns of weights asked into L2 before the wait for the previous kernel; only with
            ``weights_ready``.
    """

    block_n: int
    block_k: int
    k_groups: int = 1
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch: int = 0


def block_m(m: int, config: Config) -> int:
    """Rows of x a block: 8 suffice for ``mma.sync``, ``wgmma`` in Triton wants 16."""
    return min(max(next_power_of_2(m), 16 if config.k_groups == 1 else 8), 64)


def shared_bytes(config: Config, m: int, gated: bool, size: int, quantized: bool = False) -> int:
    """Shared memory of the copies under way, or of the groups' sums, for elements of ``size`` bytes; an upper bound.

    ``quantized``: those of the weights have one byte.
    """
    rows, width = config.block_n * (2 if gated else 1), block_m(m, config)
    step = config.k_groups * config.block_k
    # One stage is being multiplied, and only wgmma, which is asynchronous itself, needs it beside those under way.
    stages = config.num_stages - (1 if config.k_groups > 1 else 0)
    copies = stages * (rows * (1 if quantized else size) + width * size) * step
    return max(copies, config.k_groups * rows * width * 4) + 1024


def _usable(
    config: Config, info: GpuInfo, dtype: torch.dtype, m: int, k: int, gated: bool, quantized: bool
) -> bool:  # fmt: skip
    step = config.k_groups * config.block_k
    return (
        shared_bytes(config, m, gated, dtype.itemsize, quantized) <= info.max_shared
        and config.split_k * step <= max(k, step)
        and config.prefetch <= max(k // config.split_k, 1)
    )


def default_config(
    info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int, gated: bool = False, quantized: bool = False
) -> Config:
    """The configuration for operands that nobody measured.

    Args:
        info, dtype: as in every choice; tiles are chosen for the number of multiprocessors.
        m, n, k: rows of x, columns of the result, columns of the weight.
        gated: the weight has 2 * n rows.
        quantized: its elements have one byte. Beside them x weighs twice as much, and every block reads all of it from
            L2, so blocks are twice as wide.
    """
    gates = 2 if gated else 1
    rows, sms = gates * n, info.num_sms
    if quantized and m <= 16:
        block = 64 if 4 * rows >= 3 * 64 * sms else 32 if 4 * rows >= 3 * 32 * sms else 16
        config = Config(max(block // gates, 16), 64 if block == 64 else 128, 4, 1, 4, 4, 2048 if block == 16 else 1024)
    elif m <= 16 and rows < 128 * sms:
        # As wide as leaves most multiprocessors a block; few blocks have more stages each.
        if 4 * rows >= 3 * 32 * sms:
            config = Config(max(32 // gates, 16), 64, 4, 1, 4, 4, 1024)
        else:
            config = Config(16, 64, 4, 1, 4, 6 if 2 * rows >= 16 * sms else 8, 2048)
    else:
        block = (128 if quantized and 4 * rows >= 3 * 128 * sms else 64) // gates
        tiles = -(-n // block) * -(-m // 64)
        split = 1
        while 2 * tiles * split <= sms and 1024 * split < k:
            split *= 2
        # Rows that are not whole 16 bytes are loaded element by element, each with an address of its own.
        config = Config(block, 64 if k % 16 else 128, 1, split, 8 if block * gates == 128 else 4, 4, 512)
    while config.num_stages > 2 and shared_bytes(config, m, gated, dtype.itemsize, quantized) > info.max_shared:
        config = config._replace(num_stages=config.num_stages - 1)
    while config.prefetch > k // config.split_k:
        config = config._replace(prefetch=config.prefetch // 2)
    return config


def candidates(
    info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int, gated: bool = False, quantized: bool = False
) -> list[Config]:
    """Configurations worth measuring."""
    gates = 2 if gated else 1
    found = [default_config(info, dtype, m, n, k, gated, quantized)]
    if quantized:
        found += _QUANTIZED_FEW if m <= 16 else _QUANTIZED
    elif m <= 16:
        # The more rows a block has, the less of x it reads for them; the fewer, the more blocks there are.
        found += [
            Config(32, 64, 4, 1, 4, 4, 0),
            Config(32, 64, 4, 1, 4, 6, 1024),
            Config(16, 128, 4, 1, 4, 4, 2048),
            Config(16, 64, 8, 1, 8, 4, 2048),
            Config(32, 64, 8, 1, 8, 4, 1024),
            Config(32, 64, 4, 2, 4, 4, 512),
            Config(64, 64, 4, 1, 4, 3, 512),
            Config(64, 128, 1, 1, 4, 6, 0),
            Config(64, 128, 1, 1, 4, 6, 512),
            Config(64, 256, 1, 1, 4, 3, 512),
            Config(64, 128, 1, 4, 4, 4, 512),
        ]
    else:
        found += [
            Config(64, 64, 1, 1, 4, 6, 512),
            Config(64, 128, 1, 1, 4, 4, 0),
            Config(64, 128, 1, 1, 4, 6, 512),
            Config(64, 256, 1, 1, 4, 3, 512),
            Config(128, 64, 1, 1, 4, 6, 256),
            Config(64, 64, 1, 4, 4, 6, 256),
            Config(64, 128, 1, 2, 4, 4, 512),
            Config(64, 128, 1, 8, 4, 4, 256),
            Config(128, 64, 1, 8, 4, 6, 256),
            Config(32, 64, 4, 1, 4, 4, 1024),
            Config(32, 64, 4, 2, 4, 3, 512),
        ]
    tiles = [c._replace(block_n=max(c.block_n // gates, 16)) for c in found[1:]]
    usable = [c for c in dict.fromkeys(found[:1] + tiles) if _usable(c, info, dtype, m, k, gated, quantized)]
    return usable[:12]


# For weights of one byte, up to 16 rows and beyond.
_QUANTIZED_FEW = [
    Config(16, 64, 4, 1, 4, 6, 2048),
    Config(16, 128, 4, 1, 4, 6, 2048),
    Config(32, 64, 4, 1, 4, 4, 1024),
    Config(32, 128, 4, 1, 4, 4, 1024),
    Config(32, 64, 4, 2, 4, 4, 1024),
    Config(64, 64, 4, 1, 4, 4, 1024),
    Config(64, 64, 4, 2, 4, 4, 512),
    Config(64, 64, 8, 1, 8, 4, 1024),
    Config(64, 128, 1, 1, 4, 6, 1024),
    Config(64, 128, 1, 4, 4, 6, 512),
]
_QUANTIZED = [
    Config(64, 128, 1, 1, 4, 4, 1024),
    Config(64, 128, 1, 2, 4, 4, 512),
    Config(64, 128, 1, 4, 4, 4, 512),
    Config(64, 128, 1, 8, 4, 4, 256),
    Config(128, 128, 1, 1, 4, 3, 512),
    Config(128, 128, 1, 1, 8, 3, 512),
    Config(128, 128, 1, 2, 8, 3, 256),
    Config(128, 128, 1, 4, 8, 3, 256),
    Config(32, 64, 4, 1, 4, 3, 1024),
    Config(64, 64, 4, 1, 4, 3, 512),
    Config(64, 64, 4, 2, 4, 3, 512),
]


def skinny_matmul(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    config: Config | None = None,
    *,
    weights_ready: bool = False,
    scale: Tensor | None = None,
) -> None:
    """``activation(x @ weight.T + bias) + residual``, or the gated form; fp32 inside, rounded once.

    Args:
        out: [M, N], must not overlap the operands, except that it may be ``residual``.
        x: [M, K], dense rows at any distance from each other. Any M, made for at most 64: beyond, the weights are read
            once for every 64 rows.
        weight: [N, K]; [2 * N, K] when gated, gate rows above up rows. Dense rows.
        bias: [N] or [2 * N].
        residual: [M, N], dense rows.
        activation: None, "silu", "gelu", "gelu_tanh" or "relu"; None when gated.
        gated: ``silu(gate) * up`` of the two halves.
        config: None takes the default.
        weights_ready: no kernel that may still be running writes ``weight``, so it may be read before that one is
            waited for.
        scale: fp32 [N] or [2 * N], of a quantised weight; the fp32 sums are multiplied by it.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    m, n, k = check_operands(out, x, weight, bias, residual, activation, gated, scale)
    info = gpu_of(x)
    if config is None:
        config = default_config(info, x.dtype, m, n, k, gated, scale is not None)
    gates, width = 2 if gated else 1, block_m(m, config)
    blocks = -(-k // (config.k_groups * config.block_k))
    # No block without a share of K: every one would write sums and be waited for.
    split = -(-blocks // -(-blocks // min(config.split_k, max(blocks, 1)))) if blocks else 1
    grid = (-(-n // config.block_n), -(-m // width), split)
    tiles = grid[0] * grid[1]
    partial = counters = None
    if split > 1 and tiles:
        partial = x.new_empty(tiles * split * gates * config.block_n * width, dtype=torch.float32)
        counters = take_counters(x, tiles)
    pdl = info.has_pdl and not INTERPRETED
    threads = 32 * config.num_warps
    prefetch = config.prefetch if pdl and weights_ready else 0
    launch(
        _skinny_kernel,
        grid,
        out,
        x,
        weight,
        scale,
        bias,
        residual,
        partial,
        counters,
        m,
        n,
        k,
        out.stride(0),
        x.stride(0),
        weight.stride(0),
        residual.stride(0) if residual is not None else 0,
        GATES=gates,
        BLOCK_N=config.block_n,
        BLOCK_M=width,
        BLOCK_K=config.block_k,
        K_GROUPS=config.k_groups,
        SPLIT_K=split,
        STAGES=config.num_stages,
        PREFETCH=prefetch and fetched_columns(weight, gates * config.block_n, prefetch, threads),
        THREADS=threads,
        ACTIVATION=activation,
        PDL=pdl,
        WEIGHTS_READY=weights_ready,
        num_warps=config.num_warps,
        pdl=pdl,
    )


# Ahead-of-time check -------------------------------------------------------------------------------------------------


_case = partial(launch_case, "skinny", skinny_matmul)


def aot_cases() -> list[AotCase]:
    """Every kind of loop and epilogue."""
    hopper = {"capabilities": (90,)}
    everything = {"everything": True, **hopper}
    int8, fp8 = ({"weight_dtype": dtype} for dtype in WEIGHT_DTYPES)
    return [
        _case("16 rows, small shard", 16, 1536, 4096, wgmma=False, max_registers=128),
        _case("8 rows, gated, everything", 8, 3584, 4096, gated=True, wgmma=False, max_registers=128, **everything),
        _case("16 rows, large", 16, 28672, 4096, wgmma=True, max_registers=128, **hopper),
        _case("16 rows, groups and split", 16, 4096, 4096, Config(32, 64, 4, 2), wgmma=False, **everything),
        _case("64 rows, split, everything", 64, 1536, 4096, wgmma=True, max_registers=128, **everything),
        _case("64 rows, gated, split", 64, 1792, 4096, gated=True, wgmma=True),
        _case("33 rows, ragged", 33, 1001, 1001, wide_loads=None, **everything),
        _case("16 rows, int8", 16, 28672, 4096, wgmma=False, max_registers=128, **int8),
        _case("8 rows, int8, fp16", 8, 1536, 4096, wgmma=False, dtype=torch.float16, **int8, **everything),
        _case("16 rows, fp8, gated", 16, 3584, 4096, gated=True, wgmma=False, max_registers=128, **fp8, **hopper),
        _case("64 rows, int8", 64, 28672, 4096, wgmma=True, max_registers=168, **int8, **hopper),
        _case("64 rows, fp8, split", 64, 1536, 4096, wgmma=True, max_registers=168, **fp8, **everything),
    ]
