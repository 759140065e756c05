"""Groups of GPU ranks: which transports, which path by size, the same bits, graphs, tuning, the doctor.

Tier: ranks on one GPU.
"""

import json
import subprocess
import sys

import pytest
import torch

from tp_kernels import doctor_peer
from tp_kernels.comm import explain
from tp_kernels.comm.paths import LAMPORT, MEASURED_DTYPES, ONE_SHOT, SYMM, TRITON, TWO_SHOT, table_file

pytestmark = pytest.mark.gpu
WORLDS = [2, 4]
# Around the limits of every path, and odd ones.
COUNTS = [1, 3, 8, 4099, 32768, 65536, 65537, 131072, 131073, 262147, 1 << 20, (1 << 22) + 5]


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path_factory):
    """Neither tables nor verdicts of this machine's user decide, and none is written there."""
    folder = str(tmp_path_factory.mktemp("tables"))
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", folder)
    monkeypatch.setenv("TP_KERNELS_CACHE_DIR", folder)


@pytest.fixture(scope="module")
def routed_ranks(gpu_ranks):
    """``gpu_ranks`` whose pools end with this file: their groups hold more of the GPU than those over Gloo."""
    used = []

    def get(world_size, **options):
        used.append(gpu_ranks(world_size, **options))
        return used[-1]

    yield get
    for pool in used:
        pool.close()


def _data(rank, count, dtype, device):
    return ((torch.arange(count, device=device) * (rank + 1)) % 11).to(dtype)


def _sums(group):
    """Every size over the routed group, exact, and the same bits on every rank; returns what ran."""
    world, device = group.world_size, group.device
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for count in COUNTS:
            expected = sum(_data(r, count, torch.float32, device) for r in range(world)).to(dtype)
            x = _data(group.rank, count, dtype, device)
            assert torch.equal(group.all_reduce(x), expected), (dtype, count)
            group.all_reduce(x, out=x)
            assert torch.equal(x, expected), (dtype, count, "in place")
            handle = group.all_reduce_async(_data(group.rank, count, dtype, device))
            assert torch.equal(handle.wait(), expected), (dtype, count, "async")
    whole = torch.arange(1000, device=device, dtype=torch.int64)
    assert torch.equal(group.all_reduce(whole), whole * world)
    assert group.all_reduce(torch.tensor([float(group.rank)], device=device), "max").item() == world - 1
    for count in (5, 400_000):
        parts = [torch.full((count + r,), r, device=device, dtype=torch.float32) for r in range(world)]
        gathered = group.all_gather(parts[group.rank], sizes=[count + r for r in range(world)])
        assert torch.equal(gathered, torch.cat(parts))
        full = torch.ones(world * count, device=device)
        assert torch.equal(group.reduce_scatter(full), torch.full((count,), float(world), device=device))
    assert group.broadcast(torch.full((3,), group.rank, device=device), world - 1).tolist() == [world - 1] * 3
    group.barrier()
    torch.cuda.synchronize(device)
    group.communicator.check()
    host = group.all_reduce(torch.ones(2))
    assert host.tolist() == [world] * 2
    return group.backend, dict(group.communicator.counters), str(explain(group)), list(group.communicator.paths)


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_group_takes_peer_memory_and_all_its_paths(routed_ranks, world_size):
    for backend, counters, text, paths in routed_ranks(world_size).run(_sums, timeout=100.0):
        assert backend == "symm" and "nccl" in paths, text
        assert {LAMPORT, ONE_SHOT, TWO_SHOT, SYMM, "gloo"} <= set(counters), text
        assert "nccl: kept beside it" in text and "symm:two_shot" in text
        # Sums of floats keep to their class, data of ranks that share a GPU to peer memory.
        assert "nccl" not in counters


def test_a_group_of_nccl(routed_ranks):
    for backend, counters, text, _ in routed_ranks(2, backend="nccl").run(_sums, timeout=100.0):
        assert backend == "nccl" and set(counters) == {"nccl", "gloo"}, text


def test_without_restriction_all_paths_are_there(routed_ranks):
    for backend, counters, text, paths in routed_ranks(2, numerics="any").run(_sums, timeout=100.0):
        assert backend == "symm" and {"nccl", TWO_SHOT, "gloo"} <= set(paths), text
        assert counters["gloo"] == 1


def _captured(group):
    """A graph that mixes the paths, replayed an odd and an even number of times."""
    device = group.device
    operands = [torch.ones(count, device=device) for count in (64, 100_000, 1 << 20)]
    results = [torch.empty_like(x) for x in operands]
    for x, out in zip(operands, results, strict=True):
        group.all_reduce(x, out=out)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for x, out in zip(operands, results, strict=True):
            group.all_reduce(x, out=out)
    for replay in range(1, 6):
        for x in operands:
            x.fill_(replay * (group.rank + 1))
        graph.replay()
        expected = float(replay * sum(range(1, group.world_size + 1)))
        assert all(out.unique().tolist() == [expected] for out in results), replay
    return True


def test_paths_can_be_mixed_in_a_graph(routed_ranks):
    assert routed_ranks(2).run(_captured, timeout=60.0) == [True] * 2


def _host_path_in_a_capture(group):
    from tp_kernels.comm import BackendUnavailableError

    x = torch.ones(4, device=group.device)
    graph = torch.cuda.CUDAGraph()
    communicator = group.communicator
    communicator._routes[("all_reduce", 16, torch.float32, "cuda", "sum", 0)] = "gloo"
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = x + 1
            try:
                group.all_reduce(y)
            except BackendUnavailableError as error:
                return str(error)
    finally:
        communicator._routes.clear()
    return "no error"


def test_the_host_path_refuses_to_be_captured(routed_ranks):
    for message in routed_ranks(2).run(_host_path_in_a_capture):
        assert "goes through host memory" in message


def test_several_groups_and_anew(routed_ranks):
    assert routed_ranks(2).run(_several_groups, timeout=100.0) == [True] * 2


def _several_groups(group):
    from tp_kernels.comm import resolve_group

    for _ in range(3):
        torch_group = torch.distributed.new_group(list(range(group.world_size)), backend="gloo")
        other = resolve_group(torch_group)
        assert other is not group and other.backend == "symm"
        for count in (10, 300_000):
            x = torch.ones(count, device=group.device)
            first, second = group.all_reduce(x), other.all_reduce(x)
            assert torch.equal(first, second)
        torch.cuda.synchronize(group.device)
        torch.distributed.barrier(torch_group)
        other.close()
        torch.distributed.destroy_process_group(torch_group)
    return True


def test_the_doctor_checks_peer_memory():
    detail = doctor_peer.check_peer_memory()
    assert "ordered pairs of" in detail


def test_tune_comm_writes_a_table_that_groups_read(routed_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    words = ["launch", "--nproc", "2", "--one-gpu", "--module", "tp_kernels", "tune", "comm", "--minutes", "0.5"]
    run = subprocess.run([sys.executable, "-m", "tp_kernels", *words], capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    path = table_file(torch.cuda.get_device_name(), 2, True)
    content = json.loads(path.read_text())
    figures = content["us"]
    assert {row["bytes"] for row in figures["bfloat16"]["all_reduce"]} >= {2048, 64 << 20}
    for dtype in MEASURED_DTYPES:
        assert {LAMPORT, ONE_SHOT, TWO_SHOT, "nccl"} <= set(figures[dtype]["all_reduce"][0]["us"])
    assert {TWO_SHOT, TRITON} <= set(figures["bfloat16"]["all_reduce_norm"][-1]["us"])
    assert set(figures["bfloat16"]) > set(figures["float32"])  # what only moves is measured once
