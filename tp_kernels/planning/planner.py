"""``plan``: memory, times, communication and speedup of a model for every number of ranks, as rows of one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tp_kernels.models.config import ModelConfig
from tp_kernels.planning.links import Link
from tp_kernels.planning.machines import Machine
from tp_kernels.planning.memory import (
    DTYPE_BYTES,
    QUANTIZED,
    Shard,
    activation_bytes,
    kv_bytes_per_token,
    largest_batch,
    shards,
    weight_bytes,
)
from tp_kernels.planning.roofline import Format, Pass, Times, predict

__all__ = ["RESERVED_BYTES", "Plan", "Row", "Workload", "plan"]

# For the CUDA context, kernels' code, communication buffers and fragmentation. Assumed.
RESERVED_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Workload:
    """What is planned for.

    Attributes:
        batch: rows.
        prompt: tokens of every row's prompt.
        context: tokens of every row that are in the cache before the decode step.
        max_len: tokens of a row that the cache has room for; None is the longer of prompt and context, and one more.
        dtype: ``"bfloat16"`` or ``"float16"``, of activations, cache and whatever is not quantised.
        quantize: None, ``"int8"`` or ``"fp8"``: the projections' weights.
        all_logits: the prompt's pass computes the logits of every token, not just of the last.

    Raises:
        ValueError: a size below 1, an unknown dtype or format.
    """

    batch: int = 1
    prompt: int = 4096
    context: int = 1024
    max_len: int | None = None
    dtype: str = "bfloat16"
    quantize: str | None = None
    all_logits: bool = False

    def __post_init__(self):
        if self.max_len is None:
            object.__setattr__(self, "max_len", max(self.prompt, self.context) + 1)
        for name, least in (("batch", 1), ("prompt", 1), ("context", 0), ("max_len", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if self.max_len < max(self.prompt, self.context + 1):
            raise ValueError(
                f"max_len={self.max_len} has no room for a prompt of {self.prompt} tokens, or for a context of "
                f"{self.context} and the token after it"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be {' or '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.quantize is not None and self.quantize not in QUANTIZED:
            raise ValueError(f"quantize must be None, {' or '.join(QUANTIZED)}, got {self.quantize!r}")


@dataclass(frozen=True)
class Row:
    """The prediction for one number of ranks.

    Attributes:
        tp: ranks.
        weight_bytes: parameters of every rank.
        kv_bytes_per_token: keys and values of one token of one row, of every rank.
        kv_bytes: the cache of the whole batch at ``max_len``, on the fullest rank.
        activation_bytes: an estimate of what a prompt's pass holds beside these.
        max_batch: rows that fit, at ``max_len``; 0 when none does.
        fits: whether the batch planned for fits.
        prefill, decode: the prompts' pass and one decode step over all ranks.
        prefill_shard, decode_shard: the same with communication switched off, every rank on a GPU of its own.
        prefill_speedup, decode_speedup: over one rank.
    """

    tp: int
    weight_bytes: list[int]
    kv_bytes_per_token: list[int]
    kv_bytes: int
    activation_bytes: int
    max_batch: int
    fits: bool
    prefill: Times
    prefill_shard: Times
    decode: Times
    decode_shard: Times
    prefill_speedup: float
    decode_speedup: float

    def to_dict(self) -> dict[str, Any]:
        """Seconds and bytes; passes as ``Times.to_dict`` gives them."""
        return {
            name: value.to_dict() if isinstance(value, Times) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in fields(self))
        }

    def flat(self) -> dict[str, Any]:
        """One line of a CSV: bytes of the fullest and emptiest rank, milliseconds, speedups."""
        line: dict[str, Any] = {
            "tp": self.tp,
            "weight_bytes_max": max(self.weight_bytes),
            "weight_bytes_min": min(self.weight_bytes),
            "kv_bytes_per_token": max(self.kv_bytes_per_token),
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "max_batch": self.max_batch,
            "fits": int(self.fits),
        }
        for name, times, shard in (
            ("prefill", self.prefill, self.prefill_shard),
            ("decode", self.decode, self.decode_shard),
        ):
            line[f"{name}_roof_ms"] = _ms(shard.roof)
            line[f"{name}_shard_ms"] = _ms(shard.total)
            for part in ("linear", "attention", "elementwise", "gaps", "communication"):
                line[f"{name}_{part}_ms"] = _ms(getattr(times, part))
            line[f"{name}_received_bytes"] = round(times.received)
            line[f"{name}_algorithm"] = times.algorithm
            line[f"{name}_ms"] = _ms(times.total)
        line["prefill_speedup"] = round(self.prefill_speedup, 4)
        line["decode_speedup"] = round(self.decode_speedup, 4)
        return line


@dataclass(frozen=True)
class Plan:
    """A prediction, and what it was made from. ``left_out``: numbers of ranks without a row, and why."""

    model: str
    config: ModelConfig
    machine: Machine
    link: Link
    workload: Workload
    rows: list[Row]
    left_out: dict[int, str]

    def row(self, tp: int) -> Row:
        """The row of ``tp`` ranks; KeyError where there is none."""
        for row in self.rows:
            if row.tp == tp:
                return row
        raise KeyError(tp)

    def lines(self) -> list[dict[str, Any]]:
        """Every row as a line of a CSV, with what it was planned for. The first column says that it is a prediction."""
        common = {
            "kind": "prediction",
            "model": self.model,
            "gpu": self.machine.name,
            "link": self.link.name,
            "dtype": self.workload.dtype,
            "quantize": self.workload.quantize or "none",
            "batch": self.workload.batch,
            "prompt": self.workload.prompt,
            "context": self.workload.context,
            "max_len": self.workload.max_len,
        }
        return [{**common, **row.flat()} for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """The object that ``tp-kernels plan --json`` prints; seconds and bytes."""
        return {
            "kind": "prediction",
            "model": self.model,
            "config": asdict(self.config),
            "machine": {"name": self.machine.name, "title": self.machine.title}
            | {name: asdict(figure) for name, figure in self.machine.figures()},
            "link": {"name": self.link.name, "title": self.link.title}
            | {name: asdict(figure) for name, figure in self.link.figures()},
            "workload": asdict(self.workload),
            "rows": [row.to_dict() for row in self.rows],
            "left_out": {str(tp): reason for tp, reason in self.left_out.items()},
        }


def plan(
    model: str,
    config: ModelConfig,
    machine: Machine,
    link: Link,
    workload: Workload | None = None,
    sizes: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
) -> Plan:
    """Predict a model for several numbers of ranks.

    Args:
        model: its name.
        config: its configuration.
        machine, link: from ``machine()`` and ``link()``.
        workload: what to plan for; ``Workload()`` by default.
        sizes: numbers of ranks; those that the model cannot be split over are left out with the reason. One rank is
            always predicted, because speedups refer to it.

    Returns:
        The prediction, rows by ascending number of ranks.

    Raises:
        ValueError: a number of ranks below 1.
    """
    workload = Workload() if workload is None else workload
    rows: list[Row] = []
    left_out: dict[int, str] = {}
    single: tuple[float, float] | None = None
    for tp in sorted({1, *sizes}):
        if tp < 1:
            raise ValueError(f"numbers of ranks must be at least 1, got {tp}")
        try:
            ranks = shards(config, tp)
        except ValueError as error:
            left_out[tp] = str(error)
            continue
        row = _row(config, ranks, machine, link, workload, single)
        single = single or (row.prefill.total, row.decode.total)
        rows.append(row)
    return Plan(model, config, machine, link, workload, rows, left_out)


def _row(
    config: ModelConfig,
    ranks: list[Shard],
    machine: Machine,
    link: Link,
    workload: Workload,
    single: tuple[float, float] | None,
) -> Row:
    form = Format(DTYPE_BYTES[workload.dtype], workload.quantize)
    prompt = Pass(workload.batch, workload.prompt, 0, workload.all_logits)
    step = Pass(workload.batch, 1, workload.context)
    weights = [weight_bytes(config, shard, *form) for shard in ranks]
    per_token = [kv_bytes_per_token(config, shard, form.itemsize) for shard in ranks]
    # Prompts may run one after another, so one prompt's activations must fit.
    outputs = workload.prompt if workload.all_logits else 1
    activations = [activation_bytes(config, shard, workload.prompt, outputs, form.itemsize) for shard in ranks]
    fixed = [weight + activation + RESERVED_BYTES for weight, activation in zip(weights, activations, strict=True)]
    growing = [token * workload.max_len for token in per_token]
    if link.shared_gpu:  # all ranks' parts lie in one memory
        fixed, growing = [sum(fixed)], [sum(growing)]
    max_batch = min(
        largest_batch(machine.memory.value - held, per_row) for held, per_row in zip(fixed, growing, strict=True)
    )
    times = [predict(config, ranks, run, form, machine, where) for run in (prompt, step) for where in (link, None)]
    prefill, prefill_shard, decode, decode_shard = times
    prefill_single, decode_single = single or (prefill.total, decode.total)
    return Row(
        tp=len(ranks),
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_bytes=max(per_token) * workload.batch * workload.max_len,
        activation_bytes=max(activations),
        max_batch=max_batch,
        fits=max_batch >= workload.batch,
        prefill=prefill,
        prefill_shard=prefill_shard,
        decode=decode,
        decode_shard=decode_shard,
        prefill_speedup=prefill_single / prefill.total,
        decode_speedup=decode_single / decode.total,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 6)
