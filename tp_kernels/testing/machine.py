"""Names the machine that a figure came from: CPU, cores, GPU, versions, date. ``python -m`` prints a folder name."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re

__all__ = ["cpu_model", "machine_record", "machine_slug"]


def cpu_model() -> str:
    """Model name of the CPU, from /proc/cpuinfo where there is one."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def machine_record() -> dict[str, str]:
    """Columns that every CSV row carries: date, cpu, cores, gpu, python, torch, tp_kernels, platform."""
    versions = {name: importlib.metadata.version(name) for name in ("torch",)}
    from tp_kernels.version import __version__

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": str(cpu_count()),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "torch": versions["torch"],
        "tp_kernels": __version__,
        "platform": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
    }


def machine_slug() -> str:
    """Folder name for results: the GPU if there is one, else CPU model and cores, for example ``amd-epyc-2-cores``."""
    name = _gpu() or f"{cpu_model()} {cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    print(machine_slug())
