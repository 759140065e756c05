"""Tier: GPU. Patched Hugging Face models on one rank against transformers on the same GPU: logits, gradients, text."""

import pytest
import torch

from tp_kernels.testing.numeric import assert_close_to_reference, max_error

transformers = pytest.importorskip("transformers")

from tp_kernels.integrations import apply_tp_kernels  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LENGTH, NEW = 45, 8
SIZES = dict(hidden_size=256, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "Llama": dict(tie_word_embeddings=True, attention_bias=True),
    "Mistral": dict(sliding_window=17),
    "Qwen2": dict(use_sliding_window=True, sliding_window=19, max_window_layers=1),
    "Qwen3": dict(head_dim=64),
}


def make(family, dtype):
    config = getattr(transformers, f"{family}Config")(
        **SIZES, vocab_size=515, max_position_embeddings=128, pad_token_id=0, **FAMILIES[family]
    )
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Wide enough that attention is far from uniform; norm weights and biases are random, too.
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 1.5 * noise / parameter.shape[1] ** 0.5)
    # Rounded first, so that the exact model of a dtype has that dtype's weights.
    return model.to(dtype).to(DEVICE)


def prompts():
    ids = torch.randint(1, 515, (2, LENGTH), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return ids, mask


def run(model, ids, mask):
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    return output.logits.detach(), padded, gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_in_bf16(family):
    ids, mask = prompts()
    theirs = run(make(family, torch.bfloat16), ids, mask)
    exact = run(make(family, torch.bfloat16).double(), ids, mask)
    model = apply_tp_kernels(make(family, torch.bfloat16))
    ours = run(model, ids, mask)
    for kind, *results in zip(("logits", "padded logits"), ours, theirs, exact, strict=False):
        assert_close_to_reference(*results, name=kind)
    errors = {key: max_error(theirs[2][key], reference) for key, reference in exact[2].items()}
    for key, reference in exact[2].items():
        assert max_error(ours[2][key], reference) <= max(2 * errors[key], *errors.values()), f"gradient of {key}"
    model.zero_grad()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for key, gradient in run(model, ids, mask)[2].items():
        assert max_error(gradient, exact[2][key]) <= max(2 * errors[key], *errors.values()), f"checkpointed {key}"


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_in_fp32(family):
    ids, mask = prompts()
    stock, model = make(family, torch.float32), apply_tp_kernels(make(family, torch.float32))
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    for arguments in ({"attention_mask": mask}, {"attention_mask": torch.ones_like(ids)}, {"num_beams": 3}):
        assert torch.equal(model.generate(ids, **arguments, **options), stock.generate(ids, **arguments, **options))
    expected = stock.generate(ids, **options)
    with torch.inference_mode():
        greedy = model.tp_causal_lm()(expected).argmax(-1)[:, LENGTH - 1 : -1]
    assert torch.equal(greedy, expected[:, LENGTH:])


def test_moved_to_the_gpu_after_patching_and_under_autocast():
    ids, mask = prompts()
    stock, model = make("Qwen3", torch.float32), apply_tp_kernels(make("Qwen3", torch.float32).cpu()).to(DEVICE)
    assert model.model.layers[0].self_attn.joined() is not None
    state, parameters = model.state_dict(), dict(model.named_parameters())
    assert all(value.data_ptr() == parameters[key].data_ptr() for key, value in state.items())
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    exact = run(make("Qwen3", torch.float64), ids, mask)
    with torch.autocast(DEVICE, torch.bfloat16):
        theirs, ours = run(stock, ids, mask), run(model, ids, mask)
    for kind, *results in zip(("logits", "padded logits"), ours, theirs, exact, strict=False):
        assert_close_to_reference(*results, name=kind)
    errors = {key: max_error(theirs[2][key], reference) for key, reference in exact[2].items()}
    for key, reference in exact[2].items():
        assert max_error(ours[2][key], reference) <= max(2 * errors[key], *errors.values()), f"gradient of {key}"
