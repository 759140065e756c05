"""Norms, decoder layers and the base model of a Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import DynamicCache

from tp_kernels import ops
from tp_kernels.comm.functional import copy_to_tensor_parallel
from tp_kernels.integrations.hf_attention import BEFORE_OUTPUT, IMPLEMENTATION, PLAIN_MASK, AttentionAdapter
from tp_kernels.integrations.hf_handover import HANDOVER, Handover
from tp_kernels.integrations.hf_mlp import MLPAdapter
from tp_kernels.integrations.hf_packing import reads_only, unobserved
from tp_kernels.layers.decoder import may_join_norms
from tp_kernels.layers.linear import RowParallelLinear
from tp_kernels.ops._gpu import autocast_dtype
from tp_kernels.ops._library import PLAIN_TYPES, watched

__all__ = ["DecoderLayerAdapter", "HeadNormAdapter", "ModelAdapter", "NormAdapter"]


class NormAdapter:
    """Takes the place of ``forward`` in ``LlamaRMSNorm`` and its like: fp32 statistics, cast back, times the weight."""

    @property
    def eps(self) -> float:
        """As ``RMSNorm`` calls it."""
        return self.variance_epsilon

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None):
        """[..., H] -> [..., H]; with ``residual`` ``(norm of the sum, sum)``, as ``RMSNorm``."""
        if residual is None:
            return ops.rms_norm(hidden_states, self.weight, self.eps)
        if residual.dtype is not hidden_states.dtype:  # autocast: a bf16 matmul result meets an fp32 residual stream
            summed = residual + hidden_states
            return ops.rms_norm(summed, self.weight, self.eps), summed
        return ops.add_rms_norm(hidden_states, residual, self.weight, self.eps)


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

    The residual's addition and the norm behind it are one pass. Without gradients that pass takes the sum over the
    ranks along where ``RowParallelLinear.norm_path`` knows a way: the attention's with the norm in this layer, the
    MLP's with the next layer's first norm, whose result a ``Handover`` brings there. The last layer's goes without:
    transformers' model calls the final norm with nothing but the hidden states. What a layer takes and returns is what
    transformers' does.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, S, hidden] -> [B, S, hidden]; the rest goes to the attention."""
        if args:  # transformers' models pass these by name
            kwargs = dict(zip(_LAYER_ARGUMENTS, args, strict=False)) | kwargs
        attention, mlp, norm = self.self_attn, self.mlp, self.post_attention_layernorm
        handover, residual = kwargs.pop(HANDOVER, None), hidden_states
        normed = None if handover is None else handover.take(hidden_states, self.input_layernorm)
        if normed is None:
            normed = self.input_layernorm(hidden_states)
        path = self._path_between(hidden_states, kwargs.get("past_key_values"))
        if path != "apart":
            kwargs[BEFORE_OUTPUT] = True
        x, _ = attention(hidden_states=normed, **kwargs)
        if path != "apart":
            x, residual = attention.o_proj.forward_norm(x, residual, norm, path=path)
        elif isinstance(norm, NormAdapter) and unobserved(norm) and residual.dtype is x.dtype:
            x, residual = norm(x, residual)
        else:
            residual = residual + x
            x = norm(residual)
        following = None if handover is None or watched() else handover.norm_behind(self)
        path = "apart" if following is None else self._path_behind(x, following)
        if path == "apart":
            return residual + mlp(x)
        x, residual = mlp.down_proj.forward_norm(mlp.gated(x), residual, following, path=path)
        handover.put(residual, following, x)
        return residual

    def _path_between(self, x: torch.Tensor, past_key_values: Any) -> str:
        """``RowParallelLinear.norm_path`` of the attention's sum, or "apart" where someone would see the difference."""
        attention, norm = self.self_attn, self.post_attention_layernorm
        if not may_join_norms(self.tp_group) or not isinstance(attention, AttentionAdapter):
            return "apart"
        if (
            "forward" in vars(attention)
            or attention._forward_pre_hooks
            or attention._backward_hooks
            or attention._backward_pre_hooks
            or not all(reads_only(hook) for hook in attention._forward_hooks.values())  # it sees no hidden states
            or not attention.runs_here(past_key_values)
        ):
            return "apart"
        return _path(x, attention.o_proj, norm)

    def _path_behind(self, x: torch.Tensor, norm: Any) -> str:
        """The same for the MLP's sum and the norm behind it."""
        mlp = self.mlp
        if not may_join_norms(self.tp_group) or not isinstance(mlp, MLPAdapter) or not unobserved(mlp):
            return "apart"
        return _path(x, mlp.down_proj, norm)


_LAYER_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")


def _path(x: torch.Tensor, projection: Any, norm: Any) -> str:
    """``norm_path`` of ``projection`` for a pass with ``x``, or "apart" where its sum and ``norm`` are to be apart."""
    dtype = x.dtype
    if (
        not watched()
        and type(projection) is RowParallelLinear
        and unobserved(projection)
        and isinstance(norm, NormAdapter)
        and unobserved(norm)
        and not torch.is_grad_enabled()
        and not _has_any_global_hook()
        and autocast_dtype(x) is None
        and projection.input_dtype is dtype
        and norm.weight.dtype is dtype
        and all(type(tensor) in PLAIN_TYPES for tensor in (x, projection.weight, norm.weight))
        and x.device.type == projection.group.device_type
    ):
        return projection.norm_path(x)
    return "apart"


class ModelAdapter:
    """Base model: tells its attention when the mask is nothing but causality and the sliding window.

    Transformers writes that mask out as soon as there are more tokens than the window holds, or tokens behind those of
    a cache, and our attention, which needs none, could not tell it from one with padding.

    Attributes:
        tp_group: the ``TPGroup`` of the layers, to which a ``Handover`` is given where their sums can use it.
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
        if (
            may_join_norms(self.tp_group)
            and not torch.is_grad_enabled()
            and not watched()
            and all(isinstance(layer, DecoderLayerAdapter) for layer in self.layers)
        ):
            kwargs[HANDOVER] = Handover(self.layers)
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
