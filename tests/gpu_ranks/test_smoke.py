"""What every test of this folder stands on: ranks share the GPU, reach each other's memory, and NCCL takes them.

Tier: ranks on one GPU.
"""

import subprocess
import sys

import pytest
import torch

from tp_kernels import one_gpu

pytestmark = pytest.mark.gpu
WORLDS = [2, 4]


def _describe(group):
    torch.zeros(1, device="cuda")
    return {
        "devices": torch.cuda.device_count(),
        "name": torch.cuda.get_device_name(),
        "sms": one_gpu.sm_share(),
        "device": str(one_gpu.local_device()),
        "ranks": one_gpu.ranks_on_this_gpu(),
        "mps": one_gpu.has_mps(),
    }


def _gloo_sum(group):
    x = torch.full((1000,), float(group.rank + 1))
    torch.distributed.all_reduce(x, group=group.process_group)
    return x.unique().tolist()


def _symmetric_memory(group):
    import torch.distributed._symmetric_memory as symm_mem

    n = 1000
    mine = symm_mem.empty(n, dtype=torch.float32, device=one_gpu.local_device())
    handle = symm_mem.rendezvous(mine, group.process_group.group_name)
    mine.fill_(float(group.rank + 1))
    torch.cuda.synchronize()
    torch.distributed.barrier(group.process_group)
    seen = [handle.get_buffer(peer, (n,), torch.float32).unique().tolist() for peer in range(group.world_size)]
    torch.distributed.barrier(group.process_group)  # all have read before anyone's buffer changes
    total = torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", group.process_group.group_name)
    total = total.unique().tolist()
    torch.distributed.barrier(group.process_group)
    return seen, total, handle.multicast_ptr


def _nccl_sum(group):
    ranks = list(range(group.world_size))
    nccl = torch.distributed.new_group(ranks, backend="nccl")
    x = torch.full((100_003,), float(group.rank + 1), device="cuda")
    torch.distributed.all_reduce(x, group=nccl)
    values = x.unique().tolist()
    torch.cuda.synchronize()
    torch.distributed.destroy_process_group(nccl)
    return values


@pytest.mark.parametrize("world_size", WORLDS)
def test_ranks_see_one_gpu_and_their_share_of_it(gpu_ranks, world_size):
    found = gpu_ranks(world_size, backend="gloo").run(_describe, timeout=90.0)
    shared = gpu_ranks.shared_gpu
    print(shared.describe(world_size), found[0])
    assert all(each == found[0] for each in found)
    assert (found[0]["devices"], found[0]["device"], found[0]["ranks"]) == (1, "cuda:0", world_size)
    assert found[0]["mps"] == shared.mps
    if shared.mps:
        # 25% of 132 SMs came out as 32: what is left after the percentage is rounded is the driver's business.
        assert found[0]["sms"] * world_size <= shared.sms + 2 * world_size
        assert found[0]["sms"] < shared.sms


@pytest.mark.parametrize("world_size", WORLDS)
def test_gloo(gpu_ranks, world_size):
    expected = [float(world_size * (world_size + 1) // 2)]
    assert gpu_ranks(world_size, backend="gloo").run(_gloo_sum) == [expected] * world_size


@pytest.mark.parametrize("world_size", WORLDS)
def test_symmetric_memory(gpu_ranks, world_size):
    everyone = [[float(rank + 1)] for rank in range(world_size)]
    total = [float(world_size * (world_size + 1) // 2)]
    for seen, summed, multicast in gpu_ranks(world_size, backend="gloo").run(_symmetric_memory, timeout=90.0):
        assert seen == everyone and summed == total
        assert multicast == 0, "there is no multicast between ranks on one GPU"


def test_nccl_takes_ranks_on_one_gpu(gpu_ranks):
    assert gpu_ranks(2, backend="gloo").run(_nccl_sum, timeout=90.0) == [[3.0]] * 2


SCRIPT = """\
import os, torch
from tp_kernels import ProcessGroupManager, one_gpu
with ProcessGroupManager.initialize(backend="gloo", device="cuda") as manager:
    x = torch.full((4,), manager.rank + 1.0, device=one_gpu.local_device()).cpu()
    torch.distributed.all_reduce(x)
    assert x.tolist() == [3.0] * 4 and torch.cuda.device_count() == 1 and one_gpu.ranks_on_this_gpu() == 2
"""


def test_launch_one_gpu(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["launch", "--nproc", "2", "--one-gpu", str(tmp_path / "script.py")]
    run = subprocess.run([sys.executable, "-m", "tp_kernels", *words], capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr
    assert "2 ranks on one GPU, " in run.stderr
