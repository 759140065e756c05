"""Native CPU calls with their operands settled beforehand, for work that repeats on the same buffers.

A decode step of a small model makes hundreds of calls of a few microseconds; checking shapes, allocating results and
taking addresses then costs as much as the work. Each function here does that once and returns a callable without
arguments that computes into ``out``; the same kernel as the op of the same name, hence the same bits.

The callable holds addresses, not tensors: whoever keeps it must keep the operands alive and in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tp_kernels._native import native
from tp_kernels.ops._library import CPU_DTYPES
from tp_kernels.ops.decode_attention import MAX_HEAD_DIM, MAX_NATIVE_QUERIES
from tp_kernels.ops.linear import MAX_NATIVE_ROWS

__all__ = [
    "bind_add_rms_norm",
    "bind_decode_attention",
    "bind_linear",
    "bind_qkv_rope_cache",
    "bind_rms_norm",
    "bind_swiglu_linear",
    "binding_reason",
]

Call = Callable[[], None]
_SILU = 1  # code of csrc/cpu/kernels.h


def binding_reason(dtype: torch.dtype, rows: int, head_dim: int, queries_per_kv_head: int) -> str | None:
    """Why steps of ``rows`` tokens cannot be bound, whatever their buffers; None if they can."""
    if dtype not in CPU_DTYPES:
        return f"{dtype} has no native kernel"
    if rows > MAX_NATIVE_ROWS[CPU_DTYPES[dtype]]:
        return f"{rows} rows: above {MAX_NATIVE_ROWS[CPU_DTYPES[dtype]]}, PyTorch's GEMM was measured to be faster"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is above {MAX_HEAD_DIM}"
    if queries_per_kv_head > MAX_NATIVE_QUERIES:
        return f"{queries_per_kv_head} queries a KV head: above {MAX_NATIVE_QUERIES}"
    return None


def _require(shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]], dtype: torch.dtype) -> int:
    """The dtype's code; ValueError unless every tensor is dense, on the CPU, and of that dtype and the given shape."""
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if not tensor.is_cpu or tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected a dense CPU tensor {list(shape)} of {dtype}, got {list(tensor.shape)} {tensor.dtype}"
            )
    if dtype not in CPU_DTYPES:
        raise ValueError(f"expected one of {', '.join(map(str, CPU_DTYPES))}, got {dtype}")
    return CPU_DTYPES[dtype]


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bind_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, gated: bool) -> Call:
    (m, n), k = out.shape, x.shape[1]
    rows = 2 * n if gated else n
    code = _require(
        {"out": (out, (m, n)), "x": (x, (m, k)), "weight": (weight, (rows, k)), "bias": (bias, (rows,))}, x.dtype
    )
    addresses = _at(out), _at(x), _at(weight), _at(bias), 0
    return partial(native.cpu_linear, *addresses, m, n, k, k, k, n, code, activation, gated, torch.get_num_threads())


def bind_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    """``out = linear(x, weight, bias)`` for ``x`` [M, K], ``weight`` [N, K], ``out`` [M, N]."""
    return _bind_linear(out, x, weight, bias, 0, False)


def bind_swiglu_linear(out: Tensor, x: Tensor, w_gate_up: Tensor, bias: Tensor | None = None) -> Call:
    """``out = swiglu_linear(x, w_gate_up, bias)`` for ``x`` [M, K], ``w_gate_up`` [2 * N, K], ``out`` [M, N]."""
    return _bind_linear(out, x, w_gate_up, bias, _SILU, True)


def bind_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Call:
    """``out = rms_norm(x, weight, eps)`` for ``x`` and ``out`` [M, H]."""
    rows, width = x.shape
    code = _require({"out": (out, (rows, width)), "x": (x, (rows, width)), "weight": (weight, (width,))}, x.dtype)
    threads = torch.get_num_threads()
    return partial(native.cpu_rms_norm, _at(out), 0, _at(x), 0, _at(weight), rows, width, eps, code, threads)


def bind_add_rms_norm(out: Tensor, summed: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call:
    """``out, summed = add_rms_norm(x, residual, weight, eps)``, all but the weight [M, H]."""
    shape = rows, width = tuple(x.shape)
    operands = {name: (t, shape) for name, t in (("out", out), ("summed", summed), ("x", x), ("residual", residual))}
    code = _require({**operands, "weight": (weight, (width,))}, x.dtype)
    addresses = _at(out), _at(summed), _at(x), _at(residual), _at(weight)
    return partial(native.cpu_rms_norm, *addresses, rows, width, eps, code, torch.get_num_threads())


def bind_qkv_rope_cache(
    out: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Call:
    """``qkv_rope_cache`` of one token a row: ``qkv`` [B, (Hq + 2 * Hkv) * D], ``out`` [B, Hq, D]."""
    (batch, heads, dim), (_, kv_heads, max_len, _) = out.shape, k_cache.shape
    width, table = (heads + 2 * kv_heads) * dim, tuple(cos.shape)
    _check_cache(k_cache, v_cache, lengths, batch, kv_heads, max_len, dim, qkv.dtype)
    _require({"cos": (cos, (table[0], dim)), "sin": (sin, table)}, torch.float32)
    code = _require(
        {
            "out": (out, (batch, heads, dim)),
            "qkv": (qkv, (batch, width)),
            "q_norm": (q_norm, (dim,)),
            "k_norm": (k_norm, (dim,)),
        },
        qkv.dtype,
    )
    call = partial(native.cpu_qkv_rope_cache, _at(out), _at(qkv), _at(cos), _at(sin), _at(lengths), 0, 0)
    call = partial(call, _at(k_cache), *k_cache.stride()[:3], _at(v_cache), *v_cache.stride()[:3])
    sizes = batch, 1, heads, kv_heads, dim, max_len, table[0]
    return partial(call, _at(q_norm), _at(k_norm), eps, *sizes, code, torch.get_num_threads())


def bind_decode_attention(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> Call:
    """``decode_attention`` of one token a row: ``q`` and ``out`` [B, Hq, D]."""
    (batch, heads, dim), (_, kv_heads, max_len, _) = q.shape, k_cache.shape
    _check_cache(k_cache, v_cache, lengths, batch, kv_heads, max_len, dim, q.dtype)
    if heads % kv_heads:
        raise ValueError(f"expected a multiple of {kv_heads} KV heads, got {heads} query heads")
    code = _require({"out": (out, (batch, heads, dim)), "q": (q, (batch, heads, dim))}, q.dtype)
    call = partial(native.cpu_decode_attention, _at(out), _at(q), heads * dim, dim, heads * dim)
    call = partial(call, _at(k_cache), *k_cache.stride()[:3], _at(v_cache), *v_cache.stride()[:3], _at(lengths))
    sizes = batch, 1, heads, kv_heads, dim, max_len, sliding_window or 0
    return partial(call, *sizes, scale, code, torch.get_num_threads())


def _check_cache(k_cache, v_cache, lengths, batch, kv_heads, max_len, dim, dtype) -> None:
    shape = (batch, kv_heads, max_len, dim)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not tensor.is_cpu or tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a CPU tensor {list(shape)} of {dtype}, dense in its last dimension, got "
                f"{list(tensor.shape)} {tensor.dtype}"
            )
    if not lengths.is_cpu or lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        raise ValueError(f"expected int64 lengths [{batch}] on the CPU, got {list(lengths.shape)} {lengths.dtype}")
