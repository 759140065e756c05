"""The rank pool for all tests, skips for what this machine cannot run, a check that tests leave nothing behind."""

from __future__ import annotations

import os

import torch

# Triton reads this when a kernel is defined, so it is set before any test module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import time

import pytest

from tp_kernels.testing.rank_pool import PRELOAD, RankPool

# torch.testing.assert_close imports the latter (half a thousand modules) on first use, which every rank would repeat.
PRELOAD.extend(["pytest", "torch.distributed.tensor"])

# The ranks of a pool, and single-process oracles beside them, share few cores; models this small are slower on two
# threads than on one, much slower where the cores are busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rank_pool():
    """``rank_pool(world_size, **options) -> RankPool``: pools kept for the session, one for each set of arguments."""
    pools: dict[tuple, RankPool] = {}

    def get(world_size: int, **options) -> RankPool:
        key = (world_size, *sorted(options.items()))
        if key not in pools:
            pools[key] = RankPool(world_size, **options)
        return pools[key]

    yield get
    for pool in pools.values():
        pool.close()


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every N-th test, from the I-th on")


def pytest_collection_modifyitems(config, items):
    index, count = (int(number) for number in config.getoption("--shard").split("/"))
    if count > 1:
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index])
        items[:] = items[index::count]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


# What a session may not leave behind ---------------------------------------------------------------------------------


def _shared_memory_names() -> set[str]:
    try:
        return {name for name in os.listdir("/dev/shm") if "tpk" in name.lower() or "tp_kernels" in name.lower()}
    except OSError:
        return set()


def _living_descendants() -> list[str]:
    """Command lines of processes below this one that multiprocessing does not end by itself at exit."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(entry)] = int(fields[1])
    found, frontier = [], {os.getpid()}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found.extend(frontier)
    lines = {pid: _command_line(pid) for pid in found if pid not in _helper_pids()}
    # Inductor keeps its compilers for the life of the process, and ends them with it.
    return [f"{pid}: {line}" for pid, line in lines.items() if line and "_inductor/compile_worker" not in line]


def _helper_pids() -> set[int]:
    from multiprocessing import forkserver, resource_tracker

    return {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}


def _command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def pytest_configure(config):
    config._shared_memory_before = _shared_memory_names()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    deadline = time.monotonic() + 5.0
    while (processes := _living_descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    leftovers = sorted(_shared_memory_names() - session.config._shared_memory_before)
    problems = [f"left in /dev/shm: {', '.join(leftovers)}"] if leftovers else []
    problems += [f"left running: {line}" for line in processes]
    if problems:
        session.config.get_terminal_writer().line("\n" + "\n".join(problems), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
