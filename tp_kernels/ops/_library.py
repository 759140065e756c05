"""The only user of ``torch.library``, and the cheap guards in front of the native CPU kernels.

An op is registered once with ``define`` + ``impl`` + ``register_fake``, never with ``torch.library.custom_op``
(17-26 us a call against 2-4). Eager calls bypass the dispatcher altogether; traced code (``torch.compile``,
``torch.export``) sees one opaque op; calls that need a gradient take the plain PyTorch composition outside the op.

The public function of every op is therefore built like this:

    if watched():                    # traced, or a dispatch mode is active
        if not needs_grad(...): return _OP(...)
    elif plain_cpu(x) and not needs_grad(...):
        out = _native(...)           # None: the native kernel does not take this call
        if out is not None: return out
    _check(...)                      # ValueError with the offending shape or dtype
    return <op>_reference(...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CPU_DTYPES",
    "NAMESPACE",
    "PLAIN_TYPES",
    "define_op",
    "needs_grad",
    "new_like",
    "plain_cpu",
    "plain_reason",
    "watched",
]

NAMESPACE = "tp_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Codes of csrc/common/dtype.h for the dtypes that the CPU kernels take; one dict lookup is both the check and the code.
CPU_DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Types that have the memory they claim. A subclass (DTensor, a quantised weight) may not, and brings its own operators.
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))

# A GpuInfo while CPU tensors stand in for GPU tensors (``_gpu.pretend``).
pretended: Any = None

# Bound once: an attribute chain on torch costs as much as the call.
_grad_enabled = torch.is_grad_enabled
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", torch.is_autocast_enabled)
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_dynamo_compiling = torch.compiler.is_dynamo_compiling


def define_op(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``tp_kernels::<schema>`` and return its default overload.

    Args:
        schema: name, arguments and results in torch schema language.
        impl: eager implementation for every device; gradients are not recorded through it.
        fake: shapes and dtypes only, for tracing.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient would be recorded for any of the tensors."""
    return _grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def watched() -> bool:
    """Whether something watches the dispatcher (tracing, a dispatch mode), so that it must be shown the op.

    Dynamo takes the first call for True; outside it the call costs 0.05 us. Tracers without Dynamo run under a mode.
    """
    return _dynamo_compiling() or _dispatch_modes() > 0


def plain_cpu(x: Tensor) -> bool:
    """Whether ``x`` may be handed over as an address: a plain CPU tensor outside any transform.

    Subclasses (FakeTensor, DTensor), functorch wrappers and autocast regions take the PyTorch path.
    """
    return x.is_cpu and type(x) is Tensor and not _functorch_active() and not _any_autocast() and pretended is None


def plain_reason(x: Tensor, *others: Tensor | None) -> str | None:
    """Why no native CPU kernel may take ``x``, whatever the op; None if one may. The words of ``ops.explain``."""
    if not x.is_cpu:
        return f"the tensors are on {x.device.type}"
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    if _functorch_active():
        return "a functorch transform is active"
    if _any_autocast():
        return "autocast is on"
    if needs_grad(x, *others):
        return "a gradient is needed"
    if x.dtype not in CPU_DTYPES:
        return f"{x.dtype} has no native kernel"
    return None


def new_like(x: Tensor, width: int) -> Tensor:
    """Uninitialised tensor of ``x``'s shape with another last dimension; the usual ranks without building a Size."""
    dims = x.dim()
    if dims == 3:
        return x.new_empty(x.size(0), x.size(1), width)
    if dims == 2:
        return x.new_empty(x.size(0), width)
    return x.new_empty((*x.shape[:-1], width))
