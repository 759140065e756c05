"""Safetensors by byte range: slices against torch's own slicing, bytes counted, and headers from hostile files.

Tier: no device.
"""

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from tp_kernels.checkpoint import source
from tp_kernels.checkpoint.errors import CheckpointError
from tp_kernels.checkpoint.safetensors_reader import SafetensorsFile

_SLICES = [
    # shape, dim, start, stop
    ((7, 5), None, 0, 0),
    ((7, 5), 0, 2, 6),
    ((7, 5), 1, 1, 4),
    ((7, 5), 1, 0, 5),
    ((7, 5), 0, 3, 3),
    ((64, 33), 1, 31, 33),
    ((11,), 0, 4, 9),
    ((), None, 0, 0),
    ((3, 4, 5), 1, 1, 3),
    ((3, 4, 5), 2, 2, 3),
    ((0, 4), None, 0, 0),
]


def _slice(full, dim, start, stop):
    return full if dim is None else full.narrow(dim, start, stop - start)


@pytest.mark.parametrize("staging", [source.STAGING_BYTES, 48])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_slices_equal_torch(tmp_path, monkeypatch, stored_dtype, target_dtype, staging):
    monkeypatch.setattr(source, "STAGING_BYTES", staging)
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(shape).to(stored_dtype) for i, (shape, *_) in enumerate(_SLICES)}
    save_file(tensors, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for i, (shape, dim, start, stop) in enumerate(_SLICES):
        name = f"t{i}"
        expected = _slice(tensors[name], dim, start, stop).to(target_dtype)
        before = file.bytes_read
        target = torch.full(expected.shape, float("nan"), dtype=target_dtype)
        file.read_into(name, target, dim, start, stop)
        assert torch.equal(target, expected), (shape, dim, start, stop)
        assert file.bytes_read - before == expected.numel() * stored_dtype.itemsize


def test_writes_into_strided_views_and_parameters_and_nothing_else(tmp_path):
    full = torch.arange(24.0).reshape(6, 4)
    save_file({"w": full}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    holder = torch.zeros(4, 10)
    file.read_into("w", holder[:, 2:8].t(), None, 0, 0)
    assert torch.equal(holder[:, 2:8], full.t())
    assert holder[:, :2].eq(0).all() and holder[:, 8:].eq(0).all()
    parameter = torch.nn.Parameter(torch.zeros(10, 4))
    file.read_into("w", parameter.detach()[3:5], 0, 1, 3)
    assert torch.equal(parameter[3:5], full[1:3]) and parameter[:3].eq(0).all() and parameter[5:].eq(0).all()


def test_wrong_target_shape_or_slice_is_an_error(tmp_path):
    save_file({"w": torch.zeros(6, 4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for target, dim, start, stop in [((6, 3), None, 0, 0), ((3, 4), 0, 4, 7), ((2, 4), 0, 1, 4), ((6, 4), 2, 0, 1)]:
        with pytest.raises(CheckpointError, match="'w'"):
            file.read_into("w", torch.zeros(target), dim, start, stop)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100, 100)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, os.path.getsize(path) - 8)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'w': truncated"):
        file.read_into("w", torch.zeros(100, 100), None, 0, 0)


def test_integer_weights_are_refused(tmp_path):
    save_file({"w": torch.ones(4, dtype=torch.int32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="stored as I32"):
        SafetensorsFile(tmp_path / "a.safetensors").dtype("w")


# Hostile headers -----------------------------------------------------------------------------------------------------


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _file(header, data=b"\0" * 8, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


_HOSTILE = {
    "empty file": (b"", "at least 8 bytes"),
    "header larger than the limit": (_file({}, length=1 << 62), "allows"),
    "header larger than the file": (_file({}, length=99_000_000), "truncated"),
    "not json": (_file(b"{hello}"), "JSON"),
    "not an object": (_file(b"[1, 2]"), "begin with"),
    "leading blank": (_file(b' {"a": 1}'), "begin with"),
    "not utf-8": (_file(b'{"\xff\xfe": 1}'), "UTF-8"),
    "deep nesting": (_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "JSON"),
    "endless integer": (_file(b'{"a":' + b"9" * 10_000 + b"}"), "JSON"),
    "duplicate tensor": (_file(b'{"a": 1, "a": 2}'), "twice"),
    "duplicate field": (
        _file(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}'),
        "twice",
    ),
    "metadata is a list": (_file({"__metadata__": [], "a": _entry()}), "__metadata__"),
    "metadata of numbers": (_file({"__metadata__": {"x": 1}, "a": _entry()}), "__metadata__"),
    "entry is null": (_file({"a": None}), "'a'"),
    "entry lacks a field": (_file({"a": {"dtype": "F32", "shape": [2]}}), "'a'"),
    "unknown dtype": (_file({"a": _entry("F33")}), "unknown dtype"),
    "dtype is a number": (_file({"a": _entry(7)}), "unknown dtype"),
    "negative dimension": (_file({"a": _entry(shape=(-2,))}), "shape"),
    "two negative dimensions": (_file({"a": _entry(shape=(-1, -2))}), "shape"),
    "dimension is a float": (_file({"a": _entry(shape=(2.0,))}), "shape"),
    "dimension is a bool": (_file({"a": _entry(shape=(True, 2))}), "shape"),
    "overflowing product": (_file({"a": _entry(shape=(1 << 40, 1 << 40))}), "too many"),
    "wraps to eight bytes": (_file({"a": _entry(shape=((1 << 62) + 2,))}), "too many"),
    "dimension of 2^64": (_file({"a": _entry(shape=(1 << 64,))}), "shape"),
    "too many dimensions": (_file({"a": _entry(shape=(1,) * 100)}), "shape"),
    "offsets beyond the end": (_file({"a": _entry(shape=(4,), offsets=(0, 16))}), "outside"),
    "offsets reversed": (_file({"a": _entry(offsets=(8, 0))}), "outside"),
    "negative offset": (_file({"a": _entry(offsets=(-8, 0))}), "data_offsets"),
    "three offsets": (_file({"a": _entry(offsets=(0, 4, 8))}), "data_offsets"),
    "bytes do not match the shape": (_file({"a": _entry(shape=(3,))}), "takes 12 bytes"),
    "overlap": (_file({"a": _entry(shape=(2,)), "b": _entry(shape=(1,), offsets=(4, 8))}), "overlaps"),
    "aliased": (_file({"a": _entry(), "b": _entry()}), "overlaps"),
    "gap": (_file({"a": _entry(shape=(1,), offsets=(4, 8))}), "belong to no tensor"),
    "trailing bytes": (_file({"a": _entry(shape=(1,), offsets=(0, 4))}), "belong to no tensor"),
    "truncated data": (_file({"a": _entry()}, data=b"\0" * 7), "outside"),
    "a zip archive": (b"PK\x03\x04" + b"\0" * 64, "pickle"),
    "a pickle": (b"\x80\x04\x95" + b"\0" * 64, "pickle"),
}


@pytest.mark.parametrize("case", _HOSTILE)
def test_hostile_header(tmp_path, case):
    content, message = _HOSTILE[case]
    path = tmp_path / "evil.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert "evil.safetensors" in str(caught.value)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    good = tmp_path / "good.safetensors"
    save_file({f"layer.{i}": torch.randn(3, 4) for i in range(4)}, good, metadata={"format": "pt"})
    original = good.read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(header_end)] = generator.randrange(256)
        if generator.random() < 0.3:
            del damaged[generator.randrange(len(damaged)) :]
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(damaged)
        try:
            file = SafetensorsFile(path)
            for name, entry in file.entries.items():
                file.read_into(name, torch.empty(entry.shape, dtype=file.dtype(name)), None, 0, 0)
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_special_files_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="regular"):
        SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path)
    with pytest.raises(CheckpointError, match="opened"):
        SafetensorsFile(tmp_path / "none.safetensors")
