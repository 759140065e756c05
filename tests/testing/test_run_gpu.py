"""``make gpu``: its parts are complete, in order, short enough, and made of commands that exist. Tier: no device."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

from tp_kernels.cli import build_parser
from tp_kernels.testing.op_bench.runner import Selection, bench_names, select_cases

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_gpu():
    spec = importlib.util.spec_from_file_location("run_gpu", ROOT / "benchmarks" / "run_gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["run_gpu"]


@pytest.fixture(scope="module")
def parts(run_gpu):
    return run_gpu.parts(Path("/results"))


def commands(parts, start):
    found = [c for name, part in parts.items() if name.startswith(start) for c in part.commands.values()]
    assert found
    return found


def parsed(command):
    """What the command line makes of a ``python -m tp_kernels`` command."""
    assert command[1:3] == ["-m", "tp_kernels"]
    return build_parser().parse_args(command[3:])


def of_ops(parts, kind):
    """The commands that tune or measure ops; others measure whole models, or are scripts."""
    found = [c for c in commands(parts, kind) if c[1:3] == ["-m", "tp_kernels"] and "model" not in c]
    assert found
    return found


def test_every_op_is_tuned_once_and_measured_once(parts):
    for kind in ("tune-", "bench-"):
        assert sorted(op for command in of_ops(parts, kind) for op in parsed(command).op) == bench_names()


def test_selections_are_not_empty_and_have_no_head_for_more_rows_than_fit(parts):
    for kind in ("tune-", "bench-"):
        for command in of_ops(parts, kind):
            args = parsed(command)
            cases = list(select_cases(Selection(tuple(args.op), tuple(args.model), tuple(args.tp), rows=args.rows)))
            assert {case.op for case in cases} >= {op for op in args.op if op != "swiglu_mlp"}
            assert not any("lm_head" in case.label and case.sizes["m"] > 1024 for case in cases)


def test_minutes(run_gpu, parts):
    assert all(0 < part.minutes <= run_gpu.LIMIT_MINUTES for part in parts.values())
    for kind in ("tune-", "bench-"):
        for name, part in parts.items():
            for command in part.commands.values():
                if name.startswith(kind) and command[1:3] == ["-m", "tp_kernels"]:
                    assert parsed(command).minutes == pytest.approx(part.minutes - run_gpu.MARGIN_MINUTES)
    for name in (name for name in parts if name.startswith("comm-")):
        (command,) = parts[name].commands.values()
        if name != "comm-tune":  # which begins with launching ranks
            assert 0.5 < parsed(command).minutes <= parts[name].minutes - run_gpu.RANKS_MARGIN_MINUTES
    names = list(parts)
    # Limits; a build takes a third of its own, and what is measured fills its own.
    assert sum(parts[name].minutes for name in names[: names.index("bench-model-tp4") + 1]) <= 29


def test_order(run_gpu, parts):
    names = list(parts)
    assert names[:4] == ["build", "doctor", "tests", "engine"]
    place = {name: number for number, name in enumerate(names)}
    assert all(place[f"tune-{group}"] < place[f"bench-{group}"] for group in run_gpu.GROUPS)
    for group in ("linear", "swiglu", "decode", "norm-linear", "attention", "quantized", "norms"):
        assert place[f"tune-{group}"] < place["bench-model"], "a model is measured with tuned ops"
    models = ["bench-model", "bench-model-shard4", "bench-model-tp4"]
    assert names[place["bench-model"] :][:6] == [*models, "sanitizer", "gpu-ranks", "gpu-ranks-more"]
    first = [name.removeprefix("gpu-ranks-") for name in parts["gpu-ranks"].commands]
    assert first[0] == "smoke" and {"symmetric", "fused_norm", "nccl"} < set(first) and parts["gpu-ranks"].at_once == 1


def test_models_are_measured_as_their_goals_say(parts):
    from tp_kernels.commands.bench_model import _options
    from tp_kernels.testing.model_bench.budget import GOALS

    asked = [_options(parsed(command)) for command in commands(parts, "bench-model")]
    for goal in GOALS:
        assert any(
            (options.model, options.tp, options.shard) == (goal.model, goal.tp, goal.shard)
            and goal.what in options.what
            and goal.quantize in options.quantize
            and 1 in options.batch
            and 4096 in options.prompt
            for options in asked
        ), goal


def test_every_goal_has_its_row_where_documents_and_planner_look(parts, tmp_path, monkeypatch, capsys):
    """The commands' own options, GPU name and times aside, through the files to the outcomes and to the plan."""
    from tp_kernels import cli
    from tp_kernels.commands.bench_model import _options
    from tp_kernels.testing.bench import Timing, write_csv
    from tp_kernels.testing.model_bench.budget import GOALS, goal_of
    from tp_kernels.testing.model_bench.report import Entry, rows_of

    folder, goals = tmp_path / "benchmarks" / "results" / "h100", []
    for command in commands(parts, "bench-model"):
        args = parsed(command)
        options, rows, several = _options(args), [], args.tp > 1
        common = {"model": options.model, "tp": options.tp, "shard": options.shard, "ranks_per_gpu": options.tp}
        common |= {"mps": 1, "dtype": options.dtype, "layers": 32}
        sizes = {key: common[key] for key in ("tp", "shard", "ranks_per_gpu", "dtype", "layers")}
        for case in options.cases():
            entries = {"off": Entry(True, timing=Timing(0.009, 0.009, 0.009))} if several else {}
            for kind in options.quantize:
                given = {**sizes, "batch": case.batch, "tokens": case.tokens, "context": case.context, "quantize": kind}
                goal = goal_of("NVIDIA H100 80GB HBM3", options.model, case.what, **given)
                goals += [goal] if goal else []
                name = ("symm" if several else "tp_kernels") + ("" if kind == "none" else f" {kind}")
                off = "off" if several else ""
                entries[name] = Entry(True, kind, timing=Timing(0.01, 0.01, 0.01), goal=goal, off=off)
            rows += rows_of(common, case, entries, None)
        assert Path(args.plot).name == f"{Path(args.csv).stem}.png" and Path(args.csv).parent == Path("/results")
        write_csv(folder / Path(args.csv).name, rows)
    assert sorted(map(str, goals)) == sorted(map(str, GOALS)), "each once"
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    outcomes = script.outcome_lines(folder)[-len(GOALS) :]
    assert len({line.split(" | ")[0] for line in outcomes}) == len(GOALS)
    assert all(line.endswith(("| yes |", "| no |")) and "| <= " in line for line in outcomes), outcomes
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["plan", "--model", "llama3-8b"]) == 0
    printed = capsys.readouterr().out
    assert all(f"model{name}.csv" in printed for name in ("", "_shard4", "_tp4")) and "measured/predicted" in printed


def test_missing_tests_of_the_engine_are_no_error(run_gpu, parts, tmp_path, monkeypatch, capsys):
    found = {command[-1] for command in parts["engine"].commands.values()}
    assert all((ROOT / path).exists() for path in found) and "tests/test_generate_gpu.py" in found
    monkeypatch.setattr(run_gpu, "_engine_tests", list)
    none = run_gpu.parts(tmp_path)["engine"]
    assert not none.commands and run_gpu.run_part("engine", none, tmp_path, {})


def test_every_file_of_tests_is_run_once_and_whole(parts):
    kernels = {f"tests/kernels/{p.name}" for p in (ROOT / "tests/kernels").glob("test_*.py")}
    found = [c[-1] for c in commands(parts, "sanitizer") if "memcheck" in c]
    assert sorted(found) == sorted(kernels - {"tests/kernels/test_aot.py"})
    shards = {}
    for command in commands(parts, "tests") + commands(parts, "engine"):
        index, count = command[command.index("--shard") + 1].split("/")
        shards.setdefault((command[-1], int(count)), []).append(int(index))
    engine = {command[-1] for command in commands(parts, "engine")}
    assert len(engine) > 2 and len(shards) == len(found) + 2 + len(engine)
    tools = {"tests/testing/test_op_bench.py", "tests/testing/test_gpu_timer.py"}
    assert {file for file, _ in shards} == {*found, *tools, *engine}
    for (_, count), indices in shards.items():
        assert sorted(indices) == list(range(count))
    ranks = [command[-1] for name in ("gpu-ranks", "gpu-ranks-more") for command in parts[name].commands.values()]
    assert sorted(ranks) == sorted(f"tests/gpu_ranks/{p.name}" for p in (ROOT / "tests/gpu_ranks").glob("test_*.py"))
    names = [name for part in parts.values() for name in part.commands]
    assert len(set(names)) == len(names), "logs would overwrite each other"


def test_every_kernel_has_a_case_for_the_sanitizer():
    # Dispatch, protocols, arguments, code: their kernels are in other files.
    without = {"aot", "foreign_tables", "gpu_linear", "launch"}
    without |= {"peer_exchange", "peer_kernels", "peer_protocol"}
    marked = {path.stem: "mark.sanitize" in path.read_text() for path in (ROOT / "tests/kernels").glob("test_*.py")}
    assert {name.removeprefix("test_") for name, has in marked.items() if not has} == without


def test_sums_over_ranks_are_measured_at_both_ends(parts):
    from tp_kernels.testing.bench_all_reduce_gpu import _options

    for ranks in (4, 2):
        options = _options(parsed(parts[f"comm-all-reduce-{ranks}"].commands[f"comm-all-reduce-{ranks}"]))
        assert (options.sizes[0], options.sizes[-1]) == (2 << 10, 64 << 20) and options.what == ["sums"]
        norms = _options(parsed(parts[f"comm-norms-{ranks}"].commands[f"comm-norms-{ranks}"]))
        assert norms.what == ["norms"] and {1, 64, 1024, 4096} <= set(norms.tokens) and 4096 in norms.hidden
    assert set(_options(parsed(parts["comm-norms-4"].commands["comm-norms-4"])).hidden) == {4096, 8192}


def test_overlap_is_measured_and_tuned_before_layers_choose_by_it(parts):
    from tp_kernels.ops._overlap_choice import OVERLAPPED_OPS
    from tp_kernels.testing.bench_overlap import COLUMN_SHAPES, ROW_SHAPES, _options
    from tp_kernels.testing.overlap_bench.case import cases_of

    (command,) = parts["comm-overlap"].commands.values()
    options = _options(parsed(command))
    assert options.tune == "" and options.peers and 0 in options.max_ctas  # layers leave NCCL its own number
    assert options.minutes <= parts["comm-overlap"].minutes - 1
    cases = cases_of(options)
    assert {case.op for case in cases} == set(OVERLAPPED_OPS)
    first = cases[: 2 * len(ROW_SHAPES) + len(COLUMN_SHAPES)]
    assert {case.m for case in first} == {4096} and all(case.m != 4096 for case in cases[len(first) :])
    assert min(case.m for case in cases) <= 256, "where it does not pay"
    names = list(parts)
    assert names.index("comm-overlap") < names.index("comm-layer")
    assert not any("TP_KERNELS_TUNING_DIR" in parts[name].environment for name in ("comm-overlap", "comm-layer"))


def test_ways_between_ranks_are_tuned_by_ranks(parts):
    (command,) = parts["comm-tune"].commands.values()
    launch = parsed(command)
    assert launch.nproc == 4 and launch.one_gpu
    inner = build_parser().parse_args(command[command.index("--module") + 2 :])
    assert inner.what == "comm" and inner.minutes < parts["comm-tune"].minutes


def test_a_few_tests_of_ranks_are_run_in_turns_on_the_gpu(parts):
    assert parts["sliced-ranks"].environment["TP_KERNELS_MPS"] == "0"
    assert list(parts).index("sliced-ranks") > list(parts).index("comm-layer")
    words = [command[command.index("-p") :] for command in parts["sliced-ranks"].commands.values()]
    assert {word for of in words for word in of if word.startswith("tests/")} == {
        "tests/gpu_ranks/test_smoke.py",
        "tests/gpu_ranks/test_symmetric.py",
    }


def test_what_goals_need_is_measured_first(parts):
    from tp_kernels.testing.op_bench.runner import by_rows

    for name in ("bench-linear", "bench-swiglu"):
        args = parsed(parts[name].commands[name])
        selection = Selection(tuple(args.op), tuple(args.model), tuple(args.tp), rows=args.rows)
        cases = by_rows(select_cases(selection), args.rows)
        rows = [case.sizes["m"] for case in cases]
        assert rows == sorted(rows, key=args.rows.index) and len(cases) == len(list(select_cases(selection)))
        for m in (1, 4096):
            tps = {case.label.split()[1] for case in cases if case.sizes["m"] == m}
            assert tps == {"tp=1", "tp=2", "tp=4", "tp=8"}, "geometric means are over all of them"
        assert set(rows[: rows.index(16)]) == {1, 4096}


def test_files_and_scripts_exist(parts):
    for part in parts.values():
        for command in part.commands.values():
            for word in command[1:]:
                if word.startswith(("tests/", "benchmarks/")):
                    assert (ROOT / word).exists(), word


def test_a_command_ends_at_its_deadline_with_all_it_started(run_gpu, tmp_path):
    log = tmp_path / "log"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    assert run_gpu.run([sys.executable, "-c", child], log, started + 1.0, {}) == 124
    assert time.monotonic() - started < 20
    assert run_gpu.run(["/nowhere/compute-sanitizer"], log, time.monotonic() + 5, {}) == 127
    assert "No such file" in log.read_text()


def test_what_ended_is_not_repeated(run_gpu, tmp_path, capsys):
    script = "import os, sys; open(sys.argv[1], 'a').write('x'); sys.exit(int(sys.argv[2]))"
    files = {name: tmp_path / name for name in ("good", "bad", "none")}
    codes = {"good": "0", "bad": "1", "none": "5"}  # 5: pytest selected no test
    made = {name: [sys.executable, "-c", script, str(file), codes[name]] for name, file in files.items()}
    part = run_gpu.Part(made, 1.0, 2)

    def run(**which):
        return run_gpu.run_part("some", part, tmp_path, run_gpu.left_to_do(part, tmp_path, **which))

    assert not run(again=False, failed=False)
    assert "exit status 1" in capsys.readouterr().out
    assert not run(again=False, failed=False)
    assert "FAILED before, --failed repeats: bad" in capsys.readouterr().out
    assert {name: file.read_text() for name, file in files.items()} == {"good": "x", "bad": "x", "none": "x"}
    assert not run(again=False, failed=True)
    assert not run(again=True, failed=False)
    assert {name: file.read_text() for name, file in files.items()} == {"good": "xx", "bad": "xxx", "none": "xx"}
    late = run_gpu.Part({"late": [sys.executable, "-c", "import time; time.sleep(60)"]}, 0.02)
    assert not run_gpu.run_part("late", late, tmp_path, late.commands)
    assert "out of time" in capsys.readouterr().out
    assert run_gpu.left_to_do(late, tmp_path, again=False, failed=False), "what had no time is tried again"


def test_a_part_that_may_not_end_in_time_is_not_started(run_gpu, tmp_path, monkeypatch, capsys):
    part = run_gpu.Part({"only": [sys.executable, "-c", "raise SystemExit(3)"]}, 2.0)
    monkeypatch.setattr(run_gpu, "parts", lambda out: {"only": part})
    monkeypatch.setattr(sys, "argv", ["run_gpu.py", "--out", str(tmp_path), "--minutes", "1.5"])
    assert run_gpu.main() == 0
    assert "call again to go on" in capsys.readouterr().out and not list(tmp_path.glob("*.log"))


def test_the_first_failure_is_what_is_shown(run_gpu):
    log = ["$ command", "....F.F", "E   RuntimeError: CUDA error: an illegal memory access was encountered"]
    log += ["FAILED tests/kernels/test_norm.py::test_first - RuntimeError"]
    log += [f"FAILED tests/kernels/test_norm.py::test_{i} - RuntimeError" for i in range(40)]
    shown = run_gpu.why([*log, "41 failed, 3 passed"])
    assert shown[0].startswith("E   RuntimeError") and "test_first" in shown[1]
    assert shown[-1] == "41 failed, 3 passed" and len(shown) < 15
    assert run_gpu.why(["only", "words"]) == ["only", "words"]
