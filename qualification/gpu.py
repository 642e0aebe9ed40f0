"""Readings of NVIDIA cards beside a runtime's own counters: NVML, by nvidia-ml-py. Nothing of a card is ever set.

No reading raises either. What cannot be read is None, and a message says why: nvidia-ml-py or the driver is missing,
figures by process are not given (WSL2), or the process ids are those of another namespace (containers).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.faults.cuda import open_driver

MIB = 1 << 20
#: An idle card has some MiB in use that no process is shown for.
_UNSEEN_BYTES = 256 * MIB
#: The number of the namespace in which the driver counts processes (PROC_PID_INIT_INO in the kernel's proc_ns.h).
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


@dataclass(frozen=True)
class GpuReading:
    """One reading of a card, all processes counted. What is None could not be read: ``message`` says why.

    ``used_bytes`` excludes what the driver reserves. ``own_bytes`` is what this process and its descendants hold;
    ``others`` are the ids of the other processes on the card, each with its bytes. ``displays``: it drives a display.
    """

    used_bytes: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    own_bytes: int | None = None
    others: tuple[tuple[int, int | None], ...] | None = None
    driver: str = ""
    name: str = ""
    displays: bool = False
    message: str = ""


@dataclass(frozen=True)
class Card:
    """The card behind a CUDA device: what tells it, and its driver, apart from another machine's.

    ``driver`` is empty where NVML cannot be read: ``message`` says why. ``driver_cuda`` is the driver's newest CUDA.
    """

    uuid: str
    name: str
    total_bytes: int
    driver: str
    driver_cuda: str
    message: str


class _Unavailable(Exception):
    """A card, or all of them, cannot be read. The message says why, and what to do."""


def read(card: str | int) -> GpuReading:
    """Read a card: by the "GPU-…" of ``backends.faults.cuda``, or by NVML's own count, which is not CUDA's."""
    try:
        nvml = _nvml()
        handle = _handle(nvml, card)
    except _Unavailable as error:
        return GpuReading(message=str(error))
    missing: list[str] = []

    def ask(what: str, function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(*arguments)
        except Exception as error:  # nvidia-ml-py has two unrelated kinds
            missing.append(f"{what} cannot be read: {error}")
            return None

    memory = ask("the memory", "nvmlDeviceGetMemoryInfo", handle, getattr(nvml, "nvmlMemory_v2", None))
    users: dict[int, int | None] | None = {}
    for kind in ("Compute", "Graphics"):
        listed = ask("the processes", f"nvmlDeviceGet{kind}RunningProcesses", handle)
        users = None if users is None or listed is None else users | {each.pid: each.usedGpuMemory for each in listed}
    own_bytes, others, message = attribute(users, _ours())
    return GpuReading(
        used_bytes=memory and memory.used,
        free_bytes=memory and memory.free,
        total_bytes=memory and memory.total,
        own_bytes=own_bytes,
        others=others,
        driver=ask("the driver's version", "nvmlSystemGetDriverVersion") or "",
        name=ask("the name", "nvmlDeviceGetName", handle) or "",
        displays=bool(ask("whether it drives a display", "nvmlDeviceGetDisplayActive", handle)),
        message="; ".join(dict.fromkeys([*missing, *([message] if message else [])])),
    )


def card_of(device: str) -> Card:
    """Look at the card behind a device such as "cuda:1", as CUDA counts in this process; nothing of it is taken.

    Raises NoDriver, and DriverError for a device that is not there.
    """
    driver, number = open_driver(), int(device.removeprefix("cuda:"))
    uuid = driver.uuid(number)
    reading = read(uuid)
    return Card(
        uuid=uuid,
        name=driver.name(number),
        total_bytes=driver.total_bytes(number),
        driver=reading.driver,
        driver_cuda=".".join(map(str, driver.version)),
        message=reading.message,
    )


def attribute(
    users: Mapping[int, int | None] | None, ours: frozenset[int] | None
) -> tuple[int | None, tuple[tuple[int, int | None], ...] | None, str]:
    """Tell our processes' bytes on a card from the others'; the third value says what could not be told.

    ``users`` are all that hold memory there, by process id (None: not known, and so for one's bytes). ``ours`` are our
    process ids, None where they are counted in another namespace: then all that are listed count as others.
    """
    if users is None:
        return None, None, ""
    others = tuple(sorted((pid, size) for pid, size in users.items() if ours is None or pid not in ours))
    if ours is None:
        return None, others, "process ids are the host's, not this container's: ours cannot be told from the others'"
    own = [size for pid, size in users.items() if pid in ours]
    known = [size for size in own if size is not None]
    if len(known) < len(own):
        return None, others, "the driver gives no memory by process here"
    return sum(known), others, ""


def others_on(card: str | int) -> tuple[tuple[int, int | None], ...] | None:
    """Give the ids of the processes that use a card besides this one and its descendants, each with its bytes.

    None where that is not known.
    """
    return read(card).others


def refuse_shared(card: str | int, allow: bool) -> str | None:
    """Say why this card's memory may not be exhausted, or None where it may: nobody else uses it, or it is allowed.

    To be asked before a backend has the card: in a container our own use of it cannot be told from another's.
    """
    return None if allow else sharing(card, read(card))


def sharing(card: str | int, reading: GpuReading) -> str | None:
    """Say who else uses a card by this reading, and what to do, or None where nobody does."""
    way_out = "or allow it with --allow-shared-gpu"
    if reading.used_bytes is None or reading.others is None:
        return f"whether others use {_label(card)} is not known ({reading.message}): mend that, {way_out}"
    found = ["it drives a display"] if reading.displays else []
    found += [_described(pid, size) for pid, size in reading.others]
    if not reading.others and not reading.own_bytes and reading.used_bytes > _UNSEEN_BYTES:
        found.append(f"{reading.used_bytes // MIB} MiB are held by processes that cannot be seen from here")
    if not found:
        return None
    note = f" ({reading.message})" if reading.message else ""
    return (
        f"{_label(card)} ({reading.name}) is not ours alone: {'; '.join(found)}{note}. "
        f"They would run out of memory too: end them, choose another GPU with CUDA_VISIBLE_DEVICES, {way_out}"
    )


def machine_gpus() -> tuple[list[dict[str, Any]], str]:
    """Describe the machine's cards for a record, in NVML's order; with none, the second value says why.

    Of each: name, total bytes, driver version, newest CUDA version of the driver.
    """
    try:
        nvml = _nvml()
        cuda = _asked(nvml.nvmlSystemGetCudaDriverVersion_v2)
        found = [read(index) for index in range(_asked(nvml.nvmlDeviceGetCount))]
    except _Unavailable as error:
        return [], str(error)
    cards = [
        {
            "name": each.name,
            "total_bytes": each.total_bytes,
            "driver": each.driver,
            "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        }
        for each in found
    ]
    return cards, "" if cards else "the NVIDIA driver shows no GPU"


@functools.cache
def _nvml() -> Any:
    """Import and initialise NVML, once in a process. Raises _Unavailable, and tries again at the next call."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise _Unavailable("nvidia-ml-py is not installed: pip install nvidia-ml-py") from None
    try:
        nvml.nvmlInit()
    except Exception as error:
        raise _Unavailable(f"the NVIDIA driver's NVML cannot be used: {error}") from error
    return nvml


def _handle(nvml: Any, card: str | int) -> Any:
    """Find a card. Raises _Unavailable."""
    if isinstance(card, int):
        return _asked(nvml.nvmlDeviceGetHandleByIndex, card)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(card)
    except nvml.NVMLError:
        # CUDA gives a MIG instance's number without saying that it is one.
        return _asked(nvml.nvmlDeviceGetHandleByUUID, card.replace("GPU-", "MIG-", 1))


def _asked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of NVML. Raises _Unavailable for what it refuses."""
    try:
        return function(*arguments)
    except Exception as error:
        asked = ", ".join(map(repr, arguments))
        raise _Unavailable(f"NVML refuses {function.__name__}({asked}): {error}") from error


def _first_namespace() -> bool:
    """Whether process ids are counted here as the driver counts them."""
    return Path("/proc/self/ns/pid").stat().st_ino == _FIRST_PID_NAMESPACE


def _ours() -> frozenset[int] | None:
    """Give the ids of this process and its descendants; None where the driver counts otherwise."""
    import psutil

    if not _first_namespace():
        return None
    return frozenset({os.getpid(), *(each.pid for each in psutil.Process().children(recursive=True))})


def _label(card: str | int) -> str:
    """Name a card in a sentence."""
    return f"GPU {card}" if isinstance(card, int) else card


def _described(pid: int, size: int | None) -> str:
    """Name a process for whoever has to find it."""
    name = ""
    if _first_namespace():  # else the same number is another process here
        with contextlib.suppress(OSError):
            name = f" ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    held = "an unknown amount" if size is None else f"{size // MIB} MiB"
    return f"process {pid}{name} holds {held}"
