"""``decode_attention`` over pages on the CPU. Tier: no device."""

from __future__ import annotations

import pytest
import torch

from tp_kernels import ops
from tp_kernels.testing.numeric import assert_close_to_reference

LENGTHS = [37, 0, 20]


def case(dtype, tokens, page_size, token_major, heads=6, kv_heads=2, dim=16, max_len=64):
    """q, a cache that is NaN behind the rows' ends, and the same in shuffled pages with their table."""
    generator = torch.Generator().manual_seed(3)
    batch, per_row = len(LENGTHS), max_len // page_size
    q = torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    lengths = torch.tensor(LENGTHS)
    order = torch.randperm(batch * per_row + 2, generator=generator)[: batch * per_row]
    table = order.view(batch, per_row).to(torch.int32)
    caches, pages = [], []
    for _ in range(2):
        cache = torch.randn(batch, kv_heads, max_len, dim, generator=generator).to(dtype)
        for row, length in enumerate(LENGTHS):
            cache[row, :, length + tokens :] = float("nan")
        shape = (page_size, kv_heads) if token_major else (kv_heads, page_size)
        pool = torch.full((len(order) + 2, *shape, dim), float("nan"), dtype=dtype)
        pool = pool.transpose(1, 2) if token_major else pool
        pool[table.long()] = cache.view(batch, kv_heads, per_row, page_size, dim).transpose(1, 2)
        caches.append(cache)
        pages.append(pool)
    for row, length in enumerate(LENGTHS):
        table[row, -(-(length + tokens) // page_size) :] = -7  # never looked at
    return q, caches, pages, table, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("tokens", [1, 3, 26])
@pytest.mark.parametrize(("page_size", "token_major"), [(1, True), (4, False), (16, True), (64, False)])
def test_pages_mean_the_same_as_one_cache(dtype, window, tokens, page_size, token_major):
    """Native kernel (up to 32 queries a KV head) and PyTorch's attention (26 tokens are 78)."""
    q, caches, pages, table, lengths = case(dtype, tokens, page_size, token_major)
    actual = ops.decode_attention(q, *pages, lengths, sliding_window=window, page_table=table)
    expected = ops.decode_attention(q, *caches, lengths, sliding_window=window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    exact = ops.decode_attention_reference(
        q.double(), *(c.double() for c in pages), lengths, sliding_window=window, page_table=table
    )
    plain = ops.decode_attention_reference(q, *caches, lengths, sliding_window=window)
    assert_close_to_reference(actual, plain, exact, factor=3.0)
    path = ops.explain("decode_attention", q, *pages, lengths, page_table=table)
    assert path.name == ("torch" if tokens == 26 else "native-cpu")


def test_op_opcheck_and_compile():
    q, _, pages, table, lengths = case(torch.float32, 1, 8, True)
    expected = ops.decode_attention(q, *pages, lengths, page_table=table)
    torch.library.opcheck(
        torch.ops.tp_kernels.decode_attention.default,
        (q, *(p.nan_to_num() for p in pages), lengths, None, None, table),
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, lengths, table):
        return ops.decode_attention(q, k, v, lengths, page_table=table)

    torch.testing.assert_close(step(q, *pages, lengths, table), expected, rtol=0, atol=0)


def test_errors_and_empty():
    q, (k, v), _, table, lengths = case(torch.float32, 1, 8, False)
    pages = torch.randn(30, 2, 8, 16)
    call = ops.decode_attention
    with pytest.raises(ValueError, match="int32 page_table"):
        call(q, pages, pages, lengths, page_table=table.long())
    with pytest.raises(ValueError, match="int32 page_table"):
        call(q, pages, pages, lengths, page_table=table[:2])
    with pytest.raises(ValueError, match="power of two"):
        call(q, pages[:, :, :6], pages[:, :, :6], lengths, page_table=table)
    with pytest.raises(ValueError, match="pages"):
        call(q, pages, pages[:, :1], lengths, page_table=table)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        call(q[:, :3], pages, pages, lengths, page_table=table)
    with pytest.raises(ValueError, match="cache of 64"):
        call(q, pages, pages, lengths + 40, page_table=table)
    with pytest.raises(ValueError, match="int64 lengths"):
        call(q, pages, pages, lengths.int(), page_table=table)
    table[0, 1] = 30
    with pytest.raises(ValueError, match=r"pages .* 30 of 30"):
        call(q, pages, pages, lengths, page_table=table)
    assert call(q[:0], pages, pages, lengths[:0], page_table=table[:0]).shape == (0, 6, 1, 16)
    assert call(q[:, :, :0], pages, pages, lengths, page_table=table).shape == (3, 6, 0, 16)
    assert call(q, k, v, lengths).shape == q.shape
