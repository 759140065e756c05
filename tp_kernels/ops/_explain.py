"""``explain``: which path a call would take, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.comm.communicator import Communicator
from tp_kernels.comm.overlap import agreed
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._gpu import on_gpu
from tp_kernels.ops._gpu_linear import choose_linear, choose_swiglu_linear
from tp_kernels.ops._library import needs_grad, watched
from tp_kernels.ops._quantized_linear import choose_quantized
from tp_kernels.ops.all_reduce_norm import all_reduce_add_rms_norm, choose_all_reduce_add_rms_norm
from tp_kernels.ops.attention import choose_attention
from tp_kernels.ops.column_parallel_linear import choose_column_parallel_linear, column_parallel_linear
from tp_kernels.ops.cross_entropy import choose_cross_entropy
from tp_kernels.ops.decode_attention import choose_decode_attention, native_decode_reason
from tp_kernels.ops.flash_attention import choose_flash_attention, choose_flash_attention_varlen
from tp_kernels.ops.linear import native_linear_reason
from tp_kernels.ops.linear_all_reduce import choose_linear_all_reduce, linear_all_reduce
from tp_kernels.ops.linear_reduce_scatter import choose_linear_reduce_scatter, linear_reduce_scatter
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
# The op, whose signature a call is bound to, and what chooses by those of its arguments that it names.
_WITH_GROUP: dict[str, tuple[Callable[..., Any], Callable[..., Choice]]] = {
    "linear_all_reduce": (linear_all_reduce, choose_linear_all_reduce),
    "linear_reduce_scatter": (linear_reduce_scatter, choose_linear_reduce_scatter),
    "column_parallel_linear": (column_parallel_linear, choose_column_parallel_linear),
    "all_reduce_add_rms_norm": (all_reduce_add_rms_norm, choose_all_reduce_add_rms_norm),
}


@dataclass(frozen=True)
class Path:
    """A path: ``reason`` says why it is taken.

    ``name`` is "native-cpu", "triton", "gluon", "gemv", "skinny" or "torch"; with a quantised weight also "dequantize",
    for a norm before a projection also "separate". Of ops that communicate it is the way to overlap ("none", "chunked",
    ...; how the matmul itself runs is for ``explain("linear", ...)`` to say), of ``all_reduce_add_rms_norm`` "fused" or
    "separate".

    ``config`` is the measured configuration of a GPU kernel; empty for its default one and for every other path. Of
    ops that communicate: in how many pieces, or by which algorithm.
    """

    name: str
    reason: str
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Path:
    """Which path ``op(*args, **kwargs)`` would take now, without running it.

    On a GPU the reason carries the figures that decided, or says that this GPU was not measured. No collective is run,
    not even for ops that communicate: one rank may ask alone.

    Args:
        op: an op of this package or its name, for example ``"linear"``.
        args, kwargs: as for the op, ``group`` among them; they must be valid for it.

    Raises:
        ValueError: an op that has only one path, or arguments that do not fit together.

    Example:
        >>> print(ops.explain("linear", x, weight))
        native-cpu: avx512 kernel, 2 threads
        >>> print(ops.explain("linear_all_reduce", x, weight, in_features=4096))
        none: one rank has nobody to talk to
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name in _WITH_GROUP:
        return _explain_with_group(name, args, kwargs)
    if name not in _ON_GPU:
        raise ValueError(f"expected one of {', '.join((*_ON_GPU, *_WITH_GROUP))}, got {name!r}")
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


# Ops that communicate ------------------------------------------------------------------------------------------------


def _explain_with_group(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path:
    op, choose = _WITH_GROUP[name]
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    group = resolve_group(given["group"])
    # What the ranks have compared is remembered of the real communicator; what they have not would be a collective.
    given["group"] = group if group.world_size == 1 or agreed(group.communicator) else _silent(group)
    wanted = inspect.signature(choose).parameters
    try:
        choice = choose(**{key: value for key, value in given.items() if key in wanted})
    except _Collective:
        return _undecided(given)
    return Path(choice.path, choice.reason, _in_pieces(choice.config, given))


def _undecided(given: Mapping[str, Any]) -> Path:
    if given["overlap"] != "auto":
        return Path(given["overlap"], "requested; the first call compares the ranks' GPUs", _in_pieces({}, given))
    return Path("none", "the ranks have not compared their tables yet: the first call does", _in_pieces({}, given))


def _in_pieces(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the pieces that the caller asked for."""
    chunks = given.get("chunks")
    return dict(config) if chunks is None else {**config, "chunks": chunks}


class _Collective(Exception):
    """A collective was about to run."""


class _Silent(Communicator):
    """A communicator in all that can be asked of it; it carries nothing."""

    def __init__(self, communicator: Communicator):
        self._communicator = communicator
        self.__dict__.update({name: getattr(communicator, name) for name in _FACTS})

    def __getattr__(self, name: str) -> Any:  # what some communicators have besides
        return getattr(self._communicator, name)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise _Collective

    all_reduce = reduce_scatter = all_gather = broadcast = barrier = _refuse


_FACTS = ("backend", "rank", "world_size", "name", "timeout", "numerics", "overlap_modes")


def _silent(group: TPGroup) -> TPGroup:
    return TPGroup(
        _Silent(group.communicator),
        ranks=group.ranks,
        device_type=group.device_type,
        process_group=group.process_group,
        choice=group.choice,
        device=group.device,
    )
