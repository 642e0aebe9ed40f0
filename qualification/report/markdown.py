"""The report as a Markdown summary, for the page of a CI job."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qualification.quoting import printable

MARKS = {"pass": "✅ pass", "fail": "❌ fail", "not_run": "⚪ not run", "cannot": "⚪ cannot"}
#: Of more, only the number is said: a job's page takes 1 MiB.
_SHOWN = 30


def markdown(report: Mapping[str, Any]) -> str:
    """Give the summary: verdict, matrix, checklist, what failed, and what became worse."""
    said = "qualified" if report["verdict"] == "pass" else "not qualified"
    suite = report["suite"]
    lines = [
        f"# {MARKS[report['verdict']]}: {said}",
        "",
        f"Plimsoll {_text(suite['suite_version'])} ({_text(suite['suite_commit'] or 'no commit')}), "
        f"gate {_text(report['gate']['source'])} ({', '.join(report['gate']['profiles'])}), {_text(report['made'])}",
        "",
        *_list(report["reasons"]),
        "## Matrix",
        "",
        *_table(
            ["cell", "machine", "required", "verdict", *report["groups"]],
            [
                [
                    f"{cell['backend']} in {cell['environment']}",
                    cell["machine"] or "–",
                    "yes" if cell["required"] else "no",
                    MARKS[cell["verdict"]],
                    *(
                        MARKS[cell["groups"][group]["verdict"]] if group in cell["groups"] else "–"
                        for group in report["groups"]
                    ),
                ]
                for cell in report["cells"]
            ],
        ),
        "",
        *_list([f"{cell['id']}: {cell['reason']}" for cell in report["cells"] if cell["reason"]]),
        "## Validation checklist",
        "",
        *(
            f"- [{'x' if item['verdict'] == 'pass' else ' '}] {_text(item['item'])} ({_text(item['reason'])})"
            for item in report["checklist"]
        ),
        "",
    ]
    failures = [(cell, failure) for cell in report["cells"] for failure in cell["failures"]]
    if failures:
        lines += ["## What failed", ""]
        for cell, failure in failures[:_SHOWN]:
            four = [f"{name + ':':<9} {failure[name]}" for name in ("promised", "measured", "fault", "repeat")]
            lines += [f"**{_text(cell['id'])}**", "", *_block(four), ""]
        lines += _more(len(failures))
    if report["regressions"] is not None:
        items = report["regressions"]["items"]
        lines += [f"## Against {_text(report['regressions']['against'])}", ""]
        lines += _list([f"{each['what']}: {each['cell']} {each['test']}: {each['text']}" for each in items]) or [
            "No regression.",
            "",
        ]
        if without := report["regressions"]["not_compared"]:
            lines += [f"Not compared, for want of an earlier one: {_text(', '.join(without))}", ""]
    return "\n".join(lines)


def _list(texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    return [*(f"- {_text(text)}" for text in texts[:_SHOWN]), *_more(len(texts)), ""]


def _more(count: int) -> list[str]:
    return [f"- and {count - _SHOWN} more: see the page"] if count > _SHOWN else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_text(each) if each != "---" else each for each in line) + " |" for line in lines]


def _block(lines: Sequence[str]) -> list[str]:
    """Give lines as they are, in a fence that none of them can close."""
    text = "\n".join(printable(line) for line in lines)
    fence = "`" * max(3, 1 + max((len(each) for each in re.findall("`+", text)), default=0))
    return [f"{fence}text", text, fence]


def _text(text: str) -> str:
    """Take every meaning from a text: in Markdown, and in the HTML that it may contain."""
    plain = printable(str(text))
    return re.sub(r"([\\`*_\[\]#!|~])", r"\\\1", html.escape(plain, quote=False)).replace("@", "&#64;")
