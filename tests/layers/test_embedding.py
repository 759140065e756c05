"""VocabParallelEmbedding and ParallelLMHead against torch.nn. Tier: CPU ranks (1 to 4 processes)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tp_kernels.layers import (
    ParallelLMHead,
    VocabParallelEmbedding,
    full_gradients,
    full_state_dict,
    iter_tensor_shards,
    load_full_state_dict,
)
from tp_kernels.testing.numeric import assert_close_to_reference

VOCAB, HIDDEN, PADDING = 101, 24, 40


class Tied(nn.Module):
    """Embedding and head around a non-linearity, with one weight or with two."""

    def __init__(self, embed, head):
        super().__init__()
        self.embed, self.head = embed, head

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def stock(tied):
    model = Tied(nn.Embedding(VOCAB, HIDDEN, padding_idx=PADDING), nn.Linear(HIDDEN, VOCAB, bias=not tied))
    if tied:
        model.head.weight = model.embed.weight
    return model


def parallel(group, tied, dtype, **options):
    embed = VocabParallelEmbedding(VOCAB, HIDDEN, padding_idx=PADDING, group=group, dtype=dtype)
    if tied:
        return Tied(embed, ParallelLMHead.from_embedding(embed, **options))
    return Tied(embed, ParallelLMHead(VOCAB, HIDDEN, bias=True, group=group, dtype=dtype, **options))


def run_stock(model, ids, grad):
    out = model(ids)
    out.backward(grad)
    return {"out": out.detach(), "embedded": model.embed(ids).detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


def run_parallel(group, cases):
    results = {}
    for tied, (state, ids, grad) in cases.items():
        model = parallel(group, tied, grad.dtype)
        load_full_state_dict(model, state)
        if tied:
            assert model.head.weight is model.embed.weight
            # One tensor to read from a checkpoint, two names in a state dict, as in torch.
            assert [shard.name for shard in iter_tensor_shards(model)] == ["embed.weight"]
            assert list(full_state_dict(model)) == ["embed.weight", "head.weight"]
        out = model(ids)
        out.backward(grad)
        results[tied] = {"out": out.detach(), "embedded": model.embed(ids).detach(), **full_gradients(model)}
        local = parallel(group, tied, grad.dtype, gather_output=False)
        load_full_state_dict(local, state)
        own = slice(local.head.vocab_range.start, local.head.vocab_range.stop)
        assert torch.equal(local(ids), out[..., own])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_lookup_and_logits_equal_the_stock_modules(rank_pool, world_size, dtype):
    torch.manual_seed(world_size)
    ids = torch.randint(0, VOCAB, (3, 11))
    ids[0, :4] = torch.tensor([0, VOCAB - 1, PADDING, PADDING])
    cases, expected, reference = {}, {}, {}
    for tied in (False, True):
        model = stock(tied).to(dtype)
        grad = torch.randn(3, 11, VOCAB).to(dtype)
        cases[tied] = (model.state_dict(), ids, grad)
        expected[tied] = run_stock(model, ids, grad)
        reference[tied] = run_stock(copy.deepcopy(model).double(), ids, grad.double())
    for rank, results in enumerate(rank_pool(world_size).run(run_parallel, cases)):
        for tied, result in results.items():
            assert torch.equal(result["embedded"], expected[tied]["embedded"]), "a lookup is exact"
            for key, value in expected[tied].items():
                what = f"rank {rank}, {'tied' if tied else 'untied'}: {key}"
                assert_close_to_reference(result[key], value, reference[tied][key], name=what)


def check_behaviour(group):
    world = group.world_size
    torch.manual_seed(3)
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, padding_idx=-1, group=group)
    torch.manual_seed(3)
    unsharded = nn.Embedding(VOCAB, HIDDEN, padding_idx=-1)
    # The same draw as torch's, and from_embedding takes over what there is.
    assert torch.equal(full_state_dict(embedding)["weight"], unsharded.weight)
    taken = VocabParallelEmbedding.from_embedding(unsharded.requires_grad_(False), group=group)
    assert torch.equal(taken.weight, embedding.weight) and not taken.weight.requires_grad
    assert taken.padding_idx == VOCAB - 1
    ids = torch.randint(0, VOCAB, (5,), dtype=torch.int32)
    assert torch.equal(taken(ids), unsharded(ids))
    assert taken(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, HIDDEN)
    head = ParallelLMHead.from_linear(nn.Linear(HIDDEN, VOCAB), group=group)
    assert head.vocab_range == embedding.vocab_range
    bad = [
        (lambda: embedding(torch.tensor([VOCAB])), r"expected ids in \[0, 101\), got 101"),
        (lambda: embedding(torch.tensor([-1])), "expected ids in"),
        (lambda: embedding(torch.tensor([1.0])), "int64 or int32"),
        (lambda: embedding([1]), "int64 or int32 ids, got list"),
        (lambda: embedding(ids.to("meta")), "expected ids on cpu"),
        (lambda: VocabParallelEmbedding(9, 0, group=group), "embedding_dim must be a positive int"),
        (lambda: VocabParallelEmbedding(world - 1, 4, group=group), "num_embeddings"),
        (lambda: VocabParallelEmbedding(9, 4, padding_idx=9, group=group), "padding_idx"),
        (lambda: ParallelLMHead(VOCAB, 8, group=group).tie_weights(embedding), r"expected an embedding of \[101, 8\]"),
        (lambda: VocabParallelEmbedding.from_embedding(nn.Embedding(9, 4, max_norm=1.0), group=group), "max_norm"),
        (lambda: embedding.load_full_weight(torch.ones(3, 3)), r"expected shape \[101, 24\]"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("world_size", [1, 3])
def test_behaviour(rank_pool, world_size):
    rank_pool(world_size).run(check_behaviour)


def test_lookup_compiles_without_graph_breaks():
    embedding = VocabParallelEmbedding(11, 6)
    ids = torch.tensor([[0, 10, 3]])
    compiled = torch.compile(embedding, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), nn.functional.embedding(ids, embedding.weight))
