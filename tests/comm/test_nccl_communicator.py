"""The native NCCL communicator on a make-believe CUDA runtime and NCCL: order of streams, captures, deadlines, aborts.

Tier: no device (one small program is compiled; it needs the CUDA headers, but no driver).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["nccl_communicator.cpp", "nccl_flight.cpp", "nccl_watchdog.cpp", "nccl_library.cpp"]


def _cuda_include():
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_runtime_api.h").exists():
            return Path(home) / "include"
    return None


def test_communicator_on_a_device_of_make_believe(tmp_path):
    include, compiler = _cuda_include(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("needs g++ and the CUDA headers")
    program = tmp_path / "checks"
    sources = [Path(__file__).with_name("nccl_fake_device.cpp"), *(ROOT / "csrc" / "comm" / name for name in SOURCES)]
    command = [compiler, "-std=c++17", "-O0", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    builds = [
        subprocess.Popen([*command, "-c", str(source), "-o", str(to)], stderr=subprocess.PIPE, text=True)
        for source, to in zip(sources, objects, strict=True)
    ]
    for build in builds:
        _, errors = build.communicate(timeout=120)
        assert build.returncode == 0, errors
    link = [compiler, *map(str, objects), "-o", str(program), "-lpthread", "-ldl"]
    build = subprocess.run(link, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
