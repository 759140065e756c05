"""Attention with a KV cache equals attention without one: prompts, ragged batches, windows. Tier: CPU ranks."""

from __future__ import annotations

import pytest
import torch

from tp_kernels.layers import (
    LayerKVCache,
    ParallelAttention,
    RotaryEmbedding,
    full_state_dict,
    load_full_state_dict,
)
from tp_kernels.testing.numeric import assert_close_to_reference

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MAX_LEN = 48, 9, 3, 16, 24
VARIANTS = {
    "plain": {},
    "window": dict(sliding_window=4),
    "qk_norm": dict(qk_norm=True, bias=True, o_bias=True),
    "no_rope": dict(rope=None, scale=0.3),
}


def attention(group, variant, dtype):
    options = {"rope": RotaryEmbedding(HEAD_DIM), **VARIANTS[variant]}
    layer = ParallelAttention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, group=group, dtype=dtype, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.linspace(-0.5, 0.5, HEAD_DIM))
    return layer


def new_cache(layer, batch, dtype):
    return LayerKVCache.allocate(batch, layer.num_kv_heads_local, MAX_LEN, HEAD_DIM, dtype=dtype)


def new_pages(layer, batch, dtype):
    """Pages of 4 tokens, dealt out in no order; the caches that padding is not written to."""
    pages = MAX_LEN // 4
    k, v = (torch.empty(batch * pages, layer.num_kv_heads_local, 4, HEAD_DIM, dtype=dtype) for _ in range(2))
    table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(batch)).view(batch, pages)
    counts = [torch.zeros(batch, dtype=torch.int64) for _ in range(2)]
    return LayerKVCache(k, v, counts[0], page_table=table.to(torch.int32), new_tokens=counts[1])


def decode_in_steps(layer, rows, steps, make=new_cache):
    """Feed rows of different lengths in right-padded chunks, steps[i][b] tokens of row b in pass i; outputs by row."""
    batch, dtype = len(rows), rows[0].dtype
    cache = make(layer, batch, dtype)
    cache.k.fill_(float("nan"))  # what was never written must never matter
    cache.v.fill_(float("nan"))
    outputs = [[] for _ in rows]
    for counts in steps:
        width = max(counts)
        x = torch.full((batch, width, HIDDEN), 3.0, dtype=dtype)
        for b, count in enumerate(counts):
            done = int(cache.lengths[b])
            x[b, :count] = rows[b][done : done + count]
        if cache.new_tokens is not None:
            cache.new_tokens.copy_(torch.tensor(counts))
        out = layer(x, cache=cache)
        for b, count in enumerate(counts):
            outputs[b].append(out[b, :count])
        cache.lengths += torch.tensor(counts)
    return [torch.cat(parts) for parts in outputs]


# Prompts of different lengths then single tokens; a second chunk into filled caches; one row only.
SCHEDULES = {
    "ragged": [(5, 2, 9), (1, 1, 1), (1, 1, 1), (1, 1, 1)],
    "chunks": [(4, 4, 4), (3, 1, 5), (1, 1, 1), (2, 2, 1)],
    "single": [(6,), (1,), (1,), (4,), (1,)],
    "token_by_token": [(1, 1)] * 7,
}


def check_equal_to_no_cache(group, dtype):
    for variant in VARIANTS:
        torch.manual_seed(1)
        layer = attention(group, variant, dtype)
        exact = attention(group, variant, torch.float64)
        load_full_state_dict(exact, {k: v.double() for k, v in full_state_dict(layer).items()})
        for name, steps in SCHEDULES.items():
            lengths = [sum(counts) for counts in zip(*steps, strict=True)]
            rows = [torch.randn(length, HIDDEN).to(dtype) for length in lengths]
            # While gradients are recorded every op is plain PyTorch: that is whose error counts.
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            plain, reference = layer(padded).detach(), exact(padded.double()).detach()
            with torch.inference_mode():
                caches = {"contiguous": decode_in_steps(layer, rows, steps)}
                if name != "token_by_token":
                    caches["paged"] = decode_in_steps(layer, rows, steps, new_pages)
            for kind, cached in caches.items():
                assert_close_to_reference(
                    torch.cat(cached),
                    torch.cat([out[:length] for out, length in zip(plain, lengths, strict=True)]),
                    torch.cat([out[:length] for out, length in zip(reference, lengths, strict=True)]),
                    name=f"{kind}, {variant}, {name}, {dtype}",
                )


def check_positions(group):
    """Rotation by explicit positions, for example counted from a later start, beyond the cache's own slots."""
    torch.manual_seed(2)
    layer = attention(group, "plain", torch.float32)
    x = torch.randn(2, 6, HIDDEN)
    for start in (0, 1000):
        positions = start + torch.arange(6).expand(2, 6)
        cache = new_cache(layer, 2, torch.float32)
        parts = []
        with torch.inference_mode():
            expected = layer(x)
            for piece in (slice(0, 4), slice(4, 5), slice(5, 6)):
                parts.append(layer(x[:, piece], positions=positions[:, piece], cache=cache))
                cache.lengths += parts[-1].shape[1]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-5)


def check_errors(group):
    torch.manual_seed(3)
    layer = attention(group, "plain", torch.float32)
    x = torch.randn(2, 3, HIDDEN)
    cache = new_cache(layer, 2, torch.float32)
    kv = layer.num_kv_heads_local
    with pytest.raises(ValueError, match="a KV cache is for inference"):
        layer(x, cache=cache)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=rf"expected a cache of \[1, {kv}, max_len, 16\]"):
            layer(x[:1], cache=cache)
        with pytest.raises(ValueError, match="expected a cache of"):
            layer(x, cache=LayerKVCache.allocate(2, kv + 1, MAX_LEN, HEAD_DIM))
        for tokens, lengths in ((3, [0, MAX_LEN - 2]), (1, [MAX_LEN, 0]), (MAX_LEN + 1, [0, 0])):
            cache.lengths.copy_(torch.tensor(lengths))
            with pytest.raises(ValueError):
                layer(torch.zeros(2, tokens, HIDDEN), cache=cache)
    k = torch.zeros(2, kv, MAX_LEN, HEAD_DIM)
    with pytest.raises(ValueError, match="one shape"):
        LayerKVCache(k, k[:1], torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected int64 lengths \[2\]"):
        LayerKVCache(k, k, torch.zeros(2))
    with pytest.raises(ValueError, match="int32 page_table"):
        LayerKVCache(k, k, torch.zeros(2, dtype=torch.int64), page_table=torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equal_to_attention_without_a_cache(rank_pool, world_size, dtype):
    rank_pool(world_size).run(check_equal_to_no_cache, dtype)


@pytest.mark.parametrize("check", [check_positions, check_errors], ids=lambda f: f.__name__)
@pytest.mark.parametrize("world_size", [1, 4])
def test_behaviour(rank_pool, world_size, check):
    rank_pool(world_size).run(check)
