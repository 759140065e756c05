"""``from_pretrained``: a Hugging Face model patched before it has weights, so that each rank loads only its slices."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from tp_kernels.checkpoint import CheckpointError, DistributedCheckpointLoader
from tp_kernels.checkpoint.agreement import agree
from tp_kernels.comm.process_group import resolve_group
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.integrations._group_checks import check_carries
from tp_kernels.integrations.hf import apply_tp_kernels
from tp_kernels.ops import advise_huge

__all__ = ["from_pretrained"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a model needs of a repository: never pickles, nor other frameworks' weights.
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# Rank 0 may download for a long time; the others wait this many seconds for it.
_DOWNLOAD_TIMEOUT = 24 * 3600.0


def from_pretrained(
    path: str | os.PathLike,
    group: Any = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool | Callable[[int, int], None] = True,
    **options: Any,
) -> Any:
    """Load a Hugging Face model, patched by ``apply_tp_kernels``; every rank reads only its slices. Collective.

    Args:
        path: folder with config.json and safetensors files, or a model's name on the Hugging Face hub, which rank 0
            downloads into the hub's cache (the other ranks need to see that cache).
        group: TPGroup, process group or mesh; None is the default group, or one rank.
        dtype: of the weights; None takes what the configuration says, else float32.
        device: where the weights go; None is the group's device.
        progress: see ``DistributedCheckpointLoader``.
        options: of ``apply_tp_kernels``: ``swiglu``, ``attention``, ``norms``, ``linear``, ``overlap``.

    Returns:
        The patched ``*ForCausalLM`` in eval mode, with its generation configuration.

    Raises:
        CheckpointError: on every rank: a folder, file or tensor is missing or malformed; there is no partial model.
        ValueError: on every rank: another dtype, a model or an option that ``apply_tp_kernels`` does not take.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
    group = resolve_group(group)
    device = group.device if device is None else torch.device(device)
    check_carries(group, device)
    folder = _local_folder(path, group)
    with DistributedCheckpointLoader(folder, group, progress=progress) as loader:
        model, error = None, None
        try:
            model = _without_weights(folder, dtype)
        except Exception as caught:
            error = caught
        agree(group, error)
        apply_tp_kernels(model, group, **options)
        loader.check(model)
        try:
            model.to_empty(device=device)
        except Exception as caught:  # out of memory may hit one rank alone
            error = caught
        agree(group, error)
        loader.load_into(model)
    # Decoding reads every weight once a token: with huge pages a fifth faster (SmolLM2-135M, one core of a Zen 4).
    advise_huge(model.parameters())
    return model.eval()


def _without_weights(folder: str, dtype: torch.dtype | None) -> Any:
    """The stock model on the meta device, its generation configuration read."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = dict(quantization).get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise CheckpointError(f"is quantised ({method}); expected float weights", file=folder)
    if dtype is None:
        dtype = getattr(config, "dtype", None) or torch.float32
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype not in _DTYPES:
            raise CheckpointError(f"its config names the dtype {config.dtype!r}; pass dtype=", file=folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if os.path.exists(os.path.join(folder, "generation_config.json")):
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _local_folder(path: str | os.PathLike, group: TPGroup) -> str:
    """The folder that ``path`` means, the same on all ranks; a name on the hub is downloaded."""
    folder = os.path.expanduser(os.fspath(path))
    error = None
    if os.path.isfile(folder):
        error = CheckpointError("is a file; expected a Hugging Face folder (load_model reads GGUF)", file=folder)
    named = not os.path.exists(folder) and not os.path.isabs(folder) and folder.count("/") <= 1
    agree(group, error, same=f"{path} {named}")
    if not named or folder.startswith("."):
        return folder  # what is wrong with a folder, the loader says
    try:
        if group.rank == 0:
            folder = _download(folder)
    except Exception as caught:
        error = CheckpointError(f"is no folder, and could not be had from the hub: {caught}", file=folder)
        error.__cause__ = caught
    agree(group, error, timeout=_DOWNLOAD_TIMEOUT)
    try:
        if group.rank != 0:
            folder = _download(folder, local_files_only=True)
    except Exception as caught:
        error = caught
    agree(group, error)
    return folder


def _download(name: str, **options: Any) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=list(_HUB_FILES), **options)
