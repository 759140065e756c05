"""The two warp-specialised Gluon kernels of ``gluon_flash_backward.py``.

Both keep two tiles of 128 rows in shared memory, 64 for each of two consumers, while a producer warp streams pairs of
blocks past them: keys and values stay and (query, gradient) blocks pass for dK and dV, the other way round for dQ. With
the kept rows as the rows of the scores, every product that is summed up has its left operand in registers: neither
probabilities nor their gradients ever go through shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tp_kernels.ops.kernels.gluon_flash_schedule import (
    CONSUMERS,
    ROWS,
    TILE_ROWS,
    accumulator,
    advance,
    barriers,
    fill,
    kv_blocks,
    locate,
    q_blocks,
)

__all__ = ["gluon_dkdv", "gluon_dq"]


class Kept(NamedTuple):
    """Tiles that stay, [consumers, 1, 1, 64, D]: keys and values, or queries and their outputs' gradients."""

    a: Any
    b: Any
    ready: Any


class Stream(NamedTuple):
    """A ring of pairs of blocks, each pair handed back as one; query blocks come with their sums and deltas."""

    a: Any
    b: Any
    sums2: Any
    delta: Any
    a_ready: Any
    b_ready: Any
    empty: Any


class Work(NamedTuple):
    """Tiles a head and heads (for ``locate``), lengths, rows of the workspace, factors before and after."""

    tiles: Any
    heads: Any
    all_heads: Any
    section: Any
    group: Any
    each: Any
    q_len: Any
    kv_len: Any
    window: Any
    padded: Any
    scale2: Any
    scale: Any


class Mode(NamedTuple):
    """Compile-time settings."""

    causal: Any
    windowed: Any
    split: Any
    head_dim: Any


@gluon.jit
def _keep(a_desc, b_desc, at, kept, consumer):
    """Start copying a consumer's two tiles; they share a barrier."""
    ready = kept.ready.index(consumer)
    mbarrier.expect(ready, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(a_desc, at, ready, kept.a.index(consumer))
    tma.async_copy_global_to_shared(b_desc, at, ready, kept.b.index(consumer))


@gluon.jit
def _scores(kept_a, kept_b, stream, slot, phase):
    """Issue kept . passing^T for both pairs."""
    BLOCK: gl.constexpr = stream.a.shape[3]
    D: gl.constexpr = stream.a.shape[4]
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, accumulator(BLOCK))
    mbarrier.wait(stream.a_ready.index(slot), phase)
    a = stream.a.index(slot).reshape([BLOCK, D])
    s = warpgroup_mma(kept_a, a.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(stream.b_ready.index(slot), phase)
    b = stream.b.index(slot).reshape([BLOCK, D])
    return s, warpgroup_mma(kept_b, b.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _seen(position, key, kv_len, window, mode):
    """Which keys a query sees; the arguments broadcast."""
    seen = key < kv_len
    if mode.causal:
        seen = seen & (key <= position)
    if mode.windowed:
        seen = seen & (key > position - window)
    return seen


@gluon.jit
def _operand(x, D: gl.constexpr, DTYPE: gl.constexpr):
    return gl.convert_layout(x.to(DTYPE), gl.DotOperandLayout(0, accumulator(D), 2))


# dK and dV ------------------------------------------------------------------------------------------------------------


@gluon.jit
def _walk_queries(k, v, dk, dv, stream, slot, phase, work, row, start, count, mode, MASKED: gl.constexpr):
    """Add the query blocks start, start + 1, ..., of which there are ``count``.

    (Leaving the sums in flight until the next block's scores are issued makes ptxas serialise all products.)
    """
    BLOCK: gl.constexpr = stream.a.shape[3]
    D: gl.constexpr = stream.a.shape[4]
    DTYPE: gl.constexpr = stream.a.dtype
    COLUMNS: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK))
    for i in range(count):
        s, dp = _scores(k, v, stream, slot, phase)
        sums2 = stream.sums2.index(slot).reshape([BLOCK]).load(COLUMNS)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * work.scale2 - sums2[None, :])
        if MASKED:
            key = row + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(BLOCK)))
            position = (start + i) * BLOCK + work.kv_len - work.q_len + gl.arange(0, BLOCK, COLUMNS)
            p = gl.where(_seen(position[None, :], key[:, None], work.kv_len, work.window, mode), p, 0.0)
        p16 = _operand(p, D, DTYPE)
        dp = warpgroup_mma_wait(0, deps=[dp])
        dv = warpgroup_mma(p16, stream.b.index(slot).reshape([BLOCK, D]), dv, is_async=True)
        delta = stream.delta.index(slot).reshape([BLOCK]).load(COLUMNS)
        ds16 = _operand(p * (dp - delta[None, :]), D, DTYPE)
        dk = warpgroup_mma(ds16, stream.a.index(slot).reshape([BLOCK, D]), dk, is_async=True)
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        mbarrier.arrive(stream.empty.index(slot))
        slot, phase = advance(slot, phase, stream.a.shape[0])
    return dk, dv, slot, phase


@gluon.jit
def _store_share(values, out, b, head, work, row, HEAD_DIM: gl.constexpr):
    """A query head's fp32 share, into a contiguous [B, Hq, L, HEAD_DIM]."""
    D: gl.constexpr = values.shape[1]
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(D)))
    columns = gl.arange(0, D, gl.SliceLayout(0, accumulator(D)))[None, :]
    first = (b * work.heads + head).to(gl.int64) * work.kv_len
    pointers = out + (first + rows)[:, None] * HEAD_DIM + columns
    gl.store(pointers, values, mask=(rows < work.kv_len)[:, None] & (columns < HEAD_DIM))


@gluon.jit
def _leave(values, desc, at, staged, D: gl.constexpr):
    """Send a tile through shared memory that nobody needs any more; rows beyond the tensor are cut off."""
    staged.reshape([ROWS, D]).store(values)
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, at, staged)


@gluon.jit
def _consume_queries(dk_desc, dv_desc, dk_share, dv_share, kept, stream, work, mode, CONSUMER: gl.constexpr):
    BLOCK: gl.constexpr = stream.a.shape[3]
    D: gl.constexpr = stream.a.shape[4]
    DTYPE: gl.constexpr = stream.a.dtype
    tile, b, turn = locate(work, gl.program_id(0), False)
    first_row = tile * TILE_ROWS
    row = first_row + ROWS * CONSUMER
    lo, clear_lo, clear_hi, hi = q_blocks(
        first_row, work.q_len, work.kv_len, work.window, BLOCK, mode.causal, mode.windowed
    )
    k = kept.a.index(CONSUMER).reshape([ROWS, D])
    v = kept.b.index(CONSUMER).reshape([ROWS, D])
    dk = gl.zeros([ROWS, D], gl.float32, accumulator(D))
    dv = gl.zeros([ROWS, D], gl.float32, accumulator(D))
    slot = 0
    phase = 0
    mbarrier.wait(kept.ready.index(CONSUMER), 0)
    for _ in range(work.each):
        if mode.causal:
            count = clear_lo - lo
            dk, dv, slot, phase = _walk_queries(k, v, dk, dv, stream, slot, phase, work, row, lo, count, mode, True)
        count = clear_hi - clear_lo
        dk, dv, slot, phase = _walk_queries(k, v, dk, dv, stream, slot, phase, work, row, clear_lo, count, mode, False)
        if mode.windowed:
            count = hi - clear_hi
            dk, dv, slot, phase = _walk_queries(
                k, v, dk, dv, stream, slot, phase, work, row, clear_hi, count, mode, True
            )
    dk = dk * work.scale
    if mode.split:
        _store_share(dk, dk_share, b, turn, work, row, mode.head_dim)
        _store_share(dv, dv_share, b, turn, work, row, mode.head_dim)
    else:
        _leave(dk.to(DTYPE), dk_desc, [b, turn, row, 0], kept.a.index(CONSUMER), D)
        _leave(dv.to(DTYPE), dv_desc, [b, turn, row, 0], kept.b.index(CONSUMER), D)
        tma.store_wait(0)


@gluon.jit
def _produce_queries(q_desc, k_desc, v_desc, do_desc, sums2_desc, delta_desc, kept, stream, work, mode):
    BLOCK: gl.constexpr = stream.a.shape[3]
    tile, b, turn = locate(work, gl.program_id(0), False)
    row = tile * TILE_ROWS
    lo, _, _, hi = q_blocks(row, work.q_len, work.kv_len, work.window, BLOCK, mode.causal, mode.windowed)
    kv_head = turn * work.each // work.group
    for c in gl.static_range(CONSUMERS):
        _keep(k_desc, v_desc, [b, kv_head, row + ROWS * c, 0], kept, c)
    slot = 0
    phase = 0
    for head in range(turn * work.each, (turn + 1) * work.each):
        for block in range(lo, hi):
            at = [b, head, block * BLOCK, 0]
            at_sums = [head, b * work.padded + block * BLOCK]
            mbarrier.wait(stream.empty.index(slot), phase ^ 1)  # for both halves of the pair
            ready = stream.a_ready.index(slot)
            mbarrier.expect(ready, q_desc.block_type.nbytes + sums2_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, at, ready, stream.a.index(slot))
            tma.async_copy_global_to_shared(sums2_desc, at_sums, ready, stream.sums2.index(slot))
            ready = stream.b_ready.index(slot)
            mbarrier.expect(ready, do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(do_desc, at, ready, stream.b.index(slot))
            tma.async_copy_global_to_shared(delta_desc, at_sums, ready, stream.delta.index(slot))
            slot, phase = advance(slot, phase, stream.a.shape[0])


@gluon.jit
def _dkdv_partitions(
    q_desc, k_desc, v_desc, do_desc, sums2_desc, delta_desc, dk_desc, dv_desc, dk_share, dv_share,
    kept, stream, work, mode,
):  # fmt: skip
    gl.warp_specialize(
        [
            (_consume_queries, (dk_desc, dv_desc, dk_share, dv_share, kept, stream, work, mode, 0)),
            (_consume_queries, (dk_desc, dv_desc, dk_share, dv_share, kept, stream, work, mode, 1)),
            (
                _produce_queries,
                (q_desc, k_desc, v_desc, do_desc, sums2_desc, delta_desc, kept, stream, work, mode),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _ring(desc, STAGES: gl.constexpr):
    BLOCK: gl.constexpr = desc.block_shape[2]
    D: gl.constexpr = desc.block_shape[3]
    return gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, BLOCK, D], desc.layout)


_LENGTHS = ["tiles", "heads", "all_heads", "section", "q_len", "kv_len", "window"]


@gluon.jit(do_not_specialize=[*_LENGTHS, "padded", "each"])
def gluon_dkdv(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    sums2_desc,
    delta_desc,
    dk_desc,
    dv_desc,
    dk_share,
    dv_share,
    scale2,
    scale,
    tiles,
    heads,
    all_heads,
    section,
    each,
    q_len,
    kv_len,
    window,
    padded,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    SPLIT: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    BLOCK: gl.constexpr = q_desc.block_shape[2]
    kept = Kept(_ring(k_desc, CONSUMERS), _ring(v_desc, CONSUMERS), barriers(CONSUMERS, 1))
    sums2 = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], sums2_desc.layout)
    delta = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], delta_desc.layout)
    a_ready = barriers(STAGES, 1)
    b_ready = barriers(STAGES, 1)
    empty = barriers(STAGES, CONSUMERS)
    stream = Stream(_ring(q_desc, STAGES), _ring(do_desc, STAGES), sums2, delta, a_ready, b_ready, empty)
    fence_async_shared()
    work = Work(tiles, heads, all_heads, section, GROUP, each, q_len, kv_len, window, padded, scale2, scale)
    # In the call and not assigned before: an assignment would make run-time values of the settings.
    _dkdv_partitions(
        q_desc, k_desc, v_desc, do_desc, sums2_desc, delta_desc, dk_desc, dv_desc, dk_share, dv_share,
        kept, stream, work, Mode(CAUSAL, WINDOWED, SPLIT, HEAD_DIM),
    )  # fmt: skip


# dQ -------------------------------------------------------------------------------------------------------------------


@gluon.jit
def _walk_keys(q, do, dq, sums2, delta, stream, slot, phase, work, row, start, count, mode, MASKED: gl.constexpr):
    """Add the key blocks start, start - 1, ..., of which there are ``count``."""
    BLOCK: gl.constexpr = stream.a.shape[3]
    D: gl.constexpr = stream.a.shape[4]
    for back in range(count):
        s, dp = _scores(q, do, stream, slot, phase)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * work.scale2 - sums2[:, None])
        if MASKED:
            position = row + work.kv_len - work.q_len + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(BLOCK)))
            key = (start - back) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, accumulator(BLOCK)))
            p = gl.where(_seen(position[:, None], key[None, :], work.kv_len, work.window, mode), p, 0.0)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds16 = _operand(p * (dp - delta[:, None]), D, stream.a.dtype)
        dq = warpgroup_mma(ds16, stream.a.index(slot).reshape([BLOCK, D]), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(stream.empty.index(slot))
        slot, phase = advance(slot, phase, stream.a.shape[0])
    return dq, slot, phase


@gluon.jit
def _consume_keys(dq_desc, sums2, delta, rows_total, kept, stream, work, mode, CONSUMER: gl.constexpr):
    BLOCK: gl.constexpr = stream.a.shape[3]
    D: gl.constexpr = stream.a.shape[4]
    tile, b, head = locate(work, gl.program_id(0), mode.causal)
    first_row = tile * TILE_ROWS
    row = first_row + ROWS * CONSUMER
    lo, clear_lo, clear_hi, hi = kv_blocks(
        first_row, work.q_len, work.kv_len, work.window, BLOCK, mode.causal, mode.windowed
    )
    q = kept.a.index(CONSUMER).reshape([ROWS, D])
    do = kept.b.index(CONSUMER).reshape([ROWS, D])
    # The workspace has whole tiles of rows, so nothing is cut off here.
    at = head.to(gl.int64) * rows_total + b * work.padded + row
    at += gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(BLOCK)))
    sums2 = gl.load(sums2 + at)
    delta = gl.load(delta + at)
    dq = gl.zeros([ROWS, D], gl.float32, accumulator(D))
    slot = 0
    phase = 0
    mbarrier.wait(kept.ready.index(CONSUMER), 0)
    # The keys beyond the last are zeros, and weigh nothing in dq, but their weights may be infinite: they are masked.
    count = hi - clear_hi
    dq, slot, phase = _walk_keys(q, do, dq, sums2, delta, stream, slot, phase, work, row, hi - 1, count, mode, True)
    count = clear_hi - clear_lo
    dq, slot, phase = _walk_keys(
        q, do, dq, sums2, delta, stream, slot, phase, work, row, clear_hi - 1, count, mode, False
    )
    if mode.windowed:
        count = clear_lo - lo
        dq, slot, phase = _walk_keys(
            q, do, dq, sums2, delta, stream, slot, phase, work, row, clear_lo - 1, count, mode, True
        )
    _leave((dq * work.scale).to(stream.a.dtype), dq_desc, [b, head, row, 0], kept.a.index(CONSUMER), D)
    tma.store_wait(0)


@gluon.jit
def _produce_keys(q_desc, k_desc, v_desc, do_desc, kept, stream, work, mode):
    BLOCK: gl.constexpr = stream.a.shape[3]
    tile, b, head = locate(work, gl.program_id(0), mode.causal)
    row = tile * TILE_ROWS
    lo, _, _, hi = kv_blocks(row, work.q_len, work.kv_len, work.window, BLOCK, mode.causal, mode.windowed)
    for c in gl.static_range(CONSUMERS):
        _keep(q_desc, do_desc, [b, head, row + ROWS * c, 0], kept, c)
    slot = 0
    phase = 0
    for back in range(hi - lo):
        at = [b, head // work.group, (hi - 1 - back) * BLOCK, 0]
        fill(k_desc, at, stream.empty.index(slot), stream.a_ready.index(slot), phase, stream.a.index(slot))
        mbarrier.expect(stream.b_ready.index(slot), v_desc.block_type.nbytes)  # the slot is empty in both halves
        tma.async_copy_global_to_shared(v_desc, at, stream.b_ready.index(slot), stream.b.index(slot))
        slot, phase = advance(slot, phase, stream.a.shape[0])


@gluon.jit
def _dq_partitions(q_desc, k_desc, v_desc, do_desc, dq_desc, sums2, delta, rows_total, kept, stream, work, mode):
    gl.warp_specialize(
        [
            (_consume_keys, (dq_desc, sums2, delta, rows_total, kept, stream, work, mode, 0)),
            (_consume_keys, (dq_desc, sums2, delta, rows_total, kept, stream, work, mode, 1)),
            (_produce_keys, (q_desc, k_desc, v_desc, do_desc, kept, stream, work, mode)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit(do_not_specialize=[*_LENGTHS, "padded", "rows_total"])
def gluon_dq(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_desc,
    sums2,
    delta,
    scale2,
    scale,
    tiles,
    heads,
    all_heads,
    section,
    q_len,
    kv_len,
    window,
    padded,
    rows_total,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    GROUP: gl.constexpr,
):
    kept = Kept(_ring(q_desc, CONSUMERS), _ring(do_desc, CONSUMERS), barriers(CONSUMERS, 1))
    a_ready = barriers(STAGES, 1)
    b_ready = barriers(STAGES, 1)
    empty = barriers(STAGES, CONSUMERS)
    stream = Stream(_ring(k_desc, STAGES), _ring(v_desc, STAGES), None, None, a_ready, b_ready, empty)
    fence_async_shared()
    work = Work(tiles, heads, all_heads, section, GROUP, 1, q_len, kv_len, window, padded, scale2, scale)
    _dq_partitions(
        q_desc, k_desc, v_desc, do_desc, dq_desc, sums2, delta, rows_total, kept, stream, work,
        Mode(CAUSAL, WINDOWED, False, 0),
    )  # fmt: skip
