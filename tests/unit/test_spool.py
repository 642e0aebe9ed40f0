"""The spool keeps what it accepted, says clearly why it cannot accept more, and never keeps half of anything."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from protection import storage
from protection.spool import AudioError, Result, Spool, SpoolBusy, SpoolError, SpoolFull, SpoolView, holder
from tests.unit.descriptors import open_descriptors

ROOT = Path(__file__).resolve().parents[2]
RATE = 16_000
Audio = Callable[[float], npt.NDArray[np.float32]]


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "s", RATE)
    yield made
    made.close()


def _result(start: int, stop: int, value: float | None = 1.0) -> Result:
    return Result(start, stop, None if value is None else np.full((2, 3), value, np.float32), "cpu", False)


def _feed(spool: Spool, samples: npt.NDArray[np.float32]) -> None:
    for start in range(0, len(samples), 1600):
        spool.append(start, samples[start : start + 1600])


@contextlib.contextmanager
def _tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system of our own; not run where that is not allowed."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a file system of our own needs root")
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        # At once out of sight, also where a test that failed has a file open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


# Durable.


def test_a_commit_is_on_the_disk_when_it_returns(spool: Spool) -> None:
    expected = {"synchronous": 2, "journal_mode": "wal", "secure_delete": 1}
    found = {name: spool._db.execute(f"PRAGMA {name}").fetchone()[0] for name in expected}
    assert found == expected, f"SQLite's settings are {found}"


def test_every_file_is_for_the_user_alone(spool: Spool, audio: Audio) -> None:
    spool.append(0, audio(0.1))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in spool.path.parent.iterdir()}
    assert {"spool.db", "spool.db-wal", "spool.lock"} <= set(modes), f"the files are {sorted(modes)}"
    assert set(modes.values()) == {0o600}, f"the modes are { {name: oct(mode) for name, mode in modes.items()} }"
    folder = stat.S_IMODE(spool.path.parent.stat().st_mode)
    assert folder == 0o700, f"the folder's mode is {folder:o}"


def test_what_was_accepted_is_there_after_a_kill(tmp_path: Path, audio: Audio) -> None:
    program = (
        "import os, signal, sys, numpy as np; from pathlib import Path; from protection.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 16000)\n"
        "for k in range(7): spool.append(k * 1600, np.full(1600, k, np.float32))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -9, f"the process ended with {done.returncode}"
    spool = Spool(tmp_path, RATE)
    found = spool.read(0, spool.accepted)
    spool.close()
    assert len(found) == 7 * 1600, f"{len(found)} samples are there, {7 * 1600} were accepted"
    assert np.array_equal(found, np.repeat(np.arange(7, dtype=np.float32), 1600)), "the samples are others"


# Feeding.


def test_feeding_is_idempotent_by_position(spool: Spool, audio: Audio) -> None:
    samples = audio(1.0)
    returned = [spool.append(start, samples[start:8000]) for start in (0, 0, 4000)]
    assert returned == [8000] * 3, f"feeding the same again returned {returned}"
    rows = spool._db.execute("SELECT COUNT(*) FROM blocks").fetchone()[0]
    assert rows == 1, f"{rows} blocks are stored where one was new"
    assert np.array_equal(spool.read(0, 8000), samples[:8000]), "the samples are others"


def test_an_overlap_with_the_same_samples_adds_only_what_is_new(spool: Spool, audio: Audio) -> None:
    samples = audio(1.0)
    spool.append(0, samples[:8000])
    assert spool.append(5000, samples[5000:12_000]) == 12_000, f"{spool.accepted} samples are accepted"
    assert np.array_equal(spool.read(0, 12_000), samples[:12_000]), "the samples are others"


def test_an_overlap_with_other_samples_is_refused_and_changes_nothing(spool: Spool, audio: Audio) -> None:
    samples = audio(1.0)
    spool.append(0, samples[:8000])
    other = samples[4000:12_000].copy()
    other[10] += 1e-6
    with pytest.raises(AudioError, match=r"samples \[4000, 8000\) were accepted before with other values"):
        spool.append(4000, other)
    assert spool.accepted == 8000, f"{spool.accepted} samples are accepted"
    assert np.array_equal(spool.read(0, 8000), samples[:8000]), "what was accepted has changed"


def test_a_gap_is_refused_with_the_position_to_go_on_from(spool: Spool, audio: Audio) -> None:
    spool.append(0, audio(0.1))
    with pytest.raises(
        AudioError, match="starts at sample 1601, but only 1600 were accepted: feed the samples from 16"
    ):
        spool.append(1601, audio(0.1))
    assert spool.accepted == 1600, f"{spool.accepted} samples are accepted"


def test_a_long_block_is_stored_in_pieces_so_that_a_chunk_is_read_alone(spool: Spool, audio: Audio) -> None:
    samples = audio(5.5)
    spool.append(0, samples[:100])
    assert spool.append(0, samples) == len(samples), f"{spool.accepted} samples are accepted"
    longest_bytes = spool._db.execute("SELECT MAX(LENGTH(samples)) FROM blocks").fetchone()[0]
    assert longest_bytes == 4 * RATE, f"the longest row has {longest_bytes} bytes"
    assert np.array_equal(spool.read(0, len(samples)), samples), "the samples are others"


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_tiny_block_is_a_block(spool: Spool, audio: Audio, length: int) -> None:
    samples = audio(1.0)
    assert spool.append(0, samples[:length]) == length, f"{spool.accepted} samples are accepted"
    assert np.array_equal(spool.read(0, length), samples[:length]), "the samples are others"


def test_samples_that_are_not_contiguous_in_memory_are_stored_as_they_are(spool: Spool, audio: Audio) -> None:
    samples = audio(1.0)[::3]
    spool.append(0, samples)
    assert spool.append(0, samples) == len(samples), "feeding the same again was not recognised"
    assert np.array_equal(spool.read(0, len(samples)), samples), "the samples are others"


def test_every_bit_is_kept(spool: Spool) -> None:
    samples = np.array([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 0.1], np.float32)
    spool.append(0, samples)
    assert spool.read(0, len(samples)).tobytes() == samples.tobytes(), "the bits are others"


def test_reading_before_the_beginning_is_silence_and_behind_the_end_an_error(spool: Spool, audio: Audio) -> None:
    samples = audio(0.1)
    spool.append(0, samples)
    found = spool.read(-100, 50)
    assert not found[:100].any() and np.array_equal(found[100:], samples[:50]), "silence is not before the beginning"
    with pytest.raises(SpoolError, match=r"has no samples \[1600, 1601\)"):
        spool.read(0, 1601)


# One at a time.


def test_a_second_spool_on_the_folder_is_refused_and_names_the_process(spool: Spool) -> None:
    with pytest.raises(SpoolBusy, match=rf"another pipeline \(process {os.getpid()}\) has the spool .* open"):
        Spool(spool.path.parent, RATE)


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from protection.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1]), 16000); print(flush=True); input()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(SpoolBusy, match=rf"process {child.pid}\)"):
        Spool(tmp_path, RATE)
    child.kill()
    child.communicate()
    Spool(tmp_path, RATE).close()


def test_closing_frees_the_folder_and_a_second_call_does_nothing(tmp_path: Path) -> None:
    first = Spool(tmp_path, RATE)
    first.close()
    first.close()
    second = Spool(tmp_path, RATE)
    with pytest.raises(SpoolError, match="was closed: open it again"):
        first.append(0, np.zeros(10, np.float32))
    assert second.append(0, np.zeros(10, np.float32)) == 10, "the second spool does not work"
    second.close()


class _CannotCloseYet:
    """SQLite's connection, when there is no memory for its last statement."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db, self.asked = db, 0

    def close(self) -> None:
        self.asked += 1
        if self.asked == 1:
            raise sqlite3.OperationalError("out of memory")
        self._db.close()


def test_the_folder_is_free_though_the_database_could_not_be_closed(tmp_path: Path, audio: Audio) -> None:
    first = Spool(tmp_path / "s", RATE)
    first.append(0, audio(0.1))
    failing = _CannotCloseYet(first._db)
    first._db = failing  # type: ignore[assignment]
    before = open_descriptors()
    with pytest.raises(sqlite3.OperationalError, match="out of memory"):
        first.close()
    freed = before - open_descriptors()
    assert len(freed) == 1, f"closed: {freed}, expected the lock's"
    with contextlib.closing(Spool(tmp_path / "s", RATE)) as second:
        assert second.accepted == 1600, f"{second.accepted} samples are there"
        # It closes what it did not, and nothing of the other's.
        first.close()
        first.close()
        assert failing.asked == 2, f"the database was asked {failing.asked} times to close"
        with pytest.raises(SpoolBusy):
            Spool(tmp_path / "s", RATE)


# Full, and not writable.


def test_a_full_spool_keeps_what_it_accepted_and_goes_on_with_a_larger_limit(tmp_path: Path, audio: Audio) -> None:
    samples = audio(10.0)
    spool = Spool(tmp_path, RATE, limit_bytes=256 << 10)
    with pytest.raises(SpoolFull, match="raise spool_limit_bytes"):
        _feed(spool, samples)
    accepted = spool.accepted
    assert 30_000 < accepted < 65_536 and accepted % 1600 == 0, f"{accepted} samples were accepted in 256 KiB"
    with pytest.raises(SpoolFull):
        spool.append(accepted, samples[accepted : accepted + 1600])
    assert np.array_equal(spool.read(0, accepted), samples[:accepted]), "what was accepted has changed"
    spool.close()
    larger = Spool(tmp_path, RATE, limit_bytes=1 << 20)
    assert larger.accepted == accepted, f"{larger.accepted} samples are there after opening, {accepted} were accepted"
    assert larger.append(accepted, samples[accepted:]) == len(samples), f"only {larger.accepted} were accepted"
    assert np.array_equal(larger.read(0, len(samples)), samples), "the samples are others"
    larger.close()


def test_a_full_disk_keeps_what_was_accepted(tmp_path: Path, audio: Audio) -> None:
    samples = audio(20.0)
    with _tmpfs(tmp_path / "disk", "size=2m") as folder:
        spool = Spool(folder / "s", RATE)
        with pytest.raises(SpoolFull, match="free some disk"):
            _feed(spool, samples)
        accepted = spool.accepted
        found = spool.read(0, accepted)
        subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
        after = spool.append(accepted, samples[accepted:])
        everything = spool.read(0, after)
        spool.close()
    assert accepted > 0 and np.array_equal(found, samples[:accepted]), f"of {accepted} samples accepted some are others"
    assert np.array_equal(everything, samples), f"with room again {after} of {len(samples)} are accepted"


def test_a_read_only_file_system_is_named(tmp_path: Path, audio: Audio) -> None:
    with _tmpfs(tmp_path / "disk", "size=8m") as folder:
        spool = Spool(folder / "s", RATE)
        spool.append(0, audio(0.5))
        spool.close()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(SpoolError, match=r"cannot be written .*choose another folder"):
            Spool(folder / "s", RATE)
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        spool = Spool(folder / "s", RATE)
        found = spool.read(0, spool.accepted)
        spool.close()
    assert np.array_equal(found, audio(0.5)), f"{len(found)} samples are there, 8000 were accepted"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SpoolError, match=r"the spool folder .*file/s cannot be written .*choose another folder"):
        Spool(tmp_path / "file" / "s", RATE)


def test_a_file_that_is_no_database_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    content = b"these are somebody's notes, and no database at all" * 100
    (tmp_path / "spool.db").write_bytes(content)
    for _ in range(2):
        with pytest.raises(SpoolError, match=r"could not be used to open .*not a database"):
            Spool(tmp_path, RATE)
    assert (tmp_path / "spool.db").read_bytes() == content, "the file was changed"


def test_a_spool_of_another_sample_rate_or_schema_is_refused(tmp_path: Path) -> None:
    Spool(tmp_path, RATE).close()
    with pytest.raises(SpoolError, match="has sample_rate_hz 16000, expected 8000: use another folder"):
        Spool(tmp_path, 8000)
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db", isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(SpoolError, match="has schema_version 99, expected 1: use another folder"):
        Spool(tmp_path, RATE)


def test_a_damaged_spool_says_which_samples_are_missing(tmp_path: Path, audio: Audio) -> None:
    spool = Spool(tmp_path, RATE)
    for start in (0, 1600, 3200):
        spool.append(start, audio(0.1))
    spool.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db", isolation_level=None)) as db:
        db.execute("DELETE FROM blocks WHERE start = 1600")
    spool = Spool(tmp_path, RATE)
    with pytest.raises(SpoolError, match=r"has no samples \[1600, 4800\): it is damaged"):
        spool.read(0, 4800)
    spool.close()


# Answering.


@pytest.mark.parametrize(
    "results",
    [
        [_result(1, 100)],
        [_result(0, 100), _result(101, 200)],
        [_result(0, 100), _result(50, 200)],
        [_result(0, 0)],
        [_result(0, 1601)],
        [_result(100, 50)],
    ],
    ids=["late", "gap", "overlap", "empty", "beyond", "backwards"],
)
def test_answers_have_to_continue_and_none_of_a_bad_call_is_kept(
    spool: Spool, audio: Audio, results: list[Result]
) -> None:
    spool.append(0, audio(0.1))
    with pytest.raises(SpoolError, match=r"does not continue the answered \[0, "):
        spool.answer(results)
    assert spool.answered == 0 and spool.results() == [], f"{len(spool.results())} results were kept"


def test_answers_come_back_as_they_were_given_after_opening_again(tmp_path: Path, audio: Audio) -> None:
    spool = Spool(tmp_path, RATE)
    spool.append(0, audio(0.1))
    given = [_result(0, 800, 0.25), Result(800, 1600, None, "cpu:arena", True)]
    spool.answer(given)
    spool.close()
    spool = Spool(tmp_path, RATE)
    found = spool.results()
    answered = spool.answered
    spool.close()
    assert answered == 1600, f"{answered} samples are answered"
    assert [(r.start, r.stop, r.device, r.degraded) for r in found] == [
        (r.start, r.stop, r.device, r.degraded) for r in given
    ], f"the results are {found}"
    scores = found[0].output
    assert scores is not None and np.array_equal(scores, np.full((2, 3), 0.25)), f"the scores are {scores}"
    assert found[1].output is None, "a declared failure came back with an output"


def test_an_answer_that_cannot_be_stored_leaves_no_trace(tmp_path: Path, audio: Audio) -> None:
    spool = Spool(tmp_path, RATE, limit_bytes=256 << 10)
    with pytest.raises(SpoolFull):
        _feed(spool, audio(10.0))
    large = Result(0, 1600, np.zeros((20_000, 32), np.float32), "cpu", False)
    with pytest.raises(SpoolFull):
        spool.answer([_result(0, 800), Result(800, 1600, large.output, "cpu", False)])
    assert spool.answered == 0 and spool.results() == [], f"{len(spool.results())} results were kept"
    spool.close()


# Keeping and giving back.


def test_a_wav_has_the_same_16_bits(spool: Spool, tmp_path: Path) -> None:
    pcm = np.concatenate([np.arange(-32768, 32768, 7), [-32768, 32767, 0]]).astype("<i2")
    spool.append(0, (pcm / np.float32(32768)).astype(np.float32))
    written = spool.export_wav(tmp_path / "out.wav")
    with wave.open(str(tmp_path / "out.wav"), "rb") as file:
        shape = (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes())
        found = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert shape == (1, 2, RATE, len(pcm)) and written == len(pcm), f"the file is {shape}, {written} samples written"
    assert np.array_equal(found, pcm), f"{np.count_nonzero(found != pcm)} of {len(pcm)} samples differ"


def test_samples_beyond_full_scale_are_clipped_not_wrapped(spool: Spool, tmp_path: Path) -> None:
    spool.append(0, np.array([1.0, 2.0, -2.0, 3e38], np.float32))
    spool.export_wav(tmp_path / "out.wav")
    with wave.open(str(tmp_path / "out.wav"), "rb") as file:
        found = np.frombuffer(file.readframes(4), "<i2").tolist()
    assert found == [32767, 32767, -32768, 32767], f"the samples are {found}"


def test_retention_keeps_the_left_context_and_what_is_unanswered(spool: Spool, audio: Audio) -> None:
    samples = audio(3.0)
    for start in range(0, len(samples), 1600):
        spool.append(start, samples[start : start + 1600])
    assert spool.forget(0.0, 8240) == 0, "unanswered audio was deleted"
    spool.answer([_result(0, 16_000), _result(16_000, 32_000)])
    kept_from = spool.forget(0.0, 8240)
    assert kept_from == (32_000 - 8240) // 1600 * 1600, f"audio is kept from {kept_from}, answered are 32000"
    assert np.array_equal(spool.read(kept_from, 48_000), samples[kept_from:]), "what is kept has changed"
    with pytest.raises(SpoolError, match=f"from {kept_from - 1} were asked for, but those before {kept_from} were"):
        spool.read(kept_from - 1, 48_000)
    assert spool.append(0, samples) == 48_000, "feeding deleted audio again is not idempotent"
    assert len(spool.results()) == 2, "results were deleted"


def test_young_audio_is_not_deleted(spool: Spool, audio: Audio) -> None:
    spool.append(0, audio(1.0))
    spool.answer([_result(0, 16_000)])
    assert spool.forget(3600.0, 0) == 0, "audio younger than an hour was deleted"
    assert spool.forget(0.0, 0) == 16_000, "answered audio was not deleted"


def test_deleted_audio_stays_deleted_and_accepted_after_opening_again(tmp_path: Path, audio: Audio) -> None:
    spool = Spool(tmp_path, RATE)
    spool.append(0, audio(1.0))
    spool.answer([_result(0, 16_000)])
    spool.forget(0.0, 0)
    spool.close()
    spool = Spool(tmp_path, RATE)
    found = (spool.accepted, spool.answered, spool.kept_from)
    grown = spool.append(16_000, audio(0.1))
    spool.close()
    assert found == (16_000, 16_000, 16_000), f"accepted, answered, kept from are {found}"
    assert grown == 17_600, f"after another 1600 samples {grown} are accepted"


def test_deleted_audio_is_overwritten(tmp_path: Path) -> None:
    marked = np.frombuffer(b"WHAT THE USER SAID. " * 800, np.float32)
    spool = Spool(tmp_path, RATE)
    spool.append(0, marked)
    spool.append(len(marked), np.zeros(10, np.float32))
    spool.answer([_result(0, len(marked))])
    spool.forget(0.0, 0)
    spool.close()
    left = [path.name for path in tmp_path.iterdir() if b"WHAT THE USER SAID" in path.read_bytes()]
    assert not left, f"deleted audio can be read in {left}"


def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db")) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(SpoolError, match="another program"):
        Spool(tmp_path, 16_000)
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master")]
    assert tables == ["theirs"], f"the database has {tables}, expected only theirs"


def test_a_signal_in_the_middle_of_a_feed_does_not_stop_the_recording(tmp_path: Path, audio: Audio) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    samples = audio(4.0)
    before = signal.signal(signal.SIGALRM, interrupt)
    chance = random.Random(3)
    interruptions = 0
    spool = Spool(tmp_path, RATE)
    try:
        while spool.accepted < len(samples):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.004))
                spool.append(spool.accepted, samples[spool.accepted : spool.accepted + 160])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interruptions += 1
            except AudioError:
                # Interrupted after the commit: the position was ahead of what was known, and is known by now.
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    kept = spool.read(0, len(samples))
    spool.close()
    assert interruptions > 0, "no signal came in the middle of a feed"
    assert kept.tobytes() == samples[: len(kept)].tobytes(), "the samples are others"


def test_audio_without_an_answer_is_not_forgotten(spool: Spool, audio: Audio) -> None:
    _feed(spool, audio(4.0))
    spool.answer([_result(0, 16_000), _result(16_000, 32_000, None), _result(32_000, 64_000)])
    kept_from = spool.forget(0.0, 8_240)
    assert kept_from == 16_000, f"kept from {kept_from}, expected from the chunk that was set aside, 16000"


# Looking on.


def test_a_view_follows_a_recording_that_goes_on(spool: Spool, audio: Audio) -> None:
    samples = audio(1.0)
    spool.append(0, samples[:8000])
    with SpoolView(spool.path.parent) as view:
        before = (view.accepted, view.answered, view.set_aside, view.kept_from)
        spool.append(8000, samples[8000:])
        spool.answer([_result(0, 4000), _result(4000, 8000, None)])
        after = (view.accepted, view.answered, view.set_aside, view.kept_from)
        found = view.read(0, 16_000)
        results = view.results()
    assert before == (8000, 0, 0, 0), f"accepted, answered, set aside, kept from are {before}"
    assert after == (16_000, 8000, 1, 0), f"accepted, answered, set aside, kept from are {after}"
    assert np.array_equal(found, samples), "the samples are others"
    assert [result.stop for result in results] == [4000, 8000], f"the results are {results}"
    assert spool.append(16_000, samples[:10]) == 16_010, "the recording does not go on"


def test_a_view_makes_no_spool_and_changes_none(tmp_path: Path, audio: Audio) -> None:
    with pytest.raises(SpoolError, match=r"there is no spool in .*/none: expected .*spool\.db"):
        SpoolView(tmp_path / "none")
    assert not (tmp_path / "none").exists(), "the folder was made"
    with Spool(tmp_path / "s", RATE) as spool:
        spool.append(0, audio(0.1))
    with SpoolView(tmp_path / "s") as view, pytest.raises(sqlite3.OperationalError, match="readonly"):
        view._db.execute("DELETE FROM blocks")


def test_a_view_leaves_no_file_behind(tmp_path: Path, audio: Audio) -> None:
    with Spool(tmp_path, RATE) as spool:
        spool.append(0, audio(0.1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # The last of several.
    with SpoolView(tmp_path) as first, SpoolView(tmp_path) as second:
        first.close()
        assert second.accepted == 1600, f"{second.accepted} are accepted"
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(after) == sorted(before) == ["spool.db", "spool.lock"], f"there are {sorted(after)}"
    assert after == before, "a file is another"


def test_a_view_leaves_the_log_of_who_was_killed_as_it_is(tmp_path: Path, audio: Audio) -> None:
    with Spool(tmp_path / "s", RATE) as spool:
        spool.append(0, audio(0.1))
        shutil.copytree(tmp_path / "s", tmp_path / "killed")
    log, database = tmp_path / "killed" / "spool.db-wal", tmp_path / "killed" / "spool.db"
    before = (log.read_bytes(), database.read_bytes())
    with SpoolView(tmp_path / "killed") as view:
        assert view.accepted == 1600, f"{view.accepted} are accepted"
    assert before[0] and (log.read_bytes(), database.read_bytes()) == before, "a file is another"


#: Look at the spool again and again.
_LOOK = """
import pathlib, sys
from protection.spool import SpoolView
folder = pathlib.Path(sys.argv[1])
while not (folder / "over").exists():
    SpoolView(folder).close()
"""


def test_views_that_come_and_go_harm_no_recording_that_begins(tmp_path: Path, audio: Audio) -> None:
    samples = audio(1.0)
    Spool(tmp_path, RATE).close()
    views = [
        subprocess.Popen([sys.executable, "-c", _LOOK, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for stop in range(160, 16_001, 160):
            with Spool(tmp_path, RATE) as spool:
                assert spool.append(stop - 160, samples[stop - 160 : stop]) == stop
                with SpoolView(tmp_path) as view:
                    assert view.accepted == stop, f"{view.accepted} of {stop} are seen"
    finally:
        (tmp_path / "over").touch()
        told = [view.communicate(timeout=100)[1] for view in views]
    assert not any(told), f"a view failed: {told}"
    with SpoolView(tmp_path) as view:
        assert np.array_equal(view.read(0, 16_000), samples), "the samples are others"


def test_no_export_replaces_a_file_of_a_spool(spool: Spool, tmp_path: Path, audio: Audio) -> None:
    spool.append(0, audio(0.1))
    folder = spool.path.parent
    (tmp_path / "link.wav").symlink_to(spool.path)
    (tmp_path / "hard.wav").hardlink_to(spool.path)
    (tmp_path / "folder").symlink_to(folder)
    paths = [folder / f"spool.{ending}" for ending in ("db", "db-wal", "db-shm", "db-journal", "lock")]
    # Those of another recording, too.
    paths += [tmp_path / name for name in ("link.wav", "hard.wav", "folder/../s/spool.db", "folder/spool.lock")]
    paths += [tmp_path / "spool.db"]
    before = spool.path.read_bytes()
    for path in paths:
        with pytest.raises(SpoolError, match="is a file of a spool, and never replaced by an export: name another"):
            spool.export_wav(path)
    assert spool.path.read_bytes() == before, "the recording is another"
    assert spool.append(1600, audio(0.2)[:1600]) == 3200, "the recording does not go on"


def test_a_view_of_what_is_no_spool_says_so(tmp_path: Path) -> None:
    (tmp_path / "spool.db").touch()
    with pytest.raises(SpoolError, match="was never written to: there is no recording in it"):
        SpoolView(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db")) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(SpoolError, match="another program"):
        SpoolView(tmp_path)


def test_a_recording_can_be_read_where_nothing_can_be_written(tmp_path: Path, audio: Audio) -> None:
    with _tmpfs(tmp_path / "disk", "size=8m") as folder:
        with Spool(folder / "s", RATE) as spool:
            spool.append(0, audio(0.5))
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with SpoolView(folder / "s") as view:
            written = view.export_wav(tmp_path / "out.wav")
    assert written == 8000, f"{written} samples were written, 8000 were accepted"


def test_who_has_a_spool_open_is_known_and_asking_keeps_nobody_out(tmp_path: Path) -> None:
    assert holder(tmp_path) is None, f"{holder(tmp_path)} has a spool that is not there"
    spool = Spool(tmp_path, RATE)
    found = holder(tmp_path)
    spool.close()
    assert found == os.getpid(), f"{found} has it open, expected {os.getpid()}"
    assert holder(tmp_path) is None, f"{holder(tmp_path)} has it open after it was closed"
    with (tmp_path / "spool.lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        over = threading.Timer(0.05, fcntl.flock, (asking, fcntl.LOCK_UN))
        over.start()
        Spool(tmp_path, RATE).close()
        over.join()


def test_a_read_takes_as_long_at_the_end_of_a_long_recording_as_at_its_beginning(spool: Spool) -> None:
    with spool._transaction():
        rows = ((k * 10, k * 10 + 10, bytes(40), 0.0) for k in range(20_000))
        spool._db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?)", rows)
    steps = []
    for start in (0, 100_000, 199_800):
        counted = 0

        def count() -> None:
            nonlocal counted
            counted += 1

        spool._db.set_progress_handler(count, 10)
        spool.read(start, start + 200)
        spool._db.set_progress_handler(None, 10)
        steps.append(counted)
    assert max(steps) < 2 * min(steps), f"SQLite took {steps} tens of steps at the beginning, middle and end"


def test_an_export_that_fails_leaves_no_half_file(tmp_path: Path, audio: Audio) -> None:
    with Spool(tmp_path / "s", RATE) as spool:
        spool.append(0, audio(1.0))
        with contextlib.closing(sqlite3.connect(tmp_path / "s" / "spool.db", isolation_level=None)) as db:
            db.execute("UPDATE blocks SET samples = x'00'")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a.wav").write_text("what was there before")
        with pytest.raises(SpoolError, match="damaged"):
            spool.export_wav(tmp_path / "out" / "a.wav")
        with pytest.raises(SpoolError, match=r"cannot be written to .*none/a\.wav"):
            spool.export_wav(tmp_path / "none" / "a.wav")
        with pytest.raises(SpoolError, match="is not a file"):
            spool.export_wav(Path("/dev/null"))
    left = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert left == {"a.wav": "what was there before"}, f"the folder has {left}"


# A disk that takes no more, and says so in one way or another.


def _fill(path: Path) -> None:
    """Fill the disk with a file, to the last byte."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def _fill_with_audio(spool: Spool) -> int:
    """Feed until the disk is full; give how many samples are accepted then."""

    def feed() -> None:
        while True:
            spool.append(spool.accepted, np.full(1600, spool.accepted, np.float32))

    with pytest.raises(SpoolFull, match=r"the disk has \d+ bytes free, \d+ are needed for this and for the answers"):
        feed()
    return spool.accepted


def _answer(spool: Spool) -> None:
    """Answer all of it, with scores as large as those of the model that ships."""
    scores = np.zeros((75, 32), np.float32)
    for start in range(spool.answered, spool.accepted, RATE):
        spool.answer([Result(start, min(start + RATE, spool.accepted), scores, "cpu", False)])


def test_a_disk_that_the_audio_fills_has_room_for_the_answers(tmp_path: Path) -> None:
    # More than the log has before SQLite copies it to the file, if it is left to itself.
    with _tmpfs(tmp_path / "disk", "size=8m") as folder, Spool(folder / "s", RATE) as spool:
        accepted = _fill_with_audio(spool)
        _answer(spool)
        answered = spool.answered
    assert accepted > 40 * RATE and answered == accepted, f"{answered} of {accepted} accepted samples were answered"


def test_a_full_disk_has_room_again_once_the_retention_rule_deleted(tmp_path: Path) -> None:
    with _tmpfs(tmp_path / "disk", "size=6m") as folder, Spool(folder / "s", RATE) as spool:
        first = _fill_with_audio(spool)
        _answer(spool)
        kept_from = spool.forget(0.0, 0)
        second = _fill_with_audio(spool)
        _answer(spool)
        answered = spool.answered
        found = spool.read(first, second)
    assert kept_from == first, f"kept from {kept_from}, {first} were answered"
    assert second > 1.5 * first, f"{second - first} samples were accepted after {first} were deleted"
    assert answered == second, f"{answered} of {second} accepted samples were answered"
    assert np.array_equal(found[::1600], np.arange(first, second, 1600, dtype=np.float32)), "the samples are others"


def test_a_disk_that_others_fill_is_named_and_nothing_is_lost(tmp_path: Path, audio: Audio) -> None:
    samples = audio(4.0)
    with _tmpfs(tmp_path / "disk", "size=8m") as folder, Spool(folder / "s", RATE) as spool:
        _feed(spool, samples[:RATE])
        _fill(folder / "ballast")
        with pytest.raises(SpoolFull, match="free some disk"):
            spool.append(RATE, samples[RATE:])
        # There is no room left for them: SQLite itself says so.
        with pytest.raises(SpoolFull, match=r"could not be used to write .*full.*No space left.*free some disk"):
            spool.answer([_result(0, RATE)])
        kept = (spool.accepted, spool.answered)
        (folder / "ballast").unlink()
        spool.answer([_result(0, RATE)])
        _feed(spool, samples)
        found = spool.read(0, spool.accepted)
    assert kept == (RATE, 0), f"accepted and answered were {kept} on the full disk"
    assert np.array_equal(found, samples), f"{len(found)} of {len(samples)} samples are there, or others"


def test_a_recording_is_not_opened_on_a_full_disk_and_that_is_why(tmp_path: Path, audio: Audio) -> None:
    with _tmpfs(tmp_path / "disk", "size=8m") as folder:
        with Spool(folder / "s", RATE) as spool:
            _feed(spool, audio(1.0))
        _fill(folder / "ballast")
        with pytest.raises(SpoolFull, match="free some disk"):
            Spool(folder / "s", RATE)
        (folder / "ballast").unlink()
        with Spool(folder / "s", RATE) as spool:
            found = spool.read(0, spool.accepted)
        left = sorted(path.name for path in (folder / "s").iterdir())
    assert np.array_equal(found, audio(1.0)), f"{len(found)} samples are there, 16000 were accepted"
    assert left == ["spool.db", "spool.lock"], f"the folder has {left}"


LIMITED = """
import resource, sys, numpy as np
from pathlib import Path
from protection.spool import Spool, SpoolFull
spool = Spool(Path(sys.argv[1]), 16000)
samples = np.arange(160_000, dtype=np.float32)
def feed():
    for start in range(spool.accepted, len(samples), 1600):
        spool.append(start, samples[start : start + 1600])
# In the middle of what SQLite writes in one piece.
resource.setrlimit(resource.RLIMIT_FSIZE, (200_001, resource.RLIM_INFINITY))
try:
    feed()
except SpoolFull as error:
    print(error)
accepted = spool.accepted
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
feed()
assert np.array_equal(spool.read(0, len(samples)), samples)
print(0 < accepted < len(samples), sorted(path.name for path in Path(sys.argv[1]).iterdir()))
spool.close()
"""


def test_a_file_size_limit_is_named_and_not_taken_for_a_broken_disk(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr}"
    refusal, state = done.stdout.splitlines()
    assert "the file-size limit of this process (ulimit -f) is 200001 bytes: raise it" in refusal, refusal
    assert "what was accepted before is safe, what this call brought was not accepted" in refusal, refusal
    assert state == "True ['spool.db', 'spool.db-shm', 'spool.db-wal', 'spool.lock']", state


def test_the_reason_why_a_file_cannot_be_written_is_found(tmp_path: Path) -> None:
    raised = []
    with _tmpfs(tmp_path / "disk", "size=8m") as folder:
        database = folder / "spool.db"
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
            db.execute("CREATE TABLE t (x)")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for statement in ("INSERT INTO t VALUES (1)", "INSERT INTO none VALUES (1)"):
            with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
                try:
                    db.execute(statement)
                except sqlite3.Error as error:
                    raised.append(storage.cause(database, error))
    assert raised == [errno.EROFS, 0], f"found {raised}, expected a read-only file system, and nothing of the kind"
    assert "make it writable again" in storage.advice(errno.EROFS)
