"""GEMMs with fused epilogues, through their launchers; the ops that use them are in ``test_gpu_linear.py``.

Tiers: no device (Triton's interpreter, fp32 and fp16; configurations), GPU (bf16, model shapes).
"""

import json

import pytest
import torch
import torch.nn.functional as F

from tp_kernels.ops import linear_reference, swiglu_linear_reference
from tp_kernels.ops._activation import ACTIVATIONS
from tp_kernels.ops._gpu import A100, H100, GpuInfo, gpu_of, pretend
from tp_kernels.ops.kernels import matmul as matmul_kernels
from tp_kernels.ops.kernels import swiglu_matmul as swiglu_kernels
from tp_kernels.ops.kernels.matmul import Config, matmul, shared_bytes
from tp_kernels.ops.kernels.swiglu_matmul import swiglu_matmul
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.op_bench.case import randn

# A GPU with TMA and two multiprocessors: every program walks several tiles.
SMALL_HOPPER = GpuInfo(H100.name, (9, 0), 2)


def operands(generator, m, n, k, dtype, *, bias=True, residual=True):
    return (
        randn(generator, m, k, dtype=dtype),
        randn(generator, n, k, dtype=dtype, scale=max(k, 1) ** -0.5),
        randn(generator, n, dtype=dtype) if bias else None,
        randn(generator, m, n, dtype=dtype) if residual else None,
    )


def doubles(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check_matmul(x, weight, bias=None, residual=None, activation=None, config=None, out=None):
    if out is None:
        out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
    matmul(out, x, weight, bias, residual, activation, config)
    plain = linear_reference(x, weight, bias, residual, activation)
    exact = linear_reference(*doubles(x, weight, bias, residual), activation)
    assert_close_to_reference(out, plain, exact)


def check_swiglu(x, weight, bias=None, save=False, config=None):
    m, width = x.shape[0], weight.shape[0]
    out = torch.full((m, width // 2), float("nan"), dtype=x.dtype, device=x.device)
    gate_up = torch.full((m, width), float("nan"), dtype=x.dtype, device=x.device) if save else None
    swiglu_matmul(out, x, weight, bias, gate_up, config)
    assert_close_to_reference(
        out, swiglu_linear_reference(x, weight, bias), swiglu_linear_reference(*doubles(x, weight, bias))
    )
    if save:
        assert_close_to_reference(gate_up, F.linear(x, weight, bias), F.linear(*doubles(x, weight, bias)))


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_matmul_with_everything(device, dtype, generator, activation):
    check_matmul(*operands(generator, 70, 136, 72, dtype), activation)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_without_some(device, dtype, generator, bias, residual):
    check_matmul(*operands(generator, 65, 72, 128, dtype, bias=bias, residual=residual))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 8), (3, 1, 7), (70, 135, 71), (5, 40, 0), (64, 64, 1)])
def test_matmul_of_any_size(device, dtype, generator, m, n, k):
    check_matmul(*operands(generator, m, n, k, dtype), "silu")


@pytest.mark.parametrize(("m", "n"), [(0, 8), (8, 0), (0, 0)])
def test_empty_results_launch_nothing(device, generator, m, n):
    x, weight, bias, residual = operands(generator, m, n, 16, torch.float16)
    matmul(torch.empty(m, n, dtype=x.dtype, device=device), x, weight, bias, residual)
    weight = torch.empty(2 * n, 16, dtype=x.dtype, device=device)
    swiglu_matmul(torch.empty(m, n, dtype=x.dtype, device=device), x, weight)


LOOPS = [
    Config(64, 64, num_warps=4, group_m=1),
    Config(64, 64, num_warps=4, group_m=2, flatten=True),
    Config(64, 128, num_warps=4, group_m=3, subtiles=2),
    Config(64, 128, num_warps=4, subtiles=4, flatten=True),
    Config(64, 64, num_warps=4, group_m=2, tma=False),
]


@pytest.mark.parametrize("config", LOOPS, ids=str)
def test_every_kind_of_loop(generator, device, config):
    x, weight, bias, residual = operands(generator, 200, 136, 136, torch.float16)
    with pretend(SMALL_HOPPER):
        check_matmul(x, weight, bias, residual, "gelu", config)
        check_swiglu(x, weight, bias, True, config._replace(subtiles=2))


@pytest.mark.parametrize("tma", [True, False])
def test_rows_at_a_distance(device, generator, tma):
    """Slices of wider matrices; those off 16 bytes are taken by the other kernel."""
    x, weight, bias, residual = operands(generator, 40, 96, 160, torch.float16)
    config = Config(64, 64, num_warps=4, tma=tma)
    for start in (8, 3):
        out = torch.full((40, 128), float("nan"), dtype=x.dtype, device=device)
        cut = slice(start, start + 72)
        check_matmul(x[:, cut], weight[:72, cut], bias[cut], residual[:, cut], None, config, out[:, cut])
        assert out[:, :start].isnan().all() and out[:, start + 72 :].isnan().all()
        check_swiglu(x[:, cut], weight[:72, cut], bias[cut], False, config)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "i", "k"), [(70, 136, 72), (5, 33, 17)])
def test_swiglu(device, dtype, generator, m, i, k, bias, save):
    """A ragged number of columns must not read gates as up rows, nor write over them."""
    x, weight, offset, _ = operands(generator, m, 2 * i, k, dtype, bias=bias, residual=False)
    check_swiglu(x, weight, offset, save)


def test_swiglu_of_nothing_to_sum_over(device, generator):
    x, weight, bias, _ = operands(generator, 5, 16, 0, torch.float16, residual=False)
    check_swiglu(x, weight, bias, True)


def test_gpus_without_tma(old_device, generator):
    x, weight, bias, residual = operands(generator, 70, 136, 80, torch.float16)
    check_matmul(x, weight, bias, residual, "gelu")
    check_swiglu(x, weight, bias, True)


def test_same_bits_every_time_and_whatever_the_neighbours(device, generator):
    x, weight, bias, _ = operands(generator, 70, 72, 136, torch.float16)
    first, again, fewer = (torch.empty(m, 72, dtype=x.dtype, device=device) for m in (70, 70, 3))
    config = Config(64, 64, num_warps=4)
    matmul(first, x, weight, bias, config=config)
    matmul(again, x, weight, bias, config=config)
    matmul(fewer, x[67:], weight, bias, config=config)
    assert torch.equal(first, again)
    assert torch.equal(first[67:], fewer)


def test_infinities_and_nans_stay_in_their_rows(device, generator):
    x, weight, _, _ = operands(generator, 70, 72, 72, torch.float16)
    x[1, 5], x[2, 6] = float("inf"), float("nan")
    out = torch.empty(70, 72, dtype=x.dtype, device=device)
    matmul(out, x, weight)
    expected = F.linear(x.double(), weight.double())
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_operands_that_do_not_fit(device, generator):
    x, weight, bias, residual = operands(generator, 4, 8, 16, torch.float16)
    out = torch.empty(4, 8, dtype=x.dtype, device=device)
    with pytest.raises(ValueError, match=r"expected weight \[8, 16\], got|expected x \[4, 8\], got \[4, 16\]"):
        matmul(out, x, weight[:, :8])
    with pytest.raises(ValueError, match=r"expected out \[4, 8\], got \[3, 8\]"):
        matmul(out[:3], x, weight)
    with pytest.raises(ValueError, match=r"expected residual \[4, 8\], got \[4, 4\]"):
        matmul(out, x, weight, bias, residual[:, :4])
    with pytest.raises(ValueError, match=r"expected weight with dense rows, got strides"):
        matmul(out, x, torch.empty(8, 32, dtype=x.dtype, device=device)[:, ::2])
    with pytest.raises(ValueError, match=r"weight is torch.float32, x is torch.float16"):
        matmul(out, x, weight.float())
    with pytest.raises(ValueError, match=r"expected a dense bias \[8\] of torch.float16, got \[4\]"):
        matmul(out, x, weight, bias[:4])
    with pytest.raises(ValueError, match=r"expected float16, bfloat16 or float32, got torch.float64"):
        matmul(out.double(), x.double(), weight.double())
    with pytest.raises(ValueError, match=r"expected w_gate_up \[2 \* I, K\], got \[7, 16\]"):
        swiglu_matmul(out, x, weight[:7])
    with pytest.raises(ValueError, match=r"expected gate_up_out \[4, 8\], got \[4, 4\]"):
        swiglu_matmul(out[:, :4], x, weight, None, out[:, :4])


# Configurations ------------------------------------------------------------------------------------------------------

GPUS = [H100, A100, GpuInfo("NVIDIA L4", (8, 9), 58), GpuInfo("NVIDIA B200", (10, 0), 148), GpuInfo("RTX", (12, 0), 84)]


@pytest.mark.parametrize("info", GPUS, ids=lambda info: info.slug)
@pytest.mark.parametrize("kernels", [matmul_kernels, swiglu_kernels], ids=["matmul", "swiglu"])
def test_configurations_fit_every_gpu(kernels, info):
    for m in (1, 16, 64, 100, 512, 4096, 16384):
        for n, k in ((64, 64), (3584, 4096), (28672, 4096), (4096, 1024), (1001, 333)):
            for dtype in (torch.bfloat16, torch.float32):
                default = kernels.default_config(info, dtype, m, n, k)
                found = kernels.candidates(info, dtype, m, n, k)
                assert found or info.capability == (12, 0)
                assert len(found) <= 12
                for config in (default, *found):
                    assert shared_bytes(config, dtype.itemsize, residual=False) <= info.max_shared
                    assert config.tma is False or (info.has_tma and dtype is torch.bfloat16)
                    assert Config(**json.loads(json.dumps(config._asdict()))) == config


def test_tiles_follow_the_waves():
    """256 rows and 6144 columns are 48 tiles of 128 x 256 on 132 multiprocessors, or 96 of 128 x 128."""
    assert matmul_kernels.default_config(H100, torch.bfloat16, 256, 6144, 4096)[:2] == (128, 128)
    assert matmul_kernels.default_config(H100, torch.bfloat16, 4096, 28672, 4096)[:2] == (128, 256)
    assert matmul_kernels.default_config(H100, torch.bfloat16, 64, 28672, 4096).block_m == 64


# GPU -----------------------------------------------------------------------------------------------------------------


class Bound:
    """``assert_close_to_reference`` for one reference and many results, on the GPU."""

    def __init__(self, plain, exact):
        self.exact = exact
        floor = torch.finfo(plain.dtype).eps * exact.abs().max().item()
        self.bound = max(2 * (plain.double() - exact).abs().max().item(), floor)

    def check(self, out, name):
        error = (out.double() - self.exact).abs().max().item()
        assert error <= self.bound, f"{name}: error {error:.3e}, allowed {self.bound:.3e}"


# (M, N, K): projections of Llama-3-8B at tp 1 and 4, with whole and ragged numbers of rows.
MODEL_SHAPES = [(4096, 6144, 4096), (1000, 4096, 3584), (333, 7168, 4096), (64, 4096, 4096), (17, 1536, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), MODEL_SHAPES)
def test_model_shapes(dtype, m, n, k):
    generator = torch.Generator(device="cuda").manual_seed(m)
    x, weight, bias, residual = operands(generator, m, n, k, dtype)
    for epilogue in ((None, None, None), (None, residual, None), (bias, residual, "gelu")):
        bound = Bound(
            linear_reference(x, weight, *epilogue), linear_reference(*doubles(x, weight, *epilogue[:2]), epilogue[2])
        )
        out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
        matmul(out, x, weight, *epilogue)
        bound.check(out, f"{m} x {n} x {k}, {epilogue[2]}")
    double = torch.cat([weight, -weight])
    bound = Bound(swiglu_linear_reference(x, double, None), swiglu_linear_reference(*doubles(x, double), None))
    out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
    swiglu_matmul(out, x, double)
    bound.check(out, f"gated {m} x {n} x {k}")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [40, 300, 2000])
def test_every_candidate(m):
    n, k = 4104, 1032
    generator = torch.Generator(device="cuda").manual_seed(m)
    x, weight, bias, residual = operands(generator, m, n, k, torch.bfloat16)
    info = gpu_of(x)
    configs = matmul_kernels.candidates(info, x.dtype, m, n, k)
    if m == 2000:
        configs += [c for c in matmul_kernels._POINTERS if matmul_kernels._fits(info, c)]
    for epilogue in ((None, None, None), (bias, residual, "gelu")):
        bound = Bound(
            linear_reference(x, weight, *epilogue), linear_reference(*doubles(x, weight, *epilogue[:2]), epilogue[2])
        )
        for config in configs:
            out = torch.full((m, n), float("nan"), dtype=x.dtype, device="cuda")
            matmul(out, x, weight, *epilogue, config)
            bound.check(out, f"{config} {epilogue[2]}")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [40, 300, 2000])
def test_every_swiglu_candidate(m):
    i, k = 1992, 1032
    generator = torch.Generator(device="cuda").manual_seed(m)
    x, weight, bias, _ = operands(generator, m, 2 * i, k, torch.bfloat16, residual=False)
    info = gpu_of(x)
    configs = swiglu_kernels.candidates(info, x.dtype, m, i, k)
    if m == 2000:
        configs += [c for c in swiglu_kernels._POINTERS if swiglu_kernels._fits(info, c)]
    for b, save in ((None, False), (bias, True)):
        bound = Bound(swiglu_linear_reference(x, weight, b), swiglu_linear_reference(*doubles(x, weight, b)))
        kept = Bound(F.linear(x, weight, b), F.linear(*doubles(x, weight, b)))
        for config in configs:
            out = torch.full((m, i), float("nan"), dtype=x.dtype, device="cuda")
            gate_up = torch.full((m, 2 * i), float("nan"), dtype=x.dtype, device="cuda") if save else None
            swiglu_matmul(out, x, weight, b, gate_up, config)
            bound.check(out, f"{config} {save}")
            if save:
                kept.check(gate_up, f"{config}: gate and up")


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Offsets beyond 31 bits: the last rows of a result of 4.4 GB."""
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free GPU memory")
    m, n, k = 34000, 128256 // 2, 64
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    for config in (None, Config(128, 128, tma=False)):
        out[-70:].fill_(float("nan"))
        matmul(out, x, weight, config=config)
        assert_close_to_reference(out[-70:], F.linear(x[-70:], weight), F.linear(x[-70:].double(), weight.double()))


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("flatten", [False, True])
def test_small_cases_for_the_sanitizer(tma, flatten):
    generator = torch.Generator(device="cuda").manual_seed(5)
    config = Config(64, 128, num_warps=4, subtiles=2, flatten=flatten, tma=tma)
    x, weight, bias, residual = operands(generator, 70, 136, 72, torch.bfloat16)
    check_matmul(x, weight, bias, residual, "gelu", config)
    check_swiglu(x, weight, bias, True, config)
    check_matmul(x[:, :71], weight[:135, :71], bias[:135], None, None, config)
