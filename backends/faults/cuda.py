"""The NVIDIA driver, asked directly: a device's memory, and faults that poison its context.

The driver API of ``libcuda.so.1`` by ctypes, standard library only: it needs no runtime and no compiler, and it can be
imported before anything is installed. Everything happens in a device's *primary* context, the one that torch and ONNX
Runtime use in the same process. A device is its number as the driver counts in this process: ``CUDA_VISIBLE_DEVICES``
holds here as well.

https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import uuid
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from backends.errors import ErrorKind, RuntimeFailure, cuda_kind

#: Set to 1 to allow faults that poison a context: by the option --allow-device-faults, for the processes below.
ALLOW_DEVICE_FAULTS = "PLIMSOLL_ALLOW_DEVICE_FAULTS"
_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
_OUT_OF_MEMORY = 2
_SAYS = "CUDA driver error: "
#: The parameters of what is called, as cuda.h declares them. Where it renames a function to a later version of it, the
#: name here is that version's. Each gives a CUresult.
_PARAMETERS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (POINTER(c_ubyte * 16), c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    # function, grid x y z, block x y z, shared bytes, stream, parameters, extra
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}

# PTX, which the driver itself compiles for the device. Old enough for every driver of CUDA 12 (PTX 8) and 13, and for
# the oldest device that both support (7.5; CUDA 13 dropped those below).
_PTX = """\
.version 7.0
.target sm_75
.address_size 64
"""
#: Each fault's kernel, by name.
KERNELS = {
    "trap": _PTX
    + """
.visible .entry trap()
{
    trap;
    ret;
}
""",
    # What assert() in CUDA C++ calls. All three texts are "plimsoll".
    "device_assert": _PTX
    + """
.extern .func __assertfail
(
    .param .b64 message,
    .param .b64 file,
    .param .b32 line,
    .param .b64 function,
    .param .b64 char_bytes
);
.global .align 1 .b8 text[9] = {112, 108, 105, 109, 115, 111, 108, 108, 0};

.visible .entry device_assert()
{
    .reg .b64 %text;
    mov.u64 %text, text;
    cvta.global.u64 %text, %text;
    {
    .param .b64 message;
    .param .b64 file;
    .param .b32 line;
    .param .b64 function;
    .param .b64 char_bytes;
    st.param.b64 [message], %text;
    st.param.b64 [file], %text;
    st.param.b32 [line], 1;
    st.param.b64 [function], %text;
    st.param.b64 [char_bytes], 1;
    call.uni __assertfail, (message, file, line, function, char_bytes);
    }
    ret;
}
""",
    # The first page is never mapped; the address is aligned, so that it is not a misaligned one that is reported.
    "illegal_address": _PTX
    + """
.visible .entry illegal_address()
{
    .reg .b64 %address;
    mov.u64 %address, 16;
    st.global.u32 [%address], 1;
    ret;
}
""",
}


class NoDriver(Exception):
    """There is no NVIDIA driver to ask, or it refuses. The message says which, and what to do."""


class DriverError(RuntimeFailure):
    """What the driver said when it failed, with its numeric ``code``."""

    def __init__(self, code: int, text: str) -> None:
        said = text.removeprefix(_SAYS)
        super().__init__(ErrorKind.DEVICE_OOM if code == _OUT_OF_MEMORY else cuda_kind(said, str(code)), text)
        self.code = code


class DeviceMemory:
    """Real device memory, every byte of it written. It keeps its context alive until it is freed."""

    def __init__(self, size_bytes: int, undo: contextlib.ExitStack) -> None:
        """Hold what ``undo`` gives back."""
        self.size_bytes = size_bytes
        self._undo = undo

    def free(self) -> None:
        """Give the memory back to the device. A second call does nothing. Raises DriverError."""
        self._undo.close()


class Driver:
    """The driver API, initialised in this process. Every method raises DriverError for what the driver refuses."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare and initialise the library. Raises NoDriver."""
        self._library = library
        for name, parameters in _PARAMETERS.items():
            function = getattr(library, name, None)
            if function is None:
                raise NoDriver(f"the NVIDIA driver is too old: {_LIBRARY} has no {name}; update it to 525 or newer")
            function.argtypes, function.restype = parameters, c_int
        try:
            self._call("cuInit", 0)
        except DriverError as error:
            raise NoDriver(f"the NVIDIA driver refuses: {error}{_visibility_hint(error.code)}") from None

    @property
    def version(self) -> tuple[int, int]:
        """The newest CUDA version that the driver supports, such as (13, 0)."""
        found = c_int()
        self._call("cuDriverGetVersion", byref(found))
        return found.value // 1000, found.value % 1000 // 10

    def device_count(self) -> int:
        """Count the devices that this process may see."""
        found = c_int()
        self._call("cuDeviceGetCount", byref(found))
        return found.value

    def name(self, device: int) -> str:
        """Give a device's name."""
        found = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", found, len(found), self._handle(device))
        return found.value.decode(errors="replace")

    def uuid(self, device: int) -> str:
        """Give the "GPU-…" by which NVML knows the same card, whatever CUDA_VISIBLE_DEVICES says.

        For a MIG instance NVML writes "MIG-" before the same number.
        """
        found = (c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", byref(found), self._handle(device))
        return f"GPU-{uuid.UUID(bytes=bytes(found))}"

    def total_bytes(self, device: int) -> int:
        """Give the device's whole memory in bytes."""
        found = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(found), self._handle(device))
        return found.value

    @contextlib.contextmanager
    def context(self, device: int) -> Iterator[None]:
        """Have the device's primary context current in this thread.

        Where nobody in this process has it yet it is made, which takes a moment and some hundred MB of device memory,
        and it goes, with all that is in it, when the last to have it lets it go.
        """
        handle = self._handle(device)
        context = self._retain(handle)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                # Unchecked, as the release is: after a sticky error every call reports that one again.
                self._library.cuCtxPopCurrent_v2(byref(c_void_p()))
        finally:
            self._release(handle)

    def memory(self, device: int) -> tuple[int, int]:
        """Read free and total bytes of the device, all processes counted. The context that this needs is in use too."""
        free, total = c_size_t(), c_size_t()
        with self.context(device):
            self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def free_bytes(self, device: int) -> int:
        """Read the free bytes of the device, as ``memory`` does."""
        return self.memory(device)[0]

    def allocate(self, device: int, size_bytes: int) -> DeviceMemory:
        """Take real device memory, never managed memory, and write to every byte of it.

        Raises ValueError for a size below 1.
        """
        if size_bytes < 1:
            raise ValueError(f"size_bytes is {size_bytes}: expected at least 1")
        handle = self._handle(device)
        with contextlib.ExitStack() as undo:
            self._retain(handle)
            undo.callback(self._release, handle)
            with self.context(device):
                address = c_uint64()
                self._call("cuMemAlloc_v2", byref(address), size_bytes)
                undo.callback(self._free, device, address)
                self._call("cuMemsetD8_v2", address, 0xA5, size_bytes)
                self._call("cuCtxSynchronize")
            return DeviceMemory(size_bytes, undo.pop_all())

    def poison(self, device: int, kernel: str) -> DriverError:
        """Run a kernel of ``KERNELS``, wait for it, and give the sticky error that this brings.

        Unguarded: use ``trap``, ``device_assert`` and ``illegal_address``. Raises BackendError where no error came,
        and DriverError for one that is not sticky.
        """
        from backends.contract import BackendError

        module, function = c_void_p(), c_void_p()
        # Never released: a context that went with its last user would take the fault along.
        self._retain(self._handle(device))
        with self.context(device):
            self._call("cuModuleLoadData", byref(module), KERNELS[kernel].encode())
            self._call("cuModuleGetFunction", byref(function), module, kernel.encode())
            try:
                self._call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
                self._call("cuCtxSynchronize")
            except DriverError as error:
                if error.kind is ErrorKind.DEVICE_STICKY:
                    return error
                raise
        raise BackendError(f"device {device} ran the kernel {kernel!r} and reported no error: no fault came about")

    def _handle(self, device: int) -> c_int:
        """Give the driver's handle of a device."""
        handle = c_int()
        self._call("cuDeviceGet", byref(handle), device)
        return handle

    def _retain(self, handle: c_int) -> c_void_p:
        """Have a share in the device's primary context; each is to be released."""
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), handle)
        return context

    def _release(self, handle: c_int) -> None:
        """Let go one share in the device's primary context."""
        self._library.cuDevicePrimaryCtxRelease_v2(handle)

    def _free(self, device: int, address: c_uint64) -> None:
        """Free device memory."""
        with self.context(device):
            self._call("cuMemFree_v2", address)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver. Raises DriverError unless it reports success."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = self._text("cuGetErrorString", code) or "unknown error"
            error = self._text("cuGetErrorName", code) or "no name"
            raise DriverError(code, f"{_SAYS}{text} (code {code}, {error})")

    def _text(self, name: str, code: int) -> str:
        """Ask what a code means; empty where the driver does not know it."""
        found = c_char_p()
        getattr(self._library, name)(code, byref(found))
        return (found.value or b"").decode(errors="replace")


@functools.cache
def open_driver() -> Driver:
    """Load and initialise the driver, once in a process. Raises NoDriver, and tries again at the next call."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise NoDriver(
            f"no NVIDIA driver: {_LIBRARY} is not there ({error}): "
            "install it, 525 or newer for CUDA 12, 580 or newer for CUDA 13"
        ) from None
    return Driver(library)


def require_device_faults_allowed(device: int) -> None:
    """Raise BackendError unless faults that poison a context are allowed, and hit nobody else."""
    from backends.contract import BackendError

    fault = f"a fault on device {device} that poisons its context"
    if found := _mps():
        raise BackendError(
            f"{fault} is refused under MPS ({found}): it would end the other programs that share the device. "
            "Stop the daemon (echo quit | nvidia-cuda-mps-control), remove what it left, or qualify on another machine"
        )
    if os.environ.get(ALLOW_DEVICE_FAULTS) != "1":
        raise BackendError(
            f"{fault} was not allowed: the driver logs an Xid, which monitors may act on. "
            f"Allow it with --allow-device-faults, or {ALLOW_DEVICE_FAULTS}=1"
        )


def trap(device: int) -> DriverError:
    """Poison this process's context with a kernel that traps; give what the driver then reported.

    As the other two, it is refused with BackendError in a process that is not expendable, and where device faults are
    not allowed; it raises NoDriver without a driver, and DriverError where the kernel cannot even be started.
    """
    return _strike(device, "trap")


def device_assert(device: int) -> DriverError:
    """Poison this process's context with a failed device-side assertion. The driver prints it to standard error."""
    return _strike(device, "device_assert")


def illegal_address(device: int) -> DriverError:
    """Poison this process's context with a kernel that writes to an address where nothing is."""
    return _strike(device, "illegal_address")


def _strike(device: int, kernel: str) -> DriverError:
    """Poison the context, after the guards."""
    # Not at the top: they need numpy, and the driver is asked before anything is installed too.
    from backends.contract import BackendError
    from backends.faults import limits

    if not limits.is_expendable():
        raise BackendError(
            "a context is poisoned only in a process started for it (see backends/faults/limits.py): "
            "every later use of the device in that process fails"
        )
    require_device_faults_allowed(device)
    return open_driver().poison(device, kernel)


def _visibility_hint(code: int) -> str:
    """Say what else may hide every device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if code != _NO_DEVICE or visible is None:
        return ""
    return f"; CUDA_VISIBLE_DEVICES is {visible!r}, which may hide the device"


def _mps(proc: Path = Path("/proc")) -> str | None:
    """Say by what an MPS daemon shows, or None where none does."""
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps") / "control"
    if pipe.exists():
        return f"{pipe} is there"
    for process in proc.glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            # The kernel keeps 15 characters of nvidia-cuda-mps-control and nvidia-cuda-mps-server.
            if process.read_text().strip() == "nvidia-cuda-mps":
                return f"process {process.parent.name} is its daemon or server"
    return None
