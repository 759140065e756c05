"""``linear`` and ``swiglu_linear`` on GPUs: which path is chosen, and every path through PyTorch's machinery.

Tiers: no device (Triton's interpreter; choices), GPU (graphs, the default compiler).
"""

import pytest
import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels.ops import linear_reference, swiglu_linear_reference, tuning
from tp_kernels.ops._gpu import gpu_of
from tp_kernels.ops._gpu_linear import choose_linear, choose_swiglu_linear, gpu_linear, gpu_swiglu_linear
from tp_kernels.ops.kernels.matmul import Config
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.op_bench.case import randn


def operands(generator, m, n, k, dtype):
    return (
        randn(generator, m, k, dtype=dtype),
        randn(generator, n, k, dtype=dtype, scale=max(k, 1) ** -0.5),
        randn(generator, n, dtype=dtype),
        randn(generator, m, n, dtype=dtype),
    )


def doubles(*tensors):
    return [None if t is None else t.double() for t in tensors]


# Choices -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(measured):
    """``table(op, path, m, n, k, **config)``: make that the measured choice for this GPU."""

    def write(op, path, m, n, k, **config):
        measured(op, path, {"m": m, "n": n, "k": k}, config)

    return write


SMALL = Config(64, 64, num_warps=4)._asdict()


def test_cublas_is_the_default(device, generator, table):
    x, weight, bias, residual = operands(generator, 4, 16, 32, torch.float16)
    assert choose_linear(x, weight).path == "torch"
    assert "not measured on" in choose_linear(x, weight, bias, residual).reason
    assert choose_swiglu_linear(x, weight).path == "torch"


def test_a_table_decides_within_what_a_path_takes(device, generator, table):
    x, weight, _, residual = operands(generator, 16, 64, 64, torch.float16)
    table("linear", "gemv", 8, 64, 64)
    table("swiglu_linear", "gemv", 8, 32, 64)
    choice = choose_linear(x[:8], weight)
    assert choice.path == "gemv"
    assert choice.reason == f"gemv 3.0 us, other 4.0 us ({gpu_of(x).name}, 2026-01-01)"
    assert "takes up to 8 rows, not 12" in choose_linear(x[:12], weight).reason
    assert choose_linear(x[:4].clone(), weight, residual=residual[:4]).path == "gemv"
    assert choose_linear(x[:2], weight).path == "torch"  # out of reach of the measurement
    assert "torch.float32: our GEMMs" in choose_linear(x.float(), weight.float()).reason
    assert "not contiguous" in choose_linear(x[:8], weight.t().contiguous().t()).reason
    assert "multiple of 16 bytes" in choose_linear(x.flatten()[1:513].view(8, 64), weight).reason
    assert choose_swiglu_linear(x[:8], weight).path == "gemv"
    assert "keeps no gate and up" in choose_swiglu_linear(x[:8], weight, save_gate_up=True).reason
    table("linear_residual", "triton", 8, 64, 64, **SMALL)
    assert choose_linear(x[:8], weight, residual=residual[:8]) == tuning.Choice(
        "triton", f"triton 3.0 us, other 4.0 us ({gpu_of(x).name}, 2026-01-01)", SMALL
    )
    assert choose_linear(x[:8], weight).path == "gemv"


def test_tables_of_other_versions_are_not_trusted(device, generator, table):
    x, weight, _, _ = operands(generator, 4, 64, 64, torch.float16)
    table("linear", "triton", 4, 64, 64, blocks=3)
    table("swiglu_linear", "unheard-of", 4, 32, 64)
    assert "tune again" in choose_linear(x, weight).reason
    assert "tune again" in choose_swiglu_linear(x, weight).reason


class Quantised(torch.Tensor):
    """A weight that says what it does, and knows nothing but ``F.linear``."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in ("mm", "addmm", "matmul", "t"):
            raise NotImplementedError(name)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_other_types_are_given_to_f_linear(device, generator, table):
    table("linear", "triton", 4, 64, 64, **SMALL)
    x, weight, _, residual = operands(generator, 4, 64, 64, torch.float16)
    other = weight.as_subclass(Quantised)
    assert choose_linear(x, other, residual=residual) == tuning.Choice("torch", "the weight is a Quantised")
    with torch.no_grad():
        expected = linear_reference(x, weight, None, residual)
        found = ops.linear(x, other, None, residual).as_subclass(torch.Tensor)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=4e-3)  # rounded once or twice


@pytest.mark.parametrize("path", ["torch", "triton", "gemv", "skinny"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_on_every_path(device, generator, table, path, activation):
    table("linear", path, 6, 32, 80, **(SMALL if path == "triton" else {}))
    x, weight, bias, residual = operands(generator, 6, 32, 80, torch.float16)
    x, residual = x.view(2, 3, 80).transpose(0, 1), residual.view(3, 2, 32)
    with torch.no_grad():
        # A parameter that nobody trains may be read before the kernel in front has ended.
        for args in ((x, weight, None, None), (x, torch.nn.Parameter(weight), bias, residual)):
            assert choose_linear(*args, activation).path == path
            assert_close_to_reference(
                ops.linear(*args, activation),
                linear_reference(*args, activation),
                linear_reference(*doubles(*args), activation),
            )


@pytest.mark.parametrize("path", ["torch", "triton", "gemv", "skinny"])
@pytest.mark.parametrize("save", [False, True])
def test_swiglu_on_every_path(device, generator, table, path, save):
    config = SMALL if path == "triton" else {}
    table("swiglu_linear", path, 6, 24, 80, **config)
    x, weight, bias, _ = operands(generator, 6, 48, 80, torch.float16)
    x = x.view(2, 3, 80)
    for b in (None, bias):
        out, gate_up = gpu_swiglu_linear(x, weight, b, save)
        assert_close_to_reference(
            out, swiglu_linear_reference(x, weight, b), swiglu_linear_reference(*doubles(x, weight, b))
        )
        assert (gate_up is not None) == save
        if save:
            assert_close_to_reference(gate_up, F.linear(x, weight, b), F.linear(*doubles(x, weight, b)))


def test_other_dtypes_and_empty_inputs_are_pytorchs(device, generator, table):
    table("linear", "triton", 4, 64, 64, **SMALL)
    x, weight, bias, residual = operands(generator, 4, 64, 64, torch.float64)
    torch.testing.assert_close(ops.linear(x, weight, bias, residual), linear_reference(x, weight, bias, residual, None))
    assert_close_to_reference(
        gpu_swiglu_linear(x, weight)[0],
        swiglu_linear_reference(x, weight, None),
        swiglu_linear_reference(x, weight, None),
    )
    x, weight, bias, residual = operands(generator, 4, 64, 64, torch.float16)
    assert ops.linear(x[:0], weight, bias, residual[:0]).shape == (0, 64)
    assert ops.linear(x, weight[:0]).shape == (4, 0)
    assert torch.equal(ops.linear(x[:, :0], weight[:, :0], bias), bias.expand(4, 64))
    assert gpu_swiglu_linear(x[:0], weight, None, True)[1].shape == (0, 64)
    assert gpu_linear(x[0], weight, bias, residual[0]).shape == (64,)


# Through PyTorch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_gradients(device, generator, table, path, activation):
    table("linear", path, 6, 64, 72, **(SMALL if path == "triton" else {}))
    inputs = operands(generator, 6, 64, 72, torch.float16)
    inputs = [inputs[0].view(2, 3, 72), *inputs[1:3], inputs[3].view(2, 3, 64)]
    grad = torch.randn(2, 3, 64, generator=generator, device=generator.device).half()

    def gradients(function, tensors, grad):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*tensors, activation), tensors, grad)

    ours = gradients(ops.linear, inputs, grad)
    plain = gradients(linear_reference, inputs, grad)
    exact = gradients(linear_reference, doubles(*inputs), grad.double())
    for name, got, same, reference in zip(("x", "weight", "bias", "residual"), ours, plain, exact, strict=True):
        assert_close_to_reference(got, same, reference, name=name)


def test_some_gradients_and_second_ones(device, generator, table):
    table("linear", "triton", 6, 64, 64, **SMALL)
    x, weight, _, residual = operands(generator, 6, 64, 64, torch.float16)
    weight.requires_grad_()
    out = ops.linear(x, weight, None, residual)
    assert out.requires_grad
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert_close_to_reference(grad, x.sum(0).expand(64, 64), x.double().sum(0).expand(64, 64))
    x.requires_grad_()
    (grad_x,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad_x.sum(), weight)
    assert second.shape == weight.shape and second.isfinite().all()


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("cast_weight", [False, True])
def test_autocast(device, generator, table, path, cast_weight):
    """The dtypes are PyTorch's: the projection in autocast's, a sum with a wider residual in that of the residual."""
    table("linear", path, 6, 64, 72, **(SMALL if path == "triton" else {}))
    x, weight, bias, residual = operands(generator, 6, 64, 72, torch.float32)
    if cast_weight:
        weight = weight.half()
    for requires_grad in (False, True):
        x.requires_grad_(requires_grad)
        for r in (None, residual, residual.half()):
            with torch.autocast(device, torch.float16):
                out = ops.linear(x, weight, bias, r, "relu")
                plain = linear_reference(x, weight, bias, r, "relu")
                assert choose_linear(x, weight, bias, r).path == (path if cast_weight else "torch")
            assert out.dtype == plain.dtype
            exact = linear_reference(*doubles(x.half(), weight.half(), bias.half(), r), "relu")
            assert_close_to_reference(out.half(), plain.half(), exact)
            if requires_grad:
                (grad,) = torch.autograd.grad(out.float().sum(), x)
                (expected,) = torch.autograd.grad(plain.float().sum(), x)
                assert grad.dtype == torch.float32
                torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-2)


def test_opcheck(device, generator, table):
    table("linear", "triton", 6, 64, 72, **SMALL)
    args = operands(generator, 6, 64, 72, torch.float16)
    torch.library.opcheck(torch.ops.tp_kernels.linear.default, (*args, "gelu"))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(device, generator, table, autocast):
    """Without a gradient one opaque op, with one PyTorch's own composition; autocast is seen by the compiler."""
    table("linear", "triton", 6, 64, 72, **SMALL)
    x, weight, bias, residual = operands(generator, 6, 64, 72, torch.float16)
    if autocast:
        x = x.float()

    def model(x, weight, bias, residual):
        with torch.autocast(device, torch.float16, enabled=autocast):
            return ops.linear(x, weight, bias, residual, "silu") * 2

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        eager = model(x, weight, bias, residual)
        got = compiled(x, weight, bias, residual)
    assert got.dtype == eager.dtype == torch.float16
    assert torch.equal(got, eager)
    weight.requires_grad_()
    (got,) = torch.autograd.grad(compiled(x, weight, bias, residual).float().sum(), weight)
    (eager,) = torch.autograd.grad(model(x, weight, bias, residual).float().sum(), weight)
    torch.testing.assert_close(got, eager, rtol=1e-2, atol=1e-2)


# GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["torch", "triton", "gemv", "skinny"])
def test_graph_capture(table, path):
    table("linear", path, 8, 1024, 1024)
    table("swiglu_linear", path, 8, 512, 1024)
    generator = torch.Generator(device="cuda").manual_seed(5)
    x, weight, bias, residual = operands(generator, 8, 1024, 1024, torch.bfloat16)
    weight = torch.nn.Parameter(weight)

    def step():
        y = ops.linear(x, weight, bias, residual, "silu")
        return ops.swiglu_linear(y, weight)

    with torch.no_grad():
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for _ in range(3):
            x.normal_()
            graph.replay()
            if path == "torch":
                torch.testing.assert_close(out, step(), rtol=2e-2, atol=2e-2)
            else:
                assert torch.equal(out, step())


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_compiled_training_and_inference(table, path):
    table("linear", path, 256, 1024, 512)
    generator = torch.Generator(device="cuda").manual_seed(5)
    x, weight, bias, residual = operands(generator, 256, 1024, 512, torch.bfloat16)
    weight.requires_grad_()
    compiled = torch.compile(lambda *args: ops.linear(*args, "gelu"), fullgraph=True)
    got, eager = compiled(x, weight, bias, residual), ops.linear(x, weight, bias, residual, "gelu")
    torch.testing.assert_close(got, eager, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.float().sum(), weight)[0] for y in (got, eager)), rtol=2e-2, atol=1
    )
    with torch.no_grad():
        got, eager = compiled(x, weight, bias, residual), ops.linear(x, weight, bias, residual, "gelu")
    torch.testing.assert_close(got, eager, rtol=2e-2, atol=2e-2)
