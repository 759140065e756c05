"""What ``tp-kernels bench model`` measured, beside what is predicted for the very same pass."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tp_kernels.planning.links import LINKS
from tp_kernels.planning.machines import Machine
from tp_kernels.planning.planner import Plan, Workload, plan

__all__ = ["Comparison", "compare", "find_measured", "read_measured"]

# Columns of ``bench model`` that say which pass a row is of, and its time.
_NEEDED = ("what", "model", "tp", "shard", "dtype", "batch", "tokens", "context", "contender", "quantize", "ms")
_NUMBERS = ("tp", "shard", "batch", "tokens", "context")
_OPTIONAL_NUMBERS = ("layers", "ranks_per_gpu")
_RATIOS = ("over_off", "times_best_peer")
_WHAT = ("prefill", "decode")  # prompts of different lengths in one pass ("mixed") have no prediction


@dataclass(frozen=True)
class Comparison:
    """One measured pass and its prediction.

    Attributes:
        what: ``"prefill"`` or ``"decode"``.
        tp, shard: ranks; or one rank that ran a ``shard``-th part of the model by itself (1: the whole).
        batch, tokens, context: rows, new tokens of each, and those in the cache before them.
        quantize: format of the weights, ``"none"`` where there is none.
        contender: which implementation.
        gpu: where it was measured.
        measured_ms, predicted_ms, roof_ms: of one pass.
        sums: what added over the ranks, "off" where nothing did; "" on one rank.
        over_off: measured, a multiple of the same ranks without communication; None where these were not measured.
        times_best_peer: measured speed, a multiple of the best other implementation's in the same run; None if none.
        best_peer: which that was.
    """

    what: str
    tp: int
    shard: int
    batch: int
    tokens: int
    context: int
    quantize: str
    contender: str
    gpu: str
    measured_ms: float
    predicted_ms: float
    roof_ms: float
    sums: str = ""
    over_off: float | None = None
    times_best_peer: float | None = None
    best_peer: str = ""

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_ms / self.predicted_ms

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``ratio``."""
        return {**asdict(self), "ratio": self.ratio}


def find_measured(machine: Machine, root: str | os.PathLike[str] = ".") -> list[Path]:
    """``model.csv`` and ``model_*.csv`` under ``root``, in the folder of ``benchmarks/results`` named after the GPU."""
    words = machine.name.split("-")
    found = Path(root).glob("benchmarks/results/*/model*.csv")
    named = [path for path in found if path.stem == "model" or path.stem.startswith("model_")]
    return sorted(path for path in named if all(word in path.parent.name for word in words))


def read_measured(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV that ``bench model`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a number is none.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: expected the columns of `tp-kernels bench model`; missing: {', '.join(missing)}")
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        try:
            for name in _NUMBERS:
                int(row[name])
            for name in _OPTIONAL_NUMBERS:
                int(row.get(name) or 1)
            for name in ("ms", *_RATIOS):
                float(row.get(name) or 0)
        except (TypeError, ValueError):
            names = ", ".join((*_NUMBERS, *_OPTIONAL_NUMBERS, "ms", *_RATIOS))
            raise ValueError(f"{path}, line {number}: expected numbers in {names}") from None
    return rows


def compare(planned: Plan, rows: Iterable[Mapping[str, str]]) -> list[Comparison]:
    """Predict every measured pass of the plan's model and dtype.

    Args:
        planned: model, GPU, link and dtype. Sizes and formats are the measured rows' own, and so is the link where
            the ranks shared a GPU.
        rows: from ``read_measured``. Those without a time, of other models or dtypes, of a model with fewer layers,
            judged wrong, those of prompts of different lengths, and those taken on a CPU are passed over.

    Returns:
        One comparison a row, in their order.

    Raises:
        ValueError: a row of more ranks than the model can be split over, or of sizes that no pass has.
    """
    found = []
    for row in rows:
        layers = int(row.get("layers") or planned.config.num_hidden_layers)
        wanted = (planned.model, planned.workload.dtype, planned.config.num_hidden_layers)
        unfit = row.get("ranks_per_gpu") == "0" or row.get("verdict") == "wrong" or not row["ms"]
        if (row["model"], row["dtype"], layers) == wanted and row["what"] in _WHAT and not unfit:
            found.append(_compared(planned, row))
    return found


def _compared(planned: Plan, row: Mapping[str, str]) -> Comparison:
    tp, shard, batch, tokens, context = (int(row[name]) for name in _NUMBERS)
    quantize = row["quantize"] or "none"
    prefill = row["what"] == "prefill"
    work = Workload(
        batch=batch,
        prompt=tokens if prefill else 1,
        context=0 if prefill else context,
        dtype=planned.workload.dtype,
        quantize=None if quantize == "none" else quantize,
    )
    ranks = max(tp, shard)
    together = tp > 1 and int(row.get("ranks_per_gpu") or 1) > 1
    link = LINKS["one-gpu"] if together else planned.link
    made = plan(planned.model, planned.config, planned.machine, link, work, (ranks,))
    if ranks in made.left_out:
        raise ValueError(f"a measured row is not of this {planned.model}: {made.left_out[ranks]}")
    predicted = made.row(ranks)
    if shard > 1:
        times = predicted.prefill_shard if prefill else predicted.decode_shard
    else:
        times = predicted.prefill if prefill else predicted.decode
    # The same ranks, their sums switched off; older files name only the contender.
    sums = row.get("sums") or ("off" if row["contender"].split()[0] == "off" else "")
    over_off, times_best_peer = (float(row[name]) if row.get(name) else None for name in _RATIOS)
    return Comparison(
        what=row["what"],
        tp=tp,
        shard=shard,
        batch=batch,
        tokens=tokens,
        context=context,
        quantize=quantize,
        contender=row["contender"],
        gpu=row.get("gpu") or "",
        measured_ms=float(row["ms"]),
        predicted_ms=(times.silent if sums == "off" else times.total) * 1e3,
        roof_ms=times.roof * 1e3,
        sums=sums,
        over_off=over_off,
        times_best_peer=times_best_peer,
        best_peer=row.get("best_peer") or "",
    )
