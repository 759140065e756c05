"""Tier: no device. KVCache: rows that move up, lengths, sizes."""

import pytest
import torch

from tp_kernels.inference.kv_cache import KVCache


def test_cache_rows_move_up_and_are_checked():
    cache = KVCache(2, 4, 3, 5, 2)
    with torch.inference_mode():
        for row in range(4):
            for layer in cache.layers:
                layer.k[row], layer.v[row] = row, -row
    cache.set_lengths([1, 2, 3, 4])
    nbytes = cache.nbytes
    cache.keep_rows([1, 3])
    assert cache.lengths.tolist() == [2, 4] and cache.batch == 2 and cache.nbytes == nbytes == 2 * 2 * 4 * 3 * 5 * 2 * 4
    for layer in cache.layers:
        for row, (old, used) in enumerate(((1, 2), (3, 4))):
            assert (layer.k[row, :, :used] == old).all() and (layer.v[row, :, :used] == -old).all()
        assert layer.lengths is cache.lengths
    cache.keep_rows([1])
    assert cache.lengths.tolist() == [4] and (cache.layers[0].k[0, :, :4] == 3).all()
    for bad in ([], [1, 0], [0, 0], [7], [-1]):
        with pytest.raises(ValueError, match="rows"):
            KVCache(1, 2, 1, 4, 2).keep_rows(bad)
    for bad in ([1], [1, 5], [-1, 0]):
        with pytest.raises(ValueError, match="lengths"):
            KVCache(1, 2, 1, 4, 2).set_lengths(bad)
    with pytest.raises(ValueError, match="max_len"):
        KVCache(1, 2, 1, 0, 2)
