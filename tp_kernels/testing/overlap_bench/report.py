"""What ``bench overlap`` writes: rows of the CSV, entries of the tuning table, and what "auto" would take by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tp_kernels.comm.overlap import SMALLEST_CHUNK, hidden_fraction, worth_overlapping
from tp_kernels.testing.bench import Timing
from tp_kernels.testing.overlap_bench.case import Candidate, Case, Plan

__all__ = [
    "counts",
    "entries",
    "failed_row",
    "gate",
    "is_of",
    "peer_row",
    "plan_of",
    "plan_rows",
    "print_row",
    "set_gates",
    "write_table",
]

OURS = ("none", "chunked", "fused")
_BLANK = {"gate": "", "beside": "", "ours_over_peer": "", "failed": ""}
_FIGURES = ("compute_us", "comm_us", "path", "chunks", "growth", "rows", "time_us", "q20_us", "q80_us", "over_none")
_KEY = ("op", "backend", "m", "n", "in_features", "ranks", "ranks_per_gpu", "max_ctas")


def plan_rows(
    common: Mapping[str, Any],
    plans: Sequence[Plan],
    timed: Mapping[str, Timing],
    counts: Mapping[Plan, Mapping[str, int]],
) -> list[dict[str, Any]]:
    """A row for each plan; ``gate`` is left empty.

    Args:
        common: columns of all of them, ``m`` among them.
        plans: what was timed, ``Plan("none")`` first.
        timed: seconds by ``str`` of the plan, and of "compute" and "comm".
        counts: of each plan ``differs``, ``wrong`` and ``wrong_sums``.
    """
    compute, comm, none = (timed[name].median for name in ("compute", "comm", "none"))
    rows = []
    for plan in plans:
        timing, schedule = timed[str(plan)], plan.schedule
        rows.append(
            {
                **common,
                "compute_us": _us(compute),
                "comm_us": _us(comm),
                "path": plan.path,
                "chunks": 1 if schedule is None else schedule.chunks,
                "growth": 1.0 if schedule is None else schedule.growth,
                "rows": str(common["m"] if schedule is None else schedule),
                **_quantiles(timing),
                "over_none": round(none / timing.median, 3),
                "hidden": "" if plan.path == "none" else round(hidden_fraction(none, timing.median, compute, comm), 3),
                **counts[plan],
                **_BLANK,
            }
        )
    return rows


def peer_row(
    common: Mapping[str, Any], path: str, timed: Mapping[str, Timing], wrong_sums: int, beside: str
) -> dict[str, Any]:
    """The row of a peer: ``ours_over_peer`` is our time over its, both taken in turns.

    Args:
        common: columns of the case.
        path: the peer's name in ``timed``, where "ours" and "none" are ours.
        wrong_sums: elements that were not the exact ones.
        beside: what "ours" is, in words.
    """
    timing = timed[path]
    return {
        **common,
        "compute_us": "",
        "comm_us": "",
        "path": path,
        "chunks": "",
        "growth": "",
        "rows": "",
        **_quantiles(timing),
        "over_none": round(timed["none"].median / timing.median, 3),
        "hidden": "",
        "differs": "",
        "wrong": 0,
        "wrong_sums": wrong_sums,
        **_BLANK,
        "beside": beside,
        "ours_over_peer": round(timed["ours"].median / timing.median, 3),
    }


def failed_row(common: Mapping[str, Any], words: str) -> dict[str, Any]:
    """The row of a communicator that could not carry a case out, with the reason and no figures."""
    unknown = dict.fromkeys((*_FIGURES, "hidden", "differs", "wrong", "wrong_sums"), "")
    return {**common, **unknown, **_BLANK, "failed": words}


def counts(row: Mapping[str, Any]) -> bool:
    """Whether a row is a path of ours that ran and was right."""
    right = not any(row.get(name) for name in ("wrong", "wrong_sums", "failed"))
    return right and row["path"] in OURS


def is_of(row: Mapping[str, Any], case: Case) -> bool:
    """Whether a row is about a case."""
    return (row["op"], row["m"], row["n"], row["in_features"]) == (case.op, case.m, case.n, case.in_features)


def plan_of(row: Mapping[str, Any]) -> Plan:
    """The plan that a row of ours is about."""
    if row["path"] != "chunked":
        return Plan(row["path"])
    return Plan("chunked", Candidate(row["chunks"], row["growth"], tuple(map(int, row["rows"].split("+")))))


def _quantiles(timing: Timing) -> dict[str, float]:
    return {"time_us": _us(timing.median), "q20_us": _us(timing.q20), "q80_us": _us(timing.q80)}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def entries(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For the tuning table: per op, shape and communicator the sizes, the winner, its configuration and the times.

    What was wrong does not compete, nor do peers.
    """
    best: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if not counts(row):
            continue
        kept = best.setdefault(tuple(row.get(name) for name in _KEY), {})
        if row["path"] not in kept or row["time_us"] < kept[row["path"]]["time_us"]:
            kept[row["path"]] = row
    found = []
    for (op, backend, m, n, in_features, ranks, per_gpu, ctas), kept in best.items():
        winner = min(kept.values(), key=lambda row: row["time_us"])
        sizes = {"m": m, "n": n, "in_features": in_features}
        sizes |= {"ranks": -ranks, "ranks_per_gpu": -per_gpu, "max_ctas": -ctas}
        chunked = winner["path"] == "chunked"
        config = {"chunks": winner["chunks"], "growth": winner["growth"]} if chunked else {}
        us = {path: row["time_us"] for path, row in kept.items()}
        found.append({"op": op, "backend": backend, "sizes": sizes, "path": winner["path"], "config": config, "us": us})
    return found


def gate(entry: Mapping[str, Any]) -> str:
    """The path that "auto" takes where this entry is the measurement."""
    if entry["sizes"]["m"] <= SMALLEST_CHUNK:
        return "none"
    pays, _ = worth_overlapping(entry["path"], entry["us"])
    return entry["path"] if pays else "none"


def set_gates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fill the column ``gate`` of the rows of one case by what they make of the table; its entries."""
    found = entries(rows)
    gates = {(entry["op"], entry["backend"], entry["sizes"]["max_ctas"]): gate(entry) for entry in found}
    for row in rows:
        row["gate"] = gates.get((row["op"], row["backend"], -row["max_ctas"]), "none")
    return found


class _Entry(NamedTuple):
    """What the tuner's table wants to know of a measured shape."""

    op: str
    dtype: Any
    sizes: dict[str, int]


def write_table(found: Sequence[Mapping[str, Any]], dtype: Any, path: Path, gpu: str) -> None:
    """Put entries into a tuning table, in the sections of their ops and communicators.

    Args:
        found: of ``entries``.
        dtype: of the operands.
        path, gpu: the file, and the GPU that it is of.
    """
    from tp_kernels.ops._overlap_choice import overlap_table
    from tp_kernels.testing.op_bench.tuner import Table

    table = Table(path, gpu)
    for entry in found:
        section = overlap_table(entry["backend"], entry["op"])
        table.put(_Entry(section, dtype, entry["sizes"]), entry["path"], entry["config"], entry["us"])


def print_row(row: Mapping[str, Any], first: bool) -> None:
    """One line of the table that people read, after its head."""
    columns = {
        "op": 23,
        "backend": 8,
        "m": 7,
        "n": 7,
        "in_features": 12,
        "max_ctas": 9,
        "compute_us": 11,
        "comm_us": 10,
    }
    columns |= {"path": 15, "time_us": 10, "over_none": 10, "hidden": 10, "gate": 9}
    if first:
        print(
            f"# {row['ranks']} ranks, {row['ranks_per_gpu']} on a GPU, {row['sms']} SMs each, {row['dtype']}; medians "
            "of the slowest rank, microseconds"
        )
        print("#" + "".join(f"{name:>{width}}" for name, width in columns.items()) + "  rows of the chunks", flush=True)
    wrong = {name: row[name] for name in ("wrong", "wrong_sums") if row[name]}
    warning = f"  WRONG: {', '.join(f'{name} {count}' for name, count in wrong.items())} elements" if wrong else ""
    warning += f"  FAILED: {row['failed']}" if row["failed"] else ""
    peer = f"  ours/peer {row['ours_over_peer']} ({row['beside']})" if row["beside"] else ""
    text = "".join(f"{row[name]!s:>{width}}" for name, width in columns.items())
    print(f" {text}  {row['rows']}{peer}{warning}", flush=True)
