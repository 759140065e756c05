"""Cross-entropy kernels over a whole vocabulary or a shard of it: one read forward, one read and write backward.

Forward: a program walks a row in blocks. Every lane owns ``WIDTH`` neighbouring elements of a block (16 bytes), so its
running maximum and sum need neither shuffles nor shared memory, and the exponentials are 1 + 1/WIDTH an element; lanes
meet once, at the end. Where rows are fewer than multiprocessors a row is shared by several programs, whose results a
second kernel joins in a fixed order. (The online maximum and sum: Milakov and Gimelshein, 2018.)

Backward: (softmax - one-hot) * gradient, elementwise; it may overwrite the logits. Rows whose target is ignored are not
read in either direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tp_kernels.ops._gpu import GpuInfo, gpu_of
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase, launch, meta
from tp_kernels.ops.kernels.rows import row_starts, rows_of
from tp_kernels.ops.kernels.sizes import cdiv, next_power_of_2

__all__ = [
    "BackwardConfig",
    "Config",
    "aot_cases",
    "backward_candidates",
    "can_overwrite",
    "candidates",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_stats",
    "default_backward_config",
    "default_config",
]


@triton.jit
def _exp_from(x, maximum):
    """``exp(x - maximum)``, and 0 for a maximum of -inf (then every x is)."""
    return tl.exp(x - tl.where(maximum == float("-inf"), 0.0, maximum))


@triton.jit
def _finish(maximum, total, row, logits_ptr, targets_ptr, maximum_ptr, total_ptr, third_ptr, vocab, vocab_start,
            vocab_size, ignore_index, LOSS: tl.constexpr):  # fmt: skip
    """Store maximum, total, and the loss or the target's logit; ``logits_ptr`` is the row's."""
    target = tl.load(targets_ptr + row).to(tl.int64)
    ignored = target == ignore_index
    local = target - vocab_start
    here = (local >= 0) & (local < vocab) & (target != ignore_index)
    logit = tl.load(logits_ptr + local, mask=here, other=0.0).to(tl.float32)
    # A target that no shard has must not pass for one that another shard has.
    nowhere = (target < 0) | (target >= vocab_size)
    logit = tl.where(nowhere, float("nan"), logit)
    total = tl.where(nowhere, float("nan"), total)
    # Not (maximum + log(total)) - logit: that loses the small difference of large logits.
    third = tl.log(total) + (maximum - logit) if LOSS else logit
    tl.store(maximum_ptr + row, tl.where(ignored, 0.0, maximum))
    tl.store(total_ptr + row, tl.where(ignored, 1.0, total))
    tl.store(third_ptr + row, tl.where(ignored, 0.0, third))


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # rows of ``vocab`` by (outer, step)
    targets_ptr,  # [num_rows] int32 or int64
    maximum_ptr,  # [num_rows, SPLITS] fp32
    total_ptr,  # [num_rows, SPLITS] fp32
    third_ptr,  # [num_rows] fp32: the loss, or the target's logit; untouched with SPLITS > 1
    vocab,
    vocab_start,
    vocab_size,
    ignore_index,
    chunk,  # of a row to a program; a multiple of BLOCK
    inner,
    outer,
    step,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    LOSS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    logits_ptr += row_starts(row, inner, outer, step)
    begin = split * chunk
    end = tl.minimum(begin + chunk, vocab)
    if tl.load(targets_ptr + row).to(tl.int64) == ignore_index:
        end = begin
    LANES: tl.constexpr = BLOCK // WIDTH
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    maximum = tl.full([LANES], float("-inf"), dtype=tl.float32)
    total = tl.zeros([LANES], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        cols = start + offsets
        x = tl.load(logits_ptr + cols, mask=cols < end, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(x, axis=1))
        total = total * _exp_from(maximum, larger) + tl.sum(_exp_from(x, larger[:, None]), axis=1)
        maximum = larger
    row_maximum = tl.max(maximum, axis=0)
    row_total = tl.sum(total * _exp_from(maximum, row_maximum), axis=0)
    if SPLITS > 1:
        tl.store(maximum_ptr + row * SPLITS + split, row_maximum)
        tl.store(total_ptr + row * SPLITS + split, row_total)
    else:
        _finish(row_maximum, row_total, row, logits_ptr, targets_ptr, maximum_ptr, total_ptr, third_ptr, vocab,
                vocab_start, vocab_size, ignore_index, LOSS)  # fmt: skip


@triton.jit
def _join_kernel(
    maxima_ptr,  # [num_rows, SPLITS] fp32
    totals_ptr,  # [num_rows, SPLITS] fp32
    logits_ptr,  # the rest as in _cross_entropy_kernel
    targets_ptr,
    maximum_ptr,
    total_ptr,
    third_ptr,
    vocab,
    vocab_start,
    vocab_size,
    ignore_index,
    inner,
    outer,
    step,
    SPLITS: tl.constexpr,
    LOSS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    splits = row * SPLITS + tl.arange(0, SPLITS)
    maxima, totals = tl.load(maxima_ptr + splits), tl.load(totals_ptr + splits)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(totals * _exp_from(maxima, maximum), axis=0)
    logits_ptr += row_starts(row, inner, outer, step)
    _finish(maximum, total, row, logits_ptr, targets_ptr, maximum_ptr, total_ptr, third_ptr, vocab, vocab_start,
            vocab_size, ignore_index, LOSS)  # fmt: skip


@triton.jit
def _cross_entropy_backward_kernel(
    logits_ptr,  # rows of ``vocab`` by (outer, step)
    targets_ptr,  # [num_rows]
    maximum_ptr,  # [num_rows] fp32
    total_ptr,  # [num_rows] fp32
    grad_ptr,  # [num_rows] fp32: of each row's loss
    out_ptr,  # rows of ``vocab`` by (out_outer, out_step); may be logits_ptr
    vocab,
    vocab_start,
    ignore_index,
    blocks,  # of a row
    inner,
    outer,
    step,
    out_outer,
    out_step,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < vocab
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    target = tl.load(targets_ptr + row).to(tl.int64)
    out = out_ptr + row_starts(row, inner, out_outer, out_step) + cols
    if target == ignore_index:
        tl.store(out, tl.zeros([BLOCK], dtype=out_ptr.dtype.element_ty), mask=mask)
    else:
        maximum, grad = tl.load(maximum_ptr + row), tl.load(grad_ptr + row)
        scale = 1.0 / tl.load(total_ptr + row)
        x = tl.load(logits_ptr + row_starts(row, inner, outer, step) + cols, mask=mask, other=0.0).to(tl.float32)
        softmax = tl.exp(x - maximum) * scale
        softmax = tl.where(cols == target - vocab_start, softmax - 1.0, softmax)
        tl.store(out, (softmax * grad).to(out_ptr.dtype.element_ty), mask=mask)


class Config(NamedTuple):
    """Forward: elements of a block, warps, blocks in flight beside the one worked on, plus one (1: none)."""

    block: int
    num_warps: int
    stages: int


class BackwardConfig(NamedTuple):
    """Backward: elements of a program, warps."""

    block: int
    num_warps: int


def default_config(info: GpuInfo, dtype: torch.dtype, m: int, v: int) -> Config:
    """32 elements a thread at 8 warps, two blocks ahead through asynchronous copies; less for short rows."""
    block = min(max(next_power_of_2(v), 256), 8192)
    return Config(block, max(block // 1024, 1), 3)


def candidates(info: GpuInfo, dtype: torch.dtype, m: int, v: int) -> list[Config]:
    """What is worth measuring."""
    default = default_config(info, dtype, m, v)
    found = [
        Config(block, warps, stages)
        for block, warps in ((4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16))
        for stages in (1, 3)
        if block <= 2 * v and 2 * block * dtype.itemsize + 2048 <= info.max_shared
    ]
    return [default, *(config for config in found if config != default)]


def default_backward_config(info: GpuInfo, dtype: torch.dtype, m: int, v: int) -> BackwardConfig:
    """16 elements a thread: with 32 the compiler sinks the loads behind the arithmetic to save registers."""
    block = min(max(next_power_of_2(v), 256), 4096)
    return BackwardConfig(block, max(block // 512, 1))


def backward_candidates(info: GpuInfo, dtype: torch.dtype, m: int, v: int) -> list[BackwardConfig]:
    """What is worth measuring."""
    default = default_backward_config(info, dtype, m, v)
    shapes = ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16))
    found = [BackwardConfig(block, warps) for block, warps in shapes if block <= 2 * v]
    return [default, *(config for config in found if config != default)]


def _splits(info: GpuInfo, m: int, v: int, block: int) -> int:
    """Programs to a row: a power of two, so many that every multiprocessor has one, at least a block for each."""
    splits = 1
    while m * splits < info.num_sms and 2 * splits * block <= v and splits < 64:
        splits *= 2
    return splits


def cross_entropy_forward(
    loss: Tensor,
    maximum: Tensor,
    total: Tensor,
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    config: Config | None = None,
) -> None:
    """Loss of every row over a whole vocabulary, and what the backward needs of its softmax.

    Args:
        loss, maximum, total: [rows] fp32: the loss, the largest logit, the sum of exp(logit - maximum). Ignored rows
            give (0, 0, 1); a target that is no word of the vocabulary gives NaN.
        logits: [..., V], any strides.
        targets: [rows] contiguous, int32 or int64.
    """
    _forward(maximum, total, loss, True, logits, targets, 0, logits.shape[-1], ignore_index, config)


def cross_entropy_stats(
    maximum: Tensor,
    total: Tensor,
    target_logit: Tensor,
    logits: Tensor,
    targets: Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    config: Config | None = None,
) -> None:
    """What a shard [vocab_start, vocab_start + V) contributes to every row's loss.

    Args:
        maximum, total, target_logit: [rows] fp32: largest logit, sum of exp(logit - maximum), logit of the target if it
            is in this shard, else 0. Ignored rows give (0, 1, 0); a target outside [0, vocab_size) gives NaN.
        logits: [..., V], any strides.
        targets: [rows] contiguous, int32 or int64.
    """
    _forward(maximum, total, target_logit, False, logits, targets, vocab_start, vocab_size, ignore_index, config)


def _forward(maximum, total, third, loss, logits, targets, vocab_start, vocab_size, ignore_index, config) -> None:
    info, vocab = gpu_of(logits), logits.shape[-1]
    rows = rows_of(logits)
    (logits,), m = rows.tensors, rows.count
    if m == 0:
        return
    strides = rows.inner, rows.outer[0], rows.step[0]
    config = config or default_config(info, logits.dtype, m, vocab)
    splits = _splits(info, m, vocab, config.block)
    blocks = cdiv(cdiv(vocab, config.block), splits)
    sizes = vocab, vocab_start, vocab_size, ignore_index
    pdl = info.has_pdl and not INTERPRETED
    # Told of no limit the compiler takes 32 registers and issues one load at a time; told of 128, all of a block.
    registers = 128 if config.stages == 1 and config.num_warps <= 16 else None
    parts = maximum, total
    if splits > 1:
        parts = torch.empty((2, m, splits), dtype=torch.float32, device=logits.device).unbind(0)
    launch(
        _cross_entropy_kernel,
        (m, splits),
        logits,
        targets,
        *parts,
        third,
        *sizes,
        blocks * config.block,
        *strides,
        BLOCK=config.block,
        WIDTH=16 // logits.dtype.itemsize,
        STAGES=config.stages,
        SPLITS=splits,
        LOSS=loss,
        PDL=pdl,
        num_warps=config.num_warps,
        maxnreg=registers,
        pdl=pdl,
    )
    if splits > 1:
        options = {"SPLITS": splits, "LOSS": loss, "PDL": pdl, "num_warps": 1}
        tensors = *parts, logits, targets, maximum, total, third
        launch(_join_kernel, (m,), *tensors, *sizes, *strides, **options, pdl=pdl)


def can_overwrite(logits: Tensor) -> bool:
    """Whether the rows can be addressed where they are and do not overlap."""
    rows, vocab = rows_of(logits), logits.shape[-1]
    outer, step = rows.outer[0], rows.step[0]
    if rows.inner == 1:
        apart = outer >= vocab
    elif outer >= step:
        apart = step >= vocab and outer >= (rows.inner - 1) * step + vocab
    else:
        apart = outer >= vocab and step >= (rows.count // rows.inner - 1) * outer + vocab
    return apart and rows.tensors[0] is logits


def cross_entropy_backward(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    total: Tensor,
    grad: Tensor,
    vocab_start: int,
    ignore_index: int,
    config: BackwardConfig | None = None,
) -> None:
    """``out = (exp(logits - maximum) / total - onehot(targets - vocab_start)) * grad``, 0 in ignored rows.

    Args:
        out: [..., V]: ``logits`` itself (then of strides that ``rows_of`` addresses), or contiguous.
        logits: [..., V], any strides.
        targets: [rows] contiguous, int32 or int64.
        maximum, total, grad: [rows] fp32, contiguous; the first two of the whole vocabulary.
    """
    info, vocab = gpu_of(logits), logits.shape[-1]
    rows = rows_of(logits, out)
    (logits, target), m = rows.tensors, rows.count
    if target is not out:
        raise ValueError(f"expected an output whose rows follow two strides, got {tuple(out.stride())}")
    config = config or default_backward_config(info, logits.dtype, m, vocab)
    blocks = cdiv(vocab, config.block)
    pdl = info.has_pdl and not INTERPRETED
    launch(
        _cross_entropy_backward_kernel,
        (m * blocks,),
        logits,
        targets,
        maximum,
        total,
        grad,
        out,
        vocab,
        vocab_start,
        ignore_index,
        blocks,
        rows.inner,
        rows.outer[0],
        rows.step[0],
        rows.outer[1],
        rows.step[1],
        BLOCK=config.block,
        PDL=pdl,
        num_warps=config.num_warps,
        pdl=pdl,
    )


def aot_cases() -> list[AotCase]:
    """Llama's vocabulary whole and in shards, few rows, an odd vocabulary, backward into a new tensor and in place."""

    def forward(m: int, v: int, dtype: torch.dtype = torch.bfloat16, shard: bool = False, stages: int = 3) -> None:
        logits, targets = meta(m, v, dtype=dtype), meta(m, dtype=torch.int64)
        rows = [meta(m, dtype=torch.float32) for _ in range(3)]
        config = default_config(gpu_of(logits), dtype, m, v)._replace(stages=stages)
        if shard:
            cross_entropy_stats(*rows, logits, targets, v, 8 * v, -100, config)
        else:
            cross_entropy_forward(*rows, logits, targets, -100, config)

    def backward(m: int, v: int, inplace: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        logits, targets, row = meta(m, v, dtype=dtype), meta(m, dtype=torch.int64), meta(m, dtype=torch.float32)
        out = logits if inplace else meta(m, v, dtype=dtype)
        cross_entropy_backward(out, logits, targets, row, row, row, 0, -100)

    fast = {"pdl": True, "max_registers": 96}
    return [
        AotCase("cross_entropy 4096x128256", lambda: forward(4096, 128256), **fast),
        AotCase("cross_entropy registers", lambda: forward(4096, 128256, stages=1), (90,), **fast),
        AotCase("cross_entropy fp32", lambda: forward(4096, 32000, torch.float32), (90,), max_registers=128),
        AotCase("cross_entropy odd", lambda: forward(4096, 50257), (90,), wide_loads=False),
        AotCase("cross_entropy_backward", lambda: backward(4096, 128256, False), (90,), **fast),
        AotCase("cross_entropy_backward in place", lambda: backward(4096, 16032, True), (90,), **fast),
        AotCase("cross_entropy few rows", lambda: forward(4, 128256, shard=True), (90,), wide_loads=None),
    ]
