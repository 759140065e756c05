"""Predictions for a model on N GPUs: memory a rank, roofline times, communication, speedup. Pure functions.

    gpu = machine("h100")
    made = plan("llama3-8b", config, gpu, link("auto", gpu.link), Workload(batch=8))
    made.row(4).decode.total                            # predicted seconds of a decode step on four ranks

Nothing here needs torch or a GPU. What the predictions rest on: ``docs/planning.md``.
"""

from tp_kernels.planning.links import LINKS, Link, link
from tp_kernels.planning.machines import MACHINES, Figure, Machine, machine
from tp_kernels.planning.measured import Comparison, compare, find_measured, read_measured
from tp_kernels.planning.planner import Plan, Row, Workload, plan
from tp_kernels.planning.roofline import Times

__all__ = [
    "LINKS",
    "MACHINES",
    "Comparison",
    "Figure",
    "Link",
    "Machine",
    "Plan",
    "Row",
    "Times",
    "Workload",
    "compare",
    "find_measured",
    "link",
    "machine",
    "plan",
    "read_measured",
]
