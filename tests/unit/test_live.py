"""The live view: a panel in place in a terminal, a line elsewhere, and nothing that a subject could make up."""

from __future__ import annotations

import gc
import io
import re
import sys
import tracemalloc
from typing import NoReturn

import pytest

from qualification import live
from qualification.live import Live, View
from qualification.subject import EVENT_KINDS

FULL = View(
    elapsed_s=725,
    exact_bytes=123_450_000,
    catch_all_bytes=345_600_000,
    slope=lambda: (1_200, -10_000, 12_000),
    device="cpu:arena",
    device_used_bytes=940_000_000,
    device_limit_bytes=1_000_000_000,
    host_fraction=0.43,
    kinds=["pressure_warning", "cache_clear", "pressure_normal", "oom_detected", "cache_clear", "pressure_critical"],
    toggles=24,
    toggles_failed=1,
    planted="1000 MB on the device, 500 MB on the host",
)


class Terminal(io.StringIO):
    """A terminal, or a file: what was written to it, and what one sees."""

    def __init__(self, is_terminal: bool = True) -> None:
        super().__init__()
        self.is_terminal = is_terminal
        self.now_s = 1000.0

    def isatty(self) -> bool:
        return self.is_terminal

    def live(self, total_s: float = 3600) -> Live:
        return Live("stress", total_s, self, clock=lambda: self.now_s)

    @property
    def seen(self) -> list[str]:
        """The lines on a terminal of any size, colours left out."""
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[^\x1b]", self.getvalue()):
            if part == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif part == "\r":
                column = 0
            elif part == "\x1b[2K":
                lines[row] = ""
            elif part == "\x1b[J":
                lines[row:] = [lines[row][:column]]
            elif part[0] == "\x1b" and part[-1] == "A":
                row -= int(part[2:-1])
                assert row >= 0, "drawn over what was there before"
            elif part[0] != "\x1b":
                lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
                column += 1
        return lines


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Give a terminal of 100 columns and 40 lines."""
    pytest.importorskip("rich", reason="rich, which draws the live view, is not installed")
    for name, value in (("COLUMNS", "100"), ("LINES", "40"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    return Terminal()


def test_it_looks_twice_a_second_however_often_it_is_called(terminal: Terminal) -> None:
    looks = 0

    def look() -> View:
        nonlocal looks
        looks += 1
        return FULL

    with terminal.live() as view:
        for _ in range(1000):
            terminal.now_s += 0.01
            view.update(look)
    assert 19 <= looks <= 21


def test_the_panel_says_where_things_stand(terminal: Terminal) -> None:
    terminal.live().update(lambda: FULL)
    seen = "\n".join(terminal.seen)
    for text in (
        "stress 0:12:05 / 1:00:00, 0:47:55 left",
        "123.5 MB exact, 345.6 MB in all",
        "+0.0012 [-0.0100, +0.0120] MB/s",
        "940.0 of 1000.0 MB, on cpu:arena",
        "host 43% NORMAL, device 94% CRITICAL, told CRITICAL",
        "1000 MB on the device, 500 MB on the host",
        "24, 1 failed",
        "cache_clear 2, pressure_warning 1,",
        "pressure_normal, oom_detected, cache_clear, pressure_critical",
    ):
        assert text in seen


def test_it_is_drawn_in_place_and_leaves_nothing(terminal: Terminal) -> None:
    terminal.write("before\n")
    with terminal.live() as view:
        heights = set()
        for kinds in ([], sorted(EVENT_KINDS), []):
            terminal.now_s += 1
            view.update(lambda kinds=kinds: View(kinds=kinds))  # type: ignore[misc]
            assert terminal.seen[0] == "before"
            assert sum("stress" in line for line in terminal.seen) == 1
            heights.add(len(terminal.seen))
        assert len(heights) == 2, "all events at once take more lines"
    assert terminal.seen == ["before", ""]


def test_there_is_a_panel_before_there_is_anything_to_see(terminal: Terminal) -> None:
    with terminal.live():
        assert "not known yet" in "\n".join(terminal.seen)


def test_nothing_that_a_subject_made_up_reaches_the_terminal(terminal: Terminal) -> None:
    made_up = "\x1b]0;title\x07\x9b31m[red]evil[/red]\r\n"
    with terminal.live() as view:
        view.update(lambda: View(kinds=[made_up], device="cpu\x1b[2Jevil\x07", planted="500\tMB\x1b"))
        assert "unknown 1" in "\n".join(terminal.seen)
    written = re.sub(r"\x1b\[[0-9;]*[mAKJ]", "", terminal.getvalue())
    assert not [c for c in written if not (c.isprintable() or c in "\r\n")]
    assert "title" not in written


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:1", "cuda:1"),
        ("cpu", "cpu"),
        ("cpu:evil\x1b", "cpu"),
        ("cuda:2", "another device"),
        ("cpux", "another device"),
    ],
)
def test_a_device_is_the_one_that_is_qualified_or_the_cpu_or_another(device: str, said: str) -> None:
    assert live.where(device, "cuda:1") == said


def test_what_is_too_large_for_the_terminal_is_cut(terminal: Terminal) -> None:
    with terminal.live() as view:
        assert view._panel is not None
        for columns, lines in ((30, 7), (30, 7), (60, 5), (25, 9)):
            view._panel._console.size = (columns, lines)
            terminal.now_s += 1
            view.update(lambda: FULL)
            assert len(terminal.seen) == lines
            assert max(map(len, terminal.seen)) <= columns
    assert terminal.seen == [""]


def test_the_cursor_is_never_hidden_and_an_interruption_clears_the_panel(terminal: Terminal) -> None:
    def interrupted() -> NoReturn:
        raise KeyboardInterrupt

    def run() -> None:
        with terminal.live() as view:
            view.update(lambda: FULL)
            terminal.now_s += 1
            view.update(interrupted)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert terminal.seen == [""]
    assert "\x1b[?" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[0m\x1b[J")


def test_a_terminal_that_is_gone_is_no_failure(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_text: str) -> NoReturn:
        raise OSError(5, "Input/output error")

    with terminal.live() as view:
        monkeypatch.setattr(terminal, "write", gone)
        view.update(lambda: FULL)


def test_it_does_not_grow(terminal: Terminal) -> None:
    """Each view is another; rich alone would keep the width of each text, 1.3 kB a drawing."""
    terminal.write = len  # type: ignore[method-assign]
    with terminal.live() as view:
        tracemalloc.start()
        try:
            for step in range(60):
                terminal.now_s += 1
                view.update(lambda step=step: View(step, step * 1e5, step * 2e5, lambda: (step, -step, step)))  # type: ignore[misc]
                if step == 20:
                    gc.collect()
                    before_bytes = tracemalloc.get_traced_memory()[0]
            gc.collect()
            grown_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
        finally:
            tracemalloc.stop()
    assert grown_bytes < 20_000


@pytest.mark.parametrize("is_terminal", [True, False])
def test_without_rich_there_is_a_line_and_a_terminal_is_told_once(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal(is_terminal)
    with out.live() as view:
        for _ in range(40):
            out.now_s += 0.5
            view.update(lambda: FULL)
        said = "345.6 MB, +0.001 MB/s, device 94%, on cpu:arena, pressure_critical, host 43%"
        assert said in out.getvalue()
    assert out.getvalue().count("rich is not installed") == is_terminal
    assert "\x1b" not in out.getvalue()


def test_where_there_is_no_terminal_there_is_a_line_now_and_then() -> None:
    asked = 0

    def slope() -> None:
        nonlocal asked
        asked += 1

    out = Terminal(is_terminal=False)
    with out.live() as view:
        for _ in range(40):
            out.now_s += 0.5
            view.update(lambda: View(slope=slope))
    assert asked == 2
    lines = out.getvalue().splitlines()
    assert [line[:11] for line in lines] == ["stress 0:03", "stress 0:18"]
    assert all(line.endswith("device -, on -, no event, host -") for line in lines)


def test_a_terminal_that_cannot_move_its_cursor_has_a_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal.live() as view:
        terminal.now_s += 5
        view.update(lambda: FULL)
    assert "stress 0:05 / 1:00:00" in terminal.getvalue() and "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("fraction", "name"),
    [(0.0, "NORMAL"), (0.79, "NORMAL"), (0.8, "WARNING"), (0.9, "CRITICAL"), (0.95, "EMERGENCY"), (1.2, "EMERGENCY")],
)
def test_a_share_has_its_level(fraction: float, name: str) -> None:
    assert live.level(fraction) == name


def test_the_level_told_is_that_of_the_last_event_about_pressure() -> None:
    assert View().told_level == "NORMAL"
    assert View(kinds=["pressure_warning", "pressure_emergency", "recovered"]).told_level == "EMERGENCY"
    assert View(kinds=["pressure_warning", "pressure_normal", "pressure_evil"]).told_level == "NORMAL"
