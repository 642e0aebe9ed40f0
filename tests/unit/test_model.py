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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.contract import ModelError
from backends.cpu import Cpu
from backends.model import (
    BLOCK_MODEL,
    DEFAULT_MODEL,
    PROBE_MODEL,
    ModelSpec,
    block_to_onnx,
    main,
    probe_to_onnx,
    read_onnx,
    reference,
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
        {"layers": -1},
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


# Reading a file back.

TINY = ModelSpec(context_frames=2, chunk_frames=2, channels=2, width=4, heads=2, layers=1, vocabulary=3)


@pytest.fixture(scope="module")
def tiny() -> bytes:
    return bytes(to_onnx(TINY).SerializeToString())


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Callable[[Any], object]], Path]:
    """Give a maker of a file that is the tiny model, with something done to it."""

    def make(change: Callable[[Any], object]) -> Path:
        model = to_onnx(TINY)
        change(model)
        path = tmp_path / "changed.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return make


def weight(model: Any, name: str) -> Any:
    return next(each for each in model.graph.initializer if each.name == name)


def test_what_is_read_is_what_was_written_and_what_the_onnx_package_reads(tmp_path: Path) -> None:
    for spec, path in ((ModelSpec(), DEFAULT_MODEL), (TINY, tmp_path / "tiny.onnx")):
        if path is not DEFAULT_MODEL:
            onnx.save(to_onnx(spec), path)
        found_spec, found = read_onnx(path)
        assert found_spec == spec
        made = weights(spec)
        assert list(found) == list(made)
        stored = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
        for name, array in found.items():
            assert array.dtype == np.float32 and array.flags.writeable and array.flags.c_contiguous, name
            assert np.array_equal(array, made[name]) and np.array_equal(array, stored[name]), f"{name} differs"


def test_weights_that_were_changed_are_read_as_they_are(changed: Callable[[Callable[[Any], object]], Path]) -> None:
    other = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = changed(
        lambda model: weight(model, "head.weight").CopyFrom(onnx.numpy_helper.from_array(other, "head.weight"))
    )
    assert np.array_equal(read_onnx(path)[1]["head.weight"], other)


def test_reading_needs_no_onnx_package() -> None:
    program = (
        "import sys; sys.modules['onnx'] = None\nfrom backends.model import *; print(len(read_onnx(DEFAULT_MODEL)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "47\n", done.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.ClearField("metadata_props"), "no key plimsoll.spec"),
        (lambda m: setattr(m.metadata_props[0], "value", "["), "unusable"),
        (lambda m: setattr(m.metadata_props[0], "value", "[" * 100_000), "unusable"),
        (lambda m: setattr(m.metadata_props[0], "value", '{"depth": 3}'), "unexpected keyword"),
        (lambda m: setattr(m.metadata_props[0], "value", '{"heads": 0}'), "heads is 0"),
        (
            lambda m: setattr(m.metadata_props[0], "value", "{}"),
            r"conv1.weight has shape \[2, 1, 3, 3\].*\[32, 1, 3, 3\]",
        ),
        (lambda m: m.graph.initializer.pop(0), "no weight conv1.weight"),
        (lambda m: m.graph.initializer.append(onnx.helper.make_tensor("more", 1, [1], [1.0])), "a constant more"),
        (lambda m: setattr(weight(m, "conv1.bias"), "data_type", 10), "conv1.bias has .* type .10., expected float32"),
        (lambda m: setattr(weight(m, "conv1.bias"), "data_location", 1), "conv1.bias is in another file"),
        (
            lambda m: weight(m, "attention.scale").CopyFrom(
                onnx.numpy_helper.from_array(np.array(1, np.float32), "attention.scale")
            ),
            "attention.scale is another",
        ),
        (lambda m: setattr(m.graph.node[2], "op_type", "Tanh"), "node 2 .* Tanh"),
        (lambda m: setattr(m.graph.node[2], "domain", "other"), "node 2 .* other.Relu"),
        (lambda m: m.graph.node[1].attribute[0].ints.__setitem__(0, 2), "node 1 .* Conv"),
        (lambda m: m.graph.node[11].attribute.append(onnx.helper.make_attribute("epsilon", 0.5)), "node"),
        (lambda m: m.graph.node.pop(), "missing"),
        (lambda m: setattr(m.graph.output[0], "name", "norm"), r"gives \['norm'\]"),
    ],
)
def test_a_graph_that_is_not_ours_is_refused_with_the_reason(
    change: Callable[[Any], object], reason: str, changed: Callable[[Callable[[Any], object]], Path]
) -> None:
    with pytest.raises(ModelError, match=f"(?s)not an acoustic model of this project.*{reason}.*FILE.pt2"):
        read_onnx(changed(change))


def test_a_small_model_of_ours_is_no_acoustic_model() -> None:
    for path in (BLOCK_MODEL, PROBE_MODEL):
        with pytest.raises(ModelError, match=r"no key plimsoll\.spec"):
            read_onnx(path)


@pytest.mark.parametrize("data", [b"", b"hello, this is no model", b"PK\x03\x04" + bytes(100), b"\xff" * 64, bytes(64)])
def test_a_file_that_is_not_onnx_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "no.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"no.onnx is not a whole ONNX file \(.*expected"):
        read_onnx(path)


def test_half_a_file_is_called_that(tmp_path: Path, tiny: bytes) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(tiny[: len(tiny) // 2])
    with pytest.raises(ModelError, match=r"half.onnx is not a whole ONNX file \(\d+ bytes are to follow, and \d+ do\)"):
        read_onnx(path)


def test_a_file_that_cannot_be_read_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_onnx(tmp_path / "none.onnx")


def read_or_refuse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        spec, found = read_onnx(path)
    except ModelError:
        return
    assert list(found) == list(weights(spec)), "what is accepted is a whole model"


QUICK = settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tiny: bytes, tmp_path: Path, share: float) -> None:
    path = tmp_path / "short.onnx"
    path.write_bytes(tiny[: int(len(tiny) * share)])
    with pytest.raises(ModelError):
        read_onnx(path)


@QUICK
@given(at=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_refused_or_are_weights(tiny: bytes, tmp_path: Path, at: list[tuple[float, int]]) -> None:
    data = bytearray(tiny)
    for share, flip in at:
        data[int(len(data) * share)] ^= flip
    read_or_refuse(tmp_path / "flipped.onnx", bytes(data))


@QUICK
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError):
        read_onnx(path)


@pytest.mark.parametrize(
    "claim", ['{"layers": 999999999999}', '{"channels": 9999999, "width": 4000000}', '{"chunk_frames": 999999999998}']
)
def test_a_shape_that_the_file_does_not_hold_takes_no_memory(
    claim: str, changed: Callable[[Callable[[Any], object]], Path], in_child: Callable[[str], Any]
) -> None:
    path = changed(lambda model: setattr(model.metadata_props[0], "value", claim))
    program = (
        "import json, resource; from pathlib import Path; from backends.model import *\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        f"try: read_onnx(Path({str(path)!r}))\n"
        "except ModelError as error: print(json.dumps(str(error)))"
    )
    assert "not an acoustic model of this project" in in_child(program)


def test_the_reference_knows_its_context_and_keeps_windows_apart() -> None:
    features = np.random.RandomState(3).standard_normal((9, TINY.window_frames, 80))
    made = weights(TINY)
    scores = reference(TINY, made, features)
    assert scores.shape == (9, 2, 3) and scores.dtype == np.float64
    alone = np.concatenate([reference(TINY, made, features[at : at + 1]) for at in range(9)])
    assert np.allclose(scores, alone, rtol=0, atol=1e-12), "a neighbour in the batch changed the scores"
