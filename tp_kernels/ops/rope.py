"""Rotary position embedding in Hugging Face's rotate-half layout.

    rotated = x * cos + cat(-x[..., D/2:], x[..., :D/2], -1) * sin

Shapes: q [B, Hq, T, D], k [B, Hkv, T, D]; cos, sin [T, D] or [B, T, D], both halves of D equal. Numerics: computed in
the dtype of q and k, as transformers does (cos and sin are cast to it first).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rope", "apply_rope_reference"]


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch ``apply_rope``."""
    cos = cos.unsqueeze(-3).to(q.dtype)  # [1, T, D] or [B, 1, T, D]: broadcasts over heads
    sin = sin.unsqueeze(-3).to(q.dtype)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: [B, Hq, T, D].
        k: [B, Hkv, T, D].
        cos: [T, D] or [B, T, D], already gathered for the positions, both halves of D equal.
        sin: like ``cos``.

    Returns:
        The rotated ``(q, k)``; differentiable.

    Raises:
        ValueError: shapes do not match.
    """
    if q.shape[-1] % 2 or q.shape[-1] != k.shape[-1] or q.shape[-2] != k.shape[-2]:
        raise ValueError(f"q and k must agree in T and an even D, got {tuple(q.shape)} and {tuple(k.shape)}")
    if cos.shape != sin.shape or cos.shape[-2:] != q.shape[-2:]:
        raise ValueError(
            f"cos and sin must end in [T, D] = {list(q.shape[-2:])}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return apply_rope_reference(q, k, cos, sin)
