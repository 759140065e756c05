"""``ParallelAttention``: causal grouped-query attention with its heads spread over the ranks, and one all-reduce.

    q, k, v = split(x @ Wqkv.T)            own heads
    q, k = rope(q_norm(q)), rope(k_norm(k))
    y = all_reduce(attention(q, k, v) @ Wo[:, own].T)

Without a cache every step is differentiable. With one, the step between projection and attention is a single op that
rotates, normalises and writes to the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_kernels import ops
from tp_kernels.checkpoint.sharding import shard_heads_sizes, shard_range_sizes
from tp_kernels.comm.functional import copy_to_tensor_parallel
from tp_kernels.layers.base import TensorParallelLayer
from tp_kernels.layers.kv_cache import LayerKVCache, PackedLayerKVCache
from tp_kernels.layers.linear import RowParallelLinear
from tp_kernels.layers.norm import RMSNorm
from tp_kernels.layers.qkv import QKVParallelLinear
from tp_kernels.layers.rotary import RotaryEmbedding

__all__ = ["ParallelAttention"]


class ParallelAttention(TensorParallelLayer):
    """Causal self-attention with grouped key/value heads.

    ``state_dict`` has the stock names ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``q_norm`` and ``k_norm``.

    Args:
        hidden_size: size of the input and output.
        num_heads: query heads; at least the number of ranks.
        num_kv_heads: KV heads, a divisor of ``num_heads``; None means as many as query heads.
        head_dim: size of a head; ``hidden_size // num_heads`` by default.
        bias: a bias for the query, key and value projections (Qwen2).
        o_bias: a bias for the output projection.
        qk_norm: RMSNorm over each query and key head before the rotation (Qwen3).
        norm_eps: of those norms.
        rope: rotary embedding, shared by the layers of a model; None for no positions.
        sliding_window: a token sees only this many last positions, its own included; None for all.
        scale: factor of the scores, ``head_dim ** -0.5`` by default.
        overlap: see ``RowParallelLinear``; with ``sequence_parallel`` for both projections (``ColumnParallelLinear``).
        sequence_parallel: input and output are this rank's part of the sequence, in ``shard_range``'s parts; positions
            are those of the whole sequence. Not with a cache.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        device: as in torch; ``"meta"`` allocates nothing.
        dtype: of the parameters.

    Attributes:
        num_heads_local, num_kv_heads_local: heads of this rank; a ``LayerKVCache`` needs the latter.

    Shape:
        [B, S, hidden_size] -> [B, S, hidden_size], whole and equal on every rank.

    Raises:
        ValueError: heads that do not divide, more ranks than query heads; in ``forward``, an input, positions or a
            cache that does not fit, or a cache while a gradient is being recorded.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rope: RotaryEmbedding | None = None,
        sliding_window: int | None = None,
        scale: float | None = None,
        overlap: str = "auto",
        sequence_parallel: bool = False,
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("hidden_size", hidden_size), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"hidden_size={hidden_size} is not num_heads={num_heads} heads; pass head_dim")
            head_dim = hidden_size // num_heads
        if rope is not None and rope.head_dim != head_dim:
            raise ValueError(f"expected a rotary embedding for head_dim={head_dim}, got one for {rope.head_dim}")
        if sliding_window is not None and (not isinstance(sliding_window, int) or sliding_window < 1):
            raise ValueError(f"sliding_window must be None or a positive int, got {sliding_window!r}")
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim = (
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
        )
        self.rope, self.sliding_window = rope, sliding_window
        self.scale = head_dim**-0.5 if scale is None else float(scale)
        self.norm_eps = norm_eps
        self.sequence_parallel = sequence_parallel
        factory = {"group": self.group, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        gathering = overlap if sequence_parallel else "auto"
        qkv = QKVParallelLinear(hidden_size, head_dim, num_heads, num_kv_heads, bias, overlap=gathering, **factory)
        self._add_fused("qkv_proj", qkv)
        sizes = shard_heads_sizes(num_heads, num_kv_heads, self.tp_size)
        self.o_proj = RowParallelLinear(
            num_heads * head_dim,
            hidden_size,
            o_bias,
            overlap=overlap,
            partition=[q_heads * head_dim for q_heads, _ in sizes],
            **factory,
        )
        self.q_norm = RMSNorm(head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.num_heads_local = self.qkv_proj.num_heads_local
        self.num_kv_heads_local = self.qkv_proj.num_kv_heads_local
        self._head_counts = (self.num_heads_local, self.num_kv_heads_local, self.num_kv_heads_local)
        self._width_local = self.num_heads_local * head_dim
        self._unrotated: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: LayerKVCache | PackedLayerKVCache | None = None,
        sequence_sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: [B, S, hidden_size], the same on all ranks.
            positions: int64 [S] or [B, S] for the rotation; by default 0 .. S-1, with a cache the slots written.
            cache: keys and values so far; see ``LayerKVCache``. A ``PackedLayerKVCache`` takes pieces of several rows
                as one: B is 1, and positions are those of its plan.
            sequence_sizes: with ``sequence_parallel``, every rank's length; None asks the other ranks.

        Returns:
            [B, S, hidden_size].
        """
        return self.o_proj(self.attend(x, positions, cache, sequence_sizes))

    def attend(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: LayerKVCache | PackedLayerKVCache | None = None,
        sequence_sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """What ``forward`` projects with ``o_proj``: [B, S, heads of this rank * head_dim]. Same arguments.

        With ``sequence_parallel`` S is that of all ranks.
        """
        if not isinstance(x, torch.Tensor) or x.dim() != 3:
            got = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"ParallelAttention: expected an input [B, S, {self.hidden_size}], got {got}")
        batch, length, qkv = x.shape[0], x.shape[1], None
        if self.sequence_parallel and self.tp_size > 1:
            if cache is not None:
                raise ValueError("sequence parallelism is for whole sequences: expected no KV cache")
            qkv = self.qkv_proj(x, sequence_sizes)
            length = qkv.shape[1]
            expected = shard_range_sizes(length, self.tp_size)[self.tp_rank]
            if x.shape[1] != expected:
                raise ValueError(f"expected {expected} of {length} tokens on rank {self.tp_rank}, got {x.shape[1]}")
        if positions is not None and positions.shape != (length,) and positions.shape != (batch, length):
            raise ValueError(f"expected positions [{length}] or [{batch}, {length}], got {list(positions.shape)}")
        if isinstance(cache, PackedLayerKVCache):
            mixed = self._mix_packed(x, positions, cache)
        elif cache is not None:
            mixed = self._mix_cached(x, positions, cache)
        else:
            mixed = self._mix(self.qkv_proj(x) if qkv is None else qkv, positions)
        return mixed.transpose(1, 2).reshape(batch, length, self._width_local)

    def _mix(self, qkv: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Attention among tokens without a past: [B, heads of this rank, S, head_dim]."""
        batch, length = qkv.shape[0], qkv.shape[1]
        q, k, v = qkv.view(batch, length, -1, self.head_dim).split(self._head_counts, dim=2)
        if self.q_norm is not None:
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rope is not None:
            if positions is None:
                cos, sin = self.rope.tables(length, qkv.device)
                cos, sin = cos[:length], sin[:length]
            else:
                cos, sin = self.rope(positions)
            q, k = ops.apply_rope(q, k, cos, sin)
        return ops.attention(q, k, v, causal=True, sliding_window=self.sliding_window, scale=self.scale)

    def _normed(self, heads: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """QK-norm of this rank's heads; the gradient of the replicated weight is summed over the ranks."""
        weight = norm.weight
        if self.tp_size == 1 or not weight.requires_grad or not torch.is_grad_enabled():
            # Weights kept in fp32 must not widen the queries beside 16-bit values.
            return ops.rms_norm(heads, weight, self.norm_eps).to(heads.dtype)
        # In fp32, so that the gradient is rounded once, after the sum; the product of two bf16 values is exact in fp32,
        # hence the result has the same bits.
        weight = copy_to_tensor_parallel(weight.to(torch.promote_types(weight.dtype, torch.float32)), self.group)
        return ops.rms_norm_reference(heads, weight, self.norm_eps).to(heads.dtype)

    def _mix_cached(self, x: torch.Tensor, positions: torch.Tensor | None, cache: LayerKVCache) -> torch.Tensor:
        """The same over the tokens in the cache and those of ``x``, which it takes in."""
        length = x.shape[1]
        qkv = self._for_cache(x, cache, cache.batch_size)
        cos, sin, positions = self._rotation(positions, cache.max_len, x.device)
        lengths = cache.lengths
        q_norm, k_norm = self.q_norm, self.k_norm
        q = ops.qkv_rope_cache(
            qkv,
            cos,
            sin,
            lengths,
            cache.k,
            cache.v,
            self.num_heads_local,
            self.num_kv_heads_local,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            self.norm_eps,
            positions,
            page_table=cache.page_table,
            new_tokens=cache.new_tokens,
        )
        if length > 1 and cache.page_table is None and cache.known_empty():
            # A prompt into an empty cache: the same attention as without one, over just the slots that were written.
            k, v = cache.k[:, :, :length].to(q.dtype), cache.v[:, :, :length].to(q.dtype)
            return ops.attention(q, k, v, causal=True, sliding_window=self.sliding_window, scale=self.scale)
        return ops.decode_attention(
            q,
            cache.k,
            cache.v,
            lengths,
            scale=self.scale,
            sliding_window=self.sliding_window,
            page_table=cache.page_table,
        )

    def _mix_packed(self, x: torch.Tensor, positions: torch.Tensor | None, cache: PackedLayerKVCache) -> torch.Tensor:
        """The same for pieces of several rows in one: [1, heads of this rank, N, head_dim]."""
        qkv, tokens = self._for_cache(x, cache, 1), cache.tokens
        if positions is not None:
            raise ValueError("expected no positions: packed tokens have those of their plan")
        if x.shape[1] != len(tokens.slots):
            raise ValueError(f"expected the {len(tokens.slots)} tokens of the plan, got {x.shape[1]}")
        mixed = self.mix_packed(qkv.flatten(0, 1), cache, *self._tables(cache.max_len, x.device))
        return mixed.transpose(0, 1).unsqueeze(0)

    def mix_packed(
        self, qkv: torch.Tensor, cache: PackedLayerKVCache, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Attention of packed tokens over their own rows: rotation, write to the pages, and the sum of values.

        Args:
            qkv: [N, (Hq + 2 * Hkv) * head_dim] of this rank.
            cache: the pages, and which token belongs where.
            cos, sin: rotation tables over positions.

        Returns:
            [N, heads of this rank, head_dim].
        """
        tokens = cache.tokens
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        # Every token as a row of its own, whose one page is the page that it stands in.
        q = ops.qkv_rope_cache(
            qkv.unsqueeze(1),
            cos,
            sin,
            tokens.slots,
            cache.k,
            cache.v,
            self.num_heads_local,
            self.num_kv_heads_local,
            q_norm,
            k_norm,
            self.norm_eps,
            tokens.positions,
            page_table=tokens.pages,
        ).squeeze(2)
        k, v = (x.to(q.dtype) for x in cache.seen())
        options = {"causal": True, "sliding_window": self.sliding_window, "scale": self.scale}
        if len(tokens.cu_tokens) == 2:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            return ops.attention(q, k, v, **options)[0].transpose(0, 1)
        bounds = (tokens.cu_tokens, tokens.cu_keys, tokens.max_tokens, tokens.max_keys)
        return ops.flash_attention_varlen(q, k, v, *bounds, **options)

    def _for_cache(self, x: torch.Tensor, cache: LayerKVCache | PackedLayerKVCache, rows: int) -> torch.Tensor:
        """The fused projection of ``x`` [rows, S, hidden], after checking that ``cache`` can take it."""
        if rows != x.shape[0] or cache.num_kv_heads != self.num_kv_heads_local or cache.head_dim != self.head_dim:
            raise ValueError(
                f"expected a cache of [{x.shape[0]}, {self.num_kv_heads_local}, max_len, {self.head_dim}], got "
                f"{list(cache.k.shape)}"
            )
        qkv = self.qkv_proj(x)
        if qkv.requires_grad:
            raise ValueError("a KV cache is for inference: expected torch.no_grad() or torch.inference_mode()")
        return qkv

    def _rotation(
        self, positions: torch.Tensor | None, max_len: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rotation tables, and the rows of them to take (None: those of the cache slots)."""
        if positions is None:
            return *self._tables(max_len, device), None
        if not positions.is_cuda:
            return *self._tables(max(max_len, int(positions.max()) + 1), device), positions
        # The largest position is on the GPU, and asking for it would stall it: one row for each token instead.
        if self.rope is None:
            return *self._tables(max_len, device), None
        cos, sin = self.rope(positions.reshape(-1))
        return cos, sin, torch.arange(positions.numel(), device=device).view(positions.shape)

    def _tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation tables of at least ``length`` rows; without a rotary embedding, those of no rotation."""
        if self.rope is not None:
            return self.rope.tables(length, device)
        tables = self._unrotated
        if tables is None or tables[0].shape[0] < length or tables[0].device != device:
            ones = torch.ones(length, self.head_dim, device=device, dtype=torch.float32)
            tables = self._unrotated = (ones, torch.zeros_like(ones))
        return tables

    @classmethod
    def from_linear(
        cls,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        o: nn.Linear,
        *,
        head_dim: int,
        group: Any = None,
        **options: Any,
    ) -> ParallelAttention:
        """Shard the projections of an existing attention; they are left alone.

        Args:
            q, k, v, o: the unsharded projections, the same on all ranks.
            head_dim: size of a head; the numbers of heads follow.
            group: see the constructor.
            options: further constructor arguments (``rope``, ``sliding_window``, ...). With ``qk_norm`` the norms start
                at one.
        """
        if not isinstance(head_dim, int) or head_dim < 1 or q.out_features % head_dim or k.out_features % head_dim:
            raise ValueError(
                f"expected q and k outputs in whole heads of {head_dim!r}, got {q.out_features} and {k.out_features}"
            )
        weight = q.weight
        layer = cls(
            q.in_features,
            q.out_features // head_dim,
            k.out_features // head_dim,
            head_dim,
            bias=q.bias is not None,
            o_bias=o.bias is not None,
            group=group,
            device="meta",
            dtype=weight.dtype,
            **options,
        )
        layer.qkv_proj._take_over([q, k, v])
        layer.o_proj._take_over([o])
        if layer.q_norm is not None and not weight.is_meta:
            for norm in (layer.q_norm, layer.k_norm):
                norm.to_empty(device=weight.device)
                norm.reset_parameters()
        return layer.train(q.training)
