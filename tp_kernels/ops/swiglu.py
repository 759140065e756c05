"""SwiGLU: the gate alone, and fused with the projection that feeds it.

    silu_mul(gate_up)            = silu(gate) * up, with gate, up = gate_up.chunk(2, -1)
    swiglu_linear(x, w_gate_up)  = silu_mul(x @ w_gate_up.T)

Shapes: ``gate_up`` [..., 2 * I]; ``x`` [..., K], ``w_gate_up`` [2 * I, K], gate rows above up rows; results [..., I].
The native CPU path computes everything in fp32 and rounds once; PyTorch rounds after each step. The fused form never
writes the [..., 2 * I] intermediate, and its bits do not depend on threads or on other rows (see ``linear``).

On GPUs ``silu_mul`` and its backward are one pass over memory each (``kernels.silu_mul``), fp32 inside, rounded once.
``swiglu_linear`` is cuBLAS followed by ``silu_mul``, or one fused kernel where that was measured to be faster; with a
gradient to come either also stores ``gate_up``, from which the backward starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tp_kernels._native import native
from tp_kernels.comm.functional import copy_to_tensor_parallel
from tp_kernels.comm.overlap import offers_overlap
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._gpu import (
    GpuInfo,
    autocast_dtype,
    gpu_of,
    kernels_reason,
    on_gpu,
    takes_kernels,
    under_autocast,
)
from tp_kernels.ops._gpu_linear import gpu_swiglu_linear
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
from tp_kernels.ops.linear import check_linear, native_linear
from tp_kernels.ops.quantize import dequantize_weight_reference
from tp_kernels.ops.tuning import Choice, Plan, cached_decision, lookup

__all__ = ["choose_silu_mul", "silu_mul", "silu_mul_reference", "swiglu_linear", "swiglu_linear_reference"]

_SILU = 1  # code of csrc/cpu/kernels.h
_cpu_silu_mul = native.cpu_silu_mul
_num_threads = torch.get_num_threads


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Plain PyTorch ``silu_mul``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_linear_reference(
    x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None, *, weight_scale: Tensor | None = None
) -> Tensor:
    """Plain PyTorch ``swiglu_linear``; a quantised weight is brought to x's dtype first."""
    if weight_scale is not None:
        w_gate_up = dequantize_weight_reference(w_gate_up, weight_scale, x.dtype)
    return silu_mul_reference(F.linear(x, w_gate_up, bias))


def _check_silu_mul(gate_up: Tensor) -> None:
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"expected gate and up side by side, [..., 2 * I], got {list(gate_up.shape)}")


def _native_silu_mul(gate_up: Tensor) -> Tensor | None:
    code = CPU_DTYPES.get(gate_up.dtype)
    if code is None or gate_up.dim() < 1:
        return None
    double = gate_up.size(-1)
    if double % 2 or double == 0:
        return None
    gate_up = gate_up.contiguous()
    out = new_like(gate_up, double // 2)
    _cpu_silu_mul(out.data_ptr(), gate_up.data_ptr(), gate_up.numel() // double, double // 2, code, _num_threads())
    return out


def native_silu_mul_reason(gate_up: Tensor) -> str | None:
    """Why ``silu_mul`` would not take the native CPU path; None if it would."""
    reason = plain_reason(gate_up)
    if reason is None and gate_up.shape[-1] == 0:
        return "the last dimension is empty"
    return reason


@cached_decision
def _plan(op: str, info: GpuInfo, dtype: torch.dtype, m: int, n: int) -> Plan:
    """The path of "silu_mul" or "silu_mul_backward", "triton" or "torch", for ``m`` rows of width ``n``."""
    if dtype not in CPU_DTYPES:
        return Plan("torch", f"{dtype} has no kernel")
    entry = lookup(op, info, dtype, m=m, n=n)
    if entry is None:
        return Plan("triton", f"not measured on {info.name}; one pass over memory instead of PyTorch's several")
    reason = entry.reason()
    if entry.path != "triton":
        return Plan("torch", reason)
    from tp_kernels.ops.kernels.silu_mul import Config

    try:
        return Plan("triton", reason, Config(**entry.config) if entry.config else None)
    except TypeError:
        return Plan("triton", f"{reason}; the table's configuration is of another version: default; tune again")


def _decide(op: str, gate_up: Tensor) -> Plan:
    """The plan for a tensor that kernels may take."""
    double = gate_up.shape[-1]
    return _plan(op, gpu_of(gate_up), gate_up.dtype, gate_up.numel() // double if double else 0, double // 2)


def choose_silu_mul(gate_up: Tensor) -> Choice:
    """Which GPU path ``silu_mul(gate_up)`` takes, "triton" or "torch", and why."""
    reason = kernels_reason(gate_up)
    return _decide("silu_mul", gate_up).choice() if reason is None else Choice("torch", reason)


def gpu_silu_mul(gate_up: Tensor) -> Tensor:
    """``silu_mul`` on a GPU without recording a gradient; ``takes_kernels(gate_up)`` holds."""
    plan = _decide("silu_mul", gate_up)
    if plan.path != "triton":
        return silu_mul_reference(gate_up).contiguous()
    from tp_kernels.ops.kernels.silu_mul import silu_mul_forward

    out = new_like(gate_up, gate_up.shape[-1] // 2)
    silu_mul_forward(out, gate_up, plan.config)
    return out


def silu_mul_gradient(
    grad: Tensor, gate_up: Tensor, with_hidden: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of ``silu_mul`` with respect to ``gate_up`` [..., 2 * I], and on request ``silu_mul(gate_up)`` again.

    Args:
        grad: [..., I].
        gate_up: [..., 2 * I].
        with_hidden: recompute the result, too; it costs one more write, no read.
        out: where to write the gradient; may be ``gate_up`` itself.
    """
    if takes_kernels(gate_up) and type(grad) in PLAIN_TYPES and grad.dtype == gate_up.dtype:
        plan = _decide("silu_mul_backward", gate_up)
        if plan.path == "triton":
            from tp_kernels.ops.kernels.silu_mul import silu_mul_backward

            result = new_like(gate_up, gate_up.shape[-1]) if out is None else out
            hidden = new_like(gate_up, gate_up.shape[-1] // 2) if with_hidden else None
            silu_mul_backward(result, grad, gate_up, hidden, plan.config)
            return result, hidden
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = silu_mul_reference(gate_up).contiguous() if with_hidden else None
    result = torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
    return (result if out is None else out.copy_(result)), hidden


def _silu_mul_impl(gate_up: Tensor) -> Tensor:
    out = _native_silu_mul(gate_up) if plain_cpu(gate_up) else None
    if out is not None:
        return out
    _check_silu_mul(gate_up)
    return gpu_silu_mul(gate_up) if takes_kernels(gate_up) else silu_mul_reference(gate_up)


def _silu_mul_fake(gate_up: Tensor) -> Tensor:
    _check_silu_mul(gate_up)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


_SILU_MUL_OP = define_op("silu_mul(Tensor gate_up) -> Tensor", _silu_mul_impl, _silu_mul_fake)
_SILU_MUL_BACKWARD_OP = define_op(
    "silu_mul_backward(Tensor grad, Tensor gate_up) -> Tensor",
    lambda grad, gate_up: silu_mul_gradient(grad, gate_up)[0],
    lambda grad, gate_up: gate_up.new_empty(gate_up.shape),
)


def _gate_up_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    return _SILU_MUL_BACKWARD_OP(grad, gate_up) if watched() else silu_mul_gradient(grad, gate_up)[0]


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _SILU_MUL_OP(gate_up) if watched() else gpu_silu_mul(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _gate_up_gradient(grad, *ctx.saved_tensors)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; differentiable.

    Args:
        gate_up: [..., 2 * I], gate and up side by side.

    Returns:
        [..., I].

    Raises:
        ValueError: an odd last dimension.
    """
    if watched():
        if not needs_grad(gate_up):
            return _SILU_MUL_OP(gate_up)
    elif plain_cpu(gate_up) and not needs_grad(gate_up):
        out = _native_silu_mul(gate_up)
        if out is not None:
            return out
    _check_silu_mul(gate_up)
    if on_gpu(gate_up):
        if watched():
            return _SiluMul.apply(gate_up)
        if takes_kernels(gate_up):
            return _SiluMul.apply(gate_up) if needs_grad(gate_up) else gpu_silu_mul(gate_up)
    return silu_mul_reference(gate_up)


def _swiglu_linear_impl(
    x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None, *, weight_scale: Tensor | None = None
) -> Tensor:
    if weight_scale is not None:
        check_linear(x, w_gate_up, bias, None, None, True, weight_scale)
        return quantized_linear(x, w_gate_up, bias, None, None, weight_scale, True)
    if plain_cpu(x):
        out = native_linear(x, w_gate_up, bias, None, _SILU, True)
        if out is not None:
            return out
    check_linear(x, w_gate_up, bias, None, None, True)
    if takes_kernels(x):
        return gpu_swiglu_linear(x, w_gate_up, bias, False)[0]
    return _silu_mul_impl(F.linear(x, w_gate_up, bias))


def _swiglu_linear_fake(
    x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None, *, weight_scale: Tensor | None = None
) -> Tensor:
    check_linear(x, w_gate_up, bias, None, None, True, weight_scale)
    return x.new_empty((*x.shape[:-1], w_gate_up.shape[0] // 2))


_SWIGLU_OP = define_op(
    "swiglu_linear(Tensor x, Tensor w_gate_up, Tensor? bias=None, *, Tensor? weight_scale=None) -> Tensor",
    _swiglu_linear_impl,
    _swiglu_linear_fake,
)


def _forward_impl(x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_linear(x, w_gate_up, bias, None, None, True)
    if takes_kernels(x):
        return gpu_swiglu_linear(x, w_gate_up, bias, True)
    gate_up = F.linear(x, w_gate_up, bias)
    return _silu_mul_impl(gate_up), gate_up


def _forward_fake(x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _swiglu_linear_fake(x, w_gate_up, bias), x.new_empty((*x.shape[:-1], w_gate_up.shape[0]))


_FORWARD_OP = define_op(
    "swiglu_linear_forward(Tensor x, Tensor w_gate_up, Tensor? bias=None) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)


def swiglu_forward(
    x: Tensor, w_gate_up: Tensor, bias: Tensor | None, save_gate_up: bool
) -> tuple[Tensor, Tensor | None]:
    """(result, ``gate_up`` or None) on GPUs, for autograd functions: through an op where something watches."""
    if not watched():
        return gpu_swiglu_linear(x, w_gate_up, bias, save_gate_up)
    return _FORWARD_OP(x, w_gate_up, bias) if save_gate_up else (_SWIGLU_OP(x, w_gate_up, bias), None)


def linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], group: TPGroup | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x @ weight.T + bias`` with respect to x, weight and bias, where wanted.

    With ``group`` that of ``x`` is summed over its ranks, while the others are computed.
    """
    rows = as_rows(grad)
    grad_x = (rows @ weight).view(x.shape) if wanted[0] else None
    summed = None
    if group is not None and grad_x is not None:
        summed = group.communicator.all_reduce_async(grad_x, out=grad_x)
    try:
        grad_weight = rows.t() @ as_rows(x) if wanted[1] else None
        grad_bias = rows.sum(0) if wanted[2] else None
    finally:
        if summed is not None:
            summed.wait()
    return grad_x, grad_weight, grad_bias


def shared_input(x: Tensor, weights: Sequence[Tensor], group: TPGroup) -> tuple[Tensor, TPGroup | None]:
    """For an op whose input all ranks of ``group`` share: the input, and the group if the op's backward shall overlap.

    Elsewhere the gradient is summed after the op's backward, by ``copy_to_tensor_parallel``.
    """
    if group.world_size == 1 or not needs_grad(x):
        return x, None
    plain = not watched() and autocast_dtype(x) is None and all(type(weight) in PLAIN_TYPES for weight in weights)
    if plain and offers_overlap(group) and takes_kernels(x):
        return x, group
    return copy_to_tensor_parallel(x, group), None


def as_rows(x: Tensor) -> Tensor:
    """[..., W] as [M, W]; empty ones, too."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_gate_up: Tensor, bias: Tensor | None, group: TPGroup | None = None) -> Tensor:
        out, gate_up = swiglu_forward(x, w_gate_up, bias, True)
        ctx.save_for_backward(x, w_gate_up, gate_up)
        ctx.group = group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_gate_up, gate_up = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grads = linear_gradients(_gate_up_gradient(grad, gate_up), x, w_gate_up, wanted, ctx.group)
        return (*grads, None)


def _swiglu_linear_gpu(x: Tensor, w_gate_up: Tensor, bias: Tensor | None, group: TPGroup | None) -> Tensor:
    x, w_gate_up, bias = under_autocast(x, w_gate_up, bias)
    if watched():
        if needs_grad(x, w_gate_up, bias):
            return _SwigluLinear.apply(x, w_gate_up, bias)
        return _SWIGLU_OP(x, w_gate_up, bias)
    if not takes_kernels(x) or type(w_gate_up) not in PLAIN_TYPES:
        return silu_mul(F.linear(x, w_gate_up, bias))
    if needs_grad(x, w_gate_up, bias):
        return _SwigluLinear.apply(x, w_gate_up, bias, group)
    return gpu_swiglu_linear(x, w_gate_up, bias, False)[0]


def _with_scale(x: Tensor, w_gate_up: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    check_linear(x, w_gate_up, bias, None, None, True, scale)
    refuse_gradients(x, w_gate_up, bias, scale)
    x, bias, _, _ = operands_for(x, bias)
    if watched():
        return _SWIGLU_OP(x, w_gate_up, bias, weight_scale=scale)
    return quantized_linear(x, w_gate_up, bias, None, None, scale, True)


def swiglu_linear(
    x: Tensor,
    w_gate_up: Tensor,
    bias: Tensor | None = None,
    *,
    group: TPGroup | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``silu(x @ gate.T + b_gate) * (x @ up.T + b_up)``; differentiable.

    Args:
        x: [..., K].
        w_gate_up: [2 * I, K], gate rows above up rows.
        bias: [2 * I].
        group: ranks that share ``x``, each with other rows of the weight: its gradient is summed over them.
        weight_scale: fp32 [2 * I], of an int8 or float8_e4m3fn weight, as for ``linear``.

    Returns:
        [..., I] in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a quantised weight where a gradient is needed.
    """
    if weight_scale is not None:
        return _with_scale(x, w_gate_up, bias, weight_scale)
    if group is not None:
        x, group = shared_input(x, [w_gate_up], group)
    if watched():
        if not on_gpu(x) and not needs_grad(x, w_gate_up, bias):
            return _SWIGLU_OP(x, w_gate_up, bias)
    elif plain_cpu(x) and not needs_grad(x, w_gate_up, bias):
        out = native_linear(x, w_gate_up, bias, None, _SILU, True)
        if out is not None:
            return out
    check_linear(x, w_gate_up, bias, None, None, True)
    if on_gpu(x):
        return _swiglu_linear_gpu(x, w_gate_up, bias, group)
    return silu_mul(F.linear(x, w_gate_up, bias))
