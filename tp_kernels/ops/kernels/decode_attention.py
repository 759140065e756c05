"""Split-KV decode attention: a few query tokens a row over a long cache, contiguous or in pages.

    out[b, t] = softmax(q[b, :, t] @ k[b, :n].T * scale) @ v[b, :n],  n = lengths[b] + t + 1

A program takes one row of the batch, one KV head and one share of the row's positions. The T * G query rows that use
the KV head (T tokens, G = Hq / Hkv heads) are packed into one operand of 16, 32 or 64 rows, so that every key and value
is read once, by 16-byte asynchronous copies some blocks ahead. The softmax is FlashAttention-2's (Dao 2023) in the exp2
domain, the split over positions is Flash-Decoding's (Dao et al. 2023): a share leaves its row maxima, row sums and
unnormalised output behind in fp32, and the shares are merged in the order of the positions.

How many shares there may be is fixed by the host from what it knows without asking the GPU: capacity, batch, heads,
multiprocessors. Which positions a share has follows on the GPU from the real length of the row, so a short row in a
large cache is spread evenly as well; shares that are left without a block write nothing and are not read.

Two ways to merge, both in fixed order:

    "kernel"  a second kernel, one program a query row, launched early (programmatic dependent launch)
    "last"    the share that finishes last merges in the same launch; see ``counters``

A throw-away kernel of this design (16 rows, blocks of 64-128, 3 stages, without the merge) read 2.19 TB/s at B=1,
S=8192 in 16 splits, 2.88 at B=16, S=4096 and 3.02 at B=64, S=4096 (H100, 8 KV heads of 128).
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tp_kernels.ops._gpu import H100, gpu_of
from tp_kernels.ops.kernels.counters import take_counters
from tp_kernels.ops.kernels.decode_config import (
    Config,
    capacity_of,
    default_config,
    power_of_two,
    shared_bytes,
    splits_for,
)
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch
from tp_kernels.ops.kernels.sizes import next_power_of_2

__all__ = ["aot_cases", "decode_attention"]

LOG2_E = 1.4426950408889634


@triton.jit
def _shares(length, tokens, max_len, window, splits, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr):
    """First block that a query of the row sees, blocks a share, shares that have a block (>= 1), end of the row."""
    end = tl.minimum(length + tokens, max_len)
    first = 0
    if WINDOWED:
        first = tl.maximum(length + 1 - window, 0) // BLOCK_N
    blocks = tl.maximum(tl.cdiv(end, BLOCK_N) - first, 1)
    share = tl.cdiv(blocks, splits)
    return first, share, tl.cdiv(blocks, share), end


@triton.jit
def _merge(
    acc_ptr,
    ml_ptr,
    base,
    active,
    rows,
    row_ok,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merge shares 0 .. active - 1 of some query rows -> [BLOCK_R, BLOCK_D]; ``base`` is the first row of share 0.

    The loads bypass L1: what other multiprocessors wrote is in L2.
    """
    cols = tl.arange(0, BLOCK_D)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, active, CHUNK):
        share = start + tl.arange(0, CHUNK)
        ok = (share < active)[:, None] & row_ok[None, :]
        at = base + (share[:, None] * ROWS + rows[None, :])
        part_ok = ok[:, :, None] & (cols < D)[None, None, :]
        part = tl.load(acc_ptr + at[:, :, None] * D + cols[None, None, :], part_ok, other=0.0, cache_modifier=".cg")
        m = tl.load(ml_ptr + at * 2, ok, other=float("-inf"), cache_modifier=".cg")
        s = tl.load(ml_ptr + at * 2 + 1, ok, other=0.0, cache_modifier=".cg")
        new = tl.maximum(peak, tl.max(m, 0))
        # A share whose positions are all hidden from a row has the maximum -inf there and must weigh 0, not NaN.
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(m - safe[None, :])
        old = tl.exp2(peak - safe)
        total = total * old + tl.sum(weight * s, 0)
        out = out * old[:, None] + tl.sum(weight[:, :, None] * part, 0)
        peak = new
    return out / tl.where(row_ok, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["kv_heads", "max_len", "window", "splits", "stride_tb"])
def _decode_kernel(
    # q [B, Hq, T, D]; k, v [B, Hkv, max_len, D] or pages [num_pages, Hkv, PAGE, D]
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,  # int64 [B]
    table_ptr,  # int32 [B, max_pages], None without pages
    out_ptr,  # [B, T, Hq, D], dense
    work_ptr,  # fp32 [B * Hkv, splits, T * G, D], then [B * Hkv, splits, T * G, 2]: row maximum and sum
    counter_ptr,  # int32 [B * Hkv], zero before and after; None unless LAST
    # sizes
    scale_log2,
    kv_heads,
    max_len,
    window,
    splits,
    # strides; _kb and _vb are those of a row of the batch, or of a page
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_tb,
    # compile time
    T: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE_BITS: tl.constexpr,  # log2 of the positions of a page; -1 without pages
    WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group = tl.program_id(0)
    split = tl.program_id(1)
    batch = (group // kv_heads).to(tl.int64)
    head = (group % kv_heads).to(tl.int64)
    length = tl.load(lengths_ptr + batch).to(tl.int32)

    # The queries are asked for before anything waits for the length.
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    offs = tl.arange(0, BLOCK_N)
    token = rows // G
    heads = head * G + rows % G
    stored = (rows < T * G)[:, None] & (cols < D)[None, :]
    q_at = q_ptr + batch * stride_qb + (heads * stride_qh + token * stride_qt)[:, None] + cols[None, :]
    q = tl.load(q_at, mask=stored, other=0.0)

    first, share, active, end = _shares(length, T, max_len, window, splits, BLOCK_N, WINDOWED)
    if split >= active:
        return
    # Padding rows look like the last token: their numbers stay finite, and they are not stored.
    query = length + tl.minimum(token, T - 1)

    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    if PAGE_BITS < 0:
        k_ptr += batch * stride_kb
        v_ptr += batch * stride_vb
    else:
        table_ptr += batch * stride_tb
    k_tile = (offs * stride_kn)[:, None] + cols[None, :]
    v_tile = (offs * stride_vn)[:, None] + cols[None, :]

    m = tl.full([ROWS], float("-inf"), tl.float32)
    # Row sums stay spread over the block's columns: summing them across warps once an iteration costs three barriers.
    spread = tl.zeros([ROWS, BLOCK_N], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    low = (first + split * share) * BLOCK_N
    for start in tl.range(low, tl.minimum(low + share * BLOCK_N, end), BLOCK_N):
        position = start + offs
        # What no query sees is not read: behind the end it may be NaN, which a weight of 0 would let through, and
        # before the window its page may have been given back.
        ok = position < end
        if WINDOWED:
            ok = ok & (position > length - window)
        if PAGE_BITS < 0:
            k_at = k_ptr + tl.cast(start, tl.int64) * stride_kn + k_tile
            v_at = v_ptr + tl.cast(start, tl.int64) * stride_vn + v_tile
        elif 1 << PAGE_BITS >= BLOCK_N:
            # Blocks start at multiples of BLOCK_N, so a block lies in one page.
            page = tl.load(table_ptr + (start >> PAGE_BITS)).to(tl.int64)
            slot = tl.cast(start & ((1 << PAGE_BITS) - 1), tl.int64)
            k_at = k_ptr + (page * stride_kb + slot * stride_kn) + k_tile
            v_at = v_ptr + (page * stride_vb + slot * stride_vn) + v_tile
        else:
            page = tl.load(table_ptr + (position >> PAGE_BITS), mask=ok, other=0).to(tl.int64)
            slot = (position & ((1 << PAGE_BITS) - 1)).to(tl.int64)
            k_at = k_ptr + (page * stride_kb + slot * stride_kn)[:, None] + cols[None, :]
            v_at = v_ptr + (page * stride_vb + slot * stride_vn)[:, None] + cols[None, :]
        readable = ok[:, None]
        if D != BLOCK_D:
            readable = readable & (cols < D)[None, :]
        k = tl.load(k_at, mask=readable, other=0.0).to(q.dtype)
        v = tl.load(v_at, mask=readable, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if T == 1:
            seen = ok[None, :]
        else:
            seen = position[None, :] <= query[:, None]
            if WINDOWED:
                seen = seen & (position[None, :] > query[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, 1))
        # A row that has seen nothing yet (a window, an early token) must not compute -inf - -inf.
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - safe[:, None])
        old = tl.exp2(m - safe)[:, None]
        spread = spread * old + p
        acc = tl.dot(p.to(q.dtype), v, acc * old, input_precision=PRECISION)
        m = new
    s = tl.sum(spread, 1)

    if not SPLIT:
        out_at = out_ptr + ((batch * T + token) * (kv_heads * G) + heads)[:, None] * D + cols[None, :]
        tl.store(out_at, (acc / s[:, None]).to(out_ptr.dtype.element_ty), mask=stored)
    else:
        base = group.to(tl.int64) * splits * (T * G)
        ml_ptr = work_ptr + tl.num_programs(0).to(tl.int64) * splits * (T * G) * D
        at = base + split * (T * G) + rows
        tl.store(work_ptr + at[:, None] * D + cols[None, :], acc, mask=stored)
        tl.store(ml_ptr + at * 2, m, mask=rows < T * G)
        tl.store(ml_ptr + at * 2 + 1, s, mask=rows < T * G)
        if LAST:
            # All threads' stores, then the barrier, then one thread's release: what the barrier ordered before it is
            # published with it. The acquire of the last arrival is handed to its other threads by a barrier again.
            tl.debug_barrier()
            arrived = tl.atomic_add(counter_ptr + group, 1, sem="acq_rel", scope="gpu")
            if arrived == active - 1:
                # Every share that takes part has arrived, so the counter is free for the next launch in the stream.
                tl.store(counter_ptr + group, 0)
                for r0 in range(0, T * G, BLOCK_R):
                    r = r0 + tl.arange(0, BLOCK_R)
                    some = _merge(work_ptr, ml_ptr, base, active, r, r < T * G, T * G, D, BLOCK_R, BLOCK_D, CHUNK)
                    out_row = (batch * T + r // G) * (kv_heads * G) + head * G + r % G
                    out_at = out_ptr + out_row[:, None] * D + cols[None, :]
                    some_ok = (r < T * G)[:, None] & (cols < D)[None, :]
                    tl.store(out_at, some.to(out_ptr.dtype.element_ty), mask=some_ok)


@triton.jit(do_not_specialize=["kv_heads", "max_len", "window", "splits"])
def _merge_kernel(
    work_ptr,
    lengths_ptr,
    out_ptr,
    kv_heads,
    max_len,
    window,
    splits,
    T: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query row a program; the arguments are those of the split kernel."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group = tl.program_id(0) // (T * G)
    batch = (group // kv_heads).to(tl.int64)
    head = group % kv_heads
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    _, _, active, _ = _shares(length, T, max_len, window, splits, BLOCK_N, WINDOWED)
    r = tl.program_id(0) % (T * G) + tl.arange(0, 1)
    ml_ptr = work_ptr + tl.num_programs(0).to(tl.int64) * splits * D
    base = group.to(tl.int64) * splits * (T * G)
    out = _merge(work_ptr, ml_ptr, base, active, r, r < T * G, T * G, D, 1, BLOCK_D, CHUNK)
    cols = tl.arange(0, BLOCK_D)
    out_row = (batch * T + r // G) * (kv_heads * G) + head * G + r % G
    out_at = out_ptr + out_row[:, None] * D + cols[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=(cols < D)[None, :])


@lru_cache(maxsize=256)
def _merge_tiles(rows: int, head_dim: int, splits: int) -> tuple[int, int, int]:
    """Tiles of the merges: rows and shares for the last arrival (8192 elements), shares for the kernel (512-4096)."""
    block_d = power_of_two(head_dim)
    block_r = max(1, min(next_power_of_2(rows), 1024 // block_d))
    most = next_power_of_2(splits)
    return block_r, min(most, 8192 // (block_r * block_d)), max(512 // block_d, min(most, 4096 // block_d))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides but the last; 0 for a dimension of one, whose stride means nothing and may hide the alignment."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    sliding_window: int | None = None,
    page_table: Tensor | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """Launch. The operands are those of the public op, were checked, and ``q`` is not empty.

    Args:
        q: [B, Hq, T, D], any strides but a dense last dimension; T * Hq / Hkv at most MAX_ROWS.
        k_cache, v_cache: [B, Hkv, max_len, D], or pages [num_pages, Hkv, page_size, D]; any strides below
            MAX_STRIDE for a position, a dense last dimension. 16-byte copies need strides and addresses that are
            multiples of 16 bytes; others are right, and slow.
        lengths: int64 [B].
        scale: factor of the scores.
        sliding_window: see the public op.
        page_table: int32 [B, max_pages] with a dense last dimension.
        config: by default ``default_config``.
        splits: forces the number of shares.

    Returns:
        [B, Hq, T, D] in the memory order [B, T, Hq, D].
    """
    info = gpu_of(q)
    batch, num_heads, tokens, dim = q.shape
    kv_heads, max_len = k_cache.shape[1], k_cache.shape[2]
    group, groups = num_heads // kv_heads, batch * kv_heads
    rows = tokens * group
    page_bits = -1
    if page_table is not None:
        page_bits = max_len.bit_length() - 1
        max_len *= page_table.shape[1]
    # A table's configuration may be that of heads half as wide, or of half as many rows.
    if config is None or shared_bytes(config, info, rows, dim, k_cache.element_size()) > info.max_shared:
        config = default_config(info, k_cache.dtype, rows, dim)
    if splits is None:
        splits = splits_for(config, info, groups, capacity_of(max_len, tokens, sliding_window))
    # A window beyond the cache is none; the smaller number also fits into 32 bits.
    window = 0 if sliding_window is None or sliding_window >= max_len else sliding_window
    last = splits > 1 and config.combine == "last"
    block_d = power_of_two(dim)
    block_r, chunk, kernel_chunk = _merge_tiles(rows, dim, splits)
    pdl = info.has_pdl and not INTERPRETED
    # The compiler spreads the stages over both loads of a chain, page number and page: as many blocks in flight.
    stages = config.num_stages if page_table is None else 2 * config.num_stages - 1

    out = q.new_empty(batch, tokens, num_heads, dim)
    work = None
    if splits > 1:
        work = q.new_empty(groups * splits * rows * (dim + 2), dtype=torch.float32)
    launch(
        _decode_kernel,
        (groups, splits),
        q,
        k_cache,
        v_cache,
        lengths,
        page_table,
        out,
        work,
        take_counters(q, groups) if last else None,
        scale * LOG2_E,
        kv_heads,
        max_len,
        window,
        splits,
        *_strides(q),
        *_strides(k_cache),
        *_strides(v_cache),
        0 if page_table is None else page_table.stride(0),
        T=tokens,
        G=group,
        D=dim,
        PAGE_BITS=page_bits,
        WINDOWED=window > 0,
        SPLIT=splits > 1,
        LAST=last,
        ROWS=power_of_two(rows),
        BLOCK_D=block_d,
        BLOCK_N=config.block_n,
        # Of no meaning, and not to be compiled for anew, where nothing is merged here.
        BLOCK_R=block_r if last else 1,
        CHUNK=chunk if last else 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=stages,
        pdl=pdl,
    )
    if splits > 1 and not last:
        launch(
            _merge_kernel,
            (groups * rows,),
            work,
            lengths,
            out,
            kv_heads,
            max_len,
            window,
            splits,
            T=tokens,
            G=group,
            D=dim,
            WINDOWED=window > 0,
            BLOCK_D=block_d,
            BLOCK_N=config.block_n,
            CHUNK=kernel_chunk,
            PDL=pdl,
            num_warps=4,
            pdl=pdl,
        )
    return out.transpose(1, 2)


def _aot(
    config: Config | None = None,
    *,
    batch: int = 1,
    kv_heads: int = 8,
    group: int = 4,
    tokens: int = 1,
    dim: int = 128,
    length: int = 8192,
    page: int = 0,
    window: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
) -> None:
    empty = partial(torch.empty, device="meta")
    q = empty(batch, tokens, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    table = None
    if page:
        cache = empty(batch * length // page, page, kv_heads, dim, dtype=cache_dtype or dtype).transpose(1, 2)
        table = empty(batch, length // page, dtype=torch.int32)
    else:
        cache = empty(batch, kv_heads, length, dim, dtype=cache_dtype or dtype)
    lengths = empty(batch, dtype=torch.int64)
    decode_attention(q, cache, cache, lengths, dim**-0.5, window, table, config)


def aot_cases() -> list[AotCase]:
    """Launches compiled ahead of time by the tests."""
    hopper = {"capabilities": (90,), "pdl": True, "wgmma": False}
    wide, last = Config(block_n=128, num_warps=8), Config(combine="last")
    default = default_config(H100, torch.bfloat16, 64, 128)
    return [
        AotCase("decode_d128", _aot, pdl=True, wgmma=False),
        AotCase("decode_d128_page16_last", partial(_aot, last, page=16), pdl=True, wgmma=False),
        AotCase("decode_d128_page64_unsplit", partial(_aot, batch=64, page=64), **hopper),
        AotCase("decode_d128_block128", partial(_aot, wide, batch=16), **hopper),
        AotCase("decode_d128_fp16_cache", partial(_aot, batch=16, cache_dtype=torch.float16), **hopper),
        AotCase("decode_d64_window_tokens4", partial(_aot, last, tokens=4, dim=64, window=4096, page=16), **hopper),
        AotCase("decode_d96", partial(_aot, batch=16, dim=96), **hopper),
        AotCase("decode_d256", partial(_aot, batch=16, dim=256), **hopper),
        AotCase(
            "decode_d128_rows64_last", partial(_aot, default._replace(combine="last"), group=8, tokens=8), pdl=True
        ),
    ]
