"""Errors of the communication layer: each names the group, the operation, its sequence number and the ranks."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CommAbortedError", "CommError", "CommMismatchError", "CommTimeoutError", "PeerDiedError"]


class CommError(RuntimeError):
    """A collective failed. After one, the communicator is broken on every rank and refuses further calls.

    Attributes:
        group: name of the group.
        operation: for example ``"all_reduce"``, or None outside one.
        sequence: how many collectives this communicator had started, this one included.
        ranks: group ranks concerned: those waited for, those that died, those that disagree.
    """

    def __init__(
        self,
        message: str,
        *,
        group: str = "",
        operation: str | None = None,
        sequence: int | None = None,
        ranks: Sequence[int] = (),
    ):
        super().__init__(message)
        self.group = group
        self.operation = operation
        self.sequence = sequence
        self.ranks = tuple(ranks)


class CommTimeoutError(CommError):
    """A rank was missing, late or dead: the deadline passed, or its process was seen to have ended."""


class PeerDiedError(CommTimeoutError):
    """A rank's process ended while others waited for it; raised well before the deadline."""


class CommMismatchError(CommError):
    """Ranks called different operations, sizes, dtypes or roots; the message lists who called what."""


class CommAbortedError(CommError):
    """The communicator was already broken, by an earlier error here or by another rank, or it was closed."""
