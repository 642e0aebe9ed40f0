"""The report as JUnit XML: a suite for each cell, a case for the cell itself and for each of its criteria."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

#: What XML 1.0 cannot hold, escaped or not.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Mapping[str, Any]) -> str:
    """Give the XML. A cell that proves nothing is a failed case of its own, so that no empty suite is green."""
    root = ElementTree.Element("testsuites", name="plimsoll")
    gate = ElementTree.SubElement(root, "testsuite", name="gate", timestamp=report["made"])
    case = ElementTree.SubElement(gate, "testcase", classname="gate", name=_clean(report["gate"]["source"]))
    if report["verdict"] != "pass":
        _child(case, "failure", report["reasons"][0], "\n".join(report["reasons"]))
    for cell in report["cells"]:
        suite = ElementTree.SubElement(root, "testsuite", name=_clean(cell["id"]), timestamp=report["made"])
        durations = {each["test"]: each["duration_s"] or 0.0 for each in cell["tests"]}
        case = ElementTree.SubElement(suite, "testcase", classname=_clean(cell["id"]), name="cell")
        if cell["verdict"] == "fail":
            _child(case, "failure", cell["reason"], "\n".join(cell["reasons"]))
        elif cell["verdict"] == "not_run":
            _child(case, "skipped", cell["reason"], "")
        failures = {each["criterion_id"]: each for each in cell["failures"]}
        for each in cell["criteria"]:
            # The time is the test's, and belongs to its first criterion, so that a sum is right.
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=_clean(f"{cell['id']}.{each['test']}"),
                name=_clean(each["criterion"]),
                time=f"{durations.pop(each['test'], 0.0):.3f}",
            )
            if each["verdict"] == "fail":
                four = failures[each["id"]]
                lines = [f"{name + ':':<9} {four[name]}" for name in ("promised", "measured", "fault", "repeat")]
                _child(case, "failure", four["measured"], "\n".join([*lines, "", *four["evidence"]]))
            elif each["verdict"] == "not_run":
                _child(case, "skipped", each["reason"], "")
    for suite in root.iter("testsuite"):
        suite.set("tests", str(len(suite.findall("testcase"))))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
        suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
        suite.set("errors", "0")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _child(case: ElementTree.Element, kind: str, message: str, text: str) -> None:
    child = ElementTree.SubElement(case, kind, message=_clean(message))
    child.text = _clean(text)


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
