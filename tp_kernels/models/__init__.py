"""Decoder-only language models (Llama, Mistral, Qwen2, Qwen3, SmolLM2) built from the parallel layers.

Everything is imported on first use: configurations are read where no torch is needed.
"""

from __future__ import annotations

import importlib

# public name -> submodule that defines it
_EXPORTS = {
    "SUPPORTED_MODEL_TYPES": "config",
    "ModelConfig": "config",
    "ParallelCausalLM": "causal_lm",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})
