"""What a decoder layer of a Hugging Face model hands to the next beside its output: that output, normed already.

Transformers' model passes the hidden states from layer to layer and nothing else. But the sum over the ranks, the
residual and the next layer's first norm are best done in one call, which has both results. So within one pass of the
base model the layers share a ``Handover``, which is passed to them like an attention mask: the one puts the normed
states in, the next takes them out if it was given the very tensor that they are the norm of, and has that norm. Nobody
stands between the two then: a layer that is followed by a hooked one, or has hooks that may change its output, puts
nothing in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tp_kernels.integrations.hf_packing import reads_only

__all__ = ["HANDOVER", "Handover"]

# Keyword argument between our adapters, through transformers' model.
HANDOVER = "tp_handover"


class Handover:
    """For one pass through ``layers``, decoder layers in order.

    Args:
        layers: of the base model.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self._next = {id(layer): following for layer, following in pairwise(layers)}
        self._left: tuple[torch.Tensor, nn.Module, torch.Tensor] | None = None

    def norm_behind(self, layer: nn.Module) -> Any:
        """The norm that reads what ``layer`` returns, and nobody else does before it; None if there is none such."""
        following = self._next.get(id(layer))
        if following is None or "forward" in vars(layer) or "forward" in vars(following):
            return None
        if following._forward_pre_hooks or following._backward_pre_hooks or layer._backward_hooks:
            return None
        if not all(reads_only(hook) for hook in layer._forward_hooks.values()):
            return None
        return getattr(following, "input_layernorm", None)

    def put(self, summed: torch.Tensor, norm: nn.Module, normed: torch.Tensor) -> None:
        """Leave ``norm(summed)`` for the layer that will be given ``summed``."""
        self._left = summed, norm, normed

    def take(self, summed: torch.Tensor, norm: nn.Module) -> torch.Tensor | None:
        """``norm(summed)`` if it was left here, else None; once."""
        left, self._left = self._left, None
        return left[2] if left is not None and left[0] is summed and left[1] is norm else None
