"""How the ranks of a group of GPUs make its transports together: all of them or none of them has each one.

Every attempt is followed by an exchange of how it went. If one rank failed, the others close what they have just made,
and all choose again as if that transport did not exist; so no rank is left with a communicator that its peers lack.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tp_kernels.comm import rendezvous
from tp_kernels.comm.communicator import Communicator
from tp_kernels.comm.errors import CommTimeoutError
from tp_kernels.comm.gpu_facts import GpuFacts
from tp_kernels.comm.paths import PathTable, default_table, table_file
from tp_kernels.comm.policy import (
    BackendUnavailableError,
    Choice,
    RankFacts,
    choose,
    forbid_fallback,
    report_fallback,
)
from tp_kernels.comm.routed import RoutedCommunicator, paths_of

__all__ = ["create_gpu_communicator", "makers_of"]

Maker = Callable[[], Communicator]


def makers_of(
    rank: int,
    world_size: int,
    name: str,
    store: Any,
    process_group: Any,
    device: torch.device,
    timeout: float,
    nccl_options: Mapping[str, Any] | None = None,
) -> dict[str, Maker]:
    """How this rank makes its part of each transport: a collective of all ranks that raises where it fails.

    Args:
        nccl_options: of ``NCCLCommunicator.create``, equal on all ranks.
    """

    def symm() -> Communicator:
        from tp_kernels.comm.symmetric import SymmetricMemoryCommunicator

        own = dist.PrefixStore("symm", store)
        return SymmetricMemoryCommunicator.create(rank, world_size, name, own, process_group, device, timeout=timeout)

    def nccl() -> Communicator:
        from tp_kernels.comm.nccl import NCCLCommunicator

        own = dist.PrefixStore("nccl", store)
        return NCCLCommunicator.create(rank, world_size, name, own, device, timeout=timeout, **(nccl_options or {}))

    def gloo() -> Communicator:
        from tp_kernels.comm.gloo import GlooCommunicator

        return GlooCommunicator(process_group, name=name, store=dist.PrefixStore("gloo", store), timeout=timeout)

    return {"symm": symm, "nccl": nccl, "gloo": gloo}


def create_gpu_communicator(
    facts: Sequence[RankFacts], rank: int, name: str, store: Any, makers: Mapping[str, Maker], timeout: float
) -> tuple[Communicator, Choice]:
    """The communicator of a group of more than one GPU rank, and why it is that one. A collective.

    Args:
        facts: of all ranks, in rank order.
        rank: of this process in the group.
        name: of the group.
        store: with a prefix of this creation's own.
        makers: as ``makers_of`` gives them.
        timeout: seconds; the exchange after an attempt waits twice as long, because the attempt itself may have
            spent its whole time on some ranks.
    Raises:
        BackendUnavailableError: a fallback was needed and is not allowed, or nothing is left. On all ranks alike, as is
            ValueError for requests that exclude each other. CommTimeoutError: a rank did not come.
    """
    world_size, mine = len(facts), facts[rank]
    made: dict[str, Communicator] = {}
    failed: dict[str, str] = {}
    try:
        while True:
            choice = choose(facts, failed)
            forbid_fallback(choice, mine, name)
            if choice.chosen in failed:
                reasons = "; ".join(f"{path}: {reason}" for path, reason in failed.items())
                raise BackendUnavailableError(f"group {name}: no transport could be made ({reasons})", group=name)
            missing = next((path for path in choice.members if path not in made), None)
            if missing is None:
                break
            reason = _make_together(missing, makers[missing], made, rank, world_size, name, store, timeout)
            if reason:
                failed[missing] = reason
        for path in set(made) - set(choice.members):
            made.pop(path).close()
        report_fallback(choice, mine, name, rank)
        if choice.members == ("gloo",):
            return made["gloo"], choice
        members = {path: made[path] for path in choice.members}
        return _routed(members, choice, facts, rank, name, store, timeout), choice
    except BaseException:
        for communicator in made.values():
            with contextlib.suppress(Exception):  # the error at hand is the one to tell
                communicator.close()
        raise


def _make_together(
    path: str, make: Maker, made: dict[str, Communicator], rank: int, world_size: int, name: str, store: Any, timeout
) -> str:
    """Put this rank's part of ``path`` into ``made``; returns why not, on all ranks alike, or ""."""
    error = None
    try:
        made[path] = make()
    except Exception as problem:
        error = problem
    outcome = {"error": "" if error is None else f"{type(error).__name__}: {error}", "late": _is_timeout(error)}
    everyone = rendezvous.exchange(store, rank, world_size, outcome, 2 * timeout + 5, group=name, what=f"made {path}")
    failures = [(r, theirs) for r, theirs in enumerate(everyone) if theirs["error"]]
    if not failures:
        return ""
    if path in made:
        with contextlib.suppress(Exception):  # why it cannot be used is known already
            made.pop(path).close()
    # A rank that waited in vain tells less than the one it waited for.
    first, theirs = min(failures, key=lambda failure: failure[1]["late"])
    return f"rank {first}: {theirs['error']}"


def _is_timeout(error: Exception | None) -> bool:
    return isinstance(error, (TimeoutError, CommTimeoutError, dist.DistError))


def _routed(
    members: Mapping[str, Communicator],
    choice: Choice,
    facts: Sequence[RankFacts],
    rank: int,
    name: str,
    store: Any,
    timeout: float,
) -> RoutedCommunicator:
    gpus = [fact.gpu for fact in facts]
    shared = len({gpu.uuid for gpu in gpus}) < len(gpus)
    mine: dict[str, Any] = {"paths": paths_of(members), "table": None}
    table = default_table(len(facts), min(gpu.capability for gpu in gpus), shared)
    if rank == 0:
        mine["table"] = _measured(table, gpus[0], len(facts), shared, name)
    everyone = rendezvous.exchange(store, rank, len(facts), mine, timeout, group=name, what="paths")
    available = [path for path in mine["paths"] if all(path in theirs["paths"] for theirs in everyone)]
    if everyone[0]["table"] is not None:
        table = table.with_measured(everyone[0]["table"])
    return RoutedCommunicator(
        members, numerics=choice.numerics, table=table, available=available, strict=facts[rank].strict
    )


def _measured(defaults: PathTable, gpu: GpuFacts, world_size: int, shared: bool, name: str) -> Any:
    """The user's table for this box, checked, or None; only the first rank looks."""
    path = table_file(gpu.name, world_size, shared)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        defaults.with_measured(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"tp_kernels: group {name} ignores {path}: {error}; run `tp-kernels tune comm`", stacklevel=5)
        return None
    return content
