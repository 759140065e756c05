"""Decoder-only language models (Llama, Mistral, Qwen2, Qwen3, SmolLM2) built from the parallel layers.

Everything is imported on first use: configurations are read where no torch is needed.
"""

from tp_kernels._lazy import lazy

_HOMES = {
    "config": ["SUPPORTED_MODEL_TYPES", "ModelConfig"],
    "causal_lm": ["ParallelCausalLM"],
}

__all__ = [name for names in _HOMES.values() for name in names]

__getattr__, __dir__ = lazy(__name__, _HOMES)
