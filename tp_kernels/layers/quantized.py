"""Weight-only quantisation of the parallel linear layers: int8 or fp8 weights with one fp32 scale an output channel.

    quantize_model(model, "int8")           every parallel linear of a model, in place, one after the other
    load_model(path, quantize="int8")       the same while loading: the model never exists whole in its float dtype
    layer.quantize("int8")                  one layer

    y = (x @ weight.T) * weight_scale + bias          see ``ops.linear``; activations and biases keep their dtype

It is for inference: decoding reads every weight once a token, and these are half of bf16's bytes.

Scales. Every rank scales the rows it holds, without communication. A column-parallel shard holds whole rows of the full
matrix, so its values are those that one rank would have got. A row-parallel shard holds a part of every row and takes
the largest magnitude of that part: at least as fine as one scale a row, but other values than on another number of
ranks. So ``weight_scale`` of a row-parallel layer differs between ranks, and quantised results depend on their number
by as much as the quantisation itself costs.

The output head is quantised too if it has a weight of its own. Every word's row has its own scale, and the error of the
last layer is not carried through others; its weight is 7 % of what a token of Llama-3-8B reads. A head that is tied to
the embedding shares its memory and stays as it is; so do embeddings, of which a token reads one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from tp_kernels import ops
from tp_kernels.layers.base import TensorParallelLayer, stock_prefix
from tp_kernels.ops.quantize import KINDS, kind_of

__all__ = ["QuantizableLinear", "check_kind", "quantizable_linears", "quantize_model"]


def check_kind(kind: str) -> None:
    """ValueError unless ``kind`` is one that ``ops.quantize_weight`` knows."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"expected a quantisation of {' or '.join(map(repr, KINDS))}, got {kind!r}")


class QuantizableLinear(TensorParallelLayer):
    """A parallel linear layer whose ``weight`` can be quantised.

    Attributes:
        weight: [N, K] of this rank; once quantised int8 or float8_e4m3fn, without a gradient.
        weight_scale: fp32 [N], or None. With ``state_dict`` it is saved under the stock names, beside each weight:
            ``q_proj.weight_scale``.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    bias: nn.Parameter | None
    _float_dtype: torch.dtype

    @property
    def quantized(self) -> str | None:
        """ "int8", "fp8" or None."""
        return None if self.weight_scale is None else kind_of(self.weight.dtype)

    @property
    def input_dtype(self) -> torch.dtype:
        """What the layer computes in: its weight's dtype, or what that was before it was quantised."""
        return self.weight.dtype if self.weight_scale is None else self._float_dtype

    def quantize(self, kind: str) -> QuantizableLinear:
        """Replace the weight by a quantised one, in place; returns self. The float weight is freed.

        Args:
            kind: "int8" (absmax / 127 per row) or "fp8" (float8_e4m3fn, absmax / 448 per row).

        Raises:
            ValueError: another kind, a layer that is quantised already, a weight that is not a plain tensor or not
                finite, or an explicit overlap; the layer is unchanged.
        """
        check_kind(kind)
        self._check_quantizable()
        quantized, scale = ops.quantize_weight(self.weight, kind)
        self._float_dtype = self.weight.dtype
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        return self

    def _check_quantizable(self) -> None:
        if self.weight_scale is not None:
            raise ValueError(f"the {type(self).__name__} is quantised to {self.quantized} already")
        if type(self.weight) is not nn.Parameter:
            raise ValueError(f"expected a plain nn.Parameter to quantise, got a {type(self.weight).__name__}")
        self._check_overlap(quantized=True)

    def _check_overlap(self, quantized: bool | None = None) -> None:
        """ValueError where a quantised weight meets an explicit ``overlap``, whose matmuls take float weights."""
        overlap = getattr(self, "overlap", "auto")
        if overlap not in ("auto", "none") and (quantized or self.weight_scale is not None):
            raise ValueError(f"expected overlap 'auto' or 'none' for a quantised weight, got {overlap!r}")

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``ops.linear`` with the layer's scales; ``weight`` is the layer's, or a view of it."""
        return ops.linear(x, weight, bias, weight_scale=self.weight_scale)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [N, K] that the layer computes with, in ``dtype`` (``input_dtype`` by default); a copy."""
        dtype = self.input_dtype if dtype is None else dtype
        if self.weight_scale is None:
            return self.weight.detach().to(dtype, copy=True)
        return ops.dequantize_weight(self.weight.detach(), self.weight_scale.detach(), dtype)

    def _refuse_quantized(self, what: str) -> None:
        if self.weight_scale is not None:
            raise ValueError(f"cannot {what} a layer whose weight is {self.quantized}: do that before quantising it")

    def _as_float(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if self.weight_scale is None or name not in ("weight", "weight_scale"):
            return tensor
        return self.dequantized_weight() if name == "weight" else None

    def extra_repr(self) -> str:
        kind = f", weight={self.quantized}" if self.quantized else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"local={list(self.weight.shape)}{kind}, {super().extra_repr()}"
        )

    def _apply(self, fn: Callable, recurse: bool = True):
        """As in torch, for ``.to(device)`` and ``.to(dtype)``: the latter is no reason to convert these two."""
        if self.weight_scale is None:
            return super()._apply(fn, recurse)
        self._float_dtype = fn(torch.empty(0, dtype=self._float_dtype)).dtype
        weight, scale = self.weight, self.weight_scale

        def keep_values(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is weight:
                return _moved(fn, tensor.view(torch.uint8)).view(tensor.dtype)
            return _moved(fn, tensor) if tensor is scale else fn(tensor)

        return super()._apply(keep_values, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # A plain copy between these dtypes would convert values that mean nothing without their scales.
        for shard in self.tensor_shards():
            given, here = state_dict.get(prefix + shard.name), shard.target.dtype
            if given is not None and given.dtype is not here and (kind_of(given.dtype) or kind_of(here)):
                error_msgs.append(
                    f"{stock_prefix(self, prefix)}{shard.name}: expected {here}, got {given.dtype}; "
                    "quantise the model as the saved one was (layers.quantize_model) before loading."
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _moved(fn: Callable, tensor: torch.Tensor) -> torch.Tensor:
    """``fn(tensor)``, but in the dtype of ``tensor``."""
    moved = fn(tensor)
    return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)


def quantizable_linears(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, QuantizableLinear]:
    """The layers that ``quantize_model`` would quantise, under their names in the model. Same arguments.

    Raises:
        ValueError: a name in ``skip`` that fits none of them, or a layer that cannot be quantised.
    """
    if isinstance(skip, str):
        raise ValueError(f"skip must be a list of names, got the string {skip!r}")
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizableLinear) and owners[id(module.weight)] == 1
    }
    unwanted = {name: [end for end in skip if f".{name}".endswith(f".{end}")] for name in linears}
    for end in skip:
        if not any(end in ends for ends in unwanted.values()):
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f"skip: expected names of linear layers ({', '.join(known)}), got {end!r}")
    linears = {name: linear for name, linear in linears.items() if not unwanted[name]}
    for name, linear in linears.items():
        try:
            linear._check_quantizable()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return linears


def quantize_model(model: nn.Module, kind: str, *, skip: Sequence[str] = ()) -> nn.Module:
    """Quantise the weights of a model's parallel linear layers in place, one layer after the other. No collective.

    At any time the memory is that of the model plus one quantised layer. Weights that several modules share (a head
    tied to its embedding) stay as they are. See the module for what is quantised and how.

    Args:
        model: any module with parallel layers in it; may be on the meta device.
        kind: "int8" or "fp8"; see ``QuantizableLinear.quantize``.
        skip: layers to leave as they are, by their full names or the ends of them: ``"lm_head"``, ``"down_proj"``,
            ``"layers.0.self_attn.qkv_proj"``. Fused projections go by the fused module's name.

    Returns:
        ``model``.

    Raises:
        ValueError: another kind, a layer that is quantised already or cannot be, weights that are not finite, no layer
            to quantise, a name in ``skip`` that fits no layer; nothing has been changed.
    """
    check_kind(kind)
    linears = quantizable_linears(model, skip)
    if not linears:
        raise ValueError(f"expected parallel linear layers in the {type(model).__name__} to quantise, found none")
    for name, linear in linears.items():
        if linear.weight.numel() and not linear.weight.is_meta:
            low, high = linear.weight.detach().aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(f"{name}: expected finite weights to quantise, got {low.item()} to {high.item()}")
    for linear in linears.values():
        linear.quantize(kind)
    return model
