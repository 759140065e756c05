"""Writes the tables of measured figures from the CSV files under ``benchmarks/results``: the README's, and the outcomes
in docs/performance.md. No figure comes from anywhere else, and what was not measured is not shown but named once.

python benchmarks/readme_table.py            # rewrite both between their markers
python benchmarks/readme_table.py --check    # exit status 1 if one of them is not what the files say
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path

from tp_kernels.testing.op_bench import report

ROOT = Path(__file__).resolve().parents[1]
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


def geometric_mean(values: list[float]) -> float:
    """Of at least one value."""
    return math.exp(sum(map(math.log, values)) / len(values))


def gpu_table(folder: Path) -> list[str]:
    """The Markdown table of one GPU's ops: one a line, all measured shapes of it, what lost as plainly as what won."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read(path) if {"op", "times_best_peer"} <= {*row}]
    rows = [{**row, **{name: float(row[name]) for name in ("us",) if row[name]}} for row in rows]
    if not rows:
        return []
    lines = []
    for line in report.summary(rows):
        peers = {row["competitor"] for row in rows if row["op"] == line["op"]} - {"op"}
        names = ", ".join(sorted(name for name in peers if not name.startswith("own:")))
        failed = f", {line['wrong_or_failed']} wrong or failed" if line["wrong_or_failed"] else ""
        lines.append(
            f"| `{line['op']}` | {line['cases']} | {line['own_times_best_peer']}x (worst {line['own_worst']}x, "
            f"faster in {line['own_wins']}{failed}) | {line['op_times_best_peer']}x | {names} |"
        )
    return [
        f"{_where(rows[0])}; speed over the best peer in the same run, geometric mean over the shapes "
        f"({_files(folder)}):",
        "",
        "| op | shapes | own kernels | as dispatched | peers |",
        "|---|---|---|---|---|",
        *lines,
    ]


def model_table(folder: Path) -> list[str]:
    """Whole models: the passes that are named first everywhere, ours against the fastest of the others."""
    rows = [row for path in sorted(folder.glob("model*.csv")) for row in read(path) if row["gpu"]]
    lines = []
    for row in rows:
        named = row["batch"] == "1" and (row["what"] == "decode" or (row["what"], row["tokens"]) == ("prefill", "4096"))
        off = row["contender"].split()[0] == "off"  # adds nothing up, and is no model
        if not named or off or row["ours"] != "1" or not row["ms"] or row["verdict"] == "wrong":
            continue
        peer = _best_peer(row, rows)
        of = f"tp={row['tp']}" if row["shard"] == "1" else f"one shard of {row['shard']}"
        case = f"decode after {row['context']}, a token" if row["what"] == "decode" else f"prefill of {row['tokens']}"
        weights = "" if row["quantize"] == "none" else f", {row['dtype']} weights"
        beside = f"{peer['contender']} {float(peer['ms']):.2f} ms{weights}" if peer else ""
        ratio = f"{float(peer['ms']) / float(row['ms']):.2f}x" if peer else ""
        over = f"{row['over_off']}x of communication switched off" if row["over_off"] else ""
        said = "; ".join(part for part in (ratio, over) if part)
        lines.append(
            f"| {row['model']}, {case}, {of}, {row['contender']} | {float(row['ms']):.2f} ms | {beside} | {said} |"
        )
    if not lines:
        return []
    head = f"{_where(rows[0])}; whole models, batch 1 ({_files(folder)}):"
    return [head, "", "| | tp_kernels | fastest peer in the same run | ratio |", "|---|---|---|---|", *lines]


def comm_table(folder: Path) -> list[str]:
    """Ranks on GPUs: sums, the norm behind them, projections beside them, and the decoder layer they are in."""
    found = {kind: lines for kind, lines in _comm_lines(folder).items() if lines}
    if not found:
        return []
    first = next(row for path in sorted(folder.glob("comm-*.csv")) for row in read(path))
    shared = int(first["ranks_per_gpu"]) > 1
    note = ": ranks that share the GPU, so ratios of two paths, [not figures of linked GPUs](docs/one_gpu.md)"
    return [
        f"{_where(first)}; communication{note if shared else ''} ({_files(folder)}):",
        "",
        "| | tp_kernels | peer in the same run | ratio |",
        "|---|---|---|---|",
        *(line for lines in found.values() for line in lines),
    ]


def _comm_lines(folder: Path) -> dict[str, list[str]]:
    rows = [row for path in sorted(folder.glob("comm-*.csv")) for row in read(path)]
    return {
        "sums over ranks": _sum_lines([row for row in rows if row.get("kind") == "sum"]),
        "the norm fused into them": _norm_lines([row for row in rows if row.get("kind") == "norm"]),
        "overlap": _overlap_lines([row for row in rows if "gate" in row]),
        "a decoder layer over ranks": _layer_lines([row for row in rows if "over_off" in row and "context" in row]),
    }


_SUMS = {8 << 10: "8 KB", 256 << 10: "256 KB", 4 << 20: "4 MB", 64 << 20: "64 MB"}
_NORM_TOKENS = ("1", "64", "1024", "4096")


def _cases(rows: list[dict[str, str]], *names: str) -> list[list[dict[str, str]]]:
    """Rows that agree in these columns, together."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def _fastest(rows: list[dict[str, str]]) -> dict[str, str] | None:
    return min((row for row in rows if row["wrong"] == "0"), key=lambda row: float(row["time_us"]), default=None)


def _ratio(over: dict[str, str], under: dict[str, str]) -> str:
    return f"{float(over['time_us']) / float(under['time_us']):.2f}x"


def _us(row: dict[str, str], name: str | None = None) -> str:
    return f"{float(row['time_us']):.1f} us ({row['path'] if name is None else name})"


def _sum_lines(rows: list[dict[str, str]]) -> list[str]:
    lines = []
    for case in _cases(rows, "ranks", "dtype", "bytes"):
        first, peers = case[0], ("torch", "nccl")
        ours = _fastest([row for row in case if not row["path"].startswith(peers)])
        peer = _fastest([row for row in case if row["path"].startswith(peers)])
        if int(first["bytes"]) in _SUMS and ours and peer:
            of = f"all-reduce, {_SUMS[int(first['bytes'])]} {first['dtype']}, {first['ranks']} ranks"
            lines.append(f"| {of} | {_us(ours)} | {_us(peer)} | {_ratio(peer, ours)} |")
    for path in ("one_shot", "two_shot"):
        for of_ranks in _cases([row for row in rows if row["path"] == path and row["over_peer"]], "ranks", "dtype"):
            over = [float(row["over_peer"]) for row in of_ranks]
            first = of_ranks[0]
            lines.append(
                f"| {path} at {len(over)} sizes, {first['dtype']}, {first['ranks']} ranks | | torch's | time "
                f"{geometric_mean(over):.2f}x, worst {max(over):.2f}x |"
            )
    return lines


def _norm_lines(rows: list[dict[str, str]]) -> list[str]:
    lines = []
    for case in _cases(rows, "ranks", "dtype", "hidden", "tokens"):
        first = case[0]
        fused = next((row for row in case if row["path"] == "fused" and row["wrong"] == "0"), None)
        peer = next((row for row in case if row["path"] == first["best_peer"] and row["wrong"] == "0"), None)
        if fused and peer and first["tokens"] in _NORM_TOKENS:
            of = f"all-reduce + residual + norm, {first['tokens']} x {first['hidden']}, {first['ranks']} ranks"
            alone = f"{fused['over_all_reduce']}x of the all-reduce alone"
            lines.append(f"| {of} | {_us(fused)} | {_us(peer)} | {_ratio(peer, fused)}, {alone} |")
    return lines


def _overlap_lines(rows: list[dict[str, str]]) -> list[str]:
    """The largest gain at 4096 tokens, torch's ways beside it, and how often "auto" overlaps at all."""
    lines = []
    for case in _cases([row for row in rows if row["m"] == "4096"], "op", "ranks", "n", "in_features"):
        of = f"`{case[0]['op']}` 4096 x {case[0]['n']} x {case[0]['in_features']}, {case[0]['ranks']} ranks"
        for over in _cases([row for row in case if row["path"] in ("none", "chunked", "fused")], "backend"):
            best = _fastest([row for row in over if row["path"] != "none" and row["wrong_sums"] == "0"])
            if best is None:
                continue
            # Whatever NCCL may take for it: overlap that wants few blocks must not make one after the other look slow.
            none = _fastest([row for row in over if row["path"] == "none" and row["wrong_sums"] == "0"])
            if none is None:
                continue
            hidden = f"{100 * float(best['hidden']):.0f}% of the shorter hidden"
            one_by_one = _us(none, "one after the other")
            lines.append(f"| {of}, {best['backend']} | {_us(best)} | {one_by_one} | {_ratio(none, best)}, {hidden} |")
        for row in case:
            if row["backend"] == "torch" and row["wrong_sums"] == "0":
                lines.append(f"| {of} | {row['beside']} | {_us(row)} | {1 / float(row['ours_over_peer']):.2f}x |")
    for of_op in _cases([row for row in rows if row["path"] == "none"], "op", "backend", "ranks", "max_ctas"):
        first, taken = of_op[0], [row["m"] for row in of_op if row["gate"] != "none"]
        blocks = "" if first["max_ctas"] == "0" else f" with at most {first['max_ctas']} blocks"
        lines.append(
            f'| `{first["op"]}`, {first["ranks"]} ranks, {first["backend"]}{blocks} | "auto" overlaps {len(taken)} of '
            f"{len(of_op)} measured shapes | | |"
        )
    return lines


def _layer_lines(rows: list[dict[str, str]]) -> list[str]:
    lines = []
    for case in _cases(rows, "what", "model", "ranks", "tokens", "context"):
        best = _fastest([row for row in case if row["path"] != "off"])
        off = next((row for row in case if row["path"] == "off"), None)
        if best and off:
            after = f" after {best['context']}" if best["context"] not in ("", "0") else ""
            of = f"{best['model']} layer, {best['what'].replace('_', ' with ')} {best['tokens']}{after}"
            lines.append(
                f"| {of}, {best['ranks']} ranks | {_us(best)} | {_us(off, 'communication switched off')} | time "
                f"{best['over_off']}x |"
            )
    return lines


def plot_lines(folder: Path) -> list[str]:
    """The pictures of one machine, folded away."""
    pictures = sorted([*folder.glob("*.png"), *folder.glob("plots/*.png")])
    if not pictures:
        return []
    place = f"benchmarks/results/{folder.name}"
    shown = [f"![{path.stem}]({place}/{path.relative_to(folder).as_posix()})" for path in pictures]
    return [f"<details><summary>Plots of {folder.name}</summary>", "", *shown, "", "</details>"]


def _where(row: dict[str, str]) -> str:
    return f"Measured on {row['gpu']}, torch {row['torch']}, {row['date']}"


def _files(folder: Path) -> str:
    return f"[files](benchmarks/results/{folder.name})"


# What can be measured on a GPU, and how to find out whether it was.
GPU_KINDS: dict[str, Callable[[Path], list[str]]] = {
    "the kernels of the ops": gpu_table,
    "whole models": model_table,
    "sums over ranks": lambda folder: _comm_lines(folder)["sums over ranks"],
    "the norm fused into them": lambda folder: _comm_lines(folder)["the norm fused into them"],
    "overlap": lambda folder: _comm_lines(folder)["overlap"],
    "a decoder layer over ranks": lambda folder: _comm_lines(folder)["a decoder layer over ranks"],
}


def missing_lines(folders: list[Path]) -> list[str]:
    """What no GPU's files say anything about, in one sentence."""
    missing = [kind for kind, lines_of in GPU_KINDS.items() if not any(lines_of(folder) for folder in folders)]
    if not missing:
        return []
    return [
        f"Not measured yet on a GPU: {', '.join(missing)}. They are written, compiled, and tested as far as that goes "
        "without one; `make gpu` runs and measures them, `make gpu-results` puts the figures here."
    ]


def readme_blocks(folders: list[Path]) -> list[str]:
    """What stands between the README's markers."""
    parts = (cpu_table, gpu_table, model_table, comm_table, plot_lines)
    blocks = [lines for folder in folders for part in parts if (lines := part(folder))]
    return ["\n".join(lines) for lines in (*blocks, missing_lines(folders)) if lines]


def performance_blocks(folders: list[Path]) -> list[str]:
    """What stands between those of docs/performance.md."""
    blocks = ["\n".join(lines) for folder in folders if (lines := outcome_lines(folder))]
    return blocks or ["No run of `bench model` on a GPU has been recorded yet."]


def cpu_table(folder: Path) -> list[str]:
    """The Markdown table of a machine without a GPU."""
    reduce_rows = [row for path in sorted(folder.glob("all_reduce*.csv")) for row in read(path)]
    generate_rows, op_rows = read(folder / "generate.csv"), read(folder / "cpu_ops.csv")
    first = next(iter(reduce_rows or generate_rows or op_rows), None)
    if first is None or first["gpu"]:
        return []
    where = f"{first['cpu']}, {first['cores']} cores, torch {first['torch']}, {first['date']}"
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
        best = _best_peer(row, rows)
        off = f"{row['over_off']}x of that without communication" if row["over_off"] else ""
        weights = "" if row["quantize"] == "none" else f", {row['dtype']} weights"
        peer = f"{best['contender']} {float(best['ms']):.2f} ms{weights}" if best else ""
        beside = "; ".join(words for words in (off, peer) if words)
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


def _best_peer(row: dict[str, str], rows: list[dict[str, str]]) -> dict[str, str] | None:
    """The fastest of the others that ran the same pass, and were right."""
    same = [
        peer
        for peer in rows
        if peer["ours"] == "0" and peer["ms"] and peer["verdict"] != "wrong"
        if all(peer[key] == row[key] for key in _SAME_CASE)
    ]
    return min(same, key=lambda peer: float(peer["ms"]), default=None)


_SAME_CASE = ("what", "model", "tp", "shard", "dtype", "layers", "batch", "tokens", "context")


def filled(document: Path, blocks: list[str]) -> str:
    """The document with ``blocks`` between its markers."""
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    return "\n\n".join([before + BEGIN, *blocks, END + rest.split(END)[1]])


def rewrite(root: Path, check: bool = False) -> list[str]:
    """Fill the documents under ``root`` from its result files, or only compare; those that were not up to date."""
    results = root / "benchmarks" / "results"
    folders = [folder for folder in sorted(results.iterdir()) if folder.is_dir()]
    stale = []
    for name, blocks_of in (("README.md", readme_blocks), ("docs/performance.md", performance_blocks)):
        document = root / name
        wanted = filled(document, blocks_of(folders))
        if wanted != document.read_text(encoding="utf-8"):
            stale.append(name)
            if not check:
                document.write_text(wanted, encoding="utf-8")
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    stale = rewrite(ROOT, args.check)
    if stale:
        print(f"{'not up to date' if args.check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
