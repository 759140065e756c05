"""Rows of ``tp-kernels bench model``, the table that people read, and the picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tp_kernels.testing.bench import Timing, load_pyplot
from tp_kernels.testing.gpu_timer import Roofs
from tp_kernels.testing.machine import machine_record
from tp_kernels.testing.model_bench.budget import Goal
from tp_kernels.testing.model_bench.check import Verdict

__all__ = ["Case", "Entry", "case_lines", "plot", "rows_of"]


class Case(NamedTuple):
    """One thing that is measured.

    Attributes:
        what: "prefill", "decode", or "mixed": a prefill of prompts of different lengths.
        batch: rows.
        tokens: new ones of each row, of the longest if they differ.
        context: cached before.
        lengths: of each prompt, where they differ.
    """

    what: str
    batch: int
    tokens: int
    context: int
    lengths: tuple[int, ...] = ()

    @property
    def new_tokens(self) -> int:
        """Over all rows."""
        return sum(self.lengths) if self.lengths else self.batch * self.tokens

    def __str__(self) -> str:
        if self.what == "prefill":
            return f"prefill of {self.batch} x {self.tokens} tokens"
        if self.what == "mixed":
            return f"prefill of {'+'.join(map(str, self.lengths))} tokens together"
        return f"decode, batch {self.batch} after {self.context} tokens"


@dataclass
class Entry:
    """What is known of one contender in one case.

    Attributes:
        ours: one of this package's, and not a rival.
        quantize: what its weights are in, or "none".
        mode: "graph", "eager" or why there is no graph; "host" for a time taken on a CPU.
        bytes, flops: what the pass reads and computes; 0 where it is not counted.
        timing: seconds a pass; None if it did not run.
        verdict: of the check; None where there is nothing to compare with.
        goal: for this contender in this case, if there is one.
        failure: why it did not run.
        off: the name of the same without communication, on the same ranks.
        sums: what adds over the ranks: "symm", "nccl", ...; "off" where nothing does, "" on one rank.
    """

    ours: bool
    quantize: str = "none"
    mode: str = ""
    bytes: int = 0
    flops: int = 0
    timing: Timing | None = None
    verdict: Verdict | None = None
    goal: Goal | None = None
    failure: str = ""
    off: str = ""
    sums: str = ""


def rows_of(
    common: Mapping[str, Any], case: Case, entries: Mapping[str, Entry], roofs: Roofs | None
) -> list[dict[str, Any]]:
    """One row a contender, those that failed included.

    Args:
        common: columns that all rows share.
        case: what was measured.
        entries: the contenders by name.
        roofs: what this GPU reached in the same run; None leaves percentages out.
    """
    right = [e for e in entries.values() if e.timing and (e.verdict is None or e.verdict.good)]
    peers = {name: e.timing.median for name, e in entries.items() if e in right and not e.ours}
    best_peer = min(peers.values(), default=None)
    best_name = min(peers, key=peers.__getitem__, default="")
    rows = []
    for name, entry in entries.items():
        timing, seconds = entry.timing, entry.timing.median if entry.timing else None
        off = entries[entry.off].timing if entry.off else None
        over_off = _ratio(seconds, off.median) if off else None
        # What adds nothing up competes with nobody.
        times_best = None if entry.sums == "off" else _ratio(best_peer, seconds)
        roof = _roof(entry, roofs)
        reached = {"ms": seconds and seconds * 1e3, "over_off": over_off}
        goal, met = "", ""
        if entry.goal is not None:
            unit = "ms" if entry.goal.measure == "ms" else "x off"
            goal = f"<= {entry.goal.limit:g} {unit}"
            value = reached[entry.goal.measure]
            met = "" if value is None else "yes" if value <= entry.goal.limit and entry in right else "no"
        rows.append(
            {
                "what": case.what,
                **common,
                "batch": case.batch,
                "tokens": case.tokens,
                "context": case.context,
                "lengths": "+".join(map(str, case.lengths)),
                "contender": name,
                "ours": int(entry.ours),
                "sums": entry.sums,
                "quantize": entry.quantize,
                "mode": entry.mode,
                "ms": _rounded(seconds, 1e3, 4),
                "q20_ms": _rounded(timing and timing.q20, 1e3, 4),
                "q80_ms": _rounded(timing and timing.q80, 1e3, 4),
                "tokens_s": _rounded(_ratio(case.new_tokens, seconds), 1, 1),
                "gb_read": _rounded(entry.bytes or None, 1e-9, 6),
                "tb_s": _rounded(_ratio(entry.bytes, seconds), 1e-12, 3),
                "tflop": _rounded(entry.flops or None, 1e-12, 6),
                "tflop_s": _rounded(_ratio(entry.flops, seconds), 1e-12, 1),
                "percent_of_roof": _rounded(_ratio(roof, seconds), 100, 1),
                "times_best_peer": _rounded(times_best, 1, 3),
                "best_peer": best_name if times_best else "",
                "over_off": _rounded(over_off, 1, 3),
                "goal": goal,
                "met": met,
                "error": "" if entry.verdict is None else f"{entry.verdict.error:.2e}",
                "allowed_error": "" if entry.verdict is None else f"{entry.verdict.allowed:.2e}",
                "verdict": entry.failure or ("" if entry.verdict is None else "ok" if entry.verdict.good else "wrong"),
                "copy_tb_s": _rounded(roofs and roofs.copy, 1e-12, 3),
                "cublas_tflop_s": _rounded(roofs and roofs.matmul, 1e-12, 1),
            }
        )
    return rows


def _roof(entry: Entry, roofs: Roofs | None) -> float | None:
    """Seconds that reading and computing take at the rates of this run."""
    return None if roofs is None else max(entry.bytes / roofs.copy, entry.flops / roofs.matmul)


def _ratio(value: float | None, of: float | None) -> float | None:
    """None where either is missing, or zero: bytes and operations that are not counted."""
    return value / of if value and of else None


def _rounded(value: float | None, factor: float, digits: int) -> float | str:
    return "" if value is None else round(value * factor, digits)


def case_lines(case: Case, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of one case, fastest first; what failed last, with the reason."""
    lines = [str(case)]
    for row in sorted(rows, key=lambda row: (row["ms"] == "", row["ms"])):
        if row["ms"] == "":
            lines.append(f"    {row['contender']:27} {row['verdict']}")
            continue
        rate = f"{row['tflop_s']:8.1f} TFLOP/s" if row["tflop_s"] != "" else f"{row['tb_s']:8.3f} TB/s   "
        of_roof = f"{row['percent_of_roof']:5.1f}% of roof" if row["percent_of_roof"] != "" else ""
        peer = "best peer" if row["quantize"] == "none" else "best unquantised peer"
        ratio = f"{row['times_best_peer']:6.3f}x {peer}" if row["times_best_peer"] != "" else ""
        off = f"{row['over_off']:6.3f}x off" if row["over_off"] != "" else ""
        goal = f"goal {row['goal']}: {row['met']}" if row["goal"] else ""
        wrong = f"WRONG by {row['error']}, allowed {row['allowed_error']}" if row["verdict"] == "wrong" else ""
        lines.append(
            f"    {row['contender']:27} {row['ms']:10.3f} ms {row['tokens_s']:10.1f} tokens/s {rate} {of_roof:14} "
            f"{off:11} {ratio:17} {goal} {wrong} ({row['mode']})"
        )
    return [line.rstrip() for line in lines]


def _case_of(row: Mapping[str, Any]) -> Case:
    lengths = tuple(map(int, row["lengths"].split("+"))) if row["lengths"] else ()
    return Case(row["what"], row["batch"], row["tokens"], row["context"], lengths)


def plot(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar a contender and a panel a case, with the roof of the best as a line; needs matplotlib.

    Raises:
        ModuleNotFoundError: says how to install matplotlib.
    """
    pyplot = load_pyplot()
    cases: dict[Case, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["ms"] != "":
            cases.setdefault(_case_of(row), []).append(row)
    machine = machine_record()
    figure, panels = pyplot.subplots(1, max(1, len(cases)), figsize=(max(6, 3.4 * len(cases)), 4.5), squeeze=False)
    for axes, (case, found) in zip(panels[0], cases.items(), strict=False):
        ours = {row["contender"] for row in found if row["ours"]}
        names = [row["contender"] for row in found]
        low = [max(0.0, row["ms"] - row["q20_ms"]) for row in found]
        high = [max(0.0, row["q80_ms"] - row["ms"]) for row in found]
        colours = ["tab:blue" if name in ours else "tab:gray" for name in names]
        bars = axes.bar(names, [row["ms"] for row in found], yerr=(low, high), color=colours)
        axes.bar_label(bars, [f"{row['ms']:.2f}" for row in found], fontsize=7)
        for bar, row in zip(bars, found, strict=True):
            if row["percent_of_roof"] != "":
                roof = row["ms"] * row["percent_of_roof"] / 100
                axes.plot([bar.get_x(), bar.get_x() + bar.get_width()], [roof, roof], color="tab:red", linewidth=1.5)
        axes.set_title(str(case), fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axes.set_ylabel("ms")
    first = rows[0]
    of = f"tp {first['tp']}" + (f", one shard of {first['shard']} without communication" if first["shard"] > 1 else "")
    where = f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, {machine['date']}"
    roof = "; red: roof of this run" if any(row["percent_of_roof"] != "" for row in rows) else ""
    figure.suptitle(f"{first['model']}, {of}, {first['dtype']}: {where}{roof}", fontsize=9)
    figure.tight_layout()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
