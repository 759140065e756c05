"""Linear layers whose weight is spread over the ranks of a group.

    ColumnParallelLinear   y[..., own] = x @ W[own].T + b[own]            each rank computes some of the outputs
    RowParallelLinear      y = sum over ranks of x[..., own] @ W[:, own].T, then + b once

``W`` is [out_features, in_features] as in torch. A column-parallel layer followed by a row-parallel one needs a single
all-reduce (Megatron's pairing); both cut the dimension between them by ``checkpoint.sharding.shard_width``, so any size
works on any number of ranks and pairs always agree. With ``sequence_parallel`` the all-reduce is split into an
all-gather of the sequence before the pair and a reduce-scatter after it, and activations outside the pair are 1/N as
long.

What a communicator can do beside a matmul (its ``overlap_modes``; ``overlap=`` of the layers):

    RowParallelLinear        chunked: NCCL    fused: symmetric memory    its sum, and the residual and norm behind it
    the same, in sequence    chunked: NCCL                               its reduce-scatter, and residual and norm
    ColumnParallelLinear     chunked: NCCL                               in sequence: the all-gather before it

"auto" takes of these what was measured to be faster; a CPU's communicators offer none. ``RowParallelLinear.norm_path``
says which way a sum goes that a norm follows.

Numerics: the partial sums are rounded to the activations' dtype, then summed over the ranks as the group's communicator
promises (``group.numerics``); the row-parallel bias is added after that sum.
"""

from __future__ import annotations

from tp_kernels.layers.column_parallel import ColumnParallelLinear, MergedColumnParallelLinear
from tp_kernels.layers.row_parallel import RowParallelLinear

__all__ = ["ColumnParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"]
