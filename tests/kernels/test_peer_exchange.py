"""The PTX by which Triton's peer-memory kernels wait for each other, run by a small interpreter. Tier: no device.

The interpreter knows the instructions that ``_EXCHANGE``, ``_AWAIT`` and ``_RAISE`` use. Threads of all blocks of all
ranks take steps in random order over one memory and one clock; barriers join the threads of a block. Memory order is
not modelled: that flags are released and acquired is asserted of the compiled code in test_peer_triton.py and
test_peer_linear.py.
"""

import operator
import random
import re

import pytest

from tp_kernels.comm.symmetric_sizes import ARRIVED_OFFSET, ERROR_MAGIC, FAILED_OFFSET, MAX_WORLD
from tp_kernels.comm.symmetric_workspace import ErrorRecord
from tp_kernels.ops.kernels.peer_flags import _AWAIT, _RAISE
from tp_kernels.ops.kernels.peer_norm import _EXCHANGE

# Where those of rank 0 are, beyond 32 bits; those of the others follow.
FLAGS, RECORD, TABLE = 1 << 40, 1 << 41, 1 << 42
THREADS = 6  # of a block
COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "ge": operator.ge, "gt": operator.gt}
BITS = {"pred": 1, "s32": 32, "u32": 32, "b32": 32, "u64": 64, "b64": 64}


def parse(text):
    """(instructions as (guard, operation, operands), label -> index)."""
    program, labels = [], {}
    for line in text.strip().strip("{}").strip().splitlines():
        line = line.strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(program)
        elif not line.startswith(".reg"):
            guard, operation, operands = re.fullmatch(r"(?:@(\w+) )?([\w.]+)(?: (.*))?;", line).groups()
            program.append((guard, operation, [word.strip() for word in (operands or "").split(",")]))
    return program, labels


EXCHANGE, AWAIT, RAISE = (parse(text.value) for text in (_EXCHANGE, _AWAIT, _RAISE))


class Machine:
    """Ranks that run one exchange, or another program, each."""

    def __init__(self, world, blocks, seed, timeout=10**12):
        self.world, self.blocks, self.timeout = world, blocks, timeout
        self.random, self.clock, self.words = random.Random(seed), 0, {}
        self.stores = []
        for rank in range(world):
            for peer in range(world):
                self.words[TABLE + 4096 * rank + 8 * peer] = FLAGS + (peer << 16)
            self.words[TABLE + 4096 * rank + 8 * world] = RECORD + 64 * rank

    def signal(self, owner, block, rank):
        return FLAGS + (owner << 16) + 8 * (MAX_WORLD * block + rank)

    def failed(self, rank):
        return FLAGS + (rank << 16) + FAILED_OFFSET

    def record(self, rank):
        names = {name: getattr(ErrorRecord, name).offset for name, _ in ErrorRecord._fields_}
        return {name: self.words.get(RECORD + 64 * rank + offset, 0) for name, offset in names.items()}

    def thread(self, rank, block, number, program, operands):
        """A generator of one thread: yields None between steps and ("barrier", p) at barriers; returns "lost"."""
        special = {"%tid.x": number, "%ctaid.x": block}
        registers, (program, labels) = {"$1": TABLE + 4096 * rank, **operands}, program

        def get(word):
            if word == "%globaltimer":
                return self.clock
            return special[word] if word in special else registers[word] if word in registers else int(word)

        def address(word):
            base, _, offset = word.strip("[]").partition("+")
            return get(base) + int(offset or 0)

        at = 0
        while at < len(program):
            guard, operation, words = program[at]
            at += 1
            if guard is not None and not registers[guard]:
                continue
            kind, *modifiers = operation.split(".")
            bits = 64 if "wide" in modifiers else BITS.get(modifiers[0 if kind == "cvt" else -1] if modifiers else "")
            if kind == "bra":
                at = labels[words[0]]
                continue
            if kind == "barrier":
                registers[words[0]] = yield ("barrier", bool(get(words[2])))
                continue
            if kind == "nanosleep":
                self.clock += get(words[0])
            elif kind == "st":
                self.stores.append((rank, block, address(words[0])))
                self.words[address(words[0])] = get(words[1]) & ((1 << bits) - 1)
            else:
                registers[words[0]] = self.compute(kind, modifiers, words, get, address) & ((1 << bits) - 1)
            self.clock += 1
            yield None
        return registers["$0"]

    def compute(self, kind, modifiers, words, get, address):
        if kind == "setp":
            return COMPARE[modifiers[0]](get(words[1]), get(words[2]))
        if kind == "ld":
            return self.words.get(address(words[1]), 0)
        if kind == "atom":
            assert modifiers[-2] == "cas"
            old = self.words.get(address(words[1]), 0)
            if old == get(words[2]):
                self.words[address(words[1])] = get(words[3])
            return old
        if kind == "mad":
            return get(words[1]) * get(words[2]) + get(words[3])
        if kind == "selp":
            return get(words[1]) if get(words[3]) else get(words[2])
        a, b = get(words[1]), get(words[2]) if len(words) > 2 else 0
        return {"mov": a, "cvt": a, "add": a + b, "sub": a - b, "and": a & b, "shr": a >> b}[kind]

    def run(self, value, ranks=None, skips=(), program=EXCHANGE, **more):
        """{(rank, block): what its threads return}; ``skips``: (rank, block, thread) whose skip is set.

        ``more``: ``bits`` and ``offset`` of ``_AWAIT``; ``raising``: rank -> those of ``_RAISE``, which it then runs.
        """
        running, waiting, results = {}, {}, {}
        for rank in range(self.world) if ranks is None else ranks:
            for block in range(self.blocks):
                for number in range(THREADS):
                    key = rank, block, number
                    operands = {"$2": rank, "$3": self.world, "$4": value, "$5": self.timeout, "$6": int(key in skips)}
                    operands |= {"$7": more.get("bits"), "$8": more.get("offset")}
                    raised = more.get("raising", {}).get(rank)
                    if raised is not None:
                        operands = {"$2": self.world, "$3": raised[0], "$4": raised[1], "$5": value}
                    running[key] = self.thread(*key, program if raised is None else RAISE, operands)
        answers = dict.fromkeys(running)
        steps = 0
        while running:
            steps += 1
            assert steps < 500_000, "the waits do not end"  # 8,047 are the most that a test here takes
            key = self.random.choice(list(running))
            try:
                step = running[key].send(answers[key])
                answers[key] = None
            except StopIteration as end:
                results.setdefault(key[:2], []).append(end.value)
                del running[key]
                continue
            if step is not None:
                met = waiting.setdefault(key[:2], {})
                met[key] = (running.pop(key), step[1])
                if len(met) == THREADS:
                    joined = any(p for _, p in met.values())
                    running.update({k: generator for k, (generator, _) in met.items()})
                    answers.update(dict.fromkeys(met, joined))
                    del waiting[key[:2]]
        assert not waiting and all(len(found) == THREADS for found in results.values())
        return results


def value_of(call, phase):
    return 4 * call + phase + 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("world", "blocks"), [(2, 2), (3, 1), (5, 2)])
def test_ranks_that_come_meet(world, blocks, seed):
    machine = Machine(world, blocks, seed)
    for call, phase in ((0, 0), (0, 1), (7, 0)):
        machine.stores.clear()
        results = machine.run(value_of(call, phase))
        assert len(results) == world * blocks and all(set(found) == {0} for found in results.values())
        expected = {
            (rank, block, machine.signal(peer, block, rank))
            for rank in range(world)
            for peer in range(world)
            for block in range(blocks)
            if peer != rank
        }
        assert set(machine.stores) == expected and len(machine.stores) == len(expected)
        assert all(machine.words[at] == value_of(call, phase) for _, _, at in expected)


def test_nobody_goes_on_before_the_last_has_come():
    machine = Machine(3, 1, 0, timeout=40_000)
    results = machine.run(value_of(3, 0), ranks=(0, 1))
    assert all(set(found) == {1} for found in results.values())  # the third never came
    assert machine.clock > machine.timeout


@pytest.mark.parametrize(("call", "phase"), [(0, 0), (5, 1)])
def test_a_rank_that_does_not_come_is_named(call, phase):
    machine = Machine(3, 2, 1, timeout=20_000)
    results = machine.run(value_of(call, phase), ranks=(0, 2))
    for rank in (0, 2):
        assert results[rank, 0] == results[rank, 1] == [1] * THREADS
        record = machine.record(rank)
        assert record.pop("block") in (0, 1)
        kind = {"magic": ERROR_MAGIC, "kind": ErrorRecord.SIGNAL, "rank": 1, "waiter": rank}
        assert record == {**kind, "call": call, "phase": phase}
        assert machine.words[machine.failed(rank)] == 1
        # All of its peers had been told before.
        assert all(machine.words[machine.signal(p, 0, rank)] == value_of(call, phase) for p in range(3) if p != rank)
    assert machine.record(1)["magic"] == 0 and machine.words.get(machine.failed(1), 0) == 0


@pytest.mark.parametrize("thread", [0, THREADS - 1])
def test_a_block_of_which_one_thread_skips_sends_nothing(thread):
    machine = Machine(2, 1, 2)
    assert machine.run(value_of(0, 0), ranks=(0,), skips={(0, 0, thread)}) == {(0, 0): [1] * THREADS}
    assert not machine.stores and machine.record(0)["magic"] == 0


@pytest.mark.parametrize("by", ["host", "another block"])
def test_a_wait_can_be_ended_from_elsewhere(by):
    machine = Machine(2, 1, 3)  # the deadline is far away
    if by == "host":
        machine.words[RECORD] = ErrorRecord.STOP
    else:
        machine.words[machine.failed(0)] = 1
    assert machine.run(value_of(0, 0), ranks=(0,)) == {(0, 0): [1] * THREADS}
    record = machine.record(0)
    # The first failure of a rank writes the record, later ones leave it alone.
    assert record["magic"] == (ERROR_MAGIC if by == "host" else 0) and record["rank"] == (1 if by == "host" else 0)


# Flags of their own --------------------------------------------------------------------------------------------------


def flag(owner, offset):
    return FLAGS + (owner << 16) + offset


def test_flags_are_raised_on_the_ranks_whose_bits_are_set():
    machine, offset, value = Machine(5, 1, 0), ARRIVED_OFFSET + 8 * 7, value_of(1 << 40, 1)
    found = machine.run(value, ranks=(2,), raising={2: (0b10110, offset)})
    assert found == {(2, 0): [0] * THREADS}
    assert sorted(machine.stores) == [(2, 0, flag(owner, offset)) for owner in (1, 2, 4)]
    assert all(machine.words[flag(owner, offset)] == value for owner in (1, 2, 4))


@pytest.mark.parametrize("seed", range(3))
def test_a_wait_ends_when_all_ranks_that_count_have_raised_their_flags(seed):
    """Rank 1 waits for itself and rank 3; rank 0 is not waited for, and rank 2 raises a flag of others."""
    machine, offset, value = Machine(4, 1, seed, timeout=40_000), ARRIVED_OFFSET + 8 * 12, value_of(6, 0)
    machine.words[flag(1, offset + 8)] = value + 9  # a later one counts
    machine.words[flag(1, offset)] = machine.words[flag(1, offset + 16)] = value - 1
    raising = {2: (0b1101, offset + 16), 3: (0b0010, offset + 24)}
    found = machine.run(value, (1, 2, 3), program=AWAIT, bits=0b1010, offset=offset, raising=raising)
    assert found == {(rank, 0): [0] * THREADS for rank in (1, 2, 3)}
    assert machine.words[flag(1, offset + 24)] == value and machine.record(1)["magic"] == 0
    assert all(at != flag(1, offset + 16) for _, _, at in machine.stores)


def test_who_is_waited_for_in_vain_is_named():
    machine, offset, value = Machine(4, 2, 1, timeout=20_000), ARRIVED_OFFSET, value_of(9, 1)
    for peer in (1, 3):
        machine.words[flag(0, offset + 8 * peer)] = value
    machine.words[flag(0, offset)] = machine.words[flag(0, offset + 16)] = value - 1
    found = machine.run(value, (0,), program=AWAIT, bits=0b1110, offset=offset)
    assert found == {(0, block): [1] * THREADS for block in range(2)}
    record = machine.record(0)
    assert record.pop("block") in (0, 1)
    kind = {"magic": ERROR_MAGIC, "kind": ErrorRecord.SIGNAL, "rank": 2, "waiter": 0}
    assert record == {**kind, "call": 9, "phase": 1} and machine.words[machine.failed(0)] == 1


def test_a_wait_for_nobody_joins_what_the_threads_have_seen():
    machine = Machine(3, 2, 4)
    found = machine.run(5, (1,), skips={(1, 1, 4)}, program=AWAIT, bits=0, offset=0)
    assert found == {(1, 0): [0] * THREADS, (1, 1): [1] * THREADS} and not machine.stores
    found = machine.run(5, (1,), skips={(1, 0, 0), (1, 1, 5)}, program=AWAIT, bits=0b111, offset=ARRIVED_OFFSET)
    assert found == {(1, 0): [1] * THREADS, (1, 1): [1] * THREADS} and not machine.stores, "nor is there a failure"
