"""``ParallelMLP``: the gated feed-forward block, ``down(act(gate(x)) * up(x))``, with one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_kernels import ops
from tp_kernels.layers.base import TensorParallelLayer, check_input
from tp_kernels.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from tp_kernels.ops._activation import activate
from tp_kernels.ops._gpu import on_gpu
from tp_kernels.ops._library import needs_grad

__all__ = ["ParallelMLP"]

# "silu" takes the fused kernel; the others are the plain gated forms.
_GATES = ("silu", "gelu", "gelu_tanh")


class ParallelMLP(TensorParallelLayer):
    """Gated MLP (SwiGLU by default): gate and up projections fused and column-parallel, down projection row-parallel.

    ``state_dict`` has the stock names ``gate_proj``, ``up_proj`` and ``down_proj``.

    Args:
        hidden_size: size of the input and output.
        intermediate_size: full width; at least the number of ranks.
        bias: a bias for all three projections.
        activation: of the gate: "silu", "gelu" or "gelu_tanh".
        overlap: see ``RowParallelLinear``; with ``sequence_parallel`` for all projections (``ColumnParallelLinear``).
            With gradients an overlapped sum gives up ``ops.swiglu_mlp``, which need not save ``act(gate) * up`` for the
            backward: "auto" does so where the overlap was measured to be faster, "none" never.
            Gate and up projections whose tokens are gathered beside the matmul give up the kernel that multiplies by
            the gate in their epilogue (``ops.swiglu_linear``), and the gate is a pass of its own: "auto" does so only
            where a measurement says that gathering costs more.
        sequence_parallel: input and output are this rank's part of dimension -2, in ``shard_range``'s parts.
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        device: as in torch; ``"meta"`` allocates nothing.
        dtype: of the parameters.

    Shape:
        [..., hidden_size] -> [..., hidden_size], whole and equal on every rank.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: str = "silu",
        overlap: str = "auto",
        sequence_parallel: bool = False,
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        if activation not in _GATES:
            raise ValueError(f"activation must be one of {', '.join(_GATES)}, got {activation!r}")
        self.hidden_size, self.intermediate_size, self.activation = hidden_size, intermediate_size, activation
        self.sequence_parallel = sequence_parallel
        self._spread = sequence_parallel and self.tp_size > 1
        factory = {"group": self.group, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        gate_up = MergedColumnParallelLinear(
            hidden_size,
            [intermediate_size] * 2,
            bias,
            names=("gate_proj", "up_proj"),
            overlap=overlap if sequence_parallel else "auto",
            **factory,
        )
        self._add_fused("gate_up_proj", gate_up)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, overlap=overlap, **factory)

    def forward(self, x: torch.Tensor, sequence_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Apply the block.

        Args:
            x: [..., hidden_size].
            sequence_sizes: with ``sequence_parallel``, every rank's length; None asks the other ranks.
        """
        gate_up, down = self.gate_up_proj, self.down_proj
        if not self._spread and self._trains_fused(x):
            check_input(x, self.hidden_size, gate_up.weight, gate_up)
            group = self.group if self.tp_size > 1 else None
            return down.reduce_partial(ops.swiglu_mlp(x, gate_up.weight, down.weight, gate_up.bias, group=group))
        return down(self.gated(x, sequence_sizes))

    def gated(self, x: torch.Tensor, sequence_sizes: Sequence[int] | None = None) -> torch.Tensor:
        """What ``forward`` projects with ``down_proj``: [..., channels of this rank]. Same arguments.

        With ``sequence_parallel`` the tokens are those of all ranks.
        """
        gate_up = self.gate_up_proj
        weight, bias = gate_up.weight, gate_up.bias
        if self.activation != "silu":
            gate, up = gate_up.project(x, weight, bias, sequence_sizes).chunk(2, dim=-1)
            return activate(gate, self.activation) * up
        check_input(x, self.hidden_size, weight, gate_up)
        group = self.group if self.tp_size > 1 else None
        if self._spread:
            sizes = gate_up._sequence_sizes(x, sequence_sizes)
            if gate_up.gathers_beside(x, sizes):
                return ops.silu_mul(gate_up.project(x, weight, bias, sizes))
            x, group = gate_up.parallel_input(x, sizes), None  # the gather's backward sums the gradient
        return ops.swiglu_linear(x, weight, bias, group=group, weight_scale=gate_up.weight_scale)

    def _trains_fused(self, x: torch.Tensor) -> bool:
        """Whether the fused MLP takes over the down projection's matmul: for its backward, on GPUs.

        Not where that projection overlaps its sum over the ranks, because that was asked for or, with "auto", measured
        to be faster: the fused MLP's sum comes after its matmul. Nor where the projection is not the stock one, nor
        with quantised weights.
        """
        gate_up, down = self.gate_up_proj, self.down_proj
        return (
            self.activation == "silu"
            and isinstance(x, torch.Tensor)
            and on_gpu(x)
            and needs_grad(x, gate_up.weight, gate_up.bias, down.weight)
            and type(down) is RowParallelLinear
            and down.overlap in ("auto", "none")
            and not (gate_up.quantized or down.quantized)
            and not (down._forward_hooks or down._forward_pre_hooks or down._backward_hooks or down._backward_pre_hooks)
            and down.sum_path(x) == "none"
        )

    @classmethod
    def from_linear(
        cls, gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, group: Any = None, **options: Any
    ) -> ParallelMLP:
        """Shard the three projections of an existing gated MLP; they are left alone.

        Raises:
            ValueError: the projections do not fit together, or only some have a bias.
        """
        if gate.out_features != up.out_features or down.in_features != up.out_features:
            raise ValueError("gate and up must have as many outputs as down has inputs")
        if len({layer.bias is None for layer in (gate, up, down)}) != 1:
            raise ValueError("expected a bias in all three projections or in none")
        mlp = cls(
            gate.in_features,
            gate.out_features,
            bias=gate.bias is not None,
            group=group,
            device="meta",
            dtype=gate.weight.dtype,
            **options,
        )
        mlp.gate_up_proj._take_over([gate, up])
        mlp.down_proj._take_over([down])
        return mlp.train(down.training)
