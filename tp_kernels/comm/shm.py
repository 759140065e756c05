"""``SharedMemoryCommunicator``: collectives between the CPU ranks of one host, through one segment of memory per group.

Algorithm (csrc/comm/shm_*): every call begins with a rendezvous in which the ranks compare what they called. Messages
up to ``one_shot_bytes`` travel with it: each rank copies its tensor in, and reads all others' in rank order. Longer
ones run through a ring of cache-sized chunks, reduce-scatter then all-gather, so that what crosses between the ranks
stays in the cache and main memory sees each tensor once. Ranks whose caches are far apart (another socket or core
complex: data cross at a tenth of the speed) notice and stage through memory instead, which is three times faster there.

Numerics: bf16, fp16 and fp32 are summed in fp32, fp64 in fp64, integers wrap; in rank order 0, 1, ..., N-1 with one
rounding at the end, whatever the message's length. All ranks get the same bits. NaN wins in a maximum.

Failure: the segment is an unnamed file, so nothing is left behind whenever a rank is killed. A rank that ends, leaves,
is late or calls something else is named in an error on all others, which then refuse further calls.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar

import torch

from tp_kernels._native import DTYPE_CODES, native
from tp_kernels.comm.communicator import (
    DEFAULT_TIMEOUT,
    Communicator,
    Numerics,
    check_dim,
    check_reduce_op,
    check_root,
    check_timeout,
    gathered_sizes,
    resolve_sizes,
)
from tp_kernels.comm.errors import CommTimeoutError

__all__ = ["MAX_RANKS", "SharedMemoryCommunicator", "SharedMemoryUnavailable"]

MAX_RANKS = 64
_CODES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}
_OPS = {"sum": 0, "max": 1}


class SharedMemoryUnavailable(RuntimeError):
    """The group cannot use shared memory; raised on all its ranks alike, ``reason`` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class SharedMemoryCommunicator(Communicator):
    """Collectives of 1 to 64 ranks on one host over CPU tensors; made by ``create``.

    dtypes: float32, bfloat16, float16, float64, int32, int64. Tensors need not be contiguous. One thread per rank at a
    time; a forked child cannot use its parent's communicator. ``close()`` is not a collective.
    """

    backend = "shm"
    numerics = Numerics("float32", "rank", same_bits_on_all_ranks=True, size_dependent=False)

    def __init__(self, native_communicator: Any, rank: int, world_size: int, name: str, timeout: float):
        self.rank, self.world_size, self.name, self.timeout = rank, world_size, name, timeout
        self._native = native_communicator
        self._all_reduce = native_communicator.all_reduce

    @classmethod
    def create(
        cls,
        rank: int,
        world_size: int,
        name: str,
        store: Any,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        slot_bytes: int | None = None,
        directory: str | None = None,
    ) -> SharedMemoryCommunicator:
        """Make the group's segment together with its other ranks.

        Args:
            rank, world_size: of this process in the group.
            name: for messages, and the prefix of the keys used in ``store``.
            store: a torch Store (or anything with its ``set``, ``get`` and ``wait``); used during creation only.
            timeout: seconds to wait for the other ranks, here and by default in every call.
            slot_bytes: bytes of a rank's chunk in a long message; None picks by world size. Rank 0's counts.
            directory: where the segment lives; None is ``TP_KERNELS_SHM_DIR`` or ``/dev/shm``. Rank 0's counts.
        Raises:
            SharedMemoryUnavailable: on all ranks alike, if any rank could not (directory too small, other host).
            CommTimeoutError: a rank did not come; ValueError: for bad arguments.
        """
        if not 1 <= world_size <= MAX_RANKS or not 0 <= rank < world_size:
            raise ValueError(
                f"expected 1 to {MAX_RANKS} ranks and 0 <= rank < world_size, got rank {rank} of {world_size}"
            )
        check_timeout(timeout)
        if slot_bytes is not None and not 4096 <= slot_bytes <= 1 << 30:
            raise ValueError(f"slot_bytes must be between 4096 and 2**30, got {slot_bytes}")
        one_shot, chunk = _slot_sizes(world_size, slot_bytes)
        communicator = native.ShmCommunicator(rank, world_size, name)
        board = _Board(store, name, rank, timeout)
        if rank == 0:
            directory = directory or os.environ.get("TP_KERNELS_SHM_DIR") or "/dev/shm"
            error = communicator.create(directory, one_shot, chunk)
            segment = [] if error else communicator.descriptor()
            board.open({"error": error, "place": _place(), "segment": segment})
        else:
            published = board.join()
            error = published["error"]
            if not error and published["place"] != _place():
                error = f"rank {rank} is on another host or in another container than rank 0"
            if not error:
                error = communicator.attach(*published["segment"])
            board.post(f"rank/{rank}", {"error": error})
        # Rank 0 tells the outcome, so that all ranks succeed or fail alike.
        if rank == 0:
            errors = [error] + [board.read(f"rank/{r}", r)["error"] for r in range(1, world_size)]
            verdict = error or "; ".join(f"rank {r}: {text}" for r, text in enumerate(errors) if text)
            board.post("verdict", {"error": verdict})
        else:
            verdict = board.read("verdict", 0)["error"] or error
        if verdict:
            raise SharedMemoryUnavailable(verdict)
        communicator.activate()
        return cls(communicator, rank, world_size, name, timeout)

    def all_reduce(self, x, op="sum", *, out=None, timeout=None):
        code, op_code = _CODES.get(x.dtype), _OPS.get(op)
        if code is None or op_code is None or not x.is_cpu:
            _check_tensor(x, "all_reduce")
            check_reduce_op(op)
        if timeout is None:
            timeout = self.timeout
        else:
            check_timeout(timeout)
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        elif out is not x and (out.shape != x.shape or out.dtype != x.dtype or not out.is_cpu):
            raise ValueError(
                f"all_reduce: out must be a CPU tensor of shape {tuple(x.shape)} and {x.dtype}, got "
                f"{tuple(out.shape)} and {out.dtype} on {out.device}"
            )
        if x.is_contiguous() and out.is_contiguous():
            self._all_reduce(x.data_ptr(), out.data_ptr(), x.numel(), code, op_code, timeout)
            return out
        source = x.contiguous()
        target = source if source is not x else torch.empty_like(source)
        self._all_reduce(source.data_ptr(), target.data_ptr(), source.numel(), code, op_code, timeout)
        return out.copy_(target)

    def bind_all_reduce(self, x):
        _check_tensor(x, "all_reduce")
        if not x.is_contiguous():
            return super().bind_all_reduce(x)
        at = x.data_ptr()
        return partial(self._all_reduce, at, at, x.numel(), _CODES[x.dtype], _OPS["sum"], self.timeout)

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        _check_tensor(x, "reduce_scatter")
        check_reduce_op(op)
        dim = check_dim(x, dim, "reduce_scatter")
        sizes = resolve_sizes(x.shape[dim], sizes, self.world_size, "reduce_scatter")
        source = x.contiguous()
        if math.prod(x.shape[:dim]) != 1:
            source = torch.cat([part.reshape(-1) for part in source.split(sizes, dim)])
        unit = x.numel() // x.shape[dim] if x.shape[dim] else 0
        shape = (*x.shape[:dim], sizes[self.rank], *x.shape[dim + 1 :])
        out = torch.empty(shape, dtype=x.dtype)
        counts = [size * unit for size in sizes]
        self._native.reduce_scatter(
            source.data_ptr(), out.data_ptr(), counts, _CODES[x.dtype], _OPS[op], self._deadline(timeout)
        )
        return out

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        _check_tensor(x, "all_gather")
        dim = check_dim(x, dim, "all_gather")
        sizes = gathered_sizes(x.shape[dim], sizes, self.rank, self.world_size)
        source = x.contiguous()
        rows = math.prod(x.shape[:dim])
        unit = rows * math.prod(x.shape[dim + 1 :])
        out = torch.empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]), dtype=x.dtype)
        counts = [size * unit for size in sizes]
        self._native.all_gather(
            source.data_ptr(), out.data_ptr(), rows, counts, _CODES[x.dtype], self._deadline(timeout)
        )
        return out

    def broadcast(self, x, src=0, *, timeout=None):
        _check_tensor(x, "broadcast")
        check_root(src, self.world_size)
        target = x.contiguous()
        self._native.broadcast(target.data_ptr(), target.numel(), _CODES[x.dtype], src, self._deadline(timeout))
        return x if target is x else x.copy_(target)

    def barrier(self, *, timeout=None):
        self._native.barrier(self._deadline(timeout))

    def close(self) -> None:
        """Leave the group and unmap the segment. Ranks that still wait for this one get ``CommAbortedError``."""
        self._native.close()

    def _deadline(self, timeout: float | None) -> float:
        if timeout is None:
            return self.timeout
        check_timeout(timeout)
        return timeout

    def __repr__(self) -> str:
        return f"SharedMemoryCommunicator(name={self.name!r}, rank={self.rank}, world_size={self.world_size})"


def _slot_sizes(world_size: int, slot_bytes: int | None) -> tuple[int, int]:
    """(one-shot bytes, chunk bytes) of a rank: 2.5 MB in all for 2 ranks, 14 MB for 64.

    In one shot every rank reads every other's tensor, so the limit falls with the number of ranks; a smaller chunk than
    256 KB costs more in waiting than it gains in the cache.
    """
    chunk = slot_bytes or max(64 << 10, min(256 << 10, (4 << 20) // world_size))
    one_shot = min(64 << 10, (512 << 10) // world_size, chunk)
    return one_shot, chunk


def _place() -> str:
    """Equal for processes that see each other's /proc entries: one boot of one kernel, one pid namespace."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return os.uname().nodename


class _Board:
    """Messages between the ranks while the group is made; each attempt has its own keys, under rank 0's nonce."""

    _used: ClassVar[set[tuple[int, str]]] = set()  # with the rank: ranks may be threads of one process

    def __init__(self, store: Any, name: str, rank: int, timeout: float):
        self._store, self._name, self._rank, self._timeout = store, name, rank, timeout
        self._deadline = time.monotonic() + timeout
        self._nonce = ""

    def open(self, message: dict[str, Any]) -> None:
        """Rank 0 begins an attempt."""
        self._nonce = uuid.uuid4().hex
        self.post("", message | {"nonce": self._nonce})

    def join(self) -> dict[str, Any]:
        """The others wait for an attempt that is not one of a former group with this name."""
        while True:
            message = self.read("", 0)
            if (self._rank, message["nonce"]) not in self._used:
                self._nonce = message["nonce"]
                self._used.add((self._rank, self._nonce))
                return message
            if time.monotonic() > self._deadline:
                raise self._late(0, "its message never came")
            time.sleep(0.001)

    def post(self, key: str, message: dict[str, Any]) -> None:
        self._store.set(self._key(key), json.dumps(message).encode())

    def read(self, key: str, author: int) -> dict[str, Any]:
        """Message ``key``; CommTimeoutError names its author if it does not come in time."""
        try:
            self._await(self._key(key))
        except (RuntimeError, TimeoutError) as error:  # torch's DistStoreError and DistNetworkError are RuntimeErrors
            raise self._late(author, error) from error
        return json.loads(self._store.get(self._key(key)))

    def _key(self, key: str) -> str:
        return f"shm/{self._name}/{self._nonce}/{key}" if key else f"shm/{self._name}"

    def _late(self, author: int, reason: object) -> CommTimeoutError:
        return CommTimeoutError(
            f"group '{self._name}': rank {self._rank} waited {self._timeout:g} s for rank {author} while making "
            f"the shared-memory segment ({reason})",
            group=self._name,
            operation="create",
            ranks=(author,),
        )

    def _await(self, key: str) -> None:
        check: Callable[[list[str]], bool] | None = getattr(self._store, "check", None)
        if check is None:
            self._store.wait([key], timedelta(seconds=max(self._deadline - time.monotonic(), 0.001)))
            return
        # Polled: a blocking wait in the store's C++ code would not notice Ctrl-C.
        pause = 0.0002
        while not check([key]):
            if time.monotonic() > self._deadline:
                raise TimeoutError("its message never came")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)


def _check_tensor(x: torch.Tensor, operation: str) -> None:
    if x.dtype not in _CODES:
        raise ValueError(f"{operation}: unsupported dtype {x.dtype}; expected one of {', '.join(DTYPE_CODES)}")
    if not x.is_cpu:
        raise ValueError(
            f"{operation}: shared memory carries CPU tensors, got one on {x.device}; "
            "tp_kernels.init(device='cuda') makes groups for tensors on GPUs"
        )
