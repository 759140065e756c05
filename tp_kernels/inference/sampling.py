"""Choosing the next token: greedy, or temperature, top-k and top-p (in that order) followed by one draw.

The filters keep exactly the tokens that transformers' ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and
``TopPLogitsWarper`` keep, ties included. The draw inverts the cumulative distribution in float64 with one uniform
number per row and step, from a generator that belongs to the row: a row's tokens depend on (seed, its number, its
logits), not on the rest of the batch nor on the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["RowSampler", "SamplingParams", "check_logits", "draw_tokens", "filter_logits"]

_MAX_SEED = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens.

    Attributes:
        temperature: 0 chooses the most likely token; above 0 divides the logits.
        top_k: keep the k most likely tokens (and those that tie with the last of them); 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least ``top_p``; 1.0 keeps all.
        seed: integer in [0, 2**63), or None for a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not _is_number(self.temperature) or not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {self.temperature!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer >= 0 (0 keeps all tokens), got {self.top_k!r}")
        if not _is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1] (1 keeps all tokens), got {self.top_p!r}")
        if self.seed is not None and (
            not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < _MAX_SEED
        ):
            raise ValueError(f"seed must be None or an integer in [0, 2**63), got {self.seed!r}")

    @property
    def greedy(self) -> bool:
        """True when no random number is drawn."""
        return self.temperature == 0.0


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_logits(logits: torch.Tensor) -> None:
    """ValueError unless a token can be chosen from every row of ``[..., vocab]``: no NaN, and a finite maximum."""
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise ValueError("the logits hold NaN or infinities; no token can be chosen from them")


def filter_logits(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Apply temperature, then top-k, then top-p.

    Args:
        logits: ``[..., vocab]``, any float dtype; not modified.
        params: a temperature of 0 leaves the scale alone.
    Returns:
        float32 logits of the same shape, minus infinity for the tokens that are out.
    """
    scores = logits.float()
    if params.temperature not in (0.0, 1.0):
        scores = scores / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        last_kept = torch.topk(scores, params.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < last_kept, -torch.inf)
    if params.top_p < 1.0:
        ordered, order = torch.sort(scores, dim=-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1.0 - params.top_p
        out[..., -1] = False
        scores = scores.masked_fill(out.scatter(-1, order, out), -torch.inf)
    return scores


class RowSampler:
    """Draws tokens for the rows of a batch, each row from its own stream of random numbers.

    Args:
        params: the filters and the seed; with ``seed=None`` the streams are seeded from the operating system.
        rows: number of rows.
    """

    def __init__(self, params: SamplingParams, rows: int):
        self.params = params
        seed = params.seed if params.seed is not None else int(torch.Generator().seed()) % _MAX_SEED
        # The row streams come from one parent stream: consecutive seeds must not give related streams.
        parent = torch.Generator().manual_seed(seed)
        seeds = torch.randint(0, _MAX_SEED - 1, (rows,), dtype=torch.int64, generator=parent).tolist()
        self._streams = [torch.Generator().manual_seed(s) for s in seeds]

    def __call__(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Choose one token per row.

        Args:
            logits: ``[len(rows), vocab]``.
            rows: the row number of each line, as at construction.
        Returns:
            int64 ``[len(rows)]`` on the CPU.
        Raises:
            ValueError: a row's logits hold NaN, or no finite value.
        """
        check_logits(logits)
        scores = filter_logits(logits, self.params).cpu()
        if self.params.greedy:
            return scores.argmax(-1)
        return draw_tokens(scores, self.uniforms(rows, 1)[0])

    def uniforms(self, rows: list[int], count: int) -> torch.Tensor:
        """The next ``count`` random numbers of each of ``rows``: float64 ``[count, len(rows)]`` in [0, 1)."""
        columns = [torch.rand(count, dtype=torch.float64, generator=self._streams[row]) for row in rows]
        return torch.stack(columns, dim=1)


def draw_tokens(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative probability of each row exceeds its random number; waits for no device.

    Args:
        scores: logits ``[n, vocab]``, minus infinity for tokens that are out.
        uniform: float64 ``[n]`` in [0, 1), on the same device.
    Returns:
        int64 ``[n]``; without meaning for a row whose scores hold NaN.
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # right=True gives the first token whose cumulative probability exceeds the target: never one of probability 0.
    # The product can round up to the total itself; that belongs to the last token with any probability.
    last = (cumulative < total).sum(-1, keepdim=True)
    target = uniform.unsqueeze(1) * total
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last).squeeze(1)
