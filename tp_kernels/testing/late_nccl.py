"""NCCL whose asynchronous collectives begin late, and memory full of NaN: to find waits that are missing on a GPU."""

from __future__ import annotations

import torch

from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.testing.nccl_group import nccl_group

__all__ = ["ASYNC", "CYCLES", "integers", "late_nccl", "spoil"]

CYCLES = 20_000_000  # some 10 ms, longer than anything in these tests takes
ASYNC = ("all_reduce_async", "reduce_scatter_async", "all_gather_async")

_groups: dict[str, TPGroup] = {}


def late_nccl(group):
    """A group over NCCL whose asynchronous collectives begin late; kept for the process's next test."""
    if "late" not in _groups:
        made = nccl_group(group, timeout=60.0)
        communicator = made.communicator
        for name in ASYNC:
            setattr(communicator, name, _after_a_sleep(communicator, getattr(communicator, name)))
        _groups["late"] = TPGroup(communicator, ranks=group.ranks, device_type="cuda")
    return _groups["late"]


def _after_a_sleep(communicator, start):
    def delayed(*args, **options):
        stream = communicator.comm_stream
        if torch.cuda.is_current_stream_capturing():
            stream.wait_stream(torch.cuda.current_stream())  # else the sleep would not be in the graph
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
        return start(*args, **options)

    return delayed


def integers(*shape, seed, dtype=torch.bfloat16):
    """-1, 0 and 1, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to("cuda", dtype)


def spoil(*shapes, dtype=torch.bfloat16):
    """Leave NaN where the allocator will put the next tensors of these shapes, and a busy stream before them."""
    tensors = [torch.full(shape, torch.nan, device="cuda", dtype=dtype) for shape in shapes for _ in range(4)]
    torch.cuda._sleep(CYCLES // 4)
    del tensors
