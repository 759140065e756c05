"""Decoding a batch to its end on a ``DecodeEngine``, the host one step ahead of the tokens it has read.

    launch step 1 · launch step 2 · read step 1 · launch step 3 · read step 2 · ...

So the device always has a step to go on with while the host looks at tokens. A row that a stop token ended is in one
more step than it needs, whose token is thrown away; one that ends by its limit is not, because that is known before.
The first tokens are read before anything else is launched: recording a graph must not delay them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tp_kernels.inference.engine import DecodeEngine

__all__ = ["DecodedBatch", "decode_batch"]


@dataclass(frozen=True)
class DecodedBatch:
    """What became of a batch.

    Attributes:
        output_ids: new tokens of each prompt, a stop token being the last.
        finish_reasons: "stop" or "length" of each.
        prefill_ms: from the call until the host had every row's first token.
        step_ms: from then on, from one step's tokens to those of the next.
    """

    output_ids: list[list[int]]
    finish_reasons: list[str]
    prefill_ms: float
    step_ms: list[float]


def decode_batch(
    engine: DecodeEngine,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    stops: frozenset[int],
    on_token: Callable[[int, int], None] | None,
    **options: Any,
) -> DecodedBatch:
    """See ``DecodeEngine.generate``; ``options`` are those of its ``prefill``. The engine is empty."""
    if len(limits) != len(prompts) or min(limits, default=0) < 1:
        raise ValueError(f"expected a positive limit for each of {len(prompts)} prompts, got {list(limits)}")
    started = time.perf_counter()
    capacities = [len(prompt) + limit - 1 for prompt, limit in zip(prompts, limits, strict=True)]
    rows = engine.prefill(prompts, capacities=capacities, **options)
    places = {row: place for place, row in enumerate(rows)}
    output: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    ended: set[int] = set()
    launched = dict.fromkeys(rows, 1)  # tokens of a row, read or not
    times: list[float] = []

    def take() -> None:
        nonlocal started
        tokens = engine.read()
        now = time.perf_counter()
        times.append((now - started) * 1e3)
        started = now
        for row, token in tokens.items():
            if row in ended:
                continue
            place = places[row]
            output[place].append(token)
            if token in stops:
                ended.add(row)
                reasons[place] = "stop"
            if on_token is not None:
                on_token(place, token)

    take()
    while True:
        engine.release([row for row in engine.rows if row in ended or launched[row] == limits[places[row]]])
        if engine.rows:
            engine.step()
            for row in engine.rows:
                launched[row] += 1
        if not engine.pending:
            break
        if engine.pending > 1 or not engine.rows:
            take()
    return DecodedBatch(output, reasons, times[0], times[1:])
