"""Readings of memory that nothing was measured for: scripted shapes, and noise of live runs put together anew.

Both carry a planted line or none, so there is no doubt about what the verdict should be. And exact bounds for counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qualification import growth

MB = 1_000_000
SAMPLES, EVERY_S = 240, 0.25
DURATION_S = SAMPLES * EVERY_S
#: With so many a run is judged again that was inconclusive: as our tests do, it is extended once by its own length.
SAMPLES_EXTENDED = 2 * SAMPLES
#: What a reading is a multiple of: what allocators round to, and ask for at once. Exact counters know nothing coarser.
QUANTA_BYTES = (16, 512, 4_096, 65_536)
#: Samples that stay together when noise is put together anew: 5 s of it.
BOOTSTRAP_BLOCK = 20
#: Of a live run's trace, what is its warm-up and no noise.
WARM_UP_SHARE = 0.2
#: Where memory that is kept in this process shows.
LEAKED = ("heap_used_bytes", "uss_bytes")

Floats = NDArray[np.float64]
Shape = Callable[[Floats, np.random.Generator], Floats]
#: What a trace is called, when its readings were taken, and by series the bytes in use.
Trace = tuple[str, Floats, dict[str, Floats]]
#: The noise of live runs, each with its workload, and by series.
Noise = Sequence[tuple[str, dict[str, Floats]]]


# Shapes: what healthy memory does, in bytes above its base.


def steady(t_s: Floats, rng: np.random.Generator) -> Floats:
    """Nothing but noise."""
    return np.zeros_like(t_s)


def saturating(t_s: Floats, rng: np.random.Generator) -> Floats:
    """A warm-up that fades, with a time constant of 1 to 8 s."""
    return np.asarray(rng.uniform(1, 40) * MB * (1 - np.exp(-t_s / rng.uniform(1, 8))))


def ramp(t_s: Floats, rng: np.random.Generator) -> Floats:
    """A warm-up in a straight line that ends before 40 % of the run."""
    return np.asarray(rng.uniform(1, 40) * MB * np.minimum(1, t_s / (rng.uniform(0.05, 0.4) * DURATION_S)))


def step_up(t_s: Floats, rng: np.random.Generator) -> Floats:
    """One step up, anywhere."""
    return np.asarray(rng.uniform(0.5, 20) * MB * (t_s >= rng.uniform(0.02, 0.98) * DURATION_S))


def step_down(t_s: Floats, rng: np.random.Generator) -> Floats:
    """One step down, anywhere: beside a leak, what a rhythm looks like that is slow for the run."""
    return -step_up(t_s, rng)


def sawtooth(t_s: Floats, rng: np.random.Generator) -> Floats:
    """A cache that fills up and is emptied, every 2 to 15 s."""
    return np.asarray(rng.uniform(0.5, 20) * MB * ((t_s / rng.uniform(2, 15) + rng.uniform()) % 1))


def bursts(t_s: Floats, rng: np.random.Generator) -> Floats:
    """Rare tall spikes of some samples, 1 to 10 in the time of a run."""
    used = np.zeros_like(t_s)
    for _ in range(rng.integers(1, 11) * len(t_s) // SAMPLES):
        begin = rng.integers(len(t_s))
        used[begin : begin + rng.integers(1, 7)] += rng.uniform(1, 50) * MB
    return used


def two(t_s: Floats, rng: np.random.Generator) -> Floats:
    """Two of the others at once, but for a step down."""
    first, second = (SHAPES[n] for n in rng.choice(range(1, 6), 2, replace=False))
    return np.asarray(first(t_s, rng) + second(t_s, rng))


SHAPES: tuple[Shape, ...] = (steady, saturating, ramp, step_up, sawtooth, bursts, two, step_down)


def noise(samples: int, rng: np.random.Generator) -> Floats:
    """Give what allocators add, in bytes: each reading resembles the one before, with a deviation of 0.02 to 0.3 MB.

    By up to 0.8, as the live set of the noisy workload has it.
    """
    alike = rng.uniform(0, 0.8)
    fresh = rng.normal(0, math.sqrt(1 - alike**2), samples)
    fresh[0] = rng.normal()
    used = np.empty(samples)
    last = 0.0
    for n, each in enumerate(fresh):
        last = used[n] = alike * last + each
    return used * math.exp(rng.uniform(math.log(0.02), math.log(0.3))) * MB


# Traces.


def scripted(number: int, rate: float, seed: int) -> Trace:
    """Give a scripted trace of an exact counter that leaks ``rate`` bytes/s, extended once, named after its shape.

    The shapes take turns. The same number and seed give the same shape and noise, whatever the rate.
    """
    rng = np.random.default_rng([seed, number])
    shape = SHAPES[number % len(SHAPES)]
    t_s = np.arange(SAMPLES_EXTENDED) * EVERY_S + rng.uniform(0, 0.05, SAMPLES_EXTENDED)
    used: Floats = rng.uniform(50, 800) * MB + shape(t_s, rng) + noise(SAMPLES_EXTENDED, rng) + rate * t_s
    quantum = rng.choice(QUANTA_BYTES)
    return shape.__name__, t_s, {LEAKED[0]: np.round(used / quantum) * quantum}


def residuals(t_s: Floats, used_bytes: Floats) -> Floats:
    """Give a live healthy run's noise: without its warm-up, and without the straight line through the rest."""
    after = t_s >= t_s[0] + WARM_UP_SHARE * (t_s[-1] - t_s[0])
    t_s, used = t_s[after], used_bytes[after]
    return np.asarray(used - np.polyval(np.polyfit(t_s, used, 1), t_s))


def resampled(live: Noise, number: int, rate: float, seed: int) -> Trace:
    """Give a trace made of blocks of one live run's noise, in another order, that leaks ``rate`` bytes/s.

    It is extended once.
    """
    rng = np.random.default_rng([seed, number])
    name, noise_of = live[number % len(live)]
    readings = min(map(len, noise_of.values()))
    begins = rng.integers(readings, size=-(-SAMPLES_EXTENDED // BOOTSTRAP_BLOCK))
    # Round and round, so that the ends are drawn as often as the middle; the same for all series of the run.
    picked = (begins[:, None] + np.arange(BOOTSTRAP_BLOCK)).ravel()[:SAMPLES_EXTENDED] % readings
    t_s = np.arange(SAMPLES_EXTENDED, dtype=np.float64) * EVERY_S
    used = {each: 100 * MB + rest[picked] + rate * t_s * (each in LEAKED) for each, rest in noise_of.items()}
    return name, t_s, used


# Counts.


@dataclass(frozen=True)
class Counted:
    """How the verdicts on so many traces of one rate, in bytes/s, came out: by name of the shape, by verdict.

    ``extended`` are those after the inconclusive ones were extended once.
    """

    label: str
    rate: float
    verdicts: dict[str, dict[str, int]]
    extended: dict[str, dict[str, int]]

    def add(self, name: str, verdict: str, extended: str) -> None:
        """Count a trace."""
        for counts, found in ((self.verdicts, verdict), (self.extended, extended)):
            of_name = counts.setdefault(name, {})
            of_name[found] = of_name.get(found, 0) + 1


def total(verdicts: Mapping[str, Mapping[str, int]], verdict: str = "") -> int:
    """Count the traces with a verdict, or all of them."""
    return sum(n for each in verdicts.values() for name, n in each.items() if verdict in ("", name))


def judge_one(
    make: Callable[[int, float, int], Trace], seed: int, asked: tuple[int, float]
) -> tuple[float, str, str, str]:
    """Judge one trace; give its rate, its name, the verdict, and the one after it was extended, if inconclusive."""
    number, rate = asked
    name, t_s, series = make(number, rate, seed)

    def verdict(samples: int) -> str:
        read = {each: (t_s[:samples], used[:samples]) for each, used in series.items()}
        return growth.judge_series(read).worst.verdict

    first = verdict(SAMPLES)
    return rate, name, first, verdict(SAMPLES_EXTENDED) if first == "inconclusive" else first


def count(traces: int, rates: Sequence[float], seed: int, live: Noise = (), jobs: int | None = None) -> list[Counted]:
    """Judge so many traces of each rate in bytes/s: scripted ones, and resampled ones where there is ``live`` noise."""
    makes: dict[str, Callable[[int, float, int], Trace]] = {"scripted": scripted}
    if live:
        makes["resampled"] = partial(resampled, live)
    asked = [(number, rate) for rate in rates for number in range(traces)]
    found: list[Counted] = []
    with ProcessPoolExecutor(jobs or min(2, os.cpu_count() or 1)) as pool:
        for label, make in makes.items():
            counted = {rate: Counted(label, rate, {}, {}) for rate in rates}
            for rate, *verdicts in pool.map(partial(judge_one, make, seed), asked, chunksize=50):
                counted[rate].add(*verdicts)
            found += counted.values()
    return found


def clopper_pearson(hits: int, tries: int, confidence: float = 0.99) -> tuple[float, float]:
    """Give the exact two-sided bounds of the probability behind so many hits in so many tries.

    Raises ValueError for hits that are not among the tries, and for no tries.
    """
    if not 0 <= hits <= tries or tries == 0:
        raise ValueError(f"{hits} hits in {tries} tries: expected at least one try, and no more hits than tries")
    outside = (1 - confidence) / 2
    # With the lower bound's probability so many hits or more are that rare; with the upper one's, so many or fewer.
    lower = 0.0 if hits == 0 else _bisected(lambda p: 1 - _at_most(hits - 1, tries, p) < outside)
    upper = 1.0 if hits == tries else _bisected(lambda p: _at_most(hits, tries, p) > outside)
    return lower, upper


def _at_most(hits: int, tries: int, probability: float) -> float:
    """Give the probability of at most so many hits."""
    if probability in (0.0, 1.0):
        return float(probability == 0.0 or hits >= tries)
    ways, yes, no = math.lgamma(tries + 1), math.log(probability), math.log1p(-probability)
    return math.fsum(
        math.exp(ways - math.lgamma(k + 1) - math.lgamma(tries - k + 1) + k * yes + (tries - k) * no)
        for k in range(hits + 1)
    )


def _bisected(is_below: Callable[[float], bool]) -> float:
    """Find the probability up to which something holds."""
    below, above = 0.0, 1.0
    for _ in range(50):
        middle = (below + above) / 2
        below, above = (middle, above) if is_below(middle) else (below, middle)
    return (below + above) / 2
