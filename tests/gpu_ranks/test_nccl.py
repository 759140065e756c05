"""NCCL on ranks that share a GPU: exact sums, order of streams, graphs, deadlines, faults. Tier: ranks on one GPU.

Sums are of integers that every dtype here holds exactly, so the tolerance is zero.
"""

import gc
import os
import signal
import time
import warnings

import pytest
import torch

from tp_kernels.comm import (
    CommAbortedError,
    CommError,
    CommMismatchError,
    CommTimeoutError,
    NCCLUnavailable,
    PeerDiedError,
)
from tp_kernels.testing.nccl_group import nccl_group

pytestmark = pytest.mark.gpu
WORLDS = [2, 4]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int8, torch.uint8)
CYCLES = 100_000_000  # some 50 ms


def run(gpu_ranks, world_size, function, *args, timeout=75.0):
    return gpu_ranks(world_size, backend="gloo").run(function, *args, timeout=timeout)


def nccl(group, **options):
    torch.cuda.set_device(0)
    return nccl_group(group, **{"timeout": 60.0, **options}).communicator


def data(rank, count, dtype=torch.float32):
    """At most 2 on every rank, so a sum over 4 is at most 8: exact even in float8_e5m2."""
    return ((torch.arange(count, device="cuda") * (rank + 1)) % 3).to(torch.float32).to(dtype)


def total(world_size, count, dtype=torch.float32):
    return sum(data(rank, count) for rank in range(world_size)).to(dtype)


def equal(actual, expected):
    return actual.shape == expected.shape and torch.equal(actual.float(), expected.float())


def sleep_on(comm):
    with torch.cuda.stream(comm.comm_stream):
        torch.cuda._sleep(CYCLES)


def until_it_raises(comm, seconds):
    """The error that ``check`` raises within ``seconds``, and after how many; the device must be free by then."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        try:
            comm.check()
        except CommError as error:
            took = time.monotonic() - started
            torch.cuda.synchronize()
            return error, took
        time.sleep(0.01)
    raise AssertionError(f"no error within {seconds} s")


# --- collectives -----------------------------------------------------------------------------------------------------


def _every_collective(group, options):
    comm = nccl(group, **options)
    rank, world = comm.rank, comm.world_size
    for dtype in (*FLOATS, *INTEGERS):
        for count in (0, 1, 37, 100_003):
            mine, expected = data(rank, count, dtype), total(world, count, dtype)
            assert equal(comm.all_reduce(mine), expected), (dtype, count)
            assert equal(mine, data(rank, count, dtype)), "the input was changed"
            everyone = torch.stack([data(r, count, dtype).float() for r in range(world)])
            assert equal(comm.all_reduce(mine, "max"), everyone.amax(0).to(dtype))
            in_place = mine.clone()
            assert comm.all_reduce(in_place, out=in_place) is in_place and equal(in_place, expected)
            assert comm.broadcast(in_place.copy_(mine), world - 1) is in_place
            assert equal(in_place, data(world - 1, count, dtype))
            for sizes in (
                [count // world] * world,
                [count // world + r for r in range(world)],
                [3] + [0] * (world - 1),
            ):
                whole = total(world, sum(sizes), dtype)
                scattered = comm.reduce_scatter(data(rank, sum(sizes), dtype), sizes=sizes)
                assert equal(scattered, whole.split(sizes)[rank]), (dtype, sizes)
                gathered = comm.all_gather(data(rank, sizes[rank], dtype), sizes=sizes)
                assert equal(gathered, torch.cat([data(r, n, dtype) for r, n in enumerate(sizes)])), (dtype, sizes)
        comm.barrier()
    # Other dimensions, and tensors that are not contiguous.
    x = data(rank, 6 * 8 * world).view(6, 8 * world)
    expected = total(world, 6 * 8 * world).view(6, 8 * world)
    assert equal(comm.reduce_scatter(x, dim=1), expected.chunk(world, 1)[rank])
    assert equal(comm.all_gather(x, dim=-1), torch.cat([data(r, x.numel()).view_as(x) for r in range(world)], 1))
    assert equal(comm.all_reduce(x.t()), expected.t())
    turned = x.t()
    assert comm.all_reduce(turned, out=turned) is turned and equal(x, expected)
    assert equal(comm.all_gather(torch.tensor([rank > 0], device="cuda")), torch.arange(world, device="cuda") > 0)
    calls = comm.counters["nccl"]
    comm.check()
    comm.close()
    comm.close()
    with pytest.raises(CommAbortedError, match="closed"):
        comm.all_reduce(x)
    return calls


@pytest.mark.parametrize(
    ("world_size", "options"), [(2, {}), (4, {}), (2, {"blocking": True}), (2, {"max_ctas": 2})], ids=str
)
def test_every_collective_is_exact(gpu_ranks, world_size, options):
    assert min(run(gpu_ranks, world_size, _every_collective, options)) > 100


def _float8(group):
    comm = nccl(group)
    results = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        gathered = comm.all_gather(data(comm.rank, 5, dtype))
        assert equal(gathered, torch.cat([data(r, 5) for r in range(comm.world_size)]))
        if torch.cuda.get_device_capability() >= (9, 0) and torch.cuda.nccl.version() >= (2, 24):
            results.append(equal(comm.all_reduce(data(comm.rank, 1000, dtype)), total(comm.world_size, 1000)))
    comm.close()
    return results


def test_float8(gpu_ranks):
    for results in run(gpu_ranks, 2, _float8):
        assert all(results)


def _arguments(group):
    comm = nccl(group)
    x = data(comm.rank, 6)
    for call, text in (
        (lambda: comm.all_reduce(x.cpu()), "expected a tensor on cuda:0"),
        (lambda: comm.all_reduce(x, "mean"), "unknown reduction"),
        (lambda: comm.all_reduce(x, out=x[:3]), "out must be"),
        (lambda: comm.all_reduce(x > 1), "unsupported dtype"),
        (lambda: comm.broadcast(x, 9), "src"),
        (lambda: comm.all_gather(x, dim=3), "out of range"),
        (lambda: comm.all_reduce(x, timeout=-1), "timeout"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert equal(comm.all_reduce(x), total(comm.world_size, 6))
    os.environ["NCCL_MAX_CTAS"] = "4"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nccl(group, max_ctas=8).close()
    finally:
        del os.environ["NCCL_MAX_CTAS"]
    comm.close()
    return [str(warning.message) for warning in caught]


def test_arguments_and_the_warning_about_ctas(gpu_ranks):
    for texts in run(gpu_ranks, 2, _arguments):
        assert any("max_ctas=8 is overruled by NCCL_MAX_CTAS=4" in text for text in texts)


# --- streams and graphs ----------------------------------------------------------------------------------------------


def _asynchronous(group):
    comm = nccl(group)
    rank, world, count = comm.rank, comm.world_size, 10_000
    mine, expected = data(rank, count), total(world, count)
    out = torch.full((count,), -1.0, device="cuda")
    torch.cuda.synchronize()
    sleep_on(comm)
    handle = comm.all_reduce_async(mine, out=out)
    early = out.clone()
    late = handle.wait().clone()
    assert (early == -1).all(), "the caller's stream waited before wait()"
    assert equal(late, expected), "wait() did not wait"
    # It begins after what the caller's stream holds, and another stream may wait for it.
    sleep_on(comm)
    torch.cuda._sleep(CYCLES)
    handle = comm.all_reduce_async(out.copy_(mine), out=out)
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        assert equal(handle.wait().clone(), expected)
    torch.cuda.current_stream().wait_stream(other)
    # A synchronous call comes after the asynchronous ones before it, on any stream.
    sleep_on(comm)
    handles = [comm.all_reduce_async(out.copy_(mine), out=out)]
    assert equal(comm.all_reduce(mine), expected)
    sizes = [count // 2 + r for r in range(world)]
    parts = data(rank, sum(sizes))
    handles.append(comm.reduce_scatter_async(parts, sizes=sizes))
    handles.append(comm.all_gather_async(handles[1].wait(), sizes=sizes))
    assert equal(handles[2].wait(), total(world, sum(sizes)))
    assert equal(comm.broadcast_async(data(rank, 7), 1).wait(), data(1, 7))
    # Memory of tensors nobody holds any more must not be handed out while the collective may still use it.
    results = []
    for _ in range(20):
        sleep_on(comm)
        results.append(comm.all_reduce_async(data(rank, count)))
        torch.full((count,), 77.0, device="cuda")
        results[-1] = results[-1].wait().clone()
        sleep_on(comm)
        comm.all_reduce_async(data(rank, count), out=None)
        torch.full((count,), 78.0, device="cuda")
    assert all(equal(result, expected) for result in results)
    torch.cuda.synchronize()
    comm.check()
    comm.close()
    return True


@pytest.mark.parametrize("world_size", WORLDS)
def test_asynchronous_calls_are_ordered_and_keep_their_memory(gpu_ranks, world_size):
    assert all(run(gpu_ranks, world_size, _asynchronous))


def _graphs(group, options):
    comm = nccl(group, **options)
    rank, world, count = comm.rank, comm.world_size, 5000
    mine, expected = data(rank, count), total(world, count)
    for calls in (1, 2, 3):
        x = torch.zeros(count, device="cuda")
        sums = [torch.zeros_like(x) for _ in range(2 * calls)]
        graph = torch.cuda.CUDAGraph()
        comm.all_reduce(mine)
        with torch.cuda.graph(graph):
            handles = [comm.all_reduce_async(x, out=sums[i]) for i in range(calls)]
            for i in range(calls):
                comm.all_reduce(x, out=sums[calls + i])
            kept = [handle.wait() for handle in handles]
            doubled = kept[-1] * 2
        for replay in range(4):
            x.copy_(mine * (replay + 1))
            graph.replay()
            comm.guard_replay()
            assert all(equal(result, expected * (replay + 1)) for result in sums), (calls, replay)
            assert equal(doubled, expected * 2 * (replay + 1))
            assert equal(comm.all_reduce_async(mine).wait(), expected)
            assert equal(comm.all_reduce(mine), expected)
        with pytest.raises(ValueError, match="capture"):
            handles[0].wait()
        torch.cuda.synchronize()
        time.sleep(0.2)  # the watchdog looks at everything that it believes to be in flight
        comm.check()
        del graph, handles, kept, doubled
        gc.collect()
    comm.close()
    return True


@pytest.mark.parametrize(("world_size", "options"), [(2, {}), (4, {}), (2, {"blocking": True})], ids=str)
def test_graphs_with_odd_and_even_numbers_of_calls(gpu_ranks, world_size, options):
    assert all(run(gpu_ranks, world_size, _graphs, options))


def _two_groups(group):
    first, second = nccl(group), nccl(group)
    for count in (10, 200_000):
        mine, expected = data(first.rank, count), total(first.world_size, count)
        handles = [comm.all_reduce_async(mine) for _ in range(10) for comm in (first, second)]
        assert all(equal(handle.wait(), expected) for handle in handles)
    first.close()
    assert equal(second.all_reduce(mine), expected)
    second.close()
    return True


def test_two_groups_at_once(gpu_ranks):
    assert all(run(gpu_ranks, 2, _two_groups))


# --- registered memory -----------------------------------------------------------------------------------------------


def _registered(group):
    comm = nccl(group, registered_buffers=True, buffer_bytes=1 << 22)
    rank, world, count = comm.rank, comm.world_size, 300_000
    state, x = comm.describe()[1], comm.get_buffer((count,), torch.float32)
    assert (x is None) == ("buffer: none" in state) and comm.get_buffer((1 << 23,), torch.int8) is None
    users = torch.zeros(count, device="cuda")
    try:
        comm.register(users)
    except ValueError as error:
        state += f"; {error}"
    expected = total(world, count)
    for operand in (x, users):
        if operand is None:
            continue
        for size in (1, 37, count):
            part = operand[:size].copy_(data(rank, size))
            assert comm.all_reduce(part, out=part) is part and equal(part, expected[:size])
            handle = comm.all_reduce_async(part.copy_(data(rank, size)), out=part)
            assert equal(handle.wait().clone(), expected[:size])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            comm.all_reduce(operand, out=operand)
        for _ in range(3):
            operand.copy_(data(rank, count))
            graph.replay()
            comm.guard_replay()
            assert equal(operand.clone(), expected)
        del graph
    gc.collect()
    comm.barrier()
    comm.close()
    if x is not None:  # its memory stays as long as a tensor does
        assert equal(x.copy_(data(rank, count)), data(rank, count))
    return state


def test_registered_memory_gives_the_same_sums(gpu_ranks):
    states = run(gpu_ranks, 2, _registered)
    assert len({"buffer: none" in state for state in states}) == 1, states


# --- faults ----------------------------------------------------------------------------------------------------------


def _one_never_calls(group, asynchronous):
    comm = nccl(group)
    comm.timeout = 2.0
    if comm.rank == 1:
        time.sleep(6.0)
        comm.close()
        return None
    x = data(comm.rank, 1000)
    handle = comm.all_reduce_async(x) if asynchronous else comm.all_reduce(x)
    error, took = until_it_raises(comm, 15.0)
    if asynchronous:
        with pytest.raises(CommError):
            handle.wait()
    with pytest.raises(CommAbortedError, match="broken"):
        comm.all_reduce(x)
    comm.close()
    return type(error), error.ranks, error.operation, took, str(error)


@pytest.mark.parametrize(("world_size", "asynchronous"), [(2, False), (2, True), (4, True)])
def test_a_rank_that_never_arrives_is_named(gpu_ranks, world_size, asynchronous):
    results = run(gpu_ranks, world_size, _one_never_calls, asynchronous)
    for rank, result in enumerate(results):
        if rank != 1:
            kind, ranks, operation, took, text = result
            assert kind is CommTimeoutError and ranks == (1,) and operation == "all_reduce", text
            assert took < 8.0 and f"rank {rank} of {world_size}" in text


def _one_dies(group, when):
    comm = nccl(group)
    x = data(comm.rank, 4_000_000)
    if when == "after":
        assert equal(comm.all_reduce(x), total(comm.world_size, 4_000_000))
    if comm.rank == 1:
        _ = comm.all_reduce_async(x) if when == "during" else None
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        for _ in range(3):
            comm.all_reduce(x, timeout=5.0)
        error, _ = until_it_raises(comm, 20.0)
    except CommError as raised:
        error = raised
    return type(error), error.ranks, time.monotonic() - started, str(error)


# Each ends with new ranks and a new daemon for them.
@pytest.mark.parametrize(("world_size", "when"), [(2, "before"), (2, "during"), (2, "after"), (4, "during")])
def test_a_killed_rank_ends_the_wait_of_the_others(gpu_ranks, world_size, when):
    outcomes = gpu_ranks(world_size, backend="gloo").run_outcomes(_one_dies, when, timeout=60.0)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for outcome in (outcome for outcome in outcomes if outcome.rank != 1):
        assert outcome.ok, outcome.describe()
        kind, ranks, took, text = outcome.value
        assert kind is PeerDiedError and ranks == (1,) and took < 20.0, text


def _one_never_creates(group):
    if group.rank == 1:
        return None
    try:
        nccl(group, timeout=2.0)
    except CommTimeoutError as error:
        return error.ranks


def test_a_rank_that_never_creates_is_named(gpu_ranks):
    assert run(gpu_ranks, 2, _one_never_creates)[0] == (1,)
    gpu_ranks(2, backend="gloo").close()  # its ranks disagree on how many groups were made


def _no_memory(group):
    torch.cuda.set_device(0)
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    if group.rank == 1:
        torch.cuda.set_per_process_memory_fraction(0.0)
    started = time.monotonic()
    try:
        nccl(group, timeout=30.0)
    except NCCLUnavailable as error:
        return str(error), time.monotonic() - started
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_no_memory_on_one_rank_fails_on_all(gpu_ranks):
    for text, took in run(gpu_ranks, 2, _no_memory):
        assert "memory" in text and took < 15.0


def _captured_on_one_rank(group):
    comm = nccl(group)
    x = data(comm.rank, 100)
    if comm.rank == 0:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            comm.all_reduce(x)
        time.sleep(5.0)
        del graph
        comm.close()
        return None
    comm.all_reduce(x, timeout=2.0)
    error, took = until_it_raises(comm, 15.0)
    comm.close()
    return type(error), took


def test_capture_on_one_rank_only_ends_at_the_deadline(gpu_ranks):
    kind, took = run(gpu_ranks, 2, _captured_on_one_rank)[1]
    assert issubclass(kind, CommTimeoutError) and took < 8.0


def _mismatch(group, what):
    comm = nccl(group, check=True)
    x = data(comm.rank, 100)
    assert equal(comm.all_reduce(x), total(comm.world_size, 100))
    calls = [lambda: comm.all_reduce(x), lambda: comm.broadcast(x, 0)]
    if what == "shape":
        calls = [lambda: comm.all_reduce(x[: 50 + comm.rank])]
    elif comm.rank == 1:
        calls.reverse()
    try:
        for call in calls:
            call()
    except CommMismatchError as error:
        comm.close()
        return str(error)


@pytest.mark.parametrize("what", ["shape", "order"])
def test_check_mode_finds_what_differs(gpu_ranks, what):
    for text in run(gpu_ranks, 2, _mismatch, what):
        assert "ranks called different collectives" in text and "rank 1: " in text


def _in_use():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def _create_and_destroy(group, times, options):
    history = []
    for i in range(times):
        comm = nccl(group, **options)
        assert equal(comm.all_reduce_async(data(comm.rank, 1000)).wait(), total(comm.world_size, 1000))
        comm.barrier()
        comm.close()
        del comm
        if i % 10 == 9:
            time.sleep(1.0)  # NCCL frees a communicator in threads of its own
            history.append((*_in_use(), torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
    return history


def test_created_and_destroyed_a_hundred_times_without_growth(gpu_ranks):
    for history in run(gpu_ranks, 2, _create_and_destroy, 100, {}, timeout=170.0):
        threads, files, allocated, _ = zip(*history, strict=True)
        assert threads[-1] <= threads[0] + 2 and files[-1] <= files[0] + 4 and allocated[-1] <= allocated[0], history


def test_registered_memory_is_given_back(gpu_ranks):
    options = {"registered_buffers": True, "buffer_bytes": 16 << 20}
    for history in run(gpu_ranks, 2, _create_and_destroy, 30, options, timeout=120.0):
        threads, files, allocated, free = zip(*history, strict=True)
        assert threads[-1] <= threads[0] + 2 and files[-1] <= files[0] + 4 and allocated[-1] <= allocated[0], history
        assert free[0] - free[-1] < 10 * (16 << 20), f"of 20 buffers a rank: {history}"
