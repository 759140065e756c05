"""The GPU all-reduce benchmark without a GPU: arguments, ratios, rows of one shape. Tier: no device."""

import pytest
import torch

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
    assert by_path["nccl"]["busbw"] == round((1 << 20) / 100e-6 / 1e9 * 1.5, 3)
    timed = {"all_reduce": timing(10), "fused": timing(11), "torch_two_shot+add_rms_norm": timing(22)}
    norms = norm_rows(common | {"kind": "norm"}, timed, dict.fromkeys(timed, 0))
    write_csv(tmp_path / "rows.csv", [*sums, *norms])
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    "words, match",
    [
        (["--ranks", "1"], "--ranks"),
        (["--tokens", "0"], "--tokens"),
        (["--min-bytes", "4K", "--max-bytes", "2K"], "min"),
        (["--min-bytes", "8"], "at least 16"),
        (["--max-bytes", "many"], "expected a size"),
    ],
)
def test_options_that_do_not_fit_are_named(words, match, capsys):
    with pytest.raises(SystemExit):
        bench.main(words)
    assert match in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        bench.main([])
    assert "there is no GPU here" in capsys.readouterr().err
