"""``PagedKVCache``: keys and values of all layers in pages that rows take as they grow and give back when they end.

Position p of row b stands in slot ``p % page_size`` of page ``page_table[b, p // page_size]``, the same page of every
layer. Rows move by moving their entries of the table; keys and values never move. The device's ``page_table``,
``lengths`` and ``live`` stay where they are for the life of the cache, so that CUDA graphs may read them; what the host
changes reaches them with ``sync``, in the order of the stream.

Page 0 is nobody's: rows of a graph that are not in use point at it, and read zeros there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tp_kernels.layers.kv_cache import LayerKVCache, PackedLayerKVCache, PackedTokens

if TYPE_CHECKING:
    from tp_kernels.models.causal_lm import ParallelCausalLM

__all__ = ["OutOfPages", "PackedCache", "PagedKVCache", "upload"]


class OutOfPages(ValueError):
    """The rows need more pages than are free."""


def upload(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy ``values`` from the host into ``target`` in the order of the current stream, without waiting for it."""
    if target.is_cuda:
        # A pinned block of its own, which PyTorch keeps until the copy is done: the caller may go on writing.
        values = values.pin_memory()
    target.copy_(values, non_blocking=True)


class PagedKVCache:
    """Keys and values of up to ``max_batch`` rows of up to ``max_len`` tokens.

    Args:
        num_layers: decoder layers.
        num_kv_heads: KV heads of this rank.
        head_dim: channels of a head.
        max_batch: most rows.
        max_len: most tokens of a row.
        page_size: tokens of a page; a power of two.
        num_pages: pages to be shared by the rows; None for as many as they can ever need.
        device, dtype: of the keys and values.

    Attributes:
        keys, values: [layers, 1 + num_pages, Hkv, page_size, D].
        page_table: int32 [max_batch, max_pages].
        lengths: int64 [max_batch], tokens stored of each row; 0 for rows that are not in use.
        live: int64 [max_batch], 1 for rows in use: how many tokens a decode step writes for the row.
        host_lengths: the lengths of the rows in use, as they will be once the device has done all that was asked.
        nbytes: memory of keys and values on this rank.

    Raises:
        ValueError: a size that is not a positive integer, or a page size that is no power of two.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_batch: int,
        max_len: int,
        page_size: int = 64,
        num_pages: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_batch": max_batch}
        sizes |= {"max_len": max_len, "page_size": page_size}
        sizes |= {} if num_pages is None else {"num_pages": num_pages}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"PagedKVCache: {name} must be a positive int, got {size!r}")
        if page_size & (page_size - 1):
            raise ValueError(f"PagedKVCache: page_size must be a power of two, got {page_size}")
        max_pages = -(-max_len // page_size)
        self.max_batch, self.max_len, self.page_size = max_batch, max_len, page_size
        self.num_pages = max_batch * max_pages if num_pages is None else num_pages
        shape = (num_layers, 1 + self.num_pages, num_kv_heads, page_size, head_dim)
        # Uninitialised but for the page that is read without having been written.
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.keys[:, 0].zero_()
        self.values[:, 0].zero_()
        self.nbytes = 2 * self.keys.numel() * self.keys.element_size()
        self.page_table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.live = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.host_lengths: list[int] = []
        self._pages: list[list[int]] = []  # of each row in use
        self._free = list(range(self.num_pages, 0, -1))  # the lowest is taken first
        self._host_table = torch.zeros(max_batch, max_pages, dtype=torch.int32)
        self._changed = False
        self._views: dict[int, _Rows] = {}

    @classmethod
    def for_model(cls, model: ParallelCausalLM, **options: Any) -> PagedKVCache:
        """A cache for this rank's part of ``model``; options as for the constructor."""
        config, weight = model.config, model.model.norm.weight
        sizes = (config.num_hidden_layers, model.num_kv_heads_local, config.head_dim)
        return cls(*sizes, device=weight.device, dtype=weight.dtype, **options)

    @property
    def batch(self) -> int:
        """Rows in use."""
        return len(self.host_lengths)

    @property
    def capacity(self) -> int:
        """Positions that a row of the page table has: ``max_len`` in whole pages."""
        return self.page_table.shape[1] * self.page_size

    @property
    def free_pages(self) -> int:
        """Pages that no row has."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that a row of so many tokens takes."""
        return -(-tokens // self.page_size)

    # Rows ------------------------------------------------------------------------------------------------------------

    def add_rows(self, capacities: Sequence[int]) -> None:
        """Put empty rows behind those in use, each with pages for so many tokens.

        Raises:
            OutOfPages: there are not enough free pages; ValueError: too many rows, or rows too long. Nothing changes.
        """
        if self.batch + len(capacities) > self.max_batch:
            raise ValueError(
                f"{len(capacities)} rows beside {self.batch} are more than the cache's max_batch={self.max_batch}"
            )
        for tokens in capacities:
            self._check_length(tokens)
        self._check_free(sum(map(self.pages_for, capacities)))
        for tokens in capacities:
            self.host_lengths.append(0)
            self._pages.append([])
            self._take(self.batch - 1, tokens)
        self._changed = True

    def reserve(self, tokens: Sequence[int]) -> None:
        """See to it that each row in use has pages for ``tokens[row]`` tokens.

        Raises:
            OutOfPages: there are not enough free pages; ValueError: a row too long. Nothing changes.
        """
        self._check_length(max(tokens, default=0))
        size, pages = self.page_size, self._pages
        short = [row for row, count in enumerate(tokens) if count > len(pages[row]) * size]
        if not short:
            return
        self._check_free(sum(self.pages_for(tokens[row]) - len(pages[row]) for row in short))
        for row in short:
            self._take(row, tokens[row])
        self._changed = True

    def set_length(self, row: int, tokens: int) -> None:
        """Count ``tokens`` tokens of a row as stored; its pages must have room for them."""
        if not 0 <= tokens <= len(self._pages[row]) * self.page_size:
            raise ValueError(f"row {row} has pages for {len(self._pages[row]) * self.page_size} tokens, got {tokens}")
        self.host_lengths[row] = tokens
        self._changed = True

    def count_step(self) -> None:
        """Count one more token of every row in use as stored: what a decode step does to ``lengths`` by itself."""
        self.host_lengths[:] = [length + 1 for length in self.host_lengths]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only ``rows``, in this order, and take the others' pages back.

        Raises:
            ValueError: a row that is not in use, or one twice.
        """
        rows = list(rows)
        if len(set(rows)) < len(rows) or any(not 0 <= row < self.batch for row in rows):
            raise ValueError(f"expected different rows in [0, {self.batch}), got {rows}")
        gone = set(range(self.batch)).difference(rows)
        for row in sorted(gone, reverse=True):
            self._free.extend(reversed(self._pages[row]))
        self.host_lengths[:] = [self.host_lengths[row] for row in rows]
        self._pages = [self._pages[row] for row in rows]
        self._host_table[: len(rows)] = self._host_table[rows]
        self._host_table[len(rows) :] = 0
        self._changed = True

    def sync(self) -> None:
        """Bring the device up to date, in the order of the current stream; nothing if nothing was changed."""
        if not self._changed:
            return
        counts = torch.zeros(2, self.max_batch, dtype=torch.int64)
        counts[0, : self.batch] = torch.tensor(self.host_lengths, dtype=torch.int64)
        counts[1, : self.batch] = 1
        upload(self.lengths, counts[0])
        upload(self.live, counts[1])
        # ``_host_table`` is written again: off the GPU too it must not be handed over itself.
        upload(self.page_table, self._host_table)
        self._changed = False

    def fill_random(self) -> None:
        """Random keys and values in every page but the first, for measurements that need none in particular."""
        for pages in (self.keys, self.values):
            pages[:, 1:].normal_()

    def _take(self, row: int, tokens: int) -> None:
        pages = self._pages[row]
        first = len(pages)
        pages += [self._free.pop() for _ in range(self.pages_for(tokens) - first)]
        self._host_table[row, first : len(pages)] = torch.tensor(pages[first:], dtype=torch.int32)

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_len:
            raise ValueError(f"the cache is full: a row of {tokens} tokens exceeds its max_len={self.max_len}")

    def _check_free(self, wanted: int) -> None:
        if wanted > len(self._free):
            raise OutOfPages(
                f"the pages have run out: {wanted} more of {self.page_size} tokens are needed and {len(self._free)} of "
                f"{self.num_pages} are free; give the cache more with num_pages, or run fewer or shorter rows at once"
            )

    # What the layers see ---------------------------------------------------------------------------------------------

    def rows(self, count: int) -> _Rows:
        """The first ``count`` rows, used or not, as a cache for one token each through the model's modules."""
        if count not in self._views:
            self._views[count] = _Rows(self, count)
        return self._views[count]

    def pack(self, pieces: Sequence[tuple[int, int, int]], window: int | None = None) -> PackedCache:
        """The pages as a cache for pieces of rows, packed one after the other into a row of their own.

        Args:
            pieces: (row, first position, position after the last), for positions of which the row has pages.
            window: the longest ``sliding_window`` of the layers, None if one of them sees everything: keys that no
                query sees are not gathered.
        """
        size, heads, device = self.page_size, self.keys.shape[2], self.lengths.device
        spans = [torch.arange(begin, end) for _, begin, end in pieces]
        begins = [0 if window is None else max(0, begin - window + 1) for _, begin, _ in pieces]
        seen = [torch.arange(first, end) for first, (_, _, end) in zip(begins, pieces, strict=True)]

        def pages_of(positions: list[torch.Tensor]) -> torch.Tensor:
            rows = zip(pieces, positions, strict=True)
            return torch.cat([self._host_table[row, span // size] for (row, _, _), span in rows])

        def bounds(positions: list[torch.Tensor]) -> torch.Tensor:
            counts = torch.tensor([0, *map(len, positions)])
            return counts.cumsum(0).to(torch.int32)

        def sent(values: torch.Tensor) -> torch.Tensor:
            on_device = torch.empty_like(values, device=device)
            upload(on_device, values)
            return on_device

        positions, key_positions = torch.cat(spans), torch.cat(seen)
        first_rows = sent(pages_of(seen).long() * (heads * size) + key_positions % size)
        tokens = PackedTokens(
            positions=sent(positions.unsqueeze(1)),
            slots=sent(positions % size),
            pages=sent(pages_of(spans).unsqueeze(1)),
            keys=first_rows.unsqueeze(1) + torch.arange(heads, device=device) * size,
            cu_tokens=sent(bounds(spans)),
            cu_keys=sent(bounds(seen)),
            max_tokens=max(map(len, spans)),
            max_keys=max(map(len, seen)),
        )
        return PackedCache(self, tokens)


class _Rows:
    """Rows of a ``PagedKVCache`` as ``ParallelCausalLM`` takes a cache; whose lengths its owner looks after."""

    def __init__(self, cache: PagedKVCache, count: int):
        lengths, live, table = cache.lengths[:count], cache.live[:count], cache.page_table[:count]
        self.layers = [
            LayerKVCache(k, v, lengths, page_table=table, new_tokens=live)
            for k, v in zip(cache.keys.unbind(0), cache.values.unbind(0), strict=True)
        ]


class PackedCache:
    """Pages of a ``PagedKVCache`` for one pass over packed tokens.

    Attributes:
        tokens: what is in the pass.
        layers: one ``PackedLayerKVCache`` a decoder layer.
    """

    def __init__(self, cache: PagedKVCache, tokens: PackedTokens):
        self.tokens = tokens
        pages = zip(cache.keys.unbind(0), cache.values.unbind(0), strict=True)
        self.layers = [PackedLayerKVCache(k, v, tokens, cache.max_len) for k, v in pages]
