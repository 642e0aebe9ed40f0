"""Why a disk takes no more. SQLite says "disk I/O error" of a read-only file system, a limit and a quota alike."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sqlite3
from pathlib import Path

#: What SQLite writes in one piece at most: a page and its header in the log.
_PIECE_BYTES = 4096 + 64
#: Kept free for answers, besides what the answers of the accepted audio take.
_RESERVE_BYTES = 256 << 10
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


def lacks_room(folder: Path, data_bytes: int, unanswered_bytes: int) -> int | None:
    """Give the bytes that are free where they are too few for this much audio and for the answers; None for enough."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        # Writing says better what is wrong.
        return None
    # Some file systems do not say how large they are.
    if disk.f_blocks == 0:
        return None
    free_bytes = disk.f_frsize * (disk.f_bfree if os.geteuid() == 0 else disk.f_bavail)
    # Audio is written twice: to the log, and later to the file. Answers take about a third of their audio.
    needed_bytes = 2 * data_bytes + unanswered_bytes // 3 + _RESERVE_BYTES
    return free_bytes if free_bytes < needed_bytes else None


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
    files = (database.with_name(database.name + suffix) for suffix in ("", "-wal", "-shm"))
    return soft != resource.RLIM_INFINITY and any(
        file.exists() and file.stat().st_size + _PIECE_BYTES > soft for file in files
    )
