"""The report: red unless proven, grey where it is not run, and the same however the records are merged."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

import backends
from qualification import history
from qualification.criteria import CRITERIA, GROUPS, SLOW_PROFILES
from qualification.identity import ROOT
from qualification.records import write_not_run
from qualification.report import against, gate
from qualification.report.command import timelines
from qualification.report.gate import GateError, Thresholds
from qualification.report.gather import Evidence, GatherError, gather
from qualification.report.junit import junit
from qualification.report.markdown import markdown
from qualification.report.page import page
from qualification.report.verdict import CHECKLIST, report
from tests.unit.recording import (
    CPU,
    CRITERION,
    EVERYTHING,
    PAIRS,
    TEST,
    TESTS,
    cell,
    failing,
    forge,
    good,
    made_of,
    named,
    run_line,
    write,
)

SCHEMA = json.loads((ROOT / "qualification" / "report" / "report.schema.json").read_text(encoding="utf-8"))
#: Nothing of a report's own may be read as an instruction.
HOSTILE = "<script>alert('x')</script> ]]> `code` | [a](http://b) @someone \x00\x1b[31m\n# not a heading"


def command(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command that makes a report, in the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "qualification", "report", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def everything(folder: Path, machine: str = "north") -> None:
    """Write a record of every declared cell."""
    for number, (backend, environment) in enumerate(PAIRS):
        write(folder, backend, environment, machine, number=number)


# What is proven is green.


def test_a_whole_record_of_every_cell_passes(tmp_path: Path) -> None:
    everything(tmp_path)
    made = made_of(EVERYTHING, tmp_path)
    assert (made["verdict"], made["reasons"]) == ("pass", [])
    assert {(each["backend"], each["environment"]) for each in made["cells"]} == set(PAIRS)
    assert {each["verdict"] for each in made["cells"]} == {"pass"}
    assert len(made["cells"][0]["criteria"]) == len(CRITERIA)


def test_the_profiles_may_be_in_records_of_their_own(tmp_path: Path) -> None:
    slow = {test for tests in SLOW_PROFILES.values() for test in tests}
    write(tmp_path, tests=[test for test in TESTS if test not in slow], number=1)
    for number, tests in enumerate(SLOW_PROFILES.values(), 2):
        write(tmp_path, tests=tests, number=number)
    made = made_of(CPU, tmp_path)
    assert made["verdict"] == "pass", made["reasons"]
    assert len(cell(made)["records"]) == 3


def test_what_a_backend_states_it_cannot_is_grey_and_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path)
    made = made_of(CPU, tmp_path)
    assert cell(made)["groups"]["CUDA errors"] == {
        "verdict": "cannot",
        "passed": 0,
        "failed": 0,
        "not_run": 0,
        "cannot": 9,
    }
    assert made["verdict"] == "pass"
    item = next(each for each in made["checklist"] if each["item"].startswith("CUDA"))
    assert item["verdict"] == "not_run", "no cell can show it, so it stays open"


# Red unless proven: each of these turns the report red, and it says why.


def deleted(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def cut_at_a_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))


def copied_over_another_cell(path: Path) -> None:
    shutil.copy(path, path.with_name(path.name.replace("cpu-cpu", "cuda12-torch-cuda")))


def copied_beside_itself(path: Path) -> None:
    shutil.copy(path, path.with_name(path.name.replace("-1.jsonl", "-2.jsonl")))


def renamed(path: Path) -> None:
    path.rename(path.with_name("mine.jsonl"))


def edited_by_hand(path: Path) -> None:
    text = path.read_text()
    failed = '"criterion":"success_rate","verdict":"fail"'
    assert failed in text, "there is nothing to edit"
    path.write_text(text.replace(failed, failed.replace("fail", "pass")))


def edited_with_its_chain(path: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields.get("verdict") == "fail":
            fields["verdict"] = "pass"

    forge(path, edit)


def limit_moved_with_its_chain(path: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields.get("criterion") == CRITERION:
            fields |= {"verdict": "pass", "limit": 10.0}

    forge(path, edit)


def of_another_suite(path: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields["kind"] == "run":
            fields["suite_sha256"] = "f" * 64

    forge(path, edit)


def of_another_subject(path: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields["kind"] == "run":
            fields["subject_sha256"] = "f" * 64

    forge(path, edit)


def of_an_older_schema(path: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields["kind"] == "run":
            fields["schema_version"] = 1

    forge(path, edit)


def of_a_cell_that_is_not_declared(path: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if "backend" in fields:
            fields["backend"] = "abacus"

    forge(path, edit)
    path.rename(path.with_name(path.name.replace("cpu-cpu", "cpu-abacus")))


def with_a_line_of_another_cell(path: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields["kind"] == "criterion":
            fields["backend"] = "torch-cpu"

    forge(path, edit)


def zero_tests(path: Path) -> None:
    path.unlink()
    write(path.parent, tests=[])


def fewer_than_collected(path: Path) -> None:
    path.unlink()
    write(path.parent, collected=[*(f"tests/test_file.py::Test::{test}" for test in TESTS), "tests/a.py::T::test_b"])


def without_a_verdict(path: Path) -> None:
    path.unlink()
    write(path.parent, change=lambda fields: None if fields["criterion"] == CRITERION else fields)


def no_json(path: Path) -> None:
    path.write_text("not a record\n")


def empty(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (deleted, "no record of cpu in cpu"),
        (truncated, "truncated"),
        (cut_at_a_line, "truncated"),
        (copied_over_another_cell, "its name is of torch-cuda in cuda12, and its first line of cpu in cpu"),
        (copied_beside_itself, "it is the same run as cpu-cpu-20261127T100000-1.jsonl"),
        (renamed, "its name is not that of a record"),
        (of_another_suite, "another version of the suite"),
        (of_another_subject, "another version of the subject"),
        (of_an_older_schema, "another version of the suite: its schema is 1"),
        (of_a_cell_that_is_not_declared, "abacus in cpu, which is not declared"),
        (with_a_line_of_another_cell, "is of torch-cpu in cpu, and its first line of cpu in cpu"),
        (zero_tests, "zero tests"),
        (fewer_than_collected, "fewer results than collected: 32 of 33 tests, without tests/a.py::T::test_b"),
        (without_a_verdict, f"fewer results than collected: {TEST}/{CRITERION} has no verdict"),
        (no_json, "line 1: it is not JSON"),
        (empty, "truncated"),
    ],
)
def test_what_is_spoilt_turns_it_red_and_it_says_why(tmp_path: Path, spoil: Callable[[Path], None], why: str) -> None:
    path = write(tmp_path)
    assert made_of(CPU, tmp_path)["verdict"] == "pass"
    spoil(path)
    made = made_of(CPU, tmp_path)
    assert made["verdict"] == "fail"
    assert any(why in reason for reason in made["reasons"]), made["reasons"]


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (edited_by_hand, "altered"),
        (edited_with_its_chain, "it is said to have passed with 10.0, and the limit is >= 95 %"),
        (limit_moved_with_its_chain, "it was judged by >= 10.0, and the limit is >= 95 %"),
    ],
)
def test_a_verdict_edited_by_hand_stays_red(tmp_path: Path, edit: Callable[[Path], None], why: str) -> None:
    path = write(tmp_path, change=failing(TEST, CRITERION, 10.0))
    assert "success_rate failed" in made_of(CPU, tmp_path)["reasons"][0]
    edit(path)
    made = made_of(CPU, tmp_path)
    assert made["verdict"] == "fail"
    assert any(why in reason for reason in made["reasons"]), made["reasons"]


@pytest.mark.parametrize("seed", range(16))
def test_whatever_a_record_holds_there_is_a_report(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    wrong: Any = chance.choice([None, -1, 10**400, 1.7e308, 1e300, True, 1.5, "x", HOSTILE, [], {}, [[]], {"a": []}])
    target = chance.randrange(1, 60)
    changed: list[str] = []

    def edit(fields: dict[str, Any]) -> None:
        nonlocal target
        target -= 1
        if target:
            return
        name = chance.choice([name for name in fields if name not in ("kind", "previous")])
        if fields[name] != wrong:
            changed.append(f"{fields['kind']}.{name}: {fields[name]!r:.50} -> {wrong!r:.50}")
            fields[name] = wrong

    series = {"uss_bytes": [[0.0, 1e6], [1.0, 2e6]]}
    forge(write(tmp_path, change=lambda fields: {**fields, "series": series}), edit)
    made = made_of(CPU, tmp_path)
    for each in (json.dumps, junit, markdown):
        assert each(made)
    assert page(made, timelines(gather([tmp_path]), made))
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert [error.message for error in validator.iter_errors(json.loads(json.dumps(made)))] == [], changed


def test_a_fault_that_never_fired_is_no_pass(tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "points_seen": 7} if fields["criterion"] == CRITERION else fields

    write(tmp_path, change=change)
    assert "none of 7 faults fired" in made_of(CPU, tmp_path)["reasons"][0]


def test_a_test_that_failed_outside_its_criteria_is_red(tmp_path: Path) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields["kind"] == "test" and fields["test"] == TEST:
            fields["outcome"] = "failed"

    forge(write(tmp_path), edit)
    made = made_of(CPU, tmp_path)
    assert f"{TEST}/ended_in_order failed: nothing, limit none (it failed outside its criteria)" in made["reasons"][0]
    (failure,) = cell(made)["failures"]
    assert failure["promised"] == "The test comes to its end in order" and TEST in failure["repeat"]
    assert cell(made)["groups"]["metrics"]["verdict"] == "fail"


def test_a_profile_that_was_not_run_is_red_where_the_gate_asks_for_it(tmp_path: Path) -> None:
    write(tmp_path, tests=[test for test in TESTS if test not in SLOW_PROFILES["sweep"]])
    made = made_of(CPU, tmp_path)
    assert "no record of test_fault_sweep, test_device_fault_sweep, of the profile sweep" in made["reasons"][0]
    assert made_of(replace(CPU, profiles=("quick", "soak")), tmp_path)["verdict"] == "pass"


def test_one_failure_counts_however_often_it_passed(tmp_path: Path) -> None:
    write(tmp_path, number=1, change=failing(TEST, CRITERION, 10.0), began="2026-11-27T09:00:00+00:00")
    write(tmp_path, number=2)
    (reason,) = made_of(CPU, tmp_path)["reasons"]
    assert "success_rate failed, in 1 of 2 runs: success_rate = 10 %, limit >= 95 %" in reason


def test_a_failure_where_it_is_not_required_is_shown_and_not_gated(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "torch-cpu", change=failing(TEST, CRITERION, 10.0))
    made = made_of(CPU, tmp_path)
    assert (made["verdict"], cell(made, "torch-cpu")["verdict"]) == ("pass", "fail")


def test_a_limit_that_was_set_is_red_unless_the_gate_says_so(tmp_path: Path) -> None:
    name = f"{TEST}.{CRITERION}"
    write(
        tmp_path,
        criteria={"source": "mine.toml", "overridden": {name: 5.0}},
        change=lambda fields: {**fields, "limit": 5.0} if fields["criterion"] == CRITERION else fields,
    )
    assert f"{name} was set to 5, which the gate does not accept" in made_of(CPU, tmp_path)["reasons"][0]
    assert made_of(replace(CPU, overridden={name: 5.0}), tmp_path)["verdict"] == "pass"
    assert made_of(replace(CPU, overridden={name: 6.0}), tmp_path)["verdict"] == "fail"


# Not run is grey.


def test_a_cell_that_is_not_run_is_grey_and_a_gate_that_requires_it_fails(tmp_path: Path) -> None:
    write(tmp_path)
    write_not_run(tmp_path, run_line("torch-cuda", "cuda12"), "no NVIDIA driver")
    made = made_of(CPU, tmp_path)
    its = cell(made, "torch-cuda", "cuda12")
    assert (its["verdict"], its["reason"], made["verdict"]) == ("not_run", "not run: no NVIDIA driver", "pass")
    required = made_of(replace(CPU, cells=("cpu/cpu", "torch-cuda/cuda12")), tmp_path)
    assert required["verdict"] == "fail"
    assert required["reasons"] == [
        "torch-cuda in cuda12 on north: not run: no NVIDIA driver (the gate requires it)",
    ]


def test_a_cell_that_one_machine_cannot_run_may_pass_on_another(tmp_path: Path) -> None:
    write_not_run(tmp_path, run_line("cpu", "cpu", "south"), "too little memory")
    write(tmp_path)
    made = made_of(CPU, tmp_path)
    assert (cell(made)["verdict"], cell(made, machine="south")["verdict"]) == ("pass", "not_run")
    assert made["verdict"] == "pass", made["reasons"]


def test_a_test_that_a_machine_does_not_permit_is_grey_and_not_proven(tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> dict[str, Any]:
        skipped = {"verdict": "not_run", "value": None, "reason": "no cgroup of our own"}
        return {**fields, **skipped} if fields["test"] == "test_oom_killer" else fields

    write(tmp_path, change=change)
    made = made_of(CPU, tmp_path)
    assert (cell(made)["verdict"], made["verdict"]) == ("not_run", "fail")
    assert "test_oom_killer/workers_spared not run: no cgroup of our own" in made["reasons"][0]
    assert made_of(replace(CPU, not_run=("test_oom_killer",)), tmp_path)["verdict"] == "pass"


def test_a_cell_that_nobody_asks_for_is_grey_without_a_record(tmp_path: Path) -> None:
    write(tmp_path)
    made = made_of(CPU, tmp_path)
    assert cell(made, "torch-cpu", "cpu", None)["verdict"] == "not_run"


# Any number of runs and machines.


def test_the_same_cell_from_two_machines_is_kept_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", machine="north")
    write(tmp_path / "b", machine="south", change=failing(TEST, CRITERION, 10.0))
    made = made_of(CPU, tmp_path / "a", tmp_path / "b")
    assert (cell(made)["verdict"], cell(made, machine="south")["verdict"]) == ("pass", "fail")
    assert "cpu in cpu on south" in made["reasons"][0], "one of two machines fails"


def test_machines_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for identifier in ("aaaa1111", "bbbb2222"):

        def edit(fields: dict[str, Any], identifier: str = identifier) -> None:
            fields.get("machine", {}).update(id=identifier)

        forge(write(tmp_path / identifier), edit)
    made = made_of(CPU, tmp_path)
    assert [each["machine"] for each in made["cells"] if each["backend"] == "cpu"] == ["north-aaaa", "north-bbbb"]


def test_merging_is_associative_and_takes_each_record_once(tmp_path: Path) -> None:
    for number, machine in enumerate(("north", "south", "west"), 1):
        write(tmp_path / machine, machine=machine, number=number)
    a, b, c = (gather([tmp_path / machine]) for machine in ("north", "south", "west"))
    assert (a + b) + c == a + (b + c) == gather([tmp_path])
    assert a + a == a and a + Evidence() == a
    made = [
        {**report(x + y + z, CPU, backends.declared()), "made": ""} for x, y, z in itertools.permutations((a, b, c))
    ]
    assert all(each == made[0] for each in made), "the order of merging shows"


def test_the_same_file_in_two_folders_is_one_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    shutil.copy(path, tmp_path / "b")
    made = made_of(CPU, tmp_path / "a", tmp_path / "b")
    assert (made["verdict"], len(cell(made)["records"])) == ("pass", 1)


def test_a_sweep_in_shares_is_whole_once_each_of_them_is_there(tmp_path: Path) -> None:
    rest = [test for test in TESTS if test != "test_fault_sweep"]
    write(tmp_path, tests=rest, number=1)
    for share, machine in ((1, "south"), (2, "west")):
        write(tmp_path, machine=machine, tests=["test_fault_sweep"], number=share + 1, shard=[share, 2])
    made = made_of(CPU, tmp_path)
    assert made["verdict"] == "pass", made["reasons"]
    (tmp_path / "cpu-cpu-20261127T100000-3.jsonl").unlink()
    made = made_of(CPU, tmp_path)
    assert made["verdict"] == "fail"
    assert any("test_fault_sweep: of 2 shares 2 missing" in reason for reason in made["reasons"]), made["reasons"]


def test_shares_of_a_sweep_alone_prove_no_cell(tmp_path: Path) -> None:
    for share in (1, 2):
        write(tmp_path, tests=["test_fault_sweep"], number=share, shard=[share, 2])
    assert made_of(CPU, tmp_path)["reasons"] == ["cpu in cpu: nothing but shares of the sweep"]


def test_a_share_lets_no_other_machine_off(tmp_path: Path) -> None:
    rest = [test for test in TESTS if test != "test_fault_sweep"]
    write(tmp_path, machine="north", number=1)
    write(tmp_path, machine="south", number=2, tests=rest)
    assert "no record of test_fault_sweep" in made_of(CPU, tmp_path)["reasons"][0]
    write(tmp_path, machine="west", number=3, tests=["test_fault_sweep"], shard=[1, 4])
    reasons = made_of(CPU, tmp_path)["reasons"]
    assert any("on south: no record of test_fault_sweep" in each for each in reasons), reasons
    assert any("on west: test_fault_sweep: of 4 shares 2, 3, 4 missing" in each for each in reasons), reasons


@pytest.mark.parametrize(
    "other", [{"runtime": "a runtime 9.0"}, {"criteria": {"overridden": {"test_fault_sweep.seed": 5.0}}}]
)
def test_shares_count_for_what_they_were_made_with(tmp_path: Path, other: dict[str, Any]) -> None:
    gate = replace(CPU, overridden={"test_fault_sweep.seed": 5.0})
    write(tmp_path, tests=[test for test in TESTS if test != "test_fault_sweep"], number=1)
    write(tmp_path, machine="south", tests=["test_fault_sweep"], number=2, shard=[1, 2])
    second = write(tmp_path, machine="west", tests=["test_fault_sweep"], number=3, shard=[2, 2])
    made = made_of(gate, tmp_path)
    assert made["verdict"] == "pass" and cell(made)["groups"]["sweep"]["verdict"] == "pass", made["reasons"]
    assert {each["verdict"] for each in made["checklist"]} == {"pass", "not_run"}
    second.unlink()
    write(tmp_path, machine="west", tests=["test_fault_sweep"], number=3, shard=[2, 2], **other)
    assert any("of 2 shares" in each for each in made_of(gate, tmp_path)["reasons"])


def test_one_point_of_a_sweep_is_not_the_sweep(tmp_path: Path) -> None:
    write(tmp_path, tests=[test for test in TESTS if test != "test_fault_sweep"], number=1)
    write(tmp_path, tests=["test_fault_sweep"], number=2, point="inference/runtime/transient/20")
    assert "it tried the point inference/runtime/transient/20 alone" in made_of(CPU, tmp_path)["reasons"][0]


def test_a_subject_in_a_file_is_the_same_wherever_that_lies(tmp_path: Path) -> None:
    for machine, folder in (("north", "/home/one"), ("south", "/srv")):
        write(tmp_path / machine, machine=machine, subject=f"{folder}/app.py:factory", subject_sha256="a" * 64)
    assert made_of(CPU, tmp_path)["verdict"] == "pass"


@pytest.mark.parametrize("machines", [("north", "north"), ("south", "west")])
def test_a_share_that_was_not_run_is_none(tmp_path: Path, machines: tuple[str, str]) -> None:
    def change(fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "verdict": "not_run", "value": None, "reason": "no C compiler"}

    write(tmp_path, tests=[test for test in TESTS if test != "test_fault_sweep"], number=1)
    write(tmp_path, machine=machines[0], tests=["test_fault_sweep"], number=2, shard=[1, 2])
    write(tmp_path, machine=machines[1], tests=["test_fault_sweep"], number=3, shard=[2, 2], change=change)
    made = made_of(CPU, tmp_path)
    assert made["verdict"] == "fail"
    assert any("of 2 shares 2 missing" in reason for each in made["cells"] for reason in each["reasons"])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"runtime": "a runtime 2.0"}, "runtime is a runtime 2.0, and in"),
        ({"pins_sha256": "a" * 64}, "pins is aaaa"),
        ({"driver": "999"}, "driver is 999"),
        ({"versions": {"numpy": "9.9"}}, 'versions is {"numpy": "9.9"}'),
        ({"device": {"name": "cpu:1", "card": None}}, 'device is {"card": null, "name": "cpu:1"}'),
    ],
)
def test_records_that_were_made_on_different_things_prove_nothing_together(
    tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    slow = {test for tests in SLOW_PROFILES.values() for test in tests}
    write(tmp_path, tests=[test for test in TESTS if test not in slow], number=1, **other)
    write(tmp_path, tests=slow, number=2)
    (reason,) = made_of(CPU, tmp_path)["reasons"]
    assert said in reason, reason


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ("nonsense", "for want of nonsense, which the backend does not say"),
        ("runtime_crash", "for want of runtime_crash, which the backend does not say"),
        ("device_error", "for want of device_error, which it does not need"),
    ],
)
def test_what_cannot_be_run_is_what_the_backend_states_and_the_test_needs(
    tmp_path: Path, capability: str, said: str
) -> None:
    def change(fields: dict[str, Any]) -> dict[str, Any]:
        cannot = {"verdict": "not_run", "value": None, "reason": "it cannot", "capability": capability}
        return {**fields, **cannot} if fields["test"] == "test_worker_hang" else fields

    write(tmp_path, change=change)
    assert said in made_of(CPU, tmp_path)["reasons"][0]


def test_a_record_that_says_that_it_was_not_run_has_no_results(tmp_path: Path) -> None:
    write(tmp_path, not_run="too little memory")
    assert "misshapen: it says that it was not run, and has results" in " ".join(made_of(CPU, tmp_path)["reasons"])


def test_the_matrix_counts_what_is_declared_and_not_what_was_found(tmp_path: Path) -> None:
    write(tmp_path, tests=["test_oom_detection"])
    its = cell(made_of(CPU, tmp_path))["groups"]["detection"]
    assert (its["verdict"], its["passed"], its["not_run"]) == ("fail", 3, 3)


def test_a_limit_that_the_gate_does_not_accept_is_red_in_the_matrix(tmp_path: Path) -> None:
    overridden = {"test_sustained_high_memory_usage.duration_s": 15.0}
    write(tmp_path, criteria={"source": "mine.toml", "overridden": overridden})
    groups = cell(made_of(CPU, tmp_path))["groups"]
    assert {name for name, each in groups.items() if each["verdict"] == "fail"} == {"memory stress"}
    everywhere = {"source": "mine.toml", "overridden": {"every_test.device_limit_mb": 200.0}}
    write(tmp_path / "all", criteria=everywhere)
    assert {each["verdict"] for each in cell(made_of(CPU, tmp_path / "all"))["groups"].values()} == {"fail"}


def test_a_soak_that_fails_leaves_the_quick_tests_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, change=failing("test_kill_during_recording_soak", "samples_lost", 1.0))
    items = {each["item"]: each["verdict"] for each in made_of(CPU, tmp_path)["checklist"]}
    assert items["All quick tests pass"] == "pass" and items["Data preservation validated"] == "fail"


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (
            {"subject": "protection/pipeline.py:factory", "subject_sha256": "d" * 64},
            {},
            "another version of the subject",
        ),
        (
            {"subject": "my.app:make", "subject_sha256": None, "subject_version": "1"},
            {"subject": "my.app:make", "subject_sha256": None, "subject_version": "2"},
            "another subject_version than in the newest record: 1, and there 2",
        ),
    ],
)
def test_a_subject_is_of_one_version_however_it_is_named(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], why: str
) -> None:
    slow = {test for tests in SLOW_PROFILES.values() for test in tests}
    write(tmp_path, tests=[test for test in TESTS if test not in slow], number=1, **first)
    write(tmp_path, tests=slow, number=2, **second)
    assert any(why in each for each in made_of(CPU, tmp_path)["reasons"])


@pytest.mark.parametrize("version", [1, 3, None])
@pytest.mark.parametrize(
    "name", ["versions", "collected", "shard", "criteria", "machine", "device", "not_run", "cannot"]
)
def test_a_record_of_another_version_is_named_and_nothing_else_of_it_is_used(
    tmp_path: Path, version: int | None, name: str
) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields["kind"] == "run":
            fields |= {"schema_version": version, name: 5}

    forge(write(tmp_path), edit)
    made = made_of(CPU, tmp_path)
    assert page(made, []) and junit(made) and markdown(made)
    assert any("version" in each for each in made["reasons"]), made["reasons"]


@pytest.mark.parametrize(
    "odd", [{"outcome": "not_run"}, {"failed_in": "teardown: OSError"}], ids=["not_run", "failed_in"]
)
def test_a_test_that_contradicts_its_criteria_is_red(tmp_path: Path, odd: dict[str, str]) -> None:
    def edit(fields: dict[str, Any]) -> None:
        if fields["kind"] == "test" and fields["test"] == TEST:
            fields.update(odd)

    forge(write(tmp_path), edit)
    assert f"{TEST}/ended_in_order failed" in made_of(CPU, tmp_path)["reasons"][0]


def test_a_folder_behind_a_link_is_read_and_a_loop_ends(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", change=failing(TEST, CRITERION, 1.0))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gpu").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "results")
    assert "success_rate failed" in made_of(CPU, tmp_path / "results")["reasons"][0]


def test_what_may_not_be_looked_into_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "records")
    (tmp_path / "records" / "closed").mkdir()

    def closed(path: Any, **options: Any) -> Any:
        options["onerror"](PermissionError(13, "Permission denied", str(tmp_path / "records" / "closed")))

    with pytest.MonkeyPatch.context() as patch:
        # As root, who runs this in CI, may look into everything.
        patch.setattr(os, "walk", closed)
        with pytest.raises(GatherError, match="closed: it cannot be read: Permission denied"):
            gather([tmp_path / "records"])


def test_two_records_of_one_name_keep_their_series(tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> dict[str, Any]:
        series = {"uss_bytes": [[0.0, 1e6], [1.0, 2e6]]}
        return {**fields, "series": series} if fields["criterion"] == "growth_rate" else fields

    slow = {test for tests in SLOW_PROFILES.values() for test in tests}
    write(tmp_path / "a", tests=[test for test in TESTS if test not in slow], change=change)
    write(tmp_path / "b", tests=slow)
    assert len(timelines(gather([tmp_path]), made_of(CPU, tmp_path))) == 1


# A run that was cut off.


@pytest.mark.parametrize("killed", [True, False])
def test_a_run_that_was_cut_off_counts_once_another_has_gone_on_with_it(tmp_path: Path, killed: bool) -> None:
    ids = [f"tests/test_file.py::Test::{test}" for test in TESTS]
    cut = write(tmp_path, tests=TESTS[:5], collected=ids, number=1, end=not killed)
    assert made_of(CPU, tmp_path)["verdict"] == "fail"
    write(tmp_path, number=2)
    assert made_of(CPU, tmp_path)["verdict"] == "fail", "another run says nothing of the first"
    (tmp_path / "cpu-cpu-20261127T100000-2.jsonl").unlink()
    write(tmp_path, number=2, resumes=[named(cut)])
    made = made_of(CPU, tmp_path)
    assert made["verdict"] == "pass", made["reasons"]


def failed_and_gone_on_with(folder: Path) -> Path:
    """Write a record that failed before it was cut off, and one that goes on with it; see that it has failed."""
    ids = [f"tests/test_file.py::Test::{test}" for test in TESTS]
    change = failing(TESTS[0], "growth_rate", 3.0)
    cut = write(folder, tests=TESTS[:5], collected=ids, number=1, end=False, change=change)
    write(folder, number=2, resumes=[named(cut)])
    assert "growth_rate failed, in 1 of 2 runs" in made_of(CPU, folder)["reasons"][0]
    return cut


def test_what_failed_before_it_was_cut_off_has_failed(tmp_path: Path) -> None:
    failed_and_gone_on_with(tmp_path)


def test_a_record_that_was_gone_on_with_has_to_be_there(tmp_path: Path) -> None:
    cut = write(tmp_path, tests=TESTS[:5], number=1, end=False)
    write(tmp_path, number=2, resumes=[named(cut)])
    assert made_of(CPU, tmp_path)["verdict"] == "pass"
    cut.unlink()
    assert f"it goes on with {cut.name}, which is not here" in made_of(CPU, tmp_path)["reasons"][0]


def test_a_record_that_was_cut_further_since_is_not_excused(tmp_path: Path) -> None:
    cut = failed_and_gone_on_with(tmp_path)
    lines = cut.read_text().splitlines(keepends=True)
    cut.write_text(lines[0])
    assert "truncated" in made_of(CPU, tmp_path)["reasons"][0]


def test_a_record_that_was_altered_is_not_taken_for_one_that_was_cut_off(tmp_path: Path) -> None:
    cut = write(tmp_path, number=1, change=failing(TEST, CRITERION, 10.0))
    edited_by_hand(cut)
    write(tmp_path, number=2, resumes=[named(cut)])
    assert any("altered" in reason for reason in made_of(CPU, tmp_path)["reasons"])


# What it shows.


def test_it_keeps_to_its_schema(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    everything(tmp_path / "good")
    write(tmp_path / "bad", change=failing(TEST, CRITERION, 10.0))
    (tmp_path / "bad" / "torn.jsonl").write_text("{")
    write_not_run(tmp_path / "bad", run_line("torch-cuda", "cuda12"), "no driver")
    good_one, bad = (made_of(EVERYTHING, tmp_path / name) for name in ("good", "bad"))
    items, without = against.compare(good_one, bad, Thresholds())
    bad["regressions"] = {"against": "x", "items": items, "not_compared": without}
    for made in (good_one, bad, made_of(CPU)):
        plain = json.loads(json.dumps(made))
        assert [error.message for error in validator.iter_errors(plain)] == []


def test_the_schema_refuses_what_lacks_a_field_that_others_rely_on(tmp_path: Path) -> None:
    write(tmp_path)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    named = ("backend", "environment", "machine", "verdict", "reason", "criteria")
    criterion = ("test", "criterion", "verdict", "value", "limit", "unit", "provenance", "points_seen", "faults_fired")
    for name in (*named, *criterion, "cells"):
        made = json.loads(json.dumps(made_of(CPU, tmp_path)))
        target = made["cells"][0]["criteria"][0] if name in criterion[:2] + criterion[3:] else made["cells"][0]
        del (made if name == "cells" else target)[name]
        assert not validator.is_valid(made), f"{name} may be missing"


def test_the_margin_is_the_room_that_is_left(tmp_path: Path) -> None:
    write(tmp_path)
    found = {(each["test"], each["criterion"]): each for each in cell(made_of(CPU, tmp_path))["criteria"]}
    assert len(found) == len(CRITERIA)
    for criterion in CRITERIA:
        its = found[criterion.test, criterion.name]
        if its["verdict"] == "not_run" or criterion.relation == "==":
            assert its["margin"] is None
        else:
            room = abs(good(criterion) - criterion.limit)
            assert its["margin"] == pytest.approx(room), f"{its['value']} against {criterion.limit_text}"


def test_a_failure_has_its_four_lines_and_its_evidence(tmp_path: Path) -> None:
    write(tmp_path, change=failing(TEST, CRITERION, 10.0))
    (failure,) = cell(made_of(CPU, tmp_path))["failures"]
    assert failure["promised"] == "Recovery success rate >= 95%"
    assert failure["measured"] == "success_rate = 10 %, limit >= 95 %"
    assert failure["fault"] == "none was brought about"
    assert failure["repeat"] == f"python -m pytest tests/test_file.py::Test::{TEST}"


def test_the_checklist_is_that_of_the_readme_and_each_item_has_its_tests() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Validation checklist")[1].split("\n## ")[0]
    shown = [line.removeprefix("- [ ] ").split(":")[0] for line in text.splitlines() if line.startswith("- [ ]")]
    assert shown == [item.replace("1-hour", "One-hour") for item, _ in CHECKLIST]
    assert all(set(tests) <= set(TESTS) for _, tests in CHECKLIST)
    assert {test for tests in GROUPS.values() for test in tests} == set(TESTS)


def test_the_checklist_is_filled_in_from_the_records(tmp_path: Path) -> None:
    write(tmp_path, change=failing("test_audio_buffer_preservation", "samples_lost", 3.0))
    items = {each["item"]: each["verdict"] for each in made_of(CPU, tmp_path)["checklist"]}
    assert items["Data preservation validated"] == "fail"
    assert items["All quick tests pass"] == "fail"
    assert items["Emergency shutdown tested"] == "pass"
    assert items["CUDA error recovery verified"] == "not_run"


def test_junit_has_a_case_for_each_criterion_and_counts_what_failed(tmp_path: Path) -> None:
    write(tmp_path, change=failing(TEST, CRITERION, 10.0))
    made = made_of(CPU, tmp_path)
    root = ElementTree.fromstring(junit(made))
    suite = next(each for each in root if each.get("name") == "cpu-cpu-north")
    assert int(suite.get("tests", 0)) == len(CRITERIA) + 1
    assert int(suite.get("failures", 0)) == 2, "the criterion, and the cell"
    assert sum(float(case.get("time", 0)) for case in suite) == pytest.approx(1.5 * len(TESTS))
    assert root[0].get("name") == "gate" and root[0].get("failures") == "1"


def test_strings_of_a_subject_are_text_in_every_format(tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> dict[str, Any]:
        if fields["criterion"] != CRITERION:
            return fields
        return {**fields, "verdict": "fail", "value": 1.0, "reason": HOSTILE, "detail": HOSTILE}

    write(tmp_path, machine=HOSTILE, subject=HOSTILE, change=change)
    made = made_of(CPU, tmp_path)
    assert any(HOSTILE in each["measured"] for each in made["cells"][0]["failures"])
    root = ElementTree.fromstring(junit(made))
    assert any("alert('x')" in (each.text or "") for each in root.iter("failure"))
    text = markdown(made)
    outside = text.split("```")[::2]
    assert not [each for each in outside if "<script" in each or "[a](" in each or "@someone" in each]
    assert not [line for line in text.splitlines() if line.startswith("# not a heading")]


# Against an earlier report.


def test_an_earlier_report_shows_what_became_worse(tmp_path: Path) -> None:
    fails = failing("test_oom_detection", "ooms_uncounted", 1.0)

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        key = (fields["test"], fields["criterion"])
        if key == (TEST, "recovery_time"):
            return {**fields, "value": 4.9}
        if key == ("test_sustained_high_memory_usage", "stability"):
            return {**fields, "value": 9.9}
        if key == ("test_sustained_high_memory_usage", "growth_rate"):
            return {**fields, "series": {"uss_bytes": [[0, 500e6], [1, 700e6]]}}
        return fails(fields)

    def before(fields: dict[str, Any]) -> dict[str, Any]:
        if fields["criterion"] == "growth_rate":
            return {**fields, "series": {"uss_bytes": [[0, 500e6], [1, 510e6]]}}
        return {**fields, "value": 0.5} if fields["criterion"] == "stability" else fields

    write(tmp_path / "old", change=before)
    write(tmp_path / "new", change=change)
    old, new = made_of(CPU, tmp_path / "old"), made_of(CPU, tmp_path / "new")
    found = {(each["what"], each["criterion"]): each["text"] for each in against.compare(old, new, Thresholds())[0]}
    assert set(found) == {
        ("new failure", ""),
        ("new failure", "ooms_uncounted"),
        ("slower recovery", "recovery_time"),
        ("thinner margin", "stability"),
        ("higher peak", "uss_bytes"),
    }
    assert found["higher peak", "uss_bytes"] == "host memory, all of it: 510.0 MB at most before, 700.0 MB now"
    assert against.compare(old, old, Thresholds()) == ([], [])
    lax = Thresholds(slower_percent=1000, higher_percent=1000, thinner_percent=100)
    assert {each["what"] for each in against.compare(old, new, lax)[0]} == {"new failure"}


def test_what_has_no_verdict_any_more_is_a_regression(tmp_path: Path) -> None:
    write(tmp_path / "old")
    write(tmp_path / "new", tests=[test for test in TESTS if test != TEST])
    old, new = made_of(CPU, tmp_path / "old"), made_of(CPU, tmp_path / "new")
    gone = [each for each in against.compare(old, new, Thresholds())[0] if each["what"] == "no longer proven"]
    assert {each["criterion"] for each in gone} == {each.name for each in CRITERIA if each.test == TEST}


def test_a_machine_that_is_not_there_any_more_is_a_regression_and_a_new_one_is_named(tmp_path: Path) -> None:
    for number, machine in enumerate(("north", "south"), 1):
        write(tmp_path / "two", machine=machine, number=number)
    write(tmp_path / "new", machine="north")
    write(tmp_path / "new", machine="west", number=2, change=failing(TEST, CRITERION, 1.0))
    old, new = made_of(CPU, tmp_path / "two"), made_of(CPU, tmp_path / "new")
    found, without = against.compare(old, new, Thresholds())
    assert [each["text"] for each in found] == ["cpu in cpu on south passed, and has no record or is not declared now"]
    assert without == ["cpu-cpu-west"]


@pytest.mark.parametrize(
    ("test", "name", "before", "now", "is_thinner"),
    [
        ("test_sustained_high_memory_usage", "growth_rate", 0.55, 0.999, True),
        ("test_sustained_high_memory_usage", "growth_rate", 0.97, 0.999, False),
        (TEST, CRITERION, 100.0, 95.0, True),
        ("test_gpu_to_cpu_fallback_on_oom", "notifications", 9.0, 1.0, False),
    ],
)
def test_a_margin_is_thinner_by_its_own_measure(
    tmp_path: Path, test: str, name: str, before: float, now: float, is_thinner: bool
) -> None:
    for folder, value in (("old", before), ("new", now)):

        def change(fields: dict[str, Any], value: float = value) -> dict[str, Any]:
            return {**fields, "value": value} if (fields["test"], fields["criterion"]) == (test, name) else fields

        write(tmp_path / folder, tests=[test], change=change)
    old, new = made_of(CPU, tmp_path / "old"), made_of(CPU, tmp_path / "new")
    found, _ = against.compare(old, new, Thresholds())
    assert [each["what"] for each in found] == (["thinner margin"] if is_thinner else [])


# The gate.


@pytest.mark.parametrize("path", sorted(gate.FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_ready_made_gates_can_be_used(path: Path) -> None:
    assert gate.load(path, PAIRS).cells


def test_the_default_gate_asks_for_everything_that_is_declared() -> None:
    found = gate.load(gate.DEFAULT, PAIRS)
    assert all(found.requires(*pair) for pair in PAIRS)
    assert set(found.profiles) == {"quick", "soak", "sweep"} and not found.not_run


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cells is None: expected a list of strings"),
        ('cells = ["cpu/cpu"]', "profiles is None"),
        ('cells = ["cpu/cup"]\nprofiles = ["quick"]', "no cell is 'cpu/cup': did you mean cpu/cpu"),
        ('cells = ["*/*"]\nprofiles = ["quik"]', "there is no profile 'quik': did you mean quick"),
        ('cells = ["*/*"]\nprofile = ["quick"]', "unknown key 'profile': did you mean profiles"),
        ('cells = "*/*"\nprofiles = ["quick"]', "cells is '*/*'"),
        ('cells = ["*/*"]\nprofiles = ["quick"]\nnot_run = ["test_oom_kiler"]', "did you mean test_oom_killer"),
        ('cells = ["*/*"]\nprofiles = ["quick"]\n[overridden]\n"a.b" = 1', "no criterion or parameter 'a.b'"),
        ('cells = ["*/*"]\nprofiles = ["quick"]\n[regression]\nslower_s = -1', "slower_s is -1: expected at least 0"),
        ('cells = ["*/*"]\nprofiles = ["quick"]\n[regression]\nslower = 1', "unknown key 'slower'"),
        ('cells = ["*/*"]\nprofiles = ["quick"]\nfail_on_regression = 1', "fail_on_regression is 1"),
        ("cells = [", "cannot be read"),
    ],
)
def test_a_gate_that_cannot_be_used_is_refused_by_what_is_wrong(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "gate.toml").write_text(text)
    with pytest.raises(GateError, match=r"gate\.toml") as caught:
        gate.load(tmp_path / "gate.toml", PAIRS)
    assert why in str(caught.value)


# The command.


def test_the_command_writes_every_file_and_says_why_it_is_red(tmp_path: Path) -> None:
    everything(tmp_path / "records")
    done = command(tmp_path / "records", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "index.html",
        "junit.xml",
        "report.json",
        "summary.md",
    ]
    assert "QUALIFIED" in done.stdout
    next((tmp_path / "records").glob("cuda13-torch-cuda*")).unlink()
    done = command(tmp_path / "records", "--out", tmp_path / "out", "--against", tmp_path / "out" / "report.json")
    assert done.returncode == 1
    assert "torch-cuda in cuda13: no record of torch-cuda in cuda13" in done.stderr
    assert "no longer proven" in done.stdout or "new failure" in done.stdout, done.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] == "fail"


def test_a_regression_fails_the_gate_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_text('cells = ["cpu/cpu"]\nprofiles = ["quick"]\nfail_on_regression = true\n')
    for name, value in (("old", 0.1), ("new", 4.9)):

        def change(fields: dict[str, Any], value: float = value) -> dict[str, Any]:
            return {**fields, "value": value} if fields["criterion"] == "recovery_time" else fields

        write(tmp_path / name, change=change)
    options = ("--gate", tmp_path / "gate.toml")
    refused = command(tmp_path / "old", *options)
    assert refused.returncode == 2 and "expected --against" in refused.stderr
    assert command(tmp_path / "old", "--gate", "gates/quick.toml").returncode == 1
    done = command(tmp_path / "new", *options, "--against", tmp_path / "old" / "report" / "report.json")
    assert done.returncode == 1
    assert "slower recovery" in done.stdout and "regressions against" in done.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["{tmp}/nowhere"], "there is no such folder"),
        (["{tmp}", "--gate", "{tmp}/nowhere.toml"], "cannot be read"),
        (["{tmp}", "--against", "{tmp}/nowhere.json"], "expected a report.json"),
        (["{tmp}", "--against", "{tmp}/list.json"], "it is no report"),
        (["{tmp}", "--out", "{tmp}/list.json"], "the report cannot be written"),
        (["{tmp}", "--on-finish"], "expected a command"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, words: list[str], why: str) -> None:
    (tmp_path / "list.json").write_text("[]")
    done = command(*(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and why in done.stderr, done.stderr


def test_a_report_that_cannot_be_written_is_no_pass_for_other_tools_and_leaves_no_old_page(tmp_path: Path) -> None:
    everything(tmp_path / "records")
    assert command(tmp_path / "records").returncode == 0
    assert history.last(tmp_path / "records" / "history.sqlite", kind="report")["verdict"] == "pass"  # type: ignore[index]
    script = f"ulimit -f 28; exec {sys.executable} -m qualification report {tmp_path / 'records'}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "the report cannot be written: File too large" in done.stderr
    assert not (tmp_path / "records" / "report" / "index.html").exists()
    found = history.last(tmp_path / "records" / "history.sqlite")
    assert found is not None and found["verdict"] == "fail"


def test_no_record_at_all_is_red(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("no record of") == len(PAIRS), done.stderr


def test_two_reports_at_once_leave_a_whole_one(tmp_path: Path) -> None:
    write(tmp_path / "records")
    words = [sys.executable, "-m", "qualification", "report", str(tmp_path / "records"), "--gate", "gates/quick.toml"]
    running = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for each in running:
        each.communicate(timeout=120)
    out = tmp_path / "records" / "report"
    json.loads((out / "report.json").read_text())
    assert sorted(each.name for each in out.iterdir()) == ["index.html", "junit.xml", "report.json", "summary.md"]
