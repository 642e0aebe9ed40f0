"""A memory cgroup of our own, where the OOM killer can be made to kill for real, and only us. Linux, v2 and v1."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

_MOUNTS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_NAME = "plimsoll"
_LIMIT_PATIENCE_S = 2.0
_numbers = itertools.count(1)


class CgroupUnavailable(Exception):
    """No memory cgroup can be made here. The message says why, and what would help."""


class MemoryCgroup:
    """A cgroup below one that this process may write to. As a context manager it is removed on the way out."""

    def __init__(self) -> None:
        """Make it, without a limit. Raises CgroupUnavailable."""
        reasons = []
        for parent, version, why_not in _parents():
            if why_not:
                reasons.append(f"{parent}: {why_not}")
                continue
            _sweep(parent)
            try:
                folder = _make(parent)
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            self._folder, self._v2 = folder, version == 2
            try:
                self.limit(1 << 40)
                self.oom_kills()
            except OSError as error:
                folder.rmdir()
                reasons.append(f"{parent}: {error.strerror}")
                continue
            return
        raise CgroupUnavailable(
            "no memory cgroup can be made here: it needs root, or a delegated cgroup (systemd-run --user --scope "
            f"-p Delegate=yes); tried {'; '.join(reasons) or 'none: no memory controller is mounted'}"
        )

    @property
    def processes_path(self) -> Path:
        """Where a process writes its id to come in."""
        return self._folder / "cgroup.procs"

    def add(self, process_id: int) -> None:
        """Move a process in; its children from here on begin in it. Raises CgroupUnavailable where that is refused."""
        try:
            self.processes_path.write_text(f"{process_id}\n")
        except ProcessLookupError:
            return
        except OSError as error:
            raise CgroupUnavailable(f"a process cannot be moved into {self._folder}: {error.strerror}") from error

    def limit(self, limit_bytes: int) -> None:
        """Limit its memory; without swap, where that can be said.

        Raises RuntimeError where the kernel does not lower the limit that far: v1 refuses a limit that is below what
        is held and cannot be given back.
        """
        name, swap = ("memory.max", "memory.swap.max") if self._v2 else ("memory.limit_in_bytes", "memory.swappiness")
        deadline_s = time.monotonic() + _LIMIT_PATIENCE_S
        while True:
            try:
                (self._folder / name).write_text(f"{limit_bytes}\n")
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() > deadline_s:
                    raise RuntimeError(
                        f"the kernel does not limit {self._folder} to {limit_bytes} bytes: what it holds beyond that "
                        "cannot be given back"
                    ) from error
            # What was freed a moment ago may be counted still.
            time.sleep(0.05)
        with contextlib.suppress(OSError):
            (self._folder / swap).write_text("0\n")

    def used_bytes(self) -> int:
        """Read what its processes hold: not the page cache of files, which is given back before anything is killed."""
        stat = dict(line.split() for line in (self._folder / "memory.stat").read_text().splitlines())
        return int(stat["anon"] if self._v2 else stat["total_rss"]) + int(stat.get("shmem", stat.get("total_shmem", 0)))

    def oom_kills(self) -> int:
        """Read how many processes in it the OOM killer has killed."""
        path = self._folder / ("memory.events" if self._v2 else "memory.oom_control")
        counts = dict(line.split() for line in path.read_text().splitlines())
        if "oom_kill" not in counts:
            raise OSError(0, f"{path.name} does not count oom_kill on this kernel")
        return int(counts["oom_kill"])

    def remove(self) -> None:
        """Remove it once its processes are gone; they are waited for, 5 s at most. A second call does nothing."""
        deadline_s = time.monotonic() + 5.0
        while self._folder.exists():
            try:
                self._folder.rmdir()
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)

    def __enter__(self) -> MemoryCgroup:
        """Nothing to do: it is there already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self.remove()


def _make(parent: Path) -> Path:
    """Make a folder of our own in a cgroup. Raises OSError."""
    for number in _numbers:
        folder = parent / f"{_NAME}-{os.getpid()}-{number}"
        # Process ids come again: what another left may be there.
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("numbers do not end")


def _sweep(parent: Path) -> None:
    """Remove what runs that were killed have left in a cgroup: the empty ones of processes that are no more."""
    for folder in parent.glob(f"{_NAME}-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            # One that is not empty cannot be removed.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _parents(mounts: Path = _MOUNTS, own_groups: Path = _OWN_GROUPS) -> Iterator[tuple[Path, int, str]]:
    """Give folders that may take a new memory cgroup, nearest first, with the version, and why it cannot be there."""
    try:
        groups = [line.split(":", 2) for line in own_groups.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers == "":
            for root in (mounts, mounts / "unified"):
                for folder in (root / path.strip("/"), *_up(root, path)):
                    if "memory" in _words(folder / "cgroup.subtree_control"):
                        yield folder, 2, ""
                    elif "memory" in _words(folder / "cgroup.controllers"):
                        # A child would have no memory controller. No process may be in one that passes it on.
                        yield (
                            folder,
                            2,
                            "it has the memory controller but does not pass it on (what helps: echo +memory > "
                            f"{folder / 'cgroup.subtree_control'}, once its processes are in a cgroup below it)",
                        )
        elif "memory" in controllers.split(","):
            root = mounts / "memory"
            for folder in (root / path.strip("/"), *_up(root, path)):
                if (folder / "memory.limit_in_bytes").is_file():
                    yield folder, 1, ""


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _up(root: Path, path: str) -> Iterator[Path]:
    """Give the folders above a cgroup, up to the root of its hierarchy."""
    folder = root / path.strip("/")
    while folder != root and root in folder.parents:
        folder = folder.parent
        yield folder
