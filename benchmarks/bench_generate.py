"""Decode speed of ``generate`` on the CPU against ``transformers.generate``: one model, greedy, interleaved in one run.

    python benchmarks/bench_generate.py --new-tokens 48 --rounds 5

Every competitor continues the same prompt; their tokens are compared before any time is reported. A round lets each of
them generate once, in turns. A decode step is timed from one token to the next; reported are the median and the 20% and
80% quantiles over all steps of all rounds, and how close the weights alone come to a plain read of memory by the same
threads in the same rounds: at batch 1 every weight is read once per token. The last line sets the gain of a second rank
beside the gain of a second core in that plain read, which bounds it. ``--threads`` is a total: tp=2 with a total of two
runs two ranks of one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tp_kernels import ops
from tp_kernels._native import native
from tp_kernels.testing.bench import Timing, write_csv
from tp_kernels.testing.machine import machine_slug
from tp_kernels.testing.rank_pool import RankPool

PROMPT = "The history of computing began long before the first electronic machine. In the nineteenth century,"
TIMEOUT = 600.0

# In the ranks' processes: what a first call loaded and later calls use.
_loaded: dict[str, Any] = {}


def ours(group, path: str, dtype: str, threads: int, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """One greedy generation of this library; runs on every rank."""
    from tp_kernels.checkpoint import load_model
    from tp_kernels.inference.generation import generate

    torch.set_num_threads(threads)
    if "model" not in _loaded:
        _loaded["model"] = load_model(path, group=group, dtype=getattr(torch, dtype), progress=False)
    model = _loaded["model"]
    result = generate(model, [prompt], max_new_tokens=new_tokens, stop_ids=())
    streamed = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    if not model.config.tie_word_embeddings:
        del streamed[model.model.embed_tokens.weight.data_ptr()]  # one row a token
    return {
        "tokens": result.output_ids[0],
        "prefill": result.prefill_ms / 1e3,
        "steps": [step / 1e3 for step in result.step_ms],
        "weight_bytes": sum(streamed.values()),
        "path": f"{group.backend}, {result.decode_path}",
    }


def theirs(group, path: str, dtype: str, threads: int, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """One greedy generation of transformers."""
    import transformers

    torch.set_num_threads(threads)
    if "model" not in _loaded:
        file = Path(path)
        source = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
        folder = file.parent if source else file
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **source)
        _loaded["model"] = model.eval()

    class Clock(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.stamps = []

        def put(self, value):
            self.stamps.append(time.perf_counter())

        def end(self):
            pass

    clock, ids = Clock(), torch.tensor([prompt])
    started = time.perf_counter()
    out = _loaded["model"].generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    first, *rest = clock.stamps[1:]  # the first call hands over the prompt
    steps = [later - earlier for earlier, later in zip([first, *rest], rest, strict=False)]
    return {"tokens": out[0, len(prompt) :].tolist(), "prefill": first - started, "steps": steps, "path": "modules"}


def read_seconds(group, threads: int) -> float:
    """Seconds a byte that this rank's threads take to read memory, while the other ranks read as well."""
    torch.set_num_threads(threads)
    if "memory" not in _loaded:
        _loaded["memory"] = torch.ones(64 << 20)
        ops.advise_huge(_loaded["memory"])
    memory, seconds = _loaded["memory"], []
    for _ in range(3):
        group.barrier()
        started = time.perf_counter()
        native.cpu_read_floats(memory.data_ptr(), memory.numel(), threads)
        seconds.append(time.perf_counter() - started)
    return Timing.of(seconds).median / memory.nbytes


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every competitor; returns one CSV row for each."""
    from tp_kernels.checkpoint.demo_model import smollm2_path
    from tp_kernels.inference.tokenizer import load_tokenizer

    path = str(args.model or smollm2_path())
    prompt = load_tokenizer(path).encode(args.prompt)
    # (name, pool, function, total threads); the ranks of a pool share the threads.
    pools = {"one": RankPool(1), "two": RankPool(2), "transformers": RankPool(1)}
    competitors: dict[str, tuple[str, Any, int]] = {}
    for threads in args.threads:
        competitors[f"transformers, {threads} thread(s)"] = ("transformers", theirs, threads)
        competitors[f"tp_kernels tp=1, {threads} thread(s)"] = ("one", ours, threads)
        if threads % 2 == 0:
            competitors[f"tp_kernels tp=2, {threads // 2} thread(s) each"] = ("two", ours, threads)
    try:
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in competitors}
        reads: dict[tuple[str, int], list[float]] = {("one", 1): [], ("one", 2): [], ("two", 2): []}
        for turn in range(args.rounds + 1):  # the first turn loads and warms up
            for name, (pool, function, threads) in competitors.items():
                size = pools[pool].world_size
                call = (path, args.dtype, threads // size, prompt, args.new_tokens)
                ranks = pools[pool].run(function, *call, timeout=TIMEOUT)
                if any(rank["tokens"] != ranks[0]["tokens"] for rank in ranks):
                    raise SystemExit(f"{name}: the ranks disagree")
                ranks[0]["weight_bytes"] = sum(rank.get("weight_bytes", 0) for rank in ranks)
                if turn:
                    results[name].append(ranks[0])
            for (pool, threads), values in reads.items():
                ranks = pools[pool].run(read_seconds, threads // pools[pool].world_size, timeout=TIMEOUT)
                if turn:
                    values.append(1 / sum(1 / seconds for seconds in ranks))
            if turn == 0:
                print("loaded; timing", file=sys.stderr)
    finally:
        for pool in pools.values():
            pool.close()

    sizes = {name: pool.world_size for name, pool in pools.items()}
    return summarise(args, Path(path).name, len(prompt), competitors, sizes, results, reads)


def summarise(args, model, prompt_tokens, competitors, sizes, results, reads) -> list[dict[str, Any]]:
    """CSV rows from the runs of every competitor."""
    reference = next(iter(results.values()))[0]["tokens"]
    weight_bytes = max(run["weight_bytes"] for runs in results.values() for run in runs)
    steps = {name: Timing.of(second for run in runs for second in run["steps"]) for name, runs in results.items()}
    bandwidth = {key: 1 / Timing.of(values).median for key, values in reads.items()}
    rows = []
    for name, (pool, _, threads) in competitors.items():
        runs, step = results[name], steps[name]
        rows.append(
            {
                "competitor": name,
                "tp": sizes[pool],
                "threads_total": threads,
                "dtype": args.dtype,
                "prompt_tokens": prompt_tokens,
                "new_tokens": args.new_tokens,
                "rounds": args.rounds,
                "prefill_ms": round(1e3 * Timing.of(run["prefill"] for run in runs).median, 2),
                "decode_ms": round(1e3 * step.median, 3),
                "decode_ms_q20": round(1e3 * step.q20, 3),
                "decode_ms_q80": round(1e3 * step.q80, 3),
                "tokens_per_second": round(1 / step.median, 2),
                "speedup_over_transformers": round(steps[f"transformers, {threads} thread(s)"].median / step.median, 2),
                "weight_gb_per_s": round(weight_bytes / step.median / 1e9, 2),
                "read_gb_per_s": round(bandwidth["two" if sizes[pool] == 2 else "one", threads] / 1e9, 2),
                "percent_of_read": round(
                    100 * weight_bytes / step.median / bandwidth["two" if sizes[pool] == 2 else "one", threads], 1
                ),
                "tokens_equal": all(run["tokens"] == reference for run in runs),
                "path": runs[0]["path"],
                "model": model,
            }
        )
    return rows


def main() -> None:
    """Parse the command line, run, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder or GGUF file (default: the demo model)")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="total CPU threads")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/MACHINE/generate.csv")
    args = parser.parse_args()
    rows = run(args)
    out = args.csv or Path(__file__).parent / "results" / machine_slug() / "generate.csv"
    write_csv(out, rows)
    print(f"{'':34}{'ms/token':>10}{'q20':>9}{'q80':>9}{'tok/s':>8}{'vs HF':>8}{'GB/s':>7}{'% read':>8}  tokens")
    for row in rows:
        print(
            f"{row['competitor']:34}{row['decode_ms']:>10.2f}{row['decode_ms_q20']:>9.2f}{row['decode_ms_q80']:>9.2f}"
            f"{row['tokens_per_second']:>8.1f}{row['speedup_over_transformers']:>7.2f}x{row['weight_gb_per_s']:>7.1f}"
            f"{row['percent_of_read']:>7.0f}%  {'equal' if row['tokens_equal'] else 'DIFFERENT'}"
        )
    median = {(row["tp"], row["threads_total"], row["path"] == "modules"): row["decode_ms"] for row in rows}
    if (1, 1, False) in median and (2, 2, False) in median:
        ratio = median[1, 1, False] / median[2, 2, False]
        read = {(row["tp"], row["threads_total"]): row["read_gb_per_s"] for row in rows}
        print(
            f"tp=2 with one thread each is {ratio:.2f}x tp=1 with one thread; "
            f"a plain read by two ranks is {read[2, 2] / read[1, 1]:.2f}x that by one"
        )
    print(f"written to {out}")
    if not all(row["tokens_equal"] for row in rows):
        raise SystemExit("tokens differ between competitors")


if __name__ == "__main__":
    main()
