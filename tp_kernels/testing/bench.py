"""Benchmark tools: competitors interleaved in one run, medians with 20/80 quantiles, CSV that names the machine, plots.

Interleaving matters more than repetition: on a shared machine the clock and the neighbours change from second to
second, and only competitors timed in turns see the same ones.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tp_kernels.testing.machine import machine_record

__all__ = [
    "Timing",
    "bytes_argument",
    "format_bytes",
    "interleaved",
    "load_pyplot",
    "parse_bytes",
    "plot_lines",
    "quantiles",
    "run_command_line",
    "sizes_between",
    "write_csv",
]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 20% and 80% quantiles over the rounds."""

    median: float
    q20: float
    q80: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Summary of one value per round."""
        return cls(*quantiles(seconds, (0.5, 0.2, 0.8)))


def quantiles(values: Iterable[float], fractions: Sequence[float]) -> list[float]:
    """Quantiles by linear interpolation; ValueError for no values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("quantiles: expected at least one value")
    result = []
    for fraction in fractions:
        at = fraction * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        result.append(ordered[low] + (ordered[high] - ordered[low]) * (at - low))
    return result


def interleaved(
    competitors: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    calls: int | Mapping[str, int] = 1,
    before: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time competitors in turns; returns each one's seconds per call, one value a round.

    Args:
        competitors: name to function; all ranks must pass the same names in the same order.
        rounds, warmup: timed and untimed turns of each competitor.
        calls: back-to-back calls in a turn, one number or one for each name; their median is the round's value, so a
            call during which the thread lost its processor does not count.
        before: called with the name before each turn, outside the timing (barrier, refilled inputs).
        clock: seconds; on a GPU pass a function that synchronises first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(warmup + rounds):
        for name, function in competitors.items():
            count = calls if isinstance(calls, int) else calls[name]
            if before is not None:
                before(name)
            stamps = [clock()]
            for _ in range(count):
                function()
                stamps.append(clock())
            if turn >= warmup:
                took = [end - start for start, end in itertools.pairwise(stamps)]
                seconds[name].append(statistics.median(took))
    return seconds


def parse_bytes(text: str) -> int:
    """``"4096"``, ``"4K"``, ``"32M"``, ``"1G"`` (powers of 1024) as bytes; ValueError otherwise."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    body = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = units.get(body[-1:], 1)
    number = body[:-1] if factor > 1 else body
    if not number.isdigit():
        raise ValueError(f"expected a size such as 4096, 4K, 32M or 1G, got {text!r}")
    return int(number) * factor


def bytes_argument(text: str) -> int:
    """argparse type: ``parse_bytes``, whose words an error keeps."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def format_bytes(count: int) -> str:
    """Shortest exact form in powers of 1024: ``"4K"``, ``"32M"``, ``"1000"``."""
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count >= factor and count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)


def sizes_between(smallest: int, largest: int, factor: int) -> list[int]:
    """``smallest``, times ``factor``, ... up to ``largest``; ValueError if there are none."""
    if smallest < 1 or largest < smallest or factor < 2:
        raise ValueError(f"expected 1 <= min <= max and factor >= 2, got {smallest}, {largest}, {factor}")
    sizes = [smallest]
    while sizes[-1] * factor <= largest:
        sizes.append(sizes[-1] * factor)
    return sizes


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, each with the machine, versions and date appended; makes the folder if needed."""
    if not rows:
        raise ValueError("write_csv: no rows")
    machine = machine_record()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def run_command_line(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
) -> int:
    """A benchmark as a program of its own: a ValueError of ``run`` is a usage error.

    Args:
        description: the first paragraph is the parser's.
        add_arguments, run: as for ``tp-kernels bench``.
        argv: None takes the process's.
    """
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ValueError as error:
        parser.error(str(error))


def load_pyplot() -> Any:
    """``matplotlib.pyplot`` that draws into files; ModuleNotFoundError says how to install it."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'tp-kernels[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_lines(
    path: str | os.PathLike[str],
    lines: Mapping[str, Sequence[tuple[float, Timing]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str = "time (us)",
) -> None:
    """Log-log plot of (x, Timing) per competitor, quantiles as bands, in microseconds; needs matplotlib.

    Raises:
        ModuleNotFoundError: says how to install matplotlib.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, points in lines.items():
        x = [point for point, _ in points]
        (line,) = axes.plot(x, [t.median * 1e6 for _, t in points], marker="o", markersize=3, label=name)
        axes.fill_between(
            x,
            [t.q20 * 1e6 for _, t in points],
            [t.q80 * 1e6 for _, t in points],
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(round(value)))
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    machine = machine_record()
    axes.set_title(
        f"{title}\n{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['date']}", fontsize=9
    )
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
