"""The command that makes a report: read the records, judge, write the files, say what came of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import backends
from qualification import history, identity
from qualification.files import put
from qualification.quoting import printable
from qualification.report import against
from qualification.report.charts import Timeline
from qualification.report.gate import DEFAULT, Gate, GateError, load
from qualification.report.gather import Evidence, GatherError, gather
from qualification.report.junit import junit
from qualification.report.markdown import markdown
from qualification.report.page import NoTemplates, page
from qualification.report.verdict import report

EXIT_PASS = 0
EXIT_RED = 1
EXIT_REFUSED = 2
RESULTS = identity.ROOT / "results"
PAGE, DATA, JUNIT, SUMMARY = "index.html", "report.json", "junit.xml", "summary.md"
_REASONS_SHOWN = 10


class Refused(ValueError):
    """A report cannot be made. The message says why."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what a report can be told."""
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=Path,
        help="what runs wrote their records to, of any number of runs and machines (default: results)",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write (default: report in the first one)")
    parser.add_argument(
        "--gate", metavar="FILE.toml", type=Path, default=DEFAULT, help="what has to be proven (default: %(default)s)"
    )
    parser.add_argument("--against", metavar="report.json", type=Path, help="an earlier report: show what became worse")
    parser.add_argument(
        "--history", metavar="FILE", type=Path, help=f"SQLite file (default: {history.FILE} beside out)"
    )
    parser.add_argument("--history-key", metavar="KEY", default=history.KEY, help="key in it (default: %(default)s)")
    parser.add_argument(
        "--on-finish",
        metavar="ARGV",
        nargs=argparse.REMAINDER,
        help="comes last: a command and its arguments, which gets the summary as JSON on standard input",
    )


def run(options: argparse.Namespace) -> int:
    """Make the report; give the exit status. Raises Refused."""
    if options.on_finish == []:
        raise Refused("--on-finish: expected a command and its arguments after it, and nothing else")
    folders = options.folders or [RESULTS]
    out = options.out or folders[0] / "report"
    file = options.history or folders[0] / history.FILE
    declared = backends.declared()
    try:
        gate = load(options.gate, [(each.name, environment) for each in declared for environment in each.environments])
        if gate.fail_on_regression and options.against is None:
            raise Refused(f"{gate.source} fails on regressions: expected --against, with an earlier report.json")
        earlier = against.load(options.against) if options.against else None
        evidence = gather(folders)
        made = report(evidence, gate, declared)
        if earlier is not None:
            compare(made, earlier, str(options.against), gate)
    except (GateError, GatherError, against.AgainstError) as error:
        raise Refused(str(error)) from error
    try:
        notes = write(out, made, timelines(evidence, made))
    except OSError as error:
        reason = f"--out {out}: the report cannot be written: {error.strerror or error}"
        # It is judged, and nobody can read it: for other tools that is no pass.
        made |= {"verdict": "fail", "reasons": [reason, *made["reasons"]]}
        publish(made, out, file, options)
        raise Refused(reason) from error
    notes += publish(made, out, file, options)
    say(made, out, notes)
    return EXIT_PASS if made["verdict"] == "pass" else EXIT_RED


def publish(made: Mapping[str, Any], out: Path, file: Path, options: argparse.Namespace) -> list[str]:
    """Store what a report found, and tell of it; give what went wrong."""
    return history.publish(summary(made, out), file, options.history_key, options.on_finish or ())


def compare(made: dict[str, Any], earlier: Mapping[str, Any], name: str, gate: Gate) -> None:
    """Add to a report what became worse since an earlier one. Raises AgainstError."""
    items, not_compared = against.compare(earlier, made, gate.regression)
    made["regressions"] = {"against": name, "items": items, "not_compared": not_compared}
    if gate.fail_on_regression and items:
        made["verdict"] = "fail"
        made["reasons"].append(f"{len(items)} regressions against {name}, the first: {items[0]['text']}")


def write(out: Path, made: Mapping[str, Any], charts: Sequence[Timeline]) -> list[str]:
    """Write the report's files, each whole or not at all; give what is to be said of them. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    notes, texts = [], {DATA: json.dumps(made, indent=1, allow_nan=False) + "\n", JUNIT: junit(made)}
    texts[SUMMARY] = markdown(made)
    try:
        texts[PAGE] = page(made, charts)
    except NoTemplates as error:
        notes.append(f"no page: {error}")
    # One of an earlier report would be taken for this one's, should this one be cut off.
    (out / PAGE).unlink(missing_ok=True)
    for name, text in texts.items():
        put(out / name, text.encode("utf-8"))
    return notes


def timelines(evidence: Evidence, made: Mapping[str, Any]) -> list[Timeline]:
    """Give the memory of every criterion that has it, with what happened meanwhile, in the report's order."""
    sources = {(each.name, each.sha256): each for each in evidence}
    found = []
    for cell in made["cells"]:
        for criterion in cell["criteria"]:
            record = sources[criterion["record"], criterion["record_sha256"]].record
            if record is None:
                continue
            key = (criterion["test"], criterion["criterion"])
            line = next((each for each in record.criteria if (each["test"], each["criterion"]) == key), {})
            series = {name: points for name, points in line.get("series", {}).items() if name.endswith("_bytes")}
            if not series:
                continue
            ended = next((each for each in record.tests if each["test"] == criterion["test"]), {})
            found.append(
                Timeline(
                    cell=cell["id"],
                    test=criterion["test"],
                    criterion=criterion["criterion"],
                    series=series,
                    events=[(float(t_s), str(kind)) for t_s, kind in ended.get("events", ())],
                    device_limit_bytes=ended.get("device_limit_bytes"),
                    events_told=ended.get("events_told", 0),
                    verdict=criterion["verdict"],
                )
            )
    return found


def summary(made: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Say in short what a report found, for other tools."""
    return {
        "schema_version": made["schema_version"],
        "kind": "report",
        "finished": made["made"],
        "verdict": made["verdict"],
        "reasons": made["reasons"],
        **made["suite"],
        "gate": made["gate"]["source"],
        "report": str((out / DATA).resolve()),
        "cells": [
            {name: cell[name] for name in ("backend", "environment", "machine", "required", "verdict", "reason")}
            for cell in made["cells"]
        ],
        "regressions": None if made["regressions"] is None else len(made["regressions"]["items"]),
    }


def say(made: Mapping[str, Any], out: Path, notes: Sequence[str]) -> None:
    """Print what came of it."""
    for cell in made["cells"]:
        where = f"{cell['backend']} in {cell['environment']}" + (f" on {cell['machine']}" if cell["machine"] else "")
        line = f"{cell['verdict'].replace('_', ' '):<8} {where}" + (f": {cell['reason']}" if cell["reason"] else "")
        print(printable(line))
    if made["regressions"] is not None:
        items = made["regressions"]["items"]
        print(f"{len(items)} regressions against {printable(made['regressions']['against'])}")
        if without := made["regressions"]["not_compared"]:
            print(printable(f"  not compared, for want of an earlier one: {', '.join(without)}"))
        for each in items[:_REASONS_SHOWN]:
            print(printable(f"  {each['what']}: {each['cell']} {each['test']}: {each['text']}"))
    for note in notes:
        print(printable(note))
    print(f"report: {out / PAGE if (out / PAGE).exists() else out / SUMMARY}")
    if made["verdict"] == "pass":
        print("QUALIFIED: every required cell is proven", flush=True)
        return
    print(f"NOT QUALIFIED, by the gate {made['gate']['source']}:", file=sys.stderr)
    for reason in made["reasons"][:_REASONS_SHOWN]:
        print(printable(f"  {reason}"), file=sys.stderr)
    if made["problems"]:
        print("  (a record that cannot be used: move it away, or repeat the run)", file=sys.stderr)
    if len(made["reasons"]) > _REASONS_SHOWN:
        print(f"  and {len(made['reasons']) - _REASONS_SHOWN} more: see the report", file=sys.stderr)
