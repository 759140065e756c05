"""``ParallelDecoderLayer``: the pre-norm transformer block of the Llama family, two all-reduces a pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_kernels.layers.attention import ParallelAttention
from tp_kernels.layers.kv_cache import LayerKVCache
from tp_kernels.layers.mlp import ParallelMLP
from tp_kernels.layers.norm import RMSNorm
from tp_kernels.layers.rotary import RotaryEmbedding

__all__ = ["ParallelDecoderLayer"]


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
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"group": group, "device": device, "dtype": dtype}
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
        self.input_layernorm = RMSNorm(hidden_size, norm_eps, device=device, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps, device=device, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: LayerKVCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            x: [B, S, hidden_size]: the embedding, or the previous layer's first result.
            residual: the previous layer's second result; None for the first layer.
            positions: see ``ParallelAttention.forward``.
            cache: this layer's ``LayerKVCache``.

        Returns:
            ``(x, residual)``; the block's output is their sum.
        """
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, positions, cache)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual
