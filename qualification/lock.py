"""One lock for each machine and device: two qualifications at once would measure each other.

A card is locked by its UUID, whichever backend uses it; a backend whose device is host memory by its own name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

#: Not under TMPDIR: every user of the machine has to meet the same file.
FOLDER = Path("/tmp")


class LockBusy(Exception):
    """Another qualification runs on this device. The message says which process."""


class DeviceLock:
    """A lock file that is released however its process ends."""

    def __init__(
        self, device: str, wait_s: float = 0.0, folder: Path = FOLDER, say: Callable[[str], None] | None = None
    ) -> None:
        """Take the lock, waiting for it at most ``wait_s`` seconds, and saying so once.

        Raises LockBusy, and OSError for a bad folder.
        """
        name = "".join(c if c.isalnum() else "-" for c in device)
        self.path = folder / f"plimsoll-{name}.lock"
        # Without O_CREAT first: the kernel refuses to create over another user's file in a sticky folder.
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            with contextlib.suppress(OSError):
                os.fchmod(self._fd, 0o666)
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    owner = self._owner()
                    os.close(self._fd)
                    raise LockBusy(
                        f"another qualification (process {owner}) runs on {device} of this machine, and two at once "
                        f"would measure each other: wait for it, or queue with --lock-wait SECONDS ({self.path})"
                    ) from None
                if say is not None:
                    say(f"waiting for process {self._owner()}, at most {wait_s:g} s")
                    say = None
                time.sleep(0.2)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}".encode(), 0)

    def _owner(self) -> str:
        """Give the id of the process that holds the lock."""
        return os.pread(self._fd, 64, 0).decode(errors="replace").strip() or "unknown"

    def release(self) -> None:
        """Let the next one in."""
        os.close(self._fd)
