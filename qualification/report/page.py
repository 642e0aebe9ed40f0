"""A report as one HTML page that needs nothing else: what a release manager reads, prints and signs.

No script and nothing from elsewhere: the page's own policy forbids both. Every text is escaped where it is put in, and
what cannot be seen, or turns text around, is shown as what it is.
"""

from __future__ import annotations

import base64
import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qualification.report import charts
from qualification.report.charts import Timeline
from qualification.sampling import MEMORY

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = Path(__file__).with_name("page.html.jinja")
#: Longer texts in a table are cut: whole, they are in the evidence or in the record.
BRIEF_CHARACTERS = 400
#: More of one text, or of the lines of one piece of evidence, is in the record alone.
TEXT_CHARACTERS = 20_000
_UNKNOWN = "not known"
#: Format characters: they turn text around, or are not seen at all.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_ALLOWED = "\n\t\u200c\u200d\ufe0f"


class NoTemplates(Exception):
    """What makes the page is not installed. The message says how to install it."""


@dataclass(frozen=True)
class Sign:
    """How a verdict is shown: by its colour alone it never is."""

    symbol: str
    word: str
    css: str


SIGNS = {
    "pass": Sign("✓", "pass", "pass"),
    "fail": Sign("✗", "FAIL", "fail"),
    "not_run": Sign("–", "not run", "grey"),
    "cannot": Sign("∅", "cannot", "grey"),
    "passed": Sign("✓", "passed", "pass"),
    "failed": Sign("✗", "FAILED", "fail"),
}


def page(report: Mapping[str, Any], timelines: Sequence[Timeline]) -> str:
    """Give the page of a report. Raises NoTemplates where jinja2 is missing."""
    environment = _environment()
    cells = [_cell(cell, timelines) for cell in report["cells"]]
    known = {cell["id"] for cell in report["cells"]}
    return environment.get_template(TEMPLATE.name).render(
        report=report,
        cells=cells,
        reasons=[_linked(reason, report["cells"]) for reason in report["reasons"]],
        subjects=_subjects(report["cells"]),
        strays=[_picture(timeline) for timeline in timelines if timeline.cell not in known],
        signs=SIGNS,
        known=known,
    )


def _environment() -> Environment:
    try:
        import jinja2
    except ImportError as error:
        raise NoTemplates("jinja2 is not installed: pip install jinja2") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "anchor": _anchor,
        "brief": _brief,
        "bytes": _bytes,
        "duration": _duration,
        "number": _number,
        "series": lambda name: MEMORY.get(name, name),
        "sign": _sign,
        "words": _words,
    }
    return environment


# What the template asks.


def _cell(cell: Mapping[str, Any], timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Give a cell with its criteria by group and test, its evidence and its pictures."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for criterion in cell["criteria"]:
        groups.setdefault(criterion["group"], {}).setdefault(criterion["test"], []).append(criterion)
    kept = {failure["criterion_id"]: failure for failure in cell["failures"]}
    evidence = [
        {"criterion": criterion, "failure": kept.get(criterion["id"])}
        for criterion in cell["criteria"]
        if criterion["verdict"] == "fail"
    ]
    verdicts = [criterion["verdict"] for criterion in cell["criteria"]]
    cannot = sum(
        verdict == "not_run" and each["capability"] is not None
        for verdict, each in zip(verdicts, cell["criteria"], strict=True)
    )
    swept: dict[str, list[Mapping[str, Any]]] = {}
    unswept: dict[str, list[str]] = {}
    for each in cell["sweeps"]:
        if "scenario" in each:
            swept.setdefault(str(each.get("test")), []).append(each)
        else:
            unswept.setdefault(str(each.get("not_run")), []).append(str(each.get("sweep")))
    return {
        **cell,
        "label": _label(cell),
        "by_group": groups,
        "evidence": evidence,
        "tally": {verdict: verdicts.count(verdict) for verdict in ("pass", "fail", "not_run")} | {"cannot": cannot},
        "pictures": [_picture(timeline) for timeline in timelines if timeline.cell == cell["id"]],
        "swept": swept,
        "unswept": unswept,
    }


def _picture(timeline: Timeline) -> dict[str, Any]:
    image = charts.draw(timeline)
    drawn, why_none = (image, "") if isinstance(image, bytes) else (b"", image)
    return {
        "timeline": timeline,
        "source": f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode('ascii')}" if drawn else "",
        "why_none": why_none,
        "words": charts.describe(timeline),
        "numbers": charts.summarize(timeline),
        "events": charts.events_text(timeline) if timeline.events else "",
    }


def _label(cell: Mapping[str, Any]) -> str:
    where = f" on {cell['machine']}" if cell["machine"] else ""
    return f"{cell['backend']} in {cell['environment']}{where}"


def _linked(reason: str, cells: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, str]:
    """Give a reason as what is before a cell's name, the name, what is after, and the id of the cell; "" if none."""
    names = [(name, cell["id"]) for cell in cells for name in (_label(cell), cell["id"])]
    for name, cell_id in sorted(names, key=lambda each: -len(each[0])):
        if found := re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", reason):
            return reason[: found.start()], name, reason[found.end() :], cell_id
    return reason, "", "", ""


def _subjects(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None, str | None]]:
    """Give what was qualified as (name, version, SHA-256): a release has one."""
    # A cell that was not run has none.
    there = [cell["about"] for cell in cells if cell["about"] is not None and cell["about"]["subject"]]
    return list(dict.fromkeys((about["subject"], about["subject_version"], about["subject_sha256"]) for about in there))


# How things are written.


def _shown(value: object) -> object:
    """Give what is put into the page: text with what cannot be seen made visible, and None as words."""
    if value is None:
        return _UNKNOWN
    if isinstance(value, str) and not hasattr(value, "__html__"):
        cut = len(value) - TEXT_CHARACTERS
        more = f" … ({cut:,} more characters)" if cut > 0 else ""
        return _visible(value[:TEXT_CHARACTERS]) + more
    return value


def _visible(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible_one(character) for character in text)


@functools.cache
def _visible_one(character: str) -> str:
    if character in _ALLOWED or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def _sign(verdict: str) -> Sign:
    return SIGNS.get(verdict) or Sign("?", verdict, "grey")


def _anchor(text: str) -> str:
    """Give text as what can be an id and a link to it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def _brief(text: str) -> str:
    text = " ".join(text.split())
    cut = len(text) - BRIEF_CHARACTERS
    return f"{text[:BRIEF_CHARACTERS]} … ({cut:,} more characters in the record)" if cut > 0 else text


def _words(name: str) -> str:
    """Give a name of the code's as words: ``test_oom_killer`` is "oom killer"."""
    return name.removeprefix("test_").replace("_", " ")


def _number(value: float | None) -> str:
    """Give a number as a verdict gives it: never rounded so far that it seems to be its limit."""
    if value is None:
        return _UNKNOWN
    if value == int(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.8f}".rstrip("0") if 1e-6 <= abs(value) < 1e-3 else f"{value:,.6g}"


def _bytes(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} B"


def _duration(value: float | None) -> str:
    """Give seconds as h:mm:ss, those of less than a minute with a digit behind the point."""
    if value is None:
        return _UNKNOWN
    return f"{value:.1f} s" if value < 60 else str(timedelta(seconds=round(value)))
