"""Measured choices: which path an op takes for a shape on a GPU, and with which configuration.

A table is one JSON file a GPU (``h100.json``), written by ``tp-kernels tune`` and read once. ``lookup`` is a pure
function of the op, the GPU, the dtype and the sizes: the nearest measured shape decides, within ``REACH`` (a factor of
two in every size), otherwise nothing was measured and the op takes its safe default. The user's own table stands before
the shipped one: ``$TP_KERNELS_TUNING_DIR``, or ``~/.cache/tp_kernels/tuning``.

    {"gpu": "NVIDIA H100 80GB HBM3", "measured": "2026-11-22", "versions": {"torch": "2.11.0+cu130", ...},
     "ops": {"linear": [{"dtype": "16bit", "sizes": {"m": 1, "n": 6144, "k": 4096}, "path": "gemv",
                         "config": {"block_n": 4, ...}, "us": {"gemv": 17.3, "torch": 21.0}}]}}
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tp_kernels.ops._gpu import GpuInfo

__all__ = [
    "REACH",
    "Choice",
    "Entry",
    "Plan",
    "cached_decision",
    "choose_measured",
    "configuration",
    "dtype_class",
    "fingerprint",
    "forget_tables",
    "lookup",
    "read_table",
    "shipped_table",
    "user_table",
]

# A neighbour within a factor of two in every size behaves alike: tiles, waves and bandwidth change slowly beyond that.
REACH = 1.0


@dataclass(frozen=True)
class Entry:
    """One measured shape: the fastest path, its configuration, and every competitor's microseconds."""

    sizes: dict[str, int]
    path: str
    config: dict[str, Any]
    us: dict[str, float]
    source: str = ""

    def figures(self) -> str:
        """The measurement in words, fastest first."""
        return ", ".join(f"{name} {us:.1f} us" for name, us in sorted(self.us.items(), key=lambda item: item[1]))

    def reason(self) -> str:
        """The measurement, and where it comes from: why it decides."""
        return f"{self.figures()} ({self.source})"


@dataclass(frozen=True)
class Choice:
    """A path, its configuration (empty: the kernel's default), and why."""

    path: str
    reason: str
    config: dict[str, Any] = field(default_factory=dict)


class Plan(NamedTuple):
    """A choice with what an op needs to carry it out, for ``cached_decision``.

    Attributes:
        path, reason: as of a ``Choice``.
        config: the kernel's ``Config``; None for its default.
        launch: the kernel's launcher, where the path does not say which.
    """

    path: str
    reason: str
    config: Any = None
    launch: Callable[..., None] | None = None

    def choice(self) -> Choice:
        """The same for ``ops.explain``."""
        return Choice(self.path, self.reason, {} if self.config is None else self.config._asdict())


def dtype_class(dtype: torch.dtype) -> str:
    """bf16 and fp16 run at one speed and share entries."""
    return "16bit" if dtype in (torch.bfloat16, torch.float16) else str(dtype).removeprefix("torch.")


def shipped_table(slug: str) -> Path:
    """Where the package's table for a GPU would be."""
    return Path(__file__).parent / f"{slug}.json"


def user_table(slug: str) -> Path:
    """Where ``tp-kernels tune`` writes by default."""
    folder = os.environ.get("TP_KERNELS_TUNING_DIR") or Path.home() / ".cache" / "tp_kernels" / "tuning"
    return Path(folder) / f"{slug}.json"


def read_table(path: Path) -> dict[tuple[str, str], list[Entry]]:
    """Entries of a table by (op, dtype class); empty if there is no such file.

    Raises:
        ValueError: the file is not a tuning table.
    """
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    try:
        content = json.loads(text)
        source = f"{content['gpu']}, {content['measured']}"
        entries: dict[tuple[str, str], list[Entry]] = {}
        for op, rows in content["ops"].items():
            for row in rows:
                entry = Entry(dict(row["sizes"]), row["path"], dict(row["config"]), dict(row["us"]), source)
                entries.setdefault((op, row["dtype"]), []).append(entry)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a tuning table ({error!r}); delete it and run `tp-kernels tune`") from None
    return entries


@lru_cache(maxsize=16)
def _tables(slug: str) -> tuple[dict[tuple[str, str], list[Entry]], ...]:
    return read_table(user_table(slug)), read_table(shipped_table(slug))


def configuration(entry: Entry | Choice | None, kind: Callable[..., Any]) -> Any:
    """The entry's configuration as the kernel's ``Config``; None, for the default, where there is none to be had.

    A table outlives the version that measured it: a configuration that this version's kernel does not know is no reason
    to fail.
    """
    if entry is None or not entry.config:
        return None
    try:
        return kind(**entry.config)
    except TypeError:
        return None


def choose_measured(entry: Entry | None, unmeasured: str) -> Choice:
    """What an op with one kernel of its own takes, "triton" or "torch"; the kernel where nothing was measured."""
    if entry is None:
        return Choice("triton", unmeasured)
    return Choice("triton", entry.reason(), entry.config) if entry.path == "triton" else Choice("torch", entry.reason())


_decisions: list[Any] = []


def cached_decision(function: Callable[..., Any]) -> Any:
    """``lru_cache`` for what an op makes of its entries, forgotten together with the tables."""
    cached = lru_cache(maxsize=4096)(function)
    _decisions.append(cached)
    return cached


def forget_tables() -> None:
    """Read the tables again at the next lookup (after tuning)."""
    _tables.cache_clear()
    _nearest.cache_clear()
    for cached in _decisions:
        cached.cache_clear()


def fingerprint(op: str, info: GpuInfo) -> int:
    """A number below 2**32 that is equal on ranks that would choose alike for ``op``: same GPU, same entries."""
    entries = [
        [kind, entry.sizes, entry.path, entry.config, entry.us]
        for table in _tables(info.slug)
        for (name, kind), found in sorted(table.items(), key=lambda item: item[0])
        if name == op
        for entry in found
    ]
    return zlib.crc32(json.dumps([info.slug, entries], sort_keys=True).encode())


def lookup(op: str, info: GpuInfo, dtype: torch.dtype, **sizes: int) -> Entry | None:
    """The nearest measured entry, or None if none is near.

    Args:
        op: name of the table's section.
        info: the GPU.
        dtype: of the operands.
        sizes: named extents, e.g. ``m=16, n=6144, k=4096``. Sizes absent from an entry do not count; 0 and negative
            numbers mark a property (``causal=0``) and must be equal, as must sizes of the entry that are not given.
    """
    return _nearest(op, info.slug, dtype_class(dtype), tuple(sorted(sizes.items())))


@lru_cache(maxsize=4096)
def _nearest(op: str, slug: str, kind: str, sizes: tuple[tuple[str, int], ...]) -> Entry | None:
    wanted = dict(sizes)
    for table in _tables(slug):
        best, best_distance = None, math.inf
        for entry in table.get((op, kind), ()):
            distance = _distance(entry.sizes, wanted)
            if distance < best_distance:
                best, best_distance = entry, distance
        if best is not None:
            return best
    return None


def _distance(have: dict[str, int], wanted: dict[str, int]) -> float:
    """Sum of the factors between sizes, in powers of two; infinite when one of them is beyond ``REACH``."""
    total = 0.0
    for name, size in have.items():
        other = wanted.get(name)
        if other == size:
            continue
        if other is None or size <= 0 or other <= 0:
            return math.inf
        factor = abs(math.log2(size / other))
        if factor > REACH:
            return math.inf
        total += factor
    return total
