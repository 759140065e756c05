"""Residual and norm handed to the overlapped projection: layers, blocks, models. Tier: CPU ranks (1 to 3 processes).

A ``DelayedCommunicator`` stands in for one that works beside the caller: results are NaN until waited for. Its log,
with the norms' calls in it, shows that what follows a sum runs piece by piece.
"""

import contextlib
import importlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels.checkpoint.sharding import shard_range_sizes
from tp_kernels.comm import TPGroup
from tp_kernels.inference import DecodeEngine
from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.layers import (
    ColumnParallelLinear,
    ParallelDecoderLayer,
    ParallelLMHead,
    ParallelMLP,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
    full_gradients,
    load_full_state_dict,
)
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.delayed import DelayedCommunicator
from tp_kernels.testing.numeric import assert_close_to_reference

BATCH, TOKENS, HIDDEN, WIDTH = 2, 7, 12, 19


def delayed(group):
    return TPGroup(DelayedCommunicator(group.communicator), ranks=group.ranks)


@contextlib.contextmanager
def norms_logged(group):
    """The log of the group's calls from here on, with a "norm" for every piece that is normalised."""
    log = group.communicator.log
    log.clear()
    with contextlib.ExitStack() as stack:
        for name in ("linear_all_reduce", "linear_reduce_scatter"):
            module = importlib.import_module(f"tp_kernels.ops.{name}")
            by_rows = module.add_rms_norm_by_rows

            def logged(*args, by_rows=by_rows):
                normalise, *results = by_rows(*args)
                return lambda rows: (log.append("norm"), normalise(rows)), *results

            stack.enter_context(mock.patch.object(module, "add_rms_norm_by_rows", logged))
        yield log


def sums_with_norms(log, op="all_reduce"):
    """(sums whose norm followed piece by piece, sums in pieces without a norm) in the log; there may be no others.

    Of a piece of the sequence a rank may have no tokens, hence nothing to normalise.
    """
    calls, found = [name for name in log if name == "norm" or name.startswith(op)], [0, 0]
    while calls:
        pieces = next(i for i, name in enumerate(calls) if name != f"{op}_async")
        assert pieces > 1, f"a sum in one piece, or not overlapped: {calls}"
        del calls[:pieces]
        norms = 0
        for _ in range(pieces):
            assert calls.pop(0) == f"{op} wait"
            if calls[:1] == ["norm"]:
                norms, calls = norms + 1, calls[1:]
        assert norms in (0, pieces) or (op == "reduce_scatter" and norms > 1), f"{norms} norms of {pieces} pieces"
        found[norms == 0] += 1
    return tuple(found)


def integers(*shape, seed):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def fill(layer, seed):
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=seed + 100 * index))
    return layer


def row(group, overlap="none", **options):
    return fill(RowParallelLinear(WIDTH, HIDDEN, group=group, overlap=overlap, **options), seed=group.rank)


def own_input(group, tokens=TOKENS):
    width = RowParallelLinear(WIDTH, HIDDEN, group=group).in_features_local
    return integers(BATCH, tokens, width, seed=group.rank)


# One layer ------------------------------------------------------------------------------------------------------------


def forward_norm(group):
    late, norm = delayed(group), fill(RMSNorm(HIDDEN, 1e-5), seed=5)
    residual = integers(BATCH, TOKENS, HIDDEN, seed=4)
    with torch.no_grad():
        for options in ({}, {"bias": False}, {"input_is_parallel": False}):
            x = (
                integers(BATCH, TOKENS, WIDTH, seed=3)
                if options.get("input_is_parallel") is False
                else own_input(group)
            )
            expected = norm(row(group, **options)(x), residual)
            with norms_logged(late) as log:
                found = row(late, "chunked", **options).forward_norm(x, residual, norm)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            torch.testing.assert_close(found[0], F.rms_norm(found[1], (HIDDEN,), norm.weight, 1e-5))
            assert sums_with_norms(log) == (group.world_size > 1, 0) and late.communicator.in_flight == 0
        with norms_logged(late) as log:  # nothing to overlap on a CPU
            row(late, "auto").forward_norm(x[..., : own_input(group).shape[-1]], residual, norm)
        assert "norm" not in log and not any("async" in name for name in log)
        quantized = row(late, "auto").quantize("int8")
        found = quantized.forward_norm(own_input(group), residual, norm)
        expected = norm(quantized(own_input(group)), residual)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = row(late, "chunked").forward_norm(own_input(group), residual, norm)
        assert all(torch.equal(a, b) for a, b in zip(found, norm(row(group)(own_input(group)), residual), strict=True))
    gradients = []
    for where, how in ((late, "chunked"), (group, "none")):
        layer = row(where, how)
        inputs = [own_input(group).requires_grad_(), residual.clone().requires_grad_(), norm.weight]
        inputs += list(layer.parameters())
        normed, summed = layer.forward_norm(*inputs[:2], norm)
        gradients.append(torch.autograd.grad((normed.sin() + summed).sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    for options in ({"skip_bias_add": True}, {"skip_bias_add": True, "reduce_results": False}):
        with pytest.raises(ValueError, match="takes the whole sum"):
            row(group, **options).forward_norm(own_input(group), residual, norm)


def forward_norm_of_parts(group):
    """The same with ``sequence_parallel``: one sequence, which the ranks share unevenly."""
    late, norm = delayed(group), fill(RMSNorm(HIDDEN, 1e-5, sequence_group=group), seed=5)
    for tokens in (1, 11):
        sizes = shard_range_sizes(tokens, group.world_size)
        residual = integers(1, tokens, HIDDEN, seed=4).split(sizes, 1)[group.rank]
        x = own_input(group, tokens)[:1]
        with torch.no_grad():
            expected = norm(row(group, sequence_parallel=True)(x), residual)
            with norms_logged(late) as log:
                found = row(late, "chunked", sequence_parallel=True).forward_norm(x, residual, norm)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        if tokens > 1 and group.world_size > 1:
            assert sums_with_norms(log, "reduce_scatter") == (1, 0)
    gradients = []
    for where, how in ((late, "chunked"), (group, "none")):
        layer = row(where, how, sequence_parallel=True)
        inputs = [x.clone().requires_grad_(), norm.weight, *layer.parameters()]
        normed, summed = layer.forward_norm(inputs[0], residual, norm)
        gradients.append(torch.autograd.grad((normed.sin() + summed).sum(), inputs))
    torch.testing.assert_close(*gradients)


def refusals(group):
    late = delayed(group)
    sequence = {"group": late, "sequence_parallel": True}
    for make, match in (
        (lambda: ColumnParallelLinear(8, 8, group=late, overlap="chunked"), "expected sequence_parallel=True"),
        (lambda: ColumnParallelLinear(8, 8, overlap="fused", **sequence), "auto, none, chunked, got 'fused'"),
        (lambda: RowParallelLinear(8, 8, overlap="fused", **sequence), "leaves whole sums"),
        (lambda: ColumnParallelLinear(8, 8, overlap="chunked", **sequence).quantize("int8"), "quantised weight"),
        (lambda: ParallelDecoderLayer(16, 16, 4, overlap="fused", **sequence), "auto, none, chunked, got 'fused'"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    asked = ColumnParallelLinear(8, 8, group=group, sequence_parallel=True, overlap="chunked")
    with pytest.raises(ValueError, match='overlap="chunked" needs CUDA'):
        asked(torch.zeros(2, 8))


@pytest.mark.parametrize("check", [forward_norm, forward_norm_of_parts, refusals], ids=lambda f: f.__name__)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_layer(rank_pool, world_size, check):
    rank_pool(world_size).run(check)


# Models ---------------------------------------------------------------------------------------------------------------

NAME = "llama-5h5-biased"
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def passes(model):
    """Logits without a cache, and through one."""
    cache, pieces = KVCache.for_model(model, *IDS.shape), []
    for piece in IDS.split([6, 1, 2], dim=1):
        pieces.append(model(piece, cache=cache))
        cache.advance(piece.shape[1])
    return model(IDS), torch.cat(pieces, 1)


def models(group, config, state):
    late = delayed(group)
    plain, asked = (
        ParallelCausalLM(ModelConfig.from_hf(config), group=where, overlap=overlap)
        for where, overlap in ((group, "none"), (late, "chunked"))
    )
    for model in (plain, asked):
        load_full_state_dict(model, state)
    layers = asked.model.layers
    with torch.no_grad():
        with norms_logged(late) as log:
            logits = passes(asked)
        log = [name for name in log if name != "all_reduce"]  # the embedding's sum
        assert sums_with_norms(log) == (4 * 2 * len(layers), 0)
        # The same chunks with the norms apart, because somebody looks at what goes into them.
        hooks = [layer.get_submodule(name).register_forward_hook(lambda *_: None)
                 for layer in layers for name in ("self_attn", "mlp")]  # fmt: skip
        with norms_logged(late) as log:
            apart = passes(asked)
        assert "norm" not in log and "all_reduce_async" in log
        assert all(torch.equal(a, b) for a, b in zip(logits, apart, strict=True))
        for hook in hooks:
            hook.remove()
        # A hook on one projection sees what it would see in a plain model, and turns it off in that block only.
        seen, expected = [], []
        layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: seen.append(out))
        plain.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, out: expected.append(out))
        with norms_logged(late) as log:
            assert torch.equal(asked(IDS), logits[0])
        assert log.count("norm") == 4 * (len(layers) - 1), "the attention's sum of the others; nothing is handed on"
        whole = plain(IDS)
        torch.testing.assert_close(seen, expected)
        torch.testing.assert_close(logits[0], whole)
    with norms_logged(late) as log:  # with gradients the norm follows the whole sum
        loss = asked(IDS).square().mean()
    assert "norm" not in log
    loss.backward()
    plain(IDS).square().mean().backward()
    for (name, mine), (_, theirs) in zip(full_gradients(asked).items(), full_gradients(plain).items(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert late.communicator.in_flight == 0
    return logits


@pytest.mark.parametrize("world_size", [2, 3])
def test_models(rank_pool, world_size):
    pytest.importorskip("transformers")
    from tp_kernels.testing.tiny_models import make_tiny_model

    stock = make_tiny_model(NAME)
    with torch.no_grad():
        state = {key: value.clone() for key, value in stock.state_dict().items()}
        theirs, exact = stock(IDS).logits, stock.double()(IDS).logits
    for whole, cached in rank_pool(world_size).run(models, stock.config.to_dict(), state):
        assert_close_to_reference(whole, theirs, exact)
        assert_close_to_reference(cached, theirs, exact)


class Both(DelayedCommunicator):
    """Overlaps, and offers the kernel, which does what it may and no more.

    What it lent is overwritten when the next is asked for, of the residual it reads this rank's rows only, and sums
    that need not be gathered are NaN elsewhere.
    """

    fused_norm = True
    lent = None

    def fuses_norm(self, width, dtype):
        return True

    def get_buffer(self, shape, dtype, use="input"):
        if use == "input":  # GEMMs write into these on GPUs only
            return None
        if self.lent is not None:
            self.lent.fill_(torch.nan)
        with torch.inference_mode(False):
            self.lent = torch.full(shape, torch.nan, dtype=dtype)
        return self.lent

    def all_reduce_add_rms_norm(
        self, partial, residual, weight, eps, *, bias=None, round_before_norm=True, gather_sum=True, out=None
    ):
        self.log.append("kernel")
        width = partial.shape[-1]
        rows = partial.numel() // width
        mine = slice(*(-(-rows // self.world_size) * rank for rank in (self.rank, self.rank + 1)))
        own = torch.zeros(rows, width)
        own[mine] = residual.reshape(rows, width)[mine]
        total = self._inner.all_reduce(partial)
        total = total if bias is None else total + bias
        normed, summed = ops.add_rms_norm(total, self._inner.all_reduce(own).view_as(residual), weight, eps)
        if not gather_sum:
            kept = summed.view(rows, width)[mine].clone()
            summed.fill_(torch.nan).view(rows, width)[mine] = kept
        partial.fill_(torch.nan)
        return (normed if out is None else out.copy_(normed)), summed


PROMPTS = torch.randint(1, 97, (5, 27), generator=torch.Generator().manual_seed(2)).tolist()
NEW_TOKENS = 3


def engine_tokens(model):
    with DecodeEngine(model, max_batch=5, max_len=32, page_size=8, capture=False) as engine:
        tokens = engine.generate(PROMPTS, [NEW_TOKENS] * 5).output_ids
        assert engine.path == "eager: capture=False", "nothing keeps the engine from going past the modules"
    return tokens


def two_ways(group, config, state):
    """Some sums overlapped, some left to the kernel, in one pass: of modules, and of an engine past them."""
    late = TPGroup(Both(group.communicator), ranks=group.ranks)
    asked, plain = (ParallelCausalLM(ModelConfig.from_hf(config), group=where) for where in (late, group))
    for model in (asked, plain):
        load_full_state_dict(model, state)
    layers = asked.model.layers
    with torch.no_grad():
        expected, tokens = passes(plain), engine_tokens(plain)
        for chosen in ("o_proj", "down_proj", "neither", "first layer", "both"):
            for index, layer in enumerate(layers):
                for name, projection in (("o_proj", layer.self_attn.o_proj), ("down_proj", layer.mlp.down_proj)):
                    overlapped = chosen in (name, "both") or (chosen == "first layer" and index == 0)
                    projection.overlap = "chunked" if overlapped else "auto"
            with norms_logged(late) as log:
                found = passes(asked)
            log = [name for name in log if name not in ("all_reduce", "all_gather")]
            kernels, calls = log.count("kernel"), 4 * len(layers)
            assert kernels == {"neither": 2 * calls, "both": 0}.get(chosen, calls)
            assert sums_with_norms(log) == (2 * calls - kernels, 0)
            torch.testing.assert_close(found, expected)
            with norms_logged(late) as log:
                assert engine_tokens(asked) == tokens
            kernels, calls = log.count("kernel"), NEW_TOKENS * len(layers)
            assert kernels == {"neither": 2 * calls, "both": 0}.get(chosen, calls)
        # Prompts ask the table, which knows enough rows; decode steps are too small for it.
        for layer in layers:
            layer.self_attn.o_proj.overlap = layer.mlp.down_proj.overlap = "auto"
        module = importlib.import_module("tp_kernels.layers.row_parallel")
        with norms_logged(late) as log, mock.patch.object(module, "choose_linear_all_reduce") as choose:
            choose.return_value.path = "chunked"
            assert engine_tokens(asked) == tokens
        assert log.count("kernel") == 2 * (NEW_TOKENS - 1) * len(layers) and choose.call_count == 2 * len(layers)
    assert late.communicator.in_flight == 0


def test_overlap_and_the_kernel_in_one_pass(rank_pool):
    pytest.importorskip("transformers")
    from tp_kernels.testing.tiny_models import make_tiny_model

    stock = make_tiny_model(NAME)
    rank_pool(2).run(two_ways, stock.config.to_dict(), dict(stock.state_dict()))


# Blocks on parts of the sequence --------------------------------------------------------------------------------------

SEQUENCE = 11


def make_block(group, **options):
    torch.manual_seed(1)
    options = {"num_heads": 6, "num_kv_heads": 3, "o_bias": True, "qkv_bias": True, "mlp_bias": True, **options}
    block = ParallelDecoderLayer(24, 37, rope=RotaryEmbedding(4), group=group, dtype=torch.float64, **options)
    with torch.no_grad():
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.add_(0.3 * torch.randn(24, dtype=torch.float64))
    return block


def two_blocks(first, second, x, keep_partial=False, **options):
    out, residual = first(x, keep_partial=keep_partial, **options)
    out, residual = second(out, residual, **options)
    return out + residual


def blocks(group, activation):
    late, sizes = delayed(group), shard_range_sizes(SEQUENCE, group.world_size)
    whole = torch.randn(1, SEQUENCE, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    part, options = whole.split(sizes, 1)[group.rank], {"activation": activation}
    plain = [make_block(group, **options) for _ in range(2)]
    asked = [make_block(late, sequence_parallel=True, overlap="chunked", **options) for _ in range(2)]
    with torch.no_grad():
        expected = two_blocks(*plain, whole)
        results = []
        for known in (None, sizes):
            with norms_logged(late) as log:
                assert asked[0].fuses_norms(part)
                results.append(two_blocks(*asked, part, keep_partial=True, sequence_sizes=known))
            # Both sums of the first block and one of the second: the last one's norm is the caller's.
            assert sums_with_norms(log, "reduce_scatter") == (3, 1)
            gathers = [name for name in log if name.startswith("all_gather")]
            assert gathers.count("all_gather_async") > 4, "all four projections gather in pieces"
        asked[0].mlp.register_forward_hook(lambda *_: None)
        asked[1].mlp.register_forward_hook(lambda *_: None)
        assert not asked[0].fuses_norms(part)
        with norms_logged(late) as log:
            results.append(two_blocks(*asked, part))
        assert "norm" not in log and all(torch.equal(result, results[0]) for result in results)
        found = group.all_gather(results[0], dim=1, sizes=sizes)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        # Nothing is cut into pieces unless it was asked for, or measured to be faster on a GPU.
        late.communicator.log.clear()
        unasked = make_block(late, sequence_parallel=True, **options)
        unasked(part)
        assert not any("async" in name for name in late.communicator.log)
    gradients = []
    for pair, x in ((plain, whole), (asked, part)):
        x = x.clone().requires_grad_()
        out = two_blocks(*pair, x)
        out.backward(torch.cos(out.detach()))
        gradients.append([x.grad, full_gradients(pair[0]), full_gradients(pair[1])])
    assert late.communicator.in_flight == 0
    gradients[1][0] = group.all_gather(gradients[1][0], dim=1, sizes=sizes)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("world_size, activation", [(2, "gelu"), (3, "silu")])
def test_blocks_on_parts_of_the_sequence(rank_pool, world_size, activation):
    rank_pool(world_size).run(blocks, activation)


def fused_gate(group):
    """The MLP gives its fused gate up for the overlap only where that was asked for."""
    late = delayed(group)
    sizes = shard_range_sizes(TOKENS, group.world_size)
    x = integers(1, TOKENS, HIDDEN, seed=1).split(sizes, 1)[group.rank] / 8
    results = []
    for overlap, asks in (("auto", False), ("none", False), ("chunked", True)):
        mlp = fill(ParallelMLP(HIDDEN, WIDTH, group=late, sequence_parallel=True, overlap=overlap), seed=group.rank)
        late.communicator.log.clear()
        with torch.no_grad():
            assert mlp.gate_up_proj.gathers_beside(x, sizes) is asks
            results.append(mlp(x, sizes))
        assert ("all_gather_async" in late.communicator.log) is asks
        assert ("reduce_scatter_async" in late.communicator.log) is asks
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], results[0])


def test_the_fused_gate_is_given_up_on_request(rank_pool):
    rank_pool(2).run(fused_gate)


def head(group):
    late, sizes = delayed(group), shard_range_sizes(TOKENS, group.world_size)
    x = integers(BATCH, TOKENS, HIDDEN, seed=1)
    expected = fill(ParallelLMHead(WIDTH, HIDDEN, group=group), seed=group.rank)(x)
    for overlap in ("chunked", "none"):
        asked = ParallelLMHead(WIDTH, HIDDEN, group=late, sequence_parallel=True, overlap=overlap)
        late.communicator.log.clear()
        found = fill(asked, seed=group.rank)(x.split(sizes, 1)[group.rank], sizes)
        assert torch.equal(found, expected)
        assert ("all_gather_async" in late.communicator.log) is (overlap == "chunked")
    table = fill(VocabParallelEmbedding(WIDTH, HIDDEN, group=late), seed=group.rank)
    tied = ParallelLMHead.from_embedding(table, sequence_parallel=True, overlap="chunked")
    whole = ParallelLMHead.from_embedding(table)(x)
    assert torch.equal(tied(x.split(sizes, 1)[group.rank], sizes), whole) and tied.weight is table.weight


def test_the_output_head_gathers_tokens_beside_its_matmul(rank_pool):
    rank_pool(2).run(head)
