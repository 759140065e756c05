"""Prompts of different lengths, checked and cut into passes of bounded size."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_prompts", "passes"]


def check_prompts(
    prompts: Sequence[Sequence[int]], capacities: Sequence[int] | None, chunk: int, vocab_size: int, max_len: int
) -> None:
    """ValueError unless all of ``DecodeEngine.prefill``'s arguments can be what they are."""
    if not prompts or min(map(len, prompts)) < 1:
        raise ValueError("expected at least one prompt, of at least one token each")
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk must be a positive int or None, got {chunk!r}")
    if capacities is not None and len(capacities) != len(prompts):
        raise ValueError(f"expected a capacity for each of {len(prompts)} prompts, got {len(capacities)}")
    longest = max(*map(len, prompts), *(capacities or ()), 0)
    if longest > max_len:
        raise ValueError(f"a row of {longest} tokens exceeds the engine's max_len={max_len}")
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"expected tokens in [0, {vocab_size}), got {min(prompt)} to {max(prompt)}")


def passes(lengths: Sequence[int], chunk: int) -> list[list[tuple[int, int, int]]]:
    """Passes of up to ``chunk`` tokens over rows of these lengths: pieces (row, begin, end), row after row."""
    found: list[list[tuple[int, int, int]]] = [[]]
    room = chunk
    for row, length in enumerate(lengths):
        begin = 0
        while begin < length:
            if not room:
                found.append([])
                room = chunk
            end = min(length, begin + room)
            found[-1].append((row, begin, end))
            room -= end - begin
            begin = end
    return found
