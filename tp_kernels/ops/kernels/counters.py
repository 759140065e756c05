"""Zeroed counters for kernels whose last arrival finishes the work of a launch.

Such a kernel needs one int32 zero an output block before it starts and leaves zeros behind, so nothing has to be
cleared between launches, as long as no two launches that can run at the same time use the same counter:

- Eager launches of one stream run one after the other: they share the counters of that (device, stream).
- A launch that is being captured runs whenever the graph is replayed, in any stream, beside eager launches of the
  stream it was captured in. It gets counters that no other launch, captured or not, ever gets. They come from a block
  that is zeroed once, at the first eager use of the device (a warm-up precedes every capture), and are not given back:
  4 bytes a counter, 256 Ki counters a device. A capture that finds none left, or no block at all, allocates its own
  and captures their zeroing with it: one more node in the graph, the same result.

What lasts is allocated by a thread of its own. The first run of what ``torch.compile(mode="reduce-overhead")`` made is
a warm-up whose thread allocates from the pool of the graph to come: whatever stays there, and is no output, is an error
of Inductor's, and replays would write over it.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["forget_captures", "take_counters"]

_CAPTURED = 1 << 18  # counters for captured launches, 1 MiB a device
_EAGER = 1 << 12  # fewest counters of a stream

_blocks: dict[int, Tensor] = {}
_of_stream: dict[tuple[int, int], Tensor] = {}
_for_captures: dict[int, Tensor] = {}  # what is left of the block of a device
_capturing = threading.Lock()


def take_counters(x: Tensor, count: int) -> Tensor:
    """At least ``count`` int32 zeros on the device of ``x`` for one launch in the current stream."""
    if not x.is_cuda:
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    index = x.get_device()
    if torch.cuda.is_current_stream_capturing():
        # In whole lines of 32, so that launches that run at once do not share a cache line.
        wanted = -(-count // 32) * 32
        with _capturing:
            left = _for_captures.get(index)
            if left is not None and left.numel() >= wanted:
                _for_captures[index] = left[wanted:]
                return left[:wanted]
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    stream = torch.cuda.current_stream(index)
    key = (index, stream.cuda_stream)
    counters = _of_stream.get(key)
    if counters is None or counters.numel() < count:
        # Zeroed in the stream that uses it; an outgrown one is freed into the same stream.
        counters = _of_stream[key] = _lasting_zeros(max(count, _EAGER), x.device, stream)
        if index not in _for_captures:
            block = _lasting_zeros(_CAPTURED, x.device, stream)
            # Graphs are replayed in any stream: once in the life of the process the zeros are waited for here.
            stream.synchronize()
            _blocks[index] = _for_captures[index] = block
    return counters


def _lasting_zeros(count: int, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    """Zeros, written on ``stream``, in memory of no pool that this thread allocates from at the moment."""

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(count, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def forget_captures() -> None:
    """Give captured launches' counters out anew: for a benchmark that captures and drops thousands of graphs.

    No graph captured before may be replayed afterwards.
    """
    with _capturing:
        _for_captures.update(_blocks)
