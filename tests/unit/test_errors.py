"""Errors are classified as they are raised: the live shapes are raised here for real, and so are the look-alikes."""

from __future__ import annotations

import errno
import itertools
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
from backends.errors import Diagnosis, ErrorKind, RuntimeFailure, Shortage, classify, diagnose, note
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


def test_without_memory_python_compiles_nothing_and_it_is_the_hosts(interposed: Callable[[str], Any]) -> None:
    found = interposed("""
import json, os
from backends.contract import FaultPlan, Site
from backends.errors import classify
from backends.faults.interposer import Control

control, found, nth = Control.attached(), [], 0
while not found or found[-1] is not None:
    nth += 1
    control.prepare(FaultPlan(Site.HOST_ALLOCATION, nth=nth, times=None, min_bytes=512, process=str(os.getpid())))
    control.begin()
    try:
        compile("x = 1", "x", "exec")
    except Exception as error:
        control.end()
        found.append([repr(error), classify(error).value])
    else:
        control.end()
        found.append(None)
print(json.dumps(found[:-1]))
""")
    assert len(found) >= 3, f"only {len(found)} requests of a compilation were refused: nothing is shown"
    others = {text: kind for text, kind in found if kind != ErrorKind.HOST_OOM.value}
    assert not others, f"of {len(found)} errors of a compilation without memory these are something else: {others}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [*((name, ErrorKind.HOST_OOM) for name in ("compile", "exec", "eval")), ("matmul", ErrorKind.OTHER)],
)
def test_of_a_null_without_an_exception_only_the_compilers_is_the_hosts(name: str, expected: ErrorKind) -> None:
    kind = classify(SystemError(f"<built-in function {name}> returned NULL without setting an exception"))
    assert kind is expected, f"that of {name} is {kind}, expected {expected}"


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


def test_an_error_that_was_only_being_handled_does_not_decide(bounded: Cpu) -> None:
    def cope() -> None:
        try:
            bounded.allocate(97 * MIB)
        except RuntimeError:
            raise LookupError("something else")  # noqa: B904 - its context is the point

    def cope_quietly() -> None:
        try:
            bounded.allocate(97 * MIB)
        except RuntimeError:
            raise LookupError("something else") from None

    for act in (cope, cope_quietly):
        error = _raised(act)
        assert isinstance(error.__context__, RuntimeError), f"the context is {error.__context__!r}"
        _expect(error, ErrorKind.OTHER)


def test_a_group_is_looked_through_however_deep() -> None:
    inner = ExceptionGroup("two", [ValueError("no"), MemoryError()])
    _expect(ExceptionGroup("three", [KeyError("k"), inner]), ErrorKind.HOST_OOM)
    _expect(ExceptionGroup("none of them", [KeyError("k"), ValueError("v")]), ErrorKind.OTHER)


def test_causes_that_go_round_in_a_circle_end() -> None:
    first, second = LookupError("first"), LookupError("second")
    first.__cause__, second.__cause__ = second, first
    _expect(first, ErrorKind.OTHER)


def test_a_cause_is_found_at_the_end_of_a_long_chain() -> None:
    error: Exception = MemoryError()
    for number in range(5_000):
        outer = LookupError(f"attempt {number}")
        outer.__cause__ = error
        error = outer
    _expect(error, ErrorKind.HOST_OOM)


@pytest.mark.parametrize("turned", [False, True], ids=["mildest first", "gravest first"])
def test_the_gravest_of_a_group_decides(turned: bool) -> None:
    kinds = [kind for kind in ErrorKind if kind is not ErrorKind.OTHER]
    for mild, grave in itertools.pairwise(kinds):
        members = [RuntimeFailure(mild, "the one"), RuntimeFailure(grave, "the other")]
        _expect(ExceptionGroup("both", members[::-1] if turned else members), grave)


# Said by who knows more than the text.


def test_a_failure_in_another_process_keeps_its_diagnosis() -> None:
    assert diagnose(RuntimeFailure(ErrorKind.DEVICE_LOST, "gone")) == Diagnosis(ErrorKind.DEVICE_LOST)
    capped = RuntimeFailure(ErrorKind.DEVICE_OOM, "full", Shortage.CAPPED)
    assert diagnose(capped) == Diagnosis(ErrorKind.DEVICE_OOM, Shortage.CAPPED), f"it is {diagnose(capped)}"


def test_what_an_adapter_notes_counts_instead_of_the_text() -> None:
    session = _session(BLOCK_MODEL)
    # Refused at once: more than a process can address, and less than what is taken for a wrong size.
    error = _raised(lambda: session.run(None, {"shape": np.array([100 << 40], np.int64)}))
    _expect(error, ErrorKind.HOST_OOM)
    card = Diagnosis(ErrorKind.DEVICE_OOM, Shortage.EXHAUSTED)
    note(error, card)
    outer = LookupError("the chunk could not be computed")
    outer.__cause__ = error
    assert (diagnose(error), diagnose(outer)) == (card, card), f"it is {diagnose(error)}, as a cause {diagnose(outer)}"


# Texts without a report in the corpus. None is raised here: they prove only that they are recognised.

RECORDED = [
    ("CUDA driver error: out of memory", Diagnosis(ErrorKind.DEVICE_OOM)),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", Diagnosis(ErrorKind.DEVICE_OOM)),
    ("HIP error: out of memory", Diagnosis(ErrorKind.DEVICE_OOM)),
    ("CUDA failure 719: unspecified launch failure ; GPU=0", Diagnosis(ErrorKind.DEVICE_STICKY)),
    *(
        (f"CUDA error: {string}", Diagnosis(ErrorKind.DEVICE_STICKY))
        for string in (
            "hardware stack error",
            "an illegal instruction was encountered",
            "misaligned address",
            "operation not supported on global/shared address space",
            "invalid program counter",
            "initialization error",
            "driver shutting down",
        )
    ),
    ("Last error:\nCuda failure 999 'unknown error'", Diagnosis(ErrorKind.DEVICE_STICKY)),
    *(
        (f"CUDA error: {string}", Diagnosis(ErrorKind.DEVICE_LOST))
        for string in (
            "system not yet initialized",
            "system has unsupported display driver / cuda driver combination",
            "forward compatibility was attempted on non supported HW",
            "uncorrectable NVLink error detected during the execution",
            "CUDA driver is a stub library",
        )
    ),
    ("CUDA error: invalid argument", Diagnosis(ErrorKind.DEVICE_ERROR)),
    ("Error 404: not found", Diagnosis(ErrorKind.OTHER)),
    ("the cache is out of memory", Diagnosis(ErrorKind.OTHER)),
]


@pytest.mark.parametrize(("text", "expected"), RECORDED, ids=[text[:40] for text, _ in RECORDED])
def test_a_recorded_text_is_recognised(text: str, expected: Diagnosis) -> None:
    assert diagnose(RuntimeError(text)) == expected, f"{text!r} is {diagnose(RuntimeError(text))}"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, ErrorKind.DEVICE_STICKY) for code in (226, 700, 702, 709, *range(714, 720), 721, 810, 911, 999)),
        *((code, ErrorKind.DEVICE_LOST) for code in (100, 102, 214, 220, 802, 803, 804, 805)),
        # Bad calls, a launch that asks too much (701), one that is too large (720): the context stays good.
        *((code, ErrorKind.DEVICE_ERROR) for code in (1, 77, 101, 209, 600, 701, 711, 720, 801)),
    ],
)
def test_a_code_counts_where_the_words_are_new(code: int, kind: ErrorKind) -> None:
    _expect(RuntimeError(f"CUDA failure {code}: in other words ; GPU=0 ; hostname=h"), kind)


@pytest.mark.parametrize(
    ("free", "allowed", "shortage"),
    [
        ("1.00 GiB", "", Shortage.EXHAUSTED),
        ("1.00 GiB", "9.00 GiB allowed; ", Shortage.EXHAUSTED),
        ("4.00 GiB", "9.00 GiB allowed; ", Shortage.CAPPED),
        ("4.00 GiB", "", None),
        ("1.00 PiB", "", None),
    ],
)
def test_a_cap_is_told_from_a_full_card(free: str, allowed: str, shortage: Shortage | None) -> None:
    text = (
        f"CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB of which {free} is free."
    )
    found = diagnose(RuntimeError(f"{text} {allowed}Of the allocated memory 8.00 GiB is allocated by PyTorch."))
    assert found == Diagnosis(ErrorKind.DEVICE_OOM, shortage), f"with {free} free and {allowed!r} it is {found}"


def test_torchs_type_is_out_of_memory_whatever_it_says() -> None:
    torch = pytest.importorskip("torch")

    derived = type("OurOutOfMemoryError", (torch.OutOfMemoryError,), {})
    for kind in (torch.OutOfMemoryError, derived):
        _expect(kind("in other words"), ErrorKind.DEVICE_OOM)
    _expect(torch.AcceleratorError("in other words"), ErrorKind.OTHER)


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 14049536000 bytes.",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.",
        "RESOURCE_EXHAUSTED: Error loading program 'jit_step': Attempting to reserve 7.82G. There are 5.68G free.",
    ],
)
def test_jaxs_newer_type_is_read(text: str) -> None:
    # Only the name is reproduced: JAX is not here.
    kind = type("JaxRuntimeError", (RuntimeError,), {"__module__": "jax.errors"})
    _expect(kind(text), ErrorKind.DEVICE_OOM)


def test_kinds_of_memory_and_kinds_of_device_do_not_overlap() -> None:
    assert [k.name for k in ErrorKind if k.is_oom] == ["DEVICE_OOM", "HOST_OOM"], "the kinds that are out of memory"
    device = [k.name for k in ErrorKind if k.is_device_error]
    assert device == ["DEVICE_ERROR", "DEVICE_STICKY", "DEVICE_LOST"], "the device's errors"
