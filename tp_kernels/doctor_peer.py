"""The doctor's check of peer memory: what kernels do with another GPU's memory, tried between all ordered pairs.

``torch.cuda.can_device_access_peer`` and host-made copies can be fine where kernels read or write wrong data, or hang
(an IOMMU, access control on PCIe switches, patched drivers). Here a kernel on every GPU stores a pattern to every
other, loads one from it and adds to its counters, with a deadline, in several sizes, and what arrived is compared word
by word. Several GPUs get a rank each; a single one gets two ranks that share it.

The verdicts are kept (``tp_kernels.comm.peer_verdicts``): a pair that failed keeps later groups from peer memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tp_kernels import _native
from tp_kernels.comm.peer_verdicts import PASSED, driver_version, write_verdicts
from tp_kernels.comm.symmetric_workspace import SymmetricMemoryUnavailable
from tp_kernels.doctor import Skip

__all__ = ["check_peer_memory", "verdicts_of"]

_SIZES = (64, 64 << 10, 4 << 20)  # bytes a pair
_SEEDS = (1, 2, 3)  # the kernels use two areas in turn
_DEADLINE = 20.0  # seconds of one wait in a kernel; ranks on one GPU without MPS take turns of milliseconds
_ROWS = ("stored", "loaded", "added")
_MOST_RANKS = 8


def check_peer_memory() -> str:
    """A check of the doctor: run it, keep the verdicts, fail if a pair failed."""
    if not _native.has_cuda():
        raise Skip(f"the CUDA sources were {_native.build_info()['cuda']}")
    if not torch.cuda.is_available():
        raise Skip("no GPU here")
    count = torch.cuda.device_count()
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        missing = [f"{a}->{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
        if missing:
            raise Skip(f"no peer access between GPUs {', '.join(missing)}; groups use NCCL")
    try:
        results = _on_one_gpu() if count == 1 else _on_gpus(min(count, _MOST_RANKS))
    except SymmetricMemoryUnavailable as error:
        raise Skip(f"there is no symmetric memory here ({error.reason}); groups do without") from None
    verdicts = verdicts_of(results)
    gpus = [result["gpu"] for result in results]
    path = write_verdicts(driver_version(), _by_gpu(verdicts, gpus))
    failed = [f"{a}->{b}: {verdict}" for (a, b), verdict in sorted(verdicts.items()) if verdict != PASSED]
    if failed:
        raise RuntimeError(f"peer memory is left alone from now on ({path}); ranks {'; '.join(failed)}")
    where = f"{count} GPUs" if count > 1 else f"{len(results)} ranks on one GPU"
    return f"{len(verdicts)} ordered pairs of {where}, {len(_SIZES)} sizes; kept in {path}"


def verdicts_of(results: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], str]:
    """What the ranks saw, as one verdict for each ordered pair (who accessed, whose memory).

    Args:
        results: by rank: ``"runs"``, a list of {"bytes", "report"} with report[row][peer] wrong words or adds (rows:
            stores of the peer found here, loads from it, atomics of it found here), ``"waited_for"``, a rank whose
            signal never came here or None, and ``"error"``, what else went wrong on this rank or "".
    Returns:
        ``PASSED``, or what went wrong first.
    """
    world = len(results)
    found = {}
    for a in range(world):
        for b in range(world):
            if a != b:
                found[a, b] = _verdict(results[a], results[b], a, b)
    return found


def _verdict(accessing: Mapping[str, Any], owner: Mapping[str, Any], a: int, b: int) -> str:
    for result in (accessing, owner):
        if result["error"]:
            return f"the check broke off: {result['error']}"
    if owner["waited_for"] == a:
        return f"a signal did not arrive within {_DEADLINE:g} s"
    for ours, theirs in zip(accessing["runs"], owner["runs"], strict=False):
        wrong = (theirs["report"][0][a], ours["report"][1][b], theirs["report"][2][a])
        if any(wrong):
            words = ", ".join(f"{count} {what}" for what, count in zip(_ROWS, wrong, strict=True) if count)
            return f"wrong words or counts with {ours['bytes']} bytes: {words}"
    complete = len(_SIZES) * len(_SEEDS)
    if min(len(accessing["runs"]), len(owner["runs"])) < complete:
        return "the check ended early, because another pair failed"
    return PASSED


def _by_gpu(verdicts: Mapping[tuple[int, int], str], gpus: Sequence[str]) -> dict[tuple[str, str], str]:
    """By GPU instead of rank; of pairs of ranks on the same GPUs a failed one counts."""
    found: dict[tuple[str, str], str] = {}
    for (a, b), verdict in sorted(verdicts.items()):
        pair = (gpus[a], gpus[b])
        if found.get(pair, PASSED) == PASSED:
            found[pair] = verdict
    return found


def _on_gpus(count: int) -> list[dict[str, Any]]:
    from tp_kernels.testing.rank_pool import RankPool

    # Each rank takes the GPU of its number, whatever the environment of this process says.
    with RankPool(count, backend="gloo", device="cuda", environment=_local_rank, group_timeout=60.0) as pool:
        return pool.run(_on_rank, timeout=180.0)


def _on_one_gpu() -> list[dict[str, Any]]:
    from tp_kernels.testing.one_gpu_ranks import OneGpuRanks

    with OneGpuRanks() as ranks:
        return ranks(2, backend="gloo", group_timeout=60.0).run(_on_rank, timeout=180.0)


def _local_rank(rank: int) -> dict[str, str]:
    return {"LOCAL_RANK": str(rank)}


# In a rank -----------------------------------------------------------------------------------------------------------


def _on_rank(group: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from tp_kernels import one_gpu
    from tp_kernels.comm.gpu_facts import gpu_identity
    from tp_kernels.comm.symmetric_workspace import Workspace

    native, device, rank, world = _native.native, group.device, group.rank, group.world_size
    result: dict[str, Any] = {"gpu": "@".join(gpu_identity(device)), "runs": [], "waited_for": None, "error": ""}
    blocks = int(group.all_gather(torch.tensor([one_gpu.own_max_blocks(device)])).min())
    store = dist.PrefixStore("doctor_peer", dist.distributed_c10d._get_default_store())
    half_bytes = native.cuda_peer_check_half_bytes(world, max(_SIZES))
    with torch.cuda.device(device):
        workspace = Workspace.create(
            rank, world, "peer check", store, group.process_group, device, half_bytes, group.timeout
        )
        try:
            for nbytes in _SIZES:
                for seed in _SEEDS:
                    report = torch.zeros(3, world, dtype=torch.int32, device=device)
                    stream = torch.cuda.current_stream(device)
                    native.cuda_peer_check(
                        workspace.data,
                        workspace.flags,
                        rank,
                        world,
                        workspace.layout.half_bytes,
                        nbytes,
                        seed,
                        report.data_ptr(),
                        blocks,
                        int(_DEADLINE * 1e9),
                        workspace.record_address,
                        stream.cuda_stream,
                    )
                    stream.synchronize()
                    if workspace.record.magic:
                        result["waited_for"] = int(workspace.record.rank)
                        return result
                    result["runs"].append({"bytes": nbytes, "report": report.tolist()})
        except Exception as error:  # a sticky CUDA error: the verdict of this rank's pairs, not of the whole check
            result["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        finally:
            group.barrier()  # no peer's kernel looks at this memory any more
            if not result["error"]:
                workspace.close()
    return result
