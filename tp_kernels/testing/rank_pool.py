"""``RankPool``: persistent rank processes that run functions together, for tests, benchmarks and the doctor.

    pool = RankPool(3)
    results = pool.run(my_function, argument)      # my_function(group, argument) on ranks 0, 1, 2

The processes are forked from a server that has torch loaded, so a pool starts in a fraction of a second, and they are
kept, so a run costs one message each way. A function travels as (file, qualified name): it needs no importable package
around it, which is what pytest's importlib mode gives. Arguments and results are pickled by value: torch's own way
would put tensors into /dev/shm. Nothing is ever waited for without a deadline, a dead rank is named with its signal,
and the processes die with the one that started them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["PRELOAD", "RankFailedError", "RankOutcome", "RankPool"]

# Modules that the fork server imports once for all pools; extend it before the first pool starts.
PRELOAD = ["torch", "torch.distributed.device_mesh", "tp_kernels.comm", "tp_kernels.testing.rank_pool"]
_START_TIMEOUT = 120.0
# Ranks that fail because another one did report within this time of it, and the first cause is looked for among them.
_SETTLE = 0.3


class RankFailedError(RuntimeError):
    """A rank died, hung, or raised something that cannot be sent between processes.

    Attributes:
        ranks: the ranks concerned.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()):
        super().__init__(message)
        self.ranks = ranks


class _RemoteTraceback(Exception):
    """Cause of a re-raised exception: the traceback in the rank's process, as text."""

    def __init__(self, text: str):
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return "\n" + self.text


@dataclass(frozen=True)
class RankOutcome:
    """How one rank's call ended: exactly one of these holds.

    ``error is None and exitcode is None``: it returned ``value``. ``error``: it raised that exception, and
    ``error_traceback`` is its text. ``exitcode``: the process ended (negative: by that signal). ``hung``: it was killed
    at the deadline.
    """

    rank: int
    value: Any = None
    error: BaseException | None = None
    error_traceback: str = ""
    exitcode: int | None = None
    hung: bool = False

    @property
    def ok(self) -> bool:
        return self.error is None and self.exitcode is None and not self.hung

    def describe(self) -> str:
        """One line: returned, raised what, died of which signal."""
        if self.ok:
            return f"rank {self.rank} returned"
        if self.error is not None:
            return f"rank {self.rank} raised {type(self.error).__name__}: {self.error}"
        if self.hung:
            return f"rank {self.rank} was still running at the deadline and was killed"
        return f"rank {self.rank} {_describe_exit(self.exitcode)}"


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"


class RankPool:
    """``world_size`` processes on this host, each with an initialised ``ProcessGroupManager``.

    Args:
        world_size: number of ranks, at least 1.
        backend: as for ``ProcessGroupManager.initialize``: "auto", "shm" or "gloo".
        threads: torch threads per rank.
        group_timeout: default deadline of the group's collectives in seconds; keep it below ``run``'s, so that a stuck
            collective says what it waited for before the pool kills it.
        environment: called with a rank at every start of the pool, gives that rank's further environment variables.
            They are set before torch is loaded, so its processes are started afresh and not forked: seconds more.
        options: further keyword arguments for ``ProcessGroupManager.initialize``, for example ``tp_size``.
    """

    def __init__(
        self,
        world_size: int,
        *,
        backend: str = "auto",
        threads: int = 1,
        group_timeout: float = 30.0,
        environment: Callable[[int], Mapping[str, str]] | None = None,
        **options: Any,
    ):
        if not isinstance(world_size, int) or world_size < 1:
            raise ValueError(f"RankPool: world_size must be an integer >= 1, got {world_size!r}")
        if threads < 1:
            raise ValueError(f"RankPool: threads must be >= 1, got {threads!r}")
        self.world_size = world_size
        self._setup = {
            "world_size": world_size,
            "backend": backend,
            "timeout": group_timeout,
            **options,
        }
        self._threads = threads
        self._environment = environment
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: str | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Call ``fn(group, *args)`` on every rank; returns the results in rank order.

        Args:
            fn: a function at the top level of a file, taking a ``TPGroup`` first.
            args: pickled by value for every rank; tensors may not need gradients' graphs.
            timeout: seconds until all ranks are killed and ``RankFailedError`` names those still running.
        Raises:
            The exception of the rank that failed first, with its ``rank`` attribute set and that rank's traceback as
            its cause; ``RankFailedError`` for a rank that died or hung. The pool starts afresh on its next run.
        """
        outcomes = self._call(fn, args, timeout, stop_at_first_failure=True)
        failed = [outcome for outcome in outcomes if not outcome.ok]
        if failed:
            _raise_first_cause(failed, self.world_size)
        return [outcome.value for outcome in outcomes]

    def run_outcomes(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[RankOutcome]:
        """As ``run``, but waits for every rank and reports how each ended instead of raising."""
        return self._call(fn, args, timeout, stop_at_first_failure=False)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; starts the pool if need be."""
        self._ensure_started()
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the processes: politely, then by SIGKILL. Safe to call twice; a later run starts them again."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._kill()

    # Starting and ending ---------------------------------------------------------------------------------------------

    def _ensure_started(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self._kill()
        if self._environment is None:
            context = multiprocessing.get_context("forkserver")
            # Only has an effect before the server's start; a server without it works too, only slower.
            context.set_forkserver_preload(PRELOAD)
        else:
            context = multiprocessing.get_context("spawn")
        self._folder = tempfile.mkdtemp(prefix="tp_kernels_pool_")
        setup = dict(self._setup, init_method=f"file://{self._folder}/rendezvous")
        with _hidden_main():
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                environment = {} if self._environment is None else dict(self._environment(rank))
                process = context.Process(
                    target=_rank_main,
                    args=(theirs, rank, setup, self._threads, environment),
                    name=f"rank-{rank}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
        outcomes = self._collect(time.monotonic() + _START_TIMEOUT, stop_at_first_failure=True)
        failed = [outcome for outcome in outcomes if not outcome.ok]
        if failed:
            self._kill()
            _raise_first_cause(failed, self.world_size)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(10.0)
            with contextlib.suppress(ValueError):
                process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # One run ---------------------------------------------------------------------------------------------------------

    def _call(self, fn, args, timeout, stop_at_first_failure) -> list[RankOutcome]:
        call = _describe_function(fn)
        if timeout <= 0:
            raise ValueError(f"RankPool.run: timeout must be positive seconds, got {timeout!r}")
        # Arguments are pickled apart from the call: their classes may live in the file that the call names.
        message = pickle.dumps((call, pickle.dumps(args, protocol=5)), protocol=5)
        self._ensure_started()
        deadline = time.monotonic() + timeout
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a rank that died meanwhile is reported by _collect
                connection.send_bytes(message)
        outcomes = []
        try:
            outcomes = self._collect(deadline, stop_at_first_failure)
        finally:
            # Also on KeyboardInterrupt: the ranks' state is then unknown.
            if len(outcomes) != self.world_size or not all(outcome.ok for outcome in outcomes):
                self._kill()
        return outcomes

    def _collect(self, deadline: float, stop_at_first_failure: bool) -> list[RankOutcome]:
        outcomes: dict[int, RankOutcome] = {}
        while len(outcomes) < self.world_size:
            open_ranks = [rank for rank in range(self.world_size) if rank not in outcomes]
            waiting = {self._connections[rank]: rank for rank in open_ranks}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for connection in ready:
                rank = waiting[connection]
                outcomes[rank] = self._receive(rank)
                if stop_at_first_failure and not outcomes[rank].ok:
                    deadline = min(deadline, time.monotonic() + _SETTLE)
            if not ready:
                others_failed = any(not outcome.ok for outcome in outcomes.values())
                if not (stop_at_first_failure and others_failed):
                    outcomes.update({rank: RankOutcome(rank, hung=True) for rank in open_ranks})
                break
        return [outcomes[rank] for rank in sorted(outcomes)]

    def _receive(self, rank: int) -> RankOutcome:
        try:
            kind, payload, text = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(5.0)
            return RankOutcome(rank, exitcode=self._processes[rank].exitcode)
        try:
            content = pickle.loads(payload)
        except Exception as error:
            content, kind = (
                RankFailedError(f"what rank {rank} sent cannot be unpickled here: {error}", (rank,)),
                "error",
            )
        if kind == "error":
            return RankOutcome(rank, error=content, error_traceback=text)
        return RankOutcome(rank, value=content)


def _raise_first_cause(failed: list[RankOutcome], world_size: int) -> None:
    """Raise for the failure that most likely caused the others."""
    from tp_kernels.comm.errors import CommError

    def weight(outcome: RankOutcome) -> int:
        if outcome.exitcode is not None:
            return 0
        if outcome.hung:
            return 2
        return 3 if isinstance(outcome.error, CommError) else 1

    first = min(failed, key=weight)
    if first.error is None:
        dead = [outcome for outcome in failed if weight(outcome) == weight(first)]
        message = f"of {world_size} ranks, " + "; ".join(outcome.describe() for outcome in failed)
        raise RankFailedError(message, tuple(outcome.rank for outcome in dead))
    error = first.error
    with contextlib.suppress(AttributeError):
        error.rank = first.rank
    raise error from _RemoteTraceback(f"in rank {first.rank} of {world_size}:\n{first.error_traceback}")


def _describe_function(fn: Callable[..., Any]) -> tuple[str, str, str]:
    """(module, file, qualified name) of a top-level function; ValueError for anything else."""
    name, module = getattr(fn, "__qualname__", ""), getattr(fn, "__module__", "")
    file = getattr(getattr(fn, "__code__", None), "co_filename", None)
    if file is None or not os.path.isfile(file) or "<" in name:
        raise ValueError(f"RankPool.run: expected a function defined at the top level of a file, got {fn!r}")
    return module, os.path.abspath(file), name


@contextlib.contextmanager
def _hidden_main():
    """Keep multiprocessing from importing the caller's main script (or pytest) into every rank."""
    main = sys.modules.get("__main__")
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        if main is not None:
            sys.modules["__main__"] = main


# In the rank's process -----------------------------------------------------------------------------------------------


def _rank_main(
    connection: Connection, rank: int, setup: dict[str, Any], threads: int, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends the ranks
    # All ranks are on this host; a machine whose name does not resolve must not matter.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    from tp_kernels.comm.process_group import ProcessGroupManager

    torch.set_num_threads(threads)
    manager = None

    def set_up():
        nonlocal manager
        manager = ProcessGroupManager.initialize(rank, **setup)

    _reply(connection, set_up)
    try:
        while manager is not None:
            message = connection.recv_bytes()
            if not message:
                break
            (call, arguments) = pickle.loads(message)
            _reply(connection, lambda: _load(*call)(manager.tp_group, *pickle.loads(arguments)))  # noqa: B023
            sys.stdout.flush()
            sys.stderr.flush()
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone; an orderly shutdown could wait for ranks that are gone too
    finally:
        connection.close()
    if manager is not None:
        manager.shutdown()


def _reply(connection: Connection, call: Callable[[], Any]) -> None:
    """Run ``call`` and send ("value" | "error", pickled content, traceback)."""
    kind, text = "value", ""
    try:
        payload = pickle.dumps(call(), protocol=5)
    except BaseException as error:  # SystemExit and pytest's outcomes (skip, fail) are BaseExceptions
        kind, text = "error", traceback.format_exc()
        try:
            payload = pickle.dumps(error, protocol=5)
            pickle.loads(payload)  # some exceptions pickle but cannot be rebuilt
        except Exception:
            payload = pickle.dumps(RankFailedError(f"{type(error).__name__}: {error}"), protocol=5)
    connection.send_bytes(pickle.dumps((kind, payload, text), protocol=5))


def _load(module_name: str, file: str, qualified_name: str) -> Callable[..., Any]:
    """The function, from its module as imported or from its file."""
    if module_name == "__main__":
        module_name = "__rank_main__"  # so that the script's `if __name__ == "__main__"` does not run
    module = sys.modules.get(module_name)
    if module is None or _file_of(module) != file:
        module = _import(module_name, file)
    target: Any = module
    for part in qualified_name.split("."):
        target = getattr(target, part)
    return target


def _import(name: str, file: str) -> types.ModuleType:
    spec = None
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and os.path.abspath(spec.origin) == file:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    # Under the caller's name, so that classes of that file pickle the same way on both sides.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _file_of(module: types.ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return None if file is None else os.path.abspath(file)


def _die_with_parent() -> None:
    """Have the kernel kill this process when the fork server ends, which in turn ends with the pool's owner."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1 and multiprocessing.parent_process() is not None:
        parent = multiprocessing.parent_process()
        if not parent.is_alive():
            os._exit(1)
