"""The same 16 bits come back, and every file that cannot be used is refused with the reason."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from qualification.audio import AudioError, load_wav, to_pcm16, write_wav

EVERY_PCM = np.arange(-32768, 32768).astype("<i2")


def _wav(path: Path, *, rate_hz: int = 16_000, channels: int = 1, width: int = 2, frames: int = 100) -> Path:
    with wave.open(str(path), "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.setframerate(rate_hz)
        writer.writeframes(bytes(frames * channels * width))
    return path


def test_every_16_bit_value_comes_back() -> None:
    """All 65,536 values survive float32 and back."""
    back = np.frombuffer(to_pcm16(EVERY_PCM.astype(np.float32) / 32768), dtype="<i2")
    assert np.array_equal(back, EVERY_PCM), f"{np.sum(back != EVERY_PCM)} of 65536 values changed"


def test_a_file_comes_back(tmp_path: Path) -> None:
    """write_wav and load_wav are inverse, bit for bit, in float32."""
    samples = EVERY_PCM.astype(np.float32) / 32768
    write_wav(tmp_path / "a.wav", samples, 8_000)
    loaded = load_wav(tmp_path / "a.wav", 8_000)
    assert (str(loaded.dtype), loaded.shape) == ("float32", (65536,)), f"{loaded.dtype} {loaded.shape}"
    assert np.array_equal(loaded, samples), f"{np.sum(loaded != samples)} of 65536 samples changed"


def test_beyond_full_scale_is_clipped() -> None:
    """Too loud is the loudest, never wrapped around."""
    assert np.frombuffer(to_pcm16([1.0, 2.0, -1.0, -2.0]), "<i2").tolist() == [32767, 32767, -32768, -32768]


def test_samples_that_are_not_a_line_of_numbers_are_refused() -> None:
    """NaN and two dimensions have no PCM."""
    with pytest.raises(AudioError, match="sample 1 is nan"):
        to_pcm16([0.0, float("nan")])
    with pytest.raises(AudioError, match=r"shape \(2, 3\)"):
        to_pcm16(np.zeros((2, 3)))


def test_wrong_formats_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """What was found, what was expected, and the command that converts."""
    path = tmp_path / "a b.wav"
    command = f"sox '{path}' -r 16000 -c 1 -b 16 -e signed-integer '{tmp_path}/a b-16000.wav'"
    for options, message in (
        ({"rate_hz": 44_100}, "44100 Hz, expected 16000 Hz"),
        ({"channels": 2}, "2 channels, expected 1"),
        ({"width": 3}, "24 bit, expected 16 bit"),
        ({"width": 1}, "8 bit, expected 16 bit"),
    ):
        _wav(path, **options)
        with pytest.raises(AudioError) as caught:
            load_wav(path)
        assert message in str(caught.value), str(caught.value)
        assert str(caught.value).endswith(command), str(caught.value)


def test_float_wav_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """IEEE float is a WAV, but not PCM."""
    path = tmp_path / "f.wav"
    form = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 4) + bytes(4)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    with pytest.raises(AudioError, match=r"unknown format: 3, expected 16 bit PCM; convert it: sox"):
        load_wav(path)


def test_what_is_no_audio_is_refused(tmp_path: Path) -> None:
    """Missing, a folder, text, no bytes, no samples: each has its own message."""
    (tmp_path / "text.wav").write_text("no audio at all, only text, and more than forty-four bytes of it")
    (tmp_path / "zero.wav").write_bytes(b"")
    _wav(tmp_path / "empty.wav", frames=0)
    for name, message in (
        ("none.wav", "there is no such file"),
        (".", "cannot be read: Is a directory"),
        ("text.wav", "not a WAV .*expected RIFF WAVE"),
        ("zero.wav", "truncated in its header, expected RIFF WAVE"),
        ("empty.wav", "empty, expected at least one sample"),
    ):
        with pytest.raises(AudioError, match=message):
            load_wav(tmp_path / name)


def test_a_chunk_that_ends_beyond_the_file_is_refused(tmp_path: Path) -> None:
    """``wave`` has a bare RuntimeError for it."""
    whole = _wav(tmp_path / "a.wav").read_bytes()
    for name, at in ((b"fact", 12), (b"LIST", 36)):
        (tmp_path / "a.wav").write_bytes(whole[:at] + name + struct.pack("<I", 1 << 30) + bytes(4) + whole[at:])
        with pytest.raises(AudioError, match="a chunk of its header ends beyond the file, expected RIFF WAVE"):
            load_wav(tmp_path / "a.wav")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Cut at any byte, a file is an AudioError; a cut in the samples says how many were found."""
    whole = _wav(tmp_path / "whole.wav").read_bytes()
    path = tmp_path / "cut.wav"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(AudioError, match=r"truncated|expected RIFF WAVE"):
            load_wav(path)
    with pytest.raises(AudioError, match="truncated: 99 samples found, 100 expected"):
        load_wav(path)
