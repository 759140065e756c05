"""Linear and SwiGLU ops against fp64 and PyTorch. Tier: no device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels.testing.numeric import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensor(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@pytest.fixture
def threads():
    """Sets torch's thread count inside a test and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def activated(x: torch.Tensor, name: str | None) -> torch.Tensor:
    functions = {
        None: lambda y: y,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
    }
    return functions[name](x)


# K below, at and off multiples of 16; N odd and around the tile of 16 rows.
# N = 1 has no statistics to speak of: it is compared bit by bit with a row of a larger matrix further down.
SHAPES = [(1, 576, 192), (1, 1536, 33), (2, 577, 17), (3, 15, 19), (4, 16, 16), (5, 1, 5), (7, 100, 31), (8, 64, 48)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_linear_is_as_close_as_torch(m, k, n, dtype):
    x, w = tensor(m, k, dtype=dtype), tensor(n, k, dtype=dtype, scale=k**-0.5)
    assert ops.explain("linear", x, w).name == "native-cpu"
    exact = x.double() @ w.double().T
    assert_close_to_reference(ops.linear(x, w), F.linear(x, w), exact, name="linear")


@pytest.mark.parametrize("m", range(1, 10))
def test_every_number_of_rows(m):
    x, w = tensor(m, 48, dtype=torch.float32), tensor(21, 48, dtype=torch.float32)
    assert_close_to_reference(ops.linear(x, w), F.linear(x, w), x.double() @ w.double().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "relu"])
def test_bias_activation_residual(activation, dtype):
    x, w, b = tensor(3, 40, dtype=dtype), tensor(37, 40, dtype=dtype, scale=0.3), tensor(37, dtype=dtype)
    residual = tensor(3, 37, dtype=dtype)
    exact = activated(x.double() @ w.double().T + b.double(), activation) + residual.double()
    plain = ops.linear_reference(x, w, b, residual, activation)
    assert_close_to_reference(ops.linear(x, w, b, residual, activation), plain, exact, name=str(activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 576, 300), (3, 33, 47), (8, 70, 17), (40, 64, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_swiglu_linear(m, k, n, with_bias, dtype):
    x, w = tensor(m, k, dtype=dtype), tensor(2 * n, k, dtype=dtype, scale=2 * k**-0.5)
    b = tensor(2 * n, dtype=dtype) if with_bias else None
    both = F.linear(x.double(), w.double(), None if b is None else b.double())
    exact = F.silu(both[:, :n]) * both[:, n:]
    assert_close_to_reference(ops.swiglu_linear(x, w, b), ops.swiglu_linear_reference(x, w, b), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1536), (5, 3, 34), (2, 2)])
def test_silu_mul(shape, dtype):
    both = tensor(*shape, dtype=dtype, scale=3.0)
    gate, up = both.double().chunk(2, -1)
    assert_close_to_reference(ops.silu_mul(both), ops.silu_mul_reference(both), F.silu(gate) * up)


def test_silu_over_the_whole_range():
    gate = torch.linspace(-120, 120, 100_003)
    both = torch.cat((gate, torch.ones_like(gate)))
    actual, exact = ops.silu_mul(both[None])[0].double(), F.silu(gate.double())
    # Below -88.7 exp(-x) overflows and the result is 0, as in PyTorch; the true one is less than 1e-36 there.
    assert ((actual - exact).abs() <= 4e-7 * exact.abs() + 1e-36).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_rows_and_shards(dtype, threads):
    """What column sharding and batching rely on: a row's output depends on that row and that weight row only."""
    x, w = tensor(7, 700, dtype=dtype), tensor(400, 700, dtype=dtype)
    threads(1)
    one, gated = ops.linear(x, w), ops.swiglu_linear(x, w)
    for count in (2, 3):
        threads(count)
        assert torch.equal(ops.linear(x, w), one)
        assert torch.equal(ops.swiglu_linear(x, w), gated)
    for row in range(7):
        assert torch.equal(ops.linear(x[row : row + 1], w)[0], one[row])
    for start, stop in ((0, 133), (133, 267), (267, 400), (399, 400)):
        assert torch.equal(ops.linear(x, w[start:stop]), one[:, start:stop])
    pair = torch.stack((w[17], w[217]))
    assert torch.equal(ops.swiglu_linear(x, pair), gated[:, 17:18])


def test_nan_and_infinity_propagate():
    x, w = torch.ones(2, 40), torch.ones(20, 40)
    w[3, 39] = float("nan")
    w[5, 0] = float("inf")
    w[6, 0], w[6, 1] = float("inf"), float("-inf")
    out, expected = ops.linear(x, w), F.linear(x, w)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    both = torch.tensor([[float("nan"), float("inf"), float("-inf"), 1.0, 1.0, 1.0]])
    torch.testing.assert_close(ops.silu_mul(both), ops.silu_mul_reference(both), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_special_values(dtype):
    """Overflow, subnormals and ties of the half types round as in PyTorch."""
    values = torch.tensor(
        [1e38, 3.4e38, 65504.0, 65519.9, 65520.0, 1e-7, 5.9e-8, 2.9e-8, 1e-40, 1.00390625, 2049.0, 0.1]
    )
    values = torch.cat((values, -values)).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    # A sum of products with exact fp32 value, rounded once.
    assert torch.equal(ops.linear(values[:8, None], one)[:, 0], values[:8])
    x, w = tensor(4, 2, dtype=dtype, scale=300.0), tensor(64, 2, dtype=dtype, scale=300.0)
    exact = (x.float()[:, None] * w.float()[None]).sum(-1).to(dtype)
    assert torch.equal(ops.linear(x, w), exact)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (1, 8)])
def test_empty_and_one_row(shape):
    x, w = torch.ones(shape), torch.ones(5, 8)
    assert torch.equal(ops.linear(x, w), F.linear(x, w))
    assert ops.linear(x, torch.ones(0, 8)).shape == (*shape[:-1], 0)
    assert ops.swiglu_linear(x, torch.ones(0, 8)).shape == (*shape[:-1], 0)


def test_nothing_to_sum():
    assert torch.equal(ops.linear(torch.ones(2, 0), torch.ones(3, 0)), torch.zeros(2, 3))


def test_non_contiguous_operands():
    x, w = tensor(30, 4, dtype=torch.float32).t(), tensor(30, 20, dtype=torch.float32).t()
    residual = tensor(20, 4, dtype=torch.float32).t()
    torch.testing.assert_close(ops.linear(x, w, None, residual), F.linear(x, w) + residual)
    last = tensor(3, 5, 30, dtype=torch.float32)[:, -1:]
    torch.testing.assert_close(ops.linear(last, w.contiguous()), F.linear(last, w))
    assert ops.linear(torch.ones(8), torch.ones(3, 8)).shape == (3,)


def test_unaligned_input():
    storage, w = tensor(65, dtype=torch.float32), tensor(9, 64, dtype=torch.float32)
    x = storage[1:][None]
    assert torch.equal(ops.linear(x, w), ops.linear(x.clone(), w))


def test_gradients_are_those_of_torch():
    x, w, b = (t.requires_grad_() for t in (torch.randn(2, 6), torch.randn(8, 6), torch.randn(8)))
    residual = torch.randn(2, 8, requires_grad=True)
    ops.linear(x, w, b, residual, "silu").square().sum().backward()
    ours = [t.grad.clone() for t in (x, w, b, residual)]
    for t in (x, w, b, residual):
        t.grad = None
    (F.silu(F.linear(x, w, b)) + residual).square().sum().backward()
    for mine, theirs in zip(ours, (x, w, b, residual), strict=True):
        assert torch.equal(mine, theirs.grad)
    w64 = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    x64 = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.swiglu_linear, (x64, w64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.ones(5, 7)}, "expected x"),
        ({"weight": torch.ones(5)}, "expected x"),
        ({"bias": torch.ones(4)}, "bias"),
        ({"residual": torch.ones(2, 4)}, "residual"),
        ({"weight": torch.ones(5, 8, dtype=torch.float64)}, "float64"),
        ({"weight": torch.ones(5, 8, device="meta")}, "meta"),
        ({"bias": torch.ones(5, device="meta")}, "meta"),
        ({"activation": "tanh"}, "tanh"),
    ],
)
def test_bad_operands(change, words):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(5, 8), **change}
    with pytest.raises(ValueError, match=words):
        ops.linear(**arguments)
    with pytest.raises(ValueError, match="gate rows"):
        ops.swiglu_linear(torch.ones(2, 8), torch.ones(5, 8))
    with pytest.raises(ValueError, match="side by side"):
        ops.silu_mul(torch.ones(2, 5))
