"""Rotary position embedding: cosines and sines per position, in Hugging Face's rotate-half layout.

Angles, cosines and sines are computed in fp32 and kept in fp32, whatever the model's dtype: an angle in bf16 would be
off by whole turns after a few hundred positions. Hence this is a plain object, not a module with buffers that
``.to(dtype)`` would convert. Layers share one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["RotaryEmbedding"]

_SUPPORTED = ("default", "linear", "llama3")


def _number(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ValueError(
            f"rope scaling {scaling.get('rope_type')!r}: expected a positive number {key!r}, got {value!r}"
        )
    return float(value)


def _llama3(inv_freq: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths slowed by ``factor``, short ones left alone, those between interpolated (Llama 3.1)."""
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = _number(scaling, "original_max_position_embeddings")
    if high <= low:
        raise ValueError(f"rope scaling 'llama3': expected high_freq_factor > low_freq_factor, got {high} and {low}")
    wavelength = 2 * math.pi / inv_freq
    slowed = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(medium, between, slowed)


class RotaryEmbedding:
    """Cosines and sines for rotary position embedding.

    Args:
        head_dim: size of a head; even.
        theta: base of the geometric series of wavelengths.
        scaling: None, or a Hugging Face ``rope_parameters``/``rope_scaling`` dict with ``rope_type`` "default",
            "linear" (``factor``) or "llama3" (``factor``, ``low_freq_factor``, ``high_freq_factor``,
            ``original_max_position_embeddings``).

    Raises:
        ValueError: an odd head, a bad number, or a scaling that is not supported.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None):
        if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be a positive even int, got {head_dim!r}")
        if not theta > 0:
            raise ValueError(f"theta must be positive, got {theta!r}")
        scaling = dict(scaling or {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        scaling["rope_type"] = kind
        if kind not in _SUPPORTED:
            raise ValueError(f"rope scaling {kind!r} is not supported; supported: {', '.join(_SUPPORTED)}")
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"expected partial_rotary_factor 1.0, got {scaling['partial_rotary_factor']!r}")
        self.head_dim, self.theta, self.rope_type = head_dim, float(theta), kind
        # Explicitly on the CPU: a model under construction on the meta device still needs real frequencies.
        steps = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / head_dim
        inv_freq = 1.0 / (self.theta**steps)
        if kind == "linear":
            inv_freq = inv_freq / _number(scaling, "factor")
        elif kind == "llama3":
            inv_freq = _llama3(inv_freq, scaling)
        self.inv_freq = inv_freq
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._inv_freq_on: dict[torch.device, torch.Tensor] = {}

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 (cos, sin), each [..., head_dim] with equal halves, for integer ``positions`` [...], on their device."""
        angles = positions.unsqueeze(-1).to(torch.float32) * self._frequencies(positions.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def _frequencies(self, device: torch.device) -> torch.Tensor:
        """``inv_freq`` on ``device``, copied there once: a copy from the host cannot be captured in a CUDA graph."""
        if device == self.inv_freq.device:
            return self.inv_freq
        found = self._inv_freq_on.get(device)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._inv_freq_on[device] = self.inv_freq.to(device)
        return found

    def tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 (cos, sin) of positions 0 .. P-1 with P >= ``length``, each [P, head_dim]; kept for the next call."""
        cached = self._tables.get(device)
        if cached is None or cached[0].shape[0] < length:
            # Grow in powers of two: a sequence that gets longer token by token must not recompute every time.
            size = 1 << max(length - 1, 255).bit_length()
            with torch.inference_mode(False), torch.no_grad():
                cached = self._tables[device] = self(torch.arange(size, device=device))
        return cached

    def __repr__(self) -> str:
        return f"RotaryEmbedding(head_dim={self.head_dim}, theta={self.theta}, rope_type={self.rope_type!r})"
