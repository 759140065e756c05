"""``ParallelDecoderLayer``: the pre-norm transformer block of the Llama family, two all-reduces a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from tp_kernels.layers.attention import ParallelAttention
from tp_kernels.layers.kv_cache import LayerKVCache, PackedLayerKVCache
from tp_kernels.layers.linear import RowParallelLinear
from tp_kernels.layers.mlp import ParallelMLP
from tp_kernels.layers.norm import RMSNorm
from tp_kernels.layers.rotary import RotaryEmbedding
from tp_kernels.ops._gpu import autocast_dtype
from tp_kernels.ops._library import PLAIN_TYPES, watched

__all__ = ["ParallelDecoderLayer", "PartialSum", "is_plain"]


class PartialSum(NamedTuple):
    """A row-parallel layer's result before the sum over the ranks, for the norm that follows.

    Attributes:
        partial: this rank's part; good until the next partial sum (see ``RowParallelLinear.partial_sum``).
        bias: to be added to the sum, or None.
    """

    partial: torch.Tensor
    bias: torch.Tensor | None


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether ``module`` is a ``kind`` and nobody looks at what goes in or out of it."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and "forward" not in vars(module)
    )


class ParallelDecoderLayer(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm and inside a residual connection.

    The layer hands on the *unadded* pair (output of the MLP, residual): the next layer's norm, or the model's final
    one, adds and normalises in one pass. Their sum is what a stock decoder layer returns.

        x, residual = layer(x, residual)    # for every layer; None as the first residual
        x, _ = final_norm(x, residual)

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim, qk_norm, rope, sliding_window, scale: see ``ParallelAttention``.
        intermediate_size, activation: see ``ParallelMLP``.
        norm_eps: of all norms.
        qkv_bias, o_bias, mlp_bias: which projections carry a bias.
        overlap: see ``RowParallelLinear``.
        sequence_parallel: the block takes and returns this rank's part of the sequence, in ``shard_range``'s parts, so
            that norms and residuals are not repeated on every rank. Not with a cache.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        device: as in torch; ``"meta"`` allocates nothing.
        dtype: of the parameters.

    Shape:
        [B, S, hidden_size] -> a pair of [B, S, hidden_size].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        activation: str = "silu",
        rope: RotaryEmbedding | None = None,
        sliding_window: int | None = None,
        scale: float | None = None,
        overlap: str = "auto",
        sequence_parallel: bool = False,
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"group": group, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.self_attn = ParallelAttention(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            bias=qkv_bias,
            o_bias=o_bias,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            rope=rope,
            sliding_window=sliding_window,
            scale=scale,
            overlap=overlap,
            **factory,
        )
        self.mlp = ParallelMLP(
            hidden_size, intermediate_size, bias=mlp_bias, activation=activation, overlap=overlap, **factory
        )
        spread = sequence_parallel and self.self_attn.tp_size > 1
        norm = {"sequence_group": self.self_attn.group if spread else None, "device": device, "dtype": dtype}
        self.input_layernorm = RMSNorm(hidden_size, norm_eps, **norm)
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps, **norm)

    def forward(
        self,
        x: torch.Tensor | PartialSum,
        residual: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: LayerKVCache | PackedLayerKVCache | None = None,
        keep_partial: bool = False,
        sequence_sizes: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor | PartialSum, torch.Tensor]:
        """Run the block.

        Args:
            x: [B, S, hidden_size]: the embedding, or the previous layer's first result.
            residual: the previous layer's second result; None for the first layer.
            positions: see ``ParallelAttention.forward``.
            cache: this layer's ``LayerKVCache``, or ``PackedLayerKVCache``.
            keep_partial: return a ``PartialSum`` and leave the MLP's sum over the ranks to the norm that follows; only
                where ``fuses_norms`` holds. The residual is then valid only as far as that norm needs it.
            sequence_sizes: with ``sequence_parallel``, every rank's length; None asks the other ranks.

        Returns:
            ``(x, residual)``; the block's output is their sum.
        """
        group = self.self_attn.group
        fused = keep_partial or self.fuses_norms(x.partial if isinstance(x, PartialSum) else x)
        if isinstance(x, PartialSum):
            out = _shared_output(group, x.partial)
            x, residual = self.input_layernorm.add_reduced(
                x.partial, residual, group, x.bias, gather_sum=not keep_partial, out=out
            )
        elif residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        if sequence_sizes is not None:
            x = self.self_attn(x, positions, cache, sequence_sizes=sequence_sizes)
            x, residual = self.post_attention_layernorm(x, residual)
            return self.mlp(x, sequence_sizes=sequence_sizes), residual
        if not fused:
            x = self.self_attn(x, positions, cache)
            x, residual = self.post_attention_layernorm(x, residual)
            return self.mlp(x), residual
        partial = self.self_attn(x, positions, cache, reduce_results=False)
        x, residual = self.post_attention_layernorm.add_reduced(
            partial,
            residual,
            group,
            self.self_attn.o_proj.bias,
            gather_sum=not keep_partial,
            out=_shared_output(group, partial),
        )
        if not keep_partial:
            return self.mlp(x), residual
        return PartialSum(self.mlp(x, reduce_results=False), self.mlp.down_proj.bias), residual

    def fuses_norms(self, x: torch.Tensor) -> bool:
        """Whether the sums over the ranks of ``x``'s pass may be left to the norms: one kernel then does both.

        That is for inference, where the group's communicator has such a kernel, and where nothing was put into the
        block that would see the difference (hooks, replaced modules, an explicit overlap).
        """
        attention, mlp = self.self_attn, self.mlp
        if not (is_plain(attention, ParallelAttention) and is_plain(mlp, ParallelMLP)):
            return False
        group = attention.group
        communicator = group.communicator
        if group.world_size == 1 or mlp.group is not group or not getattr(communicator, "fused_norm", False):
            return False
        if torch.is_grad_enabled() or watched() or _has_any_global_hook() or autocast_dtype(x) is not None:
            return False
        dtype = x.dtype
        if (
            type(x) not in PLAIN_TYPES
            or x.device.type != group.device_type
            or not communicator.fuses_norm(x.shape[-1], dtype)
        ):
            return False
        for projection in (attention.o_proj, mlp.down_proj):
            if not is_plain(projection, RowParallelLinear) or projection.input_dtype is not dtype:
                return False
            if projection.overlap not in ("auto", "none") or projection.sequence_parallel or projection.skip_bias_add:
                return False
        for norm in (self.input_layernorm, self.post_attention_layernorm):
            if not is_plain(norm, RMSNorm) or norm.weight.dtype is not dtype:
                return False
        # Their operand is a buffer that the next norm overwrites: hooks might keep it.
        return all(is_plain(module, type(module)) for module in (attention.qkv_proj, mlp.gate_up_proj))


def _shared_output(group: Any, partial: torch.Tensor) -> torch.Tensor | None:
    """Where a norm's result may go that is consumed before the next one: the kernel then needs no copy out."""
    return group.communicator.get_buffer(partial.shape, partial.dtype, use="output")
