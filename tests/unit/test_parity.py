"""Every runtime that is here computes the same model from the same file."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from backends.contract import FloatArray
from backends.model import DEFAULT_MODEL, N_MELS, ModelSpec, read_onnx, reference, weights

Run = Callable[[FloatArray], FloatArray]
ROOT = Path(__file__).resolve().parents[2]
PARITY = runpy.run_path(str(ROOT / "benchmarks" / "parity.py"))
BOUND: float = PARITY["BOUND"]
SPEC, WEIGHTS = read_onnx(DEFAULT_MODEL)
WINDOWS: FloatArray = PARITY["windows"](SPEC)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.float64]:
    # NumPy's threads wait for each other spinning: beside other work two of them take ten times as long as one.
    folder = tmp_path_factory.mktemp("exact")
    np.save(folder / "windows.npy", WINDOWS)
    program = (
        "import sys, numpy as np\n"
        "from backends.model import DEFAULT_MODEL, read_onnx, reference\n"
        "np.save(sys.argv[2], reference(*read_onnx(DEFAULT_MODEL), np.load(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", program, str(folder / "windows.npy"), str(folder / "exact.npy")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, check=True, timeout=300)
    scores: npt.NDArray[np.float64] = np.load(folder / "exact.npy")
    return scores


def of_onnxruntime() -> Run:
    from backends._onnxruntime import quiet_options

    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(DEFAULT_MODEL), quiet_options(), providers=["CPUExecutionProvider"])
    return lambda features: np.asarray(session.run(None, {"features": features})[0])


def of_torch(module: Any) -> Run:
    import torch

    def run(features: FloatArray) -> FloatArray:
        with torch.inference_mode():
            return np.array(module(torch.from_numpy(features)).numpy())

    return run


@pytest.fixture(scope="module", params=["onnxruntime", "torch", "torch-exported"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Give the whole output of the model in a runtime, with one thread."""
    if request.param == "onnxruntime":
        return of_onnxruntime()
    torch = pytest.importorskip("torch")
    from backends import _torch_model

    torch.set_num_threads(1)
    if request.param == "torch":
        return of_torch(_torch_model.build(SPEC, WEIGHTS))
    path = tmp_path_factory.mktemp("exported") / "acoustic.pt2"
    _torch_model.export(SPEC, WEIGHTS, path)
    return of_torch(_torch_model.load_exported(path)[0])


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 90])
def test_scores_are_those_of_double_precision(run: Run, exact: npt.NDArray[np.float64], batch: int) -> None:
    found = np.concatenate([run(WINDOWS[at : at + batch]) for at in range(0, len(WINDOWS), batch)])
    assert found.shape == exact.shape and found.dtype == np.float32
    difference = float(np.abs(found - exact).max() / np.abs(exact).max())
    assert difference <= BOUND, f"{difference:.1e} of the largest score"
    other = np.argwhere(found.argmax(-1) != exact.argmax(-1))
    assert not len(other), f"{len(other)} rows have another best token, the first {other[0]}"


def test_the_windows_are_speech_and_noise_and_no_best_token_is_a_matter_of_rounding(
    exact: npt.NDArray[np.float64],
) -> None:
    assert len(WINDOWS) == 26 + 64, "26 s of speech, and noise"
    assert len(np.unique(exact.argmax(-1))) > SPEC.vocabulary // 2, "the windows hardly differ"
    margin = PARITY["smallest_margin"](exact)
    assert margin > 2 * BOUND, f"the closest call is {margin:.1e}: with another seed the best token could be either"


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_same_batch_gives_the_same_bits_wherever_it_lies_in_memory(run: Run, batch: int) -> None:
    first = run(WINDOWS[:batch])
    for shift in (0, 1, 4, 16):
        moved = np.empty(batch * SPEC.window_frames * N_MELS + shift, np.float32)[shift:]
        moved = moved.reshape(batch, SPEC.window_frames, N_MELS)
        moved[:] = WINDOWS[:batch]
        run(WINDOWS[batch : 2 * batch])
        assert np.array_equal(run(moved), first), f"{shift * 4} bytes further, the scores are others"


def test_a_bound_that_catches_less_precise_arithmetic(exact: npt.NDArray[np.float64]) -> None:
    # Weights with the 10 bits of TF32, the rest exact: what a device does to a product unless it is told not to.
    rounded = {name: _with_ten_bits(array) for name, array in WEIGHTS.items()}
    scores = reference(SPEC, rounded, WINDOWS[:4])
    assert np.abs(scores - exact[:4]).max() / np.abs(exact).max() > 20 * BOUND


def _with_ten_bits(array: FloatArray) -> FloatArray:
    return ((array.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(context_frames=0, chunk_frames=2, channels=1, width=2, heads=1, layers=1, vocabulary=2),
        ModelSpec(context_frames=10, chunk_frames=30, channels=3, width=12, heads=3, layers=2, vocabulary=5),
    ],
    ids=["smallest", "odd"],
)
def test_another_shape_is_computed_alike(spec: ModelSpec, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    ort = pytest.importorskip("onnxruntime")
    from backends import _torch_model
    from backends.model import to_onnx

    path = tmp_path / "other.onnx"
    path.write_bytes(to_onnx(spec).SerializeToString())
    features = np.random.RandomState(2).standard_normal((3, spec.window_frames, N_MELS)).astype(np.float32)
    exact = reference(spec, weights(spec), features)
    with torch.inference_mode():
        in_torch = _torch_model.build(*read_onnx(path))(torch.from_numpy(features)).numpy()
    in_ort = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"features": features})[0]
    for found in (in_torch, in_ort):
        assert np.abs(found - exact).max() / np.abs(exact).max() <= BOUND


def test_the_benchmark_measures_and_writes_between_its_markers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "parity.md"
    begin, end = PARITY["BEGIN"], PARITY["END"]
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    main = PARITY["main"]
    # The names that main reads are those of the module it was run as.
    main.__globals__.update(PAGE=page, BATCHES=(3,), windows=lambda _: WINDOWS[:4])
    assert main(["--write"]) == 0
    written = page.read_text(encoding="utf-8")
    assert written.startswith(f"before\n{begin}\n") and written.endswith(f"{end}\nafter\n") and "old" not in written
    assert "| `cpu` | onnxruntime " in written and "200 of 200 rows | pass |" in written
    assert written.partition(begin)[2].partition(end)[0].strip() == capsys.readouterr().out.strip()


def test_the_benchmark_fails_what_is_further_away() -> None:
    parity = PARITY["Parity"]
    assert parity("a", "r", BOUND, 10, 10).kept
    assert not parity("a", "r", BOUND * 1.01, 10, 10).kept, "a difference above the bound"
    assert not parity("a", "r", BOUND, 9, 10).kept, "a row with another best token"
    assert "9 of 10 rows | fail" in PARITY["table"]([parity("a", "r", BOUND, 9, 10)])
