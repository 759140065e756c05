"""Which peer-memory algorithm carries what, and how long messages are divided: pure functions of sizes.

All ranks evaluate them on values that they share, so they choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ALGORITHMS",
    "CUDA_ALGORITHMS",
    "Layout",
    "algorithm_for",
    "lamport_limit",
    "lamport_rows",
    "layout_of",
    "linear_rows",
    "norm_algorithm_for",
    "row_block",
    "row_packs",
    "rows_per_call",
]

# Twins of csrc/kernels/peer_layout.h.
ALGORITHMS = {"one_shot": 0, "two_shot": 1, "multimem": 2, "lamport": 3, "multimem_one_shot": 4}
# Of these, what needs no multicast and can be followed by the norm.
CUDA_ALGORITHMS = ("one_shot", "two_shot", "lamport")
ALIGNMENT = 1024
PACK_BYTES = 16
MAX_WORLD = 16
MAX_BLOCKS = 64
FLAG_BYTES = 16 << 10
# In a rank's flags: BlockState of every block, behind signal[MAX_BLOCKS][MAX_WORLD]; then ``failed``.
STATE_OFFSET = 8 * MAX_BLOCKS * MAX_WORLD
STATE_BYTES = 32
FAILED_OFFSET = STATE_OFFSET + STATE_BYTES * MAX_BLOCKS
# Behind them LinearFlags, of the kernel that multiplies as well. By row block of a call: from which ranks its tiles
# have arrived, whether it is finished, how many tiles and groups of rows are done here; then how much work is taken.
MAX_ROW_BLOCKS = 128
ARRIVED_OFFSET = -(-(FAILED_OFFSET + 4) // 128) * 128
FINISHED_OFFSET = ARRIVED_OFFSET + 8 * MAX_ROW_BLOCKS
MULTIPLIED_OFFSET = FINISHED_OFFSET + 8 * MAX_ROW_BLOCKS
REDUCED_OFFSET = MULTIPLIED_OFFSET + 4 * MAX_ROW_BLOCKS
TAKEN_OFFSET = REDUCED_OFFSET + 4 * MAX_ROW_BLOCKS
LAMPORT_BYTES = 256 << 10
LAMPORT_BUFFERS = 3
EMPTY_WORD = 0x80000000
ERROR_BYTES = 64
ERROR_MAGIC = 0x54504B45
MAX_ROW_PACKS = 2048
MAX_LAMPORT_ROW_PACKS = 1024
# Packs whose squares are added before those of the next: 512 bytes of a row (csrc/kernels/peer_norm.cuh).
CHUNK_PACKS = 32
# fp32 of memory that the Triton kernels need: for every block two sets of a row's chunks, used in turn.
SCRATCH_FLOATS = MAX_BLOCKS * 2 * (MAX_ROW_PACKS // CHUNK_PACKS)

# Messages up to these sizes go by one step instead of two. A push costs the sender world_size - 1 times the message:
# FlashInfer's MNNVL kernels push while all copies together are within 1 MiB, SGLang's on Hopper up to 384 KB at 4 ranks
# and 128 KB at 8. One-shot reading: vLLM's limits on NVLink (512 KB to 4 ranks, 256 KB to 8); among ranks that share an
# H100, torch's two-shot overtakes its one-shot at the same 512 KB.
LAMPORT_TOTAL_BYTES = 1 << 20
ONE_SHOT_BYTES = {4: 512 << 10, 8: 256 << 10, 16: 128 << 10}


def algorithm_for(nbytes: int, world_size: int) -> str:
    """Which ordered algorithm all-reduces ``nbytes`` among ``world_size`` ranks: "lamport", "one_shot", "two_shot"."""
    if nbytes <= lamport_limit(world_size):
        return "lamport"
    limit = next(limit for ranks, limit in ONE_SHOT_BYTES.items() if world_size <= ranks)
    return "one_shot" if nbytes <= limit else "two_shot"


def norm_algorithm_for(rows: int, width: int, itemsize: int, world_size: int) -> str:
    """The same for all-reduce + norm of [rows, width].

    The one-step forms repeat the norm on every rank, so above Lamport's limit only two-shot is left.
    """
    packs = row_packs(width, itemsize)
    if rows * packs * PACK_BYTES > lamport_limit(world_size):
        return "two_shot"
    return "lamport" if packs <= MAX_LAMPORT_ROW_PACKS else "one_shot"


def rows_per_call(width: int, itemsize: int, half_bytes: int) -> int:
    """How many rows one all-reduce + norm kernel takes; 0 when it does not take rows of ``width`` at all.

    It depends neither on where the tensors are nor on what is gathered, so that consecutive calls of one shape divide
    their rows alike.
    """
    packs = row_packs(width, itemsize)
    if not 1 <= packs <= MAX_ROW_PACKS:
        return 0
    return half_bytes // (2 * packs * PACK_BYTES)  # normed rows and sums, if both are staged


def lamport_rows(width: int, itemsize: int) -> int:
    """The same for the Lamport kernel."""
    return LAMPORT_BYTES // (row_packs(width, itemsize) * PACK_BYTES)


def row_block(rows: int, itemsize: int, world_size: int) -> int:
    """Rows of a tile of the matmul that all-reduces its result: large ones, unless that leaves ranks without any."""
    return 128 if itemsize == 2 and rows >= 128 * world_size else 64


def linear_rows(rows: int, width: int, itemsize: int, world_size: int, half_bytes: int) -> int:
    """How many of ``rows`` one matmul + all-reduce kernel takes; 0 when it does not take ``width`` columns at all.

    A multiple of ``world_size`` row blocks: a rank keeps every rank's part of its own ones in a staging half.
    """
    once = row_block(rows, itemsize, world_size) * world_size
    if width < 1:
        return 0
    return min(half_bytes // (once * width * itemsize), MAX_ROW_BLOCKS // world_size) * once


def row_packs(width: int, itemsize: int) -> int:
    """Packs of 16 bytes that a row takes where it is staged."""
    return -(-width * itemsize // PACK_BYTES)


def lamport_limit(world_size: int) -> int:
    """Most bytes of a message that is pushed."""
    return min(LAMPORT_BYTES, LAMPORT_TOTAL_BYTES // world_size)


@dataclass(frozen=True)
class Layout:
    """Offsets and sizes of a workspace in bytes, equal on all ranks; see ``symmetric_workspace``.

    Attributes:
        half_bytes: of each staging half, and of ``inputs`` and ``outputs``.
        inputs, outputs, mailbox: where these parts begin.
        mailbox_bytes: size of the mailbox.
        flags: where the kernels' own part begins.
        total_bytes: of the whole.
    """

    half_bytes: int
    inputs: int
    outputs: int
    mailbox: int
    mailbox_bytes: int
    flags: int
    total_bytes: int


def layout_of(world_size: int, max_bytes: int) -> Layout:
    """The workspace of a rank for messages of up to ``max_bytes`` without dividing them.

    Twin of ``layout_of`` in csrc/kernels/peer_layout.h, for which ``inputs``, ``outputs`` and ``mailbox`` are one
    registered area: the same offsets and the same total, which tests/comm/test_symmetric.py compares.

    Raises:
        ValueError: a number of ranks or of bytes that the kernels do not take.
    """
    if not 2 <= world_size <= MAX_WORLD:
        raise ValueError(f"symmetric memory: expected 2 to {MAX_WORLD} ranks, got {world_size}")
    if not 1 <= max_bytes <= 1 << 34:
        raise ValueError(f"symmetric memory: max_bytes must be between 1 and 2**34, got {max_bytes}")
    half = _round_up(max_bytes)
    mailbox_bytes = _round_up(max(half // 4, 64 << 10))
    mailbox = 4 * half
    flags = mailbox + mailbox_bytes
    total = flags + FLAG_BYTES + LAMPORT_BUFFERS * world_size * LAMPORT_BYTES
    return Layout(half, 2 * half, 3 * half, mailbox, mailbox_bytes, flags, total)


def _round_up(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
