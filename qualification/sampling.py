"""Readings of memory, descriptors, threads and children at quiescent points, by a sampler that cannot leak itself.

Exact counters (heap in use, the runtime's allocator) find a leak; beside them a catch-all (USS, the card) finds what
they do not see. USS walks every mapping and costs milliseconds: it is for readings at rest, a few in a second at most.
"""

from __future__ import annotations

import gc
import math
import operator
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from backends.host import heap_used_bytes
from qualification import gpu

# Only where the C library is glibc, and psutil recent: looked up once.
_heap_trim: Callable[[], Any] | None = getattr(psutil, "heap_trim", None)

#: A number of bytes that could not be read.
UNREAD = -1
#: The most processes that are told apart.
PROCESSES_MAX = 64


@dataclass(frozen=True)
class Process:
    """One process in one reading. ``uss_bytes`` is what would come back if it ended: its own pages, swapped or not."""

    process_id: int
    name: str
    uss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Sample:
    """One reading, summed over this process and the workers that were alive.

    ``t_s`` is monotonic, from the beginning of the sampler. Exact counters: ``heap_used_bytes`` is what this process
    has taken from the C library's heap and not freed, ``workers_heap_bytes`` the same of the subject's other processes,
    ``device_used_bytes`` what the runtime counts. The catch-all beside them: ``uss_bytes``, and ``card_used_bytes``,
    which is what all processes use of the device's card; 0 where there is no card. ``children`` counts descendants.
    What could not be read is UNREAD.
    """

    t_s: float
    uss_bytes: int
    heap_used_bytes: int
    workers_heap_bytes: int
    device_used_bytes: int
    card_used_bytes: int
    descriptors: int
    threads: int
    children: int
    processes: tuple[Process, ...] = ()


#: The names of the series: every number in a Sample but its time.
SERIES = tuple(field.name for field in fields(Sample) if field.name not in ("t_s", "processes"))
#: What each series of memory is, for people.
MEMORY = {
    "uss_bytes": "host memory, all of it",
    "heap_used_bytes": "heap in use",
    "workers_heap_bytes": "workers' heaps in use",
    "device_used_bytes": "device memory, as the runtime counts",
    "card_used_bytes": "the card's memory, all of it",
}


def take(
    process_ids: Iterable[int] = (),
    *,
    workers_heap_bytes: int = UNREAD,
    device_used_bytes: int = 0,
    card: str | None = None,
    t_s: float = 0.0,
) -> Sample:
    """Collect garbage, trim this process's heap, then read this process, ``process_ids`` and ``card`` (its UUID).

    A worker that has vanished is skipped. Workers are read as they are: only they could trim their own heaps.
    Raises psutil.AccessDenied for a live process that may not be read.
    """
    gc.collect()
    if _heap_trim is not None:
        _heap_trim()
    heap = heap_used_bytes()
    descendants: set[int] = set()
    read = (_read(process_id, descendants) for process_id in dict.fromkeys((os.getpid(), *process_ids)))
    processes = tuple(each for each in read if each is not None)
    return Sample(
        t_s=t_s,
        uss_bytes=sum(each.uss_bytes for each in processes),
        heap_used_bytes=UNREAD if heap is None else heap,
        workers_heap_bytes=workers_heap_bytes,
        device_used_bytes=device_used_bytes,
        card_used_bytes=0 if card is None else _card_used_bytes(card),
        descriptors=sum(each.descriptors for each in processes),
        threads=sum(each.threads for each in processes),
        children=len(descendants),
        processes=processes,
    )


class Sampler:
    """Takes samples into buffers of a fixed size; a full buffer keeps every second sample, and from then on one in two.

    ``process_ids`` is asked at each sample, so replaced workers are followed; this process is always read, and
    ``workers_heap_bytes`` is asked too, where it is given. ``card`` is the UUID of the card that the device is, where
    it is one; ``card_is_ours`` says that nobody else uses it.
    """

    def __init__(
        self,
        process_ids: Callable[[], Iterable[int]] = tuple,
        *,
        workers_heap_bytes: Callable[[], int] | None = None,
        card: str | None = None,
        card_is_ours: bool = False,
        capacity: int = 2048,
    ) -> None:
        """Allocate the buffers. Raises ValueError unless ``capacity`` is even and at least 2."""
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity is {capacity}: expected an even number of at least 2 samples")
        self._process_ids = process_ids
        self._workers_heap_bytes = workers_heap_bytes
        self._card, self._card_is_ours = card, card_is_ours
        # Written to at once, so that the pages are there before the first reading and not counted as growth.
        self._times = np.full(capacity, -1.0)
        self._values = np.full((len(SERIES), capacity), UNREAD, dtype=np.int64)
        self._stored = 0
        self._taken = 0
        self._stride = 1
        self._last: Sample | None = None
        self._began_s = time.monotonic()
        self._taking_s = 0.0
        #: The first and the last reading of each process, by its id.
        self.processes: dict[int, tuple[Process, Process]] = {}

    def sample(self, device_used_bytes: int = 0) -> Sample:
        """Take a sample, at a quiescent point. ``device_used_bytes`` is what the backend reads at the same point."""
        t_s = time.monotonic() - self._began_s
        sample = take(
            self._process_ids(),
            workers_heap_bytes=self._read_workers_heap(),
            device_used_bytes=device_used_bytes,
            card=self._card,
            t_s=t_s,
        )
        if self._taken % self._stride == 0:
            if self._stored == len(self._times):
                self._halve()
            self._times[self._stored] = sample.t_s
            self._values[:, self._stored] = [getattr(sample, name) for name in SERIES]
            self._stored += 1
        self._taken += 1
        self._follow(sample)
        self._last = sample
        self._taking_s += time.monotonic() - self._began_s - t_s
        return sample

    def series(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Give t_s [n] and the values [n] of one of SERIES, as copies. Raises ValueError for another name."""
        if name not in SERIES:
            raise ValueError(f"there is no series {name!r}: expected one of {', '.join(SERIES)}")
        return self._times[: self._stored].copy(), self._values[SERIES.index(name), : self._stored].copy()

    def points(self, name: str) -> list[tuple[float, float]]:
        """Give one of SERIES as (t_s, value) pairs, as the records take them: what is UNREAD is no number."""
        pairs = zip(*self.series(name), strict=True)
        return [(float(t_s), math.nan if value == UNREAD else float(value)) for t_s, value in pairs]

    def readings(self, name: str, unit: str = "s") -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Give one of SERIES where it could be read, to be judged: t_s, or the number of the sample for "cycle"."""
        t_s, values = self.series(name)
        at = t_s if unit == "s" else np.arange(len(values), dtype=np.float64) * self._stride
        is_read = values != UNREAD
        return at[is_read], values[is_read]

    @property
    def memory_series(self) -> list[str]:
        """The names of the series of memory that say something about the subject, the catch-all first.

        Not that of a card which others use as well.
        """
        names = [
            name for name in MEMORY if name != "card_used_bytes" or (self._card is not None and self._card_is_ours)
        ]
        return [name for name in names if name == "uss_bytes" or len(self.readings(name)[0])]

    def recorded(self) -> dict[str, list[tuple[float, float]]]:
        """Give what a record keeps: every series of memory as points, and the card's where there is one."""
        names = dict.fromkeys([*self.memory_series, *(["card_used_bytes"] if self._card is not None else [])])
        return {name: self.points(name) for name in names}

    @property
    def last(self) -> Sample:
        """The latest sample, stored or not. Raises LookupError before the first."""
        if self._last is None:
            raise LookupError("no sample has been taken yet")
        return self._last

    @property
    def cost(self) -> tuple[int, float]:
        """What sampling cost so far: the bytes of its buffers, and the share of the time that it took."""
        elapsed_s = time.monotonic() - self._began_s
        return self._times.nbytes + self._values.nbytes, self._taking_s / elapsed_s if elapsed_s else 0.0

    def _read_workers_heap(self) -> int:
        if self._workers_heap_bytes is None:
            return UNREAD
        try:
            used_bytes = operator.index(self._workers_heap_bytes())
        except Exception:
            # A worker that is gone, stopped or just starting; whatever a subject raises then, or answers.
            return UNREAD
        return used_bytes if 0 <= used_bytes < 1 << 62 else UNREAD

    def _follow(self, sample: Sample) -> None:
        for process in sample.processes:
            # The one that was not seen for longest comes first, and goes first.
            known = self.processes.pop(process.process_id, None)
            if known is None and len(self.processes) == PROCESSES_MAX:
                self.processes.pop(next(iter(self.processes)))
            self.processes[process.process_id] = (known[0] if known else process, process)

    def _halve(self) -> None:
        # The capacity is even, so the sample that is about to be stored is on the new, wider grid.
        self._stored //= 2
        self._times[: self._stored] = self._times[::2]
        self._values[:, : self._stored] = self._values[:, ::2]
        self._stride *= 2


def _card_used_bytes(card: str) -> int:
    used_bytes = gpu.read(card).used_bytes
    return UNREAD if used_bytes is None else used_bytes


def _read(process_id: int, descendants: set[int]) -> Process | None:
    """Read a process and add its descendants; None for one that is gone."""
    try:
        process = psutil.Process(process_id)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        memory = process.memory_full_info()
        reading = Process(
            *(process_id, process.name(), memory.uss + memory.swap, process.num_fds(), process.num_threads())
        )
        if process_id not in descendants:
            descendants.update(child.pid for child in process.children(recursive=True))
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        # A process that dies while it is read can answer so, too.
        if psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE:
            raise
        return None
    return reading
