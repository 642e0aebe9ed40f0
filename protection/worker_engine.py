"""Inference in a worker process: the host survives whatever kills the runtime.

One worker has the device, another, started when it is needed, the fallback; that one cannot see an accelerator. A
worker that dies, hangs or breaks the protocol is ended, and whoever asked gets WorkerLost: the ladder decides what
follows.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from backends.contract import Allocation, Backend, BackendError, FloatArray, Health, MemoryReading, Share
from backends.errors import ErrorKind, RuntimeFailure
from backends.model import N_MELS, ModelSpec
from backends.threads import OneThread
from protection.channel import Frame, TornMessage
from protection.engine import EngineError, StartFailure
from protection.worker_process import Deadlines, Worker

_BLOCKING_SIDE_S = 30.0
_STANDBY_EVERY_S = 5.0
#: After a return to the device the fallback's process, unloaded, waits so long for the next time.
_LINGER_S = 10.0
#: A worker whose runtime found no memory of the host's so often is replaced before the next inference: ONNX Runtime
#: 1.32 forgets up to 600 KB each time.
_STARVED_MOST = 2
#: After these, every later call in that process fails: it is as good as dead.
_POISONED = (ErrorKind.PROCESS_LOST, ErrorKind.DEVICE_STICKY, ErrorKind.DEVICE_LOST)


def _scores(answer: Frame, chunks: int) -> FloatArray:
    """Give the scores in an answer about so many chunks. Raises TornMessage for what is none."""
    try:
        scores = np.frombuffer(answer.body, np.float32).reshape(answer.meta["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise TornMessage(f"scores without their shape came ({type(error).__name__}: {error})") from error
    if scores.ndim != 3 or len(scores) != chunks:
        raise TornMessage(f"scores of shape {list(scores.shape)} came for {chunks} chunks")
    return scores


class _Remote(Allocation):
    """Memory that a worker holds."""

    def __init__(self, worker: Worker, number: int, size_bytes: int) -> None:
        self._worker: Worker | None = worker
        self._number = number
        self.size_bytes = size_bytes

    def free(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None and worker.alive:
            # What a worker held that is gone now is free.
            with contextlib.suppress(ConnectionError):
                worker.side("free", _BLOCKING_SIDE_S, unwanted=[self._number])

    def __del__(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(Exception):
                worker.forget(self._number)


class _DeviceElsewhere:
    """The device of an engine's worker, for whoever has the backend in this process."""

    def __init__(self, engine: WorkerEngine) -> None:
        self._engine = engine
        self._last: MemoryReading | None = None

    def _worker(self) -> Worker:
        worker = self._engine._device
        if worker is None:
            raise BackendError("no process has the device now: the next inference starts one")
        return worker

    def memory(self) -> MemoryReading:
        worker = self._engine._device
        if (worker is None or not worker.alive) and self._last is not None:
            # Also where it died unasked, while the fallback is in use: then the way back is open.
            nothing = replace(self._last, used_bytes=0, reserved_bytes=0, fragmented_bytes=0)
            return replace(nothing, scope="process", source="no process has the device now")
        self._last = MemoryReading(**self._worker().side("memory")[1])
        return self._last

    def allocate(self, size_bytes: int) -> Allocation:
        worker = self._worker()
        number, _ = worker.side("allocate", _BLOCKING_SIDE_S, size_bytes=size_bytes)
        try:
            return _Remote(worker, number, size_bytes)
        except BaseException:
            worker.forget(number)
            raise

    def release_cached(self) -> int:
        return int(self._worker().side("release", _BLOCKING_SIDE_S)[1]["released"])

    def collect(self) -> int:
        return int(self._worker().side("collect", _BLOCKING_SIDE_S)[1]["found"])

    def healthy(self) -> Health:
        try:
            return Health(**self._worker().side("healthy", _BLOCKING_SIDE_S)[1])
        except (OSError, BackendError, RuntimeFailure) as error:
            return Health(False, f"{type(error).__name__}: {error}", float("inf"), 0.0)


class WorkerEngine:
    """Inference in a worker process, with another for the fallback."""

    can_restart = True

    def __init__(
        self,
        backend: Backend,
        model_path: Path,
        *,
        owns_backend: bool = False,
        deadlines: Deadlines | None = None,
        standby: bool = False,
        fork_workers: bool | None = None,
    ) -> None:
        """Start a worker and load the model on its device, or where that has no memory or dies on the fallback.

        With ``standby`` the fallback's worker is started now, loads meanwhile, and is kept: it costs memory, and the
        fallback is immediate. ``fork_workers`` is as in Policy. Raises ModelError, or what the runtime raised when
        neither has memory, as RuntimeFailure.
        """
        self._backend, self._owns_backend = backend, owns_backend
        self._path = model_path.resolve()
        self._deadlines = deadlines or Deadlines()
        self._standby, self._standby_not_before_s = standby, 0.0
        self._fork_workers = fork_workers
        #: Until when the fallback's process is kept without its model, if it is.
        self._lingers_until_s: float | None = None
        # The kernel ends workers with the thread that started them. So it is none that ends before the engine.
        self._launcher = OneThread("plimsoll-launcher")
        self._device: Worker | None = None
        self._fallback: Worker | None = None
        self._elsewhere = _DeviceElsewhere(self)
        self._degraded = False
        self._closed = False
        self._names = backend.device, ""
        self.lost = False
        self.start_failure: StartFailure | None = None
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self.start_failure = self._try_device()
        if self.start_failure is not None and self.start_failure.kind is ErrorKind.PROCESS_LOST:
            # A worker that dies as it starts is replaced once, like any other.
            self.start_failure = self._try_device()
        if self.start_failure is not None:
            self.fall_back()
        elif self._standby:
            self._start_standby()
        loaded = self._current
        assert loaded is not None
        self.spec = ModelSpec(
            context_frames=loaded.loaded["context_frames"], chunk_frames=loaded.loaded["chunk_frames"]
        )

    def _try_device(self) -> StartFailure | None:
        try:
            self._start_device()
        except RuntimeFailure as error:
            if error.kind is ErrorKind.OTHER:
                raise
            if error.kind in _POISONED:
                self._drop(self._device)
            return StartFailure(error.kind, str(error)[-300:])
        return None

    # Workers.

    def _new_worker(self, share: Share, *, load: bool) -> Worker:
        if not (share.is_slow_to_import if self._fork_workers is None else self._fork_workers):
            share = replace(share, preload=None)
        return Worker(self._launcher, share, self._path, self._deadlines, load=load)

    def _start_device(self, *, load: bool = True) -> Worker:
        """Start the device's worker, and have the backend's memory there. Raises what its start raises."""
        if self._closed:
            raise EngineError("the engine was closed")
        worker = self._new_worker(self._backend.share(), load=False)
        self._device = worker
        try:
            worker.ready()
        except BaseException:
            self._drop(worker)
            raise
        self.lost = False
        # What was held on the device before is held again.
        self._backend.hand_over(self._elsewhere)
        # The limit is known from here on, also while no process has the device.
        with contextlib.suppress(OSError, RuntimeFailure):
            self._elsewhere.memory()
        if load:
            worker.load()
        return worker

    def _start_fallback(self) -> Worker:
        """Start the fallback's worker; it loads meanwhile."""
        if self._closed:
            raise EngineError("the engine was closed")
        fallback = self._backend.fallback()
        self._names = self._names[0], fallback.device
        try:
            # Whatever the backend says of its fallback: that one is to see no accelerator.
            self._fallback = self._new_worker(replace(fallback.share(), blind=True), load=True)
        finally:
            fallback.close()
        return self._fallback

    def _ready_fallback(self) -> Worker:
        """Wait until the fallback's worker has loaded; start it first where there is none."""
        fallback = self._fallback or self._start_fallback()
        unloaded, self._lingers_until_s = self._lingers_until_s is not None, None
        try:
            fallback.ready()
            if unloaded:
                fallback.load()
        except RuntimeFailure as error:
            if error.kind in _POISONED or not fallback.started:
                self._drop(fallback)
            else:
                # It had no memory for the model: the next attempt needs no new process.
                self._lingers_until_s = time.monotonic() + _LINGER_S
            raise
        except BaseException:
            self._drop(fallback)
            raise
        return fallback

    @property
    def _current(self) -> Worker | None:
        """The worker that the next inference would be made in, if there is one."""
        return self._fallback if self._degraded else self._device

    def _drop(self, worker: Worker | None) -> None:
        """End a worker, and forget it."""
        if worker is None:
            return
        if worker is self._device:
            self._device = None
        if worker is self._fallback:
            self._fallback, self._lingers_until_s = None, None
        worker.end()

    # What the pipeline asks.

    @property
    def device(self) -> str:
        """Where the next result would be made."""
        return self._names[1] if self._degraded else self._names[0]

    @property
    def degraded(self) -> bool:
        """Whether the fallback is in use."""
        return self._degraded

    def infer(self, features: FloatArray) -> FloatArray:
        """Run the model in the worker; start one first where there is none."""
        if self._closed:
            raise EngineError("the engine was closed")
        features = np.ascontiguousarray(features, np.float32)
        worker = self._in_use()
        try:
            if worker is None:
                worker = self._ready_fallback() if self._degraded else self._start_device()
            answer = worker.work("infer", self._deadlines.infer_s, {"shape": features.shape}, features.data)
            try:
                scores = _scores(answer, len(features))
            except TornMessage as why:
                raise worker.broke(str(why)) from None
        except RuntimeFailure as error:
            if error.kind in _POISONED:
                self._drop(self._current)
                self.lost = True
            raise
        self.lost = False
        if self._standby:
            self._keep_standby()
        elif self._lingers_until_s is not None and time.monotonic() > self._lingers_until_s:
            self._drop(self._fallback)
        return scores

    def _keep_standby(self) -> None:
        """Replace a standby that is gone; not again and again, where none stays."""
        if self._degraded or (self._fallback is not None and self._fallback.alive):
            return
        self._drop(self._fallback)
        if time.monotonic() >= self._standby_not_before_s:
            self._standby_not_before_s = time.monotonic() + _STANDBY_EVERY_S
            self._start_standby()

    def _start_standby(self) -> None:
        # Nothing depends on it yet.
        with contextlib.suppress(RuntimeFailure, BackendError, OSError, MemoryError):
            self._start_fallback()

    def _in_use(self) -> Worker | None:
        worker = self._current
        if worker is not None and (worker.ended or worker.starved >= _STARVED_MOST):
            # A wait for it was interrupted; or its runtime keeps what it held when its own requests were refused.
            self._drop(worker)
            return None
        return worker

    def release_cached(self) -> None:
        """Give cached memory back in the worker that is in use."""
        worker = self._current
        if worker is not None and worker.alive:
            # One that is gone keeps nothing.
            with contextlib.suppress(ConnectionError):
                worker.side("release", _BLOCKING_SIDE_S)

    def collect(self) -> int:
        """Collect unreachable objects in this process, and in the worker that is in use."""
        found = gc.collect()
        worker = self._current
        if worker is not None and worker.alive:
            with contextlib.suppress(ConnectionError):
                found += int(worker.side("collect", _BLOCKING_SIDE_S)[1]["found"])
        return found

    def workers_heap_bytes(self) -> int:
        """Ask every worker what it has taken from its heap. Raises OSError for one that does not answer, or cannot."""
        total_bytes = 0
        for worker in (self._device, self._fallback):
            if worker is not None and worker.alive:
                used_bytes = worker.side("heap", _BLOCKING_SIDE_S)[1]["used_bytes"]
                if used_bytes is None:
                    raise OSError(f"worker {worker.process_id} cannot read its heap")
                total_bytes += int(used_bytes)
        return total_bytes

    def restart(self) -> None:
        """Replace the worker that is in use. Raises WorkerLost, or what its start raises."""
        if self._degraded:
            self._drop(self._fallback)
            self._ready_fallback()
        else:
            self._drop(self._device)
            self._start_device()
        self.lost = False

    def fall_back(self) -> None:
        """Unload the device's model and load the fallback's, in a process that sees no accelerator."""
        device = self._device
        if device is not None:
            try:
                # Free the device first: host memory may be short, and on some devices it is the same memory.
                device.work("unload", self._deadlines.infer_s)
            except RuntimeFailure:
                self._drop(device)
        if self._fallback is not None and not self._fallback.alive:
            self._drop(self._fallback)
        self._ready_fallback()
        # Only now: until it is loaded nothing has moved.
        self._degraded, self.lost = True, False

    def return_to_device(self) -> bool:
        """Probe, load and run once on the device before the fallback is given up. Raises what either raises."""
        if self._closed or not self._degraded:
            return False
        device, start_s = self._device, self._deadlines.start_s
        try:
            if device is None or not device.alive or device.starved >= _STARVED_MOST:
                self._drop(device)
                device = self._start_device(load=False)
            tried = device.work("try", start_s, {"mels": N_MELS}, silence_s=start_s).meta
        except (RuntimeFailure, BackendError) as error:
            # What is no want of memory may be that process's: the next attempt is made in another.
            if not (isinstance(error, RuntimeFailure) and error.kind.is_oom):
                self._drop(self._device)
            raise
        if not tried["ok"]:
            if not tried["oom"]:
                self._drop(device)
            return False
        self._degraded, self.lost = False, False
        if not self._standby:
            self._have_fallback_linger()
        return True

    def _have_fallback_linger(self) -> None:
        """Unload the fallback and keep its process for a while: where a device comes and goes it is needed again."""
        fallback = self._fallback
        if fallback is None:
            return
        try:
            fallback.work("unload", self._deadlines.infer_s)
            self._lingers_until_s = time.monotonic() + _LINGER_S
        except (RuntimeFailure, BackendError):
            self._drop(fallback)

    def unload(self) -> None:
        """End the workers, until the next inference: their memory really comes back."""
        self._drop(self._fallback)
        self._drop(self._device)
        self.lost = False
        self._standby_not_before_s = 0.0

    def device_memory(self) -> MemoryReading:
        """Read the device's memory; where no process has the device now, what the backend says without one."""
        return self._backend.memory()

    def process_ids(self) -> Sequence[int]:
        """This process, and the workers that run, with what they were forked from."""
        workers = [worker for worker in (self._device, self._fallback) if worker is not None and worker.alive]
        return [os.getpid(), *dict.fromkeys(each for worker in workers for each in worker.process_ids)]

    def cancel(self) -> None:
        """Have whoever waits for a worker wait no longer."""
        for worker in (self._device, self._fallback):
            if worker is not None:
                worker.cancel()

    def close(self) -> None:
        """End the workers, for good. A second call does what the first did not come to, and else nothing."""
        self._closed = True
        try:
            self._drop(self._fallback)
        finally:
            try:
                self._drop(self._device)
            finally:
                self._launcher.close()
        self._backend.take_back(self._elsewhere)
        if self._owns_backend:
            self._owns_backend = False
            self._backend.close()
