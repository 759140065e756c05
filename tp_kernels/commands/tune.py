"""``tp-kernels tune``: find the fastest path and configuration for each op on this machine's GPU."""

from __future__ import annotations

import argparse

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "run"]

NAME = "tune"
SUMMARY = "find the fastest kernels for this GPU"
DESCRIPTION = (
    "Measure every configuration of the GPU kernels on this GPU, against what PyTorch does, and keep the winners in a "
    "table that the ops read. An interrupted run goes on where it stopped."
)
EXAMPLES = """\
examples:
  tp-kernels tune                                  shapes of Llama-3-8B at tp 1, 2, 4, 8
  tp-kernels tune --op linear --model qwen3-8b --tp 2 --minutes 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from tp_kernels.testing.op_bench import commands

    commands.add_tune_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Tune."""
    from tp_kernels.testing.op_bench import commands

    return commands.run_tune(args)
