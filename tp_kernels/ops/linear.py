"""Linear projection with bias, activation and residual in one pass.

    y = activation(x @ weight.T + bias) + residual

Shapes: ``x`` [..., K], ``weight`` [N, K], ``bias`` [N], ``residual`` and the result [..., N]; one dtype.

Native CPU path (few rows of x, no gradient): accumulates in fp32 and rounds once at the end. Each output is a dot
product in a fixed order, so its bits depend on neither the threads, nor the other rows of ``x``, nor the other rows of
``weight``: a column-sharded result equals the same columns of the unsharded one.

On GPUs cuBLAS, or one of our kernels with everything in its epilogue (accumulates in fp32, rounds once) where that was
measured to be faster; see ``_gpu_linear``. There the bits depend on the kernel chosen, hence on the number of rows.

With ``weight_scale`` the weight is a quantised one, activation((x @ weight.T) * scale + bias) + residual, for inference
(see ``_quantized_linear``); CPUs compute that in fp32 throughout.

Where the CPU path wins (2 cores of Zen 4, fp32, one row): it reads the weights at the speed of a plain read, PyTorch at
10-11 GB/s with one thread or two; see ``benchmarks/bench_cpu_ops.py``. Rejected: eight rows of weights side by side
without prefetching in memory order (12 of 26 GB/s); splitting K over threads (bits would depend on how many there are).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.ops._activation import ACTIVATION_CODES, ACTIVATIONS, activate
from tp_kernels.ops._gpu import autocast_dtype, on_gpu, takes_kernels
from tp_kernels.ops._gpu_linear import gpu_linear, linear_with_gradient
from tp_kernels.ops._library import (
    CPU_DTYPES,
    PLAIN_TYPES,
    define_op,
    needs_grad,
    new_like,
    plain_cpu,
    plain_reason,
    watched,
)
from tp_kernels.ops._quantized_linear import operands_for, quantized_linear, refuse_gradients
from tp_kernels.ops.quantize import check_scale, dequantize_weight_reference, kind_of

__all__ = ["ACTIVATIONS", "linear", "linear_reference"]

# Most rows of x for which streaming the weights is at least as fast as PyTorch's GEMM: fp32, bf16, fp16 (dtype codes).
# Measured on Zen 4, one thread: at 16 rows 1.3-1.5 x PyTorch in fp32; 1.0 x in bf16, which the processor multiplies
# natively; 4-5 x in fp16, for which PyTorch has no fast GEMM here.
MAX_NATIVE_ROWS = (16, 8, 64)

_cpu_linear = native.cpu_linear
_num_threads = torch.get_num_threads


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch ``linear``; a quantised weight is brought to x's dtype first."""
    if weight_scale is not None:
        weight = dequantize_weight_reference(weight, weight_scale, x.dtype)
    out = activate(F.linear(x, weight, bias), activation)
    return out if residual is None else out + residual


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    gated: bool = False,
    weight_scale: Tensor | None = None,
) -> None:
    """Raise ValueError for operands that do not fit together."""
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected x [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"expected gate rows above as many up rows, got {weight.shape[0]} rows")
    if weight_scale is not None:
        check_scale(weight, weight_scale)
    elif weight.dtype is not x.dtype and kind_of(weight.dtype) is not None:
        raise ValueError(f"the weight is {weight.dtype}, a quantised one: it comes with its weight_scale")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected a bias [{weight.shape[0]}], got {list(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(f"expected a residual {[*x.shape[:-1], weight.shape[0]]}, got {list(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if tensor is None or tensor.dtype == x.dtype or (name == "weight" and weight_scale is not None):
            continue
        # Autocast brings the operands to one dtype itself.
        if not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} is {tensor.dtype}, x is {x.dtype}")


def native_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int | None, gated: bool
) -> Tensor | None:
    """The native kernel's result, or None if it does not take these operands; callers made sure of ``plain_cpu``.

    Kept to bare comparisons: at 200 calls a token every microsecond here is one per cent of a small model's token.
    """
    dtype = x.dtype
    code = CPU_DTYPES.get(dtype)
    if code is None or weight.dtype is not dtype or activation is None or weight.dim() != 2:
        return None
    rows_w, k = weight.shape
    if k == 0 or x.size(-1) != k or not weight.is_contiguous() or not weight.is_cpu or type(weight) not in PLAIN_TYPES:
        return None
    m = x.numel() // k
    if m > MAX_NATIVE_ROWS[code]:
        return None
    n = rows_w
    if gated:
        if rows_w % 2:
            return None
        n = rows_w // 2
    bias_at = residual_at = 0
    if bias is not None:
        if bias.dtype is not dtype or bias.numel() != rows_w or bias.dim() != 1 or not bias.is_contiguous():
            return None
        if not bias.is_cpu or type(bias) not in PLAIN_TYPES:
            return None
        bias_at = bias.data_ptr()
    out = new_like(x, n)
    if residual is not None:
        if residual.dtype is not dtype or residual.shape != out.shape or not residual.is_cpu:
            return None
        if type(residual) not in PLAIN_TYPES:
            return None
        residual = residual.contiguous()
        residual_at = residual.data_ptr()
    x = x.contiguous()
    _cpu_linear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        bias_at,
        residual_at,
        m,
        n,
        k,
        k,
        k,
        n,
        code,
        activation,
        gated,
        _num_threads(),
    )
    return out


def native_linear_reason(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> str | None:
    """Why ``linear`` or ``swiglu_linear`` would not take the native CPU path; None if it would."""
    if weight_scale is not None:
        return f"{kind_of(weight.dtype)} weights are dequantised to fp32 on the CPU, at every call"
    reason = plain_reason(x, weight, bias, residual)
    if reason is not None:
        return reason
    if type(weight) not in PLAIN_TYPES:
        return f"the weight is a {type(weight).__name__}"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    if weight.shape[1] == 0:
        return "there is nothing to sum over"
    rows, most = x.numel() // weight.shape[1], MAX_NATIVE_ROWS[CPU_DTYPES[x.dtype]]
    if rows > most:
        return f"{rows} rows of x: above {most}, PyTorch's GEMM was measured to be faster"
    if bias is not None and not bias.is_contiguous():
        return "the bias is not contiguous"
    return None


def _linear_impl(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    if weight_scale is not None:
        check_linear(x, weight, bias, residual, activation, False, weight_scale)
        return quantized_linear(x, weight, bias, residual, activation, weight_scale)
    if plain_cpu(x):
        out = native_linear(x, weight, bias, residual, ACTIVATION_CODES.get(activation), False)
        if out is not None:
            return out
    check_linear(x, weight, bias, residual, activation)
    if takes_kernels(x):
        return gpu_linear(x, weight, bias, residual, activation)
    return linear_reference(x, weight, bias, residual, activation)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    check_linear(x, weight, bias, residual, activation, False, weight_scale)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_OP = define_op(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, str? activation=None, *, "
    "Tensor? weight_scale=None) -> Tensor",
    _linear_impl,
    _linear_fake,
)


def _linear_on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    dtype = autocast_dtype(x)
    if dtype is not None:
        if weight.dtype is not dtype:
            # PyTorch keeps the weight that it has cast until the region ends; we would cast it at every call.
            return linear_reference(x, weight, bias, residual, activation)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if residual is not None and residual.dtype is not dtype:
            # A sum is not autocast: the wider dtype of a residual is kept.
            return _linear_on_gpu(x, weight, bias, None, activation) + residual
    grad = needs_grad(x, weight, bias, residual)
    if watched():
        if not grad:
            return _OP(x, weight, bias, residual, activation)
    elif takes_kernels(x):
        if grad:
            return linear_with_gradient(x, weight, bias, residual, activation)
        return gpu_linear(x, weight, bias, residual, activation)
    return linear_reference(x, weight, bias, residual, activation)


def _with_scale(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, scale: Tensor
) -> Tensor:
    check_linear(x, weight, bias, residual, activation, False, scale)
    refuse_gradients(x, weight, bias, residual, scale)
    x, bias, residual, later = operands_for(x, bias, residual)
    if watched():
        out = _OP(x, weight, bias, residual, activation, weight_scale=scale)
    else:
        out = quantized_linear(x, weight, bias, residual, activation, scale)
    return out if later is None else out + later


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias) + residual``; differentiable.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        residual: [..., N], added after the activation.
        activation: None, "silu", "gelu", "gelu_tanh" or "relu".
        weight_scale: fp32 [N], of an int8 or float8_e4m3fn weight as ``quantize_weight`` makes it: what x and a row of
            the weight sum up to, in fp32, is multiplied by the row's scale. No gradient is to be had then.

    Returns:
        [..., N] in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown activation, a quantised weight where
            a gradient is needed.
    """
    if weight_scale is not None:
        return _with_scale(x, weight, bias, residual, activation, weight_scale)
    if watched():
        if not on_gpu(x) and not needs_grad(x, weight, bias, residual):
            return _OP(x, weight, bias, residual, activation)
    elif plain_cpu(x) and not needs_grad(x, weight, bias, residual):
        out = native_linear(x, weight, bias, residual, ACTIVATION_CODES.get(activation), False)
        if out is not None:
            return out
    check_linear(x, weight, bias, residual, activation)
    if on_gpu(x):
        return _linear_on_gpu(x, weight, bias, residual, activation)
    return linear_reference(x, weight, bias, residual, activation)
