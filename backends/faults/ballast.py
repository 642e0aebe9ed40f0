"""Ballast: real memory held so that others find none.

On a device it is made of the backend's own allocations. On the host it is a neighbour process,

    python -m backends.faults.ballast SIZE_BYTES SECONDS PARENT_PROCESS_ID [CGROUP_PROCS]

that touches its memory, volunteers to the OOM killer, and ends with its parent or at its time limit. In a cgroup of our
own it is there to have a worker killed: it is the second choice only, and grows slowly, so that it is stopped in time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from backends.contract import Allocation
from backends.errors import classify
from backends.host import spendable_bytes
from backends.process import begin_as_child

MIB = 1 << 20
PIECES = (16 * MIB, 4 * MIB, MIB, 256 << 10, 64 << 10, 4 << 10)


def fill(allocate: Callable[[int], Allocation], pieces_bytes: tuple[int, ...] = PIECES) -> list[Allocation]:
    """Take all the device's memory, in ever smaller pieces, until the runtime refuses the smallest.

    Raises what ``allocate`` raises when it is not an out-of-memory error.
    """
    held: list[Allocation] = []
    for piece in pieces_bytes:
        while True:
            try:
                held.append(allocate(piece))
            except Exception as error:
                if not classify(error).is_oom:
                    free(held)
                    raise
                break
    return held


def leave(held: list[Allocation], free_bytes: int) -> list[Allocation]:
    """Free pieces of a full device, largest that fit first, until almost ``free_bytes`` (never more) are free again."""
    kept: list[Allocation] = []
    left = free_bytes
    for piece in sorted(held, key=lambda each: each.size_bytes, reverse=True):
        if piece.size_bytes < left:
            left -= piece.size_bytes
            piece.free()
        else:
            kept.append(piece)
    return kept


def free(held: list[Allocation]) -> None:
    """Free every piece."""
    while held:
        held.pop().free()


class Neighbour:
    """A process beside this one that holds memory. As a context manager it is gone on the way out."""

    def __init__(self, module: str, *arguments: str) -> None:
        """Start a module's command and wait for its first line: ``said``, empty when it ended without one."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is its parent's to handle: it ends the neighbour itself.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline()

    @property
    def process_id(self) -> int:
        """The neighbour's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it is still there: it has a time limit, and is the OOM killer's first choice."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the neighbour. A second call does nothing."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        """Nothing to do: the memory is held already."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the neighbour."""
        self.close()


class HostBallast(Neighbour):
    """Real host memory in a neighbour process."""

    def __init__(self, size_bytes: int, limit_s: float, cgroup_processes: Path | None = None) -> None:
        """Start the neighbour and wait until its memory is touched. Raises RuntimeError when it cannot hold it.

        ``cgroup_processes`` is the file by which it enters a cgroup. There it takes 1 MiB a millisecond, and nobody
        waits for it.
        """
        if size_bytes > spendable_bytes():
            raise RuntimeError(
                f"a ballast of {size_bytes} bytes was asked for, but no more than {spendable_bytes()} may be held: "
                "the rest is left to the other programs of the machine"
            )
        self.size_bytes = size_bytes
        super().__init__(
            *("backends.faults.ballast", str(size_bytes), str(limit_s), str(os.getpid())),
            *([] if cgroup_processes is None else [str(cgroup_processes)]),
        )
        if self.said != "held\n":
            status = self._process.wait()
            self.close()
            raise RuntimeError(f"the ballast process could not hold {size_bytes} bytes (exit status {status})")


def main(argv: list[str]) -> int:
    """Hold SIZE_BYTES for at most SECONDS, and no longer than its parent lives."""
    # The parent is told, not asked for: it may have ended while this process started.
    size_bytes, limit_s, parent, cgroup = int(argv[0]), float(argv[1]), int(argv[2]), argv[3:]
    # In a cgroup: after a worker, and before its host.
    begin_as_child(parent, oom_score=300 if cgroup else 1000)
    if cgroup:
        Path(cgroup[0]).write_text(f"{os.getpid()}\n")
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    held: list[bytearray] = []
    if cgroup:
        print("held", flush=True)
        while len(held) * MIB < size_bytes:
            held.append(bytearray(b"\xa5") * MIB)
            time.sleep(0.001)
    else:
        held.append(bytearray(b"\xa5") * size_bytes)
        print("held", flush=True)
    # The parent may have ended before it could be watched.
    while os.getppid() == parent and held:
        signal.sigtimedwait([signal.SIGTERM], 1.0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
