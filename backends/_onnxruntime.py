"""What the ONNX Runtime backends share: sessions, allocations, the model, the health probe.

A variant says how a session is made for its device, how its memory is capped, and which arena is to be shrunk.
"""

from __future__ import annotations

import abc
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from backends._device import (
    MISSING_LIBRARY,
    DeviceBackend,
    check_features,
    file_key,
    heap_trim,
    preload_shared,
    resident_bytes,
)
from backends.contract import Allocation, Availability, FloatArray, MemoryReading, Model, ModelError, Site
from backends.host import total_bytes
from backends.model import BLOCK_MODEL, CRASH_MODEL, HANG_MODEL, N_MELS, PROBE_MODEL, ModelSpec

if TYPE_CHECKING:
    import onnxruntime as ort

# Since 1.32 the Linux wheel reports usage over the network and keeps a session file in the temporary folder, unless it
# is told not to before it is imported. Nothing about a dictation leaves the machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


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
        check_features(features, self.window_frames, N_MELS)

        def once() -> FloatArray:
            scores: FloatArray = session.run([self._output], {self._input: features})[0]
            # A copy: it must not keep the runtime's buffer.
            return np.array(scores[:, -(self.chunk_frames // 2) :])

        self._backend._working_set_bytes = self.working_set_bytes(len(features))
        return self._backend.run_point(lambda: self._backend.owned(once), features)

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


def preload() -> None:
    """Import all that a model needs; run none, and touch no device."""
    preload_shared()
    import onnxruntime  # noqa: F401  # for whoever is forked from this process


_PROFILES = "plimsoll-profile-"
_working_sets: dict[tuple[str, int, int], tuple[int, int, int]] = {}


def _working_set(path: Path) -> tuple[int, int, int]:
    """Measure (bytes of weights, fixed bytes of a run, bytes for each item), from a throwaway session's profile."""
    import onnxruntime as ort

    _, _, size_bytes = key = file_key(path)
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
        elif "output_size" in args:
            # Before 1.28 only what a node takes and gives, without weights: those are all that the file has.
            weights = size_bytes
            peak = max(peak, weights + int(args["activation_size"]) + int(args["output_size"]))
    if len(peaks) != len(batches) or not peaks[0]:
        raise ModelError(f"ONNX Runtime {ort.__version__} gives no memory figures in its profile: 1.24 or newer does")
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


class OrtBackend(DeviceBackend):
    """The part of a backend that every ONNX Runtime execution provider shares."""

    provider: ClassVar[str]
    package: ClassVar[str]
    #: What the shrinkage option calls this device's arena.
    arena: ClassVar[str]
    #: What a bound output calls this device.
    memory_name: ClassVar[str] = "cpu"

    def __init__(self, device: str | None = None) -> None:
        """Make a backend without a memory limit."""
        super().__init__(device)
        self._block_session: ort.InferenceSession | None = None
        self._probe_session: ort.InferenceSession | None = None
        self._held_bytes = 0
        self._weights_bytes = 0

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

    def _providers(self) -> list[Any]:
        """Name the execution provider, with its options."""
        return [self.provider]

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
        return Availability(True, runtime=f"{cls.package} {ort.__version__}")

    def _session(self, path: Path) -> ort.InferenceSession:
        import onnxruntime as ort

        # Where the provider fails, Python would make another session, on the CPU, and print that.
        session = ort.InferenceSession(str(path), self._options(), providers=self._providers(), enable_fallback=False)
        if session.get_providers()[0] != self.provider:
            raise ModelError(f"the runtime gave {session.get_providers()} where {self.provider} was asked for")
        return session

    def _memory_here(self) -> MemoryReading:
        """Estimate: bound outputs that are held, weights, and the working set of the last run. It says so."""
        total = total_bytes()
        used = self._held_bytes + self._weights_bytes + self._wanted_bytes()
        source = "estimate: bound outputs held, weights, and the working set of the last run as profiled"
        return MemoryReading(used, used, self._limit_bytes, total, "process", False, source)

    def _allocate_here(self, size_bytes: int) -> Allocation:
        """Have the runtime fill a block of ones in its own arena, and keep it."""
        with self._lock:
            if self._block_session is None:
                self._block_session = self._session(BLOCK_MODEL)
            binding = self._block_session.io_binding()
            binding.bind_cpu_input("shape", np.array([size_bytes // 4], np.int64))
            binding.bind_output("block", self.memory_name, self._index)
            bound = self._block_session
            self.owned(lambda: bound.run_with_iobinding(binding))
            value = binding.get_outputs()[0]
            self._held(size_bytes)
            return _Block(self, value, size_bytes)

    def _held(self, change_bytes: int) -> None:
        with self._lock:
            self._held_bytes += change_bytes

    def _unloaded(self, weights_bytes: int) -> None:
        with self._lock:
            self._models -= 1
            self._weights_bytes -= weights_bytes

    def _release_here(self) -> int:
        """Shrink the arena and trim the heap."""
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

    def _apply_limit(self, limit_bytes: int | None) -> None:
        """Register an arena with this cap; sessions made from here on are in it."""
        self._block_session = self._probe_session = None
        if limit_bytes is not None:
            self._register_limit(limit_bytes)

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

    def _square(self, matrix: FloatArray) -> FloatArray:
        if self._probe_session is None:
            self._probe_session = self._session(PROBE_MODEL)
        probe = self._probe_session
        product: FloatArray = self.owned(lambda: probe.run(None, {"x": matrix}))[0]
        return product

    def _ready_to_end(self, site: Site) -> Callable[[], object]:
        import onnxruntime as ort

        # On the host's processor, whatever the device is: a card's division has a quotient for everything.
        model = CRASH_MODEL if site is Site.RUNTIME_CRASH else HANG_MODEL
        session = ort.InferenceSession(str(model), quiet_options(), providers=["CPUExecutionProvider"])
        if site is Site.RUNTIME_CRASH:
            feeds = {"a": np.array([-(2**31)], np.int32), "b": np.array([-1], np.int32)}
        else:
            feeds = {"go": np.array(True), "x": np.ones(1, np.float32)}
        return lambda: session.run(None, feeds)

    def _miss_library(self) -> None:
        quiet_options().register_custom_ops_library(MISSING_LIBRARY)

    def close(self) -> None:
        """Disarm every fault and drop the sessions."""
        super().close()
        with self._lock:
            self._block_session = self._probe_session = None
