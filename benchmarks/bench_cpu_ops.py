"""CPU ops of a decode step against PyTorch, in one interleaved run.

    python benchmarks/bench_cpu_ops.py [--threads 1 2] [--dtype float32] [--rows 1 2 4 8 16] [--csv FILE]

Shapes are those of SmolLM2-135M. Weights rotate over more memory than any cache holds, as they do in a real step. GB/s
counts the bytes of weights (or of the KV cache); `% read` is against a plain read of the same memory in the same run,
`x torch` against PyTorch's call. Results are compared with fp64 before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tp_kernels import ops
from tp_kernels._native import native
from tp_kernels.testing.bench import Timing, interleaved, write_csv
from tp_kernels.testing.numeric import assert_close_to_reference

# name: (kind, rows of the weight, columns)
SHAPES = {
    "qkv 960x576": ("linear", 960, 576),
    "o 576x576": ("linear", 576, 576),
    "gate_up 3072x576": ("swiglu", 3072, 576),
    "down 576x1536": ("linear", 576, 1536),
    "head 49152x576": ("linear", 49152, 576),
}
POOL_BYTES = 256 << 20  # several times the largest last-level cache share of a small machine


def rotating(tensors: list[torch.Tensor], function: Callable[[torch.Tensor], object]) -> Callable[[], object]:
    """Calls ``function`` with the next tensor each time."""
    turn = itertools.cycle(tensors)
    return lambda: function(next(turn))


def bench_weights(threads: int, dtype: torch.dtype, rows: int, huge: bool, rounds: int) -> list[dict]:
    """Linear and SwiGLU at one number of rows."""
    out = []
    for name, (kind, n, k) in SHAPES.items():
        each = n * k * dtype.itemsize
        pool = torch.randn(max(1, POOL_BYTES // each), n, k).mul_(k**-0.5).to(dtype)
        if huge:
            ops.advise_huge(pool)
        weights = list(pool.unbind(0))
        x = torch.randn(1, rows, k).to(dtype)
        if kind == "linear":
            ours: Callable = lambda w, x=x: native_linear(x, w, False)  # noqa: E731
            theirs: Callable = lambda w, x=x: F.linear(x, w)  # noqa: E731
        else:
            ours = lambda w, x=x: native_linear(x, w, True)  # noqa: E731
            theirs = lambda w, x=x: ops.swiglu_linear_reference(x, w)  # noqa: E731
        exact = ops.linear_reference if kind == "linear" else ops.swiglu_linear_reference
        assert_close_to_reference(
            ours(weights[0]), theirs(weights[0]), exact(x.double(), weights[0].double()), factor=3.0, name=name
        )
        calls = max(4, min(60, (32 << 20) // each))
        seconds = interleaved(
            {
                "ours": rotating(weights, ours),
                "torch": rotating(weights, theirs),
                "read": rotating(
                    weights, lambda w, c=each // 4: native.cpu_read_floats(w.data_ptr(), c, torch.get_num_threads())
                ),
            },
            rounds=rounds,
            calls=calls,
        )
        out.append(row(name, rows, threads, dtype, huge, each, seconds))
    return out


def native_linear(x: torch.Tensor, w: torch.Tensor, gated: bool) -> torch.Tensor:
    """The native kernel whatever the number of rows, so that the crossover can be seen."""
    from tp_kernels.ops._library import CPU_DTYPES

    m, k = x.numel() // x.shape[-1], x.shape[-1]
    n = w.shape[0] // 2 if gated else w.shape[0]
    out = x.new_empty(*x.shape[:-1], n)
    native.cpu_linear(
        *(out.data_ptr(), x.data_ptr(), w.data_ptr(), 0, 0, m, n, k, k, k, n),
        *(CPU_DTYPES[x.dtype], 1 if gated else 0, gated, torch.get_num_threads()),
    )
    return out


def bench_rest(threads: int, dtype: torch.dtype, rounds: int) -> list[dict]:
    """What is not weights: norm, QKV step, attention over 512 positions; in cache, as in a real step."""
    x, weight = torch.randn(1, 1, 576).to(dtype), torch.ones(576, dtype=dtype)
    qkv = torch.randn(1, 1, 15 * 64).to(dtype)
    table = torch.randn(1024, 64)
    k, v = (torch.randn(1, 3, 1024, 64).to(dtype) for _ in range(2))
    q, lengths = torch.randn(1, 9, 1, 64).to(dtype), torch.tensor([511])
    step = (qkv, table, table, lengths, k, v, 9, 3)
    cases = {
        "add_rms_norm 576": (
            3 * 576 * dtype.itemsize,
            lambda: ops.add_rms_norm(x, x, weight),
            lambda: ops.add_rms_norm_reference(x, x, weight),
        ),
        "qkv_rope_cache": (
            2 * 960 * dtype.itemsize,
            lambda: ops.qkv_rope_cache(*step),
            lambda: ops.qkv_rope_cache_reference(*step),
        ),
        "decode_attention 512": (
            2 * 3 * 512 * 64 * dtype.itemsize,
            lambda: ops.decode_attention(q, k, v, lengths),
            lambda: F.scaled_dot_product_attention(q, k[:, :, :512], v[:, :, :512], enable_gqa=True),
        ),
    }
    out = []
    for name, (size, ours, theirs) in cases.items():
        seconds = interleaved({"ours": ours, "torch": theirs}, rounds=rounds, calls=50)
        out.append(row(name, 1, threads, dtype, False, size, seconds))
    return out


def row(
    name: str, rows: int, threads: int, dtype: torch.dtype, huge: bool, size: int, seconds: dict[str, list[float]]
) -> dict:
    """One line of the table."""
    times = {who: Timing.of(values) for who, values in seconds.items()}
    ours, theirs = times["ours"], times["torch"]
    read = times.get("read")
    result = {
        "op": name,
        "rows": rows,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "huge_pages": int(huge),
        "bytes": size,
        "ours_us": round(ours.median * 1e6, 2),
        "ours_q20_us": round(ours.q20 * 1e6, 2),
        "ours_q80_us": round(ours.q80 * 1e6, 2),
        "torch_us": round(theirs.median * 1e6, 2),
        "ours_gbs": round(size / ours.median / 1e9, 2),
        "torch_gbs": round(size / theirs.median / 1e9, 2),
        "read_gbs": round(size / read.median / 1e9, 2) if read else "",
        "percent_of_read": round(100 * read.median / ours.median) if read else "",
        "times_torch": round(theirs.median / ours.median, 2),
    }
    print(
        f"{name:22} {rows:4} {threads:7} {result['dtype']:8} {result['ours_us']:10.1f} {result['torch_us']:10.1f} "
        f"{result['ours_gbs']:8.1f} {result['torch_gbs']:8.1f} {result['read_gbs']!s:>8} "
        f"{result['percent_of_read']!s:>6} {result['times_torch']:8.2f}",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="rows of x, that is, batch sizes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small-pages", action="store_true", help="do not put the weights into huge pages")
    parser.add_argument("--csv", help="write the table to this file")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(f"kernels: {native.cpu_isa()}")
    print(f"{'op':22} rows threads dtype       ours us   torch us     GB/s    torch     read % read  x torch")
    rows = []
    with torch.inference_mode():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            rows += bench_rest(threads, dtype, arguments.rounds)
            for count in arguments.rows:
                rows += bench_weights(threads, dtype, count, not arguments.small_pages, arguments.rounds)
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
