"""Weights of one byte, for inference: a row of the weight becomes 8-bit numbers and one fp32 scale.

    quantize_weight(w, "int8")   scale = absmax(row) / 127,  q = round(w / scale)                 torch.int8
    quantize_weight(w, "fp8")    scale = absmax(row) / 448,  q = w / scale to the nearest         torch.float8_e4m3fn
    dequantize_weight(q, scale)  q * scale

Shapes: ``w``, ``q`` [N, K], ``scale`` fp32 [N]. A row is an output channel, so slices of rows are quantised as in the
whole weight, and slices of columns have scales of their own; neither needs communication. ``linear`` and
``swiglu_linear`` take such weights with ``weight_scale=scale``.

Error of a weight against the largest of its row: at most 1/254 with int8. With fp8 each weight has three bits of
mantissa: at most 1/16 of itself, or 2**-10 / 448 of the largest, whichever is more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_kernels.ops._gpu import GpuInfo, gpu_of, takes_kernels
from tp_kernels.ops._library import watched

__all__ = [
    "KINDS",
    "check_scale",
    "dequantize_weight",
    "dequantize_weight_reference",
    "fp8_reason",
    "kind_of",
    "quantize_weight",
]

# dtype of the numbers and the largest of them, by the name of the format.
KINDS: dict[str, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}
_NAMES = {dtype: name for name, (dtype, _) in KINDS.items()}
# Elements quantised at a time: fp32 copies of more would be the peak of memory while a model is loaded.
_CHUNK = 1 << 24


def kind_of(dtype: torch.dtype) -> str | None:
    """ "int8" or "fp8" for the dtype of a quantised weight, else None."""
    return _NAMES.get(dtype)


@torch.no_grad()
def quantize_weight(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Quantise a weight row by row.

    Args:
        weight: [N, K], floating-point.
        kind: "int8" (symmetric, -127 to 127) or "fp8" (e4m3, to 448).

    Returns:
        ``(q, scale)``: [N, K] int8 or float8_e4m3fn, contiguous, and fp32 [N]. Rows of zeros have the scale 1.

    Raises:
        ValueError: an unknown kind, a weight that is not a floating-point matrix or has values that are not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}, got {kind!r}")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.element_size() == 1:
        raise ValueError(f"expected a floating-point weight [N, K], got {list(weight.shape)} of {weight.dtype}")
    dtype, largest = KINDS[kind]
    n, k = weight.shape
    q = torch.empty(n, k, dtype=dtype, device=weight.device)
    scale = torch.ones(n, dtype=torch.float32, device=weight.device)
    if weight.numel() == 0 or weight.is_meta:
        return q, scale
    rows = max(_CHUNK // k, 1)
    for start in range(0, n, rows):
        part = weight[start : start + rows].detach().float()
        found = part.abs().amax(1) / largest
        # What is this small is zero: such scales lose precision, and where subnormal numbers are flushed they are zero.
        found = torch.where(found < torch.finfo(torch.float32).tiny, 1.0, found)
        part = (part / found[:, None]).clamp_(-largest, largest)
        q[start : start + rows] = (part.round_() if dtype is torch.int8 else part).to(dtype)
        scale[start : start + rows] = found
    bad = scale.isfinite().logical_not_().nonzero()
    if len(bad):
        raise ValueError(f"cannot quantise a weight that is not finite: row {int(bad[0])} of {n} has inf or nan")
    return q, scale


def check_scale(weight: Tensor, scale: Tensor) -> None:
    """Raise ValueError unless ``weight`` is a quantised matrix and ``scale`` one fp32 number for each of its rows."""
    if weight.dim() != 2 or weight.dtype not in _NAMES:
        raise ValueError(
            f"expected an int8 or float8_e4m3fn weight [N, K] beside a scale, got {list(weight.shape)} "
            f"of {weight.dtype}"
        )
    if scale.shape != weight.shape[:1] or scale.dtype is not torch.float32 or scale.device != weight.device:
        raise ValueError(
            f"expected a scale [{weight.shape[0]}] of torch.float32 on {weight.device}, got {list(scale.shape)} "
            f"of {scale.dtype} on {scale.device}"
        )


def fp8_reason(info: GpuInfo) -> str | None:
    """Why no kernel of ours reads fp8 on this GPU; None if one does."""
    if info.capability < (8, 9):
        return f"fp8 needs compute capability 8.9, {info.name} has {info.capability[0]}.{info.capability[1]}"
    return None


def dequantize_weight_reference(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Plain PyTorch ``dequantize_weight``."""
    wide = torch.promote_types(dtype, torch.float32)
    return (q.to(wide) * scale.to(wide)[:, None]).to(dtype)


@torch.no_grad()
def dequantize_weight(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that ``quantize_weight`` made ``(q, scale)`` of, as far as it can be had back.

    On a GPU one pass over memory: N * K bytes read, and as many numbers of ``dtype`` written.

    Args:
        q: [N, K] int8 or float8_e4m3fn.
        scale: fp32 [N].
        dtype: of the result; the product, in fp32, is rounded to it once.

    Returns:
        [N, K], contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_scale(q, scale)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise ValueError(f"expected a floating-point dtype of 16 bits or more, got {dtype}")
    if (
        not watched()
        and takes_kernels(q)
        and takes_kernels(scale)
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (q.dtype is torch.int8 or fp8_reason(gpu_of(q)) is None)
        and (q.shape[1] <= 1 or q.stride(1) == 1)
    ):
        from tp_kernels.ops.kernels.dequantize import dequantize

        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        dequantize(out, q, scale.contiguous())
        return out
    return dequantize_weight_reference(q, scale, dtype).contiguous()
