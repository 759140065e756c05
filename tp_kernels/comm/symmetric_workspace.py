"""The memory behind ``SymmetricMemoryCommunicator``: one allocation a rank, mapped into all ranks of the group.

    half 0 | half 1 | inputs | outputs | mailbox | flags | Lamport buffers

The first two and the last two belong to the kernels (csrc/kernels/peer_layout.h). The three between are what the
kernels call the registered area, where tensors are read and written by all ranks in place:

- ``inputs``: operands of collectives, written by whoever computes them (a row-parallel GEMM);
- ``outputs``: results, which a two-shot kernel then stores on all ranks directly;
- ``mailbox``: where gathers, scatters and broadcasts put what peers fetch.

A tensor handed out lies at the beginning of its part, hence at the same offset on all ranks, whatever was asked for
before: nothing is allocated and nothing needs to agree but the call that uses it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from tp_kernels._native import has_cuda
from tp_kernels.comm import rendezvous
from tp_kernels.comm.symmetric_sizes import (
    ALIGNMENT,
    CUDA_ALGORITHMS,
    EMPTY_WORD,
    ERROR_BYTES,
    FLAG_BYTES,
    Layout,
    layout_of,
)

__all__ = [
    "ErrorRecord",
    "SymmetricMemoryUnavailable",
    "Workspace",
    "common_algorithms",
    "has_triton",
    "unavailable_reason",
]

# Not at import: it takes a while, and few processes need it.
_SYMMETRIC_MEMORY = "torch.distributed._symmetric_memory"


class SymmetricMemoryUnavailable(RuntimeError):
    """The group cannot use symmetric memory; raised on all its ranks alike, ``reason`` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class ErrorRecord(ctypes.Structure):
    """What a kernel that gave up tells the host; twin of ``ErrorRecord`` in csrc/kernels/peer_layout.h."""

    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("block", ctypes.c_uint32),
        ("call", ctypes.c_uint64),
        ("phase", ctypes.c_uint32),
        ("waiter", ctypes.c_uint32),
    ]

    SIGNAL, DATA = 1, 2  # of ``kind``
    STOP = 0x53544F50  # a ``magic`` by which the host ends all waits


class Workspace:
    """This rank's memory and its addresses of the peers'; made by ``create``, released by ``close``.

    Attributes:
        layout: see ``Layout``.
        data, flags: for every rank, this process's address of half 0 and of the flags.
        multicast: address at which half 0 of all ranks is written and added by the switch, or 0.
        mailboxes: for every rank, its mailbox as uint8.
        record: the host's error record, and ``record_address`` as the kernels know it.
        table: int64 on the device: ``data``, ``flags`` and ``record_address``, as the Triton kernels read them.
    """

    def __init__(self, layout: Layout, memory: torch.Tensor, handle: Any, rank: int, shift: int):
        self.layout = layout
        self._memory, self._handle = memory, handle
        own = memory.data_ptr() + shift
        addresses = list(handle.buffer_ptrs)
        to_base = own - addresses[rank]
        self.data = [address + to_base for address in addresses]
        self.flags = [address + layout.flags for address in self.data]
        multicast = int(getattr(handle, "multicast_ptr", 0) or 0)
        self.multicast = multicast + shift if multicast else 0
        self._base = memory[shift : shift + layout.total_bytes]
        self.mailboxes = [
            self._base[layout.mailbox : layout.mailbox + layout.mailbox_bytes]
            if r == rank
            else handle.get_buffer(r, (layout.mailbox_bytes,), torch.uint8, to_base + layout.mailbox)
            for r in range(len(addresses))
        ]
        for r, mailbox in enumerate(self.mailboxes):
            if mailbox.data_ptr() != self.data[r] + layout.mailbox:
                raise RuntimeError(f"this torch places the buffer of rank {r} elsewhere than its address says")
        # Pinned memory has one address for the host and all devices.
        self._pinned = torch.zeros(ERROR_BYTES, dtype=torch.uint8, pin_memory=True)
        self.record_address = self._pinned.data_ptr()
        self.record = ErrorRecord.from_address(self.record_address)
        self.table = torch.tensor([*self.data, *self.flags, self.record_address], device=memory.device)
        self._views: dict[Any, torch.Tensor] = {}

    @classmethod
    def create(
        cls,
        rank: int,
        world_size: int,
        name: str,
        store: Any,
        process_group: Any,
        device: torch.device,
        max_bytes: int,
        timeout: float,
    ) -> Workspace:
        """Allocate, map and empty; a collective. All ranks succeed or raise alike.

        Raises:
            SymmetricMemoryUnavailable: with the first reason that a rank gave. CommTimeoutError: a rank did not come.
        """
        layout = layout_of(world_size, max_bytes)
        memory = handle = workspace = None

        def agree(what: str, error: Exception | None, **facts: Any) -> list[dict[str, Any]]:
            facts["error"] = "" if error is None else f"{type(error).__name__}: {error}"
            everyone = rendezvous.exchange(
                store, rank, world_size, facts, timeout, group=name, what=f"symmetric memory: {what}"
            )
            _raise_first(everyone)
            return everyone

        # Every step is followed by an exchange: the next one waits for all ranks, some of them without a deadline.
        error = None
        try:
            symmetric_memory = importlib.import_module(_SYMMETRIC_MEMORY)
            memory = symmetric_memory.empty(layout.total_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        except Exception as problem:  # out of memory, no driver API, a torch built without it
            error = problem
        agree("allocate", error)
        try:
            handle = symmetric_memory.rendezvous(memory, process_group)
        except Exception as problem:
            error = problem
        shift = -memory.data_ptr() % ALIGNMENT
        everyone = agree("map", error, shift=shift)
        if any(facts["shift"] != shift for facts in everyone):
            raise SymmetricMemoryUnavailable("the ranks' allocations are not aligned alike")
        try:
            workspace = cls(layout, memory, handle, rank, shift)
            workspace.prepare()
            torch.cuda.current_stream(device).synchronize()
        except Exception as problem:
            error = problem
        agree("prepare", error)
        return workspace

    def prepare(self) -> None:
        """Lower all flags and empty the Lamport buffers of this rank, on the current stream."""
        lamport = self.layout.flags + FLAG_BYTES
        self._base[self.layout.flags : lamport].zero_()
        self._base[lamport : self.layout.total_bytes].view(torch.int32).fill_(EMPTY_WORD - (1 << 32))

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The own memory from ``offset`` on as a contiguous tensor; the same object for the same arguments."""
        key = (offset, shape, dtype)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= 256:
                self._views.clear()
            count = dtype.itemsize
            for extent in shape:
                count *= extent
            with torch.inference_mode(False):  # it must stay writable outside inference mode
                found = self._base[offset : offset + count].view(dtype).view(shape)
            self._views[key] = found
        return found

    def close(self) -> None:
        """Unmap; the caller made sure that no kernel uses it any more. Peers keep what they have mapped."""
        self._views.clear()
        self.mailboxes = []
        self._base = self._memory = self._handle = None


def has_triton() -> bool:
    """Whether the Triton twins of the kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


def common_algorithms(everyone: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What all ranks can run, by their facts.

    Raises:
        SymmetricMemoryUnavailable: nothing.
    """
    cuda, triton = (all(facts[kind] for facts in everyone) for kind in ("cuda", "triton"))
    found = (*(CUDA_ALGORITHMS if cuda else ()), *(("triton",) if triton else ()))
    if not found:
        lists = "; ".join(
            f"rank {rank}: {' and '.join(kind for kind in ('cuda', 'triton') if facts[kind]) or 'none'}"
            for rank, facts in enumerate(everyone)
        )
        raise SymmetricMemoryUnavailable(f"the ranks have no kernels in common ({lists})")
    return found


def unavailable_reason(device: torch.device) -> str:
    """Why this rank cannot have a workspace on ``device``, as far as it can tell alone; "" if it may."""
    if not has_cuda() and not has_triton():
        return "the native core was built without CUDA, and Triton is not installed"
    if device.type != "cuda":
        return f"the group's tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability 8.0 or above is needed"
    try:
        importlib.import_module(_SYMMETRIC_MEMORY)
    except ImportError as error:
        return f"this torch has no symmetric memory ({error})"
    return ""


def _raise_first(everyone: list[dict[str, Any]]) -> None:
    for rank, facts in enumerate(everyone):
        if facts["error"]:
            raise SymmetricMemoryUnavailable(f"rank {rank}: {facts['error']}")
