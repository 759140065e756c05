"""SwiGLU: the gate alone, its matmul backward, and the whole MLP with gradients.

Tier: no device (Triton's interpreter) for values, tracing and autograd; GPU for real sizes, bf16 and CUDA graphs.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels.layers import ParallelMLP
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import A100, H100
from tp_kernels.ops.kernels import silu_mul as gate_kernels
from tp_kernels.ops.kernels import swiglu_backward as matmul_kernels
from tp_kernels.ops.swiglu import choose_silu_mul, swiglu_linear_reference
from tp_kernels.ops.swiglu_mlp import choose_swiglu_backward, swiglu_mlp_reference
from tp_kernels.testing.numeric import assert_close_to_reference

NAN = float("nan")
HAS_GPU = torch.cuda.is_available()
BACKEND = "inductor" if HAS_GPU else "aot_eager"


def randn(generator, *shape, dtype, scale=1.0):
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


def gradients(function, *inputs, grad):
    """The result, then the gradient of every input."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def compare(function, reference, *inputs, grad):
    """Assert that result and gradients are as close to float64's as PyTorch's in the same dtype."""
    found = gradients(function, *inputs, grad=grad)
    expected = gradients(reference, *inputs, grad=grad)
    exact = gradients(reference, *(None if t is None else t.double() for t in inputs), grad=grad.double())
    for i, (actual, same, wide) in enumerate(zip(found, expected, exact, strict=True)):
        assert_close_to_reference(actual, same, wide, name=f"result {i}")


# ---- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 300), (5, 257), (2, 3, 64), (0, 8), (4, 0), (33,)], ids=str)
def test_gate(device, dtype, generator, shape):
    width = shape[-1]
    gate_up = randn(generator, *shape[:-1], 2 * width, dtype=dtype, scale=3.0)
    compare(ops.silu_mul, ops.silu_mul_reference, gate_up, grad=randn(generator, *shape, dtype=dtype))
    with torch.no_grad():
        assert torch.equal(ops.silu_mul(gate_up), ops.silu_mul(gate_up.clone().requires_grad_()).detach())


def test_gate_takes_the_kernel(device, monkeypatch, generator):
    calls = []
    for name in ("silu_mul_forward", "silu_mul_backward"):
        kernel = getattr(gate_kernels, name)
        monkeypatch.setattr(gate_kernels, name, lambda *a, kernel=kernel, name=name: (calls.append(name), kernel(*a)))
    gate_up = randn(generator, 3, 32, dtype=torch.float16).requires_grad_()
    assert choose_silu_mul(gate_up).path == "triton" and "not measured" in choose_silu_mul(gate_up).reason
    ops.silu_mul(gate_up).sum().backward()
    assert calls == ["silu_mul_forward", "silu_mul_backward"]
    double = gate_up.detach().double()
    assert choose_silu_mul(double).path == "torch"
    assert torch.equal(ops.silu_mul(double), ops.silu_mul_reference(double)) and len(calls) == 2


def test_gate_extremes(device, generator):
    """Large and infinite gates: zeros, infinities and NaN where PyTorch has them; odd widths are refused."""
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 1e4, float("inf"), -float("inf"), NAN], device=device)
    gate_up = torch.cat([gate, torch.full_like(gate, 2.0)])[None].requires_grad_()
    out = ops.silu_mul(gate_up)
    out.sum().backward()
    expected = gate_up.detach().clone().requires_grad_()
    ops.silu_mul_reference(expected).sum().backward()
    torch.testing.assert_close(out, ops.silu_mul_reference(gate_up), equal_nan=True)
    torch.testing.assert_close(gate_up.grad, expected.grad, equal_nan=True)
    for shape in ((3, 5), ()):
        with pytest.raises(ValueError, match="gate and up side by side"):
            ops.silu_mul(torch.zeros(shape, device=device))


def test_gate_layouts(device, dtype, generator):
    """Strided rows, an expanded gradient, a transposed input, and writing the gradient over the input."""
    wide = randn(generator, 6, 100, dtype=dtype)
    for gate_up in (wide[:, 10:50], wide[::2], wide.t()[:, :4], wide[:1].expand(5, -1), wide.view(2, 3, 100)[:, 1:]):
        grad = randn(generator, 1, dtype=dtype).expand(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        compare(ops.silu_mul, ops.silu_mul_reference, gate_up, grad=grad)
        hidden = torch.full(grad.shape, NAN, dtype=dtype, device=device)
        result = torch.full(gate_up.shape, NAN, dtype=dtype, device=device)
        gate_kernels.silu_mul_backward(result, grad, gate_up, hidden)
        torch.testing.assert_close(hidden, ops.silu_mul(gate_up), rtol=0, atol=0)
        owned = gate_up.contiguous()
        gate_kernels.silu_mul_backward(owned, grad, owned)
        assert torch.equal(owned, result)
    # Rows of the output may be strided, elements may not.
    out = torch.full((6, 80), NAN, dtype=dtype, device=device)
    gate_kernels.silu_mul_forward(out[:, 8:58], wide)
    assert torch.equal(out[:, 8:58], ops.silu_mul(wide)) and out[:, :8].isnan().all() and out[:, 58:].isnan().all()
    with pytest.raises(ValueError, match=r"out .* must have adjacent elements"):
        gate_kernels.silu_mul_forward(torch.empty(50, 6, dtype=dtype, device=device).t(), wide)


def test_gate_configs(device, generator):
    gate_up = randn(generator, 5, 700, dtype=torch.float16)
    expected = ops.silu_mul(gate_up)
    configs = gate_kernels.candidates(H100, torch.float16, 5, 350)
    assert configs[0] == gate_kernels.default_config(H100, torch.float16, 5, 350) and 1 < len(configs) <= 12
    for config in configs:
        out = torch.full_like(expected, NAN)
        gate_kernels.silu_mul_forward(out, gate_up, gate_kernels.Config(**config._asdict()))
        assert torch.equal(out, expected)


# ---- the matmul in front of the gate's backward ----------------------------------------------------------------------


def matmul_case(generator, m, n, k, dtype):
    gate_up = randn(generator, m, 2 * n, dtype=dtype)
    return randn(generator, m, k, dtype=dtype), randn(generator, k, n, dtype=dtype, scale=max(k, 1) ** -0.5), gate_up


def unfused(grad_y, w_down, gate_up):
    gate_up = gate_up.detach().requires_grad_()
    hidden = ops.silu_mul_reference(gate_up)
    hidden.backward(grad_y @ w_down)
    return gate_up.grad, hidden.detach()


def check_matmul(inputs, config=None, with_hidden=True):
    grad_y, w_down, gate_up = inputs
    hidden = torch.full((len(gate_up), w_down.shape[1]), NAN, dtype=grad_y.dtype, device=grad_y.device)
    result = torch.full_like(gate_up, NAN, memory_format=torch.contiguous_format)
    matmul_kernels.dswiglu_matmul(result, hidden if with_hidden else None, *inputs, config)
    expected, exact = unfused(*inputs), unfused(*(t.double() for t in inputs))
    assert_close_to_reference(result, expected[0], exact[0], name="grad_gate_up")
    if with_hidden:
        assert_close_to_reference(hidden, expected[1], exact[1], name="hidden")
    return result


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (70, 40, 33), (3, 136, 72), (5, 24, 0)])
def test_matmul(device, dtype, generator, m, n, k):
    check_matmul(matmul_case(generator, m, n, k, dtype))


@pytest.mark.parametrize("subtiles", [1, 2, 4, 8])
@pytest.mark.parametrize("persistent", [False, True])
def test_matmul_by_tma(device, generator, subtiles, persistent):
    """Ragged in every direction, more tiles than one group of rows, every cut of the epilogue."""
    config = matmul_kernels.Config(64, 64, 64, 4, 2, subtiles, 2, persistent, flatten=persistent and HAS_GPU)
    check_matmul(matmul_case(generator, 130, 72, 72, torch.float16), config)


@pytest.mark.parametrize("subtiles", [1, 2, 4])
def test_matmul_by_pointers(old_device, generator, subtiles):
    config = matmul_kernels.Config(64, 64, 64, 4, 2, subtiles, 2, tma=False)
    check_matmul(matmul_case(generator, 70, 72, 40, torch.float16), config, with_hidden=subtiles > 1)


def test_matmul_layouts(device, generator):
    """Rows that TMA cannot address, a transposed weight, strided rows, and writing over ``gate_up``."""
    grad_y, w_down, gate_up = matmul_case(generator, 9, 32, 24, torch.float16)
    expected = check_matmul((grad_y, w_down, gate_up))
    odd = torch.empty(9 * 24 + 1, dtype=torch.float16, device=device)[1:].view(9, 24).copy_(grad_y)
    check_matmul((odd, w_down, gate_up), matmul_kernels.Config(64, 64, 64, 4, 2, 2))
    check_matmul((grad_y, w_down.t().contiguous().t(), gate_up))
    padded = torch.zeros(9, 40, dtype=torch.float16, device=device)
    padded[:, :24] = grad_y
    check_matmul((padded[:, :24], w_down, gate_up))
    check_matmul((grad_y[:1].expand(9, -1), w_down, gate_up))
    owned = gate_up.clone()
    matmul_kernels.dswiglu_matmul(owned, None, grad_y, w_down, owned)
    assert torch.equal(owned, expected)
    hidden = torch.empty(32, 9, dtype=torch.float16, device=device).t()
    with pytest.raises(ValueError, match=r"hidden .* must have adjacent elements"):
        matmul_kernels.dswiglu_matmul(owned, hidden, grad_y, w_down, owned)


@pytest.mark.parametrize("info", [H100, A100], ids=lambda info: info.slug)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(4096, 14336, 4096), (16, 1792, 4096), (512, 13, 64)], ids=str)
def test_configs_fit(info, dtype, sizes):
    configs = matmul_kernels.candidates(info, dtype, *sizes)
    assert 1 <= len(configs) <= 12 and len(set(configs)) == len(configs)
    assert configs[0] == matmul_kernels.default_config(info, dtype, *sizes)
    for config in configs:
        assert matmul_kernels.Config(**config._asdict()) == config
        assert config.tma == (info is H100 and dtype is torch.bfloat16 and sizes[1] % 8 == 0)


# ---- the ops with gradients ------------------------------------------------------------------------------------------


def mlp_case(generator, dtype, tokens=(3, 7), k=40, n=24, out=40, bias=True):
    inputs = [
        randn(generator, *tokens, k, dtype=dtype),
        randn(generator, 2 * n, k, dtype=dtype, scale=k**-0.5),
        randn(generator, out, n, dtype=dtype, scale=n**-0.5),
        randn(generator, 2 * n, dtype=dtype) if bias else None,
    ]
    return inputs, randn(generator, *tokens, out, dtype=dtype)


@pytest.fixture
def fused(request, monkeypatch):
    """Make the table say that the fused backward kernel wins, or leave it out."""
    if request.param == "triton":
        entry = tuning.Entry({"m": 21, "n": 24, "k": 40}, "triton", {}, {"triton": 1.0, "torch": 2.0}, "a test")
        module = sys.modules["tp_kernels.ops.swiglu_mlp"]  # as an attribute of the package it is the function
        monkeypatch.setattr(module, "lookup", lambda *args, **sizes: entry)
    tuning.forget_tables()  # decisions are cached
    yield request.param
    monkeypatch.undo()
    tuning.forget_tables()


both_paths = pytest.mark.parametrize("fused", ["torch", "triton"], indirect=True)


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_linear(device, dtype, generator, bias):
    (x, w_gate_up, _, b), _ = mlp_case(generator, dtype, bias=bias)
    grad = randn(generator, *x.shape[:-1], 24, dtype=dtype)
    compare(ops.swiglu_linear, swiglu_linear_reference, x, w_gate_up, b, grad=grad)


@both_paths
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp(device, dtype, generator, fused, recompute, bias):
    inputs, grad = mlp_case(generator, dtype, bias=bias)
    assert choose_swiglu_backward(*inputs).path == (fused if dtype is not torch.float32 else "torch")

    def run(*args):
        return ops.swiglu_mlp(*args, recompute=recompute)

    compare(run, swiglu_mlp_reference, *inputs, grad=grad)


@both_paths
def test_mlp_backward_twice_and_in_part(device, generator, fused):
    """A retained graph gives the same gradients again; only what is asked for is computed; frozen weights stay so."""
    inputs, grad = mlp_case(generator, torch.float16)
    leaves = [t.clone().requires_grad_() for t in inputs]
    for recompute in (False, True):
        out = ops.swiglu_mlp(*leaves, recompute=recompute)
        first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        second = torch.autograd.grad(out, leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for i, whole in enumerate(first):
            alone = [t.requires_grad_() if i == j else t for j, t in enumerate(t.clone() for t in inputs)]
            (part,) = torch.autograd.grad(ops.swiglu_mlp(*alone, recompute=recompute), alone[i], grad)
            assert torch.equal(part, whole)


@pytest.mark.parametrize("tokens", [(), (0,), (2, 0)], ids=str)
def test_mlp_sizes(device, generator, tokens):
    inputs, grad = mlp_case(generator, torch.float16, tokens)
    compare(ops.swiglu_mlp, swiglu_mlp_reference, *inputs, grad=grad)
    with torch.no_grad():
        assert ops.swiglu_mlp(*inputs).shape == (*tokens, 40)


def test_mlp_saves_no_hidden(device, generator):
    """Saved for the backward: parameters, x, and gate_up unless it is recomputed."""
    for recompute, wanted in ((False, 2 * 24), (True, 0)):
        inputs, _ = mlp_case(generator, torch.float16)
        out = ops.swiglu_mlp(*(t.requires_grad_() for t in inputs), recompute=recompute)
        saved = [t for t in out.grad_fn.saved_tensors if t is not None and t.dim() == 3]
        assert sum(t.shape[-1] for t in saved) == 40 + wanted


def test_mlp_on_the_cpu():
    """Off the GPU nothing changes: the bits of the composition, checkpointed on request."""
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16):
        inputs, grad = mlp_case(generator, dtype)
        plain = gradients(lambda x, w, d, b: ops.linear(ops.swiglu_linear(x, w, b), d), *inputs, grad=grad)
        for recompute in (False, True):
            found = gradients(lambda *a, r=recompute: ops.swiglu_mlp(*a, recompute=r), *inputs, grad=grad)
            assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        with torch.no_grad():
            assert torch.equal(
                ops.swiglu_mlp(*inputs), ops.linear(ops.swiglu_linear(inputs[0], inputs[1], inputs[3]), inputs[2])
            )
    assert choose_swiglu_backward(*inputs).path == "torch"


def test_mlp_errors(device):
    x, w, d = torch.zeros(2, 8, device=device), torch.zeros(12, 8, device=device), torch.zeros(8, 6, device=device)
    for args, message in (
        ((x, w[:11], d), "as many up rows"),
        ((x, w, d[:, :5]), r"expected w_down \[N, 6\]"),
        ((x, w, d[0]), r"expected w_down \[N, 6\]"),
        ((x, w, d.half()), "w_down is torch.float16"),
        ((x, w, d, x[0]), r"expected a bias \[12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.swiglu_mlp(*args)


@both_paths
def test_autocast(device, generator, fused):
    """fp32 parameters, matmuls in fp16, fp32 gradients: what PyTorch's own composition gives."""
    inputs, grad = mlp_case(generator, torch.float32)

    def under(function):
        def run(*args):
            with torch.autocast(inputs[0].device.type, torch.float16):
                return function(*args)

        return run

    def check(function, reference, *inputs, grad):
        exact = gradients(reference, *(t.double() for t in inputs), grad=grad.double())
        expected = gradients(under(reference), *inputs, grad=grad)
        for actual, same, wide in zip(gradients(under(function), *inputs, grad=grad), expected, exact, strict=True):
            assert_close_to_reference(actual, same, wide)

    for recompute in (False, True):
        check(lambda *a, r=recompute: ops.swiglu_mlp(*a, recompute=r), swiglu_mlp_reference, *inputs, grad=grad)
    inputs = (inputs[0], inputs[1], inputs[3])
    check(ops.swiglu_linear, swiglu_linear_reference, *inputs, grad=grad[..., :24])
    with torch.no_grad():
        assert under(ops.swiglu_linear)(*inputs).dtype is torch.float16


# ---- tracing ---------------------------------------------------------------------------------------------------------


def test_opcheck(device, generator):
    (x, w_gate_up, w_down, bias), grad_y = mlp_case(generator, torch.float16)
    gate_up = F.linear(x, w_gate_up, bias)
    namespace = torch.ops.tp_kernels
    for op, args in (
        (namespace.silu_mul.default, (gate_up,)),
        (namespace.silu_mul_backward.default, (randn(generator, 3, 7, 24, dtype=x.dtype), gate_up)),
        (namespace.swiglu_linear.default, (x, w_gate_up, bias)),
        (namespace.swiglu_linear_forward.default, (x, w_gate_up, None)),
        (namespace.swiglu_mlp_backward.default, (grad_y, w_down, gate_up, True)),
        (namespace.swiglu_mlp_backward.default, (grad_y, w_down, gate_up, False)),
    ):
        torch.library.opcheck(op, args)


@both_paths
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_training(device, generator, fused, recompute):
    torch._dynamo.reset()
    inputs, grad = mlp_case(generator, torch.float16)

    def run(*args):
        return ops.swiglu_mlp(*args, recompute=recompute)

    found = gradients(torch.compile(run, fullgraph=True, backend=BACKEND), *inputs, grad=grad)
    for actual, expected in zip(found, gradients(run, *inputs, grad=grad), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-3)


def test_compiled_parts(device, generator):
    """The gate and the gated projection: training and inference, with autocast around them."""
    torch._dynamo.reset()
    (x, w_gate_up, _, bias), _ = mlp_case(generator, torch.float32)

    def run(x, w_gate_up, bias):
        with torch.autocast(x.device.type, torch.float16):
            return ops.silu_mul(ops.swiglu_linear(x, w_gate_up, bias))

    compiled = torch.compile(run, fullgraph=True, backend=BACKEND)
    grad = randn(generator, 3, 7, 12, dtype=torch.float32)
    eager = gradients(run, x, w_gate_up, bias, grad=grad)
    for actual, expected in zip(gradients(compiled, x, w_gate_up, bias, grad=grad), eager, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, w_gate_up, bias), eager[0], rtol=1e-3, atol=2e-3)


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_parallel_mlp(device, generator, monkeypatch, bias):
    """In training the layer takes the fused op, and its gradients are those of the plain composition."""
    torch.manual_seed(0)
    layer = ParallelMLP(40, 24, bias=bias, device=device, dtype=torch.float16)
    x, grad = (randn(generator, 2, 5, 40, dtype=torch.float16) for _ in range(2))
    calls, fused_mlp = [], ops.swiglu_mlp
    monkeypatch.setattr(ops, "swiglu_mlp", lambda *args, **kw: (calls.append(1), fused_mlp(*args, **kw))[1])

    def run(reference):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = reference(leaf) if reference else layer(leaf)
        out.backward(grad)
        return [out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]

    def composed(x):
        up, down = layer.gate_up_proj, layer.down_proj
        return F.linear(swiglu_linear_reference(x, up.weight, up.bias), down.weight, down.bias)

    for actual, expected in zip(run(None), run(composed), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=4e-3)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(layer, fullgraph=True, backend=BACKEND), x, grad=grad)
    for actual, expected in zip(compiled, gradients(composed, x, grad=grad), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=4e-3)
    assert len(calls) == 2
    calls.clear()
    with torch.no_grad():
        layer(x)
    layer.down_proj.register_forward_hook(lambda *_: None)
    layer(x)
    assert not calls


# ---- on a GPU --------------------------------------------------------------------------------------------------------

half = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.gpu
@half
@pytest.mark.parametrize("shape", [(1024, 14336), (2048, 3584), (1, 14336), (17, 1792), (1000, 4100)], ids=str)
def test_gate_at_real_sizes(device, generator, half, shape):
    gate_up = randn(generator, shape[0], 2 * shape[1], dtype=half, scale=3.0)
    compare(ops.silu_mul, ops.silu_mul_reference, gate_up, grad=randn(generator, *shape, dtype=half))


@pytest.mark.gpu
def test_gate_beyond_32_bits(device):
    """More than 2^31 elements: the last rows are right."""
    rows = 2**31 // 28672 + 3
    gate_up = torch.empty(rows, 28672, dtype=torch.bfloat16, device=device)
    gate_up[-2:] = torch.randn(2, 28672, device=device).bfloat16()
    expected = ops.silu_mul(gate_up[-2:].clone())
    assert torch.equal(ops.silu_mul(gate_up)[-2:], expected)


@pytest.mark.gpu
@half
@pytest.mark.parametrize(
    "sizes", [(4096, 3584, 4096), (1000, 1792, 4096), (64, 14336, 4096), (300, 1000, 520)], ids=str
)
def test_matmul_at_real_sizes(device, generator, half, sizes):
    inputs = matmul_case(generator, *sizes, half)
    first = check_matmul(inputs)
    assert torch.equal(check_matmul(inputs), first)
    for config in matmul_kernels.candidates(H100, half, *sizes):
        check_matmul(inputs, config)
    check_matmul(inputs, matmul_kernels.default_config(A100, half, *sizes))


@pytest.mark.gpu
@both_paths
@half
def test_mlp_at_real_sizes(device, generator, fused, half):
    inputs, grad = mlp_case(generator, half, (2, 512), 4096, 3584, 4096, bias=False)
    compare(ops.swiglu_mlp, swiglu_mlp_reference, *inputs, grad=grad)


@pytest.mark.gpu
@both_paths
def test_mlp_in_a_graph(device, generator, fused):
    """A captured training step gives what it gave when it was captured, for new inputs."""
    inputs, grad = mlp_case(generator, torch.bfloat16, (128,), 1024, 512, 1024, bias=False)
    leaves = [t.requires_grad_() for t in inputs[:3]]

    def step():
        return torch.autograd.grad(ops.swiglu_mlp(*leaves), leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].mul_(-0.5)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0.02, atol=0.05)  # cuBLAS may take other kernels in a graph


@pytest.mark.gpu
@pytest.mark.sanitize
def test_small_for_the_sanitizer(device, generator):
    gate_up = randn(generator, 5, 600, dtype=torch.bfloat16)
    compare(ops.silu_mul, ops.silu_mul_reference, gate_up, grad=randn(generator, 5, 300, dtype=torch.bfloat16))
    inputs = matmul_case(generator, 130, 136, 72, torch.bfloat16)
    for config in matmul_kernels.candidates(H100, torch.bfloat16, 130, 136, 72):
        check_matmul(inputs, config)
    check_matmul(matmul_case(generator, 70, 33, 40, torch.bfloat16))
