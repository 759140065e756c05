"""What ``apply_tp_kernels`` accepts: everything is checked here, before the first change."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_kernels.checkpoint.sharding import shard_heads
from tp_kernels.comm.overlap import check_offered
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.integrations._group_checks import check_model_device
from tp_kernels.integrations.hf_packing import unobserved

__all__ = ["FAMILIES", "Family", "check_model", "gate_is_silu", "options_text"]

# Module path of each family's code in transformers.
FAMILIES = {
    name: f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
_OVERLAPS = ("auto", "none", "chunked", "fused")
_SILU = ("silu", "swish")


@dataclass(frozen=True)
class Family:
    """A model family's classes in transformers."""

    name: str
    causal_lm: type
    model: type
    layer: type
    attention: type
    mlp: type
    norm: type

    @classmethod
    def of(cls, model: Any) -> Family:
        """The family of a model; ValueError if it is none that is supported."""
        supported = ", ".join(f"{name}ForCausalLM" for name in FAMILIES)
        kind = type(model)
        for name, path in FAMILIES.items():
            if kind.__name__ != f"{name}ForCausalLM" or kind.__module__ != path:
                continue
            code = importlib.import_module(path)
            parts = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")
            return cls(name, *(getattr(code, name + part) for part in parts))
        if any("peft" in base.__module__.split(".")[0] for base in kind.__mro__):
            raise ValueError(f"expected one of {supported}, got a {kind.__name__}: apply it before get_peft_model")
        if not isinstance(model, nn.Module):
            raise ValueError(f"expected one of {supported}, got {kind.__name__}")
        hint = ""
        if hasattr(model, "_orig_mod"):
            hint = "; apply it before torch.compile"
        elif isinstance(getattr(model, "module", None), nn.Module):
            hint = "; apply it to the model inside the wrapper, before wrapping"
        elif kind.__name__.removesuffix("Model") in FAMILIES:
            hint = "; give it the whole causal language model, not its base model"
        raise ValueError(f"expected one of {supported} of transformers, got {kind.__name__}{hint}")


def gate_is_silu(config: Any) -> bool:
    """Whether the MLP's gate is the one that our kernels compute."""
    return config.hidden_act in _SILU


def options_text(model: Any, **options: Any) -> str:
    """A text that must be equal on all ranks."""
    config = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    described = {key: value for key, value in described.items() if not key.startswith("_")}
    dtypes = sorted({str(p.dtype) for p in model.parameters()}) if isinstance(model, nn.Module) else []
    trained = [p.requires_grad for p in model.parameters()] if isinstance(model, nn.Module) else []
    return repr((type(model).__name__, sorted(described.items(), key=lambda item: item[0]), dtypes, trained, options))


def check_model(model: Any, group: TPGroup, *, linear: bool, overlap: str) -> Family:
    """The model's family; ValueError for whatever cannot be patched. Changes nothing, no communication."""
    if getattr(model, "tp_report", None) is not None:
        raise ValueError("apply_tp_kernels was applied to this model already; see model.tp_report")
    family = Family.of(model)
    if overlap not in _OVERLAPS:
        raise ValueError(f"overlap must be one of {', '.join(_OVERLAPS)}, got {overlap!r}")
    if not linear and group.world_size > 1:
        raise ValueError(f"linear=False leaves the weights whole: expected one rank, got {group.world_size}")
    _check_state(model)
    _check_modules(model, family)
    _check_parameters(model)
    check_model_device(model, group)
    device = model.lm_head.weight.device
    if overlap in ("chunked", "fused") and device.type != "meta":
        check_offered(overlap, group, device)
    config = model.config
    heads, ranks = config.num_attention_heads, group.world_size
    shard_heads(heads, config.num_key_value_heads, ranks, 0)
    for key in ("intermediate_size", "vocab_size"):
        if getattr(config, key) < ranks:
            raise ValueError(f"cannot spread {key}={getattr(config, key)} over {ranks} ranks")
    return family


def _check_state(model: Any) -> None:
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None) or "unknown"
        raise ValueError(f"a quantised model ({getattr(method, 'value', method)}) is not supported; load float weights")
    if getattr(model, "_tp_size", None) is not None:
        raise ValueError("the model is tensor-parallel already, by transformers' tp_plan; load it without")
    devices = getattr(model, "hf_device_map", None) or {}
    if len({str(device) for device in devices.values()}) > 1:
        raise ValueError(f"the model is spread over devices {sorted(map(str, devices.values()))}; expected one")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model has PEFT adapters; apply_tp_kernels comes before they are added")


def _check_modules(model: Any, family: Family) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(f"{name} is a {type(module).__name__} of PEFT; apply it before get_peft_model")
        if hasattr(module, "_hf_hook"):
            raise ValueError(f"{name or 'the model'} has a hook of accelerate; load the model without device_map")
    expected = [("model", model.model, family.model), ("model.norm", model.model.norm, family.norm)]
    plain = [("lm_head", model.lm_head, nn.Linear), ("model.embed_tokens", model.model.embed_tokens, nn.Embedding)]
    for index, layer in enumerate(model.model.layers):
        path = f"model.layers.{index}"
        expected.append((path, layer, family.layer))
        if type(layer) is not family.layer:
            break
        expected += [(f"{path}.self_attn", layer.self_attn, family.attention), (f"{path}.mlp", layer.mlp, family.mlp)]
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected.append((f"{path}.{name}", getattr(layer, name), family.norm))
        for owner, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            part = getattr(layer, owner)
            plain += [(f"{path}.{owner}.{n}_proj", getattr(part, f"{n}_proj", None), nn.Linear) for n in names]
    for path, module, kind in expected:
        if type(module) is not kind:
            raise ValueError(f"{path}: expected a {kind.__name__}, got {type(module).__name__}")
    for path, module, kind in plain:
        if type(module) is not kind:
            raise ValueError(f"{path}: expected a torch.nn.{kind.__name__}, got {type(module).__name__}")
        if not unobserved(module):
            raise ValueError(f"{path} has hooks or a forward of its own, which would be lost; remove them first")
    embedding = model.model.embed_tokens
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        raise ValueError("model.embed_tokens: expected one without max_norm, scale_grad_by_freq and sparse")


def _check_parameters(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ValueError(f"{name}: expected a plain parameter, got a {type(parameter).__name__}")
        if not parameter.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point parameter, got {parameter.dtype}")
        if parameter.grad is not None:
            raise ValueError(f"{name} has a gradient, which would be lost; call zero_grad() first")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"expected all parameters on one device, got {sorted(map(str, devices))}")
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if tied != bool(model.config.tie_word_embeddings) and torch.device("meta") not in devices:
        stated = "tied" if model.config.tie_word_embeddings else "not tied"
        raise ValueError(f"config says that the embeddings are {stated}, the model's lm_head.weight disagrees")
