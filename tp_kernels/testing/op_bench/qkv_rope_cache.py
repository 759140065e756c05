"""From projection to KV cache: a decode step of M rows up to 256 tokens, a prompt of one row above."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tp_kernels import ops
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, compiled, randn, this_gpu
from tp_kernels.testing.op_bench.rope import liger_rope, rotary_tables

__all__ = ["OP", "cases"]

OP = "qkv_rope_cache"
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
DECODE_ROWS = 256
DECODE_LENGTH = 64  # only the written slots cost anything, so a short cache stands for a long one

Result = tuple[Tensor, Tensor, Tensor]


def _call(function: Callable[..., Tensor], heads: int, kv_heads: int) -> Callable[..., Result]:
    """``function`` as the benchmark calls it: inputs in, queries and both caches out."""

    def call(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        lengths: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> Result:
        q = function(qkv, cos, sin, lengths, k_cache, v_cache, heads, kv_heads, q_norm, k_norm)
        return q, k_cache, v_cache

    return call


def _exact(plain: Callable[..., Result], *inputs: Tensor | None) -> Result:
    # Copies even in float64: the caches are written.
    return plain(*(x.to(torch.float64, copy=True) if x is not None and x.is_floating_point() else x for x in inputs))


def _liger(
    rope: Callable[..., tuple[Tensor, Tensor]],
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: int,
    kv_heads: int,
    *_: Any,
) -> Tensor:
    """Liger's rotation, then the two writes by index."""
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads), dim=2)
    slots = lengths.unsqueeze(-1) + torch.arange(tokens, device=qkv.device)
    q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos[slots], sin[slots])
    row = torch.arange(batch, device=qkv.device).unsqueeze(-1)
    k_cache[row, :, slots] = k.transpose(1, 2)
    v_cache[row, :, slots] = v
    return q


def _own(config: dict[str, Any] | None, *inputs: Any, heads: int) -> Result:
    from tp_kernels.ops.kernels import qkv_rope

    qkv, _, _, _, k_cache, v_cache, q_norm, k_norm = inputs
    q = qkv.new_empty(qkv.shape[0], qkv.shape[1], heads, k_cache.shape[3])
    choice = qkv_rope.Config(**config) if config else None
    qkv_rope.qkv_rope(q, *inputs[:6], q_norm=q_norm, k_norm=k_norm, config=choice)
    return q.transpose(1, 2), k_cache, v_cache


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """One case for each number of tokens; QK-norm where the model has it."""
    from tp_kernels.ops.kernels import qkv_rope

    local = model.shard(tp)
    heads, kv_heads, dim = local.heads, local.kv_heads, local.head_dim
    for m in rows or ROWS:
        decode = m <= DECODE_ROWS
        batch, tokens = (m, 1) if decode else (1, m)
        max_len = DECODE_LENGTH if decode else m
        sizes = {"m": m, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}

        def inputs(
            generator: torch.Generator, batch: int = batch, tokens: int = tokens, max_len: int = max_len
        ) -> tuple[Any, ...]:
            device = generator.device
            qkv = randn(generator, batch, tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
            lengths = torch.randint(0, max_len - tokens + 1, (batch,), generator=generator, device=device)
            caches = [torch.zeros(batch, kv_heads, max_len, dim, dtype=dtype, device=device) for _ in range(2)]
            norms = [randn(generator, dim, dtype=dtype) if model.qk_norm else None for _ in range(2)]
            return qkv, *rotary_tables(max_len, dim, device), lengths, *caches, *norms

        plain = _call(ops.qkv_rope_cache_reference, heads, kv_heads)
        peers = {"torch": plain, "torch.compile": compiled(plain)}
        liger = liger_rope()
        if liger is not None and not model.qk_norm:
            peers["liger"] = _call(partial(_liger, liger), heads, kv_heads)
        configs = [c._asdict() for c in qkv_rope.candidates(this_gpu(), dtype, **sizes)]
        yield Case(
            op=OP,
            label=f"{model.name} tp={tp} B={batch} T={tokens}",
            sizes=sizes,
            dtype=dtype,
            inputs=inputs,
            reference=partial(_exact, plain),
            peers=peers,
            own={"triton": Own(partial(_own, heads=heads), configs)},
            public=_call(ops.qkv_rope_cache, heads, kv_heads),
            # Read once, written once; the rotary table stays in L2.
            bytes=2 * m * (heads + 2 * kv_heads) * dim * dtype.itemsize,
        )
