"""The gated MLP in training: the matmul in front of the gate's backward, and a whole step forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels import ops
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, compiled, randn, this_gpu
from tp_kernels.testing.op_bench.silu_mul import liger_backward, liger_forward, liger_function, plain_backward

__all__ = ["OP", "cases"]

OP = "swiglu_mlp"
ROWS = (1024, 4096, 16384)

Step = Callable[..., tuple[Tensor, ...]]


# The matmul in front of the gate's backward: (gradient of gate, gradient of up, silu(gate) * up) ----------------------


def _parts(gate_up_gradient: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *gate_up_gradient.chunk(2, dim=-1), hidden


def _unfused(grad_y: Tensor, w_down: Tensor, gate_up: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """What the op falls back to: cuBLAS, then the elementwise kernel."""
    from tp_kernels.ops.swiglu import silu_mul_gradient

    return _parts(*silu_mul_gradient(grad_y @ w_down, gate_up, True))


def _plain(grad_y: Tensor, w_down: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
    return *plain_backward(grad_y @ w_down, gate_up), ops.silu_mul_reference(gate_up)


def _fused(config: dict[str, Any] | None, grad_y: Tensor, w_down: Tensor, gate_up: Tensor, *_: Tensor) -> Any:
    from tp_kernels.ops.kernels import swiglu_backward

    result, hidden = torch.empty_like(gate_up), gate_up.new_empty(gate_up.shape[0], w_down.shape[1])
    chosen = swiglu_backward.Config(**config) if config else None
    swiglu_backward.dswiglu_matmul(result, hidden, grad_y, w_down, gate_up, chosen)
    return _parts(result, hidden)


def _liger_matmul() -> Step | None:
    forward, backward = liger_forward(), liger_backward()
    if forward is None or backward is None:
        return None

    def run(grad_y: Tensor, w_down: Tensor, _: Tensor, gate: Tensor, up: Tensor, __: Tensor) -> tuple[Tensor, ...]:
        hidden = forward(gate, up)
        return *backward(gate, up, grad_y @ w_down), hidden

    return run


def _quack_matmul() -> Step | None:
    """quack's fused kernel, for gate and up element by element in turns; None where it is not installed."""
    if not torch.cuda.is_available():
        return None
    try:
        from quack.gemm_interface import gemm_dgated
    except Exception:
        return None

    def run(grad_y: Tensor, w_down: Tensor, _: Tensor, __: Tensor, ___: Tensor, turns: Tensor) -> tuple[Tensor, ...]:
        # Its tuner would compile dozens of configurations; this is its default one.
        result, hidden = gemm_dgated(grad_y, w_down, turns, activation="swiglu", tuned=False)
        return result[:, 0::2], result[:, 1::2], hidden

    return run


def _matmul_case(model: Shapes, tp: int, dtype: torch.dtype, m: int) -> Case:
    from tp_kernels.ops.kernels import swiglu_backward

    n, k = model.shard(tp).intermediate, model.hidden

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        grad_y, gate_up = randn(generator, m, k, dtype=dtype), randn(generator, m, 2 * n, dtype=dtype)
        w_down = randn(generator, k, n, dtype=dtype, scale=n**-0.5)
        gate, up = gate_up[:, :n].contiguous(), gate_up[:, n:].contiguous()
        return grad_y, w_down, gate_up, gate, up, torch.stack([gate, up], dim=-1).view(m, 2 * n)

    compiled_plain = compiled(_plain)
    peers: dict[str, Step] = {
        "torch": _unfused,
        "torch.compile": lambda grad_y, w_down, gate_up, *_: compiled_plain(grad_y, w_down, gate_up),
    }
    for name, peer in (("liger", _liger_matmul()), ("quack", _quack_matmul())):
        if peer is not None:
            peers[name] = peer
    configs = [c._asdict() for c in swiglu_backward.candidates(this_gpu(), dtype, m, n, k)]
    return Case(
        op="swiglu_backward",
        label=f"{model.name} tp={tp} M={m} I={n} H={k}",
        sizes={"m": m, "n": n, "k": k},
        dtype=dtype,
        inputs=inputs,
        reference=lambda *xs: _plain(*(x.double() for x in xs[:3])),
        peers=peers,
        own={"triton": Own(_fused, configs)},
        bytes=(m * k + k * n + 5 * m * n) * dtype.itemsize,
        flops=2 * m * n * k,
    )


# A step: (y, gradient of x, of w_gate_up, of w_down) ------------------------------------------------------------------


def _step(forward: Callable[..., Tensor]) -> Step:
    def run(x: Tensor, w_gate_up: Tensor, w_down: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, w_gate_up, w_down)]
        with torch.enable_grad():
            y = forward(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad_y)

    return run


def _fused_step(
    config: dict[str, Any] | None, x: Tensor, w_gate_up: Tensor, w_down: Tensor, grad_y: Tensor
) -> tuple[Tensor, ...]:
    """The op with its fused backward, whatever the table says of it."""
    from tp_kernels.ops._gpu_linear import gpu_swiglu_linear
    from tp_kernels.ops.kernels import swiglu_backward

    hidden, gate_up = gpu_swiglu_linear(x, w_gate_up, None, True)
    y = F.linear(hidden, w_down)
    gradient, hidden = torch.empty_like(gate_up), torch.empty_like(hidden)
    swiglu_backward.dswiglu_matmul(gradient, hidden, grad_y, w_down, gate_up)
    return y, gradient @ w_gate_up, gradient.t() @ x, grad_y.t() @ hidden


def _liger_step() -> Step | None:
    """Liger's MLP: gate and up projected apart, its function for the product, PyTorch's matmuls."""
    product = liger_function()
    if product is None:
        return None

    def forward(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        gate, up = w_gate_up.chunk(2)
        return F.linear(product(F.linear(x, gate), F.linear(x, up)), w_down)

    return _step(forward)


def _step_case(model: Shapes, tp: int, dtype: torch.dtype, m: int) -> Case:
    n, k = model.shard(tp).intermediate, model.hidden

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        x, grad_y = randn(generator, m, k, dtype=dtype), randn(generator, m, k, dtype=dtype)
        w_gate_up = randn(generator, 2 * n, k, dtype=dtype, scale=k**-0.5)
        return x, w_gate_up, randn(generator, k, n, dtype=dtype, scale=n**-0.5), grad_y

    peers = {"torch": _step(ops.swiglu_mlp_reference), "torch.compile": _step(compiled(ops.swiglu_mlp_reference))}
    if (liger := _liger_step()) is not None:
        peers["liger"] = liger
    return Case(
        op="swiglu_mlp",
        label=f"{model.name} tp={tp} M={m} I={n} H={k}",
        sizes={"m": m, "n": n, "k": k},
        dtype=dtype,
        inputs=inputs,
        reference=lambda *xs: _step(ops.swiglu_mlp_reference)(*(x.double() for x in xs)),
        peers=peers,
        own={"triton": Own(_fused_step)},
        public=_step(ops.swiglu_mlp),
        bytes=(4 * m * k + 6 * n * k) * dtype.itemsize,
        flops=18 * m * n * k,
        extra={"grad": True},
    )


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """Both for each number of tokens."""
    for m in rows or ROWS:
        yield _matmul_case(model, tp, dtype, m)
        yield _step_case(model, tp, dtype, m)
