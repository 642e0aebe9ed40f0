"""A subject on which points are tried, and what has to be true of it after each: the oracles.

Lives in the process that has the subject, under the interposer. What is done while a fault is armed is done by a
scenario; here is what comes before and after it, when memory can be had.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import backends
from backends.contract import BackendError
from backends.faults.interposer import Control, uncounted
from qualification.audio import load_wav
from qualification.observe import quiesce, recovered, same_output, told_since
from qualification.quoting import error_text, quoted
from qualification.stream import Stream, untiled
from qualification.subject import Result, Subject, SubjectContext, load_factory

#: Of audio, repeated: so many blocks. What is right is computed once, for two rounds: the first has no left context.
PERIOD_BLOCKS = 8
#: The recording begins with a second of near silence.
_SPEECH_FROM_SAMPLES = 16_000
_POSITIONS, _BOARD = struct.Struct("<qq"), struct.Struct("<qqB4096s")
_ARMED_AT = _POSITIONS.size
#: After so many points a subject begins a new recording: reading it back takes time in proportion to its length.
RECORDING_POINTS = 40
DRAIN_S = 20.0
#: A subject's own process that is refused everything can only wait: so long, and then there is memory again.
WITHOUT_MEMORY_S = 0.05
#: A subject that stopped is opened again, and this often; nothing fails any more then.
_MOST_REOPENED = 2
#: More than any bounded recovery tells of, or tries.
MOST_EVENTS, MOST_ATTEMPTS = 80, 40

Problem = tuple[str, str]
CLOSED, STOPPED = "closed", "stopped"


@dataclass(frozen=True)
class Setting:
    """What the process with the subject is told; plain data."""

    subject: str
    backend: str
    device: str | None
    model: str
    audio: str
    device_limit_bytes: int
    #: Of one answer: what is fed is a multiple of it.
    block_samples: int
    folder: str


@dataclass(frozen=True)
class Before:
    """What there was when a point began."""

    events: int
    results: int
    attempts: float
    device: str


class Board:
    """What outlives the process: up to where audio was acknowledged, what was being fed, and the recording's folder."""

    def __init__(self, path: Path) -> None:
        """Map the file, which is made where there is none."""
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            file.truncate(_BOARD.size)
            self._map = mmap.mmap(file.fileno(), _BOARD.size)

    def write(self, acknowledged: int, in_flight: int) -> None:
        """Note both positions, in samples."""
        _POSITIONS.pack_into(self._map, 0, acknowledged, in_flight)

    def read(self) -> tuple[int, int]:
        """Give both."""
        acknowledged, in_flight = _POSITIONS.unpack_from(self._map, 0)
        return acknowledged, in_flight

    def begin(self, folder: Path, accepted: int) -> None:
        """Note which recording goes on."""
        _BOARD.pack_into(self._map, 0, accepted, accepted, 0, os.fsencode(folder))

    def arm(self, armed: int) -> None:
        """Note whether a fault is armed: only then may the process end. Takes no memory."""
        self._map[_ARMED_AT] = armed

    def was_armed(self) -> bool:
        """Whether a fault was armed when the process ended."""
        return bool(self._map[_ARMED_AT])

    def folder(self) -> str:
        """Give its folder, or nothing where none was begun."""
        return os.fsdecode(_BOARD.unpack_from(self._map, 0)[3].rstrip(b"\0"))


class Stage:
    """One subject at a time, fed from one stream, and what is known to be right about it."""

    def __init__(self, setting: Setting) -> None:
        """Make the backend, and compute what is right with a subject that nothing happens to."""
        control = Control.attached()
        if control is None:
            raise BackendError("this process is not under the interposer: it is started by the sweep")
        self.control = control
        self.setting = setting
        self.block_samples = setting.block_samples
        begin = _SPEECH_FROM_SAMPLES
        samples = load_wav(Path(setting.audio))[begin : begin + PERIOD_BLOCKS * setting.block_samples]
        self.stream = Stream(samples)
        self._factory = load_factory(setting.subject)
        self.backend = backends.create(setting.backend)(setting.device)
        self.backend.limit_memory(setting.device_limit_bytes)
        #: So many recordings were begun.
        self.recordings = 0
        self.board = Board(Path(setting.folder) / "board")
        self.subject: Subject | None = None
        self._policy: Mapping[str, Any] = {}
        self.folder = Path()
        self.accepted = self.wanted = 0
        self._points = 0
        #: How long the subject is waited for while a fault is armed.
        self.patience_s = DRAIN_S
        #: Whether the fault stays for as long as it is armed.
        self.persistent = False
        #: Syncs are missing after these feeds.
        self.not_durable: list[str] = []
        self.device = ""
        self._right = self._undisturbed()
        #: More than a run of one window takes of the device, and less than one of two.
        self.small_batch_bytes = self._measure_runs()

    # The subject.

    def new_folder(self) -> Path:
        """Name a folder for a recording that begins."""
        self.recordings += 1
        return Path(self.setting.folder) / f"{os.getpid()}-{self.recordings}"

    def begin(self, policy: Mapping[str, Any], folder: Path, accepted: int = 0) -> None:
        """Say which subject is made by ``open``, and how much its folder has accepted already."""
        self.close()
        self._policy, self.folder, self._points = policy, folder, 0
        self.accepted = self.wanted = accepted
        self.board.begin(folder, accepted)
        self._its_context = self._context(folder, policy)

    def open(self) -> None:
        """Make the subject."""
        self.subject = self._factory(self._its_context)

    def _context(self, folder: Path, policy: Mapping[str, Any]) -> SubjectContext:
        return SubjectContext(
            workdir=folder,
            backend=self.backend,
            device=self.backend.device,
            model_path=Path(self.setting.model),
            limits={"device_limit_bytes": self.setting.device_limit_bytes},
            policy=policy,
        )

    def require(self) -> Subject:
        """Give the subject that is open."""
        if self.subject is None:
            raise RuntimeError("no subject is open")
        return self.subject

    def fresh(self, policy: Mapping[str, Any]) -> None:
        """Have a subject with this policy, on its device, and of a recording that is not long."""
        subject = self.subject
        if subject is not None and self._points < RECORDING_POINTS and policy == self._policy:
            with contextlib.suppress(Exception):
                if subject.device() == self.device:
                    self._points += 1
                    return
        self.begin(policy, self.new_folder())
        self.open()
        self.device = self.device or self.require().device()
        self.wants(self.block_samples)
        self.finish()

    def close(self) -> None:
        """Close the subject, and forget its recording."""
        subject, self.subject = self.subject, None
        if subject is not None:
            subject.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def wants(self, samples: int) -> None:
        """Have so much more to be fed, made now: there is memory for it."""
        self.wanted = self.accepted + samples
        self.block = self.stream[self.accepted : self.wanted]

    def feed(self) -> None:
        """Feed what is wanted, in one call; see that it was made durable."""
        subject, start, process = self.require(), self.accepted, os.getpid()
        with uncounted():
            self.board.write(start, self.wanted)
            before = self.control.durability(process)
        accepted = subject.feed(start, self.block)
        # Refused nothing: what was acknowledged, and how, is not to be forgotten.
        with uncounted():
            after = self.control.durability(process)
            self.accepted = accepted
            self.board.write(accepted, accepted)
            wrote = after.main_wrote > before.main_wrote
            if accepted > start and (after.syncs == before.syncs or (wrote and after.main_synced < after.main_wrote)):
                span = f"samples [{start}, {accepted})"
                self.not_durable.append(f"{span} were acknowledged without a sync since their write")

    def _undisturbed(self) -> dict[tuple[int, int], Result]:
        # Without a limit: another capped device of this process would take the first one's place.
        backend = backends.create(self.setting.backend)(self.setting.device)
        folder = Path(self.setting.folder) / f"{os.getpid()}-undisturbed"
        context = self._context(folder, {})
        subject = self._factory(SubjectContext(**{**vars(context), "backend": backend, "device": backend.device}))
        position = 0
        for _ in range(2 * PERIOD_BLOCKS):
            position = subject.feed(position, self.stream[position : position + self.block_samples])
            subject.drain(DRAIN_S)
        right = {(each.start, each.stop): each for each in subject.results()}
        subject.close()
        backend.close()
        shutil.rmtree(folder, ignore_errors=True)
        if not right or any(each.output is None for each in right.values()):
            raise RuntimeError(f"the subject does not answer even when nothing happens to it: {len(right)} results")
        return right

    def _measure_runs(self) -> int:
        with contextlib.closing(self.backend.load(Path(self.setting.model))) as model:
            # Halfway: what an allocator adds to either is not in the figures.
            return (model.working_set_bytes(1) + model.working_set_bytes(2)) // 2

    # The oracles.

    def before(self) -> Before:
        """Take note of what there is."""
        subject = self.subject
        if subject is None:
            return Before(0, 0, 0.0, self.device)
        return Before(len(subject.events()), len(subject.results()), self._attempts(subject), subject.device())

    @staticmethod
    def _attempts(subject: Subject) -> float:
        return sum(value for name, value in subject.metrics().items() if name.endswith("_attempts"))

    def finish(self) -> list[Problem]:
        """Have everything that is wanted accepted and answered, with the same subject or one that resumes it."""
        problems: list[Problem] = []
        deadline_s = time.monotonic() + 2 * DRAIN_S
        for attempt in range(_MOST_REOPENED + 1):
            try:
                if attempt:
                    problems += self._reopen()
                subject = self.require()
                if self.accepted < self.wanted:
                    self.block = self.stream[self.accepted : self.wanted]
                    self.feed()
                subject.drain(DRAIN_S)
                return problems
            except TimeoutError as error:
                text = f"still at work {DRAIN_S:g} s after the fault was over: {error_text(error)}"
                return [*problems, ("livelocks", text)]
            except Exception as error:
                text = error_text(error)
                if time.monotonic() > deadline_s:
                    break
                # It was closed, or it shut itself down: what it had accepted is there for the next.
                problems += self._stopped(text)
                self.reopened += 1
        return [*problems, ("hosts_lost", f"no subject goes on with the recording: {text}")]

    def _stopped(self, text: str) -> list[Problem]:
        subject = self.subject
        if subject is None:
            return []
        kinds = {event.kind for event in subject.events()}
        if self.may_stop == CLOSED:
            # One that was closed by its user has nothing to tell.
            return []
        if self.may_stop != STOPPED:
            return [("hosts_lost", f"a single refusal stopped it: {text}")]
        self.stopped += 1
        told = "emergency_shutdown" in kinds
        return [] if told else [("untold", f"the subject refuses ({text}), and told of no emergency shutdown")]

    #: Whether the subject may have stopped: the scenario closes it, or it may shut itself down, or not at all.
    may_stop = ""
    #: How often it was opened again since the point began.
    reopened = 0
    #: How often it had shut itself down before.
    stopped = 0

    def _reopen(self) -> list[Problem]:
        subject, self.subject = self.subject, None
        problems: list[Problem] = []
        try:
            if subject is not None:
                subject.close()
        except Exception as error:
            problems = [("hosts_lost", f"it does not close: {error_text(error)}")]
        self.open()
        samples = recovered(self.require())
        if samples is None:
            return problems
        acknowledged, self.accepted = self.accepted, max(self.accepted, len(samples))
        # Said here: a subject that refuses what comes after a gap is never looked at.
        lost = acknowledged - len(samples)
        if lost > 0:
            problems.append(("samples_lost", f"{lost} of {acknowledged} samples are gone"))
        return problems

    def look(self, before: Before, single: bool) -> list[Problem]:
        """Compare everything that is stored and answered with what has to be."""
        subject, problems = self.require(), list[Problem]()
        samples = recovered(subject)
        if samples is not None:
            if len(samples) < self.accepted:
                problems.append(("samples_lost", f"{self.accepted - len(samples)} of {self.accepted} samples are gone"))
            if different := self.stream.different(samples):
                problems.append(("samples_different", f"{different} of {len(samples)} samples are not what was fed"))
        results = subject.results()
        gaps, overlaps = untiled(results, self.accepted)
        if gaps or overlaps:
            problems.append(("gaps_and_overlaps", f"{gaps} gaps and {overlaps} overlaps in [0, {self.accepted})"))
        problems += self._wrong(results, before.results if single else len(results))
        problems += self._untold(subject, before, results)
        problems += [("feeds_not_durable", each) for each in self.not_durable]
        self.not_durable.clear()
        return problems

    def _wrong(self, results: Sequence[Result], exact_from: int) -> list[Problem]:
        """Compare every answer, and those from this one on, of batches of one, to the bit."""
        same = same_output(self.require())
        wrong = []
        for number, each in enumerate(results):
            right = self._right.get(self._in_reference(each))
            if right is None:
                wrong.append(f"[{each.start}, {each.stop}) is cut elsewhere than in the undisturbed run")
            elif not same(each.output, right.output):
                said = "has no answer" if each.output is None else "is answered otherwise than in the undisturbed run"
                wrong.append(f"[{each.start}, {each.stop}) {said}")
            elif number >= exact_from and each.device == self.device and not np.array_equal(each.output, right.output):
                wrong.append(f"[{each.start}, {each.stop}) differs in some bit from the undisturbed run's answer")
        return [("answers_wrong", f"{len(wrong)} answers: {wrong[0]}")] if wrong else []

    def _in_reference(self, result: Result) -> tuple[int, int]:
        """Give where in the two rounds of the undisturbed run the same samples, and the same context, are."""
        round_samples = PERIOD_BLOCKS * self.block_samples
        shift = max(0, result.start // round_samples - 1) * round_samples
        return result.start - shift, result.stop - shift

    def _untold(self, subject: Subject, before: Before, results: Sequence[Result]) -> list[Problem]:
        # A subject that resumed another has told nothing yet, and its events begin anew.
        same = len(subject.events()) >= before.events
        told = told_since(subject, before.events if same else 0)
        problems = []
        news = results[before.results :]
        for each in news if same else ():
            span = f"[{each.start}, {each.stop})"
            if each.output is None and "chunk_set_aside" not in told:
                problems.append(("untold", f"{span} has no answer: nobody was told"))
            # Of a fallback that was in use before, the user was told then.
            moved = each.degraded or each.device != self.device
            if moved and before.device == self.device and "cpu_fallback" not in told:
                problems.append(("untold", f"{span} was answered on {quoted(each.device)}: nobody was told"))
        attempts = self._attempts(subject) - before.attempts
        if len(told) > MOST_EVENTS or attempts > MOST_ATTEMPTS:
            problems.append(("livelocks", f"{len(told)} events and {attempts:g} attempts for one fault"))
        return problems

    def clean_run(self) -> list[Problem]:
        """Feed and answer one more block: the next run has to be right."""
        before = self.before()
        self.wants(self.block_samples)
        problems = self.finish()
        if problems:
            return [("clean_runs_wrong", f"the next run: {text}") for _, text in problems]
        return [("clean_runs_wrong", f"the next run: {text}") for _, text in self.look(before, single=True)]

    def held(self) -> dict[str, dict[str, int]]:
        """Give what each process of the subject holds at rest: heap (bytes), descriptors, threads; and how many run."""
        quiesce(self.require(), DRAIN_S)
        self.control.ask_for_heaps()
        # A process tells of its heap with its next request for memory: here this one's, there those below it.
        bytearray(4096)
        self.backend.memory()
        self.control.end()
        heaps, held = self.control.heaps_bytes(), dict[str, dict[str, int]]()
        for process in self.require().process_ids():
            with contextlib.suppress(OSError):
                # One that was asked for nothing tells of no heap.
                heap = {"heap_bytes": heaps[process]} if process in heaps else {}
                held[str(process)] = heap | {
                    "descriptors": sum(1 for _ in Path(f"/proc/{process}/fd").iterdir()),
                    "threads": sum(1 for _ in Path(f"/proc/{process}/task").iterdir()),
                }
        held["all"] = {"processes": sum(map(is_running, self.control.processes()))}
        return held


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(OSError):
        # After the name, which may have anything in it.
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b") ")[2][:1] not in b"ZX"
    return False
