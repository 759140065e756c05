"""Blocks on parts of the sequence against the same blocks on all of it: outputs and gradients. Tier: CPU ranks."""

import pytest
import torch

from tp_kernels.checkpoint.sharding import shard_range_sizes
from tp_kernels.layers import LayerKVCache, ParallelDecoderLayer, RotaryEmbedding, full_gradients
from tp_kernels.testing.numeric import assert_close_to_reference, max_error

TOKENS, HIDDEN = 11, 48
CASES = {
    "biased": dict(num_heads=6, num_kv_heads=3, o_bias=True, qkv_bias=True, mlp_bias=True),
    "replicated kv heads": dict(num_heads=4, num_kv_heads=1, head_dim=12, qk_norm=True, activation="gelu"),
}


def make_layer(group, options, dtype, **more):
    torch.manual_seed(1)
    head_dim = options.get("head_dim", HIDDEN // options["num_heads"])
    layer = ParallelDecoderLayer(
        HIDDEN, 70, rope=RotaryEmbedding(head_dim), group=group, dtype=dtype, **options, **more
    )
    with torch.no_grad():
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.add_(torch.randn(HIDDEN).to(dtype) * 0.3)
    return layer


def run(layer, x, residual, grad, *args, **kwargs):
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    out, summed = layer(x, residual, *args, **kwargs)
    (out + summed).backward(grad)
    return {"out": (out + summed).detach(), "x": x.grad, "residual": residual.grad}, full_gradients(layer)


def blocks(group, dtype):
    torch.set_num_threads(1)
    sizes = shard_range_sizes(TOKENS, group.world_size)
    results = {}
    for name, options in CASES.items():
        torch.manual_seed(2)
        tensors = [torch.randn(2, TOKENS, HIDDEN).to(dtype) for _ in range(3)]
        parts = [tensor.split(sizes, 1)[group.rank].contiguous() for tensor in tensors]
        whole, whole_grads = run(make_layer(group, options, dtype), *tensors)
        double = make_layer(group, options, dtype).double()
        exact, exact_grads = run(double, *(tensor.double() for tensor in tensors))
        layer = make_layer(group, options, dtype, sequence_parallel=True)
        for known in (None, sizes):
            layer.zero_grad()
            part, grads = run(layer, *parts, sequence_sizes=known)
            part = {key: group.all_gather(value, dim=1, sizes=sizes) for key, value in part.items()}
            results[name, known is None] = (part | grads, whole | whole_grads, exact | exact_grads)
    return results


@pytest.mark.parametrize("world_size, dtype", [(1, torch.float32), (2, torch.bfloat16), (3, torch.float32)])
def test_blocks_on_parts_of_the_sequence(rank_pool, world_size, dtype):
    for rank, results in enumerate(rank_pool(world_size).run(blocks, dtype)):
        for case, (part, whole, exact) in results.items():
            assert part.keys() == whole.keys()
            for key, value in whole.items():
                what = f"rank {rank}, {case}: {key}"
                # Another order of summation: PyTorch's own error is the yardstick, but not where it is zero by luck.
                factor = 3.0 if max_error(value, exact[key]) else 1.0
                assert_close_to_reference(part[key], value, exact[key], factor=factor, name=what)


def refusals(group):
    layer = make_layer(group, CASES["biased"], torch.float32, sequence_parallel=True)
    uneven = torch.zeros(1, 5 - 2 * group.rank, HIDDEN)
    with torch.no_grad():
        with pytest.raises(ValueError, match="of 8 tokens on rank"):
            layer(uneven)
        attention = layer.self_attn
        cache = LayerKVCache(
            torch.zeros(1, attention.num_kv_heads_local, 8, attention.head_dim),
            torch.zeros(1, attention.num_kv_heads_local, 8, attention.head_dim),
            torch.zeros(1, dtype=torch.int64),
        )
        with pytest.raises(ValueError, match="no KV cache"):
            layer(torch.zeros(1, 4, HIDDEN), cache=cache)
    assert not layer.fuses_norms(torch.zeros(1, 4, HIDDEN))


def test_what_is_refused(rank_pool):
    rank_pool(2).run(refusals)
