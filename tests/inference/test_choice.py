"""Tier: CPU ranks. Both ways to choose tokens against torch.argmax of the whole logits: ties, extremes, NaN, dtypes."""

from contextlib import nullcontext

import pytest
import torch

from tp_kernels.checkpoint.sharding import shard_vocab
from tp_kernels.inference.choice import TokenChooser
from tp_kernels.inference.device_sampling import choose_by_chance, choose_greedily
from tp_kernels.inference.sampling import SamplingParams
from tp_kernels.layers import ParallelLMHead
from tp_kernels.ops._gpu import H100, pretend

VOCAB = 11


def cases(dtype):
    ties = torch.zeros(4, VOCAB)
    ties[0, [3, 9]] = 5.0
    ties[1, [10, 4, 5]] = 1.0
    ties[2] = -7.0
    ties[3, 10] = 2.0
    return [ties.to(dtype), torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)]


def choose_all(group):
    head = ParallelLMHead(VOCAB, 8, group=group)
    words = shard_vocab(VOCAB, group.world_size, group.rank)
    greedy = TokenChooser(group, head, SamplingParams(), 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for logits in cases(dtype):
            local = logits[:, words.start : words.stop]
            assert greedy(local, [0, 1, 2, 3]) == logits.argmax(-1).tolist()
            cold = TokenChooser(group, head, SamplingParams(temperature=1.0, top_k=1, seed=0), 4)
            distinct = logits[3:] + torch.arange(VOCAB).to(dtype)
            assert cold(distinct[:, words.start : words.stop], [3]) == distinct.argmax(-1).tolist()
    for bad in (torch.nan, torch.inf):
        for word in (0, VOCAB - 1):
            logits = torch.zeros(2, VOCAB)
            logits[1, word] = bad
            for chooser in (greedy, TokenChooser(group, head, SamplingParams(temperature=1.0), 2)):
                with pytest.raises(ValueError, match="NaN"):
                    chooser(logits[:, words.start : words.stop].contiguous(), [0, 1])


def choose_all_on_the_device(group):
    """The same without the host; by the kernels too, which the interpreter runs here (not in bf16, where it errs)."""
    sizes = ParallelLMHead(VOCAB, 8, group=group).partition
    words = shard_vocab(VOCAB, group.world_size, group.rank)
    kernels = not torch.cuda.is_available()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        broken = torch.zeros(4, VOCAB, dtype=dtype)
        broken[0, 0], broken[1, -1], broken[2] = torch.nan, torch.inf, -torch.inf
        for logits in [*cases(dtype), broken]:
            local = logits[:, words.start : words.stop].contiguous()
            expected = logits.argmax(-1).masked_fill(~torch.isfinite(logits.amax(-1)), -1)
            cold = SamplingParams(temperature=1.0, top_k=1)
            uniform = torch.full((4,), 0.5, dtype=torch.float64)
            for pretended in (False, True) if kernels and dtype is not torch.bfloat16 else (False,):
                tokens, ids = torch.full((2, 4), 77)
                with pretend(H100) if pretended else nullcontext():
                    choose_greedily(tokens, ids, local, group, sizes)
                assert torch.equal(tokens, expected) and torch.equal(ids, expected.clamp(min=0)), (dtype, pretended)
            ranked = logits + torch.arange(VOCAB).to(dtype) * 16  # no two equal
            expected = ranked.argmax(-1).masked_fill(expected < 0, -1)
            choose_by_chance(tokens, ids, ranked[:, words.start : words.stop], uniform, cold, group, sizes)
            assert torch.equal(tokens, expected) and torch.equal(ids, expected.clamp(min=0)), dtype


@pytest.mark.parametrize("choose", (choose_all, choose_all_on_the_device))
@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_all_ranks_choose_what_argmax_chooses(rank_pool, world_size, choose):
    rank_pool(world_size).run(choose)
