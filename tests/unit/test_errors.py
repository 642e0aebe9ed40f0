"""Errors are classified as they are raised: the live shapes are raised here for real, and so are the look-alikes."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from backends._onnxruntime import quiet_options
from backends.contract import ModelError
from backends.cpu import Cpu
from backends.errors import ErrorKind, classify
from backends.faults import ballast
from backends.model import BLOCK_MODEL, DEFAULT_MODEL

MIB = 1 << 20


def _raised(act: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what the callers judge
        act()
    return caught.value


def _expect(error: BaseException, kind: ErrorKind) -> None:
    found = classify(error)
    assert found is kind, f"{type(error).__name__}: {str(error)[-200:]!r} is {found}, expected {kind}"


def _session(model: Path | bytes, **options: Any) -> Any:
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, quiet_options(), providers=["CPUExecutionProvider"], **options)


# Raised here, in this process: a capped arena.


def test_the_arena_at_its_cap_in_a_run(bounded: Cpu) -> None:
    model = bounded.load(DEFAULT_MODEL)
    held = ballast.fill(bounded.allocate)
    error = _raised(lambda: model.run(np.zeros((4, 150, 80), np.float32)))
    ballast.free(held)
    assert type(error).__name__ == "Fail" and not isinstance(error, RuntimeError), f"the type is {type(error).__mro__}"
    assert "Available memory of" in str(error), f"the text is {error}"
    _expect(error, ErrorKind.DEVICE_OOM)


def test_the_arena_at_its_cap_in_a_run_with_bound_outputs(bounded: Cpu) -> None:
    error = _raised(lambda: bounded.allocate(97 * MIB))
    assert type(error) is RuntimeError and str(error).startswith("Error in execution"), f"it is {error!r}"
    _expect(error, ErrorKind.DEVICE_OOM)


# Raised in a child process, where the host refuses.

HOST_SHAPES = """
import json
import numpy as np, onnxruntime as ort
from backends._onnxruntime import quiet_options
from backends.cpu import Cpu
from backends.errors import classify
from backends.model import BLOCK_MODEL, DEFAULT_MODEL

MIB = 1 << 20
features = np.zeros((16, 150, 80), np.float32)
block = {"shape": np.array([16 * MIB], np.int64)}
arena_off = Cpu(bounded=False).load(DEFAULT_MODEL)
arena_on = ort.InferenceSession(str(BLOCK_MODEL), quiet_options(), providers=["CPUExecutionProvider"])
bounded = Cpu()
bounded.limit_memory(96 * MIB)
capped = bounded.load(DEFAULT_MODEL)
acts = {
    "arena off": lambda: arena_off.run(features),
    "arena on": lambda: arena_on.run(None, block),
    "capped arena": lambda: capped.run(features),
    "bound output": lambda: bounded.allocate(32 * MIB),
    "load": lambda: Cpu(bounded=False).load(DEFAULT_MODEL),
    "numpy": lambda: np.ones(64 * MIB, np.uint8),
    "bytearray": lambda: bytearray(64 * MIB),
    "list": lambda: [0] * (8 * MIB),
}
found = {}
for name, act in acts.items():
    try:
        with limits.no_host_memory(MIB):
            act()
    except Exception as error:
        found[name] = [type(error).__module__, type(error).__name__, str(error), classify(error).value]
    act()  # and memory works again
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def _shared() -> dict[str, Any]:
    return {}


@pytest.fixture
def host_shapes(_shared: dict[str, Any], in_child: Callable[[str], Any]) -> dict[str, list[str]]:
    """Give what a child saw when its host refused: (module, type, text, kind) by name. Run once."""
    if not _shared:
        _shared.update(in_child(HOST_SHAPES))
    return _shared


@pytest.mark.parametrize(
    ("name", "types", "text"),
    [
        ("arena off", {"RuntimeException"}, "std::bad_alloc"),
        ("arena on", {"Fail"}, "Failed to allocate memory for requested buffer of size"),
        ("capped arena", {"Fail"}, "Failed to allocate memory for requested buffer of size"),
        ("bound output", {"RuntimeError"}, "Failed to allocate memory for requested buffer of size"),
        ("load", {"MemoryError", "Fail", "RuntimeException"}, "std::bad_alloc"),
        ("numpy", {"MemoryError", "_ArrayMemoryError"}, "Unable to allocate"),
        ("bytearray", {"MemoryError"}, ""),
        ("list", {"MemoryError"}, ""),
    ],
)
def test_the_host_refuses(host_shapes: dict[str, list[str]], name: str, types: set[str], text: str) -> None:
    assert name in host_shapes, f"{name} was not refused; refused were {sorted(host_shapes)}"
    _, type_name, message, kind = host_shapes[name]
    assert type_name in types, f"{name} raised {type_name}: {message}"
    assert text in message, f"{name} raised {type_name} with the text {message!r}"
    assert kind == ErrorKind.HOST_OOM.value, f"{name}: {type_name}: {message!r} is {kind}"


def test_pythons_own_has_no_text(host_shapes: dict[str, list[str]]) -> None:
    assert host_shapes["bytearray"][2] == "", f"the text is {host_shapes['bytearray'][2]!r}"


def test_the_system_says_enomem() -> None:
    error = _raised(lambda: mmap.mmap(-1, 1 << 47))
    assert isinstance(error, OSError) and error.errno == errno.ENOMEM, f"it is {error!r}"
    _expect(error, ErrorKind.HOST_OOM)


# Look-alikes, raised here.


def test_a_full_disk_is_not_out_of_memory() -> None:
    def write() -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    error = _raised(write)
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC, f"it is {error!r}"
    _expect(error, ErrorKind.OTHER)


def test_too_many_open_files_is_not_out_of_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []

    def open_all() -> None:
        while True:
            opened.append(os.open(os.devnull, os.O_RDONLY))

    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        error = _raised(open_all)
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert isinstance(error, OSError) and error.errno == errno.EMFILE, f"it is {error!r}"
    _expect(error, ErrorKind.OTHER)


def test_an_input_of_the_wrong_shape_is_not_out_of_memory() -> None:
    session = _session(DEFAULT_MODEL)
    _expect(_raised(lambda: session.run(None, {"features": np.zeros((1, 9, 80), np.float32)})), ErrorKind.OTHER)


@pytest.mark.parametrize("elements", [-5, 1 << 62], ids=["negative", "overflowing"])
def test_an_impossible_size_is_not_out_of_memory(elements: int) -> None:
    session = _session(BLOCK_MODEL)
    _expect(_raised(lambda: session.run(None, {"shape": np.array([elements], np.int64)})), ErrorKind.OTHER)


def test_a_model_that_asks_for_an_impossible_shape_is_not_out_of_memory() -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "impossible",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [7, -1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = _session(model.SerializeToString())
    _expect(_raised(lambda: session.run(None, {"x": np.zeros(8, np.float32)})), ErrorKind.OTHER)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_missing_provider_is_not_out_of_memory() -> None:
    def ask() -> None:
        ort.InferenceSession(str(BLOCK_MODEL), quiet_options(), providers=["NoSuchProvider"], enable_fallback=0)

    error = _raised(ask)
    assert type(error) is RuntimeError, f"it is {error!r}"
    _expect(error, ErrorKind.OTHER)


def test_a_missing_model_file_is_not_out_of_memory(tmp_path: Path) -> None:
    _expect(_raised(lambda: _session(tmp_path / "none.onnx")), ErrorKind.OTHER)
    error = _raised(lambda: Cpu().load(tmp_path / "none.onnx"))
    assert isinstance(error, ModelError), f"it is {error!r}"
    _expect(error, ErrorKind.OTHER)


@pytest.mark.parametrize("kind", [ValueError, KeyError, OSError, AssertionError], ids=lambda t: t.__name__)
def test_the_words_in_somebody_elses_error_mean_nothing(kind: type[Exception]) -> None:
    _expect(kind("CUDA out of memory. Tried to allocate 2.00 GiB. std::bad_alloc"), ErrorKind.OTHER)


# Looked through.


def test_the_cause_of_an_error_decides(bounded: Cpu) -> None:
    def act() -> None:
        try:
            bounded.allocate(97 * MIB)
        except RuntimeError as error:
            raise LookupError("the chunk could not be computed") from error

    _expect(_raised(act), ErrorKind.DEVICE_OOM)


def test_an_error_that_was_only_being_handled_does_not_decide() -> None:
    def act() -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise LookupError("something else") from None

    _expect(_raised(act), ErrorKind.OTHER)


def test_a_group_is_looked_through_however_deep() -> None:
    inner = ExceptionGroup("two", [ValueError("no"), MemoryError()])
    _expect(ExceptionGroup("three", [KeyError("k"), inner]), ErrorKind.HOST_OOM)
    _expect(ExceptionGroup("none of them", [KeyError("k"), ValueError("v")]), ErrorKind.OTHER)


def test_causes_that_go_round_in_a_circle_end() -> None:
    first, second = LookupError("first"), LookupError("second")
    first.__cause__, second.__cause__ = second, first
    _expect(first, ErrorKind.OTHER)


# Recorded texts. They come from CUDA, which is not here: they are not raised, and prove only that they are recognised.

RECORDED = [
    ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.1 GiB", ErrorKind.DEVICE_OOM),
    ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", ErrorKind.DEVICE_OOM),
    ("CUDA driver error: out of memory", ErrorKind.DEVICE_OOM),
    ("CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; expr=cudaMalloc((void**)&p, size);", ErrorKind.DEVICE_OOM),
    ("CUDA failed with error out of memory", ErrorKind.DEVICE_OOM),
    ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", ErrorKind.DEVICE_OOM),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", ErrorKind.DEVICE_OOM),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", ErrorKind.DEVICE_OOM),
    ("!handles_.at(i) INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp", ErrorKind.DEVICE_OOM),
    ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes. Error code 12", ErrorKind.HOST_OOM),
    ("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.", ErrorKind.HOST_OOM),
    ("CUDA error: an illegal memory access was encountered", ErrorKind.DEVICE_STICKY),
    ("CUDA error: device-side assert triggered", ErrorKind.DEVICE_STICKY),
    ("CUDA error: unspecified launch failure", ErrorKind.DEVICE_STICKY),
    ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", ErrorKind.DEVICE_STICKY),
    ("CUDA failure 719: unspecified launch failure ; GPU=0", ErrorKind.DEVICE_STICKY),
    ("CUDA error: invalid argument", ErrorKind.DEVICE_ERROR),
    ("CUDA driver error: device not ready", ErrorKind.DEVICE_ERROR),
    ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", ErrorKind.DEVICE_ERROR),
    ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", ErrorKind.OTHER),
    ("Torch not compiled with CUDA enabled", ErrorKind.OTHER),
]


@pytest.mark.parametrize(("text", "kind"), RECORDED, ids=[text[:40] for text, _ in RECORDED])
def test_a_recorded_text_is_recognised(text: str, kind: ErrorKind) -> None:
    _expect(RuntimeError(text), kind)


def test_kinds_of_memory_and_kinds_of_device_do_not_overlap() -> None:
    assert [k.name for k in ErrorKind if k.is_oom] == ["DEVICE_OOM", "HOST_OOM"], "the kinds that are out of memory"
    assert [k.name for k in ErrorKind if k.is_device_error] == ["DEVICE_ERROR", "DEVICE_STICKY"], "the device's errors"
