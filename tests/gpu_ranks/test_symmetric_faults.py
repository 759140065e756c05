"""Symmetric memory when ranks die, capture alone or call different things. Tier: ranks on one GPU.

Every wait here ends at a short deadline. The pool, and the MPS daemon with it, is replaced after a rank was killed.
"""

import os
import signal
import time
import uuid

import pytest
import torch

from tp_kernels.comm.errors import CommError, CommMismatchError, CommTimeoutError, PeerDiedError
from tp_kernels.testing.symmetric_ranks import make_symmetric

pytestmark = pytest.mark.gpu

HALF = 1 << 20
DEADLINE = 3.0
# A kernel looks at the clock every few microseconds, so what exceeds the deadline is the host's time: kernels that are
# loaded, and without MPS the turns that the ranks take on the GPU. close() gives up after 5 s by itself.
SLACK = 7.0


def run(gpu_ranks, world_size, function, *args):
    return gpu_ranks(world_size, backend="gloo").run(function, uuid.uuid4().hex, *args, timeout=90.0)


def symmetric(group, tag, **options):
    return make_symmetric(group, tag, max_bytes=HALF, **{"timeout": DEADLINE, **options})


def error_of(symm, x, calls=4, **options):
    """(the error in which one of a few calls ends, seconds until then)."""
    started = time.monotonic()
    try:
        for _ in range(calls):
            symm.all_reduce(x, **options)
            torch.cuda.synchronize()
            symm.check()
    except CommError as error:
        return error, time.monotonic() - started
    raise AssertionError(f"{calls} calls went well")


def seconds_to_close(symm):
    started = time.monotonic()
    symm.close()
    return time.monotonic() - started


# A rank that dies ----------------------------------------------------------------------------------------------------


def killed(group, tag, algorithm, when):
    symm = symmetric(group, tag)
    x = torch.ones(20_000, device="cuda")
    if when == "before any call":
        group.barrier()  # all ranks have made theirs
        time.sleep(0.3)
    for _ in range(0 if when == "before any call" else 3):
        total = symm.all_reduce(x, algorithm=algorithm)
        assert total.unique().tolist() == [float(symm.world_size)]  # and nothing is in flight any more
    if symm.rank == 1:
        if when == "in a call":
            symm.all_reduce(x, algorithm=algorithm)
            time.sleep(0.3)  # its kernel waits for the others
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0)
    try:
        error, waited = error_of(symm, x, algorithm=algorithm)
        return type(error), error.ranks, waited, seconds_to_close(symm), str(error)
    except RuntimeError:
        # A client that ends in the middle of a kernel may take the others of its MPS server along, says NVIDIA's
        # documentation: then CUDA's own error is all that a rank can have. Between calls there is no such excuse.
        if when != "in a call":
            raise
        return None


@pytest.mark.parametrize(
    ("algorithm", "when"),
    [
        ("one_shot", "before any call"),
        ("one_shot", "between calls"),
        ("lamport", "between calls"),
        ("one_shot", "in a call"),
    ],
)
def test_a_killed_rank_is_named_and_nobody_hangs(gpu_ranks, algorithm, when):
    pool = gpu_ranks(3, backend="gloo")
    outcomes = pool.run_outcomes(killed, uuid.uuid4().hex, algorithm, when, timeout=60.0)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.ok, outcome.describe()
        if outcome.value is None:
            continue
        kind, ranks, waited, closing, text = outcome.value
        assert kind is PeerDiedError and ranks == (1,), text
        assert f"rank {outcome.rank} gave up waiting for rank 1" in text
        assert waited < DEADLINE + SLACK and closing < SLACK


# A call that one rank captures ---------------------------------------------------------------------------------------


def captured_on_one_rank(group, tag, algorithm):
    symm = symmetric(group, tag)
    x = torch.ones(1000, device="cuda")
    symm.all_reduce(x, algorithm=algorithm)
    torch.cuda.synchronize()
    if symm.rank == 0:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            symm.all_reduce(x, algorithm=algorithm)
        symm.check()  # nothing has run, so nothing is wrong here
        group.barrier()
        error, waited = error_of(symm, x, algorithm=algorithm)
        del graph
    else:
        error, waited = error_of(symm, x, calls=1, algorithm=algorithm)
        group.barrier()
    symm.close()
    return type(error), error.ranks, waited


@pytest.mark.parametrize("algorithm", ["one_shot", "lamport"])
def test_a_call_that_one_rank_captures_ends_at_the_deadline_of_the_others(gpu_ranks, algorithm):
    (kind, ranks, waited), other = run(gpu_ranks, 2, captured_on_one_rank, algorithm)
    assert kind is CommTimeoutError and ranks == (1,)  # which had given up before
    assert waited < DEADLINE + SLACK
    assert other[:2] == (CommTimeoutError, (0,)) and 0.9 * DEADLINE < other[2] < DEADLINE + SLACK


# Calls that differ ---------------------------------------------------------------------------------------------------


def different_sizes(group, tag, algorithm, counts):
    symm = symmetric(group, tag)
    symm.all_reduce(torch.ones(8, device="cuda"), algorithm="one_shot")
    torch.cuda.synchronize()
    error, waited = error_of(symm, torch.ones(counts[symm.rank], device="cuda"), algorithm=algorithm)
    symm.close()
    return type(error), error.ranks, waited


@pytest.mark.parametrize(
    ("algorithm", "counts"),
    [
        ("one_shot", (1000, 200_000)),  # one block, and as many as there may be: those wait for blocks that never start
        (None, (1000, 200_000)),  # one rank pushes, the other one raises flags
    ],
)
def test_sizes_that_show_in_the_grids_end_at_the_deadline(gpu_ranks, algorithm, counts):
    for rank, (kind, ranks, waited) in enumerate(run(gpu_ranks, 2, different_sizes, algorithm, counts)):
        assert kind is CommTimeoutError and ranks == (1 - rank,)
        # The rank whose call went well waits in its next one, when the other has given up.
        assert waited < 2 * DEADLINE + SLACK


def mismatch(group, tag, what):
    symm = symmetric(group, tag, check=True)
    x = torch.ones(1000, device="cuda")
    assert symm.all_reduce(x).unique().tolist() == [float(symm.world_size)]
    first = symm.rank == 0
    calls = {
        "shape": lambda: symm.all_reduce(x[: 500 + symm.rank]),
        "dtype": lambda: symm.all_reduce(x.to(torch.bfloat16 if first else torch.float16)),
        "operation": lambda: symm.all_gather(x) if first else symm.broadcast(x),
        "norm": lambda: symm.all_reduce_add_rms_norm(x, x, x, 1e-6 if first else 1e-5),
    }
    started = time.monotonic()
    try:
        calls[what]()
    except CommMismatchError as error:
        waited = time.monotonic() - started
        torch.cuda.synchronize()
        return error.ranks, str(error), waited, seconds_to_close(symm)


NAMED = {
    "shape": ("shape=[500]", "shape=[501]"),
    "dtype": ("dtype=bfloat16", "dtype=float16"),
    "operation": ("all_gather", "broadcast"),
    "norm": ("eps=1e-06", "eps=1e-05"),
}


@pytest.mark.parametrize("what", NAMED)
def test_check_mode_says_who_called_what(gpu_ranks, what):
    for ranks, text, waited, closing in run(gpu_ranks, 2, mismatch, what):
        zeroth, first = text.split("rank 0: ")[1].split("rank 1: ")
        assert ranks == (0, 1) and NAMED[what][0] in zeroth and NAMED[what][1] in first, text
        assert waited < DEADLINE and closing < SLACK  # no kernel was launched, so there is none to wait for
