"""What ``bench overlap`` measures: projections with their collectives, as one rank holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tp_kernels import ops
from tp_kernels.checkpoint.sharding import shard_range_sizes, shard_width_sizes
from tp_kernels.ops._overlap_choice import OVERLAPPED_OPS, planned_chunks

__all__ = ["Candidate", "Case", "Operands", "Plan", "candidates", "cases_of", "count_unequal"]

# Standard deviation of the integers' products: bf16 holds integers up to 256, thirteen times as much.
_SPREAD = 20.0


class Candidate(NamedTuple):
    """A schedule: its parameters, and the rows of its chunks."""

    chunks: int
    growth: float
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.rows))


def candidates(m: int, n: int, dtype, info, num_sms: int, options: Any) -> list[Candidate]:
    """The different schedules that the options make of an [m, n] result, those with one chunk left out.

    Args:
        info: the GPU, None on a CPU.
        num_sms: of the rank that has fewest.
        options: has ``chunks`` and ``growth`` to try.
    """
    found: dict[tuple[int, ...], Candidate] = {}
    for chunks in options.chunks:
        for growth in options.growth:
            rows = tuple(b - a for a, b in planned_chunks(m, n, dtype, info, num_sms, chunks, growth))
            if len(rows) > 1:
                found.setdefault(rows, Candidate(chunks, growth, rows))
    return list(found.values())


class Plan(NamedTuple):
    """One way to carry an op out: "none", "chunked" or "fused", and its schedule where it has one."""

    path: str
    schedule: Candidate | None = None

    def __str__(self) -> str:
        return self.path if self.schedule is None else f"{self.path} {self.schedule}"


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Attributes:
        op: one of ``OVERLAPPED_OPS``.
        m: tokens of all ranks together.
        n, in_features: of the whole projection, as in ``ops._overlap_choice.overlap_sizes``.
    """

    op: str
    m: int
    n: int
    in_features: int

    def __post_init__(self) -> None:
        if self.op not in OVERLAPPED_OPS:
            raise ValueError(f"unknown op {self.op!r}; expected one of {', '.join(OVERLAPPED_OPS)}")

    def __str__(self) -> str:
        return f"{self.op} {self.m} x {self.n} x {self.in_features}"

    @property
    def gathers(self) -> bool:
        """Tokens are gathered before the matmul, rather than its result summed."""
        return self.op == "column_parallel_linear"

    def tokens(self, world_size: int) -> list[int]:
        """Every rank's part of the tokens."""
        return shard_range_sizes(self.m, world_size)

    def weight_shape(self, rank: int, world_size: int) -> tuple[int, int]:
        """Of a rank's weight [outputs, inputs]."""
        if self.gathers:
            return shard_width_sizes(self.n, world_size)[rank], self.in_features
        return self.n, shard_width_sizes(self.in_features, world_size)[rank]

    def input_shape(self, rank: int, world_size: int) -> tuple[int, int]:
        """Of what a rank gives the op."""
        rows = self.tokens(world_size)[rank] if self.gathers else self.m
        return rows, self.weight_shape(rank, world_size)[1]

    def schedules(self, world_size: int, dtype, info, num_sms: int, options: Any) -> list[Candidate]:
        """The schedules to try, in rows of all ranks together: those that the op makes of a table's entry."""
        if self.op == "linear_all_reduce":
            return candidates(self.m, self.n, dtype, info, num_sms, options)
        longest = max(self.tokens(world_size))
        # All ranks' parts of a piece are rows beside one another.
        wide = world_size * (-(-self.n // world_size) if self.gathers else self.n)
        found = []
        for plan in candidates(longest, wide, dtype, info, num_sms, options):
            stops, at = [0], 0
            for rows in plan.rows:
                at += rows
                stops.append(-(-at * self.m // longest))
            rows = tuple(b - a for a, b in pairwise(stops))
            if min(rows) > 0:
                found.append(plan._replace(rows=rows))
        return found


class Operands:
    """A rank's operands of a case, and everything that is done with them.

    Args:
        case: what to compute.
        rank, world_size: whose part.
        dtype, device: of the operands.
        exact: integers whose products and sums the dtype holds, instead of normal random numbers.
    """

    def __init__(self, case: Case, rank: int, world_size: int, dtype: torch.dtype, device: str, exact: bool = False):
        self.case, self.rank, self.sizes = case, rank, case.tokens(world_size)
        self._make = partial(_random, case, world_size, dtype, device, exact)
        self.x, self.weight = self._make(rank)
        shape = (case.m, self.weight.shape[0])
        # Tokens of all ranks, where they are gathered first; any numbers, for the matmul alone.
        self.whole = self.x.new_zeros(case.m, case.in_features).normal_() if case.gathers and not exact else self.x
        self.partial, self.summed = self.x.new_zeros(shape), self.x.new_empty(shape)

    def compute(self) -> Tensor:
        """The matmul alone."""
        return torch.mm(self.whole, self.weight.t(), out=self.partial)

    def communicate(self, communicator: Any) -> Tensor:
        """The collective alone."""
        if self.case.gathers:
            return communicator.all_gather(self.x, dim=0, sizes=self.sizes)
        if self.case.op == "linear_all_reduce":
            return communicator.all_reduce(self.partial, out=self.summed)
        return communicator.reduce_scatter(self.partial, dim=0, sizes=self.sizes)

    def call(self, group: Any, plan: Plan, overlap: str | None = None) -> Tensor:
        """The op over ``group`` as ``plan`` says; with ``overlap`` the same chunks in another way."""
        rows = None if plan.schedule is None else list(plan.schedule.rows)
        given = {"group": group, "overlap": overlap or plan.path, "chunks": rows}
        if self.case.op == "linear_all_reduce":
            return ops.linear_all_reduce(self.x, self.weight, **given)
        if self.case.gathers:
            return ops.column_parallel_linear(self.x, self.weight, sequence_sizes=self.sizes, **given)
        return ops.linear_reduce_scatter(self.x, self.weight, sizes=self.sizes, **given)

    def expected(self) -> Tensor:
        """This rank's exact result in fp32, from every rank's operands; for exact ones."""
        ranks = range(len(self.sizes))
        if self.case.gathers:
            tokens = torch.cat([self._make(rank)[0] for rank in ranks])
            return tokens.float() @ self.weight.float().t()
        total = sum(x.float() @ weight.float().t() for x, weight in map(self._make, ranks))
        return total.split(self.sizes)[self.rank] if self.case.op == "linear_reduce_scatter" else total


def _random(
    case: Case, world_size: int, dtype: torch.dtype, device: str, exact: bool, rank: int
) -> tuple[Tensor, Tensor]:
    """A rank's input and weight, the same wherever they are made."""
    generator = torch.Generator(device).manual_seed(1 + rank)
    shapes = case.input_shape(rank, world_size), case.weight_shape(rank, world_size)
    if not exact:
        x, weight = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        return x.to(dtype), (weight / case.in_features**0.5).to(dtype)
    x, weight = (torch.randint(-1, 2, shape, generator=generator, device=device) for shape in shapes)
    kept = torch.rand(shapes[1], generator=generator, device=device) < _SPREAD**2 / (case.in_features * 4 / 9)
    return x.to(dtype), (weight * kept).to(dtype)


def count_unequal(call: Callable[[], Tensor], wanted: Tensor) -> int:
    """Elements of a result that are not those wanted; all of them if the shape is another."""
    found = call()
    return wanted.numel() if found.shape != wanted.shape else int((found.to(wanted.dtype) != wanted).sum())


def cases_of(options: Any) -> list[Case]:
    """The cases in the order of the rows asked for: all ops of one number of tokens before the next."""
    return [
        Case(op, m, n, k)
        for m in options.rows
        for op in OVERLAPPED_OPS
        if op in options.ops
        for n, k in (options.columns if op == "column_parallel_linear" else options.shapes)
    ]
