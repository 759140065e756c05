"""Values of the peer-memory kernels. Tier: GPU, one process.

One process has the memory of all ranks. ``Played`` runs the kernel of one rank: flags and data of the others are put in
place before, so nothing waits and any number of ranks can be tried, under the sanitizer too. ``Pair`` runs two ranks on
two streams, a few blocks each. Tests with a process for each rank are in tests/gpu_ranks.
"""

import pytest
import torch

from tp_kernels import _native
from tp_kernels._native import native
from tp_kernels.ops.norm import add_rms_norm_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _native.has_cuda(), reason=f"CUDA sources {_native.build_info()['cuda']}"),
]
CONSTANTS = native.cuda_peer_constants()
ONE_SHOT, TWO_SHOT, LAMPORT = 0, 1, 3
EMPTY = -(2**31)  # CONSTANTS["empty_word"] as int32
HALF = 1 << 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NEVER = 10**10  # ns


class Ranks:
    """Workspaces of ``world`` ranks on one GPU."""

    def __init__(self, world, max_blocks=8, timeout=NEVER):
        self.world, self.max_blocks, self.timeout = world, max_blocks, timeout
        self.half, self.registered, flags, self.lamport, total = native.cuda_peer_layout(world, HALF, 2 * HALF)
        storage = [torch.zeros(total + 1024, dtype=torch.uint8, device="cuda") for _ in range(world)]
        self.memory = [s[-s.data_ptr() % 1024 :][:total] for s in storage]
        self.data = [m.data_ptr() for m in self.memory]
        self.flags = [address + flags for address in self.data]
        self.signals = [m[flags : flags + CONSTANTS["max_blocks"] * 128].view(torch.int64) for m in self.memory]
        self.errors = [torch.zeros(CONSTANTS["error_bytes"], dtype=torch.uint8).pin_memory() for _ in range(world)]
        for address in self.flags:
            native.cuda_peer_prepare(address, world, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()

    def view(self, rank, offset, n, dtype):
        return self.memory[rank][offset : offset + n * dtype.itemsize].view(dtype)

    def slot(self, owner, buffer, source, n, dtype):
        offset = self.lamport + (buffer * self.world + source) * CONSTANTS["lamport_bytes"]
        return self.view(owner, offset, n, dtype)

    def all_reduce(self, rank, algorithm, x, out):
        stream = torch.cuda.current_stream().cuda_stream
        tail = (self.max_blocks, self.timeout, self.errors[rank].data_ptr(), stream)
        group = (self.data, self.flags, 0, rank, self.world, self.half)
        code = _native.dtype_code(x.dtype)
        native.cuda_peer_all_reduce(algorithm, *group, x.data_ptr(), out.data_ptr(), x.numel(), code, *tail)

    def norm(self, rank, algorithm, x, bias, residual, weight, normed, summed, rounds=True, gather=True):
        stream = torch.cuda.current_stream().cuda_stream
        tail = (self.max_blocks, self.timeout, self.errors[rank].data_ptr(), stream)
        group = (self.data, self.flags, rank, self.world, self.half)
        addresses = [0 if t is None else t.data_ptr() for t in (x, bias, residual, weight)]
        outputs = (normed.data_ptr(), summed.data_ptr(), *x.shape, _native.dtype_code(x.dtype), rounds, gather)
        native.cuda_peer_all_reduce_norm(algorithm, *group, *addresses, 1e-6, *outputs, *tail)


class Played(Ranks):
    """Only ``rank`` runs; the others have raised all their flags for ever."""

    def __init__(self, world, rank, **options):
        super().__init__(world, **options)
        self.rank = rank
        self.signals[rank].fill_(1 << 40)

    def play(self, offset, xs):
        """Puts the other ranks' tensors at ``offset`` of their memory."""
        for r, x in enumerate(xs):
            if r != self.rank:
                self.view(r, offset, x.numel(), x.dtype).copy_(x.flatten())


def operands(world, shape, dtype, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(world)]


def ordered_sum(xs):
    total = torch.zeros(xs[0].shape, device="cuda")
    for x in xs:
        total += x.float()
    return total.to(xs[0].dtype)


def misaligned(x):
    """The same values one element behind a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


SIZES = [1, 7, 4096, 30_001]
WORLDS = [(2, 1), (3, 1), (4, 2), (8, 5)]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("world", "rank"), WORLDS)
def test_one_shot_is_the_ordered_sum(dtype, world, rank):
    ranks = Played(world, rank)
    for call, n in enumerate(SIZES):  # one workspace: the halves take turns
        xs = operands(world, n, dtype, n)
        ranks.play(call % 2 * ranks.half, xs)
        x = misaligned(xs[rank]) if call == 3 else xs[rank]
        out = torch.full((n + 8,), 7.0, device="cuda", dtype=dtype)
        ranks.all_reduce(rank, ONE_SHOT, x, out[:n])
        same(out[:n], ordered_sum(xs))
        same(out[n:], torch.full_like(out[n:], 7.0))
        for peer in set(range(world)) - {rank}:
            expected = native.cuda_peer_signal_value(call, 0)
            assert int(ranks.signals[peer][rank]) == expected  # block 0 has told every peer


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("world", "rank"), WORLDS)
def test_two_shot_is_the_ordered_sum(dtype, world, rank):
    ranks, width = Played(world, rank), 16 // dtype.itemsize
    for call, n in enumerate(SIZES):
        xs, packs = operands(world, n, dtype, n), -(-n // width)
        expected, half = ordered_sum(xs), call % 2 * ranks.half
        ranks.play(half, xs)
        for peer in set(range(world)) - {rank}:  # which have reduced their slices
            begin, end = (min(p * width, n) for p in native.cuda_peer_slice(packs, world, peer))
            ranks.view(peer, half, n, dtype)[begin:end] = expected[begin:end]
        x = misaligned(xs[rank]) if call == 3 else xs[rank].clone()
        out = x if call == 2 else misaligned(torch.zeros_like(x))
        ranks.all_reduce(rank, TWO_SHOT, x, out)
        same(out, expected)
        begin, end = (min(p * width, n) for p in native.cuda_peer_slice(packs, world, rank))
        same(ranks.view(rank, half, n, dtype)[begin:end], expected[begin:end])  # where peers fetch it


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_tensors_are_read_and_written_in_place(dtype):
    world, rank, n = 4, 1, 5001
    ranks = Played(world, rank)
    xs, there, beyond = operands(world, n, dtype), ranks.registered, ranks.registered + HALF
    expected = ordered_sum(xs)
    x = ranks.view(rank, there, n, dtype)
    ranks.play(there, xs)
    x.copy_(xs[rank])
    out = torch.empty_like(xs[rank])
    ranks.all_reduce(rank, ONE_SHOT, x, out)
    same(out, expected)
    width = 16 // dtype.itemsize
    begin, end = (min(p * width, n) for p in native.cuda_peer_slice(-(-n // width), world, rank))
    for target in (beyond, there):  # another tensor, and in place
        ranks.all_reduce(rank, TWO_SHOT, x, ranks.view(rank, target, n, dtype))
        for r in range(world):  # the slice is on all ranks; peers would write the rest
            same(ranks.view(r, target, n, dtype)[begin:end], expected[begin:end])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("world", "rank"), WORLDS)
def test_lamport_is_the_ordered_sum_and_empties_its_buffers(dtype, world, rank):
    ranks, width = Played(world, rank), 16 // dtype.itemsize
    previous = 0
    for call, n in enumerate([4096, 3, 20_001, 4096, 1]):
        xs, packs = operands(world, n, dtype, n), -(-n // width)
        for x in xs:
            x[::3] = -0.0
        xs[rank][n // 2] = float("inf")
        buffer = native.cuda_peer_lamport_buffer(call)
        for peer in set(range(world)) - {rank}:
            slot = ranks.slot(rank, buffer, peer, packs * width, dtype)
            slot.zero_()
            slot[:n] = xs[peer]
            words = slot.view(torch.int32)
            words[words == EMPTY] = 0
        out = torch.full_like(xs[0], 7.0)
        ranks.all_reduce(rank, LAMPORT, xs[rank], out)
        same(out, ordered_sum(xs))
        assert not torch.signbit(out[::3]).any()  # the sum of all -0.0 is +0.0, as on all ordered paths
        for peer in set(range(world)) - {rank}:
            sent = ranks.slot(peer, buffer, rank, packs * width, dtype)
            assert (sent.view(torch.int32) != EMPTY).all()
            assert torch.equal(sent[:n], xs[rank])
            sent.view(torch.int32).fill_(EMPTY)  # as the peer would, a call later
            emptied = ranks.slot(rank, native.cuda_peer_lamport_emptied(call), peer, previous, torch.int32)
            assert (emptied == EMPTY).all()
        previous = packs * 4


def compose(xs, bias, residual, weight):
    total = ordered_sum(xs)
    return add_rms_norm_reference(total if bias is None else total + bias, residual, weight)


# [rows, width]: a decode row, a ragged width, rows beyond the blocks, a wide row
SHAPES = [(1, 4096), pytest.param(3, 577, marks=pytest.mark.sanitize), (40, 512), (2, 8192), (5, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("world", "rank"), [(2, 0), (3, 1), (4, 3), (8, 2)])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_norm_has_the_same_bits_in_all_forms(dtype, world, rank, rows, width, with_bias):
    xs = operands(world, (rows, width), dtype, rows)
    residual, weight, bias = operands(3, (rows, width), dtype, 99)
    weight, bias = weight[0].contiguous(), bias[0].contiguous() if with_bias else None
    reference, total = compose(xs, bias, residual, weight)
    packs = -(-width * dtype.itemsize // 16)
    padded = packs * 16 // dtype.itemsize

    def pad(x):
        return torch.nn.functional.pad(x, (0, padded - width))

    ranks = Played(world, rank)
    ranks.play(0, [pad(x) for x in xs])
    normed, summed = torch.empty_like(residual), torch.empty_like(residual)
    ranks.norm(rank, ONE_SHOT, xs[rank], bias, residual, weight, normed, summed)
    same(summed, total)
    # The order of the sum of squares differs from the reference's: the last bit before the weight, and after it.
    torch.testing.assert_close(normed, reference, rtol=max(2.02 * torch.finfo(dtype).eps, 1e-6), atol=1e-30)

    ranks.play(ranks.half, [pad(x) for x in xs])
    area = rows * packs * 16
    for peer in set(range(world)) - {rank}:
        begin, end = native.cuda_peer_slice(rows, world, peer)
        for offset, values in ((0, normed), (area, summed)):
            kept = ranks.view(peer, ranks.half + offset, rows * padded, dtype).view(rows, padded)
            kept[begin:end] = pad(values)[begin:end]
    again, sums = torch.zeros_like(normed), residual.clone()
    ranks.norm(rank, TWO_SHOT, misaligned(xs[rank]), bias, sums, weight, again, sums)  # the residual becomes the sum
    same(again, normed)
    same(sums, summed)

    for peer in set(range(world)) - {rank}:
        slot = ranks.slot(rank, 0, peer, rows * padded, dtype)
        slot.copy_(pad(xs[peer]).flatten())
    if packs <= CONSTANTS["max_lamport_row_packs"]:
        ranks.norm(rank, LAMPORT, xs[rank], bias, residual, weight, again.zero_(), sums.zero_())
        same(again, normed)
        same(sums, summed)


@pytest.mark.parametrize("gather", [False, True])
def test_fused_norm_stores_its_rows_on_all_ranks(gather):
    world, rank, rows, width, dtype = 4, 2, 10, 1024, torch.bfloat16
    ranks = Played(world, rank)
    xs = operands(world, (rows, width), dtype)
    residual, weight = operands(2, (rows, width), dtype, 1)
    ranks.play(ranks.registered, xs)
    x = ranks.view(rank, ranks.registered, rows * width, dtype).view(rows, width)
    x.copy_(xs[rank])
    sums = ranks.view(rank, ranks.registered + HALF, rows * width, dtype).view(rows, width)
    ranks.norm(rank, TWO_SHOT, x, None, residual, weight[0], x, sums, gather=gather)
    reference, total = compose(xs, None, residual, weight[0])
    begin, end = native.cuda_peer_slice(rows, world, rank)
    for r in range(world):
        mine = ranks.view(r, ranks.registered, rows * width, dtype).view(rows, width)[begin:end]
        torch.testing.assert_close(mine, reference[begin:end], rtol=0.016, atol=1e-30)
        kept = ranks.view(r, ranks.registered + HALF, rows * width, dtype).view(rows, width)
        same(kept[begin:end], total[begin:end] if gather or r == rank else torch.zeros_like(total[begin:end]))
        assert not kept[:begin].any() and not kept[end:].any()


def test_fused_norm_in_fp32_until_the_end():
    world, rank, rows, width = 4, 1, 6, 4096
    ranks = Played(world, rank)
    xs = operands(world, (rows, width), torch.bfloat16)
    residual, weight = operands(2, (rows, width), torch.bfloat16, 1)
    ranks.play(0, xs)
    normed, summed = torch.empty_like(residual), torch.empty_like(residual)
    ranks.norm(rank, ONE_SHOT, xs[rank], None, residual, weight[0], normed, summed, rounds=False)
    exact = sum(x.double() for x in xs) + residual.double()
    expected = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6) * weight[0].double()
    torch.testing.assert_close(summed.double(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=2**-8 * 1.01, atol=1e-6)


# Two ranks at once ----------------------------------------------------------------------------------------------------


class Pair(Ranks):
    """Two ranks on two streams; grids so small that both kernels are on the GPU at once."""

    def __init__(self, timeout=2 * 10**9):
        super().__init__(2, max_blocks=3, timeout=timeout)
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def run(self, call):
        """``call(rank)`` on the stream of each rank."""
        for rank, stream in enumerate(self.streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call(rank)
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)

    def check(self):
        torch.cuda.synchronize()
        assert not any(error.any() for error in self.errors), self.errors


def test_calls_of_all_kinds_and_sizes_follow_each_other():
    pair = Pair()
    generator = torch.Generator().manual_seed(5)
    results = []
    for step in range(60):
        algorithm = (ONE_SHOT, TWO_SHOT, LAMPORT)[int(torch.randint(3, (1,), generator=generator))]
        n = int(torch.randint(1, 60_000, (1,), generator=generator))
        xs = operands(2, n, torch.bfloat16, step)
        outs = [torch.empty_like(x) for x in xs]
        pair.run(lambda rank, a=algorithm, xs=xs, outs=outs: pair.all_reduce(rank, a, xs[rank], outs[rank]))
        results.append((xs, outs))
    pair.check()
    for xs, outs in results:
        same(outs[0], ordered_sum(xs))
        same(outs[1], outs[0])


def test_graphs_replay():
    pair = Pair()
    xs = operands(2, 5000, torch.float16)
    outs = [[torch.zeros_like(x) for _ in range(3)] for x in xs]
    algorithms = (ONE_SHOT, TWO_SHOT, LAMPORT)
    for algorithm in algorithms:  # kernels are loaded at their first launch, which is not for a capture
        pair.run(lambda rank, a=algorithm: pair.all_reduce(rank, a, xs[rank], outs[rank][0]))
    pair.check()
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    for rank, graph in enumerate(graphs):  # an odd number of calls of either kind of counting
        with torch.cuda.graph(graph, stream=pair.streams[rank]):
            for algorithm, out in zip(algorithms, outs[rank], strict=True):
                pair.all_reduce(rank, algorithm, xs[rank], out)
            pair.all_reduce(rank, ONE_SHOT, outs[rank][2], outs[rank][2])
    for replay in range(7):
        for x, fresh in zip(xs, operands(2, 5000, torch.float16, replay), strict=True):
            x.copy_(fresh)
        pair.run(lambda rank: graphs[rank].replay())
        pair.check()
        expected = ordered_sum(xs)
        for rank in range(2):
            same(outs[rank][0], expected)
            same(outs[rank][1], expected)
            same(outs[rank][2], ordered_sum([expected, expected]))


@pytest.mark.parametrize("algorithm", [ONE_SHOT, TWO_SHOT, LAMPORT])
def test_a_rank_that_does_not_come_is_named_and_later_calls_return(algorithm):
    pair = Pair(timeout=50 * 10**6)
    x = torch.ones(1000, device="cuda")
    out = torch.zeros_like(x)
    pair.all_reduce(0, algorithm, x, out)
    torch.cuda.synchronize()
    magic, kind, rank, _ = pair.errors[0].view(torch.int32)[:4].tolist()
    assert (magic, kind, rank) == (CONSTANTS["error_magic"], 2 if algorithm == LAMPORT else 1, 1)
    assert not out.any()
    pair.timeout = NEVER
    for later in (ONE_SHOT, TWO_SHOT, LAMPORT):
        pair.all_reduce(0, later, x, out)
    torch.cuda.synchronize()
    assert not out.any()


def test_peer_check_finds_nothing_wrong():
    pair = Pair()
    reports = [torch.full((3, 2), 9, dtype=torch.int32, device="cuda") for _ in range(2)]

    def check(rank, nbytes):
        stream = torch.cuda.current_stream().cuda_stream
        tail = (pair.max_blocks, pair.timeout, pair.errors[rank].data_ptr(), stream)
        report = reports[rank].data_ptr()
        native.cuda_peer_check(pair.data, pair.flags, rank, 2, pair.half, nbytes, 123, report, *tail)

    for nbytes in (16, 4096, 200_000):
        pair.run(lambda rank, nbytes=nbytes: check(rank, nbytes))
        pair.check()
        assert not any(report.any() for report in reports)


@pytest.mark.sanitize
def test_peer_check_finds_what_is_wrong():
    """A peer that has only raised its flags has neither stored, nor written what is loaded, nor added."""
    alone, report = Played(2, 0), torch.full((3, 2), 9, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    tail = (4, NEVER, alone.errors[0].data_ptr(), stream)
    native.cuda_peer_check(alone.data, alone.flags, 0, 2, alone.half, 4096, 1, report.data_ptr(), *tail)
    assert report[:, 1].tolist() == [1024, 1024, 256]  # words, words, adds of one block
    assert not report[:, 0].any()
