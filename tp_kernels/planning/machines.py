"""What a GPU can do: vendors' figures, and the share of them that kernels were seen to reach.

Every figure carries its source. "measured" is this project's own, on one H100 80GB HBM3 (torch 2.11, 2026-11-22);
"data sheet" is the vendor's; "assumed" is neither, and says of what it was taken to be the same share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

__all__ = ["MACHINES", "Figure", "Machine", "machine"]

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1.0, ""), (1e-6, "u"))


@dataclass(frozen=True)
class Figure:
    """A number with its unit and where it comes from."""

    value: float
    unit: str
    source: str

    def __str__(self) -> str:
        scale, prefix = next((s for s in _PREFIXES if self.value >= s[0]), _PREFIXES[-1])
        return f"{self.value / scale:.4g} {prefix}{self.unit}"


@dataclass(frozen=True)
class Machine:
    """One GPU, as the planner sees it.

    Attributes:
        name: as given to ``--gpu``.
        title: what the vendor calls it.
        memory: size.
        peak_bandwidth, peak_matmul: of the data sheet; matmul is dense bf16 or fp16 with fp32 accumulation.
        bandwidth: what large memory-bound kernels reach.
        matmul: what large matrix products reach.
        attention: what causal attention of a long prompt reaches.
        kernel_gap: what a kernel in a CUDA graph costs beyond its share of bandwidth or arithmetic: start and tail.
        small_kernel: what the smallest kernel costs.
        link: name of the link its kind is usually connected by.
    """

    name: str
    title: str
    memory: Figure
    peak_bandwidth: Figure
    peak_matmul: Figure
    bandwidth: Figure
    matmul: Figure
    attention: Figure
    kernel_gap: Figure
    small_kernel: Figure
    link: str

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Figure):
                yield field.name, value

    def with_given(
        self, *, bandwidth: float | None = None, tflops: float | None = None, memory: float | None = None
    ) -> Machine:
        """The same GPU with figures of the caller's: TB/s and TFLOP/s that kernels reach, GB of memory.

        Attention's rate keeps its share of the matmul's. None leaves a figure alone.

        Raises:
            ValueError: a figure is not above 0.
        """
        for name, value in (("bandwidth", bandwidth), ("tflops", tflops), ("memory", memory)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        changes: dict[str, Figure] = {}
        if bandwidth is not None:
            changes["bandwidth"] = Figure(bandwidth * 1e12, "B/s", "given")
        if tflops is not None:
            share = self.attention.value / self.matmul.value
            changes["matmul"] = Figure(tflops * 1e12, "FLOP/s", "given")
            changes["attention"] = Figure(tflops * 1e12 * share, "FLOP/s", f"{share:.0%} of the matmul rate given")
        if memory is not None:
            changes["memory"] = Figure(memory * 1e9, "B", "given")
        return replace(self, **changes)


# Measured on the H100: a copy moved 3.00 TB/s; the best cuBLAS product seen 798 TFLOP/s; the best forward attention
# (1 prompt of 4096 tokens, 32 query and 8 KV heads of 128) 669 TFLOP/s.
_H100_BANDWIDTH, _H100_MATMUL, _H100_ATTENTION = 3.00e12, 798e12, 669e12
_H100_PEAK_BANDWIDTH, _H100_PEAK_MATMUL = 3.35e12, 989.4e12
# Products with one row in a CUDA graph, with programmatic dependent launch, took 0.4 to 1.2 us longer than their
# weights at 3.00 TB/s, 0.7 us on average of five shapes of 8 to 59 MB.
_KERNEL_GAP = 0.7e-6
# Residual + RMSNorm of 1 x 4096 in a CUDA graph: 1.37 us with programmatic dependent launch, 1.47 us without.
_SMALL_KERNEL = 1.4e-6


def _gpu(
    name: str, title: str, memory_gb: float, bandwidth: float, matmul: float, link: str, *, measured: bool = False
) -> Machine:
    """A table entry: GB, B/s and FLOP/s of the data sheet; what is reached follows from the H100's shares."""
    same = "measured" if measured else "assumed: the H100's share of the data sheet"
    kernels = "derived from what was measured" if measured else "assumed: as on an H100"
    return Machine(
        name,
        title,
        memory=Figure(memory_gb * 1e9, "B", "data sheet"),
        peak_bandwidth=Figure(bandwidth, "B/s", "data sheet"),
        peak_matmul=Figure(matmul, "FLOP/s", "data sheet"),
        bandwidth=Figure(_H100_BANDWIDTH / _H100_PEAK_BANDWIDTH * bandwidth, "B/s", same),
        matmul=Figure(_H100_MATMUL / _H100_PEAK_MATMUL * matmul, "FLOP/s", same),
        attention=Figure(_H100_ATTENTION / _H100_PEAK_MATMUL * matmul, "FLOP/s", same),
        kernel_gap=Figure(_KERNEL_GAP, "s", kernels),
        small_kernel=Figure(_SMALL_KERNEL, "s", kernels),
        link=link,
    )


MACHINES: dict[str, Machine] = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 80, _H100_PEAK_BANDWIDTH, _H100_PEAK_MATMUL, "nvlink4", measured=True),
        _gpu("h200", "NVIDIA H200 SXM 141 GB", 141, 4.8e12, 989.4e12, "nvlink4"),
        _gpu("a100-80g", "NVIDIA A100 SXM 80 GB", 80, 2.039e12, 312e12, "nvlink3"),
        _gpu("b200", "NVIDIA B200 SXM 180 GB", 180, 8.0e12, 2250e12, "nvlink5"),
        _gpu("l40s", "NVIDIA L40S 48 GB", 48, 0.864e12, 362e12, "pcie4"),
        _gpu("rtx-4090", "NVIDIA GeForce RTX 4090 24 GB", 24, 1.008e12, 165.2e12, "pcie-no-peer"),
    )
}


def machine(name: str) -> Machine:
    """The GPU of that name; ValueError lists the names there are."""
    if name not in MACHINES:
        raise ValueError(f"unknown GPU {name!r}; known: {', '.join(MACHINES)}")
    return MACHINES[name]
