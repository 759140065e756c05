"""Tier: no device. ModelConfig against the configuration classes of transformers, and what it refuses."""

import json

import pytest

from tp_kernels.models import ModelConfig

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=100, num_hidden_layers=4, num_attention_heads=6)


def hf_dict(class_name, tmp_path, **kwargs):
    """What transformers writes into config.json for these arguments."""
    transformers = pytest.importorskip("transformers")
    getattr(transformers, class_name)(**SIZES, **kwargs).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def test_llama_5_style(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = ModelConfig.from_hf(
        hf_dict(
            "LlamaConfig",
            tmp_path,
            num_key_value_heads=2,
            rope_parameters=rope,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            eos_token_id=[2, 7],
            rms_norm_eps=1e-5,
        )
    )
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (8, 2, 500000.0)
    assert config.rope_scaling == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert config.tie_word_embeddings and config.qkv_bias and config.o_bias and config.mlp_bias and not config.qk_norm
    assert config.eos_token_ids == (2, 7) and config.rms_norm_eps == 1e-5
    assert config.layer_windows == (None,) * 4


def test_older_rope_keys_mean_the_same(tmp_path):
    new = hf_dict("LlamaConfig", tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4})
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    plain = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_theta": 7e5, "rope_scaling": None}
    config = ModelConfig.from_hf(plain)
    assert config.rope_theta == 7e5 and config.rope_scaling is None


def test_llama3_falls_back_to_max_positions():
    rope = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    config = ModelConfig.from_hf(SIZES | {"model_type": "llama", "rope_scaling": rope, "max_position_embeddings": 512})
    assert config.rope_scaling["original_max_position_embeddings"] == 512


def test_mistral_window(tmp_path):
    config = ModelConfig.from_hf(hf_dict("MistralConfig", tmp_path, num_key_value_heads=3, sliding_window=5))
    assert config.layer_windows == (5,) * 4 and not config.qkv_bias and not config.o_bias
    assert ModelConfig.from_hf(SIZES | _mistral(sliding_window=None)).layer_windows == (None,) * 4
    assert ModelConfig.from_hf(SIZES | _mistral()).layer_windows == (4096,) * 4


def _mistral(**kwargs):
    return {"model_type": "mistral", "num_key_value_heads": 3, **kwargs}


def test_qwen2_window_by_layer(tmp_path):
    given = dict(num_key_value_heads=2, sliding_window=9, max_window_layers=3)
    off = ModelConfig.from_hf(hf_dict("Qwen2Config", tmp_path, **given))
    assert off.qkv_bias and not off.o_bias and off.layer_windows == (None,) * 4
    on = hf_dict("Qwen2Config", tmp_path, use_sliding_window=True, **given)
    assert ModelConfig.from_hf(on).layer_windows == (None, None, None, 9)
    # Files of transformers 4 have no layer_types.
    assert ModelConfig.from_hf({k: v for k, v in on.items() if k != "layer_types"}).layer_windows == (None,) * 3 + (9,)


def test_qwen3(tmp_path):
    config = ModelConfig.from_hf(hf_dict("Qwen3Config", tmp_path, num_key_value_heads=2, head_dim=16))
    assert config.qk_norm and config.head_dim == 16 and not config.qkv_bias and not config.o_bias
    biased = ModelConfig.from_hf(
        hf_dict("Qwen3Config", tmp_path, num_key_value_heads=2, head_dim=16, attention_bias=True)
    )
    assert biased.qkv_bias and biased.o_bias


def test_sparse_configs_use_the_family_defaults():
    transformers = pytest.importorskip("transformers")
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        defaults = getattr(transformers, f"{name}Config")()
        sparse = {"model_type": name.lower(), **SIZES, "num_attention_heads": 32, "hidden_size": 128}
        config = ModelConfig.from_hf(sparse)
        assert config.num_key_value_heads == defaults.num_key_value_heads
        assert config.max_position_embeddings == defaults.max_position_embeddings
        assert config.rms_norm_eps == defaults.rms_norm_eps
        assert config.tie_word_embeddings == defaults.tie_word_embeddings
        assert config.head_dim == (128 if name == "Qwen3" else 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mixtral"}, "supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "supported: llama"),
        ({"num_local_experts": 8}, "mixture-of-experts"),
        ({"hidden_act": "gelu"}, "supported: .*silu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "supported: default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "supported: default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 50}, "not a multiple"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "even"),
        ({"num_hidden_layers": 0}, "positive integer"),
        ({"vocab_size": "97"}, "positive integer"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ],
)
def test_refusals_name_what_is_supported(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({"model_type": "llama", **SIZES, **change})


def test_a_config_object_is_refused_with_the_cure():
    with pytest.raises(ValueError, match="to_dict"):
        ModelConfig.from_hf(object())
