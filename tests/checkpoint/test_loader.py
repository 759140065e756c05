"""``DistributedCheckpointLoader`` and ``load_model`` on 1, 2 and 3 ranks: the right slices, few bytes, little memory.

Tier: CPU ranks. Oracle: the state dict of the transformers model that wrote the checkpoint.
"""

import json
import warnings

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from tp_kernels.checkpoint import CheckpointError, DistributedCheckpointLoader, load_model
from tp_kernels.layers import iter_tensor_shards, quantize_model
from tp_kernels.layers.base import full_state_dict
from tp_kernels.testing.rank_pool import RankPool
from tp_kernels.testing.tiny_models import TINY_MODELS, make_tiny_model, save_tiny_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder with one Hugging Face checkpoint a tiny model, and their state dicts."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, {name: save_tiny_model(name, folder).state_dict() for name in TINY_MODELS}


def _load(group, path, dtype=None):
    """(gathered state dict, bytes this rank read, bytes it should at most have read, total bytes)."""
    model = load_model(path, group=group, dtype=dtype, progress=False)
    assert not model.training
    with DistributedCheckpointLoader(path, group, progress=False) as loader:
        loader.load_into(model)
        shards = list(iter_tensor_shards(model))
        return full_state_dict(model), loader.bytes_read, sum(s.target.numel() for s in shards), loader.total_bytes


def _quantised_either_way(group, path):
    """Local state dicts of a model that was quantised while it was loaded, and of one quantised afterwards."""
    return (
        load_model(path, group=group, quantize="int8", progress=False).state_dict(),
        quantize_model(load_model(path, group=group, progress=False), "int8").state_dict(),
    )


def _assert_equal(actual, expected, dtype=None):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor.to(dtype or tensor.dtype)), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_family_at_every_world_size(rank_pool, checkpoints, name, world_size):
    folder, expected = checkpoints
    for state, bytes_read, elements, _ in rank_pool(world_size).run(_load, str(folder / name)):
        _assert_equal(state, expected[name])
        assert bytes_read == 4 * elements  # its own slice, each byte once


def test_bytes_per_rank_of_sizes_that_divide(rank_pool, tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=192,
        vocab_size=120,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    replicated = sum(4 * p.numel() for p in model.parameters() if p.dim() == 1)
    for world_size in (1, 2, 3):
        results = rank_pool(world_size).run(_load, str(tmp_path))
        for state, bytes_read, _, total in results:
            _assert_equal(state, model.state_dict())
            assert total == sum(4 * p.numel() for p in model.parameters())
            assert bytes_read <= 1.01 * total / world_size + replicated


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, None])
def test_conversion_of_dtypes(rank_pool, tmp_path, stored, wanted):
    model = make_tiny_model("llama-9h3-tied-rope3").to(stored)
    model.save_pretrained(tmp_path)
    for state, bytes_read, elements, _ in rank_pool(2).run(_load, str(tmp_path), wanted):
        _assert_equal(state, model.state_dict(), wanted or stored)
        assert bytes_read == stored.itemsize * elements


def test_sharded_folder(rank_pool, tmp_path):
    model = make_tiny_model("qwen3-4h1")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    for state, *_ in rank_pool(2).run(_load, str(tmp_path)):
        _assert_equal(state, model.state_dict())


# GGUF ----------------------------------------------------------------------------------------------------------------

_GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _write_gguf(model, path, arch, quantisation):
    """What llama.cpp's converter does to a model: names, permuted heads (llama), quantised matrices."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_name("tiny")
    if arch == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stored = f"blk.{layer}.{_GGUF_LAYER_NAMES[rest]}.{suffix}"
            if arch == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):
                count = heads if rest.endswith("q_proj") else kv_heads
                tensor = tensor.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        else:
            stored = f"{_GGUF_NAMES[stem]}.{suffix}"
        data = tensor.contiguous().numpy()
        if tensor.dim() == 2 and quantisation != "F32":
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(stored, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("arch", "quantisation", "tied"),
    [("llama", "F32", False), ("llama", "Q8_0", True), ("qwen2", "Q4_1", False), ("qwen3", "Q4_0", True)],
)
def test_gguf_equals_transformers(rank_pool, tmp_path, arch, quantisation, tied):
    import transformers

    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch]
    config = getattr(transformers, f"{family}Config")(
        hidden_size=96,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=128 if arch == "qwen3" else 32,  # transformers does not read it from a qwen3 file
        intermediate_size=128,
        vocab_size=65,
        num_hidden_layers=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    _write_gguf(model, tmp_path / "m.gguf", arch, quantisation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = type(model).from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    if quantisation == "F32":
        _assert_equal(oracle, model.state_dict())
    for world_size in (1, 2, 3):
        for state, bytes_read, _, total in rank_pool(world_size).run(_load, str(tmp_path / "m.gguf")):
            _assert_equal(state, oracle)
            # Heads and widths here are multiples of the 32-element blocks, so that no block is read twice. Three heads
            # on two ranks are two thirds and one third.
            assert bytes_read <= total * {1: 1.0, 2: 0.68, 3: 0.40}[world_size]
    for loading, afterwards in rank_pool(2).run(_quantised_either_way, str(tmp_path / "m.gguf")):
        _assert_equal(loading, afterwards)
        assert sum(tensor.dtype == torch.int8 for tensor in loading.values()) == 14 + (not tied)


# Memory --------------------------------------------------------------------------------------------------------------

_MIB = 1 << 20
_ROWS, _COLUMNS, _LAYERS = 1024, 4096, 12  # 12 matrices of 16 MiB in float32: 192 MiB


def _synthetic(group, dtype):
    from tp_kernels.layers import ColumnParallelLinear, RowParallelLinear

    kinds = (ColumnParallelLinear, RowParallelLinear)
    options = {"bias": False, "group": group, "device": "meta", "dtype": dtype}
    layers = [kinds[i % 2](_COLUMNS, _ROWS, **options) for i in range(_LAYERS)]
    return torch.nn.Sequential(*layers).to_empty(device="cpu")


def _peak_while_loading(group, path, dtype):
    """MiB by which the peak resident set grew beyond a model with all pages touched."""
    model = _synthetic(group, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    with DistributedCheckpointLoader(path, group, progress=False) as loader:
        loader.check(model)  # imports, and the communicator's buffers
        before = _peak_memory()
        loader.load_into(model)
        after = _peak_memory()
    assert all(p[0, 0].item() == i and p[-1, -1].item() == i for i, p in enumerate(model.parameters()))
    return after - before


def _peak_memory():
    """Peak resident MiB without the pages of program files, which are mapped in as code is first used."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return (int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])) / 1024


def test_peak_memory_is_within_one_tensor_of_the_shard(tmp_path):
    tensors = {f"{i}.weight": torch.full((_ROWS, _COLUMNS), float(i)) for i in range(_LAYERS)}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    for dtype in (torch.float32, torch.bfloat16):
        # A fresh pool: the peak of a process only ever grows, and earlier tests may have had larger ones.
        with RankPool(2) as pool:
            growth = pool.run(_peak_while_loading, str(tmp_path), dtype)
        shard = _ROWS * _COLUMNS * dtype.itemsize / 2 / _MIB
        assert max(growth) <= shard + 3, (dtype, growth)  # and a little for what is not data


# Smaller things ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", torch.int8])
def test_a_dtype_that_weights_cannot_have_is_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"dtype must be None or one of torch\.float32"):
        load_model(tmp_path, dtype=dtype)


def test_overlap_is_asked_of_the_projections(checkpoints):
    folder, _ = checkpoints
    for options, asked in (({}, "auto"), ({"overlap": "none"}, "none")):
        for layer in load_model(folder / "qwen3-4h1", progress=False, **options).model.layers:
            assert (layer.self_attn.o_proj.overlap, layer.mlp.down_proj.overlap) == (asked, asked)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overlap": "some"}, "auto, none, chunked, fused, got 'some'"),
        ({"overlap": "chunked"}, "for quantised weights"),
    ],
)
def test_an_overlap_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, quantize="int8", **options)


def test_progress_is_reported_to_a_function(checkpoints):
    folder, _ = checkpoints
    calls = []
    model = load_model(folder / "qwen3-4h1", progress=lambda done, total: calls.append((done, total)))
    total = sum(p.numel() * 4 for p in model.parameters())
    assert len(calls) == len(list(iter_tensor_shards(model)))
    assert calls[-1] == (total, total) and calls == sorted(calls)


def test_progress_bar_only_on_a_terminal(checkpoints, capsys, monkeypatch):
    folder, _ = checkpoints
    load_model(folder / "qwen3-4h1", progress=True)
    assert capsys.readouterr() == ("", "")
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    load_model(folder / "qwen3-4h1", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "loading qwen3-4h1" in err


def test_tied_models_load_with_and_without_a_stored_head(checkpoints, tmp_path):
    folder, expected = checkpoints
    name = "llama-9h3-tied-rope3"
    tensors = load_file(folder / name / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / name / "config.json").read_text())
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _assert_equal(full_state_dict(model), expected[name])


def test_extra_tensors_are_an_error_unless_not_strict(checkpoints, tmp_path):
    folder, _ = checkpoints
    tensors = load_file(folder / "qwen3-4h1" / "model.safetensors") | {"surprise.weight": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "qwen3-4h1" / "config.json").read_text())
    model = load_model(folder / "qwen3-4h1")
    loader = DistributedCheckpointLoader(tmp_path)
    with pytest.raises(CheckpointError, match=r"'surprise\.weight': is unexpected"):
        loader.load_into(model)
    loader.load_into(model, strict=False)


def test_config_takes_token_ids_from_the_generation_config(checkpoints, tmp_path):
    folder, _ = checkpoints
    for file in (folder / "qwen3-4h1").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    config = DistributedCheckpointLoader(tmp_path).config()
    assert config["eos_token_id"] == [2, 7] and config["model_type"] == "qwen3"


def test_plain_modules_load_whole(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    loader = DistributedCheckpointLoader(tmp_path)
    loader.load_into(other)
    _assert_equal(other.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        loader.config()
