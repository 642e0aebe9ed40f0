"""A subject in a process of its own, so that it can be killed, starved and watched from outside.

    python -m qualification.host '{"subject": ..., "workdir": ..., ...}' PARENT_PROCESS_ID

It feeds the subject from the stream and writes a JSON line for each thing that happens: ``ready``, ``accepted``,
``fault``, ``pressure``, ``shutdown``, ``refused``, ``unavailable``, ``done``. Exit statuses: 0 done; 69 the disk that
the job asks for cannot be had here; 70 the subject failed; 75 the subject shut itself down in an emergency: it refuses
more audio, with what it had accepted kept (``EX_TEMPFAIL``: start it again on the same folder). It ends with the
process that started it. Orders come in on standard input, a line each: ``stop`` ends the recording, ``watch`` asks when
the next answer is there (``first_answer_s``).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from qualification.quoting import quoted
from qualification.storage import Disk, StorageUnavailable

EXIT_DONE = 0
EXIT_UNAVAILABLE = 69
EXIT_FAILED = 70
EXIT_EMERGENCY = 75
#: So long after it told of an emergency shutdown a subject may still take audio.
REFUSAL_S = 5.0
_RETRY_EVERY_S = 0.02
#: Every process below a hosted one has this in its environment.
_MARK = "PLIMSOLL_HOSTED"
_numbers = itertools.count(1)
_ROOT = Path(__file__).resolve().parents[1]
MB = 1_000_000


@dataclass(frozen=True)
class Job:
    """What a host process is to do. Positions are samples."""

    subject: str
    workdir: str
    backend: str
    model: str
    audio: str
    device_limit_bytes: int
    #: The backend's device (None: its first).
    device: str | None = None
    #: Feed up to this position, in blocks of this size, with this pause after each call.
    stop: int = 16_000
    block_samples: int = 1_600
    pause_s: float = 0.0
    #: Go on after ``stop`` until the order comes.
    until_told: bool = False
    #: Be the OOM killer's first choice. Not where a worker has to be.
    volunteers: bool = True
    #: Answer everything before ending.
    drain_s: float = 30.0
    #: Plans to arm, as plain data, once the subject is ready.
    faults: tuple[Mapping[str, Any], ...] = ()
    #: Then cap host memory at what is held plus this, and fill it step by step until the subject shuts down.
    starve_headroom_bytes: int = 0
    #: A ``Disk``, as plain data, to mount for this process before anything else (None: none).
    disk: Mapping[str, Any] | None = None
    #: Feed a block that is refused again and again for so long, and then record no further (0: a refusal is a failure).
    retry_s: float = 0.0
    #: Once a refused block was accepted, feed so much more and end there.
    samples_after_refusal: int = 0
    policy: Mapping[str, Any] = field(default_factory=dict)


def say(**what: Any) -> None:
    """Write one line, at once."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Run one job, for the process with this id."""
    # Told, not asked for: it may have ended while this one started.
    job, parent = Job(**json.loads(argv[0])), int(argv[1])
    if job.disk is not None:
        try:
            # First of all: NumPy starts threads when it is imported.
            Disk(**job.disk).mount()
        except StorageUnavailable as error:
            say(unavailable=str(error))
            return EXIT_UNAVAILABLE

    from backends.faults.limits import declare_expendable
    from backends.process import begin_as_child

    begin_as_child(parent, oom_score=1000 if job.volunteers else 0)
    declare_expendable()
    try:
        return _run(job)
    except Exception as error:
        say(failed=f"{type(error).__name__}: {error}")
        return EXIT_FAILED


def _run(job: Job) -> int:
    import backends
    from backends.contract import FaultPlan
    from qualification.audio import load_wav
    from qualification.stream import Stream
    from qualification.subject import SubjectContext, load_factory

    backend = backends.create(job.backend)(job.device)
    backend.limit_memory(job.device_limit_bytes)
    context = SubjectContext(
        workdir=Path(job.workdir),
        backend=backend,
        device=backend.device,
        model_path=Path(job.model),
        limits={"device_limit_bytes": job.device_limit_bytes},
        policy=job.policy,
    )
    stream = Stream(load_wav(Path(job.audio)))
    subject = load_factory(job.subject)(context)
    # Positions go on where a killed run ended.
    accepted = max((result.stop for result in subject.results()), default=0)
    recovered = getattr(subject, "recovered", None)
    if recovered is not None:
        accepted = max(accepted, len(recovered()))
    say(ready=True, accepted=accepted, process_ids=[*subject.process_ids()])
    armed = [backend.arm(FaultPlan.from_json(plan)) for plan in job.faults]
    status = EXIT_DONE
    try:
        accepted, whole = _record(job, subject, stream, accepted)
        if whole and job.starve_headroom_bytes:
            accepted = _starve(job, subject, stream, accepted)
        elif whole:
            subject.drain(job.drain_s)
    except Exception as error:
        if not _in_emergency(subject):
            raise
        say(refused=f"{type(error).__name__}: {error}")
    if _in_emergency(subject):
        status = EXIT_EMERGENCY
        _require_refusal(job, subject, stream, accepted)
    for fault in armed:
        fault.disarm()
        say(fault=fault.record().to_json())
    say(events=[[event.kind, event.message] for event in subject.events()], metrics=dict(subject.metrics()))
    subject.close()
    backend.close()
    say(done=status)
    return status


def _record(job: Job, subject: Any, stream: Any, accepted: int) -> tuple[int, bool]:
    """Feed up to where the job ends; give the position that is accepted, and whether it is that one."""
    stop = max(job.stop, accepted)
    refused_s: float | None = None
    orders = _Orders(subject)
    while not orders.stop and (accepted < stop or job.until_told):
        end = accepted + job.block_samples
        try:
            accepted = subject.feed(accepted, stream[accepted : end if job.until_told else min(end, stop)])
        except Exception as error:
            # An emergency is what a subject may shut down in; any other error is its failure, where none is expected.
            emergency = _in_emergency(subject)
            if not (emergency or job.retry_s):
                raise
            say(refused=f"{type(error).__name__}: {error}", at=accepted)
            now_s = time.monotonic()
            refused_s = now_s if refused_s is None else refused_s
            if emergency or now_s - refused_s > job.retry_s:
                return accepted, False
            orders.look()
            time.sleep(_RETRY_EVERY_S)
            continue
        say(accepted=accepted)
        orders.look()
        if refused_s is not None:
            refused_s = None
            stop = min(stop, accepted + job.samples_after_refusal)
        if job.pause_s:
            time.sleep(job.pause_s)
    return accepted, True


class _Orders:
    """What the parent asks for while the subject records."""

    def __init__(self, subject: Any) -> None:
        self._subject = subject
        self.stop = False
        self._pending = b""
        self._answered_before: int | None = None
        os.set_blocking(0, False)

    def look(self) -> None:
        """Take orders in, and look for the answer that was asked for."""
        data = b""
        with suppress(BlockingIOError):
            data = os.read(0, 4096)
        *orders, self._pending = (self._pending + data).split(b"\n")
        self.stop = self.stop or b"stop" in orders
        if b"watch" in orders:
            self._answered_before = self._answered()
        elif self._answered_before is not None and self._answered() > self._answered_before:
            self._answered_before = None
            say(first_answer_s=time.monotonic())

    def _answered(self) -> int:
        results = self._subject.results()
        return int(results[-1].stop) if results else 0


def _in_emergency(subject: Any) -> bool:
    return any(event.kind == "emergency_shutdown" for event in subject.events())


def _require_refusal(job: Job, subject: Any, stream: Any, accepted: int) -> None:
    """Go on recording until the subject refuses: one that only says that it shut down did not. Raises RuntimeError.

    The event may be told a moment before the refusal begins, so there is a deadline.
    """
    deadline_s = time.monotonic() + REFUSAL_S
    while time.monotonic() < deadline_s:
        try:
            accepted = subject.feed(accepted, stream[accepted : accepted + job.block_samples])
        except Exception as error:
            say(refused=f"{type(error).__name__}: {error}")
            return
        say(accepted=accepted)
        time.sleep(0.02)
    raise RuntimeError(f"the subject told of an emergency shutdown, and still took audio {REFUSAL_S:g} s later")


def _starve(job: Job, subject: Any, stream: Any, accepted: int) -> int:
    """Fill host memory up to its limit, slowly enough for the subject to see it coming, while audio goes on.

    Give the position that is accepted.
    """
    from backends.faults.limits import cap_host_memory
    from backends.host import host_memory

    subject.drain(job.drain_s)
    limit = cap_host_memory(job.starve_headroom_bytes)
    held: list[bytearray] = []
    say(limit_bytes=limit)
    fraction = host_memory().fraction
    while not _in_emergency(subject):
        # Coarse where nothing happens, fine where the last level is.
        step = limit // (20 if fraction < 0.7 else 50 if fraction < 0.93 else 250)
        try:
            held.append(bytearray(b"\xa5") * step)
        except MemoryError:
            raise RuntimeError(
                f"the host refused ballast at {fraction:.1%}, and the subject did not shut down"
            ) from None
        fraction = highest = host_memory().fraction
        if fraction < 0.9:
            accepted = subject.feed(accepted, stream[accepted : accepted + job.block_samples])
            say(accepted=accepted)
        # The subject's own monitor has to have a chance at each level, and what it takes itself counts as well.
        deadline_s = time.monotonic() + (0.1 if fraction < 0.7 else 0.25)
        while time.monotonic() < deadline_s and not _in_emergency(subject):
            highest = max(highest, host_memory().fraction)
            time.sleep(0.005)
        say(pressure=highest)
    say(shutdown=True)
    held.clear()
    return accepted


class Hosted:
    """A host process, from the outside."""

    def __init__(self, job: Job, folder: Path) -> None:
        """Start it; its standard error and its temporary files go into ``folder``."""
        self.job = job
        self.lines: list[dict[str, Any]] = []
        self._mark = f"{os.getpid()}-{next(_numbers)}"
        self._log = folder / "stderr.log"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qualification.host", json.dumps(dataclasses.asdict(job)), str(os.getpid())],
                cwd=_ROOT,
                env={**os.environ, "TMPDIR": str(self.temporary), _MARK: self._mark},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # Ctrl-C is the test runner's to handle: it closes its hosts itself.
                start_new_session=True,
            )
        self._pending = b""

    def order(self, order: str) -> None:
        """Have it ``stop`` recording, or ``watch`` for the next answer. A process that is gone takes no orders."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            os.write(self.process.stdin.fileno(), f"{order}\n".encode())

    def workers(self) -> list[psutil.Process]:
        """Give the processes below it that run. Each knows when it began: another with the same id is another."""
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            return [each for each in below if each.status() != psutil.STATUS_ZOMBIE]
        return []

    def family(self) -> list[psutil.Process]:
        """Give every process that was started by it, also one that went its own way: it has a mark of its own."""
        mark, found = f"{_MARK}={self._mark}".encode(), []
        for entry in Path("/proc").iterdir():
            # Of other users' processes, and of those that end meanwhile, nothing can be read.
            with suppress(OSError, ValueError, psutil.NoSuchProcess):
                process_id = int(entry.name)
                if process_id != self.process.pid and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(process_id))
        return found

    def shared_memory(self) -> set[str]:
        """Give the shared memory with a name that it and its family have now: POSIX files, and System V segments."""
        process_ids = {self.process.pid, *(process.pid for process in self.family())}
        found = set()
        for process_id in process_ids:
            with suppress(OSError):
                maps = Path(f"/proc/{process_id}/maps").read_text(errors="replace")
                found |= {line.split(maxsplit=5)[5] for line in maps.splitlines() if " /dev/shm/" in line}
        with suppress(OSError):
            segments = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
            found |= {f"System V segment {each[1]}" for each in segments if int(each[4]) in process_ids}
        return found

    def read(self, timeout_s: float) -> bool:
        """Take in what was written within ``timeout_s``; False at the end of its output."""
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while (left_s := deadline_s - time.monotonic()) > 0:
                if not selector.select(left_s):
                    break
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    return False
                *whole, self._pending = (self._pending + data).split(b"\n")
                self.lines += [json.loads(line) for line in whole]
        return True

    def wait_for(self, key: str, timeout_s: float, lines: int = 1) -> Any:
        """Wait for so many lines with this key and give the last value.

        Raises TimeoutError or RuntimeError, with what it said, and StorageUnavailable.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = self.all(key)
            if len(found) >= lines:
                return found[-1]
            more = self.read(0.05)
            if not more and (reason := self.last("unavailable")) is not None:
                raise StorageUnavailable(reason)
            if not more and len(self.all(key)) < lines:
                raise RuntimeError(f"the host process ended without {key!r}: {self.said()}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the host process said no {key!r} within {timeout_s} s: {self.said()}")

    def last(self, key: str) -> Any:
        """Give the value of the last line with this key, or None."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)

    def all(self, key: str) -> list[Any]:
        """Give the values of all lines with this key."""
        return [line[key] for line in self.lines if key in line]

    def end(self, timeout_s: float) -> int:
        """Wait for its end; give the exit status, negative for a signal. Ends it itself at the deadline."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and self.read(0.2):
            pass
        try:
            return self.process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"the host process did not end within {timeout_s} s: {self.said()}") from None

    def kill(self) -> None:
        """SIGKILL it, and take in what it had written."""
        self.process.kill()
        self.process.wait()
        self.read(5.0)

    def close(self) -> None:
        """End it, whatever it is doing. A second call does nothing."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def said(self) -> str:
        """Give the end of what it wrote, quoted, for a message."""
        tail = self._log.read_text(errors="replace")[-600:] if self._log.exists() else ""
        return quoted(f"{self.lines[-4:]} {tail}".strip())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
