"""Record and resume as a program: audio in, acknowledgements out, signals and what goes wrong turned into an ending.

Standard output gets JSON lines for whoever drives the program, standard error text for a person. A signal never raises:
a feed is not cut short.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shlex
import signal
import stat
import sys
import termios
import time
import wave
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import backends
from backends.contract import Backend
from backends.model import SAMPLE_RATE_HZ
from protection.events import Event, EventKind
from protection.pipeline import DictationPipeline, PipelineClosed, make_engine
from protection.policy import Policy, PolicyError
from protection.spool import AudioError, SpoolError, SpoolView, busy, holder

Pcm = npt.NDArray[np.int16]

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_NO_OUTPUT = 74
EXIT_WORK_LEFT = 75
#: When several apply, the last of these is told.
_EXITS = (EXIT_DONE, EXIT_WORK_LEFT, EXIT_FAILED, EXIT_NO_OUTPUT)

_SAMPLE_BYTES = 2
#: What a WAV says that was written into a pipe, nobody knew how long: near 2 GiB (sox, arecord) or 4 GiB (ffmpeg).
_STREAMED_SAMPLES = (
    range(0x7FFFF000 // _SAMPLE_BYTES, 0x80000000 // _SAMPLE_BYTES + 1),
    range(0xFFFFF000 // _SAMPLE_BYTES, 0xFFFFFFFF // _SAMPLE_BYTES + 1),
)
_FULL_SCALE = np.float32(32768)
#: What was accepted already is compared in pieces of a minute.
_COMPARED_SAMPLES = 60 * SAMPLE_RATE_HZ
#: So much audio waits in the pipe, 32 s of it, while a model is loaded or a disk is slow.
_PIPE_BYTES = 1 << 20
_STEP_S = 0.2
#: ``timeout`` and others send a signal to the process and then to its group: that is one wish, not two.
_SAME_SIGNAL_S = 0.25


class Refused(Exception):
    """Nothing was accepted by this run. The message says what was wrong and what was expected."""


class NoOutput(Exception):
    """Standard output cannot be written."""


@dataclass(frozen=True)
class Options:
    """What one run is to do. ``input`` is a WAV, ``-`` for raw PCM on standard input, or None: only answer."""

    folder: Path
    backend: str | None
    model: Path
    policy: Mapping[str, Any]
    deadline_s: float
    input: str | None = None
    realtime: bool = False
    block_samples: int = 1600


def write_line(**what: Any) -> None:
    """Write one JSON line to standard output, at once. Raises NoOutput when nobody reads it."""
    left = (json.dumps(what) + "\n").encode()
    try:
        while left:
            left = left[os.write(1, left) :]
    except OSError as error:
        raise NoOutput(f"standard output cannot be written: {error.strerror}") from error


def tell(text: str) -> None:
    """Tell a person, on standard error; when nobody reads that either, it is not told."""
    with contextlib.suppress(OSError):
        # One write, so that lines of two threads stay lines.
        sys.stderr.write(f"protection: {text}\n")


class Stop:
    """The wish to end, from a signal or from within. Nothing is raised: whoever waits for audio waits for it too."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._patience_s = 0.0
        self.asked_s: float | None = None
        #: The signal that asked, and when it came.
        self.signal: tuple[str, float] | None = None

    @property
    def asked(self) -> bool:
        """Whether this run is to end."""
        return self.asked_s is not None

    def fileno(self) -> int:
        """Give what becomes readable, for good, with a signal or when ``ask`` is called."""
        return self._reading

    def ask(self) -> None:
        """Ask for the end."""
        if self.asked_s is None:
            self.asked_s = time.monotonic()
        with contextlib.suppress(BlockingIOError):
            os.write(self._writing, b"\0")

    def wait(self, timeout_s: float) -> None:
        """Wait so long, or until somebody asks."""
        select.select([self], [], [], max(0.0, timeout_s))

    def listen(self, patience_s: float) -> None:
        """Have signals ask from here on. When the program is still there so long after one, it ends at once."""
        self._patience_s = patience_s
        # Written by the interpreter itself as the signal comes: no wait misses it.
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGALRM, _end_at_once)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.signal is None:
            self.signal = (signal.Signals(number).name, now_s)
            self.ask()
            signal.setitimer(signal.ITIMER_REAL, self._patience_s)
        elif now_s - self.signal[1] > _SAME_SIGNAL_S:
            # What was accepted is on the disk, and a worker ends with this process.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"protection: it did not end in time; what was accepted is in the spool: resume answers it\n")
    os._exit(EXIT_WORK_LEFT)


class Input(Protocol):
    """Where audio comes from."""

    #: What was wrong with it, once it has ended.
    problem: str | None
    #: What is there and was not taken, once it was stopped.
    left: str | None

    def blocks(self, accepted: int, stop: Stop) -> Iterator[tuple[int, Pcm]]:
        """Give blocks by position until the end, or until stopped; the spool has ``accepted`` samples already.

        Raises AudioError, OSError.
        """

    def close(self) -> None:
        """Take no more."""


class WavInput:
    """A WAV: its first sample is the recording's first, whenever it is fed."""

    def __init__(self, path: Path, block_samples: int) -> None:
        """Open it. Raises AudioError for what is not a 16 kHz mono 16-bit WAV with something in it."""
        self.problem: str | None = None
        self.left: str | None = None
        self._path, self._block_samples = path, block_samples
        options = ["-r", str(SAMPLE_RATE_HZ), "-c", "1", "-b", "16", "-e", "signed-integer"]
        converted = path.with_name(f"{path.stem}-{SAMPLE_RATE_HZ}.wav")
        convert = f"convert it: {shlex.join(['sox', str(path), *options, str(converted)])}"
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(path.open("rb"))
                wav = opened.enter_context(wave.open(file, "rb"))
            except FileNotFoundError:
                raise AudioError(f"{path}: there is no such file") from None
            except OSError as error:
                raise AudioError(f"{path}: the file cannot be read: {error.strerror}") from error
            except EOFError as error:
                raise AudioError(
                    f"{path}: truncated in its header, expected RIFF WAVE; nothing was recorded"
                ) from error
            except RuntimeError as error:
                # Of ``wave``, and without a word.
                raise AudioError(
                    f"{path}: not a WAV (a chunk of its header ends beyond the file), expected RIFF WAVE; {convert}"
                ) from error
            except wave.Error as error:
                if "unknown format" in str(error):
                    raise AudioError(f"{path}: {error}, expected 16 bit PCM; {convert}") from error
                raise AudioError(f"{path}: not a WAV ({error}), expected RIFF WAVE; {convert}") from error
            rate_hz, channels, width = wav.getframerate(), wav.getnchannels(), wav.getsampwidth()
            if rate_hz != SAMPLE_RATE_HZ:
                raise AudioError(f"{path}: {rate_hz} Hz, expected {SAMPLE_RATE_HZ} Hz; {convert}")
            if channels != 1:
                raise AudioError(f"{path}: {channels} channels, expected 1 (mono); {convert}")
            if width != _SAMPLE_BYTES:
                raise AudioError(f"{path}: {8 * width} bit, expected 16 bit; {convert}")
            #: None: to the end of the file.
            self._declared: int | None = wav.getnframes()
            if any(self._declared in sizes for sizes in _STREAMED_SAMPLES):
                self._declared = None
            ended = stat.S_ISREG(os.fstat(file.fileno()).st_mode) and not file.peek(1)
            if self._declared == 0 or (self._declared is None and ended):
                raise AudioError(f"{path}: empty, expected at least one sample{_behind_the_header(file)}")
            self._file = file
            self.close = opened.pop_all().close

    def blocks(self, accepted: int, stop: Stop) -> Iterator[tuple[int, Pcm]]:
        """Give what was accepted before in large pieces, to be compared, and then blocks."""
        position = 0
        while self._declared is None or position < self._declared:
            if stop.asked:
                rest = (
                    f"the samples from {position} on"
                    if self._declared is None
                    else f"{self._declared - position} samples"
                )
                self.left = f"{rest} of {self._path} were not taken: start the same command again to go on with them"
                return
            known = accepted - position
            samples = min(known, _COMPARED_SAMPLES) if known > 0 else self._block_samples
            if self._declared is not None:
                samples = min(samples, self._declared - position)
            # Not by ``wave``: where the size of the audio is none, that of the file is none either.
            data = self._file.read(samples * _SAMPLE_BYTES)
            pcm = np.frombuffer(data, "<i2", len(data) // _SAMPLE_BYTES)
            if self._declared is None and len(data) % _SAMPLE_BYTES:
                self.problem = (
                    f"{self._path}: it ends within a sample, after {position + len(pcm)} whole ones: 1 byte is left "
                    "over, expected 2 for each sample; the whole ones were recorded"
                )
            if not len(pcm):
                if self._declared is None:
                    return
                self.problem = (
                    f"{self._path}: truncated: {position} samples found, {self._declared} expected from its header, "
                    f"{self._declared - position} are missing; what is there was recorded"
                )
                return
            yield position, pcm
            position += len(pcm)


def _behind_the_header(file: Any) -> str:
    """Say what follows a header that promises nothing, as a recorder leaves it that was killed."""
    start = file.tell()
    behind = os.fstat(file.fileno()).st_size - start
    if behind <= 0:
        return ""
    return (
        f"; {behind} bytes follow the header: if they are audio, whose recorder was killed, record them with "
        f"tail -c +{start + 1} {shlex.quote(file.name)} | python -m protection record --spool DIR --input -"
    )


class PcmInput:
    """Raw PCM on standard input: signed 16-bit little-endian mono at 16 kHz. It has no positions: it is appended."""

    def __init__(self, block_samples: int) -> None:
        """Begin with what comes. Raises AudioError where nothing can come."""
        self.problem: str | None = None
        self.left: str | None = None
        if sys.stdin is None:
            raise AudioError("standard input is closed: expected raw PCM, signed 16-bit little-endian mono 16 kHz")
        self._fd = sys.stdin.fileno()
        if os.isatty(self._fd):
            raise AudioError(
                "standard input is a terminal: expected raw PCM, signed 16-bit little-endian mono 16 kHz, such as from "
                "arecord -t raw -f S16_LE -r 16000 -c 1"
            )
        # Elsewhere than in a pipe there is no such size.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        # The only one, made before anything is taken: what is read has its place already, however short memory is.
        self._buffer = memoryview(bytearray(block_samples * _SAMPLE_BYTES))

    def blocks(self, accepted: int, stop: Stop) -> Iterator[tuple[int, Pcm]]:
        """Give what comes as it comes, in blocks that may be short. A block is valid until the next."""
        buffer, position, odd = self._buffer, accepted, 0
        #: How much is still taken, once the end was asked for.
        left_bytes: int | None = None
        while True:
            if left_bytes is None and stop in select.select([self._fd, stop], [], [])[0]:
                left_bytes = self._held_bytes()
            count = os.readv(self._fd, [buffer[odd:][:left_bytes]]) if left_bytes != 0 else 0
            if not count:
                break
            if left_bytes is not None:
                left_bytes -= count
            head = bytes(buffer[:12]) if position == accepted else b""
            if head.startswith(b"RIFF") and head.endswith(b"WAVE"):
                raise AudioError("standard input is a WAV: expected raw PCM; name the file with --input FILE.wav")
            whole, odd = divmod(odd + count, _SAMPLE_BYTES)
            if whole:
                yield position, np.frombuffer(buffer, "<i2", whole)
                position += whole
                buffer[:odd] = buffer[whole * _SAMPLE_BYTES :][:odd]
        if odd and left_bytes is None:
            self.problem = (
                f"standard input ended within a sample, after {position - accepted} whole ones: 1 byte is left over, "
                "expected 2 for each sample; the whole ones were recorded"
            )

    def close(self) -> None:
        """Nothing to do: standard input is its owner's."""

    def _held_bytes(self) -> int:
        """Say how much is to be taken yet: what is in a pipe by now was said before the end was asked for."""
        count = bytearray(4)
        # A device that does not know has nothing to say.
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fd, termios.FIONREAD, count)
        held = int.from_bytes(count, sys.byteorder)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            return held
        if held:
            self.left = f"{held // _SAMPLE_BYTES} samples of standard input were not taken"
        return 0


def run(options: Options) -> int:
    """Record, or only answer what is unanswered; give the exit status. Raises Refused."""
    # Until there is something to answer a signal ends the program at once, and there is nothing to say about it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    session = Session(options)
    with contextlib.ExitStack() as opened:
        try:
            source = _open_input(options)
            if source is not None:
                opened.callback(source.close)
            policy = _policy(options.policy)
            if source is None:
                with SpoolView(options.folder) as view:
                    session.count(view)
                    if view.answered == view.accepted and holder(options.folder) is None:
                        return session.end()
            pipeline = opened.enter_context(_open_pipeline(options, policy, session))
        except (AudioError, PolicyError, SpoolError) as error:
            raise Refused(str(error)) from error
        except MemoryError as error:
            raise Refused("there was no memory to begin: nothing was recorded or answered") from error
        session.stop.listen(options.deadline_s + 2 * policy.shutdown_deadline_s + 2)
        session.work(pipeline, source)
    return session.end()


def _open_input(options: Options) -> Input | None:
    if options.input is None:
        return None
    if options.input == "-":
        return PcmInput(options.block_samples)
    return WavInput(Path(options.input), options.block_samples)


def _policy(options: Mapping[str, Any]) -> Policy:
    try:
        return Policy.from_options(options)
    except TypeError as error:
        raise PolicyError(f"a policy option has a value of the wrong kind: {error}") from error


def _open_pipeline(options: Options, policy: Policy, session: Session) -> DictationPipeline:
    """Open everything that a recording needs, before any of it is taken."""
    owner = holder(options.folder)
    if owner is not None:
        # Before a second model takes memory from the recording that goes on.
        raise busy(options.folder, owner)
    if not options.model.is_file():
        raise Refused(f"there is no model {options.model}: expected an ONNX file, as python -m backends.model makes it")
    backend = _backend(options.backend)
    try:
        engine = make_engine(backend, options.model, policy, owns_backend=True)
    except Exception as error:
        # A runtime raises what it likes.
        raise Refused(
            f"backend {backend.name} cannot run {options.model}: {type(error).__name__}: {error}; "
            "nothing was recorded: mend that, or name another with --backend or --model"
        ) from error
    return DictationPipeline(options.folder, engine, policy, on_event=session.on_event)


def _backend(name: str | None) -> Backend:
    """Make the backend of this name, or the first that is available."""
    if name is None:
        found = backends.available()
        for declared, availability in found:
            if availability.available:
                return backends.create(declared.name)()
        reasons = "; ".join(f"{declared.name}: {availability.reason}" for declared, availability in found)
        raise Refused(f"no backend is available, nothing was recorded: install the runtime of one ({reasons})")
    try:
        kind = backends.create(name)
        availability = kind.probe()
    except backends.UnknownBackend as error:
        raise Refused(str(error)) from error
    except ImportError as error:
        raise Refused(f"backend {name} cannot be imported, nothing was recorded: {error}") from error
    if not availability.available:
        raise Refused(f"backend {name} is not available here, nothing was recorded: {availability.reason}")
    return kind()


class Session:
    """One run: what was asked of it, what went wrong, and how it ends."""

    def __init__(self, options: Options) -> None:
        """Begin with nothing wrong."""
        self._options = options
        self._status = EXIT_DONE
        self._emergency = False
        #: The last one, until something was stored again.
        self._storage_failures: deque[str] = deque(maxlen=1)
        self._told_of_signal = False
        self._counted: dict[str, int] = {}
        self.stop = Stop()

    def on_event(self, event: Event) -> None:
        """Tell a person what the pipeline tells, in one line."""
        tell(" ".join(f"{event.kind.value}: {event.message}; {event.action}; {event.meaning}".split()))
        if event.kind is EventKind.STORAGE_FAILED:
            self._storage_failures.append(event.message)
        if event.kind is EventKind.EMERGENCY_SHUTDOWN:
            self._emergency = True
            self.stop.ask()

    def work(self, pipeline: DictationPipeline, source: Input | None) -> None:
        """Take all audio, then have all of it answered. Raises Refused."""
        with self._noting(), SpoolView(self._options.folder) as view:
            if source is not None:
                with self._noting():
                    self._take(pipeline, source, view.accepted)
            with self._noting():
                self._answer(pipeline, view)
            # Only now: until then there may be more answers.
            pipeline.shutdown("the program ends")
            self.count(view)

    def count(self, view: SpoolView) -> None:
        """Note how far everything is."""
        self._counted = {"accepted": view.accepted, "answered": view.answered, "set_aside": view.set_aside}

    def end(self) -> int:
        """Say how far everything is, and give the exit status."""
        if self._emergency:
            self._fail(EXIT_WORK_LEFT)
        if self._counted:
            accepted, answered = self._counted["accepted"], self._counted["answered"]
            if answered < accepted:
                folder = shlex.quote(str(self._options.folder))
                self._fail(
                    EXIT_WORK_LEFT,
                    f"{accepted - answered} of {accepted} samples are unanswered, and safe in the spool; "
                    f"to answer them: python -m protection resume --spool {folder}",
                )
            self._say(done=self._status == EXIT_DONE, **self._counted)
        return self._status

    def _take(self, pipeline: DictationPipeline, source: Input, accepted: int) -> None:
        self._say(accepted=accepted)
        before, first_s = accepted, 0.0
        try:
            for start, pcm in source.blocks(accepted, self.stop):
                if self._options.realtime and start >= before:
                    first_s = first_s or time.monotonic()
                    spoken_s = (start + len(pcm) - before) / SAMPLE_RATE_HZ
                    self.stop.wait(first_s + spoken_s - time.monotonic())
                stored = self._feed(pipeline, start, pcm)
                if stored > accepted:
                    accepted = stored
                    self._say(accepted=accepted)
        except AudioError as error:
            raise Refused(str(error)) from error
        except SpoolError:
            # The pipeline has told why.
            self._fail(EXIT_FAILED, "the last block was not accepted: no more audio is taken")
        self._tell_of_signal()
        if source.problem:
            self._fail(EXIT_FAILED, source.problem)
        if source.left:
            self._fail(EXIT_WORK_LEFT, source.left)

    def _feed(self, pipeline: DictationPipeline, start: int, pcm: Pcm) -> int:
        give_up_s = time.monotonic() + self._options.deadline_s
        while True:
            try:
                return pipeline.feed(start, pcm.astype(np.float32) / _FULL_SCALE)
            except AudioError as error:
                raise Refused(
                    f"{self._options.input} is not the recording that is in {self._options.folder}: "
                    f"give it a folder of its own ({error})"
                ) from error
            except MemoryError:
                # The block is nowhere else, and a moment later there may be memory for it.
                if time.monotonic() > give_up_s:
                    raise
            time.sleep(_STEP_S)

    def _answer(self, pipeline: DictationPipeline, view: SpoolView) -> None:
        """Wait for the answers: as long as it takes, or the deadline once the end was asked for."""
        # That audio could not be stored does not say that answers cannot.
        self._storage_failures.clear()
        progress, progress_s = view.answered, time.monotonic()
        while True:
            self._tell_of_signal()
            with contextlib.suppress(TimeoutError):
                pipeline.drain(_STEP_S)
                return
            now_s, answered = time.monotonic(), view.answered
            if answered > progress:
                progress, progress_s = answered, now_s
                self._storage_failures.clear()
            if self.stop.asked_s is not None and now_s - self.stop.asked_s > self._options.deadline_s:
                return
            if self._storage_failures and now_s - progress_s > self._options.deadline_s:
                self._fail(EXIT_FAILED, f"answers cannot be stored: {self._storage_failures[-1]}")
                return

    def _tell_of_signal(self) -> None:
        if self.stop.signal and not self._told_of_signal:
            self._told_of_signal = True
            tell(
                f"{self.stop.signal[0]}: no more audio is taken; what was accepted is answered for up to "
                f"{self._options.deadline_s:g} s, a second signal ends at once"
            )

    def _say(self, **what: Any) -> None:
        """Tell the program that drives this one; when it is gone, the recording ends in order."""
        if self._status == EXIT_NO_OUTPUT:
            return
        try:
            write_line(**what)
        except NoOutput as error:
            self._fail(EXIT_NO_OUTPUT, f"{error}; no more audio is taken")
            self.stop.ask()

    def _fail(self, status: int, text: str | None = None) -> None:
        self._status = max(self._status, status, key=_EXITS.index)
        if text:
            tell(text)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Turn what went wrong into how this run ends."""
        try:
            yield
        except PipelineClosed:
            # In an emergency, and the pipeline has told why.
            self._fail(EXIT_WORK_LEFT)
        except (AudioError, SpoolError, OSError, MemoryError) as error:
            self._fail(EXIT_FAILED, f"{type(error).__name__}: {str(error) or 'there was no memory for it'}")
