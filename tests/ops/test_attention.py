"""Attention, decode attention and the QKV step against fp64, PyTorch and Hugging Face. Tier: no device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels.testing.numeric import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "length", "kv_length"), [(6, 2, 7, 7), (3, 3, 4, 9), (5, 1, 1, 6)])
def test_attention(heads, kv_heads, length, kv_length, window, causal):
    q, k, v = (
        make(2, heads, length, 8),
        make(2, kv_heads, kv_length, 8, seed=1),
        make(2, kv_heads, kv_length, 8, seed=2),
    )
    options = {"causal": causal, "sliding_window": window}
    exact = ops.attention_reference(q.double(), k.double(), v.double(), **options)
    actual, plain = ops.attention(q, k, v, **options), ops.attention_reference(q, k, v, **options)
    assert_close_to_reference(actual, plain, exact, factor=3.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
def test_packed_attention(window, causal):
    """Sequences as on the diagonal, before cached keys, without queries, without keys, with more queries than keys."""
    lengths, kv_lengths = (4, 2, 0, 3, 5), (4, 7, 3, 0, 2)
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(extents).cumsum(0)], dtype=torch.int32) for extents in (lengths, kv_lengths)
    )
    total, keys = sum(lengths) + 2, sum(kv_lengths)  # two rows of no sequence
    inputs = make(total, 6, 8), make(keys, 2, 8, seed=1), make(keys, 2, 8, seed=2)
    options = {"causal": causal, "sliding_window": window}
    results = []
    for dtype, function in (
        (torch.float32, ops.flash_attention_varlen),
        (torch.float64, ops.flash_attention_varlen_reference),
    ):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out = function(q, k, v, cu_q, cu_k, 5, 7, **options)
        out = out[0] if isinstance(out, tuple) else out
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    assert not results[0][0][-2:].any() and not results[0][0][6:9].any()


def test_attention_masks():
    q, k, v = make(2, 4, 5, 8), make(2, 2, 5, 8, seed=1), make(2, 2, 5, 8, seed=2)
    keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep[1, :, :, 1] = False
    added = torch.zeros(2, 1, 5, 5).masked_fill(~keep, float("-inf"))
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=keep & torch.ones(5, 5, dtype=torch.bool).tril(), scale=0.3, enable_gqa=True
    )
    for mask in (keep, added):
        torch.testing.assert_close(ops.attention(q, k, v, mask=mask, scale=0.3), expected)
        torch.testing.assert_close(ops.attention_reference(q, k, v, mask=mask, scale=0.3), expected)


def test_attention_is_hugging_faces_and_differentiable():
    from types import SimpleNamespace

    from transformers.models.llama.modeling_llama import eager_attention_forward

    q, k, v = (make(2, h, 6, 8, seed=h).requires_grad_() for h in (4, 2, 2))
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    expected, _ = eager_attention_forward(module, q, k, v, mask, scaling=8**-0.5)
    actual = ops.attention(q, k, v)
    torch.testing.assert_close(actual.transpose(1, 2), expected)
    upstream = make(2, 4, 6, 8, seed=9)
    mine = torch.autograd.grad((actual * upstream).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected.transpose(1, 2) * upstream).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def decode_case(batch, heads, kv_heads, tokens, dim, max_len, dtype, lengths=None):
    q = make(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    k, v = (make(batch, kv_heads, max_len, dim, dtype=dtype, seed=s) for s in (1, 2))
    if lengths is None:
        lengths = [(37 * row + 11) % (max_len - tokens + 1) for row in range(batch)]
    lengths = torch.tensor(lengths)
    for row, length in enumerate(lengths.tolist()):
        # What lies behind a row's end is not initialised in real life.
        k[row, :, length + tokens :] = float("nan")
        v[row, :, length + tokens :] = float("nan")
    return q, k, v, lengths


# Segments are 256 positions: one, a boundary, several; head dims off multiples of 16; groups of 1 to 7 heads.
DECODE = [
    (1, 9, 3, 1, 64, 40, None),
    (3, 4, 2, 1, 8, 30, None),
    (2, 7, 1, 2, 20, 300, [255, 254]),
    (1, 5, 1, 1, 64, 1100, [1099]),
    (2, 6, 6, 3, 96, 600, [512, 0]),
    (1, 2, 1, 1, 256, 270, [256]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 260])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_attention(case, window, dtype):
    *sizes, lengths = case
    q, k, v, lengths = decode_case(*sizes, dtype, lengths)
    assert ops.explain("decode_attention", q, k, v, lengths).name == "native-cpu"
    exact = ops.decode_attention_reference(q.double(), k.double(), v.double(), lengths, sliding_window=window)
    plain = ops.decode_attention_reference(q, k, v, lengths, sliding_window=window)
    actual = ops.decode_attention(q, k, v, lengths, sliding_window=window)
    assert actual.transpose(1, 2).is_contiguous()
    assert_close_to_reference(actual, plain, exact, name="decode_attention")


@pytest.mark.parametrize("lengths", [[0, 0], [3, 40], [10, 10]])
@pytest.mark.parametrize("window", [None, 7])
def test_decode_attention_of_a_chunk(lengths, window):
    """Many new tokens at once go through PyTorch's kernels, with the same meaning."""
    q, k, v, lengths = decode_case(2, 6, 2, 50, 16, 100, torch.float32, lengths)
    assert ops.explain("decode_attention", q, k, v, lengths).name == "torch"
    actual = ops.decode_attention(q, k, v, lengths, sliding_window=window)
    exact = ops.decode_attention_reference(q.double(), k.double(), v.double(), lengths, sliding_window=window)
    plain = ops.decode_attention_reference(q, k, v, lengths, sliding_window=window)
    assert_close_to_reference(actual, plain, exact, factor=3.0)


def test_decode_attention_equals_attention_without_a_cache():
    q, k, v, _ = decode_case(1, 4, 2, 5, 16, 5, torch.float32, [0])
    whole = ops.attention(q, k, v, sliding_window=3)
    for token in range(5):
        step = ops.decode_attention(q[:, :, token : token + 1], k, v, torch.tensor([token]), sliding_window=3)
        torch.testing.assert_close(step, whole[:, :, token : token + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_attention_same_bits_for_any_threads_and_neighbours(dtype):
    q, k, v, lengths = decode_case(3, 6, 2, 2, 64, 1500, dtype, [1400, 3, 700])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.decode_attention(q, k, v, lengths)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.decode_attention(q, k, v, lengths), one)
    finally:
        torch.set_num_threads(before)
    for row in range(3):
        rows = slice(row, row + 1)
        assert torch.equal(ops.decode_attention(q[rows], k[rows], v[rows], lengths[rows]), one[rows])
    # KV heads on different ranks: each rank has a part of the heads.
    part = ops.decode_attention(q[:, 3:], k[:, 1:], v[:, 1:], lengths)
    assert torch.equal(part, one[:, 3:])


def test_decode_attention_special_values():
    q, k, v, lengths = decode_case(1, 2, 1, 1, 16, 20, torch.float32, [9])
    k[0, 0, 4] = float("nan")
    assert ops.decode_attention(q, k, v, lengths).isnan().all()
    q, k, v, lengths = decode_case(1, 2, 1, 1, 16, 600, torch.float32, [500])
    q.zero_()
    q[..., 0] = 1
    k[0, 0, :300, 0] = float("-inf")  # a whole segment that weighs nothing
    expected = ops.decode_attention_reference(q, k, v, lengths)
    torch.testing.assert_close(ops.decode_attention(q, k, v, lengths), expected)
    k[0, 0, 0, 0] = float("inf")
    assert ops.decode_attention(q, k, v, lengths).isnan().all()


def test_decode_attention_errors_and_empty():
    q, k, v, lengths = decode_case(2, 4, 2, 1, 16, 20, torch.float32)
    for bad in (torch.tensor([0, 20]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="cache of 20"):
            ops.decode_attention(q, k, v, bad)
        with pytest.raises(ValueError, match="cache of 20"):
            ops.decode_attention(q.double(), k.double(), v.double(), bad)
    with pytest.raises(ValueError, match="int64 lengths"):
        ops.decode_attention(q, k, v, lengths.int())
    with pytest.raises(ValueError, match="multiple of Hkv"):
        ops.decode_attention(q[:, :3], k, v, lengths)
    with pytest.raises(ValueError, match="sliding_window"):
        ops.decode_attention(q, k, v, lengths, sliding_window=0)
    with pytest.raises(ValueError, match="no gradient"):
        ops.decode_attention(q.clone().requires_grad_(), k, v, lengths)
    assert ops.decode_attention(q[:0], k[:0], v[:0], lengths[:0]).shape == (0, 4, 1, 16)
    assert ops.decode_attention(q[:, :, :0], k, v, lengths).shape == (2, 4, 0, 16)
    wide = torch.randn(1, 1, 1, 300)
    assert torch.equal(ops.decode_attention(wide, wide, wide, torch.tensor([0])), wide)


def qkv_case(batch, heads, kv_heads, tokens, dim, dtype, max_len=24):
    qkv = make(batch, tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = torch.arange(40)[:, None] / 10 ** torch.linspace(0, 2, dim // 2)
    angles = torch.cat((angles, angles), -1)
    k_cache, v_cache = (torch.full((batch, kv_heads, max_len, dim), 7.0, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([(5 * row) % (max_len - tokens) for row in range(batch)])
    return qkv, angles.cos(), angles.sin(), lengths, k_cache, v_cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "tokens", "dim"), [(1, 9, 3, 1, 64), (3, 4, 1, 5, 20), (2, 1, 1, 2, 6)]
)
@pytest.mark.parametrize("positions", [None, "row", "each"])
def test_qkv_rope_cache(batch, heads, kv_heads, tokens, dim, with_norm, positions, dtype):
    qkv, cos, sin, lengths, k_cache, v_cache = qkv_case(batch, heads, kv_heads, tokens, dim, dtype)
    norms = [make(dim, dtype=dtype, seed=s).abs() if with_norm else None for s in (4, 5)]
    where = None
    if positions is not None:
        where = torch.arange(tokens) * 3 + (torch.arange(batch)[:, None] if positions == "each" else 0)
    rest = (heads, kv_heads, *norms, 1e-5, where)
    assert ops.explain("qkv_rope_cache", qkv, cos, sin, lengths, k_cache, v_cache, *rest).name == "native-cpu"

    def run(function, as_dtype):
        def convert(t):
            return None if t is None else t.to(as_dtype)

        caches = [k_cache.to(as_dtype).clone(), v_cache.to(as_dtype).clone()]
        table = (cos, sin) if as_dtype != torch.float64 else (cos.double(), sin.double())
        q = function(convert(qkv), *table, lengths, *caches, heads, kv_heads, *map(convert, norms), 1e-5, where)
        return q, *caches

    actual = run(ops.qkv_rope_cache, dtype)
    plain = run(ops.qkv_rope_cache_reference, dtype)
    exact = run(ops.qkv_rope_cache_reference, torch.float64)
    assert actual[0].shape == (batch, heads, tokens, dim)
    for name, ours, theirs, right in zip("qk", actual, plain, exact, strict=False):
        assert_close_to_reference(ours, theirs, right, name=name)
    assert torch.equal(actual[2], plain[2])


def test_qkv_rope_cache_strided_cache_and_threads():
    """A cache that is a view of a larger one; a prompt large enough for several threads."""
    qkv, cos, sin, lengths, _, _ = qkv_case(2, 6, 2, 16, 32, torch.float32)
    cos, sin = cos[:24].contiguous(), sin[:24].contiguous()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            storage = torch.zeros(2, 24, 2, 2, 32)
            k_cache, v_cache = storage[:, :, 0].transpose(1, 2), storage[:, :, 1].transpose(1, 2)
            q = ops.qkv_rope_cache(qkv, cos, sin, lengths, k_cache, v_cache, 6, 2)
            results.append((q, storage))
    finally:
        torch.set_num_threads(before)
    for q, storage in results[1:]:
        assert torch.equal(q, results[0][0]) and torch.equal(storage, results[0][1])
    expected = torch.zeros(2, 24, 2, 2, 32)
    plain = ops.qkv_rope_cache_reference(
        qkv, cos, sin, lengths, expected[:, :, 0].transpose(1, 2), expected[:, :, 1].transpose(1, 2), 6, 2
    )
    torch.testing.assert_close(results[0][0], plain)
    torch.testing.assert_close(results[0][1], expected)


def test_qkv_rope_cache_errors():
    qkv, cos, sin, lengths, k_cache, v_cache = qkv_case(2, 4, 2, 3, 8, torch.float32)
    good = {"qkv": qkv, "cos": cos, "sin": sin, "lengths": lengths, "k_cache": k_cache, "v_cache": v_cache}
    good |= {"num_heads": 4, "num_kv_heads": 2}
    untouched = k_cache.clone()
    for change, words in (
        ({"lengths": torch.tensor([0, 22])}, "cache of 24"),
        ({"lengths": torch.tensor([0, -1])}, "cache of 24"),
        ({"lengths": lengths.int()}, "int64 lengths"),
        ({"positions": torch.tensor([0, 1, 40])}, "rotary table"),
        ({"positions": torch.tensor([0, 1])}, "positions"),
        ({"num_heads": 3}, "expected qkv"),
        ({"num_kv_heads": 0}, "at least one head"),
        ({"k_cache": k_cache[:, :1], "v_cache": v_cache[:, :1]}, "expected caches"),
        ({"cos": cos[:, :4], "sin": sin[:, :4]}, "cos and sin"),
        ({"q_norm": torch.ones(4)}, "q_norm"),
        ({"qkv": qkv.clone().requires_grad_()}, "no gradient"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.qkv_rope_cache(**{**good, **change})
        if "qkv" not in change:  # the plain path says no as well
            wide = {
                n: t.double() if n in ("qkv", "k_cache", "v_cache", "q_norm") else t
                for n, t in {**good, **change}.items()
            }
            with pytest.raises(ValueError, match=words):
                ops.qkv_rope_cache(**wide)
    assert torch.equal(k_cache, untouched)


def test_lengths_that_vary_are_compiled_once():
    def loss(x):
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return ops.attention(q, q, q).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 7, 1):
        x = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(length)).requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        (actual,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(actual, expected)
