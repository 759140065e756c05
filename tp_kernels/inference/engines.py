"""Engines that ``generate`` uses again: a model's last one is kept for as long as the model lives.

An engine holds the model's layers, not the model, so nothing here keeps a model alive; with it go its graphs and cache.
Closing a group closes the engines of its models before its communicator, which their graphs have captured: also an
engine that is in use, whose next call then says that it is closed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from tp_kernels.inference.engine import DecodeEngine
from tp_kernels.inference.gpu_step import FusedStep
from tp_kernels.inference.step_graph import BATCH_SIZES, holds_anywhere

if TYPE_CHECKING:
    from tp_kernels.comm.tp_group import TPGroup
    from tp_kernels.models.causal_lm import ParallelCausalLM

__all__ = ["engine_for"]

_PAGE = 64
# Rows are given room in steps of so many tokens, so that a slightly longer text finds the same engine.
_ROOM = 256

_idle: weakref.WeakKeyDictionary[Any, tuple[tuple, DecodeEngine]] = weakref.WeakKeyDictionary()
# Groups that are open and had an engine.
_groups: weakref.WeakSet[TPGroup] = weakref.WeakSet()


@contextmanager
def engine_for(model: ParallelCausalLM, capacities: Sequence[int]) -> Iterator[DecodeEngine]:
    """An empty engine for rows of so many tokens, for the length of the block. Collective.

    It is the one of the last time if that is large enough, nobody uses it, and the model is still what it was.
    """
    seen = _fingerprint(model)
    before, engine = _idle.pop(model, (None, None))
    # Addresses may be new on one rank and by chance the old ones on another; but only ranks that record their graphs at
    # the same time meet in the collectives of the rehearsals.
    if holds_anywhere(model.group, engine is None or before != seen or not engine.fits(capacities)):
        if engine is not None:
            engine.close()
        engine = _new_engine(model, capacities)
    try:
        yield engine
    except BaseException:
        engine.close()  # what went wrong may have left steps on the device
        raise
    if engine.cache is None:  # closed meanwhile, with its group
        return
    _, other = _idle.pop(model, (None, None))
    if other is not None:  # made while this one was in use
        other.close()
    _idle[model] = (seen, engine)


def _new_engine(model: ParallelCausalLM, capacities: Sequence[int]) -> DecodeEngine:
    longest = model.config.max_position_embeddings
    roomy = [min(-(-tokens // _ROOM) * _ROOM, longest) for tokens in capacities]
    engine = DecodeEngine(
        model,
        max_batch=next(size for size in BATCH_SIZES if size >= len(capacities)),
        max_len=max(roomy),
        page_size=_PAGE,
        num_pages=sum(-(-tokens // _PAGE) for tokens in roomy),
    )
    if model.group not in _groups:
        _groups.add(model.group)
        model.group.before_close(partial(_forget_engines, weakref.ref(model.group)))
    return engine


def _forget_engines(group: weakref.ref[TPGroup]) -> None:
    """Drop the idle engines of a group that is being closed, each of which is closed with it."""
    _groups.discard(group())
    for model, (_, engine) in list(_idle.items()):
        if engine.group is group():
            del _idle[model]


def _fingerprint(model: ParallelCausalLM) -> tuple:
    """What graphs of the model depend on."""
    tensors = [(parameter.data_ptr(), parameter.dtype, parameter.shape) for parameter in model.parameters()]
    modules = [(id(module), getattr(module, "overlap", None)) for module in model.modules()]
    return FusedStep.why_not(model), model.group, tensors, modules
