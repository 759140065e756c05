"""``GpuFacts``: what a rank tells the others about its GPU before they choose how to talk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tp_kernels import one_gpu
from tp_kernels._native import build_info
from tp_kernels.comm.nccl_library import nccl_library_info
from tp_kernels.comm.peer_verdicts import driver_version, read_verdicts
from tp_kernels.comm.symmetric_workspace import unavailable_reason

__all__ = ["GpuFacts", "gpu_identity"]


@dataclass(frozen=True)
class GpuFacts:
    """One rank's GPU, and what its process can do with it.

    Attributes:
        uuid, pci: which GPU, and where it is plugged in; equal on ranks that share one.
        name: product name.
        capability: compute capability.
        sms: multiprocessors this rank may use (its share under MPS).
        driver: version of the kernel module.
        reaches: uuids of the GPUs whose memory this one can map, of those that the process sees; its own among them.
        sees: uuids of all GPUs that the process sees.
        symm_problem: why this rank cannot use symmetric memory, as far as it can tell alone; "" if it may.
        symm_unwanted: what of the user's says that peer memory is not to be used; "" if nothing does.
        nccl_version: NCCL_VERSION_CODE of the library found, 0 without one.
        nccl_problem: why there is none; "" if there is one.
        nccl_host: NCCL_HOSTID, by which ranks that share a GPU pass for ranks of different hosts.
        nccl_shares_gpu: NCCL itself was told to accept several ranks on a GPU (NCCL_MULTI_RANK_GPU_ENABLE).
        shared_by: ranks that share this GPU by design (``launch --one-gpu``), else 1.
        verdicts: "uuid@pci" of another GPU (or of this one, for ranks that share it) to what the functional check
            found between them, see ``peer_verdicts``.
    """

    uuid: str
    pci: str
    name: str
    capability: tuple[int, int]
    sms: int
    driver: str
    reaches: tuple[str, ...]
    sees: tuple[str, ...]
    symm_problem: str = ""
    symm_unwanted: str = ""
    nccl_version: int = 0
    nccl_problem: str = ""
    nccl_host: str = ""
    nccl_shares_gpu: bool = False
    shared_by: int = 1
    verdicts: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """The GPU and its place, as verdicts name it."""
        return f"{self.uuid}@{self.pci}"

    @classmethod
    def here(cls, device: torch.device) -> GpuFacts:
        """Facts of the calling process's ``device`` (with its index)."""
        mine = torch.cuda.get_device_properties(device)
        uuid, pci = gpu_identity(device)
        driver = driver_version()
        sees = {index: str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())}
        reaches = [
            other
            for index, other in sees.items()
            if index == device.index or torch.cuda.can_device_access_peer(device.index, index)
        ]
        nccl_version, nccl_problem = _nccl()
        return cls(
            uuid=uuid,
            pci=pci,
            name=mine.name,
            capability=(mine.major, mine.minor),
            sms=one_gpu.sm_share(device),
            driver=driver,
            reaches=tuple(reaches),
            sees=tuple(sees.values()),
            symm_problem=unavailable_reason(device),
            symm_unwanted=_symm_unwanted(),
            nccl_version=nccl_version,
            nccl_problem=nccl_problem,
            nccl_host=os.environ.get("NCCL_HOSTID", ""),
            nccl_shares_gpu=os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1",
            shared_by=one_gpu.ranks_on_this_gpu(),
            verdicts=read_verdicts(driver, f"{uuid}@{pci}"),
        )

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> GpuFacts:
        """From what JSON made of ``asdict``."""
        lists = {name: tuple(facts[name]) for name in ("capability", "reaches", "sees")}
        return cls(**{**facts, **lists})


def gpu_identity(device: torch.device) -> tuple[str, str]:
    """(uuid, PCI address) of a GPU."""
    found = torch.cuda.get_device_properties(device)
    domain, bus, slot = (int(getattr(found, f"pci_{part}_id", 0)) for part in ("domain", "bus", "device"))
    return str(found.uuid), f"{domain:04x}:{bus:02x}:{slot:02x}"


def _symm_unwanted() -> str:
    # Set by people whose GPUs reach each other's memory wrongly; what is bad for NCCL's copies is so for kernels.
    refused = os.environ.get("NCCL_P2P_DISABLE") == "1" and one_gpu.ranks_on_this_gpu() == 1
    return "NCCL_P2P_DISABLE=1 is set" if refused else ""


def _nccl() -> tuple[int, str]:
    """(version, why it cannot be used): the native core's CUDA part, then the library."""
    build = build_info()
    if not build["has_cuda"]:
        return 0, f"the native core's CUDA part was {build['cuda']}"
    library = nccl_library_info()
    return library.version_code, library.error or ""
