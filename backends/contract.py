"""The whole adapter contract: what every backend can be asked, and what it must say about itself.

Bytes are ``int`` with the unit in the name. Data are frozen dataclasses that survive a trip through JSON, so that a
plan can be armed in another process and its record read back.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class Capability(enum.Enum):
    """What a backend can do, ever. The docstring of each is its definition; every adapter states each of them."""

    def __new__(cls, value: str, definition: str = "") -> Capability:
        """Attach the definition to the member."""
        member = object.__new__(cls)
        member._value_ = value
        member.__doc__ = definition
        return member

    MEMORY_LIMIT = "memory_limit", "The runtime enforces a cap on its device memory, and the cap can be proved."
    RELEASE_CACHED = "release_cached", "Memory the runtime keeps for reuse can be given back to the system."
    EXACT_MEMORY_READING = "exact_memory_reading", "What the device memory holds is read to the page, not estimated."
    CACHE_OOM = "cache_oom", "What the runtime keeps for reuse can be in the way of a request until it is given back."
    DEVICE_OOM = "device_oom", "A genuine out-of-memory error of the device can be brought about."
    HOST_OOM = "host_oom", "A genuine out-of-memory error of the host can be brought about in a child process."
    FALLBACK = "fallback", "Another backend can take over without touching the failed device."
    DEVICE_ERROR = "device_error", "A genuine device error other than out of memory can be brought about."
    RUNTIME_CRASH = "runtime_crash", "The runtime can be made to crash, to hang and to miss a library, in a worker."
    DEVICE_MEMORY_OF_OTHERS = "device_memory_of_others", "Another process can take the device's memory away."
    ALLOCATION_FAULTS = "allocation_faults", "Any single allocation of the process that runs the model can be refused."
    DEVICE_ALLOCATION_FAULTS = "device_allocation_faults", "So can any single one of the device's own memory."


@dataclass(frozen=True)
class Support:
    """One adapter's statement about one capability: yes, or no with the reason and a link to the evidence."""

    yes: bool
    reason: str = ""
    link: str = ""

    def __post_init__(self) -> None:
        if not self.yes and not (self.reason and self.link):
            raise ValueError("a capability that is not supported needs a reason and a link")


YES = Support(True)


def no(reason: str, link: str) -> Support:
    """State that a capability is not supported."""
    return Support(False, reason, link)


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine now, or why not. ``runtime`` names library and version."""

    available: bool
    reason: str = ""
    runtime: str = ""


@dataclass(frozen=True)
class MemoryReading:
    """One reading of a memory, all in bytes.

    ``limit_bytes`` is what may be used (a cap), ``total_bytes`` what is there; pressure is a share of the smaller.
    ``scope`` says whose use it is: ``"process"`` or ``"device"``. ``exact`` is False for an estimate; ``source``
    says how it was made. ``fragmented_bytes`` of what is reserved are in pieces that cannot be given back.
    """

    used_bytes: int
    reserved_bytes: int
    limit_bytes: int | None
    total_bytes: int
    scope: str
    exact: bool
    source: str
    fragmented_bytes: int = 0

    @property
    def fraction(self) -> float:
        """Used share of what may be used, 0.0 to 1.0 and above."""
        bound = self.total_bytes if self.limit_bytes is None else min(self.limit_bytes, self.total_bytes)
        return self.used_bytes / bound if bound else 1.0


class Site(enum.Enum):
    """Where a fault strikes. A *point* is one opportunity for it, counted whether or not the fault is armed there."""

    #: Others hold the device's memory: less than ``min_bytes`` of it are free. A point is a model run on the device.
    DEVICE_MEMORY = "device_memory"
    #: The runtime's own cache holds it, in regions of 256 KiB. A point is a model run.
    DEVICE_CACHE = "device_cache"
    #: Unreachable objects (a reference cycle) hold it until the garbage collector runs. A point is a model run.
    DEVICE_GARBAGE = "device_garbage"
    #: The host refuses requests of ``min_bytes`` and more (RLIMIT_DATA). A point is a model load, in a child process.
    HOST_MEMORY = "host_memory"
    #: A kernel traps: the device reports a sticky error that is not out of memory. A point is a model run, in a worker.
    DEVICE_ERROR = "device_error"
    #: A kernel's assertion fails, likewise.
    DEVICE_ASSERT = "device_assert"
    #: A kernel's launch fails: it writes to an address that is none. Likewise.
    DEVICE_ADDRESS = "device_address"
    #: The runtime crashes: the process dies of a signal inside it. A point is a model run, in a worker.
    RUNTIME_CRASH = "runtime_crash"
    #: The runtime never returns. A point is a model run, in a worker.
    RUNTIME_HANG = "runtime_hang"
    #: The runtime does not find a library that it is asked to load. A point is a model run.
    LIBRARY_MISSING = "library_missing"
    #: A request of ``min_bytes`` and more to the C library or the kernel is refused. Each is a point, in any process
    #: that is under the interposer; so are those of the next two.
    HOST_ALLOCATION = "host_allocation"
    #: A request to the CUDA runtime is refused: for memory of the device, or for pinned memory.
    DEVICE_ALLOCATION = "device_allocation"
    #: A kernel's launch is refused with the code of a failed launch. The device itself is not touched.
    DEVICE_LAUNCH = "device_launch"


class Provenance(enum.Enum):
    """How a fault was brought about."""

    EXHAUSTED = "exhausted"  # there really was no memory
    CAPPED = "capped"  # a native limit refused
    INTERPOSED = "interposed"  # the Nth allocation under the runtime was refused
    DEVICE = "device"  # a sticky device fault
    KILLED = "killed"  # a signal, or what the runtime did to its own process
    MISSING = "missing"  # something that the runtime needs was not there


@dataclass(frozen=True)
class FaultPlan:
    """Which points of a site fail.

    The ``nth`` point (from 1) and the following, ``times`` in all (None: from there on, until disarmed). ``min_bytes``
    is the smallest request that is refused. ``process`` and ``thread`` narrow the plan where a site has several
    (None: any). With ``input_above`` only a run whose input has a value above it is a point: the fault belongs to what
    is computed, whenever that is, on the fallback too. After ``disarm_after_s`` seconds the plan disarms itself.
    """

    site: Site
    nth: int = 1
    times: int | None = 1
    min_bytes: int = 1
    process: str | None = None
    thread: str | None = None
    input_above: float | None = None
    disarm_after_s: float = 60.0

    def __post_init__(self) -> None:
        if self.nth < 1 or (self.times is not None and self.times < 1) or self.min_bytes < 1:
            raise ValueError(f"nth {self.nth}, times {self.times}, min_bytes {self.min_bytes}: each must be at least 1")
        if not self.disarm_after_s > 0:
            raise ValueError(f"disarm_after_s is {self.disarm_after_s}: expected more than 0 seconds")

    def to_json(self) -> dict[str, Any]:
        """Give the plan as plain data."""
        return dataclasses.asdict(self) | {"site": self.site.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FaultPlan:
        """Take a plan back from plain data. Raises ValueError or TypeError for what is not a plan."""
        return cls(**{**data, "site": Site(data["site"])})


@dataclass(frozen=True)
class FaultRecord:
    """What became of a plan: points seen, faults that fired, and faults that fired but that the runtime absorbed."""

    points_seen: int
    faults_fired: int
    absorbed: int
    provenance: Provenance | None
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """Give the record as plain data."""
        return dataclasses.asdict(self) | {"provenance": self.provenance.value if self.provenance else None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FaultRecord:
        """Take a record back from plain data."""
        provenance = data["provenance"]
        return cls(**{**data, "provenance": Provenance(provenance) if provenance else None})


@dataclass(frozen=True)
class Health:
    """What the health probe found: it allocated, computed and compared on the device."""

    ok: bool
    detail: str
    max_abs_error: float
    latency_s: float
    #: It failed for want of memory: the device may be well, and others have what it has.
    out_of_memory: bool = False


class BackendError(Exception):
    """A backend was asked for something it cannot do. The message says what was wrong, and what to do."""


class Unsupported(BackendError):
    """The backend states that it does not have this capability."""


class LimitNotEnforced(BackendError):
    """A memory limit was set, but the proof that followed got past it."""


class ModelError(BackendError):
    """A model file cannot be used. The message says what was found, and what was expected."""


class Allocation(abc.ABC):
    """Real, touched memory on the device."""

    size_bytes: int

    @abc.abstractmethod
    def free(self) -> None:
        """Give the memory back to the runtime. A second call does nothing."""


class Model(abc.ABC):
    """A loaded acoustic model."""

    device: str
    window_frames: int
    chunk_frames: int
    vocabulary: int

    @abc.abstractmethod
    def run(self, features: FloatArray) -> FloatArray:
        """Run float32 [batch, window_frames, 80] and return float32 [batch, chunk_frames / 2, vocabulary].

        Raises the runtime's own error when there is no memory: see ``backends.errors.classify``.
        """

    @abc.abstractmethod
    def working_set_bytes(self, batch: int) -> int:
        """Say how many bytes of device memory a run of this batch needs at its peak, weights excluded."""

    @abc.abstractmethod
    def close(self) -> None:
        """Unload the model."""


class ArmedFault(abc.ABC):
    """A fault plan that is armed. As a context manager it disarms on the way out."""

    plan: FaultPlan

    @abc.abstractmethod
    def record(self) -> FaultRecord:
        """Read points seen and faults fired so far."""

    @abc.abstractmethod
    def disarm(self) -> None:
        """Disarm the plan and give back what it held. A second call does nothing."""

    def __enter__(self) -> ArmedFault:
        """Nothing to do: the plan is armed already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disarm."""
        self.disarm()


class Device(Protocol):
    """A backend's device where another process has it."""

    def memory(self) -> MemoryReading:
        """Read its memory."""

    def allocate(self, size_bytes: int) -> Allocation:
        """Take real memory there. Raises RuntimeFailure when there is none."""

    def release_cached(self) -> int:
        """Give cached memory back there."""

    def collect(self) -> int:
        """Collect unreachable objects there."""

    def healthy(self) -> Health:
        """Probe it there."""


@dataclass(frozen=True)
class Share:
    """How another process makes the same backend: ``backends.rebuild(data)``, with ``descriptors`` passed on to it.

    ``preload`` is a ``module:function`` that imports the runtime, and touches no device: a process that has called it
    may be forked, and ``is_slow_to_import`` says that it is worth it. ``blind`` says that the process must not see an
    accelerator.
    """

    data: Mapping[str, Any]
    descriptors: tuple[int, ...]
    preload: str | None = None
    blind: bool = False
    is_slow_to_import: bool = False


class Backend(abc.ABC):
    """One inference runtime on one kind of device."""

    name: ClassVar[str]
    capabilities: ClassVar[Mapping[Capability, Support]]
    #: Where a model loaded here runs: "cuda:0", "cpu", …
    device: str

    @abc.abstractmethod
    def __init__(self, device: str | None = None) -> None:
        """Make the backend on the device of this name, such as "cuda:1" (None: its first). Raises BackendError."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an adapter that leaves a capability unstated."""
        super().__init_subclass__(**kwargs)
        stated = getattr(cls, "capabilities", None)
        if stated is not None and (missing := [c.value for c in Capability if c not in stated]):
            raise TypeError(f"{cls.__name__} does not state these capabilities: {', '.join(missing)}")

    @classmethod
    @abc.abstractmethod
    def probe(cls) -> Availability:
        """Say whether the backend can run here, or why not. Never raises for a missing runtime."""

    @abc.abstractmethod
    def memory(self) -> MemoryReading:
        """Read the device's memory."""

    @abc.abstractmethod
    def allocate(self, size_bytes: int) -> Allocation:
        """Take real device memory and touch it. Raises the runtime's own error when there is none."""

    @abc.abstractmethod
    def release_cached(self) -> int:
        """Give cached memory back; return how many bytes came back: of the device, or else of resident memory."""

    @abc.abstractmethod
    def collect(self) -> int:
        """Collect unreachable objects in this process and where the device is; return their number."""

    @abc.abstractmethod
    def limit_memory(self, limit_bytes: int) -> None:
        """Cap the device memory for what is loaded and allocated from here on, and prove it.

        Raises ValueError for a limit that makes no sense and LimitNotEnforced when the proof gets past the cap.
        """

    @abc.abstractmethod
    def load(self, path: Path) -> Model:
        """Load an acoustic model. Raises ModelError, or the runtime's own error when there is no memory."""

    @abc.abstractmethod
    def arm(self, plan: FaultPlan) -> ArmedFault:
        """Arm a fault. Raises Unsupported where the backend states that it cannot bring it about."""

    @abc.abstractmethod
    def healthy(self) -> Health:
        """Allocate, compute and compare on the device. Never raises."""

    @abc.abstractmethod
    def fallback(self) -> Backend:
        """Give the backend that takes over, built without touching the failed device."""

    @abc.abstractmethod
    def share(self) -> Share:
        """Say how a worker makes the same backend, with the same limit, struck by the faults that are armed here."""

    @classmethod
    @abc.abstractmethod
    def rebuild(cls, data: Mapping[str, Any]) -> Backend:
        """Make the backend that was shared, in a worker."""

    @abc.abstractmethod
    def hand_over(self, device: Device) -> None:
        """Have the device in another process: what is allocated here moves there, and what is asked is asked there."""

    @abc.abstractmethod
    def take_back(self, device: Device) -> None:
        """Have the device in this process again, unless it was handed over to another since."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back. The backend cannot be used afterwards."""

    def require(self, capability: Capability) -> None:
        """Raise Unsupported unless the backend states this capability."""
        support = self.capabilities[capability]
        if not support.yes:
            raise Unsupported(f"{self.name} cannot: {capability.value}: {support.reason} ({support.link})")
