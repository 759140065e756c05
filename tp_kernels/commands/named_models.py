"""Whole configurations of the models that benchmarks and the planner know by name."""

from __future__ import annotations

from tp_kernels.models.config import ModelConfig
from tp_kernels.testing.op_bench.shapes import ARCHITECTURES, MODELS

__all__ = ["config_of"]

# More positions than any case needs; a rotation table is made for those that are used.
_POSITIONS = 1 << 17


def config_of(name: str, layers: int | None = None) -> ModelConfig:
    """The configuration of one of ``MODELS``, with fewer layers if so asked."""
    shapes, architecture = MODELS[name], ARCHITECTURES[name]
    return ModelConfig(
        model_type=architecture.model_type,
        vocab_size=shapes.vocab,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=layers or architecture.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        max_position_embeddings=_POSITIONS,
        rms_norm_eps=architecture.eps,
        rope_theta=architecture.theta,
        qk_norm=shapes.qk_norm,
    )
