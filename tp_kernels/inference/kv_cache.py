"""``KVCache``: the keys and values of every layer of a model, for this rank's heads.

One allocation for all layers, ``[layers, B, Hkv_local, max_len, D]``, made once: a generation knows its longest row
beforehand, so nothing ever grows. ``lengths`` [B] is shared by the layers; it counts the tokens stored before a forward
pass and is moved on by the caller, once, after the whole model has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tp_kernels.layers.kv_cache import LayerKVCache

if TYPE_CHECKING:
    from tp_kernels.models.causal_lm import ParallelCausalLM

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of a batch.

    Args:
        num_layers: decoder layers.
        batch: rows.
        num_kv_heads: KV heads of this rank.
        max_len: most tokens of a row.
        head_dim: channels of a head.
        device, dtype: of the keys and values; those of the model's activations.

    Attributes:
        layers: one ``LayerKVCache`` a decoder layer, views of the one allocation.
        lengths: int64 [B], tokens stored of each row.
        nbytes: memory of keys and values on this rank, whatever rows are left.

    Raises:
        ValueError: a size is not a positive integer.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (num_layers, batch, num_kv_heads, max_len, head_dim)
        names = ("num_layers", "batch", "num_kv_heads", "max_len", "head_dim")
        for name, size in zip(names, shape, strict=True):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"KVCache: {name} must be a positive int, got {size!r}")
        self.max_len = max_len
        # Uninitialised on purpose: slots are written before they are read, and untouched pages cost no memory.
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty_like(self._keys)
        self.nbytes = 2 * self._keys.numel() * self._keys.element_size()
        self._host_lengths = [0] * batch
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._make_views()

    @classmethod
    def for_model(cls, model: ParallelCausalLM, batch: int, max_len: int) -> KVCache:
        """A cache for ``batch`` rows of up to ``max_len`` tokens of this rank's part of ``model``."""
        config = model.config
        weight = model.model.norm.weight
        heads = model.num_kv_heads_local
        return cls(
            config.num_hidden_layers,
            batch,
            heads,
            max_len,
            config.head_dim,
            device=weight.device,
            dtype=weight.dtype,
        )

    @property
    def batch(self) -> int:
        """Rows still in the cache."""
        return len(self._host_lengths)

    def check_room(self, batch: int, tokens: int) -> None:
        """ValueError unless ``tokens`` more fit into each of ``batch`` rows. Asks no device."""
        if batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} rows, got a batch of {batch}")
        longest = max(self._host_lengths)
        if longest + tokens > self.max_len:
            raise ValueError(
                f"the cache is full: {longest} tokens are stored, {tokens} more exceed its max_len={self.max_len}"
            )

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more of every row as stored, after the model has run them."""
        self._host_lengths[:] = [length + tokens for length in self._host_lengths]  # the layers share the list
        self.lengths += tokens

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set every row's length, for example to what it was without padding.

        Raises:
            ValueError: not one length a row, or one outside ``[0, max_len]``.
        """
        lengths = [int(length) for length in lengths]
        if len(lengths) != self.batch or any(not 0 <= length <= self.max_len for length in lengths):
            raise ValueError(f"expected {self.batch} lengths in [0, {self.max_len}], got {lengths}")
        self._host_lengths[:] = lengths
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int64))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only ``rows`` (ascending positions) and forget the others; copies nothing but rows that must move up.

        Raises:
            ValueError: the rows are not ascending positions of this batch.
        """
        rows = list(rows)
        if not rows or rows != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= self.batch:
            raise ValueError(f"expected ascending rows in [0, {self.batch}), got {rows}")
        for target, source in enumerate(rows):
            used = self._host_lengths[source]
            if target != source and used:
                for tensor in (self._keys, self._values):
                    tensor[:, target, :, :used].copy_(tensor[:, source, :, :used])
        self._host_lengths = [self._host_lengths[row] for row in rows]
        self._keys, self._values = self._keys[:, : len(rows)], self._values[:, : len(rows)]
        self.lengths = torch.tensor(self._host_lengths, dtype=torch.int64, device=self.lengths.device)
        self._make_views()

    def _make_views(self) -> None:
        self.layers = [
            LayerKVCache(k, v, self.lengths, self._host_lengths)
            for k, v in zip(self._keys.unbind(0), self._values.unbind(0), strict=True)
        ]
