"""Ranks as own processes around a bare ``SharedMemoryCommunicator``, for tests that kill, stop or confuse them.

A ``RankPool`` keeps its ranks for the next test; these are made for one and reaped at its end, whatever became of them.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time

import torch

from tp_kernels.comm.errors import CommAbortedError, CommError, CommTimeoutError
from tp_kernels.comm.shm import SharedMemoryCommunicator, SharedMemoryUnavailable

__all__ = ["Ranks", "report_error"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "tp_kernels.comm.shm"])


def report_error(comm, call):
    """Run ``call``; what it raised, as plain data, and how the next call ends."""
    try:
        value = call()
        return {"type": None, "value": value}
    except (CommError, KeyboardInterrupt) as error:
        raised = error
    result = {"type": type(raised).__name__, "text": str(raised), "at": time.time()}
    for name in ("group", "operation", "sequence", "ranks"):
        result[name] = getattr(raised, name, None)
    try:
        comm.barrier(timeout=5)
    except CommAbortedError as error:
        result["next"] = str(error)
    return result


def _rank_main(body, rank, world_size, path, connection, options):
    import torch.distributed as dist

    torch.set_num_threads(1)
    options = dict(options)
    ready = options.pop("announce", True)
    try:
        comm = SharedMemoryCommunicator.create(rank, world_size, "tp", dist.FileStore(path, world_size), **options)
        if ready:
            connection.send("ready")
        connection.send(body(comm, connection))
    except SharedMemoryUnavailable as error:
        connection.send({"type": "SharedMemoryUnavailable", "text": error.reason})
    except CommTimeoutError as error:
        connection.send({"type": "CommTimeoutError", "text": str(error), "ranks": error.ranks})


class Ranks:
    """Processes that each run ``body(comm, connection)``; killed and reaped at the end.

    Args:
        body: top-level function of a test module; what it returns is sent to the parent.
        world_size: ranks of the group.
        ranks: those to start, None for all.
        options: for ``SharedMemoryCommunicator.create``; ``announce=False`` leaves out the message "ready".
    """

    def __init__(self, body, world_size, ranks=None, **options):
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.connections = {}, {}
        options.setdefault("timeout", 30.0)
        for rank in range(world_size) if ranks is None else ranks:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_rank_main,
                args=(body, rank, world_size, os.path.join(self.folder.name, "store"), theirs, options),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes[rank], self.connections[rank] = process, ours

    def get(self, rank, timeout=30):
        """What ``rank`` sends next; an AssertionError if it says nothing for ``timeout`` seconds."""
        if not self.connections[rank].poll(timeout):
            raise AssertionError(f"rank {rank} said nothing for {timeout} s")
        return self.connections[rank].recv()

    def ready(self):
        """Return once every rank's communicator exists."""
        for rank in self.processes:
            message = self.get(rank)
            if message != "ready":
                raise AssertionError(f"rank {rank} could not start: {message}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join()
        self.folder.cleanup()
