"""Patched Hugging Face models whose sums over the ranks overlap and take the norms along. Tier: CPU ranks.

A ``DelayedCommunicator`` stands in for one that works beside the caller: results are NaN until waited for.
"""

import contextlib
import importlib
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")

from tp_kernels.comm import TPGroup
from tp_kernels.integrations import apply_tp_kernels
from tp_kernels.integrations.hf_handover import Handover
from tp_kernels.testing.delayed import DelayedCommunicator
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.tiny_models import make_tiny_model

IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def norms_logged(group):
    """The log of the group's calls from here on, with a "norm" for every piece that is normalised."""
    module, log = importlib.import_module("tp_kernels.ops.linear_all_reduce"), group.communicator.log
    by_rows = module.add_rms_norm_by_rows
    log.clear()

    def logged(*args):
        normalise, *results = by_rows(*args)
        return lambda rows: (log.append("norm"), normalise(rows)), *results

    with mock.patch.object(module, "add_rms_norm_by_rows", logged):
        yield log


def sums(log):
    """(sums whose norm followed piece by piece, sums without one) in the log; all of them overlapped."""
    calls, found = [name for name in log if name == "norm" or name.endswith(("_async", " wait"))], [0, 0]
    while calls:
        pieces = next(i for i, name in enumerate(calls) if name != "all_reduce_async")
        assert pieces > 1
        rest = calls[pieces:]
        joined = rest[1:2] == ["norm"]
        expected = (["all_reduce wait", "norm"] if joined else ["all_reduce wait"]) * pieces
        assert rest[: len(expected)] == expected
        calls = rest[len(expected) :]
        found[not joined] += 1
    return tuple(found)


def patched(name, group, **options):
    model = make_tiny_model(name)
    model.set_attn_implementation("sdpa")
    return apply_tp_kernels(model, group, **options)


def shift(module, args):
    """A hook that changes what goes into a layer, in place."""
    args[0].add_(0.5)


def scaled(module, args, output):
    return output.mul_(2)


def twice(asked, plain):
    """A layer that comes twice has two different layers behind it."""
    for model in (asked, plain):
        layers = model.model.layers
        model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(layers[i] for i in (0, 0, 1)), 3
    torch.testing.assert_close(*(model(IDS, use_cache=False).logits for model in (asked, plain)))
    for model in (asked, plain):
        model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(model.model.layers[1:]), 2


def model_passes(group, name):
    late = TPGroup(DelayedCommunicator(group.communicator), ranks=group.ranks)
    asked, plain = patched(name, late, overlap="chunked"), patched(name, group)
    layers = asked.model.layers
    with torch.no_grad():
        with norms_logged(late) as log:
            logits = asked(IDS).logits
        assert sums(log) == (2 * len(layers) - 1, 1), "but for the last layer's MLP"
        with norms_logged(late) as log:
            ours = asked(IDS, output_hidden_states=True, use_cache=True)
        assert sums(log) == (2 * len(layers) - 1, 1), "hooks that only record do not count"
        theirs = plain(IDS, output_hidden_states=True, use_cache=True)
        torch.testing.assert_close(ours.hidden_states, theirs.hidden_states)
        step = {"input_ids": IDS[:, :1]}
        ours, theirs = (m(**step, past_key_values=p.past_key_values) for m, p in ((asked, ours), (plain, theirs)))
        torch.testing.assert_close(ours.logits, theirs.logits)
        # The same chunks with the norms apart, because somebody looks.
        hooks = [
            layer.get_submodule(part).register_forward_hook(lambda *_: None)
            for layer in layers
            for part in ("self_attn", "mlp")
        ]
        with norms_logged(late) as log:
            assert torch.equal(asked(IDS).logits, logits)
        assert sums(log) == (0, 2 * len(layers))
        for hook in hooks:
            hook.remove()
        # Whoever changes what one layer hands to the next is obeyed.
        for register in (
            lambda m: m.model.layers[1].register_forward_pre_hook(shift),
            lambda m: m.model.layers[0].register_forward_hook(scaled),
            lambda m: m.model.layers[1].input_layernorm.register_forward_hook(scaled),
        ):
            hooks = [register(model) for model in (asked, plain)]
            with norms_logged(late) as log:
                torch.testing.assert_close(asked(IDS).logits, plain(IDS).logits)
            assert sums(log) == (2 * len(layers) - 2, 2)
            for hook in hooks:
                hook.remove()
        if name.startswith("llama"):  # where the config says nothing of single layers
            twice(asked, plain)
        # So is a layer whose forward was replaced on the module.
        for model in (asked, plain):
            layer = model.model.layers[0]
            layer.forward = lambda x, *args, forward=layer.forward, **options: forward(x, *args, **options) + x
        torch.testing.assert_close(asked(IDS).logits, plain(IDS).logits)
    for model in (asked, plain):
        del model.model.layers[0].forward
    with norms_logged(late) as log:
        losses = [model(IDS, labels=IDS).loss for model in (asked, plain)]
    assert "norm" not in log
    for loss in losses:
        loss.backward()
    for mine, other in zip(asked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)
    tokens = [model.generate(IDS, max_new_tokens=5, do_sample=False) for model in (asked, plain)]
    assert torch.equal(*tokens) and late.communicator.in_flight == 0
    return logits


def test_what_was_left_goes_to_whoever_has_the_same_states():
    first, second = torch.nn.Identity(), torch.nn.Identity()
    second.input_layernorm = torch.nn.Identity()
    handover, states = Handover([first, second]), torch.zeros(2)
    assert handover.norm_behind(first) is second.input_layernorm and handover.norm_behind(second) is None
    norm = second.input_layernorm
    assert handover.take(states, norm) is None
    for other in ((states.clone(), norm), (states, torch.nn.Identity())):
        handover.put(states, norm, states + 1)
        assert handover.take(*other) is None and handover.take(states, norm) is None, "it is gone then"
    handover.put(states, norm, states + 1)
    assert torch.equal(handover.take(states, norm), states + 1)


@pytest.mark.parametrize("world_size, name", [(2, "llama-9h3-tied-rope3"), (3, "qwen3-4h1")])
def test_models(rank_pool, world_size, name):
    stock = make_tiny_model(name)
    with torch.no_grad():
        theirs, exact = stock(IDS).logits, stock.double()(IDS).logits
    for logits in rank_pool(world_size).run(model_passes, name):
        assert_close_to_reference(logits, theirs, exact)
