"""How long ranks take to add up or to gather: latency and bandwidth of links, and the algorithms over them.

With n ranks and a message of S bytes (Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005, for the costs in terms of latency and bandwidth):

    one-shot   every rank reads the n-1 others' messages                         (n-1) S bytes
    two-shot   every rank sums its n-th part, then reads the others' parts       2 (n-1)/n S bytes
    ring       n-1 steps of a reduce-scatter and n-1 of an all-gather            2 (n-1)/n S bytes

Each has a latency, whatever n; the ring also has 2 (n-1) hops. Bytes are those a rank receives. Which one is taken is
up to the caller: the fastest, as the package's own policy does from a measured table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from tp_kernels.planning.machines import Figure

__all__ = ["LINKS", "NOTHING", "Collective", "Link", "all_gather", "all_reduces", "link"]


@dataclass(frozen=True)
class Link:
    """What connects the ranks; bandwidths are what one rank receives per second.

    Attributes:
        name: as given to ``--link``.
        title: what it is.
        one_shot_latency, two_shot_latency: of kernels that read peers' memory, barriers included; None where ranks
            cannot read each other's memory.
        peer_bandwidth: of those kernels; None as above.
        ring_latency, hop_latency, ring_bandwidth: of a ring as NCCL runs it; None where none is worth planning with.
        shared_gpu: the ranks share one GPU, hence its bandwidth and arithmetic.
    """

    name: str
    title: str
    one_shot_latency: Figure | None = None
    two_shot_latency: Figure | None = None
    peer_bandwidth: Figure | None = None
    ring_latency: Figure | None = None
    hop_latency: Figure | None = None
    ring_bandwidth: Figure | None = None
    shared_gpu: bool = False

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Figure):
                yield field.name, value


class Collective(NamedTuple):
    """A predicted collective: seconds, bytes a rank receives, which algorithm."""

    seconds: float
    received: float
    algorithm: str


NOTHING = Collective(0.0, 0.0, "none")


# Published figures that the links below rest on. Nothing here was measured by this project but "one-gpu".
_NCCL_MODEL = "published: cost model in NCCL 2.30's sym_kernels.cc"
_VLLM_B300 = "published: vLLM #37756, B300, 16 KiB"
_UBX = "published: NCCL contrib/custom_algos, 4 GB200"
_FLASHINFER = "FlashInfer #5023, all-gather of one row, 4 ranks over PCIe"
_SGLANG = "published: SGLang #39605, 2 RTX 5070 Ti without peer access"
_NCCL_H100 = "derived from vLLM #24111 and Triton-distributed #57, NCCL on 4 and 8 H100"
_NCCL_GB200 = "derived from NCCL contrib/custom_algos, 4 and 8 GB200"
_ONE_GPU = "measured: 4 ranks on one H100 through MPS, in CUDA graphs"

_NVLINK4_SHARE = "assumed: NVLink 4's share of the data sheet"


def _us(value: float, source: str) -> Figure:
    return Figure(value * 1e-6, "s", source)


def _gb(value: float, source: str) -> Figure:
    return Figure(value * 1e9, "B/s", source)


def _nvlink3() -> Link:
    # 300 GB/s a direction (data sheet) against NVLink 4's 450.
    as_nvlink4 = "assumed: as NVLink 4"
    return Link(
        "nvlink3",
        "NVLink 3 (A100)",
        _us(6.5, as_nvlink4),
        _us(7.8, as_nvlink4),
        _gb(320 * 300 / 450, _NVLINK4_SHARE),
        _us(12.0, as_nvlink4),
        _us(0.5, as_nvlink4),
        _gb(366 * 300 / 450, _NVLINK4_SHARE),
    )


def _nvlink4() -> Link:
    # One-shot with residual and norm takes 6.7 us for 6 x 6144, of which 0.2 us are bytes. NCCL takes 17 us for 512 KB
    # on 4 H100, of which 2 us are bytes, and 19 us for 128 B on 8: 12 us and 0.5 us a hop.
    return Link(
        "nvlink4",
        "NVLink 4 (H100, H200)",
        _us(6.5, "derived from FlagGems-vllm #773, one-shot with norm, 2 H100"),
        _us(7.8, _NCCL_MODEL),
        _gb(320, _NCCL_MODEL),
        _us(12.0, _NCCL_H100),
        _us(0.5, _NCCL_H100),
        _gb(366, "published: nccl-collectives-bench, 4 H100"),
    )


def _nvlink5() -> Link:
    # NCCL takes 8.2 us for the smallest messages on 4 GB200 and 9.5 us on 8: 7.2 us and 0.16 us a hop.
    return Link(
        "nvlink5",
        "NVLink 5 (B200)",
        _us(7.0, _VLLM_B300),
        _us(9.2, _UBX),
        _gb(600, _NCCL_MODEL),
        _us(7.2, _NCCL_GB200),
        _us(0.16, _NCCL_GB200),
        _gb(366 * 900 / 450, _NVLINK4_SHARE),
    )


def _pcie(generation: int, sheet_gb: float) -> Link:
    usable = _gb(0.8 * sheet_gb, f"assumed: 80% of the data sheet's {sheet_gb:g} GB/s a direction")
    return Link(
        f"pcie{generation}",
        f"PCIe {generation} x16 with peer access",
        _us(6.5, "assumed: as over NVLink 4"),
        _us(10.4, f"derived, two phases of {_FLASHINFER}"),
        usable,
        _us(12.0, "assumed: as over NVLink 4"),
        _us(5.2, f"assumed: as {_FLASHINFER}"),
        usable,
    )


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        _nvlink3(),
        _nvlink4(),
        _nvlink5(),
        _pcie(4, 32),
        _pcie(5, 64),
        # 20 MB take 10.9 ms: 1.9 GB/s; 10 KB take 39 us, of which 5.4 us are bytes.
        Link(
            "pcie-no-peer",
            "PCIe without peer access, through host memory",
            ring_latency=_us(39 - 5.4 - 2 * 5.2, "derived from SGLang #39605 and the hops"),
            hop_latency=_us(5.2, f"assumed: as {_FLASHINFER}"),
            ring_bandwidth=_gb(1.9, _SGLANG),
        ),
        # Two-shot: 7.1 us for 2 KB, 245 us for 64 MB. NCCL talks over sockets here (364 us for 128 KB): left out.
        Link(
            "one-gpu",
            "ranks that share one GPU",
            _us(8.8, _ONE_GPU),
            _us(7.1, _ONE_GPU),
            _gb(420, _ONE_GPU),
            shared_gpu=True,
        ),
    )
}
# By a GPU's usual link: the PCIe that its kind has beside or instead of NVLink (data sheets).
_PCIE = {"nvlink3": "pcie4", "nvlink4": "pcie5", "nvlink5": "pcie5", "pcie4": "pcie4", "pcie-no-peer": "pcie4"}


def link(name: str, usual: str) -> Link:
    """The link of that name.

    Args:
        name: a key of ``LINKS``; ``"auto"``, the GPU's usual link; ``"nvlink"`` or ``"pcie"``, its generation of these.
        usual: the name of the GPU's usual link; ``Machine.link``.

    Raises:
        ValueError: an unknown name (lists those there are), or ``"nvlink"`` for a GPU without.
    """
    if name == "auto" or (name == "nvlink" and usual.startswith("nvlink")):
        return LINKS[usual]
    if name == "nvlink":
        raise ValueError(f"this GPU has no NVLink; choose among auto, pcie, {', '.join(LINKS)}")
    if name == "pcie":
        return LINKS[_PCIE[usual]]
    if name not in LINKS:
        raise ValueError(f"unknown link {name!r}; known: auto, nvlink, pcie, {', '.join(LINKS)}")
    return LINKS[name]


def all_reduces(link: Link, ranks: int, size: float) -> list[Collective]:
    """The ways to sum ``size`` bytes over ``ranks``; for one rank, that there is nothing to do."""
    if ranks == 1:
        return [NOTHING]
    others, parts = (ranks - 1) * size, 2 * (ranks - 1) / ranks * size
    ways = []
    if link.peer_bandwidth is not None:
        peer = link.peer_bandwidth.value
        ways.append(Collective(link.one_shot_latency.value + others / peer, others, "one-shot"))
        ways.append(Collective(link.two_shot_latency.value + parts / peer, parts, "two-shot"))
    if link.ring_bandwidth is not None:
        hops = link.ring_latency.value + 2 * (ranks - 1) * link.hop_latency.value
        ways.append(Collective(hops + parts / link.ring_bandwidth.value, parts, "ring"))
    return ways


def all_gather(link: Link, ranks: int, size: float) -> Collective:
    """The fastest way for every rank to gather ``size`` bytes in all, spread over ``ranks``."""
    if ranks == 1:
        return NOTHING
    others = (ranks - 1) / ranks * size
    ways = []
    if link.peer_bandwidth is not None:
        ways.append(Collective(link.one_shot_latency.value + others / link.peer_bandwidth.value, others, "one-shot"))
    if link.ring_bandwidth is not None:
        hops = link.ring_latency.value + (ranks - 1) * link.hop_latency.value
        ways.append(Collective(hops + others / link.ring_bandwidth.value, others, "ring"))
    return min(ways)
