"""What stands between the fused QKV projection and attention, in one call: split, QK-norm, RoPE, write to the KV cache.

    q, k, v = qkv.view(B, T, -1, D).split((Hq, Hkv, Hkv), dim=2)
    q, k = rope(rms_norm(q, q_norm)), rope(rms_norm(k, k_norm))
    k_cache[b, :, lengths[b] + t], v_cache[b, :, lengths[b] + t] = k[b, t], v[b, t]

The native CPU path rounds to the dtype where Hugging Face's modules do (after the norm and its weight), and computes
the rotation in fp32, where PyTorch rounds three times. It exists for the call overhead: the plain form takes about
twenty PyTorch calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.ops._library import CPU_DTYPES, define_op, needs_grad, plain_cpu, plain_reason, watched
from tp_kernels.ops.norm import rms_norm_reference
from tp_kernels.ops.rope import apply_rope_reference

__all__ = ["qkv_rope_cache", "qkv_rope_cache_reference"]

MAX_HEAD_DIM = 256  # csrc/cpu/kernels.h

_cpu_qkv_rope_cache = native.cpu_qkv_rope_cache
_num_threads = torch.get_num_threads


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
) -> Tensor:
    """Plain PyTorch ``qkv_rope_cache``."""
    batch, tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    q, k, v = qkv.view(batch, tokens, -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    if q_norm is not None:
        q = rms_norm_reference(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm_reference(k, k_norm, eps)
    slots = lengths.unsqueeze(-1) + torch.arange(tokens, device=qkv.device)  # [B, T]
    where = slots if positions is None else positions.expand(batch, tokens)
    q, k = apply_rope_reference(q.transpose(1, 2), k.transpose(1, 2), cos[where], sin[where])
    rows = torch.arange(batch, device=qkv.device).unsqueeze(-1)
    k_cache[rows, :, slots] = k.transpose(1, 2).to(k_cache.dtype)
    v_cache[rows, :, slots] = v.to(v_cache.dtype)
    return q


def _check(
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
    positions: Tensor | None,
) -> None:
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(f"expected at least one head of each kind, got {num_heads} and {num_kv_heads}")
    heads = num_heads + 2 * num_kv_heads
    if qkv.dim() != 3 or qkv.shape[-1] % heads:
        raise ValueError(f"expected qkv [B, T, ({num_heads} + 2 * {num_kv_heads}) * D], got {list(qkv.shape)}")
    batch, tokens, width = qkv.shape
    dim = width // heads
    if dim % 2 or dim == 0:
        raise ValueError(f"expected an even head_dim, got {dim}")
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(f"expected caches of one shape, got {list(k_cache.shape)} and {list(v_cache.shape)}")
    if (k_cache.shape[0], k_cache.shape[1], k_cache.shape[3]) != (batch, num_kv_heads, dim):
        raise ValueError(f"expected caches [{batch}, {num_kv_heads}, max_len, {dim}], got {list(k_cache.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] != dim:
        raise ValueError(f"expected cos and sin [positions, {dim}], got {list(cos.shape)} and {list(sin.shape)}")
    if lengths.dtype != torch.int64 or lengths.shape != (batch,):
        raise ValueError(f"expected int64 lengths [{batch}], got {list(lengths.shape)} {lengths.dtype}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and norm.shape != (dim,):
            raise ValueError(f"expected {name} [{dim}], got {list(norm.shape)}")
    if positions is not None and positions.shape not in ((tokens,), (1, tokens), (batch, tokens)):
        raise ValueError(f"expected positions [{batch}, {tokens}] or [{tokens}], got {list(positions.shape)}")


def _check_ranges(lengths: Tensor, positions: Tensor | None, tokens: int, max_len: int, table_rows: int) -> None:
    """ValueError for a token outside cache or table. On a GPU the caller checks: reading them would stall the GPU."""
    if not lengths.is_cpu or not lengths.numel() or not tokens:
        return
    first, last = int(lengths.min()), int(lengths.max()) + tokens
    if first < 0 or last > max_len:
        raise ValueError(f"a row starts at {first} or ends at {last}, outside a cache of {max_len} positions")
    if positions is not None:
        first, last = int(positions.min()), int(positions.max()) + 1
    if first < 0 or last > table_rows:
        raise ValueError(f"positions {first} .. {last - 1} are outside the rotary table of {table_rows} rows")


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


def native_qkv_reason(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *_: object,
    **__: object,
) -> str | None:
    """Why ``qkv_rope_cache`` would not take the native CPU path; None if it would."""
    reason = plain_reason(qkv)
    if reason is not None:
        return reason
    if k_cache.dtype != qkv.dtype or v_cache.dtype != qkv.dtype:
        return "the dtypes differ"
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return "the rotary tables are not float32"
    if k_cache.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {k_cache.shape[-1]} is above {MAX_HEAD_DIM}"
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "the last dimension of a cache is not dense"
    return None


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
) -> Tensor:
    if plain_cpu(qkv):
        out = _native_qkv(
            qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, eps, positions
        )
        if out is not None:
            return out
    _check(qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, positions)
    _check_ranges(lengths, positions, qkv.shape[1], k_cache.shape[2], cos.shape[0])
    return qkv_rope_cache_reference(
        qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, eps, positions
    )


def _qkv_op_impl(*args: object) -> Tensor:
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
) -> Tensor:
    _check(qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, positions)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], num_heads, k_cache.shape[3]).transpose(1, 2)


_OP = define_op(
    "qkv_rope_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor lengths, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "int num_heads, int num_kv_heads, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6, "
    "Tensor? positions=None) -> Tensor",
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
) -> Tensor:
    """Split the fused projection, normalise and rotate q and k, write k and v to the cache; all in one call.

    An inference op: it has no gradient, call it under ``torch.inference_mode()`` or ``torch.no_grad()``.

    Args:
        qkv: [B, T, (Hq + 2 * Hkv) * D]: all query heads, then key heads, then value heads; bias already added.
        cos: fp32 table [P, D] over positions, both halves of D equal (Hugging Face's rotate-half layout).
        sin: like ``cos``.
        lengths: int64 [B]; token t of row b goes to cache slot ``lengths[b] + t``.
        k_cache: [B, Hkv, max_len, D], written in place.
        v_cache: like ``k_cache``.
        num_heads: Hq of this rank.
        num_kv_heads: Hkv of this rank.
        q_norm: [D], weight of a per-head RMS norm of the queries (Qwen3), before the rotation.
        k_norm: like ``q_norm`` for the keys.
        eps: of those norms.
        positions: int64 [B, T] or [T], rows of ``cos`` and ``sin``; by default the cache slots.

    Returns:
        Rotated queries [B, Hq, T, D].

    Raises:
        ValueError: shapes do not match, a token would land outside the cache or the table (on the CPU), or a gradient
            would be needed.
    """
    if needs_grad(qkv, q_norm, k_norm):
        raise ValueError("qkv_rope_cache has no gradient: call it under torch.inference_mode() or torch.no_grad()")
    if watched():
        return _OP(qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, eps, positions)
    return _qkv_impl(qkv, cos, sin, lengths, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, eps, positions)
