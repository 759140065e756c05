"""Linear layers whose weight is spread over the ranks of a group.

    ColumnParallelLinear   y[..., own] = x @ W[own].T + b[own]            each rank computes some of the outputs
    RowParallelLinear      y = sum over ranks of x[..., own] @ W[:, own].T, then + b once

``W`` is [out_features, in_features] as in torch. A column-parallel layer followed by a row-parallel one needs a single
all-reduce (Megatron's pairing); both cut the dimension between them by ``checkpoint.sharding.shard_width``, so any size
works on any number of ranks and pairs always agree. With ``sequence_parallel`` the all-reduce is split into an
all-gather of the sequence before the pair and a reduce-scatter after it, and activations outside the pair are 1/N as
long.

Numerics: the partial sums are rounded to the activations' dtype, then summed over the ranks as the group's communicator
promises (``group.numerics``); the row-parallel bias is added after that sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_kernels import ops
from tp_kernels.checkpoint.sharding import shard_range_sizes
from tp_kernels.comm.functional import (
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    gather_from_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    scatter_to_tensor_parallel,
)
from tp_kernels.comm.overlap import check_offered, may_overlap
from tp_kernels.layers.base import TensorParallelLayer, TensorShard, check_dtype, check_input, check_linears
from tp_kernels.layers.partition import checked_partition, ranges_from_sizes
from tp_kernels.layers.quantized import QuantizableLinear
from tp_kernels.ops._gpu import autocast_dtype, takes_kernels
from tp_kernels.ops._gpu_linear import gpu_linear
from tp_kernels.ops._library import needs_grad, watched
from tp_kernels.ops._quantized_linear import quantized_linear

__all__ = ["ColumnParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"]

# Activations are [..., sequence, hidden].
_SEQUENCE_DIM = -2
_OVERLAP_MODES = ("auto", "none", "chunked", "fused")


class _ParallelLinear(QuantizableLinear):
    """What both kinds share: the parameters, torch's initialisation, loading from full tensors."""

    in_features: int
    out_features: int

    def _add_parameters(self, weight_shape: tuple[int, int], bias_size: int | None, device, dtype) -> None:
        check_dtype(dtype)
        self.weight = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        self.register_parameter("weight_scale", None)
        if bias_size is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(bias_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initialise as torch.nn.Linear does; see ``layers.base`` for what ranks seeded alike get."""
        self._refuse_quantized("initialise")
        shards = self.tensor_shards()
        for weight, bias in _weight_bias_pairs(shards):
            self.reset_full(weight, lambda full: nn.init.kaiming_uniform_(full, a=math.sqrt(5)))
            if bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                self.reset_full(bias, lambda full, bound=bound: nn.init.uniform_(full, -bound, bound))

    def _load_full(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        self._refuse_quantized("load full weights into")
        pairs = _weight_bias_pairs(self.tensor_shards())
        if len(weights) != len(pairs) or len(biases) != len(pairs):
            raise ValueError(f"expected {len(pairs)} full weights and biases, got {len(weights)} and {len(biases)}")
        copies = []
        for (weight, bias), full_weight, full_bias in zip(pairs, weights, biases, strict=True):
            if (bias is None) != (full_bias is None):
                raise ValueError(f"{weight.name}: expected {'no bias' if bias is None else 'a bias'} beside it")
            copies += [(weight, full_weight)] if bias is None else [(weight, full_weight), (bias, full_bias)]
        for shard, full in copies:
            if tuple(full.shape) != shard.full_shape:
                raise ValueError(f"{shard.name}: expected shape {list(shard.full_shape)}, got {list(full.shape)}")
        for shard, full in copies:
            shard.copy_from_full(full)

    @classmethod
    def _from_one(cls, linear: nn.Linear, group: Any, options: dict[str, Any], *, outputs_first: bool = False):
        """``from_linear`` of a layer with one weight; ``outputs_first`` is the order of the constructor's sizes."""
        check_linears([linear])
        sizes = (linear.in_features, linear.out_features)
        layer = cls(
            *(sizes[::-1] if outputs_first else sizes),
            linear.bias is not None,
            group=group,
            device="meta",
            dtype=linear.weight.dtype,
            **options,
        )
        layer._take_over([linear])
        return layer

    def _take_over(self, linears: Sequence[nn.Linear]) -> None:
        """Fill a layer built on the meta device from unsharded ones."""
        first = linears[0].weight
        if not first.is_meta:
            self.to_empty(device=first.device)
            self._load_full([m.weight for m in linears], [m.bias for m in linears])
        self.weight.requires_grad_(first.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(linears[0].bias.requires_grad)
        self.train(linears[0].training)


def _weight_bias_pairs(shards: Sequence[TensorShard]) -> list[tuple[TensorShard, TensorShard | None]]:
    """Stock (weight, bias) pairs in the order in which torch would have created them."""
    biases = {shard.name.removesuffix("bias"): shard for shard in shards if shard.name.endswith("bias")}
    return [(s, biases.get(s.name.removesuffix("weight"))) for s in shards if s.name.endswith("weight")]


class ColumnParallelLinear(_ParallelLinear):
    """Linear layer with its outputs spread over the ranks.

    Args:
        in_features: size of the input's last dimension, whole on every rank.
        out_features: full number of outputs; at least the number of ranks.
        bias: learn an additive bias (sharded like the outputs).
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        gather_output: return all outputs on every rank instead of this rank's.
        sequence_parallel: the input is this rank's part of the sequence (dimension -2); the parts may differ in length.
        skip_bias_add: return ``(output, bias)`` and leave the addition to the caller.
        partition: outputs per rank, instead of ``shard_width``'s.
        device: as in torch; ``"meta"`` allocates nothing.
        dtype: of the parameters.

    Attributes:
        partition: outputs of every rank.
        out_features_local: outputs of this rank.

    Shape:
        [..., in_features] -> [..., out_features_local], or [..., out_features] with ``gather_output``.

    Raises:
        ValueError: sizes that cannot be spread; in ``forward``, an input of another width, dtype or device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Any = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
        partition: Sequence[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        sizes = checked_partition(out_features, partition, self.tp_size, "out_features")
        pieces = [("", out_features, ranges_from_sizes(sizes))]
        self._build(in_features, pieces, bias, gather_output, sequence_parallel, skip_bias_add, device, dtype)

    def _build(self, in_features, pieces, bias, gather_output, sequence_parallel, skip_bias_add, device, dtype) -> None:
        """``pieces``: (stock module name, its full outputs, every rank's range of them), stacked locally."""
        if not isinstance(in_features, int) or isinstance(in_features, bool) or in_features < 1:
            raise ValueError(f"in_features must be a positive int, got {in_features!r}")
        self.in_features = in_features
        self.out_features = sum(total for _, total, _ in pieces)
        self.partition = [sum(len(ranges[rank]) for *_, ranges in pieces) for rank in range(self.tp_size)]
        self.out_features_local = self.partition[self.tp_rank]
        self.gather_output = gather_output
        self.sequence_parallel = sequence_parallel
        self.skip_bias_add = skip_bias_add
        self._column_pieces = pieces
        for parameter in ("weight", "weight_scale", "bias"):
            stock = [(f"{name}.{parameter}" if name else parameter, total, ranges) for name, total, ranges in pieces]
            self._declare(parameter, 0, stock)
        local = self.out_features_local
        self._add_parameters((local, in_features), local if bias else None, device, dtype)
        self.reset_parameters()

    def parallel_input(self, x: torch.Tensor, sequence_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """The checked input of the local matmul: with it, the gradient of ``x`` will be summed over the ranks."""
        check_input(x, self.in_features, self.weight, self)
        if self.tp_size == 1:
            return x
        if self.sequence_parallel:
            sequence_sizes = self._sequence_sizes(x, sequence_sizes)
            return gather_from_sequence_parallel(x, self.group, dim=_SEQUENCE_DIM, sizes=sequence_sizes)
        if x.requires_grad and torch.is_grad_enabled():
            return copy_to_tensor_parallel(x, self.group)
        return x

    def project(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sequence_sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """``ops.linear`` of ``parallel_input(x, sequence_sizes)``; its backward overlaps where the group can."""
        alone = self.tp_size == 1 or self.weight_scale is not None
        if not alone and torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad:
            check_input(x, self.in_features, weight, self)
            sizes = self._sequence_sizes(x, sequence_sizes) if self.sequence_parallel else None
            return ops.column_parallel_linear(x, weight, bias, group=self.group, sequence_sizes=sizes)
        return self._linear(self.parallel_input(x, sequence_sizes), weight, bias)

    def _sequence_sizes(self, x: torch.Tensor, sizes: Sequence[int] | None) -> Sequence[int]:
        if x.dim() < 2:
            raise ValueError(f"expected an input [..., sequence, {self.in_features}], got {list(x.shape)}")
        return self._exchange_lengths(x) if sizes is None else sizes

    def _exchange_lengths(self, x: torch.Tensor) -> list[int]:
        """Every rank's sequence length. Eight bytes a rank; a rank cannot infer the others' from its own."""
        mine = torch.tensor([x.shape[_SEQUENCE_DIM]], dtype=torch.int64, device=x.device)
        return self.group.all_gather(mine).tolist()

    def forward(self, x: torch.Tensor, sequence_sizes: Sequence[int] | None = None):
        """Apply the layer.

        Args:
            x: [..., in_features]; with ``sequence_parallel`` this rank's part along dimension -2.
            sequence_sizes: with ``sequence_parallel``, every rank's length; None asks the other ranks.

        Returns:
            The output, or ``(output, bias or None)`` with ``skip_bias_add``.
        """
        bias = None if self.skip_bias_add else self.bias
        out = self.project(x, self.weight, bias, sequence_sizes)
        if self.gather_output:
            out = self._gather(out)
        if not self.skip_bias_add:
            return out
        if self.bias is None or not self.gather_output:
            return out, self.bias
        return out, self._gather(self.bias)

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        """All ranks' outputs, in the stock order: piece by piece, not rank by rank."""
        if self.tp_size == 1:
            return local
        widths = [len(ranges[self.tp_rank]) for *_, ranges in self._column_pieces]
        parts = [
            gather_from_tensor_parallel(part, self.group, dim=-1, sizes=[len(r) for r in ranges])
            for part, (*_, ranges) in zip(local.split(widths, dim=-1), self._column_pieces, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def load_full_weight(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Take this rank's slices of the full ``weight`` [out_features, in_features] and ``bias`` [out_features]."""
        self._load_full([weight], [bias])

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group: Any = None, **options: Any) -> ColumnParallelLinear:
        """This rank's part of an existing ``nn.Linear``, on its device and in its dtype.

        Args:
            linear: the unsharded layer, the same on all ranks; it is left alone.
            group: see the constructor.
            options: further constructor arguments (``gather_output``, ...).
        """
        return cls._from_one(linear, group, options)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers on one input as one matmul, for example gate and up projections.

    The local weight stacks this rank's rows of each. ``state_dict`` speaks of ``<names[i]>.weight`` and ``.bias``.

    Args:
        in_features: size of the input's last dimension.
        out_features: full outputs of each layer.
        bias: a bias for every one of them.
        names: stock names of the layers; ``linear_0``, ``linear_1``, ... by default.
        group, gather_output, sequence_parallel, skip_bias_add, device, dtype: as in ``ColumnParallelLinear``. A
            gathered output holds the first layer's outputs, then the second's, and so on.

    Shape:
        [..., in_features] -> [..., sum of this rank's outputs], one layer's after the other's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        bias: bool = True,
        *,
        names: Sequence[str] | None = None,
        group: Any = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        TensorParallelLayer.__init__(self, group)
        if isinstance(out_features, int) or not len(out_features):
            raise ValueError(f"out_features must be a non-empty list of ints, got {out_features!r}")
        names = [f"linear_{i}" for i in range(len(out_features))] if names is None else list(names)
        if len(names) != len(out_features) or len(set(names)) != len(names) or "" in names:
            raise ValueError(f"names must be {len(out_features)} different names, got {names}")
        self.names = names
        self.out_features_list = list(out_features)
        pieces = [
            (name, total, ranges_from_sizes(checked_partition(total, None, self.tp_size, "out_features")))
            for name, total in zip(names, out_features, strict=True)
        ]
        self._build(in_features, pieces, bias, gather_output, sequence_parallel, skip_bias_add, device, dtype)

    def load_full_weight(self, weight: Sequence[torch.Tensor], bias: Sequence[torch.Tensor] | None = None) -> None:
        """Take this rank's slices of the layers' full weights and biases, given in order."""
        self._load_full(weight, [None] * len(weight) if bias is None else bias)

    @classmethod
    def from_linear(cls, linear: Sequence[nn.Linear], *, group: Any = None, **options: Any):
        """Merge and shard existing ``nn.Linear`` layers that read the same input."""
        linears = list(linear)
        check_linears(linears)
        if len({(m.in_features, m.bias is None, m.weight.dtype) for m in linears}) != 1:
            raise ValueError("layers to merge must agree in in_features, dtype and in having a bias")
        layer = cls(
            linears[0].in_features,
            [m.out_features for m in linears],
            linears[0].bias is not None,
            group=group,
            device="meta",
            dtype=linears[0].weight.dtype,
            **options,
        )
        layer._take_over(linears)
        return layer


class RowParallelLinear(_ParallelLinear):
    """Linear layer with its inputs spread over the ranks; the partial outputs are summed.

    Args:
        in_features: full number of inputs; at least the number of ranks.
        out_features: number of outputs, whole on every rank.
        bias: learn an additive bias: replicated, added once, after the sum.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        input_is_parallel: the input holds only this rank's features (as a column-parallel layer leaves them); False
            takes the full input and slices it.
        reduce_results: sum over the ranks; False returns this rank's partial sum and wants ``bias=False`` or
            ``skip_bias_add=True``.
        sequence_parallel: return only this rank's part of the sequence (dimension -2), in ``shard_range``'s parts.
        skip_bias_add: return ``(output, bias)`` and leave the addition to the caller.
        overlap: how communication may overlap the matmul: "auto" takes the fastest that is available, "none", "chunked"
            and "fused" ask for one. On the CPU there is nothing to overlap with: every core computes.
        partition: inputs per rank, instead of ``shard_width``'s.
        device: as in torch; ``"meta"`` allocates nothing.
        dtype: of the parameters.

    Shape:
        [..., in_features_local] -> [..., out_features].

    Raises:
        ValueError: sizes that cannot be spread; in ``forward``, an input of another width, dtype or device, or an
            overlap that the input's device and the group do not offer, or an explicit one for a quantised weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Any = None,
        input_is_parallel: bool = True,
        reduce_results: bool = True,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
        overlap: str = "auto",
        partition: Sequence[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        if overlap not in _OVERLAP_MODES:
            raise ValueError(f"overlap must be one of {', '.join(_OVERLAP_MODES)}, got {overlap!r}")
        if not reduce_results and (sequence_parallel or (bias and not skip_bias_add)):
            raise ValueError(
                "reduce_results=False leaves partial sums: expected bias=False or skip_bias_add=True, and no "
                "sequence_parallel"
            )
        if not isinstance(out_features, int) or isinstance(out_features, bool) or out_features < 1:
            raise ValueError(f"out_features must be a positive int, got {out_features!r}")
        self.in_features, self.out_features = in_features, out_features
        self.partition = checked_partition(in_features, partition, self.tp_size, "in_features")
        self.in_features_local = self.partition[self.tp_rank]
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results
        self.sequence_parallel = sequence_parallel
        self.skip_bias_add = skip_bias_add
        self.overlap = overlap
        self._declare("weight", 1, [("weight", in_features, ranges_from_sizes(self.partition))])
        self._declare("bias", None, [("bias", out_features, ())])
        self._add_parameters((out_features, self.in_features_local), out_features if bias else None, device, dtype)
        self.reset_parameters()

    def forward(self, x: torch.Tensor):
        """Apply the layer to ``x`` [..., in_features_local] (or the full input, see the constructor).

        Returns:
            The output, or ``(output, bias or None)`` with ``skip_bias_add``.
        """
        weight = self.weight
        if self.overlap != "auto" and self.overlap != "none":
            self._check_overlap()
            check_offered(self.overlap, self.group, x.device)
        if self.tp_size == 1:
            check_input(x, self.in_features, weight, self)
            out = self._linear(x, weight, None if self.skip_bias_add else self.bias)
            return (out, self.bias) if self.skip_bias_add else out
        if not self.input_is_parallel:
            check_input(x, self.in_features, weight, self)
            x = scatter_to_tensor_parallel(x, self.group, dim=-1, sizes=self.partition)
        else:
            check_input(x, self.in_features_local, weight, self)
        rows = x.numel() // self.in_features_local
        if self.sequence_parallel and self.overlap == "chunked" and x.dim() > 1:
            sizes = shard_range_sizes(x.shape[_SEQUENCE_DIM], self.tp_size)
            out = ops.linear_reduce_scatter(x, weight, sizes=sizes, group=self.group, overlap="chunked")
            return self._with_bias(out)
        alone = self.sequence_parallel or not self.reduce_results or self.weight_scale is not None
        if alone or not may_overlap(self.group, self.overlap, rows):
            return self.reduce_partial(self._linear(x, weight))
        bias = None if self.skip_bias_add else self.bias
        overlap, total = self.overlap, self.in_features
        out = ops.linear_all_reduce(x, weight, bias, group=self.group, overlap=overlap, in_features=total)
        return (out, self.bias) if self.skip_bias_add else out

    def partial_sum(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's ``x @ weight.T`` alone: neither summed over the ranks nor biased.

        For who does the rest, as ``ops.all_reduce_add_rms_norm`` does. Without gradients the result may lie in memory
        that the group's ranks share (see ``SymmetricMemoryCommunicator.get_buffer``): it is good until the next partial
        sum of any layer of the group.

        Args:
            x: [..., in_features_local].
        """
        weight, scale = self.weight, self.weight_scale
        check_input(x, self.in_features_local, weight, self)
        get_buffer = getattr(self.group.communicator, "get_buffer", None)
        if get_buffer is None or watched() or needs_grad(x, weight) or not takes_kernels(x):
            return self._linear(x, weight)
        buffer = get_buffer((*x.shape[:-1], self.out_features), x.dtype) if autocast_dtype(x) is None else None
        if buffer is None:
            return self._linear(x, weight)
        if scale is None:
            return gpu_linear(x, weight, out=buffer)
        return quantized_linear(x, weight, None, None, None, scale, out=buffer)

    def reduce_partial(self, out: torch.Tensor):
        """What follows the local matmul: the sum over the ranks, then the bias.

        Args:
            out: [..., out_features], this rank's ``x @ weight.T``; may be overwritten.

        Returns:
            As ``forward``.
        """
        if self.sequence_parallel and self.tp_size > 1:
            if out.dim() < 2:
                raise ValueError(f"expected an input [..., sequence, features], got one that gives {list(out.shape)}")
            sizes = shard_range_sizes(out.shape[_SEQUENCE_DIM], self.tp_size)
            out = reduce_scatter_to_sequence_parallel(out, self.group, dim=_SEQUENCE_DIM, sizes=sizes)
        elif self.reduce_results:
            out = reduce_from_tensor_parallel(out, self.group, inplace=True)
        return self._with_bias(out)

    def _with_bias(self, out: torch.Tensor):
        bias = self.bias
        if bias is not None and self.sequence_parallel and self.tp_size > 1:
            bias = copy_to_tensor_parallel(bias, self.group)  # each rank sees only its tokens' part of the gradient
        if self.skip_bias_add:
            return out, bias
        return out if bias is None else out + bias

    def load_full_weight(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Take this rank's columns of the full ``weight`` [out_features, in_features], and the whole ``bias``."""
        self._load_full([weight], [bias])

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group: Any = None, **options: Any) -> RowParallelLinear:
        """This rank's part of an existing ``nn.Linear``, on its device and in its dtype; it is left alone."""
        return cls._from_one(linear, group, options)
