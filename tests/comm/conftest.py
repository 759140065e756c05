"""What every test of communication must leave as it was."""

import os

import pytest


@pytest.fixture(autouse=True)
def shared_memory_stays_clean():
    before = set(os.listdir("/dev/shm"))
    yield
    assert set(os.listdir("/dev/shm")) <= before
