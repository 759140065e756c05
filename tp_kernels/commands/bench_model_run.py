"""One run of ``tp-kernels bench model`` on one rank: the contenders, their checks, the cases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tp_kernels import one_gpu
from tp_kernels.commands.bench_model_ours import (
    EngineContender,
    FullWeights,
    make_model,
    plain_view,
    quantized,
    sharing,
)
from tp_kernels.commands.named_models import config_of
from tp_kernels.models import ModelConfig
from tp_kernels.ops.kernels import counters
from tp_kernels.testing.bench import Timing, interleaved, write_csv
from tp_kernels.testing.gpu_timer import measure_roofs, raise_if_lost
from tp_kernels.testing.model_bench.budget import goal_of, kv_bytes, prefill_flops, weight_bytes
from tp_kernels.testing.model_bench.check import Verdict, judge
from tp_kernels.testing.model_bench.contender import Contender, PlainContender, Turn, release
from tp_kernels.testing.model_bench.hf_rival import HFContender, hf_model
from tp_kernels.testing.model_bench.profile import Profile, profile_rows, profiled
from tp_kernels.testing.model_bench.report import Case, Entry, case_lines, rows_of
from tp_kernels.testing.op_bench.shapes import MODELS
from tp_kernels.testing.rank_bench import time_turns

__all__ = ["Run"]

_CHECK_BATCH, _CHECK_TOKENS, _CHECK_STEPS = 2, 17, 4
# A graph is for one token a row.
_DECODE_ONLY = ("torch graph", "torch graph one length")


class Run:
    """The models and contenders of one rank.

    Args:
        options: ``bench_model.Options``.
        groups: what our contenders communicate over, by name; with several ranks the first has it switched off, and the
            second is what goals are for.
        group: of the ranks, with a CPU transport; None for one rank.
        symm: a ``SymmetricMemoryCommunicator`` of the ranks, over which they meet on their GPUs; None elsewhere.
        device: of the models.
    """

    def __init__(self, options: Any, groups: Mapping[str, Any], group: Any, symm: Any, device: torch.device):
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
        if group is None:
            self._contenders |= self._rivals()

    def _rivals(self) -> dict[str, Contender]:
        plain = plain_view(self._whole)
        states: dict[tuple[int, int], Any] = {}
        found: dict[str, Contender] = {
            f"torch {how}": PlainContender(plain, how, states) for how in PlainContender.WAYS
        }
        if self._options.transformers and self._options.shard == 1:
            try:
                model = hf_model(self._config.model_type, _hf_sizes(self._config), plain)
                found["transformers"] = HFContender(model)
            except Exception as error:  # not installed, or of a version that wants to be called otherwise
                found["transformers"] = _NotMade(error)
        return found

    def measure(self) -> list[dict[str, Any]]:
        """Check the contenders and measure all cases; the rows, the same on all ranks."""
        self._say(self._headline())
        if self._options.shard == 1:
            self._check()
        rows: list[dict[str, Any]] = []
        for case in self._options.cases():
            if self._time_is_over():
                self._say(f"{case}: left out, --minutes {self._options.minutes:g} were over")
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
                rows += profile_rows({**self._common(), **case._asdict(), "contender": name}, found)
                write_csv(file, rows)

    def _profile_one(self, name: str, case: Case, calls: int) -> Profile:
        turn = self._turn(name, case)
        turn.reset()
        return profiled(turn.play, calls, self._device.type == "cuda")

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Judge what every contender writes; where communication is switched off there is nothing to judge."""
        generator = torch.Generator().manual_seed(11)
        ids = torch.randint(0, self._shapes_whole.vocab, (_CHECK_BATCH, _CHECK_TOKENS), generator=generator)
        ids = ids.to(self._device)
        for kind in dict.fromkeys(["none", *self._options.quantize]):
            written = {}
            for name, contender in self._contenders.items():
                model, its_kind, off = self._ours.get(name, (self._whole, "none", ""))
                if its_kind != kind or name == off:
                    continue
                tokens, failure = self._tried(name, partial(contender.generate, ids, _CHECK_STEPS))
                contender.close()
                if tokens is None:
                    self._unchecked[name] = failure
                else:
                    written[name], of = tokens, model
            if written:
                self._judge(ids, written, FullWeights(of, kind, self._dtype))
            self._close_all()

    def _judge(self, ids: torch.Tensor, written: Mapping[str, torch.Tensor], weights: FullWeights) -> None:
        judged = [Verdict(0.0, 0.0)] * len(written)
        if self._first_rank:
            reference, same_dtype = weights.model(torch.float32), weights.model(self._dtype)
            judged = [judge(ids, tokens, reference, same_dtype) for tokens in written.values()]
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
        """(what ``call`` returns, ""), or (None, why it failed). With several ranks a failure is everyone's."""
        try:
            return call(), ""
        except Exception as error:  # out of memory for one contender must not take the others' figures
            if self._group is not None:
                raise
            raise_if_lost(name)
            failure = f"{type(error).__name__}: {str(error)[:160]}"
        self._contenders[name].close()
        release()
        return None, failure

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
        return case.what == "decode" or name not in _DECODE_ONLY

    def _turn(self, name: str, case: Case) -> Turn:
        """The turn of a contender, after one that compiles and captures what it needs."""
        contender = self._contenders[name]
        if self._group is not None:
            self._group.barrier()
        if case.what == "prefill":
            generator = torch.Generator().manual_seed(12)
            # Of this rank's words, since without sums there are zeros for all others: a GPU multiplies these faster.
            words = self._whole.model.embed_tokens.vocab_range
            ids = torch.randint(words.start, words.stop, (case.batch, case.tokens), generator=generator)
            if self._group is not None and name != self._ours[name][2]:
                ids = self._group.broadcast(ids, 0)
            turn = contender.prefill(ids.to(self._device))
        else:
            turn = contender.decode(case.batch, case.context, self._options.steps)
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
        entry.bytes = weight_bytes(_tensors(model), model.model.embed_tokens.weight, case.batch * case.tokens)
        if case.what == "prefill":
            entry.flops = prefill_flops(self._shapes, layers, case.batch, case.tokens)
        else:
            entry.bytes += kv_bytes(self._shapes, layers, case.batch, case.context, self._dtype.itemsize)
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


class _NotMade:
    """In the place of a contender that could not be made: the check fails by why, and rows say it."""

    def __init__(self, error: Exception):
        self._error = error.with_traceback(None)

    def generate(self, ids: torch.Tensor, steps: int) -> torch.Tensor:
        raise self._error

    def close(self) -> None:
        pass


def _tensors(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _hf_sizes(config: ModelConfig) -> dict[str, Any]:
    """The same model in the words of transformers' configurations."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    sizes = {name: getattr(config, name) for name in names}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return sizes | ({"sliding_window": None} if config.model_type == "mistral" else {})
