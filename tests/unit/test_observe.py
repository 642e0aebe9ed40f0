"""What is left behind is what stays: not what somebody has open for a moment."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import cast

from qualification.observe import left_behind
from qualification.sampling import take
from qualification.subject import Subject


class AtRest:
    """Does nothing: what is looked at is this process."""

    def process_ids(self) -> list[int]:
        return [os.getpid()]


AT_REST = cast(Subject, AtRest())


def test_what_is_open_for_a_moment_is_not_left_behind() -> None:
    before = take()
    closing = threading.Timer(0.3, os.close, [os.open(os.devnull, os.O_RDONLY)])
    closing.start()
    left = left_behind(AT_REST, before, 60.0)
    closing.join()
    assert left == {"descriptors": 0, "threads": 0, "children": 0}, f"left: {left}"


def test_what_stays_open_is_left_behind() -> None:
    before = take()
    with Path(os.devnull).open("rb"):
        left = left_behind(AT_REST, before, 0.3)
    assert left == {"descriptors": 1, "threads": 0, "children": 0}, f"left: {left}"
