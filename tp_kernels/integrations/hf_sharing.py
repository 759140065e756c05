"""A ``ParallelCausalLM`` over the memory of a patched Hugging Face model, for fast generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_kernels.integrations.hf_packing import PackedLinears
from tp_kernels.layers.linear import RowParallelLinear
from tp_kernels.models import ModelConfig, ParallelCausalLM

__all__ = ["SharedModel"]


class SharedModel:
    """Keeps the ``ParallelCausalLM`` of a model for as long as the model's parameters stay where they are."""

    def __init__(self):
        self._key: tuple | None = None
        self._shared: ParallelCausalLM | None = None

    def forget(self) -> None:
        """Drop it: the parameters are about to move."""
        self._key = self._shared = None

    def get(self, model: Any) -> ParallelCausalLM:
        """The model, built if need be. ValueError if it cannot share the parameters of ``model``."""
        if self._shared is None or self._key != _places(model):
            self.forget()
            self._shared = _share(model)
            self._key = _places(model)  # now: projections that lay apart have been packed again
        return self._shared

    def __deepcopy__(self, memo: dict) -> SharedModel:
        return SharedModel()  # a copied model has other parameters


def _places(model: Any) -> tuple:
    return tuple((parameter.data_ptr(), parameter.dtype) for parameter in model.parameters())


def _share(model: Any) -> ParallelCausalLM:
    config = ModelConfig.from_hf(model.config.to_dict())
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: load its weights first")
    decoder = model.model
    shared = ParallelCausalLM(config, group=model.tp_group, device="meta", dtype=decoder.embed_tokens.weight.dtype)
    for index, (layer, ours) in enumerate(zip(decoder.layers, shared.model.layers, strict=True)):
        path = f"model.layers.{index}"
        attention, mlp = layer.self_attn, layer.mlp
        _adopt_packed(ours.self_attn.qkv_proj, attention, f"{path}.self_attn")
        _adopt_packed(ours.mlp.gate_up_proj, mlp, f"{path}.mlp")
        _adopt(ours.self_attn.o_proj, attention.o_proj, f"{path}.self_attn.o_proj")
        _adopt(ours.mlp.down_proj, mlp.down_proj, f"{path}.mlp.down_proj")
        _adopt(ours.input_layernorm, layer.input_layernorm, f"{path}.input_layernorm")
        _adopt(ours.post_attention_layernorm, layer.post_attention_layernorm, f"{path}.post_attention_layernorm")
        if config.qk_norm:
            _adopt(ours.self_attn.q_norm, attention.q_norm, f"{path}.self_attn.q_norm")
            _adopt(ours.self_attn.k_norm, attention.k_norm, f"{path}.self_attn.k_norm")
        for projection, theirs in ((ours.self_attn.o_proj, attention.o_proj), (ours.mlp.down_proj, mlp.down_proj)):
            if isinstance(theirs, RowParallelLinear):
                projection.overlap = theirs.overlap
    _adopt(shared.model.norm, decoder.norm, "model.norm")
    _adopt(shared.model.embed_tokens, decoder.embed_tokens, "model.embed_tokens")
    if config.tie_word_embeddings:
        shared.lm_head.tie_weights(shared.model.embed_tokens)
    else:
        _adopt(shared.lm_head, model.lm_head, "lm_head")
    return shared.eval()


def _adopt_packed(ours: nn.Module, theirs: Any, path: str) -> None:
    names = ", ".join(theirs.packed_names) if isinstance(theirs, PackedLinears) else ""
    if not names:
        raise ValueError(f"{path} was not replaced (see model.tp_report): its projections are not packed")
    reason = theirs.pack()
    with torch.no_grad():
        joined = theirs.joined()
    if joined is None:
        raise ValueError(f"{path}: {reason or names + ' have hooks, or biases that not all of them have'}")
    _set(ours, "weight", joined[0], path)
    _set(ours, "bias", joined[1], path)


def _adopt(ours: nn.Module, theirs: nn.Module, path: str) -> None:
    """Let ``ours`` use the parameters of ``theirs``."""
    weight, bias = getattr(theirs, "weight", None), getattr(theirs, "bias", None)
    quantized = getattr(theirs, "weight_scale", None) is not None
    if type(weight) is not nn.Parameter or quantized or hasattr(theirs, "base_layer"):
        expected = "a layer with a plain float parameter, without LoRA"
        raise ValueError(f"{path} is a {'quantised ' * quantized}{type(theirs).__name__}; expected {expected}")
    _set(ours, "weight", weight, path)
    if "bias" in ours._parameters:
        _set(ours, "bias", bias, path)


def _set(ours: nn.Module, name: str, tensor: torch.Tensor | None, path: str) -> None:
    old = ours._parameters[name]
    expected, got = (None if t is None else list(t.shape) for t in (old, tensor))
    if expected != got:
        raise ValueError(f"{path}: expected a {name} of shape {expected}, got {got}")
    # A parameter of its own: generation needs no gradients, and must not ask for any.
    ours._parameters[name] = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
