"""The decoder layer benchmark on CPU ranks: cases, ratios, the whole way to the file. Tier: 2 processes."""

import contextlib
import csv
import io
import time

from tp_kernels.comm import LocalCommunicator, TPGroup
from tp_kernels.commands import bench_layer as bench
from tp_kernels.testing.bench import Timing
from tp_kernels.testing.rank_bench import cases_in_time

TINY = bench.Options(model="tiny", tokens=6, context=(5, 300), layers=2, rounds=2, device="cpu")


def timing(microseconds):
    return Timing(microseconds * 1e-6, microseconds * 0.9e-6, microseconds * 1.1e-6)


def test_cases():
    found = bench.cases(TINY)
    assert [case[:3] for case in found] == [
        ("prefill", 6, None),
        ("prefill_cache", 6, 0),
        ("decode", 1, 5),
        ("decode", 1, 300),
    ]
    (only,) = bench.cases(bench.Options(what=("decode",)))
    assert only[:3] == ("decode", 1, 1024)


def test_what_the_minutes_leave_out_is_named(capsys):
    group = TPGroup(LocalCommunicator())
    found = bench.cases(TINY)
    assert list(cases_in_time(group, found, 1.0, time.monotonic())) == found
    assert capsys.readouterr().out == ""
    late = cases_in_time(group, found, 1.0, time.monotonic() - 50, share=0.8, what="passes")
    assert list(late) == []
    names = "prefill of 6, prefill_cache of 6, decode of 1 after 5, decode of 1 after 300"
    assert capsys.readouterr().out == f"# left out: passes because --minutes 1 were over: {names}\n"


def test_rows_compare_with_communication_switched_off():
    timed = {"off": timing(40), "fused": timing(42), "nccl": timing(80)}
    off, fused, nccl = bench.layer_rows({"what": "decode"}, timed, {"fused": 0, "nccl": 2}, layers=4)
    assert off["time_us"] == 10.0 and off["over_off"] == 1.0 and off["wrong"] == 0
    assert fused["time_us"] == 10.5 and fused["over_off"] == 1.05 and fused["q20_us"] == 9.45
    assert nccl["over_off"] == 2.0 and nccl["wrong"] == 2


def measured(group, switch_off=False):
    """Rows, and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if switch_off:
            off = bench._switched_off(group)
            rows = bench._measure(group, {"off": off, "shm": off}, None, TINY)
        else:
            rows = bench.measure(group, TINY)
    return rows, printed.getvalue()


def test_on_ranks(rank_pool):
    (first, printed), (second, nothing) = rank_pool(2).run(measured)
    assert first == second and [row["path"] for row in first] == ["off", "shm"] * 4
    assert all(row["wrong"] == 0 and row["time_us"] > 0 and row["ranks"] == 2 for row in first)
    assert "decode 1 after 300  off" in printed and "prefill 6  off" in printed and not nothing


def test_missing_sums_are_wrong(rank_pool):
    (rows, _), (_, printed) = rank_pool(2).run(measured, True)
    assert [row["wrong"] for row in rows] == [0, 2] * 4
    assert "# WRONG: decode, shm, rank 1" in printed


def test_command_starts_ranks_and_writes_the_file(tmp_path):
    words = "--ranks 2 --device cpu --model tiny --tokens 3 --layers 1 --rounds 1 --what prefill --dtype float16"
    assert bench.main([*words.split(), "--csv", str(tmp_path / "layer.csv")]) == 0
    with open(tmp_path / "layer.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["off", "shm"] and rows[0]["over_off"] == "1.0"
    assert rows[0]["timed"] == "host" and rows[0]["context"] == "" and rows[0]["dtype"] == "float16"
