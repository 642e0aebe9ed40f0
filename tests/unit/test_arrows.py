"""Imports go one way: tests to qualification and protection, and both to backends."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import backends

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("backends", "protection", "qualification", "tests", "benchmarks")
ADAPTERS = {declared.module for declared in backends.declared()}
#: What a package may import of ours. Tests and benchmarks may import anything but each other.
ALLOWED = {
    "backends": {"backends"},
    "protection": {"backends", "protection"},
    "qualification": {"backends", "qualification"},
    "tests": {"backends", "protection", "qualification", "tests"},
    "benchmarks": {"backends", "protection", "qualification", "benchmarks"},
}
#: What an adapter, and the private module that a family of them shares, may import of backends. And the loader: a child
#: process, and a fallback on another runtime, are made by name.
ADAPTER_MAY_IMPORT = ("contract", "errors", "faults", "host", "model", "process", "threads")


def name_of(path: Path) -> str:
    """Name a file as a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, module: str, package: str) -> Iterator[str]:
    """Find the modules that a source imports, at its top, inside a function or for types only."""
    for node in ast.walk(ast.parse(source, module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # The name may be a module itself: `from backends import cpu`.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(name: str, module: str) -> bool:
    """Say whether a name is this module, or something in it."""
    return f"{name}.".startswith(f"{module}.")


def files(*packages: str) -> list[Path]:
    """List the Python files of some packages."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Find what one of our files imports of ours."""
    module = name_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = imports(path.read_text(encoding="utf-8"), module, package)
    return {name for name in found if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_along_the_arrows(package: str) -> None:
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in files(package)
        for name in sorted(imported(path))
        if name.split(".")[0] not in ALLOWED[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_an_adapter() -> None:
    # The loader imports by name. Tests of one adapter may import it.
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in files("backends", "protection", "qualification", "benchmarks")
        for name in sorted(imported(path))
        if any(inside(name, adapter) for adapter in ADAPTERS)
    ]
    assert not wrong, "\n".join(wrong)


def test_an_adapter_imports_the_contract_the_faults_and_its_family() -> None:
    allowed = [f"backends.{name}" for name in ADAPTER_MAY_IMPORT]
    families = {path for path in (ROOT / "backends").glob("_*.py") if path.name != "__init__.py"}
    members = sorted(families | {path for path in files("backends") if name_of(path) in ADAPTERS})
    assert members
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in members
        for name in sorted(imported(path))
        if name != "backends" and not name.startswith("backends._")
        if not any(inside(name, module) for module in allowed)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import backends.cpu", {"backends.cpu"}),
        ("from backends import cpu as c", {"backends.cpu"}),
        ("def f():\n    from backends.cpu import Cpu", {"backends.cpu.Cpu"}),
        ("from . import cpu", {"backends.cpu"}),
        ("from .faults.plan import CountingFault", {"backends.faults.plan.CountingFault"}),
    ],
)
def test_every_form_of_import_is_found(source: str, expected: set[str]) -> None:
    assert set(imports(source, "backends.here", "backends")) == expected
