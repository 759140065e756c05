"""Greedy choice and part embeddings as kernels, against PyTorch. Tier: no device (interpreter), or GPU."""

import pytest
import torch

from tp_kernels.ops.kernels.token_choice import embed_part, greedy_choice, greedy_offers, pick_offer


def logits_of(rows, words, dtype, device):
    """Integers, so that many are equal; rows with one NaN, one infinity, nothing finite, and a single finite one."""
    generator = torch.Generator().manual_seed(words)
    logits = torch.randint(-9, 9, (rows + 4, words), generator=generator).to(dtype)
    logits[rows, words // 2] = torch.nan
    logits[rows + 1, -1] = torch.inf
    logits[rows + 2] = -torch.inf
    logits[rows + 3] = -torch.inf
    logits[rows + 3, words // 3] = -5
    return logits.to(device)


def expected(logits):
    best, tokens = logits.float().max(-1)
    return torch.where(torch.isfinite(best), tokens, -1)


@pytest.mark.sanitize
@pytest.mark.parametrize("words", [1, 97, 2048, 4099])
def test_the_lowest_of_the_best(device, dtype, words):
    wide = logits_of(3, words + 3, dtype, device)
    for logits in (logits_of(3, words, dtype, device), wide[:, :words]):
        tokens, ids = (torch.full((7,), 77, dtype=torch.int64, device=device) for _ in range(2))
        greedy_choice(tokens, ids, logits)
        assert torch.equal(tokens, expected(logits)), words
        assert torch.equal(ids, expected(logits).clamp(min=0))


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", [(3000, 5), (40, 41, 39)])
def test_offers_of_all_ranks_make_the_token(device, dtype, sizes):
    logits = logits_of(4, sum(sizes), dtype, device)
    total = torch.zeros(len(sizes), 2, len(logits), device=device)
    for rank, part in enumerate(logits.split(sizes, dim=1)):
        offers = torch.full_like(total, 5.0)
        greedy_offers(offers, part, sum(sizes[:rank]), rank)
        total += offers
    tokens, ids = (torch.empty(len(logits), dtype=torch.int64, device=device) for _ in range(2))
    pick_offer(tokens, ids, total)
    assert torch.equal(tokens, expected(logits)) and torch.equal(ids, tokens.clamp(min=0))


@pytest.mark.sanitize
@pytest.mark.parametrize("width", [8, 1500])
def test_words_of_others_are_zero(device, dtype, width):
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    ids = torch.tensor([9, 10, 15, 16, 0, 12], device=device)
    rows = embed_part(ids, weight, 10)
    for row, word in zip(rows, ids.tolist(), strict=True):
        assert torch.equal(row, weight[word - 10] if 10 <= word < 16 else torch.zeros_like(row))
