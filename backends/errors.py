"""One out-of-memory taxonomy: what kind of failure an error is, by its type *and* its text.

There is no common type: ONNX Runtime alone raises four, one of them a builtin ``RuntimeError``. The texts and their
sources are listed in ``docs/out-of-memory-errors.md``; the live ones are raised again by ``tests/unit/test_errors.py``.
"""

from __future__ import annotations

import enum
import errno
import re


class ErrorKind(enum.Enum):
    """What a failure means for whoever has to go on."""

    DEVICE_OOM = "device_oom"  # no device memory: the device itself is fine
    HOST_OOM = "host_oom"  # no host memory
    DEVICE_ERROR = "device_error"  # the device failed, and the process can go on
    DEVICE_STICKY = "device_sticky"  # every later call in this process fails: it has to be replaced
    PROCESS_LOST = "process_lost"  # the process that the runtime was in died, hung or broke its protocol
    OTHER = "other"  # not ours

    @property
    def is_oom(self) -> bool:
        """Whether it is an out-of-memory error."""
        return self in (ErrorKind.DEVICE_OOM, ErrorKind.HOST_OOM)

    @property
    def is_device_error(self) -> bool:
        """Whether the device failed for another reason than memory."""
        return self in (ErrorKind.DEVICE_ERROR, ErrorKind.DEVICE_STICKY)


class RuntimeFailure(Exception):
    """What a runtime raised in another process, classified there, where its type was known."""

    def __init__(self, kind: ErrorKind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


#: Tried in order on the text of an error that a runtime raised; the first that matches decides.
_RUNTIME_TEXTS: tuple[tuple[re.Pattern[str], ErrorKind], ...] = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        # ONNX Runtime: the arena is at its cap (CPU and CUDA alike).
        (r"Available memory of \d+ is smaller than requested bytes of \d+", ErrorKind.DEVICE_OOM),
        # torch, CUDA runtime, cuBLAS, cuDNN, CTranslate2.
        (r"CUDA out of memory\. Tried to allocate", ErrorKind.DEVICE_OOM),
        (r"CUDA (driver error: |error: |failure 2: |failed with error )out of memory", ErrorKind.DEVICE_OOM),
        # torch's handle table of expandable segments, when the device has nothing left to map.
        (r"!handles_\.at\(i\) INTERNAL ASSERT FAILED", ErrorKind.DEVICE_OOM),
        (r"CUBLAS failure 3\b|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED", ErrorKind.DEVICE_OOM),
        # The host, as ONNX Runtime and torch say it.
        (r"Failed to allocate memory for requested buffer of size \d+", ErrorKind.HOST_OOM),
        (r"DefaultCPUAllocator: (can't allocate memory|not enough memory)", ErrorKind.HOST_OOM),
        (r"std::bad_alloc", ErrorKind.HOST_OOM),
        # CUDA codes after which "the process must be terminated and relaunched" (CUDA runtime API documentation).
        (r"CUDA (error|failure)[: ]+(700|710|714|716|717|718|719)\b", ErrorKind.DEVICE_STICKY),
        (
            r"CUDA error: (an illegal memory access|device-side assert triggered|unspecified launch failure"
            r"|misaligned address|an illegal instruction)",
            ErrorKind.DEVICE_STICKY,
        ),
        (r"CUDA (driver error|error|failure)[: ]|CUBLAS_STATUS_|CUDNN_STATUS_", ErrorKind.DEVICE_ERROR),
    )
)


def classify(error: BaseException) -> ErrorKind:
    """Say what kind of failure an error is, looking through causes and exception groups."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        kind = _classify_one(current)
        if kind is not ErrorKind.OTHER:
            return kind
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions
        if current.__cause__ is not None:
            waiting.append(current.__cause__)
    return ErrorKind.OTHER


def _classify_one(error: BaseException) -> ErrorKind:
    if isinstance(error, RuntimeFailure):
        return error.kind
    if isinstance(error, MemoryError):
        # Python's own has no text; numpy's and ONNX Runtime's loader's (`std::bad_alloc`) derive from it.
        return ErrorKind.HOST_OOM
    if isinstance(error, OSError):
        # A full disk (ENOSPC) or too many open files (EMFILE) are not out of memory.
        return ErrorKind.HOST_OOM if error.errno == errno.ENOMEM else ErrorKind.OTHER
    # Only what a runtime raised is read: the same words in a ValueError are somebody's message about something else.
    runtime = type(error).__module__.partition(".")[0] in ("onnxruntime", "torch")
    if not (runtime or type(error) is RuntimeError):
        return ErrorKind.OTHER
    text = str(error)
    for pattern, kind in _RUNTIME_TEXTS:
        if pattern.search(text):
            return kind
    return ErrorKind.OTHER
