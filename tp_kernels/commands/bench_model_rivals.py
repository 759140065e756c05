"""The rivals of ``tp-kernels bench model``, on our models' weights: plain PyTorch and transformers, on any ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tp_kernels.comm.errors import CommError
from tp_kernels.commands.bench_model_ours import FullWeights, plain_view
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.gpu_timer import raise_if_lost
from tp_kernels.testing.model_bench.contender import Contender, PlainContender
from tp_kernels.testing.model_bench.hf_rival import HFContender, hf_model, hf_model_on_ranks
from tp_kernels.testing.model_bench.sums import Sums

__all__ = ["Rivals", "TorchWays", "make_rivals", "tried_on_all"]

TRANSFORMERS = "transformers"


@dataclass
class TorchWays:
    """What torch itself has for sums over the ranks of a run.

    Attributes:
        sums: makes each way to add, by its name, the best first; a collective.
        process_group: for transformers; None if there is none that it could use.
        left_out: ways that this run does without, and why.
    """

    sums: Mapping[str, Callable[[], Sums]]
    process_group: Any = None
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Rivals:
    """Contenders that are not ours.

    Attributes:
        contenders: by name.
        sums: by name, how they add over the ranks; nothing on one rank.
        decode_only: names of those that have nothing of their own for prompts: a graph is for one token a row.
        left_out: rivals that this run does without, and why.
    """

    contenders: dict[str, Contender] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    decode_only: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)

    def add_plain(self, label: str, contender: PlainContender, how: str, sums: str) -> None:
        """One more of the models written by hand."""
        name = f"torch {label}{how}"
        self.contenders[name], self.sums[name] = contender, sums
        if how != "eager":
            self.decode_only.add(name)


def make_rivals(
    model: ParallelCausalLM, dtype: torch.dtype, group: Any, ways: TorchWays | None, transformers: str
) -> Rivals:
    """All rivals that there can be. What cannot be made has a contender that fails by why. Collective.

    Args:
        model: this rank's part, whose weights they use.
        dtype: of the weights.
        group: of the ranks, with a CPU transport; None for one rank, and for one shard without communication.
        ways: torch's; None on one rank.
        transformers: why it is left out; "" has it measured.
    """
    rivals = Rivals()
    states: dict[tuple[int, int], Any] = {}
    if ways is None:
        plain = plain_view(model)
        for how in PlainContender.WAYS:
            rivals.add_plain("", PlainContender(plain, how, states), how, "")
    else:
        rivals.left_out |= {f"torch {name}": why for name, why in ways.left_out.items()}
        for place, (name, make) in enumerate(ways.sums.items()):
            sums, failure = tried_on_all(make, group)
            plain = None if failure else plain_view(model, sums)
            # What a graph of one length would gain is the same for all ways to add.
            for how in PlainContender.WAYS if place == 0 else PlainContender.WAYS[:2]:
                made = NotMade(failure) if failure else PlainContender(plain, how, states)
                rivals.add_plain(f"{name} ", made, how, name)
    if transformers:
        rivals.left_out[TRANSFORMERS] = transformers
        return rivals
    make = partial(_transformers, model, dtype, None if ways is None else ways.process_group)
    made, failure = tried_on_all(make, group)
    rivals.contenders[TRANSFORMERS] = NotMade(failure) if failure else made
    if ways is not None:
        rivals.sums[TRANSFORMERS] = torch.distributed.get_backend(ways.process_group)
    return rivals


def _transformers(model: ParallelCausalLM, dtype: torch.dtype, process_group: Any) -> HFContender:
    sizes, plain = hf_sizes(model.config), plain_view(model)
    if process_group is None:
        return HFContender(hf_model(model.config.model_type, sizes, plain))
    whole = FullWeights(model, "none", dtype)
    embed = partial(whole.embedding, dtype)
    made = hf_model_on_ranks(model.config.model_type, sizes, plain, embed, process_group)
    return HFContender(made, plain.kv_heads)


def tried_on_all(call: Callable[[], Any], group: Any, what: str = "a rival") -> tuple[Any, str]:
    """(what ``call`` returns, ""), or (None, why it failed) on all ranks if it failed on one.

    Args:
        call: made by all ranks.
        group: of the ranks, with a CPU transport; None for one rank.
        what: whose call it is.
    Raises:
        CommError: of a group that broke, RuntimeError: the GPU's context is lost; nothing can follow then.
    """
    value, failure = None, ""
    try:
        value = call()
    except CommError:
        raise
    except Exception as error:  # not installed, out of memory, another version: the others' figures must not go with it
        raise_if_lost(what)
        failure = f"{type(error).__name__}: {str(error)[:160]}"
    if group is not None and group.all_reduce(torch.tensor([float(bool(failure))]), "max").item():
        failure = _first_said(failure, group)
    return (None, failure) if failure else (value, "")


def _first_said(words: str, group: Any) -> str:
    """What the first rank that says anything says, on all ranks."""
    codes = torch.zeros(1, 240, dtype=torch.int64)
    said = list(words.encode())[: codes.shape[1]]
    codes[0, : len(said)] = torch.tensor(said, dtype=torch.int64)
    everyone = group.all_gather(codes)
    first = next(rank for rank, row in enumerate(everyone) if row[0])
    return f"on rank {first}: {bytes(code for code in everyone[first].tolist() if code).decode(errors='replace')}"


class NotMade:
    """In the place of a contender that could not be made: it was found out why, and rows say it."""

    def __init__(self, failure: str):
        self.failure = failure

    def close(self) -> None:
        pass


def hf_sizes(config: ModelConfig) -> dict[str, Any]:
    """The same model in the words of transformers' configurations."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    sizes = {name: getattr(config, name) for name in names}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return sizes | ({"sliding_window": None} if config.model_type == "mistral" else {})
