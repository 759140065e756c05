"""What the functional check of peer memory found on this machine, kept for the groups that are made later.

``tp-kernels doctor`` runs the check (loads, stores and atomics by kernels, over all ordered pairs) and writes its
verdicts here; the creation of a group reads them. A verdict holds for a pair of GPUs, where they are plugged in, and
the driver: another driver or another slot, and the pair is unknown again.

The file holds ``{"version": 1, "pairs": {"driver|gpu|other": {"verdict": ..., "checked": date}}}``. Versions of this
package share it: each reads ``pairs`` and of those the verdicts that are text, whatever else is there, and keeps what
it does not know when it writes. So a later version may add, but ``verdict`` keeps its meaning; what cannot be said in
it takes another name than ``pairs``.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PASSED", "describe_verdicts", "driver_version", "read_verdicts", "verdict_file", "write_verdicts"]

PASSED = "passed"
VERSION = 1  # of the file


def verdict_file() -> Path:
    """``peer_check.json`` in ``$TP_KERNELS_CACHE_DIR``, or ``~/.cache/tp_kernels``."""
    folder = os.environ.get("TP_KERNELS_CACHE_DIR") or Path.home() / ".cache" / "tp_kernels"
    return Path(folder) / "peer_check.json"


def read_verdicts(driver: str, gpu: str) -> dict[str, str]:
    """Verdicts of the pairs (``gpu``, other) by the other: ``PASSED`` or what went wrong. Never raises.

    Args:
        driver: as ``driver_version`` gives it.
        gpu: ``"<uuid>@<pci address>"``.
    """
    found = {}
    for key, verdict in _verdicts(_read()).items():
        parts = key.split("|")
        if len(parts) == 3 and parts[:2] == [driver, gpu]:
            found[parts[2]] = verdict
    return found


def write_verdicts(driver: str, verdicts: Mapping[tuple[str, str], str]) -> Path:
    """Add the verdicts of pairs (GPU, other GPU) to the file; those of the same pairs are replaced.

    Raises:
        OSError: the file cannot be written.
    """
    path, content = verdict_file(), _read()
    content["version"] = max(VERSION, _version(content))
    pairs = content.setdefault("pairs", {})
    today = datetime.date.today().isoformat()
    for (gpu, other), verdict in verdicts.items():
        pairs["|".join((driver, gpu, other))] = {"verdict": verdict, "checked": today}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a group that is being made must not read half a file.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def describe_verdicts() -> str:
    """One line: what is known of this machine's pairs under its present driver."""
    driver = driver_version()
    known = [verdict for key, verdict in _verdicts(_read()).items() if key.startswith(f"{driver}|")]
    failed = sum(verdict != PASSED for verdict in known)
    if not known:
        return f"no pair was checked with kernels under driver {driver}"
    outcome = f"{failed} of them failed: groups with these leave peer memory alone" if failed else "all passed"
    return f"{len(known)} pairs were checked with kernels, {outcome}"


def driver_version() -> str:
    """Version of the loaded NVIDIA kernel module, "unknown" if it does not say."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"Module.*?\s(\d+\.[\d.]+)", text)
        if found:
            return found.group(1)
    return "unknown"


def _read() -> dict[str, Any]:
    # A file that cannot be read or understood means that nothing is known.
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(verdict_file().read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("pairs", {}), dict):
            return content
    return {}


def _verdicts(content: Mapping[str, Any]) -> dict[str, str]:
    entries = {key: entry.get("verdict") for key, entry in content.get("pairs", {}).items() if isinstance(entry, dict)}
    return {key: verdict for key, verdict in entries.items() if isinstance(verdict, str) and verdict}


def _version(content: Mapping[str, Any]) -> int:
    version = content.get("version")
    return version if isinstance(version, int) else 0
