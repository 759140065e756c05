"""Matmuls beside the collectives of sequence parallelism. Tier: no device, and CPU ranks (2 and 3 processes).

On CPU ranks a ``DelayedCommunicator`` stands in for one that works beside the caller: results are NaN until waited for.
"""

import importlib
import json
import math
import random
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tp_kernels import ops
from tp_kernels.comm import LocalCommunicator, TPGroup
from tp_kernels.comm.overlap import agree
from tp_kernels.ops import _token_pieces as pieces_module
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import H100, GpuInfo, pretend
from tp_kernels.ops._overlap_choice import overlap_sizes, overlap_table, tables_fingerprint
from tp_kernels.ops._token_pieces import gather_matmul, matmul_scatter, plan_pieces, token_pieces
from tp_kernels.ops.tuning import Choice
from tp_kernels.testing.delayed import DelayedCommunicator

# The pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100))
def test_pieces_cover_every_rank_s_tokens(seed):
    draw = random.Random(seed)
    sizes = [draw.choice([0, draw.randint(1, 40), 40]) for _ in range(draw.randint(2, 5))]
    longest = max(sizes)
    stops = sorted({*(draw.randint(0, longest) for _ in range(draw.randint(0, 6))), longest})
    pieces = token_pieces(sizes, stops)
    for rank, size in enumerate(sizes):
        parts = [piece[rank] for piece in pieces]
        assert [token for a, b in parts for token in range(a, b)] == list(range(size))
    assert all(any(b > a for a, b in piece) for piece in pieces)
    if len(set(sizes)) == 1:
        assert all(len(set(piece)) == 1 for piece in pieces)


class Pair(LocalCommunicator):
    """The first of two ranks, of which the other one has the same tensors."""

    overlap_modes = ("chunked",)
    numerics = None

    def __init__(self):
        super().__init__()
        self.world_size = 2

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        return torch.cat([x, x], dim)

    def reduce_scatter(self, x, op="sum", *, dim=0, sizes=None, timeout=None):
        return 2 * x.narrow(dim, 0, sizes[0])


SMALL = GpuInfo(H100.name, H100.capability, 4)  # a wave: 4 tiles of 128 x 256


def ends(pieces):
    return [piece[0][1] for piece in pieces]


def test_pieces_are_whole_waves():
    group, chunked = TPGroup(Pair()), Choice("chunked", "", {"chunks": 3, "growth": 2.0})
    agree(group.communicator, SMALL.num_sms, 0, torch.device("cpu"))
    x = torch.empty(2048, 64, dtype=torch.bfloat16, device="meta")
    with pretend(SMALL):
        # 16 rows of tiles on each rank, one tile wide on both together: four waves, growing.
        pieces, overlapped = plan_pieces(chunked, x, group, [2048, 2048], None, 128)
        assert ends(pieces) == [512, 1024, 2048] and overlapped
        # Twice as wide: a row of tiles on both ranks is two tiles, and there are eight waves.
        assert ends(plan_pieces(chunked, x, group, [2048, 2048], None, 256)[0]) == [256, 768, 2048]
        assert ends(plan_pieces(chunked, x, group, [2048, 2047], 2, 128)[0]) == [1024, 2048]
        # Two sequences of half the length are as many rows.
        folded = x.view(2, 1024, 64)
        assert ends(plan_pieces(chunked, folded, group, [1024, 1024], None, 128)[0]) == [256, 512, 1024]
        assert plan_pieces(chunked, x[:512], group, [512, 512], 4, 128) == ([], False), "one wave is not cut"
        # Nothing that all ranks share says how wide the result is: equal parts.
        assert ends(plan_pieces(chunked, x[:512], group, [512, 512], 4, None)[0]) == [128, 256, 384, 512]
        assert ends(plan_pieces(chunked, x, group, [2048, 2048], [4, 4092], 128)[0]) == [2, 2048]
        pieces, overlapped = plan_pieces(Choice("none", ""), x, group, [2048, 2048], 2, 128)
        assert ends(pieces) == [1024, 2048] and not overlapped
    assert plan_pieces(Choice("none", ""), x, group, [2048, 2048], None, 128) == ([], False)


def test_the_first_call_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(pieces_module, "agreement", lambda communicator, x: None)
    group, x, w = TPGroup(Pair()), torch.ones(8, 4), torch.ones(3, 4)
    for call in (
        lambda: ops.column_parallel_linear(x, w, group=group, sequence_sizes=[8, 8], chunks=2),
        lambda: ops.linear_reduce_scatter(x, w, group=group, sizes=[4, 4], chunks=2),
    ):
        with pytest.raises(ValueError, match="cannot be captured in a CUDA graph: call once before"):
            call()


# The choice -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()

    def write(op, **us):
        sizes = overlap_sizes(4096, 128, 256, Pair())
        path = min(us, key=us.get)
        entry = {"dtype": "16bit", "sizes": sizes, "path": path, "config": {"chunks": 4, "growth": 1.0}, "us": us}
        content = {"gpu": H100.name, "measured": "2026-01-01", "versions": {}}
        (tmp_path / "h100.json").write_text(json.dumps({**content, "ops": {overlap_table("local", op): [entry]}}))
        tuning.forget_tables()

    yield write
    tuning.forget_tables()


def agreed_pair(num_sms=SMALL.num_sms):
    group = TPGroup(DelayedCommunicator(Pair()))
    agree(group.communicator, num_sms, tables_fingerprint("local", SMALL), torch.device("cpu"))
    group.communicator.log.clear()
    return group


def test_auto_takes_what_was_measured_for_each_op(table):
    own, everyone = torch.ones(2048, 256, dtype=torch.bfloat16), torch.ones(4096, 128, dtype=torch.bfloat16)
    column, row = torch.ones(64, 256, dtype=torch.bfloat16), torch.ones(128, 128, dtype=torch.bfloat16)
    sizes = [2048, 2048]

    def paths(group):
        with pretend(SMALL):
            call = {"group": group, "sequence_sizes": sizes}
            gathered = ops.choose_column_parallel_linear(own, column, out_features=128, **call)
            return gathered.path, ops.choose_linear_reduce_scatter(everyone, row, group=group, in_features=256).path

    assert paths(agreed_pair()) == ("none", "none")
    table("column_parallel_linear", none=130.0, chunked=100.0)
    assert paths(agreed_pair()) == ("chunked", "none")
    group = agreed_pair()
    with pretend(SMALL):
        call = {"group": group, "sequence_sizes": sizes}
        assert torch.equal(
            ops.column_parallel_linear(own, column, out_features=128, **call), 256.0 * torch.ones(4096, 64)
        )
        assert group.communicator.log == ["all_gather_async"] * 4 + ["all_gather wait"] * 4
        unnamed = ops.choose_column_parallel_linear(own, column, **call)
        assert unnamed.path == "none" and "out_features is not given" in unnamed.reason
        with torch.autocast("cpu", torch.bfloat16):
            cast = ops.choose_column_parallel_linear(own, column, out_features=128, **call)
        assert cast.path == "none" and cast.reason == "autocast is on"
        whole = ops.choose_column_parallel_linear(own, column, group=group, out_features=128)
        assert whole.path == "none" and "nothing to gather" in whole.reason
    table("linear_reduce_scatter", none=130.0, chunked=100.0)
    assert paths(agreed_pair()) == ("none", "chunked")
    group = agreed_pair()
    with pretend(SMALL):
        out = ops.linear_reduce_scatter(everyone, row, sizes=sizes, group=group, in_features=256)
        assert torch.equal(out, 256.0 * torch.ones(2048, 128))
        assert group.communicator.log == ["reduce_scatter_async"] * 4 + ["reduce_scatter wait"] * 4
        assert "in_features is not given" in ops.choose_linear_reduce_scatter(everyone, row, group=group).reason
        empty = ops.choose_linear_reduce_scatter(everyone[:, :0], row[:, :0], group=group, in_features=256)
        assert empty.path == "chunked", "a rank without features decides as the others do"
    table("linear_reduce_scatter", none=101.0, chunked=100.0)
    assert paths(agreed_pair()) == ("none", "none")


def test_a_rank_s_own_columns_do_not_decide_about_the_pieces(monkeypatch):
    module, seen = importlib.import_module("tp_kernels.ops.column_parallel_linear"), []
    monkeypatch.setattr(module, "plan_pieces", lambda *arguments: (seen.append(arguments[-1]), ([], False))[1])
    call = {"group": TPGroup(Pair()), "sequence_sizes": [6, 6], "chunks": 2}
    for columns in (3, 4):
        ops.column_parallel_linear(torch.ones(6, 4), torch.ones(columns, 4), **call, out_features=7)
        ops.column_parallel_linear(torch.ones(6, 4), torch.ones(columns, 4), **call)
    assert seen == [4, None, 4, None]


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_what_is_not_plain_takes_the_composition():
    group = agreed_pair(num_sms=1)
    log, x, w = group.communicator.log, torch.ones(6, 4), torch.ones(3, 4)
    odd = w.as_subclass(Subclass)

    def column(weight=w):
        call = {"group": group, "sequence_sizes": [6, 6], "overlap": "chunked", "chunks": 3}
        return ops.column_parallel_linear(x, weight, **call)

    def row(weight=w):
        return ops.linear_reduce_scatter(x, weight, sizes=[3, 3], group=group, overlap="chunked", chunks=3)

    for result in (column(), row()):
        assert result.max() == result.min()
    assert len(log) == 12
    log.clear()
    column(odd), row(odd)
    with Watching():
        column(), row()
    with torch.autocast("cpu", torch.bfloat16):
        column()
    assert log == ["all_gather", "reduce_scatter"] * 2 + ["all_gather"]
    for weight, reason in ((odd, "Subclass"), (w, "traced code")):
        with Watching() if weight is w else torch.no_grad():
            assert reason in ops.choose_linear_reduce_scatter(x, weight, group=group, overlap="chunked").reason
            column_choice = ops.choose_column_parallel_linear(x, weight, group=group, sequence_sizes=[6, 6])
            assert reason in column_choice.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": "fused"}, "overlap must be one of auto, none, chunked"),
        ({"chunks": 0}, "chunks must be a positive int"),
        ({"chunks": [3, 4]}, r"sum to 8, got \[3, 4\]"),
        ({"sizes": [4, 5]}, "2 sizes that sum to S"),
        ({"norm_weight": torch.ones(3)}, "expected one"),
        ({"bias": torch.ones(4)}, r"expected a bias \[3\]"),
        ({"residual": torch.ones(8, 3)}, r"expected a residual \[4, 3\]"),
        ({"residual": torch.ones(4, 3), "norm_weight": torch.ones(4)}, r"expected a norm_weight \[3\]"),
        ({"residual": torch.ones(4, 3).double()}, "residual is torch.float64"),
    ],
)
def test_scatter_refuses(options, message):
    call = {"sizes": [4, 4], "group": TPGroup(Pair()), **options}
    with pytest.raises(ValueError, match=message):
        ops.linear_reduce_scatter(torch.ones(8, 4), torch.ones(3, 4), **call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": "fused"}, "overlap must be one of auto, none, chunked"),
        ({"chunks": 0}, "chunks must be a positive int"),
        ({"chunks": [3, 4]}, r"sum to 12, got \[3, 4\]"),
        ({"sequence_sizes": [5, 4]}, "2 extents with 8 at rank 0"),
        ({"sequence_sizes": None, "overlap": "chunked"}, "expected sequence_sizes"),
        ({"sequence_sizes": None, "chunks": 2}, "expected sequence_sizes"),
        ({"weight": torch.ones(3, 5), "chunks": 2}, "expected x .* and weight"),
        ({"x": torch.ones(4)}, r"expected x \[..., tokens, K\]"),
    ],
)
def test_gather_refuses(options, message):
    call = {"x": torch.ones(8, 4), "weight": torch.ones(3, 4), "sequence_sizes": [8, 4], "group": TPGroup(Pair())}
    with pytest.raises(ValueError, match=message):
        ops.column_parallel_linear(**{**call, **options})


def test_one_rank():
    group = TPGroup(DelayedCommunicator(LocalCommunicator()))
    x, w, bias = integers(9, 5, seed=1), integers(4, 5, seed=2), integers(4, seed=3)
    want = x @ w.T + bias
    call = {"group": group, "overlap": "chunked", "chunks": 3}
    assert torch.equal(ops.column_parallel_linear(x, w, bias, sequence_sizes=[9], **call), want)
    assert torch.equal(ops.linear_reduce_scatter(x, w, bias, sizes=[9], **call), want)
    assert group.communicator.log == []


# On ranks -------------------------------------------------------------------------------------------------------------

K, N = 13, 10


def delayed(group):
    return TPGroup(DelayedCommunicator(group.communicator), ranks=group.ranks)


def integers(*shape, seed, dtype=torch.float32):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def own_part(total, group):
    """Shares of a feature that differ between the ranks."""
    cuts = [total * r // group.world_size for r in range(group.world_size + 1)]
    return slice(cuts[group.rank], cuts[group.rank + 1])


def splits(world_size):
    """Tokens of every rank: as many on all, nearly so, and none on some."""
    return ([6] * world_size, [7, 6, 6][:world_size], [0, 9, 4][:world_size], [5, 0, 0][:world_size])


def own_tokens(sizes, rank):
    starts = [0, *accumulate(sizes)]
    return slice(starts[rank], starts[rank + 1])


def rows_of_pieces(sizes, batch):
    """``chunks`` as rows, unequal ones."""
    rows = batch * sum(sizes)
    return [1, rows // 2, rows - 1 - rows // 2]


def check_gather(group, dtype):
    late, mine = delayed(group), own_part(N, group)
    weight, bias = integers(N, K, seed=2, dtype=dtype)[mine], integers(N, seed=3, dtype=dtype)[mine]
    for sizes in splits(group.world_size):
        for lead in ((), (1,), (2,)):
            full = integers(*lead, sum(sizes), K, seed=1, dtype=dtype)
            x = full[..., own_tokens(sizes, group.rank), :]
            want = F.linear(full.float(), weight.float(), bias.float()).to(dtype)
            call = {"group": late, "sequence_sizes": sizes}
            for options in (
                {"overlap": "chunked", "chunks": 3, "out_features": N},
                {"overlap": "chunked", "chunks": 99},
                {"overlap": "chunked", "chunks": rows_of_pieces(sizes, math.prod(lead))},
                {"overlap": "none", "chunks": 2},
                {"out_features": N},
            ):
                assert torch.equal(ops.column_parallel_linear(x, weight, bias, **call, **options), want)
            plain = ops.column_parallel_linear(x, weight, **call, overlap="chunked", out_features=N)
            assert torch.equal(plain + bias, want) and late.communicator.in_flight == 0
            assert torch.equal(ops.column_parallel_linear_reference(x, weight, bias, **call), want)
    log, x = late.communicator.log, integers(6, K, seed=1, dtype=dtype)
    call = {"group": late, "sequence_sizes": [6] * group.world_size, "out_features": N}
    log.clear()
    ops.column_parallel_linear(x, weight, **call, overlap="chunked", chunks=3)
    assert log == ["all_gather_async"] * 3 + ["all_gather wait"] * 3, "every gather before the first wait"
    log.clear()
    for options in ({}, {"overlap": "none"}, {"overlap": "chunked", "chunks": 1}):
        ops.column_parallel_linear(x, weight, **call, **options)
    assert log == ["all_gather"] * 3


def check_scatter(group, dtype):
    late, mine = delayed(group), own_part(K, group)
    weight, bias = integers(N, K, seed=2, dtype=dtype), integers(N, seed=3, dtype=dtype)
    norm = integers(N, seed=5, dtype=dtype)
    w = weight[:, mine]
    for sizes in splits(group.world_size):
        for lead in ((), (1,), (2,)):
            full, own = integers(*lead, sum(sizes), K, seed=1, dtype=dtype), own_tokens(sizes, group.rank)
            x = full[..., mine]
            want = F.linear(full.float(), weight.float()).to(dtype)[..., own, :]
            residual = integers(*want.shape, seed=4, dtype=dtype)
            normed = ops.add_rms_norm(want + bias, residual, norm)
            options = {"sizes": sizes, "group": late}
            unequal = rows_of_pieces(sizes, math.prod(lead))
            calls = ("chunked", 3), ("chunked", 99), ("chunked", unequal), ("none", 2), ("auto", None)
            for overlap, chunks in calls:
                call = {**options, "overlap": overlap, "chunks": chunks}
                assert torch.equal(ops.linear_reduce_scatter(x, w, **call), want)
                assert torch.equal(ops.linear_reduce_scatter(x, w, bias, **call), want + bias)
                added = ops.linear_reduce_scatter(x, w, bias, residual=residual, **call)
                assert torch.equal(added, want + bias + residual)
                assert torch.equal(ops.linear_reduce_scatter(x, w, residual=residual, **call), want + residual)
                found = ops.linear_reduce_scatter(x, w, bias, residual=residual, norm_weight=norm, **call)
                assert all(torch.equal(a, b) for a, b in zip(found, normed, strict=True))
                assert late.communicator.in_flight == 0
            found = ops.linear_reduce_scatter_reference(x, w, bias, residual=residual, norm_weight=norm, **options)
            torch.testing.assert_close(found, normed)
    log, x = late.communicator.log, integers(6 * group.world_size, K, seed=1, dtype=dtype)[:, mine]
    call = {"sizes": [6] * group.world_size, "group": late}
    log.clear()
    ops.linear_reduce_scatter(x, w, **call, overlap="chunked", chunks=3)
    assert log == ["reduce_scatter_async"] * 3 + ["reduce_scatter wait"] * 3, "every matmul before the first wait"
    log.clear()
    for options in ({"in_features": K}, {"overlap": "none"}, {"overlap": "chunked", "chunks": 1}):
        ops.linear_reduce_scatter(x, w, **call, **options)
    assert log == ["reduce_scatter"] * 3
    with torch.autocast("cpu", torch.bfloat16):
        cast = [ops.linear_reduce_scatter(x, w, bias, **call, chunks=chunks) for chunks in (1, 3)]
    assert torch.equal(*cast)


def check_bits(group):
    """Not integers: at the same time or one after the other, the bits are the same, those of the gradients too."""
    generator = torch.Generator().manual_seed(group.rank)
    late = delayed(group)

    draw = lambda *shape: torch.randn(shape, generator=generator).bfloat16().requires_grad_()  # noqa: E731
    for sizes in ([64] * group.world_size, [50, 70, 33][: group.world_size]):
        own, rows, w, bias = draw(sizes[group.rank], 48), draw(sum(sizes), 48), draw(56, 48), draw(56)
        found = []
        for overlap in ("chunked", "none"):
            call = {"group": late, "overlap": overlap, "chunks": 3}
            gathered = ops.column_parallel_linear(own, w, bias, sequence_sizes=sizes, **call)
            scattered = ops.linear_reduce_scatter(rows, w, bias, sizes=sizes, **call)
            grads = torch.autograd.grad(gathered.sin().sum(), (own, w, bias))
            grads += torch.autograd.grad(scattered.sin().sum(), (rows, w, bias))
            with torch.no_grad():
                again = ops.column_parallel_linear(own, w, bias, sequence_sizes=sizes, **call)
                also = ops.linear_reduce_scatter(rows, w, bias, sizes=sizes, **call)
            found.append((gathered, scattered, *grads, again, also))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert torch.equal(found[0][0], found[0][-2]) and torch.equal(found[0][1], found[0][-1])


def gradients(function, inputs, wanted):
    """First and second derivatives of a sum of squares, by those of ``inputs`` that are wanted."""
    leaves = [tensor.clone().requires_grad_(name in wanted) for name, tensor in inputs.items()]
    chosen = [leaf for leaf in leaves if leaf.requires_grad]
    out = function(*leaves)
    plain = torch.autograd.grad(out.square().sum(), chosen, retain_graph=True)
    first = torch.autograd.grad(out.square().sum(), chosen, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), chosen)
    assert all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    return plain, second


def check_gradients(group):
    late = delayed(group)
    log = late.communicator.log
    for sizes in splits(group.world_size)[:3]:
        own, features = own_tokens(sizes, group.rank), own_part(K, group)
        full, weight, bias = integers(2, sum(sizes), K, seed=1), integers(N, K, seed=2), integers(N, seed=3)
        columns = own_part(N, group)
        gathering = {"x": full[:, own], "weight": weight[columns], "bias": bias[columns]}
        scattering = {"x": full[..., features], "weight": weight[:, features], "bias": bias}
        for wanted in (("x", "weight", "bias"), ("x",), ("weight",)):
            for op, reference, inputs, named in (
                (ops.column_parallel_linear, ops.column_parallel_linear_reference, gathering, "sequence_sizes"),
                (ops.linear_reduce_scatter, ops.linear_reduce_scatter_reference, scattering, "sizes"),
            ):
                call = {"group": late, named: sizes}
                want = gradients(lambda *t, f=reference, c=call: f(*t, **c), inputs, wanted)
                for options in ({"overlap": "chunked", "chunks": 3}, {"overlap": "none", "chunks": 3}, {}):
                    found = gradients(lambda *t, f=op, c={**call, **options}: f(*t, **c), inputs, wanted)
                    torch.testing.assert_close(found, want, rtol=0, atol=0)
                assert late.communicator.in_flight == 0
    x, w = (integers(*shape, seed=4).requires_grad_() for shape in ((6 * group.world_size, K), (N, K)))
    residual, norm = (integers(*shape, seed=5).requires_grad_() for shape in ((6, N), (N,)))
    found, chunked = [], {"overlap": "chunked", "chunks": 3}
    for op, options in ((ops.linear_reduce_scatter, chunked), (ops.linear_reduce_scatter_reference, {})):
        call = {"sizes": [6] * group.world_size, "group": late, "residual": residual, "norm_weight": norm, **options}
        normed, summed = op(x, w, **call)
        log.clear()
        found.append(torch.autograd.grad((normed * summed).sum(), (x, w, residual, norm)))
        if options:
            assert log == ["all_gather_async"] * 3 + ["all_gather wait"] * 3, "the gradient in the same pieces"
    torch.testing.assert_close(*found)
    tokens, rows = integers(6, K, seed=6).requires_grad_(), integers(N, K, seed=7).requires_grad_()
    out = ops.column_parallel_linear(tokens, rows, group=late, sequence_sizes=[6] * group.world_size, **chunked)
    log.clear()
    out.sum().backward()
    assert log == ["all_gather_async", "reduce_scatter_async", "all_gather wait", "reduce_scatter wait"]


def check_failure_leaves_nothing_in_flight(group):
    late = delayed(group)
    comm, world = late.communicator, group.world_size
    starts = {name: getattr(comm, name) for name in ("all_gather_async", "reduce_scatter_async")}
    calls = []

    def failing(name):
        def start(*args, **options):
            calls.append(name)
            if len(calls) == 3:
                raise RuntimeError("made up")
            return starts[name](*args, **options)

        return start

    x, w = torch.ones(8 * world, 4, requires_grad=True), torch.ones(3, 4)
    call = {"group": late, "overlap": "chunked", "chunks": 4}
    out = ops.linear_reduce_scatter(x, w, sizes=[8] * world, **call)
    for name in starts:
        setattr(comm, name, failing(name))
    for attempt in (
        lambda: ops.column_parallel_linear(x.detach()[:8], w, sequence_sizes=[8] * world, **call),
        lambda: ops.linear_reduce_scatter(x, w, sizes=[8] * world, **call),
        out.sum().backward,
    ):
        calls.clear()
        with pytest.raises(RuntimeError, match="made up"):
            attempt()
        assert comm.in_flight == 0 and len(calls) == 3
    for name, start in starts.items():
        setattr(comm, name, start)

    pieces = token_pieces([8] * world, [4, 8])
    with pytest.raises(ZeroDivisionError):  # what follows the sum fails
        matmul_scatter(x.detach(), w.t(), [8] * world, pieces, comm, True, lambda start, stop, sums: 1 // 0)
    with pytest.raises(RuntimeError, match="size"):  # the matmul does
        gather_matmul(x.detach()[:8], w, None, [8] * world, pieces, comm, True)
    assert comm.in_flight == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [check_gather, check_scatter])
@pytest.mark.parametrize("world_size", [2, 3])
def test_forward(rank_pool, world_size, check, dtype):
    rank_pool(world_size).run(check, dtype)


@pytest.mark.parametrize("check", [check_bits, check_gradients, check_failure_leaves_nothing_in_flight])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks(rank_pool, world_size, check):
    rank_pool(world_size).run(check)
