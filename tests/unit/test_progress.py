"""Progress is quiet at first, in place in a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from qualification.progress import Progress


class _Screen:
    """What was written, and the time that a test sets."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.now_s = 1000.0

    def progress(self, total_s: float | None = 60.0, *, is_terminal: bool, name: str = "soak") -> Progress:
        return Progress(name, total_s, self.written.append, is_terminal, clock=lambda: self.now_s)

    def seconds(self, until_s: float, step_s: float = 0.1) -> Iterator[float]:
        began_s = self.now_s
        for step in range(1, round(until_s / step_s) + 1):
            self.now_s = began_s + step * step_s
            yield self.now_s - began_s


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_first_three_seconds_are_quiet(is_terminal: bool) -> None:
    """What ends within 3 s prints nothing at all."""
    screen = _Screen()
    with screen.progress(is_terminal=is_terminal) as progress:
        for _ in screen.seconds(2.9):
            progress.update()
    assert screen.written == [], f"{screen.written} within 2.9 s"


def test_a_terminal_is_drawn_in_place_twice_a_second() -> None:
    """In 10 s of updates every 0.1 s: 14 or 15 drawings, no newline, and done() clears the line."""
    screen = _Screen()
    with screen.progress(is_terminal=True) as progress:
        for _ in screen.seconds(10):
            progress.update()
    *drawn, cleared = screen.written
    assert 14 <= len(drawn) <= 15, f"{len(drawn)} drawings in the 7 s that are not quiet"
    assert all(text.startswith("\r") and "\n" not in text for text in drawn), f"not in place: {drawn}"
    columns = len(drawn[-1].strip())
    assert cleared == "\r" + " " * columns + "\r", f"{columns} columns cleared by {cleared!r}"


def test_a_log_has_a_line_every_15_seconds(caplog: pytest.LogCaptureFixture) -> None:
    """In 40 s: at 3, 18 and 33 s, each to the logger too, and done() writes nothing."""
    screen = _Screen()
    with caplog.at_level(logging.INFO, "plimsoll.progress"), screen.progress(is_terminal=False) as progress:
        for _ in screen.seconds(40, step_s=0.5):
            progress.update()
    assert screen.written == [
        "soak 0:03 / 1:00, 0:57 left\n",
        "soak 0:18 / 1:00, 0:42 left\n",
        "soak 0:33 / 1:00, 0:27 left\n",
    ]
    assert [f"{message}\n" for message in caplog.messages] == screen.written


def test_a_line_says_where_things_stand() -> None:
    """Elapsed, total and left, memory, slope with its sign, and the text; control characters never get through."""
    screen = _Screen()
    progress = screen.progress(7200, is_terminal=False)
    screen.now_s += 3725
    progress.update(123_456_789, lambda: 12_340, "cycle 7\n\x1b[31m of 9")
    assert screen.written == ["soak 1:02:05 / 2:00:00, 57:55 left, 123.5 MB, +0.012 MB/s, cycle 7  [31m of 9\n"]


def test_a_shorter_line_covers_the_longer_one() -> None:
    """Nothing of the line before stays on the screen."""
    screen = _Screen()
    progress = screen.progress(None, is_terminal=True)
    screen.now_s += 5
    progress.update(text="x" * 30)
    screen.now_s += 5
    progress.update()
    first, second = screen.written
    assert second == "\rsoak 0:10".ljust(len(first)), f"{second!r} over {first!r}"


def test_a_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal of 40 columns a long text is cut to 39."""
    monkeypatch.setenv("COLUMNS", "40")
    screen = _Screen()
    progress = screen.progress(is_terminal=True)
    screen.now_s += 5
    progress.update(text="x" * 300)
    assert len(screen.written[0]) == 1 + 39, f"{len(screen.written[0]) - 1} columns in 40"
