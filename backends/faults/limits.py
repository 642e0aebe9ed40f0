"""Host memory that runs out: RLIMIT_DATA lowered to what the process holds, for a moment, in an expendable process."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

from backends.contract import BackendError
from backends.host import data_bytes, spendable_bytes
from backends.process import suppress_core_dumps

_expendable = False
_HOLE_BYTES = 64 << 10


def declare_expendable() -> None:
    """Say that this process was started for the purpose: host memory may be exhausted in it. Suppresses core dumps."""
    global _expendable
    _expendable = True
    suppress_core_dumps()


def is_expendable() -> bool:
    """Whether this process was declared expendable."""
    return _expendable


def require_expendable() -> None:
    """Raise BackendError unless this process was declared expendable."""
    if not _expendable:
        raise BackendError(
            "host memory is exhausted only in a process started for it (see qualification/host.py): "
            "RLIMIT_DATA binds the whole process, the test runner included"
        )


def cap_host_memory(headroom_bytes: int) -> int:
    """Lower the soft RLIMIT_DATA to what the process holds plus ``headroom_bytes``; return the limit in bytes."""
    require_expendable()
    spendable = spendable_bytes()
    if headroom_bytes > spendable:
        raise BackendError(
            f"{headroom_bytes} bytes of host memory were to be used up, but no more than {spendable} may be: "
            "the rest is left to the other programs of the machine"
        )
    limit = data_bytes() + headroom_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return limit


@contextlib.contextmanager
def no_host_memory(min_bytes: int) -> Iterator[None]:
    """Have the host refuse requests of about ``min_bytes`` and more in this process, for the length of the context.

    The limit alone is not enough: the C library's heap may hold free memory that it would serve from. So the holes of
    64 KiB and more are filled first, by the thread that is about to ask.
    """
    require_expendable()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    holes: list[bytearray] = []
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes(), before[1]))
    try:
        with contextlib.suppress(MemoryError):
            while True:
                holes.append(bytearray(_HOLE_BYTES))
        freed = 0
        while holes and freed + _HOLE_BYTES < min_bytes:
            holes.pop()
            freed += _HOLE_BYTES
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        holes.clear()
