"""Builds ``tp_kernels._C`` with CMake and Ninja; torch is never imported, so no build-isolation flag is ever needed.

Environment: ``TPK_CUDA`` = AUTO (default) | ON | OFF, ``TORCH_CUDA_ARCH_LIST`` (for example "8.0;9.0"), ``MAX_JOBS``,
``CUDACXX``.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "tp_kernels" / "version.py").read_text()).group(1)


class CMakeBuild(build_ext):
    """Runs one CMake configure and build and leaves the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        started = time.monotonic()
        mode = os.environ.get("TPK_CUDA", "AUTO").upper()
        if mode not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"TPK_CUDA must be AUTO, ON or OFF, got {mode!r}")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("tp-kernels needs cmake >= 3.24 to build: pip install cmake, or leave build isolation on")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # One build folder per interpreter and CUDA mode, so that switching either never reuses a stale cache.
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{mode.lower()}"
        cache = folder / "CMakeCache.txt"
        if cache.exists() and str(pybind11.get_cmake_dir()) not in cache.read_text():
            shutil.rmtree(folder)  # an isolated build environment of an earlier pip run, since deleted
        folder.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DTPK_CUDA={mode}",
            f"-DTPK_VERSION={VERSION}",
            f"-DTPK_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTPK_OUTPUT_DIR={target.parent}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self._run(configure)
        self._run([cmake, "--build", str(folder), "--parallel", jobs])
        if not target.exists():
            raise SystemExit(f"the CMake build ended without {target}; see its output above")
        print(f"tp-kernels: built {target.name} in {time.monotonic() - started:.0f} s", flush=True)

    @staticmethod
    def _run(command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"tp-kernels: `{' '.join(command[:4])} ...` failed; its output is above") from error


setup(version=VERSION, ext_modules=[Extension("tp_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
