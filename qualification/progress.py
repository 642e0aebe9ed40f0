"""Live progress for what takes longer than a few seconds: in place in a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from typing import Self

from qualification.quoting import printable

#: Nothing is shown before this many seconds have passed.
QUIET_S = 3.0
#: In a terminal the line is drawn at most this often.
DRAW_EVERY_S = 0.5

_log = logging.getLogger("plimsoll.progress")


class Progress:
    """Shows elapsed and total time, memory, its slope so far, and free text. Call ``update`` as often as convenient.

    Every ``every_s`` seconds the line also goes to the logger ``plimsoll.progress``.
    """

    def __init__(
        self,
        name: str,
        total_s: float | None,
        write: Callable[[str], object],
        is_terminal: bool,
        every_s: float = 15.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the time. ``total_s`` is None where nobody knows; ``clock`` gives seconds and never goes back."""
        self._name = name
        self._total_s = total_s
        self._write = write
        self._is_terminal = is_terminal
        self._every_s = every_s
        self._clock = clock
        self._began_s = clock()
        self._draw_at_s = self._line_at_s = self._began_s + QUIET_S
        self._drawn_columns = 0

    def update(
        self,
        memory_bytes: float | None = None,
        slope_bytes_per_s: Callable[[], float | None] = lambda: None,
        text: str = "",
    ) -> None:
        """Show where things stand, if it is time to. What is None is left out; the slope is asked for only then."""
        now_s = self._clock()
        draw, line_due = self._is_terminal and now_s >= self._draw_at_s, now_s >= self._line_at_s
        if not (draw or line_due):
            return
        line = self._line(now_s - self._began_s, memory_bytes, slope_bytes_per_s(), text)
        if draw:
            self._draw(line)
            self._draw_at_s = now_s + DRAW_EVERY_S
        if line_due:
            _log.info("%s", line)
            if not self._is_terminal:
                self._write(line + "\n")
            self._line_at_s = now_s + self._every_s

    def done(self) -> None:
        """Clear the line in place, if there is one."""
        if self._drawn_columns:
            self._write("\r" + " " * self._drawn_columns + "\r")
            self._drawn_columns = 0

    def __enter__(self) -> Self:
        """Nothing to do: the time runs already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Clear the line in place."""
        self.done()

    def _line(self, elapsed_s: float, memory_bytes: float | None, slope_bytes_per_s: float | None, text: str) -> str:
        parts = [f"{self._name} {_minutes(elapsed_s)}"]
        if self._total_s is not None:
            parts[0] += f" / {_minutes(self._total_s)}"
            parts.append(f"{_minutes(max(0.0, self._total_s - elapsed_s))} left")
        if memory_bytes is not None:
            parts.append(f"{memory_bytes / 1e6:.1f} MB")
        if slope_bytes_per_s is not None:
            parts.append(f"{slope_bytes_per_s / 1e6:+.3f} MB/s")
        if text:
            parts.append(text)
        # One line, and no control characters: the text may be a subject's.
        return printable(", ".join(parts))

    def _draw(self, line: str) -> None:
        # A line that wraps could not be overwritten.
        line = line[: shutil.get_terminal_size().columns - 1]
        self._write("\r" + line.ljust(self._drawn_columns))
        self._drawn_columns = len(line)


def _minutes(seconds: float) -> str:
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"
