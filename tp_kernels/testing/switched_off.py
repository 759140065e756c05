"""A group of several ranks whose communication does nothing: the bound for every way to communicate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tp_kernels.comm.communicator import LocalCommunicator, check_dim, gathered_sizes, resolve_sizes
from tp_kernels.comm.tp_group import TPGroup

__all__ = ["switched_off"]


class _SwitchedOff(LocalCommunicator):
    """Everyone's part passes for the whole: sums are this rank's own, gathered tensors hold its part alone."""

    def __init__(self, rank: int, world_size: int):
        super().__init__("off")
        self.rank, self.world_size, self.backend = rank, world_size, "off"

    def all_reduce(self, x, op="sum", *, out=None, timeout=None):
        return super().all_reduce(x, op, out=x if out is None else out)  # not even a copy

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        dim = check_dim(x, dim, "reduce_scatter")
        sizes = resolve_sizes(x.shape[dim], sizes, self.world_size, "reduce_scatter")
        return x.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank]).clone()

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        dim = check_dim(x, dim, "all_gather")
        sizes = gathered_sizes(x.shape[dim], sizes, self.rank, self.world_size)
        if len(set(sizes)) == 1:
            return torch.cat([x] * self.world_size, dim=dim)
        whole = x.new_zeros((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]))
        whole.narrow(dim, sum(sizes[: self.rank]), x.shape[dim]).copy_(x)
        return whole


def switched_off(
    rank: int,
    world_size: int,
    *,
    device_type: str = "cpu",
    ranks: Sequence[int] | None = None,
    process_group: Any = None,
    device: torch.device | None = None,
) -> TPGroup:
    """A ``TPGroup`` in which everyone's partial sum passes for the sum; results mean nothing.

    Args:
        rank, world_size: which rank of how many to pretend to be; the others need not exist.
        device_type, ranks, process_group, device: as for ``TPGroup``.
    """
    communicator = _SwitchedOff(rank, world_size)
    return TPGroup(communicator, ranks=ranks, device_type=device_type, process_group=process_group, device=device)
