"""``TensorParallelLayer``: parameters that know which slice of which full tensor they are.

A layer declares its parameters as pieces of full tensors under their stock names (``q_proj.weight``,
``gate_proj.weight``). From that one declaration follow ``state_dict`` and ``load_state_dict`` (this rank's slices,
stock names), the gathered ``full_state_dict`` and its inverse, initialisation, and the checkpoint loader's list of
what to read.

Initialisation draws the *full* tensor from the default generator and keeps the rank's slice: ranks that were seeded
alike build exactly the shards of the layer that one rank would have built, replicated parameters agree, and the
generators stay in step. It costs one full tensor of temporary memory; construct on ``device="meta"`` when a checkpoint
follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from tp_kernels.comm.process_group import TPGroup, resolve_group

__all__ = [
    "TensorParallelLayer",
    "TensorShard",
    "full_gradients",
    "full_state_dict",
    "gather_shard",
    "iter_tensor_shards",
    "load_full_state_dict",
]


@dataclass(frozen=True)
class TensorShard:
    """One stock tensor of a module and where this rank's part of it lives.

    Attributes:
        name: stock name, relative to the module that was asked (``"q_proj.weight"``).
        full_shape: shape of the unsharded tensor.
        dim: the sharded dimension, or None when every rank holds the whole tensor.
        ranges: for every rank the slice of ``dim`` it holds; overlapping ones are replicas. Empty when ``dim`` is None.
        rank: this rank's index into ``ranges``.
        target: writable view into the local parameter, of this rank's shape.
    """

    name: str
    full_shape: tuple[int, ...]
    dim: int | None
    ranges: tuple[range, ...]
    rank: int
    target: torch.Tensor

    @property
    def start(self) -> int:
        """First index of this rank's slice along ``dim`` (0 when replicated)."""
        return 0 if self.dim is None else self.ranges[self.rank].start

    @property
    def stop(self) -> int:
        """One past the last index of this rank's slice along ``dim``."""
        if self.dim is None:
            return self.full_shape[0] if self.full_shape else 1
        return self.ranges[self.rank].stop

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this rank's part in the full tensor."""
        return tuple(
            slice(self.start, self.stop) if dim == self.dim else slice(0, size)
            for dim, size in enumerate(self.full_shape)
        )

    def copy_from_full(self, full: torch.Tensor) -> None:
        """Copy this rank's slice of ``full`` into the parameter."""
        with torch.no_grad():
            self.target.copy_(full[self.slices])


class Piece(NamedTuple):
    """Part of a parameter that is a stock tensor of its own: ``offset`` is where it starts along ``dim`` locally."""

    name: str
    total: int
    dim: int | None
    ranges: tuple[range, ...]
    offset: int


class TensorParallelLayer(nn.Module):
    """Base of the layers: holds the group and the declaration of the sharded parameters.

    Args:
        group: what ``resolve_group`` takes; None is the default tensor-parallel group, or world size 1 without one.
    """

    def __init__(self, group: Any = None):
        super().__init__()
        self.group: TPGroup = resolve_group(group)
        self.tp_rank: int = self.group.rank
        self.tp_size: int = self.group.world_size
        self._pieces: dict[str, list[Piece]] = {}
        # A fused child such as qkv_proj stands for stock modules beside it: its own name is left out of the stock
        # names.
        self._hidden_name = False

    # ---- declaration, used by subclasses ---------------------------------------------------------------------------

    def _declare(self, parameter: str, dim: int | None, pieces: Sequence[tuple[str, int, Sequence[range]]]) -> None:
        """State what ``parameter`` is made of, stacked along ``dim``: (stock name, full extent, every rank's range)."""
        offset, declared = 0, []
        for name, total, ranges in pieces:
            declared.append(Piece(name, total, dim, tuple(ranges), offset))
            offset += len(ranges[self.tp_rank]) if dim is not None else 0
        self._pieces[parameter] = declared

    def _add_fused(self, name: str, layer: TensorParallelLayer) -> None:
        """Register a child whose own name does not appear in the stock names."""
        layer._hidden_name = True
        self.add_module(name, layer)

    @property
    def quantized(self) -> str | None:
        """How the weights are quantised; None if they are not."""
        return None

    def _as_float(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """What ``full_state_dict`` gathers for a parameter or buffer; None for a part of another one's values."""
        return tensor

    def _is_fused(self) -> bool:
        return any(piece.name != name for name, pieces in self._pieces.items() for piece in pieces)

    # ---- stock names -----------------------------------------------------------------------------------------------

    def _shards_of(self, parameter: str, tensor: torch.Tensor) -> Iterator[TensorShard]:
        if parameter not in self._pieces:
            yield TensorShard(parameter, tuple(tensor.shape), None, (), self.tp_rank, tensor)
            return
        for piece in self._pieces[parameter]:
            if piece.dim is None:
                yield TensorShard(piece.name, tuple(tensor.shape), None, (), self.tp_rank, tensor)
                continue
            shape = list(tensor.shape)
            shape[piece.dim] = piece.total
            target = tensor.narrow(piece.dim, piece.offset, len(piece.ranges[self.tp_rank]))
            yield TensorShard(piece.name, tuple(shape), piece.dim, piece.ranges, self.tp_rank, target)

    def tensor_shards(self) -> list[TensorShard]:
        """The parameters that this module owns directly, under their stock names."""
        return [
            shard
            for name, parameter in self._parameters.items()
            if parameter is not None
            for shard in self._shards_of(name, parameter.detach())
        ]

    def reset_full(self, shard: TensorShard, init_: Callable[[torch.Tensor], Any]) -> None:
        """Initialise ``shard.target`` as its slice of a full tensor that ``init_`` fills in place."""
        if shard.target.is_meta:
            return
        with torch.no_grad():
            if tuple(shard.target.shape) == shard.full_shape:
                init_(shard.target)
            else:
                full = torch.empty(shard.full_shape, dtype=shard.target.dtype, device=shard.target.device)
                init_(full)
                shard.copy_from_full(full)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self._is_fused():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        prefix = stock_prefix(self, prefix)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                for shard in self._shards_of(name, parameter if keep_vars else parameter.detach()):
                    destination[prefix + shard.name] = shard.target

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # Children only receive keys below their own prefix: hand a fused child the stock names that stand beside it.
        for child_name, child in self._modules.items():
            if isinstance(child, TensorParallelLayer) and child._hidden_name:
                for shard in child.tensor_shards():
                    if prefix + shard.name in state_dict:
                        state_dict[f"{prefix}{child_name}.{shard.name}"] = state_dict.pop(prefix + shard.name)
        if not self._is_fused():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if local_metadata.get("assign_to_params_buffers", False):
            self._adopt_dtype_and_device(state_dict, prefix)
        known, stock = set(), stock_prefix(self, prefix)
        for shard in self.tensor_shards():
            key = prefix + shard.name
            known.add(key)
            if key not in state_dict:
                if strict:
                    missing_keys.append(stock + shard.name)
            elif state_dict[key].shape != shard.target.shape:
                error_msgs.append(
                    f"size mismatch for {stock + shard.name}: copying a param with shape {state_dict[key].shape} from "
                    f"checkpoint, the shape of this rank's shard is {shard.target.shape}."
                )
            else:
                with torch.no_grad():
                    shard.target.copy_(state_dict[key])
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]

    def _adopt_dtype_and_device(self, state_dict, prefix) -> None:
        """``load_state_dict(assign=True)``: a fused parameter takes the dtype and device of its pieces."""
        for name, parameter in list(self._parameters.items()):
            pieces = [state_dict.get(prefix + piece.name) for piece in self._pieces.get(name, ())]
            if parameter is None or not pieces or any(piece is None for piece in pieces):
                continue
            fresh = torch.empty_like(parameter, dtype=pieces[0].dtype, device=pieces[0].device)
            self._parameters[name] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)

    # ---- other manners ---------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo):
        # A group is a connection to other processes: copies of the layer share it.
        memo[id(self.group)] = self.group
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return duplicate

    def extra_repr(self) -> str:
        return f"tp_rank={self.tp_rank}, tp_size={self.tp_size}"


def check_input(x: torch.Tensor, features: int, weight: torch.Tensor, layer: nn.Module) -> None:
    """ValueError unless ``x`` [..., features] fits ``weight`` in dtype and device."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{type(layer).__name__}: expected a tensor [..., {features}], got {type(x).__name__}")
    if x.dtype is weight.dtype and x.shape[-1:] == (features,) and x.device == weight.device:
        return
    name = type(layer).__name__
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name}: expected an input of shape [..., {features}], got {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"{name}: expected an input on {weight.device}, where the weight is, got {x.device}")
    expected = getattr(layer, "input_dtype", weight.dtype)
    if x.dtype is not expected and not torch.is_autocast_enabled(x.device.type):  # under autocast the matmul casts both
        raise ValueError(f"{name}: expected an input of {expected}, the weight's dtype, got {x.dtype}")


def check_linears(linears: Sequence[nn.Linear]) -> None:
    """ValueError unless all are ``nn.Linear``."""
    for linear in linears:
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"expected an nn.Linear to shard, got {type(linear).__name__}")


def check_dtype(dtype: Any) -> None:
    """ValueError unless ``dtype`` is None or one that parameters can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be None or a floating-point torch.dtype, got {dtype!r}")


def stock_prefix(module: nn.Module, prefix: str) -> str:
    """``prefix`` without the module's own name if that name is hidden: ``"attn.qkv_proj."`` -> ``"attn."``."""
    if not getattr(module, "_hidden_name", False) or not prefix:
        return prefix
    return prefix[: prefix[:-1].rfind(".") + 1]


def _walk(
    module: nn.Module, prefix: str, remove_duplicate: bool, values: str = "stored"
) -> Iterator[tuple[TensorShard, torch.Tensor, nn.Module]]:
    """(shard under its full stock name, the parameter it views, the module that holds it) of a whole model.

    ``values``: "stored"; "gradients", and what has none is left out; "floats": quantised weights as floats, in copies.
    """
    seen: set[int] = set()
    for path, child in module.named_modules(prefix=prefix, remove_duplicate=remove_duplicate):
        for tensor, shards in own_shards(child, path, values):
            if not remove_duplicate or id(tensor) not in seen:
                seen.add(id(tensor))
                yield from ((shard, tensor, child) for shard in shards)


def own_shards(
    module: nn.Module, path: str, values: str = "stored"
) -> Iterator[tuple[torch.Tensor, list[TensorShard]]]:
    """For every parameter and persistent buffer that ``module``, at ``path`` in a model, holds itself: its shards."""
    stock = stock_prefix(module, path + "." if path else "")
    parallel = isinstance(module, TensorParallelLayer)
    skipped = module._non_persistent_buffers_set
    owned = {**module._parameters, **{n: b for n, b in module._buffers.items() if n not in skipped}}
    for name, tensor in owned.items():
        local = tensor
        if tensor is not None and values == "gradients":
            local = tensor.grad
        elif tensor is not None and values == "floats" and parallel:
            local = module._as_float(name, tensor)
        if local is not None:
            local = local.detach()
            whole = TensorShard(name, tuple(local.shape), None, (), 0, local)
            shards = module._shards_of(name, local) if parallel else [whole]
            yield tensor, [replace(shard, name=stock + shard.name) for shard in shards]


def iter_tensor_shards(module: nn.Module, prefix: str = "", remove_duplicate: bool = True) -> Iterator[TensorShard]:
    """Every parameter and persistent buffer of a model as shards under their full dotted stock names.

    Plain modules count as replicated.

    Args:
        module: any module, parallel layers anywhere inside.
        prefix: name of the module itself, without a final dot.
        remove_duplicate: yield a tied parameter once, under its first name; False yields it under every name.
    """
    for shard, _, _ in _walk(module, prefix, remove_duplicate):
        yield shard


def full_state_dict(module: nn.Module, group: Any = None) -> dict[str, torch.Tensor]:
    """The state dict that the unsharded model would have, on every rank. A collective call.

    Args:
        module: the model, the same on all ranks.
        group: gather over this group instead of each layer's own.

    Returns:
        Stock names (tied parameters under each of their names) to full tensors that share no memory with the model.
        Quantised weights as floats, in the dtype that they had before.
    """
    return _gather_all(module, group, "floats")


def full_gradients(module: nn.Module, group: Any = None) -> dict[str, torch.Tensor]:
    """As ``full_state_dict``, for the gradients; parameters without one are left out, on all ranks alike."""
    return _gather_all(module, group, "gradients")


def _gather_all(module: nn.Module, group: Any, values: str) -> dict[str, torch.Tensor]:
    override = resolve_group(group) if group is not None else None
    result: dict[str, torch.Tensor] = {}
    gathered: dict[tuple[int, int], torch.Tensor] = {}
    for shard, parameter, child in _walk(module, "", False, values):
        identity = _identity(shard, parameter)
        if identity not in gathered:
            owner = child.group if isinstance(child, TensorParallelLayer) else None
            gathered[identity] = gather_shard(shard, override or owner)
        result[shard.name] = gathered[identity]
    return result


def _identity(shard: TensorShard, parameter: torch.Tensor) -> tuple[int, int]:
    """Equal for two names of the same slice of the same parameter: tied weights."""
    return id(parameter), shard.target.storage_offset()


def gather_shard(shard: TensorShard, group: TPGroup | None) -> torch.Tensor:
    """The whole tensor, a copy, on every rank of ``group``; a collective call if the tensor is sharded."""
    # FSDP2 keeps a DTensor over its own dimension of the mesh: this rank's slice first.
    target = shard.target.full_tensor() if hasattr(shard.target, "full_tensor") else shard.target
    if shard.dim is None or group is None or group.world_size == 1:
        return target.clone()
    sizes = [len(part) for part in shard.ranges]
    parts = group.all_gather(target.contiguous(), dim=shard.dim, sizes=sizes)
    if sum(sizes) == shard.full_shape[shard.dim]:
        return parts
    full = parts.new_empty(shard.full_shape)
    for part, piece in zip(shard.ranges, parts.split(sizes, dim=shard.dim), strict=True):
        full.narrow(shard.dim, part.start, len(part)).copy_(piece)  # replicas agree: the last one wins
    return full


def load_full_state_dict(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> tuple[list[str], list[str]]:
    """Load the unsharded model's state dict: every rank takes its slices. Not a collective.

    Args:
        module: the model.
        state_dict: stock names to full tensors. Of a tied parameter one name is enough.
        strict: missing and unexpected names are errors.

    Returns:
        (missing, unexpected) names.

    Raises:
        ValueError: names differ (``strict``), a shape does, or a layer is quantised; nothing has been loaded then.
    """
    for path, child in module.named_modules():
        if isinstance(child, TensorParallelLayer) and child.quantized:
            raise ValueError(f"{path or 'the layer'} is quantised to {child.quantized}: load before quantising")
    shards = [(shard, _identity(shard, parameter)) for shard, parameter, _ in _walk(module, "", remove_duplicate=False)]
    provided = {identity for shard, identity in shards if shard.name in state_dict}
    missing = [shard.name for shard, identity in shards if identity not in provided]
    names = {shard.name for shard, _ in shards}
    unexpected = [name for name in state_dict if name not in names]
    loadable = [shard for shard, _ in shards if shard.name in state_dict]
    problems = [
        f"{shard.name} has shape {list(state_dict[shard.name].shape)}, expected {list(shard.full_shape)}"
        for shard in loadable
        if tuple(state_dict[shard.name].shape) != shard.full_shape
    ]
    if strict:
        problems += [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unexpected]
    if problems:
        raise ValueError(f"cannot load the full state dict into {type(module).__name__}: " + "; ".join(problems))
    for shard in loadable:
        shard.copy_from_full(state_dict[shard.name])
    return missing, unexpected
