"""Rotary position embedding in Hugging Face's rotate-half layout.

    rotated = x * cos + cat(-x[..., D/2:], x[..., :D/2], -1) * sin

Shapes: q [B, Hq, T, D], k [B, Hkv, T, D]; cos, sin [T, D] or [B, T, D], both halves of D equal. Numerics: on the CPU
computed in the dtype of q and k, as transformers does (cos and sin are cast to it first); the GPU kernel computes in
fp32, from cos and sin as they are given, and rounds once.

On a GPU one launch rotates q and k, read where the projection left them; the gradient is the same kernel with the angle
turned around. It saves no activation: PyTorch's form reads and writes q and k about four times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tp_kernels.ops._gpu import gpu_of, kernels_reason, on_gpu
from tp_kernels.ops._library import PLAIN_TYPES, define_op, needs_grad, watched
from tp_kernels.ops.tuning import Choice, Entry, choose_measured, configuration, lookup

__all__ = ["apply_rope", "apply_rope_reference", "choose_apply_rope"]

MAX_GPU_HEAD_DIM = 512
_GPU_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch ``apply_rope``."""
    cos = cos.unsqueeze(-3).to(q.dtype)  # [1, T, D] or [B, 1, T, D]: broadcasts over heads
    sin = sin.unsqueeze(-3).to(q.dtype)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _plain_shapes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel's op can stand for the call; also asked in traced code, hence of shapes and dtypes alone."""
    return (
        q.dim() == 4
        and k.dim() == 4
        and q.shape[0] == k.shape[0]
        and q.dtype == k.dtype
        and (cos.dim() == 2 or (cos.dim() == 3 and (cos.shape[0] == 1 or cos.shape[0] == q.shape[0])))
        and not needs_grad(cos, sin)
    )


def _gpu_reason(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why the GPU kernel would not take these operands; None if it would."""
    reason = kernels_reason(q)
    if reason is not None:
        return reason
    if not _plain_shapes(q, k, cos, sin):
        return "the shapes or dtypes of q and k differ, or a table needs a gradient"
    for x in (k, cos, sin):
        if x.device != q.device:
            raise ValueError(f"expected all operands on {q.device}, got one on {x.device}")
        if type(x) not in PLAIN_TYPES:
            return f"an operand is a {type(x).__name__}"
    if q.dtype not in _GPU_DTYPES or cos.dtype not in _GPU_DTYPES or sin.dtype not in _GPU_DTYPES:
        return f"no kernel for {q.dtype} with tables in {cos.dtype}"
    if q.shape[-1] > MAX_GPU_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is above {MAX_GPU_HEAD_DIM}"
    return None


def _decide(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> tuple[str | None, Entry | None]:
    """(why the kernel does not run, or None; the measurement that decided, or None if there is none)."""
    reason = _gpu_reason(q, k, cos, sin)
    if reason is not None:
        return reason, None
    batch, heads, tokens, dim = q.shape
    op = "rope_backward" if inverse else "rope"
    entry = lookup(op, gpu_of(q), q.dtype, m=batch * tokens, heads=heads, kv_heads=k.shape[1], head_dim=dim)
    return "it was measured to be slower" if entry is not None and entry.path != "triton" else None, entry


def choose_apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Choice:
    """Which path a call on a GPU takes, "triton" or "torch", and why; without regard to a gradient."""
    reason, entry = _decide(q, k, cos, sin)
    if reason is not None and entry is None:
        return Choice("torch", reason)
    return choose_measured(entry, f"not measured on {gpu_of(q).name}; one launch and one pass instead of several")


def _empty_rotated(x: Tensor, token_major: bool) -> Tensor:
    """Room for the result: [B, H, T, D], in memory [B, T, H, D] if ``token_major``."""
    batch, heads, tokens, dim = x.shape
    if token_major:
        return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, tokens, dim)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_major: bool, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate (back) in the promised memory order, by the path that ``choose_apply_rope`` names."""
    outs = _empty_rotated(q, token_major), _empty_rotated(k, token_major)
    reason, entry = _decide(q, k, cos, sin, inverse)
    if reason is not None:
        for out, x in zip(outs, apply_rope_reference(q, k, cos, -sin if inverse else sin), strict=True):
            out.copy_(x)
        return outs
    from tp_kernels.ops.kernels import rope

    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    rope.rope(*outs, q, k, cos, sin, inverse=inverse, config=configuration(entry, rope.Config))
    return outs


def _forward_impl(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_major: bool) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, token_major)


def _backward_impl(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_major: bool) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, token_major, inverse=True)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_major: bool) -> tuple[Tensor, Tensor]:
    return _empty_rotated(q, token_major), _empty_rotated(k, token_major)


_OPERANDS = "Tensor cos, Tensor sin, bool token_major) -> (Tensor, Tensor)"
_FORWARD_OP = define_op(f"apply_rope_forward(Tensor q, Tensor k, {_OPERANDS}", _forward_impl, _fake)
_BACKWARD_OP = define_op(f"apply_rope_backward(Tensor grad_q, Tensor grad_k, {_OPERANDS}", _backward_impl, _fake)


class _Rope(torch.autograd.Function):
    """A rotation, whose gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_major: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.token_major = token_major
        return (_FORWARD_OP if watched() else _forward_impl)(q, k, cos, sin, token_major)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        run = _BACKWARD_OP if watched() else _backward_impl
        return *run(grad_q, grad_k, cos, sin, ctx.token_major), None, None, None


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: [B, Hq, T, D]; any strides, for example a view of the fused projection's result.
        k: [B, Hkv, T, D].
        cos: [T, D] or [B, T, D], already gathered for the positions, both halves of D equal.
        sin: like ``cos``.

    Returns:
        The rotated ``(q, k)``; differentiable (on a GPU once). On a GPU both lie in memory as [B, T, H, D] unless ``q``
        is contiguous.

    Raises:
        ValueError: shapes do not match, or operands on a GPU and elsewhere.
    """
    if q.shape[-1] % 2 or q.shape[-1] != k.shape[-1] or q.shape[-2] != k.shape[-2]:
        raise ValueError(f"q and k must agree in T and an even D, got {tuple(q.shape)} and {tuple(k.shape)}")
    if cos.shape != sin.shape or cos.shape[-2:] != q.shape[-2:]:
        raise ValueError(
            f"cos and sin must end in [T, D] = {list(q.shape[-2:])}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if on_gpu(q) and _plain_shapes(q, k, cos, sin):
        traced = watched()
        if traced or _decide(q, k, cos, sin)[0] is None:
            token_major = not q.is_contiguous()
            if needs_grad(q, k):
                if traced:  # Dynamo refuses one tensor in two places
                    k, sin = k.view_as(k), sin.view_as(sin)
                return _Rope.apply(q, k, cos, sin, token_major)
            return (_FORWARD_OP if traced else _forward_impl)(q, k, cos, sin, token_major)
    return apply_rope_reference(q, k, cos, sin)
