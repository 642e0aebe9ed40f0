"""Where inference happens, behind one interface; and inference in this process, for embedders.

The default is a worker process: ``protection.worker_engine``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from backends.contract import Backend, FloatArray, MemoryReading, Model
from backends.errors import ErrorKind, classify
from backends.model import N_MELS, ModelSpec


class EngineError(Exception):
    """The engine cannot do what was asked. The message says why."""


@dataclass(frozen=True)
class StartFailure:
    """Why an engine began on its fallback."""

    kind: ErrorKind
    text: str


class Engine(Protocol):
    """What the pipeline asks of inference."""

    #: Whether ``restart`` can replace the place where inference happens.
    can_restart: bool
    #: Whether the place where inference happened is gone, and nothing helps but to replace it.
    lost: bool
    #: Why it began on the fallback, where it did.
    start_failure: StartFailure | None

    @property
    def spec(self) -> ModelSpec:
        """The shape of the model's windows."""

    @property
    def device(self) -> str:
        """Where the next result would be made."""

    @property
    def degraded(self) -> bool:
        """Whether the fallback is in use."""

    def infer(self, features: FloatArray) -> FloatArray:
        """Run float32 [batch, window_frames, 80]; give float32 [batch, rows, vocabulary].

        Raises what the runtime raises.
        """

    def release_cached(self) -> None:
        """Give cached memory back."""

    def collect(self) -> int:
        """Collect unreachable objects wherever they may hold memory; give their number."""

    def workers_heap_bytes(self) -> int:
        """Read what other processes than this one have taken from their heaps and not freed."""

    def restart(self) -> None:
        """Replace the place where inference happens."""

    def fall_back(self) -> None:
        """Unload the device's model and load the fallback's."""

    def return_to_device(self) -> bool:
        """Go back to the device if a probe finds it healthy; say whether it did."""

    def unload(self) -> None:
        """Give the model's memory back until the next inference."""

    def cancel(self) -> None:
        """Have an inference in another thread end now, where that is possible."""

    def device_memory(self) -> MemoryReading:
        """Read the device's memory."""

    def process_ids(self) -> Sequence[int]:
        """Give the processes that inference happens in."""

    def close(self) -> None:
        """Unload everything."""


class InProcessEngine:
    """Inference in this process: simple and fast, and it dies with whatever kills the runtime."""

    can_restart = False
    lost = False
    start_failure: StartFailure | None

    def __init__(self, backend: Backend, model_path: Path, *, owns_backend: bool = False) -> None:
        """Load the model on the device, or where that has no memory on the fallback.

        Raises ModelError, or the runtime's own error when neither has memory.
        """
        self._backend, self._owns_backend = backend, owns_backend
        self._path = model_path
        self._closed = False
        self._fallback: Backend | None = None
        self._model: Model | None = None
        self.start_failure = None
        try:
            self._model = backend.load(model_path)
        except Exception as error:
            kind = classify(error)
            if not kind.is_oom:
                raise
            self.start_failure = StartFailure(kind, str(error)[-300:])
        if self.start_failure is not None:
            self.fall_back()
        assert self._model is not None
        context_frames = self._model.window_frames - self._model.chunk_frames
        self.spec = ModelSpec(context_frames=context_frames, chunk_frames=self._model.chunk_frames)

    @property
    def device(self) -> str:
        """Where the next result would be made."""
        return (self._fallback or self._backend).device

    @property
    def degraded(self) -> bool:
        """Whether the fallback is in use."""
        return self._fallback is not None

    def infer(self, features: FloatArray) -> FloatArray:
        """Run the model; load it first where a failed recovery left none."""
        if self._closed:
            raise EngineError("the engine was closed")
        if self._model is None:
            self._model = (self._fallback or self._backend).load(self._path)
        return self._model.run(features)

    def release_cached(self) -> None:
        """Shrink the runtime's arena."""
        (self._fallback or self._backend).release_cached()

    def collect(self) -> int:
        """Collect unreachable objects in this process, and where the device is."""
        return (self._fallback or self._backend).collect()

    def workers_heap_bytes(self) -> int:
        """Give 0: there is no other process."""
        return 0

    def restart(self) -> None:
        """Not possible here."""
        raise EngineError("inference happens in this process: there is no worker to restart")

    def fall_back(self) -> None:
        """Free the device first: host memory may be short, and on some devices it is the same memory."""
        self._unload()
        self._backend.release_cached()
        fallback = self._fallback or self._backend.fallback()
        self._model = fallback.load(self._path)
        # Only now: until it is loaded nothing has moved.
        self._fallback = fallback

    def return_to_device(self) -> bool:
        """Load on the device, and run there once, before the fallback is given up. Raises what either raises."""
        if self._closed or self._fallback is None or not self._backend.healthy().ok:
            return False
        model = self._backend.load(self._path)
        try:
            model.run(np.zeros((1, self.spec.window_frames, N_MELS), np.float32))
        except BaseException:
            model.close()
            raise
        self._unload()
        self._fallback.close()
        self._fallback, self._model = None, model
        return True

    def unload(self) -> None:
        """Unload the model until the next inference."""
        self._unload()
        self.release_cached()

    def cancel(self) -> None:
        """Not possible here: a call into the runtime cannot be left."""

    def _unload(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            model.close()

    def device_memory(self) -> MemoryReading:
        """Read the device's memory, whether or not the model is there now."""
        return self._backend.memory()

    def process_ids(self) -> Sequence[int]:
        """This process."""
        return [os.getpid()]

    def close(self) -> None:
        """Unload the model, for good. A second call does nothing."""
        self._closed = True
        self._unload()
        self._backend.release_cached()
        if self._fallback is not None:
            self._fallback.close()
        if self._owns_backend:
            self._backend.close()
