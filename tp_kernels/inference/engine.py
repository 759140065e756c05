"""``DecodeEngine``: prompts and decode steps over a paged cache, each step one CUDA graph and no wait for the host.

    with DecodeEngine(model, max_batch=8, max_len=4096) as engine:
        engine.prefill(prompts)                 # launches; the first tokens are chosen on the device
        engine.step()                           # launches the next step of all rows, fed by tokens still on the device
        tokens = engine.read()                  # of the oldest launch that has not been read: {row: token}

A step takes the ids that the step before it left on the device, runs the model, chooses a token for every row and
leaves it for the next one. Everything that changes from step to step (ids, lengths, page table, which rows are in use,
random numbers) stands in buffers that never move, so a graph is recorded once for each batch size of a ladder, when it
is first needed; rows that a graph has too many write nothing and read a page of zeros. Tokens go to the host by an
asynchronous copy behind each step, into a ring of pinned memory: a copy inside the graph would always go to the same
place, which the host may not have read yet.

All ranks make the same calls. What they decide from is the same on all of them: the prompts, and tokens that all have
from the same collective.

Where nothing can be captured (``path`` tells why) the same code runs eagerly. Where modules of the model are not ours,
or have hooks, steps go through the modules instead of past them, captured all the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from tp_kernels.inference.decode_loop import DecodedBatch, decode_batch
from tp_kernels.inference.device_sampling import choose_by_chance, choose_greedily
from tp_kernels.inference.gpu_step import FusedStep
from tp_kernels.inference.group_end import close_with_group
from tp_kernels.inference.paged_cache import PagedKVCache, upload
from tp_kernels.inference.prompts import check_prompts, passes
from tp_kernels.inference.sampling import RowSampler, SamplingParams
from tp_kernels.inference.step_graph import StepGraphs, ladder
from tp_kernels.inference.token_ring import TokenRing

if TYPE_CHECKING:
    from tp_kernels.models.causal_lm import ParallelCausalLM

__all__ = ["MAX_BATCH", "DecodeEngine"]

MAX_BATCH = 256
# Prompt tokens in a pass. The widest activation, gate and up of Llama-3-70B on one rank, then takes 0.9 GiB.
PREFILL_TOKENS = 8192
_DRAWS = 64  # random numbers of a row on the device
_GREEDY = SamplingParams()


class DecodeEngine:
    """Decodes up to ``max_batch`` rows of up to ``max_len`` tokens; a collective of the model's ranks in every call.

    Args:
        model: its parameters must stay where they are while the engine is used.
        max_batch: most rows at once, up to 256.
        max_len: most tokens of a row that are run through the model: prompt and all new ones but the last.
        page_size: tokens of a page of the cache; a power of two.
        num_pages: pages shared by the rows; None for as many as they can ever need.
        batch_sizes: sizes for which graphs are recorded, ascending up to ``max_batch``; None for 1, 2, 4, 8 and on in
            steps of 8.
        capture: False never records graphs; True makes it an error where there can be none; None records where it can.

    Attributes:
        cache: the ``PagedKVCache``.
        rows: the rows in use, by the numbers that ``prefill`` gave them, in the order of the batch.

    Raises:
        ValueError: sizes that do not fit together, or ``capture=True`` where nothing can be captured.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: ParallelCausalLM,
        *,
        max_batch: int,
        max_len: int,
        page_size: int = 64,
        num_pages: int | None = None,
        batch_sizes: Sequence[int] | None = None,
        capture: bool | None = None,
    ):
        if not isinstance(max_batch, int) or isinstance(max_batch, bool) or not 1 <= max_batch <= MAX_BATCH:
            raise ValueError(f"max_batch must be an int in [1, {MAX_BATCH}], got {max_batch!r}")
        if not isinstance(max_len, int) or isinstance(max_len, bool) or max_len < 1:
            raise ValueError(f"max_len must be a positive int, got {max_len!r}")
        if max_len > model.config.max_position_embeddings:
            raise ValueError(
                f"max_len={max_len} exceeds the model's max_position_embeddings={model.config.max_position_embeddings}"
            )
        sizes = ladder(max_batch) if batch_sizes is None else tuple(batch_sizes)
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != max_batch:
            raise ValueError(f"batch_sizes must be ascending up to max_batch={max_batch}, got {list(sizes)}")
        # Not the model itself: who holds an engine does not hold on to the model, see ``generation``.
        self._decoder, self._head, self.group, self.config = model.model, model.lm_head, model.group, model.config
        weight = model.model.norm.weight
        self.device, self.max_batch, self.max_len, self._sizes = weight.device, max_batch, max_len, sizes
        self._graphs = StepGraphs(self.device, self.group, capture)
        self._autocast = torch.is_autocast_enabled(self.device.type)
        self._modules_reason = FusedStep.why_not(model)
        self._fused = FusedStep(model, max_len) if self._modules_reason is None else None
        self.cache = PagedKVCache.for_model(
            model, max_batch=max_batch, max_len=max_len, page_size=page_size, num_pages=num_pages
        )
        attentions = [getattr(layer, "self_attn", None) for layer in self._decoder.layers]
        windows = [getattr(attention, "sliding_window", None) for attention in attentions]
        self._window = None if None in windows else max(windows)
        self._ids = torch.zeros(max_batch, dtype=torch.int64, device=self.device)
        self._tokens = torch.zeros(max_batch, dtype=torch.int64, device=self.device)
        self._uniforms = torch.zeros(_DRAWS, max_batch, dtype=torch.float64, device=self.device)
        self._draw = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._ring = TokenRing(max_batch, self.device)
        self._kept: list[Any] = []  # what graphs point at and others might free
        self._closed = False
        self._forget()
        close_with_group(self.group, self)

    def _forget(self) -> None:
        """No rows, nothing launched."""
        self.rows: list[int] = []
        self._ring.clear()
        self._next_row = 0
        self._rule: SamplingParams = _GREEDY
        self._sampler: RowSampler | None = None
        self._streams: dict[int, int] = {}  # of each row, the sampler's stream
        self._drawn = _DRAWS  # random numbers of a row that the device has used up

    @property
    def path(self) -> str:
        """How steps run: "graph", or "eager: " and why; then, if it is so, "modules: " and why not past them."""
        how = "graph" if self._graphs.reason is None else f"eager: {self._graphs.reason}"
        return how if self._modules_reason is None else f"{how}; modules: {self._modules_reason}"

    @property
    def pending(self) -> int:
        """Launches whose tokens have not been read."""
        return len(self._ring)

    # Prompts ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        capacities: Sequence[int] | None = None,
        sampling: SamplingParams | RowSampler = _GREEDY,
        first_draw: int = 0,
        chunk: int | None = None,
    ) -> list[int]:
        """Run prompts as new rows behind those in use, and choose the first token of each; ``read`` gives them.

        The pages that a row is going to need are set aside for it if all the rows can have theirs; else rows get pages
        as they grow.

        Args:
            prompts: token ids, at least one a row.
            capacities: most tokens of each row that will be run through the model; None for those of the prompt.
            sampling: how tokens are chosen, also in the steps that follow. A ``RowSampler`` brings streams of random
                numbers that go on from where they are, those from ``first_draw`` on being the new rows'.
            first_draw: see ``sampling``.
            chunk: most tokens in a pass, over all rows; None for 8192.

        Returns:
            The numbers of the new rows.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, too many or too long rows (``OutOfPages``: too
                few pages for the prompts), or a sampling that differs from that of rows in use. Nothing has changed.
        """
        self._check_ready()
        prompts = [list(prompt) for prompt in prompts]
        chunk = PREFILL_TOKENS if chunk is None else chunk
        check_prompts(prompts, capacities, chunk, self.config.vocab_size, self.max_len)
        if len(prompts) + len(self.rows) > self.max_batch:
            raise ValueError(f"{len(prompts)} rows beside {len(self.rows)} exceed max_batch={self.max_batch}")
        params = sampling.params if isinstance(sampling, RowSampler) else sampling
        # What steps depend on: the seed is in the random numbers.
        rule = _GREEDY if params.greedy else replace(params, seed=None)
        if self.rows and not (rule == self._rule == _GREEDY):
            raise ValueError("rows in use are decoded as they were begun: only greedy rows can be added to greedy ones")
        lengths = [len(prompt) for prompt in prompts]
        wanted = [max(pair) for pair in zip(lengths, lengths if capacities is None else capacities, strict=True)]
        enough = sum(map(self.cache.pages_for, wanted)) <= self.cache.free_pages
        self.cache.add_rows(wanted if enough else lengths)
        first, numbers = len(self.rows), list(range(self._next_row, self._next_row + len(prompts)))
        try:
            logits = self._run_prompts(prompts, first, chunk)
        except BaseException:
            self.cache.keep_rows(range(first))
            raise
        self.rows += numbers
        self._next_row += len(prompts)
        for row, length in enumerate(lengths, start=first):
            self.cache.set_length(row, length)
        self.cache.sync()
        self._choose_by(rule)
        if not params.greedy:
            self._sampler = sampling if isinstance(sampling, RowSampler) else RowSampler(params, len(prompts))
            self._streams = {number: first_draw + at for at, number in enumerate(numbers)}
            self._refill_draws()
        self._choose(logits, first, len(prompts), rule)
        self._drawn += 1
        self._ring.send(numbers, self._tokens[first : first + len(prompts)])
        return numbers

    def _run_prompts(self, prompts: list[list[int]], first: int, chunk: int) -> torch.Tensor:
        """Write the prompts to the cache, in passes of ``chunk`` tokens; logits of each one's next token."""
        hidden: list[torch.Tensor] = []
        for pieces in passes([len(prompt) for prompt in prompts], chunk):
            packed = self.cache.pack([(first + row, begin, end) for row, begin, end in pieces], self._window)
            tokens = array("q")  # half the time of torch.tensor for a list of 4096 numbers
            for row, begin, end in pieces:
                tokens.extend(prompts[row][begin:end])
            ids = torch.empty(len(tokens), dtype=torch.int64, device=self.device)
            upload(ids, torch.frombuffer(tokens, dtype=torch.int64))
            ends = accumulate(end - begin for _, begin, end in pieces)
            done = [at - 1 for (row, _, end), at in zip(pieces, ends, strict=True) if end == len(prompts[row])]
            last = torch.empty(len(done), dtype=torch.int64, device=self.device)
            upload(last, torch.tensor(done, dtype=torch.int64))
            if self._fused is not None:
                hidden.append(self._fused.prefill(ids, packed, last))
            else:
                hidden.append(self._decoder(ids.unsqueeze(0), None, packed)[0, last])
        return self._local_logits(torch.cat(hidden))

    @torch.inference_mode()
    def pretend_cached(self, rows: int, tokens: int) -> list[int]:
        """Start anew as if ``rows`` prompts of ``tokens`` tokens had been run: random keys, values and next ids.

        For measurements: greedy steps follow.

        Raises:
            ValueError: more rows or tokens than there is room for.
        """
        self._check_ready()
        if not 1 <= rows <= self.max_batch or not 1 <= tokens <= self.max_len:
            raise ValueError(
                f"expected 1 to {self.max_batch} rows of 1 to {self.max_len} tokens, got {rows} of {tokens}"
            )
        self.reset()
        self.cache.add_rows([tokens] * rows)
        for row in range(rows):
            self.cache.set_length(row, tokens)
        self.cache.fill_random()
        self.rows = list(range(rows))
        self._next_row = rows
        self._choose_by(_GREEDY)
        upload(self._ids[:rows], torch.arange(rows) * 7919 % self.config.vocab_size)
        return list(self.rows)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        *,
        stops: frozenset[int] = frozenset(),
        sampling: SamplingParams | RowSampler = _GREEDY,
        first_draw: int = 0,
        on_token: Callable[[int, int], None] | None = None,
        chunk: int | None = None,
    ) -> DecodedBatch:
        """Continue each prompt to its end; rows in use before are released.

        Args:
            prompts, sampling, first_draw, chunk: see ``prefill``.
            limits: most new tokens of each.
            stops: tokens that end a row.
            on_token: called as ``on_token(place among the prompts, token)`` for each new token.

        Raises:
            ValueError: as ``prefill``, ``step`` and ``read`` do; no rows are left in use.
        """
        self._check_ready()
        self.reset()
        try:
            return decode_batch(
                self,
                prompts,
                limits,
                stops=stops,
                sampling=sampling,
                first_draw=first_draw,
                on_token=on_token,
                chunk=chunk,
            )
        finally:
            self.reset()

    # Steps -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Launch one decode step of all rows in use, behind what has been launched; waits for nothing.

        The tokens of four launches wait to be read; those of earlier ones are lost, which the next ``read`` says.

        Raises:
            ValueError: no rows, or a row at ``max_len``; ``OutOfPages``: a row needs a page and there is none. Nothing
                has been launched.
        """
        self._check_ready()
        if not self.rows:
            raise ValueError("there are no rows to decode: call prefill first")
        self.cache.reserve([length + 1 for length in self.cache.host_lengths])
        self.cache.sync()
        self._refill_draws()
        size = next(size for size in self._sizes if size >= len(self.rows))
        self._replayer(size)()
        guard = getattr(self.group.communicator, "guard_replay", None)
        if guard is not None and self._graphs.reason is None:
            guard()
        self._drawn += 1
        self.cache.count_step()
        self._ring.send(self.rows, self._tokens[: len(self.rows)])

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the graphs of all batch sizes now, the largest first, instead of when they are first needed."""
        self._check_ready()
        self.cache.sync()
        self._refill_draws()  # a rehearsal takes one
        for size in reversed(self._sizes):
            self._replayer(size)

    def read(self) -> dict[int, int]:
        """The tokens of the oldest launch that has not been read, by row; waits for them.

        Rows that were released since are among them.

        Raises:
            ValueError: on every rank, when a row's logits held NaN or infinities; nothing was launched, or launches
                were lost because they were not read in time (once; then the rest can be read).
            CommError: another rank ended or did not answer in time.
        """
        self._check_open()
        tokens = self._ring.read()
        check = getattr(self.group.communicator, "check", None)
        if check is not None:
            check()
        if min(tokens.values()) < 0:
            raise ValueError("the logits hold NaN or infinities; no token can be chosen from them")
        return tokens

    @torch.inference_mode()
    def release(self, rows: Sequence[int]) -> None:
        """Take rows out of the batch and give their pages back. Launches before stay valid.

        Raises:
            ValueError: a row that is not in use.
        """
        gone = set(rows)
        if not gone:
            return
        if not gone.issubset(self.rows):
            raise ValueError(f"expected rows in use, {self.rows}, got {sorted(gone)}")
        kept = [place for place, row in enumerate(self.rows) if row not in gone]
        self.cache.keep_rows(kept)
        self.rows = [self.rows[place] for place in kept]
        if kept and kept[-1] >= len(kept):
            places = torch.empty(len(kept), dtype=torch.int64, device=self.device)
            upload(places, torch.tensor(kept))
            self._ids[: len(kept)] = self._ids[places]
            if self._sampler is not None:
                self._uniforms[:, : len(kept)] = self._uniforms[:, places]
        self.cache.sync()

    @torch.inference_mode()
    def reset(self) -> None:
        """Release all rows and forget what was launched; graphs stay."""
        self.release(self.rows)
        self._forget()

    def fits(self, capacities: Sequence[int]) -> bool:
        """Whether rows of so many tokens can run from beginning to end, the engine being empty."""
        return (
            len(capacities) <= self.max_batch
            and max(capacities) <= self.max_len
            and sum(map(self.cache.pages_for, capacities)) <= self.cache.num_pages
        )

    def close(self) -> None:
        """Free graphs and cache; before the group's communicator is closed. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._graphs.clear()
        self._kept.clear()
        self._fused = self.cache = None
        self.rows = []
        self._ring.clear()

    def __enter__(self) -> DecodeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The step itself -------------------------------------------------------------------------------------------------

    def _forward(self, size: int, rule: SamplingParams) -> None:
        """One step of the first ``size`` rows of the buffers: what a graph holds."""
        ids, rows = self._ids[:size], self.cache.rows(size)
        if self._fused is not None:
            logits = self._fused.decode(ids, rows)
        else:
            logits = self._local_logits(self._decoder(ids.unsqueeze(1), None, rows)[:, 0])
        self._choose(logits, 0, size, rule)
        self.cache.lengths[:size].add_(self.cache.live[:size])

    def _choose(self, logits: torch.Tensor, first: int, count: int, rule: SamplingParams) -> None:
        """Choose from ``logits`` for rows from ``first`` on; the next step finds the tokens."""
        part, sizes = slice(first, first + count), self._head.partition
        tokens, ids = self._tokens[part], self._ids[part]
        if rule.greedy:
            choose_greedily(tokens, ids, logits, self.group, sizes)
            return
        uniform = self._uniforms[:, part].index_select(0, self._draw)[0]
        choose_by_chance(tokens, ids, logits, uniform, rule, self.group, sizes)
        self._draw.add_(1)

    def _local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._fused is not None:
            return self._fused.logits(hidden)
        return self._head.project(hidden, self._head.weight, self._head.bias)

    def _replayer(self, size: int) -> Callable[[], None]:
        """What runs a step of ``size`` rows: a graph, recorded now if it is the first of its size."""
        kind = (size, self._rule)
        step = partial(self._forward, *kind)
        if self._fused is None and self._graphs.reason is None and kind not in self._graphs:
            self._keep_rotation()
        return self._graphs.get(kind, step, partial(self._rehearse, step))

    def _keep_rotation(self) -> None:
        """The tables that modules look up: whoever needs longer ones replaces them, and a graph still reads these."""
        for layer in self._decoder.layers:
            rope = getattr(getattr(layer, "self_attn", None), "rope", None)
            if rope is not None:
                self._kept.append(rope.tables(self.cache.capacity, self.device))

    def _rehearse(self, step: Callable[[], None]) -> None:
        """Run a step that leaves no trace: kernels are compiled, libraries get their memory."""
        buffers = (self.cache.live, self._ids, self._tokens, self._draw)
        before = [buffer.clone() for buffer in buffers]
        self.cache.live.zero_()
        step()
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)

    # Host side of a launch -------------------------------------------------------------------------------------------

    def _choose_by(self, rule: SamplingParams) -> None:
        """From now on tokens are chosen by ``rule``; graphs of other random choices are dropped."""
        if not rule.greedy:
            self._graphs.drop(lambda kind: kind[1] not in (rule, _GREEDY))
        self._rule, self._sampler, self._drawn = rule, None, _DRAWS

    def _refill_draws(self) -> None:
        """Bring the next random numbers of all rows when the device has used up its own."""
        if self._sampler is None or self._drawn < _DRAWS:
            return
        streams = [self._streams[row] for row in self.rows]
        upload(self._uniforms[:, : len(streams)], self._sampler.uniforms(streams, _DRAWS))
        self._draw.zero_()
        self._drawn = 0

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the engine is closed")

    def _check_ready(self) -> None:
        self._check_open()
        if torch.is_autocast_enabled(self.device.type) != self._autocast:
            made = "inside" if self._autocast else "outside"
            raise ValueError(f"the engine was made {made} autocast: expected it to be used there")
