"""What grew in a run: the verdicts on every series of its sampler, and the table that says what it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qualification import leaks
from qualification.host import MB
from qualification.judge import Judge
from qualification.quoting import printable
from qualification.sampling import MEMORY, Sampler

#: Of one verdict among several: a leak is one whatever the others say, and what is open is not proved.
_WORST_FIRST = ("leak", "inconclusive", "no_leak")
#: The series that count what is in use, and so do not see free memory that is kept: a heap in pieces, say.
EXACT = ("heap_used_bytes", "workers_heap_bytes", "device_used_bytes")
#: So much may become fragmented in a run: measured with arrays of up to 50 MB that come and go, up to 6 MB in 60 s.
FRAGMENTATION_BYTES = 10e6
_OF_LEAKS = ("leak_detected", "growth_rate", "growth_per_cycle", "total_growth")
#: By the unit of a slope, what it is shown in, and how many bytes that is.
_SHOWN = {"s": ("MB/s", MB), "cycle": ("kB per cycle", 1_000)}
#: Processes that grew by less are not shown, and of those that did only the first.
PROCESS_BYTES_MIN, PROCESSES_SHOWN = 100_000, 5
#: What the processes have beside memory.
_COUNTS = ("descriptors", "threads", "children")


@dataclass(frozen=True)
class Growth:
    """The verdicts on the series of memory of one run, by name, and how long it was in seconds or cycles."""

    verdicts: Mapping[str, leaks.LeakVerdict]
    span: float

    @property
    def series(self) -> str:
        """The series with the worst verdict; of several an exact counter, and of those the one that grew most."""

        def rank(name: str) -> tuple[int, bool, float]:
            verdict = self.verdicts[name]
            return _WORST_FIRST.index(verdict.verdict), name not in EXACT, -_number(verdict.slope)

        return min(self.verdicts, key=rank)

    @property
    def worst(self) -> leaks.LeakVerdict:
        """The worst verdict."""
        return self.verdicts[self.series]

    @property
    def unproved(self) -> str:
        """Why it is not proved that nothing leaks, where nothing is found to."""
        return f"inconclusive: {self.reason}" if self.worst.verdict == "inconclusive" else ""

    @property
    def leaking(self) -> list[str]:
        """The series that leak."""
        return [name for name, each in self.verdicts.items() if each.verdict == "leak"]

    @property
    def upper(self) -> float:
        """The highest of the upper bounds: no series grows faster. NaN before there is a verdict."""
        return max((each.upper for each in self.verdicts.values()), key=_unknown_first)

    @property
    def exact_upper(self) -> float:
        """The highest of the exact counters' upper bounds; of all, where there is no exact counter of the heap."""
        known = (
            [name for name in EXACT if name in self.verdicts] if "heap_used_bytes" in self.verdicts else self.verdicts
        )
        return max((self.verdicts[name].upper for name in known), key=_unknown_first)

    @property
    def lower(self) -> float:
        """The highest of the lower bounds: one series grows at least so fast."""
        return max((each.lower for each in self.verdicts.values()), key=_number)

    @property
    def total_bytes(self) -> float:
        """How much a series may have grown at most: its upper bound over the run, or what it has risen by, if more."""
        totals = [max(each.upper * self.span, each.risen_bytes) for each in self.verdicts.values()]
        return max(totals, key=_unknown_first)

    @property
    def stability_fraction(self) -> float:
        """The largest deviation of all memory of the host from its median, as a share of it."""
        return self.verdicts["uss_bytes"].stability_fraction

    def is_open(self, limit: float, *, exact: bool = False) -> bool:
        """Whether more readings are needed: for a verdict, or to compare the growth with a limit per unit.

        Only that of the ``exact`` counters is compared, if so asked.
        """
        upper = self.exact_upper if exact else self.upper
        return self.worst.verdict == "inconclusive" or (upper >= limit and self.lower < limit)

    @property
    def reason(self) -> str:
        """Say what the worst verdict rests on."""
        where = MEMORY[self.series]
        if self.worst.verdict == "leak" and not any(
            self.verdicts[name].verdict == "leak" for name in EXACT if name in self.verdicts
        ):
            where += ", and no exact counter: fragmentation, or memory that none of them sees"
        return f"{where}: {self.worst.reason}"


def judge(sampler: Sampler, *, unit: str = "s", cycles_a_sample: int = 1, **options: Any) -> Growth:
    """Judge each series of memory that says something about the subject, per second or per cycle.

    Options are those of ``judge_series``.
    """
    scale = cycles_a_sample if unit == "cycle" else 1
    found = {name: sampler.readings(name, unit) for name in sampler.memory_series}
    return judge_series({name: (at * scale, used) for name, (at, used) in found.items()}, unit=unit, **options)


def judge_series(
    readings: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    unit: str = "s",
    minima: bool = False,
    floor: float | None = None,
    confidence: float = 0.99,
) -> Growth:
    """Judge series of memory, by name, as (seconds or cycles [n], bytes [n]).

    ``minima`` is for a subject that cannot be brought to rest, ``floor`` as in ``leaks.judge``. What a catch-all grows
    by in a run, alone and up to FRAGMENTATION_BYTES, is no leak.
    """
    floor = leaks.FLOORS[unit] if floor is None else floor
    spans = {name: float(np.ptp(at)) if np.size(at) else 0.0 for name, (at, _) in readings.items()}
    verdicts = {}
    for name, (at, used) in readings.items():
        alone = FRAGMENTATION_BYTES / spans[name] if name not in EXACT and spans[name] else 0.0
        verdicts[name] = leaks.judge(at, used, unit=unit, floor=max(floor, alone), minima=minima, confidence=confidence)
    return Growth(verdicts, max(spans.values()))


def interval_so_far(sampler: Sampler) -> leaks.Slope | None:
    """Give the slope of all memory of the host in bytes/s, with its bounds, as it stands; None before there is one."""
    at, used = sampler.readings("uss_bytes")
    interval = leaks.judge(at, used).interval
    return None if math.isnan(interval[0]) else interval


def so_far(sampler: Sampler) -> float | None:
    """Give that slope alone."""
    interval = interval_so_far(sampler)
    return None if interval is None else interval[0]


def tell(judge: Judge, sampler: Sampler, growth: Growth, looked_into: Callable[[], list[str]]) -> None:
    """Give the evidence: of a leak as the first lines of a failure, then what grew, and what that consists of.

    Last, when everything was judged: ``looked_into`` takes its time. It is only called where growth failed the test.
    """
    leaked = growth.worst.verdict == "leak"
    failed = any(each.criterion.name in _OF_LEAKS for each in judge.failed)
    per, scale = _SHOWN[growth.worst.unit]
    judge.say("📊 Results:")
    judge.say(f"  Leak detected: {leaked}")
    judge.say(f"  Growth rate: {growth.worst.slope / scale:.3f} {per}")
    judge.say(f"  Total growth: {growth.worst.risen_bytes / MB:.1f} MB")
    judge.say(f"  {growth.reason}")
    grew = ["", *table(sampler, growth), *(looked_into() if failed else [])]
    if leaked and failed:
        judge.complaint = "\n".join(["Memory leak detected!", *grew])
    else:
        judge.say("\n".join(grew))


def table(sampler: Sampler, growth: Growth) -> list[str]:
    """Say what grew: each counter, with its verdict; each process; descriptors, threads and children."""
    unit = growth.worst.unit
    per, scale = _SHOWN[unit]
    lines = [f"{'what':<40} {'first':>10} {'last':>10} {'grown':>10}   slope [at least, at most] in {per}"]
    for name, verdict in growth.verdicts.items():
        used = sampler.readings(name, unit)[1]
        first, last = int(used[0]), int(used[-1])
        lines.append(
            f"{MEMORY[name]:<40} {first / MB:>7.1f} MB {last / MB:>7.1f} MB {(last - first) / MB:>+7.1f} MB   "
            f"{leaks.interval_text(verdict.interval, scale)} {verdict.verdict.replace('_', ' ')}"
        )
    grew = [
        (last_of.uss_bytes - first_of.uss_bytes, first_of, last_of) for first_of, last_of in sampler.processes.values()
    ]
    for grown_bytes, first_of, last_of in sorted(grew, key=lambda each: -each[0])[:PROCESSES_SHOWN]:
        if grown_bytes >= PROCESS_BYTES_MIN:
            name = printable(last_of.name, "?")
            lines.append(
                f"{f'  of it in {name}, process {last_of.process_id}':<40} {first_of.uss_bytes / MB:>7.1f} MB "
                f"{last_of.uss_bytes / MB:>7.1f} MB {grown_bytes / MB:>+7.1f} MB"
            )
    for name in _COUNTS:
        counted = sampler.series(name)[1]
        first, last = int(counted[0]), int(counted[-1])
        lines.append(f"{name:<40} {first:>10} {last:>10} {last - first:>+10}")
    return lines


def _unknown_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _number(value: float) -> float:
    """Order what is no number before everything."""
    return -math.inf if math.isnan(value) else value
