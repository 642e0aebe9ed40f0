"""Every message of the corpus gets its diagnosis; what can be raised on this machine still says the same.

Where a runtime is not installed (CuPy, JAX, TensorFlow ...), only the module, the name and the base of its type are
reproduced: such a case proves that type and text are recognised, and nothing about the runtime.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.errors import Diagnosis, ErrorKind, Shortage, classify, diagnose

#: As in test_benchmarks.py: tests run benchmarks, and import none.
BENCHMARK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "error_messages.py"))
BUILD = BENCHMARK["build"]
CORPUS = BENCHMARK["load"]()
BY_ID = {message.id: message for message in CORPUS}
LIVE = [message.id for message in CORPUS if message.live]
TORCH = [name for name in LIVE if name.startswith("torch-") or BY_ID[name].runtime.startswith("torch")]

each = pytest.mark.parametrize("message", CORPUS, ids=[message.id for message in CORPUS])


def _refused(message: Any, error: BaseException) -> str:
    return f"{message.id}: {type(error).__name__}: {str(error)[-200:]!r} is {diagnose(error)}, not {message.expected}"


# The file.


def test_the_corpus_is_large_enough_and_says_where_it_is_from() -> None:
    assert len(BY_ID) == len(CORPUS), "an id is there twice"
    others = [message for message in CORPUS if not message.was_out_of_memory]
    assert len(CORPUS) >= 75 and len(others) >= 25, f"{len(CORPUS)} messages, {len(others)} of them of something else"
    for message in CORPUS:
        assert message.live or message.source.startswith("https://"), f"{message.id}: the source is {message.source!r}"
        assert message.version, f"{message.id}: no version, and not 'not stated' either"
        assert message.type.startswith("builtins.") or message.base, f"{message.id}: {message.type} has no base"
        told = message.expected
        assert told.shortage is None or told.kind.is_oom, f"{message.id}: a shortage, and not out of memory"
        assert not (message.hidden and told.kind.is_oom), f"{message.id}: hidden, and recognised"


@pytest.mark.parametrize("kind", [kind for kind in ErrorKind if kind is not ErrorKind.PROCESS_LOST])
def test_there_is_a_message_of_every_kind(kind: ErrorKind) -> None:
    assert any(message.expected.kind is kind for message in CORPUS), f"no message is {kind}"


@pytest.mark.parametrize("shortage", Shortage)
def test_there_is_a_message_of_every_shortage(shortage: Shortage) -> None:
    assert any(message.expected.shortage is shortage for message in CORPUS), f"no message is {shortage}"


# The diagnosis.


@each
def test_a_message_gets_its_kind_and_shortage(message: Any) -> None:
    error = BUILD(message)
    assert str(error) == message.message, f"{message.id}: the exception says {error}"
    assert diagnose(error) == message.expected, _refused(message, error)
    assert classify(error) is message.expected.kind, f"{message.id} is {classify(error)}"


@each
def test_a_cause_gets_the_same(message: Any) -> None:
    outer = LookupError("the chunk could not be computed")
    outer.__cause__ = BUILD(message)
    assert diagnose(outer) == message.expected, _refused(message, outer)


@each
def test_a_member_of_a_group_gets_the_same(message: Any) -> None:
    group = ExceptionGroup("two", [LookupError("no"), ExceptionGroup("inner", [BUILD(message)])])
    assert diagnose(group) == message.expected, _refused(message, group)


@each
def test_what_was_only_being_handled_does_not_count(message: Any) -> None:
    later = LookupError("something else")
    later.__context__ = BUILD(message)
    assert diagnose(later) == Diagnosis(ErrorKind.OTHER), f"{message.id} in the context makes it {diagnose(later)}"


@each
def test_the_same_words_in_a_value_error_mean_nothing(message: Any) -> None:
    assert diagnose(ValueError(message.message)) == Diagnosis(ErrorKind.OTHER), f"{message.id} as a ValueError"


# The live ones are raised again.

PRELUDE = """
import json

found = {}


def show(name, act):
    try:
        act()
    except Exception as error:
        kind = type(error)
        found[name] = [f"{kind.__module__}.{kind.__qualname__}", str(error)]


def show_refused(name, act):
    def refused():
        with limits.no_host_memory(1 << 20):
            act()

    show(name, refused)


"""

WITHOUT_TORCH = """
import concurrent.futures
import mmap
import os
import resource
import signal
import sqlite3
import tempfile
import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from backends._onnxruntime import quiet_options
from backends.cpu import Cpu
from backends.faults import ballast
from backends.model import BLOCK_MODEL, DEFAULT_MODEL

MIB = 1 << 20
folder = Path(tempfile.mkdtemp())


def session(model):
    options = quiet_options()
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def one_node(node, *inputs):
    kinds = {"x": TensorProto.FLOAT, "i": TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kinds[name], [f"n{name}"]) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [7, -1])],
    )
    opset = [helper.make_opsetid("", 17)]
    return session(helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())


features = np.zeros((16, 150, 80), np.float32)
model, block = session(str(DEFAULT_MODEL)), session(str(BLOCK_MODEL))
arena_off = Cpu(bounded=False).load(DEFAULT_MODEL)
bounded = Cpu()
bounded.limit_memory(96 * MIB)
capped = bounded.load(DEFAULT_MODEL)
reshape = one_node(helper.make_node("Reshape", ["x", "shape"], ["y"]), "x")
gather = one_node(helper.make_node("Gather", ["x", "i"], ["y"]), "x", "i")
eight = np.zeros(8, np.float32)


def elements(count):
    return lambda: block.run(None, {"shape": np.array([count], np.int64)})


show_refused("ort-arena-refused", elements(16 * MIB))
show_refused("ort-arena-refused-bound-output", lambda: bounded.allocate(32 * MIB))
show_refused("ort-arena-off", lambda: arena_off.run(features))
show_refused("ort-load-refused", lambda: session(str(DEFAULT_MODEL)))
show_refused("numpy", lambda: np.ones(64 * MIB, np.uint8))
show_refused("python", lambda: bytearray(64 * MIB))
show_refused("system-enomem", lambda: mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
show_refused("hidden-python-thread", lambda: threading.Thread(target=print).start())

held = ballast.fill(bounded.allocate)
show("ort-arena-cap", lambda: capped.run(features))
show("ort-arena-cap-bound-output", lambda: bounded.allocate(97 * MIB))
ballast.free(held)

show("ort-more-than-a-petabyte", elements(1 << 50))
show("ort-negative-size", elements(-5))
show("ort-size-overflow", elements(1 << 62))
show("ort-invalid-dimensions", lambda: model.run(None, {"features": np.zeros((1, 9, 80), np.float32)}))
show("ort-impossible-reshape", lambda: reshape.run(None, {"x": eight}))
show("ort-index-out-of-bounds", lambda: gather.run(None, {"x": eight, "i": np.array([99], np.int64)}))
show("ort-no-such-file", lambda: session(str(folder / "none.onnx")))
(folder / "bad.onnx").write_bytes(b"no model" * 99)
show("ort-not-a-model", lambda: session(str(folder / "bad.onnx")))
show("ort-missing-library", lambda: quiet_options().register_custom_ops_library("libnone.so"))


def ask_for_a_provider():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ort.InferenceSession(str(BLOCK_MODEL), quiet_options(), providers=["NoSuchProvider"], enable_fallback=0)


show("ort-missing-provider", ask_for_a_provider)
show("numpy-too-big", lambda: np.zeros(1 << 62))
show("numpy-reshape", lambda: np.zeros(10).reshape(3, 4))


def limited(limit, value, act):
    def act_limited():
        before = resource.getrlimit(limit)
        resource.setrlimit(limit, (value, before[1]))
        try:
            act()
        finally:
            resource.setrlimit(limit, before)

    return act_limited


def write(size):
    with (folder / "large").open("wb", buffering=0) as large:
        large.seek(size)
        large.write(b"x")


def full():
    with open("/dev/full", "wb", buffering=0) as device:
        device.write(b"x")


def open_all():
    held = []
    while True:
        held.append(open(os.devnull))


signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
database = sqlite3.connect(folder / "database", isolation_level=None)
database.execute("PRAGMA journal_mode = WAL")
database.execute("CREATE TABLE t (x)")
insert = lambda: database.execute("INSERT INTO t VALUES (zeroblob(200000))")
show("sqlite-disk-io-error", limited(resource.RLIMIT_FSIZE, 64 << 10, insert))
database.close()
tiny = sqlite3.connect(":memory:")
tiny.execute("PRAGMA max_page_count = 2")
tiny.execute("CREATE TABLE t (x)")
show("sqlite-full", lambda: tiny.execute("INSERT INTO t VALUES (zeroblob(100000))"))
tiny.close()
show("system-efbig", limited(resource.RLIMIT_FSIZE, 64 << 10, lambda: write(70_000)))
show("system-enospc", full)
show("system-emfile", limited(resource.RLIMIT_NOFILE, 128, open_all))
show("python-index-sized", lambda: bytearray(1 << 63))
show("python-recursion", lambda: (lambda f: f(f))(lambda f: f(f)))
show("python-key", lambda: {}["memory"])
show("python-timeout", lambda: concurrent.futures.Future().result(timeout=0))
print(json.dumps(found))
"""

WITH_TORCH = """
import tempfile

import torch

MIB = 1 << 20
torch.ones(8, 8) @ torch.ones(8, 8)  # its threads, while there is memory for them
weights = tempfile.NamedTemporaryFile()
weights.truncate(64 * MIB)


def load_mapped():
    torch.from_file(weights.name, shared=False, size=64 * MIB, dtype=torch.uint8)


show_refused("torch-cpu-refused", lambda: torch.empty(64 * MIB, dtype=torch.uint8))
show_refused("torch-mmap-refused", load_mapped)
torch.empty(64 * MIB, dtype=torch.uint8)  # and memory works again
show("torch-more-than-a-petabyte", lambda: torch.empty(1 << 52, dtype=torch.uint8))
show("torch-invalid-for-input-of-size", lambda: torch.zeros(10).view(3, 4))
show("torch-negative-dimension", lambda: torch.empty(-1))
show("torch-size-overflow", lambda: torch.empty(1 << 62))
show("torch-shapes-do-not-fit", lambda: torch.zeros(3, 4) @ torch.zeros(5, 6))
show("torch-index-out-of-range", lambda: torch.nn.functional.embedding(torch.tensor([11]), torch.zeros(10, 2)))
linear = torch.nn.Linear(2, 2, bias=False)
show("torch-state-dict", lambda: linear.load_state_dict({"weight": torch.zeros(3, 3)}))
if torch.version.cuda is None and torch.version.hip is None:
    show("torch-without-cuda", lambda: torch.zeros(1, device="cuda"))
    show("torch-pinned-memory-without-a-device", lambda: torch.zeros(1).pin_memory())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def _shared() -> dict[str, Any]:
    return {}


@pytest.fixture
def raised(_shared: dict[str, Any], in_child: Callable[[str], Any]) -> Callable[[str], dict[str, list[str]]]:
    """Give what a program saw in a child, run once: (type, text) by id."""

    def run(program: str) -> dict[str, list[str]]:
        if program not in _shared:
            _shared[program] = in_child(PRELUDE + program)
        seen: dict[str, list[str]] = _shared[program]
        return seen

    return run


def _masked(text: str) -> str:
    return re.sub(r"-?\d+", "N", re.sub(r"/[^\s:,>']*", "PATH", text))


def _compare(name: str, seen: dict[str, list[str]]) -> None:
    message = BY_ID[name]
    assert name in seen, f"{name} was not raised; raised were {sorted(seen)}"
    kind, text = seen[name]
    recorded = (message.type, _masked(message.message))
    said = (kind, _masked(text)[: len(recorded[1])])
    assert said == recorded, f"{message.runtime} says it in other words now: record {name} anew, from {kind}: {text!r}"


@pytest.mark.parametrize("name", [name for name in LIVE if name not in TORCH])
def test_a_live_message_is_what_is_raised(name: str, raised: Callable[[str], dict[str, list[str]]]) -> None:
    _compare(name, raised(WITHOUT_TORCH))


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed here")
@pytest.mark.parametrize("name", TORCH)
def test_a_live_message_of_torch_is_what_is_raised(name: str, raised: Callable[[str], dict[str, list[str]]]) -> None:
    seen = raised(WITH_TORCH)
    if name in ("torch-without-cuda", "torch-pinned-memory-without-a-device") and name not in seen:
        pytest.skip("this torch is built for a device")
    _compare(name, seen)


# The comparison with accelerate.


def test_the_table_counts_what_each_side_recognises() -> None:
    messages = [BY_ID[name] for name in ("torch-cuda-full", "ort-arena-off", "cupy", "hidden-llama-cpp", "python-key")]
    everything = BENCHMARK["table"](messages, [("all", lambda _: True), ("ours", lambda e: classify(e).is_oom)])
    assert "torch (of 1) | ONNX Runtime (of 1) | others (of 2) | false alarms (of 1)" in everything, everything
    assert "| all | 1 | 1 | 2 | 1 |" in everything and "| ours | 1 | 1 | 1 | 0 |" in everything, everything
    assert "- all on `python-key`" in everything and "- ours" not in everything, everything


def test_without_accelerate_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.utils.memory", None)
    document = tmp_path / "document.md"
    document.write_text("as it was", encoding="utf-8")
    monkeypatch.setitem(BENCHMARK["main"].__globals__, "DOCUMENT", document)
    assert BENCHMARK["main"](["--write"]) == 1, "the exit status"
    assert document.read_text(encoding="utf-8") == "as it was", "the document was written"
    assert "pip install accelerate" in capsys.readouterr().err, "it is not said how to get it"


def test_the_documents_table_is_of_this_corpus() -> None:
    ours = BENCHMARK["table"](CORPUS, [("`backends.errors.classify`", lambda error: classify(error).is_oom)])
    page = BENCHMARK["DOCUMENT"].read_text(encoding="utf-8")
    for line in ours.splitlines()[:3]:
        assert line in page, (
            f"{line} is not in {BENCHMARK['DOCUMENT']}: run python -m benchmarks.error_messages --write"
        )
