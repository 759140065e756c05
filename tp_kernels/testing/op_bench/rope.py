"""Rotation of queries and keys, and its gradient, at the layer's training shapes: q and k are views of a projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tp_kernels import ops
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, compiled, randn, this_gpu

__all__ = ["OP", "cases", "liger_rope", "rotary_tables"]

OP = "rope"
ROWS = (64, 1024, 4096, 16384)


def rotary_tables(positions: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 (cos, sin) [positions, dim] of Llama's angles."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angles = (torch.arange(positions, device=device).unsqueeze(-1) * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def liger_rope(backward: bool = False) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Liger's rotation of (q, k) by [T, D] or [B, T, D] tables; None where it is not installed or there is no GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        from liger_kernel.ops.rope import rope_backward, rope_forward
    except Exception:
        return None
    function = rope_backward if backward else rope_forward

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if cos.dim() == 2:
            cos, sin = cos[None], sin[None]
        q, k, *_ = function(q, k, cos, sin)
        return q, k

    return call


def _own(inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(config: dict[str, Any] | None, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from tp_kernels.ops.kernels import rope

        outs = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k)]
        rope.rope(*outs, q, k, cos, sin, inverse=inverse, config=rope.Config(**config) if config else None)
        return tuple(outs)

    return run


def _back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return ops.apply_rope_reference(q, k, cos, -sin)


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """Forward and backward for one sequence of each number of tokens."""
    from tp_kernels.ops.kernels import rope

    local = model.shard(tp)
    heads, kv_heads, dim = local.heads, local.kv_heads, local.head_dim
    for m in rows or ROWS:
        sizes = {"m": m, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}

        def views(generator: torch.Generator, m: int = m) -> tuple[Tensor, ...]:
            qkv = randn(generator, 1, m, heads + 2 * kv_heads, dim, dtype=dtype).transpose(1, 2)
            q, k, _ = qkv.split((heads, kv_heads, kv_heads), dim=1)
            return q, k, *rotary_tables(m, dim, qkv.device)

        def gradients(generator: torch.Generator, m: int = m) -> tuple[Tensor, ...]:
            q, k = (randn(generator, 1, h, m, dim, dtype=dtype) for h in (heads, kv_heads))
            return q, k, *rotary_tables(m, dim, q.device)

        configs = [c._asdict() for c in rope.candidates(this_gpu(), dtype, **sizes)]
        for op, inputs, plain, public in (
            ("rope", views, ops.apply_rope_reference, ops.apply_rope),
            ("rope_backward", gradients, _back, None),
        ):
            inverse = op == "rope_backward"
            peers = {"torch": plain, "torch.compile": compiled(plain)}
            liger = liger_rope(inverse)
            if liger is not None:
                peers["liger"] = liger
            yield Case(
                op=op,
                label=f"{model.name} tp={tp} M={m}",
                sizes=sizes,
                dtype=dtype,
                inputs=inputs,
                reference=lambda *xs, plain=plain: plain(*(x.double() for x in xs)),
                peers=peers,
                own={"triton": Own(_own(inverse), configs)},
                public=public,
                # The tables (8 bytes for 2 elements of each token, shared by all heads) stay in L2.
                bytes=2 * m * (heads + kv_heads) * dim * dtype.itemsize,
            )
