"""The ladder is climbed in order, outside the except block, within its bounds, and ends one way or the other."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from backends.cpu import Cpu
from backends.errors import ErrorKind, RuntimeFailure, Shortage
from protection.events import Event, EventKind, Events
from protection.ladder import Ladder, NotOurs, RecoveryFailed, Rung
from protection.metrics import Metrics
from protection.policy import RUNGS

MIB = 1 << 20
CLEAR, COLLECT, REDUCE = EventKind.CACHE_CLEAR, EventKind.GARBAGE_COLLECT, EventKind.REDUCE_BUFFER
RESTART, FALLBACK = EventKind.RESTART_WORKER, EventKind.CPU_FALLBACK
#: As CUDA says it. There is none here: what is proved is what the ladder does with the kind.
DEVICE_TEXT = "CUDA error: invalid argument"
LOST_TEXT = "CUDA error: no CUDA-capable device is detected"


class Climb:
    """A ladder and what was seen of it."""

    def __init__(self, rungs: list[Rung], **bounds: Any) -> None:
        self.events, self.metrics = Events(), Metrics()
        limits = {"max_attempts": 12, "deadline_s": 30.0, "errors_in_a_row": 3} | bounds
        self.ladder = Ladder(rungs, self.events, self.metrics, **limits)

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events.all()]


def _rung(kind: EventKind, act: Callable[[], str] = lambda: "done", **rest: Any) -> Rung:
    return Rung(kind, act, "answers are the same", **rest)


def _failing(times: int, error: Callable[[], Exception] = MemoryError) -> tuple[Callable[[], str], list[int]]:
    """Make work that fails so many times and then succeeds, and the list of its calls."""
    calls: list[int] = []

    def work() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error()
        return "answer"

    return work, calls


def _device_error() -> Exception:
    return RuntimeError(DEVICE_TEXT)


def test_a_rung_that_cannot_be_acted_on_gives_way_to_the_next() -> None:
    def refused() -> str:
        raise MemoryError

    work, calls = _failing(1)
    climb = Climb([_rung(RESTART, refused, repeats=True), _rung(FALLBACK, repeats=True)])
    assert climb.ladder.run(work) == "answer"
    assert len(calls) == 2 and climb.kinds()[-2:] == [FALLBACK, EventKind.RECOVERED], f"told: {climb.kinds()}"
    assert climb.ladder.rung_failures == 1, f"{climb.ladder.rung_failures} rungs failed"


def test_the_last_rung_gets_an_attempt_however_late_it_is() -> None:
    def slow() -> str:
        time.sleep(0.2)
        raise MemoryError

    work, _ = _failing(1)
    climb = Climb([_rung(RESTART, slow), _rung(COLLECT), _rung(FALLBACK)], deadline_s=0.1)
    assert climb.ladder.run(work) == "answer"
    assert COLLECT not in climb.kinds() and FALLBACK in climb.kinds(), f"told: {climb.kinds()}"


def test_work_that_succeeds_says_nothing() -> None:
    climb = Climb([_rung(CLEAR)])
    assert climb.ladder.run(lambda: 7) == 7, "the value is another"
    assert climb.kinds() == [], f"the user was told {climb.kinds()}"
    assert climb.metrics.all()["recoveries_attempted"] == 0, "a recovery was counted"


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_rungs_are_tried_in_order_and_no_further_than_needed(fails: int) -> None:
    climb = Climb([_rung(CLEAR), _rung(COLLECT), _rung(FALLBACK)])
    work, calls = _failing(fails)
    assert climb.ladder.run(work) == "answer", "the value is another"
    expected = [EventKind.OOM_DETECTED, *[CLEAR, COLLECT, FALLBACK][:fails], EventKind.RECOVERED]
    assert climb.kinds() == expected, f"after {fails} failures the user was told {climb.kinds()}"
    assert len(calls) == fails + 1, f"the work was tried {len(calls)} times"
    metrics = climb.metrics.all()
    assert metrics["oom_total"] == fails and metrics["oom_host_oom"] == fails, f"of {fails} OOMs: {metrics}"
    assert (metrics["recoveries_attempted"], metrics["recoveries_succeeded"]) == (1, 1), f"recoveries: {metrics}"


def test_a_genuine_error_of_the_runtime_climbs(bounded: Cpu) -> None:
    held = [bounded.allocate(16 * MIB) for _ in range(5)]

    def give_back() -> str:
        while held:
            held.pop().free()
        bounded.release_cached()
        return "given back"

    climb = Climb([_rung(CLEAR), _rung(COLLECT, give_back)])
    climb.ladder.run(lambda: bounded.allocate(40 * MIB).free())
    assert climb.kinds() == [EventKind.OOM_DETECTED, CLEAR, COLLECT, EventKind.RECOVERED], f"told: {climb.kinds()}"
    assert climb.metrics.all()["oom_device_oom"] == 2, f"the counts are {climb.metrics.all()}"


def test_a_rung_that_does_not_apply_is_not_tried() -> None:
    climb = Climb([_rung(CLEAR, not_now=lambda: "it is clear already"), _rung(COLLECT)])
    climb.ladder.run(_failing(1)[0])
    assert climb.kinds() == [EventKind.OOM_DETECTED, COLLECT, EventKind.RECOVERED], f"told: {climb.kinds()}"
    assert "cache_clear_attempts" not in climb.metrics.all(), f"the counts are {climb.metrics.all()}"


def test_a_rung_repeats_for_as_long_as_it_applies() -> None:
    batch = [16]

    def halve() -> str:
        batch[0] //= 2
        return f"{batch[0]}"

    def work() -> int:
        if batch[0] > 2:
            raise MemoryError
        return batch[0]

    reduce = _rung(REDUCE, halve, repeats=True, not_now=lambda: None if batch[0] > 1 else "one")
    climb = Climb([_rung(CLEAR), reduce, _rung(FALLBACK)])
    assert climb.ladder.run(work) == 2, f"the batch is {batch}"
    assert climb.kinds() == [EventKind.OOM_DETECTED, CLEAR, REDUCE, REDUCE, REDUCE, EventKind.RECOVERED], "the order"
    metrics = climb.metrics.all()
    assert (metrics["reduce_buffer_attempts"], metrics["reduce_buffer_successes"]) == (3, 1), f"by rung: {metrics}"


def test_attempts_are_bounded() -> None:
    climb = Climb([_rung(CLEAR, repeats=True)], max_attempts=5)
    work, calls = _failing(10**9)
    with pytest.raises(RecoveryFailed, match="MemoryError: no text, after 5 attempts in"):
        climb.ladder.run(work)
    assert len(calls) == 6, f"the work was tried {len(calls)} times: once, and 5 attempts"


def test_time_is_bounded() -> None:
    def slow() -> str:
        np.linalg.svd(np.random.RandomState(0).standard_normal((250, 250)))
        return "done"

    climb = Climb([_rung(CLEAR, slow, repeats=True)], max_attempts=10**9, deadline_s=0.3)
    began_s = time.perf_counter()
    with pytest.raises(RecoveryFailed, match="after"):
        climb.ladder.run(_failing(10**9)[0])
    took_s = time.perf_counter() - began_s
    assert 0.3 <= took_s < 30.0, f"a recovery of at most 0.3 s took {took_s:.2f} s"


def test_the_next_recovery_starts_from_the_first_rung() -> None:
    climb = Climb([_rung(CLEAR), _rung(COLLECT)])
    for _ in range(2):
        climb.ladder.run(_failing(2)[0])
    once = [EventKind.OOM_DETECTED, CLEAR, COLLECT, EventKind.RECOVERED]
    assert climb.kinds() == once * 2, f"two recoveries told {climb.kinds()}"


def test_the_retry_finds_the_memory_of_the_failed_attempt_released() -> None:
    buffers: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []

    class Buffer:
        """What only the failed attempt's frame refers to."""

        def __init__(self) -> None:
            self.samples = np.ones(MIB, np.uint8)

    def work() -> str:
        alive.append([ref() is not None for ref in buffers])
        buffer = Buffer()
        buffers.append(weakref.ref(buffer))
        if len(buffers) < 3:
            raise MemoryError
        return f"{buffer.samples[0]}"

    def act() -> str:
        alive.append([ref() is not None for ref in buffers])
        return "looked"

    Climb([_rung(CLEAR, act), _rung(COLLECT, act)]).ladder.run(work)
    assert not any(any(seen) for seen in alive), f"buffers of failed attempts that were still alive, by call: {alive}"


def test_a_rung_that_fails_itself_leads_to_the_next() -> None:
    def fails() -> str:
        raise MemoryError

    climb = Climb([_rung(CLEAR, fails), _rung(COLLECT)])
    work, calls = _failing(1)
    climb.ladder.run(work)
    told = [event.message for event in climb.events.all() if event.kind is CLEAR]
    assert told == ["cache_clear itself failed (MemoryError: no text)"], f"told of the rung: {told}"
    assert len(calls) == 2, f"the work was tried {len(calls)} times: not after a rung that failed"
    assert climb.metrics.all()["oom_total"] == 2, f"the rung's own OOM counts too: {climb.metrics.all()}"


def test_rungs_that_all_fail_end() -> None:
    def fails() -> str:
        raise MemoryError

    climb = Climb([_rung(kind, fails) for kind in (CLEAR, COLLECT, REDUCE, RESTART, FALLBACK)])
    with pytest.raises(RecoveryFailed, match="after 5 attempts"):
        climb.ladder.run(_failing(10**9)[0])
    metrics = climb.metrics.all()
    assert (metrics["recoveries_attempted"], metrics["recoveries_succeeded"]) == (1, 0), f"recoveries: {metrics}"


def test_without_rungs_it_ends_at_once() -> None:
    with pytest.raises(RecoveryFailed, match="after 0 attempts"):
        Climb([]).ladder.run(_failing(1)[0])


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("shapes"), OSError(28, "full")], ids=repr)
def test_an_error_that_is_not_ours_is_not_recovered_from(error: Exception) -> None:
    climb = Climb([_rung(CLEAR)])

    def work() -> None:
        raise error

    with pytest.raises(NotOurs, match=type(error).__name__):
        climb.ladder.run(work)
    assert climb.kinds() == [], f"the user was told {climb.kinds()}"


def test_an_error_that_is_not_ours_ends_a_recovery() -> None:
    climb = Climb([_rung(CLEAR), _rung(COLLECT)])
    errors: list[Exception] = [MemoryError(), ValueError("bad")]

    def work() -> None:
        raise errors.pop(0)

    with pytest.raises(NotOurs, match="ValueError: bad"):
        climb.ladder.run(work)
    assert climb.kinds() == [EventKind.OOM_DETECTED, CLEAR], f"told: {climb.kinds()}"


def test_an_interrupt_passes_through() -> None:
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Climb([_rung(CLEAR)]).ladder.run(work)


def test_three_device_errors_in_a_row_lead_straight_to_the_fallback() -> None:
    climb = Climb([_rung(CLEAR), _rung(COLLECT), _rung(REDUCE), _rung(RESTART), _rung(FALLBACK)])
    climb.ladder.run(_failing(3, _device_error)[0])
    expected = [EventKind.DEVICE_ERROR, CLEAR, COLLECT, FALLBACK, EventKind.RECOVERED]
    assert climb.kinds() == expected, f"three device errors in a row told {climb.kinds()}"
    assert climb.metrics.all()["device_errors_total"] == 3, f"the counts are {climb.metrics.all()}"


def test_a_device_that_is_lost_leads_straight_to_the_fallback() -> None:
    climb = Climb([_rung(CLEAR), _rung(COLLECT), _rung(REDUCE), _rung(RESTART, repeats=True), _rung(FALLBACK)])
    climb.ladder.run(_failing(1, lambda: RuntimeError(LOST_TEXT))[0])
    assert climb.kinds() == [EventKind.DEVICE_ERROR, FALLBACK, EventKind.RECOVERED], f"told: {climb.kinds()}"
    assert climb.metrics.all()["device_errors_total"] == 1, f"the counts are {climb.metrics.all()}"
    assert climb.ladder.errors_in_a_row == 0, f"after the success {climb.ladder.errors_in_a_row} are in a row"


def test_a_device_that_is_lost_in_a_recovery_ends_the_search_there() -> None:
    climb = Climb([_rung(CLEAR), _rung(COLLECT), _rung(RESTART, repeats=True), _rung(FALLBACK)])
    errors = [MemoryError(), RuntimeError(LOST_TEXT)]

    def work() -> str:
        if errors:
            raise errors.pop(0)
        return "answer"

    climb.ladder.run(work)
    assert climb.kinds() == [EventKind.OOM_DETECTED, CLEAR, FALLBACK, EventKind.RECOVERED], f"told: {climb.kinds()}"
    metrics = climb.metrics.all()
    assert (metrics["oom_total"], metrics["device_errors_total"]) == (1, 1), f"the counts are {metrics}"


def test_a_device_that_is_lost_where_no_fallback_applies_has_the_other_rungs() -> None:
    climb = Climb([_rung(CLEAR), _rung(RESTART), _rung(FALLBACK, not_now=lambda: "it is the fallback already")])
    climb.ladder.run(_failing(2, lambda: RuntimeError(LOST_TEXT))[0])
    assert climb.kinds() == [EventKind.DEVICE_ERROR, CLEAR, RESTART, EventKind.RECOVERED], f"told: {climb.kinds()}"


@pytest.mark.parametrize(
    ("shortage", "told"),
    [(Shortage.CAPPED, ": a limit refused ("), (Shortage.EXHAUSTED, ": nothing was left ("), (None, " (")],
)
def test_why_there_was_no_memory_is_told_where_it_is_known(shortage: Shortage | None, told: str) -> None:
    climb = Climb([_rung(CLEAR)])
    climb.ladder.run(_failing(1, lambda: RuntimeFailure(ErrorKind.DEVICE_OOM, "refused", shortage))[0])
    message = climb.events.all()[0].message
    assert message == f"the device ran out of memory{told}RuntimeFailure: refused)", f"told: {message}"


def test_a_success_in_between_resets_the_count_of_device_errors() -> None:
    climb = Climb([_rung(CLEAR), _rung(COLLECT), _rung(REDUCE), _rung(FALLBACK)])
    for _ in range(4):
        climb.ladder.run(_failing(2, _device_error)[0])
        climb.ladder.run(lambda: "fine")
    assert FALLBACK not in climb.kinds(), f"two errors, a success, two errors led to the fallback: {climb.kinds()}"
    assert climb.metrics.all()["device_errors_total"] == 8, f"the counts are {climb.metrics.all()}"


def test_work_that_succeeds_at_once_resets_the_count_too() -> None:
    climb = Climb([_rung(CLEAR)])
    with pytest.raises(RecoveryFailed):
        climb.ladder.run(_failing(2, _device_error)[0])
    climb.ladder.run(lambda: "fine")
    # The third error, but the first since the success: the rung before the fallback is tried.
    assert climb.ladder.run(_failing(1, _device_error)[0]) == "answer", "the value is another"


def test_an_out_of_memory_error_in_between_does_not_reset_the_count() -> None:
    errors = [_device_error(), _device_error(), MemoryError(), _device_error()]
    climb = Climb([_rung(CLEAR), _rung(COLLECT), _rung(REDUCE), _rung(RESTART), _rung(FALLBACK)])

    def work() -> str:
        if errors:
            raise errors.pop(0)
        return "answer"

    climb.ladder.run(work)
    expected = [EventKind.DEVICE_ERROR, CLEAR, COLLECT, REDUCE, FALLBACK, EventKind.RECOVERED]
    assert climb.kinds() == expected, f"told: {climb.kinds()}"


def test_every_event_says_what_happened_what_was_done_and_what_it_means() -> None:
    climb = Climb([_rung(CLEAR), _rung(COLLECT)])
    climb.ladder.run(_failing(2)[0])
    events: list[Event] = climb.events.all()
    empty = [e for e in events if not (e.message.strip() and e.action.strip() and e.meaning.strip())]
    assert len(events) == 4 and not empty, f"of {len(events)} events these leave something out: {empty}"


def test_the_rungs_are_kinds_of_events() -> None:
    kinds = {kind.value for kind in EventKind}
    assert set(RUNGS) <= kinds, f"rungs that cannot be told of: {set(RUNGS) - kinds}"


def test_a_listener_that_fails_does_not_stop_anything() -> None:
    heard: list[EventKind] = []

    def listener(event: Event) -> None:
        heard.append(event.kind)
        raise ValueError("a defect of the listener's")

    events = Events(listener)
    events.tell(CLEAR, "a", "b", "c")
    events.tell(COLLECT, "a", "b", "c")
    assert heard == [CLEAR, COLLECT] == [event.kind for event in events.all()], f"heard {heard}, kept {events.all()}"


def test_what_is_kept_of_events_is_bounded() -> None:
    events = Events()
    for k in range(10_050):
        events.tell(CLEAR, str(k), "b", "c")
    kept = events.all()
    assert len(kept) == 10_000 and kept[-1].message == "10049", f"{len(kept)} are kept, the last is {kept[-1].message}"
