"""Subjects whose defect shows only where a single allocation fails, one each, made of the pipeline that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from backends.errors import classify
from backends.faults.interposer import uncounted
from backends.model import N_MELS
from protection import pipeline as ships
from protection.features import log_mel
from protection.pipeline import DictationPipeline
from protection.spool import FloatArray, Spool, SpoolError
from protection.worker_engine import WorkerEngine
from tests.meta.broken import _with

healthy = ships.factory


class _ZeroingPipeline(DictationPipeline):
    """Takes an allocation that failed for silence."""

    def _features(self, start: int, stop: int) -> FloatArray:
        try:
            return super()._features(start, stop)
        except MemoryError:
            return np.zeros((self._engine.spec.window_frames, N_MELS), np.float32)


def gives_zeros_without_memory(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_ZeroingPipeline)


_open: list[onnxruntime.InferenceSession] = []


class _ForgetfulPipeline(DictationPipeline):
    """Asks another session what it takes, and forgets that one where there is no memory for what it is asked with."""

    def _clear_cache(self) -> str:
        assert isinstance(self._engine, WorkerEngine)
        # What fails as it opens is the runtime's, which may die of it: this defect is in what comes after.
        with uncounted():
            _open.append(_opened(self._engine._path, self._engine.spec.window_frames))
        spec = self._engine.spec
        features = log_mel(np.zeros(spec.context_samples + spec.chunk_samples, np.float32))
        with uncounted():
            _open.pop().run(None, {"features": features[None]})
        return super()._clear_cache()


def _opened(path: Path, frames: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    # Warm: it holds its memory from here on.
    session.run(None, {"features": np.zeros((1, frames, N_MELS), np.float32)})
    return session


def forgets_a_session(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_ForgetfulPipeline)


class _TrustingSpool(Spool):
    """Takes a write that failed for one that worked."""

    def append(self, start: int, samples: FloatArray) -> int:
        try:
            return super().append(start, samples)
        except Exception as error:
            if isinstance(error, SpoolError) or classify(error).is_oom:
                return start + len(samples)
            raise


def acknowledges_what_was_not_written(context: Any) -> DictationPipeline:
    return _with(context, Spool=_TrustingSpool)


class _HastySpool(Spool):
    """Leaves it to the system when a write reaches the disk."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._db.execute("PRAGMA synchronous = OFF")


def never_syncs(context: Any) -> DictationPipeline:
    return _with(context, Spool=_HastySpool)


class _OnceHastySpool(Spool):
    """Does so once a write failed: that syncing takes memory is what it takes from it."""

    def append(self, start: int, samples: FloatArray) -> int:
        try:
            return super().append(start, samples)
        except Exception:
            self._db.execute("PRAGMA synchronous = OFF")
            raise


def syncs_no_more_after_a_failure(context: Any) -> DictationPipeline:
    return _with(context, Spool=_OnceHastySpool)


class _UnwatchedPipeline(DictationPipeline):
    """Has its memory watched by a thread that ends with the first reading that fails, and that nobody misses."""

    def _watch(self) -> None:
        try:
            while not self._is_shut_down():
                fraction = self._engine.device_memory().fraction
                with self._wake:
                    level = self._device_pressure.level
                    if self._device_pressure.update(fraction) != level:
                        self._wake.notify_all()
                    self._wake.wait(self._policy.pressure_interval_s)
        except Exception:
            return


def watches_until_a_reading_fails(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_UnwatchedPipeline)


class _WaitingPipeline(DictationPipeline):
    """Has its work done by a thread that ends where memory is short, and waits for it."""

    def _work(self) -> None:
        try:
            while not self._is_shut_down():
                if chunks := self._next_chunks():
                    self._spool.answer(self._compute(chunks))
                with self._wake:
                    self._wake.notify_all()
                    if not self._has_work():
                        self._wake.wait(self._policy.pressure_interval_s)
        except Exception:
            return
        finally:
            self._close_engine()

    def drain(self, timeout_s: float) -> None:
        with self._wake:
            self._flush_to = target = self._spool.accepted
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._spool.answered >= target)


def waits_for_a_thread_that_is_gone(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_WaitingPipeline)
