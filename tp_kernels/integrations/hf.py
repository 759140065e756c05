"""``apply_tp_kernels``: a Hugging Face model made tensor-parallel and fast in place, with one call.

    model = AutoModelForCausalLM.from_pretrained(path)
    apply_tp_kernels(model, group)          # each rank keeps its shard
    model.generate(...)                     # everything as before

Modules keep their paths and parameters their names, so that optimisers, PEFT, checkpoints and FSDP find what they know:
projections, embedding and head become this package's layers; norms, attention, MLP and decoder layers keep their class'
name and get another ``forward``. Only this model is changed, no class of transformers and no registry.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_kernels.checkpoint.agreement import agree
from tp_kernels.checkpoint.errors import CheckpointError
from tp_kernels.checkpoint.sharding import shard_heads
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.integrations.hf_attention import IMPLEMENTATION, AttentionAdapter
from tp_kernels.integrations.hf_checks import Family, check_model, gate_is_silu, options_text
from tp_kernels.integrations.hf_layer import (
    DecoderLayerAdapter,
    HeadNormAdapter,
    ModelAdapter,
    NormAdapter,
)
from tp_kernels.integrations.hf_mlp import MLPAdapter
from tp_kernels.integrations.hf_model import CausalLMAdapter
from tp_kernels.integrations.hf_packing import HeadParallelLinear, PackedLinears, adapted_class, repack, separate
from tp_kernels.integrations.hf_report import PatchReport
from tp_kernels.integrations.hf_sharing import SharedModel
from tp_kernels.layers import ColumnParallelLinear, ParallelLMHead, RowParallelLinear, VocabParallelEmbedding

__all__ = ["PatchReport", "apply_tp_kernels"]


def apply_tp_kernels(
    model: Any,
    group: Any = None,
    *,
    swiglu: bool = True,
    attention: bool = True,
    norms: bool = True,
    linear: bool = True,
    overlap: str = "auto",
) -> Any:
    """Make a Hugging Face model tensor-parallel over a group, with this package's kernels, in place. Collective.

    Supported are ``LlamaForCausalLM`` (SmolLM2 too), ``MistralForCausalLM``, ``Qwen2ForCausalLM`` and
    ``Qwen3ForCausalLM`` of transformers 5, with any rotary scaling, bias, sliding window or number of heads. Call it
    before PEFT, FSDP, DDP or ``torch.compile``, and before an optimiser is made: with several ranks the parameters are
    new ones. Whatever is done to the model later (hooks, adapters, frozen parameters) is done on every rank alike: it
    decides which collectives run. Gradients are clipped by ``tp_kernels.layers.clip_grad_norm_``, since torch's (and
    with it transformers' ``Trainer``, unless ``max_grad_norm=0``) sees this rank's slices only.

    Args:
        model: loaded, with the same weights on every rank, or on the meta device (weights to come: then only shapes are
            cut; ``from_pretrained`` does it all). Every rank keeps its shard; whole weights are released layer by
            layer.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        swiglu: the MLP's gate and up projections as one matmul with SwiGLU. Only where the activation is SiLU.
        attention: queries, keys and values by one matmul, our rotation, and our attention wherever the mask is causal
            (within a sliding window) and nothing else, under transformers' "sdpa" implementation. Other masks, caches
            and implementations go through transformers' code.
        norms: our RMSNorm, the residual's addition and the sum over the ranks in one pass where possible.
        linear: projections, embedding and head become parallel layers. False only with one rank.
        overlap: of row-parallel layers, see ``RowParallelLinear``.

    Returns:
        ``model``, with ``tp_report`` (what was replaced, and what not with the reason), ``tp_group``,
        ``tp_causal_lm()`` (a ``ParallelCausalLM`` over the same memory, for generation), a ``generate`` that samples
        the same tokens on every rank, and a collective ``save_pretrained`` that writes the whole checkpoint.
        ``model.config`` keeps the full sizes; ``state_dict`` has the stock names and this rank's slices.

    Raises:
        ValueError: on every rank, the model unchanged: another model, a quantised, adapted or already parallel one,
            gradients or hooks that would be lost, sizes that cannot be spread, ranks that were given different models.
    """
    group = resolve_group(group)
    options = {"swiglu": swiglu, "attention": attention, "norms": norms, "linear": linear, "overlap": overlap}
    family, error = None, None
    try:
        for name, value in options.items():
            if name != "overlap" and not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        family = check_model(model, group, linear=linear, overlap=overlap)
    except ValueError as caught:
        error = caught
    if group.world_size == 1:
        if error is not None:
            raise error
    else:
        _agree_or_raise(group, error, options_text(model, **options))
    _Patch(model, group, family, options).apply()
    return model


def _agree_or_raise(group: TPGroup, error: ValueError | None, same: str) -> None:
    """ValueError on every rank if any has an error or was given something else."""
    try:
        agree(group, error)
    except ValueError as refused:
        raise (error or ValueError(str(refused))) from None
    try:
        agree(group, None, same=same)
    except CheckpointError as different:
        ranks = list(different.ranks)
        raise ValueError(f"ranks {ranks} were given another model or other options than rank 0") from None


class _Patch:
    """One call of ``apply_tp_kernels``, after the checks."""

    def __init__(self, model: Any, group: TPGroup, family: Family, options: dict[str, Any]):
        self.model, self.group, self.family, self.options = model, group, family, options
        self.report = PatchReport(family.name, group.world_size)
        config = model.config
        self.shards = [
            shard_heads(config.num_attention_heads, config.num_key_value_heads, group.world_size, rank)
            for rank in range(group.world_size)
        ]
        self.swiglu = options["swiglu"] and gate_is_silu(config)

    def apply(self) -> None:
        """Change the model."""
        model, options = self.model, self.options
        for index, layer in enumerate(model.model.layers):
            self._attention(layer.self_attn, f"model.layers.{index}.self_attn")
            self._mlp(layer.mlp, f"model.layers.{index}.mlp")
            if options["norms"]:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    self._adapt(norm, NormAdapter, "norm")
                self._adapt(layer, DecoderLayerAdapter, "decoder layer")
        if options["norms"]:
            self._adapt(model.model.norm, NormAdapter, "norm")
        if options["linear"]:
            self._embeddings()
        if options["attention"]:
            model.model.__class__ = adapted_class(type(model.model), ModelAdapter)
            model.model.tp_group = self.group
            model.model.tp_windows = any(layer.self_attn.tp_window is not None for layer in model.model.layers)
        model.__class__ = adapted_class(type(model), CausalLMAdapter)
        model.tp_group, model.tp_report, model._tp_shared = self.group, self.report, SharedModel()
        self._explain()

    def _adapt(self, module: nn.Module, adapter: type, kind: str) -> None:
        module.__class__ = adapted_class(type(module), adapter)
        module.tp_group = self.group
        self.report.count(kind)

    def _attention(self, attention: nn.Module, path: str) -> None:
        group, local = self.group, self.shards[self.group.rank]
        head_dim = attention.head_dim
        if self.options["linear"]:
            for name, heads in (("q_proj", "q"), ("k_proj", "kv"), ("v_proj", "kv")):
                stock = getattr(attention, name)
                ranges = [getattr(shard, heads) for shard in self.shards]
                total = stock.out_features // head_dim
                layer = HeadParallelLinear(
                    stock.in_features,
                    head_dim,
                    ranges,
                    total,
                    stock.bias is not None,
                    group=group,
                    device="meta",
                    dtype=stock.weight.dtype,
                )
                self._replace(attention, name, layer)
            partition = [len(shard.q) * head_dim for shard in self.shards]
            self._replace(attention, "o_proj", self._row(attention.o_proj, partition))
            attention.num_key_value_groups = len(local.q) // len(local.kv)
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name, None)
            if norm is not None and (self.options["norms"] or group.world_size > 1):
                norm.tp_kernel = self.options["norms"]
                self._adapt(norm, HeadNormAdapter, "head norm")
        if self.options["attention"]:
            attention.tp_window = self._window(attention)
            self._adapt(attention, AttentionAdapter, "attention")
            self._pack(attention, path)

    def _window(self, attention: nn.Module) -> int | None:
        """The sliding window of a layer: its own attribute where layers may differ, else the config's for Mistral."""
        if hasattr(attention, "sliding_window"):
            return attention.sliding_window
        return self.model.config.sliding_window if self.family.name == "Mistral" else None

    def _mlp(self, mlp: nn.Module, path: str) -> None:
        if self.options["linear"]:
            for name in ("gate_proj", "up_proj"):
                stock = getattr(mlp, name)
                layer = ColumnParallelLinear(
                    stock.in_features,
                    stock.out_features,
                    stock.bias is not None,
                    group=self.group,
                    device="meta",
                    dtype=stock.weight.dtype,
                )
                self._replace(mlp, name, layer)
            self._replace(mlp, "down_proj", self._row(mlp.down_proj, None))
        if self.swiglu:
            self._adapt(mlp, MLPAdapter, "SwiGLU MLP")
            mlp.tp_gate = type(mlp.act_fn)
            self._pack(mlp, path)

    def _row(self, stock: nn.Linear, partition: list[int] | None) -> RowParallelLinear:
        return RowParallelLinear(
            stock.in_features,
            stock.out_features,
            stock.bias is not None,
            group=self.group,
            overlap=self.options["overlap"],
            partition=partition,
            device="meta",
            dtype=stock.weight.dtype,
        )

    def _replace(self, owner: nn.Module, name: str, layer: nn.Module) -> None:
        """Put ``layer``, built on the meta device, in the place of a stock linear, with its part of the weights."""
        stock = getattr(owner, name)
        if self.group.world_size == 1:  # the very same parameters: an optimiser that has them keeps working
            layer.weight, layer.bias = stock.weight, stock.bias
        else:
            layer._take_over([stock])
        setattr(owner, name, layer.train(stock.training))
        self.report.count("parallel linear")

    def _pack(self, module: PackedLinears, path: str) -> None:
        reason = module.pack()
        module.register_load_state_dict_post_hook(repack)
        module.register_state_dict_post_hook(separate)
        if reason is not None:
            self.report.keep(f"{path}: one matmul for {', '.join(module.packed_names)}", reason)
        else:
            self.report.count("packed projections: " + "/".join(n.removesuffix("_proj") for n in module.packed_names))

    def _embeddings(self) -> None:
        model, group = self.model, self.group
        embedding, head = model.model.embed_tokens, model.lm_head
        tied = bool(model.config.tie_word_embeddings)
        table = VocabParallelEmbedding(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            group=group,
            device="meta",
            dtype=embedding.weight.dtype,
        )
        if group.world_size == 1:
            table.weight = embedding.weight
        else:
            if not embedding.weight.is_meta:
                table.to_empty(device=embedding.weight.device)
                table.load_full_weight(embedding.weight)
            table.weight.requires_grad_(embedding.weight.requires_grad)
        model.model.embed_tokens = table.train(embedding.training)
        self.report.count("parallel embedding")
        if tied:
            model.lm_head = ParallelLMHead.from_embedding(table).train(head.training)
        else:
            layer = ParallelLMHead(
                head.out_features,
                head.in_features,
                head.bias is not None,
                group=group,
                device="meta",
                dtype=head.weight.dtype,
            )
            if group.world_size == 1:
                layer.weight, layer.bias = head.weight, head.bias
            else:
                layer._take_over([head])
            model.lm_head = layer.train(head.training)
        self.report.count("parallel head" + (" (tied)" if tied else ""))

    def _explain(self) -> None:
        """What was left alone by choice or by necessity."""
        config, options, keep = self.model.config, self.options, self.report.keep
        for name in ("swiglu", "attention", "norms", "linear"):
            if not options[name]:
                keep(name, f"{name}=False")
        if options["swiglu"] and not self.swiglu:
            keep("MLP activation", f"hidden_act is {config.hidden_act!r}; the kernel computes silu")
        keep("rotary embedding's tables", "transformers computes them, once a pass, for every kind of scaling")
        if options["attention"]:
            if config._attn_implementation != IMPLEMENTATION:
                chosen = (
                    f"attn_implementation is {config._attn_implementation!r}; ours stands in for {IMPLEMENTATION!r}"
                )
                keep("attention", chosen)
            keep(
                "attention with padding masks or custom masks", "our kernels take no mask; transformers' function runs"
            )
            keep("attention with other caches than DynamicCache", "transformers' forward runs")
            if config.attention_dropout:
                keep("attention in training", f"attention_dropout is {config.attention_dropout}; transformers' runs")
