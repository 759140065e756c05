"""``tp-kernels launch``: N ranks of a script or module on this host."""

from __future__ import annotations

import argparse
import sys

from tp_kernels.commands.common import CommandFailed, UsageError, at_least

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "run"]

NAME = "launch"
SUMMARY = "run a script or module on N ranks of this host"
DESCRIPTION = """\
Start N ranks with torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, ...). When one fails, the others are ended and
the first cause is printed once, with its traceback; no rank outlives the launcher. With --one-gpu all ranks share one
GPU, through a private MPS daemon where the machine has MPS (TP_KERNELS_MPS=0: without)."""
EXAMPLES = """\
examples:
  tp-kernels launch --nproc 2 examples/import_layers.py
  tp-kernels launch --nproc 4 --one-gpu my_script.py
  tp-kernels launch --nproc 4 --threads 1 --module my_package.train --steps 10
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--nproc", type=at_least(1), required=True, metavar="N", help="number of ranks")
    parser.add_argument(
        "--threads", type=at_least(1), metavar="N", help="OMP_NUM_THREADS per rank (default: the cores divided evenly)"
    )
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on one GPU, which each sees as cuda:0")
    parser.add_argument(
        "--gpu", type=at_least(0), metavar="INDEX", help="with --one-gpu: which of the visible GPUs (default: 0)"
    )
    parser.add_argument("--module", "-m", action="store_true", help="PROGRAM is a module, as in python -m")
    parser.add_argument("program", metavar="PROGRAM", help="script or module")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="arguments of the program")


def run(args: argparse.Namespace) -> int:
    """Run the program on the ranks; exit status 1 when one failed."""
    from tp_kernels.launch import LaunchError, launch

    if args.gpu is not None and not args.one_gpu:
        raise UsageError("--gpu chooses the GPU of --one-gpu, which was not given")
    program = [*(["-m"] if args.module else []), args.program, *args.args]
    try:
        launch(args.nproc, program, threads=args.threads, one_gpu=args.one_gpu, gpu=args.gpu or 0)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except LaunchError as error:
        # The program is the user's own: where it failed is what they need.
        print((error.root.error or {}).get("traceback", ""), end="", file=sys.stderr)
        raise CommandFailed(str(error)) from None
    return 0
