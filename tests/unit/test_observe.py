"""What is left behind is what stays: not what somebody has open for a moment."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import cast

from qualification.attribution import opened_at_rest
from qualification.observe import left_behind
from qualification.subject import Subject


class AtRest:
    """Does nothing: what is looked at is this process."""

    def process_ids(self) -> list[int]:
        return [os.getpid()]


AT_REST = cast(Subject, AtRest())


def test_what_is_open_for_a_moment_is_not_left_behind() -> None:
    before = opened_at_rest(AT_REST.process_ids)
    closing = threading.Timer(0.3, os.close, [os.open(os.devnull, os.O_RDONLY)])
    closing.start()
    left = left_behind(AT_REST, before, 60.0)
    closing.join()
    assert left.counts == {"descriptor": 0, "thread": 0, "process": 0}, f"left: {left}"


def test_what_stays_open_is_left_behind() -> None:
    before = opened_at_rest(AT_REST.process_ids)
    with Path(os.devnull).open("rb"):
        left = left_behind(AT_REST, before, 0.3)
    assert left.counts == {"descriptor": 1, "thread": 0, "process": 0}, f"left: {left}"
    assert left.names == "1 x descriptor of /dev/null", f"left: {left}"
