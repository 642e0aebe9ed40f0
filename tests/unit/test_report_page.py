"""The page of a report: it shows every cell, escapes every text, needs nothing from elsewhere, and can be read."""

from __future__ import annotations

import base64
import copy
import itertools
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qualification.criteria import CRITERIA, GROUPS, RECOVERY_TIMES, group_of, profile_of
from qualification.report import charts
from qualification.report.charts import Timeline
from qualification.report.page import BRIEF_CHARACTERS, TEMPLATE, NoTemplates, page
from qualification.sampling import MEMORY
from qualification.subject import EVENT_KINDS
from tests.unit.browsing import Seen, browse, check_links

pytestmark = pytest.mark.timeout(300)
SIZE_MAX = 5_000_000
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}\x00\x1b[31m\u202e\ud800 مرحبا"
DECLARED = (
    ("cpu", "cpu"),
    ("torch-cpu", "cpu"),
    ("onnxruntime-cuda", "cuda12"),
    ("torch-cuda", "cuda12"),
    ("onnxruntime-cuda", "cuda13"),
    ("torch-cuda", "cuda13"),
)
FAILS = ("test_rapid_toggle_with_fallback", "memory_excess")


@pytest.fixture
def jinja2() -> None:
    """Need what makes the page."""
    pytest.importorskip("jinja2", reason="jinja2, which makes the page, is not installed")


# What a report is: the data of a gathered one, written by hand.


def report(*cells: dict[str, Any], verdict: str = "fail") -> dict[str, Any]:
    """Give a report with these cells."""
    return {
        "schema_version": 1,
        "made": "2026-11-27T10:00:00+00:00",
        "suite": {"suite_version": "0.1.0", "suite_commit": None, "suite_sha256": "5" * 64},
        "verdict": verdict,
        "reasons": [f"cpu in cpu on north: {'/'.join(FAILS)} failed", "old.jsonl: line 3: altered"]
        if verdict == "fail"
        else [],
        "gate": {
            "source": "gates/release.toml",
            "cells": ["*/cpu"],
            "profiles": ["quick", "soak"],
            "not_run": ["test_oom_killer"],
            "overridden": {"test_sustained_high_memory_usage.growth_rate": 0.5},
        },
        "checklist": [
            {
                "item": "Every OOM is told to the user",
                "verdict": "pass",
                "reason": "1 pass",
                "cells": [{"cell": each["id"], "verdict": "cannot", "reason": "no device"} for each in cells],
            }
        ],
        "groups": list(GROUPS),
        "problems": [{"file": "old.jsonl", "reason": "line 3: altered"}],
        "cells": list(cells),
        "regressions": {
            "against": "the last release",
            "items": [
                {
                    "cell": cells[0]["id"],
                    "what": "slower recovery",
                    "test": "test_worker_hang",
                    "criterion": "first_answer",
                    "before": 2.0,
                    "now": 9.5,
                    "unit": "s",
                    "text": "9.5 s, before 2 s",
                },
            ],
            "not_compared": [cells[-1]["id"]],
        },
    }


def unrun(backend: str, environment: str) -> dict[str, Any]:
    """Give a cell without a record."""
    none = {"verdict": "not_run", "passed": 0, "failed": 0, "not_run": 0, "cannot": 0}
    return {
        "id": f"{environment}-{backend}",
        "backend": backend,
        "environment": environment,
        "machine": None,
        "required": False,
        "verdict": "not_run",
        "reason": f"no record of {backend} in {environment}",
        "reasons": [f"no record of {backend} in {environment}"],
        "groups": {group: dict(none) for group in GROUPS},
        "about": None,
        **{name: [] for name in ("records", "criteria", "tests", "failures", "recovery", "peaks", "sweeps")},
    }


def measured(backend: str, environment: str, fails: Sequence[tuple[str, str]] = (FAILS,)) -> dict[str, Any]:
    """Give a cell with a verdict on every criterion, and evidence on those that fail."""
    cell_id = f"{environment}-{backend}-north"
    rows = []
    for each in CRITERIA:
        unable = group_of(each.test) == "CUDA errors"
        verdict = "not_run" if unable else "fail" if (each.test, each.name) in fails else "pass"
        value = None if unable else each.limit + 25.25 if verdict == "fail" else each.limit
        exact = value is None or each.relation == "=="
        rows.append(
            {
                "id": f"{cell_id}-{each.test}-{each.name}",
                "test": each.test,
                "group": group_of(each.test),
                "profile": profile_of(each.test),
                "criterion": each.name,
                "promise": each.promise,
                "verdict": verdict,
                "value": value,
                "relation": each.relation,
                "limit": each.limit,
                "unit": each.unit,
                "margin": None if exact or value is None else each.limit - value,
                "margin_percent": None if exact or value is None else 100 * (each.limit - value) / each.limit,
                "provenance": None if unable else "capped",
                "points_seen": 200,
                "faults_fired": 200,
                "absorbed": 0,
                "detail": "Fail: Available memory of 0 is smaller than requested bytes of 1536000",
                "reason": "a host processor has no device errors" if unable else "",
                "capability": "device_error" if unable else None,
                "record": f"{cell_id}.jsonl",
                "record_sha256": "0" * 64,
            }
        )
    groups = {}
    for group in GROUPS:
        verdicts = [row["verdict"] for row in rows if row["group"] == group]
        groups[group] = {
            "verdict": "fail" if "fail" in verdicts else "pass" if "pass" in verdicts else "cannot",
            "passed": verdicts.count("pass"),
            "failed": verdicts.count("fail"),
            "not_run": 0,
            "cannot": verdicts.count("not_run"),
        }
    tests = list(dict.fromkeys(each.test for each in CRITERIA))
    return {
        **unrun(backend, environment),
        "id": cell_id,
        "machine": "north",
        "required": True,
        "verdict": "fail" if fails else "pass",
        "reason": f"{len(fails)} failed" if fails else "",
        "reasons": [f"{'/'.join(each)} failed" for each in fails],
        "groups": groups,
        "about": about(backend),
        "records": [
            {
                "file": f"{cell_id}.jsonl",
                "sha256": "9" * 64,
                "began": "2026-11-27T09:00:00+00:00",
                "ended": None,
                "tests": len(tests),
                "collected": len(tests),
                "commit": "225747c",
                "not_run": None,
            }
        ],
        "criteria": rows,
        "tests": [
            {
                "test": test,
                "id": f"tests/test_x.py::{test}",
                "anchor": f"{cell_id}-{test}",
                "outcome": "failed" if test in dict(fails) else "passed",
                "duration_s": 75.8,
                "repeat": f"python -m pytest tests/test_x.py::{test} --backend {backend}",
                "evidence": [],
            }
            for test in tests
        ],
        "failures": [
            {
                "criterion_id": f"{cell_id}-{test}-{name}",
                "test_anchor": f"{cell_id}-{test}",
                "promised": "Memory cleaned between toggles",
                "measured": f"{name} = 41.25 MB, limit <= 16 MB",
                "fault": "capped: 200 points seen, 200 fired, 0 absorbed",
                "repeat": f"python -m pytest {test} --backend {backend}",
                "evidence": [f"line {number} of the evidence" for number in range(40)],
            }
            for test, name in fails
        ],
        "recovery": [
            {
                "test": row["test"],
                "criterion": row["criterion"],
                "value_s": row["value"],
                "limit_s": row["limit"],
                "verdict": row["verdict"],
                "promise": row["promise"],
            }
            for row in rows
            if row["criterion"] in RECOVERY_TIMES
        ],
        "peaks": [{"test": tests[0], "series": name, "bytes": 3e8} for name in MEMORY],
        "sweeps": [
            {
                "test": "test_fault_sweep",
                "scenario": scenario,
                "target": "host",
                "site": "host_allocation",
                "mode": "transient",
                "points_counted": [2635, 2635],
                "points_tried": 2635,
                "faults_fired": 2600,
                "absorbed": 12,
                "runtime_died": 3,
                "host_stopped": 1,
                "failed": 0,
                "complete": True,
                "took_s": 812.5,
                "model": "small",
                "shard": [1, 2],
            }
            for scenario in ("start", "feed", "inference")
        ]
        + [{"test": "test_device_fault_sweep", "sweep": "start/runtime.device", "not_run": "no device of its own"}],
    }


def about(backend: str) -> dict[str, Any]:
    """Give what ran where."""
    card = {
        "uuid": "GPU-1",
        "name": "NVIDIA L4",
        "total_bytes": 24 << 30,
        "driver": "570.1",
        "driver_cuda": "12.8",
        "message": "of other processes it tells nothing",
    }
    return {
        "machine": {
            "name": "north",
            "id": "774f8a2afd35",
            "system": "Linux-6.1-x86_64-with-glibc2.36",
            "processors": 2,
            "memory_bytes": 25_276_510_208,
            "python": "3.11.7",
            "gpus": [{"name": "NVIDIA L4", "total_bytes": 24 << 30}],
            "gpus_unread": "a second card does not answer",
        },
        "device": {"name": f"{backend}:0", "card": card},
        "driver": "570.1",
        "runtime": "onnxruntime 1.32.0",
        "versions": {
            "numpy": {"installed": "2.4.6", "pinned": "2.4.6"},
            "torch": {"installed": "2.13.0+cpu", "pinned": None},
            "psutil": {"installed": "7.2.2", "pinned": "7.2.1"},
        },
        "pins_sha256": None,
        "subject": "protection.pipeline:factory",
        "subject_version": "225747c",
        "subject_sha256": "c" * 64,
        "model_sha256": "0" * 64,
        "audio_sha256": "d" * 64,
        "criteria_overridden": {"test_sustained_high_memory_usage.growth_rate": 0.5},
        "duration_s": 3725.4,
        "began": "2026-11-27T09:00:00+00:00",
        "ended": None,
    }


def timeline(cell: str, **changes: Any) -> Timeline:
    """Give a timeline that is as full as a record's can be."""
    names = ("uss_bytes", "heap_used_bytes", "workers_heap_bytes", "device_used_bytes")
    series = {
        name: [(15.0 * i, 300e6 + 1e6 * math.sin(i * (7 + k)) + 1e4 * i) for i in range(240)]
        for k, name in enumerate(names)
    }
    kinds = sorted(EVENT_KINDS)
    events = [(3.6 * i + 1.7 * math.sin(i), kinds[i * 7 % len(kinds)]) for i in range(1000)]
    whole = Timeline(cell, FAILS[0], "leak_detected", series, events, 4e8, "pass", 4321)
    return replace(whole, **changes)


def full() -> tuple[dict[str, Any], list[Timeline]]:
    """Give a report of the whole matrix, and four timelines for each cell."""
    cells = [measured(*each) for each in DECLARED]
    return report(*cells), [timeline(each["id"], test=f"test_{i}") for each in cells for i in range(4)]


# What is in a page.


@pytest.fixture(scope="module")
def whole_matrix() -> tuple[dict[str, Any], str]:
    """Give a report of the whole matrix, and its page with all its pictures."""
    for library in ("jinja2", "matplotlib"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    whole, timelines = full()
    began = time.monotonic()
    html = page(whole, timelines)
    print(f"{len(html.encode()):,} bytes in {time.monotonic() - began:.1f} s")
    return whole, html


def test_the_whole_matrix_is_under_five_megabytes(whole_matrix: tuple[dict[str, Any], str]) -> None:
    whole, html = whole_matrix
    assert len(html.encode("utf-8")) < SIZE_MAX
    seen = Seen(html)
    check_links(seen, whole)
    assert len(seen.having("data-criterion")) == len(DECLARED) * len(CRITERIA)
    assert len(seen.having("data-group")) == len(DECLARED) * len(GROUPS)
    pictures = [attributes for _, attributes in seen.tags("img")]
    assert len(pictures) == 4 * len(DECLARED)
    for each in pictures:
        kind, data = str(each["src"]).split(",")
        assert kind == "data:image/svg+xml;base64"
        svg = ElementTree.fromstring(base64.b64decode(data, validate=True))
        shown = "".join(svg.itertext())
        assert "device memory, as the runtime counts" in shown and "EMERGENCY at 95% of the device" in shown
        assert "time [min]" in shown and "oom_detected (" in shown
        assert "1000 of 4321 events" in str(each["alt"])
        assert "host memory, all of it: first 300.0, last 30" in str(each["alt"])


@pytest.mark.usefixtures("jinja2")
@pytest.mark.parametrize("drawn", [True, False])
def test_every_text_is_escaped(monkeypatch: pytest.MonkeyPatch, drawn: bool) -> None:
    """Whatever is a text in a report, a key of it or a verdict, is a text on the page."""
    if not drawn:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    plain, empty = measured("cpu", "cpu"), unrun("torch-cpu", "cpu")
    kept = {"pass", "fail", "not_run", "cannot", "passed", "failed"}
    for keep in (set[str](), kept | {plain["id"], f"{plain['id']}-{'-'.join(FAILS)}"}):
        count = 0

        def hostile(value: Any, keep: set[str] = keep) -> Any:
            nonlocal count
            if isinstance(value, str) and value not in keep:
                count += 1
                return f"{HOSTILE} {count}"
            if isinstance(value, list):
                return [hostile(each) for each in value]
            if isinstance(value, dict):
                own = ("versions", "overridden", "criteria_overridden", "groups")
                return {
                    key: {hostile(name): hostile(each) for name, each in value[key].items()}
                    if key in own and isinstance(value[key], dict)
                    else hostile(value[key])
                    for key in value
                }
            return value

        cells = [hostile(copy.deepcopy(plain)), hostile(copy.deepcopy(empty))]
        if keep:
            # So that the columns of the matrix are the groups.
            cells[0]["groups"], cells[0]["criteria"][0]["group"] = {HOSTILE: plain["groups"]["fallback"]}, HOSTILE
        bad = hostile(report(*cells))
        bad["cells"], bad["groups"] = cells, [HOSTILE]
        bad["verdict"] = "fail"
        its = cells[0]["id"]
        points: Any = {HOSTILE: [(0.0, 1.0), (1.0, 2.0)], f"{HOSTILE}_bytes": [(0.0, 1.0), (1.0, 2.0)]}
        lines = [
            timeline(each, test=HOSTILE, criterion=HOSTILE, verdict=HOSTILE, series=points, events=[(0.5, HOSTILE)])
            for each in (its, HOSTILE)
        ]
        html = page(bad, lines)
        html.encode("utf-8")
        assert html.count("&lt;script&gt;alert(1)") > 200
        assert "<script" not in html and "<img src=x" not in html and "\n49" not in html
        assert not set("\x00\x1b\u202e\ud800") & set(html)
        assert r"\x00\x1b[31m\u202e\ud800 مرحبا" in html
        seen = Seen(html)
        assert not seen.tags("script", "iframe", "object", "embed", "base", "form", "link")
        assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
        assert all(value.startswith("data:image/svg+xml;base64,") for value in seen.having("src"))


@pytest.mark.usefixtures("jinja2")
def test_nothing_comes_from_elsewhere() -> None:
    cell = measured("cpu", "cpu")
    cell["criteria"][0]["reason"] = "see https://example.com/why"
    html = page(report(cell), [timeline(cell["id"])])
    seen = Seen(html)
    policy = [each["content"] for _, each in seen.tags("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for name in ("src", "href", "srcset", "action", "poster", "background"):
        assert all(value.startswith(("#", "data:image/svg+xml;base64,")) for value in seen.having(name))
    assert "https://example.com/why" in html
    assert not re.search(r"url\(|@import|@font-face", TEMPLATE.read_text(encoding="utf-8"))


@pytest.mark.usefixtures("jinja2")
def test_a_verdict_comes_first_and_a_failure_with_its_four_lines() -> None:
    whole = report(measured("cpu", "cpu"), unrun("torch-cpu", "cpu"))
    html = page(whole, [])
    seen = Seen(html)
    check_links(seen, whole)
    assert "<title>FAIL: Plimsoll qualification of protection.pipeline:factory, 2026-11-27" in html
    assert html.index('id="verdict"') < html.index("<h1>") < html.index('id="reasons"') < html.index('id="matrix"')
    assert html.index('id="matrix"') < html.index('id="checklist"') < html.index('data-section="cpu-cpu-north"')
    assert '<li><a href="#cpu-cpu-north">cpu in cpu on north</a>: test_rapid_toggle' in html
    assert (
        "<pre>\npromised: Memory cleaned between toggles\nmeasured: memory_excess = 41.25 MB, limit &lt;= 16 MB\n"
        "fault:    capped: 200 points seen, 200 fired, 0 absorbed\n"
        "repeat:   python -m pytest test_rapid_toggle_with_fallback --backend cpu</pre>"
    ) in html
    assert "line 39 of the evidence" in html and "no record of torch-cpu in cpu" in html
    assert "It does not make a pass of it" in html
    for shown in (
        *("NVIDIA L4, 25.8 GB", "driver 570.1, CUDA 12.8", "a second card does not answer", "1 not as pinned"),
        *(
            "≠ 7.2.1",
            "225747c",
            "1:02:05",
            "growth_rate was set to 0.5",
            "growth_rate = 0.5",
            "41.25",
            "-25.25",
            "-158 %",
        ),
        *("2,635", "0:13:32", "share 1 of 2", "no device of its own", "slower recovery", "the last release"),
    ):
        assert shown in html, shown


@pytest.mark.usefixtures("jinja2")
def test_a_pass_says_what_it_does_not_speak_of() -> None:
    whole = report(measured("cpu", "cpu", fails=()), unrun("torch-cpu", "cpu"), verdict="pass")
    whole["problems"], whole["regressions"] = [], None
    html = page(whole, [])
    check_links(Seen(html), whole)
    assert "<title>PASS: " in html and 'data-verdict="pass"><span aria-hidden="true">✓</span> PASS' in html
    assert "It does not speak of the 1 of 2 cells that did not pass" in html
    assert 'id="reasons"' not in html and 'id="problems"' not in html and 'id="regressions"' not in html
    whole["regressions"] = {"against": "the last release", "items": [], "not_compared": ["cpu-cpu-west"]}
    assert "There are none." in page(whole, [])


@pytest.mark.usefixtures("jinja2")
def test_a_failure_without_kept_evidence_has_its_block() -> None:
    cell = measured("cpu", "cpu")
    cell["failures"] = []
    cell["criteria"][-1] |= {"verdict": "fail", "value": None, "limit": None, "reason": "the value is inf"}
    whole = report(cell)
    html = page(whole, [])
    check_links(Seen(html), whole)
    assert "measured: not known points, limit == not known points (the value is inf)" in html
    assert "The record keeps no further evidence of this test." in html


@pytest.mark.usefixtures("jinja2")
def test_long_texts_are_cut_and_say_so() -> None:
    cell = measured("cpu", "cpu")
    cell["criteria"][0]["detail"] = "x" * 10_000
    cell["failures"][0]["evidence"] = ["y" * 10_000, "z" * 30_000]
    html = page(report(cell), [])
    assert "x" * BRIEF_CHARACTERS + " … (9,600 more characters in the record)" in html and "x" * 500 not in html
    assert "y" * 10_000 in html and "z" * 20_000 + " … (10,000 more characters)" in html and "z" * 20_001 not in html


@pytest.mark.usefixtures("jinja2")
def test_a_timeline_of_no_cell_is_not_lost() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    html = page(report(measured("cpu", "cpu")), [timeline("elsewhere", events=())])
    assert "of no cell above" in html and len(Seen(html).tags("img")) == 1


@pytest.mark.usefixtures("jinja2")
def test_what_a_record_does_not_have_is_said() -> None:
    """As in a record of before: no name of the machine, no end, a test without an outcome."""
    cell = measured("cpu", "cpu")
    cell["about"] |= {"machine": {}, "device": {"name": "cpu:arena", "card": None}, "driver": None, "versions": {}}
    cell["tests"][0] |= {"outcome": None, "duration_s": None}
    cell["sweeps"] = [{"test": "test_fault_sweep", "scenario": "start"}]
    html = page(report(cell), [])
    assert "none was read" in html and "an end that was not recorded" in html and "in host memory" in html


@pytest.mark.usefixtures("jinja2")
def test_without_matplotlib_the_numbers_are_there_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cell = measured("cpu", "cpu")
    html = page(report(cell), [timeline(cell["id"]), timeline(cell["id"], series={"uss_bytes": [(0.0, None)]})])
    assert not Seen(html).tags("img")
    assert html.count("There is no picture: matplotlib is not installed: pip install matplotlib") == 2
    assert "heap in use" in html and '<td class="n">300.00</td>' in html and "Nothing could be read." in html


def test_without_jinja2_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(NoTemplates, match=r"^jinja2 is not installed: pip install jinja2$"):
        page(report(unrun("cpu", "cpu")), [])


def test_nothing_is_imported_before_it_is_needed() -> None:
    program = "import sys; from qualification.report import page; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Pictures.


def test_a_picture_that_is_embedded_is_small_and_the_same_each_time() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    image = charts.draw(timeline("cpu"))
    again = charts.draw(timeline("cpu"))
    assert isinstance(image, bytes) and isinstance(again, bytes)
    # matplotlib names some clip paths after where they lie in memory.
    one, other = (re.sub(rb"p[0-9a-f]{10}", b"p", each) for each in (image, again))
    assert one == other
    assert len(image) < 100_000
    texts = "".join(ElementTree.fromstring(image).itertext())
    assert MEMORY["uss_bytes"] in texts and "matplotlib" not in texts
    # A tenth of a point is enough for a line, and not for a label.
    fine = {"uss_bytes": [(float(i), 59.24e6 + 1e4 * i) for i in range(9)]}
    image = charts.draw(timeline("cpu", series=fine, events=()))
    assert isinstance(image, bytes) and "59.25" in "".join(ElementTree.fromstring(image).itertext())


def test_a_picture_and_its_words_say_what_could_not_be_read() -> None:
    gaps = timeline(
        "cpu", series={"uss_bytes": [(0.0, 5e8), (1.0, None), (2.0, 7.5e8)], "heap_used_bytes": []}, events=()
    )
    assert charts.describe(gaps) == (
        f"Memory over time, {FAILS[0]}. host memory, all of it: first 500.0, last 750.0, peak 750.0 MB."
    )
    assert charts.describe(timeline("cpu", series={}, events=())).endswith(f"{FAILS[0]}. Nothing could be read.")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert charts.draw(timeline("cpu", series={})) == "there is nothing to plot: no series has two points"
    assert isinstance(charts.draw(gaps), bytes)


# For everyone.


@pytest.mark.usefixtures("jinja2")
def test_it_can_be_read_by_what_reads_aloud() -> None:
    cell = measured("cpu", "cpu")
    seen = Seen(page(report(cell, unrun("torch-cpu", "cpu")), [timeline(cell["id"])]))
    assert [each["lang"] for _, each in seen.tags("html")] == ["en"]
    levels = [int(tag[1]) for tag, _ in seen.tags("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for _, attributes in seen.tags("th"):
        assert attributes.get("scope") in ("col", "row", "rowgroup")
    assert all(len(str(each.get("alt"))) > 40 for _, each in seen.tags("img"))
    assert [len(seen.tags(each)) for each in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]
    ids = seen.having("id")
    assert all(name in ids for name in seen.having("aria-labelledby"))
    assert seen.having("href")[0] == "#matrix"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_its_colours_can_be_told_from_their_paper_in_light_and_dark() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    css = TEMPLATE.read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    schemes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", each)) for each in blocks]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        pairs = [(ink, paper) for ink in ("ink", "soft", "accent", "fail", "pass") for paper in ("paper", "shade")]
        pairs += [(name, f"{name}-paper") for name in ("pass", "fail", "grey")]
        for ink, paper in pairs:
            assert contrast(scheme[ink], scheme[paper]) >= 4.5, (ink, paper)
    # A picture has a paper of its own in both, and so has the text in its place.
    assert contrast("#1b1f24", "#ffffff") >= 4.5 and "color: #1b1f24; background: #ffffff;" in css


# In a browser.


def test_chromium_finds_nothing_wrong_with_it(whole_matrix: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    whole, html = whole_matrix
    dom, complaints = browse(html, tmp_path / "good")
    assert complaints == []
    seen = Seen(dom)
    check_links(seen, whole)
    rows = [each for _, each in seen.tags("tr") if "data-cell" in each]
    assert [each["data-verdict"] for each in rows] == [cell["verdict"] for cell in whole["cells"]]


@pytest.mark.usefixtures("jinja2")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("<script>document.title = 1</script>", "Content Security Policy"),
        ('<img src="https://example.invalid/x.png" alt="">', "Content Security Policy"),
    ],
)
def test_chromium_would_find_what_is_wrong(wrong: str, said: str, tmp_path: Path) -> None:
    html = page(report(unrun("cpu", "cpu")), [])
    _, complaints = browse(html.replace("</main>", f"{wrong}</main>"), tmp_path / "bad")
    assert complaints and said in complaints[0]


@pytest.mark.usefixtures("jinja2")
def test_chromium_would_find_an_error_of_a_script(tmp_path: Path) -> None:
    _, complaints = browse("<!doctype html><script>console.error('it went wrong')</script>", tmp_path / "bad")
    assert complaints and "it went wrong" in complaints[0]
