"""Decoder-only language models (Llama, Mistral, Qwen2, Qwen3, SmolLM2) built from the parallel layers."""

from tp_kernels.models.causal_lm import ParallelCausalLM
from tp_kernels.models.config import SUPPORTED_MODEL_TYPES, ModelConfig

__all__ = ["SUPPORTED_MODEL_TYPES", "ModelConfig", "ParallelCausalLM"]
