"""Tier: CPU ranks. ``generate`` at tp 1 to 4 against transformers' greedy tokens, its own promises, and SmolLM2."""

import pytest
import torch

from tp_kernels.checkpoint.demo_model import smollm2_path
from tp_kernels.inference.generation import generate
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.tiny_models import TINY_MODELS, save_tiny_model

transformers = pytest.importorskip("transformers")

NEW_TOKENS = 16
WORLD_SIZES = (1, 2, 3, 4)
LENGTHS = (3, 14, 1, 9)


def prompts_for(name):
    generator = torch.Generator().manual_seed(len(name) + 1)
    vocab = TINY_MODELS[name][1]["vocab_size"]
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def hf_greedy(model, prompt, new_tokens):
    """(tokens, smallest margin between the best two logits) of transformers, without stop tokens."""
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        logits = model(out).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2, dim=-1).values
    return out[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).min().item()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(folder of saved models, {name: transformers' greedy tokens of every prompt})."""
    folder = tmp_path_factory.mktemp("models")
    tokens = {}
    for name in TINY_MODELS:
        model = save_tiny_model(name, folder)
        rows = [hf_greedy(model, prompt, NEW_TOKENS) for prompt in prompts_for(name)]
        assert min(margin for _, margin in rows) > 1e-3, f"{name}: two tokens are too close to compare; change the seed"
        tokens[name] = [row for row, _ in rows]
    return folder, tokens


# What does not depend on the family is tried with one model where several ranks share few cores.
EXAMPLE = "mistral-6h2-window"


def generate_everything(group, folder):
    """What the tests below look at, for every model, in one visit to the ranks."""
    from tp_kernels.checkpoint import load_model

    torch.set_num_threads(1)
    results = {}
    for name in TINY_MODELS:
        model = load_model(folder / name, group=group, dtype=torch.float32, progress=False)
        prompts = prompts_for(name)
        streamed = []
        options = dict(max_new_tokens=NEW_TOKENS, stop_ids=())
        batch = generate(model, prompts, on_token=lambda row, token, s=streamed: s.append((row, token)), **options)
        results[name] = {"batch": batch, "streamed": streamed}
        if name != EXAMPLE and group.world_size > 1:
            continue
        stop = batch.output_ids[1][4]
        sampling = dict(temperature=0.9, top_k=20, top_p=0.95, max_new_tokens=10, stop_ids=())
        results[name] |= {
            "single": [generate(model, [prompt], **options).output_ids[0] for prompt in prompts],
            "chunked": generate(model, prompts, prefill_chunk=4, **options).output_ids,
            "stop": stop,
            "stopped": generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=[stop]),
            "sampled": generate(model, prompts, seed=7, **sampling).output_ids,
            "sampled again": generate(model, prompts, seed=7, **sampling).output_ids,
            "other seed": generate(model, prompts, seed=8, **sampling).output_ids,
            "no seed": generate(model, prompts, **sampling).output_ids,
        }
    return results


_results = {}


@pytest.fixture
def results(oracle, rank_pool, world_size):
    if world_size not in _results:
        _results[world_size] = rank_pool(world_size).run(generate_everything, oracle[0])
    return _results[world_size]


def detailed(results):
    """(name, results of that model on rank 0) where more than the plain batch was tried."""
    return [(name, ours) for name, ours in results[0].items() if "single" in ours]


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_greedy_tokens_equal_transformers(results, oracle, name, world_size):
    expected = oracle[1][name]
    for rank, by_model in enumerate(results):
        batch, streamed = by_model[name]["batch"], by_model[name]["streamed"]
        assert batch.output_ids == expected, f"rank {rank} differs from transformers"
        assert batch.finish_reasons == ["length"] * len(LENGTHS)
        assert batch.prompt_ids == prompts_for(name)
        for row, tokens in enumerate(expected):
            assert [token for r, token in streamed if r == row] == tokens


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_ragged_batch_equals_its_rows_and_its_chunks(results, oracle, world_size):
    for name, ours in detailed(results):
        assert ours["single"] == oracle[1][name]
        assert ours["chunked"] == oracle[1][name]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sampling_repeats_on_any_number_of_ranks(results, rank_pool, oracle, world_size):
    if 1 not in _results:
        _results[1] = rank_pool(1).run(generate_everything, oracle[0])
    for name, ours in detailed(results):
        assert ours["sampled"] == ours["sampled again"] != ours["other seed"]
        assert ours["sampled"] == _results[1][0][name]["sampled"]
        # Without a seed rank 0 chooses; nobody else can know, and all must agree.
        assert all(by_model[name]["no seed"] == ours["no seed"] for by_model in results)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rows_end_at_stop_tokens_and_leave_the_batch(results, oracle, world_size):
    for name, ours in detailed(results):
        stop, stopped = ours["stop"], ours["stopped"]
        for row, full in enumerate(oracle[1][name]):
            cut = full.index(stop) + 1 if stop in full else len(full)
            assert stopped.output_ids[row] == full[:cut]
            assert stopped.finish_reasons[row] == ("stop" if stop in full else "length")


@pytest.mark.parametrize("world_size", (2,))
def test_times_and_memory_are_reported(results, world_size):
    for name in TINY_MODELS:
        batch = results[0][name]["batch"]
        assert batch.prefill_ms > 0 and batch.decode_ms_per_token > 0 and batch.tokens_per_second > 0
        assert len(batch.step_ms) == NEW_TOKENS - 1 and batch.cache_bytes > 0


def disagree(group):
    model = tiny(group)
    with pytest.raises(ValueError, match="different prompts"):
        generate(model, [[1, 2, 3 + group.rank]], max_new_tokens=2)
    return generate(model, [[1, 2, 3]], max_new_tokens=2, stop_ids=()).output_ids


def tiny(group=None, **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = {"model_type": "llama", **sizes, "max_position_embeddings": 16, "eos_token_id": None, **changes}
    return ParallelCausalLM(ModelConfig.from_hf(config), group=group)


def test_ranks_with_different_prompts_are_told(rank_pool):
    first, second = rank_pool(2).run(disagree)
    assert first == second


def break_logits(group):
    model = tiny(group)
    with torch.no_grad():
        next(model.model.norm.parameters()).fill_(torch.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN"):
            generate(model, [[1, 2]], max_new_tokens=2, temperature=temperature)


def test_nan_logits_end_all_ranks(rank_pool):
    break_logits(None)
    rank_pool(2).run(break_logits)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 17], {}, "max_position_embeddings"),
        ([[1, 50]], {}, "vocabulary"),
        ([[-1]], {}, "vocabulary"),
        ([1, 2], {}, "list of lists"),
        (["text"], {}, "list of lists"),
        ([[1.5]], {}, "list of lists"),
        ([[1]], {"stop_ids": 2}, "stop_ids"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ([[1]], {"temperature": 1.0, "top_k": -3}, "top_k"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_bad_input_is_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), prompts, **{"max_new_tokens": 2, **options})


def test_generation_ends_at_the_last_position():
    ended = generate(tiny(), [[1] * 3, [2] * 16], max_new_tokens=1000, stop_ids=())
    assert ended.finish_reasons == ["length", "length"]
    assert [len(row) for row in ended.output_ids] == [14, 1]  # the last token of a row needs no position


def test_stop_ids_default_to_the_models_own():
    free = generate(tiny(), [[1, 2]], max_new_tokens=6, stop_ids=()).output_ids[0]
    stopped = generate(tiny(eos_token_id=[49, free[2]]), [[1, 2]], max_new_tokens=6)
    assert stopped.output_ids[0] == free[: free.index(free[2]) + 1] and stopped.finish_reasons == ["stop"]


def test_an_interrupt_passes_through():
    def interrupt(row, token):
        raise KeyboardInterrupt

    model = tiny()
    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1]], max_new_tokens=3, on_token=interrupt)
    assert len(generate(model, [[1]], max_new_tokens=3, stop_ids=()).output_ids[0]) == 3


def test_a_batch_leaves_no_gradient_and_keeps_the_mode():
    model = tiny().train()
    generate(model, [[1, 2]], max_new_tokens=2)
    assert model.training and all(p.grad is None for p in model.parameters())


# The real thing -----------------------------------------------------------------------------------------------------

# "The capital of France is", "Once upon a time, there was a little"
SMOL_PROMPTS = [[504, 3575, 282, 4649, 314], [6403, 1980, 253, 655, 28, 665, 436, 253, 1838]]


def run_smollm2(group, path):
    from tp_kernels.checkpoint import load_model

    torch.set_num_threads(1)
    model = load_model(path, group=group, dtype=torch.float32, progress=False)
    return generate(model, SMOL_PROMPTS, max_new_tokens=12).output_ids


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_says_the_same_on_1_2_and_3_ranks_and_in_transformers(rank_pool):
    try:
        path = smollm2_path()
    except FileNotFoundError as missing:
        pytest.skip(str(missing).splitlines()[0])
    if path.suffix != ".gguf":
        pytest.skip(f"transformers is given the GGUF file here, and {path} is not one")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = [hf_greedy(model.eval(), prompt, 12) for prompt in SMOL_PROMPTS]
    assert min(margin for _, margin in expected) > 1e-3
    tokens = [row for row, _ in expected]
    for world_size in (1, 2, 3):
        for ours in rank_pool(world_size).run(run_smollm2, path, timeout=120):
            assert ours == tokens, f"tp={world_size}"
