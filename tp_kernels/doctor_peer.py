"""The doctor's check of peer memory: what kernels do with another GPU's memory, tried between all ordered pairs.

``torch.cuda.can_device_access_peer`` and host-made copies can be fine where kernels read or write wrong data, or hang
(an IOMMU, access control on PCIe switches, patched drivers). Here a kernel on every GPU stores a pattern to every
other, loads one from it and adds to its counters, with a deadline, in several sizes, and what arrived is compared word
by word: the CUDA kernel of csrc/kernels/peer_check.cu, or its Triton twin where that was not built. Several GPUs get a
rank each; a single one gets two ranks that share it.

Up to eight GPUs that reach each other are checked at a time, in fresh processes. When something broke off, the pairs to
blame are tried alone, and the others again without them: so a bad pair is told from good ones on the same machine. The
verdicts are kept (``tp_kernels.comm.peer_verdicts``): a pair that failed keeps the groups that contain it from peer
memory. GPUs without access to each other have no verdict: groups see that by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from tp_kernels import _native
from tp_kernels.comm.peer_verdicts import PASSED, driver_version, write_verdicts
from tp_kernels.comm.symmetric_workspace import SymmetricMemoryUnavailable, has_triton
from tp_kernels.doctor import Skip, report_progress
from tp_kernels.testing.rank_pool import RankFailedError

__all__ = ["Findings", "check_pairs", "check_peer_memory", "next_batch", "verdicts_of"]

_SIZES = (64, 64 << 10, 4 << 20)  # bytes a pair
_SEEDS = (1, 2, 3)  # the kernels use two areas in turn
_DEADLINE = 20.0  # seconds of one wait in a kernel; ranks on one GPU without MPS take turns of milliseconds
_FIRST_DEADLINE = 90.0  # of the first one, when Triton compiles before it
_ROWS = ("stored", "loaded", "added")
_MOST_RANKS = 8
# Seconds for all GPUs, a batch, and the least that is worth starting one: processes, contexts, memory.
_TOTAL, _BATCH, _LEAST = 300.0, 150.0, 20.0
_LATE = "time ran out"

Pair = tuple[int, int]
Results = Sequence[Mapping[str, Any]]


def check_peer_memory() -> str:
    """A check of the doctor: run it, keep the verdicts, fail if a pair failed."""
    if not _native.has_cuda() and not has_triton():
        raise Skip(f"the CUDA sources were {_native.build_info()['cuda']}, and Triton is not installed")
    if not torch.cuda.is_available():
        raise Skip("no GPU here")
    count = torch.cuda.device_count()
    if count == 1:
        return _check_one_gpu()
    pairs = [
        (a, b)
        for a, b in combinations(range(count), 2)
        if torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)
    ]
    apart = [pair for pair in combinations(range(count), 2) if pair not in pairs]
    if not pairs:
        raise Skip(f"no peer access between any of {count} GPUs; groups use NCCL")
    found = check_pairs(pairs, _on_gpus, time.monotonic() + _TOTAL)
    names = {index: _identity(index) for index in range(count)}
    notes = [f"{_listed(apart)}: no peer access, groups with these use NCCL"] if apart else []
    notes += [f"{_listed(which)}: not checked, {why}" for why, which in _by_reason(found.unchecked).items()]
    if found.broken:  # with verdicts or without: the check itself does not work
        notes += [f"{_listed(which)}: {why}" for why, which in _by_reason(found.broken).items()]
    if not found.verdicts and not found.broken:
        raise Skip("; ".join(notes))
    kept = {(names[a], names[b]): verdict for (a, b), verdict in found.verdicts.items()}
    summary = _conclude(found.verdicts, kept, f"{count} GPUs", notes)
    if found.broken:
        raise RuntimeError(summary)
    return summary


def _check_one_gpu() -> str:
    try:
        results = _on_one_gpu()
    except SymmetricMemoryUnavailable as error:
        raise Skip(f"there is no symmetric memory here ({error.reason}); groups do without") from None
    verdicts = verdicts_of(results)
    kept = _by_gpu(verdicts, [result["gpu"] for result in results])
    return _conclude(verdicts, kept, f"{len(results)} ranks on one GPU", [])


def _conclude(
    verdicts: Mapping[Pair, str], kept: Mapping[tuple[str, str], str], where: str, notes: Sequence[str]
) -> str:
    path = write_verdicts(driver_version(), kept)
    failed = [f"{a}->{b}: {verdict}" for (a, b), verdict in sorted(verdicts.items()) if verdict != PASSED]
    if failed:
        told = f"groups with these pairs leave peer memory alone from now on ({path}): "
        raise RuntimeError(told + "; ".join([*failed, *notes]))
    return "; ".join([f"{len(verdicts)} ordered pairs of {where}, {len(_SIZES)} sizes; kept in {path}", *notes])


# Which pairs together ------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What was found of pairs of GPUs.

    Attributes:
        verdicts: of ordered pairs (who accessed, whose memory): ``PASSED`` or what went wrong.
        unchecked: of unordered pairs (the smaller number first): why nothing is known.
        broken: the same, where the check itself went wrong.
    """

    verdicts: dict[Pair, str] = field(default_factory=dict)
    unchecked: dict[Pair, str] = field(default_factory=dict)
    broken: dict[Pair, str] = field(default_factory=dict)


def next_batch(left: Collection[Pair], allowed: Collection[Pair], most: int = _MOST_RANKS) -> list[int]:
    """GPUs to check together: as many pairs of ``left`` as can easily be had in one group.

    Args:
        left: pairs (a, b), a < b, that are not yet checked; not empty.
        allowed: pairs that may meet in a group, ``left`` among them.
        most: GPUs of a group.
    """
    batch = list(min(left))
    everyone = sorted({gpu for pair in allowed for gpu in pair})
    while len(batch) < most:
        gains = {
            gpu: sum(_pair(gpu, member) in left for member in batch)
            for gpu in everyone
            if gpu not in batch and all(_pair(gpu, member) in allowed for member in batch)
        }
        best = max(gains, key=lambda gpu: (gains[gpu], -gpu), default=None)
        if best is None or gains[best] == 0:
            break
        batch.append(best)
    return sorted(batch)


def check_pairs(pairs: Collection[Pair], run: Callable[[Sequence[int], float], Results], deadline: float) -> Findings:
    """Check all pairs of GPUs that reach each other.

    Args:
        pairs: (a, b) with a < b.
        run: checks a group of GPUs within so many seconds; what its ranks saw, as for ``verdicts_of``.
        deadline: of ``time.monotonic()``, after which nothing is begun.
    """
    found, left = Findings(), set(pairs)
    apart: set[Pair] = set()  # what may be to blame is tried alone, and later in no larger group
    while left:
        alone = sorted(apart & left)
        batch = list(alone[0]) if alone else next_batch(left, set(pairs) - apart)
        members = set(combinations(batch, 2))
        seconds = deadline - time.monotonic()
        if seconds < _LEAST:
            found.unchecked.update(dict.fromkeys(sorted(left), _LATE))
            break
        report_progress(f"peer memory of GPUs {', '.join(map(str, batch))} ({len(left)} pairs left)")
        error, results = None, []
        try:
            results = run(batch, min(seconds, _BATCH))
            blamed = _blamed(results)
        except Exception as problem:
            error, blamed = problem, _pairs_with(getattr(problem, "ranks", ()), len(batch))
        if len(batch) > 2 and (blamed or error is not None):
            # That some pairs look good or bad means nothing: who waits for a stuck rank does not know whom that waits
            # for. A rank's last wait was for one of those to blame.
            apart |= ({_pair(batch[a], batch[b]) for a, b in blamed} & left) or (members & left)
            continue
        both = tuple(batch), tuple(batch[::-1])
        verdicts = {(batch[a], batch[b]): verdict for (a, b), verdict in verdicts_of(results).items()}
        if isinstance(error, RankFailedError) and time.monotonic() < deadline:  # it died or hung by itself
            verdicts = dict.fromkeys(both, f"the check broke off: {_first_line(error)}")
        elif isinstance(error, RankFailedError):
            found.unchecked[both[0]] = _LATE
        elif isinstance(error, SymmetricMemoryUnavailable):
            found.unchecked[both[0]] = f"there is no symmetric memory between them ({error.reason})"
        elif error is not None:
            found.broken[both[0]] = _first_line(error)
        # Pairs that met before stay what they were.
        found.verdicts.update({pair: verdict for pair, verdict in verdicts.items() if _pair(*pair) in left})
        left -= members
    return found


def _blamed(results: Results) -> set[Pair]:
    """Pairs of ranks that may be why a check ended early; empty when it did not."""
    blamed = {(result["waited_for"], rank) for rank, result in enumerate(results) if result["waited_for"] is not None}
    return blamed | _pairs_with([rank for rank, result in enumerate(results) if result["error"]], len(results))


def _pairs_with(ranks: Sequence[int], world: int) -> set[Pair]:
    return {(rank, other) for rank in ranks for other in range(world) if other != rank}


def verdicts_of(results: Results) -> dict[Pair, str]:
    """What the ranks saw, as one verdict for each ordered pair (who accessed, whose memory).

    Args:
        results: by rank: ``"runs"``, a list of {"bytes", "report"} with report[row][peer] wrong words or adds (rows:
            stores of the peer found here, loads from it, atomics of it found here), ``"waited_for"``, a rank whose
            signal never came here or None (then ``"deadline"`` tells the seconds), and ``"error"``, what else went
            wrong on this rank or "".
    Returns:
        ``PASSED``, or what went wrong first.
    """
    world = len(results)
    found = {}
    for a in range(world):
        for b in range(world):
            if a != b:
                found[a, b] = _verdict(results[a], results[b], a, b)
    return found


def _verdict(accessing: Mapping[str, Any], owner: Mapping[str, Any], a: int, b: int) -> str:
    for result in (accessing, owner):
        if result["error"]:
            return f"the check broke off: {result['error']}"
    if owner["waited_for"] == a:
        return f"a signal did not arrive within {owner.get('deadline', _DEADLINE):g} s"
    for ours, theirs in zip(accessing["runs"], owner["runs"], strict=False):
        wrong = (theirs["report"][0][a], ours["report"][1][b], theirs["report"][2][a])
        if any(wrong):
            words = ", ".join(f"{count} {what}" for what, count in zip(_ROWS, wrong, strict=True) if count)
            return f"wrong words or counts with {ours['bytes']} bytes: {words}"
    complete = len(_SIZES) * len(_SEEDS)
    if min(len(accessing["runs"]), len(owner["runs"])) < complete:
        return "the check ended early, because the other direction failed"
    return PASSED


def _by_gpu(verdicts: Mapping[Pair, str], gpus: Sequence[str]) -> dict[tuple[str, str], str]:
    """By GPU instead of rank; of pairs of ranks on the same GPUs a failed one counts."""
    found: dict[tuple[str, str], str] = {}
    for (a, b), verdict in sorted(verdicts.items()):
        pair = (gpus[a], gpus[b])
        if found.get(pair, PASSED) == PASSED:
            found[pair] = verdict
    return found


def _by_reason(unchecked: Mapping[Pair, str]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair, reason in sorted(unchecked.items()):
        found.setdefault(reason, []).append(pair)
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _pair(a: int, b: int) -> Pair:
    return (a, b) if a < b else (b, a)


def _listed(pairs: Sequence[Pair]) -> str:
    shown = ", ".join(f"{a}-{b}" for a, b in pairs[:12])
    return f"GPUs {shown}" + (f" and {len(pairs) - 12} more pairs" if len(pairs) > 12 else "")


def _identity(index: int) -> str:
    from tp_kernels.comm.gpu_facts import gpu_identity

    return "@".join(gpu_identity(torch.device("cuda", index)))


# Ranks ---------------------------------------------------------------------------------------------------------------


def _on_gpus(gpus: Sequence[int], seconds: float) -> Results:
    from tp_kernels.testing.rank_pool import RankPool

    def environment(rank: int) -> dict[str, str]:
        return {"LOCAL_RANK": str(gpus[rank])}  # whatever the environment of this process says

    with RankPool(len(gpus), backend="gloo", device="cuda", environment=environment, group_timeout=60.0) as pool:
        return pool.run(_on_rank, timeout=seconds)


def _on_one_gpu() -> Results:
    from tp_kernels.testing.one_gpu_ranks import OneGpuRanks

    with OneGpuRanks() as ranks:
        return ranks(2, backend="gloo", group_timeout=60.0).run(_on_rank, timeout=180.0)


def _on_rank(group: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from tp_kernels import one_gpu
    from tp_kernels.comm.gpu_facts import gpu_identity
    from tp_kernels.comm.symmetric_workspace import Workspace

    device, rank, world = group.device, group.rank, group.world_size
    result: dict[str, Any] = {"gpu": "@".join(gpu_identity(device)), "runs": [], "waited_for": None, "error": ""}
    half_bytes = _native.native.cuda_peer_check_half_bytes(world, max(_SIZES))
    launch, deadline = (_launch_native, _DEADLINE) if _native.has_cuda() else (_launch_triton, _FIRST_DEADLINE)
    blocks = int(group.all_gather(torch.tensor([one_gpu.own_max_blocks(device)])).min())
    store = dist.PrefixStore("doctor_peer", dist.distributed_c10d._get_default_store())
    with torch.cuda.device(device):
        workspace = Workspace.create(
            rank, world, "peer check", store, group.process_group, device, half_bytes, group.timeout
        )
        try:
            for nbytes in _SIZES:
                for seed in _SEEDS:
                    report = torch.zeros(3, world, dtype=torch.int32, device=device)
                    launch(workspace, rank, world, nbytes, seed, report, blocks, int(deadline * 1e9))
                    torch.cuda.current_stream(device).synchronize()
                    if workspace.record.magic:
                        result.update(waited_for=int(workspace.record.rank), deadline=deadline)
                        return result
                    deadline = _DEADLINE
                    result["runs"].append({"bytes": nbytes, "report": report.tolist()})
        except Exception as error:  # a sticky CUDA error: the verdict of this rank's pairs, not of the whole check
            result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        finally:
            group.barrier()  # no peer's kernel looks at this memory any more
            if not result["error"]:
                workspace.close()
    return result


def _launch_native(workspace, rank, world, nbytes, seed, report, blocks, timeout_ns) -> None:
    half_bytes, stream = workspace.layout.half_bytes, torch.cuda.current_stream(report.device).cuda_stream
    where = (workspace.data, workspace.flags, rank, world, half_bytes)
    waits = (blocks, timeout_ns, workspace.record_address, stream)
    _native.native.cuda_peer_check(*where, nbytes, seed, report.data_ptr(), *waits)


def _launch_triton(workspace, rank, world, nbytes, seed, report, blocks, timeout_ns) -> None:
    from tp_kernels.ops.kernels import peer_check

    group = {"rank": rank, "world_size": world, "half_bytes": workspace.layout.half_bytes}
    peer_check.check(report, workspace.table, nbytes, seed, **group, max_blocks=blocks, timeout_ns=timeout_ns)
