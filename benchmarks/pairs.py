"""Two ways of doing the same, measured in turn, and what the pairs allow to be said. Knows numbers only.

A pair is two measurements made one right after the other, so what the machine does meanwhile strikes both. The median
of the pairs' effects comes with an interval that asks nothing of their distribution: order statistics and the binomial.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95


class Verdict(enum.Enum):
    """What an interval says about a limit."""

    PASS = "pass"
    FAIL = "fail"
    #: The limit lies inside the interval.
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Interval:
    """A median, and the bounds between which the true one lies."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Limit:
    """A bound that the true median has to be at most at, or with ``at_most=False`` at least at."""

    bound: float
    at_most: bool = True

    def judge(self, interval: Interval) -> Verdict:
        """Pass or fail only if the whole interval does."""
        # Turned around, at least is at most.
        lower, upper, bound = interval.lower, interval.upper, self.bound
        if not self.at_most:
            lower, upper, bound = -upper, -lower, -bound
        if upper <= bound:
            return Verdict.PASS
        return Verdict.FAIL if lower > bound else Verdict.INCONCLUSIVE

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One line of the result. ``seconds`` are the medians of both sides, for one call; ``unit`` is the effect's."""

    what: str
    pairs: int
    seconds: tuple[float, float]
    effect: Interval
    unit: str
    limit: Limit | None
    verdict: Verdict | None


def median_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Give the median of values [n] and its interval: the narrowest pair of order statistics that is sure enough.

    Raises ValueError for values that are not finite or too few for an interval.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.ndim != 1:
        raise ValueError(f"values have shape {ordered.shape}: expected one dimension")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected more than 0 and less than 1")
    if not np.isfinite(ordered).all():
        raise ValueError(f"{int((~np.isfinite(ordered)).sum())} of {len(ordered)} values are not finite")
    # The true median is below the k-th smallest value as often as n tosses give fewer than k heads; above alike.
    n = len(ordered)
    k, fewer, ways = 0, 0, 1
    while 2 * (fewer + ways) / 2**n <= 1 - confidence:
        k, fewer, ways = k + 1, fewer + ways, ways * (n - k) // (k + 1)
    if k == 0:
        least = math.ceil(1 - math.log2(1 - confidence))
        raise ValueError(f"{n} pairs: expected at least {least} for an interval at {confidence:.0%}")
    return Interval(float(np.median(ordered)), float(ordered[k - 1]), float(ordered[n - k]))


def in_turn(
    first: Callable[[int], float], second: Callable[[int], float], pairs: int, rng: np.random.Generator
) -> Floats:
    """Measure both sides ``pairs`` times, each given the pair's number; float64 [pairs, 2].

    Either side begins in half of the pairs, in an order that the generator shuffles.
    """
    measured = np.empty((pairs, 2))
    for pair, begins in enumerate(rng.permutation(np.arange(pairs) % 2)):
        for side in (begins, 1 - begins):
            measured[pair, side] = (first, second)[side](pair)
    return measured


def compare(
    what: str,
    measure: Callable[[int], Floats],
    effect: Callable[[Floats], Floats],
    unit: str,
    limit: Limit | None,
    pairs: int,
) -> Row:
    """Measure so many pairs and judge their effect; where that leaves it open, as many again, and judge all of them.

    ``measure`` gives seconds [n, 2] for n pairs, and ``effect`` makes [n] of them.
    """
    seconds = measure(pairs)
    interval = median_interval(effect(seconds))
    verdict = limit.judge(interval) if limit else None
    if limit and verdict is Verdict.INCONCLUSIVE:
        seconds = np.concatenate([seconds, measure(pairs)])
        interval = median_interval(effect(seconds))
        verdict = limit.judge(interval)
    without, with_it = np.median(seconds, axis=0)
    return Row(what, len(seconds), (float(without), float(with_it)), interval, unit, limit, verdict)


def table(rows: Sequence[Row]) -> str:
    """Write rows as a Markdown table."""
    lines = [
        f"| What | Pairs | Without | With | Median | {CONFIDENCE:.0%} interval | Limit | Verdict |",
        "|------|-------|---------|------|--------|--------------|-------|---------|",
    ]
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        without, with_it = (f"{each * 1e3:.2f} ms" for each in row.seconds)
        cells = (
            *(row.what, str(row.pairs), without, with_it, f"{row.effect.median:.3f}{unit}"),
            f"{row.effect.lower:.3f} to {row.effect.upper:.3f}{unit}",
            *((f"{row.limit}{unit}", row.verdict.value) if row.limit and row.verdict else ("–", "–")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
