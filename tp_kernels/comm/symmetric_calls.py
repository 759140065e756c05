"""Launches of the peer-memory kernels for one communicator, and what becomes of those that gave up."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from tp_kernels._native import native
from tp_kernels.comm.communicator import check_timeout
from tp_kernels.comm.errors import CommAbortedError, CommError, CommTimeoutError, PeerDiedError
from tp_kernels.comm.nccl_peers import Peers
from tp_kernels.comm.symmetric_sizes import ALGORITHMS, MAX_BLOCKS, PACK_BYTES, SCRATCH_FLOATS
from tp_kernels.comm.symmetric_workspace import ErrorRecord, Workspace

__all__ = ["KERNEL_DTYPES", "KernelCalls"]

# Dtypes that the kernels add, with their codes of csrc/common/dtype.h.
KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LOGGED = 1024
_CLOSE_PATIENCE = 5.0  # seconds


@functools.cache
def _triton_kernels() -> Any:
    """The Triton twins of the one-shot kernels, imported when one is to run: ``ops`` is built on this package."""
    from tp_kernels.ops.kernels import peer_norm

    return peer_norm


@functools.cache
def _linear_kernel() -> Any:
    from tp_kernels.ops.kernels import peer_linear

    return peer_linear.linear_all_reduce


class KernelCalls:
    """The kernels on one workspace. Every collective of the communicator is ``begin``, then launches.

    Args:
        algorithms: that all ranks have; without "one_shot" there are only the Triton kernels.
        peers: the other ranks beside their memory, or None.
        check: compare each collective over the ranks before it begins.
    Attributes:
        sequence: collectives begun so far.
        workspace: addresses and layout; None once closed.
    """

    def __init__(
        self,
        workspace: Workspace,
        rank: int,
        world_size: int,
        name: str,
        timeout: float,
        max_blocks: int,
        algorithms: tuple[str, ...],
        peers: Peers | None = None,
        check: bool = False,
    ):
        self.rank, self.world_size, self.name, self.timeout = rank, world_size, name, timeout
        self.max_blocks = max_blocks
        self._meeting = "one_shot" if "one_shot" in algorithms else "triton"
        self._peers, self._check = peers, check
        self.sequence = 0
        self.workspace: Workspace | None = workspace
        self.device = workspace.mailboxes[rank].device
        self._record = workspace.record
        self._operation = ""
        self._broken = ""
        # What the kernels' own counts mean. They count calls that use flags and Lamport calls apart, so for either
        # kind: count -> (count, operation, sequence) of the last calls.
        self._log: dict[bool, dict[int, tuple[int, str, int]]] = {False: {}, True: {}}
        self._launched = {False: 0, True: 0}
        self._captured = False
        self._stream: Any = None  # of the last launch
        self._ping, self._pong = torch.zeros(2, 4, dtype=torch.float32, device=self.device).unbind(0)
        # Of the Triton kernels; now, because what a capture allocates would belong to its graph.
        floats = max(SCRATCH_FLOATS, SCRATCH_FLOATS // MAX_BLOCKS * max_blocks)  # one of them has larger grids
        self._scratch = torch.empty(floats, dtype=torch.float32, device=self.device)

    def begin(
        self, operation: str, x: torch.Tensor | None = None, timeout: float | None = None, **facts: Any
    ) -> Workspace:
        """Start a collective: raises what earlier ones left, and checks the operand's device.

        Args:
            facts: what else must be equal on all ranks, JSON-able; a ``shape`` stands instead of the operand's own.
        Raises:
            CommMismatchError: in check mode, if the ranks called different things.
        """
        workspace = self.open()
        if self._record.magic:
            raise self._failure()
        if x is not None and x.device != self.device:
            raise ValueError(f"{operation}: group {self.name} carries tensors on {self.device}, got one on {x.device}")
        self.sequence += 1
        self._operation = operation
        if self._check:
            self._compare(operation, x, timeout, facts)
        return workspace

    def _compare(self, operation: str, x: torch.Tensor | None, timeout: float | None, facts: dict[str, Any]) -> None:
        call = {"operation": operation}
        if x is not None:
            call |= {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
        try:
            self._peers.compare(self.sequence, call | facts, self.timeout if timeout is None else timeout)
        except CommError as error:
            self._broken = str(error)  # the ranks no longer agree on what comes next
            raise

    def open(self) -> Workspace:
        """The workspace; CommAbortedError when it cannot be used any more."""
        if self._broken:
            raise CommAbortedError(
                f"group {self.name}: rank {self.rank} cannot use this communicator any more: {self._broken}",
                group=self.name,
                sequence=self.sequence,
            )
        return self.workspace

    def all_reduce(
        self, algorithm: str, x: int, out: int, count: int, dtype: torch.dtype, timeout: float | None
    ) -> None:
        """out = sum over ranks of ``count`` elements; ``x`` and ``out`` are addresses."""
        workspace = self.workspace
        self._note(algorithm)
        self.launch(
            native.cuda_peer_all_reduce,
            ALGORITHMS[algorithm],
            workspace.data,
            workspace.flags,
            workspace.multicast,
            self.rank,
            self.world_size,
            workspace.layout.half_bytes,
            x,
            out,
            count,
            KERNEL_DTYPES[dtype],
            self.max_blocks,
            self._nanoseconds(timeout),
            workspace.record_address,
        )

    def all_reduce_norm(
        self,
        algorithm: str,
        tensors: tuple[int, int, int, int, int, int],
        eps: float,
        rows: int,
        width: int,
        dtype: torch.dtype,
        round_before_norm: bool,
        gather_sum: bool,
        timeout: float | None,
    ) -> None:
        """``tensors``: addresses of x, bias (or 0), residual, weight, normed and sum."""
        workspace = self.workspace
        x, bias, residual, weight, normed, summed = tensors
        self._note(algorithm)
        self.launch(
            native.cuda_peer_all_reduce_norm,
            ALGORITHMS[algorithm],
            workspace.data,
            workspace.flags,
            self.rank,
            self.world_size,
            workspace.layout.half_bytes,
            x,
            bias,
            residual,
            weight,
            eps,
            normed,
            summed,
            rows,
            width,
            KERNEL_DTYPES[dtype],
            round_before_norm,
            gather_sum,
            self.max_blocks,
            self._nanoseconds(timeout),
            workspace.record_address,
        )

    def meet(self, timeout: float | None) -> None:
        """A barrier on the stream: what the ranks' streams did before it is seen by what they do after it."""
        # One-shot, not Lamport: its flags are released and acquired, so they order all other memory too.
        if self._meeting == "triton":
            self.triton_sum(self._ping[:1], self._pong[:1], timeout)
        else:
            self.all_reduce("one_shot", self._ping.data_ptr(), self._pong.data_ptr(), 1, torch.float32, timeout)

    def triton_sum(self, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        """``all_reduce`` of flat tensors of at most ``half_bytes`` by the Triton kernel."""
        registered = None if out.data_ptr() == x.data_ptr() else self._place_of(x)
        self._triton("all_reduce", (x, out, self.workspace.table), registered, timeout)

    def triton_norm(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        eps: float,
        round_before_norm: bool,
        timeout: float | None,
    ) -> None:
        """``tensors``: x [rows, width], bias (or None), residual, weight, normed and sum."""
        x, *_, normed, summed = tensors
        # Peers read rows as whole packs, and all rows of x, so it may not become an output meanwhile.
        whole = x.shape[1] * x.element_size() % PACK_BYTES == 0
        in_place = whole and x.data_ptr() not in (normed.data_ptr(), summed.data_ptr())
        arguments = (*tensors, eps, round_before_norm, self.workspace.table, self._scratch)
        self._triton("all_reduce_norm", arguments, self._place_of(x) if in_place else None, timeout)

    def _triton(self, function: str, arguments: tuple, registered: int | None, timeout: float | None) -> None:
        if arguments[0].numel() == 0:
            return
        launch = getattr(_triton_kernels(), function)
        group = {"rank": self.rank, "world_size": self.world_size, "half_bytes": self.workspace.layout.half_bytes}
        group |= {"max_blocks": self.max_blocks, "timeout_ns": self._nanoseconds(timeout), "registered": registered}
        self._note("triton")
        self.launch(lambda _stream: launch(*arguments, **group))

    def triton_linear(
        self, tensors: tuple[torch.Tensor | None, ...], eps: float, block_m: int, timeout: float | None
    ) -> None:
        """``tensors``: sum, normed (or None), x, weight, bias, residual and norm weight (or None)."""
        workspace = self.workspace
        arguments = (*tensors, eps, workspace.table, self._scratch)
        group = {"rank": self.rank, "world_size": self.world_size, "half_bytes": workspace.layout.half_bytes}
        group |= {"block_m": block_m, "max_blocks": self.max_blocks, "timeout_ns": self._nanoseconds(timeout)}
        kernel = _linear_kernel()
        self._note("triton")
        self.launch(lambda _stream: kernel(*arguments, **group))

    def _place_of(self, x: torch.Tensor) -> int | None:
        """How far behind this rank's data ``x`` lies in the part that all ranks may read it in; None elsewhere.

        Twin of ``place_of`` in csrc/kernels/peer_launch.cuh.
        """
        layout, data = self.workspace.layout, self.workspace.data[self.rank]
        begin, end = x.data_ptr() - data, x.data_ptr() - data + x.nbytes
        if end <= 0 or begin >= layout.total_bytes:
            return None
        if begin < layout.inputs or end > layout.flags:
            raise ValueError("a tensor lies in the part of the workspace that belongs to the kernels")
        if begin % PACK_BYTES:
            raise ValueError("a registered tensor is not aligned to 16 bytes")
        return begin

    def launch(self, function: Callable[..., None], *arguments: Any) -> None:
        """``function(*arguments, stream)`` with the group's device as the current one."""
        stream = self._stream = torch.cuda.current_stream(self.device)
        if torch.cuda.current_device() == self.device.index:
            function(*arguments, stream.cuda_stream)
        else:
            with torch.cuda.device(self.device):
                function(*arguments, stream.cuda_stream)

    def check(self) -> None:
        """Raise CommTimeoutError if a kernel has given up since the last look."""
        if self._record.magic and not self._broken:
            raise self._failure()

    def close(self) -> None:
        """Wait for the kernels, for a few seconds, then make those that wait for other ranks give up; unmap."""
        workspace, self.workspace = self.workspace, None
        if workspace is None:
            return
        self._broken = self._broken or "it was closed"
        events = []
        for stream in (torch.cuda.current_stream(self.device), self._stream):
            if stream is not None:
                events.append(torch.cuda.Event())
                events[-1].record(stream)
        deadline = time.monotonic() + _CLOSE_PATIENCE
        while not all(event.query() for event in events):
            if time.monotonic() > deadline or (self._peers is not None and self._peers.dead()):
                self._record.magic = ErrorRecord.STOP
                break
            time.sleep(0.001)
        torch.cuda.synchronize(self.device)
        workspace.close()

    def _note(self, algorithm: str) -> None:
        if not self._captured and torch.cuda.is_current_stream_capturing():
            self._captured = True  # replays count on the device only
        lamport = algorithm == "lamport"
        number = self._launched[lamport]
        self._launched[lamport] = number + 1
        self._log[lamport][number % _LOGGED] = (number, self._operation, self.sequence)

    def _failure(self) -> CommTimeoutError:
        record = self._record
        operation = sequence = None
        logged = self._log[record.kind == ErrorRecord.DATA].get(record.call % _LOGGED)
        if not self._captured and logged is not None and logged[0] == record.call:
            _, operation, sequence = logged
        what = "a collective" if operation is None else f"{operation} (call {sequence})"
        message = (
            f"group {self.name}: rank {record.waiter} gave up waiting for rank {record.rank} in {what}: kernel call "
            f"{record.call}, phase {record.phase}, block {record.block}, deadline {self.timeout:g} s unless the call "
            "had its own; results since then are invalid"
        )
        kind = CommTimeoutError
        if self._peers is not None and record.rank in self._peers.dead():
            kind, message = PeerDiedError, f"{message}; the process of rank {record.rank} has ended"
        self._broken = message
        return kind(message, group=self.name, operation=operation, sequence=sequence, ranks=(record.rank,))

    def _nanoseconds(self, timeout: float | None) -> int:
        if timeout is None:
            return int(self.timeout * 1e9)
        check_timeout(timeout)
        return max(1, int(timeout * 1e9))
