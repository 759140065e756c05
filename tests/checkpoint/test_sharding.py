"""The sharding plan. Tier: no device (pure functions)."""

from __future__ import annotations

import itertools

import pytest

from tp_kernels.checkpoint import sharding
from tp_kernels.checkpoint.sharding import (
    kv_replicas,
    shard_heads,
    shard_heads_sizes,
    shard_range,
    shard_range_sizes,
    shard_vocab,
    shard_width,
    shard_width_sizes,
)

SIZES = [0, 1, 2, 3, 5, 7, 31, 64, 65, 100, 101, 576, 1536, 8960, 11008, 14336, 49152]


def assert_tiles(parts, total):
    """Adjacent slices from 0 to total."""
    stops = [0] + [part.stop for part in parts]
    assert [part.start for part in parts] == stops[:-1]
    assert stops[-1] == total


@pytest.mark.parametrize("unit", [1, 2, 16, 48, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8, 64])
def test_ranges_tile_in_whole_units_and_leave_nobody_empty(world_size, unit):
    for total in SIZES:
        parts = [shard_range(total, world_size, rank, unit) for rank in range(world_size)]
        assert_tiles(parts, total)
        if total >= world_size:
            assert min(map(len, parts)) >= 1
        if -(-total // unit) >= world_size:
            assert all(part.start % unit == 0 for part in parts)
            # Balanced: apart from the ragged end, ranks differ by one unit at most.
            units = [-(-len(part) // unit) for part in parts]
            assert max(units) - min(units) <= 1
        assert shard_range_sizes(total, world_size, unit) == [len(part) for part in parts]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_widths_tile_and_stay_balanced(world_size):
    for total in SIZES + list(range(1, 300)):
        parts = [shard_width(total, world_size, rank) for rank in range(world_size)]
        assert_tiles(parts, total)
        fair = total / world_size
        assert max(map(len, parts)) <= max(fair * 1.0625, -(-total // world_size))
        assert min(map(len, parts)) >= (1 if total >= world_size else 0)


def test_widths_are_aligned_where_that_is_cheap():
    assert shard_width_sizes(1536, 2) == [768, 768]
    assert shard_width_sizes(1536, 3) == [512, 512, 512]
    assert shard_width_sizes(1536, 5) == [320, 320, 320, 320, 256]
    assert shard_width_sizes(11008, 3) == [3712, 3648, 3648]
    assert shard_width_sizes(100, 3) == [34, 34, 32]
    assert shard_width_sizes(5, 3) == [2, 2, 1]


def test_vocabulary_is_cut_in_rows():
    assert [len(shard_vocab(101, 3, rank)) for rank in range(3)] == [34, 34, 33]
    assert_tiles([shard_vocab(49152, 7, rank) for rank in range(7)], 49152)


def test_heads_of_every_rank_form_a_regular_grouped_query_attention():
    for kv_heads, group in itertools.product(range(1, 9), range(1, 6)):
        heads = kv_heads * group
        for world_size in range(1, heads + 1):
            shards = [shard_heads(heads, kv_heads, world_size, rank) for rank in range(world_size)]
            assert_tiles([shard.q for shard in shards], heads)
            replicas = kv_replicas(heads, kv_heads, world_size)
            for rank, (q, kv) in enumerate(shards):
                assert len(q) >= 1 and len(kv) >= 1 and len(q) % len(kv) == 0
                local_group = len(q) // len(kv)
                for i, head in enumerate(q):
                    # The local pairing of query and KV heads is the model's.
                    assert kv[i // local_group] == head // group
                assert [head for head in range(kv_heads) if rank in replicas[head]] == list(kv)
                assert world_size <= kv_heads or len(kv) == 1
            assert shard_heads_sizes(heads, kv_heads, world_size) == [(len(q), len(kv)) for q, kv in shards]


def test_smollm2_heads():
    assert shard_heads_sizes(9, 3, 2) == [(6, 2), (3, 1)]
    assert shard_heads_sizes(9, 3, 3) == [(3, 1)] * 3
    assert shard_heads_sizes(9, 3, 4) == [(2, 1), (1, 1), (3, 1), (3, 1)]
    assert kv_replicas(9, 3, 4) == [range(0, 2), range(2, 3), range(3, 4)]
    assert kv_replicas(9, 3, 2) == [range(0, 1), range(0, 1), range(1, 2)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shard_range(10, 0, 0), "world_size must be at least 1"),
        (lambda: shard_range(10, 2, 2), r"rank must be in \[0, 2\)"),
        (lambda: shard_range(-1, 2, 0), "total must not be negative"),
        (lambda: shard_range(10, 2, 0, unit=0), "unit must be"),
        (lambda: shard_range(2.5, 2, 0), "total must be an int"),
        (lambda: shard_width(10, 2, -1), "rank must be in"),
        (lambda: shard_heads(4, 2, 5, 0), "5 ranks cannot share 4 query heads"),
        (lambda: shard_heads(9, 2, 1, 0), "num_kv_heads must divide num_heads=9"),
        (lambda: shard_heads(9, 0, 1, 0), "num_kv_heads must divide"),
        (lambda: shard_heads(0, 1, 1, 0), "num_heads must be at least 1"),
        (lambda: kv_replicas(4, 2, 9), "9 ranks cannot share"),
    ],
)
def test_bad_arguments_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_module_is_a_leaf():
    """Layers and loader import it, so it may import neither; the standard library only."""
    import ast
    import inspect

    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(sharding)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert imported <= {"__future__", "typing"}
