"""``explain``: which path a call would take, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tp_kernels._native import native
from tp_kernels.ops._library import watched
from tp_kernels.ops.decode_attention import native_decode_reason
from tp_kernels.ops.linear import native_linear_reason
from tp_kernels.ops.norm import native_norm_reason
from tp_kernels.ops.qkv import native_qkv_reason
from tp_kernels.ops.swiglu import native_silu_mul_reason

__all__ = ["Path", "explain"]

_REASONS: dict[str, Callable[..., str | None]] = {
    "linear": native_linear_reason,
    "swiglu_linear": native_linear_reason,
    "silu_mul": native_silu_mul_reason,
    "rms_norm": native_norm_reason,
    "add_rms_norm": native_norm_reason,
    "qkv_rope_cache": native_qkv_reason,
    "decode_attention": native_decode_reason,
}
_TORCH_ONLY = ("attention", "apply_rope")


@dataclass(frozen=True)
class Path:
    """A path: ``name`` is "native-cpu" or "torch", ``reason`` says why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Path:
    """Which path ``op(*args, **kwargs)`` would take now, without running it.

    Args:
        op: an op of this package or its name, for example ``"linear"``.
        args, kwargs: as for the op; they must be valid for it.

    Example:
        >>> print(ops.explain("linear", x, weight))
        native-cpu: avx512 kernel, 2 threads
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name in _TORCH_ONLY:
        return Path("torch", "PyTorch's own kernels are the only path of this op")
    if name not in _REASONS:
        raise ValueError(f"expected one of {', '.join((*_REASONS, *_TORCH_ONLY))}, got {name!r}")
    reason = _REASONS[name](*args, **kwargs)
    if reason is not None:
        return Path("torch", reason)
    threads = torch.get_num_threads()
    through = ", through the dispatcher because a mode is active" if watched() else ""
    return Path("native-cpu", f"{native.cpu_isa()} kernel, {threads} thread{'s' if threads > 1 else ''}{through}")
