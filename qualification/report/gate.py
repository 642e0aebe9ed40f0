"""What a release needs: which cells, which profiles, and what is excused. A small TOML file.

cells = ["*/cpu", "torch-cuda/cuda13"]       # BACKEND/ENVIRONMENT, with wildcards
profiles = ["quick", "soak", "sweep"]
not_run = ["test_oom_killer"]                # TEST or TEST/CRITERION, with wildcards: may be not run
fail_on_regression = true                    # with --against

[overridden]                                 # limits and parameters that may differ from the defaults, and how
"test_sustained_high_memory_usage.growth_rate" = 0.5

[regression]                                 # what --against calls one
slower_percent = 50
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qualification.criteria import CRITERIA, PARAMETERS, PROFILES, nearest
from qualification.identity import ROOT

#: Ready-made ones; the first is used where none is named.
FOLDER = ROOT / "gates"
DEFAULT = FOLDER / "release.toml"


class GateError(ValueError):
    """A gate cannot be used. The message says where, what was found and what was expected."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as a regression: it has to be beyond both the share and the amount.

    Two runs of the same thing on a shared machine differ by as much as these.
    """

    slower_percent: float = 50.0
    slower_s: float = 0.5
    higher_percent: float = 20.0
    higher_mb: float = 16.0
    #: Of the room to a limit that there was, and of the limit.
    thinner_percent: float = 50.0
    thinner_points: float = 5.0


@dataclass(frozen=True)
class Gate:
    """What has to be proven."""

    source: str
    cells: tuple[str, ...]
    profiles: tuple[str, ...]
    not_run: tuple[str, ...] = ()
    overridden: Mapping[str, float] = field(default_factory=dict)
    fail_on_regression: bool = False
    regression: Thresholds = Thresholds()

    def requires(self, backend: str, environment: str) -> bool:
        """Whether a cell has to pass."""
        return any(fnmatchcase(f"{backend}/{environment}", pattern) for pattern in self.cells)

    def excuses(self, test: str, criterion: str) -> bool:
        """Whether a criterion may be not run."""
        return any(fnmatchcase(name, each) for name in (test, f"{test}/{criterion}") for each in self.not_run)

    def plain(self) -> dict[str, Any]:
        """Give it as plain data."""
        return {
            "source": self.source,
            "cells": list(self.cells),
            "profiles": list(self.profiles),
            "not_run": list(self.not_run),
            "overridden": dict(self.overridden),
            "fail_on_regression": self.fail_on_regression,
            "regression": asdict(self.regression),
        }


def load(path: Path, declared: Iterable[tuple[str, str]]) -> Gate:
    """Read a gate for the (backend, environment) cells that are ``declared``. Raises GateError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise GateError(f"the gate {path} cannot be read: {error}") from error
    known = [each.name for each in fields(Gate) if each.name != "source"]
    for key in table:
        if key not in known:
            raise GateError(f"{path}: unknown key {key!r}: {nearest(key, known)}")
    cells = _strings(path, table, "cells")
    names = [f"{backend}/{environment}" for backend, environment in declared]
    for pattern in cells:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise GateError(f"{path}: no cell is {pattern!r}: {nearest(pattern, names)}")
    profiles = _strings(path, table, "profiles")
    for profile in profiles:
        if profile not in PROFILES:
            raise GateError(f"{path}: there is no profile {profile!r}: {nearest(profile, PROFILES)}")
    not_run = _strings(path, table, "not_run") if "not_run" in table else ()
    for pattern in not_run:
        tests = sorted({each.test for each in CRITERIA})
        if not any(fnmatchcase(name, pattern) for name in (*tests, *(f"{each.test}/{each.name}" for each in CRITERIA))):
            raise GateError(f"{path}: not_run: there is no test or criterion {pattern!r}: {nearest(pattern, tests)}")
    strict = table.get("fail_on_regression", False)
    if not isinstance(strict, bool):
        raise GateError(f"{path}: fail_on_regression is {strict!r}: expected true or false")
    overridden = _numbers(path, table, "overridden")
    names = sorted({*(f"{one.test}.{one.name}" for one in CRITERIA), *(f"{one.test}.{one.name}" for one in PARAMETERS)})
    for name in overridden:
        if name not in names:
            near = nearest(name, names)
            raise GateError(f"{path}: [overridden]: there is no criterion or parameter {name!r}: {near}")
    thresholds = _numbers(path, table, "regression")
    names = [each.name for each in fields(Thresholds)]
    for name, value in thresholds.items():
        if name not in names:
            raise GateError(f"{path}: [regression]: unknown key {name!r}: {nearest(name, names)}")
        if value < 0:
            raise GateError(f"{path}: [regression]: {name} is {value:g}: expected at least 0")
    source = path.resolve()
    shown = source.relative_to(ROOT) if source.is_relative_to(ROOT) else path
    return Gate(str(shown), cells, profiles, not_run, overridden, strict, Thresholds(**thresholds))


def _strings(path: Path, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise GateError(f"{path}: {key} is {value!r}: expected a list of strings, with at least one")
    return tuple(value)


def _numbers(path: Path, table: Mapping[str, Any], key: str) -> dict[str, float]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise GateError(f"{path}: {key} is {value!r}: expected a table [{key}] of names and numbers")
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise GateError(f"{path}: [{key}]: {name} is {number!r}: expected a finite number")
    return {name: float(number) for name, number in value.items()}
