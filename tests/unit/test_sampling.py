"""Samples are real readings, the sampler is bounded, and a vanished worker is no error."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from backends import host
from backends.host import SMALL_OBJECT_BYTES, _allocator_statistics
from qualification import sampling
from qualification.records import thin
from qualification.sampling import SERIES, UNREAD, Sample, Sampler, take

SIZE_BYTES = 64 * 1024 * 1024


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_already_stays() -> None:
    # Each reading collects garbage, which takes 0.1 s more where other tests have imported torch.
    gc.collect()
    gc.freeze()


def _waiting_child(size_bytes: int = 0) -> subprocess.Popen[bytes]:
    program = f"b = bytearray({size_bytes}); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def _end(child: subprocess.Popen[bytes]) -> None:
    child.communicate(b"\n")


def test_memory_held_is_seen_and_memory_freed_is_gone() -> None:
    """64 MiB of touched memory show in USS and in the heap, and no longer after they are freed."""
    before = take()
    block = np.ones(SIZE_BYTES, dtype=np.uint8)
    during = take()
    del block
    after = take()
    heap_known = hasattr(psutil, "heap_info")
    assert (during.heap_used_bytes != UNREAD) == heap_known
    for name in ("uss_bytes", "heap_used_bytes")[: 1 + heap_known]:
        rose = getattr(during, name) - getattr(before, name)
        left = getattr(after, name) - getattr(before, name)
        assert rose == pytest.approx(SIZE_BYTES, rel=0.1), f"{name} rose by {rose} for {SIZE_BYTES} bytes"
        assert abs(left) < SIZE_BYTES * 0.1, f"{name}: {left} bytes left after all were freed"


def test_descriptors_threads_and_children_are_counted(tmp_path: Path) -> None:
    """Three files, two threads and one child are three, two and one more."""
    release = threading.Event()
    before = take()
    files = [(tmp_path / str(n)).open("w") for n in range(3)]
    threads = [threading.Thread(target=release.wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    during = take()
    release.set()
    for thread in threads:
        thread.join()
    for file in files:
        file.close()
    child = _waiting_child()
    with_child = take()
    _end(child)
    assert during.descriptors - before.descriptors == 3, f"{during} after {before}"
    assert during.threads - before.threads == 2, f"{during} after {before}"
    assert with_child.children - before.children == 1, f"{with_child} after {before}"


def test_workers_are_summed_and_counted_once() -> None:
    """A worker's 64 MiB belong to the reading when it is named, also when it is named twice."""
    child = _waiting_child(SIZE_BYTES)
    try:
        alone, both = take(), take([child.pid, child.pid, os.getpid()])
        more, worker_bytes = both.uss_bytes - alone.uss_bytes, psutil.Process(child.pid).memory_full_info().uss
        assert more == pytest.approx(worker_bytes, rel=0.1), f"{more} bytes more, the worker has {worker_bytes}"
        assert both.children == alone.children, f"{both.children} children, not {alone.children}"
    finally:
        _end(child)


def test_a_vanished_worker_is_skipped() -> None:
    """Neither a process that is gone nor a zombie is an error."""
    child = _waiting_child()
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"\n")
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    zombie = take([child.pid])
    child.wait()
    child.stdout.close()
    gone = take([child.pid])
    own_bytes = psutil.Process().memory_full_info().uss
    for name, sample in (("zombie", zombie), ("gone", gone)):
        assert sample.uss_bytes == pytest.approx(own_bytes, rel=0.1), f"{name}: {sample.uss_bytes}, own {own_bytes}"


def test_the_buffers_are_bounded_and_evenly_spaced() -> None:
    """Of 64 samples in a buffer of 16 every 4th stays, the first included."""
    sampler = Sampler(capacity=16)
    for number in range(64):
        sampler.sample(device_used_bytes=number)
    t_s, values = sampler.series("device_used_bytes")
    assert values.tolist() == list(range(0, 64, 4)), f"kept {values.tolist()}"
    assert np.all(np.diff(t_s) > 0), f"times do not increase: {t_s}"
    assert sampler.last.device_used_bytes == 63, f"the last sample is {sampler.last}"


def test_the_sampler_does_not_leak() -> None:
    """100 samples after 20 of warm-up leave the heap where it was, within 64 KiB."""
    sampler = Sampler(capacity=64)
    for _ in range(20):
        before = sampler.sample()
    for _ in range(100):
        after = sampler.sample()
    if after.heap_used_bytes == UNREAD:
        pytest.skip("the heap in use cannot be read here")
    grown = after.heap_used_bytes - before.heap_used_bytes
    assert grown < 64 * 1024, f"100 samples left {grown} bytes on the heap"


def test_replaced_workers_are_followed() -> None:
    """The process ids are asked for at each sample."""
    workers: list[int] = []
    sampler = Sampler(lambda: workers)
    alone = sampler.sample()
    child = _waiting_child(SIZE_BYTES)
    workers.append(child.pid)
    both = sampler.sample()
    _end(child)
    # What this process has may have become less meanwhile.
    used_bytes = {each.process_id: each.uss_bytes for each in both.processes}
    assert child.pid not in {each.process_id for each in alone.processes}
    assert used_bytes[child.pid] > SIZE_BYTES, f"a new worker of {SIZE_BYTES} bytes added {used_bytes[child.pid]}"
    assert both.uss_bytes == sum(used_bytes.values())


def test_a_card_that_cannot_be_read_is_no_number_in_the_record() -> None:
    """No machine has this card: its series is there, of readings that are missing, and no card's is otherwise."""
    sampler = Sampler(card="GPU-00000000-0000-0000-0000-000000000000")
    assert sampler.sample(5).card_used_bytes == UNREAD
    recorded = sampler.recorded()
    ((t_s, _),) = recorded["device_used_bytes"]
    assert thin(recorded["card_used_bytes"]) == [[t_s, None]], f"recorded is {recorded}"
    assert "card_used_bytes" not in sampler.memory_series
    without = Sampler()
    assert without.sample().card_used_bytes == 0 and "card_used_bytes" not in without.recorded()


def test_every_number_has_a_series() -> None:
    """The series agree with the sample; another name is refused, and so is asking for the last before the first."""
    sampler = Sampler()
    with pytest.raises(LookupError, match="no sample"):
        _ = sampler.last
    sample: Sample = sampler.sample(7)
    for name in SERIES:
        t_s, values = sampler.series(name)
        assert (t_s.tolist(), values.tolist()) == ([sample.t_s], [getattr(sample, name)]), f"{name}: {values}"
    with pytest.raises(ValueError, match="no series 'rss'"):
        sampler.series("rss")
    with pytest.raises(ValueError, match="capacity is 3"):
        Sampler(capacity=3)


def test_small_objects_are_counted_with_the_heap() -> None:
    """Python takes them past the C library's heap, and says how many bytes they are."""
    before = take()
    if before.heap_used_bytes == UNREAD:
        pytest.skip("the heap in use cannot be read here")
    kept = [bytes(size) for size in range(1, 480, 4) for _ in range(500)]
    rose = take().heap_used_bytes - before.heap_used_bytes
    # The list itself is on the heap.
    due = sum(map(sys.getsizeof, kept)) + sys.getsizeof(kept)
    if _allocator_statistics() is None:
        due = SMALL_OBJECT_BYTES * len(kept)
    # Each takes up to 16 bytes more than it needs.
    assert 0.97 * due < rose < 1.1 * due + 16 * len(kept), f"{len(kept)} objects of {due} bytes in all are {rose} bytes"


@pytest.mark.parametrize("statistics", [None, lambda: b""])
def test_where_python_does_not_say_what_its_small_objects_take_they_are_estimated(
    monkeypatch: pytest.MonkeyPatch, statistics: object
) -> None:
    monkeypatch.setattr(host, "_allocator_statistics", lambda: statistics)
    before, kept = host.small_objects_bytes(), [bytes(100) for _ in range(10_000)]
    after = host.small_objects_bytes()
    assert before is not None and after is not None
    rose = after - before
    assert rose == pytest.approx(SMALL_OBJECT_BYTES * len(kept), rel=0.05), f"{len(kept)} objects are {rose} bytes"


def test_the_workers_heaps_are_asked_for_and_may_be_unknown() -> None:
    """Without a way to ask, or without an answer, there is no number, and no series that is judged."""
    answers: Iterator[int | None] = iter([5, None, 7])

    def ask() -> int:
        answer = next(answers)
        if answer is None:
            raise OSError("the worker is gone")
        return answer

    sampler = Sampler(workers_heap_bytes=ask)
    read = [sampler.sample().workers_heap_bytes for _ in range(3)]
    assert read == [5, UNREAD, 7], f"read {read}"
    assert sampler.readings("workers_heap_bytes")[1].tolist() == [5, 7]
    assert sampler.readings("workers_heap_bytes", "cycle")[0].tolist() == [0, 2]
    without = Sampler()
    without.sample()
    assert "workers_heap_bytes" in sampler.memory_series and "workers_heap_bytes" not in without.memory_series


def test_a_card_is_judged_only_where_nobody_else_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only by readings that are numbers. There is no such card here: its reading is put in the place of one."""
    for used_bytes, ours, judged in ((5, True, True), (5, False, False), (UNREAD, True, False)):
        monkeypatch.setattr(sampling, "_card_used_bytes", lambda _, used_bytes=used_bytes: used_bytes)
        sampler = Sampler(card="GPU-00000000-0000-0000-0000-000000000000", card_is_ours=ours)
        sampler.sample()
        found = "card_used_bytes" in sampler.memory_series
        assert found == judged and "card_used_bytes" in sampler.recorded(), f"{used_bytes}, ours {ours}: judged {found}"


def test_without_memory_to_read_them_with_the_small_objects_are_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate among exact readings would be a step."""
    monkeypatch.setattr(host, "_allocator_statistics", lambda: lambda: None)
    assert host.small_objects_bytes() is None and take().heap_used_bytes == UNREAD


def test_while_allocations_are_followed_the_heap_can_be_read() -> None:
    """Python gives no statistics of its allocator then."""
    tracemalloc.start()
    try:
        before, kept = host.small_objects_bytes(), [bytes(100) for _ in range(10_000)]
        after = host.small_objects_bytes()
    finally:
        tracemalloc.stop()
    assert before is not None and after is not None
    assert after - before == pytest.approx(SMALL_OBJECT_BYTES * len(kept), rel=0.05), f"rose by {after - before}"


@pytest.mark.parametrize("answer", [None, math.nan, -1, 2**70, "7", 7.5])
def test_an_answer_of_the_workers_that_is_no_size_is_no_reading(answer: Any) -> None:
    """A subject may say anything; the series is of what could be read."""
    sampler = Sampler(workers_heap_bytes=lambda: answer)
    assert sampler.sample().workers_heap_bytes == UNREAD and "workers_heap_bytes" not in sampler.memory_series


def test_each_process_is_followed_from_its_first_reading_to_its_last() -> None:
    child = _waiting_child(SIZE_BYTES)
    sampler = Sampler(lambda: [child.pid])
    sampler.sample()
    kept = np.ones(SIZE_BYTES, dtype=np.uint8)
    sampler.sample()
    _end(child)
    sampler.sample()
    (first, last), (child_first, child_last) = sampler.processes[os.getpid()], sampler.processes[child.pid]
    assert last.uss_bytes - first.uss_bytes > 0.9 * kept.nbytes, f"{first} to {last}"
    assert child_first.uss_bytes > SIZE_BYTES and child_last.process_id == child.pid


def test_the_cost_is_known() -> None:
    """The buffers, and a share of the time between 0 and 1."""
    sampler = Sampler(capacity=16)
    sampler.sample()
    size_bytes, share = sampler.cost
    assert size_bytes == 16 * 8 * (1 + len(SERIES)) and 0 < share < 1, f"{size_bytes} bytes, {share}"
