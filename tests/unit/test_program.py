"""The pipeline as a program: killed, stopped, starved of its output or refused, it loses nothing that it accepted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import termios
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pytest

from protection.pipeline import DictationPipeline
from protection.program import Stop, WavInput
from protection.spool import AudioError, Result, Spool, SpoolView
from tests.unit.waiting import until

ROOT = Path(__file__).resolve().parents[2]
RATE = 16_000
BLOCK = 1_600
#: An export must not need any of these.
RUNTIMES = ("onnxruntime", "psutil", "torch")
Pcm = npt.NDArray[np.int16]


class Program:
    """One run of the program, its standard output read line by line."""

    def __init__(self, folder: Path, arguments: tuple[object, ...], *, without: tuple[str, ...], before: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._mark = f"{folder.name}-{time.monotonic_ns()}"
        self._told = b""
        # A pipe, and no file: one may be refused to the program.
        self._stderr, stderr = os.pipe()
        os.set_blocking(self._stderr, False)
        start = ["-m", "protection"]
        if without or before:
            before += f"\nimport runpy, sys; sys.modules.update(dict.fromkeys({without!r}))\n"
            start = ["-c", before + "runpy.run_module('protection', run_name='__main__', alter_sys=True)"]
        self.process = subprocess.Popen(
            [sys.executable, *start, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self.temporary), "PROGRAM_TEST": self._mark},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        os.close(stderr)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.lines: list[dict[str, Any]] = []

    def line(self) -> dict[str, Any]:
        """Wait for the next line."""
        text = self.stdout.readline()
        assert text, f"it ended with {self.process.wait()}: {self.stderr}"
        self.lines.append(json.loads(text))
        return self.lines[-1]

    def accepted(self, samples: int) -> None:
        """Wait until so many samples are acknowledged."""
        while self.line()["accepted"] < samples:
            pass

    def workers(self) -> list[int]:
        """Find the processes that it started."""
        return [process for process in self._processes() if process != self.process.pid]

    def _processes(self) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"PROGRAM_TEST={self._mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def end(self) -> int:
        """Close its input, read the rest of its output, and give its exit status; nothing may be left of it."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        if not self.stdout.closed:
            for text in self.stdout:
                self.lines.append(json.loads(text))
            self.stdout.close()
        status = self.process.wait(100)
        # The kernel ends a worker with its host, a moment later.
        until(lambda: not self._processes(), "its processes end")
        files = sorted(path.name for path in self.temporary.iterdir())
        assert not files, f"temporary files were left behind: {files}"
        assert "Traceback" not in self.stderr, self.stderr
        return status

    @property
    def stderr(self) -> str:
        """What it told people so far."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._stderr, 1 << 16):
                self._told += data
        return self._told.decode()

    def kill(self) -> None:
        """Kill it and what it started, whatever the test came to."""
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        os.close(self._stderr)


#: Where it does not matter that inference can be lost: it starts faster.
FAST = ("--policy", "engine=in_process")
Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Give a starter of programs that are gone when the test is over."""
    with contextlib.ExitStack() as started:

        def make(*arguments: object, without: tuple[str, ...] = (), before: str = "") -> Program:
            program = Program(tmp_path, arguments, without=without, before=before)
            started.callback(program.kill)
            return program

        yield make


@pytest.fixture
def run(start: Start) -> Callable[..., tuple[int, Program]]:
    """Give a runner: exit status and what there was to see."""

    def make(*arguments: object, without: tuple[str, ...] = ()) -> tuple[int, Program]:
        program = start(*arguments, without=without)
        return program.end(), program

    return make


Run = Callable[..., tuple[int, Program]]


def _speech(seconds: float) -> Pcm:
    """Make noise, the same each time."""
    return np.random.RandomState(3).randint(-9_000, 9_000, round(seconds * RATE)).astype("<i2")


def _write(path: Path, pcm: Pcm, rate_hz: int = RATE, channels: int = 1, width: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate_hz)
        file.writeframes(pcm.tobytes())
    return path


def _read(path: Path) -> Pcm:
    with wave.open(str(path), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def _blocks(folder: Path) -> list[tuple[int, int, bytes]]:
    with contextlib.closing(sqlite3.connect(folder / "spool.db")) as db:
        return db.execute("SELECT start, stop, samples FROM blocks ORDER BY start").fetchall()


def _results(folder: Path) -> list[Result]:
    with SpoolView(folder) as view:
        return view.results()


def _recorded(folder: Path) -> Pcm:
    """Give the audio of a spool, every answer there: they have to tile it."""
    with SpoolView(folder) as view:
        samples, results = view.read(0, view.accepted), view.results()
    edges = [0, *(result.stop for result in results)]
    assert [result.start for result in results] == edges[:-1] and edges[-1] == len(samples), (
        f"answers end at {edges}, {len(samples)} samples were accepted"
    )
    assert all(result.output is not None for result in results), "an answer is a declared failure"
    return (samples * 32768).astype("<i2")


# What goes in comes out.


def test_all_65536_values_come_back_as_they_went_in(run: Run, tmp_path: Path) -> None:
    pcm = np.arange(-32768, 32768).astype("<i2")
    status, program = run("record", "--spool", tmp_path / "s", "--input", _write(tmp_path / "in.wav", pcm))
    assert status == 0, program.stderr
    acknowledged = [line["accepted"] for line in program.lines[:-1]]
    assert acknowledged == [*range(0, len(pcm), BLOCK), len(pcm)], f"acknowledged were {acknowledged}"
    expected = {"done": True, "accepted": len(pcm), "answered": len(pcm), "set_aside": 0}
    assert program.lines[-1] == expected, f"the last line is {program.lines[-1]}"

    status, program = run("export", "--spool", tmp_path / "s", tmp_path / "out.wav", without=RUNTIMES)
    assert status == 0, program.stderr
    assert program.lines[0]["exported"] == len(pcm), f"it said {program.lines}"
    assert (tmp_path / "out.wav").read_bytes() == (tmp_path / "in.wav").read_bytes(), "the file is another"
    mode = stat.S_IMODE((tmp_path / "out.wav").stat().st_mode)
    assert mode == 0o600, f"the file's mode is {mode:o}"

    status, program = run("export", "--spool", tmp_path / "s", tmp_path / "out.wav", without=RUNTIMES)
    assert status == 2 and "out.wav is there already" in program.stderr, f"{status}: {program.stderr}"
    status, program = run("export", "--force", "--spool", tmp_path / "s", tmp_path / "out.wav", without=RUNTIMES)
    assert status == 0, program.stderr
    status, program = run("export", "--spool", tmp_path / "s", tmp_path / "none" / "out.wav", without=RUNTIMES)
    assert status == 1 and "the spool is unharmed" in program.stderr, f"{status}: {program.stderr}"


def test_raw_audio_is_acknowledged_as_it_comes_and_an_odd_byte_is_told_at_the_end(start: Start, tmp_path: Path) -> None:
    pcm = _speech(1.5)
    program = start("record", "--spool", tmp_path / "s", "--input", "-")
    assert program.line() == {"accepted": 0}, f"it began with {program.lines}"
    data = pcm.tobytes()
    # Half a block, then a piece that ends within a sample: whoever speaks live does not wait for a block to fill.
    for stop, samples in ((1_600, 800), (1_605, 802), (1_606, 803)):
        program.stdin.write(data[program.lines[-1]["accepted"] * 2 if stop != 1_606 else 1_605 : stop])
        program.stdin.flush()
        program.accepted(samples)
    program.stdin.write(data[1_606:] + b"\x01")
    assert program.end() == 1, program.stderr
    assert f"after {len(pcm)} whole ones: 1 byte is left over" in program.stderr, program.stderr
    assert np.array_equal(_recorded(tmp_path / "s"), pcm), "the samples are others"

    program = start("record", "--spool", tmp_path / "s", "--input", "-", *FAST)
    assert program.line() == {"accepted": len(pcm)}, f"it began with {program.lines}"
    program.stdin.write(pcm[:1000].tobytes())
    assert program.end() == 0, program.stderr
    assert np.array_equal(_recorded(tmp_path / "s"), [*pcm, *pcm[:1000]]), "what came later was not appended"


def test_realtime_takes_no_more_than_was_spoken(run: Run, tmp_path: Path) -> None:
    file = _write(tmp_path / "in.wav", _speech(1.0))
    status, program = run("record", "--realtime", "--spool", tmp_path / "s", "--input", file, *FAST)
    assert status == 0, program.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "s" / "spool.db")) as db:
        stored = [stored_s for (stored_s,) in db.execute("SELECT stored_s FROM blocks ORDER BY start")]
    opened_s = (tmp_path / "s" / "spool.lock").stat().st_mtime
    early = [k for k, stored_s in enumerate(stored) if stored_s - opened_s < (k + 1) * BLOCK / RATE]
    assert len(stored) == 10 and not early, f"of {len(stored)} blocks {early} were taken before they were spoken"


# Ended in the middle.


def test_a_recording_killed_again_and_again_ends_as_an_undisturbed_one(start: Start, run: Run, tmp_path: Path) -> None:
    pcm = _speech(8.2)
    file = _write(tmp_path / "in.wav", pcm)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    status, program = run("record", "--spool", undisturbed, "--input", file)
    assert status == 0, program.stderr
    for seconds in (0.3, 1.3):
        program = start("record", "--realtime", "--spool", killed, "--input", file)
        program.accepted(round(seconds * RATE))
        workers = program.workers()
        program.process.kill()
        assert program.end() == -signal.SIGKILL
        assert workers, "it had no worker that could be left behind"
    with SpoolView(killed) as view:
        accepted, answered = view.accepted, view.answered
    acknowledged = program.lines[-1]["accepted"]
    assert acknowledged <= accepted <= acknowledged + BLOCK, f"{acknowledged} were acknowledged, {accepted} are there"
    assert answered < accepted < len(pcm), f"{answered} and {accepted} of {len(pcm)}: nothing was left to do"
    status, program = run("record", "--spool", killed, "--input", file)
    assert status == 0, program.stderr
    assert program.lines[0] == {"accepted": accepted}, f"it went on with {program.lines[0]}"
    assert _blocks(killed) == _blocks(undisturbed), "the blocks are others"
    pairs = list(zip(_results(killed), _results(undisturbed), strict=True))
    others = [a for a, b in pairs if (a.start, a.stop) != (b.start, b.stop)]
    others += [a for a, b in pairs if not DictationPipeline.equivalent(a.output, b.output)]
    assert not others, f"{len(others)} of {len(pairs)} answers are others"


def test_another_file_on_the_same_spool_is_refused_and_changes_nothing(run: Run, tmp_path: Path) -> None:
    pcm = _speech(2.0)
    with Spool(tmp_path / "s", RATE) as spool:
        spool.append(0, (pcm[:BLOCK] / np.float32(32768)).astype(np.float32))
    other = pcm.copy()
    other[BLOCK - 1] += 1
    file = _write(tmp_path / "other.wav", other)
    status, program = run("record", "--spool", tmp_path / "s", "--input", file, *FAST)
    assert status == 2, f"it ended with {status}: {program.stderr}"
    assert "other.wav is not the recording that is in" in program.stderr, program.stderr
    with SpoolView(tmp_path / "s") as view:
        found = view.read(0, view.accepted) * 32768
    assert np.array_equal(found, pcm[:BLOCK]), f"{len(found)} samples are there, {BLOCK} were"


def test_sigterm_answers_what_was_accepted_and_the_same_command_goes_on(start: Start, run: Run, tmp_path: Path) -> None:
    pcm = _speech(6.0)
    command = ("record", "--spool", tmp_path / "s", "--input", _write(tmp_path / "in.wav", pcm))
    # However long it takes from the one to the other.
    same = "import protection.program; protection.program._SAME_SIGNAL_S = 60"
    program = start(*command, "--realtime", before=same)
    program.accepted(20_000)
    # As timeout(1) does: to the process, and to its group.
    program.process.terminate()
    program.process.terminate()
    assert program.end() == 75, f"it ended with {program.process.returncode}: {program.stderr}"
    last = program.lines[-1]
    assert last["done"] is False and 20_000 <= last["answered"] == last["accepted"] < len(pcm), f"it ended with {last}"
    assert f"{len(pcm) - last['accepted']} samples of" in program.stderr, program.stderr
    status, program = run(*command)
    assert status == 0, program.stderr
    assert np.array_equal(_recorded(tmp_path / "s"), pcm), "the samples are others"


def test_ctrl_c_ends_a_live_recording_with_all_that_the_pipe_held(start: Start, tmp_path: Path) -> None:
    pcm = _speech(5.0)
    program = start("record", "--spool", tmp_path / "s", "--input", "-")
    program.line()
    program.stdin.write(pcm[:8_000].tobytes())
    program.stdin.flush()
    program.accepted(8_000)
    # It waits for audio now: a read that blocks has to end.
    program.stdin.write(pcm[8_000:].tobytes())
    program.stdin.flush()
    program.process.send_signal(signal.SIGINT)
    for text in program.stdout:
        program.lines.append(json.loads(text))
    assert program.end() == 0, f"it ended with {program.process.returncode}: {program.stderr}"
    assert program.lines[-1]["done"] is True, f"the last line is {program.lines[-1]}"
    assert np.array_equal(_recorded(tmp_path / "s"), pcm), "not all that was in the pipe was recorded"


def test_a_signal_ends_a_recording_that_waits_for_audio(start: Start, tmp_path: Path) -> None:
    program = start("record", "--spool", tmp_path / "s", "--input", "-")
    program.line()
    time.sleep(0.2)
    program.process.terminate()
    assert program.process.wait(100) == 0, program.stderr
    assert program.end() == 0, program.stderr


def test_what_cannot_be_answered_in_time_is_left_for_resume(start: Start, run: Run, tmp_path: Path) -> None:
    pcm = _speech(3.5)
    command = ("record", "--spool", tmp_path / "s", "--input", "-")
    # A worker that is stopped stays so.
    patient = ("--policy", "infer_deadline_s=600", "--policy", "heartbeat_s=600")
    program = start(*command, "--deadline", 0.5, "--policy", "shutdown_deadline_s=3", *patient)
    program.line()
    for worker in program.workers():
        os.kill(worker, signal.SIGSTOP)
    program.stdin.write(pcm.tobytes())
    program.stdin.flush()
    program.accepted(len(pcm))
    program.process.terminate()
    assert program.end() == 75, f"it ended with {program.process.returncode}: {program.stderr}"
    last = {"done": False, "accepted": len(pcm), "answered": 0, "set_aside": 0}
    assert program.lines[-1] == last, f"the last line is {program.lines[-1]}"
    assert f"{len(pcm)} of {len(pcm)} samples are unanswered" in program.stderr, program.stderr
    assert f"python -m protection resume --spool {tmp_path / 's'}" in program.stderr, program.stderr

    program = start(*command, "--deadline", 600, *patient)
    program.line()
    for worker in program.workers():
        os.kill(worker, signal.SIGSTOP)
    program.process.send_signal(signal.SIGINT)
    until(lambda: "SIGINT: no more audio" in program.stderr, "it takes no more audio")
    time.sleep(0.5)
    assert program.process.poll() is None, "the first signal did not wait for the answers"
    program.process.send_signal(signal.SIGINT)
    assert program.end() == -signal.SIGINT, f"it ended with {program.process.returncode}: {program.stderr}"

    status, program = run("resume", "--spool", tmp_path / "s")
    assert status == 0 and program.lines == [{**last, "done": True, "answered": len(pcm)}], f"{status}: {program.lines}"
    assert np.array_equal(_recorded(tmp_path / "s"), pcm), "the samples are others"


def test_a_reader_that_goes_away_ends_the_recording_in_order(start: Start, tmp_path: Path) -> None:
    pcm = _speech(3.0)
    program = start("record", "--spool", tmp_path / "s", "--input", "-")
    program.line()
    program.stdout.close()
    program.stdin.write(pcm.tobytes())
    assert program.end() == 74, f"it ended with {program.process.returncode}: {program.stderr}"
    assert "standard output cannot be written: Broken pipe" in program.stderr, program.stderr
    found = _recorded(tmp_path / "s")
    assert len(found) > 0 and np.array_equal(found, pcm[: len(found)]), f"of {len(found)} samples some are others"


def test_an_emergency_ends_with_75_and_resume_answers_the_rest(start: Start, run: Run, tmp_path: Path) -> None:
    pcm = _speech(1.0)
    # The host always uses more than that.
    names = ("return_below", "warning", "critical", "emergency", "shutdown")
    shares = [f"--policy={name}={(k + 1) * 1e-5}" for k, name in enumerate(names)]
    program = start("record", *shares, "--policy=hysteresis=0", "--spool", tmp_path / "s", "--input", "-")
    program.line()
    # Nothing is written: it must not wait for audio that it could not accept.
    assert program.process.wait(100) == 75, program.stderr
    program.end()
    assert "emergency_shutdown: " in program.stderr, program.stderr
    assert program.lines[-1]["done"] is False, f"the last line is {program.lines[-1]}"
    with Spool(tmp_path / "s", RATE) as spool:
        spool.append(0, (pcm / np.float32(32768)).astype(np.float32))
    status, program = run("resume", "--spool", tmp_path / "s")
    assert status == 0, program.stderr
    assert np.array_equal(_recorded(tmp_path / "s"), pcm), "the samples are others"


# Refused.


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"rate_hz": 8_000}, r"8000 Hz, expected 16000 Hz; convert it: sox .*in\.wav -r 16000 -c 1 -b 16 "),
        ({"channels": 2}, r"2 channels, expected 1 \(mono\); convert it: sox "),
        ({"width": 1}, r"8 bit, expected 16 bit; convert it: sox "),
        ({"width": 4}, r"32 bit, expected 16 bit; convert it: sox "),
    ],
    ids=["rate", "stereo", "8-bit", "32-bit"],
)
def test_a_wav_of_another_shape_is_refused_with_the_way_to_convert_it(
    tmp_path: Path, shape: dict[str, int], message: str
) -> None:
    path = _write(tmp_path / "in.wav", _speech(0.1), **shape)
    with pytest.raises(AudioError, match=message):
        WavInput(path, BLOCK)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated in its header, expected RIFF WAVE"),
        (b"RIFF\x00", "truncated in its header, expected RIFF WAVE"),
        (b"ID3 and then a song" * 100, r"not a WAV \(.*\), expected RIFF WAVE; convert it: sox "),
        (None, "there is no such file"),
    ],
    ids=["empty", "header", "other", "missing"],
)
def test_what_is_no_wav_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "in.wav").write_bytes(content)
    with pytest.raises(AudioError, match=rf"in\.wav: {message}"):
        WavInput(tmp_path / "in.wav", BLOCK)


def test_a_header_that_promises_nothing_names_what_follows_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "in.wav", _speech(0))
    with pytest.raises(AudioError, match=r"empty, expected at least one sample$"):
        WavInput(path, BLOCK)
    with path.open("ab") as file:
        file.write(bytes(320))
    with pytest.raises(AudioError, match=r"320 bytes follow the header: .* tail -c \+45 .*in\.wav \| python -m protec"):
        WavInput(path, BLOCK)


@pytest.mark.parametrize(("name", "at"), [(b"fact", 12), (b"LIST", 36)], ids=["fact", "LIST"])
def test_a_chunk_that_ends_beyond_the_file_is_refused(run: Run, tmp_path: Path, name: bytes, at: int) -> None:
    whole = _write(tmp_path / "in.wav", _speech(0.1)).read_bytes()
    (tmp_path / "in.wav").write_bytes(whole[:at] + name + struct.pack("<I", 1 << 30) + bytes(4) + whole[at:])
    status, program = run("record", "--spool", tmp_path / "s", "--input", tmp_path / "in.wav", *FAST)
    assert status == 2, f"it ended with {status}: {program.stderr}"
    assert "in.wav: not a WAV (a chunk of its header ends beyond the file)" in program.stderr, program.stderr
    assert not (tmp_path / "s").exists(), "a spool was made"


def _streamed(path: Path, pcm: Pcm, riff: int, data: int) -> Path:
    """Write a WAV whose writer never came to know its length."""
    whole = bytearray(_write(path, pcm).read_bytes())
    struct.pack_into("<I", whole, 4, riff)
    struct.pack_into("<I", whole, 40, data)
    path.write_bytes(whole)
    return path


def _taken(source: WavInput) -> Pcm:
    with contextlib.closing(source):
        # A block is valid until the next.
        return np.concatenate([pcm.copy() for _, pcm in source.blocks(0, Stop())])


def test_a_wav_of_unknown_length_is_taken_to_the_end_of_the_file(run: Run, tmp_path: Path) -> None:
    pcm = _speech(1.03)
    path = _streamed(tmp_path / "in.wav", pcm, 0xFFFFFFFF, 0xFFFFFFFF)
    for _ in range(2):
        status, program = run("record", "--spool", tmp_path / "s", "--input", path, *FAST)
        assert status == 0, f"it ended with {status}: {program.stderr}"
        assert program.lines[-1]["accepted"] == len(pcm), f"the last line is {program.lines[-1]}"
        assert np.array_equal(_recorded(tmp_path / "s"), pcm), "the samples are others"


@pytest.mark.parametrize(
    ("riff", "data"),
    [
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFDB),
        (0x7FFFFFFF, 0x7FFFFFFF),
        (0x7FFFF024, 0x7FFFF000),
        (0x80000024, 0x80000000),
        (36, 0xFFFFFFFF),
    ],
    ids=["ffmpeg", "less-header", "2-GiB", "sox", "arecord", "short-riff"],
)
def test_every_size_that_stands_for_none_is_known(tmp_path: Path, riff: int, data: int) -> None:
    pcm = _speech(0.55)
    path = _streamed(tmp_path / "in.wav", pcm, riff, data)
    source = WavInput(path, BLOCK)
    found = _taken(source)
    assert np.array_equal(found, pcm), f"{len(found)} samples were taken, {len(pcm)} are there"
    assert source.problem is None, source.problem

    path.write_bytes(path.read_bytes()[:-1])
    source = WavInput(path, BLOCK)
    found = _taken(source)
    assert np.array_equal(found, pcm[:-1]), f"{len(found)} samples were taken"
    assert f"within a sample, after {len(pcm) - 1} whole ones" in (source.problem or ""), source.problem

    with pytest.raises(AudioError, match=r"empty, expected at least one sample$"):
        WavInput(_streamed(path, pcm[:0], riff, data), BLOCK)


def test_a_large_wav_that_lacks_samples_is_truncated_all_the_same(tmp_path: Path) -> None:
    source = WavInput(_streamed(tmp_path / "in.wav", _speech(0.1), 0x70000024, 0x70000000), BLOCK)
    _taken(source)
    assert "truncated: 1600 samples found" in (source.problem or ""), source.problem


def test_what_follows_the_audio_of_a_wav_is_not_taken(tmp_path: Path) -> None:
    pcm = _speech(0.55)
    path = _write(tmp_path / "in.wav", pcm)
    path.write_bytes(path.read_bytes() + b"LIST\x04\0\0\0INFO")
    assert np.array_equal(_taken(WavInput(path, BLOCK)), pcm), "the samples are others"


def test_a_truncated_wav_is_recorded_as_far_as_it_goes(run: Run, tmp_path: Path) -> None:
    pcm = _speech(1.0)
    path = _write(tmp_path / "in.wav", pcm)
    path.write_bytes(path.read_bytes()[: 44 + 2 * 10_000 + 1])
    for _ in range(2):
        status, program = run("record", "--spool", tmp_path / "s", "--input", path, *FAST)
        assert status == 1, f"it ended with {status}: {program.stderr}"
        told = "truncated: 10000 samples found, 16000 expected from its header, 6000 are missing"
        assert told in program.stderr, program.stderr
        assert np.array_equal(_recorded(tmp_path / "s"), pcm[:10_000]), "the samples are others"


def test_what_cannot_begin_is_refused_before_anything_is_accepted(run: Run, start: Start, tmp_path: Path) -> None:
    file = _write(tmp_path / "in.wav", _speech(0.5))
    (tmp_path / "text.onnx").write_text("no model")
    program = start("record", "--spool", tmp_path / "s", "--input", "-", *FAST)
    program.stdin.write(file.read_bytes())
    assert program.end() == 2 and "standard input is a WAV: expected raw PCM" in program.stderr, program.stderr
    shutil.rmtree(tmp_path / "s")
    refusals: list[tuple[tuple[object, ...], tuple[str, ...], str]] = [
        (("--backend", "cpuu"), (), "unknown backend 'cpuu': did you mean cpu"),
        (("--backend", "cpu"), ("onnxruntime",), "backend cpu is not available here, nothing was recorded: "),
        ((), RUNTIMES, "no backend is available, nothing was recorded: install the runtime of one (cpu: "),
        (("--model", tmp_path / "none.onnx"), (), "there is no model"),
        (("--model", tmp_path / "text.onnx"), (), "cannot run"),
        (("--policy", "max_bach=4"), (), "there is no policy option 'max_bach': did you mean max_batch"),
        (("--policy", "rungs=5"), (), "a policy option has a value of the wrong kind"),
        (("--input", tmp_path / "none.wav"), (), "none.wav: there is no such file"),
        (("--block-samples", "0"), (), "expected a whole number from 1 to"),
        (("--deadline", "nan"), (), "expected seconds, from 0 on"),
    ]
    programs = [
        start("record", "--spool", tmp_path / "s", "--input", file, *arguments, without=without)
        for arguments, without, _ in refusals
    ]
    for program, (arguments, _, message) in zip(programs, refusals, strict=True):
        assert program.end() == 2, f"{arguments}: it ended with {program.process.returncode}: {program.stderr}"
        assert message in program.stderr, f"{arguments}: {program.stderr}"
        assert not program.lines, f"{arguments}: it wrote {program.lines}"
    assert not (tmp_path / "s").exists(), "a spool was made"


def test_a_folder_without_a_spool_is_refused_and_none_is_made(start: Start, tmp_path: Path) -> None:
    commands: tuple[tuple[object, ...], ...] = (("resume",), ("status",), ("export", tmp_path / "out.wav"))
    programs = [start(*command, "--spool", tmp_path / "none") for command in commands]
    for command, program in zip(commands, programs, strict=True):
        assert program.end() == 2, f"{command} ended with {program.process.returncode}: {program.stderr}"
        assert f"there is no spool in {tmp_path / 'none'}" in program.stderr, program.stderr
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["tmp"], f"there are {made}"


def test_an_export_never_replaces_a_file_of_a_spool(start: Start, tmp_path: Path) -> None:
    with Spool(tmp_path / "s", RATE) as spool:
        spool.append(0, np.zeros(1600, np.float32))
    before = (tmp_path / "s" / "spool.db").read_bytes()
    names = ("spool.db", "spool.db-wal", "spool.db-shm", "spool.lock")
    commands = [("export", "--spool", tmp_path / "s", *force, name) for force in ((), ("--force",)) for name in names]
    programs = [start(*command[:-1], tmp_path / "s" / str(command[-1])) for command in commands]
    for command, program in zip(commands, programs, strict=True):
        assert program.end() == 2, f"{command} ended with {program.process.returncode}: {program.stderr}"
        told = f"{command[-1]} is a file of a spool, and never replaced by an export: name another file"
        assert told in program.stderr, program.stderr
    assert (tmp_path / "s" / "spool.db").read_bytes() == before, "the recording is another"


def test_while_one_records_others_look_on_and_no_other_records(start: Start, run: Run, tmp_path: Path) -> None:
    pcm = _speech(2.5)
    recording = start("record", "--spool", tmp_path / "s", "--input", "-")
    recording.line()
    recording.stdin.write(pcm.tobytes())
    recording.stdin.flush()
    recording.accepted(len(pcm))
    others = [
        start("record", "--spool", tmp_path / "s", "--input", "-"),
        start("resume", "--spool", tmp_path / "s"),
        start("export", "--spool", tmp_path / "s", tmp_path / "out.wav", without=RUNTIMES),
        start("status", "--spool", tmp_path / "s", without=RUNTIMES),
    ]
    statuses = [program.end() for program in others]
    assert statuses == [2, 2, 0, 0], f"they ended with {statuses}: {[program.stderr for program in others]}"
    for program in others[:2]:
        assert f"another pipeline (process {recording.process.pid}) has the spool" in program.stderr, program.stderr
    assert np.array_equal(_read(tmp_path / "out.wav"), pcm), "the export has other samples"
    said = others[3].lines[0]
    assert said["accepted"] == len(pcm) and said["in_use_by"] == recording.process.pid, f"it said {said}"
    assert recording.end() == 0, recording.stderr
    _, program = run("status", "--spool", tmp_path / "s")
    expected = {
        "path": str(tmp_path / "s" / "spool.db"),
        "accepted": len(pcm),
        "answered": len(pcm),
        "unanswered": 0,
        "set_aside": 0,
        "kept_from": 0,
        "seconds": 2.5,
        "in_use_by": None,
    }
    assert program.lines == [expected], f"it said {program.lines}"


def test_where_all_is_answered_resume_needs_no_runtime(run: Run, tmp_path: Path) -> None:
    with Spool(tmp_path / "s", RATE) as spool:
        spool.append(0, np.zeros(10, np.float32))
        spool.answer([Result(0, 10, None, "cpu", True)])
    status, program = run("resume", "--spool", tmp_path / "s", without=RUNTIMES)
    assert status == 0, program.stderr
    expected = [{"done": True, "accepted": 10, "answered": 10, "set_aside": 1}]
    assert program.lines == expected, f"it said {program.lines}"


# Memory, and the disk.

#: Refuse this process another 1.5 MB from when the file "short" is there until "enough" is.
_SHORT_OF_MEMORY = """
import pathlib, resource, threading, time
def starve(folder=pathlib.Path({folder!r})):
    while not (folder / "short").exists():
        time.sleep(0.01)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_500_000, resource.RLIM_INFINITY))
    (folder / "starved").touch()
    while not (folder / "enough").exists():
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
threading.Thread(target=starve, daemon=True).start()
"""


def test_without_memory_for_a_block_nothing_is_taken(start: Start, tmp_path: Path) -> None:
    limited = """
import os, resource, protection.program
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_500_000, resource.RLIM_INFINITY))
"""
    command = ("record", "--spool", tmp_path / "s", "--input", "-", "--block-samples", 960_000)
    program = start(*command, before=limited)
    assert program.end() == 2, f"it ended with {program.process.returncode}: {program.stderr}"
    assert "there was no memory to begin: nothing was recorded" in program.stderr, program.stderr
    assert not program.lines and not (tmp_path / "s").exists(), f"it said {program.lines}"


def _held_bytes(pipe: IO[bytes]) -> int:
    """Say how much of what was written is not read yet."""
    count = bytearray(4)
    fcntl.ioctl(pipe.fileno(), termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def test_a_block_that_found_no_memory_is_fed_again(start: Start, tmp_path: Path) -> None:
    pcm = _speech(32.0)
    program = start(
        *("record", "--spool", tmp_path / "s", "--input", "-", "--block-samples", 960_000, "--deadline", 100),
        before=_SHORT_OF_MEMORY.format(folder=str(tmp_path)),
    )
    program.line()
    (tmp_path / "short").touch()
    until((tmp_path / "starved").exists, "its memory is short")
    # More than the pipe held before: it was read, and so is in the program's hands alone.
    program.stdin.write(pcm.tobytes())
    program.stdin.flush()
    until(lambda: not _held_bytes(program.stdin), "the pipe is empty")
    time.sleep(0.5)
    with SpoolView(tmp_path / "s") as view:
        assert view.accepted == 0, f"{view.accepted} samples found memory: nothing was short"
    (tmp_path / "enough").touch()
    assert program.end() == 0, f"it ended with {program.process.returncode}: {program.stderr}"
    assert np.array_equal(_recorded(tmp_path / "s"), pcm), "the samples are others"


@pytest.mark.parametrize(("closed", "status"), [(">&-", 2), ("2>&-", 0), ("<&-", 2)])
def test_closed_descriptors_never_become_the_spool(tmp_path: Path, closed: str, status: int) -> None:
    command = f'printf "%08000d" 0 | {{ "$0" -m protection record --spool "$1" --input - {closed}; }}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(tmp_path / "s")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, f"it ended with {done.returncode}: {done.stderr}"
    if status:
        assert "is closed: expected " in done.stderr, done.stderr
        assert not (tmp_path / "s").exists(), "a spool was made"
    else:
        assert len(_recorded(tmp_path / "s")) == 4_000, done.stdout


def test_a_full_spool_ends_the_recording_with_what_it_accepted_answered(run: Run, tmp_path: Path) -> None:
    pcm = _speech(10.0)
    limit = ("--policy", "spool_limit_bytes=262144")
    command = ("record", "--spool", tmp_path / "s", "--input", _write(tmp_path / "in.wav", pcm))
    status, program = run(*command, *limit, *FAST)
    assert status == 1 and "is full (spool_limit_bytes is 262144" in program.stderr, f"{status}: {program.stderr}"
    last = program.lines[-1]
    assert last["done"] is False and 0 < last["answered"] == last["accepted"] < len(pcm), f"it ended with {last}"
    assert np.array_equal(_recorded(tmp_path / "s"), pcm[: last["accepted"]]), "the samples are others"


def test_a_disk_that_takes_no_answers_ends_it_and_resume_answers_later(start: Start, run: Run, tmp_path: Path) -> None:
    pcm = _speech(3.0)
    program = start(
        *("record", "--spool", tmp_path / "s", "--input", "-"),
        *("--deadline", 1, "--policy", "heartbeat_s=60", "--policy", "infer_deadline_s=60"),
    )
    program.line()
    for worker in program.workers():
        os.kill(worker, signal.SIGSTOP)
    program.stdin.write(pcm.tobytes())
    program.stdin.flush()
    program.accepted(len(pcm))
    # From here on no file of it can grow.
    resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    for worker in program.workers():
        os.kill(worker, signal.SIGCONT)
    assert program.end() == 1, f"it ended with {program.process.returncode}: {program.stderr}"
    assert "answers cannot be stored" in program.stderr, program.stderr
    last = program.lines[-1]
    assert last["done"] is False and last["answered"] < last["accepted"] == len(pcm), f"it ended with {last}"
    status, program = run("resume", "--spool", tmp_path / "s")
    assert status == 0, program.stderr
    assert np.array_equal(_recorded(tmp_path / "s"), pcm), "the samples are others"


def test_an_export_says_what_retention_has_deleted(run: Run, tmp_path: Path) -> None:
    pcm = _speech(3.0)
    with Spool(tmp_path / "s", RATE) as spool:
        for at in range(0, len(pcm), BLOCK):
            spool.append(at, (pcm[at : at + BLOCK] / np.float32(32768)).astype(np.float32))
        spool.answer([Result(0, len(pcm), np.zeros((1, 1), np.float32), "cpu", False)])
        kept_from = spool.forget(0.0, 8_240)
    status, program = run("export", "--spool", tmp_path / "s", tmp_path / "out.wav")
    assert status == 0 and f"({kept_from} samples) are not in" in program.stderr, f"{status}: {program.stderr}"
    assert np.array_equal(_read(tmp_path / "out.wav"), pcm[kept_from:]), "the samples are others"


# What a person reads.


@pytest.mark.parametrize("command", ["", "record", "resume", "export", "status"])
def test_help_has_an_example_and_every_exit_status(run: Run, command: str) -> None:
    status, program = (
        0,
        subprocess.run(
            [sys.executable, "-m", "protection", *command.split(), "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        ),
    )
    assert program.returncode == status, program.stderr
    assert f"python -m protection {command}" in program.stdout.split("example")[1], program.stdout
    missing = [status for status in (" 0 ", " 1 ", " 2 ", " 74 ", " 75 ", " 128+N ") if status not in program.stdout]
    assert not missing, f"the exit statuses {missing} are not explained"
    wide = [line for line in program.stdout.splitlines() if len(line) > 120]
    assert not wide, f"lines of the help are too wide: {wide}"
