"""``make gpu``: everything worth running on a machine with a GPU, in parts of at most 8 minutes.

Resumable: a part that ended well leaves ``<out>/<part>.ok`` and is skipped next time (``--again`` repeats it), so a run
stopped half-way is useful and can be continued. Correctness comes before the sanitizer, the sanitizer before tuning,
tuning before figures. The table that tuning writes to ``<out>/tuning`` is the one that the benchmarks after it use.

    python benchmarks/run_gpu.py --out gpu_out              # all parts
    python benchmarks/run_gpu.py --part tests --out gpu_out # one part
    python benchmarks/run_gpu.py --list
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 480

# A table answers for shapes within a factor of two, so these cover 1 to 32768 tokens.
_ROWS = ["--rows", "1", "4", "16", "64", "256", "1024", "4096", "16384"]
# What is tuned and measured together; each group fits a part. Minutes are those of `tune`, then those of `bench`.
GROUPS: dict[str, tuple[list[str], list[str], float, float]] = {
    # name: ops, further arguments of both, minutes
    "linear": (["linear"], _ROWS, 6.5, 3.0),
    "swiglu": (["swiglu_linear"], _ROWS, 5.0, 3.0),
    "swiglu-backward": (["silu_mul", "swiglu_mlp"], ["--rows", "4096"], 3.0, 3.0),
    "attention": (["flash_attention"], [], 5.0, 4.0),
    "decode": (["decode_attention"], [], 3.0, 3.0),
    "memory": (["rms_norm", "qkv_rope_cache", "rope", "cross_entropy"], [], 3.0, 5.0),
}


@dataclass(frozen=True)
class Part:
    """Commands of a part, and how many of them may run at once (each is a process of its own, with its own log)."""

    commands: list[list[str]]
    at_once: int = 1


def parts(out: Path) -> dict[str, Part]:
    """All parts, in the order in which they are worth running."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    check = [sanitizer, "--error-exitcode", "9", "--tool"]
    # A process a file: an illegal access spoils the CUDA context, and must not take other kernels' tests with it.
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("test_*.py"))
    files = [file for file in files if not file.endswith("test_aot.py")]
    tune, bench = [python, "-m", "tp_kernels", "tune"], [python, "-m", "tp_kernels", "bench", "ops"]
    found = {
        # Without build isolation and dependencies: such machines often have no network, and their torch stays.
        "build": Part([[python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]]),
        "doctor": Part([[python, "-m", "tp_kernels", "doctor"]]),
        "tests": Part([[*pytest, file] for file in files], at_once=6),
        "sanitizer": Part([[*check, "memcheck", *pytest, "-m", "sanitize", file] for file in files], at_once=4),
        "sanitizer-races": Part(
            [[*check, tool, *pytest, "-m", "sanitize", "tests/kernels/test_reduce_buffers.py"] for tool in _RACE_TOOLS]
        ),
    }
    for name, (ops, arguments, minutes, _) in GROUPS.items():
        chosen = [word for op in ops for word in ("--op", op)]
        found[f"tune-{name}"] = Part([[*tune, *chosen, *arguments, "--minutes", str(minutes)]])
    for name, (ops, arguments, _, minutes) in GROUPS.items():
        chosen = [word for op in ops for word in ("--op", op)]
        files_out = ["--csv", str(out / f"{name}.csv"), "--plot", str(out / "plots")]
        shapes = [*arguments, "--tp", "1", "2", "4", "8"] if name in ("linear", "swiglu") else [*arguments, "--tp", "1"]
        found[f"bench-{name}"] = Part([[*bench, *chosen, *shapes, *files_out, "--minutes", str(minutes)]])
    all_reduce = ["--csv", str(out / "cpu_all_reduce.csv"), "--plot", str(out / "cpu_all_reduce.png")]
    found["cpu-ranks"] = Part([[*pytest, "tests/comm", "tests/layers"]])
    found["bench-all-reduce"] = Part([[python, "benchmarks/bench_all_reduce.py", *all_reduce]])
    found["bench-cpu-ops"] = Part([[python, "benchmarks/bench_cpu_ops.py", "--csv", str(out / "cpu_ops.csv")]])
    return found


_RACE_TOOLS = ("racecheck", "initcheck")


def run(command: list[str], log: Path, deadline: float, out: Path) -> int:
    """Run one command with its own process group, so that a deadline ends all of it; 124 then."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TP_KERNELS_TUNING_DIR": str(out / "tuning")}
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            return process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_part(name: str, part: Part, out: Path) -> bool:
    """Run a part; print one line about it, its last lines where it measures, and the end of a log that failed."""
    started = time.monotonic()
    single = len(part.commands) == 1
    logs = [out / (f"{name}.log" if single else f"{name}-{i}.log") for i in range(len(part.commands))]
    for log in logs:
        log.unlink(missing_ok=True)
    with ThreadPoolExecutor(part.at_once) as pool:
        running = [
            pool.submit(run, command, log, started + LIMIT_S, out)
            for command, log in zip(part.commands, logs, strict=True)
        ]
        codes = [future.result() for future in running]
    bad = [(code, log) for code, log in zip(codes, logs, strict=True) if code not in (0, 5)]  # 5: no test selected
    print(f"{name:22} {'FAILED' if bad else 'ok'}  {time.monotonic() - started:.0f} s  {logs[0]}", flush=True)
    if not bad:
        (out / f"{name}.ok").touch()
    if name.startswith(("bench", "tune")):
        print("    " + "\n    ".join(_tail(logs[0], 14)), flush=True)
    for code, log in bad:
        print(f"  exit status {code}: {log}\n    " + "\n    ".join(_tail(log, 20)), flush=True)
    return not bad


def _tail(log: Path, lines: int) -> list[str]:
    return [line[:200] for line in log.read_text(errors="replace").splitlines()[-lines:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="run only this part (repeatable)")
    parser.add_argument("--out", type=Path, default=Path("gpu_out"), help="where logs, tables, CSV and plots go")
    parser.add_argument("--again", action="store_true", help="repeat parts that have already ended well")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, run nothing")
    args = parser.parse_args()
    args.out = args.out.resolve()
    known = parts(args.out)
    if args.list:
        for name, part in known.items():
            print(name, *(f"\n    {' '.join(command)}" for command in part.commands))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    unknown = [name for name in args.part or [] if name not in known]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; expected one of {', '.join(known)}")
    good = True
    for name in args.part or known:
        if (args.out / f"{name}.ok").exists() and not args.again:
            print(f"{name:22} done before; --again repeats it")
        else:
            good &= run_part(name, known[name], args.out)
            if not good and name == "build":
                return 1  # nothing after it can run
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
