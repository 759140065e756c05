"""Deadlines for Gloo: how its calls are waited for, and what is said when a rank is late, dead or gone.

Gloo alone ends in "Connection closed by peer" or a bare timeout. Here a call that takes longer than a moment announces
itself in the store, so that whoever reaches its deadline can tell which ranks are there and which never came. Processes
of this host are looked at by their ids. The first rank to fail leaves a note in the store, which ends the others too.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

from tp_kernels.comm import rendezvous
from tp_kernels.comm.errors import CommAbortedError, CommTimeoutError, PeerDiedError
from tp_kernels.comm.processes import is_running, local_pids, process_facts

__all__ = ["Call", "Watch", "limited"]

# How long a call runs unannounced, and how often a waiting rank looks for bad news, in seconds.
_QUIET, _POLL = 0.5, 0.25
# A closed connection is seen before the kernel has taken the process away.
_REAPING = 0.05


class Call:
    """One collective in progress on this rank; ``limit`` is its deadline in seconds from now."""

    __slots__ = ("announced", "limit", "operation", "sequence", "start")

    def __init__(self, operation: str, sequence: int, limit: float):
        self.operation, self.sequence, self.limit = operation, sequence, limit
        self.start = time.monotonic()
        self.announced = False

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def remaining(self) -> float:
        return self.limit - self.elapsed()


class Watch:
    """Waits for the calls of one group. Creating it is a collective.

    Attributes:
        broken: why the group takes no more calls, or None.
    """

    def __init__(self, group: str, rank: int, world_size: int, store: Any, timeout: float):
        self._group, self._rank, self._world_size, self._store = group, rank, world_size, store
        self._sequence = 0
        self.broken: str | None = None
        everyone = rendezvous.exchange(store, rank, world_size, process_facts(), timeout, group=group, what="create")
        self._local_pids = local_pids(everyone, rank)

    def begin(self, operation: str, limit: float) -> Call:
        """The next call, with a deadline in seconds.

        Raises:
            CommAbortedError: the group is broken or closed. ValueError: for a deadline that is none.
        """
        if self.broken is not None:
            raise CommAbortedError(
                f"group {self._group}: {operation} refused, because the communicator is broken: {self.broken}",
                group=self._group,
                operation=operation,
                sequence=self._sequence,
            )
        if not 0 < limit < 1e9:
            raise ValueError(f"{operation}: timeout must be positive seconds below 1e9, got {limit!r}")
        self._sequence += 1
        return Call(operation, self._sequence, limit)

    def run(self, call: Call, start: Callable[[], Any]) -> None:
        """Start one Gloo operation, which returns its Work, and wait for it until the call's deadline."""
        try:
            work = start()  # holds the tensors until it is done: Gloo writes to them even after we have given up
        except RuntimeError as error:
            self._fail(call, f"gloo: {error}")
        step = min(_QUIET, call.limit / 4)
        while True:
            try:
                work.wait(timedelta(seconds=max(0.001, min(step, call.remaining()))))
                return
            except RuntimeError:
                finished = work.is_completed()
            if finished:
                try:
                    work.wait()  # tells an error of the operation from one that came to its end just after the wait
                    return
                except RuntimeError as error:
                    self._fail(call, f"gloo: {error}")
            self._look_around(call)
            step = _POLL

    def _look_around(self, call: Call) -> None:
        """Between two waits: announce this rank, look for dead processes, others' failures and the deadline."""
        dead = self._dead()
        if dead:
            self._fail(call, "its process ended", dead)
        try:
            self._announce(call)
            failed = self._store.check(["failure"])
        except RuntimeError as error:
            self._fail(call, f"the store does not answer: {error}")
        if failed:
            self._fail(call, "another rank failed")
        if call.remaining() <= 0:
            self._fail(call, None)

    def _fail(self, call: Call, cause: str | None, dead: Sequence[int] = ()) -> NoReturn:
        """Break the communicator, tell the others, raise. ``cause`` None means that the deadline passed."""
        where = (
            f"group {self._group}: {call.operation} (call {call.sequence}) on rank {self._rank} of {self._world_size}"
        )
        known = {"group": self._group, "operation": call.operation, "sequence": call.sequence}
        note = self._note_of_failure()
        if note is not None:  # the first failure is the cause of the others, of peers that ended since too
            self.broken = f"{where} ended because rank {note['rank']} failed: {note['message']}"
            raise _error_of(note["kind"])(self.broken, ranks=note["ranks"], **known)
        if not dead and cause is not None:
            time.sleep(_REAPING)
            dead = self._dead()
        if dead:
            kind, ranks = "died", list(dead)
        else:
            kind, ranks = "timeout" if cause is None else "lost", self._absent(call)
        named = "rank " + ", ".join(map(str, ranks)) if ranks else "a rank that cannot be told"
        self.broken = {
            "died": f"{where}: {named} died (its process ended) after {call.elapsed():.1f} s of waiting",
            "timeout": f"{where}: deadline of {call.limit:g} s passed, waiting for {named}",
            "lost": f"{where}: connection lost after {call.elapsed():.1f} s, {named} does not answer ({cause})",
        }[kind]
        with contextlib.suppress(RuntimeError):
            note = {"kind": kind, "rank": self._rank, "ranks": ranks, "message": self.broken}
            self._store.set("failure", json.dumps(note))
        raise _error_of(kind)(self.broken, ranks=ranks, **known)

    def _announce(self, call: Call) -> None:
        if not call.announced:
            call.announced = True
            self._store.set(f"waiting/{self._rank}", str(call.sequence))

    def _absent(self, call: Call) -> list[int]:
        """Ranks that have not announced this call, once those that have just come had time to."""
        deadline = time.monotonic() + _QUIET + _POLL
        absent = [r for r in range(self._world_size) if r != self._rank]
        with contextlib.suppress(RuntimeError):
            self._announce(call)
            while True:
                absent = [r for r in absent if self._announced_by(r) < call.sequence]
                if not absent or time.monotonic() > deadline:
                    return absent
                time.sleep(_REAPING)
        return []  # the store is gone too: nobody can be told from anybody

    def _announced_by(self, rank: int) -> int:
        key = f"waiting/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def _dead(self) -> list[int]:
        return [r for r, pid in self._local_pids.items() if not is_running(pid)]

    def _note_of_failure(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._store.get("failure")) if self._store.check(["failure"]) else None
        except RuntimeError:
            return None


def limited(options: Any, call: Call) -> Any:
    """Give Gloo a deadline of its own, a little later than ours: it is what ends an operation we have given up."""
    options.timeout = timedelta(seconds=max(call.remaining(), 0.0) + 1.0)
    return options


def _error_of(kind: str) -> type[CommTimeoutError]:
    return CommTimeoutError if kind == "timeout" else PeerDiedError
