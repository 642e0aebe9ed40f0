"""How the unit tests wait for what another thread or process does."""

from __future__ import annotations

from collections.abc import Callable

from qualification.observe import wait_until

#: What happens takes milliseconds: only on a machine that is busy with others does it take seconds.
WITHIN_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fail where it does not come about."""
    assert wait_until(condition, WITHIN_S), f"not within {WITHIN_S:g} s: {what}"
