"""Peer-memory kernels: sizes, grids, layout and argument checks. Tier: no device."""

import itertools

import pytest

from tp_kernels import _native
from tp_kernels._native import native

needs_build = pytest.mark.skipif(not _native.has_cuda(), reason=f"CUDA sources {_native.build_info()['cuda']}")
CONSTANTS = native.cuda_peer_constants()
ONE_SHOT, TWO_SHOT, MULTIMEM, LAMPORT, MULTIMEM_ONE_SHOT = range(5)
HALF = 1 << 20

# Sizes, grids, slices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("units", [0, 1, 2, 7, 64, 1000, 4097])
def test_slices_cover_everything_once(world, units):
    slices = [native.cuda_peer_slice(units, world, rank) for rank in range(world)]
    assert slices[0][0] == 0 and slices[-1][1] == units
    assert all(a[1] == b[0] and a[0] <= a[1] for a, b in itertools.pairwise(slices))
    assert max(end - begin for begin, end in slices) == slices[0][1] - slices[0][0]


@pytest.mark.parametrize("max_blocks", [1, 3, 24, 64, 1000])
def test_grids_fit_and_grow_with_the_size(max_blocks):
    for algorithm, world in itertools.product(range(5), (2, 3, 8)):
        previous = 0
        for shift in range(1, 31):
            blocks, threads = native.cuda_peer_all_reduce_shape(algorithm, 1 << shift, world, max_blocks)
            assert 1 <= blocks <= min(max_blocks, CONSTANTS["max_blocks"]) and threads in (256, 512)
            assert blocks * threads >= previous
            previous = blocks * threads


def test_small_messages_have_a_thread_for_every_pack():
    for nbytes in (16, 2048, 65536, 65537):
        blocks, threads = native.cuda_peer_all_reduce_shape(LAMPORT, nbytes, 4, 32)
        assert blocks * threads * CONSTANTS["pack_bytes"] >= nbytes


@pytest.mark.parametrize("max_blocks", [1, 16, 64])
def test_norm_shapes_hold_the_row(max_blocks):
    for algorithm, rows, packs, world in itertools.product(
        (ONE_SHOT, TWO_SHOT, LAMPORT), (1, 5, 64, 4096), (1, 8, 33, 512, 1024, 2048), (2, 8)
    ):
        if algorithm == LAMPORT and packs > CONSTANTS["max_lamport_row_packs"]:
            continue
        blocks, threads, row_threads, thread_packs = native.cuda_peer_norm_shape(
            algorithm, rows, packs, world, max_blocks
        )
        assert 1 <= blocks <= max_blocks and threads <= 512 and threads % row_threads == 0 and row_threads % 32 == 0
        assert row_threads * thread_packs >= packs and thread_packs in (1, 2, 4)
        assert thread_packs <= 2 or algorithm != LAMPORT
        groups = threads // row_threads
        assert row_threads == 32 or groups <= 8  # named barriers 1 to 8
        units = -(-rows // world) if algorithm == TWO_SHOT else rows
        assert (blocks - 1) * groups < units, "a block without rows"


def test_layout_parts_follow_each_other():
    half, registered, flags, lamport, total = native.cuda_peer_layout(4, 1000, 5000)
    assert (half, registered) == (1024, 2048) and flags >= registered + 5000
    assert all(offset % CONSTANTS["alignment"] == 0 for offset in (half, registered, flags, lamport))
    assert lamport == flags + CONSTANTS["flag_bytes"]
    assert total == lamport + CONSTANTS["lamport_buffers"] * 4 * CONSTANTS["lamport_bytes"]
    with pytest.raises(ValueError, match="1 to 16 ranks"):
        native.cuda_peer_layout(17, 1024, 0)


def test_records_of_all_blocks_are_written_once():
    for blocks in range(1, CONSTANTS["max_blocks"] + 1):
        for other in range(CONSTANTS["max_blocks"]):
            writers = [b for b in range(blocks) if native.cuda_peer_advances(b, blocks, other)]
            assert len(writers) == 1 and (other >= blocks or writers == [other])


def test_flag_values_grow_and_outlast_32_bits():
    values = [native.cuda_peer_signal_value(call, phase) for call in (0, 1, 2**33) for phase in (0, 1, 2)]
    assert values == sorted(set(values)) and values[0] > 0


# Arguments -----------------------------------------------------------------------------------------------------------


def arguments(**changes):
    """Addresses that are never used, because every call with them is refused."""
    _, _, flags, _, _ = native.cuda_peer_layout(2, HALF, HALF)
    bases = [1 << 30, 1 << 31]
    values = dict(algorithm=0, data=bases, flags=[base + flags for base in bases], multicast=0, rank=0, world=2)
    values |= dict(half=HALF, x=1 << 20, out=1 << 21, n=64, dtype=0, max_blocks=4, timeout=10**9, error=4096, stream=0)
    return [(values | changes)[name] for name in values]


@needs_build
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": 5}, "unknown algorithm 5"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"world": 3}, "one data address and one flags address"),
        ({"data": [0, 1 << 31]}, "address of rank 0 is null"),
        ({"data": [(1 << 30) + 64, 1 << 31]}, "rank 0 is not aligned"),
        ({"flags": [1 << 30, 1 << 31]}, "rank 0 are not where"),
        ({"half": 1000}, "multiple of 1024"),
        ({"x": 0}, "tensor is null"),
        ({"out": 0}, "tensor is null"),
        ({"x": (1 << 20) + 2}, "not aligned to its elements"),
        ({"out": (1 << 20) + 16}, "overlaps"),
        ({"dtype": 4}, "float32, bfloat16 or float16, got int32"),
        ({"dtype": 77}, "unknown dtype"),
        ({"max_blocks": 0}, "max_blocks"),
        ({"timeout": 0}, "timeout"),
        ({"error": 0}, "error record"),
        ({"n": HALF, "out": 1 << 25}, "do not fit the staging half"),
        ({"algorithm": LAMPORT, "n": 65537}, "do not fit the Lamport"),
        ({"algorithm": MULTIMEM}, "multicast address"),
        ({"algorithm": MULTIMEM_ONE_SHOT}, "multicast address"),
        ({"x": 1 << 30}, "belongs to the kernels"),
        ({"x": (1 << 30) + 2 * HALF + 8}, "registered tensor is not aligned"),
        ({"n": 1 << 40}, "32 GiB"),
    ],
)
def test_bad_all_reduce_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        native.cuda_peer_all_reduce(*arguments(**changes))


@needs_build
def test_calls_of_nothing_launch_nothing():
    native.cuda_peer_all_reduce(*arguments(n=0, x=0, out=0))
    native.cuda_peer_all_reduce_norm(*norm_arguments(rows=0, x=0))


def norm_arguments(**changes):
    _, _, flags, _, _ = native.cuda_peer_layout(2, HALF, HALF)
    bases = [1 << 30, 1 << 31]
    values = dict(algorithm=0, data=bases, flags=[base + flags for base in bases], rank=0, world=2, half=HALF)
    values |= dict(x=1 << 20, bias=0, residual=1 << 21, weight=1 << 22, eps=1e-6, normed=1 << 23, sum=1 << 24)
    values |= dict(rows=4, width=64, dtype=1, round=True, gather=True)
    values |= dict(max_blocks=4, timeout=10**9, error=4096, stream=0)
    return [(values | changes)[name] for name in values]


@needs_build
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": MULTIMEM}, "got 2"),
        ({"residual": 0}, "tensor is null"),
        ({"normed": 1 << 24}, "same tensor"),
        ({"width": 0}, "no elements"),
        ({"width": 16385}, "too wide; the limit is 16384"),
        ({"algorithm": LAMPORT, "width": 8200}, "too wide; the limit is 8192"),
        ({"algorithm": LAMPORT, "width": 8192, "rows": 17}, "Lamport buffers"),
        ({"width": 8192, "rows": 65}, "staging half"),
        ({"algorithm": TWO_SHOT, "width": 8192, "rows": 33}, "staging half"),
        ({"dtype": 5}, "got int64"),
    ],
)
def test_bad_norm_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        native.cuda_peer_all_reduce_norm(*norm_arguments(**changes))


@needs_build
def test_bad_check_arguments_are_refused():
    _, data, flags, _, rank, world, half, *_ = arguments()
    assert native.cuda_peer_check_half_bytes(2, 1024) < HALF
    for nbytes, report, message in ((0, 16, "or are none"), (HALF, 16, "do not fit"), (64, 0, "report's address")):
        with pytest.raises(ValueError, match=message):
            native.cuda_peer_check(data, flags, rank, world, half, nbytes, 1, report, 4, 10**9, 4096, 0)
    with pytest.raises(ValueError, match="flags' address is null"):
        native.cuda_peer_prepare(0, 2, 0)
