"""Compile Triton and Gluon kernels without a GPU, and read what the compiler made of them.

    for case in matmul.aot_cases():
        for report in compile_case(case, 90):
            check_report(case, report)

The arguments of a recorded launch are specialised exactly as Triton's launcher would (divisibility by 16, ones,
alignment), so the code is that of the real launch. Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tp_kernels.ops._gpu import A100, H100, GpuInfo, pretend
from tp_kernels.ops.kernels.launch import AotCase, Launch, recording

__all__ = [
    "Report",
    "build_launcher",
    "cases_of",
    "check_report",
    "compile_case",
    "compile_launch",
    "compile_only",
    "kernel_modules",
    "specialization_key",
]

# 16 bytes a thread, or a bulk copy.
_WIDE_LOADS = re.compile(
    r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64)|cp\.async\.c[ga]\.shared\.global[\w.:]* .*, (0x10|16)\b|cp\.async\.bulk"
)
_GPUS: dict[int, GpuInfo] = {80: A100, 90: H100}


@dataclass(frozen=True)
class Report:
    """What one kernel became: resources as ``cuobjdump -res-usage`` gives them, and instructions found in the PTX."""

    case: str
    kernel: str
    capability: int
    registers: int
    stack: int
    shared: int
    global_scratch: int
    wgmma: bool
    mma: bool
    tma: bool
    wide_loads: bool
    pdl: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compile_only(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel of one recorded launch, as its launcher would compile it (and from the same cache)."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, target = launch.kernel, GPUTarget("cuda", capability, 32)
    backend, bind = _binder(kernel, capability)
    bound, specialization, options = bind(*launch.args, **launch.options, debug=False)
    options, signature, constexprs, attrs = kernel._pack_args(backend, dict(options), bound, specialization, None)
    source = _source_type(kernel)(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


@lru_cache(maxsize=256)
def _binder(kernel: Any, capability: int) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))
    return backend, create_function_from_signature(inspect.signature(kernel.fn), kernel.params, backend)


def specialization_key(launch: Launch, capability: int = 90) -> str:
    """Equal for launches that are served by one compiled kernel."""
    _, bind = _binder(launch.kernel, capability)
    _, specialization, options = bind(*launch.args, **launch.options, debug=False)
    return f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__qualname__} {specialization} {options}"


def build_launcher(compiled: Any) -> None:
    """Build the small C module through which Triton launches a compiled kernel, into its cache; needs libcuda."""
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(compiled.src, compiled.metadata)


def compile_launch(launch: Launch, capability: int, name: str = "") -> tuple[Report, Any]:
    """Compile one recorded launch for a compute capability; returns the report and Triton's compiled kernel."""
    compiled = compile_only(launch, capability)
    ptx, (registers, stack) = compiled.asm["ptx"], _resources(compiled.asm["cubin"])
    report = Report(
        case=name,
        kernel=launch.kernel.fn.__name__,
        capability=capability,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        global_scratch=getattr(compiled.metadata, "global_scratch_size", 0) or 0,
        wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
        wide_loads=_WIDE_LOADS.search(ptx) is not None,
        pdl="griddepcontrol.wait" in ptx,
    )
    return report, compiled


def _source_type(kernel: Any) -> Any:
    if type(kernel).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage said nothing about registers: {text!r}")
    return max(int(r) for r, _ in found), max(int(s) for _, s in found)


def compile_case(case: AotCase, capability: int) -> list[Report]:
    """Record the launches of a case for a GPU of that capability, and compile each."""
    with pretend(_GPUS[capability]), recording() as launches:
        case.call()
    if not launches:
        raise AssertionError(f"{case.name}: nothing was launched")
    return [compile_launch(launch, capability, case.name)[0] for launch in launches]


def check_report(case: AotCase, report: Report) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty if nothing."""
    problems = []
    limit = _GPUS[report.capability].max_shared
    if report.shared > limit:
        problems.append(f"{report.shared} bytes of shared memory, more than {limit}")
    if report.registers > case.max_registers:
        problems.append(f"{report.registers} registers, more than {case.max_registers}")
    if report.stack > case.max_spill_bytes:
        problems.append(f"{report.stack} bytes of stack, more than {case.max_spill_bytes}")
    if case.wide_loads is not None and report.wide_loads != case.wide_loads:
        problems.append("no 16-byte loads" if case.wide_loads else "16-byte loads where none were expected")
    if report.capability >= 90:
        for what in ("wgmma", "tma", "pdl"):
            wanted, found = getattr(case, what), getattr(report, what)
            if wanted is not None and wanted != found:
                problems.append(f"expected {'' if wanted else 'no '}{what}")
    return [f"{report.case} ({report.kernel}, sm_{report.capability}): {problem}" for problem in problems]


def kernel_modules() -> list[str]:
    """Names of the modules in ``ops.kernels`` that have ``aot_cases``."""
    from tp_kernels.ops import kernels

    names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__))
    return [name for name in names if hasattr(import_module(f"{kernels.__name__}.{name}"), "aot_cases")]


def cases_of(module: str) -> list[AotCase]:
    """The cases of one kernel module."""
    return list(import_module(f"tp_kernels.ops.kernels.{module}").aot_cases())


def _compile_one(job: tuple[str, int, int]) -> dict[str, Any]:
    module, index, capability = job
    case = cases_of(module)[index]
    try:
        reports = compile_case(case, capability)
    except Exception as error:
        text = f"{case.name} (sm_{capability}): {type(error).__name__}: {str(error).strip()[:1500]}"
        return {"module": module, "case": case.name, "capability": capability, "reports": [], "problems": [text]}
    problems = [problem for report in reports for problem in check_report(case, report)]
    found = [report.as_dict() for report in reports]
    return {"module": module, "case": case.name, "capability": capability, "reports": found, "problems": problems}


def main() -> int:
    """Compile all cases, or those of the named modules, and print what came out; exit status 1 for any problem."""
    parser = argparse.ArgumentParser(description="Compile the GPU kernels without a GPU.")
    parser.add_argument("modules", nargs="*", help="modules of tp_kernels.ops.kernels (default: all)")
    parser.add_argument(
        "--capability", type=int, action="append", choices=sorted(_GPUS), help="default: each case's own"
    )
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", help="write the reports to this file")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set; kernels defined for the interpreter cannot be compiled")
    jobs = [
        (module, index, capability)
        for module in args.modules or kernel_modules()
        for index, case in enumerate(cases_of(module))
        for capability in case.capabilities
        if args.case in case.name and capability in (args.capability or _GPUS)
    ]
    results = []
    with ProcessPoolExecutor(max_workers=args.jobs, mp_context=get_context("spawn")) as pool:
        for result in pool.map(_compile_one, jobs):
            results.append(result)
            for r in result["reports"]:
                marks = " ".join(name for name in ("wgmma", "mma", "tma", "wide_loads", "pdl") if r[name])
                resources = f"{r['registers']:4} regs {r['stack']:5} stack {r['shared']:7} shared"
                print(f"{r['case']:44} {r['kernel']:32} sm_{r['capability']} {resources}  {marks}", flush=True)
            for problem in result["problems"]:
                print(f"  PROBLEM {problem}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return 1 if any(result["problems"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
