"""Where a pass's time goes, kernel by kernel: torch.profiler over one turn, and the gaps that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Profile", "Span", "profile_rows", "profiled", "summed_up"]

_NAME_LENGTH = 100


class Span(NamedTuple):
    """One kernel (or, on a CPU, one operator) as it ran, in microseconds."""

    name: str
    start: float
    end: float


class Profile(NamedTuple):
    """Microseconds of one pass.

    Attributes:
        kernels: name -> (launches a pass, microseconds a pass), the longest first.
        busy: in which at least one kernel ran. Less than the kernels' sum where launches overlap.
        gaps: in which none did, between the first and the last.
    """

    kernels: dict[str, tuple[float, float]]
    busy: float
    gaps: float


def profiled(play: Callable[[], Any], calls: int, on_gpu: bool) -> Profile:
    """Profile one ``play``, which stands for ``calls`` passes.

    Raises:
        RuntimeError: the profiler saw no kernel: it may lack the permission to, or CUPTI.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if on_gpu:
        torch.cuda.synchronize()  # what was sent before is not part of it
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        play()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted and event.cpu_parent is None
    ]
    if not spans:
        raise RuntimeError("torch.profiler saw no kernels")
    return summed_up(spans, calls)


def summed_up(spans: Iterable[Span], calls: int) -> Profile:
    """The profile of ``calls`` passes that ran as ``spans``, in any order."""
    ordered = sorted(spans, key=lambda span: span.start)
    sums: dict[str, tuple[float, float]] = {}
    busy, until = 0.0, ordered[0].start
    for name, start, end in ordered:
        count, total = sums.get(name, (0.0, 0.0))
        sums[name] = (count + 1 / calls, total + (end - start) / calls)
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    longest_first = dict(sorted(sums.items(), key=lambda item: -item[1][1]))
    return Profile(longest_first, busy / calls, (until - ordered[0].start - busy) / calls)


def profile_rows(common: dict[str, Any], found: Profile) -> list[dict[str, Any]]:
    """Rows of a CSV file: a kernel each, then the gaps; shares are of the time from the first kernel to the last."""
    whole = found.busy + found.gaps
    lines: Sequence[tuple[str, float, float]] = [(name, *figures) for name, figures in found.kernels.items()]
    return [
        {
            **common,
            "kernel": name[:_NAME_LENGTH],
            "launches": round(launches, 2),
            "us": round(us, 3),
            "us_each": round(us / launches, 3) if launches else "",
            "percent": round(100 * us / whole, 2) if whole else "",
        }
        for name, launches, us in (*lines, ("(no kernel running)", 0.0, found.gaps))
    ]
