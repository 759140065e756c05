"""Which communicator a group gets, and why: a pure function of values that all its ranks share.

Every rank contributes ``RankFacts``; all ranks see the same list and so choose the same path without talking further.
``explain(group)`` shows the choice and the reason for each path not taken. A path that was better on paper but could
not be used is a fallback: one warning by the group's first rank, or an error under ``strict=True``.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tp_kernels.comm.errors import CommError

__all__ = ["BACKENDS", "BackendUnavailableError", "Choice", "RankFacts", "Rejection", "choose", "explain"]

BACKENDS = ("auto", "shm", "gloo")


class BackendUnavailableError(CommError):
    """The requested backend cannot be used, or a fallback was needed under ``strict=True``."""


@dataclass(frozen=True)
class RankFacts:
    """What one rank tells the others before the choice.

    Attributes:
        host: the machine's name, for messages.
        domain: equal on ranks that can share memory and see each other's processes: same kernel boot, same
            ``/dev/shm``, same process-id namespace. Containers on one machine usually differ in it.
        device_type: "cpu" or "cuda".
        backend: what was asked for, one of ``BACKENDS``.
        strict: whether a fallback is an error.
    """

    host: str
    domain: str
    device_type: str
    backend: str
    strict: bool

    @classmethod
    def here(cls, device_type: str, backend: str, strict: bool) -> RankFacts:
        """Facts of the calling process."""
        return cls(socket.gethostname(), _sharing_domain(), device_type, backend, bool(strict))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rejection:
    """A path not taken. ``is_fallback``: it would have been preferred, had it been possible."""

    path: str
    reason: str
    is_fallback: bool = False


@dataclass(frozen=True)
class Choice:
    """The chosen path and the ones not taken; printable.

    Attributes:
        chosen: "local", "shm" or "gloo".
        reason: why, in a few words.
        rejected: the other paths, in order of preference.
    """

    chosen: str
    reason: str
    rejected: tuple[Rejection, ...] = ()

    @property
    def fallback_reason(self) -> str | None:
        """Why a preferred path was not possible, or None when the preferred one was taken."""
        reasons = [f"{r.path}: {r.reason}" for r in self.rejected if r.is_fallback]
        return "; ".join(reasons) or None

    def without_shm(self, reason: str) -> Choice:
        """The choice after shared memory turned out impossible while it was being created."""
        rest = tuple(r for r in self.rejected if r.path not in ("shm", "gloo"))
        return replace(self, chosen="gloo", reason="works anywhere", rejected=(Rejection("shm", reason, True), *rest))

    def __str__(self) -> str:
        lines = [f"{self.chosen}: chosen ({self.reason})"]
        lines += [f"{r.path}: not taken ({r.reason})" for r in self.rejected]
        return "\n".join(lines)


def choose(facts: Sequence[RankFacts]) -> Choice:
    """The path for a group whose ranks gave ``facts`` in rank order.

    Raises:
        ValueError: the ranks asked for different things; the message lists who asked for what.
    """
    _check_agreement(facts)
    first = facts[0]
    if len(facts) == 1:
        reason = "one rank has nobody to talk to"
        return Choice("local", "one rank", (Rejection("shm", reason), Rejection("gloo", reason)))
    if first.backend == "gloo":
        return Choice("gloo", "requested", (Rejection("shm", "backend='gloo' was requested"),))
    obstacle = _obstacle_to_shm(facts)
    if obstacle is None:
        reason = "requested" if first.backend == "shm" else "all ranks share this host's memory"
        return Choice("shm", reason, (Rejection("gloo", "slower on one host"),))
    return Choice("gloo", "works anywhere", (Rejection("shm", *obstacle),))


def _obstacle_to_shm(facts: Sequence[RankFacts]) -> tuple[str, bool] | None:
    """(reason, whether the user should hear of it); None if shared memory can be tried."""
    asked = facts[0].backend == "shm"
    if facts[0].device_type != "cpu":
        return "it holds CPU tensors only; Gloo copies GPU tensors through host memory", asked
    domains: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        domains.setdefault(fact.domain, []).append(rank)
    if len(domains) == 1:
        return None
    hosts = sorted({fact.host for fact in facts})
    if len(hosts) == len(domains):
        # Ranks on several machines are nobody's mistake, so no warning for those.
        return f"the ranks are on {len(hosts)} hosts ({', '.join(hosts)})", asked
    parts = " and ".join(f"ranks {ranks}" for ranks in domains.values())
    return f"{parts} do not share /dev/shm and process ids (separate containers?)", True


def _check_agreement(facts: Sequence[RankFacts]) -> None:
    for field in ("backend", "device_type", "strict"):
        values = [getattr(fact, field) for fact in facts]
        if len(set(values)) > 1:
            listing = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise ValueError(f"all ranks of a group must agree on {field}, got {listing}")


def report_fallback(choice: Choice, facts: RankFacts, group: str, rank: int) -> None:
    """Raise if the fallback in ``choice`` is not allowed, else warn once per group (on its first rank)."""
    reason = choice.fallback_reason
    if reason is None:
        return
    if facts.strict or facts.backend == "shm":
        cause = "strict=True forbids the fallback" if facts.strict else "backend='shm' was requested"
        raise BackendUnavailableError(f"group {group}: {reason}; {cause} to {choice.chosen}", group=group)
    if rank == 0:
        warnings.warn(f"tp_kernels: group {group} falls back to {choice.chosen} ({reason})", stacklevel=3)


def explain(group: Any = None) -> Choice:
    """Which path ``group`` uses and why each other one was not taken; ``print`` it.

    Args:
        group: as for ``resolve_group``; None is the default tensor-parallel group.
    """
    from tp_kernels.comm.process_group import resolve_group

    return resolve_group(group).choice


def _sharing_domain() -> str:
    parts = []
    for read in (_boot_id, _shm_identity, lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(str(read()))
        except OSError:
            parts.append("?")
    # Without these facts (not Linux) only the host's name is left.
    return "|".join(parts) if "?" not in parts else "|".join([socket.gethostname(), *parts])


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _shm_identity() -> int:
    return os.stat("/dev/shm").st_dev
