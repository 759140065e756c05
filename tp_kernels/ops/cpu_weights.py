"""Where weights lie in memory: huge pages make streaming them faster."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from tp_kernels._native import native

__all__ = ["advise_huge"]

# Allocators put a header and page rounding between large neighbours; more than that may be somebody else's memory.
_NEIGHBOUR_GAP = 16 << 10


def advise_huge(*tensors: Tensor | Iterable[Tensor]) -> int:
    """Move CPU tensors' storage into transparent huge pages where the kernel allows it; values stay as they are.

    Decoding streams every weight once per token, and with 4 KiB pages the page walks cost bandwidth. Takes effect at
    once on Linux 6.1 and later; elsewhere it is advice that may do nothing.

    Args:
        tensors: tensors or iterables of tensors, for example ``model.parameters()``.

    Returns:
        Bytes that lie in whole huge pages and were advised; 0 where it is not supported.
    """
    storages: dict[int, int] = {}
    for item in tensors:
        for tensor in (item,) if isinstance(item, Tensor) else item:
            if tensor.is_cpu and not tensor.is_sparse and tensor.untyped_storage().data_ptr():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    # Neighbours are advised as one: a huge page that two of them share would otherwise belong to neither.
    runs: list[list[int]] = []
    for begin, size in sorted(storages.items()):
        if runs and begin - runs[-1][1] <= _NEIGHBOUR_GAP:
            runs[-1][1] = max(runs[-1][1], begin + size)
        else:
            runs.append([begin, begin + size])
    return sum(native.cpu_advise_huge_pages(begin, end - begin) for begin, end in runs)
