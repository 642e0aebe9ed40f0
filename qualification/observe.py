"""What the tests look at in a subject: through its protocol, and in its processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qualification import leaks
from qualification.attribution import OPENED, kept, what_is_open
from qualification.gpu import Card
from qualification.sampling import Sampler
from qualification.stream import equivalent
from qualification.subject import STRATEGIES, Event, Subject


def counts(subject: Subject) -> Counter[str]:
    """Count the events by kind."""
    return Counter(event.kind for event in subject.events())


def told_since(subject: Subject, before: int) -> list[str]:
    """Give the kinds of the events that followed the first ``before``, in order."""
    return [event.kind for event in subject.events()[before:]]


def first_recovery(kinds: Sequence[str]) -> slice:
    """Say which events, by their kinds in order, are the first OOM up to and including the end of its recovery."""
    begin = kinds.index("oom_detected") if "oom_detected" in kinds else len(kinds)
    end = kinds.index("recovered", begin) + 1 if "recovered" in kinds[begin:] else len(kinds)
    return slice(begin, end)


def strategies(events: Sequence[Event]) -> list[str]:
    """Give the recovery strategies among events, in order, each run of the same one once."""
    order: list[str] = []
    for event in events:
        if event.kind in STRATEGIES and order[-1:] != [event.kind]:
            order.append(str(event.kind))
    return order


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.01) -> bool:
    """Wait for a condition, looking at it every so often; say whether it came true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(every_s)
    return True


def wait_for_event(subject: Subject, kind: str, more_than: int, timeout_s: float) -> bool:
    """Wait until the subject told of more than so many events of a kind; say whether it did in time."""
    return wait_until(lambda: counts(subject)[kind] > more_than, timeout_s)


def quiesce(subject: Subject, timeout_s: float = 60.0) -> None:
    """Bring the subject to rest: through its own ``quiesce`` where it has one, else by draining it."""
    own = getattr(subject, "quiesce", None)
    if own is not None:
        own()
    else:
        subject.drain(timeout_s)


def sampler_of(subject: Subject, card: Card | None, *, card_is_ours: bool) -> Sampler:
    """Make a sampler of a subject's processes, with the exact counters that it offers, and of the card it is on."""
    leaks.warm_up()
    return Sampler(
        subject.process_ids,
        workers_heap_bytes=getattr(subject, "workers_heap_bytes", None),
        card=card.uuid if card else None,
        card_is_ours=card_is_ours,
    )


def can_rest(subject: Subject) -> bool:
    """Whether the subject says of itself when it is at rest; else only the least of several readings is at rest."""
    return hasattr(subject, "quiesce")


@dataclass(frozen=True)
class Left:
    """How many more descriptors, threads and processes a subject has than before, and what they are."""

    counts: dict[str, int]
    names: str

    @property
    def total(self) -> int:
        """How many there are in all."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {kind}{'es' if kind == 'process' else 's'}" for kind, n in self.counts.items())
        return counts + (f": {self.names}" if self.total and self.names else "")


def left_behind(subject: Subject, before: Counter[str], within_s: float = 2.0) -> Left:
    """Say what a subject at rest has open that it did not have before: more of a kind, whatever it is called.

    What ends takes a moment to be gone, and what reads memory has a file open for one: it is looked again until nothing
    is left, for up to ``within_s``. What leaks stays.
    """
    left = Left({}, "")

    def nothing() -> bool:
        nonlocal left
        now = what_is_open(subject.process_ids())
        counts = {kind: max(0, _of_kind(now, kind) - _of_kind(before, kind)) for kind in OPENED}
        left = Left(counts, kept(now, before))
        return not left.total

    wait_until(nothing, within_s)
    return left


def _of_kind(opened: Counter[str], kind: str) -> int:
    return sum(count for name, count in opened.items() if name.startswith(kind))


def same_output(subject: Subject) -> Callable[[Any, Any], bool]:
    """Give the subject's own comparison of outputs, or equality."""
    return getattr(subject, "equivalent", equivalent)


def recovered(subject: Subject) -> npt.NDArray[np.float32] | None:
    """Give what a user could get back by hand, or None where the subject does not say."""
    own = getattr(subject, "recovered", None)
    return None if own is None else own()
