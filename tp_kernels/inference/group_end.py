"""What has captured a group's communicator ends with the group: before the communicator does."""

from __future__ import annotations

import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tp_kernels.comm.tp_group import TPGroup

__all__ = ["close_with_group"]


class _Closable(Protocol):
    def close(self) -> None: ...


# Of every group that is open, those made for it that live.
_made_for: weakref.WeakKeyDictionary[TPGroup, weakref.WeakSet[_Closable]] = weakref.WeakKeyDictionary()


def close_with_group(group: TPGroup, made: _Closable) -> None:
    """Call ``made.close()`` when the group is closed, if it lives till then; it is not kept alive for that."""
    if group not in _made_for:
        _made_for[group] = weakref.WeakSet()
        group.before_close(partial(_close_all, weakref.ref(group)))
    _made_for[group].add(made)


def _close_all(group: weakref.ref[TPGroup]) -> None:
    for made in list(_made_for.pop(group(), ())):
        with suppress(Exception):  # of a device that is lost; the communicator is closed all the same
            made.close()
