"""Counters of kernels that finish a launch by their last arrival. Tiers: no device, GPU."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tp_kernels import ops
from tp_kernels.ops.kernels import counters
from tp_kernels.ops.kernels.skinny import Config, skinny_matmul


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a tensor on a GPU, whose ``capturing`` is whether its stream is being captured."""
    x = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), get_device=lambda: 98, capturing=False)
    stream = SimpleNamespace(cuda_stream=5, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: x.capturing)
    for name in ("_blocks", "_of_stream", "_for_captures"):
        monkeypatch.setattr(counters, name, {})
    return x


def test_what_lasts_comes_from_no_pool_of_the_calling_thread(gpu, monkeypatch):
    threads, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: threads.append(threading.get_ident()) or zeros(*a, **k))
    here = threading.get_ident()
    counters.take_counters(gpu, 5)
    assert len(threads) == 2 and here not in threads  # of the stream, and for captures
    gpu.capturing = True
    counters.take_counters(gpu, 1 << 19)  # more than there are: part of the capture, hence of its thread
    assert threads[2:] == [here]


def test_no_memory_is_an_error_of_the_caller(gpu, monkeypatch):
    def refuse(*arguments, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        counters.take_counters(gpu, 5)


def test_captures_get_counters_anew_once_their_graphs_are_gone(gpu):
    counters.take_counters(gpu, 5)
    gpu.capturing = True
    first = counters.take_counters(gpu, 40)
    assert counters.take_counters(gpu, 40).data_ptr() != first.data_ptr()
    counters.forget_captures()
    assert counters.take_counters(gpu, 40).data_ptr() == first.data_ptr()


@pytest.mark.gpu
@pytest.mark.sanitize
def test_a_stream_outgrows_its_counters(monkeypatch):
    monkeypatch.setattr(counters, "_EAGER", 1)
    for name in ("_blocks", "_of_stream", "_for_captures"):
        monkeypatch.setattr(counters, name, {})
    generator, sizes = torch.Generator("cuda").manual_seed(5), []
    for n in (33, 200, 33):
        x, weight = (torch.randint(-2, 3, (rows, 264), generator=generator, device="cuda") for rows in (3, n))
        out = torch.empty(3, n, device="cuda", dtype=torch.bfloat16)
        skinny_matmul(out, x.bfloat16(), weight.bfloat16(), config=Config(16, 64, split_k=2))
        assert torch.equal(out, (x.double() @ weight.double().t()).bfloat16())
        (held,) = counters._of_stream.values()
        assert not held.any()
        sizes.append(held.numel())
    assert sizes[0] < sizes[1] == sizes[2]


@pytest.mark.gpu
def test_first_used_in_the_warm_up_of_a_compiled_graph(measured, monkeypatch):
    """Inductor refuses what stays in the pool of its graphs; and a replay would write over it."""
    for name in ("_blocks", "_of_stream", "_for_captures"):
        monkeypatch.setattr(counters, name, {})
    generator = torch.Generator("cuda").manual_seed(3)
    m, n, k = 16, 512, 4096
    weight = torch.randn(n, k, generator=generator, device="cuda").bfloat16()
    weight = torch.nn.Parameter(weight, requires_grad=False)
    measured("linear", "skinny", {"m": m, "n": n, "k": k}, {"block_n": 64, "block_k": 128, "split_k": 4})
    compiled = torch.compile(lambda x: ops.linear(x, weight), mode="reduce-overhead")
    for _ in range(4):  # a warm-up, a capture, replays
        x = torch.randn(m, k, generator=generator, device="cuda").bfloat16()
        assert torch.equal(compiled(x).clone(), ops.linear(x, weight))
    assert all(not tensor.any() for tensor in counters._of_stream.values()) and counters._blocks
