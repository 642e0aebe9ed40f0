"""Workers that are broken on purpose, one way each, in the first inference that they are asked for.

``boot("AnswersTwice")`` takes the place of ``protection.worker_process.boot``: the first worker that is started is
broken so, those after it are sound.
"""

from __future__ import annotations

import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from protection import worker
from protection.channel import Channel, Frame, Kind, until

Boot = Callable[[int, int, int], list[str]]
#: 64 KiB and a little more.
_TALK = b"all is well on board; " * 3000


def boot(*names: str) -> Boot:
    """Make a boot program that starts workers of these classes, one after the other, and sound ones from then on."""
    waiting = list(names)

    def broken(parent: int, work: int, side: int) -> list[str]:
        arguments = worker.boot(parent, work, side)
        if waiting:
            arguments[arguments.index("-c") + 1] = (
                "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from tests.meta import broken_workers; "
                f"broken_workers.run(broken_workers.{waiting.pop(0)})"
            )
        return arguments

    return broken


def boot_all(name: str) -> Boot:
    """Make a boot program that starts only workers of this class."""
    return lambda parent, work, side: boot(name)(parent, work, side)


def run(broken: type[worker._Worker]) -> None:
    """Begin as a worker of this class."""
    worker._Worker = broken  # type: ignore[misc]
    worker.main()


#: Who was not at work for so long has slept. A busy machine keeps nobody from it for as long.
SLEEP_S = 3.0


class _Broken(worker._Worker):
    """Sound but for how it answers an inference."""

    _doing = ""

    def _do(self, request: Frame) -> tuple[dict[str, Any], Any]:
        self._doing = request.meta["do"]
        return super()._do(request)

    def _send(self, channel: Channel, kind: Any, number: int, meta: dict[str, Any], body: Any) -> None:
        if channel is self._work and kind is Kind.ANSWER and self._doing == "infer":
            with self._sending:
                self._answer(channel, number, meta, body)
        else:
            super()._send(channel, kind, number, meta, body)

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        channel.send(Kind.ANSWER, number, meta, body, self._wait)

    def _write(self, channel: Channel, raw: bytes | bytearray) -> None:
        """Write bytes that are no message."""
        channel.socket.setblocking(True)
        channel.socket.sendall(raw)
        channel.socket.setblocking(False)


def _bytes_of(number: int, meta: dict[str, Any], body: Any) -> bytearray:
    """Give an answer as it goes over the wire."""
    ends = [Channel(end) for end in socket.socketpair()]

    def send() -> None:
        ends[0].send(Kind.ANSWER, number, meta, body, lambda *_: None)
        ends[0].close()

    threading.Thread(target=send).start()
    ends[1].socket.setblocking(True)
    raw = bytearray()
    while part := ends[1].socket.recv(1 << 16):
        raw += part
    ends[1].close()
    return raw


class AnswersTwice(_Broken):
    """Gives each answer twice."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        for _ in range(2):
            super()._answer(channel, number, meta, body)


class AnswersAnother(_Broken):
    """Answers a request that was never made."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        super()._answer(channel, number + 1000, meta, body)


class AnswersInPart(_Broken):
    """Leaves the last chunk of a batch out, and says so."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        chunks, *rest = meta["shape"]
        size = len(memoryview(body).cast("B")) // chunks * (chunks - 1)
        super()._answer(channel, number, {"shape": [chunks - 1, *rest]}, bytes(body)[:size])


class AnswersWithoutShape(_Broken):
    """Says nothing of what the scores are."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        super()._answer(channel, number, {}, body)


class AnswersWithARequest(_Broken):
    """Sends what only a host sends."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        channel.send(Kind.REQUEST, number, meta, body, self._wait)


class FailsWithoutReason(_Broken):
    """Reports a failure, and not which."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        channel.send(Kind.FAILURE, number, {}, b"", self._wait)


class HangsInTheMiddle(_Broken):
    """Sends half an answer, and nothing more."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        raw = _bytes_of(number, meta, body)
        self._write(channel, raw[: len(raw) // 2])
        threading.Event().wait()


class EndsInTheMiddle(_Broken):
    """Sends half an answer, and ends."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        raw = _bytes_of(number, meta, body)
        self._write(channel, raw[: len(raw) // 2])
        os._exit(3)


class HangsUp(_Broken):
    """Closes the connection, and lives on."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        channel.socket.shutdown(socket.SHUT_RDWR)
        threading.Event().wait()


class SpeaksGarbage(_Broken):
    """Sends bytes that are no message."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        self._write(channel, random.Random(7).randbytes(4096))
        super()._answer(channel, number, meta, body)


class FlipsABit(_Broken):
    """Sends scores one bit of which is wrong."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        raw = _bytes_of(number, meta, body)
        raw[-1001] ^= 0x10
        self._write(channel, raw)


class NeverAnswers(_Broken):
    """Gives signs of life, and no answer."""

    def _do(self, request: Frame) -> tuple[dict[str, Any], Any]:
        if request.meta["do"] == "infer":
            threading.Event().wait()
        return super()._do(request)


class GivesNoSign(_Broken):
    """Gives neither an answer nor a sign of life."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        threading.Event().wait()


class GarblesTheDevice(_Broken):
    """Answers questions about the device with bytes that are no message, once it has answered an inference."""

    _answered = False

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        super()._answer(channel, number, meta, body)
        self._answered = True

    def _ask(self, request: Frame) -> tuple[dict[str, Any], Any]:
        if self._answered:
            self._write(self._side, random.Random(7).randbytes(4096))
        return super()._ask(request)


class LosesTheDevice(_Broken):
    """Has an error after which every later call in its process fails, as CUDA says it: there is no such device here."""

    def _do(self, request: Frame) -> tuple[dict[str, Any], Any]:
        if request.meta["do"] == "infer":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super()._do(request)


class _WakesUpWithout(_Broken):
    """Works until it was stopped and went on, as in a laptop that slept. From then on each inference has CUDA's error.

    There is no such device here: only the text is CUDA's, and what is shown is what the host makes of it.
    """

    text = ""
    _slept = False
    _awake_s = math.inf

    def _beat(self) -> None:
        threading.Thread(target=self._notice_sleep, daemon=True).start()
        super()._beat()

    def _notice_sleep(self) -> None:
        while True:
            self._has_slept()
            time.sleep(0.01)

    def _has_slept(self) -> bool:
        now_s = time.monotonic()
        self._slept = self._slept or now_s - self._awake_s > SLEEP_S
        self._awake_s = now_s
        return self._slept

    def _do(self, request: Frame) -> tuple[dict[str, Any], Any]:
        if request.meta["do"] == "infer" and self._has_slept():
            raise RuntimeError(self.text)
        return super()._do(request)


class WakesUpToUnknownErrors(_WakesUpWithout):
    """999, cudaErrorUnknown."""

    text = "CUDA error: unknown error"


class WakesUpToLaunchFailures(_WakesUpWithout):
    """719, cudaErrorLaunchFailure."""

    text = "CUDA error: unspecified launch failure"


class StartsWithoutMemory(_Broken):
    """Has no memory for its libraries."""

    def _do(self, request: Frame) -> tuple[dict[str, Any], Any]:
        if request.meta["do"] == "start":
            raise MemoryError
        return super()._do(request)


class StopsListening(_Broken):
    """Has no memory to read the next question about its device, once it has answered an inference."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        super()._answer(channel, number, meta, body)
        self._tired = True

    _tired = False

    def _wait(self, end: socket.socket, write: bool) -> None:
        while end is self._side.socket and not write and not self._tired:
            if until(end, write, 0.05):
                return
        if end is self._side.socket and self._tired:
            raise MemoryError
        super()._wait(end, write)


class TalksALot(_Broken):
    """Writes 4 MiB to its output and to its standard error with every answer."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        for descriptor in (1, 2):
            for _ in range(64):
                os.write(descriptor, _TALK)
        super()._answer(channel, number, meta, body)


class TalksAndDies(_Broken):
    """Writes 4 MiB to its standard error, says why it ends, and ends by a signal."""

    def _answer(self, channel: Channel, number: int, meta: dict[str, Any], body: Any) -> None:
        for _ in range(64):
            os.write(2, _TALK)
        os.write(2, b"the mast went overboard\n")
        os.abort()


class LosesMemory(worker._Worker):
    """Loses 20 kB with each chunk that it answers."""

    def __init__(self, work: Channel, side: Channel) -> None:
        super().__init__(work, side)
        self.lost: list[bytearray] = []

    def _do(self, request: Frame) -> tuple[dict[str, Any], Any]:
        if request.meta["do"] == "infer":
            self.lost += [bytearray(b"x") * 20_000 for _ in range(request.meta["shape"][0])]
        return super()._do(request)
