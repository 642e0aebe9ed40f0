"""Log-mel frames agree with a straightforward reference in double precision, and line up with the stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from protection.features import log_mel

FFT = 512


def _reference(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Compute frame by frame and filter by filter, as the definition says."""

    def to_hz(mel: float) -> float:
        return 700.0 * (math.pow(10.0, mel / 2595.0) - 1.0)

    highest = 2595.0 * math.log10(1.0 + 8000.0 / 700.0)
    edges = [to_hz(highest * k / 81) for k in range(82)]
    window = np.array([0.5 - 0.5 * math.cos(2 * math.pi * n / 399) for n in range(400)])
    frames = []
    for first in range(0, len(samples) - 399, 160):
        power = np.abs(np.fft.fft(samples[first : first + 400].astype(np.float64) * window, FFT)) ** 2
        row = []
        for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
            energy = 0.0
            for k in range(FFT // 2 + 1):
                hz = k * 16_000 / FFT
                if low < hz <= middle:
                    energy += power[k] * (hz - low) / (middle - low)
                elif middle < hz < high:
                    energy += power[k] * (high - hz) / (high - middle)
            row.append(math.log(max(energy, 1e-10)))
        frames.append(row)
    return np.array(frames)


def _tone(hz: float, seconds: float) -> npt.NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * 16_000)) / 16_000)).astype(np.float32)


@pytest.mark.parametrize("kind", ["noise", "tone"])
def test_frames_agree_with_the_reference(kind: str, audio: Callable[[float], npt.NDArray[np.float32]]) -> None:
    samples = audio(0.3) if kind == "noise" else _tone(440.0, 0.3)
    found, expected = log_mel(samples), _reference(samples)
    assert found.shape == expected.shape and found.dtype == np.float32, f"{found.dtype} {found.shape}"
    # Far from a tone only rounding noise is left, some 100 dB down: energies are compared, not their logarithms.
    worst = float(np.max(np.abs(np.exp(found) - np.exp(expected)) / np.exp(expected).max()))
    assert worst < 1e-5, f"the largest difference is {worst:.1e} of the largest energy"
    if kind == "noise":
        worst = float(np.max(np.abs(found - expected)[np.exp(expected) > 1e-9]))
        assert worst < 1e-3, f"the largest difference of the logarithms is {worst:.1e}"


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (559, 1), (560, 2), (16_000, 98), (24_240, 150)])
def test_so_many_samples_make_so_many_frames(samples: int, frames: int) -> None:
    found = log_mel(np.zeros(samples, np.float32)).shape
    assert found == (frames, 80), f"{samples} samples made {found}, expected {(frames, 80)}"


def test_silence_is_the_floor_and_finite() -> None:
    found = log_mel(np.zeros(800, np.float32))
    assert np.allclose(found, math.log(1e-10)), f"silence is {found.min()} to {found.max()}, expected {math.log(1e-10)}"


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
def test_absurdly_loud_audio_does_not_raise(value: float) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        found = log_mel(np.full(400, value, np.float32))
    assert found.shape == (1, 80), f"the shape is {found.shape}"


def test_a_tone_is_loudest_in_its_own_band() -> None:
    bands = [int(log_mel(_tone(hz, 0.1)).mean(0).argmax()) for hz in (200.0, 500.0, 1000.0, 3000.0, 7000.0)]
    assert bands == sorted(set(bands)), f"tones of rising pitch are loudest in bands {bands}"


def test_frames_of_a_part_are_frames_of_the_whole(audio: Callable[[float], npt.NDArray[np.float32]]) -> None:
    samples = audio(1.0)
    whole, part = log_mel(samples), log_mel(samples[160 * 20 :])
    worst = float(np.max(np.abs(whole[20:] - part)))
    assert worst < 1e-5, f"a window cut out of a stream has other frames than the stream: they differ by {worst:.1e}"


# Each request of the call is refused in a process of its own, which has not called it before or has: what came of it.
SWEEP = """
import json, os
import numpy as np
from backends.contract import FaultPlan, Site
from backends.faults.interposer import Control
from protection import features

control = Control.attached()
samples = (np.random.RandomState(5).standard_normal(24240) * 0.1).astype(np.float32)
if not IS_FIRST:
    features.log_mel(samples)


def attempt(nth, times):
    plan = FaultPlan(Site.HOST_ALLOCATION, nth=nth, times=times, min_bytes=64, process=str(os.getpid()))
    control.prepare(plan)
    control.begin()
    try:
        found = features.log_mel(samples)
        control.end()
    # NumPy does not always say what there was no memory for.
    except (MemoryError, SystemError):
        control.end()
        return 1
    return 0 if np.array_equal(found, features.log_mel(samples)) else 2


found = []
for times in (1, None):
    for nth in range(1, 2000):
        child = os.fork()
        if not child:
            status = 3
            try:
                status = attempt(nth, times)
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        fired = control.record().faults_fired
        found.append([times, nth, fired, status])
        if not fired:
            break
print(json.dumps(found))
"""


@pytest.mark.parametrize("is_first", [True, False], ids=["the first time", "later"])
def test_without_memory_features_are_right_or_an_error_and_never_the_end_of_the_process(
    interposed: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    # A process of one thread may be forked.
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    found = interposed(SWEEP.replace("IS_FIRST", str(is_first)))
    ends = [[times, status] for times, _, fired, status in found if not fired]
    assert ends == [[1, 0], [None, 0]], f"alone, and with all that follow, until nothing is refused: {ends}"
    raised = [each for each in found if each[3] == 1]
    assert len(raised) >= 10, f"only {len(raised)} requests that were refused were an error: nothing is shown"
    ended = [each for each in found if each[3] not in (0, 1, 2)]
    assert not ended, f"[times, nth, fired, status] of processes that ended of it: {ended}"
    wrong = [each for each in found if each[3] == 2]
    assert not wrong, f"other features than with memory: {wrong}"
