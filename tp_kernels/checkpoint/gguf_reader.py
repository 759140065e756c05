"""GGUF files as a ``TensorSource``: byte-range reads, dequantised by the ``gguf`` library, in Hugging Face layout.

Only the blocks that a slice touches are read. Columns of a quantised matrix come in blocks of 32 (Q8_0, Q4_0, Q4_1) or
256 (Q4_K, Q6_K); a slice that is not aligned to them reads the covering blocks. Llama-architecture files interleave the
two halves of every query and key head; that is undone here, head by head.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from tp_kernels.checkpoint.errors import CheckpointError
from tp_kernels.checkpoint.gguf_config import gguf_to_hf_config, hf_name, permuted_head_rows
from tp_kernels.checkpoint.gguf_header import GGUFTensorInfo, open_gguf
from tp_kernels.checkpoint.source import check_slice, read_tensor_slice

__all__ = ["GGUFSource"]

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_ROPE_FACTORS = "rope_freqs.weight"

# Elements dequantised at a time: the library makes several temporaries of this size in float32.
_CHUNK_ELEMENTS = 1 << 19


class GGUFSource:
    """The tensors of a GGUF file under their Hugging Face names. Implements ``TensorSource``.

    Attributes:
        path: the file.
        metadata: the file's key-value pairs (int, float, bool, str, list of str, numpy array).
        unlisted: always empty (a GGUF file has no second list of its tensors).
    """

    def __init__(self, path: str | os.PathLike):
        """Open the file, check its header and map its metadata.

        Raises:
            CheckpointError: see ``gguf_header`` and ``gguf_config``.
        """
        self.path = os.fspath(path)
        self.unlisted: list[str] = []
        self._file, (self.metadata, tensors) = open_gguf(path)
        try:
            self._architecture = self.metadata.get("general.architecture")
            self._config = gguf_to_hf_config(self.metadata, tensors, self._rope_factors(tensors), file=self.path)
            self._tensors: dict[str, GGUFTensorInfo] = {}
            for stored, info in tensors.items():
                name = hf_name(stored)
                if name in self._tensors:
                    raise CheckpointError("two tensors of the file stand for it", file=self.path, tensor=name)
                if stored != _ROPE_FACTORS:  # it is part of the configuration
                    self._tensors[name] = info
        except BaseException:
            self.close()
            raise
        self._file.bytes_read = 0

    def _rope_factors(self, tensors: dict[str, GGUFTensorInfo]) -> np.ndarray | None:
        info = tensors.get(_ROPE_FACTORS)
        if info is None:
            return None
        if info.type != "F32" or len(info.shape) != 1 or info.shape[0] > 1 << 16:
            raise CheckpointError("must be a short F32 vector", file=self.path, tensor=_ROPE_FACTORS)
        return np.frombuffer(self._file.read(info.offset, info.nbytes, tensor=_ROPE_FACTORS), dtype="<f4")

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data requested so far."""
        return self._file.bytes_read

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in the file."""
        return sum(info.nbytes for info in self._tensors.values())

    def names(self) -> Iterable[str]:
        """Names of all tensors, in Hugging Face terms where they have one."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor, outermost dimension first."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """float32 for quantised tensors, else the stored dtype; CheckpointError for types that cannot be read."""
        kind = self._tensors[name].type
        if kind in _PLAIN:
            return _PLAIN[kind]
        if kind in _QUANTISED:
            return torch.float32
        raise CheckpointError(
            f"has type {kind}, which is not supported; supported: {', '.join((*_PLAIN, *_QUANTISED))}",
            file=self.path,
            tensor=name,
        )

    def file_of(self, name: str) -> str:
        """The file."""
        return self.path

    def config(self) -> dict[str, Any]:
        """The metadata with the keys of a Hugging Face ``config.json``."""
        return dict(self._config)

    def read_into(self, name: str, target: torch.Tensor, dim: int | None, start: int, stop: int) -> None:
        """Fill ``target`` with the slice ``[start, stop)`` along ``dim`` (None: the whole tensor), dequantised."""
        info = self._tensors[name]
        dtype = self.dtype(name)
        check_slice(info.shape, target, dim, start, stop, file=self.path, tensor=name)
        if target.numel() == 0:
            return
        head_rows = permuted_head_rows(name, self._config, self._architecture)
        if head_rows is None and info.type in _PLAIN:
            read_tensor_slice(self._file, info.offset, info.shape, dtype, target, dim, start, stop, tensor=name)
            return
        if len(info.shape) > 2:
            raise CheckpointError(f"has {len(info.shape)} dimensions; expected 1 or 2", file=self.path, tensor=name)
        rows, columns = info.shape if len(info.shape) == 2 else (info.shape[0], 1)
        if columns == 1 and info.block > 1:  # a quantised vector is one row of blocks
            rows, columns, dim = 1, rows, None if dim is None else 1
            target = target.detach().unsqueeze(0)
        elif target.dim() == 1:
            target = target.detach().unsqueeze(1)
        if head_rows is not None and rows % head_rows:
            raise CheckpointError(
                f"has {rows} rows, not a multiple of the head size {head_rows}", file=self.path, tensor=name
            )
        first, last = (start, stop) if dim == 0 else (0, rows)
        left, right = (start, stop) if dim == 1 else (0, columns)
        self._read_blocks(name, info, target.detach(), (first, last), (left, right), columns, head_rows or 1)

    def _read_blocks(self, name, info, target, rows, columns, width, head_rows) -> None:
        """Fill ``target`` with ``rows`` x ``columns`` of a matrix ``width`` wide, some whole heads at a time."""
        first_block, last_block = columns[0] // info.block, -(-columns[1] // info.block)
        row_bytes = width // info.block * info.block_bytes
        span = (last_block - first_block) * info.block_bytes
        skip = columns[0] - first_block * info.block
        step = max(1, _CHUNK_ELEMENTS // ((last_block - first_block) * info.block * head_rows)) * head_rows
        # Whole heads must be at hand to undo their interleaving; shards consist of whole heads, so nothing is read in
        # vain.
        begin, end = rows[0] // head_rows * head_rows, -(-rows[1] // head_rows) * head_rows
        for top in range(begin, end, step):
            bottom = min(top + step, end)
            raw = self._file.staging((bottom - top, span), torch.uint8)
            read_tensor_slice(
                self._file,
                info.offset + top * row_bytes,
                (bottom - top, row_bytes),
                torch.uint8,
                raw,
                1 if span < row_bytes else 0,
                first_block * info.block_bytes if span < row_bytes else 0,
                last_block * info.block_bytes if span < row_bytes else bottom - top,
                tensor=name,
            )
            values = self._dequantise(raw, info)[:, skip : skip + columns[1] - columns[0]]
            if head_rows > 1:
                values = values.reshape(-1, head_rows // 2, 2, values.shape[1]).transpose(1, 2)
                values = values.reshape(bottom - top, -1)
            low, high = max(top, rows[0]), min(bottom, rows[1])
            target[low - rows[0] : high - rows[0]].copy_(values[low - top : high - top])

    @staticmethod
    def _dequantise(raw: torch.Tensor, info: GGUFTensorInfo) -> torch.Tensor:
        """[rows, bytes] to [rows, columns]."""
        if info.type in _PLAIN:
            return raw.view(_PLAIN[info.type])
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        # Damaged blocks may hold NaN or infinite scales: that is a matter of the weights, not of the arithmetic.
        with np.errstate(all="ignore"):
            return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[info.type]))

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()
