"""``Communicator``: what every transport (shared memory, Gloo, NCCL, symmetric memory) offers the layers.

Tensors are contiguous or not, of any length; results are plain tensors. Every wait has a deadline.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

__all__ = ["Communicator", "Handle", "LocalCommunicator", "Numerics", "started_collectives"]

DEFAULT_TIMEOUT = 300.0


@dataclass(frozen=True)
class Numerics:
    """What a communicator promises about its sums: a tuner may choose only among equal ones.

    Attributes:
        accumulate: dtype in which bf16 and fp16 are summed, for example ``"float32"``.
        order: ``"rank"`` (0, 1, ..., N-1) or ``"algorithm"`` (fixed by the library, not stated).
        same_bits_on_all_ranks: every rank receives identical bits.
        size_dependent: the bits of one element may change with the length of the message.
    """

    accumulate: str
    order: str
    same_bits_on_all_ranks: bool
    size_dependent: bool


class Handle:
    """Result of an asynchronous collective. ``wait()`` returns the tensor; on GPUs it orders streams, not the host."""

    def __init__(self, result: torch.Tensor, wait=None):
        self._result = result
        self._wait = wait

    def wait(self) -> torch.Tensor:
        """Make the result usable by the caller's current stream (or thread) and return it."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self._result


@contextlib.contextmanager
def started_collectives() -> Iterator[list[Handle]]:
    """A list for the handles that a block starts: if the block fails, all of them are waited for before it is left.

    Their buffers must not be given out again while the communicator may still use them.
    """
    handles: list[Handle] = []
    try:
        yield handles
    except BaseException:
        for handle in handles:
            with contextlib.suppress(Exception):  # the error that is on its way says more
                handle.wait()
        raise


class Communicator(abc.ABC):
    """Collectives of one group, called by all its ranks in the same order.

    Attributes:
        rank, world_size: position in and size of the group.
        name: the group's name, in every error.
        backend: short name of the transport: ``"local"``, ``"shm"``, ``"gloo"``, ``"nccl"``, ``"symm"``.
        timeout: default deadline of a call in seconds.
        numerics: what its sums promise.
        overlap_modes: ways in which its calls overlap the caller's work: "chunked" (asynchronous calls run beside it),
            "fused" (``linear_all_reduce`` multiplies as well); none by default.
    """

    rank: int
    world_size: int
    name: str
    backend: str
    timeout: float
    numerics: Numerics
    overlap_modes: tuple[str, ...] = ()

    @abc.abstractmethod
    def all_reduce(
        self, x: torch.Tensor, op: str = "sum", *, out: torch.Tensor | None = None, timeout: float | None = None
    ) -> torch.Tensor:
        """Reduce ``x`` over the ranks; ``op`` is "sum" or "max".

        Args:
            x: any shape, the same on all ranks.
            out: where the result goes; ``out=x`` reduces in place, None allocates.
            timeout: deadline in seconds, None for the communicator's own.
        Returns:
            The reduced tensor, of x's shape.
        """

    @abc.abstractmethod
    def reduce_scatter(
        self,
        x: torch.Tensor,
        op: str = "sum",
        *,
        dim: int = 0,
        sizes: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """Reduce ``x`` (same shape on all ranks) and return this rank's slice along ``dim``.

        ``sizes[r]`` is the extent of rank r's slice; None means equal slices.
        """

    @abc.abstractmethod
    def all_gather(
        self, x: torch.Tensor, *, dim: int = 0, sizes: Sequence[int] | None = None, timeout: float | None = None
    ) -> torch.Tensor:
        """Concatenate the ranks' ``x`` along ``dim``; ``sizes[r]`` is rank r's extent, None means all equal."""

    @abc.abstractmethod
    def broadcast(self, x: torch.Tensor, src: int = 0, *, timeout: float | None = None) -> torch.Tensor:
        """Overwrite ``x`` with that of group rank ``src``, in place; returns ``x``."""

    @abc.abstractmethod
    def barrier(self, *, timeout: float | None = None) -> None:
        """Return once every rank has called it."""

    def all_reduce_async(self, x: torch.Tensor, op: str = "sum", *, out: torch.Tensor | None = None) -> Handle:
        """As ``all_reduce``, returning a ``Handle``. This default completes before it returns (CPU transports)."""
        return Handle(self.all_reduce(x, op, out=out))

    def reduce_scatter_async(
        self, x: torch.Tensor, op: str = "sum", *, dim: int = 0, sizes: Sequence[int] | None = None
    ) -> Handle:
        """As ``reduce_scatter``, returning a ``Handle``. This default completes before it returns."""
        return Handle(self.reduce_scatter(x, op, dim=dim, sizes=sizes))

    def all_gather_async(self, x: torch.Tensor, *, dim: int = 0, sizes: Sequence[int] | None = None) -> Handle:
        """As ``all_gather``, returning a ``Handle``. This default completes before it returns."""
        return Handle(self.all_gather(x, dim=dim, sizes=sizes))

    def bind_all_reduce(self, x: torch.Tensor) -> Callable[[], object]:
        """A call without arguments that sums ``x`` over the ranks in place, for buffers reduced again and again.

        The caller keeps ``x`` alive and where it is. This default saves nothing; a transport may check and look up
        beforehand what ``all_reduce`` checks in every call.
        """
        return partial(self.all_reduce, x, out=x)

    def close(self) -> None:  # noqa: B027  (not every transport holds something)
        """Release what the communicator holds; not a collective; safe to call twice."""


class LocalCommunicator(Communicator):
    """World size 1: every collective is the identity, and torch.distributed is never touched."""

    def __init__(self, name: str = "local", timeout: float = DEFAULT_TIMEOUT):
        self.rank, self.world_size, self.name, self.backend, self.timeout = 0, 1, name, "local", timeout
        self.numerics = Numerics("none", "rank", same_bits_on_all_ranks=True, size_dependent=False)

    def all_reduce(self, x, op="sum", *, out=None, timeout=None):
        check_reduce_op(op)
        if out is None:
            return x.clone()
        return out if out is x else out.copy_(x)

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        check_reduce_op(op)
        resolve_sizes(x.shape[dim], sizes, 1, "reduce_scatter")
        return x.clone()

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        if sizes is not None:
            resolve_sizes(x.shape[dim], sizes, 1, "all_gather")
        return x.clone()

    def broadcast(self, x, src=0, *, timeout=None):
        check_root(src, 1)
        return x

    def barrier(self, *, timeout=None):
        return None


def check_reduce_op(op: str) -> None:
    """ValueError unless ``op`` is one the communicators implement."""
    if op not in ("sum", "max"):
        raise ValueError(f"unknown reduction {op!r}; expected 'sum' or 'max'")


def check_root(src: int, world_size: int) -> None:
    """ValueError unless ``src`` is a rank of the group."""
    if not 0 <= src < world_size:
        raise ValueError(f"broadcast: src must be a group rank in [0, {world_size}), got {src}")


def check_timeout(timeout: float) -> None:
    """ValueError unless ``timeout`` is seconds that a call can wait."""
    if not 0 < timeout < 1e9:
        raise ValueError(f"timeout must be positive seconds below 1e9, got {timeout!r}")


def check_dim(x: torch.Tensor, dim: int, operation: str) -> int:
    """``dim`` counted from the front; ValueError unless ``x`` has it."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{operation}: dim {dim} is out of range for a tensor of shape {tuple(x.shape)}")
    return dim % x.dim()


def gathered_sizes(
    extent: int, sizes: Sequence[int] | None, rank: int, world_size: int, operation: str = "all_gather"
) -> list[int]:
    """Extents per rank of what is gathered, ``extent`` being this rank's; all equal when ``sizes`` is None.

    Raises:
        ValueError: ``sizes`` are not one extent per rank, or not this rank's.
    """
    if sizes is None:
        return [extent] * world_size
    if len(sizes) != world_size or min(sizes) < 0 or sizes[rank] != extent:
        raise ValueError(
            f"{operation}: sizes must be {world_size} extents with {extent} at rank {rank}, got {list(sizes)}"
        )
    return list(sizes)


def resolve_sizes(total: int, sizes: Sequence[int] | None, world_size: int, operation: str) -> list[int]:
    """Extents per rank that sum to ``total``; equal ones when ``sizes`` is None. ValueError otherwise."""
    if sizes is None:
        if total % world_size:
            raise ValueError(f"{operation}: {total} does not divide by {world_size} ranks; pass sizes= per rank")
        return [total // world_size] * world_size
    if len(sizes) != world_size or sum(sizes) != total or min(sizes) < 0:
        raise ValueError(f"{operation}: sizes must be {world_size} extents that sum to {total}, got {list(sizes)}")
    return list(sizes)
