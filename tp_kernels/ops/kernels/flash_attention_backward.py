"""Flash attention, backward, in plain Triton: the same bits every time, no atomics.

    P = exp(scale * q k^T - lse)        dP = dO v^T        dS = P * (dP - delta)        delta = rowsum(dO * O) - dlse
    dV = P^T dO                         dK = scale * dS^T q                             dQ = scale * dS k

Three launches. The first writes delta, and lse in powers of two, to a workspace padded to whole blocks, so that rows
beyond the end of a sequence weigh nothing without being masked. The second keeps one block of keys and values and walks
over the queries of all heads of the group (grouped-query attention needs no sum afterwards); the third keeps one block
of queries and walks over the keys. Scores are computed twice, which costs 7 matrix products instead of 5: the price of
a reproducible dQ. When there are fewer blocks of keys than multiprocessors, each query head gets its own program, and
the heads' fp32 shares of dK and dV are added in a fixed order. Algorithm: Dao, "FlashAttention-2" (2023).

On capability 9, 128 keys by 64 queries, 2 stages, is what fits the registers at head_dim 128: 248 with one head a
program; with several all 255 and 64 bytes of stack (72 on Triton 3.8), touched between heads but not in the loops over
queries. 64 x 64 with 4 warps, which would leave room for two programs on a multiprocessor, spills 64 bytes even with
one head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tp_kernels.ops._gpu import H100, GpuInfo, gpu_of
from tp_kernels.ops.kernels.flash_attention import LOG2_E, block_d, operand, strides_of, tma_takes
from tp_kernels.ops.kernels.flash_attention_gradients import PAD, delta_kernel, dkdv_kernel, dq_kernel
from tp_kernels.ops.kernels.launch import AotCase, launch
from tp_kernels.ops.kernels.sizes import cdiv

__all__ = ["Config", "aot_cases", "candidates", "default_config", "flash_backward"]


# Configurations -------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """``kv_*``: the dK/dV kernel, ``q_*``: the dQ kernel; ``_m`` rows of queries and ``_n`` of keys a block.

    ``split``: one program for each query head instead of one for each KV head; None decides by the number of blocks.
    """

    kv_m: int
    kv_n: int
    kv_warps: int
    kv_stages: int
    q_m: int
    q_n: int
    q_warps: int
    q_stages: int
    tma: bool = True
    split: bool | None = None


def _shared(info: GpuInfo, config: Config, head_dim: int) -> int:
    """Bytes of shared memory of the larger kernel, generously: kept tiles, the ring of the others, layout changes."""

    def kernel(kept: int, moving: int, stages: int) -> int:
        ring = stages if info.has_tma else max(1, stages - 1)
        return (2 * kept + 2 * ring * moving) * block_d(head_dim) * 2 + (2048 if info.has_tma else 16384)

    return max(
        kernel(config.kv_n, config.kv_m, config.kv_stages),
        kernel(config.q_m, config.q_n, config.q_stages),
    )


def default_config(
    info: GpuInfo, dtype: torch.dtype, head_dim: int, max_q: int, max_k: int, causal: bool = True
) -> Config:
    """What fits registers and shared memory for sure."""
    small = Config(32, 32, 4, 1, 32, 32, 4, 1, tma=False)
    if dtype == torch.float32:
        return small
    if info.hopper:
        wanted = Config(64, 128, 8, 2, 128, 64, 8, 3) if head_dim <= 128 else Config(64, 64, 8, 2, 64, 64, 8, 2)
    elif head_dim > 128:
        wanted = Config(32, 64, 8, 1, 64, 32, 8, 2, tma=False)
    else:
        wanted = Config(*((64, 64, 8, 2) if head_dim > 64 else (32, 64, 4, 2)), 64, 64, 8, 2, tma=False)
    return wanted if _shared(info, wanted, head_dim) <= info.max_shared else small


def candidates(
    info: GpuInfo, dtype: torch.dtype, head_dim: int, max_q: int, max_k: int, causal: bool = True
) -> list[Config]:
    """Configurations worth measuring, the default first."""
    default = default_config(info, dtype, head_dim, max_q, max_k, causal)
    found = [default]
    if dtype != torch.float32:
        found.append(default._replace(split=True))
        if info.hopper and head_dim <= 128:
            wide = (128, 128, 8, 2) if head_dim <= 64 else (64, 128, 8, 2)
            found += [
                default._replace(tma=False),
                Config(64, 128, 8, 3, 128, 64, 8, 2),
                Config(*wide, 128, 128, 8, 2),
                Config(64, 128, 8, 2, 64, 64, 4, 2),
                Config(64, 64, 4, 2, 64, 64, 4, 2),
            ]
        elif not info.hopper:
            found.append(default._replace(q_m=128, q_stages=2))
    return [c for i, c in enumerate(found) if _shared(info, c, head_dim) <= info.max_shared and c not in found[:i]]


# Launcher -------------------------------------------------------------------------------------------------------------


def flash_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int,
    max_k: int,
    grad_lse: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write the gradients of ``flash_forward`` to ``dq``, ``dk`` and ``dv``.

    Args:
        dq, dk, dv: like ``q``, ``k``, ``v``; last dimension dense.
        grad_out: gradient of ``out``, last dimension dense.
        q, k, v, out, lse: of the forward pass; ``lse`` contiguous.
        scale, causal, window, cu_q, cu_k, max_q, max_k: as there.
        grad_lse: gradient of ``lse``, contiguous; None for zeros.
        config: None for the default.
    """
    varlen = cu_q is not None
    batch = cu_q.shape[0] - 1 if varlen else q.shape[0]
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    group = heads // kv_heads
    info = gpu_of(q)
    # A table's configuration may be that of heads half as wide.
    if config is None or _shared(info, config, head_dim) > info.max_shared:
        config = default_config(info, q.dtype, head_dim, max_q, max_k, causal)
    windowed = window is not None and window < max_k
    depth = block_d(head_dim)
    tma = config.tma and info.has_tma and not varlen and tma_takes(q, k, v, grad_out)
    padded = cdiv(max_q, PAD) * PAD
    rows_total = cdiv(q.shape[0] + batch * PAD, PAD) * PAD if varlen else batch * padded
    sums2, delta = (torch.empty(heads, rows_total, dtype=torch.float32, device=q.device) for _ in range(2))
    shape: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": depth, "VARLEN": varlen}
    launch(
        delta_kernel,
        (batch * heads, padded // PAD),
        out,
        grad_out,
        lse,
        grad_lse,
        sums2,
        delta,
        cu_q,
        heads,
        max_q,
        padded,
        rows_total,
        *strides_of(out, varlen),
        *strides_of(grad_out, varlen),
        *((0, lse.stride(0)) if varlen else lse.stride()[:2]),
        BLOCK=PAD,
        HAS_GRAD_LSE=grad_lse is not None,
        num_warps=8,
        **shape,
    )

    shape |= {"CAUSAL": causal, "WINDOW": windowed, "TMA": tma}
    shape["PRECISION"] = "ieee" if q.dtype == torch.float32 else "tf32"
    scales = (scale * LOG2_E, scale, window if windowed else 0)
    blocks = cdiv(max_k, config.kv_n)
    split = batch * kv_heads * blocks < info.num_sms if config.split is None else config.split
    split = split and group > 1
    if split:
        # Rows behind the last packed sequence are nobody's to write, and their gradients are 0.
        allocate = torch.zeros if varlen else torch.empty
        shares = allocate(2, *k.shape[:1], heads, *k.shape[2:], dtype=torch.float32, device=k.device)
        dk_out, dv_out = shares[0], shares[1]
    else:
        dk_out, dv_out = dk, dv
    each = 1 if split else group
    launch(
        dkdv_kernel,
        (batch * (heads // each), blocks),
        operand(q, config.kv_m, depth, tma),
        operand(k, config.kv_n, depth, tma),
        operand(v, config.kv_n, depth, tma),
        operand(grad_out, config.kv_m, depth, tma),
        sums2,
        delta,
        dk_out,
        dv_out,
        cu_q,
        cu_k,
        *scales,
        heads,
        group,
        each,
        max_q,
        max_k,
        padded,
        rows_total,
        *strides_of(q, varlen),
        *strides_of(k, varlen),
        *strides_of(v, varlen),
        *strides_of(grad_out, varlen),
        *strides_of(dk_out, varlen),
        *strides_of(dv_out, varlen),
        BLOCK_M=config.kv_m,
        BLOCK_N=config.kv_n,
        num_warps=config.kv_warps,
        num_stages=config.kv_stages,
        **shape,
    )
    if split:
        # [.., Hkv * group, ..] in the head dimension, which is the second one in both layouts.
        dk.copy_(dk_out.unflatten(1, (kv_heads, group)).sum(2))
        dv.copy_(dv_out.unflatten(1, (kv_heads, group)).sum(2))
    launch(
        dq_kernel,
        (batch * heads, cdiv(max_q, config.q_m)),
        operand(q, config.q_m, depth, tma),
        operand(k, config.q_n, depth, tma),
        operand(v, config.q_n, depth, tma),
        operand(grad_out, config.q_m, depth, tma),
        sums2,
        delta,
        dq,
        cu_q,
        cu_k,
        *scales,
        heads,
        group,
        max_q,
        max_k,
        padded,
        rows_total,
        *strides_of(q, varlen),
        *strides_of(k, varlen),
        *strides_of(v, varlen),
        *strides_of(grad_out, varlen),
        *strides_of(dq, varlen),
        BLOCK_M=config.q_m,
        BLOCK_N=config.q_n,
        num_warps=config.q_warps,
        num_stages=config.q_stages,
        **shape,
    )


# Ahead-of-time check --------------------------------------------------------------------------------------------------


def _aot_call(head_dim: int, causal: bool, window: int | None, varlen: bool, config: Config | None = None) -> None:
    def tokens(heads: int) -> Tensor:
        x = torch.empty(2, 1024, heads, head_dim, dtype=torch.bfloat16, device="meta")
        return x.flatten(0, 1) if varlen else x.transpose(1, 2)

    q, k, v, out, grad_out = tokens(32), tokens(8), tokens(8), tokens(32), tokens(32)
    cu = torch.empty(3, dtype=torch.int32, device="meta") if varlen else None
    lse = torch.empty((32, 2048) if varlen else (2, 32, 1024), device="meta")
    flash_backward(
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        scale=1 / math.sqrt(head_dim),
        causal=causal,
        window=window,
        cu_q=cu,
        cu_k=cu,
        max_q=1024,
        max_k=1024,
        config=config,
    )


def aot_cases() -> list[AotCase]:
    """Descriptors and pointers, causal and with a window; three launches a case."""
    whole = default_config(H100, torch.bfloat16, 128, 1024, 1024)._replace(split=False)
    return [
        # What is spilled is loaded between heads, not in the loops over queries.
        AotCase(
            "flash_backward_d128_causal",
            lambda: _aot_call(128, True, None, False, whole),
            (90,),
            max_spill_bytes=96,
        ),
        AotCase("flash_backward_d128_sm80", lambda: _aot_call(128, True, None, False), (80,), max_spill_bytes=16),
        AotCase("flash_backward_d128_varlen", lambda: _aot_call(128, True, 300, True), (90,), tma=False),
    ]
