"""The projections of a decoder layer and the output head, bare and with the residual added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels import ops
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, randn, this_gpu

__all__ = ["MOST_HEAD_ROWS", "OP", "ROWS", "cases", "own_paths", "projections"]

OP = "linear"
ROWS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)
# Logits of more rows are wanted in training only, and 16384 of 128256 words would not fit beside their reference.
MOST_HEAD_ROWS = 1024


def projections(model: Shapes, tp: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the weights of one rank, by name."""
    local = model.shard(tp)
    hidden, width = model.hidden, local.heads * local.head_dim
    return {
        "qkv": (width + 2 * local.kv_heads * local.head_dim, hidden),
        "o": (hidden, width),
        "gate_up": (2 * local.intermediate, hidden),
        "down": (hidden, local.intermediate),
        "lm_head": (local.vocab, hidden),
    }


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """All projections of one rank; where nothing is reduced in between, the row-parallel ones with a residual, too."""
    for name, (n, k) in projections(model, tp).items():
        for m in rows or ROWS:
            if name == "lm_head" and m > MOST_HEAD_ROWS:
                continue
            label = f"{model.name} tp={tp} {name} M={m}"
            yield _case(label, m, n, k, dtype, False)
            # With more ranks the residual follows the all-reduce.
            if name in ("o", "down") and (tp == 1 or model.name == "tiny"):
                yield _case(label, m, n, k, dtype, True)


def _case(label: str, m: int, n: int, k: int, dtype: torch.dtype, residual: bool) -> Case:
    operands = (m * k + n * k + m * n * (2 if residual else 1)) * dtype.itemsize
    return Case(
        op="linear_residual" if residual else OP,
        label=label,
        sizes={"m": m, "n": n, "k": k},
        dtype=dtype,
        inputs=partial(_inputs, m, n, k, dtype, residual),
        reference=_reference,
        peers={"torch": _addmm, "F.linear + add": _reference_same} if residual else {"torch": F.linear},
        own=own_paths(dtype, m, n, k, False),
        public=_public,
        bytes=operands,
        flops=2 * m * n * k,
        input_bytes=operands,
    )


def _inputs(
    m: int, n: int, k: int, dtype: torch.dtype, residual: bool, generator: torch.Generator
) -> tuple[Tensor, ...]:
    x, weight = randn(generator, m, k, dtype=dtype), randn(generator, n, k, dtype=dtype, scale=k**-0.5)
    # A parameter that nobody trains may be fetched before the kernel that makes x has ended, as in a decode step.
    operands = (x, torch.nn.Parameter(weight, requires_grad=False))
    return (*operands, randn(generator, m, n, dtype=dtype)) if residual else operands


def _reference(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    return ops.linear_reference(x.double(), weight.double(), None, None if residual is None else residual.double())


def _reference_same(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return F.linear(x, weight) + residual


def _addmm(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.addmm(residual, x, weight.t())


def _public(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    return ops.linear(x, weight, None, residual)


def own_paths(dtype: torch.dtype, m: int, n: int, k: int, gated: bool) -> dict[str, Own]:
    """Our paths for x [m, k] and n columns of the result, with the configurations for the GPU here or an H100."""
    from tp_kernels.ops.kernels import gemv, matmul, skinny, swiglu_matmul

    info, large = this_gpu(), swiglu_matmul if gated else matmul
    paths: dict[str, tuple[Callable[..., Tensor], Sequence[Any]]] = {
        "triton": (partial(_run_large, gated), large.candidates(info, dtype, m, n, k))
    }
    if m <= 64:
        run = partial(_run_few_rows, skinny.skinny_matmul, skinny.Config, gated)
        paths["skinny"] = (run, skinny.candidates(info, dtype, m, n, k, gated))
    if m <= 8:
        run = partial(_run_few_rows, gemv.gemv, gemv.Config, gated)
        paths["gemv"] = (run, gemv.candidates(info, dtype, m, n, k, gated))
    return {name: Own(run, [config._asdict() for config in configs]) for name, (run, configs) in paths.items()}


def _run_large(
    gated: bool, config: dict[str, Any] | None, x: Tensor, weight: Tensor, residual: Tensor | None = None
) -> Tensor:
    from tp_kernels.ops.kernels.matmul import Config, matmul
    from tp_kernels.ops.kernels.swiglu_matmul import swiglu_matmul

    chosen = Config(**config) if config else None
    out = x.new_empty(x.shape[0], weight.shape[0] // (2 if gated else 1))
    if gated:
        swiglu_matmul(out, x, weight, None, None, chosen)
    else:
        matmul(out, x, weight, None, residual, None, chosen)
    return out


def _run_few_rows(
    launcher: Callable[..., None],
    config_type: Callable[..., Any],
    gated: bool,
    config: dict[str, Any] | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0] // (2 if gated else 1))
    chosen = config_type(**config) if config else None
    launcher(out, x, weight, None, residual, None, gated, chosen, weights_ready=True)
    return out
