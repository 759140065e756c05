"""Cross entropy over logits spread over the ranks by vocabulary, without gathering them (Megatron-LM's method)."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tp_kernels import ops
from tp_kernels.checkpoint.sharding import shard_vocab_sizes
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops.cross_entropy import check_operands, check_targets, reduce_loss

__all__ = ["vocab_parallel_cross_entropy"]


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Loss of every row from this rank's words and two small all-reduces."""

    @staticmethod
    def forward(ctx, logits, targets, group, vocab_start, vocab_size, ignore_index, inplace):
        maximum, total, target = ops.cross_entropy_stats(logits, targets, vocab_start, ignore_index, vocab_size)
        if group.world_size > 1:
            largest = group.all_reduce(maximum, "max")
            # A shard of nothing but -inf has maximum -inf and total 0, and contributes 0.
            both = torch.stack((total * (maximum - largest).exp(), target))
            total, target = group.all_reduce(both, "sum", out=both)
            maximum = largest
        ctx.save_for_backward(logits, targets, maximum, total)
        ctx.vocab_start, ctx.ignore_index, ctx.inplace = vocab_start, ignore_index, inplace
        return (total.log() + (maximum - target)).masked_fill_(targets == ignore_index, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out = ops.cross_entropy_backward(
            *ctx.saved_tensors, grad, ctx.vocab_start, ctx.ignore_index, inplace=ctx.inplace
        )
        return out, None, None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_local: torch.Tensor,
    targets: torch.Tensor,
    group: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """``cross_entropy`` of logits that ``ParallelLMHead(..., gather_output=False)`` left spread over the ranks.

    The ranks exchange three numbers a row (two all-reduces), not the logits. The loss is the same on all ranks, as is
    the gradient that must arrive at it; each rank gets the gradient of its own words.

    Args:
        logits_local: [..., V_local], this rank's words, cut as ``ParallelLMHead`` cuts them.
        targets: [...] int64 or int32 words of the whole vocabulary, the same on all ranks; or ``ignore_index``.
        group: as for ``resolve_group``; None is the default group, or one rank.
        ignore_index: rows with this target have loss 0 and gradient 0.
        reduction: "mean" (over the rows that are not ignored; NaN if there are none), "sum" or "none".
        vocab_size: of the whole vocabulary (``head.num_embeddings``). None asks the other ranks, every time: one more
            small collective, and on a GPU the host waits for it.
        inplace_backward: let the backward overwrite ``logits_local`` with its gradient.

    Returns:
        fp32 (fp64 for fp64 logits): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes, dtypes or a shard size that do not fit; on the CPU, targets that are no words. On a GPU such
            targets make the loss NaN.
    """
    group = resolve_group(group)
    check_operands(logits_local, targets, reduction)
    sizes = _shard_sizes(logits_local, group, vocab_size)
    vocab_start, vocab_size = sum(sizes[: group.rank]), sum(sizes)
    check_targets(targets, vocab_size, ignore_index)
    loss = _VocabParallelCrossEntropy.apply(
        logits_local, targets, group, vocab_start, vocab_size, ignore_index, inplace_backward
    )
    return reduce_loss(loss, targets, ignore_index, reduction)


def _shard_sizes(logits: torch.Tensor, group: TPGroup, vocab_size: int | None) -> list[int]:
    """Words of every rank."""
    local = logits.shape[-1]
    if vocab_size is None:
        if group.world_size == 1:
            return [local]
        return group.all_gather(torch.tensor([local], device=logits.device)).tolist()
    sizes = shard_vocab_sizes(vocab_size, group.world_size)
    if sizes[group.rank] != local:
        raise ValueError(
            f"expected {sizes[group.rank]} of the {vocab_size} words in the logits of rank {group.rank} of "
            f"{group.world_size}, got {local}"
        )
    return sizes
