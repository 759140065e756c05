"""A whole model with random weights of real shapes: prefill and decode, against transformers and plain PyTorch.

The engine behind ``tp-kernels bench model``. With ``--tp 1`` it runs in this process; ``--shard 4`` then measures one
shard of four with communication that does nothing, the bound of what four GPUs can reach. With more ranks it starts
them (sharing one GPU if there are not enough), or runs as the ranks of
``tp-kernels launch --nproc 4 --one-gpu --module tp_kernels.commands.bench_model``. Interleaved in one run:

- ``tp_kernels``: the decode engine, also with ``--quantize int8 fp8``.
- ``torch eager``, ``torch graph``, ``torch graph one length``: the model written by hand in plain PyTorch, on the same
  weights; the last is a graph that is good for one length of the cache only, a bound and not a way to decode.
- ``transformers``: Hugging Face's model class on the same weights, eager, as its ``generate`` calls it.

With several ranks ours are called after what adds over them: ``off`` (nothing does: the bound that ``over_off`` is the
ratio to), ``symm`` (peer memory), ``nccl``; ``shm`` in their place on CPU ranks. The rivals are then the same model by
hand, cut like ours: ``torch symm graph`` and so on with ``torch.ops.symm_mem``, ``torch nccl graph`` with
``torch.distributed`` (``torch gloo`` on CPU ranks); and ``transformers``, cut by itself as ``tp_plan="auto"`` does,
which adds by NCCL. What cannot take part is listed, with the reason.

Prompts of different lengths (``--mixed``) are one packed pass for us; rivals pad them to the longest, behind the prompt
(by hand) or in front of it (transformers). ``torch.compile`` is no rival: it takes minutes for each shape, and made
decoding slower than the graph alone (8.92 against 7.33 ms for Llama-3-8B on one H100).

First every contender continues short prompts with the calls that are timed, through all layers, and an fp32 reference
judges the tokens (``testing/model_bench/check.py``); kernels of other sizes than these are the tests' business. Where
communication is switched off there is nothing to judge.

Every contender chooses the most likely token on the device and feeds it back. Times are medians over the rounds of
turns of ``--steps`` decode steps, or of one prefill, between events: gaps in which the GPU waits for the host count,
and so does what the engine does with a prompt before its first kernel (it takes lists, rivals find ids on the device).
A step reads many times more than the L2 holds, so nothing is rotated. ``% of roof`` is against a device copy and cuBLAS
measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tp_kernels import one_gpu
from tp_kernels.commands.generation import under_torchrun
from tp_kernels.testing.bench import run_command_line

__all__ = ["Options", "add_arguments", "main", "measure", "run"]

WHAT = ("prefill", "decode", "mixed")
FORMATS = ("none", "int8", "fp8")
_START_S = 120.0


@dataclass(frozen=True)
class Options:
    """What is measured; the arguments of the command line."""

    model: str = "llama3-8b"
    tp: int = 1
    shard: int = 1
    what: Sequence[str] = WHAT
    batch: Sequence[int] = (1, 16, 64)
    prompt: Sequence[int] = (4096,)
    prefill_batch: Sequence[int] = (1,)
    mixed: Sequence[int] = (512, 1024, 2560)
    context: Sequence[int] = (1024,)
    quantize: Sequence[str] = ("none",)
    dtype: str = "bfloat16"
    layers: int | None = None
    steps: int = 8
    rounds: int = 10
    transformers: bool = True
    nccl: bool = True
    device: str = "cuda"
    minutes: float = 30.0
    csv: str | None = None
    profile: str | None = None

    def cases(self) -> list[Any]:
        """What is measured, in order."""
        from tp_kernels.testing.model_bench.report import Case

        found = []
        if "prefill" in self.what:
            found += [Case("prefill", batch, tokens, 0) for tokens in self.prompt for batch in self.prefill_batch]
        if "mixed" in self.what:
            found.append(Case("mixed", len(self.mixed), max(self.mixed), 0, tuple(self.mixed)))
        if "decode" in self.what:
            found += [Case("decode", batch, 1, context) for context in self.context for batch in self.batch]
        return found

    def most_tokens(self) -> int:
        """Most tokens that any contender runs in one pass, padding included."""
        from tp_kernels.commands.bench_model_run import CHECK_BATCH, CHECK_TOKENS

        return max(CHECK_BATCH * CHECK_TOKENS, *(case.batch * case.tokens for case in self.cases()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    from tp_kernels.testing.op_bench.shapes import ARCHITECTURES

    default = Options()
    several = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--model", choices=ARCHITECTURES, default=default.model, help="shapes (default %(default)s)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks (default 1)")
    parser.add_argument(
        "--shard", type=int, default=1, metavar="S", help="with --tp 1: one shard of S, without communication"
    )
    parser.add_argument("--what", nargs="+", choices=WHAT, default=default.what, help="default: all")
    parser.add_argument("--batch", default=default.batch, help="rows of decode steps (default 1 16 64)", **several)
    parser.add_argument("--prompt", default=default.prompt, help="tokens of the prefill (default 4096)", **several)
    parser.add_argument(
        "--prefill-batch", default=default.prefill_batch, help="prompts of a prefill (default 1)", **several
    )
    parser.add_argument(
        "--mixed",
        default=default.mixed,
        help="lengths of prompts that are prefilled together (default 512 1024 2560)",
        **several,
    )
    parser.add_argument("--context", default=default.context, help="cached at decode (default 1024)", **several)
    parser.add_argument(
        "--quantize", nargs="+", choices=FORMATS, default=default.quantize, help="our weights (default: none)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=default.dtype)
    parser.add_argument("--layers", type=int, metavar="L", help="fewer layers than the model has")
    parser.add_argument("--steps", type=int, default=default.steps, help="decode steps a turn (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timed turns (default %(default)s)")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--no-nccl", action="store_true", help="leave NCCL out")
    parser.add_argument(
        "--minutes", type=float, default=default.minutes, metavar="M", help="start nothing after this (default 30)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default=default.device, help="cpu tries the benchmark out without a GPU"
    )
    parser.add_argument("--csv", metavar="FILE", help="write all figures, with machine, versions and date")
    parser.add_argument("--plot", metavar="FILE", help="write a picture")
    parser.add_argument(
        "--profile", metavar="FILE", help="with --tp 1: then profile our contenders, and write the time of each kernel"
    )


def _options(args: argparse.Namespace) -> Options:
    from tp_kernels.testing.op_bench.shapes import MODELS

    least = {"tp": 1, "shard": 1, "steps": 1, "rounds": 1, "layers": 1, "batch": 1, "prompt": 1, "context": 1}
    least |= {"prefill_batch": 1, "mixed": 1}
    for name, bound in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None and value < bound:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    if args.tp > 1 and args.shard > 1:
        raise ValueError(f"--shard measures a shard of several without them: expected --tp 1, got --tp {args.tp}")
    if args.tp > 1 and args.profile:
        raise ValueError(f"--profile looks at one process: expected --tp 1, got --tp {args.tp}")
    from tp_kernels.inference.engine import MAX_BATCH

    rows = {"--batch": max(args.batch), "--prefill-batch": max(args.prefill_batch), "--mixed": len(args.mixed)}
    for name, count in rows.items():
        if count > MAX_BATCH:
            raise ValueError(f"{name} must be at most {MAX_BATCH} rows, got {count}")
    started = under_torchrun()
    if started not in (None, args.tp):
        raise ValueError(f"--tp {args.tp} does not match the {started} ranks that were started")
    heads = MODELS[args.model].heads
    if max(args.tp, args.shard) > heads:
        raise ValueError(f"{max(args.tp, args.shard)} ranks cannot share the {heads} query heads of {args.model}")
    taken = ("model", "tp", "shard", "what", "batch", "prompt", "prefill_batch", "mixed", "context", "dtype", "layers")
    taken += ("steps", "rounds")
    return Options(
        quantize=tuple(dict.fromkeys(args.quantize)),
        transformers=not args.no_transformers,
        nccl=not args.no_nccl,
        device=args.device,
        minutes=args.minutes,
        csv=os.path.abspath(args.csv) if args.csv else None,
        profile=args.profile,
        **{name: getattr(args, name) for name in taken},
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark with parsed options; 0, or 1 if a contender of ours was wrong or failed.

    Raises:
        ValueError: options that do not fit, or a GPU is needed and there is none.
    """
    from tp_kernels.testing.model_bench.report import plot

    options = _options(args)
    instead = "`--device cpu --model tiny` tries the benchmark out without one"
    if options.tp == 1:
        import torch

        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"there is no GPU here; {instead}")
        rows = measure(None, options)
    else:
        from tp_kernels.testing.rank_bench import measure_on_ranks

        rows = measure_on_ranks(measure, options, ranks=options.tp, device=options.device, no_gpu=instead)
        if rows is None:
            return 0
    if not rows:
        print(f"nothing was measured: --minutes {options.minutes:g} were over")
        return 1
    if args.plot:
        try:
            plot(args.plot, rows)
        except Exception as error:  # the figures are what counts, and they are written
            print(f"no plot: {type(error).__name__}: {error}")
    bad = [row for row in rows if row["ours"] and row["verdict"] not in ("ok", "")]
    return 1 if any(not row["verdict"].startswith("left out") for row in bad) else 0


def main(argv: list[str] | None = None) -> int:
    """Command line of ``benchmarks/bench_model.py``, and of the ranks that ``tp-kernels launch`` starts."""
    return run_command_line(__doc__, add_arguments, run, argv)


# On every rank -------------------------------------------------------------------------------------------------------


def measure(group: Any, options: Options) -> list[dict[str, Any]]:
    """All figures, the same on all ranks; the first rank prints and writes them as they come.

    Args:
        group: of the ranks, None for one. On "cpu" it is itself what is measured.
        options: what to measure.
    """
    import torch

    from tp_kernels.comm import LocalCommunicator, TPGroup
    from tp_kernels.commands.bench_model_rivals import TorchWays
    from tp_kernels.commands.bench_model_run import Run
    from tp_kernels.testing.model_bench.sums import ProcessGroupSums
    from tp_kernels.testing.switched_off import switched_off

    with torch.inference_mode():
        if group is None:
            device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
            if options.shard > 1:
                alone = switched_off(0, options.shard, device_type=options.device, device=device)
            else:
                alone = TPGroup(LocalCommunicator(), device_type=options.device, device=device)
            return Run(options, {"tp_kernels": alone}, None, None, device).measure()
        off = switched_off(
            group.rank,
            group.world_size,
            device_type=options.device,
            ranks=group.ranks,
            process_group=group.process_group,
            device=group.device,
        )
        if options.device == "cpu":
            ways = TorchWays({"gloo": lambda: ProcessGroupSums(group.process_group)}, group.process_group)
            return Run(options, {"off": off, group.backend: group}, group, None, group.device, ways).measure()
        return _measure_on_gpus(group, off, options)


def _measure_on_gpus(group: Any, off: Any, options: Options) -> list[dict[str, Any]]:
    import torch
    import torch.distributed as dist

    from tp_kernels.commands.bench_model_run import Run
    from tp_kernels.testing.nccl_group import nccl_group
    from tp_kernels.testing.symmetric_ranks import make_symmetric, symmetric_group

    symm = make_symmetric(group, "bench_model", timeout=_START_S)
    nccl = theirs = None
    try:
        groups = {"off": off, "symm": symmetric_group(symm, group)}
        if options.nccl:
            groups["nccl"] = nccl = nccl_group(group, timeout=_START_S)
            theirs = dist.new_group(list(group.ranks), backend="nccl")
        ways = torch_ways(options, group.process_group, theirs, one_gpu.local_device())
        rows = Run(options, groups, group, symm, one_gpu.local_device(), ways).measure()
        symm.check()
        return rows
    finally:
        if nccl is not None:
            nccl.close()
        symm.close()
        if theirs is not None:
            torch.cuda.synchronize()
            dist.destroy_process_group(theirs)


def torch_ways(options: Options, process_group: Any, nccl: Any, device: Any) -> Any:
    """What torch has for sums over ranks with GPUs: a ``TorchWays``.

    Args:
        options: what will be measured.
        process_group: of the ranks, any backend: over it they show each other their memory.
        nccl: another one, of NCCL's; None to do without.
        device: of this rank.
    """
    import torch

    from tp_kernels.commands.bench_model_rivals import TorchWays
    from tp_kernels.inference.engine import MAX_BATCH
    from tp_kernels.testing.model_bench.sums import PeerSums, ProcessGroupSums
    from tp_kernels.testing.op_bench.shapes import MODELS

    dtype, sums, left_out = getattr(torch, options.dtype), {}, {}
    if dtype in PeerSums.DTYPES:
        elements = options.most_tokens() * MODELS[options.model].hidden
        offers = 2 * options.tp * MAX_BATCH  # of a logit and a token for each row
        sums["symm"] = partial(PeerSums, process_group, dtype, elements, offers, device)
    else:
        left_out["symm"] = f"torch.ops.symm_mem does not add {options.dtype}"
    if nccl is None:
        left_out["nccl"] = "--no-nccl"
    else:
        sums["nccl"] = partial(ProcessGroupSums, nccl)
    return TorchWays(sums, nccl, left_out)


if __name__ == "__main__":
    from tp_kernels.commands import bench_model  # under its own name, so that what ranks are sent can be unpickled

    sys.exit(bench_model.main())
