"""Projections with weights of one byte, through their launchers and through the ops.

Tiers: no device (Triton's interpreter, fp32 and fp16; choices), GPU (bf16, model shapes, CUDA graphs). The numbers
themselves, and the CPU, are in ``tests/ops/test_quantize.py``.
"""

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm.communicator import LocalCommunicator
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.layers import RowParallelLinear
from tp_kernels.ops import linear_reference, swiglu_linear_reference
from tp_kernels.ops._gpu import A100, H100, GpuInfo, pretend
from tp_kernels.ops.kernels import gemv as gemv_kernels
from tp_kernels.ops.kernels import skinny as skinny_kernels
from tp_kernels.ops.kernels.dequantize import dequantize
from tp_kernels.ops.kernels.gemv import gemv
from tp_kernels.ops.kernels.launch import recording
from tp_kernels.ops.kernels.skinny import skinny_matmul
from tp_kernels.ops.quantize import KINDS, quantize_weight
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.op_bench.case import randn

Gemv, Skinny = gemv_kernels.Config, skinny_kernels.Config
kinds = pytest.mark.parametrize("kind", KINDS)
L4 = GpuInfo("NVIDIA L4", (8, 9), 58)  # less than half of their shared memory


def operands(generator, dtype, m, n, k, kind, gated=False, everything=True):
    """x, weight, bias, residual and the weight's scale; sums of the size of one."""
    rows = 2 * n if gated else n
    q, scale = quantize_weight(randn(generator, rows, k, dtype=torch.float32, scale=max(k, 1) ** -0.5), kind)
    bias, residual = randn(generator, rows, dtype=dtype), randn(generator, m, n, dtype=dtype)
    return (randn(generator, m, k, dtype=dtype), q, *((bias, residual) if everything else (None, None)), scale)


def reference(x, weight, bias, residual, scale, activation, gated):
    if not gated:
        return linear_reference(x, weight, bias, residual, activation, weight_scale=scale)
    out = swiglu_linear_reference(x, weight, bias, weight_scale=scale)
    return out if residual is None else out + residual


def doubles(x, weight, bias, residual, scale):
    return (x.double(), weight, *(None if t is None else t.double() for t in (bias, residual)), scale)


def check(launcher, given, activation=None, gated=False, config=None, **options):
    """Launch, and compare with PyTorch in the same dtype against fp64; returns the result."""
    x, weight, bias, residual, scale = given
    out = x.new_full((x.shape[0], weight.shape[0] // (2 if gated else 1)), float("nan"))
    launcher(out, x, weight, bias, residual, activation, gated, config, scale=scale, **options)
    exact, same_dtype = reference(*doubles(*given), activation, gated), reference(*given, activation, gated)
    assert_close_to_reference(out, same_dtype, exact, factor=4.0 if out.dtype is torch.float32 else 2.0)
    if out.dtype is not torch.float32:  # nothing was rounded before the end
        assert_close_to_reference(out, exact.to(out.dtype), exact, factor=1.1)
    return out


# Values --------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    ("m", "config"),
    [(1, Gemv(2, 64, 1)), (5, Gemv(4, 32, 1, 3)), (1, Gemv(1, 256, 2)), (5, None)],
    ids=["loop", "stages", "one tile", "default"],
)
def test_gemv(generator, dtype, kind, m, config):
    check(gemv, operands(generator, dtype, m, 7, 144, kind), config=config)


@kinds
@pytest.mark.parametrize("m", [8, 33])
@pytest.mark.parametrize(
    "config", [Skinny(16, 16), Skinny(16, 16, 4, 2), None], ids=["plain", "groups and split", "default"]
)
def test_skinny(generator, dtype, kind, m, config):
    check(skinny_matmul, operands(generator, dtype, m, 20, 144, kind), config=config)


@kinds
@pytest.mark.parametrize(
    ("launcher", "config"), [(gemv, Gemv(2, 32, 1)), (skinny_matmul, Skinny(16, 16, 4))], ids=["gemv", "skinny"]
)
class TestBoth:
    def test_gated(self, generator, dtype, launcher, config, kind):
        for everything in (False, True):
            check(launcher, operands(generator, dtype, 4, 9, 80, kind, True, everything), gated=True, config=config)

    @pytest.mark.parametrize(("n", "k"), [(1, 40), (9, 1), (9, 77), (1, 1)])
    def test_ragged(self, generator, dtype, launcher, config, kind, n, k):
        x, _, _, _, _ = operands(generator, dtype, 2, n, k, kind)
        whole = torch.randint(-7, 8, (n, k), generator=generator, device=x.device).float()
        q = whole.to(KINDS[kind][0])
        scale = torch.full((n,), 0.5, device=x.device)
        out = x.new_empty(2, n)
        launcher(out, (2 * x).round(), q, None, None, "silu", False, config, scale=scale)
        exact = torch.nn.functional.silu((2 * x).round().double() @ whole.double().T / 2)
        assert_close_to_reference(out, exact.to(dtype), exact, factor=4.0)

    def test_every_number_is_exact(self, generator, launcher, config, kind):
        """Each of the 256 (NaN aside), by one product with 1: the conversion, the order of columns, the scale."""
        weight = torch.arange(256, dtype=torch.uint8).view(KINDS[kind][0]).float().nan_to_num(0.0).view(8, 32)
        scale = torch.full((8,), 2.0, device=generator.device)
        for first in range(0, 32, 8):
            x = torch.eye(32, dtype=torch.float16, device=generator.device)[first : first + 8]
            out = x.new_empty(8, 8)
            q = weight.to(KINDS[kind][0]).to(x.device)
            launcher(out, x, q, None, None, None, False, config, scale=scale)
            assert torch.equal(out.float().cpu(), 2 * weight[:, first : first + 8].t())

    def test_strides(self, generator, launcher, config, kind):
        x, weight, bias, residual, scale = operands(generator, torch.float16, 3, 10, 48, kind)
        wide = torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, :48]
        spaced = torch.cat([weight.view(torch.uint8), torch.full_like(weight.view(torch.uint8), 127)], 1)
        check(launcher, (wide, spaced.view(weight.dtype)[:, :48], bias, residual, scale), config=config)

    def test_empty_and_bad(self, generator, launcher, config, kind):
        for m, n, k in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
            check(launcher, operands(generator, torch.float16, m, n, k, kind), config=config)
        x, weight, _, residual, scale = operands(generator, torch.float16, 2, 6, 16, kind)
        for args, options, words in (
            ((residual, x, weight), {}, "weight is torch"),
            ((residual, x, weight), {"scale": scale[1:]}, r"dense scale \[6\]"),
            ((residual, x, weight), {"scale": scale.half()}, "torch.float16"),
            ((residual, x, residual.new_empty(6, 16)), {"scale": scale}, "a weight with a scale"),
        ):
            with pytest.raises(ValueError, match=words):
                launcher(*args, config=config, **options)


@kinds
def test_dequantize(generator, dtype, kind):
    for n, k in ((3, 80), (5, 33), (1, 1), (2, 2050), (0, 4), (4, 0)):
        q, scale = quantize_weight(randn(generator, n, k, dtype=torch.float32), kind)
        out = torch.full((n, k), float("nan"), dtype=dtype, device=q.device)
        dequantize(out, q, scale)
        exact = q.double() * scale.double()[:, None]
        assert_close_to_reference(out, exact.to(dtype), exact)
        assert torch.equal(ops.dequantize_weight(q, scale, dtype), out)
    with pytest.raises(ValueError, match="expected out"):
        dequantize(out, q[:2], scale)
    with pytest.raises(ValueError, match="expected a weight of"):
        dequantize(out, out, scale)
    with pytest.raises(ValueError, match="dense operands"):
        dequantize(out.new_empty(4, 6)[:, :3], q.new_empty(4, 3), scale)


# Choices -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(measured):
    """``table(op, path, m, n, k, fp8, **config)``: make that the measured choice for this GPU."""

    def write(op, path, m, n, k, fp8=0, **config):
        measured(op, path, {"m": m, "n": n, "k": k, "fp8": fp8}, config)

    return write


def explain(x, weight, bias, residual, scale):
    return ops.explain("linear", x, weight, bias, residual, weight_scale=scale)


def test_defaults(device, generator):
    given = [operands(generator, torch.float16, m, 32, 64, "int8") for m in (1, 4, 5, 64, 65)]
    paths = [explain(*g) for g in given]
    assert [p.name for p in paths] == ["gemv", "gemv", "skinny", "skinny", "dequantize"]
    assert all(p.reason.startswith("not measured on") for p in paths)
    x, weight, bias, residual, scale = given[0]
    assert ops.explain("swiglu_linear", x, weight, bias, weight_scale=scale).name == "gemv"
    assert "torch.float32: the kernels" in explain(x.float(), weight, None, None, scale).reason
    assert "multiples of 16 bytes" in explain(x[:, :40], weight[:, :40], bias, residual, scale).reason
    assert "not contiguous" in explain(x, weight.t().contiguous().t(), bias, residual, scale).reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have an old GPU")
def test_fp8_on_a_gpu_without_it():
    generator = torch.Generator().manual_seed(3)
    given = operands(generator, torch.float16, 2, 32, 64, "fp8")
    with pretend(A100):
        path = explain(*given)
        assert path.name == "torch" and "fp8 needs compute capability 8.9" in path.reason
        x, weight, bias, residual, scale = given
        with recording() as launches:
            found = ops.linear(x, weight, bias, residual, weight_scale=scale)
        assert not launches
        expected = linear_reference(*given[:4], weight_scale=scale)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
        assert explain(*operands(generator, torch.float16, 2, 32, 64, "int8")).name == "gemv"


def test_a_table_decides(device, generator, table):
    given = operands(generator, torch.float16, 4, 32, 64, "int8")
    fp8 = operands(generator, torch.float16, 4, 32, 64, "fp8")
    table("quantized_linear", "skinny", 4, 32, 64, **Skinny(16, 64)._asdict())
    path = explain(*given)
    assert (path.name, path.config) == ("skinny", Skinny(16, 64)._asdict()) and "2026-01-01" in path.reason
    assert explain(*fp8).name == "gemv"  # a measurement of the other kind does not count
    table("quantized_linear", "torch", 4, 32, 64, fp8=-1)
    assert explain(*fp8).name == "dequantize"
    table("quantized_swiglu_linear", "gemv", 8, 16, 64, blocks=3)
    x, weight, _, _, scale = given
    path = ops.explain("swiglu_linear", x, weight, weight_scale=scale)
    assert path.name == "gemv" and "tune again" in path.reason and not path.config
    more = operands(generator, torch.float16, 12, 32, 64, "int8")
    path = ops.explain("swiglu_linear", more[0], more[1], weight_scale=more[4])
    assert path.name == "skinny" and "not measured" in path.reason  # more rows than the measured path takes


@kinds
@pytest.mark.parametrize("path", ["gemv", "skinny", "dequantize"])
def test_ops_on_every_path(device, generator, table, kind, path):
    fp8 = -1 if kind == "fp8" else 0
    table("quantized_linear", path, 6, 32, 80, fp8)
    table("quantized_swiglu_linear", path, 6, 16, 80, fp8)
    x, weight, bias, residual, scale = operands(generator, torch.float16, 6, 32, 80, kind)
    x, residual = x.view(2, 3, 80).transpose(0, 1), residual.view(3, 2, 32)
    # Parameters that nobody trains may be read before the kernel in front has ended.
    parameters = [torch.nn.Parameter(t, requires_grad=False) for t in (weight, scale)]
    for w, s in ((weight, scale), parameters):
        for args in ((x, w), (x, w, bias, residual, "gelu")):
            assert ops.explain("linear", *args, weight_scale=s).name == path
            exact = [t.double() if isinstance(t, torch.Tensor) and t is not w else t for t in args]
            assert_close_to_reference(
                ops.linear(*args, weight_scale=s),
                linear_reference(*args, weight_scale=s),
                linear_reference(*exact, weight_scale=s),
            )
        assert_close_to_reference(
            ops.swiglu_linear(x, w, bias, weight_scale=s),
            swiglu_linear_reference(x, w, bias, weight_scale=s),
            swiglu_linear_reference(x.double(), w, bias.double(), weight_scale=s),
        )
    if kind == "int8" and path == "gemv":
        expected = ops.linear(x, weight, bias, residual, weight_scale=scale)
        compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight, bias, residual, weight_scale=scale), expected)
        # PyTorch's check cannot compare fp8 tensors.
        arguments, checks = (x[:1, :1], weight, bias), ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.tp_kernels.linear, arguments, {"weight_scale": scale}, test_utils=checks)


def test_other_operands(device, generator):
    """fp32 and fp64, nothing at all, autocast, and a gradient that cannot be had."""
    for dtype in (torch.float32, torch.float64):
        given = operands(generator, dtype, 3, 32, 48, "int8")
        found = ops.linear(*given[:4], weight_scale=given[4])
        torch.testing.assert_close(found, reference(*given, None, False))
    x, weight, bias, residual, scale = operands(generator, torch.float16, 3, 32, 48, "int8")
    assert ops.linear(x[:0], weight, weight_scale=scale).shape == (0, 32)
    assert ops.linear(x, weight[:0], weight_scale=scale[:0]).shape == (3, 0)
    assert (ops.linear(x[:, :0], weight[:, :0], weight_scale=scale) == 0).all()
    with torch.autocast(x.device.type, dtype=torch.float16):
        found = ops.linear(x.float(), weight, bias.float(), weight_scale=scale)
        assert torch.equal(found, ops.linear(x, weight, bias, weight_scale=scale)) and found.dtype is torch.float16
        assert ops.linear(x, weight, bias, residual.float(), weight_scale=scale).dtype is torch.float32
    with pytest.raises(ValueError, match="for inference"):
        ops.linear(x.requires_grad_(), weight, weight_scale=scale)


class Lending(LocalCommunicator):
    """Lends one tensor for the sums that its ranks are to read."""

    def get_buffer(self, shape, dtype, use="input"):
        self.lent = torch.full(shape, float("nan"), dtype=dtype, device=self.device)
        return self.lent


@pytest.mark.parametrize(("kind", "m", "path"), [("int8", 1, "gemv"), ("fp8", 9, "skinny"), ("int8", 70, "dequantize")])
def test_partial_sums_are_written_where_the_ranks_read_them(device, generator, kind, m, path):
    communicator = Lending()
    communicator.device = device
    factory = {"group": TPGroup(communicator), "dtype": torch.float16, "device": device}
    layer = RowParallelLinear(48, 32, False, **factory).quantize(kind)
    x = randn(generator, m, 48, dtype=torch.float16)
    with torch.no_grad():
        found = layer.partial_sum(x.view(1, m, 48))
        assert found is communicator.lent and found.shape == (1, m, 32)
        weight, scale = layer.weight, layer.weight_scale
        assert ops.explain("linear", x, weight, weight_scale=scale).name == path
        torch.testing.assert_close(found[0], ops.linear(x, weight, weight_scale=scale), rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="for inference"):
        layer.partial_sum(x.requires_grad_())


@pytest.mark.parametrize("info", [H100, A100, L4], ids=["H100", "A100", "L4"])
def test_candidates(info):
    for n, k, gated in [(6144, 4096, False), (14336, 4096, True), (4096, 14336, False), (100, 1008, True)]:
        for m in (1, 2, 4, 8, 16, 17, 64, 128):
            for module in (gemv_kernels, skinny_kernels):
                found = module.candidates(info, torch.bfloat16, m, n, k, gated, True)
                if module is gemv_kernels and m > gemv_kernels.MAX_ROWS:
                    assert not found
                    continue
                assert found[0] == module.default_config(info, torch.bfloat16, m, n, k, gated, True)
                assert 1 <= len(found) <= 12 and len(set(found)) == len(found)
                for config in found:
                    assert module.shared_bytes(config, m, gated, 2, True) <= info.max_shared
                    if module is gemv_kernels and k >= 4096:
                        assert 512 * config.num_warps <= config.block_k  # 16 bytes a thread and row


# On the GPU ----------------------------------------------------------------------------------------------------------

# (N, K, gated) of one rank: qkv, o, gate and up, down of Llama-3-8B at tp=1 and tp=4, a shard of the vocabulary.
LLAMA = [
    *((6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False)),
    *((1536, 4096, False), (4096, 1024, False), (3584, 4096, True), (4096, 3584, False), (10001, 4096, False)),
]


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize(
    ("dtype", "n", "k", "gated"),
    [(torch.bfloat16, *shape) for shape in LLAMA] + [(torch.float16, *shape) for shape in LLAMA[4:7]],
)
def test_llama_shapes(generator, dtype, kind, n, k, gated):
    for m in (1, 2, 4, 8):
        check(gemv, operands(generator, dtype, m, n, k, kind, gated), gated=gated, weights_ready=True)
    for m in (1, 16, 33, 64):
        check(skinny_matmul, operands(generator, dtype, m, n, k, kind, gated), gated=gated, weights_ready=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "m", "gated"),
    [("int8", 1, False), ("int8", 4, False), ("int8", 8, True), ("int8", 16, False), ("int8", 64, True)]
    + [("fp8", 1, False), ("fp8", 16, False), ("fp8", 64, False)],
)
def test_every_candidate(generator, kind, m, gated):
    """Each configuration that tuning may choose is right, and gives the same bits 50 times."""
    n, k = 1544, 4096
    given = operands(generator, torch.bfloat16, m, n, k, kind, gated)
    x, weight, bias, residual, scale = given
    for launcher, module in ((gemv, gemv_kernels), (skinny_matmul, skinny_kernels)):
        for config in module.candidates(H100, torch.bfloat16, m, n, k, gated, True):
            expected = check(launcher, given, gated=gated, config=config, weights_ready=True)
            out = torch.empty_like(expected)
            for _ in range(50):
                launcher(out, x, weight, bias, residual, None, gated, config, weights_ready=True, scale=scale)
            assert torch.equal(out, expected), config


@pytest.mark.gpu
@kinds
def test_every_number_is_exact_in_bf16(kind):
    every = torch.arange(256, dtype=torch.uint8, device="cuda").view(KINDS[kind][0])
    weight = torch.where(every.float().isfinite(), every.float(), 0.0).diag().to(every.dtype)
    x = torch.ones(16, 256, dtype=torch.bfloat16, device="cuda")
    scale = torch.ones(256, device="cuda")
    for launcher, m in ((gemv, 1), (gemv, 8), (skinny_matmul, 8), (skinny_matmul, 16)):
        for config in (None, *((Skinny(64, 64), Skinny(32, 32, 4)) if launcher is skinny_matmul else ())):
            out = x.new_empty(m, 256)
            launcher(out, x[:m], weight, None, None, None, False, config, scale=scale)
            assert torch.equal(out.float(), weight.float().sum(1).expand(m, -1)), (launcher, config)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 16, 128])
def test_graph_capture(generator, m):
    """Layers that hand everything on through the same few buffers; "dequantize" takes its workspace from the graph."""
    layers = []
    for n, k in ((1024, 1536), (1536, 1024), (1024, 1536)):
        q, scale = quantize_weight(randn(generator, n, k, dtype=torch.bfloat16, scale=k**-0.5), "int8")
        layers.append((torch.nn.Parameter(q, requires_grad=False), scale))
    x = randn(generator, m, 1536, dtype=torch.bfloat16)

    def step():
        y = x
        for q, scale in layers:
            y = ops.linear(y, q, weight_scale=scale)
        return y

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(20):
        x.normal_()
        graph.replay()
        expected = step()
        if m <= 64:
            assert torch.equal(out, expected)
        else:
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.sanitize
@kinds
@pytest.mark.parametrize("gated", [False, True])
def test_small(generator, kind, gated):
    for m, n, k in ((3, 70, 272), (8, 33, 1040)):
        given = operands(generator, torch.bfloat16, m, n, k, kind, gated)
        for config in (None, Gemv(2, 512, 1, 1, 256), Gemv(4, 512, 1, 3)):
            check(gemv, given, gated=gated, config=config, weights_ready=True)
        for config in (None, Skinny(16, 64, 4, 1, 4, 3, 256), Skinny(64, 64, 1, 2), Skinny(32, 64, 4, 2)):
            check(skinny_matmul, given, gated=gated, config=config, weights_ready=True)
    q, scale = quantize_weight(randn(generator, 33, 1001, dtype=torch.bfloat16), kind)
    exact = q.double() * scale.double()[:, None]
    assert_close_to_reference(ops.dequantize_weight(q, scale, torch.bfloat16), exact.bfloat16(), exact)
