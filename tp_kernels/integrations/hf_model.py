"""What a patched ``*ForCausalLM`` does differently as a whole: saving, moving, sharing its memory."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.integrations.hf_saving import save_on_first_rank
from tp_kernels.layers import VocabParallelEmbedding, iter_tensor_shards

__all__ = ["CausalLMAdapter"]


class CausalLMAdapter:
    """Methods in front of those of ``LlamaForCausalLM`` and its like.

    Attributes:
        tp_group: the ``TPGroup`` of the ranks that share the model.
        tp_report: the ``PatchReport``.
    """

    def tp_causal_lm(self):
        """A ``ParallelCausalLM`` over the memory of this model's parameters, for inference.

        It is kept, and built anew after the parameters have moved. What is done to the parameters in place (an
        optimiser's step, ``load_state_dict``) it sees. Hooks on this model's modules it does not call.

        Raises:
            ValueError: the parameters cannot be shared (LoRA, projections that are not packed, a rotary scaling that
                ``ModelConfig`` does not know); the message names the reason.
        """
        if not isinstance(self.model.embed_tokens, VocabParallelEmbedding):
            raise ValueError("the model was patched with linear=False; expected parallel layers")
        return self._tp_shared.get(self)

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict=None, **kwargs: Any):
        """Write the whole checkpoint in the stock layout. Collective: every rank of the group calls it.

        Tensors are gathered one by one; rank 0 collects them in CPU memory and writes. Returns on every rank when the
        files are there. Transformers' ``Trainer`` calls this on one rank of the world alone: with several ranks, save
        after training instead.

        Args:
            save_directory: folder, the same on all ranks; rank 0 makes it.
            is_main_process: False on rank 0 writes nothing. As in transformers, only the group that holds rank 0 of
                torch.distributed's world writes at all: the others are replicas.
            state_dict: as in transformers; this rank's slices, or whole tensors.
            kwargs: further arguments of transformers' ``save_pretrained``.

        Raises:
            CheckpointError: on every rank, with what went wrong on rank 0 (``save_directory`` is a file, ...).
            ValueError: layers are quantised.
        """
        if any(getattr(module, "weight_scale", None) is not None for module in self.modules()):
            raise ValueError("the model's layers are quantised: expected float weights, which a checkpoint holds")
        save = super().save_pretrained
        count = sum(math.prod(shard.full_shape) for shard in iter_tensor_shards(self))

        def write(state: dict[str, torch.Tensor]) -> None:
            _refuse_file(save_directory)
            # Transformers writes this number into the index, and only knows this rank's slices.
            self.num_parameters = lambda *args, **options: count
            try:
                save(save_directory, is_main_process=is_main_process, state_dict=state, **kwargs)
            finally:
                del self.num_parameters

        save_on_first_rank(self, self.tp_group, write, state_dict)

    def generate(self, *args: Any, **kwargs: Any):
        """As in transformers. Collective: all ranks call it with the same arguments, and get the same tokens.

        Samples are drawn with rank 0's random numbers, whatever the other ranks' generators held.

        Raises:
            ValueError: ``max_time`` with several ranks, whose clocks would end the text at different tokens.
        """
        if self.tp_group.world_size > 1:
            given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
            options = [kwargs, *(vars(config) for config in (given, self.generation_config) if config is not None)]
            if any(option.get("max_time") is not None for option in options):
                raise ValueError("max_time ends each rank's text by its own clock: expected max_new_tokens instead")
            sampled = [option["do_sample"] for option in options if option.get("do_sample") is not None]
            if sampled and sampled[0]:
                _share_generator(self.tp_group, self.device)
        return super().generate(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any):
        """Refused: the vocabulary is spread over the ranks.

        Raises:
            ValueError: always when a size is given and the embedding is parallel.
        """
        if isinstance(self.model.embed_tokens, VocabParallelEmbedding) and (args or kwargs):
            raise ValueError("the vocabulary is spread over the ranks: resize it before apply_tp_kernels")
        return super().resize_token_embeddings(*args, **kwargs)

    def _get_static_cache_init_shape(self):
        # Transformers would take the whole model's KV heads; None lets the cache find out from the first keys.
        return None if self.tp_group.world_size > 1 else super()._get_static_cache_init_shape()

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        # generate() compiles by itself for static caches on GPUs; collectives do not belong into such a graph.
        return self.tp_group.world_size == 1 and super()._valid_auto_compile_criteria(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self._tp_shared.forget()
        rotary = self.model.rotary_emb
        was_meta = rotary.inv_freq.is_meta
        places: dict[int, list[tuple[dict, str]]] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                places.setdefault(id(parameter), []).append((module._parameters, name))
        places.pop(id(None), None)
        super()._apply(fn, recurse)
        # to_empty() and the like replace parameters one by one, and would part a head from the embedding it is tied to.
        for (owner, name), *others in places.values():
            for parameters, other in others:
                parameters[other] = owner[name]
        if was_meta and not rotary.inv_freq.is_meta:
            # Computed, not loaded: memory that to_empty() made holds nothing yet.
            device = rotary.inv_freq.device
            with torch.device("cpu"):
                fresh = type(rotary)(config=self.config)
            self.model.rotary_emb = fresh.to(device)
        return self


def _share_generator(group: TPGroup, device: torch.device) -> None:
    """Give every rank the state of rank 0's default generator of ``device``. A collective call."""
    on_gpu = device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    state = group.broadcast(state.view(torch.int64).to(group.device)).cpu().view(torch.uint8)
    torch.cuda.set_rng_state(state, device) if on_gpu else torch.set_rng_state(state)


def _refuse_file(path: Any) -> None:
    if os.path.isfile(path):  # transformers would log it and go on
        raise ValueError(f"expected a folder to save to, {os.fspath(path)} is a file")
