"""Hugging Face transformers as a rival: its own model class on weights that belong to someone else, eager."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tp_kernels.testing.model_bench.contender import Turn
from tp_kernels.testing.model_bench.plain_model import PlainModel

__all__ = ["HFContender", "hf_model"]

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}


def hf_model(model_type: str, sizes: Mapping[str, Any], weights: PlainModel) -> Any:
    """The ``*ForCausalLM`` of transformers with views of ``weights``: no weight is copied.

    Args:
        model_type: "llama", "mistral" or "qwen3".
        sizes: of the unsharded model, under the names of transformers' configurations.
        weights: of the whole model.
    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: a model type that is not one of them.
    """
    import transformers

    if model_type not in _CLASSES:
        raise ValueError(f"model_type must be one of {', '.join(_CLASSES)}, got {model_type!r}")
    family = _CLASSES[model_type]
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(weights.norm.dtype)
    q, kv = weights.heads * weights.head_dim, weights.kv_heads * weights.head_dim
    state = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.norm}
    state["lm_head.weight"] = weights.head
    for number, layer in enumerate(weights.layers):
        parts = dict(zip(("q", "k", "v"), layer.qkv.split([q, kv, kv]), strict=True))
        parts |= dict(zip(("gate", "up"), layer.gate_up.chunk(2), strict=True))
        prefix = f"model.layers.{number}."
        state |= {f"{prefix}self_attn.{name}_proj.weight": parts[name] for name in ("q", "k", "v")}
        state |= {f"{prefix}mlp.{name}_proj.weight": parts[name] for name in ("gate", "up")}
        state[f"{prefix}self_attn.o_proj.weight"] = layer.o
        state[f"{prefix}mlp.down_proj.weight"] = layer.down
        state[f"{prefix}input_layernorm.weight"] = layer.input_norm
        state[f"{prefix}post_attention_layernorm.weight"] = layer.post_norm
        if layer.q_norm is not None:
            state[f"{prefix}self_attn.q_norm.weight"] = layer.q_norm
            state[f"{prefix}self_attn.k_norm.weight"] = layer.k_norm
    model.load_state_dict(state, strict=True, assign=True)
    # Its buffers are in no checkpoint, and were made on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(weights.norm.device)
    return model.eval().requires_grad_(False)


class HFContender:
    """A model of transformers, called as its ``generate`` calls it: a ``DynamicCache``, one forward a token."""

    def __init__(self, model: Any):
        self._model = model

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        cache = self._cache()
        found = [self._next(ids, cache)]
        for _ in range(steps):
            found.append(self._next(found[-1].unsqueeze(1), cache))
        return torch.stack(found, dim=1)

    def prefill(self, ids: Tensor) -> Turn:
        return Turn(lambda: self._next(ids, self._cache()))

    def decode(self, batch: int, context: int, steps: int) -> Turn:
        config, weight = self._model.config, self._model.lm_head.weight
        shape = (2, batch, config.num_key_value_heads, context, config.head_dim)
        keys, values = torch.randn(shape, device=weight.device, dtype=weight.dtype).unbind(0)
        first = torch.zeros(batch, 1, dtype=torch.int64, device=weight.device)
        cache = self._cache()

        def reset() -> None:
            nonlocal cache
            cache = self._cache()  # a cache cannot be cut back in the same way in all versions
            for number in range(config.num_hidden_layers):
                cache.update(keys, values, number)  # which copies them

        def play() -> None:
            tokens = first
            for _ in range(steps):
                tokens = self._next(tokens, cache).unsqueeze(1)

        return Turn(play, reset)

    def close(self) -> None:
        pass  # caches belong to the turns

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def _next(self, ids: Tensor, cache: Any) -> Tensor:
        logits = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1)
