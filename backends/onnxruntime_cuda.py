# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2", "nvidia-ml-py>=13", "psutil>=7.2"]
#
# [tool.plimsoll]
# backend = "onnxruntime-cuda"
# tags = ["cuda", "onnxruntime"]
#
# [tool.plimsoll.environments.cuda12]
# cuda = 12
# dependencies = ["onnxruntime-gpu[cuda,cudnn]>=1.23,<1.27,!=1.24.1,!=1.25.*,!=1.26.0"]
# reason = """\
#     up to 1.26 it is built for CUDA 12, from 1.27 on for CUDA 13. As onnx-asr does, for speech models: not 1.24.1, \
#     which does not follow symbolic links to a model's data; not 1.25 and 1.26.0, which do not load some quantized \
#     models (https://github.com/microsoft/onnxruntime/issues/28306)"""
# download-mb = 1970
# disk-mb = 3250
#
# [tool.plimsoll.environments.cuda13]
# cuda = 13
# dependencies = ["onnxruntime-gpu[cuda,cudnn]>=1.27"]
# reason = "from 1.27 on it is built for CUDA 13, before for CUDA 12"
# download-mb = 1590
# disk-mb = 2600
# ///
"""ONNX Runtime on an NVIDIA card: a bounded arena on the card, the fallback a session on the CPU."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from backends._build import onnxruntime_cuda_version
from backends._cuda import CAPABILITIES, CudaDevice
from backends._onnxruntime import OrtBackend, quiet_options
from backends.contract import YES, Backend, BackendError, Capability, FloatArray, MemoryReading, Model, no
from backends.errors import Diagnosis, ErrorKind, Shortage, classify, note
from backends.faults.cuda import DriverError, open_driver
from backends.model import N_MELS

if TYPE_CHECKING:
    import onnxruntime as ort

T = TypeVar("T")


class OnnxruntimeCuda(CudaDevice, OrtBackend):
    """A card's memory as the device: the arena of the CUDA execution provider, with a cap."""

    name = "onnxruntime-cuda"
    provider = "CUDAExecutionProvider"
    package = "onnxruntime-gpu"
    memory_name = "cuda"
    #: The driver hands memory out in blocks of 2 MiB.
    granularity_bytes: ClassVar[int] = 4 << 20
    #: Which of CUDA's libraries were not found in this process, in the runtime's words.
    _missing = ""
    _is_loading = False
    capabilities = {
        **CAPABILITIES,
        Capability.EXACT_MEMORY_READING: no(
            "ONNX Runtime has no Python call for what an arena holds; the reading is an estimate and says so",
            "https://onnxruntime.ai/docs/api/python/api_summary.html",
        ),
        Capability.CACHE_OOM: YES,
    }

    @property
    def arena(self) -> str:  # type: ignore[override]  # a card has a number
        """What the shrinkage option calls this device's arena."""
        return f"gpu:{self._index}"

    @classmethod
    def _built(cls) -> tuple[str, tuple[int, int] | None]:
        cuda = onnxruntime_cuda_version()
        try:
            runtime = f"onnxruntime-gpu {version('onnxruntime-gpu')}"
        except PackageNotFoundError:
            # The CPU's package has the same module: it is told apart by what it was built for.
            runtime = f"onnxruntime {version('onnxruntime')}"
        return runtime, cuda

    def fallback(self) -> Backend:
        """Give ONNX Runtime on the CPU, unbounded: it sees no card, and shares the plans that are armed."""
        return self._on_the_cpu("cpu")

    def _has_the_device(self) -> None:
        super()._has_the_device()
        self._load_libraries()
        # The first session loads the provider and makes the context, or says why not: before any cap, and any ballast.
        self._square(np.ones((1, 1), np.float32))

    def _load_libraries(self) -> None:
        """Load CUDA and cuDNN from the nvidia-* packages. What is missing is printed, and not raised: it is kept."""
        import onnxruntime as ort

        # What fails is raised as well.
        ort.set_default_logger_severity(4)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
        self._missing = " ".join(said.getvalue().split())

    def _options(self) -> Any:
        options = quiet_options()
        # Without it a session whose provider does not load, or lacks a kernel, runs on the CPU and says nothing.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.use_deterministic_compute = True
        if self._limit_bytes is not None:
            options.add_session_config_entry("session.use_env_allocators", "1")
        return options

    def _providers(self) -> list[Any]:
        options = {
            "device_id": str(self._index),
            "arena_extend_strategy": "kSameAsRequested",
            # The others measure, and choose another kernel each time.
            "cudnn_conv_algo_search": "DEFAULT",
            "cudnn_conv_use_max_workspace": "0",
            "use_tf32": "0",
        }
        if self._limit_bytes is not None:
            # Of an arena of the session's own, should it not take the shared one.
            options["gpu_mem_limit"] = str(self._limit_bytes)
        # Alone: naming the CPU as well contradicts the refusal of falling back to it.
        return [(self.provider, options)]

    def _session(self, path: Path) -> ort.InferenceSession:
        """Make a session, or refuse: nothing may run on the CPU unseen."""
        try:
            with warnings.catch_warnings():
                # A build without the provider gives a UserWarning, and a session on the CPU.
                warnings.simplefilter("error", UserWarning)
                return self.owned(lambda: super(OnnxruntimeCuda, self)._session(path))
        except Exception as error:
            if classify(error) is ErrorKind.OTHER and ("CPU EP" in str(error) or isinstance(error, UserWarning)):
                found = self._missing or str(error)
                raise BackendError(
                    f"{path.name} would run on the CPU: {self.provider} did not load, or has no kernel for a node of "
                    f"it ({found[:300]}). CUDA and cuDNN come with pip install 'onnxruntime-gpu[cuda,cudnn]'"
                ) from error
            raise

    def _load(self, path: Path) -> Model:
        """Load, and run once on silence: a first run loads kernels and makes handles, which no cap counts.

        At a time when there is no memory CUDA's libraries would say that they failed, and not why.
        """
        model = super()._load(path)
        self._is_loading = True
        try:
            model.run(np.zeros((1, model.window_frames, N_MELS), np.float32))
        except BaseException:
            model.close()
            raise
        finally:
            self._is_loading = False
        self._release_here()
        return model

    def run_point(self, once: Callable[[], FloatArray], features: FloatArray) -> FloatArray:
        """Run the model once, at a point of the plans that are armed. A run that belongs to a load is none."""
        return once() if self._is_loading else super().run_point(once, features)

    def _register_limit(self, limit_bytes: int) -> None:
        import onnxruntime as ort

        info = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, self._index, ort.OrtMemType.DEFAULT)
        # 1 is kSameAsRequested: regions as large as what was asked for, so that the cap is exact and shrinking works.
        arena = ort.OrtArenaCfg(limit_bytes, 1, -1, -1)
        # One arena for all sessions of the process: each session's own would have a cap of its own.
        ort.create_and_register_allocator_v2(self.provider, info, {"device_id": str(self._index)}, arena)

    def owned(self, act: Callable[[], T]) -> T:
        """Take note of what the card refused: its arena complains in the words of the host's."""
        try:
            return act()
        except Exception as error:
            if classify(error) is ErrorKind.HOST_OOM and "requested buffer" in str(error):
                note(error, self._why_refused())
            raise

    def _why_refused(self) -> Diagnosis:
        """Ask the driver: the arena keeps to itself what cudaMalloc said, which need not be that there is no memory.

        In a poisoned context every call fails, that for memory and this one.
        """
        try:
            open_driver().memory(self._index)
        except DriverError as error:
            return Diagnosis(error.kind)
        # Not the cap: of that the arena says how much of it is left.
        return Diagnosis(ErrorKind.DEVICE_OOM, Shortage.EXHAUSTED)

    def _memory_here(self) -> MemoryReading:
        estimate = super()._memory_here()
        return self._card_reading(estimate.used_bytes, estimate.source, exact=False)

    def _release_here(self) -> int:
        before, _ = open_driver().memory(self._index)
        super()._release_here()
        return max(0, open_driver().memory(self._index)[0] - before)


BACKEND = OnnxruntimeCuda
