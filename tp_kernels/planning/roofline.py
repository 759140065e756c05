"""How long a pass takes: every kernel at the bandwidth or the arithmetic it needs, whichever takes longer.

    time of a kernel = max(bytes / bandwidth, FLOPs / rate) + what starting it costs

A pass is the kernels that a ``ParallelCausalLM`` runs: per layer a norm, the fused query/key/value projection (with
RoPE and the cache write in it), attention, the output projection, a norm, the gated up-projection (activation in it),
the down-projection; then a norm and the output head for the last token of every row. Between two sums over the ranks
all wait for the fullest one, so each such part of a pass counts as long as its slowest rank takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from tp_kernels.models.config import ModelConfig
from tp_kernels.planning.links import NOTHING, Collective, Link, all_gather, all_reduces
from tp_kernels.planning.machines import Machine
from tp_kernels.planning.memory import Linear, Shard, head_format, head_linear, layer_linears

__all__ = ["Format", "Pass", "Times", "predict", "visible_pairs"]


class Format(NamedTuple):
    """How numbers are stored: bytes of an activation; None, ``"int8"`` or ``"fp8"`` for the projections' weights."""

    itemsize: int
    quantize: str | None = None


class Pass(NamedTuple):
    """What one pass runs.

    Attributes:
        rows: of the batch.
        tokens: new ones of every row.
        cached: tokens of every row that are in the cache already.
        all_logits: run the output head for every token, not just for every row's last.
    """

    rows: int
    tokens: int
    cached: int = 0
    all_logits: bool = False


class Kernel(NamedTuple):
    """One kernel of one rank: its kind (a field of ``Times``), FLOPs, and the fewest bytes it can move."""

    kind: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Times:
    """Predicted seconds of a pass on the slowest rank, by what they are spent on.

    Attributes:
        linear, attention: projections and attention at the rates they can reach; together the roof.
        elementwise: embedding and norms.
        gaps: what kernels of projections and attention cost beyond the roof.
        communication: sums over the ranks, and gathering the logits.
        received: bytes a rank receives for these.
        algorithm: of the sums over the ranks.
    """

    linear: float
    attention: float
    elementwise: float
    gaps: float
    communication: float = 0.0
    received: float = 0.0
    algorithm: str = "none"

    @property
    def roof(self) -> float:
        """Projections and attention alone, at the best rates seen."""
        return self.linear + self.attention

    @property
    def total(self) -> float:
        """Everything."""
        return self.silent + self.communication

    @property
    def silent(self) -> float:
        """Everything but communication."""
        return self.roof + self.elementwise + self.gaps

    def to_dict(self) -> dict[str, float | str]:
        """The fields, ``roof`` and ``total``."""
        return {**asdict(self), "roof": self.roof, "total": self.total}


def predict(
    config: ModelConfig, ranks: Sequence[Shard], run: Pass, form: Format, machine: Machine, link: Link | None = None
) -> Times:
    """Predict a pass.

    Args:
        config: of the model.
        ranks: every rank's shard, from ``memory.shards``.
        run: the pass.
        form: of numbers.
        machine: every rank's GPU; the ranks share one if the link says so.
        link: between the ranks; None switches communication off: every shard by itself, on its own GPU.
    """
    layers, tokens = config.num_hidden_layers, run.rows * run.tokens
    sharing = len(ranks) if link is not None and link.shared_gpu else 1
    stream = tokens * config.hidden_size * form.itemsize  # bytes of the residual stream

    spent = [0.0, 0.0, 0.0]
    for count, kernels_of in _parts(config, run, form):
        slowest = max((_busy(kernels_of(shard), machine, sharing) for shard in ranks), key=sum)
        spent = [so_far + count * part for so_far, part in zip(spent, slowest, strict=True)]
    linear, attention, gaps = spent

    bandwidth = machine.bandwidth.value / sharing
    embedding = max(machine.small_kernel.value, 2 * stream / bandwidth)

    def norm(way: Collective) -> float:
        """Seconds of a norm and its residual sum, which is part of the kernel that reads peers' memory before it."""
        streamed = 4 * stream / bandwidth
        if way.algorithm in ("none", "ring"):
            return max(machine.small_kernel.value, streamed)
        return streamed / len(ranks) if way.algorithm == "two-shot" else streamed  # of the part it has summed

    # The embedding and the layers' two blocks end in a sum over the ranks; behind each stands a norm.
    sums = 2 * layers + 1
    ways = [NOTHING] if link is None else all_reduces(link, len(ranks), stream)
    way = min(ways, key=lambda way: way.seconds + norm(way))
    logits = (tokens if run.all_logits else run.rows) * config.vocab_size * form.itemsize
    gather = NOTHING if link is None else all_gather(link, len(ranks), logits)
    return Times(
        linear=linear,
        attention=attention,
        elementwise=embedding + sums * norm(way),
        gaps=gaps,
        communication=sums * way.seconds + gather.seconds,
        received=sums * way.received + gather.received,
        algorithm=way.algorithm,
    )


def _parts(config: ModelConfig, run: Pass, form: Format) -> Iterator[tuple[int, Callable[[Shard], Iterator[Kernel]]]]:
    """(how often, kernels of a shard) of each part of a pass between two sums over the ranks."""
    tokens = run.rows * run.tokens
    outputs = tokens if run.all_logits else run.rows

    def projection(linear: Linear, rows: int, quantize: str | None) -> Kernel:
        moved = linear.parameter_bytes(form.itemsize, quantize) + rows * (linear.k + linear.out) * form.itemsize
        return Kernel("linear", 2.0 * rows * linear.n * linear.k, moved)

    def attention_part(window: int | None) -> Callable[[Shard], Iterator[Kernel]]:
        def kernels(shard: Shard) -> Iterator[Kernel]:
            qkv, output, _, _ = layer_linears(config, shard)
            yield projection(qkv, tokens, form.quantize)
            yield _attention(config, shard, run, window, form.itemsize)
            yield projection(output, tokens, form.quantize)

        return kernels

    def mlp_part(shard: Shard) -> Iterator[Kernel]:
        _, _, up, down = layer_linears(config, shard)
        yield projection(up, tokens, form.quantize)
        yield projection(down, tokens, form.quantize)

    def head_part(shard: Shard) -> Iterator[Kernel]:
        yield projection(head_linear(config, shard), outputs, head_format(config, form.quantize))

    for window, count in Counter(config.layer_windows).items():
        yield count, attention_part(window)
    yield config.num_hidden_layers, mlp_part
    yield 1, head_part


def _attention(config: ModelConfig, shard: Shard, run: Pass, window: int | None, itemsize: int) -> Kernel:
    """Causal attention of the new tokens over all tokens that they see; keys and values are read once a row."""
    seen = visible_pairs(run.tokens, run.cached, window)
    keys = run.cached + run.tokens if window is None else min(run.cached + run.tokens, window + run.tokens - 1)
    elements = 2 * run.tokens * shard.q_heads + 2 * keys * shard.kv_heads
    return Kernel(
        "attention",
        4.0 * run.rows * shard.q_heads * config.head_dim * seen,
        run.rows * elements * config.head_dim * itemsize,
    )


def visible_pairs(tokens: int, cached: int, window: int | None) -> int:
    """(query, key) pairs of ``tokens`` new tokens behind ``cached`` ones, each seeing itself and those before it."""
    full = tokens * cached + tokens * (tokens + 1) // 2
    if window is None or cached + tokens <= window:
        return full
    # Tokens at positions below the window see less than it; the others see just as much.
    short = max(0, min(tokens, window - cached))
    return short * cached + short * (short + 1) // 2 + (tokens - short) * window


def _busy(kernels: Iterable[Kernel], machine: Machine, sharing: int) -> tuple[float, float, float]:
    """Seconds of one rank: projections, attention, and what their kernels cost beyond that."""
    seconds, count = {"linear": 0.0, "attention": 0.0}, 0
    rates = {"linear": machine.matmul.value, "attention": machine.attention.value}
    for kernel in kernels:
        needed = max(kernel.flops / rates[kernel.kind], kernel.bytes / machine.bandwidth.value)
        seconds[kernel.kind] += needed * sharing
        count += 1
    return seconds["linear"], seconds["attention"], count * machine.kernel_gap.value
