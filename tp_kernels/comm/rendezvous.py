"""How ranks find each other: a torch Store from a URL or torchrun's environment, and exchanges over it with a deadline.

A torch rendezvous that lacks a rank ends in "Connection refused" or a bare timeout. Here every rank announces itself by
a key, so the error names the ranks that never came.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlparse

import torch.distributed as dist

from tp_kernels.comm.errors import CommTimeoutError

__all__ = ["confirm", "exchange", "open_store"]

# A TCP store lives as long as the process: a rank that re-initialises early must not find its host between two servers.
_tcp_stores: dict[tuple[str, int], Any] = {}
# Keys of an earlier initialisation over the same URL may still be in the store, so each one gets its own prefix.
_incarnations: dict[str, int] = {}


def open_store(init_method: str | None, rank: int, world_size: int, timeout: float) -> tuple[Any, str]:
    """Connect to the rendezvous.

    Args:
        init_method: "env://" (MASTER_ADDR and MASTER_PORT), "tcp://host:port" (rank 0 listens), "file:///path".
        timeout: seconds to wait for the host of a TCP store.
    Returns:
        (store with a prefix of this initialisation, URL). Call ``confirm(url)`` once all ranks have met.
    Raises:
        ValueError: for a URL or an environment that lacks something. CommTimeoutError: rank 0's store did not answer.
    """
    url = init_method or "env://"
    parsed = urlparse(url)
    if parsed.scheme == "env":
        host, port = _environment_address()
        url = f"tcp://{host}:{port}"
    elif parsed.scheme == "tcp":
        if parsed.hostname is None or parsed.port is None:
            raise ValueError(f"init_method: expected tcp://host:port, got {url!r}")
        host, port = parsed.hostname, parsed.port
    elif parsed.scheme == "file":
        path = unquote(parsed.netloc + parsed.path)
        if not os.path.isdir(os.path.dirname(path)) or os.path.isdir(path):
            raise ValueError(f"init_method: expected file:///existing/folder/new_file, got {url!r}")
        store = dist.FileStore(path, world_size)
        store.set_timeout(timedelta(seconds=timeout))
        return _with_prefix(store, url), url
    else:
        raise ValueError(f"init_method: expected env://, tcp://host:port or file:///path, got {url!r}")
    return _with_prefix(_tcp_store(host, port, rank, timeout), url), url


def confirm(url: str) -> None:
    """All ranks have met over ``url``: the next initialisation over it uses other keys."""
    _incarnations[url] = _incarnations.get(url, 0) + 1


def exchange(
    store: Any, rank: int, world_size: int, payload: dict[str, Any], timeout: float, *, group: str, what: str
) -> list[dict[str, Any]]:
    """Every rank gives a JSON-able dict and gets all of them in rank order.

    Raises:
        CommTimeoutError: with ``ranks`` set to those that had not come within ``timeout`` seconds.
    """
    keys = [f"{what}/{r}" for r in range(world_size)]
    deadline = time.monotonic() + timeout
    pause = 0.0002
    missing = None
    try:
        store.set(keys[rank], json.dumps(payload))
        # Polled: a wait in the store's C++ code would not notice Ctrl-C.
        while not store.check(keys):
            if time.monotonic() > deadline:
                missing = [r for r, key in enumerate(keys) if not store.check([key])]
                break
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        if not missing:
            return [json.loads(store.get(key)) for key in keys]
    except RuntimeError as error:  # torch's DistStoreError and DistNetworkError among them
        raise CommTimeoutError(
            f"group {group}: {what} failed on rank {rank} of {world_size}, because the store (usually rank 0's) does "
            f"not answer: {error}",
            group=group,
            operation=what,
            ranks=(0,),
        ) from error
    raise CommTimeoutError(
        f"group {group}: {what} waited {timeout:g} s on rank {rank} of {world_size}; never arrived: ranks {missing}",
        group=group,
        operation=what,
        ranks=missing,
    )


def _with_prefix(store: Any, url: str) -> Any:
    # torchrun restarts a failed job over the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"tp_kernels/{attempt}/{_incarnations.get(url, 0)}", store)


def _environment_address() -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        raise ValueError(
            f"init_method env:// needs {' and '.join(absent)} in the environment; start the program with torchrun, or "
            "pass rank=, world_size= and init_method="
        )
    if not port.isdigit():
        raise ValueError(f"MASTER_PORT must be a port number, got {port!r}")
    return address, int(port)


def _tcp_store(host: str, port: int, rank: int, timeout: float) -> Any:
    store = _tcp_stores.get((host, port))
    if store is None:
        is_host = rank == 0 and not _agent_serves(host, port)
        start = time.monotonic()
        try:
            store = dist.TCPStore(
                host,
                port,
                None,
                is_host,
                timedelta(seconds=max(timeout, 1.0)),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            waited = time.monotonic() - start
            role = "could not listen" if is_host else "rank 0, which hosts it, did not answer"
            raise CommTimeoutError(
                f"rendezvous at {host}:{port}, waited {waited:.1f} s on rank {rank}: {role} ({error})",
                group="world",
                operation="rendezvous",
                ranks=() if is_host else (0,),
            ) from error
        _tcp_stores[host, port] = store
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _agent_serves(host: str, port: int) -> bool:
    """Whether torchrun's agent hosts the store at this address, so that rank 0 must not."""
    address = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and address == (host, str(port))
