"""``tp-kernels plan``: what a model would need and take on N GPUs, predicted without one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tp_kernels.commands.common import CommandFailed, UsageError, at_least, number_above
from tp_kernels.commands.generate import resolve_model

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "resolve_config", "run"]

NAME = "plan"
SUMMARY = "predict memory, times and speedup of a model on 1 to N GPUs"
DESCRIPTION = """\
Predict a model on 1 to 8 (or N) GPUs, without running it: memory of each rank and the batch that fits, roofline times
of prefill and decode, communication, speedup; beside them what `tp-kernels bench model` measured, where there is a CSV
of it. Every rate is printed with its source. Needs no GPU and reads no weights."""
EXAMPLES = """\
examples:
  tp-kernels plan --model llama3-8b --tp 4
  tp-kernels plan --model ./Qwen3-8B --tp 2 --gpu l40s --batch 16 --quantize fp8
  tp-kernels plan --model llama3-70b --tp 8 --gpu h200 --csv plan.csv --plot plan.png
  tp-kernels plan --model llama3-8b --measured benchmarks/results/nvidia-h100-80gb-hbm3/model.csv
  tp-kernels plan --model config.json --gpu a100-80g --bandwidth 1.7 --json | jq '.rows[3].decode.total'

--json prints one object; times in seconds, sizes in bytes: kind ("prediction"), model, config, machine, link, workload,
rows (one for each number of ranks), left_out, assumptions, measured.
"""
_RANKS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    count = at_least(1)
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH|NAME",
        help="a Hugging Face folder, a config.json, a GGUF file, or a model that the benchmarks know (llama3-8b, ...)",
    )
    parser.add_argument("--tp", type=count, metavar="N", help="also predict N ranks (1 to 8 always are)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="default %(default)s; an unknown one lists all")
    parser.add_argument("--link", default="auto", metavar="NAME", help="default: the GPU's usual; nvlink, pcie, ...")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default %(default)s")
    parser.add_argument("--quantize", choices=("none", "int8", "fp8"), default="none", help="weights (default none)")
    parser.add_argument("--batch", type=count, default=1, metavar="B", help="rows (default 1)")
    parser.add_argument("--prompt", type=count, default=4096, metavar="S", help="tokens of a prompt (default 4096)")
    parser.add_argument(
        "--context", type=at_least(0), default=1024, metavar="C", help="cached at decode (default 1024)"
    )
    parser.add_argument(
        "--max-len", type=count, metavar="L", help="tokens a row can have (default: what the above need)"
    )
    parser.add_argument(
        "--logits", choices=("last", "all"), default="last", help="of a prompt: its last token's (default), or all"
    )
    given = parser.add_argument_group("figures to use instead of the GPU's own")
    given.add_argument("--bandwidth", type=number_above(0), metavar="TB/S", help="of memory, as kernels reach it")
    given.add_argument("--tflops", type=number_above(0), metavar="TFLOP/S", help="of matrix products, as reached")
    given.add_argument("--memory", type=number_above(0), metavar="GB", help="size of memory")
    parser.add_argument(
        "--measured",
        nargs="+",
        metavar="FILE",
        help="CSVs of `bench model` (default: this GPU's model.csv and model_*.csv under benchmarks/results, if any)",
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table")
    parser.add_argument("--plot", metavar="FILE", help="write a plot (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Predict and print.

    Raises:
        UsageError: there is no such model.
        ValueError: an unknown GPU or link, or sizes that do not fit each other or the ranks.
        CommandFailed: a plot is asked for and matplotlib is missing.
    """
    from tp_kernels import planning
    from tp_kernels.planning import files, text

    gpu = planning.machine(args.gpu).with_given(bandwidth=args.bandwidth, tflops=args.tflops, memory=args.memory)
    workload = planning.Workload(
        batch=args.batch,
        prompt=args.prompt,
        context=args.context,
        max_len=args.max_len,
        dtype=args.dtype,
        quantize=None if args.quantize == "none" else args.quantize,
        all_logits=args.logits == "all",
    )
    link = planning.link(args.link, gpu.link)
    name, config = resolve_config(args.model)
    sizes = sorted({*range(1, _RANKS + 1), args.tp or 1})
    made = planning.plan(name, config, gpu, link, workload, sizes)
    if args.tp in made.left_out:
        raise UsageError(f"--tp {args.tp}: {made.left_out[args.tp]}")
    sources = args.measured or planning.find_measured(gpu)
    compared = [pair for source in sources for pair in planning.compare(made, planning.read_measured(source))]
    if args.csv:
        files.write_csv(args.csv, made)
    if args.plot:
        try:
            files.plot(args.plot, made)
        except ModuleNotFoundError as error:
            raise CommandFailed(str(error)) from None
    if args.json:
        measured = [comparison.to_dict() for comparison in compared]
        print(json.dumps({**made.to_dict(), "assumptions": text.assumptions(made), "measured": measured}))
        return 0
    print(text.describe(made, args.tp))
    if sources:
        print("\n" + text.comparison_lines(compared, ", ".join(map(str, sources))), end="")
    return 0


def resolve_config(name: str) -> tuple[str, Any]:
    """(short name, ``ModelConfig``) of a model that the benchmarks know, or of a file or folder.

    Raises:
        UsageError: there is no such model, or its file cannot be read.
        ValueError: the configuration is of a kind that is not supported.
    """
    from tp_kernels.commands.named_models import config_of
    from tp_kernels.models.config import ModelConfig
    from tp_kernels.testing.op_bench.shapes import MODELS

    if name in MODELS and not Path(name).exists():
        return name, config_of(name)
    path = resolve_model(name) if name == "smollm2" else Path(name).expanduser()
    if not path.exists():
        known = ", ".join([*MODELS, "smollm2"])
        raise UsageError(f"--model: no such file or folder: {name}; models known by name: {known}")
    whole = path.resolve()
    if whole.name == "config.json":
        whole = whole.parent
    return whole.name if whole.is_dir() else whole.stem, ModelConfig.from_hf(_config(path))


def _config(path: Path) -> Mapping[str, Any]:
    """The content of a ``config.json``, of the one in a folder, or what a GGUF file says in its place."""
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.exists():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--model: {file} is no readable JSON: {error}") from None
    if path.suffix != ".gguf":
        raise UsageError(f"--model: expected a folder with config.json, a .json or a .gguf file, got {path}")
    from tp_kernels.checkpoint.gguf_reader import GGUFSource

    source = GGUFSource(path)
    try:
        return source.config()
    finally:
        source.close()
