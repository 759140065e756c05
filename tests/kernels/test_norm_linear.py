"""RMS normalisation inside the GEMV, and the ops that may take it.

Tiers: no device (Triton's interpreter, fp32 and fp16; choices), GPU (bf16, model shapes, CUDA graphs).
"""

import pytest
import torch

from tp_kernels import ops
from tp_kernels.ops import norm_linear_reference, norm_swiglu_linear_reference
from tp_kernels.ops._gpu import gpu_of
from tp_kernels.ops.kernels import gemv as gemv_kernels
from tp_kernels.ops.kernels.gemv import Config, gemv
from tp_kernels.ops.norm_linear import WEIGHT_PROPERTY
from tp_kernels.ops.quantize import quantize_weight
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.op_bench.case import randn

EPS = 1e-5
KINDS = list(WEIGHT_PROPERTY)


def operands(generator, dtype, m, n, k, kind=None, bias=True):
    """x (not normalised by far), the norm's weight, the weight, bias, the weight's scale."""
    x = randn(generator, m, k, dtype=dtype, scale=3.0)
    g = (1 + 0.3 * randn(generator, k, dtype=torch.float32)).to(dtype)
    weight = randn(generator, n, k, dtype=dtype, scale=max(k, 1) ** -0.5)
    weight, scale = (weight, None) if kind is None else quantize_weight(weight, kind)
    return x, g, weight, randn(generator, n, dtype=dtype) if bias else None, scale


def doubles(x, g, weight, bias, scale):
    wide = weight if scale is not None else weight.double()
    return x.double(), g.double(), EPS, wide, None if bias is None else bias.double()


def check(given, gated=False, config=None, **options):
    """The kernel against PyTorch in the same dtype, which rounds twice more, against fp64."""
    x, g, weight, bias, scale = given
    reference = norm_swiglu_linear_reference if gated else norm_linear_reference
    out = x.new_full((x.shape[0], weight.shape[0] // (2 if gated else 1)), float("nan"))
    more = {"scale": scale, "norm_weight": g, "eps": EPS}
    gemv(out, x, weight, bias, None, None, gated, config, **more, **options)
    exact = reference(*doubles(*given), weight_scale=scale)
    same_dtype = reference(x, g, EPS, weight, bias, weight_scale=scale)
    assert_close_to_reference(out, same_dtype, exact, factor=4.0 if out.dtype is torch.float32 else 2.0)
    if out.dtype is not torch.float32:  # nothing was rounded before the end
        assert_close_to_reference(out, exact.to(out.dtype), exact, factor=1.1)
    return out


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "config"),
    [(5, Config(2, 64, 1)), (1, Config(4, 32, 1, 3)), (5, Config(1, 256, 2)), (1, None)],
    ids=["loop", "stages", "one tile", "default"],
)
def test_norm_in_the_gemv(generator, dtype, kind, m, config):
    check(operands(generator, dtype, m, 7, 144, kind), config=config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(2, 40), (18, 77), (8, 1)])
def test_gated_and_ragged(generator, dtype, kind, n, k):
    check(operands(generator, dtype, 2, n, k, kind, bias=False), gated=True, config=Config(2, 32, 1))


def test_rows_of_zeros_and_large_numbers(generator):
    x, g, weight, bias, scale = operands(generator, torch.float16, 4, 16, 64)
    x[0], x[1], x[2] = 0, 60000, 1e-6  # squares that fp16 does not hold
    out = check((x, g, weight, bias, scale))
    assert torch.equal(out[0], bias) and out.isfinite().all()
    x[3, 5] = float("nan")
    again = torch.empty_like(out)
    gemv(again, x, weight, bias, norm_weight=g, eps=EPS)
    assert torch.equal(again[:3], out[:3]) and again[3].isnan().all()


def test_bad_norm_weights(generator):
    x, g, weight, bias, _ = operands(generator, torch.float16, 2, 8, 16)
    for bad in (g[1:], g.float(), torch.cat([g, g])[::2]):
        with pytest.raises(ValueError, match=r"dense norm_weight \[16\] of torch.float16"):
            gemv(x.new_empty(2, 8), x, weight, bias, norm_weight=bad)


# Choices -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(measured):
    """``table(op, path, m, n, k, kind, **config)``: make that the measured choice for this GPU."""

    def write(op, path, m, n, k, kind=None, **config):
        measured(op, path, {"m": m, "n": n, "k": k, "weight": WEIGHT_PROPERTY[kind]}, config)

    return write


def explain(given, op="norm_linear"):
    x, g, weight, bias, scale = given
    return ops.explain(op, x, g, EPS, weight, bias, weight_scale=scale)


def test_a_measurement_is_needed(device, generator, table):
    given = operands(generator, torch.float16, 4, 32, 64)
    assert explain(given).name == "separate" and "not measured on" in explain(given).reason
    table("norm_linear", "gemv", 4, 32, 64, **Config(2, 64, 1)._asdict())
    assert explain(given).name == "gemv" and explain(given).config == Config(2, 64, 1)._asdict()
    assert explain(given, "norm_swiglu_linear").name == "separate"
    assert explain(operands(generator, torch.float16, 4, 32, 64, "int8")).name == "separate"
    table("norm_linear", "torch", 4, 32, 64, "int8")
    assert "2026-01-01" in explain(operands(generator, torch.float16, 4, 32, 64, "int8")).reason
    table("norm_swiglu_linear", "gemv", 8, 16, 64, blocks=3)
    assert explain(given, "norm_swiglu_linear").config == {}  # of another version
    assert "up to 8 rows" in explain(operands(generator, torch.float16, 12, 32, 64), "norm_swiglu_linear").reason
    assert "multiples of 16" in explain(operands(generator, torch.float16, 4, 32, 56)).reason
    assert "torch.float32" in explain(operands(generator, torch.float32, 4, 32, 64)).reason
    x, g, weight, bias, scale = given
    assert explain((x, g, weight.t().contiguous().t(), bias, scale)).name == "separate"
    with torch.autocast(x.device.type, dtype=torch.float16):
        assert "autocast" in explain(given).reason
    assert "gradient" in explain((x, g.requires_grad_(), weight, bias, scale)).reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["gemv", "separate"])
def test_ops_on_every_path(device, generator, table, kind, path):
    table("norm_linear", path, 6, 32, 80, kind)
    table("norm_swiglu_linear", path, 6, 16, 80, kind)
    given = operands(generator, torch.float16, 6, 32, 80, kind)
    x, g, weight, bias, scale = given
    for op, name in ((ops.norm_linear, "norm_linear"), (ops.norm_swiglu_linear, "norm_swiglu_linear")):
        reference = getattr(ops, f"{name}_reference")
        assert explain(given, name).name == path
        out = op(x.view(2, 3, 80), g, EPS, weight, bias, weight_scale=scale)
        plain = reference(x, g, EPS, weight, bias, weight_scale=scale)
        assert_close_to_reference(out.view(plain.shape), plain, reference(*doubles(*given), weight_scale=scale))
    if path == "gemv" and kind is None:
        compiled = torch.compile(ops.norm_swiglu_linear, fullgraph=True, backend="aot_eager")
        found = compiled(x.view(2, 3, 80), g, EPS, weight, bias, weight_scale=scale)
        assert torch.equal(found, out)
        arguments, checks = (x[:1], g, EPS, weight, bias, True), ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.tp_kernels.norm_linear, arguments, test_utils=checks)


def test_gradients_and_empty_inputs_are_the_two_ops(device, generator, table):
    table("norm_linear", "gemv", 4, 16, 64)
    x, g, weight, bias, _ = operands(generator, torch.float16, 4, 16, 64)
    leaves = [t.requires_grad_() for t in (x, g, weight, bias)]
    out = ops.norm_linear(x, g, EPS, weight, bias)
    expected = ops.linear(ops.rms_norm(x, g, EPS), weight, bias)
    assert torch.equal(out, expected)
    weights = torch.rand_like(out)
    for grad, wanted in zip(
        torch.autograd.grad(out, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
    ):
        assert torch.equal(grad, wanted)
    with torch.no_grad():
        assert ops.norm_linear(x[:0], g, EPS, weight, bias).shape == (0, 16)
        assert ops.norm_linear(x, g, EPS, weight[:0]).shape == (4, 0)


# On the GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k", "gated"), [(6144, 4096, False), (28672, 4096, True), (1536, 4096, False)])
def test_llama_shapes(generator, kind, n, k, gated):
    for m in (1, 2, 4, 8):
        check(operands(generator, torch.bfloat16, m, n, k, kind), gated=gated, weights_ready=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "m"), [(None, 1), (None, 8), ("int8", 1), ("fp8", 4)])
def test_every_candidate(generator, kind, m):
    given = operands(generator, torch.bfloat16, m, 3088, 4096, kind)
    for config in gemv_kernels.candidates(gpu_of(given[0]), torch.bfloat16, m, 1544, 4096, True, kind is not None):
        check(given, gated=True, config=config, weights_ready=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graph_of_a_layer(generator, table, kind):
    """A residual stream: each kernel starts before the one whose result it reads has ended."""
    width, inner, m = 1024, 1536, 2
    table("norm_swiglu_linear", "gemv", m, inner, width, kind)
    table("linear", "gemv", m, width, inner)
    layers = []
    for _ in range(6):
        _, g, up, _, scale = operands(generator, torch.bfloat16, m, 2 * inner, width, kind)
        down = randn(generator, width, inner, dtype=torch.bfloat16, scale=0.3 * inner**-0.5)
        layers.append((g, *(torch.nn.Parameter(t, requires_grad=False) for t in (up, down)), scale))
    start = randn(generator, m, width, dtype=torch.bfloat16)

    def step():
        h = start
        for g, up, down, scale in layers:
            h = ops.linear(ops.norm_swiglu_linear(h, g, EPS, up, weight_scale=scale), down, None, h)
        return h

    expected = []
    for seed in range(3):
        start.normal_(generator=torch.Generator(device="cuda").manual_seed(seed))
        expected.append(step())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for repeat in range(60):
        start.normal_(generator=torch.Generator(device="cuda").manual_seed(repeat % 3))
        graph.replay()
        assert torch.equal(out, expected[repeat % 3]), repeat


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("kind", KINDS)
def test_small(generator, kind):
    for m, n, k in ((3, 70, 272), (8, 34, 1040)):
        for config in (None, Config(2, 512, 1, 1, 256), Config(4, 512, 1, 3)):
            check(operands(generator, torch.bfloat16, m, n, k, kind), gated=True, config=config, weights_ready=True)
