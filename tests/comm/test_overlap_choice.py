"""Which way an overlapped projection takes, by table and on request. Tier: no device (Triton interpreter)."""

import json

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm import LocalCommunicator, TPGroup
from tp_kernels.comm.overlap import (
    Agreement,
    agree,
    agreed,
    may_overlap,
)
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import A100, H100, pretend
from tp_kernels.ops._overlap_choice import (
    choose_overlap,
    overlap_sizes,
    overlap_table,
    planned_chunks,
    tables_fingerprint,
)
from tp_kernels.ops.kernels import matmul
from tp_kernels.testing.delayed import DelayedCommunicator

# The choice -----------------------------------------------------------------------------------------------------------


class Pair(LocalCommunicator):
    """Two ranks of which the other one says what it is told to."""

    overlap_modes = ("chunked",)
    numerics = None

    def __init__(self, other=None):
        super().__init__()
        self.world_size, self.other = 2, other

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        other = x if self.other is None else torch.tensor([self.other], dtype=x.dtype)
        return torch.cat([x, other], dim)


class Fused(Pair):
    """One that multiplies, too; the other rank's sums are zero. Notes what its calls were given."""

    overlap_modes = ("fused",)

    def __init__(self, refuses=None):
        super().__init__()
        self.refuses, self.calls = refuses, []

    def linear_reason(self, rows, width, dtype):
        return self.refuses if width < 1000 else "too wide"

    def fuses_norm(self, width, dtype):
        return width != 13

    def linear_all_reduce(self, x, weight, *, bias=None, residual=None, norm_weight=None, eps=1e-6):
        assert not x.requires_grad or not torch.is_grad_enabled()
        given = {"bias": bias, "residual": residual, "norm_weight": norm_weight}
        self.calls.append("+".join(name for name, tensor in given.items() if tensor is not None))
        y = torch.nn.functional.linear(x, weight, bias)
        y = y if residual is None else y + residual
        return y if norm_weight is None else (torch.nn.functional.rms_norm(y, y.shape[-1:], norm_weight, eps), y)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()

    def write(*rows):
        content = {"gpu": H100.name, "measured": "2026-01-01", "versions": {}, "ops": {overlap_table("local"): rows}}
        (tmp_path / "h100.json").write_text(json.dumps(content))
        tuning.forget_tables()

    yield write
    tuning.forget_tables()


def row(communicator, path="chunked", **us):
    sizes = overlap_sizes(4096, 64, 256, communicator)
    return {"dtype": "16bit", "sizes": sizes, "path": path, "config": {"chunks": 3}, "us": us}


def choose(communicator, m=4096, info=H100, **options):
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((m, 128), (64, 128)))
    options = {"in_features": 256, "overlap": "auto", **options}
    with pretend(info):
        if agreed(communicator) is None:  # meta tensors hold no numbers to compare
            here = tables_fingerprint("local", info)
            agree(communicator, info.num_sms, here, torch.device("cpu"))
        return ops.choose_linear_all_reduce(x, weight, group=TPGroup(communicator), **options)


def test_auto_takes_what_was_measured_only(table):
    pair = Pair()
    nothing = choose(pair)
    assert nothing.path == "none" and "not measured" in nothing.reason
    table(row(pair, none=130.0, chunked=100.0))
    chosen = choose(pair)
    assert (chosen.path, chosen.config) == ("chunked", {"chunks": 3})
    assert chosen.reason == f"chunked 100.0 us, none 130.0 us ({H100.name}, 2026-01-01)"
    assert choose(pair, m=2048).path == "chunked" and choose(pair, m=1024).path == "none"
    assert choose(Pair(), info=A100).path == "none"
    assert "in_features is not given" in choose(pair, in_features=None).reason
    assert choose(pair, overlap="none").path == "none" and choose(pair, overlap="chunked").path == "chunked"
    table(row(pair, none=101.0, chunked=100.0))
    assert choose(pair).path == "none" and "less than 3%" in choose(pair).reason


def test_entries_of_other_groups_do_not_count(table):
    other = Pair()
    other.max_ctas = 8
    table(row(other, none=130.0, chunked=100.0))
    assert choose(other).path == "chunked" and choose(Pair()).path == "none"


def test_ranks_with_other_tables_do_not_overlap(table):
    pair = Pair(other=[100, 7])
    table(row(pair, none=130.0, chunked=100.0))
    assert choose(pair).reason == "the ranks' GPUs or tuning tables differ"
    assert agreed(pair) == Agreement(100, same_tables=False)
    ranks = [planned_chunks(4096, 4096, torch.float16, gpu, 100, 4, alike=False) for gpu in (H100, A100)]
    assert ranks[0] == ranks[1] and len(ranks[0]) > 1, "GPUs of two kinds cut alike"


def test_fused_is_taken_where_it_is_offered_and_was_measured(table):
    fused = Fused()
    assert choose(fused, overlap="fused").path == "fused" and choose(fused).path == "none"
    table(row(fused, "fused", none=130.0, fused=100.0))
    chosen = choose(fused)
    assert chosen.path == "fused" and chosen.reason.startswith("fused 100.0 us, none 130.0 us")
    assert choose(fused, m=128).path == choose(Pair()).path == "none"
    assert choose(Pair()).reason == '"fused" was the fastest, but the local communicator does not offer it'
    assert choose(Fused("it rains")).reason == '"fused" was the fastest, but it rains'
    table(row(fused, "fused", none=101.0, fused=100.0))
    assert choose(fused).path == "none"
    table(row(fused, none=130.0, chunked=100.0))
    assert choose(fused).reason == '"chunked" was the fastest, but the local communicator does not offer it'


def test_fused_that_cannot_be_had_is_an_error(table):
    x, weight = torch.ones(8, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r'"fused" needs CUDA tensors'):
        ops.linear_all_reduce(x, weight, group=TPGroup(Pair()), overlap="fused")
    with pytest.raises(ValueError, match=r"cannot be had: the tensors are on cpu"):
        ops.linear_all_reduce(x, weight, group=TPGroup(Fused()), overlap="fused")
    with pretend(H100):
        for call, message in (
            (lambda: ops.linear_all_reduce(x, weight, group=TPGroup(Fused("it rains")), overlap="fused"), "it rains"),
            (lambda: choose_overlap("column_parallel_linear", x, weight, TPGroup(Fused()), "fused", 8, 3, 4), "has no"),
            (
                lambda: ops.linear_all_reduce(x, Special(weight), group=TPGroup(Fused()), overlap="fused"),
                "the weight is a Special",
            ),
        ):
            with pytest.raises(ValueError, match=f'overlap="fused" cannot be had: .*{message}'):
                call()
        assert choose_overlap("column_parallel_linear", x, weight, TPGroup(Fused()), "auto", 8, 3, 4).path == "none"
        alone = ops.linear_all_reduce(x, weight, group=TPGroup(LocalCommunicator()), overlap="fused")
    assert torch.equal(alone, torch.full((8, 3), 4.0))


class Special(torch.nn.Parameter):
    pass


def test_fused_calls_take_what_follows_along():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x, weight, bias, residual, norm = draw(2, 5, 4), draw(6, 4), draw(6), draw(2, 5, 6), draw(6)
    group = TPGroup(Fused())
    calls = group.communicator.calls
    fused = {"group": group, "overlap": "fused"}
    y = torch.nn.functional.linear(x, weight, bias)
    with pretend(H100):
        assert torch.equal(ops.linear_all_reduce(x, weight, **fused), torch.nn.functional.linear(x, weight))
        assert torch.equal(ops.linear_all_reduce(x, weight, bias, residual=residual, **fused), y + residual)
        both = ops.linear_all_reduce(x, weight, bias, residual=residual, norm_weight=norm, **fused)
        assert torch.equal(both[1], y + residual)
        assert torch.equal(both[0], torch.nn.functional.rms_norm(y + residual, (6,), norm, 1e-6))
        assert calls == ["", "bias+residual", "bias+residual+norm_weight"]
        assert ops.linear_all_reduce(x[:, :0], weight, bias, **fused).shape == (2, 0, 6) and len(calls) == 3
        wide = draw(13, 4), draw(13), draw(2, 5, 13), draw(13)
        normed, _ = ops.linear_all_reduce(x, *wide[:2], residual=wide[2], norm_weight=wide[3], **fused)
        total = torch.nn.functional.linear(x, *wide[:2]) + wide[2]
        torch.testing.assert_close(normed, torch.nn.functional.rms_norm(total, (13,), wide[3], 1e-6))
        assert calls[3:] == ["bias"]


def test_gradients_of_fused_calls_are_those_of_separate_ones():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 4), (6, 4), (6,), (2, 5, 6)
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    group = TPGroup(Fused())
    x, weight, bias, residual = leaves
    with pretend(H100):
        fused = ops.linear_all_reduce(x, weight, bias, group=group, overlap="fused", residual=residual)
    assert group.communicator.calls == [""]  # what follows is recorded by itself
    plain = torch.nn.functional.linear(x, weight) + bias + residual
    grad = torch.randn(fused.shape, generator=generator)
    assert torch.equal(fused, plain)
    ours, theirs = torch.autograd.grad(fused, leaves, grad), torch.autograd.grad(plain, leaves, grad)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_few_rows_are_not_considered(table):
    pair = Pair()
    assert choose(pair, m=128).reason == "128 rows are a single row of tiles"
    group = TPGroup(pair)
    assert [may_overlap(group, "auto", m) for m in (1, 128, 129)] == [False, False, True]
    assert may_overlap(group, "chunked", 1) and not may_overlap(group, "none", 4096)
    assert [may_overlap(TPGroup(Fused()), "fused", m) for m in (1, 128, 129)] == [False, False, True]
    assert not may_overlap(TPGroup(LocalCommunicator()), "chunked", 4096)


def test_kernels_are_planned_for_all_rows(table, tmp_path):
    """Interpreted: a chunk has the bits of these rows of one call, since path and configuration are those of one."""
    generator = torch.Generator().manual_seed(0)
    x, weight, residual, norm = (
        torch.randn(shape, generator=generator).half() for shape in ((150, 64), (48, 64), (150, 48), (48,))
    )
    config = matmul.default_config(A100, torch.float16, 150, 48, 64)._asdict()
    sizes = {"m": 150, "n": 48, "k": 64}
    entry = {"dtype": "16bit", "sizes": sizes, "path": "triton", "config": config, "us": {"triton": 1.0, "torch": 2.0}}
    content = {"gpu": A100.name, "measured": "2026-01-01", "versions": {}, "ops": {"linear": [entry]}}
    (tmp_path / "a100.json").write_text(json.dumps(content))
    tuning.forget_tables()
    group = TPGroup(DelayedCommunicator(Pair()))
    with pretend(A100):
        assert ops.explain("linear", x, weight).name == "triton"
        y = ops.linear(x, weight)
        call = {"group": group, "overlap": "chunked", "chunks": [7, 100, 43]}
        assert torch.equal(ops.linear_all_reduce(x, weight, **call), y)
        found = ops.linear_all_reduce(x, weight, residual=residual, norm_weight=norm, **call)
        wanted = ops.add_rms_norm(y, residual, norm)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert group.communicator.in_flight == 0


def test_fingerprint_follows_the_entries(table):
    table()
    empty = tuning.fingerprint(overlap_table("local"), H100)
    table(row(Pair(), none=2.0, chunked=1.0))
    filled = tuning.fingerprint(overlap_table("local"), H100)
    assert filled != empty and filled == tuning.fingerprint(overlap_table("local"), H100) < 2**63
    assert tuning.fingerprint(overlap_table("other"), H100) == empty != tuning.fingerprint(overlap_table("local"), A100)


def test_auto_without_anything_to_overlap():
    x, weight = torch.ones(8, 4), torch.ones(3, 4)
    alone = ops.choose_linear_all_reduce(x, weight, group=TPGroup(LocalCommunicator()))
    assert alone.path == "none" and "one rank" in alone.reason
    assert "on cpu" in ops.choose_linear_all_reduce(x, weight, group=TPGroup(Pair())).reason
    at_once = Pair()
    at_once.overlap_modes = ()
    assert "does not work beside" in ops.choose_linear_all_reduce(x, weight, group=TPGroup(at_once)).reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": "eager"}, "overlap must be one of auto, none, chunked, fused"),
        ({"overlap": "fused"}, 'overlap="fused" needs CUDA tensors'),
        ({"overlap": "fused", "chunks": 2}, "tile by tile, got 2"),
        ({"chunks": 0}, "chunks must be a positive int"),
        ({"chunks": [3, 4]}, r"sum to 8, got \[3, 4\]"),
        ({"norm_weight": torch.ones(3)}, "expected one"),
        ({"residual": torch.ones(8, 4)}, "expected a residual"),
        ({"residual": torch.ones(8, 3), "norm_weight": torch.ones(4)}, r"expected a norm_weight \[3\]"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_all_reduce(torch.ones(8, 4), torch.ones(3, 4), group=TPGroup(Pair()), **options)
