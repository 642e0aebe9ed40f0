"""Disks that fail under a subject: a small one that fills up, one that turns read-only, and a limit on file sizes.

A disk is mounted in a mount namespace of the hosted process alone. No other process sees it, and the kernel unmounts
it when the last process that uses it has ended, however that came about. From outside it is reached through /proc.
Nothing but the standard library is imported here: a process gets its disk before it has a second thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x0002_0000, 0x1000_0000
_NOSUID, _NODEV, _RECURSIVE, _PRIVATE = 0x2, 0x4, 0x4000, 0x4_0000
_BALLAST, _PROBE = "ballast", "probe"
#: Where a user's PATH often does not look.
_TOOLS = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class StorageUnavailable(Exception):
    """A disk of this kind cannot be had here. The message says why: the test is not run, for this reason."""


@dataclass(frozen=True)
class Disk:
    """A disk for one hosted process, mounted at ``folder``.

    A tmpfs of ``size_bytes`` bytes: root may have one, and others where the kernel lets users have namespaces of their
    own. Or the ext4 file system in the file ``image``, which root alone may mount.
    """

    folder: str
    size_bytes: int
    image: str = ""

    def mount(self) -> None:
        """Mount it for this process, and those that it starts, alone. Raises StorageUnavailable.

        To be called while the process has one thread.
        """
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            _leave_namespace(may_be_root_of_its_own=not self.image)
            # The new namespace is a copy: without this, what is mounted here would be mounted for all.
            _mount("none", "/", "", _RECURSIVE | _PRIVATE, "")
            if self.image:
                # On an error ext4 goes read-only by itself: what it does on the disk of many a machine.
                _run("mount", "-t", "ext4", "-o", "loop,nosuid,nodev,errors=remount-ro", self.image, self.folder)
            else:
                _mount("plimsoll", self.folder, "tmpfs", _NOSUID | _NODEV, f"size={self.size_bytes},mode=0700")
        except (OSError, AttributeError) as error:
            raise StorageUnavailable(f"no disk can be mounted for one process here: {error}") from error


class DiskOutside:
    """The disk of a hosted process, from outside. What is on it can be read until this is closed."""

    def __init__(self, disk: Disk, process_id: int) -> None:
        """Open it while the process is there."""
        self._disk = disk
        self._fd = os.open(f"/proc/{process_id}/root{disk.folder}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if os.fstat(self._fd).st_dev == Path(disk.folder).parent.stat().st_dev:
            self.close()
            raise RuntimeError(f"nothing is mounted at {disk.folder}, and the machine's own disk is never touched")

    def fill(self) -> int:
        """Fill it to the last byte; give the bytes that this took."""
        filled_bytes = 0
        fd = os.open(_BALLAST, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            # A write that finds too little room is a short one, so that the last page is filled, too.
            while True:
                filled_bytes += os.write(fd, bytes(1 << 20))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(fd)
        return filled_bytes

    def make_room(self) -> None:
        """Take away what filled it."""
        os.unlink(_BALLAST, dir_fd=self._fd)

    def make_read_only(self) -> None:
        """Have ext4 find an error, and remount itself read-only: for good, until it is repaired.

        The kernel's log tells of the error. Raises StorageUnavailable.
        """
        device = os.fstat(self._fd).st_dev
        block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        try:
            # Never the file system of the machine, whatever is mounted where.
            if (block / "loop" / "backing_file").read_text().strip() != self._disk.image:
                raise RuntimeError(f"{block.name} is not the loop device of {self._disk.image}")
            (Path("/sys/fs/ext4") / block.name / "trigger_fs_error").write_text("1")
        except OSError as error:
            raise StorageUnavailable(f"ext4 cannot be made to find an error here ({error})") from error

    def is_read_only(self) -> bool:
        """Whether a write is refused for that reason: it is tried."""
        try:
            os.close(os.open(_PROBE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._fd))
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            return True
        os.unlink(_PROBE, dir_fd=self._fd)
        return False

    def copy(self, name: str, to: Path) -> None:
        """Copy a folder of the disk to where there is room."""
        shutil.copytree(f"/proc/self/fd/{self._fd}/{name}", to)

    def close(self) -> None:
        """Let go of the disk."""
        os.close(self._fd)

    def __enter__(self) -> DiskOutside:
        """Nothing to do: it is open already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def make_image(path: Path, size_bytes: int) -> None:
    """Make an ext4 file system in a file. Raises StorageUnavailable."""
    if os.geteuid() != 0:
        raise StorageUnavailable("only root may mount the ext4 image that turns read-only")
    with path.open("wb") as file:
        file.truncate(size_bytes)
    try:
        _run("mkfs.ext4", "-q", "-F", str(path))
    except OSError as error:
        raise StorageUnavailable(f"no ext4 file system can be made here ({error})") from error


def is_mounted(image: Path) -> bool:
    """Whether a loop device has the image still: it goes a moment after the last process that used it."""
    for each in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if each.read_text().strip() == str(image):
                return True
    return False


def repair(image: Path) -> None:
    """Do what is done after an error of the file system: ``e2fsck``. Raises OSError for one that cannot be repaired."""
    # 1: errors were corrected.
    _run("e2fsck", "-p", str(image), accepted=(0, 1))


def limit_file_size(process_ids: Iterable[int], limit_bytes: int | None) -> list[int]:
    """Set the soft RLIMIT_FSIZE of running processes of ours (None: as much as the hard one allows).

    Give the limits that they have then, as the kernel tells them: of those that still run.
    """
    limits = []
    for process_id in process_ids:
        # A worker may have been replaced meanwhile.
        with contextlib.suppress(ProcessLookupError):
            _, hard = resource.prlimit(process_id, resource.RLIMIT_FSIZE)
            soft = hard if limit_bytes is None else limit_bytes
            resource.prlimit(process_id, resource.RLIMIT_FSIZE, (soft, hard))
            limits.append(resource.prlimit(process_id, resource.RLIMIT_FSIZE)[0])
    return limits


def _leave_namespace(may_be_root_of_its_own: bool) -> None:
    """Go into a mount namespace of this process's own, as the user that it is."""
    try:
        _call("unshare", _NEW_MOUNTS)
    except PermissionError:
        if not may_be_root_of_its_own:
            raise
        user, group = os.geteuid(), os.getegid()
        try:
            _call("unshare", _NEW_MOUNTS | _NEW_USER)
        except OSError as error:
            raise OSError(f"this needs root, or a kernel that lets users have namespaces: {error}") from error
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _mount(source: str, folder: str, kind: str, flags: int, options: str) -> None:
    _call("mount", source.encode(), folder.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def _call(function: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _run(tool: str, *arguments: str, accepted: tuple[int, ...] = (0,)) -> None:
    path = shutil.which(tool, path=_TOOLS)
    if path is None:
        raise OSError(f"there is no {tool}")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode not in accepted:
        raise OSError(f"{tool} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
