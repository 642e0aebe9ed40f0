"""Log-mel frames from samples: what the acoustic model takes in."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from numpy.fft import rfft

from backends.model import FRAME_SAMPLES, HOP_SAMPLES, N_MELS, SAMPLE_RATE_HZ

_FFT = 512


def _filterbank() -> npt.NDArray[np.float32]:
    """Triangular filters on the HTK mel scale, float32 [257, 80]."""

    def to_mel(hz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return 2595.0 * np.log10(1.0 + hz / 700.0)

    edges_mel = np.linspace(0.0, to_mel(np.array([SAMPLE_RATE_HZ / 2.0]))[0], N_MELS + 2)
    edges_hz = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    bins_hz = np.linspace(0.0, SAMPLE_RATE_HZ / 2.0, _FFT // 2 + 1)[:, None]
    rising = (bins_hz - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def _filters() -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Give the few bins that each filter lets through, [80, most], and their weights; those behind the last have 0."""
    filterbank = _filterbank()
    most = int(np.count_nonzero(filterbank, axis=0).max())
    bins = np.argsort(filterbank == 0, axis=0, kind="stable")[:most].T
    return bins, np.take_along_axis(filterbank, bins.T, axis=0).T.copy()


#: Made before there is a recording: it takes what ``log_mel`` does without.
_BINS, _WEIGHTS = _filters()


@functools.lru_cache(maxsize=4)
def _windows(frames: int) -> npt.NDArray[np.float32]:
    """A Hann window for each of so many frames, float32 [frames, 400]."""
    window: npt.NDArray[np.float32] = np.hanning(FRAME_SAMPLES).astype(np.float32)
    return np.concatenate([window] * frames).reshape(frames, FRAME_SAMPLES)


def log_mel(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Turn float32 [samples] at 16 kHz into float32 [frames, 80]: natural log of mel energies, 10 ms a frame.

    Frame k is made of the 400 samples from k × 160 on, so 400 samples give one frame.

    Some ways to compute this end the process where there is no memory, and are not used: a matrix product (OpenBLAS
    exits), and a product of arrays of two shapes (NumPy 2 writes to a buffer that it did not get).
    """
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME_SAMPLES)[::HOP_SAMPLES].copy()
    np.multiply(frames, _windows(len(frames)), out=frames)
    spectrum = rfft(frames, _FFT)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32, copy=False)
    energies: npt.NDArray[np.float32] = np.einsum("fmb,mb->fm", np.take(power, _BINS, axis=1), _WEIGHTS)
    return np.log(np.maximum(energies, np.float32(1e-10)))
