"""What every backend that ships has in common, whatever its runtime: what is held, where the device is, the faults.

A family (``_onnxruntime.py``, ``_torch.py``) says how memory is taken and given back, how it is capped, how a model is
loaded, and how the runtime is made to crash.
"""

from __future__ import annotations

import abc
import contextlib
import gc
import importlib
import logging
import os
import resource
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from backends.contract import (
    Allocation,
    ArmedFault,
    Backend,
    BackendError,
    Capability,
    Device,
    FaultPlan,
    FloatArray,
    Health,
    LimitNotEnforced,
    MemoryReading,
    Model,
    ModelError,
    Provenance,
    Share,
    Site,
    Unsupported,
)
from backends.errors import ErrorKind, classify
from backends.faults import ballast, interposer, limits
from backends.faults.plan import Board, CountingFault
from backends.host import available_bytes

_log = logging.getLogger("plimsoll.backends")

T = TypeVar("T")
MIB = 1 << 20
#: Faults hold the device's memory in pieces of this size: smaller than any tensor of a window that matters.
CACHE_PIECE_BYTES = 256 << 10
#: No library of this name exists: the runtime says so itself.
MISSING_LIBRARY = "libplimsoll-that-is-missing.so.1"
_RSS_SOURCE = Path("/proc/self/statm")
_PAGE_BYTES = resource.getpagesize()

_FATAL_SITES = (Site.RUNTIME_CRASH, Site.RUNTIME_HANG)
#: Faults of the device itself: a kernel that ends the process's use of it.
STICKY_SITES = (Site.DEVICE_ERROR, Site.DEVICE_ASSERT, Site.DEVICE_ADDRESS)
#: Points of a model run on the device.
_RUN_SITES = (
    *(Site.DEVICE_MEMORY, Site.DEVICE_CACHE, Site.DEVICE_GARBAGE, Site.LIBRARY_MISSING),
    *_FATAL_SITES,
    *STICKY_SITES,
)
_NEEDS = {
    Site.DEVICE_CACHE: Capability.CACHE_OOM,
    Site.HOST_MEMORY: Capability.HOST_OOM,
    Site.RUNTIME_CRASH: Capability.RUNTIME_CRASH,
    Site.RUNTIME_HANG: Capability.RUNTIME_CRASH,
    Site.LIBRARY_MISSING: Capability.RUNTIME_CRASH,
    **dict.fromkeys(STICKY_SITES, Capability.DEVICE_ERROR),
    Site.HOST_ALLOCATION: Capability.ALLOCATION_FAULTS,
    **dict.fromkeys((Site.DEVICE_ALLOCATION, Site.DEVICE_LAUNCH), Capability.DEVICE_ALLOCATION_FAULTS),
}


def resident_bytes() -> int:
    """Read this process's resident memory."""
    return int(_RSS_SOURCE.read_text().split()[1]) * _PAGE_BYTES


def preload_shared() -> None:
    """Import and compute what every backend needs at its first use: a process that is forked from this one need not."""
    for module in ("numpy.random", "psutil"):
        importlib.import_module(module)
    health_probe()


@lru_cache(1)
def health_probe() -> tuple[FloatArray, npt.NDArray[np.float64]]:
    """Give a float32 [256, 256] matrix, and its product with itself as NumPy has it in double precision.

    Once, and before memory is short: NumPy's library ends the process where it finds none. Nobody may write into them.
    """
    x = np.random.RandomState(7).standard_normal((256, 256)).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide @ wide
    expected.flags.writeable = False
    return x, expected


def file_key(path: Path) -> tuple[str, int, int]:
    """Tell a file from what it was before: its path, when it changed (ns), its size (bytes). Raises OSError."""
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size


def heap_trim() -> None:
    """Give the C library's free heap memory back to the system, where it can (glibc, psutil 7.2)."""
    import psutil

    trim = getattr(psutil, "heap_trim", None)
    if trim is not None:
        trim()


def check_features(features: FloatArray, window_frames: int, mels: int) -> None:
    """Raise ModelError for what is not float32 [batch, window_frames, mels]."""
    expected = (window_frames, mels)
    if features.ndim != 3 or features.shape[1:] != expected or features.dtype != np.float32 or not len(features):
        raise ModelError(
            f"features are {features.dtype} {list(features.shape)}: expected float32 [batch, {window_frames}, {mels}]"
        )


class _Held(Allocation):
    """What was allocated through a backend, wherever its device is now."""

    def __init__(self, where: Allocation) -> None:
        self._where: Allocation | None = where
        self._freed = False
        self._lock = threading.Lock()
        self.size_bytes = where.size_bytes

    def free(self) -> None:
        with self._lock:
            self._freed = True
            where, self._where = self._where, None
        if where is not None:
            where.free()

    def move(self, allocate: Callable[[int], Allocation]) -> None:
        """Take the same memory anew where the device is now, unless it was freed; the old is given back first."""
        with self._lock:
            where, self._where = self._where, None
            if where is None or self._freed:
                return
            try:
                where.free()
            finally:
                # Where the old was is gone, or given up: that it could not be told so is no reason to be without.
                self._where = allocate(self.size_bytes)


class DeviceBackend(Backend):
    """The part of a backend that does not depend on its runtime."""

    #: The smallest pieces that a full device is filled up with: below it, memory is not the device's.
    fill_pieces_bytes: ClassVar[tuple[int, ...]] = ballast.PIECES

    #: Whether it must not see an accelerator: it took over from one.
    is_blind = False
    #: Imports the runtime, and whether that takes long.
    preload: ClassVar[str | None] = None
    is_slow_to_import: ClassVar[bool] = False

    def __init__(self, device: str | None = None) -> None:
        """Make a backend without a memory limit, on the device of this name. Raises BackendError for one it has not."""
        self.device, self._index = self._named(device)
        self._limit_bytes: int | None = None
        #: How many models are loaded, and what the last run of one needed at its peak.
        self._models = self._working_set_bytes = 0
        #: Shared with the fallback, and with the workers: a plan reaches them too.
        self._board = Board()
        self._armed: list[CountingFault] = []
        #: What each plan that struck in this process holds, by its number.
        self._fault_ballast: dict[int, list[Allocation]] = {}
        #: A piece of each garbage fault's memory: gone once it was collected.
        self._garbage: dict[int, weakref.ref[Allocation]] = {}
        #: Where the device is, if another process has it, and what was allocated on it through this object.
        self._elsewhere: Device | None = None
        self._allocations: weakref.WeakSet[_Held] = weakref.WeakSet()
        self._lock = threading.RLock()

    # What a family says.

    @abc.abstractmethod
    def _named(self, device: str | None) -> tuple[str, int]:
        """Give the name and the number of the device that is asked for. Raises BackendError for one it has not."""

    @abc.abstractmethod
    def _memory_here(self) -> MemoryReading:
        """Read the device's memory in this process."""

    @abc.abstractmethod
    def _allocate_here(self, size_bytes: int) -> Allocation:
        """Take device memory in this process, and touch it."""

    @abc.abstractmethod
    def _release_here(self) -> int:
        """Give cached memory back in this process; say how much came back."""

    @abc.abstractmethod
    def _apply_limit(self, limit_bytes: int | None) -> None:
        """Have the runtime enforce a limit from here on (None: as before any was set)."""

    @abc.abstractmethod
    def _prepare(self, path: Path) -> None:
        """Do what a load needs to be done while there is memory for it. Raises ModelError."""

    @abc.abstractmethod
    def _load(self, path: Path) -> Model:
        """Load an acoustic model in this process."""

    @abc.abstractmethod
    def _square(self, matrix: FloatArray) -> FloatArray:
        """Multiply float32 [n, n] by itself on the device."""

    @abc.abstractmethod
    def _ready_to_end(self, site: Site) -> Callable[[], object]:
        """Give what makes the runtime crash, or never return; everything that it needs is there already."""

    @abc.abstractmethod
    def _miss_library(self) -> None:
        """Have the runtime load MISSING_LIBRARY. Raises the runtime's own error."""

    def owned(self, act: Callable[[], T]) -> T:
        """Do something on the device. Errors come as the runtime raises them; who knows more of them notes it."""
        return act()

    def _strike_device(self, site: Site) -> None:
        """Run a kernel that the device stops, in this process. For backends with DEVICE_ERROR."""
        raise NotImplementedError(f"{self.name} has no {site.value}")

    def _fill(self, held: list[Allocation], free_bytes: int) -> list[Allocation]:
        """Hold the device's memory, with what is held already, so that little less than ``free_bytes`` are free."""
        spare: Allocation | None = None
        # Taken first, and given back at the end: pieces alone would leave less, by up to the size of the largest. And
        # less by a piece, and by what an allocator adds to it: so much may remain where no further piece fits.
        spare_bytes = free_bytes - self.fill_pieces_bytes[-1] * 5 // 4
        while spare is None and spare_bytes >= 4:
            try:
                spare = self._allocate_here(spare_bytes)
            except Exception as error:
                if not classify(error).is_oom:
                    raise
                if not held:
                    return []
                # The smallest.
                held.pop().free()
                self._release_here()
        held += ballast.fill(self._allocate_here, self.fill_pieces_bytes)
        if spare is not None:
            spare.free()
        return held

    def _provenance(self, site: Site) -> Provenance:
        """Say how this backend brings a fault about."""
        if site in _FATAL_SITES:
            return Provenance.KILLED
        if site in STICKY_SITES:
            return Provenance.DEVICE
        return Provenance.MISSING if site is Site.LIBRARY_MISSING else Provenance.CAPPED

    def _variant(self) -> dict[str, Any]:
        """Say what the constructor of this variant was given, by name."""
        return {}

    def _device_elsewhere(self) -> Device | None:
        """Give the device where another process has it, or None where this one has it."""
        return self._elsewhere

    def _device_to_use(self) -> Device | None:
        """Give the same for something that needs the device: a backend that starts a process for it does so now."""
        return self._device_elsewhere()

    def _is_in_this_process(self) -> bool:
        """Whether this process has the device."""
        return self._elsewhere is None

    def _wanted_bytes(self) -> int:
        """Say what a run like the last one needs: it counts as used, or pressure would be told only when it is late."""
        return self._working_set_bytes if self._models else 0

    def _most_bytes(self) -> tuple[int, str]:
        """Give the highest limit that can be asked for, and what it is."""
        return available_bytes() // 2, "half of the host memory that is available now"

    # Memory.

    def memory(self) -> MemoryReading:
        """Read the device's memory, where the device is."""
        elsewhere = self._device_elsewhere()
        if elsewhere is not None:
            return elsewhere.memory()
        self._lift_what_is_over()
        return self._memory_here()

    def allocate(self, size_bytes: int) -> Allocation:
        """Take device memory where the device is, and keep it."""
        if size_bytes < 4:
            raise ValueError(f"size_bytes is {size_bytes}: expected at least 4")
        elsewhere = self._device_to_use()
        allocate = self._allocate_here if elsewhere is None else elsewhere.allocate
        held = _Held(allocate(size_bytes))
        with self._lock:
            self._allocations.add(held)
        return held

    def release_cached(self) -> int:
        """Give cached memory back where the device is."""
        elsewhere = self._device_elsewhere()
        if elsewhere is not None:
            return elsewhere.release_cached()
        self._lift_what_is_over()
        return self._release_here()

    def collect(self) -> int:
        """Collect unreachable objects in this process, and where the device is."""
        elsewhere = self._device_elsewhere()
        return gc.collect() + (0 if elsewhere is None else elsewhere.collect())

    def limit_memory(self, limit_bytes: int) -> None:
        """Set a cap, and prove it: half of it can be had, and more than all of it cannot."""
        self.require(Capability.MEMORY_LIMIT)
        if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int):
            raise ValueError(f"limit_bytes is {limit_bytes!r}: expected a whole number of bytes")
        most, what = self._most_bytes()
        if not MIB <= limit_bytes <= most:
            raise ValueError(
                f"limit_bytes is {limit_bytes}: expected at least {MIB} (1 MiB) and at most {most} ({what})"
            )
        if self._elsewhere is not None:
            raise BackendError("the device is in a worker now: limit its memory before a subject is made")
        self._limit_here(limit_bytes)

    def _limit_here(self, limit_bytes: int) -> None:
        with self._lock:
            before, self._limit_bytes = self._limit_bytes, limit_bytes
            try:
                self._apply_limit(limit_bytes)
                self._allocate_here(limit_bytes // 2 // 4 * 4).free()
                self._release_here()
                self._prove_refusal(limit_bytes)
            except BaseException:
                self._limit_bytes = before
                self._apply_limit(before)
                raise

    def _prove_refusal(self, limit_bytes: int) -> None:
        try:
            self._allocate_here(limit_bytes + MIB).free()
        except Exception as error:
            if not classify(error).is_oom:
                raise
            return
        raise LimitNotEnforced(
            f"the runtime took a limit of {limit_bytes} bytes and then allocated {limit_bytes + MIB}: "
            "use a larger limit, or another version of the runtime"
        )

    # Elsewhere.

    def share(self) -> Share:
        """Share the name, the limit, what a variant adds, and the board of faults."""
        data = {"backend": self.name, "limit_bytes": self._limit_bytes, "board": self._board.descriptor}
        descriptors = (self._board.descriptor,)
        return Share(data | self._variant(), descriptors, self.preload, self.is_blind, self.is_slow_to_import)

    @classmethod
    def rebuild(cls, data: Mapping[str, Any]) -> Backend:
        """Make the backend that was shared; its limit is proved here as well."""
        options = {name: value for name, value in data.items() if name not in ("backend", "limit_bytes", "board")}
        made = cls(**options)
        made._board = Board(data["board"])
        made._has_the_device()
        if data["limit_bytes"] is not None:
            made.limit_memory(data["limit_bytes"])
        return made

    def _has_the_device(self) -> None:
        """Take note that this process was started to have the device; have what is needed to prove it."""
        health_probe()

    def hand_over(self, device: Device) -> None:
        """Move what is held to where the device is now. What does not fit there is given back, and logged."""
        self._elsewhere = device
        self._move_held(device.allocate)

    def take_back(self, device: Device) -> None:
        """Move what is held back here, likewise."""
        if self._elsewhere is device:
            self._elsewhere = None
            self._move_held(self._allocate_back)

    def _allocate_back(self, size_bytes: int) -> Allocation:
        elsewhere = self._device_to_use()
        return self._allocate_here(size_bytes) if elsewhere is None else elsewhere.allocate(size_bytes)

    def _move_held(self, allocate: Callable[[int], Allocation]) -> None:
        with self._lock:
            allocations = tuple(self._allocations)
        for held in allocations:
            try:
                held.move(allocate)
            except Exception as error:
                _log.warning("%d bytes could not be taken anew on the device: %s", held.size_bytes, error)

    # Loading.

    def load(self, path: Path) -> Model:
        """Load a model file. Raises ModelError for what is not a usable acoustic model."""
        self._lift_what_is_over()
        try:
            with self._lock:
                self._prepare(path)
                for fault in self._faults_at(Site.HOST_MEMORY):
                    if fault.strike():
                        with limits.no_host_memory(fault.plan.min_bytes):
                            return self._watched(lambda: self._load(path), [fault])
                return self._load(path)
        except Exception as error:
            # The file is to blame only for what neither memory nor the device is.
            if classify(error) is not ErrorKind.OTHER or isinstance(error, BackendError | OSError):
                raise
            raise ModelError(f"{path} does not load: {type(error).__name__}: {str(error)[:300]}") from error

    # Faults.

    def arm(self, plan: FaultPlan) -> ArmedFault:
        """Arm a plan for the models that this backend, its fallback or a worker of either loads and runs."""
        self.require(_NEEDS.get(plan.site, Capability.DEVICE_OOM))
        if plan.site in interposer.INTERPOSED_SITES:
            return interposer.arm(plan)
        if plan.process is not None:
            raise Unsupported(
                f"{self.name} arms a plan in its own process: expected process None, not {plan.process!r}"
            )
        if plan.site is Site.HOST_MEMORY:
            if self._is_in_this_process():
                limits.require_expendable()
        elif self._limit_bytes is None:
            raise ValueError(f"{plan.site.value} needs a device with a memory limit: call limit_memory first")
        self._check_arming(plan)
        fault = self._board.arm(plan, self._provenance(plan.site), self._lift)
        with self._lock:
            self._armed = [each for each in self._armed if each.live]
            self._armed.append(fault)
        return fault

    def _check_arming(self, plan: FaultPlan) -> None:
        """Raise BackendError for a plan that must not be carried out on this machine."""

    def _faults_at(self, *sites: Site) -> list[CountingFault]:
        return [fault for fault in self._board.live() if fault.plan.site in sites]

    def _lift(self) -> None:
        """Give back what a plan held that was disarmed, here and where the device is."""
        self._lift_what_is_over()
        with contextlib.suppress(Exception):
            # Where the device is, it lifts when its memory is read.
            self.memory()

    def _lift_what_is_over(self) -> None:
        """Give back what plans held in this process that are disarmed, or past their deadline."""
        if not self._fault_ballast and not self._garbage:
            return
        live = {fault.number for fault in self._board.live()}
        # A reading of memory must not wait for a load.
        if self._lock.acquire(timeout=0.5):
            try:
                for number in [each for each in self._garbage if each not in live]:
                    del self._garbage[number]
                for number in [each for each in self._fault_ballast if each not in live]:
                    ballast.free(self._fault_ballast.pop(number))
            finally:
                self._lock.release()

    def run_point(self, once: Callable[[], FloatArray], features: FloatArray) -> FloatArray:
        """Run the model once; at a point where a plan strikes, with its fault in place."""
        if not self._board.live():
            return once()
        self._lift_what_is_over()
        faults = self._faults_at(*_RUN_SITES)
        if self._limit_bytes is None:
            # The fallback, and the faults of the device are not its. What the input brings about goes where it goes.
            faults = [fault for fault in faults if fault.plan.input_above is not None]
        struck = [fault for fault in faults if fault.strike(lambda: float(features.max()))]
        # Garbage of an earlier point that nobody has collected yet still holds the memory.
        lingering = [
            fault
            for fault in faults
            if fault not in struck and (piece := self._garbage.get(fault.number)) is not None and piece() is not None
        ]
        try:
            imposed = [fault for fault in struck if self._imposed(fault)]
            missing = any(fault.plan.site is Site.LIBRARY_MISSING for fault in imposed)

            def run() -> FloatArray:
                if missing:
                    self._miss_library()
                return once()

            return self._watched(run, imposed, lingering)
        finally:
            for fault in struck:
                if fault.exhausted:
                    with self._lock:
                        ballast.free(self._fault_ballast.pop(fault.number, []))

    def _imposed(self, fault: CountingFault) -> bool:
        """Bring a fault about; say whether it is there. What fails on the way is no fault of the runtime's."""
        try:
            with interposer.uncounted():
                return self._impose(fault)
        except Exception as error:
            text = f"it could not be brought about: {type(error).__name__}: {str(error)[-300:]}"
            fault.note(text)
            raise BackendError(f"the fault at {fault.plan.site.value}: {text}") from error

    @staticmethod
    def _watched(act: Callable[[], T], struck: list[CountingFault], lingering: Sequence[CountingFault] = ()) -> T:
        try:
            result = act()
        except Exception as error:
            # Another error is none of the fault's: it counts as neither fired nor absorbed.
            kind, missing = classify(error), MISSING_LIBRARY in str(error)
            for fault in (*struck, *lingering):
                site = fault.plan.site
                is_its = (
                    missing
                    if site is Site.LIBRARY_MISSING
                    else kind in (ErrorKind.DEVICE_STICKY, ErrorKind.DEVICE_LOST)
                    if site in STICKY_SITES
                    else kind.is_oom
                )
                if is_its:
                    fault.fired(f"{type(error).__name__}: {str(error)[-160:]}")
            raise
        for fault in struck:
            fault.absorbed()
        return result

    def _impose(self, fault: CountingFault) -> bool:
        """Have the device's memory held by what the site says, poison the device, or end inside the runtime.

        Say whether the run that follows meets it.
        """
        site = fault.plan.site
        if site in _FATAL_SITES:
            return self._end_inside_the_runtime(fault)
        if site is Site.LIBRARY_MISSING:
            return True
        if site in STICKY_SITES:
            self._strike_device(site)
            return True
        with self._lock:
            if not fault.live:
                # Disarmed since it struck: nobody would give back what is taken now.
                return False
            if site is Site.DEVICE_GARBAGE:
                # An earlier point's goes first: it would be collected while this one's grows old, and leave room.
                gc.collect()
            self._release_here()
            if site is Site.DEVICE_MEMORY:
                # Anew at each point: what was given back meanwhile is the others' too.
                held = self._fault_ballast.get(fault.number, [])
                self._fault_ballast[fault.number] = self._fill(held, fault.plan.min_bytes)
                self._release_here()
                return True
            pieces = ballast.fill(self._allocate_here, (CACHE_PIECE_BYTES,))
            if site is Site.DEVICE_CACHE:
                # Free again, and kept by the arena in regions of that size: nothing larger fits until it is released.
                ballast.free(pieces)
            elif pieces:
                self._garbage[fault.number] = weakref.ref(pieces[0])
                _make_garbage(pieces)
            return True

    def _end_inside_the_runtime(self, fault: CountingFault) -> bool:
        """Crash or hang the runtime, in a process that was made to be lost. Counted before: nobody can count after."""
        if not limits.is_expendable():
            fault.note("the model runs in a process that must not be lost: the fault was not brought about")
            return False
        crash = fault.plan.site is Site.RUNTIME_CRASH
        end = self._ready_to_end(fault.plan.site)
        fault.fired(f"{'a division that has no quotient' if crash else 'an endless loop'}, process {os.getpid()}")
        end()
        fault.absorbed(fired_before=True)
        return False

    def healthy(self) -> Health:
        """Allocate 1 MiB, multiply a matrix, and compare with NumPy in double precision."""
        began_s = time.perf_counter()
        try:
            elsewhere = self._device_to_use()
            if elsewhere is not None:
                return elsewhere.healthy()
            self._lift_what_is_over()
            with self._lock:
                # First: of a device that is this process's memory, it is the runtime that says that it is full.
                self._allocate_here(MIB).free()
                x, expected = health_probe()
                y = self._square(x)
            error = float(np.max(np.abs(y - expected)))
            ok = error < 1e-3
            detail, oom = f"256 × 256 product, largest error {error:.1e}", False
        except Exception as failure:
            ok, error, detail = False, float("inf"), f"{type(failure).__name__}: {str(failure)[-600:]}"
            oom = classify(failure).is_oom
        return Health(ok, detail, error, time.perf_counter() - began_s, oom)

    def close(self) -> None:
        """Disarm every fault and give back what they held."""
        for fault in self._armed:
            fault.disarm()
        self._lift_what_is_over()


class HostDevice(DeviceBackend):
    """A backend whose device is a bounded part of the host's memory. Its fallback is the same without the bound."""

    #: What the device is called; without the bound it has the backend's name.
    bounded_name: ClassVar[str]

    def __init__(self, device: str | None = None, *, bounded: bool = True) -> None:
        """Make the device (bounded once ``limit_memory`` was called), or with ``bounded=False`` the fallback."""
        self._bounded = bounded
        super().__init__(device)

    def _named(self, device: str | None) -> tuple[str, int]:
        its = self.bounded_name if self._bounded else self.name
        if device not in (None, its):
            raise BackendError(f"{self.name} has no device {device!r}: expected {its!r}, or none named")
        return its, 0

    def _variant(self) -> dict[str, Any]:
        return {"bounded": self._bounded}

    @classmethod
    def taking_over(cls, board: Board) -> Backend:
        """Make the backend that takes over from a failed device, struck by the plans on that one's board."""
        made = cls(bounded=False)
        made._board, made.is_blind = board, True
        return made

    def fallback(self) -> Backend:
        """Give the same without the bound; it shares the plans that are armed at the host's memory."""
        return self.taking_over(self._board)


def _make_garbage(pieces: list[Allocation]) -> None:
    """Leave the pieces to an unreachable cycle that only a full collection finds."""
    cycle: list[Any] = [pieces]
    cycle.append(cycle)
    # Old objects: a young collection, which any allocation can trigger, would find the cycle at once.
    gc.collect()
