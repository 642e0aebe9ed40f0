"""The ladder: what is tried, in which order, when memory runs out, and when to give up.

A rung is acted on and the work tried again *outside* the except block: inside it the traceback keeps the frames, and
so the buffers, of the failed attempt alive, and the retry fails for want of them. Attempts and time are bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from backends.errors import ErrorKind, Shortage, diagnose
from protection.events import EventKind, Events
from protection.metrics import Metrics

T = TypeVar("T")
_WHY = {Shortage.CAPPED: ": a limit refused", Shortage.EXHAUSTED: ": nothing was left", None: ""}


@dataclass(frozen=True)
class Rung:
    """One recovery strategy. ``not_now`` gives the reason why it does not apply, or None."""

    kind: EventKind
    act: Callable[[], str]
    meaning: str
    not_now: Callable[[], str | None] = lambda: None
    #: Whether it may be acted on again for as long as it applies.
    repeats: bool = False


@dataclass(frozen=True)
class Failure:
    """A failed attempt, without the exception: its frames would keep memory alive."""

    kind: ErrorKind
    text: str
    #: Why there was no memory, where the error tells.
    shortage: Shortage | None = None
    #: Whether it was the rung that failed, and not the work.
    of_rung: bool = False


class RecoveryFailed(Exception):
    """No rung helped. Nothing accepted is lost. ``kind`` is that of the last failure."""

    def __init__(self, kind: ErrorKind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class NotOurs(Exception):
    """The work failed for a reason that no rung can help: neither memory nor the device."""


@dataclass(frozen=True)
class _Done(Generic[T]):
    value: T


class Ladder:
    """The rungs of one pipeline, climbed by the thread that does its work."""

    def __init__(
        self,
        rungs: list[Rung],
        events: Events,
        metrics: Metrics,
        *,
        max_attempts: int,
        deadline_s: float,
        errors_in_a_row: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Climb ``rungs`` in order, with at most ``max_attempts`` tries in ``deadline_s`` seconds a recovery."""
        self._rungs = rungs
        self._events = events
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._deadline_s = deadline_s
        self._errors_in_a_row = errors_in_a_row
        self._stopped = stopped
        self._device_errors = 0
        #: Rungs that themselves failed in this recovery.
        self.rung_failures = 0

    def run(self, work: Callable[[], T]) -> T:
        """Do the work; climb until it succeeds. Raises RecoveryFailed when nothing helps, NotOurs for other errors."""
        outcome = self._attempt(work)
        if isinstance(outcome, Failure):
            return self._recover(work, outcome)
        self._device_errors = 0
        return outcome.value

    def progressed(self) -> None:
        """Take note that a part of the work succeeded: errors before it are not in a row with errors after it."""
        self._device_errors = 0

    @property
    def errors_in_a_row(self) -> int:
        """Device errors and lost workers since the last success."""
        return self._device_errors

    def _attempt(self, work: Callable[[], T]) -> _Done[T] | Failure:
        try:
            return _Done(work())
        except Exception as error:
            found = diagnose(error)
            text = f"{type(error).__name__}: {str(error)[-300:].strip() or 'no text'}"
            return Failure(found.kind, text, found.shortage)

    def _note(self, failure: Failure) -> None:
        if failure.kind.is_oom:
            self._metrics.add("oom_total")
            self._metrics.add(f"oom_{failure.kind.value}")
        elif failure.kind.is_device_error:
            # A device that is lost is as good as one that failed so often: another process would not find it either.
            lost = failure.kind is ErrorKind.DEVICE_LOST
            self._device_errors = max(self._device_errors + 1, self._errors_in_a_row if lost else 0)
            self._metrics.add("device_errors_total")
        elif failure.kind is ErrorKind.PROCESS_LOST:
            self._device_errors += 1
            self._metrics.add("workers_lost_total")

    def begin_fallen_back(self, kind: ErrorKind, text: str) -> None:
        """Take note of, and tell, what kept an engine from its device at the start."""
        failure = Failure(kind, text)
        self._note(failure)
        self._tell(failure)

    def _tell(self, failure: Failure) -> None:
        kind, what = {
            ErrorKind.DEVICE_OOM: (EventKind.OOM_DETECTED, "the device ran out of memory"),
            ErrorKind.HOST_OOM: (EventKind.OOM_DETECTED, "the host ran out of memory"),
            ErrorKind.PROCESS_LOST: (EventKind.WORKER_LOST, "the process that runs the model was lost"),
        }.get(failure.kind, (EventKind.DEVICE_ERROR, "the device reported an error"))
        self._events.tell(
            kind,
            f"{what}{_WHY[failure.shortage]} ({failure.text})",
            "recovery begins",
            "nothing is lost: the recording goes on and answers follow",
        )

    def _recover(self, work: Callable[[], T], failure: Failure) -> T:
        if failure.kind is ErrorKind.OTHER:
            raise NotOurs(failure.text)
        self._note(failure)
        self._metrics.add("recoveries_attempted")
        self._tell(failure)
        began_s = time.perf_counter()
        attempts = self.rung_failures = 0
        for place, rung in enumerate(self._rungs):
            tried = False
            while rung.not_now() is None and not self._skips(rung):
                if self._stopped() or attempts >= self._max_attempts:
                    raise self._give_up(failure, attempts, began_s)
                if time.perf_counter() - began_s > self._deadline_s and (tried or self._has_after(place)):
                    # Too late for this one. The last that there is gets one attempt, however late it is.
                    break
                attempts += 1
                tried = True
                outcome = self._climb(rung, work)
                if not isinstance(outcome, Failure):
                    latency_s = time.perf_counter() - began_s
                    self._device_errors = 0
                    self._metrics.add("recoveries_succeeded")
                    self._metrics.took("recovery", latency_s)
                    self._events.tell(
                        EventKind.RECOVERED,
                        f"the work succeeded after {rung.kind.value} ({attempts} attempts, {latency_s * 1e3:.0f} ms)",
                        "going on",
                        rung.meaning,
                    )
                    return outcome.value
                failure = outcome
                if failure.kind is ErrorKind.OTHER and not failure.of_rung:
                    raise NotOurs(failure.text)
                if not rung.repeats or (failure.of_rung and self._has_after(place)):
                    # What cannot even be acted on now is not insisted on while there is something else.
                    break
        raise self._give_up(failure, attempts, began_s)

    def _has_after(self, place: int) -> bool:
        """Whether a rung after this one applies."""
        return any(rung.not_now() is None for rung in self._rungs[place + 1 :])

    def _skips(self, rung: Rung) -> bool:
        """So many device errors in a row mean the fallback, if there is one, whatever else there would be to try."""
        if self._device_errors < self._errors_in_a_row or rung.kind is EventKind.CPU_FALLBACK:
            return False
        return any(each.kind is EventKind.CPU_FALLBACK and each.not_now() is None for each in self._rungs)

    def _climb(self, rung: Rung, work: Callable[[], T]) -> _Done[T] | Failure:
        """Act on one rung and try again. A failure of the rung itself is a failure like any other."""
        name = rung.kind.value
        began_s = time.perf_counter()
        self._metrics.add(f"{name}_attempts")
        acted = self._attempt(rung.act)
        if isinstance(acted, Failure):
            self.rung_failures += 1
            self._note(acted)
            self._events.tell(rung.kind, f"{name} itself failed ({acted.text})", "the next rung is tried", rung.meaning)
            self._metrics.took(name, time.perf_counter() - began_s)
            return replace(acted, of_rung=True)
        self._events.tell(rung.kind, "memory, the device or the worker failed", acted.value, rung.meaning)
        outcome = self._attempt(work)
        self._metrics.took(name, time.perf_counter() - began_s)
        if isinstance(outcome, Failure):
            self._note(outcome)
            if outcome.kind is ErrorKind.PROCESS_LOST:
                # Each is told: it was another process.
                lost = "the process that runs the model was lost again"
                self._events.tell(EventKind.WORKER_LOST, f"{lost} ({outcome.text})", "recovery goes on", rung.meaning)
        else:
            self._metrics.add(f"{name}_successes")
        return outcome

    def _give_up(self, failure: Failure, attempts: int, began_s: float) -> RecoveryFailed:
        self._metrics.took("recovery", time.perf_counter() - began_s)
        took_s = time.perf_counter() - began_s
        return RecoveryFailed(failure.kind, f"{failure.text}, after {attempts} attempts in {took_s:.1f} s")
