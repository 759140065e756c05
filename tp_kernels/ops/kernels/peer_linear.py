"""Launches of ``peer_linear_kernel``: row-parallel projection, all-reduce and what follows it over peer memory."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_kernels.comm.symmetric_sizes import CHUNK_PACKS, MAX_ROW_BLOCKS, MAX_ROW_PACKS, PACK_BYTES, row_packs
from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch, meta
from tp_kernels.ops.kernels.matmul import Config, check_operands, fewest_waves, shared_bytes, tma_addressable
from tp_kernels.ops.kernels.peer_linear_kernel import MULTIPLY, PULL, REDUCE, linear_kernel
from tp_kernels.ops.kernels.peer_norm import _milliseconds
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = ["aot_cases", "configs", "linear_all_reduce", "scratch_floats"]

# Row blocks of a band: enough for L2 to serve the operands of several tiles with one load (GROUP_M of ``matmul``).
_BAND = 8
# Rows that are reduced or pulled at a time: some hundred entries for a few thousand rows, so that all blocks have some.
_ROWS = 8

# Configurations ------------------------------------------------------------------------------------------------------

_TMA = (
    Config(128, 256, 64, num_stages=4),
    Config(128, 128, 64, num_stages=4),
    Config(64, 256, 64, num_warps=4, num_stages=4),
    Config(64, 128, 64, num_warps=4, num_stages=4),
)
_POINTERS = (
    Config(128, 128, 64, num_stages=3, tma=False),
    Config(64, 128, 64, num_warps=4, num_stages=3, tma=False),
)
# Operands that cannot be loaded 16 bytes at a time.
_SCALAR = (
    Config(128, 64, 64, num_stages=2, tma=False),
    Config(64, 64, 64, num_warps=4, num_stages=2, tma=False),
)
# Without tensor cores ("ieee"): for tests.
_FP32 = (Config(64, 64, 32, num_warps=4, num_stages=2, tma=False),)


def configs(info: GpuInfo, dtype: torch.dtype, block_m: int, n: int, k: int, aligned: bool) -> list[Config]:
    """Tiles of ``block_m`` rows that this GPU can take for x [*, k] and weight [n, k].

    Args:
        aligned: whether descriptors can address both, hence whether they can be loaded 16 bytes at a time.
    """
    if dtype == torch.float32:
        found = _FP32
    elif aligned and info.has_tma:
        found = _TMA
    else:
        found = _SCALAR if not aligned or n % 16 or k % 16 else _POINTERS
    # Results leave by ordinary stores, in the place of the operands' buffers, as from a kernel without descriptors.
    fits = lambda config: shared_bytes(config._replace(tma=False)) <= info.max_shared  # noqa: E731
    some = [config for config in found if config.block_m == block_m and fits(config)]
    return some or [config for config in _POINTERS if config.block_m == block_m]


# Launcher ------------------------------------------------------------------------------------------------------------


def scratch_floats(max_blocks: int) -> int:
    """fp32 of memory that a grid of ``max_blocks`` needs for norms."""
    return max_blocks * 2 * (MAX_ROW_PACKS // CHUNK_PACKS)


def linear_all_reduce(
    out: Tensor,
    normed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    table: Tensor,
    scratch: Tensor,
    *,
    rank: int,
    world_size: int,
    half_bytes: int,
    block_m: int,
    max_blocks: int,
    timeout_ns: int,
    config: Config | None = None,
    work: int = MULTIPLY | REDUCE | PULL,
) -> None:
    """``out`` = all_reduce(x @ weight.T) + bias + residual and ``normed`` = rms_norm(out) * norm_weight on every rank.

    Args:
        out, normed: [M, N], contiguous; at most ``linear_rows`` rows. ``normed`` is None as ``norm_weight`` is.
        x: [M, K] with dense rows; K may differ between the ranks.
        weight: [N, K] with dense rows.
        bias, norm_weight: [N], dense, or None; a normed row has at most ``MAX_ROW_PACKS`` packs.
        residual: [M, N], contiguous, or None; may be ``out``.
        eps: added to the mean square.
        table: int64 [2 * world_size + 1] on the GPU: addresses of all ranks' data, of their flags, of the error record.
        scratch: [scratch_floats(max_blocks)] float32 that nothing else uses meanwhile.
        half_bytes: of the workspace's staging halves.
        block_m: rows of a tile, the same on all ranks: ``row_block`` of all rows of the call.
        max_blocks: the grid: multiprocessors that this rank may use.
        timeout_ns: deadline of a wait; whole milliseconds count.
        config: None takes the tile with the fewest waves.
        work: kinds of entries that are worked off; anything but all of them is for the interpreter.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or more rows than can be staged.
    """
    (m, k), n = x.shape, weight.shape[0]
    info, itemsize = gpu_of(x), x.element_size()
    check_operands(out, x, weight, bias, n, {"residual": (residual, n), "normed": (normed, n)})
    if not all(t is None or t.is_contiguous() for t in (out, normed, residual)):
        raise ValueError("expected out, normed and residual to be contiguous")
    steps = cdiv(cdiv(m, block_m), world_size)
    slot = steps * block_m * n
    if slot * world_size * itemsize > half_bytes or steps * world_size > MAX_ROW_BLOCKS:
        raise ValueError(
            f"expected at most {MAX_ROW_BLOCKS} row blocks of {block_m} rows, staged in {half_bytes} bytes, got "
            f"{m} rows of {n} columns on {world_size} ranks"
        )
    aligned = k > 0 and tma_addressable(x, weight)
    if config is None:
        config = fewest_waves(info, configs(info, x.dtype, block_m, n, k, aligned), m, n)
    chunks = 0 if norm_weight is None else next_power_of_2(cdiv(row_packs(n, itemsize), CHUNK_PACKS))
    per_pack = PACK_BYTES // itemsize
    # At most 64 elements of a row a thread: with 128 of them, 296 bytes were spilled (sm_90). Bits do not depend on it.
    warps = max(config.num_warps, chunks * CHUNK_PACKS * per_pack // (32 * 64))
    threads = 32 * warps
    sides: tuple[object, object] = (x, weight)
    if config.tma:
        sides = (
            TensorDescriptor(x, [m, k], [x.stride(0), 1], [config.block_m, config.block_k]),
            TensorDescriptor(weight, [n, k], [weight.stride(0), 1], [config.block_n, config.block_k]),
        )
    launch(
        linear_kernel,
        (max_blocks,),
        *sides,
        bias,
        residual,
        norm_weight,
        out,
        normed,
        scratch,
        table,
        rank,
        m,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        slot,
        half_bytes,
        _milliseconds(timeout_ns),
        float(eps),
        num_warps=warps,
        num_stages=config.num_stages,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_K=k % config.block_k == 0,
        TMA=config.tma,
        BAND=max(1, _BAND // world_size),
        ROWS=_ROWS,
        COLS=chunks * CHUNK_PACKS * per_pack or min(2 * threads * per_pack, next_power_of_2(n)),
        COPY=4 * threads * per_pack,
        CHUNKS=chunks,
        PER_PACK=per_pack,
        WORLD=world_size,
        WORK=work,
        WAITS=not INTERPRETED,
    )


def aot_cases() -> list[AotCase]:
    """Every kind of tile, with and without what follows the sum, at 2, 4 and 8 ranks."""
    group = {"rank": 1, "half_bytes": 64 << 20, "max_blocks": 132, "timeout_ns": 300 * 10**9}

    def call(m, n, k, world, follows=True, dtype=torch.bfloat16, block_m=128) -> None:
        x, weight, out, row = (meta(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n), (n,)))
        table, scratch = meta(2 * world + 1, dtype=torch.int64), meta(scratch_floats(132), dtype=torch.float32)
        rest = (row, out, row) if follows else (None, None, None)
        normed = out if follows else None
        linear_all_reduce(
            out, normed, x, weight, *rest, 1e-6, table, scratch, world_size=world, block_m=block_m, **group
        )

    hopper = {"capabilities": (90,), "wgmma": True, "tma": True}
    return [
        AotCase("peer_linear 4096x4096x3584 world 4", lambda: call(4096, 4096, 3584, 4), **hopper),
        AotCase("peer_linear 4096x8192x1024 world 8, sum", lambda: call(4096, 8192, 1024, 8, False), **hopper),
        AotCase("peer_linear 200x4096x2048 world 2", lambda: call(200, 4096, 2048, 2, block_m=64), **hopper),
        AotCase(
            "peer_linear 200x16384x2048 world 2",
            lambda: call(200, 16384, 2048, 2, block_m=64),
            max_spill_bytes=16,
            **hopper,
        ),
        AotCase("peer_linear 2048x4096x1024 world 2", lambda: call(2048, 4096, 1024, 2), (80,)),
        AotCase(
            "peer_linear ragged world 3",
            lambda: call(700, 1001, 333, 3, dtype=torch.float16),
            (90,),
            wide_loads=False,
            tma=False,
        ),
    ]
