"""NCCL without a GPU: finding the library, the watchdog's bookkeeping, what ranks tell each other. Tier: no device."""

import os
import shutil
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tp_kernels import _native
from tp_kernels.comm import nccl_connect
from tp_kernels.comm.errors import CommError, CommMismatchError, CommTimeoutError, PeerDiedError
from tp_kernels.comm.nccl_connect import NCCLUnavailable, check_facts, cta_overrides
from tp_kernels.comm.nccl_library import nccl_library_info, wheel_hint
from tp_kernels.comm.nccl_peers import Peers

# --- the library -----------------------------------------------------------------------------------------------------

NAMES = [
    *("GetUniqueId", "CommInitRankConfig", "CommFinalize", "CommDestroy", "CommAbort", "CommGetAsyncError"),
    *("GetErrorString", "GetLastError", "AllReduce", "ReduceScatter", "AllGather", "Broadcast", "Reduce"),
    *("GroupStart", "GroupEnd"),
]


@pytest.fixture(scope="module")
def make_library(tmp_path_factory):
    """``make_library(version, without=()) -> path`` of a libnccl.so.2 in a folder of its own."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")

    def make(version, without=()):
        folder = tmp_path_factory.mktemp("nccl")
        source = f"int ncclGetVersion(int* version) {{ *version = {version}; return 0; }}\n"
        source += "".join(f"int nccl{name}(void) {{ return 0; }}\n" for name in NAMES if name not in without)
        (folder / "nccl.c").write_text(source)
        library = folder / "libnccl.so.2"
        command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-o", str(library), "nccl.c"]
        subprocess.run(command, cwd=folder, check=True)
        return library

    return make


@pytest.fixture(scope="module")
def fakes(make_library):
    return [make_library(version) for version in (22801, 22802, 22803, 22804)]


def load(hint="", first="", after="", **environment):
    """Load NCCL in a fresh process without torch; returns "version path source" or the error."""
    script = f"""
import ctypes
{f"kept = ctypes.CDLL({str(first)!r})" if first else ""}
from tp_kernels._native import native
try:
    version, path, source = native.nccl_load({str(hint)!r})
    print(version, path, source)
except RuntimeError as error:
    print(error)
{after}
"""
    env = {name: value for name, value in os.environ.items() if name not in ("TP_KERNELS_NCCL_PATH", "LD_LIBRARY_PATH")}
    env.update({name: str(value) for name, value in environment.items()})
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_search_order(fakes):
    variable, loaded, hint, system = fakes
    options = {"LD_LIBRARY_PATH": system.parent}
    assert load(**options) == f"22804 {system} the system's library path"
    assert load(hint, **options) == f"22803 {hint} torch's wheel"
    assert load(hint, loaded, **options) == f"22802 {loaded} already loaded in this process"
    expected = f"22801 {variable} TP_KERNELS_NCCL_PATH"
    assert load(hint, loaded, TP_KERNELS_NCCL_PATH=variable, **options) == expected


def test_variable_that_points_nowhere_is_an_error(fakes):
    for path in ("/no/such/libnccl.so.2", "libnccl.so.2", __file__):
        message = load(fakes[0], LD_LIBRARY_PATH=fakes[1].parent, TP_KERNELS_NCCL_PATH=path)
        assert "TP_KERNELS_NCCL_PATH" in message and path in message and "unset the variable" in message
    assert load(fakes[0], TP_KERNELS_NCCL_PATH="").startswith("22801")


def test_missing_library_lists_where_it_was_looked_for():
    message = load("/no/where/libnccl.so.2")
    if message[0].isdigit():
        pytest.skip("the system has an NCCL")
    assert message.startswith("NCCL was not found: TP_KERNELS_NCCL_PATH is not set")
    assert "/no/where/libnccl.so.2 does not exist" in message


def test_a_broken_file_beside_torch_is_not_passed_over(tmp_path, fakes):
    broken = tmp_path / "libnccl.so.2"
    broken.write_text("not a library")
    assert str(broken) in load(broken, LD_LIBRARY_PATH=fakes[0].parent)


def test_old_and_incomplete_libraries_are_refused(make_library):
    old = make_library(21403, without=["CommFinalize"])
    assert load(old).endswith("is version 2.14.3; at least 2.18.0 is needed")
    incomplete = make_library(22000, without=["Reduce", "CommAbort"])
    message = load(incomplete)
    assert str(incomplete) in message and message.endswith("lacks ncclCommAbort, ncclReduce")


def test_failure_is_not_kept_and_success_is(fakes):
    again = """
import os
del os.environ["TP_KERNELS_NCCL_PATH"]
for hint in ({!r}, {!r}):
    print(native.nccl_load(hint)[1])
""".format(*map(str, fakes[:2]))
    lines = load(after=again, TP_KERNELS_NCCL_PATH="/nothing").splitlines()
    assert lines[1:] == [str(fakes[0])] * 2


def test_two_copies_are_seen(fakes):
    lines = load(fakes[0], fakes[1], "print(native.nccl_mapped())", TP_KERNELS_NCCL_PATH=fakes[2]).splitlines()
    assert str(fakes[1]) in lines[1] and str(fakes[2]) in lines[1] and str(fakes[0]) not in lines[1]


def test_the_library_of_torch():
    if not os.path.exists(wheel_hint()):
        pytest.skip("torch's wheel has no NCCL")
    info = nccl_library_info()
    assert info.error is None and info.version_code >= 21800 and info.version in str(info)
    assert [os.path.realpath(wheel_hint())] == [info.path] == [os.path.realpath(path) for path in info.copies]


def test_version_text():
    assert [_native.native.nccl_version_text(code) for code in (2804, 21805, 22809, 23007)] == [
        "2.8.4",
        "2.18.5",
        "2.28.9",
        "2.30.7",
    ]


def test_communicator_without_cuda_says_so():
    from tp_kernels.comm.nccl import NCCLCommunicator

    if _native.has_cuda():
        pytest.skip("the native core was built with CUDA")
    with pytest.raises(RuntimeError, match="NCCLCommunicator needs the CUDA part"):
        NCCLCommunicator.create(0, 1, "g", dist.HashStore(), "cuda")


def test_creation_without_a_gpu_fails_on_all_ranks_as_unavailable():
    from tp_kernels.comm.nccl import NCCLCommunicator

    if not _native.has_cuda() or torch.cuda.is_available():
        pytest.skip("for CUDA builds on machines without a GPU")
    store, errors = dist.HashStore(), [None, None]

    def create(rank):
        try:
            NCCLCommunicator.create(rank, 2, "g", store, "cuda:0", timeout=10.0)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=create, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [NCCLUnavailable] * 2, errors
    for bad in ({"device": "cpu"}, {"max_ctas": 0}, {"timeout": 0}, {"buffer_bytes": -1}):
        with pytest.raises(ValueError):
            NCCLCommunicator.create(0, 1, "g", store, **{"device": "cuda:0", **bad})


# --- the watchdog's bookkeeping ---------------------------------------------------------------------------

ALL_REDUCE, ALL_GATHER, BARRIER, REPLAY = 0, 2, 4, 5
TIMEOUT, CUDA = 2, 8
SECOND = 10**9


def flight_of(*entries):
    flight = _native.native.NcclFlight()
    for operation, sequence, started, deadline in entries:
        flight.add(operation, sequence, started, deadline, operation == REPLAY)
        if operation != REPLAY:
            flight.arm(sequence)
    return flight


def test_what_ends_in_time_is_retired():
    flight = flight_of((ALL_REDUCE, 1, 0, 10), (ALL_GATHER, 2, 0, 10), (BARRIER, 3, 5, 20))
    assert flight.review(4, [1], 100) is None and len(flight) == 2
    # Seen to have ended only after the deadline: not late.
    assert flight.review(15, [2], 100) is None and len(flight) == 1
    assert flight.review(19, [], 100) is None
    assert flight.review(19, [3], 100) is None and len(flight) == 0


def test_the_late_one_is_named_with_its_age():
    flight = flight_of((ALL_REDUCE, 7, SECOND, 3 * SECOND), (BARRIER, 8, SECOND, 9 * SECOND))
    assert flight.review(3 * SECOND - 1, [], 100) is None
    code, operation, sequence, what = flight.review(3 * SECOND, [], 100)
    assert (code, operation, sequence) == (TIMEOUT, "all_reduce", 7)
    assert what == "all_reduce (call 7) has not ended after 2.0 s"


def test_the_culprit_is_the_oldest_even_if_a_later_one_is_late_first():
    flight = flight_of((ALL_GATHER, 4, 0, 300 * SECOND), (BARRIER, 5, SECOND, 2 * SECOND))
    _, operation, sequence, what = flight.review(2 * SECOND, [], 100)
    assert (operation, sequence) == ("all_gather", 4)
    assert "barrier (call 5) behind it is past its deadline" in what


def test_one_that_is_never_enqueued_is_late_too():
    flight = _native.native.NcclFlight()
    flight.add(ALL_REDUCE, 1, 0, SECOND, False)
    assert flight.review(SECOND - 1, [1], 100) is None and len(flight) == 1
    assert "could not be enqueued" in flight.review(SECOND, [1], 100)[3]
    flight.drop(1)
    assert len(flight) == 0 and flight.review(2 * SECOND, [], 100) is None


def test_errors_of_the_device_are_reported_at_once():
    flight = flight_of((ALL_REDUCE, 1, 0, SECOND), (ALL_REDUCE, 2, 0, SECOND))
    code, operation, sequence, what = flight.review(1, [1, -2], 100)
    assert (code, operation, sequence) == (CUDA, "all_reduce", 2) and "a CUDA error" in what


def test_replays_have_a_lane_of_their_own():
    flight = flight_of((ALL_REDUCE, 1, 0, 9 * SECOND), (REPLAY, 1, 0, SECOND))
    assert flight.review(0, [], 100) is None and len(flight) == 2
    assert "graph replay (number 1) has not ended after 1.0 s" in flight.review(SECOND, [], 100)[3]
    assert flight.review(SECOND, [1], 100) is None and len(flight) == 0


def test_a_review_asks_a_limited_number_and_judges_only_what_it_asked():
    flight = flight_of(*((ALL_REDUCE, sequence, 0, 10) for sequence in range(1, 8)))
    assert flight.review(11, list(range(1, 8)), 3) is None and len(flight) == 4
    assert flight.review(11, list(range(1, 8)), 100) is None and len(flight) == 0


# --- what ranks tell each other ---------------------------------------------------------------------------


def on_ranks(world_size, work, **facts):
    """``work(peers, rank)`` on threads that are ranks; returns results or exceptions."""
    store, results = dist.HashStore(), [None] * world_size

    def run(rank):
        try:
            results[rank] = work(Peers(store, rank, world_size, "g", facts, 10.0), rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_check_mode_names_who_called_what():
    def work(peers, rank):
        for sequence in (1, 2, 3):
            peers.compare(sequence, {"operation": "all_reduce", "counts": [4]}, 10.0)
        peers.compare(4, {"operation": "barrier" if rank == 1 else "all_reduce", "counts": [4]}, 10.0)

    results = on_ranks(3, work)
    assert [type(error) for error in results] == [CommMismatchError] * 3
    assert {error.ranks for error in results} == {(1,)} and results[0].sequence == 4
    assert "rank 0: all_reduce counts=[4]; rank 1: barrier counts=[4]" in str(results[2])


def test_check_mode_names_who_did_not_call():
    error = on_ranks(2, lambda peers, rank: rank or peers.compare(1, {"operation": "barrier"}, 0.3))[0]
    assert isinstance(error, CommTimeoutError) and error.ranks == (1,)


def test_creation_fails_alike_on_all_ranks():
    def work(peers, rank):
        return peers.agree("created", "out of memory" if rank == 2 else "", False, 10.0), peers.reported("created")

    assert [result[0] for result in on_ranks(3, work)] == [(2, "out of memory", False)] * 3
    assert on_ranks(2, lambda peers, rank: peers.agree("created", "", False, 10.0)) == [None, None]


def test_absent_and_dead_ranks_are_named(monkeypatch):
    monkeypatch.setattr("tp_kernels.comm.nccl_peers._PATIENCE", 0.3)
    late = CommTimeoutError("late", group="g", operation="all_reduce", sequence=5)

    def work(peers, rank):
        return peers.explain(late) if rank < 2 else time.sleep(0.5)

    first, second, _ = on_ranks(3, work)
    assert first.ranks == second.ranks == (2,) and "not heard of in the meantime: rank 2" in str(first)
    assert (first.operation, first.sequence) == ("all_reduce", 5)
    ended = subprocess.Popen(["true"])
    ended.wait()

    def work_with_the_dead(peers, rank):
        peers._pids = {1 - rank: ended.pid}
        return peers.explain(CommError("broken", operation="barrier", sequence=2))

    for rank, error in enumerate(on_ranks(2, work_with_the_dead)):
        assert isinstance(error, PeerDiedError) and error.ranks == (1 - rank,) and "has ended" in str(error)


def test_facts_that_prevent_a_connection():
    good = {"error": "", "version": 22809, "options": {"max_ctas": 8, "registered_buffers": False}}
    check_facts([good, {**good, "version": 22805}])
    with pytest.raises(NCCLUnavailable, match=r"rank 1: no library"):
        check_facts([good, {**good, "error": "no library"}])
    with pytest.raises(NCCLUnavailable, match=r"rank 0: 2\.28\.9, rank 1: 2\.30\.7"):
        check_facts([good, {**good, "version": 23007}])
    with pytest.raises(ValueError, match=r"the same max_ctas, got rank 0: 8, rank 1: None, rank 2: 8"):
        check_facts([good, {**good, "options": {**good["options"], "max_ctas": None}}, good])


def test_variables_that_overrule_max_ctas_are_named():
    assert cta_overrides(None, {"NCCL_MAX_CTAS": "4"}) is None
    assert cta_overrides(8, {"PATH": "/bin", "NCCL_MIN_CTAS": ""}) is None
    text = cta_overrides(8, {"NCCL_MAX_CTAS": "4", "NCCL_MIN_CTAS": "2"})
    assert text == "max_ctas=8 is overruled by NCCL_MAX_CTAS=4, NCCL_MIN_CTAS=2 in the environment"


def test_what_overrules_max_ctas_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(nccl_connect, "_warned", set())
    monkeypatch.setenv("NCCL_MAX_CTAS", "4")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for max_ctas in (8, 8, None, 16):
            nccl_connect.warn_of_cta_overrides(max_ctas)
    assert ["max_ctas=8 is" in str(w.message) for w in caught] == [True, False] and "=16 is" in str(caught[1].message)


def test_options_are_checked():
    expected = {"max_ctas": 8, "registered_buffers": True, "buffer_bytes": 64 << 20}
    assert nccl_connect.check_options(8, True) == expected
    for bad in ({"max_ctas": 0}, {"max_ctas": 65}, {"max_ctas": 8.0}, {"max_ctas": True}, {"buffer_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            nccl_connect.check_options(**bad)
    with pytest.raises(ValueError, match="registered_buffers must be True or False, got 'yes'"):
        nccl_connect.check_options(registered_buffers="yes")
