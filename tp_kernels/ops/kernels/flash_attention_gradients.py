"""The three kernels of the backward pass of flash attention; ``flash_attention_backward`` launches them.

    delta_kernel  delta = rowsum(dO * O) - dlse, and lse in powers of two, for the two others
    dkdv_kernel   one block of keys and values, all queries that see it
    dq_kernel     one block of queries, all keys that it sees

Accumulators are fp32. The weights are rounded to the operands' dtype for the matrix products, as in the forward pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tp_kernels.ops.kernels.flash_attention import LOG2_E, load_rows, sequence

__all__ = ["PAD", "delta_kernel", "dkdv_kernel", "dq_kernel"]

# Rows of the workspace come in multiples of this; every block of queries divides it.
PAD = 128
_PAD = tl.constexpr(PAD)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _workspace_row(b, q_start, padded, VARLEN: tl.constexpr):
    """First workspace row of sequence ``b``; sequences start at multiples of PAD and never overlap."""
    if VARLEN:
        row = (q_start + b.to(tl.int64) * _PAD) // _PAD * _PAD
    else:
        row = b.to(tl.int64) * padded
    return row


@triton.jit
def delta_kernel(
    out,
    grad_out,
    lse,
    grad_lse,
    sums2,  # fp32 [Hq, rows]: lse * log2(e)
    delta,  # fp32 [Hq, rows]
    cu_q,
    heads,
    q_len,
    padded,
    rows_total,
    out_b,
    out_h,
    out_s,
    grad_b,
    grad_h,
    grad_s,
    lse_b,
    lse_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    m = tl.program_id(1) * BLOCK
    q_start, q_len = sequence(cu_q, b, q_len, VARLEN)
    if m >= tl.cdiv(q_len, _PAD) * _PAD:
        return
    out_rows = out + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h + q_start * out_s
    grad_rows = grad_out + b.to(tl.int64) * grad_b + h.to(tl.int64) * grad_h + q_start * grad_s
    o = load_rows(out_rows, b, h, m, q_len, out_s, BLOCK, HEAD_DIM, BLOCK_D, True, False).to(tl.float32)
    g = load_rows(grad_rows, b, h, m, q_len, grad_s, BLOCK, HEAD_DIM, BLOCK_D, True, False).to(tl.float32)
    rows = m + tl.arange(0, BLOCK)
    at_lse = b.to(tl.int64) * lse_b + h.to(tl.int64) * lse_h + q_start + rows
    sums = tl.load(lse + at_lse, mask=rows < q_len, other=float("-inf"))
    difference = tl.sum(o * g, 1)
    if HAS_GRAD_LSE:
        difference -= tl.load(grad_lse + at_lse, mask=rows < q_len, other=0.0)
    # Rows without keys, and rows beyond the end: exp2(score - inf) is 0, so they take part in nothing.
    nothing = sums == float("-inf")
    at = h.to(tl.int64) * rows_total + _workspace_row(b, q_start, padded, VARLEN) + rows
    tl.store(sums2 + at, tl.where(nothing, float("inf"), sums * _LOG2_E))
    tl.store(delta + at, tl.where(nothing, 0.0, difference))


@triton.jit
def _add_queries(
    dk,
    dv,
    k_tile,
    v_tile,
    q,
    grad_out,
    sums2,
    delta,
    b,
    h,
    begin,
    end,
    n,
    q_len,
    k_len,
    q_s,
    grad_s,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the queries ``begin`` .. ``end`` - 1 of one head contribute to dK and dV; scores stand transposed."""
    for m in tl.range(begin, end, BLOCK_M):
        q_tile = load_rows(q, b, h, m, q_len, q_s, BLOCK_M, HEAD_DIM, BLOCK_D, True, TMA)
        rows = m + tl.arange(0, BLOCK_M)
        row_sums = tl.load(sums2 + rows)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        weights = tl.exp2(scores * scale - row_sums[None, :])
        if MASKED:
            # Keys beyond the end need no mask: what they gather is never stored.
            keys = n + tl.arange(0, BLOCK_N)[:, None]
            positions = (rows + (k_len - q_len))[None, :]
            if CAUSAL:
                weights = tl.where(keys <= positions, weights, 0.0)
            if WINDOW:
                weights = tl.where(keys > positions - window, weights, 0.0)
        grad_tile = load_rows(grad_out, b, h, m, q_len, grad_s, BLOCK_M, HEAD_DIM, BLOCK_D, True, TMA)
        dv = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        row_delta = tl.load(delta + rows)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        dk = tl.dot(grad_scores.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q,
    k,
    v,
    grad_out,
    sums2,
    delta,
    dk,
    dv,
    cu_q,
    cu_k,
    scale,  # of the scores, times log2(e)
    scale_out,  # of the scores
    window,
    heads,
    group,
    heads_each,  # query heads a program does: the group, or one
    q_len,
    k_len,
    padded,
    rows_total,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    grad_b,
    grad_h,
    grad_s,
    dk_b,
    dk_h,
    dk_s,
    dv_b,
    dv_h,
    dv_s,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    units = heads // heads_each
    b = tl.program_id(0) // units
    unit = tl.program_id(0) % units
    kv_h = unit * heads_each // group
    n = tl.program_id(1) * BLOCK_N  # under causality the first keys have the most queries, and start first
    q_start, q_len = sequence(cu_q, b, q_len, VARLEN)
    k_start, k_len = sequence(cu_k, b, k_len, VARLEN)
    if n >= k_len:
        return

    if TMA:
        k_rows, v_rows = k, v
    else:
        k_rows = k + b.to(tl.int64) * k_b + kv_h.to(tl.int64) * k_h + k_start * k_s
        v_rows = v + b.to(tl.int64) * v_b + kv_h.to(tl.int64) * v_h + k_start * v_s
    k_tile = load_rows(k_rows, b, kv_h, n, k_len, k_s, BLOCK_N, HEAD_DIM, BLOCK_D, True, TMA)
    v_tile = load_rows(v_rows, b, kv_h, n, k_len, v_s, BLOCK_N, HEAD_DIM, BLOCK_D, True, TMA)

    # Queries that see any of these keys, [first, last); those of [inner, outer) see all of them.
    shift = k_len - q_len
    first, last = 0, q_len
    inner, outer = 0, tl.cdiv(q_len, BLOCK_M) * BLOCK_M
    if CAUSAL:
        first = tl.maximum(n - shift, 0) // BLOCK_M * BLOCK_M
        inner = tl.cdiv(tl.maximum(n + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
    if WINDOW:
        last = tl.maximum(tl.minimum(q_len, tl.minimum(n + BLOCK_N, k_len) - 1 - shift + window), 0)
        outer = tl.minimum(outer, tl.maximum(n - shift + window, 0) // BLOCK_M * BLOCK_M)
        outer = tl.maximum(outer, inner)

    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    row = _workspace_row(b, q_start, padded, VARLEN)
    for i in range(heads_each):
        h = unit * heads_each + i
        at = h.to(tl.int64) * rows_total + row
        if TMA:
            q_rows, grad_rows = q, grad_out
        else:
            q_rows = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + q_start * q_s
            grad_rows = grad_out + b.to(tl.int64) * grad_b + h.to(tl.int64) * grad_h + q_start * grad_s
        if CAUSAL:
            acc_k, acc_v = _add_queries(
                acc_k, acc_v, k_tile, v_tile, q_rows, grad_rows, sums2 + at, delta + at, b, h,
                first, tl.minimum(inner, last), n, q_len, k_len, q_s, grad_s, scale, window,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, True, TMA, PRECISION,
            )  # fmt: skip
        acc_k, acc_v = _add_queries(
            acc_k, acc_v, k_tile, v_tile, q_rows, grad_rows, sums2 + at, delta + at, b, h, inner, outer, n,
            q_len, k_len, q_s, grad_s, scale, window,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, False, TMA, PRECISION,
        )  # fmt: skip
        if WINDOW:
            acc_k, acc_v = _add_queries(
                acc_k, acc_v, k_tile, v_tile, q_rows, grad_rows, sums2 + at, delta + at, b, h, outer, last, n,
                q_len, k_len, q_s, grad_s, scale, window,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, True, TMA, PRECISION,
            )  # fmt: skip

    rows = tl.arange(0, BLOCK_N)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < k_len - n) & (dims < HEAD_DIM)
    at_v = dv + b.to(tl.int64) * dv_b + unit.to(tl.int64) * dv_h + (k_start + n) * dv_s + (rows * dv_s + dims)
    tl.store(at_v, acc_v.to(dv.dtype.element_ty), mask=inside)
    at_k = dk + b.to(tl.int64) * dk_b + unit.to(tl.int64) * dk_h + (k_start + n) * dk_s + (rows * dk_s + dims)
    tl.store(at_k, (acc_k * scale_out).to(dk.dtype.element_ty), mask=inside)


@triton.jit
def _add_keys(
    dq,
    q_tile,
    grad_tile,
    row_sums,
    row_delta,
    k,
    v,
    b,
    h,
    begin,
    end,
    positions,
    k_len,
    k_s,
    v_s,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the keys ``begin`` .. ``end`` - 1 contribute to dQ."""
    for n in tl.range(begin, end, BLOCK_N):
        k_tile = load_rows(k, b, h, n, k_len, k_s, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, TMA)
        v_tile = load_rows(v, b, h, n, k_len, v_s, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, TMA)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        weights = tl.exp2(scores * scale - row_sums[:, None])
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)[None, :]
            allowed = keys < k_len
            if CAUSAL:
                allowed &= keys <= positions[:, None]
            if WINDOW:
                allowed &= keys > positions[:, None] - window
            weights = tl.where(allowed, weights, 0.0)
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        dq = tl.dot(grad_scores.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q,
    k,
    v,
    grad_out,
    sums2,
    delta,
    dq,
    cu_q,
    cu_k,
    scale,
    scale_out,
    window,
    heads,
    group,
    q_len,
    k_len,
    padded,
    rows_total,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    grad_b,
    grad_h,
    grad_s,
    dq_b,
    dq_h,
    dq_s,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    VARLEN: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    kv_h = h // group
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_start, q_len = sequence(cu_q, b, q_len, VARLEN)
    k_start, k_len = sequence(cu_k, b, k_len, VARLEN)
    if m >= q_len:
        return

    if TMA:
        q_rows, grad_rows, k_rows, v_rows = q, grad_out, k, v
    else:
        q_rows = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + q_start * q_s
        grad_rows = grad_out + b.to(tl.int64) * grad_b + h.to(tl.int64) * grad_h + q_start * grad_s
        k_rows = k + b.to(tl.int64) * k_b + kv_h.to(tl.int64) * k_h + k_start * k_s
        v_rows = v + b.to(tl.int64) * v_b + kv_h.to(tl.int64) * v_h + k_start * v_s
    q_tile = load_rows(q_rows, b, h, m, q_len, q_s, BLOCK_M, HEAD_DIM, BLOCK_D, True, TMA)
    grad_tile = load_rows(grad_rows, b, h, m, q_len, grad_s, BLOCK_M, HEAD_DIM, BLOCK_D, True, TMA)
    rows = tl.arange(0, BLOCK_M)
    at = h.to(tl.int64) * rows_total + _workspace_row(b, q_start, padded, VARLEN) + m + rows
    row_sums = tl.load(sums2 + at)
    row_delta = tl.load(delta + at)

    # As in the forward pass.
    shift = k_len - q_len
    positions = m + shift + rows
    first, last = 0, k_len
    inner, outer = 0, (k_len // BLOCK_N) * BLOCK_N
    if CAUSAL:
        last = tl.maximum(tl.minimum(k_len, tl.minimum(m + BLOCK_M, q_len) + shift), 0)
        outer = (tl.maximum(tl.minimum(k_len, m + shift + 1), 0) // BLOCK_N) * BLOCK_N
    if WINDOW:
        first = (tl.maximum(m + shift - window + 1, 0) // BLOCK_N) * BLOCK_N
        inner = (tl.maximum(m + BLOCK_M + shift - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        outer = tl.maximum(outer, inner)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW:
        acc = _add_keys(
            acc, q_tile, grad_tile, row_sums, row_delta, k_rows, v_rows, b, kv_h, first, tl.minimum(inner, last),
            positions, k_len, k_s, v_s, scale, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, TMA, PRECISION,
        )  # fmt: skip
    acc = _add_keys(
        acc, q_tile, grad_tile, row_sums, row_delta, k_rows, v_rows, b, kv_h, inner, outer,
        positions, k_len, k_s, v_s, scale, window,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, False, TMA, PRECISION,
    )  # fmt: skip
    acc = _add_keys(
        acc, q_tile, grad_tile, row_sums, row_delta, k_rows, v_rows, b, kv_h, outer, last,
        positions, k_len, k_s, v_s, scale, window,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, TMA, PRECISION,
    )  # fmt: skip

    dims = tl.arange(0, BLOCK_D)[None, :]
    at_dq = dq + b.to(tl.int64) * dq_b + h.to(tl.int64) * dq_h + (q_start + m) * dq_s + (rows[:, None] * dq_s + dims)
    inside = (rows[:, None] < q_len - m) & (dims < HEAD_DIM)
    tl.store(at_dq, (acc * scale_out).to(dq.dtype.element_ty), mask=inside)
