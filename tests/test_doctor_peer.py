"""The doctor's check of peer memory: verdicts from what ranks saw, which GPUs are checked together. Tier: no device."""

import copy
import json
import time
from itertools import combinations, permutations

import pytest

from tp_kernels import _native, doctor, doctor_peer
from tp_kernels.comm.peer_verdicts import PASSED, driver_version, read_verdicts, verdict_file
from tp_kernels.comm.symmetric_workspace import SymmetricMemoryUnavailable
from tp_kernels.doctor import Skip
from tp_kernels.doctor_peer import check_pairs, next_batch, verdicts_of
from tp_kernels.testing.rank_pool import RankFailedError


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
    results[1].update(waited_for=0, runs=[], deadline=90.0)
    found = failed(results)
    assert "a signal did not arrive within 90 s" in found[0, 1] and "ended early" in found[1, 0]
    results = clean(3)
    results[0]["error"] = "AcceleratorError: illegal address"
    assert set(failed(results)) == {(0, 1), (0, 2), (1, 0), (2, 0)}
    assert "illegal address" in failed(results)[1, 0]


def test_ranks_on_one_gpu_make_one_verdict():
    verdicts = {(0, 1): PASSED, (1, 0): "2 wrong"}
    assert doctor_peer._by_gpu(verdicts, ["G@1", "G@1"]) == {("G@1", "G@1"): "2 wrong"}
    assert doctor_peer._by_gpu(verdicts, ["G@1", "H@2"]) == {("G@1", "H@2"): PASSED, ("H@2", "G@1"): "2 wrong"}


# Which GPUs together -------------------------------------------------------------------------------------------------


def all_pairs(count):
    return set(combinations(range(count), 2))


def cover(pairs):
    """The batches of a machine on which nothing goes wrong."""
    left, batches = set(pairs), []
    while left:
        batches.append(next_batch(left, pairs))
        left -= set(combinations(batches[-1], 2))
    return batches


@pytest.mark.parametrize(("count", "batches"), [(2, 1), (3, 1), (8, 1), (9, 5), (16, 6)])
def test_every_pair_of_a_machine_meets_in_a_few_groups(count, batches):
    found = cover(all_pairs(count))
    assert len(found) <= batches and all(len(batch) <= 8 for batch in found)


def test_groups_hold_no_pair_without_access():
    # Two islands of four, of which one GPU each sees the other.
    pairs = {(a, b) for a, b in all_pairs(8) if a // 4 == b // 4} | {(3, 4)}
    found = cover(pairs)
    assert sorted(found) == [[0, 1, 2, 3], [3, 4], [4, 5, 6, 7]]
    assert next_batch({(0, 1), (5, 6)}, pairs) == [0, 1]  # nobody else has anything to gain


class Machine:
    """GPUs of which some ordered pairs are bad: ``run`` gives what the ranks of a group would see."""

    def __init__(self, hangs=(), stuck=(), wrong=(), breaks=(), deaths=(), unmapped=()):
        self.hangs, self.stuck, self.wrong = hangs, stuck, wrong
        self.breaks, self.deaths, self.unmapped = breaks, deaths, unmapped
        self.batches = []

    def run(self, gpus, seconds):
        self.batches.append(list(gpus))
        here = {pair: (gpus.index(pair[0]), gpus.index(pair[1])) for pair in permutations(gpus, 2)}
        if self.unmapped and any(pair in here for pair in self.unmapped):
            raise SymmetricMemoryUnavailable("rank 0: no")
        for a, _ in (here[pair] for pair in self.deaths if pair in here):
            raise RankFailedError(f"of {len(gpus)} ranks, rank {a} was killed by SIGKILL\nmore", (a,))
        results = clean(len(gpus))
        for a, b in (here[pair] for pair in self.wrong if pair in here):
            results[b]["runs"][0]["report"][0][a] = 4
        for a, b in (here[pair] for pair in self.hangs if pair in here):
            for rank, result in enumerate(results):  # all others wait for the one that waits
                result.update(runs=[], waited_for=a if rank == b else b)
        for a, b in (here[pair] for pair in self.stuck if pair in here):  # these two wait for each other
            for result in results:
                result["runs"] = []
            results[a]["waited_for"], results[b]["waited_for"] = b, a
        for a in (here[pair][0] for pair in self.breaks if pair in here):
            results[a].update(runs=[], error="AcceleratorError: illegal address")
            for result in results[:a] + results[a + 1 :]:
                result.update(runs=[], waited_for=a)
        return results


def check(machine, count=8, pairs=None, seconds=1000.0):
    return check_pairs(pairs or all_pairs(count), machine.run, time.monotonic() + seconds)


def wrong_pairs(found):
    return {pair: verdict for pair, verdict in found.verdicts.items() if verdict != PASSED}


def test_a_good_machine_takes_one_group():
    machine = Machine()
    found = check(machine)
    assert set(found.verdicts) == set(permutations(range(8), 2)) and not wrong_pairs(found) and not found.unchecked
    assert machine.batches == [list(range(8))]


@pytest.mark.parametrize("kind", ["hangs", "breaks", "deaths", "wrong"])
def test_one_bad_pair_is_told_from_all_others(kind):
    machine = Machine(**{kind: [(2, 5)]})
    found = check(machine)
    assert set(found.verdicts) == set(permutations(range(8), 2)) and not found.unchecked
    bad = wrong_pairs(found)
    assert set(bad) == ({(2, 5)} if kind == "wrong" else {(2, 5), (5, 2)})
    words = {"hangs": "signal did not arrive", "breaks": "illegal address", "deaths": "SIGKILL", "wrong": "4 stored"}
    assert words[kind] in bad[2, 5] and "\n" not in bad[2, 5]
    # All at once; each suspect alone; those of the others that are left.
    assert [len(batch) for batch in machine.batches] == ([8] if kind == "wrong" else [8, *[2] * 7, 7])
    assert all(not {2, 5} <= set(batch) for batch in machine.batches[1:] if len(batch) > 2)


def test_a_bad_pair_is_kept_out_of_later_groups():
    machine = Machine(stuck=[(2, 5)])
    found = check(machine)
    assert set(wrong_pairs(found)) == {(2, 5), (5, 2)} and len(found.verdicts) == 56
    assert [len(batch) for batch in machine.batches] == [8, 2, 7, 7]


def test_a_pair_that_meets_again_stays_what_it_was():
    machine = Machine(wrong=[(0, 1)])

    def run(gpus, seconds):
        results = machine.run(gpus, seconds)
        machine.wrong = ()  # it comes and goes
        return results

    found = check_pairs(all_pairs(9), run, time.monotonic() + 1000.0)
    assert sum({0, 1} <= set(batch) for batch in machine.batches) > 1
    assert set(wrong_pairs(found)) == {(0, 1)} and len(found.verdicts) == 72


def test_two_bad_pairs_and_a_memory_that_cannot_be_mapped():
    machine = Machine(hangs=[(0, 1)], wrong=[(3, 2)], unmapped=[(4, 5)])
    found = check(machine, 6)
    assert set(wrong_pairs(found)) == {(0, 1), (1, 0), (3, 2)}
    assert set(found.unchecked) == {(4, 5)} and "no symmetric memory" in found.unchecked[4, 5]
    assert len(found.verdicts) == 28


def test_time_that_runs_out_leaves_pairs_unknown(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    machine = Machine(deaths=[(0, 1)])
    limits = []

    def run(gpus, seconds):
        limits.append(seconds)
        clock[0] += 200.0 if len(limits) == 1 else 100.0
        return machine.run(gpus, seconds)

    found = check_pairs(all_pairs(3), run, 300.0)
    # The second run was cut off, by which nothing is said of its pair; a third was not begun.
    assert limits == [150.0, 100.0] and not found.verdicts
    assert found.unchecked == dict.fromkeys(all_pairs(3), "time ran out")


# The check -----------------------------------------------------------------------------------------------------------


def fake_gpus(monkeypatch, tmp_path, count, machine=None, access=lambda a, b: True):
    monkeypatch.setenv("TP_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_native, "has_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", access)
    monkeypatch.setattr(doctor_peer, "_identity", lambda index: f"GPU-{index}@0")
    if machine is not None:
        monkeypatch.setattr(doctor_peer, "_on_gpus", machine.run)
        monkeypatch.setattr(doctor_peer, "_on_one_gpu", lambda: machine.run([0, 1], 1.0))


def test_the_check_keeps_its_verdicts(monkeypatch, tmp_path):
    fake_gpus(monkeypatch, tmp_path, 2, Machine())
    assert "2 ordered pairs of 2 GPUs, 3 sizes" in doctor_peer.check_peer_memory()
    assert read_verdicts(driver_version(), "GPU-0@0") == {"GPU-1@0": PASSED}
    fake_gpus(monkeypatch, tmp_path, 2, Machine(wrong=[(0, 1)]))
    with pytest.raises(RuntimeError, match=r"groups with these pairs leave .* 0->1: wrong words"):
        doctor_peer.check_peer_memory()
    assert "4 stored" in read_verdicts(driver_version(), "GPU-0@0")["GPU-1@0"]
    assert read_verdicts(driver_version(), "GPU-1@0") == {"GPU-0@0": PASSED}
    fake_gpus(monkeypatch, tmp_path, 1, Machine())
    assert "2 ordered pairs of 2 ranks on one GPU" in doctor_peer.check_peer_memory()


def test_pairs_without_access_are_reported_and_the_others_checked(monkeypatch, tmp_path):
    fake_gpus(monkeypatch, tmp_path, 10, Machine(), access=lambda a, b: {a, b} != {3, 9} and (a, b) != (7, 1))
    shown = []
    with doctor._progress_shown(shown.append):
        detail = doctor_peer.check_peer_memory()
    assert f"{90 - 4} ordered pairs of 10 GPUs" in detail
    assert "GPUs 1-7, 3-9: no peer access, groups with these use NCCL" in detail
    assert set(read_verdicts(driver_version(), "GPU-9@0")) == {f"GPU-{i}@0" for i in (0, 1, 2, 4, 5, 6, 7, 8)}
    assert "peer memory of GPUs 0, 1, 2" in shown[0] and "pairs left" in shown[0]


@pytest.mark.parametrize("count", [2, 3])
def test_a_check_that_does_not_work_fails(monkeypatch, tmp_path, count):
    machine = Machine()

    def run(gpus, seconds):
        if {0, 1} <= set(gpus):
            raise ValueError("no store\nand more")
        return machine.run(gpus, seconds)

    fake_gpus(monkeypatch, tmp_path, count)
    monkeypatch.setattr(doctor_peer, "_on_gpus", run)
    with pytest.raises(RuntimeError, match=r"GPUs 0-1: ValueError: no store$"):
        doctor_peer.check_peer_memory()
    known = {2: {}, 3: {"GPU-2@0": PASSED}}[count]  # of the pair itself nothing
    assert read_verdicts(driver_version(), "GPU-0@0") == known


def test_where_there_is_nothing_to_check(monkeypatch, tmp_path):
    fake_gpus(monkeypatch, tmp_path, 2, access=lambda a, b: (a, b) == (0, 1))
    with pytest.raises(Skip, match="no peer access between any of 2 GPUs"):
        doctor_peer.check_peer_memory()
    for count in (1, 3):
        fake_gpus(monkeypatch, tmp_path, count, Machine(unmapped=list(all_pairs(3))))
        with pytest.raises(Skip, match="no symmetric memory"):
            doctor_peer.check_peer_memory()
    fake_gpus(monkeypatch, tmp_path, 0)
    with pytest.raises(Skip, match="no GPU"):
        doctor_peer.check_peer_memory()
    monkeypatch.setattr(_native, "has_cuda", lambda: False)
    with pytest.raises(Skip, match="no GPU"):  # Triton's twin would do
        doctor_peer.check_peer_memory()
    monkeypatch.setattr(doctor_peer, "has_triton", lambda: False)
    with pytest.raises(Skip, match=r"CUDA sources .*, and Triton is not installed"):
        doctor_peer.check_peer_memory()
    assert not verdict_file().exists()


@pytest.mark.parametrize("native", [True, False])
def test_a_rank_runs_the_kernel_that_was_built(monkeypatch, native):
    """The calls of both kernels, with what they are given; what they do is for tests/kernels."""
    import torch

    from tp_kernels.ops.kernels.launch import recording

    calls = []

    class Library:
        def cuda_peer_check(self, *arguments):
            calls.append(arguments)

    class Layout:
        half_bytes = 1 << 20

    class Memory:
        data, flags, record_address, layout, table = [1, 2], [3, 4], 5, Layout, torch.zeros(5, dtype=torch.int64)

    monkeypatch.setattr(_native, "native", Library())
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: type("Stream", (), {"cuda_stream": 6}))
    launch = doctor_peer._launch_native if native else doctor_peer._launch_triton
    report = torch.zeros(3, 2, dtype=torch.int32)
    with recording() as launches:
        launch(Memory, 1, 2, 64 << 10, 3, report, 16, 10**9)
    if native:
        assert calls == [([1, 2], [3, 4], 1, 2, 1 << 20, 64 << 10, 3, report.data_ptr(), 16, 10**9, 5, 6)]
    else:
        (only,) = launches
        assert only.grid == (16,) and only.args[0] is report and only.args[2:] == (1, 4096, 3, 1 << 20, 1000)
        assert only.options["PREPARES"] and only.options["ACCESSES"] and only.options["VERIFIES"]


# The file ------------------------------------------------------------------------------------------------------------


def test_versions_of_the_file_share_it(monkeypatch, tmp_path):
    from tp_kernels.comm.peer_verdicts import describe_verdicts, write_verdicts

    monkeypatch.setenv("TP_KERNELS_CACHE_DIR", str(tmp_path))
    older = {"pairs": {"580|A@1|B@2": {"verdict": "passed", "checked": "2026-01-01"}}}
    verdict_file().write_text(json.dumps(older))
    assert read_verdicts("580", "A@1") == {"B@2": "passed"}
    newer = {
        "version": 7,
        "links": {"x": 1},
        "pairs": {
            "580|A@1|B@2": {"verdict": "3 wrong words", "gbps": 7.5},
            "580|A@1|C@3": {"verdict": {"what": "not text"}},
            "580|A@1|D@4": "not an entry",
            "580|A@1": {"verdict": "not a pair"},
        },
    }
    verdict_file().write_text(json.dumps(newer))
    assert read_verdicts("580", "A@1") == {"B@2": "3 wrong words"}
    monkeypatch.setattr("tp_kernels.comm.peer_verdicts.driver_version", lambda: "580")
    assert "failed" in describe_verdicts()
    write_verdicts("580", {("B@2", "A@1"): "passed"})
    content = json.loads(verdict_file().read_text())
    entry = content["pairs"].pop("580|B@2|A@1")
    assert content == newer and entry["verdict"] == "passed"  # what is not known stays
    verdict_file().write_text(json.dumps({"version": 9, "pairs": []}))
    assert read_verdicts("580", "A@1") == {}
    write_verdicts("580", {("A@1", "B@2"): "passed"})
    assert json.loads(verdict_file().read_text())["version"] == 1
