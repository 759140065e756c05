"""``NCCLCommunicator``: collectives between GPUs through NCCL, with a communicator and a stream of its own.

Synchronous calls are enqueued on the caller's current stream: like any kernel, they run after what is on it, and the
host goes on. Asynchronous ones run on the communicator's own stream of the highest priority, after what the caller's
stream holds at the call; ``handle.wait()`` makes the then current stream wait for the result. The calls of one
communicator start in the order in which they were made, on whatever streams. A graph's replay is ordered against other
calls by its stream only. Where calls of several communicators can be in flight at once, make them in the same order on
all ranks, or NCCL may deadlock.

Numerics: whatever NCCL chooses by size, topology and registration of the memory. On a ring or a tree 16-bit sums round
at every hop. Every element is reduced once and then distributed, or by all ranks in the same order, so all of them get
the same bits, but not those of other transports or sizes. A NaN may be lost in a maximum.

Memory: tensors of an asynchronous call are told to torch's caching allocator (``record_stream``), so it does not hand
them out again before the collective has read or written them, even if the handle is dropped. Synchronous calls need
nothing: their memory is reused in the order of the caller's stream.

CUDA graphs: every call may be captured, asynchronous ones too if they are waited for in the capture. All connections
are made at creation. Operations of a graph are not watched when it is replayed: call ``guard_replay()`` after a replay.
A graph holds on to NCCL's resources: destroy it before ``close()`` if they are to be freed. One with memory of
``get_buffer`` or ``register`` must not be replayed after ``close()``.

Failure: a thread of the native core (csrc/comm/nccl_watchdog.*) aborts the communicator when an operation has not ended
by its deadline, or NCCL reports an error, for example of a rank that died; kernels that waited then end, and with them
whatever waits for the stream. The next call, ``wait()`` or ``check()`` raises. Results are garbage in between, so call
``check()`` after a synchronisation whose results leave the process. The deadline counts from the call, and so includes
the work before it on the stream.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tp_kernels._native import native, require_cuda
from tp_kernels.comm.communicator import (
    DEFAULT_TIMEOUT,
    Communicator,
    Handle,
    Numerics,
    check_dim,
    check_reduce_op,
    check_root,
    check_timeout,
    gathered_sizes,
    resolve_sizes,
)
from tp_kernels.comm.errors import CommAbortedError, CommError, CommTimeoutError
from tp_kernels.comm.nccl_buffers import Buffers, close
from tp_kernels.comm.nccl_connect import (
    BUFFER_BYTES,
    NCCLUnavailable,
    check_facts,
    check_options,
    cuda_device,
    own_facts,
    poll,
    raise_failure_of,
    warn_of_cta_overrides,
)
from tp_kernels.comm.nccl_library import wheel_hint
from tp_kernels.comm.nccl_peers import Peers

__all__ = ["NCCLCommunicator", "NCCLUnavailable"]

# Codes of csrc/comm/nccl_flight.h and nccl_api.h.
_ALL_REDUCE, _REDUCE_SCATTER, _ALL_GATHER, _BROADCAST, _BARRIER = range(5)
_NAMES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier")
_OPS = {"sum": 0, "max": 2}
_BYTE, _FLOAT32 = 1, 7
_TYPES = {
    torch.int8: 0,
    torch.uint8: _BYTE,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: _FLOAT32,
    torch.float64: 8,
    torch.bfloat16: 9,
    torch.float8_e4m3fn: 10,
    torch.float8_e5m2: 11,
}
# Elements of the second warm-up: long messages take other algorithms, with connections of their own, than short ones.
_WARM_UP = 1 << 20
# Seconds that close() gives what is still in flight.
_CLOSE = 5.0


class NCCLCommunicator(Communicator):
    """Collectives of CUDA tensors through NCCL; made by ``create``. See the module's documentation.

    Reductions: float32, bfloat16, float16, float64, int8, uint8, int32, int64, and float8_e4m3fn, float8_e5m2 where
    NCCL has them (2.24, sm_90). Everything else takes every dtype. Tensors need not be contiguous. ``close()`` is not a
    collective, but frees everything only when all ranks of a host have called it.

    Attributes:
        device: of all tensors.
        max_ctas: as given to ``create``.
        counters: path -> calls, as made by the host (a captured call counts once).
    """

    backend = "nccl"
    numerics = Numerics("native", "algorithm", same_bits_on_all_ranks=True, size_dependent=True)
    overlap_modes = ("chunked",)
    max_ctas: int | None = None

    def __init__(
        self,
        native_communicator: Any,
        peers: Peers,
        rank: int,
        world_size: int,
        name: str,
        device: torch.device,
        timeout: float,
        check: bool,
        scratch: torch.Tensor,
    ):
        self.rank, self.world_size, self.name, self.timeout, self.device = rank, world_size, name, timeout, device
        self.counters: Counter[str] = Counter()
        self._native, self._peers, self._check = native_communicator, peers, check
        self._checked = 0
        self._failure: CommError | None = None
        self._comm_stream = torch.cuda.ExternalStream(native_communicator.stream, device=device)
        self._scratch = scratch
        self._buffers = Buffers(native_communicator, peers, device)
        # Before the interpreter takes modules and threads apart, also if nobody calls close().
        self._finalizer = weakref.finalize(self, close, native_communicator, self._buffers, _CLOSE)

    @classmethod
    def create(
        cls,
        rank: int,
        world_size: int,
        name: str,
        store: Any,
        device: torch.device | str | int,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        max_ctas: int | None = None,
        registered_buffers: bool = False,
        buffer_bytes: int = BUFFER_BYTES,
        check: bool | None = None,
        blocking: bool = False,
    ) -> NCCLCommunicator:
        """Connect the group's ranks, each on its own GPU (or on one, in the environment of ``launch --one-gpu``).

        Args:
            rank, world_size: of this process in the group.
            name: for messages.
            store: a torch Store with a prefix of this communicator's own; used later for check mode and after failures.
            device: of all tensors.
            timeout: seconds to wait for the other ranks, here and by default in every call.
            max_ctas: most thread blocks, each on an SM of its own, that a collective takes; None is NCCL's choice.
                Variables of NCCL's overrule it (NCCL_MAX_CTAS), which is warned of once.
            registered_buffers: allocate ``buffer_bytes`` that NCCL can read and write in place, for ``get_buffer``.
                Where that fails the communicator works without; ``describe`` says so. See comm/nccl_buffers.py.
            check: compare operation, dtype, size and order over the ranks before each call, through the store: slow,
                for finding mistakes. None is TP_KERNELS_COMM_CHECK=1.
            blocking: launch on the calling thread. Otherwise a thread of NCCL's does, which costs eager calls more
                time, but lets a connection or a launch that hangs be given up cleanly.
        Raises:
            NCCLUnavailable: on all ranks alike, if any rank could not (no library, ranks on one GPU, out of memory).
            CommTimeoutError: a rank did not come, or connecting took too long. ValueError: for bad arguments, or
                ``max_ctas`` or buffers that differ between the ranks.
            RuntimeError: the native core was built without CUDA.
        """
        require_cuda("NCCLCommunicator")
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, got rank {rank} of {world_size}")
        check_timeout(timeout)
        options = check_options(max_ctas, registered_buffers, buffer_bytes)
        device = cuda_device(device)
        deadline = time.monotonic() + timeout
        peers = Peers(store, rank, world_size, name, own_facts(rank, options), timeout)
        check_facts(peers.facts)
        warn_of_cta_overrides(max_ctas)
        if check is None:
            check = os.environ.get("TP_KERNELS_COMM_CHECK") == "1"
        unique_id = bytes.fromhex(peers.facts[0]["id"])
        connection = native.NcclCommunicator(wheel_hint(), rank, world_size, device.index, name)
        try:
            # Before connecting: a rank without memory then tells the others at once.
            long = torch.zeros(_WARM_UP, dtype=torch.float32, device=device)
            scratch = torch.zeros(2 * world_size, dtype=torch.float32, device=device)
            connection.start(unique_id, max_ctas or 0, blocking)
            poll(connection.poll, peers, deadline, name)
            communicator = cls(connection, peers, rank, world_size, name, device, timeout, check, scratch)
            communicator.max_ctas = max_ctas
            communicator._warm_up(long, deadline)
        except Exception as error:
            connection.abort("creation failed")
            late = isinstance(error, CommTimeoutError)
            failure = peers.explain(error) if late else NCCLUnavailable(str(error))
            peers.agree("created", str(failure), late, 0)
            connection.close(0)
            raise failure from None if failure is error else error
        failed = peers.agree("created", "", False, timeout)
        if failed:
            communicator.close()
            raise_failure_of(*failed, name)
        if not registered_buffers:
            return communicator
        works = False
        try:
            works = communicator._buffers.make(buffer_bytes, communicator._warm_buffer, timeout)
        finally:
            if not works:
                communicator.close()
        if works:
            return communicator
        reason = communicator._buffers.state
        options = {"timeout": timeout, "max_ctas": max_ctas, "check": check, "blocking": blocking}
        communicator = cls.create(rank, world_size, name, dist.PrefixStore("plain", store), device, **options)
        communicator._buffers.state = reason
        return communicator

    def _warm_up(self, long: torch.Tensor, deadline: float) -> None:
        """Make every connection now: in a capture, or when a rank is late, it would be a bad time.

        ``long`` is overwritten.
        """
        floats = self._scratch.data_ptr()
        parts, behind = [1] * self.world_size, floats + 4 * self.world_size
        calls = [
            (_ALL_REDUCE, floats, floats, [1]),
            (_REDUCE_SCATTER, floats, behind, parts),
            (_ALL_GATHER, behind, floats, parts),
            (_BROADCAST, floats, floats, [1]),
            (_ALL_REDUCE, long.data_ptr(), long.data_ptr(), [long.numel()]),
        ]
        self._run_and_wait(calls, deadline)

    def _warm_buffer(self, buffer: torch.Tensor) -> None:
        """What registered memory needs besides, for short messages and for long ones."""
        address = buffer.data_ptr()
        counts = (min(count, buffer.numel() // 4) for count in (1, _WARM_UP))
        self._run_and_wait(
            [(_ALL_REDUCE, address, address, [count]) for count in counts], time.monotonic() + self.timeout
        )

    def _run_and_wait(self, calls: Sequence[tuple[int, int, int, list[int]]], deadline: float) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        left = max(deadline - time.monotonic(), 1.0)
        for operation, source, target, counts in calls:
            handle = self._native.run(operation, source, target, counts, _FLOAT32, 0, 0, stream, False, left)
        poll(lambda: self._native.done(handle), self._peers, deadline, self.name)

    # Collectives -----------------------------------------------------------------------------------------------------

    def all_reduce(self, x, op="sum", *, out=None, timeout=None):
        return self._all_reduce(x, op, out, timeout, False)

    def all_reduce_async(self, x, op="sum", *, out=None):
        """As ``all_reduce``, on the communicator's own stream."""
        return self._all_reduce(x, op, out, None, True)

    def _all_reduce(self, x, op, out, timeout, asynchronous):
        self._check_tensor(x, "all_reduce")
        code = _reduction_type(x, op, "all_reduce")
        if out is None:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        elif out is not x and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
            raise ValueError(
                f"all_reduce: out must be a tensor of shape {tuple(x.shape)} and {x.dtype} on {x.device}, got "
                f"{tuple(out.shape)} and {out.dtype} on {out.device}"
            )
        source = x.contiguous()
        target = out if out.is_contiguous() else torch.empty_like(source)
        finish = None if target is out else lambda: out.copy_(target)
        return self._run(
            _ALL_REDUCE, source, target, [x.numel()], code, _OPS[op], 0, timeout, asynchronous, finish or (lambda: out)
        )

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        return self._reduce_scatter(x, op, dim, sizes, timeout, False)

    def reduce_scatter_async(self, x, op="sum", *, dim=0, sizes=None):
        """As ``reduce_scatter``, on the communicator's own stream."""
        return self._reduce_scatter(x, op, dim, sizes, None, True)

    def _reduce_scatter(self, x, op, dim, sizes, timeout, asynchronous):
        self._check_tensor(x, "reduce_scatter")
        code = _reduction_type(x, op, "reduce_scatter")
        dim = check_dim(x, dim, "reduce_scatter")
        sizes = resolve_sizes(x.shape[dim], sizes, self.world_size, "reduce_scatter")
        source = x.contiguous()
        if math.prod(x.shape[:dim]) != 1:
            source = torch.cat([part.reshape(-1) for part in source.split(sizes, dim)])
        unit = x.numel() // x.shape[dim] if x.shape[dim] else 0
        out = x.new_empty((*x.shape[:dim], sizes[self.rank], *x.shape[dim + 1 :]))
        counts = [size * unit for size in sizes]
        return self._run(_REDUCE_SCATTER, source, out, counts, code, _OPS[op], 0, timeout, asynchronous, lambda: out)

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        return self._all_gather(x, dim, sizes, timeout, False)

    def all_gather_async(self, x, *, dim=0, sizes=None):
        """As ``all_gather``, on the communicator's own stream."""
        return self._all_gather(x, dim, sizes, None, True)

    def _all_gather(self, x, dim, sizes, timeout, asynchronous):
        self._check_tensor(x, "all_gather")
        dim = check_dim(x, dim, "all_gather")
        sizes = gathered_sizes(x.shape[dim], sizes, self.rank, self.world_size)
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        unit = math.prod(before) * math.prod(after)
        source = x.contiguous()
        flat = x.new_empty(sum(sizes) * unit)
        counts = [size * unit * x.element_size() for size in sizes]

        def finish() -> torch.Tensor:
            if math.prod(before) == 1:
                return flat.view(*before, sum(sizes), *after)
            parts = flat.split([size * unit for size in sizes])
            shaped = [part.view(*before, size, *after) for part, size in zip(parts, sizes, strict=True)]
            return torch.cat(shaped, dim)

        return self._run(_ALL_GATHER, source, flat, counts, _BYTE, 0, 0, timeout, asynchronous, finish)

    def broadcast(self, x, src=0, *, timeout=None):
        return self._broadcast(x, src, timeout, False)

    def broadcast_async(self, x: torch.Tensor, src: int = 0) -> Handle:
        """As ``broadcast``, on the communicator's own stream."""
        return self._broadcast(x, src, None, True)

    def _broadcast(self, x, src, timeout, asynchronous):
        self._check_tensor(x, "broadcast")
        check_root(src, self.world_size)
        target = x.contiguous()
        count = x.numel() * x.element_size()
        finish = (lambda: x) if target is x else (lambda: x.copy_(target))
        return self._run(_BROADCAST, target, target, [count], _BYTE, 0, src, timeout, asynchronous, finish)

    def barrier(self, *, timeout=None):
        """Return once every rank has called it and the work before it on this rank's current stream is done.

        In a graph capture only the stream waits, when the graph is replayed.
        """
        cell = self._scratch[:1]
        handle = self._run(_BARRIER, cell, cell, [1], _FLOAT32, 0, 0, timeout, False, None)
        if not torch.cuda.is_current_stream_capturing():
            try:
                poll(lambda: self._native.done(handle), None, math.inf, self.name)
            except CommError as error:
                raise self._explained(error) from None

    def _run(self, operation, source, target, counts, code, op, root, timeout, asynchronous, finish) -> Any:
        """Enqueue one collective; returns ``finish()``, a handle that does, or the native handle without ``finish``."""
        if timeout is None:
            timeout = self.timeout
        else:
            check_timeout(timeout)
        if self._check:
            self._compare(operation, counts, code, op, root, timeout)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        try:
            handle = self._native.run(
                operation, source.data_ptr(), target.data_ptr(), counts, code, op, root, stream, asynchronous, timeout
            )
        except CommError as error:
            raise self._explained(error) from None
        self.counters["nccl"] += 1
        if finish is None:
            return handle
        if not asynchronous:
            return finish()
        source.record_stream(self._comm_stream)
        if target is not source:
            target.record_stream(self._comm_stream)
        return _StreamHandle(self, handle, target, finish)

    def _compare(self, operation: int, counts: list[int], code: int, op: int, root: int, timeout: float) -> None:
        self._checked += 1
        call = {"operation": _NAMES[operation], "type": code, "op": op, "root": root, "counts": counts}
        try:
            self._peers.compare(self._checked, call, timeout)
        except CommError as error:
            self._native.abort(str(error))  # the ranks no longer agree on what comes next
            raise

    # Registered memory -----------------------------------------------------------------------------------------------

    def get_buffer(self, shape: Sequence[int], dtype: torch.dtype, use: str = "input") -> torch.Tensor | None:
        """Memory that NCCL reads and writes in place, for the operand of ``all_reduce(x, out=x)``.

        There is one such buffer, and every call returns its beginning: it is yours until the next call, which gives it
        to somebody else. Work on one stream is enough to keep owners apart.

        Args:
            shape, dtype: the same on all ranks for the operand of one collective.
            use: "input"; for "output" there is none, results replace operands.
        Returns:
            An uninitialised tensor, or None without ``registered_buffers``, or if it would not fit.
        """
        return self._buffers.view(shape, dtype, use)

    def register(self, tensor: torch.Tensor) -> None:
        """See ``nccl_buffers.Buffers.register``."""
        self._buffers.register(tensor, self.timeout)

    def deregister(self, tensor: torch.Tensor) -> None:
        """See ``nccl_buffers.Buffers.deregister``."""
        self._buffers.deregister(tensor, self.timeout)

    def describe(self) -> list[str]:
        """Lines for ``explain``: the budget of SMs, and what became of registered memory."""
        budget = "as many SMs as NCCL likes" if self.max_ctas is None else f"at most {self.max_ctas} SMs (max_ctas)"
        return [f"nccl: a collective takes {budget}", f"nccl: registered buffer: {self._buffers.state}"]

    # Streams and graphs ----------------------------------------------------------------------------------------------

    @property
    def comm_stream(self) -> torch.cuda.ExternalStream:
        """The communicator's own stream, valid until ``close()``. Work put on it delays asynchronous collectives."""
        return self._comm_stream

    def guard_replay(self, timeout: float | None = None) -> None:
        """Have the watchdog look after what the current stream holds, for example a graph just replayed.

        Costs the recording of one event. If the stream has not come this far after ``timeout`` seconds, the
        communicator is aborted as after an operation that passed its deadline.
        """
        timeout = self.timeout if timeout is None else timeout
        check_timeout(timeout)
        try:
            self._native.guard_replay(torch.cuda.current_stream(self.device).cuda_stream, timeout)
        except CommError as error:
            raise self._explained(error) from None

    def check(self) -> None:
        """Raise the error that broke the communicator, if one did; never waits for the device."""
        try:
            self._native.check()
        except CommError as error:
            raise self._explained(error) from None

    @property
    def sequence(self) -> int:
        """Collectives begun so far, those of creation included."""
        return self._native.sequence

    def close(self) -> None:
        """Release stream, events and NCCL's resources, after waiting some seconds for what is in flight."""
        self._finalizer()

    def _explained(self, error: CommError) -> CommError:
        """What to raise for an error of the native core: the first one names the ranks it is about."""
        if isinstance(error, CommAbortedError):
            return error
        if self._failure is None:
            self._failure = self._peers.explain(error)
        return self._failure

    def _check_tensor(self, x: torch.Tensor, operation: str) -> None:
        if x.device != self.device:
            raise ValueError(f"{operation}: expected a tensor on {self.device}, got one on {x.device}")

    def __repr__(self) -> str:
        return f"NCCLCommunicator(name={self.name!r}, rank={self.rank}, world_size={self.world_size})"


class _StreamHandle(Handle):
    """Handle of an asynchronous collective; may be waited for from several streams."""

    def __init__(self, communicator: NCCLCommunicator, handle: Any, target: torch.Tensor, finish: Callable):
        self._communicator, self._handle, self._target, self._finish = communicator, handle, target, finish
        self._value: torch.Tensor | None = None
        self._made_on = torch.cuda.current_stream(communicator.device)

    def wait(self) -> torch.Tensor:
        communicator = self._communicator
        stream = torch.cuda.current_stream(communicator.device)
        try:
            communicator._native.wait(self._handle, stream.cuda_stream)
        except CommError as error:
            raise communicator._explained(error) from None
        if stream != self._made_on:  # the allocator knows only the stream on which the memory was taken
            self._target.record_stream(stream)
        if self._value is None:
            self._value = self._finish()
        return self._value


def _reduction_type(x: torch.Tensor, op: str, operation: str) -> int:
    check_reduce_op(op)
    code = _TYPES.get(x.dtype)
    if code is None:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        raise ValueError(f"{operation}: unsupported dtype {x.dtype}; expected one of {names}")
    return code
