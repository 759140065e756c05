"""What the ranks of an NCCL group know of each other beside NCCL: who came, who died, who called what.

NCCL itself says little when a rank is missing. Here a rank whose communicator broke announces where it stood in the
store; those that do not announce themselves within a moment are the ones that were waited for. Processes of this host
are looked at by their ids. Everything works on a torch Store and the clock, without a GPU.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from tp_kernels.comm import rendezvous
from tp_kernels.comm.errors import CommError, CommMismatchError, CommTimeoutError, PeerDiedError
from tp_kernels.comm.processes import is_running, local_pids, process_facts

__all__ = ["Peers"]

# Ranks that wait for the same operation have the same deadline, give or take their different arrivals.
_PATIENCE, _POLL = 1.5, 0.02


class Peers:
    """The other ranks of one group. Creating it is a collective.

    Args:
        store: a torch Store with a prefix of this communicator's own.
        facts: what this rank tells the others, JSON-able.
        timeout: seconds to wait for the other ranks.
    Attributes:
        facts: every rank's, in rank order.
    Raises:
        CommTimeoutError: names the ranks that did not come.
    """

    def __init__(self, store: Any, rank: int, world_size: int, group: str, facts: Mapping[str, Any], timeout: float):
        self._store, self._rank, self._world_size, self._group = store, rank, world_size, group
        mine = {**process_facts(), **facts}
        self.facts = rendezvous.exchange(store, rank, world_size, mine, timeout, group=group, what="create")
        self._pids = local_pids(self.facts, rank)

    def agree(self, what: str, error: str, late: bool, timeout: float) -> tuple[int, str, bool] | None:
        """End of a stage: every rank tells how it went, ``error`` being "" for well.

        A rank with an error does not wait for the others.

        Args:
            late: the error is a deadline that passed.
            timeout: seconds to wait for the other ranks.
        Returns:
            (rank, error, late) of the first rank with an error, or None.
        """
        payload = {"error": error, "late": late}
        if error:
            with contextlib.suppress(RuntimeError):  # without a store the others find out by their own deadlines
                self._store.set(f"{what}/{self._rank}", json.dumps(payload))
            return self._rank, error, late
        rendezvous.exchange(self._store, self._rank, self._world_size, payload, timeout, group=self._group, what=what)
        return self.reported(what)

    def share(self, what: str, facts: Mapping[str, Any], timeout: float) -> list[dict[str, Any]]:
        """Every rank tells something and gets what all of them told, in rank order.

        Args:
            what: not used before in this group.
        Raises:
            CommTimeoutError: names the ranks that did not come.
        """
        mine = dict(facts)
        return rendezvous.exchange(
            self._store, self._rank, self._world_size, mine, timeout, group=self._group, what=what
        )

    def reported(self, what: str) -> tuple[int, str, bool] | None:
        """What ``agree`` would return by what the other ranks have told so far."""
        for rank in range(self._world_size):
            key = f"{what}/{rank}"
            if rank != self._rank and self._store.check([key]):
                theirs = json.loads(self._store.get(key))
                if theirs["error"]:
                    return rank, theirs["error"], theirs["late"]
        return None

    def compare(self, sequence: int, call: Mapping[str, Any], timeout: float) -> None:
        """Check mode: every rank tells what it is about to call.

        Raises:
            CommMismatchError: the ranks' calls differ; lists who called what. CommTimeoutError: a rank did not call.
        """
        what = f"check/{sequence}"
        everyone = rendezvous.exchange(
            self._store, self._rank, self._world_size, dict(call), timeout, group=self._group, what=what
        )
        # All have read the call before the last one, or they would not have come here. A store that cannot delete only
        # grows; one that is gone says so in the next exchange.
        with contextlib.suppress(RuntimeError):
            self._store.delete_key(f"check/{sequence - 2}/{self._rank}")
        if all(theirs == everyone[0] for theirs in everyone):
            return
        counts = [sum(a == b for b in everyone) for a in everyone]
        odd = [r for r, count in enumerate(counts) if count < max(counts)] or list(range(self._world_size))
        lines = "; ".join(f"rank {r}: {_describe(theirs)}" for r, theirs in enumerate(everyone))
        raise CommMismatchError(
            f"group {self._group}: ranks called different collectives (call {sequence}): {lines}",
            group=self._group,
            operation=call["operation"],
            sequence=sequence,
            ranks=odd,
        )

    def dead(self) -> list[int]:
        """Ranks of this host whose process has ended."""
        return [r for r, pid in self._pids.items() if not is_running(pid)]

    def explain(self, error: CommError) -> CommError:
        """What to raise instead of ``error``, this rank's first: the same with the ranks concerned, if they are known.

        Takes up to two seconds. Returns a ``PeerDiedError`` when a process of this host is seen to have ended.
        """
        dead = self.dead()
        if not dead and not isinstance(error, CommTimeoutError):
            time.sleep(0.1)  # a closed connection is seen before the kernel has taken the process away
            dead = self.dead()
        known = {"group": error.group, "operation": error.operation, "sequence": error.sequence}
        with contextlib.suppress(RuntimeError):  # a store that is gone must not hide ``error``
            self._store.set(f"broken/{self._rank}", str(error.sequence))
        if dead:
            names = ", ".join(map(str, dead))
            return PeerDiedError(f"{error}; the process of rank {names} has ended", ranks=dead, **known)
        absent = self._absent()
        if not absent:
            return error
        names = ", ".join(map(str, absent))
        return type(error)(f"{error}; not heard of in the meantime: rank {names}", ranks=absent, **known)

    def _absent(self) -> list[int]:
        """Ranks that did not say that they broke too; [] if the store is gone."""
        absent = [r for r in range(self._world_size) if r != self._rank]
        deadline = time.monotonic() + _PATIENCE
        with contextlib.suppress(RuntimeError):
            while True:
                absent = [r for r in absent if not self._store.check([f"broken/{r}"])]
                if not absent or time.monotonic() > deadline:
                    return absent
                time.sleep(_POLL)
        return []


def _describe(call: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" if key != "operation" else str(value) for key, value in call.items())
