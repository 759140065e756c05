"""One text generation: in this process (tp=1), as one of torchrun's ranks, or on ranks that it starts itself.

All three run ``generate_on_this_rank``; the last through ``tp_kernels.commands.generate_rank``.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tp_kernels.commands.common import CommandFailed, UsageError

__all__ = ["GenerateRequest", "generate_here", "generate_on_ranks", "generate_on_this_rank", "under_torchrun"]


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate, and how; the same object on every rank.

    Attributes:
        model: Hugging Face folder or GGUF file.
        prompt: the user's text; ``chat`` puts it into the model's chat template.
        tp: number of ranks.
        dtype, device: of weights and activations; names as torch spells them.
        quantize: "int8" or "fp8" weights in the linear layers, or None.
        prefill_chunk: most prompt tokens to run at once, None for all.
        threads: CPU threads per rank.
        timeout: deadline of one collective in seconds.
        stream: rank 0 writes the text to stdout as it comes.
        progress: rank 0 shows a bar on stderr while it loads.
    """

    model: str
    prompt: str
    chat: bool = False
    tp: int = 1
    max_new_tokens: int = 128
    dtype: str = "float32"
    device: str = "cpu"
    quantize: str | None = None
    prefill_chunk: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    backend: str = "auto"
    threads: int = 1
    timeout: float = 300.0
    stream: bool = False
    progress: bool = False


def under_torchrun() -> int | None:
    """World size when this process is a rank that torchrun (or a launcher like it) started, else None."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    world_size = os.environ["WORLD_SIZE"]
    if not world_size.isdecimal() or int(world_size) < 1:
        raise UsageError(f"the environment variable WORLD_SIZE must be a positive integer, got {world_size!r}")
    return int(world_size)


def generate_here(request: GenerateRequest, *, out: TextIO | None = None) -> dict[str, Any]:
    """Generate in this process: world size 1, no torch.distributed."""
    result = generate_on_this_rank(request, distributed=False, out=out)
    assert result is not None
    return result


def generate_on_ranks(request: GenerateRequest) -> dict[str, Any]:
    """Start ``request.tp`` ranks, wait for them and return rank 0's result.

    On "cuda" each has a GPU of its own, or all share the first where there are not enough.

    Raises:
        UsageError: the ranks refused the arguments.
        CommandFailed: a rank failed; the text names the one that failed first.
    """
    from tp_kernels.launch import LaunchError, launch

    with tempfile.TemporaryDirectory(prefix="tp_kernels_") as folder:
        request_file, result_file = Path(folder) / "request.json", Path(folder) / "result.json"
        request_file.write_text(json.dumps(asdict(request)), encoding="utf-8")
        program = ["-m", "tp_kernels.commands.generate_rank", str(request_file), str(result_file)]
        try:
            launch(request.tp, program, threads=request.threads, one_gpu=_too_few_gpus(request))
        except LaunchError as error:
            trace = (error.root.error or {}).get("traceback", "")
            if error.is_a("BrokenPipeError"):
                raise BrokenPipeError from None
            if error.is_a("ValueError") and not error.is_a("CheckpointError"):
                raise UsageError((error.root.error or {})["message"]) from None
            raise CommandFailed(str(error), detail=trace) from None
        return json.loads(result_file.read_text(encoding="utf-8"))


def _too_few_gpus(request: GenerateRequest) -> bool:
    if request.device != "cuda":
        return False
    import torch

    return torch.cuda.device_count() < request.tp


def generate_on_this_rank(
    request: GenerateRequest, *, distributed: bool, out: TextIO | None = None
) -> dict[str, Any] | None:
    """Load this rank's shard and generate; every rank of the group calls it.

    Args:
        distributed: take rank and world size from torchrun's environment; False is world size 1.
        out: where rank 0 streams the text to, None for nowhere.
    Returns:
        On rank 0 the object that ``tp-kernels generate --json`` prints, None on the others.
    """
    import torch

    from tp_kernels.comm.process_group import ProcessGroupManager

    torch.set_num_threads(request.threads)
    if not distributed:
        with ProcessGroupManager.initialize(0, 1, device=request.device) as manager:
            return _generate(request, manager, out)
    manager = ProcessGroupManager.initialize(backend=request.backend, timeout=request.timeout, device=request.device)
    # Not a `with`: after an error the rank should end at once, and leave the torch group of lost ranks as it is.
    result = _generate(request, manager, out)
    manager.shutdown()
    return result


def _generate(request: GenerateRequest, manager: Any, out: TextIO | None) -> dict[str, Any] | None:
    import torch

    from tp_kernels.checkpoint import load_model
    from tp_kernels.inference import generate, load_tokenizer

    group, device = manager.tp_group, manager.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    first = group.rank == 0
    tokenizer = load_tokenizer(request.model)
    prompt_ids = tokenizer.chat(request.prompt) if request.chat else tokenizer.encode(request.prompt)
    if not prompt_ids:
        raise ValueError("the prompt holds no token")
    model = load_model(
        request.model,
        group=group,
        dtype=getattr(torch, request.dtype),
        device=device,
        quantize=request.quantize,
        progress=request.progress and first,
    )
    stop_ids = {*tokenizer.eos_ids, *model.config.eos_token_ids}
    streaming, decoder = out is not None and first, tokenizer.stream()

    def show(_row: int, token: int) -> None:
        if token not in stop_ids:
            print(decoder.put(token), end="", file=out, flush=True)

    result = generate(
        model,
        [prompt_ids],
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        seed=request.seed,
        stop_ids=sorted(stop_ids),
        on_token=show if streaming else None,
        prefill_chunk=request.prefill_chunk,
    )
    if streaming:
        print(decoder.flush(), file=out, flush=True)
    mine = torch.tensor([_weight_bytes(model)], dtype=torch.int64, device=device)
    weight_bytes = group.communicator.all_gather(mine).tolist()
    if not first:
        return None
    output_ids = list(result.output_ids[0])
    return {
        "prompt_ids": list(prompt_ids),
        "output_ids": output_ids,
        "text": tokenizer.decode([token for token in output_ids if token not in stop_ids]),
        "tp": group.world_size,
        "device": request.device,
        "dtype": request.dtype,
        "quantize": request.quantize,
        "backend": group.communicator.backend,
        "decode_path": result.decode_path,
        "prefill_ms": round(result.prefill_ms, 3),
        "decode_ms_per_token": round(result.decode_ms_per_token, 3),
        "tokens_per_second": round(result.tokens_per_second, 2),
        "weight_bytes_per_rank": weight_bytes,
    }


def _weight_bytes(model: Any) -> int:
    # Tied weights are one tensor under two names: count storages.
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())
