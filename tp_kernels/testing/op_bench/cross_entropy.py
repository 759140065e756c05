"""Cross entropy over one rank's words: the forward, the backward, and both as a training step runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels import ops
from tp_kernels.ops.kernels import cross_entropy as kernels
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, compiled, randn, this_gpu

__all__ = ["OP", "cases"]

OP = "cross_entropy"
ROWS = (16, 1024, 4096, 8192)

Peer = Callable[..., Any]


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """Rows of this rank's words, with targets among them."""
    v, info = model.shard(tp).vocab, this_gpu()
    for m in rows or ROWS:
        size = m * v * dtype.itemsize
        common = {"label": f"{model.name} tp={tp} {m} x {v}", "sizes": {"m": m, "v": v}, "dtype": dtype}
        yield Case(
            op="cross_entropy",
            inputs=partial(_inputs, m, v, dtype),
            reference=lambda logits, targets: F.cross_entropy(logits.float(), targets),
            peers=_peers(_torch, None),
            own={"triton": Own(_run_forward, _configs(kernels.candidates(info, dtype, m, v)))},
            public=ops.cross_entropy,
            bytes=size,
            input_bytes=size,
            **common,
        )
        yield Case(
            op="cross_entropy_backward",
            inputs=partial(_backward_inputs, m, v, dtype),
            reference=lambda logits, *rest: _torch_backward(logits.float(), *rest),
            peers=_peers(_torch_backward, None, liger=False),
            own={"triton": Own(_run_backward, _configs(kernels.backward_candidates(info, dtype, m, v)))},
            public=ops.cross_entropy_backward,
            bytes=2 * size,
            input_bytes=size,
            **common,
        )
        yield Case(
            op="cross_entropy_fwd_bwd",
            inputs=partial(_inputs, m, v, dtype),
            reference=lambda logits, targets: _step(F.cross_entropy, logits.float(), targets),
            peers=_peers(partial(_step, _torch), _step),
            own={
                "triton": Own(lambda config, *inputs: _step(ops.cross_entropy, *inputs), [{}]),
                "triton in place": Own(
                    lambda config, *inputs: _step(partial(ops.cross_entropy, inplace_backward=True), *inputs), [{}]
                ),
            },
            public=partial(_step, ops.cross_entropy),
            bytes=3 * size,
            input_bytes=size,
            extra={"grad": True},
            **common,
        )


def _configs(found: Sequence[Any]) -> list[dict[str, Any]]:
    return [config._asdict() for config in found]


def _inputs(m: int, v: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = randn(generator, m, v, dtype=dtype, scale=2.0)
    return logits, torch.randint(0, v, (m,), generator=generator, device=generator.device)


def _backward_inputs(m: int, v: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """logits, targets, maximum, total, gradient of each row's loss."""
    logits, targets = _inputs(m, v, dtype, generator)
    maximum = logits.amax(-1).float()
    total = (logits - maximum.to(dtype)[:, None]).exp_().sum(-1, dtype=torch.float32)
    return logits, targets, maximum, total, torch.full_like(maximum, 1 / m)


def _torch(logits: Tensor, targets: Tensor) -> Tensor:
    return ops.cross_entropy_reference(logits, targets)


def _torch_backward(logits: Tensor, *rows: Tensor) -> Tensor:
    return ops.cross_entropy_backward_reference(logits, *rows)


def _step(loss: Peer, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = loss(leaf, targets)
        (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def _run_forward(config: dict[str, Any] | None, logits: Tensor, targets: Tensor) -> Tensor:
    rows = [torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(3)]
    kernels.cross_entropy_forward(*rows, logits, targets, -100, kernels.Config(**config) if config else None)
    return rows[0].mean()


def _run_backward(config: dict[str, Any] | None, logits: Tensor, *rows: Tensor) -> Tensor:
    out = torch.empty_like(logits)
    chosen = kernels.BackwardConfig(**config) if config else None
    kernels.cross_entropy_backward(out, logits, *rows, 0, -100, chosen)
    return out


def _peers(torchs: Peer, step: Peer | None, liger: bool = True) -> dict[str, Peer]:
    peers: dict[str, Peer] = {"torch": torchs}
    if not torch.cuda.is_available():
        return peers
    fast = compiled(_torch if step is not None else torchs)
    peers["torch.compile"] = fast if step is None else partial(step, fast)
    ligers = _liger() if liger else None
    if ligers is not None:
        # It overwrites the logits with their gradient; every competitor's check has inputs of its own.
        peers["liger"] = ligers if step is None else partial(step, ligers)
    return peers


def _liger() -> Peer | None:
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except Exception:
        return None
    return liger_cross_entropy
