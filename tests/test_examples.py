"""The files in examples/ run, on one rank and on several, and say the same. Tier: CPU ranks."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import tp_kernels as tp
from tp_kernels.launch import launch
from tp_kernels.testing.tiny_checkpoint import save_tiny_checkpoint

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _losses(text):
    return [float(number) for number in re.search(r"losses (.*)", text).group(1).split()]


def test_import_layers_trains_the_same_on_one_and_on_three_ranks(capfd):
    script = str(EXAMPLES / "import_layers.py")
    runpy.run_path(script, run_name="__main__")
    alone = capfd.readouterr().out
    launch(3, [script])
    out = capfd.readouterr().out
    assert "ranks 1, transport local" in alone and "ranks 3, " in out
    assert _losses(out) == pytest.approx(_losses(alone), abs=2e-5)
    assert _losses(out)[0] > _losses(out)[-1]
    assert "gate_proj.weight (157, 60)" in out and "gate_proj.weight (157, 60)" in alone


def test_torchrun_generate(tmp_path, capfd):
    model = save_tiny_checkpoint(tmp_path / "model")
    capfd.readouterr()
    launch(2, [str(EXAMPLES / "torchrun_generate.py"), str(model), "Hello"])
    out, err = capfd.readouterr()
    assert len([line for line in out.splitlines() if line.startswith("- ")]) == 2
    assert "[2 ranks, " in err


def test_hf_generate_says_what_transformers_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # ranks and GPUs are other tests' business
    transformers = pytest.importorskip("transformers")
    folder = str(save_tiny_checkpoint(tmp_path / "model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=24)
    script = EXAMPLES / "hf_generate.py"
    assert len([line for line in script.read_text().splitlines() if line]) < 15
    monkeypatch.setattr("sys.argv", [str(script), folder, "Hello"])
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")  # one rank: a process of its own would import transformers again
    out = capsys.readouterr().out
    assert out.startswith("Llama on 1 rank")
    assert out.rstrip("\n").endswith(tokenizer.decode(tokens[0], skip_special_tokens=True))


@pytest.mark.parametrize("there, device", [(True, "cuda"), (False, "cpu")])
def test_hf_generate_takes_a_gpu_if_there_is_one(monkeypatch, there, device):
    pytest.importorskip("transformers")

    class AskedFor(Exception):
        pass

    def initialize(**options):
        raise AskedFor(options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(tp.ProcessGroupManager, "initialize", initialize)
    monkeypatch.setattr("sys.argv", ["hf_generate.py", "folder", "text"])
    with pytest.raises(AskedFor, match=repr({"device": device})):
        runpy.run_path(str(EXAMPLES / "hf_generate.py"), run_name="__main__")


def test_hf_generate_without_arguments_says_how_to_call_it(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["hf_generate.py"])
    with pytest.raises(SystemExit, match=r"hf_generate\.py FOLDER TEXT"):
        runpy.run_path(str(EXAMPLES / "hf_generate.py"), run_name="__main__")
