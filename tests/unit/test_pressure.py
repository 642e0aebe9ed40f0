"""Levels of pressure rise at once, fall with hysteresis, and the way back needs time without a break."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protection.policy import Policy
from protection.pressure import Below, Level, Pressure


@pytest.mark.parametrize(
    ("fraction", "level"),
    [
        (0.0, Level.NORMAL),
        (0.799, Level.NORMAL),
        (0.80, Level.WARNING),
        (0.899, Level.WARNING),
        (0.90, Level.CRITICAL),
        (0.949, Level.CRITICAL),
        (0.95, Level.EMERGENCY),
        (0.98, Level.EMERGENCY),
        (0.981, Level.SHUTDOWN),
        (1.5, Level.SHUTDOWN),
    ],
)
def test_a_level_begins_at_its_threshold_and_shutdown_above_it(fraction: float, level: Level) -> None:
    found = Pressure(Policy()).update(fraction)
    assert found is level, f"{fraction:.1%} in use is {found.name}, expected {level.name}"


def test_a_level_ends_only_clearly_below_its_threshold() -> None:
    pressure = Pressure(Policy(hysteresis=0.05))
    found = [pressure.update(f).name for f in (0.81, 0.79, 0.76, 0.751, 0.749)]
    assert found == ["WARNING"] * 4 + ["NORMAL"], f"levels on the way down are {found}"


def test_a_share_that_trembles_at_a_threshold_does_not_change_the_level() -> None:
    pressure = Pressure(Policy())
    found = {pressure.update(0.90 + (0.01 if k % 2 else -0.01)) for k in range(1, 100)}
    assert found == {Level.CRITICAL}, f"levels seen are {sorted(found)}"


def test_levels_fall_one_after_the_other_and_rise_again_at_once() -> None:
    pressure = Pressure(Policy())
    found = [pressure.update(f) for f in (0.99, 0.96, 0.94, 0.91, 0.86, 0.5, 0.96)]
    expected = [
        Level.SHUTDOWN,
        Level.SHUTDOWN,
        Level.CRITICAL,
        Level.CRITICAL,
        Level.WARNING,
        Level.NORMAL,
        Level.EMERGENCY,
    ]
    assert found[0] is Level.SHUTDOWN and found[-2:] == expected[-2:], f"levels are {found}"
    assert found == sorted(found[:-1], reverse=True) + found[-1:], f"levels do not fall in order: {found}"


@given(st.lists(st.floats(0.0, 1.2), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_level_is_never_below_what_the_share_reaches(fractions: list[float]) -> None:
    pressure = Pressure(Policy())
    for fraction in fractions:
        level = pressure.update(fraction)
        at_least = Pressure(Policy()).update(fraction)
        assert level >= at_least, f"after {fraction:.1%} the level is {level.name}, its share reaches {at_least.name}"


def test_the_way_back_needs_time_without_a_break() -> None:
    below = Below(0.6, 1.0)
    found = [below.update(f, t) for f, t in ((0.5, 0.0), (0.5, 0.9), (0.6, 0.95), (0.5, 1.0), (0.5, 1.9), (0.5, 2.0))]
    assert found == [False, False, False, False, False, True], f"it holds at {found}"
    below.reset()
    assert not below.update(0.1, 2.5), "it holds at once after a reset"
    assert below.update(0.1, 3.5), "it does not hold after its time"
