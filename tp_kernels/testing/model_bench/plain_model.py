"""A decoder-only model written by hand in plain PyTorch: what a careful user gets without any other package.

As good as that gets: query/key/value and gate/up projections fused, one rotation for queries and keys together, a
static KV cache, ``F.rms_norm``, cuDNN's attention where torch offers it. Grouped queries pass through attention as
several query rows of one KV head, so that no key is repeated. It takes its weights from whoever has them, without a
copy; in fp32, with weights made one layer at a time, it is the reference of the benchmark's checks.

Over several ranks it is cut as Megatron cuts: heads, MLP width and words, with a sum over the ranks behind the
embedding, each output projection and each down projection (``sums.py`` has the ways to add). The next tokens take one
small sum more, of every rank's best (logit, token), so that no logits travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tp_kernels.testing.model_bench.sums import Sums

__all__ = ["LayerWeights", "PlainModel", "PlainState"]


class LayerWeights(NamedTuple):
    """Weights of a layer: stacked [q; k; v] and [gate; up], norms as vectors."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass
class PlainState:
    """A static KV cache and the position and tokens of the next step, all on the device.

    Attributes:
        keys, values: one [B, Hkv, max_len, D] a layer.
        position: int64 [1], the slot that the next token is written to; the rows of a batch are equally long.
        tokens: int64 [B], the next tokens to run.
    """

    keys: list[Tensor]
    values: list[Tensor]
    position: Tensor
    tokens: Tensor

    @property
    def max_len(self) -> int:
        """Slots of the cache."""
        return self.keys[0].shape[2]


class PlainModel:
    """Llama, Mistral (without a window) or Qwen3, from weights that belong to someone else.

    Args:
        embed: [words, hidden].
        layers: of this many layers, or made as they are asked for.
        norm: [hidden].
        head: [words, hidden].
        heads, kv_heads, head_dim: of these weights (one shard's, perhaps).
        theta: base of the rotation.
        eps: of the norms.
        sums: adds over the ranks that share the model; None where these weights are all there are.
        first_word: of ``embed`` and ``head``; the ranks' words ascend.
    """

    def __init__(
        self,
        embed: Tensor,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        head: Tensor,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        theta: float,
        eps: float,
        sums: Sums | None = None,
        first_word: int = 0,
    ):
        self.embed, self.layers, self.norm, self.head = embed, layers, norm, head
        self.heads, self.kv_heads, self.head_dim, self.theta, self.eps = heads, kv_heads, head_dim, theta, eps
        self._sums, self._first_word = sums, first_word
        self._tables: tuple[Tensor, Tensor] | None = None
        self._not_by_cudnn: set[tuple[torch.Size, torch.Size]] = set()

    def state(self, batch: int, max_len: int) -> PlainState:
        """An empty cache; its contents are random, so that attention over them is attention over numbers."""
        device, dtype = self.norm.device, self.norm.dtype
        shape = (batch, self.kv_heads, max_len, self.head_dim)
        keys, values = ([torch.randn(shape, device=device, dtype=dtype) for _ in self.layers] for _ in range(2))
        position = torch.zeros(1, dtype=torch.int64, device=device)
        return PlainState(keys, values, position, torch.zeros(batch, dtype=torch.int64, device=device))

    def logits(self, ids: Tensor) -> Tensor:
        """Logits of every position of ``ids`` [B, S], without a cache: [B, S, words], of this rank's words."""
        return F.linear(self._run(ids, None), self.head)

    def prefill(self, ids: Tensor, state: PlainState, last: Tensor | None = None) -> Tensor:
        """Run prompts [B, S] into the cache and choose the next tokens, which are kept in ``state`` and returned.

        Args:
            ids: int64.
            state: is changed in place.
            last: int64 [B], where each prompt ends, for prompts that were padded behind their end; no steps can
                follow, as the rows are then not equally long. None: all end with the last column.
        """
        hidden = self._run(ids, state)
        if last is None:
            hidden = hidden[:, -1]
        else:
            hidden = hidden.gather(1, last.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)
        state.position.fill_(ids.shape[1])
        self._choose(state.tokens, hidden)
        return state.tokens

    def decode(self, state: PlainState, length: int | None = None) -> None:
        """One step: run ``state.tokens``, choose the next ones, advance. Waits for nothing, so it can be captured.

        Args:
            state: is changed in place.
            length: attend to exactly this many slots, without a mask; a graph is then good for one length. None
                attends to all slots of the cache with those behind the token masked out, for any length.
        """
        mask = None
        if length is None:
            later = torch.arange(state.max_len, device=state.position.device) > state.position
            mask = torch.zeros(later.shape, device=later.device, dtype=self.norm.dtype).masked_fill_(later, -torch.inf)
            mask = mask.view(1, 1, 1, -1)
        cos, sin = (table.index_select(0, state.position) for table in self._rotation(state.max_len))
        x = self._embedded(state.tokens.unsqueeze(1))
        for number, layer in enumerate(self.layers):
            q, k, v = self._qkv(x, layer, cos, sin)
            keys, values = state.keys[number], state.values[number]
            keys.index_copy_(2, state.position, k)
            values.index_copy_(2, state.position, v)
            if length is not None:
                keys, values = keys[:, :, :length], values[:, :, :length]
            grouped = q.reshape(q.shape[0], self.kv_heads, self.heads // self.kv_heads, self.head_dim)
            mixed = self._attention(grouped, keys, values, attn_mask=mask)
            x = self._rest(x, mixed.reshape(q.shape[0], 1, -1), layer)
        self._choose(state.tokens, F.rms_norm(x, x.shape[-1:], self.norm, self.eps)[:, 0])
        state.position.add_(1)

    def _run(self, ids: Tensor, state: PlainState | None) -> Tensor:
        length = ids.shape[1]
        cos, sin = (table[:length] for table in self._rotation(length if state is None else state.max_len))
        x = self._embedded(ids)
        for number, layer in enumerate(self.layers):
            q, k, v = self._qkv(x, layer, cos, sin)
            if state is not None:
                state.keys[number][:, :, :length].copy_(k)
                state.values[number][:, :, :length].copy_(v)
            mixed = self._attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
            x = self._rest(x, mixed.transpose(1, 2).flatten(2), layer)
        return F.rms_norm(x, x.shape[-1:], self.norm, self.eps)

    def _qkv(self, x: Tensor, layer: LayerWeights, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, S, D], rotated."""
        normed = F.rms_norm(x, x.shape[-1:], layer.input_norm, self.eps)
        heads = F.linear(normed, layer.qkv).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        rotated, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if layer.q_norm is not None:
            q, k = rotated.split([self.heads, self.kv_heads], dim=1)
            q, k = (F.rms_norm(t, t.shape[-1:], w, self.eps) for t, w in ((q, layer.q_norm), (k, layer.k_norm)))
            rotated = torch.cat((q, k), dim=1)
        low, high = rotated.chunk(2, dim=-1)
        rotated = rotated * cos + torch.cat((-high, low), dim=-1) * sin
        q, k = rotated.split([self.heads, self.kv_heads], dim=1)
        return q, k, v

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """By cuDNN where it can (twice as fast as torch's FlashAttention 2 on an H100), else as torch chooses."""
        shapes = (q.shape, k.shape)
        plain = options.get("attn_mask") is None and q.dtype is not torch.float32
        if q.is_cuda and plain and shapes not in self._not_by_cudnn:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            try:
                with sdpa_kernel([*order, SDPBackend.MATH], set_priority=True):
                    return F.scaled_dot_product_attention(q, k, v, **options)
            except RuntimeError:  # its support differs between versions, and is not always known before it is tried
                self._not_by_cudnn.add(shapes)
        return F.scaled_dot_product_attention(q, k, v, **options)

    def _rest(self, x: Tensor, mixed: Tensor, layer: LayerWeights) -> Tensor:
        x = x + self._summed(mixed, layer.o)
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer.post_norm, self.eps), layer.gate_up).chunk(2, dim=-1)
        return x + self._summed(F.silu(gate) * up, layer.down)

    def _summed(self, x: Tensor, weight: Tensor) -> Tensor:
        """A projection of which every rank has a part of the inputs; gone with the next sum."""
        return F.linear(x, weight) if self._sums is None else self._sums.linear(x, weight)

    def _embedded(self, ids: Tensor) -> Tensor:
        if self._sums is None:
            return F.embedding(ids, self.embed)
        places = ids - self._first_word
        others = (places < 0) | (places >= self.embed.shape[0])
        x = F.embedding(places.masked_fill(others, 0), self.embed).masked_fill_(others.unsqueeze(-1), 0.0)
        return self._sums.add(x)

    def _choose(self, tokens: Tensor, hidden: Tensor) -> None:
        """Write the most likely token of each row [B, hidden] to ``tokens`` [B], the same on all ranks."""
        logits = F.linear(hidden, self.head)
        if self._sums is None:
            tokens.copy_(logits.argmax(-1))
            return
        best, words = logits.max(-1)
        offers = torch.zeros(self._sums.world_size, 2, len(best), dtype=torch.float32, device=best.device)
        offers[self._sums.rank, 0].copy_(best)
        offers[self._sums.rank, 1].copy_(words + self._first_word)  # exact: there are fewer than 2^24 words
        offers = self._sums.add(offers)
        tokens.copy_(offers[:, 1].gather(0, offers[:, 0].argmax(0, keepdim=True))[0])

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [>= length, D] in the model's dtype, computed in fp32."""
        if self._tables is None or self._tables[0].shape[0] < length:
            device = self.norm.device
            powers = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
            angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), self.theta**-powers)
            angles = torch.cat((angles, angles), dim=-1)
            self._tables = (angles.cos().to(self.norm.dtype), angles.sin().to(self.norm.dtype))
        return self._tables
