"""A plan as text: tables, what was assumed, and what was measured beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tp_kernels.planning.machines import Figure
from tp_kernels.planning.measured import Comparison
from tp_kernels.planning.planner import RESERVED_BYTES, Plan, Row
from tp_kernels.planning.roofline import Times

__all__ = ["assumptions", "comparison_lines", "describe"]


def describe(plan: Plan, tp: int | None = None) -> str:
    """Everything that ``tp-kernels plan`` prints of a plan, with a line for ``tp`` ranks if they were asked for."""
    parts = [_head(plan), "memory of the fullest rank, GB of 10^9 bytes (computed)", _table(_MEMORY, plan.rows, plan)]
    tokens = f"{plan.workload.batch} x {plan.workload.prompt} tokens"
    parts += [f"predicted prefill of {tokens}, ms", _times_table(plan, "prefill")]
    after = f"batch {plan.workload.batch} after {plan.workload.context} tokens"
    parts += [f"predicted decode step, {after}, ms", _times_table(plan, "decode")]
    if tp is not None:
        parts.append(_in_short(plan.row(tp), plan))
    if not plan.row(1).fits:
        parts.append("One rank's memory would not hold this: speedups refer to a time that cannot be measured.\n")
    parts += [f"tp={ranks} is left out: {reason}\n" for ranks, reason in plan.left_out.items()]
    parts += ["assumptions", *(f"  {line}" for line in assumptions(plan))]
    return "\n".join(parts)


def _head(plan: Plan) -> str:
    config, work = plan.config, plan.workload
    weights = "" if work.quantize is None else f", {work.quantize} weights"
    return (
        "PREDICTION: computed from sizes and rates, not measured\n"
        f"model    {plan.model}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, MLP "
        f"{config.intermediate_size}, {config.num_attention_heads} query and {config.num_key_value_heads} KV heads of "
        f"{config.head_dim}, {config.vocab_size} words{', tied' if config.tie_word_embeddings else ''}\n"
        f"gpu      {plan.machine.name}, {plan.machine.title}\n"
        f"link     {plan.link.name}, {plan.link.title}\n"
        f"numbers  {work.dtype}{weights}\n"
    )


def _in_short(row: Row, plan: Plan) -> str:
    room = f"largest batch {row.max_batch}" if row.fits else f"batch {plan.workload.batch} DOES NOT FIT"
    return (
        f"tp={row.tp} on {plan.machine.name}: {_gb(max(row.weight_bytes))} GB of weights a rank, {room}; predicted "
        f"prefill {_ms(row.prefill.total)} ms ({row.prefill_speedup:.2f}x), decode {_ms(row.decode.total)} ms "
        f"({row.decode_speedup:.2f}x)\n"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.3f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


_MEMORY = {
    "tp": lambda row, plan: str(row.tp),
    "weights": lambda row, plan: _gb(max(row.weight_bytes)),
    "emptiest rank": lambda row, plan: _gb(min(row.weight_bytes)),
    "KV a token": lambda row, plan: f"{max(row.kv_bytes_per_token) / 1024:.1f} KiB",
    "KV of the batch": lambda row, plan: _gb(row.kv_bytes),
    "activations": lambda row, plan: _gb(row.activation_bytes),
    "fits": lambda row, plan: "yes" if row.fits else "NO",
    "largest batch": lambda row, plan: f"{row.max_batch} x {plan.workload.max_len}" if row.max_batch else "none",
}


def _times_table(plan: Plan, what: str) -> str:
    def times(row: Row) -> Times:
        return getattr(row, what)

    def shard(row: Row) -> Times:
        return getattr(row, f"{what}_shard")

    tokens = plan.workload.batch * (plan.workload.prompt if what == "prefill" else 1)
    columns = {
        "tp": lambda row, plan: str(row.tp),
        "roof": lambda row, plan: _ms(shard(row).roof),
        "shard alone": lambda row, plan: _ms(shard(row).total),
        "linear": lambda row, plan: _ms(times(row).linear),
        "attention": lambda row, plan: _ms(times(row).attention),
        "norms": lambda row, plan: _ms(times(row).elementwise),
        "gaps": lambda row, plan: _ms(times(row).gaps),
        "communication": lambda row, plan: _ms(times(row).communication),
        "MB received": lambda row, plan: f"{times(row).received / 1e6:.2f}",
        "by": lambda row, plan: times(row).algorithm,
        "predicted": lambda row, plan: _ms(times(row).total),
        "tokens/s": lambda row, plan: f"{tokens / times(row).total:.0f}",
        "speedup": lambda row, plan: f"{getattr(row, f'{what}_speedup'):.2f}x",
    }
    return _table(columns, plan.rows, plan)


def _table(columns: dict[str, Callable[[Row, Plan], str]], rows: Sequence[Row], plan: Plan) -> str:
    return _aligned([list(columns)] + [[cell(row, plan) for cell in columns.values()] for row in rows])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"  {line}\n" for line in text)


def assumptions(plan: Plan) -> list[str]:
    """What a plan rests on: every rate with its source, and what is left out."""
    work = plan.workload
    lines = _by_source(plan.machine.name, plan.machine.figures()) + _by_source(plan.link.name, plan.link.figures())
    lines += [
        "a kernel takes the longer of its bytes at bandwidth and its FLOPs at rate, plus a gap; roof: without gaps, "
        "norms and communication; shard alone: one rank on its own GPU without communication",
        "kernels follow each other without a pause of the host (CUDA graphs), and none overlaps with communication",
        "between two sums over the ranks all wait for the fullest rank; ranks are equally fast",
        f"two sums a layer and one for the embedding, of {work.dtype}; the norm is part of a sum over peers' memory; "
        "logits are gathered whole, as sampling needs them (greedy decoding sends less)",
        f"the output head runs for {'every token' if work.all_logits else 'the last token of a row'} of a prompt",
        f"the cache holds max_len tokens of every row in {work.dtype}, windows free nothing; memory is counted for one "
        f"prompt at a time; {RESERVED_BYTES / 1e9:g} GB a rank are reserved (assumed) for the context, buffers and "
        "fragmentation",
    ]
    if work.quantize:
        lines.append(f"{work.quantize} weights are widened on their way: they save bytes, not arithmetic")
    if plan.link.shared_gpu:
        lines.append("ranks that share a GPU share its bandwidth, arithmetic and memory equally; shard alone does not")
    return lines


def _by_source(name: str, figures: Iterable[tuple[str, Figure]]) -> list[str]:
    """A line for each source, with the figures it gave."""
    found: dict[str, list[str]] = {}
    for label, figure in figures:
        found.setdefault(figure.source, []).append(f"{label.replace('_', ' ')} {figure}")
    return [f"{name}: {', '.join(given)} ({source})" for source, given in found.items()]


def comparison_lines(comparisons: Sequence[Comparison], source: str) -> str:
    """What ``bench model`` measured beside what is predicted for the same pass, as a table."""
    if not comparisons:
        return f"measured: no row of {source} taken on a GPU is of this model and dtype\n"
    head = ["what", "tp", "shard of", "batch", "tokens", "context", "weights", "contender"]
    head += ["measured ms", "predicted ms", "measured/predicted", "roof ms", "x off", "x best peer", "best peer"]
    lines = [head]
    for row in comparisons:
        sizes = [row.what, row.tp, row.shard, row.batch, row.tokens, row.context, row.quantize, row.contender]
        times = [f"{row.measured_ms:.3f}", f"{row.predicted_ms:.3f}", f"{row.ratio:.2f}x", f"{row.roof_ms:.3f}"]
        ratios = ["" if value is None else f"{value:.2f}" for value in (row.over_off, row.times_best_peer)]
        lines.append([*map(str, sizes), *times, *ratios, row.best_peer])
    gpus = ", ".join(sorted({row.gpu or "an unnamed machine" for row in comparisons}))
    return f"measured on {gpus} ({source}) beside predicted\n{_aligned(lines)}"
