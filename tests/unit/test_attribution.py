"""What stays is named: the phase, the line of Python, the descriptor, the thread."""

from __future__ import annotations

import os
import re
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from qualification.attribution import attribute, kept, opened_at_rest, runtime_blocks
from qualification.sampling import take

NOTHING: Callable[[], list[int]] = list


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_python_that_keeps_what_it_allocates_is_named_with_its_phase_and_line() -> None:
    lost: list[bytearray] = []

    def lose() -> None:
        lost.append(bytearray(b"x") * 300_000)

    lines = attribute({"losing": lose, "resting": lambda: None}, take, NOTHING)
    said = "\n".join(lines)
    assert re.search(r"^  losing: .*\+3\d\d\.\d kB heap in use", said, re.MULTILINE), said
    assert re.search(r"\+300\.\d kB each turn, \+\d+ blocks in all: tests/unit/test_attribution.py:\d+", said), said
    assert "look further:" in said and not tracemalloc.is_tracing()


def test_descriptors_and_threads_are_named(release: threading.Event) -> None:
    opened: list[int] = []

    def open_one() -> None:
        opened.append(os.open("/dev/null", os.O_RDONLY))

    def start_one() -> None:
        thread = threading.Thread(target=release.wait, name="forgotten", daemon=True)
        thread.start()

    try:
        lines = attribute({"opening": open_one, "starting": start_one}, take, NOTHING)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    said = "\n".join(lines)
    assert re.search(r"opening: .*\+4 descriptors", said) and re.search(r"starting: .*\+4 threads", said), said
    assert "4 x descriptor of /dev/null" in said and "4 x thread forgotten" in said, said


def test_what_only_a_worker_lost_is_said_to_be_the_workers() -> None:
    """By its own counter, whatever this process keeps beside it."""
    lost_bytes = 0

    def lose() -> None:
        nonlocal lost_bytes
        lost_bytes += 20_000

    lines = attribute({"losing": lose}, lambda: take(workers_heap_bytes=lost_bytes), NOTHING)
    said = "\n".join(lines)
    assert "in a worker: +20.0 kB each turn of its heap" in said, said
    assert "in a worker:" not in "\n".join(attribute({"resting": lambda: None}, take, NOTHING))


def test_work_that_fails_is_said_and_hides_nothing() -> None:
    def fail() -> None:
        raise OSError("no microphone")

    line, *further = attribute({"recording": fail}, take, NOTHING)
    assert line == "what grew could not be looked into: turn 1 failed: OSError: «no microphone»"
    assert further[0] == "look further:" and not tracemalloc.is_tracing()


def test_what_was_learned_before_the_work_failed_is_said() -> None:
    """By phase of whole turns: what the one that failed has lost is not the others'."""
    lost: list[bytearray] = []

    def lose() -> None:
        lost.append(bytearray(b"x") * 300_000)

    def fail() -> None:
        if len(lost) == 4:
            raise OSError("no microphone")

    said = "\n".join(attribute({"losing": lose, "failing": fail}, take, NOTHING))
    # The first of the four was the warm-up.
    assert "in 2 more turns:" in said and re.search(r"turn 3 failed, .*: OSError: «no microphone»", said), said
    assert re.search(r"losing: .*\+3\d\d\.\d kB heap in use", said), said


def test_tracing_that_was_there_stays() -> None:
    tracemalloc.start()
    try:
        attribute({"resting": lambda: None}, take, NOTHING, turns=1)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_what_somebody_calls_a_thing_does_not_reach_the_terminal_as_it_is() -> None:
    assert kept(Counter({"descriptor of /tmp/\x1b[31m": 2}), Counter()) == "2 x descriptor of /tmp/?[31m"
    many = Counter({f"thread {n}": 1 for n in range(9)})
    assert kept(many, Counter()).endswith(", …") and kept(many, many) == ""


def test_a_process_that_is_gone_has_nothing_open() -> None:
    found = opened_at_rest(lambda: [2**22 - 1])
    assert sum(count for name, count in found.items() if name.startswith("thread")) >= 1


def test_without_a_device_no_runtime_has_blocks() -> None:
    assert not runtime_blocks()
