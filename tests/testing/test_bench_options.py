"""Options of the benchmarks over ranks that do not fit: one message, before anything starts. Tier: no device."""

import pytest
import torch

from tp_kernels.commands import bench_layer
from tp_kernels.testing import bench_all_reduce_gpu, bench_overlap


@pytest.mark.parametrize(
    "bench, words, match",
    [
        (bench_all_reduce_gpu, ["--ranks", "1"], "--ranks"),
        (bench_all_reduce_gpu, ["--tokens", "0"], "--tokens"),
        (bench_all_reduce_gpu, ["--min-bytes", "4K", "--max-bytes", "2K"], "min"),
        (bench_all_reduce_gpu, ["--min-bytes", "8"], "at least 16"),
        (bench_all_reduce_gpu, ["--max-bytes", "many"], "expected a size"),
        (bench_all_reduce_gpu, ["--minutes", "0"], "--minutes must be above 0"),
        (bench_layer, ["--ranks", "1"], "--ranks"),
        (bench_layer, ["--tokens", "0"], "--tokens"),
        (bench_layer, ["--context", "0"], "--context"),
        (bench_layer, ["--layers", "0"], "--layers"),
        (bench_layer, ["--minutes", "-1"], "--minutes must be above 0"),
        (bench_overlap, ["--ranks", "1"], "--ranks"),
        (bench_overlap, ["--growth", "0"], "--growth"),
        (bench_overlap, ["--max-ctas", "65"], "--max-ctas"),
        (bench_overlap, ["--minutes", "0"], "--minutes must be above 0"),
        (bench_overlap, ["--device", "cpu", "--tune"], "FILE"),
        (bench_overlap, ["--op", "linear"], "--op"),
    ],
)
def test_options_that_do_not_fit_are_named(bench, words, match, capsys):
    with pytest.raises(SystemExit):
        bench.main(words)
    assert match in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("bench", [bench_all_reduce_gpu, bench_layer, bench_overlap])
def test_without_a_gpu_it_says_so(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main([])
    assert "there is no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("bench", [bench_all_reduce_gpu, bench_layer, bench_overlap])
def test_a_run_that_measured_nothing_is_no_success(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_on_ranks", lambda *_, **__: [])
    with pytest.raises(SystemExit):
        bench.main(["--minutes", "0.5"])
    assert "nothing was measured" in capsys.readouterr().err
