"""SwiGLU: the gate alone, and fused with the projection that feeds it.

    silu_mul(gate_up)            = silu(gate) * up, with gate, up = gate_up.chunk(2, -1)
    swiglu_linear(x, w_gate_up)  = silu_mul(x @ w_gate_up.T)

Shapes: ``gate_up`` [..., 2 * I]; ``x`` [..., K], ``w_gate_up`` [2 * I, K], gate rows above up rows; results [..., I].
The native CPU path computes everything in fp32 and rounds once; PyTorch rounds after each step. The fused form never
writes the [..., 2 * I] intermediate, and its bits do not depend on threads or on other rows (see ``linear``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.ops._library import (
    CPU_DTYPES,
    define_op,
    needs_grad,
    new_like,
    plain_cpu,
    plain_reason,
    watched,
)
from tp_kernels.ops.linear import check_linear, native_linear

__all__ = ["silu_mul", "silu_mul_reference", "swiglu_linear", "swiglu_linear_reference"]

_SILU = 1  # code of csrc/cpu/kernels.h
_cpu_silu_mul = native.cpu_silu_mul
_num_threads = torch.get_num_threads


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Plain PyTorch ``silu_mul``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_linear_reference(x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch ``swiglu_linear``."""
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


def _silu_mul_impl(gate_up: Tensor) -> Tensor:
    out = _native_silu_mul(gate_up) if plain_cpu(gate_up) else None
    if out is not None:
        return out
    _check_silu_mul(gate_up)
    return silu_mul_reference(gate_up)


def _silu_mul_fake(gate_up: Tensor) -> Tensor:
    _check_silu_mul(gate_up)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


_SILU_MUL_OP = define_op("silu_mul(Tensor gate_up) -> Tensor", _silu_mul_impl, _silu_mul_fake)


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
    return silu_mul_reference(gate_up)


def _swiglu_linear_impl(x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    if plain_cpu(x):
        out = native_linear(x, w_gate_up, bias, None, _SILU, True)
        if out is not None:
            return out
    check_linear(x, w_gate_up, bias, None, None, True)
    return _silu_mul_impl(F.linear(x, w_gate_up, bias))


def _swiglu_linear_fake(x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    check_linear(x, w_gate_up, bias, None, None, True)
    return x.new_empty((*x.shape[:-1], w_gate_up.shape[0] // 2))


_SWIGLU_OP = define_op(
    "swiglu_linear(Tensor x, Tensor w_gate_up, Tensor? bias=None) -> Tensor", _swiglu_linear_impl, _swiglu_linear_fake
)


def swiglu_linear(x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    """``silu(x @ gate.T + b_gate) * (x @ up.T + b_up)``; differentiable.

    Args:
        x: [..., K].
        w_gate_up: [2 * I, K], gate rows above up rows.
        bias: [2 * I].

    Returns:
        [..., I] in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if watched():
        if not needs_grad(x, w_gate_up, bias):
            return _SWIGLU_OP(x, w_gate_up, bias)
    elif plain_cpu(x) and not needs_grad(x, w_gate_up, bias):
        out = native_linear(x, w_gate_up, bias, None, _SILU, True)
        if out is not None:
            return out
    check_linear(x, w_gate_up, bias, None, None, True)
    return silu_mul(F.linear(x, w_gate_up, bias))
