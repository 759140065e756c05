"""Tiny random Hugging Face models of every supported family: the oracle of tests that need a whole model.

The shapes are chosen to be awkward: head counts that no rank count divides, a vocabulary and an MLP width that are odd,
sliding windows shorter than the prompts. Needs transformers, which is imported only when a model is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["TINY_MODELS", "make_tiny_model", "save_tiny_model"]

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name -> (family, configuration). "9h3" means 9 query heads and 3 KV heads.
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-9h3-tied-rope3": (
        "Llama",
        dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, intermediate_size=101, vocab_size=131)
        | dict(tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE, num_hidden_layers=3),
    ),
    "llama-5h5-biased": (
        "Llama",
        dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=5, intermediate_size=56, vocab_size=97)
        | dict(attention_bias=True, mlp_bias=True, num_hidden_layers=2)
        | dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}),
    ),
    "mistral-6h2-window": (
        "Mistral",
        dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80, vocab_size=113)
        | dict(head_dim=16, sliding_window=5, num_hidden_layers=2),
    ),
    "qwen2-6h2-tied-window": (
        "Qwen2",
        dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=99, vocab_size=128)
        | dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1)
        | dict(num_hidden_layers=3),
    ),
    "qwen3-4h1": (
        "Qwen3",
        dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=1, intermediate_size=72, vocab_size=101)
        | dict(head_dim=16, num_hidden_layers=2),
    ),
}


def make_tiny_model(name: str, seed: int = 0):
    """One of ``TINY_MODELS`` as a float32 ``*ForCausalLM`` in eval mode.

    The weights are large enough that attention is far from uniform and logits far from equal; biases and norm weights,
    which transformers initialises to 0 and 1, are random too.

    Args:
        name: a key of ``TINY_MODELS``.
        seed: of the weights; the global generator is left alone.
    Raises:
        ValueError: the name is unknown.
    """
    import transformers

    if name not in TINY_MODELS:
        raise ValueError(f"unknown tiny model {name!r}; expected one of {', '.join(TINY_MODELS)}")
    family, options = TINY_MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.2 * noise + (0.0 if key.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
    return model


def save_tiny_model(name: str, folder: Path, seed: int = 0):
    """Make the model, save it as Hugging Face does into ``folder / name``, and return it."""
    model = make_tiny_model(name, seed)
    model.save_pretrained(folder / name)
    return model
