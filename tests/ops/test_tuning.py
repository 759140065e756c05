"""Tuning tables: lookup, files, and the tuner that writes them. Tier: no device."""

import dataclasses
import json
import time

import pytest
import torch

from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import A100, H100, GpuInfo
from tp_kernels.testing.op_bench.case import Case, Own, randn
from tp_kernels.testing.op_bench.tuner import Table, tune_case


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()
    yield tmp_path
    tuning.forget_tables()


def write(folder, rows, op="made_up"):
    content = {"gpu": H100.name, "measured": "2026-01-01", "versions": {}, "ops": {op: rows}}
    (folder / "h100.json").write_text(json.dumps(content))
    tuning.forget_tables()


def row(path="own", dtype="16bit", **sizes):
    return {"dtype": dtype, "sizes": sizes, "path": path, "config": {"block": 64}, "us": {"own": 1.0, "torch": 2.0}}


def test_nothing_measured_is_none():
    assert tuning.lookup("made_up", H100, torch.bfloat16, m=1) is None


def test_nearest_shape_decides_within_a_factor_of_two(tables):
    write(tables, [row("a", m=16, n=4096), row("b", m=64, n=4096)])
    find = lambda m, n=4096, dtype=torch.bfloat16, gpu=H100: tuning.lookup("made_up", gpu, dtype, m=m, n=n)  # noqa: E731
    assert find(16).path == "a" and find(20).path == "a" and find(48).path == "b" and find(128).path == "b"
    assert find(8).path == "a" and find(7) is None and find(129) is None
    assert find(16, n=8192).path == "a" and find(16, n=8193) is None
    assert find(16, dtype=torch.float16).path == "a" and find(16, dtype=torch.float32) is None
    assert find(16, gpu=A100) is None
    assert tuning.lookup("made_up", H100, torch.bfloat16, m=16) is None, "a size of the entry is missing"
    entry = find(16)
    assert entry.config == {"block": 64} and entry.figures() == "own 1.0 us, torch 2.0 us"
    assert entry.source == f"{H100.name}, 2026-01-01"


def test_zero_marks_a_property(tables):
    write(tables, [row("full", m=16, causal=0), row("causal", m=16, causal=1)])
    find = lambda causal: tuning.lookup("made_up", H100, torch.bfloat16, m=16, causal=causal)  # noqa: E731
    assert find(0).path == "full" and find(1).path == "causal"


@pytest.mark.parametrize("content", [b"{}", b"[]", b"", b"\xff\xfe\x00"], ids=repr)
def test_damaged_table_is_named(tables, content):
    (tables / "h100.json").write_bytes(content)
    tuning.forget_tables()
    with pytest.raises(ValueError, match=r"h100\.json is not a tuning table.*tp-kernels tune"):
        tuning.lookup("made_up", H100, torch.bfloat16, m=1)


def test_names_of_tables():
    assert H100.slug == "h100" and A100.slug == "a100"
    assert GpuInfo("NVIDIA GeForce RTX 4090", (8, 9), 128).slug == "nvidia-geforce-rtx-4090"


def test_shipped_tables_are_valid():
    for path in tuning.shipped_table("x").parent.glob("*.json"):
        entries = tuning.read_table(path)
        assert entries, path
        for (_, kind), found in entries.items():
            assert kind in ("16bit", "float32")
            for entry in found:
                assert entry.us and (entry.path == "torch" or entry.us[entry.path] <= entry.us["torch"])


def made_up_case(own, peer) -> Case:
    return Case(
        op="made_up",
        label="made up",
        sizes={"m": 8},
        dtype=torch.float32,
        inputs=lambda generator: (randn(generator, 8, 8, dtype=torch.float32),),
        reference=lambda x: x.double() * 2,
        peers={"torch": peer},
        own=own,
        bytes=512,
    )


def slow(x):
    time.sleep(0.05)
    return x * 2


def test_tuner_takes_the_fastest_right_configuration(tables):
    def run(config, x):
        time.sleep(config["sleep"])
        return x * config["factor"]

    configs = [{"sleep": 0.02, "factor": 2}, {"sleep": 0.0, "factor": 2}, {"sleep": 0.0, "factor": 3}]
    case = made_up_case({"own": Own(run, configs)}, slow)
    path, config, us = tune_case(case, "cpu", time.monotonic() + 60)
    assert path == "own" and config == {"sleep": 0.0, "factor": 2}, "the wrong result must not win"
    assert us["own"] < us["torch"]
    table = Table(tables / "h100.json", H100.name)
    assert not table.has(case)
    table.put(case, path, config, us)
    assert Table(tables / "h100.json", H100.name).has(case)
    entry = tuning.lookup("made_up", H100, torch.float32, m=8)
    assert entry.path == "own" and entry.config == config
    table.put(case, "torch", {}, us)
    assert tuning.lookup("made_up", H100, torch.float32, m=8).path == "torch"
    assert len(json.loads((tables / "h100.json").read_text())["ops"]["made_up"]) == 1
    assert [p.name for p in tables.iterdir()] == ["h100.json"]
    with pytest.raises(ValueError, match="is a table of"):
        Table(tables / "h100.json", A100.name)


def test_the_figure_of_a_path_is_that_of_its_faster_configuration():
    calls = []

    def run(config, x):
        calls.append(config["steady"])
        first = calls.count(False) == 1  # fast while candidates are compared, slow in the final round
        time.sleep(0.01 if config["steady"] else 0.0 if first else 0.1)
        return x * 2

    case = made_up_case({"own": Own(run, [{"steady": False}, {"steady": True}])}, slow)
    path, config, us = tune_case(case, "cpu", time.monotonic() + 60)
    assert path == "own" and config == {"steady": True}
    assert us["own"] < us["torch"] < us["own (2nd)"]


def test_tuner_keeps_pytorch_where_it_is_faster_and_stops_in_time():
    case = made_up_case({"own": Own(lambda config, x: slow(x), [{}])}, lambda x: x * 2)
    path, config, us = tune_case(case, "cpu", time.monotonic() + 60)
    assert path == "torch" and config == {} and set(us) == {"torch", "own"}
    assert tune_case(case, "cpu", time.monotonic() - 1) is None


def test_a_configuration_that_fails_does_not_stop_the_tuner():
    def run(config, x):
        if config["bad"]:
            raise RuntimeError("out of shared memory")
        return x * 2

    case = made_up_case({"own": Own(run, [{"bad": True}, {"bad": False}])}, slow)
    assert tune_case(case, "cpu", time.monotonic() + 60)[:2] == ("own", {"bad": False})
    only_bad = dataclasses.replace(case, own={"own": Own(run, [{"bad": True}])})
    assert tune_case(only_bad, "cpu", time.monotonic() + 60)[0] == "torch"
