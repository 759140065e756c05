"""Cross entropy over a vocabulary, and the statistics from which ranks that hold shards of it compute the same loss.

    cross_entropy(logits, targets)  = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
    cross_entropy_stats(...)        = max, sum of exp(logit - max), the target's logit: of one shard of the vocabulary
    cross_entropy_backward(...)     = (exp(logits - max) / sum - onehot(targets)) * grad, in the dtype of the logits

Shapes: logits [..., V], targets [...] with V in the last dimension (where ``F.cross_entropy`` has it second). Numerics:
fp32 inside and in the loss, also for bf16 logits, without an fp32 copy of them; fp64 stays fp64. Rows whose target is
``ignore_index`` cost no read on the GPU. The same input gives the same bits. No label smoothing and no z-loss.

On a GPU the forward reads the logits once and the backward reads and writes them once, in place if asked. A target that
is no word of the vocabulary is a ValueError on the CPU; on a GPU, where nobody may wait for the answer, it makes the
row's loss and gradient NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import gpu_of, kernels_reason, on_gpu
from tp_kernels.ops._library import PLAIN_TYPES, define_op, needs_grad, watched

__all__ = [
    "check_operands",
    "check_targets",
    "choose_cross_entropy",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_reference",
    "cross_entropy_reference",
    "cross_entropy_stats",
    "cross_entropy_stats_reference",
    "reduce_loss",
]

_GPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_REDUCTIONS = ("mean", "sum", "none")
# Given to the kernels for "every target that is not negative is a word of some shard".
_ANY_WORD = 2**31 - 1


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Plain PyTorch ``cross_entropy``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(wide, targets.reshape(-1).long(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


def cross_entropy_stats_reference(
    logits: Tensor, targets: Tensor, vocab_start: int = 0, ignore_index: int = -100, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch ``cross_entropy_stats``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maximum = wide.amax(-1)
    total = (wide - maximum.masked_fill(maximum == -torch.inf, 0).unsqueeze(-1)).exp().sum(-1)
    local = targets.long() - vocab_start
    here = (local >= 0) & (local < logits.shape[-1])
    target = wide.gather(-1, local.masked_fill(~here, 0).unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0)
    nowhere = (targets < 0) | (targets >= (_ANY_WORD if vocab_size is None else vocab_size))
    ignored = targets == ignore_index
    total = total.masked_fill(nowhere, torch.nan).masked_fill(ignored, 1)
    target = target.masked_fill(nowhere, torch.nan).masked_fill(ignored, 0)
    return maximum.masked_fill(ignored, 0), total, target


def cross_entropy_backward_reference(
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    vocab_start: int = 0,
    ignore_index: int = -100,
) -> Tensor:
    """Plain PyTorch ``cross_entropy_backward``."""
    softmax = (logits.to(total.dtype) - maximum.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    local = (targets.long() - vocab_start).unsqueeze(-1)
    here = (local >= 0) & (local < logits.shape[-1])
    softmax.scatter_add_(-1, local.masked_fill(~here, 0), -here.to(softmax.dtype))
    out = (softmax * grad.unsqueeze(-1)).masked_fill_((targets == ignore_index).unsqueeze(-1), 0)
    return out.to(logits.dtype).contiguous()


def check_operands(logits: Tensor, targets: Tensor, reduction: str = "mean") -> None:
    """ValueError for shapes, dtypes, devices or a reduction that do not fit."""
    if logits.dim() < 1 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise ValueError(f"expected floating-point logits [..., V], got {list(logits.shape)} {logits.dtype}")
    if targets.shape != logits.shape[:-1] or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"expected int64 or int32 targets {list(logits.shape[:-1])}, got {list(targets.shape)} {targets.dtype}"
        )
    if targets.device != logits.device:
        raise ValueError(f"expected targets on {logits.device}, where the logits are, got {targets.device}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """ValueError for a target that is neither a word nor ``ignore_index``, where looking costs no synchronisation."""
    if not targets.is_cpu or on_gpu(targets) or type(targets) not in PLAIN_TYPES or watched():
        return
    if torch._C._are_functorch_transforms_active():
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if bad.any():
        raise ValueError(f"expected targets in [0, {vocab_size}) or {ignore_index}, got {targets[bad][0].item()}")


def reduce_loss(loss: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The rows' losses as ``F.cross_entropy`` reduces them; "mean" is over the rows that are not ignored."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


# GPU ------------------------------------------------------------------------------------------------------------------


def _decide(op: str, logits: Tensor, *others: Tensor) -> tuple[str | None, tuning.Entry | None]:
    """(why the kernel does not run, or None; the measurement that decided, or None if there is none)."""
    reason = kernels_reason(logits)
    if reason is not None:
        return reason, None
    if logits.dtype not in _GPU_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, got {logits.dtype}", None
    for other in others:
        if type(other) not in PLAIN_TYPES:
            return f"an operand is a {type(other).__name__}", None
    v = logits.shape[-1]
    entry = tuning.lookup(op, gpu_of(logits), logits.dtype, m=logits.numel() // v, v=v)
    return "it was measured to be slower" if entry is not None and entry.path != "triton" else None, entry


def choose_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> tuning.Choice:
    """Which GPU path ``cross_entropy`` takes for these arguments ("triton" or "torch"), and why."""
    reason, entry = _decide("cross_entropy", logits, targets)
    if reason is not None and entry is None:
        return tuning.Choice("torch", reason)
    unmeasured = f"not measured on {gpu_of(logits).name}; one read of the logits, no fp32 copy"
    return tuning.choose_measured(entry, unmeasured)


def _forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, maximum, total) of every row by the kernel or by PyTorch."""
    reason, entry = _decide("cross_entropy", logits, targets)
    if reason is None:
        from tp_kernels.ops.kernels import cross_entropy as kernels

        rows = tuple(logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
        config = tuning.configuration(entry, kernels.Config)
        kernels.cross_entropy_forward(*rows, logits, targets.contiguous(), ignore_index, config)
        return rows
    maximum, total, target = cross_entropy_stats_reference(logits, targets, 0, ignore_index, logits.shape[-1])
    loss = (total.log() + (maximum - target)).masked_fill(targets == ignore_index, 0)
    return loss.contiguous(), maximum.contiguous(), total.contiguous()


def _stats(
    logits: Tensor, targets: Tensor, vocab_start: int = 0, ignore_index: int = -100, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    reason, entry = _decide("cross_entropy", logits, targets)
    if reason is None:
        from tp_kernels.ops.kernels import cross_entropy as kernels

        rows = tuple(logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
        config = tuning.configuration(entry, kernels.Config)
        words = _ANY_WORD if vocab_size is None else vocab_size
        kernels.cross_entropy_stats(*rows, logits, targets.contiguous(), vocab_start, words, ignore_index, config)
        return rows
    return tuple(
        t.contiguous() for t in cross_entropy_stats_reference(logits, targets, vocab_start, ignore_index, vocab_size)
    )


def _backward(
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    vocab_start: int = 0,
    ignore_index: int = -100,
    inplace: bool = False,
) -> Tensor:
    reason, entry = _decide("cross_entropy_backward", logits, targets, grad)
    if reason is None:
        from tp_kernels.ops.kernels import cross_entropy as kernels

        inplace = inplace and kernels.can_overwrite(logits)
        out = logits if inplace else logits.new_empty(logits.shape)
        rows = (t.to(torch.float32).contiguous() for t in (maximum, total, grad))
        config = tuning.configuration(entry, kernels.BackwardConfig)
        kernels.cross_entropy_backward(out, logits, targets.contiguous(), *rows, vocab_start, ignore_index, config)
    else:
        out = cross_entropy_backward_reference(logits, targets, maximum, total, grad, vocab_start, ignore_index)
        inplace = inplace and torch._debug_has_internal_overlap(logits) != 1
        out = logits.copy_(out) if inplace else out
    if inplace:
        # Whoever else saved the logits for a backward is told, instead of using what is no longer there.
        torch.autograd.graph.increment_version(logits)
    return out


def _stats_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _forward_impl(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    check_operands(logits, targets)
    return _forward(logits, targets, ignore_index)


def _forward_fake(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    check_operands(logits, targets)
    return tuple(logits.new_empty(targets.shape, dtype=_stats_dtype(logits)) for _ in range(3))


def _stats_impl(
    logits: Tensor, targets: Tensor, vocab_start: int = 0, ignore_index: int = -100, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_operands(logits, targets)
    return _stats(logits, targets, vocab_start, ignore_index, vocab_size)


def _stats_fake(
    logits: Tensor, targets: Tensor, vocab_start: int = 0, ignore_index: int = -100, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_operands(logits, targets)
    return tuple(logits.new_empty(targets.shape, dtype=_stats_dtype(logits)) for _ in range(3))


def _backward_impl(
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    vocab_start: int = 0,
    ignore_index: int = -100,
) -> Tensor:
    check_operands(logits, targets)
    return _backward(logits, targets, maximum, total, grad, vocab_start, ignore_index)


def _backward_fake(
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    vocab_start: int = 0,
    ignore_index: int = -100,
) -> Tensor:
    return logits.new_empty(logits.shape)


_FORWARD_OP = define_op(
    "cross_entropy_forward(Tensor logits, Tensor targets, int ignore_index=-100) -> (Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_STATS_OP = define_op(
    "cross_entropy_stats(Tensor logits, Tensor targets, int vocab_start=0, int ignore_index=-100, "
    "int? vocab_size=None) -> (Tensor, Tensor, Tensor)",
    _stats_impl,
    _stats_fake,
)
_BACKWARD_OP = define_op(
    "cross_entropy_backward(Tensor logits, Tensor targets, Tensor maximum, Tensor total, Tensor grad, "
    "int vocab_start=0, int ignore_index=-100) -> Tensor",
    _backward_impl,
    _backward_fake,
)


class _CrossEntropy(torch.autograd.Function):
    """Loss of every row; it remembers the logits and two numbers a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, inplace: bool) -> Tensor:
        if watched():
            loss, maximum, total = _FORWARD_OP(logits, targets, ignore_index)
        else:
            loss, maximum, total = _forward(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, maximum, total)
        ctx.ignore_index, ctx.inplace = ignore_index, inplace
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        logits, targets, maximum, total = ctx.saved_tensors
        if watched():
            out = _BACKWARD_OP(logits, targets, maximum, total, grad, 0, ctx.ignore_index)
        else:
            out = _backward(logits, targets, maximum, total, grad, 0, ctx.ignore_index, ctx.inplace)
        return out, None, None, None


# Public ---------------------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    """Cross entropy of every row's softmax with its target word; differentiable with respect to the logits.

    Args:
        logits: [..., V], any strides.
        targets: [...] int64 or int32, words in [0, V) or ``ignore_index``.
        ignore_index: rows with this target have loss 0 and gradient 0.
        reduction: "mean" (over the rows that are not ignored; NaN if there are none), "sum" or "none".
        inplace_backward: let the backward overwrite the logits with their gradient, which saves a tensor of their size.
            The logits are lost then, and a second backward through them is an error. GPU, eager only; ignored
            elsewhere.

    Returns:
        fp32 (fp64 for fp64 logits): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes or dtypes that do not fit; on the CPU, targets that are no words.
    """
    check_operands(logits, targets, reduction)
    if watched():
        if on_gpu(logits):
            if needs_grad(logits):
                loss = _CrossEntropy.apply(logits, targets, ignore_index, False)
            else:
                loss = _FORWARD_OP(logits, targets, ignore_index)[0]
            return reduce_loss(loss, targets, ignore_index, reduction)
    elif on_gpu(logits):
        if _decide("cross_entropy", logits, targets)[0] is None:
            if needs_grad(logits):
                loss = _CrossEntropy.apply(logits, targets, ignore_index, inplace_backward)
            else:
                loss = _forward(logits, targets, ignore_index)[0]
            return reduce_loss(loss, targets, ignore_index, reduction)
    else:
        check_targets(targets, logits.shape[-1], ignore_index)
    return cross_entropy_reference(logits, targets, ignore_index=ignore_index, reduction=reduction)


def cross_entropy_stats(
    logits: Tensor, targets: Tensor, vocab_start: int = 0, ignore_index: int = -100, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a shard of the vocabulary contributes to every row's loss; not differentiable.

    Args:
        logits: [..., V], words [vocab_start, vocab_start + V) of a larger vocabulary.
        targets: [...] int64 or int32, words of the whole vocabulary or ``ignore_index``.
        vocab_start: first word of this shard.
        ignore_index: such rows give (0, 1, 0).
        vocab_size: of the whole vocabulary; targets beyond it (and negative ones) give NaN.

    Returns:
        ``(maximum, total, target)`` [...] in fp32: the largest logit, the sum of exp(logit - maximum), and the target's
        logit if it is in this shard, else 0. With ``M`` the maximum over shards, the loss is
        ``log(sum of total * exp(maximum - M)) + (M - sum of target)``.

    Raises:
        ValueError: shapes or dtypes that do not fit; on the CPU with ``vocab_size``, targets that are no words.
    """
    check_operands(logits, targets)
    if watched():
        return _STATS_OP(logits, targets, vocab_start, ignore_index, vocab_size)
    if vocab_size is not None:
        check_targets(targets, vocab_size, ignore_index)
    with torch.no_grad():
        return _stats(logits, targets, vocab_start, ignore_index, vocab_size)


def cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    vocab_start: int = 0,
    ignore_index: int = -100,
    *,
    inplace: bool = False,
) -> Tensor:
    """Gradient of the rows' losses with respect to a shard's logits; not differentiable.

    Args:
        logits: [..., V], words [vocab_start, vocab_start + V).
        targets: [...] int64 or int32.
        maximum, total: [...], largest logit and sum of exp(logit - maximum) over the whole vocabulary, in the dtype of
            ``cross_entropy_stats``.
        grad: [...], gradient of each row's loss.
        vocab_start: first word of this shard.
        ignore_index: such rows get 0.
        inplace: overwrite the logits and return them (where their rows do not overlap). Ignored while tracing.

    Returns:
        [..., V] in the dtype of the logits.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_operands(logits, targets)
    for name, rows in (("maximum", maximum), ("total", total), ("grad", grad)):
        if rows.shape != targets.shape:
            raise ValueError(f"expected {name} {list(targets.shape)}, got {list(rows.shape)}")
    if watched():
        return _BACKWARD_OP(logits, targets, maximum, total, grad, vocab_start, ignore_index)
    with torch.no_grad():
        return _backward(logits, targets, maximum, total, grad, vocab_start, ignore_index, inplace)
