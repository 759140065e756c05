"""The warp-specialised Gluon kernel of ``gluon_flash_attention.py``: one producer warp and two consumers of 4 warps."""

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
    Rings,
    Work,
    accumulator,
    advance,
    barriers,
    fill,
    kv_blocks,
    locate,
    nth_tile,
    sequence,
)

__all__ = ["gluon_flash_forward"]

LN_2 = gl.constexpr(0.6931471805599453)


class Mode(NamedTuple):
    """Compile-time settings. ``right_edge``: more than the first key block of a tile may need the causal mask."""

    causal: Any
    windowed: Any
    varlen: Any
    right_edge: Any
    pingpong: Any
    own_out: Any
    persistent: Any
    group: Any
    head_dim: Any


class Queries(NamedTuple):
    """Shared memory of each consumer's query rows and results (one and the same unless ``own_out``), and barriers."""

    q: Any
    out: Any
    ready: Any
    empty: Any


class Result(NamedTuple):
    """Where results go; ``out`` and its strides are for packed sequences, the descriptor for all others."""

    desc: Any
    out: Any
    out_stride_s: Any
    out_stride_h: Any
    lse: Any
    lse_stride_b: Any
    lse_stride_h: Any
    lse_stride_s: Any


class Place(NamedTuple):
    """How far a consumer has come: slot and phase of the next key and value block, phase of the next turn and query."""

    k_slot: Any
    k_phase: Any
    v_slot: Any
    v_phase: Any
    turn: Any
    q_phase: Any


class Rows(NamedTuple):
    """A consumer's query rows as the softmax sees them: factor of the scores, first row's position, bounds of keys."""

    scale: Any
    position: Any
    kv_len: Any
    window: Any


# Producer -------------------------------------------------------------------------------------------------------------


@gluon.jit
def _produce_tile(q_desc, k_desc, v_desc, queries, rings, work, mode, index, slot, phase, q_phase):
    BLOCK_N: gl.constexpr = rings.k.shape[3]
    tile, b, head = locate(work, index, mode.causal)
    q_start, k_start, q_len, kv_len = sequence(work, b, mode.varlen)
    row = tile * TILE_ROWS
    if row < q_len:
        lo, _, _, hi = kv_blocks(row, q_len, kv_len, work.window, BLOCK_N, mode.causal, mode.windowed)
        if mode.varlen:
            batch = 0
        else:
            batch = b
        for c in gl.static_range(CONSUMERS):
            at = [batch, head, q_start + row + ROWS * c, 0]
            fill(q_desc, at, queries.empty.index(c), queries.ready.index(c), q_phase, queries.q.index(c))
        q_phase ^= 1
        for back in range(hi - lo):
            at = [batch, head // mode.group, k_start + (hi - 1 - back) * BLOCK_N, 0]
            fill(k_desc, at, rings.k_empty.index(slot), rings.k_ready.index(slot), phase, rings.k.index(slot))
            fill(v_desc, at, rings.v_empty.index(slot), rings.v_ready.index(slot), phase, rings.v.index(slot))
            slot, phase = advance(slot, phase, rings.k.shape[0])
    return slot, phase, q_phase


@gluon.jit
def _produce(q_desc, k_desc, v_desc, queries, rings, work, mode):
    slot = 0
    phase = 0
    q_phase = 0
    if mode.persistent:
        for turn in range(gl.cdiv(work.tiles * work.all_heads, gl.num_programs(0))):
            index = nth_tile(turn, gl.program_id(0), gl.num_programs(0))
            if index < work.tiles * work.all_heads:
                slot, phase, q_phase = _produce_tile(
                    q_desc, k_desc, v_desc, queries, rings, work, mode, index, slot, phase, q_phase
                )
    else:
        index = gl.program_id(0)
        _produce_tile(q_desc, k_desc, v_desc, queries, rings, work, mode, index, slot, phase, q_phase)


# Consumer -------------------------------------------------------------------------------------------------------------


@gluon.jit
def _softmax(qk, m, total, rows, key, mode, MASKED: gl.constexpr):
    """One step of the online softmax: unnormalised probabilities, and the factor of what was summed up before.

    A row that has seen no key yet keeps m = -inf; measured from 0 instead, its probabilities and its factor are
    exp2(-inf) = 0 where -inf - -inf would be NaN.
    """
    BLOCK_N: gl.constexpr = qk.shape[1]
    if MASKED:
        position = rows.position + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(BLOCK_N)))
        keys = key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, accumulator(BLOCK_N)))[None, :]
        end = gl.zeros_like(position) + rows.kv_len
        if mode.causal:
            end = gl.minimum(end, position + 1)
        seen = keys < end[:, None]
        if mode.windowed:
            seen = seen & (keys > (position - rows.window)[:, None])
        qk = gl.where(seen, qk, float("-inf"))
    m_new = gl.maximum(m, gl.max(qk, 1) * rows.scale)
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(qk * rows.scale - origin[:, None])
    alpha = gl.exp2(m - origin)
    return p, m_new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _operand(p, D: gl.constexpr, DTYPE: gl.constexpr):
    """Probabilities as the left operand of the second product; they stay in the registers they are in."""
    return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, accumulator(D), 2))


@gluon.jit
def _scaled(acc, factor, D: gl.constexpr):
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, accumulator(D)))[:, None]


@gluon.jit
def _walk(q, acc, p, m, total, rings, place, rows, start, count, mode, MASKED: gl.constexpr, CONSUMER: gl.constexpr):
    """Blocks start, start - 1, ..., of which there are ``count``.

    Enters with ``p`` of the block before, still to be multiplied with its values, and leaves so. ``p`` travels between
    iterations in fp32: packed to 16 bits it would be taken apart and put together again (64 instructions more a block).
    """
    STAGES: gl.constexpr = rings.k.shape[0]
    BLOCK_N: gl.constexpr = rings.k.shape[3]
    D: gl.constexpr = rings.k.shape[4]
    k_slot, k_phase, v_slot, v_phase, turn, q_phase = place
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, accumulator(BLOCK_N))
    for back in range(count):
        p16 = _operand(p, D, rings.v.dtype)
        mbarrier.wait(rings.k_ready.index(k_slot), k_phase)
        if mode.pingpong:
            # Both products are issued in one go, then the other consumer may: its softmax falls into our products.
            # Consumer 0 has the first turn: it waits for the phase before the first, which counts as completed.
            mbarrier.wait(rings.v_ready.index(v_slot), v_phase)
            mbarrier.wait(rings.turns.index(CONSUMER), turn ^ (1 - CONSUMER))
        k = rings.k.index(k_slot).reshape([BLOCK_N, D])
        qk = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        if not mode.pingpong:
            mbarrier.wait(rings.v_ready.index(v_slot), v_phase)
        acc = warpgroup_mma(p16, rings.v.index(v_slot).reshape([BLOCK_N, D]), acc, is_async=True)
        if mode.pingpong:
            mbarrier.arrive(rings.turns.index(1 - CONSUMER))
            turn ^= 1
        # The older of the two products in flight is done: nobody here reads the keys any more. (The compiler puts a
        # barrier of the partition before each arrival, so the one thread that arrives speaks for all four warps.)
        qk = warpgroup_mma_wait(1, deps=[qk])
        mbarrier.arrive(rings.k_empty.index(k_slot))
        p, m, total, alpha = _softmax(qk, m, total, rows, (start - back) * BLOCK_N, mode, MASKED)
        # This phase is over already, the slot being ours, so this never waits. But its loop is a border between basic
        # blocks: without one, ptxas (12.8 and 12.9) moves the next wait up to before the exponentials, which then
        # overlap with nothing.
        mbarrier.wait(rings.v_ready.index(v_slot), v_phase)
        acc, p16 = warpgroup_mma_wait(0, deps=[acc, p16])
        mbarrier.arrive(rings.v_empty.index(v_slot))
        acc = _scaled(acc, alpha, D)
        k_slot, k_phase = advance(k_slot, k_phase, STAGES)
        v_slot, v_phase = advance(v_slot, v_phase, STAGES)
    return acc, p, m, total, Place(k_slot, k_phase, v_slot, v_phase, turn, q_phase)


@gluon.jit
def _clear_tail(v, valid):
    """Zero the rows of a value block from ``valid`` on: beyond the end of a packed sequence anything may lie, and the
    probability 0 times infinity is NaN. Both consumers do this, with the same values."""
    BLOCK_N: gl.constexpr = v.shape[0]
    D: gl.constexpr = v.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))[:, None]
    value = v.load(LAYOUT)
    v.store(gl.where(row < valid, value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def _store_packed(staged, result, start, row, q_len, head, HEAD_DIM: gl.constexpr):
    """Rows of a packed sequence, 16 bytes a thread, none beyond the sequence's end."""
    D: gl.constexpr = staged.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    values = staged.load(LAYOUT)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    base = result.out + head.to(gl.int64) * result.out_stride_h
    pointers = base + (start + rows).to(gl.int64)[:, None] * result.out_stride_s + columns
    gl.store(pointers, values, mask=(rows < q_len)[:, None] & (columns < HEAD_DIM))


@gluon.jit
def _consume_tile(result, scale, queries, rings, work, mode, index, place, CONSUMER: gl.constexpr):
    STAGES: gl.constexpr = rings.k.shape[0]
    BLOCK_N: gl.constexpr = rings.k.shape[3]
    D: gl.constexpr = rings.k.shape[4]
    tile, b, head = locate(work, index, mode.causal)
    q_start, _, q_len, kv_len = sequence(work, b, mode.varlen)
    row = tile * TILE_ROWS
    if row < q_len:
        lo, clear_lo, clear_hi, hi = kv_blocks(row, q_len, kv_len, work.window, BLOCK_N, mode.causal, mode.windowed)
        row += ROWS * CONSUMER
        rows = Rows(scale, row + kv_len - q_len, kv_len, work.window)
        q = queries.q.index(CONSUMER).reshape([ROWS, D])
        acc = gl.zeros([ROWS, D], gl.float32, accumulator(D))
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, accumulator(BLOCK_N)))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, accumulator(BLOCK_N)))
        k_slot, k_phase, v_slot, v_phase, turn, q_phase = place
        mbarrier.wait(queries.ready.index(CONSUMER), q_phase)
        q_phase ^= 1
        place = Place(k_slot, k_phase, v_slot, v_phase, turn, q_phase)
        if hi > lo:
            mbarrier.wait(rings.k_ready.index(k_slot), k_phase)
            k = rings.k.index(k_slot).reshape([BLOCK_N, D])
            zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, accumulator(BLOCK_N))
            qk = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
            qk = warpgroup_mma_wait(0, deps=[qk])
            mbarrier.arrive(rings.k_empty.index(k_slot))
            k_slot, k_phase = advance(k_slot, k_phase, STAGES)
            p, m, total, _alpha = _softmax(qk, m, total, rows, (hi - 1) * BLOCK_N, mode, True)
            if mode.varlen:  # noqa: SIM102 (known when compiling, unlike the other)
                if hi * BLOCK_N > kv_len:
                    mbarrier.wait(rings.v_ready.index(v_slot), v_phase)
                    _clear_tail(rings.v.index(v_slot).reshape([BLOCK_N, D]), kv_len - (hi - 1) * BLOCK_N)
            place = Place(k_slot, k_phase, v_slot, v_phase, turn, q_phase)
            if mode.right_edge:
                count = hi - 1 - clear_hi
                acc, p, m, total, place = _walk(
                    q, acc, p, m, total, rings, place, rows, hi - 2, count, mode, True, CONSUMER
                )
            count = clear_hi - clear_lo
            acc, p, m, total, place = _walk(
                q, acc, p, m, total, rings, place, rows, clear_hi - 1, count, mode, False, CONSUMER
            )
            if mode.windowed:
                count = clear_lo - lo
                acc, p, m, total, place = _walk(
                    q, acc, p, m, total, rings, place, rows, clear_lo - 1, count, mode, True, CONSUMER
                )
            k_slot, k_phase, v_slot, v_phase, turn, q_phase = place
            if mode.own_out:
                mbarrier.arrive(queries.empty.index(CONSUMER))  # all products with the queries are done
            mbarrier.wait(rings.v_ready.index(v_slot), v_phase)
            p16 = _operand(p, D, rings.v.dtype)
            acc = warpgroup_mma(p16, rings.v.index(v_slot).reshape([BLOCK_N, D]), acc, is_async=True)
            acc, p16 = warpgroup_mma_wait(0, deps=[acc, p16])
            mbarrier.arrive(rings.v_empty.index(v_slot))
            v_slot, v_phase = advance(v_slot, v_phase, STAGES)
            place = Place(k_slot, k_phase, v_slot, v_phase, turn, q_phase)
        elif mode.own_out:
            mbarrier.arrive(queries.empty.index(CONSUMER))
        out = _scaled(acc, 1.0 / gl.where(total == 0.0, 1.0, total), D).to(rings.v.dtype)
        staged = queries.out.index(CONSUMER)
        if mode.own_out:
            tma.store_wait(0)  # of the tile before
        staged.reshape([ROWS, D]).store(out)
        if mode.varlen:
            _store_packed(staged.reshape([ROWS, D]), result, q_start, row, q_len, head, mode.head_dim)
        else:
            fence_async_shared()  # then the compiler's barrier, then one thread starts the copy; rows beyond S are cut
            tma.async_copy_shared_to_global(result.desc, [b, head, row, 0], staged)
        if result.lse is not None:
            at = row + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(BLOCK_N)))
            value = gl.where(total == 0.0, float("-inf"), (m + gl.log2(total)) * LN_2)
            base = result.lse + head.to(gl.int64) * result.lse_stride_h
            if not mode.varlen:
                base += b.to(gl.int64) * result.lse_stride_b
            gl.store(base + (q_start + at).to(gl.int64) * result.lse_stride_s, value, mask=at < q_len)
        if not mode.own_out:
            if mode.varlen:
                fence_async_shared()  # the next queries come through the asynchronous proxy
            else:
                tma.store_wait(0)
            mbarrier.arrive(queries.empty.index(CONSUMER))
    return place


@gluon.jit
def _consume(result, scale, queries, rings, work, mode, CONSUMER: gl.constexpr):
    place = Place(0, 0, 0, 0, 0, 0)
    if mode.persistent:
        for turn in range(gl.cdiv(work.tiles * work.all_heads, gl.num_programs(0))):
            index = nth_tile(turn, gl.program_id(0), gl.num_programs(0))
            if index < work.tiles * work.all_heads:
                place = _consume_tile(result, scale, queries, rings, work, mode, index, place, CONSUMER)
    else:
        _consume_tile(result, scale, queries, rings, work, mode, gl.program_id(0), place, CONSUMER)
    tma.store_wait(0)  # shared memory must outlive the copies out of it


# Kernel ---------------------------------------------------------------------------------------------------------------


@gluon.jit
def _partitions(q_desc, k_desc, v_desc, result, scale, queries, rings, work, mode):
    gl.warp_specialize(
        [
            (_consume, (result, scale, queries, rings, work, mode, 0)),
            (_consume, (result, scale, queries, rings, work, mode, 1)),
            (_produce, (q_desc, k_desc, v_desc, queries, rings, work, mode)),
        ],
        [4, 1],
        [240, 24],
    )


# One compilation (seconds) must serve every length: nothing below gains from knowing that a number is 1, or even.
@gluon.jit(
    do_not_specialize=[
        "q_len",
        "kv_len",
        "window",
        "tiles",
        "heads",
        "all_heads",
        "section",
        "lse_stride_b",
        "lse_stride_h",
        "lse_stride_s",
    ]
)
def gluon_flash_forward(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    out,
    lse,
    cu_q,
    cu_k,
    scale,
    q_len,
    kv_len,
    window,
    tiles,
    heads,
    all_heads,
    section,
    out_stride_s,
    out_stride_h,
    lse_stride_b,
    lse_stride_h,
    lse_stride_s,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    VARLEN: gl.constexpr,
    RIGHT_EDGE: gl.constexpr,
    PINGPONG: gl.constexpr,
    OWN_OUT: gl.constexpr,
    PERSISTENT: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    D: gl.constexpr = q_desc.block_shape[3]
    BLOCK_N: gl.constexpr = k_desc.block_shape[2]
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    o_smem = q_smem
    if OWN_OUT:
        o_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    queries = Queries(q_smem, o_smem, barriers(CONSUMERS, 1), barriers(CONSUMERS, 1))
    k_ready = barriers(STAGES, 1)
    k_empty = barriers(STAGES, CONSUMERS)
    v_ready = barriers(STAGES, 1)
    v_empty = barriers(STAGES, CONSUMERS)
    rings = Rings(k_smem, v_smem, k_ready, k_empty, v_ready, v_empty, barriers(CONSUMERS, 1))
    fence_async_shared()  # the barriers are known to the asynchronous proxy; forking into partitions synchronises
    work = Work(cu_q, cu_k, q_len, kv_len, window, tiles, heads, all_heads, section)
    result = Result(o_desc, out, out_stride_s, out_stride_h, lse, lse_stride_b, lse_stride_h, lse_stride_s)
    # In the call and not assigned before: an assignment would make run-time values of the settings.
    _partitions(
        q_desc,
        k_desc,
        v_desc,
        result,
        scale,
        queries,
        rings,
        work,
        Mode(CAUSAL, WINDOWED, VARLEN, RIGHT_EDGE, PINGPONG, OWN_OUT, PERSISTENT, GROUP, HEAD_DIM),
    )
