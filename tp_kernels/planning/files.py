"""A plan as a CSV and as a plot."""

from __future__ import annotations

import csv
import os

from tp_kernels.planning.planner import Plan

__all__ = ["plot", "write_csv"]

_PARTS = ("linear", "attention", "elementwise", "gaps", "communication")


def write_csv(path: str | os.PathLike[str], plan: Plan) -> None:
    """Write ``Plan.lines``, a line for each number of ranks; makes the folder if needed."""
    lines = plan.lines()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def plot(path: str | os.PathLike[str], plan: Plan) -> None:
    """Predicted speedup over the number of ranks, and what each pass spends its time on; needs matplotlib.

    Raises:
        ModuleNotFoundError: says how to install matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'tp-kernels[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = [row.tp for row in plan.rows]
    work = plan.workload
    figure, (speedups, prefill, decode) = pyplot.subplots(1, 3, figsize=(13, 4.2))
    speedups.plot(ranks, ranks, color="tab:gray", linestyle="--", linewidth=1, label="ideal")
    speedups.plot(ranks, [row.prefill_speedup for row in plan.rows], marker="o", label="prefill")
    speedups.plot(ranks, [row.decode_speedup for row in plan.rows], marker="s", label="decode")
    speedups.set(xlabel="ranks", ylabel="predicted speedup over one rank", xticks=ranks, title="speedup")
    speedups.grid(alpha=0.3)
    speedups.legend()
    for axes, name, title in (
        (prefill, "prefill", f"prefill of {work.batch} x {work.prompt} tokens"),
        (decode, "decode", f"decode step, batch {work.batch} after {work.context} tokens"),
    ):
        bottom = [0.0] * len(ranks)
        for part in _PARTS:
            heights = [getattr(getattr(row, name), part) * 1e3 for row in plan.rows]
            axes.bar([str(rank) for rank in ranks], heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set(xlabel="ranks", ylabel="predicted ms", title=title, ylim=(0, 1.05 * max(bottom)))
    decode.legend(fontsize=8)
    weights = work.dtype if work.quantize is None else f"{work.dtype}, {work.quantize} weights"
    figure.suptitle(f"PREDICTION: {plan.model}, {plan.machine.title}, {plan.link.title}, {weights}", fontsize=10)
    figure.tight_layout()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
