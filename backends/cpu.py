# /// script
# requires-python = ">=3.11"
# dependencies = ["onnxruntime>=1.28", "numpy>=2", "psutil>=7.2"]
#
# [tool.plimsoll]
# backend = "cpu"
# environments = ["cpu"]
# tags = ["cpu"]
# download-mb = 45
# ///
"""ONNX Runtime on the CPU: the device is a bounded arena, the fallback an unbounded session."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from backends._onnxruntime import OrtBackend, quiet_options
from backends.contract import YES, Backend, BackendError, Capability, no

_SESSION_DOCS = "https://onnxruntime.ai/docs/get-started/with-c.html#share-allocators-between-sessions"


class Cpu(OrtBackend):
    """A share of host memory as the device: real allocations, a real cap, the runtime's own errors."""

    name = "cpu"
    provider = "CPUExecutionProvider"
    package = "onnxruntime"
    arena = "cpu:0"
    capabilities = {
        Capability.MEMORY_LIMIT: YES,
        Capability.RELEASE_CACHED: YES,
        Capability.EXACT_MEMORY_READING: no(
            "ONNX Runtime has no Python call for what an arena holds; the reading is an estimate and says so",
            "https://onnxruntime.ai/docs/api/python/api_summary.html",
        ),
        Capability.DEVICE_OOM: YES,
        Capability.HOST_OOM: YES,
        Capability.FALLBACK: YES,
        Capability.DEVICE_ERROR: no(
            "a host processor has no device errors: CUDA's error codes do not exist here",
            "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html",
        ),
        Capability.DEVICE_MEMORY_OF_OTHERS: no(
            "the arena belongs to this process, and no other can take from it", _SESSION_DOCS
        ),
    }

    #: Whose arena new sessions get: the runtime has one registration for the process, and the last replaces it.
    _registered: ClassVar[weakref.ref[Cpu] | None] = None

    def __init__(self, bounded: bool = True) -> None:
        """Make the device (bounded once ``limit_memory`` was called), or with ``bounded=False`` the fallback."""
        super().__init__()
        self.device = "cpu:arena" if bounded else "cpu"

    def _options(self) -> Any:
        options = quiet_options()
        if self._limit_bytes is not None:
            if Cpu._registered is None or Cpu._registered() is not self:
                raise BackendError(
                    f"another device in this process was given a memory limit after this one's {self._limit_bytes} "
                    "bytes, and new sessions would share that one: call limit_memory again"
                )
            options.add_session_config_entry("session.use_env_allocators", "1")
        elif self.device == "cpu":
            # The fallback runs when memory is short: it keeps none of it between runs.
            options.enable_cpu_mem_arena = False
        return options

    def _register_limit(self, limit_bytes: int) -> None:
        import onnxruntime as ort

        info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        # 1 is kSameAsRequested: regions as large as what was asked for, so that the cap is exact and shrinking works.
        ort.create_and_register_allocator(info, ort.OrtArenaCfg(limit_bytes, 1, -1, -1))
        Cpu._registered = weakref.ref(self)

    def fallback(self) -> Backend:
        """Give an unbounded session's backend; it shares the plans that are armed at the host's memory."""
        backend = Cpu(bounded=False)
        backend._faults, backend._owns_faults = self._faults, False
        return backend


BACKEND = Cpu
