"""Tables that were measured for something else: another version, another shape, more than this kernel takes.

Tier: no device (interpreter, recorded launches). The ops run as if nothing had been measured, and ``explain`` says so.
"""

from __future__ import annotations

import json

import pytest
import torch

from tp_kernels import ops
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import A100, H100, pretend
from tp_kernels.ops.kernels.launch import recording

OPS = (
    *("rms_norm", "add_rms_norm", "rms_norm_backward", "rope", "rope_backward", "qkv_rope_cache", "decode_attention"),
    *("flash_attention", "flash_attention_backward", "cross_entropy", "cross_entropy_backward"),
    *("silu_mul", "silu_mul_backward", "linear", "swiglu_linear", "swiglu_backward"),
)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """``table(path, config, *ops)``: that was measured, for every shape."""

    def write(path, config, *names, info=H100):
        row = {"dtype": "16bit", "sizes": {}, "path": path, "config": config, "us": {path: 1.0, "torch": 2.0}}
        content = {"gpu": info.name, "measured": "2026-01-01", "ops": {name: [row] for name in names}}
        (tmp_path / f"{info.slug}.json").write_text(json.dumps(content))
        tuning.forget_tables()

    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    yield write
    monkeypatch.undo()
    tuning.forget_tables()


def half(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return (0.3 * torch.randn(shape, generator=generator)).to(torch.float16)


def calls():
    q, k, angles = half(1, 2, 4, 16), half(1, 1, 4, 16), torch.ones(8, 16)
    lengths, cache = torch.zeros(1, dtype=torch.int64), half(1, 1, 8, 16)
    return {
        "rms_norm": (half(3, 64), half(64)),
        "add_rms_norm": (half(3, 64), half(3, 64), half(64)),
        "apply_rope": (q, k, angles[:4], angles[:4]),
        "qkv_rope_cache": (half(1, 2, 64), angles, angles, lengths, cache, cache.clone(), 2, 1),
        "decode_attention": (q[:, :, :1], cache, cache, lengths),
        "flash_attention": (q, k, k),
        "cross_entropy": (half(3, 40), torch.zeros(3, dtype=torch.int64)),
        "silu_mul": (half(3, 64),),
        "linear": (half(3, 64), half(64, 64)),
        "swiglu_linear": (half(3, 64), half(64, 64)),
        "swiglu_mlp": (half(3, 64), half(64, 64), half(64, 32)),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have a GPU")
@pytest.mark.parametrize("path", ["triton", "unheard-of"])
@pytest.mark.parametrize("name", calls())
def test_a_configuration_of_another_version(table, name, path):
    arguments = calls()[name]
    trains = name not in ("qkv_rope_cache", "decode_attention")
    arguments = [
        x.requires_grad_(trains) if isinstance(x, torch.Tensor) and x.dtype == torch.float16 else x for x in arguments
    ]

    def run():
        result = getattr(ops, name)(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        return (*results, *torch.autograd.grad(sum(x.float().sum() for x in results), leaves)) if leaves else results

    expected = [x.detach().clone() for x in run()]
    table(path, {"blocks_of_yore": 3}, *OPS)
    with pretend(H100):
        for actual, plain in zip(run(), expected, strict=True):
            torch.testing.assert_close(actual.detach(), plain, rtol=1e-2, atol=1e-2)
        with recording() as launches, torch.no_grad():
            getattr(ops, name)(*arguments)
            explained = ops.explain(name, *arguments)
    if name not in ("swiglu_linear", "swiglu_mlp"):  # cuBLAS comes before our silu_mul, and mlp explains its backward
        assert explained.name == ("triton" if launches else "torch"), explained


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have a GPU")
def test_explain_knows_of_the_gradient(table):
    """Kernels for a few rows keep nothing for the backward."""
    table("gemv", {}, "swiglu_linear")
    x, weight = half(3, 64), half(64, 64)
    with pretend(H100):
        assert ops.explain("swiglu_linear", x, w_gate_up=weight, group=None).name == "gemv"
        assert "backward" in ops.explain("swiglu_linear", x, weight.requires_grad_()).reason
        assert ops.explain("swiglu_mlp", x, weight, half(64, 32), group=None).name == "torch"


def test_explain_takes_the_names_of_the_ops_arguments():
    x, weight = torch.zeros(3, 8), torch.zeros(8)
    assert ops.explain("rms_norm", x=x, weight=weight, eps=1e-5).name == "native-cpu"
    assert ops.explain("add_rms_norm", x=x, residual=x, weight=weight).name == "native-cpu"
    assert ops.explain("swiglu_linear", x=x, w_gate_up=x[:2].clone(), group=None).name == "native-cpu"


def last_launch(info, op, *arguments, **options):
    with pretend(info), recording() as launches, torch.no_grad():
        op(*arguments, **options)
    return launches[-1].options


def meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_a_configuration_that_shared_memory_does_not_hold(table):
    """It was measured for heads of 128, or for half the rows; what is in reach of that has a default instead."""
    table("triton", {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 3}, "flash_attention")
    for dim, block in ((128, 128), (256, 64)):
        q = meta(1, 8, 4096, dim)
        assert last_launch(H100, ops.attention, q, q, q, sliding_window=64)["BLOCK_N"] == block
    table("triton", {"block_n": 128, "num_warps": 8}, "decode_attention")
    lengths = torch.empty(1, dtype=torch.int64, device="meta")
    for dim, block in ((128, 128), (256, 64)):
        q, cache = meta(1, 8, 1, dim), meta(1, 8, 64, dim)
        assert last_launch(H100, ops.decode_attention, q, cache, cache, lengths)["BLOCK_N"] == block
    config = {"block_n": 64, "block_k": 128, "k_groups": 1, "split_k": 1, "num_warps": 4, "num_stages": 6}
    table("skinny", config, "linear", info=A100)
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    with pretend(A100):
        taken = [ops.explain("linear", meta(m, 4096), weight) for m in (24, 48)]
    assert [bool(path.config) for path in taken] == [True, False]
    assert all(path.name == "skinny" for path in taken)
