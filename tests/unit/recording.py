"""Whole records with made-up numbers, as what a report is given: to see what it says of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import backends
from qualification import identity
from qualification.criteria import CRITERIA, NEEDS, Criterion
from qualification.records import RecordWriter
from qualification.report.gate import Gate
from qualification.report.gather import gather
from qualification.report.verdict import report
from qualification.subject import DEFAULT_SUBJECT

TESTS = tuple(dict.fromkeys(each.test for each in CRITERIA))
PAIRS = [(each.name, environment) for each in backends.declared() for environment in each.environments]
#: What a host processor does not have.
CANNOT = ("device_error", "device_allocation_faults")
EVERYTHING = Gate("a test", ("*/*",), ("quick", "soak", "sweep"))
CPU = Gate("a test", ("cpu/cpu",), ("quick", "soak", "sweep"))
#: A test without a series, and one of its criteria.
TEST, CRITERION = "test_recovery_success_rate", "success_rate"


def good(criterion: Criterion) -> float:
    """Give a value that keeps a promise, with room where there can be."""
    if criterion.relation in ("<", "<="):
        return criterion.limit / 2
    return criterion.limit * (1.02 if criterion.relation == ">" else 1)


def run_line(backend: str, environment: str, machine: str = "north", **more: Any) -> dict[str, Any]:
    """Give a first line as a run of this checkout writes it."""
    return {
        **identity.suite(),
        "subject": DEFAULT_SUBJECT,
        **identity.shipped_subject(),
        "backend": backend,
        "environment": environment,
        "device": {"name": f"{backend}:0", "card": None},
        "runtime": "a runtime 1.0",
        "machine": {
            "name": machine,
            "id": hashlib.sha256(machine.encode()).hexdigest()[:12],
            "system": "Linux",
            "processors": 2,
            "memory_bytes": 8 << 30,
            "python": "3.11.7",
            "gpus": [],
            "gpus_unread": None,
        },
        "driver": None,
        "versions": {"numpy": "2.0"},
        "pins_sha256": None,
        "model_sha256": "0" * 64,
        "audio_sha256": "1" * 64,
        "criteria": {"source": "defaults", "overridden": {}},
        "cannot": dict.fromkeys(CANNOT, "no such device"),
        "began": "2026-11-27T10:00:00+00:00",
        "resumes": [],
        **more,
    }


def write(
    folder: Path,
    backend: str = "cpu",
    environment: str = "cpu",
    machine: str = "north",
    *,
    tests: Iterable[str] = TESTS,
    change: Callable[[dict[str, Any]], Mapping[str, Any] | None] = lambda fields: fields,
    number: int = 1,
    collected: list[str] | None = None,
    end: bool = True,
    **more: Any,
) -> Path:
    """Write a record in which everything passed; ``change`` makes another of a criterion's line, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{environment}-{backend}-20261127T100000-{number}.jsonl"
    tests = list(tests)
    ids = [f"tests/test_file.py::Test::{test}" for test in tests]
    line = run_line(backend, environment, machine, collected=ids if collected is None else collected, **more)
    writer = RecordWriter(path, line)
    for test, identifier in zip(tests, ids, strict=True):
        outcome = "passed"
        for criterion in (each for each in CRITERIA if each.test == test):
            fields: dict[str, Any] = {
                "test": test,
                "criterion": criterion.name,
                "verdict": "pass",
                "value": good(criterion),
                "relation": criterion.relation,
                "limit": criterion.limit,
                "unit": criterion.unit,
            }
            if lacking := next((each for each in NEEDS.get(test, ()) if each in CANNOT), None):
                fields |= {"verdict": "not_run", "value": None, "reason": "none here", "capability": lacking}
                outcome = "not_run"
            changed = change(fields)
            if changed is not None:
                writer.criterion(backend=backend, environment=environment, **changed)
                outcome = "failed" if changed["verdict"] == "fail" else outcome
        writer.test(
            backend=backend,
            environment=environment,
            test=test,
            id=identifier,
            outcome=outcome,
            duration_s=1.5,
            repeat=f"python -m pytest {identifier}",
        )
    if end:
        writer.close()
    return path


def named(path: Path) -> dict[str, str]:
    """Give what a run that goes on with a record says of it."""
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def failing(test: str, name: str, value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Give a change that makes one criterion fail with this value."""

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        same = (fields["test"], fields["criterion"]) == (test, name)
        return {**fields, "verdict": "fail", "value": value} if same else fields

    return change


def made_of(gate: Gate, *folders: Path) -> dict[str, Any]:
    """Make the report of some folders."""
    return report(gather(folders), gate, backends.declared())


def cell(made: Mapping[str, Any], backend: str = "cpu", environment: str = "cpu", machine: str | None = "north") -> Any:
    """Give the one cell of a report."""
    (found,) = [
        each
        for each in made["cells"]
        if (each["backend"], each["environment"], each["machine"]) == (backend, environment, machine)
    ]
    return found


def forge(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit every line of a record and compute its chain anew: what only an attacker would do."""
    previous, lines = "0" * 64, []
    for text in path.read_text().splitlines():
        fields = json.loads(text)
        edit(fields)
        fields["previous"] = previous
        lines.append(json.dumps(fields))
        previous = hashlib.sha256(lines[-1].encode()).hexdigest()
    path.write_text("\n".join(lines) + "\n")
