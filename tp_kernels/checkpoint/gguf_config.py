"""GGUF metadata as a Hugging Face config dict, and GGUF tensor names as Hugging Face names.

llama.cpp's ``llama`` architecture covers Llama, SmolLM2 and Mistral. The Llama-3 frequency scaling is not stored as
parameters but as the tensor ``rope_freqs.weight`` of factors per frequency, from which the parameters are recovered.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from tp_kernels.checkpoint.errors import CheckpointError
from tp_kernels.checkpoint.gguf_header import GGUFTensorInfo

__all__ = ["SUPPORTED_ARCHITECTURES", "gguf_to_hf_config", "hf_name", "permuted_head_rows"]

SUPPORTED_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# The converter of these interleaves the two halves of every query and key head (its own rotary layout).
_PERMUTED = ("llama", "mistral")

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")
_GLOBAL = re.compile(r"([a-z_]+)\.(weight|bias)")


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor, or the name itself when it has none."""
    if (match := _LAYER.fullmatch(name)) and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    if (match := _GLOBAL.fullmatch(name)) and match[1] in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[match[1]]}.{match[2]}"
    return name


def permuted_head_rows(name: str, config: dict[str, Any], architecture: str) -> int | None:
    """Rows of one head if the tensor (Hugging Face name) is stored with interleaved head halves, else None."""
    if architecture not in _PERMUTED or not re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name):
        return None
    return config["head_dim"]


def gguf_to_hf_config(
    metadata: dict[str, Any],
    tensors: dict[str, GGUFTensorInfo],
    rope_factors: np.ndarray | None,
    *,
    file: str,
) -> dict[str, Any]:
    """Map a GGUF file's metadata to the keys of ``config.json``.

    Args:
        metadata, tensors: the file's header.
        rope_factors: content of ``rope_freqs.weight``, if the file has it.
        file: path, for errors.
    Raises:
        CheckpointError: an architecture or feature that is not supported, or a key that is missing or of the wrong
        type.
    """

    def fail(message: str) -> CheckpointError:
        return CheckpointError(message, file=file)

    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise fail(f"architecture {architecture!r} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
    if isinstance(metadata.get("split.count"), int) and metadata["split.count"] > 1:
        raise fail(f"is one of {metadata['split.count']} split files; merge them with llama.cpp's gguf-split --merge")

    def get(key: str, kind: type, default: Any = None, *, required: bool = False) -> Any:
        full = f"{architecture}.{key}"
        value = metadata.get(full)
        if value is None:
            if required:
                raise fail(f"the metadata lacks {full}")
            return default
        if kind is int and isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = int(value[0])  # per-layer arrays of one and the same number
        good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not good or (kind is float and not math.isfinite(value)):
            raise fail(f"{full} must be one {kind.__name__}, got {value!r}"[:300])
        return value

    heads = get("attention.head_count", int, required=True)
    hidden = get("embedding_length", int, required=True)
    layers = get("block_count", int, required=True)
    if heads < 1 or hidden < 1 or layers < 1:
        raise fail(f"impossible sizes: {heads} heads, embedding length {hidden}, {layers} blocks")
    if (get("expert_count", int, 0) or 0) > 0:
        raise fail("mixture-of-experts models are not supported; only dense MLPs are")
    rope_dims = get("rope.dimension_count", int)
    head_dim = get("attention.key_length", int, rope_dims or hidden // heads)
    if get("attention.value_length", int, head_dim) != head_dim:
        raise fail("key and value heads of different size are not supported")
    if (rope_dims or head_dim) != head_dim or head_dim < 2 or head_dim % 2:
        raise fail(
            f"rotary embedding over {rope_dims} of {head_dim} channels is not supported; expected all, an even number"
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("is missing or not a matrix", file=file, tensor="token_embd.weight")

    window = get("attention.sliding_window", int)
    theta = float(get("rope.freq_base", float, 10000.0))
    context = get("context_length", int, required=True)
    config = {
        # llama.cpp has no architecture for Mistral: it is a Llama that may have a window.
        "model_type": "mistral" if architecture in _PERMUTED and window else architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int, required=True),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon", float, 1e-6)),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(get, theta, head_dim, context, rope_factors, fail),
        "sliding_window": window,
        "use_sliding_window": bool(window),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "dtype": {"F16": "float16", "BF16": "bfloat16"}.get(embedding.type, "float32"),
    }
    if window and architecture.startswith("qwen"):
        config["max_window_layers"] = 0
    for key, source in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = metadata.get(f"tokenizer.ggml.{source}_token_id")
        if isinstance(value, int):
            config[key] = value
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(value for value in ends if isinstance(value, int)))
    if len(ends) > 1:
        config["eos_token_id"] = ends
    return config


def _rope_scaling(get, theta, head_dim, context, factors, fail) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", str, "none")
    # Files of 2023 have only scale_linear.
    factor = float(get("rope.scaling.factor", float, get("rope.scale_linear", float, 1.0)))
    original = get("rope.scaling.original_context_length", int)
    if factors is not None:
        if kind not in ("none", "llama3"):
            raise fail(f"rope_freqs.weight together with rope scaling {kind!r} is not supported")
        return _llama3_scaling(factors, theta, head_dim, original, fail)
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original or context}


def llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """What Llama-3 scaling divides each of the ``head_dim // 2`` frequencies by, float64."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _llama3_scaling(factors, theta, head_dim, original, fail) -> dict[str, Any] | None:
    """Parameters that give ``factors``. Scaling context and thresholds together changes nothing, so one is chosen."""
    factors = np.asarray(factors, dtype=np.float64)
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or (factors < 1 - 1e-5).any():
        raise fail(f"rope_freqs.weight must hold {head_dim // 2} finite factors of at least 1")
    if np.allclose(factors, 1.0, rtol=1e-5):
        return None
    factor = float(factors.max())
    candidates = [(1.0, 4.0, original or 8192)]
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = (1.0 / factors - 1.0 / factor) / (1.0 - 1.0 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if between.sum() >= 2:
        # smooth = (context * frequency / 2 pi - low) / (high - low): a line in frequency.
        slope, intercept = np.polyfit(frequency[between] / (2 * math.pi), smooth[between], 1)
        context = original or 8192
        width = context / slope
        candidates.append((float(-intercept * width), float((1.0 - intercept) * width), context))
    for low, high, context in candidates:
        if not high > low:
            continue
        scaling = {
            "rope_type": "llama3",
            "factor": round(factor, 6),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        if np.allclose(llama3_factors(theta, head_dim, scaling), factors, rtol=1e-4):
            return scaling
    raise fail("rope_freqs.weight does not hold Llama-3 factors; other frequency tables are not supported")
