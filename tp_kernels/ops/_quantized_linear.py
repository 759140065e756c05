"""``linear`` and ``swiglu_linear`` with weights of one byte: which path a call takes, and the path itself.

    gemv         up to 8 rows of x: ``kernels.gemv`` reads the bytes, 16 at a time, and converts them in registers
    skinny       up to 256 rows: ``kernels.skinny``, whose tiles are converted on their way to the tensor cores; the
                 weights are read once for every 64 rows
    dequantize   any number of rows, any dtype: the weight is written out in x's dtype, then cuBLAS
    torch        the same by PyTorch alone

The first two multiply the fp32 sum of a row by its scale, once; the others round the scaled weight to x's dtype first,
as a weight that was never quantised would have been. cuBLAS has nothing that reads weights of one byte beside
activations of two, so the kernels are the default for few rows. The loop of "gemv" has 4.6, 6.4, 9.9 and 16.8
instructions an int8 weight for 1, 2, 4 and 8 rows (3.8 to 16 with fp8), that of "skinny" 3.3 for up to 16 (Triton 3.6,
sm_90); a multiprocessor of an H100 can issue about ten for each weight at 3 TB/s, so the default changes to tensor
cores between four rows and eight.

Predicted, not measured: "dequantize" moves five bytes a weight (one read, two written, two read by cuBLAS) where a
16-bit weight costs two; 28672 x 4096 at 3 TB/s, 0.12 ms more, a tenth of that GEMM at 4096 rows of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tp_kernels.ops import _library
from tp_kernels.ops._gpu import GpuInfo, autocast_dtype, gpu_of, kernels_reason, takes_kernels
from tp_kernels.ops._gpu_linear import dense_rows, few_rows_launcher, obstacle, settled, torch_linear
from tp_kernels.ops._library import needs_grad, new_like
from tp_kernels.ops.quantize import dequantize_weight, dequantize_weight_reference, fp8_reason
from tp_kernels.ops.tuning import Choice, Plan, cached_decision, lookup

__all__ = ["choose_quantized", "operands_for", "quantized_linear", "quantized_plan", "refuse_gradients"]

# Most rows of x that a path takes, and up to which it is the default.
_MOST_ROWS = {"gemv": 8, "skinny": 256}
_DEFAULT_ROWS = {"gemv": 4, "skinny": 64}


def refuse_gradients(*tensors: Tensor | None) -> None:
    """Raise ValueError if a gradient would be needed for one of the tensors."""
    if needs_grad(*tensors):
        raise ValueError(
            "quantised weights are for inference: an operand requires a gradient; call it under torch.no_grad()"
        )


def operands_for(
    x: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(x, bias, residual, later)`` as autocast has them: what is wider than x then is added ``later``."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, bias, residual, None
    bias = None if bias is None else bias.to(dtype)
    if residual is not None and residual.dtype is not dtype:
        return x.to(dtype), bias, None, residual
    return x.to(dtype), bias, residual, None


@cached_decision
def quantized_plan(op: str, info: GpuInfo, dtype: torch.dtype, fp8: bool, m: int, n: int, k: int) -> Plan:
    """The path for x [m, k] and n columns of the result, whatever the tensors; no ``launch`` means dequantising first.

    Args:
        op: "linear" or "swiglu_linear".
        info, dtype, m, n, k: the GPU and the problem.
        fp8: the weights are fp8, not int8.
    """
    old = fp8_reason(info) if fp8 else None
    if old is not None:
        return Plan("torch", old)
    if dtype not in (torch.bfloat16, torch.float16):
        return Plan("dequantize", f"{dtype}: the kernels for quantised weights take 16-bit activations")
    if m == 0 or n == 0 or k == 0:
        return Plan("dequantize", "an operand is empty")
    if k % 16:
        return Plan("dequantize", f"rows of {k} weights are not multiples of 16 bytes")
    entry = lookup(f"quantized_{op}", info, dtype, m=m, n=n, k=k, fp8=-1 if fp8 else 0)
    if entry is not None and entry.path in ("torch", "dequantize"):
        return Plan("dequantize", entry.reason())
    path = next((name for name, most in _DEFAULT_ROWS.items() if m <= most), None)
    reason, config = f"not measured on {info.name}; cuBLAS reads no weights of one byte", {}
    if entry is not None and m <= _MOST_ROWS.get(entry.path, 0):
        path, reason, config = entry.path, entry.reason(), entry.config
    elif path is None:
        return Plan(
            "dequantize", f"not measured on {info.name}; made for up to {_DEFAULT_ROWS['skinny']} rows, not {m}"
        )
    try:
        launch, chosen, module = few_rows_launcher(path, config)
    except TypeError:
        (launch, chosen, module), reason = few_rows_launcher(path, {}), f"{reason}; not with {config}: tune again"
    if chosen is not None:
        # It was measured for as little as half the rows, of which the kernels keep tiles.
        needed = module.shared_bytes(chosen, m, op == "swiglu_linear", dtype.itemsize, True)
        chosen = chosen if needed <= info.max_shared else None
    return Plan(path, reason, chosen, launch)


def _decide(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor, gated: bool
) -> Plan:
    n, k = weight.shape
    op = "swiglu_linear" if gated else "linear"
    fp8 = weight.dtype is torch.float8_e4m3fn
    plan = quantized_plan(op, gpu_of(x), x.dtype, fp8, x.numel() // k if k else 0, n // 2 if gated else n, k)
    if plan.launch is not None:
        reason = obstacle(x, weight, bias, residual)
        if reason is not None:
            return Plan("dequantize", reason)
    return plan


def choose_quantized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor,
    gated: bool,
) -> Choice:
    """Which GPU path a call takes, and why: "gemv", "skinny", "dequantize" or "torch"."""
    x, bias, residual, _ = operands_for(x, bias, residual)
    reason = kernels_reason(x) or kernels_reason(scale)
    if reason is not None:
        return Choice("torch", reason)
    return _decide(x, weight, bias, residual, scale, gated).choice()


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    scale: Tensor,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``linear``, or ``swiglu_linear`` when gated, with a quantised weight; operands were checked, no gradient.

    ``out``: contiguous, where the result goes (not under autocast); None allocates.
    """
    if takes_kernels(x) and takes_kernels(scale):
        plan = _decide(x, weight, bias, residual, scale, gated)
        if plan.launch is not None:
            n, k = weight.shape
            if out is None:
                out = new_like(x, n // 2 if gated else n)
            width = out.shape[-1]
            plan.launch(
                dense_rows(out, width),
                dense_rows(x, k),
                weight,
                None if bias is None else bias.contiguous(),
                None if residual is None else dense_rows(residual, width),
                activation,
                gated,
                plan.config,
                weights_ready=settled(weight),
                scale=scale.contiguous(),
            )
            return out
        matrix = dequantize_weight(weight, scale, x.dtype)
        if out is not None and not gated and bias is None and residual is None and activation is None:
            torch.mm(x.reshape(-1, x.shape[-1]), matrix.t(), out=out.view(-1, out.shape[-1]))
            return out
        result = _multiply(x, matrix, bias, residual, activation, gated)
    elif x.is_cpu and _library.pretended is None:
        result = _on_cpu(x, weight, bias, residual, activation, scale, gated)
    else:
        matrix = dequantize_weight_reference(weight, scale, x.dtype)
        result = _multiply(x, matrix, bias, residual, activation, gated)
    return result if out is None else out.copy_(result)


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, gated: bool
) -> Tensor:
    """The op with a weight of x's dtype, by PyTorch; ``silu_mul`` is ours."""
    if gated:
        # Imported here because that module builds on this one.
        from tp_kernels.ops.swiglu import silu_mul

        return silu_mul(F.linear(x, weight, bias))
    return torch_linear(x, weight, bias, residual, activation)


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    scale: Tensor,
    gated: bool,
) -> Tensor:
    """In fp32 from the first to the last step, which is rounded; one row's result depends on no other row's."""
    from tp_kernels.ops.linear import linear
    from tp_kernels.ops.swiglu import swiglu_linear

    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        matrix = dequantize_weight_reference(weight, scale, wide)
        added = [None if t is None else t.to(wide) for t in (bias, residual)]
        if gated:
            return swiglu_linear(x.to(wide), matrix, added[0]).to(x.dtype)
        return linear(x.to(wide), matrix, *added, activation).to(x.dtype)
