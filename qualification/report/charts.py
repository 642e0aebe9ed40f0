"""The pictures of a report: memory against time, as SVG that is small enough to be embedded, and the same in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qualification import plot
from qualification.sampling import MEMORY

#: What matplotlib asks for is a list of twelve families; a page has one that is always there.
_FAMILIES = re.compile(r"font-family: 'DejaVu Sans'[^;\"]*")
_ATTRIBUTE = re.compile(r'="[^"]*"')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_DECIMALS = re.compile(r"(\d+\.\d)\d+")
_UPRIGHT = re.compile(r"M (\S+) (\S+) \nL \1 (\S+) \n")


@dataclass(frozen=True)
class Timeline:
    """What one criterion of one cell kept of memory over time, (t_s, value) pairs by name, and what happened then.

    ``cell`` is the cell's id in the report. ``events`` are (t_s, kind); where a record kept only some of them,
    ``events_told`` says how many there were.
    """

    cell: str
    test: str
    criterion: str
    series: Mapping[str, Sequence[tuple[float, float | None]]]
    events: Sequence[tuple[float, str]] = ()
    device_limit_bytes: float | None = None
    verdict: str = ""
    events_told: int = 0


@dataclass(frozen=True)
class Summary:
    """A series in numbers, of what could be read. Bytes are given as MB."""

    name: str
    unit: str
    points: int
    first: float
    last: float
    least: float
    peak: float


def draw(timeline: Timeline) -> bytes | str:
    """Draw a timeline; give the SVG, or as text why there is no picture."""
    series: Mapping[str, plot.Points] = timeline.series
    limit = timeline.device_limit_bytes
    chart = plot.Chart("", series, timeline.events, device_limit_bytes=limit, lanes=True)
    image = plot.render([chart], embedded=True)
    return image if isinstance(image, str) else _small(image)


def summarize(timeline: Timeline) -> list[Summary]:
    """Give each series in numbers; one of which nothing could be read is left out."""
    found = []
    for name, points in timeline.series.items():
        values = [value for t_s, value in points if value is not None and math.isfinite(t_s) and math.isfinite(value)]
        if values:
            scale, unit = (1e-6, "MB") if name.endswith("_bytes") else (1.0, "")
            numbers = (values[0], values[-1], min(values), max(values))
            found.append(Summary(MEMORY.get(name, name), unit, len(values), *(scale * each for each in numbers)))
    return found


def describe(timeline: Timeline) -> str:
    """Say in words and numbers what the picture shows, for who cannot see it."""
    said = [
        f"{each.name}: first {each.first:.1f}, last {each.last:.1f}, peak {each.peak:.1f} {each.unit}".strip()
        for each in summarize(timeline)
    ]
    if timeline.events:
        said.append(events_text(timeline))
    if timeline.device_limit_bytes and "device_used_bytes" in timeline.series:
        said.append(f"levels of pressure of a device of {timeline.device_limit_bytes * 1e-6:.0f} MB")
    return f"Memory over time, {timeline.test}. {'; '.join(said) or 'Nothing could be read'}."


def events_text(timeline: Timeline) -> str:
    """Say how many events there are, and of how many where not all were kept."""
    kept, told = len(timeline.events), max(timeline.events_told, len(timeline.events))
    return f"{kept} events" if kept == told else f"{kept} of {told} events"


def _small(image: bytes) -> bytes:
    """Write an SVG of matplotlib's shorter: a tenth of a point is finer than anyone sees."""
    text = image.decode("utf-8")
    text = text[text.index("<svg") :]
    text = _METADATA.sub("", text)
    text = _FAMILIES.sub("font-family: sans-serif", text)
    text = _ATTRIBUTE.sub(lambda found: _DECIMALS.sub(r"\1", found[0]), text)
    text = _UPRIGHT.sub(r"M\1 \2V\3", text).replace(" \nL ", "L").replace(" \nM ", "M")
    return re.sub(r"\n\s*", "\n", text).encode("utf-8")
