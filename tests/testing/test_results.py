"""From what ``make gpu`` leaves behind to the documents: made-up figures through the benchmarks' own rows. Tier: no
device."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from tp_kernels.commands.bench_layer import layer_rows
from tp_kernels.testing import bench, machine
from tp_kernels.testing.bench import Timing
from tp_kernels.testing.bench_all_reduce_gpu import sum_rows
from tp_kernels.testing.bench_all_reduce_norms import norm_rows
from tp_kernels.testing.model_bench.report import Case, Entry, rows_of
from tp_kernels.testing.overlap_bench import report
from tp_kernels.testing.overlap_bench.case import Candidate, Plan

ROOT = Path(__file__).resolve().parents[2]
GPU = "NVIDIA H100 80GB HBM3"
MARKER = "<!-- measured:begin -->"


@pytest.fixture(scope="module")
def collect():
    spec = importlib.util.spec_from_file_location("collect", ROOT / "benchmarks" / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("run_gpu", "readme_table"):
        sys.modules.pop(name, None)


@pytest.fixture
def root(tmp_path):
    """A repository with the documents, and no results."""
    for name in ("README.md", "docs/performance.md"):
        target = tmp_path / "root" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8")
        target.write_text(re.sub(r"(begin -->).*(<!-- measured:end)", r"\1\n\n\2", text, flags=re.DOTALL), "utf-8")
    (tmp_path / "root" / "benchmarks" / "results").mkdir(parents=True)
    return tmp_path / "root"


def timing(microseconds):
    return Timing(microseconds * 1e-6, microseconds * 0.9e-6, microseconds * 1.1e-6)


def op_rows():
    names = ("competitor", "us", "verdict", "times_best_peer")
    common = {"op": "linear", "case": "a", "dtype": "bfloat16", "sizes": "m=1"}
    found = [("torch", 20.0, "ok", 1.0), ("own:gemv", 16.0, "ok", 1.25), ("op", 16.0, "ok", 1.25)]
    return [common | dict(zip(names, values, strict=True)) for values in found]


def sums():
    common = {"kind": "sum", "ranks": 4, "ranks_per_gpu": 4, "dtype": "bfloat16", "tokens": 0, "hidden": 0}
    rows = []
    for nbytes, factor in ((8 << 10, 1), (16 << 10, 2), (64 << 20, 100)):
        timed = {"one_shot": timing(7 * factor), "two_shot": timing(8 * factor), "nccl": timing(400 * factor)}
        timed |= {"torch_one_shot": timing(14 * factor), "torch_two_shot": timing(10 * factor)}
        rows += sum_rows(common | {"bytes": nbytes}, timed, dict.fromkeys(timed, 0))
    return rows


def norms():
    common = {"kind": "norm", "ranks": 4, "ranks_per_gpu": 4, "dtype": "bfloat16", "bytes": 1, "hidden": 4096}
    timed = {"all_reduce": timing(10), "fused": timing(11), "torch_two_shot+add_rms_norm": timing(33)}
    return norm_rows(common | {"tokens": 64}, timed, {}) + norm_rows(common | {"tokens": 16}, timed, {})


def overlap():
    common = {"op": "linear_all_reduce", "ranks": 4, "ranks_per_gpu": 4, "n": 4096, "in_features": 14336}
    rows = []
    cases = [
        (4096, "nccl", 0, (150, 110)),
        (4096, "nccl", 4, (155, 108)),
        (256, "nccl", 0, (50, 60)),
        (256, "nccl", 4, (50, 60)),
    ]
    for m, backend, ctas, us in (*cases, (4096, "symm", 0, (90, 72))):
        other = Plan("fused") if backend == "symm" else Plan("chunked", Candidate(2, 1.0, (m // 2, m // 2)))
        timed = dict(zip(("compute", "comm", "none", str(other)), map(timing, (50, 100, *us)), strict=True))
        counts = {plan: {"differs": 0, "wrong": 0, "wrong_sums": 0} for plan in (Plan("none"), other)}
        of = {"op": common["op"], "backend": backend, "m": m, **common, "max_ctas": ctas}
        found = report.plan_rows(of, list(counts), timed, counts)
        report.set_gates(found)
        rows += found
    timed = {"none": timing(90), "ours": timing(72), "torch_nccl": timing(144)}
    return [*rows, report.peer_row(of | {"backend": "torch"}, "torch_nccl", timed, 0, "symm fused")]


def layer():
    timed = {"off": timing(400), "fused": timing(440), "unfused": timing(500)}
    common = {"what": "decode", "model": "llama3-8b", "ranks": 4, "ranks_per_gpu": 4, "tokens": 1, "context": 1024}
    return layer_rows(common, timed, {}, 4)


def model():
    common = {"model": "llama3-8b", "tp": 1, "shard": 1, "ranks_per_gpu": 1, "mps": 0, "dtype": "bfloat16"}
    entries = {"tp_kernels": Entry(True, timing=timing(5000)), "pytorch": Entry(False, timing=timing(7500))}
    entries["tp_kernels int8"] = Entry(True, "int8", timing=timing(3000))
    return rows_of(common | {"layers": 32}, Case("decode", 1, 1, 1024), entries, None)


FILES = {"linear": op_rows, "comm-all-reduce-4": sums, "comm-norms-4": norms, "comm-overlap": overlap}
FILES |= {"comm-layer": layer, "model": model}
COMMANDS = {"linear": "bench-linear", "model": "bench-model"}


@pytest.fixture
def out(collect, tmp_path, monkeypatch):
    """What ``make gpu`` left: all of the above, what failed, what did not end, and what nobody wrote."""
    monkeypatch.setattr(machine, "_gpu", lambda: GPU)
    monkeypatch.setattr(collect, "draw_sums", lambda path, picture: False)  # takes its time
    folder = tmp_path / "gpu_out"
    for name, rows in FILES.items():
        bench.write_csv(folder / f"{name}.csv", rows())
        (folder / f"{COMMANDS.get(name, name)}.ok").touch()
    for name in ("attention", "norms", "stray"):
        bench.write_csv(folder / f"{name}.csv", op_rows())
    (folder / "bench-attention.failed").touch()
    for place in ("tuning", "plots"):
        (folder / place).mkdir()
    for name in ("linear", "model", "rms_norm"):
        (folder / "plots" / f"{name}.png").write_bytes(name.encode())
    (folder / "tuning" / "h100.json").write_text(json.dumps(table({"linear": [entry(1, "gemv")]})))
    (folder / "tuning" / "comm-h100-4-shared.json").write_text(json.dumps({"gpu": GPU, "us": {}}))
    return folder


def table(ops):
    return {"gpu": GPU, "measured": "2026-01-02", "versions": {"torch": "2.11"}, "ops": ops}


def entry(m, path):
    return {"dtype": "16bit", "sizes": {"m": m}, "path": path, "config": {}, "us": {path: 1.0}}


def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def test_results_land_in_their_places(collect, root, out):
    written, refused = collect.collect(out, "h100", root)
    results = root / "benchmarks" / "results" / "h100"
    assert {path.stem for path in results.glob("*.csv")} == set(FILES)
    plots = {path.stem: path.read_bytes() for path in results.glob("plots/*.png")}
    assert plots == {"linear": b"linear", "model": b"model"}, "of files that were taken"
    assert (results / "comm-h100-4-shared.json").exists()
    assert json.loads((root / "tp_kernels/ops/tuning/h100.json").read_text()) == table({"linear": [entry(1, "gemv")]})
    assert {line.split(": ")[0]: line for line in refused}.keys() == {"attention.csv", "norms.csv", "stray.csv"}
    said = "\n".join(refused)
    assert "bench-attention failed" in said and "bench-norms has not ended" in said and "no command" in said
    assert written[-2:] == ["README.md", "docs/performance.md"]
    assert "attention" not in readme(root).split(MARKER)[1].split("<!-- measured:end")[0]
    assert collect.collect(out, "h100", root, ["bench-attention"])[1] != refused
    assert (results / "attention.csv").exists()


def test_sums_and_norms_are_drawn(collect, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    bench.write_csv(tmp_path / "sums.csv", [{**row, "ranks_per_gpu": 1} for row in sums()])
    bench.write_csv(tmp_path / "layer.csv", layer())
    assert collect.draw_sums(tmp_path / "sums.csv", tmp_path / "plots" / "sums.png")
    assert (tmp_path / "plots" / "sums.png").read_bytes().startswith(b"\x89PNG")
    assert not collect.draw_sums(tmp_path / "layer.csv", tmp_path / "layer.png")


def test_documents_say_what_the_files_say_and_nothing_else(collect, root, out):
    collect.collect(out, "h100", root)
    block = readme(root).split(MARKER)[1].split("<!-- measured:end")[0]
    for line in (
        "| `linear` | 1 | 1.25x (worst 1.25x, faster in 1) | 1.25x | torch |",
        "| llama3-8b, decode after 1024, a token, tp=1, tp_kernels | 5.00 ms | pytorch 7.50 ms | 1.50x |",
        "tp_kernels int8 | 3.00 ms | pytorch 7.50 ms, bfloat16 weights | 2.50x |",
        "| all-reduce, 8 KB bfloat16, 4 ranks | 7.0 us (one_shot) | 10.0 us (torch_two_shot) | 1.43x |",
        "| one_shot at 3 sizes, bfloat16, 4 ranks | | torch's | time 0.50x, worst 0.50x |",
        "| all-reduce + residual + norm, 64 x 4096, 4 ranks | 11.0 us (fused) | 33.0 us (torch_two_shot+add_rms_norm) "
        "| 3.00x, 1.1x of the all-reduce alone |",
        "| `linear_all_reduce` 4096 x 4096 x 14336, 4 ranks, nccl | 108.0 us (chunked) "
        "| 150.0 us (one after the other) | 1.39x, 94% of the shorter hidden |",
        "| `linear_all_reduce` 4096 x 4096 x 14336, 4 ranks | symm fused | 144.0 us (torch_nccl) | 2.00x |",
        '| `linear_all_reduce`, 4 ranks, nccl | "auto" overlaps 1 of 2 measured shapes | | |',
        '| `linear_all_reduce`, 4 ranks, nccl with at most 4 blocks | "auto" overlaps 1 of 2 measured shapes | | |',
        "| llama3-8b layer, decode 1 after 1024, 4 ranks | 110.0 us (fused) | 100.0 us (communication switched off) | "
        "time 1.1x |",
        "![linear](benchmarks/results/h100/plots/linear.png)",
    ):
        assert line in block, line
    assert f"Measured on {GPU}" in block and "not figures of linked GPUs" in block
    assert "Not measured yet" not in block, "there is something of every kind"
    again = collect._script("readme_table")
    assert again.rewrite(root, check=True) == []
    assert collect.collect(out, "h100", root)[0][-1] != "README.md", "nothing changes the second time"


def test_what_was_not_measured_is_named_once(collect, root, out):
    script = collect._script("readme_table")
    assert script.rewrite(root, check=True) == ["README.md", "docs/performance.md"]
    script.rewrite(root)
    assert readme(root).count("Not measured yet") == 1 and all(kind in readme(root) for kind in script.GPU_KINDS)
    for name in FILES:
        if not name.startswith("comm-overlap"):
            (out / f"{name}.csv").unlink()
    collect.collect(out, "h100", root)
    text = readme(root)
    (line,) = (line for line in text.splitlines() if line.startswith("Not measured yet"))
    assert "overlap" not in line and all(kind in line for kind in script.GPU_KINDS if kind != "overlap")
    assert "1.39x, 94% of the shorter hidden" in text and "llama3-8b layer" not in text


def test_a_changed_file_makes_the_documents_stale(collect, root, out):
    collect.collect(out, "h100", root)
    path = root / "benchmarks" / "results" / "h100" / "comm-layer.csv"
    path.write_text(path.read_text().replace(",110.0,", ",111.0,"))
    script = collect._script("readme_table")
    assert script.rewrite(root, check=True) == ["README.md"] and "111.0 us" not in readme(root)
    assert script.rewrite(root) == ["README.md"] and "111.0 us (fused)" in readme(root)


def test_tables_are_merged(collect, root, out):
    shipped = root / "tp_kernels" / "ops" / "tuning" / "h100.json"
    shipped.parent.mkdir(parents=True)
    older = table({"linear": [entry(1, "torch"), entry(64, "skinny")], "rope": [entry(4, "triton")]})
    shipped.write_text(json.dumps(older | {"measured": "2025-01-01"}))
    collect.collect(out, "h100", root)
    merged = json.loads(shipped.read_text())
    assert merged == table({"linear": [entry(1, "gemv"), entry(64, "skinny")], "rope": [entry(4, "triton")]})
    assert len([line for line in shipped.read_text().splitlines() if '"sizes"' in line]) == 3, "an entry a line"
    from tp_kernels.ops.tuning import read_table

    assert {key: len(found) for key, found in read_table(shipped).items()} == {
        ("linear", "16bit"): 2,
        ("rope", "16bit"): 1,
    }


@pytest.mark.parametrize("spoil", ["figures", "table", "everything"])
def test_nothing_is_written_when_figures_do_not_belong_together(collect, root, out, monkeypatch, spoil):
    if spoil == "figures":
        monkeypatch.setattr(machine, "_gpu", lambda: "another GPU")
        bench.write_csv(out / "linear.csv", op_rows())
    elif spoil == "table":
        (out / "tuning" / "h100.json").write_text(json.dumps(table({}) | {"gpu": "another GPU"}))
    else:
        for path in out.glob("*.ok"):
            path.unlink()
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="nothing to take" if spoil == "everything" else "another GPU"):
        collect.collect(out, "h100", root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_command_line(collect, root, out, monkeypatch, capsys):
    monkeypatch.setattr(collect, "ROOT", root)
    assert collect.main([str(out), "--machine", "h100"]) == 1, "something was refused"
    printed = capsys.readouterr().out
    assert "written: benchmarks/results/h100/linear.csv" in printed and "REFUSED: norms.csv" in printed
    for name in ("attention", "norms", "stray"):
        (out / f"{name}.csv").unlink()
    assert collect.main([str(out), "--machine", "h100"]) == 0
    for words, match in (([str(out / "no"), "--machine", "h100"], "expected the folder"), ([str(out)], "--machine")):
        with pytest.raises(SystemExit):
            collect.main(words)
        assert match in capsys.readouterr().err
    with pytest.raises(SystemExit):
        collect.main([str(out), "--machine", "../h100"])
    assert "name of a folder" in capsys.readouterr().err


def test_every_csv_of_make_gpu_is_known(collect):
    known = collect.written_by(Path("/results"))
    run_gpu = collect._script("run_gpu")
    keys = {key for part in run_gpu.parts(Path("/results")).values() for key in part.commands}
    assert {key for key, _ in known.values()} <= keys and {"model.csv", "profile_model.csv", "comm-overlap.csv"} <= {
        *known
    }
