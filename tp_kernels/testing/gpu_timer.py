"""Time competitors on a GPU: CUDA graphs, rotated inputs, interleaved rounds, medians.

Each competitor is captured into a graph of back-to-back calls, so host cost is out of the figure, and the graphs are
replayed in turns, so all of them see the same clock and the same neighbours. What cannot be captured (host syncs, a
backward pass whose forward ran elsewhere) is timed as eager calls between events, and says so. Without a GPU the calls
are timed on the host: good for trying a benchmark out, not for figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tp_kernels._capture import capture_graph
from tp_kernels.testing.bench import Timing

__all__ = ["Measured", "Roofs", "input_sets", "measure_roofs", "raise_if_lost", "time_competitors"]

_MAX_CALLS = 100


@dataclass(frozen=True)
class Measured:
    """Seconds per call, and how they were taken: "graph", "eager" or "host"."""

    timing: Timing
    mode: str


@dataclass(frozen=True)
class Roofs:
    """What this GPU reaches now: device copy in bytes/s (read + write), cuBLAS bf16 8192^3 in FLOP/s."""

    copy: float
    matmul: float


def input_sets(make: Callable[[], tuple[Any, ...]], bytes_per_set: int, device: str) -> list[tuple[Any, ...]]:
    """As many fresh inputs as it takes to miss the L2 (twice its size, at most 64 sets and 8 GB)."""
    if device != "cuda":
        return [make()]
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = -(-2 * l2 // max(1, bytes_per_set))
    affordable = max(1, (8 << 30) // max(1, bytes_per_set))
    return [make() for _ in range(max(1, min(wanted, affordable, 64)))]


def time_competitors(
    competitors: Mapping[str, Callable[..., Any]],
    sets: Sequence[tuple[Any, ...]],
    *,
    rounds: int = 15,
    turn_ms: float = 1.5,
    failures: dict[str, str] | None = None,
) -> dict[str, Measured]:
    """Time ``competitor(*inputs)`` for each competitor.

    Args:
        competitors: name to function of one set of inputs.
        sets: inputs; calls go round them.
        rounds: interleaved turns.
        turn_ms: about how long one turn of one competitor takes.
        failures: where the words of a competitor that raised go, and the others are timed; None raises.

    Returns:
        One entry a competitor, in the same order.
    """
    on_gpu = torch.cuda.is_available() and any(isinstance(value, torch.Tensor) and value.is_cuda for value in sets[0])
    if not on_gpu:
        return {name: _host(function, sets[0]) for name, function in competitors.items()}
    from tp_kernels.ops.kernels import counters

    turns = {}
    for name, function in competitors.items():
        try:
            turns[name] = _turn(function, sets, turn_ms)
        except Exception as error:  # out of memory with all sets of inputs there, say
            raise_if_lost(name)
            if failures is None:
                raise
            failures[name] = f"{type(error).__name__}: {str(error)[:160]}"
            torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, (play, calls, _) in turns.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            play()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) * 1e-3 / calls)
    modes = {name: mode for name, (_, _, mode) in turns.items()}
    turns.clear()  # with the graphs: what their launches held can be given out again
    counters.forget_captures()
    return {name: Measured(Timing.of(seconds[name][1:]), modes[name]) for name in seconds}


def raise_if_lost(what: str) -> None:
    """After an error: say whose it was if the CUDA context went with it, since then nothing after it can run.

    Raises:
        RuntimeError: the context is lost.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise RuntimeError(f"the CUDA context was lost by {what}: {str(error).splitlines()[0]}") from error


def _host(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Measured:
    started = time.perf_counter()
    function(*inputs)
    return Measured(Timing.of([time.perf_counter() - started]), "host")


def _turn(
    function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], turn_ms: float
) -> tuple[Callable[[], object], int, str]:
    """A function that plays one turn, its number of calls, and its mode."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets[:2]:
            function(*inputs)  # compiles, creates handles, allocates workspaces
        stream.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        for i in range(3):
            function(*sets[i % len(sets)])
        end.record(stream)
        end.synchronize()
    once_ms = max(start.elapsed_time(end) / 3, 1e-3)
    calls = max(1, min(_MAX_CALLS, round(turn_ms / once_ms)))

    def eager() -> None:
        for i in range(calls):
            function(*sets[i % len(sets)])

    graph = _captured(eager, stream)
    if graph is None:
        return eager, calls, "eager"
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, calls, "graph"


def _captured(function: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """A graph of what ``function`` does to the device; None if it cannot be captured."""
    try:
        return capture_graph(function, stream=stream)
    except Exception:
        return None


def measure_roofs() -> Roofs | None:
    """The two ceilings, measured now; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    generator = torch.Generator(device="cuda").manual_seed(0)
    source = torch.randint(0, 255, (1 << 30,), generator=generator, device="cuda", dtype=torch.uint8)
    pair = (source, torch.empty_like(source))
    copy = time_competitors({"copy": lambda s, t: t.copy_(s)}, [pair], rounds=9)["copy"].timing.median
    moved = 2 * source.numel()
    del source, pair
    a, b = (torch.randn(8192, 8192, generator=generator, device="cuda").bfloat16() for _ in range(2))
    matmul = time_competitors({"matmul": torch.matmul}, [(a, b)], rounds=9)["matmul"].timing.median
    return Roofs(moved / copy, 2 * 8192**3 / matmul)
