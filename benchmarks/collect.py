"""Puts what ``make gpu`` left behind where it is kept: tuning table, CSV, plots, and the documents made from them.

    python benchmarks/collect.py gpu_out --machine h100          # or: make gpu-results GPU_OUT=gpu_out MACHINE=h100
    python benchmarks/collect.py gpu_out --machine h100 --also bench-linear

A CSV is taken when the command that wrote it ended well. One whose command failed, or had not ended when its time was
over, is refused by name; ``--also`` takes it all the same, with the rows that say what was wrong. Tables go into
``tp_kernels/ops/tuning/<gpu>.json``: what was measured now replaces what was there of the same shape. CSV and plots
go to ``benchmarks/results/<machine>``, with plots drawn from the CSV of sums over ranks. Then ``readme_table.py``
rewrites the documents.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tp_kernels.testing.bench import load_pyplot
from tp_kernels.testing.op_bench.report import table_text

ROOT = Path(__file__).resolve().parents[1]


def _script(name: str) -> ModuleType:
    """A script beside this one, as a module."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def written_by(out: Path) -> dict[str, tuple[str, list[str]]]:
    """The CSV files of ``make gpu`` by name: the key of the command that writes each, and its words."""
    found = {}
    for part in _script("run_gpu").parts(out).values():
        for key, words in part.commands.items():
            for option in ("--csv", "--profile"):
                if option in words:
                    found[Path(words[words.index(option) + 1]).name] = (key, words)
    return found


def sort_out(out: Path, also: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """The CSV files to take, and a line on each that is refused.

    Args:
        out: where ``make gpu`` wrote.
        also: commands whose files are taken although they did not end well.
    """
    taken, refused = [], []
    known = written_by(out)
    for path in sorted(out.glob("*.csv")):
        if path.name not in known:
            refused.append(f"{path.name}: no command of `make gpu` writes it")
            continue
        key, _ = known[path.name]
        if (out / f"{key}.ok").exists() or key in also:
            taken.append(path)
        elif (out / f"{key}.failed").exists():
            refused.append(f"{path.name}: {key} failed, see {out / f'{key}.log'}; --also {key} takes it all the same")
        else:
            refused.append(f"{path.name}: {key} has not ended, `make gpu PART=...` repeats it; --also {key} takes it")
    return taken, refused


def one_gpu(taken: Sequence[Path]) -> str:
    """The GPU that all rows name; ValueError if they name several or none."""
    names: dict[str, str] = {}
    for path in taken:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                names.setdefault(row.get("gpu") or "", path.name)
    if len(names) != 1 or "" in names:
        said = ", ".join(f"{gpu or 'no GPU'} ({name})" for gpu, name in names.items())
        raise ValueError(f"expected the figures of one GPU, got those of {said or 'none'}")
    return next(iter(names))


def plots_of(taken: Sequence[Path], out: Path) -> list[Path]:
    """The plots that belong to these files: of the ops in them, or named by the command that wrote them."""
    known, found = written_by(out), []
    for path in taken:
        _, words = known[path.name]
        if "--plot" not in words or words[words.index("--csv") + 1] != str(out / path.name):
            continue
        place = Path(words[words.index("--plot") + 1])
        if place.suffix:
            found.append(place)
            continue
        with path.open(newline="") as file:
            found += [place / f"{op}.png" for op in dict.fromkeys(row["op"] for row in csv.DictReader(file))]
    return [path for path in found if path.exists()]


def draw_sums(path: Path, picture: Path) -> bool:
    """Draw the times in a CSV of ``bench all-reduce-gpu``, of which there is one picture; False if it is another's.

    Raises:
        ModuleNotFoundError: says how to install matplotlib.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("kind") in ("sum", "norm")]
    if not rows:
        return False
    pyplot = load_pyplot()
    kinds = {"sum": ("bytes", "all-reduce"), "norm": ("tokens", "all-reduce + residual + RMSNorm")}
    panels = list(dict.fromkeys((row["kind"], row["hidden"]) for row in rows))
    figure, places = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False)
    for (kind, hidden), axes in zip(panels, places[0], strict=True):
        column, what = kinds[kind]
        of_panel = [row for row in rows if (row["kind"], row["hidden"]) == (kind, hidden)]
        for name in dict.fromkeys(row["path"] for row in of_panel):
            points = [(int(row[column]), float(row["time_us"])) for row in of_panel if row["path"] == name]
            peer = name.startswith(("torch", "nccl"))
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, linestyle="--" if peer else "-")
        axes.set(
            yscale="log", xlabel=column, ylabel="time (us)", title=what + (f", {hidden} wide" if hidden != "0" else "")
        )
        axes.set_xscale("log", base=2)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=7)
    first = rows[0]
    shared = ", on one GPU" if int(first["ranks_per_gpu"]) > 1 else ""
    figure.suptitle(
        f"{first['gpu']}, torch {first['torch']}, {first['date']}, {first['ranks']} ranks{shared}", fontsize=9
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return True


def merge(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tuning table in which entries of ``new`` stand for those of ``old`` of the same op, dtype and sizes.

    Raises:
        ValueError: tables of two GPUs.
    """
    if old is None:
        return dict(new)
    if new["gpu"] != old["gpu"]:
        raise ValueError(f"the table is of {new['gpu']!r}, the one that is there of {old['gpu']!r}")
    ops = {}
    for op in sorted({*old["ops"], *new["ops"]}):
        rows = {}
        for row in (*old["ops"].get(op, ()), *new["ops"].get(op, ())):
            rows[row["dtype"], json.dumps(row["sizes"], sort_keys=True)] = row
        ops[op] = list(rows.values())
    return {**new, "ops": ops}


def collect(out: Path, machine: str, root: Path, also: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Put everything into its place under ``root``.

    Args:
        out: where ``make gpu`` wrote.
        machine: folder of the results.
        root: of the repository.
        also: as for ``sort_out``.

    Returns:
        What was written, and what was refused and why.

    Raises:
        ValueError: nothing to take, figures of several GPUs, or a table of another GPU; nothing was written then.
    """
    out = out.resolve()
    taken, refused = sort_out(out, also)
    if not taken:
        raise ValueError("\n".join([f"there is nothing to take in {out}", *refused]))
    gpu = one_gpu(taken)
    results, shipped = root / "benchmarks" / "results" / machine, root / "tp_kernels" / "ops" / "tuning"
    texts: dict[Path, str] = {}
    for path in sorted((out / "tuning").glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["gpu"] != gpu:
            raise ValueError(f"{path.name} is of {table['gpu']!r}, the figures are of {gpu!r}")
        if "ops" in table:
            old = shipped / path.name
            merged = merge(table, json.loads(old.read_text(encoding="utf-8")) if old.exists() else None)
            texts[shipped / path.name] = table_text(merged)
        else:  # of ways between ranks: the user's own box decides by its own, this one is for the record
            texts[results / path.name] = path.read_text(encoding="utf-8")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    copies = {path: results / path.name for path in taken}
    copies |= {path: results / "plots" / path.name for path in plots_of(taken, out)}
    for source, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    pictures = {path: results / "plots" / f"{path.stem}.png" for path in taken if path.name.startswith("comm-")}
    drawn = [picture for path, picture in pictures.items() if draw_sums(path, picture)]
    stale = _script("readme_table").rewrite(root)
    written = [str(path.relative_to(root)) for path in (*texts, *copies.values(), *drawn)]
    return [*written, *stale], refused


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder that `make gpu` wrote to")
    parser.add_argument("--machine", required=True, metavar="NAME", help="folder under benchmarks/results, e.g. h100")
    parser.add_argument(
        "--also", action="append", default=[], metavar="COMMAND", help="take its CSV although it did not end well"
    )
    args = parser.parse_args(argv)
    if not args.out.is_dir():
        parser.error(f"expected the folder that `make gpu` wrote to, got {args.out}")
    if not args.machine.replace("-", "").replace("_", "").isalnum():
        parser.error(f"--machine: expected the name of a folder, got {args.machine!r}")
    try:
        written, refused = collect(args.out, args.machine, ROOT, args.also)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(f"written: {name}" for name in written))
    print("\n".join(f"REFUSED: {words}" for words in refused), end="\n" if refused else "")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
