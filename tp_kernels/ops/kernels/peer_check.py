"""What the peer-memory kernels rely on, tried by a Triton kernel: stores, loads and atomics on a peer's memory.

Twin of csrc/kernels/peer_check.cu, for installations whose native core was built without nvcc: the same patterns in the
same places, the same report. Workspace and waiting are those of ``peer_norm``, so what is tried is what the Triton
all-reduce does: ordinary stores, loads past L1, a flag that is released and acquired; and atomics besides.

A half of the workspace holds [world] slots that peers store to, one slot that peers load, and counters for every block
and peer. A block reads what blocks of its own index wrote.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_kernels.comm.symmetric_sizes import MAX_BLOCKS, MAX_WORLD, PACK_BYTES
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch, meta
from tp_kernels.ops.kernels.peer_norm import _exchange, _milliseconds, _place, _recall, _remember
from tp_kernels.ops.kernels.sizes import cdiv

__all__ = ["EVERYTHING", "aot_cases", "check"]

# Of a kernel: lay out the own memory, access the peers', look at what peers did. Tests play them one by one.
PREPARE, ACCESS, VERIFY = 1, 2, 4
EVERYTHING = PREPARE | ACCESS | VERIFY

_THREADS = 256
_BLOCK_WORDS = 4 * _THREADS  # a pack a thread

_MAX_WORLD = tl.constexpr(MAX_WORLD)
_PACK_WORDS = tl.constexpr(PACK_BYTES // 4)
_ADDS = tl.constexpr(_THREADS)  # by each block to each counter


@triton.jit
def _pattern(seed, KIND: tl.constexpr, source, target, word):
    """Different in every word, pair and call; ``KIND`` tells stored from own data."""
    h = seed ^ (word.to(tl.uint32) * 0x9E3779B1)
    pair = (KIND * _MAX_WORLD + source) * _MAX_WORLD + target
    h ^= (pair + tl.zeros_like(word)).to(tl.uint32) * 0x85EBCA77
    h ^= h >> 15
    return h * 0xC2B2AE3D


@triton.jit
def _wrong(place, seed, KIND: tl.constexpr, source, target, words, BLOCK: tl.constexpr):
    """How many of this block's words from ``place`` on are not the pattern's."""
    found = 0
    for start in range(tl.program_id(0) * BLOCK, words, tl.num_programs(0) * BLOCK):
        word = start + tl.arange(0, BLOCK)
        value = tl.load(place + word, mask=word < words, other=0, cache_modifier=".cg")
        differs = (value != _pattern(seed, KIND, source, target, word)) & (word < words)
        found += tl.sum(differs.to(tl.int32), axis=0)
    return found


@triton.jit
def _fill(place, seed, KIND: tl.constexpr, source, target, words, failed, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, words, tl.num_programs(0) * BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(place + word, _pattern(seed, KIND, source, target, word), mask=(word < words) & (failed == 0))


@triton.jit(do_not_specialize=["rank", "packs", "seed", "timeout_ms"])
def _check_kernel(
    report_ptr,  # [3, WORLD] int32 zeros: wrong words stored by a peer, loaded from it, adds of it that are missing
    table_ptr,  # int64 [2 * WORLD + 1]: every rank's data, every rank's flags, the error record
    rank,
    packs,  # of a slot: the compiler sees that no pack is cut
    seed,
    half_bytes,
    timeout_ms,
    PREPARES: tl.constexpr,
    ACCESSES: tl.constexpr,
    VERIFIES: tl.constexpr,
    BLOCK: tl.constexpr,
    WORLD: tl.constexpr,
    WAITS: tl.constexpr,
):
    calls, failed, half = _recall(table_ptr, rank, half_bytes, WORLD)
    seed, words = seed.to(tl.uint32), packs * _PACK_WORDS
    slot = words.to(tl.int64) * 4
    counters = half + (WORLD + 1) * slot + tl.program_id(0) * (4 * _MAX_WORLD)
    lost = failed
    if PREPARES:
        own = _place(table_ptr, rank, half + WORLD * slot, tl.uint32)
        _fill(own, seed, 1, rank, 0, words, failed, BLOCK)
        for source in range(WORLD):
            # Never a remainder of an earlier check that used the same seed.
            stored = _place(table_ptr, rank, half + source * slot, tl.uint32)
            _fill(stored, seed ^ 0xFFFFFFFF, 2, source, rank, words, failed, BLOCK)
        zeros = tl.zeros([_MAX_WORLD], tl.int32)
        at = _place(table_ptr, rank, counters, tl.int32) + tl.arange(0, _MAX_WORLD)
        tl.store(at, zeros, mask=zeros + failed == 0)
        lost = _exchange(table_ptr, rank, calls, 0, timeout_ms, lost, WORLD, WAITS)
    if ACCESSES:
        if lost == 0:
            for step in range(1, WORLD):
                peer = (rank + step) % WORLD
                theirs = _place(table_ptr, peer, half + rank * slot, tl.uint32)
                _fill(theirs, seed, 0, rank, peer, words, failed, BLOCK)
                ones = tl.full([_ADDS], 1, tl.int32)
                counter = _place(table_ptr, peer, counters, tl.int32) + rank
                tl.atomic_add(counter + (ones - 1), ones, sem="relaxed", scope="sys")
                loaded = _place(table_ptr, peer, half + WORLD * slot, tl.uint32)
                wrong = _wrong(loaded, seed, 1, peer, 0, words, BLOCK)
                tl.atomic_add(report_ptr + WORLD + peer, wrong, sem="relaxed")
        lost = _exchange(table_ptr, rank, calls, 1, timeout_ms, lost, WORLD, WAITS)
    if VERIFIES:
        added_ptr = _place(table_ptr, rank, counters, tl.int32)
        if lost == 0:
            for step in range(1, WORLD):
                peer = (rank + step) % WORLD
                found = _place(table_ptr, rank, half + peer * slot, tl.uint32)
                wrong = _wrong(found, seed, 0, peer, rank, words, BLOCK)
                tl.atomic_add(report_ptr + peer, wrong, sem="relaxed")
                adds = tl.load(added_ptr + peer, cache_modifier=".cg")
                tl.atomic_add(report_ptr + 2 * WORLD + peer, tl.abs(adds - _ADDS), sem="relaxed")
            _remember(table_ptr, rank, calls, WORLD)


def check(
    report: Tensor,
    table: Tensor,
    nbytes: int,
    seed: int,
    *,
    rank: int,
    world_size: int,
    half_bytes: int,
    max_blocks: int,
    timeout_ns: int,
    steps: int = EVERYTHING,
) -> None:
    """Every rank accesses every other's memory; a call of all ranks.

    Args:
        report: [3, world_size] int32 zeros; what was wrong, by peer: words that it stored here, words loaded from it,
            adds of it that did not arrive.
        table: int64 [2 * world_size + 1] on the GPU: addresses of all ranks' data, of their flags, of the error record.
        nbytes: of a slot, rounded up to whole packs.
        seed: below 2**31, the same on all ranks.
        half_bytes: of the workspace's halves; at least ``cuda_peer_check_half_bytes`` of the native core.
        max_blocks: largest grid, the same on all ranks.
        timeout_ns: deadline of a wait; whole milliseconds count.
        steps: which parts of the kernel run.
    """
    packs = cdiv(nbytes, PACK_BYTES)
    launch(
        _check_kernel,
        (min(cdiv(packs, _THREADS), max_blocks, MAX_BLOCKS),),
        report,
        table,
        rank,
        packs,
        seed,
        half_bytes,
        _milliseconds(timeout_ns),
        PREPARES=bool(steps & PREPARE),
        ACCESSES=bool(steps & ACCESS),
        VERIFIES=bool(steps & VERIFY),
        BLOCK=_BLOCK_WORDS,
        WORLD=world_size,
        WAITS=not INTERPRETED,
        num_warps=_THREADS // 32,
    )


def aot_cases() -> list[AotCase]:
    """Three and eight ranks."""
    group = {"rank": 1, "half_bytes": 64 << 20, "max_blocks": 64, "timeout_ns": 20 * 10**9}

    def run(world: int) -> None:
        report, table = meta(3, world, dtype=torch.int32), meta(2 * world + 1, dtype=torch.int64)
        check(report, table, 4 << 20, 1, world_size=world, **group)

    return [
        AotCase("peer_check world 3", lambda: run(3), max_registers=64),
        # 8 bytes: with Triton 3.6, whose ptxas keeps to 32 registers here.
        AotCase("peer_check world 8", lambda: run(8), (90,), max_registers=64, max_spill_bytes=8),
    ]
