"""The benchmark's statistics on numbers that are known, its refusals, and that it measures at all.

Benchmarks are run, not imported: nothing of ours depends on them (test_arrows.py).
"""

from __future__ import annotations

import math
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
PAIRS = runpy.run_path(str(ROOT / "benchmarks" / "pairs.py"))
Interval, Limit, Verdict = PAIRS["Interval"], PAIRS["Limit"], PAIRS["Verdict"]
median_interval, in_turn, compare, table = (PAIRS[each] for each in ("median_interval", "in_turn", "compare", "table"))

without_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="not run: there is no C compiler"
)


# The interval of a median.


@pytest.mark.parametrize(
    ("n", "rank"),
    # The ranks that textbooks tabulate for 95 %.
    [(6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (25, 8), (50, 18), (100, 40)],
)
def test_the_bounds_are_the_order_statistics_of_the_binomial(n: int, rank: int) -> None:
    shuffled = np.random.default_rng(n).permutation(np.arange(1, n + 1))
    assert median_interval(shuffled) == Interval((n + 1) / 2, rank, n + 1 - rank)


def test_the_interval_covers_the_truth_as_often_as_it_promises() -> None:
    rng = np.random.default_rng(11)
    # Skewed, as latencies are: the true median is 1.
    found = [median_interval(rng.lognormal(0.0, 1.0, 100)) for _ in range(1000)]
    missed = sum(not each.lower <= 1.0 <= each.upper for each in found)
    assert 20 <= missed <= 65, f"{missed} of 1000 intervals at 95 % miss the truth"


def test_more_confidence_is_a_wider_interval_and_thousands_of_pairs_are_no_overflow() -> None:
    values = np.arange(5000.0)
    narrow, wide = median_interval(values, 0.9), median_interval(values, 0.999)
    assert wide.lower < narrow.lower < narrow.median < narrow.upper < wide.upper


@pytest.mark.parametrize(
    ("values", "confidence", "message"),
    [
        ([1.0] * 5, 0.95, "5 pairs: expected at least 6 for an interval at 95%"),
        ([], 0.95, "0 pairs"),
        ([1.0] * 10, 0.999, "10 pairs: expected at least 11"),
        ([1.0] * 9 + [math.nan], 0.95, "1 of 10 values are not finite"),
        ([[1.0, 2.0]], 0.95, r"shape \(1, 2\): expected one dimension"),
        ([1.0] * 9, 1.0, "confidence is 1.0"),
    ],
)
def test_bad_numbers_are_refused(values: list[float], confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        median_interval(values, confidence)


# The verdict.


@pytest.mark.parametrize(
    ("limit", "lower", "upper", "verdict"),
    [
        (Limit(1.0), 0.8, 1.0, "pass"),
        (Limit(1.0), 0.8, 1.1, "inconclusive"),
        (Limit(1.0), 1.0, 1.1, "inconclusive"),
        (Limit(1.0), 1.01, 1.1, "fail"),
        (Limit(0.95, at_most=False), 0.95, 0.97, "pass"),
        (Limit(0.95, at_most=False), 0.94, 0.97, "inconclusive"),
        (Limit(0.95, at_most=False), 0.90, 0.94, "fail"),
    ],
)
def test_only_a_whole_interval_passes_or_fails(limit: object, lower: float, upper: float, verdict: str) -> None:
    judged = limit.judge(Interval((lower + upper) / 2, lower, upper))  # type: ignore[attr-defined]
    assert judged.value == verdict


# Pairs.


def test_the_sides_take_turns_and_either_begins_in_half_of_the_pairs() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, base: float) -> Callable[[int], float]:
        def measured(pair: int) -> float:
            calls.append((name, pair))
            return base + pair

        return measured

    measured = in_turn(side("a", 0.0), side("b", 100.0), 20, np.random.default_rng(3))
    assert np.array_equal(measured, [[pair, 100 + pair] for pair in range(20)]), "a side is in the other's column"
    assert [pair for _, pair in calls] == [pair for pair in range(20) for _ in "ab"], "a pair was torn apart"
    begins = [name for name, _ in calls[::2]]
    assert sorted(begins) == ["a"] * 10 + ["b"] * 10 and begins != sorted(begins), f"begun by {begins}"


def scripted(*effects: list[float]) -> Callable[[int], NDArray[np.float64]]:
    """Give a measurement whose pairs, time after time, have these ratios."""
    left = iter(effects)

    def measure(pairs: int) -> NDArray[np.float64]:
        effect = next(left)
        assert len(effect) == pairs
        return np.stack([np.ones(pairs), effect], axis=1)

    return measure


def ratio(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(seconds[:, 1] / seconds[:, 0])


@pytest.mark.parametrize(
    ("first", "second", "pairs", "verdict"),
    [
        ([1.0] * 10, None, 10, "pass"),
        ([1.1] * 10, None, 10, "fail"),
        # Open after the first pairs; judged with all of them after the second.
        ([1.0] * 5 + [1.1] * 5, [1.0] * 10, 20, "pass"),
        ([1.0] * 5 + [1.1] * 5, [1.1] * 10, 20, "fail"),
        ([1.0] * 5 + [1.1] * 5, [1.0] * 5 + [1.1] * 5, 20, "inconclusive"),
    ],
)
def test_what_is_left_open_is_extended_once(
    first: list[float], second: list[float] | None, pairs: int, verdict: str
) -> None:
    row = compare("it", scripted(first, *([second] if second else [])), ratio, "", Limit(1.02), 10)
    assert (row.pairs, row.verdict.value) == (pairs, verdict)


def test_without_a_limit_there_is_no_verdict_and_no_extension() -> None:
    row = compare("it", scripted([1.0] * 5 + [9.0] * 5), ratio, "", None, 10)
    assert (row.pairs, row.verdict) == (10, None)


def test_the_table_says_all_of_a_row() -> None:
    row = compare("latency", scripted([1.25] * 10), lambda s: (s[:, 1] - s[:, 0]) * 1e3, "ms", Limit(300.0), 10)
    assert table([row]).splitlines()[-1] == (
        "| latency | 10 | 1000.00 ms | 1250.00 ms | 250.000 ms | 250.000 to 250.000 ms | at most 300 ms | pass |"
    )


# The program.


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", "20"), "--pairs is 20: expected at least 100"),
        (("--seed", "-1"), "--seed is -1: expected 0 or more"),
        (("--backend", "cpuu"), "unknown backend 'cpuu': did you mean cpu"),
        (("--out", "no/such/folder.md"), "there is no folder no/such"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: tuple[str, ...], message: str) -> None:
    done = python("-m", "benchmarks.engine_cost", *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_the_interposers_cost_is_not_measured_with_few_pairs_either() -> None:
    done = python("-m", "benchmarks.interposer_cost", "--pairs", "20")
    assert done.returncode == 2 and "--pairs is 20: expected at least 100" in done.stderr, done.stderr


def test_a_few_pairs_can_be_measured() -> None:
    # Too few for a verdict that means anything: this is that the benchmark still fits the pipeline.
    program = "from benchmarks.engine_cost import Plan, run\nrun('cpu', Plan(pairs=6, block_s=0.05))"
    done = python("-W", "error", "-c", program)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [re.sub(r"\d+ a call", "N a call", line.split(" | ")[0]) for line in done.stdout.splitlines()]
    assert rows == [
        "| worker engine: latency added to a chunk",
        *["| worker engine: share of the throughput, N a call"] * 2,
        *["| ladder, metrics, pressure thread: cost, N a call"] * 2,
    ]


@without_compiler
def test_a_few_pairs_of_the_interposers_cost_can_be_measured() -> None:
    program = (
        "from benchmarks import interposer_cost as it\n"
        "it.ALLOCATIONS = 20_000\n"
        "it.run(['cpu'], it.Plan(pairs=6, block_s=0.02))"
    )
    done = python("-W", "error", "-c", program)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()] == [
        "| malloc and free of 64 bytes, 20,000 times: added to each",
        "| malloc and free of 4096 bytes, 20,000 times: added to each",
        "| cpu: cost of a call of one chunk",
    ]


@pytest.mark.parametrize(("lower", "upper", "status"), [(1.02, 1.05, 1), (0.99, 1.05, 0), (0.99, 1.0, 0)])
def test_only_an_interposer_that_certainly_costs_too_much_is_an_error(lower: float, upper: float, status: int) -> None:
    # Half of the pairs at either bound: it is the interval's too.
    program = (
        "import sys, numpy as np\n"
        "from benchmarks import interposer_cost as it\n"
        "def measure(pairs):\n"
        f"    return np.array([[1.0, {lower}], [1.0, {upper}]] * (pairs // 2))\n"
        "row = it.compare('it', measure, it.cost, '', it.INFERENCE, 100)\n"
        "it.run = lambda *_: [row]\n"
        "sys.exit(it.main([]))"
    )
    done = python("-c", program)
    assert done.returncode == status, done.stdout + done.stderr


@without_compiler
def test_a_process_that_is_not_under_the_interposer_is_not_measured() -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from benchmarks.interposer_cost import sides\n"
        "command = [sys.executable, '-c', 'print(float(input()))']\n"
        "with sides(command, Path('/bin/sh')) as (without, with_it):\n"
        "    with without() as side:\n"
        "        print(side.seconds('2'))\n"
        "    with with_it() as side:\n"
        "        side.seconds('2')"
    )
    done = python("-c", program)
    assert done.stdout == "2.0\n" and "did not come under the interposer" in done.stderr, done.stdout + done.stderr
