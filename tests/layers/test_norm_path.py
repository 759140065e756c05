"""Which way a row-parallel layer's sum and norm go: what was asked, measured, offered. Tier: no device.

The GPU is pretended, the second rank says what the first one says, and tables are written for the test.
"""

import json

import pytest
import torch

from tp_kernels.comm import TPGroup
from tp_kernels.comm.communicator import LocalCommunicator
from tp_kernels.comm.overlap import agree
from tp_kernels.commands.bench_layer import sums_of
from tp_kernels.layers import ParallelDecoderLayer, ParallelMLP, RowParallelLinear
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.ops._overlap_choice import overlap_sizes, overlap_table, tables_fingerprint

ROWS, OUT, IN = 4096, 64, 256


class Pair(LocalCommunicator):
    """Two ranks that agree, with what a communicator may offer."""

    numerics = None

    def __init__(self, modes=("chunked",), kernel=False):
        super().__init__()
        self.world_size, self.overlap_modes, self.fused_norm = 2, modes, kernel

    def fuses_norm(self, width, dtype):
        return dtype is torch.bfloat16

    def linear_reason(self, m, n, dtype):
        return None

    def all_gather(self, x, *, dim=0, sizes=None, timeout=None):
        return torch.cat([x, x], dim)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Write what was measured to be the fastest way; nothing was, before."""
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()

    def write(communicator, path):
        us = {"none": 130.0, path: 100.0}
        row = {"dtype": "16bit", "sizes": overlap_sizes(ROWS, OUT, IN, communicator), "path": path, "us": us}
        table = {overlap_table("local"): [{**row, "config": {"chunks": 3}}]}
        content = {"gpu": H100.name, "measured": "2026-01-01", "versions": {}, "ops": table}
        (tmp_path / "h100.json").write_text(json.dumps(content))
        tuning.forget_tables()

    yield write
    tuning.forget_tables()


def path(communicator, overlap="auto", rows=ROWS, dtype=torch.bfloat16, **options):
    group = TPGroup(communicator)
    layer = RowParallelLinear(IN, OUT, group=group, overlap=overlap, device="meta", dtype=dtype, **options)
    with pretend(H100):
        agree(communicator, H100.num_sms, tables_fingerprint("local", H100), torch.device("cpu"))
        return layer.norm_path(torch.empty(2, rows // 2, OUT, dtype=dtype, device="meta"))


def test_what_was_asked_for_comes_first():
    assert path(Pair(kernel=True), "chunked") == "op" == path(Pair(kernel=True), "chunked", rows=2)
    assert path(Pair(("fused",), kernel=True), "fused") == "op"
    assert path(Pair(("fused",), kernel=True), "fused", rows=2) == "kernel", "few rows are not worth its tiles"
    assert path(Pair(kernel=True), "fused") == "apart" == path(Pair((), kernel=True), "chunked"), "forward refuses"
    assert path(Pair(kernel=True), "none") == "kernel" and path(Pair(), "none") == "apart"


def test_then_what_was_measured(measured):
    pair = Pair(kernel=True)
    assert path(pair) == "kernel", "nothing was measured"
    measured(pair, "chunked")
    assert path(pair) == "op" and path(pair, rows=128) == "kernel" and path(pair, rows=512) == "kernel"
    fused = Pair(("fused",), kernel=True)
    assert path(fused) == "kernel", "what was measured is not offered"
    measured(fused, "fused")
    assert path(fused) == "op"
    measured(pair, "none")
    assert path(pair) == "kernel"


def test_then_what_the_communicator_offers():
    assert path(Pair()) == "op", "without a kernel the op may decide"
    assert path(Pair(), rows=128) == "apart" == path(Pair(()))
    assert path(Pair((), kernel=True)) == "kernel" and path(Pair((), kernel=True), dtype=torch.float32) == "apart"


def test_parts_of_the_sequence_know_no_kernel():
    spread = {"sequence_parallel": True}
    assert path(Pair(kernel=True), **spread) == "op" == path(Pair(kernel=True), rows=2, **spread)
    assert path(Pair(kernel=True), "none", **spread) == "apart" == path(Pair((), kernel=True), **spread)


def test_quantised_weights_are_not_overlapped(measured):
    pair = Pair(kernel=True)
    measured(pair, "chunked")
    layer = RowParallelLinear(IN, OUT, group=TPGroup(pair), dtype=torch.bfloat16).quantize("int8")
    x = torch.empty(ROWS, OUT, dtype=torch.bfloat16, device="meta")
    assert layer.norm_path(x) == "kernel"
    pair.fused_norm = False
    assert layer.norm_path(x) == "apart"


def test_training_takes_the_mlp_in_one_op_where_its_sum_is_not_overlapped(measured):
    def takes(communicator, overlap="auto", rows=ROWS):
        mlp = ParallelMLP(OUT, IN, group=TPGroup(communicator), overlap=overlap, device="meta", dtype=torch.bfloat16)
        x = torch.empty(2, rows // 2, OUT, dtype=torch.bfloat16, device="meta", requires_grad=True)
        with pretend(H100):
            agree(communicator, H100.num_sms, tables_fingerprint("local", H100), torch.device("cpu"))
            return mlp._trains_fused(x)

    pair = Pair()
    assert takes(pair) and takes(pair, "none") and not takes(pair, "chunked")
    measured(pair, "chunked")
    assert not takes(pair) and takes(pair, "none") and takes(pair, rows=128)
    assert takes(Pair(())) and takes(LocalCommunicator())


def test_traced_code_takes_the_separate_calls():
    layers = []
    for communicator in (Pair(kernel=True), Pair(())):
        torch.manual_seed(0)
        layers.append(ParallelDecoderLayer(16, 16, 4, 2, group=TPGroup(communicator), dtype=torch.bfloat16))
    x = torch.randn(1, 3, 16).bfloat16()
    compiled = torch.compile(layers[0], backend="eager", fullgraph=True)
    with torch.no_grad():
        assert layers[0].fuses_norms(x)
        torch.testing.assert_close(compiled(x), layers[1](x))
    torch.testing.assert_close(compiled(x), layers[1](x))


def test_what_a_benchmark_of_the_layer_says():
    x = torch.empty(1, 200, 16)

    def said(communicator, **overlaps):
        layer = ParallelDecoderLayer(16, 16, 4, group=TPGroup(communicator))
        for name, projection in (("o_proj", layer.self_attn.o_proj), ("down_proj", layer.mlp.down_proj)):
            projection.overlap = overlaps.get(name, "auto")
        with torch.no_grad():
            return sums_of(layer, x)

    kernel = Pair(kernel=True)
    kernel.fuses_norm = lambda width, dtype: True
    assert said(kernel) == "kernel" and said(Pair(())) == said(Pair()) == "apart"
    assert said(kernel, o_proj="chunked") == "o_proj chunked, down_proj kernel"
    assert said(Pair(), o_proj="chunked", down_proj="chunked") == "chunked"


def test_only_whole_sums_are_said_to_overlap(measured):
    pair = Pair()
    measured(pair, "chunked")
    agree(pair, H100.num_sms, tables_fingerprint("local", H100), torch.device("cpu"))
    for options, expected in (({}, "chunked"), ({"sequence_parallel": True}, "none"), ({"overlap": "none"}, "none")):
        layer = RowParallelLinear(IN, OUT, group=TPGroup(pair), device="meta", dtype=torch.bfloat16, **options)
        with pretend(H100):
            assert layer.sum_path(torch.empty(ROWS, OUT, dtype=torch.bfloat16, device="meta")) == expected


def test_a_block_hands_on_where_either_of_its_sums_can_go_with_a_norm():
    def fuses(block, communicator):
        x = torch.empty(1, 2, 16)
        with torch.no_grad():
            return block(TPGroup(communicator)).fuses_norms(x)

    def block(group, **options):
        return ParallelDecoderLayer(16, 16, 4, group=group, **options)

    def mixed(group):
        layer = block(group)
        layer.mlp.down_proj.overlap = "chunked"
        return layer

    assert not fuses(block, Pair()) and fuses(mixed, Pair()) and fuses(lambda g: block(g, overlap="chunked"), Pair())
    assert not fuses(mixed, Pair(())) and not fuses(block, LocalCommunicator())
