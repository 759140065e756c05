"""The header of a GGUF file: metadata and tensor table, parsed as hostile input.

Own parser, because the ``gguf`` library's reader trusts every length and offset in the file (a count of 2^60 makes it
spin or allocate), and takes 2.8 s for the 98,000 strings of a SmolLM2 tokenizer where this one takes 0.1 s. Block sizes
and dequantisation stay with the library.
"""

from __future__ import annotations

import math
import os
import struct
from typing import Any, NamedTuple

import numpy as np

from tp_kernels.checkpoint.errors import CheckpointError, pickle_refusal
from tp_kernels.checkpoint.source import CountedFile

__all__ = ["GGUFHeader", "GGUFTensorInfo", "read_gguf_header"]

MAX_HEADER_BYTES = 512 << 20
_MAX_STRING_BYTES = 64 << 20
_MAX_NAME_BYTES = 1024
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_MIN_KV_BYTES = 8 + 1 + 4 + 1  # key length, one letter, type, the smallest value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, one letter, n_dims, one dimension, type, offset
_BLOCK = 1 << 20

_SCALARS = {
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class GGUFTensorInfo(NamedTuple):
    """One row of the tensor table.

    Attributes:
        shape: outermost dimension first, as PyTorch counts (the file stores them reversed).
        type: name of the ggml type, for example ``"Q4_K"``.
        block, block_bytes: elements and bytes of a quantisation block (1 and the item size for plain floats).
        offset: position in the file.
        nbytes: length in the file.
    """

    shape: tuple[int, ...]
    type: str
    block: int
    block_bytes: int
    offset: int
    nbytes: int


class GGUFHeader(NamedTuple):
    """``metadata``: key -> int, float, bool, str, list of str or numpy array. ``tensors``: name -> info."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensorInfo]


class _Cursor:
    """Sequential reads of the header in blocks, each bounded by the end of the file before it is made."""

    def __init__(self, file: CountedFile):
        self.file = file
        self.position = 0
        self._buffer = b""
        self._start = 0

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{message} (at byte {self.position} of the header)", file=self.file.path)

    @property
    def remaining(self) -> int:
        return min(self.file.size, MAX_HEADER_BYTES) - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.remaining:
            raise self.fail(f"truncated or corrupt: {what} needs {count} bytes, {self.remaining} are left")
        begin = self.position - self._start
        if begin + count > len(self._buffer):
            wanted = min(max(count, _BLOCK), self.file.size - self.position)
            self._buffer, self._start, begin = self.file.read(self.position, wanted), self.position, 0
        self.position += count
        return self._buffer[begin : begin + count]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str, limit: int = _MAX_STRING_BYTES) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > limit:
            raise self.fail(f"{what} claims {length} bytes; at most {limit} are expected")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not valid UTF-8") from error

    def count(self, what: str, smallest: int) -> int:
        """A number of items of which each takes at least ``smallest`` bytes."""
        count = self.number("<Q", f"the number of {what}")
        if count * smallest > self.remaining:
            raise self.fail(f"claims {count} {what}, which do not fit in the {self.remaining} bytes that are left")
        return count


def read_gguf_header(file: CountedFile) -> GGUFHeader:
    """Parse and check the header of ``file``.

    Raises:
        CheckpointError: not a GGUF file, a version or byte order that is not supported, or any length, count, type,
        shape or
            offset that does not hold together with the size of the file.
    """
    cursor = _Cursor(file)
    magic = cursor.take(4, "the magic number") if file.size >= 4 else b""
    if magic != b"GGUF":
        if magic == b"PK\x03\x04" or magic[:1] == b"\x80":
            raise pickle_refusal(file.path)
        raise CheckpointError(f"is not a GGUF file: it begins with {magic!r}", file=file.path)
    version = cursor.number("<I", "the version")
    if version and version & 0xFFFF == 0:
        raise CheckpointError("is a big-endian GGUF file; only little-endian ones are supported", file=file.path)
    if version not in (2, 3):
        raise CheckpointError(f"is GGUF version {version}; versions 2 and 3 are supported", file=file.path)
    tensor_count = cursor.count("tensors", _MIN_TENSOR_BYTES)
    metadata_count = cursor.count("metadata entries", _MIN_KV_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string("a metadata key", 1 << 16)
        if key in metadata:
            raise cursor.fail(f"the metadata key {key!r} appears twice")
        metadata[key] = _value(cursor, cursor.number("<I", f"the type of {key!r}"), key)
    return GGUFHeader(metadata, _tensor_table(cursor, tensor_count, _alignment(cursor, metadata)))


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.string(f"the value of {key!r}")
    if kind == _BOOL:
        return _bools(cursor, cursor.take(1, f"the value of {key!r}"), key)[0]
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind][0], f"the value of {key!r}")
    if kind != _ARRAY:
        raise cursor.fail(f"{key!r} has the unknown type {kind}")
    item = cursor.number("<I", f"the item type of {key!r}")
    if item == _STRING:
        count = cursor.count(f"strings in {key!r}", 8)
        what = f"a string of {key!r}"
        return [cursor.string(what) for _ in range(count)]
    if item == _BOOL:
        return _bools(cursor, cursor.take(cursor.count(f"items in {key!r}", 1), f"the items of {key!r}"), key)
    if item in _SCALARS:
        dtype = np.dtype(_SCALARS[item][1])
        count = cursor.count(f"items in {key!r}", dtype.itemsize)
        return np.frombuffer(cursor.take(count * dtype.itemsize, f"the items of {key!r}"), dtype=dtype)
    raise cursor.fail(f"{key!r} is an array of the unsupported type {item}")


def _bools(cursor: _Cursor, data: bytes, key: str) -> list[bool]:
    if any(byte > 1 for byte in data):
        raise cursor.fail(f"{key!r} has a boolean that is neither 0 nor 1")
    return [byte == 1 for byte in data]


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise cursor.fail(f"general.alignment must be a power of two up to {_MAX_ALIGNMENT}, got {value!r}")
    return value


def _tensor_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensorInfo]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # slow to import, so only when a GGUF is read

    path, size = cursor.file.path, cursor.file.size
    table: dict[str, GGUFTensorInfo] = {}
    for _ in range(count):
        name = cursor.string("a tensor name", _MAX_NAME_BYTES)
        if name in table:
            raise CheckpointError("appears twice in the tensor table", file=path, tensor=name)
        rank = cursor.number("<I", f"the dimensions of tensor {name!r}")
        if not 1 <= rank <= _MAX_DIMENSIONS:
            raise CheckpointError(f"has {rank} dimensions; 1 to {_MAX_DIMENSIONS} are allowed", file=path, tensor=name)
        dims = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, f"the shape of tensor {name!r}"))
        code = cursor.number("<I", f"the type of tensor {name!r}")
        offset = cursor.number("<Q", f"the offset of tensor {name!r}")
        try:
            kind = GGMLQuantizationType(code)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"has the unknown ggml type {code}", file=path, tensor=name) from error
        elements = math.prod(dims)
        if elements == 0 or elements >= 1 << 60:
            raise CheckpointError(f"has the impossible shape {list(dims[::-1])}", file=path, tensor=name)
        if dims[0] % block:
            raise CheckpointError(
                f"has rows of {dims[0]} elements, not a multiple of the {block}-element blocks of {kind.name}",
                file=path,
                tensor=name,
            )
        if offset % alignment:
            raise CheckpointError(f"its offset {offset} is not a multiple of {alignment}", file=path, tensor=name)
        table[name] = GGUFTensorInfo(
            tuple(reversed(dims)), kind.name, block, block_bytes, offset, elements // block * block_bytes
        )

    start = -(-cursor.position // alignment) * alignment
    end, previous = 0, ""
    for name, info in sorted(table.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise CheckpointError(f"its data overlaps that of {previous!r}", file=path, tensor=name)
        end, previous = info.offset + info.nbytes, name
        if start + end > size:
            raise CheckpointError(
                f"truncated: its data would end at byte {start + end}, the file has {size}", file=path, tensor=name
            )
    return {name: info._replace(offset=start + info.offset) for name, info in table.items()}


def open_gguf(path: str | os.PathLike) -> tuple[CountedFile, GGUFHeader]:
    """Open a GGUF file and parse its header; the caller closes the file."""
    file = CountedFile(path)
    try:
        header = read_gguf_header(file)
    except BaseException:
        file.close()
        raise
    file.bytes_read = 0  # from here on it counts tensor data
    return file, header
