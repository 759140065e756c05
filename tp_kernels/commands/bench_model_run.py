"""One run of ``tp-kernels bench model`` on one rank: the contenders, their checks, the cases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tp_kernels import one_gpu
from tp_kernels.commands.bench_model_ours import EngineContender, FullWeights, make_model, quantized, sharing
from tp_kernels.commands.bench_model_rivals import NotMade, Rivals, TorchWays, make_rivals, tried_on_all
from tp_kernels.commands.named_models import config_of
from tp_kernels.ops.kernels import counters
from tp_kernels.testing.bench import Timing, interleaved, write_csv
from tp_kernels.testing.gpu_timer import measure_roofs
from tp_kernels.testing.model_bench.budget import goal_of, kv_bytes, prefill_flops, weight_bytes
from tp_kernels.testing.model_bench.check import Verdict, judge
from tp_kernels.testing.model_bench.contender import Contender, Turn, release
from tp_kernels.testing.model_bench.profile import Profile, profile_rows, profiled
from tp_kernels.testing.model_bench.report import Case, Entry, case_lines, rows_of
from tp_kernels.testing.op_bench.shapes import MODELS
from tp_kernels.testing.rank_bench import time_turns

__all__ = ["CHECK_BATCH", "CHECK_TOKENS", "Run"]

CHECK_BATCH, CHECK_TOKENS = 2, 17
_CHECK_STEPS = 4
_CHECK_MIXED = (5, CHECK_TOKENS, 1)


class Run:
    """The models and contenders of one rank.

    Args:
        options: ``bench_model.Options``.
        groups: what our contenders communicate over, by name; with several ranks the first has it switched off, and the
            second is what goals are for.
        group: of the ranks, with a CPU transport; None for one rank.
        symm: a ``SymmetricMemoryCommunicator`` of the ranks, over which they meet on their GPUs; None elsewhere.
        device: of the models.
        ways: what torch has for sums over the ranks, for the rivals; None for one rank, or to do without rivals.
    """

    def __init__(
        self,
        options: Any,
        groups: Mapping[str, Any],
        group: Any,
        symm: Any,
        device: torch.device,
        ways: TorchWays | None = None,
    ):
        self._options, self._group, self._symm, self._device = options, group, symm, device
        self._started = time.monotonic()
        self._dtype = getattr(torch, options.dtype)
        self._config = config_of(options.model, options.layers)
        self._shapes = MODELS[options.model].shard(options.tp * options.shard)
        self._verdicts: dict[str, Verdict] = {}
        self._unchecked: dict[str, str] = {}  # contenders that could not be checked, and why: they are not timed
        # Ranks that share a GPU share its rates: only ratios say something there.
        self._roofs = measure_roofs() if group is None and device.type == "cuda" else None
        first, *others = groups
        self._aimed = next(iter(others), first)  # what users get by default, and goals are for
        self._whole = make_model(self._config, groups[first], device, self._dtype)
        self._ours: dict[str, tuple[Any, str, str]] = {}  # by contender: model, its format, the same without sums
        for kind in options.quantize:
            model = self._whole if kind == "none" else quantized(self._whole, kind)
            labels = {name: name if kind == "none" else f"{name} {kind}" for name in groups}
            for name, of in groups.items():
                mine = model if name == first else sharing(model, of)
                self._ours[labels[name]] = (mine, kind, labels[first] if group is not None else "")
        capture = None if device.type == "cuda" else False
        self._contenders: dict[str, Contender] = {
            name: EngineContender(model, capture) for name, (model, *_) in self._ours.items()
        }
        self._rivals = self._make_rivals(ways)
        self._contenders |= self._rivals.contenders
        made = self._rivals.contenders.items()
        self._unchecked |= {name: rival.failure for name, rival in made if isinstance(rival, NotMade)}

    def _make_rivals(self, ways: TorchWays | None) -> Rivals:
        options = self._options
        if self._group is not None and ways is None:
            return Rivals()
        left_out = "" if options.transformers else "--no-transformers"
        if options.shard > 1:
            left_out = left_out or "it has no shard without the others"
        elif ways is not None and ways.process_group is None:
            left_out = left_out or "it adds by NCCL, and that is left out"
        return make_rivals(self._whole, self._dtype, self._group, ways, left_out)

    def measure(self) -> list[dict[str, Any]]:
        """Check the contenders and measure all cases; the rows, the same on all ranks."""
        self._say(self._headline())
        for name, why in self._rivals.left_out.items():
            self._say(f"# left out: {name} ({why})")
        if self._options.shard == 1:
            self._check()
        rows: list[dict[str, Any]] = []
        for case in self._options.cases():
            if self._time_is_over():
                self._say(f"{case}: {self._over}")
                continue
            found = rows_of(self._common(), case, self._case(case), self._roofs)
            self._say("\n".join(case_lines(case, found)))
            rows += found
            if self._options.csv and self._first_rank:
                write_csv(self._options.csv, rows)  # after each case: a run may be ended before its last
        if self._options.profile:
            self._profile(self._options.profile)
        return rows

    def _profile(self, file: str) -> None:
        """Write where our contenders' time goes, after all figures are written: a profiler slows down what follows."""
        rows: list[dict[str, Any]] = []
        for case in self._options.cases():
            calls = self._options.steps if case.what == "decode" else 1
            sizes = {**case._asdict(), "lengths": "+".join(map(str, case.lengths))}
            for name in self._ours:
                if self._time_is_over():
                    return
                if name in self._unchecked:
                    continue
                found, failure = self._tried(name, partial(self._profile_one, name, case, calls))
                self._close_all()
                if found is None:
                    print(f"# {name} was not profiled: {failure}", flush=True)
                    continue
                whole = found.busy + found.gaps
                launches = sum(count for count, _ in found.kernels.values())
                print(f"# {case}, {name}: {launches:.0f} kernels, busy {found.busy:.0f} of {whole:.0f} us", flush=True)
                rows += profile_rows({**self._common(), **sizes, "contender": name}, found)
                write_csv(file, rows)

    def _profile_one(self, name: str, case: Case, calls: int) -> Profile:
        turn = self._turn(name, case)
        turn.reset()
        return profiled(turn.play, calls, self._device.type == "cuda")

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Judge what every contender writes; where communication is switched off there is nothing to judge."""
        generator = torch.Generator().manual_seed(11)
        ids = torch.randint(0, self._shapes_whole.vocab, (CHECK_BATCH, CHECK_TOKENS), generator=generator)
        ids = ids.to(self._device)
        mixed = [ids[0, :length] for length in _CHECK_MIXED] if "mixed" in self._options.what else []
        for kind in dict.fromkeys(["none", *self._options.quantize]):
            written = {}
            for name, contender in self._contenders.items():
                model, its_kind, off = self._ours.get(name, (self._whole, "none", ""))
                if its_kind != kind or name == off or name in self._unchecked:
                    continue
                prompts = [] if name in self._rivals.decode_only else mixed
                tokens, failure = self._tried(name, partial(_written, contender, ids, prompts))
                contender.close()
                if tokens is None:
                    self._unchecked[name] = failure
                else:
                    written[name], of = tokens, model
            if written:
                self._judge(ids, mixed, written, FullWeights(of, kind, self._dtype))
            self._close_all()

    def _judge(
        self,
        ids: torch.Tensor,
        mixed: Sequence[torch.Tensor],
        written: Mapping[str, torch.Tensor],
        weights: FullWeights,
    ) -> None:
        judged = [Verdict(0.0, 0.0)] * len(written)
        if self._first_rank:
            reference, same_dtype = weights.model(torch.float32), weights.model(self._dtype)
            judged = [_judged(ids, mixed, tokens, reference, same_dtype) for tokens in written.values()]
        for (name, tokens), verdict in zip(written.items(), judged, strict=True):
            if self._group is not None:
                shared = self._group.broadcast(torch.tensor(verdict, dtype=torch.float64), 0)
                everyone = self._group.all_gather(tokens.cpu().unsqueeze(0))
                agree = bool((everyone == everyone[0]).all())
                verdict = Verdict(float(shared[0]) if agree else math.inf, float(shared[1]))
            self._verdicts[name] = verdict
            if not verdict.good:
                self._say(f"# WRONG: {name} is {verdict.error:.3g} below the best logit, {verdict.allowed:.3g} allowed")

    def _tried(self, name: str, call: Callable[[], Any]) -> tuple[Any, str]:
        """(what ``call`` returns, ""), or (None, why it failed). With several ranks a failure of ours is everyone's."""
        if self._group is not None and name in self._ours:
            return call(), ""  # others wait for this rank inside it: nothing could follow
        value, failure = tried_on_all(call, self._group, name)
        if failure:
            self._contenders[name].close()
            release()
        return value, failure

    def _close_all(self) -> None:
        """Close all contenders and give back what they held."""
        for contender in self._contenders.values():
            contender.close()
        release()
        if self._device.type == "cuda":
            # With the last graph of this process gone, or later graphs would run out of counters and zero their own.
            counters.forget_captures()

    # ---- cases -----------------------------------------------------------------------------------------------------

    def _case(self, case: Case) -> dict[str, Entry]:
        entries = {name: self._entry(name, case) for name in self._contenders if self._takes_part(name, case)}
        turns = {}
        for name, entry in entries.items():
            entry.failure = self._unchecked.get(name, "")
            if not entry.failure and turns and self._time_is_over():
                entry.failure = self._over
            if not entry.failure:
                turns[name], entry.failure = self._tried(name, partial(self._turn, name, case))
            if entry.failure:
                turns.pop(name, None)
            else:
                entry.mode = turns[name].mode if self._device.type == "cuda" else "host"
        calls = self._options.steps if case.what == "decode" else 1
        for name, timing in self._time(turns, calls).items():
            entries[name].timing = timing
        turns.clear()
        self._close_all()
        return entries

    def _takes_part(self, name: str, case: Case) -> bool:
        return case.what == "decode" or name not in self._rivals.decode_only

    def _turn(self, name: str, case: Case) -> Turn:
        """The turn of a contender, after one that compiles and captures what it needs."""
        contender = self._contenders[name]
        if self._group is not None:
            self._group.barrier()
        if case.what == "decode":
            turn = contender.decode(case.batch, case.context, self._options.steps)
        else:
            generator = torch.Generator().manual_seed(12)
            # Of this rank's words, since without sums there are zeros for all others: a GPU multiplies these faster.
            words = self._whole.model.embed_tokens.vocab_range
            ids = torch.randint(words.start, words.stop, (case.batch, case.tokens), generator=generator)
            silent = name in self._ours and name == self._ours[name][2]
            if self._group is not None and not silent:
                ids = self._group.broadcast(ids, 0)
            ids = ids.to(self._device)
            if case.what == "prefill":
                turn = contender.prefill(ids)
            else:
                turn = contender.prefill_mixed([row[:n] for row, n in zip(ids, case.lengths, strict=True)])
        turn.reset()
        turn.play()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return turn

    def _time(self, turns: Mapping[str, Turn], calls: int) -> dict[str, Timing]:
        if not turns:
            return {}
        plays, resets = ({name: getattr(turn, of) for name, turn in turns.items()} for of in ("play", "reset"))
        rounds = self._options.rounds
        if self._device.type == "cuda":
            return time_turns(plays, calls, rounds, resets=resets, group=self._group, symm=self._symm)

        def before(name: str) -> None:
            resets[name]()
            if self._group is not None:
                self._group.barrier()

        seconds = interleaved(plays, rounds=rounds, warmup=1, before=before)
        slowest = torch.tensor([seconds[name] for name in plays], dtype=torch.float64) / calls
        if self._group is not None:
            slowest = self._group.all_reduce(slowest, "max")
        return {name: Timing.of(column) for name, column in zip(plays, slowest.tolist(), strict=True)}

    def _entry(self, name: str, case: Case) -> Entry:
        options, layers = self._options, self._config.num_hidden_layers
        model, kind, off = self._ours.get(name, (self._whole, "none", ""))
        ours = name in self._ours
        entry = Entry(ours, kind, verdict=self._verdicts.get(name), off=off)
        if self._group is not None:
            entry.sums = name.split()[0] if ours else self._rivals.sums[name]
        entry.bytes = weight_bytes(_tensors(model), model.model.embed_tokens.weight, case.new_tokens)
        if case.what == "decode":
            entry.bytes += kv_bytes(self._shapes, layers, case.batch, case.context, self._dtype.itemsize)
        else:
            lengths = case.lengths or (case.tokens,) * case.batch
            entry.flops = sum(prefill_flops(self._shapes, layers, 1, tokens) for tokens in lengths)
        if ours and name.split()[0] == self._aimed:
            entry.goal = goal_of(
                torch.cuda.get_device_name() if self._device.type == "cuda" else "",
                options.model,
                case.what,
                tp=options.tp,
                shard=options.shard,
                ranks_per_gpu=one_gpu.ranks_on_this_gpu(),
                quantize=kind,
                dtype=options.dtype,
                layers=layers,
                batch=case.batch,
                tokens=case.tokens,
                context=case.context,
            )
        return entry

    # ---- the rest --------------------------------------------------------------------------------------------------

    @property
    def _over(self) -> str:
        return f"left out, --minutes {self._options.minutes:g} were over"

    @property
    def _shapes_whole(self) -> Any:
        return MODELS[self._options.model]

    @property
    def _first_rank(self) -> bool:
        return self._group is None or self._group.rank == 0

    def _say(self, text: str) -> None:
        if self._first_rank:
            print(text, flush=True)

    def _headline(self) -> str:
        options, layers = self._options, self._config.num_hidden_layers
        text = f"{options.model}, {layers} layers, {options.dtype}, tp {options.tp}"
        if options.shard > 1:
            text += f", one shard of {options.shard} without communication"
        if self._roofs is not None:
            text += f"; roofs now: copy {self._roofs.copy / 1e12:.2f} TB/s, cuBLAS bf16 8192^3 "
            text += f"{self._roofs.matmul / 1e12:.0f} TFLOP/s"
        return text

    def _time_is_over(self) -> bool:
        over = torch.tensor([int(time.monotonic() - self._started > 60 * self._options.minutes)])
        return bool(over if self._group is None else self._group.all_reduce(over, "max"))

    def _common(self) -> dict[str, Any]:
        on_gpu = self._device.type == "cuda"
        return {
            "model": self._options.model,
            "tp": self._options.tp,
            "shard": self._options.shard,
            "ranks_per_gpu": one_gpu.ranks_on_this_gpu() if on_gpu else 0,
            "mps": int(on_gpu and one_gpu.has_mps()),
            "dtype": self._options.dtype,
            "layers": self._config.num_hidden_layers,
        }


def _written(contender: Contender, ids: torch.Tensor, mixed: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a contender writes after ``ids``, and then the first tokens that it writes after ``mixed``, in one row."""
    tokens = contender.generate(ids, _CHECK_STEPS).flatten()
    if not mixed:
        return tokens
    contender.close()
    return torch.cat((tokens, contender.first_tokens(mixed)))


def _judged(
    ids: torch.Tensor, mixed: Sequence[torch.Tensor], written: torch.Tensor, reference: Any, same_dtype: Any
) -> Verdict:
    """The verdict on what ``_written`` returned: the worst of its parts."""
    count = ids.shape[0] * (_CHECK_STEPS + 1)
    found = [judge(ids, written[:count].view(ids.shape[0], -1), reference, same_dtype)]
    for prompt, token in zip(mixed, written[count:], strict=False):  # none of those that run no prompts
        found.append(judge(prompt.unsqueeze(0), token.view(1, 1), reference, same_dtype))
    return next((verdict for verdict in found if not verdict.good), found[0])


def _tensors(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
