"""Predicted times: by hand, against the goals' roofs, against published figures. Tier: no device."""

import itertools
from dataclasses import replace

import pytest

from tp_kernels.commands.plan import resolve_config
from tp_kernels.models.config import ModelConfig
from tp_kernels.planning import LINKS, MACHINES, Figure, Link, Machine, Workload, link, machine, plan
from tp_kernels.planning.links import all_gather, all_reduces
from tp_kernels.planning.memory import shards
from tp_kernels.planning.roofline import Format, Pass, predict, visible_pairs


def figure(value):
    return Figure(value, "", "made up")


SLOW = Machine(
    "slow",
    "a GPU of round numbers",
    memory=figure(1e6),
    peak_bandwidth=figure(1000),
    peak_matmul=figure(1e5),
    bandwidth=figure(1000),
    matmul=figure(1e5),
    attention=figure(2e4),
    kernel_gap=figure(0.01),
    small_kernel=figure(0.05),
    link="wire",
)
WIRE = Link("wire", "a wire", figure(0.001), figure(0.002), figure(1e4))
SMALL = ModelConfig("llama", 10, 16, 24, 1, 4, 2, 8, 64)  # 10 words, hidden 16, MLP 24, 1 layer, 4 / 2 heads of 8
LLAMA = resolve_config("llama3-8b")[1]
H100 = machine("h100")


def test_decode_by_hand():
    """Rank 0 of 2: two query heads, one KV head, 12 MLP channels, 5 words; one new token behind three; two bytes each.

    At 1000 B/s everything is bound by memory: weights, then what is read, then what is written.
    """
    qkv = (32 * 16 + 16 + 32) * 2 / 1000  # (2 + 1 + 1) heads of 8
    attention = (16 + 2 * 4 * 8 + 16) * 2 / 1000  # queries, four keys and values, results
    output = (16 * 16 + 16 + 16) * 2 / 1000
    up = (24 * 16 + 16 + 12) * 2 / 1000
    down = (16 * 12 + 12 + 16) * 2 / 1000
    head = (5 * 16 + 16 + 5) * 2 / 1000
    times = predict(SMALL, shards(SMALL, 2), Pass(1, 1, 3), Format(2), SLOW, WIRE)
    assert times.linear == pytest.approx(qkv + output + up + down + head) == pytest.approx(3.162)
    assert times.attention == pytest.approx(attention) == pytest.approx(0.192)
    assert times.gaps == pytest.approx(6 * 0.01)
    # The token is 32 bytes. Three sums: one-shot 0.001 + 32 / 1e4 and a norm of 128 bytes; or two-shot 0.002 +
    # 2 * 1/2 * 32 / 1e4 and half a norm. The embedding reads and writes the token.
    assert times.algorithm == "two-shot"
    assert times.elementwise == pytest.approx(64 / 1000 + 3 * (128 / 1000) / 2)
    # Half of the ten logits come from the other rank.
    assert times.communication == pytest.approx(3 * 0.0052 + 0.001 + 10 / 1e4)
    assert times.received == pytest.approx(3 * 32 + 10)
    assert times.total == pytest.approx(3.162 + 0.192 + 0.256 + 0.06 + 0.0176)
    alone = predict(SMALL, shards(SMALL, 2), Pass(1, 1, 3), Format(2), SLOW)
    assert alone.communication == 0 and alone.elementwise == pytest.approx(64 / 1000 + 3 * 128 / 1000)
    assert alone.roof == times.roof


def test_prefill_by_hand():
    """One rank, 2 rows of 40 tokens: the large products are bound by 1e5 FLOP/s, attention by 2e4."""
    busy = replace(SLOW, bandwidth=figure(1e9), small_kernel=figure(0.0), kernel_gap=figure(0.0))
    times = predict(SMALL, shards(SMALL, 1), Pass(2, 40), Format(2), busy)
    layer = 64 * 16 + 16 * 32 + 48 * 16 + 16 * 24
    assert times.linear == pytest.approx(2 * (80 * layer + 2 * 10 * 16) / 1e5)
    assert times.attention == pytest.approx(4 * 2 * 4 * 8 * (40 * 41 / 2) / 2e4)
    every = predict(SMALL, shards(SMALL, 1), Pass(2, 40, all_logits=True), Format(2), busy)
    assert every.linear - times.linear == pytest.approx(2 * 78 * 10 * 16 / 1e5)


def test_int8_by_hand():
    """One byte a weight and a scale of four a row; activations and cache keep their two bytes."""
    times = predict(SMALL, shards(SMALL, 1), Pass(1, 1, 3), Format(2, "int8"), SLOW)
    linears = [(64, 16, 64), (16, 32, 16), (48, 16, 24), (16, 24, 16), (10, 16, 10)]
    assert times.linear == pytest.approx(sum(n * k + 4 * n + 2 * (k + out) for n, k, out in linears) / 1000)


def test_pairs_that_see_each_other():
    for tokens, cached, window in itertools.product(range(1, 8), range(6), (None, 1, 2, 3, 5, 9)):
        places = range(cached, cached + tokens)
        seen = sum(min(place + 1, window or place + 1) for place in places)
        assert visible_pairs(tokens, cached, window) == seen


@pytest.mark.parametrize(
    "what, tp, workload, goal_ms",
    [
        ("decode", 1, Workload(), 5.0),
        ("decode", 4, Workload(), 1.25),
        ("decode", 1, Workload(quantize="int8"), 2.6),
        ("prefill", 1, Workload(all_logits=True), 84.0),
        ("prefill", 4, Workload(all_logits=True), 21.0),
    ],
)
def test_roofs_of_the_goals(what, tp, workload, goal_ms):
    """Llama-3-8B on an H100, batch 1: 15.01 GB a token at 3.0 TB/s; products at 798 TFLOP/s and 7 ms of attention."""
    row = plan("llama3-8b", LLAMA, H100, LINKS["nvlink4"], workload, (tp,)).row(tp)
    assert getattr(row, f"{what}_shard").roof * 1e3 == pytest.approx(goal_ms, rel=0.03)


@pytest.mark.parametrize(
    "name, ranks, size, algorithm, published_us",
    [
        ("nvlink4", 2, 6 * 6144 * 2, "one-shot", 6.70),  # FlagGems-vllm #773, with the norm
        ("nvlink4", 2, 138 * 6144 * 2, "one-shot", 12.94),
        ("nvlink4", 4, 512 << 10, "one-shot", 10),  # vLLM #24111
        ("nvlink4", 4, 4 << 20, "two-shot", 29),
        ("nvlink4", 4, 512 << 10, "ring", 17),
        ("nvlink4", 4, 4 << 20, "ring", 37),
        ("nvlink4", 8, 64 << 20, "ring", 348),  # TokenWeave, figure 4
        ("nvlink5", 4, 1 << 20, "two-shot", 17.7),  # NCCL contrib/custom_algos; the bytes there are multicast
        ("pcie-no-peer", 2, 10_000, "ring", 39),  # SGLang #39605
        ("pcie-no-peer", 2, 20_000_000, "ring", 10_900),
        ("one-gpu", 4, 2 << 10, "two-shot", 7.1),  # measured, ranks on one H100
        ("one-gpu", 4, 16 << 20, "two-shot", 77),
        ("one-gpu", 4, 64 << 20, "two-shot", 245),
    ],
)
def test_links_meet_published_figures(name, ranks, size, algorithm, published_us):
    ways = {way.algorithm: way for way in all_reduces(LINKS[name], ranks, size)}
    assert ways[algorithm].seconds * 1e6 == pytest.approx(published_us, rel=0.4)


@pytest.mark.parametrize("tokens, published_ms", [(1024, 53.7), (4096, 179.5)])
def test_prefill_meets_published_figures(tokens, published_ms):
    """Llama 70B on 8 H100 in vLLM without overlap (TokenWeave, figure 11a): slower than the best of every kernel."""
    _, config = resolve_config("llama3-70b")
    row = plan("llama3-70b", config, H100, LINKS["nvlink4"], Workload(prompt=tokens), (8,)).row(8)
    assert 0.7 * published_ms < row.prefill.total * 1e3 < published_ms


def test_costs_of_collectives():
    full = Link("l", "l", figure(1), figure(2), figure(100), figure(3), figure(0.5), figure(200))
    ways = {way.algorithm: way[:2] for way in all_reduces(full, 4, 800)}
    assert ways == {
        "one-shot": (1 + 3 * 800 / 100, 2400),
        "two-shot": (2 + 1.5 * 800 / 100, 1200),
        "ring": (3 + 6 * 0.5 + 1.5 * 800 / 200, 1200),
    }
    assert all_gather(full, 4, 800) == (1 + 600 / 100, 600, "one-shot")
    assert all_gather(full, 4, 80_000) == (3 + 3 * 0.5 + 60_000 / 200, 60_000, "ring")
    assert all_reduces(full, 1, 800) == [(0, 0, "none")] and all_gather(full, 1, 800).seconds == 0


def test_what_must_grow_grows():
    def made(gpu=H100, where="nvlink4", **work):
        return plan("m", LLAMA, gpu, LINKS[where], Workload(**work))

    base = made()
    rows = base.rows
    assert [row.tp for row in rows] == list(range(1, 9))
    for less, more in itertools.pairwise(rows):
        assert max(more.weight_bytes) <= max(less.weight_bytes) and more.max_batch >= less.max_batch
        assert more.prefill.roof <= less.prefill.roof and more.decode.roof <= less.decode.roof
        assert more.decode.received > less.decode.received
    for work, what in (
        (dict(batch=2), "decode"),
        (dict(context=2048), "decode"),
        (dict(prompt=5000), "prefill"),
        (dict(batch=2), "prefill"),
    ):
        for a, b in zip(rows, made(**work).rows, strict=True):
            assert getattr(b, what).total > getattr(a, what).total
    for row, longer, small in zip(rows, made(max_len=9000).rows, made(H100.with_given(memory=40)).rows, strict=True):
        assert longer.max_batch < row.max_batch and small.max_batch < row.max_batch
    for row, faster, int8 in zip(
        rows, made(H100.with_given(bandwidth=4)).rows, made(quantize="int8").rows, strict=True
    ):
        assert faster.decode.total < row.decode.total and int8.decode.total < row.decode.total
    assert made(H100.with_given(tflops=400)).row(1).prefill.roof == pytest.approx(
        2 * base.row(1).prefill.roof, rel=0.01
    )
    for row, slow in zip(rows[1:], made(where="pcie4").rows[1:], strict=True):
        assert slow.decode.total > row.decode.total and slow.prefill.total > row.prefill.total


def test_ranks_that_share_a_gpu_share_its_rates_and_memory():
    apart, together = (plan("m", LLAMA, H100, LINKS[name], sizes=(2, 4)) for name in ("nvlink4", "one-gpu"))
    for tp in (2, 4):
        assert together.row(tp).decode.linear == pytest.approx(tp * apart.row(tp).decode.linear)
        assert together.row(tp).decode_shard == apart.row(tp).decode_shard
        assert together.row(tp).decode_speedup < 1
        assert together.row(tp).max_batch < together.row(1).max_batch


def test_the_slowest_rank_counts():
    """Three ranks of SmolLM2's kind with 2 KV heads: the last has both its head's query heads, the first the MLP's."""
    config = ModelConfig("llama", 48, 64, 100, 1, 4, 2, 16, 64)
    ranks = shards(config, 3)
    assert [rank.q_heads for rank in ranks] == [1, 1, 2] and ranks[0].intermediate > ranks[2].intermediate
    slowest = [
        max(predict(config, [rank], Pass(1, 1, 500), Format(2), SLOW).attention for rank in ranks),
        predict(config, ranks, Pass(1, 1, 500), Format(2), SLOW).attention,
    ]
    assert slowest[0] == pytest.approx(slowest[1])
    together = predict(config, ranks, Pass(1, 1, 500), Format(2), SLOW)
    assert all(together.silent > predict(config, [rank], Pass(1, 1, 500), Format(2), SLOW).silent for rank in ranks)


def test_links_and_machines_are_found():
    assert link("auto", "nvlink3").name == link("nvlink", "nvlink3").name == "nvlink3"
    assert link("pcie", "nvlink4").name == "pcie5" and link("pcie-no-peer", "pcie4").name == "pcie-no-peer"
    with pytest.raises(ValueError, match="no NVLink"):
        link("nvlink", "pcie4")
    with pytest.raises(ValueError, match=r"unknown link 'infiniband'.*one-gpu"):
        link("infiniband", "nvlink4")
    with pytest.raises(ValueError, match=r"unknown GPU 'h1000'.*h100, h200, a100-80g, b200, l40s, rtx-4090"):
        machine("h1000")
    for gpu in MACHINES.values():
        assert link("auto", gpu.link).name == gpu.link and link("pcie", gpu.link).name.startswith("pcie")
        assert gpu.bandwidth.value < gpu.peak_bandwidth.value and gpu.matmul.value < gpu.peak_matmul.value
        assert all(given.source for _, given in (*gpu.figures(), *LINKS[gpu.link].figures()))
    with pytest.raises(ValueError, match="bandwidth must be above 0"):
        H100.with_given(bandwidth=0.0)
