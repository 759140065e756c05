"""What ``qkv_rope_cache`` accepts, and which of its paths take which operands."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_kernels.ops._gpu import kernels_reason
from tp_kernels.ops._library import PLAIN_TYPES, plain_reason

__all__ = ["MAX_HEAD_DIM", "check_operands", "check_ranges", "gpu_qkv_reason", "native_qkv_reason"]

MAX_HEAD_DIM = 256  # csrc/cpu/kernels.h
MAX_GPU_HEAD_DIM = 512
GPU_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


def check_operands(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    positions: Tensor | None,
    bias: Tensor | None,
    page_table: Tensor | None,
    new_tokens: Tensor | None,
) -> None:
    """ValueError for shapes, dtypes and devices that do not fit; reads no values."""
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(f"expected at least one head of each kind, got {num_heads} and {num_kv_heads}")
    heads = num_heads + 2 * num_kv_heads
    if qkv.dim() != 3 or qkv.shape[-1] % heads:
        raise ValueError(f"expected qkv [B, T, ({num_heads} + 2 * {num_kv_heads}) * D], got {list(qkv.shape)}")
    batch, tokens, width = qkv.shape
    dim = width // heads
    if dim % 2 or dim == 0:
        raise ValueError(f"expected an even head_dim, got {dim}")
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(f"expected caches of one shape, got {list(k_cache.shape)} and {list(v_cache.shape)}")
    if page_table is None:
        if (k_cache.shape[0], k_cache.shape[1], k_cache.shape[3]) != (batch, num_kv_heads, dim):
            raise ValueError(f"expected caches [{batch}, {num_kv_heads}, max_len, {dim}], got {list(k_cache.shape)}")
    else:
        if (k_cache.shape[1], k_cache.shape[3]) != (num_kv_heads, dim) or k_cache.shape[2] < 1:
            raise ValueError(
                f"expected paged caches [pages, {num_kv_heads}, page_size, {dim}], got {list(k_cache.shape)}"
            )
        if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != batch:
            raise ValueError(
                f"expected an int32 page_table [{batch}, max_pages], got {list(page_table.shape)} {page_table.dtype}"
            )
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] != dim:
        raise ValueError(f"expected cos and sin [positions, {dim}], got {list(cos.shape)} and {list(sin.shape)}")
    if lengths.dtype != torch.int64 or lengths.shape != (batch,):
        raise ValueError(f"expected int64 lengths [{batch}], got {list(lengths.shape)} {lengths.dtype}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and norm.shape != (dim,):
            raise ValueError(f"expected {name} [{dim}], got {list(norm.shape)}")
    if positions is not None and positions.shape not in ((tokens,), (1, tokens), (batch, tokens)):
        raise ValueError(f"expected positions [{batch}, {tokens}] or [{tokens}], got {list(positions.shape)}")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"expected a bias [{width}], got {list(bias.shape)}")
    if new_tokens is not None and (new_tokens.dtype not in (torch.int32, torch.int64) or new_tokens.shape != (batch,)):
        raise ValueError(f"expected integer new_tokens [{batch}], got {list(new_tokens.shape)} {new_tokens.dtype}")


def check_ranges(
    lengths: Tensor,
    positions: Tensor | None,
    tokens: int,
    k_cache: Tensor,
    table_rows: int,
    page_table: Tensor | None,
    new_tokens: Tensor | None,
) -> None:
    """ValueError for a token outside cache or table. On a GPU the caller checks: reading them would stall the GPU."""
    if not lengths.is_cpu or not lengths.numel() or not tokens:
        return
    max_len = k_cache.shape[2] if page_table is None else k_cache.shape[2] * page_table.shape[1]
    slots = live = None
    if new_tokens is not None or page_table is not None:
        steps = torch.arange(tokens)
        live = steps < (tokens if new_tokens is None else new_tokens.unsqueeze(-1))
        live = live.expand(lengths.numel(), tokens)
        if new_tokens is not None and not 0 <= int(new_tokens.min()) <= int(new_tokens.max()) <= tokens:
            raise ValueError(f"expected new_tokens in [0, {tokens}], got {new_tokens.tolist()}")
        slots = (lengths.unsqueeze(-1) + steps)[live]
        if not slots.numel():
            return
        first, last = int(slots.min()), int(slots.max()) + 1
    else:
        first, last = int(lengths.min()), int(lengths.max()) + tokens
    if first < 0 or last > max_len:
        raise ValueError(f"a row starts at {first} or ends at {last}, outside a cache of {max_len} positions")
    if positions is not None:
        if live is not None:
            positions = positions.expand(live.shape)[live]
        first, last = int(positions.min()), int(positions.max()) + 1
    if first < 0 or last > table_rows:
        raise ValueError(f"positions {first} .. {last - 1} are outside the rotary table of {table_rows} rows")
    if page_table is not None:
        rows = torch.arange(lengths.numel()).unsqueeze(-1).expand(live.shape)[live]
        pages = page_table[rows, slots // k_cache.shape[2]]
        if int(pages.min()) < 0 or int(pages.max()) >= k_cache.shape[0]:
            raise ValueError(
                f"the page table names pages {int(pages.min())} .. {int(pages.max())} of {k_cache.shape[0]}"
            )


def native_qkv_reason(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *_: object,
    page_table: Tensor | None = None,
    new_tokens: Tensor | None = None,
    **__: object,
) -> str | None:
    """Why ``qkv_rope_cache`` would not take the native CPU path; None if it would."""
    reason = plain_reason(qkv)
    if reason is not None:
        return reason
    if page_table is not None or new_tokens is not None:
        return "the native kernel knows no pages and no padding"
    if k_cache.dtype != qkv.dtype or v_cache.dtype != qkv.dtype:
        return "the dtypes differ"
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return "the rotary tables are not float32"
    if k_cache.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {k_cache.shape[-1]} is above {MAX_HEAD_DIM}"
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "the last dimension of a cache is not dense"
    return None


def gpu_qkv_reason(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    positions: Tensor | None,
    bias: Tensor | None,
    page_table: Tensor | None,
    new_tokens: Tensor | None,
) -> str | None:
    """Why the GPU kernel would not take these operands; None if it would.

    Raises:
        ValueError: operands on different devices.
    """
    reason = kernels_reason(qkv)
    if reason is not None:
        return reason
    others = (cos, sin, lengths, k_cache, v_cache, q_norm, k_norm, positions, bias, page_table, new_tokens)
    device = qkv.device
    for x in others:
        if x is None:
            continue
        if x.device != device:
            raise ValueError(f"expected all operands on {device}, got one on {x.device}")
        if type(x) not in PLAIN_TYPES:
            return f"an operand is a {type(x).__name__}"
    if qkv.dtype not in GPU_DTYPES or k_cache.dtype not in GPU_DTYPES or v_cache.dtype not in GPU_DTYPES:
        return f"no kernel for {qkv.dtype} into {k_cache.dtype}"
    if cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        return "the rotary tables are not float32"
    for x in (q_norm, k_norm):
        if x is not None and x.dtype is not qkv.dtype:
            return "a norm's dtype differs from that of qkv"
    if k_cache.shape[-1] > MAX_GPU_HEAD_DIM:
        return f"head_dim {k_cache.shape[-1]} is above {MAX_GPU_HEAD_DIM}"
    for x in (k_cache, v_cache, cos, sin):
        if x.stride(-1) != 1:
            return "the last dimension of a cache or table is not dense"
    return None
