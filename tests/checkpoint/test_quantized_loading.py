"""Models quantised while they load: the same as quantised afterwards, in little memory, and close to the original.

Tier: CPU ranks. Oracle: transformers with the dequantised weights; for quality, with the original ones.
"""

import gc
import math

import pytest
import torch

from tp_kernels.checkpoint import CheckpointError, DistributedCheckpointLoader, load_model
from tp_kernels.checkpoint.demo_model import smollm2_path
from tp_kernels.inference import generate
from tp_kernels.layers import RowParallelLinear, full_state_dict, quantize_model
from tp_kernels.layers.quantized import QuantizableLinear, quantizable_linears
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.tiny_models import TINY_MODELS, make_tiny_model, save_tiny_model

pytest.importorskip("transformers")

KINDS = ("int8", "fp8")
CASES = (
    ("llama-9h3-tied-rope3", "int8"),
    ("llama-5h5-biased", "fp8"),
    ("qwen3-4h1", "int8"),
    ("qwen3-4h1", "fp8"),
)
LENGTH, NEW_TOKENS = 14, 4


def input_ids(name):
    vocab = TINY_MODELS[name][1]["vocab_size"]
    return torch.randint(3, vocab, (2, LENGTH), generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    for name in {name for name, _ in CASES}:
        save_tiny_model(name, path)
    return path


def run_models(group, folder):
    """Loads every model both ways; {(model, kind): (dequantised weights in fp64, logits, generated tokens)}."""
    torch.set_num_threads(1)
    results = {}
    for name, kind in CASES:
        model = load_model(folder / name, group=group, quantize=kind, progress=False)
        later = quantize_model(load_model(folder / name, group=group, progress=False), kind)
        expected, tied = later.state_dict(), model.config.tie_word_embeddings
        assert model.state_dict().keys() == expected.keys() and not model.training
        for key, tensor in model.state_dict().items():
            assert tensor.dtype == expected[key].dtype and torch.equal(tensor.float(), expected[key].float()), key
        assert len([key for key in expected if key.endswith("_scale")]) == 7 * len(model.model.layers) + (not tied)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        ids = input_ids(name)
        with torch.inference_mode():
            logits = model(ids)
        generated = generate(model, ids.tolist(), max_new_tokens=NEW_TOKENS, stop_ids=())
        assert generated.decode_path.startswith("modules: the weights are quantised (torch.")
        results[name, kind] = full_state_dict(model.double()), logits, generated.output_ids
    return results


_results = {}


@pytest.fixture
def results(folder, rank_pool, world_size):
    if world_size not in _results:
        _results[world_size] = rank_pool(world_size).run(run_models, folder)
    return _results[world_size]


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_logits_and_tokens_are_those_of_the_dequantised_weights(results, world_size, name, kind):
    state, logits, tokens = results[0][name, kind]
    for other_state, other_logits, other_tokens in (rank[name, kind] for rank in results):
        assert all(torch.equal(other_state[key], tensor) for key, tensor in state.items())
        assert torch.equal(other_logits, logits) and other_tokens == tokens
    model = make_tiny_model(name).double()
    model.load_state_dict(state)
    ids = input_ids(name)
    with torch.no_grad():
        reference = model(ids).logits
        greedy = model(torch.cat([ids, torch.tensor(tokens)], 1)).logits[:, LENGTH - 1 : -1]
        assert_close_to_reference(logits, model.float()(ids).logits, reference, name=f"{name} {kind}")
    best = greedy.topk(2, dim=-1)
    assert (best.values[..., 0] - best.values[..., 1]).min() > 1e-4, "too close to compare; change the seed"
    assert best.indices[..., 0].tolist() == tokens


# A weight w of a row of K normal values with deviation s errs, rounded to int8, by at most half a step a / 127 / 2 with
# a = max|w| = about s * sqrt(2 ln K): evenly spread, so 2.6 s / 127 / sqrt(12) = 0.6 % of s at K = 40 to 101. fp8 has
# 3 bits behind the point: the step is 1/8 to 1/16 of the value, on average over the binade 0.09, / sqrt(12) = 2.6 %.
# The error of a matmul's result relative to the result is the same, as errors and values add up alike. A residual
# stream of L layers is made of 2 L results, each of two matmuls in a row (and the scores' two), and the head's: errors
# are independent, so at most sqrt(7 L + 1) of them in sum of squares. Twice that, for what softmax and gate amplify.
_WEIGHT_ERROR = {"int8": 0.006, "fp8": 0.026}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_quality(results, world_size, kind):
    changed, expected, tokens = 0, 0.0, 0
    for name in (name for name, kinds in CASES if kinds == kind):
        original = make_tiny_model(name)
        with torch.no_grad():
            exact = original(input_ids(name)).logits
        quantised = results[0][name, kind][1]
        relative = ((quantised - exact).square().mean() / exact.square().mean()).sqrt().item()
        bound = 2 * _WEIGHT_ERROR[kind] * (7 * original.config.num_hidden_layers + 1) ** 0.5
        assert bound / 10 < relative < bound, name
        # The best two of V normal logits with deviation s are within d of each other with a chance of d / s times
        # sqrt(2 ln V). The error of their difference has a deviation of sqrt(2) s * relative, and the mean magnitude of
        # that on the side where it matters is / sqrt(2 pi).
        expected += exact[..., 0].numel() * relative * (2 * math.log(exact.shape[-1]) / math.pi) ** 0.5
        changed += int((quantised.argmax(-1) != exact.argmax(-1)).sum())
        tokens += exact[..., 0].numel()
    assert changed <= 2 * expected < tokens / 2


def test_quality_of_a_trained_model():
    try:
        path = smollm2_path()
    except FileNotFoundError as missing:
        pytest.skip(str(missing).splitlines()[0])
    model = load_model(path, dtype=torch.float32, progress=False)
    # "The capital of France is Once upon a time, there was a little"
    ids = torch.tensor([[504, 3575, 282, 4649, 314, 6403, 1980, 253, 655, 28, 665, 436, 253, 1838]])
    with torch.inference_mode():
        exact = model(ids)
        quantised = quantize_model(model, "int8")(ids)
    relative = ((quantised - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert relative < 2 * _WEIGHT_ERROR["int8"] * (7 * model.config.num_hidden_layers + 1) ** 0.5
    assert torch.equal(quantised.argmax(-1), exact.argmax(-1))


# Memory --------------------------------------------------------------------------------------------------------------


def live_bytes():
    """Memory of all tensors of this process, views counted once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def load_and_watch(group, path, kind):
    """(largest growth of live bytes, bytes of the model, of its largest layer before it was quantised)."""
    grown, layers = [], []
    quantize = QuantizableLinear.quantize

    def watched(layer, kind):
        grown.append(live_bytes())
        layers.append(layer.weight.nbytes)
        quantize(layer, kind)

    QuantizableLinear.quantize = watched
    before = live_bytes()
    try:
        model = load_model(path, group=group, quantize=kind, progress=False)
    finally:
        QuantizableLinear.quantize = quantize
    return max(grown) - before, sum(p.nbytes for p in model.parameters()), max(layers)


def test_memory_is_that_of_the_quantised_model_and_one_layer(rank_pool, folder):
    for peak, model, layer in rank_pool(2).run(load_and_watch, folder / "qwen3-4h1", "int8"):
        assert 0.8 * model < peak <= model + layer


# Errors --------------------------------------------------------------------------------------------------------------


def fail_on_one_rank(group, path):
    """What every rank raises when quantising the third layer fails on the last rank alone, or a weight is NaN there."""
    errors = []
    quantize, count = QuantizableLinear.quantize, 0

    def failing(layer, kind):
        nonlocal count
        count += 1
        if count == 3 and group.rank == group.world_size - 1:
            raise torch.OutOfMemoryError("out of memory")
        return quantize(layer, kind)

    def poisoning(layer, kind):
        if isinstance(layer, RowParallelLinear) and group.rank == group.world_size - 1:
            layer.weight[1, 1] = float("nan")
        return quantize(layer, kind)

    for replacement in (failing, poisoning):
        QuantizableLinear.quantize = replacement
        try:
            load_model(path, group=group, quantize="int8", progress=False)
        except CheckpointError as error:
            errors.append((str(error), error.ranks))
        finally:
            QuantizableLinear.quantize = quantize
    return errors


def test_an_error_on_one_rank_is_one_on_all(rank_pool, folder):
    results = rank_pool(3).run(fail_on_one_rank, folder / "qwen3-4h1")
    (memory, ranks), (nan, nan_ranks) = results[0]
    assert results == results[:1] * 3 and ranks == nan_ranks == (2,)
    assert memory.startswith("rank 2: OutOfMemoryError: out of memory")
    assert "model.layers.0.self_attn.o_proj: cannot quantise a weight that is not finite" in nan


def test_half_loaded_models_are_poisoned(folder):
    config = DistributedCheckpointLoader(folder / "qwen3-4h1").config()
    with torch.device("meta"):
        model = ParallelCausalLM(ModelConfig.from_hf(config))
    linears, done = quantizable_linears(model), []

    def finished(module):
        done.append(module)
        if module in linears.values():
            module.quantize("fp8")
        if len(done) == 12:
            raise RuntimeError("enough")

    with DistributedCheckpointLoader(folder / "qwen3-4h1", progress=False) as loader:
        with pytest.raises(CheckpointError, match="enough"):
            loader.load_into(model, device="cpu", finished=finished)
        assert done[0] is model.model.embed_tokens and done[-1] in model.model.layers[1].modules()
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                loaded = module in done
                assert parameter.is_meta != loaded
                assert not loaded or parameter.dtype.itemsize == 1 or bool(parameter.isnan().all()), name


def test_bad_arguments(folder, tmp_path):
    with pytest.raises(ValueError, match="expected a quantisation of 'int8' or 'fp8', got 'int4'"):
        load_model(tmp_path / "missing", quantize="int4")
    for kind in KINDS:
        model = load_model(folder / "qwen3-4h1", quantize=kind, progress=False)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=rf"qkv_proj is quantised to {kind}: load before quantising"):
            DistributedCheckpointLoader(folder / "qwen3-4h1").load_into(model)
        assert all(torch.equal(t.float(), before[name].float()) for name, t in model.state_dict().items())
