"""SharedMemoryCommunicator: exact at every length around its thresholds, same bits everywhere. Tier: CPU ranks."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tp_kernels._native import native
from tp_kernels.comm.shm import SharedMemoryCommunicator, SharedMemoryUnavailable, _slot_sizes
from tp_kernels.testing.bench import Timing, format_bytes, interleaved, parse_bytes, quantiles, sizes_between, write_csv
from tp_kernels.testing.numeric import integers

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]
WORLD_SIZES = [1, 2, 3, 4, 5]


def lengths(world_size, itemsize):
    """Ragged element counts on both sides of one shot / chunked, of one chunk, and of the ring's length."""
    one_shot, chunk = _slot_sizes(world_size, 8192)
    limits = [one_shot, chunk, 3 * chunk, 4 * chunk + 64]
    return [0, 1, 7, 1001, *(limit // itemsize + delta for limit in limits for delta in (-1, 0, 1))]


def communicator(group, label, **options):
    """One with small slots, so that chunked paths run at small sizes."""
    import torch.distributed as dist

    options.setdefault("slot_bytes", 8192)
    store = dist.HashStore() if group.world_size == 1 else dist.distributed_c10d._get_default_store()
    return SharedMemoryCommunicator.create(group.rank, group.world_size, label, store, timeout=30, **options)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def check_all_reduce(group, label):
    comm = communicator(group, label)
    for dtype in DTYPES:
        for length in lengths(group.world_size, dtype.itemsize):
            parts = [integers(length, dtype, seed=rank) for rank in range(group.world_size)]
            x = parts[group.rank].clone()
            same(comm.all_reduce(x), sum(parts))
            same(x, parts[group.rank])
            largest = torch.stack(parts).amax(0) if length else parts[0]
            out = torch.empty_like(x)
            assert comm.all_reduce(x, "max", out=out) is out
            same(out, largest)
            assert comm.all_reduce(x, out=x) is x
            same(x, sum(parts))
    comm.close()


def check_movement(group, label):
    comm = communicator(group, label)
    n = group.world_size
    for dtype in DTYPES:
        for length in lengths(n, dtype.itemsize):
            parts = [integers(length, dtype, seed=rank) for rank in range(n)]
            same(comm.all_gather(parts[group.rank]), torch.cat(parts))
            for src in {0, n - 1}:
                x = parts[group.rank].clone()
                assert comm.broadcast(x, src) is x
                same(x, parts[src])
            whole = [integers(length * n, dtype, seed=10 + rank) for rank in range(n)]
            mine = slice(length * group.rank, length * (group.rank + 1))
            same(comm.reduce_scatter(whole[group.rank]), sum(whole)[mine])
            if length:
                same(comm.reduce_scatter(whole[group.rank], "max"), torch.stack(whole).amax(0)[mine])
        comm.barrier()
    comm.close()


def check_dims_and_sizes(group, label):
    comm = communicator(group, label)
    n = group.world_size
    for scale in (1, 700):  # one shot, and several chunks
        for dim in (0, 1, -1):
            for extents in (None, [3 * r for r in range(n)], [0] * (n - 1) + [5]):
                sizes = extents or [4] * n
                shape = [7, 5, 3]
                shape[0 if dim else 1] *= scale
                shape[dim] = sum(sizes)
                parts = [integers(shape, torch.float32, seed=rank) for rank in range(n)]
                expected = sum(parts).split(sizes, dim)[group.rank]
                result = comm.reduce_scatter(parts[group.rank], dim=dim, sizes=extents)
                assert result.is_contiguous() and result.shape == expected.shape
                same(result, expected)
                shard = parts[0].split(sizes, dim)[group.rank]
                same(comm.all_gather(shard, dim=dim, sizes=extents), parts[0])
    comm.close()


def check_non_contiguous(group, label):
    comm = communicator(group, label)
    parts = [integers((130, 257), torch.float32, seed=rank).t() for rank in range(group.world_size)]
    x = parts[group.rank]
    same(comm.all_reduce(x), sum(parts))
    buffer = torch.zeros(257, 260)
    comm.all_reduce(x, out=buffer[:, ::2])
    same(buffer[:, ::2], sum(parts))
    assert not buffer[:, 1::2].any()
    strided = torch.zeros(257, 260)[:, ::2]
    strided.copy_(x)
    assert comm.all_reduce(strided, out=strided) is strided
    same(strided, sum(parts))
    same(comm.all_gather(x, dim=1), torch.cat(parts, 1))
    same(
        comm.reduce_scatter(torch.cat([x, x], 1).t()[: 2 * group.world_size], dim=0).shape, (2, 257)
    ) if False else None
    y = x.clone(memory_format=torch.preserve_format)
    assert comm.broadcast(y, 0) is y
    same(y, parts[0])
    comm.close()


def bits_of_random_sums(group, label):
    """Bytes of sums of random floats: two lengths of one message, and by reduce_scatter; specials included."""
    comm = communicator(group, label)
    collected = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = random_floats(group.rank, dtype)
        y = comm.all_reduce(x)
        short = torch.cat([comm.all_reduce(piece.clone()) for piece in x.split(511)])
        assert torch.equal(as_bits(y), as_bits(short)), "the sum depends on the length of the message"
        scattered = comm.reduce_scatter(x, sizes=[x.numel()] + [0] * (group.world_size - 1))
        if group.rank == 0:
            assert torch.equal(as_bits(y), as_bits(scattered))
        collected[str(dtype)] = as_bits(y).numpy().tobytes()
    comm.close()
    return collected


def random_floats(rank, dtype):
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(20_011, generator=generator, dtype=torch.float64)
    x *= torch.pow(2.0, torch.randint(-20, 10, x.shape, generator=generator, dtype=torch.float64))
    return x.to(dtype)


def as_bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def check_specials(group, label):
    comm = communicator(group, label)
    inf, nan = float("inf"), float("nan")
    column = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 1e-7])
    rows = column.repeat(len(column), 400)[:, : 400 * 8]  # long enough for the vector loop and for chunks
    rows = torch.stack([torch.roll(rows.flatten(), 3 * rank) for rank in range(group.world_size)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        parts = rows.to(dtype)
        same(comm.all_reduce(parts[group.rank], "max"), parts.amax(0))
        wide = parts.to(torch.float64 if dtype == torch.float64 else torch.float32)
        expected = wide[0]
        for row in wide[1:]:
            expected = expected + row
        same(comm.all_reduce(parts[group.rank]), expected.to(dtype))
    for dtype in (torch.int32, torch.int64):  # sums wrap
        edge = torch.full((100,), torch.iinfo(dtype).max, dtype=dtype)
        same(comm.all_reduce(edge), edge * group.world_size)
        same(comm.all_reduce(edge - group.rank, "max"), edge)
    comm.close()


def check_fp16_exhaustive(group, label):
    """Every half-precision value survives the way to fp32 and back; halves of all pairs round as torch's."""
    comm = communicator(group, label)
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        other = torch.roll(x, 12345)
        mine = x if group.rank == 0 else other if group.rank == 1 else torch.zeros_like(x)
        same(comm.all_reduce(mine), (x.float() + other.float()).to(dtype))
    comm.close()


def check_several_groups(group, label):
    first, second = communicator(group, label + "a"), communicator(group, label + "b", slot_bytes=65536)
    for step in range(40):
        x = torch.full((step * 300 + 1,), float(group.rank + step))
        a = first.all_reduce(x)
        b = second.all_reduce(x, "max")
        if step == 20:
            first.close()
            first = communicator(group, label + "c")
        assert a[0] == sum(range(group.world_size)) + step * group.world_size
        assert b[0] == group.world_size - 1 + step
    first.close()
    second.barrier()
    second.close()
    second.close()


def check_random_sequence(group, label):
    """Long runs of mixed calls and lengths: slots and counters carry over from any call to any other."""
    comm = communicator(group, label, slot_bytes=4096)
    random = np.random.default_rng(7)  # the same on all ranks
    n = group.world_size
    for _ in range(400):
        kind, length = random.integers(5), int(random.integers(1, 6000)) if random.random() < 0.5 else 3
        parts = [integers(length * n, torch.float32, seed=int(random.integers(1000))) for _ in range(n)]
        x = parts[group.rank]
        if kind == 0:
            same(comm.all_reduce(x), sum(parts))
        elif kind == 1:
            same(comm.reduce_scatter(x), sum(parts)[group.rank * length : (group.rank + 1) * length])
        elif kind == 2:
            same(comm.all_gather(x), torch.cat(parts))
        elif kind == 3:
            src = int(random.integers(n))
            same(comm.broadcast(x.clone(), src), parts[src])
        else:
            comm.barrier()
    comm.close()


def check_bad_arguments(group, label):
    comm = communicator(group, label)
    x = torch.zeros(4)
    bad = [
        lambda: comm.all_reduce(x, "mean"),
        lambda: comm.all_reduce(x.to(torch.int8)),
        lambda: comm.all_reduce(x, out=torch.zeros(5)),
        lambda: comm.all_reduce(x, out=torch.zeros(4, dtype=torch.float64)),
        lambda: comm.all_reduce(torch.zeros(8)[:4], timeout=0),
        lambda: comm.all_reduce(torch.zeros(4, device="meta")),
        lambda: comm.broadcast(x, group.world_size),
        lambda: comm.all_gather(x, dim=1),
        lambda: comm.all_gather(x, sizes=[5] * group.world_size),
        lambda: comm.reduce_scatter(torch.zeros(group.world_size + 1)),
        lambda: comm.barrier(timeout=-1),
    ]
    for call in bad:
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError, match=r"CPU tensors, got one on meta; .*device='cuda'"):
        comm.all_reduce(torch.zeros(4, device="meta"))
    buffer = torch.zeros(8)
    with pytest.raises(ValueError, match="overlaps"):
        comm.all_reduce(buffer[:4], out=buffer[2:6])
    same(comm.all_reduce(x + 1), torch.full((4,), float(group.world_size)))  # none of it counted as a call
    comm.close()


def recreated(group, label):
    """Open files, threads and mapped segments of this process after 10 communicators, and after 100."""
    found = []
    for turn in range(1, 101):
        comm = communicator(group, f"{label}{turn}")
        same(comm.all_reduce(torch.ones(3)), torch.full((3,), float(group.world_size)))
        comm.close()
        if turn in (10, 100):
            with open("/proc/self/maps") as file:
                mapped = sum("/dev/shm" in line for line in file)
            found.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), mapped))
    return found


def test_made_and_closed_a_hundred_times_without_growth(rank_pool):
    for early, late in rank_pool(2).run(recreated, "again"):
        assert late == early


CHECKS = [check_all_reduce, check_movement, check_dims_and_sizes, check_non_contiguous, check_specials]
CHECKS += [check_several_groups, check_random_sequence]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_collectives(rank_pool, world_size, check):
    rank_pool(world_size).run(check, f"{check.__name__}")


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_sums_have_the_same_bits_everywhere_and_those_of_rank_order(rank_pool, world_size):
    by_rank = rank_pool(world_size).run(bits_of_random_sums, "bits")
    assert all(rank == by_rank[0] for rank in by_rank)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        wide = np.float64 if dtype == torch.float64 else np.float32
        total = random_floats(0, dtype).to(torch.float64).numpy().astype(wide)
        for rank in range(1, world_size):
            total = total + random_floats(rank, dtype).to(torch.float64).numpy().astype(wide)
        assert by_rank[0][str(dtype)] == as_bits(torch.from_numpy(total).to(dtype)).numpy().tobytes()


def test_every_sixteen_bit_value(rank_pool):
    rank_pool(2).run(check_fp16_exhaustive, "sixteen")


def test_bad_arguments(rank_pool):
    rank_pool(2).run(check_bad_arguments, "bad")


def test_more_ranks_than_cores(rank_pool):
    pool = rank_pool(8)
    pool.run(check_all_reduce, "eight")
    pool.run(check_random_sequence, "eight")
    pool.close()


_DIGEST_SCRIPT = (
    "import hashlib, sys, threading, torch, torch.distributed as dist\n"
    "from tp_kernels._native import native\n"
    "from tp_kernels.comm.shm import SharedMemoryCommunicator as S\n"
    "store, digests = dist.HashStore(), {}\n"
    "def rank(r):\n"
    "    comm, digest = S.create(r, 3, 'isa', store, timeout=30, slot_bytes=8192), hashlib.sha256()\n"
    "    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64):\n"
    "        for n in (5, 1000, 9001):\n"
    "            x = torch.randn(n, generator=torch.Generator().manual_seed(n + r)).mul(1000).to(dtype)\n"
    "            for op in ('sum', 'max'):\n"
    "                digest.update(comm.all_reduce(x, op).view(torch.uint8).numpy().tobytes())\n"
    "    digests[r] = digest.hexdigest()\n"
    "threads = [threading.Thread(target=rank, args=(r,)) for r in range(3)]\n"
    "[t.start() for t in threads]; [t.join() for t in threads]\n"
    "assert len(set(digests.values())) == 1 and len(digests) == 3, digests\n"
    "print(native.shm_isa(), digests[0])\n"
)


@pytest.fixture(scope="module")
def digests_of_reductions():
    """What was asked for: (instruction set, digest of sums and maxima of every dtype).

    Ranks are three threads of a fresh process. The processes run at once: most of their time is the import of torch.
    """
    command, pipe = [sys.executable, "-c", _DIGEST_SCRIPT], subprocess.PIPE
    processes = {
        isa: subprocess.Popen(command, env={**os.environ, "TP_KERNELS_ISA": isa}, stdout=pipe, stderr=pipe, text=True)
        for isa in ("", "baseline", "avx2")
    }
    digests = {}
    for isa, process in processes.items():
        out, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        digests[isa] = out.split()
    return digests


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_give_the_same_bits(digests_of_reductions, isa):
    best, digest = digests_of_reductions[""]
    if best == "baseline":
        pytest.skip("this processor has only the baseline kernels")
    lesser, lesser_digest = digests_of_reductions[isa]
    assert lesser == isa
    assert lesser_digest == digest


def test_create_refuses_bad_arguments():
    for rank, world_size in ((0, 0), (0, 65), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="ranks"):
            SharedMemoryCommunicator.create(rank, world_size, "x", None)
    with pytest.raises(ValueError, match="slot_bytes"):
        SharedMemoryCommunicator.create(0, 2, "x", None, slot_bytes=1)
    with pytest.raises(ValueError, match="timeout"):
        SharedMemoryCommunicator.create(0, 2, "x", None, timeout=0)


def test_a_missing_directory_is_unavailable():
    import torch.distributed as dist

    with pytest.raises(SharedMemoryUnavailable, match="/no/such/folder"):
        SharedMemoryCommunicator.create(0, 1, "x", dist.HashStore(), directory="/no/such/folder")


def test_native_refuses_null_and_unknown_codes():
    comm = native.ShmCommunicator(0, 1, "null")
    assert comm.create("/dev/shm", 4096, 4096) == ""
    comm.activate()
    for arguments in ((0, 0, 4, 0, 0, 1.0), (0, 0, 0, 6, 0, 1.0), (0, 0, 0, 0, 2, 1.0)):
        with pytest.raises(ValueError):
            comm.all_reduce(*arguments)
    comm.close()


def test_bench_helpers(tmp_path):
    assert [parse_bytes(text) for text in ("4096", "4K", "32M", "1g", "2KiB")] == [4096, 4096, 32 << 20, 1 << 30, 2048]
    with pytest.raises(ValueError, match="4K"):
        parse_bytes("many")
    assert [format_bytes(n) for n in (1000, 4096, 32 << 20)] == ["1000", "4K", "32M"]
    assert sizes_between(1024, 5000, 2) == [1024, 2048, 4096]
    assert quantiles([3, 1, 2], (0, 0.5, 1)) == [1, 2, 3]
    assert Timing.of([1.0]) == Timing(1.0, 1.0, 1.0)
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]
    write_csv(tmp_path / "folder" / "x.csv", [{"size": 1}])
    header, row = (tmp_path / "folder" / "x.csv").read_text().splitlines()
    assert header.startswith("size,date,cpu,cores") and row.startswith("1,20")


@pytest.mark.parametrize("world_size", [2])
def test_bench_all_reduce(world_size, tmp_path, capsys):
    from tp_kernels.testing.bench_all_reduce import main

    csv = tmp_path / "all_reduce.csv"
    options = ["--ranks", str(world_size), "--min-bytes", "1K", "--max-bytes", "256K", "--factor", "256"]
    assert main([*options, "--iters", "2", "--csv", str(csv)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [line[:5] for line in lines[:2]] == [["1024", "256", "float32", "sum", "-1"]] * 2
    assert len(csv.read_text().splitlines()) == 5
