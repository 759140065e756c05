"""Linear projections of one to eight rows on the FMA units: ``out = activation(x @ weight.T + bias) + residual``, or
``silu(gate) * up + residual`` with gate and up rows one above the other in the weight.

Nothing but the weights counts at these sizes, so the design is about bytes in flight. A block owns a few rows of the
weights; its threads lie along K, load 16 bytes each, and keep one fp32 sum for every (row of x, row of weight), which
are added across threads once, at the end. Products of 16-bit numbers are exact in fp32. Blocks are many and small (nine
of 8 KiB a tile fit on a multiprocessor for one row), so the loads of some are under way while others add.

- No software prefetch into registers: the loop-carried weights are halves of registers by the time the loop closes, so
  the compiler waits for the "next" tile at the end of every iteration, and the tile costs twice the registers. A tile
  twice as large does the same for less.
- ``num_stages`` above 1 copies the tiles behind the first asynchronously through shared memory, which keeps loads under
  way beside the 32 sums a thread that eight rows need.
- No split of K over blocks: the threads of one block already split it, and ``N / block_n`` blocks fill the GPU from a
  few hundred rows of weights on. So there is no workspace and no second pass.
- Programmatic dependent launch: with ``weights_ready`` the first tile (of a small shard: half of it) is loaded before
  the wait for the previous kernel; ``prefetch`` columns behind it can be asked into L2.
- Weights of one byte: 16 of them a thread and load, converted to fp32 in registers, some two instructions each (see
  ``skinny_common``). x comes in two loads of half as many columns, to match.
- A norm in front: every block reads all of x anyway, so it sums up the squares, too, and multiplies x by the norm's
  weight; 1/rms is a factor of the sums.

A throw-away kernel of this kind read 2.37 to 3.10 TB/s of 16-bit weights at one row on an H100, 1.1x to 1.9x cuBLAS,
and gained the more from early loads the smaller the shard was (1536 x 4096: 2.02 to 2.68 TB/s).

Bits: the same for the same operands and configuration, always. They do not depend on the other rows of x, but M chooses
the configuration and how the sums are compiled, so the same row may differ in the last bit between different M.
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
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch
from tp_kernels.ops.kernels.sizes import next_power_of_2
from tp_kernels.ops.kernels.skinny_common import (
    WEIGHT_DTYPES,
    check_operands,
    fetch_into_l2,
    fetched_columns,
    finish,
    launch_case,
    to_fp32,
)

__all__ = ["MAX_ROWS", "Config", "aot_cases", "candidates", "default_config", "gemv"]

# Eight sums for each of four rows of weights fill half of the registers; beyond, tensor cores are the right tool.
MAX_ROWS = 8


@triton.jit
def _dot(x, weight, VECTOR: tl.constexpr, THREADS: tl.constexpr):
    """Sums [ROWS, TILE, THREADS] of the products that one thread holds of x [ROWS, 1, K] and weight [1, TILE, K].

    A thread holds VECTOR neighbours every VECTOR * THREADS columns, so both sums stay within it.
    """
    products = x.to(tl.float32) * to_fp32(weight)
    ROWS: tl.constexpr = products.shape[0]
    TILE: tl.constexpr = products.shape[1]
    REPEATS: tl.constexpr = products.shape[2] // (VECTOR * THREADS)
    products = tl.reshape(products, [ROWS, TILE, REPEATS, THREADS, VECTOR])
    return tl.sum(tl.sum(products, axis=4), axis=2)


@triton.jit
def _tile(
    weight,  # [1, TILE, BLOCK_K]
    x,  # pointers [ROWS, 1, 1]
    norm_ptr,
    is_row,
    k,
    K,
    VECTOR: tl.constexpr,
    ALONG_K: tl.constexpr,
    PIECES: tl.constexpr,
    NORM: tl.constexpr,
):
    """Load x (and the norm's weight) for one tile of the weights: sums of their products, and of x's squares.

    16 bytes hold twice as many one-byte weights as numbers of x, so with loads of 16 bytes a thread would have other
    columns of x than of the weights. Instead of moving x through shared memory, the halves of what a thread holds of
    the weights meet x one after the other: PIECES = 2.
    """
    TILE: tl.constexpr = weight.shape[1]
    BLOCK_K: tl.constexpr = weight.shape[2]
    SHARE: tl.constexpr = VECTOR // PIECES
    i = tl.arange(0, BLOCK_K // PIECES)[None, None, :]
    if PIECES == 2:
        i = (i // SHARE) * VECTOR + i % SHARE
        halves = tl.reshape(to_fp32(weight), [1, TILE, BLOCK_K // VECTOR, 2, SHARE])
        weight, other = tl.split(tl.permute(halves, (0, 1, 2, 4, 3)))
        weight = tl.reshape(weight, [1, TILE, BLOCK_K // 2])
        other = tl.reshape(other, [1, TILE, BLOCK_K // 2])
    sums, squares = _piece(x, norm_ptr, weight, is_row, k + i, K, SHARE, ALONG_K, NORM)
    if PIECES == 2:
        more, more_squares = _piece(x, norm_ptr, other, is_row, k + SHARE + i, K, SHARE, ALONG_K, NORM)
        sums += more
        if NORM:
            squares += more_squares
    return sums, squares


@triton.jit
def _piece(
    x,
    norm_ptr,
    weight,
    is_row,
    columns,
    K,
    VECTOR: tl.constexpr,
    THREADS: tl.constexpr,
    NORM: tl.constexpr,
):
    """``_tile`` for columns of which a thread holds the same of x and of the weights."""
    values = tl.load(x + columns, mask=is_row & (columns < K), other=0.0, eviction_policy="evict_last")
    squares = 0.0
    if NORM:
        values = values.to(tl.float32)
        squares = _dot(values, values, VECTOR, THREADS)
        gain = tl.load(norm_ptr + columns, mask=columns < K, other=0.0, eviction_policy="evict_last")
        values *= gain.to(tl.float32)
    return _dot(values, weight, VECTOR, THREADS), squares


@triton.jit
def _gemv_kernel(
    out_ptr,  # [M, N]
    x_ptr,  # [M, K]
    weight_ptr,  # [GATES * N, K]
    scale_ptr,  # fp32 [GATES * N], or None
    bias_ptr,  # [GATES * N] or None
    residual_ptr,  # [M, N] or None
    norm_ptr,  # [K]: x is normalised and multiplied by it; or None
    eps,
    M,
    N,
    K,
    stride_out,
    stride_x,
    stride_weight,
    stride_residual,
    ROWS: tl.constexpr,  # power of two, at least M
    GATES: tl.constexpr,  # 2: gate rows above up rows
    BLOCK_N: tl.constexpr,  # rows of each gate
    BLOCK_K: tl.constexpr,
    ONE_TILE: tl.constexpr,  # K <= BLOCK_K
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    VECTOR: tl.constexpr,  # weights in 16 bytes
    PIECES: tl.constexpr,
    THREADS: tl.constexpr,
    ALONG_K: tl.constexpr,  # threads that lie along K
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    WEIGHTS_READY: tl.constexpr,
):
    TILE: tl.constexpr = GATES * BLOCK_N
    NORM: tl.constexpr = norm_ptr is not None
    n0 = tl.program_id(0) * BLOCK_N
    i = tl.arange(0, TILE)
    # Rows beyond the end read the last one again and are not stored.
    rows = (i // BLOCK_N) * N + tl.minimum(n0 + i % BLOCK_N, N - 1)
    columns = tl.arange(0, BLOCK_K)[None, None, :]
    m = tl.arange(0, ROWS)
    weights = weight_ptr + rows.to(tl.int64)[None, :, None] * stride_weight + columns
    xs = x_ptr + m.to(tl.int64)[:, None, None] * stride_x
    is_row = (m < M)[:, None, None]

    if PDL and not WEIGHTS_READY:
        gdc_wait()
    weight = tl.load(weights, mask=columns < K, other=0.0, eviction_policy="evict_first")
    if PDL and WEIGHTS_READY:
        if PREFETCH > 0 and not ONE_TILE:
            fetch_into_l2(weight_ptr, stride_weight, n0, N, BLOCK_K, K, GATES, BLOCK_N, PREFETCH, THREADS)
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    sums, squares = _tile(weight, xs, norm_ptr, is_row, 0, K, VECTOR, ALONG_K, PIECES, NORM)
    if not ONE_TILE:
        for k in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
            weight = tl.load(weights + k, mask=columns + k < K, other=0.0, eviction_policy="evict_first")
            more, more_squares = _tile(weight, xs, norm_ptr, is_row, k, K, VECTOR, ALONG_K, PIECES, NORM)
            sums += more
            if NORM:
                squares += more_squares

    # Before the sum over threads, which takes as long as these loads; any earlier they would cost registers.
    cols = n0 + tl.arange(0, BLOCK_N)
    stored = (m < M)[:, None] & (cols < N)[None, :]
    residual = tl.zeros([ROWS, BLOCK_N], tl.float32)
    if residual_ptr is not None:
        offsets = m.to(tl.int64)[:, None] * stride_residual + cols[None, :]
        residual = tl.load(residual_ptr + offsets, mask=stored, other=0.0).to(tl.float32)
    bias = tl.zeros([TILE], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows).to(tl.float32)
    total = tl.sum(sums, axis=2)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + rows)[None, :]
    if NORM:
        total *= tl.rsqrt(tl.sum(squares, axis=2) / K + eps)
    total += bias[None, :]
    if GATES == 2:
        gate, up = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, BLOCK_N]), (0, 2, 1)))
    else:
        gate, up = total, total
    y = finish(gate, up, residual, GATES, ACTIVATION)
    out = out_ptr + m.to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=stored)


# Launching -----------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """How the kernel is launched.

    Args:
        block_n: rows of weights a block (of gates and of ups when gated); a power of two.
        block_k: columns a tile; a power of two. Threads that find no 16 bytes of it go to waste.
        num_warps, num_stages: as in Triton; 1 stage loads into registers.
        prefetch: columns behind the first tile asked into L2 before the wait for the previous kernel; 0 or a power of
            two. Only with ``weights_ready``.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    prefetch: int = 0


def shared_bytes(config: Config, m: int, gated: bool, size: int, quantized: bool = False, norm: bool = False) -> int:
    """Shared memory of the asynchronous copies of elements of ``size`` bytes: one tile a stage but the last.

    ``quantized``: those of the weights have one byte. ``norm``: the norm's weight is copied, too.
    """
    weights = config.block_n * (2 if gated else 1) * (1 if quantized else size)
    return (config.num_stages - 1) * (weights + (next_power_of_2(m) + norm) * size) * config.block_k


def default_config(
    info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int, gated: bool = False, quantized: bool = False
) -> Config:
    """The configuration for operands that nobody measured: 8 KiB a tile, of four to nine blocks a multiprocessor.

    Args:
        info, dtype: as in every choice; the tiles depend on neither, only how many are copied at once.
        m, n, k: rows of x, columns of the result, columns of the weight.
        gated: the weight has 2 * n rows.
        quantized: its elements have one byte.
    """
    rows, width, gates = next_power_of_2(m), next_power_of_2(k), 2 if gated else 1
    piece = 512 if quantized else 256  # columns of a warp that loads 16 bytes a thread
    # Every warp adds its sums across its threads with 5 shuffles each, one a cycle on a multiprocessor, which costs as
    # much as loading when K is short and rows are many: 8 rows of K = 1024 want one warp a block.
    warps = 4
    while warps > 1 and (piece * warps > width or piece // 256 * 100 * rows * warps > k):
        warps //= 2
    tile = piece * warps
    # Several rows want one piece of each tile a thread: with two, the compiler loads x row by row when it is needed.
    if rows >= 4:
        config = Config(4, tile, warps, 4 if k > 2 * tile else 1)
    elif gates * n * k > info.num_sms * 256 * piece or k <= tile:
        config = Config(4, tile, warps)
    else:
        # Half of a shard of up to 128 KiB a multiprocessor is in flight before the first wait.
        config = Config(2, 2 * tile, warps) if rows == 1 else Config(4, 2 * tile, 2 * warps)
    block_n = max(config.block_n // gates, 1)
    while block_n > 1 and n < 2 * info.num_sms * block_n:
        block_n //= 2
    config = config._replace(block_n=block_n, block_k=min(config.block_k, width))
    # 120 KiB at eight rows of one-byte weights, and capability 8.6 or 8.9 has 99 KiB. A norm may be in front.
    while config.num_stages > 1 and shared_bytes(config, m, gated, dtype.itemsize, quantized, True) > info.max_shared:
        config = config._replace(num_stages=config.num_stages - 1)
    return config


def candidates(
    info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int, gated: bool = False, quantized: bool = False
) -> list[Config]:
    """Configurations worth measuring; empty for more rows than ``MAX_ROWS``."""
    if m > MAX_ROWS:
        return []
    width, rows = next_power_of_2(k), next_power_of_2(m)
    found = [default_config(info, dtype, m, n, k, gated, quantized)]
    gates = 2 if gated else 1
    tiles = _TILES[rows]
    if quantized:  # tiles of as many bytes; and more rows, so that less of x is read for each
        tiles = [(8, 1024, 2, 1, 0), *((n, 2 * k, w, s, 0) for n, k, w, s, _ in tiles), (4, 1024, 2, 1, 2048)]
    for block_n, block_k, warps, stages, prefetch in tiles:
        if (
            block_k > width
            or block_n < gates
            or (stages > 1 and k <= 2 * block_k)
            or (prefetch and k < block_k + prefetch)
        ):
            continue
        found.append(Config(block_n // gates, block_k, warps, stages, prefetch))
    fitting = [
        config
        for config in dict.fromkeys(found)
        if shared_bytes(config, m, gated, dtype.itemsize, quantized) <= info.max_shared
    ]
    return fitting[:12]


# (rows of weights, columns, warps, stages, prefetch) by rows of x, as far as the compiler finds enough registers.
_TILES: dict[int, list[tuple[int, int, int, int, int]]] = {
    1: [
        (4, 1024, 4, 1, 0), (2, 2048, 4, 1, 0), (4, 2048, 4, 1, 0), (2, 4096, 8, 1, 0), (4, 4096, 16, 1, 0),
        (4, 512, 2, 1, 0), (8, 1024, 4, 1, 0), (4, 2048, 8, 1, 0), (4, 1024, 4, 4, 0), (4, 1024, 4, 1, 2048),
        (2, 2048, 4, 1, 2048),
    ],
    2: [
        (4, 1024, 4, 1, 0), (2, 2048, 4, 1, 0), (4, 2048, 8, 1, 0), (2, 4096, 8, 1, 0), (4, 4096, 16, 1, 0),
        (4, 512, 2, 1, 0), (8, 1024, 4, 1, 0), (4, 1024, 4, 3, 0), (4, 1024, 4, 4, 0), (4, 1024, 4, 1, 2048),
        (4, 2048, 8, 1, 2048),
    ],
    4: [
        (4, 1024, 4, 1, 0), (2, 2048, 4, 1, 0), (4, 2048, 4, 1, 0), (4, 4096, 16, 1, 0), (4, 512, 2, 1, 0),
        (4, 256, 1, 4, 0), (4, 512, 2, 4, 0), (4, 1024, 4, 3, 0), (4, 1024, 4, 4, 0), (2, 1024, 4, 4, 0),
        (4, 1024, 4, 3, 2048),
    ],
    8: [
        (4, 1024, 4, 1, 0), (2, 2048, 4, 1, 0), (4, 2048, 4, 1, 0), (4, 512, 2, 1, 0), (4, 256, 1, 4, 0),
        (4, 512, 2, 4, 0), (4, 1024, 4, 3, 0), (4, 1024, 4, 4, 0), (2, 1024, 4, 4, 0), (4, 1024, 4, 3, 2048),
    ],
}  # fmt: skip


def gemv(
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
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """``activation(x @ weight.T + bias) + residual``, or the gated form; fp32 inside, rounded once.

    Args:
        out: [M, N], must not overlap the operands, except that it may be ``residual``.
        x: [M, K], 1 to 8 rows, dense, at any distance from each other.
        weight: [N, K]; [2 * N, K] when gated, gate rows above up rows. Dense rows.
        bias: [N] or [2 * N].
        residual: [M, N], dense rows.
        activation: None, "silu", "gelu", "gelu_tanh" or "relu"; None when gated.
        gated: ``silu(gate) * up`` of the two halves.
        config: None takes the default.
        weights_ready: no kernel that may still be running writes ``weight``, so it may be read before that one is
            waited for.
        scale: fp32 [N] or [2 * N], of a quantised weight; the fp32 sums are multiplied by it.
        norm_weight: [K], to have x RMS-normalised and multiplied by it.
        eps: of the normalisation, added to the mean square.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit; more than 8 rows.
    """
    m, n, k = check_operands(out, x, weight, bias, residual, activation, gated, scale, norm_weight)
    if m > MAX_ROWS:
        raise ValueError(f"expected at most {MAX_ROWS} rows, got {m}")
    info, quantized = gpu_of(x), scale is not None
    if config is None:
        config = default_config(info, x.dtype, m, n, k, gated, quantized)
    vector, threads, gates = 16 // weight.element_size(), 32 * config.num_warps, 2 if gated else 1
    # Pieces of x of 16 bytes for each of the weights.
    pieces = 2 if quantized and x.element_size() == 2 and config.block_k >= vector else 1
    pdl = info.has_pdl and not INTERPRETED
    prefetch = config.prefetch if pdl and weights_ready else 0
    launch(
        _gemv_kernel,
        (-(-n // config.block_n) if m else 0,),
        out,
        x,
        weight,
        scale,
        bias,
        residual,
        norm_weight,
        eps,
        m,
        n,
        k,
        out.stride(0),
        x.stride(0),
        weight.stride(0),
        residual.stride(0) if residual is not None else 0,
        ROWS=next_power_of_2(m),
        GATES=gates,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        ONE_TILE=k <= config.block_k,
        STAGES=config.num_stages,
        PREFETCH=prefetch and fetched_columns(weight, gates * config.block_n, prefetch, threads),
        VECTOR=min(vector, config.block_k),
        PIECES=pieces,
        THREADS=threads,
        ALONG_K=max(1, min(threads, config.block_k // vector)),
        ACTIVATION=activation,
        PDL=pdl,
        WEIGHTS_READY=weights_ready,
        num_warps=config.num_warps,
        pdl=pdl,
    )


# Ahead-of-time check -------------------------------------------------------------------------------------------------


_case = partial(launch_case, "gemv", gemv)


def aot_cases() -> list[AotCase]:
    """Every kind of loop and epilogue, with the tiles that need the most registers.

    The limits on registers are what puts the intended number of bytes in flight: blocks on a multiprocessor times the
    tile of one.
    """
    hopper = {"capabilities": (90,)}
    int8, fp8 = ({"weight_dtype": dtype} for dtype in WEIGHT_DTYPES)
    return [
        _case("1 row", 1, 28672, 4096, max_registers=56),
        _case("1 row, small shard", 1, 1536, 4096, max_registers=56, **hopper),
        _case("1 row, gated, everything", 1, 14336, 4096, gated=True, everything=True, max_registers=64, **hopper),
        _case("2 rows, prefetch", 2, 6144, 4096, Config(4, 1024, 4, 1, 2048), max_registers=72, **hopper),
        _case("4 rows, everything", 4, 4096, 4096, everything=True, max_registers=128, **hopper),
        _case("8 rows, asynchronous", 8, 4096, 4096, max_registers=168),
        _case("3 rows, ragged", 3, 1001, 1001, wide_loads=None, **hopper),
        _case("1 row, int8", 1, 28672, 4096, max_registers=56, **int8),
        _case("4 rows, int8", 4, 4096, 4096, max_registers=136, **int8, **hopper),
        _case("8 rows, fp8, asynchronous", 8, 4096, 14336, everything=True, max_registers=192, **fp8, **hopper),
        _case("3 rows, int8, ragged", 3, 1001, 1001, wide_loads=None, **int8, **hopper),
        _case("1 row, norm", 1, 6144, 4096, norm=True, max_registers=64, **hopper),
        _case("1 row, fp8, norm, gated", 1, 14336, 4096, gated=True, norm=True, max_registers=64, **fp8, **hopper),
    ]
