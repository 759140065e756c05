"""Tolerances that mean something, and inputs whose sums are exact.

Layers and kernels may be at most twice as far from an fp32 or fp64 reference as PyTorch is in the same dtype.
Communication is tested with small integers held in floats: every sum is exact, so the tolerance is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["assert_close_to_reference", "integers", "max_error"]

_GPU_FP32_FACTOR, _GPU_FP32_ULPS = 8.0, 4.0


def max_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference, taken in float64; 0.0 for empty tensors. NaN and equal infinities count as equal."""
    if actual.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(reference.shape)}")
    return _differences(actual, reference).max().item() if actual.numel() else 0.0


def assert_close_to_reference(
    actual: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    reference: torch.Tensor,
    factor: float = 2.0,
    name: str = "result",
) -> None:
    """Assert max|actual - reference| <= max(factor * max|torch_same_dtype - reference|, one ulp of the largest value).

    fp32 results on a GPU have a factor of at least 8 and a floor of 4 ulp: kernels use the GPU's approximate
    exponentials, divisions and square roots, which err by 2 ulp each, and PyTorch's functions by 1; and PyTorch's worst
    of a few fp32 results is often exact by luck.

    Args:
        actual: what is tested, any dtype.
        torch_same_dtype: PyTorch's result in the dtype of ``actual``, same shape.
        reference: the same computed in fp32 or fp64, same shape.
        factor: how many times PyTorch's error is allowed.
        name: what to call the tensor in the message.
    Raises:
        AssertionError: with the errors, the bound, and the worst element. ValueError when shapes or dtypes do not fit.
    """
    if actual.shape != reference.shape or torch_same_dtype.shape != reference.shape:
        raise ValueError(
            f"{name}: shapes differ: actual {tuple(actual.shape)}, torch {tuple(torch_same_dtype.shape)}, "
            f"reference {tuple(reference.shape)}"
        )
    if actual.dtype != torch_same_dtype.dtype:
        raise ValueError(f"{name}: expected PyTorch's result in {actual.dtype}, got {torch_same_dtype.dtype}")
    if reference.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: the reference must be float32 or float64, got {reference.dtype}")
    if actual.numel() == 0:
        return
    difference = _differences(actual, reference)
    error = difference.max().item()
    torch_error = max_error(torch_same_dtype, reference)
    finite = reference[torch.isfinite(reference)].double()
    scale = finite.abs().max().item() if finite.numel() else 0.0
    # The floor is what rounding the exact result to the dtype can cost; PyTorch being exact by luck proves nothing.
    floor = torch.finfo(actual.dtype).eps * scale
    if actual.is_cuda and actual.dtype == torch.float32:
        factor, floor = max(factor, _GPU_FP32_FACTOR), _GPU_FP32_ULPS * floor
    bound = max(factor * torch_error, floor)
    if error <= bound:
        return
    worst = int(difference.argmax())
    index = _unravel(worst, actual.shape)
    values = [t.detach().cpu().flatten()[worst].item() for t in (actual, torch_same_dtype, reference)]
    raise AssertionError(
        f"{name} ({actual.dtype}, {tuple(actual.shape)}): error {error:.3e} exceeds {bound:.3e} "
        f"(= max({factor:g} x PyTorch's own {torch_error:.3e}, floor {floor:.3e})); "
        f"at {index}: got {values[0]!r}, PyTorch {values[1]!r}, reference {values[2]!r}; "
        f"{int((difference > bound).sum())} of {actual.numel()} elements are outside"
    )


def _unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for extent in reversed(shape):
        flat, position = divmod(flat, extent)
        index.append(position)
    return tuple(reversed(index))


def _differences(actual: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    a, r = actual.detach(), reference.detach()
    if a.device != r.device:
        a, r = a.cpu(), r.cpu()
    a, r = a.double(), r.double()  # where they are: results of real shapes take seconds to compare on a CPU
    same = (a == r) | (a.isnan() & r.isnan())  # a difference of equal infinities would be NaN
    return torch.where(same, torch.zeros_like(a), (a - r).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))


def integers(
    shape: Sequence[int] | int,
    dtype: torch.dtype = torch.float32,
    low: int = -8,
    high: int = 8,
    seed: int = 0,
) -> torch.Tensor:
    """Random integers in [low, high] held in ``dtype``, the same for the same arguments on every machine.

    Args:
        shape: shape of the result.
        low, high: inclusive; with ranks' sums in bf16 keep world_size * max(|low|, |high|) <= 256 to stay exact.
        seed: vary it with the rank.
    """
    if high < low:
        raise ValueError(f"integers: expected low <= high, got {low} and {high}")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
