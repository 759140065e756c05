"""RMS norm and rotary embedding against fp64 and Hugging Face's modules. Tier: no device."""

from __future__ import annotations

import pytest
import torch

from tp_kernels import ops
from tp_kernels.testing.numeric import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 3, 64), (5, 37), (4, 1), (200, 130)])
def test_rms_norm(shape, dtype):
    torch.manual_seed(0)
    x, weight = (torch.randn(shape) * 3).to(dtype), (torch.rand(shape[-1]) + 0.5).to(dtype)
    assert ops.explain("rms_norm", x, weight).name == "native-cpu"
    actual, plain = ops.rms_norm(x, weight, 1e-5), ops.rms_norm_reference(x, weight, 1e-5)
    assert_close_to_reference(actual, plain, exact_norm(x, weight, 1e-5), name="rms_norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 576), (3, 37), (70, 256)])
def test_add_rms_norm(shape, dtype):
    torch.manual_seed(1)
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = (torch.rand(shape[-1]) + 0.5).to(dtype)
    before = x.clone(), residual.clone()
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(summed, x + residual)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    plain = ops.add_rms_norm_reference(x, residual, weight, 1e-6)[0]
    assert_close_to_reference(normed, plain, exact_norm(summed, weight, 1e-6), name="add_rms_norm")


def test_rms_norm_is_hugging_faces():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(2)
    module = LlamaRMSNorm(100, eps=1e-5)
    module.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(3, 100)
    torch.testing.assert_close(ops.rms_norm(x, module.weight.detach(), 1e-5), module(x).detach())
    assert torch.equal(ops.rms_norm_reference(x, module.weight, 1e-5), module(x))
    for dtype in (torch.bfloat16, torch.float16):
        half = module.to(dtype)
        expected = half(x.to(dtype)).detach()
        # The same roundings at the same places: only the order of the fp32 sum differs.
        actual = ops.rms_norm(x.to(dtype), half.weight.detach(), 1e-5)
        assert (actual != expected).float().mean() < 0.01


def test_norm_same_bits_for_any_threads():
    before = torch.get_num_threads()
    x, weight = torch.randn(300, 333), torch.randn(333)
    try:
        torch.set_num_threads(1)
        one = ops.rms_norm(x, weight)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.rms_norm(x, weight), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ops.rms_norm(x[7], weight), one[7])


def test_norm_special_values_layouts_and_sizes():
    weight = torch.ones(20)
    x = torch.randn(20, 4).t()
    torch.testing.assert_close(ops.rms_norm(x, weight), ops.rms_norm_reference(x, weight))
    x = torch.ones(3, 20)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    torch.testing.assert_close(ops.rms_norm(x, weight), ops.rms_norm_reference(x, weight), equal_nan=True)
    assert ops.rms_norm(torch.ones(0, 20), weight).shape == (0, 20)
    assert ops.rms_norm(torch.ones(2, 0), torch.ones(0)).shape == (2, 0)
    mixed = ops.rms_norm(torch.ones(2, 20, dtype=torch.bfloat16), weight)
    assert torch.equal(mixed, ops.rms_norm_reference(torch.ones(2, 20, dtype=torch.bfloat16), weight))


def test_norm_gradients_and_errors():
    x, r, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (3, 7), (7,)))
    assert torch.autograd.gradcheck(lambda a, b: ops.rms_norm(a, b, 1e-3), (x, w))
    assert torch.autograd.gradcheck(lambda a, b, c: ops.add_rms_norm(a, b, c, 1e-3), (x, r, w))
    with pytest.raises(ValueError, match="weight"):
        ops.rms_norm(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="residual"):
        ops.add_rms_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_is_hugging_faces(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(3)
    q, k = torch.randn(2, 6, 5, 8).to(dtype), torch.randn(2, 2, 5, 8).to(dtype)
    angles = torch.rand(2, 5, 4).repeat(1, 1, 2) * 10
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(q, k, cos.to(dtype), sin.to(dtype))
    for mine, theirs in zip(ops.apply_rope(q, k, cos, sin), expected, strict=True):
        assert torch.equal(mine, theirs)
    shared = ops.apply_rope(q, k, cos[0], sin[0])
    assert torch.equal(shared[0][0], expected[0][0])
    with pytest.raises(ValueError, match="cos and sin"):
        ops.apply_rope(q, k, cos[:, :3], sin[:, :3])
    with pytest.raises(ValueError, match="even D"):
        ops.apply_rope(q[..., :7], k[..., :7], cos[..., :7], sin[..., :7])
