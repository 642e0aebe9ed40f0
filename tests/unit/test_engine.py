"""The engine moves between the device and its fallback, and never touches a failed device to do so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.contract import FaultPlan, ModelError, Site
from backends.cpu import Cpu
from backends.errors import ErrorKind, classify
from backends.faults import ballast
from backends.model import DEFAULT_MODEL
from protection.engine import EngineError, InProcessEngine

MIB = 1 << 20


@pytest.fixture
def engine(bounded: Cpu) -> InProcessEngine:
    return InProcessEngine(bounded, DEFAULT_MODEL)


def _features(batch: int = 4) -> Any:
    return np.random.RandomState(3).standard_normal((batch, 150, 80)).astype(np.float32)


def test_it_infers_on_the_device(engine: InProcessEngine) -> None:
    scores = engine.infer(_features())
    assert scores.shape == (4, 50, 32), f"scores are {scores.shape}"
    assert (engine.device, engine.degraded) == ("cpu:arena", False), f"{engine.device}, degraded {engine.degraded}"
    assert (engine.spec.context_frames, engine.spec.chunk_frames) == (50, 100), f"the windows are {engine.spec}"
    assert list(engine.process_ids()) == [os.getpid()], f"processes {engine.process_ids()}"


def test_a_model_that_is_not_there_is_an_error_at_once(bounded: Cpu, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model file"):
        InProcessEngine(bounded, tmp_path / "none.onnx")


def test_the_fallback_takes_over_from_a_full_device(engine: InProcessEngine, bounded: Cpu) -> None:
    expected = engine.infer(_features())
    held = ballast.fill(bounded.allocate)
    with pytest.raises(Exception, match="Available memory of") as caught:
        engine.infer(_features(16))
    engine.fall_back()
    scores = engine.infer(_features())
    ballast.free(held)
    assert classify(caught.value) is ErrorKind.DEVICE_OOM, f"on the full device: {caught.value!r}"
    assert (engine.device, engine.degraded) == ("cpu", True), f"{engine.device}, degraded {engine.degraded}"
    assert np.array_equal(scores, expected), "the fallback's scores differ"


def test_falling_back_leaves_the_device_empty(engine: InProcessEngine, bounded: Cpu) -> None:
    engine.infer(_features(16))
    during = engine.device_memory().used_bytes
    engine.fall_back()
    after = engine.device_memory().used_bytes
    bounded.allocate(95 * MIB).free()
    assert during > 30 * MIB and after == 0, f"in use on the device: {during} bytes before, {after} after"


def test_falling_back_twice_is_one_fallback(engine: InProcessEngine) -> None:
    engine.fall_back()
    first = engine._fallback
    engine.fall_back()
    assert engine._fallback is first, "a second fallback was made"
    assert engine.infer(_features()).shape == (4, 50, 32), "it does not infer"


def test_it_returns_to_a_healthy_device_only(engine: InProcessEngine, bounded: Cpu) -> None:
    assert not engine.return_to_device(), "it returned without having left"
    engine.fall_back()
    held = ballast.fill(bounded.allocate)
    assert not engine.return_to_device(), "it returned to a full device"
    assert engine.device == "cpu", f"after a return that failed it is on {engine.device}"
    engine.infer(_features())
    ballast.free(held)
    assert engine.return_to_device(), "it did not return to a device that is healthy again"
    assert (engine.device, engine.degraded) == ("cpu:arena", False), f"{engine.device}, degraded {engine.degraded}"
    engine.infer(_features())


def test_a_return_without_room_for_the_model_leaves_the_fallback_in_use(engine: InProcessEngine, bounded: Cpu) -> None:
    engine.fall_back()
    # Enough for the health probe, too little for the weights.
    held = ballast.leave(ballast.fill(bounded.allocate, (MIB, 64 << 10)), 2 * MIB + 1)
    assert bounded.healthy().ok, "the probe does not fit"
    with pytest.raises(Exception, match="Available memory of") as caught:
        engine.return_to_device()
    scores = engine.infer(_features())
    ballast.free(held)
    assert classify(caught.value).is_oom, f"the error is {caught.value!r}"
    assert engine.degraded and scores.shape == (4, 50, 32), "the fallback is not in use any more"


def test_collecting_reaches_what_only_a_collection_finds(engine: InProcessEngine, bounded: Cpu) -> None:
    with bounded.arm(FaultPlan(Site.DEVICE_GARBAGE)):
        with pytest.raises(Exception, match="Available memory of"):
            engine.infer(_features(16))
        engine.release_cached()
        with pytest.raises(Exception, match="Available memory of"):
            engine.infer(_features(16))
        found = engine.collect()
        engine.release_cached()
        assert engine.infer(_features(16)).shape == (16, 50, 32), "it does not infer after the collection"
    assert found >= 1, f"{found} objects were collected"


def test_a_worker_that_is_not_there_cannot_be_restarted(engine: InProcessEngine) -> None:
    assert not engine.can_restart, "it says that it can"
    with pytest.raises(EngineError, match="there is no worker to restart"):
        engine.restart()


def test_closing_unloads_and_a_second_call_does_nothing(engine: InProcessEngine, bounded: Cpu) -> None:
    engine.infer(_features(16))
    engine.fall_back()
    engine.close()
    engine.close()
    assert bounded.memory().used_bytes == 0, f"{bounded.memory().used_bytes} bytes are still in use"
