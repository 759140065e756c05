"""Flash attention, forward, in plain Triton: every GPU from compute capability 8.0 on, and the interpreter.

One program does ``BLOCK_M`` query rows of one head and walks over the keys that they may see; scores never leave the
chip. Statistics and accumulator are fp32, exponentials are powers of two. Only the blocks that a border crosses (causal
diagonal, window, ragged end) are masked. Algorithm: Dao, "FlashAttention-2" (2023). Programs of all heads stand on the
fastest grid axis, so that the heads of a group share their keys in the L2, and under causality the longest rows start
first.

Operands come through pointers, or, where the tensors allow it on capability 9, through host tensor descriptors (TMA):
a throw-away kernel of this design with descriptors, 128 x 128 tiles, 8 warps and 3 stages did 416 TFLOP/s at 4096 and
545 at 16384 tokens (H100, head_dim 128, causal, cuDNN 504 and 608). Issuing the next scores before the softmax of this
block by hand gained nothing there (381-388); warp specialisation does, and is another module's (Gluon).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = [
    "LOG2_E",
    "MAX_HEAD_DIM",
    "Config",
    "aot_cases",
    "block_d",
    "candidates",
    "default_config",
    "flash_forward",
    "load_rows",
    "operand",
    "sequence",
    "strides_of",
    "tma_takes",
]

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
MAX_HEAD_DIM = 256


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def sequence(cu_seqlens, b, length, VARLEN: tl.constexpr):
    """First row (int64) and length of sequence ``b``; ``length`` where all have the same."""
    if VARLEN:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        length = (tl.load(cu_seqlens + b + 1) - start).to(tl.int32)
    else:
        start = tl.zeros((), tl.int64)
    return start, length


@triton.jit
def load_rows(
    source,
    b,
    h,
    row,
    limit,
    stride,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows ``row`` .. ``row + BLOCK - 1`` of one head as [BLOCK, BLOCK_D]; zeros outside of the tensor.

    ``source`` is a descriptor of [B, H, S, D], or a pointer to row 0 of the head, whose rows end at ``limit``
    (``RAGGED``: the block may reach beyond).
    """
    if TMA:
        tile = tl.reshape(source.load([b, h, row, 0]), [BLOCK, BLOCK_D])
    else:
        rows = tl.arange(0, BLOCK)
        dims = tl.arange(0, BLOCK_D)
        # The 64-bit product is a scalar; offsets within the tile fit into 32 bits. (A loop counter has no ``.to``.)
        at = source + (tl.zeros((), tl.int64) + row) * stride + (rows[:, None] * stride + dims[None, :])
        if RAGGED and HEAD_DIM != BLOCK_D:
            tile = tl.load(at, mask=(rows[:, None] < limit - row) & (dims[None, :] < HEAD_DIM), other=0.0)
        elif RAGGED:
            tile = tl.load(at, mask=rows[:, None] < limit - row, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            tile = tl.load(at, mask=dims[None, :] < HEAD_DIM, other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    k,
    v,
    b,
    h,
    begin,
    end,
    positions,
    k_len,
    k_s,
    v_s,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys ``begin`` .. ``end`` - 1 to the running softmax: accumulator, sum of weights, largest score."""
    for n in tl.range(begin, end, BLOCK_N):
        k_tile = load_rows(k, b, h, n, k_len, k_s, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, TMA)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)[None, :]
            allowed = keys < k_len
            if CAUSAL:
                allowed &= keys <= positions[:, None]
            if WINDOW:
                allowed &= keys > positions[:, None] - window
            scores = tl.where(allowed, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        if MASKED:
            # A row that has seen no key yet: -inf - -inf would be NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        else:
            base = new_top
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v_tile = load_rows(v, b, h, n, k_len, v_s, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, TMA)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def _flash_forward(
    # [B, Hq, S, D] and [B, Hkv, L, D], or [tokens, H, D]; descriptors if TMA, except out. lse fp32.
    q,
    k,
    v,
    out,
    lse,
    # int32 [B + 1], None if all sequences have the same length
    cu_q,
    cu_k,
    # scale includes log2(e); window is ignored unless WINDOW
    scale,
    window,
    heads,
    group,
    q_len,
    k_len,
    # strides of batch, head, row
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    out_b,
    out_h,
    out_s,
    lse_b,
    lse_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LSE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    kv_h = h // group
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_start, q_len = sequence(cu_q, b, q_len, VARLEN)
    k_start, k_len = sequence(cu_k, b, k_len, VARLEN)
    if m >= q_len:
        return

    if TMA:
        q_rows, k_rows, v_rows = q, k, v
    else:
        q_rows = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + q_start * q_s
        k_rows = k + b.to(tl.int64) * k_b + kv_h.to(tl.int64) * k_h + k_start * k_s
        v_rows = v + b.to(tl.int64) * v_b + kv_h.to(tl.int64) * v_h + k_start * v_s
    q_tile = load_rows(q_rows, b, h, m, q_len, q_s, BLOCK_M, HEAD_DIM, BLOCK_D, True, TMA)

    # A query's position among the keys; the last query stands at the last key.
    shift = k_len - q_len
    positions = m + shift + tl.arange(0, BLOCK_M)
    # Keys that any row sees, [first, last), and among them the whole blocks that every row sees, [inner, outer).
    first, last = 0, k_len
    inner, outer = 0, (k_len // BLOCK_N) * BLOCK_N
    if CAUSAL:
        last = tl.maximum(tl.minimum(k_len, tl.minimum(m + BLOCK_M, q_len) + shift), 0)
        outer = (tl.maximum(tl.minimum(k_len, m + shift + 1), 0) // BLOCK_N) * BLOCK_N
    if WINDOW:
        first = (tl.maximum(m + shift - window + 1, 0) // BLOCK_N) * BLOCK_N
        inner = (tl.maximum(m + BLOCK_M + shift - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        outer = tl.maximum(outer, inner)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if WINDOW:
        acc, total, top = _attend(
            acc, total, top, q_tile, k_rows, v_rows, b, kv_h, first, tl.minimum(inner, last), positions, k_len,
            k_s, v_s, scale, window, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, TMA, PRECISION,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q_tile, k_rows, v_rows, b, kv_h, inner, outer, positions, k_len, k_s, v_s,
        scale, window, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, False, TMA, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q_tile, k_rows, v_rows, b, kv_h, outer, last, positions, k_len, k_s, v_s,
        scale, window, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, TMA, PRECISION,
    )  # fmt: skip

    rows = m + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    # A row without keys: the accumulator is 0, the largest score -inf, and so are the results.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc * (1.0 / total)[:, None]
    at = out + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h + (q_start + m) * out_s
    at += (rows - m)[:, None] * out_s + dims[None, :]
    inside = rows[:, None] < q_len
    if HEAD_DIM != BLOCK_D:
        inside = inside & (dims[None, :] < HEAD_DIM)
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)
    if HAS_LSE:
        at_row = lse + b.to(tl.int64) * lse_b + h.to(tl.int64) * lse_h + q_start + rows
        tl.store(at_row, (top + tl.log2(total)) * LN_2, mask=rows < q_len)


# Configurations -------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """Rows of queries and of keys a block; ``tma``: through descriptors where GPU and tensors allow it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = True


def block_d(head_dim: int) -> int:
    """head_dim as the kernels have it: a power of two, and at least 64 where the tensor cores are real."""
    return max(16 if INTERPRETED else 64, next_power_of_2(head_dim))


def _shared(info: GpuInfo, config: Config, head_dim: int) -> int:
    """Bytes of shared memory as the compiler lays it out: queries, and keys and values in a ring."""
    ring = config.num_stages if info.has_tma else max(1, config.num_stages - 1)
    scratch = config.block_m * config.block_n * 2 if head_dim > 128 and not info.has_tma else 0
    return (config.block_m + 2 * ring * config.block_n) * block_d(head_dim) * 2 + scratch + 1024


def default_config(
    info: GpuInfo, dtype: torch.dtype, head_dim: int, max_q: int, max_k: int, causal: bool = True
) -> Config:
    """What fits registers and shared memory for sure."""
    if dtype == torch.float32:
        return Config(32, 32, 4, 1, tma=False)
    if head_dim > 128:
        wanted = Config(128, 64, 8, 2) if info.hopper else Config(64, 32, 8, 2, tma=False)
    elif info.hopper:
        wanted = Config(128, 128, 8, 3)
    else:
        wanted = Config(128, 64, 8, 3, tma=False)
    while _shared(info, wanted, head_dim) > info.max_shared and wanted.num_stages > 1:
        wanted = wanted._replace(num_stages=wanted.num_stages - 1)
    return wanted


def candidates(
    info: GpuInfo, dtype: torch.dtype, head_dim: int, max_q: int, max_k: int, causal: bool = True
) -> list[Config]:
    """Configurations worth measuring, the default first."""
    found = [default_config(info, dtype, head_dim, max_q, max_k, causal)]
    if dtype == torch.float32:
        return found
    # Left out because they spill: 128 x 64 with 4 warps at head_dim 128, 128 x 32 with 8 warps at 256 on capability 8.
    if head_dim > 128:
        shapes = [(128, 64, 8, 2), (64, 64, 8, 2)] if info.hopper else [(64, 32, 8, 2), (64, 64, 8, 2)]
    elif head_dim > 64:
        shapes = [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)]
    else:
        shapes = [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 3)]
        shapes = shapes if info.hopper else shapes[:3]
    for tma in (True, False) if info.has_tma else (False,):
        found += [Config(*shape, tma=tma) for shape in shapes]
    return [c for i, c in enumerate(found) if _shared(info, c, head_dim) <= info.max_shared and c not in found[:i]]


# Launcher -------------------------------------------------------------------------------------------------------------


def strides_of(x: Tensor, varlen: bool) -> tuple[int, int, int]:
    """Strides of batch, head and row of [B, H, S, D] or of [tokens, H, D]."""
    if varlen:
        return 0, x.stride(1), x.stride(0)
    return x.stride(0), x.stride(1), x.stride(2)


def tma_takes(*tensors: Tensor) -> bool:
    """Whether all of these [B, H, S, D] can be described to the TMA unit: not empty, 16-byte steps, no broadcasting."""
    for x in tensors:
        if x.dim() != 4 or x.numel() == 0 or x.shape[-1] < 64 or x.data_ptr() % 16:
            return False
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size > 1 and (stride <= 0 or stride * x.element_size() % 16):
                return False
    return True


def operand(x: Tensor, rows: int, depth: int, tma: bool) -> Any:
    """``x`` as the kernels take it: itself, or a descriptor of blocks of ``rows`` rows of one head."""
    if not tma:
        return x
    # The stride of a dimension of size 1 is never used but must be legal.
    legal = 16 // x.element_size()
    strides = [stride if size > 1 else legal for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, depth])


def flash_forward(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int,
    max_k: int,
    config: Config | None = None,
) -> None:
    """Write softmax(q k^T * scale) v to ``out`` and the natural logarithm of the sums of exponentials to ``lse``.

    Args:
        out: like ``q``, last dimension dense.
        lse: fp32 [B, Hq, S] or [Hq, total_q], last dimension dense; None if nobody needs it.
        q: [B, Hq, S, D], or [total_q, Hq, D] with ``cu_q``; any strides with a dense last dimension.
        k, v: [B, Hkv, L, D], or [total_k, Hkv, D] with ``cu_k``.
        scale: positive.
        causal: query i sees the keys up to i + L - S.
        window: a query sees only so many positions, the last of them i + L - S; None for all.
        cu_q, cu_k: int32 [B + 1], where the sequences begin and end.
        max_q, max_k: S and L, or the longest of each.
        config: None for the default.
    """
    varlen = cu_q is not None
    batch = cu_q.shape[0] - 1 if varlen else q.shape[0]
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    info = gpu_of(q)
    # A table's configuration may be that of heads half as wide.
    if config is None or _shared(info, config, head_dim) > info.max_shared:
        config = default_config(info, q.dtype, head_dim, max_q, max_k, causal)
    windowed = window is not None and window < max_k
    tma = config.tma and info.has_tma and not varlen and tma_takes(q, k, v)
    depth = block_d(head_dim)
    launch(
        _flash_forward,
        (batch * heads, cdiv(max_q, config.block_m)),
        operand(q, config.block_m, depth, tma),
        operand(k, config.block_n, depth, tma),
        operand(v, config.block_n, depth, tma),
        out,
        lse,
        cu_q,
        cu_k,
        scale * LOG2_E,
        window if windowed else 0,
        heads,
        heads // kv_heads,
        max_q,
        max_k,
        *strides_of(q, varlen),
        *strides_of(k, varlen),
        *strides_of(v, varlen),
        *strides_of(out, varlen),
        *((0, lse.stride(0)) if varlen else lse.stride()[:2]) if lse is not None else (0, 0),
        HEAD_DIM=head_dim,
        BLOCK_D=depth,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        CAUSAL=causal,
        WINDOW=windowed,
        VARLEN=varlen,
        HAS_LSE=lse is not None,
        TMA=tma,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


# Ahead-of-time check --------------------------------------------------------------------------------------------------


def _aot_call(head_dim: int, causal: bool, window: int | None, varlen: bool, config: Config | None = None) -> None:
    def tokens(heads: int) -> Tensor:
        return torch.empty(2, 1024, heads, head_dim, dtype=torch.bfloat16, device="meta")

    q, k, v = tokens(32), tokens(8), tokens(8)
    options: dict[str, Any] = {"scale": 1 / math.sqrt(head_dim), "causal": causal, "window": window, "config": config}
    if varlen:
        cu = torch.empty(3, dtype=torch.int32, device="meta")
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        lse = torch.empty(32, 2048, device="meta")
        flash_forward(torch.empty_like(q), lse, q, k, v, cu_q=cu, cu_k=cu, max_q=1024, max_k=1024, **options)
    else:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        lse = torch.empty(2, 32, 1024, device="meta")
        flash_forward(torch.empty_like(q), lse, q, k, v, max_q=1024, max_k=1024, **options)


def aot_cases() -> list[AotCase]:
    """The head sizes through descriptors and pointers, with every kind of mask once."""
    return [
        AotCase("flash_d128_causal", lambda: _aot_call(128, True, None, False), wgmma=True, tma=True),
        AotCase("flash_d96_causal", lambda: _aot_call(96, True, None, False), (90,), wgmma=True, tma=True),
        AotCase("flash_d64_window", lambda: _aot_call(64, True, 300, False), (90,), wgmma=True, tma=True),
        AotCase("flash_d256_full", lambda: _aot_call(256, False, None, False), (90,), wgmma=True, tma=True),
        AotCase("flash_d128_varlen", lambda: _aot_call(128, True, None, True), (90,), wgmma=True, tma=False),
    ]
