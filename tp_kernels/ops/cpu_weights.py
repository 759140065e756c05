"""Where weights lie in memory: huge pages make streaming them faster."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from tp_kernels._native import native

__all__ = ["advise_huge"]


def advise_huge(*tensors: Tensor | Iterable[Tensor]) -> int:
    """Move CPU tensors' storage into transparent huge pages where the kernel allows it; values stay as they are.

    Decoding streams every weight once per token, and with 4 KiB pages the page walks cost bandwidth. Takes effect at
    once on Linux 6.1 and later; elsewhere it is advice that may do nothing.

    Args:
        tensors: tensors or iterables of tensors, for example ``model.parameters()``.

    Returns:
        Bytes that lie in whole huge pages and were advised; 0 where it is not supported.
    """
    seen: set[int] = set()
    total = 0
    for item in tensors:
        for tensor in (item,) if isinstance(item, Tensor) else item:
            if not tensor.is_cpu or tensor.is_sparse:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += native.cpu_advise_huge_pages(storage.data_ptr(), storage.nbytes())
    return total
