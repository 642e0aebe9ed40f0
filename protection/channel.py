"""Messages between a host and its worker: framed, numbered, checked, and never waited for without end.

A frame is a header (magic, kind, number, two lengths, a CRC-32 of what follows and one of itself), then JSON, then raw
bytes: audio features one way, scores the other. A frame that is cut off, garbled or out of order ends the conversation:
the worker is replaced, not believed.
"""

from __future__ import annotations

import enum
import json
import mmap
import select
import socket
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_FIELDS = struct.Struct("<4sBxxxIIQI")
_CHECK = struct.Struct("<I")
_HEAD_BYTES = _FIELDS.size + _CHECK.size
_MAGIC = b"PLM1"
_META_MOST_BYTES = 1 << 20
_BODY_MOST_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
_SHARED_FROM_BYTES = 64 << 10


class Kind(enum.IntEnum):
    """What a frame is."""

    REQUEST = 1
    ANSWER = 2
    FAILURE = 3
    #: The worker lives, and is at work on the request.
    BEAT = 4


class TornMessage(Exception):
    """A frame was cut off, garbled, or is not the one that was due. The message says which."""


class Ended(Exception):
    """The other side is gone: its end of the connection is closed, between two frames."""


@dataclass(frozen=True)
class Frame:
    """One message; ``number`` is that of the request it belongs to."""

    kind: Kind
    number: int
    meta: Mapping[str, Any]
    body: bytearray | mmap.mmap


#: What a frame carries besides; of a NumPy array it is its ``data``.
Body = bytes | bytearray | memoryview

#: Waits until the socket can be read (or, with True, written); raises what ends the waiting.
Wait = Callable[[socket.socket, bool], None]


class Channel:
    """One end of a socket pair."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a connected stream socket."""
        end.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self.socket = end

    def send(self, kind: Kind, number: int, meta: Mapping[str, Any], body: Body, wait: Wait) -> None:
        """Write one frame. Raises Ended when nobody can read it any more, and what ``wait`` raises."""
        text = json.dumps(meta).encode()
        view = memoryview(body)
        # What has no bytes cannot be cast.
        data = view.cast("B") if view.nbytes else memoryview(b"")
        head = _head(kind, number, len(text), len(data), zlib.crc32(data, zlib.crc32(text))) + text
        for part in (memoryview(head), data):
            rest = part
            while rest:
                try:
                    # Without a signal: an embedder's own choice for SIGPIPE may be to die of it.
                    rest = rest[self.socket.send(rest, socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    wait(self.socket, True)
                except (BrokenPipeError, ConnectionResetError) as error:
                    raise Ended(str(error)) from error

    def receive(self, wait: Wait) -> Frame:
        """Read one frame. Raises Ended between two frames, TornMessage inside one, and what ``wait`` raises."""
        head = self._exactly(_HEAD_BYTES, wait, begins=True)
        magic, kind, number, meta_bytes, body_bytes, crc = _FIELDS.unpack_from(head)
        # The lengths are believed only once the header was checked: memory is taken for them.
        sound = magic == _MAGIC and _CHECK.unpack_from(head, _FIELDS.size)[0] == zlib.crc32(head[: _FIELDS.size])
        if not sound or meta_bytes > _META_MOST_BYTES or body_bytes > _BODY_MOST_BYTES:
            raise TornMessage(f"a message begins with {bytes(head[:8]).hex()}, lengths {meta_bytes} and {body_bytes}")
        text = self._exactly(meta_bytes, wait)
        # A large one in shared memory without a name, which no limit on a process's data counts: a device that is full,
        # and that is a process, can still be asked.
        if body_bytes < _SHARED_FROM_BYTES:
            body: bytearray | mmap.mmap = self._exactly(body_bytes, wait)
        else:
            body = mmap.mmap(-1, body_bytes)
            self._fill(body, wait)
        if zlib.crc32(body, zlib.crc32(text)) != crc:
            raise TornMessage(f"message {number} of {meta_bytes + body_bytes} bytes does not match its checksum")
        try:
            meta = json.loads(text)
            if not isinstance(meta, dict):
                raise ValueError(f"it says {type(meta).__name__}: expected an object")
            return Frame(Kind(kind), number, meta, body)
        except ValueError as error:
            raise TornMessage(f"message {number} cannot be read: {error}") from error

    def _exactly(self, size: int, wait: Wait, *, begins: bool = False) -> bytearray:
        data = bytearray(size)
        self._fill(data, wait, begins=begins)
        return data

    def _fill(self, data: bytearray | mmap.mmap, wait: Wait, *, begins: bool = False) -> None:
        size, view = len(data), memoryview(data)
        got = 0
        while got < size:
            try:
                count = self.socket.recv_into(view[got:])
            except BlockingIOError:
                wait(self.socket, False)
                continue
            except ConnectionResetError:
                count = 0
            if not count:
                if begins and not got:
                    raise Ended("the connection was closed")
                raise TornMessage(f"a message was cut off: {got} of {size} bytes came")
            got += count

    def close(self) -> None:
        """Close this end. A second call does nothing."""
        self.socket.close()


def _head(kind: int, number: int, meta_bytes: int, body_bytes: int, crc: int) -> bytes:
    fields = _FIELDS.pack(_MAGIC, kind, number, meta_bytes, body_bytes, crc)
    return fields + _CHECK.pack(zlib.crc32(fields))


class AwakeClock:
    """Seconds that this process was awake: while it is stopped or the machine sleeps, no deadline runs down."""

    #: A longer step is taken for a stop. Whoever waits looks at the clock more often.
    STEP_S = 0.25

    def __init__(self) -> None:
        """Start at zero."""
        self._last_s = time.monotonic()
        self._awake_s = 0.0

    def read_s(self) -> float:
        """Give the seconds so far."""
        now_s = time.monotonic()
        self._awake_s += min(now_s - self._last_s, 2 * self.STEP_S)
        self._last_s = now_s
        return self._awake_s


def until(end: socket.socket, write: bool, timeout_s: float) -> bool:
    """Wait until a socket can be read or written; say whether it can within ``timeout_s``."""
    poll = select.poll()
    poll.register(end, select.POLLOUT if write else select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))
