"""Causal attention of whole sequences, forward and backward, with a model's heads.

Every peer gets [B, H, S, D] views of [B, S, H, D] memory, as a projection leaves them; FlashAttention-3 and -4 take
that memory as it is. Backward is the backward alone: peers differentiate a graph that they keep, and operations are
counted as 2.5 times those of the forward (five matrix products against two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from tp_kernels import ops
from tp_kernels.ops._flash_choice import gluon_module
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, randn, this_gpu

__all__ = ["OP", "cases"]

OP = "flash_attention"
SHAPES = ((1, 1024), (1, 2048), (1, 4096), (1, 16384), (4, 4096))
# Query rows that the reference does at a time: scores of 16384 keys then stay below a gigabyte a head.
_REFERENCE_ROWS = 4096

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _with(backend: SDPBackend) -> Forward:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return call


def _tokens_first(function: Callable[..., Any]) -> Forward:
    """A function of [B, S, H, D] that may return (out, lse, ...)."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
        return (out[0] if isinstance(out, (tuple, list)) else out).transpose(1, 2)

    return call


def _peers(backward: bool) -> dict[str, Forward]:
    peers: dict[str, Forward] = {"torch": _sdpa}
    if not torch.cuda.is_available():
        return peers
    peers["cudnn"] = _with(SDPBackend.CUDNN_ATTENTION)
    peers["fa2"] = _with(SDPBackend.FLASH_ATTENTION)
    if not backward:  # the small wheel of FlashAttention-3 was built without its backward
        try:
            from fa3_fwd_interface import flash_attn_func

            peers["fa3"] = _tokens_first(flash_attn_func)
        except Exception:
            pass
    try:
        from flash_attn.cute import flash_attn_func as cute_flash_attn_func

        peers["fa4"] = _tokens_first(cute_flash_attn_func)
    except Exception:
        pass
    return peers


def _differentiated(function: Forward) -> Callable[..., tuple[Tensor, ...]]:
    """The backward of ``function`` alone; the graph of each set of inputs is made once and kept while they live."""
    kept = WeakTensorKeyDictionary()

    def call(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
        if q not in kept:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the forward pass must have run before its backward is captured")
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                kept[q] = function(*inputs), inputs
        result, inputs = kept[q]
        return torch.autograd.grad(result, inputs, grad_out, retain_graph=True)

    return call


def _exact(q: Tensor, k: Tensor, v: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """fp32 (weights, lse) of the query rows ``begin`` .. ``end`` - 1 of one head."""
    scores = (q[begin:end] @ k[:end].T) * q.shape[-1] ** -0.5
    hidden = torch.arange(end, device=q.device) > torch.arange(begin, end, device=q.device)[:, None]
    scores.masked_fill_(hidden, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.exp(scores - lse), lse.squeeze(-1)


def _heads(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, int, int, int]]:
    """(b, h, KV head, begin, end) of every piece of the reference."""
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for begin in range(0, q.shape[2], _REFERENCE_ROWS):
                yield b, h, h // group, begin, min(begin + _REFERENCE_ROWS, q.shape[2])


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.float(), k.float(), v.float()
    out = torch.empty_like(q)
    for b, h, kv, begin, end in _heads(q, k):
        out[b, h, begin:end] = _exact(q[b, h], k[b, kv], v[b, kv], begin, end)[0] @ v[b, kv, :end]
    return out


def _reference_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad_out = q.float(), k.float(), v.float(), grad_out.float()
    scale = q.shape[-1] ** -0.5
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for b, h, kv, begin, end in _heads(q, k):
        weights, _ = _exact(q[b, h], k[b, kv], v[b, kv], begin, end)
        grad = grad_out[b, h, begin:end]
        dv[b, kv, :end] += weights.T @ grad
        grad_weights = grad @ v[b, kv, :end].T
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        dq[b, h, begin:end] = grad_scores @ k[b, kv, :end]
        dk[b, kv, :end] += grad_scores.T @ q[b, h, begin:end]
    return dq, dk, dv


def _options(q: Tensor, k: Tensor) -> dict[str, Any]:
    sizes = {"max_q": q.shape[2], "max_k": k.shape[2]}
    return {"scale": q.shape[-1] ** -0.5, "causal": True, "window": None, **sizes}


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _own_forward(module: Any) -> Callable[..., Tensor]:
    def run(config: dict[str, Any] | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _like(q)
        chosen = module.Config(**config) if config else None
        module.flash_forward(out, None, q, k, v, config=chosen, **_options(q, k))
        return out

    return run


def _own_backward(module: Any) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        config: dict[str, Any] | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor
    ) -> tuple[Tensor, ...]:
        grads = tuple(_like(x) for x in (q, k, v))
        chosen = module.Config(**config) if config else None
        module.flash_backward(*grads, grad_out, q, k, v, out, lse, config=chosen, **_options(q, k))
        return grads

    return run


def _own_paths(
    triton_module: Any,
    gluon: Any,
    make: Callable[[Any], Callable[..., Any]],
    place: tuple[Any, ...],
    heads: int,
    kv: int,
) -> dict[str, Own]:
    """Our paths by name; the Hopper kernel is asked with a tiny stand-in for the operands."""
    modules = {"triton": triton_module}
    info, dtype, dim = place[:3]
    if gluon is not None:
        # On "meta" where candidates are compiled by processes that see no GPU.
        device = "cuda" if torch.cuda.is_available() else "meta"
        q, k = (torch.empty(1, 8, h, dim, dtype=dtype, device=device).transpose(1, 2) for h in (heads, kv))
        if gluon.unsupported_reason(info, dtype, dim, q, k, k, True, None, False) is None:
            modules["gluon"] = gluon
    return {name: Own(make(m), [c._asdict() for c in m.candidates(*place)]) for name, m in modules.items()}


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """Forward and backward for each batch and length; ``rows`` are lengths of one sequence."""
    from tp_kernels.ops.kernels import flash_attention as kernels
    from tp_kernels.ops.kernels import flash_attention_backward as backward_kernels

    local = model.shard(tp)
    heads, kv_heads, dim = local.heads, local.kv_heads, local.head_dim
    for batch, length in [(1, length) for length in rows] if rows else SHAPES:
        sizes = {"d": dim, "q": length, "k": length, "heads": batch * heads, "causal": 1}
        label = f"{model.name} tp={tp} B={batch} S={length}"
        place = (this_gpu(), dtype, dim, length, length, True)
        flops = 2 * batch * heads * length * length * dim
        one, one_kv = (batch * length * h * dim * dtype.itemsize for h in (heads, kv_heads))

        def inputs(generator: torch.Generator, batch: int = batch, length: int = length) -> tuple[Tensor, ...]:
            return tuple(
                randn(generator, batch, length, h, dim, dtype=dtype).transpose(1, 2)
                for h in (heads, kv_heads, kv_heads)
            )

        def backward_inputs(generator: torch.Generator, inputs: Any = inputs) -> tuple[Tensor, ...]:
            q, k, v = inputs(generator)
            out, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
            kernels.flash_forward(out, lse, q, k, v, **_options(q, k))
            return q, k, v, out, lse, randn(generator, *_like(q).transpose(1, 2).shape, dtype=dtype).transpose(1, 2)

        yield Case(
            op="flash_attention",
            label=label,
            sizes=sizes,
            dtype=dtype,
            inputs=inputs,
            reference=_reference,
            peers=_peers(False),
            own=_own_paths(kernels, gluon_module(), _own_forward, place, heads, kv_heads),
            public=ops.flash_attention,
            bytes=2 * one + 2 * one_kv,
            flops=flops,
        )
        yield Case(
            op="flash_attention_backward",
            label=label,
            sizes=sizes,
            dtype=dtype,
            inputs=backward_inputs,
            reference=_reference_backward,
            peers={name: _differentiated(function) for name, function in _peers(True).items()},
            own=_own_paths(backward_kernels, gluon_module(backward=True), _own_backward, place, heads, kv_heads),
            bytes=4 * one + 4 * one_kv,
            flops=flops * 5 // 2,
            extra={"grad": True},
        )
