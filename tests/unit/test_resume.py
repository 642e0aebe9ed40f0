"""A run that was cut off goes on where it ended, test by test, and never where anything was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qualification import records
from tests.meta.interrupting import BEFORE
from tests.meta.qualifying import RECOVERY, Outcome, qualify

FIRST = f"{RECOVERY}::TestOOMDetection::test_oom_detection"
SECOND = f"{RECOVERY}::TestDataPreservation::test_audio_buffer_preservation"
ARGUMENTS = (FIRST, SECOND, "--backend", "cpu", "--resume", "-p", "interrupting")


def _kept(results: Path) -> list[Path]:
    return list(results.glob("unfinished-*-tests.json"))


@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of a run that was interrupted between its two tests, of which the first is broken."""
    results = tmp_path / "results"
    monkeypatch.setenv(BEFORE, "test_audio_buffer_preservation")
    run = qualify(results, *ARGUMENTS, "--subject", "tests/meta/broken.py:counts_no_ooms")
    monkeypatch.delenv(BEFORE)
    assert run.status == 2, f"status {run.status}: {run.output[-2000:]}"
    (path,) = _kept(results)
    assert path.stat().st_mode & 0o777 == 0o600
    return results


def _by_test(run: Outcome, name: str) -> list[dict[str, Any]]:
    return [each for each in run.criteria if each["test"] == name]


def _resumed(record: records.Record) -> list[str]:
    return [each["file"] for each in record.run["resumes"]]


def test_what_was_measured_is_taken_and_the_rest_is_run(cut_off: Path) -> None:
    """A failure stays one. Each verdict that was taken says so, and the record is whole."""
    run = qualify(cut_off, *ARGUMENTS, "--subject", "tests/meta/broken.py:counts_no_ooms")
    assert run.status == 1 and "1 tests were not run again" in run.output, run.output[-2000:]
    taken, measured = (_by_test(run, name) for name in ("test_oom_detection", "test_audio_buffer_preservation"))
    assert {each["criterion"] for each in taken if each["verdict"] == "fail"} == {"ooms_uncounted"}
    assert all("measured by the run that was cut off" in each["reason"] for each in taken), f"{taken}"
    assert measured and not any("cut off" in each["reason"] for each in measured)
    oldest, newest = sorted(cut_off.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    record = records.read(newest)
    assert record.complete and _resumed(record) == [oldest.name], f"it goes on with {record.run['resumes']}"
    assert [(each["id"], each["outcome"], each["taken_from"]) for each in record.tests] == [
        (FIRST, "failed", oldest.name),
        (SECOND, "passed", None),
    ]
    assert not _kept(cut_off), "what is finished is kept"


def test_another_subject_begins_anew(cut_off: Path) -> None:
    run = qualify(cut_off, *ARGUMENTS, "--subject", "tests/meta/broken.py:healthy")
    assert run.status == 0 and "not run again" not in run.output, run.output[-2000:]
    assert not any("cut off" in each["reason"] for each in run.criteria)
    newest = records.read(max(cut_off.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns))
    assert [each["taken_from"] for each in newest.tests] == [None, None] and newest.run["resumes"] == []


def test_what_was_taken_keeps_the_record_that_measured_it(cut_off: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off again before anything new was measured: the third run still names the first one's record."""
    first, broken = next(cut_off.glob("*.jsonl")).name, ("--subject", "tests/meta/broken.py:counts_no_ooms")
    monkeypatch.setenv(BEFORE, "test_audio_buffer_preservation")
    assert qualify(cut_off, *ARGUMENTS, *broken).status == 2
    monkeypatch.delenv(BEFORE)
    assert qualify(cut_off, *ARGUMENTS, *broken).status == 1
    *before, newest = sorted(cut_off.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    record = records.read(newest)
    assert [each["taken_from"] for each in record.tests] == [first, None]
    assert sorted(_resumed(record)) == sorted(path.name for path in before), f"{record.run['resumes']}"
