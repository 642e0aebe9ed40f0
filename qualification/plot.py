"""A plot of memory against time, with what happened meanwhile: an SVG or a PNG, by matplotlib.

    python -m qualification.plot results/RECORD.jsonl

draws the series of a record. Without matplotlib nothing fails: what cannot be drawn is said.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qualification import growth, leaks, records
from qualification.files import put
from qualification.live import PRESSURE_LEVELS, known
from qualification.sampling import MEMORY
from qualification.subject import STRATEGIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Iterable[Sequence[float | None]]
Floats = NDArray[np.float64]
Dashes = Literal["solid", "dashed", "dashdot", "dotted"]

SUFFIXES = (".svg", ".png")
EXIT_REFUSED = 2
#: Of events closer to each other than this share of the time, one is drawn: nobody could tell them apart.
EVENT_SPACING = 1 / 400
#: More of a kind are drawn as short lines from the top: they would hide what they are about.
EVENT_LINES_MAX = 60
#: The same where events have lanes: what is in a lane need not be a line.
EVENT_LINES_MAX_IN_LANES = 20
_NO_MATPLOTLIB = "matplotlib is not installed: pip install matplotlib"
_NO_POINTS = "there is nothing to plot: no series has two points"
#: Okabe and Ito's colours, told apart by everyone; in print their dashes are. A kind is told by its marker.
_BLUE, _SKY, _GREEN, _ORANGE, _RED = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"
_KINDS: tuple[tuple[str, Dashes, Sequence[str]], ...] = (
    (_RED, "solid", ("oom_detected", "device_error", "worker_lost", "storage_failed", "chunk_set_aside")),
    (_BLUE, "dashed", STRATEGIES),
    (_GREEN, "dashdot", ("recovered", "returned_to_device")),
    (_ORANGE, "dotted", ("pressure_warning", "pressure_critical", "pressure_emergency", "pressure_normal")),
    ("black", "dotted", ("unknown",)),
)
_MARKERS = "osv^D*"
#: By kind its colour, dashes and marker, in the order of the legend.
EVENT_STYLES = {
    kind: (colour, dashes, marker)
    for colour, dashes, kinds in _KINDS
    for kind, marker in zip(kinds, _MARKERS, strict=False)
}
_TIMES = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
#: Around charts with lanes, in inches: for the names of the lanes, a title, between two axes, for times and the legend.
_LEFT, _TOP, _BETWEEN, _BOTTOM = 1.35, 0.25, 0.28, 0.65
#: Five hours are shown in hours, five minutes in minutes.
_TIME_UNITS_LEAST = 5
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "legend.fontsize": 7,
    # The same numbers give the same file, but for the names of some clip paths.
    "svg.hashsalt": "plimsoll",
}


@dataclass(frozen=True)
class Chart:
    """Series that share a time, with what belongs to them: see ``write``.

    With ``lanes`` events are below the series, a lane for each kind, and those that are few are lines as well.
    """

    title: str
    series: Mapping[str, Points]
    events: Sequence[tuple[float, str]] = ()
    verdicts: Mapping[str, str] = field(default_factory=dict)
    judged_from_s: Mapping[str, float] = field(default_factory=dict)
    device_limit_bytes: float | None = None
    lanes: bool = False


def write(
    path: Path,
    series: Mapping[str, Points],
    events: Sequence[tuple[float, str]] = (),
    *,
    title: str,
    verdicts: Mapping[str, str] | None = None,
    judged_from_s: Mapping[str, float] | None = None,
    device_limit_bytes: float | None = None,
) -> str | None:
    """Draw each of ``series``, (t_s, value) pairs by name, below each other into ``path`` (mode 0600), .svg or .png.

    A series whose name ends in ``_bytes`` is shown in MB. ``events`` are (t_s, kind), of unknown kinds "unknown". By
    the name of a series, ``verdicts`` has text for its title, such as its slope with bounds, and ``judged_from_s`` when
    its warm-up ends. The series ``device_used_bytes`` is shown with the levels of pressure of ``device_limit_bytes``.

    Give None, or why there is no plot: then nothing is left behind, and a file that was there is as it was.
    """
    return draw(path, [Chart(title, series, events, verdicts or {}, judged_from_s or {}, device_limit_bytes)])


def draw(path: Path, charts: Sequence[Chart]) -> str | None:
    """Draw charts below each other, as ``write`` does one."""
    if path.suffix not in SUFFIXES:
        return f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}"
    image = render(charts, path.suffix)
    if isinstance(image, str):
        return image if image in (_NO_MATPLOTLIB, _NO_POINTS) else f"{path}: {image}"
    try:
        put(path, image, private=True)
    except OSError as error:
        return f"{path}: the plot cannot be written: {error.strerror or error}"
    return None


def render(charts: Sequence[Chart], suffix: str = ".svg", *, embedded: bool = False) -> bytes | str:
    """Draw charts below each other; give the image, or as text why there is none.

    One that is ``embedded`` is to be small: an SVG that leaves its letters to whoever shows it.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return _NO_MATPLOTLIB
    try:
        with mpl.rc_context():
            # Whatever the machine's own matplotlibrc says.
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE | ({"svg.fonttype": "none"} if embedded else {}))
            figure = _figure(charts)
            if figure is None:
                return _NO_POINTS
            image = io.BytesIO()
            nothing = {"Date": None, "Creator": None} if suffix == ".svg" else {"Software": None}
            figure.savefig(image, format=suffix[1:], dpi=150, metadata=nothing)
    except Exception as error:
        # Whatever it is, it is to cost the picture, and not what was judged.
        return f"the plot cannot be drawn: {type(error).__name__}: {str(error)[:300]}"
    return image.getvalue()


def run_times(events: Iterable[Any], zero_s: float) -> list[tuple[float, str]]:
    """Give a subject's events as (t_s, kind): their seconds since the epoch, less ``zero_s``, the run's beginning."""
    found = []
    for event in events:
        try:
            t_s = float(event.time_s) - zero_s
        except (AttributeError, TypeError, ValueError):
            continue
        if math.isfinite(t_s):
            found.append((t_s, known(event.kind)))
    return found


def slope_text(verdict: leaks.LeakVerdict) -> str:
    """Say what a verdict on leaks is, and its slope with bounds."""
    return f"{verdict.verdict.replace('_', ' ')}, {leaks.interval_text(verdict.interval)} MB/{verdict.unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the series of a record; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qualification.plot",
        description="Plot the series of each criterion of a record that has some.",
        epilog="exit status: 0 it is plotted; 2 it is not, and why",
        allow_abbrev=False,
    )
    parser.add_argument("record", metavar="RECORD.jsonl", type=Path, help="what a run wrote")
    parser.add_argument("--out", metavar="FILE", type=Path, help=".svg or .png (default: the record's name with .svg)")
    options = parser.parse_args(argv)
    out = options.out or options.record.with_suffix(".svg")
    try:
        if out.resolve() == options.record.resolve():
            parser.error(f"--out {out}: that is the record itself")
        said = draw(out, _charts(records.read(options.record, partial=True)))
    except records.RecordError as error:
        said = str(error)
    if said is not None:
        parser.error(said)
    print(f"plot: {out}")
    return 0


def _charts(record: records.Record) -> list[Chart]:
    """Give a chart for each criterion with series. Raises RecordError where there is none."""
    found = [each for each in record.criteria if each.get("series")]
    if not found:
        raise records.RecordError(f"there is nothing to plot: none of {len(record.criteria)} criteria has a series")
    return [_chart(each, "" if record.complete else ", cut short") for each in found]


def _chart(criterion: Mapping[str, Any], note: str) -> Chart:
    value, limit = (
        "not measured" if criterion.get(name) is None else f"{criterion[name]:g}" for name in ("value", "limit")
    )
    said = f"{criterion.get('verdict')}: {value} {criterion.get('unit')}, limit {limit}"
    title = f"{criterion.get('test')}, {criterion.get('criterion')} {said}{note}"
    verdicts = _verdicts(criterion["series"])
    return Chart(
        title,
        criterion["series"],
        verdicts={name: f"{slope_text(each)}, by these points" for name, each in verdicts.items()},
        judged_from_s={name: each.judged_from for name, each in verdicts.items()},
    )


def _verdicts(series: Mapping[str, Points]) -> dict[str, leaks.LeakVerdict]:
    """Judge each series of memory that can be: a record keeps the verdict, and neither its bounds nor its warm-up."""
    points = {name: _points(series[name]) for name in series if name.endswith("_bytes")}
    readings = {name: each[np.isfinite(each).all(axis=1)] for name, each in points.items()}
    try:
        found = growth.judge_series({name: (each[:, 0], each[:, 1]) for name, each in readings.items()})
    except ValueError:
        return {}
    return {name: each for name, each in found.verdicts.items() if math.isfinite(each.judged_from)}


# The drawing.


def _figure(charts: Sequence[Chart]) -> Figure | None:
    """Draw every series that has two points; None where none has."""
    from matplotlib.figure import Figure

    drawn = [(chart, there) for chart in charts if (there := _with_points(chart))]
    heights = [height for chart, there in drawn for height in _heights(chart, there)]
    if not heights:
        return None
    if all(chart.lanes for chart, _ in drawn):
        # What is beside a lane has a size that is known: to measure it takes as long as to draw it.
        height = _TOP + sum(heights) + _BETWEEN * (len(heights) - 1) + _BOTTOM
        edges = {"left": _LEFT / 9, "right": 0.985, "top": 1 - _TOP / height, "bottom": _BOTTOM / height}
        figure = Figure(figsize=(9, height))
        grid = figure.add_gridspec(
            len(heights), 1, height_ratios=heights, hspace=_BETWEEN * len(heights) / sum(heights), **edges
        )
        place: Literal["lower center", "outside lower center"] = "lower center"
    else:
        figure = Figure(figsize=(9, 1.5 + sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        place = "outside lower center"
    legend: dict[str, Any] = {}
    row = 0
    for chart, there in drawn:
        begin_s = min(0.0, *(float(points[0, 0]) for points in there.values()))
        end_s = max(float(points[-1, 0]) for points in there.values())
        unit, unit_s = next(each for each in _TIMES if end_s - begin_s >= each[1] * _TIME_UNITS_LEAST or each[0] == "s")
        margin = (end_s - begin_s or 1.0) / unit_s * 0.02
        first: Axes | None = None
        last = row + len(_heights(chart, there)) - 1
        for name, points in there.items():
            axes = figure.add_subplot(grid[row], sharex=first)
            axes.set_xlim(begin_s / unit_s - margin, end_s / unit_s + margin)
            _draw_series(axes, chart, name, points, unit_s)
            if first is None:
                first = axes
                title = "\n".join(each for each in (_plain(chart.title), axes.get_title("left")) if each)
                axes.set_title(title, parse_math=False)
            axes.tick_params(labelbottom=row == last)
            for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(label, artist)
            row += 1
        if row == last:
            axes = figure.add_subplot(grid[row], sharex=first)
            _draw_lanes(axes, _events(chart, unit_s))
            row += 1
        axes.set_xlabel(f"time [{unit}]")
    figure.legend(legend.values(), legend.keys(), loc=place, ncols=4, frameon=False)
    return figure


def _heights(chart: Chart, there: Mapping[str, Floats]) -> list[float]:
    """Give the height of each row of a chart, in inches."""
    if not chart.lanes:
        return [1.9] * len(there)
    kinds = {known(kind) for _, kind in chart.events}
    return [0.95] * len(there) + ([0.05 + 0.15 * len(kinds)] if kinds else [])


def _events(chart: Chart, unit_s: float) -> list[tuple[float, str]]:
    return [(t_s / unit_s, known(kind)) for t_s, kind in chart.events]


def _with_points(chart: Chart) -> dict[str, Floats]:
    """Give the series of a chart that have two points."""
    found = {name: _points(points) for name, points in chart.series.items()}
    return {name: points for name, points in found.items() if len(points) > 1}


def _points(points: Points) -> Floats:
    """Give (t_s, value) pairs as an array [n, 2]; a value that is no number leaves a gap."""
    pairs = np.array([(t_s, value) for t_s, value in points], dtype=np.float64).reshape(-1, 2)
    return pairs[np.isfinite(pairs[:, 0])]


def _draw_series(axes: Axes, chart: Chart, name: str, points: Floats, unit_s: float) -> None:
    scale, unit = (1e-6, "MB") if name.endswith("_bytes") else (1.0, name)
    times, values = points[:, 0] / unit_s, points[:, 1] * scale
    marker = "." if len(points) <= 60 else None
    axes.plot(times, values, color="black", linewidth=1, marker=marker, markersize=3, zorder=3)
    axes.set_ylabel(unit)
    axes.ticklabel_format(useOffset=False, style="plain")
    if name in chart.judged_from_s:
        begin = chart.judged_from_s[name] / unit_s
        axes.axvspan(float(times[0]), begin, color="0.85", linewidth=0, label="warm-up, not judged")
        axes.axvspan(begin, float(times[-1]), color=_SKY, alpha=0.15, linewidth=0, label="judged")
    if name == "device_used_bytes" and chart.device_limit_bytes:
        _draw_levels(axes, chart.device_limit_bytes * scale)
    if chart.lanes:
        _draw_lines(axes, _events(chart, unit_s))
    else:
        _draw_events(axes, _events(chart, unit_s))
    said = [MEMORY.get(name, name), chart.verdicts.get(name, "")]
    axes.set_title(": ".join(_plain(each) for each in said if each), parse_math=False)


def _draw_levels(axes: Axes, limit: float) -> None:
    """Draw the levels of pressure, the axis from nothing to the limit."""
    axes.set_ylim(0, max(limit, axes.get_ylim()[1]) * 1.02)
    for dash, (name, share) in zip((9, 5, 2), PRESSURE_LEVELS, strict=True):
        label = f"{name} at {share:.0%} of the device"
        axes.axhline(share * limit, color=_RED, linewidth=0.8, linestyle=(0, (dash, 2)), label=label)


def _draw_events(axes: Axes, events: Sequence[tuple[float, str]]) -> None:
    """Draw a line for each event with its kind's marker on top, and say in the legend how many there were."""
    above = axes.get_xaxis_transform()
    for kind, (times, drawn) in _by_kind(axes, events).items():
        colour, dashes, marker = EVENT_STYLES[kind]
        bottom = 0 if len(drawn) <= EVENT_LINES_MAX else 0.92
        axes.vlines(drawn, bottom, 1, colors=colour, linewidth=0.7, linestyles=dashes, transform=above)
        axes.plot(
            drawn,
            [1] * len(drawn),
            color=colour,
            linestyle="none",
            marker=marker,
            markersize=4,
            clip_on=False,
            transform=above,
            label=f"{kind} ({len(times)})",
        )


def _draw_lines(axes: Axes, events: Sequence[tuple[float, str]]) -> None:
    """Draw a line for each event of a kind of which there are few: lanes say what it is."""
    for kind, (_, drawn) in _by_kind(axes, events).items():
        if len(drawn) <= EVENT_LINES_MAX_IN_LANES:
            _draw_strokes(axes, drawn, 0.0, 1.0, kind, 0.5, axes.get_xaxis_transform())


def _draw_lanes(axes: Axes, events: Sequence[tuple[float, str]]) -> None:
    """Draw a lane for each kind, with a stroke for each event, and how many there were."""
    kinds = _by_kind(axes, events)
    for lane, (kind, (_, drawn)) in enumerate(kinds.items()):
        _draw_strokes(axes, drawn, lane - 0.35, lane + 0.35, kind, 0.9, axes.transData)
    axes.set_yticks(range(len(kinds)), [f"{kind} ({len(times)})" for kind, (times, _) in kinds.items()], fontsize=6)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)


def _draw_strokes(
    axes: Axes, times: Sequence[float], bottom: float, top: float, kind: str, width: float, transform: Any
) -> None:
    """Draw an upright stroke at each time: all of them one line with gaps, which an image says in few words."""
    colour, dashes, _ = EVENT_STYLES[kind]
    across = [each for time in times for each in (time, time, math.nan)]
    upward = [bottom, top, math.nan] * len(times)
    style: Dashes = "solid" if transform is axes.transData else dashes
    axes.plot(across, upward, color=colour, linewidth=width, linestyle=style, transform=transform, zorder=1)


def _by_kind(axes: Axes, events: Sequence[tuple[float, str]]) -> dict[str, tuple[list[float], list[float]]]:
    """Give for each kind, in the order of the legend, the times of its events and those of them that are drawn."""
    begin, end = axes.get_xlim()
    spacing = (end - begin) * EVENT_SPACING
    found = {}
    for kind in EVENT_STYLES:
        times = [time for time, each in events if each == kind]
        if times:
            found[kind] = times, sorted({round(time / spacing) * spacing for time in times if begin <= time <= end})
    return found


def _plain(text: str) -> str:
    """Give text that every font has, in one line."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


if __name__ == "__main__":
    sys.exit(main())
