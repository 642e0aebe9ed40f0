"""One worker process, from its host's side: started, asked, waited for with a limit, and ended."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.contract import BackendError, LimitNotEnforced, ModelError, Share, Unsupported
from backends.errors import ErrorKind, RuntimeFailure, Shortage
from backends.process import NO_ACCELERATOR
from backends.threads import OneThread
from protection.channel import AwakeClock, Channel, Ended, Frame, Kind, TornMessage, Wait, until
from protection.template import STATUS_UNKNOWN, Forked, Template, TemplateLost, template_for
from protection.worker import EXIT_HOST_SILENT, boot

_log = logging.getLogger("plimsoll.protection")

#: The errors of the contract, by name: what a worker refused is refused here.
_REFUSALS = {each.__name__: each for each in (BackendError, LimitNotEnforced, ModelError, Unsupported)}
_STDERR_MOST_BYTES = 1 << 20
_STDERR_SHOWN_BYTES = 500
_PUNCH_HOLE_KEEP_SIZE = 3
_SIDE_S = 2.0
_END_S = 0.5


class WorkerLost(RuntimeFailure):
    """The worker died, hung or broke the protocol, and was ended; or it did not start. ``cause`` is one of those four.

    ``at_start`` says that it was not at work yet: whatever it was to compute has no part in it.
    """

    def __init__(self, cause: str, text: str, *, at_start: bool = False) -> None:
        super().__init__(ErrorKind.PROCESS_LOST, text)
        self.cause, self.at_start = cause, at_start


@dataclass(frozen=True)
class Deadlines:
    """How long a worker is waited for, in seconds that this process was awake."""

    start_s: float = 30.0
    infer_s: float = 10.0
    #: While it is at work a sign of life comes five times as often as this.
    heartbeat_s: float = 5.0
    #: A worker ends itself when its host does not read for so long.
    host_patience_s: float = 60.0


class _Impatient(Exception):
    """A deadline ran down while a worker was waited for."""


class Worker:
    """One worker process, from its host's side. One thread at a time asks for work, any about the device."""

    def __init__(
        self,
        launcher: OneThread,
        share: Share,
        model: Path,
        deadlines: Deadlines,
        *,
        load: bool,
    ) -> None:
        """Start the process, and have it ``load`` the model at once; ``ready`` waits for it."""
        self._deadlines = deadlines
        self._numbers = itertools.count(1)
        self._side_numbers = itertools.count(1)
        self._side_lock = threading.Lock()
        #: Numbers of what it holds that nobody refers to any more.
        self._unwanted: deque[int] = deque()
        self._ended = threading.Lock()
        self._reaped = False
        self._cancelled = False
        #: What was wrong with its answers about the device.
        self._garbled = ""
        #: Numbers of the first requests, until their answers are there.
        self._starting: list[int] = []
        #: Whether it has made its backend.
        self.started = False
        #: How often its runtime found no memory of the host's.
        self.starved = 0
        self.loaded: Mapping[str, Any] = {}
        meta = {
            "share": dict(share.data),
            "model": str(model),
            "beat_s": deadlines.heartbeat_s / 5,
            "host_patience_s": deadlines.host_patience_s,
        }
        patience = _Patience(self, deadlines.start_s, deadlines.heartbeat_s)
        try:
            # Last: what fails before it leaves no process behind.
            self._work, self._side, self._stderr, self._process, self._template = launcher.do(
                lambda: _launch(share, NO_ACCELERATOR if share.blind else {})
            )
        except (OSError, subprocess.SubprocessError) as error:
            # No descriptor, no process, no memory for one: that passes, and is nobody's fault.
            raise WorkerLost("did not start", f"no worker could be started ({error})", at_start=True) from error
        try:
            self._starting.append(self._send("start", meta, b"", patience))
            if load:
                self._starting.append(self._send("load", {}, b"", patience))
        except BaseException:
            self.end()
            raise

    @property
    def process_id(self) -> int:
        """The process id."""
        return int(self._process.pid)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Its process id, and that of the template that it was forked from, if it was."""
        template = self._template
        return (self.process_id,) if template is None else (self.process_id, template.process_id)

    @property
    def ended(self) -> bool:
        """Whether it was ended from here."""
        return self._reaped

    @property
    def alive(self) -> bool:
        """Whether the process runs, or is stopped."""
        return not self._reaped and self._process.poll() is None

    def ready(self) -> Mapping[str, Any]:
        """Wait until the first requests are answered; give the last answer. Raises WorkerLost, or what failed there."""
        # A process that starts on a busy machine gives no sign of life before it has imported its libraries.
        patience = _Patience(self, self._deadlines.start_s, self._deadlines.start_s)
        while self._starting:
            try:
                self.loaded = self._receive(self._starting.pop(0), patience).meta
                self.started = True
            except WorkerLost as error:
                error.at_start = True
                raise
        return self.loaded

    def load(self) -> None:
        """Have it load the model. Raises as ``work`` does."""
        try:
            self.loaded = self.work("load", self._deadlines.start_s, silence_s=self._deadlines.start_s).meta
        except WorkerLost as error:
            error.at_start = True
            raise

    def work(
        self,
        do: str,
        deadline_s: float,
        meta: Mapping[str, Any] | None = None,
        body: Any = b"",
        *,
        silence_s: float | None = None,
    ) -> Frame:
        """Ask for one piece of work. Raises WorkerLost, or what failed there, as RuntimeFailure or BackendError.

        ``silence_s`` is for work that may hold the interpreter: loading a model.
        """
        self.ready()
        patience = _Patience(self, deadline_s, silence_s or self._deadlines.heartbeat_s)
        return self._receive(self._send(do, meta or {}, body, patience), patience)

    def _send(self, do: str, meta: Mapping[str, Any], body: Any, patience: _Patience) -> int:
        number = next(self._numbers)
        try:
            self._work.send(Kind.REQUEST, number, {"do": do, **meta}, body, patience)
        except (Ended, OSError) as why:
            raise self._lost("died", str(why)) from None
        except _Impatient as why:
            raise self._lost("hung", str(why)) from None
        except BaseException:
            # Ctrl-C, or no memory here. What would come next is the answer to this.
            self.end()
            raise
        return number

    def _receive(self, number: int, patience: _Patience) -> Frame:
        try:
            while True:
                frame = self._work.receive(patience)
                patience.heard()
                patience.check()
                if frame.kind is Kind.BEAT:
                    continue
                if frame.number != number:
                    raise TornMessage(
                        f"an answer to request {frame.number} came, {number} was asked: it answered twice"
                    )
                break
            failure = _failure(frame)
        except (Ended, OSError) as why:
            raise self._lost("died", str(why)) from None
        except TornMessage as why:
            # A process that was killed while it wrote leaves half a message: that is a death.
            cause = "died" if not self._outlives(0.2) else "broke the protocol"
            raise self._lost(cause, str(why)) from None
        except _Impatient as why:
            raise self._lost("hung", str(why)) from None
        except BaseException:
            self.end()
            raise
        if failure is not None:
            self.starved += isinstance(failure, RuntimeFailure) and failure.kind is ErrorKind.HOST_OOM
            raise failure
        return frame

    def broke(self, why: str) -> WorkerLost:
        """End it for an answer that is none, and give the error to raise."""
        return self._lost("broke the protocol", why)

    def _outlives(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return True
        return False

    def side(self, do: str, timeout_s: float = _SIDE_S, **meta: Any) -> tuple[int, Mapping[str, Any]]:
        """Ask about the device, beside the work; give the number of the question and the answer.

        Raises TimeoutError, ConnectionError when the worker is gone, or what failed there.
        """
        deadline_s = time.monotonic() + timeout_s

        def wait(end: socket.socket, write: bool) -> None:
            if not until(end, write, max(0.0, deadline_s - time.monotonic())):
                raise TimeoutError(f"worker {self.process_id} gave no answer to {do!r} within {timeout_s} s")

        with self._side_lock:
            if self._reaped:
                raise ConnectionError(f"worker {self.process_id} is gone")
            self.shorten_stderr()
            number = next(self._side_numbers)
            try:
                self._send_side(number, do, meta, wait)
                while (frame := self._side.receive(wait)).number != number:
                    # The answer to a question that was given up; not for ever.
                    if time.monotonic() > deadline_s:
                        raise TimeoutError(f"worker {self.process_id} answers other questions than {do!r}")
                failure = _failure(frame)
            except TornMessage as error:
                # Whoever asks it for work next is told.
                self._garbled = str(error)
                self._process.kill()
                raise ConnectionError(f"worker {self.process_id} is not believed any more: {error}") from None
            except TimeoutError:
                self._unwanted.append(number)
                raise
            except (Ended, OSError) as error:
                raise ConnectionError(f"worker {self.process_id} is gone: {error}") from None
            except BaseException:
                # No memory here, or Ctrl-C. What it takes for this question, nobody will refer to.
                self._unwanted.append(number)
                raise
        if failure is not None:
            raise failure
        return number, frame.meta

    def _send_side(self, number: int, do: str, meta: Mapping[str, Any], wait: Wait) -> None:
        unwanted = list(self._unwanted)
        every = {"do": do, **meta, "unwanted": [*unwanted, *meta.get("unwanted", ())]}
        self._side.send(Kind.REQUEST, number, every, b"", wait)
        for _ in unwanted:
            self._unwanted.popleft()

    def forget(self, number: int) -> None:
        """Have it free what a question took, without waiting: the collector calls this from anywhere."""
        self._unwanted.append(number)
        # Held where this interrupts another question: then that, or the next, takes it along.
        if self._side_lock.acquire(blocking=False):
            try:
                if not self._reaped:
                    self._send_side(next(self._side_numbers), "free", {}, _refuse)
            finally:
                self._side_lock.release()

    def cancel(self) -> None:
        """Kill it from another thread: whoever waits for it gets WorkerLost."""
        self._cancelled = True
        with self._ended:
            if not self._reaped:
                self._process.kill()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled

    def end(self) -> None:
        """End it, in order if it answers at once. A second call does nothing."""
        with self._ended:
            if self._reaped:
                return
            self._reaped = True
        try:
            if self._process.poll() is None:
                with contextlib.suppress(Exception):
                    self._work.send(Kind.REQUEST, next(self._numbers), {"do": "end"}, b"", _refuse)
                if self._outlives(_END_S):
                    self._process.kill()
            self._process.wait()
        finally:
            # One that hangs does not see that its connections are closed.
            with contextlib.suppress(Exception):
                self._process.kill()
            self._close()

    def _lost(self, cause: str, why: str) -> WorkerLost:
        """End what is left of it, and say how it ended."""
        died = cause == "died" and not self._outlives(1.0)
        if cause == "died" and not died:
            cause, why = "broke the protocol", f"it closed its connection and lived on ({why})"
        if self._garbled:
            died, cause, why = False, "broke the protocol", self._garbled
        with self._ended:
            first = not self._reaped
            self._reaped = True
        said = ""
        try:
            if first:
                self._process.kill()
                self._process.wait()
            text = f"worker {self.process_id} " + (_how(self._process.poll() or 0) if died else f"{cause}: {why}")
            said = self._said() if first else ""
        finally:
            if first:
                self._close()
        return WorkerLost(cause, text + (f"; it said: {said}" if said else ""))

    def _close(self) -> None:
        try:
            self._work.close()
            with self._side_lock:
                self._side.close()
        finally:
            os.close(self._stderr)

    def _said(self) -> str:
        size = os.fstat(self._stderr).st_size
        tail = os.pread(self._stderr, _STDERR_SHOWN_BYTES, max(0, size - _STDERR_SHOWN_BYTES))
        return " ".join(tail.decode(errors="replace").split())

    def shorten_stderr(self) -> None:
        """Give back the memory of what it said, but for its last words."""
        stat = os.fstat(self._stderr)
        if stat.st_blocks * 512 > _STDERR_MOST_BYTES:
            # A hole, and not another length: it may be writing at this moment.
            _make_hole(self._stderr, stat.st_size - _STDERR_SHOWN_BYTES)


class _Patience:
    """Waits for a worker's socket until a deadline, or until no sign of life came for too long."""

    def __init__(self, worker: Worker, deadline_s: float, silence_s: float) -> None:
        self._worker, self._deadline_s, self._silence_s = worker, deadline_s, silence_s
        self._clock = AwakeClock()
        self._heard_s = 0.0

    def heard(self) -> None:
        self._heard_s = self._clock.read_s()

    def check(self) -> float:
        """Give the seconds so far. Something that comes is not yet an answer: signs of life put nothing off."""
        now_s = self._clock.read_s()
        if now_s > self._deadline_s:
            raise _Impatient(f"no answer within {self._deadline_s:g} s")
        if self._worker.cancelled:
            raise _Impatient("it was not waited for any longer")
        return now_s

    def __call__(self, end: socket.socket, write: bool) -> None:
        while True:
            can = until(end, write, AwakeClock.STEP_S)
            self._worker.shorten_stderr()
            now_s = self.check()
            if can:
                return
            if now_s - self._heard_s > self._silence_s:
                raise _Impatient(f"no sign of life for {self._silence_s:g} s")


def _make_hole(descriptor: int, size_bytes: int) -> None:
    """Give the memory of a file's first bytes back, and keep its length: fallocate(2), which Python does not have."""
    with contextlib.suppress(OSError, AttributeError):
        fallocate = ctypes.CDLL(None).fallocate
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, 0, size_bytes)


def _refuse(end: socket.socket, write: bool) -> None:
    raise TimeoutError("it does not read")


_Launched = tuple[Channel, Channel, int, subprocess.Popen[bytes] | Forked, Template | None]


def _launch(share: Share, hidden: Mapping[str, str]) -> _Launched:
    """Start the process. On the launcher's thread: the kernel ends a worker with the thread that started it."""
    if share.preload is not None:
        try:
            return _launch_from(template_for(share.preload), share, hidden)
        except TemplateLost as error:
            # It saves time, and is not needed. What it may still fork has connections of its own, and they are closed.
            # Logged as text: who keeps an error keeps its frames, and the workers in them.
            _log.warning("a worker is started without its template: %s", str(error))
    return _launch_from(None, share, hidden)


def _launch_from(template: Template | None, share: Share, hidden: Mapping[str, str]) -> _Launched:
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        ends, workers_ends = [], []
        for _ in ("work", "side"):
            end, workers_end = socket.socketpair()
            ends.append(ours.enter_context(end))
            workers_ends.append(theirs.enter_context(workers_end).fileno())
        # Without a name: nothing is left of it, whoever is killed.
        stderr = os.memfd_create("plimsoll-worker-stderr")
        ours.callback(os.close, stderr)
        append = theirs.enter_context(Path(f"/proc/self/fd/{stderr}").open("ab"))
        descriptors = (*workers_ends, *share.descriptors)
        process: subprocess.Popen[bytes] | Forked
        if template is not None:
            process = template.launch([str(end) for end in workers_ends], descriptors, append.fileno(), hidden)
        else:
            process = subprocess.Popen(
                [sys.executable, *boot(os.getpid(), *workers_ends)],
                stdin=subprocess.DEVNULL,
                stdout=append,
                stderr=append,
                pass_fds=descriptors,
                env={**os.environ, **hidden},
                # Ctrl-C is the host's to handle.
                start_new_session=True,
            )
        # Whatever fails from here on leaves no process behind.
        ours.callback(process.kill)
        work, side = ends
        launched = Channel(work), Channel(side), stderr, process, template
        ours.pop_all()
    return launched


def _failure(frame: Frame) -> Exception | None:
    """Give what failed in the worker, if it did. Raises TornMessage for what is neither an answer nor a failure."""
    if frame.kind is Kind.ANSWER:
        return None
    if frame.kind is not Kind.FAILURE:
        raise TornMessage(f"a {frame.kind.name} came for an answer")
    meta = frame.meta
    try:
        if meta["refused"]:
            refusal = _REFUSALS.get(meta["error"], BackendError)
            return refusal(meta["text"])
        shortage = None if meta["shortage"] is None else Shortage(meta["shortage"])
        return RuntimeFailure(ErrorKind(meta["kind"]), f"{meta['error']}: {meta['text']}", shortage)
    except (KeyError, TypeError, ValueError) as error:
        raise TornMessage(f"a failure without its reason came ({type(error).__name__}: {error})") from error


def _how(status: int) -> str:
    """Say how a process ended."""
    if status == STATUS_UNKNOWN:
        return "ended, and the process that it was forked from does not say how"
    if status >= 0:
        silent = " (it could not write: its host did not read)" if status == EXIT_HOST_SILENT else ""
        return f"ended with status {status}{silent}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
