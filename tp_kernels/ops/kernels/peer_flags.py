"""Flags and counters in peer memory for kernels whose blocks do not wait for blocks of the same index alone.

A flag is 64 bits that one rank raises to ``signal_value(call, phase)`` and another waits for; all later values are
larger, so nothing is ever lowered. Raising releases and waiting acquires, both system-wide and for all threads of the
block, as in csrc/kernels/peer_sync.cuh; so data moves by ordinary accesses. A counter is touched by its own rank only:
whoever brings it to its total puts it back to zero, when nobody else will touch it in this call.

In the interpreter, which has no threads, nothing waits and flags are raised by ordinary stores (``WAITS=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tp_kernels.comm.symmetric_sizes import FAILED_OFFSET, MAX_BLOCKS, STATE_OFFSET
from tp_kernels.ops.kernels.peer_norm import _POLLING

__all__ = ["await_flags", "is_last", "raise_flags", "recall", "signal_value", "write_records"]

_STATE = tl.constexpr(STATE_OFFSET)
_FAILED = tl.constexpr(FAILED_OFFSET)
_BLOCKS = tl.constexpr(MAX_BLOCKS)

# $0 nothing | $1 table of the flags' addresses | $2 world | $3 ranks, one bit each | $4 offset | $5 value
#
# A thread for each rank. The barrier in front of it is the caller's.
_RAISE = tl.constexpr(
    """
{
  .reg .pred q;
  .reg .b32 thread, bit;
  .reg .b64 at;
  mov.u32 $0, 0;
  mov.u32 thread, %tid.x;
  setp.ge.u32 q, thread, $2;
  @q bra DONE;
  shr.u32 bit, $3, thread;
  and.b32 bit, bit, 1;
  setp.eq.u32 q, bit, 0;
  @q bra DONE;
  mad.wide.u32 at, thread, 8, $1;
  ld.global.b64 at, [at];
  add.u64 at, at, $4;
  st.release.sys.global.b64 [at], $5;
DONE:
}
"""
)

# $0 lost | $1 table of the flags' addresses | $2 rank | $3 world | $4 value | $5 timeout in ns | $6 skip
# $7 ranks, one bit each | $8 offset
#
# Thread r waits for the own flag at ``offset`` + 8 r if bit r is set.
_AWAIT = tl.constexpr(
    """
{
  .reg .pred lost, q;
  .reg .b32 thread, block, polls, word;
  .reg .b64 own, at, seen, start, now;
  setp.ne.s32 lost, $6, 0;
  barrier.red.or.pred lost, 0, lost;
  @lost bra TOLD;
  mov.u32 thread, %tid.x;
  setp.ge.u32 q, thread, $3;
  @q bra MET;
  shr.u32 word, $7, thread;
  and.b32 word, word, 1;
  setp.eq.u32 q, word, 0;
  @q bra MET;
  mov.u32 block, %ctaid.x;
  mad.wide.u32 at, $2, 8, $1;
  ld.global.b64 own, [at];
  mad.wide.u32 at, thread, 8, own;
  add.u64 at, at, $8;
  mov.b32 polls, 0;
"""
    + _POLLING
)


@triton.jit
def signal_value(calls, PHASE: tl.constexpr):
    """Twin of ``signal_value`` in csrc/kernels/peer_layout.h."""
    return calls * 4 + (PHASE + 1)


@triton.jit
def raise_flags(table_ptr, ranks, offset, value, WORLD: tl.constexpr, WAITS: tl.constexpr):
    """Raise the flag at ``offset`` (bytes) on the ranks whose bits are set; a barrier lies behind the caller's data."""
    if WAITS:
        world = tl.full([], WORLD, tl.int32)
        flags = (table_ptr + WORLD).to(tl.int64)
        arguments = [flags, world, ranks, offset, value]
        tl.inline_asm_elementwise(_RAISE, "=r,l,r,r,l,l,~{memory}", arguments, dtype=tl.int32, is_pure=False, pack=1)
    else:
        for peer in tl.static_range(WORLD):
            if (ranks >> peer) & 1 != 0:
                flag = tl.load(table_ptr + WORLD + peer) + offset
                tl.store(flag.to(tl.pointer_type(tl.int64)), value)


@triton.jit
def await_flags(table_ptr, rank, ranks, offset, value, timeout_ms, skip, WORLD: tl.constexpr, WAITS: tl.constexpr):
    """Wait for the own flags at ``offset + 8 r`` of the ranks r whose bits are set.

    Nonzero in all threads alike if a wait gave up, or if ``skip`` was nonzero in any thread.
    """
    lost = skip
    if WAITS:
        world = tl.full([], WORLD, tl.int32)
        flags = (table_ptr + WORLD).to(tl.int64)
        timeout = timeout_ms.to(tl.int64) * 1_000_000
        lost = tl.inline_asm_elementwise(
            _AWAIT,
            "=r,l,r,r,l,l,r,r,l,~{memory}",
            [flags, rank, world, value, timeout, skip, ranks, offset],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    # The asm is a barrier already; this one is what the compiler knows to be one.
    tl.debug_barrier()
    return lost


@triton.jit
def is_last(flags, offset, total):
    """Count once more at ``offset`` behind the own flags; whether that made ``total``, which leaves zero there.

    What all threads of the block did before is seen by all threads of the block that is last, and by whom that block
    raises a flag for. System-wide, although only this rank counts: the data lies in a peer's memory.
    """
    counter = (flags + offset).to(tl.pointer_type(tl.int32))
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="sys") == total - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def recall(flags):
    """(calls so far, whether one failed), for grids of any size: there are ``MAX_BLOCKS`` records, all equal."""
    # .cg: written by the kernel before this one, on another multiprocessor.
    calls = tl.load((flags + _STATE).to(tl.pointer_type(tl.int64)), cache_modifier=".cg")
    failed = tl.load((flags + _FAILED).to(tl.pointer_type(tl.int32)), cache_modifier=".cg")
    return calls, failed


@triton.jit
def write_records(flags, calls):
    """The next count in all records, by the block that leaves last: no other one will read the old one any more."""
    # A record's other fields are those of Lamport calls: they stay.
    records = (flags + _STATE).to(tl.pointer_type(tl.int64)) + 4 * tl.arange(0, _BLOCKS)
    tl.store(records, tl.zeros([_BLOCKS], tl.int64) + (calls + 1))
