"""Tier: CPU ranks. A decode plan gives the bits of the modules, and says when there cannot be one."""

import pytest
import torch

from tp_kernels.inference.decode_plan import DecodePlan
from tp_kernels.inference.generation import generate
from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.tiny_models import TINY_MODELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tiny(group=None, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    config = {"model_type": "llama", **sizes, "max_position_embeddings": 64, **changes}
    return ParallelCausalLM(ModelConfig.from_hf(config), group=group, dtype=dtype)


def compare_with_modules(group):
    """For every family and dtype: steps of a ragged batch by plan and by modules, whose bits must agree."""
    torch.set_num_threads(1)
    for name, (family, options) in TINY_MODELS.items():
        for dtype in DTYPES:
            torch.manual_seed(1)
            config = ModelConfig.from_hf({"model_type": family.lower(), **options})
            model = ParallelCausalLM(config, group=group, dtype=dtype)
            with torch.inference_mode():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)).to(dtype))
                prompts = torch.randint(0, config.vocab_size, (3, 9))
                caches = [KVCache.for_model(model, 3, 16) for _ in range(2)]
                for cache in caches:
                    model.hidden_states(prompts, cache=cache)
                    cache.set_lengths([9, 2, 6])
                plan = DecodePlan(model, caches[0])
                for _ in range(4):
                    tokens = torch.randint(0, config.vocab_size, (3, 1))
                    planned = plan(tokens.flatten().tolist())
                    expected = model.local_logits(model.hidden_states(tokens, cache=caches[1])[:, 0])
                    assert torch.equal(planned, expected), f"{name} {dtype}"
                    for cache in caches:
                        cache.advance(1)


@pytest.mark.parametrize("world_size, options", [(1, {}), (2, {}), (3, {}), (2, {"backend": "gloo"})])
def test_a_plan_has_the_bits_of_the_modules(rank_pool, world_size, options):
    rank_pool(world_size, **options).run(compare_with_modules)


def test_generate_takes_the_plan_and_says_so():
    assert generate(tiny(), [[1, 2]], max_new_tokens=3, stop_ids=()).decode_path == "plan"
    assert generate(tiny(), [[1, 2]], max_new_tokens=1).decode_path == ""


def hooked():
    model = tiny()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def patched():
    model = tiny()
    attention = model.model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args: original(*args)
    return model


class Adapted(torch.nn.Module):
    """What adapter libraries put in a projection's place."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.in_features, self.out_features_local = base.in_features, getattr(base, "out_features_local", None)

    def forward(self, x):
        return self.base(x) * 2


def adapted():
    model = tiny()
    model.model.layers[0].self_attn.o_proj = Adapted(model.model.layers[0].self_attn.o_proj)
    return model


def adapted_head():
    model = tiny()
    model.lm_head.register_forward_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "make, rows, reason",
    [
        (lambda: tiny(dtype=torch.float64), 1, "float64"),
        (tiny, 100, "100 rows"),
        (hooked, 1, "hooks"),
        (patched, 1, "stands in"),
        (adapted, 1, "Adapted stands in for RowParallelLinear"),
        (adapted_head, 1, "hooks"),
        (lambda: tiny(head_dim=258), 1, "head_dim"),
    ],
)
def test_without_a_plan_the_modules_run_and_the_reason_is_told(make, rows, reason):
    model = make()
    assert reason in DecodePlan.why_not(model, rows)
    with torch.inference_mode(), pytest.raises(ValueError, match=reason):
        DecodePlan(model, KVCache.for_model(model, rows, 4))
    result = generate(model, [[1, 2]] * rows, max_new_tokens=2, stop_ids=())
    assert result.decode_path.startswith("modules: ") and reason in result.decode_path


def test_autocast_keeps_the_modules():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in DecodePlan.why_not(tiny(), 1)


def test_a_full_cache_is_an_error():
    model = tiny()
    with torch.inference_mode():
        cache = KVCache.for_model(model, 1, 3)
        model.hidden_states(torch.tensor([[1, 2, 3]]), cache=cache)
        cache.advance(3)
        with pytest.raises(ValueError, match="max_len"):
            DecodePlan(model, cache)([4])


def test_tokens_are_checked():
    model = tiny()
    with torch.inference_mode():
        plan = DecodePlan(model, KVCache.for_model(model, 2, 3))
        for tokens, message in (([1], "rows"), ([1, 50], "tokens in"), ([-1, 0], "tokens in")):
            with pytest.raises(ValueError, match=message):
                plan(tokens)
