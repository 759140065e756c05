"""All-reduce over GPU ranks: our peer-memory kernels, torch's, NCCL; the fused norm against all-reduce and norm.

The engine behind ``tp-kernels bench all-reduce-gpu``. It starts its own ranks (sharing one GPU if there are not
enough), or runs as the ranks of ``tp-kernels launch --nproc 4 --one-gpu --module tp_kernels.testing.<this module>``.
Every competitor is a CUDA graph of back-to-back calls, checked first, replayed in turns. Times are medians over the
rounds of the slowest rank, counted from where all ranks have met on the GPU.

Sums:

- ``lamport``, ``one_shot``, ``two_shot``: ours. As torch's, the latter two read their operand where all ranks can reach
  it (``get_buffer``); ``lamport`` and ``two_shot_copy`` have operand and result in ordinary memory.
- ``chosen``: what ``all_reduce`` does with ordinary memory when it is not told.
- ``torch_one_shot``, ``torch_two_shot``: ``torch.ops.symm_mem``; ``nccl``: torch.distributed.

Norms, of [tokens, hidden]: see ``bench_all_reduce_norms``.

Ranks that share a GPU share its memory too: such figures compare two paths, and say nothing about linked GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from tp_kernels import one_gpu
from tp_kernels.testing.bench import Timing, bytes_argument, format_bytes, run_command_line, sizes_between
from tp_kernels.testing.bench_all_reduce_norms import NormBench
from tp_kernels.testing.rank_bench import captured, cases_in_time, keep_rows, measure_on_ranks, time_graphs

__all__ = ["Options", "add_arguments", "calls_for", "main", "measure", "run", "sum_rows"]

TORCH_DTYPES = ("float32", "bfloat16")  # those that torch.ops.symm_mem adds
_PEERS = {"one_shot": "torch_one_shot", "two_shot": "torch_two_shot"}


class SumCase(NamedTuple):
    """A sum of so many bytes."""

    nbytes: int

    def __str__(self) -> str:
        return format_bytes(self.nbytes)


class NormCase(NamedTuple):
    """A sum of [tokens, hidden] and the norm behind it."""

    tokens: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.hidden}"


@dataclass(frozen=True)
class Options:
    """What is measured; the arguments of the command line."""

    sizes: Sequence[int] = tuple(sizes_between(2 << 10, 64 << 20, 2))
    hidden: Sequence[int] = (4096, 8192)
    tokens: Sequence[int] = (1, 4, 16, 64, 256, 1024, 4096)
    what: Sequence[str] = ("sums", "norms")
    dtype: str = "bfloat16"
    rounds: int = 10
    nccl: bool = True
    minutes: float = 30.0
    csv: str | None = None

    def cases(self) -> list[SumCase | NormCase]:
        """What is measured, in order."""
        sums = [SumCase(size) for size in self.sizes] if "sums" in self.what else []
        norms = [NormCase(t, h) for h in self.hidden for t in self.tokens] if "norms" in self.what else []
        return [*sums, *norms]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    default = Options()
    several = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start, at least 2 (default %(default)s)")
    parser.add_argument("--what", nargs="+", choices=default.what, default=default.what, help="default: both")
    parser.add_argument(
        "--min-bytes", type=bytes_argument, default="2K", metavar="SIZE", help="smallest message (default 2K)"
    )
    parser.add_argument(
        "--max-bytes", type=bytes_argument, default="64M", metavar="SIZE", help="largest message (default 64M)"
    )
    parser.add_argument("--factor", type=int, default=2, help="ratio of successive sizes (default %(default)s)")
    parser.add_argument("--hidden", default=default.hidden, help="widths of the norms (default 4096 8192)", **several)
    parser.add_argument("--tokens", default=default.tokens, help="rows of the norms (default 1 to 4096)", **several)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=default.dtype)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timed rounds (default %(default)s)")
    parser.add_argument("--no-nccl", action="store_true", help="leave NCCL out")
    parser.add_argument(
        "--minutes", type=float, default=default.minutes, metavar="M", help="start no case after (default %(default)s)"
    )
    parser.add_argument("--csv", metavar="FILE", help="write all figures, with machine, versions and date")


def _options(args: argparse.Namespace) -> Options:
    if not 2 <= args.ranks <= 16 or args.rounds < 1 or min(*args.hidden, *args.tokens) < 1:
        raise ValueError("--ranks must be from 2 to 16, --rounds, --hidden and --tokens at least 1")
    sizes = sizes_between(args.min_bytes, args.max_bytes, args.factor)
    if sizes[0] < 16:
        raise ValueError(f"--min-bytes must be at least 16, got {sizes[0]}")
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {args.minutes}")
    csv = os.path.abspath(args.csv) if args.csv else None
    names = ("hidden", "tokens", "what", "dtype", "rounds", "minutes")
    return Options(sizes, nccl=not args.no_nccl, csv=csv, **{name: getattr(args, name) for name in names})


def run(args: argparse.Namespace) -> int:
    """Run the benchmark with parsed options; 0, or 1 if a result was wrong.

    Raises:
        ValueError: options that do not fit, or that leave nothing to measure.
    """
    options = _options(args)
    rows = measure_on_ranks(
        measure, options, ranks=args.ranks, no_gpu="`tp-kernels bench all-reduce` measures CPU ranks"
    )
    if rows is None:
        return 0
    if not rows:
        raise ValueError(f"nothing was measured: --minutes {options.minutes:g} were over")
    return 1 if any(row["wrong"] for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    """Command line of ``benchmarks/bench_all_reduce_gpu.py``, and of the ranks that ``tp-kernels launch`` starts."""
    return run_command_line(__doc__, add_arguments, run, argv)


# On every rank -------------------------------------------------------------------------------------------------------


def measure(group, options: Options) -> list[dict[str, Any]]:
    """All figures, the same on all ranks; the first rank prints them as they come."""
    import torch
    import torch.distributed as dist

    from tp_kernels.testing.symmetric_ranks import make_symmetric

    started, largest = time.monotonic(), max(options.sizes)
    symm = make_symmetric(group, "bench_all_reduce_gpu", max_bytes=max(largest, 64 << 20), timeout=60.0)
    dtype = getattr(torch, options.dtype)
    torch_memory = nccl = None
    if options.dtype in TORCH_DTYPES:
        import torch.distributed._symmetric_memory as symm_mem

        needed = max([largest, *(t * h * dtype.itemsize for t in options.tokens for h in options.hidden)])
        torch_memory = symm_mem.empty(needed // dtype.itemsize, dtype=dtype, device=one_gpu.local_device())
        symm_mem.rendezvous(torch_memory, group.process_group.group_name)
    if options.nccl:
        nccl = dist.new_group(list(range(group.world_size)), backend="nccl")
    rows: list[dict[str, Any]] = []
    try:
        bench = _Bench(group, symm, options, dtype, torch_memory, nccl)
        for case in cases_in_time(group, options.cases(), options.minutes, started):
            rows += bench.sums(*case) if isinstance(case, SumCase) else bench.norms(*case)
            keep_rows(group, options.csv, rows)
        symm.check()
    finally:
        torch.cuda.synchronize()
        symm.close()
        if nccl is not None:
            dist.destroy_process_group(nccl)
    return rows


class _Bench:
    def __init__(self, group, symm, options: Options, dtype, torch_memory, nccl):
        self.group, self.symm, self.options, self.dtype = group, symm, options, dtype
        self.torch_memory, self.nccl = torch_memory, nccl
        self._name = group.process_group.group_name
        self._norms = NormBench(
            symm,
            dtype,
            time=lambda ways, nbytes, rounds: self._time(ways, calls_for(nbytes), rounds),
            integers=self._integers,
            total=self._total,
            count=self._count,
            reduces=self._reduces(),
            meet=group.barrier,
        )

    def sums(self, size: int) -> list[dict[str, Any]]:
        """Every way to add ``size`` bytes."""
        import torch

        from tp_kernels.comm.symmetric_sizes import LAMPORT_BYTES

        symm, n = self.symm, size // self.dtype.itemsize
        x = self._integers(n)
        out = torch.empty_like(x)
        shared = symm.get_buffer((n,), self.dtype)
        ways: dict[str, tuple[Any, Callable[[], Any]]] = {
            "one_shot": (shared, lambda: symm.all_reduce(shared, out=out, algorithm="one_shot")),
            "two_shot": (shared, lambda: symm.all_reduce(shared, out=shared, algorithm="two_shot")),
            "two_shot_copy": (x, lambda: symm.all_reduce(x, out=out, algorithm="two_shot")),
            "chosen": (x, lambda: symm.all_reduce(x, out=out)),
        }
        if size <= LAMPORT_BYTES:
            ways["lamport"] = (x, lambda: symm.all_reduce(x, out=out, algorithm="lamport"))
        for way, (buffer, reduce) in self._reduces().items():
            ways[way] = (buffer(n), partial(reduce, buffer(n)))
        source, expected = x.clone(), self._total(n)
        wrong = {}
        for way, (operand, function) in ways.items():
            operand.copy_(source)
            wrong[way] = self._count(function() != expected)
        timed = self._time({way: function for way, (_, function) in ways.items()}, calls_for(size))
        rows = sum_rows(self._common("sum", size, 0, 0), timed, wrong)
        self._print(rows)
        return rows

    def norms(self, tokens: int, hidden: int) -> list[dict[str, Any]]:
        """Every way to add over the ranks, add a residual and normalise."""
        rows = self._norms.measure(
            self._common("norm", tokens * hidden * self.dtype.itemsize, tokens, hidden), tokens, hidden
        )
        self._print(rows)
        return rows

    def _reduces(self) -> dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]]:
        """Torch's all-reduces: where ``n`` elements lie, and the sum of what lies there."""
        import torch
        import torch.distributed as dist

        found: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {}
        if self.torch_memory is not None:
            name, torch_ops = self._name, torch.ops.symm_mem
            found["torch_one_shot"] = (self._theirs, lambda x: torch_ops.one_shot_all_reduce(x, "sum", name))
            found["torch_two_shot"] = (self._theirs, lambda x: torch_ops.two_shot_all_reduce_(x, "sum", name))
        if self.nccl is not None:
            own: dict[int, Any] = {}

            def buffer(n: int):
                if n not in own:
                    own.clear()
                    own[n] = torch.empty(n, dtype=self.dtype, device="cuda")
                return own[n]

            found["nccl"] = (buffer, lambda x: dist.all_reduce(x, group=self.nccl) or x)
        return found

    def _theirs(self, n: int):
        return self.torch_memory[:n]

    def _integers(self, n: int):
        from tp_kernels.testing.numeric import integers

        return integers((n,), self.dtype, seed=self.group.rank).cuda()

    def _total(self, n: int):
        import torch

        from tp_kernels.testing.numeric import integers

        parts = (integers((n,), torch.float32, seed=rank).cuda() for rank in range(self.group.world_size))
        return sum(parts).to(self.dtype)

    def _count(self, wrong) -> int:
        """Over all ranks."""
        count = wrong.sum().cpu()
        return int(self.group.all_reduce(count))

    def _time(self, ways: Mapping[str, Callable[[], Any]], calls: int, rounds: int | None = None) -> dict[str, Timing]:
        graphs = {name: captured(function, calls) for name, function in ways.items()}
        return time_graphs(self.group, self.symm, graphs, calls, rounds or self.options.rounds)

    def _common(self, kind: str, nbytes: int, tokens: int, hidden: int) -> dict[str, Any]:
        return {
            "kind": kind,
            "ranks": self.group.world_size,
            "ranks_per_gpu": one_gpu.ranks_on_this_gpu(),
            "mps": one_gpu.has_mps(),
            "max_blocks": self.symm.max_blocks,
            "dtype": self.options.dtype,
            "bytes": nbytes,
            "tokens": tokens,
            "hidden": hidden,
        }

    def _print(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.group.rank:
            return
        first = rows[0]
        of = SumCase(first["bytes"]) if first["kind"] == "sum" else NormCase(first["tokens"], first["hidden"])
        text = "  ".join(f"{row['path']} {row['time_us']:.1f}" for row in rows)
        wrong = [row["path"] for row in rows if row["wrong"]]
        print(f"{of!s:>12}  {text}{'  WRONG: ' + ', '.join(wrong) if wrong else ''}", flush=True)


# Pure ----------------------------------------------------------------------------------------------------------------


def calls_for(nbytes: int) -> int:
    """Calls in one graph: enough for the clock, the same on all ranks."""
    return max(2, min(50, (64 << 20) // max(1, nbytes)))


def sum_rows(common: Mapping[str, Any], timed: Mapping[str, Timing], wrong: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row for each way; ``over_peer`` is its time over that of torch's same algorithm, where both were right."""
    rows = []
    for path, timing in timed.items():
        algbw = common["bytes"] / timing.median / 1e9
        theirs = _PEERS.get(path, "")
        peer = None if wrong[path] or wrong.get(theirs) else timed.get(theirs)
        rows.append(
            {
                **common,
                "path": path,
                **_times(timing),
                "busbw": round(algbw * 2 * (common["ranks"] - 1) / common["ranks"], 3),
                "over_peer": "" if peer is None else round(timing.median / peer.median, 3),
                "over_all_reduce": "",
                "speedup": "",
                "best_peer": "",
                "wrong": wrong[path],
            }
        )
    return rows


def _times(timing: Timing) -> dict[str, float]:
    return {
        "time_us": round(timing.median * 1e6, 2),
        "q20_us": round(timing.q20 * 1e6, 2),
        "q80_us": round(timing.q80 * 1e6, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
