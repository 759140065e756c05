"""Engines that are kept for a model end with its group. Tier: no device, CPU ranks."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from tp_kernels.comm.communicator import LocalCommunicator
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.inference import DecodeEngine, engines, group_end
from tp_kernels.inference.engines import engine_for
from tp_kernels.inference.generation import generate
from tp_kernels.models import ModelConfig, ParallelCausalLM

CONFIG = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
CONFIG |= {"model_type": "llama", "max_position_embeddings": 64, "eos_token_id": None}


class Communicator(LocalCommunicator):
    """Says when it is closed."""

    def __init__(self, log):
        super().__init__("tp", 30.0)
        self.log = log

    def close(self):
        self.log.append("communicator")
        super().close()


class Graph:
    """Of a step; a real one holds the addresses of its communicator's buffers."""

    def __init__(self, step):
        self.step = step

    def replay(self):
        self.step()


class Recorder:
    """Stands in for ``CudaRecorder``: a replay runs the step."""

    def __init__(self):
        self.graphs = weakref.WeakSet()

    def record(self, warm_up, function):
        warm_up()
        graph = Graph(function)
        self.graphs.add(graph)
        return graph.replay


def model_of(group):
    torch.manual_seed(0)
    return ParallelCausalLM(ModelConfig.from_hf(CONFIG), group=group)


def decode(model, recorder=None):
    """A step of a kept engine, in a graph if there is a recorder; the engine."""
    with engine_for(model, [8]) as engine:
        if recorder is not None:
            engine._graphs.reason, engine._graphs._recorder = None, recorder
        engine.generate([[1, 2, 3]], [3])
    return engine


def test_closing_a_group_closes_its_engines_before_the_communicator(monkeypatch):
    log = []
    group, other = TPGroup(Communicator(log)), TPGroup(Communicator(log))
    models, kept = [model_of(group), model_of(group)], model_of(other)
    recorder = Recorder()
    cached = [decode(model, recorder) for model in models]
    stays = decode(kept)
    for name, engine in (("first", cached[0]), ("second", cached[1])):
        close = engine.close
        monkeypatch.setattr(engine, "close", lambda name=name, close=close: (log.append(name), close()))
    assert len(recorder.graphs) == 2
    group.close()
    assert sorted(log[:2]) == ["first", "second"] and log[2:] == ["communicator"]
    assert not recorder.graphs and set(engines._idle) == {kept} and stays.cache is not None
    group.close()
    assert log[3:] == ["communicator"]
    assert decode(kept) is stays
    other.close()


def test_an_engine_of_the_users_own_ends_with_its_group():
    group = TPGroup(Communicator([]))
    engine = DecodeEngine(model_of(group), max_batch=1, max_len=8)
    engine.generate([[1, 2, 3]], [3])
    group.close()
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.prefill([[1, 2]])
    gone = weakref.ref(DecodeEngine(model_of(TPGroup(Communicator([]))), max_batch=1, max_len=8))
    gc.collect()
    assert gone() is None, "waiting for a group's end keeps no engine alive"


def test_an_engine_in_use_is_closed_and_not_kept():
    group = TPGroup(Communicator([]))
    model = model_of(group)
    with engine_for(model, [8]) as engine:
        engine.prefill([[1, 2]])
        group.close()
        with pytest.raises(ValueError, match="the engine is closed"):
            engine.step()
    assert model not in engines._idle


def test_an_engine_that_cannot_be_closed_does_not_keep_the_group_open(monkeypatch):
    log = []
    group = TPGroup(Communicator(log))
    engine = decode(model_of(group))
    monkeypatch.setattr(engine, "close", lambda: 1 / 0)
    group.close()
    assert log == ["communicator"]


def test_twenty_groups_leave_nothing_behind():
    log, groups, made, recorder = [], weakref.WeakSet(), weakref.WeakSet(), Recorder()
    others = set(engines._groups) | set(group_end._made_for)  # of other tests
    for _ in range(20):
        group = TPGroup(Communicator(log))
        model = model_of(group)
        for _ in range(2):  # the second time it is found
            made.add(decode(model, recorder))
        groups.add(group)
        group.close()
        assert not recorder.graphs and model not in engines._idle
    del group, model
    gc.collect()
    assert not groups and not made
    assert log == ["communicator"] * 20 and set(engines._groups) | set(group_end._made_for) <= others


def test_a_model_that_is_gone_takes_its_engine_along():
    group = TPGroup(Communicator([]))
    model = model_of(group)
    engine = weakref.ref(decode(model))
    del model
    gc.collect()
    assert engine() is None
    group.close()


def _generate_and_close(group):
    from tp_kernels.comm.process_group import resolve_group

    world = torch.distributed.new_group(list(range(group.world_size)))
    own = resolve_group(world)
    model = model_of(own)
    before = generate(model, [[1, 2, 3]], max_new_tokens=3, stop_ids=()).output_ids
    engine = decode(model)
    torch.distributed.destroy_process_group(world)
    resolve_group(torch.distributed.new_group(list(range(group.world_size))))  # looks for groups that are gone
    return before, engine.cache is None, len(engines._idle)


def test_destroying_a_torch_group_drops_the_engines(rank_pool):
    (first, closed, idle), (second, *others) = rank_pool(2).run(_generate_and_close)
    assert first == second and closed and idle == 0 and others == [True, 0]


_EXIT = """
import torch
import tp_kernels
from tp_kernels.inference.generation import generate
from tp_kernels.models import ModelConfig, ParallelCausalLM
manager = tp_kernels.init()
model = ParallelCausalLM(ModelConfig.from_hf({config!r}))
generate(model, [[1, 2, 3]], max_new_tokens=2, stop_ids=())
"""


def test_the_interpreter_ends_in_silence():
    run = subprocess.run([sys.executable, "-c", _EXIT.format(config=CONFIG)], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
