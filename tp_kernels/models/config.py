"""``ModelConfig``: the sizes and switches of a decoder-only model, read from a Hugging Face config dict.

One flat description for the whole family (Llama, Mistral, Qwen2, Qwen3; SmolLM2 is a Llama). Where a key is absent the
value is the one that family's own configuration class falls back to, so a sparse ``config.json`` means what its author
meant. Whatever would change the computation and is not implemented is refused here by name, before memory is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SUPPORTED_MODEL_TYPES", "SUPPORTED_ROPE_TYPES", "ModelConfig"]

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")
_ACTIVATIONS = {"silu": "silu", "swish": "silu"}


@dataclass(frozen=True)
class _Family:
    """What a model type fixes, and what it assumes where the config says nothing."""

    num_key_value_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: hidden_size // num_attention_heads
    max_position_embeddings: int
    sliding_window: int | None = None
    qkv_bias: bool | None = False  # None: the config's attention_bias decides, for the output projection too
    mlp_bias_key: bool = False
    qk_norm: bool = False
    window_by_layer: bool = False


_FAMILIES = {
    "llama": _Family(None, None, 2048, qkv_bias=None, mlp_bias_key=True),
    "mistral": _Family(8, None, 131072, sliding_window=4096),
    "qwen2": _Family(32, None, 32768, sliding_window=4096, qkv_bias=True, window_by_layer=True),
    "qwen3": _Family(32, 128, 32768, sliding_window=4096, qkv_bias=None, qk_norm=True, window_by_layer=True),
}
SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: pre-norm, RoPE, grouped-query attention, gated MLP.

    Attributes:
        model_type: ``"llama"``, ``"mistral"``, ``"qwen2"`` or ``"qwen3"``.
        layer_windows: one entry a layer: the sliding window in tokens (the token itself included), or None for full
            attention.
        rope_scaling: None, or a dict with ``rope_type`` ``"linear"`` or ``"llama3"`` and its numbers.
        qkv_bias, o_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMSNorm over each query and key head before RoPE.
        eos_token_ids: every id that ends a sequence; may be empty.
        checkpoint_dtype: the dtype the config says the weights were saved in (``"bfloat16"``), or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    layer_windows: tuple[int | None, ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    checkpoint_dtype: str | None = None

    def __post_init__(self):
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_hidden_layers)
        if len(self.layer_windows) != self.num_hidden_layers:
            raise ValueError(f"layer_windows must have {self.num_hidden_layers} entries, got {len(self.layer_windows)}")
        for window in self.layer_windows:
            if window is not None and (not isinstance(window, int) or window < 1):
                raise ValueError(f"a sliding window must be a positive integer or None, got {window!r}")
        if self.hidden_act not in _ACTIVATIONS.values():
            raise ValueError(f"activation {self.hidden_act!r} is not supported; supported: {sorted(_ACTIVATIONS)}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps!r}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta!r}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face configuration.

        Args:
            config: the content of ``config.json`` (transformers 4 or 5 style), ``PretrainedConfig.to_dict()``, or a
                GGUF file's metadata mapped to the same keys.
        Returns:
            The model's configuration.
        Raises:
            ValueError: the model type, activation, RoPE type, quantisation or a mixture of experts is not supported
                (the message names what is), or a size is missing or inconsistent.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"expected a config dict, got {type(config).__name__}; use PretrainedConfig.to_dict()")
        model_type = config.get("model_type")
        family = _FAMILIES.get(model_type)
        if family is None:
            raise ValueError(
                f"model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)} "
                "(SmolLM2 is llama)"
            )
        _refuse_unsupported(config)
        missing = [
            key
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
            if config.get(key) is None
        ]
        if missing:
            raise ValueError(f"the config of this {model_type} model lacks {', '.join(missing)}")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", family.num_key_value_heads)
        head_dim = config.get("head_dim", family.head_dim)
        if head_dim is None:
            if config["hidden_size"] % heads:
                raise ValueError(
                    f"hidden_size ({config['hidden_size']}) is not a multiple of num_attention_heads ({heads}) and "
                    "the config has no head_dim"
                )
            head_dim = config["hidden_size"] // heads
        max_positions = config.get("max_position_embeddings", family.max_position_embeddings)
        theta, scaling = _rope(config, max_positions)
        attention_bias = bool(config.get("attention_bias", False)) if family.qkv_bias is None else False
        activation = config.get("hidden_act") or "silu"
        if activation not in _ACTIVATIONS:
            raise ValueError(f"hidden_act {activation!r} is not supported; supported: {sorted(_ACTIVATIONS)}")
        return cls(
            model_type=model_type,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            hidden_act=_ACTIVATIONS[activation],
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            layer_windows=_windows(config, family),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) if family.mlp_bias_key else False,
            qk_norm=family.qk_norm,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=_id_tuple(config.get("eos_token_id")),
            checkpoint_dtype=_dtype_name(config.get("dtype") or config.get("torch_dtype")),
        )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (config.get(key) or 0) > 1:
            raise ValueError(f"mixture-of-experts models are not supported ({key}={config[key]}); only dense MLPs are")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise ValueError(
            f"a quantised checkpoint ({method}) is not supported; use float weights in safetensors, or a GGUF file"
        )
    # A partial rotary embedding leaves some channels alone; silently rotating all of them would give wrong text.
    factor = config.get("partial_rotary_factor")
    if factor is not None and factor != 1.0:
        raise ValueError(f"partial_rotary_factor={factor} is not supported; only 1.0 is")


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters must be a dict, got {type(parameters).__name__}")
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None)
    theta = float(theta if theta is not None else config.get("rope_theta") or 10000.0)
    old_name = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", None) or old_name or "default"
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError("rope_parameters per layer type are not supported; expected one set for all layers")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ValueError(f"rope type {rope_type!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported; only 1.0 is")
    if rope_type == "default":
        return theta, None
    needed = ["factor"] + (["low_freq_factor", "high_freq_factor"] if rope_type == "llama3" else [])
    missing = [key for key in needed if parameters.get(key) is None]
    if missing:
        raise ValueError(f"rope type {rope_type!r} needs {', '.join(missing)}")
    scaling = {"rope_type": rope_type} | {key: float(parameters[key]) for key in needed}
    if rope_type == "llama3":
        original = parameters.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = int(original or max_positions)
    return theta, scaling


def _windows(config: Mapping[str, Any], family: _Family) -> tuple[int | None, ...]:
    """The sliding window of every layer. Families without one ignore the key, as their reference code does."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window", family.sliding_window) if family.sliding_window is not None else None
    if not family.window_by_layer or window is None:
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        window = None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    if len(types) != layers or any(t not in known for t in types):
        raise ValueError(f"layer_types must be {layers} of {sorted(known)}, got {list(types)}")
    return tuple(known[t] for t in types)


def _id_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _dtype_name(value: Any) -> str | None:
    return None if value is None else str(value).removeprefix("torch.")
