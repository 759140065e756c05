"""CUDA graph capture that leaves PyTorch as it was when it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

__all__ = ["capture_graph"]


def capture_graph(function: Callable[[], Any], *, stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what ``function`` does to the current device.

    Args:
        function: allocates nothing that it leaves behind, and waits for nothing.
        stream: of the current device, for the capture.
        pool: that the graph's memory comes from; None for one of its own.

    Raises:
        Exception: what ``function`` raised, or else what CUDA refused; PyTorch is as it was before.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    raised: Exception | None = None
    try:
        # Other threads (of NCCL, say) may go on asking CUDA for this and that.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                function()
            except Exception as error:
                raised = error  # what follows from it, at the end of the capture, would hide it
                raise
    except Exception as error:
        _end_failed_capture(before, stream, pool)
        if raised is None or raised is error:
            raise
        raise raised from None
    finally:
        raised = None  # it holds this frame, and the frame the step: they would wait for the collector
    return graph


def _end_failed_capture(before: torch.cuda.Stream, stream: torch.cuda.Stream, pool: Any) -> None:
    """Do what PyTorch (2.11 and 2.14) leaves undone where CUDA refuses to end a capture.

    The capturing stream stays the current one; the allocator believes that the capture goes on, and frees nothing that
    several streams have used; and so does the random generator, which then refuses to draw.
    """
    torch.cuda.set_stream(before)
    torch.cuda.synchronize()
    with suppress(RuntimeError):  # the allocator knows: the capture itself ended well
        torch._C._cuda_endAllocateToPool(before.device_index, pool)
        torch._C._cuda_releasePool(before.device_index, pool)
    # One that ends well frees the generator.
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device=before.device)
