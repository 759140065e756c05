"""Tier: CPU ranks. ``DecodeEngine`` at tp 1 to 3 against transformers' greedy tokens, and what it promises."""

import pytest
import torch

from tp_kernels.inference import engine as engine_module
from tp_kernels.inference.engine import DecodeEngine
from tp_kernels.inference.generation import generate
from tp_kernels.inference.paged_cache import OutOfPages
from tp_kernels.inference.sampling import SamplingParams
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.tiny_models import save_tiny_model

pytest.importorskip("transformers")

NAMES = ("llama-9h3-tied-rope3", "mistral-6h2-window", "qwen3-4h1")
LENGTHS = (3, 14, 1, 9)
LIMITS = (10, 4, 7, 10)
CHUNKS = (None, 1, 5)
SAMPLING = SamplingParams(0.9, top_k=20, top_p=0.95, seed=7)


def prompts_of(vocab):
    generator = torch.Generator().manual_seed(vocab)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, {name: transformers' model})."""
    folder = tmp_path_factory.mktemp("models")
    return folder, {name: save_tiny_model(name, folder) for name in NAMES}


def run_engines(group, folder):
    from tp_kernels.checkpoint import load_model

    torch.set_num_threads(1)
    results = {}
    for name in NAMES:
        model = load_model(folder / name, group=group, dtype=torch.float32, progress=False)
        prompts = prompts_of(model.config.vocab_size)
        results[name] = found = {}
        with DecodeEngine(model, max_batch=5, max_len=32, page_size=4, capture=False) as engine:
            for chunk in CHUNKS if group.world_size == 1 or name == NAMES[0] else (None,):
                found[chunk] = engine.generate(prompts, LIMITS, chunk=chunk).output_ids
            stop = found[None][0][3]
            found["stop"] = stop, engine.generate(prompts, LIMITS, stops=frozenset([stop]))
            if name == NAMES[0] or group.world_size == 1:
                sampled = engine.generate(prompts, [9] * 4, sampling=SAMPLING).output_ids
                options = dict(temperature=0.9, top_k=20, top_p=0.95, seed=7, max_new_tokens=9, stop_ids=())
                found["sampled"] = sampled, generate(model, prompts, **options).output_ids
                found["no seed"] = engine.generate(prompts, [9] * 4, sampling=SamplingParams(1.0)).output_ids
            found["free"] = engine.cache.free_pages == engine.cache.num_pages
            assert engine.path == "eager: capture=False"
        if name == NAMES[0]:
            with torch.no_grad():
                model.model.norm.weight.fill_(torch.nan)
            for sampling in (SamplingParams(), SAMPLING):
                with DecodeEngine(model, max_batch=2, max_len=8) as engine, pytest.raises(ValueError, match="NaN"):
                    engine.generate([[1, 2], [3]], [3, 3], sampling=sampling)
    return results


@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_tokens_on_any_number_of_ranks(models, rank_pool, world_size):
    folder, theirs = models
    ranks = rank_pool(world_size).run(run_engines, folder)
    for name, model in theirs.items():
        ours = ranks[0][name]
        check_greedy(model, prompts_of(model.config.vocab_size), ours[None])
        assert all(ours.get(chunk, ours[None]) == ours[None] for chunk in CHUNKS)
        for other in ranks:
            assert other[name][None] == ours[None] and other[name]["free"]
            assert other[name].get("no seed") == ours.get("no seed")
        stop, stopped = ours["stop"]
        for full, cut, reason in zip(ours[None], stopped.output_ids, stopped.finish_reasons, strict=True):
            assert cut == (full[: full.index(stop) + 1] if stop in full else full)
            assert reason == ("stop" if stop in full else "length")
        if "sampled" in ours:
            assert ours["sampled"][0] == ours["sampled"][1] != ours[None]


def check_greedy(model, prompts, outputs):
    """Every token is the one that transformers finds most likely after the ones before, and no other is close."""
    for prompt, output, limit in zip(prompts, outputs, LIMITS, strict=True):
        assert len(output) == limit
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2, dim=-1)
        assert output == best.indices[:, 0].tolist()
        assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-3, "two tokens are too close; change the prompts"


def tiny(group=None, dtype=None, **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = {"model_type": "llama", **sizes, "max_position_embeddings": 64, "eos_token_id": None, **changes}
    return ParallelCausalLM(ModelConfig.from_hf(config), group=group, dtype=dtype)


def gather(engine, tokens):
    for row, token in engine.read().items():
        tokens.setdefault(row, []).append(token)


def test_rows_come_and_go():
    model, prompts = tiny(), [[1, 2, 3], [4] * 9, [5, 6]]
    expected = generate(model, prompts, max_new_tokens=12, stop_ids=()).output_ids
    with DecodeEngine(model, max_batch=3, max_len=24, page_size=4, num_pages=9) as engine:
        assert engine.path == "eager: the model is on cpu"
        first = engine.prefill(prompts[:2], capacities=[14, 20])
        engine.step()
        tokens = {}
        for _ in range(2):
            gather(engine, tokens)
        engine.release(first[:1])  # its pages go to the next row
        (third,) = engine.prefill(prompts[2:], capacities=[13])
        assert engine.rows == [first[1], third]
        for _ in range(4):
            engine.step()
            gather(engine, tokens)
        gather(engine, tokens)
        assert tokens[first[0]] == expected[0][:2]
        assert tokens[first[1]] == expected[1][:6] and tokens[third] == expected[2][:5]
        engine.reset()
        assert engine.rows == [] and engine.cache.free_pages == 9
        assert engine.generate(prompts, [4, 4, 4]).output_ids == [row[:4] for row in expected]


def test_pages_run_out_and_the_engine_goes_on():
    model = tiny()
    expected = generate(model, [[1] * 7, [2] * 5], max_new_tokens=8, stop_ids=()).output_ids
    with DecodeEngine(model, max_batch=2, max_len=32, page_size=4, num_pages=5) as engine:
        with pytest.raises(OutOfPages, match="num_pages"):
            engine.prefill([[1] * 20, [2]])
        assert engine.rows == [] and engine.cache.free_pages == 5
        # Room for the prompts but not for all that follows: rows grow until a page is missing.
        with pytest.raises(OutOfPages):
            engine.generate([[1] * 7, [2] * 5], [8, 8])
        assert engine.rows == [] and engine.cache.free_pages == 5
        assert engine.generate([[1] * 7, [2] * 5], [5, 4]).output_ids == [expected[0][:5], expected[1][:4]]
        assert engine.generate([[2] * 5], [8]).output_ids == expected[1:]


def test_random_numbers_are_brought_in_parts(monkeypatch):
    monkeypatch.setattr(engine_module, "_DRAWS", 3)
    model, prompts = tiny(), [[1, 2], [3], [4, 5, 6]]
    options = dict(temperature=1.0, seed=5, max_new_tokens=11, stop_ids=())
    expected = generate(model, prompts, **options).output_ids
    with DecodeEngine(model, max_batch=3, max_len=16, page_size=8) as engine:
        limits = [4, 11, 8]  # rows leave between the parts
        output = engine.generate(prompts, limits, sampling=SamplingParams(1.0, seed=5)).output_ids
    assert output == [row[:limit] for row, limit in zip(expected, limits, strict=True)]


def hooked():
    model = tiny()
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, out: out * 2)
    return model


def gelu():
    model = tiny()
    model.model.layers[1].mlp.activation = "gelu"
    return model


@pytest.mark.parametrize("make, reason", [(hooked, "a ParallelMLP has forward hooks"), (gelu, "'gelu' is not fused")])
def test_modules_run_where_they_cannot_be_passed_by(make, reason):
    model, prompts = make(), [[1, 2, 3], [4]]
    expected = generate(model, prompts, max_new_tokens=6, stop_ids=()).output_ids
    with DecodeEngine(model, max_batch=2, max_len=16, page_size=4) as engine:
        assert engine.path.startswith("eager: the model is on cpu; modules: ") and reason in engine.path
        for chunk in (None, 2):
            assert engine.generate(prompts, [6, 6], chunk=chunk).output_ids == expected


def test_autocast_keeps_the_modules():
    with torch.autocast("cpu", dtype=torch.bfloat16), DecodeEngine(tiny(), max_batch=2, max_len=16) as engine:
        assert engine.path.endswith("modules: autocast is on")
        assert [len(row) for row in engine.generate([[1, 2], [3]], [4, 2]).output_ids] == [4, 2]


def test_pretended_prompts_decode():
    with DecodeEngine(tiny(dtype=torch.bfloat16), max_batch=3, max_len=40, page_size=16) as engine:
        assert engine.pretend_cached(2, 30) == [0, 1]
        for _ in range(7):  # more than are kept for the host
            engine.step()
        assert engine.cache.lengths.tolist() == [37, 37, 0] and engine.pending == 4
        with pytest.raises(ValueError, match="tokens of 3 launches were not read"):
            engine.read()
        assert all(0 <= token < 50 for token in engine.read().values())
        for _ in range(3):
            engine.step()
        with pytest.raises(ValueError, match="max_len=40"):
            engine.step()


def test_bad_input_is_named():
    model = tiny()
    for options, message in (
        ({"max_batch": 257}, "max_batch"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_len": 65}, "max_position_embeddings"),
        ({"max_len": 0}, "max_len"),
        ({"page_size": 3}, "page_size"),
        ({"batch_sizes": [1, 3]}, "batch_sizes"),
        ({"batch_sizes": [2, 1]}, "batch_sizes"),
        ({"capture": True}, "capture=True: the model is on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            DecodeEngine(model, **{"max_batch": 2, "max_len": 8, **options})
    engine = DecodeEngine(model, max_batch=2, max_len=8)
    for call, message in (
        (lambda: engine.prefill([]), "at least one prompt"),
        (lambda: engine.prefill([[1], []]), "at least one token"),
        (lambda: engine.prefill([[50]]), "tokens in"),
        (lambda: engine.prefill([[1] * 9]), "max_len=8"),
        (lambda: engine.prefill([[1]] * 3), "max_batch=2"),
        (lambda: engine.prefill([[1]], capacities=[1, 2]), "capacity"),
        (lambda: engine.prefill([[1]], chunk=0), "chunk"),
        (lambda: engine.step(), "no rows"),
        (lambda: engine.read(), "nothing was launched"),
        (lambda: engine.release([3]), "rows in use"),
        (lambda: engine.generate([[1]], [0]), "limit"),
        (lambda: engine.pretend_cached(3, 1), "rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert engine.rows == [] and engine.cache.free_pages == engine.cache.num_pages
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="outside autocast"):
        engine.prefill([[1]])
    engine.prefill([[1]])
    with pytest.raises(ValueError, match="only greedy rows"):
        engine.prefill([[1]], sampling=SAMPLING)
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.step()


def kept_engines(group):
    """What a rank finds when only one of them has new addresses."""
    from tp_kernels.inference.engines import engine_for

    model, seen = tiny(group), []
    with engine_for(model, [8]) as engine:
        seen.append(engine)
    with engine_for(model, [9]) as engine:
        seen.append(engine)
    if group.rank == 1:
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
    with engine_for(model, [9]) as engine:
        seen.append(engine)
        output = engine.generate([[1, 2, 3]], [5]).output_ids
    return seen[0] is seen[1], seen[1] is seen[2], output


def test_ranks_agree_on_when_an_engine_can_be_used_again(rank_pool):
    expected = generate(tiny(), [[1, 2, 3]], max_new_tokens=5, stop_ids=()).output_ids
    assert rank_pool(2).run(kept_engines) == [(True, False, expected)] * 2
