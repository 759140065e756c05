"""Row-parallel projection and all-reduce in one kernel over peer memory: ``SymmetricMemoryCommunicator``'s part of it.

The kernel is tp_kernels/ops/kernels/peer_linear_kernel.py, which says how tiles travel while others are multiplied. It
is written in Triton, so it is there where all ranks have Triton, whatever the native core was built with.
"""

from __future__ import annotations

from collections import Counter

import torch

from tp_kernels.comm.communicator import Communicator
from tp_kernels.comm.symmetric_calls import KERNEL_DTYPES, KernelCalls
from tp_kernels.comm.symmetric_sizes import MAX_ROW_PACKS, PACK_BYTES, Layout, linear_rows, row_block, row_packs

__all__ = ["FusedLinear"]


class FusedLinear(Communicator):
    """What ``overlap="fused"`` asks of a communicator; ``overlap_modes`` has "fused" where it may be called."""

    counters: Counter[str]
    _calls: KernelCalls
    _layout: Layout

    def linear_reason(self, rows: int, width: int, dtype: torch.dtype) -> str | None:
        """Why ``linear_all_reduce`` does not take a result [rows, width] of ``dtype``; None if it does.

        A function of what all ranks share.
        """
        if dtype not in KERNEL_DTYPES:
            return f"{dtype} is none of float32, bfloat16 and float16"
        half = self._layout.half_bytes
        if linear_rows(rows, width, dtype.itemsize, self.world_size, half) < 1:
            block = row_block(rows, dtype.itemsize, self.world_size)
            return (
                f"{block * self.world_size} rows of {width} columns, of which each of {self.world_size} ranks works on "
                f"{block}, do not fit into the {half} bytes where partial sums are staged (max_bytes)"
            )
        return None

    def linear_all_reduce(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
        eps: float = 1e-6,
        timeout: float | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``all_reduce(x @ weight.T) + bias + residual``, tile by tile in one kernel; no gradient is recorded.

        The bits are those of our Triton matmul with the same tile, then ``all_reduce``, then separate additions, each
        rounded, and ``all_reduce_add_rms_norm``'s norm. Rows that do not fit at once go by several launches.

        Args:
            x: [..., K]: this rank's features, as many rows on every rank.
            weight: [N, K]: this rank's columns.
            bias: [N], added once.
            residual: [..., N], equal on all ranks.
            norm_weight: [N], with ``residual``: also the RMSNorm of the sum.
            eps: added to the mean square.
            timeout: deadline of a wait in seconds. All operands have one dtype.

        Returns:
            [..., N]; with ``norm_weight`` ``(normed, sum)``.

        Raises:
            ValueError: operands that do not fit together; see ``linear_reason``.
        """
        width, shape = weight.shape[0], (*x.shape[:-1], weight.shape[0])
        facts = {"bias": bias is not None, "residual": residual is not None, "norm": norm_weight is not None}
        # Ranks may have different numbers of features.
        self._calls.begin("linear_all_reduce", x, timeout, shape=list(shape), eps=eps, **facts)
        if "fused" not in self.overlap_modes:
            raise ValueError("linear_all_reduce: not all ranks have Triton, in which its kernel is written")
        rows = x.shape[:-1].numel()
        reason = self.linear_reason(rows, width, x.dtype)
        if reason is not None:
            raise ValueError(f"linear_all_reduce: {reason}")
        if norm_weight is not None and (residual is None or row_packs(width, x.element_size()) > MAX_ROW_PACKS):
            widest = MAX_ROW_PACKS * PACK_BYTES // x.element_size()
            raise ValueError(f"linear_all_reduce: a norm needs a residual and at most {widest} columns, got {width}")
        for name, tensor, expected in (
            ("weight", weight, (width, x.shape[-1])),
            ("bias", bias, (width,)),
            ("residual", residual, shape),
            ("norm_weight", norm_weight, (width,)),
        ):
            if tensor is None or (tensor.shape, tensor.dtype, tensor.device) == (expected, x.dtype, x.device):
                continue
            raise ValueError(
                f"linear_all_reduce: expected {name} {list(expected)} {x.dtype} on {x.device}, got "
                f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        out = x.new_empty(rows, width)
        normed = None if norm_weight is None else torch.empty_like(out)
        matrix, weight = _dense(x.detach().reshape(rows, x.shape[-1])), _dense(weight.detach())
        before = None if residual is None else residual.detach().reshape(rows, width).contiguous()
        vectors = [None if v is None else v.detach().contiguous() for v in (bias, norm_weight)]
        self.counters["linear"] += 1
        size = x.element_size()
        step = linear_rows(rows, width, size, self.world_size, self._layout.half_bytes)
        block = row_block(rows, size, self.world_size)
        for start in range(0, rows, step):
            x_rows, old, total, norm = (
                None if t is None else t[start : start + step] for t in (matrix, before, out, normed)
            )
            tensors = (total, norm, x_rows, weight, vectors[0], old, vectors[1])
            self._calls.triton_linear(tensors, eps, block, timeout)
        return out.view(shape) if normed is None else (normed.view(shape), out.view(shape))


def _dense(x: torch.Tensor) -> torch.Tensor:
    """A matrix whose neighbours in a row are neighbours in memory."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
