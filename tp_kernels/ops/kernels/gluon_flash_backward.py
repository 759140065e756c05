"""Flash attention backward for Hopper, warp-specialised, in Gluon: the same bits every time, no atomics.

    P = exp(scale * q k^T - lse)        dP = dO v^T        dS = P * (dP - delta)        delta = rowsum(dO * O) - dlse
    dV = P^T dO                         dK = scale * dS^T q                             dQ = scale * dS k

Three launches, as in the plain Triton twin in ``flash_attention_backward.py``, whose first kernel (delta, and lse in
powers of two, padded so that rows beyond the end weigh nothing) this one shares. The other two are warp-specialised
like the forward pass: a producer warp streams blocks past two consumers of 64 kept rows each, and while one consumer
takes exponentials the other has the tensor cores. Scores are computed twice, 7 matrix products instead of 5: the price
of a reproducible dQ.

Registers decide the block sizes: with head_dim 128 a consumer holds 2 x 64 of 240 registers in sums of dK and dV, which
leaves room for 64 queries a block. Neither fits head_dim 256. Algorithm: Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels import gluon_flash_attention as forward
from tp_kernels.ops.kernels.flash_attention import LOG2_E, strides_of
from tp_kernels.ops.kernels.flash_attention_gradients import PAD, delta_kernel
from tp_kernels.ops.kernels.gluon_flash_attention import descriptor, heads_side_by_side, padded_width
from tp_kernels.ops.kernels.gluon_flash_gradients import gluon_dkdv, gluon_dq
from tp_kernels.ops.kernels.gluon_flash_schedule import ROWS, TILE_ROWS
from tp_kernels.ops.kernels.launch import AotCase, launch
from tp_kernels.ops.kernels.sizes import cdiv

__all__ = ["Config", "aot_cases", "candidates", "default_config", "flash_backward", "unsupported_reason"]


class Config(NamedTuple):
    """What may be tuned.

    Attributes:
        block_m: queries a block, dK and dV.
        kv_stages: slots of the ring of queries.
        block_n: keys a block, dQ.
        q_stages: slots of the ring of keys.
        split: one block of threads for each query head instead of one for each KV head, the shares being added in a
            fixed order afterwards; None: if there are fewer tiles of keys than multiprocessors.
    """

    block_m: int
    kv_stages: int
    block_n: int
    q_stages: int
    split: bool | None = None


def _shared(config: Config, head_dim: int) -> int:
    """Bytes of shared memory of the larger kernel, barriers included."""
    stream = max(config.kv_stages * config.block_m, config.q_stages * config.block_n)
    return 2 * (TILE_ROWS.value + stream) * padded_width(head_dim) * 2 + 8 * config.kv_stages * config.block_m + 1024


def default_config(
    info: GpuInfo, dtype: torch.dtype, head_dim: int, max_q: int, max_k: int, causal: bool = True
) -> Config:
    """What fits registers and shared memory for sure."""
    return Config(64, 2, 128, 2)


def candidates(
    info: GpuInfo, dtype: torch.dtype, head_dim: int, max_q: int, max_k: int, causal: bool = True
) -> list[Config]:
    """Configurations worth measuring, the default first."""
    found = [Config(64, 2, 128, 2), Config(64, 3, 64, 3), Config(64, 4, 64, 4), Config(64, 2, 128, 2, True)]
    return [config for config in found if _shared(config, head_dim) <= info.max_shared]


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
    """Why :func:`flash_backward` cannot take these tensors, in words; None if it can."""
    if varlen:
        return "takes no packed sequences"
    if head_dim > 128:
        return f"takes head_dim up to 128, not {head_dim}"
    return forward.unsupported_reason(info, dtype, head_dim, q, k, v, causal, window, varlen)


@lru_cache(maxsize=8)
def _row_layout(columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, columns], gl.float32)


def _rows_descriptor(x: Tensor, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, columns], _row_layout(columns))


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
        dq, dk, dv: like ``q``, ``k``, ``v``; their layout must suit TMA.
        grad_out: gradient of ``out``; its layout must suit TMA.
        q, k, v, out, lse: of the forward pass; ``lse`` contiguous.
        scale, causal, window, max_q, max_k: as there.
        cu_q, cu_k: None.
        grad_lse: gradient of ``lse``, contiguous; None for zeros.
        config: None for the default.

    Raises:
        ValueError: :func:`unsupported_reason` has one, or some other tensor does not suit TMA.
    """
    info, head_dim = gpu_of(q), q.shape[-1]
    reason = unsupported_reason(info, q.dtype, head_dim, q, k, v, causal, window, cu_q is not None)
    for name, x in (("grad_out", grad_out), ("dq", dq), ("dk", dk), ("dv", dv)):
        reason = reason or forward.strange_layout(name, x)
    if reason is not None:
        raise ValueError(f"the Gluon attention kernel cannot run: {reason}")
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    # A table's configuration may be that of heads half as wide.
    if config is None or _shared(config, head_dim) > info.max_shared:
        config = default_config(info, q.dtype, head_dim, max_q, max_k, causal)
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    group, width = heads // kv_heads, padded_width(head_dim)
    windowed = window is not None and window < max_k
    padded = cdiv(max_q, PAD) * PAD
    sums2, delta = (torch.empty(heads, batch * padded, dtype=torch.float32, device=q.device) for _ in range(2))
    launch(
        delta_kernel,
        (batch * heads, padded // PAD),
        out,
        grad_out,
        lse,
        grad_lse,
        sums2,
        delta,
        None,
        heads,
        max_q,
        padded,
        batch * padded,
        *strides_of(out, False),
        *strides_of(grad_out, False),
        *lse.stride()[:2],
        HEAD_DIM=head_dim,
        BLOCK_D=width,
        BLOCK=PAD,
        VARLEN=False,
        HAS_GRAD_LSE=grad_lse is not None,
        num_warps=8,
    )
    modes = {"CAUSAL": causal, "WINDOWED": windowed, "GROUP": group, "num_warps": 4, "maxnreg": 168}
    lengths = (max_q, max_k, window if windowed else 0, padded)
    factors = (scale * LOG2_E, scale)

    tiles = cdiv(max_k, TILE_ROWS.value)
    split = batch * kv_heads * tiles < info.num_sms if config.split is None else config.split
    split = split and group > 1
    each = 1 if split else group
    turns = batch * heads // each
    shares = (
        torch.empty(2, batch, heads, max_k, head_dim, dtype=torch.float32, device=q.device) if split else (None,) * 2
    )
    launch(
        gluon_dkdv,
        (tiles * turns,),
        descriptor(q, config.block_m, width, False),
        descriptor(k, ROWS.value, width, False),
        descriptor(v, ROWS.value, width, False),
        descriptor(grad_out, config.block_m, width, False),
        _rows_descriptor(sums2, config.block_m),
        _rows_descriptor(delta, config.block_m),
        descriptor(dk, ROWS.value, width, False),
        descriptor(dv, ROWS.value, width, False),
        shares[0],
        shares[1],
        *factors,
        tiles,
        heads // each,
        turns,
        heads_side_by_side(turns, 4 * each * max_q * head_dim),
        each,
        *lengths,
        STAGES=config.kv_stages,
        SPLIT=split,
        HEAD_DIM=head_dim,
        **modes,
    )
    if split:
        dk.copy_(shares[0].unflatten(1, (kv_heads, group)).sum(2))
        dv.copy_(shares[1].unflatten(1, (kv_heads, group)).sum(2))

    tiles = cdiv(max_q, TILE_ROWS.value)
    launch(
        gluon_dq,
        (tiles * batch * heads,),
        descriptor(q, ROWS.value, width, False),
        descriptor(k, config.block_n, width, False),
        descriptor(v, config.block_n, width, False),
        descriptor(grad_out, ROWS.value, width, False),
        descriptor(dq, ROWS.value, width, False),
        sums2,
        delta,
        *factors,
        tiles,
        heads,
        batch * heads,
        heads_side_by_side(batch * kv_heads, 4 * max_k * head_dim) * group,
        *lengths,
        batch * padded,
        STAGES=config.q_stages,
        **modes,
    )


# Ahead-of-time check --------------------------------------------------------------------------------------------------


def _aot_call(head_dim: int, causal: bool, window: int | None = None, config: Config | None = None) -> None:
    def tokens(heads: int) -> Tensor:
        return torch.empty(2, 4096, heads, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)

    q, k, v = tokens(32), tokens(8), tokens(8)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    lse = torch.empty(2, 32, 4096, device="meta")
    options = {"scale": head_dim**-0.5, "causal": causal, "window": window, "max_q": 4096, "max_k": 4096}
    flash_backward(*gradients, torch.empty_like(q), q, k, v, torch.empty_like(q), lse, config=config, **options)


def aot_cases() -> list[AotCase]:
    """Masks and head sizes, three launches a case."""

    def case(name: str, *args, **kwargs) -> AotCase:
        # Some numbers of the loop over heads are set aside while a head's queries are walked.
        return AotCase(f"gluon_backward_{name}", lambda: _aot_call(*args, **kwargs), (90,), max_spill_bytes=40)

    return [
        case("d128_causal", 128, True),
        case("d128_split", 128, False, config=Config(64, 3, 64, 3, True)),
        case("d64_window", 64, True, 1000),
    ]
