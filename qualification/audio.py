"""WAV files of 16-bit mono PCM, to float32 samples in [-1, 1) and back, bit for bit."""

from __future__ import annotations

import shlex
import wave
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

_FULL_SCALE = 32768
_SAMPLE_BYTES = 2


class AudioError(ValueError):
    """Audio cannot be used. The message says what was found, and what was expected."""


def load_wav(path: Path, expected_rate_hz: int = 16_000) -> NDArray[np.float32]:
    """Read float32 [samples] from a mono 16-bit PCM WAV; each sample is its 16 bits / 32768, exactly.

    Raises AudioError for a file that is missing, not a WAV, empty, truncated, or of another rate, width or number of
    channels.
    """
    converted = path.with_name(f"{path.stem}-{expected_rate_hz}.wav")
    options = ["-r", str(expected_rate_hz), "-c", "1", "-b", "16", "-e", "signed-integer"]
    convert = shlex.join(["sox", str(path), *options, str(converted)])
    try:
        with wave.open(str(path), "rb") as reader:
            rate_hz, channels, width = reader.getframerate(), reader.getnchannels(), reader.getsampwidth()
            frames = reader.getnframes()
            if rate_hz != expected_rate_hz:
                raise AudioError(f"{path}: {rate_hz} Hz, expected {expected_rate_hz} Hz; convert it: {convert}")
            if channels != 1:
                raise AudioError(f"{path}: {channels} channels, expected 1 (mono); convert it: {convert}")
            if width != _SAMPLE_BYTES:
                raise AudioError(f"{path}: {8 * width} bit, expected 16 bit; convert it: {convert}")
            data = reader.readframes(frames)
    except FileNotFoundError as error:
        raise AudioError(f"{path}: there is no such file") from error
    except OSError as error:
        raise AudioError(f"{path}: the file cannot be read: {error.strerror}") from error
    except EOFError as error:
        raise AudioError(f"{path}: truncated in its header, expected RIFF WAVE") from error
    except RuntimeError as error:
        # Of ``wave``, and without a word.
        raise AudioError(f"{path}: a chunk of its header ends beyond the file, expected RIFF WAVE") from error
    except wave.Error as error:
        if "unknown format" in str(error):
            raise AudioError(f"{path}: {error}, expected 16 bit PCM; convert it: {convert}") from error
        raise AudioError(f"{path}: not a WAV ({error}), expected RIFF WAVE") from error
    if frames == 0:
        raise AudioError(f"{path}: empty, expected at least one sample")
    if len(data) != frames * _SAMPLE_BYTES:
        found = len(data) // _SAMPLE_BYTES
        raise AudioError(f"{path}: truncated: {found} samples found, {frames} expected from its header")
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(_FULL_SCALE)


def to_pcm16(samples: ArrayLike) -> bytes:
    """Turn samples [n] in [-1, 1) into little-endian 16-bit PCM, the inverse of load_wav; what is beyond is clipped.

    Raises AudioError for samples that are not finite or not of one dimension.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1:
        raise AudioError(f"samples have shape {values.shape}: expected one dimension")
    if bad := np.flatnonzero(~np.isfinite(values)).tolist():
        raise AudioError(f"sample {bad[0]} is {values[bad[0]]}: expected finite numbers")
    scaled = np.clip(np.rint(values * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1)
    return scaled.astype("<i2").tobytes()


def write_wav(path: Path, samples: ArrayLike, rate_hz: int = 16_000) -> None:
    """Write samples [n] as a mono 16-bit PCM WAV. Raises AudioError as to_pcm16 does, OSError as any write does."""
    pcm = to_pcm16(samples)
    with wave.open(str(path), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(_SAMPLE_BYTES)
        writer.setframerate(rate_hz)
        writer.writeframes(pcm)
