"""The report: every declared cell judged by the records there are. Red unless proven.

The matrix comes from what is declared, and what is asked of a cell from the criteria and the gate; neither from what
was found. ``report`` gives plain data, which ``report.schema.json`` describes.
"""

from __future__ import annotations

import json
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
    NEEDS,
    QUICK,
    RECOVERY_TIMES,
    SLOW_PROFILES,
    group_of,
    profile_of,
)
from qualification.judge import NO_FAULT, fault_text
from qualification.records import now
from qualification.report.gate import Gate
from qualification.report.gather import Evidence, Source
from qualification.report.proof import Expected, wrong_records
from qualification.report.text import first_of, some

SCHEMA_VERSION = 1
#: Criteria of what is no test of the matrix, such as the stress harness.
_OTHER_GROUP = "other"
#: Of a test that failed though each of its criteria held: one that was not kept.
_IN_ORDER = "ended_in_order"
#: What all records of a cell have to be made on: together they would prove nothing of either.
_SOFTWARE = ("runtime", "versions", "pins_sha256", "python")
_HARDWARE = ("device", "driver")
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
class _Why:
    """Why a cell is red or grey, and which tests that is about (none: all of it)."""

    text: str
    tests: frozenset[str] = frozenset()

    def concerns(self, tests: Iterable[str]) -> bool:
        """Whether it is about any of some tests."""
        return not self.tests or not self.tests.isdisjoint(tests)


@dataclass
class _Cell:
    """One declared cell on one machine, while it is judged."""

    backend: str
    environment: str
    machine: str | None
    required: bool
    sources: list[Source] = field(default_factory=list)
    #: Why it is red, and why it is grey.
    red: list[_Why] = field(default_factory=list)
    grey: list[_Why] = field(default_factory=list)
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
    wrong = wrong_records(evidence, expected, set(pairs))
    problems = [{"file": source.name, "reason": reason} for source, reason in wrong.items()]
    found: list[_Cell] = []
    for backend, environment in sorted(pairs, key=lambda pair: pair[1]):
        its = [each for each in evidence if (each.backend, each.environment) == (backend, environment)]
        found += _cells(backend, environment, its, wrong, gate)
    _tell_apart(found)
    cells = [_plain(each, gate, expected) for each in found]
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
    whole, open_ = _sweeps([each for each in sources if each not in wrong])
    for cell in machines.values():
        sound = [each for each in cell.sources if each not in wrong and not each.run.get("not_run")]
        cell.helps = bool(sound) and all(_shared(each) >= _tests_of(each) for each in sound)
        for source in cell.sources:
            if source in wrong:
                cell.red.append(_Why(f"{source.name}: {wrong[source]}"))
            else:
                _take_in(cell, source)
        for source, difference in _unlike(sound).items():
            cell.red.append(_Why(f"{source.name}: {difference}", frozenset(_TESTS)))
        for (test, made_with), reason in open_.items():
            its = [each for each in sound if test in _tests_of(each)]
            has_share = any(_made_with(each) == made_with and test in _shared(each) for each in its)
            if has_share and not any(test not in _shared(each) and _holds(each, test) for each in its):
                cell.red.append(_Why(reason, frozenset({test})))
        if not cell.helps:
            for (test, made_with), lent in whole.items():
                if test not in cell.tests and made_with in map(_made_with, sound):
                    for source in lent:
                        _take_in(cell, source, test)
        _judge(cell, gate)
    if not machines:
        cell = _Cell(backend, environment, None, required)
        (cell.red if required else cell.grey).append(_Why(f"no record of {backend} in {environment}"))
        return [cell]
    return [cell for _, cell in sorted(machines.items(), key=lambda item: (str(item[1].machine), item[0]))]


def _things(source: Source) -> dict[str, Any]:
    """Give what a record was made on."""
    things = {**source.run, "python": source.machine.get("python")}
    return {name: things.get(name) for name in (*_SOFTWARE, *_HARDWARE)}


def _made_with(source: Source) -> str:
    """Give the software that a record was made with, and what was set otherwise: what shares have to have in common."""
    things = {name: value for name, value in _things(source).items() if name in _SOFTWARE}
    return json.dumps([things, _overridden(source)], sort_keys=True)


def _unlike(sources: Sequence[Source]) -> dict[Source, str]:
    """Say of each record how it was made on other things than the last: together they would prove nothing of either."""
    found = {}
    for each in sources[:-1]:
        its, last = _things(each), _things(sources[-1])
        different = [name for name in its if its[name] != last[name]]
        if different:
            name = different[0]
            what = name.removesuffix("_sha256").replace("_", " ")
            found[each] = f"{what} is {_brief(its.get(name))}, and in {sources[-1].name} {_brief(last.get(name))}"
    return found


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _tests_of(source: Source) -> set[str]:
    return {str(line["test"]) for line in source.record.tests} if source.record is not None else set()


def _take_in(cell: _Cell, source: Source, only: str | None = None) -> None:
    """Take in what a sound record measured, or only what it did of one test."""
    assert source.record is not None
    for line in source.record.criteria:
        if only in (None, line["test"]):
            cell.lines.setdefault((str(line["test"]), str(line["criterion"])), []).append((line, source))
    for line in source.record.tests:
        test = str(line["test"])
        if only not in (None, test):
            continue
        cell.tests.setdefault(test, []).append((line, source))
        verdicts = {each["verdict"] for each in source.record.criteria if each["test"] == test}
        is_odd = (
            (line["outcome"] == "failed" and "fail" not in verdicts)
            or (line["outcome"] == "passed" and line.get("failed_in"))
            or (line["outcome"] == "not_run" and verdicts == {"pass"})
        )
        if is_odd:
            cell.lines.setdefault((test, _IN_ORDER), []).append((_out_of_order(line), source))


def _out_of_order(line: Mapping[str, Any]) -> dict[str, Any]:
    """Give the verdict on a test that failed, though each of its criteria held: it has one more, not kept."""
    names = ("provenance", "value", "limit", "capability")
    return {
        "test": line["test"],
        "criterion": _IN_ORDER,
        "verdict": "fail",
        "relation": "",
        "unit": "",
        **dict.fromkeys(names),
        **dict.fromkeys(("points_seen", "faults_fired", "absorbed"), 0),
        "detail": "",
        "reason": line.get("failed_in") or "it failed outside its criteria",
        "series": {},
    }


def _judge(cell: _Cell, gate: Gate) -> None:
    """Find every reason why a cell is not proven."""
    ran = [each for each in cell.sources if not each.run.get("not_run")]
    if not ran:
        # Nothing was measured, and that was said: grey.
        cell.grey += dict.fromkeys(_Why(f"not run: {each.run.get('not_run')}") for each in cell.sources)
        return
    set_to = dict.fromkeys((name, value) for source in ran for name, value in _overridden(source).items())
    for name, value in set_to:
        if gate.overridden.get(name) != value:
            test = name.partition(".")[0]
            whose = frozenset({test}) if test in _TESTS else frozenset(_TESTS)  # "every_test"
            cell.red.append(_Why(f"{name} was set to {value:g}, which the gate does not accept", whose))
    for (test, name), lines in cell.lines.items():
        whose = frozenset({test})
        for line, source in lines:
            if contradiction := _contradiction(line, source):
                cell.red.append(_Why(f"{test}/{name}: {contradiction}", whose))
        failed = [line for line, _ in lines if line["verdict"] == "fail"]
        if failed:
            again = f", in {len(failed)} of {len(lines)} runs" if len(lines) > 1 else ""
            cell.red.append(_Why(f"{test}/{name} failed{again}: {measured_text(failed[-1])}", whose))
    if not cell.helps:
        asked = [test for test in _TESTS if profile_of(test) in gate.profiles]
        missing = [test for test in asked if test not in cell.tests]
        for profile in gate.profiles:
            if its := [test for test in missing if profile_of(test) == profile]:
                cell.red.append(_Why(f"no record of {some(its)}, of the profile {profile}", frozenset(its)))
    for (test, name), lines in cell.lines.items():
        best = _best(lines)
        if best["verdict"] != "not_run" or best.get("capability") or group_of(test) is None:
            continue
        if not gate.excuses(test, name):
            cell.grey.append(_Why(f"{test}/{name} not run: {best.get('reason')}", frozenset({test})))
    if not cell.red and not any(_best(lines)["verdict"] == "pass" for lines in cell.lines.values()):
        cell.grey.append(_Why("nothing was measured"))


def _overridden(source: Source) -> dict[str, Any]:
    """Give the limits and parameters that a run had other than the defaults."""
    return dict((source.run.get("criteria") or {}).get("overridden", {}))


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
    if verdict == "not_run" and line.get("capability") is not None:
        able = line["capability"] not in (source.run.get("cannot") or {})
        if able or line["capability"] not in NEEDS.get(test, ()):
            return f"it is said to be impossible for want of {line['capability']}, which " + (
                "the backend does not say" if able else "it does not need"
            )
    if declared is None or verdict != "pass":
        return ""
    overridden = _overridden(source)
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


def _sweeps(sources: Iterable[Source]) -> tuple[dict[tuple[str, str], list[Source]], dict[tuple[str, str], str]]:
    """Give, by test and what it was made with, the shares that are a whole sweep, and what is missing of the others."""
    found: dict[tuple[str, str, int], dict[int, list[Source]]] = {}
    for source in sources:
        for test in _shared(source):
            share, of = source.run["shard"]
            there = found.setdefault((test, _made_with(source), of), {})
            # What was not run, or not kept, is no share.
            if _holds(source, test):
                there.setdefault(share, []).append(source)
    whole, open_ = {}, {}
    for (test, made_with, of), there in found.items():
        if len(there) == of:
            whole[test, made_with] = [each for its in there.values() for each in its]
        else:
            missing = [str(share) for share in range(1, of + 1) if share not in there]
            open_[test, made_with] = f"{test}: of {of} shares {some(missing)} missing"
    return whole, {key: reason for key, reason in open_.items() if key not in whole}


def _holds(source: Source, test: str) -> bool:
    """Whether a record proves all of a test that its backend can show."""
    assert source.record is not None
    its = [line for line in source.record.criteria if line["test"] == test]
    return all(line["verdict"] == "pass" or (line["verdict"] == "not_run" and line["capability"]) for line in its)


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
            whys = first_of([why.text for why in cell.red or cell.grey])
            required = " (the gate requires it)" if not cell.red else ""
            reasons.append(f"{cell.backend} in {cell.environment}{where}: {whys}{required}")
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
    reason = shown + (f": {some(list(whys))}" if whys else "")
    for row in rows:
        del row["required"]
    return {"item": text, "verdict": verdict, "reason": reason, "cells": rows}


def _shown(cell: _Cell, tests: Sequence[str]) -> tuple[str, str]:
    """Say whether a cell shows what some tests are about."""
    broken = [why.text for why in cell.red if why.concerns(tests)]
    if broken:
        return "fail", broken[0]
    lines = [_best(its) for (test, _), its in cell.lines.items() if test in tests]
    missing = [test for test in tests if not any(line["test"] == test for line in lines)]
    if not lines:
        return "not_run", next((why.text for why in cell.grey if why.concerns(tests)), "not run")
    unable = [line for line in lines if line["verdict"] == "not_run" and line.get("capability")]
    if len(unable) == len(lines) and not missing:
        return "cannot", str(unable[0].get("reason"))
    skipped = [line for line in lines if line["verdict"] == "not_run" and not line.get("capability")]
    if skipped or missing:
        return "not_run", str(skipped[0].get("reason")) if skipped else f"no record of {some(missing)}"
    return "pass", ""


def _plain(cell: _Cell, gate: Gate, expected: Expected) -> dict[str, Any]:
    """Give a cell as plain data."""
    criteria = [_criterion(cell, key, *_best_of(lines)) for key, lines in _in_order(cell.lines)]
    tests = [_test(cell, test, *lines[-1]) for test, lines in cell.tests.items()]
    whys = [why.text for why in (*cell.red, *cell.grey)]
    return {
        "id": cell.id,
        "backend": cell.backend,
        "environment": cell.environment,
        "machine": cell.machine,
        "required": cell.required,
        "verdict": cell.verdict,
        "reason": first_of(whys),
        "reasons": whys,
        "groups": _groups(cell, criteria, gate),
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
        "promise": _promise(test, name),
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
        "record_sha256": source.sha256,
    }


def _promise(test: str, name: str) -> str:
    declared = _DECLARED.get((test, name))
    if name == _IN_ORDER:
        return "The test comes to its end in order"
    return declared.promise if declared else name.replace("_", " ")


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
        found.append(
            {
                "criterion_id": _anchor(cell, test, name),
                "test_anchor": _anchor(cell, test),
                "promised": _promise(test, name),
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


def _groups(cell: _Cell, criteria: Sequence[Mapping[str, Any]], gate: Gate) -> dict[str, dict[str, Any]]:
    """Count the verdicts by group, of all criteria that the gate's profiles have: what has no verdict is not run."""
    found = {}
    there = {(each["test"], each["criterion"]) for each in criteria}
    others = {_OTHER_GROUP} & {str(each["group"]) for each in criteria}
    for group in (*GROUPS, *others):
        tests = GROUPS.get(group, ())
        its = [each for each in criteria if each["group"] == group]
        asked = [each for each in CRITERIA if each.test in tests and profile_of(each.test) in gate.profiles]
        cannot = sum(each["verdict"] == "not_run" and each["capability"] is not None for each in its)
        count = Counter(str(each["verdict"]) for each in its)
        # One that lends shares alone owes nothing else.
        absent = 0 if cell.helps else sum((each.test, each.name) not in there for each in asked)
        not_run = count["not_run"] - cannot + absent
        if count["fail"] or any(why.tests and why.concerns(tests) for why in cell.red):
            verdict = "fail"
        elif not_run or not its:
            verdict = "not_run"
        else:
            verdict = "pass" if count["pass"] else "cannot"
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
        "runtime": run.get("runtime") or "",
        "versions": {name: {"installed": each, "pinned": pins.get(name)} for name, each in versions.items()},
        "pins_sha256": run.get("pins_sha256"),
        "subject": run.get("subject") or "",
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


assert set(_TESTS) == {test for tests in GROUPS.values() for test in tests}, "each test belongs to one group"
assert {test for tests in SLOW_PROFILES.values() for test in tests} <= set(_TESTS), "a slow test that there is not"
