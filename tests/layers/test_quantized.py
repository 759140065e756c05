"""Quantised layers against plain torch in fp64 with the dequantised weights. Tier: CPU ranks (1, 2 and 3 processes)."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from tp_kernels.checkpoint.sharding import shard_range_sizes
from tp_kernels.comm.communicator import LocalCommunicator
from tp_kernels.comm.process_group import TPGroup
from tp_kernels.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelDecoderLayer,
    ParallelLMHead,
    ParallelMLP,
    QKVParallelLinear,
    RotaryEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
    full_state_dict,
    load_full_state_dict,
    quantize_model,
)
from tp_kernels.layers.quantized import quantizable_linears
from tp_kernels.testing.numeric import assert_close_to_reference

WORLDS = [1, 2, 3]
KINDS = {"int8": (torch.int8, 127), "fp8": (torch.float8_e4m3fn, 448)}
DTYPES = [torch.float32, torch.bfloat16]
HIDDEN, WIDTH, WORDS = 40, 101, 67


class Layers(nn.Module):
    """One layer of every kind, sizes that do not divide; a tied head; a plain linear layer."""

    def __init__(self, group, dtype=torch.float32, **factory):
        super().__init__()
        factory = {"group": group, "dtype": dtype, **factory}
        self.embed_tokens = VocabParallelEmbedding(WORDS, HIDDEN, **factory)
        self.column = ColumnParallelLinear(HIDDEN, WIDTH, gather_output=True, **factory)
        self.merged = MergedColumnParallelLinear(HIDDEN, [WIDTH, 37], False, gather_output=True, **factory)
        self.qkv = QKVParallelLinear(HIDDEN, 8, 4, 1, True, **factory)  # ranks share the KV head
        self.row = RowParallelLinear(WIDTH, HIDDEN, input_is_parallel=False, **factory)
        self.head = ParallelLMHead(WORDS, HIDDEN, **factory)
        self.tied = ParallelLMHead(WORDS, HIDDEN, **factory).tie_weights(self.embed_tokens)
        self.plain = nn.Linear(HIDDEN, 3, dtype=dtype, device=factory.get("device"))


QUANTISED = {"column", "merged", "qkv", "row", "head"}


def make(group, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = Layers(group, dtype)
    with torch.no_grad():
        model.row.weight[0] = 0  # a row of zeros has no scale to divide by
    return model


def check_outputs(group):
    for dtype in DTYPES:
        for kind in KINDS:
            model = quantize_model(make(group, dtype), kind)
            generator = torch.Generator().manual_seed(1)
            for name in sorted(QUANTISED):
                layer = getattr(model, name)
                x = torch.randn(2, 40, layer.in_features, generator=generator).to(dtype)
                full = full_state_dict(copy.deepcopy(layer).double())
                weight = torch.cat([tensor for key, tensor in full.items() if key.endswith("weight")])
                bias = full.get("bias")
                if name == "qkv":  # its output is this rank's
                    weight, bias = layer.dequantized_weight(torch.float64), layer.bias.detach().double()
                reference = nn.functional.linear(x.double(), weight, bias)
                with torch.no_grad():
                    out = layer(x)
                    if name == "row":  # every rank's part is rounded, as in PyTorch on as many ranks
                        columns = layer.tensor_shards()[0].slices[1]
                        parts = nn.functional.linear(x[..., columns], weight[:, columns].to(dtype))
                        plain = group.all_reduce(parts) + layer.bias
                    else:
                        plain = nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
                assert_close_to_reference(out, plain, reference, name=f"{name} {kind}")


def check_scales(group):
    """The quantised values are the nearest, the scales those of this rank's rows; columns are as on one rank."""
    for dtype in DTYPES:
        for kind, (stored, largest) in KINDS.items():
            model, quantised = make(group, dtype), quantize_model(make(group, dtype), kind)
            for name in QUANTISED:
                before, layer = getattr(model, name), getattr(quantised, name)
                weight, scale = before.weight.detach().double(), layer.weight_scale
                assert layer.weight.dtype == stored and scale.dtype == torch.float32
                assert not layer.weight.requires_grad and not scale.requires_grad
                expected = weight.abs().amax(1) / largest
                assert (name == "row") == bool((expected == 0).any())
                expected[expected == 0] = 1
                torch.testing.assert_close(scale.double(), expected, rtol=2**-22, atol=0)
                error = (layer.dequantized_weight(torch.float64) - weight).abs()
                # Half a step: of int8 the scale's; of e4m3, with 3 bits behind the point, 2**-4 of the value, or of the
                # smallest normal number 2**-6.
                half = scale.double().unsqueeze(1) / 2
                if kind == "fp8":
                    half = (weight.abs() * 2.0**-4).maximum(scale.double().unsqueeze(1) * 2.0**-10)
                assert bool((error <= half * 1.001).all()), (name, kind)
            alone = make(TPGroup(LocalCommunicator()), dtype).column
            load_full_state_dict(alone, full_state_dict(model.column))
            rows = quantised.column.tensor_shards()[0].slices[0]
            assert torch.equal(alone.quantize(kind).weight[rows].float(), quantised.column.weight.float())
            assert torch.equal(alone.weight_scale[rows], quantised.column.weight_scale)


def check_conversions(group):
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(2))
    for kind, (stored, _) in KINDS.items():
        model = quantize_model(make(group), kind)
        layer = model.column
        weight, scale = layer.weight.detach().view(torch.uint8).clone(), layer.weight_scale.detach().clone()
        for convert in (
            lambda m: m.to(torch.bfloat16),
            nn.Module.half,
            nn.Module.double,
            nn.Module.float,
            lambda m: m.to("cpu", torch.bfloat16),
            nn.Module.share_memory,
            copy.deepcopy,
        ):
            model = convert(model)
            layer = model.column
            assert layer.weight.dtype == stored and layer.weight_scale.dtype == torch.float32
            assert torch.equal(layer.weight.view(torch.uint8), weight) and torch.equal(layer.weight_scale, scale)
            assert layer.input_dtype == layer.bias.dtype == model.plain.weight.dtype == model.tied.weight.dtype
            with torch.no_grad():
                assert layer(x.to(layer.bias.dtype)).dtype == layer.bias.dtype
            with pytest.raises(ValueError, match="expected an input of torch"):
                layer(x.to(torch.float16 if layer.bias.dtype != torch.float16 else torch.bfloat16))
        assert full_state_dict(model)["column.weight"].dtype == torch.bfloat16
        meta = copy.deepcopy(model).to("meta")
        assert meta.column.weight.dtype == stored and meta.column.weight.is_meta and meta.column.weight_scale.is_meta
        empty = meta.to_empty(device="cpu")
        assert empty.column.weight.dtype == stored and empty.column.weight_scale.dtype == torch.float32
        assert f"weight={kind}" in repr(model.column)


def check_state_dicts(group):
    for kind, (stored, _) in KINDS.items():
        model = quantize_model(make(group, torch.bfloat16), kind)
        local = model.state_dict()
        for name in ("column", "merged.linear_0", "merged.linear_1", "row", "head"):
            weight, scale = local[f"{name}.weight"], local[f"{name}.weight_scale"]
            assert weight.dtype == stored and scale.dtype == torch.float32 and scale.shape == weight.shape[:1]
        assert set(local) == {*make(group).state_dict()} | {n + "_scale" for n in local if n + "_scale" in local}
        file = io.BytesIO()
        torch.save(local, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        for assign in (False, True):
            torch.manual_seed(5)
            other = quantize_model(Layers(group, torch.bfloat16, device="meta"), kind)
            if not assign:
                other.to_empty(device="cpu")
                other.tied.tie_weights(other.embed_tokens)
            assert str(other.load_state_dict(saved, assign=assign)) == "<All keys matched successfully>"
            for name, tensor in other.state_dict().items():
                assert tensor.dtype == local[name].dtype and not tensor.is_meta
                assert torch.equal(tensor.float(), local[name].float()), name
        # Between kinds of weights a copy would convert what cannot be converted.
        for given, taker in (
            (make(group).state_dict(), quantize_model(make(group), kind)),
            (local, make(group, torch.bfloat16)),
            (local, quantize_model(make(group, torch.bfloat16), "fp8" if kind == "int8" else "int8")),
        ):
            before = {name: tensor.clone() for name, tensor in taker.state_dict().items()}
            with pytest.raises(RuntimeError, match=r"merged\.linear_0\.weight: expected torch\..*quantise the model"):
                taker.load_state_dict(given)
            for name in before:
                if name.split(".")[0] in QUANTISED:
                    assert torch.equal(taker.state_dict()[name].float(), before[name].float()), name


def check_full_state_dicts(group):
    for kind in KINDS:
        model = quantize_model(make(group), kind)
        full = full_state_dict(model)
        assert {name: tensor.shape for name, tensor in full.items()} == {
            name: tensor.shape for name, tensor in full_state_dict(make(group)).items()
        }
        plain = make(group, seed=9)
        load_full_state_dict(plain, full)
        for name in QUANTISED:
            assert torch.equal(getattr(plain, name).weight, getattr(model, name).dequantized_weight())
        with pytest.raises(ValueError, match="column is quantised to"):
            load_full_state_dict(model, full)
        with pytest.raises(ValueError, match="cannot load full weights into a layer whose weight is"):
            model.head.load_full_weight(torch.zeros(WORDS, HIDDEN))
        with pytest.raises(ValueError, match="cannot initialise"):
            model.row.reset_parameters()
        with pytest.raises(ValueError, match="cannot tie"):
            model.head.tie_weights(model.embed_tokens)


def check_choice(group):
    model = make(group)
    floats = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(quantizable_linears(model)) == QUANTISED
    for bad, message in (
        (lambda: quantize_model(model, "int4"), "expected a quantisation of 'int8' or 'fp8', got 'int4'"),
        (lambda: quantize_model(model, "int8", skip=["lm_head"]), r"skip: expected names .*head.*, got 'lm_head'"),
        (lambda: quantize_model(model, "int8", skip="head"), "list of names"),
        (lambda: quantize_model(model.plain, "int8"), "found none"),
        (lambda: model.tied.quantize("int8"), "weight of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with torch.no_grad():
        model.head.weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"head: expected finite weights to quantise, got .* to inf"):
        quantize_model(model, "int8")
    model.head.load_state_dict({"weight": floats["head.weight"]}, strict=False)
    assert all(torch.equal(tensor, floats[name]) for name, tensor in model.state_dict().items())
    assert quantize_model(model, "fp8", skip=["head", "column"]) is model
    assert {name for name in QUANTISED if getattr(model, name).quantized} == QUANTISED - {"head", "column"}
    assert model.tied.weight is model.embed_tokens.weight and model.plain.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="merged: the MergedColumnParallelLinear is quantised to fp8 already"):
        quantize_model(model, "int8")
    assert model.column.quantized is None
    chunked = RowParallelLinear(WIDTH, HIDDEN, group=group, overlap="chunked")
    with pytest.raises(ValueError, match="overlap 'auto' or 'none' for a quantised weight, got 'chunked'"):
        chunked.quantize("int8")
    chunked.overlap = "auto"
    chunked.quantize("int8").overlap = "chunked"
    with pytest.raises(ValueError, match="for a quantised weight"):
        chunked(torch.zeros(2, chunked.in_features_local))


def check_training_is_refused(group):
    model = quantize_model(make(group), "int8")
    for name in QUANTISED:
        layer = getattr(model, name)
        with pytest.raises(ValueError):
            layer(torch.randn(2, layer.in_features, requires_grad=True))
    for activation in ("silu", "gelu"):
        mlp = quantize_model(ParallelMLP(HIDDEN, WIDTH, activation=activation, group=group), "int8")
        with pytest.raises(ValueError):
            mlp(torch.randn(2, HIDDEN, requires_grad=True))


BLOCKS = {
    "biased": dict(qkv_bias=True, o_bias=True, mlp_bias=True, num_heads=5, num_kv_heads=5, head_dim=8),
    "gelu, shared kv head": dict(activation="gelu", qk_norm=True, num_heads=4, num_kv_heads=1, head_dim=8),
}


def check_blocks(group):
    """A quantised block is the float block with the dequantised weights, whole or on parts of the sequence."""
    tokens = 7
    sizes = shard_range_sizes(tokens, group.world_size)
    for options in BLOCKS.values():
        for kind in KINDS:
            for parts in (False, True):
                factory = dict(rope=RotaryEmbedding(8), group=group, sequence_parallel=parts, **options)
                torch.manual_seed(4)
                block = quantize_model(ParallelDecoderLayer(HIDDEN, WIDTH, **factory), kind).eval()
                x, residual = torch.randn(2, 2, tokens, HIDDEN)
                plain, exact = (
                    ParallelDecoderLayer(HIDDEN, WIDTH, **{**factory, "sequence_parallel": False}, dtype=dtype)
                    for dtype in (torch.float32, torch.float64)
                )
                load_full_state_dict(plain, full_state_dict(block))
                load_full_state_dict(exact, full_state_dict(block))
                with torch.no_grad():
                    expected, reference = sum(plain(x, residual)), sum(exact(x.double(), residual.double()))
                    if parts:
                        mine = [t.split(sizes, 1)[group.rank].contiguous() for t in (x, residual)]
                        out = group.all_gather(sum(block(*mine)), dim=1, sizes=sizes)
                    else:
                        out = sum(block(x, residual))
                assert_close_to_reference(out, expected, reference, name=f"{options} {kind} {parts}")


CHECKS = [
    check_outputs,
    check_scales,
    check_conversions,
    check_state_dicts,
    check_full_state_dicts,
    check_choice,
    check_training_is_refused,
    check_blocks,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("world_size", WORLDS)
def test_quantised_layers(rank_pool, world_size, check):
    rank_pool(world_size).run(check)
