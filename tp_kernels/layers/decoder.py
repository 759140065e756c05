"""``ParallelDecoderLayer``: the pre-norm transformer block of the Llama family, two all-reduces a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.layers.attention import ParallelAttention
from tp_kernels.layers.kv_cache import LayerKVCache, PackedLayerKVCache
from tp_kernels.layers.linear import RowParallelLinear
from tp_kernels.layers.mlp import ParallelMLP
from tp_kernels.layers.norm import RMSNorm
from tp_kernels.layers.rotary import RotaryEmbedding
from tp_kernels.ops._gpu import autocast_dtype
from tp_kernels.ops._library import PLAIN_TYPES, watched

__all__ = ["ParallelDecoderLayer", "PartialSum", "is_plain", "may_join_norms"]


class PartialSum(NamedTuple):
    """A row-parallel projection and its sum over the ranks, left to the norm that follows.

    Attributes:
        x: [..., in_features_local], the projection's input.
        projection: the layer.
        path: how both will be done, see ``RowParallelLinear.norm_path``.
    """

    x: torch.Tensor
    projection: RowParallelLinear
    path: str

    def add_norm(
        self, norm: nn.Module, residual: torch.Tensor, *, gather_sum: bool = True, shared: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``norm(projection(x), residual)``; see ``RowParallelLinear.forward_norm``."""
        return self.projection.forward_norm(
            self.x, residual, norm, path=self.path, gather_sum=gather_sum, shared=shared
        )


def may_join_norms(group: TPGroup) -> bool:
    """Whether a sum over the ranks of ``group`` can ever be done together with the norm behind it."""
    communicator = group.communicator
    return group.world_size > 1 and bool(communicator.overlap_modes or getattr(communicator, "fused_norm", False))


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
        overlap: how communication may overlap the projections: see ``RowParallelLinear`` and, for
            ``sequence_parallel``, ``ColumnParallelLinear``. Without gradients an overlapped sum takes the residual and
            the norm behind it along (see ``fuses_norms``).
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
            keep_partial: return a ``PartialSum`` and leave the MLP's down projection to the norm that follows; only
                where ``fuses_norms`` holds. The residual is then valid only as far as that norm needs it.
            sequence_sizes: with ``sequence_parallel``, every rank's length; None asks the other ranks.

        Returns:
            ``(x, residual)``; the block's output is their sum.
        """
        attention, mlp = self.self_attn, self.mlp
        before = x.x if isinstance(x, PartialSum) else x
        # Who keeps a partial sum has asked ``fuses_norms`` for all layers, which need not be looked through again.
        between, behind = self._paths(before) if keep_partial else self._norm_paths(before)
        # Of a sum that only the kernel reads next every rank needs no more than its own rows.
        if isinstance(x, PartialSum):
            x, residual = x.add_norm(self.input_layernorm, residual, gather_sum=between != "kernel", shared=True)
        elif residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        if not keep_partial and between == behind == "apart":
            x = attention(x, positions, cache, sequence_sizes)
            x, residual = self.post_attention_layernorm(x, residual)
            return mlp(x, sequence_sizes), residual
        x, residual = attention.o_proj.forward_norm(
            attention.attend(x, positions, cache, sequence_sizes),
            residual,
            self.post_attention_layernorm,
            path=between,
            gather_sum=not keep_partial or behind != "kernel",
            shared=True,
        )
        if not keep_partial:
            return mlp(x, sequence_sizes), residual
        return PartialSum(mlp.gated(x, sequence_sizes), mlp.down_proj, behind), residual

    def fuses_norms(self, x: torch.Tensor) -> bool:
        """Whether the sums over the ranks of ``x``'s pass may be left to the norms: one call then does both.

        That is for inference, where that call overlaps the matmul or the group's communicator has a kernel for it
        (``RowParallelLinear.norm_path``), and where nothing was put into the block that would see the difference
        (hooks, replaced modules). It decides which collectives run: what is put into one rank's block belongs into all
        ranks'.
        """
        return self._norm_paths(x) != ("apart", "apart")

    def _paths(self, x: torch.Tensor) -> tuple[str, str]:
        """``norm_path`` of the block's two row-parallel projections."""
        return self.self_attn.o_proj.norm_path(x), self.mlp.down_proj.norm_path(x)

    def _norm_paths(self, x: torch.Tensor) -> tuple[str, str]:
        """The same, and "apart" for both where something would see the difference."""
        apart = ("apart", "apart")
        attention, mlp = self.self_attn, self.mlp
        group = getattr(attention, "group", None)
        if not isinstance(group, TPGroup) or not may_join_norms(group):
            return apart
        if not (is_plain(attention, ParallelAttention) and is_plain(mlp, ParallelMLP)) or mlp.group is not group:
            return apart
        if torch.is_grad_enabled() or watched() or _has_any_global_hook() or autocast_dtype(x) is not None:
            return apart
        dtype, projections = x.dtype, (attention.o_proj, mlp.down_proj)
        if type(x) not in PLAIN_TYPES or x.device.type != group.device_type:
            return apart
        for projection in projections:
            if not is_plain(projection, RowParallelLinear) or projection.input_dtype is not dtype:
                return apart
            if projection.skip_bias_add or type(projection.weight) not in PLAIN_TYPES:
                return apart
        for norm in (self.input_layernorm, self.post_attention_layernorm):
            if not is_plain(norm, RMSNorm) or norm.weight.dtype is not dtype:
                return apart
        # Their operand is a buffer that the next norm overwrites: hooks might keep it.
        if not all(is_plain(module, type(module)) for module in (attention.qkv_proj, mlp.gate_up_proj)):
            return apart
        return self._paths(x)
