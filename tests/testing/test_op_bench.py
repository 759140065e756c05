"""The op benchmarks run, and every competitor in them is right. Tier: no device (Triton's interpreter), GPU.

Tiny shapes: what is tested is the benchmarks themselves, so that none fails for the first time where time is short.
"""

import csv

import pytest
import torch

from tp_kernels import cli
from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.testing.op_bench import report
from tp_kernels.testing.op_bench.runner import Selection, bench_names, rows_of, run_case, select_cases

HAS_GPU = torch.cuda.is_available()
# Peers that compile take seconds each and prove nothing here.
SLOW_PEERS = ("torch.compile",)


@pytest.fixture
def device():
    if HAS_GPU:
        yield "cuda"
        return
    with pretend(H100):
        yield "cpu"


@pytest.mark.parametrize("name", bench_names())
def test_every_competitor_is_right(name, device):
    selection = Selection(ops=(name,), models=("tiny",), tps=(2,), dtypes=(torch.float16,), rows=(3,))
    rows, ops = [], set()
    for case in select_cases(selection):
        if case.op in ops and not HAS_GPU:
            continue  # one shape of each op is enough for the interpreter
        ops.add(case.op)
        assert case.bytes or case.flops, f"{case.op}: neither bytes nor operations are counted"
        names = [*case.peers, *(f"own:{path}" for path in case.own), *(["op"] if case.public else [])]
        assert "torch" in case.peers and case.own, f"{case.op}: needs a fallback and a path of ours"
        with torch.set_grad_enabled(bool(case.extra.get("grad", False))):
            only = [name for name in names if name not in SLOW_PEERS]
            result = run_case(case, device, rounds=1, only=only)
        # On a GPU libraries are among the peers, and not all of them take shapes so small.
        ours = [name for name in only if not HAS_GPU or name in ("torch", "op") or name.startswith("own:")]
        bad = {name: result.verdicts[name] for name in ours if not result.verdicts[name].good}
        assert not bad, f"{case.op} {case.label}: {bad}"
        assert set(result.times) >= set(ours)
        rows += rows_of(result, None)
    assert rows
    assert all(line["wrong_or_failed"] == 0 for line in report.summary(rows))


@pytest.mark.skipif(HAS_GPU, reason="what the command line does without a GPU")
def test_the_command_line_in_the_interpreter(tmp_path, capfd):
    words = "bench ops --op rms_norm --model tiny --rows 3 --dtype fp16 --rounds 1 --interpret --csv"
    assert cli.main([*words.split(), str(tmp_path / "ops.csv")]) == 0, capfd.readouterr().out
    with open(tmp_path / "ops.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["verdict"] for row in rows} == {"ok"}
    assert {"op", "torch", "own:triton"} <= {row["competitor"] for row in rows}


@pytest.mark.parametrize("name", bench_names())
def test_real_shapes_have_configurations_that_fit(name):
    """Configurations are dicts that a table can hold; sizes are those of one rank."""
    import json

    count = 0
    for case in select_cases(Selection(ops=(name,), models=("llama3-8b", "qwen3-8b"), tps=(1, 8))):
        count += 1
        assert all(isinstance(size, int) for size in case.sizes.values()), case.sizes
        for own in case.own.values():
            for config in own.configs:
                assert json.loads(json.dumps(dict(config))) == dict(config)
    assert count


def test_means_by_number_of_rows():
    def rows(m, n, peer, own):
        common = {"op": "linear", "case": f"{m} {n}", "dtype": "bfloat16", "sizes": f"m={m} n={n}", "verdict": "ok"}
        return [{**common, "competitor": name, "us": us} for name, us in (("torch", peer), ("own:gemv", own))]

    measured = [*rows(16, 8, 3.0, 2.0), *rows(1, 8, 4.0, 2.0), *rows(1, 16, 8.0, 1.0)]
    found = {line["m"]: line["own_times_best_peer"] for line in report.summary_by_rows(measured)}
    assert found == {1: 4.0, 16: 1.5} and list(found) == [1, 16]
    assert report.summary_by_rows(rows(1, 8, 4.0, 2.0)) == []


def test_what_launches_cost_can_be_measured(tmp_path, capfd):
    import runpy
    from pathlib import Path

    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "bench_launch.py"))
    words = ["--op", "rms_norm", "--model", "tiny", "--calls", "2", "--rounds", "1", "--csv"]
    run = script["run_command_line"]
    assert run(script["__doc__"], script["add_arguments"], script["run"], [*words, str(tmp_path / "l.csv")]) == 0
    with open(tmp_path / "l.csv", newline="") as file:
        found = {(row["op"], row["way"]): row["over_triton"] for row in csv.DictReader(file)}
    ways = ("torch", "op", "own:triton", "triton:triton")
    assert {*found} == {(op, way) for op in ("rms_norm", "add_rms_norm") for way in ways}
    assert all((ratio != "") == way.startswith("own:") for (_, way), ratio in found.items())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown op 'nonsense'; expected one of"):
        list(select_cases(Selection(ops=("nonsense",))))
    with pytest.raises(ValueError, match=r"unknown model 'gpt5'; expected one of llama3-8b"):
        list(select_cases(Selection(models=("gpt5",))))
