"""Memory that NCCL's transports read and write in place: one buffer of the communicator's, and tensors of the user's.

Otherwise NCCL copies through buffers of its own. What a registration saves depends on how the ranks are connected:
NVLink SHARP needs fewer SMs, GPUs that reach each other read one another's buffers directly, and a window
(ncclCommWindowRegister) lets NCCL take its symmetric kernels. Sockets copy through host memory either way, so ranks on
one GPU gain nothing that we know of. None of it has been measured here, and another kernel may sum in another order:
hence off unless asked for. Which call is made for which version of NCCL, and why, stands in csrc/comm/nccl_buffers.h.

NCCL demands that in one collective all ranks pass registered memory or none does, at the same offset from the beginning
of what was registered. So everything here is agreed on by all ranks: all have a registration, or none keeps it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tp_kernels.comm.nccl_peers import Peers

__all__ = ["Buffers", "close"]

_KINDS = ("", "registered", "registered as a window")

# Storage that NCCL may still know although its communicator was closed: never given back.
_kept: list[Any] = []


class _Owner:
    """Memory of NCCL's as torch takes it; a tensor made of it keeps it."""

    def __init__(self, memory: Any, nbytes: int):
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "strides": None,
            "version": 3,
        }


def _tensor_over(memory: Any, nbytes: int, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(_Owner(memory, nbytes), device=device)
    if tensor.data_ptr() != memory.address:
        raise RuntimeError(f"this torch copies foreign memory instead of using it on {device}")
    return tensor


class Buffers:
    """What one communicator has registered.

    Args:
        native: the native communicator.
        peers: the other ranks.
        device: of all tensors.
    Attributes:
        state: what became of the communicator's own buffer, in words.
    """

    def __init__(self, native: Any, peers: Peers, device: torch.device):
        self._native, self._peers, self._device = native, peers, device
        self.state = "none (registered_buffers=False)"
        self._memory: Any = None
        self._base: torch.Tensor | None = None
        self._views: dict[Any, torch.Tensor] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._asked = 0

    # The communicator's own buffer -----------------------------------------------------------------------------------

    def make(self, nbytes: int, warm_up: Callable[[torch.Tensor], None], timeout: float) -> bool:
        """Allocate and register the buffer; a collective, outside of captures.

        Args:
            nbytes: the same on all ranks.
            warm_up: runs collectives on the buffer and waits for them: connections that it needs are made now.
            timeout: seconds for every step.
        Returns:
            False, on all ranks alike, if that may have broken the communicator: make another, without the buffer.
            Otherwise the buffer is there or the communicator works without; see ``state``.
        """
        memory = base = None
        with _Attempt() as attempt:
            memory = self._native.allocate(nbytes)
            base = _tensor_over(memory, nbytes, self._device)
        if not self._all_well("buffer allocated", attempt.error, timeout):
            return True
        kind = 0
        with _Attempt() as attempt:
            memory.used_on(torch.cuda.current_stream(self._device).cuda_stream)
            base.zero_()
            kind = self._native.register(memory.address, nbytes, True, memory, timeout)
        # A rank whose own step took its whole time is waited for here.
        everyone = self._peers.share("buffer registered", {"error": attempt.error, "kind": kind}, 2 * timeout + 5)
        if self._first_error([facts["error"] for facts in everyone]):
            return False
        kinds = [facts["kind"] for facts in everyone]
        if min(kinds) != max(kinds) or kind == 0:
            if kind:
                self._native.deregister(memory.address, timeout)
            listing = ", ".join(f"rank {r}: {_KINDS[theirs] or 'not'}" for r, theirs in enumerate(kinds))
            self.state = f"none (NCCL accepted the memory without registering it: {listing})"
            return True
        with _Attempt() as attempt:
            warm_up(base)
        if not self._all_well("buffer used", attempt.error, 2 * timeout + 5):
            return False
        self._memory, self._base = memory, base
        self.state = f"{nbytes >> 10} KiB, {_KINDS[kind]}; what NCCL makes of it it does not tell"
        return True

    def _all_well(self, what: str, error: str, timeout: float) -> bool:
        return not self._first_error([facts["error"] for facts in self._peers.share(what, {"error": error}, timeout)])

    def _first_error(self, errors: Sequence[str]) -> bool:
        for rank, error in enumerate(errors):
            if error:
                self.state = f"none (rank {rank}: {error})"
                return True
        return False

    def view(self, shape: Sequence[int], dtype: torch.dtype, use: str) -> torch.Tensor | None:
        """See ``NCCLCommunicator.get_buffer``."""
        if use not in ("input", "output"):
            raise ValueError(f"get_buffer: use must be 'input' or 'output', got {use!r}")
        if self._base is None or use == "output":
            return None
        count = dtype.itemsize
        for extent in shape:
            count *= extent
        if count > self._base.numel():
            return None
        self._memory.used_on(torch.cuda.current_stream(self._device).cuda_stream)
        key = (tuple(shape), dtype)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= 256:
                self._views.clear()
            with torch.inference_mode(False):  # it must stay writable outside inference mode
                found = self._base[:count].view(dtype).view(key[0])
            self._views[key] = found
        return found

    # Tensors of the user's -------------------------------------------------------------------------------------------

    def register(self, tensor: torch.Tensor, timeout: float) -> None:
        """Let NCCL use the tensor's memory in place; a collective, outside of captures.

        All of the tensor's storage is registered. NCCL looks at whole allocations of the driver, which torch's
        allocator divides among tensors, and uses for NVLink SHARP only those that can be exported to other processes:
        ``expandable_segments`` or a MemPool over ncclMemAlloc. From now on all ranks must pass this memory to a
        collective at the same offset, or none; results must go to registered memory, too.

        Args:
            tensor: on ``device``; kept alive until ``deregister`` or ``close``.
        Raises:
            ValueError: on all ranks alike, if any rank cannot: memory elsewhere, registered already, or NCCL refuses.
        """
        self._asked += 1
        storage = tensor.untyped_storage()
        address, done = storage.data_ptr(), False
        with _Attempt() as attempt:
            if tensor.device != self._device:
                raise ValueError(f"expected a tensor on {self._device}, got one on {tensor.device}")
            if storage.nbytes() == 0:
                raise ValueError("the tensor has no memory")
            if address in self._storages:
                raise ValueError("the tensor's memory is registered already")
            _check_no_capture("register")
            done = self._native.register(address, storage.nbytes(), False, None, timeout) != 0
            if not done:
                raise ValueError("NCCL accepted the memory without registering it (NCCL_LOCAL_REGISTER=0?)")
        if done:
            self._storages[address] = storage
        everyone = self._peers.share(f"register {self._asked}", {"error": attempt.error}, timeout)
        errors = [f"rank {rank}: {facts['error']}" for rank, facts in enumerate(everyone) if facts["error"]]
        if errors:
            if done:
                self._end(address, timeout)
            raise ValueError(f"register: {'; '.join(errors)}")

    def deregister(self, tensor: torch.Tensor, timeout: float) -> None:
        """End what ``register`` began, after what is in flight; graphs with this memory must not be replayed again.

        Raises:
            ValueError: it is not registered. CommTimeoutError: collectives have not ended in time; it still is.
        """
        address = tensor.untyped_storage().data_ptr()
        if address not in self._storages:
            raise ValueError("deregister: the tensor's memory is not registered")
        _check_no_capture("deregister")
        self._end(address, timeout)

    def _end(self, address: int, timeout: float) -> None:
        self._native.deregister(address, timeout)
        del self._storages[address]

    def will_close(self) -> None:
        """The current stream may hold what uses the buffer, for example a graph's replay."""
        if self._memory is not None:
            with contextlib.suppress(RuntimeError):  # CUDA may be gone already
                self._memory.used_on(torch.cuda.current_stream(self._device).cuda_stream)

    def closed(self) -> None:
        """The native communicator was closed. Tensors of ``view`` keep the memory until they are gone."""
        self._views.clear()
        self._memory = self._base = None
        if self._native.registrations:
            _kept.extend(self._storages.values())
        self._storages.clear()


def close(native: Any, buffers: Buffers, grace: float) -> None:
    """Close the native communicator, and then let go of what was registered with it."""
    buffers.will_close()
    native.close(grace)
    buffers.closed()


class _Attempt:
    """``with _Attempt() as attempt``: what went wrong in the block, in words; "" if nothing did."""

    def __init__(self) -> None:
        self.error = ""

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.error = str(error) or type(error).__name__
            return True
        return False


def _check_no_capture(what: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{what} cannot be captured in a CUDA graph: call it before")
