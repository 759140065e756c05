"""What benchmarks over ranks share: how they come to their ranks, and graphs timed in turns by the slowest of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tp_kernels.testing.bench import Timing, write_csv

__all__ = ["captured", "cases_in_time", "keep_rows", "measure_on_ranks", "time_graphs", "time_turns"]

_LIMIT_S = 3600.0
# Of a collective between hosts: ranks compile the same kernels, but not at the same time.
_GROUP_TIMEOUT_S = 120.0
_WARMUP = 2


def measure_on_ranks(
    measure: Callable[..., list[dict[str, Any]]], options: Any, *, ranks: int, device: str = "cuda", no_gpu: str = ""
) -> list[dict[str, Any]] | None:
    """Call ``measure(group, options)`` on every rank; the rows of rank 0.

    Run by ``tp-kernels launch`` or torchrun, this process is one of the ranks, and only the first gets rows. Otherwise
    ``ranks`` processes are started here: with a GPU each if there are so many, else all on one.

    Args:
        measure: at the top level of a module, the rows the same on all ranks. Its group is Gloo's on "cuda": what is
            measured it makes itself.
        options: can be pickled.
        device: "cuda", or "cpu" for ranks without a GPU, over the transport that they get by default.
        no_gpu: what to say, beside that there is no GPU here.
    Raises:
        ValueError: a GPU is needed and there is none.
    """
    backend = "gloo" if device == "cuda" else "auto"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from tp_kernels.comm import ProcessGroupManager

        with ProcessGroupManager.initialize(backend=backend, device=device) as manager:
            rows = measure(manager.tp_group, options)
            return None if manager.rank else rows
    import torch

    from tp_kernels.testing.one_gpu_ranks import OneGpuRanks
    from tp_kernels.testing.rank_pool import RankPool

    if device == "cpu":
        with RankPool(ranks) as pool:
            return pool.run(measure, options, timeout=_LIMIT_S)[0]
    if not torch.cuda.is_available():
        raise ValueError(f"there is no GPU here; {no_gpu}")
    if torch.cuda.device_count() >= ranks:
        own = lambda rank: {"LOCAL_RANK": str(rank)}  # noqa: E731
        with RankPool(ranks, backend=backend, device=device, environment=own, group_timeout=_GROUP_TIMEOUT_S) as pool:
            return pool.run(measure, options, timeout=_LIMIT_S)[0]
    with OneGpuRanks() as shared:
        pool = shared(ranks, backend=backend, group_timeout=_GROUP_TIMEOUT_S)
        print(f"# {shared.shared_gpu.describe(ranks)}", flush=True)
        return pool.run(measure, options, timeout=_LIMIT_S)[0]


def keep_rows(group, csv: str | None, rows: list[dict[str, Any]]) -> None:
    """Rank 0 writes what there is so far, after each case: a run may be ended before its last. None writes nothing."""
    if csv and group.rank == 0:
        write_csv(csv, rows)


def cases_in_time(
    group, cases: Sequence[Any], minutes: float, started: float, *, share: float = 1.0, what: str = "cases"
) -> Iterator[Any]:
    """Those of ``cases`` that begin within so many minutes, by the first rank's clock; it names the others.

    Args:
        group: of the ranks, with a CPU transport; all of them ask for the same cases.
        cases: in the order of measurement.
        minutes: of the whole run.
        started: of this rank's ``time.monotonic()``, when the minutes began.
        share: of the minutes that these cases may begin in.
        what: they are called.
    """
    import torch

    for index, case in enumerate(cases):
        over = torch.tensor([int(time.monotonic() > started + 60 * minutes * share)])
        if group.broadcast(over, 0).item():
            if group.rank == 0:
                names = ", ".join(map(str, cases[index:]))
                print(f"# left out: {what} because --minutes {minutes:g} were over: {names}", flush=True)
            return
        yield case


def captured(function: Callable[[], Any], calls: int = 1):
    """A CUDA graph of ``calls`` calls, after one outside it."""
    import torch

    from tp_kernels._capture import capture_graph

    function()
    torch.cuda.synchronize()

    def play() -> None:
        for _ in range(calls):
            function()

    return capture_graph(play, stream=torch.cuda.Stream())


def time_graphs(group, symm, graphs: Mapping[str, Any], calls: int, rounds: int) -> dict[str, Timing]:
    """Replay the graphs in turns; seconds per call, each round as long as its slowest rank.

    Args:
        group: of the ranks, with a CPU transport.
        symm: a ``SymmetricMemoryCommunicator`` of the same ranks, over which they meet before each turn.
        graphs: the same names in the same order on all ranks.
        calls: in each graph.
        rounds: timed turns of each graph.
    """
    return time_turns({name: graph.replay for name, graph in graphs.items()}, calls, rounds, group=group, symm=symm)


def time_turns(
    plays: Mapping[str, Callable[[], Any]],
    calls: int,
    rounds: int,
    *,
    resets: Mapping[str, Callable[[], Any]] | None = None,
    group: Any = None,
    symm: Any = None,
) -> dict[str, Timing]:
    """Play in turns on a GPU, between events; seconds per call, each round as long as its slowest rank.

    Args:
        plays: what is timed, by name; the same names in the same order on all ranks.
        calls: what one play counts as.
        rounds: timed turns of each.
        resets: by name, what is called before a turn and not timed.
        group: of the ranks, with a CPU transport; None for one rank.
        symm: a communicator of the same ranks' GPUs, over which they meet before each turn.
    """
    import torch

    ping = torch.zeros(4, device="cuda")
    at_once = {"algorithm": "one_shot"} if getattr(symm, "backend", "") == "symm" else {}
    seconds: list[list[float]] = []
    for _ in range(rounds + _WARMUP):
        seconds.append([])
        for name, play in plays.items():
            if resets is not None:
                resets[name]()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if group is None:
                torch.cuda.synchronize()
            else:
                group.barrier()
                # Ranks meet on the GPU, then idle there until all hosts have sent their work.
                symm.all_reduce(ping, out=ping, **at_once)
                torch.cuda._sleep(100_000)
            start.record()
            play()
            end.record()
            end.synchronize()
            seconds[-1].append(start.elapsed_time(end) * 1e-3 / calls)
    slowest = torch.tensor(seconds[_WARMUP:], dtype=torch.float64)
    if group is not None:
        slowest = group.all_reduce(slowest, "max")
    return {name: Timing.of(column) for name, column in zip(plays, slowest.t().tolist(), strict=True)}
