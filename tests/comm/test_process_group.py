"""ProcessGroupManager and resolve_group: layouts, missing ranks, repeated set-up. Tier: CPU ranks, some no device."""

import copy
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tp_kernels.comm import (
    BackendUnavailableError,
    CommAbortedError,
    CommTimeoutError,
    ProcessGroupManager,
    explain,
    get_tp_group,
    init,
    process_group,
    resolve_group,
    shutdown,
)
from tp_kernels.testing.rank_pool import RankPool


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="tp_kernels_test_") as path:
        yield path


@pytest.fixture(scope="module")
def pool():
    """Pools of this file's own: the functions run in them shut the pool's group down first."""
    pools: dict[int, RankPool] = {}
    yield lambda world_size: pools.setdefault(world_size, RankPool(world_size))
    for kept in pools.values():
        kept.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def total(group):
    """Sum of the world ranks in the group, over its communicator."""
    return int(group.all_reduce(torch.tensor([float(group.ranks[group.rank])])).item())


# One rank ------------------------------------------------------------------------------------------------------------


def test_one_rank_needs_no_torch_distributed(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init() as manager:
        assert (manager.rank, manager.world_size, manager.tp_size, manager.dp_size) == (0, 1, 1, 1)
        assert get_tp_group() is manager.tp_group is resolve_group(None) is resolve_group(manager)
        assert manager.tp_group.backend == "local" and manager.dp_group.world_size == 1
        assert manager.new_group([0]).world_size == 1
        assert total(manager.tp_group) == 0
        assert not dist.is_initialized()
        with pytest.raises(RuntimeError, match="does not initialise for a single rank"):
            _ = manager.mesh
        with pytest.raises(RuntimeError, match="already initialised"):
            init()
    assert "closed" in repr(manager)
    with pytest.raises(RuntimeError, match="shut down"):
        resolve_group(manager)
    manager.shutdown()
    shutdown()


def test_without_initialisation_there_is_a_group_of_one():
    group = resolve_group()
    assert group.world_size == 1 and group is resolve_group() is resolve_group(group)
    assert "rank 0 of 1" in repr(group)


def test_a_group_cannot_be_pickled_and_is_shared_by_copies():
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(resolve_group())
    assert copy.deepcopy({"group": resolve_group()})["group"] is resolve_group()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rank": 0}, "both rank and world_size"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size"),
        ({"rank": 0, "world_size": 0}, "0 <= rank < world_size"),
        ({"rank": 0, "world_size": 4, "tp_size": 3}, "tp_size must divide"),
        ({"rank": 0, "world_size": 1, "backend": "mpi"}, "backend must be one of"),
        ({"rank": 0, "world_size": 1, "timeout": 0}, "timeout"),
        ({"rank": 0, "world_size": 1, "device": "tpu"}, "device must be"),
        ({"rank": 0, "world_size": 1, "max_ctas": 65}, "max_ctas must be an integer between 1 and 64"),
        ({"rank": 0, "world_size": 1, "registered_buffers": 1}, "registered_buffers must be True or False"),
        ({"rank": 0, "world_size": 1, "device": "meta"}, "device must be"),
        ({"rank": 0, "world_size": 2, "init_method": "http://x"}, "init_method"),
        ({"rank": 0, "world_size": 2, "init_method": "tcp://host"}, "tcp://host:port"),
        ({"rank": 0, "world_size": 2, "init_method": "file:///no/such/folder/file"}, "existing/folder"),
    ],
)
def test_bad_arguments_are_value_errors(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        init(**arguments)
    assert get_tp_group().world_size == 1  # a failed one leaves nothing behind


def test_bad_environment_is_a_value_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE"):
        init()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        init()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error of machines without CUDA")
def test_cuda_without_a_gpu_is_a_value_error():
    with pytest.raises(ValueError, match="is_available"):
        init(device="cuda")


def test_bad_group_is_a_value_error():
    with pytest.raises(ValueError, match=r"TPGroup, a ProcessGroupManager.*got str"):
        resolve_group("tp")


# Several ranks -------------------------------------------------------------------------------------------------------


def mesh_of_tp_and_dp(group, path):
    rank = group.rank
    shutdown()
    manager = init(rank, 4, f"file://{path}/mesh", tp_size=2, timeout=30)
    tp, dp = manager.tp_group, manager.dp_group
    mesh = manager.mesh
    assert tp.ranks == ((0, 1) if rank < 2 else (2, 3)) and tp.rank == rank % 2
    assert dp.ranks == (rank % 2, rank % 2 + 2) and dp.rank == rank // 2
    assert (total(tp), total(dp)) == (sum(tp.ranks), sum(dp.ranks))
    assert mesh.mesh_dim_names == ("dp", "tp") and mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert mesh.get_group("tp") is tp.process_group and mesh.get_group("dp") is dp.process_group
    assert resolve_group(mesh) is resolve_group(tp.process_group) is tp
    assert resolve_group(dp.process_group) is dp
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=mesh.get_group("tp"))
    assert x.item() == sum(tp.ranks)
    odd = manager.new_group([1, 3])
    several = manager.new_group([0, 1, 3], "several")
    assert (odd is None) == (rank in (0, 2)) and (several is None) == (rank == 2)
    if odd is not None:
        assert total(odd) == 4
    if several is not None:
        assert several.name == "several" and total(several) == 4
    with pytest.raises(ValueError, match="ascending"):
        manager.new_group([1, 0])
    with pytest.raises(ValueError, match="distinct ranks"):
        manager.new_group([4])
    shutdown()
    with pytest.raises(CommAbortedError):
        tp.all_reduce(x)
    return dist.is_initialized()


def repeated_layouts(group, path, scheme):
    rank = group.rank
    shutdown()
    for round_, tp_size in enumerate((None, 2, 1, 4, 2, None)):
        # A file of its own each time; the same TCP address, whose keys of earlier rounds are still there.
        where = f"file://{path}/round{round_}" if scheme == "file" else f"tcp://127.0.0.1:{path}"
        with init(rank, 4, where, tp_size=tp_size, timeout=30, backend="gloo" if round_ % 2 else "auto") as manager:
            size = tp_size or 4
            first = rank - rank % size
            assert manager.tp_group.ranks == tuple(range(first, first + size))
            assert total(manager.tp_group) == sum(range(first, first + size))
            assert manager.mesh.shape == (4 // size, size)
        assert not dist.is_initialized() and get_tp_group().world_size == 1


def users_torch_distributed(group, path):
    rank = group.rank
    shutdown()
    for round_ in range(2):
        dist.init_process_group("gloo", init_method=f"file://{path}/users{round_}", rank=rank, world_size=3)
        half = dist.new_group([0, 2])
        resolved = resolve_group(dist.group.WORLD)
        assert resolve_group(dist.group.WORLD) is resolved and total(resolved) == 3
        if rank != 1:
            pair = resolve_group(half)
            assert pair.ranks == (0, 2) and total(pair) == 2
        mesh = dist.init_device_mesh("cpu", (3,))
        assert total(resolve_group(mesh)) == 3
        with pytest.raises(ValueError, match="already initialised with rank"):
            init(0, 2)
        with init(timeout=20) as manager:
            assert manager.world_size == 3 and total(manager.tp_group) == 3
            assert resolve_group(dist.group.WORLD) is manager.tp_group
            assert manager.mesh.shape == (1, 3)
        assert dist.is_initialized()
        with init(tp_size=1) as manager:
            assert manager.tp_group.world_size == 1 and total(manager.dp_group) == 3
            assert resolve_group(manager.mesh) is manager.tp_group
        dist.destroy_process_group(dist.group.WORLD)
        assert resolve_group(None).world_size == 1
        with pytest.raises(ValueError, match="destroyed"):
            resolve_group(half)


def torchrun_environment(group, port):
    rank = group.rank
    shutdown()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with init(timeout=30) as manager:
        return manager.rank, manager.local_rank, total(manager.tp_group)


def initialise_without(group, absent, where):
    rank = group.rank
    shutdown()
    if rank in absent:
        return None
    start = time.monotonic()
    try:
        init(rank, 3, where, timeout=1.5)
    except CommTimeoutError as error:
        assert not dist.is_initialized() and get_tp_group().world_size == 1
        return str(error), error.ranks, time.monotonic() - start
    return "no error", (), 0.0


def disagree(group, path):
    rank = group.rank
    shutdown()
    try:
        init(rank, 2, f"file://{path}/disagree", tp_size=1 + rank, timeout=20)
    except ValueError as error:
        return str(error)
    return "no error"


def disagree_on_max_ctas(group, path):
    rank = group.rank
    shutdown()
    try:
        init(rank, 2, f"file://{path}/ctas", max_ctas=(8, None)[rank], timeout=20)
    except ValueError as error:
        return str(error)
    return "no error"


def options_of_nccl(group, path):
    """What the makers of transports are given, for the default group and for one of the user's."""
    from tp_kernels.comm import gpu_group

    shutdown()
    given = []
    with (
        mock.patch.object(process_group, "create_group", wraps=process_group.create_group) as create,
        init(group.rank, 2, f"file://{path}/options", max_ctas=8, registered_buffers=True, timeout=20),
    ):
        resolve_group(dist.new_group([0, 1]))
    for call in create.call_args_list:
        options, device = call.kwargs["nccl_options"], torch.device("cuda", 0)
        with mock.patch("tp_kernels.comm.nccl.NCCLCommunicator.create") as made:
            gpu_group.makers_of(0, 2, "g", dist.HashStore(), None, device, 5.0, options)["nccl"]()
        given.append({name: made.call_args.kwargs[name] for name in ("max_ctas", "registered_buffers")})
    return given


def disagree_on_backend(group, path):
    rank = group.rank
    shutdown()
    try:
        init(rank, 2, f"file://{path}/backends", backend=("auto", "gloo")[rank], timeout=20)
    except ValueError as error:
        return str(error)
    return "no error"


def several_groups_at_once(group, path):
    """Interleaved calls on overlapping groups do not disturb each other."""
    rank = group.rank
    shutdown()
    with init(rank, 4, f"file://{path}/several", tp_size=2, timeout=30) as manager:
        everyone = manager.new_group([0, 1, 2, 3])
        for _ in range(20):
            sums = [total(g) for g in (manager.tp_group, everyone, manager.dp_group)]
            assert sums == [sum(manager.tp_group.ranks), 6, sum(manager.dp_group.ranks)]


def test_mesh_of_tp_and_dp(pool, folder):
    assert pool(4).run(mesh_of_tp_and_dp, folder) == [False] * 4


@pytest.mark.parametrize("scheme", ["file", "tcp"])
def test_created_and_destroyed_repeatedly_with_other_layouts(pool, folder, scheme):
    pool(4).run(repeated_layouts, folder if scheme == "file" else free_port(), scheme)


def test_users_torch_distributed_is_reused_and_kept(pool, folder):
    pool(3).run(users_torch_distributed, folder)


def test_environment_of_torchrun(pool):
    assert pool(2).run(torchrun_environment, str(free_port())) == [(0, 0, 1), (1, 1, 1)]


@pytest.mark.parametrize("scheme", ["file", "tcp"])
def test_missing_ranks_are_named(pool, folder, scheme):
    where = f"file://{folder}/missing" if scheme == "file" else f"tcp://127.0.0.1:{free_port()}"
    results = pool(3).run(initialise_without, [1, 2], where)
    message, ranks, seconds = results[0]
    assert ranks == (1, 2) and "ranks [1, 2]" in message
    assert seconds < 10


def test_missing_host_of_the_store_is_named(pool):
    results = pool(3).run(initialise_without, [0], f"tcp://127.0.0.1:{free_port()}")
    for message, ranks, seconds in results[1:]:
        assert ranks == (0,) and "rank 0, which hosts it, did not answer" in message
        assert seconds < 20


def test_options_of_nccl_reach_it_from_every_kind_of_group(pool, folder):
    for given in pool(2).run(options_of_nccl, folder):
        assert given == [{"max_ctas": 8, "registered_buffers": True}] * 2


def test_disagreement_on_sizes_or_backend_is_an_error_everywhere(pool, folder):
    for message in pool(2).run(disagree_on_max_ctas, folder):
        assert "'max_ctas': 8" in message and "'max_ctas': None" in message and "same sizes and options" in message
    for message in pool(2).run(disagree, folder):
        assert "rank 0: {'tp_size': 1" in message and "rank 1: {'tp_size': 2" in message
    for message in pool(2).run(disagree_on_backend, folder):
        assert "agree on backend, got rank 0: 'auto', rank 1: 'gloo'" in message


def test_several_groups_at_once(pool, folder):
    pool(4).run(several_groups_at_once, folder)


def without_shared_memory(group, path, strict):
    """(backend or error, warnings, first lines of the explanation)."""
    shutdown()
    os.environ["TP_KERNELS_SHM_DIR"] = f"{path}/absent"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with init(group.rank, 2, f"file://{path}/{strict}", strict=strict, timeout=20) as manager:
                assert total(manager.tp_group) == 1
                return manager.tp_group.backend, [str(w.message) for w in caught], str(explain(manager))
    except BackendUnavailableError as error:
        return "error", [], str(error)
    finally:
        del os.environ["TP_KERNELS_SHM_DIR"]


def test_no_shared_memory_leads_to_gloo_with_one_warning(pool, folder):
    results = pool(2).run(without_shared_memory, folder, False)
    assert [len(warned) for _, warned, _ in results] == [1, 0]
    assert "group tp falls back to gloo (shm: " in results[0][1][0]
    for backend, _, explanation in results:
        assert backend == "gloo" and "shm: not taken" in explanation


def test_no_shared_memory_is_an_error_under_strict(pool, folder):
    for outcome, _, message in pool(2).run(without_shared_memory, folder, True):
        assert outcome == "error" and "strict=True forbids the fallback to gloo" in message


def test_forgetting_to_shut_down_is_harmless(folder):
    """Two processes that leave by falling off the end exit with status 0 and say nothing."""
    code = (
        "import sys, torch; from tp_kernels.comm import init\n"
        f"g = init(int(sys.argv[1]), 2, 'file://{folder}/exit', timeout=60).tp_group\n"
        "assert g.all_reduce(torch.ones(3)).tolist() == [2.0] * 3\n"
    )
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(r)], stderr=subprocess.PIPE, text=True, env=environment)
        for r in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors and "terminate" not in errors


def test_manager_is_what_init_makes():
    with init(0, 1) as manager:
        assert isinstance(manager, ProcessGroupManager)
