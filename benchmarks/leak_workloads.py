"""Work with memory that is healthy or leaks at a known rate: what ``benchmarks.leaks`` lets the verdict be tried on.

Both workloads do one turn after another and are at rest between turns. The leak is real memory, written and kept.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from backends.contract import Capability
from backends.model import DEFAULT_MODEL, SAMPLE_RATE_HZ
from qualification.observe import quiesce
from qualification.run import DEFAULT_AUDIO, prepare
from qualification.stream import Stream
from qualification.subject import DEFAULT_SUBJECT, SubjectContext

MB = 1_000_000
PIECE_BYTES = (2_000, 65_536)
#: Of every second leak: small objects, which Python does not take from the C library's heap.
SMALL_PIECE_BYTES = (30, 430)
CHURN_BYTES = (1 * MB, 50 * MB)
CHURN_THREADS = 2
LIVE_ARRAYS = 32
CACHE_ENTRIES = 3_000
CACHE_PUTS_A_TURN = 10
#: With some 40 turns a second, an array is replaced every 0.4 to 4 s.
ARRAYS_A_TURN = 0.75
SPOKEN_A_TURN = 8 * SAMPLE_RATE_HZ
DEVICE_LIMIT_BYTES = 256 << 20

Bytes = NDArray[np.uint8]


class Workload(Protocol):
    """What does turns of work, each with a call of ``leak`` in it."""

    turns_a_sample: int

    def turn(self) -> None:
        """Do a turn of work, and have it done when this returns."""

    def rest(self) -> None:
        """Bring it to a quiescent point, beyond what the end of a turn is."""

    def process_ids(self) -> Sequence[int]:
        """Give the processes whose memory belongs to it, beside this one."""

    def workers_heap_bytes(self) -> int:
        """Give what those processes have taken from their heaps, as ``Sampler`` asks for it."""

    def device_used_bytes(self) -> int:
        """Give what is in use on its device; 0 where it has none."""

    def close(self) -> None:
        """Give everything back but the leak."""


class Leak:
    """Memory that is kept for ever: bytes of random sizes, every one written, ``rate`` a second.

    An even seed has pieces of PIECE_BYTES, an odd one of SMALL_PIECE_BYTES.
    """

    def __init__(self, seed: int, rate: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Keep nothing before the beginning."""
        self._chance, self._rate, self._clock_s = random.Random(seed), rate, clock_s
        self._began_s = math.inf
        self._piece_bytes = SMALL_PIECE_BYTES if seed % 2 else PIECE_BYTES
        self._pieces: list[bytes] = []
        self._next_bytes = self._size()
        self.kept_bytes = 0

    def begin(self) -> None:
        """Leak from now on."""
        self._began_s = self._clock_s()

    def grow(self) -> None:
        """Keep as many more pieces as the time has room for: the next one may have to wait."""
        due_bytes = self._rate * (self._clock_s() - self._began_s)
        while self.kept_bytes + _taken_bytes(self._next_bytes) <= due_bytes:
            # Of zeros it would be pages that were never touched.
            self._pieces.append(b"\xa5" * self._next_bytes)
            self.kept_bytes += _taken_bytes(self._next_bytes)
            self._next_bytes = self._size()

    def _size(self) -> int:
        return round(math.exp(self._chance.uniform(*map(math.log, self._piece_bytes))))


def _taken_bytes(size: int) -> int:
    """Say what an object of so many bytes takes: its head as well, in multiples of 16, and a pointer to it."""
    return -(-(sys.getsizeof(b"") + size) // 16) * 16 + 8


class Noisy:
    """Arrays of up to 50 MB come and go in two threads, over a live set of about 40 MB that fluctuates itself.

    Of the live set, turns replace arrays of about 1 MB, and entries of a bounded cache of small objects. Both take
    other sizes than before, so what is in use wanders by about 0.3 MB and comes back.
    """

    turns_a_sample = 10

    def __init__(self, seed: int, leak: Callable[[], None], *, arrays: bool = True, cache: bool = True) -> None:
        """Make the live set, and say which parts of it are replaced all the time."""
        self._chance = random.Random(seed)
        self._leak, self._replaces_arrays, self._replaces_entries = leak, arrays, cache
        self._arrays = [self._array() for _ in range(LIVE_ARRAYS)]
        self._cache: OrderedDict[int, object] = OrderedDict()
        self._puts = 0
        self._put(CACHE_ENTRIES)
        self._threads = ThreadPoolExecutor(CHURN_THREADS)

    def turn(self) -> None:
        """Churn, and replace some of the live set."""
        self._leak()
        total_bytes = self._chance.randint(*CHURN_BYTES)
        seeds = [self._chance.random() for _ in range(CHURN_THREADS)]
        done = [self._threads.submit(_churn, random.Random(seed), total_bytes // CHURN_THREADS) for seed in seeds]
        if self._replaces_arrays and self._chance.random() < ARRAYS_A_TURN:
            # Some ten times as often as others, so that what is in use wanders fast and slowly.
            often = math.log10(1 + 9 * self._chance.random())
            self._arrays[int(LIVE_ARRAYS * often)] = self._array()
        if self._replaces_entries:
            self._put(CACHE_PUTS_A_TURN)
        for each in done:
            each.result()

    def rest(self) -> None:
        """It is: both threads are done with a turn when it ends."""

    def process_ids(self) -> Sequence[int]:
        """There is none beside this one."""
        return ()

    def workers_heap_bytes(self) -> int:
        """There is no other process."""
        return 0

    def device_used_bytes(self) -> int:
        """There is no device."""
        return 0

    def close(self) -> None:
        """End the threads, and drop the live set."""
        self._threads.shutdown()
        self._arrays.clear()
        self._cache.clear()

    def _array(self) -> Bytes:
        return np.full(self._chance.randint(900_000, 1_100_000), 1, dtype=np.uint8)

    def _put(self, entries: int) -> None:
        for _ in range(entries):
            n = self._chance.randint(8, 500)
            kind = self._chance.randrange(3)
            self._cache[self._puts] = b"x" * 8 * n if kind == 0 else "y" * 4 * n if kind == 1 else [float(n)] * n
            self._puts += 1
            if len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)


def _churn(chance: random.Random, total_bytes: int) -> None:
    """Write ``total_bytes`` of arrays; each lives until another is thrown out at random, or to the end."""
    held: list[Bytes] = []
    while total_bytes > 0:
        most = max(16_384, total_bytes)
        size = round(math.exp(chance.uniform(math.log(16_384), math.log(most))))
        held.append(np.full(size, 1, dtype=np.uint8))
        total_bytes -= size
        if chance.random() < 0.6:
            held.pop(chance.randrange(len(held)))


class Pipeline:
    """The pipeline that ships, on the backend ``cpu`` with its worker process: 8 s of real speech a turn."""

    turns_a_sample = 1

    def __init__(self, leak: Callable[[], None]) -> None:
        """Start it in a folder of its own. Raises Refused where it cannot run here."""
        run = prepare(backend="cpu", device=None, subject=DEFAULT_SUBJECT, model=DEFAULT_MODEL, audio=DEFAULT_AUDIO)
        self._leak, self._stream, self._accepted = leak, Stream(run.samples), 0
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="plimsoll-bench-"))
            self._backend = stack.enter_context(contextlib.closing(run.new_backend()))
            if self._backend.capabilities[Capability.MEMORY_LIMIT].yes:
                self._backend.limit_memory(DEVICE_LIMIT_BYTES)
            limits = {"device_limit_bytes": DEVICE_LIMIT_BYTES}
            context = SubjectContext(Path(folder), self._backend, self._backend.device, run.model, limits)
            self._subject = stack.enter_context(contextlib.closing(run.factory(context)))
            self._stack = stack.pop_all()

    def turn(self) -> None:
        """Feed 8 s of speech, through what leaks, and have all of it answered. Raises RuntimeError where it is not."""
        stop = self._accepted + SPOKEN_A_TURN
        accepted = self._feed(self._accepted, self._stream[self._accepted : stop])
        if accepted != stop:
            raise RuntimeError(f"the pipeline accepted {accepted - self._accepted} of {SPOKEN_A_TURN} samples")
        self._accepted = accepted
        self._subject.drain(60)

    def _feed(self, start: int, block: object) -> int:
        self._leak()
        return self._subject.feed(start, block)

    def rest(self) -> None:
        """Have it give cached memory back."""
        quiesce(self._subject)

    def process_ids(self) -> Sequence[int]:
        """Give its worker, too."""
        return self._subject.process_ids()

    def workers_heap_bytes(self) -> int:
        """Ask the pipeline for its worker's."""
        return int(self._subject.workers_heap_bytes())  # type: ignore[attr-defined]  # beyond the protocol

    def device_used_bytes(self) -> int:
        """Give what its arena has in use."""
        return self._backend.memory().used_bytes

    def close(self) -> None:
        """End it, and remove its folder."""
        self._stack.close()


#: By name; the first two are what the verdict is tried on, the others are parts of ``noisy`` for the peers.
WORKLOADS: dict[str, Callable[[int, Callable[[], None]], Workload]] = {
    "noisy": Noisy,
    "pipeline": lambda _, leak: Pipeline(leak),
    "churn": partial(Noisy, arrays=False, cache=False),
    "cache": partial(Noisy, arrays=False),
}


class ByTurns:
    """A workload whose leak follows its turns: what a tool does to its pace does not change what there is to find.

    ``turns_per_s`` says how many turns ``rate`` is meant for.
    """

    def __init__(self, name: str, rate: float, seed: int, turns_per_s: float) -> None:
        """Make the workload, and let it do a turn."""
        self.turns = 0
        self._leak = Leak(seed, rate, lambda: self.turns / turns_per_s)
        self._workload = WORKLOADS[name](seed, self._leak.grow)
        self._workload.turn()
        self._leak.begin()

    def turn(self) -> None:
        """Do a turn."""
        self.turns += 1
        self._workload.turn()

    @property
    def kept_bytes(self) -> int:
        """What was leaked."""
        return self._leak.kept_bytes
