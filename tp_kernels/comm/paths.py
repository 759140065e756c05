"""Which path a collective takes inside a group, as pure functions of values that all ranks share.

A path is one way to carry a call out: ``"symm:two_shot"`` (a kernel over peer memory), ``"nccl"``, ``"gloo"``. Each
belongs to a class of numerics, and a group's setting says which classes its floating-point sums may come from:

    class       sums of floats                                                          paths
    "ordered"   fp32, in rank order, one rounding; independent of the message's length  symm (one-shot, two-shot,
                                                                                        Lamport, Triton), gloo, shm
    "nvls"      fp32 in the NVLink switch, in its order                                 symm (multimem)
    "nccl"      as the library does it; may change with the message's length            nccl

What moves data and what reduces integers has the same bits on every path, so it may take any. Maxima of floats may not:
NCCL may lose a NaN.

``route`` picks a path by dtype and bytes: from a table measured with ``tp-kernels tune comm``, else from safe defaults.
A dtype that was not measured takes the figures of the nearest one (see ``nearest_dtypes``): bytes are what moves, but
elements are what is converted and added. A table is read on the group's first rank and handed to the others when the
group is made, so all ranks decide alike.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tp_kernels.comm.symmetric_sizes import ONE_SHOT_BYTES, lamport_limit

__all__ = [
    "CLASS_OF",
    "LAMPORT",
    "MEASURED_DTYPES",
    "MULTIMEM",
    "MULTIMEM_ONE_SHOT",
    "NUMERICS",
    "ONE_SHOT",
    "OPERATIONS",
    "SYMM",
    "TRITON",
    "TWO_SHOT",
    "PathTable",
    "allowed_paths",
    "default_table",
    "describe_bytes",
    "is_exact",
    "nearest_dtypes",
    "ranges",
    "route",
    "table_file",
]

ONE_SHOT, TWO_SHOT, LAMPORT = "symm:one_shot", "symm:two_shot", "symm:lamport"
MULTIMEM, MULTIMEM_ONE_SHOT = "symm:multimem", "symm:multimem_one_shot"
TRITON = "symm:triton"  # one-shot where the CUDA kernels were not built; elsewhere only if a table names it
SYMM = "symm"  # operations for which peer memory has one way only

CLASS_OF = {
    ONE_SHOT: "ordered",
    TWO_SHOT: "ordered",
    LAMPORT: "ordered",
    TRITON: "ordered",
    SYMM: "ordered",
    "gloo": "ordered",
    "shm": "ordered",
    MULTIMEM: "nvls",
    MULTIMEM_ONE_SHOT: "nvls",
    "nccl": "nccl",
}
# What a group can be set to: a class, or all of them.
NUMERICS = ("ordered", "nccl", "any")
OPERATIONS = ("all_reduce", "all_reduce_norm", "reduce_scatter", "all_gather", "broadcast", "barrier")
_SUMS = ("all_reduce", "all_reduce_norm", "reduce_scatter")

# Dtypes that `tune comm` measures, with their bits; the first is the one to ask for where any will do.
MEASURED_DTYPES = {"bfloat16": 16, "float16": 16, "float32": 32}

# A path must be this much faster than the one before it in order of size: noise would make it change back and forth.
_WORTH_CHANGING = 0.97
# When neither a table nor the defaults name an available path: the first of these that is.
_ANY_ORDER = (TWO_SHOT, ONE_SHOT, TRITON, "nccl", SYMM, MULTIMEM, MULTIMEM_ONE_SHOT, LAMPORT, "shm", "gloo")


def is_exact(operation: str, floating: bool = True) -> bool:
    """Whether a call has the same bits on every path, whatever the order of reduction."""
    return operation not in _SUMS or not floating


def allowed_paths(paths: Collection[str], numerics: str, exact: bool = False) -> frozenset[str]:
    """Those of ``paths`` that a group with this setting may take.

    Args:
        numerics: one of ``NUMERICS``.
        exact: as ``is_exact`` says of the call.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics must be one of {', '.join(NUMERICS)}, got {numerics!r}")
    if exact or numerics == "any":
        return frozenset(paths)
    return frozenset(path for path in paths if CLASS_OF[path] == numerics)


# Tables --------------------------------------------------------------------------------------------------------------

# (most bytes or None, paths in order of preference), by ascending bytes.
Ranges = tuple[tuple[int | None, tuple[str, ...]], ...]
# Operation to rows (bytes, ((path, microseconds), ...)) by ascending bytes.
Figures = tuple[tuple[str, tuple[tuple[int, tuple[tuple[str, float], ...]], ...]], ...]
# Of tables from before there was one for each dtype.
_MEASURED_ALONE = "bfloat16"


@dataclass(frozen=True)
class PathTable:
    """What ``route`` looks up.

    Attributes:
        source: where it comes from, in a few words.
        defaults: operation to ranges of bytes with paths in order of preference.
        measured: dtype to operation to rows (bytes, ((path, microseconds), ...)) by ascending bytes; stands before
            ``defaults``.
    """

    source: str
    defaults: tuple[tuple[str, Ranges], ...]
    measured: tuple[tuple[str, Figures], ...] = ()

    def with_measured(self, content: Mapping[str, Any]) -> PathTable:
        """These defaults behind a measured table, as ``tp-kernels tune comm`` writes it.

        Args:
            content: ``us`` maps dtypes to operations to rows; a table written before there was one for each dtype maps
                operations to rows, measured in bfloat16.
        Raises:
            ValueError: it is not such a table.
        """
        try:
            source = f"measured {content['measured']} on {content['gpu']}"
            by_dtype = content["us"]
            if set(by_dtype) <= set(OPERATIONS):
                by_dtype = {_MEASURED_ALONE: by_dtype}
            measured = tuple((str(dtype), _figures(by_dtype[dtype])) for dtype in sorted(by_dtype))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a table of communication paths ({error!r})") from None
        for dtype, figures in measured:
            for operation, rows in figures:
                if dtype not in MEASURED_DTYPES or operation not in OPERATIONS or not _are_figures(rows):
                    raise ValueError(f"not a table of communication paths (in the rows of {operation!r}, {dtype})")
        return PathTable(source, self.defaults, measured)

    def rows(self, operation: str, dtype: str) -> tuple[tuple[int, tuple[tuple[str, float], ...]], ...]:
        """The rows measured for ``operation`` with the dtype nearest to ``dtype`` that has some."""
        by_dtype = dict(self.measured)
        for name in nearest_dtypes(dtype):
            found = dict(by_dtype.get(name, ())).get(operation)
            if found:
                return found
        return ()


def _figures(operations: Mapping[str, Any]) -> Figures:
    return tuple(
        (
            operation,
            tuple(
                (int(row["bytes"]), tuple(sorted((str(p), float(us)) for p, us in row["us"].items())))
                for row in sorted(rows, key=lambda row: int(row["bytes"]))
            ),
        )
        for operation, rows in sorted(operations.items())
    )


def _are_figures(rows: Sequence[tuple[int, Sequence[tuple[str, float]]]]) -> bool:
    sizes = [nbytes for nbytes, _ in rows]
    figures = [pair for _, row in rows for pair in row]
    ascending = all(a < b for a, b in pairwise([0, *sizes]))
    return ascending and all(path in CLASS_OF and 0 < us < math.inf for path, us in figures)


@lru_cache(maxsize=64)
def nearest_dtypes(dtype: str) -> tuple[str, ...]:
    """``MEASURED_DTYPES`` from the nearest to ``dtype`` on: itself, then by the factor between their element sizes.

    Args:
        dtype: torch's name, for example "float16", "int64", "float8_e4m3fn" or "bool".
    """
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 8  # bool
    apart = {name: abs(math.log2(bits / size)) for name, size in MEASURED_DTYPES.items()}
    return tuple(sorted(MEASURED_DTYPES, key=lambda name: (name != dtype, apart[name])))


def table_file(gpu: str, world_size: int, shared: bool) -> Path:
    """Where the user's table for this GPU and number of ranks is: ``comm-<gpu>-<world>.json`` beside the ops' tables.

    Args:
        gpu: product name, for example "NVIDIA H100 80GB HBM3".
        shared: the ranks share one GPU, which says nothing about ranks with a GPU each: "-shared" in the name.
    """
    folder = os.environ.get("TP_KERNELS_TUNING_DIR") or Path.home() / ".cache" / "tp_kernels" / "tuning"
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(folder) / f"comm-{slug}-{world_size}{'-shared' if shared else ''}.json"


_K, _M = 1 << 10, 1 << 20


@lru_cache(maxsize=64)
def default_table(world_size: int, capability: tuple[int, int] = (9, 0), shared: bool = False) -> PathTable:
    """Thresholds for a box that nobody measured.

    Args:
        world_size: ranks of the group.
        capability: smallest compute capability among the ranks' GPUs.
        shared: the ranks share one GPU.
    """
    # Ordered thresholds are those that symmetric memory has of its own, with their sources there.
    pushed = lamport_limit(world_size)
    one_shot = next((limit for ranks, limit in ONE_SHOT_BYTES.items() if world_size <= ranks), pushed)
    reduce: list[tuple[int | None, tuple[str, ...]]] = [(pushed, (LAMPORT, ONE_SHOT, TWO_SHOT, TRITON, SYMM))]
    if one_shot > pushed:
        reduce.append((one_shot, (ONE_SHOT, TWO_SHOT, TRITON, SYMM)))
    if shared:
        reduce.append((None, (TWO_SHOT, ONE_SHOT, TRITON, SYMM)))  # NCCL talks over sockets here
    else:
        # Only groups with numerics="any" may leave two-shot. SGLang's table for H200 has multimem from 8 to 32 MB at 6
        # ranks and from 512 KB to 128 MB at 8 (vLLM's figures at 4 ranks: two-shot 29 us, multimem 33 us at 4 MB), and
        # NCCL above 128 MB at 2 and 4 ranks, above 32 MB at 6; above 16 MB on GPUs it has no table for.
        if capability < (9, 0):
            reduce.append((16 * _M, (TWO_SHOT, ONE_SHOT)))
        elif world_size <= 4:
            reduce.append((128 * _M, (TWO_SHOT, ONE_SHOT)))
        elif world_size <= 6:
            reduce += [(8 * _M, (TWO_SHOT, ONE_SHOT)), (32 * _M, (MULTIMEM, TWO_SHOT, ONE_SHOT))]
        else:
            reduce += [(512 * _K, (TWO_SHOT, ONE_SHOT)), (128 * _M, (MULTIMEM, TWO_SHOT, ONE_SHOT))]
        reduce.append((None, ("nccl", TWO_SHOT, ONE_SHOT)))

    # One-shot repeats the norm on every rank; it is left for rows that the Lamport kernels do not take.
    norm: Ranges = ((pushed, (LAMPORT, ONE_SHOT, TWO_SHOT)), (None, (TWO_SHOT, ONE_SHOT)))
    # Data that only moves: peer memory saves NCCL's latency, NCCL drives links better with long messages.
    moves: Ranges = ((None, (SYMM, "nccl")),) if shared else ((_M, (SYMM, "nccl")), (None, ("nccl", SYMM)))
    tables = {"all_reduce": tuple(reduce), "all_reduce_norm": norm}
    tables.update({operation: moves for operation in OPERATIONS if operation not in tables})
    where = " on one GPU" if shared else ""
    return PathTable(f"defaults for {world_size} ranks{where}", tuple(sorted(tables.items())))


# Routing -------------------------------------------------------------------------------------------------------------


def route(
    operation: str,
    nbytes: int,
    world_size: int,
    numerics: str,
    available: Collection[str],
    table: PathTable | None = None,
    *,
    exact: bool = False,
    dtype: str = "bfloat16",
) -> str | None:
    """The path for one call; a pure function.

    Args:
        operation: one of ``OPERATIONS``.
        nbytes: of the tensor that is reduced or of this rank's whole result; the same on all ranks.
        world_size: ranks of the group.
        numerics: the group's setting, one of ``NUMERICS``.
        available: paths that can take this call.
        table: None is ``default_table(world_size)``.
        exact: as ``is_exact`` says of the call: then paths of all classes may take it.
        dtype: torch's name of the tensor's.
    Returns:
        A path of ``available``, or None when none of those may be taken.
    Raises:
        ValueError: for an unknown operation or setting.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    candidates = allowed_paths(available, numerics, exact)
    table = table or default_table(world_size)
    for limit, path in ranges(operation, candidates, table, dtype):
        if limit is None or nbytes <= limit:
            return path
    return None


@lru_cache(maxsize=512)
def ranges(
    operation: str, candidates: frozenset[str], table: PathTable, dtype: str = "bfloat16"
) -> tuple[tuple[int | None, str], ...]:
    """(most bytes or None, path) by ascending bytes, for paths that take every size; empty without candidates."""
    if not candidates:
        return ()
    found = _fastest(table.rows(operation, dtype), candidates)
    if not found:
        found = [
            (limit, next((path for path in (*order, *_ANY_ORDER) if path in candidates), None))
            for limit, order in dict(table.defaults)[operation]
        ]
    merged: list[tuple[int | None, str]] = []
    for limit, path in found:
        if path is None:
            continue
        if merged and merged[-1][1] == path:
            merged.pop()
        merged.append((limit, path))
    return tuple(merged)


def _fastest(rows: Sequence[tuple[int, tuple[tuple[str, float], ...]]], candidates: frozenset[str]):
    """Ranges around the measured sizes, cut half way (in factors) between two of them."""
    chosen: list[tuple[int, str]] = []
    for nbytes, figures in rows:
        us = {path: value for path, value in figures if path in candidates}
        if not us:
            continue
        best = min(sorted(us), key=us.__getitem__)
        before = chosen[-1][1] if chosen else best
        if before in us and us[best] > us[before] * _WORTH_CHANGING:
            best = before
        chosen.append((nbytes, best))
    limits = [math.isqrt(a * b) for (a, _), (b, _) in pairwise(chosen)]
    return [(limit, path) for limit, (_, path) in zip([*limits, None], chosen, strict=True)] if chosen else []


def describe_bytes(count: int) -> str:
    """For example "256 KB"; powers of 1024, one digit after the point at most."""
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if count >= size:
            return f"{round(count / size, 1):g} {unit}"
    return f"{count} B"
