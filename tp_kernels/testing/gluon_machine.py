"""Runs the source of warp-specialised Gluon kernels on the CPU, in numpy, to find what a compiler cannot.

Gluon has no interpreter. Here every partition is a Python thread that executes the kernel's own source with these
stand-ins for the language; one thread runs at a time, and a seeded random choice at every synchronising call decides
who goes on. What the hardware does in its own time happens as late as it may, or at a random moment before:

* a TMA copy into shared memory leaves NaN until it arrives, so reading before its barrier completes shows;
* a wgmma reads its operands only when somebody waits for it (or earlier, at random), so a slot handed back too soon,
  and then refilled with NaN, shows;
* a TMA store reads shared memory only when somebody waits for it; storing without a fence before it is an error;
* partitions that all wait for each other are an error, as are more arrivals than a barrier expects.
"""

from __future__ import annotations

import random
import threading
import types
from typing import Any

import numpy as np

__all__ = ["Descriptor", "Machine", "Pointer"]


class _Stopped(Exception):
    """Another partition has failed."""


class Number(int):
    """An integer with the ``to`` of a run-time value."""

    def to(self, _dtype):
        return self


def _closed(name):
    plain = getattr(int, name)

    def operation(self, other):
        result = plain(self, other)
        return Number(result) if type(result) is int else result

    return operation


for _name in ("add", "sub", "mul", "floordiv", "mod", "xor", "and", "or"):
    for _full in (f"__{_name}__", f"__r{_name}__"):
        setattr(Number, _full, _closed(_full))


class Tensor(np.ndarray):
    """Values in registers."""

    def to(self, dtype):
        return self.astype(dtype if dtype in (np.int64, np.float32) else np.float32).view(Tensor)


def tensor(values):
    return np.asarray(values).view(Tensor)


class Pointer:
    """The start of a flat array, plus offsets."""

    def __init__(self, array, offset=0):
        self.array, self.offset = array, offset

    def __add__(self, other):
        return Pointer(self.array, self.offset + np.asarray(other))


class Memory:
    """Shared memory, or a view of it; ``base`` is the whole allocation."""

    def __init__(self, machine, array, base=None):
        self.machine, self.array, self.base = machine, array, array if base is None else base
        self.dtype = np.float32
        self.shape = array.shape

    def index(self, i):
        return Memory(self.machine, self.array[int(i)], self.base)

    def reshape(self, shape):
        return Memory(self.machine, self.array.reshape(shape), self.base)

    def permute(self, order):
        return Memory(self.machine, self.array.transpose(order), self.base)

    def load(self, _layout):
        return tensor(self.array.copy())

    def store(self, values):
        self.array[...] = values
        self.machine.partition().unfenced.append(self.array)


class Barrier:
    """An mbarrier: a phase completes when its arrivals and its bytes are all there."""

    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0

    def settle(self):
        assert self.pending >= 0, "more arrivals than the barrier expects"
        assert self.bytes >= 0, "more bytes than were announced"
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class Barriers(list):
    def index(self, i):
        return self[int(i)]


class Descriptor:
    """A tensor descriptor: blocks are cut at the tensor's edges, and filled up with zeros when they are read."""

    def __init__(self, array, block_shape):
        self.array, self.block_shape = array, tuple(block_shape)
        self.dtype, self.layout = np.float32, None
        self.block_type = types.SimpleNamespace(nbytes=int(np.prod(block_shape)) * 4)

    def _inside(self, at):
        low = [int(c) for c in at]
        assert all(c >= 0 for c in low)
        high = [min(c + b, n) for c, b, n in zip(low, self.block_shape, self.array.shape, strict=True)]
        high = [max(a, b) for a, b in zip(low, high, strict=True)]
        return tuple(map(slice, low, high)), tuple(slice(0, b - a) for a, b in zip(low, high, strict=True))

    def read(self, at):
        block = np.zeros(self.block_shape, np.float32)
        outside, inside = self._inside(at)
        block[inside] = self.array[outside]
        return block

    def write(self, at, block):
        outside, inside = self._inside(at)
        self.array[outside] = block[inside]


class Product:
    """A wgmma in flight; ``value`` is there once somebody has waited."""

    def __init__(self, a, b, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc, self.value = a, b, acc, use_acc, None

    def run(self):
        a = self.a.array if isinstance(self.a, Memory) else self.a
        old = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = tensor(np.asarray(a, np.float32) @ self.b.array + (old if self.use_acc else 0.0))


class Partition(threading.Thread):
    """A group of warps: a thread, what it has in flight, and what it is waiting for."""

    def __init__(self, machine, function, args):
        super().__init__(daemon=True)
        self.machine, self.function, self.args = machine, function, args
        self.products, self.stores, self.unfenced = [], [], []
        self.condition = lambda: True
        self.error, self.done = None, False
        self.go = threading.Semaphore(0)

    def run(self):
        self.go.acquire()
        try:
            if not self.machine.failed:
                with np.errstate(all="ignore"):
                    self.function(*self.args)
                assert not self.products, "a product was never waited for"
                assert not self.stores, "a store was never waited for"
        except BaseException as error:
            self.error = error
        self.done = True
        self.machine.pass_on()


class Machine:
    """Runs kernels over a grid.

    Args:
        seed: of the order in which partitions and copies go on.
        names: replaces what the modules of the kernel call by those names, e.g. ``ROWS=2`` for tiny tiles.
    """

    def __init__(self, seed: int = 0, **names: Any) -> None:
        self.random = random.Random(seed)
        self.names = {**self._stand_ins(), **names}
        self.functions = {}
        self.parts, self.copies, self.failed = [], [], None
        self.program, self.programs = 0, 1

    # -- threads --

    def partition(self):
        return threading.current_thread()

    def pass_on(self):
        """Let the hardware do some of its work, then let a random partition that need not wait go on."""
        while True:
            if self.copies and self.random.random() < 0.5:
                self.copies.pop(self.random.randrange(len(self.copies)))()
            alive = [p for p in self.parts if not p.done]
            errors = [p.error for p in self.parts if p.error is not None]
            if errors or not alive:
                self.failed = self.failed or next((e for e in errors if not isinstance(e, _Stopped)), None)
                for p in alive:
                    p.condition = lambda: True
                if not alive:
                    self.finished.release()
                    return
                alive[0].go.release()
                return
            ready = [p for p in alive if p.condition()]
            if ready:
                self.random.choice(ready).go.release()
                return
            if not self.copies:
                self.failed = AssertionError("deadlock: every partition waits")
                for p in alive:
                    p.condition = lambda: True

    def wait_until(self, condition=lambda: True):
        me = self.partition()
        me.condition = condition
        while me.products and self.random.random() < 0.3:
            me.products.pop(0).run()
        self.pass_on()
        me.go.acquire()
        if self.failed:
            raise _Stopped

    # -- the language --

    def _stand_ins(self):
        def fill(shape, value, dtype=np.float32, layout=None):
            return tensor(np.full([int(n) for n in shape], value, dtype))

        def load(pointer):
            if np.ndim(pointer.offset) == 0:
                return Number(pointer.array[int(pointer.offset)])
            return tensor(pointer.array[pointer.offset])

        def store(pointer, value, mask):
            where = np.broadcast_to(mask, np.broadcast(pointer.offset, value).shape)
            offsets = np.broadcast_to(pointer.offset, where.shape)[where]
            assert len(np.unique(offsets)) == len(offsets)
            pointer.array[offsets] = np.broadcast_to(value, where.shape)[where]

        def allocate(dtype, shape, layout):
            if dtype is np.int64:
                return Barriers(Barrier() for _ in range(shape[0]))
            return Memory(self, np.full([int(n) for n in shape], np.nan, np.float32))

        def specialize(functions_and_args, worker_warps, worker_registers):
            assert len(functions_and_args) - 1 == len(worker_warps) == len(worker_registers)
            self.parts = [Partition(self, function, args) for function, args in functions_and_args]
            self.finished = threading.Semaphore(0)
            for p in self.parts:
                p.start()
            self.pass_on()
            self.finished.acquire()
            for p in self.parts:
                p.join()
            if self.failed:
                raise self.failed
            assert not self.copies, "a copy was never waited for"

        language = types.SimpleNamespace(
            constexpr=None, float32=np.float32, int64=np.int64, zeros=lambda s, d, layout: fill(s, 0, d), full=fill,
            zeros_like=np.zeros_like, arange=lambda a, b, layout: tensor(np.arange(a, b)), load=load, store=store,
            where=lambda c, a, b: tensor(np.where(c, a, b)) if np.ndim(c) else (a if c else b),
            maximum=np.maximum, minimum=np.minimum, max=lambda x, axis: x.max(axis), sum=lambda x, axis: x.sum(axis),
            exp2=np.exp2, log2=np.log2, convert_layout=lambda x, layout: x, static_range=range,
            cdiv=lambda a, b: -(-a // b), program_id=lambda axis: Number(self.program),
            num_programs=lambda axis: Number(self.programs), allocate_shared_memory=allocate,
            warp_specialize=specialize, SliceLayout=lambda *a: None, DotOperandLayout=lambda *a: None,
            BlockedLayout=lambda *a: None,
        )  # fmt: skip

        def wait(bar, phase):
            assert phase in (0, 1)
            self.wait_until(lambda: bar.phase != phase)

        def expect(bar, size):
            bar.bytes += size
            bar.pending -= 1
            bar.settle()

        def arrive(bar):
            bar.pending -= 1
            bar.settle()
            self.wait_until()

        def init(bar, count):
            bar.count = bar.pending = count

        def copy_in(desc, at, bar, memory):
            assert memory.array.shape == desc.block_shape
            memory.array[...] = np.nan

            def deliver():
                memory.array[...] = desc.read(at)
                bar.bytes -= desc.block_type.nbytes
                bar.settle()

            self.copies.append(deliver)
            self.wait_until()

        def copy_out(desc, at, memory):
            assert not any(np.shares_memory(memory.array, dirty) for dirty in self.partition().unfenced), "no fence"
            self.partition().stores.append(lambda: desc.write(at, memory.array))

        def store_wait(pendings):
            while len(self.partition().stores) > pendings:
                self.partition().stores.pop(0)()

        def fence():
            if isinstance(self.partition(), Partition):
                self.partition().unfenced.clear()

        def mma(a, b, acc, use_acc=True, is_async=False):
            assert is_async
            assert not any(np.shares_memory(b.array, dirty) for dirty in self.partition().unfenced), "no fence"
            self.partition().products.append(Product(a, b, acc, use_acc))
            return self.partition().products[-1]

        def mma_wait(outstanding, deps):
            self.wait_until()
            while len(self.partition().products) > outstanding:
                self.partition().products.pop(0).run()
            values = tuple(d.value if isinstance(d, Product) else d for d in deps)
            assert all(v is not None for v in values), "read before the wait for it"
            return values if len(values) > 1 else values[0]

        return {
            "gl": language,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None, init=init, wait=wait, expect=expect, arrive=arrive
            ),
            "tma": types.SimpleNamespace(
                async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=store_wait
            ),
            "fence_async_shared": fence,
            "warpgroup_mma": mma,
            "warpgroup_mma_wait": mma_wait,
        }

    def translate(self, kernel: Any) -> types.FunctionType:
        """The plain Python function behind a ``@gluon.jit`` function, with the stand-ins as its globals."""
        if kernel not in self.functions:
            scope = dict(kernel.fn.__globals__)
            function = types.FunctionType(kernel.fn.__code__, scope, kernel.fn.__name__, kernel.fn.__defaults__)
            self.functions[kernel] = function
            for name, value in list(scope.items()):
                if hasattr(value, "fn") and hasattr(value, "arg_names"):
                    scope[name] = self.translate(value)
            scope.update(self.names)
        return self.functions[kernel]

    def launch(self, kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
        """Run ``programs`` blocks of threads, one after the other."""
        function = self.translate(kernel)
        self.programs = programs
        for self.program in range(programs):
            function(*args, **constexprs)
