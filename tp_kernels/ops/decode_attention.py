"""Grouped-query attention over a KV cache: 1 to a few new tokens a row.

    decode_attention(q, k_cache, v_cache, lengths)   query i of row b sees the first lengths[b] + i + 1 positions

Shapes: q [B, Hq, T, D]; caches [B, Hkv, max_len, D]; query head h uses KV head ``h // (Hq // Hkv)``. With a page table
the caches are pages [num_pages, Hkv, page_size, D], and position p of row b is slot ``p % page_size`` of page
``page_table[b, p // page_size]``.

The native CPU path accumulates in fp32 and rounds once. It works in segments of 256 positions that are put together in
order, so its bits depend on neither the threads nor the other rows of the batch; pages are gathered before it.

The GPU path (16-bit floats; head_dim up to 256; T * Hq / Hkv up to 64) is ``kernels/decode_attention.py``: fp32 softmax
and accumulation, the weights rounded to the queries' dtype before they meet the values, as in PyTorch's flash kernels.
The positions of a row are shared out among programs and merged in order: the same call gives the same bits. Other
shapes, chunks of a prompt above all, go through PyTorch's attention with a mask.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.ops._gpu import autocast_dtype, gpu_of, kernels_reason, on_gpu, takes_kernels
from tp_kernels.ops._library import CPU_DTYPES, define_op, needs_grad, plain_cpu, plain_reason, watched
from tp_kernels.ops.attention import allowed_mask, check_attention, plain_attention
from tp_kernels.ops.kernels import decode_config
from tp_kernels.ops.tuning import Choice, Entry, choose_measured, configuration, lookup

__all__ = ["choose_decode_attention", "decode_attention", "decode_attention_reference"]

# Most query rows (tokens times the heads of a group) for which reading the cache once per query beats PyTorch's GEMMs.
MAX_NATIVE_QUERIES = 32
MAX_HEAD_DIM = 256  # csrc/cpu/kernels.h

_cpu_decode_attention = native.cpu_decode_attention
_num_threads = torch.get_num_threads

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def gather_pages(
    k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """The caches as [B, Hkv, n, D]: all pages, or up to the longest row where ``lengths`` can be read for nothing."""
    page_size, count = k_cache.shape[2], page_table.shape[1]
    if lengths.is_cpu and lengths.numel():
        count = min(count, -(-(int(lengths.max()) + tokens) // page_size))
    # What the table says about pages that a row has not reached means nothing.
    beyond = torch.arange(count, device=lengths.device) * page_size >= (lengths + tokens).view(-1, 1)
    table = page_table[:, :count].masked_fill(beyond, 0)
    if table.is_cpu and table.numel() and not 0 <= int(table.min()) <= int(table.max()) < k_cache.shape[0]:
        raise ValueError(f"page_table names pages {int(table.min())} .. {int(table.max())} of {k_cache.shape[0]}")
    k, v = (cache[table].transpose(1, 2).flatten(2, 3) for cache in (k_cache, v_cache))
    return k, v


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch ``decode_attention``."""
    if page_table is not None:
        k_cache, v_cache = gather_pages(k_cache, v_cache, lengths, page_table, q.shape[2])
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    positions = lengths.unsqueeze(-1) + torch.arange(q.shape[2], device=q.device)  # [B, T]
    allowed = allowed_mask(positions, k_cache.shape[2], True, sliding_window).unsqueeze(1)
    # Slots behind the end are uninitialised and may hold NaN: 0 * NaN would leak into the weighted sum.
    used = torch.arange(k_cache.shape[2], device=q.device) < (lengths + q.shape[2]).view(-1, 1, 1)
    v = torch.where(used.unsqueeze(-1), v_cache, torch.zeros((), dtype=v_cache.dtype, device=q.device))
    return plain_attention(q, k_cache, v, scale, allowed)


def _check_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, sliding_window: int | None, page_table: Tensor | None
) -> None:
    if page_table is None:
        check_attention(q, k_cache, v_cache, sliding_window)
    else:
        _check_pages(q, k_cache, v_cache, page_table)
        check_attention(q[:0], k_cache[:0], v_cache[:0], sliding_window)
    if lengths.dtype != torch.int64 or lengths.shape != q.shape[:1]:
        raise ValueError(f"expected int64 lengths [{q.shape[0]}], got {list(lengths.shape)} {lengths.dtype}")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("lengths", lengths), ("page_table", page_table)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")


def _check_pages(q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor) -> None:
    if q.dim() != 4 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "expected q [B, Hq, T, D] and pages [num_pages, Hkv, page_size, D], got "
            f"{tuple(q.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"expected an int32 page_table [{q.shape[0]}, max_pages], got {list(page_table.shape)} {page_table.dtype}"
        )
    page_size = k_cache.shape[2]
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"expected a power of two of positions a page, got {page_size}")


def _check_fits(lengths: Tensor, tokens: int, max_len: int) -> None:
    """ValueError when a row leaves the cache. On a GPU the caller checks: reading ``lengths`` would stall the GPU."""
    if lengths.is_cpu and lengths.numel() and tokens:
        first, last = int(lengths.min()), int(lengths.max()) + tokens
        if first < 0 or last > max_len:
            raise ValueError(f"a row starts at {first} or ends at {last}, outside a cache of {max_len} positions")


def plain_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float, sliding_window: int | None
) -> Tensor:
    """PyTorch's SDPA over the used part of the cache; for many queries at once (a chunk of a prompt)."""
    tokens, used = q.shape[2], k_cache.shape[2]
    if lengths.is_cpu and lengths.numel():
        used = int(lengths.max()) + tokens
    k, v = k_cache[:, :, :used], v_cache[:, :, :used]
    ends = (lengths + tokens).view(-1, 1, 1)
    slots = torch.arange(used, device=q.device)
    # Rows of a batch differ in length; behind the end of a row there may be NaN, which 0 * NaN would let through.
    if not lengths.is_cpu or int(lengths.min()) + tokens < used:
        v = torch.where((slots < ends).unsqueeze(-1), v, torch.zeros((), dtype=v.dtype, device=v.device))
        k = torch.where((slots < ends).unsqueeze(-1), k, torch.zeros((), dtype=k.dtype, device=k.device))
    positions = lengths.unsqueeze(-1) + torch.arange(tokens, device=q.device)
    allowed = allowed_mask(positions, used, True, sliding_window).unsqueeze(1)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=allowed, scale=scale, enable_gqa=grouped
    )


def _native_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None, sliding_window: int | None
) -> Tensor | None:
    """The native kernel's result, or None if it does not take these operands."""
    dtype = q.dtype
    code = CPU_DTYPES.get(dtype)
    if code is None or k_cache.dtype is not dtype or v_cache.dtype is not dtype or q.dim() != 4 or k_cache.dim() != 4:
        return None
    batch, heads, tokens, dim = q.shape
    batch_k, kv_heads, max_len, dim_k = k_cache.shape
    if (
        batch != batch_k
        or dim != dim_k
        or not 0 < dim <= MAX_HEAD_DIM
        or not kv_heads
        or heads % kv_heads
        or tokens * (heads // kv_heads) > MAX_NATIVE_QUERIES
        or v_cache.shape != k_cache.shape
        or lengths.dtype is not torch.int64
        or lengths.numel() != batch
        or lengths.dim() != 1
        or not lengths.is_cpu
        or not (k_cache.is_cpu and v_cache.is_cpu)
    ):
        return None
    q_batch, q_head, q_token, q_dim = q.stride()
    k_batch, k_head, k_position, k_dim = k_cache.stride()
    v_batch, v_head, v_position, v_dim = v_cache.stride()
    if (q_dim != 1 or k_dim != 1 or v_dim != 1) and dim > 1:
        return None
    if sliding_window is not None and sliding_window < 1:
        return None
    out = q.new_empty(batch, tokens, heads, dim)
    lengths = lengths.contiguous()
    _cpu_decode_attention(
        out.data_ptr(),
        q.data_ptr(),
        q_batch,
        q_head,
        q_token,
        k_cache.data_ptr(),
        k_batch,
        k_head,
        k_position,
        v_cache.data_ptr(),
        v_batch,
        v_head,
        v_position,
        lengths.data_ptr(),
        batch,
        tokens,
        heads,
        kv_heads,
        dim,
        max_len,
        sliding_window or 0,
        dim**-0.5 if scale is None else scale,
        code,
        _num_threads(),
    )
    return out.transpose(1, 2)


def native_decode_reason(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **_: object) -> str | None:
    """Why ``decode_attention`` would not take the native CPU path; None if it would."""
    reason = plain_reason(q, k_cache, v_cache)
    if reason is not None:
        return reason
    if k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        return "the dtypes differ"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is above {MAX_HEAD_DIM}"
    queries = q.shape[2] * (q.shape[1] // k_cache.shape[1])
    if queries > MAX_NATIVE_QUERIES:
        return f"{queries} queries a KV head: above {MAX_NATIVE_QUERIES}, PyTorch's attention was measured to be faster"
    if any(t.stride(-1) != 1 for t in (q, k_cache, v_cache)):
        return "the last dimension is not dense"
    return None


def _kernel_reason(q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor | None) -> str | None:
    """Why the GPU kernel does not take these (valid) operands; None if it does."""
    dtype = autocast_dtype(q) or q.dtype
    if dtype not in _KERNEL_DTYPES or k_cache.dtype not in _KERNEL_DTYPES or v_cache.dtype not in _KERNEL_DTYPES:
        return f"the kernel takes 16-bit floats, got {dtype} over {k_cache.dtype} and {v_cache.dtype}"
    if not 0 < q.shape[3] <= decode_config.MAX_HEAD_DIM:
        return f"head_dim {q.shape[3]} is above {decode_config.MAX_HEAD_DIM}"
    rows = q.shape[2] * (q.shape[1] // k_cache.shape[1])
    if rows > decode_config.MAX_ROWS:
        return (
            f"{rows} queries a KV head: above {decode_config.MAX_ROWS}, PyTorch's attention is taken, as for a prompt"
        )
    if any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in (q, k_cache, v_cache)):
        return "the last dimension is not dense"
    if max(k_cache.stride(2), v_cache.stride(2)) > decode_config.MAX_STRIDE:
        return f"positions are more than {decode_config.MAX_STRIDE} elements apart"
    if page_table is not None and page_table.stride(-1) != 1 and page_table.shape[1] > 1:
        return "the page table is not dense in its last dimension"
    return None


def _measured(
    q: Tensor, k_cache: Tensor, sliding_window: int | None, page_table: Tensor | None
) -> tuple[Entry | None, int]:
    """The table's entry for a call that the kernel can take, and the most positions that a row of it reads."""
    batch, heads, tokens, dim = q.shape
    kv_heads, length, page = k_cache.shape[1], k_cache.shape[2], 0
    if page_table is not None:
        length, page = length * page_table.shape[1], length
    capacity = decode_config.capacity_of(length, tokens, sliding_window)
    rows = tokens * (heads // kv_heads)
    sizes = {"b": batch, "hkv": kv_heads, "rows": rows, "d": dim, "s": capacity, "page": page}
    return lookup("decode_attention", gpu_of(q), k_cache.dtype, **sizes), capacity


def choose_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    page_table: Tensor | None = None,
) -> Choice:
    """Which GPU path the call takes, "triton" or "torch", and why; arguments as for ``decode_attention``."""
    reason = kernels_reason(q) or _kernel_reason(q, k_cache, v_cache, page_table)
    if reason is not None:
        return Choice("torch", reason)
    entry, capacity = _measured(q, k_cache, sliding_window, page_table)
    unmeasured = (
        f"not measured on {gpu_of(q).name}; PyTorch's attention would need a mask tensor for rows of different length, "
        f"and would read all {capacity} positions of every row"
    )
    return choose_measured(entry, unmeasured)


def _decode_impl(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    sliding_window: int | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    if page_table is None and plain_cpu(q):
        out = _native_decode(q, k_cache, v_cache, lengths, scale, sliding_window)
        if out is not None:
            return out
    _check_decode(q, k_cache, v_cache, lengths, sliding_window, page_table)
    max_len = k_cache.shape[2] if page_table is None else k_cache.shape[2] * page_table.shape[1]
    _check_fits(lengths, q.shape[2], max_len)
    if q.numel() == 0:
        return torch.empty_like(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if takes_kernels(q) and _kernel_reason(q, k_cache, v_cache, page_table) is None:
        entry, _ = _measured(q, k_cache, sliding_window, page_table)
        if entry is None or entry.path == "triton":
            from tp_kernels.ops.kernels import decode_attention as kernels

            config = configuration(entry, decode_config.Config)
            return kernels.decode_attention(q, k_cache, v_cache, lengths, scale, sliding_window, page_table, config)
    if page_table is not None:
        k_cache, v_cache = gather_pages(k_cache, v_cache, lengths, page_table, q.shape[2])
        if plain_cpu(q):
            return _decode_impl(q, k_cache, v_cache, lengths, scale, sliding_window)
    return plain_decode(q, k_cache, v_cache, lengths, scale, sliding_window)


def _decode_op_impl(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    sliding_window: int | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    # One memory order on every path, as promised to the tracer.
    out = _decode_impl(q, k_cache, v_cache, lengths, scale, sliding_window, page_table)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _decode_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    sliding_window: int | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    _check_decode(q, k_cache, v_cache, lengths, sliding_window, page_table)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


_DECODE_OP = define_op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float? scale=None, "
    "int? sliding_window=None, Tensor? page_table=None) -> Tensor",
    _decode_op_impl,
    _decode_fake,
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    page_table: Tensor | None = None,
) -> Tensor:
    """Attention of T new tokens over a KV cache that already holds their keys and values.

    Query i of row b is at position ``lengths[b] + i`` and sees the cached positions up to its own, within the window.
    An inference op: it has no gradient, call it under ``torch.inference_mode()`` or ``torch.no_grad()``. On a GPU under
    autocast the queries are cast, as ``scaled_dot_product_attention`` does.

    Args:
        q: [B, Hq, T, D], the new tokens.
        k_cache: [B, Hkv, max_len, D]; the new tokens' keys stand at ``lengths[b] .. lengths[b] + T - 1``. With a page
            table [num_pages, Hkv, page_size, D] in any strides; page_size is a power of two.
        v_cache: like ``k_cache``.
        lengths: int64 [B], tokens in the cache before the new ones. A row that leaves the cache is an error on the CPU;
            on a GPU, where looking would stall it, the caller sees to it.
        scale: factor of the scores, ``1 / sqrt(D)`` by default.
        sliding_window: a query sees only the last ``sliding_window`` positions, its own included.
        page_table: int32 [B, max_pages]: position p of row b is slot ``p % page_size`` of page
            ``page_table[b, p // page_size]``. Entries beyond a row's last page are not looked at.

    Returns:
        [B, Hq, T, D]; from a kernel its memory order is [B, T, Hq, D], so that
        ``out.transpose(1, 2).reshape(B, T, Hq * D)`` is free.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a row would not fit into the cache, or a gradient would be
            needed.
    """
    if needs_grad(q, k_cache, v_cache):
        raise ValueError("decode_attention has no gradient: call it under torch.inference_mode() or torch.no_grad()")
    if on_gpu(q):
        dtype = autocast_dtype(q)
        q = q if dtype is None else q.to(dtype)
    if watched():
        return _DECODE_OP(q, k_cache, v_cache, lengths, scale, sliding_window, page_table)
    return _decode_impl(q, k_cache, v_cache, lengths, scale, sliding_window, page_table)
