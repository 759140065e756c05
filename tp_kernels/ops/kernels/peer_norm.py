"""One-shot all-reduce over peer memory, alone and with bias + residual + RMSNorm: twins of the CUDA kernels.

For installations whose native core was built without nvcc, and a path of its own where it was. Workspace, flags, counts
and error record are those of csrc/kernels/peer_layout.h, and the steps those of norm_pull_kernel and pull_kernel there:
recall the count of calls, stage the operand in the half that is its turn, raise this block's flag on all peers and wait
for theirs, add in rank order, and keep the next count. So calls of both kinds may follow each other in any order, and
what tests/kernels/test_peer_protocol.py proves of "one_shot" and "registered_one_shot" holds for these. All ranks must
take the same kind for one call: the two have different grids, and blocks wait for blocks of the same index.

Bits: those of the CUDA kernels. The sum of squares is formed in their order: within 16 bytes one element after the
other, over 32 of those by a butterfly, over the 512-byte chunks one after the other. Triton does not say in which order
a reduction adds, so every reduction here has two operands, and the chunks meet in memory.

Waiting is one block of PTX (``_EXCHANGE``): its barriers make "lost" equal in all threads, which Triton takes for
granted of a scalar. In the interpreter, which has no threads, nothing waits (``WAITS=False``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_kernels.comm.symmetric_sizes import (
    CHUNK_PACKS,
    ERROR_MAGIC,
    FAILED_OFFSET,
    MAX_BLOCKS,
    MAX_WORLD,
    PACK_BYTES,
    SCRATCH_FLOATS,
    STATE_OFFSET,
    row_packs,
)
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch, meta
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = ["all_reduce", "all_reduce_norm", "aot_cases"]

_SUM_WARPS = 8

_STATE = tl.constexpr(STATE_OFFSET)
_FAILED = tl.constexpr(FAILED_OFFSET)
_BLOCKS = tl.constexpr(MAX_BLOCKS)
_CHUNK = tl.constexpr(CHUNK_PACKS)

# A thread's wait for the flag at ``at``; operands as of _EXCHANGE. 128 polls without a pause, then one every 200 ns, of
# which every 16th looks at the clock and every 1024th at the error record (behind PCIe) and at the flag of other blocks
# that failed. Barriers are not .aligned: the polling threads of the first warp come to theirs one by one.
_POLLING = f"""\
POLL:
  ld.acquire.sys.global.b64 seen, [at];
  setp.ge.u64 q, seen, $4;
  @q bra MET;
  add.u32 polls, polls, 1;
  setp.lt.u32 q, polls, 128;
  @q bra POLL;
  setp.ne.u32 q, polls, 128;
  @q bra PAUSE;
  mov.u64 start, %globaltimer;
PAUSE:
  nanosleep.u32 200;
  and.b32 word, polls, 15;
  setp.ne.u32 q, word, 0;
  @q bra POLL;
  mov.u64 now, %globaltimer;
  sub.u64 now, now, start;
  setp.gt.u64 q, now, $5;
  @q bra LOST;
  and.b32 word, polls, 1023;
  setp.ne.u32 q, word, 0;
  @q bra POLL;
  mad.wide.u32 now, $3, 8, $1;
  ld.global.b64 now, [now];
  ld.relaxed.sys.b32 word, [now];
  setp.ne.u32 q, word, 0;
  @q bra LOST;
  ld.relaxed.sys.global.b32 word, [own+{FAILED_OFFSET}];
  setp.ne.u32 q, word, 0;
  @q bra LOST;
  bra POLL;
LOST:
  setp.eq.u32 lost, thread, thread;
  atom.relaxed.gpu.global.cas.b32 word, [own+{FAILED_OFFSET}], 0, 1;
  setp.ne.u32 q, word, 0;
  @q bra MET;
  mad.wide.u32 at, $3, 8, $1;
  ld.global.b64 at, [at];
  mov.b32 word, 1;
  st.relaxed.sys.b32 [at+4], word;
  st.relaxed.sys.b32 [at+8], thread;
  st.relaxed.sys.b32 [at+12], block;
  sub.u64 now, $4, 1;
  shr.u64 start, now, 2;
  st.relaxed.sys.b64 [at+16], start;
  cvt.u32.u64 word, now;
  and.b32 word, word, 3;
  st.relaxed.sys.b32 [at+24], word;
  st.relaxed.sys.b32 [at+28], $2;
  mov.b32 word, {ERROR_MAGIC};
  st.release.sys.b32 [at], word;
MET:
  barrier.red.or.pred lost, 0, lost;
TOLD:
  selp.b32 $0, 1, 0, lost;
}}
"""

# $0 lost | $1 table of the flags' addresses | $2 rank | $3 world | $4 value | $5 timeout in ns | $6 skip
#
# Twin of exchange() in csrc/kernels/peer_sync.cuh: a thread for each peer raises signal[block][rank] there and polls
# signal[block][peer] here.
_EXCHANGE = tl.constexpr(
    f"""
{{
  .reg .pred lost, q;
  .reg .b32 thread, block, polls, word;
  .reg .b64 own, at, seen, start, now;
  setp.ne.s32 lost, $6, 0;
  barrier.red.or.pred lost, 0, lost;
  @lost bra TOLD;
  mov.u32 thread, %tid.x;
  setp.ge.u32 q, thread, $3;
  @q bra MET;
  setp.eq.u32 q, thread, $2;
  @q bra MET;
  mov.u32 block, %ctaid.x;
  mad.wide.u32 at, thread, 8, $1;
  ld.global.b64 at, [at];
  mad.wide.u32 at, block, {8 * MAX_WORLD}, at;
  mad.wide.u32 at, $2, 8, at;
  st.release.sys.global.b64 [at], $4;
  mad.wide.u32 at, $2, 8, $1;
  ld.global.b64 own, [at];
  mad.wide.u32 at, block, {8 * MAX_WORLD}, own;
  mad.wide.u32 at, thread, 8, at;
  mov.b32 polls, 0;
"""
    + _POLLING
)


@triton.jit
def _exchange(table_ptr, rank, calls, phase, timeout_ms, skip, WORLD: tl.constexpr, WAITS: tl.constexpr):
    """Nonzero in all threads alike if a wait gave up or ``skip`` was nonzero in any thread; then nothing was sent."""
    lost = skip
    if WAITS:
        flags = (table_ptr + WORLD).to(tl.int64)
        world = tl.full([], WORLD, tl.int32)
        value = calls * 4 + phase + 1
        lost = tl.inline_asm_elementwise(
            _EXCHANGE,
            "=r,l,r,r,l,l,r,~{memory}",
            [flags, rank, world, value, timeout_ms.to(tl.int64) * 1_000_000, skip],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    # The asm is a barrier already; this one is what the compiler knows to be one.
    tl.debug_barrier()
    return lost


@triton.jit
def _recall(table_ptr, rank, half_bytes, WORLD: tl.constexpr):
    """(calls so far, whether one failed, address of the half whose turn it is relative to a rank's data)."""
    flags = tl.load(table_ptr + WORLD + rank)
    # .cg: written by the kernel before this one, on another multiprocessor.
    calls = tl.load((flags + _STATE).to(tl.pointer_type(tl.int64)) + 4 * tl.program_id(0), cache_modifier=".cg")
    failed = tl.load((flags + _FAILED).to(tl.pointer_type(tl.int32)), cache_modifier=".cg")
    return calls, failed, (calls % 2) * half_bytes


@triton.jit
def _remember(table_ptr, rank, calls, WORLD: tl.constexpr):
    """The next count, in this block's record and those of the blocks that this grid does not have."""
    tl.debug_barrier()  # all threads of the block have read the old one
    flags = tl.load(table_ptr + WORLD + rank)
    blocks = tl.arange(0, _BLOCKS)
    mine = blocks % tl.num_programs(0) == tl.program_id(0)
    count = tl.zeros([_BLOCKS], tl.int64) + (calls + 1)
    # A record's other fields are those of Lamport calls: they stay, and are the same in all records.
    tl.store((flags + _STATE).to(tl.pointer_type(tl.int64)) + 4 * blocks, count, mask=mine)


@triton.jit
def _place(table_ptr, rank, offset, ELEMENT: tl.constexpr):
    """``offset`` bytes (a multiple of 16) behind the data of ``rank``."""
    address = tl.load(table_ptr + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def _ordered_sum(table_ptr, offset, at, mask, BLOCK: tl.constexpr, WORLD: tl.constexpr, ELEMENT: tl.constexpr):
    """Sum over the ranks of what lies at elements ``at`` behind ``offset``, in rank order."""
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(WORLD):
        # .cg: not from L1, which may hold what was there before.
        part = tl.load(_place(table_ptr, peer, offset, ELEMENT) + at, mask=mask, other=0.0, cache_modifier=".cg")
        total += part.to(tl.float32)
    return total


@triton.jit
def _pack_squares(s, PACKS: tl.constexpr, PER_PACK: tl.constexpr):
    """[PACKS]: the sum of squares of every ``PER_PACK`` (4 or 8) consecutive elements, one after the other."""
    if PER_PACK == 8:
        even, odd = tl.split(tl.reshape(s, [PACKS, 4, 2]))
        s04, s26 = tl.split(tl.reshape(even, [PACKS, 2, 2]))
        s15, s37 = tl.split(tl.reshape(odd, [PACKS, 2, 2]))
        s0, s4 = tl.split(s04)
        s1, s5 = tl.split(s15)
        s2, s6 = tl.split(s26)
        s3, s7 = tl.split(s37)
        squares = tl.fma(s3, s3, tl.fma(s2, s2, tl.fma(s1, s1, s0 * s0)))
        squares = tl.fma(s7, s7, tl.fma(s6, s6, tl.fma(s5, s5, tl.fma(s4, s4, squares))))
    else:
        s02, s13 = tl.split(tl.reshape(s, [PACKS, 2, 2]))
        s0, s2 = tl.split(s02)
        s1, s3 = tl.split(s13)
        squares = tl.fma(s3, s3, tl.fma(s2, s2, tl.fma(s1, s1, s0 * s0)))
    return squares


@triton.jit
def _sum_of_squares(s, scratch_ptr, CHUNKS: tl.constexpr, PER_PACK: tl.constexpr):
    """Of a whole row, in the order that the module's documentation tells."""
    q = _pack_squares(s, CHUNKS * _CHUNK, PER_PACK)
    # A sum of two is the same in either order: element i meets i + 16, then i + 8, ..., as in the butterfly.
    q = tl.sum(tl.reshape(q, [CHUNKS, 2, 16]), axis=1)
    q = tl.sum(tl.reshape(q, [CHUNKS, 2, 8]), axis=1)
    q = tl.sum(tl.reshape(q, [CHUNKS, 2, 4]), axis=1)
    q = tl.sum(tl.reshape(q, [CHUNKS, 2, 2]), axis=1)
    q = tl.sum(q, axis=1)
    tl.store(scratch_ptr + tl.arange(0, CHUNKS), q)
    tl.debug_barrier()
    total = tl.load(scratch_ptr)
    for chunk in tl.static_range(1, CHUNKS):
        total += tl.load(scratch_ptr + chunk)
    return total


@triton.jit(do_not_specialize=["rank", "rows", "width", "timeout_ms"])
def _norm_kernel(
    x_ptr,  # [rows, WIDTH]
    bias_ptr,  # [WIDTH] or None
    residual_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH]
    normed_ptr,  # [rows, WIDTH]
    sum_ptr,  # [rows, WIDTH]
    scratch_ptr,  # [SCRATCH_FLOATS] fp32
    table_ptr,  # int64 [2 * WORLD + 1]: every rank's data, every rank's flags, the error record
    rank,
    rows,
    width,  # WIDTH, which the compiler does not know: it would multiply by a rounded reciprocal instead of dividing
    half_bytes,
    registered,  # where x lies behind a rank's data, on all ranks; read only if REGISTERED
    timeout_ms,
    eps,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,  # elements from row to row where x is staged
    CHUNKS: tl.constexpr,
    PER_PACK: tl.constexpr,
    WORLD: tl.constexpr,
    REGISTERED: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    WAITS: tl.constexpr,
):
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    BLOCK: tl.constexpr = CHUNKS * _CHUNK * PER_PACK
    block = tl.program_id(0).to(tl.int64)  # and with it all rows and offsets
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    calls, failed, half = _recall(table_ptr, rank, half_bytes, WORLD)
    source = half
    if REGISTERED:
        source = half * 0 + registered
    else:
        staged = _place(table_ptr, rank, half, ELEMENT)
        for row in range(block, rows, tl.num_programs(0)):
            x = tl.load(x_ptr + row * WIDTH + cols, mask=mask)
            tl.store(staged + row * STRIDE + cols, x, mask=mask & (failed == 0))
    lost = _exchange(table_ptr, rank, calls, 0, timeout_ms, failed, WORLD, WAITS)
    if lost == 0:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
        scratch = scratch_ptr + 2 * block * CHUNKS
        turn = 0
        for row in range(block, rows, tl.num_programs(0)):
            at = row * WIDTH + cols
            residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
            s = _ordered_sum(table_ptr, source, row * STRIDE + cols, mask, BLOCK, WORLD, ELEMENT)
            if ROUND_FIRST:
                s = s.to(ELEMENT).to(tl.float32)
            if bias_ptr is not None:
                s += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
                if ROUND_FIRST:
                    s = s.to(ELEMENT).to(tl.float32)
            s += residual.to(tl.float32)
            if ROUND_FIRST:
                s = s.to(ELEMENT).to(tl.float32)
            tl.store(sum_ptr + at, s.to(ELEMENT), mask=mask)
            # Two sets in turn: a thread may still read the last row's when others write this row's.
            mean = _sum_of_squares(s, scratch + turn * CHUNKS, CHUNKS, PER_PACK) / width
            turn = 1 - turn
            normed = s * tl.rsqrt(mean + eps)
            if ROUND_FIRST:
                normed = normed.to(ELEMENT).to(tl.float32)
            tl.store(normed_ptr + at, (normed * weight.to(tl.float32)).to(ELEMENT), mask=mask)
        if REGISTERED:  # what follows on this stream may overwrite x, which has no second copy
            lost = _exchange(table_ptr, rank, calls, 1, timeout_ms, lost, WORLD, WAITS)
    if lost == 0:
        _remember(table_ptr, rank, calls, WORLD)


@triton.jit(do_not_specialize=["rank", "timeout_ms"])
def _sum_kernel(
    x_ptr,  # [n]
    out_ptr,  # [n]; may be x unless REGISTERED
    table_ptr,  # as in _norm_kernel, as are the arguments of the same names
    rank,
    n,
    half_bytes,
    registered,
    timeout_ms,
    BLOCK: tl.constexpr,
    WORLD: tl.constexpr,
    REGISTERED: tl.constexpr,
    WAITS: tl.constexpr,
):
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    block, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK)
    cols = tl.arange(0, BLOCK)
    calls, failed, half = _recall(table_ptr, rank, half_bytes, WORLD)
    source = half
    if REGISTERED:
        source = half * 0 + registered
    else:
        staged = _place(table_ptr, rank, half, ELEMENT)
        for tile in range(block, tiles, tl.num_programs(0)):
            at = tile * BLOCK + cols
            x = tl.load(x_ptr + at, mask=at < n)
            tl.store(staged + at, x, mask=(at < n) & (failed == 0))
    lost = _exchange(table_ptr, rank, calls, 0, timeout_ms, failed, WORLD, WAITS)
    if lost == 0:
        for tile in range(block, tiles, tl.num_programs(0)):
            at = tile * BLOCK + cols
            total = _ordered_sum(table_ptr, source, at, at < n, BLOCK, WORLD, ELEMENT)
            tl.store(out_ptr + at, total.to(ELEMENT), mask=at < n)
        if REGISTERED:
            lost = _exchange(table_ptr, rank, calls, 1, timeout_ms, lost, WORLD, WAITS)
    if lost == 0:
        _remember(table_ptr, rank, calls, WORLD)


# Launchers -----------------------------------------------------------------------------------------------------------


def all_reduce(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    *,
    rank: int,
    world_size: int,
    half_bytes: int,
    registered: int | None,
    max_blocks: int,
    timeout_ns: int,
) -> None:
    """``out`` = sum over the ranks of ``x``, in fp32 and rank order, rounded once.

    Args:
        x, out: [n] float32, bfloat16 or float16, contiguous; at most ``half_bytes``. ``out`` may be ``x`` if that is
            not registered.
        table: int64 [2 * world_size + 1] on the GPU: addresses of all ranks' data, of their flags, of the error record.
        half_bytes: of the workspace's staging halves.
        registered: where ``x`` lies behind this rank's data if all ranks may read it there, as on all ranks; else None.
        max_blocks: largest grid, the same on all ranks.
        timeout_ns: deadline of a wait; whole milliseconds count.
    """
    n, block = x.numel(), _SUM_WARPS * 32 * PACK_BYTES // x.element_size()
    launch(
        _sum_kernel,
        (min(cdiv(n, block), max_blocks, MAX_BLOCKS),),
        x,
        out,
        table,
        rank,
        n,
        half_bytes,
        registered or 0,
        _milliseconds(timeout_ns),
        BLOCK=block,
        WORLD=world_size,
        REGISTERED=registered is not None,
        WAITS=not INTERPRETED,
        num_warps=_SUM_WARPS,
    )


def all_reduce_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    normed: Tensor,
    summed: Tensor,
    eps: float,
    round_before_norm: bool,
    table: Tensor,
    scratch: Tensor,
    *,
    rank: int,
    world_size: int,
    half_bytes: int,
    registered: int | None,
    max_blocks: int,
    timeout_ns: int,
) -> None:
    """``summed`` = all_reduce(x) + bias + residual and ``normed`` = rms_norm(summed) * weight, on every rank.

    Args:
        x, residual, normed, summed: [rows, width] of one of the dtypes of ``all_reduce``, contiguous, rows of at most
            ``MAX_ROW_PACKS`` packs. ``summed`` may be ``residual``.
        bias, weight: [width] in that dtype; ``bias`` may be None.
        eps: added to the mean square.
        round_before_norm: round where separate ops would.
        scratch: [SCRATCH_FLOATS] float32 that nothing else uses meanwhile.

        The others are those of ``all_reduce``. ``registered`` needs rows of whole packs.
    """
    rows, width = x.shape
    per_pack = PACK_BYTES // x.element_size()
    packs = row_packs(width, x.element_size())
    chunks = next_power_of_2(cdiv(packs, CHUNK_PACKS))
    launch(
        _norm_kernel,
        (min(rows, max_blocks, MAX_BLOCKS),),
        x,
        bias,
        residual,
        weight,
        normed,
        summed,
        scratch,
        table,
        rank,
        rows,
        width,
        half_bytes,
        registered or 0,
        _milliseconds(timeout_ns),
        float(eps),
        WIDTH=width,
        STRIDE=packs * per_pack,
        CHUNKS=chunks,
        PER_PACK=per_pack,
        WORLD=world_size,
        REGISTERED=registered is not None,
        ROUND_FIRST=round_before_norm,
        WAITS=not INTERPRETED,
        # A pack a thread up to 512 threads, as norm_shape has it for a block with one row.
        num_warps=min(chunks, 16),
    )


def _milliseconds(timeout_ns: int) -> int:
    """Rounded up, and always an int32: nanoseconds below and above 2 s would be two kernels."""
    return max(1, min(cdiv(timeout_ns, 1_000_000), (1 << 31) - 1))


def aot_cases() -> list[AotCase]:
    """Decode rows of Llama's widths at 2, 4 and 8 ranks, the widest row, an odd one; plain sums."""
    group = {"rank": 1, "half_bytes": 64 << 20, "max_blocks": 64, "timeout_ns": 300 * 10**9}

    def norm(rows, width, world, dtype=torch.bfloat16, bias=True, registered=None, rounded=True) -> None:
        x, row = meta(rows, width, dtype=dtype), meta(width, dtype=dtype)
        table, scratch = meta(2 * world + 1, dtype=torch.int64), meta(SCRATCH_FLOATS, dtype=torch.float32)
        tensors = (x, row if bias else None, x, row, x, x)
        all_reduce_norm(*tensors, 1e-6, rounded, table, scratch, world_size=world, registered=registered, **group)

    def sums(n, world, dtype=torch.bfloat16) -> None:
        x = meta(n, dtype=dtype)
        all_reduce(x, x, meta(2 * world + 1, dtype=torch.int64), world_size=world, registered=None, **group)

    return [
        AotCase("peer_norm 4x4096 world 4", lambda: norm(4, 4096, 4), max_registers=128),
        AotCase("peer_norm 4x8192 world 8", lambda: norm(4, 8192, 8), (90,), max_registers=128),
        AotCase(
            "peer_norm 300x4096 world 2 registered",
            lambda: norm(300, 4096, 2, torch.float16, False, 128 << 20),
            (90,),
            max_registers=128,
        ),
        AotCase("peer_norm 1x16384 world 4", lambda: norm(1, 16384, 4, rounded=False), (90,)),
        AotCase("peer_norm 3x1001 fp32 world 3", lambda: norm(3, 1001, 3, torch.float32), (90,), wide_loads=False),
        AotCase("peer_sum 64K world 4", lambda: sums(1 << 15, 4)),
        AotCase("peer_sum barrier world 2", lambda: sums(1, 2, torch.float32), (90,), wide_loads=False),
    ]
