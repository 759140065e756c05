"""Finds the fastest path and configuration for each case on this GPU, and keeps the result in a tuning table.

The rule of the package is that an own path is used where it was measured to be faster. So every case ends with a round
of the best configurations against what PyTorch does, all in turns, and the table records that round: path,
configuration and everybody's microseconds. Compiling is most of the time of tuning; all candidates are therefore
compiled first, by processes that need no GPU, into Triton's cache.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as Late  # Python 3.10 has a class of its own
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tp_kernels.ops._gpu import GpuInfo, pretend
from tp_kernels.ops.kernels.launch import Launch, recording
from tp_kernels.ops.tuning import dtype_class, forget_tables
from tp_kernels.testing.aot import build_launcher, compile_only, specialization_key
from tp_kernels.testing.gpu_timer import input_sets, raise_if_lost, time_competitors
from tp_kernels.testing.op_bench.case import Case
from tp_kernels.testing.op_bench.report import table_text
from tp_kernels.testing.op_bench.runner import Selection, check_case, select_cases

__all__ = ["Table", "distinct_jobs", "pending", "precompile", "tune_case"]

# An own path must be faster than PyTorch by this much to be chosen: within it, a difference is noise.
MARGIN = 1.01
# Configurations that go from the quick round to the final one.
FINALISTS = 2


class Table:
    """A tuning table on disk, written after every case so that an interrupted run loses nothing."""

    def __init__(self, path: Path, gpu: str):
        self.path = path
        self.content: dict[str, Any] = {"gpu": gpu, "measured": "", "versions": {}, "ops": {}}
        if path.exists():
            found = json.loads(path.read_text())
            if found.get("gpu") != gpu:
                raise ValueError(f"{path} is a table of {found.get('gpu')!r}, this GPU is {gpu!r}; choose another file")
            self.content = found

    def has(self, case: Case) -> bool:
        """Whether the case has an entry."""
        return self._find(case) is not None

    def _find(self, case: Case) -> int | None:
        for index, row in enumerate(self.content["ops"].get(case.op, [])):
            if row["dtype"] == dtype_class(case.dtype) and row["sizes"] == case.sizes:
                return index
        return None

    def put(self, case: Case, path: str, config: dict[str, Any], us: dict[str, float]) -> None:
        """Add or replace the entry of a case, and write the file."""
        row = {"dtype": dtype_class(case.dtype), "sizes": case.sizes, "path": path, "config": config, "us": us}
        rows, index = self.content["ops"].setdefault(case.op, []), self._find(case)
        if index is None:
            rows.append(row)
        else:
            rows[index] = row
        self.content["measured"] = datetime.date.today().isoformat()
        self.content["versions"] = _versions()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(table_text(self.content))
        unfinished.replace(self.path)
        forget_tables()


def _versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


class _MetaGenerator(torch.Generator):
    """Makes a case's inputs without memory."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


# A kernel to compile: index of the case within the selection, path, configuration.
_Job = tuple[int, str, dict[str, Any]]


@lru_cache(maxsize=1)
def _cases_in_worker(selection: Selection, info: GpuInfo) -> list[Case]:
    with pretend(info):
        return list(select_cases(selection))


def _recorded(case: Case, path: str, config: dict[str, Any], info: GpuInfo) -> list[Launch]:
    """What a path would launch, inputs of the benchmark included."""
    with pretend(info), recording() as launches:
        case.own[path].run(config, *case.inputs(_MetaGenerator()))
    return launches


def _compile_candidate(selection: Selection, info: GpuInfo, job: _Job) -> int:
    index, path, config = job
    done = 0
    try:
        for launch in _recorded(_cases_in_worker(selection, info)[index], path, config, info):
            compiled = compile_only(launch, info.capability[0] * 10 + info.capability[1])
            done += 1
            with contextlib.suppress(Exception):  # no libcuda, say
                build_launcher(compiled)
    except Exception:  # it will be compiled, or fail with a message, when it is first run
        pass
    return done


def distinct_jobs(cases: Sequence[tuple[int, Case]], info: GpuInfo) -> list[_Job]:
    """Those candidates of the cases that launch a kernel which none before them launches.

    Sizes are arguments of most kernels, so that one compiled kernel serves many shapes.
    """
    seen: set[str] = set()
    jobs: list[_Job] = []
    for index, case in cases:
        for path, own in case.own.items():
            for config in own.configs:
                try:
                    keys = {specialization_key(launch) for launch in _recorded(case, path, dict(config), info)}
                except Exception:  # the measurement will say
                    continue
                if not keys <= seen:
                    jobs.append((index, path, dict(config)))
                    seen |= keys
    return jobs


def precompile(
    selection: Selection,
    cases: Sequence[tuple[int, Case]],
    info: GpuInfo,
    *,
    processes: int | None = None,
    deadline: float = math.inf,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Compile every candidate of the cases into Triton's cache, in parallel and without the GPU.

    Args:
        selection: what the cases were selected by; the processes select them again.
        cases: (index within the selection, case).
        info: the GPU to compile for.
        processes: default is one a core.
        deadline: of ``time.monotonic``; what has not begun by then is left to be compiled when it is measured.
        progress: called with kernels done and kernels in all.

    Returns:
        Number of kernels compiled or found in the cache.
    """
    jobs = distinct_jobs(cases, info)
    count = max(1, min(processes or os.cpu_count() or 1, len(jobs)))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read by the processes, which are started as jobs come in
    compiled = 0
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        waiting = [pool.submit(_compile_candidate, selection, info, job) for job in jobs]
        left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for done, future in enumerate(as_completed(waiting, timeout=left), 1):
            compiled += future.result()
            progress(done, len(jobs))
    except (Late, BrokenProcessPool):
        pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if hidden is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    return compiled


def tune_case(case: Case, device: str, deadline: float) -> tuple[str, dict[str, Any], dict[str, float]] | None:
    """Best path, its configuration and the final round's microseconds; None without a right competitor or time.

    Args:
        case: must have a peer "torch", which is what the op falls back to.
        device: "cuda".
        deadline: of ``time.monotonic``; candidates not started by then are left out.
    """
    generator = torch.Generator(device=device).manual_seed(7)
    sets = input_sets(lambda: case.inputs(generator), case.input_bytes or case.bytes, device)
    finalists: dict[str, tuple[str, dict[str, Any]]] = {}
    for path, own in case.own.items():
        scores: list[tuple[float, dict[str, Any]]] = []
        for config in own.configs:
            if time.monotonic() > deadline:
                return None
            what = f"{case.op} {case.label} {path} {config}"
            seconds = _quick(lambda *inputs, own=own, config=config: own.run(config, *inputs), sets, what)
            if seconds is not None:
                scores.append((seconds, dict(config)))
        scores.sort(key=lambda item: item[0])
        taken = 0
        for _, config in scores:
            if taken == FINALISTS:
                break
            if _right(case, path, config, device):
                finalists[path if taken == 0 else f"{path} (2nd)"] = (path, config)
                taken += 1
    competitors: dict[str, Callable[..., Any]] = {"torch": case.peers["torch"]}
    for label, (path, config) in finalists.items():
        competitors[label] = lambda *inputs, own=case.own[path], config=config: own.run(config, *inputs)
    measured = time_competitors(competitors, sets, rounds=15)
    us = {name: round(m.timing.median * 1e6, 2) for name, m in measured.items()}
    for label, (path, _) in list(finalists.items()):
        if us[label] < us[path]:  # a path's own name stands for its faster configuration
            us[label], us[path] = us[path], us[label]
            finalists[label], finalists[path] = finalists[path], finalists[label]
    best = min(us, key=lambda name: us[name])
    if best == "torch" or us[best] * MARGIN > us["torch"]:
        return "torch", {}, us
    path, config = finalists[best]
    return path, config, us


def _quick(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], what: str) -> float | None:
    """Median seconds; None if it does not run here. ``what`` is named if it takes the CUDA context with it."""
    try:
        return time_competitors({"one": function}, sets, rounds=5, turn_ms=0.7)["one"].timing.median
    except Exception:  # a configuration that does not fit this GPU
        raise_if_lost(what)
        return None


def _right(case: Case, path: str, config: dict[str, Any], device: str) -> bool:
    name = f"own:{path}"
    return check_case(case, device, {path: config}, only=(name,))[name].good


def pending(cases: Iterable[Case], table: Table, again: bool) -> list[tuple[int, Case]]:
    """Cases that have something to tune and no entry yet, with their index in the selection."""
    return [
        (i, case)
        for i, case in enumerate(cases)
        if "torch" in case.peers and any(own.configs for own in case.own.values()) and (again or not table.has(case))
    ]
