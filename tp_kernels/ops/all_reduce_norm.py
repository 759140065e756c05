"""Sum over the ranks, bias, residual and RMS norm: what follows a row-parallel projection.

    s = all_reduce(partial) + bias + residual
    return rms_norm(s, weight), s

Shapes: ``partial``, ``residual`` [..., H]; ``weight``, ``bias`` [H].

Numerics with ``round_before_norm`` (the default): the sum over ranks, the addition of the bias and that of the residual
each round to the dtype, as separate ops do; then comes ``ops.add_rms_norm``'s norm. So the fused kernel's sum has the
bits of ``group.all_reduce`` followed by ``ops.add_rms_norm``, on every communicator that adds in rank order. Without
it, everything between the operands and the two results is fp32, and each result is rounded once.

The fused kernel (csrc/kernels/peer_norm.cu; where the native core was built without CUDA its Triton twin,
ops/kernels/peer_norm.py) runs where the group's communicator offers it (``fused_norm``) and no gradient is needed. One
kernel takes the place of an all-reduce and a norm; from a few hundred rows on, every rank normalises only the rows that
it has reduced, while the separate norm would be repeated by all ranks over all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tp_kernels.comm import paths
from tp_kernels.comm.functional import reduce_from_tensor_parallel
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.symmetric_sizes import MAX_LAMPORT_ROW_PACKS, PACK_BYTES, norm_algorithm_for, row_packs
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops._library import PLAIN_TYPES, needs_grad, watched
from tp_kernels.ops.norm import add_rms_norm, add_rms_norm_reference
from tp_kernels.ops.tuning import Choice

__all__ = [
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_reference",
    "choose_all_reduce_add_rms_norm",
    "fused_norm_reason",
]


def all_reduce_add_rms_norm_reference(
    partials: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    round_before_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch ``all_reduce_add_rms_norm`` of all ranks' ``partials``, in one process."""
    dtype = partials[0].dtype
    total = torch.zeros_like(partials[0], dtype=torch.promote_types(dtype, torch.float32))
    for partial in partials:
        total += partial
    if round_before_norm:
        summed = total.to(dtype)
        if bias is not None:
            summed = summed + bias
        return add_rms_norm_reference(summed, residual, weight, eps)
    return _wide_norm(total, residual, weight, eps, bias)


def _wide_norm(
    total: Tensor, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What follows an fp32 sum over the ranks when nothing is rounded before the results."""
    if bias is not None:
        total = total + bias
    total = total + residual
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps) * weight
    return normed.to(torch.promote_types(residual.dtype, weight.dtype)), total.to(residual.dtype)


def fused_norm_reason(
    partial: Tensor, residual: Tensor, weight: Tensor, group: TPGroup, bias: Tensor | None = None
) -> str | None:
    """Why the fused kernel would not take these operands of ``all_reduce_add_rms_norm``; None if it would."""
    communicator = group.communicator
    if not getattr(communicator, "fused_norm", False):
        return f"the {group.backend} communicator does not offer it"
    if needs_grad(partial, residual, weight, bias):
        return "a gradient is needed"
    if watched():
        return "the call is being traced"
    if partial.device.type != group.device_type:
        return f"the operands are on {partial.device.type}"
    dtype = partial.dtype
    for tensor in (partial, residual, weight, bias):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TYPES:
            return f"an operand is a {type(tensor).__name__}"
        if tensor.dtype is not dtype:
            return "the dtypes differ"
        if tensor.device != partial.device:
            return "the operands are on different devices"
    if not communicator.fuses_norm(partial.shape[-1], dtype):
        return f"no kernel for rows of {partial.shape[-1]} elements of {dtype}"
    return None


def choose_all_reduce_add_rms_norm(
    partial: Tensor,
    residual: Tensor,
    weight: Tensor,
    group: Any = None,
    bias: Tensor | None = None,
) -> Choice:
    """What ``all_reduce_add_rms_norm`` does: "fused" with which algorithm, or "separate", and why. No collective."""
    group = resolve_group(group)
    _check(partial, residual, weight, bias)
    if group.world_size == 1:
        return Choice("separate", "one rank has nobody to talk to")
    reason = fused_norm_reason(partial, residual, weight, group, bias)
    if reason is not None:
        return Choice("separate", reason)
    width = partial.shape[-1]
    algorithm, why = _algorithm_of(group.communicator, partial.numel() // max(1, width), width, partial.dtype)
    return Choice("fused", f"{algorithm} by {why}", {"algorithm": algorithm})


def _algorithm_of(communicator: Any, rows: int, width: int, dtype: torch.dtype) -> tuple[str, str]:
    """(algorithm, by what) of the fused kernel."""
    if not hasattr(communicator, "path_for"):  # peer memory alone
        if "one_shot" not in communicator.algorithms:
            return "triton", "the native core, which was built without CUDA"
        return norm_algorithm_for(rows, width, dtype.itemsize, communicator.world_size), "its size"
    packs = row_packs(width, dtype.itemsize)
    nbytes = rows * packs * PACK_BYTES
    path = communicator.path_for("all_reduce_norm", nbytes, dtype)
    if path == paths.LAMPORT and packs > MAX_LAMPORT_ROW_PACKS:  # which ``path_for`` is not told
        others = [name for name in communicator.paths if name in (paths.ONE_SHOT, paths.TWO_SHOT, paths.TRITON)]
        numerics, name = communicator.numerics_class, str(dtype).removeprefix("torch.")
        size, table = communicator.world_size, communicator.table
        path = paths.route("all_reduce_norm", nbytes, size, numerics, others, table, dtype=name)
    return path.partition(":")[2], communicator.table.source


def all_reduce_add_rms_norm(
    partial: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    group: Any = None,
    bias: Tensor | None = None,
    round_before_norm: bool = True,
    *,
    gather_sum: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = all_reduce(partial) + bias + residual``; returns ``(rms_norm(s) * weight, s)``; differentiable.

    Args:
        partial: [..., H], this rank's part of the sum; may be overwritten when no gradient is needed.
        residual: [..., H], equal on all ranks.
        weight: [H].
        eps: added to the mean square.
        group: as for ``resolve_group``.
        bias: [H], added once.
        round_before_norm: round where separate ops would; False keeps fp32 from the sum to each result.
        gather_sum: False allows the sum to be valid only in the rows that the next call of the same shape reads on this
            rank. For a chain of calls whose last sum nobody needs.
        out: where the fused kernel puts the normed rows; others ignore it. See ``get_buffer`` of the communicator.

    Returns:
        Both [..., H] and equal on all ranks (but see ``gather_sum``).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if type(group) is not TPGroup:
        group = resolve_group(group)
    _check(partial, residual, weight, bias)
    if group.world_size > 1 and fused_norm_reason(partial, residual, weight, group, bias) is None:
        return group.communicator.all_reduce_add_rms_norm(
            partial.contiguous(),
            residual.contiguous(),
            weight.contiguous(),
            eps,
            bias=None if bias is None else bias.contiguous(),
            round_before_norm=round_before_norm,
            gather_sum=gather_sum,
            out=out,
        )
    if not round_before_norm:
        wide = partial.to(torch.promote_types(partial.dtype, torch.float32))
        return _wide_norm(reduce_from_tensor_parallel(wide, group), residual, weight, eps, bias)
    summed = reduce_from_tensor_parallel(partial, group, inplace=True)
    return add_rms_norm(summed if bias is None else summed + bias, residual, weight, eps)


def _check(partial: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if partial.dim() < 1 or weight.shape != partial.shape[-1:]:
        raise ValueError(
            f"expected a weight of partial's last dimension {list(partial.shape[-1:])}, got {list(weight.shape)}"
        )
    if residual.shape != partial.shape or residual.dtype != partial.dtype:
        raise ValueError(
            f"expected a residual {list(partial.shape)} {partial.dtype}, got {list(residual.shape)} {residual.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape or bias.dtype != partial.dtype):
        raise ValueError(f"expected a bias {list(weight.shape)} {partial.dtype}, got {list(bias.shape)} {bias.dtype}")
