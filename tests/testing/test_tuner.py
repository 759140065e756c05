"""Candidates are compiled ahead of measuring, each kernel once, into the cache that launches read. Tier: no device."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# A process that compiles (the tests' own interprets), then one launch with a driver that only knows its GPU.
SCRIPT = """\
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from tp_kernels.ops._gpu import H100, pretend
from tp_kernels.testing.op_bench import tuner
from tp_kernels.testing.op_bench.runner import Selection, select_cases


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


if __name__ == "__main__":
    selection = Selection(ops=("flash_attention", "silu_mul"), models=("llama3-8b",), tps=(8, 4), rows=(1024,))
    with pretend(H100):
        cases = [(i, case) for i, case in enumerate(select_cases(selection))]
    for _, case in cases:
        for own in case.own.values():
            object.__setattr__(own, "configs", list(own.configs)[:1])  # one of each is enough here
    paths = sorted({path for _, case in cases for path in case.own})
    jobs = tuner.distinct_jobs(cases, H100)
    compiled = tuner.precompile(selection, cases, H100, processes=2)
    hits = []
    triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    triton.runtime.driver.set_active(Driver())
    for index, path, config in jobs:
        for launch in tuner._recorded(dict(cases)[index], path, config, H100):
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    print(json.dumps({"paths": paths, "cases": len(cases), "jobs": len(jobs), "compiled": compiled, "hits": hits}))
"""


@pytest.mark.slow
def test_launches_find_what_was_compiled_ahead(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(tmp_path / "script.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert "gluon" in found["paths"], "the Hopper kernels are compiled ahead, too"
    assert found["hits"] and all(found["hits"])
    assert found["compiled"] >= found["jobs"]
    # Two tensor-parallel sizes share their kernels: forward and backward on two paths, gates forward and backward.
    assert (found["cases"], found["jobs"]) == (8, 6)
