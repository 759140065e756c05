"""Tier: CPU ranks. torch's ``parallelize_module`` with our styles against the plain model in one process.

tp 1, 2, 3 on a one-dimensional mesh; dp 2 x tp 2 beside FSDP2 and DDP.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from tp_kernels.checkpoint.sharding import shard_range_sizes
from tp_kernels.integrations import ColumnParallel, RowParallel, VocabParallel, parallel_plan
from tp_kernels.layers import (
    ColumnParallelLinear,
    ParallelLMHead,
    RowParallelLinear,
    VocabParallelEmbedding,
    full_gradients,
    full_state_dict,
)
from tp_kernels.testing.numeric import assert_close_to_reference, max_error
from tp_kernels.testing.tiny_models import TINY_MODELS, make_tiny_model

WORDS, HIDDEN, WIDTH, TOKENS, RATE = 23, 12, 37, 5, 0.5


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Embedding, two MLPs, logits; the weights of the first and the last are one parameter."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(WORDS, HIDDEN, padding_idx=3)
        self.blocks = nn.ModuleList([MLP(), MLP()])
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


PLAN = {
    "embed": VocabParallel(),
    "head": VocabParallel(),
    "blocks.*.up": ColumnParallel(),
    "blocks.*.down": RowParallel(),
}


def batch(rows):
    return torch.randint(0, WORDS, (rows, TOKENS), generator=torch.Generator().manual_seed(rows))


def loss_of(model, ids):
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


@contextlib.contextmanager
def mesh_of(group, *sizes, names=("tp",)):
    """A mesh as torch users make it; one rank alone has no torch.distributed yet."""
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", sizes or (group.world_size,), mesh_dim_names=names)
    finally:
        if alone:
            dist.destroy_process_group()


@functools.cache
def oracle(name=None, rows=2):
    """{dtype: (logits, gradients)} of the plain model, of this file or of ``tiny_models``."""
    found = {}
    ids = batch(rows) if name is None else family_ids(name)
    for dtype in (torch.float32, torch.float64):
        model = (Model() if name is None else make_tiny_model(name)).to(dtype)
        loss, logits = loss_of(model, ids)
        loss.backward()
        found[dtype] = logits.detach(), {key: p.grad for key, p in model.named_parameters()}
    return found


def assert_all_close(actual, of_torch, exact):
    """At most twice PyTorch's error; rounding of the whole model reaches every tensor: its worst is the scale."""
    assert set(exact) <= set(actual)
    allowed = 2 * max(max_error(of_torch[key], exact[key]) for key in exact)
    for key in exact:
        assert max_error(actual[key], exact[key]) <= allowed, key


# One dimension -------------------------------------------------------------------------------------------------------


def run_plan(group):
    with mesh_of(group) as mesh:
        # Ranks with other weights take rank 0's, as with torch's styles.
        model = Model(seed=group.rank)
        hooked = []
        model.blocks[0].up.register_forward_hook(lambda module, inputs, out: hooked.append(out.shape[-1]))
        before = {path: id(module) for path, module in model.named_modules()}
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.startswith("norm"):
                    parameter.fill_(float(key.endswith("weight")))
        assert parallelize_module(model, mesh, PLAN) is model
        assert before == {path: id(module) for path, module in model.named_modules()}
        assert type(model.embed) is VocabParallelEmbedding and type(model.head) is ParallelLMHead
        assert type(model.blocks[1].up) is ColumnParallelLinear and type(model.blocks[1].down) is RowParallelLinear
        assert model.head.weight is model.embed.weight
        loss, logits = loss_of(model, batch(2))
        loss.backward()
        assert hooked == [model.blocks[0].up.out_features_local]
        return logits.detach(), full_gradients(model), full_state_dict(model)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_plan_of_a_user(rank_pool, world_size):
    expected, state = oracle(), Model().state_dict()
    for logits, gradients, gathered in rank_pool(world_size).run(run_plan):
        assert_close_to_reference(logits, expected[torch.float32][0], expected[torch.float64][0])
        assert_all_close(gradients, expected[torch.float32][1], expected[torch.float64][1])
        assert gathered.keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(gathered[key], value), key


def family_ids(name):
    vocab = TINY_MODELS[name][1]["vocab_size"]
    return torch.randint(1, vocab, (2, 11), generator=torch.Generator().manual_seed(len(name)))


def run_families(group, names):
    torch.set_num_threads(1)
    results = {}
    with mesh_of(group) as mesh:
        for name in names:
            model = make_tiny_model(name)
            parallelize_module(model, mesh, parallel_plan(model))
            norms, calls = [module for path, module in model.named_modules() if path.endswith("q_norm")], []
            for norm in norms:
                norm.register_forward_hook(lambda *call, to=calls: to.append(call))
            loss, logits = loss_of(model, family_ids(name))
            assert len(calls) == len(norms)
            loss.backward()
            results[name] = logits.detach(), full_gradients(model)
    return results


@pytest.mark.parametrize(
    "world_size, names",
    [
        (1, ["llama-5h5-biased"]),
        (2, ["llama-9h3-tied-rope3", "qwen3-4h1"]),
        (3, ["qwen2-6h2-tied-window", "mistral-6h2-window"]),
    ],
)
def test_plan_of_a_hugging_face_model(rank_pool, world_size, names):
    pytest.importorskip("transformers")
    for results in rank_pool(world_size).run(run_families, names):
        for name, (logits, gradients) in results.items():
            expected = oracle(name)
            reference = expected[torch.float64][0]
            assert_close_to_reference(logits, expected[torch.float32][0], reference, name=name)
            assert_all_close(gradients, expected[torch.float32][1], expected[torch.float64][1])


def check_options(group):
    """Layouts and partitions, own weights, the meta device; then what is refused, with nothing changed."""
    world, rank = group.world_size, group.rank
    with mesh_of(group) as mesh:
        stock = MLP()
        for parameter in stock.parameters():
            group.broadcast(parameter.data)
        x = group.broadcast(torch.randn(2, TOKENS, HIDDEN))
        sizes = shard_range_sizes(TOKENS, world)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        spread = ColumnParallel(sequence_parallel=True), RowParallel(sequence_parallel=True, overlap="none")
        whole = ColumnParallel(gather_output=True), RowParallel(input_is_parallel=False)
        skewed = [WIDTH - world + 1] + [1] * (world - 1)
        skew = (
            ColumnParallel(partition=skewed),
            RowParallel(partition=lambda size: [WIDTH - size + 1] + [1] * (size - 1)),
        )
        for (up, down), part in ((spread, own), (whole, slice(None)), (skew, slice(None))):
            mlp = parallelize_module(copy.deepcopy(stock), mesh, {"up": up, "down": down})
            torch.testing.assert_close(mlp(x[:, part]), stock(x)[:, part])
        assert mlp.up.partition == mlp.down.partition == skewed
        # A style for the module itself; this rank's own values; frozen parameters; no memory on the meta device.
        linear = nn.Linear(HIDDEN, WIDTH).requires_grad_(False)
        with torch.no_grad():
            linear.weight.fill_(float(rank))
        assert parallelize_module(linear, mesh, ColumnParallel(), src_data_rank=None) is linear
        assert bool((linear.weight == rank).all()) and not linear.weight.requires_grad
        with torch.device("meta"):
            empty = Model()
        parallelize_module(empty, mesh, PLAN)
        assert empty.head.weight is empty.embed.weight and empty.blocks[0].up.weight.is_meta

        tied, lopsided = Model(), [WORDS - world + 1] + [1] * (world - 1)
        halves = {"embed": VocabParallel(), "head": ColumnParallel(partition=lopsided)}
        bad = [
            (nn.Conv1d(4, 4, 1), ColumnParallel(), "expected an nn.Linear, got Conv1d"),
            (nn.LayerNorm(4), VocabParallel(), "expected an nn.Embedding or nn.Linear, got LayerNorm"),
            (linear, ColumnParallel(), "got ColumnParallelLinear"),
            (nn.Linear(4, world - 1) if world > 1 else nn.Conv1d(4, 4, 1), ColumnParallel(), "out_features|Conv1d"),
            (nn.Linear(4, 9), ColumnParallel(partition=[1, 2]), "partition must be"),
            (nn.Embedding(9, 4, max_norm=1.0), VocabParallel(), "without max_norm"),
        ]
        for module, style, match in bad:
            kind = type(module)
            with pytest.raises(ValueError, match=match):
                parallelize_module(module, mesh, style)
            assert type(module) is kind
        if world > 1:  # one rank has everything either way
            with pytest.raises(ValueError, match="shared with a module that was cut in another way"):
                parallelize_module(tied, mesh, halves)
            assert type(tied.head) is nn.Linear
        with pytest.raises(ValueError, match="found no module"):
            parallel_plan(MLP())


@pytest.mark.parametrize("world_size", [1, 3])
def test_options_and_refusals(rank_pool, world_size):
    rank_pool(world_size).run(check_options)


def test_plan_is_short_and_knows_its_families():
    transformers = pytest.importorskip("transformers")
    plan = parallel_plan(make_tiny_model("qwen3-4h1"))
    assert set(plan) == {
        *(f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"model.layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        *("model.layers.*.self_attn", "model.embed_tokens", "lm_head"),
    }
    with torch.device("meta"):
        other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(ValueError, match="got gpt2"):
        parallel_plan(other)


# Two dimensions ------------------------------------------------------------------------------------------------------


def run_beside_data_parallelism(group):
    """Gathered gradients under FSDP2 and under DDP, each replica with its rows of the batch."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    ids, results = batch(4), {}
    with mesh_of(group, 2, 2, names=("dp", "tp")) as mesh:
        mine = ids.chunk(2)[mesh.get_local_rank("dp")]

        model = parallelize_module(Model(), mesh["tp"], PLAN)
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
        loss, logits = loss_of(model, mine)
        loss.backward()
        up = model.blocks[0].up
        assert isinstance(up.weight, DTensor) and up.weight.to_local().shape[0] < up.out_features_local
        assert all(isinstance(value, DTensor) for value in model.state_dict().values())
        (shard,) = [shard for shard in up.tensor_shards() if shard.name == "weight"]
        assert shard.full_shape == (WIDTH, HIDDEN)
        gradients = full_gradients(model)
        optimiser.step()
        results["fsdp"] = logits.detach(), gradients, full_state_dict(model)

        model = parallelize_module(Model(), mesh["tp"], PLAN)
        wrapped = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        loss, logits = loss_of(wrapped, mine)
        loss.backward()
        optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
        gradients = full_gradients(model)
        optimiser.step()
        results["ddp"] = logits.detach(), gradients, full_state_dict(model)
    return results


def test_beside_fsdp2_and_ddp(rank_pool):
    ids, found = batch(4), {}
    for dtype in (torch.float32, torch.float64):
        model = Model().to(dtype)
        logits = model(ids)
        # The mean of the replicas' means, which have as many tokens each.
        sum(loss_of(model, part)[0] for part in ids.chunk(2)).div(2).backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=RATE).step()
        found[dtype] = logits.detach(), gradients, model.state_dict()
    single, exact = found[torch.float32], found[torch.float64]
    for rank, results in enumerate(rank_pool(4).run(run_beside_data_parallelism)):
        rows = slice(0, 2) if rank < 2 else slice(2, 4)
        for kind, (logits, gradients, after) in results.items():
            assert_close_to_reference(logits, single[0][rows], exact[0][rows], name=kind)
            assert_all_close(gradients, single[1], exact[1])
            assert_all_close(after, single[2], exact[2])
