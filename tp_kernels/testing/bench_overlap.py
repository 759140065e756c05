"""Projections and their collectives: one after the other, in chunks side by side, and in one kernel.

The engine behind ``tp-kernels bench overlap``. It starts its own ranks (sharing one GPU if there are not enough), or
runs as the ranks of ``tp-kernels launch --nproc 4 --one-gpu --module tp_kernels.testing.bench_overlap``. Per op and
shape, over NCCL (for each number of thread blocks that it may take, ``--max-ctas``) and over peer memory, in turns:

- ``compute``, ``comm``: the matmul alone, the collective alone.
- ``none``: one matmul and one collective.
- ``chunked``: in so many chunks, each ``growth`` times the one before. Of the schedules that could not win even if
  matmul and collective did not slow each other down, the two with the best bound are measured all the same.
- ``fused``: over peer memory, the sum as part of what follows the matmul's tiles, where the communicator offers it.
- ``torch_nccl``, ``torch_async_tp``: torch's own ways, in turns with the fastest of ours (``beside``).

Times are medians over the rounds of the slowest rank, counted from where all ranks have met on the GPU; over peer
memory of CUDA graphs. ``hidden`` is (none - overlapped) / min(compute, comm): how much of the shorter of the two
disappeared behind the longer. Results are compared with those of the same chunks one after the other (``wrong``: they
must be equal; ``fused`` must give the same bits twice), of one piece (``differs``: elements that are not equal, which
is allowed; see ``ops.linear_all_reduce``), and for integers with the exact sums (``wrong_sums``). ``gate`` is what
``overlap="auto"`` takes by these figures once ``--tune`` has written the winners to the table.

Ranks that share a GPU share its power and its L2, and NCCL talks over sockets there: such figures show that overlap
works, not what it brings on GPUs that are linked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tp_kernels import one_gpu
from tp_kernels.ops._overlap_choice import OVERLAPPED_OPS
from tp_kernels.testing.bench import run_command_line
from tp_kernels.testing.overlap_bench.case import Candidate, candidates
from tp_kernels.testing.overlap_bench.report import entries
from tp_kernels.testing.overlap_bench.run import Bench, Peers
from tp_kernels.testing.rank_bench import measure_on_ranks

__all__ = ["Candidate", "Options", "add_arguments", "candidates", "entries", "main", "measure", "run"]

# Llama-3-8B: (out_features, in_features) of the projections.
ROW_SHAPES = {"o": (4096, 4096), "down": (4096, 14336)}
COLUMN_SHAPES = {"qkv": (6144, 4096), "gate_up": (28672, 4096)}
LAYERS = (*ROW_SHAPES, *COLUMN_SHAPES)
_START_S = 120.0


@dataclass(frozen=True)
class Options:
    """What is measured; the arguments of the command line.

    Attributes:
        rows: tokens, in the order of measurement.
        shapes, columns: (out_features, in_features) of row-parallel and of column-parallel projections.
        tune: the table to write, "" for the user's, None for none.
    """

    rows: Sequence[int] = (4096, 1024, 256, 16384, 512, 2048, 8192)
    shapes: Sequence[tuple[int, int]] = tuple(ROW_SHAPES.values())
    chunks: Sequence[int] = (2, 3, 4)
    growth: Sequence[float] = (1.0, 2.0, 4.0, 0.5)
    max_ctas: Sequence[int] = (0, 2, 4, 8)
    dtype: str = "bfloat16"
    rounds: int = 10
    graph: bool = False
    csv: str | None = None
    ops: Sequence[str] = ("linear_all_reduce",)
    columns: Sequence[tuple[int, int]] = tuple(COLUMN_SHAPES.values())
    peers: bool = True
    minutes: float = 30.0
    tune: str | None = None
    device: str = "cuda"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    default = Options()
    several = {"nargs": "+", "metavar": "N"}
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start, at least 2 (default %(default)s)")
    parser.add_argument("--op", nargs="+", choices=OVERLAPPED_OPS, default=OVERLAPPED_OPS, help="default: all")
    parser.add_argument(
        "--rows",
        type=int,
        default=default.rows,
        help="tokens, first things first (default 4096 1024 256 ...)",
        **several,
    )
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS, help="projections of Llama-3-8B")
    parser.add_argument("--chunks", type=int, default=default.chunks, help="numbers of chunks to try", **several)
    parser.add_argument("--growth", type=float, default=default.growth, help="ratios of chunks to try", **several)
    parser.add_argument(
        "--max-ctas", type=int, default=default.max_ctas, help="blocks NCCL may take; 0 is NCCL's choice", **several
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=default.dtype)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timed rounds (default %(default)s)")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs over NCCL, too")
    parser.add_argument("--no-peers", action="store_true", help="leave torch's own ways out")
    parser.add_argument(
        "--minutes", type=float, default=default.minutes, metavar="M", help="start no case after (default %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default=default.device, help="cpu tries the benchmark out without a GPU"
    )
    parser.add_argument("--csv", metavar="FILE", help="write all figures, with machine, versions and date")
    parser.add_argument(
        "--tune", nargs="?", const="", metavar="FILE", help="write the winners to the user's tuning table, or to FILE"
    )


def _options(args: argparse.Namespace) -> Options:
    if args.ranks < 2 or args.rounds < 1 or min(args.rows) < 1 or min(args.chunks) < 1 or min(args.growth) <= 0:
        raise ValueError("--ranks must be at least 2, --rounds, --rows and --chunks at least 1, --growth above 0")
    if not all(0 <= ctas <= 64 for ctas in args.max_ctas):
        raise ValueError(f"--max-ctas must be from 0 to 64, got {list(args.max_ctas)}")
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {args.minutes}")
    if args.tune == "" and args.device == "cpu":
        raise ValueError("--tune on a CPU needs a FILE: there is no GPU whose table to write")
    names = ("rows", "chunks", "growth", "max_ctas", "dtype", "rounds", "graph", "minutes", "device")
    paths = {name: os.path.abspath(path) if path else path for name, path in (("csv", args.csv), ("tune", args.tune))}
    return Options(
        ops=tuple(args.op),
        shapes=[ROW_SHAPES[name] for name in args.layers if name in ROW_SHAPES],
        columns=[COLUMN_SHAPES[name] for name in args.layers if name in COLUMN_SHAPES],
        peers=not args.no_peers,
        **{name: getattr(args, name) for name in names},
        **paths,
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark with parsed options; 0, or 1 if a result was wrong or a path of ours failed.

    Raises:
        ValueError: options that do not fit, or that leave nothing to measure.
    """
    options = _options(args)
    instead = "`--device cpu` tries the benchmark out on CPU ranks, where every core computes and nothing is gained"
    rows = measure_on_ranks(measure_on, options, ranks=args.ranks, device=options.device, no_gpu=instead)
    if rows is None:
        return 0
    if not rows:
        raise ValueError("nothing was measured: no --layers of these --op, or no --minutes")
    return 1 if any(row["wrong"] or row["wrong_sums"] or row["failed"] for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    """Command line of ``benchmarks/bench_overlap.py``, and of the ranks that ``tp-kernels launch`` starts."""
    return run_command_line(__doc__, add_arguments, run, argv)


# On every rank -------------------------------------------------------------------------------------------------------


def measure_on(group, options: Options) -> list[dict[str, Any]]:
    """All figures, the same on all ranks; the first rank prints them as they come."""
    if options.device == "cpu":
        peers = Peers("gloo", group.process_group, None) if options.peers else None
        return Bench(group, [(0, group)], options, "cpu", peers).run()
    import torch
    import torch.distributed as dist

    from tp_kernels.testing.nccl_group import nccl_group
    from tp_kernels.testing.symmetric_ranks import make_symmetric, symmetric_group

    torch.cuda.set_device(one_gpu.local_device())
    itemsize = getattr(torch, options.dtype).itemsize
    largest = max([rows * n * itemsize for rows in options.rows for n, _ in options.shapes], default=1 << 20)
    over = [(ctas, nccl_group(group, timeout=_START_S, max_ctas=ctas or None)) for ctas in options.max_ctas]
    made = [of.communicator for _, of in over]
    peers = symm = None
    if "linear_all_reduce" in options.ops and options.shapes:
        symm = make_symmetric(group, "bench_overlap", max_bytes=largest, timeout=60.0)
        over.append((0, symmetric_group(symm, group)))
        made.append(symm)
    if options.peers:
        nccl = dist.new_group(list(range(group.world_size)), backend="nccl")
        peers = Peers("nccl", nccl, _reachable(group))
    bench = Bench(group, over, options, "cuda", peers)
    try:
        return bench.run()
    finally:
        if not bench.stuck:  # otherwise closing would wait for ever
            torch.cuda.synchronize()
            for communicator in made:
                communicator.close()
            if peers is not None:
                dist.destroy_process_group(peers.process_group)


def _reachable(group) -> str | None:
    """Name of the ranks' process group once torch has given them memory in common; None where it cannot."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm_mem

    name, problem = group.process_group.group_name, ""
    try:
        symm_mem.rendezvous(symm_mem.empty(1024, device=one_gpu.local_device()), name)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    problems: list[Any] = [None] * group.world_size
    dist.all_gather_object(problems, problem, group=group.process_group)
    if any(problems) and group.rank == 0:
        print(f"# torch's symmetric memory: {next(filter(None, problems))}", flush=True)
    return None if any(problems) else name


def measure(group, groups: Mapping[int, Any], options: Options, device: str) -> list[dict[str, Any]]:
    """The rows of the CSV for groups that are there, without torch's own ways.

    Args:
        group: of the ranks, for what is not measured.
        groups: the same ranks over the communicators to measure, by ``max_ctas``.
        options: what to measure.
        device: "cuda", or "cpu" to try the benchmark out.
    """
    return Bench(group, list(groups.items()), options, device).run()


if __name__ == "__main__":
    from tp_kernels.testing import bench_overlap  # under its own name, so that what ranks are sent can be unpickled

    sys.exit(bench_overlap.main())
