"""The models that benchmarks and the planner know by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tp_kernels.checkpoint.sharding import shard_heads_sizes, shard_range_sizes, shard_width_sizes

__all__ = ["ARCHITECTURES", "MODELS", "Architecture", "Shapes"]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model that benchmarks derive their shapes from (all unsharded)."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool = False

    def shard(self, tp: int) -> Shapes:
        """Sizes of rank 0 of ``tp``; hidden size and head size are never cut."""
        heads, kv_heads = shard_heads_sizes(self.heads, self.kv_heads, tp)[0]
        return replace(
            self,
            intermediate=shard_width_sizes(self.intermediate, tp)[0],
            heads=heads,
            kv_heads=kv_heads,
            vocab=shard_range_sizes(self.vocab, tp)[0],
        )


MODELS: dict[str, Shapes] = {
    "llama3-8b": Shapes("llama3-8b", 4096, 14336, 32, 8, 128, 128256),
    "llama3-70b": Shapes("llama3-70b", 8192, 28672, 64, 8, 128, 128256),
    "mistral-7b": Shapes("mistral-7b", 4096, 14336, 32, 8, 128, 32768),
    "qwen3-8b": Shapes("qwen3-8b", 4096, 12288, 32, 8, 128, 151936, qk_norm=True),
    # Small enough for Triton's interpreter: exercises the benchmarks themselves, says nothing about speed.
    "tiny": Shapes("tiny", 64, 96, 4, 2, 16, 97, qk_norm=True),
}


@dataclass(frozen=True)
class Architecture:
    """What ``Shapes`` leave open about a whole model."""

    model_type: str
    layers: int
    theta: float
    eps: float


# Of the published configurations (for "tiny": anything).
ARCHITECTURES: dict[str, Architecture] = {
    "llama3-8b": Architecture("llama", 32, 500000.0, 1e-5),
    "llama3-70b": Architecture("llama", 80, 500000.0, 1e-5),
    "mistral-7b": Architecture("mistral", 32, 1000000.0, 1e-5),
    "qwen3-8b": Architecture("qwen3", 36, 1000000.0, 1e-6),
    "tiny": Architecture("qwen3", 2, 10000.0, 1e-6),
}
