"""The gated up-projection of a decoder layer: one GEMM with the gate in its epilogue, against a GEMM and one pass more.

Not among the peers: quack's ``gemm_gated`` 0.6.5, which could not be traced on torch 2.11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels import ops
from tp_kernels.testing.op_bench.case import Case, Shapes, compiled, randn
from tp_kernels.testing.op_bench.linear import ROWS, own_paths
from tp_kernels.testing.op_bench.silu_mul import liger_function

__all__ = ["OP", "cases"]

OP = "swiglu_linear"


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """The up-projection of one rank for each number of tokens."""
    n, k = model.shard(tp).intermediate, model.hidden
    for m in rows or ROWS:
        operands = (m * k + 2 * n * k + m * n) * dtype.itemsize
        yield Case(
            op=OP,
            label=f"{model.name} tp={tp} M={m}",
            sizes={"m": m, "n": n, "k": k},
            dtype=dtype,
            inputs=partial(_inputs, m, n, k, dtype),
            reference=_reference,
            peers=_peers(),
            own=own_paths(dtype, m, n, k, True),
            public=ops.swiglu_linear,
            bytes=operands,
            flops=4 * m * n * k,
            input_bytes=operands,
        )


def _inputs(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = randn(generator, 2 * n, k, dtype=dtype, scale=k**-0.5)
    # A parameter that nobody trains may be fetched before the kernel that makes x has ended, as in a decode step.
    return randn(generator, m, k, dtype=dtype), torch.nn.Parameter(weight, requires_grad=False)


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    return ops.swiglu_linear_reference(x.double(), weight.double())


def _peers() -> dict[str, Callable[..., Tensor]]:
    peers: dict[str, Callable[..., Tensor]] = {
        "torch": lambda x, weight: ops.silu_mul(F.linear(x, weight)),  # what the op falls back to
        "cublas+F.silu": ops.swiglu_linear_reference,
        "torch.compile": compiled(ops.swiglu_linear_reference),
    }
    liger = liger_function()
    if liger is not None:
        peers["cublas+liger"] = lambda x, weight: liger(*(F.linear(x, part) for part in weight.chunk(2)))
    return peers
