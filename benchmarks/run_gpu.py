"""``make gpu``: everything worth running on a machine with a GPU, in parts of at most 8 minutes.

Resumable: a part that ended well leaves ``<out>/<part>.ok`` and is skipped next time (``--again`` repeats it), so a run
stopped half-way is useful and can be continued. Correctness comes before the sanitizer, the sanitizer before figures.

    python benchmarks/run_gpu.py --out gpu_out              # all parts
    python benchmarks/run_gpu.py --part tests --out gpu_out # one part
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 480


def parts(out: Path) -> dict[str, list[list[str]]]:
    """Commands of each part, in the order in which they are worth running."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return {
        # Without build isolation and dependencies: such machines often have no network, and their torch stays.
        "build": [[python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]],
        "doctor": [[python, "-m", "tp_kernels", "doctor"]],
        "tests": [[*pytest, "-m", "gpu", "tests/kernels", "tests/comm"]],
        "sanitizer": [
            [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-m", "sanitize", "tests/kernels"]
            for tool in ("memcheck", "racecheck", "initcheck")
        ],
        "cpu-ranks": [[*pytest, "tests/comm", "tests/layers"]],
        "bench-all-reduce": [
            [
                python,
                "benchmarks/bench_all_reduce.py",
                "--csv",
                str(out / "cpu_all_reduce.csv"),
                "--plot",
                str(out / "cpu_all_reduce.png"),
            ]
        ],
        "bench-cpu-ops": [[python, "benchmarks/bench_cpu_ops.py", "--csv", str(out / "cpu_ops.csv")]],
    }


def run(command: list[str], log: Path, deadline: float) -> int:
    """Run one command with its own process group, so that a deadline ends all of it; 124 then."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
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


def run_part(name: str, commands: list[list[str]], out: Path) -> bool:
    """Run a part, print one line about it and the end of its log if it failed."""
    log, started = out / f"{name}.log", time.monotonic()
    log.unlink(missing_ok=True)
    codes = [run(command, log, started + LIMIT_S) for command in commands]
    good = all(code in (0, 5) for code in codes)  # 5: pytest selected no test
    print(f"{name:18} {'ok' if good else f'FAILED {codes}'}  {time.monotonic() - started:.0f} s  {log}", flush=True)
    if good:
        (out / f"{name}.ok").touch()
    else:
        print("    " + "\n    ".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="run only this part (repeatable)")
    parser.add_argument("--out", type=Path, default=Path("gpu_out"), help="where logs, CSV and plots go")
    parser.add_argument("--again", action="store_true", help="repeat parts that have already ended well")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    known = parts(args.out)
    unknown = [name for name in args.part or [] if name not in known]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; expected one of {', '.join(known)}")
    good = True
    for name in args.part or known:
        if (args.out / f"{name}.ok").exists() and not args.again:
            print(f"{name:18} done before; --again repeats it")
        else:
            good &= run_part(name, known[name], args.out)
            if not good and name == "build":
                return 1  # nothing after it can run
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
