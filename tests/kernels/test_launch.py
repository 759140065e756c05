"""First launches inside a CUDA graph capture: the thread's capture mode around the load. Tier: no device.

A kernel and a driver that stand in for Triton's and CUDA's: the kernel calls Triton's own hooks as
``CompiledKernel._init_handles`` does, the driver refuses to load for a thread that captures in the default mode.
"""

import inspect
import threading

import pytest
import torch
import triton
from triton.compiler.compiler import CompiledKernel

from tp_kernels.ops.kernels import launch as module
from tp_kernels.ops.kernels.launch import launch

GLOBAL, RELAXED = 0, 2


class Driver:
    """libcuda's part: a capture mode for every thread."""

    def __init__(self):
        self.modes, self.capturing, self.exchanges = {}, False, 0

    def mode(self):
        return self.modes.get(threading.get_ident(), GLOBAL)

    def cuThreadExchangeStreamCaptureMode(self, pointer):
        value = pointer._obj
        before, self.modes[threading.get_ident()] = self.mode(), value.value
        value.value = before
        self.exchanges += 1
        return 0

    def load(self):
        if self.capturing and self.mode() != RELAXED:
            raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")


class Kernel:
    """Loaded by its first launch."""

    def __init__(self, driver, broken=False):
        self.driver, self.loaded, self.launches, self.broken = driver, False, 0, broken

    def __getitem__(self, grid):
        return self.run

    def run(self, *args, **options):
        if not self.loaded:
            triton.knobs.runtime.kernel_load_start_hook(None, None, "kernel", None, "hash")
            self.driver.load()
            if self.broken:
                raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
            triton.knobs.runtime.kernel_load_end_hook(object(), object(), "kernel", None, "hash")
            self.loaded = True
        self.launches += 1


@pytest.fixture
def driver(monkeypatch):
    found, runtime = Driver(), triton.knobs.runtime
    before = [list(chain.calls) for chain in (runtime.kernel_load_start_hook, runtime.kernel_load_end_hook)]
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "_driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    module._several_gpus.cache_clear()
    yield found
    module._several_gpus.cache_clear()
    for chain, calls in zip((runtime.kernel_load_start_hook, runtime.kernel_load_end_hook), before, strict=True):
        chain.calls[:] = calls


def test_a_first_launch_is_captured_and_the_mode_put_back(driver):
    driver.capturing = True
    kernel = Kernel(driver)
    for _ in range(3):
        launch(kernel, (1,), 5)
        assert driver.mode() == GLOBAL
    assert kernel.launches == 3 and driver.exchanges == 2


def test_nothing_is_asked_of_the_driver_without_a_capture(driver):
    launch(Kernel(driver), (1,))
    assert driver.exchanges == 0


def test_a_load_that_fails_leaves_the_mode_as_it_was(driver):
    driver.capturing = True
    with pytest.raises(RuntimeError, match="image is invalid"):
        launch(Kernel(driver, broken=True), (1,))
    assert driver.mode() == GLOBAL and driver.exchanges == 2
    launch(Kernel(driver), (1,))
    assert driver.mode() == GLOBAL and driver.exchanges == 4


def test_kernels_of_others_are_left_alone(driver):
    launch(Kernel(driver), (1,))
    driver.capturing = True
    with pytest.raises(RuntimeError, match="not permitted"):
        Kernel(driver)[1,]()
    assert driver.exchanges == 0


def test_a_thread_changes_its_own_mode_only(driver):
    driver.capturing = True
    seen = []

    class Watching(Kernel):
        def run(self, *args, **options):
            triton.knobs.runtime.kernel_load_start_hook(None, None, "kernel", None, "hash")
            other = threading.Thread(target=lambda: seen.append((driver.mode(), module._mode.before)))
            other.start()
            other.join()
            triton.knobs.runtime.kernel_load_end_hook(None, None, "kernel", None, "hash")

    launch(Watching(driver), (1,))
    assert seen == [(GLOBAL, None)] and driver.mode() == GLOBAL


def test_without_a_driver_the_launch_goes_on(driver, monkeypatch):
    monkeypatch.setattr(module, "_driver", lambda: None)
    driver.capturing = True
    with pytest.raises(RuntimeError, match="not permitted"):
        launch(Kernel(driver), (1,))


def test_triton_calls_the_hooks_around_the_load():
    """Of the version at hand, plain Triton and Gluon kernels alike: both become a ``CompiledKernel``."""
    source = inspect.getsource(CompiledKernel._init_handles)
    start, load, end = (
        source.index(word) for word in ("kernel_load_start_hook(", "utils.load_binary(", "kernel_load_end_hook(")
    )
    assert start < load < end
