"""What results have to be: a tiling of what was accepted, with the right answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from qualification.stream import Stream, unanswered, untiled, wrong


@dataclass(frozen=True)
class R:
    start: int
    stop: int
    output: Any = 1.0
    device: str = "cpu"
    degraded: bool = False


@pytest.mark.parametrize(
    ("spans", "gaps", "overlaps", "missing"),
    [
        ([(0, 5), (5, 10)], 0, 0, 0),
        ([], 1, 0, 10),
        ([(0, 5)], 1, 0, 5),
        ([(0, 4), (5, 10)], 1, 0, 1),
        ([(2, 10)], 1, 0, 2),
        ([(0, 6), (5, 10)], 0, 1, 0),
        ([(0, 10), (0, 10)], 0, 1, 0),
        ([(5, 10), (0, 5)], 0, 0, 0),
        ([(0, 12)], 0, 1, 0),
        ([(0, 5), (5, 5), (5, 10)], 0, 1, 0),
    ],
)
def test_gaps_and_overlaps_are_counted(spans: list[tuple[int, int]], gaps: int, overlaps: int, missing: int) -> None:
    results = [R(*span) for span in spans]
    assert untiled(results, 10) == (gaps, overlaps), f"{spans}: {untiled(results, 10)}"
    assert unanswered(results, 10) == missing, f"{spans}: {unanswered(results, 10)} unanswered"


def test_a_declared_failure_tiles_but_answers_nothing() -> None:
    results = [R(0, 4), R(4, 7, None), R(7, 10)]
    assert untiled(results, 10) == (0, 0)
    assert unanswered(results, 10) == 3
    assert unanswered([R(0, 10, None)], 10) == 10


def test_an_answer_is_wrong_where_it_is_missing_cut_elsewhere_or_different() -> None:
    reference = [R(0, 5, 1.0), R(5, 10, 2.0), R(10, 15, None)]
    assert wrong(reference, reference) == 0
    assert wrong(reference[:1], reference) == 2
    assert wrong([R(0, 5, 1.0), R(5, 10, 2.5), R(10, 15, None)], reference) == 1
    assert wrong([R(0, 4, 1.0), R(4, 10, 2.0), R(10, 15, None)], reference) == 2
    assert wrong([R(0, 5, 1.0), R(5, 10, None), R(10, 15, None)], reference) == 1


def test_a_stream_repeats_its_recording() -> None:
    stream = Stream(np.arange(4, dtype=np.float32))
    assert stream[2:10].tolist() == [2, 3, 0, 1, 2, 3, 0, 1]


def test_a_different_bit_is_a_different_sample() -> None:
    stream = Stream(np.array([0.0, 0.5], np.float32))
    kept = stream[0:6].copy()
    assert stream.different(kept) == 0
    kept[2] = -0.0
    assert stream.different(kept) == 1, "-0.0 equals 0.0, but its bits differ"
