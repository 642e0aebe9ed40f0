"""What the lines of a record have to look like for a report to be made of them.

The chain says that a line is as it was written, and not that it was one of ours that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qualification.records import OUTCOMES, SHARES_MAX, VERDICTS, Record

Check = Callable[[Any], bool]
#: More than anything that is measured, in bytes or otherwise; what is not finite is more.
_MOST = 1e18
#: And more than any test takes, in seconds.
_LONGEST_S = 1e9


def wrong_with(record: Record) -> str:
    """Say which field of which line is not what it has to be; "" where all are."""
    if record.run.get("not_run") and (record.run.get("collected") or record.criteria or record.tests or record.sweeps):
        return "misshapen: it says that it was not run, and has results"
    return (
        _first(record.run, _RUN, "the first line")
        or _any(record.criteria, _CRITERION, "a criterion's line")
        or _any(record.tests, _TEST, "a test's line")
        or _any(record.sweeps, _SWEEP, "a sweep's line")
    )


def reduced(run: Mapping[str, Any]) -> dict[str, Any]:
    """Give what can be said of a record of another version, or of a damaged one: whose it is, and of which version."""
    names = ("backend", "environment", "suite_version", "suite_commit", "suite_sha256", "began")
    machine = run.get("machine")
    its = {name: machine.get(name) for name in ("name", "id")} if isinstance(machine, dict) else {}
    found: dict[str, Any] = {name: run[name] for name in names if isinstance(run.get(name), str)}
    found["machine"] = {name: value for name, value in its.items() if isinstance(value, str)}
    version = run.get("schema_version")
    return {**found, "schema_version": version if isinstance(version, int) else None, "collected": []}


def _any(lines: Iterable[Mapping[str, Any]], checks: Mapping[str, Check], where: str) -> str:
    return next((wrong for line in lines if (wrong := _first(line, checks, where))), "")


def _first(line: Mapping[str, Any], checks: Mapping[str, Check], where: str) -> str:
    for name, holds in checks.items():
        value = line.get(name)
        if not holds(value):
            return f"misshapen: in {where} {name} is {str(value)[:80]!r}"
    return ""


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _each(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _by_name(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _has(checks: Mapping[str, Check]) -> Check:
    return lambda value: isinstance(value, dict) and not _first(value, checks, "")


def _one_of(names: tuple[str, ...]) -> Check:
    return lambda value: isinstance(value, str) and value in names


def _point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _number(value[0]) and _or_none(_number)(value[1])


def _event(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _number(value[0]) and _text(value[1])


def _share(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(map(_count, value))
        and 1 <= value[0] <= value[1] <= SHARES_MAX
    )


_CARD = {
    "name": _text,
    "uuid": _text,
    "total_bytes": _count,
}
_MACHINE = {
    "name": _text,
    "id": _text,
    "system": _text,
    "processors": _or_none(_count),
    "memory_bytes": _count,
    "python": _text,
    "gpus": _or_none(_each(lambda value: isinstance(value, dict))),
    "gpus_unread": _or_none(_text),
}
_RUN: Mapping[str, Check] = {
    "backend": _text,
    "environment": _text,
    "suite_version": _text,
    "suite_commit": _or_none(_text),
    "suite_sha256": _text,
    "machine": _has(_MACHINE),
    "began": _text,
    "collected": _each(_text),
    # Of a cell that is not run there is no more.
    "not_run": _or_none(_text),
    "resumes": _or_none(_each(_has({"file": _text, "sha256": _text}))),
    "cannot": _or_none(_by_name(_text)),
    "point": _or_none(_text),
    "shard": _or_none(_share),
    "device": _or_none(_has({"name": _text, "card": _or_none(_has(_CARD))})),
    "runtime": _or_none(_text),
    "subject": _or_none(_text),
    "subject_version": _or_none(_text),
    "subject_sha256": _or_none(_text),
    "model_sha256": _or_none(_text),
    "audio_sha256": _or_none(_text),
    "pins_sha256": _or_none(_text),
    "driver": _or_none(_text),
    "versions": _or_none(_by_name(_text)),
    "criteria": _or_none(_has({"overridden": _by_name(_number)})),
}
_CRITERION: Mapping[str, Check] = {
    "test": _text,
    "criterion": _text,
    "verdict": _one_of(VERDICTS),
    "value": _or_none(_number),
    "relation": _text,
    "limit": _or_none(_number),
    "unit": _text,
    "provenance": _or_none(_text),
    "points_seen": _count,
    "faults_fired": _count,
    "absorbed": _count,
    "detail": _text,
    "reason": _text,
    "capability": _or_none(_text),
    "series": _by_name(_each(_point)),
}
_TEST: Mapping[str, Check] = {
    "test": _text,
    "id": _text,
    "outcome": _one_of(OUTCOMES),
    "duration_s": lambda value: _number(value) and 0 <= value <= _LONGEST_S,
    "repeat": _text,
    "evidence": _each(_text),
    "events": _each(_event),
    "device_limit_bytes": _or_none(_number),
    "events_told": _or_none(_count),
    "taken_from": _or_none(_text),
    "failed_in": _or_none(_text),
}
_COUNTS = ("min_bytes", "points_tried", "faults_fired", "absorbed", "runtime_died", "host_stopped", "failed")
_NAMES = ("scenario", "target", "site", "mode", "model", "sweep", "not_run")


_SWEEP: Mapping[str, Check] = {
    "test": _text,
    "shard": _or_none(_share),
    "seed": _or_none(_count),
    "points_counted": _or_none(_each(_count)),
    "took_s": _or_none(_number),
    **dict.fromkeys(_COUNTS, _or_none(_count)),
    **dict.fromkeys(_NAMES, _or_none(_text)),
}
