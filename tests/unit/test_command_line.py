"""``python -m qualification``: what it lists, runs, refuses and says of the last run, as it is typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import backends
from qualification import __version__, history, records
from qualification.__main__ import main
from qualification.criteria import CRITERIA, group_of, profile_of
from qualification.profiles import SELECTIONS

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "qualification"]
QUICK = "tests/test_oom_recovery.py::TestOOMDetection::test_oom_detection"
#: A cell has no hypothesis, whose plugin takes longer to import than tests to collect.
ENVIRONMENT = {**os.environ, "PYTEST_ADDOPTS": "-p no:hypothesispytest -p no:cacheprovider"}


def typed(*words: str, timeout_s: float = 700) -> subprocess.CompletedProcess[str]:
    """Run the command in the checkout."""
    return subprocess.run(
        [*COMMAND, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def refused(*words: str) -> str:
    """Run a command that cannot do anything, and give its error."""
    done = typed(*words)
    assert done.returncode == 2, f"status {done.returncode}, expected 2: {done.stdout}{done.stderr}"
    assert done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    return done.stderr


# list.


def test_the_list_is_what_the_backends_and_the_criteria_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == __version__
    expected = [
        {
            "backend": declared.name,
            "environments": list(declared.environments),
            "available": availability.available,
            "runtime": availability.runtime if availability.available else None,
            "reason": None if availability.available else availability.reason,
        }
        for declared, availability in backends.available()
    ]
    assert found["backends"] == expected
    assert all(each["runtime"] if each["available"] else each["reason"] for each in found["backends"])
    listed = [tuple(each.values()) for each in found["criteria"]]
    assert listed == [
        (one.test, one.name, profile_of(one.test), group_of(one.test), one.relation, one.limit, one.unit, one.promise)
        for one in CRITERIA
    ]
    assert list(found["criteria"][0]) == [
        *("test", "criterion", "profile", "group", "relation", "limit", "unit", "promise")
    ], f"a criterion has the fields {list(found['criteria'][0])}"


def test_the_list_for_people_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for declared, availability in backends.available():
        state = availability.runtime if availability.available else availability.reason
        assert any(declared.name in line and state in line for line in lines), f"{declared.name} is not in {lines[:8]}"
    for each in CRITERIA:
        shown = f"    {each.name:<26} {each.limit_text:<34} {each.promise}"
        assert shown in lines, f"there is no line {shown!r}"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [*COMMAND, "list", "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as listing:
        assert listing.stdout is not None and listing.stderr is not None
        listing.stdout.close()
        assert "Traceback" not in (said := listing.stderr.read()), said


# run: which tests.


def collected(*words: str) -> list[str]:
    """Give the names of the tests that a run would have."""
    done = typed("run", "--backend", "cpu", *words, "--collect-only", "-q")
    assert done.returncode in (0, 5), f"status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return sorted(set(re.findall(r"<Function (\w+)", done.stdout)))


@pytest.mark.parametrize("profile", SELECTIONS)
def test_a_profile_is_the_tests_that_the_criteria_say(profile: str, tmp_path: Path) -> None:
    # The soak is all but the whole sweep.
    expected = {"quick": ("quick",), "sweep": ("sweep",), "soak": ("quick", "soak")}[profile]
    tests = sorted({each.test for each in CRITERIA if profile_of(each.test) in expected})
    found = collected("--profile", profile, "--results", str(tmp_path / "results"))
    assert found == tests, f"{profile} collects {set(found) ^ set(tests)} too many, or not"
    assert not (tmp_path / "results").exists(), "a run that only lists left results"


def test_without_a_profile_it_is_the_quick_one() -> None:
    assert collected("-k", "test_oom_detection or soak") == ["test_oom_detection"]


def test_marks_narrow_a_profile_and_never_widen_it() -> None:
    marked = collected("-m", "sweep or stress")
    assert marked == ["test_fault_sweep_sample", "test_memory_allocation_stress", "test_sustained_high_memory_usage"]


# run: what is refused.


def test_an_unknown_backend_is_refused_by_name(tmp_path: Path) -> None:
    done = typed("run", "--backend", "cpuu", "--results", str(tmp_path / "results"))
    assert done.returncode == 4, f"status {done.returncode}: {done.stdout}"
    assert "--backend cpuu: " in done.stderr and "cpu" in done.stderr.split("--backend cpuu: ")[1], done.stderr
    assert not (tmp_path / "results").exists()


def test_what_is_no_command_is_refused() -> None:
    assert "the following arguments are required: --backend" in refused("run")
    assert "invalid choice: 'slow'" in refused("run", "--backend", "cpu", "--profile", "slow")
    assert "unrecognized arguments: --jsn" in refused("list", "--jsn")
    assert "unrecognized arguments: --backend cpu" in refused("status", "--backend", "cpu")
    assert "invalid choice: 'qualify'" in refused("qualify")
    assert "required: command" in refused()


def test_an_option_that_pytest_does_not_know_is_its_own_error() -> None:
    done = typed("run", "--backend", "cpu", "--no-such-option")
    assert done.returncode == 4 and "unrecognized arguments: --no-such-option" in done.stderr, done.stderr


# run: what it leaves.


def test_a_run_leaves_a_record_a_row_and_tells_the_command(tmp_path: Path) -> None:
    results, told = tmp_path / "results", tmp_path / "told; touch x"
    save = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    done = typed(
        *("run", "--backend", "cpu", "--profile", "quick", "-k", "test_oom_detection", "--results", str(results)),
        *("--lock-wait", "600", "--history-key", "mine", "--on-finish", sys.executable, "-c", save, str(told)),
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    (path,) = results.glob("*.jsonl")
    record, summary = records.read(path), history.last(results / history.FILE, "mine")
    assert summary is not None and json.loads(told.read_text()) == summary, "the command was told something else"
    assert (summary["kind"], summary["verdict"], summary["exit_status"]) == ("run", "not_run", 0)
    assert summary["reason"] == "1 tests: no whole profile (quick, soak, sweep)", (
        "one test is no pass of the quick ones"
    )
    assert summary["record"] == str(path) and summary["began"] == record.run["began"]
    assert summary["tests"] == {"collected": 1, "passed": 1, "failed": 0, "not_run": 0}
    assert summary["criteria"] == {"pass": len(record.criteria), "fail": 0, "not_run": 0} and not summary["failed"]
    assert [each["id"] for each in record.tests] == record.run["collected"] == [QUICK]
    shared = ("suite_sha256", "suite_commit", "subject", "subject_sha256", "backend", "environment", "runtime")
    assert [summary[name] for name in shared] == [record.run[name] for name in shared]
    assert summary["machine"]["id"] == record.run["machine"]["id"]
    assert record.ended and record.run["began"] <= record.ended <= summary["finished"]
    shown = typed("status", "--history", str(results / history.FILE), "--key", "mine")
    assert (shown.returncode, json.loads(shown.stdout)) == (1, summary)
    reports = typed("status", "--history", str(results / history.FILE), "--key", "mine", "--kind", "report")
    assert reports.returncode == 2 and "no report has finished" in reports.stderr


def test_a_run_that_fails_says_what_and_ends_with_pytests_status(tmp_path: Path) -> None:
    results, criteria = tmp_path / "results", tmp_path / "criteria.toml"
    criteria.write_text("[test_oom_detection]\nooms_undetected = 1\n")
    done = typed(
        *("run", "--backend", "cpu", "-k", "test_oom_detection", "--results", str(results), "--lock-wait", "600"),
        *("--criteria", str(criteria), "--on-finish", sys.executable, "-c", "raise SystemExit(7)"),
    )
    assert done.returncode == 1, f"status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert f"--on-finish {sys.executable}: it ended with 7" in done.stdout, "that the command failed is not said"
    summary = history.last(results / history.FILE)
    assert summary is not None and (summary["verdict"], summary["exit_status"]) == ("fail", 1)
    assert summary["tests"] == {"collected": 1, "passed": 0, "failed": 1, "not_run": 0}
    (failed,) = summary["failed"]
    found = tuple(failed[name] for name in ("test", "criterion", "value", "relation", "limit", "unit"))
    assert found == ("test_oom_detection", "ooms_undetected", 0, "==", 1, "OOMs"), f"{failed}"
    shown = typed("status", "--history", str(results / history.FILE))
    assert shown.returncode == 1 and json.loads(shown.stdout) == summary


def test_after_ctrl_c_the_record_is_whole_and_the_status_is_no_pass(tmp_path: Path) -> None:
    results = tmp_path / "results"
    words = ["run", "--backend", "cpu", "-k", "test_worker_hang", "--results", str(results), "--lock-wait", "600"]
    run = subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, process_group=0
    )
    try:
        deadline_s = time.monotonic() + 650
        while not list(results.glob("*.jsonl")) and run.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.1)
        time.sleep(1)  # into the test
        os.killpg(run.pid, signal.SIGINT)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 2, f"status {run.returncode}: {said[-2000:]}"
    (path,) = results.glob("*.jsonl")
    record, summary = records.read(path), history.last(results / history.FILE)
    assert record.complete and not record.tests, f"it was cut off, and has {len(record.tests)} tests"
    assert summary is not None and (summary["verdict"], summary["exit_status"]) == ("fail", 2), f"{summary}"


# status.


@pytest.mark.parametrize(("verdict", "status"), [("pass", 0), ("fail", 1), ("not_run", 1)])
def test_the_status_is_the_last_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verdict: str, status: int
) -> None:
    path, summary = tmp_path / "history.sqlite", {"finished": "now", "verdict": verdict, "more": [1, {"x": None}]}
    history.store(path, history.KEY, {"finished": "before", "verdict": "pass"})
    history.store(path, history.KEY, summary)
    assert main(["status", "--history", str(path)]) == status
    assert json.loads(capsys.readouterr().out) == summary


def test_where_there_is_no_status_the_error_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "history.sqlite", tmp_path / "other"
    other.write_text("no database " * 100)
    assert main(["status", "--history", str(path)]) == 2
    history.store(path, history.KEY, {"finished": "now", "verdict": "pass"})
    assert main(["status", "--history", str(path), "--key", "mine"]) == 2
    assert main(["status", "--history", str(other)]) == 2
    out, said = capsys.readouterr()
    assert out == "", f"something was printed as a status: {out}"
    assert said.splitlines() == [
        f"error: {path}: there is no history; a run makes it",
        f"error: {path}: no run has finished under the key 'mine'",
        f"error: {other}: the status cannot be read: file is not a database",
    ]


# report: what is refused.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder without records: a report on it is red, and can be made."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def test_without_records_the_report_is_red_and_not_refused(folder: Path) -> None:
    done = typed("report", str(folder))
    assert done.returncode == 1, f"status {done.returncode}: {done.stdout}{done.stderr}"
    assert (folder / "report" / "report.json").is_file() and "NOT QUALIFIED" in done.stderr


def test_what_no_report_can_be_made_of_is_refused(folder: Path, tmp_path: Path) -> None:
    none, gate, earlier = tmp_path / "none", tmp_path / "gate.toml", tmp_path / "report.json"
    gate.write_text('cells = ["cpuu/cpu"]\nprofiles = ["quick"]\n')
    earlier.write_text("{}")
    results = str(folder)
    assert f"error: {none}: there is no such folder" in refused("report", str(none))
    assert f"error: the gate {none} cannot be read" in refused("report", results, "--gate", str(none))
    assert "no cell is 'cpuu/cpu': did you mean cpu/cpu" in refused("report", results, "--gate", str(gate))
    assert f"--against {none}: it cannot be read" in refused("report", results, "--against", str(none))
    assert f"--against {earlier}: it is no report" in refused("report", results, "--against", str(earlier))
    assert not list(folder.iterdir()), f"a report that was refused left {[each.name for each in folder.iterdir()]}"
    out = tmp_path / "report.json" / "here"
    assert f"error: --out {out}: the report cannot be written: " in refused("report", results, "--out", str(out))
    assert history.last(folder / history.FILE)["verdict"] == "fail", "it was judged, and nobody can read it"  # type: ignore[index]


def test_the_commands_of_its_description_are_understood() -> None:
    import qualification.__main__ as described

    shown = [line for line in (described.__doc__ or "").splitlines() if line.startswith("python -m ")]
    assert len(shown) == 4, f"it shows {shown}"
    for line in shown:
        command = shlex.split(line)[3]
        done = typed(command, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m qualification {command}"), done.stderr
