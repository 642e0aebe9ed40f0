"""The acoustic model is made of its seed alone, and the committed files are what the code writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from backends.cpu import Cpu
from backends.model import (
    BLOCK_MODEL,
    DEFAULT_MODEL,
    PROBE_MODEL,
    ModelSpec,
    block_to_onnx,
    main,
    probe_to_onnx,
    to_onnx,
    weights,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--layers", "1", "--width", "16", "--channels", "4"]


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert main([str(tmp_path / name), "--seed", seed, *SMALL]) == 0, f"{name} was not written"
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b, f"two files of seed 5 differ ({len(a)} and {len(b)} bytes)"
    assert a != c, "seeds 5 and 6 gave the same file"


@pytest.mark.parametrize(
    ("make", "path"),
    [(lambda: to_onnx(ModelSpec()), DEFAULT_MODEL), (block_to_onnx, BLOCK_MODEL), (probe_to_onnx, PROBE_MODEL)],
    ids=["acoustic", "block", "probe"],
)
def test_a_committed_file_is_what_the_code_writes(make: Callable[[], Any], path: Path) -> None:
    made, committed = make(), onnx.load(path)
    # Field by field: the bytes of a file are the same only for one version of the onnx package.
    assert made.graph.node == committed.graph.node, f"{path.name}: the nodes differ"
    assert made.graph.initializer == committed.graph.initializer, f"{path.name}: the weights differ"
    assert made.graph.input == committed.graph.input, f"{path.name}: the inputs differ"
    assert made.graph.output == committed.graph.output, f"{path.name}: the outputs differ"
    assert made.opset_import == committed.opset_import, f"{path.name}: the opsets differ"
    assert made.metadata_props == committed.metadata_props, f"{path.name}: the metadata differ"
    assert made.SerializeToString(deterministic=True) == path.read_bytes(), f"{path.name}: the bytes differ"


def test_weights_come_from_the_seed_in_a_process_of_its_own_too() -> None:
    program = (
        "import hashlib; from backends.model import *\n"
        "print(hashlib.sha256(b''.join(w.tobytes() for w in weights(ModelSpec()).values())).hexdigest())"
    )
    command = [sys.executable, "-c", program]
    digests = {subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(digests) == 1, f"two processes made different weights: {digests}"
    bad = [
        name
        for name, array in weights(ModelSpec()).items()
        if array.dtype != np.float32 or not np.isfinite(array).all()
    ]
    assert not bad, f"weights that are not finite float32: {bad}"


@pytest.mark.parametrize(
    "change",
    [
        {"context_frames": 51},
        {"chunk_frames": 0},
        {"chunk_frames": 99},
        {"width": 130},
        {"layers": 0},
        {"heads": 0},
        {"seed": -1},
        {"seed": True},
        {"channels": 1.5},
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ModelSpec(**change)


def test_windows_and_samples_agree() -> None:
    spec = ModelSpec()
    samples = spec.context_samples + spec.chunk_samples
    frames = (samples - 400) // 160 + 1
    assert frames == spec.window_frames, f"{samples} samples make {frames} frames, the window has {spec.window_frames}"


def test_the_model_uses_its_left_context_and_its_output_depends_on_the_window_alone(bounded: Cpu) -> None:
    model = bounded.load(DEFAULT_MODEL)
    random = np.random.RandomState(1)
    window = random.standard_normal((1, 150, 80)).astype(np.float32)
    other = random.standard_normal((1, 150, 80)).astype(np.float32)
    alone = model.run(window)
    model.run(other)
    again = model.run(window)
    beside = model.run(np.concatenate([other, window]))[1:]
    changed = window.copy()
    changed[0, 40] += 1.0
    assert np.array_equal(again, alone), "a run in between changed the scores: the model keeps state"
    assert float(np.max(np.abs(beside - alone))) <= 1e-3, "a neighbour in the batch changed the scores"
    assert not np.array_equal(model.run(changed), alone), "the left context does not reach the scores"


def test_a_spec_that_cannot_be_is_an_error_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "x.onnx"), "--width", "130"])
    assert caught.value.code == 2, f"the exit status is {caught.value.code}"
    assert "width 130 must be a multiple of heads 4" in capsys.readouterr().err, "the message does not say why"
    with pytest.raises(SystemExit):
        main([str(tmp_path / "no" / "folder.onnx"), "--block"])
    assert "No such file" in capsys.readouterr().err, "the message does not say why"


def test_block_and_probe_are_written_by_the_command(tmp_path: Path) -> None:
    for option, committed in (("--block", BLOCK_MODEL), ("--probe", PROBE_MODEL)):
        main([str(tmp_path / "m.onnx"), option])
        assert (tmp_path / "m.onnx").read_bytes() == committed.read_bytes(), f"{option} differs from {committed.name}"
