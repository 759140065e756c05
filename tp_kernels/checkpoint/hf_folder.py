"""Hugging Face folders: ``model.safetensors``, or shards with ``model.safetensors.index.json``, and ``config.json``.

The index names files, so it is treated as hostile: names must be plain and must resolve inside the folder (or, in a
Hugging Face cache, inside the ``blobs`` folder next to ``snapshots``, where every file of a snapshot really lives).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from tp_kernels.checkpoint.errors import PICKLE_SUFFIXES, CheckpointError, pickle_refusal
from tp_kernels.checkpoint.safetensors_reader import SafetensorsFile, parse_json
from tp_kernels.checkpoint.source import CountedFile

__all__ = ["HFFolderSource", "read_json_file"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_CONFIG_BYTES = 16 << 20
_MAX_INDEX_BYTES = 100_000_000


def read_json_file(path: str, *, limit: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError if it cannot be read, exceeds ``limit`` bytes or is something else."""
    file = CountedFile(path)
    try:
        if file.size > limit:
            raise CheckpointError(f"has {file.size} bytes; at most {limit} are expected", file=path)
        content = parse_json(file.read(0, file.size), file=path, what="the file")
    finally:
        file.close()
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", file=path)
    return content


class HFFolderSource:
    """The tensors of a Hugging Face folder. Implements ``TensorSource``.

    Attributes:
        path: the folder.
        unlisted: tensors found in shards but not in the index, or found in another shard than the index says.
    """

    def __init__(self, path: str | os.PathLike):
        """Open every safetensors file of the folder and check all headers.

        Raises:
            CheckpointError: no safetensors file, only pickle files, a bad index, or a bad header.
        """
        self.path = os.fspath(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._where: dict[str, SafetensorsFile] = {}
        self.unlisted: list[str] = []
        self._config: dict[str, Any] | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        index = os.path.join(self.path, INDEX_FILE)
        # An index beside a single file is a leftover in either direction; transformers takes the single file, so do we.
        if os.path.lexists(os.path.join(self.path, SINGLE_FILE)):
            file = self._open_file(SINGLE_FILE, os.path.join(self.path, SINGLE_FILE))
            self._where = dict.fromkeys(file.entries, file)
        elif os.path.lexists(index):
            self._open_index(index)
        else:
            raise self._nothing_found()
        if os.path.lexists(os.path.join(self.path, "config.json")):
            self._config = read_json_file(os.path.join(self.path, "config.json"))
            # The generation config knows all end-of-sequence ids; config.json often names only one of them.
            generation = os.path.join(self.path, "generation_config.json")
            if os.path.lexists(generation):
                for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
                    value = read_json_file(generation).get(key)
                    if value is not None:
                        self._config[key] = value

    def _nothing_found(self) -> CheckpointError:
        try:
            present = sorted(os.listdir(self.path))
        except OSError as error:
            return CheckpointError(f"cannot be listed: {error}", file=self.path)
        for name in present:
            if name.endswith(PICKLE_SUFFIXES) or any(name.endswith(f"{s}.index.json") for s in PICKLE_SUFFIXES):
                return pickle_refusal(os.path.join(self.path, name))
        return CheckpointError(f"has neither {SINGLE_FILE} nor {INDEX_FILE} nor a single .gguf file", file=self.path)

    def _open_index(self, index: str) -> None:
        weight_map = read_json_file(index, limit=_MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("has no weight_map", file=index)
        for tensor, name in weight_map.items():
            if not isinstance(name, str):
                raise CheckpointError(f"weight_map must give a file name, got {name!r}", file=index, tensor=tensor)
            if name not in self._files:
                self._open_file(name, index, tensor)
            file = self._files[name]
            if tensor not in file.entries:
                raise CheckpointError(f"is not in {name}, where {INDEX_FILE} says it is", file=file.path, tensor=tensor)
            self._where[tensor] = file
        for file in self._files.values():
            self.unlisted += [name for name in file.entries if self._where.get(name) is not file]

    def _open_file(self, name: str, index: str, tensor: str = "") -> SafetensorsFile:
        """Open a shard after checking that its name cannot lead out of the folder."""
        if name.endswith(PICKLE_SUFFIXES):
            raise pickle_refusal(os.path.join(self.path, os.path.basename(name)))
        if (
            not name
            or name != os.path.basename(name)
            or "\\" in name
            or "\0" in name
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"names the file {name!r}; expected the plain name of a .safetensors file in the same folder",
                file=index,
                tensor=tensor,
            )
        path = os.path.join(self.path, name)
        if not os.path.exists(path):
            raise CheckpointError(f"names {name}, which is missing or a broken link", file=index, tensor=tensor)
        if not self._inside(os.path.realpath(path)):
            raise CheckpointError(
                f"is a link that leads out of the folder, to {os.path.realpath(path)}", file=path, tensor=tensor
            )
        self._files[name] = SafetensorsFile(path)
        return self._files[name]

    def _inside(self, real: str) -> bool:
        folder = os.path.realpath(self.path)
        allowed = [folder]
        if os.path.basename(os.path.dirname(folder)) == "snapshots":
            allowed.append(os.path.join(os.path.dirname(os.path.dirname(folder)), "blobs"))
        return any(os.path.commonpath([base, real]) == base for base in allowed)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data requested so far."""
        return sum(file.bytes_read for file in self._files.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in the checkpoint."""
        return sum(file.entries[name].nbytes for name, file in self._where.items())

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._where.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self._where[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; CheckpointError if weights cannot be read from it."""
        return self._where[name].dtype(name)

    def file_of(self, name: str) -> str:
        """The file that holds the tensor."""
        return self._where[name].path if name in self._where else self.path

    def config(self) -> dict[str, Any]:
        """``config.json``, with the token ids of ``generation_config.json`` where that has them."""
        if self._config is None:
            raise CheckpointError("has no config.json", file=self.path)
        return dict(self._config)

    def read_into(self, name: str, target: torch.Tensor, dim: int | None, start: int, stop: int) -> None:
        """Fill ``target`` with the slice ``[start, stop)`` along ``dim`` (None: the whole tensor)."""
        self._where[name].read_into(name, target, dim, start, stop)

    def close(self) -> None:
        """Close all files; safe to call twice."""
        for file in self._files.values():
            file.close()
