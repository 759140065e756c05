"""Tier: CPU ranks. ParallelCausalLM at tp 1 to 4 against transformers: logits, cached logits, and gradients."""

import pytest
import torch
import torch.nn.functional as F

from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.layers import full_gradients, full_state_dict
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.numeric import assert_close_to_reference, max_error
from tp_kernels.testing.tiny_models import TINY_MODELS, make_tiny_model, save_tiny_model

pytest.importorskip("transformers")

WORLD_SIZES = (1, 2, 3, 4)
DTYPES = (torch.float32, torch.bfloat16)
LENGTH = 14


def input_ids(name):
    vocab = TINY_MODELS[name][1]["vocab_size"]
    # Not 0, the padding token: transformers leaves it out of the embedding's gradient.
    return torch.randint(1, vocab, (2, LENGTH), generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(folder of saved models, {name: {dtype: logits of transformers}})."""
    folder = tmp_path_factory.mktemp("models")
    logits = {}
    for name in TINY_MODELS:
        model = save_tiny_model(name, folder)
        with torch.no_grad():
            logits[name] = {dtype: model.to(dtype)(input_ids(name)).logits for dtype in DTYPES}
            # Weights rounded to bf16 are a different model: each dtype has its own float64 reference.
            logits[name]["reference", torch.bfloat16] = model.double()(input_ids(name)).logits
            exact = make_tiny_model(name).double()
            logits[name]["reference", torch.float32] = exact(input_ids(name)).logits
    return folder, logits


def run_models(group, folder, ids):
    """Every model in every dtype: logits without a cache, through one in uneven pieces, and of single positions."""
    from tp_kernels.checkpoint import load_model

    torch.set_num_threads(1)
    results = {}
    for name, x in ids.items():
        for dtype in DTYPES:
            model = load_model(folder / name, group=group, dtype=dtype, progress=False)
            with torch.inference_mode():
                cache = KVCache.for_model(model, x.shape[0], x.shape[1])
                pieces = []
                for piece in x.split([6, 1, 1, 3, 1, 2], dim=1):
                    pieces.append(model(piece, cache=cache))
                    cache.advance(piece.shape[1])
                results[name, dtype] = {
                    "full": model(x),
                    "cached": torch.cat(pieces, 1),
                    "last": model(x, logits="last"),
                    "picked": model(x, logits=torch.tensor([9, 0])),
                }
    return results


_results = {}


@pytest.fixture
def results(oracle, rank_pool, world_size):
    # One visit to the ranks per world size serves all the tests below.
    if world_size not in _results:
        ids = {name: input_ids(name) for name in TINY_MODELS}
        _results[world_size] = rank_pool(world_size).run(run_models, oracle[0], ids)
    return _results[world_size]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_logits_equal_transformers(results, oracle, name, dtype, world_size):
    expected = oracle[1][name]
    reference = expected["reference", dtype]
    for rank, by_model in enumerate(results):
        ours = by_model[name, dtype]
        for kind in ("full", "cached"):
            assert ours[kind].dtype == dtype
            assert_close_to_reference(ours[kind], expected[dtype], reference, name=f"{kind} logits of rank {rank}")
        rows = torch.arange(2)
        for kind, positions in (("last", torch.tensor([LENGTH - 1] * 2)), ("picked", torch.tensor([9, 0]))):
            # In place in the whole: PyTorch's error on two rows alone may be small by luck.
            whole = ours["full"].clone()
            whole[rows, positions] = ours[kind]
            assert_close_to_reference(whole, expected[dtype], reference, name=f"{kind} logits of rank {rank}")
        for kind in ours:
            assert torch.equal(ours[kind], results[0][name, dtype][kind]), "ranks disagree"


def gradients(group, folder, name, ids):
    """Loss and the full gradients of the model's parameters, under their stock names."""
    from tp_kernels.checkpoint import load_model

    torch.set_num_threads(1)
    model = load_model(folder / name, group=group, dtype=torch.float32, progress=False)
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), full_gradients(model, group)


@pytest.mark.parametrize(
    "world_size, name",
    [(2, "llama-9h3-tied-rope3"), (2, "qwen3-4h1"), (3, "qwen2-6h2-tied-window"), (1, "llama-5h5-biased")],
)
def test_gradients_equal_transformers(oracle, rank_pool, world_size, name):
    ids = input_ids(name)

    def hf_gradients(dtype):
        model = make_tiny_model(name).to(dtype)
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.item(), {key: p.grad for key, p in model.named_parameters()}

    exact_loss, exact = hf_gradients(torch.float64)
    _, single = hf_gradients(torch.float32)
    for loss, ours in rank_pool(world_size).run(gradients, oracle[0], name, ids):
        assert loss == pytest.approx(exact_loss, rel=1e-5)
        assert set(exact) <= set(ours)
        # Some gradients are small differences of large ones (those of key biases vanish but for the rotation): what is
        # rounded is at the scale of the whole model.
        noise = 2 * torch.finfo(torch.float32).eps * max(reference.abs().max().item() for reference in exact.values())
        for key, reference in exact.items():
            error, of_torch = max_error(ours[key], reference), max_error(single[key], reference)
            assert error <= max(noise, 2 * of_torch), f"gradient of {key}"


def tiny_config(**changes):
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    return ModelConfig.from_hf({"model_type": "llama", **sizes, **changes})


def test_parameter_names_are_those_of_transformers():
    for name in TINY_MODELS:
        reference = make_tiny_model(name)
        ours = full_state_dict(ParallelCausalLM(ModelConfig.from_hf(reference.config.to_dict())))
        theirs = reference.state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: v.shape for key, v in theirs.items()}


def test_one_token_at_position_zero_needs_no_cache():
    model = ParallelCausalLM(tiny_config())
    ids = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(model(ids)[:, :1], model(ids[:, :1]))
    shifted = model(ids, positions=torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(shifted, model(ids))


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (torch.zeros(3, dtype=torch.int64), {}, r"\[B, S\]"),
        (torch.zeros(1, 3), {}, "int"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, "at least one"),
        (torch.zeros(1, 3, dtype=torch.int64), {"logits": "first"}, "'all', 'last'"),
        (torch.zeros(1, 3, dtype=torch.int64), {"logits": torch.tensor([0, 1])}, r"\[1\]"),
        (torch.zeros(1, 3, dtype=torch.int64), {"logits": torch.tensor([3])}, "position"),
        (torch.full((1, 3), 50), {}, "expected ids in"),
    ],
)
def test_bad_input_is_named(ids, options, message):
    model = ParallelCausalLM(tiny_config())
    with pytest.raises(ValueError, match=message):
        model(ids, **options)


def test_cache_overflow_is_an_error():
    model = ParallelCausalLM(tiny_config())
    cache = KVCache.for_model(model, 1, 4)
    with torch.inference_mode():
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
        cache.advance(3)
        with pytest.raises(ValueError, match="max_len"):
            model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
