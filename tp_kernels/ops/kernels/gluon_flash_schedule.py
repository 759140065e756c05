"""What the Gluon attention kernels share: which tile, which key blocks, which slot of a ring, in which phase.

The functions are plain arithmetic, so that the tests run the very same source on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

__all__ = [
    "CONSUMERS",
    "ROWS",
    "TILE_ROWS",
    "Rings",
    "Work",
    "accumulator",
    "advance",
    "barriers",
    "fill",
    "kv_blocks",
    "locate",
    "nth_tile",
    "q_blocks",
    "sequence",
]

ROWS = gl.constexpr(64)  # of a consumer: the M of one wgmma
CONSUMERS = gl.constexpr(2)
TILE_ROWS = gl.constexpr(128)


class Rings(NamedTuple):
    """Shared memory of the key and value blocks, the barriers that hand them over, and whose turn it is to multiply."""

    k: Any
    v: Any
    k_ready: Any
    k_empty: Any
    v_ready: Any
    v_empty: Any
    turns: Any


class Work(NamedTuple):
    """All there is to do: lengths, query tiles a head, query heads of one and of all batches, heads a section."""

    cu_q: Any
    cu_k: Any
    q_len: Any
    kv_len: Any
    window: Any
    tiles: Any
    heads: Any
    all_heads: Any
    section: Any


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring, and its phase bit, which flips with every round."""
    return (slot + 1) % SLOTS, phase ^ ((slot + 1) // SLOTS)


@gluon.jit
def kv_blocks(row, q_len, kv_len, window, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr):
    """Key blocks that rows [row, row + TILE_ROWS) see: [lo, hi), of which [clear_lo, clear_hi) need no mask.

    They are walked from hi - 1 down, and the first is always masked, hence lo <= clear_lo <= clear_hi < hi; lo = hi
    if there is nothing to see. Row i stands at position i + kv_len - q_len. Divisions are of numbers >= 0 only, because
    a kernel rounds towards zero and Python down.
    """
    first = row + kv_len - q_len
    last = min(row + TILE_ROWS, q_len) - 1 + kv_len - q_len
    keys = kv_len
    clear = kv_len
    if CAUSAL:
        keys = max(min(kv_len, last + 1), 0)
        clear = max(min(kv_len, first + 1), 0)
    lo = 0
    clear_lo = 0
    if WINDOWED:
        lo = max(first - window + 1, 0) // BLOCK_N
        clear_lo = (max(last - window + 1, 0) + BLOCK_N - 1) // BLOCK_N
    hi = max((keys + BLOCK_N - 1) // BLOCK_N, lo)
    clear_hi = max(min(clear // BLOCK_N, hi - 1), lo)
    return lo, min(max(clear_lo, lo), clear_hi), clear_hi, hi


@gluon.jit
def q_blocks(row, q_len, kv_len, window, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr):
    """Query blocks that see keys [row, row + TILE_ROWS): [lo, hi), of which [clear_lo, clear_hi) need no mask.

    Queries from q_len on need none: they weigh nothing. Query i stands at position i + kv_len - q_len.
    """
    shift = kv_len - q_len
    last = min(row + TILE_ROWS, kv_len) - 1
    lo = 0
    clear_lo = 0
    hi = (q_len + BLOCK_M - 1) // BLOCK_M
    clear_hi = hi
    if WINDOWED:
        hi = (max(min(q_len, last + window - shift), 0) + BLOCK_M - 1) // BLOCK_M
        clear_hi = min(hi, max(row + window - shift, 0) // BLOCK_M)
    if CAUSAL:
        lo = min(max(row - shift, 0) // BLOCK_M, hi)
        clear_lo = min((max(last - shift, 0) + BLOCK_M - 1) // BLOCK_M, hi)
    return lo, clear_lo, max(clear_hi, clear_lo), hi


@gluon.jit
def nth_tile(turn, program, programs):
    """Index of a program's tile: to and fro, so that nobody always gets the heaviest of a round."""
    return turn * programs + program + (turn % 2) * (programs - 1 - 2 * program)


@gluon.jit
def locate(work, index, CAUSAL: gl.constexpr):
    """Tile, batch and head of an index: the heads of a section vary fastest, the tiles with most keys come first."""
    before = index // (work.section * work.tiles)
    inside = index - before * work.section * work.tiles
    here = min(work.section, work.all_heads - before * work.section)
    rank = inside // here
    head = before * work.section + inside - rank * here
    if CAUSAL:
        rank = work.tiles - 1 - rank
    return rank, head // work.heads, head % work.heads


@gluon.jit
def sequence(work, b, VARLEN: gl.constexpr):
    """Where a sequence starts among the packed rows (0 if it has a batch index of its own), and its lengths."""
    q_start = 0
    k_start = 0
    q_len = work.q_len
    kv_len = work.kv_len
    if VARLEN:
        q_start = gl.load(work.cu_q + b)
        k_start = gl.load(work.cu_k + b)
        q_len = gl.load(work.cu_q + b + 1) - q_start
        kv_len = gl.load(work.cu_k + b + 1) - k_start
    return q_start, k_start, q_len, kv_len


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """A row of barriers, each of which completes a phase with so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def fill(desc, coordinates, empty, ready, phase, slot):
    """Wait until a slot is empty, and start copying a block into it.

    The producer waits for the phase before its own: a fresh barrier counts as having completed one, so the first round
    goes through at once. Bytes outside of the tensor are counted too; they arrive as zeros.
    """
    mbarrier.wait(empty, phase ^ 1)
    mbarrier.expect(ready, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, coordinates, ready, slot)


@gluon.constexpr_function
def accumulator(n):
    """Layout of a [64, n] accumulator of one warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])
