"""State dicts in stock names, local and full; copies and conversions of layers. Tier: CPU ranks (1 and 3 processes)."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from tp_kernels.layers import (
    ColumnParallelLinear,
    ParallelDecoderLayer,
    ParallelLMHead,
    RotaryEmbedding,
    VocabParallelEmbedding,
    full_gradients,
    full_state_dict,
    iter_tensor_shards,
    load_full_state_dict,
)

STOCK_SHAPES = {
    "embed_tokens.weight": (101, 40),
    "layer.self_attn.q_proj.weight": (72, 40),
    "layer.self_attn.q_proj.bias": (72,),
    "layer.self_attn.k_proj.weight": (8, 40),
    "layer.self_attn.k_proj.bias": (8,),
    "layer.self_attn.v_proj.weight": (8, 40),
    "layer.self_attn.v_proj.bias": (8,),
    "layer.self_attn.o_proj.weight": (40, 72),
    "layer.self_attn.o_proj.bias": (40,),
    "layer.self_attn.q_norm.weight": (8,),
    "layer.self_attn.k_norm.weight": (8,),
    "layer.mlp.gate_proj.weight": (100, 40),
    "layer.mlp.up_proj.weight": (100, 40),
    "layer.mlp.down_proj.weight": (40, 100),
    "layer.input_layernorm.weight": (40,),
    "layer.post_attention_layernorm.weight": (40,),
    "counter": (2,),
    "plain.weight": (5, 40),
    "lm_head.weight": (101, 40),
}


class Model(nn.Module):
    """Parallel layers, a plain module, a persistent and a non-persistent buffer, and a tied head."""

    def __init__(self, group, **factory):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(101, 40, group=group, **factory)
        options = dict(qkv_bias=True, o_bias=True, qk_norm=True, rope=RotaryEmbedding(8), group=group)
        self.layer = ParallelDecoderLayer(40, 100, 9, 1, 8, **options, **factory)
        self.plain = nn.Linear(40, 5, bias=False, **factory)
        self.register_buffer("counter", torch.arange(2.0))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.lm_head = ParallelLMHead(101, 40, group=group, **factory).tie_weights(self.embed_tokens)

    def forward(self, ids):
        x, residual = self.layer(self.embed_tokens(ids))
        return self.lm_head(x + residual)


IDS = torch.tensor([[5, 100, 0, 33, 7]])


def check_names_and_shapes(group):
    torch.manual_seed(0)
    model = Model(group)
    assert set(model.state_dict()) == set(STOCK_SHAPES)
    full = full_state_dict(model)
    assert {name: tuple(tensor.shape) for name, tensor in full.items()} == STOCK_SHAPES
    # The same as the model on one rank, seeded alike; and no memory shared with the parameters.
    torch.manual_seed(0)
    alone = Model(OnOneRank.group())
    for name, tensor in alone.state_dict().items():
        assert torch.equal(full[name], tensor), name
    for tensor in full.values():
        tensor.zero_()
    assert model.plain.weight.abs().sum() > 0 and model.layer.mlp.gate_up_proj.weight.abs().sum() > 0
    shards = {shard.name: shard for shard in iter_tensor_shards(model)}
    assert set(shards) == set(STOCK_SHAPES) - {"lm_head.weight"}, "tied once"
    assert {f"model.{name}" for name in shards} == {shard.name for shard in iter_tensor_shards(model, "model")}
    local = model.state_dict()
    for name, shard in shards.items():
        assert shard.full_shape == STOCK_SHAPES[name]
        assert torch.equal(shard.target, local[name])
        assert torch.equal(shard.target, alone.state_dict()[name][shard.slices])
        shard.target.fill_(2.0)
    assert all(bool((parameter == 2.0).all()) for parameter in model.parameters()), "targets are views of all of it"


class OnOneRank:
    """A group of one inside a larger world."""

    @staticmethod
    def group():
        from tp_kernels.comm.communicator import LocalCommunicator
        from tp_kernels.comm.process_group import TPGroup

        return TPGroup(LocalCommunicator())


def check_round_trips(group):
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        model, other = Model(group, dtype=dtype), Model(group, dtype=dtype)
        expected = model(IDS)
        full = full_state_dict(model)
        assert load_full_state_dict(other, full) == ([], [])
        for name, tensor in full_state_dict(other).items():
            assert torch.equal(tensor, full[name]) and tensor.dtype == full[name].dtype, name
        assert torch.equal(other(IDS), expected)
        # torch's own way: local shards under the stock names, through a file.
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        third = Model(group, dtype=dtype)
        assert str(third.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
        assert torch.equal(third(IDS), expected)
        assigned = Model(group, device="meta", dtype=torch.float32)
        assigned.load_state_dict(model.state_dict(), assign=True)
        assert not any(parameter.is_meta for parameter in assigned.parameters())
        assert torch.equal(assigned(IDS), expected)


def check_strictness(group):
    torch.manual_seed(2)
    model = Model(group)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = dict(before)
    del wrong["layer.self_attn.k_proj.bias"], wrong["plain.weight"]
    wrong["layer.self_attn.rotary.inv_freq"] = torch.ones(4)
    wrong["layer.mlp.gate_proj.bias"] = torch.ones(4)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(wrong)
    text = str(error.value)
    assert 'Missing key(s) in state_dict: "layer.self_attn.k_proj.bias", "plain.weight"' in text
    assert 'Unexpected key(s) in state_dict: "layer.self_attn.rotary.inv_freq", "layer.mlp.gate_proj.bias"' in text
    loose = model.load_state_dict(wrong, strict=False)
    assert loose.missing_keys == ["layer.self_attn.k_proj.bias", "plain.weight"]
    assert loose.unexpected_keys == ["layer.self_attn.rotary.inv_freq", "layer.mlp.gate_proj.bias"]
    with pytest.raises(RuntimeError, match="size mismatch for layer"):
        model.load_state_dict({**before, "layer.mlp.up_proj.weight": torch.ones(2, 2)})
    assert set(wrong) == set(before) - {"layer.self_attn.k_proj.bias", "plain.weight"} | {
        "layer.self_attn.rotary.inv_freq",
        "layer.mlp.gate_proj.bias",
    }, "the caller's dict is left alone"

    full = full_state_dict(model)
    bad = dict(full)
    del bad["layer.self_attn.v_proj.weight"]
    bad["surplus"] = torch.ones(1)
    bad["layer.mlp.up_proj.weight"] = torch.ones(3, 3)
    bad["embed_tokens.weight"] = torch.zeros(101, 40)
    with pytest.raises(ValueError) as error:
        load_full_state_dict(model, bad)
    for part in ("v_proj.weight is missing", "surplus is unexpected", r"up_proj.weight has shape [3, 3], expected"):
        assert part in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "a refused load changes nothing"
    del bad["layer.mlp.up_proj.weight"], full["lm_head.weight"]
    missing, unexpected = load_full_state_dict(model, bad, strict=False)
    assert missing == ["layer.self_attn.v_proj.weight", "layer.mlp.up_proj.weight"] and unexpected == ["surplus"]
    load_full_state_dict(model, full)  # one name of a tied weight is enough


def check_manners(group):
    torch.manual_seed(3)
    model = Model(group)
    twin = copy.deepcopy(model)
    assert twin.layer.mlp.group is group and twin.layer.self_attn.qkv_proj.group is group
    assert twin.lm_head.weight is twin.embed_tokens.weight and twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(twin(IDS), model(IDS))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in full_state_dict(half).values()} == {torch.bfloat16}
    assert half.layer.self_attn.rope.tables(5, torch.device("cpu"))[0].dtype == torch.float32
    # Gradients of all parameters, gathered under the stock names.
    twin(IDS).sum().backward()
    assert set(full_gradients(twin)) == set(STOCK_SHAPES) - {"counter", "plain.weight"}
    # A step of gradient descent keeps the replicated parameters equal on all ranks.
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    for shard in iter_tensor_shards(twin):
        if shard.dim is None:
            first = group.broadcast(shard.target.clone(), 0)
            assert torch.equal(first, shard.target), shard.name
    meta = Model(group, device="meta")
    assert [s.full_shape for s in iter_tensor_shards(meta)] == [s.full_shape for s in iter_tensor_shards(model)]
    # A fused layer on its own, and one inside a module that is not ours, keep their own prefix.
    alone = nn.Sequential(copy.deepcopy(model.layer.mlp.down_proj), ColumnParallelLinear(40, 7, group=group))
    assert list(alone.state_dict()) == ["0.weight", "1.weight", "1.bias"]


CHECKS = [check_names_and_shapes, check_round_trips, check_strictness, check_manners]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("world_size", [1, 3])
def test_state_dict(rank_pool, world_size, check):
    rank_pool(world_size).run(check)
