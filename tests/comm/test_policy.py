"""The choice of transport: a pure function, explained. Tier: no device; one test on CPU ranks."""

import warnings
from dataclasses import replace

import pytest

from tp_kernels.comm import BackendUnavailableError, explain
from tp_kernels.comm.policy import RankFacts, choose, report_fallback

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


@pytest.mark.parametrize(("field", "value"), [("backend", "gloo"), ("device_type", "cuda"), ("strict", True)])
def test_disagreement_is_listed(field, value):
    with pytest.raises(ValueError, match=f"agree on {field}, got rank 0: .*, rank 1: {value!r}"):
        choose([HERE, replace(HERE, **{field: value})])


def explained(group):
    return explain(group), explain().chosen == explain(group).chosen, group.backend


def test_explain_tells_what_a_group_uses(rank_pool):
    assert explain().chosen == "local"
    for choice, same, backend in rank_pool(2).run(explained):
        assert choice.chosen == backend and same
        assert choice.rejected
