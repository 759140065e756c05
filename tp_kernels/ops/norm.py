"""RMS normalisation, alone and fused with the residual addition.

    rms_norm(x, weight)     = weight * (x.float() * rsqrt(x.float().pow(2).mean(-1) + eps)).to(x.dtype)
    add_rms_norm(x, r, w)   = rms_norm(x + r, w), x + r

Shapes: ``x``, ``residual`` [..., H]; ``weight`` [H]. Numerics: those of Hugging Face's LlamaRMSNorm on every path: the
sum is rounded to the dtype first, statistics are fp32, the normalised value is rounded to the dtype before it meets the
weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.ops._library import CPU_DTYPES, PLAIN_TYPES, define_op, needs_grad, plain_cpu, plain_reason, watched

__all__ = ["add_rms_norm", "add_rms_norm_reference", "rms_norm", "rms_norm_reference"]

_cpu_rms_norm = native.cpu_rms_norm
_num_threads = torch.get_num_threads
_empty_like = torch.empty_like


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain PyTorch ``rms_norm``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Plain PyTorch ``add_rms_norm``."""
    summed = x + residual
    return rms_norm_reference(summed, weight, eps), summed


def _check(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"expected a weight of x's last dimension {list(x.shape[-1:])}, got {list(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"expected a residual {list(x.shape)} {x.dtype}, got {list(residual.shape)} {residual.dtype}")


def _native_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None] | None:
    """The native kernel's (normed, sum), or None if it does not take these operands."""
    dtype = x.dtype
    code = CPU_DTYPES.get(dtype)
    if code is None or weight.dtype is not dtype or weight.dim() != 1 or x.dim() < 1:
        return None
    if type(weight) not in PLAIN_TYPES or (residual is not None and type(residual) not in PLAIN_TYPES):
        return None
    width = x.size(-1)
    if width == 0 or weight.numel() != width or not weight.is_contiguous() or not weight.is_cpu:
        return None
    x = x.contiguous()
    out = _empty_like(x)
    if residual is None:
        _cpu_rms_norm(
            out.data_ptr(), 0, x.data_ptr(), 0, weight.data_ptr(), x.numel() // width, width, eps, code, _num_threads()
        )
        return out, None
    if residual.dtype is not dtype or residual.shape != x.shape or not residual.is_cpu:
        return None
    residual = residual.contiguous()
    summed = _empty_like(x)
    _cpu_rms_norm(
        out.data_ptr(),
        summed.data_ptr(),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        x.numel() // width,
        width,
        eps,
        code,
        _num_threads(),
    )
    return out, summed


def native_norm_reason(x: Tensor, *others: Tensor) -> str | None:
    """Why ``rms_norm(x, weight)`` or ``add_rms_norm(x, residual, weight)`` would not take the native CPU path."""
    tensors = [t for t in others if isinstance(t, Tensor)]
    reason = plain_reason(x, *tensors)
    if reason is not None:
        return reason
    if any(type(t) not in PLAIN_TYPES for t in tensors):
        return "an operand is a tensor subclass"
    if any(t.dtype != x.dtype for t in tensors):
        return "the dtypes differ"
    if x.shape[-1] == 0:
        return "the last dimension is empty"
    if tensors and not tensors[-1].is_contiguous():
        return "the weight is not contiguous"
    return None


def _rms_norm_impl(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    if plain_cpu(x):
        result = _native_norm(x, None, weight, eps)
        if result is not None:
            return result[0]
    _check(x, None, weight)
    return rms_norm_reference(x, weight, eps)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    _check(x, None, weight)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


def _add_rms_norm_impl(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    if plain_cpu(x):
        result = _native_norm(x, residual, weight, eps)
        if result is not None:
            return result
    _check(x, residual, weight)
    return add_rms_norm_reference(x, residual, weight, eps)


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)), x.new_empty(x.shape)


_RMS_NORM_OP = define_op("rms_norm(Tensor x, Tensor weight, float eps=1e-6) -> Tensor", _rms_norm_impl, _rms_norm_fake)
_ADD_RMS_NORM_OP = define_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps=1e-6) -> (Tensor, Tensor)",
    _add_rms_norm_impl,
    _add_rms_norm_fake,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS-normalise the last dimension and scale it; differentiable.

    Args:
        x: [..., H].
        weight: [H].
        eps: added to the mean square.

    Returns:
        [..., H] in ``x.dtype``.

    Raises:
        ValueError: ``weight`` is not one row of ``x``'s last dimension.
    """
    if watched():
        if not needs_grad(x, weight):
            return _RMS_NORM_OP(x, weight, eps)
    elif plain_cpu(x) and not needs_grad(x, weight):
        result = _native_norm(x, None, weight, eps)
        if result is not None:
            return result[0]
    _check(x, None, weight)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add the residual, then RMS-normalise: one pass instead of three; differentiable.

    Args:
        x: [..., H].
        residual: [..., H].
        weight: [H].
        eps: added to the mean square.

    Returns:
        ``(normed, x + residual)``, both [..., H]; the inputs are left alone.

    Raises:
        ValueError: shapes that do not match.
    """
    if watched():
        if not needs_grad(x, residual, weight):
            return _ADD_RMS_NORM_OP(x, residual, weight, eps)
    elif plain_cpu(x) and not needs_grad(x, residual, weight):
        result = _native_norm(x, residual, weight, eps)
        if result is not None:
            return result
    _check(x, residual, weight)
    return add_rms_norm_reference(x, residual, weight, eps)
