"""Gradients of flash attention against fp64 autograd and PyTorch. Tier: no device (interpreter), GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels.ops._gpu import H100, gpu_of
from tp_kernels.ops.flash_attention import choose_flash_attention
from tp_kernels.ops.kernels import flash_attention as forward_kernels
from tp_kernels.ops.kernels import flash_attention_backward as kernels
from tp_kernels.testing.numeric import assert_close_to_reference

HAS_GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if HAS_GPU else torch.float16
TINY = None if HAS_GPU else kernels.Config(16, 32, 4, 1, 32, 16, 4, 1)
TINY_FORWARD = None if HAS_GPU else forward_kernels.Config(32, 16, 4, 2)


def make(generator, batch, heads, length, dim, dtype):
    """[B, H, S, D] with tokens before heads in memory."""
    x = torch.randn(batch, length, heads, dim, generator=generator, device=generator.device)
    return x.to(dtype).transpose(1, 2)


def gradients(function, inputs, grad_out, grad_lse=None):
    """dq, dk, dv of ``function(q, k, v) -> (out, lse)``; an lse of -inf is a constant."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    loss = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None:
        some = lse.isfinite()
        loss = loss + (lse[some] * grad_lse.to(lse.dtype)[some]).sum()
    return torch.autograd.grad(loss, inputs)


def reference(causal, window):
    return lambda q, k, v: ops.flash_attention_reference(q, k, v, causal=causal, sliding_window=window, return_lse=True)


def in_dtype(causal, window):
    """The same as PyTorch would compose it in the dtype: what the error is measured against."""

    def call(q, k, v):
        length, kv_len = q.shape[2], k.shape[2]
        rows = torch.arange(length, device=q.device)[:, None] + (kv_len - length)
        keys = torch.arange(kv_len, device=q.device)
        hidden = torch.zeros(length, kv_len, dtype=torch.bool, device=q.device)
        if causal:
            hidden |= keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        empty = hidden.all(1)[:, None]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(hidden & ~empty, -math.inf).float()
        weights = scores.softmax(-1).masked_fill(empty, 0).to(q.dtype)
        return weights @ v, scores.logsumexp(-1).masked_fill(empty[:, 0], -math.inf)

    return call


def in_dtype_varlen(lengths, kv_lengths, causal, window):
    """The same for packed sequences, one after the other; rows behind the last one are zeros."""

    def call(q, k, v):
        outs, sums = [], []
        parts = ([*lengths, q.shape[0] - sum(lengths)], [*kv_lengths, 0])
        for rows, key, value in zip(q.split(parts[0]), k.split(parts[1]), v.split(parts[1]), strict=True):
            each = (x.transpose(0, 1).unsqueeze(0) for x in (rows, key, value))
            out, lse = in_dtype(causal, window)(*each)
            outs.append(out[0].transpose(0, 1))
            sums.append(lse[0])
        return torch.cat(outs), torch.cat(sums, 1)

    return call


def run(q, k, v, grad_out, grad_lse, causal, window, config, forward_config=None):
    """dq, dk, dv by the launchers; grads start as NaN, so that what is not written shows."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
    options = {"scale": q.shape[-1] ** -0.5, "causal": causal, "window": window}
    options |= {"max_q": q.shape[2], "max_k": k.shape[2]}
    forward_kernels.flash_forward(out, lse, q, k, v, config=forward_config, **options)
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    kernels.flash_backward(*grads, grad_out, q, k, v, out, lse, grad_lse=grad_lse, config=config, **options)
    return grads


def check_backward(q, k, v, grad_out, grad_lse, causal, window, config, forward_config=None):
    actual = run(q, k, v, grad_out, grad_lse, causal, window, config, forward_config)
    wide = [x.double() for x in (q, k, v)]
    exact = gradients(reference(causal, window), wide, grad_out, grad_lse)
    plain = gradients(in_dtype(causal, window), (q, k, v), grad_out, grad_lse)
    for name, ours, theirs, right in zip(("dq", "dk", "dv"), actual, plain, exact, strict=True):
        if q.dtype == torch.float32:
            # Differences of nearly equal sums of few terms: PyTorch may be exact by luck.
            # A GPU's exp2 is the approximate one (2 ulp), times dO V^T of up to 30 here; the interpreter's is numpy's.
            bounds = {"atol": 5e-5, "rtol": 1e-4} if q.is_cuda else {"atol": 5e-6, "rtol": 1e-5}
            torch.testing.assert_close(ours.double(), right, **bounds, msg=lambda m, name=name: name + m)
        else:
            assert_close_to_reference(ours, theirs, right, name=name)


# heads, KV heads, S, L, head_dim, causal, window, with a gradient for lse, one program a query head
CASES = [
    (2, 1, 40, 40, 64, True, None, True, False),
    (2, 1, 40, 40, 16, True, None, False, True),
    (4, 2, 7, 33, 96, True, None, True, True),
    (2, 1, 33, 7, 16, True, None, True, False),
    (1, 1, 50, 50, 64, True, 10, False, False),
    (2, 2, 33, 48, 72, False, 20, True, False),
    (2, 1, 20, 35, 80, False, None, False, False),
    (1, 1, 1, 1, 64, True, 1, True, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, device, dtype, generator):
    heads, kv_heads, length, kv_length, dim, causal, window, with_lse, split = case
    q, grad_out = (make(generator, 1, heads, length, dim, dtype) for _ in range(2))
    k, v = (make(generator, 1, kv_heads, kv_length, dim, dtype) for _ in range(2))
    grad_lse = torch.randn(1, heads, length, generator=generator, device=device) if with_lse else None
    config = TINY or kernels.default_config(gpu_of(q), dtype, dim, length, kv_length)
    check_backward(q, k, v, grad_out, grad_lse, causal, window, config._replace(split=split), TINY_FORWARD)


def test_pointers_on_a_gpu_without_tma(old_device):
    generator = torch.Generator(device=old_device).manual_seed(3)
    q, k, v, grad_out = (make(generator, 1, h, 36, 64, torch.float16) for h in (2, 1, 1, 2))
    check_backward(q, k, v, grad_out, None, True, 20, TINY, TINY_FORWARD)


@pytest.mark.parametrize(("length", "kv_length"), [(0, 3), (5, 0)])
def test_empty(length, kv_length, device, generator):
    q = make(generator, 2, 2, length, 64, HALF).requires_grad_()
    k, v = (make(generator, 2, 1, kv_length, 64, HALF).requires_grad_() for _ in range(2))
    out, lse = ops.flash_attention(q, k, v, return_lse=True)
    assert choose_flash_attention(q, k, v, return_lse=True).path == "triton"
    for grad, x in zip(torch.autograd.grad(out.sum() + lse.exp().sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_public_op(device, generator):
    """Through autograd: with a window, with lse, with only lse used, and from an expanded gradient."""
    q, k, v = (make(generator, 1, h, 20, 64, HALF) for h in (4, 2, 2))
    grad_out, grad_lse = make(generator, 1, 4, 20, 64, HALF), torch.randn(1, 4, 20, device=device)

    def windowed(q, k, v):
        return ops.flash_attention(q, k, v, sliding_window=5), None

    def check(function, plain, exact, grad_out, grad_lse):
        ours, theirs = (gradients(f, (q, k, v), grad_out, grad_lse) for f in (function, plain))
        right = gradients(exact, (q.double(), k.double(), v.double()), grad_out, grad_lse)
        for name, a, b, c in zip(("dq", "dk", "dv"), ours, theirs, right, strict=True):
            assert_close_to_reference(a, b, c, name=name)
            assert a.transpose(1, 2).is_contiguous()

    check(windowed, in_dtype(True, 5), reference(True, 5), grad_out, None)
    check(windowed, in_dtype(True, 5), reference(True, 5), torch.ones((), device=device), None)

    def both(q, k, v):
        return ops.flash_attention(q, k, v, causal=False, return_lse=True)

    check(both, in_dtype(False, None), reference(False, None), grad_out, grad_lse)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(both(*inputs)[1].sum(), inputs)
    assert dq.any() and dk.any() and not dv.any()


def test_only_once_differentiable(device, generator):
    q = make(generator, 1, 1, 4, 64, HALF).requires_grad_()
    weight = torch.ones((), device=device, dtype=HALF, requires_grad=True)
    out = ops.flash_attention(q, q, q, sliding_window=2) * weight
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_varlen(device, generator):
    """Empty sequences of either kind; rows behind the last sequence get zeros."""
    lengths, kv_lengths = [5, 0, 19, 9], [9, 4, 19, 0]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32, device=device) for x in (lengths, kv_lengths)
    )
    q, grad_out = (torch.randn(36, 4, 64, generator=generator, device=device).to(HALF) for _ in range(2))
    k, v = (torch.randn(32, 2, 64, generator=generator, device=device).to(HALF) for _ in range(2))
    grad_lse = torch.randn(4, 36, generator=generator, device=device)

    def with_function(function):
        return lambda q, k, v: function(q, k, v, cu_q, cu_k, 19, 19, return_lse=True)

    plain_function = with_function(ops.flash_attention_varlen_reference)
    ours = gradients(with_function(ops.flash_attention_varlen), (q, k, v), grad_out, grad_lse)
    plain = gradients(in_dtype_varlen(lengths, kv_lengths, True, None), (q, k, v), grad_out, grad_lse)
    exact = gradients(plain_function, (q.double(), k.double(), v.double()), grad_out, grad_lse)
    for name, a, b, c in zip(("dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_close_to_reference(a, b, c, name=name)
    assert not ours[0][33:].any()


def test_packed_rows_of_no_sequence_have_no_gradient(device, generator, monkeypatch):
    """Also where the query heads' shares are added up afterwards; memory that nobody wrote is NaN here."""
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: torch.full(sizes, math.nan, **options))
    cu = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(8, heads, 16, generator=generator, device=device).to(HALF) for heads in (2, 1, 1))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = ops.flash_attention_varlen(q, k, v, cu, cu, 3, 3)
    for grad in torch.autograd.grad(out.float().pow(2).sum(), (q, k, v)):
        assert grad[:5].any() and grad.isfinite().all() and not grad[5:].any()


def test_the_op_without_kernels_is_right(generator):
    """On the CPU the backward op is written out in PyTorch; traced training of packed sequences comes this way."""
    generator = torch.Generator().manual_seed(5)
    q, grad_out = (torch.randn(1, 4, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(1, 2, 4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    grad_lse = torch.randn(1, 4, 6, generator=generator, dtype=torch.float64)
    rest = (None, None, 0, 0, True, 3, 8**-0.5)
    out, lse = torch.ops.tp_kernels.flash_attention_forward(q, k, v, *rest)
    found = torch.ops.tp_kernels.flash_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *rest)
    exact = gradients(reference(True, 3), (q, k, v), grad_out, grad_lse)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(device, generator):
    q, k, v, grad_out = (make(generator, 1, h, 10, 64, HALF) for h in (2, 1, 1, 2))
    cu = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, grad_out)]
    op = torch.ops.tp_kernels.flash_attention_backward.default
    rest = (None, None, 0, 0, True, 3, 0.1)
    out, lse = torch.ops.tp_kernels.flash_attention_forward(q, k, v, *rest)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (grad_out, None, q, k, v, out, lse, *rest), test_utils=checks)
    torch.library.opcheck(op, (grad_out, lse, q, k, v, out, lse, *rest), test_utils=checks)
    rest = (cu, cu, 6, 6, True, None, 0.1)
    out, lse = torch.ops.tp_kernels.flash_attention_forward(*flat[:3], *rest)
    torch.library.opcheck(op, (flat[3], None, *flat[:3], out, lse, *rest), test_utils=checks)


def training_step(cu):
    def step(q, k, v):
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        out, lse = ops.flash_attention(q, k, v, causal=False, return_lse=True)
        total = ops.attention(q, k, v).float().sum() + out.float().sum() + lse.sum()
        total = total + ops.flash_attention(q, k, v, sliding_window=3).float().sum()
        return total + ops.flash_attention_varlen(*flat, cu, cu, 6, 6).float().sum()

    return step


def test_compiles_without_graph_breaks(device, generator):
    q, k, v = (make(generator, 1, h, 10, 64, HALF).requires_grad_() for h in (2, 1, 1))
    step = training_step(torch.tensor([0, 4, 10], dtype=torch.int32, device=device))
    expected = torch.autograd.grad(step(q, k, v), (q, k, v))
    actual = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 0.02, "atol": 0.05} if HAS_GPU else {}))


def test_autocast(device, generator):
    q, k, v = (make(generator, 1, h, 8, 64, torch.float32).requires_grad_() for h in (2, 1, 1))
    with torch.autocast("cuda" if HAS_GPU else "cpu", dtype=HALF):
        out = ops.flash_attention(q, k, v, sliding_window=3)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert out.dtype == HALF and all(grad.dtype == torch.float32 for grad in grads)
    half = [x.detach().to(HALF).requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(ops.flash_attention(*half, sliding_window=3).float().sum(), half)
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b.float())


# GPU ------------------------------------------------------------------------------------------------------------------

# Every combination is compiled anew, so they are few: the lengths bring their own number of heads a group.
SIZES = [(1, 1, 1), (7, 7, 4), (129, 129, 8), (1000, 1000, 4), (129, 1000, 8), (1000, 129, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("length", "kv_length", "group"), SIZES)
def test_gpu_values(length, kv_length, group, dim, device, generator):
    q, grad_out = (make(generator, 2, 8, length, dim, torch.bfloat16) for _ in range(2))
    k, v = (make(generator, 2, 8 // group, kv_length, dim, torch.bfloat16) for _ in range(2))
    grad_lse = torch.randn(2, 8, length, generator=generator, device=device)
    for causal, window in ((True, None), (False, None), (True, 100)):
        check_backward(q, k, v, grad_out, grad_lse, causal, window, None)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 512])
def test_gpu_llama(half, window, device, generator):
    """Llama-3-8B at tp=2; one dtype with every candidate, and the same bits twice."""
    q, grad_out = (make(generator, 1, 16, 2048, 128, half) for _ in range(2))
    k, v = (make(generator, 1, 4, 2048, 128, half) for _ in range(2))
    found = kernels.candidates(gpu_of(q), half, 128, 2048, 2048)
    for config in found if half == torch.bfloat16 and window is None else found[:1]:
        check_backward(q, k, v, grad_out, None, True, window, config)
    once, twice = (run(q, k, v, grad_out, None, True, window, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.gpu
def test_gpu_varlen(device, generator):
    lengths, kv_lengths = [1, 700, 0, 129, 64, 3], [900, 700, 5, 0, 64, 130]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32, device=device) for x in (lengths, kv_lengths)
    )
    q, grad_out = (torch.randn(937, 8, 128, generator=generator, device=device).bfloat16() for _ in range(2))
    k, v = (torch.randn(1799, 2, 128, generator=generator, device=device).bfloat16() for _ in range(2))

    def with_function(function, **options):
        return lambda q, k, v: function(q, k, v, cu_q, cu_k, 700, 900, return_lse=True, **options)

    for causal, window in ((True, None), (False, None), (True, 50)):
        options = {"causal": causal, "sliding_window": window}
        plain_function = with_function(ops.flash_attention_varlen_reference, **options)
        ours = gradients(with_function(ops.flash_attention_varlen, **options), (q, k, v), grad_out)
        plain = gradients(in_dtype_varlen(lengths, kv_lengths, causal, window), (q, k, v), grad_out)
        exact = gradients(plain_function, (q.double(), k.double(), v.double()), grad_out)
        for name, a, b, c in zip(("dq", "dk", "dv"), ours, plain, exact, strict=True):
            assert_close_to_reference(a, b, c, name=name)


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_small(dim, tma, device, generator):
    q, k, v, grad_out = (make(generator, 1, h, 150, dim, torch.bfloat16) for h in (2, 1, 1, 2))
    config = kernels.default_config(H100, torch.bfloat16, dim, 150, 150)
    if gpu_of(q).capability < (9, 0):
        config = kernels.default_config(gpu_of(q), torch.bfloat16, dim, 150, 150)
    for split in (True, False):
        check_backward(q, k, v, grad_out, None, True, 40, config._replace(tma=tma, split=split))


@pytest.mark.gpu
def test_gpu_compile_and_graph_capture(device, generator):
    q, k, v = (make(generator, 1, h, 10, 128, torch.bfloat16).requires_grad_() for h in (4, 2, 2))
    step = training_step(torch.tensor([0, 4, 10], dtype=torch.int32, device=device))
    expected = torch.autograd.grad(step(q, k, v), (q, k, v))
    actual = torch.autograd.grad(torch.compile(step, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.02)
    inputs = [x.detach() for x in (q, k, v)]
    grad_out = torch.randn_like(inputs[0])
    grads = run(*inputs, grad_out, None, True, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*inputs, grad_out, None, True, None, None)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, grads, strict=True))


@pytest.mark.gpu
def test_gpu_plain_training_is_pytorchs_until_measured(device, generator, monkeypatch, tmp_path):
    from tp_kernels.ops import tuning

    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "shipped_table", lambda slug: tmp_path / "none.json")
    tuning.forget_tables()
    q = make(generator, 1, 4, 64, 128, torch.bfloat16).requires_grad_()
    grads = torch.autograd.grad(ops.attention(q, q, q).sum(), q)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q, is_causal=True).sum(), q)
    torch.testing.assert_close(grads[0], expected[0], rtol=0.02, atol=0.02)  # its sums may be in any order
    monkeypatch.undo()
    tuning.forget_tables()
