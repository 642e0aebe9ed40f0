"""Where inference happens, behind one interface: in this process today."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from backends.contract import Backend, FloatArray, MemoryReading, Model
from backends.model import ModelSpec


class EngineError(Exception):
    """The engine cannot do what was asked. The message says why."""


class Engine(Protocol):
    """What the pipeline asks of inference. The worker process implements the same."""

    #: Whether ``restart`` can replace the place where inference happens.
    can_restart: bool

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

    def restart(self) -> None:
        """Replace the place where inference happens."""

    def fall_back(self) -> None:
        """Unload the device's model and load the fallback's."""

    def return_to_device(self) -> bool:
        """Go back to the device if a probe finds it healthy; say whether it did."""

    def device_memory(self) -> MemoryReading:
        """Read the device's memory."""

    def process_ids(self) -> Sequence[int]:
        """Give the processes that inference happens in."""

    def close(self) -> None:
        """Unload everything."""


class InProcessEngine:
    """Inference in this process: simple and fast, and it dies with whatever kills the runtime."""

    can_restart = False

    def __init__(self, backend: Backend, model_path: Path) -> None:
        """Load the model on the device. Raises ModelError, or the runtime's own error when there is no memory."""
        self._backend = backend
        self._path = model_path
        self._fallback: Backend | None = None
        self._model: Model | None = backend.load(model_path)
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
        if self._model is None:
            self._model = (self._fallback or self._backend).load(self._path)
        return self._model.run(features)

    def release_cached(self) -> None:
        """Shrink the runtime's arena."""
        (self._fallback or self._backend).release_cached()

    def restart(self) -> None:
        """Not possible here."""
        raise EngineError("inference happens in this process: there is no worker to restart")

    def fall_back(self) -> None:
        """Free the device first: host memory may be short, and on some devices it is the same memory."""
        self._unload()
        self._backend.release_cached()
        if self._fallback is None:
            self._fallback = self._backend.fallback()
        self._model = self._fallback.load(self._path)

    def return_to_device(self) -> bool:
        """Load on the device before the fallback is given up."""
        if self._fallback is None or not self._backend.healthy().ok:
            return False
        model = self._backend.load(self._path)
        self._unload()
        self._fallback.close()
        self._fallback, self._model = None, model
        return True

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
        """Unload the model; the backend belongs to whoever made it."""
        self._unload()
        if self._fallback is not None:
            self._fallback.close()
