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
        overlap: see ``RowParallelLinear``.
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
        factory = {"group": self.group, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        gate_up = MergedColumnParallelLinear(
            hidden_size, [intermediate_size] * 2, bias, names=("gate_proj", "up_proj"), **factory
        )
        self._add_fused("gate_up_proj", gate_up)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, overlap=overlap, **factory)

    def forward(
        self, x: torch.Tensor, reduce_results: bool = True, sequence_sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            x: [..., hidden_size].
            reduce_results: False returns ``down_proj``'s ``partial_sum`` and leaves the rest to the caller.
            sequence_sizes: with ``sequence_parallel``, every rank's length; None asks the other ranks.
        """
        gate_up = self.gate_up_proj
        if self.sequence_parallel and self.tp_size > 1:
            return self.down_proj(self._gated(gate_up.parallel_input(x, sequence_sizes)))
        if self.activation == "silu":
            check_input(x, self.hidden_size, gate_up.weight, gate_up)
            group = self.group if self.tp_size > 1 else None
            if reduce_results and self._trains_fused(x):
                out = ops.swiglu_mlp(x, gate_up.weight, self.down_proj.weight, gate_up.bias, group=group)
                return self.down_proj.reduce_partial(out)
            hidden = ops.swiglu_linear(x, gate_up.weight, gate_up.bias, group=group, weight_scale=gate_up.weight_scale)
        else:
            gate, up = gate_up.project(x, gate_up.weight, gate_up.bias).chunk(2, dim=-1)
            hidden = activate(gate, self.activation) * up
        return self.down_proj(hidden) if reduce_results else self.down_proj.partial_sum(hidden)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's channels for all tokens, which ``x`` holds already."""
        gate_up = self.gate_up_proj
        if self.activation == "silu":
            return ops.swiglu_linear(x, gate_up.weight, gate_up.bias, weight_scale=gate_up.weight_scale)
        gate, up = gate_up._linear(x, gate_up.weight, gate_up.bias).chunk(2, dim=-1)
        return activate(gate, self.activation) * up

    def _trains_fused(self, x: torch.Tensor) -> bool:
        """Whether the fused MLP takes over the down projection's matmul: for its backward, on GPUs.

        Not where that projection overlaps its matmul with communication, or is not the stock one, nor with quantised
        weights.
        """
        gate_up, down = self.gate_up_proj, self.down_proj
        return (
            on_gpu(x)
            and needs_grad(x, gate_up.weight, gate_up.bias, down.weight)
            and type(down) is RowParallelLinear
            and down.overlap in ("auto", "none")
            and not (gate_up.quantized or down.quantized)
            and not (down._forward_hooks or down._forward_pre_hooks or down._backward_hooks or down._backward_pre_hooks)
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
