"""The overlap benchmark on CPU ranks: cases, checks, the gate, the whole way to the files. Tier: no device, and 2 and 3
processes."""

import contextlib
import csv
import io
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tp_kernels.comm import LocalCommunicator, TPGroup
from tp_kernels.comm.overlap import SMALLEST_CHUNK, agree
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.ops._overlap_choice import OVERLAPPED_OPS, choose_overlap, overlap_sizes, overlap_table
from tp_kernels.ops._token_pieces import plan_pieces
from tp_kernels.ops.tuning import Choice
from tp_kernels.testing import bench_overlap as bench
from tp_kernels.testing.bench import Timing
from tp_kernels.testing.delayed import DelayedCommunicator
from tp_kernels.testing.overlap_bench import report
from tp_kernels.testing.overlap_bench.case import Candidate, Case, Operands, Plan, cases_of
from tp_kernels.testing.overlap_bench.run import Bench, Peers

TINY = bench.Options(
    rows=(24, 7),
    shapes=((8, 13),),
    columns=((26, 12),),
    ops=OVERLAPPED_OPS,
    chunks=(2, 3),
    growth=(1.0, 2.0),
    dtype="bfloat16",
    rounds=1,
    device="cpu",
)


def options(**changes):
    return bench.Options(**{**vars(TINY), **changes})


def printed_by(function, *arguments):
    """What a function returns and prints; ranks' output goes nowhere that a test can see."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = function(*arguments)
    return result, printed.getvalue()


def measured(group, of):
    return printed_by(bench.measure_on, group, of)


@pytest.mark.parametrize("world_size", [2, 3])
def test_on_ranks(rank_pool, world_size, tmp_path):
    files = {"csv": str(tmp_path / "overlap.csv"), "tune": str(tmp_path / "table.json")}
    (rows, printed), *others = rank_pool(world_size).run(measured, options(**files))
    assert all(other == (rows, "") for other in others)
    ours = [row for row in rows if row["path"] in report.OURS]
    assert list(dict.fromkeys((row["m"], row["op"]) for row in ours)) == [
        (m, op) for m in (24, 7) for op in OVERLAPPED_OPS
    ]
    for op in OVERLAPPED_OPS:
        assert {row["path"] for row in ours if row["op"] == op and row["m"] == 24} == {"none", "chunked"}
    assert all(row["wrong"] == row["wrong_sums"] == 0 and row["time_us"] > 0 for row in rows)
    assert all(sum(map(int, row["rows"].split("+"))) == row["m"] for row in ours)
    assert {row["gate"] for row in ours} == {"none"}, "so few rows are never overlapped"
    peers = [row for row in rows if row["backend"] == "torch"]
    assert {row["path"] for row in peers} == {"torch_gloo"} and all(row["ours_over_peer"] > 0 for row in peers)
    assert {row["op"] for row in peers if row["m"] == 24} == set(OVERLAPPED_OPS)
    assert "torch_async_tp: the ranks have no memory in common" in printed and "ours/peer" in printed
    with open(files["csv"], newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row["path"] for row in rows]
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table["ops"]) == {overlap_table("shm", op) for op in OVERLAPPED_OPS}
    assert all(row["us"][row["path"]] == min(row["us"].values()) for rows in table["ops"].values() for row in rows)


# Checks ---------------------------------------------------------------------------------------------------------------


class Careless(DelayedCommunicator):
    """Beside the caller it loses a row."""

    def all_reduce_async(self, x, op="sum", *, out=None):
        handle = super().all_reduce_async(x, op, out=out)
        wait = handle.wait
        handle.wait = lambda: wait().index_fill_(0, torch.tensor([0]), 0)
        return handle


class Broken(DelayedCommunicator):
    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        raise RuntimeError("made up")


def group_over(group, kind):
    return TPGroup(kind(group.communicator), ranks=group.ranks, process_group=group.process_group)


def careless(group):
    return bench.measure(group, {0: group_over(group, Careless)}, options(ops=OVERLAPPED_OPS[:1]), "cpu")


def test_wrong_results_are_counted_and_win_nothing(rank_pool):
    rows, _ = rank_pool(2).run(careless)
    chunked = [row for row in rows if row["path"] == "chunked"]
    assert chunked and all(row["wrong"] and row["wrong_sums"] for row in chunked)
    assert [set(entry["us"]) for entry in report.entries(rows)] == [{"none"}] * 2


def half_broken(group):
    groups = {0: group_over(group, Broken), 4: group_over(group, DelayedCommunicator)}
    return printed_by(bench.measure, group, groups, options(ops=OVERLAPPED_OPS[2:]), "cpu")


def test_a_communicator_that_fails_is_left_out_everywhere(rank_pool):
    (rows, printed), (other, _) = rank_pool(2).run(half_broken)
    assert rows == other
    assert [row["max_ctas"] for row in rows if row["failed"]] == [0], "once"
    assert {row["max_ctas"] for row in rows if row["path"]} == {4} and {row["m"] for row in rows} == {24, 7}
    assert "FAILED: RuntimeError: made up" in printed


def test_sums_of_integers_fit_into_bf16():
    case = Case("linear_all_reduce", 64, 64, 14336)
    expected = Operands(case, 0, 4, torch.bfloat16, "cpu", exact=True).expected()
    assert expected.abs().max() > 20 and torch.equal(expected.bfloat16().float(), expected)


# Torch's asynchronous TP, its ops carried out by Gloo ----------------------------------------------------------------


def beside_async_tp(group):
    name = group.process_group.group_name

    def gather_matmul(a, bs, gather_dim, group_name, *, return_A=True):
        assert gather_dim == 0 and group_name == name and not return_A
        parts = [torch.empty_like(a) for _ in range(group.world_size)]
        dist.all_gather(parts, a.contiguous(), group=group.process_group)
        return None, [torch.cat(parts) @ b for b in bs]

    def matmul_scatter(a, b, reduce_op, scatter_dim, group_name):
        assert reduce_op == "sum" and scatter_dim == 0 and group_name == name
        total = group.all_reduce(a @ b)
        return total.chunk(group.world_size)[group.rank].clone()

    import torch.distributed._symmetric_memory  # defines the ops

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", gather_matmul, "CPU")
    library.impl("fused_matmul_reduce_scatter", matmul_scatter, "CPU")
    try:
        peers = Peers("gloo", group.process_group, name)
        run = Bench(group, [(0, group)], options(rows=(24,)), "cpu", peers)
        return run.run(), dict(run.left_out)
    finally:
        library._destroy()


def test_torch_async_tp_is_called_as_its_schema_says(rank_pool):
    rows, left_out = rank_pool(2).run(beside_async_tp)[0]
    found = {row["op"]: row for row in rows if row["path"] == "torch_async_tp"}
    assert set(found) == {"linear_reduce_scatter", "column_parallel_linear"}
    assert all(row["wrong_sums"] == 0 and row["ours_over_peer"] > 0 for row in found.values())
    assert left_out == {"torch_async_tp: there is none for all-reduce": 1}


# Pure ----------------------------------------------------------------------------------------------------------------


def timing(microseconds):
    return Timing(microseconds * 1e-6, microseconds * 0.9e-6, microseconds * 1.1e-6)


def rows_of(m, op="linear_all_reduce", backend="local", **us):
    common = {"op": op, "backend": backend, "m": m, "n": 64, "in_features": 256, "ranks": 2, "ranks_per_gpu": 1}
    plans = {"chunked": Plan("chunked", Candidate(2, 2.0, (m // 4, m - m // 4)))}
    chosen = [plans.get(name, Plan(name)) for name in us]
    timed = {"compute": timing(50), "comm": timing(100)} | {
        str(plan): timing(time) for plan, time in zip(chosen, us.values(), strict=True)
    }
    zeros = {plan: {"differs": 0, "wrong": 0, "wrong_sums": 0} for plan in chosen}
    return report.plan_rows(common | {"max_ctas": 0}, chosen, timed, zeros)


def test_rows():
    none, chunked, fused = rows_of(4096, none=150, chunked=110, fused=100)
    assert (none["hidden"], chunked["hidden"], fused["hidden"]) == ("", 0.8, 1.0)
    assert chunked["over_none"] == 1.364 and chunked["rows"] == "1024+3072" and chunked["q20_us"] == 99.0
    assert [str(report.plan_of(row)) for row in (none, chunked, fused)] == ["none", "chunked 1024+3072", "fused"]
    timed = {"none": timing(150), "ours": timing(100), "torch_nccl": timing(200)}
    peer = report.peer_row({"op": "x"}, "torch_nccl", timed, 0, "symm fused")
    assert peer["ours_over_peer"] == 0.5 and peer["over_none"] == 0.75
    assert set(peer) - {"op"} == set(none) - {"op", "backend", "m", "n", "in_features", "ranks", "ranks_per_gpu"} - {
        "max_ctas"
    }
    failed = report.failed_row({"op": "x"}, "no")
    assert set(failed) == set(peer) and list(failed)[-1] == "failed"


class Pair(LocalCommunicator):
    overlap_modes = ("chunked", "fused")

    def __init__(self):
        super().__init__()
        self.world_size = 2

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        return torch.cat([x, x], dim)


@pytest.mark.parametrize("info, m", [(None, 47), (H100, 4096), (H100, 4097), (H100, 16384)])
@pytest.mark.parametrize("op", ["column_parallel_linear", "linear_reduce_scatter"])
def test_what_is_measured_is_what_the_table_makes(op, info, m):
    """The rows that are forced are those that the op makes of the table's entry."""
    case, group, sms = Case(op, m, 28672, 4096), TPGroup(Pair()), 1 if info is None else 32
    agree(group.communicator, sms, 7, torch.device("cpu"))
    sizes, n = case.tokens(2), 14336 if case.gathers else 28672
    x = torch.empty(sizes[0], 8, dtype=torch.bfloat16, device="cpu" if info is None else "meta")
    plans = case.schedules(2, torch.bfloat16, info, sms, options(chunks=(2, 3, 5)))
    assert len(plans) >= 3
    with pretend(info) if info else contextlib.nullcontext():
        for plan in plans:
            entry = Choice("chunked", "", {"chunks": plan.chunks, "growth": plan.growth})
            by_table, _ = plan_pieces(entry, x, group, sizes, None, n)
            forced, _ = plan_pieces(entry, x, group, sizes, list(plan.rows), n)
            assert by_table == forced and len(forced) == len(plan.rows)


@pytest.mark.parametrize(
    "m, us, wanted",
    [
        (4096, {"none": 150, "chunked": 110}, "chunked"),
        (4096, {"none": 150, "chunked": 160}, "none"),
        (4096, {"none": 150, "chunked": 148}, "none"),
        (SMALLEST_CHUNK, {"none": 150, "chunked": 110}, "none"),
    ],
)
def test_the_gate_is_what_auto_takes_by_the_table(tmp_path, monkeypatch, m, us, wanted):
    rows = rows_of(m, **us)
    found = report.set_gates(rows)
    assert {row["gate"] for row in rows} == {wanted}
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    report.write_table(found, torch.bfloat16, tmp_path / "h100.json", H100.name)
    tuning.forget_tables()
    group = TPGroup(Pair())
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((m, 128), (64, 128)))
    agree(group.communicator, 132, 7, torch.device("cpu"))
    with pretend(H100):
        choice = choose_overlap("linear_all_reduce", x, weight, group, "auto", m, 64, 256)
    tuning.forget_tables()
    assert choice.path == wanted
    if wanted == "chunked":
        assert choice.config == {"chunks": 2, "growth": 2.0}
    assert found[0]["sizes"] == overlap_sizes(m, 64, 256, group.communicator)


def test_ops_and_communicators_have_entries_of_their_own():
    rows = rows_of(4096, none=150, chunked=110) + rows_of(4096, backend="symm", none=90, fused=70)
    rows += rows_of(4096, op="linear_reduce_scatter", none=80)
    found = {(entry["op"], entry["backend"]): entry["path"] for entry in report.set_gates(rows)}
    assert found == {
        ("linear_all_reduce", "local"): "chunked",
        ("linear_all_reduce", "symm"): "fused",
        ("linear_reduce_scatter", "local"): "none",
    }
    assert [row["gate"] for row in rows] == ["chunked", "chunked", "fused", "fused", "none"]


def plans(bench, modes, device="cuda", backend="symm"):
    over = SimpleNamespace(communicator=SimpleNamespace(overlap_modes=modes), backend=backend)
    return bench._plans(Case("linear_all_reduce", 1024, 64, 256), over, 10e-6, 1000e-6, 1010e-6)


def test_ways_that_are_not_offered_are_said_and_hopeless_ones_measured_at_least_twice():
    group = SimpleNamespace(rank=0, world_size=2, process_group=None)
    bench_here = Bench.__new__(Bench)
    sizes = {"device": "cuda", "dtype": torch.float32, "_info": None, "_sms": 1}
    bench_here.__dict__.update(group=group, options=TINY, left_out=Counter(), **sizes)
    assert plans(bench_here, ("fused",)) == [Plan("fused")] and not bench_here.left_out
    assert plans(bench_here, ()) == []
    assert list(bench_here.left_out) == ['"fused": the symm communicator does not offer it here']
    found = plans(bench_here, ("chunked",), backend="nccl")
    assert len(found) == 2 and all(plan.path == "chunked" for plan in found), "1% is all that there is to gain"


def test_shapes_that_the_fused_kernel_does_not_take_are_left_out():
    class Refusing:
        def call(self, over, plan):
            assert plan.path == "fused"
            raise ValueError("too wide")

    bench_here = Bench.__new__(Bench)
    bench_here.left_out = Counter()
    assert not bench_here._takes(Refusing(), None, Plan("fused")) and dict(bench_here.left_out) == {"too wide": 1}
    assert bench_here._takes(Refusing(), None, Plan("chunked"))


def test_cases_begin_with_the_first_rows():
    found = cases_of(TINY)
    assert [(case.op, case.m) for case in found] == [(op, m) for m in (24, 7) for op in OVERLAPPED_OPS]
    with pytest.raises(ValueError, match="unknown op 'linear'"):
        Case("linear", 1, 1, 1)


# The command ---------------------------------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--ranks", "2", "--op", "linear_all_reduce", "--layers", "o", "--rows", "2"]
SMALL += ["--rounds", "1", "--dtype", "float32", "--no-peers", "--growth", "1", "--chunks", "2"]


def test_command_starts_ranks_and_writes_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.ROW_SHAPES, "o", (8, 13))
    assert bench.main([*SMALL, "--csv", str(tmp_path / "overlap.csv")]) == 0
    with open(tmp_path / "overlap.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["none", "chunked"] and rows[1]["rows"] == "1+1"


def test_what_the_minutes_leave_out_is_named(rank_pool, capsys):
    (rows, printed), _ = rank_pool(2).run(measured, options(minutes=1e-9))
    assert rows == [] and "--minutes 1e-09 were over: linear_all_reduce 24 x 8 x 13, linear_red" in printed
    with pytest.raises(SystemExit):
        bench.main([*SMALL, "--op", "column_parallel_linear"])
    assert "nothing was measured" in capsys.readouterr().err
