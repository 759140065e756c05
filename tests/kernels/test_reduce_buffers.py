"""``reduce_buffers``, the CUDA kernel that sums buffers in rank order. Tiers: no device (arguments), GPU (values)."""

import pytest
import torch

from tp_kernels import _native

needs_build = pytest.mark.skipif(not _native.has_cuda(), reason=f"CUDA sources {_native.build_info()['cuda']}")


def reduce_buffers(inputs, out, n=None):
    stream = torch.cuda.current_stream().cuda_stream if out.is_cuda else 0
    _native.native.cuda_reduce_buffers(
        [x.data_ptr() for x in inputs],
        out.data_ptr(),
        out.numel() if n is None else n,
        _native.dtype_code(out.dtype),
        stream,
    )


@needs_build
def test_bad_arguments_are_refused_before_any_launch():
    call = _native.native.cuda_reduce_buffers
    with pytest.raises(ValueError, match="1 to 16 buffers, got 0"):
        call([], 16, 4, 0, 0)
    with pytest.raises(ValueError, match="input address is null"):
        call([0], 16, 4, 0, 0)
    with pytest.raises(ValueError, match="output address is null"):
        call([16], 0, 4, 0, 0)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        call([16], 16, 4, _native.DTYPE_CODES["int64"], 0)
    with pytest.raises(ValueError, match="unknown dtype code 99"):
        call([16], 16, 4, 99, 0)
    call([0], 0, 0, 0, 0)  # nothing to do is not an error


@pytest.mark.gpu
@pytest.mark.sanitize
@needs_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "n", "offset"), [(1, 1, 0), (2, 7, 0), (3, 4099, 1), (5, 65536, 0), (16, 1000, 3)])
def test_sum_is_in_rank_order_with_one_rounding(dtype, count, n, offset):
    generator = torch.Generator(device="cuda").manual_seed(count * 1000 + n)
    storage = [torch.randn(n + offset, device="cuda", generator=generator).to(dtype) for _ in range(count)]
    inputs = [x[offset:] for x in storage]
    out = torch.full((n + offset,), float("nan"), device="cuda", dtype=dtype)[offset:]
    reduce_buffers(inputs, out)
    expected = torch.zeros(n, device="cuda")
    for x in inputs:
        expected += x.float()
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.gpu
@needs_build
def test_runs_on_the_callers_stream_and_in_place():
    stream = torch.cuda.Stream()
    a, b = (torch.full((1 << 20,), value, device="cuda") for value in (1.0, 2.0))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the sum must wait for what is queued before it on this stream
        a.add_(4.0)
        reduce_buffers([a, b], a)
    stream.synchronize()
    assert torch.equal(a, torch.full_like(a, 7.0))


@pytest.mark.gpu
@needs_build
def test_graph_capture():
    a, b, out = (torch.randn(4097, device="cuda") for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reduce_buffers([a, b], out)
    for _ in range(3):  # an odd number of replays, on fresh data
        a.normal_()
        graph.replay()
        assert torch.equal(out, a + b)
