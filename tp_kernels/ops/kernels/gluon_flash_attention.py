"""Flash attention forward for Hopper, warp-specialised, in Gluon.

    out = softmax(q @ k.T * scale + mask) @ v;   lse = logsumexp(q @ k.T * scale + mask)

The plain Triton twin in ``flash_attention.py`` takes the same arguments; this one is for compute capability 9.x only.
bf16 and fp16 in, scores and sums in fp32, probabilities rounded to the input dtype before the second product, as in
FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), whose division of labour this is:

* A block of threads owns 128 query rows of one head: two *consumers* of 4 warps with 64 rows each, and one *producer*
  warp that does nothing but start TMA copies. Registers go where they are needed (``setmaxnreg``: 240 a thread for the
  consumers, 24 for the producer).
* Keys and values come in blocks of ``block_n`` through two rings of ``stages`` slots. Every slot has a *ready* barrier
  (one arrival: the producer announcing the bytes to come) and an *empty* one (one arrival of each consumer).
* A consumer issues the scores of block j and then probabilities times values of block j - 1, waits for the scores only,
  and does the softmax of block j while the tensor cores work on the older block.
* Key blocks are walked from the right edge down, so that only the first one, and the last ones under a window, need a
  mask. Heavy tiles come first and heads vary fastest, so that heads sharing keys run side by side.

A throw-away kernel of this design, one tile a block of threads and two stages, read 547-649 TFLOP/s where cuDNN read
504-608 in the same run (H100, causal, head_dim 128, 32 heads, 4096-16384 tokens); blocks of 64 keys read 514. The other
settings of ``Config`` are there to be measured.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.flash_attention import LOG2_E
from tp_kernels.ops.kernels.gluon_flash_forward import gluon_flash_forward
from tp_kernels.ops.kernels.gluon_flash_schedule import ROWS, TILE_ROWS
from tp_kernels.ops.kernels.launch import AotCase, launch
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = [
    "Config",
    "aot_cases",
    "candidates",
    "default_config",
    "descriptor",
    "flash_forward",
    "heads_side_by_side",
    "padded_width",
    "strange_layout",
    "unsupported_reason",
]


# Configurations -------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """What may be tuned.

    Attributes:
        block_n: keys a block, a power of two.
        stages: slots of the key ring and of the value ring.
        pingpong: the consumers take turns in issuing their products.
        persistent: one block of threads a multiprocessor walks over many tiles, so that the copies of a tile start
            while the tile before is being finished.
        kv_heads: heads of keys walked side by side; 0 for the rule of :func:`heads_side_by_side`.
    """

    block_n: int
    stages: int
    pingpong: bool = False
    persistent: bool = False
    kv_heads: int = 0


def padded_width(head_dim: int) -> int:
    """head_dim as it lies in shared memory: TMA fills up with zeros."""
    return max(64, next_power_of_2(head_dim))


def _shared(config: Config, head_dim: int, own_out: bool) -> int:
    """Bytes of shared memory, barriers included."""
    rows = TILE_ROWS.value * (2 if own_out else 1) + 2 * config.stages * config.block_n
    return rows * padded_width(head_dim) * 2 + 1024


def _own_out(info: GpuInfo, config: Config, head_dim: int) -> bool:
    """Whether results get shared memory of their own, so that the next queries need not wait for them to leave."""
    return config.persistent and _shared(config, head_dim, True) <= info.max_shared


def default_config(
    info: GpuInfo, dtype: torch.dtype, head_dim: int, max_q: int, max_k: int, causal: bool = True
) -> Config:
    """The design that was measured: one tile a block of threads, no turns, rings of two slots."""
    return Config(64 if head_dim > 128 else 128, 2)


def candidates(
    info: GpuInfo, dtype: torch.dtype, head_dim: int, max_q: int, max_k: int, causal: bool = True
) -> list[Config]:
    """Configurations worth measuring, the default first."""
    default = default_config(info, dtype, head_dim, max_q, max_k, causal)
    found = [default._replace(pingpong=p, persistent=t) for t in (False, True) for p in (False, True)]
    more = default._replace(stages=4 if head_dim <= 64 else 3)
    found += [more, more._replace(pingpong=True), more._replace(persistent=True, pingpong=True)]
    found += [default._replace(kv_heads=n, persistent=t) for n in (1, 1 << 20) for t in (False, True)]
    return [config for config in found if _shared(config, head_dim, False) <= info.max_shared]


def heads_side_by_side(heads: int, bytes_of_one: int, wanted: int = 0) -> int:
    """Heads (over all batches) that are walked side by side before the next ones begin; ``wanted`` unless it is 0.

    As many as fit 32 of the 50 MB of the L2 cache, as FlashAttention-3's scheduler does, but at least 16: the tiles
    of a head start almost together and walk almost in step, so 132 blocks of threads on 16 heads ask the memory for a
    fraction of what they read. 8 heads of 16384 tokens (67 MB) side by side is what the draft was measured with.
    """
    return max(1, min(heads, wanted or max(16, (32 << 20) // max(1, bytes_of_one))))


# Launcher -------------------------------------------------------------------------------------------------------------


def strange_layout(name: str, x: Tensor) -> str | None:
    """Why TMA cannot read ``x``; None if it can."""
    if x.stride(-1) != 1:
        return f"the last dimension of {name} is not dense (strides {tuple(x.stride())})"
    if x.data_ptr() % 16:
        return f"{name} does not start at a multiple of 16 bytes"
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size > 1 and (stride <= 0 or stride * x.element_size() % 16):
            return f"the strides {tuple(x.stride())} of {name} are not positive multiples of 16 bytes"
    return None


def unsupported_reason(
    info: GpuInfo,
    dtype: torch.dtype,
    head_dim: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    varlen: bool,
) -> str | None:
    """Why :func:`flash_forward` cannot take these tensors, in words; None if it can."""
    if not info.hopper:
        return f"needs compute capability 9.x, not {info.capability[0]}.{info.capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {dtype}"
    if not 32 <= head_dim <= 256 or head_dim % 8:
        return f"takes head_dim 32 to 256 in steps of 8, not {head_dim}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        reason = strange_layout(name, x)
        if reason is not None:
            return reason
    return None


@lru_cache(maxsize=64)
def _block_layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], kind)


def descriptor(x: Tensor, rows: int, width: int, varlen: bool) -> TensorDescriptor:
    """``x`` as [batch, heads, rows, head_dim] in blocks of one head's rows; packed sequences are one batch."""
    if varlen:
        shape, strides = [1, x.shape[1], x.shape[0], x.shape[2]], [0, x.stride(1), x.stride(0)]
    else:
        shape, strides = list(x.shape), list(x.stride()[:3])
    # The stride of a dimension of size 1 is never used but must be legal.
    strides = [stride if size > 1 else 8 for size, stride in zip(shape, strides, strict=False)]
    return TensorDescriptor(x, shape, [*strides, 1], [1, 1, rows, width], _block_layout(rows, width, x.dtype))


def _right_edge(causal: bool, varlen: bool, max_q: int, max_k: int, block_n: int) -> bool:
    """Whether the causal edge of a tile may cross more than one key block: not if tiles and blocks line up."""
    return causal and (varlen or TILE_ROWS.value > block_n or (max_k - max_q) % block_n != 0)


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

    Rows that see no key get 0, and -inf in ``lse``.

    Args:
        out: like ``q``; its layout must suit TMA like that of ``q``.
        lse: fp32 [B, Hq, S] or [Hq, total_q], any strides; None if nobody needs it.
        q: bf16 or fp16 [B, Hq, S, D], or [total_q, Hq, D] with ``cu_q``.
        k, v: [B, Hkv, L, D], or [total_k, Hkv, D] with ``cu_k``. What lies between and after packed sequences does not
            matter, be it NaN.
        scale: factor of the scores, positive.
        causal: query i sees the keys up to i + L - S.
        window: a query sees only keys after position i + L - S - window; None for no bound.
        cu_q, cu_k: int32 [B + 1], where the sequences begin and end.
        max_q, max_k: S and L, or the longest of each.
        config: None for the default.

    Raises:
        ValueError: :func:`unsupported_reason` has one, or ``scale`` is not positive.
    """
    info, varlen, head_dim = gpu_of(q), cu_q is not None, q.shape[-1]
    reason = unsupported_reason(info, q.dtype, head_dim, q, k, v, causal, window, varlen) or strange_layout("out", out)
    if reason is not None:
        raise ValueError(f"the Gluon attention kernel cannot run: {reason}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    heads, kv_heads = q.shape[1], k.shape[1]
    batch = cu_q.shape[0] - 1 if varlen else q.shape[0]
    if q.numel() == 0:
        return
    if k.numel() == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return
    # A table's configuration may be that of heads half as wide.
    if config is None or _shared(config, head_dim, False) > info.max_shared:
        config = default_config(info, q.dtype, head_dim, max_q, max_k, causal)
    width = padded_width(head_dim)
    tiles = cdiv(max_q, TILE_ROWS.value)
    section = heads_side_by_side(batch * kv_heads, 4 * max_k * head_dim, config.kv_heads) * (heads // kv_heads)
    total = tiles * batch * heads
    windowed = window is not None and window < max_k
    lse_strides = (0, 0, 0) if lse is None else (0, *lse.stride()) if varlen else lse.stride()
    launch(
        gluon_flash_forward,
        (min(total, info.num_sms) if config.persistent else total,),
        descriptor(q, ROWS.value, width, varlen),
        descriptor(k, config.block_n, width, varlen),
        descriptor(v, config.block_n, width, varlen),
        descriptor(out, ROWS.value, width, varlen),
        out,
        lse,
        cu_q,
        cu_k,
        scale * LOG2_E,
        max_q,
        max_k,
        window if windowed else 0,
        tiles,
        heads,
        batch * heads,
        section,
        out.stride(0),
        out.stride(1),
        *lse_strides,
        STAGES=config.stages,
        CAUSAL=causal,
        WINDOWED=windowed,
        VARLEN=varlen,
        RIGHT_EDGE=_right_edge(causal, varlen, max_q, max_k, config.block_n),
        PINGPONG=config.pingpong,
        OWN_OUT=_own_out(info, config, head_dim),
        PERSISTENT=config.persistent,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        num_warps=4,
        # 12 warps (the producer's group is filled up to 4): 384 * 168 registers, which setmaxnreg then redistributes.
        maxnreg=168,
    )


# Ahead-of-time check --------------------------------------------------------------------------------------------------


def _aot_call(
    head_dim: int, causal: bool, window: int | None = None, varlen: bool = False, config: Config | None = None
) -> None:
    def tokens(heads: int) -> Tensor:
        return torch.empty(2, 4096, heads, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)

    q, k, v = tokens(32), tokens(8), tokens(8)
    options = {"scale": head_dim**-0.5, "causal": causal, "window": window, "max_q": 4096, "max_k": 4096}
    if varlen:
        cu = torch.empty(3, dtype=torch.int32, device="meta")
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        lse = torch.empty(32, 8192, device="meta")
        flash_forward(torch.empty_like(q), lse, q, k, v, cu_q=cu, cu_k=cu, config=config, **options)
    else:
        lse = torch.empty(2, 32, 4096, device="meta")
        flash_forward(torch.empty_like(q), lse, q, k, v, config=config, **options)


def aot_cases() -> list[AotCase]:
    """Head sizes, masks, packed sequences, and the settings of ``Config``; all without a spill in a loop over keys."""

    def case(name: str, *args, spill: int = 0, **kwargs) -> AotCase:
        # 168 is what is asked for; the consumers then have 240.
        return AotCase(
            f"gluon_flash_{name}",
            lambda: _aot_call(*args, **kwargs),
            (90,),
            wgmma=True,
            tma=True,
            max_registers=168,
            max_spill_bytes=spill,
        )

    return [
        case("d128_causal", 128, True),
        case("d128_full_stages3", 128, False, config=Config(128, 3)),
        case("d128_pingpong", 128, True, config=Config(128, 2, True)),
        # A few numbers of the tile loop are set aside while a tile's keys are walked.
        case("d128_persistent", 128, True, config=Config(128, 2, True, True), spill=32),
        case("d128_varlen", 128, True, varlen=True),
        case("d96_full", 96, False),
        case("d64_window", 64, True, 1000),
        case("d256_causal", 256, True),
    ]
