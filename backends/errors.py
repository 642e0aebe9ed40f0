"""One out-of-memory taxonomy: what kind of failure an error is, by its type *and* its text.

There is no common type: ONNX Runtime alone raises four, one of them a builtin ``RuntimeError``. The messages that this
is judged by, with their sources, are ``tests/data/error_messages.toml``; ``docs/out-of-memory-errors.md`` explains it.
"""

from __future__ import annotations

import enum
import errno
import re
from dataclasses import dataclass


class ErrorKind(enum.Enum):
    """What a failure means for whoever has to go on, from the mildest to the gravest."""

    DEVICE_OOM = "device_oom"  # no device memory: the device itself is fine
    HOST_OOM = "host_oom"  # no host memory
    DEVICE_ERROR = "device_error"  # the device failed, and the process can go on
    DEVICE_STICKY = "device_sticky"  # every later call in this process fails: it has to be replaced
    PROCESS_LOST = "process_lost"  # the process that the runtime was in died, hung or broke its protocol
    DEVICE_LOST = "device_lost"  # no process can use the device now: gone, broken, taken, or without a driver
    OTHER = "other"  # not ours

    @property
    def is_oom(self) -> bool:
        """Whether it is an out-of-memory error."""
        return self in (ErrorKind.DEVICE_OOM, ErrorKind.HOST_OOM)

    @property
    def is_device_error(self) -> bool:
        """Whether the device failed for another reason than memory."""
        return self in (ErrorKind.DEVICE_ERROR, ErrorKind.DEVICE_STICKY, ErrorKind.DEVICE_LOST)


class Shortage(enum.Enum):
    """Why there was no memory, where an error tells."""

    CAPPED = "capped"  # a limit refused, whatever was left
    EXHAUSTED = "exhausted"  # there was nothing left


@dataclass(frozen=True)
class Diagnosis:
    """What kind of failure an error is; of an out-of-memory error also why, or None where it does not tell."""

    kind: ErrorKind
    shortage: Shortage | None = None


class RuntimeFailure(Exception):
    """What a runtime raised in another process, classified there, where its type was known."""

    def __init__(self, kind: ErrorKind, text: str, shortage: Shortage | None = None) -> None:
        super().__init__(text)
        self.kind = kind
        self.shortage = shortage


_OTHER = Diagnosis(ErrorKind.OTHER)
_NOTED = "_plimsoll_diagnosis"

#: Errors of these are read, plain RuntimeErrors, and one SystemError. The same words in a ValueError are somebody's
#: message about something else.
_RUNTIMES = {"cupy", "cupy_backends", "jax", "jaxlib", "onnxruntime", "pynvml", "tensorflow", "torch"}

#: What the CUDA error strings say; ``cudaError_t`` in the CUDA runtime API's documentation unless another reason is
#: given: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
_CUDA_STRINGS = (
    (ErrorKind.DEVICE_OOM, ("out of memory",)),
    # "The process must be terminated and relaunched."
    (
        ErrorKind.DEVICE_STICKY,
        (
            "an illegal memory access was encountered",
            "the launch timed out and was terminated",
            "device-side assert triggered",
            "hardware stack error",
            "an illegal instruction was encountered",
            "misaligned address",
            "operation not supported on global/shared address space",
            "invalid program counter",
            "unspecified launch failure",
            # Not documented as such. After a suspend every later call of the process says it; a fork or an unloading
            # driver leaves a process that cannot get at the device, while a new one can.
            "unknown error",
            "initialization error",
            "driver shutting down",
        ),
    ),
    # A new process would be refused too. An uncorrectable ECC error is among them: the card has to be reset.
    (
        ErrorKind.DEVICE_LOST,
        (
            "no CUDA-capable device is detected",
            "all CUDA-capable devices are busy or unavailable",
            "CUDA-capable device(s) is/are busy or unavailable",
            "uncorrectable ECC error encountered",
            "uncorrectable NVLink error detected during the execution",
            "CUDA driver version is insufficient for CUDA runtime version",
            "CUDA driver is a stub library",
            "system not yet initialized",
            "system has unsupported display driver / cuda driver combination",
            "forward compatibility was attempted on non supported HW",
        ),
    ),
)
#: Codes count where the string is not one of those above. Only those from 100 up: the lower ones meant other things
#: before CUDA 10.1. Sticky by the documentation are 226, 721, 810 and 911 too; after 709 the context is gone. 805 to
#: 809 say that MPS lets no further process in.
_CUDA_CODES = {
    **dict.fromkeys(
        ("226", "700", "702", "709", "710", "714", "715", "716", "717", "718", "719", "721", "810", "911", "999"),
        ErrorKind.DEVICE_STICKY,
    ),
    **dict.fromkeys(
        ("100", "102", "214", "220", "802", "803", "804", "805", "806", "807", "808", "809"), ErrorKind.DEVICE_LOST
    ),
}
#: How torch, ONNX Runtime, CTranslate2, NCCL, CuPy, TensorFlow and old torch introduce a CUDA error string.
_CUDA_ERROR = re.compile(
    r"(?:CUDA|HIP) (?:driver )?error: "
    r"|CUDA failure (?P<failure>\d+): "
    r"|CUDA (?=unknown error)"
    r"|(?i:CUDA failed with error )(?:\d+ )?"
    r"|Cuda failure (?:(?P<nccl>\d+) )?'"
    r"|cudaGetDeviceCount\(\).* Error (?P<count>\d+): "
    r"|cuda runtime error \(\d+\) : "
    r"|cudaError\w+: |CUDA_ERROR_\w+: "
)
#: The rest of what libraries on a device say. Some of it hides an out-of-memory error: cuBLAS or cuDNN could not make a
#: handle, no algorithm had room for a convolution. It is not taken for one, since the same words are said after a
#: device-side assert and of a wrong version. Clearing caches for those would go on for ever; three device errors in a
#: row leave the device.
_DEVICE_LIBRARY = re.compile(
    r"CUBLAS_STATUS_|CUDNN_STATUS_|(?:CUDA|CUBLAS|CUDNN) error executing "
    r"|Unable to find a valid cuDNN algorithm|GET was unable to find an engine|UR backend failed"
)

#: More than any machine has, in a text that says that it could not be had: a size that was computed wrongly.
_IMPOSSIBLE = re.compile(
    r"(?:requested buffer of size|you tried to allocate) \d{16,}\b|Tried to allocate more than 1EB memory"
)

#: What CPython says where its compiler could not even begin for want of memory. Of other functions the words say only
#: that they have a defect.
_COMPILER_OOM = re.compile(r"<built-in function (?:compile|exec|eval)> returned NULL without setting an exception")

_TORCH_OOM = re.compile(r"\w+ out of memory\. Tried to allocate ")
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_TORCH_SIZES = re.compile(rf"Tried to allocate {_SIZE}\b.* {_SIZE} (?:is )?free\b")
_UNIT_BYTES = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

#: Tried in order on the text of an error that a runtime raised, before what CUDA says; the first that matches decides.
_TEXTS: tuple[tuple[re.Pattern[str], Diagnosis], ...] = tuple(
    (re.compile(pattern), Diagnosis(kind, shortage))
    for pattern, kind, shortage in (
        # ONNX Runtime: the arena is at its cap (CPU and CUDA alike).
        (r"Available memory of \d+ is smaller than requested bytes of \d+", ErrorKind.DEVICE_OOM, Shortage.CAPPED),
        # torch on Apple's GPUs has a limit by default, and says so. CuPy says when one was set.
        (r"MPS backend out of memory \(.*max allowed: ", ErrorKind.DEVICE_OOM, Shortage.CAPPED),
        (r"[Oo]ut of memory (?:allocating|to allocate) .*limit set to", ErrorKind.DEVICE_OOM, Shortage.CAPPED),
        (r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED", ErrorKind.DEVICE_OOM, None),
        # TensorFlow, and JAX, whose second text is for what a compiled program carries with it.
        (r"OOM when allocating tensor.*device:CPU", ErrorKind.HOST_OOM, None),
        (r"OOM when allocating tensor", ErrorKind.DEVICE_OOM, None),
        (r"RESOURCE_EXHAUSTED: (?s:.*)(?:[Oo]ut of memory|allocate|reserve)", ErrorKind.DEVICE_OOM, None),
        (r"Failed to allocate \d+ bytes for new constant", ErrorKind.DEVICE_OOM, None),
        # ONNX Runtime's arena, refused by what is below it. The text is the same for a host and for a card: an adapter
        # that works on a card has to note it (see `note`).
        (r"Failed to allocate memory for requested buffer of size \d+", ErrorKind.HOST_OOM, None),
        # The host, as C++ (the second is Windows), torch and the system say it.
        (r"std::bad_alloc|\bbad allocation\b", ErrorKind.HOST_OOM, None),
        (r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)", ErrorKind.HOST_OOM, None),
        (r"Cannot allocate memory \(12\)", ErrorKind.HOST_OOM, None),
        # The allocator of torch's expandable segments, after it ran out of memory while mapping: from then on every
        # allocation of the process fails with it (https://github.com/pytorch/pytorch/issues/188008).
        (r"!handles_\.at\(i\) INTERNAL ASSERT FAILED", ErrorKind.DEVICE_STICKY, None),
        # torch without a driver or a card; NVML.
        (r"Found no NVIDIA driver on your system|No CUDA GPUs are available", ErrorKind.DEVICE_LOST, None),
        (r"GPU is lost|NVML/RM version mismatch", ErrorKind.DEVICE_LOST, None),
    )
)


def classify(error: BaseException) -> ErrorKind:
    """Say what kind of failure an error is: the kind of its diagnosis."""
    return diagnose(error).kind


def diagnose(error: BaseException) -> Diagnosis:
    """Say what kind of failure an error is, and of an out-of-memory error why, where it tells.

    Causes and exception groups are looked through; of several failures in a group the gravest decides. What was only
    being handled when the error was raised (``__context__``) is not: an out-of-memory error that was coped with says
    nothing about the next error.
    """
    found: list[Diagnosis] = []
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        diagnosis = _diagnose_one(current)
        if diagnosis.kind is not ErrorKind.OTHER:
            found.append(diagnosis)
            continue
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions
        if current.__cause__ is not None:
            waiting.append(current.__cause__)
    gravity = list(ErrorKind)
    return max(found, key=lambda diagnosis: gravity.index(diagnosis.kind), default=_OTHER)


def note(error: BaseException, diagnosis: Diagnosis) -> None:
    """Note on an error what only its adapter knows: ``diagnose`` gives it, and reads neither type nor text.

    ONNX Runtime's arena complains alike of the host and of a card, and where a device is host memory under a limit,
    torch's allocator complains of the host.
    """
    error.__dict__[_NOTED] = diagnosis


def _diagnose_one(error: BaseException) -> Diagnosis:
    noted = error.__dict__.get(_NOTED)
    if isinstance(noted, Diagnosis):
        return noted
    if isinstance(error, RuntimeFailure):
        return Diagnosis(error.kind, error.shortage)
    if isinstance(error, OSError):
        # A full disk (ENOSPC) or too many open files (EMFILE) are not out of memory.
        return Diagnosis(ErrorKind.HOST_OOM) if error.errno == errno.ENOMEM else _OTHER
    # What derives from a runtime's type counts as the runtime's.
    theirs = [base for base in type(error).__mro__ if base.__module__.partition(".")[0] in _RUNTIMES]
    if theirs or type(error) is RuntimeError:
        text = str(error)
        if _IMPOSSIBLE.search(text):
            return _OTHER
        found = _read(text)
        if found is not None:
            return found
        if any(base.__name__ == "OutOfMemoryError" for base in theirs):
            return Diagnosis(ErrorKind.DEVICE_OOM)
    if type(error) is SystemError and _COMPILER_OOM.match(str(error)):
        return Diagnosis(ErrorKind.HOST_OOM)
    # Python's own has no text; numpy's and ONNX Runtime's loader's (`std::bad_alloc`) derive from it.
    return Diagnosis(ErrorKind.HOST_OOM) if isinstance(error, MemoryError) else _OTHER


def _read(text: str) -> Diagnosis | None:
    """Say what a runtime's text means, or None for a text that means nothing here."""
    if _TORCH_OOM.search(text):
        return Diagnosis(ErrorKind.DEVICE_OOM, _torch_shortage(text))
    for pattern, diagnosis in _TEXTS:
        if pattern.search(text):
            return diagnosis
    cuda = _CUDA_ERROR.search(text)
    if cuda:
        return Diagnosis(cuda_kind(text[cuda.end() :], cuda["failure"] or cuda["nccl"] or cuda["count"]))
    return Diagnosis(ErrorKind.DEVICE_ERROR) if _DEVICE_LIBRARY.search(text) else None


def cuda_kind(string: str, code: str | None) -> ErrorKind:
    """Say what an error of CUDA is, by its text or, where that is not known, its numeric code."""
    for kind, strings in _CUDA_STRINGS:
        if string.startswith(strings):
            return kind
    return _CUDA_CODES.get(code or "", ErrorKind.DEVICE_ERROR)


def _torch_shortage(text: str) -> Shortage | None:
    """Say why torch's caching allocator got nothing. It names its limit (``… allowed;``) whenever one is set.

    More free than was asked for, and no limit, is fragmentation or another program that was quicker: neither.
    """
    capped = " allowed; " in text
    sizes = _TORCH_SIZES.search(text)
    if sizes is not None:
        asked, free = (float(sizes[i]) * _UNIT_BYTES[sizes[i + 1]] for i in (1, 3))
        if free < asked:
            return Shortage.EXHAUSTED
    return Shortage.CAPPED if capped else None
