"""Counters and latencies: attempts and successes by rung, out-of-memory errors by kind. Bounded."""

from __future__ import annotations

import threading
from collections import defaultdict


class Metrics:
    """Named numbers, safe to read from any thread."""

    def __init__(self) -> None:
        """Start at zero."""
        self._values: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        for name in (
            "oom_total",
            "device_errors_total",
            "recoveries_attempted",
            "recoveries_succeeded",
            "recovery_latency_max_s",
        ):
            self._values[name] = 0.0

    def add(self, name: str, amount: float = 1.0) -> None:
        """Add to a counter."""
        with self._lock:
            self._values[name] += amount

    def took(self, name: str, latency_s: float) -> None:
        """Note a latency: its sum, its largest and its last value, in seconds."""
        with self._lock:
            self._values[f"{name}_latency_total_s"] += latency_s
            self._values[f"{name}_latency_max_s"] = max(self._values[f"{name}_latency_max_s"], latency_s)
            self._values[f"{name}_latency_last_s"] = latency_s

    def all(self) -> dict[str, float]:
        """Give every number by name."""
        with self._lock:
            return dict(self._values)
