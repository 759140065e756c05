"""RankPool: results in rank order, failures named, nothing left behind. Tier: CPU ranks."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from tp_kernels.testing.rank_pool import RankFailedError, RankPool


@dataclass
class Pair:
    rank: int
    tensor: torch.Tensor


def identify(group, offset):
    return group.rank, group.world_size, group.rank + offset, torch.get_num_threads()


def double(group, pair):
    return Pair(group.rank, pair.tensor * 2)


def reduced(group):
    return group.all_reduce(torch.tensor([float(group.rank + 1)])).item()


def fail_on(group, rank):
    if group.rank == rank:
        raise KeyError("a message of its own")
    group.barrier()


def unpicklable_error(group):
    class LocalError(Exception):
        pass

    raise LocalError("cannot travel")


def kill_self(group, rank):
    if group.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()


def hang_on(group, rank):
    if group.rank == rank:
        time.sleep(600)


def test_results_come_in_rank_order_and_processes_stay(rank_pool):
    pool = rank_pool(3)
    assert pool.run(identify, 10) == [(0, 3, 10, 1), (1, 3, 11, 1), (2, 3, 12, 1)]
    pids = pool.pids
    assert pool.run(reduced) == [6.0] * 3
    assert pool.pids == pids


def test_classes_of_the_test_file_and_tensors_travel(rank_pool):
    before = set(os.listdir("/dev/shm"))
    results = rank_pool(2).run(double, Pair(0, torch.arange(100_000.0)))
    assert [r.rank for r in results] == [0, 1]
    assert all(torch.equal(r.tensor, torch.arange(100_000.0) * 2) for r in results)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch_")]


def test_world_of_one_has_no_torch_distributed(rank_pool):
    assert rank_pool(1).run(_is_initialized) == [False]


def _is_initialized(group):
    return torch.distributed.is_initialized()


def test_exception_is_raised_again_with_rank_and_traceback():
    with RankPool(3) as pool:
        with pytest.raises(KeyError, match="a message of its own") as caught:
            pool.run(fail_on, 1)
        assert caught.value.rank == 1
        assert "in fail_on" in str(caught.value.__cause__)
        assert pool.run(reduced) == [6.0] * 3  # started afresh


def test_exception_that_cannot_be_pickled_is_described():
    with RankPool(1) as pool, pytest.raises(RankFailedError, match="LocalError: cannot travel"):
        pool.run(unpicklable_error)


def test_killed_rank_is_named_with_its_signal():
    with RankPool(3) as pool:
        with pytest.raises(RankFailedError, match="rank 2 was killed by SIGKILL") as caught:
            pool.run(kill_self, 2)
        assert caught.value.ranks == (2,)


def test_outcomes_of_the_survivors_are_reported():
    with RankPool(3) as pool:
        outcomes = pool.run_outcomes(kill_self, 0)
    assert outcomes[0].exitcode == -signal.SIGKILL
    for outcome in outcomes[1:]:
        assert type(outcome.error).__name__ == "PeerDiedError"
        assert outcome.error.ranks == (0,)


def test_hang_is_ended_at_the_deadline():
    pool = RankPool(2)
    pids = pool.pids
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 was still running at the deadline") as caught:
        pool.run(hang_on, 1, timeout=0.5)
    assert caught.value.ranks == (1,)
    assert time.monotonic() - start < 20
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    pool.close()


def test_ranks_die_with_the_process_that_started_them(tmp_path):
    code = (
        "import time\n"
        "from tp_kernels.testing.rank_pool import RankPool\n"
        "pool = RankPool(2)\n"  # no __main__ guard: the ranks must not run this script
        "print(*pool.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # what a killed owner cannot remove
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    finally:
        owner.kill()
        owner.communicate()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived their pool's owner"
        time.sleep(0.05)


def test_bad_arguments():
    with pytest.raises(ValueError, match="world_size"):
        RankPool(0)
    with pytest.raises(ValueError, match="threads"):
        RankPool(1, threads=0)
    with pytest.raises(ValueError, match="top level"):
        RankPool(1).run(lambda group: None)
    with pytest.raises(ValueError, match="timeout"):
        RankPool(1).run(identify, 1, timeout=0)
