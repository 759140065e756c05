"""Flash attention in plain PyTorch: what the kernels are compared with, and what runs where they do not.

Everything is computed in fp32 (or float64) with one rounding at the end. Rows without keys give 0 and a log-sum-exp of
-inf, in the gradients too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tp_kernels.ops.attention import allowed_mask, sdpa_attention

__all__ = ["Form", "composition", "reference", "reference_backward", "reference_gradients", "varlen_reference"]


class Form(NamedTuple):
    """The arguments of a call beside q, k and v; no ``cu_q`` and ``cu_k`` where all sequences are equally long."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    causal: bool
    window: int | None
    scale: float


def _weights(q: Tensor, k: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """(softmax weights, lse) of [B, H, S, D] and [B, H, L, D] in fp32 or better; 0 and -inf in rows without keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(-1, -2)) * scale
    positions = torch.arange(q.shape[2], device=q.device) + (k.shape[2] - q.shape[2])
    allowed = allowed_mask(positions, k.shape[2], causal, window)
    if allowed is None:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    empty = ~allowed.any(-1, keepdim=True)
    # Rows without keys go through the softmax as zeros, so that no NaN arises, in the gradient either.
    scores = scores.masked_fill(~allowed & ~empty, float("-inf")).masked_fill(empty, 0.0)
    if k.shape[2] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    lse = torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), float("-inf"))
    return torch.softmax(scores, -1).masked_fill(empty, 0.0), lse


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of [B, H, S, D]."""
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        weights, lse = _weights(q, k, causal, window, scale)
        return torch.matmul(weights, v.to(weights.dtype)).to(q.dtype), lse


def reference_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``reference``, written out: ops cannot record autograd."""
    heads, kv_heads = q.shape[1], k.shape[1]
    k_each, v_each = _repeat(k, heads), _repeat(v, heads)

    def group_sum(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, heads // kv_heads)).sum(2)

    with torch.autocast(q.device.type, enabled=False):
        weights, _ = _weights(q, k_each, causal, window, scale)
        wide = weights.dtype
        grad = grad_out.to(wide)
        grad_weights = torch.matmul(grad, v_each.to(wide).transpose(-1, -2))
        delta = (weights * grad_weights).sum(-1, keepdim=True)
        if grad_lse is not None:
            # Rows without keys have no weight to scale, whatever comes for their -inf.
            delta = delta - grad_lse.to(wide).unsqueeze(-1).masked_fill(weights.sum(-1, keepdim=True) == 0, 0.0)
        grad_scores = weights * (grad_weights - delta) * scale
        dq = torch.matmul(grad_scores, k_each.to(wide))
        dk = group_sum(torch.matmul(grad_scores.transpose(-1, -2), q.to(wide)))
        dv = group_sum(torch.matmul(weights.transpose(-1, -2), grad))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _bounds(cu_seqlens: Tensor, total: int, longest: int) -> list[int]:
    """The offsets as numbers; ValueError if they do not fit."""
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(bounds)]
    if bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] > total or max(lengths, default=0) > longest:
        raise ValueError(
            f"expected offsets that rise from 0 to at most {total} in steps of at most {longest}, got {bounds}"
        )
    return bounds


def _head_first(x: Tensor, begin: int, end: int) -> Tensor:
    return x[begin:end].transpose(0, 1).unsqueeze(0)


def varlen_reference(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed sequences, one after the other; ValueError if the offsets do not fit."""
    q_bounds, k_bounds = _bounds(form.cu_q, q.shape[0], form.max_q), _bounds(form.cu_k, k.shape[0], form.max_k)
    outs, sums = [], []
    for rows, keys in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        each = (_head_first(q, *rows), _head_first(k, *keys), _head_first(v, *keys))
        out, lse = reference(*each, form.causal, form.window, form.scale)
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    unused = q.shape[0] - q_bounds[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    outs.append(q.new_zeros(unused, *q.shape[1:]))
    sums.append(q.new_full((q.shape[1], unused), float("-inf"), dtype=wide))
    return torch.cat(outs), torch.cat(sums, 1)


def reference_gradients(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form,
) -> None:
    """Write the gradients of q, k and v; packed results start as zeros."""
    rest = (form.causal, form.window, form.scale)
    if form.cu_q is None:
        found = reference_backward(grad_out, grad_lse, q, k, v, *rest)
        for grad, value in zip(grads, found, strict=True):
            grad.copy_(value)
        return
    q_bounds, k_bounds = _bounds(form.cu_q, q.shape[0], form.max_q), _bounds(form.cu_k, k.shape[0], form.max_k)
    for rows, keys in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        each = (_head_first(q, *rows), _head_first(k, *keys), _head_first(v, *keys))
        lse_grad = None if grad_lse is None else grad_lse[:, slice(*rows)].unsqueeze(0)
        found = reference_backward(_head_first(grad_out, *rows), lse_grad, *each, *rest)
        for grad, value, bounds in zip(grads, found, (rows, keys, keys), strict=True):
            grad[slice(*bounds)] = value[0].transpose(0, 1)


def composition(q: Tensor, k: Tensor, v: Tensor, form: Form, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) by PyTorch's own operations, differentiable; scaled_dot_product_attention where it will do."""
    if form.cu_q is not None:
        return varlen_reference(q, k, v, form) if with_lse else (_each_sequence(q, k, v, form), None)
    length, kv_len = q.shape[2], k.shape[2]
    # In rows without keys PyTorch may give NaN.
    if with_lse or 0 in (length, kv_len) or (form.causal and length > kv_len):
        return reference(q, k, v, form.causal, form.window, form.scale)
    window = None if form.window is None or form.window >= kv_len else form.window
    return sdpa_attention(q, k, v, causal=form.causal, sliding_window=window, scale=form.scale), None


def _each_sequence(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
    """The output of packed sequences, each by what would take it alone; no [queries, keys] matrix but PyTorch's own."""
    q_bounds, k_bounds = _bounds(form.cu_q, q.shape[0], form.max_q), _bounds(form.cu_k, k.shape[0], form.max_k)
    alone, outs = form._replace(cu_q=None, cu_k=None), []
    for rows, keys in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        out, _ = composition(_head_first(q, *rows), _head_first(k, *keys), _head_first(v, *keys), alone, False)
        outs.append(out[0].transpose(0, 1))
    outs.append(q.new_zeros(q.shape[0] - q_bounds[-1], *q.shape[1:]))
    return torch.cat(outs)
