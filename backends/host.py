"""How much memory the host has for this process, and whose limit binds first. Linux only."""

from __future__ import annotations

import ctypes
import functools
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from backends.contract import MemoryReading

KIB = 1024
#: Blocks of Python's own allocator are of 16 to 512 bytes: what one is taken for where Python does not say.
SMALL_OBJECT_BYTES = 64
_SMALL_OBJECTS = re.compile(rb"# bytes in allocated blocks\s*=\s*([\d,]+)")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")


def _proc_kib(path: Path, *keys: str) -> tuple[int, ...]:
    """Read ``Key:  N kB`` lines as bytes."""
    found = dict.fromkeys(keys, 0)
    for line in path.read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in found:
            found[key] = int(rest.split()[0]) * KIB
    return tuple(found[key] for key in keys)


def data_bytes() -> int:
    """Read this process's data segment and private writable maps (``VmData``): what RLIMIT_DATA is held against."""
    return _proc_kib(_STATUS, "VmData")[0]


@functools.cache
def total_bytes() -> int:
    """Read how much memory the machine has (``MemTotal``); once, for it does not change."""
    return _proc_kib(_MEMINFO, "MemTotal")[0]


def available_bytes() -> int:
    """Read what the machine could still give without swapping (``MemAvailable``), or the cgroup where that is less."""
    (machine,) = _proc_kib(_MEMINFO, "MemAvailable")
    cgroup = _cgroup()
    return machine if cgroup is None else min(machine, max(0, cgroup[1] - cgroup[0]))


def heap_used_bytes() -> int | None:
    """Read what this process has taken from the C library's heap and not freed; None where that cannot be read (glibc).

    Python's small objects, which are not on that heap, are added. An exact counter, which does not see what is mapped
    past both.
    """
    import psutil

    read = getattr(psutil, "heap_info", None)
    if read is None:
        return None
    heap, small = read(), small_objects_bytes()
    return None if small is None else int(heap.heap_used + heap.mmap_used) + small


def small_objects_bytes() -> int | None:
    """Read what Python's own allocator has given out and not taken back; None where there is no memory to read it with.

    By its own statistics, which ``sys._debugmallocstats`` prints. An estimate where there are none: a Python that does
    not export them, a C library without ``open_memstream``, and while ``tracemalloc`` follows allocations.
    """
    read = _allocator_statistics()
    statistics = b"" if read is None else read()
    if statistics is None:
        return None
    if found := _SMALL_OBJECTS.search(statistics):
        return int(found[1].replace(b",", b""))
    # With PYTHONMALLOC=malloc they are on the C library's heap, and counted there: there are no blocks.
    return SMALL_OBJECT_BYTES * sys.getallocatedblocks()


@functools.cache
def _allocator_statistics() -> Callable[[], bytes | None] | None:
    """Give what reads the statistics of Python's allocator as text: None where there is no memory for it."""
    library = ctypes.CDLL(None)
    try:
        # Called with the interpreter's lock held.
        write, open_, close, free = (
            ctypes.pythonapi._PyObject_DebugMallocStats,
            *(library.open_memstream, library.fclose, library.free),
        )
    except AttributeError:
        return None
    write.argtypes = close.argtypes = free.argtypes = (ctypes.c_void_p,)
    open_.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t))
    open_.restype = ctypes.c_void_p

    def read() -> bytes | None:
        text, size = ctypes.c_void_p(), ctypes.c_size_t()
        stream = open_(ctypes.byref(text), ctypes.byref(size))
        if not stream:
            return None
        write(stream)
        complete = close(stream) == 0
        try:
            return ctypes.string_at(text, size.value) if complete and text.value else None
        finally:
            free(text)

    return read


def spendable_bytes() -> int:
    """Say how much may be used up on purpose: all that is available but 1 GiB, or 10 % of it where that is more."""
    available = available_bytes()
    return max(0, available - max(1 << 30, available // 10))


def _cgroup() -> tuple[int, int] | None:
    """Read (used, limit) of this process's memory cgroup, v2 or v1; None where there is no limit."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in groups:
        if controllers == "":
            folder, limit_name, used_name = Path("/sys/fs/cgroup" + path), "memory.max", "memory.current"
            inactive = "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit_name = Path("/sys/fs/cgroup/memory" + path), "memory.limit_in_bytes"
            used_name, inactive = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        try:
            limit_text = (folder / limit_name).read_text().strip()
            used = int((folder / used_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit_text == "max" or int(limit_text) >= 1 << 60:
            continue
        # The page cache of files is given back before anything is killed: it is not use.
        return max(0, used - int(stat.get(inactive, 0))), int(limit_text)
    return None


def host_memory() -> MemoryReading:
    """Read the host memory whose limit is nearest: the process's RLIMIT_DATA, its cgroup, or the machine."""
    total, available = _proc_kib(_MEMINFO, "MemTotal", "MemAvailable")
    readings = [MemoryReading(total - available, total - available, None, total, "device", True, "MemAvailable")]
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        used = data_bytes()
        readings.append(MemoryReading(used, used, soft, total, "process", True, "VmData under RLIMIT_DATA"))
    cgroup = _cgroup()
    if cgroup is not None:
        used, limit = cgroup
        readings.append(MemoryReading(used, used, limit, total, "device", True, "memory cgroup"))
    return max(readings, key=lambda reading: reading.fraction)
