# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2", "psutil>=7.2"]
#
# [tool.plimsoll]
# backend = "torch-cpu"
# tags = ["torch"]
#
# [tool.plimsoll.environments.cpu]
# dependencies = ["torch==2.13.0"]
# package-index = "https://download.pytorch.org/whl/cpu"
# build = "cpu"
# reason = "the release that the errors and the limits of torch's CPU allocator were measured with"
# download-mb = 230
# disk-mb = 1030
# ///
"""Torch on the CPU: the device is a process that is capped by RLIMIT_DATA, the fallback a process that is not.

What the device holds is what the process holds beyond what it held when it was warm (``VmData``): exact, and cheap to
read.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from backends._build import environment, torch_cuda_version
from backends._device import HostDevice, health_probe, heap_trim
from backends._keeper import KeptDevice
from backends._torch import TorchBackend, have_one_heap, quiet_torch
from backends.contract import YES, Allocation, Availability, BackendError, Capability, MemoryReading, no
from backends.errors import Diagnosis, ErrorKind, Shortage, classify, note
from backends.faults import limits
from backends.host import data_bytes, total_bytes

T = TypeVar("T")
#: Blocks on the device are whole multiples of this: less is the process's own, and served from its reserve.
_BLOCK_BYTES = 64 << 10
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MMAP_THRESHOLD_BYTES = _BLOCK_BYTES
#: What a process whose device is full needs to answer: for objects of Python's own, and for small requests to malloc.
_OBJECTS_BYTES = 8 << 20
_HOLES, _HOLE_BYTES = 32, 60 << 10
#: What oneDNN says when it has no memory for the code of a kernel, and, once it said so, of every further kernel that
#: it is to make in that thread: its code generator keeps the first error, and nothing clears it (Xbyak::GetError).
_NO_KERNEL = "could not create a primitive"
#: What it says of a kernel, for the rest of the process, after it ran out of memory while it made that one: its cache
#: keeps what will never be made.
_NEVER_MADE = "std::future_error: Broken promise"


class TorchCpu(HostDevice, KeptDevice, TorchBackend):
    """A process's own memory as the device: real allocations, a real cap, torch's own errors."""

    name = "torch-cpu"
    bounded_name = "torch-cpu:process"
    #: Down to what a window's tensors are made of; smaller requests are the process's own.
    fill_pieces_bytes = (16 << 20, 4 << 20, 1 << 20, 256 << 10)
    capabilities = {
        Capability.MEMORY_LIMIT: YES,
        Capability.RELEASE_CACHED: no(
            "torch keeps no freed memory on the CPU: it goes to the C library, and large blocks back to the system",
            "https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management",
        ),
        Capability.EXACT_MEMORY_READING: YES,
        Capability.CACHE_OOM: no(
            "torch has no caching allocator on the CPU, so that nothing it keeps can be in the way",
            "https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management",
        ),
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
            "the cap is this process's, and no other can take from it",
            "https://man7.org/linux/man-pages/man2/getrlimit.2.html",
        ),
    }

    def __init__(self, device: str | None = None, *, bounded: bool = True) -> None:
        """Make the device (bounded once ``limit_memory`` was called), or with ``bounded=False`` the fallback."""
        super().__init__(device, bounded=bounded)
        #: What the process held when it was warm, and the cap that is set.
        self._warm_bytes = 0
        self._cap_bytes: int | None = None
        self._thread = _ComputeThread()

    @classmethod
    def probe(cls) -> Availability:
        """Look for torch, without importing it; where an environment promises the CPU build, it has to be that."""
        found = super().probe()
        cuda = torch_cuda_version() if found.available and environment() == "cpu" else None
        if cuda is None:
            return found
        return Availability(
            False,
            f"{found.runtime} is built for CUDA {cuda[0]}.{cuda[1]}, and the environment cpu promises the CPU build: "
            "reinstall it with nox --reuse-venv=never -s memory-quick-cpu, or choose where it comes from with "
            "PLIMSOLL_TORCH_INDEX",
        )

    def _has_the_device(self) -> None:
        super()._has_the_device()
        have_one_heap()
        quiet_torch()
        # There is memory for its stack now. What torch sets for a thread is set there too.
        self._thread.do(quiet_torch)

    def _apply_limit(self, limit_bytes: int | None) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        self._cap_bytes = None
        if limit_bytes is None:
            return
        if not self._warm_bytes:
            if self._models or self._allocations:
                raise BackendError("the device is in use already: limit its memory before anything is taken there")
            _warm_up(self._thread, lambda: self._square(health_probe()[0]))
            self._warm_bytes = data_bytes()
        in_use_bytes = data_bytes() - self._warm_bytes
        self._cap_bytes = limits.cap_host_memory(limit_bytes - in_use_bytes)

    def _in_use_bytes(self) -> int:
        return max(0, data_bytes() - self._warm_bytes)

    def _memory_here(self) -> MemoryReading:
        used, total = self._used_bytes(), total_bytes()
        what = "VmData beyond that of the warm process" if self._warm_bytes else "VmData of the process"
        source = f"{what}, and what a run like the last one needs"
        return MemoryReading(used, used, self._limit_bytes, total, "process", not self._wanted_bytes(), source)

    def _allocate_here(self, size_bytes: int) -> Allocation:
        block = super()._allocate_here(-(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES)
        block.size_bytes = size_bytes
        return block

    def _release_here(self) -> int:
        before = data_bytes()
        heap_trim()
        return max(0, before - data_bytes())

    def owned(self, act: Callable[[], T]) -> T:
        """Take note that it was the device's cap that refused, where it was: the text is the host's."""
        try:
            return act()
        except Exception as error:
            limit_bytes, hard_bytes = resource.getrlimit(resource.RLIMIT_DATA)
            is_oom = classify(error) is ErrorKind.HOST_OOM or _NO_KERNEL in str(error)
            if _NEVER_MADE in str(error):
                note(error, Diagnosis(ErrorKind.DEVICE_STICKY))
            elif is_oom and limit_bytes != hard_bytes:
                # The other limit that there may be is a fault's.
                kind = ErrorKind.DEVICE_OOM if limit_bytes == self._cap_bytes else ErrorKind.HOST_OOM
                note(error, Diagnosis(kind, Shortage.CAPPED))
            elif _NO_KERNEL in str(error):
                # Without a cap it is the host that had none.
                note(error, Diagnosis(ErrorKind.HOST_OOM))
            raise

    def computed(self, act: Callable[[], T]) -> T:
        """Do it in a thread of the device's own: oneDNN makes no kernel in one that had no memory for one before."""
        try:
            return self._thread.do(lambda: self.owned(act))
        except Exception as error:
            if _NO_KERNEL in str(error):
                self._thread.replace()
            raise


class _ComputeThread:
    """One thread that does what it is given; it can be replaced where there is no memory for another."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "plimsoll-torch")

    def do(self, act: Callable[[], T]) -> T:
        return self._executor.submit(act).result()

    def replace(self) -> None:
        task = Path(f"/proc/self/task/{self.do(threading.get_native_id)}")
        self._executor.shutdown()
        # The C library gives the stack to the next thread once the kernel has let this one go: an instant later.
        while task.exists():
            os.sched_yield()
        # Its thread starts with the next work, once the device's memory is not in the way.
        self._executor = ThreadPoolExecutor(1, "plimsoll-torch")


def _warm_up(thread: _ComputeThread, probe: Callable[[], object]) -> None:
    """Do what a process does once, so that what it holds from here on is the device's; keep a reserve for answers."""
    try:
        libc = ctypes.CDLL(None)
        malloc, free, mallopt = libc.malloc, libc.free, libc.mallopt
    except (OSError, AttributeError) as error:
        raise BackendError(f"torch-cpu is capped on Linux with the GNU C library only ({error})") from error
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    # Blocks of this size and more are mapped on their own, and so given back at once; the rest is in one heap. Without
    # it glibc raises the threshold by itself (mallopt(3)). As much is asked for on top whenever the heap grows, so that
    # it does not find room for a block that was refused a map of its own.
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD):
        mallopt(option, _MMAP_THRESHOLD_BYTES)
    thread.do(_compute_once)
    # In the thread that tries the way back to the device.
    probe()
    gc.collect()
    # One object in each of CPython's arenas keeps it, and the rest of it free.
    objects = [bytes(450) for _ in range(_OBJECTS_BYTES >> 9)]
    _reserve.extend({id(each) >> 20: each for each in objects}.values())
    del objects
    heap_trim()
    # What is free in the heap already would be a device beyond the cap: it stays taken.
    while True:
        before = data_bytes()
        block = malloc(_BLOCK_BYTES)
        if data_bytes() > before:
            free(block)
            break
    # Holes too small for a block of the device. What keeps them apart is as large as they are: anything smaller might
    # come from elsewhere, and then they would be one block, and given back.
    pieces = [malloc(_HOLE_BYTES) for _ in range(2 * _HOLES)]
    for hole in pieces[::2]:
        free(hole)
    heap_trim()


_reserve: list[bytes] = []


def _compute_once() -> None:
    """Run each kind of step that a speech model has: libraries are loaded, and kernels made, at the first of each."""
    import torch
    from torch.nn import functional

    with torch.inference_mode():
        x = functional.conv2d(torch.ones(1, 1, 16, 16), torch.ones(8, 1, 3, 3), torch.ones(8), padding=1)
        x = functional.conv2d(functional.relu_(x), torch.ones(8, 8, 3, 3), torch.ones(8), stride=2, padding=1)
        x = functional.layer_norm(x.transpose(1, 2).reshape(1, 8, 64) @ torch.ones(64, 64), (64,))
        torch.softmax(x @ x.transpose(1, 2), -1).numpy()
        # MKL keeps what it worked in, and the more the larger the matrices are, up to these. It takes blocks of them.
        x = torch.ones(2, 512, 512)
        (x @ x[0]) @ x.transpose(1, 2)


BACKEND = TorchCpu
