"""Tier: no device. PagedKVCache: pages taken and given back, rows that move, what reaches the device."""

import random

import pytest
import torch

from tp_kernels.inference.paged_cache import OutOfPages, PagedKVCache


def cache_of(**changes):
    options = {"max_batch": 4, "max_len": 20, "page_size": 8, "num_pages": 7, **changes}
    return PagedKVCache(2, 3, 4, **options)


def test_rows_take_pages_and_give_them_back():
    cache = cache_of()
    assert cache.free_pages == 7 and cache.nbytes == 2 * 2 * 8 * 3 * 8 * 4 * 4 and cache.capacity == 24
    cache.add_rows([9, 1])
    cache.set_length(0, 9)
    cache.sync()
    assert cache.page_table.tolist() == [[1, 2, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert cache.lengths.tolist() == [9, 0, 0, 0] and cache.live.tolist() == [1, 1, 0, 0]
    cache.reserve([16, 9])
    assert cache.page_table[1].tolist() == [3, 0, 0]  # not before it is told
    cache.sync()
    assert cache.page_table[1].tolist() == [3, 4, 0] and cache.free_pages == 3
    cache.keep_rows([1])
    cache.sync()
    assert cache.page_table.tolist()[:2] == [[3, 4, 0], [0, 0, 0]] and cache.free_pages == 5
    assert cache.lengths.tolist() == [0, 0, 0, 0] and cache.live.tolist() == [1, 0, 0, 0]
    cache.add_rows([20])
    assert cache.batch == 2 and cache.free_pages == 2
    cache.count_step()
    assert cache.host_lengths == [1, 1]


def test_errors_change_nothing():
    cache = cache_of()
    cache.add_rows([16])
    before = (cache.free_pages, cache.batch, cache._host_table.clone())
    for call, error, message in (
        (lambda: cache.add_rows([20, 17]), OutOfPages, "6 more of 8 tokens are needed and 5 of 7 are free"),
        (lambda: cache.add_rows([1] * 4), ValueError, "max_batch=4"),
        (lambda: cache.add_rows([1, 21]), ValueError, "max_len=20"),
        (lambda: cache.reserve([21]), ValueError, "max_len=20"),
        (lambda: cache.set_length(0, 17), ValueError, "pages for 16 tokens"),
        (lambda: cache.keep_rows([0, 0]), ValueError, "different rows"),
        (lambda: cache.keep_rows([1]), ValueError, "different rows"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert (cache.free_pages, cache.batch) == before[:2] and torch.equal(cache._host_table, before[2])
    for bad in ({"page_size": 12}, {"max_len": 0}, {"num_pages": 0}, {"max_batch": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            cache_of(**bad)


def test_no_page_is_ever_anybody_elses():
    chance, cache = random.Random(3), cache_of(num_pages=9)
    for _ in range(300):
        try:
            kind = chance.randrange(3)
            if kind == 0:
                cache.add_rows([chance.randint(1, 20) for _ in range(chance.randint(1, 2))])
            elif kind == 1:
                cache.reserve([chance.randint(1, 20) for _ in range(cache.batch)])
            else:
                cache.keep_rows(chance.sample(range(cache.batch), chance.randint(0, cache.batch)))
        except ValueError:
            pass
        cache.sync()
        taken = [page for row in cache._pages for page in row]
        assert sorted(taken + cache._free) == list(range(1, 10))
        for row, pages in enumerate(cache._pages):
            assert cache.page_table[row].tolist() == pages + [0] * (3 - len(pages))
        assert not cache.page_table[cache.batch :].any()


def test_packed_pieces_name_their_tokens_and_keys():
    cache = cache_of(max_len=24)
    cache.add_rows([20, 3])
    cache.keep_rows([1, 0])  # row 0 has page 4, row 1 has pages 1, 2, 3
    tokens = cache.pack([(0, 0, 3), (1, 6, 11)]).tokens
    assert tokens.positions.flatten().tolist() == [0, 1, 2, 6, 7, 8, 9, 10]
    assert tokens.slots.tolist() == [0, 1, 2, 6, 7, 0, 1, 2]
    assert tokens.pages.flatten().tolist() == [4, 4, 4, 1, 1, 2, 2, 2]
    assert tokens.cu_tokens.tolist() == [0, 3, 8] and tokens.cu_keys.tolist() == [0, 3, 14]
    assert (tokens.max_tokens, tokens.max_keys) == (5, 11)
    # Of page p, KV head h and slot s, row (3 * p + h) * 8 + s of all.
    expected = [(4, s) for s in range(3)] + [(1, s) for s in range(8)] + [(2, s) for s in range(3)]
    assert tokens.keys.tolist() == [[(3 * page + head) * 8 + slot for head in range(3)] for page, slot in expected]
    near = cache.pack([(1, 6, 11)], window=4).tokens
    assert near.cu_keys.tolist() == [0, 8] and near.keys[0, 0] == 3 * 8 + 3  # from position 6 - 4 + 1 on
