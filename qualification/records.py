"""What a cell measured: JSON Lines, one file for each cell, each line chained to the one before by a SHA-256.

A first line ``run``, a line ``criterion`` for each verdict, a line ``sweep`` for what became of each part of the
exhaustive sweep, a line ``test`` when a test has come to its end, a last line ``end`` with the count. The chain detects
damage, not forgery. There is no field for audio or transcripts, so neither can enter.

Of what is not Python's own, only ``thin`` needs anything: where no cell can run, there is a record that says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

#: Version 2 has ``test`` lines, and says more about machine, suite and subject.
SCHEMA_VERSION = 2
#: Those that can be read.
KNOWN_VERSIONS = (1, 2)
VERDICTS = ("pass", "fail", "not_run")
#: How a test ended.
OUTCOMES = ("passed", "failed", "not_run")
#: The most lines of evidence, and the most events of a subject, that the record of a test keeps.
EVIDENCE_MAX = 200
EVENTS_MAX = 1000
#: The most shares of a sweep.
SHARES_MAX = 1000
#: The most points that a series keeps.
SERIES_POINTS_MAX = 240
_NO_PREVIOUS = "0" * 64


class RecordError(Exception):
    """A record cannot be written, or is damaged. The message names the file, and the line where there is one."""


@dataclass(frozen=True)
class Record:
    """A verified record: the fields of the ``run`` line, those of each criterion and sweep in order, and its end."""

    run: dict[str, Any]
    criteria: tuple[dict[str, Any], ...]
    #: Whether it has its end.
    complete: bool
    sweeps: tuple[dict[str, Any], ...] = ()
    tests: tuple[dict[str, Any], ...] = ()
    #: When it ended, UTC.
    ended: str | None = None


class RecordWriter:
    """Writes the record of one cell. Each line is on the disk when the call that wrote it returns.

    The file (mode 0600) must not exist yet. After a failed write the record is damaged, and further lines are refused.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Create the file and write the ``run`` line.

        Raises RecordError where that is impossible, ValueError for a reserved field or another schema version.
        """
        if reserved := {"kind", "previous"} & set(run):
            raise ValueError(f"the run line cannot have a field {', '.join(sorted(reserved))}: the record sets it")
        if run.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {run['schema_version']!r}: this writer writes {SCHEMA_VERSION}")
        self.path = path
        self._previous = _NO_PREVIOUS
        self._lines = 0
        fields = {"schema_version": SCHEMA_VERSION, **run}
        line = _line("run", self._previous, fields)  # before the file is made: what cannot be written leaves no file
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor: int | None = os.open(path, flags, 0o600)
        except FileExistsError as error:
            raise RecordError(f"{path}: a record is there already; move it away or choose another name") from error
        except OSError as error:
            raise RecordError(f"{path}: the record cannot be created: {error.strerror}") from error
        self._write(line)

    def criterion(
        self,
        *,
        backend: str,
        environment: str,
        test: str,
        criterion: str,
        verdict: str,
        value: float | None = None,
        relation: str = "",
        limit: float | None = None,
        unit: str = "",
        provenance: str | None = None,
        points_seen: int = 0,
        faults_fired: int = 0,
        absorbed: int = 0,
        detail: str = "",
        reason: str = "",
        capability: str | None = None,
        series: Mapping[str, Iterable[Sequence[float]]] | None = None,
    ) -> None:
        """Write one verdict. ``series`` maps a name to [t_s, value] pairs, and is thinned to SERIES_POINTS_MAX.

        A value or limit that is not finite is written as null, and the reason says so. Raises ValueError for an unknown
        verdict, TypeError for what JSON cannot hold, RecordError when the line cannot be written.
        """
        if verdict not in VERDICTS:
            raise ValueError(f"verdict is {verdict!r}: expected one of {', '.join(VERDICTS)}")
        for name, number in (("value", value), ("limit", limit)):
            if number is not None and not math.isfinite(number):
                reason = f"{reason}{'; ' if reason else ''}{name} is {float(number)}, not a finite number"
        fields = {
            "backend": backend,
            "environment": environment,
            "test": test,
            "criterion": criterion,
            "verdict": verdict,
            "value": value,
            "relation": relation,
            "limit": limit,
            "unit": unit,
            "provenance": provenance,
            "points_seen": points_seen,
            "faults_fired": faults_fired,
            "absorbed": absorbed,
            "detail": detail,
            "reason": reason,
            "capability": capability,
            "series": {name: thin(points) for name, points in (series or {}).items()},
        }
        self._write(_line("criterion", self._previous, fields))

    def sweep(self, *, backend: str, environment: str, test: str, **fields: Any) -> None:
        """Write what became of the points of one scenario. Raises TypeError, and RecordError as ``criterion`` does."""
        whose = {"backend": backend, "environment": environment, "test": test}
        self._write(_line("sweep", self._previous, {**whose, **fields}))

    def test(
        self,
        *,
        backend: str,
        environment: str,
        test: str,
        id: str,
        outcome: str,
        duration_s: float,
        repeat: str,
        evidence: Sequence[str] = (),
        events: Sequence[tuple[float, str]] = (),
        device_limit_bytes: int | None = None,
        taken_from: str | None = None,
        failed_in: str | None = None,
    ) -> None:
        """Write how a test ended. ``events`` are (t_s, kind), in the time of the test's series.

        Of ``evidence`` the first EVIDENCE_MAX lines are kept, and of ``events`` every nth, EVENTS_MAX at most. Raises
        ValueError for an unknown outcome, TypeError, and RecordError as ``criterion`` does.
        """
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome is {outcome!r}: expected one of {', '.join(OUTCOMES)}")
        fields = {
            "backend": backend,
            "environment": environment,
            "test": test,
            "id": id,
            "outcome": outcome,
            "duration_s": round(duration_s, 3),
            "repeat": repeat,
            "evidence": list(evidence[:EVIDENCE_MAX]),
            "events": [(round(t_s, 3), kind) for t_s, kind in events[:: math.ceil(len(events) / EVENTS_MAX) or 1]],
            "events_told": len(events),
            "device_limit_bytes": device_limit_bytes,
            "taken_from": taken_from,
            "failed_in": failed_in,
        }
        self._write(_line("test", self._previous, fields))

    def close(self) -> None:
        """Write the ``end`` line and close the file. A second call, or one after a failed write, does nothing."""
        if self._descriptor is not None:
            ended = now()
            fields = {"count": self._lines, "ended": ended, "sha256": _seal(self._lines, ended)}
            self._write(_line("end", self._previous, fields))
            self._release()

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            raise RecordError(f"{self.path}: the record is closed; line {self._lines + 1} cannot be written")
        try:
            rest = memoryview(line + b"\n")
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            self._release()  # what follows a torn line could not be read
            raise RecordError(f"{self.path}: line {self._lines + 1} cannot be written: {error.strerror}") from error
        self._previous = hashlib.sha256(line).hexdigest()
        self._lines += 1

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def now() -> str:
    """Give the time as records have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def name_of(environment: str, backend: str) -> str:
    """Give the file name of a record that begins now: it names the cell, and no other process has it."""
    return f"{environment}-{backend}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.jsonl"


def write_not_run(folder: Path, run: Mapping[str, Any], reason: str) -> Path:
    """Write the record of a cell that cannot run here, and why: ``run`` has its ``backend`` and ``environment``.

    Raises OSError, RecordError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name_of(run["environment"], run["backend"])
    if path.exists():
        return path  # said by this process a moment ago
    RecordWriter(path, {**run, "collected": [], "not_run": reason, "began": now()}).close()
    return path


def read(path: Path, *, partial: bool = False) -> Record:
    """Read a record and verify its chain, order, count and schema version.

    With ``partial`` a record that was cut short is given as far as it is sound, with ``complete`` False.
    Raises RecordError that says which line is damaged, and how.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: the record cannot be read: {error.strerror}") from error

    def damaged(number: int, how: str) -> NoReturn:
        raise RecordError(f"{path}: line {number}: {how}")

    *lines, torn = raw.split(b"\n")
    if not lines:
        damaged(1, "truncated: there is not one whole line")
    run: dict[str, Any] = {}
    criteria: list[dict[str, Any]] = []
    sweeps: list[dict[str, Any]] = []
    tests: list[dict[str, Any]] = []
    complete, ended = False, None
    previous = _NO_PREVIOUS
    for number, line in enumerate(lines, 1):
        if complete:
            damaged(number, f"there is more after the end line (line {number - 1})")
        try:
            fields = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            damaged(number, "it is not JSON")
        if not isinstance(fields, dict):
            damaged(number, "it is not a JSON object")
        if fields.pop("previous", None) != previous:
            if number == 1:
                damaged(1, "altered: a first line carries 64 zeros as the hash before it")
            damaged(number - 1, f"altered, or a line after it is missing: its hash is not what line {number} carries")
        previous = hashlib.sha256(line).hexdigest()
        kind = fields.pop("kind", None)
        expected = ("run",) if number == 1 else ("criterion", "sweep", "test", "end")
        if kind not in expected:
            damaged(number, f"kind is {kind!r}: expected {' or '.join(expected)}")
        if kind == "run":
            if fields.get("schema_version") not in KNOWN_VERSIONS:
                known = ", ".join(map(str, KNOWN_VERSIONS))
                damaged(1, f"schema_version is {fields.get('schema_version')!r}: this reader knows {known}")
            run = fields
        elif kind == "criterion":
            criteria.append(fields)
        elif kind == "sweep":
            sweeps.append(fields)
        elif kind == "test":
            tests.append(fields)
        else:
            if fields.get("count") != number - 1:
                damaged(number, f"the end line says {fields}, but {number - 1} lines come before it")
            complete, ended = True, fields.get("ended")
            if run["schema_version"] > 1 and fields.get("sha256") != _seal(number - 1, ended):
                damaged(number, f"altered: the end line says {fields}, and its sha256 is another")
    if torn and complete:
        damaged(len(lines) + 1, f"there is more after the end line (line {len(lines)})")
    if not complete and not partial:
        damaged(len(lines) + bool(torn), "truncated: " + ("it is cut off" if torn else "no end line comes after it"))
    return Record(run, tuple(criteria), complete, tuple(sweeps), tuple(tests), ended)


def cut_off(folder: Path, run: Mapping[str, Any], collected: Iterable[str]) -> list[dict[str, str]]:
    """Give ``file`` and ``sha256`` of the records of runs that were cut off, and that a run goes on with.

    They are of the same cell, machine, suite, subject and criteria as its first line, and collected nothing else.
    """
    what = ("subject", "subject_sha256", "model_sha256", "audio_sha256", "criteria", "point", "shard")
    same = ("backend", "environment", "device", "suite_sha256", *what)
    here, tests = run["machine"]["id"], set(collected)
    found = []
    for path in sorted(folder.glob(f"{run['environment']}-{run['backend']}-*.jsonl")):
        try:
            record = read(path, partial=True)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        except (RecordError, OSError):
            continue  # damaged, not cut off
        its = record.run
        ended = {each.get("id") for each in record.tests}
        is_open = not record.complete or not ended.issuperset(its.get("collected", ()))
        is_ours = all(its.get(name) == run.get(name) for name in same) and its.get("machine", {}).get("id") == here
        if is_open and is_ours and tests.issuperset(its.get("collected", ())):
            found.append({"file": path.name, "sha256": sha256})
    return found


def thin(points: Iterable[Sequence[float]], points_max: int = SERIES_POINTS_MAX) -> list[list[float | None]]:
    """Thin [t_s, value] pairs to at most ``points_max`` (at least 4), keeping the first, the last and local extremes.

    A point without a finite time is dropped; a value that is not finite becomes None.
    """
    import numpy as np  # not at the top: see above

    pairs = np.array([(float(t), float(v)) for t, v in points], dtype=np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs[:, 0])]
    values = np.where(np.isfinite(pairs[:, 1]), pairs[:, 1], np.nan)
    keep = list(range(len(pairs)))
    if len(pairs) > points_max:
        inner = {0, len(pairs) - 1}
        for bucket in np.array_split(np.arange(1, len(pairs) - 1), (points_max - 2) // 2):
            missing = np.isnan(values[bucket])
            inner.add(int(bucket[np.argmin(np.where(missing, np.inf, values[bucket]))]))
            inner.add(int(bucket[np.argmax(np.where(missing, -np.inf, values[bucket]))]))
        keep = sorted(inner)
    return [[float(pairs[i, 0]), None if np.isnan(values[i]) else float(values[i])] for i in keep]


def _line(kind: str, previous: str, fields: Mapping[str, Any]) -> bytes:
    """Give a line as strict JSON in ASCII, without its newline."""
    whole = {"kind": kind, "previous": previous, **{key: _plain(field) for key, field in fields.items()}}
    return json.dumps(whole, allow_nan=False, separators=(",", ":")).encode("ascii")


def _seal(count: int, ended: object) -> str:
    """Hash what the last line says: no line comes after it that would show that it was altered."""
    return hashlib.sha256(f"{count} {ended}".encode()).hexdigest()


def _plain(value: object) -> object:
    """Turn into what strict JSON can hold: numpy into Python, numbers that are not finite into None."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # NumPy's
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not strict JSON")
