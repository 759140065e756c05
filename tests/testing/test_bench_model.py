"""``bench model``: the hand-written model against transformers, the checks, budgets, goals, the whole way to the files.

Tier: no device. Several ranks have a file of their own.
"""

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tp_kernels.commands import bench_model
from tp_kernels.testing.bench import Timing
from tp_kernels.testing.gpu_timer import Roofs
from tp_kernels.testing.model_bench import budget
from tp_kernels.testing.model_bench.check import Verdict, judge
from tp_kernels.testing.model_bench.contender import PlainContender, Turn
from tp_kernels.testing.model_bench.profile import Span, profile_rows, summed_up
from tp_kernels.testing.model_bench.report import Case, Entry, case_lines, rows_of
from tp_kernels.testing.op_bench.shapes import ARCHITECTURES, MODELS

pytest.importorskip("transformers")

TINY = bench_model.Options(
    model="tiny",
    what=("prefill", "decode"),
    prompt=(9,),
    context=(7,),
    batch=(2,),
    steps=2,
    rounds=1,
    device="cpu",
    dtype="float32",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More only wait for each other with tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def models_of(family):
    """(our model, the hand-written one and that of transformers on its weights), fp32, one rank."""
    from tp_kernels.comm import LocalCommunicator, TPGroup
    from tp_kernels.commands.bench_model_ours import make_model, plain_view
    from tp_kernels.commands.bench_model_rivals import hf_sizes
    from tp_kernels.commands.named_models import config_of
    from tp_kernels.testing.model_bench.hf_rival import hf_model

    config = replace(config_of("tiny"), model_type=family, qk_norm=family == "qwen3")
    model = make_model(config, TPGroup(LocalCommunicator()), "cpu", torch.float32)
    plain = plain_view(model)
    return model, plain, hf_model(family, hf_sizes(config), plain)


@pytest.fixture(scope="module")
def qwen3():
    return models_of("qwen3")


@pytest.fixture(scope="module")
def tiny(qwen3):
    return qwen3[:2]


@pytest.fixture(scope="module")
def rival(qwen3):
    return qwen3[2]


def ids_of(batch=2, tokens=9):
    return torch.randint(0, 97, (batch, tokens), generator=torch.Generator().manual_seed(3))


# --- contenders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted({architecture.model_type for architecture in ARCHITECTURES.values()}))
def test_the_handwritten_model_equals_transformers_on_the_same_memory(family):
    model, plain, rival = models_of(family)
    with torch.inference_mode():
        torch.testing.assert_close(plain.logits(ids_of()), rival(ids_of()).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain.logits(ids_of()), model(ids_of()), rtol=1e-4, atol=1e-5)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in rival.parameters()} == ours


def test_all_contenders_write_what_transformers_generates(tiny, rival):
    from tp_kernels.commands.bench_model_ours import EngineContender
    from tp_kernels.testing.model_bench.hf_rival import HFContender

    model, plain = tiny
    with torch.inference_mode():
        expected = rival.generate(ids_of(), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 9:]
        contenders = {how: PlainContender(plain, how) for how in ("eager", "graph", "graph one length")}
        contenders |= {"transformers": HFContender(rival), "engine": EngineContender(model, capture=False)}
        for name, contender in contenders.items():
            assert torch.equal(contender.generate(ids_of(), 4), expected), name
            turn = contender.decode(3, 7, 2)
            for _ in range(2):  # a turn can be played again after its reset
                turn.reset()
                turn.play()
            contender.prefill(ids_of()).play()
            contender.close()
            # Whether packed, padded in front or behind: what each prompt has by itself.
            mixed = [ids_of()[0, :5], ids_of()[1], ids_of()[0, :1]]
            alone = [contender.generate(prompt.unsqueeze(0), 0)[0, 0] for prompt in mixed]
            assert torch.equal(contender.first_tokens(mixed), torch.stack(alone)), name
            turn = contender.prefill_mixed(mixed)
            turn.reset()
            turn.play()
            contender.close()


def test_bad_names_are_refused(tiny):
    from tp_kernels.testing.model_bench.hf_rival import hf_model

    with pytest.raises(ValueError, match="got 'compiled'"):
        PlainContender(tiny[1], "compiled")
    with pytest.raises(ValueError, match="got 'gpt2'"):
        hf_model("gpt2", {}, tiny[1])


# --- checks ---------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_made_again(tiny):
    from tp_kernels.commands.bench_model_ours import FullWeights, quantized

    model, plain = tiny
    with torch.inference_mode():
        again = FullWeights(model, "none", torch.float32).model(torch.float32)
        assert torch.equal(again.logits(ids_of()), plain.logits(ids_of()))
        small = quantized(model, "int8")
        again = FullWeights(small, "int8", torch.float32).model(torch.float32)
        torch.testing.assert_close(again.logits(ids_of()), small(ids_of()), rtol=1e-4, atol=1e-4)
        assert (again.logits(ids_of()) - plain.logits(ids_of())).abs().max() > 1e-3
    assert model.lm_head.weight.dtype is torch.float32, "a copy was quantised"


def test_a_wrong_position_is_found(tiny):
    from tp_kernels.commands.bench_model_ours import FullWeights

    model, plain = tiny
    reference = FullWeights(model, "none", torch.float32).model(torch.float32)

    class Late(PlainContender):
        def _step(self, state, context):
            state.position.add_(4)  # slots are left out, with random contents, and the rotation is too far
            return super()._step(state, context)

    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(1)  # with one slot and bad luck, a model this small chooses as if nothing had happened
        right = PlainContender(plain).generate(ids_of(), 6)
        assert judge(ids_of(), right, reference, plain).good
        assert not judge(ids_of(), Late(plain).generate(ids_of(), 6), reference, plain).good
        assert not judge(ids_of(), (right + 1) % 97, reference, plain).good
        with pytest.raises(ValueError, match=r"tokens in \[0, 97\)"):
            judge(ids_of(), right + 97, reference, plain)
        with pytest.raises(ValueError, match=r"expected tokens \[2, n\]"):
            judge(ids_of(), right[:1], reference, plain)


def test_collectives_that_do_nothing_keep_their_shapes():
    from tp_kernels.testing.switched_off import switched_off

    group, x = switched_off(1, 3), torch.arange(6.0).view(2, 3)
    assert (group.rank, group.world_size, group.backend) == (1, 3, "off")
    assert group.all_reduce(x) is x and group.all_reduce(x, out=x) is x
    assert torch.equal(group.all_gather(x), x.repeat(3, 1))
    ragged = group.all_gather(x, dim=1, sizes=[1, 3, 2])
    assert torch.equal(ragged[:, 1:4], x) and not ragged[:, [0, 4, 5]].any()
    assert torch.equal(group.reduce_scatter(x, dim=1), x[:, 1:2])
    assert torch.equal(group.reduce_scatter(x, dim=1, sizes=[0, 2, 1]), x[:, :2])
    with pytest.raises(ValueError, match="sizes must be 3 extents"):
        group.all_gather(x, sizes=[1, 1])


def test_nan_is_not_good():
    assert not Verdict(float("nan"), 1.0).good and Verdict(0.0, 0.0).good


# --- budgets, goals, rows -------------------------------------------------------------------------------------------


def test_budgets_of_llama3_8b():
    from tp_kernels.commands.named_models import config_of
    from tp_kernels.models import ParallelCausalLM

    model = ParallelCausalLM(config_of("llama3-8b", 1), device="meta", dtype=torch.bfloat16)
    embed = torch.empty(5, 4)
    assert budget.weight_bytes([embed, torch.ones(3), embed], embed, tokens=2) == 12 + 2 * 16
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    total = 2 * (32 * layer + model.lm_head.weight.numel() + 4096)
    assert total == pytest.approx(15.01e9, rel=1e-3)  # measured-h100.md counts the same
    shapes = MODELS["llama3-8b"]
    linear = 2 * 4096 * 32 * (layer - 2 * 4096)
    assert budget.prefill_flops(shapes, 32, 1, 4096) == linear + 2 * 4096 * 128256 + 4 * 32 * 4096 * (4096 * 4097 // 2)
    assert budget.prefill_flops(shapes.shard(4), 32, 1, 4096) == pytest.approx((linear + 4.4e12) / 4, rel=1e-2)
    assert budget.kv_bytes(shapes, 32, 1, 1024, 2) == 32 * 1024 * 2 * 8 * 128 * 2


def goal(gpu="NVIDIA H100 80GB HBM3", model="llama3-8b", what="decode", **changes):
    options = dict(tp=1, shard=1, ranks_per_gpu=changes.get("tp", 1), quantize="none", dtype="bfloat16", layers=32)
    options |= dict(batch=1, tokens=1, context=1024)
    return budget.goal_of(gpu, model, what, **{**options, **changes})


def test_goals():
    assert goal().limit == 5.3 and goal(shard=4).limit == 1.6 and goal(quantize="int8").limit == 3.4
    assert goal(tp=4).measure == "over_off" and goal(what="prefill", tokens=4096, context=0).limit == 96.0
    others = [goal(gpu="NVIDIA A100"), goal(batch=16), goal(layers=8), goal(context=8192), goal(dtype="float16")]
    others += [goal(gpu="NVIDIA H100 PCIe"), goal(context=1), goal(tp=4, ranks_per_gpu=1)]
    others += [goal(what="prefill", tokens=512), goal(tp=2), goal(quantize="fp8"), goal(model="qwen3-8b")]
    assert others == [None] * len(others)
    assert {g.model for g in budget.GOALS} <= set(ARCHITECTURES)


def timing(milliseconds):
    return Timing(milliseconds * 1e-3, milliseconds * 0.9e-3, milliseconds * 1.1e-3)


def test_rows_compare_with_the_roof_the_best_peer_and_the_goal():
    case, roofs = Case("decode", 1, 1, 1024), Roofs(3.0e12, 700e12)
    entries = {
        "tp_kernels": Entry(True, bytes=15 * 10**9, timing=timing(5.2), verdict=Verdict(0.1, 0.2), goal=goal()),
        "tp_kernels int8": Entry(True, "int8", failure="OutOfMemoryError: no"),
        "torch graph": Entry(False, bytes=15 * 10**9, timing=timing(7.8), verdict=Verdict(0.3, 0.2)),
        "torch eager": Entry(False, bytes=15 * 10**9, timing=timing(26), verdict=Verdict(0.0, 0.2)),
    }
    ours, failed, graph, eager = rows_of({"tp": 1}, case, entries, roofs)
    assert ours["ms"] == 5.2 and ours["q20_ms"] == 4.68 and ours["tokens_s"] == pytest.approx(192.3)
    assert ours["percent_of_roof"] == pytest.approx(96.2) and ours["times_best_peer"] == 5.0, "a wrong peer is none"
    assert (ours["goal"], ours["met"], ours["verdict"], ours["over_off"]) == ("<= 5.3 ms", "yes", "ok", "")
    assert failed["ms"] == "" and failed["verdict"] == "OutOfMemoryError: no" and failed["times_best_peer"] == ""
    assert graph["verdict"] == "wrong" and eager["times_best_peer"] == 1.0
    wrong = replace(entries["tp_kernels"], verdict=Verdict(0.3, 0.2))
    assert rows_of({}, case, {"tp_kernels": wrong}, roofs)[0]["met"] == "no"
    lines = case_lines(case, [ours, failed, graph, eager])
    assert lines[0] == "decode, batch 1 after 1024 tokens" and lines[1].split()[0] == "tp_kernels"
    assert "goal <= 5.3 ms: yes" in lines[1] and "WRONG by 3.00e-01" in lines[2] and "OutOfMemory" in lines[4]


def test_rows_compare_with_communication_switched_off():
    case, wanted = Case("prefill", 1, 4096, 0), goal(what="prefill", tokens=4096, context=0, tp=4)
    entries = {
        "off": Entry(True, flops=10**12, timing=timing(100), off="off"),
        "symm": Entry(True, flops=10**12, timing=timing(110), off="off", goal=wanted),
    }
    off, symm = rows_of({"tp": 4}, case, entries, None)
    assert off["over_off"] == 1.0 and symm["over_off"] == 1.1 and symm["percent_of_roof"] == ""
    assert (symm["goal"], symm["met"], symm["times_best_peer"]) == ("<= 1.05 x off", "no", "")


def test_a_profile_counts_overlap_and_gaps():
    spans = [Span("gemv", 0, 10), Span("norm", 8, 12), Span("gemv", 15, 25), Span("norm", 16, 17)]
    found = summed_up(reversed(spans), calls=2)
    assert list(found.kernels.items()) == [("gemv", (1.0, 10.0)), ("norm", (1.0, 2.5))]
    assert (found.busy, found.gaps) == (11.0, 1.5)
    gemv, norm, gaps = profile_rows({"what": "decode"}, found)
    assert (gemv["launches"], gemv["us"], gemv["us_each"], gemv["percent"]) == (1.0, 10.0, 10.0, 80.0)
    assert norm["kernel"] == "norm" and (gaps["us"], gaps["percent"]) == (1.5, 12.0)


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_the_command_measures_everything_on_one_rank(tmp_path, capsys):
    words = "--device cpu --model tiny --prompt 9 --prefill-batch 1 2 --mixed 5 9 2 --context 7 --batch 1 2 --steps 2 "
    words += "--rounds 1 --dtype float16"
    files = ["--csv", str(tmp_path / "model.csv"), "--plot", str(tmp_path / "model.png")]
    files += ["--profile", str(tmp_path / "profile.csv")]
    assert bench_model.main([*words.split(), "--quantize", "none", "int8", *files]) == 0
    printed = capsys.readouterr().out
    assert "tiny, 2 layers, float16, tp 1" in printed and "decode, batch 2 after 7 tokens" in printed
    with open(tmp_path / "model.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ours, graphs = ["tp_kernels", "tp_kernels int8"], ["torch graph", "torch eager", "torch graph one length"]
    decode = [*ours, *graphs, "transformers"]
    prompts = [*ours, "torch eager", "transformers"]
    assert [row["contender"] for row in rows] == [*prompts * 3, *decode, *decode]
    assert all(row["verdict"] == "ok" and float(row["ms"]) > 0 for row in rows), rows
    sizes = [(row["what"], row["batch"], row["tokens"], row["lengths"]) for row in rows[::4]][:3]
    assert sizes == [("prefill", "1", "9", ""), ("prefill", "2", "9", ""), ("mixed", "3", "9", "5+9+2")]
    assert "prefill of 5+9+2 tokens together" in printed
    rate = {row["contender"]: float(row["tokens_s"]) * float(row["ms"]) / 1e3 for row in rows[8:12]}
    assert all(tokens == pytest.approx(16, rel=1e-2) for tokens in rate.values()), "padding is no token"
    assert {row["best_peer"] for row in rows} <= {"torch eager", "transformers", *graphs}
    assert all(row["goal"] == "" and row["mode"] == "host" for row in rows)
    read = {(row["contender"], row["batch"]): float(row["gb_read"]) for row in rows if row["what"] == "decode"}
    assert read["tp_kernels int8", "1"] < read["tp_kernels", "1"] == read["torch graph", "1"]
    assert (tmp_path / "model.png").stat().st_size > 1000
    assert "# decode, batch 2 after 7 tokens, tp_kernels int8: " in printed
    with open(tmp_path / "profile.csv", newline="") as file:
        kernels = list(csv.DictReader(file))
    assert len({(row["what"], row["batch"], row["contender"]) for row in kernels}) == 10
    assert all(float(row["us"]) >= 0 for row in kernels) and kernels[-1]["kernel"] == "(no kernel running)"


def test_one_shard_without_communication_has_nothing_to_judge(capsys):
    rows = bench_model.measure(None, replace(TINY, shard=4, what=("decode",)))
    assert [row["contender"] for row in rows] == ["tp_kernels", "torch graph", "torch eager", "torch graph one length"]
    assert all(row["verdict"] == "" and row["ms"] > 0 and row["shard"] == 4 for row in rows)
    assert "one shard of 4 without communication" in capsys.readouterr().out


def test_a_shard_is_given_words_of_its_own():
    """Of others it would have zeros, which a GPU multiplies faster."""
    from tp_kernels.commands.bench_model_run import Run
    from tp_kernels.testing.switched_off import switched_off

    run = Run(replace(TINY, shard=2), {"tp_kernels": switched_off(1, 2)}, None, None, torch.device("cpu"))
    seen = []
    run._contenders["tp_kernels"].prefill = lambda ids: seen.append(ids) or Turn(lambda: None)
    run._turn("tp_kernels", Case("prefill", 1, 50, 0))
    assert 49 <= int(seen[0].min()) < int(seen[0].max()) < 97


def test_contenders_that_fail_have_rows_that_say_why(monkeypatch, capsys):
    from tp_kernels.commands import bench_model_rivals, bench_model_run

    def fail(*_):
        raise RuntimeError("out of something")

    monkeypatch.setattr(bench_model_run.EngineContender, "generate", fail)
    monkeypatch.setattr(bench_model_rivals, "hf_model", fail)
    monkeypatch.setattr(PlainContender, "prefill", fail)
    rows = bench_model.measure(None, replace(TINY, batch=(1, 2)))
    found = [(row["contender"], row["verdict"], row["ms"] != "") for row in rows]
    ours, rival = ((name, "RuntimeError: out of something", False) for name in ("tp_kernels", "transformers"))
    decode = [ours, *((f"torch {how}", "ok", True) for how in PlainContender.WAYS), rival]
    assert found == [ours, ("torch eager", ours[1], False), rival, *decode, *decode], "never timed unchecked"


def test_no_case_is_begun_when_the_time_is_over(capsys):
    words = "--device cpu --model tiny --layers 1 --no-transformers --batch 1 --minutes 0"
    assert bench_model.main(words.split()) == 1
    printed = capsys.readouterr().out
    assert "left out, --minutes 0 were over" in printed and "nothing was measured" in printed


@pytest.mark.parametrize(
    "words, message",
    [
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--batch 1 300", "--batch must be at most 256 rows, got 300"),
        ("--batch 1 --prefill-batch 300", "--prefill-batch must be at most 256 rows, got 300"),
        ("--mixed 3 0", "--mixed must be at least 1, got 0"),
        ("--prefill-batch 0", "--prefill-batch must be at least 1, got 0"),
        ("--layers 0", "--layers must be at least 1, got 0"),
        ("--tp 2 --shard 2", "expected --tp 1, got --tp 2"),
        ("--tp 2 --profile x.csv", "--profile looks at one process"),
        ("--model tiny --shard 5", "5 ranks cannot share the 4 query heads of tiny"),
    ],
)
def test_options_that_do_not_fit_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        bench_model.main(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    for words in ([], ["--tp", "2"]):
        with pytest.raises(SystemExit):
            bench_model.main(words)
        assert "there is no GPU here; `--device cpu --model tiny`" in capsys.readouterr().err


def test_outcomes_are_written_from_the_files(tmp_path):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    case, roofs = Case("decode", 1, 1, 1024), Roofs(3.0e12, 700e12)
    entries = {
        "tp_kernels": Entry(True, bytes=15 * 10**9, timing=timing(5.5), verdict=Verdict(0.1, 0.2), goal=goal()),
        "torch graph": Entry(False, bytes=15 * 10**9, timing=timing(7.7)),
    }
    common = {"model": "llama3-8b", "tp": 1, "shard": 1, "dtype": "bfloat16", "layers": 32}
    machine = {"gpu": "GPU", "cpu": "", "torch": "2.11", "date": "2026-01-01"}
    rows = [{**row, **machine} for row in rows_of(common, case, entries, roofs)]
    with open(tmp_path / "model.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    lines = script.outcome_lines(tmp_path)
    expected = "| decode batch 1, tp=1, tp_kernels | 5.50 ms | 90.9% | torch graph 7.70 ms | <= 5.3 ms | no |"
    assert lines[-1] == expected and "GPU, torch 2.11, llama3-8b bfloat16" in lines[0]
    assert script.gpu_table(tmp_path) == [], "no table of ops"
