"""How ops reach their kernels: torch.library, tracing, transforms, explain. Tier: no device."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tp_kernels import ops

X, W, B = torch.randn(2, 3, 32), torch.randn(20, 32), torch.randn(20)
RESIDUAL, NORM = torch.randn(2, 3, 20), torch.rand(32)
LENGTHS = torch.tensor([4, 0])
TABLE = torch.randn(12, 8)


def cache() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)


CALLS = {
    "linear": lambda: (X, W, B, RESIDUAL, "silu"),
    "swiglu_linear": lambda: (X, W, B),
    "silu_mul": lambda: (X,),
    "rms_norm": lambda: (X, NORM, 1e-5),
    "add_rms_norm": lambda: (X, X + 1, NORM, 1e-5),
    "decode_attention": lambda: (
        torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(1)),
        *cache(),
        LENGTHS,
    ),
    "qkv_rope_cache": lambda: (torch.sin(torch.arange(384.0)).view(2, 3, 64), TABLE, TABLE, LENGTHS, *cache(), 4, 2),
}


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.tp_kernels, name).default, CALLS[name]())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_in_other_dtypes(dtype):
    """float64 has no native kernel: the op promises the same layout on the PyTorch path."""
    for name in ("linear", "rms_norm", "decode_attention"):
        arguments = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in CALLS[name]()]
        torch.library.opcheck(getattr(torch.ops.tp_kernels, name).default, tuple(arguments))


@pytest.mark.parametrize("name", CALLS)
def test_the_op_and_the_eager_call_agree(name):
    eager_arguments, op_arguments = CALLS[name](), CALLS[name]()
    eager = getattr(ops, name)(*eager_arguments)
    through = getattr(torch.ops.tp_kernels, name)(*op_arguments)
    for a, b in zip(flat(eager), flat(through), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    for a, b in zip(eager_arguments, op_arguments, strict=True):
        assert a is b or not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_compiles_without_graph_breaks():
    """Inference sees opaque ops, training sees the plain composition; both in one graph."""
    qkv_weight = torch.randn(64, 32)

    def step(x, k_cache, v_cache):
        normed, residual = ops.add_rms_norm(x, x, NORM)
        q = ops.qkv_rope_cache(ops.linear(normed, qkv_weight), TABLE, TABLE, LENGTHS, k_cache, v_cache, 4, 2)
        out = ops.decode_attention(q, k_cache, v_cache, LENGTHS).transpose(1, 2).reshape(2, 3, 32)
        return ops.silu_mul(ops.linear(out, W)) + ops.swiglu_linear(ops.rms_norm(residual, NORM), W)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = cache(), cache()
        torch.testing.assert_close(compiled(X, *ours), step(X, *theirs))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)

    def train(x, w):
        return ops.swiglu_linear(ops.rms_norm(x, NORM), w).sum()

    w = W.clone().requires_grad_()
    (expected,) = torch.autograd.grad(train(X, w), w)
    (actual,) = torch.autograd.grad(torch.compile(train, fullgraph=True, backend="aot_eager")(X, w), w)
    torch.testing.assert_close(actual, expected)


def test_dispatch_modes_see_the_op():
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        out = ops.linear(X, W)
    assert "tp_kernels.linear.default" in seen
    assert torch.equal(out, ops.linear(X, W))


def test_transforms_and_autocast_take_the_pytorch_path():
    x, w = torch.randn(5, 32), torch.randn(20, 32)
    torch.testing.assert_close(torch.func.vmap(lambda row: ops.linear(row, w))(x), ops.linear(x, w))
    torch.testing.assert_close(torch.func.vmap(lambda row: ops.rms_norm(row, NORM))(x), ops.rms_norm(x, NORM))
    gradient = torch.func.grad(lambda row: ops.linear(row, w).sum())(x)
    torch.testing.assert_close(gradient, w.sum(0).expand(5, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, w).dtype == torch.bfloat16
        assert ops.linear(x, w.bfloat16()).dtype == torch.bfloat16
    with torch._subclasses.FakeTensorMode():
        assert ops.linear(torch.empty(2, 32), torch.empty(20, 32)).shape == (2, 20)
    assert ops.swiglu_linear(X.to("meta"), W.to("meta")).shape == (2, 3, 10)


class Quantised(torch.Tensor):
    """A weight without memory of its own that brings its operators, as quantisation libraries make them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(a.inner if isinstance(a, Quantised) else a for a in args), **(kwargs or {}))


def test_operands_without_memory_take_the_pytorch_path():
    x = torch.randn(2, 32)
    torch.testing.assert_close(ops.linear(x, Quantised(W), Quantised(B)), ops.linear_reference(x, W, B))
    residual = Quantised(RESIDUAL[0, :2])
    torch.testing.assert_close(ops.linear(x, W, residual=residual), ops.linear_reference(x, W, residual=residual.inner))
    torch.testing.assert_close(ops.rms_norm(x, Quantised(NORM)), ops.rms_norm_reference(x, NORM))
    assert "Quantised" in str(ops.explain(ops.linear, x, Quantised(W)))


def test_inference_tensors():
    with torch.inference_mode():
        x = torch.randn(1, 32)
        out = ops.linear(ops.rms_norm(x, NORM), W, None, x.new_zeros(1, 20))
    assert out.shape == (1, 20) and out.is_inference()


def native_calls(monkeypatch) -> list[str]:
    """Names of native entry points as they are called."""
    calls: list[str] = []
    for module, names in {
        "linear": ["_cpu_linear"],
        "norm": ["_cpu_rms_norm"],
        "swiglu": ["_cpu_silu_mul"],
        "decode_attention": ["_cpu_decode_attention"],
        "qkv": ["_cpu_qkv_rope_cache"],
    }.items():
        owner = importlib.import_module(f"tp_kernels.ops.{module}")
        for name in names:
            real = getattr(owner, name)

            def record(*args, _real=real, _name=name):
                calls.append(_name)
                return _real(*args)

            monkeypatch.setattr(owner, name, record)
    return calls


def variants():
    """Calls that take the native path and calls that each miss it for another reason."""
    yield from ((name, call(), True) for name, call in CALLS.items())
    yield "linear", (torch.randn(64, 32), W), False
    yield "linear", (X, W.clone().requires_grad_()), False
    yield "linear", (X.double(), W.double()), False
    yield "linear", (X[..., :20], W.t()[:20].contiguous().t()), False
    yield "linear", (X, W, torch.randn(40)[::2]), False
    yield "linear", (torch.ones(2, 0), torch.ones(3, 0)), False
    yield "swiglu_linear", (torch.nn.Parameter(X), W), False
    yield "rms_norm", (X.bfloat16(), NORM), False
    yield "rms_norm", (X, torch.rand(64)[::2]), False
    yield "add_rms_norm", (X, X.clone().requires_grad_(), NORM), False
    yield "silu_mul", (torch.ones(2, 0),), False
    wide = torch.randn(1, 1, 2, 300)
    yield "decode_attention", (wide, wide, wide, torch.tensor([0])), False
    q, k, v, lengths = CALLS["decode_attention"]()
    yield "decode_attention", (q, k.half(), v.half(), lengths), False
    yield "decode_attention", (q.transpose(2, 3).contiguous().transpose(2, 3), k, v, lengths), False
    yield "decode_attention", (torch.randn(2, 40, 9, 8), k, v, torch.tensor([0, 1])), False
    qkv, cos, sin, *rest = CALLS["qkv_rope_cache"]()
    yield "qkv_rope_cache", (qkv, cos.double(), sin.double(), *rest), False
    yield "qkv_rope_cache", (qkv.bfloat16(), cos, sin, *rest), False


def test_explain_says_what_happens(monkeypatch):
    calls = native_calls(monkeypatch)
    for name, arguments, expected in variants():
        path = ops.explain(name, *arguments)
        assert (path.name == "native-cpu") == expected, f"{name}: {path}"
        assert path.reason
        calls.clear()
        getattr(ops, name)(*arguments)
        assert bool(calls) == expected, f"{name} called {calls}, but explain says {path}"
    assert ops.explain(ops.attention, X, X, X).name == "torch"
    assert "avx" in str(ops.explain(ops.linear, X, W)) or "baseline" in str(ops.explain(ops.linear, X, W))
    with pytest.raises(ValueError, match="expected one of linear"):
        ops.explain("softmax")
