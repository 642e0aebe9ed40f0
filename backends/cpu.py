# /// script
# requires-python = ">=3.11"
# dependencies = ["onnxruntime>=1.28", "numpy>=2", "psutil>=7.2"]
#
# [tool.plimsoll]
# backend = "cpu"
# tags = ["onnxruntime"]
#
# [tool.plimsoll.environments.cpu]
# download-mb = 47
# disk-mb = 200
# ///
"""ONNX Runtime on the CPU: the device is a bounded arena, the fallback an unbounded session."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from typing import Any, ClassVar

from backends._device import HostDevice
from backends._onnxruntime import OrtBackend, quiet_options
from backends.contract import YES, BackendError, Capability, no

_SESSION_DOCS = "https://onnxruntime.ai/docs/get-started/with-c.html#share-allocators-between-sessions"


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _give_large_blocks_back() -> None:
    """Have the C library map blocks of 1 MiB and more on their own, so that freeing one gives memory back.

    Without this glibc raises its threshold to 32 MiB by itself, and then keeps up to 64 MiB of freed regions at the top
    of a thread's heap, where ``malloc_trim`` does not reach: the arena would be given back or not by chance. Process
    wide, and only where a device is bounded. Source: mallopt(3), "dynamic mmap threshold".
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 << 20)


class Cpu(HostDevice, OrtBackend):
    """A share of host memory as the device: real allocations, a real cap, the runtime's own errors."""

    name = "cpu"
    bounded_name = "cpu:arena"
    provider = "CPUExecutionProvider"
    package = "onnxruntime"
    arena = "cpu:0"
    preload = "backends._onnxruntime:preload"
    capabilities = {
        Capability.MEMORY_LIMIT: YES,
        Capability.RELEASE_CACHED: YES,
        Capability.EXACT_MEMORY_READING: no(
            "ONNX Runtime has no Python call for what an arena holds; the reading is an estimate and says so",
            "https://onnxruntime.ai/docs/api/python/api_summary.html",
        ),
        Capability.CACHE_OOM: YES,
        Capability.DEVICE_OOM: YES,
        Capability.HOST_OOM: YES,
        Capability.FALLBACK: YES,
        Capability.DEVICE_ERROR: no(
            "a host processor has no device errors: CUDA's error codes do not exist here",
            "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html",
        ),
        Capability.RUNTIME_CRASH: YES,
        Capability.ALLOCATION_FAULTS: YES,
        Capability.DEVICE_ALLOCATION_FAULTS: no(
            "the device's memory is the host's here, and so are the allocations that can be refused",
            "https://man7.org/linux/man-pages/man3/malloc.3.html",
        ),
        Capability.DEVICE_MEMORY_OF_OTHERS: no(
            "the arena belongs to this process, and no other can take from it", _SESSION_DOCS
        ),
    }

    #: Whose arena new sessions get: the runtime has one registration for the process, and the last replaces it.
    _registered: ClassVar[weakref.ref[Cpu] | None] = None

    def _options(self) -> Any:
        options = quiet_options()
        if self._limit_bytes is not None:
            if Cpu._registered is None or Cpu._registered() is not self:
                raise BackendError(
                    f"another device in this process was given a memory limit after this one's {self._limit_bytes} "
                    "bytes, and new sessions would share that one: call limit_memory again"
                )
            options.add_session_config_entry("session.use_env_allocators", "1")
        else:
            # Without a cap, and so for the fallback too: an arena of each session's own could not be given back.
            options.enable_cpu_mem_arena = False
        return options

    def _has_arena(self) -> bool:
        return self._limit_bytes is not None

    def _register_limit(self, limit_bytes: int) -> None:
        import onnxruntime as ort

        _give_large_blocks_back()
        info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        # 1 is kSameAsRequested: regions as large as what was asked for, so that the cap is exact and shrinking works.
        ort.create_and_register_allocator(info, ort.OrtArenaCfg(limit_bytes, 1, -1, -1))
        Cpu._registered = weakref.ref(self)


BACKEND = Cpu
