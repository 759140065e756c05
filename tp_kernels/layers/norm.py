"""``RMSNorm`` with Hugging Face Llama's rounding: fp32 statistics, cast back, then times the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_kernels import ops
from tp_kernels.comm.functional import copy_to_tensor_parallel
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.layers.base import check_dtype

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, replicated on every rank.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the mean square.
        sequence_group: TPGroup over which the tokens are spread (sequence parallelism); the weight's gradient is then
            summed over its ranks. None when every rank sees all tokens.
        device: as in torch.
        dtype: of the weight.

    Shape:
        [..., hidden_size] -> the same; with ``residual``, a pair of them.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        sequence_group: TPGroup | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size must be a positive int, got {hidden_size!r}")
        check_dtype(dtype)
        self.hidden_size, self.eps, self.sequence_group = hidden_size, eps, sequence_group
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """Normalise ``x``; with ``residual`` return ``(norm(x + residual), x + residual)`` from one pass."""
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"RMSNorm: expected a tensor [..., {self.hidden_size}], got {type(x).__name__}")
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"RMSNorm: expected an input of shape [..., {self.hidden_size}], got {list(x.shape)}")
        if x.device != self.weight.device:
            raise ValueError(f"RMSNorm: expected an input on {self.weight.device}, where the weight is, got {x.device}")
        if self.sequence_group is not None and self.weight.requires_grad and torch.is_grad_enabled():
            return self._of_some_tokens(x, residual)
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps)
        if residual.shape != x.shape:
            raise ValueError(f"RMSNorm: expected a residual of shape {list(x.shape)}, got {list(residual.shape)}")
        if residual.dtype is not x.dtype:  # autocast: a bf16 matmul result meets an fp32 residual stream
            summed = x + residual
            return ops.rms_norm(summed, self.weight, self.eps), summed
        return ops.add_rms_norm(x, residual, self.weight, self.eps)

    def _of_some_tokens(self, x: torch.Tensor, residual: torch.Tensor | None):
        # In fp32, so that the gradient is rounded once, after the sum; the product of two 16-bit values is exact in
        # fp32, hence the result has the same bits.
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        weight = copy_to_tensor_parallel(weight, self.sequence_group)
        summed = x if residual is None else x + residual
        dtype = torch.promote_types(summed.dtype, self.weight.dtype)
        normed = ops.rms_norm(summed, weight, self.eps).to(dtype)
        return normed if residual is None else (normed, summed)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"
