"""What every test of communication must leave as it was."""

import os

import pytest


def _names():
    # Semaphores of multiprocessing come and go with whatever else runs on the machine; nothing here makes any.
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


@pytest.fixture(autouse=True)
def shared_memory_stays_clean():
    before = _names()
    yield
    assert _names() <= before
