"""``tp-kernels tune comm``: how long each communication path takes here, by dtype and size; what ``paths`` reads.

Runs on the ranks that it is to measure, started by ``tp-kernels launch`` or torchrun:

    tp-kernels launch --nproc 4 --one-gpu --module tp_kernels tune comm

Every path is checked for right sums, captured into a CUDA graph of several calls, and the graphs are replayed in turns,
the ranks meeting before each. A figure is the median over the rounds of the slowest rank. Which path a group takes is
decided later, inside its class of numerics: the table holds figures only.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tp_kernels import one_gpu
from tp_kernels._capture import capture_graph
from tp_kernels.comm.communicator import Communicator
from tp_kernels.comm.paths import (
    LAMPORT,
    MEASURED_DTYPES,
    NUMERICS,
    ONE_SHOT,
    SYMM,
    TRITON,
    allowed_paths,
    default_table,
    describe_bytes,
    ranges,
    table_file,
)
from tp_kernels.comm.routed import RoutedCommunicator
from tp_kernels.comm.symmetric_sizes import CUDA_ALGORITHMS, LAMPORT_BYTES

__all__ = ["SIZES", "order_of", "run", "spread", "summary", "table_of"]

SIZES = tuple(1 << k for k in range(11, 27))  # 2 KB to 64 MB
_WIDTH = 4096  # of the rows of all_reduce_norm
_ROUNDS, _TURN_MS, _MOST_CALLS = 9, 2.0, 50
_OPERATIONS = ("all_reduce", "all_reduce_norm", "all_gather")
_MOVES = ("all_gather",)  # bytes are bytes: measured once, with the first dtype
# dtype -> operation -> bytes -> path -> microseconds
Rows = dict[str, dict[str, dict[int, dict[str, float]]]]


def run(minutes: float = 10.0, out: Path | None = None) -> int:
    """Measure on the ranks of torchrun's environment and write the table on rank 0; exit status.

    Args:
        minutes: stop in an orderly way after this long; what is measured by then is written.
        out: where to, None is the file that later groups read.
    Raises:
        ValueError: without ranks or GPUs, or when there is only one path to measure.
    """
    from tp_kernels.comm import ProcessGroupManager

    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        raise ValueError(
            "`tune comm` measures the ranks it runs on: start it with `tp-kernels launch --nproc N [--one-gpu] "
            "--module tp_kernels tune comm`, or with torchrun"
        )
    if not torch.cuda.is_available():
        raise ValueError("`tune comm` measures between CUDA GPUs, and none is available here")
    deadline = time.monotonic() + 60 * minutes
    # All paths there are: which of them a group may take is its own choice, later.
    with ProcessGroupManager.initialize(device="cuda", numerics="any") as manager:
        group = manager.tp_group
        torch.cuda.set_device(group.device)
        if group.rank == 0 and one_gpu.ranks_on_this_gpu() > 1 and not one_gpu.has_mps():
            print("without MPS the ranks take turns on the GPU: these times say nothing about another day", flush=True)
        communicator = group.communicator
        if not isinstance(communicator, RoutedCommunicator) or not {"symm", "gloo"} <= set(communicator.transports):
            raise ValueError(f"there is nothing to choose from in this group:\n{group.choice}")
        rows = _measure(communicator, group.device, deadline)
        if group.rank == 0:
            name = torch.cuda.get_device_name(group.device)
            shared = one_gpu.ranks_on_this_gpu() > 1
            path = out or table_file(name, group.world_size, shared)
            content = table_of(rows, name, group.world_size, _versions())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            capability = torch.cuda.get_device_capability(group.device)
            table = default_table(group.world_size, capability, shared).with_measured(content)
            print("\n".join(summary(table, communicator.paths)), f"written to {path}", sep="\n", flush=True)
        group.barrier()
    return 0


def spread(sizes: Sequence[int]) -> list[int]:
    """The same sizes, the ends first and then ever finer: a run that is cut short has still seen the whole range."""
    order: list[int] = []
    step = len(sizes)
    while step >= 1:
        order += [size for size in sizes[::step] if size not in order]
        if sizes[-1] not in order:
            order.append(sizes[-1])
        step //= 2
    return order


def order_of(sizes: Sequence[int]) -> Iterator[tuple[int, str, str]]:
    """(bytes, dtype, operation) in the order of measurement: all dtypes of a size before the next size."""
    first = next(iter(MEASURED_DTYPES))
    for nbytes in sizes:
        for dtype in MEASURED_DTYPES:
            for operation in _OPERATIONS:
                if operation not in _MOVES or dtype == first:
                    yield nbytes, dtype, operation


def table_of(
    rows: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]],
    gpu: str,
    world_size: int,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The content of the table's file.

    Args:
        rows: dtype -> operation -> bytes -> path -> microseconds.
    """
    return {
        "gpu": gpu,
        "world_size": world_size,
        "measured": datetime.date.today().isoformat(),
        "versions": dict(versions),
        "us": {
            dtype: {
                operation: [
                    {"bytes": nbytes, "us": {path: round(us, 2) for path, us in sorted(figures.items())}}
                    for nbytes, figures in sorted(by_size.items())
                    if figures
                ]
                for operation, by_size in operations.items()
            }
            for dtype, operations in rows.items()
        },
    }


def summary(table: Any, available: Sequence[str]) -> list[str]:
    """What groups of each setting will take, in lines."""
    lines = []
    for operation in _OPERATIONS:
        for numerics in NUMERICS if operation == "all_reduce" else ("any",):
            allowed = allowed_paths(set(available) - {"gloo"}, numerics)
            setting = f' with numerics "{numerics}"' if operation == "all_reduce" else ""
            # Dtypes that take the same paths share a line.
            dtypes: dict[str, list[str]] = {}
            for dtype in MEASURED_DTYPES:
                parts = [
                    f"{path} up to {describe_bytes(limit)}" if limit is not None else f"{path} from there on"
                    for limit, path in ranges(operation, allowed, table, dtype)
                ]
                if parts:
                    dtypes.setdefault(", ".join(parts), []).append(dtype)
            for text, names in dtypes.items():
                which = "" if len(names) == len(MEASURED_DTYPES) else f" of {', '.join(names)}"
                lines.append(f"{operation}{which}{setting}: {text}")
    return lines


# On the ranks --------------------------------------------------------------------------------------------------------


def _measure(communicator: RoutedCommunicator, device: torch.device, deadline: float) -> Rows:
    rows: Rows = {}
    for nbytes, dtype, operation in order_of(spread(SIZES)):
        # The first rank's clock decides for all.
        over = torch.tensor([float(time.monotonic() > deadline)])
        if communicator.broadcast(over).item():
            break
        calls = _calls_of(operation, communicator, nbytes, device, getattr(torch, dtype))
        if calls:
            figures = _time_in_turns(calls, communicator, device)
            rows.setdefault(dtype, {}).setdefault(operation, {})[nbytes] = figures
            if communicator.rank == 0:
                best = ", ".join(f"{path} {us:.1f}" for path, us in sorted(figures.items()))
                print(f"{operation} {describe_bytes(nbytes)} {dtype}: {best} us", flush=True)
    return rows


def _calls_of(
    operation: str, communicator: RoutedCommunicator, nbytes: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], Any], Callable[[], bool]]]:
    """path -> (one call, whether its result is right), for the paths that take this size."""
    world, rank = communicator.world_size, communicator.rank
    total = float(world * (world + 1) // 2)  # exact in bf16 for any number of ranks of one box
    calls: dict[str, tuple[Callable[[], Any], Callable[[], bool]]] = {}
    paths = [path for path in communicator.paths if path != LAMPORT or nbytes <= LAMPORT_BYTES]
    size = dtype.itemsize
    if operation == "all_reduce":
        x = torch.full((nbytes // size,), rank + 1.0, dtype=dtype, device=device)
        # Plain sums in Triton are for groups that have nothing else.
        others = (SYMM, "gloo", TRITON) if ONE_SHOT in paths else (SYMM, "gloo")
        for path in paths:
            if path not in others:
                out = torch.empty_like(x)
                calls[path] = (_bind(communicator.all_reduce_by, path, x, out=out), _bind(_all_equal, out, total))
    elif operation == "all_gather" and "nccl" in paths:
        part = torch.full((nbytes // size // world,), rank + 1.0, dtype=dtype, device=device)
        for path in (SYMM, "nccl"):
            transport = communicator.transports[path]
            calls[path] = (_bind(transport.all_gather, part), _bind(_gathers, transport, part, world))
    elif operation == "all_reduce_norm" and nbytes >= size * _WIDTH and communicator.fuses_norm(_WIDTH, dtype):
        x = torch.full((nbytes // size // _WIDTH, _WIDTH), rank + 1.0, dtype=dtype, device=device)
        residual, weight = torch.ones_like(x), torch.ones(_WIDTH, dtype=dtype, device=device)
        for path in paths:
            algorithm = path.partition(":")[2]
            if algorithm in (*CUDA_ALGORITHMS, "triton"):
                call = _bind(communicator.all_reduce_add_rms_norm, x, residual, weight, 1e-6, algorithm=algorithm)
                calls[path] = (call, _bind(_sums_to, call, total + 1))
    return calls


def _bind(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*arguments, **options)


def _all_equal(x: torch.Tensor, value: float) -> bool:
    return bool((x == value).all())


def _gathers(transport: Communicator, part: torch.Tensor, world: int) -> bool:
    found = transport.all_gather(part).float().unique().tolist()
    return found == ([r + 1.0 for r in range(world)] if part.numel() else [])


def _sums_to(call: Callable[[], Any], value: float) -> bool:
    return _all_equal(call()[1], value)


def _time_in_turns(
    calls: Mapping[str, tuple[Callable[[], Any], Callable[[], bool]]],
    communicator: RoutedCommunicator,
    device: torch.device,
) -> dict[str, float]:
    """Microseconds of one call by path: graphs in turns, the slowest rank's median. A collective."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # the operands were filled there
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for path, (call, is_right) in calls.items():
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
            right = is_right()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            for _ in range(3):
                call()
            end.record(stream)
            end.synchronize()
        slowest_ms = _host_max(communicator, [start.elapsed_time(end) / 3])[0]
        count = max(1, min(_MOST_CALLS, round(_TURN_MS / max(slowest_ms, 1e-3))))
        graph = None

        def play(call: Callable[[], Any] = call, count: int = count) -> None:
            for _ in range(count):
                call()

        try:
            graph = capture_graph(play, stream=stream)
        except Exception as error:
            print(f"rank {communicator.rank}: {path} cannot be captured: {error}", flush=True)
        # A path that fails on one rank is left out on all, before anybody has replayed it.
        bad = _host_max(communicator, [float(graph is None), float(not right)])
        if any(bad):
            if communicator.rank == 0:
                print(f"{path} is left out: {'wrong results' if bad[1] else 'it cannot be captured'}", flush=True)
            continue
        graphs[path] = (graph, count)
    seconds: dict[str, list[float]] = {path: [] for path in graphs}
    for _ in range(_ROUNDS + 1):
        for path, (graph, count) in graphs.items():
            _host_max(communicator, [0.0])  # the ranks meet
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(stream):
                start.record(stream)
                graph.replay()
                end.record(stream)
            end.synchronize()
            seconds[path].append(start.elapsed_time(end) / count)
    communicator.check()
    medians = [1e3 * statistics.median(values[1:]) for values in seconds.values()]
    return dict(zip(seconds, _host_max(communicator, medians), strict=True)) if medians else {}


def _host_max(communicator: RoutedCommunicator, values: Sequence[float]) -> list[float]:
    """The ranks' largest values, over Gloo: it waits for all ranks and touches no GPU."""
    return communicator.all_reduce(torch.tensor(values, dtype=torch.float64), "max").tolist()


def _versions() -> dict[str, str]:
    from tp_kernels.comm.nccl_library import nccl_library_info
    from tp_kernels.comm.peer_verdicts import driver_version
    from tp_kernels.version import __version__

    return {
        "torch": str(torch.__version__),
        "nccl": nccl_library_info().version,
        "driver": driver_version(),
        "tp_kernels": __version__,
    }
