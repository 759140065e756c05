"""What LoRA on sharded layers is made of: sliced factors, a dropout that ranks share, and two differentiable steps.

An adapter adds ``scaling * B(A(dropout(x)))`` to a linear layer. Which of the two factors is sliced follows from the
layer (see ``lora_layers``); the other one is whole on every rank, and its gradient is a sum over the ranks. That sum is
made of the weight gradient itself, so every rank receives the same bits and copies never drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.layers.base import TensorParallelLayer

__all__ = ["LoraFactor", "SharedDropout", "shared_rows", "whole_input_linear"]


class LoraFactor(TensorParallelLayer):
    """A or B of one adapter: this rank's slice of a full matrix, called like a linear layer without bias.

    ``state_dict`` holds the slice; ``load_state_dict`` takes the slice or the full matrix, of which it keeps its part.

    Args:
        full: the full matrix [out_features, in_features], equal on all ranks; may be on the meta device.
        dim: the sliced dimension, or None when every rank holds all of it.
        ranges: for every rank the slice of ``dim`` it holds; they may overlap. Ignored when ``dim`` is None.
        group: the ranks.
    """

    def __init__(self, full: nn.Parameter, dim: int | None, ranges: Sequence[range], group: TPGroup):
        super().__init__(group)
        self.out_features, self.in_features = full.shape
        self.ranges = tuple(ranges)
        self._declare("weight", dim, [("weight", full.shape[dim or 0], ranges)])
        own = full.detach()
        if dim is not None:
            part = ranges[self.tp_rank]
            own = own.narrow(dim, part.start, len(part))
        self.weight = nn.Parameter(own.clone(memory_format=torch.contiguous_format), requires_grad=full.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., own in_features] -> [..., own out_features]."""
        return F.linear(x, self.weight)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        (shard,) = self.tensor_shards()
        given = state_dict.get(prefix + shard.name)
        if given is not None and tuple(given.shape) == shard.full_shape != tuple(shard.target.shape):
            # A copy, because load_state_dict(assign=True) would keep all of the full matrix alive behind a view.
            state_dict[prefix + shard.name] = given[shard.slices].clone(memory_format=torch.contiguous_format)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, local={list(self.weight.shape)}, {super().extra_repr()}"


class SharedDropout(nn.Dropout):
    """Dropout of a tensor that is whole on every rank: the same mask on all of them, whatever their generators hold.

    Different masks would give each rank another input, and the input's gradient would differ between ranks. Rank 0
    draws a seed from its default CPU generator in every call and sends it (8 bytes); activation checkpointing restores
    that generator, so a recomputed call drops the same elements.

    Args:
        p: probability of dropping an element.
        group: the ranks.
    """

    def __init__(self, p: float, group: TPGroup):
        super().__init__(p)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of ``x`` while training, a collective then."""
        if not self.training or self.p == 0.0:
            return x
        seed = torch.randint(2**62, (1,)).to(self.group.device)
        generator = torch.Generator(device=x.device).manual_seed(int(self.group.broadcast(seed)))
        keep = torch.empty_like(x, requires_grad=False).bernoulli_(1.0 - self.p, generator=generator)
        return x * keep.div_(1.0 - self.p) if self.p < 1.0 else x * keep


class _WholeInputLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group):
        ctx.group = group
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype).contiguous()  # narrower under autocast
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ x.to(weight.dtype).flatten(0, -2)
            grad_weight = ctx.group.all_reduce(grad_weight, out=grad_weight)
        if ctx.needs_input_grad[0]:
            grad_x = (ctx.group.all_reduce(grad) @ weight).to(x.dtype)
        return grad_x, grad_weight, None


def whole_input_linear(x: torch.Tensor, weight: torch.Tensor, group: TPGroup) -> torch.Tensor:
    """``x @ weight.T`` of operands that are whole on every rank, where each rank uses the result for its own outputs.

    The gradient of the result is therefore a partial sum. Backward sums it over the ranks for ``x`` ([..., r], far less
    than the gradient of ``x`` itself), and sums the gradient of ``weight``.

    Args:
        x: [..., K], equal on all ranks.
        weight: [r, K], equal on all ranks.
        group: the ranks.
    """
    if group.world_size == 1:
        return F.linear(x, weight)
    return _WholeInputLinear.apply(x, weight, group)


class _SharedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, group, ranges):
        ctx.group, ctx.ranges = group, ranges
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        own = ctx.ranges[ctx.group.rank]
        everyone = grad.new_zeros(max(part.stop for part in ctx.ranges), *grad.shape[1:])
        everyone[own.start : own.stop] = grad
        return ctx.group.all_reduce(everyone, out=everyone)[own.start : own.stop], None, None


def shared_rows(weight: torch.Tensor, group: TPGroup, ranges: Sequence[range]) -> torch.Tensor:
    """``weight``, its gradient summed over the ranks that hold the same rows.

    With more ranks than KV heads several ranks hold the same rows of a key or value projection, and each sees only its
    own query heads' part of their gradient.

    Args:
        weight: [len(ranges[rank]), ...].
        group: the ranks.
        ranges: every rank's rows; nothing is done where they do not overlap.
    """
    overlap = sum(map(len, ranges)) > max(part.stop for part in ranges)
    if not overlap or not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    return _SharedRows.apply(weight, group, tuple(ranges))
