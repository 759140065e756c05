"""What the sub-commands share: their errors, argument types, and a guard that keeps stdout for the result alone."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

__all__ = ["CommandFailed", "HelpFormatter", "UsageError", "at_least", "number_above", "stdout_reserved"]


class UsageError(Exception):
    """The command was asked for something it cannot do: exit status 2."""


class CommandFailed(Exception):
    """The command could not do it: exit status 1. ``detail`` is shown with ``--verbose``."""

    def __init__(self, message: str, detail: str = ""):
        super().__init__(message)
        self.detail = detail


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


def at_least(least: int):
    """argparse type: an integer that is at least ``least``."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {value}")
        return value

    return integer


def number_above(bound: float, *, inclusive: bool = False, most: float = float("inf")):
    """argparse type: a finite number above ``bound`` (or equal to it) and at most ``most``."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (value > bound or (inclusive and value == bound)) or value > most or value == float("inf"):
            wanted = f"{'at least' if inclusive else 'above'} {bound:g}"
            wanted += f" and at most {most:g}" if most != float("inf") else ""
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, got {text}")
        return value

    return number


@contextlib.contextmanager
def stdout_reserved() -> Iterator[TextIO]:
    """Send everything written to stdout, by whatever library or rank, to stderr; yield a stream to the real stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
