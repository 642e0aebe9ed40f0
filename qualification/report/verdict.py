"""The report: every declared cell judged by the records there are. Red unless proven.

The matrix comes from what is declared, and what is asked of a cell from the criteria and the gate; neither from what
was found. ``report`` gives plain data, which ``report.schema.json`` describes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backends import Declared
from qualification import identity
from qualification.criteria import (
    CRITERIA,
    GROUPS,
    QUICK,
    RECOVERY_TIMES,
    SLOW_PROFILES,
    group_of,
    profile_of,
)
from qualification.judge import NO_FAULT, fault_text
from qualification.records import SCHEMA_VERSION as RECORD_VERSION
from qualification.records import now
from qualification.report.gate import Gate
from qualification.report.gather import CUT_OFF, Evidence, Source, copies
from qualification.subject import DEFAULT_SUBJECT

SCHEMA_VERSION = 1
#: Criteria of what is no test of the matrix, such as the stress harness.
_OTHER_GROUP = "other"
_TESTS = tuple(dict.fromkeys(each.test for each in CRITERIA))
_DECLARED = {(each.test, each.name): each for each in CRITERIA}
#: The seed's checklist, and the sweep: each item with the tests that show it.
CHECKLIST: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("All quick tests pass", tuple(test for test in _TESTS if profile_of(test) == QUICK)),
    ("1-hour continuous test passes", ("test_continuous_recording_memory_leak",)),
    ("GPU → CPU fallback tested", GROUPS["fallback"]),
    ("CUDA error recovery verified", GROUPS["CUDA errors"]),
    ("Emergency shutdown tested", GROUPS["emergency shutdown"]),
    (
        "Data preservation validated",
        (
            "test_data_preservation_on_shutdown",
            *GROUPS["data preservation"],
            "test_kill_during_recording",
            "test_kill_during_recording_soak",
            *GROUPS["storage"],
        ),
    ),
    ("Multiple OOM scenarios handled", GROUPS["repeated OOMs"]),
    ("Recovery metrics tracking works", GROUPS["metrics"]),
    ("No single allocation loses anything", GROUPS["sweep"]),
)


@dataclass(frozen=True)
class Expected:
    """What a record has to be of: these sources of the suite, and of the subject that ships."""

    suite_sha256: str
    shipped_subject_sha256: str
    pins: Path = identity.ROOT / "constraints"

    @classmethod
    def here(cls) -> Expected:
        """Take this checkout."""
        return cls(identity.suite()["suite_sha256"], identity.shipped_subject()["subject_sha256"])


@dataclass
class _Cell:
    """One declared cell on one machine, while it is judged."""

    backend: str
    environment: str
    machine: str | None
    required: bool
    sources: list[Source] = field(default_factory=list)
    #: Why it is red, and why it is grey.
    red: list[str] = field(default_factory=list)
    grey: list[str] = field(default_factory=list)
    #: Every line of each criterion, the earliest first, with the source that it is of.
    lines: dict[tuple[str, str], list[tuple[dict[str, Any], Source]]] = field(default_factory=dict)
    tests: dict[str, list[tuple[dict[str, Any], Source]]] = field(default_factory=dict)
    #: Whether it did nothing but a share of a sweep, for another machine.
    helps: bool = False

    @property
    def id(self) -> str:
        """Its name in the report, which can be an anchor."""
        return _anchored("-".join(each for each in (self.environment, self.backend, self.machine) if each))

    @property
    def verdict(self) -> str:
        """Whether it is proven: one reason that it is not is enough."""
        return "fail" if self.red else "not_run" if self.grey else "pass"


def report(
    evidence: Evidence,
    gate: Gate,
    declared: Sequence[Declared],
    expected: Expected | None = None,
) -> dict[str, Any]:
    """Judge every declared cell by the records, and give the report as plain data."""
    expected = expected or Expected.here()
    pairs = [(backend.name, environment) for backend in declared for environment in backend.environments]
    wrong = _wrong(evidence, expected, set(pairs))
    problems = [{"file": source.name, "reason": reason} for source, reason in wrong.items()]
    found: list[_Cell] = []
    for backend, environment in sorted(
        pairs, key=lambda pair: (pair[1], [each.name for each in declared].index(pair[0]))
    ):
        its = [each for each in evidence if (each.backend, each.environment) == (backend, environment)]
        found += _cells(backend, environment, its, wrong, gate)
    _tell_apart(found)
    cells = [_plain(each, expected) for each in found]
    reasons = _reasons(found, problems, pairs, gate)
    return {
        "schema_version": SCHEMA_VERSION,
        "made": now(),
        "suite": identity.suite(),
        "verdict": "fail" if reasons else "pass",
        "reasons": reasons,
        "gate": gate.plain(),
        "checklist": [_item(text, tests, found) for text, tests in CHECKLIST],
        "groups": [*GROUPS, _OTHER_GROUP] if any(_OTHER_GROUP in each["groups"] for each in cells) else [*GROUPS],
        "problems": problems,
        "cells": cells,
        "regressions": None,
    }


# Which records prove something.


def _wrong(evidence: Evidence, expected: Expected, pairs: set[tuple[str, str]]) -> dict[Source, str]:
    """Say of each record that proves nothing, why."""
    wrong = {each: each.problem for each in evidence if each.problem}
    for source, reason in copies(evidence).items():
        wrong[source] = f"{reason}; {wrong[source]}" if source in wrong else reason
    # Of the sound ones of this suite, the last says which subject it is about.
    sound = [each for each in evidence if each not in wrong and not each.run.get("not_run")]
    newest = next((each.run for each in reversed(sound) if _version(each, expected) == ""), {})
    resumed = _resumed(evidence, wrong)
    for source in evidence:
        reason = (
            _version(source, expected)
            or ("" if (source.backend, source.environment) in pairs else _undeclared(source))
            or _subject(source, newest)
            or _too_few(source)
        )
        if source in resumed and _version(source, expected) == "":
            wrong.pop(source, None)  # cut off, and gone on with: the other record has all of it
        elif reason and source not in wrong:
            wrong[source] = reason
    return wrong


def _version(source: Source, expected: Expected) -> str:
    """Say how a record is of another version of the suite, or of the subject that ships."""
    run = source.run
    if source.record is None:
        return ""
    if run.get("schema_version") != RECORD_VERSION:
        return f"another version of the suite: its schema is {run.get('schema_version')!r}, and not {RECORD_VERSION}"
    if run.get("suite_sha256") != expected.suite_sha256:
        which, here = run.get("suite_commit") or run.get("suite_version"), identity.suite()["suite_commit"]
        return (
            f"another version of the suite: {which}, sources {str(run.get('suite_sha256'))[:12]}; "
            f"this is {here}, {expected.suite_sha256[:12]}"
        )
    shipped = run.get("subject") == DEFAULT_SUBJECT and not run.get("not_run")
    if shipped and run.get("subject_sha256") != expected.shipped_subject_sha256:
        return (
            f"another version of the subject: {run.get('subject')} {run.get('subject_version')}, sources "
            f"{str(run.get('subject_sha256'))[:12]}; here they are {expected.shipped_subject_sha256[:12]}"
        )
    return ""


def _undeclared(source: Source) -> str:
    where = f"{source.backend} in {source.environment}" if source.backend else "no cell"
    return f"it is of {where}, which is not declared"


def _subject(source: Source, newest: Mapping[str, Any]) -> str:
    """Say how a record is about another subject, model or audio than the newest."""
    run = source.run
    if not run or run.get("not_run") or not newest:
        return ""
    for name in ("subject", "subject_sha256", "model_sha256", "audio_sha256"):
        # Of a file the name counts, wherever it lies.
        if Path(str(run.get(name))).name != Path(str(newest.get(name))).name:
            what = "version of the subject" if name == "subject_sha256" else name.removesuffix("_sha256")
            its, newer = str(run.get(name))[:80], str(newest.get(name))[:80]
            return f"another {what} than in the newest record: {its}, and there {newer}"
    return ""


def _too_few(source: Source) -> str:
    """Say what a record lacks of what it collected."""
    record = source.record
    if record is None or source.run.get("not_run"):
        return ""
    collected = source.run["collected"]
    if source.run.get("point"):
        return f"fewer results than collected: of the sweep it tried the point {source.run['point']} alone"
    if not collected:
        return "zero tests: it collected none"
    ended = {str(each.get("id")) for each in record.tests}
    missing = [str(each) for each in collected if each not in ended]
    if missing:
        return f"fewer results than collected: {len(ended)} of {len(collected)} tests, without {_some(missing)}"
    measured = {(line.get("test"), line.get("criterion")) for line in record.criteria}
    names = {str(each.get("test")) for each in record.tests}
    lacking = [f"{test}/{name}" for test, name in _DECLARED if test in names and (test, name) not in measured]
    if lacking:
        return f"fewer results than collected: {_some(lacking)} has no verdict"
    return ""


def _resumed(evidence: Evidence, wrong: Mapping[Source, str]) -> set[Source]:
    """Give the records that were cut off, as far as they go sound, and that a whole one says it went on with."""
    taken = {
        (str(name), each.backend, each.environment, each.machine.get("id"))
        for each in evidence
        if each not in wrong and not _too_few(each)
        for name in each.run.get("resumes") or ()
    }
    return {
        each
        for each in evidence
        if each.record is not None
        and (each not in wrong or each.problem.startswith(CUT_OFF))
        and (each.name, each.backend, each.environment, each.machine.get("id")) in taken
    }


# What a cell is worth.


def _cells(
    backend: str, environment: str, sources: Sequence[Source], wrong: Mapping[Source, str], gate: Gate
) -> list[_Cell]:
    """Judge a declared cell, on each machine that has a record of it apart."""
    required = gate.requires(backend, environment)
    machines: dict[str, _Cell] = {}
    for source in sources:
        key = str(source.machine.get("id", ""))
        name = str(source.machine.get("name") or "unknown machine")
        machines.setdefault(key, _Cell(backend, environment, name, required)).sources.append(source)
    shares = _shares(sources, wrong)
    for cell in machines.values():
        _take_in(cell, wrong)
        sound = [each for each in cell.sources if each not in wrong and not each.run.get("not_run")]
        cell.helps = bool(sound) and all(_shared(each) >= _tests_of(each) for each in sound)
    for cell in machines.values():
        _judge(cell, gate, shares)
    if not machines:
        cell = _Cell(backend, environment, None, required)
        reason = f"no record of {backend} in {environment}"
        (cell.red if required else cell.grey).append(reason)
        return [cell]
    return [cell for _, cell in sorted(machines.items(), key=lambda item: (str(item[1].machine), item[0]))]


def _tests_of(source: Source) -> set[str]:
    return {str(line["test"]) for line in source.record.tests} if source.record is not None else set()


def _take_in(cell: _Cell, wrong: Mapping[Source, str]) -> None:
    for source in cell.sources:
        if source in wrong:
            cell.red.append(f"{source.name}: {wrong[source]}")
            continue
        assert source.record is not None
        for line in source.record.criteria:
            cell.lines.setdefault((str(line["test"]), str(line["criterion"])), []).append((line, source))
        for line in source.record.tests:
            cell.tests.setdefault(str(line["test"]), []).append((line, source))


def _judge(cell: _Cell, gate: Gate, shares: Mapping[str, str]) -> None:
    """Find every reason why a cell is not proven."""
    ran = [each for each in cell.sources if not each.run.get("not_run")]
    if not ran:
        # Nothing was measured, and that was said: grey.
        cell.grey += dict.fromkeys(f"not run: {each.run.get('not_run')}" for each in cell.sources)
        return
    set_to = dict.fromkeys((name, value) for source in ran for name, value in _overridden(source).items())
    cell.red += [
        f"{name} was set to {value:g}, which the gate does not accept"
        for name, value in set_to
        if gate.overridden.get(name) != value
    ]
    for (test, name), lines in cell.lines.items():
        for line, source in lines:
            if contradiction := _contradiction(line, source):
                cell.red.append(f"{test}/{name}: {contradiction}")
        failed = [line for line, _ in lines if line["verdict"] == "fail"]
        if failed:
            again = f", in {len(failed)} of {len(lines)} runs" if len(lines) > 1 else ""
            cell.red.append(f"{test}/{name} failed{again}: {measured_text(failed[-1])}")
    for test, ended in cell.tests.items():
        for line, source in ended:
            mine = [each for each, whose in _of_test(cell, test) if whose is source]
            if line.get("outcome") == "failed" and not any(each["verdict"] == "fail" for each in mine):
                cell.red.append(f"{test} failed outside its criteria: see {source.name.removesuffix('.jsonl')}.log")
    asked = [test for test in _TESTS if profile_of(test) in gate.profiles]
    if not cell.helps:
        missing = [test for test in asked if test not in cell.tests and shares.get(test) != ""]
        for profile in gate.profiles:
            if its := [test for test in missing if profile_of(test) == profile]:
                cell.red.append(f"no record of {_some(its)}, of the profile {profile}")
    cell.red += [reason for test, reason in shares.items() if test in cell.tests and reason]
    for (test, name), lines in cell.lines.items():
        best = _best(lines)
        known = group_of(test) is not None
        if known and best["verdict"] == "not_run" and not best.get("capability") and not gate.excuses(test, name):
            cell.grey.append(f"{test}/{name} not run: {best.get('reason')}")
    if not cell.red and not any(_best(lines)["verdict"] == "pass" for lines in cell.lines.values()):
        cell.grey.append("nothing was measured")


def _overridden(source: Source) -> dict[str, Any]:
    """Give the limits and parameters that a run had other than the defaults."""
    return dict((source.run.get("criteria") or {}).get("overridden", {}))


def _of_test(cell: _Cell, test: str) -> list[tuple[dict[str, Any], Source]]:
    return [each for (its, _), lines in cell.lines.items() if its == test for each in lines]


def _best(lines: Sequence[tuple[dict[str, Any], Source]]) -> dict[str, Any]:
    """Give what counts of several runs of the same: a failure, however often it passed; else what was measured last."""
    return _best_of(lines)[0]


def _best_of(lines: Sequence[tuple[dict[str, Any], Source]]) -> tuple[dict[str, Any], Source]:
    for verdict in ("fail", "pass", "not_run"):
        if its := [each for each in lines if each[0]["verdict"] == verdict]:
            return its[-1]
    return lines[-1]


def _contradiction(line: Mapping[str, Any], source: Source) -> str:
    """Say how a verdict does not follow from what was measured and what is declared."""
    verdict, test, name = line.get("verdict"), str(line.get("test")), str(line.get("criterion"))
    declared = _DECLARED.get((test, name))
    overridden = _overridden(source)
    if declared is None or verdict != "pass":
        return ""
    limit = overridden.get(f"{test}.{name}", declared.limit)
    asked = replace(declared, limit=limit)
    if line.get("limit") != limit or line.get("relation") != declared.relation:
        return f"it was judged by {line.get('relation')} {line.get('limit')}, and the limit is {asked.limit_text}"
    value = line.get("value")
    if not isinstance(value, int | float) or not asked.holds(value):
        return f"it is said to have passed with {value}, and the limit is {asked.limit_text}"
    if line.get("points_seen") and not line.get("faults_fired"):
        return f"it is said to have passed, and none of {line['points_seen']} faults fired"
    return ""


# A sweep in shares, on several machines.


def _shared(source: Source) -> set[str]:
    """Name the tests of which a record has a share; none where it swept on its own."""
    if source.record is None or (source.run.get("shard") or [1, 1])[1] == 1:
        return set()
    return _tests_of(source) & {*SLOW_PROFILES["sweep"]}


def _shares(sources: Iterable[Source], wrong: Mapping[Source, str]) -> dict[str, str]:
    """Say of each test that was swept in shares which of them are missing; "": none."""
    found: dict[tuple[str, int], set[int]] = {}
    whole: set[str] = set()
    for source in sources:
        if source in wrong or source.record is None:
            continue
        shared = _shared(source)
        whole |= _tests_of(source) - shared
        for test in shared:
            share, of = source.run["shard"]
            found.setdefault((test, of), set()).add(share)
    result: dict[str, str] = {}
    for (test, of), there in found.items():
        missing = sorted(set(range(1, of + 1)) - there)
        if test in whole or not missing:
            result[test] = ""
        else:
            result.setdefault(test, f"{test}: of {of} shares {', '.join(map(str, missing))} missing")
    return result


# What is shown.


def _reasons(
    cells: Sequence[_Cell], problems: Sequence[Mapping[str, str]], pairs: Sequence[tuple[str, str]], gate: Gate
) -> list[str]:
    """Say why the report is red."""
    reasons = []
    for cell in cells:
        if cell.required and cell.verdict != "pass":
            its = [each for each in cells if (each.backend, each.environment) == (cell.backend, cell.environment)]
            if cell.verdict == "not_run" and any(each.verdict == "pass" and not each.helps for each in its):
                continue  # it could not run here, and it did elsewhere
            where = f" on {cell.machine}" if cell.machine else ""
            whys = cell.red or cell.grey
            more = f" (and {len(whys) - 1} more)" if len(whys) > 1 else ""
            required = " (the gate requires it)" if not cell.red else ""
            reasons.append(f"{cell.backend} in {cell.environment}{where}: {whys[0]}{more}{required}")
    for backend, environment in pairs:
        its = [each for each in cells if (each.backend, each.environment) == (backend, environment)]
        if gate.requires(backend, environment) and all(each.helps for each in its):
            reasons.append(f"{backend} in {environment}: nothing but shares of the sweep")
    said = " ".join(reasons)
    reasons += [f"{each['file']}: {each['reason']}" for each in problems if each["file"] not in said]
    return reasons


def _tell_apart(cells: Sequence[_Cell]) -> None:
    """Give machines of the same name names of their own."""
    ids: dict[str, set[str]] = {}
    for cell in cells:
        for source in cell.sources:
            ids.setdefault(_anchored(str(cell.machine)), set()).add(str(source.machine.get("id", "")))
    for cell in cells:
        if cell.machine is not None and len(ids[_anchored(cell.machine)]) > 1:
            cell.machine = f"{cell.machine}-{str(cell.sources[0].machine.get('id', ''))[:4]}"


def _item(text: str, tests: Sequence[str], cells: Sequence[_Cell]) -> dict[str, Any]:
    """Fill in an item of the checklist: every required cell has to show it, if it can."""
    rows = []
    for cell in cells:
        verdict, reason = _shown(cell, tests)
        rows.append(
            {"cell": cell.id, "verdict": verdict, "reason": reason, "required": cell.required and not cell.helps}
        )
    counted = [row for row in rows if row["required"]] or rows
    verdicts = {str(row["verdict"]) for row in counted}
    # What no cell can show stays open.
    verdict = "fail" if "fail" in verdicts else "not_run" if "not_run" in verdicts or "pass" not in verdicts else "pass"
    whys = dict.fromkeys(str(row["reason"]) for row in counted if row["verdict"] == verdict and row["reason"])
    tally = Counter(str(row["verdict"]) for row in counted)
    shown = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in tally.items())
    reason = shown + (f": {_some(list(whys))}" if whys else "")
    for row in rows:
        del row["required"]
    return {"item": text, "verdict": verdict, "reason": reason, "cells": rows}


def _shown(cell: _Cell, tests: Sequence[str]) -> tuple[str, str]:
    """Say whether a cell shows what some tests are about."""
    broken = [each for each in cell.red if any(test in each for test in tests)]
    damaged = [each for each in cell.red if not each.startswith(("test_", "no record"))]
    lines = [_best(its) for (test, _), its in cell.lines.items() if test in tests]
    missing = [test for test in tests if not any(line["test"] == test for line in lines)]
    if broken or damaged:
        return "fail", (broken or damaged)[0]
    if not lines:
        return "not_run", (cell.red or cell.grey or ["not run"])[0]
    unable = [line for line in lines if line["verdict"] == "not_run" and line.get("capability")]
    if len(unable) == len(lines) and not missing:
        return "cannot", str(unable[0].get("reason"))
    skipped = [line for line in lines if line["verdict"] == "not_run" and not line.get("capability")]
    if skipped or missing:
        return "not_run", str(skipped[0].get("reason")) if skipped else f"no record of {_some(missing)}"
    return "pass", ""


def _plain(cell: _Cell, expected: Expected) -> dict[str, Any]:
    """Give a cell as plain data."""
    criteria = [_criterion(cell, key, *_best_of(lines)) for key, lines in _in_order(cell.lines)]
    tests = [_test(cell, test, *lines[-1]) for test, lines in cell.tests.items()]
    whys = [*cell.red, *cell.grey]
    return {
        "id": cell.id,
        "backend": cell.backend,
        "environment": cell.environment,
        "machine": cell.machine,
        "required": cell.required,
        "verdict": cell.verdict,
        "reason": "" if not whys else whys[0] + (f" (and {len(whys) - 1} more)" if len(whys) > 1 else ""),
        "reasons": whys,
        "groups": _groups(criteria),
        "about": _about(cell, expected),
        "records": [_record(each) for each in cell.sources],
        "criteria": criteria,
        "tests": tests,
        "failures": _failures(cell),
        "recovery": [
            {
                "test": each["test"],
                "criterion": each["criterion"],
                "promise": each["promise"],
                "value_s": each["value"],
                "limit_s": each["limit"],
                "verdict": each["verdict"],
            }
            for each in criteria
            if each["criterion"] in RECOVERY_TIMES
        ],
        "peaks": _peaks(cell),
        "sweeps": [
            {name: line[name] for name in line if name not in ("backend", "environment")}
            for source in cell.sources
            if source.record is not None
            for line in source.record.sweeps
        ],
    }


def _in_order(
    lines: Mapping[tuple[str, str], list[tuple[dict[str, Any], Source]]],
) -> list[tuple[tuple[str, str], list[tuple[dict[str, Any], Source]]]]:
    """Put the criteria in the order in which they are declared; what is not declared comes last."""
    order = {key: number for number, key in enumerate(_DECLARED)}
    return sorted(lines.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def _criterion(cell: _Cell, key: tuple[str, str], line: Mapping[str, Any], source: Source) -> dict[str, Any]:
    test, name = key
    declared = _DECLARED.get(key)
    value, limit, relation = line.get("value"), line.get("limit"), str(line.get("relation", ""))
    room = margin(value, relation, limit)
    return {
        "id": _anchor(cell, test, name),
        "test": test,
        "group": group_of(test) or _OTHER_GROUP,
        "profile": profile_of(test) if declared else _OTHER_GROUP,
        "criterion": name,
        "promise": declared.promise if declared else name.replace("_", " "),
        "verdict": line["verdict"],
        "value": value,
        "relation": relation,
        "limit": limit,
        "unit": line.get("unit", ""),
        "margin": room,
        "margin_percent": None if room is None or not limit else 100 * room / abs(limit),
        "provenance": line.get("provenance"),
        "points_seen": line.get("points_seen", 0),
        "faults_fired": line.get("faults_fired", 0),
        "absorbed": line.get("absorbed", 0),
        "detail": line.get("detail", ""),
        "reason": line.get("reason", ""),
        "capability": line.get("capability"),
        "record": source.name,
    }


def margin(value: float | None, relation: str, limit: float | None) -> float | None:
    """Give the room that is left to a limit, in its unit; None where one has to be met exactly, or there is none."""
    if value is None or limit is None or relation not in ("<", "<=", ">", ">="):
        return None
    return limit - value if relation.startswith("<") else value - limit


def _test(cell: _Cell, test: str, line: Mapping[str, Any], source: Source) -> dict[str, Any]:
    return {
        "test": test,
        "id": line.get("id", ""),
        "anchor": _anchor(cell, test),
        "outcome": line.get("outcome"),
        "duration_s": line.get("duration_s"),
        "repeat": line.get("repeat", ""),
        "evidence": line.get("evidence", []),
        "record": source.name,
    }


def _failures(cell: _Cell) -> list[dict[str, Any]]:
    """Give the four lines of every criterion that failed, and the evidence of its test."""
    found = []
    for (test, name), lines in _in_order(cell.lines):
        line, source = _best_of(lines)
        if line["verdict"] != "fail":
            continue
        ended: Mapping[str, Any] = next((each for each, its in cell.tests.get(test, ()) if its is source), {})
        declared = _DECLARED.get((test, name))
        found.append(
            {
                "criterion_id": _anchor(cell, test, name),
                "test_anchor": _anchor(cell, test),
                "promised": declared.promise if declared else name.replace("_", " "),
                "measured": measured_text(line),
                "fault": _fault(line),
                "repeat": ended.get("repeat") or f"python -m pytest {test} --backend {cell.backend}",
                "evidence": ended.get("evidence", []),
            }
        )
    return found


def measured_text(line: Mapping[str, Any]) -> str:
    """Say what was measured against which limit, as a failure on the screen does."""
    unit, value = line.get("unit", ""), line.get("value")
    measured = "nothing" if value is None else f"{line.get('criterion')} = {value:.6g} {unit}".strip()
    limit = line.get("limit")
    limit_text = "none" if limit is None else f"{line.get('relation', '')} {limit:g} {unit}".strip()
    because = f" ({line['reason']})" if line.get("reason") else ""
    return f"{measured}, limit {limit_text}{because}"


def _fault(line: Mapping[str, Any]) -> str:
    seen, fired, absorbed = (int(line.get(name, 0)) for name in ("points_seen", "faults_fired", "absorbed"))
    if line.get("provenance") is None and not line.get("points_seen"):
        return NO_FAULT
    return fault_text(line.get("provenance"), seen, fired, absorbed, str(line.get("detail", "")))


def _groups(criteria: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Count the verdicts by group. A group of which nothing is there is not run."""
    found = {}
    others = {_OTHER_GROUP} & {str(each["group"]) for each in criteria}
    for group in (*GROUPS, *others):
        its = [each for each in criteria if each["group"] == group]
        cannot = sum(each["verdict"] == "not_run" and each["capability"] is not None for each in its)
        count = Counter(str(each["verdict"]) for each in its)
        not_run = count["not_run"] - cannot
        verdict = (
            "fail" if count["fail"] else "not_run" if not_run or not its else "pass" if count["pass"] else "cannot"
        )
        found[group] = {
            "verdict": verdict,
            "passed": count["pass"],
            "failed": count["fail"],
            "not_run": not_run,
            "cannot": cannot,
        }
    return found


def _about(cell: _Cell, expected: Expected) -> dict[str, Any] | None:
    """Say what ran where, by the last record that ran."""
    said = [each for each in cell.sources if each.run]
    if not said:
        return None
    source = next((each for each in reversed(said) if not each.run.get("not_run")), said[-1])
    run = source.run
    pins = _pins(expected.pins / f"{cell.environment}.txt")
    durations = [line.get("duration_s") or 0.0 for lines in cell.tests.values() for line, _ in lines]
    versions = run.get("versions") or {}
    return {
        "machine": {"gpus": [], "gpus_unread": None, **source.machine},
        "device": run.get("device") or {"name": "", "card": None},
        "driver": run.get("driver"),
        "runtime": run.get("runtime", ""),
        "versions": {name: {"installed": each, "pinned": pins.get(name)} for name, each in versions.items()},
        "pins_sha256": run.get("pins_sha256"),
        "subject": run.get("subject", ""),
        "subject_version": run.get("subject_version"),
        "subject_sha256": run.get("subject_sha256"),
        "model_sha256": run.get("model_sha256"),
        "audio_sha256": run.get("audio_sha256"),
        "criteria_overridden": _overridden(source),
        "duration_s": sum(durations),
        "began": min(str(each.run.get("began", "")) for each in said),
        "ended": source.record.ended if source.record is not None else None,
    }


def _record(source: Source) -> dict[str, Any]:
    return {
        "file": source.name,
        "sha256": source.sha256,
        "began": source.run.get("began"),
        "ended": source.record.ended if source.record is not None else None,
        "tests": len(source.record.tests) if source.record is not None else 0,
        "collected": len(source.run.get("collected") or ()),
        "commit": source.run.get("suite_commit"),
        "not_run": source.run.get("not_run"),
    }


def _peaks(cell: _Cell) -> list[dict[str, Any]]:
    """Give the most of each series of memory in each test."""
    most: dict[tuple[str, str], float] = {}
    for (test, _), lines in cell.lines.items():
        for line, _ in lines:
            for name, points in (line.get("series") or {}).items():
                values = [value for _, value in points if value is not None]
                if name.endswith("_bytes") and values:
                    most[test, name] = max(most.get((test, name), 0.0), *values)
    return [{"test": test, "series": name, "bytes": value} for (test, name), value in sorted(most.items())]


def _pins(path: Path) -> dict[str, str]:
    """Read the versions that an environment is pinned to; none where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return {}
    return dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;]+)", text))


def _anchor(cell: _Cell, *names: str) -> str:
    return _anchored("-".join((cell.id, *names)))


def _anchored(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", text)


def _some(names: Sequence[str], shown: int = 3) -> str:
    """Name a few of them, and say how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


assert set(_TESTS) == {test for tests in GROUPS.values() for test in tests}, "each test belongs to one group"
assert {test for tests in SLOW_PROFILES.values() for test in tests} <= set(_TESTS), "a slow test that there is not"
