"""``DistributedCheckpointLoader``: each rank reads its slices of a checkpoint into a sharded model.

    loader = DistributedCheckpointLoader("path/to/folder_or.gguf", group)
    loader.load_into(model)

Everything is checked before the first parameter is written: headers, names, shapes, dtypes. Every step that can fail on
one rank ends in an exchange, so that all ranks raise the same ``CheckpointError`` at the same place and none is left
waiting.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from tp_kernels.checkpoint.agreement import agree
from tp_kernels.checkpoint.errors import PICKLE_SUFFIXES, CheckpointError, pickle_refusal
from tp_kernels.checkpoint.source import TensorSource

__all__ = ["DistributedCheckpointLoader", "open_source"]

# Tensors that old conversions saved although the model computes them.
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.masked_bias|attention\.bias_mask)$")
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Ranks may read at different speeds (a cold page cache on one host); the exchange after reading waits this long for
# them.
_READ_TIMEOUT = 3600.0
_SHOWN = 5

_Places = dict[torch.Tensor, list[tuple[dict[str, Any], str]]]


def open_source(path: str | os.PathLike) -> TensorSource:
    """Open a checkpoint: a Hugging Face folder, a GGUF file, or a folder with nothing but one GGUF file.

    Raises:
        CheckpointError: it does not exist, is a pickle file, is neither format, or its headers are malformed.
    """
    path = os.path.expanduser(os.fspath(path))
    if os.path.isdir(path):
        from tp_kernels.checkpoint.hf_folder import INDEX_FILE, SINGLE_FILE, HFFolderSource

        if not any(os.path.lexists(os.path.join(path, name)) for name in (SINGLE_FILE, INDEX_FILE)):
            ggufs = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
            if len(ggufs) > 1:
                raise CheckpointError(f"has several GGUF files, name one of them: {', '.join(ggufs)}", file=path)
            if ggufs:
                return _open_gguf(os.path.join(path, ggufs[0]))
        return HFFolderSource(path)
    if path.endswith(PICKLE_SUFFIXES):
        raise pickle_refusal(path)
    if not os.path.exists(path):
        raise CheckpointError("does not exist; expected a Hugging Face folder or a .gguf file", file=path)
    if path.endswith(".safetensors"):
        raise CheckpointError("is a single safetensors file; give the folder that holds it and config.json", file=path)
    return _open_gguf(path)


def _open_gguf(path: str) -> TensorSource:
    from tp_kernels.checkpoint.gguf_reader import GGUFSource

    return GGUFSource(path)


def _meta_places(model: torch.nn.Module) -> _Places:
    """Where each tensor on the meta device is held: the tables of parameters and buffers, and the name there."""
    places: _Places = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta:
                    places.setdefault(tensor, []).append((table, name))
    return places


def _give_memory(module: torch.nn.Module, device: str | torch.device, places: _Places) -> None:
    """``to_empty(device=device)`` for one module alone; tied tensors stay tied."""
    for tensor in [*module._parameters.values(), *module._buffers.values()]:
        if tensor is not None and tensor.is_meta:
            fresh = torch.empty_like(tensor, device=device)
            if isinstance(tensor, torch.nn.Parameter):
                fresh = torch.nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            for table, name in places[tensor]:
                table[name] = fresh


class DistributedCheckpointLoader:
    """A checkpoint opened by all ranks of a group. Creating it and ``load_into`` are collective calls.

    Attributes:
        path: the folder or file.
        group: the ``TPGroup`` whose ranks share the work of checking.
        bytes_read: bytes of tensor data that this rank has requested from files (headers not included).
        total_bytes: bytes of tensor data in the checkpoint.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        group: Any = None,
        *,
        progress: bool | Callable[[int, int], None] = True,
    ):
        """Open the checkpoint and check all headers.

        Args:
            path: Hugging Face folder (``model.safetensors``, or shards with their index) or GGUF file.
            group: anything ``resolve_group`` takes; None is the default group, or world size 1 without one.
            progress: True shows a bar on rank 0 while loading if stderr is a terminal; a function is called on rank 0
                with (bytes done, bytes to do) instead.
        Raises:
            CheckpointError: on every rank, if any rank cannot open it or finds it malformed.
        """
        from tp_kernels.comm.process_group import resolve_group

        self.path = os.fspath(path)
        self.group = resolve_group(group)
        self._progress = progress
        self._source: TensorSource | None = None
        error, same = None, None
        try:
            self._source = open_source(path)
            self._config_error: CheckpointError | None = None
            try:
                self._config = self._source.config()
            except CheckpointError as missing:  # tensors alone can still be loaded into a model that exists
                self._config, self._config_error = {}, missing
            same = self._fingerprint()
        except Exception as caught:
            error = caught
        try:
            agree(self.group, error, same=same)
        except BaseException:
            self.close()
            raise

    def _fingerprint(self) -> str:
        source = self._source
        return repr([(name, source.shape(name)) for name in sorted(source.names())]) + repr(
            sorted(self._config.items(), key=lambda item: item[0])
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that this rank has requested from files."""
        return self._source.bytes_read

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in the checkpoint."""
        return self._source.total_bytes

    def tensor_names(self) -> list[str]:
        """Names of the checkpoint's tensors, as the Hugging Face model calls them."""
        return list(self._source.names())

    def config(self) -> dict[str, Any]:
        """The model's configuration with the keys of a Hugging Face ``config.json``. Not a collective.

        From ``config.json`` (token ids from ``generation_config.json`` where it has them), or from GGUF metadata.

        Raises:
            CheckpointError: a folder without config.json.
        """
        if self._config_error is not None:
            raise self._config_error
        return dict(self._config)

    def check(self, model: torch.nn.Module, *, strict: bool = True) -> None:
        """Whether the checkpoint fits the model; reads no tensor data. Collective.

        The model may be on the meta device, so that sizes from a stranger's config allocate nothing before they are
        checked.

        Raises:
            CheckpointError: on every rank, with the missing, unexpected and mis-shaped tensors.
        """
        self._agreed_plan(model, strict)

    def load_into(
        self,
        model: torch.nn.Module,
        *,
        strict: bool = True,
        device: str | torch.device | None = None,
        finished: Callable[[torch.nn.Module], object] | None = None,
    ) -> None:
        """Fill the model's parameters with this rank's slices, converting to their dtype. Collective.

        Args:
            model: any module; ``TensorParallelLayer``s inside it get their slice, plain parameters the whole tensor.
                Its parameters must have memory (not on the meta device), unless ``device`` is given.
            strict: tensors of the checkpoint that the model has no place for are an error, apart from a few that are
                known to be computed (``rotary_emb.inv_freq``) and the head of a model with tied embeddings.
            device: what is on the meta device gets its memory here, one module after the other, just before it is
                filled.
            finished: called with a module when everything that it holds itself is filled, before the next one gets
                memory. It may replace the module's parameters, for example by smaller ones.
        Raises:
            CheckpointError: on every rank, naming file, tensor and rank. When the checkpoint does not fit the model,
                nothing has been written. When reading failed midway, every parameter on every rank has been filled with
                NaN (of quantised weights, the scales) or is still on the meta device: a model that was half loaded
                cannot be mistaken for a good one.
        """
        plan, error = self._agreed_plan(model, strict, filled=device is None), None
        try:
            try:
                with self._bar(plan) as advance, torch.no_grad():
                    wanted = {shard.name: name for name, shard in plan}
                    places = {} if device is None else _meta_places(model)
                    for path, module in model.named_modules():
                        if device is not None:
                            _give_memory(module, device, places)
                        if self._fill(module, path, wanted, advance) and finished is not None:
                            finished(module)
            except Exception as caught:
                error = caught
            timeout = max(_READ_TIMEOUT, getattr(self.group.communicator, "timeout", 0.0))
            agree(self.group, error, timeout=timeout)
        except BaseException:  # also KeyboardInterrupt, and an exchange that failed because a rank died
            self._poison(model)
            raise

    def _fill(self, module: torch.nn.Module, path: str, wanted: dict[str, str], advance: Callable[[int], None]) -> bool:
        """Read what ``module`` itself holds; ``wanted``: a tensor's name in the model to that in the checkpoint.

        A method so that no view of a parameter outlives it: ``finished`` may free the parameter.
        """
        from tp_kernels.layers.base import own_shards

        shards = [shard for _, shards in own_shards(module, path) for shard in shards if shard.name in wanted]
        for shard in shards:
            self._source.read_into(wanted[shard.name], shard.target, shard.dim, shard.start, shard.stop)
            advance(shard.target.nbytes)
        return bool(shards)

    def _agreed_plan(self, model: torch.nn.Module, strict: bool, filled: bool = False) -> list[tuple[str, Any]]:
        plan, error = [], None
        try:
            plan = self._plan(model, strict)
            if filled and any(shard.target.is_meta for _, shard in plan):
                raise ValueError("the model is on the meta device; call model.to_empty(device=...) before loading")
        except Exception as caught:
            error = caught
        agree(self.group, error, same=repr([(name, shard.full_shape) for name, shard in plan]))
        return plan

    def _plan(self, model: torch.nn.Module, strict: bool) -> list[tuple[str, Any]]:
        """(checkpoint name, shard) for everything the model needs, after checking all of it."""
        from tp_kernels.layers.base import TensorParallelLayer, iter_tensor_shards

        for path, module in model.named_modules():
            if isinstance(module, TensorParallelLayer) and module.quantized:
                raise ValueError(f"{path or 'the layer'} is quantised to {module.quantized}: load before quantising")
        source = self._source
        available = set(source.names())
        plan, problems, used = [], [], set()
        for shard in iter_tensor_shards(model):
            name = shard.name
            if name not in available and name == _LM_HEAD and self._config.get("tie_word_embeddings"):
                name = _EMBEDDING
            if name not in available:
                problems.append(self._problem(shard.name, "is missing"))
                continue
            used.add(name)
            shape = source.shape(name)
            if tuple(shape) != tuple(shard.full_shape):
                problems.append(
                    self._problem(name, f"has shape {list(shape)}, the model expects {list(shard.full_shape)}")
                )
            elif not shard.target.is_floating_point():
                problems.append(self._problem(name, f"cannot be loaded into a parameter of {shard.target.dtype}"))
            else:
                try:
                    source.dtype(name)
                except CheckpointError as error:
                    problems.append(error)
            plan.append((name, shard))
        if strict:
            problems += [
                self._problem(name, "is unexpected: the model has no such parameter")
                for name in sorted(available - used)
                if not self._ignorable(name)
            ]
            problems += [
                self._problem(name, "is in a shard where the index does not list it") for name in source.unlisted
            ]
        if problems:
            first, more = problems[:_SHOWN], len(problems) - _SHOWN
            text = "; ".join(str(problem) for problem in first) + (f"; and {more} more" if more > 0 else "")
            combined = CheckpointError(text)
            combined.file, combined.tensor = problems[0].file, problems[0].tensor
            raise combined
        return plan

    def _problem(self, name: str, message: str) -> CheckpointError:
        return CheckpointError(message, file=self._source.file_of(name), tensor=name)

    def _ignorable(self, name: str) -> bool:
        if name == _LM_HEAD:  # a tied model uses its embedding; transformers ignores the copy too
            return bool(self._config.get("tie_word_embeddings"))
        return _IGNORED.fullmatch(name) is not None

    @staticmethod
    def _poison(model: torch.nn.Module) -> None:
        from tp_kernels.layers.base import iter_tensor_shards

        with torch.no_grad():
            for shard in iter_tensor_shards(model):
                if shard.target.is_floating_point() and shard.target.dtype.itemsize > 1:
                    shard.target.fill_(float("nan"))

    @contextmanager
    def _bar(self, plan: list[tuple[str, Any]]):
        """Yields ``advance(bytes of parameters filled)``; shows a bar on rank 0."""
        total, done = sum(shard.target.nbytes for _, shard in plan), 0
        if self.group.rank != 0 or not self._progress:
            yield lambda count: None
        elif callable(self._progress):

            def report(count: int) -> None:
                nonlocal done
                done += count
                self._progress(done, total)

            yield report
        elif not sys.stderr.isatty():
            yield lambda count: None
        else:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                name = os.path.basename(os.path.normpath(self.path))
                ranks = self.group.world_size
                task = bar.add_task(f"loading {name}" + (f" (rank 0 of {ranks})" if ranks > 1 else ""), total=total)
                yield lambda count: bar.advance(task, count)

    def close(self) -> None:
        """Close the files; safe to call twice. Not a collective."""
        if self._source is not None:
            self._source.close()

    def __enter__(self) -> DistributedCheckpointLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
