"""Flash attention with its log-sum-exp: whole batches or packed sequences of different lengths, differentiable.

    scores = q @ k.T * scale                    (masked)
    out, lse = softmax(scores) @ v, logsumexp(scores)

Shapes: q [B, Hq, S, D], k and v [B, Hkv, L, D]; packed: [total, H, D] with ``cu_seqlens`` int32 [B + 1]. Query head h
uses KV head ``h // (Hq // Hkv)``. Query i stands at position i + L - S among the keys. A query that sees no key gives
0, and -inf in ``lse``.

Numerics: scores, statistics and accumulators are fp32; the weights are rounded to the dtype before they meet the
values; one rounding at the end. The same input gives the same bits, gradients included. Where a gradient reaches
``lse`` (ring attention), it is one more term of the row sums that the backward needs anyway.

Paths on a GPU: "gluon" (warp-specialised, Hopper), "triton" (every GPU), "torch" (scaled_dot_product_attention, which
picks among its own kernels). PyTorch keeps the plain calls until a measurement says otherwise, and never gets those for
which it would need a mask tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tp_kernels.ops import tuning
from tp_kernels.ops._flash_choice import choose, choose_backward, fits, gluon_module, sdpa_takes, unfit_reason
from tp_kernels.ops._flash_reference import Form, composition, reference, reference_gradients, varlen_reference
from tp_kernels.ops._gpu import on_gpu, under_autocast
from tp_kernels.ops._library import PLAIN_TYPES, define_op, needs_grad, watched
from tp_kernels.ops.attention import check_attention

__all__ = [
    "choose_flash_attention",
    "choose_flash_attention_varlen",
    "flash_attention",
    "flash_attention_reference",
    "flash_attention_varlen",
    "flash_attention_varlen_reference",
]


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch ``flash_attention``, in fp32 with one rounding at the end."""
    out, lse = reference(q, k, v, causal, sliding_window, _scale(q, scale))
    return (out, lse) if return_lse else out


def flash_attention_varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch ``flash_attention_varlen``: one sequence after the other."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = varlen_reference(q, k, v, Form(*lengths, causal, sliding_window, _scale(q, scale)))
    return (out, lse) if return_lse else out


def choose_flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuning.Choice:
    """Which GPU path ``flash_attention`` takes for these arguments ("gluon", "triton" or "torch"), and why."""
    form = Form(None, None, q.shape[2], k.shape[2], causal, sliding_window, _scale(q, scale))
    return choose(*under_autocast(q, k, v), form, needs_lse=return_lse, training=needs_grad(q, k, v))


def choose_flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuning.Choice:
    """Which GPU path ``flash_attention_varlen`` takes for these arguments, and why."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    form = Form(*lengths, causal, sliding_window, _scale(q, scale))
    return choose(*under_autocast(q, k, v), form, needs_lse=return_lse, training=needs_grad(q, k, v))


def _check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, window: int | None
) -> None:
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(
            f"expected q [total_q, Hq, D] and k, v [total_k, Hkv, D], got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    check_attention(
        q.unsqueeze(0).transpose(1, 2), k.unsqueeze(0).transpose(1, 2), v.unsqueeze(0).transpose(1, 2), window
    )
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu.dim() != 1 or cu.dtype != torch.int32 or cu.shape[0] < 2 or cu.device != q.device:
            raise ValueError(
                f"expected {name} int32 [B + 1] on {q.device}, got {tuple(cu.shape)} {cu.dtype} on {cu.device}"
            )
    if cu_q.shape != cu_k.shape:
        raise ValueError(f"cu_seqlens_q {tuple(cu_q.shape)} and cu_seqlens_k {tuple(cu_k.shape)} differ in length")
    if max_q < 0 or max_k < 0:
        raise ValueError(f"the longest sequences cannot be {max_q} and {max_k}")


# Launches -------------------------------------------------------------------------------------------------------------


def _new_like(x: Tensor, varlen: bool) -> Tensor:
    """Result of ``x``'s shape with tokens before heads in memory, so that merging the heads afterwards is free.

    Packed results start as zeros: rows behind the last sequence are nobody's.
    """
    if varlen:
        return x.new_zeros(x.shape)
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _ordered(out: Tensor) -> Tensor:
    """``out`` in the memory order of ``_new_like``, which every path of an op promises to the tracer."""
    return out.contiguous() if out.dim() == 3 else out.transpose(1, 2).contiguous().transpose(1, 2)


def _dense(x: Tensor) -> Tensor:
    """``x`` as the kernels take it: last dimension dense, 128 rows within 32-bit offsets."""
    row = x.stride(0) if x.dim() == 3 else x.stride(2)
    return x if x.stride(-1) == 1 and row < 1 << 24 else x.contiguous()


def _launch_forward(
    choice: tuning.Choice, q: Tensor, k: Tensor, v: Tensor, form: Form, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if choice.path == "gluon":
        module = gluon_module()
    else:
        from tp_kernels.ops.kernels import flash_attention as module
    varlen, lse = form.cu_q is not None, None
    out = _new_like(q, varlen)
    if with_lse and varlen:
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    elif with_lse:
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    module.flash_forward(
        out,
        lse,
        _dense(q),
        _dense(k),
        _dense(v),
        **form._asdict(),
        config=tuning.configuration(choice, module.Config),
    )
    return out, lse


def _form(q: Tensor, k: Tensor, *arguments: Any) -> Form:
    form = Form(*arguments)
    return form if form.cu_q is not None else form._replace(max_q=q.shape[2], max_k=k.shape[2])


# Ops ------------------------------------------------------------------------------------------------------------------


def _attention_impl(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """The output alone, by any path; ``arguments`` are those of ``Form``, here and below."""
    form = _form(q, k, *arguments)
    if on_gpu(q):
        choice = choose(q, k, v, form)
        if choice.path != "torch":
            return _launch_forward(choice, q, k, v, form, False)[0]
    return composition(q, k, v, form, False)[0]


def _op_impl(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return _ordered(_attention_impl(q, k, v, *arguments))


def _op_fake(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, *rest: Any) -> Tensor:
    if cu_q is not None:
        return q.new_empty(q.shape)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _forward_impl(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) by our kernels, or plainly where they cannot run."""
    form = _form(q, k, *arguments)
    if on_gpu(q):
        choice = choose(q, k, v, form, needs_lse=True)
        if choice.path != "torch":
            return _launch_forward(choice, q, k, v, form, True)
    out, lse = composition(q, k, v, form, True)
    return _ordered(out), lse.contiguous()


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (q.shape[1], q.shape[0]) if cu_q is not None else q.shape[:3]
    return _op_fake(q, k, v, cu_q), q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_impl(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    form = _form(q, k, *arguments)
    dq, dk, dv = (_new_like(x, form.cu_q is not None) for x in (q, k, v))
    if unfit_reason(q, k, v, form.scale) is not None or type(grad_out) not in PLAIN_TYPES:
        reference_gradients((dq, dk, dv), grad_out, grad_lse, q, k, v, form)
        return dq, dk, dv
    choice = choose_backward(q, k, v, form)
    grad_out = _dense(grad_out.to(q.dtype))
    if choice.path == "gluon":
        module = gluon_module(backward=True)
        steps = [stride * grad_out.element_size() for stride in grad_out.stride()[:-1]]
        if grad_out.data_ptr() % 16 or any(step <= 0 or step % 16 for step in steps):  # TMA takes neither of these
            grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    else:
        from tp_kernels.ops.kernels import flash_attention_backward as module
    module.flash_backward(
        dq,
        dk,
        dv,
        grad_out,
        _dense(q),
        _dense(k),
        _dense(v),
        _dense(out),
        lse.contiguous(),
        **form._asdict(),
        grad_lse=None if grad_lse is None else grad_lse.contiguous(),
        config=tuning.configuration(choice, module.Config),
    )
    return dq, dk, dv


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _op_fake(q, k, v, rest[0]), _op_fake(k, k, v, rest[0]), _op_fake(v, k, v, rest[0])


_REST = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, "
    "int? sliding_window, float scale)"
)
_OP = define_op(f"flash_attention(Tensor q, Tensor k, Tensor v, {_REST} -> Tensor", _op_impl, _op_fake)
_FORWARD_OP = define_op(
    f"flash_attention_forward(Tensor q, Tensor k, Tensor v, {_REST} -> (Tensor, Tensor)", _forward_impl, _forward_fake
)
_BACKWARD_OP = define_op(
    "flash_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_REST} -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _FlashAttention(torch.autograd.Function):
    """out, or (out, lse), of the own kernels; ``arguments`` are those of ``Form`` after the two offset tensors."""

    @staticmethod
    def forward(
        ctx: Any, return_lse: bool, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, *arguments: Any
    ) -> Any:
        out, lse = (_FORWARD_OP if watched() else _forward_impl)(q, k, v, cu_q, cu_k, *arguments)
        ctx.save_for_backward(q, k, v, cu_q, cu_k, out, lse)
        ctx.arguments = arguments
        return (out, lse) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None = None) -> Any:
        q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
        backward = _BACKWARD_OP if watched() else _backward_impl
        grads = backward(grad_out, grad_lse, q, k, v, out, lse, cu_q, cu_k, *ctx.arguments)
        return None, *grads, None, None, *(None for _ in ctx.arguments)


# Public ---------------------------------------------------------------------------------------------------------------


def _run(q: Tensor, k: Tensor, v: Tensor, form: Form, return_lse: bool) -> Any:
    traced = watched()
    if not needs_grad(q, k, v):
        if return_lse:
            return (_FORWARD_OP if traced else _forward_impl)(q, k, v, *form)
        return (_OP if traced else _attention_impl)(q, k, v, *form)
    if not traced:
        own = on_gpu(q) and choose(q, k, v, form, needs_lse=return_lse, training=True).path != "torch"
    elif form.cu_q is not None:
        own = True  # the plain form reads the offsets, which cannot be traced
    else:
        # Tracing must not read tables: where PyTorch has flash kernels a traced training step keeps them.
        own = on_gpu(q) and fits(q, k, v, form.scale) and not sdpa_takes(q, k, form, return_lse)
    if own and traced:
        # Dynamo refuses one tensor in two places, as the offsets of self-attention are, or shared keys and values.
        k, v = k.view_as(k), v.view_as(v)
        form = form if form.cu_k is None else form._replace(cu_k=form.cu_k.view_as(form.cu_k))
    if own:
        return _FlashAttention.apply(return_lse, q, k, v, *form)
    out, lse = composition(q, k, v, form, return_lse)
    return (out, lse) if return_lse else out


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention with grouped key/value heads and, if asked for, its log-sum-exp; differentiable.

    Algorithm: Dao, "FlashAttention-2" (2023); on Hopper also Shah et al., "FlashAttention-3" (2024). Autocast casts the
    operands, as for PyTorch's function.

    Args:
        q: [B, Hq, S, D], any strides. Own kernels take bfloat16 and float16 with D in steps of 8 up to 256.
        k: [B, Hkv, L, D]; Hq is a multiple of Hkv. Query i stands at position i + L - S.
        v: like ``k``.
        causal: a query sees the keys up to its own position.
        sliding_window: a query sees only the last ``sliding_window`` positions, its own included.
        scale: factor of the scores, ``1 / sqrt(D)`` by default.
        return_lse: return the natural logarithm of the sum of exponentials of each row's scores as well; its gradient
            counts.

    Returns:
        [B, Hq, S, D], and with ``return_lse`` fp32 [B, Hq, S]. A query without keys gives 0 and -inf.

    Raises:
        ValueError: shapes do not match.
    """
    check_attention(q, k, v, sliding_window)
    form = Form(None, None, q.shape[2], k.shape[2], causal, sliding_window, _scale(q, scale))
    return _run(*under_autocast(q, k, v), form, return_lse)


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attention`` of sequences of different lengths, packed one after the other.

    Args:
        q: [total_q, Hq, D].
        k: [total_k, Hkv, D].
        v: like ``k``.
        cu_seqlens_q: int32 [B + 1] on the same device; queries of sequence b are rows ``cu[b]`` .. ``cu[b + 1] - 1``.
            Sequences may be empty.
        cu_seqlens_k: the same for keys and values.
        max_seqlen_q: no sequence has more queries. On a GPU it is not checked (that would stall it): rows beyond are
            not computed and stay 0.
        max_seqlen_k: no sequence has more keys.
        causal, sliding_window, scale, return_lse: as for ``flash_attention``, within each sequence.

    Returns:
        [total_q, Hq, D], and with ``return_lse`` fp32 [Hq, total_q]; 0 and -inf in rows of no sequence.

    Raises:
        ValueError: shapes do not match; on the CPU also when the offsets do not fit.
    """
    _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sliding_window)
    offsets = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k)
    return _run(*under_autocast(q, k, v), Form(*offsets, causal, sliding_window, _scale(q, scale)), return_lse)
