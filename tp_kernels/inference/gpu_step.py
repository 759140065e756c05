"""``FusedStep``: a pass of a model's tokens over a paged cache as calls of ops, past the modules.

What ``DecodePlan`` is to the CPU: everything that depends on the model alone is looked up once. It runs on any device
and, on a GPU, inside a CUDA graph: nothing waits, and what changes from step to step is read from the device.

One rank takes the projections' residual in their epilogue and, for few rows, the norm in their prologue: six or seven
launches a layer. There the sum of a projection and the residual stream is rounded once, where modules round the
projection first; in fp32 that is the same, in 16 bits the stream is the more exact one. Several ranks take exactly what
``ParallelDecoderLayer`` takes (``RowParallelLinear.norm_path``): projections that overlap their sums where that was
asked for or measured to be faster; else partial sums into the communicator's own memory, and sum, bias, residual and
norm in one kernel where the group has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tp_kernels import ops
from tp_kernels.comm.overlap import SMALLEST_CHUNK, offers_overlap
from tp_kernels.inference.plain_model import foreign_reason
from tp_kernels.ops._gpu import autocast_dtype, takes_kernels
from tp_kernels.ops._gpu_linear import choose_linear

if TYPE_CHECKING:
    from tp_kernels.inference.paged_cache import PackedCache
    from tp_kernels.layers import ParallelAttention, RMSNorm
    from tp_kernels.models.causal_lm import ParallelCausalLM

__all__ = ["FusedStep"]


class FusedStep:
    """Passes of ``model``; see ``why_not`` for when there can be one.

    Args:
        model: its parameters must stay where they are.
        max_len: most positions of a row.

    Raises:
        ValueError: ``why_not`` has a reason.
    """

    def __init__(self, model: ParallelCausalLM, max_len: int):
        reason = self.why_not(model)
        if reason is not None:
            raise ValueError(f"no fused step: {reason}")
        decoder, self._group = model.model, model.group
        self._embedding, self._layers = decoder.embed_tokens, list(decoder.layers)
        self._norm, self._head = decoder.norm, model.lm_head
        weight = decoder.norm.weight
        self._rotations = [layer.self_attn.rope.tables(max_len, weight.device) for layer in self._layers]
        # Row-parallel projections in order, each with the norm behind it.
        between = [layer.post_attention_layernorm for layer in self._layers]
        behind = [layer.input_layernorm for layer in self._layers[1:]] + [self._norm]
        self._sums = [
            pair
            for layer, *norms in zip(self._layers, between, behind, strict=True)
            for pair in zip((layer.self_attn.o_proj, layer.mlp.down_proj), norms, strict=True)
        ]
        self._few_rows: list[Callable[..., tuple[Tensor, Tensor]]] | None = None

    @staticmethod
    def why_not(model: ParallelCausalLM) -> str | None:
        """Why the modules cannot be gone past; None if they can."""
        weight = model.model.norm.weight
        if autocast_dtype(weight) is not None:
            return "autocast is on"
        if _has_any_global_hook():
            return "there are global module hooks"
        foreign = foreign_reason(model)
        if foreign is not None:
            return foreign
        for parameter in model.parameters():
            if type(parameter) is not nn.Parameter or parameter.device != weight.device:
                return f"a parameter is not a plain tensor on {weight.device}"
        quantized = _quantized(model)
        if any(each.dtype is not weight.dtype and id(each) not in quantized for each in model.parameters()):
            return "the parameters differ in dtype"
        for layer in model.model.layers:
            if layer.mlp.activation != "silu":
                return f"the activation {layer.mlp.activation!r} is not fused"
            if layer.self_attn.rope is None:
                return "an attention has no rotary embedding"
        if model.group.world_size > 1:
            for layer in model.model.layers:
                for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    overlap, scaled = projection.overlap, projection.weight_scale is not None
                    if overlap not in ("auto", "none") and (scaled or not offers_overlap(model.group, overlap)):
                        return f"a projection asks for overlap={overlap!r}, which cannot be had"
        return None

    def decode(self, ids: Tensor, rows: Any) -> Tensor:
        """One token a row.

        Args:
            ids: int64 [B], in the vocabulary.
            rows: ``PagedKVCache.rows(B)``; what it says of the rows is read from the device.

        Returns:
            This rank's logits [B, words of this rank].
        """

        def attend(number: int, attention: ParallelAttention, qkv: Tensor) -> Tensor:
            return _attend(attention, qkv, *self._rotations[number], rows.layers[number])

        x = self._embed(ids)
        if self._group.world_size == 1:
            return _norm_linear(self._alone(x, attend), self._norm, self._head)
        return _linear(self._spread(x, attend), self._head)

    def prefill(self, ids: Tensor, packed: PackedCache, last: Tensor) -> Tensor:
        """Packed pieces of prompts.

        Args:
            ids: int64 [N], in the vocabulary.
            packed: where they belong.
            last: int64 [n], tokens whose results are wanted.

        Returns:
            What the output head reads of those tokens, [n, hidden].
        """

        def attend(number: int, attention: ParallelAttention, qkv: Tensor) -> Tensor:
            return attention.mix_packed(qkv, packed.layers[number], *self._rotations[number]).flatten(1)

        x = self._embed(ids)
        if self._group.world_size == 1:
            return ops.rms_norm(self._alone(x, attend)[last], self._norm.weight, self._norm.eps)
        return self._spread(x, attend)[last]

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits of what ``prefill`` returned."""
        return _linear(hidden, self._head)

    def _embed(self, ids: Tensor) -> Tensor:
        """As the module does; on a GPU with one kernel in front of the sum over the ranks, where it takes eight."""
        weight = self._embedding.weight
        if self._group.world_size == 1:
            return F.embedding(ids, weight)
        if not takes_kernels(weight):
            return self._embedding(ids)
        from tp_kernels.ops.kernels.token_choice import embed_part

        x = embed_part(ids, weight, self._embedding.vocab_range.start)
        return self._group.all_reduce(x, out=x)

    def _alone(self, x: Tensor, attend: Callable[[int, ParallelAttention, Tensor], Tensor]) -> Tensor:
        """All layers on one rank; the residual stream behind the last."""
        for number, layer in enumerate(self._layers):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = _norm_linear(x, layer.input_layernorm, attention.qkv_proj)
            x = _linear(attend(number, attention, qkv), attention.o_proj, x)
            norm, gate_up = layer.post_attention_layernorm, mlp.gate_up_proj
            inner = ops.norm_swiglu_linear(
                x, norm.weight, norm.eps, gate_up.weight, gate_up.bias, weight_scale=gate_up.weight_scale
            )
            x = _linear(inner, mlp.down_proj, x)
        return x

    def _spread(self, x: Tensor, attend: Callable[[int, ParallelAttention, Tensor], Tensor]) -> Tensor:
        """All layers on several ranks, and the norm behind the last."""
        first = self._layers[0].input_layernorm
        normed, residual = ops.rms_norm(x, first.weight, first.eps), x
        add_reduced = iter(self._ways(x))
        for number, layer in enumerate(self._layers):
            attention, gate_up = layer.self_attn, layer.mlp.gate_up_proj
            mixed = attend(number, attention, _linear(normed, attention.qkv_proj))
            normed, residual = next(add_reduced)(mixed, residual)
            inner = ops.swiglu_linear(normed, gate_up.weight, gate_up.bias, weight_scale=gate_up.weight_scale)
            normed, residual = next(add_reduced)(inner, residual)
        return normed

    def _ways(self, x: Tensor) -> list[Callable[..., tuple[Tensor, Tensor]]]:
        """For each row-parallel projection ``way(input, residual)``, in a pass of as many rows as ``x`` has.

        It returns (norm of the sum, the sum): the residual stream with the projection's sum over the ranks added.
        """
        few = len(x) <= SMALLEST_CHUNK  # no table speaks of so few: every decode step goes the same way
        if few and self._few_rows is not None:
            return self._few_rows
        paths = [projection.norm_path(x) for projection, _ in self._sums]
        # Of a sum that only the kernel reads next every rank needs no more than its own rows; of the last one, none.
        whole = [path != "kernel" for path in paths[1:]] + [False]
        last = len(paths) - 1
        ways = [
            partial(
                projection.forward_norm,
                norm=norm,
                # "apart" as "kernel" does it without one: the partial sum in the communicator's memory, summed there.
                path="op" if path == "op" else "kernel",
                gather_sum=gather_sum,
                # The result is consumed before the next one is made: memory that the kernel need not copy it out of.
                shared=path == "kernel" and number != last,
            )
            for number, ((projection, norm), path, gather_sum) in enumerate(zip(self._sums, paths, whole, strict=True))
        ]
        if few:
            self._few_rows = ways
        return ways


def _attend(attention: ParallelAttention, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Any) -> Tensor:
    """Rotation, write to the pages, attention over them: [B, heads of this rank * head_dim]."""
    q_norm, k_norm = (None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm))
    q = ops.qkv_rope_cache(
        qkv.unsqueeze(1),
        cos,
        sin,
        cache.lengths,
        cache.k,
        cache.v,
        attention.num_heads_local,
        attention.num_kv_heads_local,
        q_norm,
        k_norm,
        attention.norm_eps,
        page_table=cache.page_table,
        new_tokens=cache.new_tokens,
    )
    mixed = ops.decode_attention(
        q,
        cache.k,
        cache.v,
        cache.lengths,
        scale=attention.scale,
        sliding_window=attention.sliding_window,
        page_table=cache.page_table,
    )
    return mixed.transpose(1, 2).reshape(len(qkv), -1)


def _linear(x: Tensor, layer: Any, residual: Tensor | None = None) -> Tensor:
    """The projection, with ``residual`` added, which may be overwritten."""
    plain = residual is not None and layer.bias is None and layer.weight_scale is None and takes_kernels(x)
    if plain and choose_linear(x, layer.weight, None, residual).path == "torch":
        # cuBLAS adds to what stands in its result; ``addmm`` would first copy the stream to a new one.
        return residual.addmm_(x, layer.weight.t())
    return ops.linear(x, layer.weight, layer.bias, residual, weight_scale=layer.weight_scale)


def _norm_linear(x: Tensor, norm: RMSNorm, layer: Any) -> Tensor:
    return ops.norm_linear(x, norm.weight, norm.eps, layer.weight, layer.bias, weight_scale=layer.weight_scale)


def _quantized(model: ParallelCausalLM) -> set[int]:
    """Identities of the parameters of another dtype that quantised layers have."""
    layers = [model.lm_head]
    for layer in model.model.layers:
        layers += [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]
    return {
        id(tensor)
        for layer in layers
        if layer.weight_scale is not None
        for tensor in (layer.weight, layer.weight_scale)
    }
