"""Row-parallel projection, all-reduce and what follows it in one kernel over peer memory, tile by tile.

    sum = round(round(sum over ranks of round(x @ weight.T)) + bias) + residual;  normed = rms_norm(sum) * norm_weight

Row blocks (the rows of one row of tiles) belong to the ranks in turn: row block b is number ``b // world``, its step,
of rank ``b % world``, its owner. So all ranks own equal shares of any number of rows, and whoever walks the row blocks
in order serves all owners alike. There are three kinds of work:

    multiply  a tile in fp32, rounded, stored into the owner's staging half, in the slot of the rank that multiplied;
              with the last tile of a row block, the flag ``arrived`` is raised at the owner
    reduce    rows of an own row block, when it has arrived from all ranks: the slots are added in fp32 and rank order,
              what follows is applied, the results go to the caller's tensors and in place of the first slots; with the
              last rows of a row block, the flag ``finished`` is raised at all ranks
    pull      rows of another's row block, when it is finished: from the owner's slots to the caller's tensors

Work is a list that is the same on all ranks up to the number of tile columns, and blocks take entries from its front,
one after the other, until it is empty. Frame i of the list holds the tiles of band i (some steps of all owners), then
the rows to reduce of band i - 1, then the rows to pull of band i - 2: while a band crosses the links, the next is
multiplied. An entry waits only for entries that stand before it in the list of some rank: reduce for multiply, pull for
reduce, both of an earlier frame. Consider the first frame, and in it the first kind, that is not done on all ranks:
nothing that it waits for is missing, and all entries before it have been taken by blocks that run. So there is always a
block that can go on, as long as one block of each rank runs: grids need neither be equal nor fit on the GPU at once,
and nothing is gained by a cooperative launch. (Two such kernels of different groups at once may still starve each other
when each fills one GPU and waits for the other GPU; the deadline ends that.)

Why there is no exchange, neither before the first store to a peer nor after the last read. Rank r in call n stores to
half ``n % 2`` of rank p. r's call n - 1 has ended, and every call ends only when all peers have been seen in it (here:
each result needed the tiles of all ranks), so all ranks' calls n - 2, the last that touched this half, have ended, and
calls n - 1 use the other half. What is read in call n is overwritten in call n + 2 at the earliest, after all ranks
have been seen in call n + 1, hence at the end of call n. Flags hold the number of the call, which never comes again;
row blocks that a call does not have keep an older one. Counters are back at zero when the call ends. So calls of this
kind and of all others may follow each other in any order, captured and replayed ones included;
tests/kernels/test_peer_protocol.py explores it.

All ranks must agree on rows, columns, dtype, what follows and ``block_m``. Anything else is a rank's own business: how
many features it has, the other extents of its tiles, whether descriptors can address its operands, its grid.

Bits: those of ``matmul`` with the same tile and ``peer_norm`` after it: they depend neither on who takes which entry
nor on timing. Failure: as in csrc/kernels/peer_sync.cuh. A block that gave up takes no more entries and counts nothing,
the last one to leave is then missing, and the records keep the old count. Who only pulls names the owner, which may
itself have waited for another rank: the owner's own record names that one.

Stores to peers are ordinary ones, because a release does not order what goes through tensor descriptors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tp_kernels.comm.symmetric_sizes import (
    ARRIVED_OFFSET,
    FINISHED_OFFSET,
    MULTIPLIED_OFFSET,
    REDUCED_OFFSET,
    TAKEN_OFFSET,
)
from tp_kernels.ops.kernels.matmul import tile_of
from tp_kernels.ops.kernels.peer_flags import (
    await_flags,
    is_last,
    raise_flags,
    recall,
    signal_value,
    write_records,
)
from tp_kernels.ops.kernels.peer_norm import _place, _sum_of_squares

__all__ = ["MULTIPLY", "PULL", "REDUCE", "linear_kernel"]

# Kinds of work; a launch does all of them, but in the interpreter, which runs one rank after the other.
MULTIPLY, REDUCE, PULL = 1, 2, 4

_ARRIVED = tl.constexpr(ARRIVED_OFFSET)
_FINISHED = tl.constexpr(FINISHED_OFFSET)
_MULTIPLIED = tl.constexpr(MULTIPLIED_OFFSET)
_REDUCED = tl.constexpr(REDUCED_OFFSET)
_TAKEN = tl.constexpr(TAKEN_OFFSET)


@triton.jit
def _product(x, weight, off_m, off_n, M, N, K, stride_x, stride_weight,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
             TMA: tl.constexpr):  # fmt: skip
    """One tile of x @ weight.T in fp32; the loops of ``matmul``'s two kernels."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for start in range(0, K, BLOCK_K):
            acc = tl.dot(x.load([off_m, start]), weight.load([off_n, start]).T, acc)
    else:
        rows = tl.minimum(off_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
        cols = tl.minimum(off_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        ks = tl.arange(0, BLOCK_K)
        x_at = x + rows[:, None] * stride_x + ks[None, :]
        w_at = weight + cols[None, :] * stride_weight + ks[:, None]
        for start in range(0, K, BLOCK_K):
            if EVEN_K:
                a, b = tl.load(x_at), tl.load(w_at)
            else:
                inside = ks < K - start
                a = tl.load(x_at, mask=inside[None, :], other=0.0)
                b = tl.load(w_at, mask=inside[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            x_at += BLOCK_K
            w_at += BLOCK_K
    return acc


@triton.jit
def _reduce(
    staged,  # own slots, at the first of the rows
    bias_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,
    normed_ptr,
    scratch_ptr,  # of this block
    slot,  # elements from slot to slot
    first,  # row of the results
    rows,
    N,
    eps,
    COLS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PER_PACK: tl.constexpr,
    WORLD: tl.constexpr,
):
    ELEMENT: tl.constexpr = out_ptr.dtype.element_ty
    turn = 0
    for row in range(rows):
        for start in range(0, N, COLS):
            cols = start + tl.arange(0, COLS)
            mask = cols < N
            place = staged + row * N + cols
            at = first.to(tl.int64) * N + row * N + cols
            s = tl.zeros([COLS], tl.float32)
            for peer in tl.static_range(WORLD):
                # .cg: not from L1, which may hold what was there before.
                s += tl.load(place + peer * slot, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            s = s.to(ELEMENT).to(tl.float32)
            if bias_ptr is not None:
                s = (s + tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)).to(ELEMENT).to(tl.float32)
            if residual_ptr is not None:
                s = (s + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(ELEMENT).to(tl.float32)
            if norm_ptr is not None:
                # Two sets in turn: a thread may still read the last row's when others write this row's.
                mean = _sum_of_squares(s, scratch_ptr + turn * CHUNKS, CHUNKS, PER_PACK) / N
                turn = 1 - turn
                normed = (s * tl.rsqrt(mean + eps)).to(ELEMENT).to(tl.float32)
                normed = (normed * tl.load(norm_ptr + cols, mask=mask, other=0.0).to(tl.float32)).to(ELEMENT)
            tl.debug_barrier()  # all threads have read the slots
            tl.store(out_ptr + at, s.to(ELEMENT), mask=mask)
            tl.store(place, s.to(ELEMENT), mask=mask)
            if norm_ptr is not None:
                tl.store(normed_ptr + at, normed, mask=mask)
                tl.store(place + slot, normed, mask=mask)


@triton.jit
def _pull(source, out_ptr, first, rows, N, COPY: tl.constexpr):
    """Rows without gaps from a peer's memory."""
    target = out_ptr + first.to(tl.int64) * N
    for start in range(0, rows * N, COPY):
        at = start + tl.arange(0, COPY)
        mask = at < rows * N
        tl.store(target + at, tl.load(source + at, mask=mask, cache_modifier=".cg"), mask=mask)


@triton.jit
def _frame_begin(frame, band_tiles, tiles, reduces, pulls, bands):
    """How many entries the list has before a frame."""
    before = tl.minimum(frame * band_tiles, tiles) + tl.maximum(frame - 2, 0) * pulls
    return before + tl.minimum(tl.maximum(frame - 1, 0), bands) * reduces


@triton.jit(do_not_specialize=["rank", "M", "timeout_ms"])
def linear_kernel(
    x,  # [M, K]: pointer, or descriptor if TMA
    weight,  # [N, K]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    norm_ptr,  # [N] or None
    out_ptr,  # [M, N]: the sum
    normed_ptr,  # [M, N], or None as norm_ptr is
    scratch_ptr,  # fp32 [programs, 2, CHUNKS]
    table_ptr,  # int64 [2 * WORLD + 1]: every rank's data, every rank's flags, the error record
    rank,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    slot,  # elements of a half that belong to one rank
    half_bytes,
    timeout_ms,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BAND: tl.constexpr,  # steps
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    COPY: tl.constexpr,
    CHUNKS: tl.constexpr,
    PER_PACK: tl.constexpr,
    WORLD: tl.constexpr,
    WORK: tl.constexpr,
    WAITS: tl.constexpr,
):
    ELEMENT: tl.constexpr = out_ptr.dtype.element_ty
    EVERYONE: tl.constexpr = (1 << WORLD) - 1
    PARTS: tl.constexpr = BLOCK_M // ROWS
    flags = tl.load(table_ptr + WORLD + rank)
    calls, failed = recall(flags)
    half = (calls % 2) * half_bytes
    # Not a wait: it makes "failed" equal in all threads, of which some may have looked before another block gave up.
    lost = await_flags(table_ptr, rank, 0, calls * 0, calls, timeout_ms, failed, WORLD, WAITS)

    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles, band_tiles = tiles_m * tiles_n, BAND * WORLD * tiles_n
    bands = tl.cdiv(tiles_m, BAND * WORLD)
    reduces, pulls = BAND * PARTS, BAND * (WORLD - 1) * PARTS
    end = _frame_begin(bands + 2, band_tiles, tiles, reduces, pulls, bands)
    taken = (flags + _TAKEN).to(tl.pointer_type(tl.int32))
    frame, begin = bands * 0, bands * 0
    following = _frame_begin(1, band_tiles, tiles, reduces, pulls, bands)
    entry = end
    if lost == 0:
        entry = tl.atomic_add(taken, 1, sem="acq_rel", scope="gpu")
    while entry < end:
        while entry >= following:
            frame += 1
            begin = following
            following = _frame_begin(frame + 1, band_tiles, tiles, reduces, pulls, bands)
        entry -= begin
        frame_tiles = tl.minimum((frame + 1) * band_tiles, tiles) - tl.minimum(frame * band_tiles, tiles)
        frame_reduces = tl.where((frame >= 1) & (frame <= bands), reduces, 0)
        if entry < frame_tiles:
            if WORK & 1:
                position, tile_n = tile_of(frame * band_tiles + entry, tiles_m, tiles_n, BAND * WORLD)
                step = position // WORLD
                # The last step may lack owners. The others' rows come first, beginning with the next rank's.
                owners = tl.minimum(tiles_m - step * WORLD, WORLD)
                owner = (rank + 1 + position % WORLD) % owners
                row_block = step * WORLD + owner
                off_m, off_n = row_block * BLOCK_M, tile_n * BLOCK_N
                acc = _product(
                    x, weight, off_m, off_n, M, N, K, stride_x, stride_weight, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA
                )
                rows, cols = tl.arange(0, BLOCK_M), off_n + tl.arange(0, BLOCK_N)
                staged = _place(table_ptr, owner, half, ELEMENT) + rank * slot.to(tl.int64)
                at = (step * BLOCK_M + rows).to(tl.int64)[:, None] * N + cols[None, :]
                mask = (rows < M - off_m)[:, None] & (cols < N)[None, :]
                tl.store(staged + at, acc.to(ELEMENT), mask=mask)
                if is_last(flags, 4 * row_block + _MULTIPLIED, tiles_n):
                    arrived = ((step * WORLD + rank) * 8).to(tl.int64) + _ARRIVED
                    raise_flags(table_ptr, 1 << owner, arrived, signal_value(calls, 0), WORLD, WAITS)
        elif entry - frame_tiles < frame_reduces:
            if WORK & 2:
                entry -= frame_tiles
                step, part = (frame - 1) * BAND + entry // PARTS, entry % PARTS
                off_m = (step * WORLD + rank) * BLOCK_M
                first = off_m + part * ROWS
                if first < M:
                    arrived = (step * WORLD * 8).to(tl.int64) + _ARRIVED
                    lost = await_flags(
                        table_ptr, rank, EVERYONE, arrived, signal_value(calls, 0), timeout_ms, 0, WORLD, WAITS
                    )
                    if lost == 0:
                        staged = _place(table_ptr, rank, half, ELEMENT)
                        staged += (step * BLOCK_M + part * ROWS).to(tl.int64) * N
                        _reduce(
                            staged, bias_ptr, residual_ptr, norm_ptr, out_ptr, normed_ptr,
                            scratch_ptr + 2 * CHUNKS * tl.program_id(0), slot.to(tl.int64), first,
                            tl.minimum(M - first, ROWS), N, eps, COLS, CHUNKS, PER_PACK, WORLD,
                        )  # fmt: skip
                        if is_last(flags, 4 * step + _REDUCED, tl.cdiv(tl.minimum(M - off_m, BLOCK_M), ROWS)):
                            finished = ((step * WORLD + rank) * 8).to(tl.int64) + _FINISHED
                            raise_flags(table_ptr, EVERYONE, finished, signal_value(calls, 1), WORLD, WAITS)
        else:
            if WORK & 4:
                entry -= frame_tiles + frame_reduces
                step = (frame - 2) * BAND + entry // ((WORLD - 1) * PARTS)
                part = entry % PARTS
                owner = (rank + 1 + entry // PARTS % (WORLD - 1)) % WORLD
                first = (step * WORLD + owner) * BLOCK_M + part * ROWS
                if first < M:
                    finished = (step * WORLD * 8).to(tl.int64) + _FINISHED
                    lost = await_flags(
                        table_ptr, rank, 1 << owner, finished, signal_value(calls, 1), timeout_ms, 0, WORLD, WAITS
                    )
                    if lost == 0:
                        source = _place(table_ptr, owner, half, ELEMENT)
                        source += (step * BLOCK_M + part * ROWS).to(tl.int64) * N
                        rows = tl.minimum(M - first, ROWS)
                        _pull(source, out_ptr, first, rows, N, COPY)
                        if norm_ptr is not None:
                            _pull(source + slot, normed_ptr, first, rows, N, COPY)
        entry = end
        if lost == 0:
            entry = tl.atomic_add(taken, 1, sem="acq_rel", scope="gpu")
    if entry == end + tl.num_programs(0) - 1 and lost == 0:  # all others have left, each with one behind the end
        tl.store(taken, 0)
        if WORK & 4:
            write_records(flags, calls)
