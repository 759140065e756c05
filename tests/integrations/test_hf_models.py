"""Tier: CPU ranks. Patched Hugging Face models at tp 1, 2, 3 against transformers: logits, tokens, gradients.

The models are those of ``tiny_models``: heads, vocabularies and widths that ranks do not divide, tied embeddings,
biases, windows shorter than the prompts, replicated KV heads. One visit to the ranks per world size serves all tests.
"""

import pytest
import torch

from tp_kernels.layers import full_gradients
from tp_kernels.testing.numeric import assert_close_to_reference, max_error
from tp_kernels.testing.tiny_models import TINY_MODELS, make_tiny_model

pytest.importorskip("transformers")

WORLD_SIZES = (1, 2, 3)
LENGTH, NEW = 13, 9
GREEDY = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)


def prompts(name):
    """(ids, mask): two prompts, the second of them four tokens shorter when the mask is used."""
    vocab = TINY_MODELS[name][1]["vocab_size"]
    ids = torch.randint(1, vocab, (2, LENGTH), generator=torch.Generator().manual_seed(len(name)))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def tiny(name, dtype=torch.float32):
    model = make_tiny_model(name)
    model.config._attn_implementation = "sdpa"
    return model.to(dtype)


def gradients_of(model, ids):
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return {key: p.grad for key, p in model.named_parameters()}


@pytest.fixture(scope="module")
def oracle():
    found = {}
    for name in TINY_MODELS:
        ids, mask = prompts(name)
        model, exact = tiny(name), tiny(name, torch.float64)
        found[name] = ours = {}
        ours["gradients"] = gradients_of(model, ids)
        ours["exact gradients"] = gradients_of(exact, ids)
        with torch.no_grad():
            outputs, wide = model(ids, output_hidden_states=True), exact(ids, output_hidden_states=True)
            ours["logits"], ours["exact logits"] = outputs.logits, wide.logits
            ours["hidden"], ours["exact hidden"] = torch.stack(outputs.hidden_states), torch.stack(wide.hidden_states)
            padded = dict(attention_mask=mask, use_cache=False)
            ours["padded logits"], ours["exact padded logits"] = (
                model(ids, **padded).logits,
                exact(ids, **padded).logits,
            )
        ours["tokens"] = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        ours["padded tokens"] = model.generate(ids, attention_mask=mask, **GREEDY)
        ours["beams"] = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
        half = tiny(name, torch.bfloat16)
        with torch.no_grad():
            ours["bf16 logits"] = half(ids).logits
            ours["exact bf16 logits"] = half.double()(ids).logits
    return found


def run_models(group, names):
    from tp_kernels.integrations import apply_tp_kernels

    results = {}
    for name in names:
        ids, mask = prompts(name)
        model = apply_tp_kernels(tiny(name), group)
        results[name] = found = {}
        gradients_of(model, ids)
        found["gradients"] = [full_gradients(model)]
        for reentrant in (True, False):
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            gradients_of(model, ids)
            found["gradients"].append(full_gradients(model))
        model.eval().gradient_checkpointing_disable()
        ones = torch.ones_like(ids)
        with torch.no_grad():
            outputs = model(ids, output_hidden_states=True)
            found["logits"], found["hidden"] = outputs.logits, torch.stack(outputs.hidden_states)
            found["padded logits"] = model(ids, attention_mask=mask, use_cache=False).logits
            found["last logits"] = model(ids, logits_to_keep=1).logits
        found["tokens"] = model.generate(ids, attention_mask=ones, **GREEDY)
        found["padded tokens"] = model.generate(ids, attention_mask=mask, **GREEDY)
        found["beams"] = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
        found["static"] = model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
        torch.manual_seed(5)
        found["sampled"] = model.generate(
            ids, attention_mask=ones, max_new_tokens=NEW, do_sample=True, eos_token_id=None
        )
        with torch.inference_mode():
            shared = model.tp_causal_lm()
            found["shared"] = shared(found["tokens"])
        model.to(torch.bfloat16)
        with torch.no_grad():
            found["bf16 logits"] = model(ids).logits
        assert shared is not model.tp_causal_lm(), "the parameters have moved"
        attention = model.model.layers[0].self_attn
        assert attention.joined()[0].data_ptr() == attention.q_proj.weight.data_ptr(), "packed again after .to()"
        found["kept"] = model.tp_report.kept
    return results


_results = {}


@pytest.fixture
def results(rank_pool, world_size):
    if world_size not in _results:
        names = list(TINY_MODELS)
        _results[world_size] = (
            [run_models(None, names)] if world_size == 1 else rank_pool(world_size).run(run_models, names)
        )
    return _results[world_size]


EVERYWHERE = [pytest.mark.parametrize("name", TINY_MODELS), pytest.mark.parametrize("world_size", WORLD_SIZES)]


def everywhere(test):
    for mark in EVERYWHERE:
        test = mark(test)
    return test


@everywhere
def test_logits_and_hidden_states_equal_transformers(results, oracle, name, world_size):
    expected = oracle[name]
    for by_model in results:
        ours = by_model[name]
        for kind in ("logits", "hidden", "padded logits", "bf16 logits"):
            theirs, exact = expected[kind], expected[f"exact {kind}"]
            actual = ours[kind]
            if kind == "padded logits":  # what stands at padding means nothing
                keep = prompts(name)[1].bool()
                actual, theirs, exact = actual[keep], theirs[keep], exact[keep]
            assert_close_to_reference(actual, theirs, exact, name=kind)
            assert torch.equal(ours[kind], results[0][name][kind]), "ranks disagree"
        assert torch.equal(ours["last logits"].argmax(-1), ours["logits"][:, -1:].argmax(-1))


@everywhere
def test_generated_tokens_equal_transformers(results, oracle, name, world_size):
    for by_model in results:
        ours = by_model[name]
        for kind in ("tokens", "padded tokens", "beams"):
            assert torch.equal(ours[kind], oracle[name][kind]), kind
        assert torch.equal(ours["static"], oracle[name]["padded tokens"])
        assert torch.equal(ours["sampled"], results[0][name]["sampled"])
        greedy = ours["shared"].argmax(-1)[:, LENGTH - 1 : -1]
        assert torch.equal(greedy, oracle[name]["tokens"][:, LENGTH:]), "of tp_causal_lm()"


@everywhere
def test_gradients_equal_transformers(results, oracle, name, world_size):
    exact, single = oracle[name]["exact gradients"], oracle[name]["gradients"]
    # Some gradients are small differences of large ones (those of key biases vanish but for the rotation): what is
    # rounded is at the scale of the whole model, where PyTorch's worst gradient shows what fp32 can do.
    errors = {key: max_error(single[key], reference) for key, reference in exact.items()}
    plain_and_checkpointed = [gradients for by_model in results for gradients in by_model[name]["gradients"]]
    for ours in plain_and_checkpointed:
        assert set(exact) <= set(ours)
        for key, reference in exact.items():
            error = max_error(ours[key], reference)
            assert error <= max(2 * errors[key], *errors.values()), f"gradient of {key}"


@pytest.mark.parametrize("world_size", [2])
def test_the_report_names_nothing_that_could_have_been_replaced(results, world_size):
    for name in TINY_MODELS:
        kept = dict(results[0][name]["kept"])
        assert not [what for what in kept if "proj" in what or what in ("swiglu", "attention", "norms", "linear")]
