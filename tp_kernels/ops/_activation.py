"""Names of the activations that ``linear`` knows, and PyTorch's functions for them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "ACTIVATION_CODES", "activate"]

# Codes of csrc/cpu/kernels.h.
ACTIVATION_CODES = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
ACTIVATIONS = tuple(name for name in ACTIVATION_CODES if name is not None)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Apply one of :data:`ACTIVATIONS`, or nothing for None."""
    if activation is None:
        return x
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.relu(x)
