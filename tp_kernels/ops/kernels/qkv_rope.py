"""From the fused projection to attention in one launch: split, bias, QK-norm, rotation, write to the KV cache.

Tiles are those of ``rope``: [heads, tokens, D/2] for each half of a head. A program belongs to one part (queries, keys
or values), so the branch is the same for all its threads. Positions come from ``lengths`` on the GPU; what they point
to is checked here, because the host cannot look at them without waiting for the GPU: a key or value whose slot or page
does not exist is not written, and a token whose position is outside the rotary table becomes NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels import rope
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch
from tp_kernels.ops.kernels.rope import Config, load_rotation, rotate
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = ["Config", "aot_cases", "candidates", "default_config", "qkv_rope"]


def default_config(info: GpuInfo, dtype: torch.dtype, *, m: int, heads: int, kv_heads: int, head_dim: int) -> Config:
    """Tiles for ``m`` tokens of all rows; see ``rope.default_config``."""
    return rope.default_config(info, dtype, m=m, heads=heads, kv_heads=kv_heads, head_dim=head_dim, parts=3)


def candidates(info: GpuInfo, dtype: torch.dtype, *, m: int, heads: int, kv_heads: int, head_dim: int) -> list[Config]:
    """Configurations worth measuring; the default is the first."""
    return rope.candidates(info, dtype, m=m, heads=heads, kv_heads=kv_heads, head_dim=head_dim, parts=3)


@triton.jit
def _load_half(x_at, bias_at, mask, bias_mask):
    """One half of the heads as fp32; the biased value is rounded to the dtype, as after a projection with a bias."""
    x = tl.load(x_at, mask=mask, other=0.0)
    if bias_at is not None:
        wide = x.to(tl.float32) + tl.load(bias_at, mask=bias_mask, other=0.0).to(tl.float32)
        x = wide.to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _normed(low, high, norm, d, in_half, eps, dtype: tl.constexpr, D: tl.constexpr):
    """RMS norm over each head; rounded before and after the weight, as Hugging Face's modules do."""
    weight_low = tl.load(norm + d, mask=in_half, other=0.0).to(tl.float32)[None, None, :]
    weight_high = tl.load(norm + D // 2 + d, mask=in_half, other=0.0).to(tl.float32)[None, None, :]
    scale = tl.rsqrt(tl.sum(low * low + high * high, axis=2) / D + eps)[:, :, None]
    low = ((low * scale).to(dtype).to(tl.float32) * weight_low).to(dtype).to(tl.float32)
    high = ((high * scale).to(dtype).to(tl.float32) * weight_high).to(dtype).to(tl.float32)
    return low, high


@triton.jit
def _store_halves(at, low, high, mask, HALF: tl.constexpr):
    tl.store(at, low.to(at.dtype.element_ty), mask=mask)
    tl.store(at + HALF, high.to(at.dtype.element_ty), mask=mask)


# Sizes are not specialised, or prompts of other lengths would be compiled anew; strides are, for wide loads.
@triton.jit(
    do_not_specialize=[
        "rows",
        "tokens",
        "capacity",
        "table_rows",
        "num_pages",
        "positions_b",
        "positions_t",
        "pages_b",
    ]
)
def _qkv_rope_kernel(
    q_out,  # [B, T, Hq, D]
    k_cache,  # [B, Hkv, max_len, D], or [pages, Hkv, page_size, D]
    v_cache,
    qkv,  # [B, T, (Hq + 2 * Hkv) * D]
    bias,  # [(Hq + 2 * Hkv) * D] or None
    q_norm,  # [D] or None
    k_norm,
    cos,  # fp32 [P, D]
    sin,
    lengths,  # int64 [B]
    positions,  # [B, T] or None
    new_tokens,  # [B] or None
    page_table,  # int32 [B, max_pages] or None
    eps,
    rows,  # B * T
    tokens,  # T
    capacity,  # slots of a row
    table_rows,  # P
    num_pages,
    qkv_b,
    qkv_t,
    positions_b,
    positions_t,
    pages_b,
    cos_p,
    sin_p,
    k_b,  # stride of a row or a page
    k_h,
    k_p,
    v_b,
    v_h,
    v_p,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    Q_GROUPS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KV_GROUPS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    dtype: tl.constexpr = qkv.dtype.element_ty
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0)
    group = pid % (Q_GROUPS + 2 * KV_GROUPS)
    is_q = group < Q_GROUPS
    is_v = group >= Q_GROUPS + KV_GROUPS
    # First head of the part in qkv, and of the program in its part.
    part = tl.where(is_q, 0, tl.where(is_v, HEADS + KV_HEADS, HEADS))
    group = tl.where(is_q, group, tl.where(is_v, group - Q_GROUPS - KV_GROUPS, group - Q_GROUPS))
    h = group * BLOCK_H + tl.arange(0, BLOCK_H)
    has_head = h < tl.where(is_q, HEADS, KV_HEADS)

    m = (pid // (Q_GROUPS + 2 * KV_GROUPS)) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = m < rows
    b = (m // tokens).to(tl.int64)
    t = (m % tokens).to(tl.int64)
    d = tl.arange(0, HALF_BLOCK)
    in_half = d < HALF
    mask = has_head[:, None, None] & in_rows[None, :, None] & in_half[None, None, :]
    column = ((part + h) * D)[:, None, None] + d[None, None, :]
    x_at = qkv + (b * qkv_b + t * qkv_t)[None, :, None] + column

    # Small dependent loads first (length, then table row), the heads while those are on their way.
    slot = tl.load(lengths + b, mask=in_rows, other=0) + t
    live = in_rows
    if new_tokens is not None:
        live = live & (t < tl.load(new_tokens + b, mask=in_rows, other=0))
    position = slot
    if positions is not None:
        position = tl.load(positions + b * positions_b + t * positions_t, mask=in_rows, other=0).to(tl.int64)
    if bias is not None:
        bias_mask = has_head[:, None, None] & in_half[None, None, :]
        low = _load_half(x_at, bias + column, mask, bias_mask)
        high = _load_half(x_at + HALF, bias + column + HALF, mask, bias_mask)
    else:
        low = _load_half(x_at, None, mask, None)
        high = _load_half(x_at + HALF, None, mask, None)

    h = h.to(tl.int64)
    writes = live & (slot >= 0) & (slot < capacity)
    k_row = b
    k_slot = slot
    if page_table is not None:
        page = tl.load(page_table + b * pages_b + slot // PAGE_SIZE, mask=writes, other=-1)
        writes = writes & (page >= 0) & (page < num_pages)
        k_row = page.to(tl.int64)
        k_slot = slot % PAGE_SIZE
    cache_mask = mask & writes[None, :, None]
    if is_v:
        v_at = v_cache + (k_row * v_b + k_slot * v_p)[None, :, None] + (h * v_h)[:, None, None] + d[None, None, :]
        _store_halves(v_at, low, high, cache_mask, HALF)
    else:
        inside = live & (position >= 0) & (position < table_rows)
        c, s = load_rotation(cos, sin, position * cos_p, position * sin_p, inside, live, d, in_half)
        if is_q:
            if q_norm is not None:
                low, high = _normed(low, high, q_norm, d, in_half, eps, dtype, D)
            low, high = rotate(low, high, c, s)
            q_at = q_out + (m.to(tl.int64) * (HEADS * D))[None, :, None] + (h * D)[:, None, None] + d[None, None, :]
            _store_halves(q_at, low, high, mask, HALF)
        else:
            if k_norm is not None:
                low, high = _normed(low, high, k_norm, d, in_half, eps, dtype, D)
            low, high = rotate(low, high, c, s)
            k_at = k_cache + (k_row * k_b + k_slot * k_p)[None, :, None] + (h * k_h)[:, None, None] + d[None, None, :]
            _store_halves(k_at, low, high, cache_mask, HALF)


def qkv_rope(
    q_out: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    page_table: Tensor | None = None,
    new_tokens: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write the rotated queries to ``q_out`` [B, T, Hq, D] (contiguous), keys and values to the caches.

    Args:
        q_out: written.
        qkv: [B, T, (Hq + 2 * Hkv) * D] with a dense last dimension.
        cos, sin: fp32 [P, D] with a dense last dimension; only the first half of D is read.
        lengths: int64 [B], contiguous.
        k_cache, v_cache: [B, Hkv, max_len, D], or with ``page_table`` [pages, Hkv, page_size, D]; dense last dimension.
        q_norm, k_norm: [D], contiguous, or None.
        eps: of the norms.
        positions: int64 or int32 [B, T] or None, any strides.
        bias: [(Hq + 2 * Hkv) * D], contiguous, or None.
        page_table: int32 [B, max_pages] with a dense last dimension, or None.
        new_tokens: int64 or int32 [B], contiguous, or None.
        config: the default if None.
    """
    info = gpu_of(qkv)
    batch, tokens, heads, dim = q_out.shape
    kv_heads = k_cache.shape[1]
    rows = batch * tokens
    if config is None:
        config = default_config(info, qkv.dtype, m=rows, heads=heads, kv_heads=kv_heads, head_dim=dim)
    groups = cdiv(heads, config.block_h) + 2 * cdiv(kv_heads, config.block_h)
    page_size, capacity, pages_b = 0, k_cache.shape[2], 0
    if page_table is not None:
        page_size, pages_b = k_cache.shape[2], page_table.stride(0)
        capacity = page_table.shape[1] * page_size
    pdl = info.has_pdl and not INTERPRETED
    launch(
        _qkv_rope_kernel,
        (groups * cdiv(rows, config.block_t),),
        q_out,
        k_cache,
        v_cache,
        qkv,
        bias,
        q_norm,
        k_norm,
        cos,
        sin,
        lengths,
        positions,
        new_tokens,
        page_table,
        eps,
        rows,
        tokens,
        capacity,
        cos.shape[0],
        k_cache.shape[0],
        qkv.stride(0),
        qkv.stride(1),
        0 if positions is None else positions.stride(0),
        0 if positions is None else positions.stride(1),
        pages_b,
        cos.stride(0),
        sin.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        num_warps=config.num_warps,
        pdl=pdl,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=dim,
        PAGE_SIZE=page_size,
        HALF_BLOCK=next_power_of_2(dim // 2),
        BLOCK_T=config.block_t,
        BLOCK_H=config.block_h,
        PDL=pdl,
    )


def aot_cases() -> list[AotCase]:
    """Decode and prefill of Llama and Qwen3 layers, pages, a bias, a cache of another dtype, an odd head."""

    def call(
        batch: int,
        tokens: int,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        *,
        norm: bool = False,
        bias: bool = False,
        page_size: int = 0,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        width = (heads + 2 * kv_heads) * dim
        cache_dtype = cache_dtype or dtype
        cache = empty(batch, kv_heads, 4096, dim, dtype=cache_dtype)
        table = None
        if page_size:
            cache = empty(512, page_size, kv_heads, dim, dtype=cache_dtype).transpose(1, 2)
            table = empty(batch, 128, dtype=torch.int32)
        weight = empty(dim) if norm else None
        rotary = empty(8192, dim, dtype=torch.float32)
        qkv_rope(
            empty(batch, tokens, heads, dim),
            empty(batch, tokens, width),
            rotary,
            rotary,
            empty(batch, dtype=torch.int64),
            cache,
            cache,
            q_norm=weight,
            k_norm=weight,
            bias=empty(width) if bias else None,
            page_table=table,
            new_tokens=empty(batch, dtype=torch.int64) if page_size else None,
        )

    bf16, fp16 = torch.bfloat16, torch.float16
    limits = {"pdl": True, "max_registers": 128}
    return [
        AotCase("qkv_rope llama3-8b decode bf16", lambda: call(1, 1, 32, 8, 128, bf16), **limits),
        AotCase("qkv_rope llama3-8b prefill bf16", lambda: call(1, 4096, 32, 8, 128, bf16), **limits),
        AotCase("qkv_rope qwen3-8b prefill", lambda: call(1, 4096, 32, 8, 128, bf16, norm=True), (90,), **limits),
        AotCase(
            "qkv_rope qwen3-8b tp4 decode pages",
            lambda: call(64, 1, 8, 2, 128, bf16, norm=True, page_size=16),
            (90,),
            **limits,
        ),
        AotCase(
            "qkv_rope qwen2 bias, fp16 into fp32",
            lambda: call(2, 512, 28, 4, 128, fp16, bias=True, cache_dtype=torch.float32),
            (90,),
            **limits,
        ),
        AotCase("qkv_rope head 80", lambda: call(4, 256, 12, 12, 80, fp16), (90,), **limits),
        AotCase("qkv_rope head 256", lambda: call(4, 256, 8, 4, 256, bf16), (90,), **limits),
    ]
