"""``linear`` and ``swiglu_linear`` on GPUs: which path a call takes, and the path itself.

Paths, each with ``activation(x @ weight.T + bias) + residual`` or ``silu(gate) * up`` in its epilogue:

    gemv      up to 8 rows of x: the weights are streamed through fp32 multiply-adds (``kernels.gemv``)
    skinny    up to 64 rows: the weights are the long side of the tensor core's tile (``kernels.skinny``)
    triton    any number of rows (``kernels.matmul``, ``kernels.swiglu_matmul``)
    torch     cuBLAS, with what PyTorch makes of the rest; for ``swiglu_linear`` followed by ``silu_mul``

A GEMM of our own is taken only where a tuning table says that it was measured to be faster. fp32 is cuBLAS's always.
A decode step comes here some 200 times a token without a CUDA graph, so everything that depends on shapes alone is one
cached :class:`Plan`, and what depends on the tensors is bare comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels.ops._activation import activate
from tp_kernels.ops._gpu import GpuInfo, autocast_dtype, gpu_of, kernels_reason, under_autocast
from tp_kernels.ops._library import PLAIN_TYPES, needs_grad, new_like
from tp_kernels.ops.tuning import Choice, Plan, cached_decision, lookup

__all__ = [
    "choose_linear",
    "choose_swiglu_linear",
    "dense_rows",
    "few_rows_launcher",
    "gpu_linear",
    "gpu_swiglu_linear",
    "linear_with_gradient",
    "matmul_by_rows",
    "obstacle",
    "settled",
    "torch_linear",
]

# Most rows of x that a path takes; the neighbour that was measured may have had fewer than the call.
_MOST_ROWS = {"gemv": 8, "skinny": 64}
_16_BIT = (torch.bfloat16, torch.float16)

_grad_enabled = torch.is_grad_enabled


@cached_decision
def _plan(op: str, info: GpuInfo, dtype: torch.dtype, m: int, n: int, k: int, saved: bool) -> Plan:
    """The path for x [m, k] and n columns of the result, whatever the tensors; no ``launch`` is the path "torch".

    Args:
        op: "linear", "linear_residual" or "swiglu_linear".
        info, dtype, m, n, k: the GPU and the problem.
        saved: ``swiglu_linear`` must keep gate and up.
    """
    if dtype not in _16_BIT:
        return Plan("torch", f"{dtype}: our GEMMs are for 16-bit operands")
    if m == 0 or n == 0 or k == 0:
        return Plan("torch", "an operand is empty")
    entry = lookup(op, info, dtype, m=m, n=n, k=k)
    if entry is None and op == "linear_residual":
        entry = lookup("linear", info, dtype, m=m, n=n, k=k)
    if entry is None:
        return Plan("torch", f"not measured on {info.name}; cuBLAS is the safe choice for a GEMM")
    path, reason = entry.path, entry.reason()
    if path == "torch":
        return Plan(path, reason)
    if m > _MOST_ROWS.get(path, m):
        return Plan("torch", f"{path} takes up to {_MOST_ROWS[path]} rows, not {m}; nearest measurement: {reason}")
    if saved and path != "triton":
        return Plan("torch", f"{path} keeps no gate and up for the backward pass; nearest measurement: {reason}")
    if n % 8 or k % 8:
        return Plan("torch", f"rows of {n} and {k} elements are not multiples of 16 bytes")
    if path != "triton" and k % 16:
        # Triton's launcher knows of divisibility by 16 elements only; without it the loads of these kernels are scalar.
        return Plan("torch", f"{path} takes rows of a multiple of 16 elements, not {k}; nearest measurement: {reason}")
    try:
        launch, config, module = _launcher(op, path, entry.config)
    except (KeyError, TypeError):
        return Plan("torch", f"{path} with {entry.config} is of another version of this package; tune again")
    if config is not None and path != "triton":
        # It was measured for as little as half the rows, of which the kernels keep tiles.
        needed = module.shared_bytes(config, m, op == "swiglu_linear", dtype.itemsize)
        config = config if needed <= info.max_shared else None
    return Plan(path, reason, config, launch)


def few_rows_launcher(path: str, config: dict[str, Any]) -> tuple[Callable[..., None], Any, Any]:
    """The launcher of "gemv" or "skinny", its configuration (None: the default), and their module.

    Raises:
        TypeError: the configuration is of another version.
    """
    if path == "gemv":
        from tp_kernels.ops.kernels import gemv

        return gemv.gemv, gemv.Config(**config) if config else None, gemv
    from tp_kernels.ops.kernels import skinny

    return skinny.skinny_matmul, skinny.Config(**config) if config else None, skinny


def _launcher(op: str, path: str, config: dict[str, Any]) -> tuple[Callable[..., None], Any, Any]:
    """The kernels' launcher, its configuration (None: the default), and their module."""
    if path in _MOST_ROWS:
        return few_rows_launcher(path, config)
    if path != "triton":
        raise KeyError(path)
    from tp_kernels.ops.kernels import matmul, swiglu_matmul

    launcher = swiglu_matmul.swiglu_matmul if op == "swiglu_linear" else matmul.matmul
    return launcher, matmul.Config(**config) if config else None, matmul


def obstacle(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    """What about the tensors, other than their sizes, rules our kernels out; None if nothing does."""
    if type(weight) not in PLAIN_TYPES:
        return f"the weight is a {type(weight).__name__}"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    if (x.data_ptr() | weight.data_ptr()) & 15:
        return "the operands do not begin at a multiple of 16 bytes"
    for tensor in (bias, residual):
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return f"the bias or the residual is a {type(tensor).__name__}"
    return None


def _decide(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, saved: bool = False
) -> Plan:
    """The plan for operands of one dtype, of which x may be taken by kernels."""
    n, k = weight.shape
    if op == "swiglu_linear":
        n //= 2
    plan = _plan(op, gpu_of(x), x.dtype, x.numel() // k if k else 0, n, k, saved)
    if plan.launch is not None:
        reason = obstacle(x, weight, bias, residual)
        if reason is not None:
            return Plan("torch", reason)
    return plan


def choose_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Choice:
    """Which GPU path ``linear`` takes for these arguments, and why: "gemv", "skinny", "triton" or "torch"."""
    op, dtype = "linear" if residual is None else "linear_residual", autocast_dtype(x)
    if dtype is not None and weight.dtype is not dtype:
        return Choice(
            "torch", f"autocast to {dtype}: PyTorch keeps the weight it has cast, we would cast it every time"
        )
    if residual is not None:
        widened = dtype is not None and residual.dtype is not dtype
        if widened or (activation is not None and needs_grad(x, weight, bias, residual)):
            op, residual = "linear", None  # it is added afterwards
    (x,) = under_autocast(x)
    reason = kernels_reason(x)
    return _decide(op, x, weight, bias, residual).choice() if reason is None else Choice("torch", reason)


def choose_swiglu_linear(
    x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None, save_gate_up: bool = False
) -> Choice:
    """Which GPU path ``swiglu_linear`` takes for these arguments, and why: "gemv", "skinny", "triton" or "torch".

    Args:
        x, w_gate_up, bias: as for the op.
        save_gate_up: whether gate and up must be kept for a backward pass.
    """
    x, w_gate_up, bias = under_autocast(x, w_gate_up, bias)
    reason = kernels_reason(x)
    if reason is not None:
        return Choice("torch", reason)
    return _decide("swiglu_linear", x, w_gate_up, bias, None, save_gate_up).choice()


def dense_rows(x: Tensor, width: int) -> Tensor:
    """[..., width] as a matrix with dense rows; not empty."""
    if x.dim() != 2:
        x = x.reshape(-1, width)
    return x if x.stride(1) == 1 or width == 1 else x.contiguous()


def settled(weight: Tensor) -> bool:
    """Whether no kernel still running can be writing the weight: a parameter that nobody trains at the moment.

    Only the launch just before can still be running, and only if it lets its successor start early; the kernels that do
    (ours, cuBLAS's) write activations.
    """
    return type(weight) is torch.nn.Parameter and not (weight.requires_grad and _grad_enabled())


def gpu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``linear`` on a GPU without recording a gradient; arguments were checked, and ``takes_kernels(x)`` holds.

    ``out``: contiguous, where the result goes (not under autocast); None allocates.
    """
    x, weight, bias, residual = under_autocast(x, weight, bias, residual)
    plan = _decide("linear" if residual is None else "linear_residual", x, weight, bias, residual)
    return _run_linear(plan, x, weight, bias, residual, activation, settled(weight), out)


def _run_linear(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    weights_ready: bool,
    out: Tensor | None = None,
) -> Tensor:
    n, k = weight.shape
    if plan.launch is None:
        if out is None:
            return torch_linear(x, weight, bias, residual, activation)
        if bias is None and residual is None and activation is None and type(weight) in PLAIN_TYPES:
            torch.mm(x.reshape(-1, k), weight.t(), out=out.view(-1, n))
            return out
        return out.copy_(torch_linear(x, weight, bias, residual, activation))
    if out is None:
        out = new_like(x, n)
    rows = dense_rows(out, n)
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = dense_rows(residual, n)
    if plan.path == "triton":
        plan.launch(rows, dense_rows(x, k), weight, bias, residual, activation, plan.config)
    else:
        plan.launch(
            rows, dense_rows(x, k), weight, bias, residual, activation, False, plan.config, weights_ready=weights_ready
        )
    return out


def matmul_by_rows(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], object] | None:
    """How to compute some rows of ``x @ weight.T`` on a GPU as if all of them were computed: ``launch(out, x)``.

    The plan is made for all rows of ``x`` [M, K], which must be dense; None stands for cuBLAS, whose choice for some
    rows is its own.
    """
    plan = _decide("linear", x, weight, None, None) if kernels_reason(x) is None and x.stride(1) == 1 else None
    if plan is None or plan.path != "triton" or plan.config is None:
        return None
    return lambda out, rows: plan.launch(out, rows, weight, None, None, None, plan.config)


def torch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    bare = bias is None and activation is None and type(weight) in PLAIN_TYPES and x.numel() and weight.numel()
    if residual is not None and bare:
        # The GEMM adds it before it rounds, and one pass over the result is saved. A quantised weight knows F.linear.
        n, k = weight.shape
        return torch.addmm(residual.reshape(-1, n), x.reshape(-1, k), weight.t()).view(residual.shape)
    out = activate(F.linear(x, weight, bias), activation)
    return out if residual is None else out + residual


def gpu_swiglu_linear(
    x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None, save_gate_up: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``swiglu_linear`` on a GPU without recording a gradient; arguments were checked, and ``takes_kernels(x)`` holds.

    Args:
        x: [..., K].
        w_gate_up: [2 * I, K], gate rows above up rows.
        bias: [2 * I].
        save_gate_up: keep gate and up for a backward pass.

    Returns:
        The result [..., I], and gate and up [..., 2 * I] if they were to be kept, else None.
    """
    x, w_gate_up, bias = under_autocast(x, w_gate_up, bias)
    plan = _decide("swiglu_linear", x, w_gate_up, bias, None, save_gate_up)
    if plan.launch is None:
        # Imported here because that module builds on this one.
        from tp_kernels.ops.swiglu import gpu_silu_mul

        gate_up = F.linear(x, w_gate_up, bias)
        return gpu_silu_mul(gate_up), gate_up if save_gate_up else None
    double, k = w_gate_up.shape
    n = double // 2
    out = new_like(x, n)
    if bias is not None:
        bias = bias.contiguous()
    gate_up = new_like(x, double) if save_gate_up else None
    if plan.path == "triton":
        saved = None if gate_up is None else dense_rows(gate_up, double)
        plan.launch(dense_rows(out, n), dense_rows(x, k), w_gate_up, bias, saved, plan.config)
    else:
        ready = not save_gate_up and settled(w_gate_up)
        plan.launch(
            dense_rows(out, n), dense_rows(x, k), w_gate_up, bias, None, None, True, plan.config, weights_ready=ready
        )
    return out, gate_up


# Gradients -----------------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias + residual`` by one of our kernels; the backward is PyTorch's, differentiable itself."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _run_linear(plan, x, weight, bias, residual, None, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n, k = weight.shape
        _, want_x, want_weight, want_bias, want_residual = ctx.needs_input_grad
        rows = grad.reshape(-1, n)
        return (
            None,
            (rows @ weight).view(x.shape) if want_x else None,
            rows.t() @ x.reshape(-1, k) if want_weight else None,
            rows.sum(0) if want_bias else None,
            grad if want_residual else None,
        )


def linear_with_gradient(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    """``linear`` on a GPU where a gradient is needed; as for ``gpu_linear``, operands of one dtype.

    Only the projection is ours then: the activation's derivative needs its argument, which has to be stored anyway.
    """
    fused = residual if activation is None else None
    plan = _decide("linear" if fused is None else "linear_residual", x, weight, bias, fused)
    if plan.launch is None:
        return torch_linear(x, weight, bias, residual, activation)
    out = activate(_Linear.apply(plan, x, weight, bias, fused), activation)
    return out if residual is None or fused is not None else out + residual
