"""What the user is told: what happened, what was done about it, and what it means for them."""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_log = logging.getLogger("plimsoll.protection")
#: A recording of days must not grow by what it says.
_KEPT = 10_000


class EventKind(enum.StrEnum):
    """The closed set of what can be said. The rungs of the ladder are kinds, so that their order is visible."""

    OOM_DETECTED = "oom_detected"
    DEVICE_ERROR = "device_error"
    WORKER_LOST = "worker_lost"
    CACHE_CLEAR = "cache_clear"
    GARBAGE_COLLECT = "garbage_collect"
    REDUCE_BUFFER = "reduce_buffer"
    RESTART_WORKER = "restart_worker"
    CPU_FALLBACK = "cpu_fallback"
    EMERGENCY_SHUTDOWN = "emergency_shutdown"
    RECOVERED = "recovered"
    RETURNED_TO_DEVICE = "returned_to_device"
    PRESSURE_WARNING = "pressure_warning"
    PRESSURE_CRITICAL = "pressure_critical"
    PRESSURE_EMERGENCY = "pressure_emergency"
    PRESSURE_NORMAL = "pressure_normal"
    STORAGE_FAILED = "storage_failed"
    CHUNK_SET_ASIDE = "chunk_set_aside"


@dataclass(frozen=True)
class Event:
    """One thing the user was told, ``time_s`` in seconds since the epoch."""

    kind: EventKind
    time_s: float
    message: str
    action: str
    meaning: str


class Events:
    """The events of one pipeline, in order, bounded, safe to read from any thread."""

    def __init__(self, listener: Callable[[Event], None] | None = None) -> None:
        """Keep events, and hand each to ``listener`` as it comes."""
        self._kept: deque[Event] = deque(maxlen=_KEPT)
        self._listener = listener
        self._lock = threading.Lock()

    def tell(self, kind: EventKind, message: str, action: str, meaning: str) -> None:
        """Tell the user. A listener that fails is logged: it must not stop the recording."""
        event = Event(kind, time.time(), message, action, meaning)
        with self._lock:
            self._kept.append(event)
        _log.info("%s: %s; %s; %s", kind.value, message, action, meaning)
        if self._listener is not None:
            try:
                self._listener(event)
            except Exception:
                _log.exception("the event listener failed")

    def all(self) -> list[Event]:
        """Give every event that is kept."""
        with self._lock:
            return list(self._kept)
