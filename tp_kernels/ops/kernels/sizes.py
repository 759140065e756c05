"""Whole numbers for launchers, in plain Python: Triton's ``cdiv`` and ``next_power_of_2`` cost some 2 us a call."""

from __future__ import annotations

__all__ = ["cdiv", "next_power_of_2"]


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up; ``b`` is positive."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
