"""How the ranks of an NCCL group find out whether they can be connected, and wait until they are.

Whatever goes wrong on one rank is told to all, so that all of them fail alike and may agree on another transport.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from tp_kernels._native import native
from tp_kernels.comm.errors import CommTimeoutError
from tp_kernels.comm.nccl_library import wheel_hint
from tp_kernels.comm.nccl_peers import Peers

__all__ = [
    "BUFFER_BYTES",
    "NCCLUnavailable",
    "check_facts",
    "check_options",
    "cta_overrides",
    "cuda_device",
    "own_facts",
    "poll",
    "raise_failure_of",
    "warn_of_cta_overrides",
]

# Of a registered buffer: a partial sum of 4096 tokens by 8192 features in 16 bits.
BUFFER_BYTES = 64 << 20
# What was warned of: once a process, however many groups it makes.
_warned: set[str] = set()


class NCCLUnavailable(RuntimeError):
    """The group cannot use NCCL; raised on all its ranks alike, ``reason`` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def cta_overrides(max_ctas: int | None, environment: Mapping[str, str]) -> str | None:
    """What to warn of when variables of NCCL's overrule ``max_ctas``, which they do for all communicators; or None."""
    if max_ctas is None:
        return None
    names = ("NCCL_MAX_CTAS", "NCCL_MIN_CTAS", "NCCL_MAX_NCHANNELS", "NCCL_MIN_NCHANNELS")
    found = [f"{name}={environment[name]}" for name in names if environment.get(name)]
    return f"max_ctas={max_ctas} is overruled by {', '.join(found)} in the environment" if found else None


def warn_of_cta_overrides(max_ctas: int | None) -> None:
    """Warn, once, of variables in the environment that overrule ``max_ctas``."""
    override = cta_overrides(max_ctas, os.environ)
    if override and override not in _warned:
        _warned.add(override)
        warnings.warn(f"tp_kernels: {override}", stacklevel=3)


def check_options(
    max_ctas: int | None = None, registered_buffers: bool = False, buffer_bytes: int = BUFFER_BYTES
) -> dict[str, Any]:
    """Those options of ``NCCLCommunicator.create`` that must be equal on all ranks, checked.

    Raises:
        ValueError: names what was expected.
    """
    if max_ctas is not None and (type(max_ctas) is not int or not 1 <= max_ctas <= 64):
        raise ValueError(f"max_ctas must be an integer between 1 and 64, or None, got {max_ctas!r}")
    if not isinstance(registered_buffers, bool):
        raise ValueError(f"registered_buffers must be True or False, got {registered_buffers!r}")
    if type(buffer_bytes) is not int or not 1 <= buffer_bytes <= 1 << 34:
        raise ValueError(f"buffer_bytes must be an integer between 1 and 2**34, got {buffer_bytes!r}")
    return {"max_ctas": max_ctas, "registered_buffers": registered_buffers, "buffer_bytes": buffer_bytes}


def cuda_device(device: torch.device | str | int) -> torch.device:
    """The device with its index; ValueError unless it is a GPU."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        raise ValueError(f"NCCL needs a CUDA device, got {found}")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())


def own_facts(rank: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Version of this rank's NCCL, and on rank 0 the id by which the ranks find each other; or why there is none.

    Args:
        options: JSON-able, to be equal on all ranks.
    """
    facts: dict[str, Any] = {"error": "", "version": 0, "id": "", "options": dict(options)}
    try:
        facts["version"] = native.nccl_load(wheel_hint())[0]
        if rank == 0:
            facts["id"] = native.nccl_unique_id(wheel_hint()).hex()
    except RuntimeError as error:
        facts["error"] = str(error)
    return facts


def check_facts(everyone: Sequence[Mapping[str, Any]]) -> None:
    """NCCLUnavailable, on all ranks alike, if the ranks cannot be connected; ValueError if their options differ."""
    for name, value in everyone[0]["options"].items():
        values = [facts["options"][name] for facts in everyone]
        if any(theirs != value for theirs in values):
            listing = ", ".join(f"rank {rank}: {theirs!r}" for rank, theirs in enumerate(values))
            raise ValueError(f"all ranks must create the communicator with the same {name}, got {listing}")
    errors = [f"rank {rank}: {facts['error']}" for rank, facts in enumerate(everyone) if facts["error"]]
    if errors:
        raise NCCLUnavailable("; ".join(errors))
    versions = [native.nccl_version_text(facts["version"]) for facts in everyone]
    if len({version.rpartition(".")[0] for version in versions}) > 1:
        listing = ", ".join(f"rank {rank}: {version}" for rank, version in enumerate(versions))
        raise NCCLUnavailable(f"the ranks have different versions of NCCL: {listing}")


def poll(done: Callable[[], bool], peers: Peers | None, deadline: float, name: str) -> None:
    """Wait until ``done()``; Ctrl-C, another rank's failure and the deadline (monotonic seconds) end the wait."""
    pause, asked = 0.00002, time.monotonic()
    while not done():
        now = time.monotonic()
        if peers is not None and now - asked > 0.1:
            asked = now
            failed = peers.reported("created")
            if failed:
                raise_failure_of(*failed, name)
        if now > deadline:
            raise CommTimeoutError(
                f"group {name}: connecting through NCCL took too long", group=name, operation="create"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.001)


def raise_failure_of(rank: int, message: str, late: bool, name: str) -> NoReturn:
    """Raise what ``Peers.agree`` or ``reported`` told of a rank: CommTimeoutError if it was ``late``."""
    text = f"group {name}: NCCL failed on rank {rank}: {message}"
    if late:
        raise CommTimeoutError(text, group=name, operation="create", ranks=(rank,))
    raise NCCLUnavailable(text)
