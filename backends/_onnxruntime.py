"""What the ONNX Runtime backends share: sessions, allocations, the model, the faults, the health probe.

A variant says how a session is made for its device, how its memory is capped, and which arena is to be shrunk.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import os
import resource
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from backends.contract import (
    Allocation,
    ArmedFault,
    Availability,
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
from backends.errors import classify
from backends.faults import ballast, limits
from backends.faults.plan import Board, CountingFault
from backends.host import available_bytes, host_memory
from backends.model import BLOCK_MODEL, CRASH_MODEL, HANG_MODEL, N_MELS, PROBE_MODEL, ModelSpec

if TYPE_CHECKING:
    import onnxruntime as ort

# Since 1.32 the Linux wheel reports usage over the network and keeps a session file in the temporary folder, unless it
# is told not to before it is imported. Nothing about a dictation leaves the machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_log = logging.getLogger("plimsoll.backends")

T = TypeVar("T")
MIB = 1 << 20
#: Faults hold the device's memory in pieces of this size: smaller than any tensor of a window that matters.
_CACHE_PIECE_BYTES = 256 << 10
#: No library of this name exists: the runtime says so itself.
_MISSING_LIBRARY = "libplimsoll-that-is-missing.so.1"
_RSS_SOURCE = Path("/proc/self/statm")
_PAGE_BYTES = resource.getpagesize()


def resident_bytes() -> int:
    """Read this process's resident memory."""
    return int(_RSS_SOURCE.read_text().split()[1]) * _PAGE_BYTES


def heap_trim() -> None:
    """Give the C library's free heap memory back to the system, where it can (glibc, psutil 7.2)."""
    import psutil

    trim = getattr(psutil, "heap_trim", None)
    if trim is not None:
        trim()


class _Block(Allocation):
    """A bound output: it lives in the arena for as long as the runtime's value is referred to."""

    def __init__(self, backend: OrtBackend, value: Any, size_bytes: int) -> None:
        self._backend: OrtBackend | None = backend
        self._value = value
        self.size_bytes = size_bytes

    def free(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            self._value = None
            backend._held(-self.size_bytes)

    def __del__(self) -> None:
        # Freed by the garbage collector: the account has to follow.
        self.free()


class _Held(Allocation):
    """What was allocated through a backend, wherever its device is now."""

    def __init__(self, where: Allocation) -> None:
        self._where: Allocation | None = where
        self.size_bytes = where.size_bytes

    def free(self) -> None:
        where, self._where = self._where, None
        if where is not None:
            where.free()

    def move(self, allocate: Callable[[int], Allocation]) -> None:
        """Take the same memory anew where the device is now; the old is given back first."""
        where, self._where = self._where, None
        if where is not None:
            where.free()
            self._where = allocate(self.size_bytes)


class OrtModel(Model):
    """An acoustic model in an ONNX Runtime session."""

    def __init__(self, backend: OrtBackend, session: ort.InferenceSession, path: Path) -> None:
        """Check the session's inputs and outputs. Raises ModelError."""
        self._backend = backend
        self._session: ort.InferenceSession | None = session
        self.device = backend.device
        shape = _shape_of(session, path)
        self._input, self._output = shape.input_name, shape.output_name
        self.window_frames, self.chunk_frames = shape.spec.window_frames, shape.spec.chunk_frames
        self.vocabulary = shape.vocabulary
        self._path = path
        # Measured once: the file may be gone, or another, by the time that the model runs.
        self.weights_bytes, self._fixed_bytes, self._item_bytes = _working_set(path)

    def run(self, features: FloatArray) -> FloatArray:
        """Run float32 [batch, window_frames, 80]."""
        session = self._session
        if session is None:
            raise ModelError(f"{self._path} was unloaded: load it again")
        expected = (self.window_frames, N_MELS)
        if features.ndim != 3 or features.shape[1:] != expected or features.dtype != np.float32 or not len(features):
            raise ModelError(
                f"features are {features.dtype} {list(features.shape)}: "
                f"expected float32 [batch, {expected[0]}, {N_MELS}]"
            )

        def once() -> FloatArray:
            scores: FloatArray = session.run([self._output], {self._input: features})[0]
            # A copy: it must not keep the runtime's buffer.
            return np.array(scores[:, -(self.chunk_frames // 2) :])

        return self._backend._run_point(once, self.working_set_bytes(len(features)), features)

    def working_set_bytes(self, batch: int) -> int:
        """Say what the runtime's own profile measured, extended in proportion to the batch."""
        return self._fixed_bytes + self._item_bytes * batch

    def close(self) -> None:
        """Unload the model."""
        if self._session is not None:
            self._session = None
            self._backend._unloaded(self.weights_bytes)


@dataclass(frozen=True)
class _Shape:
    """What a session's inputs and outputs say of the model."""

    input_name: str
    output_name: str
    spec: ModelSpec
    vocabulary: int


def _shape_of(session: ort.InferenceSession, path: Path) -> _Shape:
    """Check a session's inputs and outputs. Raises ModelError with what was found and what was expected."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    taken = inputs[0].shape if len(inputs) == 1 else []
    if len(taken) != 3 or inputs[0].type != "tensor(float)" or taken[2] != N_MELS or isinstance(taken[0], int):
        found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise ModelError(
            f"{path} has the inputs {found}: "
            f"expected one input of type tensor(float) and shape [batch, frames, {N_MELS}] with a free batch"
        )
    spec = _spec_of(session, path)
    if isinstance(taken[1], int) and taken[1] != spec.window_frames:
        raise ModelError(
            f"{path} takes windows of {taken[1]} frames: expected {spec.window_frames} "
            f"({spec.context_frames} of left context and {spec.chunk_frames} of chunk; "
            "a model says otherwise in its metadata, key plimsoll.spec)"
        )
    given = outputs[0].shape
    rows = spec.window_frames // 2
    if len(outputs) != 1 or len(given) != 3 or given[1] != rows or not isinstance(given[2], int):
        found = ", ".join(f"{o.name} {o.type} {o.shape}" for o in outputs)
        raise ModelError(f"{path} has the outputs {found}: expected one of shape [batch, {rows}, vocabulary]")
    return _Shape(inputs[0].name, outputs[0].name, spec, given[2])


def _spec_of(session: ort.InferenceSession, path: Path) -> ModelSpec:
    """Read the model's own shape from its metadata; a model without it has the default windows."""
    text = session.get_modelmeta().custom_metadata_map.get("plimsoll.spec")
    if text is None:
        return ModelSpec()
    try:
        return ModelSpec(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} has unusable metadata plimsoll.spec: {error}") from error


_PROFILES = "plimsoll-profile-"
_working_sets: dict[tuple[str, int, int], tuple[int, int, int]] = {}


def _working_set(path: Path) -> tuple[int, int, int]:
    """Measure (bytes of weights, fixed bytes of a run, bytes for each item), from a throwaway session's profile."""
    import onnxruntime as ort

    stat = path.stat()
    key = (str(path), stat.st_mtime_ns, stat.st_size)
    if key in _working_sets:
        return _working_sets[key]
    _sweep_profiles()
    with tempfile.TemporaryDirectory(prefix=f"{_PROFILES}{os.getpid()}-") as folder:
        options = quiet_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        shape = _shape_of(session, path)
        batches = (1, 3)
        for batch in batches:
            session.run(None, {shape.input_name: np.zeros((batch, shape.spec.window_frames, N_MELS), np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text())
    peaks: list[int] = []
    peak = weights = highest = 0
    for event in sorted(events, key=lambda e: float(e.get("ts", 0)) + float(e.get("dur", 0))):
        args = event.get("args", {})
        if event["name"] == "model_run":
            peaks.append(peak)
            peak = 0
        elif "mem_bytes_in_use" in args:
            # As requested, where the runtime says it: its arena rounds up, here by another rule than under a cap.
            in_use = int(args.get("mem_bytes_requested_in_use", args["mem_bytes_in_use"]))
            before, highest = highest, int(args["mem_in_use_peak"])
            if not before:
                weights = in_use - int(args.get("mem_requested_in_use_delta", args["mem_in_use_delta"]))
                before = highest
            # What the kernel took and gave back while it ran.
            workspace = highest - int(args["mem_bytes_in_use"]) if highest > before else 0
            peak = max(peak, in_use + workspace)
    if len(peaks) != len(batches) or not peaks[0]:
        raise ModelError(f"ONNX Runtime {ort.__version__} gives no memory figures in its profile: 1.28 or newer does")
    per_item = max(0, (peaks[1] - peaks[0]) // (batches[1] - batches[0]))
    _working_sets[key] = (weights, max(0, peaks[0] - weights - per_item), per_item)
    return _working_sets[key]


def _sweep_profiles() -> None:
    """Remove the profiles of processes that were killed while they measured."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PROFILES}*"):
        process_id = folder.name.removeprefix(_PROFILES).partition("-")[0]
        if process_id.isdigit() and not Path(f"/proc/{process_id}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def quiet_options() -> Any:
    """Make the options that every session has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    # The runtime writes 400 bytes to standard error for each out-of-memory error, which is raised as well.
    options.log_severity_level = 4
    # One thread: requests repeat exactly from run to run, and so do results.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # No planned block: each tensor is a request of its own, and memory too fragmented for one plan still serves.
    options.enable_mem_pattern = False
    return options


#: Points of a model run on the device.
_FATAL_SITES = (Site.RUNTIME_CRASH, Site.RUNTIME_HANG)
_RUN_SITES = (Site.DEVICE_MEMORY, Site.DEVICE_CACHE, Site.DEVICE_GARBAGE, Site.LIBRARY_MISSING, *_FATAL_SITES)
_PROVENANCE = {
    Site.RUNTIME_CRASH: Provenance.KILLED,
    Site.RUNTIME_HANG: Provenance.KILLED,
    Site.LIBRARY_MISSING: Provenance.MISSING,
}


class OrtBackend(Backend):
    """The part of a backend that every ONNX Runtime execution provider shares."""

    provider: ClassVar[str]
    package: ClassVar[str]
    #: What the shrinkage option calls this device's arena.
    arena: ClassVar[str]

    def __init__(self) -> None:
        """Make a backend without a memory limit."""
        self._limit_bytes: int | None = None
        self._block_session: ort.InferenceSession | None = None
        self._probe_session: ort.InferenceSession | None = None
        self._held_bytes = 0
        self._weights_bytes = self._working_set_bytes = 0
        self._models = 0
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

    # What a variant says.

    @abc.abstractmethod
    def _options(self) -> Any:
        """Make session options for this device, under its limit."""

    @abc.abstractmethod
    def _register_limit(self, limit_bytes: int) -> None:
        """Have sessions made from here on share an arena with this cap."""

    def _has_arena(self) -> bool:
        """Whether sessions made here keep memory in an arena."""
        return True

    # What they share.

    @classmethod
    def probe(cls) -> Availability:
        """Import the runtime and look for the execution provider."""
        try:
            import onnxruntime as ort
        except Exception as error:
            return Availability(False, f"{cls.package} cannot be imported ({error}): pip install {cls.package}")
        if cls.provider not in ort.get_available_providers():
            return Availability(False, f"{cls.package} {ort.__version__} has no {cls.provider}")
        return Availability(True, runtime=f"{cls.package} {version(cls.package)}")

    def _session(self, path: Path) -> ort.InferenceSession:
        import onnxruntime as ort

        session = ort.InferenceSession(str(path), self._options(), providers=[self.provider])
        if session.get_providers()[0] != self.provider:
            raise ModelError(f"the runtime gave {session.get_providers()} where {self.provider} was asked for")
        return session

    def memory(self) -> MemoryReading:
        """Estimate: bound outputs that are held, weights, and the working set of the last run. It says so."""
        if self._elsewhere is not None:
            return self._elsewhere.memory()
        self._lift_what_is_over()
        total = host_memory().total_bytes
        used = self._held_bytes + self._weights_bytes + (self._working_set_bytes if self._models else 0)
        source = "estimate: bound outputs held, weights, and the working set of the last run as profiled"
        return MemoryReading(used, used, self._limit_bytes, total, "process", False, source)

    def allocate(self, size_bytes: int) -> Allocation:
        """Have the runtime fill a block of ones in its own arena, and keep it."""
        if size_bytes < 4:
            raise ValueError(f"size_bytes is {size_bytes}: expected at least 4")
        allocate = self._allocate_here if self._elsewhere is None else self._elsewhere.allocate
        held = _Held(allocate(size_bytes))
        with self._lock:
            self._allocations.add(held)
        return held

    def _allocate_here(self, size_bytes: int) -> Allocation:
        with self._lock:
            if self._block_session is None:
                self._block_session = self._session(BLOCK_MODEL)
            binding = self._block_session.io_binding()
            binding.bind_cpu_input("shape", np.array([size_bytes // 4], np.int64))
            binding.bind_output("block", "cpu")
            self._block_session.run_with_iobinding(binding)
            value = binding.get_outputs()[0]
            self._held(size_bytes)
            return _Block(self, value, size_bytes)

    # Elsewhere.

    def share(self) -> Share:
        """Share the name, the limit, what a variant adds, and the board of faults."""
        data = {"backend": self.name, "limit_bytes": self._limit_bytes, "board": self._board.descriptor}
        return Share(data | self._variant(), (self._board.descriptor,))

    def _variant(self) -> dict[str, Any]:
        """Say what the constructor of this variant was given, by name."""
        return {}

    @classmethod
    def rebuild(cls, data: Mapping[str, Any]) -> Backend:
        """Make the backend that was shared; its limit is proved here as well."""
        options = {name: value for name, value in data.items() if name not in ("backend", "limit_bytes", "board")}
        made = cls(**options)
        made._board = Board(data["board"])
        if data["limit_bytes"] is not None:
            made.limit_memory(data["limit_bytes"])
        return made

    def hand_over(self, device: Device) -> None:
        """Move what is held to where the device is now. What does not fit there is given back, and logged."""
        self._elsewhere = device
        self._move_held(device.allocate)

    def take_back(self, device: Device) -> None:
        """Move what is held back here, likewise."""
        if self._elsewhere is device:
            self._elsewhere = None
            self._move_held(self._allocate_here)

    def _move_held(self, allocate: Callable[[int], Allocation]) -> None:
        with self._lock:
            allocations = tuple(self._allocations)
        for held in allocations:
            try:
                held.move(allocate)
            except Exception as error:
                _log.warning("%d bytes could not be taken anew on the device: %s", held.size_bytes, error)

    def _held(self, change_bytes: int) -> None:
        with self._lock:
            self._held_bytes += change_bytes

    def _unloaded(self, weights_bytes: int) -> None:
        with self._lock:
            self._models -= 1
            self._weights_bytes -= weights_bytes

    def release_cached(self) -> int:
        """Shrink the arena and trim the heap."""
        if self._elsewhere is not None:
            return self._elsewhere.release_cached()
        return self._release_here()

    def _release_here(self) -> int:
        self._lift_what_is_over()
        before = resident_bytes()
        with self._lock:
            if self._block_session is not None and self._has_arena():
                self._shrink(self._block_session)
        heap_trim()
        return max(0, before - resident_bytes())

    def _shrink(self, session: ort.InferenceSession) -> None:
        import onnxruntime as ort

        # The output is bound to memory of our own: an output in the arena would keep a region of it from being freed.
        binding = session.io_binding()
        binding.bind_cpu_input("shape", np.array([1], np.int64))
        binding.bind_ortvalue_output("block", ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32)))
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self.arena)
        session.run_with_iobinding(binding, options)

    def limit_memory(self, limit_bytes: int) -> None:
        """Register an arena with this cap, and prove it: half of it can be had, and more than all of it cannot."""
        self.require(Capability.MEMORY_LIMIT)
        if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int):
            raise ValueError(f"limit_bytes is {limit_bytes!r}: expected a whole number of bytes")
        most = available_bytes() // 2
        if not MIB <= limit_bytes <= most:
            raise ValueError(
                f"limit_bytes is {limit_bytes}: expected at least {MIB} (1 MiB) and at most {most} "
                "(half of the host memory that is available now)"
            )
        if self._elsewhere is not None:
            raise BackendError("the device is in a worker now: limit its memory before a subject is made")
        with self._lock:
            self._register_limit(limit_bytes)
            # Sessions made from here on read it.
            before, self._limit_bytes = self._limit_bytes, limit_bytes
            self._block_session = self._probe_session = None
            try:
                self._prove_limit(limit_bytes)
            except BaseException:
                self._limit_bytes, self._block_session = before, None
                if before is not None:
                    self._register_limit(before)
                raise

    def _prove_limit(self, limit_bytes: int) -> None:
        self._allocate_here(limit_bytes // 2 // 4 * 4).free()
        self._release_here()
        self._prove_refusal(limit_bytes)

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

    def load(self, path: Path) -> Model:
        """Load an ONNX file. Raises ModelError for what is not a usable acoustic model."""
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
            if classify(error).is_oom or isinstance(error, BackendError | OSError):
                raise
            raise ModelError(f"{path} does not load: {type(error).__name__}: {str(error)[:300]}") from error

    def _prepare(self, path: Path) -> None:
        """Do what a load needs to be done while there is memory for it."""
        if not path.is_file():
            raise ModelError(f"there is no model file {path}: expected an ONNX file")
        # Measured beside the load, so that a run needs no second session at a time when memory is short.
        weights_bytes, _, _ = _working_set(path)
        if self._block_session is None:
            # Shrinking needs it.
            self._block_session = self._session(BLOCK_MODEL)
        if self._limit_bytes is not None:
            # The runtime takes weights past its cap, and then what is left wraps around zero and the cap is gone.
            self._release_here()
            self._allocate_here(max(4, weights_bytes)).free()
            self._release_here()

    def _load(self, path: Path) -> Model:
        model = OrtModel(self, self._session(path), path)
        if self._limit_bytes is not None:
            self._prove_refusal(self._limit_bytes)
        self._models += 1
        self._weights_bytes += model.weights_bytes
        return model

    # Faults.

    def arm(self, plan: FaultPlan) -> ArmedFault:
        """Arm a plan for the models that this backend, its fallback or a worker of either loads and runs."""
        needs = {
            Site.HOST_MEMORY: Capability.HOST_OOM,
            Site.DEVICE_ERROR: Capability.DEVICE_ERROR,
            Site.RUNTIME_CRASH: Capability.RUNTIME_CRASH,
            Site.RUNTIME_HANG: Capability.RUNTIME_CRASH,
            Site.LIBRARY_MISSING: Capability.RUNTIME_CRASH,
        }.get(plan.site, Capability.DEVICE_OOM)
        self.require(needs)
        if plan.process is not None:
            raise Unsupported(
                f"{self.name} arms a plan in its own process: expected process None, not {plan.process!r}"
            )
        if plan.site is Site.HOST_MEMORY:
            if self._elsewhere is None:
                limits.require_expendable()
        elif self._limit_bytes is None:
            raise ValueError(f"{plan.site.value} needs a device with a memory limit: call limit_memory first")
        provenance = _PROVENANCE.get(plan.site, Provenance.CAPPED)
        fault = self._board.arm(plan, provenance, self._lift)
        with self._lock:
            self._armed = [each for each in self._armed if each.live]
            self._armed.append(fault)
        return fault

    def _faults_at(self, *sites: Site) -> list[CountingFault]:
        return [fault for fault in self._board.live() if fault.plan.site in sites]

    def _lift(self) -> None:
        """Give back what a plan held that was disarmed, here and where the device is."""
        self._lift_what_is_over()
        if self._elsewhere is not None:
            with contextlib.suppress(Exception):
                # It lifts there when its memory is read.
                self._elsewhere.memory()

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

    def _run_point(self, once: Callable[[], FloatArray], working_set_bytes: int, features: FloatArray) -> FloatArray:
        """Run the model once; at a point where a plan strikes, with its fault in place."""
        self._working_set_bytes = working_set_bytes
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
            result = self._watched(lambda: self._imposed(struck, once), struck, lingering)
        finally:
            for fault in struck:
                if fault.exhausted:
                    with self._lock:
                        ballast.free(self._fault_ballast.pop(fault.number, []))
        return result

    def _imposed(self, struck: list[CountingFault], once: Callable[[], FloatArray]) -> FloatArray:
        for fault in struck:
            self._impose(fault)
        return once()

    @staticmethod
    def _watched(act: Callable[[], T], struck: list[CountingFault], lingering: Sequence[CountingFault] = ()) -> T:
        try:
            result = act()
        except Exception as error:
            # Another error is none of the fault's: it counts as neither fired nor absorbed.
            is_oom, missing = classify(error).is_oom, _MISSING_LIBRARY in str(error)
            for fault in (*struck, *lingering):
                if missing if fault.plan.site is Site.LIBRARY_MISSING else is_oom:
                    fault.fired(f"{type(error).__name__}: {str(error)[-160:]}")
            raise
        for fault in struck:
            if fault.plan.site not in _FATAL_SITES:
                fault.absorbed()
        return result

    def _impose(self, fault: CountingFault) -> None:
        """Bring the fault about: have the device's memory held by what the site says, or end inside the runtime."""
        site = fault.plan.site
        if site in _FATAL_SITES:
            self._end_inside_the_runtime(fault)
            return
        if site is Site.LIBRARY_MISSING:
            quiet_options().register_custom_ops_library(_MISSING_LIBRARY)
            return
        with self._lock:
            if not fault.live:
                # Disarmed since it struck: nobody would give back what is taken now.
                return
            if site is Site.DEVICE_MEMORY:
                if fault.number not in self._fault_ballast:
                    self._release_here()
                    held = ballast.fill(self._allocate_here)
                    self._fault_ballast[fault.number] = ballast.leave(held, fault.plan.min_bytes)
                    self._release_here()
                return
            self._release_here()
            pieces = ballast.fill(self._allocate_here, (_CACHE_PIECE_BYTES,))
            if site is Site.DEVICE_CACHE:
                # Free again, and kept by the arena in regions of that size: nothing larger fits until it is released.
                ballast.free(pieces)
            elif pieces:
                self._garbage[fault.number] = weakref.ref(pieces[0])
                _make_garbage(pieces)

    def _end_inside_the_runtime(self, fault: CountingFault) -> None:
        """Crash or hang the runtime, in a process that was made to be lost. Counted before: nobody can count after."""
        if not limits.is_expendable():
            fault.note("the model runs in a process that must not be lost: the fault was not brought about")
            return
        crash = fault.plan.site is Site.RUNTIME_CRASH
        session = self._session(CRASH_MODEL if crash else HANG_MODEL)
        fault.fired(f"{'a division that has no quotient' if crash else 'an endless loop'}, process {os.getpid()}")
        if crash:
            session.run(None, {"a": np.array([-(2**31)], np.int32), "b": np.array([-1], np.int32)})
        else:
            session.run(None, {"go": np.array(True), "x": np.ones(1, np.float32)})
        fault.absorbed(fired_before=True)

    def healthy(self) -> Health:
        """Allocate 1 MiB, multiply a matrix, and compare with NumPy in double precision."""
        if self._elsewhere is not None:
            return self._elsewhere.healthy()
        self._lift_what_is_over()
        began_s = time.perf_counter()
        try:
            with self._lock:
                self._allocate_here(MIB).free()
                if self._probe_session is None:
                    self._probe_session = self._session(PROBE_MODEL)
                x = np.random.RandomState(7).standard_normal((256, 256)).astype(np.float32)
                y = self._probe_session.run(None, {"x": x})[0]
            wide = x.astype(np.float64)
            error = float(np.max(np.abs(y - wide @ wide)))
            ok = error < 1e-3
            detail = f"256 × 256 product, largest error {error:.1e}"
        except Exception as failure:
            ok, error, detail = False, float("inf"), f"{type(failure).__name__}: {str(failure)[-200:]}"
        return Health(ok, detail, error, time.perf_counter() - began_s)

    def close(self) -> None:
        """Disarm every fault and drop the sessions."""
        for fault in self._armed:
            fault.disarm()
        self._lift_what_is_over()
        with self._lock:
            self._block_session = self._probe_session = None


def _make_garbage(pieces: list[Allocation]) -> None:
    """Leave the pieces to an unreachable cycle that only a full collection finds."""
    import gc

    cycle: list[Any] = [pieces]
    cycle.append(cycle)
    # Old objects: a young collection, which any allocation can trigger, would find the cycle at once.
    gc.collect()
