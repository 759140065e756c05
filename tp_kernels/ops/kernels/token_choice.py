"""The two ends of a decode step: rows of a part of the embedding, and the most likely token.

Both are small; the kernels exist for the launches that they save. Greedy choice is a maximum over each part of a row,
then over the parts; over several ranks the result is an offer for an all-reduce, and the maximum over the offers makes
the token. NaN counts as infinity, and a maximum that is not finite gives the token -1, so one comparison finds both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tp_kernels.ops._gpu import gpu_of
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch, meta
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = ["aot_cases", "embed_part", "greedy_choice", "greedy_offers", "pick_offer"]

# Words of a program: at 128 threads two 16-byte loads a thread of 16-bit logits, and 63 programs for 128 k words.
_WORDS = 2048
_CHANNELS = 1024


@triton.jit
def _best_of_part_kernel(
    logits,  # [B, words]
    best,  # fp32 [B, PARTS]
    places,  # int32 [B, PARTS]
    words,
    row_stride,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(logits + row * row_stride + at, mask=at < words, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    top = tl.max(x, axis=0)
    tl.store(best + row * PARTS + part, top)
    # The lowest place of equals.
    tl.store(places + row * PARTS + part, tl.min(tl.where(x == top, at, 2147483647), axis=0))


@triton.jit
def _settle(top, token, tokens, ids, row):
    """Store a token, -1 if it means nothing, and what the next step is to be fed."""
    finite = (top < float("inf")) & (top > float("-inf"))
    token = tl.where(finite, token, -1).to(tl.int64)
    tl.store(tokens + row, token)
    tl.store(ids + row, tl.maximum(token, 0))


@triton.jit(do_not_specialize=["rows", "first_word"])
def _best_of_row_kernel(
    best,
    places,
    tokens,  # int64 [B], or None over several ranks
    ids,  # int64 [B], or None
    offers,  # fp32 [WORLD, 2, B], or None on one rank
    rows,
    first_word,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(best + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    place = tl.load(places + row * PARTS + part, mask=part < PARTS, other=2147483647)
    top = tl.max(value, axis=0)
    token = tl.min(tl.where(value == top, place, 2147483647), axis=0)
    if offers is None:
        _settle(top, token, tokens, ids, row)
    else:
        for rank in tl.static_range(WORLD):
            # Zeros in the others' places: the sum over the ranks then holds everyone's offer.
            if rank == RANK:
                tl.store(offers + 2 * rank * rows + row, top)
                tl.store(offers + (2 * rank + 1) * rows + row, (token + first_word).to(tl.float32))
            else:
                tl.store(offers + 2 * rank * rows + row, 0.0)
                tl.store(offers + (2 * rank + 1) * rows + row, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _best_offer_kernel(
    offers,  # fp32 [WORLD, 2, B]
    tokens,
    ids,
    rows,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    rank = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(offers + 2 * rank * rows + row, mask=rank < WORLD, other=float("-inf"))
    word = tl.load(offers + (2 * rank + 1) * rows + row, mask=rank < WORLD, other=0.0)
    top = tl.max(value, axis=0)
    token = tl.min(tl.where((value == top) & (rank < WORLD), word.to(tl.int32), 2147483647), axis=0)
    _settle(top, token, tokens, ids, row)


@triton.jit(do_not_specialize=["first_word", "words"])
def _embed_part_kernel(
    ids,  # int64 [N]
    weight,  # [words, H]
    out,  # [N, H]
    first_word,
    words,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    local = tl.load(ids + row) - first_word
    inside = (local >= 0) & (local < words)
    x = tl.load(weight + local * H + at, mask=inside & (at < H), other=0.0)
    tl.store(out + row * H + at, x, mask=at < H)


def _pdl(x: Tensor) -> bool:
    return gpu_of(x).has_pdl and not INTERPRETED


def _local_best(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows, words = logits.shape
    parts, pdl = cdiv(words, _WORDS), _pdl(logits)
    best = logits.new_empty(rows, parts, dtype=torch.float32)
    places = logits.new_empty(rows, parts, dtype=torch.int32)
    launch(
        _best_of_part_kernel,
        (rows, parts),
        logits,
        best,
        places,
        words,
        logits.stride(0),
        num_warps=4,
        pdl=pdl,
        PARTS=parts,
        BLOCK=_WORDS,
        PDL=pdl,
    )
    return best, places


def _best_of_row(
    logits: Tensor, tokens: Tensor | None, ids: Tensor | None, offers: Tensor | None, first: int, rank: int, world: int
) -> None:
    best, places = _local_best(logits)
    rows, parts = best.shape
    pdl = _pdl(logits)
    launch(
        _best_of_row_kernel,
        (rows,),
        best,
        places,
        tokens,
        ids,
        offers,
        rows,
        first,
        num_warps=1,
        pdl=pdl,
        PARTS=parts,
        BLOCK=next_power_of_2(parts),
        RANK=rank,
        WORLD=world,
        PDL=pdl,
    )


def greedy_choice(tokens: Tensor, ids: Tensor, logits: Tensor) -> None:
    """The most likely token of each row, the lowest of equals.

    Args:
        tokens: int64 [B], written: the token, or -1 where the best logit is NaN or infinite.
        ids: int64 [B], written: the token, or 0.
        logits: [B, words] with a dense last dimension, up to 32 bits an element.
    """
    _best_of_row(logits, tokens, ids, None, 0, 0, 1)


def greedy_offers(offers: Tensor, logits: Tensor, first_word: int, rank: int) -> None:
    """What this rank offers: its best logit and token of each row in ``offers[rank]``, zeros elsewhere.

    Args:
        offers: fp32 [ranks, 2, B], written; to be summed over the ranks.
        logits: [B, words of this rank], as for ``greedy_choice``.
        first_word: the token of this rank's first word; all tokens are below 2**24.
        rank: of this process.
    """
    _best_of_row(logits, None, None, offers, first_word, rank, offers.shape[0])


def pick_offer(tokens: Tensor, ids: Tensor, offers: Tensor) -> None:
    """The best of all ranks' offers [ranks, 2, B]; for ``tokens`` and ``ids`` see ``greedy_choice``."""
    world, _, rows = offers.shape
    pdl = _pdl(offers)
    launch(
        _best_offer_kernel,
        (rows,),
        offers,
        tokens,
        ids,
        rows,
        num_warps=1,
        pdl=pdl,
        WORLD=world,
        BLOCK=next_power_of_2(world),
        PDL=pdl,
    )


def embed_part(ids: Tensor, weight: Tensor, first_word: int) -> Tensor:
    """Rows of this rank's part of an embedding, zeros for words of others: [N, H].

    Args:
        ids: int64 [N], contiguous.
        weight: [words of this rank, H], contiguous.
        first_word: the first of them.
    """
    words, width = weight.shape
    out = weight.new_empty(len(ids), width)
    pdl = _pdl(weight)
    launch(
        _embed_part_kernel,
        (len(ids), cdiv(width, _CHANNELS)),
        ids,
        weight,
        out,
        first_word,
        words,
        num_warps=4,
        pdl=pdl,
        H=width,
        BLOCK=_CHANNELS,
        PDL=pdl,
    )
    return out


def aot_cases() -> list[AotCase]:
    """Llama's vocabulary on one rank and on four, 16-bit and fp32; rows that are not multiples of 16 bytes."""

    def ints(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.int64)

    offers = meta(4, 2, 8, dtype=torch.float32)
    part, uneven = meta(8, 32064), meta(3, 515, dtype=torch.float32)
    small = {"pdl": True, "max_registers": 128}
    narrow = {"wide_loads": None, **small}
    return [
        AotCase("best of parts, 128256 words", lambda: _local_best(meta(8, 128256)), **small),
        AotCase("greedy choice, 128256 words", lambda: greedy_choice(ints(8), ints(8), meta(8, 128256)), **narrow),
        AotCase("greedy offers of 4 ranks", lambda: greedy_offers(offers, part, 32064, 1), (90,), **narrow),
        AotCase("greedy choice, 515 words", lambda: greedy_choice(ints(3), ints(3), uneven), **narrow),
        AotCase("best offer of 4", lambda: pick_offer(ints(8), ints(8), offers), **narrow),
        AotCase("embedding, 4096 channels", lambda: embed_part(ints(8), meta(32064, 4096), 32064), **small),
    ]
