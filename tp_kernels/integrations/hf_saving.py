"""Saving a patched model: rank 0 writes the checkpoint that the unpatched model would have written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tp_kernels.checkpoint.agreement import agree
from tp_kernels.checkpoint.errors import CheckpointError
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.layers.base import TensorShard, gather_shard, iter_tensor_shards

__all__ = ["save_on_first_rank"]

# Rank 0 may write for a long time; the others wait this many seconds for it.
_WRITE_TIMEOUT = 3600.0


def save_on_first_rank(
    model: nn.Module,
    group: TPGroup,
    write: Callable[[dict[str, torch.Tensor]], None],
    given: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """``write(the unsharded state dict)`` on rank 0; returns on every rank when it is done, or raises on every rank.

    Tensor by tensor: no rank but 0 ever holds more than one whole tensor, and rank 0 holds them on the CPU.

    Args:
        model: the patched model.
        group: its ranks.
        write: called on rank 0 alone.
        given: a state dict to take the tensors from: this rank's slices, or whole tensors, which are rank 0's then.
            What the model does not know in it is taken as whole.

    Raises:
        CheckpointError: writing failed, or ranks were given different names or shapes.
    """
    shards, whole, error, state = [], {}, None, {}
    try:
        shards, whole = _sources(model, given)
    except ValueError as caught:
        error = caught
    # First, because from here on every rank has to make the same calls.
    agree(group, error)
    try:
        agree(group, None, same=repr([shard.name for shard in shards]))
    except CheckpointError as different:
        ranks = list(different.ranks)
        raise CheckpointError(f"ranks {ranks} were given a state_dict of other tensors than rank 0") from None
    try:
        state = _gathered(model, shards, group)
        if group.rank == 0:
            write(state | whole)
    except Exception as caught:
        error = caught
    agree(group, error, timeout=max(_WRITE_TIMEOUT, group.timeout))


def _sources(
    model: nn.Module, given: Mapping[str, torch.Tensor] | None
) -> tuple[list[TensorShard], dict[str, torch.Tensor]]:
    """(what has to be gathered, what is whole already)."""
    shards = list(iter_tensor_shards(model, remove_duplicate=False))
    if given is None:
        return shards, {}
    whole, sliced = dict(given), []
    for shard in shards:
        tensor = given.get(shard.name)
        if tensor is None:
            continue
        if tensor.shape == shard.target.shape:
            sliced.append(dataclasses.replace(shard, target=whole.pop(shard.name)))
        elif tuple(tensor.shape) != shard.full_shape:
            raise ValueError(
                f"{shard.name}: expected this rank's slice {list(shard.target.shape)} or the whole tensor "
                f"{list(shard.full_shape)}, got {list(tensor.shape)}"
            )
    return sliced, whole


def _gathered(model: nn.Module, shards: list[TensorShard], group: TPGroup) -> dict[str, torch.Tensor]:
    """The whole tensors on rank 0, tied ones as one; nothing on the others. Collective."""
    # By the parameter, not by its memory: a rank whose part under FSDP2 is empty has none.
    known = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    state: dict[str, torch.Tensor] = {}
    seen: dict[Any, torch.Tensor | None] = {}
    for shard in shards:
        identity = known.get(shard.name, shard.name)
        if identity not in seen:
            tensor = gather_shard(shard, group)
            seen[identity] = tensor.cpu() if group.rank == 0 else None
        if group.rank == 0:
            state[shard.name] = seen[identity]
    return state
