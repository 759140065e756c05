"""RMSNorm on the GPU path: kernels, ops, gradients, tracing. Tier: no device (Triton's interpreter); GPU."""

from __future__ import annotations

import json

import pytest
import torch

from tp_kernels import ops
from tp_kernels.ops import norm as norm_ops
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import GpuInfo, gpu_of, pretend
from tp_kernels.ops.kernels import norm as kernels
from tp_kernels.ops.kernels import norm_backward as backward_kernels
from tp_kernels.ops.kernels.launch import recording
from tp_kernels.ops.kernels.rows import rows_of
from tp_kernels.testing.numeric import assert_close_to_reference

HAS_GPU = torch.cuda.is_available()
EPS = 1e-5
# One row, tiles of several rows with a ragged end, an odd width, one row a program, a row beyond one pass.
SHAPES = [(1, 256), (2, 3, 5, 64), (7, 37), (20, 16), (3, 2304), (2, kernels.ONE_PASS + 24)]


def randn(generator, *shape, dtype):
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def operands(generator, shape, dtype, weight_dtype=None):
    x, residual = (randn(generator, *shape, dtype=dtype) * 2 for _ in range(2))
    return x, residual, (randn(generator, shape[-1], dtype=torch.float32) * 0.2 + 1).to(weight_dtype or dtype)


def exact(x, weight, eps=EPS):
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(generator, dtype, shape):
    x, residual, weight = operands(generator, shape, dtype)
    before = x.clone(), residual.clone()
    assert norm_ops.choose_rms_norm(x, weight).path == "triton"
    out = ops.rms_norm(x, weight, EPS)
    assert out.dtype == dtype and out.shape == x.shape and out.is_contiguous()
    assert_close_to_reference(out, ops.rms_norm_reference(x, weight, EPS), exact(x, weight))
    normed, summed = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    assert_close_to_reference(normed, ops.rms_norm_reference(summed, weight, EPS), exact(summed, weight))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("types", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_weight_of_another_dtype(generator, types):
    x, residual, weight = operands(generator, (5, 96), *types)
    normed, summed = ops.add_rms_norm(x, residual, weight, EPS)
    assert normed.dtype is torch.float32 and summed.dtype is types[0]
    # The normalised value is rounded to the input's dtype before it meets the weight, as in the reference.
    torch.testing.assert_close(normed, ops.rms_norm_reference(summed, weight, EPS), rtol=2e-3, atol=1e-3)
    assert_close_to_reference(normed, ops.rms_norm_reference(summed, weight, EPS), exact(summed, weight))


def views(generator, dtype):
    qkv = randn(generator, 2, 3, 6 * 16, dtype=dtype)
    yield "heads of a qkv row", qkv[..., :64].view(2, 3, 4, 16)
    yield "rows of a wider tensor", qkv[..., 16:64]
    yield "without the last token", qkv[:, :-1]
    yield "transposed heads", qkv.view(2, 3, 6, 16).transpose(1, 2)
    yield "three levels of strides", randn(generator, 3, 3, 3, 32, dtype=dtype)[::2, ::2, ::2]
    yield "columns", randn(generator, 20, 3, dtype=dtype).t()
    yield "one row for all", randn(generator, 1, 48, dtype=dtype).expand(3, 48)
    yield "every second element", randn(generator, 5, 64, dtype=dtype)[:, ::2]


def test_any_strides(generator):
    dtype = torch.float32
    for name, x in views(generator, dtype):
        weight = randn(generator, 2 * x.shape[-1], dtype=dtype)[::2]
        residual = randn(generator, *x.shape, dtype=dtype)
        out = ops.rms_norm(x, weight, EPS)
        assert_close_to_reference(out, ops.rms_norm_reference(x, weight, EPS), exact(x, weight), name=name)
        for first, second in ((x, residual), (residual, x)):
            normed, summed = ops.add_rms_norm(first, second, weight, EPS)
            assert torch.equal(summed, first + second), name
            plain = ops.rms_norm_reference(summed, weight, EPS)
            assert_close_to_reference(normed, plain, exact(summed, weight), name=name)


def test_rows_of_addresses_without_copies():
    qkv = torch.rand(2, 3, 96)
    heads = qkv[..., :64].view(2, 3, 4, 16)
    contiguous = torch.rand(2, 3, 4, 16)
    rows = rows_of(heads, contiguous)
    assert rows[1:] == (24, 4, (96, 64), (16, 16)) and rows.tensors[0] is heads and rows.tensors[1] is contiguous
    assert rows_of(contiguous)[1:] == (24, 1, (16,), (0,))
    assert rows_of(qkv[..., 16:64])[1:] == (6, 1, (96,), (0,))
    assert rows_of(qkv[:, :-1])[1:] == (4, 2, (288,), (96,))
    assert rows_of(torch.rand(5))[1:] == (1, 1, (5,), (0,))
    strided = torch.rand(4, 5, 6, 8)[::2, ::2, ::2]
    assert rows_of(strided).tensors[0].is_contiguous()
    assert rows_of(torch.rand(0, 3, 8))[1] == 0
    for tensor in (heads, qkv[..., 16:64], qkv[:, :-1], contiguous[:, 0], torch.empty(3, 1, 2, 4)[:, :, 1:], strided):
        rows = rows_of(tensor)
        flat, expected = rows.tensors[0], tensor.reshape(-1, tensor.shape[-1])
        for r in range(rows.count):
            start = (r // rows.inner) * rows.outer[0] + (r % rows.inner) * rows.step[0]
            row = torch.as_strided(flat, (tensor.shape[-1],), (1,), flat.storage_offset() + start)
            assert torch.equal(row, expected[r])


def test_special_values_and_empty_tensors(device):
    weight = torch.ones(20, device=device)
    x = torch.ones(5, 20, device=device)
    x[0, 3], x[1, 4], x[2] = float("nan"), float("inf"), 0.0
    torch.testing.assert_close(ops.rms_norm(x, weight), ops.rms_norm_reference(x, weight), equal_nan=True)
    assert ops.rms_norm(x[:0], weight).shape == (0, 20)
    normed, summed = ops.add_rms_norm(x[:0], x[:0], weight)
    assert normed.shape == summed.shape == (0, 20)
    assert ops.rms_norm(x[:, :0], weight[:0]).shape == (5, 0)
    empty = x[:0].clone().requires_grad_()
    scale = weight.clone().requires_grad_()
    ops.rms_norm(empty, scale).sum().backward()
    assert empty.grad.shape == (0, 20) and torch.equal(scale.grad, torch.zeros_like(weight))
    with pytest.raises(ValueError, match="weight"):
        ops.rms_norm(x, weight[:4])
    with pytest.raises(ValueError, match="residual"):
        ops.add_rms_norm(x, x[:, :4], weight)


def gradients(x, residual, weight, grad, sum_grad, dtype=None):
    """Results and gradients of ``add_rms_norm`` (``rms_norm`` without a residual) in ``dtype``, by PyTorch if given."""
    cast = lambda t: t if t is None or dtype is None else t.to(dtype)  # noqa: E731
    leaves = [None if t is None else cast(t).detach().requires_grad_() for t in (x, residual, weight)]
    plain = dtype is not None
    if residual is None:
        norm = ops.rms_norm_reference if plain else ops.rms_norm
        outs = (norm(leaves[0], leaves[2], EPS),)
    else:
        norm = ops.add_rms_norm_reference if plain else ops.add_rms_norm
        outs = norm(*leaves, EPS)
    pairs = [(out, cast(g)) for out, g in zip(outs, (grad, sum_grad), strict=False) if g is not None]
    torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
    return [None if leaf is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("shape", [(9, 64), (2, 3, 4, 16), (3, 1100), (4, 37)], ids=str)
@pytest.mark.parametrize("uses", ["norm", "both", "normed only", "sum only"])
def test_gradients(generator, dtype, shape, uses):
    x, residual, weight = operands(generator, shape, dtype)
    grad, sum_grad = (randn(generator, *shape, dtype=dtype) for _ in range(2))
    residual = None if uses == "norm" else residual
    grad = None if uses == "sum only" else grad
    sum_grad = sum_grad if uses in ("both", "sum only") else None
    found = gradients(x, residual, weight, grad, sum_grad)
    plain = gradients(x, residual, weight, grad, sum_grad, dtype)
    # The kernel differentiates at the sum as it was rounded, which the exact reference must be told.
    wide = (x + residual).double() - x.double() if residual is not None else None
    reference = gradients(x, wide, weight, grad, sum_grad, torch.float64)
    for name, actual, torchs, ideal in zip(("x", "residual", "weight"), found, plain, reference, strict=True):
        assert (actual is None) == (torchs is None), name
        if actual is not None:
            assert actual.dtype == dtype and actual.is_contiguous()
            # In fp32 both are a few roundings off, and which of them is luckier differs between inputs.
            factor = 4.0 if dtype is torch.float32 else 2.0
            assert_close_to_reference(actual, torchs, ideal, factor, name=name)


def test_gradients_of_views_and_frozen_parts(generator):
    qkv = randn(generator, 2, 3, 96, dtype=torch.float32)
    weight = randn(generator, 16, dtype=torch.float32)
    # An expanded gradient (of a sum), an input that is a slice, a weight that is not contiguous.
    for norm in (ops.rms_norm, ops.rms_norm_reference):
        leaf = qkv.clone().requires_grad_()
        scale = torch.stack([weight, weight], 1)[:, 0].requires_grad_()
        norm(leaf[..., :64].view(2, 3, 4, 16), scale, EPS).sum().backward()
        if norm is ops.rms_norm:
            found = leaf.grad, scale.grad
    torch.testing.assert_close(found, (leaf.grad, scale.grad))
    frozen = leaf.detach()[..., :16].requires_grad_()
    (only,) = torch.autograd.grad(ops.rms_norm(frozen, weight, EPS).sum(), frozen)
    (plain,) = torch.autograd.grad(ops.rms_norm_reference(frozen, weight, EPS).sum(), frozen)
    torch.testing.assert_close(only, plain)
    scale = weight.clone().requires_grad_()
    found = torch.autograd.grad(ops.rms_norm(frozen.detach(), scale, EPS).square().sum(), scale)
    plain = torch.autograd.grad(ops.rms_norm_reference(frozen.detach(), scale, EPS).square().sum(), scale)
    torch.testing.assert_close(found, plain)


def test_a_row_too_wide_for_the_backward_takes_pytorch(generator):
    x = randn(generator, 2, 2 * kernels.ONE_PASS, dtype=torch.float32).requires_grad_()
    weight = torch.ones_like(x[0]).detach()
    assert norm_ops.choose_rms_norm(x, weight).path == "torch"
    assert norm_ops.choose_rms_norm(x.detach(), weight).path == "triton"
    ops.rms_norm(x, weight).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("config", [(1, 4, 1, 1), (1, 4, 1, 3), (4, 4, 2, 1), (4, 4, 2, 2)], ids=str)
def test_backward_walks_many_rows(generator, config):
    """More rows than programs, an uneven last turn, both ways of running ahead; the same bits every time."""
    config = backward_kernels.Config(*config)
    info = gpu_of(torch.empty(0, device="cuda")) if HAS_GPU else GpuInfo("two multiprocessors", (9, 0), 2)
    m = 3 * config.programs_per_sm * config.block_m * info.num_sms + config.block_m // 2 + 1
    x, sum_grad, weight = operands(generator, (m, 40), torch.float32)
    grad = randn(generator, m, 40, dtype=torch.float32)
    rstd = (x.square().mean(-1) + EPS).rsqrt()
    leaf, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.autograd.backward([ops.rms_norm_reference(leaf, scale, EPS)], [grad])
    results = []
    for _ in range(2):
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        with pretend(info):
            backward_kernels.rms_norm_backward(dx, dweight, grad, x, weight, rstd, sum_grad, config)
        results.append((dx, dweight))
    # On a GPU a column has 66 times as many rows, summed by PyTorch and here in different orders.
    atol = 5e-4 if HAS_GPU else 2e-5
    torch.testing.assert_close(results[0], (leaf.grad + sum_grad, scale.grad), rtol=1e-5, atol=atol)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("shape", "block_m"), [((70, 24), 8), ((70, 24), 64), ((3, 1500), 1)], ids=str)
def test_candidates_compute_the_same(generator, shape, block_m):
    x, residual, weight = operands(generator, shape, torch.float32)
    expected = ops.add_rms_norm_reference(x, residual, weight, EPS)
    configs = kernels.candidates(gpu_of(x), x.dtype, *shape)
    assert kernels.Config(**configs[-1]._asdict()) == configs[-1]
    config = next(c for c in configs[1:] if c.block_m == block_m)
    out, summed = torch.empty_like(x), torch.empty_like(x)
    rstd = torch.empty(shape[0], device=x.device)
    kernels.add_rms_norm(out, summed, x, residual, weight, EPS, rstd, config)
    torch.testing.assert_close((out, summed), expected)
    torch.testing.assert_close(rstd, (expected[1].square().mean(-1) + EPS).rsqrt())


@pytest.mark.parametrize("h", [64, 128, 1024, 2880, 4096, 5120, 8192, 16384])
def test_configurations_fit(device, old_device, h):
    for info in (GpuInfo("H100", (9, 0), 132), GpuInfo("A100", (8, 0), 108)):
        for m in (1, 64, 8192):
            found = kernels.candidates(info, torch.bfloat16, m, h)
            assert 1 <= len(found) <= 13 and len(set(found)) == len(found)
            assert all(c.num_warps & (c.num_warps - 1) == 0 and 1 <= c.num_warps <= 32 for c in found)
        for residual in (0, 1):
            found = backward_kernels.candidates(info, torch.bfloat16, 8192, h, residual)
            assert len(found) <= 12 and len(set(found)) == len(found)
            assert all(backward_kernels._fits(info, c, h, 2, 2 + residual) for c in found)


def test_a_configuration_that_does_not_fit_is_not_launched():
    x, weight, rstd = (torch.empty(*shape, device="meta") for shape in ((4, 8192), (8192,), (4,)))
    with pretend(GpuInfo("H100", (9, 0), 132)) as info, recording() as launches:
        large = backward_kernels.Config(1, 16, 1, 3)
        backward_kernels.rms_norm_backward(x, weight, x, x, weight, rstd, x, large)
    assert not backward_kernels._fits(info, large, 8192, 4, 3)
    assert launches[0].options["STAGES"] == 2


OP_CALLS = {
    "rms_norm": lambda x, r, w: (x, w, EPS),
    "add_rms_norm": lambda x, r, w: (x, r, w, EPS),
    "rms_norm_forward": lambda x, r, w: (x, r, w, EPS),
    "rms_norm_backward": lambda x, r, w: (r, x, w, torch.rand(x.shape[0] * x.shape[1], device=x.device), x, True),
}


@pytest.mark.parametrize("name", OP_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(generator, name, dtype):
    x, residual, weight = operands(generator, (2, 3, 32), dtype)
    arguments = OP_CALLS[name](x, residual, weight)
    arguments = tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(getattr(torch.ops.tp_kernels, name).default, arguments)


def block(x, residual, weight):
    normed, summed = ops.add_rms_norm(x, residual, weight, EPS)
    return ops.rms_norm(torch.tanh(normed), weight, EPS) + summed


def check_compiled(generator, dtype, shape, backend, **bounds):
    x, residual, weight = operands(generator, shape, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for function in (block, compiled):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        out = function(*leaves)
        out.backward(x)
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(results[0], results[1], **bounds)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, residual, weight), block(x, residual, weight), **bounds)


def test_compile(generator):
    check_compiled(generator, torch.float32, (3, 32), "aot_eager")


def test_compile_with_sizes_and_numbers_that_may_vary(generator):
    """An attribute is a symbol then, and Dynamo fails to hand one to a second function."""

    class Block(torch.nn.Module):
        eps = EPS

        def forward(self, x, weight):
            return ops.rms_norm(ops.rms_norm(x, weight, self.eps), weight, self.eps)

    torch._dynamo.reset()
    plain = Block()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager", dynamic=True)
    x, _, weight = operands(generator, (3, 32), torch.float32)
    x.requires_grad_()
    (expected,), (actual,) = (torch.autograd.grad(block(x, weight).sum(), x) for block in (plain, compiled))
    torch.testing.assert_close(actual, expected)


def test_autocast_changes_nothing(generator):
    x, residual, weight = operands(generator, (3, 32), torch.float32)
    expected = ops.add_rms_norm(x, residual, weight, EPS)
    half = ops.rms_norm(x.half(), weight, EPS)
    with torch.autocast(x.device.type, torch.bfloat16):
        torch.testing.assert_close(ops.add_rms_norm(x, residual, weight, EPS), expected, rtol=0, atol=0)
        plain = ops.rms_norm_reference(x.half(), weight, EPS)
        assert ops.rms_norm(x.half(), weight, EPS).dtype == half.dtype == plain.dtype
        leaf = x.clone().requires_grad_()
        ops.rms_norm(leaf, weight, EPS).sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_transforms_and_subclasses_take_pytorch(generator):
    x, _, weight = operands(generator, (3, 32), torch.float32)

    class Named(torch.Tensor):
        pass

    assert "Named" in norm_ops.choose_rms_norm(x.as_subclass(Named), weight).reason
    assert "Named" in norm_ops.choose_rms_norm(x, weight.as_subclass(Named)).reason
    rows = torch.func.vmap(lambda row: ops.rms_norm(row, weight, EPS))(x)
    torch.testing.assert_close(rows, ops.rms_norm(x, weight, EPS))
    grad = torch.func.grad(lambda t: ops.rms_norm(t, weight, EPS).square().sum())(x)
    leaf = x.clone().requires_grad_()
    ops.rms_norm(leaf, weight, EPS).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)
    assert "float64" in norm_ops.choose_rms_norm(x.double(), weight).reason
    torch.testing.assert_close(ops.rms_norm(x.double(), weight.double(), EPS), exact(x, weight))


def test_tables_decide(generator, tmp_path, monkeypatch):
    x, residual, weight = operands(generator, (6, 256), torch.float32)
    rows = [{"dtype": "float32", "sizes": {"m": 6, "h": 256}, "path": path, "config": config, "us": {"triton": 2.0}}
            for path, config in (("torch", {}), ("triton", {"block_m": 2, "num_warps": 2}))]  # fmt: skip
    table = {"gpu": "here", "measured": "2026-01-01", "ops": {"rms_norm": rows[:1], "add_rms_norm": rows[1:]}}
    (tmp_path / f"{gpu_of(x).slug}.json").write_text(json.dumps(table))
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()
    try:
        choice = norm_ops.choose_rms_norm(x, weight)
        assert choice.path == "torch" and "triton 2.0 us" in choice.reason and "here" in choice.reason
        choice = norm_ops.choose_add_rms_norm(x, residual, weight)
        assert (choice.path, choice.config) == ("triton", {"block_m": 2, "num_warps": 2})
        with recording() as launches:
            ops.rms_norm(x, weight)
            ops.add_rms_norm(x, residual, weight)
        assert [launch.options["BLOCK_M"] for launch in launches] == [2]
    finally:
        monkeypatch.undo()
        tuning.forget_tables()
    assert "not measured" in norm_ops.choose_rms_norm(x, weight).reason


def test_a_parameter_is_read_ahead_only_without_gradients(generator):
    x, _, weight = operands(generator, (6, 256), torch.float32)
    parameter = torch.nn.Parameter(weight)
    with recording() as launches:
        ops.rms_norm(x, parameter)
        with torch.no_grad():
            ops.rms_norm(x, parameter)
            ops.rms_norm(x, weight)
    assert [launch.options["WEIGHT_FIRST"] for launch in launches] == [False, True, False]


# GPU ------------------------------------------------------------------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]
LLAMA = [(1, 4096), (17, 8192), (2048, 4096), (64, 16384), (33, 5120), (512, 40, 128), (3, 32768)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", LLAMA, ids=str)
def test_real_sizes(generator, dtype, shape):
    test_forward(generator, dtype, shape)
    for uses in ("norm", "both"):
        test_gradients(generator, dtype, shape, uses)


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(9, 37), (40, 128), (5, 2304), (2, kernels.ONE_PASS + 24)], ids=str)
def test_small_sizes(generator, shape):
    test_forward(generator, torch.bfloat16, shape)
    test_gradients(generator, torch.bfloat16, shape, "both")


@pytest.mark.gpu
def test_compile_with_inductor(generator):
    # Inductor does not round what it recomputes for the backward: 1 - tanh^2 is off by a bf16 ulp of 1 where tanh is 1.
    check_compiled(generator, torch.bfloat16, (64, 4096), "inductor", rtol=0.05, atol=0.1)


@pytest.mark.gpu
def test_cuda_graph(generator):
    """A chain of norms that depend on each other, launched ahead of one another (PDL), replayed with new inputs."""
    x, residual, weight = operands(generator, (4, 4096), torch.bfloat16)
    weight = torch.nn.Parameter(weight)

    def chain(x, residual):
        for _ in range(8):
            x, residual = ops.add_rms_norm(x, residual, weight, EPS)
            x = ops.rms_norm(x, weight, EPS)
        return x, residual

    with torch.no_grad():
        chain(x, residual)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = chain(x, residual)
        for _ in range(3):
            x.copy_(randn(generator, 4, 4096, dtype=x.dtype))
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(outputs, chain(x, residual), strict=True))
