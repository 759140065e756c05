"""The ``tp-kernels`` command: parses arguments, runs one sub-command, turns errors into messages and exit statuses.

Exit status: 0 done, 1 failed, 2 bad usage, 130 ended by Ctrl-C. Nothing heavy is imported before a sub-command runs, so
``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from tp_kernels.commands import COMMANDS
from tp_kernels.commands.common import CommandFailed, HelpFormatter, UsageError
from tp_kernels.version import __version__

__all__ = ["build_parser", "main"]

_EXAMPLES = """\
examples:
  tp-kernels demo                                                   a real model on 1 and 2 ranks, nothing to download
  tp-kernels doctor                                                 what is installed, and whether it works here
  tp-kernels generate --model smollm2 --tp 2 --chat --prompt "Why is the sky blue?"
  tp-kernels bench all-reduce --ranks 2
  tp-kernels launch --nproc 2 examples/import_layers.py
"""


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line; each sub-command sets ``run``, a function of the parsed arguments.

    Args:
        only: declare the arguments of this sub-command alone (benchmarks import torch for theirs); None is all of them.
    """
    parser = argparse.ArgumentParser(
        prog="tp-kernels",
        description="Tensor-parallel transformers on 1 to N ranks: demo, generation, validation, benchmarks.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tp-kernels {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--verbose", action="store_true", help="show tracebacks of errors (also: TP_KERNELS_TRACEBACK=1)"
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=HelpFormatter,
            parents=[common],
        )
        command.set_defaults(run=module.run)
        if only in (None, module.NAME):
            module.add_arguments(command)
    commands.metavar = f"{{{','.join(commands.choices)}}}"
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), "")
    try:
        args = build_parser(only=chosen).parse_args(argv)
    except SystemExit as stop:  # argparse has printed help (0) or the usage error (2)
        return int(stop.code or 0)
    show_traceback = args.verbose or os.environ.get("TP_KERNELS_TRACEBACK", "0") not in ("", "0")
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("\ntp-kernels: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Point stdout elsewhere, or the flush at exit complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        detail = getattr(error, "detail", "")
        if show_traceback:
            traceback.print_exc()
            if detail:
                print(detail, file=sys.stderr)
        usage = _is_usage_error(error)
        print(f"tp-kernels {args.command}: error: {_message(error)}", file=sys.stderr)
        return 2 if usage else 1


def _is_usage_error(error: Exception) -> bool:
    if isinstance(error, (UsageError, FileNotFoundError)):
        return True
    # A ValueError is a bad argument that the library refused, unless it is about the content of a file.
    return isinstance(error, ValueError) and not any(base.__name__ == "CheckpointError" for base in type(error).__mro__)


def _message(error: Exception) -> str:
    text = str(error) or type(error).__name__
    plain = isinstance(error, (UsageError, CommandFailed, ValueError, FileNotFoundError))
    return text if plain else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main())
