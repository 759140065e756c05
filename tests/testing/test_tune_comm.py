"""``tp-kernels tune comm``: what needs no ranks on GPUs. Tier: no device; see tests/gpu_ranks/test_routed.py."""

import itertools
import json

import pytest

from tp_kernels import cli
from tp_kernels.comm.paths import LAMPORT, MEASURED_DTYPES, ONE_SHOT, SYMM, TWO_SHOT, default_table, route
from tp_kernels.testing.tune_comm import SIZES, order_of, spread, summary, table_of


def test_sizes_are_spread_so_that_a_short_run_sees_the_whole_range():
    order = spread(SIZES)
    assert sorted(order) == list(SIZES) and order[:2] == [SIZES[0], SIZES[-1]]
    for seen in range(2, len(order)):
        have = sorted(SIZES.index(size) for size in order[:seen])
        assert max(b - a for a, b in itertools.pairwise(have)) <= 2 * len(SIZES) / (seen - 1)
    assert spread([8]) == [8] and spread([1, 2]) == [1, 2]


def test_every_dtype_of_a_size_is_measured_before_the_next_size():
    order = list(order_of([2048, 1 << 20]))
    assert len(order) == len(set(order)) == 2 * (2 * len(MEASURED_DTYPES) + 1)
    assert [nbytes for nbytes, _, _ in order] == sorted(nbytes for nbytes, _, _ in order)
    for operation in ("all_reduce", "all_reduce_norm"):
        assert [dtype for nbytes, dtype, name in order if (nbytes, name) == (2048, operation)] == list(MEASURED_DTYPES)
    assert [dtype for _, dtype, name in order if name == "all_gather"] == ["bfloat16"] * 2  # bytes are bytes


EVERY = (LAMPORT, ONE_SHOT, TWO_SHOT, SYMM, "nccl", "gloo")


def test_what_is_written_is_what_groups_read():
    rows = {
        "bfloat16": {
            "all_reduce": {
                1 << 20: {ONE_SHOT: 30.123, TWO_SHOT: 20.0, "nccl": 10.0},
                2048: {LAMPORT: 4.0, ONE_SHOT: 5.0},
            },
            "all_gather": {2048: {SYMM: 9.0, "nccl": 5.0}, 4096: {}},
            "all_reduce_norm": {},
        },
        "float32": {"all_reduce": {2048: {LAMPORT: 6.0, ONE_SHOT: 5.0}, 1 << 20: {ONE_SHOT: 9.0, TWO_SHOT: 20.0}}},
    }
    content = json.loads(json.dumps(table_of(rows, "NVIDIA H100", 4, {"torch": "2.11"})))
    assert [row["bytes"] for row in content["us"]["bfloat16"]["all_reduce"]] == [2048, 1 << 20]
    assert len(content["us"]["bfloat16"]["all_gather"]) == 1 and content["world_size"] == 4
    table = default_table(4).with_measured(content)
    for dtype in ("bfloat16", "float16"):  # float16 was not measured: bfloat16 is as long
        assert route("all_reduce", 2048, 4, "ordered", EVERY, table, dtype=dtype) == LAMPORT
        assert route("all_reduce", 1 << 20, 4, "ordered", EVERY, table, dtype=dtype) == TWO_SHOT
    assert route("all_reduce", 2048, 4, "ordered", EVERY, table, dtype="float32") == ONE_SHOT
    assert route("all_reduce", 1 << 20, 4, "any", EVERY, table) == "nccl"
    assert route("all_gather", 2048, 4, "ordered", EVERY, table, exact=True, dtype="float32") == "nccl"
    lines = summary(table, EVERY)
    assert (
        'all_reduce of bfloat16, float16 with numerics "ordered": symm:lamport up to 45.3 KB, symm:two_shot from '
        "there on" in lines
    )
    assert 'all_reduce of float32 with numerics "ordered": symm:one_shot from there on' in lines
    assert "all_gather: nccl from there on" in lines


@pytest.mark.parametrize("words", [["comm"], ["comm", "--minutes", "1"]])
def test_it_says_how_to_be_started(capfd, monkeypatch, words):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["tune", *words]) == 2
    assert "tp-kernels launch --nproc N [--one-gpu] --module tp_kernels tune comm" in capfd.readouterr().err
