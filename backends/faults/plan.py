"""A fault plan's counters: which points it has seen, and which of them have to fail.

Plans and counters live on a *board*, memory without a name that every process of a run has mapped: a plan that is armed
in one process strikes in the one that runs the model, and what was counted there survives its death by SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from backends.contract import ArmedFault, BackendError, FaultPlan, FaultRecord, Provenance

_SLOTS = 32
_SLOT_BYTES = 2048
_PLAN_BYTES = 1024
_DETAIL_BYTES = 512
#: Of the board: changes so far. Counted up by whoever arms or disarms.
_CHANGES = struct.Struct("<q")
#: Of a slot: number of the plan (0: never used), armed, deadline in seconds of the monotonic clock.
_STATE = struct.Struct("<qqd")
#: Of a slot: points seen, struck, fired, absorbed.
_COUNTS = struct.Struct("<qqqq")
_HEAD_BYTES = 64
_COUNTS_AT = _STATE.size
_PLAN_AT = _COUNTS_AT + _COUNTS.size
_DETAIL_AT = _PLAN_AT + _PLAN_BYTES


class Board:
    """Slots for plans, mapped by every process that was given ``descriptor``."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Map a board that another process made, or make one."""
        size = _HEAD_BYTES + _SLOTS * _SLOT_BYTES
        if descriptor is None:
            # No name: nothing is left behind, whoever is killed.
            made = os.memfd_create("plimsoll-faults")
            try:
                os.ftruncate(made, size)
                # Above the standard streams, which a worker has its own of.
                descriptor = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 3)
            finally:
                os.close(made)
        self.descriptor = descriptor
        try:
            self._map = mmap.mmap(descriptor, size)
            weakref.finalize(self, os.close, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = threading.RLock()
        self._seen_changes = -1
        self._live: tuple[CountingFault, ...] = ()

    def arm(self, plan: FaultPlan, provenance: Provenance, lift: Callable[[], None]) -> CountingFault:
        """Put a plan on the board; its deadline starts now. Raises BackendError when every slot is armed."""
        text = json.dumps([plan.to_json(), provenance.value]).encode()
        if len(text) > _PLAN_BYTES:
            raise BackendError(f"the plan takes {len(text)} bytes: expected at most {_PLAN_BYTES}")
        with self.locked():
            states = [self._state(slot) for slot in range(_SLOTS)]
            # The one that was not used for longest: what it counted may still be read.
            free = [(number, slot) for slot, (number, armed, _) in enumerate(states) if not armed]
            if not free:
                raise BackendError(f"{_SLOTS} plans are armed already: disarm one first")
            slot, number = min(free)[1], max(state[0] for state in states) + 1
            at = self._at(slot)
            self._map[at + _PLAN_AT : at + _PLAN_AT + _PLAN_BYTES] = text.ljust(_PLAN_BYTES)
            self._map[at + _DETAIL_AT : at + _DETAIL_AT + _DETAIL_BYTES] = bytes(_DETAIL_BYTES)
            _COUNTS.pack_into(self._map, at + _COUNTS_AT, 0, 0, 0, 0)
            _STATE.pack_into(self._map, at, number, 1, time.monotonic() + plan.disarm_after_s)
            self._changed()
        return CountingFault(self, (slot, number), plan, provenance, lift).disarm_at_deadline()

    def live(self) -> tuple[CountingFault, ...]:
        """Give the plans that are neither disarmed nor past their deadline, as seen from this process."""
        (changes,) = _CHANGES.unpack_from(self._map, 0)
        if changes != self._seen_changes:
            with self._lock:
                known = {fault.number: fault for fault in self._live}
                found = []
                for slot in range(_SLOTS):
                    number, armed, _ = self._state(slot)
                    if armed:
                        found.append(known.get(number) or self._read(slot, number))
                self._live, self._seen_changes = tuple(found), changes
        return tuple(fault for fault in self._live if fault.live) if self._live else ()

    def _read(self, slot: int, number: int) -> CountingFault:
        at = self._at(slot) + _PLAN_AT
        plan, provenance = json.loads(self._map[at : at + _PLAN_BYTES])
        return CountingFault(self, (slot, number), FaultPlan.from_json(plan), Provenance(provenance), lambda: None)

    def _at(self, slot: int) -> int:
        return _HEAD_BYTES + slot * _SLOT_BYTES

    def _state(self, slot: int) -> tuple[int, int, float]:
        number, armed, deadline_s = _STATE.unpack_from(self._map, self._at(slot))
        return number, armed, deadline_s

    def _changed(self) -> None:
        (changes,) = _CHANGES.unpack_from(self._map, 0)
        _CHANGES.pack_into(self._map, 0, changes + 1)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads and processes out. The kernel lets go when this one is killed."""
        with self._lock:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN)


class CountingFault(ArmedFault):
    """A plan on a board, struck point by point in whichever process runs the model.

    Whoever runs a point asks ``strike()``, brings the fault about where that says so, and reports what became of it
    with ``fired()`` or ``absorbed()``. ``lift`` gives back what the fault holds; it runs once, on disarming.
    """

    def __init__(
        self, board: Board, place: tuple[int, int], plan: FaultPlan, provenance: Provenance, lift: Callable[[], None]
    ) -> None:
        """Take the plan at ``place`` (slot, number) of a board."""
        self.plan = plan
        self._board, (self._slot, self.number) = board, place
        self._provenance = provenance
        self._lift = lift
        self._lifted = False
        self._last = FaultRecord(0, 0, 0, None)
        self._timer: threading.Timer | None = None
        _, _, self._deadline_s = board._state(self._slot)

    def disarm_at_deadline(self) -> CountingFault:
        """Disarm by itself at the deadline, in this process; give itself."""
        self._timer = threading.Timer(max(0.0, self._deadline_s - time.monotonic()), self.disarm)
        self._timer.daemon = True
        self._timer.start()
        return self

    @property
    def _is_there(self) -> bool:
        return self._board._state(self._slot)[0] == self.number

    @property
    def live(self) -> bool:
        """Whether the plan is neither disarmed nor past its deadline: what it holds stays held."""
        number, armed, _ = self._board._state(self._slot)
        return number == self.number and bool(armed) and time.monotonic() < self._deadline_s

    @property
    def exhausted(self) -> bool:
        """Whether every fault of the plan has struck."""
        return self.plan.times is not None and self._counts()[1] >= self.plan.times

    @property
    def armed(self) -> bool:
        """Whether the plan can still strike."""
        return self.live and not self.exhausted

    def strike(self, input_max: Callable[[], float] = lambda: float("inf")) -> bool:
        """Count one point; say whether it has to fail. ``input_max`` gives the largest value of what is computed."""
        if not self.live:
            return False
        if self.plan.input_above is not None and not input_max() > self.plan.input_above:
            return False
        with self._board.locked():
            self._count(0)
            if not self.armed or self._counts()[0] < self.plan.nth:
                return False
            if self.plan.thread is not None and threading.current_thread().name != self.plan.thread:
                return False
            self._count(1)
            return True

    def fired(self, detail: str) -> None:
        """Count a fault that the runtime raised an error for, or is about to die of."""
        with self._board.locked():
            self._count(2)
            self.note(detail)

    def absorbed(self, *, fired_before: bool = False) -> None:
        """Count a fault that struck but that the runtime coped with; it may have been counted as fired before."""
        with self._board.locked():
            if fired_before:
                self._count(2, -1)
            self._count(3)

    def note(self, detail: str) -> None:
        """Say what became of it."""
        at = self._board._at(self._slot) + _DETAIL_AT
        text = detail.encode(errors="replace")[:_DETAIL_BYTES].ljust(_DETAIL_BYTES, b"\0")
        self._board._map[at : at + _DETAIL_BYTES] = text

    def record(self) -> FaultRecord:
        """Read the counters."""
        if self._is_there:
            seen, _, fired, absorbed = self._counts()
            provenance = self._provenance if fired or absorbed else None
            at = self._board._at(self._slot) + _DETAIL_AT
            detail = self._board._map[at : at + _DETAIL_BYTES].rstrip(b"\0").decode(errors="replace")
            record = FaultRecord(seen, fired, absorbed, provenance, detail)
            if self._is_there:
                self._last = record
        return self._last

    def disarm(self) -> None:
        """Disarm and lift."""
        with self._board.locked():
            if self._lifted:
                return
            self._lifted = True
            if self._is_there:
                _STATE.pack_into(self._board._map, self._board._at(self._slot), self.number, 0, self._deadline_s)
                self._board._changed()
        if self._timer is not None:
            self._timer.cancel()
        self._lift()
        self.record()

    def _counts(self) -> tuple[int, int, int, int]:
        seen, struck, fired, absorbed = _COUNTS.unpack_from(self._board._map, self._board._at(self._slot) + _COUNTS_AT)
        return seen, struck, fired, absorbed

    def _count(self, which: int, by: int = 1) -> None:
        counts = list(self._counts())
        counts[which] += by
        _COUNTS.pack_into(self._board._map, self._board._at(self._slot) + _COUNTS_AT, *counts)
