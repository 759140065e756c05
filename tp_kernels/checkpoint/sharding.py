"""The one place that says which slice of which dimension a rank owns. Pure functions, standard library only.

Layers, the checkpoint loader and the tests all call these, so that a row-parallel layer always meets the slice that its
column-parallel partner produced. Every function depends only on values that all ranks share, hence every rank can
compute the shard of every other.

* A linear dimension (``shard_width``) is cut in units that keep kernels aligned, as long as that costs little balance.
* A vocabulary (``shard_vocab``) is cut in whole rows.
* Attention (``shard_heads``) is cut in KV groups (a KV head with its query heads) while there are at least as many KV
  heads as ranks; with more ranks, each rank holds one KV head, replicated, and a contiguous part of that head's query
  heads. So the heads of a rank always form a regular grouped-query attention.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "HeadShard",
    "kv_replicas",
    "shard_heads",
    "shard_heads_sizes",
    "shard_range",
    "shard_range_sizes",
    "shard_vocab",
    "shard_vocab_sizes",
    "shard_width",
    "shard_width_sizes",
]

# A whole cache line of fp32 holds 16 values and of bf16 32; tensor-core tiles want 64. An aligned cut is taken only
# while the fullest rank does at most this much more than its fair part, because everybody waits for the fullest rank.
_LARGEST_UNIT = 64
_EVEN_ALIGNMENT = 16
_MAX_OVERLOAD = 1.0625


class HeadShard(NamedTuple):
    """Heads of one rank: ``q`` and ``kv`` are ranges of global head numbers; ``len(q) % len(kv) == 0``."""

    q: range
    kv: range


def _check(total: int, world_size: int, rank: int, what: str) -> None:
    for name, value in ((what, total), ("world_size", world_size), ("rank", rank)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an int, got {value!r}")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if total < 0:
        raise ValueError(f"{what} must not be negative, got {total}")


def _balanced(count: int, parts: int, index: int) -> range:
    """Part ``index`` of ``count`` things; the first ``count % parts`` parts get one more."""
    base, extra = divmod(count, parts)
    start = index * base + min(index, extra)
    return range(start, start + base + (index < extra))


def shard_range(total: int, world_size: int, rank: int, unit: int = 1) -> range:
    """Contiguous, balanced slice of ``total`` elements in whole units; the last unit may be ragged.

    Args:
        total: extent of the full dimension.
        world_size: number of ranks.
        rank: whose slice.
        unit: elements that stay together. Where whole units would leave a rank empty although there are enough
            elements, the unit is halved until none is.

    Returns:
        The slice, possibly empty, and only when ``total < world_size``.

    Raises:
        ValueError: for negative sizes, a rank outside the group or a unit below 1.
    """
    _check(total, world_size, rank, "total")
    if not isinstance(unit, int) or unit < 1:
        raise ValueError(f"unit must be an int of at least 1, got {unit!r}")
    while unit > 1 and -(-total // unit) < world_size:
        unit //= 2
    part = _balanced(-(-total // unit), world_size, rank)
    return range(min(part.start * unit, total), min(part.stop * unit, total))


def _width_unit(total: int, world_size: int) -> int:
    """Unit in which ``shard_width`` cuts: the whole share when the even split is aligned, else a power of two."""
    if total % world_size == 0 and (total // world_size) % _EVEN_ALIGNMENT == 0:
        return max(total // world_size, 1)
    unit = _LARGEST_UNIT
    while unit > 1:
        units = -(-total // unit)
        fullest = -(-units // world_size) * unit
        if units >= world_size and fullest * world_size <= total * _MAX_OVERLOAD:
            break
        unit //= 2
    return unit


def shard_width(total: int, world_size: int, rank: int) -> range:
    """Slice of a linear layer's features: MLP widths, outputs of a column-parallel and inputs of a row-parallel layer.

    The even split when it is aligned to 16 elements, otherwise the largest power-of-two unit up to 64 with which no
    rank gets more than 1/16 above its fair part (down to single elements).

    Raises:
        ValueError: see ``shard_range``.
    """
    _check(total, world_size, rank, "total")
    return shard_range(total, world_size, rank, _width_unit(total, world_size))


def shard_vocab(total: int, world_size: int, rank: int) -> range:
    """Slice of a vocabulary in whole rows, as even as possible."""
    return shard_range(total, world_size, rank)


def _check_heads(num_heads: int, num_kv_heads: int, world_size: int, rank: int) -> None:
    _check(num_heads, world_size, rank, "num_heads")
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if not isinstance(num_kv_heads, int) or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads!r}")
    if world_size > num_heads:
        raise ValueError(f"{world_size} ranks cannot share {num_heads} query heads; use at most {num_heads} ranks")


def shard_heads(num_heads: int, num_kv_heads: int, world_size: int, rank: int) -> HeadShard:
    """Query and KV heads of one rank.

    Args:
        num_heads: query heads of the model; query head ``h`` uses KV head ``h // (num_heads // num_kv_heads)``.
        num_kv_heads: KV heads of the model; must divide ``num_heads``.
        world_size: number of ranks, at most ``num_heads``.
        rank: whose heads.

    Returns:
        Whole KV groups while ``world_size <= num_kv_heads``; otherwise exactly one KV head, shared with its
        ``kv_replicas``, and a contiguous part of its query heads. Never empty.

    Raises:
        ValueError: if the ranks outnumber the query heads, or for other bad sizes.
    """
    _check_heads(num_heads, num_kv_heads, world_size, rank)
    group = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        kv = _balanced(num_kv_heads, world_size, rank)
        return HeadShard(range(kv.start * group, kv.stop * group), kv)
    for head, ranks in enumerate(kv_replicas(num_heads, num_kv_heads, world_size)):
        if rank in ranks:
            q = _balanced(group, len(ranks), rank - ranks.start)
            return HeadShard(range(head * group + q.start, head * group + q.stop), range(head, head + 1))
    raise AssertionError("unreachable: every rank serves a KV head")


def kv_replicas(num_heads: int, num_kv_heads: int, world_size: int) -> list[range]:
    """For each KV head the contiguous ranks that hold it: one rank each while ``world_size <= num_kv_heads``."""
    _check_heads(num_heads, num_kv_heads, world_size, 0)
    if world_size > num_kv_heads:
        return [_balanced(world_size, num_kv_heads, head) for head in range(num_kv_heads)]
    holders = []
    for rank in range(world_size):
        holders += [range(rank, rank + 1)] * len(_balanced(num_kv_heads, world_size, rank))
    return holders


def shard_range_sizes(total: int, world_size: int, unit: int = 1) -> list[int]:
    """Extents of ``shard_range`` for every rank; they sum to ``total``."""
    return [len(shard_range(total, world_size, rank, unit)) for rank in range(world_size)]


def shard_width_sizes(total: int, world_size: int) -> list[int]:
    """Extents of ``shard_width`` for every rank; they sum to ``total``."""
    return [len(shard_width(total, world_size, rank)) for rank in range(world_size)]


def shard_vocab_sizes(total: int, world_size: int) -> list[int]:
    """Extents of ``shard_vocab`` for every rank; they sum to ``total``."""
    return [len(shard_vocab(total, world_size, rank)) for rank in range(world_size)]


def shard_heads_sizes(num_heads: int, num_kv_heads: int, world_size: int) -> list[tuple[int, int]]:
    """(query heads, KV heads) of every rank. Query heads sum to ``num_heads``; KV heads may be counted repeatedly."""
    shards = [shard_heads(num_heads, num_kv_heads, world_size, rank) for rank in range(world_size)]
    return [(len(shard.q), len(shard.kv)) for shard in shards]
