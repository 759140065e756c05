"""``qkv_rope_cache`` on the CPU with pages, padding and a bias. Tier: no device."""

from __future__ import annotations

import pytest
import torch

from tp_kernels import ops
from tp_kernels.testing.numeric import assert_close_to_reference

HEADS, KV_HEADS, DIM, PAGE, MAX_PAGES = 6, 2, 16, 4, 5


def table(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (torch.arange(positions).unsqueeze(-1) * torch.linspace(1, 0.01, DIM // 2)).repeat(1, 2)
    return angles.cos(), angles.sin()


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, (HEADS + 2 * KV_HEADS) * DIM).to(dtype)
    lengths = torch.randint(0, PAGE * MAX_PAGES - tokens + 1, (batch,))
    return qkv, *table(PAGE * MAX_PAGES), lengths


def paged(batch: int, dtype: torch.dtype, token_major: bool):
    """Empty pages in shuffled order, more than are needed; and caches that are one piece a row."""
    pages = torch.randperm(batch * MAX_PAGES + 3)[: batch * MAX_PAGES].view(batch, MAX_PAGES).to(torch.int32)
    if token_major:
        caches = [
            torch.zeros(batch * MAX_PAGES + 3, PAGE, KV_HEADS, DIM, dtype=dtype).transpose(1, 2) for _ in range(2)
        ]
    else:
        caches = [torch.zeros(batch * MAX_PAGES + 3, KV_HEADS, PAGE, DIM, dtype=dtype) for _ in range(2)]
    whole = [torch.zeros(batch, KV_HEADS, MAX_PAGES * PAGE, DIM, dtype=dtype) for _ in range(2)]
    return pages, caches, whole


def gathered(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    return cache[pages.long()].transpose(1, 2).flatten(2, 3)  # [B, Hkv, MAX_PAGES * PAGE, D]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 11)])
def test_pages_hold_what_a_whole_cache_holds(batch, tokens, token_major, dtype):
    qkv, cos, sin, lengths = inputs(batch, tokens, dtype)
    pages, caches, whole = paged(batch, dtype, token_major)
    more = {"q_norm": torch.rand(DIM).to(dtype), "k_norm": torch.rand(DIM).to(dtype)}
    q = ops.qkv_rope_cache(qkv, cos, sin, lengths, *caches, HEADS, KV_HEADS, **more, page_table=pages)
    expected = ops.qkv_rope_cache_reference(qkv, cos, sin, lengths, *whole, HEADS, KV_HEADS, **more)
    assert torch.equal(q, expected)
    for cache, one in zip(caches, whole, strict=True):
        assert torch.equal(gathered(cache, pages), one)
        unused = sorted(set(range(len(cache))) - set(pages.flatten().tolist()))
        assert not cache[unused].any()


def test_padding_is_not_written():
    qkv, cos, sin, lengths = inputs(3, 7)
    new_tokens = torch.tensor([7, 0, 3])
    lengths[1] = MAX_PAGES * PAGE  # full, but nothing is added to it
    pages, caches, whole = paged(3, torch.float32, False)
    for cache in (*caches, *whole):
        cache.fill_(5.0)
    more = {"new_tokens": new_tokens.to(torch.int32)}
    q = ops.qkv_rope_cache(qkv, cos, sin, lengths, *whole, HEADS, KV_HEADS, **more)
    q_paged = ops.qkv_rope_cache(qkv, cos, sin, lengths, *caches, HEADS, KV_HEADS, page_table=pages, **more)
    assert torch.equal(q, q_paged) and q.isfinite().all()
    for b, count in enumerate(new_tokens.tolist()):
        start = int(lengths[b])
        if count:
            alone = [torch.full_like(cache[:1], 5.0) for cache in whole]
            one = ops.qkv_rope_cache(qkv[b : b + 1, :count], cos, sin, lengths[b : b + 1], *alone, HEADS, KV_HEADS)
            torch.testing.assert_close(q[b, :, :count], one[0])
            for cache, single in zip(whole, alone, strict=True):
                torch.testing.assert_close(cache[b], single[0])
        for cache in whole:
            untouched = torch.ones(MAX_PAGES * PAGE, dtype=torch.bool)
            untouched[start : start + count] = False
            assert (cache[b, :, untouched] == 5.0).all()
    for cache, one in zip(caches, whole, strict=True):
        assert torch.equal(gathered(cache, pages), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bias(dtype):
    qkv, cos, sin, lengths = inputs(2, 3, dtype)
    bias = torch.randn(qkv.shape[-1]).to(dtype)
    results = []
    for run, kind in (
        (ops.qkv_rope_cache, dtype),
        (ops.qkv_rope_cache_reference, dtype),
        (ops.qkv_rope_cache_reference, torch.float64),
    ):
        caches = [torch.zeros(2, KV_HEADS, MAX_PAGES * PAGE, DIM, dtype=kind) for _ in range(2)]
        tables = [x.to(torch.promote_types(kind, torch.float32)) for x in (cos, sin)]
        arguments = (qkv.to(kind), *tables, lengths, *caches, HEADS, KV_HEADS)
        q = run(*arguments, bias=bias.to(kind))
        results.append((q, *caches))
        if run is ops.qkv_rope_cache:
            assert ops.explain(run, *arguments, bias=bias).name == "native-cpu"
    for actual, plain, exact in zip(*results, strict=True):
        assert_close_to_reference(actual, plain, exact)


def test_tracing_sees_pages_and_padding():
    qkv, cos, sin, lengths = inputs(2, 3)
    pages, caches, _ = paged(2, torch.float32, True)
    bias, new_tokens = torch.randn(qkv.shape[-1]), torch.tensor([3, 1])
    arguments = (qkv, cos, sin, lengths, *caches, HEADS, KV_HEADS, None, None, 1e-6, None, bias, pages, new_tokens)
    torch.library.opcheck(torch.ops.tp_kernels.qkv_rope_cache.default, arguments)

    def step(k_cache, v_cache):
        more = {"bias": bias, "page_table": pages, "new_tokens": new_tokens}
        return ops.qkv_rope_cache(qkv, cos, sin, lengths, k_cache, v_cache, HEADS, KV_HEADS, **more) * 2

    with torch.no_grad():
        others = [cache.clone() for cache in caches]
        expected = step(*caches)
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*others), expected)
    for cache, other in zip(caches, others, strict=True):
        assert torch.equal(cache, other)


def test_errors_name_what_was_expected():
    qkv, cos, sin, lengths = inputs(2, 3)
    pages, caches, whole = paged(2, torch.float32, False)
    lengths = torch.tensor([0, 4])

    def call(cache=caches, **more):
        return ops.qkv_rope_cache(qkv, cos, sin, lengths, *cache, HEADS, KV_HEADS, **{"page_table": pages, **more})

    call()
    bad = pages.clone()
    bad[1, 1] = len(caches[0])
    for change, message in (
        ({"page_table": pages.long()}, r"int32 page_table \[2, max_pages\]"),
        ({"page_table": pages[:1]}, r"int32 page_table \[2, max_pages\]"),
        ({"page_table": pages[:, :1]}, "outside a cache of 4 positions"),
        ({"page_table": bad}, "the page table names pages"),
        ({"bias": torch.ones(3)}, r"expected a bias \[160\]"),
        ({"new_tokens": torch.tensor([1])}, r"integer new_tokens \[2\]"),
        ({"new_tokens": torch.tensor([1.0, 1.0])}, r"integer new_tokens \[2\]"),
        ({"new_tokens": torch.tensor([4, 1])}, r"new_tokens in \[0, 3\]"),
        ({"bias": torch.ones(160, requires_grad=True)}, "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)
    call(page_table=bad, new_tokens=torch.tensor([3, 0]))  # the bad page is not needed
    with pytest.raises(ValueError, match=r"paged caches \[pages, 2, page_size, 16\]"):
        call([cache[:, :1] for cache in caches])
    reason = ops.explain("qkv_rope_cache", qkv, cos, sin, lengths, *whole, HEADS, KV_HEADS, page_table=pages)
    assert reason.name == "torch" and "pages" in reason.reason
