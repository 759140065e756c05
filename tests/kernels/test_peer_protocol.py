"""A model of how the peer-memory kernels wait for each other, run through all interleavings. Tier: no device.

The model knows ranks, blocks, kernels in stream order, flags, staging halves, registered tensors and Lamport buffers
(csrc/kernels/peer_sync.cuh). Halves, flag values, buffers, slices and which block keeps whose record come from the
functions that the kernels use. A step is what a block does between two waits on one kind of memory; every read asserts
that it sees the value of its own call, every push that its place is empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from tp_kernels._native import native

EMPTY = 0


@dataclass(frozen=True)
class Call:
    """One kernel on every rank: ``kind``, its grid and how many packs it moves."""

    kind: str
    blocks: int
    units: int


@dataclass
class Rules:
    """What the kernels decide by; a test replaces one rule to see that the model notices."""

    half_of: object = native.cuda_peer_half_of
    lamport_buffer: object = native.cuda_peer_lamport_buffer
    lamport_emptied: object = native.cuda_peer_lamport_emptied
    advances: object = native.cuda_peer_advances
    end_exchange: bool = True
    first_exchange: bool = True


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
        flagged = sum(c.kind not in ("lamport", "local") for c in self.calls[:number])
        lamports = [c for c in self.calls[:number] if c.kind == "lamport"]
        last = lamports[-1].units if lamports else 0
        half, peers = rules.half_of(flagged), [p for p in range(self.world) if p != rank]
        tag, everyone = self.tag(number), range(self.world)
        mine = self.units_of(call, block, 1, 0)
        steps: list[tuple] = [("recall", block, (flagged, len(lamports), last))]

        def exchange(phase: int) -> None:
            value = native.cuda_peer_signal_value(flagged, phase)
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

    def explore(self, limit: int = 2_000_000) -> int:
        """Number of states; AssertionError at the first wrong value or deadlock in any of them."""
        programs = {
            (r, n, b): self.program(r, n, b)
            for r in range(self.world)
            for n, call in enumerate(self.calls)
            for b in range(call.blocks)
        }
        cells: dict[tuple, int] = {}
        for steps in programs.values():
            for step in steps:
                for key, _ in step[1] if step[0] != "recall" else ():
                    cells.setdefault(key, len(cells))
        for r in range(self.world):
            for b in range(self.max_blocks):
                cells.setdefault(("record", r, b), len(cells))
        start = [0] * len(cells)
        for key, index in cells.items():
            if key[0] == "record":
                start[index] = (0, 0, 0)
        first = tuple((0, (0,) * self.calls[0].blocks) for _ in range(self.world))
        pending, seen = [(first, tuple(start))], {(first, tuple(start))}
        while pending:
            positions, memory = pending.pop()
            moved = False
            for r, (n, counters) in enumerate(positions):
                for b, at in enumerate(counters):
                    steps = programs[r, n, b] if n < len(self.calls) else ()
                    if at == len(steps):
                        continue
                    after = self._run(steps[at], r, memory, cells)
                    if after is None:
                        continue
                    moved = True
                    state = (positions[:r] + (self._advance(programs, r, n, counters, b),) + positions[r + 1 :], after)
                    if state not in seen:
                        seen.add(state)
                        pending.append(state)
            assert moved or all(n == len(self.calls) for n, _ in positions), f"deadlock at {positions}"
            assert len(seen) < limit, "the model is too large"
        return len(seen)

    def _advance(self, programs, r, n, counters, b):
        counters = counters[:b] + (counters[b] + 1,) + counters[b + 1 :]
        if all(at == len(programs[r, n, k]) for k, at in enumerate(counters)):  # kernel boundary: all blocks are done
            following = self.calls[n + 1].blocks if n + 1 < len(self.calls) else 0
            return (n + 1, (0,) * following)
        return (n, counters)

    @staticmethod
    def _run(step, r, memory, cells):
        """Memory after the step, or None if it has to wait."""
        kind, operands = step[0], step[1]
        if kind == "recall":
            assert memory[cells["record", r, operands]] == step[2], "a block remembers another past"
            return memory
        if kind == "wait":
            return memory if all(memory[cells[key]] >= value for key, value in operands) else None
        if kind in ("see", "poll"):
            values = [memory[cells[key]] for key, _ in operands]
            if kind == "poll" and EMPTY in values:
                return None
            for value, (key, expected) in zip(values, operands, strict=True):
                assert value == expected, f"rank {r} found {value} instead of {expected} at {key}"
            return memory
        changed = list(memory)
        for key, value in operands:
            if kind == "push":
                assert changed[cells[key]] == EMPTY, f"rank {r} overwrites data at {key}"
            changed[cells[key]] = value
        return tuple(changed)


ONE, ONE_WIDE = Call("one_shot", 1, 2), Call("one_shot", 2, 3)
TWO, TWO_WIDE = Call("two_shot", 1, 3), Call("two_shot", 2, 4)
SMALL, WIDE = Call("lamport", 1, 1), Call("lamport", 2, 3)
GEMM = Call("local", 1, 4)

SEQUENCES = {
    "one-shot of changing grids": [ONE, ONE_WIDE, ONE, ONE_WIDE, ONE_WIDE],
    "two-shot of changing grids": [TWO_WIDE, TWO, TWO_WIDE, TWO],
    "all algorithms": [ONE_WIDE, TWO_WIDE, SMALL, ONE, WIDE, TWO],
    "flagged calls around Lamport": [ONE, SMALL, ONE_WIDE, SMALL, ONE],
    "Lamport of changing sizes": [WIDE, SMALL, WIDE, WIDE, SMALL, WIDE],
    "registered one-shot": [GEMM, Call("registered_one_shot", 2, 4), GEMM, Call("registered_one_shot", 1, 4), GEMM],
    "registered two-shot": [GEMM, Call("registered_two_shot", 2, 4), GEMM, Call("registered_two_shot", 1, 4), GEMM],
    "registered and staged": [GEMM, Call("registered_one_shot", 1, 4), TWO_WIDE, ONE, GEMM, TWO],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_two_ranks_never_see_wrong_data(name):
    assert Model(2, SEQUENCES[name]).explore() > 100


@pytest.mark.parametrize(
    "calls",
    [[ONE, Call("two_shot", 1, 3), ONE, SMALL], [SMALL, Call("lamport", 1, 2), SMALL, SMALL]],
    ids=["flags", "lamport"],
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
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_model_notices_a_broken_rule(name):
    rules, calls = BROKEN[name]
    with pytest.raises(AssertionError, match=r"instead of|overwrites|remembers|deadlock"):
        Model(2, calls, rules).explore()
