"""What grew in a run: the verdicts on every series of its sampler, and the table that says what it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qualification import leaks
from qualification.host import MB
from qualification.judge import Judge
from qualification.sampling import MEMORY, Sampler

#: Of one verdict among several: a leak is one whatever the others say, and what is open is not proved.
_WORST_FIRST = ("leak", "inconclusive", "no_leak")
_EXACT = ("heap_used_bytes", "workers_heap_bytes", "device_used_bytes")
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
        """The series with the worst verdict; of several, the one that grew most."""
        by_verdict = {name: _WORST_FIRST.index(each.verdict) for name, each in self.verdicts.items()}
        return min(by_verdict, key=lambda name: (by_verdict[name], -_number(self.verdicts[name].slope)))

    @property
    def worst(self) -> leaks.LeakVerdict:
        """The worst verdict."""
        return self.verdicts[self.series]

    @property
    def slope(self) -> float:
        """The slope of the series that grew fastest, bytes per second or cycle; NaN before there is a verdict."""
        return max((each.slope for each in self.verdicts.values()), key=_number)

    @property
    def upper(self) -> float:
        """The highest of the upper bounds: no series grows faster. NaN before there is a verdict."""
        return max((each.upper for each in self.verdicts.values()), key=lambda x: math.inf if math.isnan(x) else x)

    @property
    def lower(self) -> float:
        """The highest of the lower bounds: one series grows at least so fast."""
        return max((each.lower for each in self.verdicts.values()), key=_number)

    @property
    def stability_fraction(self) -> float:
        """The largest deviation of all memory of the host from its median, as a share of it."""
        return self.verdicts["uss_bytes"].stability_fraction

    def is_open(self, limit: float) -> bool:
        """Whether more readings are needed: for a verdict, or to compare the growth with a limit per unit."""
        open_ = self.worst.verdict == "inconclusive"
        return open_ or any(each.growth_rate_is_below(limit) is None for each in self.verdicts.values())

    @property
    def reason(self) -> str:
        """Say what the worst verdict rests on."""
        where = MEMORY[self.series]
        if self.worst.verdict == "leak" and not any(
            self.verdicts[name].verdict == "leak" for name in _EXACT if name in self.verdicts
        ):
            where += ", and no exact counter: fragmentation, or memory that none of them sees"
        return f"{where}: {self.worst.reason}"


def judge(
    sampler: Sampler,
    *,
    unit: str = "s",
    cycles_a_sample: int = 1,
    minima: bool = False,
    floor: float | None = None,
    confidence: float = 0.99,
) -> Growth:
    """Judge each series of memory that says something about the subject, per second or per cycle.

    ``minima`` is for a subject that cannot be brought to rest, ``floor`` as in ``leaks.judge``.
    """
    scale = cycles_a_sample if unit == "cycle" else 1
    found = {name: sampler.readings(name, unit) for name in sampler.memory_series}
    readings = {name: (at * scale, used) for name, (at, used) in found.items()}
    verdicts = {
        name: leaks.judge(at, used, unit=unit, floor=floor, minima=minima, confidence=confidence)
        for name, (at, used) in readings.items()
    }
    at = readings["uss_bytes"][0]
    return Growth(verdicts, float(at[-1] - at[0]) if len(at) else 0.0)


def so_far(sampler: Sampler) -> float | None:
    """Give the slope of all memory of the host in bytes/s, as it stands; None before there is a verdict."""
    at, used = sampler.readings("uss_bytes")
    slope = leaks.judge(at, used).slope
    return None if math.isnan(slope) else slope


def tell(judge: Judge, sampler: Sampler, growth: Growth, looked_into: Callable[[], list[str]]) -> None:
    """Give the evidence: of a leak as the first lines of a failure, then what grew, and what that consists of.

    ``looked_into`` is only called where there is a leak.
    """
    leaked = growth.worst.verdict == "leak"
    per, scale = ("MB/s", MB) if growth.worst.unit == "s" else ("kB per cycle", 1e3)
    judge.say("📊 Results:")
    judge.say(f"  Leak detected: {leaked}")
    judge.say(f"  Growth rate: {growth.worst.slope / scale:.3f} {per}")
    judge.say(f"  Total growth: {growth.worst.slope * growth.span / MB:.1f} MB")
    judge.say(f"  {growth.reason}")
    if leaked:
        judge.complaint = "\n".join(["Memory leak detected!", "", *table(sampler, growth), *looked_into()])
    else:
        judge.say("\n".join(["", *table(sampler, growth)]))


def table(sampler: Sampler, growth: Growth) -> list[str]:
    """Say what grew: each counter, with its verdict; each process; descriptors, threads and children."""
    unit = growth.worst.unit
    per, scale = ("MB/s", MB) if unit == "s" else ("kB per cycle", 1e3)
    lines = [f"{'what':<40} {'first':>10} {'last':>10} {'grown':>10}   slope [at least, at most] in {per}"]
    for name, verdict in growth.verdicts.items():
        used = sampler.readings(name, unit)[1]
        first, last = int(used[0]), int(used[-1])
        slope, lower, upper = (each / scale for each in (verdict.slope, verdict.lower, verdict.upper))
        lines.append(
            f"{MEMORY[name]:<40} {first / MB:>7.1f} MB {last / MB:>7.1f} MB {(last - first) / MB:>+7.1f} MB   "
            f"{slope:+.4f} [{lower:+.4f}, {upper:+.4f}] {verdict.verdict.replace('_', ' ')}"
        )
    grew = [
        (last_of.uss_bytes - first_of.uss_bytes, first_of, last_of) for first_of, last_of in sampler.processes.values()
    ]
    for grown_bytes, first_of, last_of in sorted(grew, key=lambda each: -each[0])[:PROCESSES_SHOWN]:
        if grown_bytes >= PROCESS_BYTES_MIN:
            name = "".join(c if c.isprintable() else "?" for c in last_of.name)
            lines.append(
                f"{f'  of it in {name}, process {last_of.process_id}':<40} {first_of.uss_bytes / MB:>7.1f} MB "
                f"{last_of.uss_bytes / MB:>7.1f} MB {grown_bytes / MB:>+7.1f} MB"
            )
    for name in _COUNTS:
        counted = sampler.series(name)[1]
        first, last = int(counted[0]), int(counted[-1])
        lines.append(f"{name:<40} {first:>10} {last:>10} {last - first:>+10}")
    return lines


def _number(value: float) -> float:
    """Order what is no number before everything."""
    return -math.inf if math.isnan(value) else value
