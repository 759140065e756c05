"""Tier: GPU. The engine's graphs against its eager steps and against the CPU, world size 1."""

import copy
import gc

import pytest
import torch

from tp_kernels.inference.decode_plan import DecodePlan
from tp_kernels.inference.engine import DecodeEngine
from tp_kernels.inference.generation import generate
from tp_kernels.inference.sampling import SamplingParams
from tp_kernels.layers import quantize_model
from tp_kernels.models import ModelConfig, ParallelCausalLM

pytestmark = pytest.mark.gpu

LENGTHS = (3, 70, 1, 130, 17)
NEW_TOKENS = 24
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=20),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=64),
}


def model_of(family, **changes):
    """Weights as large as those of ``tiny_models``: attention far from uniform, logits far from equal."""
    sizes = dict(vocab_size=1001, hidden_size=256, intermediate_size=336, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512)
    config = {"model_type": family, **sizes, **heads, "eos_token_id": None, **FAMILIES[family], **changes}
    model = ParallelCausalLM(ModelConfig.from_hf(config), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * 1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


def prompts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 1001, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_fp32_are_those_of_the_cpu(family):
    model = model_of(family)
    assert DecodePlan.why_not(model, len(LENGTHS)) is None
    expected = generate(model, prompts(), max_new_tokens=NEW_TOKENS, stop_ids=())
    on_gpu = copy.deepcopy(model).cuda()
    for chunk in (None, 50):
        ours = generate(on_gpu, prompts(), max_new_tokens=NEW_TOKENS, stop_ids=(), prefill_chunk=chunk)
        assert ours.decode_path == "graph"
        for row, (mine, theirs) in enumerate(zip(ours.output_ids, expected.output_ids, strict=True)):
            same = next((at for at, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), None)
            assert same is None, (
                f"row {row} differs from token {same} on; top logits: {margin(model, row, theirs, same)}"
            )


def margin(model, row, tokens, at):
    """The best two logits of a row in fp32 on the CPU: whether they were too close to compare."""
    with torch.no_grad():
        logits = model(torch.tensor([prompts()[row] + tokens[:at]]), logits="last")[0]
    return logits.topk(2).values.tolist()


@pytest.mark.parametrize("family, kind", [*((family, None) for family in FAMILIES), ("llama", "int8")])
def test_graphs_give_the_tokens_of_eager_steps(family, kind):
    model = model_of(family).to("cuda", torch.bfloat16)
    if kind is not None:
        quantize_model(model, kind)
    # Greedy last: before it, each way to draw drops all the graphs that there are.
    ways = [SamplingParams(0.9, seed=3), SamplingParams(0.8, top_k=40, top_p=0.9, seed=4), SamplingParams()]
    limits = [NEW_TOKENS, 9, 17, NEW_TOKENS, 5]
    found = {}
    for capture in (False, True):
        with DecodeEngine(model, max_batch=6, max_len=256, page_size=16, capture=capture) as engine:
            found[capture] = [
                engine.generate(prompts(), limits, sampling=each, chunk=chunk).output_ids
                for each in ways
                for chunk in (None, 64)
            ]
            assert engine.path == ("graph" if capture else "eager: capture=False")
    # The same kernels on the same numbers.
    assert found[True] == found[False]


def test_every_batch_size_of_a_model_decodes_the_same_rows():
    """Padded rows disturb nobody: a row's tokens are those that it has in an engine with another ladder."""
    model = model_of("llama").to("cuda", torch.bfloat16)
    rows = prompts()[:3]
    with DecodeEngine(model, max_batch=3, max_len=256, batch_sizes=(3,), capture=True) as engine:
        exact = engine.generate(rows, [NEW_TOKENS] * 3).output_ids
    with DecodeEngine(model, max_batch=8, max_len=256, batch_sizes=(4, 8), capture=True) as engine:
        engine.capture()
        with torch.inference_mode():
            engine.cache.keys[:, 1:] = torch.nan
            engine.cache.values[:, 1:] = torch.nan
        padded = engine.generate(rows, [NEW_TOKENS] * 3).output_ids
        # The first token comes from the same prefill; later ones may part where another batch size has other bits.
        assert [row[0] for row in padded] == [row[0] for row in exact]
        assert all(0 <= token < 1001 for row in padded for token in row)
        assert not engine.cache.keys[:, 0].any() and not engine.cache.values[:, 0].any()


def test_a_broken_model_is_an_error_and_the_next_call_works():
    model = model_of("llama").to("cuda", torch.bfloat16)
    expected = generate(model, [[1, 2, 3]], max_new_tokens=6, stop_ids=()).output_ids
    weight = model.model.norm.weight
    before = weight.detach().clone()
    for temperature in (0.0, 1.0):
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="NaN"):
            generate(model, [[1, 2, 3]], max_new_tokens=6, stop_ids=(), temperature=temperature)
        with torch.no_grad():
            weight.copy_(before)
    assert generate(model, [[1, 2, 3]], max_new_tokens=6, stop_ids=()).output_ids == expected


def test_memory_goes_with_the_model():
    left = []
    for _ in range(2):
        model = model_of("llama").to("cuda", torch.bfloat16)
        generate(model, prompts(), max_new_tokens=4, stop_ids=())
        del model
        gc.collect()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated())
    # What libraries and kernels keep for their next calls is there after the first model.
    assert left[1] - left[0] < 1 << 20


def test_hooks_are_seen_by_eager_steps_and_captured_ones():
    model = model_of("qwen3").to("cuda", torch.bfloat16)
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, out: out * 0.5)
    found = []
    for capture in (False, True):
        with DecodeEngine(model, max_batch=5, max_len=256, capture=capture) as engine:
            assert "modules: a ParallelMLP has forward hooks" in engine.path
            found.append(engine.generate(prompts(), [8] * 5).output_ids)
    assert found[0] == found[1]


def test_steps_without_prompts():
    with DecodeEngine(model_of("llama").to("cuda", torch.bfloat16), max_batch=4, max_len=512, capture=True) as engine:
        for rows in (1, 3, 4):
            engine.pretend_cached(rows, 300)
            for _ in range(20):
                engine.step()
            torch.cuda.synchronize()
            assert engine.cache.lengths.tolist() == [320] * rows + [0] * (4 - rows)
