"""Linear projections of a few rows, on FMA units and on tensor cores, through their launchers.

Tiers: no device (Triton's interpreter, fp32 and fp16; configurations), GPU (bf16, model shapes, CUDA graphs, streams).
The ops that use them are in ``test_gpu_linear.py``.
"""

import json

import pytest
import torch

from tp_kernels.ops import linear_reference, swiglu_linear_reference
from tp_kernels.ops._gpu import A100, H100
from tp_kernels.ops.kernels import gemv as gemv_kernels
from tp_kernels.ops.kernels import skinny as skinny_kernels
from tp_kernels.ops.kernels.gemv import gemv
from tp_kernels.ops.kernels.skinny import skinny_matmul
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.op_bench.case import randn

Gemv, Skinny = gemv_kernels.Config, skinny_kernels.Config

# (N, K, gated) of one rank: qkv, o, gate and up, down of Llama-3-8B.
LLAMA = [
    shape
    for tp in (1, 2, 4, 8)
    for shape in (
        (6144 // tp, 4096, False),
        (4096, 4096 // tp, False),
        (14336 // tp, 4096, True),
        (4096, 14336 // tp, False),
    )
]


def operands(generator, dtype, m, n, k, gated=False, bias=True, residual=True):
    """x, weight, bias, residual; sums of the size of one."""
    rows = 2 * n if gated else n
    return (
        randn(generator, m, k, dtype=dtype),
        randn(generator, rows, k, dtype=dtype, scale=max(k, 1) ** -0.5),
        randn(generator, rows, dtype=dtype) if bias else None,
        randn(generator, m, n, dtype=dtype) if residual else None,
    )


def reference(x, weight, bias, residual, activation, gated):
    if not gated:
        return linear_reference(x, weight, bias, residual, activation)
    out = swiglu_linear_reference(x, weight, bias)
    return out if residual is None else out + residual


def check(launcher, given, activation=None, gated=False, config=None, **options):
    """Launch, and compare with PyTorch in the same dtype against fp64; returns the result."""
    x, weight, _, _ = given
    out = x.new_full((x.shape[0], weight.shape[0] // (2 if gated else 1)), float("nan"))
    launcher(out, *given, activation, gated, config, **options)
    exact = reference(*(None if t is None else t.double() for t in given), activation, gated)
    same_dtype = reference(*given, activation, gated)
    # Of a few fp32 results, how far off PyTorch's worst one happens to be is luck.
    assert_close_to_reference(out, same_dtype, exact, factor=4.0 if out.dtype is torch.float32 else 2.0)
    return out


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "config", [Gemv(2, 64, 1), Gemv(4, 32, 1, 3), Gemv(1, 256, 2), None], ids=["loop", "stages", "one tile", "default"]
)
def test_gemv(generator, dtype, m, config):
    check(gemv, operands(generator, dtype, m, 7, 136), config=config)


@pytest.mark.parametrize("m", [1, 5, 16, 17, 33, 64])
@pytest.mark.parametrize(
    "config",
    [Skinny(16, 16), Skinny(16, 16, 4), Skinny(16, 16, 1, 3), Skinny(16, 16, 4, 2), None],
    ids=["plain", "groups", "split", "groups and split", "default"],
)
def test_skinny(generator, dtype, m, config):
    check(skinny_matmul, operands(generator, dtype, m, 20, 136), config=config)


@pytest.mark.parametrize(
    ("launcher", "config"),
    [(gemv, Gemv(2, 32, 1)), (skinny_matmul, Skinny(16, 16, 4)), (skinny_matmul, Skinny(16, 16, 1, 2))],
    ids=["gemv", "skinny", "split"],
)
class TestBoth:
    @pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "relu"])
    @pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
    def test_epilogues(self, generator, launcher, config, activation, bias, residual):
        given = operands(generator, torch.float16, 3, 5, 48, bias=bias, residual=residual)
        check(launcher, given, activation, config=config)

    @pytest.mark.parametrize("n", [1, 19, 32])
    @pytest.mark.parametrize("everything", [False, True])
    def test_gated(self, generator, dtype, launcher, config, n, everything):
        check(launcher, operands(generator, dtype, 4, n, 72, True, everything, everything), gated=True, config=config)

    @pytest.mark.parametrize(("n", "k"), [(1, 40), (9, 1), (9, 77), (3, 129), (1, 1)])
    def test_ragged(self, generator, dtype, launcher, config, n, k):
        # Sums of small integers are exact in fp32, so the few results need no luck.
        x, weight, *added = operands(generator, dtype, 2, n, k)
        given = (x, weight * k**0.5, *added)
        check(launcher, [(3 * t).round() for t in given], config=config)

    def test_strides(self, generator, launcher, config):
        x, weight, bias, residual = operands(generator, torch.float16, 3, 10, 48)
        wide = torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, :48]
        spaced = torch.cat([weight, torch.full_like(weight, float("nan"))], 1)[:, :48]
        added = torch.cat([residual, torch.full_like(residual, float("nan"))], 1)[:, :10]
        check(launcher, (wide, spaced, bias, added), config=config)
        check(launcher, (x[:1].expand(3, 48), weight, bias, residual), config=config)
        whole = torch.full((3, 14), 7.0, dtype=x.dtype, device=x.device)
        launcher(whole[:, :10], x, weight, bias, residual, None, False, config)
        expected = torch.empty_like(residual)
        launcher(expected, x, weight, bias, residual, None, False, config)
        assert torch.equal(whole[:, :10], expected)
        assert (whole[:, 10:] == 7).all()  # nothing is written outside

    def test_in_place_residual(self, generator, launcher, config):
        x, weight, bias, residual = operands(generator, torch.float16, 3, 20, 48)
        expected = check(launcher, (x, weight, bias, residual), config=config)
        launcher(residual, x, weight, bias, residual, None, False, config)
        assert torch.equal(residual, expected)

    def test_empty(self, generator, dtype, launcher, config):
        for m, n, k in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
            for gated in (False, True):
                check(launcher, operands(generator, dtype, m, n, k, gated), gated=gated, config=config)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_non_finite(self, generator, launcher, config):
        """Each row of x and of the weight answers for itself only."""
        x, weight, bias, residual = operands(generator, torch.float16, 3, 5, 40)
        clean = torch.empty_like(residual)
        launcher(clean, x, weight, bias, residual, None, False, config)
        x[1, 7], weight[2, 3] = float("nan"), float("inf")
        out = torch.empty_like(residual)
        launcher(out, x, weight, bias, residual, None, False, config)
        assert out[1].isnan().all()
        rest = [0, 1, 3, 4]
        assert torch.equal(out[0, rest], clean[0, rest])
        assert torch.equal(out[2, rest], clean[2, rest])
        assert not out[[0, 2], 2].isfinite().any()

    def test_rows_do_not_depend_on_each_other(self, generator, dtype, launcher, config):
        x, weight, bias, residual = operands(generator, dtype, 4, 5, 48)
        first, second = torch.empty_like(residual), torch.empty_like(residual)
        launcher(first, x, weight, bias, residual, None, False, config)
        x[1:] *= 3
        launcher(second, x, weight, bias, residual, None, False, config)
        assert torch.equal(first[0], second[0])

    def test_checks(self, generator, launcher, config):
        x, weight, bias, residual = operands(generator, torch.float16, 2, 6, 16)
        out = torch.empty_like(residual)
        bad = [
            ((out, x, weight[:, :8]), {}, r"weight \[N, K\]"),
            ((out[:, :5], x, weight), {}, r"expected out \[2, 6\]"),
            ((out, x, weight, bias[:5]), {}, r"expected bias \[6\]"),
            ((out, x, weight, None, residual[:1]), {}, r"expected residual"),
            ((out, x, weight.float()), {}, "weight is torch.float32"),
            ((out.double(), x.double(), weight.double()), {}, "expected float16"),
            ((out, x, weight, None, None, "tanh"), {}, "tanh"),
            ((out[:, :3], x, weight, None, None, "silu", True), {}, "no further activation"),
            ((out[:, :2], x, weight[:5], None, None, None, True), {}, "gate rows"),
            ((out, x, weight.t().contiguous().t()), {}, r"dense rows.*weight"),
            ((out, x.t().contiguous().t(), weight), {}, r"dense rows.*x"),
            ((out, x, weight, torch.cat([bias, bias])[::2]), {}, r"dense rows.*bias"),
        ]
        for args, options, message in bad:
            with pytest.raises(ValueError, match=message):
                launcher(*args, config=config, **options)


def test_gemv_takes_eight_rows(generator):
    given = operands(generator, torch.float16, 9, 4, 16)
    with pytest.raises(ValueError, match="at most 8 rows, got 9"):
        gemv(given[3].clone(), *given)


def test_more_shares_than_blocks_of_k(generator, dtype):
    check(skinny_matmul, operands(generator, dtype, 2, 20, 40), config=Skinny(16, 16, 1, 8))


def test_uneven_shares(generator, dtype):
    # 7 blocks in 4 shares of 2: the last has one.
    check(skinny_matmul, operands(generator, dtype, 2, 20, 112), config=Skinny(16, 16, 1, 4))
    # 5 blocks in 4 shares of 2 are 3 shares.
    check(skinny_matmul, operands(generator, dtype, 2, 20, 80), config=Skinny(16, 16, 1, 4))


def test_more_than_64_rows(generator):
    check(skinny_matmul, operands(generator, torch.float16, 70, 20, 40), config=Skinny(16, 16, 4))
    check(skinny_matmul, operands(generator, torch.float16, 70, 20, 40), config=Skinny(16, 16, 1, 2))


def test_interleaved_shapes_leave_counters_at_zero(generator):
    """Splits of two shapes in one stream share their counters."""
    shapes = [(2, 20, 64, Skinny(16, 16, 1, 4)), (5, 50, 48, Skinny(16, 16, 1, 3))]
    given = [operands(generator, torch.float16, *shape[:3]) for shape in shapes]
    first = [check(skinny_matmul, g, config=shape[3]) for g, shape in zip(given, shapes, strict=True)]
    for _ in range(3):
        for g, shape, expected in zip(given, shapes, first, strict=True):
            out = torch.full_like(expected, float("nan"))
            skinny_matmul(out, *g, None, False, shape[3])
            assert torch.equal(out, expected)


# Configurations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", [H100, A100], ids=["H100", "A100"])
def test_candidates(info):
    for n, k, gated in [*LLAMA, (768, 4096, False), (1, 40, False), (100, 1000, True)]:
        for m in (1, 2, 3, 5, 8, 9, 16, 17, 33, 64):
            for module in (gemv_kernels, skinny_kernels):
                found = module.candidates(info, torch.bfloat16, m, n, k, gated)
                if module is gemv_kernels and m > gemv_kernels.MAX_ROWS:
                    assert not found
                    continue
                assert found[0] == module.default_config(info, torch.bfloat16, m, n, k, gated)
                assert 1 <= len(found) <= 12
                assert len(set(found)) == len(found)
                for config in found:
                    assert module.shared_bytes(config, m, gated, 2) <= info.max_shared
                    assert module.Config(**json.loads(json.dumps(config._asdict()))) == config
                    if module is gemv_kernels and k >= 1024:
                        assert 256 * config.num_warps <= config.block_k  # 16 bytes a thread and row


def test_defaults_fill_the_gpu():
    for n, k, gated in LLAMA:
        for m in (1, 2, 8):
            config = gemv_kernels.default_config(H100, torch.bfloat16, m, n, k, gated)
            assert n >= H100.num_sms * config.block_n
        for m in (16, 64):
            config = skinny_kernels.default_config(H100, torch.bfloat16, m, n, k, gated)
            assert 3 * -(-n // config.block_n) * config.split_k >= H100.num_sms


# On the GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "n", "k", "gated"),
    [(torch.bfloat16, *shape) for shape in LLAMA] + [(torch.float16, *shape) for shape in LLAMA[8:12]],
)
def test_llama_shapes(generator, dtype, n, k, gated):
    for m in (1, 2, 4, 8):
        check(gemv, operands(generator, dtype, m, n, k, gated), gated=gated, weights_ready=True)
    for m in (1, 16, 33, 64):
        check(skinny_matmul, operands(generator, dtype, m, n, k, gated), gated=gated, weights_ready=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "gated"), [(1, False), (4, False), (8, True), (16, False), (64, True)])
def test_every_candidate(generator, m, gated):
    """Each configuration that tuning may choose is right, and gives the same bits 200 times."""
    n, k = 1544, 4096
    given = operands(generator, torch.bfloat16, m, n, k, gated)
    for launcher, module in ((gemv, gemv_kernels), (skinny_matmul, skinny_kernels)):
        for config in module.candidates(H100, torch.bfloat16, m, n, k, gated):
            expected = check(launcher, given, gated=gated, config=config, weights_ready=True)
            out = torch.empty_like(expected)
            for _ in range(200):
                launcher(out, *given, None, gated, config, weights_ready=True)
            assert torch.equal(out, expected), config


def decode_step(buffers, weights, launchers, weights_ready):
    """Attention-free layers that hand everything on through the same few buffers, which later kernels overwrite."""
    hidden, inner = buffers
    for up, down in weights:
        for launcher in launchers:
            launcher(inner, hidden, up, None, None, None, True, None, weights_ready=weights_ready)
            launcher(hidden, inner, down, None, hidden, None, False, None, weights_ready=weights_ready)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 8, 16])
def test_graph_of_dependent_kernels(generator, m):
    """Under programmatic dependent launch each kernel starts before the one whose result it reads has ended."""
    dtype, width, tall = torch.bfloat16, 1024, 1536
    weights = [
        (
            randn(generator, 2 * tall, width, dtype=dtype, scale=width**-0.5),
            randn(generator, width, tall, dtype=dtype, scale=0.3 * tall**-0.5),
        )
        for _ in range(8)
    ]

    def split(*args, **options):
        args = list(args)
        args[7] = Skinny(32, 64, 1, 4) if args[6] else Skinny(64, 64, 1, 8)
        skinny_matmul(*args, **options)

    launchers = (gemv, skinny_matmul, split) if m <= gemv_kernels.MAX_ROWS else (skinny_matmul, split)
    buffers = torch.empty(m, width, dtype=dtype, device="cuda"), torch.empty(m, tall, dtype=dtype, device="cuda")

    def alone(*args, launcher=None, **options):
        launcher(*args, **options)
        torch.cuda.synchronize()

    starts = [randn(generator, m, width, dtype=dtype) for _ in range(3)]
    expected = []
    for start in starts:
        buffers[0].copy_(start)
        waiting = [lambda *a, launcher=launcher, **o: alone(*a, launcher=launcher, **o) for launcher in launchers]
        decode_step(buffers, weights, waiting, weights_ready=False)
        expected.append(buffers[0].clone())
        assert expected[-1].isfinite().all()
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_step(buffers, weights, launchers, weights_ready=True)
    for repeat in range(200):
        which = repeat % len(starts)
        buffers[0].copy_(starts[which])
        graph.replay()
        assert torch.equal(buffers[0], expected[which]), repeat


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_two_streams(generator, captured):
    """The same split product in two streams at once, launched or replayed: neither counts the other's blocks."""
    config = Skinny(64, 64, 1, 8)
    given = [operands(generator, torch.bfloat16, 16, 1536, 4096) for _ in range(2)]
    expected = [check(skinny_matmul, g, config=config) for g in given]
    outs = [torch.empty_like(e) for e in expected]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def many(which):
        for _ in range(20):
            skinny_matmul(outs[which], *given[which], None, False, config, weights_ready=True)

    graphs = []
    for which in range(2 if captured else 0):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            many(which)
    torch.cuda.synchronize()
    for _ in range(10):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[which].fill_(float("nan"))
                graphs[which].replay() if captured else many(which)
        torch.cuda.synchronize()
        for out, e in zip(outs, expected, strict=True):
            assert torch.equal(out, e)


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("gated", [False, True])
def test_small(generator, gated):
    for m, n, k in ((3, 70, 264), (8, 33, 1040)):
        given = operands(generator, torch.bfloat16, m, n, k, gated)
        for config in (None, Gemv(2, 256, 1, 1, 256), Gemv(4, 256, 1, 3)):
            check(gemv, given, gated=gated, config=config, weights_ready=True)
        for config in (None, Skinny(16, 64, 4, 1, 4, 3, 256), Skinny(64, 64, 1, 2), Skinny(32, 64, 4, 2)):
            check(skinny_matmul, given, gated=gated, config=config, weights_ready=True)
