"""Linear layers with their inputs spread over the ranks; see ``layers.linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_kernels import ops
from tp_kernels.checkpoint.sharding import shard_range_sizes
from tp_kernels.comm.functional import (
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    scatter_to_tensor_parallel,
)
from tp_kernels.comm.overlap import check_offered, may_overlap, offers_overlap
from tp_kernels.layers.base import check_input
from tp_kernels.layers.linear_base import SEQUENCE_DIM, ParallelLinear
from tp_kernels.layers.partition import checked_partition, ranges_from_sizes
from tp_kernels.ops._gpu import autocast_dtype, takes_kernels
from tp_kernels.ops._gpu_linear import gpu_linear
from tp_kernels.ops._library import PLAIN_TYPES, needs_grad, watched
from tp_kernels.ops._quantized_linear import quantized_linear
from tp_kernels.ops.linear_all_reduce import choose_linear_all_reduce

__all__ = ["RowParallelLinear"]

_OVERLAP_MODES = ("auto", "none", "chunked", "fused")


class RowParallelLinear(ParallelLinear):
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
        overlap: how the sum over the ranks may overlap the matmul. On the CPU there is nothing to overlap with: every
            core computes.

            - "auto": what was measured to be faster with these sizes, ranks and GPUs (``tp-kernels bench overlap
              --tune``); without a measurement "none".
            - "none": the matmul, then the sum.
            - "chunked": the rows in pieces, one summed on the communicator's stream while the next is multiplied.
              Offered by NCCL communicators. With ``sequence_parallel`` too.
            - "fused": matmul, sum and what follows in one kernel over peer memory. Offered by symmetric-memory
              communicators (see their ``overlap_modes``), for more rows than a tile has: few go without. Not with
              ``sequence_parallel``.
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
        if overlap == "fused" and sequence_parallel:
            raise ValueError(
                'overlap="fused" leaves whole sums: expected "auto", "none" or "chunked" beside sequence_parallel'
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
        if self.input_is_parallel:
            check_input(x, self.in_features_local, weight, self)
        else:
            x = self._own_part(x)
        overlapped = self.reduce_results and may_overlap(self.group, self.overlap, x.shape[:-1].numel())
        if not overlapped or self.weight_scale is not None or (self.sequence_parallel and x.dim() < 2):
            return self.reduce_partial(self._linear(x, weight))
        how = {"group": self.group, "overlap": self.overlap, "in_features": self.in_features}
        if self.sequence_parallel:
            return self._with_bias(ops.linear_reduce_scatter(x, weight, sizes=self._sequence_sizes(x), **how))
        out = ops.linear_all_reduce(x, weight, None if self.skip_bias_add else self.bias, **how)
        return (out, self.bias) if self.skip_bias_add else out

    def _own_part(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's features of the whole input, on one of several ranks."""
        check_input(x, self.in_features, self.weight, self)
        return scatter_to_tensor_parallel(x, self.group, dim=-1, sizes=self.partition)

    def _sequence_sizes(self, out: torch.Tensor) -> list[int]:
        if out.dim() < 2:
            raise ValueError(f"expected an input [..., sequence, features], got one that gives {list(out.shape)}")
        return shard_range_sizes(out.shape[SEQUENCE_DIM], self.tp_size)

    # With the residual and the norm that follow ----------------------------------------------------------------------

    def norm_path(self, x: torch.Tensor) -> str:
        """How ``forward_norm`` goes about an input with as many rows as ``x``; the same on all ranks.

        What was asked for comes first, then what was measured to be faster, then what the communicator offers:

        - "op": one call of ``ops.linear_all_reduce`` or ``ops.linear_reduce_scatter`` does it all. For an explicit
          overlap; for "auto" where a measurement says so, or where nothing is lost by leaving the choice to the op.
        - "kernel": the matmul, then the communicator's kernel for everything else (``fused_norm``).
        - "apart": the layer, then the norm.

        Args:
            x: any tensor in the dtype and on the device of the layer's input. A collective when it is the first on a
                GPU: the ranks compare their tables.
        """
        group, overlap, scaled = self.group, self.overlap, self.weight_scale is not None
        asked = overlap != "auto" and overlap != "none"
        if asked and (scaled or not offers_overlap(group, overlap)):
            return "apart"  # the layer says what is wrong
        communicator = group.communicator
        if self.sequence_parallel:  # all ranks' tokens are not known yet, and there is no kernel to choose from
            return "op" if overlap != "none" and not scaled and communicator.overlap_modes else "apart"
        kernel = getattr(communicator, "fused_norm", False) and communicator.fuses_norm(self.out_features, x.dtype)
        overlaps = not scaled and may_overlap(group, overlap, x.shape[:-1].numel())
        if overlaps and (asked or not kernel or self.sum_path(x) != "none"):
            return "op"
        return "kernel" if kernel else "apart"

    def sum_path(self, x: torch.Tensor) -> str:
        """How the sum over the ranks of an input with as many rows as ``x`` overlaps the matmul; the same on all ranks.

        Args:
            x: as for ``norm_path``. A collective when it is the first on a GPU.

        Returns:
            "chunked", "fused" or "none"; "none" too for the parts of a sequence, whose sums are scattered.

        Raises:
            ValueError: what was asked for cannot be had.
        """
        group, overlap = self.group, self.overlap
        if self.weight_scale is not None or self.sequence_parallel or not self.reduce_results:
            return "none"
        if not may_overlap(group, overlap, x.shape[:-1].numel()):
            return "none"
        how = {"group": group, "overlap": overlap, "in_features": self.in_features}
        return choose_linear_all_reduce(x, self.weight, **how).path

    def forward_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        norm: nn.Module,
        *,
        path: str | None = None,
        gather_sum: bool = True,
        shared: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``norm(self(x), residual)``: projection, sum over the ranks, bias, residual and norm in one call.

        The bits are those of the separate calls on every communicator that adds in rank order; see
        ``ops.linear_all_reduce`` and ``ops.all_reduce_add_rms_norm``. With gradients, under autocast, in traced code
        and with one rank it is the separate calls.

        Args:
            x: as for ``forward``.
            residual: [..., out_features] in the dtype of ``x``; with ``sequence_parallel`` this rank's part.
            norm: an ``RMSNorm``, or what has its ``weight``, ``eps`` and ``forward``.
            path: ``norm_path``'s answer for this call if the caller has it already, and made sure that nothing stands
                in the way of "op" and "kernel"; None finds out.
            gather_sum: see ``ops.all_reduce_add_rms_norm``.
            shared: the normed result will have been consumed before the group's next call: the kernel may leave it in
                memory that the ranks share.

        Returns:
            ``(normed, sum with the residual)``.

        Raises:
            ValueError: a layer with ``skip_bias_add`` or without ``reduce_results``; otherwise as ``forward``.
        """
        if self.skip_bias_add or not self.reduce_results:
            raise ValueError("forward_norm takes the whole sum: expected reduce_results=True and skip_bias_add=False")
        if path is None:
            path = self.norm_path(x) if self._joins_norm(x, residual, norm) else "apart"
        if path == "apart":
            return norm(self(x), residual)
        weight, bias, group = self.weight, self.bias, self.group
        if not self.input_is_parallel:
            x = self._own_part(x)
        if path == "kernel":
            partial, out = self.partial_sum(x), None
            if shared:
                out = group.communicator.get_buffer(partial.shape, partial.dtype, use="output")
            return ops.all_reduce_add_rms_norm(
                partial, residual, norm.weight, norm.eps, group, bias, gather_sum=gather_sum, out=out
            )
        check_input(x, self.in_features_local, weight, self)
        if self.overlap != "auto":
            check_offered(self.overlap, group, x.device)
        how = {"group": group, "overlap": self.overlap, "in_features": self.in_features}
        how |= {"residual": residual, "norm_weight": norm.weight, "eps": norm.eps}
        if self.sequence_parallel:
            return ops.linear_reduce_scatter(x, weight, bias, sizes=self._sequence_sizes(x), **how)
        return ops.linear_all_reduce(x, weight, bias, **how)

    def _joins_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: nn.Module) -> bool:
        """Whether ``forward_norm`` may take more than the separate calls."""
        return (
            self.tp_size > 1
            and type(x) in PLAIN_TYPES
            and type(self.weight) in PLAIN_TYPES
            and x.dtype is residual.dtype is self.input_dtype
            and not watched()
            and not needs_grad(x, residual, self.weight, self.bias, norm.weight)
            and autocast_dtype(x) is None
        )

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
            sizes = self._sequence_sizes(out)
            out = reduce_scatter_to_sequence_parallel(out, self.group, dim=SEQUENCE_DIM, sizes=sizes)
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
