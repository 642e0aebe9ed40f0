"""Why a disk takes no more. SQLite says "disk I/O error" of a read-only file system, a limit and a quota alike."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sqlite3
from pathlib import Path

PAGE_BYTES = 4096
#: Pages of the log after which it is copied to the file.
LOG_PAGES = 128
#: With so much free the room need not be counted.
PLENTY_BYTES = 64 << 20
#: What SQLite writes in one piece at most: a page and its header in the log.
_PIECE_BYTES = PAGE_BYTES + 64
_FULL = (errno.ENOSPC, errno.EDQUOT)
#: There is no room, of one kind or another: the same call succeeds once there is.
NO_ROOM = (*_FULL, errno.EFBIG)


def cause(database: Path, error: sqlite3.Error) -> int:
    """Find the errno behind an error of SQLite's, by trying to write beside the file; 0 where it is none of ours."""
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if kind == sqlite3.SQLITE_FULL:
        return errno.ENOSPC
    if kind not in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return 0
    found = _try_to_write(database.with_name("spool.trial"))
    return errno.EFBIG if not found and _reaches_limit(database) else found


def advice(number: int) -> str:
    """Say what to do about an errno, after what it is."""
    if number in _FULL:
        return "free some disk"
    if number == errno.EFBIG:
        soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        return f"the file-size limit of this process (ulimit -f) is {soft} bytes: raise it"
    if number == errno.EROFS:
        return "make it writable again (check the disk for errors first), or record to another folder"
    return "check the disk and the folder's permissions"


def free_bytes(folder: Path) -> int | None:
    """Give what is free on the disk of a folder, for this user; None where the file system does not say."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        # Writing says better what is wrong.
        return None
    return disk.f_frsize * (disk.f_bfree if os.geteuid() == 0 else disk.f_bavail) if disk.f_blocks else None


def needed_bytes(database: Path, pages: int, unused_pages: int, data_bytes: int, unanswered_bytes: int) -> int:
    """Say how many bytes have to be free on the disk for this much audio, and for the answers to all that is accepted.

    The file has ``pages`` pages once the log is copied to it, ``unused_pages`` of them for what comes.
    """
    log_growth = 2 * LOG_PAGES * PAGE_BYTES + data_bytes - _size_bytes(database, "-wal")
    copy_growth = pages * PAGE_BYTES - _size_bytes(database)
    # Answers take less than a third of their audio.
    file_growth = data_bytes + (unanswered_bytes + data_bytes) // 3 - unused_pages * PAGE_BYTES
    return max(0, log_growth) + max(0, copy_growth) + max(0, file_growth)


def _size_bytes(database: Path, suffix: str = "") -> int:
    try:
        return database.with_name(database.name + suffix).stat().st_size
    except OSError:
        return 0


def _try_to_write(path: Path) -> int:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return error.errno or 0
    try:
        if os.write(fd, bytes(_PIECE_BYTES)) < _PIECE_BYTES:
            # A short write is the answer of a disk, or of a limit, that has room for some of it.
            os.write(fd, bytes(_PIECE_BYTES))
        os.fsync(fd)
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            path.unlink()
    return 0


def _reaches_limit(database: Path) -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest_bytes = max(_size_bytes(database, suffix) for suffix in ("", "-wal", "-shm"))
    return soft != resource.RLIM_INFINITY and largest_bytes + _PIECE_BYTES > soft
