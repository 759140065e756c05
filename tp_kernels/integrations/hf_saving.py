"""Saving a patched model: rank 0 writes the checkpoint that the unpatched model would have written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tp_kernels.checkpoint.agreement import agree
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.layers.base import TensorShard, _gather, iter_tensor_shards

__all__ = ["gathered_state", "save_on_first_rank"]

# Rank 0 may write for a long time; the others wait this many seconds for it.
_WRITE_TIMEOUT = 3600.0


def gathered_state(
    model: nn.Module, group: TPGroup, given: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The unsharded state dict, on the CPU of rank 0; the other ranks get an empty one. Collective.

    Tensor by tensor: no rank but 0 ever holds more than one whole tensor.

    Args:
        model: the patched model.
        group: its ranks.
        given: a state dict of this rank's slices to take the tensors from, with the same names on every rank. What the
            model does not know in it is taken as whole.
    """
    state: dict[str, torch.Tensor] = {}
    seen: dict[Any, torch.Tensor | None] = {}
    known = set()
    for shard in iter_tensor_shards(model, remove_duplicate=False):
        known.add(shard.name)
        if given is not None:
            tensor = given.get(shard.name)
            if tensor is None:
                continue
            if tensor.shape == shard.target.shape:
                shard = dataclasses.replace(shard, target=tensor)
            elif tuple(tensor.shape) == shard.full_shape:
                if group.rank == 0:
                    state[shard.name] = tensor
                continue
            else:
                raise ValueError(
                    f"{shard.name}: expected this rank's slice {list(shard.target.shape)} or the whole tensor "
                    f"{list(shard.full_shape)}, got {list(tensor.shape)}"
                )
        identity = _identity(shard)
        if identity not in seen:
            whole = _gather(shard, group)
            seen[identity] = whole.cpu() if group.rank == 0 else None
        if group.rank == 0:
            state[shard.name] = seen[identity]
    if group.rank == 0 and given is not None:
        state |= {name: tensor for name, tensor in given.items() if name not in known}
    return state


def _identity(shard: TensorShard) -> Any:
    """The same for all names of a tied weight, and for nothing else."""
    local = shard.target.to_local() if hasattr(shard.target, "to_local") else shard.target  # FSDP2's DTensor
    return (local.data_ptr(), shard.full_shape) if local.data_ptr() else shard.name


def save_on_first_rank(
    model: nn.Module,
    group: TPGroup,
    write: Callable[[dict[str, torch.Tensor]], None],
    given: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """``write(gathered_state)`` on rank 0; returns on every rank when it is done, or raises on every rank.

    Raises:
        CheckpointError: writing failed.
    """
    error, state = None, {}
    try:
        state = gathered_state(model, group, given)
        if group.rank == 0:
            write(state)
    except Exception as caught:
        error = caught
    agree(group, error, timeout=max(_WRITE_TIMEOUT, group.timeout))
