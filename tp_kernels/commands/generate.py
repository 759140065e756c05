"""``tp-kernels generate``: text from a Llama-family checkpoint on N ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from tp_kernels.commands.common import UsageError, at_least, number_above, stdout_reserved
from tp_kernels.commands.generation import (
    GenerateRequest,
    generate_here,
    generate_on_ranks,
    generate_on_this_rank,
    under_torchrun,
)

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "request_from", "run"]

NAME = "generate"
_BACKENDS = {"cpu": ("auto", "shm", "gloo"), "cuda": ("auto", "symm", "nccl", "gloo")}
SUMMARY = "generate text with a checkpoint on N ranks"
DESCRIPTION = """\
Load a Llama-family checkpoint (Hugging Face folder or GGUF file), each rank reading only its shard, and continue a
prompt. Starts its own ranks, or joins those of torchrun when run under it. Greedy unless --temperature is above 0."""
EXAMPLES = """\
examples:
  tp-kernels generate --model smollm2 --chat --prompt "Why is the sky blue?" --max-new-tokens 60
  tp-kernels generate --model ./Llama-3.2-1B --tp 2 --dtype bfloat16 --prompt-file question.txt
  tp-kernels generate --model model.gguf --tp 3 --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
  tp-kernels generate --model smollm2 --tp 2 --prompt "Hello" --json | jq .tokens_per_second
  tp-kernels generate --model ./Llama-3.1-8B --device cuda --dtype bfloat16 --quantize int8 --prompt "Once upon a time"
  torchrun --nproc-per-node 2 -m tp_kernels generate --model smollm2 --prompt "Hello"

With --device cuda every rank has a GPU of its own, or all share one where there are not enough; the times of such a
call include what happens once: compiling kernels, recording the CUDA graph of a step.
--json prints one object: prompt_ids, output_ids, text, tp, device, dtype, quantize, backend, decode_path, prefill_ms,
decode_ms_per_token, tokens_per_second, weight_bytes_per_rank. Everything else goes to stderr.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="Hugging Face folder, GGUF file, or 'smollm2' for the demo model"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file that holds the prompt; - is stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's own chat template")
    parser.add_argument("--tp", type=at_least(1), metavar="N", help="number of ranks (default 1; under torchrun: all)")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=128, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default float32"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--quantize", choices=["int8", "fp8"], help="weights of the linear layers (default: --dtype)")
    parser.add_argument(
        "--prefill-chunk",
        type=at_least(1),
        metavar="N",
        help="prompt tokens to run at once, to bound memory (default: all)",
    )
    parser.add_argument(
        "--temperature", type=number_above(0, inclusive=True), default=0.0, metavar="T", help="0 is greedy (default)"
    )
    parser.add_argument("--top-k", type=at_least(0), default=0, metavar="K", help="0 keeps all tokens (default)")
    parser.add_argument("--top-p", type=number_above(0, most=1), default=1.0, metavar="P", help="1 keeps all (default)")
    parser.add_argument("--seed", type=at_least(0), metavar="S", help="of the random draws; default: a fresh one")
    parser.add_argument(
        "--backend",
        choices=["auto", "shm", "gloo", "symm", "nccl"],
        default="auto",
        help="how ranks communicate: shm or gloo on cpu; symm, nccl or gloo on cuda (default auto)",
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="per rank (default: the cores divided evenly)")
    parser.add_argument(
        "--timeout",
        type=number_above(0),
        default=300.0,
        metavar="SECONDS",
        help="of a collective (default %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def request_from(args: argparse.Namespace) -> GenerateRequest:
    """Check the arguments that argparse cannot and build the request.

    Raises:
        UsageError: a file is missing, there is no GPU, or ``--tp`` does not fit the world or the model, or
            ``--backend`` the device.
    """
    from tp_kernels.launch import default_threads

    world_size = under_torchrun()
    if world_size is not None and args.tp not in (None, world_size):
        raise UsageError(f"--tp {args.tp} does not match the {world_size} ranks that torchrun started; leave --tp out")
    tp = world_size or args.tp or 1
    if args.seed is not None and args.seed >= 2**63:
        raise UsageError(f"--seed must be below 2**63, got {args.seed}")
    if args.backend not in _BACKENDS[args.device]:
        known = ", ".join(_BACKENDS[args.device])
        raise UsageError(f"--backend {args.backend} is not for --device {args.device}; expected one of {known}")
    model = resolve_model(args.model)
    check_tp(model, tp)
    if args.device == "cuda":
        _check_gpu()
    return GenerateRequest(
        model=str(model),
        prompt=_read_prompt(args),
        chat=args.chat,
        tp=tp,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        device=args.device,
        quantize=args.quantize,
        prefill_chunk=args.prefill_chunk,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        backend=args.backend,
        threads=args.threads or default_threads(tp),
        timeout=args.timeout,
        stream=not args.json,
        progress=sys.stderr.isatty(),
    )


def resolve_model(name: str) -> Path:
    """Path of a model: ``smollm2`` is the demo model, anything else a file or folder. UsageError when it is missing."""
    from tp_kernels.checkpoint.demo_model import smollm2_path

    if name == "smollm2" and not Path(name).exists():
        try:
            return smollm2_path()
        except FileNotFoundError as error:
            raise UsageError(str(error)) from None
    path = Path(name).expanduser()
    if not path.exists():
        raise UsageError(f"--model: no such file or folder: {name}")
    return path


def check_tp(model: Path, tp: int) -> None:
    """UsageError when the model cannot be split over ``tp`` ranks, CheckpointError when it cannot be opened.

    Found here before any rank is started, and before a missing tokenizer hides that the folder holds no weights.
    """
    from tp_kernels.checkpoint.loader import DistributedCheckpointLoader

    with DistributedCheckpointLoader(model, progress=False) as loader:
        heads = loader.config().get("num_attention_heads")
    if heads is not None and tp > heads:
        raise UsageError(f"--tp {tp} is more than the {heads} attention heads of {model.name}: each rank needs a head")


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no GPU here (torch.cuda.is_available() is False); use --device cpu")


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file == "-":
        return sys.stdin.read()
    try:
        return Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt-file {args.prompt_file}: {getattr(error, 'strerror', None) or error}") from None


def run(args: argparse.Namespace) -> int:
    """Generate; rank 0 prints the text as it comes, or the JSON object at the end."""
    request = request_from(args)
    with stdout_reserved() if args.json else contextlib.nullcontext(sys.stdout) as out:
        text_out = None if args.json else out
        if under_torchrun() is not None:
            result = _as_torchrun_rank(request, text_out)
        elif request.tp == 1:
            result = generate_here(request, out=text_out)
        else:
            result = generate_on_ranks(request)
        if result is None:
            return 0
        if args.json:
            print(json.dumps(result), file=out, flush=True)
        else:
            print(summary(result), file=sys.stderr)
    return 0


def _as_torchrun_rank(request: GenerateRequest, out: TextIO | None) -> dict[str, Any] | None:
    try:
        return generate_on_this_rank(request, distributed=True, out=out)
    except Exception as error:
        # torchrun prints the ranks' streams side by side, so the message must say whose it is.
        print(f"tp-kernels generate: rank {os.environ['RANK']}: {type(error).__name__}: {error}", file=sys.stderr)
        if isinstance(error, ValueError):
            raise
        sys.stderr.flush()
        os._exit(1)  # destructors of a broken process group may wait for ranks that are already gone


def summary(result: dict[str, Any]) -> str:
    """One line of figures about a result."""
    weights = f" with {result['quantize']} weights" if result["quantize"] else ""
    path = f" (decode: {result['decode_path']})" if result["decode_path"] else ""
    once = ", compiling and recording included" if result["device"] == "cuda" else ""
    memory = "/".join(f"{size / 2**20:.0f}" for size in result["weight_bytes_per_rank"])
    return (
        f"[{len(result['prompt_ids'])} + {len(result['output_ids'])} tokens, tp={result['tp']} {result['backend']} "
        f"{result['dtype']}{weights} on {result['device']}: prefill {result['prefill_ms']:.0f} ms, "
        f"{result['decode_ms_per_token']:.1f} ms/token, {result['tokens_per_second']:.1f} tokens/s{once}{path}, "
        f"{memory} MiB of weights per rank]"
    )
