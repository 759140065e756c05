"""Choosing the next tokens where the logits are: nothing here waits for the device, so a CUDA graph may hold it.

The same choices as ``TokenChooser``'s: greedy takes the lowest token among equals, sampling the token that the row's
random number points at. What the host would be told by an exception is told by the token -1: the row's logits held NaN
or infinities.

Greedy: every rank offers the best (logit, token) of its words in a slot of its own, zeros in the others', and one small
all-reduce in fp32 (float64 where fp32 could not hold a logit or a token) shows all offers to all ranks: the sums have
one term that is not zero, so they are exact on every transport. On a GPU that is three kernels and the all-reduce, on
one rank two kernels. Sampling: the logits are gathered, rank 0 draws, and its tokens reach the others in the same way.
Every rank could draw from the same logits, but PyTorch's cumulative sums do not promise the same bits on a GPU, and a
rank that draws another token is an error that nobody would see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tp_kernels.inference.sampling import SamplingParams, draw_tokens, filter_logits
from tp_kernels.ops._gpu import takes_kernels

if TYPE_CHECKING:
    from tp_kernels.comm.tp_group import TPGroup

__all__ = ["choose_by_chance", "choose_greedily"]

_EXACT_IN_FP32 = 1 << 24


def choose_greedily(
    tokens: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, group: TPGroup, sizes: Sequence[int]
) -> None:
    """The most likely token of each row, the lowest among equals. Collective.

    Args:
        tokens: int64 [n], written, the same on all ranks; -1 where the best logit is not finite.
        ids: int64 [n], written: the same, 0 in the place of -1, to be fed to the model.
        logits: [n, words of this rank], any float dtype.
        group: the ranks that share the vocabulary.
        sizes: words of every rank.
    """
    narrow = logits.dtype is not torch.float64 and sum(sizes) <= _EXACT_IN_FP32
    if narrow and takes_kernels(logits):
        from tp_kernels.ops.kernels import token_choice

        if group.world_size == 1:
            token_choice.greedy_choice(tokens, ids, logits)
            return
        offers = logits.new_empty(group.world_size, 2, len(logits), dtype=torch.float32)
        token_choice.greedy_offers(offers, logits, sum(sizes[: group.rank]), group.rank)
        token_choice.pick_offer(tokens, ids, group.all_reduce(offers, out=offers))
        return
    best, chosen = logits.max(dim=-1)  # NaN counts as the largest; the first of equals
    if group.world_size > 1:
        dtype = torch.float32 if narrow else torch.float64
        offers = _offers(group, dtype, best, chosen + sum(sizes[: group.rank]))
        # Ranks hold ascending words, so the first rank of equals has the lowest token.
        best, rank = offers[:, 0].max(dim=0)
        chosen = offers[:, 1].gather(0, rank.unsqueeze(0)).squeeze(0).to(torch.int64)
    _settle(tokens, ids, chosen, best)


def choose_by_chance(
    tokens: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    uniform: torch.Tensor,
    params: SamplingParams,
    group: TPGroup,
    sizes: Sequence[int],
) -> None:
    """A token of each row by its random number. Collective.

    Args:
        tokens, ids: see ``choose_greedily``; -1 where the logits hold NaN or have no finite maximum.
        logits: [n, words of this rank].
        uniform: float64 [n] in [0, 1); rank 0's count.
        params: the filters.
        group, sizes: see ``choose_greedily``.
    """
    if group.world_size > 1:
        logits = group.all_gather(logits, dim=-1, sizes=sizes)
    best, chosen = logits.amax(-1), draw_tokens(filter_logits(logits, params), uniform)
    if group.world_size > 1:
        dtype = torch.float32 if sum(sizes) <= _EXACT_IN_FP32 else torch.float64
        chosen = _offers(group, dtype, chosen)[0, 0].to(torch.int64)
    _settle(tokens, ids, chosen, best)


def _offers(group: TPGroup, dtype: torch.dtype, *mine: torch.Tensor) -> torch.Tensor:
    """Every rank's rows of numbers, [ranks, len(mine), n]."""
    offers = torch.zeros(group.world_size, len(mine), len(mine[0]), dtype=dtype, device=mine[0].device)
    for slot, numbers in zip(offers[group.rank], mine, strict=True):
        slot.copy_(numbers)
    return group.all_reduce(offers, out=offers)


def _settle(tokens: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor, best: torch.Tensor) -> None:
    # x - x is 0 for finite numbers alone.
    tokens.copy_(chosen.masked_fill(best.sub(best).ne(0), -1))
    torch.clamp(tokens, min=0, out=ids)
