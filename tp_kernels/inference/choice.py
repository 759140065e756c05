"""``TokenChooser``: from each rank's part of the logits to the next tokens, the same on every rank.

Greedy: each rank offers the best (logit, token) of its part of the vocabulary; all ranks then compute the same function
of the same bits, so no rank has to be believed and the logits are never gathered. Among equal logits the lowest token
wins, as with ``torch.argmax``. Sampling: the logits are gathered, rank 0 draws and the others take its word.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from tp_kernels.inference.sampling import RowSampler, SamplingParams, check_logits

if TYPE_CHECKING:
    from tp_kernels.comm.process_group import TPGroup
    from tp_kernels.layers import ParallelLMHead

__all__ = ["TokenChooser"]


class TokenChooser:
    """Chooses the next token of every row. Collective: all ranks call it alike.

    Args:
        group: the ranks that share the vocabulary.
        head: the output head, for how the vocabulary is cut.
        params: greedy, or how to sample.
        rows: rows of the batch at its start; each has its own random numbers.
    """

    def __init__(self, group: TPGroup, head: ParallelLMHead, params: SamplingParams, rows: int):
        self._group = group
        self._first, self._sizes = head.vocab_range.start, head.partition
        self._sampler = None if params.greedy else RowSampler(params, rows)

    def __call__(self, logits: torch.Tensor, rows: list[int]) -> list[int]:
        """Choose.

        Args:
            logits: [n, words of this rank], for the rows that are left.
            rows: their numbers at the start.

        Returns:
            n tokens.

        Raises:
            ValueError: on every rank, when a row's logits hold NaN or its best is infinite.
        """
        return self._greedy(logits) if self._sampler is None else self._sample(logits, rows)

    def _greedy(self, logits: torch.Tensor) -> list[int]:
        best, tokens = _first_maxima(logits)
        if self._group.world_size > 1:
            # float64 holds every logit and every token number exactly: one message instead of two.
            mine = torch.tensor([best, [token + self._first for token in tokens]], dtype=torch.float64)
            offers = self._group.all_gather(mine.unsqueeze(0).to(logits.device)).tolist()
            best, tokens = [], []
            for row in range(len(logits)):
                # Ranks hold ascending words: the first of equals has the lowest token. NaN must not lose a comparison.
                winner = max(offers, key=lambda offer: math.inf if math.isnan(offer[0][row]) else offer[0][row])
                best.append(winner[0][row])
                tokens.append(int(winner[1][row]))
        if not all(map(math.isfinite, best)):
            raise ValueError("the logits hold NaN or infinities; no token can be chosen from them")
        return tokens

    def _sample(self, logits: torch.Tensor, rows: list[int]) -> list[int]:
        group = self._group
        if group.world_size > 1:
            logits = group.all_gather(logits, dim=-1, sizes=self._sizes)
        # Every rank checks: if only rank 0 could fail, the others would wait for its broadcast until the deadline.
        check_logits(logits)
        if group.world_size == 1:
            return self._sampler(logits, rows).tolist()
        if group.rank == 0:
            chosen = self._sampler(logits, rows).to(logits.device)
        else:
            chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        return group.broadcast(chosen, 0).tolist()


def _first_maxima(logits: torch.Tensor) -> tuple[list[float], list[int]]:
    """Largest value of each row and the first place where it stands; NaN counts as largest."""
    if logits.is_cpu:
        # numpy finds it in 4 us where torch takes 50 (a vocabulary of 49152); the widening is exact.
        values = logits.float() if logits.dtype is not torch.float32 else logits
        places = values.numpy().argmax(axis=-1).tolist()
        return [values[row, place].item() for row, place in enumerate(places)], places
    best, places = logits.max(dim=-1)
    return best.tolist(), places.tolist()
