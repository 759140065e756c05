"""docs/api.md names what is public, all of it and nothing else; and docstrings name arguments. Tier: no device."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import tp_kernels
from tp_kernels import cli

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
PACKAGES = ("layers", "ops", "comm", "checkpoint", "models", "inference", "integrations", "planning")
ROWS = re.findall(r"^\| `(.+?)` \| (.+) \|$", TEXT, re.M)
# First cells, and what is named anywhere with its package.
NAMED = {name for name, _ in ROWS if " " not in name}
NAMED |= set(re.findall(rf"`((?:{'|'.join((*PACKAGES, 'testing'))})\.[\w.]+)`", TEXT))


def package_of(name):
    return importlib.import_module(f"tp_kernels.{name}")


def public():
    names = set(tp_kernels.__all__)
    return names | {f"{package}.{name}" for package in PACKAGES for name in package_of(package).__all__}


def test_every_public_name_is_there():
    assert public() - NAMED == set()


def test_nothing_there_does_not_exist():
    testing = {name for name in NAMED if name.startswith("testing.")}
    assert NAMED - public() - testing == set() and len(testing) > 4
    for name in testing:
        module, _, attribute = name.rpartition(".")
        assert attribute in package_of(module).__all__, name


def test_every_name_has_one_line_of_its_own():
    names = [name for name, _ in ROWS]
    assert len(names) == len(set(names)) and all(line.strip() for _, line in ROWS)
    # In a list instead: twins, and what a package shares with the front.
    lists = public() - set(names)
    assert all(name.endswith("_reference") or name.rpartition(".")[2] in tp_kernels.__all__ for name in lists)


def test_every_command_is_there():
    commands = next(action.choices for action in cli.build_parser()._actions if action.dest == "command")
    assert {f"tp-kernels {name}" for name in commands} == {name for name, _ in ROWS if name.startswith("tp-kernels")}


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_docstrings(package):
    module = package_of(package) if package else tp_kernels
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value):
            continue  # a constant
        assert value.__doc__ and value.__doc__.strip(), f"{package}.{name} has no docstring"
        if inspect.isfunction(value) and "Args:" in value.__doc__:
            unnamed = [
                word for word in inspect.signature(value).parameters if not re.search(rf"\b{word}\b", value.__doc__)
            ]
            assert not unnamed, f"the docstring of {package}.{name} does not name {sorted(unnamed)}"
