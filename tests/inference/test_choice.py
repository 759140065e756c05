"""Tier: CPU ranks. TokenChooser against torch.argmax of the whole logits: ties, extremes, NaN, every dtype."""

import pytest
import torch

from tp_kernels.checkpoint.sharding import shard_vocab
from tp_kernels.inference.choice import TokenChooser
from tp_kernels.inference.sampling import SamplingParams
from tp_kernels.layers import ParallelLMHead

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


@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_all_ranks_choose_what_argmax_chooses(rank_pool, world_size):
    rank_pool(world_size).run(choose_all)
