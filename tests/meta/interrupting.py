"""A pytest plugin that interrupts a run, as Ctrl-C does, before the test of which a variable has the name."""

from __future__ import annotations

import os

import pytest

BEFORE = "PLIMSOLL_INTERRUPT_BEFORE"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.name == os.environ.get(BEFORE):
        raise KeyboardInterrupt
