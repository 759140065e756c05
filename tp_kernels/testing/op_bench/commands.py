"""The command lines of ``tp-kernels bench ops`` and ``tp-kernels tune``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.testing.bench import write_csv
from tp_kernels.testing.gpu_timer import measure_roofs, raise_if_lost
from tp_kernels.testing.op_bench import report
from tp_kernels.testing.op_bench.case import MODELS
from tp_kernels.testing.op_bench.runner import Selection, bench_names, by_rows, rows_of, run_case, select_cases

__all__ = ["add_bench_arguments", "add_tune_arguments", "run_bench", "run_tune"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _add_selection(parser: argparse.ArgumentParser, models: list[str], tps: list[int]) -> None:
    every = ", ".join(bench_names())
    parser.add_argument("--op", action="append", metavar="OP", help=f"one of {every}; may be repeated (default: all)")
    names = f"whose shapes: {', '.join(MODELS)} (default: {' '.join(models)})"
    parser.add_argument("--model", nargs="+", default=models, metavar="MODEL", help=names)
    sizes = f"tensor-parallel sizes; shapes are one rank's (default: {' '.join(map(str, tps))})"
    parser.add_argument("--tp", type=int, nargs="+", default=tps, metavar="N", help=sizes)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="numbers of tokens, first things first (default: each op's own)",
    )
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=sorted(_DTYPES), help="default: bf16")
    parser.add_argument(
        "--minutes", type=float, default=30.0, metavar="M", help="stop in an orderly way after this long (default: 30)"
    )


def _selection(args: argparse.Namespace) -> Selection:
    if any(tp < 1 for tp in args.tp) or any(rows < 1 for rows in args.rows):
        raise ValueError("expected positive numbers for --tp and --rows")
    return Selection(
        tuple(args.op or ()), tuple(args.model), tuple(args.tp), tuple(_DTYPES[d] for d in args.dtype), tuple(args.rows)
    )


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench ops``."""
    _add_selection(parser, ["llama3-8b"], [1])
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="interleaved turns of each competitor (default: 15)"
    )
    parser.add_argument("--csv", metavar="FILE", help="write all figures, with machine, versions and date")
    parser.add_argument("--plot", metavar="FOLDER", help="write one picture an op into this folder")
    parser.add_argument(
        "--interpret", action="store_true", help="without a GPU: try `--model tiny` out in Triton's interpreter (slow)"
    )


def run_bench(args: argparse.Namespace) -> int:
    """Run ``bench ops``; exit status 1 if a path of ours was wrong or failed."""
    device = _device(args.interpret)
    deadline = time.monotonic() + 60 * args.minutes
    roofs = measure_roofs()
    if roofs:
        print(f"roofs now: copy {roofs.copy / 1e12:.2f} TB/s, cuBLAS bf16 8192^3 {roofs.matmul / 1e12:.0f} TFLOP/s")
    selection = _selection(args)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    broken = 0
    with torch.no_grad(), contextlib.nullcontext() if device == "cuda" else pretend(H100):
        for case in by_rows(select_cases(selection), selection.rows):
            if time.monotonic() > deadline:
                skipped.append(f"{case.op} {case.label}")
                continue
            try:
                with torch.set_grad_enabled(bool(case.extra.get("grad", False))):
                    found = rows_of(run_case(case, device, rounds=args.rounds), roofs)
            except Exception as error:  # out of memory for its reference, say
                raise_if_lost(f"{case.op} {case.label}")
                print(f"{case.op} {case.label}: left out: {type(error).__name__}: {error}", flush=True)
                broken += 1
                if device == "cuda":
                    torch.cuda.empty_cache()
                continue
            print("\n".join(report.case_lines(found)), flush=True)
            rows += found
            if args.csv:
                write_csv(args.csv, rows)
    if skipped:
        print(f"{len(skipped)} cases left out because --minutes {args.minutes:g} were over: {'; '.join(skipped)}")
    if not rows:
        raise ValueError("no case was selected")
    for line in report.summary_by_rows(rows):
        ratios = f"own {line['own_times_best_peer']}x, op {line['op_times_best_peer']}x of the best peer"
        print(f"{line['op']:26} m={line['m']}: {ratios}, geometric mean of {line['cases']}")
    lines = report.summary(rows)
    print(f"\n{'op':26} cases  own/best peer (worst, wins)   op/best peer   wrong or failed")
    for line in lines:
        own = f"{line['own_times_best_peer']!s:>6} ({line['own_worst']}, {line['own_wins']})"
        op_ratio = f"{line['op_times_best_peer']!s:>6}"
        print(f"{line['op']:26} {line['cases']:5}  {own:28} {op_ratio} {line['wrong_or_failed']:12}")
    if args.plot:
        try:
            print("plots: " + ", ".join(report.plot_ops(args.plot, rows)))
        except Exception as error:  # the figures are what counts, and they are written
            print(f"no plots: {type(error).__name__}: {error}")
    return 1 if broken or any(line["wrong_or_failed"] for line in lines) else 0


def _device(interpret: bool) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if interpret:
        from tp_kernels.ops.kernels.launch import INTERPRETED

        if not INTERPRETED:
            raise ValueError("--interpret needs TRITON_INTERPRET=1 in the environment when the process starts")
        return "cpu"
    raise ValueError(
        "the ops are measured on a CUDA GPU, and none is available here; --interpret tries them out on CPU"
    )


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``tune``."""
    _add_selection(parser, ["llama3-8b"], [1, 2, 4, 8])
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="table to write (default: the user's, read by every later process)"
    )
    parser.add_argument("--again", action="store_true", help="measure cases that have an entry already")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile candidates (default: one a core)")


def run_tune(args: argparse.Namespace) -> int:
    """Run ``tune``: resumable, within ``--minutes``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tp_kernels.ops._gpu import gpu_of
    from tp_kernels.ops.tuning import user_table
    from tp_kernels.testing.op_bench import tuner

    if not torch.cuda.is_available():
        raise ValueError("tuning measures on a CUDA GPU, and none is available here")
    started = time.monotonic()
    deadline = started + 60 * args.minutes
    info = gpu_of(torch.empty(1, device="cuda"))
    table = tuner.Table(args.out or user_table(info.slug), info.name)
    selection = _selection(args)
    cases = tuner.pending(select_cases(selection), table, args.again)
    if not cases:
        print(f"nothing to do: every selected case is in {table.path}; --again measures them anew")
        return 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done = 0
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress, torch.no_grad():
        compiling = progress.add_task("compiling", total=None)
        count = tuner.precompile(
            selection,
            cases,
            info,
            processes=args.jobs,
            deadline=started + 30 * args.minutes,  # half of the time; the other half is for measuring
            progress=lambda n, total: progress.update(compiling, completed=n, total=total),
        )
        progress.console.print(f"{count} kernels compiled in {time.monotonic() - started:.0f} s")
        measuring = progress.add_task("measuring", total=len(cases))
        for _, case in cases:
            if time.monotonic() > deadline:
                break
            try:
                with torch.set_grad_enabled(bool(case.extra.get("grad", False))):
                    found = tuner.tune_case(case, "cuda", deadline)
            except Exception as error:  # out of memory for its reference, say: the op keeps its default there
                raise_if_lost(f"{case.op} {case.label}")
                torch.cuda.empty_cache()
                progress.console.print(f"{case.op} {case.label}: {type(error).__name__}: {error}", highlight=False)
                continue
            if found is None:
                break
            path, config, us = found
            table.put(case, path, config, us)
            done += 1
            progress.update(measuring, completed=done)
            figures = ", ".join(f"{name} {value:.1f}" for name, value in sorted(us.items(), key=lambda item: item[1]))
            progress.console.print(f"{case.op} {case.label}: {path} {config or ''} ({figures} us)", highlight=False)
    left = len(cases) - done
    print(f"{done} cases measured, {left} left; table: {table.path}" + ("; run again to go on" if left else ""))
    return 0
