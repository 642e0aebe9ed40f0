"""The plot: whole or not at all, the same for the same numbers, and never the reason that a run fails."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qualification import plot
from qualification.records import RecordWriter
from qualification.subject import EVENT_KINDS

ROOT = Path(__file__).resolve().parents[2]
SERIES = {
    "uss_bytes": [(5.0 + 15 * i, 300e6 + 1e4 * i) for i in range(100)],
    "heap_used_bytes": [(5.0 + 15 * i, 120e6 + 3e5 * i) for i in range(100)],
    "device_used_bytes": [(5.0 + 15 * i, 1e9) for i in range(100)],
}
EVENTS = [(float(t_s), kind) for t_s, kind in enumerate(sorted(EVENT_KINDS), 100)]


@pytest.fixture
def matplotlib() -> None:
    """Need what draws."""
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the plot, is not installed")


def texts(path: Path) -> str:
    """Give the texts of an SVG: each is a comment beside its outline."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8")))


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_the_same_numbers_give_the_same_file_for_its_owner_alone(tmp_path: Path, suffix: str, begins: bytes) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    second.write_text("what was there before")
    series = {"device_used_bytes": SERIES["device_used_bytes"]}
    for path in (first, second):
        assert plot.write(path, series, EVENTS, title="a run", device_limit_bytes=2e9) is None
        assert path.stat().st_mode & 0o777 == 0o600
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(begins)
    assert b"dc:date" not in first.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.usefixtures("matplotlib")
def test_it_shows_series_slopes_events_levels_and_what_is_judged(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    said = plot.write(
        path,
        SERIES,
        [*EVENTS, (200.0, "cache_clear"), (1e12, "cache_clear"), (300.0, "made up\x1b[31m")],
        title="stress 0:25:00",
        verdicts={"heap_used_bytes": "leak, +0.0200 [+0.0199, +0.0201] MB/s"},
        judged_from_s={"heap_used_bytes": 200.0},
        device_limit_bytes=2e9,
    )
    assert said is None
    shown = texts(path)
    for text in (
        "stress 0:25:00",
        "heap in use: leak, +0.0200 [+0.0199, +0.0201] MB/s",
        "warm-up, not judged",
        "judged",
        "EMERGENCY at 95% of the device",
        "CRITICAL at 90% of the device",
        "WARNING at 80% of the device",
        "time [min]",
        "MB",
        "cache_clear (3)",
        "unknown (1)",
        *(f"{kind} (1)" for kind in EVENT_KINDS - {"cache_clear"}),
    ):
        assert text in shown
    assert "made up" not in path.read_text(encoding="utf-8")


def test_every_kind_of_event_is_told_from_every_other() -> None:
    assert set(plot.EVENT_STYLES) == {*EVENT_KINDS, "unknown"}
    assert len(set(plot.EVENT_STYLES.values())) == len(plot.EVENT_STYLES)


@pytest.mark.usefixtures("matplotlib")
def test_ten_thousand_events_make_no_large_file(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    series = {"uss_bytes": SERIES["uss_bytes"]}
    assert plot.write(path, series, [(i / 7, "cache_clear") for i in range(10_000)], title="") is None
    assert "cache_clear (10000)" in texts(path)
    assert path.stat().st_size < 200_000


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize(("count", "lines"), [(3, len(SERIES)), (25, 0)])
def test_in_lanes_every_event_is_a_stroke_and_few_are_lines_as_well(count: int, lines: int) -> None:
    events = [(200.0 + 40 * i, "recovered") for i in range(count)]
    image = plot.render([plot.Chart("", SERIES, events, lanes=True)], embedded=True)
    assert isinstance(image, bytes)
    text = image.decode("utf-8").lower()
    assert f">recovered ({count})</text>" in text
    strokes = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*stroke: #009e73[^"]*)"', text)
    assert sum("dasharray" in style for _, style in strokes) == lines
    assert [path.count("m ") for path, style in strokes if "dasharray" not in style] == [count]


@pytest.mark.usefixtures("matplotlib")
def test_what_is_rendered_is_what_is_written(tmp_path: Path) -> None:
    assert plot.write(tmp_path / "plot.svg", SERIES, EVENTS, title="a run") is None
    rendered = plot.render([plot.Chart("a run", SERIES, EVENTS)])
    assert isinstance(rendered, bytes)
    # matplotlib names some clip paths after where they lie in memory.
    one, other = (re.sub(rb"p[0-9a-f]{10}", b"p", each) for each in (rendered, (tmp_path / "plot.svg").read_bytes()))
    assert one == other


@pytest.mark.usefixtures("matplotlib")
def test_what_could_not_be_read_leaves_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    several: list[dict[str, Any]] = [
        {"uss_bytes": [(0.0, 1e6), (1.0, math.nan), (2.0, None), (3.0, 1e6)]},
        {"card_used_bytes": [(0.0, math.nan), (1.0, math.nan)]},
        {"heap_used_bytes": [(0.0, 1e6), (math.nan, 5e6), (1.0, 1e6)]},
        {"device_used_bytes": [(7.0, 1e6), (7.0, 1e6)]},
        {"first_answer_s": [(0.0, 0.5), (1.0, 0.25)], "empty": []},
    ]
    assert plot.draw(path, [plot.Chart("", series, device_limit_bytes=1) for series in several]) is None
    assert "first_answer_s" in texts(path) and "empty" not in texts(path)


@pytest.mark.usefixtures("matplotlib")
def test_any_text_can_be_a_title(tmp_path: Path) -> None:
    text = "$\\frac{1}$ \x1b[31m\n 測 & <b>"
    assert plot.write(tmp_path / "plot.svg", SERIES, title=text, verdicts=dict.fromkeys(SERIES, text)) is None
    assert "\x1b" not in (tmp_path / "plot.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("series", [{}, {"uss_bytes": []}, {"uss_bytes": [(0.0, 1.0)]}])
@pytest.mark.usefixtures("matplotlib")
def test_without_two_points_there_is_nothing_to_plot(tmp_path: Path, series: dict[str, Any]) -> None:
    assert "no series has two points" in str(plot.write(tmp_path / "plot.svg", series, title=""))
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = plot.write(tmp_path / "plot.svg", SERIES, title="")
    assert said == "matplotlib is not installed: pip install matplotlib"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("matplotlib")
def test_numbers_that_are_none_cost_the_picture_alone(tmp_path: Path) -> None:
    series: Any = {"uss_bytes": [("now", "much"), ("then", "more")]}
    assert "the plot cannot be drawn: ValueError" in str(plot.write(tmp_path / "plot.svg", series, title=""))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("matplotlib")
def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    for path, reason in (
        (tmp_path / "missing" / "plot.svg", "No such file or directory"),
        (tmp_path / "file" / "plot.svg", "Not a directory"),
        (tmp_path / "folder.svg", "Is a directory"),
    ):
        assert plot.write(path, SERIES, title="") == f"{path}: the plot cannot be written: {reason}"
    assert {each.name for each in tmp_path.iterdir()} == {"file", "folder.svg"}
    assert "expected a name that ends in .svg or .png" in str(plot.write(tmp_path / "plot.gif", SERIES, title=""))


@pytest.mark.usefixtures("matplotlib")
def test_a_disk_that_takes_no_more_leaves_what_was_there(tmp_path: Path) -> None:
    """The real thing, by a limit on the size of a file, which a full disk answers to in the same way."""
    program = (
        "import resource, sys; from pathlib import Path; from qualification import plot\n"
        "path, series = Path(sys.argv[1]), {'uss_bytes': [(0.0, 1e6), (1.0, 2e6)]}\n"
        "assert plot.write(path, series, title='') is None\n"
        "before = path.read_bytes()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "said = plot.write(path, series, title='another')\n"
        "assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]\n"
        "print(said, 'matplotlib.pyplot' in sys.modules)\n"
    )
    path = tmp_path / "plot.svg"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == f"{path}: the plot cannot be written: File too large False\n", done.stderr


@pytest.mark.usefixtures("matplotlib")
def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot.write(tmp_path / "plot.svg", SERIES, title="")
    assert not list(tmp_path.iterdir())


def test_nothing_is_imported_before_it_is_drawn() -> None:
    program = "import sys; from qualification import plot, stress; print({'matplotlib', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_events_are_told_in_the_time_of_the_run() -> None:
    events = [
        SimpleNamespace(kind="oom_detected", time_s=1_000_007.5),
        SimpleNamespace(kind="made up", time_s=1_000_008),
        SimpleNamespace(kind="recovered", time_s=math.nan),
        SimpleNamespace(kind="recovered", time_s="soon"),
        SimpleNamespace(kind="recovered"),
    ]
    assert plot.run_times(events, 1_000_000) == [(7.5, "oom_detected"), (8.0, "unknown")]


# From a record.


def record(path: Path, *several: dict[str, Any]) -> Path:
    writer = RecordWriter(path, {"subject": "made:up"})
    for number, series in enumerate(several):
        writer.criterion(
            backend="cpu",
            environment="cpu",
            test=f"test_{number}",
            criterion="leak_detected",
            verdict="pass",
            value=0,
            limit=0,
            unit="leaks",
            series=series,
        )
    writer.close()
    return path


@pytest.mark.usefixtures("matplotlib")
def test_a_record_is_drawn_with_a_chart_for_each_criterion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record(tmp_path / "run.jsonl", SERIES, {}, {"card_used_bytes": [(0.0, math.nan), (1.0, 5e9), (2.0, 5e9)]})
    assert plot.main([str(path)]) == 0
    assert capsys.readouterr().out == f"plot: {tmp_path / 'run.svg'}\n"
    shown = texts(tmp_path / "run.svg")
    assert "test_0, leak_detected pass: 0 leaks, limit 0" in shown and "test_2, leak_detected" in shown
    assert "test_1" not in shown
    assert re.search(r"heap in use: leak, \+0\.0200 \[.*\] MB/s, by these points", shown)


@pytest.mark.usefixtures("matplotlib")
def test_a_record_that_was_cut_short_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    path = record(tmp_path / "run.jsonl", SERIES)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert plot.main([str(path), "--out", str(tmp_path / "else.png")]) == 0
    assert (tmp_path / "else.png").exists()


def test_what_is_no_record_with_series_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = record(tmp_path / "good.jsonl", SERIES)
    text = good.read_text(encoding="utf-8")
    (tmp_path / "damaged.jsonl").write_text(text.replace("300000000", "300000001"), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(json.dumps({"kind": "run"}) + "\n", encoding="utf-8")
    record(tmp_path / "bare.jsonl", {}, {})
    before = sorted(tmp_path.iterdir())
    for arguments, reason in (
        (["bare.jsonl"], "none of 2 criteria has a series"),
        (["damaged.jsonl"], "damaged.jsonl: line 2: altered"),
        (["other.jsonl"], "other.jsonl: line 1: altered"),
        (["missing.jsonl"], "missing.jsonl: the record cannot be read: No such file"),
        (["good.jsonl", "--out", "good.jsonl"], "that is the record itself"),
        (["good.jsonl", "--out", "plot.gif"], "expected a name that ends in .svg or .png"),
    ):
        words = [each if each.startswith("--") else str(tmp_path / each) for each in arguments]
        with pytest.raises(SystemExit) as exit_:
            plot.main(words)
        assert exit_.value.code == plot.EXIT_REFUSED
        assert reason in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
