"""The peers of the fused norm: which are put together, what is compared, on a CPU in place of GPUs. Tier: no device."""

import pytest
import torch

from tp_kernels import ops
from tp_kernels.testing import bench_all_reduce_norms as norms
from tp_kernels.testing.bench import Timing, write_csv


def timing(microseconds):
    return Timing(microseconds * 1e-6, microseconds * 0.9e-6, microseconds * 1.1e-6)


def test_the_fastest_are_put_together():
    reduces = {"torch_one_shot": timing(9), "torch_two_shot": timing(5), "nccl": timing(100)}
    separate = {"add_rms_norm": timing(3), "F.rms_norm": timing(8), "torch.compile": timing(2)}
    pairs = norms.choose_peers(reduces, separate)
    assert pairs[0] == ("torch_two_shot", "torch.compile") and len(pairs) == 4
    assert {name for pair in pairs for name in pair} == {
        "torch_two_shot",
        "torch_one_shot",
        "torch.compile",
        "add_rms_norm",
    }


def test_rows_compare_with_the_fastest_peer_and_the_same_all_reduce():
    timed = {"all_reduce": timing(8), "all_reduce_same": timing(10), "fused": timing(11)}
    timed |= {"torch_two_shot": timing(9), "torch_two_shot+add_rms_norm": timing(33), "nccl+add_rms_norm": timing(22)}
    rows = {row["path"]: row for row in norms.norm_rows({"kind": "norm"}, timed, {"fused": 3})}
    assert rows["fused"]["over_all_reduce"] == 1.1 and rows["fused"]["speedup"] == 2.0 and rows["fused"]["wrong"] == 3
    assert {row["best_peer"] for row in rows.values()} == {"nccl+add_rms_norm"}
    wrong = norms.norm_rows({}, timed, {"nccl+add_rms_norm": 1})
    assert {row["best_peer"] for row in wrong} == {"torch_two_shot+add_rms_norm"}, "a peer that is wrong is none"
    alone = norms.norm_rows({}, {"all_reduce": timing(10), "fused": timing(12)}, {})
    assert alone[1]["over_all_reduce"] == 1.2 and alone[1]["speedup"] == alone[1]["best_peer"] == ""


class Twice:
    """Stands in for two ranks with the same operands."""

    world_size = 2

    def __init__(self, algorithms=("one_shot", "two_shot", "lamport", "triton"), forget=False):
        self.algorithms, self.forget, self.asked = algorithms, forget, []

    def get_buffer(self, shape, dtype, use="input"):
        return torch.empty(shape, dtype=dtype)

    def all_reduce(self, x, *, out, algorithm):
        self.asked.append(algorithm)
        return torch.mul(x, 2, out=out)

    def all_reduce_add_rms_norm(self, x, residual, weight, eps, *, gather_sum=True, out=None, algorithm=None):
        return ops.add_rms_norm(x if self.forget else x * 2, residual, weight, eps)


def bench_of(symm, monkeypatch, turns):
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def time(ways, nbytes, rounds):
        turns.append((list(ways), rounds))
        for function in ways.values():
            function()
        return {name: timing(len(name)) for name in ways}

    return norms.NormBench(
        symm,
        torch.float32,
        time=time,
        integers=lambda n: torch.arange(n) % 5 - 2.0,
        total=lambda n: 2 * (torch.arange(n) % 5 - 2.0),
        count=lambda mask: int(mask.sum()),
        reduces={"one": (torch.empty, lambda x: x * 2), "other": (torch.empty, lambda x: x + x)},
        meet=lambda: None,
    )


@pytest.mark.parametrize("algorithms", [("one_shot", "two_shot", "lamport", "triton"), ("triton",)])
def test_everything_is_measured_in_turns(monkeypatch, tmp_path, algorithms):
    turns, symm = [], Twice(algorithms)
    bench = bench_of(symm, monkeypatch, turns)
    rows = bench.measure({"kind": "norm", "tokens": 3}, 3, 64) + bench.measure({"kind": "norm", "tokens": 70}, 70, 64)
    assert all(row["wrong"] == 0 for row in rows) and all(row["best_peer"] for row in rows)
    paths = [row["path"] for row in rows if row["tokens"] == 3]
    assert {"all_reduce", "all_reduce_norm", "fused", "fused_gathered", "fused_triton"} <= set(paths)
    assert sum("+" in path for path in paths) == 4 and {"one", "other"} <= set(paths)
    assert "fused_triton" not in [row["path"] for row in rows if row["tokens"] == 70]
    first, then = turns[:2]
    assert first[1] == 3 and {"one", "other", "add_rms_norm", "F.rms_norm", "torch.compile"} <= set(first[0])
    assert then == (paths, None), "ours and the peers in the same turns"
    assert (set(symm.asked) == {"triton"}) == (algorithms == ("triton",))
    write_csv(tmp_path / "rows.csv", rows)


def test_the_same_algorithm_is_measured_where_the_fused_kernel_takes_another(monkeypatch):
    rows = bench_of(Twice(), monkeypatch, []).measure({}, 1024, 128)  # 512 KB: one-shot by itself, two-shot with norm
    assert "all_reduce_same" in [row["path"] for row in rows]


def test_a_wrong_sum_is_counted(monkeypatch):
    rows = bench_of(Twice(forget=True), monkeypatch, []).measure({}, 3, 64)
    wrong = {row["path"] for row in rows if row["wrong"]}
    assert wrong == {"fused", "fused_gathered", "fused_triton"}
