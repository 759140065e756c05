"""What stands between the fused QKV projection and attention, in one call: split, QK-norm, RoPE, write to the KV cache.

    q, k, v = (qkv + bias).view(B, T, -1, D).split((Hq, Hkv, Hkv), dim=2)
    q, k = rope(rms_norm(q, q_norm)), rope(rms_norm(k, k_norm))
    k_cache[b, :, lengths[b] + t], v_cache[b, :, lengths[b] + t] = k[b, t], v[b, t]

The caches may be paged. The native CPU path and the GPU kernel round to the dtype where Hugging Face's modules do
(after the bias, after the norm and after its weight), and compute the rotation in fp32, where PyTorch rounds three
times. A cache of another dtype gets the fp32 result of the GPU kernel rounded once, in PyTorch's form rounded to the
dtype of ``qkv`` first. Both exist for the calls and passes they save: the plain form takes about twenty PyTorch calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.ops._gpu import gpu_of, on_gpu
from tp_kernels.ops._library import CPU_DTYPES, define_op, needs_grad, plain_cpu, watched
from tp_kernels.ops._qkv_checks import MAX_HEAD_DIM, check_operands, check_ranges, gpu_qkv_reason, native_qkv_reason
from tp_kernels.ops.norm import rms_norm_reference
from tp_kernels.ops.rope import apply_rope_reference
from tp_kernels.ops.tuning import Choice, Entry, choose_measured, configuration, lookup

__all__ = ["choose_qkv_rope_cache", "native_qkv_reason", "qkv_rope_cache", "qkv_rope_cache_reference"]

_cpu_qkv_rope_cache = native.cpu_qkv_rope_cache
_num_threads = torch.get_num_threads


def _biased(qkv: Tensor, bias: Tensor) -> Tensor:
    """Sum in fp32 (or wider), rounded once."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return (qkv.to(wide) + bias.to(wide)).to(qkv.dtype)


def qkv_rope_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    page_table: Tensor | None = None,
    new_tokens: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch ``qkv_rope_cache``."""
    batch, tokens, width = qkv.shape
    heads = num_heads + 2 * num_kv_heads
    if bias is not None:
        qkv = _biased(qkv, bias)
    heads_of = qkv.reshape(batch, tokens, heads, width // heads)
    q, k, v = heads_of.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    if q_norm is not None:
        q = rms_norm_reference(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm_reference(k, k_norm, eps)
    steps = torch.arange(tokens, device=qkv.device)
    slots = lengths.unsqueeze(-1) + steps  # [B, T]
    where = slots if positions is None else positions.expand(batch, tokens)
    live = None if new_tokens is None else steps < new_tokens.unsqueeze(-1)
    if live is not None:
        where = where.masked_fill(~live, 0)  # padding is rotated by something, but not by what does not exist
    q, k = apply_rope_reference(q.transpose(1, 2), k.transpose(1, 2), cos[where], sin[where])
    k = k.transpose(1, 2)
    rows = torch.arange(batch, device=qkv.device).unsqueeze(-1)
    if live is not None:
        rows, slots, k, v = rows.expand(batch, tokens)[live], slots[live], k[live], v[live]
    if page_table is not None:
        page_size = k_cache.shape[2]
        rows, slots = page_table[rows, slots // page_size].to(torch.int64), slots % page_size
    k_cache[rows, :, slots] = k.to(k_cache.dtype)
    v_cache[rows, :, slots] = v.to(v_cache.dtype)
    return q.to(qkv.dtype)  # a norm with a wider weight (autocast) widens it


def _native_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor | None,
) -> Tensor | None:
    """The native kernel's result, or None if it does not take these operands."""
    dtype = qkv.dtype
    code = CPU_DTYPES.get(dtype)
    if code is None or k_cache.dtype is not dtype or v_cache.dtype is not dtype or qkv.dim() != 3:
        return None
    batch, tokens, width = qkv.shape
    heads = num_heads + 2 * num_kv_heads
    if num_heads < 1 or num_kv_heads < 1 or k_cache.dim() != 4 or v_cache.shape != k_cache.shape:
        return None
    dim = width // heads
    batch_k, heads_k, max_len, dim_k = k_cache.shape
    table_rows, table_dim = cos.shape if cos.dim() == 2 else (0, 0)
    if (
        dim * heads != width
        or dim % 2
        or not 0 < dim <= MAX_HEAD_DIM
        or batch != batch_k
        or heads_k != num_kv_heads
        or dim != dim_k
        or table_dim != dim
        or sin.shape != cos.shape
        or cos.dtype is not torch.float32
        or sin.dtype is not torch.float32
        or not cos.is_contiguous()
        or not sin.is_contiguous()
        or lengths.dtype is not torch.int64
        or lengths.dim() != 1
        or lengths.numel() != batch
        or not (lengths.is_cpu and k_cache.is_cpu and v_cache.is_cpu and cos.is_cpu and sin.is_cpu)
    ):
        return None
    k_batch, k_head, k_position, k_dim = k_cache.stride()
    v_batch, v_head, v_position, v_dim = v_cache.stride()
    if k_dim != 1 or v_dim != 1:
        return None
    q_norm_at = k_norm_at = positions_at = positions_stride = 0
    if q_norm is not None:
        if q_norm.dtype is not dtype or q_norm.shape != (dim,) or not q_norm.is_contiguous():
            return None
        if not q_norm.is_cpu:
            return None
        q_norm_at = q_norm.data_ptr()
    if k_norm is not None:
        if k_norm.dtype is not dtype or k_norm.shape != (dim,) or not k_norm.is_contiguous():
            return None
        if not k_norm.is_cpu:
            return None
        k_norm_at = k_norm.data_ptr()
    if positions is not None:
        if positions.dtype is not torch.int64 or not positions.is_cpu:
            return None
        if positions.shape == (batch, tokens):
            positions_stride = tokens
        elif positions.shape != (tokens,) and positions.shape != (1, tokens):
            return None
        positions = positions.contiguous()
        positions_at = positions.data_ptr()
    qkv, lengths = qkv.contiguous(), lengths.contiguous()
    out = qkv.new_empty(batch, tokens, num_heads, dim)
    _cpu_qkv_rope_cache(
        out.data_ptr(),
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        lengths.data_ptr(),
        positions_at,
        positions_stride,
        k_cache.data_ptr(),
        k_batch,
        k_head,
        k_position,
        v_cache.data_ptr(),
        v_batch,
        v_head,
        v_position,
        q_norm_at,
        k_norm_at,
        eps,
        batch,
        tokens,
        num_heads,
        num_kv_heads,
        dim,
        max_len,
        table_rows,
        code,
        _num_threads(),
    )
    return out.transpose(1, 2)


def _measured(qkv: Tensor, num_heads: int, num_kv_heads: int) -> Entry | None:
    batch, tokens, width = qkv.shape
    return lookup(
        "qkv_rope_cache",
        gpu_of(qkv),
        qkv.dtype,
        m=batch * tokens,
        heads=num_heads,
        kv_heads=num_kv_heads,
        head_dim=width // (num_heads + 2 * num_kv_heads),
    )


def choose_qkv_rope_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    page_table: Tensor | None = None,
    new_tokens: Tensor | None = None,
) -> Choice:
    """Which path a call on a GPU takes, "triton" or "torch", and why."""
    reason = gpu_qkv_reason(
        qkv, cos, sin, lengths, k_cache, v_cache, q_norm, k_norm, positions, bias, page_table, new_tokens
    )
    if reason is not None:
        return Choice("torch", reason)
    entry = _measured(qkv, num_heads, num_kv_heads)
    unmeasured = f"not measured on {gpu_of(qkv).name}; one launch and one pass instead of about twenty"
    return choose_measured(entry, unmeasured)


def _gpu_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor | None,
    bias: Tensor | None,
    page_table: Tensor | None,
    new_tokens: Tensor | None,
) -> Tensor | None:
    """The GPU kernel's result, or None if PyTorch is to compute it; the decision is ``choose_qkv_rope_cache``'s."""
    reason = gpu_qkv_reason(
        qkv, cos, sin, lengths, k_cache, v_cache, q_norm, k_norm, positions, bias, page_table, new_tokens
    )
    if reason is not None:
        return None
    entry = _measured(qkv, num_heads, num_kv_heads)
    if entry is not None and entry.path != "triton":
        return None
    from tp_kernels.ops.kernels import qkv_rope

    batch, tokens, width = qkv.shape
    out = qkv.new_empty(batch, tokens, num_heads, width // (num_heads + 2 * num_kv_heads))
    qkv_rope.qkv_rope(
        out,
        qkv if qkv.stride(-1) == 1 else qkv.contiguous(),
        cos,
        sin,
        lengths.contiguous(),
        k_cache,
        v_cache,
        q_norm=None if q_norm is None else q_norm.contiguous(),
        k_norm=None if k_norm is None else k_norm.contiguous(),
        eps=eps,
        positions=None if positions is None else positions.expand(batch, tokens),
        bias=None if bias is None else bias.contiguous(),
        page_table=page_table if page_table is None or page_table.stride(-1) == 1 else page_table.contiguous(),
        new_tokens=None if new_tokens is None else new_tokens.contiguous(),
        config=configuration(entry, qkv_rope.Config),
    )
    return out.transpose(1, 2)


def _qkv_impl(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    page_table: Tensor | None = None,
    new_tokens: Tensor | None = None,
) -> Tensor:
    if bias is None and page_table is None and new_tokens is None and plain_cpu(qkv):
        out = _native_qkv(
            qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, eps, positions
        )
        if out is not None:
            return out
    norms, more = (q_norm, k_norm), (positions, bias, page_table, new_tokens)
    check_operands(qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, *norms, *more)
    operands = (cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, *norms, eps)
    if on_gpu(qkv):
        out = _gpu_qkv(qkv, *operands, *more)
        if out is not None:
            return out
    elif bias is not None and page_table is None and new_tokens is None:
        return _qkv_impl(_biased(qkv, bias), *operands, positions)
    check_ranges(lengths, positions, qkv.shape[1], k_cache, cos.shape[0], page_table, new_tokens)
    return qkv_rope_cache_reference(qkv, *operands, *more)


def _qkv_op_impl(*args: Any) -> Tensor:
    # One memory order on every path, as promised to the tracer.
    return _qkv_impl(*args).transpose(1, 2).contiguous().transpose(1, 2)


def _qkv_fake(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    page_table: Tensor | None = None,
    new_tokens: Tensor | None = None,
) -> Tensor:
    more = (positions, bias, page_table, new_tokens)
    check_operands(qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, *more)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], num_heads, k_cache.shape[3]).transpose(1, 2)


_OP = define_op(
    "qkv_rope_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor lengths, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "int num_heads, int num_kv_heads, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6, "
    "Tensor? positions=None, Tensor? bias=None, Tensor? page_table=None, Tensor? new_tokens=None) -> Tensor",
    _qkv_op_impl,
    _qkv_fake,
)


def qkv_rope_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    page_table: Tensor | None = None,
    new_tokens: Tensor | None = None,
) -> Tensor:
    """Split the fused projection, normalise and rotate q and k, write k and v to the cache; all in one call.

    An inference op: it has no gradient, call it under ``torch.inference_mode()`` or ``torch.no_grad()``.

    Args:
        qkv: [B, T, (Hq + 2 * Hkv) * D]: all query heads, then key heads, then value heads.
        cos: fp32 table [P, D] over positions, both halves of D equal (Hugging Face's rotate-half layout).
        sin: like ``cos``.
        lengths: int64 [B]; token t of row b goes to cache slot ``lengths[b] + t``.
        k_cache: [B, Hkv, max_len, D], or with a ``page_table`` [pages, Hkv, page_size, D]; written in place. Its dtype
            may differ from that of ``qkv``.
        v_cache: like ``k_cache``.
        num_heads: Hq of this rank.
        num_kv_heads: Hkv of this rank.
        q_norm: [D], weight of a per-head RMS norm of the queries (Qwen3), before the rotation.
        k_norm: like ``q_norm`` for the keys.
        eps: of those norms.
        positions: int64 [B, T] or [T], rows of ``cos`` and ``sin``; by default the cache slots.
        bias: [(Hq + 2 * Hkv) * D], added to ``qkv`` first; None if the projection has added it.
        page_table: int32 [B, max_pages]: slot s of row b is slot ``s % page_size`` of page
            ``page_table[b, s // page_size]``. No two slots that are written may share memory.
        new_tokens: int64 or int32 [B]: only the first ``new_tokens[b]`` tokens of row b count. The others (padding on
            the right) are not written to the cache; their queries are finite but mean nothing.

    Returns:
        Rotated queries [B, Hq, T, D] in ``qkv.dtype``.

    Raises:
        ValueError: shapes do not match, a token would land outside the cache, its pages or the table (on the CPU), or a
            gradient would be needed.

    On a GPU nothing waits for the values of ``lengths``, ``positions`` and ``page_table``, so they cannot raise: a key
    or value whose slot is outside the cache, or whose page does not exist, is not written, and a token that counts but
    whose position is outside the rotary table becomes NaN.
    """
    if needs_grad(qkv, q_norm, k_norm, bias):
        raise ValueError("qkv_rope_cache has no gradient: call it under torch.inference_mode() or torch.no_grad()")
    run = _OP if watched() else _qkv_impl
    operands = (qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, eps, positions)
    return run(*operands, bias, page_table, new_tokens)
