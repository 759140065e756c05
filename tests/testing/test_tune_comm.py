"""``tp-kernels tune comm``: what needs no ranks on GPUs. Tier: no device; see tests/gpu_ranks/test_routed.py."""

import itertools
import json

import pytest

from tp_kernels import cli
from tp_kernels.comm.paths import LAMPORT, ONE_SHOT, SYMM, TWO_SHOT, default_table, route
from tp_kernels.testing.tune_comm import SIZES, spread, summary, table_of


def test_sizes_are_spread_so_that_a_short_run_sees_the_whole_range():
    order = spread(SIZES)
    assert sorted(order) == list(SIZES) and order[:2] == [SIZES[0], SIZES[-1]]
    for seen in range(2, len(order)):
        have = sorted(SIZES.index(size) for size in order[:seen])
        assert max(b - a for a, b in itertools.pairwise(have)) <= 2 * len(SIZES) / (seen - 1)
    assert spread([8]) == [8] and spread([1, 2]) == [1, 2]


def test_what_is_written_is_what_groups_read():
    rows = {
        "all_reduce": {1 << 20: {ONE_SHOT: 30.123, TWO_SHOT: 20.0, "nccl": 10.0}, 2048: {LAMPORT: 4.0, ONE_SHOT: 5.0}},
        "all_gather": {2048: {SYMM: 9.0, "nccl": 5.0}, 4096: {}},
        "all_reduce_norm": {},
    }
    content = json.loads(json.dumps(table_of(rows, "NVIDIA H100", 4, {"torch": "2.11"})))
    assert [row["bytes"] for row in content["us"]["all_reduce"]] == [2048, 1 << 20]
    assert len(content["us"]["all_gather"]) == 1 and content["world_size"] == 4
    table = default_table(4).with_measured(content)
    every = (LAMPORT, ONE_SHOT, TWO_SHOT, SYMM, "nccl", "gloo")
    assert route("all_reduce", 2048, 4, "ordered", every, table) == LAMPORT
    assert route("all_reduce", 1 << 20, 4, "ordered", every, table) == TWO_SHOT
    assert route("all_reduce", 1 << 20, 4, "any", every, table) == "nccl"
    assert route("all_gather", 2048, 4, "ordered", every, table, exact=True) == "nccl"
    lines = summary(table, every)
    assert 'all_reduce with numerics "ordered": symm:lamport up to 45.3 KB, symm:two_shot from there on' in lines
    assert "all_gather: nccl from there on" in lines


@pytest.mark.parametrize("words", [["comm"], ["comm", "--minutes", "1"]])
def test_it_says_how_to_be_started(capfd, monkeypatch, words):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["tune", *words]) == 2
    assert "tp-kernels launch --nproc N [--one-gpu] --module tp_kernels tune comm" in capfd.readouterr().err
