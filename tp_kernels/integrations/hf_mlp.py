"""The gated MLP of a Hugging Face model: gate and up projections as one fused matmul with SwiGLU."""

from __future__ import annotations

import torch

from tp_kernels import ops
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.integrations.hf_packing import PackedLinears, unobserved
from tp_kernels.layers.linear import RowParallelLinear
from tp_kernels.ops._gpu import on_gpu
from tp_kernels.ops._library import needs_grad

__all__ = ["MLPAdapter"]


class MLPAdapter(PackedLinears):
    """Takes the place of ``forward`` in ``LlamaMLP`` and its like; the SiLU gate only.

    Attributes:
        tp_group: the ``TPGroup`` of the projections.
        tp_gate: class of the activation that the kernel computes.
    """

    packed_names = ("gate_proj", "up_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden], whole and equal on every rank."""
        joined, down = self._joined_gate(), self.down_proj
        if joined is None:
            return down(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        weight, bias = joined
        if (
            on_gpu(x)
            and type(down) is RowParallelLinear
            and unobserved(down)
            and down.overlap in ("auto", "none")
            and getattr(down, "weight_scale", None) is None
            and needs_grad(x, weight, bias, down.weight)
            and down.sum_path(x) == "none"  # see ``ParallelMLP``
        ):
            return down.reduce_partial(ops.swiglu_mlp(x, weight, down.weight, bias, group=self._ranks()))
        return down(ops.swiglu_linear(x, weight, bias, group=self._ranks()))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """What the down projection projects: [..., channels of this rank]."""
        joined = self._joined_gate()
        if joined is None:
            return self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return ops.swiglu_linear(x, *joined, group=self._ranks())

    def _joined_gate(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """``joined()`` where the gate is the one that our kernels compute, else None."""
        gate = self.act_fn
        return self.joined() if type(gate) is self.tp_gate and unobserved(gate) else None

    def _ranks(self) -> TPGroup | None:
        return self.tp_group if self.tp_group.world_size > 1 else None
