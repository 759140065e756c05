"""The warp-specialised Gluon flash attention backward: its own source in numpy, its schedule; gradients on a GPU.

Tiers: no device (``tp_kernels.testing.gluon_machine`` runs the source), GPU.
"""

import itertools
import random

import numpy as np
import pytest
import torch

from tp_kernels.ops._gpu import H100, gpu_of
from tp_kernels.ops.attention import attention_reference
from tp_kernels.testing.gluon_machine import Descriptor, Machine, Pointer
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.op_bench.case import randn

pytest.importorskip("triton")

from tp_kernels.ops.kernels import gluon_flash_backward as backward
from tp_kernels.ops.kernels import gluon_flash_schedule as schedule
from tp_kernels.ops.kernels.gluon_flash_attention import flash_forward
from tp_kernels.ops.kernels.gluon_flash_backward import Config, flash_backward
from tp_kernels.ops.kernels.gluon_flash_gradients import gluon_dkdv, gluon_dq

LOG2_E = 1.4426950408889634
SCALE = 0.7
ROWS = 4

# The kernels' own source on the CPU -----------------------------------------------------------------------------------


def oracle(q, k, v, grad_out, causal, window):
    """dq, dk, dv, lse and delta in float64."""
    group, shift = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    wide_k, wide_v = np.repeat(k, group, 1).astype(np.float64), np.repeat(v, group, 1).astype(np.float64)
    position, key = np.arange(q.shape[2])[:, None] + shift, np.arange(k.shape[2])[None]
    seen = key <= position if causal else np.ones((q.shape[2], k.shape[2]), bool)
    if window is not None:
        seen = seen & (key > position - window)
    scores = np.where(seen, q @ wide_k.swapaxes(2, 3) * SCALE, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    p = np.exp(scores - top) / np.where(total == 0, 1, total)
    lse = np.where(total > 0, top + np.log(np.where(total > 0, total, 1)), -np.inf)[..., 0]
    delta = (grad_out * (p @ wide_v)).sum(-1)
    ds = p * (grad_out @ wide_v.swapaxes(2, 3) - delta[..., None])

    def shared(x):
        return x.reshape(k.shape[0], k.shape[1], group, *k.shape[2:]).sum(2)

    dk, dv = shared(ds.swapaxes(2, 3) @ q) * SCALE, shared(p.swapaxes(2, 3) @ grad_out)
    return ds @ wide_k * SCALE, dk, dv, lse, delta


def simulate(c):
    rng = np.random.default_rng(c["seed"])
    batch, heads, kv_heads, q_len, kv_len, depth = c["batch"], c["heads"], c["kv_heads"], c["q_len"], c["kv_len"], 4
    causal, window, block_m, block_n = c["causal"], c["window"], c["block_m"], c["block_n"]
    q, k, v, grad_out = (
        rng.standard_normal((batch, n, length, depth)).astype(np.float32)
        for n, length in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len), (heads, q_len))
    )
    *expected, lse, delta = oracle(q, k, v, grad_out, causal, window)
    padded = -(-q_len // 8) * 8
    sums2, deltas = np.full((heads, batch, padded), np.inf, np.float32), np.zeros((heads, batch, padded), np.float32)
    blind = np.isinf(lse)
    sums2[:, :, :q_len] = np.where(blind, np.inf, lse * LOG2_E).swapaxes(0, 1)
    deltas[:, :, :q_len] = np.where(blind, 0, delta).swapaxes(0, 1)
    sums2, deltas = sums2.reshape(heads, -1), deltas.reshape(heads, -1)
    dq, dk, dv = (np.full_like(x, np.nan) for x in (q, k, v))
    group = heads // kv_heads
    shares = np.full((2, batch, heads, kv_len, depth), np.nan, np.float32)
    windowed = window is not None and window < kv_len
    lengths = (q_len, kv_len, window if windowed else 0, padded)
    modes = {"STAGES": c["stages"], "CAUSAL": causal, "WINDOWED": windowed, "GROUP": group}
    machine = Machine(c["seed"], ROWS=2, TILE_ROWS=ROWS, CONSUMERS=2, accumulator=lambda n: None)

    def blocks(x, rows):
        return Descriptor(x, (1, 1, rows, depth))

    each = 1 if c["split"] else group
    tiles, turns = -(-kv_len // ROWS), heads // each
    machine.launch(
        gluon_dkdv,
        tiles * turns * batch,
        *(blocks(x, rows) for x, rows in ((q, block_m), (k, 2), (v, 2), (grad_out, block_m))),
        *(Descriptor(x, (1, block_m)) for x in (sums2, deltas)),
        *(blocks(x, 2) for x in (dk, dv)),
        *(Pointer(x.reshape(-1)) for x in shares),
        *(SCALE * LOG2_E, SCALE),
        *(tiles, turns, turns * batch, min(c["section"], turns * batch), each),
        *lengths,
        SPLIT=c["split"],
        HEAD_DIM=depth,
        **modes,
    )
    if c["split"]:
        dk, dv = shares.reshape(2, batch, kv_heads, group, kv_len, depth).sum(3)
    tiles = -(-q_len // ROWS)
    machine.launch(
        gluon_dq,
        tiles * heads * batch,
        *(blocks(x, rows) for x, rows in ((q, 2), (k, block_n), (v, block_n), (grad_out, 2), (dq, 2))),
        *(Pointer(x.reshape(-1)) for x in (sums2, deltas)),
        *(SCALE * LOG2_E, SCALE),
        *(tiles, heads, heads * batch, min(c["section"], heads * batch)),
        *lengths,
        sums2.shape[1],
        **modes,
    )
    for name, actual, right in zip(("dq", "dk", "dv"), (dq, dk, dv), expected, strict=True):
        np.testing.assert_allclose(actual, right, atol=5e-5, err_msg=f"{name} {c}")


@pytest.mark.parametrize("seed", range(3))
def test_source_on_the_cpu(seed):
    pick = random.Random(seed)
    for i in range(40):
        heads = pick.choice([1, 2, 4])
        simulate(
            {
                "q_len": pick.randint(1, 17),
                "kv_len": pick.randint(1, 17),
                "batch": pick.choice([1, 2]),
                "heads": heads,
                "kv_heads": pick.choice([1, heads]),
                "causal": pick.random() < 0.6,
                "window": pick.choice([None, None, 1, 2, 3, 5, 9]),
                "block_m": pick.choice([2, 4]),
                "block_n": pick.choice([2, 4, 8]),
                "stages": pick.choice([1, 2, 3]),
                "split": pick.random() < 0.3,
                "section": pick.choice([1, 2, 99]),
                "seed": i,
            }
        )


@pytest.mark.parametrize("block_m", [2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 6, 11])
def test_every_query_that_sees_a_key_is_visited_and_masks_are_where_they_must_be(block_m, causal, window):
    q_blocks = Machine(TILE_ROWS=ROWS).translate(schedule.q_blocks)
    for q_len, kv_len in itertools.product(range(1, 14), range(1, 20)):
        for row in range(0, kv_len, ROWS):
            lo, clear_lo, clear_hi, hi = q_blocks(row, q_len, kv_len, window or 0, block_m, causal, window is not None)
            assert 0 <= lo <= clear_lo <= clear_hi <= hi <= -(-q_len // block_m)
            assert causal or lo == clear_lo
            assert window is not None or clear_hi == hi
            for key in range(row, min(row + ROWS, kv_len)):
                first = max(key - (kv_len - q_len), 0) if causal else 0
                end = q_len if window is None else max(min(q_len, key + window - (kv_len - q_len)), 0)
                assert first >= end or (lo * block_m <= first and end <= hi * block_m)
                clear = range(clear_lo * block_m, min(clear_hi * block_m, q_len))
                assert all(first <= query < end for query in clear)


# Configurations and checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
def test_candidates_fit_and_come_back_from_a_table(head_dim):
    found = backward.candidates(H100, torch.bfloat16, head_dim, 4096, 4096, True)
    assert found[0] == backward.default_config(H100, torch.bfloat16, head_dim, 4096, 4096, True)
    assert [Config(**config._asdict()) for config in found] == found


def test_what_is_not_supported(device):
    q = torch.zeros(1, 2, 4, 64, dtype=torch.float16, device=device)
    options = {"scale": 1.0, "causal": True, "window": None, "max_q": 4, "max_k": 4}
    lse = torch.zeros(1, 2, 4, device=device)
    wide = torch.zeros(1, 2, 4, 256, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="head_dim"):
        flash_backward(wide, wide, wide, wide, wide, wide, wide, wide, lse, **options)
    with pytest.raises(ValueError, match="packed"):
        flash_backward(q, q, q, q, q, q, q, q, lse, cu_q=lse, cu_k=lse, **options)
    with pytest.raises(ValueError, match="grad_out"):
        flash_backward(q, q, q, q[:, :, :, :1].expand_as(q), q, q, q, q, lse, **options)
    nothing, gradient = q[:, :, :0], torch.ones_like(q)
    flash_backward(gradient, nothing, nothing, q, q, nothing, nothing, q, lse, **(options | {"max_k": 0}))
    assert not gradient.any()


# Gradients on a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(device):
    """The device, if it is one that the kernels are for."""
    if device != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.x")
    return device


def check(generator, batch, heads, kv_heads, q_len, kv_len, head_dim, dtype, *, causal, window=None, config=None):
    """Gradients of the rows that see a key, against float64 and PyTorch in the same dtype; the same bits twice."""
    q, k, v, grad_out = (
        randn(generator, batch, length, n, head_dim, dtype=dtype).transpose(1, 2)
        for n, length in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len), (heads, q_len))
    )
    blind = max(0, q_len - kv_len) if causal else 0
    options = {"causal": causal, "window": window, "scale": head_dim**-0.5, "max_q": q_len, "max_k": kv_len}
    out, lse = torch.empty_like(q), torch.empty(batch, heads, q_len, device=q.device)
    flash_forward(out, lse, q, k, v, **options)
    mine = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    flash_backward(*mine, grad_out, q, k, v, out, lse, config=config, **options)
    again = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    flash_backward(*again, grad_out, q, k, v, out, lse, config=config, **options)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    assert not mine[0][:, :, :blind].any()

    def autograd(kind):
        inputs = [x.to(kind)[:, :, first:].detach().requires_grad_() for x, first in ((q, blind), (k, 0), (v, 0))]
        result = attention_reference(*inputs, causal=causal, sliding_window=window, scale=options["scale"])
        return torch.autograd.grad(result, inputs, grad_out[:, :, blind:].to(kind))

    mine[0] = mine[0][:, :, blind:]
    for name, actual, same_dtype, right in zip(
        ("dq", "dk", "dv"), mine, autograd(dtype), autograd(torch.float64), strict=True
    ):
        assert_close_to_reference(actual, same_dtype, right, name=f"{name} {causal} {window}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (96, torch.float16)], ids=str
)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 200), (False, 77)])
def test_gradients(hopper, generator, dtype, head_dim, causal, window):
    for q_len, kv_len in ((512, 512), (1, 129), (333, 333), (100, 517), (517, 100)):
        check(generator, 2, 4, 2, q_len, kv_len, head_dim, dtype, causal=causal, window=window)


@pytest.mark.gpu
def test_gradients_of_every_candidate(hopper, generator):
    for config in backward.candidates(gpu_of(torch.empty(1, device=hopper)), torch.bfloat16, 128, 700, 700, True):
        check(generator, 2, 8, 2, 700, 700, 128, torch.bfloat16, causal=True, config=config)


@pytest.mark.gpu
def test_gradients_of_a_model_shape(hopper, generator):
    check(generator, 1, 16, 4, 2048, 2048, 128, torch.bfloat16, causal=True)


@pytest.mark.gpu
@pytest.mark.sanitize
def test_small_for_the_sanitizer(hopper, generator):
    check(generator, 1, 2, 1, 150, 270, 128, torch.bfloat16, causal=True)
