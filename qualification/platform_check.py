"""Whether Plimsoll can run on this machine at all. Standard library only: nothing is installed yet when it is asked.

It loads on a Python older than the oldest supported one, since it has to in order to refuse it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MINIMUM_PYTHON = (3, 11)
#: The wheels of the runtimes are built for this GNU C library.
MINIMUM_GLIBC = (2, 28)
#: Below this much free disk nothing is started: spools, records and environments are written.
MINIMUM_FREE_DISK_BYTES = 2 * 1024**3
#: The first NVIDIA driver for each major version of CUDA, which serves all its minor versions. Source: "CUDA
#: Compatibility", https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html.
MINIMUM_NVIDIA_DRIVER = {12: 525, 13: 580}


def refusal() -> str | None:
    """Say why nothing can run on this machine, or None where it can."""
    return python_refusal() or system_refusal()


def python_refusal(minimum: tuple[int, ...] = MINIMUM_PYTHON) -> str | None:
    """Say why this Python is not enough, or None where it is."""
    if sys.version_info >= minimum:
        return None
    return f"Python {'.'.join(map(str, minimum))} or newer is needed; this is {platform.python_version()}"


def system_refusal() -> str | None:
    """Say why this operating system or processor is not supported, or None where it is."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        return f"Linux on x86-64 is needed (real limits and faults are brought about there); this is {system} {machine}"
    version = glibc_version()
    if version is None:
        return "the GNU C library is needed (the runtimes' wheels are built for it); this system has another"
    # Number by number: "2.4" is older than "2.28".
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MINIMUM_GLIBC:
        needed = ".".join(map(str, MINIMUM_GLIBC))
        return f"glibc {needed} or newer is needed (the runtimes' wheels are built for it); this is {version}"
    return None


def glibc_version() -> str | None:
    """Read the version of the GNU C library, such as "2.36"; None where the C library is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return None
    return version if name == "glibc" else None


def cuda_refusal(major: int) -> str | None:
    """Say why nothing that was built for this major version of CUDA can run here, or None where it can."""
    driver = nvidia_driver()
    if isinstance(driver, str):
        return driver
    if driver >= (major, 0):
        return None
    first = MINIMUM_NVIDIA_DRIVER.get(major)
    newer = f"driver {first} or newer" if first else "a newer driver"
    return f"CUDA {major} needs {newer}; this NVIDIA driver supports CUDA up to {driver[0]}.{driver[1]}"


def nvidia_driver(library: str = "libcuda.so.1") -> tuple[int, int] | str:
    """Read the newest CUDA that the NVIDIA driver supports, such as (13, 0), or say why it offers no device.

    The driver itself is asked, not a runtime: none is installed yet.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver: {library} cannot be loaded"
    version, devices = ctypes.c_int(), ctypes.c_int()
    asked = {"cuInit": 0, "cuDriverGetVersion": ctypes.byref(version), "cuDeviceGetCount": ctypes.byref(devices)}
    for call, argument in asked.items():
        if code := driver[call](argument):
            return f"the NVIDIA driver offers no device: {call} answers {code}"
    if devices.value == 0:
        return "the NVIDIA driver offers no device: it counts 0"
    return version.value // 1000, version.value % 1000 // 10


def disk_refusal(folder: Path, minimum_bytes: int = MINIMUM_FREE_DISK_BYTES) -> str | None:
    """Say why the disk that holds this folder is too full, or None where it is not."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= minimum_bytes:
        return None
    return f"{gib(minimum_bytes)} of free disk is needed; {folder} has {gib(free_bytes)}"


def gib(size_bytes: int) -> str:
    """Write a size in GiB, rounded down: what is free is never overstated."""
    return f"{int(size_bytes / 1024**3 * 10) / 10:g} GiB"
