"""``tp-kernels doctor``: what is installed and built here, and whether it works."""

from __future__ import annotations

import argparse

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "run"]

NAME = "doctor"
SUMMARY = "report on the environment and check that everything works"
DESCRIPTION = """\
Report versions, what was built, NCCL copies, shared memory, cores and GPUs, then run real checks: collectives on 2 and
4 ranks, the parallel layers against plain PyTorch, latency. Each is passed, failed or skipped with its reason.
Exit status 1 if any failed."""
EXAMPLES = """\
examples:
  tp-kernels doctor
  tp-kernels doctor --json > report.json      for a bug report
  tp-kernels doctor --no-checks               only the report, in a few seconds
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--no-checks", action="store_true", help="report only; start no ranks")


def run(args: argparse.Namespace) -> int:
    """Print the report; exit status 1 when a check failed."""
    from tp_kernels import doctor

    return doctor.main(as_json=args.json, run_checks=not args.no_checks)
