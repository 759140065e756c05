"""What a call costs the host: our ops and launchers at decode sizes, Triton's own launcher, PyTorch.

Decode is meant to be captured in a CUDA graph, where none of this counts; every other call pays it. Per path of ours:

- ``own:<path>``: our launcher with its default configuration, results allocated.
- ``triton:<path>``: the same launches as ``kernel[grid](...)``, nothing else.
- ``op``: the public function, which chooses a path. ``torch``: what it falls back to.

Microseconds from call to return, many calls before each wait for the GPU, in turns; ``over_triton`` is the time of
``own:<path>`` over that of ``triton:<path>``.

    python benchmarks/bench_launch.py --csv launch.csv
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.ops.kernels.launch import INTERPRETED, Launch, recording
from tp_kernels.testing.bench import Timing, interleaved, run_command_line, write_csv
from tp_kernels.testing.op_bench.case import Case
from tp_kernels.testing.op_bench.runner import Selection, select_cases

OPS = ("rms_norm", "linear", "swiglu_linear", "qkv_rope_cache", "decode_attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("--op", nargs="+", default=OPS, help=f"default: {' '.join(OPS)}")
    parser.add_argument("--model", default="llama3-8b", help="shapes (default %(default)s)")
    # Fewer than the launches that a stream holds, or the host would wait for the GPU.
    parser.add_argument("--calls", type=int, default=200, help="before each wait for the GPU (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write all figures, with machine, versions and date")


def plain_launches(launches: Sequence[Launch]) -> Callable[..., None]:
    """The launches as one would write them without this package."""
    plain = [
        (launch, {name: value for name, value in launch.options.items() if not (INTERPRETED and name == "launch_pdl")})
        for launch in launches
    ]

    def call(*_: Any) -> None:
        for launch, options in plain:
            launch.kernel[launch.grid](*launch.args, **options)

    return call


def ways_of(case: Case, inputs: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    """What is timed of a case, by name."""
    ways = {"torch": case.peers["torch"]} | ({} if case.public is None else {"op": case.public})
    for path, own in case.own.items():
        with recording() as launches:
            own.run(None, *inputs)
        ways[f"own:{path}"] = lambda *xs, own=own: own.run(None, *xs)
        ways[f"triton:{path}"] = plain_launches(launches)
    return ways


def measure(case: Case, device: str, calls: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each way."""
    inputs = case.inputs(torch.Generator(device=device).manual_seed(3))
    plays = {name: partial(function, *inputs) for name, function in ways_of(case, inputs).items()}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = interleaved(plays, rounds=rounds, warmup=1, calls=calls, before=lambda name: wait())
    wait()
    timed = {name: Timing.of(values) for name, values in seconds.items()}
    rows = []
    for name, timing in timed.items():
        plain = timed.get(name.replace("own:", "triton:")) if name.startswith("own:") else None
        figures = {"us": timing.median, "q20_us": timing.q20, "q80_us": timing.q80}
        rows.append(
            {"op": case.op, "case": case.label, "way": name}
            | {column: round(value * 1e6, 2) for column, value in figures.items()}
            | {"over_triton": "" if plain is None else round(timing.median / plain.median, 3)}
        )
    return rows


def run(args: argparse.Namespace) -> int:
    """Measure the first case of each op; 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not INTERPRETED:
        raise ValueError("launches are measured on a CUDA GPU, and none is available here")
    rows, done = [], set()
    with torch.inference_mode(), contextlib.nullcontext() if device == "cuda" else pretend(H100):
        dtype = torch.bfloat16 if device == "cuda" else torch.float16
        for case in select_cases(Selection(tuple(args.op), (args.model,), (1,), (dtype,), (1,))):
            if case.op in done or case.extra.get("grad", False):
                continue
            done.add(case.op)
            rows += (found := measure(case, device, args.calls, args.rounds))
            text = "  ".join(f"{row['way']} {row['us']:.1f}" for row in found)
            print(f"{case.op:>18}  {text}  us on the host", flush=True)
    if args.csv:
        write_csv(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command_line(__doc__, add_arguments, run, None))
