"""What is asked of CUDA, in which order: captures that succeed and fail, tokens behind events, uploads, clean-up.

PyTorch's side is played by stand-ins that take what the real functions take. Tier: no device.
"""

import gc
import inspect
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tp_kernels.comm import LocalCommunicator, TPGroup
from tp_kernels.comm.errors import CommTimeoutError
from tp_kernels.comm.policy import BackendUnavailableError
from tp_kernels.inference import step_graph
from tp_kernels.inference.engine import DecodeEngine
from tp_kernels.inference.paged_cache import upload
from tp_kernels.inference.step_graph import CaptureFailed, CudaRecorder, StepGraphs, graph_reason
from tp_kernels.inference.token_ring import TokenRing
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.switched_off import switched_off

GPU = torch.device("cuda", 0)


def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
    config = {"model_type": "llama", **sizes, "max_position_embeddings": 64, "eos_token_id": None}
    return ParallelCausalLM(ModelConfig.from_hf(config), group=TPGroup(LocalCommunicator()))


class Cuda:
    """Stands in for ``torch.cuda``: what was called, which stream is current, what is being captured.

    As PyTorch does, it leaves the capturing stream current, the allocator and the generator busy, where CUDA refuses to
    end a capture.
    """

    def __init__(self, monkeypatch):
        self.log, self.refuses, self.allocating, self.generator_busy, self.pools = [], False, set(), False, 0
        self.user = self.current = self.stream_named("user")
        self.capturing = self.stream_named("capturing")
        for name, stand_in in {
            "current_stream": lambda device=None: self.current,
            "set_stream": self.set_stream,
            "synchronize": lambda device=None: self.log.append("synchronize"),
            "device": lambda device: nullcontext(),
            "stream": self.stream,
            "graph_pool_handle": self.graph_pool_handle,
            "CUDAGraph": lambda: Graph(self),
            "graph": lambda graph, pool=None, stream=None, capture_error_mode="global": Capture(
                self, graph, pool or self.graph_pool_handle(), stream, capture_error_mode
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: self.log.append("release pool"), raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *_, device: self.log.append(f"zeros on {device}"))
        monkeypatch.setattr(step_graph, "_capture_stream", lambda device: self.capturing)

    def stream_named(self, name):
        wait = lambda other: self.log.append(f"{name} waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_stream=wait, device_index=0, device=GPU)

    def set_stream(self, stream):
        self.current = stream

    def stream(self, stream):
        cuda, before = self, self.current

        class Within:
            def __enter__(self):
                cuda.current = stream

            def __exit__(self, *_):
                cuda.current = before

        return Within()

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def end_allocate(self, device, pool):
        if pool not in self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating.discard(pool)
        self.log.append("end allocation")

    def as_before(self):
        return self.current is self.user and not self.allocating and not self.generator_busy


class Graph:
    def __init__(self, cuda):
        self.cuda = cuda

    def replay(self):
        self.cuda.log.append("replay")


class Capture:
    def __init__(self, cuda, graph, pool, stream, mode):
        assert stream is cuda.capturing and mode == "thread_local"
        self.cuda, self.pool, self.stream, self.before = cuda, pool, stream, cuda.current

    def __enter__(self):
        self.cuda.current, self.cuda.generator_busy = self.stream, True
        self.cuda.allocating.add(self.pool)
        self.cuda.log.append(f"capture into pool {self.pool}")

    def __exit__(self, *_):
        if self.cuda.refuses:
            self.cuda.refuses = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.cuda.allocating.discard(self.pool)
        self.cuda.current, self.cuda.generator_busy = self.before, False
        self.cuda.log.append("captured")


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_stand_ins_take_what_pytorch_takes():
    parameters = list(inspect.signature(torch.cuda.graph.__init__).parameters)
    assert parameters[:5] == ["self", "cuda_graph", "pool", "stream", "capture_error_mode"]
    source = inspect.getsource(torch.cuda.graph.__exit__)
    assert source.index("capture_end()") < source.index("stream_ctx.__exit__"), "a failed end leaves the stream"
    weakref.ref(torch.cuda.CUDAGraph.__new__(torch.cuda.CUDAGraph))
    if torch.version.cuda is not None:
        assert hasattr(torch._C, "_cuda_endAllocateToPool") and hasattr(torch._C, "_cuda_releasePool")


def test_a_capture_follows_its_rehearsal_on_the_same_stream(cuda):
    recorder = CudaRecorder(GPU)
    seen = []
    replay = recorder.record(lambda: seen.append(cuda.current.name), lambda: seen.append(cuda.current.name))
    assert seen == ["capturing", "capturing"] and cuda.as_before()
    before = ["capturing waits for user", "user waits for capturing", "synchronize"]
    assert cuda.log == [*before, "capture into pool 1", "captured"]
    replay()
    assert cuda.log[-1] == "replay"


def test_graphs_share_a_pool_while_there_is_one(cuda):
    recorder = CudaRecorder(GPU)
    kept = [recorder.record(lambda: None, lambda: None) for _ in range(2)]
    kept.clear()
    gc.collect()
    kept.append(recorder.record(lambda: None, lambda: None))
    assert [line for line in cuda.log if "pool" in line] == [f"capture into pool {pool}" for pool in (1, 1, 2)]


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize(
    "error, raised, words",
    [
        (RuntimeError("cannot sync\nwhile capturing"), CaptureFailed, "^RuntimeError: cannot sync$"),
        (BackendUnavailableError("gloo is for hosts"), CaptureFailed, "^gloo is for hosts$"),
        (CommTimeoutError("rank 1 is gone"), CommTimeoutError, "^rank 1 is gone$"),
    ],
)
def test_a_failed_capture_leaves_nothing_behind_and_says_why(cuda, refuses, error, raised, words):
    """Whether CUDA ends the capture well behind the error or not: the error counts that came first."""
    recorder = CudaRecorder(GPU)

    def step():
        cuda.refuses = refuses
        raise error

    with pytest.raises(raised, match=words):
        recorder.record(lambda: None, step)
    assert cuda.as_before()
    mended = ["end allocation", "release pool"] if refuses else []
    ended = ["capture into pool 1"] + ([] if refuses else ["captured"])
    assert cuda.log[3:] == [*ended, "synchronize", *mended, "capture into pool 2", "zeros on cuda:0", "captured"]
    recorder.record(lambda: None, lambda: None)()
    assert cuda.log[-1] == "replay"


def test_what_cuda_refuses_by_itself_is_a_failed_capture(cuda):
    def step():
        cuda.refuses = True

    with pytest.raises(CaptureFailed, match="RuntimeError: CUDA error: operation failed"):
        CudaRecorder(GPU).record(lambda: None, step)
    assert cuda.as_before()


def test_graphs_are_dropped_when_none_can_be_running(cuda):
    graphs = StepGraphs(GPU, TPGroup(LocalCommunicator(), device_type="cuda"), None)
    assert graphs.reason is None
    step = lambda: None  # noqa: E731
    for kind in ("one", "two"):
        graphs.get(kind, step, step)
    cuda.log.clear()
    graphs.drop(lambda kind: kind == "three")
    assert cuda.log == []
    graphs.drop(lambda kind: kind == "one")
    assert cuda.log == ["synchronize"] and "one" not in graphs and "two" in graphs


def test_where_there_is_no_graph_the_reason_is_named():
    group = switched_off(0, 2)
    assert graph_reason(torch.device("cpu"), group) == "the model is on cpu"
    assert graph_reason(GPU, group) is None
    group.communicator.backend = "gloo"
    assert "the gloo communicator goes through host memory" in graph_reason(GPU, group)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert "autocast is on" in graph_reason(GPU, group)
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_tokens_are_read_behind_their_event(monkeypatch):
    """The copy to the host is done when its event is, and no sooner; the event stands behind the copy."""
    log = []

    class Event:
        def record(self, stream):
            log.append(("record", stream))
            self.slot, self.tokens = ring._slots[(ring._count - 1) % 4], ring._slots[(ring._count - 1) % 4].clone()
            self.slot.fill_(-7)  # not there yet

        def synchronize(self):
            log.append("synchronize")
            self.slot.copy_(self.tokens)

    ring = TokenRing(2, torch.device("cpu"))
    ring._device = GPU
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    ring.send([3, 5], torch.tensor([8, 9]))
    ring.send([5], torch.tensor([4]))
    assert log == [("record", GPU)] * 2
    assert ring.read() == {3: 8, 5: 9} and ring.read() == {5: 4}
    assert log[2:] == ["synchronize"] * 2


def test_uploads_to_a_gpu_come_from_pinned_memory():
    """From a block of its own: the caller's memory may be written again at once."""
    target = SimpleNamespace(is_cuda=True, copy_=lambda values, non_blocking: taken.append((values, non_blocking)))
    taken, pinned = [], object()
    upload(target, SimpleNamespace(pin_memory=lambda: pinned))
    assert taken == [(pinned, True)]


def test_prompts_that_fail_give_their_pages_back(monkeypatch):
    with DecodeEngine(tiny(), max_batch=4, max_len=24, page_size=4) as engine:
        engine.prefill([[1, 2, 3]])
        engine.read()
        free = engine.cache.free_pages
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_run_prompts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.prefill([[4, 5], [6] * 9])
        assert engine.cache.free_pages == free and engine.cache.batch == 1 and engine.rows == [0]
        assert engine.prefill([[4, 5]]) == [1]


def test_the_communicator_is_asked_about_replays_and_tokens():
    """It is told of each replay, for what only runs in one, and asked before tokens count."""
    log = []
    with DecodeEngine(tiny(), max_batch=2, max_len=24, page_size=4) as engine:
        engine.group.communicator.guard_replay = lambda: log.append("guard")
        engine.group.communicator.check = lambda: log.append("check")
        engine.prefill([[1, 2]])
        engine.step()
        assert log == [], "nothing is replayed where nothing is captured"
        engine._graphs.reason, engine._graphs._recorder = None, SimpleNamespace(record=lambda warm_up, step: step)
        engine.step()
        assert log == ["guard"]
        engine.read()
        assert log == ["guard", "check"]
        engine._ring.clear()
        with torch.inference_mode():
            engine._ring.send([0], torch.tensor([-1]))
        with pytest.raises(ValueError, match="NaN or infinities"):
            engine.read()


def test_an_engine_is_closed_when_its_gpu_is_done(monkeypatch):
    engine = DecodeEngine(tiny(), max_batch=1, max_len=8)
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(("synchronize", device)))
    monkeypatch.setattr(engine._graphs, "clear", lambda: log.append("clear"))
    engine.device = GPU
    engine.close()
    engine.close()
    assert log == [("synchronize", GPU), "clear"] and engine.cache is None


def test_the_kernels_of_several_ranks_choose_as_pytorch_does():
    """Embedding, layers and choice of one rank of two, interpreted, its partial sums passing for the sums."""
    from tp_kernels.ops._gpu import H100, pretend

    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None)
    group = switched_off(1, 2)
    model = ParallelCausalLM(ModelConfig.from_hf({"model_type": "llama", **sizes}), group=group)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model = model.half()
    with DecodeEngine(model, max_batch=2, max_len=24, page_size=4) as engine:
        expected = engine.generate([[40, 50, 60], [33]], [2, 2]).output_ids
        with pretend(H100):
            assert engine.generate([[40, 50, 60], [33]], [2, 2]).output_ids == expected
    assert all(32 <= token < 64 for row in expected for token in row), "words of this rank, which are all it offers"
