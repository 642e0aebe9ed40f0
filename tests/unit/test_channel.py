"""A message arrives as it was sent, or its damage is noticed, and nobody waits for it without end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.host import data_bytes
from protection import channel
from protection.channel import AwakeClock, Channel, Ended, Kind, TornMessage, until

ROOT = Path(__file__).resolve().parents[2]
META = {"do": "infer", "shape": [2, 150, 80]}


class GivenUp(Exception):
    """A wait that was ended from outside."""


def _patient(end: socket.socket, write: bool) -> None:
    assert until(end, write, 60.0), f"not within 60 s: {'room to write' if write else 'something to read'}"


def _impatient(end: socket.socket, write: bool) -> None:
    if not until(end, write, 0.05):
        raise GivenUp("writing" if write else "reading")


@contextlib.contextmanager
def _pair() -> Iterator[tuple[Channel, Channel]]:
    ends = [Channel(end) for end in socket.socketpair()]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    with _pair() as ends:
        yield ends


def _bytes_of(meta: Any, body: Any, kind: Kind = Kind.REQUEST, number: int = 7) -> bytes:
    """Give a small frame as it goes over the wire."""
    with _pair() as (sender, receiver):
        sender.send(kind, number, meta, body, _patient)
        return receiver.socket.recv(1 << 16)


def _received(raw: bytes, wait: Callable[[socket.socket, bool], None] = _impatient) -> channel.Frame:
    """Receive what somebody wrote before the connection was closed."""
    with _pair() as (sender, receiver):
        sender.socket.send(raw)
        sender.close()
        return receiver.receive(wait)


# What arrives.


@pytest.mark.parametrize(
    ("meta", "body"),
    [
        ({}, b""),
        (META, b""),
        ({}, b"\x00"),
        ({"text": "Ärger, 語, \x00 and \ud800", "nested": {"list": [1, 2.5, None, True]}}, b"PLM1PLM1"),
        (META, bytes(range(256)) * 40),
    ],
    ids=["nothing", "meta", "body", "text", "both"],
)
def test_a_message_arrives_as_it_was_sent(pair: tuple[Channel, Channel], meta: dict[str, Any], body: bytes) -> None:
    pair[0].send(Kind.ANSWER, 4_000_000_000, meta, body, _patient)
    frame = pair[1].receive(_patient)
    assert (frame.kind, frame.number) == (Kind.ANSWER, 4_000_000_000), f"it is {frame.kind!r} {frame.number}"
    assert frame.meta == meta and bytes(frame.body) == body, f"{frame.meta} and {len(frame.body)} bytes arrived"


@pytest.mark.parametrize("shape", [(4, 150, 80), (1,), (0, 150, 80)], ids=str)
def test_an_array_arrives_bit_for_bit_whatever_its_shape(pair: tuple[Channel, Channel], shape: tuple[int, ...]) -> None:
    sent = np.random.RandomState(3).standard_normal(shape).astype(np.float32)
    pair[0].send(Kind.REQUEST, 1, {"shape": shape}, sent.data, _patient)
    frame = pair[1].receive(_patient)
    arrived = np.frombuffer(frame.body, np.float32).reshape(frame.meta["shape"])
    assert arrived.tobytes() == sent.tobytes(), f"of shape {shape}, {arrived.shape} arrived, and differs"


def test_messages_keep_their_order(pair: tuple[Channel, Channel]) -> None:
    kinds = [Kind.BEAT, Kind.ANSWER, Kind.BEAT, Kind.FAILURE]
    for number, kind in enumerate(kinds):
        pair[0].send(kind, number, {}, bytes(number), _patient)
    arrived = [pair[1].receive(_patient) for _ in kinds]
    assert [frame.kind for frame in arrived] == kinds, f"arrived: {[frame.kind for frame in arrived]}"
    assert [frame.number for frame in arrived] == [0, 1, 2, 3], f"arrived: {[frame.number for frame in arrived]}"


def test_a_message_larger_than_the_buffers_arrives_while_it_is_read(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    sender.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = np.random.RandomState(5).bytes(3 << 20)
    waits: list[bool] = []

    def wait(end: socket.socket, write: bool) -> None:
        waits.append(write)
        _patient(end, write)

    with ThreadPoolExecutor(1) as other:
        sending = other.submit(sender.send, Kind.ANSWER, 1, META, body, wait)
        frame = receiver.receive(_patient)
        sending.result(15.0)
    assert bytes(frame.body) == body and frame.meta == META, f"{len(frame.body)} bytes arrived, and differ"
    assert waits and all(waits), f"it waited for room {len(waits)} times: the buffer was not small"


def test_a_large_body_is_no_data_of_the_process_and_is_given_back(pair: tuple[Channel, Channel]) -> None:
    # A device that is this process, and full, has to take the next request.
    sent = np.random.RandomState(3).standard_normal(8 << 20).astype(np.float32)
    with ThreadPoolExecutor(1) as other:
        # The thread's stack is there before anything is measured.
        other.submit(int).result()
        before = data_bytes()
        sending = other.submit(pair[0].send, Kind.REQUEST, 1, META, sent.data, _patient)
        frame = pair[1].receive(_patient)
        sending.result(15.0)
        grown = data_bytes() - before
    same = np.array_equal(np.frombuffer(frame.body, np.float32), sent)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    del frame
    returned = (pages - int(Path("/proc/self/statm").read_text().split()[0])) * 4096
    assert same, "another body arrived"
    assert grown < 4 << 20, f"for a body of {sent.nbytes} bytes the process's data grew by {grown}"
    assert returned >= sent.nbytes, f"of {sent.nbytes} bytes {returned} were given back with the message"


@pytest.mark.parametrize("size", [(64 << 10) - 1, 64 << 10, (64 << 10) + 1])
def test_a_body_about_as_large_as_what_is_shared_arrives(pair: tuple[Channel, Channel], size: int) -> None:
    body = np.random.RandomState(5).bytes(size)
    pair[0].send(Kind.REQUEST, 1, {}, body, _patient)
    frame = pair[1].receive(_patient)
    assert len(frame.body) == size and bytes(frame.body) == body, f"of {size} bytes {len(frame.body)} arrived"


# What does not.


def test_a_large_body_with_a_flipped_bit_is_torn(pair: tuple[Channel, Channel]) -> None:
    body = bytes(200 << 10)
    raw = bytearray(channel._head(Kind.ANSWER, 1, 2, len(body), zlib.crc32(body, zlib.crc32(b"{}"))) + b"{}" + body)
    raw[-1] ^= 1
    with ThreadPoolExecutor(1) as other:
        pair[0].socket.setblocking(True)
        sending = other.submit(pair[0].socket.sendall, raw)
        with pytest.raises(TornMessage, match="message 1 of 204802 bytes does not match its checksum"):
            pair[1].receive(_patient)
        sending.result(15.0)


def test_no_flipped_bit_goes_unnoticed() -> None:
    raw = _bytes_of({"shape": [1]}, b"\x00\xff\x55\xaa", Kind.ANSWER)
    passed = []
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            frame = _received(bytes(damaged))
        except TornMessage as error:
            # That the connection was closed behind it must not be what gave it away.
            if "cut off" in str(error):
                passed.append((bit, str(error)))
        else:
            passed.append((bit, f"{frame.kind!r} {frame.number}"))
    assert not passed, f"of {8 * len(raw)} bits these were taken for good: {passed}"


def test_a_message_that_is_cut_off_anywhere_is_torn() -> None:
    raw = _bytes_of(META, b"\x01" * 20)
    for size in range(1, len(raw)):
        with pytest.raises(TornMessage, match=r"a message was cut off: \d+ of \d+ bytes came"):
            _received(raw[:size])
    assert _received(raw).number == 7, "the whole message does not arrive"


def test_the_end_between_two_messages_is_no_damage(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    sender.send(Kind.BEAT, 1, {}, b"", _patient)
    sender.close()
    assert receiver.receive(_patient).kind is Kind.BEAT, "what was sent before the end is lost"
    with pytest.raises(Ended, match="the connection was closed"):
        receiver.receive(_patient)


def test_what_is_no_message_is_torn() -> None:
    for raw in (b"Traceback (most recent call last): ...\n" * 3, bytes(200), b"\xff" * 200):
        with pytest.raises(TornMessage, match="a message begins with"):
            _received(raw)


@pytest.mark.parametrize(("text", "body"), [(1 << 21, 0), (0, 1 << 31), (0, 1 << 63)], ids=["text", "body", "more"])
def test_absurd_lengths_take_no_memory(text: int, body: int) -> None:
    before = max(map(int, Path("/proc/self/statm").read_text().split()[:1]))
    with pytest.raises(TornMessage, match=f"lengths {text} and {body}"):
        _received(channel._head(Kind.ANSWER, 1, text, body, 0) + bytes(100))
    grown = int(Path("/proc/self/statm").read_text().split()[0]) - before
    assert grown < (1 << 20) // 4096 * 100, f"the address space grew by {grown} pages"


@pytest.mark.parametrize("meta", [[], 7, None, "do"], ids=repr)
def test_a_message_that_says_nothing_by_name_is_torn(meta: Any) -> None:
    raw = _bytes_of(meta, b"")
    with pytest.raises(TornMessage, match="message 7 cannot be read"):
        _received(raw)


def test_a_message_of_no_known_kind_is_torn() -> None:
    raw = _bytes_of({}, b"", 99)  # type: ignore[arg-type]
    with pytest.raises(TornMessage, match="message 7 cannot be read: 99 is not a valid Kind"):
        _received(raw)


# Who waits, and for how long.


def test_whoever_waits_says_when_it_is_enough(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    with pytest.raises(GivenUp, match="reading"):
        receiver.receive(_impatient)
    with pytest.raises(GivenUp, match="writing"):
        sender.send(Kind.REQUEST, 1, {}, bytes(64 << 20), _impatient)


def test_nobody_is_written_to_who_is_gone(pair: tuple[Channel, Channel]) -> None:
    pair[1].close()
    with pytest.raises(Ended):
        pair[0].send(Kind.REQUEST, 1, {}, b"", _patient)


def test_writing_to_who_is_gone_raises_no_signal() -> None:
    # As a host does that wants to end quietly when its output is closed.
    program = """
import signal, socket
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
from protection.channel import Channel, Ended, Kind, until
a, b = socket.socketpair()
b.close()
try:
    Channel(a).send(Kind.REQUEST, 1, {}, b"", until)
except Ended:
    print("ended")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ended\n"), f"status {done.returncode}: {done.stdout} {done.stderr}"


def test_closing_twice_is_closing_once(pair: tuple[Channel, Channel]) -> None:
    pair[0].close()
    pair[0].close()
    with pytest.raises(Ended):
        pair[1].receive(_patient)


def test_until_says_whether_it_can_be_read_or_written(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    assert until(sender.socket, True, 0.0), "an empty buffer cannot be written to"
    assert not until(receiver.socket, False, 0.01), "nothing was sent, and it can be read"
    sender.send(Kind.BEAT, 1, {}, b"", _patient)
    assert until(receiver.socket, False, 15.0), "something was sent, and it cannot be read"


# The clock.


def test_the_clock_runs_while_the_process_does() -> None:
    clock = AwakeClock()
    readings = []
    for _ in range(3):
        threading.Event().wait(0.1)
        readings.append(clock.read_s())
    assert readings == sorted(readings) and readings[0] >= 0.1, f"three times 0.1 s: {readings}"


def test_the_clock_stands_while_the_process_is_stopped() -> None:
    program = """
import json, select, sys, time
from protection.channel import AwakeClock
clock, began_s = AwakeClock(), time.monotonic()
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.05)[0]:
    clock.read_s()
print(json.dumps([clock.read_s(), time.monotonic() - began_s]))
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "ready\n", "the child did not start"
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        stopped_at_s = time.monotonic()
        threading.Event().wait(1.5)
        stopped_s = time.monotonic() - stopped_at_s
        os.kill(child.pid, signal.SIGCONT)
        child.stdin.write("enough\n")
        child.stdin.flush()
        assert select.select([child.stdout], [], [], 15.0)[0], "the child did not answer"
        awake_s, passed_s = json.loads(child.stdout.readline())
    slept_s = passed_s - awake_s
    assert passed_s >= stopped_s >= 1.5, f"the child saw {passed_s:.2f} s pass, {stopped_s:.2f} s of them stopped"
    assert slept_s >= stopped_s - 2 * AwakeClock.STEP_S, f"of {stopped_s:.2f} s stopped {slept_s:.2f} s are not counted"
    assert awake_s > 0, "the clock did not run at all"
