"""Recording a decode step: as a CUDA graph, and when there cannot be one.

Programmatic dependent launch, which the kernels ask for by themselves, is a property of a launch that a capture turns
into an edge of the graph (CUDA documents it so); nothing has to be asked for here.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from tp_kernels._capture import capture_graph
from tp_kernels.comm.errors import CommError
from tp_kernels.comm.policy import BackendUnavailableError

if TYPE_CHECKING:
    from tp_kernels.comm.tp_group import TPGroup

__all__ = ["BATCH_SIZES", "CaptureFailed", "CudaRecorder", "StepGraphs", "holds_anywhere", "ladder"]

# Rows are padded to the next of these: at most 7 rows too many, and 35 graphs at the most.
BATCH_SIZES = (1, 2, 4, *range(8, 257, 8))


def ladder(max_batch: int) -> tuple[int, ...]:
    """Batch sizes worth a graph for up to ``max_batch`` rows; the last takes them all."""
    return tuple(size for size in BATCH_SIZES if size < max_batch) + (max_batch,)


def holds_anywhere(group: TPGroup, condition: bool) -> bool:
    """Whether ``condition`` holds on any rank. Collective; waits for the device."""
    if group.world_size == 1:
        return condition
    mine = torch.full((1,), float(condition), device=group.device)
    return bool(group.all_reduce(mine, "max").item())


def graph_reason(device: torch.device, group: TPGroup) -> str | None:
    """Why steps on ``device`` over ``group`` cannot be captured; None if they can."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, whose copies of the weights a CUDA graph would outlive"
    if group.world_size > 1 and group.backend in ("shm", "gloo"):
        return f"the {group.backend} communicator goes through host memory, which a CUDA graph cannot capture"
    return None


class CaptureFailed(RuntimeError):
    """A step could not be captured; the device is as before."""


@lru_cache(maxsize=16)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Makes CUDA graphs that share one pool of memory, as they never run at the same time.

    Args:
        device: of everything that is captured.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._stream = _capture_stream(device)

    def record(self, warm_up: Callable[[], Any], function: Callable[[], Any]) -> Callable[[], None]:
        """A function that replays what ``function`` does to the device.

        Args:
            warm_up: runs the same kernels before, so that they are compiled and have their workspaces.
            function: allocates nothing that it leaves behind, and waits for nothing.

        Raises:
            CaptureFailed: something in it cannot be captured.
            CommError: of a communicator that broke.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.device(self._device):
            with torch.cuda.stream(self._stream):
                warm_up()
            current.wait_stream(self._stream)
            torch.cuda.synchronize(self._device)
            if not self._alive:  # PyTorch may refuse the pool of graphs that are all gone ("use_count > 0")
                self._pool = torch.cuda.graph_pool_handle()
            try:
                graph = capture_graph(function, stream=self._stream, pool=self._pool)
            except BackendUnavailableError as error:
                raise CaptureFailed(str(error)) from error
            except CommError:
                raise
            except Exception as error:
                reason = next(iter(str(error).splitlines()), "")[:200]
                raise CaptureFailed(f"{type(error).__name__}: {reason}") from error
        self._alive.add(graph)

        def replay() -> None:
            with torch.cuda.device(self._device):  # a graph goes to the current stream of the current device
                graph.replay()

        return replay


class StepGraphs:
    """The graphs of an engine's steps by their kind, each recorded when it is first asked for.

    Args:
        device: of everything that a step touches.
        group: the ranks; all of them ask for the same graphs in the same order.
        capture: as for ``DecodeEngine``.

    Attributes:
        reason: why steps run eagerly; None if they are captured.

    Raises:
        ValueError: ``capture=True``, and nothing can be captured.
    """

    def __init__(self, device: torch.device, group: TPGroup, capture: bool | None):
        self._device, self._group, self._must = device, group, bool(capture)
        self.reason = "capture=False" if capture is False else graph_reason(device, group)
        if self._must and self.reason is not None:
            raise ValueError(f"capture=True: {self.reason}")
        self._recorder = CudaRecorder(device) if self.reason is None else None
        self._graphs: dict[Hashable, Callable[[], None]] = {}

    def get(self, kind: Hashable, step: Callable[[], Any], warm_up: Callable[[], Any]) -> Callable[[], Any]:
        """What runs ``step``: its graph, or itself where nothing is captured.

        Args:
            kind: the same for steps that one graph can stand for.
            step, warm_up: see ``CudaRecorder.record``.

        Raises:
            ValueError: ``capture=True``, and the step cannot be captured on some rank.
        """
        if self.reason is not None:
            return step
        if kind not in self._graphs:
            graph, failure = None, ""
            try:
                graph = self._recorder.record(warm_up, step)
            except CaptureFailed as error:
                failure = str(error)
            if holds_anywhere(self._group, bool(failure)):  # then none may replay
                failure = failure or "another rank could not capture the step"
                if self._must:
                    raise ValueError(f"capture=True: {failure}")
                warnings.warn(f"tp_kernels: decode steps run without a CUDA graph: {failure}", stacklevel=4)
                self.clear()
                self.reason = failure
                return step
            self._graphs[kind] = graph
        return self._graphs[kind]

    def __contains__(self, kind: Hashable) -> bool:
        return kind in self._graphs

    def drop(self, unwanted: Callable[[Any], bool]) -> None:
        """Free the graphs of the kinds for which ``unwanted(kind)`` holds."""
        kinds = [kind for kind in self._graphs if unwanted(kind)]
        if kinds and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # one of them may be running, in memory that others then get
        for kind in kinds:
            del self._graphs[kind]

    def clear(self) -> None:
        """Free all graphs."""
        self._graphs.clear()
