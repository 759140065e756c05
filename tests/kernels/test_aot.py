"""Every GPU kernel compiles to what was intended, without a GPU. Tier: no device.

One child process without the interpreter compiles all cases of ``tp_kernels.ops.kernels`` for sm_80 and sm_90.
"""

import json
import os
import subprocess
import sys

import pytest

from tp_kernels.testing.aot import cases_of, kernel_modules

CASES = [
    (module, case.name, capability)
    for module in kernel_modules()
    for case in cases_of(module)
    for capability in case.capabilities
]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot") / "reports.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tp_kernels.testing.aot", "--json", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert out.exists(), run.stdout + run.stderr
    return {(r["module"], r["case"], r["capability"]): r for r in json.loads(out.read_text())}


def test_names_are_unique():
    assert len(set(CASES)) == len(CASES)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("module", "case", "capability"), CASES)
def test_compiles_as_intended(compiled, module, case, capability):
    result = compiled[module, case, capability]
    assert result["reports"] or result["problems"]
    assert not result["problems"], "\n".join(result["problems"])
