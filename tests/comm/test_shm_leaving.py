"""Leaving a shared-memory group, signals, forks and scarce descriptors: nobody hangs, nobody is blamed wrongly.

Tier: CPU ranks. Ranks are own processes here, not a pool: they are killed, and always reaped.
"""

import os
import signal
import time

import torch

from tp_kernels.comm.errors import CommError
from tp_kernels.comm.shm import SharedMemoryCommunicator
from tp_kernels.testing.shm_ranks import Ranks, report_error

LARGE = 1 << 20  # elements: many chunks

# Leaving --------------------------------------------------------------------------------------------------------------


def leave(comm, connection):
    comm.barrier()
    if comm.rank == 2:
        time.sleep(0.3)
        comm.close()
        comm.close()
        return report_error(comm, comm.barrier)
    return report_error(comm, comm.barrier)


def test_closing_while_others_wait_is_told():
    with Ranks(leave, 3) as ranks:
        ranks.ready()
        for rank in (0, 1):
            result = ranks.get(rank)
            assert result["type"] == "CommAbortedError" and result["ranks"] == (2,), result
            assert "rank 2 left the group" in result["text"]
        own = ranks.get(2)
        assert own["type"] == "CommAbortedError" and "closed" in own["text"]


def finish_and_leave(comm, connection):
    """A rank that has given all it owes may leave at once."""
    total = 0.0
    for length in (5, LARGE):
        total += comm.all_reduce(torch.ones(length))[-1].item()
    comm.close()
    return total


def test_leaving_after_the_last_call_disturbs_nobody():
    for _ in range(5):
        with Ranks(finish_and_leave, 3) as ranks:
            ranks.ready()
            assert [ranks.get(rank) for rank in range(3)] == [6.0] * 3


def close_from_another_thread(comm, connection):
    import threading

    if comm.rank == 1:
        time.sleep(1.0)
        return report_error(comm, comm.barrier)
    threading.Timer(0.3, comm.close).start()
    return report_error(comm, comm.barrier)


def test_closing_from_another_thread_ends_a_waiting_call():
    with Ranks(close_from_another_thread, 2) as ranks:
        ranks.ready()
        assert ranks.get(0)["type"] == "CommAbortedError"
        assert ranks.get(1)["type"] == "CommAbortedError"


def close_from_several_threads(comm, connection):
    import threading

    if comm.rank == 1:
        return report_error(comm, comm.barrier) if connection.poll(10) else None
    outcome = []
    waiting = threading.Thread(target=lambda: outcome.append(report_error(comm, comm.barrier)))
    waiting.start()
    time.sleep(0.05)
    closing = [threading.Thread(target=comm.close) for _ in range(8)]
    for thread in closing:
        thread.start()
    for thread in [*closing, waiting]:
        thread.join()
    return outcome[0]


def test_several_threads_may_close_while_a_call_waits():
    """The segment may be unmapped once only, and not before the call has left it."""
    with Ranks(close_from_several_threads, 2) as ranks:
        ranks.ready()
        assert ranks.get(0)["type"] == "CommAbortedError"
        ranks.connections[1].send("go")
        assert "closed during a call" in ranks.get(1)["text"]


def call_from_two_threads(comm, connection):
    import threading

    if comm.rank == 0:
        waiting = threading.Thread(target=comm.barrier)
        waiting.start()
        time.sleep(0.2)
        try:
            comm.barrier()
        except ValueError as error:
            connection.send(str(error))
        connection.recv()
        waiting.join()
    else:
        connection.recv()
        comm.barrier()
    return comm.all_reduce(torch.ones(1)).item()


def test_two_threads_at_once_are_refused_and_harm_nothing():
    with Ranks(call_from_two_threads, 2) as ranks:
        ranks.ready()
        assert "two threads" in ranks.get(0)
        for connection in ranks.connections.values():
            connection.send("go")
        assert ranks.get(0) == ranks.get(1) == 2.0


# Signals and forks ----------------------------------------------------------------------------------------------------


def be_interrupted(comm, connection):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handled = []
    signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))
    if comm.rank == 1:
        connection.recv()
    connection.send("waiting")
    result = report_error(comm, comm.barrier)
    return result | {"handled": len(handled)}


def test_ctrl_c_ends_the_wait_and_other_signals_do_not():
    with Ranks(be_interrupted, 3) as ranks:
        ranks.ready()
        assert ranks.get(0) == ranks.get(2) == "waiting"
        time.sleep(0.2)
        os.kill(ranks.processes[0].pid, signal.SIGUSR1)
        assert not ranks.connections[0].poll(0.3)
        os.kill(ranks.processes[0].pid, signal.SIGINT)
        interrupted = ranks.get(0)
        assert interrupted["type"] == "KeyboardInterrupt" and interrupted["handled"] == 1
        assert "broken" in interrupted["next"]
        other = ranks.get(2)
        assert other["type"] == "CommAbortedError" and "rank 0 was interrupted" in other["text"]
        assert other["ranks"] == (0,)
        ranks.connections[1].send("go")
        assert ranks.get(1) == "waiting"
        assert "rank 0 was interrupted" in ranks.get(1)["text"]


def close_in_a_handler(comm, connection):
    signal.signal(signal.SIGTERM, lambda *_: comm.close())
    if comm.rank == 1:
        connection.recv()
    connection.send("waiting")
    return report_error(comm, comm.barrier)


def test_a_signal_handler_may_close_the_communicator_it_interrupts():
    with Ranks(close_in_a_handler, 2) as ranks:
        ranks.ready()
        assert ranks.get(0) == "waiting"
        time.sleep(0.2)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        assert "closed during a call" in ranks.get(0, timeout=5)["text"]
        ranks.connections[1].send("go")
        assert ranks.get(1) == "waiting"
        assert ranks.get(1)["ranks"] == (0,)


def fork_and_go_on(comm, connection):
    comm.barrier()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            comm.barrier()
        except CommError as error:
            status = 0 if "forked child" in str(error) else 2
        comm.close()  # must not tell the others that the parent left
        os._exit(status)
    _, status = os.waitpid(child, 0)
    return status, comm.all_reduce(torch.ones(3)).tolist()


def test_a_forked_child_is_refused_and_the_parent_goes_on():
    with Ranks(fork_and_go_on, 2) as ranks:
        ranks.ready()
        assert ranks.get(0) == ranks.get(1) == (0, [2.0] * 3)


class StoreWithRoom:
    """A FileStore, which opens its file at each use, exempt from the limit on open files."""

    def __init__(self, path, world_size, limit):
        import torch.distributed as dist

        self.store, self.limit = dist.FileStore(path, world_size), limit
        self.restrict(self.limit)

    @staticmethod
    def restrict(soft):
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def unrestricted(self, method, *arguments):
        self.restrict(self.limit + 64)
        try:
            return getattr(self.store, method)(*arguments)
        finally:
            self.restrict(self.limit)

    def set(self, *arguments):
        return self.unrestricted("set", *arguments)

    def get(self, *arguments):
        return self.unrestricted("get", *arguments)

    def check(self, *arguments):
        return self.unrestricted("check", *arguments)


def run_out_of_files(comm, connection):
    path = connection.recv()
    # Two free descriptors: enough for the segment, too few to watch three peers.
    free = [os.dup(0), os.dup(0)]
    for descriptor in free:
        os.close(descriptor)
    store = StoreWithRoom(path, comm.world_size, max(free) + 1)
    second = SharedMemoryCommunicator.create(comm.rank, comm.world_size, "second", store, timeout=20)
    if comm.rank == comm.world_size - 1:
        time.sleep(0.3)
    value = second.all_reduce(torch.ones(1)).item()
    store.restrict(store.limit + 64)  # the store's destructor opens its file as well
    return value


def test_a_rank_out_of_file_descriptors_does_not_take_the_others_for_dead():
    with Ranks(run_out_of_files, 4) as ranks:
        ranks.ready()
        for connection in ranks.connections.values():
            connection.send(os.path.join(ranks.folder.name, "second"))
        assert [ranks.get(rank) for rank in range(4)] == [4.0] * 4
