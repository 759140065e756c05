"""Tier: CPU ranks. What users do to patched models later, and what ranks do differently: never a silent difference."""

import re

import pytest
import torch
from torch import nn

from tp_kernels.layers import clip_grad_norm_, full_gradients
from tp_kernels.testing.numeric import assert_close_to_reference, max_error
from tp_kernels.testing.tiny_models import make_tiny_model

transformers = pytest.importorskip("transformers")

from tp_kernels.integrations import apply_tp_kernels  # noqa: E402

IDS, LIMIT = torch.arange(1, 27).view(2, 13), 0.5
WINDOWED, MIXED, QK_NORM, TIED = "mistral-6h2-window", "qwen2-6h2-tied-window", "qwen3-4h1", "llama-9h3-tied-rope3"


def tiny(name, dtype=torch.float32):
    model = make_tiny_model(name)
    model.config._attn_implementation = "sdpa"
    return model.to(dtype)


def both(name):
    """(patched for one rank, stock) with the same weights."""
    return apply_tp_kernels(tiny(name)), tiny(name)


# One rank ------------------------------------------------------------------------------------------------------------


def test_masks_that_only_look_plain():
    """A mask that ends before the keys hides them; masks that a caller left out hide nothing, whatever the window."""
    with torch.no_grad():
        for name in (WINDOWED, QK_NORM):
            ours, stock = both(name)
            caches = [model(IDS[:, :9]).past_key_values for model in (ours, stock)]
            short = {"attention_mask": torch.ones(2, 4, dtype=torch.int64)}
            a, b = (
                model(IDS[:, 9:], past_key_values=cache, **short).logits
                for model, cache in zip((ours, stock), caches, strict=True)
            )
            torch.testing.assert_close(a, b)
        ours, stock = both(MIXED)
        left_out = {"full_attention": None, "sliding_attention": None}
        a, b = (model(IDS, attention_mask=left_out).logits for model in (ours, stock))
        torch.testing.assert_close(a, b)


def test_the_activation_may_be_watched_and_replaced():
    ours, stock = both(WINDOWED)
    seen = {id(model): [] for model in (ours, stock)}
    for model in (ours, stock):
        record = seen[id(model)]
        model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *call, to=record: to.append(call[2].detach()))
        model.model.layers[1].mlp.act_fn = nn.Tanh()
    torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits)
    torch.testing.assert_close(seen[id(ours)], seen[id(stock)])
    assert len(seen[id(ours)]) == 1


def test_a_head_that_was_untied_stays_untied():
    model = apply_tp_kernels(tiny(TIED))
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    expected = model(IDS).logits
    torch.testing.assert_close(model.double().float()(IDS).logits, expected)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_tied_head_that_peft_wraps_can_be_moved(options):
    peft = pytest.importorskip("peft")
    from tp_kernels.integrations import register_lora

    config = register_lora(peft.LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | options)))
    model = peft.get_peft_model(apply_tp_kernels(tiny(TIED)), config)
    keys, expected = list(model.state_dict()), model(IDS).logits
    model.double().float()
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(IDS).logits, expected)


def test_packed_tensors_are_not_taken_for_tied_ones(tmp_path):
    """safetensors refuses what shares a storage, accelerate drops all but one of it."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = apply_tp_kernels(tiny(QK_NORM))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    with torch.inference_mode():
        state = model.state_dict()
    assert not any(value.is_inference() for value in state.values())
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in saved)
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    parameters = dict(model.named_parameters())
    assert all(value.data_ptr() == parameters[key].data_ptr() for key, value in state.items()), "copied"
    state["model.layers.0.mlp.up_proj.weight"].zero_()
    assert not model.model.layers[0].mlp.up_proj.weight.any()
    assert model.model.layers[0].mlp.joined() is not None


@pytest.mark.parametrize("changed", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_weights_changed_before_backward_are_noticed(changed):
    model = apply_tp_kernels(tiny(QK_NORM))
    loss = model(IDS, labels=IDS).loss
    with torch.no_grad():
        model.model.layers[1].get_submodule(changed).weight.add_(1)
    with pytest.raises(RuntimeError, match=r"modified.* inplace"):
        loss.backward()


# On ranks ------------------------------------------------------------------------------------------------------------


def ranks_that_differ(group, folder):
    """Samples of ranks with other generators; errors where their calls would part."""
    model, found = apply_tp_kernels(tiny(QK_NORM), group), {}
    torch.manual_seed(7 + group.rank)
    options = dict(max_new_tokens=6, eos_token_id=None)
    found["sampled"] = [model.generate(IDS, do_sample=True, **options)]
    config = transformers.GenerationConfig(do_sample=True, **options)
    found["sampled"].append(model.generate(IDS, generation_config=config))
    before = torch.get_rng_state()
    model.generate(IDS, do_sample=False, **options)
    found["untouched"] = torch.equal(before, torch.get_rng_state())
    first = group.rank == 0
    calls = {
        "max_time": lambda: model.generate(IDS, max_time=60.0),
        "names": lambda: model.save_pretrained(folder, state_dict=model.state_dict() if first else {}),
        "shape": lambda: model.save_pretrained(
            folder, state_dict=model.state_dict() | ({} if first else {"lm_head.weight": torch.ones(3)})
        ),
    }
    for case, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        found[case] = str(caught.value)
    return found


def test_ranks_sample_alike_and_fail_alike(rank_pool, tmp_path):
    stock = tiny(QK_NORM)
    torch.manual_seed(7)
    expected = [stock.generate(IDS, do_sample=True, max_new_tokens=6, eos_token_id=None) for _ in range(2)]
    for found in rank_pool(2).run(ranks_that_differ, tmp_path):
        assert all(torch.equal(*pair) for pair in zip(found["sampled"], expected, strict=True)) and found["untouched"]
        assert re.search("max_new_tokens", found["max_time"])
        assert re.search(r"ranks \[1\] were given a state_dict of other tensors", found["names"])
        assert re.search(r"rank 1: .*lm_head.weight: expected this rank's slice", found["shape"])
    assert not list(tmp_path.iterdir())


def norms_of(group):
    model = apply_tp_kernels(tiny(QK_NORM), group)
    model(IDS, labels=IDS).loss.backward()
    norms = [clip_grad_norm_(model, 1e9, norm_type) for norm_type in (1.0, 2.0, float("inf"))]
    model.lm_head.weight.grad[0, 0] = float("nan") if group.rank == group.world_size - 1 else 1.0
    with pytest.raises(RuntimeError, match="expected a finite one"):
        clip_grad_norm_(model, LIMIT, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="norm_type"):
        clip_grad_norm_(model, LIMIT, 0.0)
    return torch.stack(norms)


@pytest.mark.parametrize("world_size", [1, 3])
def test_gradients_are_clipped_by_the_norm_of_the_whole_model(rank_pool, world_size):
    """Every element counts once, those of KV heads that ranks share and of replicated norms, too."""
    stock = tiny(QK_NORM)
    stock(IDS, labels=IDS).loss.backward()
    kinds = 1.0, 2.0, float("inf")
    expected = torch.stack([nn.utils.clip_grad_norm_(stock.parameters(), 1e9, kind) for kind in kinds])
    for norms in rank_pool(world_size).run(norms_of):
        torch.testing.assert_close(norms, expected)


def run_beside_data_parallelism(group, folder):
    """FSDP2 and DDP over the other dimension of a 2 x 2 mesh, each replica with its row; the second of two steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh, results = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {}
    mine = IDS.chunk(2)[mesh.get_local_rank("dp")]
    for kind in ("fsdp", "ddp"):
        model = apply_tp_kernels(tiny(TIED), mesh["tp"])
        if kind == "fsdp":
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh["dp"])
            run = fully_shard(model, mesh=mesh["dp"])
        else:
            run = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        for _ in range(2):
            model.zero_grad()
            run(input_ids=mine, labels=mine).loss.backward()
        gradients = full_gradients(model)
        norm = clip_grad_norm_(model, LIMIT)
        clipped = full_gradients(model)
        model.save_pretrained(folder / kind)
        with torch.no_grad():
            results[kind] = run(input_ids=IDS).logits, gradients, norm, clipped
    return results


def test_beside_fsdp2_and_ddp(rank_pool, tmp_path):
    found = []
    for dtype in (torch.float32, torch.float64):
        model = tiny(TIED, dtype)
        output = model(IDS, labels=IDS)
        output.loss.backward()
        found.append((output.logits.detach(), {key: p.grad for key, p in model.named_parameters()}))
    (theirs, single), (exact, gradients) = found
    allowed = 2 * max(max_error(single[key], gradients[key]) for key in gradients)
    ranks = rank_pool(4).run(run_beside_data_parallelism, tmp_path)
    for results in ranks:
        for kind, (logits, ours, *_) in results.items():
            assert_close_to_reference(logits, theirs, exact, name=kind)
            for key, gradient in gradients.items():
                assert max_error(ours[key], gradient) <= allowed, f"{kind}: {key}"
    parameters = [nn.Parameter(torch.empty_like(gradient)) for gradient in single.values()]
    for parameter, gradient in zip(parameters, single.values(), strict=True):
        parameter.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(parameters, LIMIT)
    clipped = {key: parameter.grad for key, parameter in zip(single, parameters, strict=True)}
    for results in ranks:
        for _, _, ours, after in results.values():
            torch.testing.assert_close(ours, norm)
            for key, gradient in clipped.items():
                torch.testing.assert_close(after[key], gradient)
    stock = tiny(TIED).state_dict()
    for kind in ("fsdp", "ddp"):
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind).state_dict()
        assert all(torch.equal(saved[key], value) for key, value in stock.items()), kind
