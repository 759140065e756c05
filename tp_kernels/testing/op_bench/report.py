"""What people read: a table a case, a summary an op, and a plot of speeds relative to the best competitor; and the text
of a tuning table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tp_kernels.testing.bench import load_pyplot
from tp_kernels.testing.machine import machine_record

__all__ = ["case_lines", "plot_ops", "summary", "summary_by_rows", "table_text"]


def case_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A case's competitors, fastest first; failures last, with the reason."""
    first = rows[0]
    lines = [f"{first['op']}  {first['case']}  {first['dtype']}  {first['sizes']}"]
    for row in sorted(rows, key=lambda row: row["us"] if row["us"] != "" else math.inf):
        if row["us"] == "":
            lines.append(f"    {row['competitor']:24} {row['verdict']} (error {row['error']})")
            continue
        rate = f"{row['tflop_s']:8.1f} TFLOP/s" if row["tflop_s"] != "" else f"{row['tb_s'] or 0:8.3f} TB/s   "
        roof = f"{row['percent_of_roof']:5.1f}% of roof" if row["percent_of_roof"] != "" else ""
        ratio = f"{row['times_best_peer']:6.3f}x best peer" if row["times_best_peer"] != "" else ""
        mode = "" if row["mode"] == "graph" else f" ({row['mode']})"
        lines.append(f"    {row['competitor']:24} {row['us']:10.2f} us {rate} {roof:14} {ratio}{mode}  {row['config']}")
    return lines


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each op: geometric mean of the best own path (and of the op itself) over the best peer, wins and losses."""
    out = []
    for op in dict.fromkeys(row["op"] for row in rows):
        ratios: dict[str, list[float]] = {"own": [], "op": []}
        wrong = 0
        for case in _cases([row for row in rows if row["op"] == op]):
            peers = [r["us"] for r in case if not _ours(r["competitor"]) and r["us"] != ""]
            wrong += sum(1 for r in case if _ours(r["competitor"]) and r["verdict"] != "ok")
            for kind, mine in (
                ("own", [r["us"] for r in case if r["competitor"].startswith("own:") and r["us"] != ""]),
                ("op", [r["us"] for r in case if r["competitor"] == "op" and r["us"] != ""]),
            ):
                if mine and peers:
                    ratios[kind].append(min(peers) / min(mine))
        out.append(
            {
                "op": op,
                "cases": max(len(ratios["own"]), len(ratios["op"])),
                "own_times_best_peer": _geometric_mean(ratios["own"]),
                "own_worst": round(min(ratios["own"]), 3) if ratios["own"] else "",
                "own_wins": sum(ratio >= 1 for ratio in ratios["own"]),
                "op_times_best_peer": _geometric_mean(ratios["op"]),
                "wrong_or_failed": wrong,
            }
        )
    return out


def summary_by_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The summary of each number of rows ``m`` apart, for ops that were measured at several."""
    groups: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        sizes = dict(part.split("=") for part in row["sizes"].split())
        if "m" in sizes:
            groups.setdefault(row["op"], {}).setdefault(int(sizes["m"]), []).append(row)
    return [
        {"m": m} | line
        for by_rows in groups.values()
        if len(by_rows) > 1
        for m, of_rows in sorted(by_rows.items())
        for line in summary(of_rows)
    ]


def _ours(competitor: str) -> bool:
    return competitor == "op" or competitor.startswith("own:")


def _cases(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"], row["dtype"], row["sizes"]), []).append(row)
    return list(groups.values())


def _geometric_mean(values: Sequence[float]) -> float | str:
    return round(math.exp(sum(math.log(value) for value in values) / len(values)), 3) if values else ""


def plot_ops(folder: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One picture an op: speed of every competitor relative to the best peer, case by case; needs matplotlib.

    Returns:
        The files written.
    """
    pyplot = load_pyplot()
    os.makedirs(folder, exist_ok=True)
    machine, files = machine_record(), []
    for op in dict.fromkeys(row["op"] for row in rows):
        cases = _cases([row for row in rows if row["op"] == op and row["times_best_peer"] != ""])
        if not cases:
            continue
        names = list(dict.fromkeys(row["competitor"] for case in cases for row in case))
        figure, axes = pyplot.subplots(figsize=(max(7, 0.42 * len(cases) + 3), 4.5))
        for name in names:
            points = [
                (x, row["times_best_peer"]) for x, case in enumerate(cases) for row in case if row["competitor"] == name
            ]
            ours = _ours(name)
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=5 if ours else 3,
                label=name,
                alpha=1 if ours else 0.6,
            )
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(ylabel="speed, best peer = 1", ylim=(0, None))
        axes.set_xticks(range(len(cases)), [case[0]["case"] for case in cases], rotation=60, ha="right", fontsize=7)
        axes.grid(True, axis="y", alpha=0.3)
        axes.legend(fontsize=7)
        axes.set_title(
            f"{op}: {machine['gpu'] or machine['cpu']}, torch {machine['torch']}, {machine['date']}", fontsize=9
        )
        path = os.path.join(folder, f"{op}.png")
        figure.savefig(path, dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        files.append(path)
    return files


def table_text(table: Mapping[str, Any]) -> str:
    """A tuning table as JSON with one entry a line, so that it can be read and compared."""
    ops = ",\n".join(
        f"  {json.dumps(op)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for op, rows in sorted(table["ops"].items())
    )
    head = {name: value for name, value in table.items() if name != "ops"}
    return json.dumps(head, indent=1)[:-2] + f',\n "ops": {{\n{ops}\n }}\n}}\n'
