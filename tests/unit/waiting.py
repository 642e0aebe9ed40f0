"""How the unit tests wait for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

#: What happens takes milliseconds: only on a machine that is busy with others does it take seconds.
WITHIN_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fail where it does not come about."""
    deadline_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {WITHIN_S:g} s: {what}"
        time.sleep(0.005)
