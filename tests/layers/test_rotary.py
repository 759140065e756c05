"""RotaryEmbedding and RMSNorm against transformers'. Tier: no device."""

from __future__ import annotations

import copy

import pytest
import torch

from tp_kernels.layers import RMSNorm, RotaryEmbedding
from tp_kernels.testing.numeric import assert_close_to_reference

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("theta", "scaling"),
    [(10000.0, None), (500000.0, {"rope_type": "default"}), (1e6, {"type": "linear", "factor": 2.5}), (1e4, LLAMA3)],
    ids=["default", "theta", "linear", "llama3"],
)
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_angles_equal_transformers(theta, scaling, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": theta, "rope_type": "default", **(scaling or {})}
    if "type" in parameters:
        parameters["rope_type"] = parameters.pop("type")
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=512, rope_parameters=parameters
    )
    positions = torch.tensor([[0, 1, 2, 63, 64, 65, 511], [7, 100, 3, 9, 300, 2, 1]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    rope = RotaryEmbedding(head_dim, theta, scaling)
    assert torch.equal(rope.inv_freq, LlamaRotaryEmbedding(config).inv_freq)
    for actual, expected in zip(rope(positions), (cos, sin), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    tables = rope.tables(512, torch.device("cpu"))
    assert torch.equal(tables[0][positions], rope(positions)[0])
    assert torch.equal(tables[1][positions], rope(positions)[1])


def test_tables_grow_are_kept_and_never_leave_fp32():
    rope = RotaryEmbedding(8)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = rope.tables(10, cpu)
    assert first[0].shape[0] >= 10 and not first[0].is_inference()
    assert rope.tables(first[0].shape[0], cpu)[0] is first[0]
    longer = rope.tables(first[0].shape[0] + 1, cpu)
    assert longer[0].shape[0] > first[0].shape[0] and torch.equal(longer[0][: len(first[0])], first[0])
    assert longer[0].dtype == longer[1].dtype == torch.float32
    with torch.device("meta"):
        assert not RotaryEmbedding(8).inv_freq.is_meta
    assert torch.equal(copy.deepcopy(rope).inv_freq, rope.inv_freq)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7,), "head_dim must be a positive even int"),
        ((0,), "head_dim"),
        ((8, 0.0), "theta must be positive"),
        ((8, 1e4, {"rope_type": "yarn", "factor": 2.0}), "'yarn' is not supported; supported: default, linear, llama3"),
        ((8, 1e4, {"type": "dynamic", "factor": 2.0}), "'dynamic' is not supported"),
        ((8, 1e4, {"rope_type": "linear"}), "positive number 'factor'"),
        ((8, 1e4, {**LLAMA3, "high_freq_factor": 1.0}), "high_freq_factor > low_freq_factor"),
        ((8, 1e4, {"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    ],
)
def test_bad_arguments_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    ours, theirs = RMSNorm(40, 1e-5, dtype=dtype), LlamaRMSNorm(40, 1e-5).to(dtype)
    weight = torch.randn(40).to(dtype)
    ours.load_state_dict({"weight": weight})
    theirs.load_state_dict({"weight": weight})
    # In float64 throughout; transformers' module would still compute in fp32.
    exact = torch.nn.RMSNorm(40, 1e-5, dtype=torch.float64)
    exact.load_state_dict({"weight": weight.double()})
    x, residual, grad = (torch.randn(3, 5, 40).to(dtype) for _ in range(3))

    def run(norm, *inputs):
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        norm.zero_grad()
        if len(inputs) == 1:
            out = (norm(inputs[0]),)
        elif norm is ours:
            out = norm(*inputs)
        else:
            summed = inputs[0] + inputs[1]
            out = (norm(summed), summed)
        torch.autograd.backward(out, [grad.to(out[0].dtype)] * len(out))
        return [tensor.detach() for tensor in out] + [tensor.grad for tensor in inputs] + [norm.weight.grad.clone()]

    for inputs in ([x], [x, residual]):
        doubles = [tensor.double() for tensor in inputs]
        for i, (actual, expected, reference) in enumerate(
            zip(run(ours, *inputs), run(theirs, *inputs), run(exact, *doubles), strict=True)
        ):
            assert_close_to_reference(actual, expected, reference, name=f"{len(inputs)} inputs, result {i}")
    with torch.no_grad():
        fused = ours(x, residual)
        assert torch.equal(fused[1], x + residual)
        assert_close_to_reference(fused[0], theirs(x + residual), exact((x + residual).double()), name="inference")


def test_rms_norm_names_what_was_expected():
    with pytest.raises(ValueError, match="hidden_size must be a positive int"):
        RMSNorm(0)
    with pytest.raises(ValueError, match=r"expected an input of shape \[..., 8\]"):
        RMSNorm(8)(torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"expected an input of shape \[..., 8\], got \[\]"):
        RMSNorm(8)(torch.tensor(1.0))
    with pytest.raises(ValueError, match="expected an input on cpu"):
        RMSNorm(8)(torch.ones(2, 8, device="meta"))
    with pytest.raises(ValueError, match="expected a residual of shape"):
        RMSNorm(8)(torch.ones(2, 8), torch.ones(8))
