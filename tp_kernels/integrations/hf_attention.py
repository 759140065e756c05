"""The attention of a Hugging Face model: one matmul for queries, keys and values, our rotation and attention kernels.

Whatever those cannot express is left to transformers: masks with padding go to its attention function; other caches
than ``DynamicCache`` and other attention implementations than "sdpa" to its whole ``forward``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tp_kernels import ops
from tp_kernels.integrations.hf_packing import PackedLinears

__all__ = ["BEFORE_OUTPUT", "IMPLEMENTATION", "PLAIN_MASK", "AttentionAdapter"]

IMPLEMENTATION = "sdpa"

# Keyword arguments between our adapters, through transformers' code. The mask is causal, within the window if there is
# one, and nothing else: it need not be looked at.
PLAIN_MASK = "tp_plain_mask"
# The output projection is left to the caller, with its sum over the ranks.
BEFORE_OUTPUT = "tp_before_output"

# Keyword arguments of transformers' attention functions that change the result.
_BEYOND_US = ("position_bias", "softcap", "cache", "s_aux")


class AttentionAdapter(PackedLinears):
    """Takes the place of ``forward`` in ``LlamaAttention`` and its like.

    Attributes:
        tp_group: the ``TPGroup`` of the projections.
        tp_window: the sliding window in tokens, the token itself included, or None.
    """

    packed_names = ("q_proj", "k_proj", "v_proj")

    def runs_here(self, past_key_values: Any) -> bool:
        """Whether a call would not be left to transformers' ``forward``."""
        return self.config._attn_implementation == IMPLEMENTATION and (
            past_key_values is None or type(past_key_values) is DynamicCache
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As transformers' ``forward``: [B, S, hidden] -> ([B, S, hidden], attention weights or None)."""
        plain, before = kwargs.pop(PLAIN_MASK, False), kwargs.pop(BEFORE_OUTPUT, False)
        if not self.runs_here(past_key_values):
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        batch, length = hidden_states.shape[:2]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self._project(hidden_states))
        if "q_norm" in self._modules:
            # Norm weights kept in fp32 must not widen the queries beside 16-bit values.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = ops.apply_rope(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        mixed, weights = self._mix(q, k, v, attention_mask, plain, kwargs)
        mixed = mixed.reshape(batch, length, -1)
        return (mixed if before else self.o_proj(mixed)), weights

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joined = self.joined()
        if joined is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        widths = [self._modules[name].weight.shape[0] for name in self.packed_names]
        return ops.column_parallel_linear(x, *joined, group=self.tp_group).split(widths, dim=-1)

    def _mix(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, plain: bool, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(attention's result [B, S, heads, D], its weights or None)."""
        dropout = self.attention_dropout if self.training else 0.0
        length, seen = q.shape[2], k.shape[2]
        # Without a mask and without that word from our model, transformers' attention knows of no window either.
        window = self.tp_window if plain else None
        expressible = (
            (mask is None or plain)
            and not dropout
            and self.is_causal
            and getattr(self.config, "is_causal", True)
            and kwargs.get("is_causal") is None
            and not any(kwargs.get(name) is not None for name in _BEYOND_US)
        )
        # One token that sees all keys: PyTorch's kernels spread the keys over the GPU; ours for sequences do not.
        if expressible and (length > 1 or (window is not None and seen > window)):
            if not plain and seen > length:  # no mask at all: the keys behind are room for later
                k, v = k[:, :, :length], v[:, :, :length]
            mixed = ops.attention(q, k, v, causal=True, sliding_window=window, scale=self.scaling)
            return mixed.transpose(1, 2), None
        if expressible:
            mask = None
        attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
        return attend(
            self, q, k, v, mask, dropout=dropout, scaling=self.scaling, sliding_window=self.tp_window, **kwargs
        )
