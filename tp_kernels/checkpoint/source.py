"""``TensorSource``: what the loader needs from a file format, and the counted byte-range reads that the formats share.

A rank reads only the bytes of its slice. Where the target has the file's dtype and lies contiguously in CPU memory,
``preadv`` writes straight into it; otherwise a small staging buffer is filled and copied from. Reading a slice of
columns takes one ``preadv`` per row: the bytes in between are never requested (a mapping would fault in whole pages,
and would turn a file that shrinks under the reader into SIGBUS in place of an error that names the tensor).
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from tp_kernels.checkpoint.errors import CheckpointError

__all__ = ["CountedFile", "TensorSource", "check_slice", "read_tensor_slice"]

# Staging buffer for dtype conversion: large enough that a read's fixed cost vanishes, small beside any weight matrix.
STAGING_BYTES = 4 << 20

# The kernel transfers at most 0x7ffff000 bytes a call.
_MAX_READ = 1 << 30


class TensorSource(Protocol):
    """Named tensors in Hugging Face layout, whatever the format stores.

    Attributes:
        path: the file or folder.
        bytes_read: bytes of tensor data requested from files so far (headers and metadata not included).
        total_bytes: bytes of tensor data in the checkpoint.
    """

    path: str
    bytes_read: int
    total_bytes: int

    def names(self) -> Iterable[str]:
        """Names of all tensors, under the names the Hugging Face model uses."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which the tensor arrives; quantised tensors arrive in float32. CheckpointError if unreadable."""

    def file_of(self, name: str) -> str:
        """The file that holds the tensor, for messages."""

    def config(self) -> dict[str, Any]:
        """The model's configuration with the keys of a Hugging Face ``config.json``."""

    def read_into(self, name: str, target: torch.Tensor, dim: int | None, start: int, stop: int) -> None:
        """Fill ``target`` with the slice ``[start, stop)`` along ``dim`` (None: all of it), converting the dtype."""

    def close(self) -> None:
        """Close the files."""


class CountedFile:
    """A regular file opened for positioned reads. Counts the bytes it was asked for; short reads are errors."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.bytes_read = 0
        self._fd = -1
        self._staging: torch.Tensor | None = None
        try:
            # O_NONBLOCK: opening a FIFO that someone named like a checkpoint must not block for ever.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except (OSError, ValueError) as error:
            self.close()
            raise CheckpointError(f"cannot be opened: {error}", file=self.path) from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError("not a regular file", file=self.path)
        self.size = status.st_size

    def read(self, offset: int, count: int, *, tensor: str = "") -> bytes:
        """``count`` bytes at ``offset``."""
        if count < 0 or offset < 0 or offset + count > self.size:
            raise CheckpointError(
                f"truncated: bytes {offset} to {offset + count} are needed, the file has {self.size}",
                file=self.path,
                tensor=tensor,
            )
        buffer = bytearray(count)
        self.read_into(offset, memoryview(buffer), tensor=tensor)
        return bytes(buffer)

    def read_into(self, offset: int, view: memoryview, *, tensor: str = "") -> None:
        """Fill ``view`` (bytes) from ``offset``. CheckpointError if the file ends before or cannot be read."""
        wanted = len(view)
        self.bytes_read += wanted
        done = 0
        try:
            while done < wanted:
                got = os.preadv(self._fd, [view[done : done + _MAX_READ]], offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"truncated: the file ends {wanted - done} bytes before the end of the data",
                        file=self.path,
                        tensor=tensor,
                    )
                done += got
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error}", file=self.path, tensor=tensor) from error

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised CPU tensor in a buffer that is kept for the next call: the earlier result is overwritten.

        Kept because the allocator otherwise piled up one buffer after another (aligned blocks do not fit the holes that
        their predecessors leave), 4 to 5 of them while loading a model.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if self._staging is None or self._staging.numel() < nbytes:
            self._staging = None  # before allocating, so that there never are two
            self._staging = torch.empty(max(nbytes, STAGING_BYTES), dtype=torch.uint8)
        return self._staging[:nbytes].view(dtype).view(shape)

    def close(self) -> None:
        """Close the descriptor and free the buffer; safe to call twice."""
        self._staging = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self):
        self.close()


def check_slice(
    shape: tuple[int, ...], target: torch.Tensor, dim: int | None, start: int, stop: int, *, file: str, tensor: str
) -> None:
    """CheckpointError unless ``target`` has the shape of the slice ``[start, stop)`` of ``shape`` along ``dim``."""
    expected = list(shape)
    if dim is not None:
        if not 0 <= dim < len(shape) or not 0 <= start <= stop <= shape[dim]:
            raise CheckpointError(
                f"slice [{start}, {stop}) along dimension {dim} does not lie inside shape {list(shape)}",
                file=file,
                tensor=tensor,
            )
        expected[dim] = stop - start
    if list(target.shape) != expected:
        raise CheckpointError(
            f"the slice of {list(shape)} has shape {expected}, the parameter has {list(target.shape)}",
            file=file,
            tensor=tensor,
        )


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, as bytes."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def read_tensor_slice(
    file: CountedFile,
    offset: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    target: torch.Tensor,
    dim: int | None,
    start: int,
    stop: int,
    *,
    tensor: str,
) -> None:
    """Read a slice of a row-major tensor.

    Args:
        file: where it is stored.
        offset: file position of its first element.
        shape: full shape in the file.
        dtype: dtype in the file.
        target: any device, dtype and strides; its shape is the slice's.
        dim, start, stop: the slice; ``dim=None`` for the whole tensor.
        tensor: its name, for errors.
    """
    if target.numel() == 0:
        return
    if dim is None:
        dim, start, stop = 0, 0, shape[0] if shape else 1
    shape = shape or (1,)
    inner = math.prod(shape[dim + 1 :]) * dtype.itemsize
    if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
        view = bytes_view(target)
        run, stride, position = (stop - start) * inner, shape[dim] * inner, offset + start * inner
        for begin in range(0, len(view), run):
            file.read_into(position, view[begin : begin + run], tensor=tensor)
            position += stride
        return

    target = target.detach()
    if target.dim() == 0:
        target = target.unsqueeze(0)
    row_bytes = math.prod(target.shape[1:]) * dtype.itemsize
    rows = max(1, min(target.shape[0], STAGING_BYTES // row_bytes))
    staging = file.staging((rows, *target.shape[1:]), dtype)
    for begin in range(0, target.shape[0], rows):
        end = min(begin + rows, target.shape[0])
        part = staging[: end - begin]
        if dim == 0:
            read_tensor_slice(file, offset, shape, dtype, part, 0, start + begin, start + end, tensor=tensor)
        else:
            block = (end - begin, *shape[1:])
            skip = begin * math.prod(shape[1:]) * dtype.itemsize
            read_tensor_slice(file, offset + skip, block, dtype, part, dim, start, stop, tensor=tensor)
        target[begin:end].copy_(part)
