"""The spool: every accepted block and every result, durable when the call returns.

SQLite in WAL mode with ``synchronous=FULL``. A result is its own acknowledgement: the two are one row, so one
transaction. After any crash: acknowledged ≤ stored ≤ acknowledged + the one call in flight.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import tempfile
import threading
import time
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from protection import storage

FloatArray = npt.NDArray[np.float32]
_SCHEMA_VERSION = 1
#: Of a limited spool; answers take a tenth of what their audio takes.
_AUDIO_SHARE = 0.85
#: Blocks that the retention rule deletes in one transaction.
_FORGOTTEN_AT_ONCE = 16
#: A row of audio has so many at most.
_PIECE_SAMPLES = 16_000
_WAV_MOST_SAMPLES = ((1 << 32) - 64) // 2
#: Of the names of the database and of the files that SQLite has beside it.
_ENDINGS = ("", "-wal", "-shm", "-journal")
_SAFE = "what was accepted before is safe"
_NOT_ACCEPTED = f"{_SAFE}, what this call brought was not accepted"
#: Whoever asks who has a spool open holds its lock for a moment.
_LOCK_PATIENCE_S = 0.2
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (
    start INTEGER PRIMARY KEY, stop INTEGER NOT NULL, samples BLOB NOT NULL, stored_s REAL NOT NULL
);
CREATE TABLE results (
    start INTEGER PRIMARY KEY, stop INTEGER NOT NULL, scores BLOB, vocabulary INTEGER NOT NULL,
    device TEXT NOT NULL, degraded INTEGER NOT NULL, made_s REAL NOT NULL
);
"""


class SpoolError(Exception):
    """The spool cannot do what was asked. Nothing accepted before is lost; the message says what to do."""


class SpoolBusy(SpoolError):
    """Another pipeline has this spool open."""


class SpoolFull(SpoolError):
    """There is no room. What the call brought was not accepted: feed it again when there is."""


class AudioError(ValueError):
    """A block cannot be accepted. The message says what was wrong and what was expected."""


@dataclass(frozen=True)
class Result:
    """The answer for samples [start, stop): ``output`` float32 [frames, vocabulary], or None for a declared failure."""

    start: int
    stop: int
    output: FloatArray | None
    device: str
    degraded: bool


def holder(folder: Path) -> int | None:
    """Give the process that has the spool in this folder open, None where none has, 0 where it did not say."""
    try:
        lock_fd = os.open(folder / "spool.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SpoolError(f"the spool folder {folder} cannot be read ({error}): check its permissions") from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(lock_fd)
    finally:
        os.close(lock_fd)
    return None


def busy(folder: Path, owner: int) -> SpoolBusy:
    """Say that this process has the spool in this folder open."""
    return SpoolBusy(
        f"another pipeline (process {owner or 'unknown'}) has the spool {folder / 'spool.db'} open: "
        "close that one, or use another folder; two recordings never share a spool"
    )


def _not_writable(what: str, error: OSError) -> SpoolError:
    room = error.errno in storage.NO_ROOM
    advice = f"{storage.advice(error.errno or 0)}, or " if room else ""
    return (SpoolFull if room else SpoolError)(
        f"the spool {what} cannot be written ({error}): {advice}choose another folder"
    )


def _same_file(path: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.samefile(other)
    return False


def _owner(lock_fd: int) -> int:
    text = os.pread(lock_fd, 32, 0).strip()
    return int(text) if text.isdigit() else 0


class SpoolView:
    """A recording on disk, read only: also while another process records into it. It sees what is there when asked."""

    def __init__(self, folder: Path) -> None:
        """Look at the spool in the folder. Nothing is locked, and no spool is made. Raises SpoolError."""
        self.path = folder / "spool.db"
        self._lock = threading.RLock()
        self._closed = False
        if not self.path.is_file():
            raise SpoolError(f"there is no spool in {folder}: expected {self.path}, which a recording makes")
        self._db = self._connect("mode=ro")
        try:
            self._look()
        except BaseException:
            self._db.close()
            self._tidy()
            raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        where = f"file:{quote(str(self.path.absolute()))}?{mode}"
        return sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0)

    def _look(self) -> None:
        with self._errors("open"):
            try:
                tables = self._tables()
            except sqlite3.OperationalError as error:
                log = self.path.with_name("spool.db-wal")
                if error.sqlite_errorcode != sqlite3.SQLITE_CANTOPEN or log.exists():
                    raise
                # A folder that cannot be written, and all is in the one file: there is no other way to read it.
                self._db.close()
                self._db = self._connect("mode=ro&immutable=1")
                tables = self._tables()
        if not tables:
            raise SpoolError(f"the spool {self.path} was never written to: there is no recording in it")
        if "meta" not in tables:
            raise SpoolError(f"{self.path} is the database of another program: use another folder")
        self._require("schema_version", _SCHEMA_VERSION)

    @property
    def accepted(self) -> int:
        """Samples durably accepted: [0, accepted)."""
        return self._stored()[0]

    @property
    def answered(self) -> int:
        """Samples answered: [0, answered)."""
        return self._stored()[1]

    @property
    def set_aside(self) -> int:
        """Chunks that were set aside: each has a declared failure for its answer."""
        return self._scalar("SELECT COUNT(*) FROM results WHERE scores IS NULL")

    @property
    def sample_rate_hz(self) -> int:
        """Samples in a second."""
        return self._meta("sample_rate_hz")

    @property
    def kept_from(self) -> int:
        """First sample that the retention rule has not deleted."""
        return self._meta("kept_from")

    def read(self, start: int, stop: int) -> FloatArray:
        """Read samples [start, stop) as float32; positions before 0 are silence. Raises SpoolError for a gap."""
        out = np.zeros(max(0, stop - start), np.float32)
        first = max(start, 0)
        if stop > first:
            with self._lock, self._errors("read"):
                # By the key alone: the time does not grow with the recording.
                rows = self._db.execute(
                    "SELECT start, stop, samples FROM blocks WHERE start < ? AND start >= "
                    "COALESCE((SELECT MAX(start) FROM blocks WHERE start <= ?), 0) ORDER BY start",
                    (stop, first),
                ).fetchall()
            # Asked after: another process may delete meanwhile.
            if first < self.kept_from:
                raise SpoolError(
                    f"samples from {first} were asked for, but those before {self.kept_from} were deleted "
                    "by the policy's retention_s after they were answered"
                )
            position = first
            for block_start, block_stop, data in rows:
                if not block_start <= position < block_stop or len(data) != 4 * (block_stop - block_start):
                    break
                samples = np.frombuffer(data, "<f4")
                upto = min(block_stop, stop)
                out[position - start : upto - start] = samples[position - block_start : upto - block_start]
                position = upto
            if position < stop:
                raise SpoolError(f"the spool {self.path} has no samples [{position}, {stop}): it is damaged")
        return out

    def results(self) -> list[Result]:
        """Read every result, by position."""
        with self._lock, self._errors("read"):
            rows = self._db.execute(
                "SELECT start, stop, scores, vocabulary, device, degraded FROM results ORDER BY start"
            ).fetchall()
        return [
            Result(
                start,
                stop,
                None if scores is None else np.frombuffer(scores, "<f4").reshape(-1, vocabulary),
                device,
                bool(degraded),
            )
            for start, stop, scores, vocabulary, device, degraded in rows
        ]

    def export_wav(self, path: Path) -> int:
        """Write what is kept as a 16-bit mono WAV, a minute at a time; return the number of samples written.

        The file is there whole or not at all. Raises SpoolError when it cannot be written, or is a file of a spool.
        """
        self.require_no_spool_file(path)
        begin, stop, rate_hz = self.kept_from, self.accepted, self.sample_rate_hz
        if stop - begin > _WAV_MOST_SAMPLES:
            raise SpoolError(f"the recording has {stop - begin} samples: a WAV holds at most {_WAV_MOST_SAMPLES}")
        try:
            path = path.resolve()
            if path.exists() and not path.is_file():
                raise SpoolError(f"{path} is not a file: name a WAV that can be replaced")
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                try:
                    with wave.open(file, "wb") as out:
                        out.setnchannels(1)
                        out.setsampwidth(2)
                        out.setframerate(rate_hz)
                        for start in range(begin, stop, 60 * rate_hz):
                            samples = self.read(start, min(start + 60 * rate_hz, stop))
                            pcm = np.clip(np.rint(np.clip(samples, -1, 1) * 32768.0), -32768, 32767).astype("<i2")
                            out.writeframes(pcm.tobytes())
                    os.fsync(file.fileno())
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise SpoolError(f"the recording cannot be written to {path} ({error}): the spool is unharmed") from error
        return stop - begin

    def require_no_spool_file(self, path: Path) -> None:
        """Raise SpoolError where an export to this path would replace a file of this spool, or one named as such."""
        # SQLite's own files are beside the database itself, whatever links lead to it.
        database = self.path.resolve()
        own = [database.with_name(f"{database.name}{ending}") for ending in _ENDINGS]
        own.append(self.path.with_name("spool.lock").resolve())
        resolved = path.resolve()
        named = resolved.name in {"spool.lock", *(f"spool.db{ending}" for ending in _ENDINGS)}
        # Also what is not there yet: SQLite would take it for its log.
        if named or resolved in own or any(_same_file(resolved, file) for file in own):
            raise SpoolError(f"{path} is a file of a spool, and never replaced by an export: name another file")

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        with self._lock:
            if not self._closed:
                self._db.close()
                self._closed = True
                self._tidy()

    def __enter__(self) -> Self:
        """Nothing to do: it is open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # How.

    def _tidy(self) -> None:
        """Have SQLite remove the empty log and its index: it makes them for a reader, and no reader removes them.

        It does so only when nobody has the database open, with the database locked against whoever opens it just now.
        """
        with contextlib.suppress(OSError, MemoryError, sqlite3.Error):
            # A log with something in it is left as it is.
            if self.path.resolve().with_name(f"{self.path.resolve().name}-wal").stat().st_size == 0:
                with contextlib.closing(self._connect("mode=rw")) as db:
                    db.execute("PRAGMA busy_timeout = 0").fetchall()
                    db.execute("SELECT COUNT(*) FROM sqlite_master").fetchall()

    def _tables(self) -> set[str]:
        return {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}

    def _stored(self) -> tuple[int, int]:
        """Read how many samples are accepted, and how many of them answered."""
        last = "SELECT COALESCE((SELECT stop FROM {} ORDER BY start DESC LIMIT 1), 0)"
        # In this order: another process may answer meanwhile.
        answered = self._scalar(last.format("results"))
        # Blocks that were answered may have been deleted by the retention rule.
        return max(answered, self._scalar(last.format("blocks"))), answered

    def _require(self, key: str, expected: int) -> None:
        found = self._meta(key)
        if found != expected:
            raise SpoolError(f"the spool {self.path} has {key} {found}, expected {expected}: use another folder")

    def _meta(self, key: str) -> int:
        return self._scalar("SELECT value FROM meta WHERE key = ?", key)

    def _scalar(self, query: str, *values: object) -> int:
        with self._lock, self._errors("read"):
            row = self._db.execute(query, values).fetchone()
        if row is None:
            raise SpoolError(f"the spool {self.path} is damaged: nothing for {query!r} {values}")
        return int(row[0])

    @contextlib.contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        """Say SQLite's errors in our words."""
        try:
            yield
        except sqlite3.Error as error:
            if self._closed:
                raise SpoolError(f"the spool {self.path} was closed: open it again to {verb} it") from error
            raise self._said(verb, error) from error

    def _said(self, verb: str, error: sqlite3.Error) -> SpoolError:
        return SpoolError(f"the spool {self.path} could not be used to {verb} ({error}): {storage.advice(0)}; {_SAFE}")


class Spool(SpoolView):
    """One recording on disk, float32 mono from sample 0. Safe to use from several threads of one process."""

    def __init__(self, folder: Path, sample_rate_hz: int, limit_bytes: int | None = None) -> None:
        """Open or create ``spool.db`` in the folder. Raises SpoolError, and SpoolBusy while another has it open."""
        self.path = folder / "spool.db"
        self._lock = threading.RLock()
        self._closed = False
        self._limit_bytes = limit_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = os.open(folder / "spool.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _not_writable(f"folder {folder}", error) from error
        try:
            self._take_lock()
            # Created by us first: SQLite's own files take the mode of the database.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=5.0)
            try:
                self._open(sample_rate_hz, limit_bytes)
            except BaseException:
                self._db.close()
                raise
        except OSError as error:
            os.close(self._lock_fd)
            raise _not_writable(str(self.path), error) from error
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _take_lock(self) -> None:
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise busy(self.path.parent, _owner(self._lock_fd)) from None
            time.sleep(0.01)
        text = f"{os.getpid()}\n".encode()
        # In this order: it is never empty for whoever reads it.
        os.pwrite(self._lock_fd, text, 0)
        os.ftruncate(self._lock_fd, len(text))

    def _open(self, sample_rate_hz: int, limit_bytes: int | None) -> None:
        with self._errors("open"):
            tables = self._tables()
            if tables and "meta" not in tables:
                raise SpoolError(f"{self.path} is the database of another program: use another folder")
            self._db.execute("PRAGMA journal_mode = WAL")
            # FULL: a commit is on the disk when it returns, whatever happens to the machine.
            self._db.execute("PRAGMA synchronous = FULL")
            # A short log: what is in it needs its room twice, and a full disk must not be met when it is copied.
            self._db.execute(f"PRAGMA wal_autocheckpoint = {storage.LOG_PAGES}").fetchall()
            self._db.execute(f"PRAGMA journal_size_limit = {storage.LOG_PAGES * storage.PAGE_BYTES}").fetchall()
            # Deleted audio is overwritten, not only forgotten.
            self._db.execute("PRAGMA secure_delete = ON")
            if limit_bytes is not None:
                self._db.execute(f"PRAGMA max_page_count = {max(1, limit_bytes // storage.PAGE_BYTES)}")
            if not tables:
                with self._transaction():
                    for statement in _SCHEMA.strip().split(";"):
                        if statement.strip():
                            self._db.execute(statement)
                    self._set_meta("schema_version", _SCHEMA_VERSION)
                    self._set_meta("sample_rate_hz", sample_rate_hz)
                    self._set_meta("kept_from", 0)
        self._require("schema_version", _SCHEMA_VERSION)
        self._require("sample_rate_hz", sample_rate_hz)
        self._unsure = True
        self._settle()

    def _settle(self) -> None:
        """Find out how far the file is, where a call before this one was cut short: by a signal, say, in its commit."""
        if not self._unsure:
            return
        if self._db.in_transaction:
            with self._errors("write"):
                self._db.execute("ROLLBACK")
        self._accepted, self._answered = self._stored()
        self._unsure = False

    # Reading.

    @property
    def accepted(self) -> int:
        """Samples durably accepted: [0, accepted)."""
        return self._accepted

    @property
    def answered(self) -> int:
        """Samples answered: [0, answered)."""
        return self._answered

    # Writing.

    def append(self, start: int, samples: FloatArray) -> int:
        """Store a block and return how many samples are durably accepted. Idempotent by position.

        Raises AudioError for a gap or for samples that differ from those accepted at the same position, SpoolFull
        when there is no room, SpoolError otherwise. When it raises, nothing of the block was accepted.
        """
        with self._lock:
            self._settle()
            if start > self._accepted:
                raise AudioError(
                    f"the block starts at sample {start}, but only {self._accepted} were accepted: "
                    f"feed the samples from {self._accepted} on, without a gap"
                )
            known = min(self._accepted - start, len(samples))
            compare_from = max(start, self.kept_from)
            if compare_from < start + known:
                stored = self.read(compare_from, start + known)
                if stored.tobytes() != samples[compare_from - start : known].tobytes():
                    raise AudioError(
                        f"samples [{compare_from}, {start + known}) were accepted before with other values: "
                        "a position has one sample, so feed new audio from the accepted position on"
                    )
            fresh = samples[known:]
            if not len(fresh):
                return self._accepted
            first, stop = start + known, start + len(samples)
            data = np.ascontiguousarray(fresh, "<f4")
            self._require_room(data.nbytes)
            now_s = time.time()
            # In pieces: a chunk is read without the minutes that may have come with it.
            rows = (
                (at, min(at + _PIECE_SAMPLES, stop), data[at - first : at - first + _PIECE_SAMPLES].tobytes(), now_s)
                for at in range(first, stop, _PIECE_SAMPLES)
            )
            with self._errors("write"), self._transaction():
                self._db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?)", rows)
            self._accepted, self._unsure = stop, False
            return stop

    def answer(self, results: list[Result]) -> None:
        """Store results, and with them their acknowledgement, in one transaction. They continue what is answered."""
        with self._lock:
            self._settle()
            position = self._answered
            for result in results:
                if result.start != position or not result.start < result.stop <= self._accepted:
                    raise SpoolError(
                        f"a result for [{result.start}, {result.stop}) does not continue the answered "
                        f"[0, {position}) within the accepted [0, {self._accepted})"
                    )
                position = result.stop
            now_s = time.time()
            rows = [
                (
                    r.start,
                    r.stop,
                    None if r.output is None else np.ascontiguousarray(r.output, "<f4").tobytes(),
                    1 if r.output is None else r.output.shape[1],
                    r.device,
                    int(r.degraded),
                    now_s,
                )
                for r in results
            ]
            with self._errors("write"), self._transaction():
                self._db.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._answered, self._unsure = position, False

    def forget(self, older_than_s: float, context_samples: int) -> int:
        """Delete answered audio stored more than ``older_than_s`` seconds ago, but the left context that the next
        chunk needs. Returns the first sample that is still kept.
        """
        with self._lock, self._errors("write"):
            self._settle()
            # What has no answer is kept, to be listened to.
            unheard = self._scalar("SELECT COALESCE(MIN(start), ?) FROM results WHERE scores IS NULL", self._answered)
            keep_from = min(self._answered - context_samples, unheard)
            deleted = False
            while True:
                # A few at a time: what is overwritten goes through the log, and a full disk has little room for that.
                row = self._db.execute(
                    "SELECT MAX(stop) FROM (SELECT stop, stored_s FROM blocks ORDER BY start LIMIT ?) "
                    "WHERE stop <= ? AND stored_s < ?",
                    (_FORGOTTEN_AT_ONCE, keep_from, time.time() - older_than_s),
                ).fetchone()
                if row[0] is None:
                    break
                with self._transaction():
                    self._db.execute("DELETE FROM blocks WHERE stop <= ?", (row[0],))
                    self._set_meta("kept_from", row[0])
                self._unsure = False
                deleted = True
            if deleted:
                # The log before the file has what was deleted, too.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            return self.kept_from

    def _require_room(self, data_bytes: int) -> None:
        """Refuse audio while there is still room for its answers: what is accepted has to be answered."""
        unanswered_bytes = 4 * (self._accepted - self._answered)
        free_bytes = storage.free_bytes(self.path.parent)
        plenty = free_bytes is None or free_bytes > storage.PLENTY_BYTES + 4 * (data_bytes + unanswered_bytes)
        if plenty and self._limit_bytes is None:
            return
        with self._errors("write"):
            pages, unused = self._scalar("PRAGMA page_count"), self._scalar("PRAGMA freelist_count")
        if free_bytes is not None and not plenty:
            needed_bytes = storage.needed_bytes(self.path, pages, unused, data_bytes, unanswered_bytes)
            if free_bytes < needed_bytes:
                raise SpoolFull(
                    f"the spool {self.path} is full (the disk has {free_bytes} bytes free, {needed_bytes} are needed "
                    f"for this and for the answers): free some disk; {_NOT_ACCEPTED}"
                )
        if self._limit_bytes is None:
            return
        if (pages - unused) * storage.PAGE_BYTES + data_bytes > _AUDIO_SHARE * self._limit_bytes:
            raise SpoolFull(
                f"the spool {self.path} is full (spool_limit_bytes is {self._limit_bytes}, "
                f"and room is left for answers): free some disk, or raise spool_limit_bytes; {_NOT_ACCEPTED}"
            )

    def close(self) -> None:
        """Close the file and let others open it. A second call does nothing."""
        with self._lock:
            try:
                super().close()
            finally:
                # Last, and whatever happened: who holds it does not use the database any more.
                lock_fd, self._lock_fd = self._lock_fd, -1
                if lock_fd >= 0:
                    os.close(lock_fd)

    # How.

    def _set_meta(self, key: str, value: int) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, str(value)))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        # Until the caller has noted what was written, the file may be further than this object knows.
        self._unsure = True
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A failed COMMIT leaves the transaction open: nothing of it may become visible later.
            if self._db.in_transaction:
                with contextlib.suppress(Exception):
                    self._db.execute("ROLLBACK")
            raise

    def _said(self, verb: str, error: sqlite3.Error) -> SpoolError:
        if verb == "read":
            return super()._said(verb, error)
        number = storage.cause(self.path, error)
        reason = f"{error}: {os.strerror(number)}" if number else str(error)
        text = f"the spool {self.path} could not be used to {verb} ({reason}): {storage.advice(number)}"
        if number == errno.ENOSPC and self._limit_bytes is not None:
            text += ", or raise spool_limit_bytes"
        return (SpoolFull if number in storage.NO_ROOM else SpoolError)(
            f"{text}; {_NOT_ACCEPTED if verb == 'write' else _SAFE}"
        )
