"""The environment validation suite: a report of what is here, and checks that run what the package does.

Only the standard library is imported at module level, and every probe is guarded: a broken driver or package becomes a
line of the report, never its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["CheckResult", "Report", "Skip", "environment", "main", "mapped_libraries", "report_progress", "run_check"]


# What a check is at, for who watches; set while checks run.
_show: Callable[[str], object] | None = None


class Skip(Exception):
    """Raised by a check that cannot run here; the text is the reason."""


@dataclass(frozen=True)
class CheckResult:
    """One check.

    Attributes:
        name: what was checked.
        status: ``"passed"``, ``"failed"`` or ``"skipped"``.
        detail: figures, the error, or why it was skipped.
        seconds: how long it took.
    """

    name: str
    status: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """Everything the doctor found; ``ok`` is False when a check failed."""

    environment: dict[str, dict[str, Any]]
    checks: list[CheckResult]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The object that ``tp-kernels doctor --json`` prints."""
        return {"ok": self.ok, "environment": self.environment, "checks": [asdict(check) for check in self.checks]}


def run_check(name: str, check: Callable[[], str]) -> CheckResult:
    """Run one check: it returns its detail, raises ``Skip``, or fails with any other exception."""
    started = time.monotonic()
    try:
        status, detail = "passed", check()
    except Skip as reason:
        status, detail = "skipped", str(reason)
    except Exception as error:
        # Multi-rank errors carry whole tracebacks; the first and last lines say what and where.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = lines[0] if len(lines) < 2 else f"{lines[0]} ... {lines[-1]}"
        status, detail = "failed", f"{type(error).__name__}: {text}" if lines else type(error).__name__
    return CheckResult(name, status, detail, round(time.monotonic() - started, 3))


def report_progress(text: str) -> None:
    """Say what a check is at, in a few words, if anybody watches."""
    if _show is not None:
        _show(text)


# --- the report -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, dict[str, Any]]:
    """Sections of the report; a probe that fails leaves its error's text as the value."""
    sections: dict[str, dict[str, Callable[[], Any]]] = {
        "versions": {
            "tp_kernels": _own_version,
            "python": lambda: f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform,
            **{name: (lambda name=name: _version_of(name)) for name in ("torch", "triton", "numpy", "safetensors")},
            **{name: (lambda name=name: _version_of(name)) for name in ("tokenizers", "gguf", "transformers")},
            "torch built for": _torch_build,
        },
        "native core": {
            "file": lambda: _native().native.__file__,
            "compiler": lambda: _native().build_info()["compiler"],
            "CUDA": lambda: _native().build_info()["cuda"],
        },
        "NCCL": {
            "wheel": _nccl_wheel,
            "torch's": _torch_nccl,
            "TP_KERNELS_NCCL_PATH": lambda: os.environ.get("TP_KERNELS_NCCL_PATH", "not set"),
            "copies in this process": _nccl_copies,
        },
        "host": {
            "CPU": _cpu,
            "cores usable": _cores,
            "memory": _memory,
            "/dev/shm": _shared_memory,
            "thread variables": _thread_variables,
        },
        "GPU": {
            "driver": _cuda_driver,
            "devices": _gpus,
            "peer access": _peer_access,
            "peer memory": _peer_verdicts,
            "ranks on one GPU": _ranks_on_one_gpu,
        },
    }
    return {section: {name: _probe(probe) for name, probe in probes.items()} for section, probes in sections.items()}


def _probe(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"could not be found out ({type(error).__name__}: {error})"


def _native() -> Any:
    from tp_kernels import _native as native

    return native


def _torch() -> Any:
    import torch

    return torch


def _own_version() -> str:
    from tp_kernels.version import __version__

    return f"{__version__} ({Path(__file__).resolve().parent})"


def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_build() -> str:
    version = _torch().version
    if version.cuda:
        return f"CUDA {version.cuda}"
    return f"ROCm {version.hip}" if getattr(version, "hip", None) else "CPU only"


def _nccl_wheel() -> str:
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if re.fullmatch(r"nvidia-nccl-cu\d+", name):
            return f"{name} {distribution.version}"
    return "not installed"


def _torch_nccl() -> str:
    torch = _torch()
    if not torch.version.cuda:
        return "none (torch is built without CUDA)"
    return ".".join(map(str, torch.cuda.nccl.version()))


def mapped_libraries(stem: str) -> list[str]:
    """Files named ``<stem>*.so*`` that are mapped into this process, each once."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count(" ") >= 5 and "/" in line}
    return sorted({os.path.realpath(p) for p in paths if re.match(rf"{stem}.*\.so", os.path.basename(p))})


def _nccl_copies() -> str:
    _torch()
    found = mapped_libraries("libnccl")
    return "none" if not found else f"{len(found)}: {', '.join(found)}"


def _cpu() -> str:
    from tp_kernels.testing.machine import cpu_model

    return cpu_model()


def _cores() -> str:
    from tp_kernels.launch import usable_cores

    text = f"{usable_cores()} of {os.cpu_count()}"
    # A container's CPU quota does not show in the affinity mask, yet threads beyond it are throttled.
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            text += f", quota {int(quota) / int(period):g}"
    return text


def _memory() -> str:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GiB, {available:.1f} GiB available"


def _shared_memory() -> str:
    usage = shutil.disk_usage("/dev/shm")
    text = f"{usage.total / 2**20:.0f} MiB, {usage.free / 2**20:.0f} MiB free"
    if not os.access("/dev/shm", os.W_OK):
        return text + ", NOT writable: CPU ranks fall back to Gloo"
    # Docker's default is 64 MiB, which is enough for a few groups but not for many.
    return text + (", small: groups that do not fit fall back to Gloo" if usage.free < 64 * 2**20 else "")


def _thread_variables() -> str:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return f"{', '.join(found) or 'none set'}; torch uses {_torch().get_num_threads()} threads"


def _cuda_driver() -> str:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "none (no libcuda.so.1)"
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return "found, but it gives no version"
    supports = (number.value // 1000, number.value % 1000 // 10)
    text = f"supports CUDA {supports[0]}.{supports[1]}"
    built_for = _torch().version.cuda
    if built_for and int(built_for.split(".")[0]) > supports[0]:
        text += f", older than torch's CUDA {built_for}: GPUs will not work"
    return text


def _gpus() -> list[str]:
    cuda = _torch().cuda
    found = []
    for index in range(cuda.device_count()):
        device = cuda.get_device_properties(index)
        found.append(f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB")
    return found


def _peer_access() -> str:
    cuda = _torch().cuda
    count = cuda.device_count()
    if count < 2:
        return f"not applicable with {count} GPUs"
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    missing = [f"{a}->{b}" for a, b in pairs if not cuda.can_device_access_peer(a, b)]
    return "between all GPUs" if not missing else f"missing: {', '.join(missing)}"


def _peer_verdicts() -> str:
    from tp_kernels.comm.peer_verdicts import describe_verdicts

    return describe_verdicts() if _torch().cuda.device_count() else "not applicable with 0 GPUs"


def _ranks_on_one_gpu() -> str:
    from tp_kernels.one_gpu import describe_mps

    return describe_mps()


# --- output ---------------------------------------------------------------------------------------------------------


def main(*, as_json: bool = False, run_checks: bool = True) -> int:
    """Print the report; returns the exit status: 1 when a check failed."""
    if as_json:
        from tp_kernels.commands.common import stdout_reserved

        with stdout_reserved() as out:
            report = Report(environment(), list(_checks() if run_checks else ()))
            print(json.dumps(report.to_dict(), indent=2), file=out, flush=True)
        return 0 if report.ok else 1

    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a log: rich would fold the tables at 80 columns
    found = environment()
    _print_environment(console, found)
    if not run_checks:
        return 0
    results = []
    with console.status("checking ...") as status, _progress_shown(status.update):  # in a terminal only
        results.extend(_checks())
    _print_checks(console, results)
    return 0 if Report(found, results).ok else 1


def _checks() -> Iterator[CheckResult]:
    try:
        from tp_kernels import doctor_checks
    except Exception as error:
        yield CheckResult("import of the checks", "failed", f"{type(error).__name__}: {error}", 0.0)
        return
    for name, check in doctor_checks.all_checks():
        report_progress(name)
        yield run_check(name, check)


@contextlib.contextmanager
def _progress_shown(show: Callable[[str], object]) -> Iterator[None]:
    global _show
    before, _show = _show, lambda text: show(f"checking ... {text}")
    try:
        yield
    finally:
        _show = before


def _print_environment(console: Any, found: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for section, values in found.items():
        table.add_row(Text(section, style="bold"), "")
        for name, value in values.items():
            text = ("; ".join(value) or "none") if isinstance(value, list) else str(value)
            table.add_row(Text(f"  {name}"), Text(text, overflow="fold"))
    console.print(table)


def _print_checks(console: Any, results: list[CheckResult]) -> None:
    from rich.table import Table
    from rich.text import Text

    colours = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
    table = Table("check", "result", "time", "detail", title="checks", title_justify="left", title_style="bold")
    for result in results:
        status = Text(result.status, style=colours[result.status])
        table.add_row(Text(result.name), status, f"{result.seconds:.1f} s", Text(result.detail, overflow="fold"))
    console.print(table)
    console.print(", ".join(f"{sum(r.status == status for r in results)} {status}" for status in colours))
