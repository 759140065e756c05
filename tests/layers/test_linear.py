"""Parallel linear layers against torch.nn.Linear: outputs and every gradient. Tier: CPU ranks (1 to 4 processes)."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from tp_kernels.checkpoint.sharding import shard_heads, shard_range_sizes, shard_width, shard_width_sizes
from tp_kernels.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    full_gradients,
    load_full_state_dict,
)
from tp_kernels.testing.numeric import assert_close_to_reference

WORLDS = [1, 2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16]
BATCH, TOKENS, HIDDEN, WIDTH = 2, 7, 40, 101
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 8


class Pair(nn.Module):
    """Column-parallel, then row-parallel: the stock form of a transformer block's half."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Stacked(nn.Module):
    """Layers that read the same input, their outputs side by side."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


# name -> (stock model, parallel model)
STOCK = {
    "column": lambda: nn.Linear(HIDDEN, WIDTH),
    "row": lambda: nn.Linear(WIDTH, HIDDEN),
    "row_parallel_input": lambda: nn.Linear(WIDTH, HIDDEN),
    "merged": lambda: Stacked(a=nn.Linear(HIDDEN, WIDTH), b=nn.Linear(HIDDEN, 37)),
    "pair": lambda: Pair(nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)),
    "sequence": lambda: Pair(nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)),
    "qkv": lambda: Stacked(
        q_proj=nn.Linear(HIDDEN, HEADS * HEAD_DIM),
        k_proj=nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM),
        v_proj=nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM),
    ),
}
PARALLEL = {
    "column": lambda **kw: ColumnParallelLinear(HIDDEN, WIDTH, gather_output=True, **kw),
    "row": lambda **kw: RowParallelLinear(WIDTH, HIDDEN, input_is_parallel=False, **kw),
    "row_parallel_input": lambda **kw: RowParallelLinear(WIDTH, HIDDEN, **kw),
    "merged": lambda **kw: MergedColumnParallelLinear(HIDDEN, [WIDTH, 37], names=("a", "b"), gather_output=True, **kw),
    "pair": lambda **kw: Pair(ColumnParallelLinear(HIDDEN, WIDTH, **kw), RowParallelLinear(WIDTH, HIDDEN, **kw)),
    "sequence": lambda **kw: Pair(
        ColumnParallelLinear(HIDDEN, WIDTH, sequence_parallel=True, **kw),
        RowParallelLinear(WIDTH, HIDDEN, sequence_parallel=True, **kw),
    ),
    "qkv": lambda **kw: QKVParallelLinear(HIDDEN, HEAD_DIM, HEADS, KV_HEADS, bias=True, **kw),
}


def run_stock(model, x, grad):
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grad)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


def run_parallel(group, cases):
    """For every case this rank's outputs and the gathered gradients, in the stock layout where the rank has it."""
    results = {}
    for name, (state, x, grad) in cases.items():
        layer = PARALLEL[name](group=group, dtype=x.dtype)
        load_full_state_dict(layer, state)
        own = slice(None)
        if name == "sequence":
            sizes = shard_range_sizes(TOKENS, group.world_size)
            own = slice(sum(sizes[: group.rank]), sum(sizes[: group.rank + 1]))
            x, grad = x[:, own], grad[:, own]
        elif name == "row_parallel_input":
            own = shard_width(WIDTH, group.world_size, group.rank)
            x = x[..., own.start : own.stop]
        elif name == "qkv":
            heads = shard_heads(HEADS, KV_HEADS, group.world_size, group.rank)
            # The replicas of a KV head share its gradient: give each an equal part (a sum that is exact).
            sharers = sum(
                shard_heads(HEADS, KV_HEADS, group.world_size, r).kv == heads.kv for r in range(group.world_size)
            )
            q, k, v = grad.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
            kv = slice(heads.kv.start * HEAD_DIM, heads.kv.stop * HEAD_DIM)
            q = q[..., heads.q.start * HEAD_DIM : heads.q.stop * HEAD_DIM]
            grad = torch.cat([q, k[..., kv] / sharers, v[..., kv] / sharers], dim=-1)
        x = x.clone().requires_grad_()
        out = layer(x)
        out.backward(grad)
        if name == "qkv":
            out = [part.detach() for part in layer.split(out)]
        else:
            out = out.detach()
        results[name] = {"out": out, "x": x.grad, **full_gradients(layer)}
    return results


def assemble(name, key, ranks):
    """The stock tensor from what the ranks returned, and whether it was whole on each of them."""
    values = [rank[name][key] for rank in ranks]
    if name == "sequence" and key in ("out", "x"):
        return torch.cat(values, dim=1)
    if name == "row_parallel_input" and key == "x":
        return torch.cat(values, dim=-1)
    if name == "qkv" and key == "out":
        parts = []
        for part, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)):
            full = values[0][0].new_zeros(BATCH, TOKENS, heads * HEAD_DIM)
            for rank, value in enumerate(values):
                shard = shard_heads(HEADS, KV_HEADS, len(ranks), rank)
                own = shard.q if part == 0 else shard.kv
                full[..., own.start * HEAD_DIM : own.stop * HEAD_DIM] = value[part]
            parts.append(full)
        return torch.cat(parts, dim=-1)
    for value in values[1:]:
        assert torch.equal(values[0], value), f"{name}: {key} differs between ranks"
    return values[0]


@functools.cache
def oracle(dtype):
    """What to run, and torch's results in ``dtype`` and in float64."""
    torch.manual_seed(0)
    cases, expected, reference = {}, {}, {}
    for name, make in STOCK.items():
        model = make().to(dtype)
        features = next(model.parameters()).shape[1]
        x = torch.randn(BATCH, TOKENS, features).to(dtype)
        grad = torch.randn(model(x).shape).to(dtype)
        if name == "qkv":
            grad = grad.mul(8).round() / 8 * 6  # exact when divided by 2 or 3 sharers
        cases[name] = (model.state_dict(), x, grad)
        expected[name] = run_stock(model, x, grad)
        reference[name] = run_stock(copy.deepcopy(model).double(), x.double(), grad.double())
    return cases, expected, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", WORLDS)
def test_outputs_and_gradients_equal_the_stock_layers(rank_pool, world_size, dtype):
    cases, expected, reference = oracle(dtype)
    ranks = rank_pool(world_size).run(run_parallel, cases)
    for name in cases:
        assert ranks[0][name].keys() == expected[name].keys()
        for key in expected[name]:
            actual = assemble(name, key, ranks)
            assert_close_to_reference(actual, expected[name][key], reference[name][key], name=f"{name}: {key}")


def check_options(group):
    """Options that change what is returned, from_linear, and partial sums."""
    torch.manual_seed(7)
    linear, x = nn.Linear(HIDDEN, WIDTH), torch.randn(3, HIDDEN)
    wide, y = nn.Linear(WIDTH, HIDDEN), torch.randn(3, WIDTH)
    exact = torch.allclose
    own = shard_width(WIDTH, group.world_size, group.rank)
    own = slice(own.start, own.stop)
    with torch.no_grad():
        column = ColumnParallelLinear.from_linear(linear, group=group)
        assert exact(column(x), linear(x)[:, own], atol=1e-6)
        assert torch.equal(column.weight, linear.weight[own]) and torch.equal(column.bias, linear.bias[own])
        skipping = ColumnParallelLinear.from_linear(linear, group=group, skip_bias_add=True)
        out, bias = skipping(x)
        assert exact(out + bias, linear(x)[:, own], atol=1e-6)
        out, bias = ColumnParallelLinear.from_linear(linear, group=group, skip_bias_add=True, gather_output=True)(x)
        assert bias.shape == (WIDTH,) and exact(out + bias, linear(x), atol=1e-6)
        row = RowParallelLinear.from_linear(wide, group=group)
        assert exact(row(y[:, own]), wide(y), atol=1e-6)
        out, bias = RowParallelLinear.from_linear(wide, group=group, skip_bias_add=True)(y[:, own])
        assert torch.equal(bias, wide.bias) and exact(out + bias, wide(y), atol=1e-6)
        partial, _ = RowParallelLinear.from_linear(wide, group=group, skip_bias_add=True, reduce_results=False)(
            y[:, own]
        )
        assert exact(group.all_reduce(partial) + wide.bias, wide(y), atol=1e-6)
        merged = MergedColumnParallelLinear.from_linear([linear, linear], group=group, names=("a", "b"))
        assert exact(merged(x), torch.cat([linear(x)[:, own]] * 2, -1), atol=1e-6)
        out, none = ColumnParallelLinear(HIDDEN, WIDTH, bias=False, group=group, skip_bias_add=True)(x)
        assert none is None and out.shape == (3, column.out_features_local)
        skew = [WIDTH - group.world_size + 1] + [1] * (group.world_size - 1)
        skewed = ColumnParallelLinear.from_linear(linear, group=group, partition=skew, gather_output=True)
        assert skewed.partition == skew and exact(skewed(x), linear(x), atol=1e-6)
        heads = [nn.Linear(HIDDEN, n * HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]
        qkv = QKVParallelLinear.from_linear(heads, head_dim=HEAD_DIM, group=group)
        shard = shard_heads(HEADS, KV_HEADS, group.world_size, group.rank)
        assert (qkv.num_heads_local, qkv.num_kv_heads_local) == (len(shard.q), len(shard.kv))
        for part, stock, own_heads in zip(qkv.split(qkv(x)), heads, (shard.q, shard.kv, shard.kv), strict=True):
            rows = slice(own_heads.start * HEAD_DIM, own_heads.stop * HEAD_DIM)
            assert exact(part, stock(x)[:, rows], atol=1e-6)
        out, bias = QKVParallelLinear.from_linear(heads, head_dim=HEAD_DIM, group=group, skip_bias_add=True)(x)
        assert exact(out + bias, qkv(x), atol=1e-6)
    tokens = torch.randn(2, 5, HIDDEN)
    parts = tokens.split(shard_range_sizes(5, group.world_size), dim=1)
    in_parts = QKVParallelLinear.from_linear(heads, head_dim=HEAD_DIM, group=group, sequence_parallel=True)
    assert exact(in_parts(parts[group.rank]), qkv(tokens), atol=1e-6)
    # Frozen parameters stay frozen, and what froze them is left alone.
    linear.weight.requires_grad_(False)
    frozen = ColumnParallelLinear.from_linear(linear, group=group)
    assert not frozen.weight.requires_grad and frozen.bias.requires_grad
    # Sequence parts of any length, given or asked for; also an empty one.
    lengths = [5, 0, 3, 1][: group.world_size]
    sequence = ColumnParallelLinear.from_linear(linear, group=group, sequence_parallel=True)
    tokens = torch.randn(2, sum(lengths), HIDDEN)
    part = tokens.split(lengths, dim=1)[group.rank]
    assert exact(sequence(part), linear(tokens)[..., own], atol=1e-6)
    assert torch.equal(sequence(part), sequence(part, sequence_sizes=lengths))
    # Fewer tokens than ranks leave some ranks without any.
    scattered = RowParallelLinear.from_linear(wide, group=group, sequence_parallel=True)(torch.randn(1, WIDTH)[:, own])
    assert scattered.shape == (1 if group.rank == 0 else 0, HIDDEN)


def check_initialisation(group):
    """Ranks seeded alike hold the shards of what one rank would have drawn."""
    torch.manual_seed(11)
    layers = [
        ColumnParallelLinear(HIDDEN, WIDTH, group=group),
        RowParallelLinear(WIDTH, HIDDEN, group=group),
        QKVParallelLinear(HIDDEN, HEAD_DIM, HEADS, KV_HEADS, bias=True, group=group),
    ]
    state_after = torch.get_rng_state()
    torch.manual_seed(11)
    stock = [nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN), STOCK["qkv"]()]
    assert torch.equal(state_after, torch.get_rng_state())
    for layer, unsharded in zip(layers, stock, strict=True):
        for shard in layer.tensor_shards():
            assert torch.equal(shard.target, unsharded.state_dict()[shard.name][shard.slices])
    # The meta device allocates and draws nothing; to_empty and reset_parameters make the layer real.
    meta = ColumnParallelLinear(HIDDEN, WIDTH, group=group, device="meta")
    assert meta.weight.is_meta and torch.equal(state_after, torch.get_rng_state())
    torch.manual_seed(11)
    meta.to_empty(device="cpu").reset_parameters()
    assert torch.equal(meta.weight, layers[0].weight)


def check_errors(group):
    world = group.world_size
    x = torch.randn(2, HIDDEN)
    column = ColumnParallelLinear(HIDDEN, WIDTH, group=group)
    row = RowParallelLinear(WIDTH, HIDDEN, group=group)
    bad = [
        (lambda: column(torch.randn(2, HIDDEN + 1)), r"expected an input of shape \[..., 40\]"),
        (lambda: column(torch.tensor(1.0)), r"expected an input of shape"),
        (lambda: column(x.double()), "expected an input of torch.float32"),
        (lambda: column(x.to("meta")), "expected an input on cpu"),
        (lambda: column([1.0] * HIDDEN), "expected a tensor .* got list"),
        (lambda: ColumnParallelLinear(8, 8, group=group, dtype=torch.int32), "floating-point torch.dtype"),
        (lambda: ColumnParallelLinear(8, 8, group=group, dtype="bfloat16"), "floating-point torch.dtype"),
        (lambda: ColumnParallelLinear.from_linear(nn.Conv1d(8, 8, 1), group=group), "an nn.Linear to shard"),
        (lambda: MergedColumnParallelLinear.from_linear([nn.Conv1d(8, 8, 1)], group=group), "an nn.Linear to shard"),
        (lambda: row(torch.randn(2, HIDDEN)), rf"expected an input of shape \[..., {row.in_features_local}\]"),
        (lambda: RowParallelLinear(8, 8, group=group, overlap="maybe"), "overlap must be one of"),
        (lambda: RowParallelLinear(8, 8, group=group, reduce_results=False), "skip_bias_add=True"),
        (lambda: ColumnParallelLinear(0, 8, group=group), "in_features must be a positive int"),
        (lambda: ColumnParallelLinear(8, 8.0, group=group), "out_features must be a positive int"),
        (lambda: ColumnParallelLinear(8, world - 1, group=group), "out_features"),
        (lambda: RowParallelLinear(world - 1, 8, group=group), "in_features"),
        (lambda: ColumnParallelLinear(8, 8, group=group, partition=[1]), "partition must be"),
        (lambda: MergedColumnParallelLinear(8, 8, group=group), "non-empty list"),
        (lambda: MergedColumnParallelLinear(8, [8, 8], names=["a", "a"], group=group), "different names"),
        (lambda: QKVParallelLinear(8, 4, world - 1, group=group), "num_heads|ranks cannot share"),
        (lambda: QKVParallelLinear(8, 4, 9, 2, group=group), "num_kv_heads must divide"),
        (lambda: QKVParallelLinear(8, 0, 9, group=group), "head_dim must be a positive int"),
        (lambda: QKVParallelLinear.from_linear([nn.Linear(8, 9)] * 3, head_dim=4, group=group), "whole heads of 4"),
        (lambda: column.load_full_weight(torch.ones(WIDTH, HIDDEN)), "expected a bias"),
        (lambda: column.load_full_weight(torch.ones(WIDTH), torch.ones(WIDTH)), r"expected shape \[101, 40\]"),
        (lambda: ColumnParallelLinear(8, 8, group="everyone"), "group must be"),
    ]
    for overlap in ("chunked", "fused"):
        asked = RowParallelLinear(WIDTH, HIDDEN, group=group, overlap=overlap)
        bad.append((lambda asked=asked: asked(torch.randn(2, asked.in_features_local)), "needs CUDA"))
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("check", [check_options, check_initialisation, check_errors], ids=lambda f: f.__name__)
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_behaviour(rank_pool, world_size, check):
    rank_pool(world_size).run(check)


def test_pairs_agree_on_the_dimension_between_them():
    for width in (100, 101, 1536, 8960):
        assert shard_width_sizes(width, 3) == [len(shard_width(width, 3, rank)) for rank in range(3)]
