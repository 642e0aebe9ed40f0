"""What this process has open, so that a test can name what it left behind, or closed though it was not its own."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path


def open_descriptors() -> set[str]:
    """Name each open descriptor by its number and what it leads to (Linux)."""
    gc.collect()
    named = set()
    for path in Path("/proc/self/fd").iterdir():
        # One may be closed meanwhile: the one that lists them is.
        with contextlib.suppress(FileNotFoundError):
            named.add(f"{path.name} -> {path.readlink()}")
    return named


def changes_since(before: set[str]) -> str:
    """Say which descriptors were opened and which were closed since; nothing where none was."""
    after = open_descriptors()
    return "" if after == before else f"descriptors opened: {after - before}; closed: {before - after}"
