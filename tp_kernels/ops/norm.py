"""RMS normalisation, alone and fused with the residual addition.

    rms_norm(x, weight)     = weight * (x.float() * rsqrt(x.float().pow(2).mean(-1) + eps)).to(x.dtype)
    add_rms_norm(x, r, w)   = rms_norm(x + r, w), x + r

Shapes: ``x``, ``residual`` [..., H]; ``weight`` [H]. Numerics: those of Hugging Face's LlamaRMSNorm on every path: the
sum is rounded to the dtype first, statistics are fp32, the normalised value is rounded to the dtype before it meets the
weight. Autocast changes nothing, as it does not change PyTorch's composition.

On a GPU one Triton kernel reads and writes every element once, and the backward is one pass too (with the gradient that
arrives at the sum added in); its gradients are fp32 inside and rounded once, and the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tp_kernels._native import native
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import gpu_of, kernels_reason, on_gpu, takes_kernels
from tp_kernels.ops._library import CPU_DTYPES, PLAIN_TYPES, define_op, needs_grad, plain_cpu, plain_reason, watched

__all__ = [
    "add_rms_norm",
    "add_rms_norm_by_rows",
    "add_rms_norm_reference",
    "choose_add_rms_norm",
    "choose_rms_norm",
    "rms_norm",
    "rms_norm_reference",
]

_GPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

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
    reason = plain_reason(x, *others)
    if reason is not None:
        return reason
    if any(type(t) not in PLAIN_TYPES for t in others):
        return "an operand is a tensor subclass"
    if any(t.dtype != x.dtype for t in others):
        return "the dtypes differ"
    if x.shape[-1] == 0:
        return "the last dimension is empty"
    if not others[-1].is_contiguous():
        return "the weight is not contiguous"
    return None


# GPU ------------------------------------------------------------------------------------------------------------------


def _unfit(x: Tensor, residual: Tensor | None, weight: Tensor, backward: bool) -> str | None:
    """Why the kernels do not take these operands (which passed ``_check``); None if they do."""
    if x.dtype not in _GPU_DTYPES or weight.dtype not in _GPU_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, got {x.dtype} and {weight.dtype}"
    if x.shape[-1] == 0:
        return "the last dimension is empty"
    for other in (weight,) if residual is None else (weight, residual):
        if type(other) not in PLAIN_TYPES:
            return f"an operand is a {type(other).__name__}"
        if other.device != x.device:
            return "the operands are on different devices"
    if backward:
        from tp_kernels.ops.kernels import norm_backward as kernels

        if not kernels.takes(x.shape[-1], torch.promote_types(x.dtype, weight.dtype)):
            return f"the backward kernel does not take rows of {x.shape[-1]} elements in these dtypes"
    return None


def _measured(op: str, x: Tensor, **properties: int) -> tuning.Entry | None:
    h = x.shape[-1]
    return tuning.lookup(op, gpu_of(x), x.dtype, m=x.numel() // h, h=h, **properties)


def _decide(
    x: Tensor, residual: Tensor | None, weight: Tensor, backward: bool
) -> tuple[str | None, tuning.Entry | None]:
    """(why the kernel does not run, or None; the measurement that decided, or None if there is none)."""
    reason = kernels_reason(x) or _unfit(x, residual, weight, backward)
    if reason is not None:
        return reason, None
    entry = _measured("rms_norm" if residual is None else "add_rms_norm", x)
    return "it was measured to be slower" if entry is not None and entry.path != "triton" else None, entry


def _choose(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuning.Choice:
    reason, entry = _decide(x, residual, weight, needs_grad(x, residual, weight))
    if reason is not None and entry is None:
        return tuning.Choice("torch", reason)
    passes = "several" if residual is None else "the addition's and the norm's"
    return tuning.choose_measured(entry, f"not measured on {gpu_of(x).name}; one pass instead of {passes} in PyTorch")


def choose_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuning.Choice:
    """Which GPU path ``rms_norm`` takes for these arguments ("triton" or "torch"), and why."""
    return _choose(x, None, weight)


def choose_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuning.Choice:
    """Which GPU path ``add_rms_norm`` takes for these arguments ("triton" or "torch"), and why."""
    return _choose(x, residual, weight)


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, with_rstd: bool, entry: tuning.Entry | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(normed, sum or None, rstd or None) from the kernel; ``with_rstd`` for a backward to come."""
    from tp_kernels.ops.kernels import norm as kernels

    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) if with_rstd else None
    config = tuning.configuration(entry, kernels.Config)
    # In training an optimiser may have changed it a moment ago; otherwise a Parameter is no kernel's fresh result.
    ready = type(weight) is torch.nn.Parameter and not with_rstd
    if residual is None:
        kernels.rms_norm(out, x, weight, eps, rstd, config, ready)
        return out, None, rstd
    summed = x.new_empty(x.shape)
    kernels.add_rms_norm(out, summed, x, residual, weight, eps, rstd, config, ready)
    return out, summed, rstd


def add_rms_norm_by_rows(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Callable[[slice], None], Tensor, Tensor]:
    """``add_rms_norm`` in pieces: ``(normalise, normed, summed)``, where ``normalise(rows)`` fills these rows of both.

    The bits are those of one call for all rows: path and configuration are chosen for all of them. No gradient is
    recorded.

    Args:
        x, residual: [M, H]; rows of ``x`` need not be there before ``normalise`` is called for them.
        weight, eps: as for ``add_rms_norm``.
    """
    _check(x, residual, weight)
    normed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    summed = torch.empty_like(x)
    reason, entry = _decide(x, residual, weight, False)
    if reason is None:
        from tp_kernels.ops.kernels import norm as kernels

        config = tuning.configuration(entry, kernels.Config)
        config = config or kernels.default_config(gpu_of(x), x.dtype, *x.shape)

        def normalise(rows: slice) -> None:
            kernels.add_rms_norm(normed[rows], summed[rows], x[rows], residual[rows], weight, eps, None, config)

    else:
        compute = add_rms_norm_reference if on_gpu(x) else add_rms_norm

        def normalise(rows: slice) -> None:
            normed[rows], summed[rows] = compute(x[rows], residual[rows], weight, eps)

    return normalise, normed, summed


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(normed, sum or None, rstd [rows]) by the kernel or by PyTorch."""
    reason, entry = _decide(x, residual, weight, True)
    if reason is None:
        return _launch_forward(x, residual, weight, eps, True, entry)
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (weight * (wide * rstd).to(x.dtype)).contiguous()
    return normed, None if residual is None else summed.contiguous(), rstd.flatten()


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, sum_grad: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight or None) by the kernel or by PyTorch."""
    if takes_kernels(x) and _unfit(x, sum_grad, weight, True) is None and type(grad) in PLAIN_TYPES:
        entry = _measured("rms_norm_backward", x, residual=int(sum_grad is not None))
        if entry is None or entry.path == "triton":
            from tp_kernels.ops.kernels import norm_backward as kernels

            dx = x.new_empty(x.shape)
            dweight = weight.new_empty(weight.shape) if weight_grad else None
            config = tuning.configuration(entry, kernels.Config)
            kernels.rms_norm_backward(dx, dweight, grad, x, weight, rstd, sum_grad, config)
            return dx, dweight
    wide, rstd = x.to(rstd.dtype), rstd.view(*x.shape[:-1], 1)
    normed, grad = wide * rstd, grad.to(rstd.dtype)
    scaled = grad * weight
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if sum_grad is not None:
        dx = dx + sum_grad
    dweight = (grad * normed).sum_to_size(weight.shape).to(weight.dtype) if weight_grad else None
    return dx.to(x.dtype).contiguous(), dweight


def _rms_norm_forward_impl(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, residual, weight)
    normed, summed, rstd = _forward(x, residual, weight, eps)
    return normed, x.new_empty(0) if summed is None else summed, rstd


def _rms_norm_forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, residual, weight)
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return (
        x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)),
        x.new_empty(0) if residual is None else x.new_empty(x.shape),
        x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32)),
    )


def _rms_norm_backward_impl(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, sum_grad: Tensor | None = None, weight_grad: bool = True
) -> tuple[Tensor, Tensor]:
    dx, dweight = _backward(grad, x, weight, rstd, sum_grad, weight_grad)
    return dx, weight.new_empty(0) if dweight is None else dweight


def _rms_norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, sum_grad: Tensor | None = None, weight_grad: bool = True
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_grad else 0)


_RMS_NORM_FORWARD_OP = define_op(
    "rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps=1e-6) -> (Tensor, Tensor, Tensor)",
    _rms_norm_forward_impl,
    _rms_norm_forward_fake,
)
_RMS_NORM_BACKWARD_OP = define_op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? sum_grad=None, "
    "bool weight_grad=True) -> (Tensor, Tensor)",
    _rms_norm_backward_impl,
    _rms_norm_backward_fake,
)


class _RmsNorm(torch.autograd.Function):
    """``rms_norm(x, weight)``, or ``add_rms_norm`` with a residual: fp32 1/rms of every row is what it remembers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float):
        if watched():
            normed, summed, rstd = _RMS_NORM_FORWARD_OP(x, residual, weight, eps)
        else:
            ctx.set_materialize_grads(False)
            normed, summed, rstd = _forward(x, residual, weight, eps)
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x if residual is None else summed, weight, rstd)
        return normed if residual is None else (normed, summed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, sum_grad: Tensor | None = None):
        if grad is None:  # only the sum was used
            return sum_grad, sum_grad, None, None
        x, weight, rstd = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[2]
        if watched():
            dx, dweight = _RMS_NORM_BACKWARD_OP(grad, x, weight, rstd, sum_grad, weight_grad)
        else:
            dx, dweight = _backward(grad, x, weight, rstd, sum_grad, weight_grad)
        return dx, dx if ctx.has_residual else None, dweight if weight_grad else None, None


# Public ---------------------------------------------------------------------------------------------------------------


def _rms_norm_impl(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    if plain_cpu(x):
        result = _native_norm(x, None, weight, eps)
        if result is not None:
            return result[0]
    _check(x, None, weight)
    reason, entry = _decide(x, None, weight, False)
    if reason is None:
        return _launch_forward(x, None, weight, eps, False, entry)[0]
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
    reason, entry = _decide(x, residual, weight, False)
    if reason is None:
        return _launch_forward(x, residual, weight, eps, False, entry)[:2]
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
        [..., H] in ``x.dtype``, or in the weight's if that is wider.

    Raises:
        ValueError: ``weight`` is not one row of ``x``'s last dimension.
    """
    if watched():
        if not needs_grad(x, weight):
            return _RMS_NORM_OP(x, weight, eps)
        if on_gpu(x):
            _check(x, None, weight)
            # A symbol, as a module's attribute may be, cannot be given to two functions (Dynamo, PyTorch 2.14).
            return _RmsNorm.apply(x, None, weight, float(eps))
    elif plain_cpu(x) and not needs_grad(x, weight):
        result = _native_norm(x, None, weight, eps)
        if result is not None:
            return result[0]
    elif on_gpu(x):
        _check(x, None, weight)
        grad = needs_grad(x, weight)
        reason, entry = _decide(x, None, weight, grad)
        if reason is None:
            if grad:
                return _RmsNorm.apply(x, None, weight, eps)
            return _launch_forward(x, None, weight, eps, False, entry)[0]
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
        if on_gpu(x):
            _check(x, residual, weight)
            # Dynamo refuses one tensor in two places.
            return _RmsNorm.apply(x, residual.view_as(residual), weight, float(eps))
    elif plain_cpu(x) and not needs_grad(x, residual, weight):
        result = _native_norm(x, residual, weight, eps)
        if result is not None:
            return result
    elif on_gpu(x):
        _check(x, residual, weight)
        grad = needs_grad(x, residual, weight)
        reason, entry = _decide(x, residual, weight, grad)
        if reason is None:
            if grad:
                return _RmsNorm.apply(x, residual, weight, eps)
            return _launch_forward(x, residual, weight, eps, False, entry)[:2]
    _check(x, residual, weight)
    return add_rms_norm_reference(x, residual, weight, eps)
