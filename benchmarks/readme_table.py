"""Writes the tables of measured figures from the CSV files under ``benchmarks/results``: the README's, and the outcomes
in docs/performance.md.

python benchmarks/readme_table.py            # rewrite both between their markers
python benchmarks/readme_table.py --check    # exit status 1 if one of them is not what the files say
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from tp_kernels.testing.op_bench import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def all_reduce_lines(rows: list[dict[str, str]]) -> list[str]:
    """One line for each size worth naming: small, medium, large."""
    named = {4096: "4 KB", 2 << 20: "2 MB", 32 << 20: "32 MB"}
    lines = []
    for row in rows:
        size = int(row["size"])
        if row["backend"] != "shm" or size not in named:
            continue
        gloo = next(r for r in rows if r["backend"] == "gloo" and r["size"] == row["size"])
        ours, theirs = float(row["time_us_in_place"]), float(gloo["time_us_in_place"])
        outside = float(gloo["time_us"]) / float(row["time_us"])
        memory = (
            f", {float(row['percent_of_memcpy']):.0f}% of memcpy" if size >= 1 << 20 and row["ranks"] == "2" else ""
        )
        time = f"{ours:.1f}" if ours < 100 else f"{ours:.0f}"
        lines.append(
            f"| all-reduce, {named[size]} {row['type']}, {row['ranks']} ranks | {time} us | "
            f"Gloo {theirs:.0f} us | {theirs / ours:.0f}x in place, {outside:.0f}x out of place{memory} |"
        )
    return lines


def generate_lines(rows: list[dict[str, str]]) -> list[str]:
    """Decode of the demo model against transformers with the same number of threads, and the gain of a second rank."""
    theirs = {row["threads_total"]: row for row in rows if row["path"] == "modules"}
    ours = [row for row in rows if row["path"] != "modules"]
    lines = []
    for row in ours:
        other = theirs[row["threads_total"]]
        model = row["model"].split(".")[0]
        each = int(row["threads_total"]) // int(row["tp"])
        lines.append(
            f"| decode, {model} {row['dtype']}, tp={row['tp']}, {each} thread{'s' if each > 1 else ''} a rank | "
            f"{float(row['decode_ms']):.1f} ms/token | transformers {float(other['decode_ms']):.1f} ms | "
            f"{float(row['speedup_over_transformers']):.1f}x, {float(row['percent_of_read']):.0f}% of a plain read |"
        )
    by_key = {(row["tp"], row["threads_total"]): row for row in ours}
    if ("1", "1") in by_key and ("2", "2") in by_key:
        one, two = by_key["1", "1"], by_key["2", "2"]
        gain = float(one["decode_ms"]) / float(two["decode_ms"])
        memory = float(two["read_gb_per_s"]) / float(one["read_gb_per_s"])
        lines.append(
            f"| tp=2 over tp=1, one thread a rank | {gain:.2f}x | a plain read by 2 cores over 1: {memory:.2f}x | "
            "decode reads every weight once a token; 3 KV heads on 2 ranks split 2:1 |"
        )
    return lines


def op_lines(rows: list[dict[str, str]]) -> list[str]:
    """Batch-1 ops on one thread against PyTorch."""
    wanted = {"gate_up 3072x576": "SwiGLU up-projection 576 -> 2 x 1536", "head 49152x576": "output head 576 -> 49152"}
    return [
        f"| {wanted[row['op']]}, {row['dtype']}, 1 row, 1 thread | {float(row['ours_gbs']):.0f} GB/s | "
        f"torch {float(row['torch_gbs']):.0f} GB/s | {float(row['times_torch']):.1f}x |"
        for row in rows
        if row["op"] in wanted and row["rows"] == "1" and row["threads"] == "1" and row["huge_pages"] == "1"
    ]


def gpu_table(folder: Path) -> list[str]:
    """The Markdown table of one GPU: an op a line, all measured shapes of it, what lost as plainly as what won."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read(path) if {"op", "times_best_peer"} <= {*row}]
    rows = [{**row, **{name: float(row[name]) for name in ("us",) if row[name]}} for row in rows]
    if not rows:
        return []
    first = rows[0]
    lines = []
    for line in report.summary(rows):
        peers = {row["competitor"] for row in rows if row["op"] == line["op"]} - {"op"}
        names = ", ".join(sorted(name for name in peers if not name.startswith("own:")))
        failed = f", {line['wrong_or_failed']} wrong or failed" if line["wrong_or_failed"] else ""
        lines.append(
            f"| `{line['op']}` | {line['cases']} | {line['own_times_best_peer']}x (worst {line['own_worst']}x, "
            f"faster in {line['own_wins']}{failed}) | {line['op_times_best_peer']}x | {names} |"
        )
    where = f"{first['gpu']}, torch {first['torch']}, {first['date']}"
    return [
        f"Measured on {where}; speed over the best peer in the same run, geometric mean over the shapes "
        f"([files](benchmarks/results/{folder.name})):",
        "",
        "| op | shapes | own kernels | as dispatched | peers |",
        "|---|---|---|---|---|",
        *lines,
    ]


def table(folder: Path) -> list[str]:
    """The Markdown table of one machine."""
    if lines := gpu_table(folder):
        return lines
    reduce_rows = [row for path in sorted(folder.glob("all_reduce*.csv")) for row in read(path)]
    generate_rows, op_rows = read(folder / "generate.csv"), read(folder / "cpu_ops.csv")
    first = next(iter(reduce_rows or generate_rows or op_rows), None)
    if first is None:
        return []
    where = f"{first['gpu'] or first['cpu']}, {first['cores']} cores, torch {first['torch']}, {first['date']}"
    return [
        f"Measured on {where}; medians, competitors interleaved in one run, results compared first "
        f"([files](benchmarks/results/{folder.name})):",
        "",
        "| | tp_kernels | peer in the same run | ratio |",
        "|---|---|---|---|",
        *all_reduce_lines([row for row in reduce_rows if row["ranks"] == "2"]),
        *all_reduce_lines([row for row in reduce_rows if row["ranks"] != "2" and row["size"] == "4096"]),
        *generate_lines(generate_rows),
        *op_lines(op_rows),
    ]


def outcome_lines(folder: Path) -> list[str]:
    """What ``bench model`` measured on one machine: our figures with a goal, and the best peer of the same run."""
    rows = [row for path in sorted(folder.glob("model*.csv")) for row in read(path)]
    lines = []
    for row in rows:
        if not row["goal"]:
            continue
        case = f"{row['what']} {row['tokens'] if row['what'] == 'prefill' else 'batch ' + row['batch']}"
        of = f"tp={row['tp']}" if row["shard"] == "1" else f"one shard of {row['shard']}"
        same = [
            peer
            for peer in rows
            if peer["ours"] == "0" and peer["ms"] and peer["verdict"] != "wrong"
            if all(peer[key] == row[key] for key in _SAME_CASE)
        ]
        best = min(same, key=lambda peer: float(peer["ms"]), default=None)
        off = f"{row['over_off']}x of that without communication" if row["over_off"] else ""
        weights = "" if row["quantize"] == "none" else f", {row['dtype']} weights"
        beside = f"{best['contender']} {float(best['ms']):.2f} ms{weights}" if best else off
        found = f"{float(row['ms']):.2f} ms" if row["ms"] else row["verdict"]
        roof = f"{row['percent_of_roof']}%" if row["percent_of_roof"] else ""
        verdict = " (wrong)" if row["verdict"] == "wrong" else ""
        cells = (f"{case}, {of}, {row['contender']}", f"{found}{verdict}", roof, beside, row["goal"], row["met"])
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    first = rows[0]
    return [
        f"{first['gpu'] or first['cpu']}, torch {first['torch']}, {first['model']} {first['dtype']}, {first['date']} "
        f"([files](../benchmarks/results/{folder.name})):",
        "",
        "| case | measured | of the roof | best peer in the same run | goal | met |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


_SAME_CASE = ("what", "model", "tp", "shard", "dtype", "layers", "batch", "tokens", "context")


def filled(document: Path, blocks: list[str]) -> str:
    """The document with ``blocks`` between its markers."""
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    return "\n\n".join([before + BEGIN, *blocks, END + rest.split(END)[1]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    folders = [folder for folder in sorted(RESULTS.iterdir()) if folder.is_dir()]
    same = True
    for document, lines_of, nothing in (
        (ROOT / "README.md", table, []),
        (ROOT / "docs" / "performance.md", outcome_lines, ["No run of `bench model` on a GPU has been recorded yet."]),
    ):
        blocks = ["\n".join(lines) for folder in folders if (lines := lines_of(folder))]
        wanted = filled(document, blocks or nothing)
        same &= wanted == document.read_text(encoding="utf-8")
        if not args.check:
            document.write_text(wanted, encoding="utf-8")
    return 0 if same or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
