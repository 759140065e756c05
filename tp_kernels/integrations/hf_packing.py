"""Linears of a Hugging Face module that read one input, their parameters next to each other in one storage.

    q_proj.weight, k_proj.weight, v_proj.weight   three parameters, as optimisers, PEFT and checkpoints know them
    joined()                                      one [q + k + v, K] tensor over the same memory, for one matmul

The joined tensor is differentiable: its gradient is cut into the parameters' gradients, without a copy. Where something
stands in the way (a hook, another kind of module, parameters that someone moved apart, tracing) ``joined`` returns None
and the caller goes module by module: slower, never wrong.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from tp_kernels.layers.base import TensorParallelLayer
from tp_kernels.layers.linear import ColumnParallelLinear
from tp_kernels.ops._library import watched

__all__ = ["HeadParallelLinear", "PackedLinears", "adapted_class", "reads_only", "repack", "separate", "unobserved"]


@functools.cache
def adapted_class(base: type, adapter: type) -> type:
    """``base`` with the methods of ``adapter`` in front, under the same name.

    The name stays because others go by it: transformers writes it into configurations and looks up what it records by
    it, FSDP and accelerate wrap by it.
    """
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base)(base.__name__, (adapter, base), names)


def unobserved(module: nn.Module) -> bool:
    """Whether nobody looks at what goes in or out of ``module``, and its ``forward`` is that of its class."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def reads_only(hook: Any) -> bool:
    """Whether a forward hook is one by which transformers records outputs: it changes nothing."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


class _SumOverReplicas(torch.autograd.Function):
    """Identity on a local parameter; backward sums every head's gradient over the ranks that hold the head."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, layer: HeadParallelLinear) -> torch.Tensor:
        ctx.layout = layer.group, layer.num_heads, layer.head_dim, slice(layer.heads.start, layer.heads.stop)
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        group, num_heads, head_dim, own = ctx.layout
        # A place for every head, so that one all-reduce serves all of them and every rank sums in the same order.
        everyone = grad.new_zeros(num_heads, head_dim, *grad.shape[1:])
        everyone[own] = grad.unflatten(0, (-1, head_dim))
        return group.all_reduce(everyone, out=everyone)[own].flatten(0, 1), None


class HeadParallelLinear(ColumnParallelLinear):
    """A query, key or value projection: column-parallel, cut by whole heads, which several ranks may hold alike.

    Args:
        in_features: size of the input's last dimension.
        head_dim: size of a head.
        heads: for every rank the heads it holds.
        num_heads: heads of the model.
        bias: learn an additive bias.
        group, device, dtype: as in ``ColumnParallelLinear``.

    Attributes:
        heads: this rank's.
        replicated: whether some head is held by several ranks; its gradient is then summed over them.
    """

    def __init__(
        self,
        in_features: int,
        head_dim: int,
        heads: Sequence[range],
        num_heads: int,
        bias: bool,
        *,
        group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        TensorParallelLayer.__init__(self, group)
        self.head_dim, self.num_heads, self.heads = head_dim, num_heads, heads[self.tp_rank]
        self.replicated = sum(map(len, heads)) > num_heads
        rows = [range(part.start * head_dim, part.stop * head_dim) for part in heads]
        self._build(in_features, [("", num_heads * head_dim, rows)], bias, False, False, False, device, dtype)

    def shared(self, parameter: torch.Tensor | None) -> torch.Tensor | None:
        """The parameter, its gradient summed over the ranks that hold the same heads."""
        if not self.replicated or parameter is None or not parameter.requires_grad or not torch.is_grad_enabled():
            return parameter
        return _SumOverReplicas.apply(parameter, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., this rank's heads * head_dim]."""
        return self.project(x, self.shared(self.weight), self.shared(self.bias))


def _overlay(parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over the memory of all ``parameters``, stacked along dimension 0; None if they do not lie so."""
    first = parameters[0]
    storage, expected, rows = first.untyped_storage()._cdata, first.storage_offset(), 0
    for parameter in parameters:
        if (
            parameter.untyped_storage()._cdata != storage
            or parameter.storage_offset() != expected
            or parameter.dtype is not first.dtype
            or parameter.shape[1:] != first.shape[1:]
            or not parameter.is_contiguous()
        ):
            return None
        expected += parameter.numel()
        rows += parameter.shape[0]
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


class _Join(torch.autograd.Function):
    """``_overlay`` whose gradient goes to the parameters, each its rows."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.rows = [parameter.shape[0] for parameter in parameters]
        ctx.parameters = parameters[1:]  # the first one shares its version with the overlay, which autograd checks
        ctx.versions = [parameter._version for parameter in ctx.parameters]
        return _overlay(parameters)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if ctx.versions != [parameter._version for parameter in ctx.parameters]:
            raise RuntimeError("a weight needed for gradient computation has been modified by an inplace operation")
        starts = [sum(ctx.rows[:i]) for i in range(len(ctx.rows))]
        return tuple(grad.narrow(0, start, rows) for start, rows in zip(starts, ctx.rows, strict=True))


class PackedLinears:
    """Mixin of modules that hold packed linears; see the head of this file."""

    packed_names = ()
    _views = None

    def pack(self) -> str | None:
        """Lay the parameters next to each other, in new memory unless they are; returns why not, or None.

        The Parameter objects stay the same, so optimisers do not notice.
        """
        linears = [self._modules[name] for name in self.packed_names]
        names = "/".join(self.packed_names)
        if not all(type(linear) in _PACKABLE for linear in linears):
            kinds = sorted({type(linear).__name__ for linear in linears if type(linear) not in _PACKABLE})
            return f"{names} are not plain linear layers ({', '.join(kinds)})"
        self._views = {}
        if any(_quantized(linear) for linear in linears):
            return f"{names} are quantised"
        slots = [[linear._parameters.get(kind) for linear in linears] for kind in ("weight", "bias")]
        slots = [slot for slot in slots if any(parameter is not None for parameter in slot)]
        for slot in slots:
            if any(type(parameter) is not nn.Parameter or parameter.is_inference() for parameter in slot):
                return f"{names}: not all of them have plain parameters"
            if len({(parameter.dtype, parameter.device, parameter.shape[1:]) for parameter in slot}) > 1:
                return f"{names} differ in dtype, device or width"
        with torch.inference_mode(False), torch.no_grad():
            for slot in slots:
                if _overlay(slot) is None:
                    _lay_out(slot)
        return None

    def joined(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """(weight, bias or None) of all the linears as one, or None where they have to be called one by one."""
        if self._views is None or watched() or _has_any_global_hook():
            return None
        linears = [self._modules[name] for name in self.packed_names]
        for linear in linears:
            if type(linear) not in _PACKABLE or not unobserved(linear) or _quantized(linear):
                self._views.clear()  # it would keep memory that nobody else may use any more
                return None
        weight = self._join("weight", linears)
        if weight is None:
            return None
        if all(linear.bias is None for linear in linears):
            return weight, None
        bias = self._join("bias", linears)
        return None if bias is None else (weight, bias)

    def _join(self, kind: str, linears: Sequence[nn.Module]) -> torch.Tensor | None:
        parameters = [linear._parameters.get(kind) for linear in linears]
        if any(type(parameter) is not nn.Parameter for parameter in parameters):
            self._views.clear()
            return None
        # The view that is kept holds the memory, so equal addresses mean the same memory, unless it was resized.
        key = tuple(parameter.data_ptr() for parameter in parameters)
        known, view = self._views.get(kind, (None, None))
        if key != known or view is None or view.data_ptr() != key[0] or view.dtype is not parameters[0].dtype:
            view = _overlay(parameters)
            self._views[kind] = key, view
        if view is None or not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return view
        shared = [
            linear.shared(parameter) if type(linear) is HeadParallelLinear else parameter
            for linear, parameter in zip(linears, parameters, strict=True)
        ]
        return _Join.apply(*shared)

    def _apply(self, fn, recurse=True):
        self._views = None if self._views is None else {}
        super()._apply(fn, recurse)
        if self._views is not None:  # .to() and the like move the parameters one by one
            self.pack()
        return self

    def __deepcopy__(self, memo):
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        content = {key: value for key, value in self.__dict__.items() if key != "_views"}
        duplicate.__dict__.update({key: copy.deepcopy(value, memo) for key, value in content.items()})
        if self._views is not None:
            duplicate.pack()
        return duplicate


def _quantized(linear: nn.Module) -> bool:
    return getattr(linear, "weight_scale", None) is not None


def repack(module: PackedLinears, incompatible_keys: Any) -> None:
    """Hook for after ``load_state_dict``, which with ``assign=True`` brings parameters that lie elsewhere."""
    module.pack()


def separate(module: PackedLinears, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Hook for after ``state_dict``: the packed tensors as such of their own, over the same memory.

    Who looks for tied weights by their storage (safetensors' ``save_model``, accelerate's ``save_state``) would take
    packed ones for copies of each other, refuse them or drop all but one.
    """
    for name in module.packed_names:
        for kind in ("weight", "bias"):
            tensor = state_dict.get(f"{prefix}{name}.{kind}")
            if type(tensor) is not torch.Tensor or tensor.device.type not in ("cpu", "cuda") or watched():
                continue
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                with torch.inference_mode(False):  # a tensor made anew would be one of inference mode, unlike a view
                    state_dict[f"{prefix}{name}.{kind}"] = torch.from_dlpack(tensor)


def _lay_out(parameters: Sequence[nn.Parameter]) -> None:
    first = parameters[0]
    rows = [parameter.shape[0] for parameter in parameters]
    memory = torch.empty((sum(rows), *first.shape[1:]), dtype=first.dtype, device=first.device)
    for parameter, part in zip(parameters, memory.split(rows), strict=True):
        part.copy_(parameter)
        parameter.data = part


_PACKABLE = (HeadParallelLinear, ColumnParallelLinear, nn.Linear)
