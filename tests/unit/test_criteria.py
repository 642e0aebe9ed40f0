"""Criteria and the judge: what holds, what fails, and that nothing is forgotten."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from backends.contract import FaultRecord, Provenance
from qualification.criteria import (
    CRITERIA,
    GROUPS,
    NEEDS,
    PARAMETERS,
    PROFILES,
    RECOVERY_TIMES,
    Criteria,
    Criterion,
    group_of,
    profile_of,
)
from qualification.judge import Judge

ROOT = Path(__file__).resolve().parents[2]
FIRED = FaultRecord(3, 2, 0, Provenance.CAPPED, "Fail: no memory")
LIMIT = Criterion("test_x", "growth", "<", 1.0, "MB/s", "Growth < 1 MB/s")
EXACT = Criterion("test_x", "lost", "==", 0, "samples", "Nothing lost")


@pytest.fixture
def written() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def judge(written: list[dict[str, Any]]) -> Judge:
    return Judge("test_x", [LIMIT, EXACT], lambda **fields: written.append(fields))


@pytest.mark.parametrize(
    ("relation", "value", "holds"),
    [("<", 0.9, True), ("<", 1.0, False), ("<=", 1.0, True), ("==", 1.0, True), (">=", 0.9, False), (">", 1.1, True)],
)
def test_a_limit_holds_or_not(relation: str, value: float, holds: bool) -> None:
    criterion = Criterion("t", "n", relation, 1.0, "", "")
    assert criterion.holds(value) is holds, f"{value} {relation} 1.0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_never_passes(judge: Judge, value: float) -> None:
    judge("growth", value)
    assert [each.verdict for each in judge.verdicts] == ["fail"], f"{value} passed"


def test_a_fault_that_never_fired_fails_whatever_the_value(judge: Judge) -> None:
    judge("growth", 0.0, fault=FaultRecord(5, 0, 0, None))
    assert judge.verdicts[0].verdict == "fail" and "never fired" in judge.verdicts[0].reason


def test_a_fault_that_was_absorbed_fails_and_says_so(judge: Judge) -> None:
    judge("growth", 0.0, fault=FaultRecord(5, 0, 2, Provenance.CAPPED))
    assert judge.verdicts[0].verdict == "fail" and "absorbed" in judge.verdicts[0].reason


def test_a_verdict_is_written_with_its_fault(judge: Judge, written: list[dict[str, Any]]) -> None:
    judge("lost", 0, fault=FIRED)
    line = written[0]
    found = {name: line[name] for name in ("criterion", "verdict", "provenance", "points_seen", "faults_fired")}
    expected = {
        "criterion": "lost",
        "verdict": "pass",
        "provenance": "capped",
        "points_seen": 3,
        "faults_fired": 2,
    }
    assert found == expected


def test_a_criterion_is_judged_once(judge: Judge) -> None:
    judge("lost", 1)
    with pytest.raises(ValueError, match="judged once"):
        judge("lost", 0)


def test_a_name_that_does_not_exist_is_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match="it has growth, lost"):
        judge("groth", 0)


def test_what_was_not_judged_gets_the_verdict_that_the_test_ended_with(
    judge: Judge, written: list[dict[str, Any]]
) -> None:
    judge("lost", 0)
    judge.end("fail", "the test ended before this was measured: TimeoutError")
    assert [(line["criterion"], line["verdict"]) for line in written] == [("lost", "pass"), ("growth", "fail")]


def test_the_four_lines(judge: Judge) -> None:
    judge("growth", 1.5, fault=FIRED)
    assert judge.failed[0].lines("pytest x") == [
        "promised: Growth < 1 MB/s",
        "measured: growth = 1.5 MB/s, limit < 1 MB/s",
        "fault:    capped: 3 points seen, 2 fired, 0 absorbed; Fail: no memory",
        "repeat:   pytest x",
    ]


def test_every_parameter_is_within_its_own_bounds() -> None:
    out = [each.name for each in PARAMETERS if not each.least <= each.value <= each.most]
    assert not out, f"out of bounds: {out}"


def test_no_criterion_is_declared_twice() -> None:
    names = [(each.test, each.name) for each in CRITERIA]
    assert len(set(names)) == len(names)


def test_overrides_are_remembered_for_the_records(tmp_path: Any) -> None:
    path = tmp_path / "criteria.toml"
    path.write_text("[test_sustained_high_memory_usage]\ngrowth_rate = 0.5\nduration_s = 30\n")
    criteria = Criteria.load(path)
    assert criteria.overridden == {
        "test_sustained_high_memory_usage.growth_rate": 0.5,
        "test_sustained_high_memory_usage.duration_s": 30.0,
    }
    assert criteria.duration_s("test_sustained_high_memory_usage") == 30.0


# Groups, profiles and the times of recoveries: what a report is made by.

TESTS = list(dict.fromkeys(each.test for each in CRITERIA))


def _marks() -> dict[str, set[str]]:
    """Give the marks of every test of the qualification, its own and those of its class, as they are written."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for group in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(group, ast.ClassDef):
                continue
            for test in group.body:
                if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                    written = [*group.decorator_list, *test.decorator_list]
                    marks = (re.match(r"pytest\.mark\.(\w+)", ast.unparse(each)) for each in written)
                    found[test.name] = {each[1] for each in marks if each}
    return found


def test_every_test_is_in_one_group() -> None:
    grouped = [test for tests in GROUPS.values() for test in tests]
    assert sorted(grouped) == sorted(TESTS), f"in none, or in two: {set(TESTS) ^ set(grouped)}, {len(grouped)} in all"
    assert all(test in GROUPS[group_of(test) or ""] for test in TESTS)
    assert group_of("test_of_nobody") is None


def test_what_a_test_needs_is_what_its_marks_say() -> None:
    needed: dict[str, tuple[str, ...]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for group in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(group, ast.ClassDef):
                continue
            for test in group.body:
                if isinstance(test, ast.FunctionDef):
                    written = " ".join(map(ast.unparse, [*group.decorator_list, *test.decorator_list]))
                    if names := re.findall(r"pytest\.mark\.needs\('(\w+)'\)", written):
                        needed[test.name] = tuple(names)
    assert needed == NEEDS


def test_the_profiles_are_what_the_marks_select() -> None:
    """What is not slow is quick; of the slow ones, those of the sweep are of the sweep, and all others of the soak."""
    marks = _marks()
    assert set(marks) == set(TESTS), f"with marks or criteria only: {set(marks) ^ set(TESTS)}"
    by_marks = {
        test: "quick" if "slow" not in its else "sweep" if "sweep" in its else "soak" for test, its in marks.items()
    }
    wrong = {test: (profile_of(test), profile) for test, profile in by_marks.items() if profile_of(test) != profile}
    assert not wrong, f"profiles as named, and by the marks: {wrong}"
    assert set(PROFILES) == set(by_marks.values())


def test_the_times_of_recoveries_are_criteria_in_seconds() -> None:
    timed = {each.name for each in CRITERIA if each.unit == "s"}
    assert set(RECOVERY_TIMES) == timed, (
        f"in seconds, or a time to recover, and not both: {set(RECOVERY_TIMES) ^ timed}"
    )
    assert all(each.relation == "<" for each in CRITERIA if each.name in RECOVERY_TIMES), "one has no upper limit"
    assert all(each.unit == "s" for each in CRITERIA if each.name in RECOVERY_TIMES), "one is not in seconds"
