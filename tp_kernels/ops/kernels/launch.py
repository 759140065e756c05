"""The one place where kernels are launched: on the GPU, in Triton's interpreter, or recorded for compilation.

A launch is ``kernel[grid](*args, **constexprs, num_warps=...)``, as Triton has it; what is added here costs two dict
operations. Under :func:`recording` nothing runs: launches are collected with their real arguments (meta tensors will
do), so that the ahead-of-time check compiles exactly what would have been launched.

A kernel is loaded into the driver by its first launch. Should that come inside a CUDA graph capture, CUDA would refuse
to load it and spoil the capture; see ``_relax_capture``.
"""

from __future__ import annotations

import ctypes
import sys
import threading
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
        try:
            if device is None:
                kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
            else:
                with torch.cuda.device(device):
                    kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
        except BaseException:
            _restore_capture()  # Triton does not say that a load has failed
            raise


@lru_cache(maxsize=1)
def _several_gpus() -> bool:
    """Asked for by the first launch, which is also when loading is prepared for."""
    triton.knobs.runtime.kernel_load_start_hook.add(_relax_capture)
    triton.knobs.runtime.kernel_load_end_hook.add(_restore_capture)
    return torch.cuda.device_count() > 1


def _other_device(args: tuple[Any, ...]) -> int | None:
    """The GPU of the operands if it is not the current one, which is where Triton would launch."""
    for arg in args:
        tensor = getattr(arg, "base", arg)  # of a tensor descriptor
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            index = tensor.get_device()
            return None if index == torch.cuda.current_device() else index
    return None


# First launches inside a capture -------------------------------------------------------------------------------------


class _CaptureMode(threading.local):
    before: int | None = None  # this thread's mode, while it is changed


_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_mode = _CaptureMode()


def _relax_capture(*_: Any) -> None:
    """Before Triton loads a kernel: let this thread load it although its stream is being captured.

    CUDA forbids a capturing thread "potentially unsafe" calls, those that act at once and are not part of the graph.
    Memory that a replay would have to allocate again is the case in point; cuModuleLoadData is another such call, but
    code that is loaded once and stays is what a replay needs. For such calls CUDA has cuThreadExchangeStreamCaptureMode
    with CU_STREAM_CAPTURE_MODE_RELAXED, to be put around them; PyTorch's allocator and NCCL use it in captures. Only
    the calling thread's rules change, neither the capture nor other threads. Where a driver refuses all the same (CUDA
    before 12.3), the launch fails as it did without this.

    Triton calls its hooks for no launch but those that load, so launches pay nothing. Kernels of others are left alone.
    """
    if _mode.before is None and torch.cuda.is_current_stream_capturing() and _is_our_launch():
        _mode.before = _exchange_mode(_RELAXED)


def _restore_capture(*_: Any) -> None:
    """After the load, whether it succeeded or not."""
    if _mode.before is not None:
        before, _mode.before = _mode.before, None
        _exchange_mode(before)


def _is_our_launch() -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not launch.__code__:
        frame = frame.f_back
    return frame is not None


def _exchange_mode(mode: int) -> int | None:
    """Set the calling thread's capture mode; returns the one before, None where there is no driver to ask."""
    value = ctypes.c_int(mode)
    driver = _driver()
    if driver is None or driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(value)) != 0:
        return None
    return value.value


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
