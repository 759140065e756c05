"""Tier: CPU ranks. PEFT LoRA on parallel layers at tp 1, 2, 3 against PEFT on the plain model.

Whole models go through ``apply_tp_kernels``; layer options and PEFT's own operations are tried on a pair of linears.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from tp_kernels.checkpoint.sharding import shard_range_sizes
from tp_kernels.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    full_gradients,
    full_state_dict,
)
from tp_kernels.testing.numeric import assert_close_to_reference, max_error
from tp_kernels.testing.tiny_models import TINY_MODELS, make_tiny_model

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
# Query groups that no number of ranks divides; one KV head that all ranks share.
MODELS = {"llama-9h3-tied-rope3": 4, "qwen3-4h1": 3}
OPTIONS = {"llama-9h3-tied-rope3": {}, "qwen3-4h1": {"use_rslora": True, "modules_to_save": ["lm_head"]}}
HALF = "llama-9h3-tied-rope3"
LENGTH, RATE = 11, 0.5


def input_ids(name):
    vocab = TINY_MODELS[name][1]["vocab_size"]
    return torch.randint(1, vocab, (2, LENGTH), generator=torch.Generator().manual_seed(len(name)))


def randomise(model, seed=5):
    """Give every factor values as large as trained ones; PEFT starts with B = 0, where half of the gradients vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.5 / parameter.shape[1] ** 0.5)


def train_step(model, ids):
    """Logits, gradients of the factors, and the logits after one step of SGD."""
    logits = model(ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trainable, lr=RATE).step()
    with torch.no_grad():
        return logits.detach(), model(ids).logits


def assert_all_close(actual, of_torch, exact):
    """At most twice PyTorch's error; rounding of the whole model reaches every tensor: its worst is the scale."""
    assert actual.keys() == exact.keys()
    allowed = 2 * max(max_error(of_torch[key], expected) for key, expected in exact.items())
    for key, expected in exact.items():
        assert max_error(actual[key], expected) <= allowed, key


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(folder of stock adapters, {model: {dtype: (logits, logits after a step, gradients, factors after it)}})."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for name, rank in MODELS.items():
        for dtype in (torch.float32, torch.float64):
            config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=TARGETS, **OPTIONS[name])
            model = peft.get_peft_model(make_tiny_model(name).to(dtype), config)
            randomise(model)
            if dtype is torch.float32:
                model.save_pretrained(folder / name)
            before, after = train_step(model, input_ids(name))
            grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            found.setdefault(name, {})[dtype] = before, after, grads, peft.get_peft_model_state_dict(model)
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(make_tiny_model(HALF).bfloat16(), folder / HALF)
        found["bf16"] = model(input_ids(HALF)).logits, model.double()(input_ids(HALF)).logits
    return folder, found


def run_models(group, folder, out):
    from tp_kernels.integrations import apply_tp_kernels, load_lora, save_lora

    torch.set_num_threads(1)
    results = {}
    for name in MODELS:
        model = apply_tp_kernels(make_tiny_model(name), group)
        model = load_lora(model, folder / name, is_trainable=True)
        before, after = train_step(model, input_ids(name))
        local = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        gathered = full_gradients(model)
        save_lora(model, out / f"{name}-{group.world_size}")
        with torch.no_grad(), model.disable_adapter():
            plain = model(input_ids(name)).logits
        with torch.no_grad():
            merged = model.merge_and_unload()
            assert not any("lora" in key for key, _ in merged.named_modules())
            assert merged.model.layers[0].self_attn.joined() is not None, "merging moved packed parameters apart"
            merged = merged(input_ids(name)).logits
        results[name] = before, after, gathered, local, plain, merged
    half = apply_tp_kernels(make_tiny_model(HALF).bfloat16(), group)
    with torch.no_grad():
        results["bf16"] = load_lora(half, folder / HALF)(input_ids(HALF)).logits
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_step_and_files_equal_peft_on_the_plain_model(oracle, rank_pool, tmp_path, world_size):
    folder, found = oracle
    ranks = rank_pool(world_size).run(run_models, folder, tmp_path)
    for results in ranks:
        assert_close_to_reference(results["bf16"], *found["bf16"], name="bf16 logits")
    for name in MODELS:
        single, exact = found[name][torch.float32], found[name][torch.float64]
        with torch.no_grad():
            untouched = make_tiny_model(name)(input_ids(name)).logits
            reference = make_tiny_model(name).double()(input_ids(name)).logits
        for rank, results in enumerate(ranks):
            before, after, gradients, local, plain, merged = results[name]
            assert_close_to_reference(before, single[0], exact[0], name=f"{name}: logits of rank {rank}")
            assert_close_to_reference(after, single[1], exact[1], name=f"{name}: after a step, rank {rank}")
            assert_close_to_reference(merged, single[1], exact[1], factor=4, name=f"{name}: merged, rank {rank}")
            assert_close_to_reference(plain, untouched, reference, name=f"{name}: disabled, rank {rank}")
            assert_all_close(gradients, single[2], exact[2])
            for key, gradient in local.items():
                if gradient.shape == exact[2][key].shape:
                    assert torch.equal(gradient, ranks[0][name][3][key]), f"{key} differs between ranks"
        # What was saved is a stock adapter: PEFT loads it onto the plain model.
        saved = tmp_path / f"{name}-{world_size}"
        model = peft.PeftModel.from_pretrained(make_tiny_model(name), saved)
        assert_all_close(peft.get_peft_model_state_dict(model), single[3], exact[3])
        assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == "LORA"


HIDDEN, WIDTH = 12, 37


class Pair(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        up, down = self.up(x), None
        up = up[0] + up[1] if isinstance(up, tuple) else up
        down = self.down(torch.tanh(up))
        return down[0] + down[1] if isinstance(down, tuple) else down


def linears(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)


def parallel_pair(group, up=None, down=None, **both):
    stock = linears()
    return Pair(
        ColumnParallelLinear.from_linear(stock[0], group=group, **(up or {}), **both),
        RowParallelLinear.from_linear(stock[1], group=group, **(down or {}), **both),
    )


def with_adapters(model, *names, register=lambda config: config, **options):
    config = register(peft.LoraConfig(target_modules=["up", "down"], **{"r": 4, **options}))
    model = peft.get_peft_model(model, config, adapter_name=names[0])
    for rank, name in enumerate(names[1:], 3):
        model.add_adapter(name, register(peft.LoraConfig(r=rank, target_modules=["up", "down"], lora_alpha=5)))
    return model


def gradients_of(model, x, grad):
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grad)
    return out.detach(), x.grad


def check_layer_options(group):
    """Sequence parallelism, gathered outputs, scattered inputs, biases handed on."""
    from tp_kernels.integrations import register_lora

    torch.manual_seed(1)
    x, grad = torch.randn(2, 5, HIDDEN), torch.randn(2, 5, HIDDEN)
    stock = with_adapters(Pair(*linears()), "default")
    randomise(stock)
    out, x_grad = gradients_of(stock, x, grad)
    weights = peft.get_peft_model_state_dict(stock)
    expected = {key: p.grad for key, p in stock.named_parameters() if ".lora_" in key}
    own = slice(None)
    for options in (
        {},
        {"up": {"gather_output": True}, "down": {"input_is_parallel": False}},
        {"skip_bias_add": True},
        {"sequence_parallel": True},
    ):
        sizes = shard_range_sizes(5, group.world_size)
        parts = [slice(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(group.world_size)]
        own = parts[group.rank] if "sequence_parallel" in options else slice(None)
        model = with_adapters(parallel_pair(group, **options), "default", register=register_lora)
        peft.set_peft_model_state_dict(model, weights)
        got, got_x = gradients_of(model, x[:, own], grad[:, own])
        torch.testing.assert_close(got, out[:, own], msg=lambda text: f"{options}: {text}")  # noqa: B023
        torch.testing.assert_close(got_x, x_grad[:, own], msg=lambda text: f"{options}: {text}")  # noqa: B023
        ours = full_gradients(model)
        for key, gradient in expected.items():
            torch.testing.assert_close(ours[key], gradient, msg=lambda text: f"{options}, {key}: {text}")  # noqa: B023


def check_peft_operations(group):
    """Several adapters, switching, merging back and forth, a further adapter from a folder, equal initialisation."""
    from tp_kernels.integrations import register_lora

    stock = with_adapters(Pair(*linears()), "a", "b", "c")
    randomise(stock)
    plain = parallel_pair(group)
    torch.manual_seed(100 + group.rank)  # ranks that were seeded differently
    model = with_adapters(plain, "a", "b", "c", register=register_lora)
    full = full_state_dict(model)
    for key, value in model.named_parameters():
        if ".lora_A." in key:
            assert value.abs().max() > 0
            mine = full[key].clone()
            assert torch.equal(group.broadcast(mine), full[key]), "ranks drew different factors"
        elif ".lora_B." in key:
            assert not value.any()
    for name in "abc":
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(stock, adapter_name=name), name)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    up = model.base_model.model.up.get_base_layer().weight
    original, memory = up.detach().clone(), up.data_ptr()
    with torch.no_grad():
        for active in ("a", "b", ["a", "b"]):
            stock.base_model.set_adapter(active)
            model.base_model.set_adapter(active)
            torch.testing.assert_close(model(x), stock(x))
        for kind in ("linear", "cat"):
            for pair in (stock, model):
                pair.base_model.add_weighted_adapter(["a", "c"], [0.5, -1.5], kind, combination_type=kind)
                pair.base_model.set_adapter(kind)
            torch.testing.assert_close(model(x), stock(x))
        if group.world_size > 1:
            with pytest.raises(ValueError, match="holds slices of adapter 'a'"):
                model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "svd", combination_type="svd")
            model.delete_adapter("svd")
        for pair in (stock, model):
            pair.base_model.set_adapter(["a", "b"])
        for safe in (False, True):
            model.merge_adapter(["a", "b"], safe_merge=safe)
            torch.testing.assert_close(model(x), stock(x))
            assert up.data_ptr() == memory and not torch.equal(up, original)
            model.unmerge_adapter()
            torch.testing.assert_close(up.detach(), original)
        with model.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(model(x), stock(x))
        # A slice is taken as it is, so that an optimiser's checkpoint of one rank loads again.
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        if group.rank == group.world_size - 1:
            model.base_model.model.up.lora_B["a"].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinities"):
            model.merge_adapter(["a"], safe_merge=True)


def check_dropout(group):
    """Ranks whose generators differ drop the same elements of what they all hold."""
    from tp_kernels.integrations import register_lora

    model = with_adapters(parallel_pair(group), "default", register=register_lora, lora_dropout=0.5)
    randomise(model)
    torch.manual_seed(200 + group.rank)
    peft.set_peft_model_state_dict(
        model, {key: group.broadcast(value) for key, value in full_state_dict(model).items() if ".lora_" in key}
    )
    seen = []
    dropout = model.base_model.model.up.lora_dropout["default"]
    dropout.register_forward_hook(lambda module, inputs, out: seen.append(out.detach()))
    x = torch.ones(4, HIDDEN, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(model.base_model.model.up, x, use_reentrant=False)
    (out * torch.ones_like(out)).sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]), "a recomputed pass dropped other elements"
    values = set(seen[0].unique().tolist())
    assert values == {0.0, 2.0}
    for tensor in (seen[0], x.grad, model.base_model.model.up.lora_A["default"].weight.grad):
        assert torch.equal(group.broadcast(tensor.clone()), tensor), "ranks differ"
    model.eval()
    assert torch.equal(dropout(x), x)


def check_sums(group):
    """The adapter of a row-parallel layer joins the layer's own sum."""
    from tp_kernels.integrations import register_lora

    model = with_adapters(parallel_pair(group), "default", register=register_lora)
    calls, all_reduce = [], group.all_reduce
    try:
        group.all_reduce = lambda x, *args, **kwargs: (calls.append(tuple(x.shape)), all_reduce(x, *args, **kwargs))[1]
        with torch.no_grad():
            model(torch.randn(3, HIDDEN))
    finally:
        group.all_reduce = all_reduce
    assert calls == ([(3, HIDDEN)] if group.world_size > 1 else [])


def check_refusals(group, folder):
    from tp_kernels.integrations import load_lora, register_lora, save_lora

    def adapt(model, **options):
        return peft.get_peft_model(model, register_lora(peft.LoraConfig(r=2, **options)))

    fused = nn.ModuleDict({"qkv": MergedColumnParallelLinear(8, [9, 9], names=("q", "k"), group=group)})
    table = nn.ModuleDict({"table": VocabParallelEmbedding(8, 9, group=group)})
    small = nn.ModuleDict({"up": ColumnParallelLinear(8, 9, group=group)})
    half = nn.ModuleDict({"up": ColumnParallelLinear(8, 9, group=group)})
    half["up"].weight = nn.Parameter(half["up"].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    mixed = with_adapters(parallel_pair(group), "default", register=register_lora).eval()
    bad = [
        (lambda: register_lora({"r": 4}), ValueError, "expected a peft.LoraConfig"),
        (lambda: register_lora(peft.LoraConfig(use_dora=True)), ValueError, "does not support use_dora"),
        (lambda: register_lora(peft.LoraConfig(lora_bias=True)), ValueError, "does not support lora_bias"),
        (lambda: register_lora(peft.LoraConfig(bias="all")), ValueError, "got 'all'"),
        (lambda: register_lora(peft.LoraConfig(init_lora_weights="olora")), ValueError, "got 'olora'"),
        (lambda: register_lora(peft.LoraConfig(target_modules="all-linear")), ValueError, "all-linear"),
        (lambda: adapt(fused, target_modules=["qkv"]), ValueError, "qkv is k and q in one parameter"),
        (lambda: adapt(table, target_modules=["table"]), ValueError, "VocabParallelEmbedding for table"),
        (lambda: adapt(half, target_modules=["up"]), ValueError, "merge adapters before quantising"),
        (lambda: mixed(torch.ones(1, HIDDEN), adapter_names=["default"]), ValueError, "mixed batches"),
        (lambda: save_lora(small, folder), ValueError, "expected a PeftModel"),
        (lambda: load_lora(nn.Linear(2, 2), folder), ValueError, "without any"),
        (lambda: load_lora(mixed, folder), ValueError, "there are"),
        (lambda: load_lora(small, folder / "nowhere"), ValueError, "nowhere"),
        (lambda: load_lora(small, folder / "llama-9h3-tied-rope3"), ValueError, "has no module here"),
    ]
    for call, kind, match in bad:
        with pytest.raises(kind, match=match):
            call()
            pytest.fail(f"{match!r} was expected")
    assert isinstance(small["up"], ColumnParallelLinear)
    if group.world_size > 1:
        where = folder / f"refused-{group.world_size}-{group.rank}"
        with pytest.raises(ValueError, match="save_lora"):
            mixed.save_pretrained(where)
        assert not (where / "adapter_model.safetensors").exists()
    occupied = folder / f"file-{group.world_size}"
    if group.rank == 0:
        occupied.write_text("no folder")
    group.barrier()
    with pytest.raises(ValueError, match="should be a directory"):
        save_lora(mixed, occupied)


def run_checks(group, folder):
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_layer_options(group)
        check_peft_operations(group)
        check_sums(group)
        check_refusals(group, folder)
        if group.world_size > 1:
            check_dropout(group)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_layer_options_and_peft_operations(oracle, rank_pool, world_size):
    rank_pool(world_size).run(run_checks, oracle[0])


def run_beside_data_parallelism(group, weights, x, grad, folder):
    """Gradients and files with FSDP2 and DDP on the other dimension of a 2 x 2 mesh, each replica with its rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from tp_kernels.integrations import register_lora, save_lora

    torch.set_num_threads(1)
    mesh, results = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {}
    replica = mesh.get_local_rank("dp")
    for kind in ("fsdp", "ddp"):
        model = with_adapters(parallel_pair(mesh["tp"]), "default", register=register_lora)
        peft.set_peft_model_state_dict(model, weights)
        if kind == "fsdp":
            run = fully_shard(model, mesh=mesh["dp"])
        else:
            run = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        run(x.chunk(2)[replica]).backward(grad.chunk(2)[replica])
        results[kind] = {key: value for key, value in full_gradients(model).items() if ".lora_" in key}
        save_lora(model, folder / kind, is_main_process=replica == 0)
    return results


def test_beside_fsdp2_and_ddp(rank_pool, tmp_path):
    torch.manual_seed(3)
    x, grad = torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)
    stock = with_adapters(Pair(*linears()), "default")
    randomise(stock)
    stock(x).backward(grad / 2)  # both average over the replicas
    expected = {key: p.grad for key, p in stock.named_parameters() if ".lora_" in key}
    weights = peft.get_peft_model_state_dict(stock)
    for results in rank_pool(4).run(run_beside_data_parallelism, weights, x, grad, tmp_path):
        for kind, gradients in results.items():
            assert gradients.keys() == expected.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[key], msg=lambda text: f"{kind}, {key}: {text}")  # noqa: B023
    for kind in ("fsdp", "ddp"):
        saved = peft.PeftModel.from_pretrained(Pair(*linears()), tmp_path / kind)
        for key, value in peft.get_peft_model_state_dict(saved).items():
            assert torch.equal(value, weights[key]), f"{kind}: {key}"
