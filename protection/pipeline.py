"""The protected dictation pipeline: audio in, token scores out, and nothing accepted is ever lost.

One thread does the work (inference, recovery, results); one watches memory. ``feed`` only writes to the spool, so a
recording goes on whatever the device does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import backends
from backends.contract import Backend, BackendError, FloatArray, MemoryReading
from backends.errors import ErrorKind, RuntimeFailure, classify
from backends.host import host_memory
from backends.model import N_MELS, SAMPLE_RATE_HZ
from backends.threads import Thread
from protection.engine import Engine, InProcessEngine
from protection.events import Event, EventKind, Events
from protection.features import log_mel
from protection.ladder import Ladder, NotOurs, RecoveryFailed, Rung
from protection.metrics import Metrics
from protection.policy import Policy
from protection.pressure import Below, Level, Pressure
from protection.spool import AudioError, Result, Spool, SpoolError
from protection.worker_engine import WorkerEngine
from protection.worker_process import Deadlines, WorkerLost

_log = logging.getLogger("plimsoll.protection")

#: Two outputs are the same answer when every score agrees this far and every argmax is equal.
SCORE_TOLERANCE = 1e-3
_RETENTION_EVERY_S = 60.0
_STORAGE_BACKOFF_S = (0.1, 5.0)
_RETURN_DELAY_MOST_S = 30.0
_CLOSED_AT_MOST = 5
_RESTART_DELAY_MOST_S = 2.0
#: What a reading of the device's memory raises while the worker that has it is gone, stopped or just starting.
_NO_READING = (OSError, RuntimeFailure, BackendError)
_SAFE = "nothing is lost: everything accepted is in the spool"


class PipelineClosed(Exception):
    """The pipeline was shut down. What was accepted is in the spool; a new pipeline on the same folder resumes."""


class NotRecording(Exception):
    """Audio was fed while the recording is stopped: call ``toggle`` first."""


class ChunkKills(Exception):
    """A chunk, alone, took one worker after another with it."""


class Context(Protocol):
    """What ``factory`` is called with: the qualification's SubjectContext has this shape."""

    @property
    def workdir(self) -> Path:
        """Folder of the spool; with unfinished work in it, the work is resumed."""

    @property
    def backend(self) -> Backend | None:
        """The backend to use, or None for the first that is available."""

    @property
    def model_path(self) -> Path:
        """The acoustic model."""

    @property
    def policy(self) -> Mapping[str, Any]:
        """Options of ``Policy`` by name."""


def factory(context: Context) -> DictationPipeline:
    """Make the pipeline that ships: the subject of the qualification, unless another is named."""
    backend, owned = context.backend, context.backend is None
    if backend is None:
        for declared, availability in backends.available():
            if availability.available:
                backend = backends.create(declared.name)()
                break
        else:
            raise RuntimeError("no backend is available: install one of its runtimes")
    policy = Policy.from_options(context.policy)
    return DictationPipeline(context.workdir, make_engine(backend, context.model_path, policy, owned), policy)


def make_engine(backend: Backend, model_path: Path, policy: Policy, owns_backend: bool = False) -> Engine:
    """Make the engine that the policy asks for. Raises ModelError, or what the runtime raises without memory."""
    if policy.engine == "in_process":
        return InProcessEngine(backend, model_path, owns_backend=owns_backend)
    deadlines = Deadlines(policy.start_deadline_s, policy.infer_deadline_s, policy.heartbeat_s)
    return WorkerEngine(
        *(backend, model_path),
        owns_backend=owns_backend,
        deadlines=deadlines,
        standby=policy.standby,
        fork_workers=policy.fork_workers,
    )


class DictationPipeline:
    """Takes float32 mono audio at 16 kHz and answers every second of it with token scores."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        policy: Policy | None = None,
        *,
        sample_rate_hz: int = SAMPLE_RATE_HZ,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """Open the spool in ``folder`` and start working on what is unanswered in it. Owns the engine from here on.

        Raises AudioError for another sample rate than the model's, SpoolBusy, SpoolError.
        """
        self._engine = engine
        self._policy = policy or Policy()
        try:
            self._events = Events(on_event)
            self._metrics = Metrics()
            if isinstance(sample_rate_hz, bool) or not isinstance(sample_rate_hz, int):
                raise AudioError(f"the sample rate is {sample_rate_hz!r}: expected a whole number of Hz")
            if sample_rate_hz != SAMPLE_RATE_HZ:
                raise AudioError(
                    f"the sample rate is {sample_rate_hz} Hz, the model needs {SAMPLE_RATE_HZ}: resample first"
                )
            self._worker = Thread(self._work, "plimsoll-work")
            self._watcher = Thread(self._watch, "plimsoll-pressure")
            self._spool = Spool(folder, sample_rate_hz, self._policy.spool_limit_bytes)
        except BaseException:
            engine.close()
            raise
        try:
            self._begin()
        except BaseException:
            # Whatever it was, want of memory for instance: the next attempt finds the spool free, and no worker.
            self._end_at_start()
            raise

    def _begin(self) -> None:
        engine = self._engine
        self._recording = True
        #: Whether the last block was refused for want of storage, and whether one was accepted since.
        self._refusing = self._storage_back = False
        self._flush_to = 0
        self._closed = False
        self._shut_down: str | None = None
        self._batch = self._policy.max_batch
        self._good_batches = 0
        #: First sample of the chunk that failed last, alone, for a reason that is not memory, and how often in a row.
        self._failing = (-1, 0)
        #: Whether this recovery has replaced the worker already, has fallen back, and has replaced the fallback's.
        self._replaced = self._fell_back = self._renewed = False
        self._worked_s = time.monotonic()
        self._unloaded = False
        self._device_pressure, self._host_pressure = Pressure(self._policy), Pressure(self._policy)
        self._may_return = Below(self._policy.return_below, self._policy.return_after_s)
        self._return_wanted = False
        self._relieved: dict[str, Level] = {"device": Level.NORMAL, "host": Level.NORMAL}
        self._wake = threading.Condition()
        #: Chunks in the part that is being computed.
        self._in_hand = 1
        self._return_delay_s = self._policy.return_after_s
        self._return_not_before_s = 0.0
        #: Whether the device failed for another reason than memory, and has not proved itself since.
        self._distrusted = False
        self._ladder = self._make_ladder()
        if engine.degraded:
            failure = engine.start_failure
            if failure is not None:
                self._ladder.begin_fallen_back(failure.kind, f"at the start: {failure.text}")
                self._ladder.progressed()
            self._metrics.add("fallbacks")
            self._events.tell(
                EventKind.CPU_FALLBACK,
                "the device could not take the model at the start",
                f"inference begins on {engine.device}",
                "answers are slower until the device takes it",
            )
        self._worker.start()
        self._watcher.start()

    def _end_at_start(self) -> None:
        self._shut_down = "it could not be started"
        try:
            self._spool.close()
        finally:
            if self._worker.is_alive():
                # It closes the engine on its way out.
                with self._wake:
                    self._wake.notify_all()
                self._worker.join(self._policy.shutdown_deadline_s)
            else:
                self._close_engine()

    # The subject protocol.

    def feed(self, start: int, block: npt.NDArray[np.float32]) -> int:
        """Take float32 [samples] from position ``start``; return how many samples are durably accepted.

        Idempotent by position. Raises AudioError for what is not such a block, NotRecording, PipelineClosed,
        SpoolFull, SpoolError; then nothing of the block was accepted.
        """
        self._check_open()
        if not self._recording:
            raise NotRecording("the recording is stopped: call toggle() to start it before feeding audio")
        first, samples = _checked_start(start), _checked(block)
        try:
            accepted = self._spool.append(first, samples)
        except SpoolError as error:
            if not self._refusing:
                # Once, and not for each block of a recorder that feeds it again and again.
                self._refusing = True
                self._events.tell(EventKind.STORAGE_FAILED, str(error), "audio is not accepted", _SAFE)
            raise
        with self._wake:
            # What could not be stored before is tried again at once.
            self._storage_back |= self._refusing
            self._refusing = False
            self._wake.notify_all()
        return accepted

    def drain(self, timeout_s: float) -> None:
        """Wait until every accepted sample is answered. Raises TimeoutError, PipelineClosed."""
        deadline_s = time.monotonic() + timeout_s
        with self._wake:
            target = self._spool.accepted
            self._flush_to = max(self._flush_to, target)
            self._wake.notify_all()
            while self._spool.answered < target:
                self._check_open()
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(
                        f"{target - self._spool.answered} of {target} samples are unanswered after {timeout_s} s"
                    )
                self._wake.wait(min(left_s, 0.5))

    def results(self) -> Sequence[Result]:
        """Give every result so far, by position."""
        return self._spool.results()

    def toggle(self) -> bool:
        """Stop or start the recording; say whether it records now. Stopping answers what was accepted."""
        self._check_open()
        with self._wake:
            self._recording = not self._recording
            if not self._recording:
                self._flush_to = max(self._flush_to, self._spool.accepted)
            self._wake.notify_all()
            return self._recording

    def device(self) -> str:
        """Say where the next result would be made."""
        return self._engine.device

    def process_ids(self) -> Sequence[int]:
        """Give the processes that belong to the pipeline."""
        return self._engine.process_ids()

    def events(self) -> Sequence[Event]:
        """Give what the user was told, in order."""
        return self._events.all()

    def metrics(self) -> Mapping[str, float]:
        """Give counters, and latencies in seconds."""
        return self._metrics.all()

    def shutdown(self, reason: str) -> None:
        """End in order: what is accepted stays in the spool. A second call does nothing."""
        with self._wake:
            if self._shut_down is None:
                self._shut_down = reason
            self._wake.notify_all()
        for thread in (self._worker, self._watcher):
            if thread is not threading.current_thread():
                thread.join(self._policy.shutdown_deadline_s)
        if self._worker is not threading.current_thread() and self._worker.is_alive():
            # A worker process that hangs is not waited for.
            self._engine.cancel()
            self._worker.join(1.0)

    def close(self) -> None:
        """Give everything back. What is unanswered is answered by the next pipeline on the same folder.

        A second call does nothing, unless the first was cut short, by want of memory for instance.
        """
        if self._closed:
            return
        try:
            self.shutdown("closed")
            if self._worker.is_alive():
                # Still inside the runtime: the engine cannot be taken away from under it. It closes it on its way out.
                _log.warning("the work did not end within %s s: it ends later", self._policy.shutdown_deadline_s)
        finally:
            self._spool.close()
        self._closed = True

    def quiesce(self) -> None:
        """Answer everything and give cached memory back: the state in which memory is compared."""
        self.drain(self._policy.recovery_deadline_s)
        with contextlib.suppress(OSError):
            # A worker that is gone or stopped keeps nothing that could be waited for.
            self._engine.release_cached()

    def workers_heap_bytes(self) -> int:
        """Read what the workers have taken from their heaps and not freed: the exact counter beside their memory."""
        return self._engine.workers_heap_bytes()

    def recovered(self) -> FloatArray:
        """Give the audio that a user could get back by hand: float32 from the first sample still kept."""
        return self._spool.read(self._spool.kept_from, self._spool.accepted)

    def export_wav(self, path: Path) -> int:
        """Write what was accepted as a 16-bit WAV; return the number of samples."""
        return self._spool.export_wav(path)

    @staticmethod
    def equivalent(a: FloatArray | None, b: FloatArray | None) -> bool:
        """Whether two outputs are the same answer: scores within 1e-3, every argmax equal."""
        if a is None or b is None:
            return a is b
        return bool(
            a.shape == b.shape
            and np.max(np.abs(a - b), initial=0.0) <= SCORE_TOLERANCE
            and np.array_equal(a.argmax(-1), b.argmax(-1))
        )

    def __enter__(self) -> DictationPipeline:
        """Nothing to do: the pipeline runs already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # Work.

    def _check_open(self) -> None:
        if self._shut_down is not None:
            raise PipelineClosed(
                f"the pipeline was shut down ({self._shut_down}); the {self._spool.accepted} samples accepted are in "
                f"{self._spool.path}: open a new pipeline on that folder to go on"
            )

    def _work(self) -> None:
        try:
            while not self._is_shut_down():
                try:
                    self._work_on()
                except Exception:
                    # Not even telling of a failure worked: memory is that short. A sleep needs none.
                    time.sleep(_STORAGE_BACKOFF_S[0])
        finally:
            # Here, and so never under an inference; and at once after an emergency, when memory is what is short.
            self._close_engine()

    def _close_engine(self) -> None:
        for _ in range(_CLOSED_AT_MOST):
            try:
                self._engine.close()
                return
            except Exception:
                # What there was no memory for now, there may be in a moment.
                with contextlib.suppress(Exception):
                    _log.warning("the engine could not be closed yet", exc_info=True)
                time.sleep(_STORAGE_BACKOFF_S[0])
        _log.error("the engine could not be closed: its workers end with this process")

    def _work_on(self) -> None:
        backoff_s = _STORAGE_BACKOFF_S[0]
        forget_at_s = 0.0
        while not self._is_shut_down():
            try:
                self._relieve()
                self._consider_return()
                if self._policy.retention_s is not None and time.monotonic() >= forget_at_s:
                    self._spool.forget(self._policy.retention_s, self._engine.spec.context_samples)
                    forget_at_s = time.monotonic() + _RETENTION_EVERY_S
                chunks = [] if self._is_shut_down() else self._next_chunks()
                self._consider_unloading(bool(chunks))
                if chunks:
                    self._spool.answer(self._compute(chunks))
                    with self._wake:
                        self._wake.notify_all()
                backoff_s = _STORAGE_BACKOFF_S[0]
            except RecoveryFailed as error:
                if not self._is_shut_down():
                    memory = error.kind.is_oom
                    kind = EventKind.PRESSURE_EMERGENCY if memory else EventKind.DEVICE_ERROR
                    self._emergency(f"no rung of the ladder helped: {error}", kind)
            except Exception as error:
                if self._is_shut_down():
                    break
                # The spool, or host memory outside the engine. Nothing is answered twice: answering is one transaction.
                oom = classify(error).is_oom
                if oom:
                    self._metrics.add("oom_total")
                self._events.tell(
                    EventKind.OOM_DETECTED if oom else EventKind.STORAGE_FAILED,
                    f"{type(error).__name__}: {error}",
                    f"trying again in {backoff_s:.1f} s",
                    "what was accepted is safe; answers are late",
                )
                with self._wake:
                    self._wake.wait_for(lambda: self._is_shut_down() or self._storage_back, backoff_s)
                    self._storage_back = False
                backoff_s = min(backoff_s * 2, _STORAGE_BACKOFF_S[1])
                continue
            with self._wake:
                if not self._is_shut_down() and not self._has_work():
                    self._wake.wait(self._policy.pressure_interval_s)

    def _is_shut_down(self) -> bool:
        return self._shut_down is not None

    def _has_work(self) -> bool:
        unanswered = self._spool.accepted - self._spool.answered
        return unanswered >= self._engine.spec.chunk_samples or self._flush_to > self._spool.answered

    def _next_chunks(self) -> list[tuple[int, int]]:
        """Cut what is unanswered into chunks; a short one only where the recording was stopped or drained."""
        size = self._engine.spec.chunk_samples
        start, accepted, flush_to = self._spool.answered, self._spool.accepted, self._flush_to
        chunks: list[tuple[int, int]] = []
        while len(chunks) < self._policy.max_batch:
            # A chunk does not reach over the place where the recording was stopped.
            stop = min(start + size, flush_to if flush_to > start else accepted)
            if stop == start or (stop - start < size and stop != flush_to):
                break
            chunks.append((start, stop))
            start = stop
        return chunks

    def _compute(self, chunks: list[tuple[int, int]]) -> list[Result]:
        features = np.empty((len(chunks), self._engine.spec.window_frames, N_MELS), np.float32)
        for i, (start, stop) in enumerate(chunks):
            features[i] = self._features(start, stop)
        made: list[tuple[FloatArray, str, bool]] = []

        def work() -> None:
            # What is done stays done when a later part fails and is tried again.
            while len(made) < len(chunks):
                part = features[len(made) : len(made) + self._batch]
                self._in_hand = len(part)
                try:
                    scores = self._engine.infer(part)
                    if not np.isfinite(scores).all():
                        raise ValueError("the model gave scores that are not finite")
                except Exception as error:
                    self._note_failure(error, chunks[len(made)][0])
                    raise
                device, degraded = self._engine.device, self._engine.degraded
                made.extend((row, device, degraded) for row in scores)
                self._ladder.progressed()
                self._replaced = self._fell_back = self._renewed = False

        self._replaced = self._fell_back = self._renewed = False
        try:
            self._ladder.run(work)
        except NotOurs as error:
            return self._set_aside(chunks, made, str(error))
        self._grow()
        self._metrics.add("chunks_answered", len(chunks))
        return self._as_results(chunks, made)

    def _note_failure(self, error: Exception, start: int) -> None:
        """Count what may be the chunk's own fault. Raises ChunkKills once it has killed workers often enough."""
        kind = classify(error)
        if isinstance(error, WorkerLost):
            self._metrics.add(f"workers_lost_{error.cause.replace(' ', '_')}")
            if error.at_start:
                return
        if kind not in (ErrorKind.PROCESS_LOST, ErrorKind.OTHER):
            return
        if self._in_hand > 1:
            # One at a time from here on: which of them it was is not known.
            self._batch, self._good_batches = 1, 0
            return
        self._failing = (start, self._failing[1] + 1 if self._failing[0] == start else 1)
        # One that the device dies of may have an answer on the fallback: the ladder comes to that first.
        last = self._engine.degraded or "cpu_fallback" not in self._policy.rungs
        if kind is ErrorKind.PROCESS_LOST and last and self._failing[1] >= self._policy.attempts_per_chunk:
            self._metrics.add("workers_lost_total")
            raise ChunkKills(str(error)) from None

    def _features(self, start: int, stop: int) -> FloatArray:
        """Make float32 [window_frames, 80] of a chunk and its left context; a short chunk ends in silence."""
        spec = self._engine.spec
        samples = np.zeros(spec.context_samples + spec.chunk_samples, np.float32)
        samples[: spec.context_samples + stop - start] = self._window(start, stop)
        return log_mel(samples)

    def _window(self, start: int, stop: int) -> FloatArray:
        """Read a chunk and its left context; what the retention rule deleted before the context counts as silence."""
        first = max(start - self._engine.spec.context_samples, self._spool.kept_from)
        samples = np.zeros(self._engine.spec.context_samples + stop - start, np.float32)
        read = self._spool.read(first, stop)
        samples[len(samples) - len(read) :] = read
        return samples

    def _as_results(self, chunks: list[tuple[int, int]], made: list[tuple[FloatArray, str, bool]]) -> list[Result]:
        rows_of = self._engine.spec.chunk_scores
        per_row = self._engine.spec.chunk_samples // rows_of
        results = []
        for (start, stop), (scores, device, degraded) in zip(chunks, made, strict=False):
            # A short chunk was padded with silence, which is not answered for.
            rows = min(rows_of, -(-(stop - start) // per_row))
            results.append(Result(start, stop, scores[:rows], device, degraded))
        return results

    def _set_aside(
        self, chunks: list[tuple[int, int]], made: list[tuple[FloatArray, str, bool]], why: str
    ) -> list[Result]:
        """Answer what could be computed; a chunk that fails again and again, alone, gets a declared failure.

        Raises RecoveryFailed when it is not the chunk: then nothing is set aside, and all is answered after a restart.
        """
        results = self._as_results(chunks, made)
        # Alone next time: one bad chunk must not take its neighbours with it.
        self._batch, self._good_batches = 1, 0
        start, stop = chunks[len(made)]
        failed, times = self._failing
        if failed != start or times < self._policy.attempts_per_chunk:
            return results
        self._failing = (-1, 0)
        if not self._engine_is_sound():
            # It was not the chunk; it is computed again where the engine is now.
            return results
        results.append(Result(start, stop, None, self._engine.device, True))
        self._metrics.add("chunks_set_aside")
        self._events.tell(
            EventKind.CHUNK_SET_ASIDE,
            f"samples [{start}, {stop}) failed {times} times ({why})",
            "they were set aside",
            "this part has no answer; its audio is kept and can be exported",
        )
        return results

    def _engine_is_sound(self) -> bool:
        """Whether the engine computes a window of silence as it is; where it does not, climb until it does.

        Raises RecoveryFailed when it never does.
        """
        spec = self._engine.spec
        silence = log_mel(np.zeros(spec.context_samples + spec.chunk_samples, np.float32))[None]
        sound = True

        def work() -> None:
            nonlocal sound
            try:
                self._engine.infer(silence)
            except Exception as error:
                sound = False
                if classify(error) is not ErrorKind.OTHER:
                    raise
                text = f"the engine fails on silence too ({type(error).__name__}: {error})"
                raise RuntimeFailure(ErrorKind.DEVICE_ERROR, text) from None

        self._in_hand = 1
        self._replaced = False
        self._ladder.run(work)
        return sound

    # Recovery.

    def _make_ladder(self) -> Ladder:
        def rung(kind: EventKind, act: Callable[[], str], meaning: str, **rest: Any) -> Rung:
            return Rung(kind, act, meaning, **rest)

        same = "answers are the same as before"

        def lost() -> str | None:
            return "the worker is gone: only another one helps" if self._engine.lost else None

        def no_smaller_batch() -> str | None:
            one = "the batch is one chunk already"
            return lost() or (None if min(self._batch, self._in_hand) > 1 else one)

        def no_restart() -> str | None:
            if not self._engine.can_restart:
                return "inference has no process of its own"
            # A new worker that runs out of memory as well is not replaced again; one that dies is.
            return "the worker is new already" if self._replaced and not self._engine.lost else None

        def no_fallback() -> str | None:
            if not self._engine.degraded or self._engine.lost:
                return None
            # One refusal there is not the end: its process is replaced, once.
            new = self._renewed or (self._replaced and not self._fell_back)
            again = self._engine.can_restart and not new
            return None if again else "the fallback is in use already"

        rungs = [
            rung(EventKind.CACHE_CLEAR, self._clear_cache, same, not_now=lost),
            rung(EventKind.GARBAGE_COLLECT, self._collect, same, not_now=lost),
            rung(
                EventKind.REDUCE_BUFFER,
                self._reduce,
                "answers are the same, in smaller batches",
                not_now=no_smaller_batch,
                repeats=True,
            ),
            rung(EventKind.RESTART_WORKER, self._restart, same, not_now=no_restart, repeats=True),
            rung(
                EventKind.CPU_FALLBACK,
                self._fall_back,
                "answers go on, more slowly, until the device has memory again",
                not_now=no_fallback,
                # A fallback that could not be loaded may be a moment later.
                repeats=True,
            ),
        ]
        return Ladder(
            [each for each in rungs if each.kind.value in self._policy.rungs],
            self._events,
            self._metrics,
            max_attempts=self._policy.max_attempts,
            deadline_s=self._policy.recovery_deadline_s,
            errors_in_a_row=self._policy.device_errors_in_a_row,
            stopped=self._is_shut_down,
        )

    def _clear_cache(self) -> str:
        self._engine.release_cached()
        return "cached memory was given back"

    def _collect(self) -> str:
        found = self._engine.collect()
        self._engine.release_cached()
        return f"{found} unreachable objects were collected"

    def _reduce(self) -> str:
        before = self._batch
        self._batch = max(1, min(self._batch, max(self._in_hand, 2)) // 2)
        self._good_batches = 0
        self._engine.release_cached()
        return f"the batch was reduced from {before} to {self._batch} chunks"

    def _restart(self) -> str:
        self._replaced = True
        self._back_off()
        self._engine.restart()
        return "the worker was replaced"

    def _back_off(self) -> None:
        """Wait before the next worker is started, longer with each that was lost, or could not be had, in a row."""
        again = max(self._ladder.rung_failures, self._ladder.errors_in_a_row - 1 if self._engine.lost else 0)
        if again > 0:
            delay_s = self._policy.restart_backoff_s * 2.0 ** (again - 1)
            with self._wake:
                self._wake.wait_for(self._is_shut_down, min(delay_s, _RESTART_DELAY_MOST_S))

    def _fall_back(self) -> str:
        before = self._engine.device
        self._back_off()
        if self._engine.degraded and not self._engine.lost:
            self._renewed = True
            self._engine.restart()
            return "the fallback's worker was replaced"
        self._engine.fall_back()
        self._fell_back = True
        if self._ladder.errors_in_a_row:
            # It was not memory: a device that passes its trial and fails at work is not asked again and again.
            self._distrusted = True
            self._return_later()
        self._may_return.reset()
        self._metrics.add("fallbacks")
        return f"inference moved from {before} to {self._engine.device}"

    def _grow(self) -> None:
        """Double a reduced batch again after enough good ones, while nothing presses."""
        self._good_batches += 1
        if self._good_batches >= self._policy.batches_before_growth and not self._engine.degraded:
            self._distrusted = False
        pressed = max(self._device_pressure.level, self._host_pressure.level) > Level.NORMAL
        if self._batch < self._policy.max_batch and self._good_batches >= self._policy.batches_before_growth:
            self._good_batches = 0
            if not pressed:
                self._batch = min(self._batch * 2, self._policy.max_batch)

    def _emergency(self, why: str, kind: EventKind = EventKind.PRESSURE_EMERGENCY) -> None:
        if "emergency_shutdown" not in self._policy.rungs:
            # Not allowed to stop: it tries again, and the recording goes on.
            self._events.tell(kind, why, "waiting, and trying again", f"answers are late; {_SAFE}")
            with self._wake:
                self._wake.wait_for(self._is_shut_down, 1.0)
            return
        self._metrics.add("emergency_shutdowns")
        self._events.tell(
            EventKind.EMERGENCY_SHUTDOWN,
            why,
            f"the recording was stopped after {self._spool.accepted} samples",
            f"{_SAFE}; start again on the same folder to get the remaining answers",
        )
        with self._wake:
            self._shut_down = f"emergency shutdown: {why}"
            self._wake.notify_all()

    # Pressure.

    def _watch(self) -> None:
        """Read both memories again and again; the working thread acts on what is found."""
        while not self._is_shut_down():
            try:
                self._watch_on()
            except Exception:
                # Not even waiting worked: memory is that short, and that is when it has to be watched.
                with contextlib.suppress(Exception):
                    _log.debug("watching memory failed", exc_info=True)
                time.sleep(self._policy.pressure_interval_s)

    def _watch_on(self) -> None:
        while self._shut_down is None:
            for pressure, read in (
                (self._host_pressure, host_memory),
                (self._device_pressure, self._engine.device_memory),
            ):
                try:
                    fraction = read().fraction
                except Exception:
                    # Under real pressure even reading can fail, and so it does without a worker: the next one is soon.
                    _log.debug("a memory reading failed", exc_info=True)
                    continue
                with self._wake:
                    before, level = pressure.level, pressure.update(fraction)
                    if pressure is self._device_pressure:
                        degraded = self._engine.degraded
                        self._return_wanted = degraded and self._may_return.update(fraction, time.monotonic())
                    if before != level or self._return_wanted:
                        self._wake.notify_all()
            with self._wake:
                if self._shut_down is None:
                    self._wake.wait_for(lambda: self._shut_down is not None, self._policy.pressure_interval_s)

    def _relieve(self) -> None:
        """Act once on each level that was newly reached, and tell when it is over."""
        readings: tuple[tuple[str, Pressure, Callable[[], MemoryReading]], ...] = (
            ("device", self._device_pressure, self._engine.device_memory),
            ("host", self._host_pressure, host_memory),
        )
        for name, pressure, read in readings:
            before = self._relieved[name]
            if pressure.level == before:
                continue
            # Read again: what was seen may have been over within one inference, and a fallback is not free.
            level = self._read_again(pressure, read)
            self._relieved[name] = level
            if level == before:
                continue
            share = f"{pressure.fraction:.0%} of the {name}'s memory is in use"
            if level < before:
                if level is Level.NORMAL:
                    self._events.tell(EventKind.PRESSURE_NORMAL, share, "nothing", "the pressure is over")
                continue
            if name == "device" and self._engine.degraded and level >= Level.EMERGENCY:
                # Others fill the device, and this pipeline has left it already.
                continue
            for step in range(before + 1, level + 1):
                if step == Level.SHUTDOWN and step > self._read_again(pressure, read):
                    # What was done before was enough.
                    break
                self._relieve_level(Level(step), name, share)
                if self._is_shut_down():
                    return

    def _read_again(self, pressure: Pressure, read: Callable[[], MemoryReading]) -> Level:
        try:
            fraction = read().fraction
        except _NO_READING:
            return pressure.level
        with self._wake:
            return pressure.update(fraction)

    def _relieve_level(self, level: Level, name: str, share: str) -> None:
        fallback_helps = name == "device" and "cpu_fallback" in self._policy.rungs
        if level is Level.SHUTDOWN:
            if not (name == "device" and self._engine.degraded):
                self._emergency(f"{share}, above the {self._policy.shutdown:.0%} at which recording stops in order")
            return
        kind, rung, act = {
            Level.WARNING: (EventKind.PRESSURE_WARNING, EventKind.CACHE_CLEAR, self._clear_cache),
            Level.CRITICAL: (EventKind.PRESSURE_CRITICAL, EventKind.REDUCE_BUFFER, self._reduce),
            # The fallback lives in host memory: when that is short, moving there would make it worse.
            Level.EMERGENCY: (
                (EventKind.PRESSURE_EMERGENCY, EventKind.CPU_FALLBACK, self._fall_back)
                if fallback_helps
                else (EventKind.PRESSURE_EMERGENCY, EventKind.GARBAGE_COLLECT, self._collect)
            ),
        }[level]
        if rung.value not in self._policy.rungs:
            self._events.tell(kind, share, "nothing: the policy does not allow it", _SAFE)
            return
        self._events.tell(kind, share, f"{rung.value} follows", _SAFE)
        try:
            done = act()
        except Exception as error:
            if classify(error).is_oom:
                self._metrics.add("oom_total")
            done = f"{rung.value} failed ({type(error).__name__}: {str(error)[-200:]})"
        self._events.tell(rung, share, done, "answers may be slower" if rung is EventKind.CPU_FALLBACK else _SAFE)

    def _consider_unloading(self, at_work: bool) -> None:
        """Give the model's memory back after so long without work."""
        if at_work:
            self._worked_s, self._unloaded = time.monotonic(), False
            return
        idle_s = self._policy.unload_after_idle_s
        if idle_s is not None and not self._unloaded and time.monotonic() - self._worked_s >= idle_s:
            self._engine.unload()
            self._unloaded = True
            self._metrics.add("unloads")

    def _return_later(self) -> None:
        self._return_not_before_s = time.monotonic() + self._return_delay_s
        self._return_delay_s = min(2 * self._return_delay_s, _RETURN_DELAY_MOST_S)

    def _consider_return(self) -> None:
        if not (self._return_wanted and self._engine.degraded) or self._unloaded:
            return
        self._return_wanted = False
        self._may_return.reset()
        if time.monotonic() < self._return_not_before_s:
            return
        try:
            returned = self._engine.return_to_device()
        except Exception as error:
            returned = False
            if classify(error).is_oom:
                self._metrics.add("oom_total")
            _log.info("the return to the device failed: %s", error)
        if not returned:
            # A device without room for one chunk is not asked again and again.
            self._metrics.add("returns_failed")
            self._return_later()
            return
        if not self._distrusted:
            self._return_delay_s = self._policy.return_after_s
        self._batch, self._good_batches = self._policy.max_batch, 0
        self._metrics.add("returns_to_device")
        self._events.tell(
            EventKind.RETURNED_TO_DEVICE,
            f"device memory has been below {self._policy.return_below:.0%} for {self._policy.return_after_s} s",
            f"inference moved back to {self._engine.device}",
            "answers are as fast as before",
        )


def _checked_start(start: int) -> int:
    if isinstance(start, bool) or not isinstance(start, int | np.integer):
        raise AudioError(f"the block's first sample is {start!r}: expected a whole number of samples from 0 on")
    if start < 0:
        raise AudioError(f"the block starts at sample {start}: expected 0 or more")
    return int(start)


def _checked(block: npt.NDArray[np.float32]) -> FloatArray:
    """Refuse what is not float32 mono audio, finite throughout."""
    if not isinstance(block, np.ndarray):
        raise AudioError(f"the block is a {type(block).__name__}: expected a NumPy array of float32 samples")
    if block.dtype != np.float32:
        raise AudioError(f"the block has dtype {block.dtype}: expected float32 (16-bit audio: samples / 32768)")
    if block.ndim != 1:
        raise AudioError(f"the block has shape {list(block.shape)}: expected one channel, shape [samples]")
    if not np.isfinite(block).all():
        bad = int(np.flatnonzero(~np.isfinite(block))[0])
        raise AudioError(f"the block has {block[bad]} at index {bad}: expected finite samples")
    return block


__all__ = [
    "AudioError",
    "DictationPipeline",
    "NotRecording",
    "PipelineClosed",
    "SpoolError",
    "factory",
]
