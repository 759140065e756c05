"""Packaging and house rules. Tier: no device (one build in a temporary folder, no network)."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tp_kernels import _native, version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tp_kernels"


def test_dtype_tables_agree():
    table = {name: code for name, (code, _) in _native.native.dtype_table().items()}
    assert table == _native.DTYPE_CODES


def test_dtype_sizes_agree_with_torch():
    import torch

    for name, (_, size) in _native.native.dtype_table().items():
        assert getattr(torch, name).itemsize == size
    with pytest.raises(ValueError, match=r"complex64.*float32"):
        _native.dtype_code(torch.complex64)


def test_version_is_the_built_one():
    assert _native.build_info()["version"] == version.__version__


def test_only_the_module_entry_is_exported():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    symbols = subprocess.run([nm, "-D", "--defined-only", _native.native.__file__], capture_output=True, text=True)
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["PyInit__C"]


def test_native_core_links_neither_torch_nor_cuda():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    dynamic = subprocess.run([readelf, "-d", _native.native.__file__], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert needed and not [name for name in needed if re.search("torch|c10|cuda|nccl|python", name)]


def test_cuda_architectures_are_in_the_binary():
    if not _native.has_cuda():
        pytest.skip(f"CUDA sources {_native.build_info()['cuda']}")
    cuobjdump = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed")
    listed = subprocess.run([cuobjdump, "-lelf", _native.native.__file__], capture_output=True, text=True).stdout
    wanted = re.findall(r"\b(\d+)(?:-real)?\b", _native.build_info()["cuda"].split("architectures")[1])
    assert wanted and all(f"sm_{arch}" in listed for arch in wanted)


def test_import_without_a_build_says_what_to_do(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "tp_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run = subprocess.run(
        [sys.executable, "-S", "-c", "import tp_kernels"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "ImportError" in run.stderr and "pip install -e ." in run.stderr
    assert "circular import" not in run.stderr


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory):
    """One for all: half of a first configuration is finding out about the C++ compiler."""
    return tmp_path_factory.mktemp("build")


def _configure(build_folder, **environment):
    import pybind11

    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    options = [f"-D{name}={value}" for name, value in environment.items() if name.startswith("TPK_")]
    env = {**os.environ, **{name: value for name, value in environment.items() if not name.startswith("TPK_")}}
    found = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    return subprocess.run(
        # What an earlier test found out about CUDA is forgotten.
        [cmake, "-S", str(ROOT), "-B", str(build_folder), "-UCMAKE_CUDA*", "-UTPK_*", *found, *options],
        capture_output=True,
        text=True,
        env=env,
    )


def test_cuda_on_without_nvcc_is_an_error_that_says_what_to_install(build_folder, tmp_path):
    run = _configure(build_folder, TPK_CUDA="ON", CUDACXX=str(tmp_path / "no-nvcc"))
    assert run.returncode != 0 and "Install the CUDA toolkit" in run.stderr


def test_cuda_auto_without_nvcc_builds_for_the_cpu_and_says_why(build_folder, tmp_path):
    run = _configure(build_folder, TPK_CUDA="AUTO", CUDACXX=str(tmp_path / "no-nvcc"))
    assert run.returncode == 0, run.stderr
    assert "tp-kernels CUDA: not built: TPK_CUDA=AUTO and no working nvcc was found" in run.stdout


def test_cuda_off_says_so_in_one_line(build_folder):
    run = _configure(build_folder, TPK_CUDA="OFF")
    assert run.returncode == 0, run.stderr
    assert len([line for line in run.stdout.splitlines() if "tp-kernels CUDA: not built: TPK_CUDA=OFF" in line]) == 1


def test_bad_cuda_mode_is_refused(build_folder):
    run = _configure(build_folder, TPK_CUDA="MAYBE")
    assert run.returncode != 0 and "AUTO, ON or OFF" in run.stderr


# models -> layers -> ops + comm -> _native; checkpoint and inference stand beside models; nothing imports the outside.
ALLOWED = {
    "_native": set(),
    "version": set(),
    "comm": {"_native"},
    "ops": {"_native", "comm"},
    "layers": {"ops", "comm"},
    "checkpoint": {"layers", "models", "comm", "ops"},
    "models": {"layers", "ops", "comm"},
    "inference": {"models", "checkpoint", "layers", "ops", "comm"},
    "integrations": {"inference", "models", "checkpoint", "layers", "ops", "comm"},
    "planning": {"models", "checkpoint"},
    "testing": {"comm", "ops", "_native", "version"},
}
# Leaves that may be imported from everywhere: which slice a rank owns; how ranks share a GPU; lazy packages.
LEAVES = {"tp_kernels.checkpoint.sharding", "tp_kernels.one_gpu", "tp_kernels._lazy", "tp_kernels._capture"}

# The one way back: Triton kernels live with their like, and are fetched when the first of them is launched.
EXCEPTIONS = {("comm/symmetric_calls.py", "tp_kernels.ops.kernels")}


def _runtime_nodes(tree):
    """All nodes but those under ``if TYPE_CHECKING``: a name in a signature is no dependency."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _runtime_nodes(node)


def _imports(path):
    for node in _runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "tp_kernels":
            if node.module == "tp_kernels":
                yield from (f"tp_kernels.{alias.name}" for alias in node.names)
            elif node.module == "tp_kernels.checkpoint":
                yield from (f"tp_kernels.checkpoint.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("tp_kernels"))


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_import_direction(part):
    files = sorted((PACKAGE / part).rglob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / f"{part}.py"]
    assert files
    for path in files:
        for name in _imports(path):
            target = name.split(".")[1] if "." in name else "tp_kernels"
            known = target in ALLOWED or (PACKAGE / f"{target}.py").exists()
            if name in LEAVES or target == part or not known:
                continue
            if (str(path.relative_to(PACKAGE)), name) in EXCEPTIONS:
                continue
            assert target in ALLOWED[part] | {"version"}, f"{path.relative_to(ROOT)} imports {name}"


def test_leaves_import_nothing_of_the_package():
    for path in (PACKAGE / "checkpoint" / "sharding.py", PACKAGE / "version.py", PACKAGE / "_lazy.py"):
        assert list(_imports(path)) == []
    assert set(_imports(PACKAGE / "one_gpu.py")) == {"tp_kernels.mps"} and not list(_imports(PACKAGE / "mps.py"))


def test_only_native_imports_the_extension_and_only_library_imports_torch_library():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name != "_native.py":
            assert not re.search(r"(from tp_kernels import _C\b|import tp_kernels\._C)", text), path
        if path.name != "_library.py":
            assert not re.search(r"^\s*(from torch\.library|import torch\.library)|torch\.library\.", text, re.M), path


def test_only_bindings_knows_python():
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cu")]:
        if not path.name.startswith("bindings"):
            assert not re.search(r"#include\s*[<\"](pybind11|Python\.h|torch|ATen|c10)", path.read_text()), path


def test_files_stay_small():
    for folder in ("tp_kernels", "csrc", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu"):
                lines = len(path.read_text().splitlines())
                assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines; the limit is 500"


def test_importing_the_package_has_no_side_effects():
    script = (
        "import os, sys, threading\n"
        "before = dict(os.environ)\n"
        "import tp_kernels\n"
        "assert dict(os.environ) == before, 'environment changed'\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert threading.active_count() == 1\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT / "tests")
    assert run.returncode == 0, run.stderr


def test_every_public_name_resolves():
    import tp_kernels

    assert tp_kernels.__all__
    for name in tp_kernels.__all__:
        assert getattr(tp_kernels, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tp_kernels.no_such_name
