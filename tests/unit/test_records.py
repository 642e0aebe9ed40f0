"""Records are chained, strict JSON, on the disk line by line, and every damage is named."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qualification.records import (
    EVENTS_MAX,
    EVIDENCE_MAX,
    OUTCOMES,
    SCHEMA_VERSION,
    SERIES_POINTS_MAX,
    RecordError,
    RecordWriter,
    read,
    thin,
    write_not_run,
)

ROOT = Path(__file__).resolve().parents[2]
RUN = {"suite_version": "1.2", "subject": "x:y", "versions": {"numpy": "2"}, "collected": ["a", "b"]}


def _criterion(writer: RecordWriter, **fields: Any) -> None:
    whole = {"backend": "cpu", "environment": "cpu", "test": "t", "criterion": "c", "verdict": "pass", **fields}
    writer.criterion(**whole)


def _written(path: Path, criteria: int = 3) -> list[bytes]:
    writer = RecordWriter(path, RUN)
    for number in range(criteria):
        _criterion(writer, criterion=f"c{number}", value=float(number), limit=9.0, unit="s")
    writer.close()
    return path.read_bytes().split(b"\n")[:-1]


def _relinked(lines: list[bytes]) -> bytes:
    """Give lines with a chain that is right again, to reach the checks behind it."""
    previous, out = "0" * 64, []
    for line in lines:
        out.append(json.dumps({**json.loads(line), "previous": previous}).encode())
        previous = hashlib.sha256(out[-1]).hexdigest()
    return b"\n".join(out) + b"\n"


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    """Run, criteria in order and completeness survive the file."""
    path = tmp_path / "r.jsonl"
    writer = RecordWriter(path, RUN)
    _criterion(writer, value=1.5, provenance="capped", points_seen=7, faults_fired=2, absorbed=1, reason="because")
    _criterion(writer, verdict="not_run", series={"rss": [(0, 1), (1, 2)]})
    writer.close()
    record = read(path)
    first, second = record.criteria
    assert record.complete, "a closed record is not complete"
    assert record.run == {"schema_version": 2, **RUN}, f"read back {record.run}"
    assert (first["value"], first["limit"], first["points_seen"], first["provenance"]) == (1.5, None, 7, "capped")
    defaults = {name: first[name] for name in ("relation", "detail", "capability")}
    assert defaults == {"relation": "", "detail": "", "capability": None}, f"not given, they are {defaults}"
    assert second["series"] == {"rss": [[0.0, 1.0], [1.0, 2.0]]}, f"series came back as {second['series']}"


def test_how_it_was_judged_and_what_is_lacking_is_read_back(tmp_path: Path) -> None:
    """The relation, the runtime's own words and the capability are in the line of the criterion."""
    writer = RecordWriter(tmp_path / "r.jsonl", RUN)
    _criterion(writer, value=1.0, limit=2.0, relation="<=", detail="bad_alloc: out of memory")
    _criterion(writer, verdict="not_run", capability="device_error")
    writer.close()
    told, lacking = read(tmp_path / "r.jsonl").criteria
    assert (told["relation"], told["detail"], told["capability"]) == ("<=", "bad_alloc: out of memory", None)
    assert (lacking["verdict"], lacking["capability"], lacking["detail"]) == ("not_run", "device_error", "")


def test_the_end_says_when(tmp_path: Path) -> None:
    """UTC, to the second; a record that was cut short has none."""
    path = tmp_path / "r.jsonl"
    before = datetime.now(UTC).replace(microsecond=0)
    lines = _written(path, 0)
    ended = read(path).ended
    assert ended is not None and before <= datetime.fromisoformat(ended) <= datetime.now(UTC), f"it says {ended}"
    path.write_bytes(lines[0] + b"\n")
    assert read(path, partial=True).ended is None


# How a test ended.

ENDED: dict[str, Any] = {
    "backend": "cpu",
    "environment": "cpu",
    "test": "t",
    "id": "tests/x.py::t[a]",
    "outcome": "passed",
    "duration_s": 1.23456,
    "repeat": "python -m pytest tests/x.py::t",
}


def test_how_a_test_ended_is_read_back(tmp_path: Path) -> None:
    """It is in the chain with all other lines; what was not given is empty."""
    path = tmp_path / "r.jsonl"
    writer = RecordWriter(path, RUN)
    _criterion(writer)
    writer.test(**ENDED)
    told = {"evidence": ["one", "two"], "events": [(0.00049, "a"), (2.5, "b")], "device_limit_bytes": 1 << 40}
    writer.test(**{**ENDED, "outcome": "failed", **told, "taken_from": "cpu-cpu-1.jsonl"})
    writer.close()
    record = read(path)
    assert len(record.criteria) == 1, "a line of a test was read as a criterion"
    bare, full = record.tests
    nothing = {"evidence": [], "events": [], "events_told": 0, "device_limit_bytes": None, "taken_from": None}
    nothing["failed_in"] = None
    assert bare == {**ENDED, "duration_s": 1.235, **nothing}, f"read back {bare}"
    assert (full["outcome"], full["evidence"], full["events"]) == ("failed", ["one", "two"], [[0.0, "a"], [2.5, "b"]])
    assert (full["events_told"], full["device_limit_bytes"]) == (2, 1 << 40)
    assert full["taken_from"] == "cpu-cpu-1.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"outcome":"failed"', b'"outcome":"passed"'))
    with pytest.raises(RecordError, match="line 4: altered"):
        read(path)


@pytest.mark.parametrize("outcome", ["pass", "skipped", "", "PASSED"])
def test_another_outcome_is_refused(tmp_path: Path, outcome: str) -> None:
    """Only the three that there are."""
    writer = RecordWriter(tmp_path / "r.jsonl", RUN)
    with pytest.raises(ValueError, match=f"outcome is '{outcome}': expected one of {', '.join(OUTCOMES)}"):
        writer.test(**{**ENDED, "outcome": outcome})
    with pytest.raises(TypeError, match="transcript"):
        writer.test(**{**ENDED, "transcript": "hello"})
    with pytest.raises(TypeError, match="cannot hold a bytes"):
        writer.test(**{**ENDED, "evidence": [b"pcm"]})
    writer.close()
    assert read(tmp_path / "r.jsonl").tests == ()
    with pytest.raises(RecordError, match="closed"):
        writer.test(**ENDED)


@pytest.mark.parametrize("count", [0, 1, EVENTS_MAX, EVENTS_MAX + 1, 2 * EVENTS_MAX, 25_500])
def test_events_are_bounded_and_their_number_is_told(tmp_path: Path, count: int) -> None:
    """At most EVENTS_MAX stay, evenly spread, the first among them."""
    writer = RecordWriter(tmp_path / "r.jsonl", RUN)
    writer.test(**ENDED, events=[(float(number), "oom_detected") for number in range(count)])
    writer.close()
    (line,) = read(tmp_path / "r.jsonl").tests
    kept = [t_s for t_s, _ in line["events"]]
    assert line["events_told"] == count and len(kept) <= EVENTS_MAX, f"{len(kept)} of {count} kept"
    assert len(kept) >= min(count, EVENTS_MAX // 2), f"{len(kept)} of {count} kept"
    assert kept == kept[:1] + [kept[0] + (kept[1] - kept[0]) * n for n in range(1, len(kept))], "not evenly spread"
    assert not count or kept[0] == 0, f"the first that is kept is number {kept[0]}"


def test_evidence_is_bounded(tmp_path: Path) -> None:
    """The first EVIDENCE_MAX lines stay: they say what came first."""
    writer = RecordWriter(tmp_path / "r.jsonl", RUN)
    writer.test(**ENDED, evidence=[str(number) for number in range(EVIDENCE_MAX + 50)])
    writer.close()
    (line,) = read(tmp_path / "r.jsonl").tests
    assert line["evidence"] == [str(number) for number in range(EVIDENCE_MAX)], f"{len(line['evidence'])} lines"


# A cell that cannot run.


def test_that_a_cell_is_not_run_is_a_record(tmp_path: Path) -> None:
    """It is whole, private, of the cell by name, and says why; nothing was collected."""
    about = {"backend": "torch-cuda", "environment": "cuda13", "machine": {"name": "m"}}
    path = write_not_run(tmp_path / "new" / "results", about, "no NVIDIA driver")
    assert re.fullmatch(rf"cuda13-torch-cuda-\d{{8}}T\d{{6}}-{os.getpid()}\.jsonl", path.name), path.name
    assert (mode := stat.S_IMODE(path.stat().st_mode)) == 0o600, f"mode is {mode:o}"
    record = read(path)
    assert record.complete and record.ended and (record.criteria, record.tests) == ((), ())
    began = record.run.pop("began")
    assert datetime.fromisoformat(began).utcoffset() == timedelta(0), f"it began {began}"
    expected = {"schema_version": SCHEMA_VERSION, **about, "collected": [], "not_run": "no NVIDIA driver"}
    assert record.run == expected, f"read back {record.run}"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_not_run(tmp_path / "file", about, "")


# Earlier versions.


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "records").glob("*.jsonl")), ids=lambda path: path.name)
def test_the_records_of_version_1_stay_readable(path: Path) -> None:
    """Those that are published: whole, with their criteria and series, and without what version 2 added."""
    record = read(path)
    assert record.complete and record.run["schema_version"] == 1
    assert record.criteria and {each["verdict"] for each in record.criteria} == {"pass"}, f"{len(record.criteria)}"
    assert record.tests == () and record.ended is None


def test_a_record_of_version_1_with_lines_of_today_is_read_as_it_is(tmp_path: Path) -> None:
    """Its version is not raised by reading it."""
    path = tmp_path / "r.jsonl"
    lines = _written(path, 1)
    path.write_bytes(_relinked([lines[0].replace(b'"schema_version":2', b'"schema_version":1'), *lines[1:]]))
    assert read(path).run["schema_version"] == 1


SWEPT = {"scenario": "feed", "target": "host", "points_counted": [12, 12], "faults_fired": 12, "complete": True}


def _sweep(writer: RecordWriter, **fields: Any) -> None:
    writer.sweep(**{"backend": "cpu", "environment": "cpu", "test": "t", **SWEPT, **fields})


def test_sweeps_are_read_back_in_order_and_apart_from_criteria(tmp_path: Path) -> None:
    """They are in the chain with all other lines, and the end counts them."""
    path = tmp_path / "r.jsonl"
    writer = RecordWriter(path, RUN)
    _criterion(writer)
    _sweep(writer, mode="transient")
    _sweep(writer, mode="persistent")
    _criterion(writer, criterion="d")
    writer.close()
    record = read(path)
    assert [line["criterion"] for line in record.criteria] == ["c", "d"]
    assert [line.pop("mode") for line in record.sweeps] == ["transient", "persistent"]
    whose = {"backend": "cpu", "environment": "cpu", "test": "t"}
    assert [{name: line[name] for name in (*whose, *SWEPT)} for line in record.sweeps] == [{**whose, **SWEPT}] * 2
    raw = path.read_bytes()
    assert json.loads(raw.splitlines()[-1])["count"] == 5
    path.write_bytes(raw.replace(b'"faults_fired":12', b'"faults_fired":99', 1))
    with pytest.raises(RecordError, match="line 3: altered"):
        read(path)


def test_a_sweep_after_the_end_is_refused(tmp_path: Path) -> None:
    """As a criterion is: nothing is written behind the end."""
    writer = RecordWriter(tmp_path / "r.jsonl", RUN)
    writer.close()
    with pytest.raises(RecordError, match="closed"):
        _sweep(writer)
    assert read(tmp_path / "r.jsonl").sweeps == ()


def test_every_line_carries_the_hash_of_the_one_before(tmp_path: Path) -> None:
    """The chain is the SHA-256 of the raw bytes, without newline, and begins with 64 zeros."""
    lines = _written(tmp_path / "r.jsonl")
    hashes = ["0" * 64] + [hashlib.sha256(line).hexdigest() for line in lines[:-1]]
    assert [json.loads(line)["previous"] for line in lines] == hashes
    assert json.loads(lines[-1])["count"] == 4, f"4 lines come before the end, it says {lines[-1]!r}"


def test_the_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    """Mode 0600, and a second writer is refused by the path's name."""
    path = tmp_path / "r.jsonl"
    before = _written(path)
    assert (mode := stat.S_IMODE(path.stat().st_mode)) == 0o600, f"mode is {mode:o}"
    with pytest.raises(RecordError, match=f"{path}.*there already"):
        RecordWriter(path, RUN)
    assert path.read_bytes().split(b"\n")[:-1] == before, "the record changed under a refused writer"


def test_lines_are_there_before_close(tmp_path: Path) -> None:
    """After SIGKILL every criterion written is read, as far as the record goes."""
    path = tmp_path / "r.jsonl"
    program = (
        "import os, signal, sys; from pathlib import Path; from qualification.records import RecordWriter\n"
        "w = RecordWriter(Path(sys.argv[1]), {})\n"
        "w.criterion(backend='b', environment='e', test='t', criterion='c', verdict='fail')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False)
    record = read(path, partial=True)
    assert done.returncode == -signal.SIGKILL, f"the writer ended with {done.returncode}"
    assert (len(record.criteria), record.complete) == (1, False), f"{len(record.criteria)} criteria, {record.complete}"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf")])
def test_numbers_that_are_not_finite_become_null(tmp_path: Path, number: float) -> None:
    """The lines stay strict JSON; the reason is kept and says what was there."""
    path = tmp_path / "r.jsonl"
    writer = RecordWriter(path, {"x": [number, {"y": number}]})
    _criterion(writer, value=number, limit=np.int64(3), reason="odd", series={"s": [(0, number), (number, 1), (2, 3)]})
    writer.close()
    text, record = path.read_text(), read(path)
    assert "NaN" not in text, text
    assert "Infinity" not in text, text
    assert record.run["x"] == [None, {"y": None}]
    (criterion,) = record.criteria
    assert (criterion["value"], criterion["limit"]) == (None, 3)
    assert criterion["reason"] == f"odd; value is {float(number)}, not a finite number"
    assert criterion["series"]["s"] == [[0.0, None], [2.0, 3.0]], f"series is {criterion['series']['s']}"


def test_there_is_no_field_for_audio_or_transcripts(tmp_path: Path) -> None:
    """An unknown field is refused by the signature, raw bytes by the type, and an unknown verdict by name."""
    writer = RecordWriter(tmp_path / "r.jsonl", RUN)
    with pytest.raises(TypeError, match="transcript"):
        _criterion(writer, transcript="hello")
    with pytest.raises(TypeError, match="cannot hold a bytes"):
        _criterion(writer, reason=b"pcm")
    with pytest.raises(ValueError, match="'green'"):
        _criterion(writer, verdict="green")
    writer.close()
    assert len(read(tmp_path / "r.jsonl").criteria) == 0
    kinds = {p.kind for p in list(inspect.signature(writer.criterion).parameters.values())}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}, f"parameters of kinds {kinds}"


@pytest.mark.parametrize("run", [{"previous": "x"}, {"kind": "x"}, {"schema_version": 1}])
def test_reserved_fields_are_refused(tmp_path: Path, run: dict[str, Any]) -> None:
    """The chain's own fields cannot be given by a caller, and no file is left behind."""
    with pytest.raises(ValueError, match=next(iter(run))):
        RecordWriter(tmp_path / "r.jsonl", run)
    assert not (tmp_path / "r.jsonl").exists()


def test_any_altered_byte_is_found(tmp_path: Path) -> None:
    """Every byte of a record is flipped in turn; none is read without an error."""
    path, raw = tmp_path / "r.jsonl", b"\n".join([*_written(tmp_path / "r.jsonl", 1), b""])
    missed = []
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            read(path)
        except RecordError:
            continue
        missed.append(at)
    assert not missed, f"{len(missed)} of {len(raw)} altered bytes were not found: at {missed}"


def test_any_truncation_is_found(tmp_path: Path) -> None:
    """Cut anywhere, the record is refused."""
    path, raw = tmp_path / "r.jsonl", b"\n".join([*_written(tmp_path / "r.jsonl", 1), b""])
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(RecordError):
            read(path)


def test_damage_is_named(tmp_path: Path) -> None:
    """The message says which line, and how."""
    path = tmp_path / "r.jsonl"
    lines = _written(path)
    whole = b"\n".join(lines) + b"\n"
    short = json.dumps({**json.loads(lines[-1]), "count": 9}).encode()
    cases = {
        "line 1: truncated: there is not one whole line": b"",
        "line 4: truncated: no end line": b"\n".join(lines[:-1]) + b"\n",
        "line 5: truncated: it is cut off": whole[:-1],
        "line 2: altered": whole.replace(b'"value":0.0', b'"value":0.1'),
        "line 2: altered, or a line after it is missing": b"\n".join([*lines[:2], *lines[3:], b""]),
        "line 1: altered: a first line": b"\n".join([*lines[1:], b""]),
        "line 6: there is more after the end line .line 5.": whole + lines[1] + b"\n",
        "line 6: there is more": whole + b"x",
        "line 3: it is not JSON": b"\n".join([*lines[:2], b"{nonsense", *lines[3:], b""]),
        "line 2: it is not JSON": b"\n".join([lines[0], b'{"value":NaN}', b""]),
        "line 2: it is not a JSON object": b"\n".join([lines[0], b"[]", b""]),
        "line 5: the end line says .'count': 9, .*, but 4 lines": b"\n".join([*lines[:-1], short, b""]),
        "line 5: altered: the end line says": whole.replace(b'"ended":"2', b'"ended":"1'),
        "line 1: schema_version is 7: this reader knows 1, 2": _relinked(
            [lines[0].replace(b'"schema_version":2', b'"schema_version":7')]
        ),
        "line 1: kind is 'criterion': expected run": _relinked(lines[1:]),
        "line 2: kind is 'run': expected criterion or sweep or test or end": _relinked([lines[0], lines[0]]),
    }
    for message, raw in cases.items():
        path.write_bytes(raw)
        with pytest.raises(RecordError, match=f"{path}: {message}"):
            read(path)


def test_partial_still_refuses_what_was_altered(tmp_path: Path) -> None:
    """A torn last line is left out; an altered line is still an error."""
    path = tmp_path / "r.jsonl"
    raw = b"\n".join([*_written(path), b""])
    path.write_bytes(raw[:-20])
    record = read(path, partial=True)
    assert (len(record.criteria), record.complete) == (3, False), f"{len(record.criteria)} criteria"
    path.write_bytes(raw[:-20].replace(b'"value":0.0', b'"value":0.1'))
    with pytest.raises(RecordError, match="line 2: altered"):
        read(path, partial=True)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    """Reading and creating name the path."""
    with pytest.raises(RecordError, match=r"none\.jsonl.*No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match=r"cannot be created: No such file"):
        RecordWriter(tmp_path / "nowhere" / "r.jsonl", RUN)


def test_a_refused_write_is_a_clear_error_and_the_last(tmp_path: Path) -> None:
    """When the system refuses to write (a real file size limit), the path is named and nothing is added after."""
    path = tmp_path / "r.jsonl"
    writer = RecordWriter(path, RUN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, limits[1]))
    try:
        with pytest.raises(RecordError, match=f"{path}: line 2 cannot be written: File too large"):
            _criterion(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    with pytest.raises(RecordError, match="closed"):
        _criterion(writer)
    writer.close()
    assert read(path, partial=True).criteria == (), "a torn line was read as a criterion"
    with pytest.raises(RecordError, match="line 2: truncated: it is cut off"):
        read(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_says_so(tmp_path: Path) -> None:
    """ENOSPC comes through with the path's name."""
    writer = RecordWriter(tmp_path / "r.jsonl", RUN)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._descriptor or -1)
    os.close(full)
    with pytest.raises(RecordError, match=r"r\.jsonl: line 2 cannot be written: No space left"):
        _criterion(writer)


def test_thinning_keeps_ends_and_spikes() -> None:
    """Of 10,000 points at most 240 stay: the first, the last, and one spike each way among them."""
    points = [[float(t), 10.0] for t in range(10_000)]
    points[1234][1], points[7777][1] = 99.0, -99.0
    thinned = thin(points)
    assert len(thinned) <= SERIES_POINTS_MAX, f"{len(thinned)} points"
    assert [thinned[0], thinned[-1]] == [[0.0, 10.0], [9999.0, 10.0]], f"ends are {thinned[0]} and {thinned[-1]}"
    lost = [spike for spike in ([1234.0, 99.0], [7777.0, -99.0]) if spike not in thinned]
    assert not lost, f"{len(lost)} of 2 spikes lost: {lost}"
    assert thinned == sorted(thinned), "points are out of order"


@pytest.mark.parametrize("count", [0, 1, 239, 240, 241, 500])
def test_thinning_leaves_short_series_whole(count: int) -> None:
    """Up to 240 points nothing is lost; beyond, never more than 240 stay."""
    thinned = thin([(t, t % 7) for t in range(count)])
    assert len(thinned) == count if count <= 240 else 200 < len(thinned) <= 240, f"{len(thinned)} of {count} points"
