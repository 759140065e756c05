"""``silu(gate) * up`` and its gradient, one rank's width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels import ops
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, compiled, randn, this_gpu

__all__ = ["OP", "cases", "liger_backward", "liger_forward", "liger_function", "plain_backward"]

OP = "silu_mul"
ROWS = (1, 64, 1024, 4096, 8192)


def plain_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up in plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def _liger() -> Any:
    if not torch.cuda.is_available():
        return None
    try:
        from liger_kernel.ops import swiglu
    except Exception:
        return None
    return swiglu


def liger_forward() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger's product of contiguous (gate, up); None where it is not installed or there is no GPU."""
    found = _liger()
    return None if found is None else lambda gate, up: found.swiglu_forward(gate, up)[2]


def liger_backward() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Liger's gradients from (gate, up, grad), written over gate and up; None as for ``liger_forward``."""
    found = _liger()
    return None if found is None else lambda gate, up, grad: found.swiglu_backward(gate, up, grad)


def liger_function() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Liger's differentiable product of gate and up, as its MLP has them; None as for ``liger_forward``."""
    found = _liger()
    return None if found is None else found.LigerSiLUMulFunction.apply


def _own_forward(config: dict[str, Any] | None, gate_up: Tensor, *_: Tensor) -> Tensor:
    from tp_kernels.ops.kernels import silu_mul

    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    silu_mul.silu_mul_forward(out, gate_up, silu_mul.Config(**config) if config else None)
    return out


def _own_backward(config: dict[str, Any] | None, grad: Tensor, gate_up: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    from tp_kernels.ops.kernels import silu_mul

    result = torch.empty_like(gate_up)
    silu_mul.silu_mul_backward(result, grad, gate_up, None, silu_mul.Config(**config) if config else None)
    return result.chunk(2, dim=-1)


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """Forward and backward for each number of tokens.

    Liger wants gate and up apart; it gets copies made beforehand, so that it is timed on what it was written for.
    """
    from tp_kernels.ops.kernels import silu_mul

    n = model.shard(tp).intermediate
    for m in rows or ROWS:

        def inputs(generator: torch.Generator, m: int = m) -> tuple[Tensor, ...]:
            gate_up = randn(generator, m, 2 * n, dtype=dtype)
            return gate_up, gate_up[:, :n].contiguous(), gate_up[:, n:].contiguous()

        def with_grad(generator: torch.Generator, m: int = m, inputs: Any = inputs) -> tuple[Tensor, ...]:
            return randn(generator, m, n, dtype=dtype), *inputs(generator)

        configs = [c._asdict() for c in silu_mul.candidates(this_gpu(), dtype, m, n)]
        common = {"label": f"{model.name} tp={tp} M={m} I={n}", "sizes": {"m": m, "n": n}, "dtype": dtype}
        compiled_forward, compiled_backward = compiled(ops.silu_mul_reference), compiled(plain_backward)
        peers: dict[str, Callable[..., Any]] = {
            "torch": lambda gate_up, *_: ops.silu_mul_reference(gate_up),
            "torch.compile": lambda gate_up, *_, call=compiled_forward: call(gate_up),
        }
        if (liger := liger_forward()) is not None:
            peers["liger"] = lambda _, gate, up, call=liger: call(gate, up)
        yield Case(
            op="silu_mul",
            inputs=inputs,
            reference=lambda gate_up, *_: ops.silu_mul_reference(gate_up.double()),
            peers=peers,
            own={"triton": Own(_own_forward, configs)},
            public=lambda gate_up, *_: ops.silu_mul(gate_up),
            bytes=3 * m * n * dtype.itemsize,
            input_bytes=2 * m * n * dtype.itemsize,
            **common,
        )
        peers = {
            "torch": lambda grad, gate_up, *_: plain_backward(grad, gate_up),
            "torch.compile": lambda grad, gate_up, *_, call=compiled_backward: call(grad, gate_up),
        }
        if (liger := liger_backward()) is not None:
            peers["liger"] = lambda grad, _, gate, up, call=liger: call(gate, up, grad)
        yield Case(
            op="silu_mul_backward",
            inputs=with_grad,
            reference=lambda grad, gate_up, *_: plain_backward(grad.double(), gate_up.double()),
            peers=peers,
            own={"triton": Own(_own_backward, configs)},
            bytes=5 * m * n * dtype.itemsize,
            input_bytes=3 * m * n * dtype.itemsize,
            **common,
        )
