"""Sums over the ranks that are left to the norm behind them: the op, decoder layers, whole models. Tier: CPU ranks.

The fused kernel is stood in for by a communicator that does what the kernel may do and no more: buffers handed out are
overwritten when the next one is asked for, and sums that need not be gathered are NaN outside this rank's rows.
"""

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.commands import bench_layer
from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.layers import ParallelDecoderLayer
from tp_kernels.layers.decoder import PartialSum
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.ops.all_reduce_norm import fused_norm_reason
from tp_kernels.testing.numeric import assert_close_to_reference, integers

NAN = float("nan")


class Fusing:
    """A communicator that offers the fused norm on the CPU."""

    fused_norm = True

    def __init__(self, communicator):
        self._inner = communicator
        self.calls = []
        self._lent = None

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def fuses_norm(self, width, dtype):
        return True

    def get_buffer(self, shape, dtype, use="input"):
        assert use == "output"  # GEMMs write into inputs on GPUs only
        if self._lent is not None:
            self._lent.fill_(NAN)
        with torch.inference_mode(False):
            self._lent = torch.full(shape, NAN, dtype=dtype)
        return self._lent

    def all_reduce_add_rms_norm(
        self, partial, residual, weight, eps, *, bias=None, round_before_norm=True, gather_sum=True, out=None
    ):
        self.calls.append((gather_sum, out is not None))
        rows = partial.numel() // partial.shape[-1]
        length = -(-rows // self.world_size)
        mine = slice(length * self.rank, length * (self.rank + 1))
        total = self._inner.all_reduce(partial)
        if bias is not None:
            total = total + bias
        # Own rows of the residual only: the others may be NaN, and come from the ranks that have them.
        own = torch.zeros_like(residual).view(rows, -1)
        own[mine] = residual.reshape(rows, -1)[mine]
        residual = self._inner.all_reduce(own).view_as(residual)
        normed, summed = ops.add_rms_norm(total, residual, weight, eps)
        if not gather_sum:
            kept = summed.view(rows, -1)[mine].clone()
            summed.fill_(NAN).view(rows, -1)[mine] = kept
        if out is not None:
            out.copy_(normed)
            normed = out
        partial.fill_(NAN)
        return normed, summed


def fusing(group):
    return TPGroup(Fusing(group.communicator), ranks=group.ranks, process_group=group.process_group)


def op_on_ranks(group):
    results = []
    for dtype, biased in ((torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)):
        partials = [torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(3)]
        residual, weight = integers((3, 5, 24), dtype, seed=9), integers((24,), dtype, seed=8)
        bias = integers((24,), dtype, seed=7) if biased else None
        partials = partials[: group.world_size]
        mine = partials[group.rank]
        summed = group.all_reduce(mine)
        separate = ops.add_rms_norm(summed if bias is None else summed + bias, residual, weight, 1e-5)
        fused = ops.all_reduce_add_rms_norm(mine.clone(), residual, weight, 1e-5, group, bias)
        assert all(torch.equal(a, b) for a, b in zip(fused, separate, strict=True))
        expected = ops.all_reduce_add_rms_norm_reference(partials, residual, weight, 1e-5, bias)
        assert torch.equal(fused[1], expected[1])
        wide = ops.all_reduce_add_rms_norm(mine, residual, weight, 1e-5, group, bias, round_before_norm=False)
        results.append((fused, wide, expected, partials, residual, weight, bias))
    return results


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_op_is_the_separate_ops(rank_pool, world_size):
    for results in rank_pool(world_size).run(op_on_ranks):
        for fused, wide, expected, partials, residual, weight, bias in results:
            exact = sum(p.double() for p in partials) + (0 if bias is None else bias.double())
            exact = ops.add_rms_norm_reference(exact, residual.double(), weight.double(), 1e-5)
            for i, name in enumerate(("normed", "sum")):
                assert_close_to_reference(fused[i], expected[i], exact[i], name=name)
                assert_close_to_reference(wide[i], expected[i], exact[i], factor=1.0, name=f"wide {name}")


def gradients(group):
    x = [torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    torch.manual_seed(0)
    residual, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((4, 12), (12,), (12,)))
    results = []
    for wide in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x[group.rank], residual, weight, bias)]
        normed, summed = ops.all_reduce_add_rms_norm(
            leaves[0], leaves[1], leaves[2], 1e-6, fusing(group), leaves[3], round_before_norm=not wide
        )
        (normed.sin() + summed.cos()).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    leaves = [t.clone().requires_grad_() for t in (sum(x), residual, weight, bias)]
    normed, summed = ops.add_rms_norm_reference(leaves[0] + leaves[3], leaves[1], leaves[2], 1e-6)
    (normed.sin() + summed.cos()).sum().backward()
    for result in results:
        for grad, leaf in zip(result, leaves, strict=True):
            torch.testing.assert_close(grad, leaf.grad)


def test_gradients_pass_as_through_the_separate_ops(rank_pool):
    rank_pool(2).run(gradients)


def test_operands_that_do_not_fit_are_named():
    x, w = torch.zeros(2, 8), torch.ones(8)
    for operands, match in (
        ((x, x, torch.ones(4)), "weight"),
        ((x, x[:1], w), "residual"),
        ((x, x.double(), w), "residual"),
        ((x, x, w, 1e-6, None, torch.ones(4)), "bias"),
    ):
        with pytest.raises(ValueError, match=match):
            ops.all_reduce_add_rms_norm(*operands)


def reasons(group):
    x, w = torch.zeros(2, 8), torch.ones(8)
    offered = fusing(group)
    weight = torch.nn.Parameter(w)
    assert "does not offer" in fused_norm_reason(x, x, w, group)
    assert fused_norm_reason(x, x, w, offered) is None
    assert "gradient" in fused_norm_reason(x, x, weight, offered)
    with torch.no_grad():
        assert fused_norm_reason(x, x, weight, offered) is None
    assert "dtypes" in fused_norm_reason(x, x, w.double(), offered)


def test_why_the_kernel_is_not_taken(rank_pool):
    rank_pool(2).run(reasons)


# Layers and models ---------------------------------------------------------------------------------------------------

MODELS = {
    "llama": dict(model_type="llama", num_attention_heads=6, num_key_value_heads=3, attention_bias=True, mlp_bias=True),
    "qwen3": dict(model_type="qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=16),
}


def make_model(name, group, dtype):
    torch.manual_seed(3)
    config = dict(hidden_size=48, intermediate_size=80, vocab_size=61, num_hidden_layers=3, max_position_embeddings=64)
    model = ParallelCausalLM(ModelConfig.from_hf({**config, **MODELS[name]}), group=group, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones and biases of zeros would test nothing
                whole = torch.randn(4096, generator=generator)
                parameter.add_((whole[: parameter.numel()] * 0.3).to(dtype))
    return model.eval()


def model_passes(group, name, dtype):
    offered = fusing(group)
    calls = offered.communicator.calls
    plain, fused = make_model(name, group, dtype), make_model(name, offered, dtype)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        caches = [KVCache.for_model(model, 2, 16) for model in (plain, fused)]
        for piece in ids.split([6, 1, 1, 1], dim=1):
            calls.clear()
            expected, actual = (model(piece, cache=cache) for model, cache in zip((plain, fused), caches, strict=True))
            assert torch.equal(actual, expected)
            # The first norm has nothing to sum, the last one's result is the caller's.
            assert calls == [(False, True)] * 5 + [(False, False)]
            for cache in caches:
                cache.advance(piece.shape[1])
        assert torch.equal(fused(ids), plain(ids))
        calls.clear()
        decoders = [model.model for model in (plain, fused)]
        benched = [bench_layer.forward(d.layers, d.norm, d.embed_tokens(ids), [None] * 3) for d in decoders]
        assert torch.equal(*benched) and calls == [(False, True)] * 5 + [(False, False)]
    calls.clear()
    assert torch.equal(fused(ids), plain(ids)) and not calls  # gradients are recorded
    with torch.no_grad():
        handle = fused.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
        assert torch.equal(fused(ids), plain(ids))
        assert calls == [(True, True)] * 2  # the other layers fuse their own inner norm
        handle.remove()
        calls.clear()
        fused.model.layers[0].mlp.down_proj.skip_bias_add = True
        fused.model.layers[1].input_layernorm.double()
        fused.model.layers[2].mlp = torch.nn.Sequential(fused.model.layers[2].mlp)
        assert not any(layer.fuses_norms(torch.zeros(1, 48, dtype=dtype)) for layer in fused.model.layers)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not plain.model.layers[0].fuses_norms(torch.zeros(1, 48))


@pytest.mark.parametrize("name, dtype, world_size", [("llama", torch.float32, 3), ("qwen3", torch.bfloat16, 2)])
def test_models_give_the_same_bits(rank_pool, name, dtype, world_size):
    rank_pool(world_size).run(model_passes, name, dtype)


def single_layer(group):
    offered = fusing(group)
    layers = []
    for where in (group, offered):
        torch.manual_seed(0)
        layers.append(ParallelDecoderLayer(32, 48, 4, 2, o_bias=True, mlp_bias=True, group=where))
    x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    before = residual.clone()
    with torch.no_grad():
        for arguments in ((x,), (x, residual)):
            expected, actual = (layer(*arguments) for layer in layers)
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        assert torch.equal(residual, before) and offered.communicator.calls == [(True, True)] * 2
        out, carried = layers[1](x, keep_partial=True)
        assert isinstance(out, PartialSum) and out.projection is layers[1].mlp.down_proj and out.path == "kernel"
        # The last of a chain may return whole sums.
        expected, actual = layers[0](*layers[0](x)), layers[1](out, carried)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_a_layer_alone_returns_whole_sums(rank_pool):
    rank_pool(2).run(single_layer)
