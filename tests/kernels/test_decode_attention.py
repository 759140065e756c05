"""Split-KV decode attention. Tiers: no device (Triton interpreter in fp32 and fp16), GPU (all dtypes, real shapes)."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tp_kernels import ops
from tp_kernels.ops._gpu import A100, H100, gpu_of, pretend
from tp_kernels.ops.decode_attention import choose_decode_attention
from tp_kernels.ops.kernels import decode_attention as kernels
from tp_kernels.ops.kernels.counters import take_counters
from tp_kernels.ops.kernels.decode_config import (
    MAX_ROWS,
    Config,
    candidates,
    capacity_of,
    default_config,
    shared_bytes,
    splits_for,
)
from tp_kernels.ops.tuning import forget_tables
from tp_kernels.testing.numeric import assert_close_to_reference

TINY = Config(block_n=16)


def make_case(generator, dtype, *, lengths, tokens=1, kv_heads=1, group=1, dim=16, max_len=64, cache_dtype=None):
    """q in the layer's memory order, caches that are NaN wherever no row may look, lengths."""
    device = generator.device
    batch = len(lengths)
    q = torch.randn(batch, tokens, kv_heads * group, dim, generator=generator, device=device).to(dtype).transpose(1, 2)
    caches = [
        torch.randn(batch, kv_heads, max_len, dim, generator=generator, device=device).to(cache_dtype or dtype)
        for _ in range(2)
    ]
    for row, length in enumerate(lengths):
        for cache in caches:
            cache[row, :, length + tokens :] = float("nan")
    return q, *caches, torch.tensor(lengths, device=device)


def paged(generator, cache, lengths, tokens, page_size, token_major=False):
    """The same cache in shuffled pages, with pages to spare, and its table; NaN and nonsense where nothing is."""
    batch, heads, max_len, dim = cache[0].shape
    device = cache[0].device
    per_row = max_len // page_size
    order = torch.randperm(batch * per_row + 3, generator=torch.Generator().manual_seed(5))[: batch * per_row]
    table = order.view(batch, per_row).to(device=device, dtype=torch.int32)
    shape = (len(order) + 3, page_size, heads, dim) if token_major else (len(order) + 3, heads, page_size, dim)
    pages = []
    for each in cache:
        pool = torch.full(shape, float("nan"), dtype=each.dtype, device=device)
        pool = pool.transpose(1, 2) if token_major else pool
        pool[table.long()] = each.view(batch, heads, per_row, page_size, dim).transpose(1, 2)
        pages.append(pool)
    for row, length in enumerate(lengths.tolist()):
        table[row, -(-(length + tokens) // page_size) :] = -1_000_000_000
    return *pages, table


def check(actual, q, k, v, lengths, window=None, scale=None):
    exact = ops.decode_attention_reference(
        q.double(), k.double(), v.double(), lengths, sliding_window=window, scale=scale
    )
    plain = ops.decode_attention_reference(q, k.to(q.dtype), v.to(q.dtype), lengths, sliding_window=window, scale=scale)
    assert actual.transpose(1, 2).is_contiguous()
    # fp32 is for tests only: on a GPU its exp2 is the approximate instruction, PyTorch's exponential is exact.
    factor = 8.0 if q.dtype == torch.float32 and q.is_cuda else 2.0
    assert_close_to_reference(actual, plain, exact, factor, name="decode_attention")


# tokens, KV heads, group, head_dim, lengths, window, splits, page size (0: none), token-major pages, combine
CASES = [
    (1, 2, 4, 16, [37, 0, 5], None, 3, 0, False, "kernel"),
    (1, 2, 4, 16, [37, 0, 5], None, 3, 0, False, "last"),
    (1, 1, 1, 64, [63], None, 1, 0, False, "kernel"),
    (1, 1, 3, 80, [47, 20], None, 7, 0, False, "last"),
    (1, 1, 3, 20, [40, 16], 9, 2, 0, False, "kernel"),
    (3, 2, 3, 24, [31, 15], None, 2, 0, False, "kernel"),
    (8, 1, 1, 16, [40, 3], 5, 4, 0, False, "last"),
    (8, 1, 3, 16, [55, 9], 20, 1, 0, False, "kernel"),
    (5, 1, 8, 16, [21], None, 3, 0, False, "last"),
    (1, 2, 1, 16, [45, 2], None, 2, 16, False, "kernel"),
    (1, 2, 3, 16, [45, 2], 17, 2, 4, True, "last"),
    (2, 1, 4, 32, [61, 30], None, 3, 32, True, "kernel"),
    (1, 1, 2, 16, [33, 62], None, 9, 1, False, "kernel"),
    (4, 2, 1, 16, [60, 0], 1, 2, 64, True, "last"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(generator, dtype, case):
    tokens, kv_heads, group, dim, lengths, window, splits, page_size, token_major, combine = case
    q, k, v, lengths = make_case(
        generator, dtype, lengths=lengths, tokens=tokens, kv_heads=kv_heads, group=group, dim=dim
    )
    config, table, caches = TINY._replace(combine=combine), None, (k, v)
    if page_size:
        *caches, table = paged(generator, (k, v), lengths, tokens, page_size, token_major)
        if window is not None:  # pages that no query sees any more may have been given back
            for row, length in enumerate(lengths.tolist()):
                table[row, : max(length + 1 - window, 0) // page_size] = -1_000_000_000
    scale = 0.3
    actual = kernels.decode_attention(q, *caches, lengths, scale, window, table, config, splits)
    check(actual, q, k, v, lengths, window, scale)


def test_strides_that_are_not_multiples_of_anything(generator, dtype):
    q, k, v, lengths = make_case(generator, dtype, lengths=[37, 11], kv_heads=2, group=2, dim=9)
    pad = [torch.full((2, 2, 65, 13), 3.0, dtype=dtype, device=k.device) for _ in range(2)]
    for whole, part in zip(pad, (k, v), strict=True):
        whole[:, :, 1:, 2:11] = part
    wide = torch.zeros(2, 4, 3, 17, dtype=dtype, device=q.device)
    wide[:, :, 1:2, 5:14] = q
    sliced = [whole[:, :, 1:, 2:11] for whole in pad]
    actual = kernels.decode_attention(wide[:, :, 1:2, 5:14], *sliced, lengths, 0.5, None, None, TINY, 2)
    check(actual, q, k, v, lengths, None, 0.5)
    # Heads of a wider cache, as another rank would have them.
    part = kernels.decode_attention(q[:, 2:], k[:, 1:], v[:, 1:], lengths, 0.5, None, None, TINY, 2)
    check(part, q[:, 2:], k[:, 1:], v[:, 1:], lengths, None, 0.5)


def test_special_values(generator, device, dtype):
    """NaN and infinities of the cache reach the result as in PyTorch; a share that weighs nothing does not."""
    q = torch.zeros(1, 1, 1, 16, dtype=dtype, device=device)
    q[..., 0] = 1
    k, v = (torch.randn(1, 1, 64, 16, generator=generator, device=device).to(dtype) for _ in range(2))
    lengths = torch.tensor([50], device=device)
    for combine in ("kernel", "last"):
        config = TINY._replace(combine=combine)
        hidden = k.clone()
        hidden[0, 0, :32, 0] = float("-inf")  # the first two blocks
        check(
            kernels.decode_attention(q, hidden, v, lengths, 1.0, None, None, config, 4),
            q,
            hidden,
            v,
            lengths,
            None,
            1.0,
        )
        for bad in (float("nan"), float("inf")):
            broken = k.clone()
            broken[0, 0, 3, 0] = bad
            assert kernels.decode_attention(q, broken, v, lengths, 1.0, None, None, config, 4).isnan().all()


def test_counters_are_left_at_zero(generator, monkeypatch):
    q, k, v, lengths = make_case(generator, torch.float16, lengths=[60, 1, 17])
    counters = take_counters(q, 6)
    monkeypatch.setattr(kernels, "take_counters", lambda x, count: counters)
    for _ in range(2):
        actual = kernels.decode_attention(q, k, v, lengths, 0.25, None, None, TINY._replace(combine="last"), 4)
        assert not counters.any()
        check(actual, q, k, v, lengths, None, 0.25)


def test_who_shares_counters(monkeypatch):
    """Launches of a stream share; captured ones never do, and zero their own when none are left."""
    stream, capturing = [7], [False]
    x = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), get_device=lambda: 99)
    current = lambda index: SimpleNamespace(cuda_stream=stream[0], synchronize=lambda: None)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    capturing[0] = True
    taken = [take_counters(x, 5)]  # a capture without a warm-up
    assert taken[0].numel() == 5
    capturing[0] = False
    taken.append(take_counters(x, 5))
    assert take_counters(x, 50).data_ptr() == taken[1].data_ptr()
    taken.append(take_counters(x, 5000))
    assert take_counters(x, 3).data_ptr() == taken[2].data_ptr()
    stream[0] = 8
    taken.append(take_counters(x, 5))
    capturing[0] = True
    taken += [take_counters(x, count) for count in (33, 1, 1 << 18)]
    assert [t.numel() for t in taken[4:]] == [64, 32, 1 << 18]
    assert len({t.data_ptr() for t in taken}) == len(taken) and not any(t.any() for t in taken)


def test_any_split_count_means_the_same(generator):
    q, k, v, lengths = make_case(generator, torch.float32, lengths=[60, 0])
    for splits in (1, 3, 100):
        check(kernels.decode_attention(q, k, v, lengths, 0.25, None, None, TINY, splits), q, k, v, lengths, None, 0.25)


# The public op ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [0, 16])
def test_public_op_takes_the_kernel(generator, monkeypatch, page_size):
    q, k, v, lengths = make_case(generator, torch.float16, lengths=[40, 7], kv_heads=1, group=2)
    caches, table = (k, v), None
    if page_size:
        *caches, table = paged(generator, (k, v), lengths, 1, page_size, token_major=True)
    choice = choose_decode_attention(q, *caches, lengths, page_table=table)
    assert choice.path == "triton" and choice.reason
    calls = []
    real = kernels.decode_attention
    monkeypatch.setattr(kernels, "decode_attention", lambda *a: (calls.append(a), real(*a))[1])
    actual = ops.decode_attention(q, *caches, lengths, sliding_window=30, page_table=table)
    assert len(calls) == 1
    check(actual, q, k, v, lengths, 30)
    if page_size:
        through = torch.ops.tp_kernels.decode_attention(q, *caches, lengths, None, 30, table)
        assert torch.equal(through, actual) and through.stride() == actual.stride()


def test_a_table_decides(generator, monkeypatch, tmp_path):
    """Measured shapes take the measured path and configuration, the same in ``choose`` and in the op."""
    q, k, v, lengths = make_case(generator, torch.float16, lengths=[40, 7], group=2)
    sizes = {"b": 2, "hkv": 1, "rows": 2, "d": 16, "s": 64, "page": 0}
    config = Config(block_n=16, ctas_per_sm=2, combine="last")
    rows = [
        {"dtype": "16bit", "sizes": sizes, "path": "triton", "config": config._asdict(), "us": {"triton": 1.0}},
        {"dtype": "16bit", "sizes": {**sizes, "d": 256}, "path": "torch", "config": {}, "us": {"torch": 1.0}},
    ]
    info = gpu_of(q)
    content = {"gpu": info.name, "measured": "2026-01-01", "versions": {}, "ops": {"decode_attention": rows}}
    (tmp_path / f"{info.slug}.json").write_text(json.dumps(content))
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    forget_tables()
    try:
        calls = []
        real = kernels.decode_attention
        monkeypatch.setattr(kernels, "decode_attention", lambda *a: (calls.append(a[-1]), real(*a))[1])
        choice = choose_decode_attention(q, k, v, lengths)
        assert choice.path == "triton" and Config(**choice.config) == config and "1.0 us" in choice.reason
        check(ops.decode_attention(q, k, v, lengths), q, k, v, lengths)
        assert calls == [config]
        wide = make_case(generator, torch.float16, lengths=[40, 7], group=2, dim=200)
        assert choose_decode_attention(*wide).path == "torch"
        ops.decode_attention(*wide)
        assert calls == [config]
    finally:
        monkeypatch.undo()
        forget_tables()


def test_public_op_leaves_the_rest_to_pytorch(generator):
    def choice(q, k, v, lengths, **options):
        actual = ops.decode_attention(q, k, v, lengths, **options)
        if "page_table" not in options:
            exact = ops.decode_attention_reference(q.double(), k.double(), v.double(), lengths)
            plain = ops.decode_attention_reference(q, k.to(q.dtype), v.to(q.dtype), lengths)
            assert_close_to_reference(actual, plain, exact, factor=3.0)
        return choose_decode_attention(q, k, v, lengths, **options)

    half = torch.float16
    chunk = make_case(generator, half, lengths=[5, 0], tokens=9, group=8, max_len=16)
    assert choice(*chunk).path == "torch" and "72 queries" in choice(*chunk).reason
    *pages, table = paged(generator, chunk[1:3], chunk[3], 9, 8)
    assert choice(chunk[0], *pages, chunk[3], page_table=table).path == "torch"
    torch.testing.assert_close(
        ops.decode_attention(chunk[0], *pages, chunk[3], page_table=table),
        ops.decode_attention(*chunk),
        rtol=2e-3,  # PyTorch's kernels may differ with the layout
        atol=2e-3,
    )
    assert "16-bit" in choice(*make_case(generator, torch.float32, lengths=[5])).reason
    assert "head_dim 257" in choice(*make_case(generator, half, lengths=[5], dim=257)).reason
    q, k, v, lengths = make_case(generator, half, lengths=[5])
    assert "dense" in choice(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, lengths).reason


def test_cache_of_another_dtype_and_autocast(generator, device):
    q, k, v, lengths = make_case(generator, torch.float32, lengths=[20, 3], cache_dtype=torch.float16)
    other = torch.bfloat16 if device == "cuda" else torch.float16
    with torch.autocast(device, dtype=other):
        assert choose_decode_attention(q, k, v, lengths).path == "triton"
        actual = ops.decode_attention(q, k, v, lengths)
    assert actual.dtype == other
    check(actual, q.to(other), k, v, lengths)
    # fp32 caches under autocast: PyTorch's attention, in the same dtype.
    with torch.autocast(device, dtype=other):
        assert choose_decode_attention(q, k.float(), v.float(), lengths).path == "torch"
        assert ops.decode_attention(q, k.float(), v.float(), lengths).dtype == other


def test_empty_and_errors(generator, device):
    q, k, v, lengths = make_case(generator, torch.float16, lengths=[20, 3], kv_heads=2, group=2)
    assert ops.decode_attention(q[:0], k[:0], v[:0], lengths[:0]).shape == (0, 4, 1, 16)
    assert ops.decode_attention(q[:, :, :0], k, v, lengths).shape == (2, 4, 0, 16)
    table = torch.zeros(2, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="int32 page_table"):
        ops.decode_attention(q, k, v, lengths, page_table=table.long())
    with pytest.raises(ValueError, match="int32 page_table"):
        ops.decode_attention(q, k, v, lengths, page_table=table[:1])
    with pytest.raises(ValueError, match="power of two"):
        ops.decode_attention(q, k[:, :, :12], v[:, :, :12], lengths, page_table=table)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        ops.decode_attention(q[:, :3], k, v, lengths, page_table=table)
    with pytest.raises(ValueError, match="no gradient"):
        ops.decode_attention(q.clone().requires_grad_(), k, v, lengths)


@pytest.mark.parametrize("page_size", [0, 8])
def test_opcheck_and_compile(generator, page_size):
    q, k, v, lengths = make_case(generator, torch.float16, lengths=[20, 3], group=2, max_len=32)
    caches, table = (k.nan_to_num(), v.nan_to_num()), None
    if page_size:
        *caches, table = paged(generator, caches, lengths, 1, page_size)
    arguments = (q, *caches, lengths, None, 9, table)
    torch.library.opcheck(torch.ops.tp_kernels.decode_attention.default, arguments)

    def step(q, k, v, lengths, table):
        out = ops.decode_attention(q * 2, k, v, lengths, sliding_window=9, page_table=table)
        return out.transpose(1, 2).reshape(2, 1, 32) + 1

    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, *caches, lengths, table), step(q, *caches, lengths, table))
        with torch.autocast(q.device.type, dtype=torch.float16):
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(
                compiled(q.float(), *caches, lengths, table), step(q.float(), *caches, lengths, table)
            )


# Choices -----------------------------------------------------------------------------------------------------------


def test_splits():
    config = Config()
    assert splits_for(config, H100, 8, 8192) == 16
    assert splits_for(config._replace(ctas_per_sm=2), H100, 8, 8192) == 33
    assert splits_for(config, H100, 16 * 8, 4096) == 1
    assert splits_for(config, H100, 64 * 8, 4096) == 1
    assert splits_for(config, H100, 1, 8192) == 64  # two blocks of 64 each
    assert splits_for(config._replace(min_blocks=1), H100, 1, 8192) == 128
    assert splits_for(config, H100, 1, 1 << 20) == 128
    assert splits_for(config, H100, 8, 100) == splits_for(config, H100, 0, 0) == 1
    assert splits_for(config, replace(H100, num_sms=32), 8, 8192) == 4
    assert capacity_of(8192, 4, None) == 8192 and capacity_of(8192, 4, 100) == 103 and capacity_of(64, 1, 100) == 64


@pytest.mark.parametrize("info", [H100, A100], ids=lambda info: info.slug)
def test_configurations_fit(info):
    for rows in (1, 4, 8, 32, MAX_ROWS):
        for dim in (64, 80, 96, 128, 256):
            default = default_config(info, torch.bfloat16, rows, dim)
            assert shared_bytes(default, info, rows, dim, 2) <= info.max_shared
            found = candidates(info, torch.bfloat16, rows, dim, 8, 8192)
            assert default in found and len(set(found)) == len(found) <= 12
            for config in found:
                assert Config(**config._asdict()) == config
                assert shared_bytes(config, info, rows, dim, 2) <= info.max_shared
            # Where nothing is split, how it would be merged is no difference.
            assert {c.combine for c in candidates(info, torch.bfloat16, rows, dim, 4096, 8192)} == {"kernel"}


# GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "group", "page_size", "combine"),
    [(1, 4, 0, "kernel"), (1, 4, 16, "last"), (8, 4, 64, "kernel"), (8, 8, 0, "last"), (8, 8, 16, "kernel")],
)
def test_small_on_gpu(generator, dtype, tokens, group, page_size, combine):
    """Packed into 16, 32 and 64 rows; the last are multiplied by wgmma on Hopper."""
    q, k, v, lengths = make_case(
        generator, dtype, lengths=[200, 0, 247], tokens=tokens, kv_heads=2, group=group, dim=128, max_len=256
    )
    caches, table = (k, v), None
    if page_size:
        *caches, table = paged(generator, (k, v), lengths, tokens, page_size, token_major=True)
    config = default_config(gpu_of(q), dtype, tokens * group, 128)._replace(combine=combine)
    actual = kernels.decode_attention(q, *caches, lengths, 0.1, None, table, config, 4)
    check(actual, q, k, v, lengths, None, 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "longest", "dim", "page_size", "window"),
    [
        (1, 1024, 128, 0, None),
        (1, 8192, 128, 0, None),
        (1, 8192, 128, 16, None),
        (1, 32768, 128, 64, 4096),
        (16, 4096, 128, 0, None),
        (16, 4096, 64, 16, None),
        (64, 4096, 128, 128, None),
        (4, 2048, 256, 0, 700),
        (4, 2048, 96, 0, None),
    ],
)
def test_real_shapes_on_gpu(generator, dtype, batch, longest, dim, page_size, window):
    """Rows from empty to full, both merges; every candidate at B=1, S=8192 (each is a compilation)."""
    lengths = [(longest - 1) * (batch - row) // batch for row in range(batch)]
    if batch > 1:
        lengths[-1] = 0
    q, k, v, lengths = make_case(generator, dtype, lengths=lengths, kv_heads=8, group=4, dim=dim, max_len=longest)
    caches, table = (k, v), None
    if page_size:
        *caches, table = paged(generator, (k, v), lengths, 1, page_size, token_major=True)
    exact, plain = [], []
    for row in range(batch):  # one row at a time: fp64 copies of the whole cache would not fit
        one = (q[row : row + 1], k[row : row + 1], v[row : row + 1], lengths[row : row + 1])
        exact.append(ops.decode_attention_reference(*(t.double() for t in one[:3]), one[3], sliding_window=window))
        plain.append(ops.decode_attention_reference(*one, sliding_window=window))
    exact, plain = torch.cat(exact), torch.cat(plain)
    default = default_config(gpu_of(q), dtype, 4, dim)
    configs = [default, default._replace(combine="last", ctas_per_sm=4)]
    if longest == 8192 and dtype == torch.bfloat16:
        configs = candidates(gpu_of(q), dtype, 4, dim, batch * 8, capacity_of(longest, 1, window))
    for config in configs:
        actual = kernels.decode_attention(q, *caches, lengths, dim**-0.5, window, table, config)
        assert_close_to_reference(actual, plain, exact, name=str(config))
        assert torch.equal(actual, kernels.decode_attention(q, *caches, lengths, dim**-0.5, window, table, config))
    assert_close_to_reference(
        ops.decode_attention(q, *caches, lengths, sliding_window=window, page_table=table), plain, exact
    )


@pytest.mark.gpu
@pytest.mark.parametrize("combine", ["kernel", "last"])
def test_graph_with_other_lengths_at_each_replay(generator, combine):
    """Captured once, replayed with other lengths and in another stream, beside eager calls that use counters too."""
    q, k, v, lengths = make_case(
        generator, torch.bfloat16, lengths=[4000, 17], kv_heads=8, group=4, dim=128, max_len=4096
    )
    k, v = (torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in (k, v))
    config = Config(combine=combine)

    def run():
        return kernels.decode_attention(q, k, v, lengths, 0.1, None, None, config, 8)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run() for _ in range(3)]
    side = torch.cuda.Stream()
    for new in ([4000, 17], [0, 4095], [63, 64], [1000, 999]):
        lengths.copy_(torch.tensor(new))
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            graph.replay()
        eager = [run() for _ in range(5)]
        torch.cuda.synchronize()
        for out in (*outputs, *eager):
            assert torch.equal(out, eager[0])
        check(eager[0], q, k, v, lengths, None, 0.1)


@pytest.mark.gpu
def test_counters_on_gpu():
    """Streams have their own, captured launches never share, and what a capture cannot get it zeroes itself."""
    x = torch.zeros(1, device="cuda")
    mine = take_counters(x, 10)
    assert take_counters(x, 20).data_ptr() == mine.data_ptr()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert take_counters(x, 10).data_ptr() != mine.data_ptr()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        first, second, huge = take_counters(x, 10), take_counters(x, 10), take_counters(x, 1 << 20)
        x.add_(1)
    assert len({t.data_ptr() for t in (mine, first, second, huge)}) == 4
    assert first.numel() >= 10 and huge.numel() == 1 << 20
    assert not first.any() and not second.any()


@pytest.mark.gpu
def test_compiled_by_inductor(generator):
    q, k, v, lengths = make_case(
        generator, torch.bfloat16, lengths=[900, 3], kv_heads=8, group=4, dim=128, max_len=1024
    )

    def step(q, k, v, lengths):
        return ops.decode_attention(q * 2, k, v, lengths).transpose(1, 2).reshape(2, 1, -1) + 1

    with torch.no_grad():
        expected = step(q, k, v, lengths)
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, k, v, lengths), expected)


def test_old_gpu_takes_the_kernel_without_early_launch(generator, old_device):
    q, k, v, lengths = make_case(generator, torch.float16, lengths=[40])
    if old_device == "cpu":
        with pretend(A100):
            assert choose_decode_attention(q, k, v, lengths).path == "triton"
    check(ops.decode_attention(q, k, v, lengths), q, k, v, lengths)
