"""The doctor's check of peer memory: verdicts from what ranks saw. Tier: no device."""

import copy

import pytest

from tp_kernels import _native, doctor_peer
from tp_kernels.comm.peer_verdicts import PASSED
from tp_kernels.doctor import Skip
from tp_kernels.doctor_peer import verdicts_of


def clean(world):
    runs = [
        {"bytes": nbytes, "report": [[0] * world for _ in range(3)]}
        for nbytes in doctor_peer._SIZES
        for _ in doctor_peer._SEEDS
    ]
    return [{"gpu": f"GPU-{r}@0", "runs": copy.deepcopy(runs), "waited_for": None, "error": ""} for r in range(world)]


def failed(results):
    return {pair: verdict for pair, verdict in verdicts_of(results).items() if verdict != PASSED}


def test_nothing_wrong():
    assert verdicts_of(clean(3)) == {(a, b): PASSED for a in range(3) for b in range(3) if a != b}


@pytest.mark.parametrize(
    ("rank", "row", "peer", "pair", "what"),
    [
        (2, 0, 1, (1, 2), "7 stored"),  # rank 2 found wrong what rank 1 stored in its memory
        (2, 1, 1, (2, 1), "7 loaded"),  # rank 2 loaded wrong from rank 1's memory
        (2, 2, 1, (1, 2), "7 added"),
    ],
)
def test_wrong_words_are_laid_to_the_pair_that_accessed(rank, row, peer, pair, what):
    results = clean(3)
    results[rank]["runs"][4]["report"][row][peer] = 7
    assert failed(results) == {pair: f"wrong words or counts with {64 << 10} bytes: {what}"}


def test_a_signal_that_did_not_come_and_a_rank_that_broke_off():
    results = clean(2)
    results[1].update(waited_for=0, runs=[])
    found = failed(results)
    assert "a signal did not arrive" in found[0, 1] and "ended early" in found[1, 0]
    results = clean(3)
    results[0]["error"] = "AcceleratorError: illegal address"
    assert set(failed(results)) == {(0, 1), (0, 2), (1, 0), (2, 0)}
    assert "illegal address" in failed(results)[1, 0]


def test_ranks_on_one_gpu_make_one_verdict():
    verdicts = {(0, 1): PASSED, (1, 0): "2 wrong"}
    assert doctor_peer._by_gpu(verdicts, ["G@1", "G@1"]) == {("G@1", "G@1"): "2 wrong"}
    assert doctor_peer._by_gpu(verdicts, ["G@1", "H@2"]) == {("G@1", "H@2"): PASSED, ("H@2", "G@1"): "2 wrong"}


def fake_gpus(monkeypatch, count, results, access=True):
    monkeypatch.setattr(_native, "has_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda a, b: access)
    monkeypatch.setattr(doctor_peer, "_on_gpus", lambda n: results)
    monkeypatch.setattr(doctor_peer, "_on_one_gpu", lambda: results)


def test_the_check_keeps_its_verdicts(monkeypatch, tmp_path):
    from tp_kernels.comm.peer_verdicts import driver_version, read_verdicts

    monkeypatch.setenv("TP_KERNELS_CACHE_DIR", str(tmp_path))
    results = clean(2)
    fake_gpus(monkeypatch, 2, results)
    assert "2 ordered pairs of 2 GPUs, 3 sizes" in doctor_peer.check_peer_memory()
    assert read_verdicts(driver_version(), "GPU-0@0") == {"GPU-1@0": PASSED}
    results[0]["runs"][0]["report"][1][1] = 1
    with pytest.raises(RuntimeError, match=r"left alone from now on .* ranks 0->1: wrong words"):
        doctor_peer.check_peer_memory()
    assert "1 loaded" in read_verdicts(driver_version(), "GPU-0@0")["GPU-1@0"]
    assert read_verdicts(driver_version(), "GPU-1@0") == {"GPU-0@0": PASSED}


def test_where_there_is_nothing_to_check(monkeypatch):
    fake_gpus(monkeypatch, 2, [], access=False)
    with pytest.raises(Skip, match="no peer access between GPUs 0->1, 1->0"):
        doctor_peer.check_peer_memory()
    fake_gpus(monkeypatch, 0, [])
    with pytest.raises(Skip, match="no GPU"):
        doctor_peer.check_peer_memory()
    monkeypatch.setattr(_native, "has_cuda", lambda: False)
    with pytest.raises(Skip, match="CUDA sources"):
        doctor_peer.check_peer_memory()
