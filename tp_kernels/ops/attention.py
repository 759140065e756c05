"""Grouped-query attention over whole sequences (training, prefill).

    attention(q, k, v) = softmax(q @ k.T * scale + mask) @ v

Shapes: q [B, Hq, T, D]; k, v [B, Hkv, L, D]; query head h uses KV head ``h // (Hq // Hkv)``. On the CPU it is PyTorch's
scaled_dot_product_attention, without a mask tensor wherever its flash kernels need none; on a GPU calls without an
explicit mask take the path of ``flash_attention``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels.ops._gpu import on_gpu
from tp_kernels.ops.tuning import Choice

__all__ = [
    "allowed_mask",
    "attention",
    "attention_reference",
    "check_attention",
    "choose_attention",
    "plain_attention",
    "sdpa_attention",
]


def allowed_mask(query_positions: Tensor, kv_len: int, causal: bool, sliding_window: int | None) -> Tensor | None:
    """Bool mask [..., T, kv_len] of the keys that each query may see; None when that is all of them."""
    if not causal and sliding_window is None:
        return None
    keys = torch.arange(kv_len, device=query_positions.device)
    queries = query_positions.unsqueeze(-1)
    allowed = keys <= queries if causal else torch.ones((), dtype=torch.bool, device=keys.device)
    if sliding_window is not None:
        allowed = allowed & (keys > queries - sliding_window)
    return allowed


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """Scores, fp32 softmax, weighted sum: transformers' eager attention; ``allowed`` broadcasts to [B, H, T, L]."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if allowed is not None:
        if allowed.dtype == torch.bool:
            scores = scores.masked_fill(~allowed, float("-inf"))
        else:
            scores = scores + allowed
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype), v)


def _merge_masks(allowed: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    if mask.dtype == torch.bool:
        return allowed & mask
    return mask.masked_fill(~allowed, float("-inf"))


def check_attention(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> None:
    """ValueError for operands that do not fit together."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "expected q [B, Hq, T, D] and k, v [B, Hkv, L, D], got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in B and D, and Hq must be a multiple of Hkv"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 or None, got {sliding_window}")


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch ``attention``."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    positions = torch.arange(q.shape[2], device=q.device) + (k.shape[2] - q.shape[2])
    allowed = allowed_mask(positions, k.shape[2], causal, sliding_window)
    return plain_attention(q, k, v, scale, _merge_masks(allowed, mask))


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``attention`` by PyTorch's scaled_dot_product_attention, unchecked."""
    length, kv_len = q.shape[2], k.shape[2]
    windowed = sliding_window is not None and (sliding_window < kv_len or not causal)
    groups = q.shape[1] != k.shape[1]
    if mask is None and not windowed and (not causal or length == kv_len or length == 1):
        # No mask tensor: SDPA may take its flash kernels, which know causality. A branch, because where the length is
        # dynamic in traced code its comparison is no bool, which SDPA insists on.
        if length == 1:
            causal = False
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=groups)
    positions = torch.arange(length, device=q.device) + (kv_len - length)
    allowed = _merge_masks(allowed_mask(positions, kv_len, causal, sliding_window), mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=groups)


def choose_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Choice:
    """Which GPU path ``attention`` takes for these arguments ("gluon", "triton" or "torch"), and why."""
    if mask is not None:
        return Choice("torch", "own kernels take no mask tensor")
    from tp_kernels.ops.flash_attention import choose_flash_attention

    return choose_flash_attention(q, k, v, causal=causal, sliding_window=sliding_window, scale=scale)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads; differentiable.

    Args:
        q: [B, Hq, S, D].
        k: [B, Hkv, L, D]. With L > S the queries are the last S positions.
        v: like ``k``.
        causal: query i sees keys up to its own position.
        sliding_window: a query sees only the last ``sliding_window`` positions, its own included.
        scale: factor of the scores, ``1 / sqrt(D)`` by default.
        mask: bool (True = may attend) or additive float, broadcastable to [B, Hq, S, L]; combined with the above.

    Returns:
        [B, Hq, S, D].

    Raises:
        ValueError: shapes do not match.
    """
    check_attention(q, k, v, sliding_window)
    if mask is None and on_gpu(q):
        # Imported here because that module builds on this one.
        from tp_kernels.ops.flash_attention import flash_attention

        return flash_attention(q, k, v, causal=causal, sliding_window=sliding_window, scale=scale)
    return sdpa_attention(q, k, v, causal=causal, sliding_window=sliding_window, scale=scale, mask=mask)
