"""Quantised weights: the numbers themselves, and the ops that take them on the CPU. Tier: no device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels.ops.quantize import KINDS
from tp_kernels.testing.numeric import assert_close_to_reference


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_int8_is_the_nearest_multiple_of_the_scale(dtype):
    weight = normal(7, 65, dtype=dtype)
    q, scale = ops.quantize_weight(weight, "int8")
    assert q.dtype is torch.int8 and scale.dtype is torch.float32 and q.shape == weight.shape and scale.shape == (7,)
    wide = weight.float()
    assert torch.equal(scale, wide.abs().amax(1) / 127)
    assert torch.equal(q.float(), (wide / scale[:, None]).round())
    assert (q.abs().amax(1) == 127).all()
    error = (wide - q.float() * scale[:, None]).abs()
    assert (error <= 0.5001 * scale[:, None]).all()


def test_fp8_is_the_nearest_e4m3_number():
    weight = normal(5, 64)
    q, scale = ops.quantize_weight(weight, "fp8")
    assert q.dtype is torch.float8_e4m3fn
    assert torch.equal(scale, weight.abs().amax(1) / 448)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    wanted = weight / scale[:, None]
    nearest = (wanted[..., None] - every).abs().amin(-1)
    assert torch.equal((wanted - q.float()).abs(), nearest)
    assert (q.float().abs().amax(1) == 448).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_answer_for_themselves(kind):
    """Zeros, one number, and numbers of very different sizes; a slice of rows is the slice of the whole."""
    weight = normal(6, 16)
    weight[1], weight[2], weight[3], weight[4] = 0, 3e38, 1e-35, 1e-40
    weight[5, 1:] = 0
    q, scale = ops.quantize_weight(weight, kind)
    assert q.float().isfinite().all() and scale.isfinite().all() and (scale > 0).all()
    assert (q[1].float() == 0).all() and scale[1] == 1 and (q[4].float() == 0).all()
    assert (q[2:4].float() == KINDS[kind][1]).all()
    torch.testing.assert_close(ops.dequantize_weight(q, scale)[5], weight[5])
    part, part_scale = ops.quantize_weight(weight[2:5], kind)
    assert torch.equal(part.float(), q[2:5].float()) and torch.equal(part_scale, scale[2:5])


def test_large_weights_are_quantised_in_pieces(monkeypatch):
    weight = normal(11, 24)
    whole = ops.quantize_weight(weight, "int8")
    monkeypatch.setattr("tp_kernels.ops.quantize._CHUNK", 50)
    for one, other in zip(ops.quantize_weight(weight, "int8"), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize(kind):
    q, scale = ops.quantize_weight(normal(9, 20), kind)
    exact = q.double() * scale.double()[:, None]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = ops.dequantize_weight(q, scale, dtype)
        assert found.dtype is dtype
        assert_close_to_reference(found, exact.to(dtype), exact)
    assert ops.dequantize_weight(q[:0], scale[:0]).shape == (0, 20)


def test_empty_and_meta():
    for shape in ((0, 4), (4, 0)):
        q, scale = ops.quantize_weight(torch.empty(shape), "int8")
        assert q.shape == shape and torch.equal(scale, torch.ones(shape[0]))
    q, scale = ops.quantize_weight(torch.empty(3, 4, device="meta"), "fp8")
    assert q.is_meta and q.dtype is torch.float8_e4m3fn and scale.shape == (3,)


def test_bad_weights():
    weight = normal(4, 8)
    with pytest.raises(ValueError, match="expected one of int8, fp8, got 'int4'"):
        ops.quantize_weight(weight, "int4")
    for bad in (weight[0], weight.long(), weight.to(torch.float8_e4m3fn)):
        with pytest.raises(ValueError, match=r"floating-point weight \[N, K\]"):
            ops.quantize_weight(bad, "int8")
    for value in (float("nan"), float("-inf")):
        weight[2, 3] = value
        with pytest.raises(ValueError, match="not finite: row 2 of 4"):
            ops.quantize_weight(weight, "fp8")
    q, scale = ops.quantize_weight(normal(4, 8), "int8")
    for args, words in (
        ((q.float(), scale), "int8 or float8_e4m3fn"),
        ((q, scale[:3]), r"expected a scale \[4\]"),
        ((q, scale.half()), "torch.float16"),
        ((q, scale, torch.int32), "floating-point dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.dequantize_weight(*args)


# Ops -----------------------------------------------------------------------------------------------------------------


def quantized(n: int, k: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_weight(normal(n, k, scale=k**-0.5), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("m", [1, 5, 70])
def test_linear(m, dtype, kind):
    q, scale = quantized(33, 47, kind)
    x, bias, residual = normal(m, 47, dtype=dtype), normal(33, dtype=dtype), normal(m, 33, dtype=dtype)
    exact = F.gelu(x.double() @ q.double().T * scale.double() + bias.double()) + residual.double()
    found = ops.linear(x, q, bias, residual, "gelu", weight_scale=scale)
    assert found.dtype is dtype
    plain = ops.linear_reference(x, q, bias, residual, "gelu", weight_scale=scale)
    assert_close_to_reference(found, plain, exact)
    if dtype.itemsize == 2:  # rounded once, at the end
        assert_close_to_reference(found, exact.to(dtype), exact, factor=1.01)


@pytest.mark.parametrize("kind", KINDS)
def test_swiglu_and_norms(kind):
    q, scale = quantized(34, 48, kind)
    x, bias, g = normal(3, 48, dtype=torch.bfloat16), normal(34, dtype=torch.bfloat16), normal(48, dtype=torch.bfloat16)
    doubles = (x.double(), g.double(), 1e-5, q, bias.double())
    for op, reference, args in (
        (ops.swiglu_linear, ops.swiglu_linear_reference, (x, q, bias)),
        (ops.norm_linear, ops.norm_linear_reference, (x, g, 1e-5, q, bias)),
        (ops.norm_swiglu_linear, ops.norm_swiglu_linear_reference, (x, g, 1e-5, q, bias)),
    ):
        exact_args = (doubles[0], q, doubles[4]) if op is ops.swiglu_linear else doubles
        exact = reference(*exact_args, weight_scale=scale)
        assert_close_to_reference(op(*args, weight_scale=scale), reference(*args, weight_scale=scale), exact)
        if op is ops.norm_linear and kind == "int8":
            compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(*args, weight_scale=scale), op(*args, weight_scale=scale))
        assert ops.explain(op, *args, weight_scale=scale).name == "torch"


def test_norm_linear_is_the_norm_and_then_the_projection():
    x, g, weight, bias = normal(2, 3, 40), normal(40), normal(12, 40), normal(12)
    assert torch.equal(ops.norm_linear(x, g, 1e-6, weight, bias), ops.linear(ops.rms_norm(x, g, 1e-6), weight, bias))
    expected = ops.swiglu_linear(ops.rms_norm(x, g, 1e-6), weight, bias)
    assert torch.equal(ops.norm_swiglu_linear(x, g, 1e-6, weight, bias), expected)
    leaves = [t.requires_grad_() for t in (x, g, weight, bias)]
    for op in (ops.norm_linear, ops.norm_swiglu_linear):
        args = (x, g, 1e-6, weight, bias)
        wide = [t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
        leaves64 = [t for t in wide if isinstance(t, torch.Tensor)]
        exact = torch.autograd.grad(op(*wide).square().sum(), leaves64)
        for grad, wanted in zip(torch.autograd.grad(op(*args).square().sum(), leaves), exact, strict=True):
            torch.testing.assert_close(grad, wanted.float(), rtol=1e-3, atol=1e-3)


def test_bits_depend_neither_on_other_rows_nor_on_shards():
    q, scale = quantized(40, 64, "int8")
    x = normal(4, 64, dtype=torch.bfloat16)
    whole = ops.linear(x, q, weight_scale=scale)
    assert torch.equal(ops.linear(x[1:2], q, weight_scale=scale)[0], whole[1])
    assert torch.equal(ops.linear(x, q[7:20], weight_scale=scale[7:20]), whole[:, 7:20])


def test_explain_and_autocast():
    q, scale = quantized(32, 48, "fp8")
    x, bias, residual = normal(3, 48), normal(32), normal(3, 32)
    path = ops.explain("linear", x, q, weight_scale=scale)
    assert (path.name, path.reason) == ("torch", "fp8 weights are dequantised to fp32 on the CPU, at every call")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.linear(x, q, bias, weight_scale=scale)
        assert found.dtype is torch.bfloat16 and ops.swiglu_linear(x, q, weight_scale=scale).dtype is torch.bfloat16
        assert ops.linear(x, q, bias, residual, weight_scale=scale).dtype is torch.float32
        assert ops.norm_linear(x, x[0], 1e-5, q, weight_scale=scale).dtype is torch.bfloat16
    assert torch.equal(found, ops.linear(x.bfloat16(), q, bias.bfloat16(), weight_scale=scale))


def test_what_does_not_fit():
    q, scale = quantized(32, 48, "int8")
    x, g = normal(3, 48), normal(48)
    bad = [
        (lambda: ops.linear(x, q), "comes with its weight_scale"),
        (lambda: ops.linear(x, x, weight_scale=scale[:3]), "int8 or float8_e4m3fn weight"),
        (lambda: ops.linear(x, q, weight_scale=scale[1:]), r"expected a scale \[32\]"),
        (lambda: ops.linear(x, q, normal(32).half(), weight_scale=scale), "bias is torch.float16"),
        (lambda: ops.swiglu_linear(x, q[1:], weight_scale=scale[1:]), "gate rows"),
        (lambda: ops.norm_linear(x, g[1:], 1e-5, q, weight_scale=scale), r"expected a norm weight \[48\]"),
        (lambda: ops.norm_linear(x, g.half(), 1e-5, x), "torch.float16"),
        (lambda: ops.linear(x.requires_grad_(), q, weight_scale=scale), "quantised weights are for inference"),
        (lambda: ops.swiglu_linear(x, q, weight_scale=scale), "quantised weights are for inference"),
        (lambda: ops.norm_linear(x.detach(), g.requires_grad_(), 1e-5, q, weight_scale=scale), "for inference"),
    ]
    for call, words in bad:
        with pytest.raises(ValueError, match=words):
            call()
    with torch.no_grad():
        assert ops.linear(x, q, weight_scale=scale).shape == (3, 32)


@pytest.mark.parametrize("op", ["linear", "swiglu_linear", "norm_linear"])
def test_opcheck(op):
    q, scale = quantized(32, 48, "int8")
    x, g = normal(3, 48), normal(48)
    args = (x, g, 1e-5, q) if op == "norm_linear" else (x, q)
    torch.library.opcheck(getattr(torch.ops.tp_kernels, op), args, {"weight_scale": scale})
