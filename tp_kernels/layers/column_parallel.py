"""Linear layers with their outputs spread over the ranks; see ``layers.linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_kernels import ops
from tp_kernels.comm.functional import (
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    gather_from_tensor_parallel,
)
from tp_kernels.comm.overlap import check_offered, offers_overlap
from tp_kernels.layers.base import TensorParallelLayer, check_input, check_linears
from tp_kernels.layers.linear_base import SEQUENCE_DIM, ParallelLinear
from tp_kernels.layers.partition import checked_partition, ranges_from_sizes
from tp_kernels.ops.column_parallel_linear import choose_column_parallel_linear

__all__ = ["ColumnParallelLinear", "MergedColumnParallelLinear"]

_OVERLAP_MODES = ("auto", "none", "chunked")


class ColumnParallelLinear(ParallelLinear):
    """Linear layer with its outputs spread over the ranks.

    Args:
        in_features: size of the input's last dimension, whole on every rank.
        out_features: full number of outputs; at least the number of ranks.
        bias: learn an additive bias (sharded like the outputs).
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        gather_output: return all outputs on every rank instead of this rank's.
        sequence_parallel: the input is this rank's part of the sequence (dimension -2); the parts may differ in length.
        overlap: with ``sequence_parallel``, how gathering the tokens may overlap the matmul: "auto" does what was
            measured to be faster with these sizes, ranks and GPUs, "none" gathers first, "chunked" multiplies one piece
            of every rank's tokens while the next arrives. The latter is offered by NCCL communicators, not on the CPU.
            The backward's communication is overlapped wherever the communicator can, but for "none".
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
        ValueError: sizes that cannot be spread, an unknown overlap, "chunked" without ``sequence_parallel``; in
            ``forward``, an input of another width, dtype or device, or an overlap that the input's device and the group
            do not offer, or an explicit one for a quantised weight.
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
        overlap: str = "auto",
        skip_bias_add: bool = False,
        partition: Sequence[int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        sizes = checked_partition(out_features, partition, self.tp_size, "out_features")
        pieces = [("", out_features, ranges_from_sizes(sizes))]
        self._build(in_features, pieces, bias, gather_output, sequence_parallel, skip_bias_add, device, dtype, overlap)

    def _build(
        self,
        in_features: int,
        pieces: Sequence[tuple[str, int, Sequence[range]]],
        bias: bool,
        gather_output: bool,
        sequence_parallel: bool,
        skip_bias_add: bool,
        device: Any,
        dtype: torch.dtype | None,
        overlap: str = "auto",
    ) -> None:
        """``pieces``: (stock module name, its full outputs, every rank's range of them), stacked locally."""
        if overlap not in _OVERLAP_MODES:
            raise ValueError(f"overlap must be one of {', '.join(_OVERLAP_MODES)}, got {overlap!r}")
        if overlap == "chunked" and not sequence_parallel:
            raise ValueError('overlap="chunked" gathers tokens in pieces: expected sequence_parallel=True beside it')
        if not isinstance(in_features, int) or isinstance(in_features, bool) or in_features < 1:
            raise ValueError(f"in_features must be a positive int, got {in_features!r}")
        self.in_features = in_features
        self.out_features = sum(total for _, total, _ in pieces)
        self.partition = [sum(len(ranges[rank]) for *_, ranges in pieces) for rank in range(self.tp_size)]
        self.out_features_local = self.partition[self.tp_rank]
        self.gather_output = gather_output
        self.sequence_parallel, self.overlap = sequence_parallel, overlap
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
            return gather_from_sequence_parallel(x, self.group, dim=SEQUENCE_DIM, sizes=sequence_sizes)
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
        """``ops.linear`` of ``parallel_input(x, sequence_sizes)``; forward and backward overlap as ``overlap`` says."""
        if self.overlap == "chunked":
            self._check_overlap()
            check_offered("chunked", self.group, x.device)
        if self.tp_size == 1 or self.weight_scale is not None:
            return self._linear(self.parallel_input(x, sequence_sizes), weight, bias)
        if self.sequence_parallel or (torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad):
            check_input(x, self.in_features, weight, self)
            sizes = self._sequence_sizes(x, sequence_sizes) if self.sequence_parallel else None
            return ops.column_parallel_linear(
                x,
                weight,
                bias,
                group=self.group,
                sequence_sizes=sizes,
                overlap=self.overlap,
                out_features=self.out_features,
            )
        return self._linear(self.parallel_input(x), weight, bias)

    def gathers_beside(self, x: torch.Tensor, sequence_sizes: Sequence[int]) -> bool:
        """Whether ``project`` multiplies some tokens while others are gathered; the same on all ranks.

        Args:
            x: this rank's tokens.
            sequence_sizes: every rank's number of tokens.
        """
        if self.overlap != "auto" or self.weight_scale is not None:
            return self.overlap == "chunked"
        if not offers_overlap(self.group):
            return False
        how = {"group": self.group, "sequence_sizes": sequence_sizes, "out_features": self.out_features}
        return choose_column_parallel_linear(x, self.weight, **how).path != "none"

    def _sequence_sizes(self, x: torch.Tensor, sizes: Sequence[int] | None) -> Sequence[int]:
        if x.dim() < 2:
            raise ValueError(f"expected an input [..., sequence, {self.in_features}], got {list(x.shape)}")
        return self._exchange_lengths(x) if sizes is None else sizes

    def _exchange_lengths(self, x: torch.Tensor) -> list[int]:
        """Every rank's sequence length. Eight bytes a rank; a rank cannot infer the others' from its own."""
        mine = torch.tensor([x.shape[SEQUENCE_DIM]], dtype=torch.int64, device=x.device)
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
        group, gather_output, sequence_parallel, overlap, skip_bias_add, device, dtype: as in ``ColumnParallelLinear``.
            A gathered output holds the first layer's outputs, then the second's, and so on.

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
        overlap: str = "auto",
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
        self._build(in_features, pieces, bias, gather_output, sequence_parallel, skip_bias_add, device, dtype, overlap)

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
