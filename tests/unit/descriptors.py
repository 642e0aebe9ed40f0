"""What this process has open, so that a test can name what it left behind."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path


def open_descriptors() -> set[str]:
    """Name each open descriptor by its number and what it leads to (Linux).

    What a test left is ``open_descriptors() - before``. Counts would not do: a template that lingers after an earlier
    test closes its connection in its own time.
    """
    gc.collect()
    named = set()
    for path in Path("/proc/self/fd").iterdir():
        # One may be closed meanwhile: the one that lists them is.
        with contextlib.suppress(FileNotFoundError):
            named.add(f"{path.name} -> {path.readlink()}")
    return named
