"""``make gpu``: everything worth running on a machine with a GPU, in parts that are worth something alone.

Resumable: a command that ended leaves ``<out>/<name>.ok`` or ``.failed`` and is skipped next time (``--failed`` repeats
failures, ``--again`` everything), so a run stopped half-way is useful and can be continued. Correctness comes before
figures; then the ops that a model is made of are tuned, the model is measured with the tables that this wrote to
``<out>/tuning``, and only then the sanitizer, ranks that share the GPU, and each op by itself against its peers. The
parts up to the last of the model fit into about 27 minutes, since a build takes a third of its limit; all do not.

    python benchmarks/run_gpu.py --out gpu_out                # all parts
    python benchmarks/run_gpu.py --out gpu_out --minutes 9.5  # those that end within that; call again for more
    python benchmarks/run_gpu.py --part tests --out gpu_out   # one part
    python benchmarks/run_gpu.py --list
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MINUTES = 8.0  # of a part
# What `tune` and `bench` have less than their part: imports before, and the case under way when their time is over.
MARGIN_MINUTES = 0.4
RANKS_MARGIN_MINUTES = 0.75  # the same for ranks, which start together and make communicators

_ALL_TP = ["--tp", "1", "8", "2", "4"]  # in the order in which they are worth having
_ONE_TP = ["--tp", "1"]


class Group(NamedTuple):
    """Ops that are tuned and measured together: minutes and further arguments of both."""

    ops: list[str]
    tune_minutes: float
    tune: list[str]
    bench_minutes: float
    bench: list[str]


# In the order in which they are tuned: what a decode step and a prefill spend most of their time in comes first.
# A table answers for sizes within a factor of two: tp 1 and 4 cover 1 to 8, these rows 1 to 32768 tokens.
_TUNE_ROWS = ["--rows", "1", "4", "16", "64", "256", "1024", "4096", "16384"]
_LENGTHS = ["--rows", "4096", "1024", "16384", "2048", "8192"]  # of one sequence
# All ranks' shapes of one number of rows before the next (`bench ops` keeps the order of --rows): what the goals are
# about first, since 128 cases of linear and 24 of swiglu, each with a compilation by torch, may outlast their minutes.
_BENCH_ROWS = ["--rows", "1", "4096", "16", "64", "4", "1024"]
GROUPS: dict[str, Group] = {
    "linear": Group(["linear"], 2.5, [*_TUNE_ROWS, "--tp", "1", "4"], 3.0, [*_BENCH_ROWS, *_ALL_TP]),
    "swiglu": Group(["swiglu_linear"], 1.25, [*_TUNE_ROWS, "--tp", "1", "4"], 3.5, [*_BENCH_ROWS, *_ALL_TP]),
    "decode": Group(["decode_attention"], 1.0, ["--tp", "1", "4"], 0.75, _ONE_TP),
    # Several ranks have their norms behind the sum over the ranks, and int8 has a goal at tp=1 only.
    "norm-linear": Group(["norm_linear"], 1.0, ["--rows", "1", "4", *_ONE_TP], 0.75, ["--rows", "1", "4", *_ONE_TP]),
    "attention": Group(["flash_attention"], 1.75, ["--tp", "1", "4"], 1.75, [*_LENGTHS, *_ONE_TP]),
    "quantized": Group(
        ["quantized_linear"],
        1.25,
        ["--rows", "1", "16", "64", "4", *_ONE_TP],
        1.0,
        ["--rows", "1", "16", "64", *_ONE_TP],
    ),
    "norms": Group(
        ["rms_norm", "qkv_rope_cache"], 0.75, ["--tp", "1", "4"], 1.0, ["--rows", "4096", "64", "8192", *_ONE_TP]
    ),
    # Compiling the peers of torch.compile is most of the time of these benchmarks, hence few rows.
    "memory": Group(
        ["cross_entropy", "rope"], 1.0, ["--tp", "1", "4"], 1.0, ["--rows", "4096", "64", "8192", *_ONE_TP]
    ),
    "swiglu-backward": Group(
        ["swiglu_mlp", "silu_mul"], 0.75, ["--rows", "4096", "--tp", "1", "4"], 0.75, ["--rows", "4096", *_ONE_TP]
    ),
}
# Of no use to a model's forward pass: tuned right before they are measured.
_TUNED_LATE = ("memory", "swiglu-backward")

# Processes that share a file's tests, where compiling its kernels may take more than its part has on one core.
SHARDS = {
    "test_gluon_attention": 4,
    "test_gluon_backward": 4,
    "test_flash_attention_backward": 4,
    "test_skinny": 4,
    "test_quantized": 3,
    "test_swiglu": 3,
    "test_matmul": 3,
    "test_flash_attention": 2,
    "test_decode_attention": 2,
    "test_norm": 2,
    "test_norm_linear": 2,
    "test_engine_gpu": 4,
    "test_hf_gpu": 4,
    "test_op_bench": 2,
}

# Tests of ranks that share the GPU, in the order in which they are worth having; files that are not named come behind,
# in a part of their own.
RANK_TESTS = ("smoke", "symmetric", "fused_norm", "fused_linear", "nccl", "engine")


@dataclass(frozen=True)
class Part:
    """Commands by name (each is a process with its own log), how long they have, how many of them run at once."""

    commands: dict[str, list[str]]
    minutes: float
    at_once: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def parts(out: Path) -> dict[str, Part]:
    """All parts, in the order in which they are worth running."""
    python, cores = sys.executable, os.cpu_count() or 1
    plain_pytest = [python, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    # A kernel that hangs holds the main thread in the driver, where only another thread can end the process; sooner for
    # the engine's tests, whose part would else be over before it is known which one hangs.
    pytest, engine_pytest = (
        [*plain_pytest, "-o", f"timeout={seconds}", "-o", "timeout_method=thread"] for seconds in (150, 90)
    )
    # Tests bring their own tables; compilers in processes of their own would only compete for cores.
    testing = {"TP_KERNELS_TUNING_DIR": str(out / "no_tuning"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    kernels = sorted((path for path in (ROOT / "tests/kernels").glob("test_*.py")), key=_most_shards_first)
    kernels = [path for path in kernels if path.stem != "test_aot"]
    files = [*kernels, *(ROOT / "tests/testing" / f"test_{name}.py" for name in ("op_bench", "gpu_timer"))]
    ranks = {path.stem.removeprefix("test_"): path for path in sorted((ROOT / "tests/gpu_ranks").glob("test_*.py"))}
    # A log that ends in the middle still says which tests passed, and which take long.
    rank_tests = {
        f"gpu-ranks-{name}": [*plain_pytest, "-vv", "--durations=8", _relative(ranks[name])]
        for name in (
            *(name for name in RANK_TESTS if name in ranks),
            *(name for name in ranks if name not in RANK_TESTS),
        )
    }
    first = {key: rank_tests[key] for key in rank_tests if key.removeprefix("gpu-ranks-") in RANK_TESTS}
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # Errors of the API are tests' business, and some calls that ask what a driver can do are meant to fail.
    sanitizer_options = ["--error-exitcode", "9", "--report-api-errors", "no", "--target-processes", "application-only"]
    check = [sanitizer, *sanitizer_options, "--tool"]
    found = {
        # Without build isolation and dependencies: such machines often have no network, and their torch stays.
        "build": _one("build", [python, "-m", "pip", "install", "-q", *_BUILD_OPTIONS, "-e", str(ROOT)], 3.0),
        "doctor": _one("doctor", [python, "-m", "tp_kernels", "doctor"], 1.0),
        # A process a file and more: an illegal access spoils the CUDA context, and must not take other kernels' tests.
        "tests": Part(_sharded("tests", files, pytest), 5.5, min(16, cores), testing),
        "engine": Part(_sharded("engine", _engine_tests(), engine_pytest), 2.0, min(16, cores), testing),
    }
    for name in (name for name in GROUPS if name not in _TUNED_LATE):
        found[f"tune-{name}"] = _tuning(name)
    found |= _models(out)
    found |= {
        "sanitizer": Part(
            {
                f"sanitizer-{path.stem.removeprefix('test_')}": [
                    *check, "memcheck", *plain_pytest, "-m", "sanitize", _relative(path)
                ]
                for path in kernels
            },
            2.75,
            min(13, cores),
            # Tensors that are parts of one allocation would hide accesses beyond their ends.
            testing | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        "gpu-ranks": Part(first, LIMIT_MINUTES, 1, testing),
        "gpu-ranks-more": Part({key: rank_tests[key] for key in rank_tests if key not in first}, 6.0, 1, testing),
    }  # fmt: skip
    for name in GROUPS:
        if name in _TUNED_LATE:
            found[f"tune-{name}"] = _tuning(name)
        found[f"bench-{name}"] = _benchmark(name, out)
    found |= _communication(out)
    launches = [python, "benchmarks/bench_launch.py", "--csv", str(out / "launch.csv")]
    found["bench-launch"] = _one("bench-launch", launches, 1.5)
    # What is less worth having, or needs no GPU.
    found["sanitizer-races"] = Part(
        {
            f"sanitizer-{tool}": [*check, tool, *pytest, "-m", "sanitize", "tests/kernels/test_reduce_buffers.py"]
            for tool in ("racecheck", "initcheck")
        },
        3.0,
        2,
        testing,
    )
    # Without MPS the ranks take turns on the GPU, and an exchange takes milliseconds: right answers, for a few tests.
    sliced = {
        "smoke": ["tests/gpu_ranks/test_smoke.py"],
        "symmetric": ["tests/gpu_ranks/test_symmetric.py", "-k", "2 and (exact or alternating or replay or other)"],
    }
    found["sliced-ranks"] = Part(
        {f"sliced-ranks-{name}": [*plain_pytest, *words] for name, words in sliced.items()},
        3.0,
        1,
        testing | {"TP_KERNELS_MPS": "0"},
    )
    found["cpu-ranks"] = Part({"cpu-ranks": [*plain_pytest, "tests/comm", "tests/layers"]}, 6.0, 1, testing)
    all_reduce = ["--csv", str(out / "cpu_all_reduce.csv"), "--plot", str(out / "cpu_all_reduce.png")]
    found["bench-all-reduce"] = _one(
        "bench-all-reduce", [python, "benchmarks/bench_all_reduce.py", *all_reduce], LIMIT_MINUTES
    )
    cpu_ops = [python, "benchmarks/bench_cpu_ops.py", "--csv", str(out / "cpu_ops.csv")]
    found["bench-cpu-ops"] = _one("bench-cpu-ops", cpu_ops, LIMIT_MINUTES)
    return found


def _tuning(name: str) -> Part:
    group = GROUPS[name]
    options = [*_chosen(group), *group.tune, "--minutes", f"{group.tune_minutes - MARGIN_MINUTES:.2f}"]
    return _one(f"tune-{name}", [sys.executable, "-m", "tp_kernels", "tune", *options], group.tune_minutes)


def _benchmark(name: str, out: Path) -> Part:
    group = GROUPS[name]
    files = ["--csv", str(out / f"{name}.csv"), "--plot", str(out / "plots")]
    options = [*_chosen(group), *group.bench, "--minutes", f"{group.bench_minutes - MARGIN_MINUTES:.2f}", *files]
    return _one(f"bench-{name}", [sys.executable, "-m", "tp_kernels", "bench", "ops", *options], group.bench_minutes)


def _chosen(group: Group) -> list[str]:
    return [word for op in group.ops for word in ("--op", op)]


# Llama-3-8B: the whole on the GPU, one shard of four alone, four ranks that share it. CSV under the names by which
# docs/performance.md and `tp-kernels plan` look for them.
_MODELS = {
    "bench-model": (3.25, "model", ["--quantize", "none", "int8"]),
    "bench-model-shard4": (1.5, "model_shard4", ["--shard", "4", "--batch", "1", "16"]),
    # Without NCCL, which goes over sockets here: that says nothing, and a prefill has 65 sums of 32 MiB, where one of
    # 16 MiB took 9.9 ms.
    "bench-model-tp4": (2.5, "model_tp4", ["--tp", "4", "--batch", "1", "16", "--no-nccl"]),
}


def _models(out: Path) -> dict[str, Part]:
    found = {}
    for name, (minutes, file, options) in _MODELS.items():
        files = ["--csv", str(out / f"{file}.csv"), "--plot", str(out / "plots" / f"{file}.png")]
        files += [] if "--tp" in options else ["--profile", str(out / f"profile_{file}.csv")]
        command = [sys.executable, "-m", "tp_kernels", "bench", "model", *options, *files]
        found[name] = _one(name, [*command, "--minutes", f"{minutes - MARGIN_MINUTES:.2f}"], minutes)
    return found


def _communication(out: Path) -> dict[str, Part]:
    """Ranks that share the GPU: these are ratios of two paths, see docs/one_gpu.md."""
    bench = [sys.executable, "-m", "tp_kernels", "bench"]

    def csv(name: str) -> list[str]:
        return ["--csv", str(out / f"{name}.csv")]

    sums = [*bench, "all-reduce-gpu", "--what", "sums", "--ranks"]
    norms = [*bench, "all-reduce-gpu", "--what", "norms", "--ranks"]
    # Its winners go to the tuning tables, by which the layers after it choose. 4096 rows are what the goal is about;
    # of fewer the figures show where overlap does not pay.
    overlap = [*bench, "overlap", "--ranks", "4", "--rows", "4096", "1024", "256", "512", "2048", "16384"]
    overlap += ["--max-ctas", "0", "4", "--growth", "1", "2", "4", "--tune", "--minutes", "5.5"]
    launch = [sys.executable, "-m", "tp_kernels", "launch", "--nproc", "4", "--one-gpu", "--module", "tp_kernels"]
    commands = {
        "comm-norms-4": ([*norms, "4"], 3.5),
        "comm-all-reduce-4": ([*sums, "4", "--factor", "2"], 3.0),
        "comm-overlap": (overlap, 7.0),  # communicators to make before, and a case of up to half a minute after
        "comm-layer": ([*bench, "layer", "--ranks", "4"], 3.0),
        "comm-norms-2": ([*norms, "2", "--hidden", "4096", "--tokens", "1", "64", "1024", "4096"], 2.0),
        "comm-all-reduce-2": ([*sums, "2", "--factor", "8"], 1.5),  # hits 2 KB and 64 MB as well
    }
    found = {}
    for name, (words, minutes) in commands.items():
        own = [] if "--minutes" in words else ["--minutes", f"{minutes - RANKS_MARGIN_MINUTES:.2f}"]
        found[name] = _one(name, [*words, *own, *csv(name)], minutes)
    tune = [*launch, "tune", "comm", "--minutes", "1.5"]
    return found | {"comm-tune": _one("comm-tune", tune, 2.5)}


def _engine_tests() -> list[Path]:
    """Tests on a GPU of what stands above the kernels: decode engine, generation, patched models."""
    patterns = ("inference/test_*_gpu.py", "integrations/test_*_gpu.py", "test_generate_gpu.py")
    return [path for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]


def _sharded(part: str, files: list[Path], pytest: list[str]) -> dict[str, list[str]]:
    """The commands of a part that runs tests, as many a file as ``SHARDS`` says."""
    return {
        f"{part}-{path.stem.removeprefix('test_')}-{i}": [*pytest, "--shard", f"{i}/{n}", _relative(path)]
        for path in files
        for n in (SHARDS.get(path.stem, 1),)
        for i in range(n)
    }


_BUILD_OPTIONS = ["--no-deps", "--no-build-isolation"]


def _one(name: str, command: list[str], minutes: float) -> Part:
    return Part({name: command}, minutes)


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _most_shards_first(path: Path) -> tuple[int, str]:
    return -SHARDS.get(path.stem, 1), path.stem


def run(command: list[str], log: Path, deadline: float, environment: dict[str, str]) -> int:
    """Run one command as a process group, of which nothing outlives it; 124 at the deadline, 127 if there is none."""
    with log.open("w") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
        except OSError as error:
            file.write(f"{error}\n")
            return 127
        try:
            return process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def left_to_do(part: Part, out: Path, again: bool, failed: bool) -> dict[str, list[str]]:
    """The commands of a part that have not ended before, or are to be repeated."""

    def ended(key: str) -> bool:
        return (out / f"{key}.ok").exists() or (not failed and (out / f"{key}.failed").exists())

    return {key: command for key, command in part.commands.items() if again or not ended(key)}


def run_part(name: str, part: Part, out: Path, wanted: dict[str, list[str]]) -> bool:
    """Run commands of a part; print one line about it, its last lines where it measures, and why a command failed."""
    started = time.monotonic()
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        "PYTHONUNBUFFERED": "1",
        "TP_KERNELS_TUNING_DIR": str(out / "tuning"),
        **part.environment,
    }
    if not wanted:
        failed = [key for key in part.commands if (out / f"{key}.failed").exists()]
        words = f"FAILED before, --failed repeats: {', '.join(failed)}" if failed else "done before; --again repeats it"
        print(f"{name:22} {words}", flush=True)
        return not failed
    deadline = started + 60 * part.minutes
    with ThreadPoolExecutor(part.at_once) as pool:
        running = {
            key: pool.submit(run, command, out / f"{key}.log", deadline, environment) for key, command in wanted.items()
        }
        codes = {key: future.result() for key, future in running.items()}
    bad = {key: code for key, code in codes.items() if code not in (0, 5)}  # 5: no test was selected
    for key, code in codes.items():
        for kind, holds in (("ok", key not in bad), ("failed", key in bad and code != 124)):
            (out / f"{key}.{kind}").touch() if holds else (out / f"{key}.{kind}").unlink(missing_ok=True)
    first = out / f"{next(iter(wanted))}.log"
    counted = f"{len(codes) - len(bad)} of {len(codes)} commands ended well" if len(codes) > 1 else first
    print(f"{name:22} {'FAILED' if bad else 'ok'}  {time.monotonic() - started:.0f} s  {counted}", flush=True)
    if name.startswith(("bench", "tune", "comm")):
        print("    " + "\n    ".join(_lines(first)[-(40 if name in _MODELS else 14) :]), flush=True)
    for key, code in bad.items():
        reason = "out of time" if code == 124 else f"exit status {code}"
        print(f"  {reason}: {out / f'{key}.log'}\n    " + "\n    ".join(why(_lines(out / f"{key}.log"))), flush=True)
    return not bad


def why(lines: list[str]) -> list[str]:
    """The lines of a log that say what went wrong first: pytest's, a hung test's, the sanitizer's; else the last."""
    marks = ("E  ", "FAILED ", "ERROR ", "========= Invalid", "========= ERROR", "!!!!")
    found = [line for line in lines if line.startswith(marks) or "+ Timeout +" in line or ", in test_" in line]
    return [*found[:8], "...", lines[-1]] if found else lines[-20:]


def _lines(log: Path) -> list[str]:
    return [line[:200] for line in log.read_text(errors="replace").splitlines() if line.strip()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="run only this part (repeatable)")
    parser.add_argument("--out", type=Path, default=Path("gpu_out"), help="where logs, tables, CSV and plots go")
    parser.add_argument("--minutes", type=float, help="start no part that may not end within this")
    parser.add_argument("--failed", action="store_true", help="repeat what has failed")
    parser.add_argument("--again", action="store_true", help="repeat what has ended, well or not")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, run nothing")
    args = parser.parse_args()
    args.out = args.out.resolve()
    known = parts(args.out)
    unknown = [name for name in args.part or [] if name not in known]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; expected one of {', '.join(known)}")
    if args.list:
        for name in args.part or known:
            part = known[name]
            print(f"{name}: at most {part.minutes:g} minutes, {part.at_once} at once")
            print("\n".join(f"    {' '.join(command)}" for command in part.commands.values()))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    started, good = time.monotonic(), True
    for name in args.part or known:
        part = known[name]
        wanted = left_to_do(part, args.out, args.again, args.failed or name == "build")
        left = part.minutes if args.minutes is None else args.minutes - (time.monotonic() - started) / 60
        if left < part.minutes and wanted:
            print(f"{name:22} may take {part.minutes:g} minutes, {left:.1f} are left: call again to go on")
            return 0 if good else 1
        good &= run_part(name, part, args.out, wanted)
        if not good and name == "build":
            return 1  # nothing after it can run
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
