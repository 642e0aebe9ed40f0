"""Devices that are never in a user's process: ``torch-cpu`` limits a process, and CUDA errors may end one.

In a process that was not started to have the device, such a backend is a handle. The device is in a subject's worker,
or, for as long as there is none, in a child that is started when it is first asked for something:

    python -c … CONNECTION_DESCRIPTOR MEMORY_DESCRIPTOR PARENT_PROCESS_ID

The child rebuilds the backend and does what it is asked, one thing after another. It ends with its parent.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from backends._device import DeviceBackend, check_features
from backends.contract import Allocation, BackendError, Device, FloatArray, Health, MemoryReading, Model, Share
from backends.errors import ErrorKind, RuntimeFailure, classify, diagnose
from backends.faults import limits
from backends.host import total_bytes
from backends.model import N_MELS
from backends.process import NO_ACCELERATOR, begin_as_child, python_arguments
from backends.threads import OneThread

_END_S = 1.0
#: A child that has not answered for so long hangs, and is killed. A cold start of torch for CUDA takes some seconds.
_PATIENCE_S = 60.0


class KeptDevice(DeviceBackend):
    """A backend that has its device in this process only where that was started for it (``rebuild``)."""

    def __init__(self, device: str | None = None) -> None:
        """Make a handle; nothing is started yet."""
        super().__init__(device)
        self._is_here = False
        self._keeper: Keeper | None = None
        self._closed = False

    def _has_the_device(self) -> None:
        limits.require_expendable()
        super()._has_the_device()
        self._is_here = True

    def _total_bytes(self) -> int:
        """Give the size of the memory that the device is in, without touching the device."""
        return total_bytes()

    def _device_elsewhere(self) -> Device | None:
        if self._elsewhere is not None or self._is_here:
            return self._elsewhere
        keeper = self._keeper
        return keeper if keeper is not None and keeper.alive else None

    def _device_to_use(self) -> Device | None:
        if self._elsewhere is not None or self._is_here:
            return self._elsewhere
        return self._kept()

    def _is_in_this_process(self) -> bool:
        return self._is_here

    def _kept(self) -> Keeper:
        with self._lock:
            if self._closed:
                raise BackendError(f"the backend {self.name} was closed: make another")
            if self._keeper is not None and not self._keeper.alive:
                self._end_keeper()
            if self._keeper is None:
                self._keeper = Keeper(self.share())
            return self._keeper

    def _end_keeper(self) -> None:
        with self._lock:
            keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.close()

    def hand_over(self, device: Device) -> None:
        """Move what is held to where the device is now; a child of our own is not needed any more."""
        super().hand_over(device)
        if self._keeper is not None and not self._keeper.models:
            self._end_keeper()

    def memory(self) -> MemoryReading:
        """Read the device's memory, where the device is; while no process has it, nothing of it is used."""
        if not self._is_here and self._device_elsewhere() is None:
            source = "no process has the device now"
            return MemoryReading(0, 0, self._limit_bytes, self._total_bytes(), "process", True, source)
        return super().memory()

    def release_cached(self) -> int:
        """Give cached memory back where the device is; where no process has it, nothing is cached."""
        return super().release_cached() if self._is_here or self._device_elsewhere() is not None else 0

    def load(self, path: Path) -> Model:
        """Load a model in this process where it has the device, else in a child of its own."""
        return super().load(path) if self._is_here else self._kept().load(path)

    def _limit_here(self, limit_bytes: int) -> None:
        if self._is_here:
            super()._limit_here(limit_bytes)
            return
        # Each process that becomes the device proves it, before anything is loaded there.
        with self._lock:
            if self._keeper is not None and self._keeper.alive:
                self._keeper.ask("limit_memory", limit_bytes)
            self._limit_bytes = limit_bytes

    def close(self) -> None:
        """Disarm every fault, and end a child of our own."""
        super().close()
        self._closed = True
        self._end_keeper()


class Keeper:
    """The child, from its parent's side. Any thread may ask; they wait for each other."""

    def __init__(self, share: Share) -> None:
        """Start it; it makes the backend that was shared. Raises RuntimeFailure, or what making it raises."""
        # The kernel ends a child with the thread that started it. So it is none that ends before this object.
        self._launcher = OneThread("plimsoll-keeper")
        self._lock, self._sharing = threading.Lock(), threading.Lock()
        # Features travel in shared memory, which no limit on the child's data counts: a full device can still be asked.
        self._shared = os.memfd_create("plimsoll-features")
        try:
            self._connection, self._process = self._launcher.do(lambda: _launch(self._shared, share))
        except BaseException:
            self._launcher.close()
            os.close(self._shared)
            raise
        self.models = 0
        self._spoiled = False
        #: Numbers of what it has that nobody refers to any more.
        self._unwanted: deque[int] = deque()
        try:
            self.ask("start", dict(share.data))
        except BaseException:
            self.close()
            raise

    @property
    def process_id(self) -> int:
        """Its process id."""
        return int(self._process.pid)

    @property
    def alive(self) -> bool:
        """Whether it runs, and can use the device."""
        return self._process.poll() is None and not self._spoiled

    def ask(self, do: str, *arguments: Any) -> Any:
        """Have it do something and give the answer. Raises what failed there, or RuntimeFailure when it is gone."""
        with self._lock:
            try:
                unwanted = [self._unwanted.popleft() for _ in range(len(self._unwanted))]
                self._connection.send((do, arguments, unwanted))
                if not self._connection.poll(_PATIENCE_S):
                    self._process.kill()
                failed, answer = self._connection.recv()
            except (EOFError, OSError):
                self._process.wait()
                raise RuntimeFailure(
                    ErrorKind.PROCESS_LOST,
                    f"the process {self.process_id} that had the device ended with status {self._process.returncode}, "
                    f"asked to {do}",
                ) from None
            except BaseException:
                # Ctrl-C: what would come next is the answer to this.
                self._spoiled = True
                self._process.kill()
                raise
        if not failed:
            return answer
        failure = RuntimeFailure(*answer) if isinstance(answer, tuple) else answer
        # After a sticky error every later call in that process fails: another takes its place.
        self._spoiled |= classify(failure) in (ErrorKind.DEVICE_STICKY, ErrorKind.DEVICE_LOST)
        raise failure

    def forget(self, number: int) -> None:
        """Have it give something back when it is asked next: for the garbage collector, which must not wait."""
        self._unwanted.append(number)

    def run(self, number: int, features: FloatArray) -> FloatArray:
        """Run a model there."""
        with self._sharing:
            os.pwrite(self._shared, np.ascontiguousarray(features).data, 0)
            scores: FloatArray = self.ask("run", number, features.shape)
        return scores

    # The device.

    def memory(self) -> MemoryReading:
        """Read its memory."""
        reading: MemoryReading = self.ask("memory")
        return reading

    def allocate(self, size_bytes: int) -> Allocation:
        """Take memory there."""
        return _Kept(self, self.ask("allocate", size_bytes), size_bytes)

    def release_cached(self) -> int:
        """Give cached memory back there."""
        return int(self.ask("release_cached"))

    def collect(self) -> int:
        """Collect unreachable objects there."""
        return int(self.ask("collect"))

    def healthy(self) -> Health:
        """Probe it there."""
        try:
            health: Health = self.ask("healthy")
        except RuntimeFailure as error:
            return Health(False, str(error), float("inf"), 0.0)
        return health

    def load(self, path: Path) -> Model:
        """Load a model there."""
        return _KeptModel(self, *self.ask("load", path))

    def close(self) -> None:
        """End it, in order if it answers at once. A second call does nothing."""
        self._connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._launcher.close()
        if self._shared >= 0:
            os.close(self._shared)
            self._shared = -1


class _Kept(Allocation):
    """Memory that the child holds."""

    def __init__(self, keeper: Keeper, number: int, size_bytes: int) -> None:
        self._keeper: Keeper | None = keeper
        self._number = number
        self.size_bytes = size_bytes

    def free(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None and keeper.alive:
            keeper.ask("free", self._number)

    def __del__(self) -> None:
        if self._keeper is not None:
            self._keeper.forget(self._number)


class _KeptModel(Model):
    """A model that the child loaded."""

    def __init__(self, keeper: Keeper, number: int, said: Mapping[str, Any]) -> None:
        self._keeper: Keeper | None = keeper
        self._number = number
        self.device, self.vocabulary = said["device"], said["vocabulary"]
        self.window_frames, self.chunk_frames = said["window_frames"], said["chunk_frames"]
        keeper.models += 1

    def run(self, features: FloatArray) -> FloatArray:
        keeper = self._asked()
        check_features(features, self.window_frames, N_MELS)
        return keeper.run(self._number, features)

    def working_set_bytes(self, batch: int) -> int:
        return int(self._asked().ask("working_set_bytes", self._number, batch))

    def _asked(self) -> Keeper:
        if self._keeper is None:
            raise BackendError("the model was unloaded: load it again")
        return self._keeper

    def close(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.models -= 1
            if keeper.alive:
                keeper.ask("close", self._number)

    def __del__(self) -> None:
        if self._keeper is not None:
            self._keeper.models -= 1
            self._keeper.forget(self._number)


def _launch(shared: int, share: Share) -> tuple[Connection, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, *python_arguments("backends._keeper", theirs.fileno(), shared, os.getpid())],
            stdin=subprocess.DEVNULL,
            # Its parent's standard output has one reader, and it is not for this.
            stdout=2,
            pass_fds=(theirs.fileno(), shared, *share.descriptors),
            env={**os.environ, **(NO_ACCELERATOR if share.blind else {})},
            # Ctrl-C is the parent's to handle.
            start_new_session=True,
        )
    return Connection(ours.detach()), process


def main() -> None:
    """Do what the parent asks, until it is gone."""
    descriptor, shared, parent = (int(word) for word in sys.argv[2:5])
    begin_as_child(parent)
    limits.declare_expendable()
    connection = Connection(descriptor)
    kept = _Keeping(shared)
    while True:
        try:
            do, arguments, unwanted = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            kept.forget(unwanted)
            answer = False, getattr(kept, do)(*arguments)
        except BackendError as error:
            answer = True, type(error)(*error.args)
        except Exception as error:
            # Diagnosed here, where its type is known; outside this block nothing of it is kept.
            found = diagnose(error)
            answer = True, (found.kind, f"{type(error).__name__}: {error}", found.shortage)
        del arguments
        try:
            connection.send(answer)
        except OSError:
            os._exit(0)


class _Keeping:
    """What the child can be asked, by name."""

    def __init__(self, shared: int) -> None:
        self._shared = shared
        self._numbers = itertools.count(1)
        self._held: dict[int, Allocation] = {}
        self._models: dict[int, Model] = {}

    def start(self, data: Mapping[str, Any]) -> None:
        import backends

        self._backend = backends.rebuild(data)
        for name in ("memory", "release_cached", "collect", "healthy", "limit_memory"):
            setattr(self, name, getattr(self._backend, name))

    def allocate(self, size_bytes: int) -> int:
        held = self._backend.allocate(size_bytes)
        self._held[number := next(self._numbers)] = held
        return number

    def free(self, number: int) -> None:
        self._held.pop(number).free()

    def forget(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if (held := self._held.pop(number, None)) is not None:
                held.free()
            elif (model := self._models.pop(number, None)) is not None:
                model.close()

    def load(self, path: Path) -> tuple[int, dict[str, Any]]:
        model = self._backend.load(path)
        self._models[number := next(self._numbers)] = model
        names = ("device", "vocabulary", "window_frames", "chunk_frames")
        return number, {name: getattr(model, name) for name in names}

    def run(self, number: int, shape: tuple[int, ...]) -> FloatArray:
        # Given back with the last reference to it.
        shared = mmap.mmap(self._shared, 4 * math.prod(shape))
        return self._models[number].run(np.frombuffer(shared, np.float32).reshape(shape))

    def working_set_bytes(self, number: int, batch: int) -> int:
        return self._models[number].working_set_bytes(batch)

    def close(self, number: int) -> None:
        self._models.pop(number).close()
