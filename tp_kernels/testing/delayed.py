"""``DelayedCommunicator``: a communicator whose asynchronous results arrive late, to find waits that are missing.

The collectives are carried out by another communicator (of CPU ranks, say), but until ``wait()`` the buffer that will
hold the result is full of NaN. What is read too early is NaN; what is written too early is noticed by ``wait()``, as is
an input that was changed while it could still be read. ``in_flight`` counts handles that nobody has waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tp_kernels.comm.communicator import Communicator, Handle

__all__ = ["DelayedCommunicator", "PrematureUseError"]


class PrematureUseError(AssertionError):
    """A buffer was written to while an asynchronous collective was using it."""


class DelayedCommunicator(Communicator):
    """The collectives of ``inner``, with asynchronous ones that cannot be used before they were waited for.

    Args:
        inner: carries them out, at once; CPU tensors, or a GPU's at the price of synchronising.

    Attributes:
        in_flight: asynchronous calls that were not waited for.
        log: names of the calls and of the waits, in order.
    """

    overlap_modes = ("chunked",)

    def __init__(self, inner: Communicator):
        self.rank, self.world_size, self.name = inner.rank, inner.world_size, inner.name
        self.backend, self.timeout, self.numerics = inner.backend, inner.timeout, inner.numerics
        self.in_flight = 0
        self.log: list[str] = []
        self._inner = inner

    # The synchronous ones are those of the transport.

    def all_reduce(self, x, op="sum", *, out=None, timeout=None):
        self.log.append("all_reduce")
        return self._inner.all_reduce(x, op, out=out, timeout=timeout)

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        self.log.append("reduce_scatter")
        return self._inner.reduce_scatter(x, op, dim=dim, sizes=sizes, timeout=timeout)

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        self.log.append("all_gather")
        return self._inner.all_gather(x, dim=dim, sizes=sizes, timeout=timeout)

    def broadcast(self, x, src=0, *, timeout=None):
        return self._inner.broadcast(x, src, timeout=timeout)

    def barrier(self, *, timeout=None):
        self._inner.barrier(timeout=timeout)

    # The asynchronous ones.

    def all_reduce_async(self, x, op="sum", *, out=None):
        result = self._inner.all_reduce(x, op)
        return self._delay("all_reduce", x, result, result.clone() if out is None else out)

    def reduce_scatter_async(self, x, op="sum", *, dim=0, sizes=None):
        result = self._inner.reduce_scatter(x, op, dim=dim, sizes=sizes)
        return self._delay("reduce_scatter", x, result, result.clone())

    def all_gather_async(self, x, *, dim=0, sizes=None):
        result = self._inner.all_gather(x, dim=dim, sizes=sizes)
        return self._delay("all_gather", x, result, result.clone())

    def _delay(self, name: str, x: torch.Tensor, result: torch.Tensor, buffer: torch.Tensor) -> Handle:
        buffer.fill_(torch.nan)
        given = x.clone()
        self.in_flight += 1
        self.log.append(f"{name}_async")
        return Handle(buffer, self._arrival(name, x, given, result, buffer))

    def _arrival(self, name, x, given, result, buffer) -> Callable[[], None]:
        def arrive() -> None:
            self.in_flight -= 1
            self.log.append(f"{name} wait")
            if not bool(buffer.isnan().all()):
                raise PrematureUseError(f"the result of {name} was written to before it was waited for")
            if not torch.equal(x.nan_to_num(), given.nan_to_num()):
                raise PrematureUseError(f"the input of {name} was changed before it was waited for")
            buffer.copy_(result)

        return arrive
