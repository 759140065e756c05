"""``load_model``: from a path to a sharded model with its weights, in one collective call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from tp_kernels.checkpoint.agreement import agree
from tp_kernels.checkpoint.errors import CheckpointError
from tp_kernels.checkpoint.loader import DistributedCheckpointLoader
from tp_kernels.ops import advise_huge
from tp_kernels.ops.linear_all_reduce import OVERLAPS

__all__ = ["load_model"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_model(
    path: str | os.PathLike,
    *,
    group: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    overlap: str = "auto",
    progress: bool | Callable[[int, int], None] = True,
):
    """Build the model that a checkpoint describes, sharded over the group, and load this rank's slices. Collective.

    Args:
        path: Hugging Face folder or GGUF file of a supported family.
        group: anything ``resolve_group`` takes; None is the default group, or world size 1 without one.
        dtype: of the weights; None takes what the checkpoint was saved in (float32 for a quantised GGUF file).
        device: where the weights go.
        quantize: "int8" or "fp8" quantises the weights of the linear layers as they are loaded, one layer after the
            other: the memory needed is that of the quantised model and one layer in ``dtype``. See
            ``layers.quantize_model`` for what is quantised and how.
        overlap: how sums over the ranks overlap the matmuls before them, see ``RowParallelLinear``.
        progress: see ``DistributedCheckpointLoader``.
    Returns:
        A ``ParallelCausalLM`` in eval mode.
    Raises:
        CheckpointError: on every rank; there is no partial model.
        ValueError: another ``dtype`` than float32, bfloat16, float16 or float64; another ``quantize`` than "int8" or
            "fp8"; an unknown ``overlap``, or an explicit one beside ``quantize``; the model's family or a feature of it
            is not supported; there are more ranks than query heads.
    """
    from tp_kernels.layers.quantized import check_kind, quantizable_linears
    from tp_kernels.models import ModelConfig, ParallelCausalLM

    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, _DTYPES.values()))}, got {dtype!r}")
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap must be one of {', '.join(OVERLAPS)}, got {overlap!r}")
    if quantize is not None:
        check_kind(quantize)
        if overlap not in ("auto", "none"):
            raise ValueError(f"expected overlap 'auto' or 'none' for quantised weights, got {overlap!r}")
    with DistributedCheckpointLoader(path, group, progress=progress) as loader:
        # Functions of what the ranks were seen to share: a ValueError here is the same on all of them.
        described = loader.config()
        layers, tensors = described.get("num_hidden_layers"), len(loader.tensor_names())
        if isinstance(layers, int) and layers > tensors:  # before anything is made once per layer
            raise CheckpointError(f"its config names {layers} layers, it has {tensors} tensors", file=loader.path)
        try:
            config = ModelConfig.from_hf(described)
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:  # a value of the wrong type
            raise CheckpointError(f"its config is malformed: {error}", file=loader.path) from error
        if dtype is None:
            name = config.checkpoint_dtype or "float32"
            if name not in _DTYPES:
                raise CheckpointError(f"its config names the dtype {name!r}; pass dtype=", file=loader.path)
            dtype = _DTYPES[name]
        model = ParallelCausalLM(config, overlap=overlap, group=loader.group, device="meta", dtype=dtype)
        loader.check(model)
        if quantize is None:
            _allocate(model, device, loader.group)
            loader.load_into(model)
        else:
            names = {linear: name for name, linear in quantizable_linears(model).items()}

            def finish(module: torch.nn.Module) -> None:
                if module in names:
                    try:
                        module.quantize(quantize)
                    except ValueError as error:
                        raise CheckpointError(f"{names[module]}: {error}", file=loader.path) from error

            loader.load_into(model, device=device, finished=finish)
    # Decoding reads every weight once a token: with huge pages a fifth faster (SmolLM2-135M, one core of a Zen 4).
    advise_huge(model.parameters())
    return model.eval()


def _allocate(model: torch.nn.Module, device: str | torch.device, group: Any) -> None:
    """Memory for all parameters, or an error on all ranks."""
    error = None
    try:
        model.to_empty(device=device)
    except Exception as caught:  # out of memory may hit one rank alone
        error = caught
    agree(group, error)
