"""Tier: CPU ranks. Patched Hugging Face models to and from checkpoints: bit for bit what transformers has."""

import json
import os
import re
import shutil

import pytest
import torch

from tp_kernels.checkpoint import CheckpointError
from tp_kernels.testing.tiny_models import TINY_MODELS, make_tiny_model

transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 25).view(2, 12)
# Tied; with biases everywhere; with replicated KV heads at tp 2 and 3; with windows.
NAMES = ("llama-9h3-tied-rope3", "llama-5h5-biased", "qwen3-4h1", "mistral-6h2-window", "qwen2-6h2-tied-window")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of stock checkpoints, each of several files."""
    folder = tmp_path_factory.mktemp("stock")
    for name in NAMES:
        model = make_tiny_model(name)
        model.generation_config.repetition_penalty = 1.25
        model.save_pretrained(folder / name, max_shard_size="30KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 2
    shutil.copytree(folder / NAMES[0], folder / "lacking")
    index = folder / "lacking" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = content["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    index.write_text(json.dumps(content))
    (folder / "lacking" / gone).unlink()
    shutil.copytree(folder / NAMES[0], folder / "quantised")
    config = json.loads((folder / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "quantised" / "config.json").write_text(json.dumps(config))
    (folder / "a-file").write_text("not a folder")
    return folder


def message_of(function, *args, **options):
    try:
        function(*args, **options)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def to_and_fro(group, source, target, names):
    from tp_kernels.integrations import apply_tp_kernels, from_pretrained

    results = {}
    for name in names:
        model = from_pretrained(source / name, group, progress=False)
        results[name] = found = {"penalty": model.generation_config.repetition_penalty, "training": model.training}
        found["dtype"] = str(model.dtype)
        found["packed"] = all(layer.self_attn.joined() is not None for layer in model.model.layers)
        with torch.no_grad():
            found["logits"] = model(IDS).logits
            patched = make_tiny_model(name)
            patched.config._attn_implementation = "sdpa"
            apply_tp_kernels(patched, group)
            found["alike"] = torch.equal(patched(IDS).logits, found["logits"])
            local = patched.state_dict()
            model.load_state_dict({key: 2 * value for key, value in local.items()})
            found["doubled"] = all(torch.equal(model.state_dict()[key], 2 * local[key]) for key in local)
            model.load_state_dict(local)
        model.save_pretrained(target / name, max_shard_size="30KB")
        model.save_pretrained(target / f"{name}-given", state_dict={k: v + 1 for k, v in model.state_dict().items()})
        found["written"] = os.path.exists(target / name / "model.safetensors.index.json")
        half = from_pretrained(source / name, group, dtype=torch.bfloat16, progress=False, swiglu=False)
        found["half"] = [str(half.dtype), half(IDS).logits.isfinite().all().item()]
    errors = results["errors"] = {}
    errors["below a file"] = message_of(model.save_pretrained, source / "a-file" / "folder")
    errors["a file"] = message_of(model.save_pretrained, source / "a-file")
    for bad in ("lacking", "quantised", "a-file", "nowhere"):
        errors[bad] = message_of(from_pretrained, source / bad, group, progress=False)
    errors["option"] = message_of(from_pretrained, source / names[0], group, progress=False, overlap="much")
    return results


_results = {}


@pytest.fixture(params=[1, 2, 3], ids=lambda size: f"tp{size}")
def visit(request, source, rank_pool, tmp_path_factory):
    """(what the ranks found, the folder they wrote)."""
    size = request.param
    if size not in _results:
        target = tmp_path_factory.mktemp(f"tp{size}")
        run = rank_pool(size).run if size > 1 else lambda function, *args: [function(None, *args)]
        _results[size] = run(to_and_fro, source, target, NAMES), target
    return _results[size]


def test_from_pretrained_is_the_patched_model(visit):
    for by_name in visit[0]:
        for name in NAMES:
            found = by_name[name]
            assert found["alike"] and found["packed"] and found["doubled"] and found["written"]
            assert (found["penalty"], found["training"], found["dtype"]) == (1.25, False, "torch.float32")
            assert found["half"] == ["torch.bfloat16", True]


def test_transformers_reads_what_was_saved(visit):
    for name in NAMES:
        stock, back = make_tiny_model(name), transformers.AutoModelForCausalLM.from_pretrained(visit[1] / name)
        assert type(back) is type(stock)
        ours, theirs = back.state_dict(), stock.state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert (back.lm_head.weight is back.model.embed_tokens.weight) == stock.config.tie_word_embeddings
        config = json.loads((visit[1] / name / "config.json").read_text())
        assert config["architectures"] == [type(stock).__name__]
        assert config["num_attention_heads"] == stock.config.num_attention_heads
        index = json.loads((visit[1] / name / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_parameters"] == stock.num_parameters()
        given = transformers.AutoModelForCausalLM.from_pretrained(visit[1] / f"{name}-given").state_dict()
        assert all(torch.equal(given[key], theirs[key] + 1) for key in theirs)


@pytest.mark.parametrize(
    "case, message",
    [
        ("below a file", "CheckpointError|NotADirectory"),
        ("a file", "expected a folder"),
        ("lacking", "up_proj.weight"),
        ("quantised", "bitsandbytes"),
        ("a-file", "is a file"),
        ("nowhere", "does not exist"),
        ("option", "overlap must be one of"),
    ],
)
def test_errors_are_those_of_every_rank(visit, case, message):
    for by_name in visit[0]:
        assert re.search(message, by_name["errors"][case]), by_name["errors"][case]


def test_names_on_the_hub_are_resolved_by_rank_zero(source, monkeypatch):
    import huggingface_hub

    from tp_kernels.integrations import from_pretrained

    asked = []

    def snapshot_download(name, **options):
        asked.append(name)
        return str(source / NAMES[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = from_pretrained("someone/tiny", progress=False)
    assert asked == ["someone/tiny"] and torch.equal(model.lm_head.weight, make_tiny_model(NAMES[2]).lm_head.weight)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: 1 / 0)
    with pytest.raises(CheckpointError, match="hub"):
        from_pretrained("someone/other", progress=False)


def test_a_model_on_the_meta_device_is_cut_before_it_has_weights():
    from tp_kernels.integrations import apply_tp_kernels

    for name in TINY_MODELS:
        stock = make_tiny_model(name)
        with torch.device("meta"):
            empty = type(stock)(stock.config)
        model = apply_tp_kernels(empty).to_empty(device="cpu").eval()
        model.load_state_dict(stock.state_dict())
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)
