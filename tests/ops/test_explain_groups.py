"""``ops.explain`` of ops that communicate: nothing is sent, and it says what runs. Tier: no device, CPU ranks."""

import inspect
import json
from collections import Counter

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm import LocalCommunicator, Numerics
from tp_kernels.comm.overlap import Agreement, _agreements
from tp_kernels.comm.paths import default_table
from tp_kernels.comm.routed import RoutedCommunicator
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.ops import tuning
from tp_kernels.ops._explain import _WITH_GROUP
from tp_kernels.ops._gpu import H100, pretend

M, N, K = 1024, 256, 64  # of a rank


class Silence(LocalCommunicator):
    """Four ranks on their own stream, of which none ever answers."""

    overlap_modes = ("chunked",)

    def __init__(self, backend="nccl"):
        super().__init__("tp")
        self.world_size, self.backend = 4, backend

    def all_gather(self, *_, **__):
        raise AssertionError("explain sends nothing")

    all_reduce = reduce_scatter = broadcast = barrier = all_gather


@pytest.fixture
def group():
    return TPGroup(Silence())


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """Writes what was measured of the ops: (path, config, microseconds)."""
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()

    def write(path, config, **us):
        ranks = {"ranks": -4, "ranks_per_gpu": -1, "max_ctas": 0}
        shapes = {
            "linear_all_reduce": {"m": M, "n": N, "in_features": 4 * K},
            "linear_reduce_scatter": {"m": M, "n": N, "in_features": 4 * K},
            "column_parallel_linear": {"m": M, "n": 4 * N, "in_features": K},
        }
        entry = {"dtype": "16bit", "path": path, "config": config, "us": us}
        content = {f"{op}.nccl": [{**entry, "sizes": {**sizes, **ranks}}] for op, sizes in shapes.items()}
        text = {"gpu": H100.name, "measured": "2026-01-01", "versions": {}, "ops": content}
        (tmp_path / "h100.json").write_text(json.dumps(text))
        tuning.forget_tables()

    yield write
    tuning.forget_tables()


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


CALLS = {
    "linear_all_reduce": ((M, K), {"in_features": 4 * K}),
    "linear_reduce_scatter": ((M, K), {"in_features": 4 * K, "sizes": [M // 4] * 4}),
    "column_parallel_linear": ((M // 4, K), {"out_features": 4 * N, "sequence_sizes": [M // 4] * 4}),
}


def explain(op, group, **changes):
    shape, arguments = CALLS[op]
    with pretend(H100):
        return ops.explain(op, half(*shape), half(N, K), group=group, **{**arguments, **changes})


@pytest.mark.parametrize("op", sorted(CALLS))
def test_overlapped_ops(op, group, tables):
    early = explain(op, group)
    assert (early.name, early.config) == ("none", {}) and "have not compared their tables yet" in early.reason
    asked = explain(op, group, overlap="chunked", chunks=3)
    assert (asked.name, asked.config) == ("chunked", {"chunks": 3}) and "requested" in asked.reason
    assert explain(op, group, overlap="none").reason == "requested"
    _agreements[group.communicator] = Agreement(132, True)
    assert "not measured on" in explain(op, group).reason
    tables("chunked", {"chunks": 3}, chunked=100.0, none=130.0)
    found = explain(op, group)
    assert (found.name, found.config) == ("chunked", {"chunks": 3})
    assert "chunked 100.0 us, none 130.0 us" in found.reason and "2026-01-01" in found.reason
    tables("chunked", {"chunks": 3}, chunked=100.0, none=101.0)
    assert (found := explain(op, group)).name == "none" and "gains less than 3%" in found.reason
    _agreements[group.communicator] = Agreement(132, False)
    assert "tables differ" in explain(op, group).reason
    assert (
        "not given" in explain(op, group, **{name: None for name in CALLS[op][1] if name.endswith("features")}).reason
    )


@pytest.mark.parametrize("op", sorted(CALLS))
def test_why_nothing_is_overlapped(op):
    shape, arguments = CALLS[op]
    alone = TPGroup(LocalCommunicator())
    sizes = {name: [shape[0]] for name in arguments if name.endswith("sizes")}
    with pretend(H100):
        path = ops.explain(op, half(*shape), half(N, K), group=alone, **{**arguments, **sizes})
        assert str(path) == "none: one rank has nobody to talk to"
        other = Silence("shm")
        other.overlap_modes = ()
        path = ops.explain(getattr(ops, op), half(*shape), half(N, K), group=TPGroup(other), **arguments)
        assert "shm communicator does not work beside" in path.reason
    cpu = ops.explain(op, torch.zeros(shape), torch.zeros(N, K), group=TPGroup(Silence()), **arguments)
    assert "the tensors are on cpu" in cpu.reason


def test_calls_are_bound_to_the_ops_own_signature(group):
    with pytest.raises(TypeError, match="unexpected keyword argument 'bais'"):
        ops.explain("linear_all_reduce", half(4, K), half(N, K), bais=None, group=group)
    with pytest.raises(ValueError, match=r"expected one of .*linear_all_reduce.*, got 'nothing'"):
        ops.explain("nothing", half(4, K))
    for op, choose in _WITH_GROUP.values():  # a chooser asks for nothing that a call could not give
        assert set(inspect.signature(choose).parameters) <= set(inspect.signature(op).parameters) | {"ask"}


# All-reduce and norm -------------------------------------------------------------------------------------------------


class Peer(LocalCommunicator):
    """Peer memory of four ranks: notes by which algorithm it would have run."""

    fused_norm = True
    has_multicast = False

    def __init__(self, algorithms):
        super().__init__("tp")
        self.world_size, self.backend, self.algorithms, self.calls = 4, "symm", algorithms, Counter()
        self.numerics = Numerics("float32", "rank", same_bits_on_all_ranks=True, size_dependent=False)

    def fuses_norm(self, width, dtype):
        return width <= 16384

    def all_reduce_add_rms_norm(self, partial, residual, weight, eps, *, algorithm=None, **options):
        self.calls[algorithm] += 1
        return partial, residual


def routed(algorithms):
    peer = Peer(algorithms)
    found = RoutedCommunicator({"symm": peer}, numerics="ordered", table=default_table(4), device_type="cpu")
    return TPGroup(found), peer


CUDA = ("one_shot", "two_shot", "lamport")


@pytest.mark.parametrize(
    ("algorithms", "rows", "width", "dtype", "expected"),
    [
        (CUDA, 1, 4096, torch.bfloat16, "lamport"),
        (CUDA, 7, 4096, torch.float16, "lamport"),
        (CUDA, 300, 4096, torch.bfloat16, "two_shot"),
        (CUDA, 2, 16384, torch.bfloat16, "one_shot"),  # rows too wide for the Lamport kernel
        (("triton",), 1, 4096, torch.bfloat16, "triton"),
        (("triton",), 300, 577, torch.float32, "triton"),
    ],
)
def test_the_norms_algorithm_is_the_one_that_runs(algorithms, rows, width, dtype, expected):
    group, peer = routed(algorithms)
    x, weight = torch.zeros(rows, width, dtype=dtype), torch.ones(width, dtype=dtype)
    path = ops.explain("all_reduce_add_rms_norm", x, x, weight, 1e-6, group)
    assert (path.name, path.config) == ("fused", {"algorithm": expected})
    assert path.reason == f"{expected} by defaults for 4 ranks" and not peer.calls
    ops.all_reduce_add_rms_norm(x, x, weight, 1e-6, group)
    assert peer.calls == {expected: 1}


def test_peer_memory_without_routes_chooses_by_size():
    x, weight = torch.zeros(300, 4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    for algorithms, expected in ((CUDA, "two_shot by its size"), (("triton",), "triton by the native core")):
        path = ops.explain("all_reduce_add_rms_norm", x, x, weight, group=TPGroup(Peer(algorithms)))
        assert path.name == "fused" and path.reason.startswith(expected)


def test_why_the_norm_is_separate(group):
    x, weight = torch.zeros(4, 64), torch.ones(64)
    fused, _ = routed(CUDA)
    for reason, arguments in {
        "the nccl communicator does not offer it": (x, x, weight, 1e-6, group),
        "a gradient is needed": (x, x, weight.clone().requires_grad_(), 1e-6, fused),
        "no kernel for rows of 20000": (torch.zeros(1, 20000), torch.zeros(1, 20000), torch.ones(20000), 1e-6, fused),
        "one rank has nobody to talk to": (x, x, weight),
    }.items():
        path = ops.explain(ops.all_reduce_add_rms_norm, *arguments)
        assert path.name == "separate" and reason in path.reason
    with pytest.raises(ValueError, match="expected a weight"):
        ops.explain("all_reduce_add_rms_norm", x, x, torch.ones(3), group=fused)


# Real ranks ----------------------------------------------------------------------------------------------------------


def _one_rank_asks(group):
    if group.rank != 0:
        return []
    x, weight, norm = torch.zeros(6, 8), torch.zeros(5, 8), torch.ones(8)
    told = [ops.explain("linear_all_reduce", x, weight, group=group, in_features=24)]
    told.append(ops.explain("linear_reduce_scatter", x, weight, group=group, sizes=[2] * 3, in_features=24))
    told.append(ops.explain("column_parallel_linear", x, weight, group=group))
    told.append(ops.explain("all_reduce_add_rms_norm", x, x, norm, group=group))
    told.append(ops.explain("linear_all_reduce", x, weight, group=group, overlap="chunked"))
    return [(path.name, path.reason) for path in told]


def test_a_rank_asks_alone(rank_pool):
    told = rank_pool(3).run(_one_rank_asks, timeout=30.0)[0]
    assert [name for name, _ in told] == ["none", "none", "none", "separate", "chunked"]
    assert "shm communicator" in told[0][1] and "shm communicator" in told[3][1]
