"""``explain``: which path a call would take, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.ops._gpu import on_gpu
from tp_kernels.ops._gpu_linear import choose_linear, choose_swiglu_linear
from tp_kernels.ops._library import needs_grad, watched
from tp_kernels.ops._quantized_linear import choose_quantized
from tp_kernels.ops.attention import choose_attention
from tp_kernels.ops.cross_entropy import choose_cross_entropy
from tp_kernels.ops.decode_attention import choose_decode_attention, native_decode_reason
from tp_kernels.ops.flash_attention import choose_flash_attention, choose_flash_attention_varlen
from tp_kernels.ops.linear import native_linear_reason
from tp_kernels.ops.norm import choose_add_rms_norm, choose_rms_norm, native_norm_reason
from tp_kernels.ops.norm_linear import choose_norm_linear, native_norm_linear_reason
from tp_kernels.ops.qkv import choose_qkv_rope_cache, native_qkv_reason
from tp_kernels.ops.rope import choose_apply_rope
from tp_kernels.ops.swiglu import choose_silu_mul, native_silu_mul_reason
from tp_kernels.ops.swiglu_mlp import choose_swiglu_backward
from tp_kernels.ops.tuning import Choice

__all__ = ["Path", "explain"]


def _native_swiglu_reason(
    x: Tensor,
    w_gate_up: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    weight_scale: Tensor | None = None,
) -> str | None:
    return native_linear_reason(x, w_gate_up, bias, weight_scale=weight_scale)


def _choose_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Choice:
    if weight_scale is not None:
        return choose_quantized(x, weight, bias, residual, weight_scale, False)
    return choose_linear(x, weight, bias, residual, activation)


def _choose_swiglu_linear(
    x: Tensor,
    w_gate_up: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    weight_scale: Tensor | None = None,
) -> Choice:
    if weight_scale is not None:
        return choose_quantized(x, w_gate_up, bias, None, weight_scale, True)
    return choose_swiglu_linear(x, w_gate_up, bias, save_gate_up=needs_grad(x, w_gate_up, bias))


def _choose_swiglu_mlp(*args: Any, group: Any = None, **kwargs: Any) -> Choice:
    return choose_swiglu_backward(*args, **kwargs)


_ON_CPU: dict[str, Callable[..., str | None]] = {
    "linear": native_linear_reason,
    "swiglu_linear": _native_swiglu_reason,
    "norm_linear": native_norm_linear_reason,
    "norm_swiglu_linear": native_norm_linear_reason,
    "silu_mul": native_silu_mul_reason,
    "rms_norm": lambda x, weight, eps=0.0: native_norm_reason(x, weight),
    "add_rms_norm": lambda x, residual, weight, eps=0.0: native_norm_reason(x, residual, weight),
    "qkv_rope_cache": native_qkv_reason,
    "decode_attention": native_decode_reason,
}
_ON_GPU: dict[str, Callable[..., Choice]] = {
    "linear": _choose_linear,
    "norm_linear": choose_norm_linear,
    "norm_swiglu_linear": partial(choose_norm_linear, gated=True),
    "swiglu_linear": _choose_swiglu_linear,
    "silu_mul": choose_silu_mul,
    "rms_norm": choose_rms_norm,
    "add_rms_norm": choose_add_rms_norm,
    "qkv_rope_cache": choose_qkv_rope_cache,
    "apply_rope": choose_apply_rope,
    "attention": choose_attention,
    "flash_attention": choose_flash_attention,
    "flash_attention_varlen": choose_flash_attention_varlen,
    "decode_attention": choose_decode_attention,
    "swiglu_mlp": _choose_swiglu_mlp,
    "cross_entropy": choose_cross_entropy,
}


@dataclass(frozen=True)
class Path:
    """A path: ``reason`` says why it is taken.

    ``name`` is "native-cpu", "triton", "gluon", "gemv", "skinny" or "torch"; with a quantised weight also "dequantize",
    for a norm before a projection also "separate".

    ``config`` is the measured configuration of a GPU kernel; empty for its default one and for every other path.
    """

    name: str
    reason: str
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Path:
    """Which path ``op(*args, **kwargs)`` would take now, without running it.

    On a GPU the reason carries the figures that decided, or says that this GPU was not measured.

    Args:
        op: an op of this package or its name, for example ``"linear"``.
        args, kwargs: as for the op; they must be valid for it.

    Example:
        >>> print(ops.explain("linear", x, weight))
        native-cpu: avx512 kernel, 2 threads
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in _ON_GPU:
        raise ValueError(f"expected one of {', '.join(_ON_GPU)}, got {name!r}")
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if first is not None and on_gpu(first):
        choice = _ON_GPU[name](*args, **kwargs)
        return Path(choice.path, choice.reason, dict(choice.config))
    if name not in _ON_CPU:
        return Path("torch", "PyTorch's own kernels are the only path of this op on the CPU")
    reason = _ON_CPU[name](*args, **kwargs)
    if reason is not None:
        return Path("torch", reason)
    threads = torch.get_num_threads()
    through = ", through the dispatcher because a mode is active" if watched() else ""
    return Path("native-cpu", f"{native.cpu_isa()} kernel, {threads} thread{'s' if threads > 1 else ''}{through}")
