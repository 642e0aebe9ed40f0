"""The plugin's own rules, where no run is needed to see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qualification import history, records
from qualification.criteria import CRITERIA
from qualification.plugin import _from_root
from qualification.run import ROOT
from tests.meta.qualifying import qualify

SWEEP = "tests/test_fault_sweep.py"
SAMPLE = f"{SWEEP}::TestFaultSweep::test_fault_sweep_sample"


def test_the_paths_of_a_repeat_command_are_those_of_the_root(tmp_path: Path) -> None:
    assert _from_root(ROOT, "tests/meta/broken.py") == "tests/meta/broken.py"
    assert _from_root(ROOT / "tests", "meta/broken.py") == "tests/meta/broken.py"
    assert _from_root(ROOT / "tests", Path("../README.md")) == "README.md"
    assert _from_root(tmp_path, "mine.py") == str(tmp_path.resolve() / "mine.py")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "coffee/host/transient/1",
            "expected SCENARIO/TARGET/MODE/NUMBER, begun by one of start/host, start/runtime, ",
        ),
        ("feed/host/often/1", "after feed/host expected /transient or /persistent, and / with a number from 1"),
        ("feed/host/transient/0", "after feed/host expected /transient or /persistent, and / with a number from 1"),
        ("feed/host/transient/first", "after feed/host expected /transient or /persistent, and / with a number from 1"),
    ],
)
def test_what_names_no_point_of_the_sweep_is_a_usage_error(tmp_path: Path, name: str, expected: str) -> None:
    outcome = qualify(tmp_path / "results", SWEEP, "--point", name)
    assert outcome.status == 4, f"pytest ended with {outcome.status}: {outcome.output}"
    assert f"argument --point: --point {name}: {expected}" in outcome.output, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    assert not (tmp_path / "results").exists(), "a run that was refused left results"


@pytest.mark.parametrize("share", ["0/2", "3/2", "x", "1/", "1/2/3", "1/1001"])
def test_what_is_no_share_of_the_sweep_is_a_usage_error(tmp_path: Path, share: str) -> None:
    outcome = qualify(tmp_path / "results", SWEEP, f"--shard={share}")
    assert outcome.status == 4, f"pytest ended with {outcome.status}: {outcome.output}"
    expected = f"argument --shard: {share!r}: expected K/N, a share from 1 to N and their number, at most 1000, such as"
    assert expected in outcome.output, outcome.output


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"CC": "/nonexistent/cc"},
            "there is no C compiler (/nonexistent/cc) to compile interposer.c with: install one",
        ),
        ({"LD_PRELOAD": "libm.so.6"}, "LD_PRELOAD is libm.so.6 already"),
    ],
    ids=["no compiler", "LD_PRELOAD"],
)
def test_where_nothing_can_be_refused_the_sweep_is_not_run_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str
) -> None:
    for name, value in {**environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    outcome = qualify(tmp_path / "results", SAMPLE, "--backend", "cpu")
    assert outcome.status == 0 and "1 not run" in outcome.output, f"status {outcome.status}: {outcome.output}"
    assert f"NOT RUN {SAMPLE} - {reason}" in outcome.output, f"the reason is not told: {outcome.output}"
    (written,) = (tmp_path / "results").glob("*.jsonl")
    found = records.read(written)
    verdicts = {each["verdict"] for each in found.criteria}
    assert verdicts == {"not_run"} and not found.sweeps, f"verdicts {verdicts}, sweeps {found.sweeps}"


# How each test ended, in the records.

#: Tests by the names that have criteria; what each does is all that the plugin sees of it.
ENDINGS = """
import time

import pytest

from backends.contract import FaultPlan, Site

GOOD = {"<": lambda limit: limit / 2, "<=": float, "==": float, ">=": float, ">": lambda limit: limit + 1}


def keep(judge):
    for each in judge.criteria:
        judge(each.name, GOOD[each.relation](each.limit))


@pytest.fixture
def falls_over():
    yield
    raise OSError("the lights went out")


def test_memory_allocation_stress(judge, new_backend, new_subject, new_sampler):
    new_backend(64_000_000)
    subject = new_subject(None)
    subject.tell("oom_detected")
    new_sampler(subject)
    time.sleep(0.02)
    subject.tell("cpu_fallback")
    subject.tell("a kind of its own: secret words")
    judge.say("what was seen")
    keep(judge)


def test_oom_detection(judge, falls_over):
    keep(judge)


def test_oom_during_recovery(judge):
    judge("samples_lost", 0)
    raise ValueError("it went wrong")


def test_recovery_success_rate(judge):
    pytest.skip("not run: no time for that")


@pytest.mark.needs("device_error")
def test_cuda_error_recovery(judge, backend):
    backend.arm(FaultPlan(Site.DEVICE_ERROR))
    keep(judge)
"""
#: It tells of what it is told to, when that happens.
TELLING = """
import time
from types import SimpleNamespace


class Telling:
    def __init__(self, context):
        self.told = []

    def tell(self, kind):
        self.told.append(SimpleNamespace(kind=kind, time_s=time.time(), message="secret words"))

    def events(self):
        return self.told

    def process_ids(self):
        return []

    def close(self):
        pass


factory = Telling
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run in which tests end in every way that there is."""
    folder = tmp_path_factory.mktemp("endings")
    (folder / "test_endings.py").write_text(ENDINGS)
    (folder / "telling.py").write_text(TELLING)
    options = ("-c", "pytest_memory.ini", "--backend", "cpu", "--subject", f"{folder / 'telling.py'}:factory")
    run = qualify(folder / "results", str(folder / "test_endings.py"), *options)
    assert run.status == 1, f"status {run.status}: {run.output[-2000:]}"
    return folder / "results"


@pytest.fixture(scope="module")
def record(ended: Path) -> records.Record:
    (path,) = ended.glob("*.jsonl")
    return records.read(path)


def test_every_test_has_a_line_that_says_how_it_ended(record: records.Record) -> None:
    found = {each["test"]: each["outcome"] for each in record.tests}
    assert found == {
        "test_memory_allocation_stress": "passed",
        "test_oom_detection": "failed",
        "test_oom_during_recovery": "failed",
        "test_recovery_success_rate": "not_run",
        "test_cuda_error_recovery": "not_run",
    }
    assert [each["id"] for each in record.tests] == record.run["collected"], "not each of them, in order"
    assert all(each["duration_s"] >= 0 and each["taken_from"] is None for each in record.tests)
    for each in record.tests:
        begin = f"python -m pytest {each['id']} --backend cpu --subject "
        assert each["repeat"].startswith(begin), f"{each['repeat']} does not begin with {begin}"


def test_one_that_fails_only_when_it_is_torn_down_failed(record: records.Record) -> None:
    """Its criteria hold, and so does nothing that a criterion says turn it red."""
    verdicts = {each["verdict"] for each in record.criteria if each["test"] == "test_oom_detection"}
    (outcome,) = (each["outcome"] for each in record.tests if each["test"] == "test_oom_detection")
    assert (verdicts, outcome) == ({"pass"}, "failed")


def test_what_a_test_did_not_come_to_is_a_failure_with_its_reason(record: records.Record) -> None:
    lines = {each["criterion"]: each for each in record.criteria if each["test"] == "test_oom_during_recovery"}
    assert lines["samples_lost"]["verdict"] == "pass"
    assert lines["attempts"]["verdict"] == "fail"
    line = ENDINGS[: ENDINGS.index("raise ValueError")].count("\n") + 1
    expected = f"the test ended before this was measured: ValueError at test_endings.py:{line}"
    assert lines["attempts"]["reason"] == expected, "not what failed, and where"


def test_a_failure_outside_the_criteria_says_in_which_phase(record: records.Record) -> None:
    found = {each["test"]: each["failed_in"] for each in record.tests if each["failed_in"]}
    assert found == {"test_oom_detection": "teardown: OSError", "test_oom_during_recovery": "call: ValueError"}


def test_what_the_backend_cannot_is_told_apart_from_what_was_skipped(record: records.Record) -> None:
    found = {(each["test"], each["capability"]) for each in record.criteria if each["verdict"] == "not_run"}
    expected = {("test_cuda_error_recovery", "device_error"), ("test_recovery_success_rate", None)}
    assert found == expected, f"not run, and for want of which capability: {found}"
    (reason,) = {each["reason"] for each in record.criteria if each["test"] == "test_recovery_success_rate"}
    assert reason == "no time for that"


def test_a_line_has_the_events_in_the_time_of_the_series_the_limit_and_the_evidence(record: records.Record) -> None:
    (line,) = (each for each in record.tests if each["test"] == "test_memory_allocation_stress")
    assert [kind for _, kind in line["events"]] == ["cpu_fallback", "unknown"], f"{line['events']}"
    times = [t_s for t_s, _ in line["events"]]
    assert 0.015 <= times[0] <= times[1] <= line["duration_s"] + 0.1, f"told at {times}"
    assert line["events_told"] == 2 and line["device_limit_bytes"] == 64_000_000
    assert line["evidence"] == ["what was seen"]
    others = [each for each in record.tests if each is not line]
    assert all(each["events"] == [] for each in others)
    assert "secret words" not in str(record), "the words of an event are in the record"


def test_each_criterion_is_judged_by_what_its_line_says(record: records.Record) -> None:
    declared = {(each.test, each.name): (each.relation, each.limit, each.unit) for each in CRITERIA}
    found = {
        (each["test"], each["criterion"]): (each["relation"], each["limit"], each["unit"]) for each in record.criteria
    }
    assert found == {key: declared[key] for key in found} and len(found) > 10


def test_the_summary_counts_them(ended: Path, record: records.Record) -> None:
    summary = history.last(ended / history.FILE)
    assert summary is not None and summary["verdict"] == "fail"
    assert summary["tests"] == {"collected": 5, "passed": 1, "failed": 2, "not_run": 2}
    verdicts = [each["verdict"] for each in record.criteria]
    assert summary["criteria"] == {each: verdicts.count(each) for each in ("pass", "fail", "not_run")}
    failed = [(each["test"], each["criterion"]) for each in record.criteria if each["verdict"] == "fail"]
    assert [(each["test"], each["criterion"]) for each in summary["failed"]] == failed


# A disk that is full when the run ends.

#: The record's last line meets a device that is always full. All before it is on the disk.
FULL = """
import os
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    for link in Path("/proc/self/fd").iterdir():
        if os.path.realpath(link).endswith(".jsonl"):
            os.dup2(os.open("/dev/full", os.O_WRONLY), int(link.name))
"""
GOOD = """
import pytest


def test_recovery_success_rate(judge):
    pytest.skip("not run: no time for that")
"""


def test_a_record_that_cannot_be_ended_fails_the_run_which_is_published_as_that(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(FULL)
    path, told = tmp_path / "test_good.py", tmp_path / "told.json"
    path.write_text(GOOD)
    options = ("-c", "pytest_memory.ini", "--backend", "cpu", "--on-finish", f"tee {told}")
    run = qualify(tmp_path / "results", str(path), *options, ended=False)
    assert run.status == 1 and "Traceback" not in run.output, f"status {run.status}: {run.output[-2000:]}"
    (written,) = (tmp_path / "results").glob("*.jsonl")
    note = f"the records have no end: {written}: line "
    assert note in run.output and "cannot be written: No space left on device" in run.output, run.output[-2000:]
    assert not records.read(written, partial=True).complete
    summary = history.last(tmp_path / "results" / history.FILE)
    assert summary is not None and (summary["verdict"], summary["exit_status"]) == ("fail", 1), f"{summary}"
    assert json.loads(told.read_text()) == summary, "the hook was told something else"
