"""The gated feed-forward block as one differentiable op.

    swiglu_mlp(x, w_gate_up, w_down) = swiglu_linear(x, w_gate_up) @ w_down.T

Shapes: ``x`` [..., K]; ``w_gate_up`` [2 * I, K], gate rows above up rows; ``w_down`` [N, I]; result [..., N]. There is
no bias behind ``w_down``: with tensor parallelism the result is a partial sum, and the bias comes after the all-reduce.

The forward is that of the ops it is made of, bit for bit. On GPUs the backward is its own: ``silu(gate) * up`` is never
saved, but recomputed where the gradient passes the gate anyway, either in the elementwise backward kernel ("torch":
cuBLAS, then ``silu_mul``'s backward) or in the epilogue of the matmul with ``w_down`` ("triton":
``kernels.swiglu_backward``, which never stores the hidden gradient). Saved are ``x`` and ``gate_up``; with
``recompute`` only ``x``, at the price of the first matmul again. Recomputing in the epilogue is quack's idea.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

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
from tp_kernels.ops._library import PLAIN_TYPES, define_op, needs_grad, new_like, watched
from tp_kernels.ops.linear import check_linear, linear
from tp_kernels.ops.swiglu import (
    as_rows,
    linear_gradients,
    shared_input,
    silu_mul_gradient,
    swiglu_forward,
    swiglu_linear,
    swiglu_linear_reference,
)
from tp_kernels.ops.tuning import Choice, Plan, cached_decision, lookup

__all__ = ["choose_swiglu_backward", "swiglu_mlp", "swiglu_mlp_reference"]

_16_BIT = (torch.bfloat16, torch.float16)


def swiglu_mlp_reference(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, bias_gate_up: Tensor | None = None, recompute: bool = False
) -> Tensor:
    """Plain PyTorch ``swiglu_mlp``; ``recompute`` changes nothing."""
    return F.linear(swiglu_linear_reference(x, w_gate_up, bias_gate_up), w_down)


def _check(x: Tensor, w_gate_up: Tensor, w_down: Tensor, bias_gate_up: Tensor | None) -> None:
    check_linear(x, w_gate_up, bias_gate_up, None, None, True)
    width = w_gate_up.shape[0] // 2
    if w_down.dim() != 2 or w_down.shape[1] != width:
        raise ValueError(f"expected w_down [N, {width}] beside w_gate_up [{2 * width}, K], got {list(w_down.shape)}")
    if w_down.device != x.device:
        raise ValueError(f"w_down is on {w_down.device}, x on {x.device}")
    if w_down.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"w_down is {w_down.dtype}, x is {x.dtype}")


@cached_decision
def _plan(info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int) -> Plan:
    """How the backward passes the gate for ``m`` tokens, width I = ``n`` and ``k`` columns of the result."""
    if dtype not in _16_BIT:
        return Plan("torch", f"{dtype}: the fused kernel is for 16-bit operands")
    entry = lookup("swiglu_backward", info, dtype, m=m, n=n, k=k)
    if entry is None:
        reason = f"not measured on {info.name}; cuBLAS and an elementwise kernel are the safe choice for a matmul"
        return Plan("torch", reason)
    reason = entry.reason()
    if entry.path != "triton":
        return Plan("torch", reason)
    from tp_kernels.ops.kernels.swiglu_backward import Config

    try:
        return Plan("triton", reason, Config(**entry.config) if entry.config else None)
    except TypeError:
        return Plan("torch", f"triton with {entry.config} is of another version of this package; tune again")


def choose_swiglu_backward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, bias_gate_up: Tensor | None = None, recompute: bool = False
) -> Choice:
    """How the backward of ``swiglu_mlp`` passes the gate on a GPU, and why.

    Returns:
        "triton": one kernel; "torch": cuBLAS, then the elementwise kernel.
    """
    reason = kernels_reason(x)
    if reason is not None:
        return Choice("torch", reason)
    dtype = autocast_dtype(x) or x.dtype
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return _plan(gpu_of(x), dtype, rows, w_down.shape[1], w_down.shape[0]).choice()


def _gate_up_gradient(
    grad_y: Tensor, w_down: Tensor, gate_up: Tensor, with_hidden: bool, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of ``gate_up`` (written over it if ``in_place``), and on request ``silu(gate) * up``."""
    out = gate_up if in_place else None
    if takes_kernels(gate_up) and type(grad_y) in PLAIN_TYPES and type(w_down) in PLAIN_TYPES:
        rows = as_rows(gate_up)
        n = w_down.shape[1]
        plan = _plan(gpu_of(gate_up), gate_up.dtype, rows.shape[0], n, w_down.shape[0])
        if plan.path == "triton":
            from tp_kernels.ops.kernels.swiglu_backward import dswiglu_matmul

            result = new_like(gate_up, 2 * n) if out is None else out
            hidden = new_like(gate_up, n) if with_hidden else None
            hidden_rows = None if hidden is None else as_rows(hidden)
            dswiglu_matmul(as_rows(result), hidden_rows, as_rows(grad_y), w_down, rows, plan.config)
            return result, hidden
    return silu_mul_gradient(grad_y @ w_down, gate_up, with_hidden, out)


def _backward_impl(grad_y: Tensor, w_down: Tensor, gate_up: Tensor, with_hidden: bool) -> tuple[Tensor, Tensor]:
    result, hidden = _gate_up_gradient(grad_y, w_down, gate_up, with_hidden, False)
    return result, gate_up.new_empty(0) if hidden is None else hidden


def _backward_fake(grad_y: Tensor, w_down: Tensor, gate_up: Tensor, with_hidden: bool) -> tuple[Tensor, Tensor]:
    hidden = gate_up.new_empty((*gate_up.shape[:-1], w_down.shape[1]) if with_hidden else (0,))
    return gate_up.new_empty(gate_up.shape), hidden


_BACKWARD_OP = define_op(
    "swiglu_mlp_backward(Tensor grad_y, Tensor w_down, Tensor gate_up, bool with_hidden) -> (Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _SwigluMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        bias_gate_up: Tensor | None,
        recompute: bool,
        group: TPGroup | None = None,
    ) -> Tensor:
        ctx.group = group
        hidden, gate_up = swiglu_forward(x, w_gate_up, bias_gate_up, not recompute)
        ctx.save_for_backward(x, w_gate_up, w_down, bias_gate_up, gate_up)
        return linear(hidden, w_down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, w_gate_up, w_down, bias_gate_up, gate_up = ctx.saved_tensors
        wants_x, wants_gate_up, wants_down, wants_bias, *_ = ctx.needs_input_grad
        recomputed = gate_up is None
        if recomputed:
            gate_up = F.linear(x, w_gate_up, bias_gate_up)
        grad_down = None
        if watched():
            grad_gate_up, hidden = _BACKWARD_OP(grad_y, w_down, gate_up, wants_down)
        else:
            grad_gate_up, hidden = _gate_up_gradient(grad_y, w_down, gate_up, wants_down, recomputed)
        if wants_down:
            grad_down = as_rows(grad_y).t() @ as_rows(hidden)
        del hidden
        grad_x, grad_weight, grad_bias = linear_gradients(
            grad_gate_up, x, w_gate_up, (wants_x, wants_gate_up, wants_bias), ctx.group
        )
        return grad_x, grad_weight, grad_down, grad_bias, None, None


def swiglu_mlp(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    bias_gate_up: Tensor | None = None,
    recompute: bool = False,
    *,
    group: TPGroup | None = None,
) -> Tensor:
    """``(silu(x @ gate.T + b_gate) * (x @ up.T + b_up)) @ w_down.T``; differentiable once on GPUs.

    Args:
        x: [..., K].
        w_gate_up: [2 * I, K], gate rows above up rows.
        w_down: [N, I].
        bias_gate_up: [2 * I].
        recompute: save only ``x`` for the backward, which then repeats the first matmul.
        group: ranks that share ``x``, each with its part of the width I: the gradient of ``x`` is summed over them. The
            result is this rank's part of the sum.

    Returns:
        [..., N] in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(x, w_gate_up, w_down, bias_gate_up)
    if group is not None:
        x, group = shared_input(x, [w_gate_up, w_down], group)
    if needs_grad(x, w_gate_up, w_down, bias_gate_up):
        if on_gpu(x):
            x, w_gate_up, w_down, bias_gate_up = under_autocast(x, w_gate_up, w_down, bias_gate_up)
            if watched() or (takes_kernels(x) and type(w_gate_up) in PLAIN_TYPES and type(w_down) in PLAIN_TYPES):
                return _SwigluMlp.apply(x, w_gate_up, w_down, bias_gate_up, recompute, group)
        if recompute:
            return checkpoint(_composed, x, w_gate_up, w_down, bias_gate_up, use_reentrant=False)
    return _composed(x, w_gate_up, w_down, bias_gate_up)


def _composed(x: Tensor, w_gate_up: Tensor, w_down: Tensor, bias_gate_up: Tensor | None) -> Tensor:
    return linear(swiglu_linear(x, w_gate_up, bias_gate_up), w_down)
