"""The doctor's checks that run something: each returns a line of detail, raises ``doctor.Skip``, or fails.

Collectives sum small integers held in floats, so they are compared exactly. Layers are compared with plain PyTorch in
float64; they may be at most twice as far from it as PyTorch is in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tp_kernels import _native
from tp_kernels.doctor import Skip, mapped_libraries
from tp_kernels.doctor_peer import check_peer_memory

__all__ = ["all_checks"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
_LATENCY_BYTES = 4096
_LATENCY_CALLS = 500


def all_checks() -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check) in the order of the report; pools of ranks are started by the checks and ended with them."""
    yield "native core: its dtype table is torch's", check_dtype_table
    yield "NCCL: one copy in the process", check_nccl_copies
    yield "NCCL: what the native core finds", check_nccl_library
    yield "CPU kernels: linear and attention equal PyTorch's", check_cpu_kernels
    for backend in ("shm", "gloo"):
        for world_size in (2, 4):
            yield f"collectives: {backend}, {world_size} ranks", partial(check_collectives, backend, world_size)
    yield "layers: column, row, MLP, attention at tp=2", check_layers
    yield "latency: all-reduce of 4 KB, 2 ranks", check_latency
    yield "CUDA kernel: reduce_buffers", check_cuda_kernel
    yield "peer memory: stores, loads and atomics of kernels", check_peer_memory


def check_dtype_table() -> str:
    table = _native.native.dtype_table()
    for name, (code, size) in table.items():
        if _native.DTYPE_CODES.get(name) != code or getattr(torch, name).itemsize != size:
            raise RuntimeError(f"{name}: the native core says code {code}, {size} bytes; reinstall tp_kernels")
    return f"{len(table)} dtypes"


def check_nccl_copies() -> str:
    copies = mapped_libraries("libnccl")
    if not copies:
        raise Skip("no NCCL is loaded (torch is built without it)")
    if len(copies) > 1:
        raise RuntimeError(f"{len(copies)} copies of NCCL are loaded, which corrupts both: {', '.join(copies)}")
    return copies[0]


def check_nccl_library() -> str:
    from tp_kernels.comm.nccl_library import nccl_library_info

    info = nccl_library_info()
    if info.error is None:
        return str(info)
    if not info.copies and "NCCL was not found" in info.error:
        raise Skip(info.error)
    raise RuntimeError(info.error)


def check_cpu_kernels() -> str:
    from tp_kernels import ops
    from tp_kernels.testing.numeric import assert_close_to_reference

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((3, 577), (193, 577)))
    with torch.no_grad():
        expected = F.linear(x.double(), weight.double())
        assert_close_to_reference(ops.linear(x, weight), F.linear(x, weight), expected, name="linear")
        q, k, v = (torch.randn(2, heads, 13, 64, generator=generator) for heads in (6, 2, 2))
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert_close_to_reference(ops.attention(q, k, v, causal=True), plain, expected, name="attention")
    return "within twice PyTorch's own float32 error of float64"


# --- ranks ----------------------------------------------------------------------------------------------------------


def _run_on_ranks(world_size: int, backend: str, function: Callable[..., Any]) -> list[Any]:
    from tp_kernels.testing.rank_pool import RankPool

    with RankPool(world_size, backend=backend, group_timeout=30.0) as pool:
        return pool.run(function, timeout=60.0)


def check_collectives(backend: str, world_size: int) -> str:
    from tp_kernels.comm.policy import BackendUnavailableError

    try:
        calls = _run_on_ranks(world_size, backend, _collectives_on_rank)[0]
    except BackendUnavailableError as reason:
        raise Skip(str(reason)) from None
    return f"{calls} results exact on every rank"


def _collectives_on_rank(group: Any) -> int:
    calls = 0
    for dtype in _DTYPES:
        for length in (1, 37, 100_003):
            calls += _check_each_collective(group, dtype, length)
        group.barrier()
    return calls


def _check_each_collective(group: Any, dtype: torch.dtype, length: int) -> int:
    rank, size = group.rank, group.world_size

    def data(owner: int, count: int = length) -> torch.Tensor:
        # At most 11 * 4 ranks: exact in every dtype here, bf16 included.
        return ((torch.arange(count) * (owner + 1)) % 11).to(dtype)

    everyone = torch.stack([data(r) for r in range(size)])
    _expect(group.all_reduce(data(rank)), everyone.sum(0).to(dtype), "all_reduce sum", group)
    _expect(group.all_reduce(data(rank), "max"), everyone.amax(0), "all_reduce max", group)
    sizes = [length // size + (r < length % size) for r in range(size)]
    expected = everyone.sum(0).to(dtype).split(sizes)[rank]
    _expect(group.reduce_scatter(data(rank), sizes=sizes), expected, "reduce_scatter", group)
    gathered = torch.cat([data(r, sizes[r]) for r in range(size)])
    _expect(group.all_gather(data(rank, sizes[rank]), sizes=sizes), gathered, "all_gather", group)
    _expect(group.broadcast(data(rank), size - 1), data(size - 1), "broadcast", group)
    return 5


def _expect(actual: torch.Tensor, expected: torch.Tensor, operation: str, group: Any) -> None:
    if actual.dtype != expected.dtype or not torch.equal(actual, expected):
        raise RuntimeError(
            f"{operation} of {expected.numel()} {expected.dtype} on rank {group.rank} of {group.world_size} is wrong"
        )


def check_layers() -> str:
    names = _run_on_ranks(2, "auto", _layers_on_rank)[0]
    return f"{', '.join(names)} within twice PyTorch's own float32 error of float64"


def _layers_on_rank(group: Any) -> list[str]:
    from tp_kernels.testing.numeric import assert_close_to_reference

    torch.manual_seed(0)  # the same weights and inputs on every rank
    cases = {"column": _column_case, "row": _row_case, "MLP": _mlp_case, "attention": _attention_case}
    with torch.no_grad():
        for name, case in cases.items():
            actual, plain, exact = case(group)
            assert_close_to_reference(actual, plain, exact, name=name)
    return list(cases)


def _column_case(group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tp_kernels.layers import ColumnParallelLinear

    linear, x = torch.nn.Linear(96, 75), torch.randn(5, 96)
    actual = ColumnParallelLinear.from_linear(linear, group=group, gather_output=True)(x)
    return actual, linear(x), linear.double()(x.double())


def _row_case(group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tp_kernels.layers import RowParallelLinear

    linear, x = torch.nn.Linear(75, 96), torch.randn(5, 75)
    actual = RowParallelLinear.from_linear(linear, group=group, input_is_parallel=False)(x)
    return actual, linear(x), linear.double()(x.double())


def _mlp_case(group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tp_kernels.layers import ParallelMLP, load_full_state_dict

    hidden, inner = 48, 130
    weights = {
        "gate_proj.weight": torch.randn(inner, hidden) / 7,
        "up_proj.weight": torch.randn(inner, hidden) / 7,
        "down_proj.weight": torch.randn(hidden, inner) / 11,
    }
    layer = ParallelMLP(hidden, inner, group=group)
    load_full_state_dict(layer, weights)
    x = torch.randn(2, 5, hidden)

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (w.to(x.dtype) for w in weights.values())
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    return layer(x), plain(x), plain(x.double())


def _attention_case(group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tp_kernels.layers import ParallelAttention, load_full_state_dict

    hidden, heads, kv_heads, width = 60, 9, 3, 16  # what two ranks cannot split evenly
    weights = {
        "q_proj.weight": torch.randn(heads * width, hidden) / 7,
        "k_proj.weight": torch.randn(kv_heads * width, hidden) / 7,
        "v_proj.weight": torch.randn(kv_heads * width, hidden) / 7,
        "o_proj.weight": torch.randn(hidden, heads * width) / 12,
    }
    layer = ParallelAttention(hidden, heads, kv_heads, width, rope=None, group=group)
    load_full_state_dict(layer, weights)
    x = torch.randn(2, 7, hidden)

    def plain(x: torch.Tensor) -> torch.Tensor:
        wq, wk, wv, wo = (w.to(x.dtype) for w in weights.values())
        q, k, v = (F.linear(x, w).unflatten(-1, (-1, width)).transpose(1, 2) for w in (wq, wk, wv))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(-2), wo)

    return layer(x), plain(x), plain(x.double())


def check_latency() -> str:
    median, p80, backend = _run_on_ranks(2, "auto", _latency_on_rank)[0]
    return f"{backend}: median {median:.1f} us, 80th percentile {p80:.1f} us (not judged)"


def _latency_on_rank(group: Any) -> tuple[float, float, str]:
    x = torch.ones(_LATENCY_BYTES // 4)
    times = []
    for call in range(_LATENCY_CALLS + 50):
        started = time.perf_counter()
        group.all_reduce(x, out=x)
        if call >= 50:
            times.append((time.perf_counter() - started) * 1e6)
        x.fill_(1.0)
    return statistics.median(times), statistics.quantiles(times, n=5)[-1], group.communicator.backend


def check_cuda_kernel() -> str:
    if not _native.has_cuda():
        raise Skip(f"the CUDA sources were {_native.build_info()['cuda']}")
    if not torch.cuda.is_available():
        raise Skip("no GPU here")
    checked = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = [(torch.arange(4099, device="cuda") % 7 + i).to(dtype) for i in range(5)]
        out = torch.empty_like(inputs[0])
        stream = torch.cuda.current_stream().cuda_stream
        addresses = [x.data_ptr() for x in inputs]
        _native.native.cuda_reduce_buffers(addresses, out.data_ptr(), out.numel(), _native.dtype_code(dtype), stream)
        if not torch.equal(out, torch.stack(inputs).sum(0)):
            raise RuntimeError(f"the sum of five {dtype} buffers is wrong")
        checked += 1
    return f"{checked} dtypes exact on {torch.cuda.get_device_name()}"
