"""A fault plan's counters: which points it has seen, and which of them have to fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from backends.contract import ArmedFault, FaultPlan, FaultRecord, Provenance


class CountingFault(ArmedFault):
    """A plan that is struck point by point in this process.

    Whoever runs a point asks ``strike()``, brings the fault about where that says so, and reports what became of it
    with ``fired()`` or ``absorbed()``. ``lift`` gives back what the fault holds; it runs once, on disarming.
    """

    def __init__(self, plan: FaultPlan, provenance: Provenance, lift: Callable[[], None]) -> None:
        """Arm the plan; its deadline starts now."""
        self.plan = plan
        self._provenance = provenance
        self._lift = lift
        self._points_seen = self._struck = self._fired = self._absorbed = 0
        self._detail = ""
        self._disarmed = False
        self._lock = threading.RLock()
        self._deadline_s = time.monotonic() + plan.disarm_after_s
        self._timer = threading.Timer(plan.disarm_after_s, self.disarm)
        self._timer.daemon = True
        self._timer.start()

    @property
    def exhausted(self) -> bool:
        """Whether every fault of the plan has struck."""
        return self.plan.times is not None and self._struck >= self.plan.times

    @property
    def armed(self) -> bool:
        """Whether the plan can still strike."""
        return not (self._disarmed or self.exhausted)

    def strike(self) -> bool:
        """Count one point; say whether it has to fail."""
        with self._lock:
            self._points_seen += 1
            if not self.armed or self._points_seen < self.plan.nth or time.monotonic() >= self._deadline_s:
                return False
            if self.plan.thread is not None and threading.current_thread().name != self.plan.thread:
                return False
            self._struck += 1
            return True

    def fired(self, detail: str) -> None:
        """Count a fault that the runtime raised an error for."""
        with self._lock:
            self._fired += 1
            self._detail = detail

    def absorbed(self) -> None:
        """Count a fault that struck but that the runtime coped with."""
        with self._lock:
            self._absorbed += 1

    def record(self) -> FaultRecord:
        """Read the counters."""
        with self._lock:
            provenance = self._provenance if self._fired or self._absorbed else None
            return FaultRecord(self._points_seen, self._fired, self._absorbed, provenance, self._detail)

    def disarm(self) -> None:
        """Disarm and lift."""
        with self._lock:
            if self._disarmed:
                return
            self._disarmed = True
        self._timer.cancel()
        self._lift()
