"""What the torch backends share: blocks, the model, the health probe, and how torch is brought to its end.

Torch is imported only where a device is: a process that has a backend, and no device, does not pay for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
from collections.abc import Callable
from importlib import util
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from backends._device import MISSING_LIBRARY, DeviceBackend, check_features, file_key, preload_shared
from backends.contract import Allocation, Availability, FloatArray, Model, ModelError, Site
from backends.errors import classify
from backends.model import N_MELS, ModelSpec, read_onnx

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
#: As torch's allocator for the CPU aligns (c10::gAlignment).
_ALIGNED_BYTES = 64
#: mallopt(3).
_M_ARENA_MAX = -8


def quiet_torch() -> None:
    """Import torch for inference in this process: one thread, no gradients, the same numbers each time."""
    first = "torch" not in sys.modules
    # cuBLAS repeats itself only with a workspace of a fixed size, set before it starts (torch, "Reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    # oneDNN keeps the code of each kernel for each batch: half a megabyte that a full device has not. The last two do.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2")
    import torch

    torch.set_grad_enabled(False)
    if first:
        # One thread: requests repeat exactly from run to run, and so do results. Refused once work was done.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
    torch.set_num_threads(1)
    # As use_deterministic_algorithms does, but for the compiler: that is imported for it, takes a second, and leaves a
    # folder in the temporary one.
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    # Full float32: TF32 keeps 10 bits of the mantissa.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def have_one_heap() -> None:
    """Let threads that begin from now on share the first one's heap.

    What the cap refuses as a block of its own, the C library would carve out of a heap of the thread's. That one keeps
    what it ever had, so that the device would shrink with each refusal, down to nothing.
    """
    # Another C library than GNU's has none of it, and no cap either.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def preload() -> None:
    """Import all that a model needs; run none, and touch no device."""
    have_one_heap()
    preload_shared()
    _import_all()


def _import_all() -> None:
    quiet_torch()
    importlib.import_module("backends._torch_model")


def _aligned(features: FloatArray) -> FloatArray:
    """Give the features where torch would have them: a kernel may add in an order that depends on the place.

    What came in shared memory lies well, and stays there.
    """
    if features.flags.writeable and features.ctypes.data % _ALIGNED_BYTES == 0:
        return features
    room = np.empty(features.nbytes + _ALIGNED_BYTES, np.uint8)
    begin = -room.ctypes.data % _ALIGNED_BYTES
    copy: FloatArray = room[begin : begin + features.nbytes].view(np.float32).reshape(features.shape)
    copy[...] = features
    return copy


class _Block(Allocation):
    """A tensor of ones: every page of it is touched."""

    def __init__(self, tensor: torch.Tensor, size_bytes: int) -> None:
        self._tensor: torch.Tensor | None = tensor
        self.size_bytes = size_bytes

    def free(self) -> None:
        self._tensor = None


class TorchModel(Model):
    """An acoustic model in torch."""

    def __init__(
        self, backend: TorchBackend, module: Any, spec: ModelSpec, path: Path, peaks_bytes: tuple[int, int]
    ) -> None:
        """Take a module on the backend's device, and what runs of one and of two windows hold there."""
        self._backend, self._module, self._path = backend, module, path
        self.device = backend.device
        self.window_frames, self.chunk_frames = spec.window_frames, spec.chunk_frames
        self.vocabulary = spec.vocabulary
        one, two = peaks_bytes
        self._first_bytes, self._further_bytes = one, two - one

    def run(self, features: FloatArray) -> FloatArray:
        """Run float32 [batch, window_frames, 80]."""
        import torch

        module = self._module
        if module is None:
            raise ModelError(f"{self._path} was unloaded: load it again")
        check_features(features, self.window_frames, N_MELS)

        def once() -> FloatArray:
            with torch.inference_mode():
                given = torch.from_numpy(_aligned(features))
                scores = module(given.to(self._backend.torch_device()))
                # A copy: it must not keep the whole output.
                return np.array(scores[:, -(self.chunk_frames // 2) :].cpu().numpy())

        self._backend.about_to_run(self.working_set_bytes(len(features)))
        try:
            return self._backend.run_point(lambda: self._backend.computed(once), features)
        finally:
            self._backend.has_run()

    def working_set_bytes(self, batch: int) -> int:
        """Say what runs of one and two windows were measured to hold, extended in proportion to the batch."""
        return self._first_bytes + self._further_bytes * (batch - 1)

    def close(self) -> None:
        """Unload the model."""
        if self._module is not None:
            self._module = None
            self._backend.unloaded()


class TorchBackend(DeviceBackend):
    """The part of a backend that torch's devices share."""

    preload = "backends._torch:preload"
    is_slow_to_import = True

    def __init__(self, device: str | None = None) -> None:
        """Make a backend without a memory limit."""
        super().__init__(device)
        #: What was in use when the run began that is going on now, if one is.
        self._idle_bytes: int | None = None
        #: What was measured of a file, by what tells it from another.
        self._peaks_bytes: dict[tuple[str, int, int], tuple[int, int]] = {}

    def _in_use_bytes(self) -> int:
        """Read what is in use of the device in this process, exactly."""
        raise NotImplementedError

    def _used_bytes(self) -> int:
        """Give what is in use, and what a run like the last one needs on top, but for a part that is in use already."""
        now = self._in_use_bytes()
        return max(now, (now if self._idle_bytes is None else self._idle_bytes) + self._wanted_bytes())

    def about_to_run(self, working_set_bytes: int) -> None:
        """Take note of a run that begins."""
        self._idle_bytes, self._working_set_bytes = self._in_use_bytes(), working_set_bytes

    def has_run(self) -> None:
        """Take note that it is over."""
        self._idle_bytes = None

    def unloaded(self) -> None:
        """Take note that a model is gone."""
        with self._lock:
            self._models -= 1

    @classmethod
    def probe(cls) -> Availability:
        """Look for torch, without importing it."""
        if util.find_spec("torch") is None:
            return Availability(False, "torch is not installed: pip install torch")
        return Availability(True, runtime=f"torch {version('torch')}")

    def torch_device(self) -> str:
        """Say what torch calls this device."""
        return "cpu"

    def computed(self, act: Callable[[], T]) -> T:
        """Do something with a model on the device. A variant says in which thread."""
        return self.owned(act)

    def _allocate_here(self, size_bytes: int) -> Allocation:
        import torch

        tensor = self.owned(lambda: torch.ones(size_bytes // 4, device=self.torch_device()))
        return _Block(tensor, size_bytes)

    def _prepare(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError(f"there is no model file {path}: expected the project's ONNX file, or FILE.pt2")
        # Compiled without memory, a source file may be anything: "invalid syntax" is one of the errors.
        _import_all()

    def _load(self, path: Path) -> Model:
        from backends._torch_model import build, load_exported

        key = file_key(path)

        def load() -> Model:
            if path.suffix == ".pt2":
                module, spec = load_exported(path)
            else:
                spec, weights = read_onnx(path)
                module = build(spec, weights)
            module = module.to(self.torch_device())
            return TorchModel(self, module, spec, path, self._measured(key, module, spec))

        model = self.computed(load)
        self._models += 1
        return model

    def _measured(self, key: tuple[str, int, int], module: Any, spec: ModelSpec) -> tuple[int, int]:
        """Give what runs of one and of two windows hold: measured at the first load, while there is memory for it."""
        from backends._torch_model import peak_bytes

        if key in self._peaks_bytes:
            return self._peaks_bytes[key]
        one = peak_bytes(module, spec, 1)
        try:
            two = peak_bytes(module, spec, 2)
        except Exception as error:
            if not classify(error).is_oom:
                raise
            # One window at a time is served there too.
            return one, 2 * one
        self._peaks_bytes[key] = one, two
        return one, two

    def _square(self, matrix: FloatArray) -> FloatArray:
        import torch

        def square() -> FloatArray:
            with torch.inference_mode():
                x = torch.from_numpy(matrix).to(self.torch_device())
                product: FloatArray = (x @ x).cpu().numpy()
                return product

        return self.owned(square)

    def _ready_to_end(self, site: Site) -> Callable[[], object]:
        import torch

        if site is Site.RUNTIME_CRASH:
            # The smallest integer over −1 has no quotient: on x86 torch's own kernel dies of SIGFPE.
            a, b = (torch.tensor([number], dtype=torch.int32) for number in (-(2**31), -1))
            return lambda: torch.div(a, b, rounding_mode="trunc")
        # One number, seen 2 ** 60 times: the sum takes decades.
        endless = torch.zeros(1).expand(1 << 60)
        return lambda: endless.sum()

    def _miss_library(self) -> None:
        import torch

        torch.ops.load_library(MISSING_LIBRARY)  # type: ignore[no-untyped-call]  # torch has no type for it
