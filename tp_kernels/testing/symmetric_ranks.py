"""A ``SymmetricMemoryCommunicator`` of a group's ranks, whatever the group itself uses: for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tp_kernels.comm.symmetric import SymmetricMemoryCommunicator
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.one_gpu import local_device

__all__ = ["make_symmetric", "symmetric_group"]


def make_symmetric(group: TPGroup, tag: str, **options: Any) -> SymmetricMemoryCommunicator:
    """A communicator of ``group``'s ranks; a collective.

    Args:
        group: needs a torch process group.
        tag: never used before in this job, the same on all ranks.
        options: of ``SymmetricMemoryCommunicator.create``.
    """
    device = local_device()
    torch.cuda.set_device(device)
    store = dist.PrefixStore(f"symmetric/{group.name}/{tag}", dist.distributed_c10d._get_default_store())
    return SymmetricMemoryCommunicator.create(
        group.rank, group.world_size, tag, store, group.process_group, device, **options
    )


def symmetric_group(communicator: Any, group: TPGroup) -> TPGroup:
    """A ``TPGroup`` for layers, over ``communicator``."""
    return TPGroup(communicator, ranks=group.ranks, process_group=group.process_group, device_type="cuda")
