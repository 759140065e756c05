"""What ``tp_kernels.launch`` starts as each rank, with ``(-m module | script) args...`` in ``sys.argv[1:]``.

It ties the rank's life to the launcher's, runs the program, and leaves an error as a file instead of printing it: the
launcher prints the one that matters, once. Only the standard library is imported before the program starts.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback

from tp_kernels.one_gpu import rank_environment

__all__ = ["ERROR_DIR", "LAUNCHER_PID", "bind_to_launcher", "main", "record_error"]

# Environment variables that the launcher sets for its ranks.
ERROR_DIR = "TP_KERNELS_ERROR_DIR"
LAUNCHER_PID = "TP_KERNELS_LAUNCHER_PID"

_PR_SET_PDEATHSIG = 1


def bind_to_launcher(launcher: int) -> None:
    """Make the kernel kill this process when the process ``launcher``, its parent, ends for any reason (Linux)."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return  # not Linux: the launcher still ends its ranks when it can
    # The launcher may have died before the line above took effect; then no signal will come.
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def record_error(error: BaseException) -> None:
    """Write ``error`` to this rank's file in ``$TP_KERNELS_ERROR_DIR``; whole or not at all."""
    folder = os.environ.get(ERROR_DIR)
    if not folder:
        return
    rank = int(os.environ.get("RANK", "0"))
    record = {
        "rank": rank,
        "pid": os.getpid(),
        "time": time.time(),
        "type": type(error).__name__,
        "bases": [base.__name__ for base in type(error).__mro__],
        "message": str(error),
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }
    path = os.path.join(folder, f"rank{rank}.json")
    try:
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(record, file)
        os.replace(path + ".part", path)
    except OSError:
        traceback.print_exception(type(error), error, error.__traceback__)


def main() -> None:
    """Run the program named in ``sys.argv[1:]`` as ``__main__``; exit status 1 if it raised."""
    bind_to_launcher(int(os.environ[LAUNCHER_PID]))
    # The elastic agent gives all ranks one environment; what differs between them is set here, before torch is loaded.
    os.environ.update(rank_environment(int(os.environ["RANK"])))
    program = sys.argv[1:]
    # The launcher put the folder of this package first, to start from here; a program's own modules come before it.
    home = sys.path.pop(0)
    if home not in sys.path:
        sys.path.append(home)
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            sys.path.insert(0, os.getcwd())  # as `python -m` does
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path.insert(0, os.path.dirname(os.path.abspath(program[0])))
            runpy.run_path(program[0], run_name="__main__")
    except Exception as error:
        record_error(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: destructors of a broken process group may wait for ranks that are already gone.
        os._exit(1)
