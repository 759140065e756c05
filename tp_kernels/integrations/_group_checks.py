"""Whether a group can carry the tensors of a model: asked when the model is patched, not by its first forward."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from tp_kernels.comm.tp_group import TPGroup

__all__ = ["check_carries", "check_model_device"]


def check_carries(group: TPGroup, device: torch.device | str, what: str = "the model") -> None:
    """ValueError if tensors on ``device`` cannot go over the group.

    Shared memory carries CPU tensors only. Gloo copies those of a GPU through host memory, and a group for GPUs has it
    for tensors on the CPU; tensors on the meta device go nowhere.

    Args:
        device: where the tensors are, or will be.
        what: is there, for the message.
    """
    device = torch.device(device)
    if group.world_size == 1 or device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise ValueError(f"{what} is on {device}: expected the CPU or a CUDA device, which groups carry tensors of")
    if group.device_type == "cuda" or group.backend == "gloo":
        return
    raise ValueError(
        f"{what} is on {device}, and group {group.name!r} of {group.world_size} ranks ({group.backend}) carries CPU "
        'tensors only: make groups for GPUs with tp_kernels.init(device="cuda"), or leave the model on the CPU'
    )


def check_model_device(model: nn.Module, group: TPGroup) -> None:
    """``check_carries`` of all parameters and buffers of a model."""
    for tensor in chain(model.parameters(), model.buffers()):
        check_carries(group, tensor.device)
