"""The CUDA backends without a card: what they state, promise and refuse, and what of them runs anywhere.

A card is only named here where one is needed to make a backend: the runtimes are the real ones that are installed.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

import backends
from backends import _build, _cuda, torch_cuda
from backends._cuda import CudaDevice
from backends._device import STICKY_SITES, DeviceBackend
from backends.contract import (
    BackendError,
    Capability,
    FaultPlan,
    FaultRecord,
    Provenance,
    Site,
    Unsupported,
)
from backends.cpu import Cpu
from backends.errors import ErrorKind
from backends.faults import cuda
from backends.faults.cuda import NoDriver, open_driver
from backends.model import BLOCK_MODEL, DEFAULT_MODEL, N_MELS, PROBE_MODEL
from backends.onnxruntime_cuda import OnnxruntimeCuda
from backends.torch_cpu import TorchCpu
from backends.torch_cuda import TorchCuda

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
LIMIT_BYTES = 96 * MIB
KINDS: tuple[type[CudaDevice], ...] = (TorchCuda, OnnxruntimeCuda)
DECLARED = {found.name: found for found in backends.declared()}
CELLS = [(kind, environment) for kind in KINDS for environment in DECLARED[kind.name].environments]
InChild = Callable[[str], Any]


def named(kind: type[Any]) -> Any:
    """Make the backend of a card that is only named: there may be none."""

    class Named(kind):  # type: ignore[misc]  # whichever it is
        def _named(self, device: str | None) -> tuple[str, int]:
            return "cuda:0", 0

    return Named()


#: The same for a program in a child.
NAMED = f"""
from typing import Any
from backends.onnxruntime_cuda import OnnxruntimeCuda
from backends.torch_cuda import TorchCuda

{inspect.getsource(named)}
"""


def _driver_missing() -> str | None:
    try:
        open_driver()
    except NoDriver as error:
        return str(error)
    return None


MISSING = _driver_missing()
without_driver = pytest.mark.skipif(MISSING is None, reason="not run: there is an NVIDIA driver here")
with_torch = pytest.mark.skipif(util.find_spec("torch") is None, reason="not run: torch is not installed here")
with_onnxruntime = pytest.mark.skipif(
    util.find_spec("onnxruntime") is None, reason="not run: ONNX Runtime is not installed here"
)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Give each CUDA backend for a card that is only named, with a limit that nothing here enforces."""
    made = named(request.param)
    made._limit_bytes = LIMIT_BYTES
    yield made
    made.close()


# What they promise.


@pytest.mark.parametrize(("kind", "environment"), CELLS)
def test_an_environments_name_and_its_header_promise_the_same_cuda(kind: type[CudaDevice], environment: str) -> None:
    needs = DECLARED[kind.name].needs[environment]
    assert needs.cuda == _build.promised_cuda(environment), f"{environment} needs CUDA {needs.cuda}"
    assert needs.reason and str(needs.cuda) in needs.reason, f"why these versions: {needs.reason}"


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_declared_for_both_versions_of_cuda_and_tagged(kind: type[CudaDevice]) -> None:
    found = DECLARED[kind.name]
    assert set(found.environments) == {"cuda12", "cuda13"} and "cuda" in found.tags, f"{found}"


@pytest.mark.parametrize(("kind", "environment"), CELLS)
def test_the_pin_of_an_environment_is_one_that_the_header_allows(kind: type[CudaDevice], environment: str) -> None:
    pins = (ROOT / f"constraints/{environment}.txt").read_text(encoding="utf-8")
    for wanted in map(Requirement, DECLARED[kind.name].needs[environment].own):
        pinned = re.findall(rf"(?m)^{wanted.name}==([^\s;]+)", pins)
        assert len(pinned) == 1 and wanted.specifier.contains(pinned[0]), f"{wanted} is pinned at {pinned}: nox -s lock"


def test_what_they_can_do_differs_only_in_what_their_runtimes_can() -> None:
    differ = {each for each in Capability if TorchCuda.capabilities[each].yes != OnnxruntimeCuda.capabilities[each].yes}
    assert differ == {Capability.EXACT_MEMORY_READING, Capability.CACHE_OOM}
    for each in (Capability.DEVICE_ERROR, Capability.DEVICE_MEMORY_OF_OTHERS, Capability.FALLBACK):
        assert all(kind.capabilities[each].yes for kind in KINDS), f"{each.value} is what CUDA is here for"


# What they refuse.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:", "cuda:-1", "cuda:01", "cuda:1 ", "CUDA:0", "cuda:٣"])
def test_a_name_that_is_none_of_a_card_is_refused_with_an_example(kind: type[CudaDevice], name: str) -> None:
    with pytest.raises(BackendError, match=re.escape(f"{kind.name} has no device {name!r}: expected such as 'cuda:0'")):
        kind(name)


@without_driver
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, "cuda:0", "cuda:7"])
def test_without_a_driver_there_is_no_device_and_it_says_what_to_install(
    kind: type[CudaDevice], name: str | None
) -> None:
    with pytest.raises(BackendError, match=rf"{kind.name} has no device here: .*NVIDIA driver") as caught:
        kind(name)
    assert str(MISSING) in str(caught.value)


@pytest.mark.parametrize("environment", [None, "cuda12", "cuda13"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_build_without_cuda_is_refused_with_what_was_found_needed_and_what_to_do(
    kind: type[CudaDevice], environment: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        runtime, built_for = kind._built()
    except ImportError as error:
        pytest.skip(f"not run: {error}")
    if built_for is not None:
        pytest.skip(f"not run: {runtime} is built for CUDA")
    monkeypatch.delenv(_build.ENVIRONMENT, raising=False)
    if environment:
        monkeypatch.setenv(_build.ENVIRONMENT, environment)
    found = kind.probe()
    needed = f"the environment {environment} promises CUDA" if environment else "CUDA is needed"
    assert not found.available and not found.runtime
    assert found.reason.startswith(f"{runtime} is built without CUDA, and {needed}"), found.reason
    assert "reinstall it with -c constraints/" in found.reason, found.reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_runtime_that_is_not_installed_is_named_with_the_session_that_installs_it(
    kind: type[CudaDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    found = kind.probe()
    package = "torch" if kind is TorchCuda else "onnxruntime-gpu"
    assert found.reason == f"{package} is not installed: nox -s memory-quick-cuda12 or -cuda13 installs it"


def test_probing_imports_no_runtime() -> None:
    program = """
import json, sys
import backends
for name in ("torch-cuda", "onnxruntime-cuda"):
    backends.create(name).probe()
print(json.dumps(sorted({"torch", "onnxruntime"} & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [], f"it imports {done.stdout}"


@without_driver
def test_the_child_that_is_to_have_the_card_refuses_and_says_why(device: Any) -> None:
    with pytest.raises(BackendError, match=rf"{device.name} has no device here: .*NVIDIA driver"):
        device.load(DEFAULT_MODEL)
    assert device._keeper is None, "a child that refused is kept"


@without_driver
def test_a_worker_refuses_a_build_that_cannot_run(in_child: InChild) -> None:
    program = """
import json
for kind in (OnnxruntimeCuda, TorchCuda):
    try:
        named(kind)._has_the_device()
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error), kind.probe().reason]))
"""
    kind, text, reason = in_child(NAMED + program)
    assert kind == "BackendError" and text == reason, text


# Faults.


@pytest.fixture
def no_mps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have no MPS daemon's pipe anywhere, and say nothing about device faults."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.delenv(cuda.ALLOW_DEVICE_FAULTS, raising=False)
    if found := cuda._mps():
        pytest.skip(f"not run: MPS is in use here: {found}")
    return tmp_path


@pytest.mark.parametrize("site", STICKY_SITES, ids=lambda site: site.value)
def test_a_sticky_fault_is_armed_only_where_it_was_allowed(
    device: Any, site: Site, no_mps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match=r"was not allowed: .*Xid.*--allow-device-faults"):
        device.arm(FaultPlan(site))
    monkeypatch.setenv(cuda.ALLOW_DEVICE_FAULTS, "1")
    with device.arm(FaultPlan(site)) as fault:
        assert fault.record() == FaultRecord(0, 0, 0, None)
    os.mkfifo(no_mps / "control")
    with pytest.raises(BackendError, match="refused under MPS"):
        device.arm(FaultPlan(site))


def test_each_sticky_fault_has_a_kernel_of_its_own() -> None:
    assert set(_cuda._STRIKES) == set(STICKY_SITES)
    assert {strike.__name__ for strike in _cuda._STRIKES.values()} == set(cuda.KERNELS)


@pytest.mark.parametrize(
    ("site", "provenance"),
    [
        (Site.DEVICE_MEMORY, Provenance.EXHAUSTED),
        (Site.DEVICE_GARBAGE, Provenance.CAPPED),
        (Site.RUNTIME_CRASH, Provenance.KILLED),
        (Site.LIBRARY_MISSING, Provenance.MISSING),
        *((site, Provenance.DEVICE) for site in STICKY_SITES),
    ],
)
def test_each_fault_comes_about_in_its_own_way(device: Any, site: Site, provenance: Provenance) -> None:
    assert device._provenance(site) is provenance


def test_a_full_cache_is_armed_only_where_a_cache_can_be_in_the_way(device: Any) -> None:
    plan = FaultPlan(Site.DEVICE_CACHE)
    if isinstance(device, OnnxruntimeCuda):
        device.arm(plan).disarm()
    else:
        with pytest.raises(Unsupported, match="gives its cached blocks back and asks again"):
            device.arm(plan)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_device_needs_a_limit(kind: type[CudaDevice]) -> None:
    with pytest.raises(ValueError, match="device_memory needs a device with a memory limit: call limit_memory first"):
        named(kind).arm(FaultPlan(Site.DEVICE_MEMORY))


@with_torch
def test_a_neighbour_leaves_room_for_what_torch_rounds_requests_up_to() -> None:
    spec = util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    header = Path(spec.origin).parent / "include/c10/core/AllocatorConfig.h"
    found = re.search(r"large_segment_size_\{(\d+)\}", header.read_text()) if header.is_file() else None
    if found is None:
        pytest.skip(f"not run: {header} does not say how large a segment is")
    assert TorchCuda.granularity_bytes > int(found[1]), f"a segment has {found[1]} bytes"


# What of them runs anywhere.


@given(total=st.integers(1 << 30, 1 << 40), share=st.floats(0.0, 1.0))
def test_a_limit_of_torch_is_a_limit_to_the_byte(total: int, share: float) -> None:
    limit = max(MIB, int(total * share))
    # What torch makes of it: c10/cuda/CUDACachingAllocator.cpp, setMemoryFraction.
    assert math.floor(torch_cuda._fraction(limit, total) * total) == limit


def test_no_limit_is_all_of_the_card() -> None:
    assert torch_cuda._fraction(None, 80 << 30) == torch_cuda._fraction(80 << 30, 80 << 30) == 1.0


@pytest.mark.parametrize(("kind", "expected"), [(TorchCuda, TorchCpu), (OnnxruntimeCuda, Cpu)])
def test_the_fallback_is_the_same_runtime_on_the_cpu_without_a_limit(
    kind: type[CudaDevice], expected: type[DeviceBackend]
) -> None:
    device = named(kind)
    fallback = device.fallback()
    assert type(fallback) is expected, f"the fallback is {fallback}"
    assert not fallback.device.startswith("cuda") and fallback._variant() == {"bounded": False}
    assert fallback._limit_bytes is None and fallback._board is device._board, "the plans that are armed are its too"
    fallback.close()
    device.close()


@pytest.mark.parametrize("kind", [pytest.param(TorchCuda, marks=with_torch), pytest.param(OnnxruntimeCuda)])
def test_the_fallback_runs_where_no_card_is_seen(
    kind: type[CudaDevice], in_child: InChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is OnnxruntimeCuda and util.find_spec("onnxruntime") is None:
        pytest.skip("not run: ONNX Runtime is not installed here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    program = f"""
import json, numpy as np
from backends.model import DEFAULT_MODEL, reference, read_onnx
device = named({kind.__name__})
features = np.random.RandomState(3).standard_normal((2, 150, 80)).astype(np.float32)
fallback = device.fallback()
scores = fallback.load(DEFAULT_MODEL).run(features)
exact = reference(*read_onnx(DEFAULT_MODEL), features)[:, -scores.shape[1]:]
print(json.dumps([fallback.device, float(np.max(np.abs(scores - exact)))]))
"""
    name, worst = in_child(NAMED + program)
    assert name in ("cpu", "torch-cpu") and worst < 1e-3, f"{name} differs by {worst}"


@with_torch
def test_torch_keeps_full_precision_and_repeats_itself_without_a_warning(in_child: InChild) -> None:
    program = """
import json
from backends._torch import quiet_torch
quiet_torch()
import os, torch
print(json.dumps([
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision,
    torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
    os.environ["CUBLAS_WORKSPACE_CONFIG"],
]))
"""
    matmul, conv, benchmark, deterministic, workspace = in_child(program)
    # "none": as the parent has it, and that is not TF32 unless somebody asks for it.
    assert matmul in ("ieee", "none") and conv in ("ieee", "none"), f"{matmul} and {conv}"
    # The two that torch takes for repeatable (aten/src/ATen/Context.cpp, checkCuBLASConfigDeterministic).
    assert not benchmark and deterministic and workspace in (":16:8", ":4096:8")


@with_torch
def test_what_workers_are_forked_from_asks_nothing_of_cuda(in_child: InChild) -> None:
    # After a fork of a process that did, CUDA cannot be used (CUDA C++ Programming Guide, "Initialization").
    program = """
import json, torch
asked = []
def watched(name, call):
    return lambda *args: asked.append(name) or call(*args)
for name in ("is_available", "device_count", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, watched(name, getattr(torch.cuda, name)))
from backends._torch import preload
preload()
torch.cuda.device_count()
print(json.dumps([TorchCuda.preload, asked]))
"""
    preload, asked = in_child(NAMED + program)
    assert preload == "backends._torch:preload"
    assert asked == ["device_count"], f"CUDA was asked: {asked}; the last is the test's own question"


# ONNX Runtime's sessions.


@with_onnxruntime
def test_a_session_never_falls_back_repeats_itself_and_is_in_the_shared_arena_only_under_a_limit() -> None:
    device = named(OnnxruntimeCuda)
    free = device._options()
    device._limit_bytes = LIMIT_BYTES
    bound = device._options()
    for options in (free, bound):
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        assert options.use_deterministic_compute
    assert bound.get_session_config_entry("session.use_env_allocators") == "1"
    with pytest.raises(RuntimeError, match="use_env_allocators"):
        free.get_session_config_entry("session.use_env_allocators")


def test_the_provider_is_asked_for_alone_with_its_card_and_its_cap() -> None:
    class Second(OnnxruntimeCuda):
        def _named(self, device: str | None) -> tuple[str, int]:
            return "cuda:1", 1

    device = Second()
    ((provider, options),) = device._providers()
    assert (provider, options["device_id"], device.arena) == ("CUDAExecutionProvider", "1", "gpu:1")
    assert options["use_tf32"] == "0" and "gpu_mem_limit" not in options
    device._limit_bytes = LIMIT_BYTES
    ((_, options),) = device._providers()
    assert options["gpu_mem_limit"] == str(LIMIT_BYTES)
    assert all(isinstance(value, str) for value in options.values()), f"the runtime reads text: {options}"


@with_onnxruntime
@pytest.mark.parametrize("model", [BLOCK_MODEL, PROBE_MODEL, DEFAULT_MODEL], ids=lambda path: path.stem)
def test_a_build_without_the_provider_would_warn_and_run_on_the_cpu_and_is_refused(model: Path) -> None:
    import onnxruntime as ort

    if OnnxruntimeCuda.provider in ort.get_available_providers():
        pytest.skip("not run: this build has the CUDA provider (tests/unit/test_cuda_refusals.py is about it)")
    with pytest.warns(UserWarning, match="not in available provider names"):
        silent = ort.InferenceSession(str(model), providers=[OnnxruntimeCuda.provider])
    assert silent.get_providers() == ["CPUExecutionProvider"], "the runtime itself refuses: nothing to guard against"
    with pytest.raises(BackendError, match=rf"{model.name} would run on the CPU: .*pip install 'onnxruntime-gpu\[cuda"):
        named(OnnxruntimeCuda)._session(model)


@with_torch
def test_a_load_is_measured_and_is_no_point_of_a_plan(in_child: InChild) -> None:
    # Torch's own CPU stands in for the card: how the load, its runs and the plans go together is the same.
    program = """
import json
import numpy as np
from backends.contract import FaultPlan, Site
from backends.model import DEFAULT_MODEL

device = named(TorchCuda)
type(device).torch_device = lambda self: "cpu"
type(device)._in_use_bytes = lambda self: 0
device._is_here, device._limit_bytes = True, 96 << 20
with device.arm(FaultPlan(Site.DEVICE_MEMORY, nth=2)) as fault:
    model = device.load(DEFAULT_MODEL)
    loaded = fault.record().points_seen
    model.run(np.zeros((1, model.window_frames, 80), np.float32))
    print(json.dumps([loaded, fault.record().points_seen, model.working_set_bytes(1)]))
"""
    loaded, run, working_set_bytes = in_child(NAMED + program)
    assert (loaded, run) == (0, 1), f"{loaded} points after the load, {run} after a run"
    # At least the first convolution's output is there: 32 images of a window.
    assert working_set_bytes >= 32 * 150 * N_MELS * 4


# With a GPU.


@pytest.fixture
def count() -> int:
    if MISSING is not None:
        pytest.skip(f"not run: {MISSING}")
    return open_driver().device_count()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_beyond_the_last_is_refused_with_those_that_are_there(kind: type[CudaDevice], count: int) -> None:
    with pytest.raises(BackendError, match=rf"has no device 'cuda:{count}': expected one of cuda:0"):
        kind(f"cuda:{count}")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_handle_makes_no_context(kind: type[CudaDevice], count: int, in_child: InChild) -> None:
    program = f"""
import ctypes, json
from backends.contract import FaultPlan, Site
from backends.faults.cuda import open_driver
device = {kind.__name__}()
device.limit_memory({LIMIT_BYTES})
device.probe(), device.memory(), device.arm(FaultPlan(Site.DEVICE_MEMORY)).disarm(), device.fallback()
flags, active = ctypes.c_uint(), ctypes.c_int(-1)
handle = open_driver()._handle(0)
ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(handle, ctypes.byref(flags), ctypes.byref(active))
print(json.dumps(active.value))
"""
    assert in_child(NAMED + program) == 0, "a user's process has a context on the card"


@pytest.mark.gpu
def test_a_poisoned_context_is_not_out_of_memory(count: int, in_child: InChild) -> None:
    if os.environ.get(cuda.ALLOW_DEVICE_FAULTS) != "1":
        pytest.skip(f"not run: faults that poison a context are not allowed ({cuda.ALLOW_DEVICE_FAULTS})")
    program = """
import json
from backends.faults.cuda import trap
device = named(OnnxruntimeCuda)
trap(0)
print(json.dumps(device._why_refused().kind.value))
"""
    assert in_child(NAMED + program) == ErrorKind.DEVICE_STICKY.value
