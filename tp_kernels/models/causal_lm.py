"""``ParallelCausalLM``: a decoder-only language model (Llama, Mistral, Qwen2, Qwen3, SmolLM2) on 1 to N ranks.

    model = ParallelCausalLM(ModelConfig.from_hf(config_dict))
    logits = model(input_ids)                           # [B, S, vocab], whole and equal on every rank

Parameters have Hugging Face's names and, gathered, its layout. Weights are split as the layers split them: attention by
heads, the MLP by width, embedding and head by vocabulary; norms are replicated. A pass takes two all-reduces a layer,
one for the embedding, and one all-gather for the logits that are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tp_kernels.comm.process_group import resolve_group
from tp_kernels.layers import (
    ParallelDecoderLayer,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
)
from tp_kernels.layers.decoder import is_plain, may_join_norms
from tp_kernels.models.config import ModelConfig

if TYPE_CHECKING:
    from tp_kernels.inference.kv_cache import KVCache

__all__ = ["ParallelCausalLM"]

_EMBEDDING_STD = 0.02


class _Decoder(nn.Module):
    """Embedding, decoder layers and final norm: the part that Hugging Face's checkpoints call ``model``."""

    def __init__(self, config: ModelConfig, overlap: str, group: Any, device: Any, dtype: torch.dtype | None):
        super().__init__()
        factory = {"group": group, "device": device, "dtype": dtype}
        # One for all layers: they look up the same tables.
        rope = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            ParallelDecoderLayer(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                norm_eps=config.rms_norm_eps,
                qkv_bias=config.qkv_bias,
                o_bias=config.o_bias,
                mlp_bias=config.mlp_bias,
                qk_norm=config.qk_norm,
                activation=config.hidden_act,
                rope=rope,
                sliding_window=window,
                overlap=overlap,
                **factory,
            )
            for window in config.layer_windows
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        if not self.embed_tokens.weight.is_meta:
            # Torch's unit variance is meant for lookups; a tied head would turn it into huge logits.
            (shard,) = self.embed_tokens.tensor_shards()
            self.embed_tokens.reset_full(shard, lambda full: nn.init.normal_(full, std=_EMBEDDING_STD))

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        x, residual = self.embed_tokens(input_ids), None
        caches = [None] * len(self.layers) if cache is None else cache.layers
        if self._fuses_norms(x):
            for layer, layer_cache in zip(self.layers, caches, strict=True):
                x, residual = layer(x, residual, positions, layer_cache, keep_partial=True)
            return x.add_norm(self.norm, residual, gather_sum=False)[0]
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, positions, layer_cache)
        return self.norm(x, residual)[0]

    def _fuses_norms(self, x: torch.Tensor) -> bool:
        """Whether every sum over the ranks of this pass is left to the norm behind it; see ``ParallelDecoderLayer``."""
        if not may_join_norms(self.embed_tokens.group) or not len(self.layers):
            return False
        return (
            is_plain(self.norm, RMSNorm)
            and self.norm.weight.dtype is x.dtype
            and all(is_plain(layer, ParallelDecoderLayer) and layer.fuses_norms(x) for layer in self.layers)
        )


class ParallelCausalLM(nn.Module):
    """A decoder-only language model spread over the ranks of a group.

    Args:
        config: what to build; see ``ModelConfig.from_hf``.
        overlap: of the row-parallel projections' sums over the ranks with their matmuls; see ``RowParallelLinear``.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        device: as in torch; ``"meta"`` allocates nothing (a checkpoint follows).
        dtype: of the parameters.

    Attributes:
        config: as given.
        group: the ``TPGroup`` of all its layers.
        num_kv_heads_local: KV heads of this rank.

    Raises:
        ValueError: more ranks than query heads, vocabulary entries or MLP channels.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        overlap: str = "auto",
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        self.group = resolve_group(group)
        self.model = _Decoder(config, overlap, self.group, device, dtype)
        if config.tie_word_embeddings:
            self.lm_head = ParallelLMHead.from_embedding(self.model.embed_tokens)
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, group=self.group, device=device, dtype=dtype
            )
        self.num_kv_heads_local = self.model.layers[0].self_attn.num_kv_heads_local

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
        logits: str | torch.Tensor = "all",
    ) -> torch.Tensor:
        """Logits of the next token.

        Args:
            input_ids: int64 [B, S], the same on all ranks.
            positions: int64 [S] or [B, S], for the rotary embedding; by default 0 .. S-1, or the slots that are written
                with a cache.
            cache: keys and values so far; the new ones are written behind them. Call ``cache.advance(S)`` afterwards.
                Only without gradients.
            logits: which positions to run through the output head: ``"all"``, ``"last"``, or int64 [B], one per row.

        Returns:
            [B, S, vocab] for ``"all"``, else [B, vocab]; whole and equal on every rank; differentiable without a cache.

        Raises:
            ValueError: ids, positions, cache or ``logits`` do not fit, or the cache is full.
        """
        if isinstance(logits, str):
            if logits not in ("all", "last"):
                raise ValueError(f"logits must be 'all', 'last' or one position per row, got {logits!r}")
        elif logits.shape != input_ids.shape[:1] or logits.dtype != torch.int64:
            raise ValueError(
                f"logits as positions must be int64 [{input_ids.shape[0]}], got {logits.dtype} {list(logits.shape)}"
            )
        elif logits.is_cpu and not bool(((logits >= 0) & (logits < input_ids.shape[1])).all()):
            raise ValueError(f"logits: expected a position in [0, {input_ids.shape[1]}) per row, got {logits.tolist()}")
        hidden = self.hidden_states(input_ids, positions, cache)
        if isinstance(logits, torch.Tensor):
            hidden = hidden[torch.arange(hidden.shape[0], device=hidden.device), logits]
        elif logits == "last":
            hidden = hidden[:, -1]
        return self.lm_head(hidden)

    def hidden_states(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """What the output head reads: the final norm's result [B, S, hidden], equal on every rank. As ``forward``."""
        if input_ids.dim() != 2:
            raise ValueError(f"expected input_ids [B, S], got {list(input_ids.shape)}")
        if input_ids.numel() == 0:
            raise ValueError(f"expected input_ids [B, S] with at least one token, got {list(input_ids.shape)}")
        if cache is not None:
            cache.check_room(input_ids.shape[0], input_ids.shape[1])
        return self.model(input_ids, positions, cache)

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's part of the logits, ``lm_head.vocab_range``, of ``hidden`` [..., hidden]; no gradient for it."""
        return self.lm_head.project(hidden, self.lm_head.weight, self.lm_head.bias)

    def _apply(self, fn, recurse=True):
        # to_empty() and the like replace parameters one by one, and would part the head from the embedding.
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:
            self.lm_head.tie_weights(self.model.embed_tokens)
        return self

    def extra_repr(self) -> str:
        return f"{self.config.model_type}, rank {self.group.rank} of {self.group.world_size}"
