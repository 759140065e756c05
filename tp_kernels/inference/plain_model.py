"""Whether a model consists of this package's own modules and nobody looks into them, so that one may go past them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tp_kernels.layers import (
    MergedColumnParallelLinear,
    ParallelAttention,
    ParallelDecoderLayer,
    ParallelLMHead,
    ParallelMLP,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)

if TYPE_CHECKING:
    from tp_kernels.models.causal_lm import ParallelCausalLM

__all__ = ["foreign_reason"]


def foreign_reason(model: ParallelCausalLM) -> str | None:
    """What in ``model`` is not a module of ours, or has forward hooks; None if nothing is or has."""
    for module in (*model.model.modules(), *model.lm_head.modules()):
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a {type(module).__name__} has forward hooks"
    # Outermost first: what stands in for a whole block is named rather than what it lacks.
    kinds = {ParallelDecoderLayer: [], ParallelAttention: [], ParallelMLP: [], RMSNorm: [model.model.norm]}
    kinds |= {QKVParallelLinear: [], RowParallelLinear: [], MergedColumnParallelLinear: []}
    kinds |= {VocabParallelEmbedding: [model.model.embed_tokens], ParallelLMHead: [model.lm_head]}
    for layer in model.model.layers:
        kinds[ParallelDecoderLayer].append(layer)
        kinds[ParallelAttention].append(getattr(layer, "self_attn", None))
        kinds[ParallelMLP].append(getattr(layer, "mlp", None))
        kinds[RMSNorm] += [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
        kinds[QKVParallelLinear].append(getattr(kinds[ParallelAttention][-1], "qkv_proj", None))
        kinds[RowParallelLinear].append(getattr(kinds[ParallelAttention][-1], "o_proj", None))
        kinds[MergedColumnParallelLinear].append(getattr(kinds[ParallelMLP][-1], "gate_up_proj", None))
        kinds[RowParallelLinear].append(getattr(kinds[ParallelMLP][-1], "down_proj", None))
    for kind, modules in kinds.items():
        for module in modules:
            if type(module) is not kind or "forward" in vars(module):
                return f"a {type(module).__name__} stands in for {kind.__name__}"
            if module._forward_hooks or module._forward_pre_hooks:  # fused projections are not among modules()
                return f"a {type(module).__name__} has forward hooks"
    return None
