"""Decode attention: one new token a row over full rows of the KV cache, contiguous and in shuffled pages.

The peers that know no row lengths are given caches of exactly the rows' length, so that they need no mask; what PyTorch
would do with a cache of rows of different length, a mask tensor included, is "torch".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tp_kernels import ops
from tp_kernels.ops.decode_attention import gather_pages, plain_decode
from tp_kernels.ops.kernels.decode_config import Config, candidates
from tp_kernels.testing.op_bench.case import Case, Own, Shapes, randn, this_gpu

__all__ = ["OP", "cases"]

OP = "decode_attention"

# Rows of the batch and positions of a row; pages of a serving engine's usual size and of a block of the kernel.
SHAPES = ((1, 1024), (1, 8192), (1, 32768), (16, 4096), (64, 4096))
LENGTH = 4096
TINY_LENGTH = 48
PAGES = (0, 16, 64)


def cases(model: Shapes, tp: int, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Iterator[Case]:
    """One case a shape and page size; ``rows`` are batches, each of one token a row."""
    local = model.shard(tp)
    tiny = model.name == "tiny"
    length = TINY_LENGTH if tiny else LENGTH
    shapes = SHAPES if rows is None and not tiny else [(batch, length) for batch in rows or (1, 3)]
    for batch, positions in shapes:
        for page in PAGES:
            yield _case(model, local, tp, dtype, batch, positions, min(page, 16) if tiny else page)


def _case(model: Shapes, local: Shapes, tp: int, dtype: torch.dtype, batch: int, positions: int, page: int) -> Case:
    heads, kv_heads, dim = local.heads, local.kv_heads, local.head_dim
    group = heads // kv_heads
    bytes_read = 2 * batch * kv_heads * positions * dim * dtype.itemsize
    configs = _configs(dtype, group, dim, batch * kv_heads, positions)
    return Case(
        op=OP,
        label=f"{model.name} tp={tp} B={batch} S={positions}" + (f" pages of {page}" if page else ""),
        sizes={"b": batch, "hkv": kv_heads, "rows": group, "d": dim, "s": positions, "page": page},
        dtype=dtype,
        inputs=partial(_inputs, batch, heads, kv_heads, dim, positions, page, dtype),
        reference=_reference,
        peers=_peers(page, dim),
        own={"triton": Own(_run, configs)},
        public=_public,
        bytes=bytes_read,
        input_bytes=bytes_read,
    )


def _configs(dtype: torch.dtype, group: int, dim: int, groups: int, positions: int) -> list[dict[str, Any]]:
    """Candidates on the GPU here, or on an H100."""
    return [config._asdict() for config in candidates(this_gpu(), dtype, group, dim, groups, positions)]


def _inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    positions: int,
    page: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """q, keys, values, lengths and, with pages, the table; pages hold all heads of a position side by side."""
    q = randn(generator, batch, 1, heads, dim, dtype=dtype).transpose(1, 2)
    device = q.device
    lengths = torch.full((batch,), positions - 1, dtype=torch.int64, device=device)
    if not page:
        k, v = (randn(generator, batch, kv_heads, positions, dim, dtype=dtype) for _ in range(2))
        return q, k, v, lengths
    count = batch * positions // page
    k, v = (randn(generator, count, page, kv_heads, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    order = torch.randperm(count, generator=generator, device=device)
    return q, k, v, lengths, order.to(torch.int32).view(batch, positions // page)


def _reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None = None) -> Tensor:
    """fp32, one row of the batch at a time: copies of a whole cache would not fit beside it."""
    rows = []
    for row in range(q.shape[0]):
        one = slice(row, row + 1)
        keys, values = k[one], v[one]
        if table is not None:
            keys, values = gather_pages(k, v, lengths[one], table[one], 1)
        rows.append(ops.decode_attention_reference(q[one].float(), keys.float(), values.float(), lengths[one]))
    return torch.cat(rows)


def _run(
    config: dict[str, Any] | None, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None = None
) -> Tensor:
    from tp_kernels.ops.kernels.decode_attention import decode_attention

    chosen = Config(**config) if config else None
    return decode_attention(q, k, v, lengths, q.shape[-1] ** -0.5, None, table, chosen)


def _public(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None = None) -> Tensor:
    return ops.decode_attention(q, k, v, lengths, page_table=table)


def _torch(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None = None) -> Tensor:
    if table is not None:
        k, v = gather_pages(k, v, lengths, table, 1)
    return plain_decode(q, k, v, lengths, q.shape[-1] ** -0.5, None)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _peers(page: int, dim: int) -> dict[str, Callable[..., Tensor]]:
    """All that take the case: the libraries have no pages in these builds, and are made for heads of 64 and more."""
    peers: dict[str, Callable[..., Tensor]] = {"torch": _torch}
    if torch.cuda.is_available() and not page and dim >= 64:
        peers["fa2"] = partial(_sdpa, SDPBackend.FLASH_ATTENTION)
        peers["cudnn"] = partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
        fa3 = _fa3()
        if fa3 is not None:
            peers["fa3"] = fa3
    return peers


def _fa3() -> Callable[..., Tensor] | None:
    """FlashAttention-3 with its own choice of splits, if it is installed."""
    try:
        import fa3_fwd_interface as interface
    except Exception:  # a wheel for another CUDA fails in many ways
        return None
    # Without a length a row, both take the whole cache; the first splits by a heuristic unless told otherwise.
    function = getattr(interface, "flash_attn_with_kvcache", None) or interface.flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=False, num_splits=0)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run
