"""How a dimension is spread over the ranks: extents and ranges by rank."""

from __future__ import annotations

from collections.abc import Sequence

from tp_kernels.checkpoint.sharding import shard_width_sizes

__all__ = ["checked_partition", "ranges_from_sizes"]


def ranges_from_sizes(sizes: Sequence[int]) -> list[range]:
    """Adjacent ranges of the given extents, starting at 0."""
    ranges, start = [], 0
    for size in sizes:
        ranges.append(range(start, start + size))
        start += size
    return ranges


def checked_partition(total: int, partition: Sequence[int] | None, world_size: int, what: str) -> list[int]:
    """Every rank's extent of a dimension: ``shard_width`` unless given. ValueError when a rank would get nothing."""
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        raise ValueError(f"{what} must be a positive int, got {total!r}")
    if partition is None:
        if total < world_size:
            raise ValueError(f"cannot spread {what}={total} over {world_size} ranks; expected at least one a rank")
        return shard_width_sizes(total, world_size)
    if len(partition) != world_size or sum(partition) != total or min(partition) < 1:
        raise ValueError(f"partition must be {world_size} positive sizes that sum to {what}={total}, got {partition}")
    return list(partition)
