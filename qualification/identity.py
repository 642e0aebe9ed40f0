"""What a result is about: the version of this suite and of the subject, and the machine.

A report compares these: a record of another version proves nothing about this one. Needs nothing but Python, for a
cell that cannot run has a record too.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from qualification import __version__

ROOT = Path(__file__).resolve().parents[1]
#: What judges: a change in one of these makes another suite. What shows results is none of it.
SUITE = ("backends", "qualification/*.py", "qualification/sweep", "tests/*.py", "tests/data", "pytest_memory.ini")
_SOURCES = (".py", ".c", ".onnx", ".wav", ".ini", ".toml")
#: Names the machine in records and reports, where its host name says nothing, as in a container.
MACHINE = "PLIMSOLL_MACHINE"


@cache
def suite() -> dict[str, Any]:
    """Give ``suite_version``, ``suite_commit`` (None where git does not say) and ``suite_sha256``, of its sources."""
    return {
        "suite_version": __version__,
        "suite_commit": commit(ROOT),
        "suite_sha256": digest(ROOT, [path for pattern in SUITE for path in ROOT.glob(pattern)]),
    }


def commit(folder: Path) -> str | None:
    """Say which commit a folder is of, and whether anything was changed in it; None where git does not say."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def subject(factory: Callable[..., Any]) -> dict[str, Any]:
    """Give ``subject_version``, of its package or commit, and ``subject_sha256``, of the sources beside the factory.

    Either is None where nothing says it.
    """
    try:
        file = Path(inspect.getfile(factory)).resolve()
    except (TypeError, OSError):
        return {"subject_version": None, "subject_sha256": None}
    # A package with all that is in it; of a file that stands alone, what stands beside it.
    folder = file.parent
    files = folder.rglob("*.py") if (folder / "__init__.py").is_file() else folder.glob("*.py")
    return {"subject_version": _version(factory.__module__) or commit(folder), "subject_sha256": digest(folder, files)}


def shipped_subject() -> dict[str, Any]:
    """Give the same of the subject that ships, as it is in this checkout, without importing it."""
    folder = ROOT / "protection"
    return {"subject_version": commit(folder), "subject_sha256": digest(folder, folder.rglob("*.py"))}


def digest(folder: Path, paths: Iterable[Path]) -> str:
    """Hash sources by their names below a folder, so that it is the same wherever that is; folders with all in them."""
    found: set[Path] = set()
    for path in paths:
        found |= set(path.rglob("*")) if path.is_dir() else {path}
    total = hashlib.sha256()
    for path in sorted(each for each in found if each.suffix in _SOURCES and each.is_file()):
        content = path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def machine() -> dict[str, Any]:
    """Say what machine this is. ``id`` tells apart two of the same name, and stays the same across restarts."""
    name = os.environ.get(MACHINE) or platform.node() or "unnamed"
    processors = os.cpu_count()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        # It is not to be shown as it is: machine-id(5).
        own = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        own = ""
    # Another kernel leaves some pages more or less.
    parts = ["plimsoll", name, platform.machine(), own or f"{processors} {round(memory_bytes / 1e9)}"]
    return {
        "name": name,
        "id": hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12],
        "system": platform.platform(),
        "processors": processors,
        "memory_bytes": memory_bytes,
        "python": platform.python_version(),
    }


def _version(module: str) -> str | None:
    top = module.partition(".")[0]
    if top not in sys.modules:
        return None
    for distribution in metadata.packages_distributions().get(top, ()):
        return f"{distribution} {metadata.version(distribution)}"
    return None
