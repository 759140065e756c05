"""Whether a contender is right: the tokens it chooses, held against the logits of an fp32 reference.

In 16 bits two right implementations may choose different tokens, so tokens are not compared with tokens. Instead the
reference, in fp32, runs over what the contender itself wrote, and each token it chose must have been nearly the best
one there: below the reference's best logit by no more than twice what plain PyTorch errs by in the same dtype, each of
the two logits being allowed that error. A wrong cache slot, position, or sum chooses among 10^5 words at random, and
with random weights a random word lies about four standard deviations of the logits below the best.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tp_kernels.testing.model_bench.plain_model import PlainModel

__all__ = ["Verdict", "judge"]

_FACTOR = 2.0  # times PyTorch's own error, as everywhere


class Verdict(NamedTuple):
    """How far the worst token is from the best one, and how far it may be, both in logits."""

    error: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether it is right; NaN is not."""
        return self.error <= self.allowed


def judge(ids: Tensor, tokens: Tensor, reference: PlainModel, same_dtype: PlainModel) -> Verdict:
    """Judge the ``tokens`` [B, n] that a contender chose after the prompts ``ids`` [B, S].

    Args:
        ids, tokens: int64, on the reference's device.
        reference: in fp32.
        same_dtype: PyTorch in the contender's dtype, with the reference's weights rounded to it.
    Raises:
        ValueError: a token outside the vocabulary, or shapes that do not fit.
    """
    words = reference.head.shape[0]
    if tokens.dim() != 2 or tokens.shape[0] != ids.shape[0] or tokens.shape[1] < 1:
        raise ValueError(f"expected tokens [{ids.shape[0]}, n], got {list(tokens.shape)}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= words:
        raise ValueError(f"expected tokens in [0, {words}), got {int(tokens.min())} to {int(tokens.max())}")
    whole = torch.cat((ids, tokens[:, :-1]), dim=1)
    first = ids.shape[1] - 1
    exact = reference.logits(whole)[:, first:].float()
    rounded = same_dtype.logits(whole)[:, first:].float()
    of_torch = (rounded - exact).abs().max().item()
    floor = torch.finfo(same_dtype.norm.dtype).eps * exact.abs().max().item()
    behind = exact.amax(-1) - exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Verdict(behind.max().item(), 2 * max(_FACTOR * of_torch, floor))
