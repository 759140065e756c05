"""``tp-kernels plan``: text, JSON, CSV, plot, what was measured beside it, and bad usage. Tier: no device."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from tp_kernels import cli
from tp_kernels.checkpoint.demo_model import smollm2_path
from tp_kernels.commands.plan import resolve_config
from tp_kernels.planning import LINKS, Workload, compare, find_measured, machine, plan, read_measured
from tp_kernels.testing.bench import Timing, write_csv
from tp_kernels.testing.model_bench.check import Verdict
from tp_kernels.testing.model_bench.report import Case, Entry, rows_of
from tp_kernels.testing.op_bench.shapes import MODELS
from tp_kernels.testing.tiny_models import TINY_MODELS


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command in an empty folder; (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        capsys.readouterr()
        status = cli.main(["plan", *map(str, words)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def config_json(tmp_path):
    family, options = TINY_MODELS["qwen3-4h1"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": family.lower(), **options}))
    return path


def test_text_says_what_it_is_and_rests_on(run):
    status, out, err = run("--model", "llama3-8b", "--tp", 16, "--batch", 4)
    assert (status, err) == (0, "")
    assert out.startswith("PREDICTION") and "predicted decode step, batch 4 after 1024 tokens" in out
    # Eight rows and the one asked for, in each of three tables.
    first = [line.split()[0] for line in out.splitlines() if line]
    assert [first.count(tp) for tp in ("1", "5", "8", "9", "16")] == [3, 3, 3, 0, 3]
    rates = out[out.index("assumptions") :]
    for words in ("data sheet", "measured", "NCCL", "reserved (assumed)", "CUDA graphs"):
        assert words in rates
    assert "measured on" not in out
    assert "tp=16 on h100: " in out


def test_it_answers_without_torch():
    script = "import sys; from tp_kernels import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = ["plan", "--model", "llama3-70b", "--gpu", "h200"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0 and "PREDICTION" in done.stdout, done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_benchmarks(run, name):
    status, out, _ = run("--model", name, "--gpu", "b200", "--quantize", "fp8", "--json")
    assert status == 0 and json.loads(out)["config"]["vocab_size"] == MODELS[name].vocab


def test_json(run, config_json):
    status, out, _ = run("--model", config_json, "--gpu", "l40s", "--link", "pcie", "--prompt", 9, "--json")
    made = json.loads(out)
    assert status == 0
    assert list(made) == [
        *("kind", "model", "config", "machine", "link", "workload", "rows", "left_out", "assumptions", "measured")
    ]
    assert made["kind"] == "prediction" and made["config"]["num_attention_heads"] == 4
    assert made["machine"]["bandwidth"]["source"].startswith("assumed") and made["link"]["name"] == "pcie4"
    assert [row["tp"] for row in made["rows"]] == [1, 2, 3, 4] and list(made["left_out"]) == ["5", "6", "7", "8"]
    for row in made["rows"]:
        assert len(row["weight_bytes"]) == len(row["kv_bytes_per_token"]) == row["tp"]
        for what in ("prefill", "decode", "prefill_shard", "decode_shard"):
            parts = [row[what][name] for name in ("linear", "attention", "elementwise", "gaps", "communication")]
            assert row[what]["total"] == pytest.approx(sum(parts)) and row[what]["roof"] == sum(parts[:2])
    assert made["rows"][0]["decode_speedup"] == 1 and made["measured"] == []


def test_csv_says_what_json_says(run, config_json, tmp_path):
    _, out, _ = run("--model", config_json, "--csv", tmp_path / "new" / "plan.csv", "--json")
    with open(tmp_path / "new" / "plan.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = json.loads(out)["rows"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["kind"] == "prediction" and int(line["tp"]) == row["tp"] and line["quantize"] == "none"
        assert int(line["weight_bytes_max"]) == max(row["weight_bytes"])
        assert int(line["max_batch"]) == row["max_batch"] and line["decode_algorithm"] == row["decode"]["algorithm"]
        for what in ("prefill", "decode"):
            assert float(line[f"{what}_ms"]) == pytest.approx(row[what]["total"] * 1e3, abs=1e-6)
            assert float(line[f"{what}_roof_ms"]) == pytest.approx(row[f"{what}_shard"]["roof"] * 1e3, abs=1e-6)


def test_plot(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    status, *_ = run("--model", "tiny", "--plot", tmp_path / "plan.png")
    assert status == 0 and (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run("--model", "tiny", "--plot", tmp_path / "none.png")
    assert status == 1 and "pip install 'tp-kernels[bench]'" in err and not (tmp_path / "none.png").exists()


def test_a_folder_is_read_by_its_config(run, config_json, tmp_path):
    folder = tmp_path / "tiny.v1"
    folder.mkdir()
    config_json.rename(folder / "config.json")
    for path in (folder, folder / "config.json"):
        status, out, _ = run("--model", path, "--json")
        made = json.loads(out)
        assert status == 0 and made["config"]["intermediate_size"] == 72 and made["model"] == "tiny.v1"


def test_a_gguf_file_is_read_by_its_header(run):
    try:
        smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    status, out, _ = run("--model", "smollm2", "--tp", 9, "--json")
    made = json.loads(out)
    assert status == 0 and made["config"]["tie_word_embeddings"] and len(made["rows"]) == 9
    # 134.5 million parameters, norms included, of two bytes.
    assert made["rows"][0]["weight_bytes"] == [2 * 134_515_008]


def test_what_does_not_fit_is_said(run):
    status, out, _ = run("--model", "llama3-70b", "--gpu", "rtx-4090")
    assert status == 0 and "NO" in out and "cannot be measured" in out
    status, out, _ = run("--model", "llama3-70b", "--gpu", "rtx-4090", "--memory", 1000)
    assert status == 0 and "NO" not in out and "(given)" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "llama9"], "no such file or folder: llama9; models known by name: llama3-8b"),
        (["--model", "llama3-8b", "--gpu", "h1000"], "unknown GPU 'h1000'; known: h100, h200"),
        (["--model", "llama3-8b", "--link", "string"], "unknown link 'string'; known: auto, nvlink, pcie"),
        (["--model", "llama3-8b", "--gpu", "rtx-4090", "--link", "nvlink"], "this GPU has no NVLink"),
        (["--model", "llama3-8b", "--tp", "33"], "--tp 33: 33 ranks cannot share num_attention_heads=32"),
        (["--model", "llama3-8b", "--max-len", "4095"], "max_len=4095 has no room for a prompt of 4096 tokens"),
        (["--model", "llama3-8b", "--quantize", "int4"], "invalid choice: 'int4'"),
        (["--model", "llama3-8b", "--bandwidth", "0"], "expected a number above 0"),
        (["--model", "."], "expected a folder with config.json"),
        (["--model", "bad.json"], "is no readable JSON"),
        (["--model", "gpt.json"], "model_type 'gpt2' is not supported"),
        (["--model", "list.json"], "expected a config dict"),
        (["--model", "tiny", "--measured", "none.csv"], "none.csv"),
        (["--model", "tiny", "--measured", "bad.json"], "expected the columns of `tp-kernels bench model`"),
    ],
)
def test_bad_usage(run, tmp_path, words, message):
    for name, text in (("bad.json", "{"), ("gpt.json", '{"model_type": "gpt2"}'), ("list.json", "[]")):
        (tmp_path / name).write_text(text)
    status, out, err = run(*words)
    assert status == 2 and out == "" and message in err and "Traceback" not in err


def test_workloads_are_checked():
    for wrong in (dict(batch=0), dict(prompt=True), dict(context=-1), dict(dtype="float32"), dict(quantize="int4")):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Workload(**wrong)


# --- what was measured -----------------------------------------------------------------------------------------------


def measured_rows(tp=1, shard=1, layers=32, ranks_per_gpu=1, model="llama3-8b"):
    """Rows as ``bench model`` writes them: a prompt and a step, by several contenders."""
    common = {"model": model, "tp": tp, "shard": shard, "ranks_per_gpu": ranks_per_gpu, "mps": 0}
    common |= {"dtype": "bfloat16", "layers": layers}
    took = Timing(0.012, 0.011, 0.013)
    entries = {
        "tp_kernels": Entry(True, timing=took),
        "tp_kernels int8": Entry(True, "int8", timing=took),
        "off": Entry(True, timing=took),
        "torch graph": Entry(False, failure="out of memory"),
        "transformers": Entry(False, timing=took, verdict=Verdict(2.0, 1.0)),
    }
    rows = rows_of(common, Case("prefill", 1, 512, 0), entries, None)
    return rows + rows_of(common, Case("decode", 16, 1, 1024), entries, None)


def test_measured_beside_predicted(run, tmp_path):
    path = tmp_path / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "model.csv"
    rows = measured_rows() + measured_rows(1, 4) + measured_rows(4, ranks_per_gpu=4) + measured_rows(layers=2)
    write_csv(path, rows + measured_rows(ranks_per_gpu=0) + measured_rows(model="qwen3-8b"))
    write_csv(path.with_name("model_shard2.csv"), measured_rows(1, 2))
    write_csv(path.with_name("models.csv"), measured_rows())
    # Found by the GPU's name; of five contenders one failed and one was wrong; one is of two layers, of a CPU, of Qwen.
    status, out, _ = run("--model", "llama3-8b", "--json")
    measured = json.loads(out)["measured"]
    assert status == 0 and len(measured) == 4 * 2 * 3
    _, model = resolve_config("llama3-8b")
    h100, nvlink = machine("h100"), LINKS["nvlink4"]
    decode = plan("", model, h100, nvlink, Workload(batch=16, prompt=1, context=1024))
    prompt = plan("", model, h100, nvlink, Workload(prompt=512, quantize="int8"))
    shared = plan("", model, h100, LINKS["one-gpu"], Workload(batch=16, prompt=1, context=1024))

    def of(what, tp, shard, contender):
        keys = ("what", "tp", "shard", "contender")
        (row,) = [row for row in measured if tuple(row[key] for key in keys) == (what, tp, shard, contender)]
        assert row["measured_ms"] == 12 and row["ratio"] == pytest.approx(12 / row["predicted_ms"])
        return row["predicted_ms"] / 1e3

    assert of("decode", 1, 1, "tp_kernels") == pytest.approx(decode.row(1).decode.total)
    assert of("decode", 1, 2, "tp_kernels") == pytest.approx(decode.row(2).decode_shard.total)
    assert of("decode", 1, 4, "tp_kernels") == pytest.approx(decode.row(4).decode_shard.total)
    assert of("prefill", 1, 1, "tp_kernels int8") == pytest.approx(prompt.row(1).prefill.total)
    assert of("decode", 4, 1, "tp_kernels") == pytest.approx(shared.row(4).decode.total)
    assert of("decode", 4, 1, "off") == pytest.approx(shared.row(4).decode.silent)
    _, out, _ = run("--model", "llama3-8b", "--measured", path)
    assert "beside predicted" in out and "measured/predicted" in out
    _, out, _ = run("--model", "mistral-7b")
    assert "no row of" in out and "is of this model and dtype" in out


def test_ranks_and_their_rivals_are_read(run, tmp_path):
    common = {
        "model": "llama3-8b",
        "tp": 4,
        "shard": 1,
        "ranks_per_gpu": 4,
        "mps": 1,
        "dtype": "bfloat16",
        "layers": 32,
    }
    took = {name: Timing(ms * 1e-3, 0.0, 1.0) for name, ms in (("off", 6.0), ("symm", 7.5), ("torch symm graph", 9.0))}
    entries = {
        "off": Entry(True, timing=took["off"], off="off", sums="off"),
        "symm": Entry(True, timing=took["symm"], off="off", sums="symm"),
        "torch symm graph": Entry(False, timing=took["torch symm graph"], sums="symm"),
        "transformers": Entry(False, failure="left out, --minutes 1 were over", sums="nccl"),
    }
    rows = rows_of(common, Case("decode", 1, 1, 1024), entries, None)
    mixed = rows_of(common, Case("mixed", 2, 9, 0, (5, 9)), entries, None)
    write_csv(tmp_path / "model_tp4.csv", rows + mixed)
    status, out, _ = run("--model", "llama3-8b", "--measured", tmp_path / "model_tp4.csv", "--json")
    off, symm, rival = json.loads(out)["measured"]  # what was left out and what has no prediction is passed over
    assert status == 0 and [row["contender"] for row in (off, symm, rival)] == ["off", "symm", "torch symm graph"]
    assert [row["sums"] for row in (off, symm, rival)] == ["off", "symm", "symm"]
    assert (symm["over_off"], symm["times_best_peer"], symm["best_peer"]) == (1.25, 1.2, "torch symm graph")
    assert (off["over_off"], off["times_best_peer"], off["best_peer"]) == (1.0, None, "")
    assert (rival["over_off"], rival["times_best_peer"]) == (None, 1.0)
    assert off["predicted_ms"] < symm["predicted_ms"] == rival["predicted_ms"]
    old = [{key: value for key, value in row.items() if key not in ("sums", "best_peer", "lengths")} for row in rows]
    write_csv(tmp_path / "old.csv", old)
    _, out, _ = run("--model", "llama3-8b", "--measured", tmp_path / "old.csv", "--json")
    assert json.loads(out)["measured"][0]["predicted_ms"] == off["predicted_ms"]
    (tmp_path / "bad.csv").write_text((tmp_path / "old.csv").read_text().replace(",1.25,", ",much,"))
    status, _, err = run("--model", "llama3-8b", "--measured", tmp_path / "bad.csv")
    assert status == 2 and "expected numbers in tp, shard, batch" in err and "over_off" in err


def test_measured_files_are_checked(tmp_path):
    assert find_measured(machine("h100"), tmp_path) == []
    path = tmp_path / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "model.csv"
    write_csv(path, measured_rows())
    assert find_measured(machine("h100"), tmp_path) == [path] and find_measured(machine("h200"), tmp_path) == []
    rows = read_measured(path)
    assert compare(plan("other", resolve_config("tiny")[1], machine("h100"), LINKS["nvlink4"]), rows) == []
    narrow = replace(resolve_config("llama3-8b")[1], num_attention_heads=2, num_key_value_heads=1)
    write_csv(path, measured_rows(1, 4))
    with pytest.raises(ValueError, match="a measured row is not of this llama3-8b: 4 ranks cannot share"):
        compare(plan("llama3-8b", narrow, machine("h100"), LINKS["nvlink4"]), read_measured(path))
    path.write_text(path.read_text().replace(",512,", ",many,"))
    with pytest.raises(ValueError, match="line 2: expected numbers in tp, shard, batch, tokens, context, layers"):
        read_measured(path)
