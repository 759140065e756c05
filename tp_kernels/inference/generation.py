"""``generate``: prompts in, tokens out, on 1 to N ranks that always agree.

On a GPU it is ``DecodeEngine`` that does it: pages, CUDA graphs, tokens chosen on the device. On the CPU the prompts of
a batch are padded on the right, each row keeps its own length in the cache, and what the padding wrote there is
overwritten by the row's own tokens. A row that ends leaves the batch, so the others stop paying for it.

The arguments are compared across ranks before anything runs: ranks with different prompts would otherwise wait for each
other's tensors. How they agree on the tokens is ``TokenChooser``'s business.
"""

from __future__ import annotations

import hashlib
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tp_kernels.inference.choice import TokenChooser
from tp_kernels.inference.decode_loop import DecodedBatch
from tp_kernels.inference.decode_plan import DecodePlan
from tp_kernels.inference.engine import MAX_BATCH
from tp_kernels.inference.engines import engine_for
from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.inference.sampling import RowSampler, SamplingParams
from tp_kernels.models.causal_lm import ParallelCausalLM

__all__ = ["GenerationResult", "generate"]


@dataclass(frozen=True)
class GenerationResult:
    """What ``generate`` produced, the same on all ranks apart from the times.

    Attributes:
        prompt_ids: the prompts, as given.
        output_ids: the new tokens of each row; a stop token is the last of its row (as with transformers).
        finish_reasons: per row ``"stop"`` (a stop token) or ``"length"`` (``max_new_tokens`` or the model's last
            position).
        prefill_ms: from the call to the first token of every row; the sum over the batches that more than 256 prompts
            are run in on a GPU.
        decode_ms_per_token: mean time of a decode step (one token for every row still running); 0.0 if none was made.
        tokens_per_second: tokens of all rows made by decode steps, per second of decoding; 0.0 if there was none.
        step_ms: the time of each decode step.
        cache_bytes: memory of this rank's KV cache.
        decode_path: on a GPU ``DecodeEngine.path``: ``"graph"``, or why not. On the CPU ``"plan"``, or ``"modules: "``
            and why there was no ``DecodePlan``. Empty if nothing was decoded.
    """

    prompt_ids: list[list[int]]
    output_ids: list[list[int]]
    finish_reasons: list[str]
    prefill_ms: float
    decode_ms_per_token: float
    tokens_per_second: float
    step_ms: list[float] = field(default_factory=list, repr=False)
    cache_bytes: int = 0
    decode_path: str = ""


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    prefill_chunk: int | None = None,
) -> GenerationResult:
    """Continue each prompt, called by all ranks of the model's group with the same arguments.

    Args:
        model: a ``ParallelCausalLM``, or what makes one of itself (``tp_causal_lm()``, as patched Hugging Face models
            do); its group decides the ranks. On a GPU its graphs and cache are kept for the next call, until it dies.
        prompts: token ids, one non-empty list a row; lengths may differ.
        max_new_tokens: most tokens to make per row. A row also ends at the model's ``max_position_embeddings``.
        temperature: 0 takes the most likely token (the lowest id among equals); above 0 samples.
        top_k, top_p: filters of sampling, see ``SamplingParams``.
        seed: makes sampling repeatable, for any number of ranks; None draws a fresh seed.
        stop_ids: tokens that end a row; None means the model configuration's end-of-sequence ids, ``()`` none.
        on_token: called as ``on_token(row, token_id)`` for each new token as it is made, stop tokens included. Give it
            on the ranks that should stream, usually rank 0.
        prefill_chunk: most prompt tokens to run through the model at once, to bound memory: on a GPU over all rows,
            None being 8192, on the CPU of each row, None being all.
    Returns:
        The new tokens and times.
    Raises:
        ValueError: no prompt, an empty prompt, a token outside the vocabulary, a prompt longer than the model's
            ``max_position_embeddings``, bad sampling parameters, or ranks that were given different arguments.
        CommError: another rank ended or did not answer in time.

    A KeyboardInterrupt, or an exception from ``on_token``, passes through; the cache is freed with the call. The ranks'
    collectives are then out of step: with several ranks, end the group.
    """
    started = time.perf_counter()
    model = _causal_lm(model)
    rows = _ids(prompts, "prompts must be a list of lists of token ids, one list a row")
    stops = model.config.eos_token_ids if stop_ids is None else stop_ids
    stops = frozenset(_ids([stops], "stop_ids must be a list of token ids")[0])
    _check_ranks_agree(
        model.group,
        (rows, max_new_tokens, temperature, top_k, top_p, seed, sorted(stops), prefill_chunk),
    )
    params = SamplingParams(temperature, top_k, top_p, seed)
    _check(model, rows, max_new_tokens, prefill_chunk)

    lengths = [len(row) for row in rows]
    last_position = model.config.max_position_embeddings
    # The last token of a row is returned but never run through the model, so it needs no position.
    limits = [min(max_new_tokens, last_position - length + 1) for length in lengths]
    if model.model.norm.weight.is_cuda:
        return _generate_on_engine(model, rows, limits, stops, params, on_token, prefill_chunk)
    capacity = max(length + limit - 1 for length, limit in zip(lengths, limits, strict=True))
    cache = KVCache.for_model(model, len(rows), max(capacity, *lengths))
    choose = TokenChooser(model.group, model.lm_head, params, len(rows))

    output: list[list[int]] = [[] for _ in rows]
    reasons = ["length"] * len(rows)
    active = list(range(len(rows)))
    tokens = choose(_prefill(model, rows, cache, prefill_chunk), active)
    times: list[float] = []
    step: Callable[[list[int]], torch.Tensor] | None = None
    decode_path = ""
    while True:
        now = time.perf_counter()
        times.append((now - started) * 1e3)
        started = now
        kept: list[int] = []
        for position, (row, token) in enumerate(zip(active, tokens, strict=True)):
            output[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if token in stops:
                reasons[row] = "stop"
            elif len(output[row]) < limits[row]:
                kept.append(position)
        if not kept:
            break
        if len(kept) < len(active):
            cache.keep_rows(kept)
            active = [active[position] for position in kept]
            tokens = [tokens[position] for position in kept]
            step = None
        if step is None:
            step, decode_path = _decode_step(model, cache)
        logits = step(tokens)
        cache.advance(1)
        tokens = choose(logits, active)
    prefill_ms, *step_ms = times
    return _result(rows, [DecodedBatch(output, reasons, prefill_ms, step_ms)], cache.nbytes, decode_path)


def _causal_lm(model: Any) -> ParallelCausalLM:
    if isinstance(model, ParallelCausalLM):
        return model
    convert = getattr(model, "tp_causal_lm", None)
    if convert is None:
        raise ValueError(f"expected a ParallelCausalLM, or a model with tp_causal_lm(), got {type(model).__name__}")
    return convert()


def _generate_on_engine(
    model: ParallelCausalLM,
    rows: list[list[int]],
    limits: list[int],
    stops: frozenset[int],
    params: SamplingParams,
    on_token: Callable[[int, int], None] | None,
    chunk: int | None,
) -> GenerationResult:
    """In batches of as many rows as an engine takes."""
    sampling = params if params.greedy else RowSampler(params, len(rows))
    batches: list[DecodedBatch] = []
    cache_bytes, path = 0, ""
    for first in range(0, len(rows), MAX_BATCH):
        started = time.perf_counter()
        part = slice(first, first + MAX_BATCH)
        capacities = [len(row) + limit - 1 for row, limit in zip(rows[part], limits[part], strict=True)]
        with engine_for(model, capacities) as engine:
            batch = engine.generate(
                rows[part],
                limits[part],
                stops=stops,
                sampling=sampling,
                first_draw=first,
                on_token=None if on_token is None else lambda row, token, first=first: on_token(first + row, token),
                chunk=chunk,
            )
            whole = (time.perf_counter() - started) * 1e3
            # Making an engine is part of what the caller waits for.
            batches.append(replace(batch, prefill_ms=whole - sum(batch.step_ms)))
            cache_bytes, path = max(cache_bytes, engine.cache.nbytes), engine.path
    return _result(rows, batches, cache_bytes, path if any(batch.step_ms for batch in batches) else "")


def _result(rows: list[list[int]], batches: list[DecodedBatch], cache_bytes: int, path: str) -> GenerationResult:
    output = [tokens for batch in batches for tokens in batch.output_ids]
    step_ms = [time for batch in batches for time in batch.step_ms]
    seconds = sum(step_ms) / 1e3
    # The first token of each row comes from the prefill.
    decoded = sum(map(len, output)) - len(rows)
    return GenerationResult(
        prompt_ids=rows,
        output_ids=output,
        finish_reasons=[reason for batch in batches for reason in batch.finish_reasons],
        prefill_ms=sum(batch.prefill_ms for batch in batches),
        decode_ms_per_token=sum(step_ms) / len(step_ms) if step_ms else 0.0,
        tokens_per_second=decoded / seconds if seconds > 0 else 0.0,
        step_ms=step_ms,
        cache_bytes=cache_bytes,
        decode_path=path,
    )


def _decode_step(model: ParallelCausalLM, cache: KVCache) -> tuple[Callable[[list[int]], torch.Tensor], str]:
    """What turns one token a row into this rank's logits of the next ones, and its name."""
    reason = DecodePlan.why_not(model, cache.batch)
    if reason is None:
        return DecodePlan(model, cache), "plan"

    def through_modules(tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor(tokens, dtype=torch.int64, device=cache.lengths.device).unsqueeze(1)
        return model.local_logits(model.hidden_states(ids, cache=cache)[:, 0])

    return through_modules, f"modules: {reason}"


def _prefill(model: ParallelCausalLM, rows: list[list[int]], cache: KVCache, chunk: int | None) -> torch.Tensor:
    """Run the prompts through the model; returns this rank's logits of each row's next token, [rows, local words]."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    device = cache.lengths.device
    # Any valid id can stand in the padding: no real position attends to it.
    ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], dtype=torch.int64, device=device)
    last: list[torch.Tensor | None] = [None] * len(rows)
    step = chunk or longest
    for start in range(0, longest, step):
        piece = ids[:, start : start + step]
        hidden = model.hidden_states(piece, cache=cache)
        cache.advance(piece.shape[1])
        for row, length in enumerate(lengths):
            if start < length <= start + step:
                last[row] = hidden[row, length - 1 - start]
    cache.set_lengths(lengths)
    return model.local_logits(torch.stack(last))


def _ids(rows: Sequence[Sequence[int]], expected: str) -> list[list[int]]:
    """The rows as plain ints (numpy's and 0-d tensors too); ValueError with the text ``expected``."""
    try:
        return [[operator.index(token) for token in row] for row in rows]
    except TypeError:
        raise ValueError(expected) from None


def _check(model: ParallelCausalLM, rows: list[list[int]], max_new_tokens: int, prefill_chunk: int | None) -> None:
    if not rows:
        raise ValueError("prompts must hold at least one prompt")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}")
    if prefill_chunk is not None and (not isinstance(prefill_chunk, int) or prefill_chunk < 1):
        raise ValueError(f"prefill_chunk must be a positive integer or None, got {prefill_chunk!r}")
    config = model.config
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {number} is empty; a prompt needs at least one token")
        if len(row) > config.max_position_embeddings:
            raise ValueError(
                f"prompt {number} has {len(row)} tokens, more than the model's max_position_embeddings "
                f"({config.max_position_embeddings})"
            )
        if min(row) < 0 or max(row) >= config.vocab_size:
            raise ValueError(f"prompt {number} holds a token outside the vocabulary [0, {config.vocab_size})")


def _check_ranks_agree(group, arguments: tuple) -> None:
    """ValueError on every rank unless all ranks were given the same arguments."""
    if group.world_size == 1:
        return
    digest = int.from_bytes(hashlib.sha256(repr(arguments).encode()).digest()[:7], "big")
    mine = torch.tensor([digest], dtype=torch.int64, device=group.device)
    if len(set(group.communicator.all_gather(mine).tolist())) > 1:
        raise ValueError("generate was called with different prompts or options on different ranks; give all the same")
