"""Measures the cases of ``bench overlap`` on the ranks of a group: checks first, then everything in turns."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tp_kernels import one_gpu
from tp_kernels.comm.overlap import MARGIN, estimate_time
from tp_kernels.ops._gpu import gpu_of
from tp_kernels.testing.bench import Timing, interleaved
from tp_kernels.testing.gpu_timer import raise_if_lost
from tp_kernels.testing.overlap_bench import peers, report
from tp_kernels.testing.overlap_bench.case import Case, Operands, Plan, cases_of, count_unequal
from tp_kernels.testing.rank_bench import captured, cases_in_time, keep_rows, time_turns

__all__ = ["Bench", "Peers"]

_NONE = Plan("none")
# Schedules that are measured though their bound from below is no gain: otherwise nobody could see that it is none.
_AT_LEAST = 2
_CALLS_IN_GRAPH = 4
_STUCK_S = 30.0
# Of the minutes; the rest is for torch's own ways beside the winners.
_OURS = 0.8


class Peers(NamedTuple):
    """What torch's own ways need.

    Attributes:
        name: of ``process_group``'s backend.
        process_group: over which ``torch.distributed`` communicates.
        memory: name of a process group whose ranks reach each other's memory; None where they do not.
    """

    name: str
    process_group: Any
    memory: str | None


class Bench:
    """One run; a collective from the first to the last.

    Args:
        group: of the ranks, for what is not measured; its transport is a CPU's.
        over: (``max_ctas``, group) of the communicators to measure.
        options: ``bench_overlap.Options``.
        device: "cuda", or "cpu" to try the benchmark out.
        peers: torch's ways, None leaves them out.

    Attributes:
        rows: of the CSV, the same on all ranks.
        left_out: what could not be measured, and why, with how often.
        stuck: a peer's kernels do not end; nothing on the GPU can be waited for any more.
    """

    def __init__(self, group, over: list[tuple[int, Any]], options, device: str, peers: Peers | None = None):
        self.group, self.over, self.options, self.device, self.peers = group, list(over), options, device, peers
        self.dtype = getattr(torch, options.dtype)
        self.rows: list[dict[str, Any]] = []
        self.left_out: Counter[str] = Counter()
        self.stuck = False
        self._started = time.monotonic()
        probe = torch.empty(0, device=device)
        self._info = gpu_of(probe) if device == "cuda" else None
        self._sms = min(self._everyone(self._info.num_sms if self._info else 1))
        self._shown = 0

    def run(self) -> list[dict[str, Any]]:
        """All cases, then the peers beside the best of ours; the rows."""
        done = []
        minutes = self.options.minutes
        share = 1.0 if self.peers is None else _OURS
        for case in cases_in_time(self.group, cases_of(self.options), minutes, self._started, share=share):
            first = len(self.rows)
            for ctas, over in list(self.over):
                self._try(case, ctas, over)
            found = report.set_gates(self.rows[first:])
            done.append(case)
            self._keep(found)
        if self.peers is not None:
            what = "cases beside torch's own ways"
            for case in cases_in_time(self.group, done, minutes, self._started, what=what):
                self._beside(case)
                self._keep([])
                if self.stuck:
                    break
        if self.group.rank == 0:
            for what, count in self.left_out.items():
                often = "once" if count == 1 else f"{count} times"
                print(f"# left out, {often}: {what}", flush=True)
        return self.rows

    def _everyone(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.group.world_size
        dist.all_gather_object(found, value, group=self.group.process_group)
        return found

    def _total(self, count: int) -> int:
        return sum(self._everyone(count))

    def _keep(self, found: list[dict[str, Any]]) -> None:
        keep_rows(self.group, self.options.csv, self.rows)
        if self.group.rank:
            return
        for row in self.rows[self._shown :]:
            report.print_row(row, first=self._shown == 0)
            self._shown += 1
        if self.options.tune is not None and found:
            from tp_kernels.ops.tuning import user_table

            name = self._info.name if self._info else "cpu"
            path = self.options.tune or user_table(self._info.slug)
            report.write_table(found, self.dtype, Path(path), name)

    # Ours ------------------------------------------------------------------------------------------------------------

    def _try(self, case: Case, ctas: int, over: Any) -> None:
        """Measure a case over one communicator; one that fails is left out from there on, on all ranks."""
        if over.backend == "symm" and case.op != "linear_all_reduce":
            return  # the other ops have nothing to gain from it but in one piece
        problem, rows = "", []
        try:
            rows = self._measure(case, ctas, over)
        except Exception as error:
            raise_if_lost(f"{case} over {over.backend}")
            problem = _words(error)
        problems = [text for text in self._everyone(problem) if text]
        if problems:
            rows = [report.failed_row(self._common(case, ctas, over.backend, ""), problems[0])]
            self.over.remove((ctas, over))
        self.rows += rows

    def _common(self, case: Case, ctas: int, backend: str, timed: str) -> dict[str, Any]:
        on_gpu = self.device == "cuda"
        return {
            "op": case.op,
            "backend": backend,
            "ranks": self.group.world_size,
            "ranks_per_gpu": one_gpu.ranks_on_this_gpu(),
            "mps": on_gpu and one_gpu.has_mps(),
            "sms": self._sms,
            "dtype": self.options.dtype,
            "m": case.m,
            "n": case.n,
            "in_features": case.in_features,
            "max_ctas": ctas,
            "timed": timed,
        }

    def _operands(self, case: Case, exact: bool = False) -> Operands:
        return Operands(case, self.group.rank, self.group.world_size, self.dtype, self.device, exact)

    def _measure(self, case: Case, ctas: int, over: Any) -> list[dict[str, Any]]:
        operands, graph = self._operands(case), self.device == "cuda" and self._as_graph(over)
        calls: dict[str, Callable[[], Any]] = {
            "compute": operands.compute,
            "comm": lambda: operands.communicate(over.communicator),
            "none": lambda: operands.call(over, _NONE),
        }
        first = self._time(calls, over, graph)
        plans = [_NONE, *self._plans(case, over, *(first[name].median for name in calls))]
        plans = [plan for plan in plans if self._takes(operands, over, plan)]
        counts = self._check(case, operands, over, plans)
        for plan in plans[1:]:
            calls[str(plan)] = lambda plan=plan: operands.call(over, plan)
        timed = self._time(calls, over, graph) if len(plans) > 1 else first
        mode = "host" if self.device == "cpu" else "graph" if graph else "eager"
        return report.plan_rows(self._common(case, ctas, over.backend, mode), plans, timed, counts)

    def _as_graph(self, over: Any) -> bool:
        # Sums over peer memory take about as long as the host needs to launch them.
        return self.options.graph or over.backend == "symm"

    def _plans(self, case: Case, over: Any, compute: float, comm: float, none: float) -> list[Plan]:
        """The ways to overlap that are worth measuring."""
        modes = over.communicator.overlap_modes
        found = []
        if "chunked" in modes or self.device == "cpu":  # CPU transports work at once
            world_size = self.group.world_size
            schedules = case.schedules(world_size, self.dtype, self._info, self._sms, self.options)
            bounds = {schedule: estimate_time(schedule.rows, compute, comm) for schedule in schedules}
            promising = sorted(schedules, key=bounds.__getitem__)[:_AT_LEAST]
            hopeful = [s for s in schedules if s in promising or bounds[s] * MARGIN < none]
            found += [Plan("chunked", schedule) for schedule in hopeful]
        if "fused" in modes:
            found.append(Plan("fused"))
        elif over.backend == "symm":
            self.left_out[f'"fused": the {over.backend} communicator does not offer it here'] += 1
        return found

    def _takes(self, operands: Operands, over: Any, plan: Plan) -> bool:
        """Whether the fused kernel takes these shapes, which it says before ranks meet, and alike on all of them."""
        if plan.path == "fused":
            try:
                operands.call(over, plan)
            except ValueError as error:
                self.left_out[str(error)] += 1
                return False
        return True

    def _check(self, case: Case, operands: Operands, over: Any, plans: list[Plan]) -> dict[Plan, dict[str, int]]:
        """Of each plan the elements that differ from one piece, from the same one by one, from exact sums."""
        counts = {}
        piece = operands.call(over, _NONE).clone()  # what follows may use its memory again
        for plan in plans:
            found = {"differs": 0, "wrong": 0}
            if plan != _NONE:
                together = operands.call(over, plan).clone()
                # What has no schedule of its own must at least give the same bits again.
                again = operands.call(over, plan, "none" if plan.schedule else None)
                found = {"differs": int((together != piece).sum()), "wrong": int((together != again).sum())}
            counts[plan] = found
        del piece
        exact = self._operands(case, exact=True)
        expected = exact.expected()
        for plan in plans:
            counts[plan]["wrong_sums"] = count_unequal(lambda plan=plan: exact.call(over, plan), expected)
        return {plan: {name: self._total(count) for name, count in found.items()} for plan, found in counts.items()}

    # Torch's ---------------------------------------------------------------------------------------------------------

    def _beside(self, case: Case) -> None:
        """Torch's ways of the case in turns with our fastest; rows of theirs."""
        best = self._best(case)
        if best is None:
            return
        (ctas, over), plan = best
        operands, exact = self._operands(case), self._operands(case, exact=True)
        expected = exact.expected()
        calls, wrong = {"none": lambda: operands.call(over, _NONE), "ours": lambda: operands.call(over, plan)}, {}
        for name, make in self._ways(case, operands).items():
            problem = ""
            try:
                call = make(exact)
                self._wait_for(call)
                wrong[name] = count_unequal(call, expected)
                calls[name] = make(operands)
            except Exception as error:
                if not isinstance(error, TimeoutError):
                    raise_if_lost(name)
                problem = _words(error)
                self.stuck |= isinstance(error, TimeoutError)
            problems = self._everyone((problem, self.stuck))
            self.stuck = any(stuck for _, stuck in problems)
            for text, _ in problems:
                if text:
                    self.left_out[f"{name}: {text}"] += 1
                    calls.pop(name, None)
                    break
            if self.stuck:
                return
        names = [name for name in calls if name not in ("none", "ours")]
        if not names:
            return
        problem, timed = "", {}
        try:
            timed = self._time(calls, over, graph=False)
        except Exception as error:
            raise_if_lost(", ".join(names))
            problem = _words(error)
        problems = [text for text in self._everyone(problem) if text]
        if problems:
            self.left_out[f"{', '.join(names)} in turns: {problems[0]}"] += 1
            return
        beside = f"{over.backend} {plan}"
        common = self._common(case, ctas, "torch", "host" if self.device == "cpu" else "eager")
        for name in names:
            self.rows.append(report.peer_row(common, name, timed, self._total(wrong[name]), beside))

    def _ways(self, case: Case, operands: Operands) -> dict[str, Callable[[Operands], Callable[[], Any]]]:
        """Torch's ways, given operands; what cannot run is noted."""
        ways: dict[str, Callable[[Operands], Callable[[], Any]]] = {}
        name = f"torch_{self.peers.name}"
        if len(set(operands.sizes)) == 1 or case.op == "linear_all_reduce":
            ways[name] = lambda of: peers.distributed_of(of, self.peers.process_group)
        else:
            self.left_out[f"{name}: it wants as many tokens on every rank"] += 1
        no_memory = "" if self.peers.memory else "the ranks have no memory in common"
        reason = peers.why_no_async_tp(operands, no_memory)
        if reason:
            self.left_out[f"{peers.ASYNC_TP}: {reason}"] += 1
        else:
            ways[peers.ASYNC_TP] = lambda of: peers.async_tp_of(of, self.peers.memory)
        return ways

    def _best(self, case: Case) -> tuple[tuple[int, Any], Plan] | None:
        """The communicator and plan of ours that were fastest for a case and right."""
        rows = [row for row in self.rows if report.is_of(row, case) and report.counts(row)]
        for row in sorted(rows, key=lambda row: row["time_us"]):
            for ctas, over in self.over:
                if (ctas, over.backend) == (row["max_ctas"], row["backend"]):
                    return (ctas, over), report.plan_of(row)
        return None

    def _wait_for(self, call: Callable[[], Any]) -> None:
        """Wait for a first call, but not for ever: torch's barriers between ranks have no deadline."""
        call()
        if self.device == "cpu":
            return
        event = torch.cuda.Event()
        event.record()
        limit = time.monotonic() + _STUCK_S
        while not event.query():
            if time.monotonic() > limit:
                raise TimeoutError(f"it did not end within {_STUCK_S:g} s")
            time.sleep(1e-3)

    # Time ------------------------------------------------------------------------------------------------------------

    def _time(self, calls: Mapping[str, Callable[[], Any]], over: Any, graph: bool) -> dict[str, Timing]:
        """Per call the summary over rounds, each as long as its slowest rank."""
        rounds = self.options.rounds
        if self.device == "cuda":
            plays = {name: captured(call, _CALLS_IN_GRAPH).replay for name, call in calls.items()} if graph else calls
            try:
                count = _CALLS_IN_GRAPH if graph else 1
                return time_turns(plays, count, rounds, group=self.group, symm=over.communicator)
            finally:
                torch.cuda.synchronize()
        seconds = interleaved(calls, rounds=rounds, warmup=2, before=lambda name: self.group.barrier())
        by_rank = self._everyone(seconds)
        return {name: Timing.of(map(max, zip(*(rank[name] for rank in by_rank), strict=True))) for name in calls}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
