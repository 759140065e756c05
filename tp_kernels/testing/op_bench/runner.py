"""Runs the cases of the op benchmarks: checks every competitor, times them in turns, prints and collects the rows."""

from __future__ import annotations

import math
import pkgutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tp_kernels.testing import op_bench
from tp_kernels.testing.gpu_timer import Measured, Roofs, input_sets, raise_if_lost, time_competitors
from tp_kernels.testing.op_bench.case import MODELS, Case

__all__ = ["Selection", "Verdict", "bench_modules", "bench_names", "by_rows", "check_case", "run_case", "select_cases"]

_SEED = 20240229
_MACHINERY = frozenset(("case", "commands", "report", "runner", "shapes", "tuner"))


@dataclass(frozen=True)
class Selection:
    """Which cases to run; empty sequences mean all, or the op's own default."""

    ops: Sequence[str] = ()
    models: Sequence[str] = ("llama3-8b",)
    tps: Sequence[int] = (1,)
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    rows: Sequence[int] = ()


@dataclass(frozen=True)
class Verdict:
    """Relative Frobenius error of a competitor, what it was allowed, and what went wrong if it did not run."""

    error: float
    allowed: float
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether it ran and is right."""
        return not self.failure and self.error <= self.allowed


@dataclass
class CaseResult:
    """A case's verdicts and times by competitor."""

    case: Case
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    times: dict[str, Measured] = field(default_factory=dict)
    configs: dict[str, dict[str, Any] | None] = field(default_factory=dict)


def bench_names() -> list[str]:
    """Names of the benchmark modules, without importing them (and Triton)."""
    return sorted(m.name for m in pkgutil.iter_modules(op_bench.__path__) if m.name not in _MACHINERY)


def bench_modules(names: Sequence[str] = ()) -> dict[str, Any]:
    """Benchmark modules by name; all, or those named."""
    return {name: import_module(f"{op_bench.__name__}.{name}") for name in names or bench_names()}


def select_cases(selection: Selection) -> Iterator[Case]:
    """The cases asked for, without repeating a shape that two models share.

    Raises:
        ValueError: an op or model that does not exist.
    """
    for name in selection.models:
        if name not in MODELS:
            raise ValueError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")
    wanted = list(selection.ops) or bench_names()
    for name in wanted:
        if name not in bench_names():
            raise ValueError(f"unknown op {name!r}; expected one of {', '.join(bench_names())}")
    modules = bench_modules(wanted)
    seen = set()
    for name in wanted:
        for dtype in selection.dtypes:
            for model in selection.models:
                for tp in selection.tps:
                    for case in modules[name].cases(MODELS[model], tp, dtype, list(selection.rows) or None):
                        key = (case.op, dtype, tuple(sorted(case.sizes.items())), case.extra.get("variant", ""))
                        if key not in seen:
                            seen.add(key)
                            yield case


def by_rows(cases: Iterable[Case], rows: Sequence[int]) -> list[Case]:
    """The cases in the order of ``rows``: all shapes of the first number of rows, then those of the next.

    Cases of no such number keep their place in front, as do all where no rows are asked for.
    """
    place = {count: index for index, count in enumerate(rows)}
    return sorted(cases, key=lambda case: place.get(case.sizes.get("m", 0), -1))


def competitors_of(case: Case, configs: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """All callables of a case by name; ours with the given configurations (None: the default)."""
    found = dict(case.peers)
    for name, own in case.own.items():
        config = configs.get(name)
        found[f"own:{name}"] = lambda *inputs, own=own, config=config: own.run(config, *inputs)
    if case.public is not None:
        found["op"] = case.public
    return found


def check_case(
    case: Case,
    device: str,
    configs: dict[str, dict[str, Any] | None] | None = None,
    only: Sequence[str] = (),
) -> dict[str, Verdict]:
    """Run the competitors (all, or those named) once on the same inputs and compare them with the reference."""

    def inputs() -> tuple[Any, ...]:
        return case.inputs(torch.Generator(device=device).manual_seed(_SEED))

    exact = _tensors(case.reference(*inputs()))
    competitors = competitors_of(case, configs or {})
    plain = _error(competitors["torch"], inputs, exact) if "torch" in competitors else None
    floor = torch.finfo(case.dtype).eps
    own_error = plain.error if plain is not None and not plain.failure else 0.0
    allowed = max(case.tolerance * own_error, floor)
    verdicts = {}
    for name, function in competitors.items():
        if only and name not in only:
            continue
        found = plain if name == "torch" else _error(function, inputs, exact)
        if found.failure:
            raise_if_lost(f"{name} of {case.op} {case.label} with {(configs or {}).get(name.removeprefix('own:'))}")
        # PyTorch's own error is the yardstick; it is only wrong when it is far off.
        limit = max(0.05, allowed) if name == "torch" else allowed
        verdicts[name] = Verdict(found.error, limit, found.failure)
    return verdicts


def _error(function: Any, inputs: Any, exact: list[Tensor]) -> Verdict:
    try:
        result = _tensors(function(*inputs()))
        if len(result) != len(exact):
            return Verdict(math.inf, 0.0, f"returned {len(result)} tensors, expected {len(exact)}")
        worst = 0.0
        for got, wanted in zip(result, exact, strict=True):
            if got.shape != wanted.shape:
                return Verdict(math.inf, 0.0, f"returned {list(got.shape)}, expected {list(wanted.shape)}")
            difference = torch.linalg.vector_norm(got.to(wanted.dtype) - wanted).item()
            size = torch.linalg.vector_norm(wanted).item()
            error = difference / size if size else difference
            worst = max(worst, error if error == error else math.inf)
        return Verdict(worst, 0.0)
    except Exception as error:  # a peer may fail on a shape; the table says so and goes on
        return Verdict(
            math.inf, 0.0, f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        )


def _tensors(result: Any) -> list[Tensor]:
    items = result if isinstance(result, (tuple, list)) else (result,)
    return [item for item in items if isinstance(item, Tensor)]


def run_case(
    case: Case,
    device: str,
    *,
    configs: dict[str, dict[str, Any] | None] | None = None,
    rounds: int = 15,
    only: Sequence[str] = (),
) -> CaseResult:
    """Check and time a case.

    Args:
        case: what to run.
        device: "cuda", or "cpu" for a trial through the interpreter.
        configs: configuration of each own path; None is the default one.
        rounds: turns of each competitor.
        only: names of competitors to keep; empty is all.
    """
    configs = dict(configs or {})
    result = CaseResult(case, check_case(case, device, configs, only), configs=configs)
    runnable = {
        name: function
        for name, function in competitors_of(case, configs).items()
        if name in result.verdicts and result.verdicts[name].good
    }
    if not runnable:
        return result
    generator = torch.Generator(device=device).manual_seed(int(time.time()) & 0xFFFF)
    sets = input_sets(lambda: case.inputs(generator), case.input_bytes or case.bytes, device)
    failures: dict[str, str] = {}
    result.times = time_competitors(runnable, sets, rounds=rounds, failures=failures)
    for name, words in failures.items():
        result.verdicts[name] = Verdict(math.inf, result.verdicts[name].allowed, words)
    return result


def rows_of(result: CaseResult, roofs: Roofs | None) -> list[dict[str, Any]]:
    """One row a competitor, failures included."""
    case = result.case
    peers = [result.times[name].timing.median for name in case.peers if name in result.times]
    best_peer = min(peers) if peers else None
    rows = []
    for name, verdict in result.verdicts.items():
        measured = result.times.get(name)
        seconds = measured.timing.median if measured else None
        config = result.configs.get(name.removeprefix("own:")) if name.startswith("own:") else None
        rows.append(
            {
                "op": case.op,
                "case": case.label,
                "dtype": str(case.dtype).removeprefix("torch."),
                "sizes": " ".join(f"{key}={value}" for key, value in case.sizes.items()),
                "competitor": name,
                "config": " ".join(f"{key}={value}" for key, value in (config or {}).items()),
                "us": _rounded(seconds, 1e6, 2),
                "q20_us": _rounded(measured.timing.q20 if measured else None, 1e6, 2),
                "q80_us": _rounded(measured.timing.q80 if measured else None, 1e6, 2),
                "mode": measured.mode if measured else "",
                "tb_s": _rounded(case.bytes / seconds if seconds and case.bytes else None, 1e-12, 3),
                "tflop_s": _rounded(case.flops / seconds if seconds and case.flops else None, 1e-12, 1),
                "percent_of_roof": _percent_of_roof(case, seconds, roofs),
                "times_best_peer": _rounded(best_peer / seconds if seconds and best_peer else None, 1, 3),
                "error": f"{verdict.error:.2e}",
                "allowed_error": f"{verdict.allowed:.2e}",
                "verdict": "ok" if verdict.good else verdict.failure or "wrong",
            }
        )
    return rows


def _rounded(value: float | None, factor: float, digits: int) -> float | str:
    return "" if value is None else round(value * factor, digits)


def _percent_of_roof(case: Case, seconds: float | None, roofs: Roofs | None) -> float | str:
    """Against the larger of the two floors: bytes at the copy rate, operations at cuBLAS's rate."""
    if seconds is None or roofs is None:
        return ""
    floor = max(case.bytes / roofs.copy, case.flops / roofs.matmul)
    return round(100 * floor / seconds, 1) if floor else ""
