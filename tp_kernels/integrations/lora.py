"""PEFT LoRA on tensor-parallel models.

    config = register_lora(LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    model = get_peft_model(model, config)            # any model with our parallel layers, on all ranks
    ...
    save_lora(model, "adapter")                      # a stock adapter: plain PEFT loads it onto the plain model
    model = load_lora(other_model, "adapter")        # and the other way round

``register_lora`` is needed because PEFT keeps custom layers in the configuration, not in the model. Everything else is
PEFT's own: several adapters, ``set_adapter``, ``disable_adapter``, ``merge_adapter``, ``merge_and_unload`` (which gives
back the parallel layers), rank-stabilised LoRA, dropout, ``modules_to_save``, ``set_peft_model_state_dict`` with a
stock or a sliced state dict. ``full_gradients`` and ``full_state_dict`` of ``tp_kernels.layers`` gather adapters too.

FSDP2 and DDP over another dimension of the mesh are set up after ``get_peft_model``; ``save_lora`` is then called on
all ranks, with ``is_main_process`` true in one replica. Needs peft 0.19 or newer.

``PeftModel.save_pretrained`` knows nothing of slices; on more than one rank it raises ValueError and points to
``save_lora``. How the layers communicate is said in ``lora_layers``.
"""

from __future__ import annotations

import os

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from tp_kernels.checkpoint.agreement import agree
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.integrations.lora_layers import CUSTOM_MODULES, SlicedLoraConfig, check_config
from tp_kernels.layers.base import TensorParallelLayer, full_state_dict, iter_tensor_shards

__all__ = ["load_lora", "register_lora", "save_lora"]

# PEFT's names of the modules below a wrapped one that hold what an adapter trains.
_TRAINED = ("lora_A", "lora_B", "modules_to_save")


def register_lora(config: LoraConfig) -> LoraConfig:
    """Teach a LoRA configuration our parallel layers; use it wherever PEFT takes a configuration.

    Args:
        config: a ``LoraConfig``; it is changed in place.
    Returns:
        ``config``.
    Raises:
        ValueError: it is not a ``LoraConfig``, or asks for something that sharded layers do not have (DoRA and other
            variants, ``lora_bias``, initialisations from the base weight, ``target_modules="all-linear"``).
    """
    if type(config) not in (LoraConfig, SlicedLoraConfig):
        raise ValueError(f"expected a peft.LoraConfig, got {type(config).__name__}")
    check_config(config)
    if config.target_modules == "all-linear":
        raise ValueError(
            "target_modules='all-linear' finds nn.Linear only, which parallel layers are not: expected the names of "
            "the projections, such as ['q_proj', 'v_proj']"
        )
    config._register_custom_module(CUSTOM_MODULES)
    return config


def save_lora(
    model: PeftModel,
    folder: str | os.PathLike,
    *,
    adapters: list[str] | None = None,
    is_main_process: bool = True,
    safe_serialization: bool = True,
) -> None:
    """What ``model.save_pretrained(folder)`` is for a plain model: write stock adapters. A collective call.

    Full A and B are gathered and rank 0 of the group writes ``adapter_model.safetensors`` and ``adapter_config.json``
    (adapters other than "default" into subfolders, as PEFT does). Trained copies of whole modules (``modules_to_save``)
    go with them. Embeddings that are not trained are never written.

    Args:
        model: the ``PeftModel``, the same on all ranks.
        folder: created if need be.
        adapters: names; None means all.
        is_main_process: with data-parallel replicas, True on one of them only.
        safe_serialization: safetensors, or PyTorch's format.
    Raises:
        ValueError: ``model`` is not a ``PeftModel``. CheckpointError: on every rank, if the writing failed on rank 0.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"expected a PeftModel, got {type(model).__name__}")
    group = _group_of(model)
    # What is not gathered here (the base weights) is listed and then filtered out by PEFT; nothing of it is copied.
    state = model.state_dict()
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in _TRAINED:
            state |= {f"{path}.{name}": whole for name, whole in full_state_dict(module).items()}
    failure = None
    if group.rank == 0 and is_main_process:
        configs = list(model.peft_config.values())
        try:
            for config in configs:
                config.__dict__["_tp_whole"] = True
            model.save_pretrained(
                os.fspath(folder),
                safe_serialization=safe_serialization,
                selected_adapters=adapters,
                save_embedding_layers=False,
                state_dict=state,
            )
        except Exception as error:
            failure = error
        finally:
            for config in configs:
                config.__dict__.pop("_tp_whole", None)
    agree(group, failure)


def load_lora(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """What ``PeftModel.from_pretrained(model, folder)`` and ``model.load_adapter`` are for a plain model.

    Every rank reads the stock adapter and keeps its slices. A collective call.

    Args:
        model: a tensor-parallel model, or the ``PeftModel`` of one, which then gets a further adapter.
        folder: what ``save_lora`` or PEFT's ``save_pretrained`` wrote.
        adapter_name: the adapter's name from now on; it must be new.
        is_trainable: whether the adapter is to be trained further; a new ``PeftModel`` is put into that mode.
    Returns:
        The ``PeftModel``; ``model`` itself if it was one. A further adapter is not made active.
    Raises:
        ValueError: the name is taken. CheckpointError: on every rank, if one could not read the adapter, or it does not
            fit this model's shapes; ``model`` is unchanged then.
    """
    known = model.peft_config if isinstance(model, PeftModel) else {}
    if adapter_name in known:
        raise ValueError(f"expected a new adapter name, got {adapter_name!r}; there are {sorted(known)}")
    group, folder = _group_of(model), os.fspath(folder)
    config, weights, failure = None, {}, None
    try:
        config = register_lora(LoraConfig.from_pretrained(folder))
        weights = load_peft_weights(folder, device="cpu")
        _check_shapes(model, weights)
    except Exception as error:
        failure = error
    agree(group, failure)
    config.inference_mode = not is_trainable
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        if is_trainable:
            model.set_requires_grad(adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name)
        model.train(is_trainable)
    for path, module in model.named_modules():
        if path.endswith(".modules_to_save") and adapter_name in module:
            for shard in iter_tensor_shards(module[adapter_name]):
                name = f"{path.removesuffix('.modules_to_save')}.{shard.name}"
                if name in weights:
                    weights[name] = weights[name][shard.slices]
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    return model


def _group_of(model: nn.Module) -> TPGroup:
    """The ranks that share the model."""
    for module in model.modules():
        if isinstance(module, TensorParallelLayer):
            return module.group
    raise ValueError(f"expected a model with parallel layers, got {type(model).__name__} without any")


def _check_shapes(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """ValueError unless the adapter's factors fit the layers they are named after."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(base.named_modules())
    problems = []
    for name, tensor in weights.items():
        for factor, dim, feature in ((".lora_A.weight", 1, "in_features"), (".lora_B.weight", 0, "out_features")):
            target = modules.get(name.removeprefix("base_model.model.").removesuffix(factor))
            if not name.endswith(factor):
                continue
            if target is None:
                problems.append(f"{name} has no module here")
            elif tensor.dim() != 2 or tensor.shape[dim] != getattr(target, feature, None):
                problems.append(f"{name} is {list(tensor.shape)}, the layer has {getattr(target, feature, None)}")
    if problems:
        raise ValueError("the adapter does not fit the model: " + "; ".join(problems[:5]))
