"""One verdict of many series: an exact counter finds what leaks, the catch-all what no counter sees."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qualification import growth
from qualification.criteria import CRITERIA
from qualification.judge import Judge
from qualification.sampling import Sampler

Floats = NDArray[np.float64]
T_S: Floats = np.arange(0, 60, 0.25)


def _readings(**slopes: float) -> dict[str, tuple[Floats, Floats]]:
    """Give series of these slopes in MB/s, with a little noise."""
    rng = np.random.default_rng(1)
    return {name: (T_S, 1e8 + slope * 1e6 * T_S + rng.normal(0, 5e4, len(T_S))) for name, slope in slopes.items()}


def test_a_leak_in_an_exact_counter_is_one_whatever_the_others_say() -> None:
    found = growth.judge_series(_readings(uss_bytes=0.05, heap_used_bytes=0.05, device_used_bytes=0))
    assert (found.worst.verdict, found.series) == ("leak", "heap_used_bytes"), f"{found}"
    assert found.leaking == ["heap_used_bytes"] and "heap in use: grew in every part" in found.reason


@pytest.mark.parametrize(("slope", "verdict"), [(0.08, "no_leak"), (0.5, "leak")])
def test_the_catch_all_alone_leaks_only_beyond_fragmentation(slope: float, verdict: str) -> None:
    """5 MB in a minute are what a busy heap looks like; 30 MB are not, and it is said that no counter saw them."""
    found = growth.judge_series(_readings(uss_bytes=slope, heap_used_bytes=0))
    assert found.worst.verdict == verdict, f"{found}"
    assert ("no exact counter" in found.reason) == (verdict == "leak"), found.reason


def test_the_device_gets_the_same_verdict_as_the_host() -> None:
    found = growth.judge_series(_readings(uss_bytes=0, heap_used_bytes=0, device_used_bytes=0.05))
    assert (found.worst.verdict, found.series) == ("leak", "device_used_bytes"), f"{found}"


def test_a_card_of_our_own_is_a_catch_all() -> None:
    found = growth.judge_series(_readings(uss_bytes=0, device_used_bytes=0, card_used_bytes=0.5))
    assert found.leaking == ["card_used_bytes"] and "no exact counter" in found.reason, f"{found}"


def test_what_is_open_needs_more_readings() -> None:
    """Too few of them, a verdict that is none, or a limit inside the interval."""
    few = growth.judge_series({"uss_bytes": (T_S[:5], 1e8 + T_S[:5])})
    assert few.worst.verdict == "inconclusive" and few.is_open(1e6) and math.isnan(few.upper)
    steady = growth.judge_series(_readings(uss_bytes=0, heap_used_bytes=0))
    assert not steady.is_open(1e6), f"{steady}"
    growing = growth.judge_series(_readings(uss_bytes=1.0, heap_used_bytes=0))
    assert growing.is_open(1e6) and not growing.is_open(1e6, exact=True) and not growing.is_open(0.5e6), f"{growing}"


def test_nothing_read_is_no_verdict() -> None:
    found = growth.judge_series({"uss_bytes": ([], [])})
    assert (found.worst.verdict, found.span) == ("inconclusive", 0.0), f"{found}"


@pytest.fixture
def judge() -> Judge:
    return _judge()


def _judge() -> Judge:
    test = "test_sustained_high_memory_usage"
    return Judge(test, [each for each in CRITERIA if each.test == test], lambda **_: None)


def _leaking_sampler(bytes_each: int) -> tuple[Sampler, list[bytearray]]:
    sampler, kept = Sampler(), list[bytearray]()
    for _ in range(30):
        kept.append(bytearray(b"x") * bytes_each)
        sampler.sample()
    return sampler, kept


def say_a_leak() -> tuple[str, int]:
    """Leak in this process; give what is told of it, and how many blocks were kept."""
    sampler, kept = _leaking_sampler(400_000)
    found, judge = growth.judge(sampler, unit="cycle"), _judge()
    judge("leak_detected", len(found.leaking))
    growth.tell(judge, sampler, found, lambda: ["looked into"])
    return "\n".join([*judge.evidence, judge.complaint]), len(kept)


def test_a_leak_is_told_with_its_four_lines_the_table_and_where_it_comes_from(in_child: Callable[[str], Any]) -> None:
    """In a child: what it maps this process maps too. Else its USS falls by the libraries as another process begins."""
    said, kept = in_child("import json; from tests.unit.test_growth import say_a_leak; print(json.dumps(say_a_leak()))")
    for pattern in (
        r"Leak detected: True",
        r"Growth rate: (39\d|40\d)\.\d+ kB per cycle",
        r"Total growth: 1[12]\.\d MB",
        r"Memory leak detected!\n\nwhat ",
        r"heap in use .* MB .* MB +\+1[12]\.\d MB .* leak",
        r"  of it in \S+, process \d+ ",
        r"\ndescriptors +\d+ +\d+ +[+-]\d+",
        r"looked into$",
    ):
        assert re.search(pattern, said), f"nothing says {pattern}, with {kept} blocks kept:\n{said}"


def test_what_is_healthy_is_not_looked_into(judge: Judge) -> None:
    sampler, _ = _leaking_sampler(1)

    def looked_into() -> Any:
        pytest.fail("there is no leak to look into")

    growth.tell(judge, sampler, growth.judge(sampler, unit="cycle"), looked_into)
    assert not judge.complaint and "Leak detected: False" in "\n".join(judge.evidence)


def test_growth_that_failed_is_looked_into_whatever_the_verdict_on_leaks(judge: Judge) -> None:
    """A rate above its limit is no proved leak where the readings leave that open."""
    sampler, kept = _leaking_sampler(400_000)
    few = growth.judge_series({"uss_bytes": ([0.0], [1.0])}, unit="cycle")
    judge("growth_rate", 5.0)
    growth.tell(judge, sampler, few, lambda: ["looked into"])
    assert few.worst.verdict == "inconclusive" and judge.evidence[-1].endswith("looked into"), (
        f"{len(kept)} blocks kept"
    )
    assert not judge.complaint


def test_a_leak_that_failed_no_criterion_is_no_complaint(judge: Judge) -> None:
    """A test that judges something else fails for that."""
    sampler, kept = _leaking_sampler(400_000)
    growth.tell(judge, sampler, growth.judge(sampler, unit="cycle"), lambda: ["looked into"])
    assert not judge.complaint and "Leak detected: True" in "\n".join(judge.evidence), f"{len(kept)} blocks kept"


def test_what_rose_counts_as_growth_whatever_it_was() -> None:
    """A step of 500 MB is no leak, and no slope; it is 500 MB more."""
    readings = {"uss_bytes": (T_S, 1e8 + 5e8 * (T_S > 30) + np.random.default_rng(0).normal(0, 1e4, len(T_S)))}
    found = growth.judge_series(readings)
    assert found.worst.verdict == "no_leak" and found.total_bytes == pytest.approx(5e8, rel=0.01), f"{found}"


def test_cycles_are_counted_by_the_samples() -> None:
    """A sample for every four cycles: a quarter of the growth for each."""
    sampler, kept = _leaking_sampler(400_000)
    one, four = (growth.judge(sampler, unit="cycle", cycles_a_sample=n) for n in (1, 4))
    assert one.span == 29 and four.span == 4 * 29
    heap = "heap_used_bytes" if "heap_used_bytes" in one.verdicts else "uss_bytes"
    ratio = one.verdicts[heap].slope / four.verdicts[heap].slope
    assert ratio == pytest.approx(4), f"{len(kept)} blocks, slopes as {ratio} to 1"
