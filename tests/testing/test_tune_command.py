"""``tp-kernels tune`` from end to end. Tier: no device (Triton's interpreter, where it takes the CPU for a GPU)."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import pytest
import torch

from tp_kernels.cli import main
from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.testing.op_bench import silu_mul, tuner

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is the CPU")


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """``tune(*arguments) -> (exit status, rows of the table by op)`` of small shapes; nothing is compiled ahead."""
    empty, generator = torch.empty, torch.Generator
    on_cpu = lambda device: "cpu" if device == "cuda" else device  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch, "empty", lambda *a, device="cpu", **k: empty(*a, device=on_cpu(device), **k))
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator(on_cpu(device)))
    asked = []

    def precompile(selection, cases, info, *, processes, deadline, progress):
        asked.append((len(cases), info, processes))
        progress(1, 1)
        return 1

    monkeypatch.setattr(tuner, "precompile", precompile)
    table = tmp_path / "table.json"
    small = ["--op", "silu_mul", "--model", "tiny", "--tp", "1", "--dtype", "fp16", "--out", str(table), "--jobs", "3"]

    def run(*arguments):
        asked.clear()
        with pretend(H100):
            status = main(["tune", *small, *arguments])
        return status, json.loads(table.read_text())["ops"] if table.exists() else {}

    run.asked, run.table = asked, table
    return run


def test_every_case_gets_a_row_and_is_done_with(tune, capsys):
    status, rows = tune("--rows", "3", "5")
    assert status == 0 and tune.asked == [(4, H100, 3)]
    assert json.loads(tune.table.read_text())["gpu"] == H100.name
    for op in ("silu_mul", "silu_mul_backward"):
        assert [row["sizes"] for row in rows[op]] == [{"m": 3, "n": 96}, {"m": 5, "n": 96}]
        for row in rows[op]:
            assert {"torch", "triton"} <= set(row["us"]) and row["path"] in ("torch", "triton")
            assert bool(row["config"]) == (row["path"] == "triton")
    assert "4 cases measured, 0 left" in capsys.readouterr().out
    assert tune("--rows", "3", "5")[0] == 0 and not tune.asked
    assert "nothing to do" in capsys.readouterr().out


def test_a_case_that_fails_is_passed_over(tune, monkeypatch, capsys):
    forward = silu_mul.ops.silu_mul_reference

    @functools.wraps(forward)
    def refuse(gate_up):
        if gate_up.shape[0] == 3:
            raise torch.OutOfMemoryError("no memory for it")
        return forward(gate_up)

    monkeypatch.setattr(silu_mul.ops, "silu_mul_reference", refuse)
    status, rows = tune("--rows", "3", "5")
    said = " ".join(capsys.readouterr().out.split())
    assert status == 0 and [row["sizes"]["m"] for row in rows["silu_mul"]] == [5]
    assert "OutOfMemoryError: no memory for it" in said and "3 cases measured, 1 left" in said


def test_time_that_is_over(tune, capsys):
    status, rows = tune("--rows", "3", "--minutes", "0")
    assert (status, rows) == (0, {})
    assert "0 cases measured, 2 left" in capsys.readouterr().out
