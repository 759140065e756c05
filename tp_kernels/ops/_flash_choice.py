"""Which path flash attention takes on a GPU: a pure function of shapes, dtypes, options, GPU and tuning table."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tp_kernels.ops import tuning
from tp_kernels.ops._flash_reference import Form
from tp_kernels.ops._gpu import gpu_of, kernels_reason
from tp_kernels.ops._library import PLAIN_TYPES

__all__ = ["choose", "choose_backward", "fits", "gluon_module", "sdpa_takes", "unfit_reason"]

_HALF = frozenset((torch.bfloat16, torch.float16))
_OWN = ("gluon", "triton")
MAX_HEAD_DIM = 256  # ops.kernels.flash_attention


def fits(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the own kernels take such operands; asked by traced code, too."""
    dim = q.shape[-1]
    dtypes = q.dtype in _HALF and k.dtype == q.dtype and v.dtype == q.dtype
    return dtypes and 8 <= dim <= MAX_HEAD_DIM and dim % 8 == 0 and scale > 0 and q.shape[1] > 0


def unfit_reason(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why no own kernel takes the call; None if one does."""
    reason = kernels_reason(q)
    if reason is not None:
        return reason
    for other in (k, v):
        if type(other) not in PLAIN_TYPES:
            return f"an operand is a {type(other).__name__}"
        if other.device != q.device:
            return "the operands are on different devices"
    if not fits(q, k, v, scale):
        return (
            f"the kernels take bfloat16 or float16, head_dim in steps of 8 up to {MAX_HEAD_DIM}, a positive scale; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}, {q.shape[1]} heads of {q.shape[-1]}, scale {scale:g}"
        )
    return None


def sdpa_takes(q: Tensor, k: Tensor, form: Form, needs_lse: bool) -> bool:
    """Whether PyTorch's flash kernels can do this call: no mask tensor, no lse."""
    if form.cu_q is not None or needs_lse:
        return False
    length, kv_len = q.shape[2], k.shape[2]
    return (form.window is None or form.window >= kv_len) and (not form.causal or length == kv_len or length == 1)


@lru_cache(maxsize=2)
def gluon_module(backward: bool = False) -> Any:
    """The Hopper kernels' module; None where this Triton has no Gluon, or interprets."""
    try:
        from tp_kernels.ops.kernels.launch import INTERPRETED

        if backward:
            from tp_kernels.ops.kernels import gluon_flash_backward as module
        else:
            from tp_kernels.ops.kernels import gluon_flash_attention as module
    except ImportError:
        return None
    return None if INTERPRETED else module


def _gluon_takes(q: Tensor, k: Tensor, v: Tensor, form: Form, backward: bool) -> bool:
    module = gluon_module(backward)
    if module is None:
        return False
    call = (gpu_of(q), q.dtype, q.shape[-1], q, k, v, form.causal, form.window, form.cu_q is not None)
    return module.unsupported_reason(*call) is None


def _measured(op: str, q: Tensor, form: Form) -> tuning.Entry | None:
    """What was measured nearby of "flash_attention" or "flash_attention_backward"."""
    batch = q.shape[0] if form.cu_q is None else form.cu_q.shape[0] - 1
    sizes = {"d": q.shape[-1], "q": form.max_q, "k": form.max_k, "heads": batch * q.shape[1]}
    sizes["causal"] = int(form.causal)
    return tuning.lookup(op, gpu_of(q), q.dtype, **sizes)


def _own(
    entry: tuning.Entry | None, q: Tensor, k: Tensor, v: Tensor, form: Form, why: str, backward: bool = False
) -> tuning.Choice:
    """The fastest own kernel that takes the call."""
    if entry is None:
        return tuning.Choice("triton", f"not measured on {gpu_of(q).name}; {why}")
    path = _fastest(entry)
    if path == "gluon" and not _gluon_takes(q, k, v, form, backward):
        path = "triton"
    config = entry.config if path == entry.path else {}
    return tuning.Choice(path, f"{why}; measured on {entry.source}: {entry.figures()}", config)


def _fastest(entry: tuning.Entry) -> str:
    return min(reversed(_OWN), key=lambda name: entry.us.get(name, math.inf))


def choose_backward(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuning.Choice:
    """Which of our backward kernels follows our forward; the operands passed ``unfit_reason``."""
    entry = _measured("flash_attention_backward", q, form)
    return _own(entry, q, k, v, form, "the forward pass was ours", backward=True)


def choose(
    q: Tensor, k: Tensor, v: Tensor, form: Form, *, needs_lse: bool = False, training: bool = False
) -> tuning.Choice:
    """Path of the forward pass; with ``training`` it is "torch" for both passes or ours for both."""
    reason = unfit_reason(q, k, v, form.scale)
    if reason is not None:
        return tuning.Choice("torch", reason)
    entry = _measured("flash_attention", q, form)
    if not sdpa_takes(q, k, form, needs_lse):
        return _own(entry, q, k, v, form, "PyTorch would need a mask tensor, or has no lse to give")
    backward = _measured("flash_attention_backward", q, form) if training else None
    if entry is None or (training and backward is None):
        return tuning.Choice("torch", f"not measured on {gpu_of(q).name}; PyTorch has flash kernels for plain calls")
    if not training:
        if entry.path == "torch":
            return tuning.Choice("torch", f"measured on {entry.source}: {entry.figures()}")
        return _own(entry, q, k, v, form, "faster than PyTorch")
    ours = sum(each.us.get(_fastest(each), math.inf) for each in (entry, backward))
    theirs = entry.us.get("torch", math.inf) + backward.us.get("torch", math.inf)
    both = f"forward and backward take {ours:.1f} us ours, {theirs:.1f} us PyTorch's"
    if ours >= theirs:
        return tuning.Choice("torch", f"measured on {entry.source}: {both}")
    return _own(entry, q, k, v, form, both)
