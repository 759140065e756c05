"""``tp-kernels tune``: find the fastest kernels, or the fastest ways between ranks, on this machine's GPUs."""

from __future__ import annotations

import argparse

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "run"]

NAME = "tune"
SUMMARY = "find the fastest kernels for this GPU, or the fastest ways between ranks"
DESCRIPTION = """\
Measure every configuration of the GPU kernels on this GPU, against what PyTorch does, and keep the winners in a table
that the ops read. An interrupted run goes on where it stopped. With `comm`, started on N ranks: measure each way to
communicate by size instead, for the groups of N ranks that are made later."""
EXAMPLES = """\
examples:
  tp-kernels tune                                  shapes of Llama-3-8B at tp 1, 2, 4, 8
  tp-kernels tune --op linear --model qwen3-8b --tp 2 --minutes 5
  tp-kernels launch --nproc 4 --module tp_kernels tune comm --minutes 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from tp_kernels.testing.op_bench import commands

    parser.add_argument(
        "what",
        nargs="?",
        choices=("kernels", "comm"),
        default="kernels",
        help="kernels (the default), or comm, of whose options there are --minutes and --out",
    )
    commands.add_tune_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Tune."""
    if args.what == "comm":
        from tp_kernels.testing import tune_comm

        return tune_comm.run(args.minutes, args.out)
    from tp_kernels.testing.op_bench import commands

    return commands.run_tune(args)
