"""Ranks that share this machine's GPU, for the tests of this folder. Every test here is marked ``gpu``."""

import pytest

from tp_kernels.testing.one_gpu_ranks import OneGpuRanks


@pytest.fixture(scope="session")
def gpu_ranks():
    """``gpu_ranks(world_size, **options).run(function, *args, timeout=60.0)``: ``function(group, *args)`` on each rank.

    ``function`` stands at the top level of the test file, gets a ``TPGroup`` with device "cuda" first, and returns
    what can be pickled (move tensors to the CPU). Results come in rank order; the first cause of a failure is raised,
    and a rank that died or hung is named. ``run_outcomes`` waits for all ranks and reports each instead.
    """
    with OneGpuRanks() as ranks:
        yield ranks
