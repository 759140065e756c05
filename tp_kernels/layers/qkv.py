"""``QKVParallelLinear``: query, key and value projections as one column-parallel matmul, cut by whole heads.

Which heads a rank gets is ``checkpoint.sharding.shard_heads``'s decision. With more ranks than KV heads, ranks share KV
heads; each of them sees only its own query heads' part of the gradient of the shared key and value weights, so the
backward pass sums those parts. It sums weight gradients, not activations: the input's gradient is summed over all
ranks anyway and would count a summed activation gradient several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tp_kernels.checkpoint.sharding import shard_heads
from tp_kernels.comm.process_group import TPGroup
from tp_kernels.layers.base import TensorParallelLayer
from tp_kernels.layers.linear import ColumnParallelLinear

__all__ = ["QKVParallelLinear"]


class _SumReplicated(torch.autograd.Function):
    """Identity on the local fused parameter; backward sums the key and value rows over the ranks that hold them.

    One all-reduce of a buffer with a place for every KV head: no subgroups needed, and every rank sums in the same
    order.
    """

    @staticmethod
    def forward(ctx, parameter: torch.Tensor, group: TPGroup, q_rows: int, head_rows: int, kv_heads: int, own: int):
        ctx.layout = group, q_rows, head_rows, kv_heads, own
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        group, q_rows, head_rows, kv_heads, own = ctx.layout
        everyone = grad.new_zeros(2, kv_heads, head_rows, *grad.shape[1:])
        everyone[:, own] = grad[q_rows:].unflatten(0, (2, head_rows))
        everyone = group.all_reduce(everyone, out=everyone)
        total = torch.cat([grad[:q_rows], everyone[:, own].flatten(0, 1)])
        return total, None, None, None, None, None


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections of grouped-query attention, fused and spread over the ranks by heads.

    The local weight stacks this rank's query, key and value rows. ``state_dict`` speaks of ``q_proj``, ``k_proj`` and
    ``v_proj`` in the stock layout.

    Args:
        hidden_size: size of the input's last dimension.
        head_dim: size of one head.
        num_heads: query heads; at least the number of ranks.
        num_kv_heads: KV heads, a divisor of ``num_heads``; None means as many as query heads.
        bias: a bias for all three.
        names: stock names of the three projections.
        group, sequence_parallel, overlap, skip_bias_add, device, dtype: as in ``ColumnParallelLinear``.

    Attributes:
        num_heads_local, num_kv_heads_local: heads of this rank.
        head_shard: the global head numbers of this rank.

    Shape:
        [..., hidden_size] -> [..., (num_heads_local + 2 * num_kv_heads_local) * head_dim]; ``split`` takes it apart.

    Raises:
        ValueError: heads that do not divide, or more ranks than query heads.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = False,
        *,
        names: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
        group: Any = None,
        sequence_parallel: bool = False,
        overlap: str = "auto",
        skip_bias_add: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        TensorParallelLayer.__init__(self, group)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(f"head_dim must be a positive int, got {head_dim!r}")
        if len(names) != 3 or len(set(names)) != 3:
            raise ValueError(f"names must be three different names, got {list(names)}")
        shards = [shard_heads(num_heads, num_kv_heads, self.tp_size, rank) for rank in range(self.tp_size)]
        self.head_dim, self.num_heads, self.num_kv_heads = head_dim, num_heads, num_kv_heads
        self.head_shard = shards[self.tp_rank]
        self.num_heads_local, self.num_kv_heads_local = len(self.head_shard.q), len(self.head_shard.kv)
        self._widths = [self.num_heads_local * head_dim] + [self.num_kv_heads_local * head_dim] * 2
        self._kv_replicated = self.tp_size > num_kv_heads
        q_rows = [range(shard.q.start * head_dim, shard.q.stop * head_dim) for shard in shards]
        kv_rows = [range(shard.kv.start * head_dim, shard.kv.stop * head_dim) for shard in shards]
        totals = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        pieces = list(zip(names, totals, (q_rows, kv_rows, kv_rows), strict=True))
        self._build(hidden_size, pieces, bias, False, sequence_parallel, skip_bias_add, device, dtype, overlap)

    def _shared(self, parameter: torch.Tensor | None) -> torch.Tensor | None:
        """The parameter, its gradient summed over the ranks that hold the same key and value rows."""
        if parameter is None or not parameter.requires_grad:
            return parameter
        return _SumReplicated.apply(
            parameter, self.group, self._widths[0], self.head_dim, self.num_kv_heads, self.head_shard.kv.start
        )

    def forward(self, x: torch.Tensor, sequence_sizes: Sequence[int] | None = None):
        """Project ``x`` [..., hidden_size]; the class says how the output is laid out."""
        if not self._kv_replicated or not torch.is_grad_enabled():
            return super().forward(x, sequence_sizes)
        weight, bias = self._shared(self.weight), self._shared(self.bias)
        if self.skip_bias_add:
            return self.project(x, weight, None, sequence_sizes), bias
        return self.project(x, weight, bias, sequence_sizes)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of this rank's queries, keys and values: [..., num_heads_local * head_dim] and twice the KV width."""
        return qkv.split(self._widths, dim=-1)

    def load_full_weight(self, weight: Sequence[torch.Tensor], bias: Sequence[torch.Tensor] | None = None) -> None:
        """Take this rank's heads from the full (q, k, v) weights and biases."""
        self._load_full(weight, [None] * len(weight) if bias is None else bias)

    @classmethod
    def from_linear(cls, linear: Sequence[nn.Linear], *, head_dim: int, group: Any = None, **options: Any):
        """Fuse and shard existing (q, k, v) projections.

        Args:
            linear: the three ``nn.Linear`` layers, the same on all ranks; they are left alone.
            head_dim: size of one head; the numbers of heads follow from the layers' outputs.
            group: see ``ColumnParallelLinear``.
            options: further constructor arguments.
        """
        q, k, v = linear
        if k.out_features != v.out_features or q.out_features % head_dim or k.out_features % head_dim:
            raise ValueError(
                f"expected q, k, v outputs in whole heads of {head_dim}, k and v alike, got "
                f"{q.out_features}, {k.out_features}, {v.out_features}"
            )
        if len({(m.in_features, m.bias is None, m.weight.dtype) for m in (q, k, v)}) != 1:
            raise ValueError("q, k and v must agree in in_features, dtype and in having a bias")
        layer = cls(
            q.in_features,
            head_dim,
            q.out_features // head_dim,
            k.out_features // head_dim,
            q.bias is not None,
            group=group,
            device="meta",
            dtype=q.weight.dtype,
            **options,
        )
        layer._take_over([q, k, v])
        return layer
