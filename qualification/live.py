"""The live view of a long run: a small panel in a terminal, by rich; without either, a line as Progress shows it.

It draws in the thread that calls it, at most twice a second: a thread of its own would be counted with the subject's.
The cursor is never hidden, so that a run that is killed leaves the terminal as it should be.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TextIO

from qualification.leaks import Slope, interval_text
from qualification.progress import DRAW_EVERY_S, Progress
from qualification.quoting import printable
from qualification.subject import EVENT_KINDS

#: The share of a memory from which on it is under this pressure, the highest first. Below them all it is NORMAL.
PRESSURE_LEVELS = (("EMERGENCY", 0.95), ("CRITICAL", 0.90), ("WARNING", 0.80))
RECENT_EVENTS = 4
_PRESSURE = "pressure_"
_COLOURS = {"NORMAL": "green", "WARNING": "yellow", "CRITICAL": "red", "EMERGENCY": "bold red"}
_NO_RICH = "rich is not installed, so there is one line in place of the live view: pip install rich\n"


@dataclass(frozen=True)
class View:
    """What there is to see at one time: sizes in bytes, slopes in bytes/s, shares from 0.0; None where not known.

    ``exact_bytes`` is what the exact counter says, ``catch_all_bytes`` what else there may be included. ``slope`` is
    asked only to be shown. ``kinds`` are those of all events so far, in order; ``planted`` says what is held.
    """

    elapsed_s: float = 0.0
    exact_bytes: float | None = None
    catch_all_bytes: float | None = None
    slope: Callable[[], Slope | None] = lambda: None
    device: str = ""
    device_used_bytes: float | None = None
    device_limit_bytes: float | None = None
    host_fraction: float | None = None
    kinds: Sequence[str] = ()
    toggles: int = 0
    toggles_failed: int = 0
    planted: str = ""

    @property
    def device_fraction(self) -> float | None:
        """The used share of what may be used of the device."""
        if self.device_used_bytes is None or not self.device_limit_bytes:
            return None
        return self.device_used_bytes / self.device_limit_bytes

    @property
    def told_level(self) -> str:
        """The level of pressure that the subject told of last: NORMAL before the first."""
        last = next((kind for kind in reversed(self.kinds) if kind in EVENT_KINDS and kind.startswith(_PRESSURE)), "")
        return last.removeprefix(_PRESSURE).upper() or "NORMAL"


class Live:
    """Shows a run of ``total_s`` seconds on ``out``. Call ``update`` as often as convenient; ``done`` clears the panel.

    Only numbers, the device's name, what is planted and known kinds of events are shown, and no control characters.
    """

    def __init__(
        self,
        name: str,
        total_s: float,
        out: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the time; nothing is shown yet. ``clock`` gives seconds and never goes back."""
        self._name, self._total_s, self._clock = name, total_s, clock
        self._out = sys.stdout if out is None else out
        self._draw_at_s = clock()
        is_terminal = self._out.isatty()
        self._progress = Progress(name, total_s, self._write, is_terminal, clock=clock)
        self._panel: _Panel | None = None
        self._has_rich = True
        if is_terminal:
            try:
                self._panel = _Panel.on(self._write, self._out)
            except ImportError:
                self._has_rich = False

    def update(self, look: Callable[[], View]) -> None:
        """Look, and show what there is to see, if it is time to."""
        now_s = self._clock()
        if now_s >= self._draw_at_s:
            self._draw_at_s = now_s + DRAW_EVERY_S
            self._show(look())

    def done(self) -> None:
        """Clear what is drawn in place, if there is anything."""
        # A terminal that is gone is no failure of the run.
        with contextlib.suppress(OSError):
            self._progress.done()
            if self._panel is not None:
                self._panel.clear()

    def __enter__(self) -> Self:
        """Draw an empty panel: rich imports and caches as it draws, and is to do so before any memory is read."""
        if self._panel is not None:
            self._show(View())
        elif not self._has_rich:
            with contextlib.suppress(OSError):
                self._write(_NO_RICH)
        return self

    def __exit__(self, *_: object) -> None:
        """Clear what is drawn in place."""
        self.done()

    def _show(self, view: View) -> None:
        with contextlib.suppress(OSError):
            if self._panel is None:
                self._progress.update(view.catch_all_bytes, lambda: _rate(view), _line(view))
            else:
                left, total = (_clock_face(each) for each in (self._total_s - view.elapsed_s, self._total_s))
                title = f"{self._name} {_clock_face(view.elapsed_s)} / {total}, {left} left"
                self._panel.draw(title, _rows(view))

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class _Panel:
    """A panel in a terminal, each over the one before, in one write.

    Not rich's own live display: that hides the cursor, hooks into every print, and can be broken off half begun.
    """

    def __init__(self, write: Callable[[str], object], out: TextIO) -> None:
        """Draw with ``write``, in the size and the colours of ``out``. Raises ImportError without rich."""
        from rich import cells, panel, table, text
        from rich.console import Console

        self._write = write
        self._rich = panel.Panel, table.Table, text.Text
        # Else it grows by every number that was ever shown, for minutes: the length of each text is kept.
        self._forget: Callable[[], None] = getattr(cells.cached_cell_len, "cache_clear", lambda: None)
        self._console = Console(file=out, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._lines = 0

    @classmethod
    def on(cls, write: Callable[[str], object], out: TextIO) -> _Panel | None:
        """Make one, or None for a terminal that cannot move its cursor. Raises ImportError without rich."""
        panel = cls(write, out)
        return None if panel._console.is_dumb_terminal else panel

    def draw(self, title: str, rows: Sequence[tuple[str, str, str]]) -> None:
        """Draw a title, and rows of a name, a text and its style."""
        panel, table, text = self._rich
        grid = table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column()
        for name, said, style in rows:
            grid.add_row(name, text(printable(said), style=style))
        with self._console.capture() as captured:
            self._console.print(panel(grid, title=text(printable(title)), title_align="left"))
        self._forget()
        # What is higher than the terminal scrolls, and could not be drawn over.
        lines = captured.get().splitlines()[: max(1, self._console.size.height - 1)]
        self._write(self._back() + "".join(f"\x1b[2K{line}\x1b[0m\n" for line in lines) + "\x1b[J")
        self._lines = len(lines)

    def clear(self) -> None:
        """Leave the terminal as it was."""
        if self._lines:
            self._write(f"{self._back()}\x1b[0m\x1b[J")
            self._lines = 0

    def _back(self) -> str:
        return f"\r\x1b[{self._lines}A" if self._lines else ""


def known(kind: str) -> str:
    """Give an event's kind, if it is one: whatever else a subject says does not reach the terminal."""
    return str(kind) if kind in EVENT_KINDS else "unknown"


def where(device: str, own: str) -> str:
    """Say what a subject runs on: the device that is qualified, the CPU, or another; not whatever it says."""
    if device == own:
        return own
    return "cpu" if str(device).partition(":")[0] == "cpu" else "another device"


def level(fraction: float) -> str:
    """Give the name of the level of pressure at this share of memory used."""
    return next((name for name, least in PRESSURE_LEVELS if fraction >= least), "NORMAL")


def _rows(view: View) -> list[tuple[str, str, str]]:
    """Say what there is to see: a name, a text and its style for each row."""
    told = Counter(map(known, view.kinds))
    recent = [known(kind) for kind in view.kinds[-RECENT_EVENTS:]]
    shares = {"host": view.host_fraction, "device": view.device_fraction}
    levels = {name: level(share) for name, share in shares.items() if share is not None}
    at = [f"{name} {shares[name]:.0%} {levels[name]}" for name in levels]
    worst = max((*levels.values(), view.told_level), key=list(_COLOURS).index)
    device = f"{_megabytes(view.device_used_bytes)} of {_megabytes(view.device_limit_bytes)} MB, on {view.device}"
    return [
        ("memory", f"{_megabytes(view.exact_bytes)} MB exact, {_megabytes(view.catch_all_bytes)} MB in all", ""),
        ("slope", f"{interval_text(slope)} MB/s" if (slope := view.slope()) else "not known yet", ""),
        ("device", device if view.device else "-", ""),
        ("pressure", ", ".join([*at, f"told {view.told_level}"]), _COLOURS[worst]),
        ("planted", view.planted or "-", ""),
        ("toggles", f"{view.toggles}, {view.toggles_failed} failed", "red" if view.toggles_failed else ""),
        ("events", ", ".join(f"{kind} {n}" for kind, n in told.most_common()) or "none", ""),
        ("last", ", ".join(recent) or "none", ""),
    ]


def _line(view: View) -> str:
    """Say in a line what Progress does not say itself. What a narrow terminal cuts off is the least."""
    shares = {"device": view.device_fraction, "host": view.host_fraction}
    device, host = (f"{name} {'-' if share is None else f'{share:.0%}'}" for name, share in shares.items())
    last = known(view.kinds[-1]) if view.kinds else "no event"
    return f"{device}, on {view.device or '-'}, {last}, {host}"


def _rate(view: View) -> float | None:
    slope = view.slope()
    return None if slope is None else slope[0]


def _megabytes(size_bytes: float | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / 1e6:.1f}"


def _clock_face(seconds: float) -> str:
    return str(timedelta(seconds=int(max(0.0, seconds))))
