"""``ops.explain`` for GPU tensors: the measured table decides, and the words say so. Tier: no device (pretended)."""

import json

import pytest
import torch

from tp_kernels import ops
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import H100, pretend


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()
    yield tmp_path / "h100.json"
    tuning.forget_tables()


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


def arguments():
    q, k = half(1, 4, 8, 64), half(1, 2, 8, 64)
    table, lengths = torch.zeros(16, 64), torch.zeros(1, dtype=torch.int64)
    cache = half(1, 2, 16, 64)
    ends = torch.tensor([0, 8], dtype=torch.int32)
    return {
        "linear": (half(4, 64), half(128, 64)),
        "swiglu_linear": (half(4, 64), half(128, 64)),
        "silu_mul": (half(4, 64),),
        "rms_norm": (half(4, 64), half(64)),
        "add_rms_norm": (half(4, 64), half(4, 64), half(64)),
        "qkv_rope_cache": (half(1, 2, 8 * 64), table, table, lengths, cache, cache.clone(), 4, 2),
        "apply_rope": (q, k, table[:8], table[:8]),
        "attention": (q, k, k),
        "flash_attention": (q, k, k),
        "flash_attention_varlen": (half(8, 4, 64), half(8, 2, 64), half(8, 2, 64), ends, ends, 8, 8),
        "decode_attention": (half(1, 4, 1, 64), cache, cache, lengths),
        "swiglu_mlp": (half(4, 64), half(128, 64), half(64, 64)),
        "cross_entropy": (half(4, 97), torch.zeros(4, dtype=torch.int64)),
    }


@pytest.mark.parametrize("name", sorted(arguments()))
def test_an_unmeasured_gpu_is_called_that(name):
    with pretend(H100):
        path = ops.explain(name, *arguments()[name])
    assert path.name in ("triton", "gluon", "gemv", "skinny", "torch")
    assert "not measured" in path.reason, path


def test_a_measurement_decides_and_is_quoted(table):
    x, w = arguments()["linear"]
    entry = {
        "dtype": "16bit",
        "sizes": {"m": 4, "n": 128, "k": 64},
        "path": "gemv",
        "config": {},
        "us": {"gemv": 1.25, "torch": 2.5},
    }
    content = {"gpu": H100.name, "measured": "2026-01-01", "versions": {}, "ops": {"linear": [entry]}}
    table.write_text(json.dumps(content))
    tuning.forget_tables()
    with pretend(H100):
        path = ops.explain("linear", x, w)
        assert path.name == "gemv" and "gemv 1.2 us, torch 2.5 us" in path.reason and "2026-01-01" in path.reason
        far = ops.explain("linear", half(64, 64), w)
        assert far.name == "torch" and "not measured" in far.reason


def test_cpu_tensors_keep_their_own_reasons():
    q, k, _ = arguments()["attention"]
    assert "only path" in ops.explain("attention", q, k, k).reason
