"""The projections of a decoder layer and the output head with weights of one byte.

The yardstick is cuBLAS with the same weight in 16 bits, which reads twice the bytes; the peers proper are what the op
falls back to, and what torch makes of such weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels import ops
from tp_kernels.ops.quantize import KINDS, fp8_reason
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, compiled, randn, this_gpu
from tp_kernels.testing.op_bench.linear import MOST_HEAD_ROWS, projections

__all__ = ["OP", "ROWS", "cases", "kinds_here", "quantized_inputs"]

OP = "quantized_linear"
ROWS = (1, 2, 4, 8, 16, 64, 128, 256, 4096)
# Beyond, reading the weights again for every 64 rows is out of the question.
MOST_SKINNY_ROWS = 256


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """All projections of one rank, for int8 and fp8 weights."""
    if dtype is torch.float32:
        return  # such activations have no kernel
    shapes = {name: (*shape, name == "gate_up") for name, shape in projections(model, tp).items()}
    for kind in kinds_here():
        for name, (n, k, gated) in shapes.items():
            for m in rows or ROWS:
                if name != "lm_head" or m <= MOST_HEAD_ROWS:
                    yield _case(f"{model.name} tp={tp} {name} {kind} M={m}", m, n, k, dtype, kind, gated)


def _case(label: str, m: int, n: int, k: int, dtype: torch.dtype, kind: str, gated: bool) -> Case:
    columns = n // 2 if gated else n
    # Of the case: the weight once, its scales, x and the result. The yardstick's weight only rotates with them.
    moved = n * k + 4 * n + (m * k + m * columns) * dtype.itemsize
    return Case(
        op="quantized_swiglu_linear" if gated else OP,
        label=label,
        sizes={"m": m, "n": columns, "k": k, "fp8": -1 if kind == "fp8" else 0},
        dtype=dtype,
        inputs=partial(_inputs, m, n, k, dtype, kind),
        reference=partial(_reference, gated),
        peers=_peers(gated, kind, dtype, m),
        own=_own_paths(dtype, m, columns, k, gated),
        public=partial(_public, gated),
        bytes=moved,
        flops=2 * m * n * k,
        input_bytes=moved + n * k * dtype.itemsize,
    )


def kinds_here() -> list[str]:
    """The kinds of quantised weights that this GPU's kernels read."""
    old = fp8_reason(this_gpu()) is not None
    return [kind for kind in KINDS if not (old and kind == "fp8")]


def quantized_inputs(
    generator: torch.Generator, n: int, k: int, dtype: torch.dtype, kind: str | None
) -> tuple[Tensor, Tensor | None]:
    """A weight and its scale (None for a weight of ``dtype``): parameters that nobody trains, as in a decode step."""
    weight = randn(generator, n, k, dtype=dtype, scale=k**-0.5)
    if kind is None:
        return torch.nn.Parameter(weight, requires_grad=False), None
    return tuple(torch.nn.Parameter(t, requires_grad=False) for t in ops.quantize_weight(weight, kind))


def _inputs(m: int, n: int, k: int, dtype: torch.dtype, kind: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    q, scale = quantized_inputs(generator, n, k, dtype, kind)
    return randn(generator, m, k, dtype=dtype), q, scale, ops.dequantize_weight(q, scale, dtype)


def _reference(gated: bool, x: Tensor, q: Tensor, scale: Tensor, wide: Tensor) -> Tensor:
    reference = ops.swiglu_linear_reference if gated else ops.linear_reference
    return reference(x.double(), q, weight_scale=scale)


def _public(gated: bool, x: Tensor, q: Tensor, scale: Tensor, wide: Tensor) -> Tensor:
    return ops.swiglu_linear(x, q, weight_scale=scale) if gated else ops.linear(x, q, weight_scale=scale)


def _peers(gated: bool, kind: str, dtype: torch.dtype, m: int) -> dict[str, Callable[..., Tensor]]:
    after: Callable[[Tensor], Tensor] = ops.silu_mul if gated else lambda y: y
    plain_after: Callable[[Tensor], Tensor] = ops.silu_mul_reference if gated else lambda y: y

    def scaled_after(x: Tensor, q: Tensor, scale: Tensor, wide: Tensor) -> Tensor:
        return plain_after((F.linear(x, q.to(x.dtype)) * scale).to(x.dtype))

    peers: dict[str, Callable[..., Tensor]] = {
        "torch": lambda x, q, scale, wide: after(F.linear(x, ops.dequantize_weight(q, scale, x.dtype))),
        "cublas, 16-bit weight": lambda x, q, scale, wide: after(F.linear(x, wide)),
    }
    if kind == "int8" and m <= 8:  # seconds of compiling each; for one row Inductor makes a reduction of it
        peers["torch.compile"] = compiled(scaled_after)
    int8_matmul = getattr(torch, "_weight_int8pack_mm", None)
    if kind == "int8" and dtype is torch.bfloat16 and int8_matmul is not None and torch.cuda.is_available():
        peers["_weight_int8pack_mm"] = lambda x, q, scale, wide: after(int8_matmul(x, q, scale.to(x.dtype)))
    return peers


def _own_paths(dtype: torch.dtype, m: int, n: int, k: int, gated: bool) -> dict[str, Own]:
    from tp_kernels.ops.kernels import gemv, skinny

    info, paths = this_gpu(), {}
    found: dict[str, tuple[Callable[..., None], Any]] = {
        "gemv": (gemv.gemv, gemv),
        "skinny": (skinny.skinny_matmul, skinny),
    }
    for name, (launcher, module) in found.items():
        configs = module.candidates(info, dtype, m, n, k, gated, True) if m <= MOST_SKINNY_ROWS else []
        if configs:
            run = partial(_run, launcher, module.Config, gated)
            paths[name] = Own(run, [config._asdict() for config in configs])
    return paths


def _run(
    launcher: Callable[..., None],
    config_type: Callable[..., Any],
    gated: bool,
    config: dict[str, Any] | None,
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    wide: Tensor,
) -> Tensor:
    out = x.new_empty(x.shape[0], q.shape[0] // (2 if gated else 1))
    chosen = config_type(**config) if config else None
    launcher(out, x, q, None, None, None, gated, chosen, weights_ready=True, scale=scale)
    return out
