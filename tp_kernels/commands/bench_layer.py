"""A whole decoder layer over several ranks, against the same ranks with communication switched off.

The engine behind ``tp-kernels bench layer``. It starts its own ranks (sharing one GPU if there are not enough), or runs
as the ranks of ``tp-kernels launch --nproc 4 --one-gpu --module tp_kernels.commands.bench_layer``. What is run is a few
layers of a model's shapes and the norm after the last, as the models call them: ``prefill`` of one prompt without a
cache, ``prefill_cache`` into an empty one, ``decode`` of one token after ``--context`` others. In turns in one run,
each a CUDA graph, times divided by the number of layers:

- ``off``: sums over the ranks do nothing. The bound, and what ``over_off`` is the ratio to.
- ``fused``: peer memory, all-reduce + residual + RMSNorm in one kernel, as layers do by themselves.
- ``unfused``: peer memory, all-reduce and then the norm.
- ``nccl``: as layers do by themselves over NCCL.
- ``shm`` (or ``gloo``): in their place on CPU ranks (``--device cpu``), to try the benchmark out, uncaptured.

``way`` says how each came to sum: "chunked" or "fused" beside the matmul, by "kernel" with the norm, or "apart".

Before it is timed, each one's result is compared with that of the same layers on one rank in fp32: it may err at most
twice as much as one rank does in ``--dtype`` (``wrong``: ranks on which it errs more). Passes of few tokens are
compared several times, because the largest of few errors is a matter of luck. Times are medians over the rounds of the
slowest rank, counted from where all ranks have met on the GPU.

Ranks that share a GPU share its memory, power and L2, and NCCL talks over sockets there: such figures compare paths,
and say nothing about linked GPUs. Nor are ranks kept in step while communication is off, so that one's matmuls may meet
another's attention.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

from tp_kernels import one_gpu
from tp_kernels.testing.bench import Timing, interleaved, run_command_line
from tp_kernels.testing.rank_bench import captured, cases_in_time, keep_rows, measure_on_ranks, time_graphs

__all__ = ["Case", "Options", "add_arguments", "cases", "layer_rows", "main", "measure", "run"]

WHAT = ("prefill", "prefill_cache", "decode")
_START_S = 120.0
_THETA, _EPS = 500000.0, 1e-5
# Tokens that a cache has room for come in whole pages of so many, as they would in a server.
_PAGE = 256
# Compared at the least, in one or several passes.
_CHECKED_TOKENS, _CHECKED_ELEMENTS = 8, 4096


@dataclass(frozen=True)
class Options:
    """What is measured; the arguments of the command line."""

    model: str = "llama3-8b"
    what: Sequence[str] = WHAT
    tokens: int = 4096
    context: Sequence[int] = (1024,)
    layers: int = 4
    dtype: str = "bfloat16"
    rounds: int = 10
    nccl: bool = True
    device: str = "cuda"
    minutes: float = 30.0
    csv: str | None = None


class Case(NamedTuple):
    """One pass: new tokens, those in the cache before them (None: without a cache), passes in a graph."""

    what: str
    tokens: int
    context: int | None
    calls: int

    def __str__(self) -> str:
        return f"{self.what} of {self.tokens}" + (f" after {self.context}" if self.context else "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    from tp_kernels.testing.op_bench.case import MODELS

    default = Options()
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start, at least 2 (default %(default)s)")
    parser.add_argument("--model", choices=MODELS, default=default.model, help="shapes (default %(default)s)")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=default.what, help="default: all")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="of the prompt (default %(default)s)")
    parser.add_argument(
        "--context", type=int, nargs="+", default=default.context, metavar="N", help="cached at decode (default 1024)"
    )
    parser.add_argument("--layers", type=int, default=default.layers, help="of a pass (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default=default.dtype)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timed rounds (default %(default)s)")
    parser.add_argument("--no-nccl", action="store_true", help="leave NCCL out")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default=default.device, help="cpu tries the benchmark out without a GPU"
    )
    parser.add_argument(
        "--minutes", type=float, default=default.minutes, metavar="M", help="start no case after (default %(default)s)"
    )
    parser.add_argument("--csv", metavar="FILE", help="write all figures, with machine, versions and date")


def _options(args: argparse.Namespace) -> Options:
    if args.ranks < 2 or min(args.tokens, *args.context, args.layers, args.rounds) < 1:
        raise ValueError("--ranks must be at least 2, --tokens, --context, --layers and --rounds at least 1")
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {args.minutes}")
    taken = ("model", "what", "tokens", "context", "layers", "dtype", "rounds", "device", "minutes")
    csv = os.path.abspath(args.csv) if args.csv else None
    return Options(nccl=not args.no_nccl, csv=csv, **{name: getattr(args, name) for name in taken})


def run(args: argparse.Namespace) -> int:
    """Run the benchmark with parsed options; 0, or 1 if a result was wrong.

    Raises:
        ValueError: options that do not fit, or that leave nothing to measure.
    """
    options = _options(args)
    instead = "`--device cpu` tries the benchmark out on CPU ranks"
    rows = measure_on_ranks(measure, options, ranks=args.ranks, device=options.device, no_gpu=instead)
    if rows is None:
        return 0
    if not rows:
        raise ValueError(f"nothing was measured: --minutes {options.minutes:g} were over")
    return 1 if any(row["wrong"] for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    """Command line of ``benchmarks/bench_layer.py``, and of the ranks that ``tp-kernels launch`` starts."""
    return run_command_line(__doc__, add_arguments, run, argv)


# Pure ----------------------------------------------------------------------------------------------------------------


def cases(options: Options) -> list[Case]:
    """The passes that the options ask for, in order; graphs hold more of the short ones."""
    found = []
    for what in WHAT:
        if what not in options.what:
            continue
        if what == "decode":
            found += [Case(what, 1, context, 10) for context in options.context]
        else:
            found.append(Case(what, options.tokens, 0 if what == "prefill_cache" else None, 2))
    return found


def layer_rows(
    common: Mapping[str, Any],
    timed: Mapping[str, Timing],
    wrong: Mapping[str, int],
    layers: int,
    ways: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One row for each path: microseconds of a layer, their ratio to ``off``, and how it sums (``sums_of``)."""
    return [
        {
            **common,
            "path": path,
            "way": (ways or {}).get(path, ""),
            "time_us": _us(timing.median / layers),
            "q20_us": _us(timing.q20 / layers),
            "q80_us": _us(timing.q80 / layers),
            "over_off": round(timing.median / timed["off"].median, 3),
            "wrong": wrong.get(path, 0),
        }
        for path, timing in timed.items()
    ]


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


# On every rank -------------------------------------------------------------------------------------------------------


def measure(group, options: Options) -> list[dict[str, Any]]:
    """All figures, the same on all ranks; the first rank prints them as they come.

    Args:
        group: of the ranks. On "cpu" it is itself what is measured.
        options: what to measure.
    """
    if options.device == "cpu":
        return _measure(group, {"off": _switched_off(group), group.backend: group}, None, options)
    from tp_kernels.testing.nccl_group import nccl_group
    from tp_kernels.testing.symmetric_ranks import make_symmetric, symmetric_group

    symm = make_symmetric(group, "bench_layer", timeout=60.0)
    nccl = None
    try:
        separate = copy.copy(symm)  # the same memory and counts
        separate.fused_norm = False
        groups = {
            "off": _switched_off(group, "cuda"),
            "fused": symmetric_group(symm, group),
            "unfused": symmetric_group(separate, group),
        }
        if options.nccl:
            groups["nccl"] = nccl = nccl_group(group, timeout=_START_S)
        rows = _measure(group, groups, symm, options)
        symm.check()
        return rows
    finally:
        if nccl is not None:
            nccl.close()
        symm.close()


def _switched_off(group, device_type: str = "cpu"):
    """``group`` without its communication."""
    from tp_kernels.testing.switched_off import switched_off

    return switched_off(
        group.rank, group.world_size, device_type=device_type, ranks=group.ranks, process_group=group.process_group
    )


def _measure(group, groups: Mapping[str, Any], symm, options: Options) -> list[dict[str, Any]]:
    import torch

    from tp_kernels.layers import RMSNorm

    started, dtype = time.monotonic(), getattr(torch, options.dtype)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        layers = [make_layer(options, groups["off"], dtype, number) for number in range(options.layers)]
        stacks = {
            name: layers if name == "off" else [_sharing(layer, options, of) for layer in layers]
            for name, of in groups.items()
        }
        norm = RMSNorm(_shapes(options).hidden, _EPS, device=options.device, dtype=dtype)
        for case in cases_in_time(group, cases(options), options.minutes, started):
            caches = [make_cache(options, case, layer, dtype, number) for number, layer in enumerate(layers)]
            passes = {name: partial(forward, stack, norm, caches=caches) for name, stack in stacks.items()}
            wrong = _check(group, passes, options, case, norm)
            x = _embedded(options, case, 0)
            timed = _time(group, symm, {name: partial(of_input, x) for name, of_input in passes.items()}, case, options)
            ways = {name: sums_of(stack[0], x) for name, stack in stacks.items()}
            rows += layer_rows(_common(group, options, case), timed, wrong, options.layers, ways)
            keep_rows(group, options.csv, rows)
            if group.rank == 0:
                _print(rows[-len(timed) :])
    return rows


def forward(layers: Sequence[Any], norm: Any, x: Any, caches: Sequence[Any]):
    """The layers and the norm that follows, as in ``ParallelCausalLM``; [1, S, hidden]."""
    residual = None
    if all(layer.fuses_norms(x) for layer in layers):
        for layer, cache in zip(layers, caches, strict=True):
            x, residual = layer(x, residual, None, cache, keep_partial=True)
        return x.add_norm(norm, residual, gather_sum=False)[0]
    for layer, cache in zip(layers, caches, strict=True):
        x, residual = layer(x, residual, None, cache)
    return norm(x, residual)[0]


def sums_of(layer: Any, x: Any) -> str:
    """How a layer in ``forward`` of ``x`` sums over the ranks; projections that differ are named.

    "chunked" or "fused": beside the matmul; "kernel": after it, with the norm in one kernel; "apart": one by one.
    """
    joined, ways = layer.fuses_norms(x), {}
    for name, projection in (("o_proj", layer.self_attn.o_proj), ("down_proj", layer.mlp.down_proj)):
        if joined and projection.norm_path(x) == "kernel":
            ways[name] = "kernel"
        else:
            overlap = projection.sum_path(x)
            ways[name] = "apart" if overlap == "none" else overlap
    first, second = ways.values()
    return first if first == second else ", ".join(f"{name} {way}" for name, way in ways.items())


def _shapes(options: Options):
    from tp_kernels.testing.op_bench.case import MODELS

    return MODELS[options.model]


@cache
def _rope(head_dim: int):
    """The one that all layers share."""
    from tp_kernels.layers import RotaryEmbedding

    return RotaryEmbedding(head_dim, _THETA)


def _embedded(options: Options, case: Case, sample: int):
    """What goes into the first layer, [1, tokens, hidden], the same on all ranks."""
    import torch

    generator = torch.Generator(options.device).manual_seed(2000 + sample)
    numbers = torch.randn(1, case.tokens, _shapes(options).hidden, generator=generator, device=options.device)
    return numbers.to(getattr(torch, options.dtype))


def _empty_layer(options: Options, group, dtype, device):
    from tp_kernels.layers import ParallelDecoderLayer

    shapes = _shapes(options)
    return ParallelDecoderLayer(
        shapes.hidden,
        shapes.intermediate,
        shapes.heads,
        shapes.kv_heads,
        shapes.head_dim,
        norm_eps=_EPS,
        qk_norm=shapes.qk_norm,
        rope=_rope(shapes.head_dim),
        group=group,
        device=device,
        dtype=dtype,
    ).eval()


def make_layer(options: Options, group, dtype, number: int):
    """This rank's part of layer ``number``: the same random weights for every group, exact in the benchmark's dtype."""
    import torch

    layer = _empty_layer(options, group, dtype, options.device)
    generator = torch.Generator(options.device).manual_seed(1 + number)

    def weight(outputs: int, inputs: int):
        numbers = torch.randn(outputs, inputs, generator=generator, device=options.device) / inputs**0.5
        return numbers.to(getattr(torch, options.dtype)).to(dtype)

    shapes = _shapes(options)
    hidden, q, kv = shapes.hidden, shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    attention, mlp = layer.self_attn, layer.mlp
    attention.qkv_proj.load_full_weight([weight(q, hidden), weight(kv, hidden), weight(kv, hidden)])
    attention.o_proj.load_full_weight(weight(hidden, q))
    mlp.gate_up_proj.load_full_weight([weight(shapes.intermediate, hidden), weight(shapes.intermediate, hidden)])
    mlp.down_proj.load_full_weight(weight(hidden, shapes.intermediate))
    return layer


def _sharing(layer, options: Options, group):
    """A layer of ``group`` on the parameters of ``layer``."""
    twin = _empty_layer(options, group, layer.input_layernorm.weight.dtype, "meta")
    for to, source in zip(twin.modules(), layer.modules(), strict=True):
        for name, parameter in source.named_parameters(recurse=False):
            setattr(to, name, parameter)
    return twin


def make_cache(options: Options, case: Case, layer, dtype, number: int):
    """The cache of layer ``number`` before the pass, this rank's heads of it; None for a pass without one."""
    import torch

    from tp_kernels.layers import LayerKVCache

    if case.context is None:
        return None
    shapes, heads = _shapes(options), layer.self_attn.qkv_proj.head_shard.kv
    room = -(-(case.context + case.tokens) // _PAGE) * _PAGE
    generator = torch.Generator(options.device).manual_seed(1000 + number)
    numbers = torch.randn(2, shapes.kv_heads, room, shapes.head_dim, generator=generator, device=options.device)
    k, v = numbers[:, heads.start : heads.stop].to(getattr(torch, options.dtype)).to(dtype).unsqueeze(1).unbind(0)
    lengths = torch.tensor([case.context], device=options.device)
    return LayerKVCache(k, v, lengths, [case.context])


def _check(group, passes: Mapping[str, Callable], options: Options, case: Case, norm) -> dict[str, int]:
    """On how many ranks each path's results are further from one rank's in fp32 than they may be; none for "off"."""
    import torch

    from tp_kernels.testing.numeric import assert_close_to_reference

    dtype, hidden = norm.weight.dtype, norm.hidden_size
    count = -(-max(_CHECKED_TOKENS, _CHECKED_ELEMENTS // hidden) // case.tokens)
    inputs = [_embedded(options, case, sample) for sample in range(count)]
    reference, same_dtype = (_alone(options, case, norm, inputs, of) for of in (torch.float32, dtype))
    wrong = {}
    for name, of_input in passes.items():
        if name == "off":
            continue
        actual = torch.cat([of_input(x).clone() for x in inputs])  # results may lie in memory that is used again
        message = ""
        try:
            assert_close_to_reference(actual, same_dtype, reference, name=f"{case.what}, {name}, rank {group.rank}")
        except AssertionError as error:
            message = str(error)
            print(f"# WRONG: {message}", flush=True)
        wrong[name] = int(group.all_reduce(torch.tensor([1 if message else 0])))
    return wrong


def _alone(options: Options, case: Case, norm, inputs: Sequence[Any], dtype):
    """What one rank makes of the same passes in ``dtype``; layer by layer, because each is whole here."""
    import torch

    from tp_kernels.comm import LocalCommunicator, TPGroup
    from tp_kernels.layers import RMSNorm

    group = TPGroup(LocalCommunicator(), device_type=options.device)
    pairs: list[tuple[Any, Any]] = [(x.to(dtype), None) for x in inputs]
    for number in range(options.layers):
        layer = make_layer(options, group, dtype, number)
        cache = make_cache(options, case, layer, dtype, number)
        pairs = [layer(x, residual, None, cache) for x, residual in pairs]
    norm = RMSNorm(norm.hidden_size, norm.eps, device=options.device, dtype=dtype)
    return torch.cat([norm(x, residual)[0] for x, residual in pairs])


def _time(group, symm, ways: Mapping[str, Callable], case: Case, options: Options) -> dict[str, Timing]:
    """Seconds of a pass by way, each round as long as its slowest rank."""
    import torch

    if options.device == "cuda":
        graphs = {}
        for name, way in ways.items():
            group.barrier()
            graphs[name] = captured(way, case.calls)
        try:
            return time_graphs(group, symm, graphs, case.calls, options.rounds)
        finally:
            torch.cuda.synchronize()
    seconds = interleaved(ways, rounds=options.rounds, warmup=1, before=lambda name: group.barrier())
    slowest = group.all_reduce(torch.tensor([seconds[name] for name in ways], dtype=torch.float64), "max")
    return {name: Timing.of(column) for name, column in zip(ways, slowest.tolist(), strict=True)}


def _common(group, options: Options, case: Case) -> dict[str, Any]:
    on_gpu = options.device == "cuda"
    return {
        "what": case.what,
        "model": options.model,
        "ranks": group.world_size,
        "ranks_per_gpu": one_gpu.ranks_on_this_gpu() if on_gpu else 0,
        "mps": on_gpu and one_gpu.has_mps(),
        "dtype": options.dtype,
        "layers": options.layers,
        "tokens": case.tokens,
        "context": "" if case.context is None else case.context,
        "timed": "graph" if on_gpu else "host",
    }


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    first = rows[0]
    of = f"{first['what']} {first['tokens']}" + (f" after {first['context']}" if first["context"] != "" else "")
    text = "  ".join(f"{row['path']} {row['time_us']:.1f} ({row['over_off']:.3f}, {row['way']})" for row in rows)
    print(f"{of:>24}  {text}  us a layer (over off, how it sums)", flush=True)


if __name__ == "__main__":
    from tp_kernels.commands import bench_layer  # under its own name, so that what ranks are sent can be unpickled

    sys.exit(bench_layer.main())
