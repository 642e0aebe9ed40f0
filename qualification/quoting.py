"""What a subject said, marked as such: it is shown, and never recorded.

An exception's message, standard error or an output may have words that were dictated in it. Between the marks they
reach the terminal; ``unquoted`` takes them out of whatever is kept.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_OPEN, _CLOSE = "«", "»"
# One that was cut has no end.
_QUOTED = re.compile(f"{_OPEN}[^{_CLOSE}]*(?:{_CLOSE}|$)")
_LEFT_OUT = f"{_OPEN}…{_CLOSE}"


def quoted(said: object) -> str:
    """Mark what a subject said."""
    # What it says cannot end the quotation.
    return f"{_OPEN}{str(said).replace(_CLOSE, '>')}{_CLOSE}"


def error_text(error: BaseException) -> str:
    """Say what failed: the type, and the message as a quotation."""
    return f"{type(error).__name__}: {quoted(str(error)[:300])}"


def unquoted(value: Any) -> Any:
    """Leave out what a subject said, in a text or in every text of plain data."""
    if isinstance(value, str):
        return _QUOTED.sub(_LEFT_OUT, value)
    if isinstance(value, Mapping):
        return {key: unquoted(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [unquoted(each) for each in value]
    return value


def printable(text: str, instead: str = " ") -> str:
    """Give text in one line, with something else in the place of what a terminal would obey."""
    return "".join(c if c.isprintable() else instead for c in text)


def is_ours(file: str, test: Path | None = None) -> bool:
    """Whether a file is of the suite, or the one of this test: no subject's."""
    path = Path(file)
    if path == test:
        return True
    if not path.is_relative_to(_ROOT):
        return False
    # Any other test could be a subject, or have one.
    return path.relative_to(_ROOT).parts[0] in ("qualification", "backends")


def place(error: BaseException, test: Path | None = None) -> str:
    """Name the deepest line of ours that an exception came through, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_ours(frame.filename, test):
            path = Path(frame.filename)
            return f"{path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name}:{frame.lineno}"
    return ""
