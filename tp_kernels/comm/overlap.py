"""When a GEMM runs beside the all-reduce of its result: the schedule, the gate, and what the ranks must agree on.

``x @ weight.T`` is cut into chunks of rows. While one chunk is summed over the ranks on the communicator's stream, the
next is multiplied on the caller's. A GPU works a GEMM off in waves of one tile per multiprocessor (SM), so a chunk is a
whole number of waves: a part of one costs as much as a full one (the rule of FlashOverlap, Hong et al. 2025). Here are
pure functions of the shape and of numbers that all ranks share, so the ranks cannot disagree; ``ops.linear_all_reduce``
carries them out. That is ``overlap="chunked"``; with "fused" one kernel over peer memory sends every tile on when it is
done (``SymmetricMemoryCommunicator.linear_all_reduce``). Both pass the same gate.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tp_kernels.comm.communicator import Communicator
from tp_kernels.comm.tp_group import TPGroup

__all__ = [
    "MARGIN",
    "SMALLEST_CHUNK",
    "Agreement",
    "agree",
    "agreed",
    "check_offered",
    "chunk_bounds",
    "count_waves",
    "estimate_time",
    "hidden_fraction",
    "may_overlap",
    "offers_overlap",
    "worth_overlapping",
]

# Overlap must have been this much faster than one GEMM followed by one all-reduce: the shape at hand may be up to a
# factor of two away from the one that was measured.
MARGIN = 1.03
# Rows of a GEMM's tile on every GPU that we know of: "auto" cannot cut fewer.
SMALLEST_CHUNK = 128


def count_waves(m: int, n: int, num_sms: int, tile_m: int, tile_n: int) -> int:
    """Waves of a GEMM with an [m, n] result: tiles over SMs, rounded up."""
    return -(-(-(-m // tile_m) * -(-n // tile_n)) // num_sms)


def chunk_bounds(
    m: int, n: int, num_sms: int, tile_m: int, tile_n: int, max_chunks: int, growth: float = 1.0
) -> list[tuple[int, int]]:
    """Rows ``[start, stop)`` of every chunk of an [m, n] result, in order and without gaps.

    As many chunks as possible up to ``max_chunks``, such that together they take no more waves than the undivided GEMM.
    Boundaries are multiples of ``tile_m``, so only the last chunk is ragged.

    Args:
        m, n: shape of the result.
        num_sms: SMs of the rank that has the fewest.
        tile_m, tile_n: the GEMM's tile, as far as it is known: a wrong one costs time, never a right result.
        max_chunks: at least 1.
        growth: about how many times larger a chunk is than the one before. Nothing hides the first GEMM and the last
            all-reduce: above 1 suits slow communication, below 1 slow matmuls.

    Returns:
        At least one chunk, none of them empty; no chunk when there are no rows.

    Raises:
        ValueError: sizes that are none.
    """
    if min(num_sms, tile_m, tile_n, max_chunks) < 1 or min(m, n) < 0 or not growth > 0:
        raise ValueError(
            f"chunk_bounds: expected m, n >= 0, num_sms, tiles, max_chunks >= 1 and growth > 0, got {m}, {n}, "
            f"{num_sms}, {tile_m} x {tile_n}, {max_chunks}, {growth}"
        )
    if m == 0:
        return []
    tiles_n = max(1, -(-n // tile_n))
    waves = count_waves(m, n, num_sms, tile_m, tile_n)
    for count in range(min(max_chunks, waves), 1, -1):
        bounds = _bounds_of(_shares(waves, count, growth), m, num_sms, tile_m, tiles_n)
        if len(bounds) == count:
            spent = sum(count_waves(stop - start, n, num_sms, tile_m, tile_n) for start, stop in bounds)
            if spent <= waves:
                return bounds
    return [(0, m)]


def _shares(waves: int, count: int, growth: float) -> list[int]:
    """``waves`` in ``count`` parts of at least one, each about ``growth`` times the one before."""
    weights = [growth**i for i in range(count)]
    exact = [waves * weight / sum(weights) for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    while (missing := waves - sum(shares)) != 0:
        if missing > 0:  # to whom rounding took most from; to the earlier of equal ones
            index = max(range(count), key=lambda i: exact[i] - shares[i])
        else:
            index = max(range(count), key=lambda i: shares[i])
        shares[index] += 1 if missing > 0 else -1
    return shares


def _bounds_of(shares: Sequence[int], m: int, num_sms: int, tile_m: int, tiles_n: int) -> list[tuple[int, int]]:
    """Chunks of as many rows of tiles as fit into each share of waves; the last one takes what is left."""
    bounds, start = [], 0
    for share in shares[:-1]:
        stop = start + share * num_sms // tiles_n * tile_m
        if stop <= start or stop >= m:
            return []
        bounds.append((start, stop))
        start = stop
    return [*bounds, (start, m)]


def estimate_time(rows: Sequence[int], gemm: float, reduce: float, epilogue: float = 0.0, call: float = 0.0) -> float:
    """Seconds of a chunked schedule if GEMM and all-reduce do not slow each other down: a bound from below.

    Good for leaving candidates out of a measurement, never for choosing.

    Args:
        rows: of every chunk.
        gemm, reduce, epilogue: seconds for all rows, taken to be proportional to the rows.
        call: seconds that every further all-reduce costs by itself.
    """
    total = sum(rows)
    computed = reduced = 0.0
    ends = []
    for count in rows:
        computed += gemm * count / total
        reduced = max(reduced, computed) + reduce * count / total + (call if ends else 0.0)
        ends.append(reduced)
    for count, end in zip(rows, ends, strict=True):
        computed = max(computed, end) + epilogue * count / total
    return computed


def hidden_fraction(sequential: float, overlapped: float, compute: float, communication: float) -> float:
    """How much of the shorter of the two was hidden behind the longer: 1 is all of it, below 0 is a loss."""
    return (sequential - overlapped) / min(compute, communication)


def worth_overlapping(path: str, us: Mapping[str, float]) -> tuple[bool, str]:
    """The gate: whether a measurement says that overlap pays, and in which words.

    Args:
        path: what was fastest: "none", "chunked" or "fused".
        us: microseconds of every way that was measured.
    """
    figures = ", ".join(f"{name} {time:.1f} us" for name, time in sorted(us.items(), key=lambda item: item[1]))
    if path == "none" or path not in us or "none" not in us:
        return False, f"overlap was not the fastest: {figures}"
    if us["none"] < MARGIN * us[path]:
        return False, f"overlap gains less than {round(100 * (MARGIN - 1))}%: {figures}"
    return True, figures


def offers_overlap(group: TPGroup, mode: str = "chunked") -> bool:
    """Whether the group's communicator works beside the caller's stream ("chunked"), or inside a matmul ("fused")."""
    return mode in group.communicator.overlap_modes


def may_overlap(group: TPGroup, mode: str, rows: int) -> bool:
    """Whether a row-parallel layer need consider overlap at all; cheap, and the same on all ranks.

    Args:
        mode: "auto", "none", "chunked" or "fused". Few rows are not worth a grid of tiles, whatever was asked for: the
            skinny matmuls and the one-step all-reduce are for them.
        rows: of the layer's input.
    """
    if mode == "none" or not group.communicator.overlap_modes:
        return False
    return mode == "chunked" or rows > SMALLEST_CHUNK


def check_offered(mode: str, group: TPGroup, device: torch.device) -> None:
    """ValueError unless a layer of the group may be asked for ``mode`` ("chunked", "fused") on the device."""
    offered = group.communicator.overlap_modes
    if mode in offered:
        return
    if device.type != "cuda":
        raise ValueError(f'overlap="{mode}" needs CUDA tensors, got one on {device}; use "auto" or "none"')
    raise ValueError(
        f'overlap="{mode}" is not offered by the {group.backend} communicator of group {group.name!r} '
        f'(it offers: {", ".join(offered) or "none"}); use "auto" or "none"'
    )


# What the ranks must share -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """What the ranks of a communicator found when they compared.

    Attributes:
        num_sms: the fewest SMs that a rank has; under MPS those of its share.
        same_tables: all ranks choose by the same measurements on the same kind of GPU.
    """

    num_sms: int
    same_tables: bool


_agreements: weakref.WeakKeyDictionary[Communicator, Agreement] = weakref.WeakKeyDictionary()


def agreed(communicator: Communicator) -> Agreement | None:
    """What ``agree`` found for this communicator; None before."""
    return _agreements.get(communicator)


def agree(communicator: Communicator, num_sms: int, fingerprint: int, device: torch.device) -> Agreement:
    """Compare with the other ranks; once in a communicator's life. A collective that waits for its result.

    A process that tunes afterwards must do so on all ranks, or make the group anew.

    Args:
        communicator: of all ranks that will overlap together.
        num_sms: of this rank.
        fingerprint: equal on ranks that have the same tables; below 2**63.
        device: where the communicator's tensors live.
    """
    mine = torch.tensor([[num_sms, fingerprint]], dtype=torch.int64, device=device)
    everyone = communicator.all_gather(mine).tolist()
    found = Agreement(min(sms for sms, _ in everyone), len({prints for _, prints in everyone}) == 1)
    _agreements[communicator] = found
    return found
