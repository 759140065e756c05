"""Tier: no device. What is recorded and replayed, with a tape of operators in the place of a CUDA graph.

Like a graph, the tape holds operators, the buffers they were given and the numbers that the host had at the time; and
like a graph it knows nothing of what the host thinks by the time it is played.
"""

import gc
import json
import warnings
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tp_kernels.inference import engine as engine_module
from tp_kernels.inference import engines, generation
from tp_kernels.inference.device_sampling import choose_greedily
from tp_kernels.inference.engine import DecodeEngine
from tp_kernels.inference.engines import engine_for
from tp_kernels.inference.gpu_step import FusedStep
from tp_kernels.inference.paged_cache import PagedKVCache
from tp_kernels.inference.sampling import SamplingParams
from tp_kernels.inference.step_graph import BATCH_SIZES, CaptureFailed, ladder
from tp_kernels.layers import quantize_model
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import A100, H100, pretend
from tp_kernels.ops.kernels.launch import recording
from tp_kernels.ops.norm_linear import WEIGHT_PROPERTY

PROMPTS = [[1, 2, 3], [4] * 9, [5, 6]]
LIMITS = [2, 6, 4]


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = {"model_type": "llama", **sizes, "max_position_embeddings": 64, "eos_token_id": None, **changes}
    return ParallelCausalLM(ModelConfig.from_hf(config))


class Tape(TorchDispatchMode):
    """Operators as they were called, to be called again on the same buffers."""

    def __init__(self):
        super().__init__()
        self.calls, self.results = [], []
        self.number_of = {}  # of each result by identity; ``results`` keeps them alive meanwhile

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        numbers = tree_map(lambda x: _Made(self.number_of[id(x)]) if id(x) in self.number_of else x, (args, kwargs))
        result = function(*args, **kwargs)
        first = len(self.results)
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self.number_of[id(value)] = len(self.results)
                self.results.append(value)
        self.calls.append((function, numbers, first))
        return result

    def play(self):
        made = {}
        for function, numbers, first in self.calls:
            args, kwargs = tree_map(lambda x: made[x.number] if isinstance(x, _Made) else x, numbers)
            values = [v for v in tree_flatten(function(*args, **kwargs))[0] if isinstance(v, torch.Tensor)]
            made.update(enumerate(values, start=first))


class _Made:
    def __init__(self, number):
        self.number = number


class TapeRecorder:
    """Stands in for ``CudaRecorder``. Recording runs the step, which a capture does not: buffers are put back."""

    def __init__(self, engine):
        self.buffers = [engine.cache.keys, engine.cache.values, engine.cache.lengths]
        self.buffers += [engine._ids, engine._tokens, engine._draw]
        self.recorded = []

    def record(self, warm_up, function):
        before = [buffer.clone() for buffer in self.buffers]
        warm_up()
        assert all(torch.equal(buffer, values) for buffer, values in zip(self.buffers[2:], before[2:], strict=True)), (
            "a rehearsal left a trace"
        )
        with Tape() as tape:
            function()
        for buffer, values in zip(self.buffers, before, strict=True):
            buffer.copy_(values)
        tape.results.clear()
        self.recorded.append(function.args)
        return tape.play


def capturing(engine, recorder=None):
    """The engine, told that it can capture."""
    engine._graphs.reason, engine._graphs._recorder = None, recorder or TapeRecorder(engine)
    return engine


def engine_of(model, **changes):
    return DecodeEngine(model, **{"max_batch": 8, "max_len": 24, "page_size": 4, **changes})


def test_replays_give_the_tokens_of_steps():
    model = tiny()
    sampling = [SamplingParams(), SamplingParams(0.8, top_p=0.9, seed=3), SamplingParams(1.2, seed=4)]
    sampling.append(SamplingParams(1.2, seed=5))  # the same graphs: a seed is in the numbers that they are given
    with engine_of(model) as engine:
        expected = [engine.generate(PROMPTS, LIMITS, sampling=each).output_ids for each in sampling]
    with capturing(engine_of(model)) as engine:
        with torch.inference_mode():
            engine.cache.keys[:, 1:] = torch.nan  # what was never written must never matter
            engine.cache.values[:, 1:] = torch.nan
        recorder = engine._graphs._recorder
        for each, tokens in zip(sampling, expected, strict=True):
            for _ in range(2 if each.greedy else 1):
                assert engine.generate(PROMPTS, LIMITS, sampling=each).output_ids == tokens
        # Three rows in a graph of four, then two, then one; once for each way to choose.
        rules = [replace(each, seed=None) for each in sampling[:3]]
        assert recorder.recorded == [(size, rule) for rule in rules for size in (4, 2, 1)]
        assert engine.path == "graph"
        # Of the ways that draw, only the last one's graphs are kept.
        assert [(2, rule) in engine._graphs for rule in rules] == [True, False, True]
        assert not engine.cache.keys[:, 0].any() and not engine.cache.values[:, 0].any()


def test_all_sizes_are_recorded_on_request_the_largest_first():
    with capturing(engine_of(tiny(), max_batch=6)) as engine:
        engine.prefill(PROMPTS)
        engine.capture()
        recorded = engine._graphs._recorder.recorded
        assert [size for size, _ in recorded] == [6, 4, 2, 1]
        first = engine.read()
        engine.step()
        assert len(recorded) == 4 and first.keys() == engine.read().keys()
    assert ladder(6) == (1, 2, 4, 6) and ladder(1) == (1,) and ladder(256) == BATCH_SIZES and len(BATCH_SIZES) == 35


def test_recording_at_any_time_has_random_numbers(monkeypatch):
    monkeypatch.setattr(engine_module, "_DRAWS", 3)
    with capturing(engine_of(tiny(), max_batch=2)) as engine:
        engine.prefill([[1, 2]], sampling=SamplingParams(1.0, seed=1))
        engine.step()
        engine.step()
        engine.capture()  # all three have been drawn
        engine.step()
        assert engine.pending == 4


def test_modules_with_hooks_are_recorded_too():
    model = tiny()
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, out: out * 2)
    with engine_of(model) as engine:
        expected = engine.generate(PROMPTS, LIMITS).output_ids
    with capturing(engine_of(model)) as engine:
        assert engine.generate(PROMPTS, LIMITS).output_ids == expected
        assert engine.path == "graph; modules: a ParallelMLP has forward hooks"


def few_rows_table(path):
    """Write a table by which a decode step of ``kernel_model`` takes the launches it has on a GPU that was tuned."""

    def gemv(**sizes):
        config = {"block_n": 16, "block_k": 64, "num_warps": 1}  # few programs: they are interpreted
        return {"dtype": "16bit", "sizes": {"m": 2, **sizes}, "path": "gemv", "config": config, "us": {"gemv": 1.0}}

    kinds = WEIGHT_PROPERTY.values()
    ops = {
        "norm_linear": [gemv(n=n, k=64, weight=kind) for kind in kinds for n in (128, 64)],
        "norm_swiglu_linear": [gemv(n=48, k=64, weight=kind) for kind in kinds],
        "linear_residual": [gemv(n=64, k=k) for k in (64, 48)],
        "quantized_linear": [gemv(n=64, k=k, fp8=fp8) for k in (64, 48) for fp8 in (0, -1)],
    }
    path.write_text(json.dumps({"gpu": "imagined", "measured": "never", "ops": ops}))


def kernel_model(layers=2):
    """Sizes that the kernels for few rows take, weights large enough that tokens are far from equal."""
    changes = dict(model_type="mistral", sliding_window=5, num_key_value_heads=2, hidden_size=64, intermediate_size=48)
    model = tiny(vocab_size=64, num_hidden_layers=layers, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.half()


@pytest.fixture
def imagined_table(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    few_rows_table(tmp_path / "h100.json")
    tuning.forget_tables()
    yield
    tuning.forget_tables()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
@pytest.mark.parametrize("kind", [None, "int8"])
def test_kernels_give_the_tokens_of_pytorch(kind, imagined_table):
    """Every launch of prompts and steps, interpreted, as on an H100."""
    model = kernel_model(2 if kind is None else 1)
    if kind is not None:
        quantize_model(model, kind)
    limits = [2, 3, 1]
    with engine_of(model, max_batch=3) as engine:
        expected = engine.generate(PROMPTS, limits).output_ids
        with pretend(H100):
            assert engine.generate(PROMPTS, limits, chunk=7).output_ids == expected


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_a_layer_is_six_launches_on_one_rank(kind, imagined_table):
    model = kernel_model()
    if kind is not None:
        quantize_model(model, kind)
    model = model.to("meta")  # nothing runs: operators of PyTorch that compute are counted, our launches recorded
    cache = PagedKVCache.for_model(model, max_batch=1, max_len=64, page_size=64)
    tokens, ids = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    with torch.inference_mode(), pretend(H100):
        step, rows = FusedStep(model, 64), cache.rows(1)
        with recording() as launches, profile(activities=[ProfilerActivity.CPU]) as torchs:
            choose_greedily(tokens, ids, step.decode(ids, rows), model.group, model.lm_head.partition)
    layer = ["gemv", "qkv_rope", "decode", "gemv", "gemv", "gemv"]
    names = [launch.kernel.fn.__name__.strip("_").removesuffix("_kernel") for launch in launches]
    assert names == 2 * layer + ["gemv", "best_of_part", "best_of_row"]
    views = {"empty", "new_empty", "as_strided", "transpose", "reshape", "view", "unsqueeze", "slice"}
    assert {event.key.removeprefix("aten::") for event in torchs.key_averages()} - views == {"embedding"}


def test_cublas_adds_to_the_residual_stream_in_place():
    model = kernel_model(1).to("meta")
    cache = PagedKVCache.for_model(model, max_batch=1, max_len=64, page_size=64)
    with torch.inference_mode(), pretend(A100), recording():  # of which there is no table
        step, rows = FusedStep(model, 64), cache.rows(1)
        with profile(activities=[ProfilerActivity.CPU]) as torchs:
            step.decode(torch.zeros(1, dtype=torch.int64, device="meta"), rows)
    counts = {event.key: event.count for event in torchs.key_averages()}
    assert counts["aten::addmm_"] == 2


def test_the_host_is_one_step_ahead():
    with engine_of(tiny()) as engine:
        order = []

        def logged(name, call, *args, **kwargs):
            order.append(name)
            return call(*args, **kwargs)

        for name in ("prefill", "step", "read"):
            setattr(engine, name, partial(logged, name, getattr(engine, name)))
        engine.generate([[1, 2]], [5])
    assert " ".join(order) == "prefill read step step read step read step read read"


def test_steps_that_cannot_be_captured_run_eagerly():
    class Refusing:
        def record(self, warm_up, function):
            raise CaptureFailed("no such luck")

    model = tiny()
    with engine_of(model) as engine:
        expected = engine.generate(PROMPTS, LIMITS).output_ids
    with capturing(engine_of(model), Refusing()) as engine:
        with pytest.warns(UserWarning, match="without a CUDA graph: no such luck"):
            assert engine.generate(PROMPTS, LIMITS).output_ids == expected
        assert engine.path == "eager: no such luck"
    with capturing(engine_of(model), Refusing()) as engine:
        engine._graphs._must = True
        with pytest.raises(ValueError, match="capture=True: no such luck"):
            engine.generate(PROMPTS, LIMITS)


# Engines that are used again ----------------------------------------------------------------------------------------


def test_an_engine_is_kept_for_its_model():
    model = tiny()
    with engine_for(model, [10, 20]) as first, engine_for(model, [10]) as inner:
        assert inner is not first  # which is busy
    with engine_for(model, [30, 64]) as again:
        assert again is first and first.rows == []
    with engine_for(model, [64] * 3) as larger:
        assert larger is not first and first._closed
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with engine_for(model, [10]) as moved:
        assert moved is not larger and larger._closed
    model.model.layers[0].mlp.down_proj.overlap = "none"  # which graphs have captured
    with engine_for(model, [10]) as other:
        assert other is not moved and moved._closed
    with pytest.raises(RuntimeError, match="mine"), engine_for(model, [10]) as broken:
        raise RuntimeError("mine")
    assert broken._closed and model not in engines._idle
    with engine_for(model, [10]) as last:
        pass
    gone = weakref.ref(last)
    del last, model, first, inner, again, larger, moved, broken
    gc.collect()
    assert gone() is None


def test_many_prompts_run_in_batches(monkeypatch):
    model = tiny()
    prompts = [[1 + row, 2, 3][: 1 + row % 3] for row in range(5)]
    options = dict(max_new_tokens=6, stop_ids=(), temperature=0.9, seed=11)
    expected = generation.generate(model, prompts, **options)
    monkeypatch.setattr(generation, "MAX_BATCH", 2)
    streamed = []
    ours = generation._generate_on_engine(
        model,
        prompts,
        [6] * 5,
        frozenset(),
        SamplingParams(0.9, seed=11),
        lambda row, token: streamed.append((row, token)),
        None,
    )
    assert ours.output_ids == expected.output_ids and ours.prompt_ids == prompts
    assert ours.finish_reasons == ["length"] * 5 and len(ours.step_ms) == 15 and ours.prefill_ms > 0
    assert ours.decode_path == "eager: the model is on cpu" and ours.cache_bytes > 0
    assert [[token for r, token in streamed if r == row] for row in range(5)] == expected.output_ids


def test_generate_takes_what_makes_a_model():
    model = tiny()

    class Patched:
        def tp_causal_lm(self):
            return model

    options = dict(max_new_tokens=3, stop_ids=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = generation.generate(Patched(), PROMPTS, **options)
    assert ours.output_ids == generation.generate(model, PROMPTS, **options).output_ids
    with pytest.raises(ValueError, match="tp_causal_lm"):
        generation.generate(object(), PROMPTS, **options)
