"""What a rank holds: parameters to the byte, keys and values, and what is left for a batch.

The shard of a rank is ``checkpoint.sharding``'s, so the figures are those of the layers and of the loader; norms,
output biases and everything else that a ``ParallelCausalLM`` replicates is counted on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tp_kernels.checkpoint.sharding import shard_heads_sizes, shard_vocab_sizes, shard_width_sizes
from tp_kernels.models.config import ModelConfig

__all__ = [
    "DTYPE_BYTES",
    "QUANTIZED",
    "Linear",
    "Shard",
    "activation_bytes",
    "head_linear",
    "kv_bytes_per_token",
    "largest_batch",
    "layer_linears",
    "shards",
    "weight_bytes",
]

DTYPE_BYTES = {"bfloat16": 2, "float16": 2}
# Weight-only formats: one byte an element, one fp32 scale an output channel.
QUANTIZED = ("int8", "fp8")
_SCALE_BYTES = 4


class Shard(NamedTuple):
    """The sizes of one rank's part."""

    q_heads: int
    kv_heads: int
    intermediate: int
    vocab: int


class Linear(NamedTuple):
    """One rank's part of a projection: y[M, n] = x[M, k] W[n, k]^T, ``out`` of whose columns are written."""

    name: str
    n: int
    k: int
    out: int
    bias: bool = False

    def parameter_bytes(self, itemsize: int, quantize: str | None) -> int:
        """Bytes of weight, scales and bias."""
        bias = self.n * itemsize if self.bias else 0
        if quantize is None:
            return self.n * self.k * itemsize + bias
        return self.n * self.k + self.n * _SCALE_BYTES + bias


def shards(config: ModelConfig, tp: int) -> list[Shard]:
    """What every rank of ``tp`` gets.

    Raises:
        ValueError: more ranks than query heads, MLP channels or words.
    """
    if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
        raise ValueError(f"tp must be an int of at least 1, got {tp!r}")
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        if tp > getattr(config, name):
            raise ValueError(f"{tp} ranks cannot share {name}={getattr(config, name)}; use at most as many ranks")
    heads = shard_heads_sizes(config.num_attention_heads, config.num_key_value_heads, tp)
    widths = shard_width_sizes(config.intermediate_size, tp)
    words = shard_vocab_sizes(config.vocab_size, tp)
    return [Shard(q, kv, width, vocab) for (q, kv), width, vocab in zip(heads, widths, words, strict=True)]


def layer_linears(config: ModelConfig, shard: Shard) -> Iterator[Linear]:
    """The four projections of a decoder layer, fused as the layers fuse them."""
    hidden, dim = config.hidden_size, config.head_dim
    qkv = (shard.q_heads + 2 * shard.kv_heads) * dim
    yield Linear("qkv_proj", qkv, hidden, qkv, config.qkv_bias)
    yield Linear("o_proj", hidden, shard.q_heads * dim, hidden, config.o_bias)
    # The activation is applied before anything is written: half of the columns.
    yield Linear("gate_up_proj", 2 * shard.intermediate, hidden, shard.intermediate, config.mlp_bias)
    yield Linear("down_proj", hidden, shard.intermediate, hidden, config.mlp_bias)


def head_linear(config: ModelConfig, shard: Shard) -> Linear:
    """The output head."""
    return Linear("lm_head", shard.vocab, config.hidden_size, shard.vocab)


def head_format(config: ModelConfig, quantize: str | None) -> str | None:
    """How the head's weight is stored: a tied head keeps the embedding's own."""
    return None if config.tie_word_embeddings else quantize


def weight_bytes(config: ModelConfig, shard: Shard, itemsize: int, quantize: str | None = None) -> int:
    """Bytes of all parameters of one rank, scales of quantised weights included.

    Args:
        config: of the model.
        shard: of the rank.
        itemsize: bytes of an unquantised element.
        quantize: None, ``"int8"`` or ``"fp8"``.
    """
    norms = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    layer = sum(linear.parameter_bytes(itemsize, quantize) for linear in layer_linears(config, shard))
    outside = (shard.vocab * config.hidden_size + config.hidden_size) * itemsize  # embedding, last norm
    if not config.tie_word_embeddings:
        outside += head_linear(config, shard).parameter_bytes(itemsize, head_format(config, quantize))
    return config.num_hidden_layers * (layer + norms * itemsize) + outside


def kv_bytes_per_token(config: ModelConfig, shard: Shard, itemsize: int) -> int:
    """Bytes of keys and values that one token of one row adds on this rank. Windows do not free any."""
    return config.num_hidden_layers * 2 * shard.kv_heads * config.head_dim * itemsize


def activation_bytes(config: ModelConfig, shard: Shard, tokens: int, rows: int, itemsize: int) -> int:
    """An estimate of the most that a pass holds beside parameters and cache.

    The residual stream, a block's input and its sum, the widest intermediate result, and whole logits of ``rows``
    positions with this rank's part of them.
    """
    attention = 2 * (shard.q_heads + shard.kv_heads) * config.head_dim  # queries, keys, values, result
    widest = max(attention, shard.intermediate)
    logits = rows * (config.vocab_size + shard.vocab)
    return (tokens * (3 * config.hidden_size + widest) + logits) * itemsize


def largest_batch(free: float, per_row: int) -> int:
    """How many rows of ``per_row`` bytes fit into ``free``; 0 when none does."""
    return max(0, int(free // per_row))
