"""What separates a leak from noise: a verdict on readings of memory in use, as pure functions of numbers.

The first fifth is warm-up and dropped. The rest is reduced to medians of blocks; a leak is a Theil-Sen slope whose
lower bound is above a floor *and* growth in every third, so that a warm-up that saturates, a one-off step and a
sawtooth are none. Readings belong at quiescent points: work drained, garbage collected, free memory given back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAMPLES_MIN = 24
BLOCKS = 12
WARM_UP_FRACTION = 0.2
#: A third has grown where its own slope is above this share of the whole: a leak keeps its pace, a warm-up fades.
GROWTH_SHARE_MIN = 0.25

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LeakVerdict:
    """Whether memory in use grows without end.

    ``verdict`` is "leak", "no_leak" or "inconclusive" (too few samples; the numbers are NaN). ``lower`` and ``upper``
    are the one-sided bounds of the slope in bytes/s, ``growth_bytes`` is the slope times the judged span, and
    ``stability_fraction`` the largest deviation of a block's median from the overall median, as a share of it.
    """

    verdict: str
    slope_bytes_per_s: float
    lower: float
    upper: float
    growth_bytes: float
    stability_fraction: float
    reason: str


def judge(
    t_s: ArrayLike, used_bytes: ArrayLike, *, floor_bytes_per_s: float = 20_000.0, confidence: float = 0.99
) -> LeakVerdict:
    """Judge readings ``used_bytes`` [n] taken at ``t_s`` [n]. Slopes up to the floor are no leak.

    Raises ValueError for arrays of different lengths, numbers that are not finite, times that do not increase and a
    confidence outside (0.5, 1).
    """
    t, used = _checked(t_s, used_bytes)
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected more than 0.5 and less than 1")
    if len(t) < SAMPLES_MIN:
        nan = math.nan
        reason = f"{len(t)} samples: at least {SAMPLES_MIN} are needed"
        return LeakVerdict("inconclusive", nan, nan, nan, nan, nan, reason)

    warm_up = int(len(t) * WARM_UP_FRACTION)
    t, used = t[warm_up:], used[warm_up:]
    medians = _block_medians(t, used)
    slope, lower, upper = _theil_sen(*medians, confidence)
    thirds = [
        _theil_sen(*_block_medians(*third), confidence)[0]
        for third in zip(np.array_split(t, 3), np.array_split(used, 3), strict=True)
    ]
    still = sum(third <= max(0.0, GROWTH_SHARE_MIN * slope) for third in thirds)
    sure = f"at least {_mb(lower)} with {100 * confidence:g} % confidence"
    bound = f"slope {_mb(slope)}, {sure}, floor {_mb(floor_bytes_per_s)}"
    if lower <= floor_bytes_per_s:
        verdict, reason = "no_leak", f"not above the floor: {bound}"
    elif still:
        verdict, reason = "no_leak", f"grew, but not in {still} of 3 thirds: {bound}"
    else:
        verdict, reason = "leak", f"grew in every third: {bound}"
    growth_bytes = slope * float(t[-1] - t[0])
    return LeakVerdict(verdict, slope, lower, upper, growth_bytes, _stability(medians[1]), reason)


def _checked(t_s: ArrayLike, used_bytes: ArrayLike) -> tuple[Floats, Floats]:
    t, used = np.asarray(t_s, dtype=np.float64), np.asarray(used_bytes, dtype=np.float64)
    if t.ndim != 1 or t.shape != used.shape:
        raise ValueError(f"t_s has shape {t.shape}, used_bytes {used.shape}: expected the same length, one dimension")
    for name, values in (("t_s", t), ("used_bytes", used)):
        if bad := np.flatnonzero(~np.isfinite(values)).tolist():
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}: expected finite numbers")
    if bad := np.flatnonzero(np.diff(t) <= 0).tolist():
        raise ValueError(f"t_s[{bad[0] + 1}] is {t[bad[0] + 1]}, after {t[bad[0]]}: expected times that increase")
    return t, used


def _block_medians(t: Floats, used: Floats) -> tuple[Floats, Floats]:
    """Reduce to the medians, in time and value, of at most BLOCKS blocks of equal count."""
    blocks = min(BLOCKS, len(t))
    times, values = ([float(np.median(block)) for block in np.array_split(x, blocks)] for x in (t, used))
    return np.array(times), np.array(values)


def _theil_sen(t: Floats, used: Floats, confidence: float) -> tuple[float, float, float]:
    """Give the median of the slopes of all pairs, and Sen's rank-based one-sided bounds (lower, upper)."""
    first, second = np.triu_indices(len(t), k=1)
    slopes = np.sort((used[second] - used[first]) / (t[second] - t[first]))
    n = len(t)
    # The variance of Kendall's S without ties; ties would only make the interval narrower.
    half_width = NormalDist().inv_cdf(confidence) * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    rank = max(0, math.floor((len(slopes) - half_width) / 2) - 1)
    return float(np.median(slopes)), float(slopes[rank]), float(slopes[-1 - rank])


def _stability(medians: Floats) -> float:
    middle = float(np.median(medians))
    deviation = float(np.max(np.abs(medians - middle)))
    if deviation == 0:
        return 0.0
    return deviation / abs(middle) if middle else math.inf


def _mb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:+.3f} MB/s"
