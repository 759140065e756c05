"""Parallel styles for torch's ``parallelize_module``: our layers through the API that PyTorch users know.

    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"mlp.up": ColumnParallel(), "mlp.down": RowParallel()})
    parallelize_module(model, mesh["tp"], parallel_plan(model))          # Llama, Mistral, Qwen2, Qwen3 and their like

``parallelize_module`` throws away what a style returns for a submodule, so a style turns the module itself into one of
our layers: its class and its parameters change, its identity, hooks and other attributes stay. As with torch's own
styles the optimiser is made afterwards, and rank 0's weights are what is cut (``src_data_rank``).

Parameters are plain local tensors, not DTensors, so data parallelism has another dimension of the mesh to itself. It is
set up after this:

* FSDP2, ``fully_shard(block, mesh=mesh["dp"])``: parameters become DTensors over "dp" of this TP rank's slices, and
  ``state_dict`` and ``tensor_shards`` hold those. ``full_state_dict`` and ``full_gradients`` of ``tp_kernels.layers``
  gather over both dimensions, on all ranks together. Load full weights before ``fully_shard``.
* ``DistributedDataParallel(model, process_group=mesh.get_group("dp"))``: nothing to mind.

Styles named as torch's (``ColwiseParallel``, ...) make DTensors, run torch's kernels and need sizes that divide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.utils.weak import WeakIdKeyDictionary

from tp_kernels.checkpoint.sharding import shard_heads, shard_heads_sizes
from tp_kernels.comm.functional import copy_to_tensor_parallel
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.integrations.hf_packing import HeadParallelLinear, adapted_class
from tp_kernels.layers.base import TensorParallelLayer
from tp_kernels.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tp_kernels.layers.linear import ColumnParallelLinear, RowParallelLinear

__all__ = ["ColumnParallel", "RowParallel", "VocabParallel", "parallel_plan"]

Partition = Sequence[int] | Callable[[int], Sequence[int]] | None

# Full parameter -> (what it became, how it was cut): modules that share a weight share it afterwards.
_became: WeakIdKeyDictionary = WeakIdKeyDictionary()

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class _Style(ParallelStyle):
    """A style that turns one kind of module into one of our layers."""

    takes: tuple[type[nn.Module], ...] = (nn.Linear,)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return self.apply_to(module, resolve_group(device_mesh))

    def apply_to(self, module: nn.Module, group: TPGroup | None = None) -> nn.Module:
        """Turn ``module`` into this rank's part of it, in place. A collective call, unless ``src_data_rank`` is None.

        Args:
            module: an unsharded module; on the meta device nothing is sent or allocated.
            group: as for ``resolve_group``.
        Returns:
            ``module``.
        Raises:
            ValueError: another kind of module, sizes that cannot be spread, or a weight shared with a module that was
                cut otherwise. Nothing has been changed then.
        """
        group = resolve_group(group)
        if type(module) not in self.takes:
            expected = " or ".join(f"nn.{kind.__name__}" for kind in self.takes)
            raise ValueError(f"{type(self).__name__}: expected an {expected}, got {type(module).__name__}")
        if type(module.weight) is not nn.Parameter:
            raise ValueError(f"{type(self).__name__}: expected plain parameters, got {type(module.weight).__name__}")
        layer = self._empty(module, group)
        layout = [(shard.dim, shard.ranges) for shard in layer.tensor_shards() if shard.name == "weight"]
        known, known_layout = _became.get(module.weight, (None, None))
        if known is not None and known_layout != (layout, id(group)):
            raise ValueError(
                f"{type(self).__name__}: this weight is shared with a module that was cut in another way; expected the "
                "same style for both (VocabParallel for a tied embedding and output projection)"
            )
        self._fill(layer, module, group, known)
        _became[module.weight] = layer.weight, (layout, id(group))
        return _become(module, layer)

    def _fill(self, layer: nn.Module, module: nn.Module, group: TPGroup, shared: nn.Parameter | None) -> None:
        """Give ``layer``, built on the meta device, its slices of the parameters of ``module``."""
        if not module.weight.is_meta:
            layer.to_empty(device=module.weight.device)
        shards = {shard.name: shard for shard in layer.tensor_shards()}
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta and not (shared is not None and name == "weight"):
                shards[name].copy_from_full(self._source(parameter.detach(), group))
            layer._parameters[name].requires_grad_(parameter.requires_grad)
        if shared is not None:
            layer.weight = shared
        layer.train(module.training)

    def _source(self, full: torch.Tensor, group: TPGroup) -> torch.Tensor:
        """The full tensor to cut: that of rank ``src_data_rank``, or this rank's own."""
        if self.src_data_rank is None or group.world_size == 1:
            return full
        if not 0 <= self.src_data_rank < group.world_size:
            raise ValueError(f"src_data_rank must be a rank of the {group.world_size}, got {self.src_data_rank}")
        return group.broadcast(full.to(group.device, copy=True).contiguous(), self.src_data_rank)

    def _empty(self, module: nn.Module, group: TPGroup) -> nn.Module:
        """The layer for ``module``, on the meta device."""
        raise NotImplementedError

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name != "src_data_rank")
        return f"{type(self).__name__}({options})"


class ColumnParallel(_Style):
    """``nn.Linear`` -> ``ColumnParallelLinear``: outputs spread over the ranks.

    Args:
        gather_output: return all outputs on every rank instead of this rank's.
        sequence_parallel: the input is this rank's part of the sequence (dimension -2).
        partition: outputs per rank, or a function from the number of ranks to them; None for ``shard_width``'s.
    """

    def __init__(
        self, *, gather_output: bool = False, sequence_parallel: bool = False, partition: Partition = None
    ) -> None:
        super().__init__()
        self.gather_output, self.sequence_parallel, self.partition = gather_output, sequence_parallel, partition

    def _empty(self, module: nn.Linear, group: TPGroup) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            *(module.in_features, module.out_features, module.bias is not None),
            group=group,
            gather_output=self.gather_output,
            sequence_parallel=self.sequence_parallel,
            partition=_sizes(self.partition, group.world_size),
            device="meta",
            dtype=module.weight.dtype,
        )


class RowParallel(_Style):
    """``nn.Linear`` -> ``RowParallelLinear``: inputs spread over the ranks, partial outputs summed.

    Args:
        input_is_parallel: the input is this rank's part already, as a ``ColumnParallel`` layer leaves it.
        sequence_parallel: the output is this rank's part of the sequence (dimension -2).
        overlap: how the sum may overlap the matmul; see ``RowParallelLinear``.
        partition: inputs per rank, or a function from the number of ranks to them; None for ``shard_width``'s.
    """

    def __init__(
        self,
        *,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        overlap: str = "auto",
        partition: Partition = None,
    ) -> None:
        super().__init__()
        self.input_is_parallel, self.sequence_parallel = input_is_parallel, sequence_parallel
        self.overlap, self.partition = overlap, partition

    def _empty(self, module: nn.Linear, group: TPGroup) -> RowParallelLinear:
        return RowParallelLinear(
            *(module.in_features, module.out_features, module.bias is not None),
            group=group,
            input_is_parallel=self.input_is_parallel,
            sequence_parallel=self.sequence_parallel,
            overlap=self.overlap,
            partition=_sizes(self.partition, group.world_size),
            device="meta",
            dtype=module.weight.dtype,
        )


class VocabParallel(_Style):
    """``nn.Embedding`` -> ``VocabParallelEmbedding``, ``nn.Linear`` -> ``ParallelLMHead``: words spread over the ranks.

    Apply it to both of a tied pair: they go on sharing one parameter.

    Args:
        gather_output: for the output projection: all logits on every rank, or this rank's words only.
    """

    takes = (nn.Embedding, nn.Linear)

    def __init__(self, *, gather_output: bool = True) -> None:
        super().__init__()
        self.gather_output = gather_output

    def _empty(self, module: nn.Embedding | nn.Linear, group: TPGroup) -> VocabParallelEmbedding | ParallelLMHead:
        options = {"group": group, "device": "meta", "dtype": module.weight.dtype}
        if isinstance(module, nn.Linear):
            sizes = module.out_features, module.in_features
            return ParallelLMHead(*sizes, module.bias is not None, gather_output=self.gather_output, **options)
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise ValueError("expected an nn.Embedding without max_norm, scale_grad_by_freq and sparse")
        return VocabParallelEmbedding(module.num_embeddings, module.embedding_dim, module.padding_idx, **options)


class _Heads(_Style):
    """A query, key or value projection, cut by whole heads; ``kind`` is "q" or "kv"."""

    def __init__(self, kind: str, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.kind, self.num_heads, self.num_kv_heads, self.head_dim = kind, num_heads, num_kv_heads, head_dim

    def _empty(self, module: nn.Linear, group: TPGroup) -> HeadParallelLinear:
        size = group.world_size
        shards = [shard_heads(self.num_heads, self.num_kv_heads, size, rank) for rank in range(size)]
        heads = [shard.q if self.kind == "q" else shard.kv for shard in shards]
        total = self.num_heads if self.kind == "q" else self.num_kv_heads
        return HeadParallelLinear(
            *(module.in_features, self.head_dim, heads, total, module.bias is not None),
            group=group,
            device="meta",
            dtype=module.weight.dtype,
        )


class _HeadNorm(ParallelStyle):
    """A norm of each head (Qwen3): every rank sees only its own heads' part of the weight's gradient."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return self.apply_to(module, resolve_group(device_mesh))

    def apply_to(self, module: nn.Module, group: TPGroup) -> nn.Module:
        module.__dict__["_tp_group"] = group
        module.__class__ = adapted_class(type(module), _SummedWeight)
        return module

    def __repr__(self) -> str:
        return "_HeadNorm()"


class _SummedWeight:
    """Mixin: the gradient of ``weight`` is summed over the ranks."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = self.weight
        self._parameters["weight"] = copy_to_tensor_parallel(own, self._tp_group)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._parameters["weight"] = own


class _Attention(ParallelStyle):
    """The module around the projections: how many query heads share a KV head on this rank."""

    def __init__(self, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return self.apply_to(module, resolve_group(device_mesh))

    def apply_to(self, module: nn.Module, group: TPGroup) -> nn.Module:
        heads = shard_heads(self.num_heads, self.num_kv_heads, group.world_size, group.rank)
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = len(heads.q) // len(heads.kv)
        return module

    def __repr__(self) -> str:
        return f"_Attention(num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads})"


def parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """A plan for ``parallelize_module``: attention by whole heads, MLPs by width, embedding and logits by words.

    Args:
        model: an unsharded Hugging Face Llama, Mistral, Qwen2 or Qwen3 model, or any model without a ``config`` whose
            modules have the names of Llama's (q_proj, k_proj, v_proj, o_proj; gate_proj, up_proj, down_proj;
            embed_tokens; lm_head) and whose attention reads its number of heads off the projections' outputs and has
            the attribute ``head_dim``. It is not changed.

    Returns:
        Module paths, with ``*`` for layer numbers, to styles. For any number of ranks up to that of the query heads;
        with more ranks than KV heads, ranks share KV heads.

    Raises:
        ValueError: another family, or nothing to parallelise.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family is not None and family not in _FAMILIES:
        raise ValueError(f"parallel_plan: expected a model of {', '.join(_FAMILIES)}, got {family}")
    plan: dict[str, ParallelStyle] = {}

    def add(path: str, style: ParallelStyle) -> None:
        key = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
        if repr(plan.setdefault(key, style)) != repr(style):
            raise ValueError(f"parallel_plan: expected the layers to be alike, and {path} differs from those before it")

    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        linears = {name for name, child in module.named_children() if type(child) is nn.Linear}
        if linears >= {"q_proj", "k_proj", "v_proj", "o_proj"}:
            for name, style in _attention_plan(module, path).items():
                add(prefix + name if name else path, style)
        if linears >= {"gate_proj", "up_proj", "down_proj"}:
            add(f"{prefix}gate_proj", ColumnParallel())
            add(f"{prefix}up_proj", ColumnParallel())
            add(f"{prefix}down_proj", RowParallel())
        if type(getattr(module, "embed_tokens", None)) is nn.Embedding:
            add(f"{prefix}embed_tokens", VocabParallel())
        if "lm_head" in linears:
            add(f"{prefix}lm_head", VocabParallel())
    if not plan:
        raise ValueError(f"parallel_plan: found no module with the names of Llama's in {type(model).__name__}")
    return plan


def _attention_plan(module: nn.Module, path: str) -> dict[str, ParallelStyle]:
    """Styles for the children of one attention module, and for itself under the empty name."""
    head_dim, q, k = getattr(module, "head_dim", None), module.q_proj.out_features, module.k_proj.out_features
    if not isinstance(head_dim, int) or head_dim < 1 or q % head_dim or k % head_dim:
        raise ValueError(f"parallel_plan: expected {path}.head_dim to divide {q} and {k} outputs, got {head_dim!r}")
    heads = (q // head_dim, k // head_dim)

    plan: dict[str, ParallelStyle] = {
        "q_proj": _Heads("q", *heads, head_dim),
        "k_proj": _Heads("kv", *heads, head_dim),
        "v_proj": _Heads("kv", *heads, head_dim),
        "o_proj": RowParallel(partition=_HeadRows(*heads, head_dim)),
        "": _Attention(*heads),
    }
    for name in ("q_norm", "k_norm"):
        if isinstance(getattr(module, name, None), nn.Module):
            plan[name] = _HeadNorm()
    return plan


@dataclass(frozen=True)
class _HeadRows:
    """Inputs per rank of an output projection; unlike a function, two that do the same are equal."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __call__(self, world_size: int) -> list[int]:
        sizes = shard_heads_sizes(self.num_heads, self.num_kv_heads, world_size)
        return [q_heads * self.head_dim for q_heads, _ in sizes]


def _sizes(partition: Partition, world_size: int) -> Sequence[int] | None:
    return partition(world_size) if callable(partition) else partition


def _become(module: nn.Module, layer: TensorParallelLayer) -> nn.Module:
    """Turn ``module`` into ``layer``, keeping its identity, its hooks and what others attached to it."""
    for name, value in vars(layer).items():
        if not re.search(r"_hooks(_|$)|_hook$", name):
            module.__dict__[name] = value
    module.__class__ = type(layer)
    return module
