"""A stream of real audio of any length, and what its results have to be: a tiling, with the right answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qualification.subject import Result, Subject

FloatArray = npt.NDArray[np.float32]


class Stream:
    """A recording, repeated without end: position -> sample."""

    def __init__(self, recording: FloatArray) -> None:
        """Repeat a float32 [samples] recording."""
        self._recording = recording

    def __getitem__(self, span: slice) -> FloatArray:
        """Give samples [start, stop) as float32."""
        size = len(self._recording)
        first, count = span.start % size, max(0, span.stop - span.start)
        # What does not reach its end, which is most that is fed, needs no copies of all of it.
        repeated = self._recording if first + count <= size else np.tile(self._recording, -(-(first + count) // size))
        return repeated[first : first + count].copy()

    def feed(self, subject: Subject, start: int, stop: int, block_samples: int | None = None) -> int:
        """Feed samples [start, stop) in blocks (None: in one call); return what the subject says is accepted."""
        step = block_samples or max(1, stop - start)
        accepted = start
        for first in range(start, stop, step):
            accepted = subject.feed(first, self[first : min(first + step, stop)])
        return accepted

    def different(self, samples: FloatArray) -> int:
        """Count the samples that are not, bit for bit, those of the stream from position 0 on."""
        expected = self[0 : len(samples)]
        return int(np.count_nonzero(samples.view(np.uint32) != expected.view(np.uint32)))


def untiled(results: Sequence[Result], accepted: int) -> tuple[int, int]:
    """Count (gaps, overlaps) where results do not tile [0, accepted). A result beyond it counts as an overlap."""
    gaps = overlaps = 0
    position = 0
    for result in sorted(results, key=lambda each: each.start):
        gaps += result.start > position
        overlaps += result.start < position or result.stop <= result.start or result.stop > accepted
        position = max(position, result.stop)
    return gaps + (position < accepted), overlaps


def unanswered(results: Sequence[Result], accepted: int) -> int:
    """Count the samples of [0, accepted) that no result answers. A declared failure tiles, but it answers nothing."""
    missing = position = 0
    answers = (result for result in results if result.output is not None)
    for result in sorted(answers, key=lambda each: each.start):
        missing += max(0, min(result.start, accepted) - position)
        position = max(position, min(result.stop, accepted))
    return missing + accepted - position


def equivalent(a: Any, b: Any) -> bool:
    """Compare outputs of a subject that has no ``equivalent`` of its own: equal, arrays element by element."""
    if a is None or b is None:
        return a is b
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def wrong(results: Sequence[Result], reference: Sequence[Result], same: Callable[[Any, Any], bool] = equivalent) -> int:
    """Count the answers of the undisturbed run that are missing, cut elsewhere, or not the same."""
    found = {(result.start, result.stop): result.output for result in results}
    missing = object()
    count = 0
    for expected in reference:
        output = found.get((expected.start, expected.stop), missing)
        count += output is missing or not same(output, expected.output)
    return count
