"""What is swept: a *sweep* is a scenario and whose allocations fail in it, a *point* one of them.

A point has a name, ``inference/runtime/transient/117``: a failure's command repeats it by that.
"""

from __future__ import annotations

from dataclasses import dataclass

from backends.contract import Capability, FaultPlan, Site

HOST, RUNTIME = "host", "runtime"
TRANSIENT, PERSISTENT = "transient", "persistent"
MODES = (TRANSIENT, PERSISTENT)
#: A point disarms itself after so long: whoever should have done it hangs.
DISARM_AFTER_S = 30.0
#: No scenario has so many points: with this one nothing fires, and all are counted.
BEYOND = 1 << 40


class PointError(ValueError):
    """A text names no point. The message says what was expected."""


@dataclass(frozen=True)
class Sweep:
    """A scenario, and the requests in it that fail in turn."""

    scenario: str
    #: The process that holds the subject, or those below it.
    target: str
    #: Requests of fewer bytes are no points.
    min_bytes: int
    #: As in a FaultPlan.
    thread: str | None = None
    site: Site = Site.HOST_ALLOCATION
    #: The same where all that follow fail too (None: no other).
    persistent_bytes: int | None = None
    #: What the scenario needs of a backend.
    needs: Capability = Capability.ALLOCATION_FAULTS

    def least_bytes(self, mode: str) -> int:
        """Give the size of the smallest request that is a point in this mode."""
        return self.min_bytes if mode == TRANSIENT or self.persistent_bytes is None else self.persistent_bytes

    @property
    def name(self) -> str:
        """Scenario and target, and the site where it is not the host's memory."""
        place = "" if self.site is Site.HOST_ALLOCATION else f".{self.site.value}"
        return f"{self.scenario}/{self.target}{place}"


@dataclass(frozen=True)
class Point:
    """The ``nth`` request of a sweep, alone or with all that follow in the same process."""

    sweep: Sweep
    mode: str
    nth: int

    @property
    def name(self) -> str:
        """What names it on a command line."""
        return f"{self.sweep.name}/{self.mode}/{self.nth}"

    @property
    def persistent(self) -> bool:
        """Whether every request from there on fails."""
        return self.mode == PERSISTENT

    def plan(self) -> FaultPlan:
        """Give what the interposer is to do."""
        sweep = self.sweep
        return FaultPlan(
            sweep.site,
            nth=self.nth,
            times=None if self.persistent else 1,
            min_bytes=sweep.least_bytes(self.mode),
            process=sweep.target,
            thread=sweep.thread,
            disarm_after_s=DISARM_AFTER_S,
        )


#: In the runtime's processes every request of 64 bytes and more, where counts repeat: it computes with one thread, and
#: questions about its memory, which come when they come, have a thread of their own. What does not repeat is swept at
#: the sizes that matter: a process that starts maps, imports and profiles (256 KiB and more: libraries, weights,
#: tensors), and a fallback begins when the attempts before it are over (2 KiB and more).
_REPEATED_BYTES = 64
_STARTING_BYTES = 256 << 10
_FALLING_BACK_BYTES = 2048
#: Where a batch changes its size, counts of smaller ones differ by one now and then.
_STEPS_BYTES = 1024
_NOT_SIDE = "!plimsoll-side"
#: In the host: 512 bytes and more are what Python takes from the C library for tables, texts, arrays, and SQLite for a
#: page; the ladder's own part begins where that of the inference ends, and 4 KiB and more are what it moves. A point
#: that costs a start or a new kernel, a second each, is one of 8 KiB and more: modules, pages, audio, features.
_HOST_BYTES = 512
_LADDER_BYTES = 4096
_COSTLY_BYTES = 8 << 10
#: A process that is refused everything amid a load dies of it (each of 2,637 points from 64 bytes on), and each death
#: costs another start: there only what is larger.
_LOADING_BYTES = 4096
_FALLBACKS_LOADING_BYTES = 16 << 10
#: What another scenario's processes do as well, allocation by allocation, is swept there; here what is largest of it.
_AGAIN_BYTES = 1 << 20

SWEEPS: tuple[Sweep, ...] = (
    Sweep("start", HOST, _COSTLY_BYTES),
    Sweep("start", RUNTIME, _STARTING_BYTES),
    Sweep("feed", HOST, 16, "main"),
    Sweep("inference", HOST, _HOST_BYTES),
    Sweep("inference", RUNTIME, _REPEATED_BYTES, _NOT_SIDE),
    Sweep("pressure", HOST, _HOST_BYTES),
    Sweep("pressure", RUNTIME, _FALLING_BACK_BYTES),
    Sweep("cache_clear", HOST, _LADDER_BYTES, needs=Capability.CACHE_OOM),
    Sweep("cache_clear", RUNTIME, _REPEATED_BYTES, _NOT_SIDE, needs=Capability.CACHE_OOM),
    # Refused everything it is what it is in inference, where each request is a point.
    Sweep("garbage_collect", RUNTIME, _REPEATED_BYTES, _NOT_SIDE, persistent_bytes=_HOST_BYTES),
    Sweep("reduce_buffer", HOST, _COSTLY_BYTES),
    Sweep("reduce_buffer", RUNTIME, _STEPS_BYTES, _NOT_SIDE),
    Sweep("restart_worker", HOST, 2 * _COSTLY_BYTES),
    Sweep("restart_worker", RUNTIME, _AGAIN_BYTES),
    Sweep("cpu_fallback", HOST, _LADDER_BYTES),
    Sweep("cpu_fallback", RUNTIME, _FALLING_BACK_BYTES, _NOT_SIDE, persistent_bytes=_FALLBACKS_LOADING_BYTES),
    Sweep("return_to_device", HOST, _LADDER_BYTES),
    Sweep("return_to_device", RUNTIME, _REPEATED_BYTES, _NOT_SIDE, persistent_bytes=_LOADING_BYTES),
    Sweep("emergency_shutdown", HOST, _COSTLY_BYTES),
    Sweep("toggle", HOST, _HOST_BYTES),
    Sweep("toggle", RUNTIME, _HOST_BYTES, _NOT_SIDE),
    Sweep("shutdown", HOST, 64),
    Sweep("shutdown", RUNTIME, _REPEATED_BYTES, _NOT_SIDE),
    Sweep("resume", HOST, 2 * _COSTLY_BYTES),
    Sweep("resume", RUNTIME, _AGAIN_BYTES),
)
#: The same for the device's own memory, where it has one.
DEVICE_SWEEPS: tuple[Sweep, ...] = tuple(
    Sweep(scenario, RUNTIME, 1, site=site, needs=Capability.DEVICE_ALLOCATION_FAULTS)
    for site in (Site.DEVICE_ALLOCATION, Site.DEVICE_LAUNCH)
    for scenario in ("start", "inference", "reduce_buffer", "cpu_fallback", "return_to_device", "restart_worker")
)


def parse(name: str) -> Point:
    """Find the point that a name stands for. Raises PointError."""
    parts = name.split("/")
    sweeps = {sweep.name: sweep for sweep in (*SWEEPS, *DEVICE_SWEEPS)}
    sweep = sweeps.get("/".join(parts[:2]))
    if sweep is None:
        raise PointError(f"--point {name}: expected SCENARIO/TARGET/MODE/NUMBER, begun by one of {', '.join(sweeps)}")
    if len(parts) != 4 or parts[2] not in MODES or not parts[3].isdigit() or int(parts[3]) < 1:
        raise PointError(
            f"--point {name}: after {sweep.name} expected /{' or /'.join(MODES)}, and / with a number from 1"
        )
    return Point(sweep, parts[2], int(parts[3]))
