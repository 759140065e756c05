"""Safetensors files, read by byte range. The header is checked in full before a byte of tensor data is touched.

The rules are the format's own: an 8-byte little-endian length, a JSON object without duplicate keys, byte ranges that
tile the rest of the file without gap or overlap, and lengths that agree with shape and dtype. The header comes from
strangers, so every number in it is a claim to be checked; nothing is allocated on its word.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, NamedTuple

import torch

from tp_kernels.checkpoint.errors import CheckpointError, pickle_refusal
from tp_kernels.checkpoint.source import CountedFile, check_slice, read_tensor_slice

__all__ = ["SafetensorsFile", "TensorEntry", "parse_json"]

# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 60

# Names in the format, their width, and the torch dtype where one exists.
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (1, torch.bool),
    "U8": (1, torch.uint8),
    "I8": (1, torch.int8),
    "F8_E4M3": (1, getattr(torch, "float8_e4m3fn", None)),
    "F8_E5M2": (1, getattr(torch, "float8_e5m2", None)),
    "F8_E8M0": (1, None),
    "I16": (2, torch.int16),
    "U16": (2, None),
    "F16": (2, torch.float16),
    "BF16": (2, torch.bfloat16),
    "I32": (4, torch.int32),
    "U32": (4, None),
    "F32": (4, torch.float32),
    "I64": (8, torch.int64),
    "U64": (8, None),
    "F64": (8, torch.float64),
    "C64": (8, torch.complex64),
}
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TensorEntry(NamedTuple):
    """One tensor of a file: dtype name, shape, position in the file and length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse_json(data: bytes, *, file: str, what: str) -> Any:
    """Parse untrusted JSON; CheckpointError for anything that is not valid, or that repeats a key."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{what} has the key {repeated!r} twice", file=file)
        return result

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not valid UTF-8: {error}", file=file) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}", file=file) from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


class SafetensorsFile:
    """One ``.safetensors`` file.

    Attributes:
        path: the file.
        entries: name -> ``TensorEntry``, in the order of the data.
    """

    def __init__(self, path: str | os.PathLike):
        """Open the file and check its header.

        Raises:
            CheckpointError: it cannot be opened, is truncated, or its header breaks a rule of the format.
        """
        self._file = CountedFile(path)
        self.path = self._file.path
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise
        self._file.bytes_read = 0  # from here on it counts tensor data

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data requested so far."""
        return self._file.bytes_read

    def _error(self, message: str, tensor: str = "") -> CheckpointError:
        return CheckpointError(message, file=self.path, tensor=tensor)

    def _read_header(self) -> dict[str, TensorEntry]:
        size = self._file.size
        if size < 8:
            raise self._error(f"truncated: a safetensors file has at least 8 bytes, this one has {size}")
        prefix = self._file.read(0, 8)
        if prefix[:4] == b"PK\x03\x04" or (prefix[0] == 0x80 and prefix[1] in (2, 3, 4, 5)):
            raise pickle_refusal(self.path)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise self._error(f"the header claims {length} bytes; the format allows {MAX_HEADER_BYTES}")
        if length > size - 8:
            raise self._error(f"truncated: the header claims {length} bytes, the file has {size - 8} after its length")
        raw = self._file.read(8, length)
        if not raw.startswith(b"{"):
            raise self._error("the header does not begin with '{'")
        header = parse_json(raw, file=self.path, what="the header")
        if not isinstance(header, dict):
            raise self._error("the header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("__metadata__ is not a map of strings")

        data_start, data_bytes = 8 + length, size - 8 - length
        entries = {name: self._entry(name, info, data_start, data_bytes) for name, info in header.items()}
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
        position, previous = data_start, ""
        for name, entry in ordered.items():
            if entry.offset < position:
                raise self._error(f"its data overlaps that of {previous!r}", name)
            if entry.offset > position:
                raise self._error(f"{entry.offset - position} bytes before its data belong to no tensor", name)
            position, previous = entry.offset + entry.nbytes, name
        if position != size:
            raise self._error(f"{size - position} bytes at the end of the file belong to no tensor")
        return ordered

    def _entry(self, name: str, info: Any, data_start: int, data_bytes: int) -> TensorEntry:
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise self._error("its header entry must have exactly dtype, shape and data_offsets", name)
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise self._error(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}", name)
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_count(n) for n in shape):
            raise self._error(
                f"its shape must be at most {_MAX_DIMENSIONS} integers from 0 to 2^63-1, got {_short(shape)}", name
            )
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
            raise self._error(f"data_offsets must be two integers from 0 to 2^63-1, got {_short(offsets)}", name)
        begin, end = offsets
        if begin > end or end > data_bytes:
            raise self._error(
                f"data_offsets [{begin}, {end}] lie outside the {data_bytes} bytes of data: the file is truncated or "
                "its header is wrong",
                name,
            )
        elements = math.prod(shape)
        if elements > _MAX_ELEMENTS:
            raise self._error(f"shape {_short(shape)} has too many elements", name)
        if elements * _DTYPES[dtype][0] != end - begin:
            raise self._error(
                f"shape {shape} of {dtype} takes {elements * _DTYPES[dtype][0]} bytes, data_offsets hold {end - begin}",
                name,
            )
        return TensorEntry(dtype, tuple(shape), data_start + begin, end - begin)

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype. CheckpointError if it is not one in which weights can be read."""
        stored = self.entries[name].dtype
        dtype = _DTYPES[stored][1]
        if dtype not in _WEIGHT_DTYPES:
            raise self._error(
                f"is stored as {stored}; expected F64, F32, F16 or BF16 (quantised checkpoints are not supported)",
                name,
            )
        return dtype

    def read_into(self, name: str, target: torch.Tensor, dim: int | None, start: int, stop: int) -> None:
        """Fill ``target`` with the slice ``[start, stop)`` along ``dim`` (None: the whole tensor)."""
        entry = self.entries[name]
        check_slice(entry.shape, target, dim, start, stop, file=self.path, tensor=name)
        read_tensor_slice(
            self._file, entry.offset, entry.shape, self.dtype(name), target, dim, start, stop, tensor=name
        )

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
