"""RMS normalisation in front of a projection, for a few rows: the norm inside the kernel that reads the weight.

    norm_linear(x, g, eps, w, b)         = linear(rms_norm(x, g, eps), w, b)
    norm_swiglu_linear(x, g, eps, w, b)  = swiglu_linear(rms_norm(x, g, eps), w, b)

Shapes: ``x`` [..., K], ``g`` [K], ``w`` [N, K] ([2 * I, K]: gate rows above up rows), results [..., N] ([..., I]).

In a decode step at world size 1 nothing stands between the residual addition, which is the epilogue of the projection
before, and the projection after a norm. Every block of a GEMV reads all of x, so it can sum up the squares beside the
products and scale its sums by 1/rms at the end: one launch less, and no wait for a kernel of a few microseconds.

Numerics of the fused path ("gemv"): sum(x * g * w) * rsqrt(mean(x * x) + eps) * scale + bias, in fp32, rounded once.
``rms_norm`` rounds the normalised x to its dtype before and after it meets ``g``; 1/rms is known only when the weights
have passed, so here neither is rounded, which is closer to the exact result. Everywhere else ("separate") the two ops
run one after the other, with their numerics. The fused path is taken where a tuning table measured it to be faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_kernels.ops._gpu import GpuInfo, autocast_dtype, gpu_of, kernels_reason, on_gpu
from tp_kernels.ops._gpu_linear import dense_rows, few_rows_launcher, obstacle, settled
from tp_kernels.ops._library import PLAIN_TYPES, define_op, needs_grad, new_like, watched
from tp_kernels.ops._quantized_linear import refuse_gradients
from tp_kernels.ops.linear import check_linear, linear, linear_reference, native_linear_reason
from tp_kernels.ops.norm import native_norm_reason, rms_norm, rms_norm_reference
from tp_kernels.ops.quantize import fp8_reason, kind_of
from tp_kernels.ops.swiglu import swiglu_linear, swiglu_linear_reference
from tp_kernels.ops.tuning import Choice, Plan, cached_decision, configuration, lookup

__all__ = [
    "WEIGHT_PROPERTY",
    "choose_norm_linear",
    "native_norm_linear_reason",
    "norm_linear",
    "norm_linear_reference",
    "norm_swiglu_linear",
    "norm_swiglu_linear_reference",
]

# The property "weight" of a table's entry: what the weight is made of.
WEIGHT_PROPERTY: dict[str | None, int] = {None: 0, "int8": -1, "fp8": -2}
_MOST_ROWS = 8


def norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch ``norm_linear``."""
    return linear_reference(rms_norm_reference(x, norm_weight, eps), weight, bias, weight_scale=weight_scale)


def norm_swiglu_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    w_gate_up: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch ``norm_swiglu_linear``."""
    return swiglu_linear_reference(rms_norm_reference(x, norm_weight, eps), w_gate_up, bias, weight_scale=weight_scale)


def _check(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, gated: bool
) -> None:
    check_linear(x, weight, bias, None, None, gated, scale)
    if norm_weight.shape != x.shape[-1:] or norm_weight.dtype is not x.dtype or norm_weight.device != x.device:
        raise ValueError(
            f"expected a norm weight {list(x.shape[-1:])} of {x.dtype} on {x.device}, "
            f"got {list(norm_weight.shape)} of {norm_weight.dtype} on {norm_weight.device}"
        )


# Paths ---------------------------------------------------------------------------------------------------------------


@cached_decision
def _plan(op: str, info: GpuInfo, dtype: torch.dtype, kind: str | None, m: int, n: int, k: int) -> Plan:
    """ "gemv" or "separate" for x [m, k] and n columns of the result, whatever the tensors."""
    if dtype not in (torch.bfloat16, torch.float16):
        return Plan("separate", f"{dtype}: the fused kernel is for 16-bit operands")
    if m == 0 or n == 0 or k == 0:
        return Plan("separate", "an operand is empty")
    if kind == "fp8" and (old := fp8_reason(info)) is not None:
        return Plan("separate", old)
    entry = lookup(op, info, dtype, m=m, n=n, k=k, weight=WEIGHT_PROPERTY[kind])
    if entry is None:
        return Plan("separate", f"not measured on {info.name}; rms_norm, then the projection")
    reason = entry.reason()
    if entry.path != "gemv":
        return Plan("separate", reason)
    if m > _MOST_ROWS or k % 16 or n % 8:
        return Plan(
            "separate",
            f"gemv takes up to {_MOST_ROWS} rows, K in multiples of 16 and N of 8, not {m}, {k} and {n}; "
            f"nearest measurement: {reason}",
        )
    launch, _, module = few_rows_launcher("gemv", {})
    config = configuration(entry, module.Config)
    if config is not None:
        gated = op == "norm_swiglu_linear"
        # It was measured for as little as half the rows, of which the kernel keeps tiles.
        needed = module.shared_bytes(config, m, gated, dtype.itemsize, kind is not None, True)
        config = config if needed <= info.max_shared else None
    return Plan("gemv", reason, config, launch)


def _decide(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, gated: bool
) -> Plan:
    """The plan for operands that were checked, without a gradient."""
    reason = kernels_reason(x)
    if reason is None and autocast_dtype(x) is not None:
        reason = "autocast casts between the norm and the projection"
    if reason is None and any(t is not None and type(t) not in PLAIN_TYPES for t in (norm_weight, scale)):
        reason = "the norm's weight or the scale is a tensor subclass"
    if reason is not None:
        return Plan("separate", reason)
    n, k = weight.shape
    op = "norm_swiglu_linear" if gated else "norm_linear"
    kind = kind_of(weight.dtype)
    plan = _plan(op, gpu_of(x), x.dtype, kind, x.numel() // k if k else 0, n // 2 if gated else n, k)
    if plan.launch is not None:
        reason = obstacle(x, weight, bias, None)
        if reason is not None:
            return Plan("separate", reason)
    return plan


def _separately(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> Tensor:
    normed = rms_norm(x, norm_weight, eps)
    if gated:
        return swiglu_linear(normed, weight, bias, weight_scale=scale)
    return linear(normed, weight, bias, weight_scale=scale)


def _run(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> Tensor:
    """On a GPU, without a gradient."""
    plan = _decide(x, norm_weight, weight, bias, scale, gated)
    if plan.launch is None:
        return _separately(x, norm_weight, eps, weight, bias, scale, gated)
    n, k = weight.shape
    out = new_like(x, n // 2 if gated else n)
    plan.launch(
        dense_rows(out, out.shape[-1]),
        dense_rows(x, k),
        weight,
        None if bias is None else bias.contiguous(),
        None,
        None,
        gated,
        plan.config,
        weights_ready=settled(weight),
        scale=None if scale is None else scale.contiguous(),
        norm_weight=norm_weight.contiguous(),
        eps=eps,
    )
    return out


def choose_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    gated: bool = False,
) -> Choice:
    """Which GPU path ``norm_linear``, or ``norm_swiglu_linear`` (``gated``), takes and why: "gemv" or "separate"."""
    if needs_grad(x, norm_weight, weight, bias):
        return Choice("separate", "a gradient is needed")
    return _decide(x, norm_weight, weight, bias, weight_scale, gated).choice()


def native_norm_linear_reason(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> str | None:
    """Why the norm or the projection would not take its native CPU path; None if both would."""
    return native_norm_reason(x, norm_weight) or native_linear_reason(x, weight, bias, weight_scale=weight_scale)


# Public --------------------------------------------------------------------------------------------------------------


def _norm_linear_impl(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    gated: bool = False,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    _check(x, norm_weight, weight, bias, weight_scale, gated)
    if on_gpu(x):
        return _run(x, norm_weight, eps, weight, bias, weight_scale, gated)
    return _separately(x, norm_weight, eps, weight, bias, weight_scale, gated)


def _norm_linear_fake(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    gated: bool = False,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    _check(x, norm_weight, weight, bias, weight_scale, gated)
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gated else 1)))


_OP = define_op(
    "norm_linear(Tensor x, Tensor norm_weight, float eps, Tensor weight, Tensor? bias=None, bool gated=False, *, "
    "Tensor? weight_scale=None) -> Tensor",
    _norm_linear_impl,
    _norm_linear_fake,
)


def _apply(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    gated: bool,
) -> Tensor:
    _check(x, norm_weight, weight, bias, scale, gated)
    if scale is not None:
        refuse_gradients(x, norm_weight, weight, bias, scale)
    if on_gpu(x) and autocast_dtype(x) is None and not needs_grad(x, norm_weight, weight, bias):
        if watched():
            # A symbol, as a module's attribute may be, is no float to an op.
            return _OP(x, norm_weight, float(eps), weight, bias, gated, weight_scale=scale)
        return _run(x, norm_weight, eps, weight, bias, scale, gated)
    return _separately(x, norm_weight, eps, weight, bias, scale, gated)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``rms_norm(x, norm_weight, eps) @ weight.T + bias``; differentiable, unless the weight is quantised.

    Args:
        x: [..., K].
        norm_weight: [K].
        eps: added to the mean square.
        weight: [N, K].
        bias: [N].
        weight_scale: fp32 [N], of an int8 or float8_e4m3fn weight, as for ``linear``.

    Returns:
        [..., N] in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a quantised weight where a gradient is needed.
    """
    return _apply(x, norm_weight, eps, weight, bias, weight_scale, False)


def norm_swiglu_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    w_gate_up: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """``silu(gate) * up`` of ``rms_norm(x, norm_weight, eps)``; differentiable, unless the weight is quantised.

    Args:
        x: [..., K].
        norm_weight: [K].
        eps: added to the mean square.
        w_gate_up: [2 * I, K], gate rows above up rows.
        bias: [2 * I].
        weight_scale: fp32 [2 * I], of an int8 or float8_e4m3fn weight, as for ``linear``.

    Returns:
        [..., I] in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a quantised weight where a gradient is needed.
    """
    return _apply(x, norm_weight, eps, w_gate_up, bias, weight_scale, True)
