"""The model in torch: what a run of it holds, what of FILE.pt2 is taken, and what is refused with which reason."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.contract import ModelError
from backends.model import DEFAULT_MODEL, N_MELS, ModelSpec, main, read_onnx, weights

torch = pytest.importorskip("torch")

from backends import _torch_model  # noqa: E402  (needs torch)

ROOT = Path(__file__).resolve().parents[2]
SPEC = ModelSpec()
#: What this spec's first convolution gives, and the input that it is made of: the peak, in closed form.
FIRST_IMAGE_BYTES = SPEC.channels * SPEC.window_frames * N_MELS * 4
SECOND_IMAGE_BYTES = FIRST_IMAGE_BYTES // 4
INPUT_BYTES = SPEC.window_frames * N_MELS * 4


@pytest.fixture(scope="module")
def module() -> Any:
    torch.set_num_threads(1)
    return _torch_model.build(*read_onnx(DEFAULT_MODEL))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "acoustic.pt2"
    _torch_model.export(*read_onnx(DEFAULT_MODEL), path)
    return path


def zeros(batch: int, spec: ModelSpec = SPEC) -> Any:
    return torch.zeros(batch, spec.window_frames, N_MELS)


# What a run holds.


def test_the_peak_is_the_second_convolution_with_its_input(module: Any) -> None:
    for batch in (1, 3, 16):
        expected = batch * (INPUT_BYTES + FIRST_IMAGE_BYTES + SECOND_IMAGE_BYTES)
        assert _torch_model.peak_bytes(module, SPEC, batch) == expected


def test_the_peak_is_the_same_in_inference_mode_and_for_an_exported_program(module: Any, exported: Path) -> None:
    alone = _torch_model.peak_bytes(module, SPEC, 2)
    with torch.inference_mode():
        assert _torch_model.peak_bytes(module, SPEC, 2) == alone
    program, spec = _torch_model.load_exported(exported)
    assert _torch_model.peak_bytes(program, spec, 2) == alone


def test_tensors_inside_a_composite_operation_count() -> None:
    class Composite(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, features: Any) -> Any:
            # A view that no view can give is a copy.
            return features.transpose(1, 2).reshape(-1)[:8].view(2, 4)

    held = INPUT_BYTES + INPUT_BYTES
    with torch.inference_mode():
        assert _torch_model.peak_bytes(Composite(), SPEC, 1) == held


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("make", ["built", "exported"])
def test_the_peak_is_what_torch_allocates(module: Any, exported: Path, make: str, batch: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    model = module if make == "built" else _torch_model.load_exported(exported)[0]
    with torch.inference_mode():
        model(zeros(batch))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            features = zeros(batch)
            model(features)
    # Every request to torch's allocator on the CPU, of the kernels themselves too, in the order of time.
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    held_bytes = np.cumsum([each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())])
    counted = _torch_model.peak_bytes(model, SPEC, batch)
    assert 1.0 <= held_bytes.max() / counted <= 1.03, f"{held_bytes.max()} bytes allocated, {counted} counted"


def test_the_count_leaves_nothing_behind(module: Any) -> None:
    def tensors() -> int:
        gc.collect()
        # By type: isinstance asks deprecated objects of torch for their class.
        return sum(issubclass(type(each), torch.Tensor | torch.UntypedStorage) for each in gc.get_objects())

    _torch_model.peak_bytes(module, SPEC, 1)
    before = tensors()
    for _ in range(5):
        _torch_model.peak_bytes(module, SPEC, 3)
    assert tensors() == before


def test_counting_does_not_import_the_compiler() -> None:
    program = (
        "import sys; from backends.model import *; from backends._torch_model import *\n"
        "spec, weights = read_onnx(DEFAULT_MODEL)\n"
        "print(peak_bytes(build(spec, weights), spec, 1), 'torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "1968000 False False\n", done.stdout + done.stderr


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_that_cannot_be_is_refused(module: Any, batch: int) -> None:
    with pytest.raises(ValueError, match=f"batch is {batch}: expected at least 1"):
        _torch_model.peak_bytes(module, SPEC, batch)


def test_weights_are_copies_and_want_no_gradient() -> None:
    spec, given = read_onnx(DEFAULT_MODEL)
    module = _torch_model.build(spec, given)
    with torch.inference_mode():
        before = module(zeros(1))
        for array in given.values():
            array[:] = 0
        assert torch.equal(module(zeros(1)), before)
    assert not module.training and not any(each.requires_grad for each in module.parameters())
    assert all(each.data_ptr() % 64 == 0 for each in module.parameters()), "a weight is not aligned as torch aligns"
    assert sum(each.numel() for each in module.parameters()) == sum(each.size for each in given.values())


# FILE.pt2.


def test_an_exported_program_gives_the_same_bits(module: Any, exported: Path) -> None:
    program, spec = _torch_model.load_exported(exported)
    assert spec == SPEC
    features = torch.tensor(
        np.random.RandomState(4).standard_normal((5, SPEC.window_frames, N_MELS)).astype(np.float32)
    )
    with torch.inference_mode():
        for batch in (1, 2, 5):
            assert torch.equal(program(features[:batch]), module(features[:batch])), f"batch {batch}"


def test_the_command_writes_a_program_by_the_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.pt2"
    options = ["--layers", "1", "--width", "8", "--channels", "2", "--vocabulary", "5", "--context-frames", "20"]
    assert main([str(out), *options]) == 0
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size} bytes\n"
    program, spec = _torch_model.load_exported(out)
    assert spec == ModelSpec(layers=1, width=8, channels=2, vocabulary=5, context_frames=20)
    with torch.inference_mode():
        assert torch.equal(program(zeros(2, spec)), _torch_model.build(spec, weights(spec))(zeros(2, spec)))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["x.pt2", "--block"], "--block writes an ONNX file"), (["no/folder.pt2", "--layers", "1"], "No such file")],
)
def test_what_the_command_cannot_write_is_an_error(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / arguments[0]), *arguments[1:]])
    assert reason in capsys.readouterr().err


def save(path: Path, forward: Callable[..., Any], example: Any, free: Any, extra: dict[str, str] | None = None) -> Path:
    """Export a function of a window."""

    class Function(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, features: Any) -> Any:
            return forward(features)

    program = torch.export.export(Function(), (example,), dynamic_shapes=({0: free} if free else None,))
    torch.export.save(program, path, extra_files=extra)
    return path


def halved(features: Any) -> Any:
    return features[:, ::2, :7] * 2


FREE = torch.export.Dim("batch")
AUTO = torch.export.Dim.AUTO


@pytest.mark.parametrize("free", [FREE, AUTO], ids=["named", "auto"])
def test_a_program_of_another_make_is_taken_with_the_default_windows(free: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "other.pt2", halved, zeros(2), free)
    program, spec = _torch_model.load_exported(path)
    assert spec == dataclasses.replace(ModelSpec(), vocabulary=7)
    assert program(zeros(16)).shape == (16, 75, 7)


def test_a_program_says_its_windows_in_the_extra_file(tmp_path: Path) -> None:
    spec = ModelSpec(context_frames=10, chunk_frames=20)
    extra = {"plimsoll.spec": json.dumps({"context_frames": 10, "chunk_frames": 20})}
    path = save(tmp_path / "short.pt2", halved, zeros(2, spec), FREE, extra)
    assert _torch_model.load_exported(path)[1] == dataclasses.replace(spec, vocabulary=7)


@pytest.mark.parametrize(
    ("forward", "example", "free", "reason"),
    [
        (halved, zeros(2), None, r"takes torch.float32 \[2, 150, 80\]: expected .* free"),
        (halved, zeros(2), torch.export.Dim("batch", max=8), r"takes torch.float32 \[s.*no upper bound"),
        (halved, zeros(2).double(), FREE, r"takes torch.float64 \[s\d+, 150, 80\]: expected one input, torch.float32"),
        (halved, torch.zeros(2, 150, 64), FREE, r"takes torch.float32 \[s\d+, 150, 64\]: expected .*150, 80"),
        (halved, torch.zeros(2, 98, 80), FREE, r"takes torch.float32 \[s\d+, 98, 80\]: expected .*150, 80"),
        (lambda x: x[:, :70], zeros(2), FREE, r"gives torch.float32 \[1, 70, 80\] .*expected .*\[1, 75, vocabulary\]"),
        (lambda x: halved(x).double(), zeros(2), FREE, r"gives torch.float64 \[1, 75, 7\]"),
        (lambda x: halved(x)[0], zeros(2), FREE, r"gives torch.float32 \[75, 7\]"),
        (lambda x: (halved(x), x + 1), zeros(2), FREE, "gives a tuple"),
        (lambda x: torch.linalg.inv(halved(x)[:, :7]).new_zeros(1, 75, 7) + halved(x), zeros(2), FREE, "does not run"),
    ],
    ids=["fixed", "bounded", "double", "bands", "frames", "rows", "double-out", "flat", "two", "fails"],
)
def test_a_program_of_another_shape_is_refused(
    forward: Callable[..., Any], example: Any, free: Any, reason: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "wrong.pt2", forward, example, free)
    with pytest.raises(ModelError, match=f"wrong.pt2 {reason}"):
        _torch_model.load_exported(path)


@pytest.mark.parametrize("text", ["[", "[]", '{"depth": 1}', '{"chunk_frames": 3}'])
def test_an_extra_file_that_makes_no_sense_is_refused(text: str, tmp_path: Path) -> None:
    path = save(tmp_path / "odd.pt2", halved, zeros(2), FREE, {"plimsoll.spec": text})
    with pytest.raises(ModelError, match=r"odd.pt2 has an unusable extra file plimsoll.spec"):
        _torch_model.load_exported(path)


def cut(good: Path, path: Path) -> None:
    path.write_bytes(good.read_bytes()[:-1000])


def onnx_file(_: Path, path: Path) -> None:
    path.write_bytes(DEFAULT_MODEL.read_bytes())


def another_zip(_: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


def checkpoint(_: Path, path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, path)


def of_the_future(good: Path, path: Path) -> None:
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("models/model.json"):
                program = json.loads(data)
                program["schema_version"]["major"] += 1
                data = json.dumps(program).encode()
            target.writestr(name, data)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _, path: path.write_bytes(b""), "zip"),
        (cut, "zip"),
        (onnx_file, "zip"),
        (another_zip, ""),
        (checkpoint, "archive_format"),
        (of_the_future, "schema version"),
    ],
    ids=["empty", "cut", "onnx", "zip", "checkpoint", "future"],
)
def test_a_file_that_is_no_program_of_this_torch_is_refused(
    make: Callable[[Path, Path], object], reason: str, exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "no.pt2"
    make(exported, path)
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(
            ModelError, match=rf"no.pt2 is not a program that torch {torch.__version__.split('+')[0]}"
        ) as caught,
    ):
        _torch_model.load_exported(path)
    assert reason.lower() in str(caught.value).lower()
    assert "expected a file of torch.export.save" in str(caught.value)
    assert not [each for each in caplog.records if each.name.startswith("torch.export")], "torch logged it as well"


def test_a_program_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _torch_model.load_exported(tmp_path / "none.pt2")


def test_no_memory_is_not_the_files_fault(exported: Path, in_child: Callable[[str], Any]) -> None:
    program = (
        "import gc, json, psutil; from pathlib import Path; from backends._torch_model import load_exported\n"
        "from backends.errors import classify\n"
        f"path = Path({str(exported)!r})\n"
        "load_exported(path)\n"
        "gc.collect(); psutil.heap_trim()\n"
        "try:\n"
        "    with limits.no_host_memory(1 << 20): load_exported(path)\n"
        "except Exception as error: print(json.dumps([type(error).__name__, classify(error).value]))"
    )
    name, kind = in_child(program)
    assert kind == "host_oom", name
