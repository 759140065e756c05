"""PEFT's LoRA layer for ``ColumnParallelLinear`` and ``RowParallelLinear``.

    column   y_own = W_own x + scaling * B_own (A x)                      A whole on every rank, B sliced like W
    row      y = sum over ranks of (W_own x_own + scaling * B (A_own x_own))   A sliced like W, B whole

so that an adapter is exactly a stock adapter, cut. Communication that the adapter adds:

* column: nothing forward; backward sums [tokens, r] for the input, and A's gradient. The outputs may be gathered once
  more where the layer gathers them.
* row: nothing forward, because the adapter joins the layer's own sum; backward sums B's gradient. While an adapter is
  active the layer's matmul does not overlap that sum.
* sequence-parallel layers: A x is gathered ([tokens, r]) instead of x.

Construction is a collective: rank 0 draws the full A and B, as PEFT does, and sends them, so ranks need not be seeded
alike. Merging adds to the parameter in place, so views of packed storage stay valid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from tp_kernels import ops
from tp_kernels.comm.functional import (
    copy_to_tensor_parallel,
    gather_from_sequence_parallel,
    scatter_to_tensor_parallel,
)
from tp_kernels.integrations.lora_factors import LoraFactor, SharedDropout, shared_rows, whole_input_linear
from tp_kernels.layers.base import TensorParallelLayer, check_input
from tp_kernels.layers.linear import ColumnParallelLinear, RowParallelLinear

__all__ = [
    "CUSTOM_MODULES",
    "ColumnParallelLora",
    "ParallelLora",
    "RowParallelLora",
    "SlicedLoraConfig",
    "check_config",
]

_SEQUENCE_DIM = -2
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INITIALISATIONS = (True, False, "gaussian")
# More than B(A(x)), whether or not this PEFT marks them as variants.
_OTHER_OPTIONS = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "arrow_config", "alora_invocation_tokens"),
    *("megatron_config", "target_parameters", "trainable_token_indices"),
)
_OLDEST_PEFT = (0, 19)  # earlier ones do not hand the configuration to custom layers
if tuple(int(part) for part in peft.__version__.split(".")[:2]) < _OLDEST_PEFT:
    raise ImportError(f"LoRA on tensor-parallel layers: expected peft 0.19 or newer, got {peft.__version__}")


def check_config(config: LoraConfig) -> None:
    """ValueError for options of ``config`` that sharded layers do not have.

    Those are the ones that need the whole base weight (DoRA, PiSSA, OLoRA, LoftQ, ...) or that change the adapter's
    formula; what remains is LoRA and rank-stabilised LoRA.
    """
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    asked = [name for name in dict.fromkeys([*variants, *_OTHER_OPTIONS]) if getattr(config, name, None)]
    if asked:
        raise ValueError(f"LoRA on tensor-parallel layers does not support {', '.join(asked)}: expected them unset")
    if config.bias != "none":
        raise ValueError(f"LoRA on tensor-parallel layers trains no biases: expected bias='none', got {config.bias!r}")
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            "LoRA on tensor-parallel layers: expected init_lora_weights to be one of "
            f"{', '.join(map(repr, _INITIALISATIONS))}, got {config.init_lora_weights!r}"
        )


class SlicedLoraConfig(LoraConfig):
    """The configuration of an adapter of which this process holds slices.

    The one place where PEFT's ``save_pretrained`` meets code of ours: it must not leave slices that look like an
    adapter.
    """

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Write adapter_config.json as PEFT does, if ``save_lora`` asks; ValueError otherwise."""
        if not self.__dict__.get("_tp_whole", False):
            for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):  # written just now
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(save_directory, name))
            raise ValueError(
                "save_pretrained would write this rank's slices of the adapter: expected "
                "tp_kernels.integrations.save_lora(model, folder), called on all ranks, which writes a stock adapter"
            )
        super().save_pretrained(save_directory, **options)


class ParallelLora(Linear):
    """What both kinds share: creation of the factors, merging, and which adapters are at work.

    PEFT makes these; see ``tp_kernels.integrations.lora.register_lora``.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any):
        base = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
        if base._is_fused():
            names = sorted({piece.name.rpartition(".")[0] for piece in base._pieces["weight"]})
            raise ValueError(
                f"LoRA: {options.get('target_name') or type(base).__name__} is {' and '.join(names)} in one parameter, "
                "and a stock adapter has factors for each of them: expected a target that is one stock projection. "
                "Models patched by apply_tp_kernels keep these apart"
            )
        if base.weight.dtype not in _DTYPES:
            raise ValueError(
                f"LoRA: expected floating-point weights of 16 bits or more, got {base.weight.dtype}; add and merge "
                "adapters before quantising"
            )
        if options.get("parameter_name") is not None or options.get("tied_adapter"):
            raise ValueError("LoRA on tensor-parallel layers supports neither target_parameters nor tied adapters")
        check_config(config)
        super().__init__(base_layer, adapter_name, config=config, **options)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        """Add an adapter: PEFT draws full factors, rank 0's are sent to all ranks, and each keeps its slices.

        A collective, unless the adapter is made on the meta device.
        """
        check_config(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)
        base = self.get_base_layer()
        group = base.group
        for factors, dim, ranges in self._cuts():
            weight = factors[adapter_name].weight
            if group.world_size > 1 and not weight.is_meta:
                full = weight.detach().to(group.device).contiguous()
                weight.data.copy_(group.broadcast(full))
            factors[adapter_name] = LoraFactor(weight, dim, ranges, group).train(self.training)
        if group.world_size > 1 and type(config) is LoraConfig:
            config.__class__ = SlicedLoraConfig

    def _cuts(self) -> list[tuple[nn.ModuleDict, int | None, Sequence[range]]]:
        """(factors by adapter, sliced dimension, every rank's range of it), for A and B."""
        raise NotImplementedError

    def _ranges(self) -> tuple[range, ...]:
        """Which part of the sliced dimension of the base layer's weight every rank holds."""
        (shard,) = [shard for shard in self.get_base_layer().tensor_shards() if shard.name == "weight"]
        return shard.ranges

    def _active(self, options: dict[str, Any]) -> list[str]:
        """The adapters that the next forward pass adds; merged ones are in the weight already."""
        if options.get("adapter_names") is not None:
            raise ValueError("LoRA on tensor-parallel layers does not support adapter_names (mixed batches)")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [name for name in self.active_adapters if name in self.lora_A]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, in place.

        Args:
            safe_merge: check first that the result is finite on all ranks, a collective then.
            adapter_names: which; None means the active ones.
        Raises:
            ValueError: on all ranks, if ``safe_merge`` found infinities or NaN; that adapter is not merged.
        """
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.lora_A:
                continue
            with torch.no_grad():
                delta = super().get_delta_weight(name)
                if safe_merge:
                    broken = (~torch.isfinite(base.weight + delta)).any().to(base.group.device, torch.float32).view(1)
                    if bool(base.group.all_reduce(broken, "max")):
                        raise ValueError(f"adapter {name!r} would put NaN or infinities into the merged weight")
                base.weight.add_(delta)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract all merged adapters from the base weight, in place."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                with torch.no_grad():
                    self.get_base_layer().weight.sub_(super().get_delta_weight(name))

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """``scaling * B @ A``, what merging adds to the weight; with one rank only.

        Raises:
            ValueError: with more ranks: what PEFT makes of it (singular value decompositions) needs the whole matrix.
        """
        group = self.get_base_layer().group
        if group.world_size > 1:
            raise ValueError(
                f"this rank holds slices of adapter {adapter!r}: expected an operation on A and B themselves, such as "
                "add_weighted_adapter with combination_type 'linear' or 'cat'"
            )
        return super().get_delta_weight(adapter)

    def _input(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """What A is applied to: in the factors' dtype, with dropout."""
        return self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype))


class ColumnParallelLora(ParallelLora):
    """LoRA on a ``ColumnParallelLinear`` (or a subclass with one weight): A whole, B sliced like the outputs."""

    def _cuts(self) -> list[tuple[nn.ModuleDict, int | None, Sequence[range]]]:
        return [(self.lora_A, None, ()), (self.lora_B, 0, self._ranges())]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)
        base = self.get_base_layer()
        if base.tp_size > 1 and not base.sequence_parallel and config.lora_dropout > 0.0:
            self.lora_dropout[adapter_name] = SharedDropout(config.lora_dropout, base.group).train(self.training)

    def forward(self, x: torch.Tensor, *args: Any, **options: Any):
        """As the base layer's ``forward``, with the active adapters added to the output."""
        active = self._active(options)
        for name in ("adapter_names", "alora_offsets"):  # put in by PEFT's hooks
            options.pop(name, None)
        base = self.get_base_layer()
        if not active:
            return base(x, *args, **options)
        sizes = None
        if base.sequence_parallel and base.tp_size > 1:
            given = args[0] if args else options.get("sequence_sizes")
            sizes = base._sequence_sizes(x, given)
            args, options = (sizes,), {}
        out = base(x, *args, **options)
        delta = sum(self._delta(x, name, sizes) for name in active)
        if base.gather_output:
            delta = base._gather(delta)
        if base.skip_bias_add:
            return (out[0] + delta).to(out[0].dtype), out[1]
        return (out + delta).to(out.dtype)

    def _delta(self, x: torch.Tensor, name: str, sizes: Sequence[int] | None) -> torch.Tensor:
        """What one adapter adds to this rank's outputs."""
        group, factor = self.get_base_layer().group, self.lora_B[name]
        x, weight = self._input(x, name), self.lora_A[name].weight
        if sizes is None:
            low = whole_input_linear(x, weight, group)
        else:
            low = F.linear(x, copy_to_tensor_parallel(weight, group))  # each rank sees only its tokens' gradient
            low = gather_from_sequence_parallel(low, group, dim=_SEQUENCE_DIM, sizes=sizes)
        return F.linear(low, shared_rows(factor.weight, group, factor.ranges)) * self.scaling[name]


class RowParallelLora(ParallelLora):
    """LoRA on a ``RowParallelLinear``: A sliced like the inputs, B whole; one sum over the ranks for all of it."""

    def _cuts(self) -> list[tuple[nn.ModuleDict, int | None, Sequence[range]]]:
        return [(self.lora_A, 1, self._ranges()), (self.lora_B, None, ())]

    def forward(self, x: torch.Tensor, *args: Any, **options: Any):
        """As the base layer's ``forward``, with the active adapters added to the output."""
        active = self._active(options)
        base = self.get_base_layer()
        if not active:
            return base(x)
        if base.tp_size == 1:
            out = base(x)
            if base.skip_bias_add:
                return self._add(out[0], x, active), out[1]
            return self._add(out, x, active)
        if not base.input_is_parallel:
            x = scatter_to_tensor_parallel(x, base.group, dim=-1, sizes=base.partition)
        # Not ``partial_sum``, whose result may lie in memory that the next layer overwrites: this one is handed out.
        check_input(x, base.in_features_local, base.weight, base)
        return base.reduce_partial(self._add(ops.linear(x, base.weight), x, active))

    def partial_sum(self, x: torch.Tensor) -> torch.Tensor:
        """``RowParallelLinear.partial_sum`` with the active adapters' parts."""
        return self._add(self.get_base_layer().partial_sum(x), x, self._active({}))

    def reduce_partial(self, out: torch.Tensor):
        """``RowParallelLinear.reduce_partial``."""
        return self.get_base_layer().reduce_partial(out)

    def _add(self, out: torch.Tensor, x: torch.Tensor, active: Sequence[str]) -> torch.Tensor:
        """``out``, fresh from the base layer, plus what the adapters make of this rank's inputs."""
        if not active:
            return out
        group, delta = self.get_base_layer().group, 0
        for name in active:
            low = F.linear(self._input(x, name), self.lora_A[name].weight)
            # Each rank sees the outputs' gradient beside its own part of A x: B's gradient is a partial sum.
            weight = copy_to_tensor_parallel(self.lora_B[name].weight, group)
            delta = delta + F.linear(low, weight) * self.scaling[name]
        if out.requires_grad or delta.requires_grad:
            return (out + delta).to(out.dtype)
        return out.add_(delta)  # in place: ``out`` may lie in the buffer that the sum reads


class _Refused:
    """In the place of a LoRA layer: says which layers have none."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **options: Any):
        raise ValueError(
            f"LoRA: expected a ColumnParallelLinear or a RowParallelLinear as target, got {type(base_layer).__name__} "
            f"for {options.get('target_name') or 'a target module'}; leave it out of target_modules"
        )


# PEFT takes the first entry that the target is an instance of.
CUSTOM_MODULES: dict[type[nn.Module], type] = {
    ColumnParallelLinear: ColumnParallelLora,
    RowParallelLinear: RowParallelLora,
    TensorParallelLayer: _Refused,
}
