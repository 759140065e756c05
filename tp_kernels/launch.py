"""Start N ranks of a program on this host with torch's elastic launcher, and say in one message why they failed.

Compared with plain ``torchrun --standalone``: the first cause is told apart from what it caused on the other ranks,
nothing is restarted or logged, and ranks cannot outlive the launcher, even one that is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tp_kernels.launch_worker import ERROR_DIR, LAUNCHER_PID
from tp_kernels.one_gpu import SharedGpu

__all__ = ["LaunchError", "RankFailure", "default_threads", "launch", "usable_cores"]

_HANDLED_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")

# Ranks must run the launcher's own tp_kernels. `-m` would look in the working directory first, and there a checkout
# without a build, or another version, hides the installed package.
_PACKAGE_HOME = Path(__file__).resolve().parent.parent
_BOOTSTRAP = """\
import sys
if sys.path[:1] == [""]: del sys.path[0]
sys.path.insert(0, {0!r})
from tp_kernels.launch_worker import main
main()
"""


def usable_cores() -> int:
    """Cores this process may run on (its affinity mask, not the machine's count)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def default_threads(nproc: int) -> int:
    """Threads per rank when ``nproc`` ranks share this host: the cores divided evenly, at least one."""
    return max(1, usable_cores() // nproc)


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended.

    Attributes:
        rank, pid: which process it was.
        exitcode: its exit status; negative is the signal that ended it.
        error: what it recorded before it ended (``type``, ``message``, ``traceback``, ...), or None.
    """

    rank: int
    pid: int
    exitcode: int
    error: Mapping[str, Any] | None = None

    def describe(self) -> str:
        """One line (or the error's own lines) that names the rank and what happened to it."""
        who = f"rank {self.rank} (pid {self.pid})"
        if self.error is not None:
            return f"{who} failed: {self.error['type']}: {self.error['message']}"
        if self.exitcode < 0:
            return f"{who} was killed by {_signal_name(-self.exitcode)}"
        return f"{who} exited with status {self.exitcode}"


class LaunchError(RuntimeError):
    """At least one rank failed; the message tells the root cause once.

    Attributes:
        failures: every rank that did not end well, the root cause first.
    """

    def __init__(self, failures: Sequence[RankFailure], nproc: int):
        self.failures = list(failures)
        self.nproc = nproc
        root = self.failures[0]
        others = "" if nproc == 1 else f"; the other {nproc - 1} rank{'s were' if nproc > 2 else ' was'} ended"
        super().__init__(root.describe() + others)

    @property
    def root(self) -> RankFailure:
        """The failure that came first."""
        return self.failures[0]

    def is_a(self, type_name: str) -> bool:
        """Whether the root cause is an exception whose class, or a base of it, has this name."""
        return self.root.error is not None and type_name in self.root.error["bases"]


def launch(
    nproc: int,
    program: Sequence[str],
    *,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    one_gpu: bool = False,
    gpu: int = 0,
    say: Callable[[str], object] | None = None,
) -> None:
    """Run ``nproc`` ranks of a Python program on this host and wait until all have ended.

    Each rank gets torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, ...). When one fails the others are ended.
    With ``one_gpu`` all ranks see the same single GPU, as ``cuda:0``, share it through a private MPS daemon where the
    machine has MPS, and get what NCCL and SymmetricMemory need for that (see ``tp_kernels.one_gpu``).

    Args:
        nproc: how many ranks.
        program: ``["script.py", args...]`` or ``["-m", "package.module", args...]``.
        threads: OMP_NUM_THREADS of each rank; None keeps one that is already set, else shares the cores evenly.
        env: further environment variables of the ranks.
        one_gpu: put all ranks on one GPU.
        gpu: which one, among the visible ones; only with ``one_gpu``.
        say: told in one line how the ranks share the GPU; None prints it to stderr.
    Raises:
        ValueError: for a bad ``nproc``, ``threads``, ``program`` or ``gpu``.
        LaunchError: when a rank failed.
        KeyboardInterrupt: on Ctrl-C, after every rank has ended.
    """
    if nproc < 1:
        raise ValueError(f"the number of ranks must be at least 1, got {nproc}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads per rank must be at least 1, got {threads}")
    if not program or program == ["-m"]:
        raise ValueError("expected a program to start: a script or `-m module`")
    if program[0] != "-m" and not Path(program[0]).is_file():
        raise ValueError(f"no such script: {program[0]}")
    with contextlib.ExitStack() as stack:
        shared_gpu: Mapping[str, str] = {}
        if one_gpu:
            shared = stack.enter_context(SharedGpu(gpu))
            (say or _print_to_stderr)(shared.describe(nproc))
            shared_gpu = shared.environment(nproc)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tp_kernels_"))
        ranks_env = {
            "OMP_NUM_THREADS": str(threads or os.environ.get("OMP_NUM_THREADS") or default_threads(nproc)),
            LAUNCHER_PID: str(os.getpid()),
            ERROR_DIR: folder,
            # All ranks are on this host; a machine whose name does not resolve must not matter to Gloo.
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            **shared_gpu,
            **(env or {}),
        }
        with _environment(ranks_env), _signal_handlers_restored():
            _run_elastic(nproc, program, Path(folder))


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run_elastic(nproc: int, program: Sequence[str], folder: Path) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_elastic()
    options: dict[str, Any] = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": nproc,
        "run_id": f"tp_kernels_{os.getpid()}",
        "role": "tp_kernels",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "127.0.0.1:0",  # port 0: the launcher takes a free one
        "local_addr": "127.0.0.1",  # otherwise the host's name is looked up, which fails or stalls in some containers
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "logs_specs": DefaultLogsSpecs(log_dir=str(folder / "elastic")),
        "shutdown_timeout": 5,
    }
    known = {field.name for field in fields(LaunchConfig)}  # what this torch does not know is left out
    config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
    # Elastic substitutes ${local_rank} in arguments; a program's own dollar signs must survive that.
    command = [word.replace("$", "$$") for word in ("-c", _BOOTSTRAP.format(str(_PACKAGE_HOME)), *program)]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        failures = [
            RankFailure(rank, failure.pid, failure.exitcode, _recorded_error(folder, rank))
            for rank, failure in error.failures.items()
        ]
        raise LaunchError(rank_failures(failures), nproc) from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + int(error.sigval)) from None


def rank_failures(failures: Sequence[RankFailure]) -> list[RankFailure]:
    """Order failures so that the root cause comes first.

    A rank that died without a word explains the communication errors of the others; an error of the program explains
    them too; SIGTERM is what the launcher itself sends to the rest, so it counts only when nothing else happened. Ties
    keep the order in which the ends were seen, and recorded errors their own clock.
    """

    def weight(failure: RankFailure) -> tuple[int, float]:
        if failure.error is not None:
            return (2 if "CommError" in failure.error["bases"] else 1, failure.error["time"])
        return (3 if failure.exitcode == -signal.SIGTERM else 0, 0.0)

    return sorted(failures, key=weight)


def _recorded_error(folder: Path, rank: int) -> Mapping[str, Any] | None:
    try:
        return json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _silence_elastic() -> None:
    # Its loggers carry their own levels and report every failure three times; ours says it once.
    if os.environ.get("LOGLEVEL"):
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic") or name == "torch.distributed.launcher.api":
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    # The elastic agent gives its ranks a copy of os.environ; it also leaves variables of its own behind.
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    # The elastic agent installs handlers and never removes them.
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in _HANDLED_SIGNALS}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            with contextlib.suppress(ValueError, TypeError):  # not the main thread, or a handler set from C
                signal.signal(getattr(signal, name), handler)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
