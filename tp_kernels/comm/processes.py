"""Processes of ranks on this host: which ones can be looked at, and whether they still run."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["is_running", "local_pids", "process_facts", "sharing_domain"]


def process_facts() -> dict[str, Any]:
    """What a rank tells the others for ``local_pids``, JSON-able."""
    return {"domain": sharing_domain(), "pid": os.getpid()}


def local_pids(everyone: Sequence[Mapping[str, Any]], rank: int) -> dict[int, int]:
    """Process ids of the other ranks that ``rank`` can look at, by rank; ``everyone``'s facts are in rank order."""
    domain = everyone[rank]["domain"]
    return {r: facts["pid"] for r, facts in enumerate(everyone) if facts["domain"] == domain and r != rank}


def is_running(pid: int) -> bool:
    """False once the process ended, zombies included."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except FileNotFoundError:
        return False
    except OSError:
        return True


def sharing_domain() -> str:
    """Equal in processes that can share memory and see each other's ids; see ``RankFacts``."""
    parts = []
    for read in (_boot_id, _shm_identity, lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(str(read()))
        except OSError:
            parts.append("?")
    # Without these facts (not Linux) only the host's name is left.
    return "|".join(parts) if "?" not in parts else "|".join([socket.gethostname(), *parts])


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _shm_identity() -> int:
    return os.stat("/dev/shm").st_dev
