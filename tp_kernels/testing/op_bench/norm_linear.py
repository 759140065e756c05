"""A norm and the projection behind it, as in a decode step at world size 1: one kernel, against two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tp_kernels import ops
from tp_kernels.ops.norm_linear import WEIGHT_PROPERTY
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, compiled, randn, this_gpu
from tp_kernels.testing.op_bench.linear import projections
from tp_kernels.testing.op_bench.quantized_linear import kinds_here, quantized_inputs

__all__ = ["OP", "ROWS", "cases"]

OP = "norm_linear"
ROWS = (1, 2, 4, 8)
MOST_ROWS = 8
_EPS = 1e-5


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """The projections that follow a norm, for weights of ``dtype``, int8 and fp8."""
    if dtype is torch.float32:
        return  # cuBLAS's always
    shapes = projections(model, tp)
    for kind in (None, *kinds_here()):
        for name in ("qkv", "gate_up", "lm_head"):
            for m in rows or ROWS:
                if m <= MOST_ROWS:
                    label = f"{model.name} tp={tp} {name} {kind or '16-bit'} M={m}"
                    yield _case(label, m, *shapes[name], dtype, kind, name == "gate_up")


def _case(label: str, m: int, n: int, k: int, dtype: torch.dtype, kind: str | None, gated: bool) -> Case:
    columns = n // 2 if gated else n
    weight = n * k * dtype.itemsize if kind is None else n * k + 4 * n
    moved = weight + (m * k + k + m * columns) * dtype.itemsize
    reference = ops.norm_swiglu_linear_reference if gated else ops.norm_linear_reference

    def exact(x: Tensor, g: Tensor, w: Tensor, scale: Tensor | None) -> Tensor:
        return reference(x.double(), g.double(), _EPS, w if kind else w.double(), weight_scale=scale)

    def separate(x: Tensor, g: Tensor, w: Tensor, scale: Tensor | None) -> Tensor:
        op = ops.swiglu_linear if gated else ops.linear
        return op(ops.rms_norm(x, g, _EPS), w, weight_scale=scale)

    def public(x: Tensor, g: Tensor, w: Tensor, scale: Tensor | None) -> Tensor:
        op = ops.norm_swiglu_linear if gated else ops.norm_linear
        return op(x, g, _EPS, w, weight_scale=scale)

    peers: dict[str, Callable[..., Tensor]] = {"torch": separate}
    if kind is None:
        peers["torch.compile"] = compiled(lambda x, g, w, scale: reference(x, g, _EPS, w))
    return Case(
        op="norm_swiglu_linear" if gated else OP,
        label=label,
        sizes={"m": m, "n": columns, "k": k, "weight": WEIGHT_PROPERTY[kind]},
        dtype=dtype,
        inputs=partial(_inputs, m, n, k, dtype, kind),
        reference=exact,
        peers=peers,
        own=_own_paths(dtype, m, columns, k, gated, kind is not None),
        public=public,
        bytes=moved,
        flops=2 * m * n * k,
        input_bytes=moved,
    )


def _inputs(
    m: int, n: int, k: int, dtype: torch.dtype, kind: str | None, generator: torch.Generator
) -> tuple[Tensor | None, ...]:
    weight, scale = quantized_inputs(generator, n, k, dtype, kind)
    norm = torch.nn.Parameter(1 + randn(generator, k, dtype=dtype, scale=0.3), requires_grad=False)
    return randn(generator, m, k, dtype=dtype, scale=3.0), norm, weight, scale


def _own_paths(dtype: torch.dtype, m: int, n: int, k: int, gated: bool, quantized: bool) -> dict[str, Own]:
    from tp_kernels.ops.kernels import gemv

    configs = gemv.candidates(this_gpu(), dtype, m, n, k, gated, quantized)
    return {"gemv": Own(partial(_run, gated), [config._asdict() for config in configs])}


def _run(
    gated: bool, config: dict[str, Any] | None, x: Tensor, norm: Tensor, weight: Tensor, scale: Tensor | None
) -> Tensor:
    from tp_kernels.ops.kernels.gemv import Config, gemv

    out = x.new_empty(x.shape[0], weight.shape[0] // (2 if gated else 1))
    chosen = Config(**config) if config else None
    more: dict[str, Any] = {"scale": scale, "norm_weight": norm, "eps": _EPS}
    gemv(out, x, weight, None, None, None, gated, chosen, weights_ready=True, **more)
    return out
