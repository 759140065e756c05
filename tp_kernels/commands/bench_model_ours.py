"""Our side of ``tp-kernels bench model``: models with seeded random weights, and the decode engine as a contender."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tp_kernels import ops
from tp_kernels.inference.engine import DecodeEngine
from tp_kernels.layers import iter_tensor_shards, quantize_model
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.model_bench.contender import Turn
from tp_kernels.testing.model_bench.plain_model import LayerWeights, PlainModel
from tp_kernels.testing.model_bench.sums import Sums

__all__ = ["EngineContender", "FullWeights", "make_model", "plain_view", "quantized", "sharing"]


def _full(name: str, shape: Sequence[int], device: Any) -> Tensor:
    """The unsharded tensor of a stock name, fp32: the same for every number of ranks.

    Each projection keeps the variance of what it reads, so that activations grow with the root of the depth only and
    logits are of the size of one.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    numbers = torch.randn(tuple(shape), generator=generator, device=device)
    if len(shape) == 1:
        return numbers.mul_(0.1).add_(1.0)
    return numbers if "embed_tokens" in name else numbers.mul_(shape[1] ** -0.5)


def make_model(config: ModelConfig, group: Any, device: Any, dtype: torch.dtype) -> ParallelCausalLM:
    """This rank's part of the model with random weights, exact in ``dtype``.

    On any number of ranks it is the same model, if their GPUs show them equally many SMs: torch's random numbers depend
    on these.
    """
    model = ParallelCausalLM(config, group=group, device="meta", dtype=dtype).to_empty(device=device)
    for shard in iter_tensor_shards(model):
        shard.copy_from_full(_full(shard.name, shard.full_shape, device))
    return model.eval().requires_grad_(False)


def sharing(model: ParallelCausalLM, group: Any) -> ParallelCausalLM:
    """A model of ``group`` on the weights of ``model``, which must be cut alike."""
    twin = ParallelCausalLM(model.config, group=group, device="meta", dtype=model.model.norm.weight.dtype)
    for to, source in zip(twin.modules(), model.modules(), strict=True):
        for name, parameter in source.named_parameters(recurse=False):
            setattr(to, name, parameter)
        if getattr(source, "quantized", None):
            to._float_dtype = source._float_dtype
    return twin.eval()


def quantized(model: ParallelCausalLM, kind: str) -> ParallelCausalLM:
    """A copy of ``model`` with its weights in "int8" or "fp8"; what is not quantised is copied, too."""
    return quantize_model(copy.deepcopy(model), kind)


def plain_view(model: ParallelCausalLM, sums: Sums | None = None) -> PlainModel:
    """The hand-written model on the weights of this rank's part of ``model``, over all ranks with ``sums``."""
    layers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm))
        layers.append(
            LayerWeights(
                layer.input_layernorm.weight,
                attention.qkv_proj.weight,
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                mlp.gate_up_proj.weight,
                mlp.down_proj.weight,
                *norms,
            )
        )
    attention, config = model.model.layers[0].self_attn, model.config
    return PlainModel(
        model.model.embed_tokens.weight,
        layers,
        model.model.norm.weight,
        model.lm_head.weight,
        heads=attention.num_heads_local,
        kv_heads=attention.num_kv_heads_local,
        head_dim=config.head_dim,
        theta=config.rope_theta,
        eps=config.rms_norm_eps,
        sums=sums,
        first_word=model.model.embed_tokens.vocab_range.start,
    )


class FullWeights:
    """The whole model behind a rank's part, made again layer by layer, for the reference of the checks.

    Quantised weights are those that the ranks really hold: each rank scales its own slice, so the slices are quantised
    one by one, and made into numbers again.

    Args:
        model: this rank's part.
        quantize: what it was quantised with, or "none".
        dtype: what its weights were exact in before that.
    """

    def __init__(self, model: ParallelCausalLM, quantize: str, dtype: torch.dtype):
        self._config, self._quantize, self._dtype = model.config, quantize, dtype
        self._device = model.model.norm.weight.device
        self._shards = {shard.name: shard for shard in iter_tensor_shards(model)}

    def model(self, dtype: torch.dtype) -> PlainModel:
        """The model in ``dtype``; its layers are made whenever they are asked for."""
        config = self._config
        return PlainModel(
            self.embedding(dtype),
            _Layers(self, dtype),
            self._tensor("model.norm.weight", dtype),
            self._tensor("lm_head.weight", dtype),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            eps=config.rms_norm_eps,
        )

    def embedding(self, dtype: torch.dtype) -> Tensor:
        """The whole embedding."""
        return self._tensor("model.embed_tokens.weight", dtype)

    def layer(self, number: int, dtype: torch.dtype) -> LayerWeights:
        """Weights of one layer."""
        prefix = f"model.layers.{number}."

        def stacked(*names: str) -> Tensor:
            return torch.cat([self._tensor(f"{prefix}{name}.weight", dtype) for name in names])

        attention = [f"self_attn.{name}_proj" for name in "qkv"]
        qk_norms = ["self_attn.q_norm", "self_attn.k_norm"] if self._config.qk_norm else []
        return LayerWeights(
            stacked("input_layernorm"),
            stacked(*attention),
            stacked("self_attn.o_proj"),
            stacked("post_attention_layernorm"),
            stacked("mlp.gate_proj", "mlp.up_proj"),
            stacked("mlp.down_proj"),
            *(stacked(name) for name in qk_norms),
        )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self._config.num_hidden_layers

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        shard = self._shards[name]
        full = _full(name, shard.full_shape, self._device).to(self._dtype)
        if shard.target.element_size() > 1:
            return full.to(dtype)
        whole = torch.empty(full.shape, device=full.device)
        for part in dict.fromkeys(shard.ranges):
            at = (slice(None),) * shard.dim + (slice(part.start, part.stop),)
            quantised, scale = ops.quantize_weight(full[at].contiguous(), self._quantize)
            whole[at] = quantised.float() * scale.unsqueeze(1)
        return whole.to(dtype)


class _Layers(Sequence):
    def __init__(self, weights: FullWeights, dtype: torch.dtype):
        self._weights, self._dtype = weights, dtype

    def __len__(self) -> int:
        return self._weights.layers

    def __getitem__(self, number: int) -> LayerWeights:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._weights.layer(number, self._dtype)


class EngineContender:
    """``DecodeEngine`` over our layers.

    Args:
        model: this rank's part.
        capture: as for the engine; False runs the same code without a graph.
    """

    def __init__(self, model: ParallelCausalLM, capture: bool | None = None):
        self._model, self._capture = model, capture
        self._engines: list[DecodeEngine] = []

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        engine = self._engine(ids.shape[0], ids.shape[1] + steps)
        rows = engine.prefill(ids.tolist())
        found = [engine.read()]
        for _ in range(steps):
            engine.step()
            found.append(engine.read())
        return torch.tensor([[tokens[row] for tokens in found] for row in rows], device=ids.device)

    def first_tokens(self, prompts: Sequence[Tensor]) -> Tensor:
        engine = self._engine(len(prompts), max(map(len, prompts)))
        rows = engine.prefill([prompt.tolist() for prompt in prompts])
        tokens = engine.read()
        return torch.tensor([tokens[row] for row in rows], device=prompts[0].device)

    def prefill(self, ids: Tensor) -> Turn:
        return self.prefill_mixed(ids)

    def prefill_mixed(self, prompts: Sequence[Tensor]) -> Turn:
        engine, lists = self._engine(len(prompts), max(map(len, prompts))), [prompt.tolist() for prompt in prompts]
        return Turn(lambda: engine.prefill(lists), engine.reset)

    def decode(self, batch: int, context: int, steps: int) -> Turn:
        engine = self._engine(batch, context + steps)

        def play() -> None:
            for _ in range(steps):
                engine.step()

        def reset() -> None:
            engine.pretend_cached(batch, context)
            engine.cache.reserve([context + steps] * batch)  # as ``generate`` does: no step has to take a page
            engine.cache.sync()

        reset()
        engine.step()  # records the graph, or finds out that there cannot be one
        return Turn(play, reset, engine.path)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
        self._engines.clear()

    def _engine(self, batch: int, tokens: int) -> DecodeEngine:
        engine = DecodeEngine(self._model, max_batch=batch, max_len=tokens, batch_sizes=(batch,), capture=self._capture)
        self._engines.append(engine)
        return engine
