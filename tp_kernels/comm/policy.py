"""Which communicator a group gets, and why: a pure function of values that all its ranks share.

Every rank contributes ``RankFacts``; all ranks see the same list and so choose the same path without talking further.
``explain(group)`` shows the choice and the reason for each path not taken. A path that was better on paper but could
not be used is a fallback: one warning by the group's first rank, or an error under ``strict=True``.

A group of GPUs keeps more than one transport, in order of preference: peer memory ("symm"), NCCL, Gloo. Which of them
carries a call is for ``paths`` to say; here is decided which ones are made.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from typing import Any

from tp_kernels._native import build_info, native
from tp_kernels.comm.errors import CommError
from tp_kernels.comm.gpu_facts import GpuFacts
from tp_kernels.comm.paths import LAMPORT, ONE_SHOT, SYMM, TRITON, TWO_SHOT
from tp_kernels.comm.peer_verdicts import PASSED
from tp_kernels.comm.processes import sharing_domain
from tp_kernels.comm.symmetric_sizes import MAX_WORLD

__all__ = ["BACKENDS", "BackendUnavailableError", "Choice", "RankFacts", "Rejection", "choose", "explain"]

BACKENDS = ("auto", "shm", "gloo", "nccl", "symm")


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
        numerics: what was asked for: None, "ordered" or "any", see ``paths``.
        gpu: of a rank whose tensors are on one; None when nobody will ask, or when they could not be found out.
        gpu_problem: why not.
    """

    host: str
    domain: str
    device_type: str
    backend: str
    strict: bool
    numerics: str | None = None
    gpu: GpuFacts | None = None
    gpu_problem: str = ""

    @classmethod
    def here(
        cls, device_type: str, backend: str, strict: bool, numerics: str | None = None, device: Any = None
    ) -> RankFacts:
        """Facts of the calling process; ``device`` is its torch.device with an index, for "cuda"."""
        gpu, problem = None, ""
        if device_type == "cuda" and device is not None and backend != "gloo":
            try:
                gpu = GpuFacts.here(device)
            except Exception as error:  # the other ranks wait for these facts, and a broken driver is one
                problem = f"{type(error).__name__}: {error}"
        host, domain = socket.gethostname(), sharing_domain()
        return cls(host, domain, device_type, backend, bool(strict), numerics, gpu, problem)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> RankFacts:
        """From what JSON made of ``to_dict``."""
        gpu = facts.get("gpu")
        return cls(**{**facts, "gpu": None if gpu is None else GpuFacts.from_dict(gpu)})

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
        chosen: "local", "shm", "gloo", "nccl" or "symm".
        reason: why, in a few words.
        rejected: the other paths, in order of preference.
        also: transports that the group has besides, with what for.
        numerics: of the group's floating-point sums: "ordered", "nccl" or "any".
        details: further lines: paths by size, and what really ran (see ``explain``).
    """

    chosen: str
    reason: str
    rejected: tuple[Rejection, ...] = ()
    also: tuple[tuple[str, str], ...] = ()
    numerics: str = "ordered"
    details: tuple[str, ...] = field(default=(), compare=False)

    @property
    def members(self) -> tuple[str, ...]:
        """The transports to make, in order of preference."""
        return (self.chosen, *(path for path, _ in self.also))

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
        lines += [f"{path}: kept beside it ({reason})" for path, reason in self.also]
        lines += [f"{r.path}: not taken ({r.reason})" for r in self.rejected]
        return "\n".join([*lines, *self.details])


def choose(facts: Sequence[RankFacts], failed: Mapping[str, str] | None = None) -> Choice:
    """The path for a group whose ranks gave ``facts`` in rank order.

    Args:
        facts: of all ranks.
        failed: transports of a group of GPUs that could not be made after all, with the reason.
    Raises:
        ValueError: the ranks asked for different things (the message lists who asked for what), or for what excludes
            itself.
    """
    _check_agreement(facts)
    first = facts[0]
    if len(facts) == 1:
        reason = "one rank has nobody to talk to"
        return Choice("local", "one rank", (Rejection("shm", reason), Rejection("gloo", reason)))
    if first.device_type == "cuda":
        return _choose_on_gpus(facts, failed or {})
    choice = _choose_on_cpu(facts)
    if first.backend in ("nccl", "symm"):
        impossible = Rejection(first.backend, "it holds CUDA tensors only, and the group's are on the CPU", True)
        choice = replace(choice, rejected=(impossible, *choice.rejected))
    return choice


def _choose_on_cpu(facts: Sequence[RankFacts]) -> Choice:
    first = facts[0]
    if first.backend == "gloo":
        return Choice("gloo", "requested", (Rejection("shm", "backend='gloo' was requested"),))
    obstacle = _places_apart(facts, asked=first.backend == "shm")
    if obstacle is None:
        reason = "requested" if first.backend == "shm" else "all ranks share this host's memory"
        return Choice("shm", reason, (Rejection("gloo", "slower on one host"),))
    return Choice("gloo", "works anywhere", (Rejection("shm", *obstacle),))


def _choose_on_gpus(facts: Sequence[RankFacts], failed: Mapping[str, str]) -> Choice:
    asked, numerics = facts[0].backend, facts[0].numerics
    if asked == "nccl" and numerics == "ordered":
        raise ValueError(
            "backend='nccl' sums in the library's own order: numerics='ordered' cannot be had with it; use "
            "backend='auto', or numerics=None"
        )
    obstacles: dict[str, tuple[str, bool] | None] = {}
    for path, find in (("symm", _obstacle_to_symm), ("nccl", _obstacle_to_nccl)):
        if asked not in ("auto", "shm", path):
            obstacles[path] = (f"backend={asked!r} was requested", False)
        elif path in failed:
            obstacles[path] = (failed[path], True)
        else:
            obstacle = find(facts)
            obstacles[path] = (obstacle[0], obstacle[1] or asked == path) if obstacle else None
    host_only = "it holds CPU tensors only; Gloo copies GPU tensors through host memory"
    last = [Rejection("shm", host_only, asked == "shm")]
    symm, nccl = obstacles["symm"], obstacles["nccl"]
    # A torch group of the user's may be for GPUs only; then the others do without Gloo.
    gloo = [("gloo", "for tensors on the CPU, and what nothing else takes")] if "gloo" not in failed else []
    if not gloo:
        last.insert(0, Rejection("gloo", failed["gloo"]))
    if symm is None:
        also, rejected = [*gloo], [*last]
        if nccl is None:
            use = "sums and data" if numerics == "any" else "data without sums of floats"
            also.insert(0, ("nccl", f"for {use}, where it is faster"))
        else:
            # Peer memory does all that NCCL would do; only one that breaks while it is made is worth a word.
            rejected.insert(0, Rejection("nccl", nccl[0], "nccl" in failed))
        reason = "requested" if asked == "symm" else _why_symm(facts)
        return Choice("symm", reason, tuple(rejected), tuple(also), numerics or "ordered")
    if nccl is None and numerics != "ordered":
        reason = "requested" if asked == "nccl" else "a GPU for every rank's kernels, and a library that all have"
        return Choice("nccl", reason, (Rejection("symm", *symm), *last), tuple(gloo), numerics or "nccl")
    rejected = [Rejection("symm", *symm)]
    if nccl is None:
        rejected.append(Rejection("nccl", "it sums in its own order, and numerics='ordered' was asked for", True))
        also = (("nccl", "for data without sums of floats"),)
        return Choice("gloo", "sums in rank order on any machine", (*rejected, *last), also)
    loud = asked != "gloo"  # through host memory: always worth a word
    reason = "works anywhere" if loud else "requested"
    return Choice("gloo", reason, (*rejected, Rejection("nccl", nccl[0], loud and asked in ("auto", "nccl")), *last))


def _why_symm(facts: Sequence[RankFacts]) -> str:
    gpus = [fact.gpu for fact in facts]
    shared = len({gpu.uuid for gpu in gpus}) < len(gpus)
    where = "ranks share a GPU" if shared else "every rank's GPU can map every other's memory"
    if all(a.verdicts.get(b.identity) == PASSED for a, b in permutations(gpus, 2)):
        return f"{where}; `tp-kernels doctor` has checked it with kernels"
    return f"{where}; not checked with kernels on this machine, `tp-kernels doctor` does it"


def _obstacle_to_symm(facts: Sequence[RankFacts]) -> tuple[str, bool] | None:
    """(reason, whether the user should hear of it); None if peer memory can be tried."""
    unknown = _unknown_gpu(facts)
    if unknown:
        return unknown, True
    apart = _places_apart(facts)
    if apart:
        return apart
    if len(facts) > MAX_WORLD:
        return f"its kernels take up to {MAX_WORLD} ranks", False
    gpus = [fact.gpu for fact in facts]
    for rank, gpu in enumerate(gpus):
        if gpu.symm_problem:
            return f"rank {rank}: {gpu.symm_problem}", True
        if gpu.symm_unwanted:
            return f"rank {rank}: {gpu.symm_unwanted}", False
    for ranks in _ranks_by_gpu(gpus):
        if len(ranks) > 1 and any(gpus[rank].shared_by == 1 for rank in ranks):
            return f"ranks {ranks} share a GPU by accident; `tp-kernels launch --one-gpu` does it by design", True
    pairs = list(permutations(range(len(gpus)), 2))
    unseen = [(a, b) for a, b in pairs if gpus[b].uuid not in gpus[a].sees]
    if unseen:
        return f"{_pairs(unseen)}: not visible to each other's process (CUDA_VISIBLE_DEVICES)", True
    unreached = [(a, b) for a, b in pairs if gpus[b].uuid not in gpus[a].reaches]
    if unreached:
        return f"{_pairs(unreached)}: the GPUs have no peer access to each other", False
    for a, b in pairs:
        verdict = gpus[a].verdicts.get(gpus[b].identity, PASSED)
        if verdict != PASSED:
            return f"the check by `tp-kernels doctor` failed from rank {a}'s GPU to rank {b}'s: {verdict}", True
    return None


def _obstacle_to_nccl(facts: Sequence[RankFacts]) -> tuple[str, bool] | None:
    """(reason, whether the user should hear of it); None if NCCL can be tried."""
    unknown = _unknown_gpu(facts)
    if unknown:
        return unknown, True
    gpus = [fact.gpu for fact in facts]
    for rank, gpu in enumerate(gpus):
        if gpu.nccl_problem:
            return f"rank {rank}: {gpu.nccl_problem}", True
    versions = [gpu.nccl_version for gpu in gpus]
    if len({version // 100 for version in versions}) > 1:  # patch releases understand each other
        texts = map(native.nccl_version_text, versions)
        listing = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
        return f"the ranks have different versions of it ({listing})", True
    for ranks in _ranks_by_gpu(gpus):
        names = {gpus[rank].nccl_host for rank in ranks}
        if len(ranks) > 1 and len(names) < len(ranks) and not all(gpus[rank].nccl_shares_gpu for rank in ranks):
            return f"ranks {ranks} share a GPU, which it refuses; see `tp-kernels launch --one-gpu`", True
    return None


def _unknown_gpu(facts: Sequence[RankFacts]) -> str:
    for rank, fact in enumerate(facts):
        if fact.gpu is None:
            why = f" ({fact.gpu_problem})" if fact.gpu_problem else ""
            return f"nothing is known about the GPU of rank {rank}{why}"
    return ""


def _ranks_by_gpu(gpus: Sequence[GpuFacts]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for rank, gpu in enumerate(gpus):
        found.setdefault(gpu.uuid, []).append(rank)
    return list(found.values())


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{a}->{b}" for a, b in pairs[:6])
    return f"ranks {shown}" + (f" and {len(pairs) - 6} more" if len(pairs) > 6 else "")


def _places_apart(facts: Sequence[RankFacts], asked: bool = False) -> tuple[str, bool] | None:
    """(reason, whether the user should hear of it) why ranks cannot share memory; None if it can be tried."""
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
    for name in ("backend", "device_type", "strict", "numerics"):
        values = [getattr(fact, name) for fact in facts]
        if len(set(values)) > 1:
            listing = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            raise ValueError(f"all ranks of a group must agree on {name}, got {listing}")


def forbid_fallback(choice: Choice, facts: RankFacts, group: str) -> None:
    """Raise if ``choice`` holds a fallback and that is not allowed."""
    reason = choice.fallback_reason
    if reason is None:
        return
    if facts.strict or facts.backend not in ("auto", "gloo"):
        cause = "strict=True forbids the fallback" if facts.strict else f"backend={facts.backend!r} was requested"
        raise BackendUnavailableError(f"group {group}: {reason}; {cause} to {choice.chosen}", group=group)


def report_fallback(choice: Choice, facts: RankFacts, group: str, rank: int) -> None:
    """Raise if the fallback in ``choice`` is not allowed, else warn once per group (on its first rank)."""
    forbid_fallback(choice, facts, group)
    reason = choice.fallback_reason
    if reason is not None and rank == 0:
        warnings.warn(f"tp_kernels: group {group} falls back to {choice.chosen} ({reason})", stacklevel=3)


def explain(group: Any = None) -> Choice:
    """Which path ``group`` uses and why each other one was not taken; ``print`` it.

    For a group of GPUs: also which path carries which operation at which sizes and from which table, which kernels are
    not there and why, and how many calls each path has carried. What one call of an op would do is for
    ``ops.explain`` to say.

    Args:
        group: as for ``resolve_group``; None is the default tensor-parallel group.
    """
    from tp_kernels.comm.process_group import resolve_group

    group = resolve_group(group)
    return replace(group.choice, details=tuple(_details(group.communicator)))


def _details(communicator: Any) -> Iterator[str]:
    describe = getattr(communicator, "describe", None)
    if describe is None and communicator.world_size == 1:
        return
    if not getattr(communicator, "fused_norm", False):
        yield "all_reduce_add_rms_norm: an all-reduce, then the norm (the kernel for both needs peer memory)"
    if describe is None:
        yield f"every call goes by {communicator.backend}, the group's only path"
    else:
        yield from _missing_kernels(getattr(communicator, "paths", ()))
        yield from describe()  # what has run comes last


def _missing_kernels(found: Sequence[str]) -> Iterator[str]:
    """Why kernels over peer memory are not among the paths of a group that has it."""
    if not any(path.startswith(f"{SYMM}:") for path in found):
        return
    if TWO_SHOT not in found:
        kernels = ", ".join((ONE_SHOT, TWO_SHOT, LAMPORT))
        built = build_info()["cuda"]
        yield f"{kernels}: not there (a rank's native core was built without CUDA; here: {built}): {TRITON} instead"
    if TRITON not in found:
        yield f"{TRITON}: not there (Triton is not installed on all ranks)"
