"""RMSNorm, alone and with the residual addition, and the backward; models with QK-norm add the norm of their heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels import ops
from tp_kernels.ops.kernels import norm as kernels
from tp_kernels.ops.kernels import norm_backward as backward_kernels
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, compiled, randn, this_gpu

__all__ = ["OP", "cases"]

OP = "rms_norm"
EPS = 1e-5
ROWS = (1, 16, 64, 512, 4096, 8192)
BACKWARD_ROWS = (1024, 4096, 8192)
# A backward keeps the graph of its forward with each set of inputs; those of at most three sets exist before timing.
_THIRD_OF_TWICE_L2 = 36 << 20

Peer = Callable[..., Any]


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """Rows of the hidden size (every rank has all of it), then this rank's heads where the model normalises them."""
    local = model.shard(tp)
    for m in rows or ROWS:
        yield _forward(model.name, dtype, (m, model.hidden), False)
        yield _forward(model.name, dtype, (m, model.hidden), True)
        if model.qk_norm:
            yield _forward(model.name, dtype, (m, local.heads, model.head_dim), False)
    for m in rows or BACKWARD_ROWS:
        yield _backward(model.name, dtype, (m, model.hidden), False)
        yield _backward(model.name, dtype, (m, model.hidden), True)
        if model.qk_norm:
            yield _backward(model.name, dtype, (m, local.heads, model.head_dim), False)


def _norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, residual: bool, generator: torch.Generator) -> tuple:
    """x, (residual,) weight; heads are a slice of a row that holds keys and values too."""
    if len(shape) == 3:
        x = randn(generator, shape[0], 2 * shape[1], shape[2], dtype=dtype)[:, : shape[1]]
    else:
        x = randn(generator, *shape, dtype=dtype)
    weight = (randn(generator, shape[-1], dtype=torch.float32) * 0.1 + 1).to(dtype)
    return (x, randn(generator, *shape, dtype=dtype), weight) if residual else (x, weight)


def _forward(model: str, dtype: torch.dtype, shape: tuple[int, ...], residual: bool) -> Case:
    h = shape[-1]
    elements = torch.Size(shape).numel()
    m = elements // h
    moved = (4 if residual else 2) * elements * dtype.itemsize
    return Case(
        op="add_rms_norm" if residual else "rms_norm",
        label=f"{model} {' x '.join(map(str, shape))}",
        sizes={"m": m, "h": h},
        dtype=dtype,
        inputs=partial(_norm_inputs, shape, dtype, residual),
        reference=_add_reference if residual else _reference,
        peers=_forward_peers(residual),
        own={"triton": Own(_run_add if residual else _run, _configs(kernels.candidates(this_gpu(), dtype, m, h)))},
        public=partial(ops.add_rms_norm if residual else ops.rms_norm, eps=EPS),
        bytes=moved,
        input_bytes=moved // 2,
    )


def _configs(found: Sequence[Any]) -> list[dict[str, Any]]:
    return [config._asdict() for config in found]


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm_reference(x.double(), weight.double(), EPS)


def _add_reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return _reference(summed, weight), summed.double()


def _run(config: dict[str, Any] | None, x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    kernels.rms_norm(out, x, weight, EPS, config=kernels.Config(**config) if config else None)
    return out


def _run_add(config: dict[str, Any] | None, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out, summed = x.new_empty(x.shape), x.new_empty(x.shape)
    chosen = kernels.Config(**config) if config else None
    kernels.add_rms_norm(out, summed, x, residual, weight, EPS, config=chosen)
    return out, summed


def _fused(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _fused_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return _fused(summed, weight), summed


def _forward_peers(residual: bool) -> dict[str, Peer]:
    if residual:
        peers: dict[str, Peer] = {"torch": partial(ops.add_rms_norm_reference, eps=EPS), "F.rms_norm": _fused_add}
    else:
        peers = {"torch": partial(ops.rms_norm_reference, eps=EPS), "F.rms_norm": _fused}
    if torch.cuda.is_available():
        peers["torch.compile"] = compiled(peers["torch"])
        peers |= _liger(residual) | _quack(residual)
    return peers


def _liger(residual: bool) -> dict[str, Peer]:
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except Exception:
        return {}
    if residual:
        return {"liger": lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)}
    return {"liger": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)}


def _quack(residual: bool) -> dict[str, Peer]:
    try:
        from quack.rmsnorm import rmsnorm
    except Exception:
        return {}
    if residual:
        return {"quack": lambda x, r, w: rmsnorm(x, w, residual=r, eps=EPS, prenorm=True)}
    return {"quack": lambda x, w: rmsnorm(x.reshape(-1, x.shape[-1]), w, eps=EPS).view(x.shape)}


# Backward -------------------------------------------------------------------------------------------------------------


def _backward(model: str, dtype: torch.dtype, shape: tuple[int, ...], residual: bool) -> Case:
    h = shape[-1]
    elements = torch.Size(shape).numel()
    m = elements // h
    tensors = 2 + int(residual)
    found = backward_kernels.candidates(this_gpu(), dtype, m, h, int(residual))
    return Case(
        op="rms_norm_backward",
        label=f"{model} {' x '.join(map(str, shape))}" + (" + gradient of the sum" if residual else ""),
        sizes={"m": m, "h": h, "residual": int(residual)},
        dtype=dtype,
        inputs=partial(_backward_inputs, shape, dtype, residual),
        reference=_backward_reference,
        peers=_backward_peers(),
        own={"triton": Own(_run_backward, _configs(found))},
        public=_through_graph("op", _add_nothing if residual else partial(ops.rms_norm, eps=EPS)),
        bytes=(tensors + 1) * elements * dtype.itemsize,
        input_bytes=max(tensors * elements * dtype.itemsize, _THIRD_OF_TWICE_L2),
        extra={"grad": True},
    )


def _backward_inputs(shape: tuple[int, ...], dtype: torch.dtype, residual: bool, generator: torch.Generator) -> tuple:
    """grad, x, weight, rstd, and the gradient that arrives at the sum."""
    x, weight = _norm_inputs(shape, dtype, False, generator)
    rstd = (x.float().square().mean(-1) + EPS).rsqrt().flatten()
    inputs = randn(generator, *shape, dtype=dtype), x, weight, rstd
    return (*inputs, randn(generator, *shape, dtype=dtype)) if residual else inputs


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, sum_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = None if sum_grad is None else sum_grad.double()
    return _through_graph("", partial(ops.rms_norm_reference, eps=EPS))(
        grad.double(), x.double(), weight.double(), rstd, wide
    )


def _run_backward(
    config: dict[str, Any] | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    sum_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    chosen = backward_kernels.Config(**config) if config else None
    backward_kernels.rms_norm_backward(dx, dweight, grad, x, weight, rstd, sum_grad, chosen)
    return dx, dweight


def _add_nothing(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` whose sum is ``x``: its backward takes the gradient of the sum along."""
    return ops.add_rms_norm(x, torch.zeros_like(x), weight, EPS)


def _through_graph(name: str, norm: Peer) -> Peer:
    """The backward of ``norm`` by autograd; its forward ran with the first call for each input."""

    def call(
        grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, sum_grad: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        graphs = x.__dict__.setdefault("graphs", {})
        if name not in graphs:
            with torch.enable_grad():
                leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
                graphs[name] = norm(*leaves), leaves
        out, leaves = graphs[name]
        if isinstance(out, tuple):
            return torch.autograd.grad(out, leaves, (grad, sum_grad), retain_graph=True)
        dx, dweight = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        return dx if sum_grad is None else dx + sum_grad, dweight

    return call


def _backward_peers() -> dict[str, Peer]:
    return {name: _through_graph(name, norm) for name, norm in _forward_peers(False).items()}
