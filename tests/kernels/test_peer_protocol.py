"""A model of how the peer-memory kernels wait for each other, run through all interleavings. Tier: no device.

The model knows ranks, blocks, kernels in stream order, flags, staging halves, registered tensors and Lamport buffers
(csrc/kernels/peer_sync.cuh). Halves, flag values, buffers, slices and which block keeps whose record come from the
functions that the kernels use. A step is what a block does between two waits on one kind of memory; every read asserts
that it sees the value of its own call, every push that its place is empty.

The kernel that multiplies as well (ops/kernels/peer_linear_kernel.py) has no exchange, and its blocks take their work
from a list; in the model every block walks the whole list and passes over what another one has taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from tp_kernels._native import native

EMPTY = 0


@dataclass(frozen=True)
class Call:
    """One kernel on every rank: ``kind``, its grid (or each rank's) and how many packs, or row blocks, it moves.

    ``columns``: tiles of a row block, of each rank.
    """

    kind: str
    blocks: int | tuple[int, ...]
    units: int
    columns: tuple[int, ...] = (2, 2, 2)

    def grid(self, rank: int) -> int:
        return self.blocks if isinstance(self.blocks, int) else self.blocks[rank]


@dataclass
class Rules:
    """What the kernels decide by; a test replaces one rule to see that the model notices."""

    half_of: object = native.cuda_peer_half_of
    lamport_buffer: object = native.cuda_peer_lamport_buffer
    lamport_emptied: object = native.cuda_peer_lamport_emptied
    advances: object = native.cuda_peer_advances
    end_exchange: bool = True
    first_exchange: bool = True
    signal_value: object = native.cuda_peer_signal_value
    # Of the kernel that multiplies.
    order: str = "multiply, reduce, pull"
    tiles_are_counted: bool = True
    counts_return_to_zero: bool = True
    last_block_keeps_records: bool = True
    waits_for_arrival: bool = True
    waits_for_reduction: bool = True


@dataclass
class Model:
    """Steps of all blocks for a sequence of calls, and a search over their orders."""

    world: int
    calls: list[Call]
    rules: Rules = field(default_factory=Rules)
    max_blocks: int = 2

    def tag(self, number: int, reduced: bool = False) -> int:
        return 2 * number + 1 + reduced

    def units_of(self, call: Call, block: int, parts: int, part: int) -> list[int]:
        begin, end = native.cuda_peer_slice(call.units, parts, part)
        return list(range(begin + block, end, call.blocks))

    def program(self, rank: int, number: int, block: int) -> list[tuple]:
        """Steps of one block. Its counts are those its record must hold; the first step asserts that it does."""
        call, rules = self.calls[number], self.rules
        if call.kind == "linear":
            return self.linear_program(rank, number, block)
        flagged = sum(c.kind not in ("lamport", "local") for c in self.calls[:number])
        lamports = [c for c in self.calls[:number] if c.kind == "lamport"]
        last = lamports[-1].units if lamports else 0
        half, peers = rules.half_of(flagged), [p for p in range(self.world) if p != rank]
        tag, everyone = self.tag(number), range(self.world)
        mine = self.units_of(call, block, 1, 0)
        steps: list[tuple] = [("recall", block, (flagged, len(lamports), last))]

        def exchange(phase: int) -> None:
            value = rules.signal_value(flagged, phase)
            steps.extend(("put", [(("signal", p, block, rank), value)]) for p in peers)
            steps.append(("wait", [(("signal", rank, block, p), value) for p in peers]))

        if call.kind == "local":  # a GEMM that writes the registered tensor
            return [("put", [(("registered", rank, u), tag) for u in mine])]
        if call.kind == "one_shot":
            steps.append(("put", [(("half", rank, half, u), tag) for u in mine]))
            if rules.first_exchange:
                exchange(0)
            steps.append(("see", [(("half", p, half, u), tag) for p in everyone for u in mine]))
        elif call.kind == "registered_one_shot":
            exchange(0)
            steps.append(("see", [(("registered", p, u), self.tag(number - 1)) for p in everyone for u in mine]))
            if rules.end_exchange:
                exchange(1)
        elif call.kind == "registered_two_shot":  # in place: a slice is reduced, then written on all ranks
            own = self.units_of(call, block, self.world, rank)
            exchange(0)
            steps.append(("see", [(("registered", p, u), self.tag(number - 1)) for p in everyone for u in own]))
            steps.append(("put", [(("registered", p, u), tag) for p in everyone for u in own]))
            exchange(1)
            theirs = [u for p in everyone for u in self.units_of(call, block, self.world, p)]
            steps.append(("see", [(("registered", rank, u), tag) for u in theirs]))
        elif call.kind == "two_shot":
            own = self.units_of(call, block, self.world, rank)
            copied = [u for p in everyone for u in self.units_of(call, block, self.world, p)]
            steps.append(("put", [(("half", rank, half, u), tag) for u in copied]))
            exchange(0)
            steps.append(("see", [(("half", p, half, u), tag) for p in everyone for u in own]))
            steps.append(("put", [(("half", rank, half, u), self.tag(number, True)) for u in own]))
            exchange(1)
            fetched = [(p, u) for p in peers for u in self.units_of(call, block, self.world, p)]
            steps.append(("see", [(("half", p, half, u), self.tag(number, True)) for p, u in fetched]))
        elif call.kind == "lamport":
            buffer, emptied = rules.lamport_buffer(len(lamports)), rules.lamport_emptied(len(lamports))
            steps.append(("push", [(("lamport", p, buffer, rank, u), tag) for p in peers for u in mine]))
            old = range(block, last, call.blocks)
            steps.append(("put", [(("lamport", rank, emptied, p, u), EMPTY) for p in peers for u in old]))
            steps.append(("poll", [(("lamport", rank, buffer, p, u), tag) for p in peers for u in mine]))
        lamport = call.kind == "lamport"
        record = (flagged + (not lamport), len(lamports) + lamport, call.units if lamport else last)
        kept = [b for b in range(self.max_blocks) if rules.advances(block, call.blocks, b)]
        steps.append(("put", [(("record", rank, b), record) for b in kept]))
        return [step for step in steps if step[1] or step[0] == "recall"]

    def linear_program(self, rank: int, number: int, block: int) -> list[tuple]:
        """Of a block of the kernel that multiplies: tiles make a row block, and a step of all owners is a band."""
        call, rules, world = self.calls[number], self.rules, self.world
        flagged = sum(c.kind not in ("lamport", "local") for c in self.calls[:number])
        lamports = [c for c in self.calls[:number] if c.kind == "lamport"]
        record = (flagged, len(lamports), lamports[-1].units if lamports else 0)
        half, everyone, steps = rules.half_of(flagged), range(world), -(-call.units // world)
        arrival, reduction = (rules.signal_value(flagged, phase) for phase in (0, 1))
        tag, result = self.tag(number), self.tag(number, True)

        def place(step: int, owner: int, slot: int, column: int) -> tuple:
            return ("half", owner, half, (slot * steps + step) * max(call.columns) + column)

        def owners(step: int) -> int:
            return min(world, call.units - step * world)

        def multiply(step: int) -> list[list[tuple]]:
            found = []
            for column in range(call.columns[rank]):
                for turn in range(owners(step)):
                    owner = (rank + 1 + turn) % owners(step)
                    tile = [("put", [(place(step, owner, rank, column), tag)])]
                    if rules.tiles_are_counted:
                        tile.append(("count", ("multiplied", rank, step * world + owner), call.columns[rank], 1))
                    found.append([*tile, ("put", [(("arrived", owner, step, rank), arrival)])])
            return found

        def reduce(step: int) -> list[list[tuple]]:
            if rank >= owners(step):
                return []
            arrived = [("wait", [(("arrived", rank, step, p), arrival) for p in everyone])]
            parts = [(place(step, rank, slot, at), tag) for slot in everyone for at in range(call.columns[slot])]
            return [
                [
                    *(arrived if rules.waits_for_arrival else ()),
                    ("see", parts),
                    ("put", [(place(step, rank, 0, column), result) for column in range(call.columns[0])]),
                    ("put", [(("finished", p, step * world + rank), reduction) for p in everyone]),
                ]
            ]

        def pull(step: int) -> list[list[tuple]]:
            found = []
            for turn in range(1, world):
                owner = (rank + turn) % world
                if owner < owners(step):
                    finished = [("wait", [(("finished", rank, step * world + owner), reduction)])]
                    rows = ("see", [(place(step, owner, 0, column), result) for column in range(call.columns[0])])
                    found.append([*(finished if rules.waits_for_reduction else ()), rows])
            return found

        kinds = [{"multiply": multiply, "reduce": reduce, "pull": pull}[kind] for kind in rules.order.split(", ")]
        entries = [
            entry
            for frame in range(steps + 2)
            for lag, kind in enumerate(kinds)
            if 0 <= frame - lag < steps
            for entry in kind(frame - lag)
        ]
        program: list[tuple] = [("recall", 0, record)]  # there may be more blocks than records
        for index, entry in enumerate(entries):
            program += [("take", ("taken", rank), index, len(entry)), *entry]
        records = [(("record", rank, b), (flagged + 1, *record[1:])) for b in range(self.max_blocks)]
        mine = [records[b] for b in range(self.max_blocks) if rules.advances(block, call.grid(rank), b)]
        leaves = ("taken", rank), len(entries) + call.grid(rank)
        if rules.last_block_keeps_records:
            return [*program, ("leave", *leaves, records)]
        return [*program, ("leave", *leaves, []), ("put", mine)]

    @staticmethod
    def keys_of(step: tuple) -> list[tuple]:
        if step[0] in ("count", "take"):
            return [step[1]]
        if step[0] == "leave":
            return [step[1], *(key for key, _ in step[3])]
        return [] if step[0] == "recall" else [key for key, _ in step[1]]

    def explore(self, limit: int = 2_000_000) -> int:
        """Number of states; AssertionError at the first wrong value or deadlock in any of them."""
        programs = {
            (r, n, b): self.program(r, n, b)
            for r in range(self.world)
            for n, call in enumerate(self.calls)
            for b in range(call.grid(r))
        }
        cells: dict[tuple, int] = {}
        for steps in programs.values():
            for step in steps:
                for key in self.keys_of(step):
                    cells.setdefault(key, len(cells))
        for r in range(self.world):
            for b in range(self.max_blocks):
                cells.setdefault(("record", r, b), len(cells))
        start = [0] * len(cells)
        for key, index in cells.items():
            if key[0] == "record":
                start[index] = (0, 0, 0)
        first = tuple((0, (0,) * self.calls[0].grid(r)) for r in range(self.world))
        pending, seen = [(first, tuple(start))], {(first, tuple(start))}
        while pending:
            positions, memory = pending.pop()
            moved = False
            for r, (n, counters) in enumerate(positions):
                for b, at in enumerate(counters):
                    steps = programs[r, n, b] if n < len(self.calls) else ()
                    if at == len(steps):
                        continue
                    after, passed = self._run(steps[at], r, memory, cells)
                    if after is None:
                        continue
                    moved = True
                    following = self._advance(programs, r, n, counters, b, 1 + passed)
                    state = (positions[:r] + (following,) + positions[r + 1 :], after)
                    if state not in seen:
                        seen.add(state)
                        pending.append(state)
            assert moved or all(n == len(self.calls) for n, _ in positions), f"deadlock at {positions}"
            assert len(seen) < limit, "the model is too large"
        return len(seen)

    def _advance(self, programs, r, n, counters, b, by):
        counters = counters[:b] + (counters[b] + by,) + counters[b + 1 :]
        if all(at == len(programs[r, n, k]) for k, at in enumerate(counters)):  # kernel boundary: all blocks are done
            following = self.calls[n + 1].grid(r) if n + 1 < len(self.calls) else 0
            return (n + 1, (0,) * following)
        return (n, counters)

    def _run(self, step, r, memory, cells):
        """Memory after the step, or None if it has to wait; how many of the following steps are passed over."""
        kind, operands = step[0], step[1]
        if kind == "recall":
            assert memory[cells["record", r, operands]] == step[2], "a block remembers another past"
            return memory, 0
        if kind == "take":
            if memory[cells[operands]] != step[2]:  # another block was first
                return memory, step[3]
            return self._changed(memory, cells, [(operands, step[2] + 1)]), 0
        if kind == "count":
            count, total = memory[cells[operands]] + 1, step[2]
            whole = 0 if self.rules.counts_return_to_zero else count
            return self._changed(memory, cells, [(operands, whole if count == total else count)]), int(count != total)
        if kind == "leave":
            count = memory[cells[operands]] + 1
            last = count == step[2]
            return self._changed(memory, cells, [(operands, 0 if last else count), *(step[3] if last else ())]), 0
        if kind == "wait":
            return (memory if all(memory[cells[key]] >= value for key, value in operands) else None), 0
        if kind in ("see", "poll"):
            values = [memory[cells[key]] for key, _ in operands]
            if kind == "poll" and EMPTY in values:
                return None, 0
            for value, (key, expected) in zip(values, operands, strict=True):
                assert value == expected, f"rank {r} found {value} instead of {expected} at {key}"
            return memory, 0
        if kind == "push":
            for key, _ in operands:
                assert memory[cells[key]] == EMPTY, f"rank {r} overwrites data at {key}"
        return self._changed(memory, cells, operands), 0

    @staticmethod
    def _changed(memory, cells, operands):
        changed = list(memory)
        for key, value in operands:
            changed[cells[key]] = value
        return tuple(changed)


ONE, ONE_WIDE = Call("one_shot", 1, 2), Call("one_shot", 2, 3)
TWO, TWO_WIDE = Call("two_shot", 1, 3), Call("two_shot", 2, 4)
SMALL, WIDE = Call("lamport", 1, 1), Call("lamport", 2, 3)
GEMM = Call("local", 1, 4)
LINEAR, LINEAR_WIDE = Call("linear", 1, 3), Call("linear", (2, 1), 2)

SEQUENCES = {
    "one-shot of changing grids": [ONE, ONE_WIDE, ONE, ONE_WIDE, ONE_WIDE],
    "two-shot of changing grids": [TWO_WIDE, TWO, TWO_WIDE, TWO],
    "all algorithms": [ONE_WIDE, TWO_WIDE, SMALL, ONE, WIDE, TWO],
    "flagged calls around Lamport": [ONE, SMALL, ONE_WIDE, SMALL, ONE],
    "Lamport of changing sizes": [WIDE, SMALL, WIDE, WIDE, SMALL, WIDE],
    "registered one-shot": [GEMM, Call("registered_one_shot", 2, 4), GEMM, Call("registered_one_shot", 1, 4), GEMM],
    "registered two-shot": [GEMM, Call("registered_two_shot", 2, 4), GEMM, Call("registered_two_shot", 1, 4), GEMM],
    "matmuls that all-reduce": [LINEAR, LINEAR, LINEAR],
    "the same with more blocks": [LINEAR_WIDE, Call("linear", (1, 2), 1)],
    "the same with other tiles on each rank": [Call("linear", (1, 2), 3, (3, 1)), Call("linear", 1, 2, (1, 2))],
    "among others": [ONE, LINEAR, SMALL, TWO, LINEAR, ONE],
    "registered and staged": [GEMM, Call("registered_one_shot", 1, 4), TWO_WIDE, ONE, GEMM, TWO],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_two_ranks_never_see_wrong_data(name):
    assert Model(2, SEQUENCES[name]).explore() > 100


@pytest.mark.parametrize(
    "calls",
    [
        [ONE, Call("two_shot", 1, 3), ONE, SMALL],
        [SMALL, Call("lamport", 1, 2), SMALL, SMALL],
        [Call("linear", 1, 1), Call("linear", 1, 2)],
    ],
    ids=["flags", "lamport", "linear"],
)
def test_three_ranks_never_see_wrong_data(calls):
    assert Model(3, calls).explore() > 100


BROKEN = {
    "one half": (replace(Rules(), half_of=lambda call: 0), [ONE, ONE, ONE]),
    "no exchange": (replace(Rules(), first_exchange=False), [ONE, ONE]),
    "two Lamport buffers": (
        replace(Rules(), lamport_buffer=lambda call: call % 2, lamport_emptied=lambda call: (call + 1) % 2),
        [SMALL] * 4,
    ),
    "the buffer of two calls ago is emptied": (
        replace(Rules(), lamport_emptied=lambda call: (call + 1) % 3),
        [SMALL] * 5,
    ),
    "a block keeps only its own record": (
        replace(Rules(), advances=lambda block, blocks, other: block == other),
        [ONE, ONE_WIDE],
    ),
    "a registered input may be overwritten at once": (
        replace(Rules(), end_exchange=False),
        [GEMM, Call("registered_one_shot", 1, 4), GEMM, Call("registered_one_shot", 1, 4)],
    ),
    "one half for matmuls": (replace(Rules(), half_of=lambda call: 0), [LINEAR, LINEAR]),
    "one half for matmuls after others": (replace(Rules(), half_of=lambda call: 0), [ONE, LINEAR]),
    "flags without the number of the call": (
        replace(Rules(), signal_value=lambda call, phase: phase + 1),
        [LINEAR] * 3,
    ),
    "a flag for every tile": (replace(Rules(), tiles_are_counted=False), [LINEAR]),
    "tiles are counted through the calls": (replace(Rules(), counts_return_to_zero=False), [LINEAR, LINEAR]),
    "every block keeps its own records": (replace(Rules(), last_block_keeps_records=False), [LINEAR_WIDE]),
    "nobody waits for tiles": (replace(Rules(), waits_for_arrival=False), [LINEAR]),
    "nobody waits for sums": (replace(Rules(), waits_for_reduction=False), [LINEAR]),
    "rows are pulled before others are reduced": (replace(Rules(), order="multiply, pull, reduce"), [LINEAR]),
    "rows are reduced before others are multiplied": (replace(Rules(), order="reduce, multiply, pull"), [LINEAR]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_model_notices_a_broken_rule(name):
    rules, calls = BROKEN[name]
    with pytest.raises(AssertionError, match=r"instead of|overwrites|remembers|deadlock"):
        Model(2, calls, rules).explore()
