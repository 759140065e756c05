"""The README's figures are those of the result files. Tier: no device."""

import importlib.util
from pathlib import Path

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


def test_a_changed_figure_is_noticed(monkeypatch, tmp_path):
    script = load_script()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace(" us |", " ms |"), encoding="utf-8")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["readme_table.py", "--check"])
    assert script.main() == 1
