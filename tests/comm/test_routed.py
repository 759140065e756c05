"""RoutedCommunicator and how a group of GPUs is made, over stand-ins for the GPU transports. Tier: CPU ranks."""

import itertools
import json
import os
import tempfile
import warnings
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from tp_kernels.comm import BackendUnavailableError, CommTimeoutError, Communicator, Numerics
from tp_kernels.comm.gpu_facts import GpuFacts
from tp_kernels.comm.gpu_group import create_gpu_communicator
from tp_kernels.comm.paths import LAMPORT, MULTIMEM, ONE_SHOT, SYMM, TWO_SHOT, default_table, table_file
from tp_kernels.comm.policy import Choice, RankFacts, explain
from tp_kernels.comm.routed import RoutedCommunicator, _gathered_bytes
from tp_kernels.comm.tp_group import TPGroup, create_group

_numbers = itertools.count()


class Recorder(Communicator):
    """Carries calls out over another communicator, and notes them and the algorithm asked for."""

    def __init__(self, inner, backend, **numerics):
        self._inner, self.backend = inner, backend
        self.rank, self.world_size, self.name, self.timeout = inner.rank, inner.world_size, inner.name, inner.timeout
        self.numerics = Numerics(
            **{"accumulate": "float32", "order": "rank", "same_bits_on_all_ranks": True, "size_dependent": False}
            | numerics
        )
        self.calls, self.closed = Counter(), 0

    def all_reduce(self, x, op="sum", *, out=None, timeout=None, algorithm=None):
        self.calls[algorithm or "all_reduce"] += 1
        return self._inner.all_reduce(x, op, out=out, timeout=timeout)

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        self.calls["reduce_scatter"] += 1
        return self._inner.reduce_scatter(x, op, dim=dim, sizes=sizes, timeout=timeout)

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        self.calls["all_gather"] += 1
        return self._inner.all_gather(x, dim=dim, sizes=sizes, timeout=timeout)

    def broadcast(self, x, src=0, *, timeout=None):
        self.calls["broadcast"] += 1
        return self._inner.broadcast(x, src, timeout=timeout)

    def barrier(self, *, timeout=None):
        self.calls["barrier"] += 1
        self._inner.barrier(timeout=timeout)

    def close(self):
        self.closed += 1


class Peer(Recorder):
    """Stands in for SymmetricMemoryCommunicator."""

    fused_norm = True
    algorithms = ("one_shot", "two_shot", "lamport")
    overlap_modes = ("beside",)

    def __init__(self, inner, has_multicast=False):
        super().__init__(inner, "symm")
        self.has_multicast = has_multicast

    def get_buffer(self, shape, dtype, use="input"):
        return torch.empty(shape, dtype=dtype)

    def fuses_norm(self, width, dtype):
        return width < 10_000

    def all_reduce_add_rms_norm(self, partial, residual, weight, eps, *, algorithm=None, **options):
        self.calls[f"norm_{algorithm}"] += 1
        return partial, residual


class Library(Recorder):
    """Stands in for NCCLCommunicator."""

    overlap_modes = ("chunked",)

    def __init__(self, inner):
        super().__init__(inner, "nccl", accumulate="native", order="algorithm", size_dependent=True)
        self.max_ctas = 8

    def get_buffer(self, shape, dtype, use="input"):
        return torch.empty(shape, dtype=dtype) if use == "input" and dtype == torch.bfloat16 else None

    def describe(self):
        return ["nccl: a collective takes at most 8 SMs (max_ctas)"]


def local():
    from tp_kernels.comm import LocalCommunicator

    return LocalCommunicator("tp")


def routed(members=("symm", "nccl", "gloo"), *, inner=None, multicast=False, world_size=4, **options):
    inner = inner or local()
    make = {
        "symm": lambda: Peer(inner, multicast),
        "nccl": lambda: Library(inner),
        "gloo": lambda: Recorder(inner, "gloo"),
    }
    options = {"numerics": "ordered", "table": default_table(world_size), "device_type": "cpu", **options}
    return RoutedCommunicator({name: make[name]() for name in members}, **options)


def members_of(communicator):
    return communicator._members


# One process ---------------------------------------------------------------------------------------------------------


def test_calls_take_the_path_of_their_size_and_are_counted():
    group = routed()
    for count, path in ((10, LAMPORT), (100_000, ONE_SHOT), (1_000_000, TWO_SHOT)):
        x = torch.arange(count, dtype=torch.float32)
        assert group.path_for("all_reduce", 4 * count, torch.float32) == path
        assert torch.equal(group.all_reduce(x), x)
        assert group.counters[path] == 1
    assert members_of(group)["symm"].calls == {"lamport": 1, "one_shot": 1, "two_shot": 1}
    assert group.backend == "symm" and group.numerics.order == "rank" and not group.numerics.size_dependent


def test_classes_hold_for_every_sum_of_floats():
    big = torch.zeros(80 << 20, dtype=torch.bfloat16)
    for numerics, path in (("ordered", TWO_SHOT), ("any", "nccl")):
        group = routed(numerics=numerics)
        group.all_reduce(big, out=big)
        assert group.counters == {path: 1}
    assert routed(numerics="any").numerics.size_dependent
    group = routed(("nccl", "gloo"), numerics="nccl")
    group.all_reduce(big, out=big)
    assert group.counters == {"nccl": 1} and group.numerics.order == "algorithm"
    group = routed()
    for x in (torch.zeros(8, dtype=torch.float64), torch.zeros(8)):
        group.all_reduce(x, "max")
    group.all_reduce(torch.zeros(8, dtype=torch.float64))
    group.all_reduce(torch.zeros(1 << 20, dtype=torch.int64))
    group.reduce_scatter(torch.zeros(1 << 22))
    assert group.counters == {SYMM: 4, "nccl": 1}


def test_data_moves_by_size_alone():
    group = routed()
    group.all_gather(torch.zeros(16, dtype=torch.bool))
    group.all_gather(torch.zeros(1 << 20))
    group.broadcast(torch.zeros(3))
    group.barrier()
    assert group.counters == {SYMM: 3, "nccl": 1}


def test_empty_parts_route_like_the_others_of_an_uneven_gather():
    for rows in (0, 7):
        assert _gathered_bytes(torch.zeros(3, rows, 5), 1, [0, 7, 2, 3], 4) == 3 * 12 * 5 * 4
    assert _gathered_bytes(torch.zeros(2, 2), 0, None, 4) == 64


def test_asynchronous_and_bound_calls_are_routed_too():
    group = routed()
    x = torch.ones(4)
    assert torch.equal(group.all_reduce_async(x).wait(), x)
    assert torch.equal(group.all_reduce_async(x.double()).wait(), x.double())
    bound = group.bind_all_reduce(x)
    assert group.counters == {LAMPORT: 1, SYMM: 1}
    for _ in range(3):
        bound()
    assert group.counters == {LAMPORT: 4, SYMM: 1}
    group.reduce_scatter_async(torch.ones(4)).wait()
    assert group.all_gather_async(torch.ones(4)).wait().shape == (4,)
    assert group.counters[SYMM] == 3


def test_a_path_can_be_chosen_for_measurements():
    group = routed()
    group.all_reduce_by("nccl", torch.ones(3))
    group.all_reduce_by(TWO_SHOT, torch.ones(3))
    assert members_of(group)["symm"].calls == {"two_shot": 1} and members_of(group)["nccl"].calls == {"all_reduce": 1}
    with pytest.raises(ValueError, match="no path 'symm:multimem'"):
        group.all_reduce_by(MULTIMEM, torch.ones(3))


def test_dtypes_have_paths_of_their_own_where_they_were_measured():
    rows = {
        dtype: {"all_reduce": [{"bytes": 4096, "us": {LAMPORT: us, ONE_SHOT: 5.0}}]}
        for dtype, us in (("bfloat16", 4.0), ("float32", 6.0))
    }
    table = default_table(4).with_measured({"gpu": "TESTGPU", "measured": "today", "us": rows})
    group = routed(table=table)
    for dtype, path in ((torch.bfloat16, LAMPORT), (torch.float16, LAMPORT), (torch.float32, ONE_SHOT)):
        assert group.path_for("all_reduce", 4096, dtype) == path
        group.all_reduce(torch.zeros(2048, dtype=dtype))
    assert group.counters == {LAMPORT: 2, ONE_SHOT: 1}
    lines = group.describe()
    assert lines[lines.index("all_reduce: symm:lamport at every size") + 1] == "  float32: symm:one_shot at every size"


def test_fused_norm_belongs_to_peer_memory():
    group = routed()
    rows = torch.zeros(1, 64, dtype=torch.bfloat16)
    many = torch.zeros(8192, 64, dtype=torch.bfloat16)
    wide = torch.zeros(1, 9000, dtype=torch.bfloat16)
    for x in (rows, many, wide):
        group.all_reduce_add_rms_norm(x, x, x[0], 1e-6)
    group.all_reduce_add_rms_norm(rows, rows, rows[0], 1e-6, algorithm="two_shot")
    assert members_of(group)["symm"].calls == {"norm_lamport": 1, "norm_two_shot": 2, "norm_one_shot": 1}
    assert group.fused_norm and group.fuses_norm(64, torch.bfloat16) and not group.fuses_norm(20_000, torch.bfloat16)
    assert group.get_buffer((2, 3), torch.float32).shape == (2, 3)
    without = routed(("nccl", "gloo"), numerics="nccl")
    assert not without.fused_norm and not without.fuses_norm(64, torch.bfloat16)
    assert without.get_buffer((2,), torch.float32) is None  # NCCL's, if it has one
    assert without.get_buffer((2,), torch.bfloat16).shape == (2,)
    assert without.get_buffer((2,), torch.bfloat16, use="output") is None
    assert routed(("gloo",)).get_buffer((2,), torch.bfloat16) is None
    with pytest.raises(BackendUnavailableError, match="needs peer memory"):
        without.all_reduce_add_rms_norm(rows, rows, rows[0], 1e-6)


def test_overlap_is_offered_where_it_keeps_the_bits():
    assert routed().overlap_modes == ("beside",)
    assert routed(("nccl", "gloo"), numerics="nccl").overlap_modes == ("chunked",)
    assert routed(numerics="any").overlap_modes == ()


def test_a_matmul_is_fused_where_peer_memory_may_carry_sums(monkeypatch):
    monkeypatch.setattr(Peer, "overlap_modes", ("fused",))
    assert routed().overlap_modes == routed(numerics="any").overlap_modes == ("fused",)
    library = routed(numerics="nccl")
    assert library.overlap_modes == ("chunked",) and library.max_ctas == 8
    with pytest.raises(BackendUnavailableError, match=r"needs peer memory and Triton .* numerics='nccl'"):
        library.linear_all_reduce(torch.ones(2, 3), torch.ones(4, 3))


def test_what_nothing_takes_is_an_error():
    group = routed(("nccl", "gloo"), numerics="nccl")
    with pytest.raises(
        BackendUnavailableError, match=r"16 B int16 .*nccl: does not reduce torch.int16; gloo: does not"
    ):
        group.all_reduce(torch.zeros(8, dtype=torch.int16))
    assert group.counters == {}


def test_strict_forbids_what_only_gloo_takes():
    table = default_table(4)
    for strict in (False, True):
        inner = local()
        group = RoutedCommunicator(
            {"nccl": Library(inner), "gloo": Recorder(inner, "gloo")},
            numerics="ordered",  # then NCCL may not sum
            table=table,
            device_type="cpu",
            strict=strict,
        )
        if strict:
            with pytest.raises(
                BackendUnavailableError, match=r"class 'nccl'.*strict=True forbids the fallback to gloo"
            ):
                group.all_reduce(torch.ones(4))
            assert group.counters == {}
        else:
            with pytest.warns(UserWarning, match="falls back to gloo") as caught:
                group.all_reduce(torch.ones(4))
                group.all_reduce(torch.ones(5))
            assert len(caught) == 1 and group.counters == {"gloo": 2}
            assert any(line.startswith("fell back: all_reduce (sum) of 16 B float32") for line in group.describe())


def test_tensors_elsewhere_go_through_gloo_without_a_word():
    group = routed(device_type="cuda", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group.all_reduce(torch.ones(3))
    assert group.counters == {"gloo": 1}
    with pytest.raises(BackendUnavailableError, match="takes tensors on cuda"):
        routed(("symm", "nccl"), device_type="cuda").all_reduce(torch.ones(3))


def test_closing_reaches_every_transport():
    group = routed()
    broken = members_of(group)["symm"]
    broken.close = lambda: (_ for _ in ()).throw(RuntimeError("stuck"))
    with pytest.raises(RuntimeError, match="stuck"):
        group.close()
    assert [members_of(group)[name].closed for name in ("nccl", "gloo")] == [1, 1]


def test_explain_tells_paths_by_size_and_what_ran():
    group = routed(multicast=True)
    group.all_reduce(torch.ones(3))
    text = str(explain(TPGroup(group, choice=Choice("symm", "every GPU reaches every other", ()))))
    assert "symm: chosen (every GPU reaches every other)" in text
    assert "all_reduce: symm:lamport up to 256 KB, symm:one_shot up to 512 KB, symm:two_shot above" in text
    assert "never nccl: sums of class 'nccl', and the group has numerics='ordered'" in text
    assert "never symm:multimem: sums of class 'nvls'" in text
    assert "all_gather: symm up to 1 MB, nccl above" in text
    assert text.endswith("calls so far (a captured call counts once): symm:lamport 1")
    assert "symm:multimem: not there" in "\n".join(routed().describe())
    assert "nccl: a collective takes at most 8 SMs (max_ctas)" in text
    assert "nccl: " not in "\n".join(routed(("symm", "gloo")).describe())
    # The budget is part of what overlap was measured with, where NCCL carries it.
    assert routed(("nccl", "gloo"), numerics="nccl").max_ctas == 8
    assert routed().max_ctas is None and routed(numerics="any").max_ctas is None


# Ranks: how a group is made ------------------------------------------------------------------------------------------


def facts_of(world_size, **changes):
    sees = tuple(f"GPU-{i}" for i in range(world_size))
    return [
        RankFacts(
            "alpha",
            "boot1",
            "cuda",
            **{"backend": "auto", "strict": False, **changes},
            gpu=GpuFacts(uuid, f"0000:0{i}:00", "TESTGPU", (9, 0), 132, "580", sees, sees, nccl_version=22809),
        )
        for i, uuid in enumerate(sees)
    ]


def create(group, fail=None, multicast_on=(), late=(), **changes):
    """(outcome, transports left open on this rank, warnings). ``fail``: transport -> ranks; ``late`` ones time out."""
    made = {}
    fail = fail or {}

    def maker(name, build):
        def make():
            if group.rank in fail.get(name, ()):
                if group.rank in late:
                    raise CommTimeoutError("group tp: waited in vain")
                raise MemoryError(f"no memory for {name}")
            made[name] = build()
            return made[name]

        return make

    inner = group.communicator
    makers = {
        "symm": maker("symm", lambda: Peer(inner, group.rank in multicast_on)),
        "nccl": maker("nccl", lambda: Library(inner)),
        "gloo": maker("gloo", lambda: Recorder(inner, "gloo")),
    }
    store = dist.PrefixStore(f"test_routed/{next(_numbers)}", dist.distributed_c10d._get_default_store())
    facts = facts_of(group.world_size, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            communicator, choice = create_gpu_communicator(facts, group.rank, "tp", store, makers, 20.0)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            paths = getattr(communicator, "paths", None)
            table = communicator.table.source if paths else None
            outcome = (choice.members, paths, table, str(choice))
    still_open = sorted(name for name, communicator in made.items() if not communicator.closed)
    return outcome, still_open, [str(w.message) for w in caught]


def on_ranks(rank_pool, *args, world_size=3, **changes):
    results = rank_pool(world_size).run(create_with, args, changes)
    outcomes, still_open, warned = zip(*results, strict=True)
    assert len({str(outcome) for outcome in outcomes}) == 1, outcomes
    assert len({str(names) for names in still_open}) == 1, still_open
    assert not any(warned[1:])
    return outcomes[0], still_open[0], warned[0]


def create_with(group, args, changes):
    return create(group, *args, **changes)


def test_all_ranks_make_the_same_transports(rank_pool):
    (members, paths, source, _), still_open, warned = on_ranks(rank_pool, None, (0, 2))
    assert members == ("symm", "nccl", "gloo") and still_open == ["gloo", "nccl", "symm"] and not warned
    assert MULTIMEM not in paths  # one rank lacks multicast
    assert source == "defaults for 3 ranks"
    assert MULTIMEM in on_ranks(rank_pool, None, (0, 1, 2))[0][1]


@pytest.mark.parametrize("rank", [0, 2])
def test_one_rank_that_fails_makes_all_fall_back(rank_pool, rank):
    (members, _, _, text), still_open, warned = on_ranks(rank_pool, {"symm": (rank,)})
    assert members == ("nccl", "gloo") and still_open == ["gloo", "nccl"]
    assert len(warned) == 1 and f"symm: rank {rank}: MemoryError: no memory for symm" in warned[0]
    assert "symm: not taken" in text


def test_failures_add_up_until_gloo_is_left(rank_pool):
    (members, paths, _, _), still_open, warned = on_ranks(rank_pool, {"symm": (1,), "nccl": (0, 2)})
    assert members == ("gloo",) and still_open == ["gloo"] and paths is None
    assert len(warned) == 1 and "symm: rank 1: " in warned[0] and "nccl: rank 0: " in warned[0]
    (members, _, _, _), still_open, _ = on_ranks(rank_pool, {"gloo": (0, 1, 2)})
    assert members == ("symm", "nccl") and still_open == ["nccl", "symm"]
    outcome, still_open, _ = on_ranks(rank_pool, {"symm": (0,), "nccl": (1,), "gloo": (2,)})
    assert "no transport could be made" in outcome and not still_open


def test_a_fallback_under_strict_fails_everywhere_and_leaves_nothing_open(rank_pool):
    outcome, still_open, _ = on_ranks(rank_pool, {"symm": (1,)}, strict=True)
    assert outcome.startswith("BackendUnavailableError") and "strict=True forbids the fallback to nccl" in outcome
    assert not still_open
    outcome, still_open, _ = on_ranks(rank_pool, {"nccl": (1,)}, backend="nccl")
    assert "backend='nccl' was requested" in outcome and not still_open


def test_the_rank_that_failed_is_named_before_those_that_waited_for_it(rank_pool):
    _, _, warned = on_ranks(rank_pool, {"symm": (0, 1)}, (), (0,))
    assert "symm: rank 1: MemoryError" in warned[0]


def with_table(group, folder):
    os.environ["TP_KERNELS_TUNING_DIR"] = folder if group.rank == 0 else f"{folder}/absent"
    try:
        return create(group)
    finally:
        del os.environ["TP_KERNELS_TUNING_DIR"]


def test_the_table_of_the_first_rank_counts_on_all(rank_pool, monkeypatch):
    rows = [{"bytes": 1 << 20, "us": {ONE_SHOT: 1.0, TWO_SHOT: 2.0}}]
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TP_KERNELS_TUNING_DIR", folder)
        path = table_file("TESTGPU", 2, False)
        path.write_text(json.dumps({"gpu": "TESTGPU", "measured": "today", "us": {"all_reduce": rows}}))
        results = rank_pool(2).run(with_table, folder)
        assert [outcome[2] for outcome, _, _ in results] == ["measured today on TESTGPU"] * 2
        path.write_text("[]")
        (first, second) = rank_pool(2).run(with_table, folder)
        assert first[0][2] == second[0][2] == "defaults for 2 ranks"
        assert "ignores" in first[2][0] and not second[2]


def sums(group):
    inner = group.communicator
    members = {"symm": Peer(inner), "nccl": Library(inner), "gloo": Recorder(inner, "gloo")}
    communicator = RoutedCommunicator(members, numerics="ordered", table=default_table(2), device_type="cpu")
    results = [communicator.all_reduce(torch.full((n,), group.rank + 1.0)).unique().tolist() for n in (3, 1 << 20)]
    gathered = communicator.all_gather(torch.full((1 + group.rank,), float(group.rank)), sizes=[1, 2]).tolist()
    return results, gathered, dict(communicator.counters)


def test_results_over_ranks(rank_pool):
    for found in rank_pool(2).run(sums):
        assert found == ([[3.0], [3.0]], [0.0, 1.0, 1.0], {LAMPORT: 1, TWO_SHOT: 1, SYMM: 1})


def group_without_a_driver(group, strict):
    store = dist.PrefixStore(f"test_routed/{next(_numbers)}", dist.distributed_c10d._get_default_store())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = create_group(
                list(group.ranks),
                group.ranks[group.rank],
                group.process_group,
                name="tp",
                store=store,
                backend="auto",
                timeout=20.0,
                strict=strict,
                device=torch.device("cuda", 0),
            )
        except BackendUnavailableError as error:
            return str(error), None, []
    total = made.all_reduce(torch.ones(2)).tolist()
    made.close()
    return str(made.choice), (made.backend, made.device_type, str(made.device), total), [str(w.message) for w in caught]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what groups of GPUs do on a machine without CUDA")
def test_a_group_of_gpus_without_a_driver_says_so_and_uses_gloo(rank_pool):
    results = rank_pool(2).run(group_without_a_driver, False)
    for text, found, _ in results:
        assert found == ("gloo", "cuda", "cuda:0", [2.0, 2.0])
        assert "symm: not taken (nothing is known about the GPU of rank 0 (" in text
    assert [len(warned) for _, _, warned in results] == [1, 0]
    for text, found, _ in rank_pool(2).run(group_without_a_driver, True):
        assert found is None and "strict=True forbids the fallback to gloo" in text
