"""Records are chained, strict JSON, on the disk line by line, and every damage is named."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qualification.records import SERIES_POINTS_MAX, RecordError, RecordWriter, read, thin

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
    assert record.run == {"schema_version": 1, **RUN}, f"read back {record.run}"
    assert (first["value"], first["limit"], first["points_seen"], first["provenance"]) == (1.5, None, 7, "capped")
    assert second["series"] == {"rss": [[0.0, 1.0], [1.0, 2.0]]}, f"series came back as {second['series']}"


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
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
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


@pytest.mark.parametrize("run", [{"previous": "x"}, {"kind": "x"}, {"schema_version": 2}])
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
        "line 5: the end line says .'count': 9., but 4 lines": b"\n".join([*lines[:-1], short, b""]),
        "line 1: schema_version is 7": _relinked([lines[0].replace(b'"schema_version":1', b'"schema_version":7')]),
        "line 1: kind is 'criterion': expected run": _relinked(lines[1:]),
        "line 2: kind is 'run': expected criterion or sweep or end": _relinked([lines[0], lines[0]]),
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
