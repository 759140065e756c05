"""A private CUDA MPS daemon for ranks that share a GPU, which ends whatever happens to the process that wanted it.

    with MpsDaemon(device="0") as mps:
        if mps.running:                    # else mps.reason says why not
            start_ranks(env={**os.environ, **mps.environment})

A keeper process, in a session of its own, starts the daemon (``nvidia-cuda-mps-control -d``) in a new 0700 folder and
holds a pipe from the owner. The pipe ends with the owner, however that ends (SIGKILL too); the keeper then tells the
daemon to ``quit``, kills what stays, and removes the folder. No setting of the card is read or changed.

Standard library only, and no other module of the package: the keeper is this file, run by its path.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CONTROL", "MpsDaemon", "find_control", "sms_seen_by_a_client"]

CONTROL = "nvidia-cuda-mps-control"
_DEFAULT_PIPE_DIRECTORY = "/tmp/nvidia-mps"  # where clients look when CUDA_MPS_PIPE_DIRECTORY is not set
_PROCESS_NAME = "nvidia-cuda-mps"  # of daemon and server in /proc, where names are cut at 15 characters
_UNIX_SOCKET_PATH = 107  # longest; the daemon's sockets lie in the folder


def find_control() -> tuple[str | None, str]:
    """(path of the control program, "") or (None, why MPS is not to be used)."""
    if os.environ.get("TP_KERNELS_MPS") == "0":
        return None, "TP_KERNELS_MPS=0"
    path = shutil.which(CONTROL)
    return (path, "") if path else (None, f"{CONTROL} is not on PATH")


class MpsDaemon:
    """An MPS daemon for this process's children: one of its own, or the user's that already runs.

    Never raises because of MPS: without it ranks take turns on the GPU, which is slow and right.

    Args:
        device: CUDA_VISIBLE_DEVICES of the daemon: the one GPU (index or UUID) its server makes a context on.
        start_timeout: seconds the daemon has to start and to answer.
        end_timeout: seconds it has to obey ``quit``, before it is killed.
    Attributes:
        running: whether ranks with ``environment`` are MPS clients.
        own: whether the daemon is a private one, which ends with this object.
        reason: why ``running`` is False.
        environment: what ranks need in theirs.
    """

    def __init__(self, device: str = "0", *, start_timeout: float = 20.0, end_timeout: float = 5.0):
        self._device, self._start_timeout, self._end_timeout = device, start_timeout, end_timeout
        self._keeper: subprocess.Popen | None = None
        self._folder: Path | None = None
        self.running, self.own, self.reason = False, False, "not started"
        self.environment: dict[str, str] = {}

    def start(self) -> MpsDaemon:
        """Use the user's daemon if one answers, else start one; ``running`` and ``reason`` tell how that went."""
        control, self.reason = find_control()
        if control is None:
            return self
        theirs = os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or _DEFAULT_PIPE_DIRECTORY
        if os.path.isdir(theirs) and _ask(control, "get_server_list", os.environ, 5.0) is not None:
            self.running, self.reason = True, ""
            self.environment = {"CUDA_MPS_PIPE_DIRECTORY": theirs}
            return self
        self._folder = _new_folder()
        order = {
            "owner": os.getpid(),
            "control": control,
            "folder": str(self._folder),
            "start_timeout": self._start_timeout,
            "end_timeout": self._end_timeout,
        }
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__), json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C goes to the terminal's whole process group: it must not reach the keeper or the daemon.
                start_new_session=True,
                cwd="/",
                env={**os.environ, "CUDA_VISIBLE_DEVICES": self._device},
            )
            answer = self._answer(self._start_timeout * 2 + self._end_timeout + 10)
        except OSError as error:
            answer = f"its keeper could not be started: {error}"
        except BaseException:
            self.close()
            raise
        if answer:
            self.refuse(answer)
        else:
            self.running, self.own, self.reason = True, True, ""
            self.environment = _directories(self._folder)
        return self

    def _answer(self, seconds: float) -> str:
        """What the keeper reports: "" when the daemon runs, else why it does not."""
        deadline, text = time.monotonic() + seconds, b""
        pipe = select.poll()
        pipe.register(self._keeper.stdout, select.POLLIN)
        while not text.endswith(b"\n"):
            ready = pipe.poll(max(0.0, deadline - time.monotonic()) * 1000)
            chunk = os.read(self._keeper.stdout.fileno(), 4096) if ready else b""
            if not chunk:
                return "its keeper " + ("ended at its start" if ready else f"said nothing within {seconds:g} s")
            text += chunk
        return json.loads(text)

    def refuse(self, reason: str) -> None:
        """Do without MPS after all: end an own daemon and say why from now on."""
        self.close()
        self.reason = reason

    def close(self) -> None:
        """End the daemon if it is an own one, and remove its folder. Safe to call twice."""
        keeper, folder = self._keeper, self._folder
        self._keeper, self._folder = None, None
        self.running, self.own, self.reason, self.environment = False, False, "it was ended", {}
        if keeper is None:
            return
        try:
            keeper.stdin.close()
            keeper.wait(self._end_timeout * 2 + self._start_timeout + 10)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
        finally:
            keeper.stdout.close()
        if folder.exists():  # someone killed the keeper
            _end_daemon(folder, shutil.which(CONTROL), self._end_timeout)

    def __enter__(self) -> MpsDaemon:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()


def _new_folder() -> Path:
    name = f"tp_kernels_mps_{os.getpid()}_{secrets.token_hex(4)}"
    folder = Path(tempfile.gettempdir()) / name
    return folder if len(str(folder / "pipe" / "control_privileged")) <= _UNIX_SOCKET_PATH else Path("/tmp") / name


def _directories(folder: Path) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}


def _ask(control: str, command: str, environment: Mapping[str, str], seconds: float) -> str | None:
    """The daemon's answer to a command; None when there is no daemon or it does not answer in time."""
    try:
        done = subprocess.run(
            [control],
            input=command + "\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=environment,
            timeout=max(0.1, seconds),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _end_daemon(folder: Path, control: str | None, seconds: float) -> None:
    """End the daemon that lives in ``folder``, and its server: ``quit``, then SIGTERM, then SIGKILL; remove the folder.

    ``quit`` waits for clients, which are about to be dead here: whatever it has not done after ``seconds`` is done by
    force.
    """
    deadline, listening = time.monotonic() + seconds, False
    with contextlib.suppress(OSError):
        listening = any((folder / "pipe").iterdir())
    if control is not None and listening:
        _ask(control, "quit", {**os.environ, **_directories(folder)}, seconds)
    for sent, until in ((None, deadline), (signal.SIGTERM, deadline + 1), (signal.SIGKILL, deadline + 3)):
        for pid in _processes_of(folder) if sent is not None else ():
            with contextlib.suppress(OSError):
                os.kill(pid, sent)
        while _processes_of(folder) and time.monotonic() < until:
            time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: Path) -> set[int]:
    """The MPS processes that belong to ``folder``, by what /proc says of each: the daemon and its servers.

    Not by the daemon's pid file alone: that goes first when the daemon ends, and a pid can become someone else's.
    """
    wanted = os.fsencode(f"CUDA_MPS_PIPE_DIRECTORY={folder / 'pipe'}")
    try:
        daemon = (folder / "pipe" / f"{CONTROL}.pid").read_text().strip()
    except (OSError, ValueError):
        daemon = ""
    found, parents = set(), {}
    for entry in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                head, _, rest = file.read().rpartition(b")")
            state, parent = rest.split()[:2]
            if _PROCESS_NAME.encode() not in head or state in b"ZX":
                continue
            parents[int(entry)] = int(parent)
            with open(f"/proc/{entry}/environ", "rb") as file:
                if entry == daemon or wanted in file.read().split(b"\0"):
                    found.add(int(entry))
        except OSError:  # it has ended, or it is another user's
            continue
    return found | {pid for pid, parent in parents.items() if parent in found}


# The keeper ----------------------------------------------------------------------------------------------------------


def _keep(order: Mapping[str, Any]) -> None:
    # A handler that does nothing, and not SIG_IGN: that one would be passed on to the daemon.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        signal.signal(getattr(signal, name), lambda *_: None)
    folder, control = Path(order["folder"]), order["control"]
    try:
        reason = _start_daemon(folder, control, order["start_timeout"])
        with contextlib.suppress(OSError):  # the owner may be gone by now; the pipe below says so
            os.write(1, json.dumps(reason).encode() + b"\n")
        # The owner's end of the pipe may have been inherited by a process that it forked, so its life is asked as well.
        while not select.select([0], [], [], 0.5)[0] and os.getppid() == order["owner"]:
            pass
    finally:
        _end_daemon(folder, control, order["end_timeout"])


def _start_daemon(folder: Path, control: str, seconds: float) -> str:
    environment = {**os.environ, **_directories(folder)}
    deadline = time.monotonic() + seconds
    try:
        for path in (folder, folder / "pipe", folder / "log"):
            path.mkdir(mode=0o700)
        # Into a file: a daemon that kept a pipe open would look like a start that does not end.
        with open(folder / "log" / "start", "w+", encoding="utf-8", errors="replace") as output:
            try:
                status = subprocess.run(
                    [control, "-d"],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    timeout=seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                return f"`{CONTROL} -d` did not end within {seconds:g} s"
            output.seek(0)
            said = " ".join(output.read().split())[-300:]
    except OSError as error:
        return f"it could not be started: {error}"
    if status != 0:
        return f"`{CONTROL} -d` ended with status {status}: {said or 'no message'}"
    # It has gone to the background, which does not mean that it listens.
    while _ask(control, "get_server_list", environment, deadline - time.monotonic()) is None:
        if time.monotonic() >= deadline:
            return f"the daemon gave no answer within {seconds:g} s"
        time.sleep(0.1)
    return ""


# A client that looks at its GPU --------------------------------------------------------------------------------------

_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


def sms_seen_by_a_client(environment: Mapping[str, str], seconds: float = 60.0) -> int | str | None:
    """SMs that a process with this environment is given once it has a CUDA context on its first device.

    Returns:
        The number; the error as text when it gets no context; None when there is no CUDA driver to ask.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", os.path.abspath(__file__)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"a client got no CUDA context within {seconds:g} s"
    except OSError as error:
        return str(error)
    return json.loads(done.stdout) if done.returncode == 0 else f"a client ended with status {done.returncode}"


def _look() -> int | str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, count, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
        ("cuDeviceGetAttribute", (ctypes.byref(count), _MULTIPROCESSOR_COUNT, device)),
    ):
        error = getattr(driver, name)(*arguments)
        if error != 0:
            return f"{name} gives CUDA error {error}"
    return count.value


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _keep(json.loads(sys.argv[1]))
    else:
        print(json.dumps(_look()))
