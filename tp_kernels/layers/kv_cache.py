"""The keys and values of one attention layer, this rank's heads only: ``LayerKVCache`` and ``PackedLayerKVCache``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LayerKVCache", "PackedLayerKVCache", "PackedTokens"]


class LayerKVCache:
    """Keys and values of the tokens so far, for a batch whose rows may differ in length.

    Row b holds ``lengths[b]`` tokens *before* a forward pass. The S new tokens of the pass (the same S for every row)
    are written at ``lengths[b] .. lengths[b] + S - 1``, and the i-th of them attends to cached positions up to
    ``lengths[b] + i``. The caller advances ``lengths`` once the whole model has run; rows that were padded on the right
    advance by less than S, and what the padding wrote is overwritten by the next tokens.

    Args:
        k: [B, Hkv, max_len, D], Hkv being this rank's KV heads; with a page table [pages, Hkv, page_size, D].
        v: like ``k``.
        lengths: int64 [B], shared by the layers of a model.
        host_lengths: the same numbers as a list that its owner keeps up to date, so that nobody has to wait for a GPU
            to learn whether the cache is empty; None if there is no such list.
        page_table: int32 [B, max_pages]: position p of row b is slot ``p % page_size`` of page
            ``page_table[b, p // page_size]``; None for a cache without pages.
        new_tokens: int64 [B]: only so many of the S tokens of a row are written; None for all.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """

    __slots__ = (
        "batch_size",
        "head_dim",
        "host_lengths",
        "k",
        "lengths",
        "max_len",
        "new_tokens",
        "num_kv_heads",
        "page_table",
        "v",
    )

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        host_lengths: Sequence[int] | None = None,
        *,
        page_table: torch.Tensor | None = None,
        new_tokens: torch.Tensor | None = None,
    ):
        if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype:
            raise ValueError(
                f"expected k and v of one shape [B, Hkv, max_len, D] and dtype, got {list(k.shape)} {k.dtype} and "
                f"{list(v.shape)} {v.dtype}"
            )
        rows = k if page_table is None else page_table
        if rows.dim() < 2 or (page_table is not None and page_table.dtype != torch.int32):
            raise ValueError(f"expected an int32 page_table [B, max_pages], got {list(rows.shape)} {rows.dtype}")
        if lengths.dtype != torch.int64 or lengths.shape != rows.shape[:1]:
            raise ValueError(f"expected int64 lengths [{rows.shape[0]}], got {list(lengths.shape)} {lengths.dtype}")
        self.k, self.v, self.lengths, self.host_lengths = k, v, lengths, host_lengths
        self.page_table, self.new_tokens = page_table, new_tokens
        self.batch_size, self.num_kv_heads, self.max_len, self.head_dim = rows.shape[0], *k.shape[1:]
        if page_table is not None:
            self.max_len *= page_table.shape[1]

    def known_empty(self) -> bool:
        """Whether no row holds a token yet.

        On a GPU only ``host_lengths`` says so; without them this waits for the GPU, and is False, which is always safe,
        while a CUDA graph is being captured.
        """
        if self.lengths.is_cuda:
            if self.host_lengths is not None:
                return not any(self.host_lengths)
            if torch.cuda.is_current_stream_capturing():
                return False
        return not self.lengths.any()

    @classmethod
    def allocate(
        cls,
        batch_size: int,
        num_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        lengths: torch.Tensor | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> LayerKVCache:
        """An empty cache; ``lengths`` is made (all zero) unless one to share is given."""
        k, v = torch.zeros(2, batch_size, num_kv_heads, max_len, head_dim, device=device, dtype=dtype).unbind(0)
        if lengths is None:
            lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(k, v, lengths)


@dataclass(frozen=True)
class PackedTokens:
    """Where the tokens of a pass go that holds pieces of several prompts one after the other, and what they see.

    Piece b is ``count[b]`` tokens that follow ``past[b]`` others of the same row. Its queries see the row's tokens up
    to their own, of which the ``seen[b] >= count[b]`` last are gathered from the pages; all layers share the plan.

    Attributes:
        positions: int64 [N, 1], of every token in its row.
        slots: int64 [N], of every token in its page.
        pages: int32 [N, 1], of every token.
        keys: int64 [L, Hkv], the rows of ``pages.view(-1, D)`` where the keys stand that the pieces see.
        cu_tokens, cu_keys: int32 [pieces + 1], where each piece begins among the tokens and the keys.
        max_tokens, max_keys: of any piece.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    pages: torch.Tensor
    keys: torch.Tensor
    cu_tokens: torch.Tensor
    cu_keys: torch.Tensor
    max_tokens: int
    max_keys: int


class PackedLayerKVCache:
    """The pages of one layer for a pass over packed pieces of prompts: an input [1, N, hidden].

    Args:
        k: [pages, Hkv, page_size, D], contiguous.
        v: like ``k``.
        tokens: what is in the pass.
        max_len: most positions of a row, for the rotation.
    """

    __slots__ = ("head_dim", "k", "max_len", "num_kv_heads", "tokens", "v")

    def __init__(self, k: torch.Tensor, v: torch.Tensor, tokens: PackedTokens, max_len: int):
        self.k, self.v, self.tokens, self.max_len = k, v, tokens, max_len
        self.num_kv_heads, self.head_dim = k.shape[1], k.shape[3]

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [L, Hkv, D] that the pieces see, in their order; after the pass has written its own."""
        k, v = (pages.view(-1, self.head_dim)[self.tokens.keys] for pages in (self.k, self.v))
        return k, v
