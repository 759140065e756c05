"""Which GPU a tensor is on, as the choice of kernels sees it; no Triton and no CUDA initialisation at import.

Every choice of path or configuration is a pure function of shapes, dtypes and a :class:`GpuInfo`. Tests, and the check
that compiles kernels without a GPU, ``pretend`` to have one: then CPU tensors (Triton's interpreter) or meta tensors
(recorded launches) take the paths that CUDA tensors take on that GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tp_kernels.ops import _library
from tp_kernels.ops._library import PLAIN_TYPES

__all__ = [
    "A100",
    "H100",
    "GpuInfo",
    "autocast_dtype",
    "gpu_of",
    "kernels_reason",
    "on_gpu",
    "pretend",
    "takes_kernels",
    "under_autocast",
]

_functorch_active = torch._C._are_functorch_transforms_active


@dataclass(frozen=True)
class GpuInfo:
    """What a choice may depend on: product name, compute capability, number of multiprocessors visible."""

    name: str
    capability: tuple[int, int]
    num_sms: int

    @property
    def slug(self) -> str:
        """Name of the tuning table: "h100", "h200", "a100", ..., else the product name in lower case."""
        words = self.name.lower().replace("-", " ").split()
        for word in words:
            if word in ("h100", "h200", "h800", "a100", "a800", "l4", "l40", "l40s", "a10", "a10g", "b200", "gh200"):
                return word
        return "-".join(words)

    @property
    def hopper(self) -> bool:
        """Compute capability 9.x: wgmma, TMA, programmatic dependent launch."""
        return self.capability[0] == 9

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors are hardware (capability 9 and above)."""
        return self.capability[0] >= 9

    @property
    def has_pdl(self) -> bool:
        """Whether kernels may be launched with programmatic dependent launch."""
        return self.capability[0] >= 9

    @property
    def max_shared(self) -> int:
        """Most bytes of shared memory of one block."""
        major, minor = self.capability
        if major in (9, 10):
            return 232_448
        return 166_912 if (major, minor) in ((8, 0), (8, 7)) else 101_376


H100 = GpuInfo("NVIDIA H100 80GB HBM3", (9, 0), 132)
A100 = GpuInfo("NVIDIA A100-SXM4-80GB", (8, 0), 108)


@contextmanager
def pretend(info: GpuInfo) -> Iterator[GpuInfo]:
    """Treat CPU and meta tensors as tensors of ``info``; for tests under Triton's interpreter and recorded launches."""
    before, _library.pretended = _library.pretended, info
    try:
        yield info
    finally:
        _library.pretended = before


@lru_cache(maxsize=64)
def _info(index: int) -> GpuInfo:
    properties = torch.cuda.get_device_properties(index)
    return GpuInfo(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def gpu_of(x: Tensor) -> GpuInfo:
    """The GPU that ``x`` is on (or is pretended to be on).

    Raises:
        ValueError: ``x`` is on no GPU.
    """
    if x.is_cuda:
        return _info(x.get_device())
    if _library.pretended is None:
        raise ValueError(f"expected a CUDA tensor, got one on {x.device}")
    return _library.pretended


def on_gpu(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU (or is pretended to be); the question for traced code, which must not ask more."""
    return x.is_cuda or _library.pretended is not None


def takes_kernels(x: Tensor) -> bool:
    """Whether GPU kernels may be launched on ``x``: a plain tensor on a GPU that Triton knows, outside functorch."""
    return kernels_reason(x) is None


@lru_cache(maxsize=64)
def _unsupported_reason(info: GpuInfo) -> str | None:
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs"
    if info.capability < (8, 0):
        return f"compute capability {info.capability[0]}.{info.capability[1]} is below 8.0"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def kernels_reason(x: Tensor) -> str | None:
    """Why no GPU kernel may take ``x``, whatever the op; None if one may. The words of ``ops.explain``."""
    if not on_gpu(x):
        return f"the tensors are on {x.device.type}"
    if type(x) not in PLAIN_TYPES:
        return f"the input is a {type(x).__name__}"
    if _functorch_active():
        return "a functorch transform is active"
    return _unsupported_reason(gpu_of(x))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts matmul operands beside ``x`` now; None outside autocast.

    As in PyTorch, float64 is left alone.
    """
    kind = x.device.type
    if kind not in ("cuda", "cpu"):  # autocast does not know "meta", under which launches are recorded
        return None
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def under_autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The operands in autocast's dtype for the first of them; unchanged outside autocast."""
    dtype = autocast_dtype(x)
    tensors = (x, *others)
    return tensors if dtype is None else tuple(None if t is None else t.to(dtype) for t in tensors)
