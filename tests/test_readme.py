"""The README's figures are those of the result files. Tier: no device."""

import importlib.util
import re
import shutil
from pathlib import Path

import torch

import tp_kernels

ROOT = Path(__file__).resolve().parents[1]


def load_script():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_result_files_say(monkeypatch):
    script = load_script()
    monkeypatch.setattr("sys.argv", ["readme_table.py", "--check"])
    assert script.main() == 0, "run: python benchmarks/readme_table.py"


def test_the_table_of_a_gpu_counts_what_lost(tmp_path):
    script = load_script()
    names = ["op", "case", "dtype", "sizes", "competitor", "us", "verdict", "times_best_peer", "gpu", "torch", "date"]
    rows = [
        ("linear", "a", "bfloat16", "m=1", "torch", "20.0", "ok", "1.0"),
        ("linear", "a", "bfloat16", "m=1", "own:gemv", "10.0", "ok", "2.0"),
        ("linear", "a", "bfloat16", "m=1", "op", "10.0", "ok", "2.0"),
        ("linear", "b", "bfloat16", "m=64", "torch", "10.0", "ok", "1.0"),
        ("linear", "b", "bfloat16", "m=64", "own:skinny", "20.0", "ok", "0.5"),
        ("linear", "b", "bfloat16", "m=64", "own:gemv", "", "wrong", ""),
        ("linear", "b", "bfloat16", "m=64", "op", "10.0", "ok", "1.0"),
    ]
    text = "\n".join(",".join((*row, "GPU", "2.11", "2026-01-01")) for row in rows)
    (tmp_path / "linear.csv").write_text(",".join(names) + "\n" + text + "\n")
    lines = script.gpu_table(tmp_path)
    assert "| `linear` | 2 | 1.0x (worst 0.5x, faster in 1, 1 wrong or failed) | 1.414x | torch |" in lines


def test_a_changed_figure_is_noticed(monkeypatch, tmp_path, capsys):
    script = load_script()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace(" us |", " ms |"), encoding="utf-8")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["readme_table.py", "--check"])
    assert script.main() == 1 and capsys.readouterr().out == "not up to date: README.md\n"
    monkeypatch.setattr("sys.argv", ["readme_table.py"])
    assert script.main() == 0 and (tmp_path / "README.md").read_text(encoding="utf-8") == readme
    monkeypatch.setattr("sys.argv", ["readme_table.py", "--check"])
    assert script.main() == 0, "the same files make the same document"


def test_the_overlap_example_runs(capsys):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### Overlap")[1]
    (example,) = re.findall(r"```python\n(.*?)```", section.split("\n#")[0], re.DOTALL)
    names = {"tp": tp_kernels, "torch": torch}
    exec(example, names)
    assert names["y"].shape == (256, 512)
    assert capsys.readouterr().out == "()\nnone: one rank has nobody to talk to\n"


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
        assert [link for link in links if not (document.parent / link).exists()] == [], document.name


def test_every_environment_variable_is_documented():
    files = [p for folder in ("tp_kernels", "csrc") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp")]
    read = {
        name for path in files for name in re.findall(r"\"(TP_KERNELS_[A-Z0-9_]+)\"", path.read_text(encoding="utf-8"))
    }
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    documented = {name for path in documents for name in re.findall(r"TP_KERNELS_[A-Z0-9_]+", path.read_text("utf-8"))}
    # Between the launcher and its ranks.
    assert len(read) > 10 and read - documented == {"TP_KERNELS_ERROR_DIR", "TP_KERNELS_LAUNCHER_PID"}
