"""Readings of memory, descriptors, threads and children at quiescent points, by a sampler that cannot leak itself.

USS is left out on purpose: it walks every mapping, costs milliseconds and grows with RSS. The heap in use is the exact
counter beside RSS, the catch-all.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from qualification import gpu

# Only where the C library is glibc, and psutil recent: looked up once.
_heap_info: Callable[[], Any] | None = getattr(psutil, "heap_info", None)
_heap_trim: Callable[[], Any] | None = getattr(psutil, "heap_trim", None)


@dataclass(frozen=True)
class Sample:
    """One reading, summed over this process and the workers that were alive.

    ``t_s`` is monotonic, from the beginning of the sampler. ``heap_used_bytes`` is what this process alone has taken
    from the C library's heap: 0, and ``heap_known`` False, where that cannot be read. ``children`` counts descendants.
    ``card_used_bytes`` is what all processes use of the device's card: the catch-all beside what the runtime counts; 0
    where there is no card, UNREAD where it could not be read.
    """

    t_s: float
    rss_bytes: int
    heap_used_bytes: int
    device_used_bytes: int
    card_used_bytes: int
    descriptors: int
    threads: int
    children: int
    heap_known: bool = True


#: A number of bytes that could not be read.
UNREAD = -1
#: The names of the series: every number in a Sample but its time.
SERIES = tuple(field.name for field in fields(Sample) if field.name not in ("t_s", "heap_known"))


def take(
    process_ids: Iterable[int] = (), *, device_used_bytes: int = 0, card: str | None = None, t_s: float = 0.0
) -> Sample:
    """Collect garbage, trim this process's heap, then read this process, ``process_ids`` and ``card`` (its UUID).

    A worker that has vanished is skipped. Workers are read as they are: only they could trim their own heaps.
    Raises psutil.AccessDenied for a live process that may not be read.
    """
    gc.collect()
    if _heap_trim is not None:
        _heap_trim()
    heap = _heap_info() if _heap_info is not None else None
    rss_bytes = descriptors = threads = 0
    descendants: set[int] = set()
    for process_id in dict.fromkeys((os.getpid(), *process_ids)):
        reading = _read(process_id, descendants)
        if reading is not None:
            rss_bytes += reading[0]
            descriptors += reading[1]
            threads += reading[2]
    return Sample(
        t_s=t_s,
        rss_bytes=rss_bytes,
        heap_used_bytes=heap.heap_used + heap.mmap_used if heap is not None else 0,
        device_used_bytes=device_used_bytes,
        card_used_bytes=0 if card is None else _card_used_bytes(card),
        descriptors=descriptors,
        threads=threads,
        children=len(descendants),
        heap_known=heap is not None,
    )


class Sampler:
    """Takes samples into buffers of a fixed size; a full buffer keeps every second sample, and from then on one in two.

    ``process_ids`` is asked at each sample, so replaced workers are followed; this process is always read. ``card`` is
    the UUID of the card that the device is, where it is one.
    """

    def __init__(
        self, process_ids: Callable[[], Iterable[int]] = tuple, *, card: str | None = None, capacity: int = 2048
    ) -> None:
        """Allocate the buffers. Raises ValueError unless ``capacity`` is even and at least 2."""
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity is {capacity}: expected an even number of at least 2 samples")
        self._process_ids = process_ids
        self._card = card
        # Written to at once, so that the pages are there before the first reading and not counted as growth.
        self._times = np.full(capacity, -1.0)
        self._values = np.full((len(SERIES), capacity), UNREAD, dtype=np.int64)
        self._stored = 0
        self._taken = 0
        self._stride = 1
        self._last: Sample | None = None
        self._began_s = time.monotonic()

    def sample(self, device_used_bytes: int = 0) -> Sample:
        """Take a sample, at a quiescent point. ``device_used_bytes`` is what the backend reads at the same point."""
        t_s = time.monotonic() - self._began_s
        sample = take(self._process_ids(), device_used_bytes=device_used_bytes, card=self._card, t_s=t_s)
        if self._taken % self._stride == 0:
            if self._stored == len(self._times):
                self._halve()
            self._times[self._stored] = sample.t_s
            self._values[:, self._stored] = [getattr(sample, name) for name in SERIES]
            self._stored += 1
        self._taken += 1
        self._last = sample
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

    @property
    def memory_series(self) -> list[str]:
        """The names of the series of memory that could be read, but for the card's: others may have a part in that."""
        heap_known = self._last is None or self._last.heap_known
        return ["rss_bytes", *(["heap_used_bytes"] if heap_known else []), "device_used_bytes"]

    def recorded(self) -> dict[str, list[tuple[float, float]]]:
        """Give what a record keeps: every series of memory as points, and the card's where there is one."""
        names = [*self.memory_series, *(["card_used_bytes"] if self._card is not None else [])]
        return {name: self.points(name) for name in names}

    @property
    def last(self) -> Sample:
        """The latest sample, stored or not. Raises LookupError before the first."""
        if self._last is None:
            raise LookupError("no sample has been taken yet")
        return self._last

    def _halve(self) -> None:
        # The capacity is even, so the sample that is about to be stored is on the new, wider grid.
        self._stored //= 2
        self._times[: self._stored] = self._times[::2]
        self._values[:, : self._stored] = self._values[:, ::2]
        self._stride *= 2


def _card_used_bytes(card: str) -> int:
    used_bytes = gpu.read(card).used_bytes
    return UNREAD if used_bytes is None else used_bytes


def _read(process_id: int, descendants: set[int]) -> tuple[int, int, int] | None:
    """Give (rss_bytes, descriptors, threads) and add to ``descendants``; None for a process that is gone."""
    try:
        process = psutil.Process(process_id)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        reading = process.memory_info().rss, process.num_fds(), process.num_threads()
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
