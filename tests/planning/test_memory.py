"""Bytes of every rank, against the model itself on the meta device. Tier: no device."""

import pytest
import torch

from tp_kernels.comm import LocalCommunicator, TPGroup
from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.layers import quantize_model
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.planning.memory import kv_bytes_per_token, largest_batch, shards, weight_bytes
from tp_kernels.testing.tiny_models import TINY_MODELS

SMOLLM2 = dict(
    model_type="llama",
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    num_hidden_layers=5,  # of 30, which are alike
    vocab_size=49152,
    tie_word_embeddings=True,
)
CONFIGS = {
    **{name: {"model_type": family.lower(), **options} for name, (family, options) in TINY_MODELS.items()},
    "smollm2-135m": SMOLLM2,
    # More KV heads than ranks at 4, fewer at 8; biases of the qkv projection only; a head of its own.
    "qwen2-8h4": dict(model_type="qwen2", hidden_size=64, intermediate_size=150, num_attention_heads=8)
    | dict(num_key_value_heads=4, num_hidden_layers=2, vocab_size=203),
}


def rank_of(rank: int, world_size: int) -> TPGroup:
    """One rank of a group whose others do not exist: enough to build a model, not to run it."""
    communicator = LocalCommunicator()
    communicator.rank, communicator.world_size = rank, world_size
    return TPGroup(communicator)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_model(name):
    config = ModelConfig.from_hf(CONFIGS[name])
    sizes = [tp for tp in (1, 2, 3, 4, 8) if tp <= config.num_attention_heads]
    for tp in sizes:
        for rank, shard in enumerate(shards(config, tp)):
            model = ParallelCausalLM(config, group=rank_of(rank, tp), device="meta", dtype=torch.bfloat16)
            assert weight_bytes(config, shard, 2) == sum(p.nbytes for p in model.parameters())
            cache = KVCache.for_model(model, batch=3, max_len=7)
            assert 3 * 7 * kv_bytes_per_token(config, shard, 2) == cache.nbytes


@pytest.mark.parametrize("name", ["llama-9h3-tied-rope3", "llama-5h5-biased", "qwen3-4h1"])
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_bytes_are_those_of_the_quantised_model(name, quantize):
    config = ModelConfig.from_hf(CONFIGS[name])
    for tp in (1, 3):
        for rank, shard in enumerate(shards(config, tp)):
            model = ParallelCausalLM(config, group=rank_of(rank, tp), device="meta", dtype=torch.float16)
            quantize_model(model, quantize)
            assert weight_bytes(config, shard, 2, quantize) == sum(p.nbytes for p in model.parameters())


def test_ranks_that_would_get_nothing_are_refused():
    config = ModelConfig.from_hf(CONFIGS["qwen3-4h1"])
    with pytest.raises(ValueError, match="5 ranks cannot share num_attention_heads=4"):
        shards(config, 5)
    for tp in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="tp must be an int of at least 1"):
            shards(config, tp)


def test_largest_batch():
    assert [largest_batch(free, 10) for free in (-5, 0, 9, 10, 39.9)] == [0, 0, 0, 1, 3]
