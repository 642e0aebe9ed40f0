"""What separates a leak from noise: a verdict on readings of memory in use, as pure functions of numbers.

A leak is a slope whose lower bound is above a floor, kept up in every part of the run. That a warm-up saturates, that a
cache comes and goes in a rhythm, and that memory once took a step, is found in the readings and is no leak:

- Rhythm: where the readings repeat themselves, what is usual at each point of the period is taken off.
- Blocks: medians of 24 blocks of equal count (minima, for readings that were not taken at rest).
- Steps: at most two jumps between blocks that stand far out; blocks on both sides of one are not compared.
- Warm-up: what comes before the block from which on a straight line is known best, half of the run at most.
- Slope: Theil-Sen, the median of the slopes of all pairs, with Sen's rank-based bounds, taken apart at steps as the
  seasonal Kendall test is (Hirsch and Slack 1984) and widened for readings that resemble the one before (Hamed and
  Rao 1998).
- Pace: a third of the judged part that is surely slower than the whole, and does not surely grow, stands still.
- Shape: a straight line explains a leak better than every warm-up that fades within the run does.

``python -m qualification.leaks TRACE.csv`` judges a trace that was recorded anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Fewer readings than blocks are not judged.
BLOCKS = SAMPLES_MIN = 24
#: More readings become medians before anything else.
READINGS_MAX = 50 * BLOCKS
#: Where the usual time between readings is below this share of the mean, most were taken close together: those within
#: a part of the run become one, so that a second of it does not count for as much as the rest.
UNEVEN, EVEN_PARTS = 0.25, 10 * BLOCKS
#: No memory is larger, and squares of it are still numbers.
NUMBER_MAX = 1e18
#: By unit, the slopes up to which growth is no leak. A run has to exclude a slope of ``CEILING_OF_FLOOR`` times that.
FLOORS = {"s": 10_000.0, "cycle": 4_096.0}
CEILING_OF_FLOOR = 5.0
STEPS_MAX = 2
#: A rhythm that is slow for the run falls by half of what it grows, or more: so much of it is no leak yet.
FALL_SHARE_MAX = 1 / 3
#: A jump is a step where it is so many times as far from the usual one as jumps commonly are (median deviation).
STEP_DEVIATIONS = 9.0
#: Two steps up are alike where the smaller is this share of the larger: something may be lost at regular times.
STEPS_ALIKE = 0.85
#: And could be two of many where there is no room for another before or after them: so many times what lies between.
STEPS_REGULAR = 1.5
#: A part stands still where its slope is below this share of the whole's with this confidence, and not surely above
#: the floor.
PACE, PACE_CONFIDENCE, PARTS, PART_BLOCKS = 0.75, 0.97, 3, 8
#: The time constants of warm-ups that a leak is held against, as shares of the run.
FADES_WITHIN = tuple(np.geomspace(1 / 20, 1 / 4, 12).tolist())
#: Blocks after the warm-up that may have its tail in them, which is not to be taken for a slower one.
TAIL_BLOCKS = 2
#: From this autocorrelation on, a rhythm is one.
RHYTHM = 0.5
#: A rhythm that is taken off leaves less than this share, and takes so many readings to be told from chance.
RHYTHM_LEAVES, RHYTHM_READINGS_MIN = 0.7, 4 * BLOCKS
#: A later start has to make the slope's error so much smaller.
WARM_UP_GAIN = 0.8

EXIT_NO_LEAK, EXIT_LEAK, EXIT_INCONCLUSIVE = 0, 1, 2
_UNIT_OF = {"t_s": "s", "cycle": "cycle"}

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
#: A slope with its lower and upper bound.
Slope = tuple[float, float, float]


@dataclass(frozen=True)
class LeakVerdict:
    """Whether memory in use grows without end.

    ``verdict`` is "leak", "no_leak" or "inconclusive". ``slope``, and its one-sided bounds ``lower`` and ``upper``, are
    in bytes per ``unit``: "s" or "cycle". ``judged_from`` is where the warm-up ends, and ``growth_bytes`` the slope
    times the judged span. Of the readings as they are, warm-up included, are ``risen_bytes``, from the first block to
    the last, and ``stability_fraction``, the largest deviation of a block from the median of all, as a share of it.
    With too few readings the numbers are NaN; where nothing bounds a slope, its bound is infinite.
    """

    verdict: str
    slope: float
    lower: float
    upper: float
    growth_bytes: float
    risen_bytes: float
    stability_fraction: float
    judged_from: float
    unit: str
    reason: str

    @property
    def interval(self) -> Slope:
        """The slope with its bounds."""
        return self.slope, self.lower, self.upper

    def plain(self) -> dict[str, str | float | None]:
        """Give what the command prints: numbers that are not finite as None."""
        slopes = {f"slope_bytes_per_{self.unit}": self.slope, "lower": self.lower, "upper": self.upper}
        others = {
            "growth_bytes": self.growth_bytes,
            "risen_bytes": self.risen_bytes,
            "stability_fraction": self.stability_fraction,
            "judged_from": self.judged_from,
        }
        numbers = {name: value if math.isfinite(value) else None for name, value in {**slopes, **others}.items()}
        return {"verdict": self.verdict, **numbers, "reason": self.reason}


def judge(
    at: ArrayLike,
    used_bytes: ArrayLike,
    *,
    unit: str = "s",
    floor: float | None = None,
    confidence: float = 0.99,
    minima: bool = False,
) -> LeakVerdict:
    """Judge readings ``used_bytes`` [n] taken ``at`` [n] seconds or cycles.

    Growth up to ``floor``, in bytes per unit, is no leak; growth of five times that has to be excluded. ``minima`` is
    for readings that were not taken at rest. Raises ValueError for arrays of different lengths, numbers that are not
    finite, an ``at`` that does not increase, another unit, a floor below 0 and a confidence outside (0.5, 1).
    """
    raw_at, raw = _checked(at, used_bytes)
    if unit not in FLOORS:
        raise ValueError(f"unit is {unit!r}: expected one of {', '.join(FLOORS)}")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected more than 0.5 and less than 1")
    if floor is None:
        floor = FLOORS[unit]
    elif not 0 <= floor < math.inf:
        raise ValueError(f"floor is {floor}: expected at least 0 bytes per {unit}")
    readings = f"{len(raw)} readings"
    if _is_uneven(raw_at):
        part = np.floor((raw_at - raw_at[0]) / (raw_at[-1] - raw_at[0]) * EVEN_PARTS)
        begins = np.flatnonzero(np.diff(part)) + 1
        raw_at, raw = _reduced(np.split(raw_at, begins), np.split(raw, begins), minima)
        readings += f", {len(raw)} without those close together"
    if len(raw) < SAMPLES_MIN:
        nan = math.nan
        reason = f"{readings}: at least {SAMPLES_MIN} are needed"
        return LeakVerdict("inconclusive", nan, nan, nan, nan, nan, nan, nan, unit, reason)

    # More says nothing more, and takes long.
    raw_at, raw = _blocks(raw_at, raw, READINGS_MAX, minima)
    drained = _blocks(raw_at, raw, BLOCKS, minima)[1]
    at, used = raw_at, _without_rhythm(raw_at, raw)
    times, blocks = _blocks(at, used, BLOCKS, minima)
    steps = _steps(blocks)
    first = _warm_up(times, blocks, steps)
    judged = times[first:]
    segments = _segments(judged, times, steps)
    slope, lower, upper = _slope(judged, blocks[first:], segments, confidence)
    after_tail = judged[TAIL_BLOCKS:], blocks[first + TAIL_BLOCKS :], segments[TAIL_BLOCKS:]
    parts = [(*part, _segments(part[0], times, steps)) for part in _parts(at, used, times[first], minima)]
    # Slower is not still: a leak that follows the work is as slow as the work.
    bounded = [_slope(*part, PACE_CONFIDENCE) for part in parts]
    still = [part_upper < PACE * slope and part_lower <= floor for _, part_lower, part_upper in bounded]
    # A leak may begin late, so only the last part can acquit: growth that has ended is none.
    _, last_lower, last_upper = _slope(*parts[-1], confidence)
    growth_bytes = slope * float(judged[-1] - judged[0])
    fell_bytes = -sum(float(blocks[k + 1] - blocks[k]) for k in steps if k >= first)
    ceiling = CEILING_OF_FLOOR * floor

    bounds = (
        f"slope {_slope_text(slope, unit)}, with {100 * confidence:g} % confidence at least {_slope_text(lower, unit)} "
        f"and at most {_slope_text(upper, unit)}"
    )
    verdict = "inconclusive"
    if last_lower > floor and lower <= floor:
        reason = f"grows at the end, and did not from the beginning: run longer: {bounds}"
    elif lower > floor and still[-1]:
        verdict, reason = "no_leak", f"grew, and stands still at the end: {bounds}"
    elif lower > floor and any(still):
        reason = f"grew, but stood still in {sum(still)} of {PARTS} parts of the run: run longer: {bounds}"
    elif lower > floor and fell_bytes >= FALL_SHARE_MAX * growth_bytes:
        reason = f"grew, and fell at once: a slow rhythm, or a leak: run longer: {bounds}"
    elif lower > floor and _fades(*after_tail, floor, float(times[-1] - times[0])):
        reason = f"grew, and more and more slowly: a warm-up, or a leak: run longer: {bounds}"
    elif lower > floor:
        verdict, reason = "leak", f"grew in every part of the run, faster than {_slope_text(floor, unit)}: {bounds}"
    elif upper < ceiling:
        verdict, reason = "no_leak", f"not surely above {_slope_text(floor, unit)}: {bounds}"
    elif last_upper < ceiling and 2 * slope < ceiling:
        verdict, reason = "no_leak", f"at the end it grew by less than {_slope_text(ceiling, unit)}: {bounds}"
    else:
        reason = f"{_slope_text(ceiling, unit)} cannot be excluded: run longer: {bounds}"
    if verdict == "no_leak" and _rises_regularly(times, blocks, steps) > ceiling * float(times[-1] - times[0]):
        verdict = "inconclusive"
        reason = f"rose twice, by about the same: a leak that comes in steps, or none: run longer: {bounds}"
    risen_bytes = float(drained[-1] - drained[0])
    return LeakVerdict(
        *(verdict, slope, lower, upper, growth_bytes, risen_bytes),
        *(_stability(drained), float(judged[0]), unit, reason),
    )


def interval_text(interval: Slope, scale: float = 1e6) -> str:
    """Write a slope with its bounds, in so many bytes."""
    slope, lower, upper = (f"{each / scale:+.4f}" for each in interval)
    return f"{slope} [{lower}, {upper}]"


def warm_up() -> None:
    """Judge something once: NumPy takes memory of its own at first, which is not to be read as the subject's."""
    for n in (SAMPLES_MIN, 4 * SAMPLES_MIN):
        judge(np.arange(n), np.arange(n) % 5)


def _checked(at: ArrayLike, used_bytes: ArrayLike) -> tuple[Floats, Floats]:
    t, used = np.asarray(at, dtype=np.float64), np.asarray(used_bytes, dtype=np.float64)
    if t.ndim != 1 or t.shape != used.shape:
        raise ValueError(f"at has shape {t.shape}, used_bytes {used.shape}: expected the same length, one dimension")
    for name, values in (("at", t), ("used_bytes", used)):
        if bad := np.flatnonzero(~(np.abs(values) <= NUMBER_MAX)).tolist():
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}: expected finite numbers up to {NUMBER_MAX:g}")
    if bad := np.flatnonzero(np.diff(t) <= 0).tolist():
        raise ValueError(f"at[{bad[0] + 1}] is {t[bad[0] + 1]}, after {t[bad[0]]}: expected numbers that increase")
    return t, used


def _without_rhythm(at: Floats, used: Floats) -> Floats:
    """Take off what is usual at each point of the period, where there is one of at most a quarter of the run."""
    n = len(used)
    if n < RHYTHM_READINGS_MIN:
        return used
    x = np.arange(n)
    # A spike is no rhythm, and a slope neither.
    rest = np.clip(used, *np.percentile(used, [2, 98]))
    rest = rest - np.polyval(np.polyfit(x, rest, 1), x)
    spectrum = np.fft.rfft(rest, 2 * n)
    alike = np.fft.irfft(spectrum * np.conj(spectrum))[:n]
    if alike[0] <= 0:
        return used
    # Each lag has its own number of pairs.
    alike = alike / alike[0] * n / (n - x)
    below = np.flatnonzero(alike[: n // 4] < 0).tolist()
    if not below:
        return used
    readings = below[0] + int(np.argmax(alike[below[0] : n // 4 + 1]))
    if alike[readings] < RHYTHM or readings == n // 4:
        return used
    # A period that is a little wrong would leave a slope behind. Several periods say more exactly how long one is; then
    # those that differ by up to 1.5 readings in the whole run are tried, and the one that leaves least is right.
    exact = float(readings)
    for periods in range(2, int(n / 2 / readings) + 1):
        around = slice(round(periods * exact) - 1, round(periods * exact) + 2)
        exact = (around.start + int(np.argmax(alike[around]))) / periods
    period = exact * float(at[-1] - at[0]) / (n - 1)
    tried = [_usual(at, rest, period * (1 + drift / n), readings) for drift in np.linspace(-1.5, 1.5, 31)]
    usual = min(tried, key=lambda each: float(np.sum(np.abs(rest - each))))
    # What is no rhythm leaves nearly as much as there was, and would only be disturbed.
    is_rhythm = np.sum(np.abs(rest - usual)) < RHYTHM_LEAVES * np.sum(np.abs(rest))
    return used - usual if is_rhythm else used


def _usual(at: Floats, rest: Floats, period: float, points: int) -> Floats:
    """Give for each reading the median of all at the same one of so many points of the period."""
    point = np.minimum((at % period / period * points).astype(np.int64), points - 1)
    medians = [np.median(rest[point == each]) if np.any(point == each) else 0.0 for each in range(points)]
    return np.array(medians)[point]


def _blocks(at: Floats, used: Floats, blocks: int, minima: bool) -> tuple[Floats, Floats]:
    """Reduce to the medians in time, and the medians or minima in value, of at most so many blocks of equal count."""
    blocks = min(blocks, len(at))
    return _reduced(np.array_split(at, blocks), np.array_split(used, blocks), minima)


def _reduced(times: Iterable[Floats], values: Iterable[Floats], minima: bool) -> tuple[Floats, Floats]:
    reduce = np.min if minima else np.median
    return np.array([np.median(each) for each in times]), np.array([reduce(each) for each in values])


def _is_uneven(at: Floats) -> bool:
    """Say whether most readings were taken close together, in a small part of the time."""
    between = np.diff(at)
    return len(between) > 0 and bool(np.median(between) < UNEVEN * np.mean(between))


def _steps(blocks: Floats) -> list[int]:
    """Find the jumps from block k to the next that stand far out; none where there are more than one-off steps."""
    jumps = np.diff(blocks)
    deviations = np.abs(jumps - np.median(jumps))
    far = np.flatnonzero(deviations > STEP_DEVIATIONS * np.median(deviations))
    # A step inside a block is a jump to it and another from it; what takes longer is none.
    runs = [run for run in _runs(far) if len(run) <= 2]
    return [int(k) for run in runs for k in run] if len(runs) <= STEPS_MAX else []


def _runs(indices: ArrayLike) -> list[Ints]:
    """Give the runs of consecutive indices."""
    found = np.asarray(indices, dtype=np.int64)
    return [run for run in np.split(found, np.flatnonzero(np.diff(found) > 1) + 1) if len(run)]


def _rises_regularly(times: Floats, blocks: Floats, steps: Sequence[int]) -> float:
    """Give what two steps up that are alike and could be two of many rise by together; 0 where there are none."""
    between, jumps = np.diff(times), np.diff(blocks)
    # What goes on between steps is none of them.
    jumps = jumps - np.median(jumps / between) * between
    # A step inside a block is two jumps.
    runs = _runs(steps)
    if len(runs) != 2:
        return 0.0
    rises = [float(jumps[run].sum()) for run in runs]
    first, second = (float(times[run[0]]) for run in runs)
    # One before and one after would have been seen.
    regular = max(first - times[0], times[-1] - second) < STEPS_REGULAR * (second - first)
    return sum(rises) if regular and 0 < STEPS_ALIKE * max(rises) <= min(rises) else 0.0


def _segments(at: Floats, times: Floats, steps: Sequence[int]) -> Ints:
    """Say for each time after how many steps it comes."""
    return np.searchsorted([(times[k] + times[k + 1]) / 2 for k in steps], at)


def _parts(at: Floats, used: Floats, first_at: float, minima: bool) -> Iterable[tuple[Floats, Floats]]:
    """Give the blocks of each part of what was judged."""
    begin = int(np.searchsorted(at, first_at))
    # The first block's own readings begin half a block before its time.
    begin = max(0, begin - len(at) // (2 * BLOCKS))
    for part in np.array_split(np.arange(begin, len(at)), PARTS):
        yield _blocks(at[part], used[part], PART_BLOCKS, minima)


def _pairs(at: Floats, used: Floats, segments: Ints) -> tuple[Ints, Floats]:
    """Give the slopes of all pairs that no step lies between, and the first of each pair."""
    first, second = np.triu_indices(len(at), k=1)
    beside = segments[first] == segments[second]
    first, second = first[beside], second[beside]
    return first, (used[second] - used[first]) / (at[second] - at[first])


def _warm_up(times: Floats, blocks: Floats, steps: Sequence[int]) -> int:
    """Find the first block after the warm-up: from it on the slope of a straight line has the least error."""
    level = blocks.copy()
    jumps = np.diff(blocks)
    for k in steps:
        level[k + 1 :] -= jumps[k] - np.median(jumps)
    first, slopes = _pairs(times, level, np.zeros(len(times), dtype=np.int64))
    best, least = 0, math.inf
    # Half of the readings, and of the time: of 24 even blocks the middle one begins its half a little late.
    half = int(np.searchsorted(times, times[0] + 0.55 * (times[-1] - times[0]), side="right")) - 1
    for begin in range(min(len(times) // 2, half) + 1):
        rest = level[begin:] - float(np.median(slopes[first >= begin])) * times[begin:]
        rest = rest - np.median(rest)
        # The median deviation does not see a short warm-up at all, the root mean square sees a spike too well.
        spread = float(1.4826 * np.median(np.abs(rest)) + 0.1 * np.sqrt(np.mean(rest**2)))
        error = spread / len(rest) ** 1.5
        if error < WARM_UP_GAIN * least:
            best, least = begin, error
    return best


def _fades(at: Floats, used: Floats, segments: Ints, floor: float, run: float) -> bool:
    """Say whether a warm-up that fades, and no leak above the floor, leaves less of it unexplained than a line does.

    Where time is warped as the warm-up fades, that is a straight line itself.
    """
    above, since = used - floor * at, at - at[0]
    warped = (-np.exp(-since / (share * run)) for share in FADES_WITHIN)
    return min(_unexplained(each, above, segments) for each in warped) < _unexplained(at, used, segments)


def _unexplained(at: Floats, used: Floats, segments: Ints) -> float:
    """Sum up how far readings are from a straight line that goes on at another level after each step."""
    rest = used - np.median(_pairs(at, used, segments)[1]) * at
    return sum(float(np.abs(each - np.median(each)).sum()) for each in (rest[segments == k] for k in set(segments)))


def _slope(at: Floats, used: Floats, segments: Ints, confidence: float) -> Slope:
    """Give the median of the slopes of all pairs, and Sen's rank-based one-sided bounds (lower, upper)."""
    slopes = np.sort(_pairs(at, used, segments)[1])
    if len(slopes) < 3:
        return math.nan, -math.inf, math.inf
    slope = float(np.median(slopes))
    # The variance of Kendall's S without ties, segment by segment; ties would only make the interval narrower.
    variance, products, squares = 0.0, 0.0, 0.0
    for segment in np.unique(segments):
        inside = segments == segment
        n = int(inside.sum())
        variance += n * (n - 1) * (2 * n + 5) / 18
        rest = used[inside] - slope * at[inside]
        rest = rest - np.median(rest)
        products, squares = products + float(rest[1:] @ rest[:-1]), squares + float(rest @ rest)
    alike = products / squares if squares > 0 else 0.0
    # A straight line that was fitted makes its residuals look less alike than they are.
    alike = min(0.9, max(0.0, alike + (2 + 4 * alike) / len(at)))
    half_width = NormalDist().inv_cdf(confidence) * math.sqrt(variance * (1 + alike) / (1 - alike))
    # Where readings resemble each other that much, the steepest of all pairs are the bounds.
    rank = max(0, math.floor((len(slopes) - half_width) / 2) - 1)
    return slope, float(slopes[rank]), float(slopes[-1 - rank])


def _stability(blocks: Floats) -> float:
    middle = float(np.median(blocks))
    deviation = float(np.max(np.abs(blocks - middle)))
    if deviation == 0:
        return 0.0
    return deviation / abs(middle) if middle else math.inf


def _slope_text(slope: float, unit: str) -> str:
    return f"{slope / 1e6:+.4f} MB/s" if unit == "s" else f"{slope / 1e3:+.2f} kB per cycle"


def main(argv: Sequence[str] | None = None) -> int:
    """Judge a trace in a file and print the verdict as JSON; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qualification.leaks",
        description="Judge whether memory in use leaks, by readings of it: CSV with the header t_s,bytes or "
        "cycle,bytes. Prints one JSON object. Best are readings at rest: work drained, garbage collected, free memory "
        "given back.",
        epilog="exit status: 0 no leak; 1 a leak; 2 inconclusive, or a trace that cannot be judged",
        allow_abbrev=False,
    )
    parser.add_argument("trace", metavar="TRACE.csv", help="the readings; - for standard input")
    parser.add_argument("--column", default="bytes", metavar="NAME", help="the column to judge (default: %(default)s)")
    parser.add_argument(
        "--floor",
        type=float,
        metavar="BYTES",
        help=f"growth per second or cycle that is no leak (default: {FLOORS['s']:.0f} per s, "
        f"{FLOORS['cycle']:.0f} per cycle)",
    )
    parser.add_argument("--confidence", type=float, default=0.99, help="of each bound (default: %(default)s)")
    parser.add_argument("--minima", action="store_true", help="the readings were not taken at rest: judge their minima")
    options = parser.parse_args(argv)
    try:
        unit, at, used = _read(options.trace, options.column)
        found = judge(
            at, used, unit=unit, floor=options.floor, confidence=options.confidence, minima=options.minima
        ).plain()
    except (OSError, ValueError, csv.Error) as error:
        _complain(f"{parser.prog}: {options.trace}: {error}")
        found = {"verdict": "inconclusive", "reason": f"not judged: {error}"}
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed")
        print(json.dumps(found, allow_nan=False), flush=True)
    except OSError as error:
        # An exit status of 1 would say that there is a leak. What is left in the buffer would be written at the end.
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _complain(f"{parser.prog}: the verdict cannot be written: {error}")
        return EXIT_INCONCLUSIVE
    return {"no_leak": EXIT_NO_LEAK, "leak": EXIT_LEAK}.get(str(found["verdict"]), EXIT_INCONCLUSIVE)


def _complain(text: str) -> None:
    """Say it where it can be said: the exit status says it in any case."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def _read(name: str, column: str) -> tuple[str, list[float], list[float]]:
    """Give the unit and the columns of a trace. Raises OSError, ValueError that names the line."""
    if name == "-":
        if sys.stdin is None:
            raise OSError("standard input is closed")
        return _parsed(sys.stdin, column)
    with Path(name).open(encoding="utf-8-sig", newline="") as file:
        return _parsed(file, column)


def _parsed(lines: Iterable[str], column: str) -> tuple[str, list[float], list[float]]:
    rows = csv.reader(lines)
    # Standard input may begin with a byte order mark as well.
    header = [name.strip("\ufeff \t") for name in next(rows, [])]
    first = header[0] if header else ""
    if first not in _UNIT_OF or column not in header[1:]:
        expected = " or ".join(f"{name},{column}" for name in _UNIT_OF)
        raise ValueError(f"the header is {','.join(header)!r}: expected {expected}")
    index = header.index(column, 1)
    at: list[float] = []
    used: list[float] = []
    for number, row in enumerate(rows, 2):
        if not any(field.strip() for field in row):
            continue
        try:
            values = float(row[0]), float(row[index])
        except (ValueError, IndexError):
            raise ValueError(
                f"line {number} is {','.join(row)[:100]!r}: expected numbers for {first},{column}"
            ) from None
        if not all(map(math.isfinite, values)):
            raise ValueError(f"line {number} has {','.join(row)[:100]!r}: expected finite numbers")
        if at and values[0] <= at[-1]:
            raise ValueError(f"line {number}: {first} is {values[0]:g}, after {at[-1]:g}: expected it to increase")
        at.append(values[0])
        used.append(values[1])
    return _UNIT_OF[first], at, used


if __name__ == "__main__":
    raise SystemExit(main())
