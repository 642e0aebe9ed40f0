"""Memory pressure: a level with hysteresis from a share of memory used."""

from __future__ import annotations

import enum

from protection.policy import Policy


class Level(enum.IntEnum):
    """How near the limit is."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2
    EMERGENCY = 3
    SHUTDOWN = 4


class Pressure:
    """The level of one memory. It rises at once, and falls only once the share is clearly below the threshold."""

    def __init__(self, policy: Policy) -> None:
        """Start at normal."""
        self._thresholds = {
            Level.WARNING: policy.warning,
            Level.CRITICAL: policy.critical,
            Level.EMERGENCY: policy.emergency,
            Level.SHUTDOWN: policy.shutdown,
        }
        self._hysteresis = policy.hysteresis
        self.level = Level.NORMAL
        self.fraction = 0.0

    def update(self, fraction: float) -> Level:
        """Take a share used, 0.0 to 1.0 and above, and give the level now."""
        self.fraction = fraction
        reached = max((level for level, at in self._thresholds.items() if self._over(level, at)), default=Level.NORMAL)
        if reached > self.level or (
            self.level > Level.NORMAL and fraction < self._thresholds[self.level] - self._hysteresis
        ):
            self.level = reached
        return self.level

    def _over(self, level: Level, threshold: float) -> bool:
        # Shutdown is *above* its threshold, the others *at* theirs.
        return self.fraction > threshold if level is Level.SHUTDOWN else self.fraction >= threshold


class Below:
    """Whether a share has stayed below a bound for long enough: the condition for going back."""

    def __init__(self, bound: float, for_s: float) -> None:
        """Ask for a share below ``bound`` for ``for_s`` seconds without a break."""
        self._bound, self._for_s = bound, for_s
        self._since_s: float | None = None

    def update(self, fraction: float, now_s: float) -> bool:
        """Take a share and the time in seconds; say whether the condition holds."""
        if fraction >= self._bound:
            self._since_s = None
            return False
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s >= self._for_s

    def reset(self) -> None:
        """Start waiting anew."""
        self._since_s = None
