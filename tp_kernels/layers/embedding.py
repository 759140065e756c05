"""Vocabulary-parallel embedding and output head: each rank holds whole rows (words), as even as possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tp_kernels.checkpoint.sharding import shard_vocab_sizes
from tp_kernels.comm.functional import reduce_from_tensor_parallel
from tp_kernels.layers.base import TensorParallelLayer, check_dtype
from tp_kernels.layers.linear import ColumnParallelLinear
from tp_kernels.layers.partition import ranges_from_sizes

__all__ = ["ParallelLMHead", "VocabParallelEmbedding"]


def _vocab_sizes(num_embeddings: int, world_size: int) -> list[int]:
    if not isinstance(num_embeddings, int) or isinstance(num_embeddings, bool) or num_embeddings < 1:
        raise ValueError(f"num_embeddings must be a positive int, got {num_embeddings!r}")
    if num_embeddings < world_size:
        raise ValueError(f"cannot spread num_embeddings={num_embeddings} over {world_size} ranks")
    return shard_vocab_sizes(num_embeddings, world_size)


class VocabParallelEmbedding(TensorParallelLayer):
    """``torch.nn.Embedding`` with its rows spread over the ranks: each rank looks up its words, then all are summed.

    Exactly one rank contributes to a token, so the sum is exact in every dtype.

    Args:
        num_embeddings: size of the vocabulary; at least the number of ranks.
        embedding_dim: size of a vector.
        padding_idx: as in torch: this word starts at zero and gets no gradient.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        device: as in torch; ``"meta"`` allocates nothing.
        dtype: of the weight.

    Shape:
        int64 or int32 ids [...] -> [..., embedding_dim], the same on all ranks.

    Raises:
        ValueError: bad sizes; in ``forward``, ids that are no integers, on another device or (on the CPU, uncompiled)
            outside the vocabulary.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        self.partition = _vocab_sizes(num_embeddings, self.tp_size)
        if not isinstance(embedding_dim, int) or isinstance(embedding_dim, bool) or embedding_dim < 1:
            raise ValueError(f"embedding_dim must be a positive int, got {embedding_dim!r}")
        check_dtype(dtype)
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(f"padding_idx must be a word of the {num_embeddings}, got {padding_idx}")
            padding_idx %= num_embeddings
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.vocab_range = ranges_from_sizes(self.partition)[self.tp_rank]
        local = padding_idx in self.vocab_range if padding_idx is not None else False
        self._local_padding_idx = padding_idx - self.vocab_range.start if local else None
        self._declare("weight", 0, [("weight", num_embeddings, ranges_from_sizes(self.partition))])
        self.weight = nn.Parameter(torch.empty(len(self.vocab_range), embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch.nn.Embedding does; see ``layers.base`` for what ranks seeded alike get."""
        (shard,) = self.tensor_shards()
        self.reset_full(shard, nn.init.normal_)
        if self._local_padding_idx is not None:
            with torch.no_grad():
                self.weight[self._local_padding_idx].zero_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ``ids`` [...]; returns [..., embedding_dim]."""
        if not isinstance(ids, torch.Tensor) or (ids.dtype is not torch.int64 and ids.dtype is not torch.int32):
            raise ValueError(f"expected int64 or int32 ids, got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.device != self.weight.device:
            raise ValueError(f"expected ids on {self.weight.device}, where the weight is, got {ids.device}")
        # A rank that finds no owner for an id would answer zero: check where that costs no device synchronisation.
        if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
            low, high = ids.aminmax()
            if low < 0 or high >= self.num_embeddings:
                raise ValueError(f"expected ids in [0, {self.num_embeddings}), got {int(low)} to {int(high)}")
        if self.tp_size == 1:
            return F.embedding(ids, self.weight, self.padding_idx)
        local = ids - self.vocab_range.start
        elsewhere = (local < 0) | (local >= len(self.vocab_range))
        out = F.embedding(local.masked_fill_(elsewhere, 0), self.weight, self._local_padding_idx)
        return reduce_from_tensor_parallel(out.masked_fill(elsewhere.unsqueeze(-1), 0), self.group, inplace=True)

    def load_full_weight(self, weight: torch.Tensor) -> None:
        """Take this rank's rows of the full ``weight`` [num_embeddings, embedding_dim]."""
        (shard,) = self.tensor_shards()
        if tuple(weight.shape) != shard.full_shape:
            raise ValueError(f"weight: expected shape {list(shard.full_shape)}, got {list(weight.shape)}")
        shard.copy_from_full(weight)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, group: Any = None) -> VocabParallelEmbedding:
        """This rank's part of an existing ``nn.Embedding``, on its device and in its dtype; it is left alone.

        Raises:
            ValueError: the embedding renormalises, scales gradients or is sparse, which this layer does not do.
        """
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError("expected an nn.Embedding without max_norm, scale_grad_by_freq and sparse")
        weight = embedding.weight
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            group=group,
            device="meta",
            dtype=weight.dtype,
        )
        if not weight.is_meta:
            layer.to_empty(device=weight.device)
            layer.load_full_weight(weight)
        layer.weight.requires_grad_(weight.requires_grad)
        return layer.train(embedding.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rows={self.vocab_range}, {super().extra_repr()}"


class ParallelLMHead(ColumnParallelLinear):
    """Output projection onto the vocabulary, cut like ``VocabParallelEmbedding`` so that the two can share a weight.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of the hidden state.
        bias: learn an additive bias.
        gather_output: return all logits on every rank (the default), or this rank's words only.
        group, sequence_parallel, overlap, device, dtype: as in ``ColumnParallelLinear``.

    Shape:
        [..., embedding_dim] -> [..., num_embeddings], or this rank's part of it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        *,
        group: Any = None,
        gather_output: bool = True,
        sequence_parallel: bool = False,
        overlap: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        TensorParallelLayer.__init__(self, group)
        sizes = _vocab_sizes(num_embeddings, self.tp_size)
        pieces = [("", num_embeddings, ranges_from_sizes(sizes))]
        self._build(embedding_dim, pieces, bias, gather_output, sequence_parallel, False, device, dtype, overlap)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._tied = False
        self.vocab_range = pieces[0][2][self.tp_rank]

    def tie_weights(self, embedding: VocabParallelEmbedding) -> ParallelLMHead:
        """Share the embedding's weight from now on; returns self. ValueError if the two do not fit."""
        if (embedding.num_embeddings, embedding.embedding_dim) != (self.num_embeddings, self.embedding_dim):
            raise ValueError(
                f"expected an embedding of [{self.num_embeddings}, {self.embedding_dim}], got "
                f"[{embedding.num_embeddings}, {embedding.embedding_dim}]"
            )
        if embedding.vocab_range != self.vocab_range:
            raise ValueError(f"expected an embedding with rows {self.vocab_range}, got {embedding.vocab_range}")
        self._refuse_quantized("tie to an embedding")
        self.weight, self._tied = embedding.weight, True
        return self

    def _check_quantizable(self) -> None:
        super()._check_quantizable()
        if self._tied:
            raise ValueError("expected a head with a weight of its own to quantise, got one tied to an embedding")

    @classmethod
    def from_embedding(cls, embedding: VocabParallelEmbedding, **options: Any) -> ParallelLMHead:
        """A head that shares the weight of ``embedding``.

        Args:
            embedding: whose group, device and dtype it takes, too.
            options: further constructor arguments (``gather_output``, ``sequence_parallel``, ...).
        """
        head = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            group=embedding.group,
            device="meta",
            dtype=embedding.weight.dtype,
            **options,
        )
        return head.tie_weights(embedding)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group: Any = None, **options: Any) -> ParallelLMHead:
        """This rank's part of an existing output projection."""
        return cls._from_one(linear, group, options, outputs_first=True)
