"""Every bad option of a policy is refused with what was expected; an unknown one with the nearest names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from protection.policy import RUNGS, Policy, PolicyError
from qualification.subject import STRATEGIES


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_batches", "max_batch"),
        ("critcal", "critical"),
        ("retention", "retention_s"),
        ("spool_limit", "spool_limit_bytes"),
        ("Rungs", "rungs"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(PolicyError, match=rf"no policy option '{name}': did you mean .*\b{near}\b"):
        Policy.from_options({name: 1})


def test_an_option_like_no_other_is_refused_with_all_names() -> None:
    with pytest.raises(PolicyError, match="expected one of ") as caught:
        Policy.from_options({"zzzzzz": 1})
    missing = [field.name for field in dataclasses.fields(Policy) if field.name not in str(caught.value)]
    assert not missing, f"the message leaves out {missing}"


CHOICES = ("rungs", "engine", "standby", "fork_workers")
NUMBERS = [field.name for field in dataclasses.fields(Policy) if field.name not in CHOICES]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("engine", "thread"), ("engine", 1)),
        *(("standby", 1), ("standby", "no"), ("standby", None)),
        *(("fork_workers", 1), ("fork_workers", 0.0), ("fork_workers", "yes"), ("fork_workers", [True])),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=f"{name} is .*: expected"):
        Policy.from_options({name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["5", True, [1], float("nan"), -1], ids=repr)
def test_an_absurd_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_options({name: value})
    assert name in str(caught.value), f"the message does not name {name}: {caught.value}"
    assert "expected" in str(caught.value), f"the message does not say what was expected: {caught.value}"


@pytest.mark.parametrize(
    "name", ["max_batch", "device_errors_in_a_row", "max_attempts", "batches_before_growth", "attempts_per_chunk"]
)
@pytest.mark.parametrize("value", [0, 2.5, None], ids=repr)
def test_a_count_is_a_whole_number_of_at_least_one(name: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=name):
        Policy.from_options({name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"warning": 0.95},
        {"critical": 0.8},
        {"emergency": 0.99},
        {"shutdown": 1.01},
        {"return_below": 0.0},
        {"return_below": 0.85},
        {"warning": 80},
    ],
    ids=str,
)
def test_shares_that_do_not_rise_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"expected rising shares in \(0, 1\]"):
        Policy.from_options(options)


@pytest.mark.parametrize("value", [0.25, 0.21, -0.01])
def test_a_hysteresis_that_reaches_the_way_back_is_refused(value: float) -> None:
    with pytest.raises(PolicyError, match=r"hysteresis is .*less than warning - return_below"):
        Policy.from_options({"hysteresis": value})


@pytest.mark.parametrize("rungs", [["cache_clear", "cache_clear"], ["reboot"], "cache_clear", [1]], ids=str)
def test_rungs_that_do_not_exist_are_refused_with_all_that_do(rungs: Any) -> None:
    with pytest.raises(PolicyError, match=f"expected some of {', '.join(RUNGS)}, each once"):
        Policy.from_options({"rungs": rungs})


def test_rungs_are_in_the_ladders_order_whatever_was_given() -> None:
    found = Policy.from_options({"rungs": list(reversed(RUNGS))}).rungs
    assert found == RUNGS, f"the order is {found}"
    assert Policy.from_options({"rungs": []}).rungs == (), "no rungs at all is a choice too"


def test_the_rungs_are_the_qualifications_strategies() -> None:
    assert RUNGS == STRATEGIES, f"rungs {RUNGS}, strategies {STRATEGIES}"


def test_a_spool_limit_that_holds_nothing_is_refused() -> None:
    with pytest.raises(PolicyError, match="spool_limit_bytes is 65535: expected a whole number of at least 65536"):
        Policy(spool_limit_bytes=65_535)


@pytest.mark.parametrize("value", [None, True, False])
def test_workers_are_forked_or_not_or_as_the_runtime_has_it(value: bool | None) -> None:
    found = Policy.from_options({"fork_workers": value}).fork_workers
    assert found is value, f"fork_workers is {found!r}"
    assert Policy().fork_workers is None, f"by default it is {Policy().fork_workers!r}"


def test_good_options_are_taken_as_they_are() -> None:
    options = {"max_batch": 4, "retention_s": 0, "spool_limit_bytes": None, "recovery_deadline_s": 2, "warning": 0.7}
    found = dataclasses.asdict(Policy.from_options(options))
    assert {name: found[name] for name in options} == options, f"the policy is {found}"
    assert Policy.from_options({}) == Policy(), "no options are not the defaults"
