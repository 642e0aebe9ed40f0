"""The cpu backend: limits are refused or proved, bad models and bad features are named, the working set is true."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from backends._device import resident_bytes
from backends._onnxruntime import OrtModel
from backends.contract import BackendError, FaultPlan, Model, ModelError, Site
from backends.cpu import Cpu
from backends.errors import ErrorKind, classify
from backends.faults import ballast
from backends.model import DEFAULT_MODEL, ModelSpec, to_onnx

MIB = 1 << 20


def _features(batch: int) -> Any:
    return np.random.RandomState(3).standard_normal((batch, 150, 80)).astype(np.float32)


def _runs(model: Model, batch: int) -> bool:
    """Say whether a batch runs; False where the device has no memory for it."""
    try:
        model.run(_features(batch))
    except Exception as error:
        if classify(error) is not ErrorKind.DEVICE_OOM:
            raise
        return False
    return True


def _most(device: Cpu) -> int:
    """Measure how much of the device can be had at once."""
    held = ballast.fill(device.allocate)
    total = sum(piece.size_bytes for piece in held)
    ballast.free(held)
    device.release_cached()
    return total


# Limits.


@pytest.mark.parametrize("limit", [-1, 0, 4096, MIB - 1, 1 << 60])
def test_an_absurd_limit_is_refused_with_what_was_expected(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"limit_bytes is {limit}: expected at least 1048576"):
        Cpu().limit_memory(limit)


@pytest.mark.parametrize("limit", [True, 96.0 * MIB, "96 MiB", None], ids=str)
def test_a_limit_that_is_not_a_whole_number_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match=rf"limit_bytes is {re.escape(repr(limit))}: expected a whole number of bytes"):
        Cpu().limit_memory(limit)


def test_a_refused_limit_leaves_the_one_before(bounded: Cpu) -> None:
    with pytest.raises(ValueError, match="limit_bytes is 5"):
        bounded.limit_memory(5)
    assert bounded.memory().limit_bytes == 96 * MIB, f"the limit is {bounded.memory().limit_bytes}"
    assert _most(bounded) <= 96 * MIB, "more than the limit can be had"


@pytest.mark.parametrize("mib", [4, 32, 160])
def test_a_limit_is_exact(mib: int) -> None:
    device = Cpu()
    device.limit_memory(mib * MIB)
    most = _most(device)
    assert 0.95 * mib * MIB <= most <= mib * MIB, f"{most} bytes can be had under a limit of {mib} MiB"


def test_a_limit_can_be_changed() -> None:
    device = Cpu()
    found = []
    for mib in (64, 16, 32):
        device.limit_memory(mib * MIB)
        found.append(round(_most(device) / MIB))
    assert found == [64, 16, 32], f"MiB that can be had under limits of 64, 16 and 32: {found}"


def test_a_session_keeps_its_cap_when_another_device_is_limited() -> None:
    small = Cpu()
    small.limit_memory(16 * MIB)
    model = small.load(DEFAULT_MODEL)
    large = Cpu()
    large.limit_memory(160 * MIB)
    large.load(DEFAULT_MODEL).run(_features(16))
    model.run(_features(2))
    with pytest.raises(Exception, match="Available memory of") as caught:
        model.run(_features(16))
    assert classify(caught.value) is ErrorKind.DEVICE_OOM, f"the error is {caught.value!r}"
    assert _most(small) <= 16 * MIB, "the smaller device has grown"


def test_a_device_never_takes_another_devices_arena_unnoticed() -> None:
    first, second = Cpu(), Cpu()
    first.limit_memory(16 * MIB)
    second.limit_memory(160 * MIB)
    with pytest.raises(BackendError, match=r"another device .* call limit_memory again"):
        first.load(DEFAULT_MODEL)
    first.limit_memory(16 * MIB)
    model = first.load(DEFAULT_MODEL)
    with pytest.raises(Exception, match="Available memory of"):
        model.run(_features(16))


def test_weights_that_do_not_fit_are_refused_and_the_cap_holds() -> None:
    # The runtime takes weights past its cap; the count of what is left then wraps around zero, and the cap is gone.
    device = Cpu()
    device.limit_memory(2 * MIB)
    with pytest.raises(Exception, match="Available memory of") as caught:
        device.load(DEFAULT_MODEL)
    assert classify(caught.value) is ErrorKind.DEVICE_OOM, f"the error is {caught.value!r}"
    assert _most(device) <= 2 * MIB, "the cap is gone"


def test_a_model_cannot_be_loaded_on_a_full_device_and_the_cap_holds(bounded: Cpu) -> None:
    held = ballast.fill(bounded.allocate)
    with pytest.raises(Exception, match="Available memory of") as caught:
        bounded.load(DEFAULT_MODEL)
    with pytest.raises(RuntimeError, match="Available memory of"):
        bounded.allocate(MIB)
    ballast.free(held)
    assert classify(caught.value) is ErrorKind.DEVICE_OOM, f"the error is {caught.value!r}"
    bounded.load(DEFAULT_MODEL).run(_features(16))


@pytest.mark.parametrize("size", [-1, 0, 3])
def test_an_allocation_that_makes_no_sense_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size_bytes is {size}: expected at least 4"):
        Cpu().allocate(size)


# Readings.


def test_the_reading_follows_what_is_held_and_says_that_it_is_an_estimate(bounded: Cpu) -> None:
    reading = bounded.memory()
    assert not reading.exact and reading.source.startswith("estimate"), f"the reading is {reading}"
    held = bounded.allocate(24 * MIB)
    during = bounded.memory()
    assert during.used_bytes == 24 * MIB and during.fraction == 0.25, f"24 of 96 MiB are held: {during}"
    held.free()
    assert bounded.memory().used_bytes == 0, f"after freeing: {bounded.memory()}"


def test_an_allocation_that_is_dropped_leaves_the_account() -> None:
    device = Cpu()
    held = [device.allocate(MIB)]
    held.clear()
    assert device.memory().used_bytes == 0, f"after dropping the only reference: {device.memory()}"


def test_weights_count_while_a_model_is_loaded(bounded: Cpu) -> None:
    before = bounded.memory().used_bytes
    model = bounded.load(DEFAULT_MODEL)
    loaded = bounded.memory().used_bytes - before
    model.close()
    model.close()
    after = bounded.memory().used_bytes
    file_bytes = DEFAULT_MODEL.stat().st_size
    assert 0.8 * file_bytes < loaded < 1.5 * file_bytes, f"{loaded} bytes for a file of {file_bytes}"
    assert after == before, f"{before} bytes before the load, {after} after closing twice"


# Running.


def test_the_working_set_is_true_within_a_fifth() -> None:
    """A run fits in the weights and its working set plus 20 %, and does not fit in 60 % of the working set."""
    measured = Cpu().load(DEFAULT_MODEL)
    assert isinstance(measured, OrtModel), f"the model is a {type(measured).__name__}"
    for batch in (4, 8, 16):
        needs = measured.working_set_bytes(batch)
        for share, expected in ((1.2, True), (0.6, False)):
            device = Cpu()
            device.limit_memory(measured.weights_bytes + int(needs * share))
            model = device.load(DEFAULT_MODEL)
            ran = _runs(model, batch)
            assert ran is expected, f"a batch of {batch} said to need {needs} bytes: with {share:.0%} of them {ran}"


def test_the_working_set_grows_with_the_batch(bounded: Cpu) -> None:
    model = bounded.load(DEFAULT_MODEL)
    sizes = [model.working_set_bytes(batch) for batch in (1, 2, 4, 8, 16)]
    assert sizes == sorted(set(sizes)) and sizes[-1] > 20 * MIB, f"working sets are {sizes}"


def test_results_are_bit_for_bit_the_same_for_the_same_batch(bounded: Cpu) -> None:
    features = _features(8)
    model = bounded.load(DEFAULT_MODEL)
    first = model.run(features)
    assert first.shape == (8, 50, 32) and first.dtype == np.float32, f"scores are {first.dtype} {first.shape}"
    for _ in range(3):
        assert np.array_equal(model.run(features), first), "a second run of the same batch differs"
    assert np.array_equal(bounded.load(DEFAULT_MODEL).run(features), first), "another session's scores differ"
    assert np.array_equal(bounded.fallback().load(DEFAULT_MODEL).run(features), first), "the fallback's scores differ"


def test_scores_do_not_keep_the_runtimes_buffer(bounded: Cpu) -> None:
    scores = bounded.load(DEFAULT_MODEL).run(_features(2))
    assert scores.base is None and scores.flags.owndata, "the scores are a view of the runtime's memory"


@pytest.mark.parametrize(
    "features",
    [
        np.zeros((1, 149, 80), np.float32),
        np.zeros((1, 150, 81), np.float32),
        np.zeros((150, 80), np.float32),
        np.zeros((0, 150, 80), np.float32),
        np.zeros((1, 150, 80), np.float64),
    ],
    ids=["frames", "mels", "rank", "empty", "dtype"],
)
def test_features_of_another_shape_are_refused(features: Any, bounded: Cpu) -> None:
    shape = re.escape(f"{features.dtype} {list(features.shape)}")
    with pytest.raises(ModelError, match=rf"features are {shape}: expected float32 \[batch, 150, 80\]"):
        bounded.load(DEFAULT_MODEL).run(features)


def test_an_unloaded_model_says_so(bounded: Cpu) -> None:
    model = bounded.load(DEFAULT_MODEL)
    model.close()
    with pytest.raises(ModelError, match="was unloaded: load it again"):
        model.run(_features(1))


# Models.


def _linear(path: Path, inputs: list[Any], outputs: list[Any], nodes: list[Any] | None = None) -> Path:
    """Write a model that passes its first input on."""
    nodes = nodes or [helper.make_node("Identity", [inputs[0].name], [outputs[0].name])]
    graph = helper.make_graph(nodes, "other", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def _float(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def test_a_missing_model_is_named(bounded: Cpu, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model file .*none\.onnx: expected an ONNX file"):
        bounded.load(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"no model", DEFAULT_MODEL.read_bytes()[:1000]], ids=["empty", "text", "cut"])
def test_a_file_that_does_not_load_is_named(bounded: Cpu, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx does not load|bad\.onnx has the inputs"):
        bounded.load(path)


def test_a_model_with_other_inputs_is_named_with_what_was_expected(bounded: Cpu, tmp_path: Path) -> None:
    cases = {
        "samples": [_float("samples", "batch", 16_000)],
        "fixed": [_float("x", 1, 150, 80)],
        "mels": [_float("x", "batch", 150, 40)],
        "two": [_float("x", "batch", 150, 80), _float("state", "batch", 8)],
    }
    for name, inputs in cases.items():
        rank = len(inputs[0].type.tensor_type.shape.dim)
        path = _linear(tmp_path / f"{name}.onnx", inputs, [_float("y", *["a"] * rank)])
        with pytest.raises(ModelError, match=rf"{name}\.onnx has the inputs .*expected one .*\[batch, frames, 80\]"):
            bounded.load(path)
    path = _linear(
        tmp_path / "int.onnx",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["b", 150, 80])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["b", 150, 80])],
    )
    with pytest.raises(ModelError, match=r"int\.onnx has the inputs x tensor\(int64\)"):
        bounded.load(path)


def test_a_model_with_other_windows_is_named_with_what_was_expected(bounded: Cpu, tmp_path: Path) -> None:
    path = _linear(tmp_path / "w.onnx", [_float("x", "batch", 60, 80)], [_float("y", "batch", 60, 80)])
    with pytest.raises(ModelError, match=r"takes windows of 60 frames: expected 150 \(50 of left context and 100 of"):
        bounded.load(path)


def test_a_model_with_other_outputs_is_named_with_what_was_expected(bounded: Cpu, tmp_path: Path) -> None:
    path = _linear(tmp_path / "o.onnx", [_float("x", "batch", 150, 80)], [_float("y", "batch", 150, 80)])
    with pytest.raises(ModelError, match=r"has the outputs y .*expected one of shape \[batch, 75, vocabulary\]"):
        bounded.load(path)


def test_a_model_with_broken_metadata_is_named(bounded: Cpu, tmp_path: Path) -> None:
    model = to_onnx(ModelSpec(layers=1, width=16, channels=4))
    for text in ("{", '{"colour": 1}', '{"chunk_frames": 3}', "[]"):
        helper.set_model_props(model, {"plimsoll.spec": text})
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(ModelError, match=r"m\.onnx has unusable metadata plimsoll\.spec"):
            bounded.load(tmp_path / "m.onnx")


def test_a_model_of_another_size_runs(bounded: Cpu, tmp_path: Path) -> None:
    spec = ModelSpec(context_frames=20, chunk_frames=40, layers=1, width=16, channels=4, vocabulary=7)
    onnx.save(to_onnx(spec), tmp_path / "small.onnx")
    model = bounded.load(tmp_path / "small.onnx")
    scores = model.run(np.zeros((2, 60, 80), np.float32))
    found = (model.window_frames, model.chunk_frames, model.vocabulary, scores.shape)
    assert found == (60, 40, 7, (2, 20, 7)), f"window, chunk, vocabulary, scores are {found}"
    assert dataclasses.asdict(spec)["vocabulary"] == scores.shape[2], "the vocabulary is the spec's"


# The fallback.


def test_the_fallback_has_no_limit_and_no_device_faults(bounded: Cpu) -> None:
    bounded.load(DEFAULT_MODEL)
    fallback = bounded.fallback()
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)) as fault:
        fallback.load(DEFAULT_MODEL).run(_features(16))
        record = fault.record()
    assert fallback.memory().limit_bytes is None, f"the fallback's reading is {fallback.memory()}"
    assert (bounded.device, fallback.device) == ("cpu:arena", "cpu"), f"{bounded.device} and {fallback.device}"
    assert record.points_seen == 0, f"a run on the fallback was counted as one on the device: {record}"


def test_a_device_fault_needs_a_limit() -> None:
    with pytest.raises(ValueError, match="device_memory needs a device with a memory limit: call limit_memory first"):
        Cpu().arm(FaultPlan(Site.DEVICE_MEMORY))


def test_without_a_limit_nothing_is_kept_after_a_run() -> None:
    backend = Cpu()
    model = backend.load(DEFAULT_MODEL)
    features = np.zeros((16, model.window_frames, 80), np.float32)
    model.run(features)
    backend.release_cached()
    before = resident_bytes()
    model.run(features)
    backend.release_cached()
    kept = resident_bytes() - before
    model.close()
    backend.close()
    assert kept < 8 << 20, f"{kept} bytes are kept after a run of {model.working_set_bytes(16)}"
