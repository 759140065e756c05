"""Rotary embedding of queries and keys in one launch; also the rotation and the tile choice that ``qkv_rope`` shares.

A program takes ``block_t`` tokens x ``block_h`` heads as one tile [heads, tokens, D/2] for each half of the head, so
that all its loads (16 bytes a thread) are in flight before the first is needed, and a token's cosines serve several
heads. Blocks of heads are the fastest axis of the grid: neighbours share the table rows, and a token's memory, in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = ["Config", "aot_cases", "candidates", "default_config", "load_rotation", "rope", "rotate"]

# Two loads of each half for each of 128 threads: 64-72 registers, so about 30 warps of a multiprocessor load at once.
MAX_VECTORS = 256


class Config(NamedTuple):
    """Tokens and heads of a tile (powers of two), and warps a program."""

    block_t: int
    block_h: int
    num_warps: int


def default_config(
    info: GpuInfo, dtype: torch.dtype, *, m: int, heads: int, kv_heads: int, head_dim: int, parts: int = 2
) -> Config:
    """Tiles for ``m`` tokens: one token each until that gives every multiprocessor a program, then larger.

    Args:
        info: the GPU.
        dtype: of the heads.
        m: tokens of all rows.
        heads, kv_heads: numbers of heads.
        head_dim: size of a head.
        parts: 2 for q and k, 3 when v has programs too.
    """
    block_h = 4 if kv_heads >= 4 else 2
    groups = cdiv(heads, block_h) + (parts - 1) * cdiv(kv_heads, block_h)
    block_t = 1
    while (
        _vectors(2 * block_t * block_h, head_dim, dtype) <= MAX_VECTORS
        and cdiv(m, 2 * block_t) * groups >= info.num_sms
    ):
        block_t *= 2
    return Config(block_t, block_h, _warps(block_t * block_h, head_dim, dtype))


def _vectors(rows: int, head_dim: int, dtype: torch.dtype) -> int:
    """16-byte loads of one half of ``rows`` heads."""
    return rows * next_power_of_2(head_dim // 2) * dtype.itemsize // 16


def _warps(rows: int, head_dim: int, dtype: torch.dtype) -> int:
    """Warps that give each thread two 16-byte loads of each half, or one where the tile is small; at most four."""
    return min(4, max(1, _vectors(rows, head_dim, dtype) // 64))


def candidates(
    info: GpuInfo, dtype: torch.dtype, *, m: int, heads: int, kv_heads: int, head_dim: int, parts: int = 2
) -> list[Config]:
    """Configurations worth measuring; the default is the first."""
    found = [default_config(info, dtype, m=m, heads=heads, kv_heads=kv_heads, head_dim=head_dim, parts=parts)]
    for block_t in (1, 4, 8, 16):
        for block_h in (2, 4, 8):
            too_big = _vectors(block_t * block_h, head_dim, dtype) > 2 * MAX_VECTORS
            if (block_t > 1 and block_t > m) or block_h > max(heads, 2) or too_big:
                continue
            config = Config(block_t, block_h, _warps(block_t * block_h, head_dim, dtype))
            if config not in found:
                found.append(config)
    return found[:12]


@triton.jit
def load_rotation(cos, sin, cos_rows, sin_rows, inside, live, d, in_half):
    """fp32 cosines and sines [tokens, D/2]: NaN where a live token is outside the table, none of it read; 1 and 0 for
    tokens that do not count."""
    mask = inside[:, None] & in_half[None, :]
    c = tl.load(cos + cos_rows[:, None] + d[None, :], mask=mask, other=1.0).to(tl.float32)
    s = tl.load(sin + sin_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    outside = (live & (inside == 0))[:, None]
    return tl.where(outside, float("nan"), c), s


@triton.jit
def rotate(low, high, c, s):
    """Both halves, [heads, tokens, D/2], turned by the angles of [tokens, D/2]; all fp32."""
    c = c[None, :, :]
    s = s[None, :, :]
    return low * c - high * s, high * c + low * s


# Sizes are not specialised, or prompts of other lengths would be compiled anew; strides are, for wide loads.
@triton.jit(do_not_specialize=["rows", "tokens"])
def _rope_kernel(
    q_out,  # [B, Hq, T, D]
    k_out,  # [B, Hkv, T, D]
    q,  # [B, Hq, T, D]
    k,  # [B, Hkv, T, D]
    cos,  # [T, D] or [B, T, D]
    sin,
    rows,  # B * T
    tokens,  # T
    qo_b,
    qo_h,
    qo_t,
    ko_b,
    ko_h,
    ko_t,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    INVERSE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    Q_GROUPS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    GROUPS: tl.constexpr = Q_GROUPS + (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0)
    group = pid % GROUPS
    m = (pid // GROUPS) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = m < rows
    b = (m // tokens).to(tl.int64)
    t = (m % tokens).to(tl.int64)
    d = tl.arange(0, HALF_BLOCK)
    in_half = d < HALF
    c, s = load_rotation(cos, sin, b * cos_b + t * cos_t, b * sin_b + t * sin_t, live, live, d, in_half)
    if INVERSE:
        s = -s
    if group < Q_GROUPS:
        _rotate_tile(
            q_out, q, group, b, t, qo_b, qo_h, qo_t, q_b, q_h, q_t, c, s, live, d, in_half, HEADS, BLOCK_H, HALF
        )
    else:
        group -= Q_GROUPS
        _rotate_tile(
            k_out, k, group, b, t, ko_b, ko_h, ko_t, k_b, k_h, k_t, c, s, live, d, in_half, KV_HEADS, BLOCK_H, HALF
        )


@triton.jit
def _rotate_tile(
    out,
    x,
    group,
    b,
    t,
    out_b,
    out_h,
    out_t,
    x_b,
    x_h,
    x_t,
    c,
    s,
    live,
    d,
    in_half,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
):
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (h < HEADS)[:, None, None] & live[None, :, None] & in_half[None, None, :]
    h = h.to(tl.int64)
    x_at = x + (b * x_b + t * x_t)[None, :, None] + (h * x_h)[:, None, None] + d[None, None, :]
    low = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    low, high = rotate(low, high, c, s)
    out_at = out + (b * out_b + t * out_t)[None, :, None] + (h * out_h)[:, None, None] + d[None, None, :]
    tl.store(out_at, low.to(out.dtype.element_ty), mask=mask)
    tl.store(out_at + HALF, high.to(out.dtype.element_ty), mask=mask)


def rope(
    q_out: Tensor,
    k_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    inverse: bool = False,
    config: Config | None = None,
) -> None:
    """Rotate ``q`` [B, Hq, T, D] and ``k`` [B, Hkv, T, D] into ``q_out`` and ``k_out``; last dimensions are dense.

    Args:
        q_out, k_out: written; any strides otherwise.
        q, k: any strides otherwise, stride 0 included.
        cos, sin: [T, D], [1, T, D] or [B, T, D] with a dense last dimension; only the first half of D is read.
        inverse: rotate back, which is the gradient.
        config: the default if None.
    """
    info = gpu_of(q)
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    rows = batch * tokens
    if config is None:
        config = default_config(info, q.dtype, m=rows, heads=heads, kv_heads=kv_heads, head_dim=dim)
    groups = cdiv(heads, config.block_h) + cdiv(kv_heads, config.block_h)
    cos_b, sin_b = (x.stride(0) if x.dim() == 3 and x.shape[0] > 1 else 0 for x in (cos, sin))
    pdl = info.has_pdl and not INTERPRETED
    launch(
        _rope_kernel,
        (groups * cdiv(rows, config.block_t),),
        q_out,
        k_out,
        q,
        k,
        cos,
        sin,
        rows,
        tokens,
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        cos_b,
        cos.stride(-2),
        sin_b,
        sin.stride(-2),
        num_warps=config.num_warps,
        pdl=pdl,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=dim,
        INVERSE=inverse,
        HALF_BLOCK=next_power_of_2(dim // 2),
        BLOCK_T=config.block_t,
        BLOCK_H=config.block_h,
        PDL=pdl,
    )


def aot_cases() -> list[AotCase]:
    """Projection views of a Llama layer in training, rotated and rotated back; a head that is no power of two."""

    def call(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, inverse: bool) -> None:
        qkv = torch.empty(2, tokens, heads + 2 * kv_heads, dim, dtype=dtype, device="meta").transpose(1, 2)
        q, k, _ = qkv.split((heads, kv_heads, kv_heads), dim=1)
        cos = torch.empty(tokens, dim, device="meta")
        outs = [torch.empty(2, tokens, h, dim, dtype=dtype, device="meta").transpose(1, 2) for h in (heads, kv_heads)]
        if inverse:  # gradients come as attention leaves them
            q, k = (torch.empty(x.shape, dtype=dtype, device="meta") for x in (q, k))
        rope(*outs, q, k, cos, cos, inverse=inverse)

    return [
        AotCase(
            "rope llama3-8b bf16", lambda: call(4096, 32, 8, 128, torch.bfloat16, False), pdl=True, max_registers=96
        ),
        AotCase(
            "rope back llama3-8b tp4 fp16",
            lambda: call(2048, 8, 2, 128, torch.float16, True),
            (90,),
            pdl=True,
            max_registers=96,
        ),
        AotCase("rope head 80 bf16", lambda: call(1024, 12, 12, 80, torch.bfloat16, False), (90,), max_registers=96),
    ]
