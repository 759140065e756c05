"""How a model written by hand in plain PyTorch adds over its ranks: what torch itself offers, with nothing of ours.

- ``PeerSums``: ``torch.ops.symm_mem`` on memory that all ranks can reach. Projections write their partial sums straight
  into it; up to 128 KB every rank then adds all of them (one-shot), above that each adds a part and the parts are
  gathered (two-shot). Both have a barrier of the ranks in front and behind, so that the memory can be written again.
- ``ProcessGroupSums``: ``torch.distributed.all_reduce`` of a process group: NCCL's on GPUs, Gloo's on a CPU.

Both may be captured in a CUDA graph on a GPU.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PeerSums", "ProcessGroupSums", "Sums"]

# Where torch.compile changes over, too; with four ranks on one H100 the kernels took 9.3 and 10.1 us there.
ONE_SHOT_BYTES = 128 << 10


class Sums(Protocol):
    """Sums over ranks that make the same calls.

    Attributes:
        rank, world_size: which rank of how many this is.
    """

    rank: int
    world_size: int

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum of all ranks' ``F.linear(x, weight)``; may be gone with the next sum."""
        ...

    def add(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, contiguous; ``x`` itself may become it."""
        ...


class ProcessGroupSums:
    """Sums by ``torch.distributed.all_reduce``.

    Args:
        process_group: whose backend can add where the tensors are.
    """

    def __init__(self, process_group: Any):
        import torch.distributed as dist

        self._group, self._all_reduce = process_group, dist.all_reduce
        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.add(F.linear(x, weight))

    def add(self, x: Tensor) -> Tensor:
        self._all_reduce(x, group=self._group)
        return x


class PeerSums:
    """Sums by ``torch.ops.symm_mem`` over memory of torch's SymmetricMemory. Making one is a collective.

    Args:
        process_group: of the ranks; any backend.
        dtype: of the model's activations, one that these ops add: ``DTYPES``.
        elements: most of a sum of activations.
        offers: most of an fp32 sum of numbers beside these.
        device: of this rank.

    Raises:
        ValueError: another dtype.
    """

    DTYPES = (torch.bfloat16, torch.float32)

    def __init__(self, process_group: Any, dtype: torch.dtype, elements: int, offers: int, device: torch.device | str):
        if dtype not in self.DTYPES:
            raise ValueError(f"torch.ops.symm_mem adds {' and '.join(map(str, self.DTYPES))}, not {dtype}")
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symm_mem

        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self._name = process_group.group_name
        self._memory: dict[torch.dtype, Tensor] = {}
        sizes = {dtype: elements}
        sizes[torch.float32] = max(offers, sizes.get(torch.float32, 0))
        for kind, size in sizes.items():
            self._memory[kind] = symm_mem.empty(size, dtype=kind, device=device)
            symm_mem.rendezvous(self._memory[kind], self._name)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = (*x.shape[:-1], weight.shape[0])
        shared = self._shared(shape, x.dtype)
        torch.mm(x.flatten(0, -2), weight.t(), out=shared.view(-1, weight.shape[0]))
        return self._summed(shared)

    def add(self, x: Tensor) -> Tensor:
        shared = self._shared(x.shape, x.dtype)
        shared.copy_(x)
        summed = self._summed(shared)
        return x.copy_(summed) if summed is shared else summed

    def _shared(self, shape: Any, dtype: torch.dtype) -> Tensor:
        memory, count = self._memory[dtype], torch.Size(shape).numel()
        if count > memory.numel():
            raise ValueError(f"expected sums of at most {memory.numel()} elements of {dtype}, got {list(shape)}")
        return memory[:count].view(shape)

    def _summed(self, shared: Tensor) -> Tensor:
        if shared.nbytes <= ONE_SHOT_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self._name)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._name)
        return shared
