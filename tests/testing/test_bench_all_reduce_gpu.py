"""The GPU all-reduce benchmark without a GPU: arguments, ratios, rows of one shape. Tier: no device."""

from dataclasses import replace

from tp_kernels.testing import bench_all_reduce_gpu as bench
from tp_kernels.testing.bench import Timing, write_csv
from tp_kernels.testing.bench_all_reduce_norms import norm_rows


def timing(microseconds):
    return Timing(microseconds * 1e-6, microseconds * 0.9e-6, microseconds * 1.1e-6)


def test_graphs_get_shorter_with_longer_messages():
    calls = [bench.calls_for(1 << power) for power in range(11, 27)]
    assert calls == sorted(calls, reverse=True) and calls[0] == 50 and calls[-1] == 2


def test_rows_compare_with_the_peer_and_go_into_one_file(tmp_path):
    common = {"kind": "sum", "ranks": 4, "dtype": "bfloat16", "bytes": 1 << 20, "tokens": 0, "hidden": 0}
    timed = {"one_shot": timing(8), "torch_one_shot": timing(10), "two_shot": timing(5), "nccl": timing(100)}
    sums = bench.sum_rows(common, timed, dict.fromkeys(timed, 0))
    by_path = {row["path"]: row for row in sums}
    assert by_path["one_shot"]["over_peer"] == 0.8 and by_path["two_shot"]["over_peer"] == ""
    for wrong in ("one_shot", "torch_one_shot"):
        spoiled = bench.sum_rows(common, timed, dict.fromkeys(timed, 0) | {wrong: 1})
        assert {row["over_peer"] for row in spoiled} == {""}, "nothing to compare where one is wrong"
    assert by_path["nccl"]["busbw"] == round((1 << 20) / 100e-6 / 1e9 * 1.5, 3)
    timed = {"all_reduce": timing(10), "fused": timing(11), "torch_two_shot+add_rms_norm": timing(22)}
    norms = norm_rows(common | {"kind": "norm"}, timed, dict.fromkeys(timed, 0))
    write_csv(tmp_path / "rows.csv", [*sums, *norms])
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 8


def test_cases_come_in_order_and_say_what_they_are():
    options = bench.Options(sizes=(2048, 1 << 20), hidden=(64, 128), tokens=(1, 4))
    names = ["2K", "1M", "1 x 64", "4 x 64", "1 x 128", "4 x 128"]
    assert [str(case) for case in options.cases()] == names
    assert [str(case) for case in replace(options, what=("norms",)).cases()] == names[2:]
