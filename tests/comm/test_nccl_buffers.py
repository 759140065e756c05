"""How ranks agree on memory registered with NCCL, and who keeps it, with an NCCL of make-believe. Tier: no device.

The native part of it is tested in test_nccl_communicator.py.
"""

import gc
import threading
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tp_kernels.comm import nccl, nccl_buffers
from tp_kernels.comm.errors import CommError, CommTimeoutError
from tp_kernels.comm.nccl_buffers import Buffers, close
from tp_kernels.comm.nccl_peers import Peers

CPU = torch.device("cpu")
NOTHING, LOCAL, WINDOW = 0, 1, 2


class Memory:
    """Stands in for _native.NcclMemory."""

    def __init__(self, nbytes):
        self._bytes = np.zeros(nbytes, dtype=np.uint8)
        self.address = self._bytes.ctypes.data
        self.streams = []

    def used_on(self, stream):
        self.streams.append(stream)


class Native:
    """Stands in for _native.NcclCommunicator: the calls that concern memory."""

    def __init__(self, kind=WINDOW, allocates=True, registers=True, ends=True):
        self.kind, self.allocates, self.registers, self.ends = kind, allocates, registers, ends
        self.known, self.calls, self.memory = set(), [], None

    def allocate(self, nbytes):
        if not self.allocates:
            raise CommError("ncclMemAlloc: out of memory")
        made = Memory(nbytes)
        self.memory = weakref.ref(made)
        return made

    def register(self, address, nbytes, window, memory, timeout):
        self.calls.append(("register", nbytes, window))
        if not self.registers:
            raise CommError("ncclCommRegister: no such thing")
        if self.kind:
            self.known.add(address)
        return self.kind

    def deregister(self, address, timeout):
        self.calls.append(("deregister",))
        if not self.ends:
            raise CommTimeoutError("collectives are still in flight")
        self.known.remove(address)

    def close(self, grace):
        self.calls.append(("close",))
        if self.ends:
            self.known.clear()

    @property
    def registrations(self):
        return len(self.known)


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    def tensor_over(memory, nbytes, device):
        owner = nccl_buffers._Owner(memory, nbytes)
        owner.__array_interface__ = owner.__cuda_array_interface__
        return torch.as_tensor(np.asarray(owner))

    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(nccl_buffers, "_tensor_over", tensor_over)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(nccl_buffers, "_kept", [])


def on_ranks(natives, work):
    """``work(buffers, rank)`` on threads that are ranks; returns results or exceptions."""
    store, results = dist.HashStore(), [None] * len(natives)

    def run(rank):
        try:
            peers = Peers(store, rank, len(natives), "g", {}, 10.0)
            results[rank] = work(Buffers(natives[rank], peers, CPU), rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(natives))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def make(buffers, rank, warm_up=lambda base: None):
    return buffers.make(4096, warm_up, 5.0), buffers


def test_a_buffer_that_all_ranks_have():
    warmed = []
    natives = [Native(), Native()]
    for native, (works, buffers) in zip(
        natives, on_ranks(natives, lambda b, r: make(b, r, warmed.append)), strict=True
    ):
        assert works and "4 KiB, registered as a window" in buffers.state
        assert native.calls == [("register", 4096, True)]
        x = buffers.view((3, 5), torch.float32, "input")
        assert x.shape == (3, 5) and x.data_ptr() == native.memory().address and x.is_contiguous()
        assert buffers.view((3, 5), torch.float32, "input") is x
        assert buffers.view((2,), torch.bfloat16, "input").data_ptr() == x.data_ptr()
        assert buffers.view((0, 5), torch.float32, "input").shape == (0, 5)
        assert (
            buffers.view((1025,), torch.float32, "input") is None and buffers.view((1,), torch.int8, "output") is None
        )
        assert set(native.memory().streams) == {7}
        with pytest.raises(ValueError, match="'input' or 'output'"):
            buffers.view((1,), torch.int8, "both")
    assert len(warmed) == 2 and all((base == 0).all() for base in warmed)


def test_views_keep_the_memory_after_the_communicator_is_closed():
    native = Native()
    _, buffers = on_ranks([native], make)[0]
    x = buffers.view((8,), torch.float32, "input").fill_(3.0)
    close(native, buffers, 1.0)
    gc.collect()
    assert native.calls[-1] == ("close",) and buffers.view((8,), torch.float32, "input") is None
    assert native.memory() is not None and x.sum() == 24
    del x
    gc.collect()
    assert native.memory() is None


@pytest.mark.parametrize(
    "one", [{"allocates": False}, {"registers": False}, {"kind": NOTHING}, {"kind": LOCAL}], ids=str
)
def test_what_one_rank_lacks_none_uses(one):
    natives = [Native(), Native(**one), Native()]
    results = on_ranks(natives, make)
    for native, (works, buffers) in zip(natives, results, strict=True):
        # A registration that failed may have left the communicator broken; the rest has not touched it.
        assert works == ("registers" not in one)
        assert "rank 1" in buffers.state and buffers.state.startswith("none (")
        assert buffers.view((1,), torch.int8, "input") is None
        if works:
            assert native.registrations == 0
        del buffers
    del results, works
    gc.collect()
    assert all(native.memory is None or native.memory() is None for native in natives)


def test_a_buffer_that_collectives_refuse_is_not_used():
    def warm_up(base):
        raise CommError("all_reduce: unhandled cuda error")

    natives = [Native(), Native()]
    results = on_ranks(natives, lambda b, rank: make(b, rank, warm_up if rank else lambda base: None))
    assert [works for works, _ in results] == [False, False]
    assert all(buffers.state == "none (rank 1: all_reduce: unhandled cuda error)" for _, buffers in results)


def test_a_rank_that_does_not_come_is_named():
    def work(buffers, rank):
        return rank or buffers.make(4096, lambda base: None, 0.3)

    error = on_ranks([Native(), Native()], work)[0]
    assert isinstance(error, CommTimeoutError) and error.ranks == (1,)


def test_tensors_of_the_user():
    natives = [Native(LOCAL), Native(LOCAL)]

    def work(buffers, rank):
        whole = torch.zeros(10)
        buffers.register(whole[3:], 5.0)  # all of its storage
        assert natives[rank].calls == [("register", 40, False)] and natives[rank].known == {whole.data_ptr()}
        with pytest.raises(ValueError, match="registered already"):
            buffers.register(whole, 5.0)
        with pytest.raises(ValueError, match=r"rank 0: expected a tensor on cpu, got one on meta; rank 1"):
            buffers.register(torch.zeros(3, device="meta"), 5.0)
        with pytest.raises(ValueError, match="no memory"):
            buffers.register(torch.zeros(0), 5.0)
        with pytest.raises(ValueError, match="not registered"):
            buffers.deregister(torch.zeros(4), 5.0)
        buffers.deregister(whole[5:], 5.0)
        assert natives[rank].registrations == 0
        buffers.register(whole, 5.0)
        close(natives[rank], buffers, 1.0)
        return len(nccl_buffers._kept)

    assert on_ranks(natives, work) == [0, 0]


def test_a_tensor_is_registered_on_all_ranks_or_none():
    natives = [Native(LOCAL), Native(NOTHING), Native(LOCAL)]

    def work(buffers, rank):
        with pytest.raises(ValueError, match="rank 1: NCCL accepted the memory without registering it"):
            buffers.register(torch.zeros(4), 5.0)
        return natives[rank].registrations, len(buffers._storages)

    assert on_ranks(natives, work) == [(0, 0)] * 3


def test_memory_that_nccl_does_not_let_go_of_is_kept():
    native = Native(LOCAL, ends=False)

    def work(buffers, rank):
        x = torch.zeros(4)
        buffers.register(x, 5.0)
        with pytest.raises(CommTimeoutError):
            buffers.deregister(x, 0.1)
        close(native, buffers, 1.0)
        return x.data_ptr()

    address = on_ranks([native], work)[0]
    assert [storage.data_ptr() for storage in nccl_buffers._kept] == [address]


def test_nothing_is_registered_in_a_capture(monkeypatch):
    native = Native(LOCAL)

    def work(buffers, rank):
        x = torch.zeros(4)
        buffers.register(x, 5.0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for call, y in ((buffers.register, torch.zeros(3)), (buffers.deregister, x)):
            with pytest.raises(ValueError, match="cannot be captured"):
                call(y, 5.0)

    assert on_ranks([native], work) == [None] and native.registrations == 1


# --- creation of the communicator ------------------------------------------------------------------------------------


@pytest.fixture
def create(monkeypatch):
    """``create(kinds, **options)``: a communicator for every kind of registration, or what its creation raised."""
    made = []

    class Connection(Native):
        stream = 0

        def __init__(self, hint, rank, world_size, device, name):
            super().__init__(kinds_of[rank] or NOTHING, registers=kinds_of[rank] is not None)
            made.append(self)

        def start(self, unique_id, max_ctas, blocking):
            self.max_ctas = max_ctas

        def poll(self):
            return True

        def run(self, *call):
            self.calls.append(("run", *call[:4]))

        def done(self, handle):
            return True

        def abort(self, why):
            self.calls.append(("abort", why))

    kinds_of = []
    monkeypatch.setattr(nccl, "native", mock.Mock(NcclCommunicator=Connection))
    monkeypatch.setattr(nccl, "require_cuda", lambda who: None)
    monkeypatch.setattr(nccl, "cuda_device", lambda device: CPU)
    monkeypatch.setattr(
        nccl, "own_facts", lambda rank, options: {"error": "", "version": 0, "id": "", "options": options}
    )
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: stream)

    def create(kinds, **options):
        kinds_of[:] = kinds
        store, results = dist.HashStore(), [None] * len(kinds)

        def run(rank):
            mine = {name: value[rank] if isinstance(value, list) else value for name, value in options.items()}
            try:
                results[rank] = nccl.NCCLCommunicator.create(rank, len(kinds), "g", store, CPU, timeout=5.0, **mine)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(kinds))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results, made

    return create


def test_a_communicator_with_a_buffer(create):
    results, made = create([WINDOW, WINDOW], registered_buffers=True, buffer_bytes=4096, max_ctas=8)
    assert [native.max_ctas for native in made] == [8, 8]
    for communicator in results:
        x = communicator.get_buffer((10,), torch.float32)
        runs = [call for call in communicator._native.calls if call[0] == "run" and call[2] == x.data_ptr()]
        assert [call[4] for call in runs] == [[1], [1024]]  # a short and a long one, made before any capture
        assert communicator.describe()[0] == "nccl: a collective takes at most 8 SMs (max_ctas)"
        assert "4 KiB, registered as a window" in communicator.describe()[1]
        communicator.close()
        assert communicator._native.registrations == 0


def test_without_registration_the_communicator_works_all_the_same(create):
    for kinds, communicators in (([WINDOW, NOTHING], 2), ([WINDOW, None], 4)):
        results, made = create(kinds, registered_buffers=True, buffer_bytes=4096, max_ctas=8)
        # After an error there are new ones: the old may be broken.
        assert len(made) == communicators and all(native.max_ctas == 8 for native in made)
        assert all(("close",) in native.calls for native in made[: communicators - 2])
        for communicator in results:
            assert communicator.get_buffer((1,), torch.float32) is None
            assert ("close",) not in communicator._native.calls and "rank 1: " in communicator.describe()[1]
            communicator.close()
        made.clear()
    results, _ = create([WINDOW, WINDOW])
    assert results[0].describe() == [
        "nccl: a collective takes as many SMs as NCCL likes",
        "nccl: registered buffer: none (registered_buffers=False)",
    ]


def test_options_that_differ_are_an_error_on_all_ranks(create):
    for options in ({"max_ctas": [8, 4]}, {"registered_buffers": [True, False]}, {"buffer_bytes": [1, 2]}):
        results, made = create([WINDOW, WINDOW], **options)
        assert all(
            isinstance(error, ValueError) and f"the same {next(iter(options))}" in str(error) for error in results
        )
        assert not made
