"""Timing on a GPU: what is captured, and what is left when it cannot be. Tiers: no device, GPU."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from tp_kernels.testing import gpu_timer


class FakeCuda:
    """``torch.cuda`` as far as timing needs it: 0.1 ms a call, and captures that end as ``refuses`` says."""

    def __init__(self):
        self.refuses = False
        self.underway: list = []
        self.calls: list[tuple] = []
        self.current = SimpleNamespace(device_index=0, device="cuda:0", name="default")

    def install(self, patch):
        for name in ("CUDAGraph", "Stream", "Event", "graph"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        patch.setattr(torch.cuda, "current_stream", lambda: self.current)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        patch.setattr(torch.cuda, "stream", nullcontext)
        patch.setattr(torch.cuda, "synchronize", lambda: self.calls.append(("synchronize",)))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", lambda *pool: self.calls.append(("release", *pool)), raising=False)
        patch.setattr(torch, "zeros", lambda *sizes, **options: self.calls.append(("zeros", bool(self.underway))))
        return self

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.calls.append(("replay",)))

    def Stream(self):
        return SimpleNamespace(device_index=0, name="side", wait_stream=lambda _: None, synchronize=lambda: None)

    def Event(self, enable_timing):
        return SimpleNamespace(record=lambda _=None: None, synchronize=lambda: None, elapsed_time=lambda _: 0.3)

    @contextmanager
    def graph(self, graph, pool=(0, 1), stream=None, capture_error_mode="global"):
        before, self.current = self.current, stream
        self.underway.append(pool)
        try:
            yield
        finally:
            if self.refuses:
                self.refuses = False  # the stream is as it was, and so is what PyTorch made of it
                raise RuntimeError("operation failed due to a previous error during capture")
            self.underway.remove(pool)
            self.current = before

    def end(self, device, pool):
        self.calls.append(("end", device, pool))
        if pool not in self.underway:
            raise RuntimeError("not currently recording to mempool_id")
        self.underway.remove(pool)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda().install(monkeypatch)


def test_a_turn_is_a_graph_of_as_many_calls_as_fill_it(cuda):
    seen = []
    play, calls, mode = gpu_timer._turn(seen.append, [("a",), ("b",), ("c",)], turn_ms=0.8)
    assert (calls, mode) == (8, "graph")
    assert seen == [*"ab", *"abc", *"abcabcab"]  # first calls, the estimate, the capture
    play()
    assert len(seen) == 13 and cuda.calls.count(("replay",)) == 2


def test_a_refused_capture_leaves_nothing_behind(cuda):
    cuda.refuses = True
    home, seen = cuda.current, []
    play, calls, mode = gpu_timer._turn(seen.append, [("a",)], turn_ms=0.2)
    assert (calls, mode) == (2, "eager")
    assert cuda.current is home and not cuda.underway
    # Of the pool, and then a capture that ends well.
    assert cuda.calls == [("synchronize",), ("end", 0, (0, 7)), ("release", 0, (0, 7)), ("zeros", True)]
    play()
    assert len(seen) == 1 + 3 + 2 + 2


def test_a_function_that_fails_in_a_capture_that_ends_well(cuda):
    def function():
        raise ValueError("cannot be captured")

    home = cuda.current
    assert gpu_timer._captured(function, cuda.Stream()) is None
    assert cuda.current is home and not cuda.underway
    assert ("release", 0, (0, 7)) not in cuda.calls  # the graph's own affair


@pytest.mark.gpu
def test_a_refused_capture_on_a_gpu():
    """Reading a value back cannot be captured; what follows works, on the stream it should be on."""
    x = torch.ones(1 << 20, device="cuda")
    home = torch.cuda.current_stream()
    measured = gpu_timer.time_competitors(
        {"reads": lambda t: t.sum().item(), "adds": lambda t: t + 1}, [(x,)], rounds=3
    )
    assert [one.mode for one in measured.values()] == ["eager", "graph"]
    assert torch.cuda.current_stream() == home
    assert torch.isfinite(torch.randn(8, device="cuda")).all()
    before = torch.cuda.memory_reserved()
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    held.record_stream(torch.cuda.Stream())
    del held
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
