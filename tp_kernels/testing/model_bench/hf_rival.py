"""Hugging Face transformers as a rival: its own model class on weights that belong to someone else, eager.

Over several ranks it is cut by transformers itself (``tp_plan="auto"``: ``transformers.distributed``), on torch's
process groups. That needs a checkpoint only to read shards from; here the cut model is made on the meta device, and the
shards are put into it. Where its cut is not the one that the given weights have (sizes that the ranks do not divide),
it cannot be measured. It has no CUDA graph, and gathers the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tp_kernels.testing.model_bench.contender import Turn
from tp_kernels.testing.model_bench.plain_model import PlainModel

__all__ = ["HFContender", "hf_model", "hf_model_on_ranks"]

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
    model = _on_meta(model_type, sizes, weights.norm.dtype)
    model.load_state_dict(_state(weights), strict=True, assign=True)
    return _finished(model, weights.norm.device)


def hf_model_on_ranks(
    model_type: str, sizes: Mapping[str, Any], weights: PlainModel, embed: Callable[[], Tensor], process_group: Any
) -> Any:
    """The same, cut over the ranks of ``process_group`` as transformers does by itself.

    Args:
        model_type, sizes: see ``hf_model``.
        weights: this rank's part, of which views are taken.
        embed: makes the whole embedding, for versions that keep it on every rank.
        process_group: of the ranks; it carries the sums.
    Raises:
        ModuleNotFoundError: transformers is not installed, or too old to have ``transformers.distributed``.
        ValueError: as ``hf_model``; or the ranks do not divide the model's sizes.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = _on_meta(model_type, sizes, weights.norm.dtype)
    mesh = DeviceMesh.from_group(process_group, weights.norm.device.type, mesh_dim_names=("tp",))
    if len(inspect.signature(apply_tensor_parallelism).parameters) == 2:
        apply_tensor_parallelism(model, mesh)
    else:  # newer versions are given the plan, with a rule for each module by its name
        plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
        apply_tensor_parallelism(model, mesh, plan)
    state = _state(weights)
    for name, placed in list(model.named_parameters()):
        mine, cut = state.pop(name), isinstance(placed, DTensor)
        if name == "model.embed_tokens.weight" and not cut:
            mine = embed()
        if mine.shape != (placed.to_local() if cut else placed).shape:
            wanted = list((placed.to_local() if cut else placed).shape)
            raise ValueError(f"transformers cuts {name} otherwise: to {wanted}, not {list(mine.shape)}")
        if cut:
            of = {"shape": placed.shape, "stride": placed.stride(), "run_check": False}
            mine = DTensor.from_local(mine, mesh, placed.placements, **of)
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner)._parameters[own_name] = nn.Parameter(mine, requires_grad=False)
    if state:
        raise ValueError(f"transformers' model has no {', '.join(state)}")
    return _finished(model, weights.norm.device)


def _on_meta(model_type: str, sizes: Mapping[str, Any], dtype: torch.dtype) -> Any:
    import transformers

    if model_type not in _CLASSES:
        raise ValueError(f"model_type must be one of {', '.join(_CLASSES)}, got {model_type!r}")
    family = _CLASSES[model_type]
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)


def _state(weights: PlainModel) -> dict[str, Tensor]:
    """Views of ``weights`` under transformers' names."""
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
    return state


def _finished(model: Any, device: torch.device) -> Any:
    # Its buffers are in no checkpoint, and were made on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval().requires_grad_(False)


class HFContender:
    """A model of transformers, called as its ``generate`` calls it: a ``DynamicCache``, one forward a token.

    Args:
        model: the model.
        kv_heads: of this rank; None for all.
    """

    def __init__(self, model: Any, kv_heads: int | None = None):
        self._model = model
        self._kv_heads = model.config.num_key_value_heads if kv_heads is None else kv_heads

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        cache = self._cache()
        found = [self._next(ids, cache)]
        for _ in range(steps):
            found.append(self._next(found[-1].unsqueeze(1), cache))
        return torch.stack(found, dim=1)

    def first_tokens(self, prompts: Sequence[Tensor]) -> Tensor:
        return self._next(*self._padded(prompts))

    def prefill(self, ids: Tensor) -> Turn:
        return Turn(lambda: self._next(ids, self._cache()))

    def prefill_mixed(self, prompts: Sequence[Tensor]) -> Turn:
        ids, _, mask = self._padded(prompts)
        return Turn(lambda: self._next(ids, self._cache(), mask))

    def decode(self, batch: int, context: int, steps: int) -> Turn:
        config, weight = self._model.config, self._model.model.norm.weight
        shape = (2, batch, self._kv_heads, context, config.head_dim)
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

    def _padded(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Any, Tensor]:
        """(ids padded in front of the prompts, a cache, the mask), as tokenizers of transformers make them."""
        ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_side="left")
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        mask = torch.arange(ids.shape[1], 0, -1, device=ids.device) <= lengths.unsqueeze(1)
        return ids, self._cache(), mask.long()

    def _next(self, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
        given = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_(min=0)}
        logits = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **given).logits
        return logits[:, -1].argmax(-1)
