"""A thread begins or says that it cannot; whoever waits for one is told, also when memory fails in between."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.threads import OneThread, Thread
from tests.unit.waiting import WITHIN_S, until

InChild = Callable[[str], Any]
#: Well below the patience of backends.threads with a thread that is gone: what takes longer has waited that out.
SLOW_S = 10.0


@pytest.fixture
def one() -> Iterator[OneThread]:
    made = OneThread("the-one")
    yield made
    made.close()


def _comm(thread: int) -> str:
    """Give the name by which the kernel knows a thread of this process."""
    return Path(f"/proc/self/task/{thread}/comm").read_text().rstrip("\n")


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


# Tries `act` with request 1, 2, 3 … refused, alone and with all that follow, until none is; says what came of each.
SWEEP = """
import json, threading, time
from pathlib import Path
from backends.contract import FaultPlan, Site
from backends.faults.interposer import Control
from backends.threads import OneThread, Thread

control = Control.attached()


def sweep(ready, act):
    found = []
    for times in (1, None):
        for nth in range(1, 2000):
            made = ready()
            control.prepare(FaultPlan(Site.HOST_ALLOCATION, nth=nth, times=times, min_bytes=512, disarm_after_s=60))
            began_s = time.monotonic()
            control.begin()
            try:
                act(made)
                control.end()
                error = ""
            except BaseException as failure:
                control.end()
                error = type(failure).__name__
            took_s = time.monotonic() - began_s
            fired = control.record().faults_fired
            found.append({"times": times, "nth": nth, "fired": fired, "error": error, "took_s": took_s, **made.after()})
            if not fired:
                break
    print(json.dumps(found))
"""


def _swept(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the points at which a request was refused; both sweeps came to a run without."""
    ends = [each for each in found if not each["fired"]]
    assert [each["times"] for each in ends] == [1, None], f"of two sweeps these came to their end: {ends}"
    wrong = [each for each in ends if each["error"]]
    assert not wrong, f"with nothing refused there was an error: {wrong}"
    swept = [each for each in found if each["fired"]]
    assert len(swept) >= 4, f"only {len(swept)} requests were refused: nothing is shown"
    return swept


BEGINS = """
class Made:
    def __init__(self):
        self.ran = threading.Event()
        self.thread = Thread(self.ran.set, "begins")
        self.begun = False

    def begin(self):
        self.thread.start()
        self.begun = True

    def after(self):
        # One that may not run is given a moment in which it would.
        return {"ran": self.ran.wait(30 if self.begun else 0.2)}


sweep(Made, Made.begin)
"""


def test_a_thread_begins_or_raises_and_never_begins(interposed: InChild) -> None:
    swept = _swept(interposed(SWEEP + BEGINS))
    errors = {each["error"] for each in swept} - {""}
    assert "MemoryError" in errors <= {"MemoryError", "RuntimeError"}, f"the errors are {sorted(errors)}"
    # One that began, and then had no memory to do what it is for, would be waited for by whoever gives it something.
    wrong = [each for each in swept if bool(each["error"]) == each["ran"]]
    assert not wrong, f"start returned and nothing ran, or it raised and it ran: {wrong}"
    slow = [each for each in swept if each["took_s"] > SLOW_S]
    assert not slow, f"these took longer than {SLOW_S} s: {slow}"


def test_what_a_thread_was_for_is_not_kept_when_it_could_not_begin(interposed: InChild) -> None:
    program = """
import gc, weakref


class Made:
    def __init__(self):
        held = {1}
        self.held = weakref.ref(held)
        self.thread = Thread(lambda: held, "begins")

    def after(self):
        self.thread.join(5.0) if self.thread.is_alive() else None
        del self.thread
        gc.collect()
        return {"kept": self.held() is not None}


sweep(Made, lambda made: made.thread.start())
"""
    swept = _swept(interposed(SWEEP + program.replace("{1}", "type('Held', (), {})()")))
    kept = [each for each in swept if each["error"] and each["kept"]]
    assert not kept, f"what could not be done is kept: {kept}"


def test_the_kernel_knows_a_thread_by_its_name() -> None:
    found = []
    thread = Thread(lambda: found.append(_comm(threading.get_native_id())), "plimsoll-of-many-letters")
    thread.start()
    thread.join(WITHIN_S)
    assert found == ["plimsoll-of-many-letters"[:15]], f"the kernel's name is {found}"
    assert thread.name == "plimsoll-of-many-letters" and thread.daemon, f"{thread}"


def test_a_thread_without_room_for_its_stack_is_an_error(in_child: InChild) -> None:
    program = """
import json, resource, threading
from backends.threads import OneThread, Thread
resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
threading.stack_size(1 << 29)
errors = []
for act in (Thread(print, "one").start, lambda: OneThread("one").do(print)):
    try:
        act()
    except (MemoryError, RuntimeError) as error:
        errors.append(type(error).__name__)
print(json.dumps(errors))
"""
    errors = in_child(program)
    assert len(errors) == 2, f"a stack of 512 MiB in 256 MiB: {errors}"


def test_things_are_done_in_the_order_in_which_they_came_and_on_one_thread(one: OneThread) -> None:
    begun, go, done = threading.Event(), threading.Event(), list[tuple[int, int]]()

    def first() -> None:
        begun.set()
        go.wait(WITHIN_S)

    def give(number: int) -> None:
        one.do(lambda: done.append((number, threading.get_ident())))

    givers = [threading.Thread(target=one.do, args=(first,))]
    givers += [threading.Thread(target=give, args=(number,)) for number in range(10)]
    for waiting, giver in enumerate(givers):
        giver.start()
        # The first is being done, and the others wait behind it.
        until(lambda waiting=waiting: begun.is_set() and one._tasks.qsize() == waiting, "its work waits")  # type: ignore[misc]
    assert not done, f"{done} were done while the first was not over"
    go.set()
    for giver in givers:
        giver.join()
    assert [number for number, _ in done] == list(range(10)), f"the order is {done}"
    threads = {thread for _, thread in done}
    assert len(threads) == 1 and threading.get_ident() not in threads, f"done on {threads}"


def test_it_gives_what_was_made_and_raises_what_was_raised(one: OneThread) -> None:
    assert one.do(lambda: 7 * 6) == 42
    for error in (ValueError("no"), KeyboardInterrupt(), SystemExit(3)):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            one.do(fail)
        assert caught.value is error, f"{error!r} was raised, {caught.value!r} arrived"
    assert one.do(lambda: "on") == "on", "after errors it did nothing more"


class _Held:
    """What can be watched."""


@pytest.mark.parametrize("fails", [False, True], ids=["a result", "an error"])
def test_nothing_of_what_was_done_is_kept(one: OneThread, fails: bool) -> None:
    gc.disable()
    try:

        def act(held: _Held) -> _Held:
            if fails:
                raise ValueError(held)
            return held

        def give() -> weakref.ref[_Held]:
            held = _Held()
            with contextlib.suppress(ValueError):
                one.do(lambda: act(held))
            return weakref.ref(held)

        gone = give()
        # The thread lets go of it just after it has told.
        with contextlib.suppress(AssertionError):
            until(lambda: gone() is None, "it is collected")
        assert gone() is None, f"it is kept by {gc.get_referrers(gone())}"
    finally:
        gc.enable()


def test_there_is_no_thread_before_it_is_needed_and_none_after_it_was_closed() -> None:
    made = OneThread("needed-late")
    assert "needed-late" not in _threads(), "the thread began with nothing to do"
    made.do(int)
    assert _threads().count("needed-late") == 1, f"the threads are {_threads()}"
    made.close()
    made.close()
    assert "needed-late" not in _threads(), "the thread is there after it was closed twice"
    with pytest.raises(RuntimeError, match="the thread needed-late was closed"):
        made.do(int)


def test_the_last_thing_is_done_and_nobody_waits_for_it() -> None:
    made, go, done = OneThread("the-last"), threading.Event(), threading.Event()
    made.do(int)
    (thread,) = (each for each in threading.enumerate() if each.name == "the-last")

    def last() -> None:
        go.wait(WITHIN_S)
        done.set()

    made.do_last(last)
    assert not done.is_set(), "do_last waited"
    made.close()
    assert thread.is_alive(), "close waited for the last thing"
    go.set()
    thread.join(WITHIN_S)
    assert done.is_set() and not thread.is_alive(), "the last thing was not done, or the thread did not end"


def test_an_error_of_the_last_thing_ends_the_thread_in_order() -> None:
    made = OneThread("the-last")
    made.do(int)
    (thread,) = (each for each in threading.enumerate() if each.name == "the-last")
    made.do_last(lambda: 1 / 0)
    thread.join(WITHIN_S)
    assert not thread.is_alive(), "it is there after the last thing failed"


def test_whoever_gives_it_something_without_memory_is_told(interposed: InChild) -> None:
    program = """
class Made:
    def __init__(self):
        self.one = OneThread("one")
        if warm:
            self.one.do(int)

    def act(self):
        made = self.one.do(lambda: bytearray(4096))
        assert len(made) == 4096

    def after(self):
        # What failed is nobody's business any more: the next thing is done.
        again = self.one.do(lambda: 42)
        self.one.close()
        left = sum(each.name == "one" and each.is_alive() for each in threading.enumerate())
        return {"again": again, "threads": left}


sweep(Made, lambda made: made.act())
"""
    for warm in (False, True):
        swept = interposed(f"warm = {warm}\n" + SWEEP + program)
        fired = [each for each in swept if each["fired"]]
        assert len(fired) >= 2, f"only {len(fired)} requests were refused: nothing is shown"
        if not warm:
            _swept(swept)
        errors = {each["error"] for each in fired} - {""}
        assert errors <= {"MemoryError", "RuntimeError"}, f"the errors are {sorted(errors)}"
        slow = [each for each in fired if each["took_s"] > SLOW_S]
        assert not slow, f"these took longer than {SLOW_S} s: {slow}"
        wrong = [each for each in swept if each["again"] != 42 or each["threads"]]
        assert not wrong, f"the next thing was not done, or a thread is left after closing: {wrong}"
