"""Criteria and the judge: what holds, what fails, and that nothing is forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from backends.contract import FaultRecord, Provenance
from qualification.criteria import CRITERIA, PARAMETERS, Criteria, Criterion
from qualification.judge import Judge

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
