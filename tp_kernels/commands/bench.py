"""``tp-kernels bench``: the shipped microbenchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from tp_kernels.commands.common import HelpFormatter

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "run"]

NAME = "bench"
SUMMARY = "measure this machine"
DESCRIPTION = "Microbenchmarks: competitors interleaved in one run, medians and quantiles, checked before timing."
EXAMPLES = """\
examples:
  tp-kernels bench all-reduce
  tp-kernels bench ops --op rms_norm
  tp-kernels bench model --model llama3-8b
"""

_Add = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks."""
    from tp_kernels.commands import bench_layer, bench_model
    from tp_kernels.testing import bench_all_reduce, bench_all_reduce_gpu, bench_overlap
    from tp_kernels.testing.op_bench import commands

    benchmarks = parser.add_subparsers(title="benchmarks", required=True)

    def add(name: str, summary: str, description: str, examples: str, add_arguments: _Add, run: _Run) -> None:
        benchmark = benchmarks.add_parser(
            name, help=summary, description=description, epilog=examples, formatter_class=HelpFormatter
        )
        add_arguments(benchmark)
        benchmark.set_defaults(run=run)

    add(
        "all-reduce",
        "shared memory against Gloo, in nccl-tests' columns",
        "All-reduce over CPU ranks: shared memory against Gloo, in the columns that nccl-tests prints.",
        _ALL_REDUCE_EXAMPLES,
        bench_all_reduce.add_arguments,
        bench_all_reduce.run,
    )
    add(
        "all-reduce-gpu",
        "peer-memory kernels against torch's and NCCL, alone and fused with the norm",
        "All-reduce over GPU ranks, alone and fused with residual and norm; ranks share one GPU where there are not\n"
        "enough.",
        _ALL_REDUCE_GPU_EXAMPLES,
        bench_all_reduce_gpu.add_arguments,
        bench_all_reduce_gpu.run,
    )
    add(
        "overlap",
        "projections and their collectives, one after the other, side by side, and in one kernel",
        "Row-parallel projections with their all-reduce or reduce-scatter, column-parallel ones with the gathering of\n"
        "their tokens: one after the other, in chunks side by side over NCCL, in one kernel over peer memory, and as\n"
        "torch does it; ranks share one GPU where there are not enough.",
        _OVERLAP_EXAMPLES,
        bench_overlap.add_arguments,
        bench_overlap.run,
    )
    add(
        "layer",
        "a decoder layer over several ranks against itself with communication switched off",
        "Decoder layers of a model's shapes over several ranks, prefill and decode, against the same ranks with\n"
        "communication switched off; ranks share one GPU where there are not enough.",
        _LAYER_EXAMPLES,
        bench_layer.add_arguments,
        bench_layer.run,
    )
    add(
        "model",
        "prefill and decode of a whole model against transformers and plain PyTorch",
        "A whole model with random weights of real shapes: prefill and decode against transformers and a model\n"
        "written by hand in plain PyTorch with CUDA graphs; checked first, interleaved, beside the goals for an H100.",
        _MODEL_EXAMPLES,
        bench_model.add_arguments,
        bench_model.run,
    )
    add(
        "ops",
        "the GPU kernels against PyTorch, Liger, FlashAttention and others",
        _OPS_DESCRIPTION,
        _OPS_EXAMPLES,
        commands.add_bench_arguments,
        commands.run_bench,
    )
    # Who leaves the benchmark out is told which there are.
    benchmarks.metavar = f"{{{','.join(benchmarks.choices)}}}"


_ALL_REDUCE_EXAMPLES = """\
examples:
  tp-kernels bench all-reduce --ranks 2
  tp-kernels bench all-reduce --ranks 4 --csv all_reduce.csv --plot all_reduce.png
"""

_ALL_REDUCE_GPU_EXAMPLES = """\
examples:
  tp-kernels bench all-reduce-gpu --ranks 4 --csv all_reduce_gpu.csv
  tp-kernels bench all-reduce-gpu --ranks 2 --what norms --hidden 4096 --tokens 1 64 1024
"""

_OVERLAP_EXAMPLES = """\
examples:
  tp-kernels bench overlap --ranks 4 --rows 4096 --csv overlap.csv
  tp-kernels bench overlap --ranks 4 --op linear_all_reduce --minutes 5 --tune
  tp-kernels bench overlap --ranks 2 --device cpu --op linear_all_reduce --layers o --rows 8 --rounds 2
"""

_LAYER_EXAMPLES = """\
examples:
  tp-kernels bench layer --ranks 4 --csv layer.csv
  tp-kernels bench layer --ranks 4 --what decode --context 128 1024 8192 --no-nccl
  tp-kernels bench layer --ranks 2 --device cpu --model tiny --tokens 32 --context 32
"""

_MODEL_EXAMPLES = """\
examples:
  tp-kernels bench model --csv model.csv --plot model.png
  tp-kernels bench model --quantize none int8 --what decode --batch 1 --no-transformers
  tp-kernels bench model --shard 4 --batch 1 --csv shard.csv --profile kernels.csv
  tp-kernels bench model --tp 4 --batch 1 --no-nccl --csv tp4.csv
  tp-kernels bench model --device cpu --model tiny --prompt 32 --context 32 --batch 1 2
"""

_OPS_DESCRIPTION = """\
The GPU kernels against whatever else is installed (torch, torch.compile, cuDNN, FlashAttention, Liger, quack), on the
shapes of one rank's layers. Every competitor is checked first, then timed in CUDA graphs, in turns. Printed for each:
microseconds, TFLOP/s or TB/s, percent of what this GPU reaches now (a copy, cuBLAS), and speed as a multiple of the
best peer's. `op` is what a user of the package gets, `own:...` are our kernels one by one."""

_OPS_EXAMPLES = """\
examples:
  tp-kernels bench ops
  tp-kernels bench ops --op linear --model llama3-70b --tp 8 --rows 1 16 64 --csv linear.csv --plot plots
  TRITON_INTERPRET=1 tp-kernels bench ops --op rms_norm --model tiny --rows 3 --dtype fp16 --interpret
"""


def run(args: argparse.Namespace) -> int:
    """Never called: argparse requires a benchmark, which sets its own ``run``."""
    raise AssertionError("unreachable: a benchmark is required")
