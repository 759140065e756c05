"""Flash attention, forward, and its dispatch, against fp64 and PyTorch. Tier: no device (interpreter), GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import A100, H100, GpuInfo, gpu_of, pretend
from tp_kernels.ops.attention import choose_attention, sdpa_attention
from tp_kernels.ops.flash_attention import choose_flash_attention, choose_flash_attention_varlen
from tp_kernels.ops.kernels import flash_attention as kernels
from tp_kernels.testing.numeric import assert_close_to_reference

HAS_GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if HAS_GPU else torch.float16
# The interpreter pays for every program, and small blocks reach every kind of border with few rows.
TINY = None if HAS_GPU else kernels.Config(32, 16, 4, 2)


def make(generator, batch, heads, length, dim, dtype, layout="bshd"):
    """[B, H, S, D] in one of the memory orders that models produce."""
    device = generator.device
    if layout == "bhsd":
        return torch.randn(batch, heads, length, dim, generator=generator, device=device).to(dtype)
    if layout == "bshd":
        return torch.randn(batch, length, heads, dim, generator=generator, device=device).to(dtype).transpose(1, 2)
    # "odd": a view whose rows start at odd addresses
    whole = torch.randn(batch, length, heads, dim + 1, generator=generator, device=device).to(dtype)
    return whole[..., 1:].transpose(1, 2)


def in_dtype(q, k, v, causal, window):
    """PyTorch's own result in the dtype: the yardstick. Rows without keys are 0 by definition."""
    # On the CPU its kernel does more in fp32 than any GPU kernel, so there it is the composition.
    function = sdpa_attention if q.is_cuda else ops.attention_reference
    return function(q, k, v, causal=causal, sliding_window=window).nan_to_num(nan=0.0)


def in_dtype_varlen(q, k, v, lengths, kv_lengths, causal, window):
    """The same for packed sequences, one after the other."""
    outs = []
    for rows, keys in zip(q.split(lengths), zip(k.split(kv_lengths), v.split(kv_lengths), strict=True), strict=False):
        each = (x.transpose(0, 1).unsqueeze(0) for x in (rows, *keys))
        outs.append(in_dtype(*each, causal, window)[0].transpose(0, 1))
    return torch.cat(outs)


def check_forward(q, k, v, causal, window, config, lse=True):
    scale = q.shape[-1] ** -0.5
    out = torch.full_like(q, float("nan"))
    sums = torch.full(q.shape[:3], float("nan"), device=q.device) if lse else None
    sizes = {"max_q": q.shape[2], "max_k": k.shape[2]}
    kernels.flash_forward(out, sums, q, k, v, scale=scale, causal=causal, window=window, config=config, **sizes)
    exact, exact_lse = ops.flash_attention_reference(
        q.double(), k.double(), v.double(), causal=causal, sliding_window=window, return_lse=True
    )
    if q.dtype == torch.float32:  # for tests only; PyTorch may be exact by luck in so few elements
        # A GPU's exp2 is the approximate one (2 ulp); the interpreter's is numpy's.
        atol, rtol = (2e-5, 5e-5) if q.is_cuda else (5e-6, 1e-5)
        torch.testing.assert_close(out.double(), exact, atol=atol, rtol=rtol)
    else:
        assert_close_to_reference(out, in_dtype(q, k, v, causal, window), exact, name="out")
    if lse:
        torch.testing.assert_close(sums.double(), exact_lse, atol=2e-4, rtol=1e-5)


# heads, KV heads, S, L, head_dim, causal, window: every border in its middle, on it, and beyond it.
CASES = [
    (2, 1, 40, 40, 64, True, None),
    (4, 4, 7, 33, 96, True, None),
    (4, 1, 33, 7, 16, True, None),
    (2, 1, 50, 50, 64, True, 10),
    (1, 1, 50, 70, 72, False, 20),
    (2, 2, 17, 48, 80, False, None),
    (1, 1, 1, 1, 64, True, 1),
    (1, 1, 37, 21, 16, True, 5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, device, dtype, generator):
    heads, kv_heads, length, kv_length, dim, causal, window = case
    q = make(generator, 1, heads, length, dim, dtype)
    k = make(generator, 1, kv_heads, kv_length, dim, dtype)
    v = make(generator, 1, kv_heads, kv_length, dim, dtype, "bhsd")
    check_forward(q, k, v, causal, window, TINY)


@pytest.mark.parametrize("layout", ["bhsd", "odd"])
def test_pointers_on_a_gpu_without_tma(old_device, layout):
    generator = torch.Generator(device=old_device).manual_seed(3)
    q, k, v = (make(generator, 2, h, 36, 64, torch.float16, layout) for h in (2, 1, 1))
    check_forward(q, k, v, True, 20, TINY, lse=False)


def test_descriptors_refuse_what_hardware_would(device, generator):
    good = make(generator, 1, 2, 8, 64, torch.float16)
    assert kernels.tma_takes(good, good[:, :, 1:], good[:, 1:])
    odd = make(generator, 1, 2, 8, 64, torch.float16, "odd")
    for bad in (odd, good[:, :, :0], good.flatten(0, 1), good[..., 4:], good[:, :1, :1].expand(1, 2, 8, 64)):
        assert not kernels.tma_takes(good, bad)
    check_forward(odd, good, good, True, None, TINY)


@pytest.mark.parametrize("kv_length", [0, 3])
@pytest.mark.parametrize("length", [0, 5])
def test_empty(length, kv_length, device, generator):
    q, k = make(generator, 2, 2, length, 64, HALF), make(generator, 2, 1, kv_length, 64, HALF)
    out, lse = ops.flash_attention(q, k, k, causal=False, return_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 2, length)
    if not kv_length:
        assert not out.any() and (lse == -math.inf).all()
    none = ops.flash_attention(q[:0], k[:0], k[:0])
    assert none.shape == (0, 2, length, 64)


def packed(generator, lengths, heads, dim, dtype, spare=0):
    total = sum(lengths) + spare
    x = torch.randn(total, heads, dim, generator=generator, device=generator.device).to(dtype)
    return x, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=generator.device)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 6), (False, None)])
def test_varlen(causal, window, device, generator):
    """Empty sequences of either kind, and rows behind the last one."""
    q, cu_q = packed(generator, [5, 0, 17, 9], 4, 64, HALF, spare=3)
    k, cu_k = packed(generator, [9, 4, 17, 0], 2, 64, HALF)
    v = torch.randn(k.shape, generator=generator, device=device).to(HALF)
    arguments, options = (cu_q, cu_k, 17, 17), {"causal": causal, "sliding_window": window, "return_lse": True}
    assert choose_flash_attention_varlen(q, k, v, *arguments).path in ("triton", "gluon")
    out, lse = ops.flash_attention_varlen(q, k, v, *arguments, **options)
    wide = (q.double(), k.double(), v.double())
    exact, exact_lse = ops.flash_attention_varlen_reference(*wide, *arguments, **options)
    lengths = [5, 0, 17, 9], [9, 4, 17, 0]
    assert_close_to_reference(out[:31], in_dtype_varlen(q[:31], k, v, *lengths, causal, window), exact[:31])
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-4, rtol=1e-5)
    assert not out[22:].any() and (lse[:, 22:] == -math.inf).all()


def test_varlen_of_equal_lengths_is_the_batch(device, generator):
    q, k, v = (make(generator, 2, h, 12, 64, HALF) for h in (2, 1, 1))
    cu = torch.tensor([0, 12, 24], dtype=torch.int32, device=device)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out = ops.flash_attention_varlen(*flat, cu, cu, 12, 12)
    batch, _ = ops.flash_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out.view(2, 12, 2, 64), batch.transpose(1, 2))


# Dispatch -------------------------------------------------------------------------------------------------------------


def table(tmp_path, monkeypatch, forward, backward=None):
    """A user's table with one entry an op for 1 x 2 heads, 16 tokens, head_dim 64."""
    import json

    sizes = {"d": 64, "q": 16, "k": 16, "heads": 2, "causal": 1}
    row = {"dtype": "16bit", "sizes": sizes, "config": {}}
    found = {"flash_attention": [{**row, "path": min(forward, key=forward.get), "us": forward}]}
    if backward is not None:
        found["flash_attention_backward"] = [{**row, "path": min(backward, key=backward.get), "us": backward}]
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    for slug in ("h100", "h200"):
        content = {"gpu": "test", "measured": "2026-01-01", "versions": {}, "ops": found}
        (tmp_path / f"{slug}.json").write_text(json.dumps(content))
    tuning.forget_tables()


@pytest.fixture
def no_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "shipped_table", lambda slug: tmp_path / "none.json")
    tuning.forget_tables()
    yield
    monkeypatch.undo()
    tuning.forget_tables()


def test_choice_without_measurements(no_tables, device):
    q = torch.empty(1, 4, 32, 64, dtype=HALF, device=device)
    k = torch.empty(1, 2, 32, 64, dtype=HALF, device=device)
    plain = choose_flash_attention(q, k, k)
    assert plain.path == "torch" and "not measured on" in plain.reason
    assert choose_flash_attention(q[:, :, :1], k, k).path == "torch"
    assert choose_flash_attention(q, k, k, sliding_window=32).path == "torch"
    for options in ({"sliding_window": 31}, {"return_lse": True}):
        assert choose_flash_attention(q, k, k, **options).path == "triton"
    assert choose_flash_attention(q[:, :, :9], k, k).path == "triton"
    assert choose_attention(q[:, :, :9], k, k).path == "triton"
    assert choose_attention(q[:, :, :9], k, k, mask=torch.ones(9, 32, dtype=torch.bool)).path == "torch"
    for bad in (q.float(), q[..., :60], q.new_empty(1, 4, 32, 264)):
        choice = choose_flash_attention(bad, bad, bad, sliding_window=3)
        assert choice.path == "torch" and "the kernels take" in choice.reason
    assert "scale -1" in choose_flash_attention(q, k, k, scale=-1.0).reason


def test_choice_from_a_table(no_tables, device, tmp_path, monkeypatch):
    if HAS_GPU and "H100" not in torch.cuda.get_device_name():
        pytest.skip("needs the GPU that the table is for")
    q = torch.zeros(1, 2, 16, 64, dtype=HALF, device=device)
    table(tmp_path, monkeypatch, {"triton": 5.0, "torch": 9.0}, {"triton": 20.0, "torch": 10.0})
    assert choose_flash_attention(q, q, q).path == "triton"
    assert choose_flash_attention(q.requires_grad_(), q, q).path == "torch"  # 25 us against 19
    table(tmp_path, monkeypatch, {"triton": 5.0, "torch": 9.0}, {"triton": 12.0, "torch": 10.0})
    choice = choose_flash_attention(q, q, q)
    assert choice.path == "triton" and "17.0 us ours, 19.0 us PyTorch's" in choice.reason
    table(tmp_path, monkeypatch, {"triton": 9.0, "torch": 5.0})
    assert choose_flash_attention(q.detach(), q.detach(), q.detach()).path == "torch"
    assert choose_flash_attention(q, q, q, sliding_window=4).path == "triton"


def test_attention_takes_the_kernels(no_tables, device, generator):
    """``ops.attention`` on a GPU: the same meaning by whatever path."""
    q, k, v = (make(generator, 1, h, n, 64, HALF) for h, n in ((2, 9), (1, 20), (1, 20)))
    wide = (q.double(), k.double(), v.double())
    for options in ({}, {"sliding_window": 3}, {"causal": False}):
        exact = ops.attention_reference(*wide, **options)
        plain = ops.attention_reference(q, k, v, **options)
        assert_close_to_reference(ops.attention(q, k, v, **options), plain, exact)
    mask = torch.ones(9, 20, dtype=torch.bool, device=device).tril(5)
    expected = ops.attention_reference(*wide, causal=False, mask=mask)
    actual = ops.attention(q, k, v, causal=False, mask=mask)
    assert_close_to_reference(actual, ops.attention_reference(q, k, v, causal=False, mask=mask), expected)


def test_results_have_the_tokens_before_the_heads(device, generator):
    q, k, v = (make(generator, 2, h, 6, 64, HALF, "bhsd") for h in (2, 1, 1))
    out = ops.flash_attention(q, k, v, sliding_window=2)
    assert out.transpose(1, 2).is_contiguous()


def test_autocast(device, generator):
    q, k, v = (make(generator, 1, h, 6, 64, torch.float32) for h in (2, 1, 1))
    kind = "cuda" if HAS_GPU else "cpu"
    with torch.autocast(kind, dtype=HALF):
        out, lse = ops.flash_attention(q, k, v, sliding_window=3, return_lse=True)
        assert choose_flash_attention(q, k, v, sliding_window=3).path == "triton"
        assert ops.attention(q, k, v).dtype == HALF
    expected = ops.flash_attention(q.to(HALF), k.to(HALF), v.to(HALF), sliding_window=3)
    assert out.dtype == HALF and lse.dtype == torch.float32
    assert torch.equal(out, expected)
    with torch.autocast(kind, dtype=HALF):
        plain, _ = ops.flash_attention(q, k, v, return_lse=True, scale=-1.0)
    assert plain.dtype == HALF


def test_opcheck(device, generator):
    q, k, v = (make(generator, 1, h, 10, 64, HALF) for h in (2, 1, 1))
    cu = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    for name in ("flash_attention", "flash_attention_forward"):
        op = getattr(torch.ops.tp_kernels, name).default
        for arguments in (
            (q, k, v, None, None, 0, 0, True, 3, 0.1),
            (q, k, v, None, None, 0, 0, True, None, 0.1),
            (*flat, cu, cu, 6, 6, True, None, 0.1),
        ):
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks(device, generator):
    q, k, v = (make(generator, 1, h, 10, 64, HALF) for h in (2, 1, 1))
    cu = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)

    def step(q, k, v):
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        out, lse = ops.flash_attention(q, k, v, return_lse=True)
        return (
            ops.attention(q, k, v) + out,
            lse,
            ops.flash_attention(q, k, v, sliding_window=3),
            ops.flash_attention_varlen(*flat, cu, cu, 6, 6),
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for actual, expected in zip(compiled(q, k, v), step(q, k, v), strict=True):
            # Traced, a plain call may go to another of PyTorch's kernels.
            torch.testing.assert_close(actual, expected, **({"rtol": 0.02, "atol": 0.02} if HAS_GPU else {}))


def test_bad_inputs(device):
    q = torch.zeros(1, 2, 4, 16, dtype=HALF, device=device)
    cu = torch.tensor([0, 4], dtype=torch.int32, device=device)
    flat = q[0].transpose(0, 1)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        ops.flash_attention(q[:, :1], q, q)
    with pytest.raises(ValueError, match="at least 1 or None"):
        ops.flash_attention(q, q, q, sliding_window=0)
    for change, words in (
        ({0: q}, "total_q, Hq, D"),
        ({1: flat[:, :, :8]}, "agree in B and D|expected q"),
        ({3: cu.long()}, "cu_seqlens_q int32"),
        ({4: cu[:1]}, "cu_seqlens_k int32"),
        ({4: torch.cat((cu, cu[1:]))}, "differ in length"),
        ({5: -1}, "cannot be -1"),
    ):
        arguments = [flat, flat, flat, cu, cu, 4, 4]
        for index, value in change.items():
            arguments[index] = value
        with pytest.raises(ValueError, match=words):
            ops.flash_attention_varlen(*arguments)


def test_on_the_cpu():
    """No GPU, no kernels: PyTorch's own operations, with the same meaning."""
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    expected = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ops.flash_attention(q, k, k), expected)
    out, lse = ops.flash_attention(q, k, k, return_lse=True)
    torch.testing.assert_close(out, expected)
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    late = ops.flash_attention(q, k[:, :, :2], k[:, :, :2])
    assert not late[:, :, :3].any() and late.isfinite().all()
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    flat, flat_k = q[0].transpose(0, 1), k[0].transpose(0, 1)
    packed_out = ops.flash_attention_varlen(flat, flat_k, flat_k, cu, cu, 3, 3)
    torch.testing.assert_close(packed_out[:2], expected[0].transpose(0, 1)[:2])
    with pytest.raises(ValueError, match="at most 2, got"):
        ops.flash_attention_varlen(flat, flat_k, flat_k, cu, cu, 2, 3)


@pytest.mark.parametrize("info", [H100, A100, GpuInfo("NVIDIA L40S", (8, 9), 142)], ids=lambda info: info.slug)
def test_configurations_fit(info):
    for module in (kernels, __import__("tp_kernels.ops.kernels.flash_attention_backward", fromlist=["Config"])):
        for dim in (16, 64, 96, 128, 192, 256):
            found = module.candidates(info, torch.bfloat16, dim, 4096, 4096, True)
            assert found[0] == module.default_config(info, torch.bfloat16, dim, 4096, 4096, True)
            assert 1 <= len(found) == len(set(found)) <= 12
            for config in found:
                assert module._shared(info, config, dim) <= info.max_shared
                assert module.Config(**config._asdict()) == config
        assert len(module.candidates(info, torch.float32, 64, 64, 64, True)) == 1


def test_kernels_are_told_apart_by_pretence(no_tables):
    """On an A100 no descriptors are made: the launch has plain tensors only."""
    from tp_kernels.ops.kernels.launch import recording

    q = torch.empty(1, 2, 32, 64, dtype=torch.bfloat16, device="meta")
    for info, tma in ((H100, True), (A100, False)):
        with pretend(info), recording() as launches:
            ops.flash_attention(q, q, q, sliding_window=3)
        assert [launch.options["TMA"] for launch in launches] == [tma]


# GPU ------------------------------------------------------------------------------------------------------------------


# Every combination is compiled anew, so they are few: the lengths bring their own number of heads a group.
SIZES = [(1, 1, 1), (7, 7, 4), (129, 129, 8), (1000, 1000, 4), (129, 1000, 8), (1000, 129, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("length", "kv_length", "group"), SIZES)
def test_gpu_values(length, kv_length, group, dim, device, generator):
    q = make(generator, 2, 8, length, dim, torch.bfloat16)
    k, v = (make(generator, 2, 8 // group, kv_length, dim, torch.bfloat16) for _ in range(2))
    for causal, window in ((True, None), (False, None), (True, 100)):
        check_forward(q, k, v, causal, window, None)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 512])
def test_gpu_llama(half, window, device, generator):
    """Llama-3-8B at tp=2; one dtype with every candidate."""
    q = make(generator, 1, 16, 2048, 128, half)
    k, v = (make(generator, 1, 4, 2048, 128, half) for _ in range(2))
    found = kernels.candidates(gpu_of(q), half, 128, 2048, 2048)
    for config in found if half == torch.bfloat16 and window is None else found[:1]:
        check_forward(q, k, v, True, window, config)


@pytest.mark.gpu
def test_gpu_same_bits(device, generator):
    q = make(generator, 1, 8, 777, 128, torch.bfloat16)
    once, twice = (ops.flash_attention(q, q, q, sliding_window=300) for _ in range(2))
    assert torch.equal(once, twice)


@pytest.mark.gpu
def test_gpu_layouts_and_large_offsets(device, generator):
    """Views of one projection, odd addresses, and rows whose offsets do not fit into 32 bits."""
    qkv = torch.randn(2, 300, 48, 128, generator=generator, device=device).bfloat16()
    q, k, v = (x.transpose(1, 2) for x in qkv.split((32, 8, 8), dim=2))
    check_forward(q, k, v, True, None, None)
    odd = [make(generator, 2, h, 300, 128, torch.bfloat16, "odd") for h in (4, 2, 2)]
    check_forward(*odd, True, 77, None)
    # 5 GB, of which rows at steps of 2^23 are used
    part = torch.zeros(300 << 23, dtype=torch.float16, device=device).as_strided(
        (1, 2, 300, 64), (300 << 23, 1 << 22, 1 << 23, 1)
    )
    part.copy_(torch.randn(part.shape, generator=generator, device=device))
    check_forward(part, part, part, True, None, None)
    check_forward(part, part, part, True, None, kernels.Config(64, 64, 4, 2, tma=False))


@pytest.mark.gpu
def test_gpu_varlen(device, generator):
    lengths, kv_lengths = [1, 700, 0, 129, 64, 3], [900, 700, 5, 0, 64, 130]
    q, cu_q = packed(generator, lengths, 8, 128, torch.bfloat16, spare=40)
    k, cu_k = packed(generator, kv_lengths, 2, 128, torch.bfloat16)
    cu = (cu_q, cu_k, 700, 900)
    for causal, window in ((True, None), (False, None), (True, 50)):
        options = {"causal": causal, "sliding_window": window, "return_lse": True}
        out, lse = ops.flash_attention_varlen(q, k, k, *cu, **options)
        exact, exact_lse = ops.flash_attention_varlen_reference(q.double(), k.double(), k.double(), *cu, **options)
        plain = in_dtype_varlen(q[:-40], k, k, lengths, kv_lengths, causal, window)
        assert_close_to_reference(out[:-40], plain, exact[:-40])
        torch.testing.assert_close(lse.double(), exact_lse, atol=2e-4, rtol=1e-5)
        assert not out[-40:].any()


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_small(dim, tma, device, generator):
    q, k, v = (make(generator, 1, h, 150, dim, torch.bfloat16) for h in (2, 1, 1))
    config = kernels.default_config(H100, torch.bfloat16, dim, 150, 150)._replace(tma=tma, num_stages=2)
    check_forward(q, k, v, True, None, config)
    check_forward(q, k, v, True, 40, config)


@pytest.mark.gpu
def test_gpu_graph_capture(device, generator):
    q, k, v = (make(generator, 1, h, 260, 128, torch.bfloat16) for h in (4, 2, 2))
    expected = ops.flash_attention(q, k, v, sliding_window=64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.flash_attention(q, k, v, sliding_window=64)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
