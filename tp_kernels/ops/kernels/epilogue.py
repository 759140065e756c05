"""Activations inside kernels, on fp32 values; the same functions as ``torch.nn.functional``'s."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "silu"]


@triton.jit
def silu(x):
    """``x * sigmoid(x)``."""
    return x * tl.sigmoid(x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply "silu", "gelu", "gelu_tanh" or "relu"; None is the identity."""
    if ACTIVATION == "silu":
        x = silu(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(y) = 2 * sigmoid(2y) - 1: Triton has no tanh of its own that the interpreter knows.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x
