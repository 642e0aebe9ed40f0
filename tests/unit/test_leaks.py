"""A leak is found; noise, a warm-up, a step and a sawtooth are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qualification.leaks import LeakVerdict, judge

Floats = NDArray[np.float64]
Shape = Callable[[Floats], NDArray[np.floating[Any]]]
T_S: Floats = np.arange(0, 60, 0.25)
BASE_BYTES = 200e6


def _judge(shape: Shape, seed: int, noise_bytes: float = 0.3e6) -> LeakVerdict:
    noise = np.random.default_rng(seed).normal(0, noise_bytes, len(T_S))
    return judge(T_S, BASE_BYTES + shape(T_S) + noise)


HEALTHY: dict[str, Shape] = {
    "steady": lambda t: 0 * t,
    "warm-up that saturates": lambda t: 30e6 * (1 - np.exp(-t / 5)),
    "one-off step early": lambda t: 10e6 * (t > 20),
    "one-off step in the middle": lambda t: 10e6 * (t > 36),
    "one-off step late": lambda t: 10e6 * (t > 55),
    "sawtooth": lambda t: 2e6 * (t % 7) / 7,
    "slow sawtooth": lambda t: 8e6 * (t % 20) / 20,
    "shrinking": lambda t: -0.2e6 * t,
    "growth below the floor": lambda t: 0.005e6 * t,
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("noise_bytes", [0.0, 0.3e6])
def test_healthy_is_no_leak(name: str, noise_bytes: float) -> None:
    """No false alarm in 30 seeded traces of each kind."""
    verdicts = [_judge(HEALTHY[name], seed, noise_bytes) for seed in range(30)]
    wrong = [v.reason for v in verdicts if v.verdict != "no_leak"]
    assert not wrong, f"{len(wrong)} of 30 traces judged wrongly: {wrong[:1]}"


@pytest.mark.parametrize("leak_bytes_per_s", [0.05e6, 0.2e6, 2e6])
@pytest.mark.parametrize("noise_bytes", [0.0, 0.3e6])
def test_a_steady_leak_is_found(leak_bytes_per_s: float, noise_bytes: float) -> None:
    """All of 30 seeded traces, and the slope is right within 20 %."""
    for seed in range(30):
        verdict = _judge(lambda t: leak_bytes_per_s * t, seed, noise_bytes)
        assert verdict.verdict == "leak", f"seed {seed}: {verdict.reason}"
        assert verdict.slope_bytes_per_s == pytest.approx(leak_bytes_per_s, rel=0.2), f"seed {seed}: {verdict}"
        assert verdict.lower <= verdict.slope_bytes_per_s <= verdict.upper, f"seed {seed}: {verdict}"


def test_a_staircase_leak_is_found() -> None:
    """1 MB every 2 s, as an exact counter shows it."""
    verdict = _judge(lambda t: 1e6 * (t // 2), seed=0, noise_bytes=0)
    assert verdict.verdict == "leak", verdict.reason


def test_a_leak_under_a_sawtooth_is_found() -> None:
    """0.3 MB/s below a 2 MB sawtooth."""
    verdict = _judge(lambda t: 0.3e6 * t + 2e6 * (t % 4) / 4, seed=0)
    assert verdict.verdict == "leak", verdict.reason


def test_numbers_of_an_exact_line() -> None:
    """Slope, bounds, growth over the judged span and stability of a trace without noise."""
    verdict = judge(T_S, 100e6 + 1e6 * T_S)
    span_s = T_S[-1] - T_S[48]
    assert verdict.slope_bytes_per_s == verdict.lower == verdict.upper == pytest.approx(1e6)
    assert verdict.growth_bytes == pytest.approx(1e6 * span_s), f"growth {verdict.growth_bytes} over {span_s} s"
    # Twelve blocks of 4 s: the outer medians lie 22 s from the middle one, which holds 135.875 MB.
    assert verdict.stability_fraction == pytest.approx(22e6 / 135.875e6), f"stability {verdict.stability_fraction}"


def test_the_bounds_cover_the_truth_as_often_as_they_promise() -> None:
    """At 90 %, at most 15 % of 200 lower bounds lie above the true slope."""
    rng = np.random.default_rng(7)
    above = 0
    for _ in range(200):
        used = BASE_BYTES + 1e5 * T_S + rng.normal(0, 1e6, len(T_S))
        above += judge(T_S, used, confidence=0.9).lower > 1e5
    assert above <= 30, f"{above} of 200 lower bounds lie above the true slope"


def test_the_floor_is_the_callers() -> None:
    """The same trace is a leak under a floor and none above it."""
    used = BASE_BYTES + 1e6 * T_S
    verdicts = [judge(T_S, used, floor_bytes_per_s=floor).verdict for floor in (0.9e6, 1.1e6)]
    assert verdicts == ["leak", "no_leak"], f"{verdicts} for floors of 0.9 and 1.1 MB/s"


@pytest.mark.parametrize(("samples", "verdict"), [(0, "inconclusive"), (23, "inconclusive"), (24, "leak")])
def test_too_little_is_inconclusive(samples: int, verdict: str) -> None:
    """24 samples are enough; with fewer the numbers are NaN."""
    t = np.arange(samples, dtype=float)
    judged = judge(t, 1e6 * t)
    assert judged.verdict == verdict, f"{samples} samples: {judged}"
    assert math.isnan(judged.slope_bytes_per_s) == (verdict == "inconclusive"), f"{samples} samples: {judged}"


def test_a_counter_at_zero_is_stable() -> None:
    """Nothing in use is no leak, and no division by zero."""
    verdict = judge(T_S, 0 * T_S)
    assert (verdict.verdict, verdict.stability_fraction) == ("no_leak", 0.0), f"{verdict}"


@pytest.mark.parametrize(
    ("t_s", "used", "confidence", "message"),
    [
        ([0, 2, 1], [1, 1, 1], 0.99, r"t_s\[2\] is 1.0, after 2.0"),
        ([0, 1, 1], [1, 1, 1], 0.99, "expected times that increase"),
        ([0, 1], [1, math.nan], 0.99, r"used_bytes\[1\] is nan"),
        ([0, math.inf], [1, 1], 0.99, r"t_s\[1\] is inf"),
        ([0, 1], [1], 0.99, r"shape \(2,\), used_bytes \(1,\)"),
        ([[0, 1]], [[1, 1]], 0.99, "one dimension"),
        ([0, 1], [1, 1], 1.0, "confidence is 1.0"),
    ],
)
def test_bad_input_is_refused(t_s: list[float], used: list[float], confidence: float, message: str) -> None:
    """The message says where and what."""
    with pytest.raises(ValueError, match=message):
        judge(t_s, used, confidence=confidence)
