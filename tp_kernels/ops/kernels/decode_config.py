"""How decode attention is run: configurations, the number of shares a row is split into, shared memory.

Pure functions of sizes and the GPU: nothing here reads a tensor, asks the GPU or needs Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tp_kernels.ops._gpu import GpuInfo
from tp_kernels.ops.kernels.sizes import next_power_of_2

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_ROWS",
    "MAX_STRIDE",
    "Config",
    "candidates",
    "capacity_of",
    "default_config",
    "power_of_two",
    "shared_bytes",
    "splits_for",
]

MAX_ROWS = 64  # query rows of one program: tokens times heads of a group
MAX_HEAD_DIM = 256
MAX_STRIDE = 1 << 23  # of a position: offsets inside a block of 128 are 32-bit numbers
MAX_SPLITS = 128


class Config(NamedTuple):
    """How to run the kernel.

    Args:
        block_n: positions of an iteration.
        ctas_per_sm: programs a multiprocessor that splitting aims at; a batch that has as many is not split.
        num_warps: warps of a program.
        num_stages: blocks of keys and values in flight, plus one.
        combine: "kernel" or "last".
        min_blocks: fewest blocks that a share of a full row has.
    """

    block_n: int = 64
    ctas_per_sm: int = 1
    num_warps: int = 4
    num_stages: int = 3
    combine: str = "kernel"
    min_blocks: int = 2


def capacity_of(max_len: int, tokens: int, sliding_window: int | None) -> int:
    """Most positions of a row that a call can read."""
    return max_len if sliding_window is None else min(max_len, sliding_window + tokens - 1)


def splits_for(config: Config, info: GpuInfo, groups: int, capacity: int) -> int:
    """Number of shares a row may have: enough to fill the GPU, none too short to be worth merging.

    Args:
        groups: rows of the batch times KV heads.
        capacity: see ``capacity_of``.
    """
    wanted = config.ctas_per_sm * info.num_sms // max(groups, 1)
    blocks = -(-capacity // config.block_n)
    return max(1, min(wanted, blocks // config.min_blocks, MAX_SPLITS))


def shared_bytes(config: Config, info: GpuInfo, rows: int, head_dim: int, itemsize: int) -> int:
    """Most shared memory of a program, as the compiler was seen to use it: rings of keys and values, queries, weights.

    64 rows are multiplied by wgmma on Hopper, which reads shared memory longer and needs one more block in the rings.
    """
    block_d, packed = power_of_two(head_dim), power_of_two(rows)
    blocks = config.num_stages if info.hopper and packed >= 64 and itemsize == 2 else config.num_stages - 1
    return itemsize * (blocks * 2 * config.block_n * block_d + packed * (block_d + config.block_n)) + 2048


def default_config(info: GpuInfo, dtype: torch.dtype, rows: int, head_dim: int) -> Config:
    """Configuration where nothing was measured.

    Args:
        info: the GPU.
        dtype: of the queries and caches.
        rows: query rows of a KV head, tokens times heads of a group.
        head_dim: D.
    """
    # Accumulators of more than 4096 elements spill with 4 warps (compiled for capability 8.0 and 9.0).
    warps = 8 if power_of_two(rows) * power_of_two(head_dim) > 4096 else 4
    for block_n, num_stages in ((64, 3), (64, 2), (32, 3), (32, 2)):
        config = Config(block_n, num_warps=warps, num_stages=num_stages)
        if shared_bytes(config, info, rows, head_dim, dtype.itemsize) <= info.max_shared:
            return config
    return Config(16, num_warps=warps, num_stages=2)


def candidates(info: GpuInfo, dtype: torch.dtype, rows: int, head_dim: int, groups: int, capacity: int) -> list[Config]:
    """Configurations worth measuring, each another launch; for the arguments see ``default_config``, ``splits_for``."""
    default = default_config(info, dtype, rows, head_dim)
    found: dict[tuple[object, ...], Config] = {}
    for config in (
        default,
        default._replace(combine="last"),
        default._replace(ctas_per_sm=2),
        default._replace(ctas_per_sm=2, combine="last"),
        default._replace(min_blocks=1),
        default._replace(ctas_per_sm=3),
        default._replace(ctas_per_sm=4, num_stages=2),
        default._replace(num_stages=4),
        default._replace(num_stages=4, combine="last"),
        default._replace(num_stages=4, num_warps=8),
        default._replace(block_n=128, num_warps=8),
        default._replace(block_n=128, num_warps=8, combine="last"),
    ):
        if shared_bytes(config, info, rows, head_dim, dtype.itemsize) <= info.max_shared:
            splits = splits_for(config, info, groups, capacity)
            merged = config.combine if splits > 1 else ""
            found.setdefault((config.block_n, splits, config.num_warps, config.num_stages, merged), config)
    return list(found.values())


def power_of_two(n: int) -> int:
    """The next power of two, 16 at least: the smallest operand of a tensor core."""
    return max(16, next_power_of_2(n))
