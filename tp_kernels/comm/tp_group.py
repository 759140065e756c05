"""``TPGroup``: one group of ranks with its communicator, and how the ranks of one make it together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tp_kernels.comm import rendezvous
from tp_kernels.comm.communicator import Communicator, LocalCommunicator, Numerics
from tp_kernels.comm.policy import Choice, RankFacts, choose, report_fallback

__all__ = ["TPGroup", "create_group", "next_generation"]

# How often a communicator was made for a group of that name: stale keys of an earlier one must not be read. Counted per
# torch world, because the ranks of a new world may have different pasts.
_generations: dict[str, int] = {}
_generations_of: weakref.ref | None = None


class TPGroup:
    """One group of ranks and its communicator; what layers take as ``group=``.

    Attributes:
        rank, world_size: position in and size of the group.
        ranks: the members' ranks in the world, in group order.
        name: in every error.
        device_type: "cpu" or "cuda": where the group's tensors live.
        device: this rank's torch.device; with an index for "cuda". The current device is never changed here: pass it on
            (``device=group.device``), or call ``torch.cuda.set_device(group.device)``, as with torch.distributed.
        communicator: carries out the collectives; its methods are also reachable on the group.
        process_group: the torch ProcessGroup of the same ranks, None for world size 1 without torch.distributed.
        choice: which transport was chosen and why (see ``explain``).
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        ranks: Sequence[int] | None = None,
        device_type: str = "cpu",
        process_group: Any = None,
        choice: Choice | None = None,
        device: torch.device | None = None,
    ):
        self.communicator = communicator
        self.rank = communicator.rank
        self.world_size = communicator.world_size
        self.name = communicator.name
        self.ranks = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        if len(self.ranks) != self.world_size:
            raise ValueError(f"TPGroup: expected {self.world_size} ranks, got {list(self.ranks)}")
        self.device_type = device_type
        self.device = torch.device(device_type) if device is None else device
        self.process_group = process_group
        self.choice = choice or Choice(communicator.backend, "given by the caller")
        self._before_close: list[Callable[[], object]] = []
        # Bound once: a group is called dozens of times per token.
        self.all_reduce = communicator.all_reduce
        self.all_reduce_async = communicator.all_reduce_async
        self.reduce_scatter = communicator.reduce_scatter
        self.all_gather = communicator.all_gather
        self.broadcast = communicator.broadcast
        self.barrier = communicator.barrier

    @property
    def backend(self) -> str:
        """Short name of the (preferred) transport: "local", "shm", "gloo", "nccl", "symm"."""
        return self.communicator.backend

    @property
    def numerics(self) -> Numerics:
        """What the group's sums promise."""
        return self.communicator.numerics

    @property
    def timeout(self) -> float:
        """Default deadline of a collective, in seconds."""
        return self.communicator.timeout

    def before_close(self, callback: Callable[[], object]) -> None:
        """Call ``callback()`` once when the group is closed, before its communicator is; the latest one first.

        For what cannot outlive the communicator, such as CUDA graphs of its calls.
        """
        self._before_close.append(callback)

    def close(self) -> None:
        """Release the communicator; later calls fail. Safe to call twice."""
        try:
            while self._before_close:
                self._before_close.pop()()
        finally:
            self.communicator.close()

    def __repr__(self) -> str:
        where = f"rank {self.rank} of {self.world_size}"
        return f"TPGroup({self.name!r}, {where}, ranks={list(self.ranks)}, {self.backend}, {self.device_type})"

    def __deepcopy__(self, memo: dict) -> TPGroup:
        return self  # a copied module talks to the same ranks

    def __reduce__(self):
        raise TypeError(
            "a TPGroup cannot be pickled: it holds this process's connections. Save state_dict() instead of the "
            "module, or pass group= anew where the object is rebuilt"
        )


def create_group(
    ranks: list[int],
    world_rank: int,
    process_group: Any,
    *,
    name: str,
    store: Any,
    backend: str,
    timeout: float,
    strict: bool,
    device: torch.device,
    numerics: str | None = None,
    nccl_options: Mapping[str, Any] | None = None,
) -> TPGroup:
    """Choose transports together with the other ranks and build the group on them. A collective of ``ranks``."""
    rank = ranks.index(world_rank)
    # One rank alone asks nothing of its GPU.
    mine = RankFacts.here(device.type, backend, strict, numerics, device if len(ranks) > 1 else None)
    if len(ranks) == 1:
        communicator: Communicator = LocalCommunicator(name, timeout)
        choice = choose([mine])
    else:
        label = f"{name}/" + "-".join(map(str, ranks))
        store = dist.PrefixStore(f"{label}/{next_generation(label)}", store)
        everyone = rendezvous.exchange(
            store, rank, len(ranks), mine.to_dict(), timeout, group=name, what="create_group"
        )
        facts = [RankFacts.from_dict(theirs) for theirs in everyone]
        choice = choose(facts)
        if device.type == "cuda":
            from tp_kernels.comm.gpu_group import create_gpu_communicator, makers_of

            makers = makers_of(rank, len(ranks), name, store, process_group, device, timeout, nccl_options)
            communicator, choice = create_gpu_communicator(facts, rank, name, store, makers, timeout)
        else:
            communicator, choice = _create_communicator(
                choice, mine, rank, len(ranks), name, store, process_group, timeout
            )
    return TPGroup(
        communicator, ranks=ranks, device_type=device.type, process_group=process_group, choice=choice, device=device
    )


def _create_communicator(choice, facts, rank, world_size, name, store, process_group, timeout):
    report_fallback(choice, facts, name, rank)
    if choice.chosen == "shm":
        from tp_kernels.comm.shm import SharedMemoryCommunicator, SharedMemoryUnavailable

        try:
            shm_store = dist.PrefixStore("shm", store)
            return SharedMemoryCommunicator.create(rank, world_size, name, shm_store, timeout=timeout), choice
        except SharedMemoryUnavailable as error:  # raised on all ranks alike
            choice = choice.without_shm(str(error))
            report_fallback(choice, facts, name, rank)
    from tp_kernels.comm.gloo import GlooCommunicator

    gloo_store = dist.PrefixStore("gloo", store)
    return GlooCommunicator(process_group, name=name, store=gloo_store, timeout=timeout), choice


def next_generation(label: str) -> int:
    global _generations_of
    world = dist.group.WORLD
    if _generations_of is None or _generations_of() is not world:
        _generations.clear()
        _generations_of = weakref.ref(world)
    generation = _generations.get(label, 0)
    _generations[label] = generation + 1
    return generation
