"""Tier: CPU ranks. Patched Hugging Face models under every option; their caches, masks, hooks, copies and adapters."""

import copy
import weakref

import pytest
import torch
from torch import nn

from tp_kernels import ops
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.layers import full_gradients
from tp_kernels.testing.numeric import assert_close_to_reference, max_error
from tp_kernels.testing.tiny_models import TINY_MODELS, make_tiny_model

transformers = pytest.importorskip("transformers")

from tp_kernels.integrations import apply_tp_kernels  # noqa: E402

IDS = torch.arange(1, 27).view(2, 13)
WINDOWED, QK_NORM, TIED = "mistral-6h2-window", "qwen3-4h1", "llama-9h3-tied-rope3"


def tiny(name, dtype=torch.float32):
    model = make_tiny_model(name)
    model.config._attn_implementation = "sdpa"
    return model.to(dtype)


def both(name):
    """(patched for one rank, stock) with the same weights."""
    return apply_tp_kernels(tiny(name)), tiny(name)


# Options, hooks and adapters on ranks --------------------------------------------------------------------------------

OPTIONS = [
    {"swiglu": False},
    {"attention": False},
    {"norms": False},
    {"swiglu": False, "attention": False, "norms": False, "overlap": "none"},
]


def run_options(group):
    results = []
    for name in (QK_NORM, WINDOWED):
        for options in OPTIONS:
            model = apply_tp_kernels(tiny(name), group, **options)
            output = model(IDS, labels=IDS)
            output.loss.backward()
            results.append((name, options, output.logits.detach(), full_gradients(model), list(model.tp_report.kept)))
    return results


@pytest.fixture(scope="module")
def expected():
    found = {}
    for name in (QK_NORM, WINDOWED):
        for dtype in (torch.float32, torch.float64):
            model = tiny(name, dtype)
            output = model(IDS, labels=IDS)
            output.loss.backward()
            gradients = {key: p.grad for key, p in model.named_parameters()}
            found[name, dtype] = output.logits.detach(), gradients
    return found


def check(name, expected, logits, gradients):
    theirs, exact = expected[name, torch.float32], expected[name, torch.float64]
    assert_close_to_reference(logits, theirs[0], exact[0], name=f"logits of {name}")
    errors = {key: max_error(theirs[1][key], reference) for key, reference in exact[1].items()}
    for key, reference in exact[1].items():
        assert max_error(gradients[key], reference) <= max(2 * errors[key], *errors.values()), f"gradient of {key}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_option_can_be_left_out(rank_pool, expected, world_size):
    results = [run_options(None)] if world_size == 1 else rank_pool(2).run(run_options)
    for by_option in results:
        for name, options, logits, gradients, kept in by_option:
            check(name, expected, logits, gradients)
            for option in options.keys() - {"overlap"}:
                assert (option, f"{option}=False") in kept


def test_linear_layers_may_stay_with_one_rank(expected):
    model = apply_tp_kernels(tiny(QK_NORM), linear=False)
    output = model(IDS, labels=IDS)
    output.loss.backward()
    check(QK_NORM, expected, output.logits.detach(), full_gradients(model))
    assert type(model.lm_head) is nn.Linear and model.model.layers[0].mlp.joined() is not None
    with pytest.raises(ValueError, match="linear=False"):
        model.tp_causal_lm()


def watched_from_outside(group):
    """Hooks on packed linears, and LoRA on them: called one by one, with the same results."""
    model = apply_tp_kernels(tiny(QK_NORM), group)
    seen = []
    layer = model.model.layers[1]
    layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    output = model(IDS, labels=IDS)
    output.loss.backward()
    try:
        model.tp_causal_lm()
        message = "no error"
    except ValueError as error:
        message = str(error)
    return len(seen), output.logits.detach(), full_gradients(model), message


def test_hooks_on_packed_layers_see_their_calls(rank_pool, expected):
    for calls, logits, gradients, message in rank_pool(3).run(watched_from_outside):
        assert calls == 2
        check(QK_NORM, expected, logits, gradients)
        assert "layers.1.self_attn" in message and "hooks" in message


def released(group):
    """(stock parameters still alive, those of the norms) after patching."""
    model = tiny(WINDOWED)
    old = {key: weakref.ref(p) for key, p in model.named_parameters()}
    apply_tp_kernels(model, group)
    alive = {key for key, reference in old.items() if reference() is not None}
    return alive, {key for key in old if "norm" in key}


def test_whole_weights_are_released(rank_pool):
    assert all(alive == norms for alive, norms in rank_pool(2).run(released))


class Fusing:
    """A communicator that offers the fused all-reduce and norm on the CPU, as peer-memory ones do on GPUs."""

    fused_norm = True

    def __init__(self, communicator):
        self._inner, self.calls = communicator, 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def fuses_norm(self, width, dtype):
        return True

    def get_buffer(self, shape, dtype, use="input"):
        return None

    def all_reduce_add_rms_norm(self, partial, residual, weight, eps, *, bias=None, **options):
        self.calls += 1
        total = self._inner.all_reduce(partial)
        partial.fill_(float("nan"))
        return ops.add_rms_norm(total if bias is None else total + bias, residual, weight, eps)


def fused_norms(group):
    fusing = TPGroup(Fusing(group.communicator), ranks=group.ranks, process_group=group.process_group)
    results = []
    for name in ("llama-5h5-biased", WINDOWED):
        model = apply_tp_kernels(tiny(name), fusing)
        plain = apply_tp_kernels(tiny(name), group)
        with torch.no_grad():
            same = torch.equal(model(IDS).logits, plain(IDS).logits)
            ours, theirs = model(IDS, output_hidden_states=True), plain(IDS, output_hidden_states=True)
        same &= all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
        calls = fusing.communicator.calls
        model(IDS)  # with gradients: not fused
        model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *args: None)
        with torch.no_grad():
            model(IDS)
        results.append((same, calls, fusing.communicator.calls - calls, len(model.model.layers)))
        fusing.communicator.calls = 0
    return results


def test_sums_over_the_ranks_are_left_to_the_norm(rank_pool):
    for by_model in rank_pool(2).run(fused_norms):
        for same, calls, hooked, layers in by_model:
            # In a pass the attention's sum of every layer, and the MLP's of every one but the last.
            assert same and calls == 2 * (2 * layers - 1)
            assert hooked == 2 * layers - 2


def lora_on_ranks(group, name):
    peft = pytest.importorskip("peft")
    from tp_kernels.integrations import register_lora

    model = apply_tp_kernels(tiny(name), group)
    config = register_lora(
        peft.LoraConfig(r=2, target_modules=["k_proj", "o_proj", "up_proj"], init_lora_weights=False)
    )
    adapted = peft.get_peft_model(model, config)
    output = adapted(IDS, labels=IDS)
    output.loss.backward()
    trained = sorted(key for key, p in adapted.named_parameters() if p.grad is not None)
    with adapted.disable_adapter(), torch.no_grad():
        without = adapted(IDS).logits
    try:
        model.tp_causal_lm()
        message = "no error"
    except ValueError as error:
        message = str(error)
    plain = adapted.unload()
    return without, len(trained), message, type(plain).__name__, plain.tp_causal_lm() is not None


def test_lora_goes_over_the_patched_layers(rank_pool, expected):
    for without, trained, message, kind, shares in rank_pool(2).run(lora_on_ranks, QK_NORM):
        theirs, exact = expected[QK_NORM, torch.float32], expected[QK_NORM, torch.float64]
        assert_close_to_reference(without, theirs[0], exact[0])
        assert trained == 2 * 3 * 2 and "LoRA" in message.replace("Lora", "LoRA")
        assert kind == "Qwen3ForCausalLM" and shares


# One rank: caches, masks, copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_caches_masks_and_dropout_are_those_of_transformers(name):
    ours, stock = both(name)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]  # two sequences packed into one
    mask_4d = torch.ones(13, 13, dtype=torch.bool).tril()[None, None].clone()
    mask_4d[..., 3] = False
    with torch.no_grad():
        for options in (
            {"position_ids": positions, "use_cache": False},
            {"attention_mask": mask_4d},
            {"attention_mask": torch.ones(1, 13, dtype=torch.int64)},
            {"inputs_embeds": stock.model.embed_tokens(IDS[:1]), "input_ids": None},
            {"logits_to_keep": 2},
        ):
            arguments = {"input_ids": IDS[:1], **options}
            torch.testing.assert_close(ours(**arguments).logits, stock(**arguments).logits)
        for config in (None, ours.config):
            caches = [transformers.DynamicCache(config=config) if config else transformers.DynamicCache() for _ in "ab"]
            for piece in IDS.split([6, 1, 5, 1], dim=1):
                a, b = ours(piece, past_key_values=caches[0]), stock(piece, past_key_values=caches[1])
                torch.testing.assert_close(a.logits, b.logits)
    for model in (ours, stock):
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
    results = []
    for model in (ours, stock):
        torch.manual_seed(3)
        results.append(model(IDS).logits)
    torch.testing.assert_close(*results)


def test_attention_weights_are_recorded():
    ours, stock = both(TIED)
    for model in (ours, stock):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        a, b = (m(IDS, output_attentions=True, output_hidden_states=True) for m in (ours, stock))
    assert len(a.attentions) == len(ours.model.layers) and len(a.hidden_states) == len(a.attentions) + 1
    for mine, theirs in zip(a.attentions, b.attentions, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_plain_masks_are_not_looked_at(monkeypatch):
    model, calls = apply_tp_kernels(tiny(WINDOWED)), []
    attention = ops.attention

    def recorded(q, k, v, **options):
        calls.append((q.shape[2], k.shape[2], options["sliding_window"]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(ops, "attention", recorded)
    ones = torch.ones_like(IDS)
    with torch.no_grad():
        cache = model(IDS[:, :9], attention_mask=ones[:, :9]).past_key_values
        model(IDS[:, 9:], attention_mask=ones, past_key_values=cache)
        assert calls == [(9, 9, 5)] * 2 + [(4, 8, 5)] * 2  # the cache holds the window's last four
        full = apply_tp_kernels(tiny(QK_NORM))
        calls.clear()
        cache = full(IDS[:, :9], attention_mask=ones[:, :9]).past_key_values
        full(IDS[:, 9:], attention_mask=ones, past_key_values=cache)
        assert calls == [(9, 9, None)] * 2 + [(4, 13, None)] * 2
        calls.clear()
        ones[0, 0] = 0
        model(IDS, attention_mask=ones)
    assert not calls


def test_copies_and_moves_keep_everything():
    model, stock = both(TIED)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.model.layers[0].self_attn.joined() is not None
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight.zero_()
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)
    shared = model.tp_causal_lm()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(shared(IDS), model(IDS).logits)
    assert model.tp_causal_lm() is shared
    model.double().float()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.tp_causal_lm() is not shared
    # What somebody puts elsewhere is used where it is.
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach() * 2)
    assert model.model.layers[0].mlp.joined() is None
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(model.tp_causal_lm()(IDS), expected)
    assert (
        model.model.layers[0].mlp.joined() is not None and projection.weight is model.model.layers[0].mlp.up_proj.weight
    )
    model.load_state_dict({key: value.clone() for key, value in stock.state_dict().items()})
    assert model.model.layers[0].mlp.joined() is not None
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)


def test_nothing_of_transformers_is_changed():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen3 import modeling_qwen3 as code

    before, functions = {key: dict(vars(code))[key] for key in vars(code)}, list(ALL_ATTENTION_FUNCTIONS.keys())
    forwards = {key: value.forward for key, value in before.items() if hasattr(value, "forward")}
    model = apply_tp_kernels(tiny(QK_NORM))
    assert dict(vars(code)) == before and list(ALL_ATTENTION_FUNCTIONS.keys()) == functions
    assert all(getattr(code, key).forward is forward for key, forward in forwards.items())
    assert isinstance(model, code.Qwen3ForCausalLM) and type(tiny(QK_NORM)) is code.Qwen3ForCausalLM
    assert str(type(model)) == str(code.Qwen3ForCausalLM)
    assert model.config.num_attention_heads == TINY_MODELS[QK_NORM][1]["num_attention_heads"]


def test_an_activation_that_has_no_kernel_is_listed():
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=60,
        num_hidden_layers=1,
        hidden_act="gelu",
    )
    stock = transformers.LlamaForCausalLM(config).eval()
    model = apply_tp_kernels(copy.deepcopy(stock))
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)
    assert "hidden_act is 'gelu'" in str(model.tp_report) and "SwiGLU MLP" not in model.tp_report.replaced
    with pytest.raises(ValueError, match="gelu"):
        model.tp_causal_lm()
    with pytest.raises(ValueError, match="before apply_tp_kernels"):
        model.resize_token_embeddings(64)


def test_autocast_and_compile():
    ours, stock = both(QK_NORM)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(IDS, labels=IDS), stock(IDS, labels=IDS)
        a.loss.backward()
    exact = tiny(QK_NORM, torch.float64)(IDS).logits.detach()
    assert_close_to_reference(a.logits.detach(), b.logits.detach(), exact)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    compiled = torch.compile(ours, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, stock(IDS).logits)
