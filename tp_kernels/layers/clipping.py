"""``clip_grad_norm_`` for models whose parameters are slices: one norm for all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tp_kernels.comm.process_group import resolve_group
from tp_kernels.layers.base import TensorParallelLayer, TensorShard, own_shards

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    group: Any = None,
) -> torch.Tensor:
    """Scale the gradients down to a norm of ``max_norm``, as the unsharded model's would be. A collective call.

    ``torch.nn.utils.clip_grad_norm_`` sees this rank's slices: every rank would scale by another factor, and the
    parameters that all ranks hold would drift apart.

    Args:
        model: the same on all ranks, parallel layers anywhere inside; FSDP2 or DDP on another axis of the mesh or not.
        max_norm: the largest norm that is left alone.
        norm_type: p of the p-norm over all gradients together; may be infinite.
        error_if_nonfinite: raise RuntimeError, on every rank, if the norm is not finite; nothing is scaled then.
        group: the ranks that share the model; None is the group of its parallel layers.

    Returns:
        The norm before, fp32, a scalar equal on all ranks.

    Raises:
        ValueError: ``norm_type`` is not positive.
    """
    norm_type = float(norm_type)
    if not norm_type > 0.0:
        raise ValueError(f"norm_type must be positive, got {norm_type}")
    layers = (module for module in model.modules() if isinstance(module, TensorParallelLayer))
    group = resolve_group(group) if group is not None else next((layer.group for layer in layers), resolve_group(None))
    norms, seen = [torch.zeros((), device=group.device)], set()
    for path, module in model.named_modules():
        for parameter, shards in own_shards(module, path, "gradients"):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                norms += [_norm(shard, norm_type, group.rank).to(group.device) for shard in shards]
    norm = torch.linalg.vector_norm(torch.stack(norms), norm_type).view(1)
    if math.isinf(norm_type):
        total = group.all_reduce(norm, "max")[0]
    else:
        total = group.all_reduce(norm**norm_type)[0] ** (1.0 / norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the gradients' norm of order {norm_type} is {float(total)}: expected a finite one")
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


def _norm(shard: TensorShard, norm_type: float, rank: int) -> torch.Tensor:
    """Norm of what no lower rank holds of a gradient, in fp32."""
    part, dim, first = shard.target, shard.dim, 0
    if dim is not None:
        first = max([0, *(held.stop - shard.start for held in shard.ranges[:rank])])
    if rank > 0 if dim is None else first >= part.shape[dim]:
        return torch.zeros((), device=part.device)
    if first > 0:
        part = part.full_tensor() if hasattr(part, "full_tensor") else part  # FSDP2's DTensor
        part = part.narrow(dim, first, part.shape[dim] - first)
    norm = torch.linalg.vector_norm(part, norm_type, dtype=torch.float32)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
