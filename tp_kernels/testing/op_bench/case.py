"""What a microbenchmark of an op says about itself; the driver times it, checks it, tunes it and writes the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tp_kernels.ops._gpu import H100, GpuInfo, gpu_of, on_gpu
from tp_kernels.testing.op_bench.shapes import MODELS, Shapes

__all__ = ["MODELS", "Case", "Own", "Shapes", "compiled", "randn", "this_gpu"]

Result = Any  # a tensor or a tuple of tensors


@dataclass(frozen=True)
class Own:
    """One path of ours: a kernel family with the configurations worth measuring.

    Args:
        run: ``run(config, *inputs)``; ``config`` is one of ``configs``, or None for the kernel's default.
        configs: dicts, as they are stored in a tuning table.
    """

    run: Callable[..., Result]
    configs: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Args:
        op: section of the tuning table and name for ``--op``.
        label: model and shape, for the table people read.
        sizes: the dispatch key, as given to ``tuning.lookup``.
        dtype: of the operands.
        inputs: ``inputs(generator)`` makes one fresh set of random inputs on ``generator.device``.
        reference: the exact result from the same inputs, in fp32 or fp64.
        peers: what else there is, functions of the inputs; "torch" is what the op falls back to.
        own: our paths by name.
        public: the public op itself, which chooses a path; timed as "op".
        bytes: fewest bytes that must move; 0 if the op is not memory-bound.
        flops: floating-point operations; 0 if it is not compute-bound.
        input_bytes: size of one set, for rotating more sets than the L2 holds.
        tolerance: allowed multiple of the error of ``peers["torch"]``.
    """

    op: str
    label: str
    sizes: dict[str, int]
    dtype: torch.dtype
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    reference: Callable[..., Result]
    peers: dict[str, Callable[..., Result]]
    own: dict[str, Own]
    public: Callable[..., Result] | None = None
    bytes: int = 0
    flops: int = 0
    input_bytes: int = 0
    tolerance: float = 2.0
    extra: dict[str, Any] = field(default_factory=dict)


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal random numbers on the generator's device."""
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of ``function`` at its first call, free of the recompilation limit of earlier shapes."""
    made: list[Callable[..., Any]] = []

    def call(*inputs: Any) -> Any:
        if not made:
            torch.compiler.reset()
            # A backward that is timed runs many times from one graph, which donated buffers forbid.
            torch._functorch.config.donated_buffer = False
            made.append(torch.compile(function, dynamic=False))
        return made[0](*inputs)

    return call


def this_gpu() -> GpuInfo:
    """The GPU whose configurations are listed; an H100 where there is none."""
    probe = torch.empty(0, device="cuda") if torch.cuda.is_available() else torch.empty(0)
    return gpu_of(probe) if on_gpu(probe) else H100
