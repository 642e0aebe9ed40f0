"""How a report says things."""

from __future__ import annotations

from collections.abc import Sequence


def some(names: Sequence[str], shown: int = 3) -> str:
    """Name a few of them, and say how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def first_of(reasons: Sequence[str]) -> str:
    """Give the first of several reasons, and say how many more there are; nothing where there is none."""
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"{reasons[0]}{more}" if reasons else ""
