"""``ParallelLinear``: what column- and row-parallel linear layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tp_kernels.layers.base import TensorShard, check_dtype, check_linears
from tp_kernels.layers.quantized import QuantizableLinear

__all__ = ["SEQUENCE_DIM", "ParallelLinear"]

# Activations are [..., sequence, hidden].
SEQUENCE_DIM = -2


class ParallelLinear(QuantizableLinear):
    """What both kinds share: the parameters, torch's initialisation, loading from full tensors."""

    in_features: int
    out_features: int

    def _add_parameters(self, weight_shape: tuple[int, int], bias_size: int | None, device, dtype) -> None:
        check_dtype(dtype)
        self.weight = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        self.register_parameter("weight_scale", None)
        if bias_size is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(bias_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initialise as torch.nn.Linear does; see ``layers.base`` for what ranks seeded alike get."""
        self._refuse_quantized("initialise")
        shards = self.tensor_shards()
        for weight, bias in _weight_bias_pairs(shards):
            self.reset_full(weight, lambda full: nn.init.kaiming_uniform_(full, a=math.sqrt(5)))
            if bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                self.reset_full(bias, lambda full, bound=bound: nn.init.uniform_(full, -bound, bound))

    def _load_full(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        self._refuse_quantized("load full weights into")
        pairs = _weight_bias_pairs(self.tensor_shards())
        if len(weights) != len(pairs) or len(biases) != len(pairs):
            raise ValueError(f"expected {len(pairs)} full weights and biases, got {len(weights)} and {len(biases)}")
        copies = []
        for (weight, bias), full_weight, full_bias in zip(pairs, weights, biases, strict=True):
            if (bias is None) != (full_bias is None):
                raise ValueError(f"{weight.name}: expected {'no bias' if bias is None else 'a bias'} beside it")
            copies += [(weight, full_weight)] if bias is None else [(weight, full_weight), (bias, full_bias)]
        for shard, full in copies:
            if tuple(full.shape) != shard.full_shape:
                raise ValueError(f"{shard.name}: expected shape {list(shard.full_shape)}, got {list(full.shape)}")
        for shard, full in copies:
            shard.copy_from_full(full)

    @classmethod
    def _from_one(cls, linear: nn.Linear, group: Any, options: dict[str, Any], *, outputs_first: bool = False):
        """``from_linear`` of a layer with one weight; ``outputs_first`` is the order of the constructor's sizes."""
        check_linears([linear])
        sizes = (linear.in_features, linear.out_features)
        layer = cls(
            *(sizes[::-1] if outputs_first else sizes),
            linear.bias is not None,
            group=group,
            device="meta",
            dtype=linear.weight.dtype,
            **options,
        )
        layer._take_over([linear])
        return layer

    def _take_over(self, linears: Sequence[nn.Linear]) -> None:
        """Fill a layer built on the meta device from unsharded ones."""
        first = linears[0].weight
        if not first.is_meta:
            self.to_empty(device=first.device)
            self._load_full([m.weight for m in linears], [m.bias for m in linears])
        self.weight.requires_grad_(first.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(linears[0].bias.requires_grad)
        self.train(linears[0].training)


def _weight_bias_pairs(shards: Sequence[TensorShard]) -> list[tuple[TensorShard, TensorShard | None]]:
    """Stock (weight, bias) pairs in the order in which torch would have created them."""
    biases = {shard.name.removesuffix("bias"): shard for shard in shards if shard.name.endswith("bias")}
    return [(s, biases.get(s.name.removesuffix("weight"))) for s in shards if s.name.endswith("weight")]
