"""A group over NCCL beside one that exists, for tests and benchmarks that need one with settings of its own."""

from __future__ import annotations

from typing import Any

from tp_kernels import one_gpu
from tp_kernels.comm.tp_group import TPGroup, next_generation

__all__ = ["nccl_group"]


def nccl_group(group: TPGroup, **options: Any) -> TPGroup:
    """The same ranks over a new ``NCCLCommunicator``; a collective of ``group``, which must hold all ranks.

    Args:
        group: of ranks with a GPU, or a share of one.
        options: of ``NCCLCommunicator.create``, for example ``max_ctas=8``.
    """
    import torch.distributed as dist

    from tp_kernels.comm.nccl import NCCLCommunicator

    name = f"{group.name}-nccl"
    store = dist.PrefixStore(f"{name}/{next_generation(name)}", dist.distributed_c10d._get_default_store())
    device = one_gpu.local_device()
    communicator = NCCLCommunicator.create(group.rank, group.world_size, name, store, device, **options)
    return TPGroup(communicator, ranks=group.ranks, device_type="cuda", process_group=group.process_group)
