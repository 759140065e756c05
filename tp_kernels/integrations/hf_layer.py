"""Norms, decoder layers and the base model of a Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache

from tp_kernels import ops
from tp_kernels.comm.functional import copy_to_tensor_parallel
from tp_kernels.integrations.hf_attention import IMPLEMENTATION, PARTIAL_SUM, PLAIN_MASK, AttentionAdapter
from tp_kernels.integrations.hf_packing import unobserved
from tp_kernels.layers.linear import RowParallelLinear
from tp_kernels.ops._gpu import autocast_dtype
from tp_kernels.ops.all_reduce_norm import fused_norm_reason

__all__ = ["DecoderLayerAdapter", "HeadNormAdapter", "ModelAdapter", "NormAdapter"]


class NormAdapter:
    """Takes the place of ``forward`` in ``LlamaRMSNorm`` and its like: fp32 statistics, cast back, times the weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class HeadNormAdapter:
    """The norm of each query or key head: every rank sees its own heads' part of the replicated weight's gradient.

    Attributes:
        tp_group: the ``TPGroup`` over whose ranks the heads are spread.
        tp_kernel: take our kernel where no gradient has to be summed; else transformers' code.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        weight = self.weight
        if self.tp_group.world_size == 1 or not weight.requires_grad or not torch.is_grad_enabled():
            if self.tp_kernel:
                return ops.rms_norm(hidden_states, weight, self.variance_epsilon)
            return super().forward(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
        # In fp32, so that the gradient is rounded once, after the sum; the product of two 16-bit values is exact in
        # fp32, hence the result has the same bits.
        weight = copy_to_tensor_parallel(weight.to(torch.promote_types(weight.dtype, torch.float32)), self.tp_group)
        return ops.rms_norm_reference(hidden_states, weight, self.variance_epsilon).to(dtype)


class DecoderLayerAdapter:
    """Takes the place of ``forward`` in ``LlamaDecoderLayer`` and its like.

    The residual's addition and the norm behind it are one pass; without gradients, and where the group offers it, the
    attention's sum over the ranks is part of that pass. What a layer takes and returns is what transformers' does.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, S, hidden] -> [B, S, hidden]; the rest goes to the attention."""
        if args:  # transformers' models pass these by name
            kwargs = dict(zip(_LAYER_ARGUMENTS, args, strict=False)) | kwargs
        attention, norm = self.self_attn, self.post_attention_layernorm
        residual = hidden_states
        fused = self._fuses(hidden_states, kwargs.get("past_key_values"))
        if fused:
            kwargs[PARTIAL_SUM] = True
        x, _ = attention(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if fused:
            bias = attention.o_proj.bias
            x, residual = ops.all_reduce_add_rms_norm(
                x, residual, norm.weight, norm.variance_epsilon, self.tp_group, bias
            )
        elif isinstance(norm, NormAdapter) and unobserved(norm) and residual.dtype is x.dtype:
            x, residual = ops.add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
        else:
            residual = residual + x
            x = norm(residual)
        return residual + self.mlp(x)

    def _fuses(self, x: torch.Tensor, past_key_values: Any) -> bool:
        """Whether the attention's sum over the ranks may be left to the norm behind it."""
        group, attention, norm = self.tp_group, self.self_attn, self.post_attention_layernorm
        if group.world_size == 1 or not getattr(group.communicator, "fused_norm", False):
            return False
        if not (isinstance(attention, AttentionAdapter) and isinstance(norm, NormAdapter) and unobserved(norm)):
            return False
        output = attention.o_proj
        return (
            type(output) is RowParallelLinear
            and unobserved(output)
            and output.overlap in ("auto", "none")
            and "forward" not in vars(attention)
            and all(_reads_weights_only(hook) for hook in attention._forward_hooks.values())
            and not (attention._forward_pre_hooks or attention._backward_hooks or attention._backward_pre_hooks)
            and not _has_any_global_hook()
            and autocast_dtype(x) is None
            and attention.runs_here(past_key_values)
            and not torch.is_grad_enabled()
            and output.input_dtype is x.dtype
            and fused_norm_reason(x, x, norm.weight, group, output.bias) is None
        )


_LAYER_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")


def _reads_weights_only(hook: Any) -> bool:
    """Whether a forward hook is the one by which transformers records attention weights: it sees no hidden states."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


class ModelAdapter:
    """Base model: tells its attention when the mask is nothing but causality and the sliding window.

    Transformers writes that mask out as soon as there are more tokens than the window holds, or tokens behind those of
    a cache, and our attention, which needs none, could not tell it from one with padding.

    Attributes:
        tp_windows: whether some layer has a sliding window.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ):
        """As transformers' ``forward``."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None and self._plain_mask(tokens.shape[1], attention_mask, position_ids, past_key_values):
            kwargs[PLAIN_MASK] = True
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _plain_mask(self, length: int, mask: Any, position_ids: torch.Tensor | None, past_key_values: Any) -> bool:
        if self.config._attn_implementation != IMPLEMENTATION or torch.compiler.is_compiling():
            return False
        if past_key_values is not None and type(past_key_values) is not DynamicCache:
            return False
        if not self.tp_windows and (past_key_values is None or past_key_values.get_seq_length() == 0):
            return False  # transformers will make no mask, or one with padding
        if mask is None:
            # Without a cache positions may say that several sequences were packed into one.
            return position_ids is None or past_key_values is not None
        if length == 1 or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return False  # for a single token the mask is small, and looking at its values makes a GPU wait
        # A mask that ends before the keys hides those behind its end.
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return mask.shape[1] >= seen + length and bool(mask.all())
