"""What the kernels for a few rows share: checks of their operands, fetching weights into L2 ahead of time, and the
conversion of one-byte weights.

Quantised weights are int8 or float8_e4m3fn with one fp32 scale a row. Both convert exactly to fp32 and to either 16-bit
format, so nothing is lost before the scale meets the fp32 sum, once. At 3 TB/s a multiprocessor of an H100 has some 13
such weights to convert a cycle, with 128 lanes to do everything with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tp_kernels.ops.kernels.epilogue import activate, silu
from tp_kernels.ops.kernels.launch import INTERPRETED, AotCase

__all__ = [
    "DTYPES",
    "WEIGHT_DTYPES",
    "check_operands",
    "fetch_into_l2",
    "fetched_columns",
    "finish",
    "launch_case",
    "to_dtype_of",
    "to_fp32",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of quantised weights.
WEIGHT_DTYPES = (torch.int8, torch.float8_e4m3fn)
ACTIVATIONS = (None, "silu", "gelu", "gelu_tanh", "relu")


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_fp32(values):
    """fp32 of values of any dtype; exact.

    int8: with its sign bit flipped, a byte becomes the last one of 2**23 + (b + 128), from which 2**23 + 128 is
    subtracted: two and a quarter instructions a value, where ``cvt`` would be one of a slow unit (I2F).
    """
    if values.dtype == tl.int8 and values.numel % 4 == 0 and not _INTERPRETED:
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, a, b, c, d;
            xor.b32 t, $4, 0x80808080;
            prmt.b32 a, t, 0x4b000000, 0x7540;
            prmt.b32 b, t, 0x4b000000, 0x7541;
            prmt.b32 c, t, 0x4b000000, 0x7542;
            prmt.b32 d, t, 0x4b000000, 0x7543;
            add.f32 $0, a, 0fCB000080;
            add.f32 $1, b, 0fCB000080;
            add.f32 $2, c, 0fCB000080;
            add.f32 $3, d, 0fCB000080;
            }
            """,
            "=f,=f,=f,=f,r",
            [values],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        wide = values.to(tl.float32)
    return wide


@triton.jit
def to_dtype_of(values, x):
    """One-byte weights in the dtype of x; exact. Values of that dtype are returned as they are.

    Triton's own conversions from int8 to bf16 and from fp8 to fp16 are short; the other two would be one instruction of
    a slow unit for each value (I2F, F2F).
    """
    if values.dtype == tl.int8 and x.dtype == tl.float16 and values.numel % 4 == 0 and not _INTERPRETED:
        # 1024 + (b + 128) in fp16, of which the last byte is b with its sign flipped.
        values = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, a, b, c;
            xor.b32 t, $2, 0x80808080;
            mov.b32 c, 0x64806480;
            prmt.b32 a, t, 0x64006400, 0x5150;
            prmt.b32 b, t, 0x64006400, 0x5352;
            sub.f16x2 $0, a, c;
            sub.f16x2 $1, b, c;
            }
            """,
            "=r,=r,r",
            [values],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    elif values.dtype == tl.float8e4nv and x.dtype == tl.bfloat16:
        values = values.to(tl.float16).to(tl.float32).to(tl.bfloat16)
    return values.to(x.dtype)


@triton.jit
def fetch_into_l2(
    weight_ptr, stride_weight, n0, N, k_begin, K, GATES: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Ask for COLUMNS columns of this block's rows of the weights, from ``k_begin`` on, without waiting for them.

    Costs neither registers nor shared memory. A few threads of every warp name one piece of a row each: the
    instruction takes uniform registers, so the compiler makes a loop over the threads that issue it, and a tensor with
    fewer elements than threads would be fetched once by every replica. See ``fetched_columns``.
    """
    PIECES: tl.constexpr = max(GATES * BLOCK_N, THREADS // 32)
    PIECE: tl.constexpr = GATES * BLOCK_N * COLUMNS // PIECES
    IDLE: tl.constexpr = THREADS // PIECES
    i = tl.arange(0, THREADS)
    row = i // (IDLE * (COLUMNS // PIECE))
    row = (row // BLOCK_N) * N + tl.minimum(n0 + row % BLOCK_N, N - 1)
    # Beyond the end of a row the last piece is asked for again, which costs nothing.
    column = tl.minimum(k_begin + (i // IDLE) % (COLUMNS // PIECE) * PIECE, K - PIECE)
    address = (weight_ptr + row.to(tl.int64) * stride_weight + column).to(tl.int64)
    size = tl.full([THREADS], PIECE * (weight_ptr.dtype.element_ty.primitive_bitwidth // 8), tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.s32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [address, size, i % IDLE],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def finish(gate, up, residual, GATES: tl.constexpr, ACTIVATION: tl.constexpr):
    """``silu(gate) * up``, or ``activation(gate)`` where there is one gate; plus the residual."""
    y = silu(gate) * up if GATES == 2 else activate(gate, ACTIVATION)
    return y + residual


def fetched_columns(weight: Tensor, tile: int, columns: int, threads: int) -> int:
    """``columns`` if ``fetch_into_l2`` can take them for a tile of that many rows, else 0."""
    pieces = max(tile, threads // 32)
    piece = tile * columns // pieces
    size = weight.element_size()
    fits = pieces <= threads and piece > 0 and piece * size % 16 == 0 and piece <= weight.shape[1]
    return columns if fits and _bulk_addressable(weight, size) else 0


def _bulk_addressable(weight: Tensor, size: int) -> bool:
    """Whether pieces of rows can be copied in bulk: every row starts at, and is, a multiple of 16 bytes."""
    return (
        weight.stride(0) * size % 16 == 0
        and weight.shape[1] * size % 16 == 0
        and (weight.is_meta or weight.data_ptr() % 16 == 0)
    )


def check_operands(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    gated: bool,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
) -> tuple[int, int, int]:
    """The sizes (M, N, K) of operands that fit together; ``scale`` belongs to a quantised weight.

    Raises:
        ValueError: those that do not.
    """
    # A decode step asks some 200 times a token, so what fits is let through by bare comparisons.
    dtype = x.dtype
    fits = weight.dtype is dtype if scale is None else weight.dtype in WEIGHT_DTYPES
    if x.dim() == 2 and weight.dim() == 2 and dtype in DTYPES and fits and out.dtype is dtype:
        m, k = x.shape
        rows, columns = weight.shape
        n = rows // 2 if gated else rows
        shape = (m, n)
        if (
            columns == k
            and out.shape == shape
            and (k <= 1 or (x.stride(1) == 1 and weight.stride(1) == 1))
            and (n <= 1 or out.stride(1) == 1)
            and (activation is None if gated else activation in ACTIVATIONS)
            and not (gated and rows % 2)
            and (bias is None or (bias.dtype is dtype and bias.shape == (rows,) and (rows <= 1 or bias.stride(0) == 1)))
            and (
                residual is None
                or (residual.dtype is dtype and residual.shape == shape and (n <= 1 or residual.stride(1) == 1))
            )
            and (scale is None or _is_vector(scale, rows, torch.float32))
            and (norm_weight is None or _is_vector(norm_weight, k, dtype))
        ):
            return m, n, k
    raise ValueError(_misfit(out, x, weight, bias, residual, activation, gated, scale, norm_weight))


def _is_vector(tensor: Tensor, length: int, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.shape == (length,) and (length <= 1 or tensor.stride(0) == 1)


def _misfit(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    gated: bool,
    scale: Tensor | None,
    norm_weight: Tensor | None,
) -> str:
    """What does not fit, in words."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return f"expected x [M, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}"
    rows = weight.shape[0]
    if gated and rows % 2:
        return f"expected gate rows above as many up rows, got {rows} rows"
    if gated and activation is not None:
        return f"a gated product has no further activation, got {activation!r}"
    if not gated and activation not in ACTIVATIONS:
        return f"activation must be one of {ACTIVATIONS}, got {activation!r}"
    if x.dtype not in DTYPES:
        return f"expected float16, bfloat16 or float32, got {x.dtype}"
    for name, tensor, length, dtype in (
        ("scale", scale, rows, torch.float32),
        ("norm_weight", norm_weight, x.shape[1], x.dtype),
    ):
        if tensor is not None and not _is_vector(tensor, length, dtype):
            return f"expected a dense {name} [{length}] of {dtype}, got {list(tensor.shape)} of {tensor.dtype}"
    if scale is not None and weight.dtype not in WEIGHT_DTYPES:
        return f"a weight with a scale is one of {WEIGHT_DTYPES}, got {weight.dtype}"
    shape = (x.shape[0], rows // 2 if gated else rows)
    others = {"out": (out, shape), "weight": (weight, weight.shape), "bias": (bias, (rows,))}
    for name, (tensor, wanted) in {**others, "residual": (residual, shape)}.items():
        if tensor is not None and tensor.shape != wanted:
            return f"expected {name} {list(wanted)}, got {list(tensor.shape)}"
        if tensor is not None and tensor.dtype is not x.dtype and not (name == "weight" and scale is not None):
            return f"{name} is {tensor.dtype}, x is {x.dtype}"
    strides = {name: None if t is None else t.stride() for name, t in (("out", out), ("x", x), ("weight", weight))}
    more = {name: None if t is None else t.stride() for name, t in (("bias", bias), ("residual", residual))}
    return f"expected dense rows, got strides {strides | more}"


def launch_case(
    family: str,
    launcher: Callable[..., None],
    name: str,
    m: int,
    n: int,
    k: int,
    config: Any = None,
    gated: bool = False,
    everything: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    norm: bool = False,
    **expected: Any,
) -> AotCase:
    """One launch for the ahead-of-time check; with ``everything`` there are bias, residual and an activation.

    ``weight_dtype``: of a quantised weight; ``norm``: x is normalised first.
    """

    def call() -> None:
        rows = 2 * n if gated else n
        x, weight, out = (torch.empty(s, device="meta", dtype=dtype) for s in ((m, k), (rows, k), (m, n)))
        more: dict[str, Any] = {}
        if weight_dtype is not None:
            weight = torch.empty(rows, k, device="meta", dtype=weight_dtype)
            more["scale"] = torch.empty(rows, device="meta")
        if norm:
            more |= {"norm_weight": torch.empty(k, device="meta", dtype=dtype), "eps": 1e-5}
        bias = torch.empty(rows, device="meta", dtype=dtype) if everything else None
        activation = "gelu" if everything and not gated else None
        residual = out if everything else None
        launcher(out, x, weight, bias, residual, activation, gated, config, weights_ready=True, **more)

    return AotCase(f"{family} {name}", call, pdl=True, **expected)
