"""The choice of transport: a pure function, explained. Tier: no device; one test on CPU ranks."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from tp_kernels.comm import BackendUnavailableError, LocalCommunicator, explain, peer_verdicts
from tp_kernels.comm.gpu_facts import GpuFacts
from tp_kernels.comm.paths import default_table
from tp_kernels.comm.policy import RankFacts, choose, report_fallback
from tp_kernels.comm.routed import RoutedCommunicator
from tp_kernels.comm.tp_group import TPGroup

HERE = RankFacts("alpha", "boot1|8|ns1", "cpu", "auto", False)
OTHER_HOST = replace(HERE, host="beta", domain="boot2|8|ns1")
OTHER_CONTAINER = replace(HERE, domain="boot1|9|ns2")


def test_one_rank_is_local():
    choice = choose([HERE])
    assert choice.chosen == "local" and choice.fallback_reason is None


def test_one_host_takes_shared_memory():
    choice = choose([HERE] * 3)
    assert choice.chosen == "shm" and choice.fallback_reason is None
    assert "gloo: not taken (slower on one host)" in str(choice)


def test_request_for_gloo_is_followed():
    choice = choose([replace(HERE, backend="gloo")] * 2)
    assert choice.chosen == "gloo" and choice.fallback_reason is None


def test_several_hosts_take_gloo_without_a_warning():
    choice = choose([HERE, OTHER_HOST, HERE])
    assert choice.chosen == "gloo" and choice.fallback_reason is None
    assert "2 hosts (alpha, beta)" in str(choice)


def test_request_for_shm_over_hosts_is_an_error():
    facts = [replace(fact, backend="shm") for fact in (HERE, OTHER_HOST)]
    choice = choose(facts)
    with pytest.raises(BackendUnavailableError, match="2 hosts"):
        report_fallback(choice, facts[0], "tp", 0)


def test_separate_containers_are_a_fallback():
    choice = choose([HERE, OTHER_CONTAINER, HERE])
    assert choice.chosen == "gloo"
    assert "ranks [0, 2] and ranks [1] do not share /dev/shm" in choice.fallback_reason


def test_cuda_goes_through_gloo():
    choice = choose([replace(HERE, device_type="cuda")] * 2)
    assert choice.chosen == "gloo" and "CPU tensors only" in str(choice)


def test_fallback_warns_once_on_the_first_rank():
    choice = choose([HERE] * 2).without_shm("/dev/shm has 64 KB, the group needs 4 MB")
    assert choice.chosen == "gloo"
    with pytest.warns(UserWarning, match="group tp falls back to gloo .*64 KB") as caught:
        report_fallback(choice, HERE, "tp", 0)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report_fallback(choice, HERE, "tp", 1)
        report_fallback(choose([HERE] * 2), HERE, "tp", 0)


def test_strict_turns_a_fallback_into_an_error():
    strict = replace(HERE, strict=True)
    choice = choose([strict] * 2).without_shm("too small")
    with pytest.raises(BackendUnavailableError, match="too small; strict=True"):
        report_fallback(choice, strict, "tp", 1)


@pytest.mark.parametrize(
    ("field", "value"), [("backend", "gloo"), ("device_type", "cuda"), ("strict", True), ("numerics", "any")]
)
def test_disagreement_is_listed(field, value):
    with pytest.raises(ValueError, match=f"agree on {field}, got rank 0: .*, rank 1: {value!r}"):
        choose([HERE, replace(HERE, **{field: value})])


def explained(group):
    return explain(group), explain().chosen == explain(group).chosen, group.backend


def test_explain_tells_what_a_group_uses(rank_pool):
    assert explain().chosen == "local" and not explain().details
    for choice, same, backend in rank_pool(2).run(explained):
        assert choice.chosen == backend and same
        assert choice.rejected
        assert f"every call goes by {backend}" in str(choice) and "an all-reduce, then the norm" in str(choice)


class Peer(LocalCommunicator):
    """Peer memory of two ranks whose kernels are ``algorithms``."""

    fused_norm, has_multicast = True, False

    def __init__(self, algorithms):
        super().__init__("tp")
        self.world_size, self.backend, self.algorithms = 2, "symm", algorithms


def described(algorithms, members=("symm", "gloo")):
    gloo = LocalCommunicator("tp")
    gloo.world_size = 2
    made = {"symm": Peer(algorithms), "gloo": gloo}
    routed = RoutedCommunicator({name: made[name] for name in members}, numerics="ordered", table=default_table(2))
    return str(explain(TPGroup(routed)))


def test_explain_tells_which_kernels_are_missing_and_why():
    text = described(("triton",))
    assert "symm:one_shot, symm:two_shot, symm:lamport: not there (a rank's native core was built without CUDA" in text
    assert "all_reduce: symm:triton at every size" in text and "all_reduce_norm: symm:triton at every size" in text
    assert "an all-reduce, then the norm" not in text and "Triton is not installed" not in text
    text = described(("one_shot", "two_shot", "lamport"))
    assert "symm:triton: not there (Triton is not installed on all ranks)" in text and "built without CUDA" not in text
    text = described((), ("gloo",))
    assert "an all-reduce, then the norm" in text and "not there" not in text


# Groups of GPUs ------------------------------------------------------------------------------------------------------


def gpu(index, count=None, **changes):
    """Facts of a rank on GPU ``index`` of a box whose ``count`` GPUs all reach each other."""
    everyone = tuple(f"GPU-{i}" for i in range(index + 1 if count is None else count))
    facts = GpuFacts(
        uuid=f"GPU-{index}",
        pci=f"0000:0{index}:00",
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        sms=132,
        driver="580.95.05",
        reaches=everyone,
        sees=everyone,
        nccl_version=22809,
    )
    return replace(facts, **changes)


def ranks_on(*gpus, **changes):
    return [replace(HERE, device_type="cuda", gpu=each, **changes) for each in gpus]


def box(count=2, **changes):
    return ranks_on(*(gpu(i, count) for i in range(count)), **changes)


def shared(count=2, **changes):
    """Ranks of ``launch --one-gpu``."""
    return ranks_on(*(gpu(0, shared_by=count, nccl_host=f"rank-{r}") for r in range(count)), **changes)


def with_gpu(facts, rank, **changes):
    """``facts`` with another GPU at one rank, or at all of them for ``rank=None``."""
    return [
        replace(fact, gpu=replace(fact.gpu, **changes)) if rank in (None, r) else fact for r, fact in enumerate(facts)
    ]


@pytest.mark.parametrize("facts", [box(2), box(8), shared(2), shared(4)], ids=["2", "8", "shared2", "shared4"])
def test_gpus_that_reach_each_other_take_peer_memory(facts):
    choice = choose(facts)
    assert choice.members == ("symm", "nccl", "gloo") and choice.numerics == "ordered"
    assert choice.fallback_reason is None and "not checked with kernels" in choice.reason
    assert "nccl: kept beside it (for data without sums of floats" in str(choice)
    assert choose([replace(fact, numerics="any") for fact in facts]).numerics == "any"


def test_gpus_without_peer_access_take_nccl_without_a_warning():
    facts = [replace(f, gpu=replace(f.gpu, reaches=(f.gpu.uuid,))) for f in box(2)]
    choice = choose(facts)
    assert choice.members == ("nccl", "gloo") and choice.numerics == "nccl" and choice.fallback_reason is None
    assert "symm: not taken (ranks 0->1, 1->0: the GPUs have no peer access" in str(choice)
    wanted = [replace(fact, backend="symm") for fact in facts]
    with pytest.raises(BackendUnavailableError, match=r"no peer access.*backend='symm' was requested"):
        report_fallback(choose(wanted), wanted[0], "tp", 0)


def test_ordered_sums_without_peer_memory_go_through_gloo():
    facts = [replace(f, numerics="ordered", gpu=replace(f.gpu, reaches=(f.gpu.uuid,))) for f in box(2)]
    choice = choose(facts)
    assert choice.members == ("gloo", "nccl") and choice.numerics == "ordered"
    assert "numerics='ordered' was asked for" in choice.fallback_reason


SYMM_OBSTACLES = {
    "does not see": (with_gpu(box(2), 0, sees=("GPU-0",)), "ranks 0->1: not visible"),
    "kernels not built": (
        with_gpu(box(2), 1, symm_problem="the native core was built without CUDA"),
        "rank 1: the native",
    ),
    "shared by accident": (with_gpu(shared(2), None, shared_by=1), "ranks \\[0, 1\\] share a GPU by accident"),
    "check failed": (
        with_gpu(box(2), 1, verdicts={"GPU-0@0000:00:00": "3 wrong words in loads"}),
        "failed from rank 1's GPU to rank 0's: 3 wrong words",
    ),
}


@pytest.mark.parametrize("name", SYMM_OBSTACLES)
def test_what_keeps_peer_memory_away_is_said(name):
    facts, reason = SYMM_OBSTACLES[name]
    choice = choose(facts)
    assert choice.members == ("nccl", "gloo")
    with pytest.warns(UserWarning, match=f"falls back to nccl .*{reason}"):
        report_fallback(choice, facts[0], "tp", 0)
    with pytest.raises(BackendUnavailableError, match="strict=True forbids the fallback to nccl"):
        report_fallback(choice, replace(facts[0], strict=True), "tp", 1)


def test_nccl_p2p_disable_keeps_peer_memory_away_without_a_warning():
    choice = choose(with_gpu(box(2), None, symm_unwanted="NCCL_P2P_DISABLE=1 is set"))
    assert choice.members == ("nccl", "gloo") and choice.fallback_reason is None
    assert "symm: not taken (rank 0: NCCL_P2P_DISABLE=1 is set)" in str(choice)


def test_gpus_of_several_hosts_take_nccl():
    facts = box(2)
    facts[1] = replace(facts[1], host="beta", domain="boot2|8|ns1")
    choice = choose(facts)
    assert choice.members == ("nccl", "gloo") and choice.fallback_reason is None
    assert "2 hosts (alpha, beta)" in str(choice)


NCCL_OBSTACLES = {
    "none": (with_gpu(box(2), 1, nccl_version=0, nccl_problem="no libnccl"), "rank 1: no libnccl"),
    "versions": (with_gpu(box(2), 1, nccl_version=23007), "rank 0: 2.28.9, rank 1: 2.30.7"),
    "one GPU": (with_gpu(shared(2), None, nccl_host=""), "ranks \\[0, 1\\] share a GPU, which it refuses"),
}


@pytest.mark.parametrize("name", NCCL_OBSTACLES)
def test_what_keeps_nccl_away_is_said(name):
    facts, reason = NCCL_OBSTACLES[name]
    choice = choose(facts)
    assert choice.members == ("symm", "gloo") and choice.fallback_reason is None
    nothing_left = with_gpu(facts, 0, symm_problem="too old")
    with pytest.warns(UserWarning, match=f"falls back to gloo .*symm: rank 0: too old; nccl: .*{reason}"):
        report_fallback(choose(nothing_left), facts[0], "tp", 0)
    asked = [replace(fact, backend="nccl") for fact in facts]
    with pytest.raises(BackendUnavailableError, match=f"nccl: .*{reason}"):
        report_fallback(choose(asked), asked[0], "tp", 0)


def test_nccl_may_be_told_to_accept_several_ranks_on_a_gpu_and_patch_releases_mix():
    assert "nccl" in choose(with_gpu(shared(2), None, nccl_host="", nccl_shares_gpu=True)).members
    assert "nccl" in choose(with_gpu(box(2), 1, nccl_version=22803)).members


@pytest.mark.parametrize(
    ("backend", "members", "numerics"),
    [("nccl", ("nccl", "gloo"), "nccl"), ("symm", ("symm", "gloo"), "ordered"), ("gloo", ("gloo",), "ordered")],
)
def test_requests_of_gpus_are_followed(backend, members, numerics):
    facts = box(2, backend=backend)
    choice = choose(facts)
    assert choice.members == members and choice.numerics == numerics and choice.fallback_reason is None
    assert f"backend={backend!r} was requested" in str(choice)


def test_requests_that_exclude_themselves():
    with pytest.raises(ValueError, match="numerics='ordered' cannot be had"):
        choose(box(2, backend="nccl", numerics="ordered"))
    for backend in ("nccl", "symm"):
        facts = [replace(HERE, backend=backend)] * 2
        with pytest.raises(BackendUnavailableError, match="CUDA tensors only"):
            report_fallback(choose(facts), facts[0], "tp", 0)
    facts = box(2, backend="shm")
    with pytest.raises(BackendUnavailableError, match="CPU tensors only"):
        report_fallback(choose(facts), facts[0], "tp", 0)


def test_a_transport_that_could_not_be_made_is_left_out():
    assert choose(box(2), {"symm": "rank 1: out of memory"}).members == ("nccl", "gloo")
    choice = choose(box(2), {"nccl": "rank 0: no"})
    assert choice.members == ("symm", "gloo") and choice.fallback_reason == "nccl: rank 0: no"
    assert choose(box(2), {"gloo": "no CPU backend"}).members == ("symm", "nccl")
    assert choose(box(2), {"symm": "a", "nccl": "b"}).fallback_reason == "symm: a; nccl: b"


def test_facts_survive_the_exchange():
    for fact in (*box(2), HERE, replace(HERE, device_type="cuda", gpu_problem="broken driver")):
        assert RankFacts.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact
    broken = [replace(HERE, device_type="cuda", gpu_problem="broken driver")] * 2
    assert "GPU of rank 0 (broken driver)" in choose(broken).fallback_reason


class FakeProperties:
    name, major, minor, multi_processor_count = "NVIDIA H100 80GB HBM3", 9, 0, 66
    pci_domain_id, pci_bus_id, pci_device_id = 0, 0x1A, 0

    def __init__(self, index):
        self.uuid = f"GPU-{getattr(index, 'index', index)}"


def test_facts_of_this_process(monkeypatch, tmp_path):
    monkeypatch.setenv("TP_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NCCL_HOSTID", "tp_kernels-rank-1")
    monkeypatch.setenv("TP_KERNELS_ONE_GPU", "2")
    monkeypatch.setattr("torch.cuda.get_device_properties", FakeProperties)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda a, b: {a, b} == {0, 1})
    peer_verdicts.write_verdicts(
        peer_verdicts.driver_version(), {("GPU-1@0000:1a:00", "GPU-0@0000:1a:00"): "2 wrong words"}
    )
    facts = GpuFacts.here(torch.device("cuda", 1))
    assert (facts.uuid, facts.identity, facts.sms, facts.shared_by) == ("GPU-1", "GPU-1@0000:1a:00", 66, 2)
    assert facts.sees == ("GPU-0", "GPU-1", "GPU-2") and facts.reaches == ("GPU-0", "GPU-1")
    assert facts.nccl_host == "tp_kernels-rank-1" and (facts.nccl_version > 0) == (not facts.nccl_problem)
    assert facts.verdicts == {"GPU-0@0000:1a:00": "2 wrong words"}
    rank = RankFacts.here("cuda", "auto", False, None, torch.device("cuda", 1))
    assert rank.gpu == facts and RankFacts.from_dict(json.loads(json.dumps(rank.to_dict()))) == rank
    assert RankFacts.here("cuda", "gloo", False, None, torch.device("cuda", 1)).gpu is None
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1 / 0)
    assert "ZeroDivisionError" in RankFacts.here("cuda", "auto", False, None, torch.device("cuda", 1)).gpu_problem


def test_verdicts_are_kept_by_driver_and_place(monkeypatch, tmp_path):
    monkeypatch.setenv("TP_KERNELS_CACHE_DIR", str(tmp_path / "new"))
    assert peer_verdicts.read_verdicts("580", "A@1") == {}
    peer_verdicts.write_verdicts("580", {("A@1", "B@2"): "passed", ("B@2", "A@1"): "2 wrong words"})
    peer_verdicts.write_verdicts("580", {("A@1", "C@3"): "passed", ("B@2", "A@1"): "passed"})
    assert peer_verdicts.read_verdicts("580", "A@1") == {"B@2": "passed", "C@3": "passed"}
    assert peer_verdicts.read_verdicts("580", "B@2") == {"A@1": "passed"}
    assert peer_verdicts.read_verdicts("590", "A@1") == {} == peer_verdicts.read_verdicts("580", "A@9")
    checked = with_gpu(
        with_gpu(box(2), 0, verdicts={"GPU-1@0000:01:00": "passed"}), 1, verdicts={"GPU-0@0000:00:00": "passed"}
    )
    assert "has checked it" in choose(checked).reason
    monkeypatch.setattr(peer_verdicts, "driver_version", lambda: "580")
    assert peer_verdicts.describe_verdicts() == "3 pairs were checked with kernels, all passed"
    peer_verdicts.write_verdicts("580", {("A@1", "B@2"): "2 wrong words"})
    assert "1 of them failed" in peer_verdicts.describe_verdicts()
    peer_verdicts.verdict_file().write_text("{")
    assert "no pair was checked" in peer_verdicts.describe_verdicts()
    assert peer_verdicts.read_verdicts("580", "A@1") == {}
