"""MLP, attention and decoder layers against transformers': outputs and every gradient. Tier: CPU ranks (1 to 4)."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from tp_kernels.layers import (
    ParallelAttention,
    ParallelDecoderLayer,
    ParallelMLP,
    RotaryEmbedding,
    full_gradients,
    load_full_state_dict,
)
from tp_kernels.testing.numeric import assert_close_to_reference, max_error

BATCH, TOKENS, HIDDEN, WIDTH = 2, 9, 72, 100
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
# Sizes that do not divide by the ranks, fewer KV heads than ranks, every family's peculiarity.
FAMILIES = {
    "llama": dict(heads=9, kv_heads=3, head_dim=8, theta=10000.0, scaling=LLAMA3, window=None),
    "llama_biased": dict(heads=6, kv_heads=6, head_dim=8, theta=10000.0, scaling=None, window=None),
    "mistral": dict(heads=4, kv_heads=1, head_dim=12, theta=1e6, scaling=None, window=4),
    "qwen2": dict(heads=4, kv_heads=2, head_dim=12, theta=1e6, scaling=None, window=None),
    "qwen3": dict(heads=8, kv_heads=2, head_dim=32, theta=1e6, scaling=None, window=None),
}
OPTIONS = {
    "llama": {},
    "llama_biased": dict(qkv_bias=True, o_bias=True, mlp_bias=True),
    "mistral": dict(sliding_window=4),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True),
}


def stock_layer(family):
    """transformers' decoder layer with random weights, wrapped so that it takes and returns one tensor."""
    import transformers
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    name = family.removesuffix("_biased")
    module = {
        "llama": modeling_llama,
        "mistral": modeling_mistral,
        "qwen2": modeling_qwen2,
        "qwen3": modeling_qwen3,
    }[name]
    stem = name.capitalize()
    shape = FAMILIES[family]
    biased = {"attention_bias": True, "mlp_bias": True} if family == "llama_biased" else {}
    config = getattr(transformers, f"{stem}Config")(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": shape["theta"], **(shape["scaling"] or {})},
        attn_implementation="eager",
        **biased,
    )
    layer = getattr(module, f"{stem}DecoderLayer")(config, 0)
    rotary = getattr(module, f"{stem}RotaryEmbedding")(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:  # norms that are all ones and biases that are all zero would test nothing
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return StockDecoder(layer, rotary, shape["window"])


class StockDecoder(nn.Module):
    def __init__(self, layer, rotary, window):
        super().__init__()
        self.layer, self.window = layer, window
        self.rotary = [rotary]  # not a submodule: .double() and .to(bf16) would convert its frequencies

    def forward(self, x):
        positions = torch.arange(x.shape[1])
        hidden = positions[None, :] > positions[:, None]
        if self.window is not None:
            hidden |= positions[None, :] <= positions[:, None] - self.window
        mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)
        rotation = self.rotary[0](x, positions[None])
        return self.layer(x, attention_mask=mask[None, None], position_embeddings=rotation)


def exact(model):
    """A float64 copy without the places where transformers computes in fp32 whatever the dtype."""
    model = copy.deepcopy(model).double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
        if hasattr(parent, "o_proj"):
            parent.config._attn_implementation = "sdpa"
    return model


def parallel_layer(group, family, dtype):
    shape = FAMILIES[family]
    return ParallelDecoderLayer(
        HIDDEN,
        WIDTH,
        shape["heads"],
        shape["kv_heads"],
        shape["head_dim"],
        rope=RotaryEmbedding(shape["head_dim"], shape["theta"], shape["scaling"]),
        group=group,
        dtype=dtype,
        **OPTIONS[family],
    )


def run_stock(model, x, grad):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grad)
    grads = {name.removeprefix("layer."): parameter.grad for name, parameter in model.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


def run_both_attentions(model, x, grad, reference):
    """transformers' results with eager and with SDPA attention: per tensor, those further from the reference.

    A norm's gradient has a few dozen elements; the largest error of one run in bf16 is then a matter of luck.
    """
    runs = []
    for implementation in ("eager", "sdpa"):
        model.layer.self_attn.config._attn_implementation = implementation
        runs.append(run_stock(model, x, grad))
    return {key: max((run[key] for run in runs), key=lambda t: max_error(t, reference[key])) for key in runs[0]}


def run_decoders(group, cases):
    results = {}
    for family, (state, x, grad) in cases.items():
        layer = parallel_layer(group, family, x.dtype)
        load_full_state_dict(layer, state)
        x = x.clone().requires_grad_()
        out, residual = layer(x)
        (out + residual).backward(grad)
        with torch.no_grad():
            inference = sum(layer(x))
        results[family] = {
            "out": (out + residual).detach(),
            "inference": inference,
            "x": x.grad,
            **full_gradients(layer),
        }
    return results


@functools.cache
def decoder_oracle(dtype):
    """What to run, and for each family transformers' results in ``dtype`` and in float64."""
    torch.manual_seed(0)
    cases, expected, reference = {}, {}, {}
    for family in FAMILIES:
        model = stock_layer(family).to(dtype)
        x, grad = (torch.randn(BATCH, TOKENS, HIDDEN).to(dtype) for _ in range(2))
        cases[family] = (model.layer.state_dict(), x, grad)
        reference[family] = run_stock(exact(model), x.double(), grad.double())
        expected[family] = run_both_attentions(model, x, grad, reference[family])
        for results in (expected[family], reference[family]):
            results["inference"] = results["out"]
    return cases, expected, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_decoder_layers_equal_transformers(rank_pool, world_size, dtype):
    cases, expected, reference = decoder_oracle(dtype)
    for rank, results in enumerate(rank_pool(world_size).run(run_decoders, cases)):
        for family, result in results.items():
            assert result.keys() == expected[family].keys()
            for key, value in expected[family].items():
                what = f"rank {rank}, {family}: {key}"
                assert_close_to_reference(result[key], value, reference[family][key], name=what)


def run_mlps(group, cases):
    results = {}
    for activation, (state, x, grad) in cases.items():
        layer = ParallelMLP(HIDDEN, WIDTH, activation=activation, group=group, dtype=x.dtype)
        load_full_state_dict(layer, state)
        x = x.clone().requires_grad_()
        out = layer(x)
        out.backward(grad)
        results[activation] = {"out": out.detach(), "x": x.grad, **full_gradients(layer)}
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 3])
def test_mlps_equal_transformers(rank_pool, world_size, dtype):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(world_size)
    cases, expected, reference = {}, {}, {}
    for activation, theirs in {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}.items():
        model = LlamaMLP(
            LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_attention_heads=4, hidden_act=theirs)
        ).to(dtype)
        x, grad = (torch.randn(BATCH, TOKENS, HIDDEN).to(dtype) for _ in range(2))
        cases[activation] = (model.state_dict(), x, grad)
        expected[activation] = run_stock(model, x, grad)
        reference[activation] = run_stock(exact(model), x.double(), grad.double())
    for rank, results in enumerate(rank_pool(world_size).run(run_mlps, cases)):
        for activation, result in results.items():
            for key, value in expected[activation].items():
                what = f"rank {rank}, {activation}: {key}"
                assert_close_to_reference(result[key], value, reference[activation][key], name=what)


def check_from_linear(group):
    """Blocks made from existing projections compute what the blocks they were taken from compute."""
    torch.manual_seed(5)
    gate, up, down = nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
    x = torch.randn(BATCH, TOKENS, HIDDEN)
    with torch.no_grad():
        mlp = ParallelMLP.from_linear(gate, up, down, group=group)
        expected = down(nn.functional.silu(gate(x)) * up(x))
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-5)
        q, k, v, o = nn.Linear(HIDDEN, 72), nn.Linear(HIDDEN, 24), nn.Linear(HIDDEN, 24), nn.Linear(72, HIDDEN)
        attention = ParallelAttention.from_linear(q, k, v, o, head_dim=8, group=group, scale=0.5)
        heads = [p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (q, k, v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.5, enable_gqa=True)
        expected = o(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-5)
        normed = ParallelAttention.from_linear(q, k, v, o, head_dim=8, group=group, qk_norm=True)
        assert torch.equal(normed.q_norm.weight, torch.ones(8))


def check_positions(group):
    """Explicit positions: the default ones change nothing, and only differences matter to rotary attention."""
    torch.manual_seed(6)
    layer = parallel_layer(group, "llama", torch.float32)
    x = torch.randn(BATCH, TOKENS, HIDDEN)
    with torch.no_grad():
        plain = sum(layer(x))
        default = torch.arange(TOKENS)
        torch.testing.assert_close(sum(layer(x, positions=default)), plain, rtol=0, atol=1e-6)
        shifted = default + torch.tensor([[0], [17]])
        torch.testing.assert_close(sum(layer(x, positions=shifted)), plain, rtol=0, atol=1e-5)


def check_training(group):
    """Activation checkpointing changes no bit of the gradients; autocast trains fp32 parameters in bf16."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(8)
    for family in ("llama_biased", "mistral", "qwen3"):
        layer = parallel_layer(group, family, torch.float32)
        x, grad = (torch.randn(BATCH, TOKENS, HIDDEN) for _ in range(2))
        gradients = []
        for run in (
            lambda x, layer=layer: sum(layer(x)),
            lambda x, layer=layer: sum(checkpoint(layer, x, use_reentrant=False)),
        ):
            layer.zero_grad()
            run(x).backward(grad)
            gradients.append(full_gradients(layer))
        for name in gradients[0]:
            assert torch.equal(gradients[0][name], gradients[1][name]), name
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = sum(layer(x))
        out.backward(grad.to(out.dtype))
        torch.testing.assert_close(out.float(), sum(layer(x)), rtol=0.05, atol=0.05)
        for name, value in full_gradients(layer).items():
            assert value.dtype == torch.float32
            exact = gradients[0][name]
            assert (value - exact).norm() <= 0.02 * exact.norm(), name


def check_errors(group):
    world, cpu = group.world_size, dict(group=group)
    layer = parallel_layer(group, "llama", torch.float32)
    x = torch.randn(BATCH, TOKENS, HIDDEN)
    linear = nn.Linear(HIDDEN, HIDDEN)
    bad = [
        (lambda: layer(x[..., :-1]), r"expected an input of shape \[..., 72\]"),
        (lambda: layer.self_attn(x[0]), r"expected an input \[B, S, 72\]"),
        (lambda: layer.self_attn(x.double()), "expected an input of torch.float32"),
        (lambda: layer.mlp(x.bfloat16()), "expected an input of torch.float32"),
        (lambda: layer(x, positions=torch.arange(TOKENS + 1)), r"expected positions \[9\] or \[2, 9\]"),
        (lambda: ParallelAttention(HIDDEN, world - 1, head_dim=8, **cpu), "num_heads|ranks cannot share"),
        (lambda: layer.self_attn([1.0]), "expected an input .* got list"),
        (lambda: ParallelAttention(HIDDEN, "9", **cpu), "num_heads must be a positive int"),
        (lambda: ParallelAttention(HIDDEN, 7, **cpu), "pass head_dim"),
        (lambda: ParallelAttention(HIDDEN, 9, 2, head_dim=8, **cpu), "num_kv_heads must divide"),
        (lambda: ParallelAttention(HIDDEN, 9, head_dim=8, rope=RotaryEmbedding(6), **cpu), "head_dim=8, got one for 6"),
        (lambda: ParallelAttention(HIDDEN, 9, head_dim=8, sliding_window=0, **cpu), "sliding_window must be"),
        (lambda: ParallelMLP(HIDDEN, WIDTH, activation="tanh", **cpu), "activation must be one of silu, gelu"),
        (lambda: ParallelMLP(HIDDEN, world - 1, **cpu), "out_features"),
        (lambda: ParallelMLP.from_linear(linear, nn.Linear(HIDDEN, 7), linear, **cpu), "as many outputs"),
        (
            lambda: ParallelAttention.from_linear(linear, linear, linear, linear, head_dim=7, **cpu),
            "in whole heads of 7",
        ),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "check", [check_from_linear, check_positions, check_training, check_errors], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("world_size", [1, 4])
def test_behaviour(rank_pool, world_size, check):
    rank_pool(world_size).run(check)
