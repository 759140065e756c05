"""``tp-kernels bench``: the shipped microbenchmarks."""

from __future__ import annotations

import argparse

from tp_kernels.commands.common import HelpFormatter

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "run"]

NAME = "bench"
SUMMARY = "measure this machine"
DESCRIPTION = "Microbenchmarks: competitors interleaved in one run, medians and quantiles, checked before timing."
EXAMPLES = """\
examples:
  tp-kernels bench all-reduce
  tp-kernels bench ops --op rms_norm
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks."""
    from tp_kernels.commands import bench_layer
    from tp_kernels.testing import bench_all_reduce, bench_all_reduce_gpu, bench_overlap
    from tp_kernels.testing.op_bench import commands

    benchmarks = parser.add_subparsers(title="benchmarks", dest="benchmark", metavar="BENCHMARK", required=True)
    all_reduce = benchmarks.add_parser(
        "all-reduce",
        help="shared memory against Gloo, in nccl-tests' columns",
        description="All-reduce over CPU ranks: shared memory against Gloo, in the columns that nccl-tests prints.",
        epilog=_ALL_REDUCE_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    bench_all_reduce.add_arguments(all_reduce)
    all_reduce.set_defaults(run=bench_all_reduce.run)
    all_reduce_gpu = benchmarks.add_parser(
        "all-reduce-gpu",
        help="peer-memory kernels against torch's and NCCL, alone and fused with the norm",
        description="All-reduce over GPU ranks, alone and fused with residual and norm; ranks share one GPU where "
        "there are not enough.",
        epilog=_ALL_REDUCE_GPU_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    bench_all_reduce_gpu.add_arguments(all_reduce_gpu)
    all_reduce_gpu.set_defaults(run=bench_all_reduce_gpu.run)
    overlap = benchmarks.add_parser(
        "overlap",
        help="a matmul and its all-reduce over NCCL, one after the other and side by side",
        description="A row-parallel matmul and its all-reduce over NCCL, one after the other and in chunks side by "
        "side; ranks share one GPU where there are not enough.",
        epilog=_OVERLAP_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    bench_overlap.add_arguments(overlap)
    overlap.set_defaults(run=bench_overlap.run)
    layer = benchmarks.add_parser(
        "layer",
        help="a decoder layer over several ranks against itself with communication switched off",
        description="Decoder layers of a model's shapes over several ranks, prefill and decode, against the same ranks "
        "with communication switched off; ranks share one GPU where there are not enough.",
        epilog=_LAYER_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    bench_layer.add_arguments(layer)
    layer.set_defaults(run=bench_layer.run)
    ops = benchmarks.add_parser(
        "ops",
        help="the GPU kernels against PyTorch, Liger, FlashAttention and others",
        description="The GPU kernels against whatever else is installed, on the shapes of a model's layers.",
        epilog=_OPS_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    commands.add_bench_arguments(ops)
    ops.set_defaults(run=commands.run_bench)


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
  tp-kernels bench overlap --ranks 4 --tune
"""

_LAYER_EXAMPLES = """\
examples:
  tp-kernels bench layer --ranks 4 --csv layer.csv
  tp-kernels bench layer --ranks 4 --what decode --context 128 1024 8192 --no-nccl
  tp-kernels bench layer --ranks 2 --device cpu --model tiny --tokens 32 --context 32
"""

_OPS_EXAMPLES = """\
examples:
  tp-kernels bench ops
  tp-kernels bench ops --op linear --model llama3-70b --tp 8 --rows 1 16 64 --csv linear.csv --plot plots
"""


def run(args: argparse.Namespace) -> int:
    """Never called: argparse requires a benchmark, which sets its own ``run``."""
    raise AssertionError("unreachable: a benchmark is required")
