"""Tier: no device. Sampling filters against transformers' logits processors; the draw against exact probabilities."""

import pytest
import torch

from tp_kernels.inference.sampling import RowSampler, SamplingParams, filter_logits

transformers = pytest.importorskip("transformers")


def hf_filter(logits, temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    processors = [TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    for processor in processors:
        logits = processor(None, logits)
    return logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 4000])
@pytest.mark.parametrize("top_p", [1e-4, 0.5, 0.95, 1.0])
def test_filters_equal_transformers(temperature, top_k, top_p):
    logits = torch.randn(3, 1009, generator=torch.Generator().manual_seed(5)) * 4
    ours = filter_logits(logits, SamplingParams(temperature, top_k, top_p))
    torch.testing.assert_close(ours, hf_filter(logits, temperature, top_k, top_p), rtol=0, atol=0)


def test_filters_keep_ties_as_transformers():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    for top_k, top_p in ((1, 1.0), (2, 1.0), (0, 0.5), (2, 0.5), (4, 0.9)):
        ours = filter_logits(logits, SamplingParams(1.0, top_k, top_p))
        assert torch.equal(ours, hf_filter(logits, 1.0, top_k, top_p))


def test_filter_leaves_its_input_alone_and_computes_in_float32():
    logits = torch.randn(2, 11).bfloat16()
    kept = logits.clone()
    assert filter_logits(logits, SamplingParams(0.5, 3, 0.9)).dtype == torch.float32
    assert torch.equal(logits, kept)


def test_draws_follow_the_filtered_distribution():
    params = SamplingParams(temperature=0.8, top_k=5, top_p=0.9, seed=11)
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, 1.9, -3.0, 0.2])
    draws = 20000
    expected = filter_logits(logits, params).double().softmax(-1)
    sampler = RowSampler(params, 1)
    # One row's stream, many steps: what a long generation sees.
    counts = torch.zeros(8, dtype=torch.float64)
    for _ in range(draws // 1000):
        rows = [0] * 1000
        counts += torch.bincount(sampler(logits.expand(1000, 8), rows), minlength=8)
    assert (counts[expected == 0] == 0).all()
    sigma = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= 4 * sigma + 1e-9).all()


def test_a_row_does_not_depend_on_its_batch():
    params = SamplingParams(temperature=1.0, seed=3)
    logits = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0))
    together = RowSampler(params, 4)
    full = torch.stack([together(logits[:, step], [0, 1, 2, 3]) for step in range(6)], 1)
    # Row 1 leaves after two steps; the others must not notice.
    leaving = RowSampler(params, 4)
    for step in range(6):
        rows = [0, 1, 2, 3] if step < 2 else [0, 2, 3]
        assert torch.equal(leaving(logits[rows, step], rows), full[rows, step])


def test_seed_repeats_and_differs():
    logits = torch.zeros(1, 1000)

    def draw(seed):
        sampler = RowSampler(SamplingParams(temperature=1.0, seed=seed), 2)
        return [sampler(logits.expand(2, -1), [0, 1]).tolist() for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    rows = list(zip(*draw(1), strict=True))
    assert rows[0] != rows[1]


def test_greedy_takes_the_first_of_equals():
    sampler = RowSampler(SamplingParams(), 2)
    assert sampler(torch.tensor([[0.0, 5.0, 5.0], [1.0, 1.0, 1.0]]), [0, 1]).tolist() == [1, 0]


def test_never_draws_an_excluded_token_at_the_edges():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -torch.inf]]).expand(256, -1)
    sampler = RowSampler(SamplingParams(temperature=1.0, seed=0), 1)
    assert set(sampler(logits, [0] * 256).tolist()) == {1}


def test_nan_logits_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        RowSampler(SamplingParams(temperature=1.0, seed=0), 1)(torch.tensor([[0.0, torch.nan]]), [0])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_bad_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)
