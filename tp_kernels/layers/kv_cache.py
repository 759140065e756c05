"""``LayerKVCache``: the keys and values of one attention layer, this rank's heads only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["LayerKVCache"]


class LayerKVCache:
    """Keys and values of the tokens so far, for a batch whose rows may differ in length.

    Row b holds ``lengths[b]`` tokens *before* a forward pass. The S new tokens of the pass (the same S for every row)
    are written at ``lengths[b] .. lengths[b] + S - 1``, and the i-th of them attends to cached positions up to
    ``lengths[b] + i``. The caller advances ``lengths`` once the whole model has run; rows that were padded on the right
    advance by less than S, and what the padding wrote is overwritten by the next tokens.

    Args:
        k: [B, Hkv, max_len, D], Hkv being this rank's KV heads.
        v: like ``k``.
        lengths: int64 [B], shared by the layers of a model.
        host_lengths: the same numbers as a list that its owner keeps up to date, so that nobody has to wait for a GPU
            to learn whether the cache is empty; None if there is no such list.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """

    __slots__ = ("batch_size", "head_dim", "host_lengths", "k", "lengths", "max_len", "num_kv_heads", "v")

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, host_lengths: Sequence[int] | None = None
    ):
        if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype:
            raise ValueError(
                f"expected k and v of one shape [B, Hkv, max_len, D] and dtype, got {list(k.shape)} {k.dtype} and "
                f"{list(v.shape)} {v.dtype}"
            )
        if lengths.dtype != torch.int64 or lengths.shape != k.shape[:1]:
            raise ValueError(f"expected int64 lengths [{k.shape[0]}], got {list(lengths.shape)} {lengths.dtype}")
        self.k, self.v, self.lengths, self.host_lengths = k, v, lengths, host_lengths
        self.batch_size, self.num_kv_heads, self.max_len, self.head_dim = k.shape

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
