"""Tier: CPU ranks. What ``apply_tp_kernels`` refuses, on all ranks alike, and that it leaves such a model as it was."""

import pytest
import torch
from torch import nn

from tp_kernels.testing.tiny_models import make_tiny_model

transformers = pytest.importorskip("transformers")

from tp_kernels.integrations import apply_tp_kernels  # noqa: E402

IDS = torch.arange(1, 27).view(2, 13)
QK_NORM, TIED = "qwen3-4h1", "llama-9h3-tied-rope3"


def wrapped_in_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def with_lora_inside(model):
    wrapped_in_lora(model)  # PEFT puts its layers into the model itself
    return model


def changed(change):
    def make(model):
        change(model)
        return model

    return make


class OtherLinear(nn.Linear):
    """Stands for a quantised layer, a parametrised one, or any other that is no plain nn.Linear."""


def replace_up_proj(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj = OtherLinear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)


def with_gradients(model):
    model(IDS, labels=IDS).loss.backward()


REFUSED = {
    "base model": (lambda model: model.model, {}, "not its base model"),
    "not a model": (lambda model: "a/path", {}, "LlamaForCausalLM"),
    "compiled": (lambda model: torch.compile(model), {}, "before torch.compile"),
    "PEFT": (wrapped_in_lora, {}, "before get_peft_model"),
    "PEFT inside": (with_lora_inside, {}, "before get_peft_model"),
    "another linear": (changed(replace_up_proj), {}, r"layers\.1\.mlp\.up_proj.*OtherLinear"),
    "hook": (changed(lambda m: m.lm_head.register_forward_hook(print)), {}, "lm_head has hooks"),
    "gradients": (changed(with_gradients), {}, "zero_grad"),
    "quantiser": (changed(lambda m: setattr(m, "hf_quantizer", object())), {}, "quantised"),
    "tp_plan": (changed(lambda m: setattr(m, "_tp_size", 2)), {}, "tp_plan"),
    "device map": (changed(lambda m: setattr(m, "hf_device_map", {"a": 0, "b": 1})), {}, "spread over devices"),
    "untied": (changed(lambda m: setattr(m.config, "tie_word_embeddings", True)), {}, "tied"),
    "overlap": (lambda model: model, {"overlap": "much"}, "overlap must be one of"),
    "overlap on the CPU": (lambda model: model, {"overlap": "chunked"}, "chunked"),
    "option": (lambda model: model, {"swiglu": "yes"}, "True or False"),
    "twice": (apply_tp_kernels, {}, "applied to this model already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_patched_is_refused_and_left_alone(case):
    make, options, message = REFUSED[case]
    model = make(make_tiny_model(QK_NORM))
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    kinds = {name: type(module) for name, module in modules.items()}
    values = {key: value.clone() for key, value in model.state_dict().items()} if modules else {}
    with pytest.raises(ValueError, match=message):
        apply_tp_kernels(model, **options)
    if modules:
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert all(module is modules[name] for name, module in model.named_modules())
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def ranks_refuse(group):
    """Every rank's message, where one rank or all of them have something to say."""

    def message_of(model, **options):
        before = {name: type(module) for name, module in model.named_modules()}
        try:
            apply_tp_kernels(model, group, **options)
        except ValueError as error:
            assert {name: type(module) for name, module in model.named_modules()} == before
            return str(error)
        return "no error"

    hooked = make_tiny_model(QK_NORM)
    if group.rank == 1:
        hooked.lm_head.register_forward_hook(print)
    return {
        "linear=False": message_of(make_tiny_model(QK_NORM), linear=False),
        "one rank": message_of(hooked),
        "different": message_of(make_tiny_model(QK_NORM if group.rank else TIED)),
        "options": message_of(make_tiny_model(QK_NORM), norms=group.rank == 0),
    }


def test_ranks_refuse_together(rank_pool):
    for messages in rank_pool(2).run(ranks_refuse):
        assert "expected one rank, got 2" in messages["linear=False"]
        assert "lm_head has hooks" in messages["one rank"]
        assert "another" in messages["different"] and "another" in messages["options"]


def test_more_ranks_than_heads(rank_pool):
    messages = rank_pool(3).run(too_many_ranks)
    assert all("2 query heads" in message for message in messages)


def too_many_ranks(group):
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=48, vocab_size=60, num_hidden_layers=1
    )
    with pytest.raises(ValueError) as caught:
        apply_tp_kernels(transformers.LlamaForCausalLM(config), group)
    return str(caught.value)
