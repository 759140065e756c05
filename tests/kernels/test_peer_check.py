"""The Triton twin of the doctor's check of peer memory. Tier: no device (interpreter, compilation), GPU.

One process has the memory of all ranks, whose kernels are played step by step: in the interpreter nothing waits, and on
a GPU the others have come before. Compiled, the steps are one kernel, whose waits test_peer_exchange.py explores.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from tp_kernels import _native
from tp_kernels._native import native
from tp_kernels.comm.symmetric_sizes import (
    ERROR_BYTES,
    FAILED_OFFSET,
    MAX_BLOCKS,
    MAX_WORLD,
    STATE_OFFSET,
    layout_of,
)
from tp_kernels.ops.kernels import peer_check
from tp_kernels.ops.kernels.peer_check import ACCESS, EVERYTHING, PREPARE, VERIFY

MASK = (1 << 32) - 1
WORLD = 3


def pattern(seed, kind, source, target, word):
    """As the CUDA kernel has it."""
    h = (seed ^ word * 0x9E3779B1) & MASK
    h ^= ((kind * MAX_WORLD + source) * MAX_WORLD + target) * 0x85EBCA77 & MASK
    h ^= h >> 15
    return h * 0xC2B2AE3D & MASK


class Ranks:
    """Workspaces of ``world`` ranks in one process, laid out as ``Workspace`` does."""

    def __init__(self, device, nbytes, world=WORLD, max_blocks=2):
        self.world, self.nbytes, self.max_blocks = world, nbytes, max_blocks
        self.layout = layout_of(world, native.cuda_peer_check_half_bytes(world, nbytes))
        size = self.layout.flags + FAILED_OFFSET + 1024
        storage = [torch.zeros(size + 1024, dtype=torch.uint8, device=device) for _ in range(world)]
        self.memory = [s[-s.data_ptr() % 1024 :][:size] for s in storage]
        self.data = [m.data_ptr() for m in self.memory]
        self.flags = [address + self.layout.flags for address in self.data]
        pinned = device == "cuda"
        self.errors = [torch.zeros(ERROR_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(world)]
        self.tables = [torch.tensor([*self.data, *self.flags, e.data_ptr()], device=device) for e in self.errors]
        self.reports = [torch.zeros(3, world, dtype=torch.int32, device=device) for _ in range(world)]

    def flag_view(self, rank, begin, end, dtype):
        return self.memory[rank][self.layout.flags + begin : self.layout.flags + end].view(dtype)

    def words(self, rank, index, half=0):
        """A slot of a rank's half."""
        slot = -(-self.nbytes // 16) * 16
        begin = half * self.layout.half_bytes + index * slot
        return self.memory[rank][begin : begin + slot].view(torch.int32)

    def counters(self, rank, half=0):
        begin = half * self.layout.half_bytes + (self.world + 1) * (-(-self.nbytes // 16) * 16)
        return self.memory[rank][begin : begin + 4 * MAX_BLOCKS * MAX_WORLD].view(torch.int32).view(-1, MAX_WORLD)

    def play(self, steps, seed=1, ranks=None):
        for rank in range(self.world) if ranks is None else ranks:
            group = {"rank": rank, "world_size": self.world, "half_bytes": self.layout.half_bytes}
            group |= {"max_blocks": self.max_blocks, "timeout_ns": 10**10, "steps": steps}
            if steps != EVERYTHING and self.memory[rank].is_cuda:
                self.flag_view(rank, 0, STATE_OFFSET, torch.int64).fill_(1 << 40)
            peer_check.check(self.reports[rank], self.tables[rank], self.nbytes, seed, **group)

    def calls(self, rank):
        return (
            self.flag_view(rank, STATE_OFFSET, FAILED_OFFSET, torch.int64).view(MAX_BLOCKS, 4)[:, 0].unique().tolist()
        )


@pytest.fixture
def ranks(device):
    return lambda nbytes=16 * 300 + 4: Ranks(device, nbytes)


@pytest.mark.sanitize
def test_good_memory_passes_again_and_again(ranks):
    played = ranks()
    for call, seed in enumerate((1, 1, 7)):  # the halves take turns, and the third finds what the first has left
        for step in (PREPARE, ACCESS, VERIFY):
            played.play(step, seed)
        assert not any(report.any() for report in played.reports)
        assert all(played.calls(rank) == [call + 1] for rank in range(WORLD))
        half = call % 2
        stored = played.words(2, 1, half)[:5].tolist()  # in the memory of rank 2 by rank 1
        assert [word & MASK for word in stored] == [pattern(seed, 0, 1, 2, word) for word in range(5)]
        assert played.words(2, WORLD, half)[7].item() & MASK == pattern(seed, 1, 2, 0, 7)
        assert played.counters(2, half)[:2, :WORLD].tolist() == [[256, 256, 0]] * 2


@pytest.mark.parametrize("nbytes", [16, 4096 + 16])
def test_what_went_wrong_is_counted_by_kind_and_peer(ranks, nbytes):
    played = ranks(nbytes)
    played.play(PREPARE)
    played.words(1, WORLD)[-3:] ^= 5  # what rank 1 offers for loading
    played.play(ACCESS)
    played.words(2, 0)[::2] ^= 1  # what rank 0 stored into the memory of rank 2
    played.counters(2)[0, 1] -= 9  # adds of rank 1 that did not arrive there
    played.play(VERIFY)
    assert played.reports[0].tolist() == [[0, 0, 0], [0, 3, 0], [0, 0, 0]]
    assert played.reports[1].tolist() == [[0] * 3] * 3
    assert played.reports[2].tolist() == [[nbytes // 8, 0, 0], [0, 3, 0], [0, 9, 0]]


def test_stores_that_did_not_arrive_are_no_remainder_of_an_earlier_check(ranks):
    played = ranks(64)
    for _ in range(2):  # both halves hold what the third check expects
        for step in (PREPARE, ACCESS, VERIFY):
            played.play(step)
    played.play(PREPARE)
    played.play(ACCESS, ranks=(0, 1))
    played.play(VERIFY)
    assert [report[0].tolist() for report in played.reports] == [[0, 0, 16], [0, 0, 16], [0, 0, 0]]
    assert [report[2].tolist() for report in played.reports] == [[0, 0, 256], [0, 0, 256], [0, 0, 0]]


def test_after_a_failure_nothing_is_touched(ranks):
    played = ranks(64)
    played.flag_view(0, FAILED_OFFSET, FAILED_OFFSET + 4, torch.int32).fill_(1)
    before = [memory.clone() for memory in played.memory]
    played.play(EVERYTHING, ranks=(0,))
    assert all(torch.equal(a, b) for a, b in zip(before, played.memory, strict=True)) and not played.reports[0].any()


_PRINT_PTX = """
from tp_kernels.testing.aot import H100, cases_of, compile_only, pretend, recording

case = cases_of("peer_check")[0]
with pretend(H100), recording() as launches:
    case.call()
print(compile_only(launches[0], 90).asm["ptx"])
"""


def test_the_compiled_kernel_accesses_peers_between_the_two_waits():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _PRINT_PTX], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    waits = [found.start() for found in re.finditer(r"ld\.acquire\.sys", run.stdout)]
    assert len(waits) == 2
    before, between, after = run.stdout[: waits[0]], run.stdout[slice(*waits)], run.stdout[waits[1] :]
    found = [bool(re.search(r"(atom|red)\.global\.sys\.relaxed\.add", part)) for part in (before, between, after)]
    assert found == [False, True, False]
    wide = r"\.global\.(?:cg\.)?v4\.b32"
    assert re.search("st" + wide, before) and not re.search("ld" + wide, before)
    assert re.search("st" + wide, between) and re.search("ld" + wide, between)
    assert re.search("ld" + wide, after) and not re.search("st" + wide, after)
    assert not re.search(r"ld\.global\.v4", run.stdout)  # L1 may hold what was there before


@pytest.mark.gpu
@pytest.mark.parametrize("twin", ["triton", "cuda"])
@pytest.mark.parametrize("nbytes", [64, 64 << 10])
def test_two_ranks_on_two_streams(twin, nbytes):
    if twin == "cuda" and not _native.has_cuda():
        pytest.skip(f"CUDA sources {_native.build_info()['cuda']}")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    warm = Ranks("cuda", 64, world=2)  # loading a kernel may wait for the whole device
    for rank in range(2):  # returns at its first look
        warm.flag_view(rank, FAILED_OFFSET, FAILED_OFFSET + 4, torch.int32).fill_(1)
    warm.play(EVERYTHING)
    torch.cuda.synchronize()
    ranks = Ranks("cuda", nbytes, world=2)
    for seed in (1, 2, 3):
        for rank, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if twin == "triton":
                    ranks.play(EVERYTHING, seed, ranks=(rank,))
                    continue
                group = (ranks.data, ranks.flags, rank, 2, ranks.layout.half_bytes, nbytes, seed)
                tail = (ranks.reports[rank].data_ptr(), 2, 10**10, ranks.errors[rank].data_ptr(), stream.cuda_stream)
                native.cuda_peer_check(*group, *tail)
        torch.cuda.synchronize()
        assert not any(error.any() for error in ranks.errors) and not any(r.any() for r in ranks.reports)
    assert ranks.calls(0) == ranks.calls(1) == [3]
    if twin == "triton":
        assert ranks.words(1, 0)[3].item() & MASK == pattern(3, 0, 0, 1, 3)
