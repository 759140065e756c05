"""What PyTorch itself offers in place of the overlapped ops: NCCL one after the other, and its asynchronous TP.

``torch_nccl`` is a matmul and a collective of torch.distributed, which is also how a CPU tries the peers out (over
Gloo: ``torch_gloo``). ``torch_async_tp`` is what torch.compile makes of gather and matmul, or matmul and scatter, on
GPUs that reach each other's memory (``torch.ops.symm_mem.fused_all_gather_matmul``, ``fused_matmul_reduce_scatter``;
there is none for all-reduce). Its barriers have no deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tp_kernels.testing.overlap_bench.case import Operands

__all__ = ["ASYNC_TP", "async_tp_of", "distributed_of", "why_no_async_tp"]

ASYNC_TP = "torch_async_tp"
_FUSED = {
    "column_parallel_linear": "fused_all_gather_matmul",
    "linear_reduce_scatter": "fused_matmul_reduce_scatter",
}


def distributed_of(operands: Operands, process_group: Any) -> Callable[[], Tensor]:
    """Matmul and collective of ``torch.distributed``, one after the other.

    Args:
        operands: of a case whose tokens are the same number on every rank.
        process_group: NCCL's for GPUs.
    """
    import torch.distributed as dist

    x, weight = operands.x, operands.weight.t()
    # Newer names first: the older ones warn where both exist.
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def gather() -> Tensor:
        whole = x.new_empty(operands.case.m, x.shape[1])
        gather_into(whole, x, group=process_group)
        return whole @ weight

    def scatter() -> Tensor:
        part = x.new_empty(operands.sizes[operands.rank], weight.shape[1])
        scatter_into(part, x @ weight, group=process_group)
        return part

    def reduce() -> Tensor:
        total = x @ weight
        dist.all_reduce(total, group=process_group)
        return total

    if operands.case.gathers:
        return gather
    return reduce if operands.case.op == "linear_all_reduce" else scatter


def why_no_async_tp(operands: Operands, memory: str) -> str:
    """Why torch's asynchronous TP cannot run a case; "" if it may.

    Args:
        memory: why ranks cannot reach each other's memory, "" if they can.
    """
    name = _FUSED.get(operands.case.op)
    if name is None:
        return "there is none for all-reduce"
    if len(set(operands.sizes)) > 1:
        return "it wants as many tokens on every rank"
    if memory:
        return memory
    try:
        import torch.distributed._symmetric_memory  # defines the ops

        getattr(torch.ops.symm_mem, name)
    except (ImportError, AttributeError) as error:
        return f"this torch has no {name}: {error}"
    return ""


def async_tp_of(operands: Operands, group_name: str) -> Callable[[], Tensor]:
    """Torch's fused op; ``why_no_async_tp`` says where there is none.

    Args:
        group_name: of a process group that has memory in common.
    """
    x, weight, torch_ops = operands.x, operands.weight.t(), torch.ops.symm_mem
    if operands.case.gathers:
        return lambda: torch_ops.fused_all_gather_matmul(x, [weight], 0, group_name, return_A=False)[1][0]
    return lambda: torch_ops.fused_matmul_reduce_scatter(x, weight, "sum", 0, group_name)
