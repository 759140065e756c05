"""Matmul + all-reduce + norm in one kernel over peer memory. Tier: no device (interpreter, compilation), GPU.

One process has the memory of all ranks. In the interpreter, where nothing waits, all ranks multiply, then all reduce,
then all pull, and under the sanitizer as well; on a GPU two ranks run at once on two streams. The steps of the protocol
are those that test_peer_protocol.py explores, the waits' instructions those that test_peer_exchange.py does.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from tp_kernels.comm import symmetric_sizes as sizes
from tp_kernels.ops._gpu import A100, H100, GpuInfo, gpu_of, pretend
from tp_kernels.ops.kernels import matmul, peer_linear, peer_norm
from tp_kernels.ops.kernels.matmul import Config
from tp_kernels.ops.kernels.peer_linear_kernel import MULTIPLY, PULL, REDUCE
from tp_kernels.ops.norm import rms_norm_reference
from tp_kernels.testing.numeric import assert_close_to_reference

HALF = 1 << 19
NEVER = 10**10  # ns
STAGES = (MULTIPLY, REDUCE, PULL)
# Tiles so small that few rows are many row blocks: several bands, several columns of tiles.
SMALL = Config(16, 32, 16, num_warps=4, num_stages=2, tma=False)


class Ranks:
    """Workspaces of ``world`` ranks in one process, laid out as ``Workspace`` does."""

    def __init__(self, device, world, max_blocks=3, timeout=NEVER, half=HALF):
        self.device, self.world, self.max_blocks, self.timeout = device, world, max_blocks, timeout
        self.layout = sizes.layout_of(world, half)
        size = self.layout.total_bytes
        storage = [torch.zeros(size + 1024, dtype=torch.uint8, device=device) for _ in range(world)]
        self.memory = [s[-s.data_ptr() % 1024 :][:size] for s in storage]
        self.data = [m.data_ptr() for m in self.memory]
        self.flags = [m[self.layout.flags :][: sizes.FLAG_BYTES] for m in self.memory]
        self.errors = [
            torch.zeros(sizes.ERROR_BYTES, dtype=torch.uint8, pin_memory=device == "cuda") for _ in range(world)
        ]
        addresses = [*self.data, *(f.data_ptr() for f in self.flags)]
        self.tables = [torch.tensor([*addresses, e.data_ptr()], device=device) for e in self.errors]
        self.scratch = [torch.empty(peer_linear.scratch_floats(max_blocks), device=device) for _ in range(world)]

    def part(self, rank, begin, count, dtype=torch.int64):
        """Words of a rank's flags."""
        return self.flags[rank][begin : begin + count * dtype.itemsize].view(dtype)

    def calls(self, rank):
        return self.part(rank, sizes.STATE_OFFSET, 4 * sizes.MAX_BLOCKS).view(-1, 4)[:, 0].unique().tolist()

    def group(self, rank):
        found = dict(rank=rank, world_size=self.world, half_bytes=self.layout.half_bytes)
        return found | dict(max_blocks=self.max_blocks, timeout_ns=self.timeout)

    def linear(self, rank, call, **options):
        out, normed = call.outputs(rank)
        peer_linear.linear_all_reduce(
            out, normed, call.xs[rank], call.weights[rank], call.bias, call.residual, call.norm_weight, 1e-5,
            self.tables[rank], self.scratch[rank],
            block_m=call.block_m, config=call.config, **self.group(rank), **options
        )  # fmt: skip

    def stages(self, call):
        for work in STAGES:
            for rank in range(self.world):
                self.linear(rank, call, work=work)

    def summed(self, half, partials, call):
        """What the twins make of the partial sums, as rank 0's."""
        m, n = partials[0].shape
        results = [torch.empty_like(partials[0]) for _ in range(2)]
        group = self.group(0) | {"registered": None}
        strided = call.norm_weight is not None
        per_pack = sizes.PACK_BYTES // partials[0].element_size()
        stride = sizes.row_packs(n, partials[0].element_size()) * per_pack if strided else n
        for rank in range(1, self.world):
            start = half * self.layout.half_bytes
            there = self.memory[rank][start : start + m * stride * partials[0].element_size()]
            there.view(partials[0].dtype).view(m, stride)[:, :n] = partials[rank]
        if strided:
            rows = call.residual, call.norm_weight, *results, 1e-5, True, self.tables[0], self.scratch[0]
            peer_norm.all_reduce_norm(partials[0], call.bias, *rows, **group)
            return results
        peer_norm.all_reduce(partials[0].view(-1), results[0].view(-1), self.tables[0], **group)
        y = results[0] if call.bias is None else results[0] + call.bias
        return None, y if call.residual is None else y + call.residual


class Call:
    """Operands of all ranks; ranks have different numbers of features where ``ks`` says so."""

    def __init__(self, device, m, n, ks, dtype, follows="", config=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(device)  # noqa: E731
        self.m, self.n, self.dtype = m, n, dtype
        self.xs, self.weights = [make(m, k) for k in ks], [make(n, k) for k in ks]
        self.bias = make(n) if "b" in follows else None
        self.residual = make(m, n) if "r" in follows else None
        self.norm_weight = make(n) if "n" in follows else None
        self.config = config
        self.block_m = sizes.row_block(m, dtype.itemsize, len(ks)) if config is None else config.block_m
        self._outputs = [
            [torch.full((m, n), torch.nan, device=device, dtype=dtype) for _ in range(1 + ("n" in follows))] for _ in ks
        ]

    def outputs(self, rank):
        return (*self._outputs[rank], None)[:2]

    def partials(self):
        """By our matmul, with the tile that the kernel takes."""
        found = []
        for x, weight in zip(self.xs, self.weights, strict=True):
            out = x.new_empty(self.m, self.n)
            aligned = matmul.tma_addressable(x, weight)
            some = peer_linear.configs(gpu_of(x), self.dtype, self.block_m, self.n, x.shape[1], aligned)
            some = some if self.config is None else [self.config]
            matmul.matmul(out, x, weight, config=matmul.fewest_waves(gpu_of(x), some, self.m, self.n))
            found.append(out)
        return found

    def exact(self):
        """(normed or None, sum) in float64."""
        total = sum(x.double() @ w.double().t() for x, w in zip(self.xs, self.weights, strict=True))
        total = total if self.bias is None else total + self.bias.double()
        total = total if self.residual is None else total + self.residual.double()
        return None if self.norm_weight is None else rms_norm_reference(total, self.norm_weight.double(), 1e-5), total

    def plain(self):
        """The same by PyTorch in this dtype, as separate ops round."""
        parts = [(x.float() @ w.float().t()).to(self.dtype) for x, w in zip(self.xs, self.weights, strict=True)]
        total = torch.zeros_like(parts[0], dtype=torch.float32)
        for part in parts:
            total += part.float()
        total = total.to(self.dtype) if self.bias is None else total.to(self.dtype) + self.bias
        total = total if self.residual is None else total + self.residual
        return None if self.norm_weight is None else rms_norm_reference(total, self.norm_weight, 1e-5), total

    def check(self, twins=None):
        """All ranks have the same bits, those of the twins, and they are right."""
        plain, exact = self.plain(), self.exact()
        for rank in range(len(self.xs)):
            summed, normed = self.outputs(rank)
            for name, found, first, ours, right, bits in zip(
                ("sum", "normed"),
                (summed, normed),
                self.outputs(0),
                plain[::-1],
                exact[::-1],
                (None, None) if twins is None else twins[::-1],
                strict=True,
            ):
                if found is not None:
                    assert torch.equal(found, first), f"rank {rank}: {name} has other bits than on rank 0"
                    assert bits is None or torch.equal(found, bits), f"{name} has other bits than the twins"
                    assert_close_to_reference(found, ours, right, name=name)


# Values --------------------------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="one rank after the other: the interpreter only")

CASES = [
    # ranks' features, m, n, what follows, tile
    (torch.float16, (64, 64), 66, 96, "brn", None),
    (torch.float32, (33, 7), 70, 77, "brn", SMALL),
    (torch.float16, (16, 8, 40), 52, 40, "r", SMALL),
    (torch.float32, (8, 3, 8, 9), 50, 24, "b", SMALL),
    (torch.float32, (8, 16), 1, 24, "", None),
]


@pytest.fixture(autouse=True)
def short_bands(monkeypatch):
    """Bands of a step, so that few rows are several."""
    monkeypatch.setattr(peer_linear, "_BAND", 1)


@interpreted
@pytest.mark.parametrize(("kind", "ks", "m", "n", "follows", "config"), CASES)
def test_values_are_right_and_have_the_bits_of_the_twins(device, kind, ks, m, n, follows, config):
    ranks, call = Ranks(device, len(ks)), Call(device, m, n, ks, kind, follows, config)
    ranks.stages(call)
    assert [ranks.calls(rank) for rank in range(ranks.world)] == [[1]] * ranks.world
    twins = ranks.summed(1, call.partials(), call)  # the second call: the other half
    assert ranks.calls(0) == [2] and ranks.calls(1) == [1]
    call.check(twins)


@interpreted
def test_tiles_columns_and_grids_are_a_ranks_own_business(device):
    ranks, call = Ranks(device, 3, max_blocks=5), Call(device, 52, 70, (16, 8, 40), torch.float16, "brn", SMALL)
    for work in STAGES:
        for rank, (columns, blocks) in enumerate(((32, 1), (16, 5), (128, 2))):
            ranks.max_blocks, call.config = blocks, SMALL._replace(block_n=columns)
            ranks.linear(rank, call, work=work)
    call.check()
    for rank in range(3):
        counters = ranks.part(rank, sizes.MULTIPLIED_OFFSET, 2 * sizes.MAX_ROW_BLOCKS + 1, torch.int32)
        assert not counters.any() and ranks.calls(rank) == [1]


@interpreted
def test_gpus_without_tma_and_operands_off_16_bytes(device):
    with pretend(A100):
        ranks, call = Ranks(device, 2), Call(device, 20, 48, (64, 32), torch.float16, "brn")
        ranks.stages(call)
        call.check(ranks.summed(1, call.partials(), call))
    call = Call(device, 30, 8, (64, 64), torch.float16)
    call.xs = [torch.cat([x, x], 1)[:, 1:65] for x in call.xs]
    assert not matmul.tma_addressable(call.xs[0])
    ranks = Ranks(device, 2)
    ranks.stages(call)
    call.check(ranks.summed(1, call.partials(), call))


@interpreted
def test_flags_and_counters_after_each_kind_of_work(device):
    """Calls of changing sizes: flags hold the number of the call for its row blocks, counters are back at zero."""
    ranks = Ranks(device, 3)
    before = [torch.zeros(2 * sizes.MAX_ROW_BLOCKS, dtype=torch.int64) for _ in range(3)]
    for number, m in enumerate((40, 16, 60)):
        call = Call(device, m, 20, (16, 16, 16), torch.float32, config=SMALL, seed=m)
        blocks, value = -(-m // call.block_m), 4 * number + 1
        expected = [flags.clone() for flags in before]
        for work in STAGES:
            for rank in range(3):
                ranks.linear(rank, call, work=work)
            for rank, flags in enumerate(expected):
                mine = len(range(rank, blocks, 3))
                if work == MULTIPLY:
                    flags[: 3 * mine] = value  # of every step, from every rank
                if work == REDUCE:
                    flags[sizes.MAX_ROW_BLOCKS :][:blocks] = value + 1
                assert torch.equal(ranks.part(rank, sizes.ARRIVED_OFFSET, len(flags)), flags), f"rank {rank}, {work}"
                counters = ranks.part(rank, sizes.MULTIPLIED_OFFSET, 2 * sizes.MAX_ROW_BLOCKS + 1, torch.int32)
                assert not counters.any()
                assert ranks.calls(rank) == [number + (work == PULL)]
        before = expected
        call.check()
        assert not any(ranks.part(rank, sizes.STATE_OFFSET, 256).view(-1, 4)[:, 1:].any() for rank in range(3))


@interpreted
def test_halves_take_turns_and_no_more_is_written_than_was_planned(device):
    world, m, n = 3, 20, 40
    rows = sizes.linear_rows(m, n, 4, world, HALF)
    assert rows == min(HALF // (4 * n * 64 * world), 128 // world) * 64 * world >= m
    ranks = Ranks(device, world)
    used = world * 16 * n * 4  # one step of the small tile
    halves = [torch.zeros(used, dtype=torch.uint8)] * world
    for number in range(3):
        ranks.stages(Call(device, m, n, (16,) * world, torch.float32, config=SMALL, seed=number))
        start, other = (ranks.layout.half_bytes * (turn % 2) for turn in (number, number + 1))
        for rank, memory in enumerate(ranks.memory):
            assert memory[start : start + used].any() == (rank < 2), "there are two row blocks"
            assert torch.equal(memory[other : other + used], halves[rank]), "the other half is another call's"
            assert not memory[start + used : start + ranks.layout.half_bytes].any()
            assert not memory[2 * ranks.layout.half_bytes : ranks.layout.flags].any()
        halves = [memory[start : start + used].clone() for memory in ranks.memory]


def test_how_many_rows_a_call_takes():
    half = 64 << 20
    assert sizes.linear_rows(4096, 8192, 2, 4, half) == 4096 and sizes.linear_rows(8192, 4096, 2, 8, half) == 8192
    assert sizes.linear_rows(1 << 20, 64, 2, 2, half) == 128 * 128, "row blocks have flags of their own"
    assert sizes.linear_rows(300, 4096, 2, 3, half) % (64 * 3) == 0
    assert sizes.linear_rows(4096, 1 << 20, 2, 8, half) == 0 == sizes.linear_rows(4096, 0, 2, 8, half)
    assert sizes.row_block(512, 2, 4) == 128 and sizes.row_block(511, 2, 4) == 64 == sizes.row_block(4096, 4, 2)
    assert sizes.TAKEN_OFFSET + 4 <= sizes.FLAG_BYTES


def test_tiles_fit_every_gpu():
    small = GpuInfo("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188)
    for info in (H100, A100, small):
        for dtype in (torch.float16, torch.float32):
            for block_m in {64, 64 if dtype == torch.float32 else 128}:
                for n, aligned in ((4096, True), (1001, False)):
                    found = peer_linear.configs(info, dtype, block_m, n, 1024, aligned)
                    assert found and all(config.block_m == block_m for config in found)
                    for config in found:
                        buffers = (config.block_m + config.block_n) * config.block_k * config.num_stages
                        assert buffers * dtype.itemsize <= info.max_shared


@interpreted
def test_after_a_failure_nothing_is_sent_or_counted(device):
    ranks, call = Ranks(device, 2), Call(device, 130, 64, (16, 16), torch.float32, "brn")
    ranks.part(0, sizes.FAILED_OFFSET, 1, torch.int32).fill_(1)
    ranks.linear(0, call)
    assert all(t.isnan().all() for t in call.outputs(0)) and ranks.calls(0) == [0]
    assert not ranks.memory[0][: ranks.layout.flags].any() and not ranks.memory[1].any()
    assert ranks.flags[0].count_nonzero() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(3, 8)}, r"expected residual \[20, 8\]"),
        ({"residual": torch.zeros(8, 20).t()}, "residual with dense rows"),
        ({"residual": torch.zeros(20, 9)[:, :8]}, "residual to be contiguous"),
        ({"block_m": 1 << 14}, f"staged in {HALF} bytes, got 20 rows of 8 columns on 2 ranks"),
        ({"bias": torch.zeros(9)}, r"expected a dense bias \[8\]"),
        ({"weights": [torch.zeros(8, 5)]}, r"expected weight|expected x"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    call = Call("cpu", 20, 8, (16,), torch.float32)
    vars(call).update(change)
    with pretend(H100), pytest.raises(ValueError, match=message):
        Ranks("cpu", 2).linear(0, call)


# Compiled code -------------------------------------------------------------------------------------------------------

_PRINT_PTX = """
from tp_kernels.testing.aot import H100, cases_of, compile_only, pretend, recording

with pretend(H100), recording() as launches:
    cases_of("peer_linear")[0].call()
print(compile_only(launches[0], 90).asm["ptx"])
"""


def test_peers_data_is_read_behind_the_waits_and_flags_follow_the_stores():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _PRINT_PTX], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    text = run.stdout
    places = lambda pattern: [m.start() for m in re.finditer(pattern, text)]  # noqa: E731
    waits, data = places(r"ld\.acquire\.sys\.global\.b64"), places(r"ld\.global\.cg\.v4\.b32")
    # What makes "failed" equal in all threads, rows that were reduced here, rows of others.
    assert len(waits) == 3 and data and min(data) > waits[1]
    raises, counts = places(r"st\.release\.sys\.global\.b64"), places(r"atom\.global\.sys\.acq_rel\.add")
    assert len(raises) == len(counts) == 2
    for count, flag in zip(counts, raises, strict=True):
        between = text[count:flag]
        assert "bar.sync" in between, "the thread that counts is not the one that raises"
        assert "ld.global.cg" not in between and "st.global.v4" not in between
    tile = places(r"st\.global\.v4\.b32")[0]
    assert places("wgmma.mma_async")[-1] < tile < counts[0] and "bar.sync" in text[tile : counts[0]]
    assert len(places(r"atom\.global\.gpu\.acq_rel\.add")) == 1, "how an entry of the list is taken"
    divisor = re.search(r"div\.full\.f32\s+%\w+, %\w+, (%\w+);", text)
    assert divisor and re.search(rf"cvt\.rn\.f32\.s32\s+{divisor[1]},", text)


# On a GPU ------------------------------------------------------------------------------------------------------------


class Pair(Ranks):
    """Two ranks on two streams, each with half of the GPU; with more than 64 blocks where the GPU has more than 128."""

    def __init__(self, **options):
        blocks = torch.cuda.get_device_properties("cuda").multi_processor_count // 2
        super().__init__("cuda", 2, max_blocks=blocks, half=8 << 20, **options)
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def run(self, act):
        for rank, stream in enumerate(self.streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                act(rank)
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


def warm(call):
    """Compile and load without waiting for anybody: loading may wait for the whole device."""
    alone = Pair()
    for begin in (sizes.ARRIVED_OFFSET, sizes.FINISHED_OFFSET):
        alone.part(0, begin, sizes.MAX_ROW_BLOCKS).fill_(1 << 40)
    alone.linear(0, call)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize(("kind", "ks", "m", "n", "follows", "config"), CASES[:2])
def test_small_for_the_sanitizer(kind, ks, m, n, follows, config):
    """One kind of work after the other finds what it waits for; then a rank does all, with the other's flags raised."""
    ranks = Ranks("cuda", 2)
    for number in (1, 2):
        call = Call("cuda", m, n, ks, kind, follows, config, seed=number)
        ranks.stages(call)
        torch.cuda.synchronize()
        call.check()
        assert ranks.calls(0) == ranks.calls(1) == [number]
        for rank in range(2):
            counters = ranks.part(rank, sizes.MULTIPLIED_OFFSET, 2 * sizes.MAX_ROW_BLOCKS + 1, torch.int32)
            assert not counters.any() and not ranks.errors[rank].any()
    warm(call)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("follows", ["", "brn"])
def test_two_ranks_at_once_and_in_graphs(kind, follows):
    pair = Pair()
    for ks, m, n in (((512, 512), 1000, 512), ((200, 328), 77, 136), ((64, 33), 300, 67)):
        call = Call("cuda", m, n, ks, kind, follows)
        warm(call)
        graphs = []
        for rank, stream in enumerate(pair.streams):
            stream.wait_stream(torch.cuda.current_stream())
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[rank], stream=stream):
                pair.linear(rank, call)
                pair.linear(rank, call)
        for turn in range(6):
            fresh = Call("cuda", m, n, ks, kind, follows, seed=turn)
            for old, new in zip(call.xs, fresh.xs, strict=True):
                old.copy_(new)
            for rank in range(2):
                for out in call.outputs(rank)[: 1 + ("n" in follows)]:
                    out.fill_(torch.nan)
            pair.run((lambda rank: pair.linear(rank, call)) if turn % 3 == 0 else lambda rank: graphs[rank].replay())  # noqa: B023
            torch.cuda.synchronize()
            assert not any(error.any() for error in pair.errors)
            call.check()
            partials = call.partials()
            total = (partials[0].float() + partials[1].float()).to(kind)
            total = total if call.bias is None else total + call.bias + call.residual
            assert torch.equal(call.outputs(1)[0], total)
        for rank in range(2):
            counters = pair.part(rank, sizes.MULTIPLIED_OFFSET, 2 * sizes.MAX_ROW_BLOCKS + 1, torch.int32)
            assert not counters.any() and len(pair.calls(rank)) == 1


@pytest.mark.gpu
def test_a_rank_that_does_not_come_is_named():
    pair, call = Pair(timeout=50 * 10**6), Call("cuda", 500, 256, (128, 128), torch.bfloat16)
    warm(call)
    for out in call.outputs(0)[:1]:
        out.fill_(torch.nan)
    pair.linear(0, call)
    torch.cuda.synchronize()
    magic, kind, rank, _, call_number, _, phase, waiter = pair.errors[0][:32].view(torch.int32).tolist()
    assert (magic, kind, rank, call_number, waiter) == (sizes.ERROR_MAGIC, 1, 1, 0, 0) and phase in (0, 1)
    assert call.outputs(0)[0].isnan().all() and pair.calls(0) == [0]
    pair.timeout = NEVER
    pair.linear(0, call)  # returns at once
    torch.cuda.synchronize()
    assert call.outputs(0)[0].isnan().all() and pair.calls(0) == [0]
