"""All-reduce over CPU ranks: shared memory against Gloo and against the machine's memory, in nccl-tests' columns.

The engine behind ``tp-kernels bench all-reduce``. It starts its own ranks, checks every result before it is timed, and
times the competitors in turns:

- ``shm``: ``SharedMemoryCommunicator``.
- ``gloo``: ``torch.distributed.all_reduce`` on the same ranks. It only works in place, so its out-of-place time holds a
  copy.
- ``memcpy``: every rank copies as many bytes at the same time. An all-reduce must read each rank's input and write each
  rank's output once, the same bytes, so ``%memcpy`` is how near the time is to what memory allows (in-cache sizes
  included: there it is the cache's bandwidth, and latency dominates).

``time`` is the median over the rounds of the slowest rank's median call; algbw = size / time; busbw = algbw * 2 (n-1)
/ n.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from typing import Any

from tp_kernels.testing.bench import (
    Timing,
    bytes_argument,
    interleaved,
    plot_lines,
    sizes_between,
    write_csv,
)

__all__ = ["add_arguments", "main", "run"]

_BACKENDS = ("shm", "gloo")
_DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "int64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("--ranks", type=int, default=2, help="ranks, at least 2 (default %(default)s)")
    parser.add_argument(
        "--min-bytes", type=bytes_argument, default="1K", metavar="SIZE", help="smallest message (default 1K)"
    )
    parser.add_argument(
        "--max-bytes", type=bytes_argument, default="32M", metavar="SIZE", help="largest message (default 32M)"
    )
    parser.add_argument("--factor", type=int, default=2, help="ratio of successive sizes (default %(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="element type (default %(default)s)")
    parser.add_argument("--op", choices=("sum", "max"), default="sum", help="reduction (default %(default)s)")
    parser.add_argument("--iters", type=int, default=20, help="timed rounds of each competitor (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each rank (default %(default)s)")
    parser.add_argument("--no-gloo", action="store_true", help="leave Gloo out")
    parser.add_argument("--csv", metavar="FILE", help="write all figures, with machine, versions and date")
    parser.add_argument("--plot", metavar="FILE", help="write a plot of time over size (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark with parsed options; 0, or 1 if a result was wrong. ValueError for options that do not fit."""
    from tp_kernels.testing.rank_pool import RankPool

    sizes = sizes_between(args.min_bytes, args.max_bytes, args.factor)
    if not 2 <= args.ranks <= 64:
        raise ValueError(f"--ranks must be from 2 to 64, got {args.ranks}")
    if args.iters < 1 or args.threads < 1:
        raise ValueError(f"--iters and --threads must be at least 1, got {args.iters} and {args.threads}")
    backends = _BACKENDS[:1] if args.no_gloo else _BACKENDS
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, Timing]]] = {}
    _print_head(args)
    with RankPool(args.ranks, backend="shm", threads=args.threads, group_timeout=300.0) as pool:
        for size in sizes:
            by_rank = pool.run(_measure, size, args.dtype, args.op, args.iters, backends, timeout=600)
            measured = _slowest(by_rank)
            for row in _rows(args, size, backends, measured, [ranks["wrong"] for ranks in by_rank]):
                rows.append(row)
                _print_row(row)
            for name in (*backends, "memcpy"):
                lines.setdefault(name, []).append((size, measured[name]))
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        plot_lines(
            args.plot,
            lines,
            title=f"all-reduce ({args.op}, {args.dtype}) over {args.ranks} CPU ranks, out of place",
            xlabel="message (bytes)",
        )
    return 1 if any(row["wrong"] or row["wrong_in_place"] for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    """Command line of ``benchmarks/bench_all_reduce.py``."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ValueError as error:
        parser.error(str(error))


# On every rank -------------------------------------------------------------------------------------------------------


def _measure(group, size: int, dtype_name: str, op: str, iters: int, backends: tuple[str, ...]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    dtype = getattr(torch, dtype_name)
    count = max(1, size // dtype.itemsize)
    shm, process_group = group.communicator, group.process_group
    if shm.backend != "shm":
        raise RuntimeError(f"the ranks use {shm.backend!r} instead of shared memory: {group.choice}")
    dist_op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
    pattern = torch.arange(count, dtype=torch.int64) % 7
    x = (pattern + group.rank).to(dtype)
    out, in_place = torch.empty_like(x), x.clone()
    n = group.world_size
    expected = (pattern * n + n * (n - 1) // 2 if op == "sum" else pattern + n - 1).to(dtype)

    def gloo_out_of_place():
        out.copy_(x)
        dist.all_reduce(out, dist_op, group=process_group)

    competitors = {
        "shm": lambda: shm.all_reduce(x, op, out=out),
        "shm in place": lambda: shm.all_reduce(in_place, op, out=in_place),
    }
    if "gloo" in backends:
        competitors["gloo"] = gloo_out_of_place
        competitors["gloo in place"] = lambda: dist.all_reduce(in_place, dist_op, group=process_group)
    wrong = {}
    for name, function in competitors.items():
        out.fill_(-1)
        in_place.copy_(x)
        function()
        wrong[name] = int(((in_place if "in place" in name else out) != expected).sum())
    copied, source, target = x.numel() * x.element_size(), x.data_ptr(), out.data_ptr()
    competitors["memcpy"] = lambda: ctypes.memmove(target, source, copied)

    def before(name):
        if "in place" in name:
            in_place.copy_(x)  # repeated sums would overflow
        shm.barrier()

    # Long enough turns for the clock, short enough that an in-place sum stays finite.
    calls = max(1, min(20, (128 << 10) // size))
    seconds = interleaved(competitors, rounds=iters, warmup=3, calls=calls, before=before)
    return {"seconds": seconds, "wrong": wrong}


# In the parent -------------------------------------------------------------------------------------------------------


def _slowest(by_rank: list[dict[str, Any]]) -> dict[str, Timing]:
    """A round takes as long as its slowest rank."""
    per_rank = [ranks["seconds"] for ranks in by_rank]
    return {
        name: Timing.of(map(max, zip(*(seconds[name] for seconds in per_rank), strict=True))) for name in per_rank[0]
    }


def _rows(args, size, backends, measured, wrong) -> list[dict[str, Any]]:
    itemsize = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}.get(args.dtype, 8)
    count = max(1, size // itemsize)
    moved = 2 * args.ranks * count * itemsize
    rows = []
    for backend in backends:
        row: dict[str, Any] = {
            "backend": backend,
            "ranks": args.ranks,
            "threads": args.threads,
            "size": count * itemsize,
            "count": count,
            "type": args.dtype,
            "redop": args.op,
        }
        for suffix, name in (("", backend), ("_in_place", f"{backend} in place")):
            timing = measured[name]
            algbw = count * itemsize / timing.median / 1e9
            row |= {
                f"time_us{suffix}": round(timing.median * 1e6, 2),
                f"q20_us{suffix}": round(timing.q20 * 1e6, 2),
                f"q80_us{suffix}": round(timing.q80 * 1e6, 2),
                f"algbw{suffix}": round(algbw, 3),
                f"busbw{suffix}": round(algbw * 2 * (args.ranks - 1) / args.ranks, 3),
                f"wrong{suffix}": sum(ranks[name] for ranks in wrong),
            }
        row |= {
            "bytes_moved": moved,
            "memcpy_us": round(measured["memcpy"].median * 1e6, 2),
            "percent_of_memcpy": round(100 * measured["memcpy"].median / measured[backend].median, 1),
            "speedup_over_gloo": round(measured["gloo"].median / measured[backend].median, 2)
            if "gloo" in measured
            else "",
        }
        rows.append(row)
    return rows


def _print_head(args) -> None:
    from tp_kernels.testing.machine import machine_record

    machine = machine_record()
    print(f"# {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}")
    print(
        f"# {args.ranks} ranks, {args.threads} threads each, {args.iters} rounds; "
        "time: median over rounds of the slowest rank"
    )
    print("# bytes that must move: 2 x size x ranks (read every input, write every output); memcpy moves the same")
    group = f"{'time':>9} {'algbw':>7} {'busbw':>7} {'#wrong':>6}"
    units = f"{'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>6}"
    left = f"#{'size':>11} {'count':>12} {'type':>8} {'redop':>6} {'root':>5}"
    print(f"#{'':>46} {'out-of-place':^32} {'in-place':^32}")
    print(f"{left} {group} {group}  backend  %memcpy  vs gloo")
    print(f"#{'(B)':>11} {'(elements)':>12} {'':>21} {units} {units}", flush=True)


def _print_row(row: dict[str, Any]) -> None:
    text = f" {row['size']:>11} {row['count']:>12} {row['type']:>8} {row['redop']:>6} {-1:>5}"
    for suffix in ("", "_in_place"):
        text += (
            f" {row['time_us' + suffix]:>9.2f} {row['algbw' + suffix]:>7.2f} {row['busbw' + suffix]:>7.2f} "
            f"{row['wrong' + suffix]:>6}"
        )
    ratio = f"{row['speedup_over_gloo']:.1f}x" if row["speedup_over_gloo"] != "" else "-"
    print(f"{text}  {row['backend']:<7} {row['percent_of_memcpy']:>7.0f}% {ratio:>8}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
