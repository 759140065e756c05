"""A row-parallel GEMM and its all-reduce over NCCL: one after the other, and in chunks side by side.

The engine behind ``tp-kernels bench overlap``. It starts its own ranks (sharing one GPU if there are not enough), or
runs as the ranks of ``tp-kernels launch --nproc 4 --one-gpu --module tp_kernels.testing.bench_overlap``. Per shape, and
per number of thread blocks that NCCL may take (``--max-ctas``), in turns in one run:

- ``compute``, ``comm``: the GEMM alone, the all-reduce alone.
- ``none``: one GEMM, then one all-reduce.
- ``chunked``: ``ops.linear_all_reduce`` with so many chunks, each ``growth`` times the one before. Candidates are left
  out that could not win even if GEMM and all-reduce did not slow each other down.

Times are medians over the rounds of the slowest rank. ``hidden`` is (none - chunked) / min(compute, comm): how much of
the shorter of the two disappeared behind the longer. The bits are compared with those of the same chunks one after the
other (``wrong``: they must be equal), and of one piece (``differs``: elements that are not equal, which is allowed; see
``ops.linear_all_reduce``). ``--tune`` writes the winners to the table from which ``overlap="auto"`` chooses.

Ranks that share a GPU share its power and its L2, and NCCL talks over sockets there: such figures show that overlap
works, not what it brings on GPUs that are linked.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tp_kernels import one_gpu
from tp_kernels.testing.bench import Timing, interleaved, run_command_line
from tp_kernels.testing.rank_bench import keep_rows, measure_on_ranks

__all__ = ["Options", "add_arguments", "candidates", "entries", "main", "measure", "run"]

# Llama-3-8B: (out_features, in_features) of the two row-parallel projections.
SHAPES = {"o": (4096, 4096), "down": (4096, 14336)}
_START_S = 120.0


@dataclass(frozen=True)
class Options:
    """What is measured; the arguments of the command line."""

    rows: Sequence[int] = (1024, 2048, 4096, 8192, 16384)
    shapes: Sequence[tuple[int, int]] = tuple(SHAPES.values())
    chunks: Sequence[int] = (2, 3, 4)
    growth: Sequence[float] = (1.0, 2.0, 4.0, 0.5)
    max_ctas: Sequence[int] = (0, 2, 4, 8)
    dtype: str = "bfloat16"
    rounds: int = 10
    graph: bool = False
    csv: str | None = None


class Candidate(NamedTuple):
    """A schedule: its parameters, and the rows of its chunks."""

    chunks: int
    growth: float
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    default = Options()
    several = {"nargs": "+", "metavar": "N"}
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start, at least 2 (default %(default)s)")
    parser.add_argument("--rows", type=int, default=default.rows, help="tokens (default 1024 to 16384)", **several)
    parser.add_argument(
        "--layers", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES), help="projections of Llama-3-8B"
    )
    parser.add_argument("--chunks", type=int, default=default.chunks, help="numbers of chunks to try", **several)
    parser.add_argument("--growth", type=float, default=default.growth, help="ratios of chunks to try", **several)
    parser.add_argument(
        "--max-ctas", type=int, default=default.max_ctas, help="blocks NCCL may take; 0 is NCCL's choice", **several
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=default.dtype)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timed rounds (default %(default)s)")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs, so that launching costs nothing")
    parser.add_argument("--csv", metavar="FILE", help="write all figures, with machine, versions and date")
    parser.add_argument(
        "--tune", nargs="?", const="", metavar="FILE", help="write the winners to the user's tuning table, or to FILE"
    )


def _options(args: argparse.Namespace) -> Options:
    if args.ranks < 2 or args.rounds < 1 or min(args.rows) < 1 or min(args.chunks) < 1 or min(args.growth) <= 0:
        raise ValueError("--ranks must be at least 2, --rounds, --rows and --chunks at least 1, --growth above 0")
    if not all(0 <= ctas <= 64 for ctas in args.max_ctas):
        raise ValueError(f"--max-ctas must be from 0 to 64, got {list(args.max_ctas)}")
    shapes = [SHAPES[name] for name in args.layers]
    taken = {name: getattr(args, name) for name in ("rows", "chunks", "growth", "max_ctas", "dtype", "rounds", "graph")}
    return Options(shapes=shapes, csv=os.path.abspath(args.csv) if args.csv else None, **taken)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark with parsed options; 0, or 1 if overlap changed a result. ValueError for bad options."""
    options = _options(args)
    rows = measure_on_ranks(
        measure_on_gpu,
        options,
        ranks=args.ranks,
        no_gpu="on CPU ranks there is nothing to overlap with: every core computes",
    )
    if rows is None:
        return 0
    if args.tune is not None:
        _write_table(rows, options, args.tune)
    return 1 if any(row["wrong"] for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    """Command line of ``benchmarks/bench_overlap.py``, and of the ranks that ``tp-kernels launch`` starts."""
    return run_command_line(__doc__, add_arguments, run, argv)


# On every rank -------------------------------------------------------------------------------------------------------


def measure_on_gpu(group, options: Options) -> list[dict[str, Any]]:
    """All figures, the same on all ranks; the first rank prints them as they come."""
    import torch

    from tp_kernels.testing.nccl_group import nccl_group

    torch.cuda.set_device(one_gpu.local_device())
    groups = {ctas: nccl_group(group, timeout=_START_S, max_ctas=ctas or None) for ctas in options.max_ctas}
    try:
        return measure(group, groups, options, "cuda")
    finally:
        for made in groups.values():
            made.close()


def candidates(m: int, n: int, dtype, info, num_sms: int, options: Options) -> list[Candidate]:
    """The different schedules that the options make of a shape, those with one chunk left out."""
    from tp_kernels.ops._overlap_choice import planned_chunks

    found: dict[tuple[int, ...], Candidate] = {}
    for chunks in options.chunks:
        for growth in options.growth:
            rows = tuple(b - a for a, b in planned_chunks(m, n, dtype, info, num_sms, chunks, growth))
            if len(rows) > 1:
                found.setdefault(rows, Candidate(chunks, growth, rows))
    return list(found.values())


def measure(group, groups: Mapping[int, Any], options: Options, device: str) -> list[dict[str, Any]]:
    """The rows of the CSV.

    Args:
        group: of the ranks, for what is not measured.
        groups: the same ranks over the communicators to measure, by ``max_ctas``.
        options: what to measure.
        device: "cuda", or "cpu" to try the benchmark out.
    """
    rows: list[dict[str, Any]] = []
    for n, in_features in options.shapes:
        for m in options.rows:
            for row in _measure_shape(group, groups, options, device, m, n, in_features):
                rows.append(row)
                if group.rank == 0:
                    _print_row(row, first=len(rows) == 1)
            keep_rows(group, options.csv, rows)
    return rows


def _measure_shape(group, groups, options, device, m, n, in_features) -> list[dict[str, Any]]:
    import torch

    from tp_kernels import ops
    from tp_kernels.checkpoint.sharding import shard_width_sizes
    from tp_kernels.comm.overlap import MARGIN, estimate_time, hidden_fraction
    from tp_kernels.ops._gpu import gpu_of

    dtype = getattr(torch, options.dtype)
    k = shard_width_sizes(in_features, group.world_size)[group.rank]
    generator = torch.Generator(device).manual_seed(group.rank)
    x = torch.randn(m, k, generator=generator, device=device).to(dtype)
    weight = (torch.randn(n, k, generator=generator, device=device) / in_features**0.5).to(dtype)
    partial = x @ weight.t()
    reduced = torch.empty_like(partial)
    info = gpu_of(x) if device == "cuda" else None
    num_sms = min(_exchange(group, info.num_sms if info else 1))
    plans = candidates(m, n, dtype, info, num_sms, options)
    rows = []
    for ctas, over in groups.items():
        plain = {
            "compute": lambda: torch.mm(x, weight.t(), out=partial),
            "comm": lambda over=over: over.communicator.all_reduce(partial, out=reduced),
            "none": lambda over=over: ops.linear_all_reduce(x, weight, group=over, overlap="none"),
        }
        first = _time(group, plain, options, device)
        compute, comm, none = (first[name].median for name in plain)
        hopeful = [plan for plan in plans if estimate_time(plan.rows, compute, comm) * MARGIN < none]
        piece = ops.linear_all_reduce(x, weight, group=over, overlap="none")
        calls, differs, wrong = dict(plain), {}, {}
        for plan in hopeful:
            call = {"group": over, "chunks": list(plan.rows)}
            together, one_by_one = (
                ops.linear_all_reduce(x, weight, overlap=overlap, **call) for overlap in ("chunked", "none")
            )
            differs[plan], wrong[plan] = int((together != piece).sum()), int((together != one_by_one).sum())
            calls[str(plan)] = lambda call=call: ops.linear_all_reduce(x, weight, overlap="chunked", **call)
        del piece
        timed = _time(group, calls, options, device) if hopeful else first
        compute, comm, none = (timed[name].median for name in plain)
        common = {
            "ranks": group.world_size,
            "ranks_per_gpu": one_gpu.ranks_on_this_gpu(),
            "sms": num_sms,
            "dtype": options.dtype,
            "m": m,
            "n": n,
            "in_features": in_features,
            "max_ctas": ctas,
            "timed": "graph" if options.graph else "eager",
            "compute_us": _us(compute),
            "comm_us": _us(comm),
        }
        for plan in (None, *hopeful):
            timing = timed["none" if plan is None else str(plan)]
            rows.append(
                common
                | {
                    "path": "none" if plan is None else "chunked",
                    "chunks": 1 if plan is None else plan.chunks,
                    "growth": 1.0 if plan is None else plan.growth,
                    "rows": str(m if plan is None else plan),
                    "time_us": _us(timing.median),
                    "q20_us": _us(timing.q20),
                    "q80_us": _us(timing.q80),
                    "over_none": round(none / timing.median, 3),
                    "hidden": "" if plan is None else round(hidden_fraction(none, timing.median, compute, comm), 3),
                    "differs": 0 if plan is None else differs[plan],
                    "wrong": 0 if plan is None else wrong[plan],
                }
            )
    return rows


def _time(group, calls: Mapping[str, Callable[[], object]], options: Options, device: str) -> dict[str, Timing]:
    """Per call the summary over rounds, each as long as its slowest rank."""
    import torch

    if options.graph and device == "cuda":
        calls = {name: _captured(call) for name, call in calls.items()}

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = interleaved(calls, rounds=options.rounds, warmup=2, before=lambda name: group.barrier(), clock=clock)
    by_rank = _exchange(group, seconds)
    return {name: Timing.of(map(max, zip(*(rank[name] for rank in by_rank), strict=True))) for name in calls}


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _exchange(group, value: Any) -> list[Any]:
    import torch.distributed as dist

    everyone: list[Any] = [None] * group.world_size
    dist.all_gather_object(everyone, value, group=group.process_group)
    return everyone


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


# On the first rank ---------------------------------------------------------------------------------------------------


def _print_row(row: Mapping[str, Any], first: bool) -> None:
    names = ("m", "n", "in_features", "max_ctas", "compute_us", "comm_us", "path", "time_us", "over_none", "hidden")
    if first:
        print(
            f"# {row['ranks']} ranks, {row['ranks_per_gpu']} on a GPU, {row['sms']} SMs each, {row['dtype']}, "
            f"{row['timed']}; medians of the slowest rank, microseconds"
        )
        print("#" + "".join(f"{name:>12}" for name in names) + "  rows of the chunks", flush=True)
    warning = f"  WRONG: {row['wrong']} elements" if row["wrong"] else ""
    print(" " + "".join(f"{row[name]!s:>12}" for name in names) + f"  {row['rows']}{warning}", flush=True)


def entries(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For the tuning table: per shape and communicator the sizes, the winner, its configuration and the times."""
    best: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("m", "n", "in_features", "ranks", "ranks_per_gpu", "max_ctas"))
        kept = best.setdefault(key, {})
        if row["path"] not in kept or row["time_us"] < kept[row["path"]]["time_us"]:
            kept[row["path"]] = row
    found = []
    for (m, n, in_features, ranks, per_gpu, ctas), kept in best.items():
        winner = min(kept.values(), key=lambda row: row["time_us"])
        sizes = {"m": m, "n": n, "in_features": in_features}
        sizes |= {"ranks": -ranks, "ranks_per_gpu": -per_gpu, "max_ctas": -ctas}
        chunked = winner["path"] == "chunked"
        config = {"chunks": winner["chunks"], "growth": winner["growth"]} if chunked else {}
        us = {path: row["time_us"] for path, row in kept.items()}
        found.append({"sizes": sizes, "path": winner["path"], "config": config, "us": us})
    return found


class _Case(NamedTuple):
    """What the tuner's table wants to know of a measured shape."""

    op: str
    dtype: Any
    sizes: dict[str, int]


def _write_table(rows: Sequence[Mapping[str, Any]], options: Options, path: str) -> None:
    import torch

    from tp_kernels.ops._gpu import GpuInfo
    from tp_kernels.ops._overlap_choice import overlap_table
    from tp_kernels.ops.tuning import user_table
    from tp_kernels.testing.op_bench.tuner import Table

    properties = torch.cuda.get_device_properties(0)
    info = GpuInfo(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
    table = Table(Path(path) if path else user_table(info.slug), properties.name)
    for entry in entries(rows):
        case = _Case(overlap_table("nccl"), getattr(torch, options.dtype), entry["sizes"])
        table.put(case, entry["path"], entry["config"], entry["us"])
    print(f"# table: {table.path}")


if __name__ == "__main__":
    from tp_kernels.testing import bench_overlap  # under its own name, so that what ranks are sent can be unpickled

    sys.exit(bench_overlap.main())
