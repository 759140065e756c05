"""``bench model`` over several ranks: rivals by hand and by transformers, their sums, what is left out and why.

Tier: CPU ranks (2 and 3).
"""

import contextlib
import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tp_kernels.commands import bench_model
from tp_kernels.testing.model_bench import sums as sums_module
from tp_kernels.testing.model_bench.contender import PlainContender
from tp_kernels.testing.model_bench.sums import PeerSums, ProcessGroupSums

pytest.importorskip("transformers")

TINY = bench_model.Options(
    model="tiny",
    tp=2,
    prompt=(9,),
    mixed=(5, 9),
    context=(7,),
    batch=(2,),
    steps=2,
    rounds=1,
    quantize=("none", "int8"),
    device="cpu",
    dtype="float32",
)
RIVALS = ["torch gloo graph", "torch gloo eager", "torch gloo graph one length", "transformers"]


# --- sums -----------------------------------------------------------------------------------------------------------


def fake_peer_memory(group):
    """What ``PeerSums`` calls of torch, over Gloo: the two sums, and memory that only they may read."""
    import torch.distributed._symmetric_memory as symm_mem

    def one_shot_all_reduce(x, op, name):
        assert op == "sum" and name == group.process_group.group_name
        assert x.untyped_storage().data_ptr() in registered, "not memory that peers can reach"
        total = x.clone()
        dist.all_reduce(total, group=group.process_group)
        calls.append("one_shot")
        return total

    def two_shot_all_reduce_(x, op, name):
        x.copy_(one_shot_all_reduce(x, op, name))
        calls[-1] = "two_shot"
        return x

    calls, registered = [], set()
    symm_mem.empty = lambda size, dtype, device: torch.full((size,), torch.nan, dtype=dtype, device=device)
    symm_mem.rendezvous = lambda x, name: registered.add(x.untyped_storage().data_ptr())
    torch.ops.symm_mem = SimpleNamespace(
        one_shot_all_reduce=one_shot_all_reduce, two_shot_all_reduce_=two_shot_all_reduce_
    )
    return calls


def by_hand(group, way, one_shot_bytes):
    """(tokens over ranks, tokens of the whole model, what was called) of the model by hand."""
    from tp_kernels.comm import LocalCommunicator, TPGroup
    from tp_kernels.commands.bench_model_ours import make_model, plain_view
    from tp_kernels.commands.named_models import config_of

    torch.set_num_threads(1)
    calls, originals = [], None
    if way == "symm":
        import torch.distributed._symmetric_memory as symm_mem

        originals = (symm_mem.empty, symm_mem.rendezvous, torch.ops.symm_mem, sums_module.ONE_SHOT_BYTES)
        calls, sums_module.ONE_SHOT_BYTES = fake_peer_memory(group), one_shot_bytes
    try:
        with torch.inference_mode():
            config = config_of("tiny")
            if way == "symm":
                sums = PeerSums(group.process_group, torch.float32, 30 * config.hidden_size, 64, "cpu")
            else:
                sums = ProcessGroupSums(group.process_group)
            part = plain_view(make_model(config, group, "cpu", torch.float32), sums)
            whole = plain_view(make_model(config, TPGroup(LocalCommunicator()), "cpu", torch.float32))
            ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(3))
            mixed = [ids[0, :5], ids[1], ids[0, :1]]
            found = []
            for model in (part, whole):
                contender = PlainContender(model)
                tokens = contender.generate(ids, 4)
                contender.close()
                found.append([*tokens.flatten().tolist(), *contender.first_tokens(mixed).tolist()])
            too_long = ""
            if way == "symm":
                try:
                    sums.add(torch.zeros(31, config.hidden_size))
                except ValueError as error:
                    too_long = str(error)
            return *found, sorted(set(calls)), too_long
    finally:
        if originals is not None:
            symm_mem.empty, symm_mem.rendezvous, torch.ops.symm_mem, sums_module.ONE_SHOT_BYTES = originals


@pytest.mark.parametrize("ranks, way, one_shot_bytes", [(2, "gloo", 0), (3, "symm", 0), (3, "symm", 600)])
def test_the_model_by_hand_is_the_same_on_ranks(rank_pool, ranks, way, one_shot_bytes):
    expected = {("gloo", 0): [], ("symm", 0): ["two_shot"], ("symm", 600): ["one_shot", "two_shot"]}
    for found, whole, calls, too_long in rank_pool(ranks).run(by_hand, way, one_shot_bytes, timeout=180):
        assert found == whole and len(whole) == 13
        assert calls == expected[way, one_shot_bytes]
        assert way != "symm" or "sums of at most 1920 elements" in too_long


def test_torchs_own_sums_are_called_as_they_want_to_be():
    import torch.distributed._symmetric_memory

    for name in ("one_shot_all_reduce", "two_shot_all_reduce_"):
        schema = getattr(torch.ops.symm_mem, name).default._schema
        assert [str(argument.type) for argument in schema.arguments] == ["Tensor", "str", "str"], schema
        assert [argument.name for argument in schema.arguments] == ["input", "reduce_op", "group_name"]


def test_which_ways_torch_has():
    options = replace(TINY, device="cuda", dtype="bfloat16")
    ways = bench_model.torch_ways(options, "all", "nccl", "cuda")
    assert list(ways.sums) == ["symm", "nccl"] and ways.process_group == "nccl" and not ways.left_out
    _, dtype, elements, offers, _ = ways.sums["symm"].args
    assert (dtype, elements, offers) == (torch.bfloat16, 2 * 17 * 64, 2 * 2 * 256)
    longer = replace(options, prompt=(40,), prefill_batch=(1, 3), mixed=(7, 50))
    assert bench_model.torch_ways(longer, "all", None, "cuda").sums["symm"].args[2] == 3 * 40 * 64
    ways = bench_model.torch_ways(replace(options, dtype="float16"), "all", None, "cuda")
    assert not ways.sums and ways.process_group is None
    assert ways.left_out == {"symm": "torch.ops.symm_mem does not add float16", "nccl": "--no-nccl"}
    with pytest.raises(ValueError, match=r"adds torch.bfloat16 and torch.float32, not torch.float16"):
        PeerSums(None, torch.float16, 1, 1, "cpu")


# --- whole runs -----------------------------------------------------------------------------------------------------


def printed(call):
    torch.set_num_threads(1)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), torch.inference_mode():
        rows = call()
    return rows, text.getvalue()


def everything(group):
    """All rows and what was printed; then what transformers says to a cut that is not its own."""
    from tp_kernels.commands.bench_model_ours import make_model, plain_view
    from tp_kernels.commands.bench_model_rivals import hf_sizes
    from tp_kernels.commands.named_models import config_of
    from tp_kernels.testing.model_bench.hf_rival import hf_model_on_ranks

    found = printed(lambda: bench_model.measure(group, TINY))
    even = replace(config_of("tiny"), vocab_size=96)
    plain = plain_view(make_model(even, group, "cpu", torch.float32))
    odd = replace(even, intermediate_size=90)
    try:
        hf_model_on_ranks("qwen3", hf_sizes(odd), plain, lambda: torch.zeros(96, 64), group.process_group)
    except ValueError as error:
        return *found, str(error)


def test_every_rival_on_ranks(rank_pool):
    # Ranks import transformers, which takes a loaded machine a minute.
    (first, said, other), (second, nothing, _) = rank_pool(2).run(everything, timeout=300)
    ours = ["off", "shm", "off int8", "shm int8"]
    prompts = [*ours, "torch gloo eager", "transformers"]
    assert [row["contender"] for row in first] == [*prompts * 2, *ours, *RIVALS]
    for key in ("contender", "ms", "verdict", "best_peer"):  # bytes are each rank's own: 97 words are cut unevenly
        assert [row[key] for row in first] == [row[key] for row in second]
    assert [row["what"] for row in first] == ["prefill"] * 6 + ["mixed"] * 6 + ["decode"] * 8
    uneven = [row for row in first if "must be divisible by the tensor parallel size" in row["verdict"]]
    assert {row["contender"] for row in uneven} <= {"transformers"}, "97 words are too many for version 5.17"
    for row in (row for row in first if row not in uneven):
        assert row["verdict"] == ("" if row["sums"] == "off" else "ok") and row["ms"] > 0, row
    sums = [row["sums"] for row in first if row["what"] == "decode"]
    assert sums == ["off", "shm", "off", "shm", "gloo", "gloo", "gloo", "gloo"]
    for row in first:
        assert row["tp"] == 2 and (row["sums"] != "off" or row["over_off"] == 1.0)
        assert (row["over_off"] != "") == bool(row["ours"])
        compared = row["sums"] != "off" and row not in uneven
        assert (row["best_peer"] in RIVALS) == (row["times_best_peer"] != "") == compared, row
        assert row["times_best_peer"] == 1.0 or row["contender"] != row["best_peer"]
    assert "prefill of 1 x 9 tokens" in said and "x best peer" in said and "x off" in said and not nothing
    assert "transformers cuts model.layers.0.mlp.gate_proj.weight otherwise: to [45, 64], not [48, 64]" in other


def without(group, what):
    """Rows and words of runs that lack something: sums, rivals, time, or one rank's good luck."""
    from tp_kernels.commands.bench_model_rivals import TorchWays
    from tp_kernels.commands.bench_model_run import Run
    from tp_kernels.testing.switched_off import switched_off

    options = replace(TINY, what=("decode",), quantize=("none",), transformers=False)
    groups = {name: switched_off(group.rank, 2, ranks=group.ranks) for name in ("off", "shm")}

    def broken():
        if group.rank == 1:
            raise MemoryError("no more")
        return ProcessGroupSums(group.process_group)

    if what == "sums":
        return printed(Run(options, groups, group, None, torch.device("cpu")).measure)
    ways = TorchWays({"gloo": lambda: ProcessGroupSums(group.process_group)}, None, {"nccl": "--no-nccl"})
    if what == "a rank":
        ways.sums = {"first": broken, **ways.sums}
    run = Run(replace(options, transformers=what != "a rank"), groups, group, None, torch.device("cpu"), ways)
    if what == "time":
        answers = iter([False, False, True, True, True, True])
        run._time_is_over = lambda: next(answers)
    if what == "a step":

        def generate(ids, steps):
            if group.rank == 0:  # behind the last sum, for which the others would have waited
                raise torch.OutOfMemoryError("one rank's")
            return ids.new_zeros(ids.shape[0], steps + 1)

        run._contenders["torch gloo graph"].generate = generate
    return printed(run.measure)


def test_missing_sums_are_wrong(rank_pool):
    (rows, said), _ = rank_pool(2).run(without, "sums")
    assert [row["verdict"] for row in rows] == ["", "wrong"] and "# WRONG: shm is" in said


def test_what_one_rank_cannot_make_nobody_runs(rank_pool):
    (rows, said), (others, _) = rank_pool(2).run(without, "a rank")
    assert rows == others
    verdicts = {row["contender"]: row["verdict"] for row in rows}
    assert verdicts["torch first graph"] == verdicts["torch first eager"] == "on rank 1: MemoryError: no more"
    assert verdicts["torch gloo graph"] == "ok" and "torch gloo graph one length" not in verdicts
    assert "# left out: torch nccl (--no-nccl)" in said and "# left out: transformers (--no-transformers)" in said


def test_a_rival_that_fails_on_one_rank_is_left_alone(rank_pool):
    (rows, said), (others, _) = rank_pool(2).run(without, "a step")
    assert rows == others
    found = {row["contender"]: (row["verdict"], row["ms"] != "") for row in rows}
    assert found["torch gloo graph"] == ("on rank 0: OutOfMemoryError: one rank's", False)
    assert found["torch gloo eager"] == ("ok", True)
    assert "# left out: transformers (it adds by NCCL, and that is left out)" in said


def test_contenders_for_whom_there_is_no_time_say_so(rank_pool):
    (rows, _), (others, _) = rank_pool(2).run(without, "time")
    assert rows == others
    found = [(row["contender"], row["ms"] != "") for row in rows]
    assert found[:2] == [("off", True), ("shm", True)] and not any(measured for _, measured in found[2:])
    assert {row["verdict"] for row in rows[2:]} == {"left out, --minutes 30 were over"}
