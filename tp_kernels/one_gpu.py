"""Several ranks on one GPU: their environment, whether they run at the same time, and how many SMs each may count on.

Ranks that share a GPU run the same NCCL, SymmetricMemory and kernels as ranks with a GPU each, so everyone can test
multi-GPU code on one GPU. ``tp-kernels launch --one-gpu`` and the GPU tests' ranks are made with ``SharedGpu``.

Standard library only at import: launchers and the ranks' first lines use it before torch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tp_kernels.mps import MpsDaemon, find_control, sms_seen_by_a_client

if TYPE_CHECKING:
    import torch

__all__ = [
    "MPS",
    "ONE_GPU",
    "SharedGpu",
    "describe_mps",
    "has_mps",
    "local_device",
    "max_blocks",
    "own_max_blocks",
    "pick_device",
    "rank_environment",
    "ranks_on_this_gpu",
    "shared_environment",
    "sm_share",
]

# In the environment of ranks that share a GPU: how many they are, and whether MPS lets them run at the same time.
ONE_GPU = "TP_KERNELS_ONE_GPU"
MPS = "TP_KERNELS_ONE_GPU_MPS"


# In a rank -----------------------------------------------------------------------------------------------------------


def ranks_on_this_gpu() -> int:
    """How many ranks of this job share this process's GPU by design (``launch --one-gpu``); 1 otherwise."""
    return max(1, int(os.environ.get(ONE_GPU) or 1))


def has_mps() -> bool:
    """Whether the ranks on this GPU are clients of one MPS daemon, so that their kernels run at the same time."""
    return os.environ.get(MPS) == "1"


def local_device(local_rank: int | None = None) -> torch.device:
    """The CUDA device of this rank: ``cuda:0`` where it sees one device only, else ``cuda:<local_rank>``.

    Args:
        local_rank: place of the rank on its host; None takes LOCAL_RANK, else 0.
    Raises:
        ValueError: when the host shows fewer devices (but more than one) than that.
    """
    import torch

    if local_rank is None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if count <= 1:  # one GPU for all ranks, or a scheduler that shows every rank only its own
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this process sees {count}. Ranks that are to share a GPU "
            "are started with `tp-kernels launch --one-gpu`"
        )
    return torch.device("cuda", local_rank)


def sm_share(device: int | str | torch.device | None = None) -> int:
    """SMs that kernels of this rank can run on at once; under MPS that is the rank's share, as CUDA itself reports it.

    Without MPS ranks on one GPU take turns, and each has all SMs in its turn. Grids of kernels that wait for other
    ranks' kernels are capped by ``max_blocks``, not by this.
    """
    import torch

    return torch.cuda.get_device_properties(local_device() if device is None else device).multi_processor_count


def max_blocks(num_sms: int, world_size: int, mps: bool, one_gpu: bool) -> int:
    """Most blocks a kernel may have that waits for kernels of other ranks, at one block an SM.

    All blocks of all ranks must be resident together, or those that run wait for some that cannot start. With a GPU
    each, or with MPS, ``num_sms`` (``sm_share()``) is this rank's already. Without MPS a GPU is shared in turns, and a
    rank's blocks only have to fit alone; they are capped as under MPS all the same, so that a grid, and with it the
    order of a sum, does not depend on whether the machine has MPS.

    Args:
        num_sms: as this rank sees it; ranks agree on the smallest.
        world_size: ranks on the GPU (ignored when each has its own).
        mps, one_gpu: see ``has_mps`` and ``ranks_on_this_gpu() > 1``.
    Raises:
        ValueError: for sizes below 1.
    """
    if num_sms < 1 or world_size < 1:
        raise ValueError(f"max_blocks: expected at least one SM and one rank, got {num_sms} and {world_size}")
    return max(1, num_sms // world_size) if one_gpu and not mps else num_sms


def own_max_blocks(device: int | str | torch.device | None = None) -> int:
    """``max_blocks`` of this rank on its device."""
    ranks = ranks_on_this_gpu()
    return max_blocks(sm_share(device), ranks, has_mps(), ranks > 1)


# For those who start ranks -------------------------------------------------------------------------------------------


def pick_device(visible: str | None, index: int) -> str:
    """The entry of CUDA_VISIBLE_DEVICES (index or UUID) of the ``index``-th visible GPU.

    Args:
        visible: CUDA_VISIBLE_DEVICES, or None when it is not set.
    Raises:
        ValueError: when there is no such entry.
    """
    if index < 0:
        raise ValueError(f"the GPU's index must be at least 0, got {index}")
    if visible is None:
        return str(index)
    entries = []
    for entry in (word.strip() for word in visible.split(",")):
        if not entry or entry.startswith("-"):
            break  # CUDA ignores everything from the first invalid entry on
        entries.append(entry)
    if index >= len(entries):
        raise ValueError(f"GPU {index} was asked for, but CUDA_VISIBLE_DEVICES={visible!r} shows {len(entries)}")
    return entries[index]


def shared_environment(
    nproc: int, device: str, mps: Mapping[str, str] | None, inherited: Mapping[str, str]
) -> dict[str, str]:
    """What all ranks on the GPU need in their environment, on top of ``inherited``.

    Args:
        nproc: number of ranks.
        device: CUDA_VISIBLE_DEVICES of each.
        mps: the environment of an MPS daemon's clients, None without one.
    """
    found = {
        ONE_GPU: str(nproc),
        MPS: "0" if mps is None else "1",
        "CUDA_VISIBLE_DEVICES": device,
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    }
    if mps is not None:
        found.update(mps, CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=str(max(1, 100 // nproc)))
    if inherited.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        # The user's choice (NCCL >= 2.30): see rank_environment. NVLS would make its initialisation fail.
        found["NCCL_NVLS_ENABLE"] = "0"
    else:
        # Ranks that pass for ranks of several hosts need an interface that reaches them all.
        found["NCCL_SOCKET_IFNAME"] = inherited.get("NCCL_SOCKET_IFNAME") or "lo"
    return found


def rank_environment(rank: int, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """What rank ``rank`` alone needs in its environment, before NCCL is used; empty for a rank with its own GPU.

    NCCL refuses two ranks of one host on one GPU. A host id of its own for every rank passes that check in all
    versions, and leaves the ranks to talk over sockets, where no kernel waits for another rank's kernel. NCCL 2.30 also
    has NCCL_MULTI_RANK_GPU_ENABLE=1, which it calls experimental and which hangs when the ranks' kernels do not fit on
    the GPU together: used only when the user has set it.
    """
    inherited = os.environ if inherited is None else inherited
    if not inherited.get(ONE_GPU) or inherited.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        return {}
    return {"NCCL_HOSTID": f"tp_kernels-rank-{rank}"}


def describe_mps() -> str:
    """One line about what ranks on one GPU would find here; starts nothing."""
    control, reason = find_control()
    return f"MPS: {control}" if control else f"no MPS ({reason}): ranks on one GPU would take turns"


class SharedGpu:
    """One GPU for several ranks, with an MPS daemon while this lives, if the machine has MPS; a context manager.

    MPS is used only after a test client was really limited by it: without the limit, kernels that wait for each other
    need not fit on the GPU together.

    Args:
        gpu: index among the visible GPUs.
    Raises:
        ValueError: when no such GPU is visible.
    """

    def __init__(self, gpu: int = 0):
        self.device = pick_device(os.environ.get("CUDA_VISIBLE_DEVICES"), gpu)
        self._daemon = MpsDaemon(self.device)
        self._sms: int | None = None

    def start(self) -> SharedGpu:
        """Start MPS if it can be had; ``describe`` tells."""
        self._daemon.start()
        if self._daemon.running:
            try:
                problem = self._check()
            except BaseException:
                self.close()
                raise
            if problem:
                self._daemon.refuse(problem)
        return self

    def _check(self) -> str:
        """Why the daemon cannot be used, or ""; learns the number of SMs."""
        whole, tenth = (sms_seen_by_a_client({**os.environ, **self.environment(nproc)}) for nproc in (1, 10))
        if whole is None or tenth is None:
            return ""  # no CUDA driver: nothing will run on a GPU
        for seen in (whole, tenth):
            if isinstance(seen, str):
                return f"the daemon runs, but {seen}"
        self._sms = whole
        return "" if tenth < whole else f"a client limited to 10% has {tenth} of {whole} SMs all the same"

    @property
    def mps(self) -> bool:
        """Whether ranks run at the same time."""
        return self._daemon.running

    @property
    def sms(self) -> int | None:
        """SMs of the GPU; None when it could not be asked (no MPS, no driver)."""
        return self._sms

    def environment(self, nproc: int) -> dict[str, str]:
        """Environment of all of ``nproc`` ranks."""
        # An own daemon shows its clients only its one device, which is number 0 for them; a UUID stays what it is.
        device = "0" if self._daemon.own and self.device.isdigit() else self.device
        mps = self._daemon.environment if self._daemon.running else None
        return shared_environment(nproc, device, mps, os.environ)

    def rank_environment(self, nproc: int, rank: int) -> dict[str, str]:
        """Environment of one of ``nproc`` ranks."""
        common = self.environment(nproc)
        return {**common, **rank_environment(rank, {**os.environ, **common})}

    def describe(self, nproc: int) -> str:
        """One line: how ``nproc`` ranks share the GPU."""
        ranks = f"{nproc} rank{'s' if nproc > 1 else ''} on one GPU"
        if not self._daemon.running:
            turns = "; ranks take turns, results are right, times mean nothing" if nproc > 1 else ""
            return f"{ranks}, no MPS ({self._daemon.reason}){turns}"
        of = "the SMs" if self._sms is None else f"the {self._sms} SMs"
        whose = "" if self._daemon.own else " (the daemon that was already running)"
        return f"{ranks}, MPS with {max(1, 100 // nproc)}% of {of} each{whose}"

    def restart(self) -> None:
        """A new daemon: a client that was killed in the middle of a kernel can leave the old one unusable."""
        if self._daemon.own:
            self._daemon.close()
            self.start()

    def close(self) -> None:
        """End an own daemon. The ranks should have ended. Safe to call twice."""
        self._daemon.close()

    def __enter__(self) -> SharedGpu:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()
