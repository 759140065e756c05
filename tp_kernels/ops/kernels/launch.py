"""The one place where kernels are launched: on the GPU, in Triton's interpreter, or recorded for compilation.

A launch is ``kernel[grid](*args, **constexprs, num_warps=...)``, as Triton has it; what is added here costs two dict
operations. Under :func:`recording` nothing runs: launches are collected with their real arguments (meta tensors will
do), so that the ahead-of-time check compiles exactly what would have been launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

__all__ = ["INTERPRETED", "AotCase", "Launch", "launch", "meta", "recording"]

# Read by Triton when a kernel is decorated, hence fixed for the life of the process.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class AotCase:
    """A launch that must compile well.

    Args:
        name: unique within its module.
        call: does the launches with meta tensors; run under ``recording`` and ``pretend``.
        capabilities: compute capabilities it is compiled for, e.g. ``(80, 90)``.
        wgmma, tma, wide_loads, pdl: instructions that must (True) or must not (False) be in the code for capability 90;
            None is no claim. ``wide_loads``: 16-byte global loads or asynchronous copies, on every capability.
        max_registers: most registers a thread.
        max_spill_bytes: most bytes of local memory a thread (the stack frame included).
    """

    name: str
    call: Callable[[], object]
    capabilities: tuple[int, ...] = (80, 90)
    wgmma: bool | None = None
    tma: bool | None = None
    wide_loads: bool | None = True
    pdl: bool | None = None
    max_registers: int = 255
    max_spill_bytes: int = 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory, for the launches of an ``AotCase``."""
    return torch.empty(shape, dtype=dtype, device="meta")


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    pdl: bool = False,
    maxnreg: int | None = None,
    **constexprs: Any,
) -> None:
    """Launch ``kernel`` over ``grid``; an empty grid is nothing to do.

    Args:
        kernel: a ``@triton.jit`` or ``@gluon.jit`` function.
        grid: one to three extents.
        args: positional arguments: tensors, tensor descriptors, numbers.
        num_warps, num_stages, maxnreg: as in Triton.
        pdl: programmatic dependent launch: the kernel may start while the one before it in the stream still runs, and
            must call ``gdc_wait`` before it touches anything that an earlier kernel reads or writes.
        constexprs: compile-time arguments by name.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        options = {"num_warps": num_warps, "num_stages": num_stages, **constexprs}
        if pdl:
            options["launch_pdl"] = True
        if maxnreg is not None:
            options["maxnreg"] = maxnreg
        _recorded.append(Launch(kernel, grid, args, options))
    elif INTERPRETED:
        kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
    else:
        if pdl:
            constexprs["launch_pdl"] = True
        if maxnreg is not None:
            constexprs["maxnreg"] = maxnreg
        device = _other_device(args) if _several_gpus() else None
        if device is None:
            kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
        else:
            with torch.cuda.device(device):
                kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)


@lru_cache(maxsize=1)
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _other_device(args: tuple[Any, ...]) -> int | None:
    """The GPU of the operands if it is not the current one, which is where Triton would launch."""
    for arg in args:
        tensor = getattr(arg, "base", arg)  # of a tensor descriptor
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            index = tensor.get_device()
            return None if index == torch.cuda.current_device() else index
    return None
